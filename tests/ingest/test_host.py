from yarl import URL

from ingest.host import LATE_S, Grant, KnownHosts


def test_hosts_are_forgotten_oldest_first_but_never_a_busy_one():
    known = KnownHosts()
    busy, resting = known.of(URL("http://busy.example"), 0.0), known.of(URL("http://resting.example"), 0.0)
    busy.in_flight, resting.resting_until = 1, 1000.0
    for number in range(60_000):
        known.of(URL(f"http://host{number}.example/x"), 10.0)
    assert len(list(known)) <= 20_000
    assert known.of(URL("http://busy.example/other"), 10.0) is busy
    assert known.of(URL("http://resting.example/other"), 10.0) is resting
    assert known.of(URL("http://host59999.example:80/other"), 10.0).label == "host59999.example"


def test_a_host_is_scheme_name_and_port():
    known = KnownHosts()
    urls = [
        "http://a.example",
        "https://a.example",
        "http://a.example:81",
        "http://[2001:4860::1]:81",
        "http://b.example",
    ]
    hosts = [known.of(URL(url), 0.0) for url in urls]
    assert len({host.key for host in hosts}) == len(urls)
    assert [host.label for host in hosts] == [
        "a.example",
        "a.example",
        "a.example:81",
        "[2001:4860::1]:81",
        "b.example",
    ]


def test_a_place_that_was_not_used_in_time_is_lost():
    grant = Grant(spacing_s=0.02)
    grant.places.append((10.0, 50))
    grant.places.append((20.0, 1))
    assert grant.next_place(9.0) == 10.0
    grant.use_place()
    assert grant.next_place(9.0) == 10.02
    late = grant.next_place(10.5)
    assert 10.5 - LATE_S <= late <= 10.5 - LATE_S + 0.02
    assert grant.next_place(11.5) == 20.0
    grant.use_place()
    assert grant.next_place(11.5) == float("inf")

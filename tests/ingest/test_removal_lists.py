"""Lists of a takedown: which rows they mean, and what they refuse."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.removal_lists import read_removal_list
from ingest.urls import normalised_url

PLAIN = "http://example.org/a/b~c.jpg?x=1&y=%C3%A9"


def urls(*values: str | bytes | None) -> pa.Table:
    texts = [value if isinstance(value, str) else None for value in values]
    raw = [value if isinstance(value, bytes) else None for value in values]
    return pa.table({"url": pa.array(texts, pa.string()), "url_bytes": pa.array(raw, pa.binary())})


def rows_meant(tmp_path: Path, kind: Any, listed: str | bytes, table: pa.Table) -> list[int]:
    path = tmp_path / "list.txt"
    path.write_bytes(listed if isinstance(listed, bytes) else listed.encode())
    found = read_removal_list(kind, path).matches(table)
    masks = list(found.values())
    assert all((sum(int(mask[row]) for mask in masks) <= 1) for row in range(table.num_rows)), "counted once"
    return [row for row in range(table.num_rows) if any(mask[row] for mask in masks)]


@pytest.mark.parametrize(
    "spelled",
    [
        "https://example.org/a/b~c.jpg?x=1&y=%C3%A9",
        "HTTP://EXAMPLE.org.:80/a/b~c.jpg?x=1&y=é",
        "http://user:secret@example.org/a/b~c.jpg?x=1&y=%c3%a9",
        "http://example.org/z/../a/./b%7Ec.jpg?x=1&y=%C3%A9#part",
        " http:\\\\example.org\\a\\b~c.jpg?x=1&y=%C3%A9\n",
    ],
)
def test_spellings_of_one_url_have_one_normal_form(spelled: str) -> None:
    assert normalised_url(spelled) == normalised_url(PLAIN) == "//example.org/a/b~c.jpg?x=1&y=%C3%A9"


@pytest.mark.parametrize(
    "other",
    [
        "http://example.org/a/B~c.jpg?x=1&y=%C3%A9",
        "http://example.org/a/b~c.jpg?y=%C3%A9&x=1",
        "http://example.org:8080/a/b~c.jpg?x=1&y=%C3%A9",
        "http://www.example.org/a/b~c.jpg?x=1&y=%C3%A9",
        "http://example.org/a%2Fb~c.jpg?x=1&y=%C3%A9",
        "ftp://example.org/a/b~c.jpg?x=1&y=%C3%A9",
    ],
)
def test_what_may_be_another_picture_has_another_form(other: str) -> None:
    assert normalised_url(other) != normalised_url(PLAIN)


def test_a_name_of_another_alphabet_equals_its_ascii_form() -> None:
    assert normalised_url("http://MÜNCHEN.de/x") == normalised_url("http://xn--mnchen-3ya.de/x")


@given(st.text(max_size=60), st.text(max_size=60))
def test_the_normal_form_is_stable_and_never_fails(host: str, rest: str) -> None:
    form = normalised_url(f"http://{host}/{rest}")
    assert form is None or normalised_url(f"http:{form}") == form


def test_urls_are_found_by_spelling_by_normal_form_and_by_bytes(tmp_path: Path) -> None:
    table = urls(
        "http://a.org/x", "https://A.org/x", "http://a.org/y", b"http://a.org/\xff", None, "x.jpg", "not a url"
    )
    listed = b"\xef\xbb\xbfhttp://a.org/x\r\n\r\n# http://a.org/y\nhttp://a.org/\xff\nx.jpg\n"
    assert rows_meant(tmp_path, "urls", listed, table) == [0, 1, 3, 5]


def test_a_domain_means_what_lies_below_it_and_no_namesake(tmp_path: Path) -> None:
    table = urls(
        "http://a.org/1", "https://deep.img.A.ORG.:8080/2", "http://ba.org/3", "http://a.org.evil.net/4",
        "http://evil.net/a.org", "http://user@a.org/6", "http://a%2Eorg/7", "//a.org/8", None, "http://[::1]/9",
        b"http://a.org/\xff", b"http://b.net/\xff",
    )  # fmt: skip
    assert rows_meant(tmp_path, "domains", "*.a.org\n", table) == [0, 1, 5, 6, 10]
    assert rows_meant(tmp_path, "domains", "ORG", table) == [0, 1, 2, 5, 6, 10]


def test_hashes_mean_the_fetched_or_the_stored_picture(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image_sha256": pa.array(["aa" * 32, "bb" * 32, None], pa.string()),
            "stored_sha256": pa.array(["cc" * 32, None, None], pa.string()),
        }
    )
    assert rows_meant(tmp_path, "image_hashes", "AA" * 32 + "\n" + "bb" * 32, table) == [0, 1]
    assert rows_meant(tmp_path, "image_hashes", "cc" * 32, table) == [0]


def test_pair_ids_are_hexadecimal(tmp_path: Path) -> None:
    table = pa.table({"pair_id": pa.array([b"\x01" * 16, b"\x02" * 16], pa.binary(16))})
    assert rows_meant(tmp_path, "pairs", "02" * 16, table) == [1]

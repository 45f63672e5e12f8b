import math

import pytest

from embed.interval import clopper_pearson


def test_none_seen_has_the_closed_form() -> None:
    low, high = clopper_pearson(0, 40)
    assert low == 0.0
    assert high == pytest.approx(1 - 0.025 ** (1 / 40), abs=1e-9)


def test_published_values() -> None:
    """Brown, Cai, DasGupta (2001) tabulate the exact interval; 10 of 100 is the textbook one."""
    assert clopper_pearson(10, 100) == pytest.approx((0.0490047, 0.1762226), abs=1e-7)
    assert clopper_pearson(3, 7) == pytest.approx((0.0989883, 0.8159484), abs=1e-7)


def test_the_interval_covers_as_often_as_it_promises() -> None:
    trials, share = 30, 0.2
    covered = sum(
        math.comb(trials, seen) * share**seen * (1 - share) ** (trials - seen)
        for seen in range(trials + 1)
        if clopper_pearson(seen, trials)[0] <= share <= clopper_pearson(seen, trials)[1]
    )
    assert covered >= 0.95


def test_all_seen_none_asked_and_nonsense() -> None:
    assert clopper_pearson(5, 5)[1] == 1.0
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="6 successes in 5 trials"):
        clopper_pearson(6, 5)


def test_a_large_set_is_no_trouble() -> None:
    low, high = clopper_pearson(5_000, 100_000)
    assert (low, high) == pytest.approx((0.0486573, 0.0513689), abs=1e-7)

from hypothesis import given
from hypothesis import strategies as st

from embed.split import TRAIN, VALIDATION, is_validation, split_of

PAIR_IDS = [index.to_bytes(16, "big") for index in range(20_000)]


def test_share_of_validation_is_the_fraction() -> None:
    share = is_validation(PAIR_IDS, 0.05).mean()
    assert abs(share - 0.05) < 4 * (0.05 * 0.95 / len(PAIR_IDS)) ** 0.5


@given(st.binary(min_size=16, max_size=16), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_larger_fraction_never_moves_a_pair_back_to_train(pair_id: bytes, one: float, other: float) -> None:
    small, large = sorted((one, other))
    if split_of(pair_id, small) == VALIDATION:
        assert split_of(pair_id, large) == VALIDATION


def test_many_pairs_are_split_as_each_of_them() -> None:
    many = is_validation(PAIR_IDS[:500], 0.3)
    assert [VALIDATION if there else TRAIN for there in many] == [split_of(pair_id, 0.3) for pair_id in PAIR_IDS[:500]]


def test_the_split_of_known_pairs_never_changes() -> None:
    """Golden: a change here moves pairs between train and validation of every existing run."""
    assert [split_of(bytes([index]) * 16, 0.5)[0] for index in range(12)] == list("tvttvtvtttvv")


def test_nothing_and_everything() -> None:
    assert not is_validation(PAIR_IDS[:100], 0.0).any()
    assert is_validation(PAIR_IDS[:100], 1.0).all()

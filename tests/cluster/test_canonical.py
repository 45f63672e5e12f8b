"""One value, one spelling."""

import json
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.canonical import canonical_json, digest

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(PLAIN)
def test_canonical_json_reads_back_as_the_value(value: Any) -> None:
    try:
        spelled = canonical_json(value)
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8
        return
    assert json.loads(spelled) == value


@given(st.dictionaries(st.text(alphabet="abc"), st.integers()))
def test_the_order_of_keys_does_not_matter(value: dict[str, int]) -> None:
    assert digest(value) == digest(dict(reversed(value.items())))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"x", {1: 2}, {"a": [date(2026, 1, 1)]}, {"a"}])
def test_what_has_no_single_spelling_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^\$"):
        canonical_json(value)

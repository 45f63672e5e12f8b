import time

import numpy as np
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from embed.tokenizer import BYTE_TOKENS, END, START, Tokenizer, compact_vocabulary, encode, spell

CAPTIONS = ["a small red circle above a large blue square", "a large green circle"]


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60))
def test_tokens_are_open_clips(caption: str) -> None:
    tokens_BT, _ = Tokenizer(16)([caption])
    assert np.array_equal(tokens_BT, open_clip.tokenize([caption], 16).numpy())


def test_captions_that_do_not_fit_are_cut_and_counted() -> None:
    tokens_BT, cut_B = Tokenizer(6)(["a red circle", "a small red circle above a square"])
    assert cut_B.tolist() == [False, True]
    assert tokens_BT[1, -1] == END


def test_compact_ids_stand_for_the_same_bpe_tokens() -> None:
    vocabulary = compact_vocabulary(CAPTIONS)
    full_BT, _ = Tokenizer(16)(CAPTIONS)
    compact_BT, _ = Tokenizer(16, vocabulary)(CAPTIONS)
    lengths = (full_BT == END).argmax(axis=1) + 1
    for full, compact, length in zip(full_BT, compact_BT, lengths, strict=True):
        assert np.array_equal(np.array(vocabulary)[compact[:length]], full[:length])


def test_compact_vocabulary_does_not_depend_on_the_order_of_captions() -> None:
    assert compact_vocabulary(CAPTIONS) == compact_vocabulary(CAPTIONS[::-1])
    assert len(compact_vocabulary(CAPTIONS)) < BYTE_TOKENS + 20


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=30))
def test_a_compact_vocabulary_spells_every_caption(caption: str) -> None:
    tokenizer = Tokenizer(400, compact_vocabulary(CAPTIONS))
    tokens_BT, _ = tokenizer([caption])
    assert tokens_BT.max() == tokenizer.size - 1  # <end_of_text> is the highest id: open_clip pools at the argmax
    vocabulary = compact_vocabulary(CAPTIONS)
    written = [vocabulary[token] for token in tokens_BT[0, : tokens_BT[0].argmax() + 1]]
    expected = [START, *(part for token in encode(caption) for part in _spelled(token, vocabulary)), END]
    assert written == expected


def _spelled(token: int, vocabulary: list[int]) -> list[int]:
    return [token] if token in vocabulary else spell(token)


def test_a_million_letters_take_no_time() -> None:
    started = time.perf_counter()
    _, cut_B = Tokenizer(77)(["x" * 1_000_000, "word " * 200_000])
    assert cut_B.all()
    assert time.perf_counter() - started < 5.0


def test_a_vocabulary_of_another_make_is_refused() -> None:
    with pytest.raises(UserError, match="vocabulary"):
        Tokenizer(16, [1, 2, 3])


def test_identity_tells_vocabularies_apart() -> None:
    full, compact = Tokenizer(16), Tokenizer(16, compact_vocabulary(CAPTIONS))
    assert full.identity() != compact.identity()
    assert full.identity() != Tokenizer(17).identity()

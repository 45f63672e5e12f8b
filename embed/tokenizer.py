"""open_clip's byte-level BPE, optionally on a compact vocabulary.

A CLIP of a million parameters would spend six million more on the 49,408 token embeddings, nearly all of tokens that
its captions never use. A compact vocabulary keeps the 512 byte tokens, the merges that the training captions use and
the two special tokens, in BPE order:

    [ 0 … 511 bytes | merges in use … | <start_of_text> | <end_of_text> ]      compact id = position in this list

A word whose merge is not kept is spelled in bytes, so every caption still has tokens and none is "unknown".
<end_of_text> stays the highest id, which open_clip's argmax pooling needs.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.canonical import digest
from cluster.errors import UserError
from embed.architecture import BPE_VOCABULARY_SIZE

BYTE_TOKENS = 512  # 256 bytes inside a word, 256 at its end
START, END = 49_406, 49_407
SPECIAL_WORDS = ("<start_of_text>", "<end_of_text>")
MAX_TOKEN_CHARACTERS = 32  # no BPE token is longer; merging a word of a million letters takes quadratic time
MAX_CACHED_WORDS = 500_000


class Tokenizer:
    """Captions to token ids of a fixed context length, padded with 0 after <end_of_text>."""

    def __init__(self, context_length: int, vocabulary: Sequence[int] | None = None) -> None:
        self.context_length = context_length
        self.vocabulary = None if vocabulary is None else list(vocabulary)
        self._compact: dict[int, int] | None = None
        if self.vocabulary is not None:
            _check_vocabulary(self.vocabulary)
            self._compact = {token: index for index, token in enumerate(self.vocabulary)}
        self.size = BPE_VOCABULARY_SIZE if self.vocabulary is None else len(self.vocabulary)

    def __call__(self, captions: Iterable[str]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens (B, T) and, per caption, whether it was cut to fit."""
        rows = [self._tokens(caption) for caption in captions]
        tokens_BT = np.zeros((len(rows), self.context_length), dtype=np.int64)
        cut_B = np.zeros(len(rows), dtype=np.bool_)
        end = END if self._compact is None else self._compact[END]
        for index, row in enumerate(rows):
            cut_B[index] = len(row) > self.context_length
            if cut_B[index]:
                row = [*row[: self.context_length - 1], end]
            tokens_BT[index, : len(row)] = row
        return tokens_BT, cut_B

    def identity(self) -> dict[str, Any]:
        return {
            "bpe": "open_clip/bpe_simple_vocab_16e6",
            "context_length": self.context_length,
            "vocabulary": None if self.vocabulary is None else digest(self.vocabulary),
        }

    def _tokens(self, caption: str) -> list[int]:
        tokens = [START, *encode(caption, self.context_length), END]
        if self._compact is None:
            return tokens
        compact: list[int] = []
        for token in tokens:
            index = self._compact.get(token)
            compact.extend([index] if index is not None else spell(token))
        return compact


def compact_vocabulary(captions: Iterable[str]) -> list[int]:
    """The sorted BPE ids that a compact vocabulary keeps for these captions; their order does not matter."""
    used: set[int] = set()
    for caption in captions:
        used.update(encode(caption))
    return sorted(used.union(range(BYTE_TOKENS), (START, END)))


def encode(caption: str, max_tokens: int | None = None) -> list[int]:
    """BPE ids without the special tokens. With `max_tokens` a huge caption is cut before the work, not after it."""
    if max_tokens is not None and len(caption) > MAX_TOKEN_CHARACTERS * max_tokens:
        caption = " ".join(caption.split())[: MAX_TOKEN_CHARACTERS * max_tokens]
    bpe = _bpe()
    if len(bpe.cache) > MAX_CACHED_WORDS:  # open_clip remembers every word it ever saw
        for word in [word for word in bpe.cache if word not in SPECIAL_WORDS]:
            del bpe.cache[word]
    return list(bpe.encode(caption))


def spell(token: int) -> list[int]:
    """The byte tokens of a merged token."""
    bpe = _bpe()
    text = bpe.decoder[token]
    ends_word = text.endswith("</w>")
    letters = list(text.removesuffix("</w>"))
    if ends_word:
        letters[-1] += "</w>"
    return [bpe.encoder[letter] for letter in letters]


@cache
def _bpe() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _check_vocabulary(vocabulary: list[int]) -> None:
    if (
        vocabulary[:BYTE_TOKENS] != list(range(BYTE_TOKENS))
        or vocabulary[-2:] != [START, END]
        or any(a >= b for a, b in pairwise(vocabulary))
    ):
        raise UserError(
            "encoder.json holds a vocabulary that is not the byte tokens, merges in rising order and the two special "
            "tokens; take the file that belongs to these weights"
        )

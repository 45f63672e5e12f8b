"""Block-lists: URLs, domains, captions and pictures that are kept out. Text files at any fsspec URI, one entry a line.

    blocked_urls       compared in one spelling (`ingest.urls`): http and https, escapes, default ports are one
    blocked_domains    example.org means img.example.org too, but not badexample.org
    blocked_captions   words or phrases: "bad word" is in "A BAD, word." but not in "bad wording"
    blocked_images     hex digits: 32 MD5, 40 SHA-1, 64 SHA-256 of the file; 16 a perceptual hash (`ingest.perceptual`)

Empty lines and lines that begin with # say nothing. Entries are kept as 8-byte digests in sorted arrays: of a million
SHA-256 the worker holds 65 MB of text, for children to come, and each child 8 MB. That a picture collides with one of
them by chance is less likely than 1 in 10¹³.
"""

import hashlib
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cluster.errors import UserError
from ingest.decode_config import BLOCK_LISTS, FiltersConfig
from ingest.urls import canonical_host, normalised_url, url_host

_HEX_OF = {32: "md5", 40: "sha1", 64: "sha256"}
_PERCEPTUAL_DIGITS = 16
_DOMAIN = re.compile(r"[^\s/:@?#\\]+")
_WORD = re.compile(r"\w+")


def read_block_lists(filters: FiltersConfig) -> dict[str, bytes]:
    """The text of each list that is set, by the name of its setting. Raises `UserError` where one cannot be read."""
    import fsspec  # not in the children, which are given the texts

    lists = {}
    for name in BLOCK_LISTS:
        uri = getattr(filters, name)
        if uri is None:
            continue
        try:
            with fsspec.open(uri, "rb") as file:
                lists[name] = file.read()
        except (OSError, ImportError, ValueError) as error:
            raise UserError(f"images.filters.{name}: {uri} cannot be read: {error}") from None
    return lists


class Keys:
    """A set of byte strings in 8 bytes each."""

    def __init__(self, entries: Iterable[bytes] = ()) -> None:
        self._digests = bytearray()
        for entry in entries:
            self.add(entry)

    def add(self, entry: bytes) -> None:
        self._digests += hashlib.blake2b(entry, digest_size=8).digest()

    @cached_property
    def _sorted(self) -> NDArray[np.uint64]:
        digests, self._digests = self._digests, bytearray()
        return np.unique(np.frombuffer(digests, np.uint64))

    def has(self, entry: bytes) -> bool:
        digest = np.frombuffer(hashlib.blake2b(entry, digest_size=8).digest(), np.uint64)[0]
        place = int(np.searchsorted(self._sorted, digest))
        return place < len(self._sorted) and bool(self._sorted[place] == digest)


class BlockedUrls:
    def __init__(self, text: bytes) -> None:
        self._hosts, self._urls = Keys(), Keys()
        for _, url in _entries(text, "blocked_urls"):
            self._hosts.add(url_host(url).encode())
            self._urls.add(url.encode())
            self._urls.add((normalised_url(url) or url).encode())

    def has(self, url: str) -> bool:
        raw = url.encode("utf-8", "surrogatepass")
        if not self._hosts.has(url_host(url).encode("utf-8", "surrogatepass")):
            return self._urls.has(raw)
        return self._urls.has(raw) or self._urls.has((normalised_url(url) or url).encode("utf-8", "surrogatepass"))


class BlockedDomains:
    def __init__(self, text: bytes) -> None:
        self._domains = Keys()
        for number, entry in _entries(text, "blocked_domains"):
            domain = entry.removeprefix("*.").removeprefix(".")
            if not _DOMAIN.fullmatch(domain):
                raise _wrong("blocked_domains", number, entry, "a domain such as example.org")
            self._domains.add(canonical_host(domain).encode())

    def has(self, url: str) -> bool:
        labels = url_host(url).split(".")
        return any(
            self._domains.has(".".join(labels[start:]).encode("utf-8", "surrogatepass")) for start in range(len(labels))
        )


class BlockedCaptions:
    def __init__(self, text: bytes) -> None:
        phrases = []
        for number, entry in _entries(text, "blocked_captions"):
            words = _words(entry)
            if not words:
                raise _wrong("blocked_captions", number, entry, "a word or a phrase")
            phrases.append(words)
        self._lengths = sorted({len(words) for words in phrases})
        self._phrases = Keys(" ".join(words).encode() for words in phrases)
        self._first = frozenset(words[0] for words in phrases)

    def has(self, caption: str) -> bool:
        words = _words(caption)
        for place, word in enumerate(words):
            if word in self._first:
                for length in self._lengths:
                    if place + length <= len(words):
                        phrase = " ".join(words[place : place + length])
                        if self._phrases.has(phrase.encode("utf-8", "surrogatepass")):
                            return True
        return False


class BlockedImages:
    """Hashes of files, and perceptual hashes of pictures."""

    def __init__(self, text: bytes) -> None:
        self._files: dict[str, Keys] = {}
        perceptual = []
        for number, entry in _entries(text, "blocked_images"):
            kind = _HEX_OF.get(len(entry))
            try:
                digest = bytes.fromhex(entry)
            except ValueError:
                kind, digest = None, b""
            if len(digest) == _PERCEPTUAL_DIGITS // 2:
                perceptual.append(int(entry, 16))
            elif kind is not None:
                self._files.setdefault(kind, Keys()).add(digest)
            else:
                raise _wrong(
                    "blocked_images", number, entry, "32, 40 or 64 hexadecimal digits, or 16 of a perceptual hash"
                )
        self._perceptual = np.unique(np.array(perceptual, np.uint64))

    @property
    def has_perceptual(self) -> bool:
        return len(self._perceptual) > 0

    def has_file(self, body: bytes) -> bool:
        return any(
            keys.has(hashlib.new(kind, body, usedforsecurity=False).digest()) for kind, keys in self._files.items()
        )

    def has_picture(self, perceptual_hash: int, distance: int) -> bool:
        differing = np.bitwise_count(self._perceptual ^ np.uint64(perceptual_hash))
        return bool((differing <= distance).any())


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _entries(text: bytes, name: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(io.BytesIO(text.removeprefix(b"\xef\xbb\xbf")), start=1):
        entry = line.strip()
        if not entry or entry.startswith(b"#"):
            continue
        try:
            yield number, entry.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"images.filters.{name}, line {number} is not UTF-8: {line[:80]!r}") from None


def _wrong(name: str, number: int, entry: str, expected: str) -> UserError:
    return UserError(f"images.filters.{name}, line {number}: {entry[:80]!r} is not {expected}")

"""What a takedown names: URLs, domains, hashes of pictures or pair ids, one a line, and which rows they mean.

    urls           rows whose URL is spelled so, or has the same normalised form (`normalised_url`)
    domains        rows whose URL's host is the domain or below it: `example.org` means `img.example.org`, not
                   `badexample.org`
    image_hashes   rows whose picture, as fetched or as stored, has this SHA-256
    pairs          rows with this `pair_id`

Empty lines and lines that begin with `#` say nothing. A list is held in memory; the rows stream past it in tables.
A host is read from each URL as it was given: where a redirect led is not recorded.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.errors import UserError
from ingest.urls import canonical_host, normalised_url, url_host

ListKind = Literal["urls", "domains", "image_hashes", "pairs"]
Mask = NDArray[np.bool_]

_HOST = r"^[\x00-\x20]*[A-Za-z][A-Za-z0-9+.\-]*:[/\\]*(?:[^/\\?#@]*@)?(?P<host>\[[^\]/\\]*\]|[^/\\?#:]*)"
_DOMAIN = re.compile(r"[^\s/:@?#\\]+")


class RemovalList(Protocol):
    """A list that has been read. `columns` are those that `matches` looks at, of the pairs or of the ledger."""

    kind: ListKind
    listed: int
    of: Literal["pairs", "images"]
    columns: tuple[str, ...]

    def matches(self, table: pa.Table) -> dict[str, Mask]:
        """Rows of the table that the list means, by the way in which they were found."""
        ...


def read_removal_list(kind: ListKind, path: str | Path) -> RemovalList:
    """The list in a file. Raises `UserError` where it cannot be read, holds nothing, or holds what it should not."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    lines = [
        (number, line.strip()) for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    ]
    lines = [(number, line) for number, line in lines if line and not line.startswith(b"#")]
    if not lines:
        raise UserError(f"{path} names nothing: one entry a line is expected, and lines with # are comments.")
    reader: Callable[[list[tuple[int, bytes]], str], RemovalList] = _READERS[kind]
    return reader(lines, str(path))


@dataclass(frozen=True)
class UrlList:
    """URLs, by their spelling and by their normalised form. A line that is not UTF-8 is compared as bytes alone."""

    listed: int
    texts: pa.Array
    raw: pa.Array
    normalised: frozenset[str]
    hosts: frozenset[str]
    kind: ListKind = "urls"
    of: Literal["pairs", "images"] = "pairs"
    columns: tuple[str, ...] = ("url", "url_bytes")

    @classmethod
    def read(cls, lines: list[tuple[int, bytes]], path: str) -> "UrlList":
        texts, raw = [], []
        for _, line in lines:
            try:
                texts.append(line.decode("utf-8"))
            except UnicodeDecodeError:
                raw.append(line)
        forms = [form for text in texts if (form := normalised_url(text)) is not None]
        hosts = {url_host(text) for text in texts}
        return cls(
            len(lines), pa.array(texts, pa.string()), pa.array(raw, pa.binary()), frozenset(forms), frozenset(hosts)
        )

    def matches(self, table: pa.Table) -> dict[str, Mask]:
        urls = table["url"]
        exact = _mask(pc.is_in(urls, value_set=self.texts)) | _mask(pc.is_in(table["url_bytes"], value_set=self.raw))
        # Of the rest only rows of a host that the list has are brought into normal form, one by one.
        near = _rows_of_hosts(urls, lambda host: host in self.hosts) & ~exact
        normalised = np.zeros(len(exact), dtype=np.bool_)
        for row in np.flatnonzero(near):
            normalised[row] = normalised_url(urls[int(row)].as_py()) in self.normalised
        return {"exact": exact, "normalised": normalised}


@dataclass(frozen=True)
class DomainList:
    """Domains with all that lies below them."""

    listed: int
    domains: frozenset[str]
    kind: ListKind = "domains"
    of: Literal["pairs", "images"] = "pairs"
    columns: tuple[str, ...] = ("url", "url_bytes")

    @classmethod
    def read(cls, lines: list[tuple[int, bytes]], path: str) -> "DomainList":
        domains = set()
        for number, line in lines:
            text = line.decode("utf-8", "replace").removeprefix("*.").removeprefix(".")
            if not _DOMAIN.fullmatch(text):
                raise _wrong(path, number, line, "a domain such as example.org")
            domains.add(canonical_host(text))
        return cls(len(lines), frozenset(domains))

    def holds(self, host: str) -> bool:
        labels = host.split(".")
        return any(".".join(labels[start:]) in self.domains for start in range(len(labels)))

    def matches(self, table: pa.Table) -> dict[str, Mask]:
        # A URL that is not UTF-8 was never fetched, but it names its host all the same.
        raw = pa.array([url and url.decode("utf-8", "replace") for url in table["url_bytes"].to_pylist()], pa.string())
        return {"domain": _rows_of_hosts(table["url"], self.holds) | _rows_of_hosts(raw, self.holds)}


@dataclass(frozen=True)
class ImageHashList:
    """SHA-256 of pictures, of the bytes as fetched or as stored."""

    listed: int
    hashes: pa.Array
    kind: ListKind = "image_hashes"
    of: Literal["pairs", "images"] = "images"
    columns: tuple[str, ...] = ("image_sha256", "stored_sha256")

    @classmethod
    def read(cls, lines: list[tuple[int, bytes]], path: str) -> "ImageHashList":
        return cls(len(lines), pa.array([digits.lower() for digits in _hex(lines, path, 32)], pa.string()))

    def matches(self, table: pa.Table) -> dict[str, Mask]:
        fetched = _mask(pc.is_in(table["image_sha256"], value_set=self.hashes))
        return {"fetched": fetched, "stored": _mask(pc.is_in(table["stored_sha256"], value_set=self.hashes)) & ~fetched}


@dataclass(frozen=True)
class PairList:
    """Pair ids, as the tables have them."""

    listed: int
    pair_ids: pa.Array
    kind: ListKind = "pairs"
    of: Literal["pairs", "images"] = "pairs"
    columns: tuple[str, ...] = ()

    @classmethod
    def read(cls, lines: list[tuple[int, bytes]], path: str) -> "PairList":
        return cls(len(lines), pa.array([bytes.fromhex(digits) for digits in _hex(lines, path, 16)], pa.binary(16)))

    def matches(self, table: pa.Table) -> dict[str, Mask]:
        return {"pair_id": _mask(pc.is_in(table["pair_id"], value_set=self.pair_ids))}


_READERS: dict[str, Callable[[list[tuple[int, bytes]], str], Any]] = {
    "urls": UrlList.read,
    "domains": DomainList.read,
    "image_hashes": ImageHashList.read,
    "pairs": PairList.read,
}


def _rows_of_hosts(urls: pa.ChunkedArray | pa.Array, wanted: Callable[[str], bool]) -> Mask:
    """Rows whose host is wanted; each distinct host is looked at once."""
    hosts = pc.struct_field(pc.extract_regex(urls, pattern=_HOST), "host")
    hosts = (hosts.combine_chunks() if isinstance(hosts, pa.ChunkedArray) else hosts).dictionary_encode()
    found = np.array([bool(host) and wanted(canonical_host(host)) for host in hosts.dictionary.to_pylist()], np.bool_)
    there = _mask(pc.is_valid(hosts))
    mask = np.zeros(len(there), dtype=np.bool_)
    mask[there] = found[hosts.indices.drop_null().to_numpy(zero_copy_only=False)]
    return mask


def _hex(lines: Iterable[tuple[int, bytes]], path: str, size: int) -> Iterator[str]:
    for number, line in lines:
        text = line.decode("ascii", "replace")
        if not re.fullmatch(f"[0-9A-Fa-f]{{{2 * size}}}", text):
            raise _wrong(path, number, line, f"{2 * size} hexadecimal digits")
        yield text


def _wrong(path: str, number: int, line: bytes, expected: str) -> UserError:
    return UserError(f"{path} line {number} is {line[:80].decode('utf-8', 'replace')!r}: expected {expected}.")


def _mask(values: Any) -> Mask:
    return np.asarray(pc.fill_null(values, False), dtype=np.bool_)

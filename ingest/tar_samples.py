"""Webdataset samples: consecutive members of a tar with one key, which is the name up to its first dot.

A sample with a picture is a row. Its caption is `key.txt`, else `caption` of `key.json`, else empty; its URL is `url`
of `key.json`, else the name of file and member, so that two tars may use the same keys.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from cluster.errors import UserError
from ingest.source_files import SourceFile
from ingest.tar_members import Member, members

_KEY = re.compile(rb"^((?:.*/)?[^./][^./]*)\.([^/]+)$", re.DOTALL)


@dataclass
class Sample:
    """A row of a tar. Without an offset there is no picture that could be read; without anything, there is no tar."""

    url: bytes | None = None
    caption: bytes | None = None
    offset: int | None = None
    length: int | None = None


@dataclass
class _Gathered:
    """The members of a sample so far."""

    key: bytes
    picture: Member | None = None
    text: bytes | None = b""
    has_text: bool = False
    fields: dict[str, Any] = field(default_factory=dict)


def samples(filesystem: Any, file: SourceFile, suffixes: tuple[str, ...], max_text_bytes: int) -> Iterator[Sample]:
    """The rows of one tar. Raises `UserError` where the file cannot be read at all."""
    endings = tuple(suffix.encode() for suffix in suffixes)
    gathered: _Gathered | None = None
    try:
        with filesystem.open(file.path, "rb") as tar:
            for member in members(tar, file.bytes):
                named = None if member is None else _KEY.match(member.name)
                key = None if named is None else named[1]
                if gathered is not None and gathered.key != key:
                    yield from _finished(gathered, file)
                    gathered = None
                if member is None:
                    yield Sample()
                elif named is not None:
                    gathered = gathered or _Gathered(named[1])
                    _gather(gathered, member, b"." + named[2].lower(), endings, tar, max_text_bytes)
    except OSError as error:
        raise UserError(f"{file.path!r} cannot be read: {error.strerror or error}") from error
    if gathered is not None:
        yield from _finished(gathered, file)


def _gather(
    sample: _Gathered, member: Member, ending: bytes, endings: tuple[bytes, ...], tar: IO[bytes], max_text_bytes: int
) -> None:
    if ending.endswith(endings):
        sample.picture = sample.picture or member
    elif ending == b".txt":
        sample.has_text = True
        data = _text(tar, member, max_text_bytes)
        sample.text = None if data is None else data.strip()
    elif ending == b".json":
        try:
            fields = json.loads((_text(tar, member, max_text_bytes) or b"").decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError):
            return
        sample.fields = fields if isinstance(fields, dict) else {}


def _text(tar: IO[bytes], member: Member, max_bytes: int) -> bytes | None:
    if not member.plain or member.length > max_bytes:
        return None
    tar.seek(member.offset)
    data = tar.read(member.length)
    return data if len(data) == member.length else None


def _finished(sample: _Gathered, file: SourceFile) -> Iterator[Sample]:
    picture = sample.picture
    if picture is None:
        return
    caption = sample.text if sample.has_text else _string(sample.fields.get("caption")) or b""
    url = _string(sample.fields.get("url")) or file.name.encode("utf-8", "surrogateescape") + b"/" + picture.name
    whole = picture.plain and picture.offset + picture.length <= file.bytes
    where = (picture.offset, picture.length) if whole else (None, None)
    yield Sample(url, caption, *where)


def _string(value: Any) -> bytes | None:
    if not isinstance(value, str):
        return None
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogatepass")

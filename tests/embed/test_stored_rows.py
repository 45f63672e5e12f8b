import hashlib
from collections.abc import Callable

import pytest

from cluster.artifact import Artifact
from embed.stored_rows import StoredRow, open_pictures, stored_rows


def row(caption: str | None, caption_bytes: bytes | None = None) -> StoredRow:
    return StoredRow(bytes(16), "000000000", None, "pairs.csv", caption, caption_bytes, "00", 0, 0)


@pytest.mark.parametrize(
    ("caption", "caption_bytes", "text"),
    [("red", None, "red"), (None, None, ""), ("", None, ""), (None, b"caf\xe9", "caf\N{REPLACEMENT CHARACTER}")],
)
def test_a_caption_that_is_missing_or_no_utf8_has_a_text_and_a_hash_of_its_bytes(
    caption: str | None, caption_bytes: bytes | None, text: str
) -> None:
    stored = row(caption, caption_bytes)
    assert stored.text == text
    expected = caption_bytes if caption_bytes is not None else (caption or "").encode()
    assert stored.caption_sha256 == hashlib.sha256(expected).hexdigest()


def test_only_ok_rows_are_stored_and_each_is_read_from_its_place(images: Callable[..., str]) -> None:
    artifact = Artifact.open(images("images", [6], lost=[1, 4]))
    rows = stored_rows(artifact, 0)
    assert [stored.key for stored in rows] == ["000000000", "000000002", "000000003", "000000005"]
    with open_pictures(artifact, 0) as pictures:
        assert {pictures.read(stored).size for stored in reversed(rows)} == {(50, 40)}

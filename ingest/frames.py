"""What goes over the pipes between a worker and its decoding children. Lengths in front, little-endian; no pickle.

to the child     kind (1 byte), lengths of body, url, caption (4 bytes each), the body's place in the tray (1 byte; -1:
                 it comes with the frame), then those three
                 SETTINGS  body: JSON of what the child is to know; then one frame LIST for each block-list
                 LIST      body: the block-list's text; url: the name of its setting
                 DECODE    body: the picture as it was fetched
                 JUDGE     body: JSON, a list of [url, caption]
from the child   lengths of JSON and data (4 bytes each), the data's place (as above), then those two
                 first     {"ready": true} or {"wrong": "what the user must put right"}
                 DECODE    the fields of `Outcome` that are set; data: the picture
                 JUDGE     {"reasons": [null or why it is filtered, …]}
"""

import json
import os
import struct
from typing import IO, Any

from ingest.tray import Tray

SETTINGS, LIST, DECODE, JUDGE = b"S", b"L", b"D", b"J"

_TO_CHILD = struct.Struct("<cIIIb")
_FROM_CHILD = struct.Struct("<IIb")
HEAD_BYTES = _FROM_CHILD.size
IN_FRAME = -1


def request(kind: bytes, body: bytes, url: str = "", caption: str = "", place: int = IN_FRAME) -> list[bytes]:
    """The pieces of a frame, to be written one after another: bodies are not copied together."""
    url_bytes, caption_bytes = url.encode("utf-8", "surrogatepass"), caption.encode("utf-8", "surrogatepass")
    head = _TO_CHILD.pack(kind, len(body), len(url_bytes), len(caption_bytes), place)
    return [head, body, url_bytes + caption_bytes] if place == IN_FRAME else [head + url_bytes + caption_bytes]


def read_request(file: IO[bytes], tray: Tray) -> tuple[bytes, bytes, str, str, int] | None:
    """Kind, body, url, caption, place; None where the pipe has ended, whole or in the midst of a frame."""
    head = file.read(_TO_CHILD.size)
    if len(head) < _TO_CHILD.size:
        return None
    kind, body_bytes, url_bytes, caption_bytes, place = _TO_CHILD.unpack(head)
    body = file.read(body_bytes) if place == IN_FRAME else tray.take(place, body_bytes)
    text = file.read(url_bytes + caption_bytes)
    if len(body) + len(text) < body_bytes + url_bytes + caption_bytes:
        return None
    url, caption = text[:url_bytes], text[url_bytes:]
    return kind, body, url.decode("utf-8", "surrogatepass"), caption.decode("utf-8", "surrogatepass"), place


def write_answer(descriptor: int, answer: dict[str, Any], data: bytes = b"", place: int = IN_FRAME) -> None:
    text = json.dumps(answer).encode()
    pieces = [_FROM_CHILD.pack(len(text), len(data), place), text]
    if place == IN_FRAME:
        pieces.append(data)
    written = os.writev(descriptor, pieces)
    if written < sum(map(len, pieces)):  # a pipe takes all of it unless a signal comes in between
        rest = memoryview(b"".join(pieces))[written:]
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def answer_head(received: bytearray) -> tuple[int, int, int]:
    """Lengths of the JSON and of the data, and the data's place, from the first HEAD_BYTES of an answer."""
    text_bytes, data_bytes, place = _FROM_CHILD.unpack_from(received)
    return text_bytes, data_bytes, place

import os
from collections.abc import Iterator

import pytest

from ingest.tray import PLACES, Tray, tray_memory


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = tray_memory()
    yield descriptor
    os.close(descriptor)


def test_what_one_side_puts_the_other_takes_place_by_place(memory: int):
    here, there = Tray(memory), Tray(memory)
    pieces = [os.urandom(size) for size in (1 << 20, 0, 50_000)]
    assert len(pieces) == PLACES and all(here.holds(piece) for piece in pieces)
    for place, piece in enumerate(pieces):
        here.put(place, piece)
    taken = [there.take(place, len(piece)) for place, piece in enumerate(pieces)]
    assert taken == pieces
    there.put(2, bytes(50_000))
    assert taken == pieces  # a copy is taken
    assert here.take(2, 50_000) == bytes(50_000)
    assert not here.holds(bytes((1 << 20) + 1))


@pytest.mark.parametrize(("place", "length"), [(-1, 1), (PLACES, 1), (0, (1 << 20) + 1), (127, 1 << 32)])
def test_nothing_beyond_its_places_is_taken(memory: int, place: int, length: int):
    with pytest.raises(ValueError, match="at place"):
        Tray(memory).take(place, length)


def test_its_size_cannot_be_changed_by_either_side(memory: int):
    for size in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(memory, size)

"""How a row ends: the words of the ledger, in a module that imports nothing, for processes that only decode.

`reason` is content: a short fixed word that depends on the row and the remote answer only. No address of ours, no
time, no library's message is in it, so that two runs which saw the same web write the same bytes.
"""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    OK = "ok"
    FETCH_FAILED = "fetch_failed"
    REFUSED = "refused"
    UNDECODABLE = "undecodable"
    FILTERED = "filtered"
    DUPLICATE = "duplicate"
    REMOVED = "removed"


@dataclass(frozen=True)
class Outcome:
    """How a row ended. The fields after `reason` are set as far as the row came."""

    status: Status
    reason: str | None = None
    image_sha256: str | None = None
    stored_sha256: str | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    offset: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        assert (self.reason is None) == (self.status in (Status.OK, Status.DUPLICATE, Status.REMOVED)), (
            self.status,
            self.reason,
        )


@dataclass(frozen=True)
class Decoded:
    """`data` where the row is ok; `outcome` in any case, without the member's place in the tar."""

    data: bytes | None
    outcome: Outcome

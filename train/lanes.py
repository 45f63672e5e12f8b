"""The order of the data as a closed formula: (seed, step, slot) → (epoch, row).

The global batch has B slots, and slot j is a *lane*. An epoch rotates the N training rows by a keyed offset, cuts them
into M = N // K blocks of K rows, and orders the blocks by a keyed permutation. Lane j reads block j, B+j, 2B+j, … of
the blocks of all epochs laid end to end, each in a permuted order of its own, one row a step.

An example: N = 11 rows, B = 2 lanes, K = 3 rows a block, so M = 3 blocks an epoch and 2 rows are left over.

    epoch 0, rotated by 4     blocks [4 5 6] [7 8 9] [10 0 1]     left out: 2, 3
    ordered by permutation    B₀ = [7 8 9]  B₁ = [4 5 6]  B₂ = [10 0 1]       epoch 1 goes on with B₃ B₄ B₅

    step      0   1   2   3   4   5   6 …
    lane 0    8   7   9   0  10   1   row of B₄ …      reads B₀, B₂, B₄ …
    lane 1    4   6   5   rows of B₃ …                 reads B₁, B₃, B₅ …

Hence: a process of W (W divides B) owns B/W neighbouring lanes and reads their blocks whole; the global batch of a
step is the same rows in the same slots for every W; to resume is to know the step; every row comes at most once an
epoch, and all but fewer than one block of them exactly once (other ones each epoch, since the rotation differs).

K is `block_rows`, and fewer where the data is small: at most N // B, so that a batch spans two epochs at most.
The permutations are Feistel networks walked until they land inside the range (Black & Rogaway 2002): O(1) memory.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.errors import UserError

U64 = NDArray[np.uint64]
ROUNDS = 6
ROTATION, BLOCK_ORDER, ROW_ORDER = np.uint64(1), np.uint64(2), np.uint64(3)


@dataclass(frozen=True)
class Place:
    """Where the slots of a step read, in slot order."""

    epoch: NDArray[np.int64]
    row: NDArray[np.int64]


class Lanes:
    """The data order of one training run. Holds five numbers and no state."""

    def __init__(self, *, rows: int, batch_size: int, seed: int, block_rows: int = 256) -> None:
        if rows < batch_size:
            raise UserError(
                f"there are {rows} training rows and batch_size is {batch_size}; a batch needs at least as many rows. "
                f"Lower training.batch_size to {rows} or less, or bring more data."
            )
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.block_rows = min(block_rows, rows // batch_size)
        self.blocks = rows // self.block_rows

    def at(self, step: int, slots: NDArray[np.int64]) -> Place:
        """Epoch and row of each of `slots` at `step`."""
        round_, row_in_block = divmod(step, self.block_rows)
        block = np.uint64(round_) * np.uint64(self.batch_size) + slots.astype(np.uint64)
        epoch, position = np.divmod(block, np.uint64(self.blocks))
        key = _mix(epoch, _mix(np.uint64(self.seed & 0xFFFFFFFFFFFFFFFF), np.zeros_like(epoch)))
        which = permute(position, self.blocks, _mix(key, BLOCK_ORDER))
        inside = np.full_like(block, row_in_block)
        offset = permute(inside, self.block_rows, _mix(_mix(key, ROW_ORDER), which))
        rotation = _mix(key, ROTATION) % np.uint64(self.rows)
        row = (rotation + which * np.uint64(self.block_rows) + offset) % np.uint64(self.rows)
        return Place(epoch=epoch.astype(np.int64), row=row.astype(np.int64))

    def batch(self, step: int) -> Place:
        """The whole global batch of a step."""
        return self.at(step, np.arange(self.batch_size))

    def samples_of_epochs(self, epochs: int) -> int:
        """Rows read in that many epochs: N less the remainder, each time."""
        return epochs * self.blocks * self.block_rows


def slots_of(rank: int, world_size: int, batch_size: int) -> NDArray[np.int64]:
    """The lanes of a rank. Raises `UserError` where the processes do not divide the batch."""
    if batch_size % world_size:
        fitting = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
        near = sorted(sorted(fitting, key=lambda size: abs(size - world_size))[:6])
        raise UserError(
            f"training.batch_size is {batch_size}, which {world_size} processes cannot share evenly. "
            f"Use a multiple of {world_size}, or a number of processes such as {', '.join(map(str, near))}."
        )
    share = batch_size // world_size
    return np.arange(rank * share, (rank + 1) * share)


def permute(value: U64, size: int, key: U64) -> U64:
    """A keyed permutation of range(size), elementwise: `value[i]` under `key[i]`."""
    bits = max(2, (size - 1).bit_length())
    right_bits = np.uint64(bits // 2)
    left_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    right_mask = np.uint64((1 << (bits // 2)) - 1)
    result = _feistel(value, key, right_bits, left_mask, right_mask)
    while (outside := result >= np.uint64(size)).any():
        result[outside] = _feistel(result[outside], key[outside], right_bits, left_mask, right_mask)
    return result


def _feistel(value: U64, key: U64, right_bits: np.uint64, left_mask: np.uint64, right_mask: np.uint64) -> U64:
    left, right = value >> right_bits, value & right_mask
    for round_ in range(ROUNDS):
        round_key = _mix(key, np.uint64(round_))
        if round_ % 2:
            right = right ^ (_mix(round_key, left) & right_mask)
        else:
            left = left ^ (_mix(round_key, right) & left_mask)
    return (left << right_bits) | right


def _mix(a: U64 | np.uint64, b: U64 | np.uint64) -> U64:
    """SplitMix64's finaliser (Steele et al. 2014) over two words. At least one of them is an array."""
    with np.errstate(over="ignore"):
        x = np.asarray(a * np.uint64(0x9E3779B97F4A7C15) + b + np.uint64(0x632BE59BD9B4E019))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: U64 = x ^ (x >> np.uint64(31))
    return mixed

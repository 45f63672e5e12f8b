"""Random numbers keyed by (seed, step, slot, name), so that they do not depend on the number of processes.

Row i of every draw is a function of the seed, the step, the slot that row i sits in, and the draw's name. A rank that
owns slots 16…31 draws rows 16…31 of what a single process would draw, and a resumed run draws what it would have drawn.
The generator is Philox4x64 (Salmon et al. 2011): the key is a hash of seed and name, and the counter's two upper words
are slot and step, so that no two streams overlap.

Equal names give equal numbers within a step: name each draw of a loss differently.
"""

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Shape = tuple[int, ...]


class Draws:
    """The random numbers of one step for the slots of this process."""

    def __init__(self, seed: int, step: int, slots: NDArray[np.int64], device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.step = step
        self.slots = slots
        self.device = torch.device(device)

    def normal(self, name: str, shape: Shape = ()) -> Tensor:
        """Standard normal, (len(slots), *shape) float32."""
        rows = np.empty((len(self.slots), *shape), dtype=np.float32)
        stream = _Stream(self.seed, name)
        flat = rows.reshape(len(rows), -1)
        for row, slot in zip(flat, self.slots, strict=True):
            stream.seek(self.step, int(slot)).standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(rows).to(self.device)

    def uniform(self, name: str, shape: Shape = ()) -> Tensor:
        """Uniform on [0, 1), (len(slots), *shape) float32."""
        rows = np.empty((len(self.slots), *shape), dtype=np.float32)
        stream = _Stream(self.seed, name)
        flat = rows.reshape(len(rows), -1)
        for row, slot in zip(flat, self.slots, strict=True):
            stream.seek(self.step, int(slot)).random(dtype=np.float32, out=row)
        return torch.from_numpy(rows).to(self.device)

    def integers(self, name: str, high: int, shape: Shape = ()) -> Tensor:
        """Uniform on {0, …, high-1}, (len(slots), *shape) int64."""
        rows = np.empty((len(self.slots), *shape), dtype=np.int64)
        stream = _Stream(self.seed, name)
        for index, slot in enumerate(self.slots):
            rows[index] = stream.seek(self.step, int(slot)).integers(0, high, size=shape)
        return torch.from_numpy(rows).to(self.device)

    def torch_seed(self) -> int:
        """Seeds torch's own generator for layers that draw themselves (dropout): differs by step and by rank."""
        text = f"{self.seed}:{self.step}:{int(self.slots[0])}:torch".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class _Stream:
    """One Philox whose counter is moved instead of being built anew: 1 µs a row instead of 8."""

    def __init__(self, seed: int, name: str) -> None:
        key = np.frombuffer(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest(), dtype=np.uint64)
        self._philox = np.random.Philox(key=key)
        self._state: Any = self._philox.state
        self._generator = np.random.Generator(self._philox)

    def seek(self, step: int, slot: int) -> np.random.Generator:
        # A fresh counter with an exhausted buffer: what Philox(key=…, counter=…) starts from.
        self._state["state"]["counter"][:] = (0, 0, slot, step)
        self._state.update(buffer_pos=4, has_uint32=0, uinteger=0)
        self._philox.state = self._state
        return self._generator

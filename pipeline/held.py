"""Shards of `images` that are held back, as `held.json` beside the artifact remembers them.

    {"revision": 1, "shards": {"3": {"why": …}}, "accepted": [7]}

`shards` is what keeps the revision from being published. The next run does them again, unless a person takes one as it
is: that is remembered, and it is not judged again.
"""

import json
from collections.abc import Mapping
from typing import Any

from cluster.artifact import ShardEntry
from cluster.errors import UserError, WorkFailed
from cluster.storage import Folder
from cluster.workshop import Workshop
from ingest.config import HoldConfig
from ingest.hold import held_shards

HELD_FILE = "held.json"


class HeldShards:
    """The held shards of a revision in the making, and what a person says of them."""

    def __init__(self, workshop: Workshop, accept: frozenset[int]) -> None:
        self._workshop = workshop
        plain = read_held(workshop.folder)
        if plain.get("revision") != workshop.revision:
            plain = {}
        self._held = {int(shard) for shard in plain.get("shards", {})}
        self._accepted: set[int] = {*plain.get("accepted", []), *(accept & self._held)}

    def redo(self) -> None:
        """Set the receipts of held shards aside, so that they are done again; those that are accepted stay."""
        self._write({})
        for shard in self._held - self._accepted:
            self._workshop.discard(shard)

    def judge(self, config: HoldConfig, shards: int, inherited: Mapping[int, ShardEntry]) -> None:
        """Raise `WorkFailed` where shards are to be held, after writing down which and why."""
        counts = {shard: entry.counts for shard, entry in inherited.items()}
        for shard in set(range(shards)) - counts.keys():
            receipt = self._workshop.receipt(shard)
            assert receipt is not None, "judged once every shard is done"
            counts[shard] = receipt.counts
        held = held_shards(counts, config, self._accepted | inherited.keys())
        self._write(held)
        if held:
            lines = "\n".join(f"  shard {shard}: {why}" for shard, why in list(held.items())[:8])
            name = self._workshop.request.kind
            some = ",".join(map(str, list(held)[:8]))
            option = some if name == "images" else f"{name}:{some}"
            raise WorkFailed(
                f"{len(held)} of {shards} shards of {name} are held back, nothing of this revision is published.\n"
                f"{lines}\nRun again to do them again, or take them as they are with --accept {option}."
            )

    def _write(self, held: Mapping[int, str]) -> None:
        folder = self._workshop.folder
        if not held and not self._accepted:
            folder.delete(HELD_FILE)
            return
        plain = {
            "revision": self._workshop.revision,
            "shards": {str(shard): {"why": why} for shard, why in held.items()},
            "accepted": sorted(self._accepted),
        }
        folder.write(HELD_FILE, json.dumps(plain, indent=1).encode())


def read_held(folder: Folder) -> dict[str, Any]:
    """`held.json` of an `images` folder; empty where nothing is held."""
    if not folder.exists(HELD_FILE):
        return {}
    plain: dict[str, Any] = json.loads(folder.read(HELD_FILE))
    return plain


def check_accepted(run: Folder, accept: Mapping[str, frozenset[int]]) -> None:
    """Raise `UserError` where a shard is accepted that is not held."""
    for name, shards in accept.items():
        held = {int(shard) for shard in read_held(run / name).get("shards", {})}
        if unknown := sorted(shards - held):
            those = ", ".join(map(str, sorted(held))) or "none"
            raise UserError(f"--accept {unknown[0]}: it is no held shard of {name}; held are: {those}.")

"""Which shards are held back: so few of their pictures arrived that something was wrong with us, not with the web.

An outage, a broken codec or a full disk shows as a success rate below an absolute floor, or far below that of the
shard's siblings. A held shard is not published: it is redone on the next run, or taken as it is by a person's word.
"""

from collections.abc import Collection, Mapping
from statistics import median

from ingest.config import HoldConfig
from ingest.outcome import Status

Counts = Mapping[str, int]


def success_rate(counts: Counts, min_rows: int) -> float | None:
    """Share of ok rows among those that were tried; None where too few were to tell."""
    tried = sum(counts.get(status, 0) for status in (Status.OK, Status.FETCH_FAILED, Status.UNDECODABLE))
    return counts.get(Status.OK, 0) / tried if tried >= min_rows else None


def held_shards(counts: Mapping[int, Counts], config: HoldConfig, accepted: Collection[int] = ()) -> dict[int, str]:
    """Shard → why it is held."""
    rates = {
        shard: rate
        for shard, of_shard in counts.items()
        if (rate := success_rate(of_shard, config.min_rows)) is not None
    }
    middle = median(rates.values()) if len(rates) > config.min_siblings else None
    held = {}
    for shard, rate in sorted(rates.items()):
        if shard in accepted:
            continue
        if rate < config.below:
            held[shard] = f"{rate:.1%} of its rows succeeded; images.hold.below is {config.below:.1%}"
        elif middle is not None and rate < config.below_siblings * middle:
            held[shard] = f"{rate:.1%} of its rows succeeded; half of its siblings have {middle:.1%} or more"
    return held

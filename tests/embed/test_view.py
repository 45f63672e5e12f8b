from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.artifact import Artifact
from cluster.parquet import write_table
from cluster.workshop import Workshop
from embed.cache import open_cache
from embed.config import ViewConfig
from embed.dedup import MATCHES_FILE, MATCHES_SCHEMA
from embed.split import VALIDATION, split_of
from embed.view import member, training_rows

Publish = Callable[..., str]
Make = Callable[[str, str], Workshop]
RNG = np.random.default_rng(0)
SHARDS = [(RNG.normal(size=(count, 8)), RNG.normal(size=(count, 8))) for count in (30, 0, 20)]


def publish_matches(out: Workshop, found: list[tuple[bytes, str]]) -> str:
    rows = [
        {"pair_id": pair_id, "evaluation_set": name, "evaluation_key": "k", "score": 1.0, "rank": 0}
        for pair_id, name in found
    ]
    with out.attempt(0) as attempt:
        write_table(attempt.path(MATCHES_FILE), pa.Table.from_pylist(rows, schema=MATCHES_SCHEMA))
        attempt.commit(rows=len(rows), counts={})
    return out.publish(1).uri


def view(out: Workshop, embeddings: str, dedup: str | None, **config: object) -> Artifact:
    settings = ViewConfig.model_validate({"validation_fraction": 0.3, **config}).model_dump(mode="json")
    payload = {"embeddings": embeddings, "dedup": dedup, "config": settings, "out": out.plain()}
    result = member(payload, lambda report: None)
    return out.publish(result["shards"])


def test_matched_rows_are_out_with_the_reason_and_every_row_is_listed(cache: Publish, workshop: Make) -> None:
    embeddings = cache("embeddings", SHARDS)
    pair_ids = open_cache(embeddings).table(2, ["pair_id"]).column("pair_id").to_pylist()
    found = [(pair_ids[3], "photos"), (pair_ids[7], "sketches"), (pair_ids[7], "photos")]
    dedup = publish_matches(workshop("dedup", "dedup"), found)
    artifact = view(workshop("view", "view"), embeddings, dedup)
    table = pq.read_table(artifact.file("00000002.parquet"))
    assert table.column("row").to_pylist() == list(range(20))
    assert table.column("pair_id").to_pylist() == pair_ids
    reasons = dict(enumerate(table.column("reason").to_pylist()))
    assert {row: reason for row, reason in reasons.items() if reason} == {
        3: "overlap:photos",
        7: "overlap:photos,sketches",
    }
    assert [row for row, included in enumerate(table.column("included").to_pylist()) if not included] == [3, 7]
    assert table.column("split").to_pylist() == [split_of(pair_id, 0.3) for pair_id in pair_ids]


def test_training_rows_are_included_and_not_in_validation(cache: Publish, workshop: Make) -> None:
    embeddings = cache("embeddings", SHARDS)
    pair_ids = open_cache(embeddings).table(0, ["pair_id"]).column("pair_id").to_pylist()
    dedup = publish_matches(workshop("dedup", "dedup"), [(pair_ids[0], "set"), (pair_ids[1], "set")])
    artifact = view(workshop("view", "view"), embeddings, dedup)
    expected = [row for row in range(2, 30) if split_of(pair_ids[row], 0.3) != VALIDATION]
    assert training_rows(artifact, 0).tolist() == expected
    assert training_rows(artifact, 1).tolist() == []
    assert artifact.manifest.totals["counts"]["overlap"] == 2


def test_overlap_can_be_kept_on_request(cache: Publish, workshop: Make) -> None:
    embeddings = cache("embeddings", SHARDS)
    pair_ids = open_cache(embeddings).table(0, ["pair_id"]).column("pair_id").to_pylist()
    dedup = publish_matches(workshop("dedup", "dedup"), [(pair_ids[0], "set")])
    artifact = view(workshop("view", "view"), embeddings, dedup, exclude_overlap=False)
    assert artifact.manifest.totals["counts"]["overlap"] == 0


def test_shards_that_are_committed_are_not_done_again(cache: Publish, workshop: Make) -> None:
    embeddings = cache("embeddings", SHARDS)
    out = workshop("view", "view")
    first = view(out, embeddings, None)
    receipt = first.receipt(0)
    member(
        {"embeddings": embeddings, "dedup": None, "config": ViewConfig().model_dump(mode="json"), "out": out.plain()},
        lambda report: None,
    )
    assert Artifact.open(first.uri).receipt(0) == receipt

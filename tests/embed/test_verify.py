"""Faults that honest receipts hide: each cache is spoiled before it is committed."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.artifact import Artifact
from cluster.parquet import write_table
from cluster.workshop import Workshop
from embed.cache import view_vectors
from embed.config import EmbeddingsConfig
from embed.verify import Finding, verify_embeddings

Spoil = Callable[[pa.Table], pa.Table]
CONFIG = EmbeddingsConfig(batch_size=4)


class Bench:
    """The clean cache of two shards (9 and 6 rows), and copies of it with one fault."""

    def __init__(self, clean: dict[str, str], workshop: Callable[[str, str], Workshop]) -> None:
        self.clean = clean
        self._workshop = workshop

    def spoiled(self, spoil: Spoil, shards: Sequence[int] = (0,)) -> str:
        out, clean = self._workshop("spoiled", "embeddings"), Artifact.open(self.clean["cache"])
        for shard in range(2):
            table = pq.read_table(clean.file(f"{shard:08d}.parquet"))
            table = spoil(table) if shard in shards else table
            with out.attempt(shard) as attempt:
                write_table(attempt.path(f"{shard:08d}.parquet"), table, compression="none")
                attempt.commit(rows=table.num_rows, counts={})
        return out.publish(2).uri

    def verify(
        self, cache: str | None = None, *, sample: int | None = None, seed: int = 0, **others: str
    ) -> list[Finding]:
        uris = {**self.clean, **others}
        return verify_embeddings(cache or uris["cache"], uris["images"], uris["clip"], CONFIG, sample=sample, seed=seed)


@pytest.fixture
def bench(clean: dict[str, str], workshop: Callable[[str, str], Workshop]) -> Bench:
    return Bench(clean, workshop)


def with_vectors(column: str, change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """Replace the float16 vectors of a column."""

    def spoil(table: pa.Table) -> pa.Table:
        changed = np.ascontiguousarray(change(view_vectors(table.column(column)).copy()))
        array = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(2 * changed.shape[1]), len(changed), [None, pa.py_buffer(changed)]
        )
        return table.set_column(table.schema.get_field_index(column), column, array)

    return spoil


def found(findings: list[Finding]) -> set[tuple[str, int | None, int | None]]:
    return {(finding.check, finding.shard, finding.row) for finding in findings}


@pytest.mark.parametrize("sample", [None, 5, 0])
def test_a_clean_cache_has_no_findings(bench: Bench, sample: int | None) -> None:
    assert bench.verify(sample=sample) == []


@pytest.mark.parametrize("column", ["image_embedding", "text_embedding"])
def test_a_shifted_shard(bench: Bench, column: str) -> None:
    findings = bench.verify(bench.spoiled(with_vectors(column, lambda vectors_ND: np.roll(vectors_ND, 1, axis=0))))
    assert {row for check, shard, row in found(findings) if check == "shift"} == set(range(9))
    assert all(column in finding.detail for finding in findings if finding.check == "shift")


def test_a_shifted_shard_is_found_by_a_sample(bench: Bench) -> None:
    """Two batches of five are drawn, and the first shard has three of them."""
    cache = bench.spoiled(with_vectors("image_embedding", lambda vectors_ND: np.roll(vectors_ND, 1, axis=0)))
    drawn = [bench.verify(cache, sample=8, seed=seed) for seed in range(4)]
    assert "shift" in {finding.check for findings in drawn for finding in findings}


def test_a_swapped_pair(bench: Bench) -> None:
    order = [0, 5, 2, 3, 4, 1, 6, 7, 8]
    findings = bench.verify(bench.spoiled(with_vectors("image_embedding", lambda vectors_ND: vectors_ND[order])))
    assert {("shift", 0, 1), ("shift", 0, 5)} <= found(findings)
    assert {row for _, _, row in found(findings)} == {1, 5}
    assert "row 5" in next(finding.detail for finding in findings if finding.row == 1)


def test_a_zeroed_vector(bench: Bench) -> None:
    def zero(vectors_ND: np.ndarray) -> np.ndarray:
        vectors_ND[3] = 0
        return vectors_ND

    findings = bench.verify(bench.spoiled(with_vectors("text_embedding", zero)), sample=0)
    assert found(findings) == {("values", 0, 3)}
    assert "zero vector" in findings[0].detail


@pytest.mark.parametrize("bit", [0, 5, 9, 10, 14, 15])
def test_any_flipped_bit(bench: Bench, bit: int) -> None:
    def flip(vectors_ND: np.ndarray) -> np.ndarray:
        vectors_ND.view(np.uint16)[4, 7] ^= 1 << bit
        return vectors_ND

    assert {row for _, _, row in found(bench.verify(bench.spoiled(with_vectors("image_embedding", flip))))} == {4}


def test_not_a_number(bench: Bench) -> None:
    def spoil(vectors_ND: np.ndarray) -> np.ndarray:
        vectors_ND[2, 0] = np.nan
        return vectors_ND

    findings = bench.verify(bench.spoiled(with_vectors("image_embedding", spoil)), sample=0)
    assert [(finding.row, finding.detail) for finding in findings] == [(2, "image_embedding is not finite")]


def test_a_constant_dimension(bench: Bench) -> None:
    def fill(vectors_ND: np.ndarray) -> np.ndarray:
        vectors_ND[:, 3] = 0.125
        return vectors_ND

    findings = bench.verify(bench.spoiled(with_vectors("image_embedding", fill), shards=(0, 1)), sample=0)
    assert any("dimension 3 is constant" in finding.detail for finding in findings)


@pytest.mark.parametrize(
    ("spoil", "detail"),
    [
        (lambda table: table.take([0, 1, 2, 4, 5, 6, 7, 8]), "1 ok rows missing"),
        (lambda table: table.take([0, 1, 2, 3, 3, 4, 5, 6, 7, 8]), "1 doubled"),
        (lambda table: table.take([1, 0, 2, 3, 4, 5, 6, 7, 8]), "another order"),
    ],
)
def test_rows_that_are_missing_doubled_or_moved(bench: Bench, spoil: Spoil, detail: str) -> None:
    findings = bench.verify(bench.spoiled(spoil))
    assert [finding.check for finding in findings] == ["rows"]
    assert detail in findings[0].detail


def test_a_caption_that_is_not_the_ledgers(bench: Bench) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        captions = table.column("caption").to_pylist()
        captions[6] = "edited"
        return table.set_column(table.schema.get_field_index("caption"), "caption", pa.array(captions))

    findings = bench.verify(bench.spoiled(spoil))
    assert [(finding.check, finding.row, finding.detail) for finding in findings] == [
        ("rows", 6, "caption is not the ledger's")
    ]


def test_another_clips_weights(bench: Bench) -> None:
    checks = {finding.check for finding in bench.verify(clip=bench.clean["other_clip"])}
    assert "encoder" in checks
    assert checks & {"sample", "shift"}


def test_a_wrong_norm(bench: Bench) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        norms = table.column("image_norm").to_numpy().copy()
        norms[5] *= 1.5
        return table.set_column(table.schema.get_field_index("image_norm"), "image_norm", pa.array(norms))

    assert found(bench.verify(bench.spoiled(spoil))) == {("sample", 0, 5)}


def test_a_picture_that_rotted_on_disk(bench: Bench, tmp_path: Path) -> None:
    images = shutil.copytree(bench.clean["images"], tmp_path / "rotten")
    data = bytearray((images / "00000001.tar").read_bytes())
    data[600] ^= 1
    (images / "00000001.tar").write_bytes(data)
    assert ("sample", 1, 0) in found(bench.verify(images=str(images)))

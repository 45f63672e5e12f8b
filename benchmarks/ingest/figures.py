"""What was measured, and what follows from it: series of repeats by name, and the ratios that the project promises."""

import statistics
from dataclasses import dataclass, field

GB = 1e9


@dataclass(frozen=True)
class Series:
    """One quantity, measured once or several times. `better`: which way is better, for a reader."""

    what: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Target:
    what: str
    value: float
    bound: float
    at_least: bool
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


@dataclass
class Figures:
    """Series by key, in the order in which they were added."""

    cores: int
    series: dict[str, Series] = field(default_factory=dict)

    def add(self, key: str, what: str, unit: str, values: list[float]) -> None:
        self.series[key] = Series(what, unit, values)

    def __getitem__(self, key: str) -> float:
        return self.series[key].median

    def __contains__(self, key: str) -> bool:
        return key in self.series

    @property
    def allowed_rate(self) -> float:
        """Images a second if the cores did nothing but decode, fetch and serve."""
        core_ms = self["floor.decode.core_ms"] + self["floor.fetch.core_ms"] + self["ours.server_ms"]
        return self.cores * 1000 / core_ms

    def targets(self) -> list[Target]:
        targets = []
        if "peer.shard_rate" in self:
            ratio = self["ours.shard_rate"] / self["peer.shard_rate"]
            targets.append(Target("rate in the shards, over img2dataset's", ratio, 1.8, True, "×"))
        targets += [
            Target(
                "rate in the shards, over what decode + fetch + server allow",
                self["ours.shard_rate"] / self.allowed_rate,
                0.85,
                True,
            ),
            Target("memory above a bare Ray session", (self["ours.peak"] - self["bare.peak"]) / GB, 0.8, False, "GB"),
            Target("start of the command to the first shard", self["ours.first_receipt"], 12.0, False, "s"),
        ]
        if "quality.psnr_lead" in self:
            targets += [
                Target("PSNR above img2dataset's at its file size", self["quality.psnr_lead"], -0.1, True, "dB"),
                Target("SSIM above img2dataset's at its file size", self["quality.ssim_lead"], -0.001, True),
            ]
        targets += [
            Target(
                "200 ms answers: requests in flight a core, median, fetching alone",
                self["latency.fetch.in_flight"],
                500,
                True,
            ),
            Target("200 ms answers: requests in flight a core, peak of a run", self["latency.ours.peak"], 500, True),
            Target(
                "30% dead hosts: rate of the living, over without them",
                self["dead.ours.with"] / self["dead.ours.without"],
                0.9,
                True,
            ),
        ]
        return targets

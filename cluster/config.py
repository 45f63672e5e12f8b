"""Where a run's processes live."""

from pydantic import Field

from cluster.settings import Section


class ClusterConfig(Section):
    """Resources. None of this shapes content: it is in no identity."""

    address: str | None = Field(default=None, description="A running Ray cluster; none starts one on this machine.")
    cpus: int | None = Field(default=None, ge=1, description="Logical CPUs of a Ray that we start; none: the machine's")
    shard_actors: int = Field(default=2, ge=1, description="Processes that work on shards.")
    gang_size: int = Field(default=2, ge=1, description="Processes that train together.")
    object_store_bytes: int = Field(default=128 << 20, ge=80 << 20, description="Shared memory of a Ray that we start.")
    shard_attempts: int = Field(default=3, ge=1, description="Tries at a shard before it is reported as poisoned.")

"""Which part of every parameter this rank owns, whatever ZeRO stage runs.

DeepSpeed keeps fp32 weights and optimizer states in one of three layouts. A `Share` is a view of a run of consecutive
elements of one named parameter in any of them, so that checkpoints need not know the stage:

    ZeRO 0       the optimizer holds every parameter whole, on every rank
    ZeRO 1, 2    parameters laid end to end and cut into W equal flat pieces; a piece may begin inside a parameter
    ZeRO 3       every parameter cut into W equal pieces, the last one padded
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.optimizer import STATES, AdamWEma

MASTER = "master"


@dataclass(frozen=True)
class Share:
    """Elements `start … start + n` of a parameter: views into what DeepSpeed updates, by state ("master", "ema", …)."""

    name: str
    start: int
    tensors: dict[str, Tensor]
    written: bool  # by this rank; where every rank owns everything, one of them writes it

    @property
    def length(self) -> int:
        return self.tensors[MASTER].numel()


def prepare_states(engine: Any) -> AdamWEma:
    """Create the optimizer's states before the first step, so that they can be filled and read like later ones."""
    optimizer: AdamWEma = engine.basic_optimizer
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        optimizer.prepare(wrapper.fp32_partitioned_groups_flat)
        return optimizer
    optimizer.prepare(weights for group in optimizer.param_groups for weights in group["params"])
    if wrapper is not optimizer:
        wrapper._lazy_init_hp_params_optimizer_state()  # DeepSpeed does so after its first step
    return optimizer


def shares(engine: Any) -> Iterator[Share]:
    """Every share of this rank, in the order of the parameters."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    optimizer: AdamWEma = engine.basic_optimizer
    for index, (name, parameter) in enumerate(engine.module.named_parameters()):
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            yield from _of_zero_3(name, parameter, rank)
        elif hasattr(parameter, "_hp_mapping"):
            if (mapping := parameter._hp_mapping) is not None:
                tensors = {MASTER: mapping.hp_fragment, **{key: mapping.optim_fragment[key] for key in STATES}}
                yield Share(name, mapping.lp_fragment_address.start, tensors, written=True)
        else:
            state = optimizer.state[parameter]
            tensors = {MASTER: parameter.data.view(-1), **{key: state[key].view(-1) for key in STATES}}
            yield Share(name, 0, tensors, written=index % world_size == rank)


def _of_zero_3(name: str, parameter: Any, rank: int) -> Iterator[Share]:
    wrapper = parameter._z3_optimizer
    tensors: dict[str, Tensor] = {}
    for key in (MASTER, *STATES):
        state = None if key == MASTER else key
        tensors[key], _ = wrapper._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=state
        )
    start = rank * tensors[MASTER].numel()
    length = min(tensors[MASTER].numel(), parameter.ds_numel - start)
    if length > 0:
        yield Share(name, start, {key: tensor[:length] for key, tensor in tensors.items()}, written=True)


def set_updates(engine: Any, updates: int) -> None:
    """Adam's own step counters, which its bias corrections and the average's warm-up read."""
    for state in engine.basic_optimizer.state.values():
        state["step"] = torch.full_like(state["step"], float(updates))

"""AdamW that also keeps the exponential moving average of the weights, as one more optimizer state.

DeepSpeed hands an optimizer the fp32 weights that this rank owns: everything (ZeRO 0), a flat share (ZeRO 1, 2, bf16)
or shares of each parameter (ZeRO 3). An average that is updated right there is in fp32, is sharded as the moments are,
costs no communication, and is right for every stage without knowing which one runs.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from train.config import TrainingConfig

STATES = ("exp_avg", "exp_avg_sq", "ema")


class AdamWEma(torch.optim.AdamW):
    """AdamW with `state[p]["ema"]`. `prepare` must have been called before the first step.

    DeepSpeed clips before it calls an optimizer and tells the norm, except without ZeRO, where it keeps the norm to
    itself; there `clip` makes the optimizer do both, where the engine looks for it.
    """

    def __init__(
        self, parameters: Iterable[Any], *, ema_decay: float, clip: float | None = None, **settings: Any
    ) -> None:
        super().__init__(parameters, **settings)
        self.ema_decay = ema_decay
        self.clip = clip
        if clip is not None:
            self._global_grad_norm = 0.0

    def prepare(self, owned: Iterable[Tensor]) -> None:
        """Create the state of the fp32 tensors that this rank owns, as it is before the first step."""
        for weights in owned:
            self.state[weights] = {
                "step": torch.zeros((), dtype=torch.float32, device=weights.device),
                "exp_avg": torch.zeros_like(weights),
                "exp_avg_sq": torch.zeros_like(weights),
                "ema": weights.detach().clone(),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if self.clip is not None:
            every = [weights for group in self.param_groups for weights in group["params"]]
            self._global_grad_norm = float(nn.utils.clip_grad_norm_(every, self.clip))
        super().step(closure)
        for group in self.param_groups:
            for weights in group["params"]:
                state = self.state[weights]
                if weights.grad is None:
                    continue
                state["ema"].lerp_(weights, 1.0 - ema_decay_at(int(state["step"]), self.ema_decay))


def ema_decay_at(updates: int, decay: float) -> float:
    """The decay after that many updates: (1+t)/(10+t) until it reaches `decay`, so that the start is soon forgotten."""
    return min(decay, (1.0 + updates) / (10.0 + updates))


def clips_itself(config: TrainingConfig) -> bool:
    """Whether DeepSpeed takes the optimizer as it is, without a wrapper of its own."""
    return config.deepspeed.zero_stage == 0


def build_optimizer(model: nn.Module, config: TrainingConfig) -> AdamWEma:
    """AdamW over the trainable parameters; gains, biases and other vectors are not decayed."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trainable}]
    if config.weight_decay > 0.0:
        groups = [
            {"params": [p for p in trainable if p.ndim >= 2]},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
    return AdamWEma(
        [group for group in groups if group["params"]],
        ema_decay=config.ema_decay,
        clip=config.gradient_clip if clips_itself(config) else None,
        lr=0.0,  # the loop sets it before each step
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )

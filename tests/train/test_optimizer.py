"""AdamW with an average, against torch's AdamW and float64 arithmetic; the learning rate's closed formula."""

import math

import pytest
import torch
from torch import nn

from train.config import TrainingConfig
from train.loop import learning_rate_at
from train.optimizer import build_optimizer, ema_decay_at


def config(**changes: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"steps": 100, "batch_size": 8, "learning_rate": 0.01, **changes})


def test_steps_are_those_of_adamw_and_the_average_that_of_float64() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, config(weight_decay=0.1, ema_decay=0.5))
    optimizer.prepare(ours.parameters())
    reference = torch.optim.AdamW(
        [{"params": [theirs.weight]}, {"params": [theirs.bias], "weight_decay": 0.0}], lr=0.01, weight_decay=0.1
    )
    average = ours.weight.detach().double().clone()
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        inputs = torch.randn(4, 5)
        for model, stepping in ((ours, optimizer), (theirs, reference)):
            stepping.zero_grad()
            model(inputs).square().mean().backward()
            stepping.step()
        torch.testing.assert_close(ours.weight, theirs.weight)
        torch.testing.assert_close(ours.bias, theirs.bias)
        decay = min(0.5, (2 + step) / (11 + step))
        average = decay * average + (1 - decay) * ours.weight.detach().double()
    torch.testing.assert_close(optimizer.state[ours.weight]["ema"].double(), average, rtol=1e-6, atol=1e-7)


def test_without_zero_the_optimizer_clips_and_tells_the_norm() -> None:
    model = nn.Linear(5, 3)
    optimizer = build_optimizer(model, config(gradient_clip=0.1, deepspeed={"zero_stage": 0}))
    optimizer.prepare(model.parameters())
    model(torch.ones(1, 5)).sum().backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    optimizer.step()
    assert optimizer._global_grad_norm == pytest.approx(norm)
    clipped = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    assert clipped == pytest.approx(0.1, rel=1e-4)


def test_a_short_run_forgets_its_start() -> None:
    assert ema_decay_at(1, 0.9999) == pytest.approx(2 / 11)
    assert ema_decay_at(10**6, 0.9999) == 0.9999


def test_learning_rate_warms_up_and_falls_as_half_a_cosine() -> None:
    cosine = config(schedule="cosine", warmup_steps=10)
    assert learning_rate_at(0, cosine) == pytest.approx(0.001)
    assert learning_rate_at(9, cosine) == learning_rate_at(10, cosine) == pytest.approx(0.01)
    assert learning_rate_at(55, cosine) == pytest.approx(0.005)
    assert learning_rate_at(99, cosine) < 1e-5
    assert {learning_rate_at(step, config()) for step in (0, 50, 99)} == {0.01}

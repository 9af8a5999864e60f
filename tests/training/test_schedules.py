"""Schedules: against PyTorch's, by their definitions, states, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastseq.training import ConstantSchedule, CosineSchedule, PlateauSchedule, StepSchedule

PURE = [
    ConstantSchedule(0.3),
    StepSchedule(0.3, 4, 0.5),
    CosineSchedule(0.3, 20, warmup_steps=5, final_lr=0.01),
]


def pytorch() -> Any:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")
    return torch, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)


def test_constant() -> None:
    assert [ConstantSchedule(0.3).lr_at(step) for step in (0, 1, 10**9)] == [0.3] * 3


def test_step_is_that_of_pytorch() -> None:
    torch, optimiser = pytorch()
    theirs = torch.optim.lr_scheduler.StepLR(optimiser, 4, 0.5)
    ours = StepSchedule(0.3, 4, 0.5)
    for step in range(30):
        assert ours.lr_at(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimiser.step()
        theirs.step()


def test_cosine_is_that_of_pytorch() -> None:
    torch, optimiser = pytorch()
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 25, eta_min=0.01)
    ours = CosineSchedule(0.3, 25, final_lr=0.01)
    for step in range(26):
        assert ours.lr_at(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimiser.step()
        theirs.step()


def test_cosine_climbs_first_and_stays_at_the_end() -> None:
    schedule = CosineSchedule(0.4, 14, warmup_steps=4, final_lr=0.1)
    rates = [schedule.lr_at(step) for step in range(20)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert sorted(set(rates[4:15]), reverse=True) == rates[4:15]
    assert rates[9] == pytest.approx(0.25)  # half way
    assert rates[14:] == [0.1] * 6


@pytest.mark.parametrize(("min_lr", "rates"), [(0.0, 5), (0.02, 4)])
def test_plateau_is_that_of_pytorch(min_lr: float, rates: int) -> None:
    torch, optimiser = pytorch()
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, factor=0.3, patience=2, threshold=0.01, min_lr=min_lr
    )
    ours = PlateauSchedule(0.3, factor=0.3, patience=2, threshold=0.01, min_lr=min_lr)
    losses = [3, 2.5, 2.49, 2.48, 2.476, 2.4, 2.5, 2.6, math.nan, 2.4, 2.1, 2.2, 2.2, 2.2, 2.2, 2.2, 2.2, 2.09, 2.0]
    seen = set()
    for loss in losses:
        theirs.step(loss)
        ours.observe(loss)
        assert ours.lr_at(0) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-12)
        seen.add(ours.lr_at(0))
    assert len(seen) == rates


def test_plateau_of_losses_below_zero() -> None:
    schedule = PlateauSchedule(1.0, patience=0, threshold=0.1)
    for loss, rate in ((-1.0, 1.0), (-1.2, 1.0), (-1.25, 0.1)):
        schedule.observe(loss)
        assert schedule.lr_at(3) == pytest.approx(rate)


def test_a_plateau_below_its_least_rate_does_not_rise() -> None:
    schedule = PlateauSchedule(0.01, patience=0, min_lr=0.1)
    schedule.observe(1.0)
    schedule.observe(1.0)
    assert schedule.lr_at(0) == 0.01


def test_the_state_of_a_plateau() -> None:
    losses = [3.0, 2.0, 2.5, 2.5, 2.5, 1.9, 2.0, 2.0, 2.0, 2.0]
    for cut in range(len(losses)):
        whole, first, rest = (PlateauSchedule(0.3, patience=1) for _ in range(3))
        for loss in losses:
            whole.observe(loss)
        for loss in losses[:cut]:
            first.observe(loss)
        rest.load_state_dict(first.state_dict())
        for loss in losses[cut:]:
            rest.observe(loss)
        assert rest.lr_at(0) == whole.lr_at(0) and rest.state_dict() == whole.state_dict()


@pytest.mark.parametrize("schedule", PURE, ids=lambda schedule: type(schedule).__name__)
def test_the_others_have_no_state(schedule: Any) -> None:
    assert schedule.state_dict() == {}
    schedule.load_state_dict({})
    with pytest.raises(ValueError, match="mapping"):
        schedule.load_state_dict(PlateauSchedule(1.0).state_dict())


@pytest.mark.parametrize("schedule", [*PURE, PlateauSchedule(0.3)], ids=lambda schedule: type(schedule).__name__)
def test_bad_steps(schedule: Any) -> None:
    with pytest.raises(ValueError, match="step"):
        schedule.lr_at(-1)
    with pytest.raises(TypeError, match="step"):
        schedule.lr_at(1.0)


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: ConstantSchedule(-1), ValueError, "lr"),
        (lambda: ConstantSchedule("1"), TypeError, "lr"),
        (lambda: StepSchedule(0.1, 0, 0.5), ValueError, "step_size"),
        (lambda: StepSchedule(0.1, 3, 0), ValueError, "gamma"),
        (lambda: CosineSchedule(0.1, 0), ValueError, "total_steps"),
        (lambda: CosineSchedule(0.1, 5, warmup_steps=5), ValueError, "warmup_steps"),
        (lambda: CosineSchedule(0.1, 5, final_lr=-1), ValueError, "final_lr"),
        (lambda: PlateauSchedule(0.1, factor=1), ValueError, "factor"),
        (lambda: PlateauSchedule(0.1, patience=-1), ValueError, "patience"),
        (lambda: PlateauSchedule(0.1, threshold=None), TypeError, "threshold"),
        (lambda: PlateauSchedule(0.1, min_lr=math.nan), ValueError, "min_lr"),
        (lambda: PlateauSchedule(0.1).load_state_dict({"lr": 0.1}), ValueError, "mapping"),
        (lambda: PlateauSchedule(0.1).load_state_dict({"lr": -1, "best": 1.0, "bad": 0}), ValueError, "lr"),
    ],
)
def test_bad_settings(make: Any, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        make()

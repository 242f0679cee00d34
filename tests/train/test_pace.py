"""How quick steps are said to be: as quick as they go on, whatever the first ones took."""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from families import open_project
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from schemas import console
from train import loop, pending
from train.loop import run
from train.metrics import Pace
from train.order import Cursor, Turn
from train.pending import Arrived, Pending, Taken


def test_compiling_and_the_first_step_are_left_out_and_only_recent_steps_are_shown() -> None:
    pace = Pace()
    assert pace.seconds_per_step is None and pace.data_wait is None
    pace.add(120.0, 1, 6.0, compiled=True)
    assert pace.recent() == ["120.0 s for this step"]
    pace.add(30.0, 1, 0.0, compiled=True)
    assert pace.recent() == ["30.0 s for this step"] and pace.seconds_per_step == 75.0 and pace.data_wait == 0.04
    for _ in range(50):
        pace.add(1.6, 2, 0.8, compiled=False)
    assert pace.recent() == ["1.60 s/step", "1.25 samples/s", "data 50%"]
    for _ in range(20):
        pace.add(0.8, 1, 0.2, compiled=False)
    pace.add(60.0, 1, 0.0, compiled=True)
    assert pace.recent() == ["0.80 s/step", "1.25 samples/s", "data 25%"]
    assert pace.seconds_per_step == 1.6 and pace.data_wait == pytest.approx(44 / 96)


def test_a_first_step_that_compiled_nothing_counts_while_it_is_alone() -> None:
    pace = Pace()
    pace.add(9.0, 1, 0.0, compiled=False)
    assert pace.seconds_per_step == 9.0 and pace.recent() == ["9.0 s for this step"]
    pace.add(2.0, 1, 3.0, compiled=False)
    assert pace.seconds_per_step == 2.0 and pace.recent() == ["2.00 s/step", "0.50 samples/s", "data 100%"]


@pytest.mark.parametrize(
    ("late", "compiled"),
    [(0, [True, False, True, False, False]), (1, [True, True, True, False, False])],
)
def test_a_step_is_known_to_have_compiled_or_to_have_waited_for_another_that_did(
    monkeypatch: pytest.MonkeyPatch, late: int, compiled: list[bool]
) -> None:
    graphs = [0]
    monkeypatch.setattr(pending, "compiled_graphs", lambda: graphs[0])
    told: list[bool] = []

    def tell(_: Taken, numbers: Arrived) -> None:
        told.append(numbers.compiled)

    with Pending(tell, late) as coming:
        for step in range(1, 6):
            graphs[0] += step in (1, 3)
            coming.push(Taken(step, Turn(0, (), 1, Cursor()), 1e-4, 0.0, ()), torch.zeros(3))
            coming.settle(wholly=step in (1, 4))
            if step == 4:
                graphs[0] += 1  # by an evaluation
                coming.set_clock()
    assert told == compiled


def test_a_run_says_how_quick_its_steps_are_without_those_that_compiled(
    tmp_path: Path, copy_demo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_demo(tmp_path, "jpeg", photos=4, max_train_steps=5, eval_steps_interval=0, validation_disable=True)
    scan(folder), pairs(folder), cache(folder)

    def compiling(family: object, denoiser: object, batch: object, step: int, *others: object) -> torch.Tensor:
        if step <= 3:
            time.sleep(2.0)
            counters["stats"]["unique_graphs"] += 1
        return loop_loss(family, denoiser, batch, step, *others)  # type: ignore[arg-type]

    loop_loss = loop.step_loss
    monkeypatch.setattr(loop, "step_loss", compiling)
    monkeypatch.setattr(console.log, "propagate", True)
    with caplog.at_level(logging.INFO):
        summary = run(open_project(folder))
    assert summary.seconds_per_step is not None and summary.seconds_per_step < 1.5
    assert summary.seconds_to_first_step is not None and summary.seconds_to_first_step > 2
    last = [one.getMessage() for one in caplog.records if one.getMessage().startswith("train: 5 of 5")][-1]
    shown = re.search(r"([\d.]+) s/step, ([\d.]+) samples/s, data \d+%", last)
    assert shown is not None and float(shown[1]) < 1.5 and float(shown[2]) > 0.66

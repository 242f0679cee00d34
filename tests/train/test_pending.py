"""Numbers that are read one step late, as on an accelerator: the same run, and nothing that is not finite is kept."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from families import open_project
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from schemas.errors import UserError
from schemas.project import Project
from train import loop
from train.adapter import LORA_NAME
from train.loop import run
from train.order import Cursor, Turn
from train.pending import Arrived, Pending, Taken

QUIET = ("validation_disable=true", "report_to=none", "eval_timesteps=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, copy_demo: Callable[..., Path]) -> Path:
    project = copy_demo(tmp_path_factory.mktemp("pending"), "jpeg", photos=4, max_train_steps=8)
    scan(project), pairs(project), cache(project)
    return project


def _project(folder: Path, name: str, *overrides: str) -> Project:
    return open_project(folder, overrides=[f"tracker_run_name={name}", *QUIET, *overrides])


def _lines(project: Project) -> list[dict[str, float]]:
    lines = (project.run_folder / "metrics.jsonl").read_text().splitlines()
    timed = {"seconds", "data_wait"}
    return [{key: one for key, one in json.loads(line).items() if key not in timed} for line in lines]


def _files(project: Project) -> dict[str, dict[str, torch.Tensor]]:
    return {
        str(one.relative_to(project.run_folder)): load_file(one) for one in project.run_folder.rglob("*.safetensors")
    }


def _taken(step: int) -> Taken:
    return Taken(step, Turn(0, (), 1, Cursor()), 1e-4, 0.0, ())


def _numbers(loss: float, stops: float = 0.0) -> torch.Tensor:
    return torch.tensor([loss, stops, 2.0], dtype=torch.float64)


def test_a_step_is_told_when_the_next_is_launched_and_all_when_they_are_asked_for() -> None:
    told: list[tuple[int, float]] = []
    with Pending(lambda taken, numbers: told.append((taken.step, numbers.loss)), late=1) as pending:
        for step in (1, 2, 3):
            pending.push(_taken(step), _numbers(step / 2, stops=step == 2))
            assert pending.settle(wholly=False) == (step > 2)
            assert [step for step, _ in told] == list(range(1, step))
        assert pending.settle(wholly=True)
        assert told == [(1, 0.5), (2, 1.0), (3, 1.5)]
        pending.push(_taken(4), _numbers(2.0))
    assert told[3:] == [(4, 2.0)]


def test_what_had_arrived_before_a_fault_is_told_and_what_came_after_one_of_telling_is_not() -> None:
    told: list[int] = []

    def tell(taken: Taken, _numbers: Arrived) -> None:
        if taken.step == 2:
            raise UserError("step 2")
        told.append(taken.step)

    with pytest.raises(KeyboardInterrupt), Pending(tell, late=1) as pending:
        pending.push(_taken(1), _numbers(1.0))
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="step 2"), Pending(tell, late=2) as pending:
        for step in (1, 2, 3):
            pending.push(_taken(step), _numbers(1.0))
        pending.settle(wholly=True)
    assert told == [1, 1]


def test_a_run_that_is_told_late_leaves_the_same_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("use_ema=true", "checkpointing_steps=3", "eval_steps_interval=4", "gradient_accumulation_steps=2",
               "lora_dropout=0.1")  # fmt: skip
    prompt, late = _project(folder, "prompt", *options), _project(folder, "late", *options)
    run(prompt)
    monkeypatch.setattr(loop, "lateness", lambda _device: 1)
    run(late, limit=5)
    summary = run(late)
    expected, found = _files(prompt), _files(late)
    assert expected.keys() | {"checkpoint-5/lora.safetensors"} == found.keys()
    assert len(expected) == 5  # three checkpoints, the result and its average
    assert all(torch.equal(one, found[file][name]) for file, whole in expected.items() for name, one in whole.items())
    assert _lines(late) == _lines(prompt)
    assert [one["step"] for one in _lines(late)] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert summary.seconds_to_first_step is not None and 0 < summary.seconds_to_first_step < summary.seconds


@pytest.mark.parametrize("late", [0, 1])
def test_a_loss_that_is_not_finite_is_told_of_its_own_step_and_written_nowhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    monkeypatch.setattr(loop, "lateness", lambda _device: late)
    project = _project(folder, f"infinite {late}", "learning_rate=1e30", "max_grad_norm=0", "checkpointing_steps=1",
                       "use_ema=true", "eval_steps_interval=0")  # fmt: skip
    with pytest.raises(UserError, match=r"step 2: the loss is (nan|inf); samples: \w+"):
        run(project)
    assert [one["step"] for one in _lines(project)] == [1]
    files = _files(project)
    assert list(files) == ["checkpoint-1/lora.safetensors"]
    assert all(bool(torch.isfinite(one).all()) for whole in files.values() for one in whole.values())
    assert not (project.run_folder / LORA_NAME).exists()


def test_a_gradient_that_is_not_finite_stops_a_run_that_is_told_late(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[torch.Tensor] = []

    def poisoned(*arguments: object) -> torch.Tensor:
        taken.append(loop_loss(*arguments))  # type: ignore[arg-type]
        taken[-1].register_hook(lambda gradient: gradient * (torch.nan if len(taken) == 3 else 1))
        return taken[-1]

    loop_loss = loop.step_loss
    monkeypatch.setattr(loop, "step_loss", poisoned)
    monkeypatch.setattr(loop, "lateness", lambda _device: 1)
    project = _project(folder, "gradient", "eval_steps_interval=0", "checkpointing_steps=0")
    with pytest.raises(UserError, match="step 3: the gradient is nan"):
        run(project)
    assert [one["step"] for one in _lines(project)] == [1, 2] and len(taken) == 4
    assert not _files(project)


def test_a_run_that_fails_has_told_every_step_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(family: object, denoiser: object, batch: object, step: int, *others: object) -> torch.Tensor:
        if step == 5:
            raise RuntimeError("the accelerator is gone")
        return loop_loss(family, denoiser, batch, step, *others)  # type: ignore[arg-type]

    loop_loss = loop.step_loss
    monkeypatch.setattr(loop, "step_loss", failing)
    monkeypatch.setattr(loop, "lateness", lambda _device: 1)
    project = _project(folder, "fails", "eval_steps_interval=0", "checkpointing_steps=0")
    with pytest.raises(RuntimeError, match="is gone"):
        run(project)
    assert [one["step"] for one in _lines(project)] == [1, 2, 3, 4]

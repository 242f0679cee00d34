"""Several processes on the real command: the same weights as one process on the same global batch."""

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from commands import command, forked
from safetensors.torch import load_file

from families import open_project
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from schemas.project import Project
from train.loop import run

MakeProject = Callable[..., Path]


@dataclass(frozen=True)
class _Ended:
    code: int
    stdout: str
    stderr: str


def _together(folder: Path, count: int, *options: str) -> list[_Ended]:
    """Run `train run` in processes that find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo"}
    arguments = ["train", "run", str(folder), *(part for option in options for part in ("--set", option))]
    told = [(folder / f"out-{rank}.txt", folder / f"err-{rank}.txt") for rank in range(count)]
    started = []
    for rank in range(count):
        environment = meeting | {"RANK": str(rank), "WORLD_SIZE": str(count)}
        started.append(forked(command, arguments, environment, *told[rank]))
    for process in started:
        process.start()
    for process in started:
        process.join(240)
    return [
        _Ended(process.exitcode if process.exitcode is not None else -1, out.read_text(), err.read_text())
        for process, (out, err) in zip(started, told, strict=True)
    ]


def _weights(project: Project) -> dict[str, torch.Tensor]:
    return load_file(project.run_folder / "pytorch_lora_weights.safetensors")


def test_two_processes_train_what_one_does_on_the_same_global_batch(make_project: MakeProject) -> None:
    options = {"max_train_steps": 4, "train_batch_size": 2, "caption_dropout_probability": 0.3, "lora_dropout": 0.1}
    folder = make_project("deblur", photos=5, base_model_precision="int4-quanto", **options)
    scan(folder), pairs(folder), cache(folder)
    one = open_project(folder, overrides=["tracker_run_name=one", "gradient_accumulation_steps=2"])
    run(one)
    for process in _together(folder, 2, "tracker_run_name=two"):
        assert process.code == 0, process.stderr
    two = open_project(folder, overrides=["tracker_run_name=two"])
    expected, found = _weights(one), _weights(two)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    losses = [
        [json.loads(line)["loss"] for line in (project.run_folder / "metrics.jsonl").read_text().splitlines()]
        for project in (one, two)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 4


def test_a_run_of_two_processes_is_resumed_by_one_that_accumulates_twice(make_project: MakeProject) -> None:
    folder = make_project("deblur", photos=5, max_train_steps=4, checkpointing_steps=2)
    scan(folder), pairs(folder), cache(folder)
    twice = ["gradient_accumulation_steps=2"]
    whole = open_project(folder, overrides=["tracker_run_name=whole", *twice])
    run(whole)
    first, second = _together(folder, 2, "tracker_run_name=parts", "max_train_steps=2")
    assert first.code == second.code == 0, first.stderr + second.stderr
    assert "trained weights" in first.stdout and not second.stdout
    parts = open_project(folder, overrides=["tracker_run_name=parts", *twice])
    assert run(parts).first_step == 2
    for name, tensor in _weights(whole).items():
        torch.testing.assert_close(_weights(parts)[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_ends_all_processes_and_names_the_samples(make_project: MakeProject) -> None:
    folder = make_project("deblur", photos=4, max_train_steps=3, learning_rate=1e30, max_grad_norm=0)
    scan(folder), pairs(folder), cache(folder)
    told = _together(folder, 2)
    assert [process.code for process in told] == [1, 1], told[0].stderr
    assert "step" in told[0].stderr and "samples: " in told[0].stderr

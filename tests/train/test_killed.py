"""A run that is killed again and again ends with the very weights of one that is not."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from commands import forked
from safetensors.torch import load_file

from families import open_project
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from schemas.project import Project
from train.loop import run

MakeProject = Callable[..., Path]


def _steps_told(project: Project) -> list[int]:
    try:
        lines = (project.run_folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def test_five_kills_at_random_moments_change_no_bit(make_project: MakeProject) -> None:
    options = {
        "max_train_steps": 40, "checkpointing_steps": 7, "checkpointing_rolling_steps": 2, "lora_dropout": 0.1,
        "checkpoints_total_limit": 1, "use_ema": True, "lr_scheduler": "cosine", "caption_dropout_probability": 0.3,
    }  # fmt: skip
    folder = make_project("edits", **options)
    scan(folder), pairs(folder), cache(folder)
    whole, killed = (open_project(folder, overrides=[f"tracker_run_name={name}"]) for name in ("whole", "killed"))
    run(whole)
    rng = random.Random(20)
    for _ in range(5):
        process = forked(run, killed)
        process.start()
        before = len(_steps_told(killed))
        limit = time.monotonic() + 120
        while len(_steps_told(killed)) <= before + 2 and process.is_alive() and time.monotonic() < limit:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        assert process.pid is not None and process.is_alive(), "it ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    summary = run(killed)
    assert 0 < summary.first_step < 40 and summary.last_step == 40
    for name in ("pytorch_lora_weights.safetensors", "ema/pytorch_lora_weights.safetensors"):
        expected, found = (load_file(project.run_folder / name) for project in (whole, killed))
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items()), name
    assert _steps_told(killed) == list(range(1, 41))
    assert not list(killed.run_folder.glob("*.tmp.*"))
    rolling = [path.name for path in killed.run_folder.glob("checkpoint-*-rolling")]
    assert rolling == ["checkpoint-38-rolling"]

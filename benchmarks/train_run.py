"""`train run` itself on full-size FLUX.1 Kontext of random weights, from shards: what a user of a GPU would see.

Run on a machine with a GPU, 64 GiB of memory and 40 GiB of disk: `python benchmarks/train_run.py [--steps 12]`. It
writes a checkpoint of random weights, pairs and a cache, then runs the real command with several settings in turn.
The first of all hashes the checkpoint; the first compiled one fills the cache that the second start finds.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from loader import KEYS, project_of
from train_step import random_transformer

from families.checkpoints import record_keys

RUNS = {
    "bf16": [],
    "bf16, no checkpointing": ["gradient_checkpointing=false"],
    "bf16, compiled": ["dynamo_backend=inductor"],
    "bf16, compiled, second start": ["dynamo_backend=inductor"],
    "bf16, no checkpointing, compiled": ["gradient_checkpointing=false", "dynamo_backend=inductor"],
    "int8-quanto": ["base_model_precision=int8-quanto"],
    "int4-quanto": ["base_model_precision=int4-quanto"],
    "fp8-torchao": ["base_model_precision=fp8-torchao"],
    "bf16, TREAD 0.5 @ 2..-2": [
        'tread_config={"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]}'
    ],
    "bf16, group offload": ["enable_group_offload=true", "group_offload_use_stream=true"],
}


def row(name, folder, steps):
    """Run the command with one of the settings; return its row of the table."""
    sets = ["flux_lora_target=all+ffs", f"max_train_steps={steps}", f"tracker_run_name={list(RUNS).index(name)}",
            "checkpointing_steps=0", "report_to=none", *RUNS[name]]  # fmt: skip
    command = [sys.executable, "-m", "train.cli", "run", folder, "--json"]
    begin = time.perf_counter()
    ran = subprocess.run([*command, *(part for one in sets for part in ("--set", one))], capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if ran.returncode:
        return f"| {name} | failed: {ran.stderr.strip().splitlines()[-1][:300]} | | | | {seconds:.0f} |"
    print(*(f"    {line}" for line in ran.stderr.splitlines() if "made ready" in line), sep="\n", flush=True)
    told = json.loads(ran.stdout)
    first = seconds - told["seconds"] + told["seconds_to_first_step"]  # with imports before the run
    numbers = f"{told['seconds_per_step']:.3f} | {told['peak_memory_gib']:.1f} | {told['data_wait']:.2%}"
    return f"| {name} | {numbers} | {first:.1f} | {seconds:.0f} |"


def main():
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--run", action="append", choices=RUNS, help="some of the settings; repeatable")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        begin = time.perf_counter()
        random_transformer().save_pretrained(checkpoint / "transformer")
        gc.collect()
        torch.cuda.empty_cache()
        project = project_of(Path(folder), arguments.samples, arguments.samples, arguments.pixels, checkpoint)
        record_keys(project, KEYS)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.pixels} px, one reference; "
              f"checkpoint and cache made in {time.perf_counter() - begin:.0f} s")  # fmt: skip
        print(
            "| train run | s/step | peak GiB | waited for data | first step after s | whole command s |\n"
            "|---|---|---|---|---|---|",
            flush=True,
        )
        for name in arguments.run or RUNS:
            print(row(name, folder, arguments.steps), flush=True)


if __name__ == "__main__":
    main()

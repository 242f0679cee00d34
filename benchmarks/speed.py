"""All of pairline's speed on one kind of GPU, each beside the loops that it is measured against, in one run.

`python benchmarks/speed.py` runs the other benchmarks one after the other, as many at a time as there are GPUs, each on
one of them and on 16 cores of its own. Every table has its peer's loop, on the same GPU. Some 25 minutes on one GPU.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import torch

HERE = Path(__file__).parent
CORES = 16
STEP = ["train_step.py", "--steps", "5"]


def variants(*names):
    """Return the options that name some of the loops."""
    return [part for name in ("diffusers", *names) for part in ("--variant", name)]


BOTH = variants("pairline fp8-torchao compiled, all kept", "pairline compiled, all kept")
JOBS = [  # the longest first
    [*STEP, *variants("pairline fp8-torchao tuned, all kept")],
    [*STEP, *variants("pairline tuned, all kept")],
    ["train_run.py", "--run", "bf16, compiled", "--run", "bf16, compiled, second start", "--steps", "8"],
    [*STEP, "--pixels", "512", "--batch", "4", *BOTH],
    [*STEP, "--model", "klein-9b", *BOTH],
    [*STEP, "--model", "klein-4b", *BOTH],
    ["encode.py", "--part", "cache", "--part", "loop"],
    [*STEP, *variants("pairline fp8-torchao compiled, group offload")],
    [*STEP, *variants("pairline fp8-torchao compiled, attention kept")],
    ["curves.py"],
    [*STEP, *variants("pairline compiled, attention kept away")],
]  # fmt: skip


def run(number, gpus, folder):
    """Run one benchmark on a GPU that is free; print what it says when it ends, and write it to a file meanwhile."""
    job = JOBS[number]
    gpu = gpus.get()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), environment.get("PYTHONPATH", "")])
    most = os.cpu_count()
    cores = [core for core in range(gpu * CORES, (gpu + 1) * CORES) if core < most] or range(most)
    begin = time.perf_counter()
    told, faults = folder / f"{number}.txt", folder / f"{number}-errors.txt"
    with told.open("w") as out, faults.open("w") as err:
        done = subprocess.run(
            [sys.executable, "-u", str(HERE / job[0]), *job[1:]],
            env=environment, stdout=out, stderr=err, preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )  # fmt: skip
    said = [line for line in told.read_text().splitlines() if line.strip()]
    wrong = "" if not done.returncode else f"\nfailed: {faults.read_text()[-2000:]}"
    print(f"\n### {' '.join(job)} ({time.perf_counter() - begin:.0f} s)\n", *said, wrong, sep="\n", flush=True)
    gpus.put(gpu)


def main():
    """Run all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "pairline-speed")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    count = torch.cuda.device_count()
    print(f"{count} × {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    gpus = Queue()
    for gpu in range(count):
        gpus.put(gpu)
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda number: run(number, gpus, folder), range(len(JOBS))))


if __name__ == "__main__":
    main()

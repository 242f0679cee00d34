"""What the benchmarks share: a command run in processes of its own, and the most memory that all of them had."""

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path


def measured(command):
    """Run a command whose last line is JSON; return that with the peak memory of all its processes, in MiB."""
    settings = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # as the commands set it
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=settings)
        peak = 0
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(0.25)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read()[-4000:]}")
    return json.loads(process.stdout.read().splitlines()[-1]) | {"peak_mib": peak / 2**20}


def memory_of(root):
    """Return the proportional memory of a process and its children, in bytes."""
    total = 0
    for process in [root, *children(root)]:
        try:
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            continue
    return total


def children(process):
    """Return the processes below a process."""
    try:
        own = [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []
    return own + [one for child in own for one in children(child)]

"""What benchmarks/cache.py times in a process of its own, which loads what a command loads and no more.

A job is a function of strings in `JOBS`: its arguments come from the command line, what it returns is printed.
"""

import json
import sys
import time
from pathlib import Path

import pandas  # noqa: F401 - Arrow loads it with its first array, which would be timed

from prep.cache import cache
from schemas.shards import ShardIndex


def opened(folder):
    """Open a store."""
    begun = time.perf_counter()
    index = ShardIndex(Path(folder))
    return {"work": time.perf_counter() - begun, "rows": len(index)}


def cached(folder):
    """Run prep cache."""
    begun = time.perf_counter()
    done = cache(folder)
    work = time.perf_counter() - begun
    return {name: sum(getattr(one, name) for one in done.stores) for name in ("encoded", "reused")} | {"work": work}


JOBS = {"opened": opened, "cached": cached}

if __name__ == "__main__":
    print(json.dumps(JOBS[sys.argv[1]](*sys.argv[2:])))

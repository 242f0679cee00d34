"""Runs `prep cache` on a project again and again, killing it at random moments; prints what was there after each.

Started as a program of its own: it loads the libraries once and forks before anything has run.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import prep.encode  # noqa: F401 - so that a fork does not load it again
from prep.cache import cache
from schemas.shards import ShardIndex


def rows_of(folder):
    """Return the keys that are there; raises if a file is torn."""
    stores = [path for kind in ("latents", "text") for path in (folder / "work" / "cache" / kind).glob("*")]
    return sorted(key for store in stores for key in ShardIndex(store)._places)


def main(folder, seed, kills):
    """Fork, kill, look; then let it finish."""
    draw, seen = random.Random(seed), []
    longest = 1.0
    while len(seen) < kills:
        child = os.fork()
        if child == 0:
            cache(folder, workers=1)
            os._exit(0)
        time.sleep(draw.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):  # it was done before: nothing left to kill
            break
        seen.append(rows_of(folder))
    summary = cache(folder, workers=1)
    told = {"seen": seen, "encoded": [one.encoded for one in summary.stores], "process": os.getpid()}
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

"""Runs `prep cache` on a project again and again, killing it at random moments; says what was there after each.

It is to run in a process of its own: it forks, in which nothing may have run before.
"""

import json
import os
import random
import signal
import time

from prep.cache import cache
from schemas.shards import ShardIndex


def rows_of(folder):
    """Return the keys that are there; raises if a file is torn."""
    stores = [path for kind in ("latents", "text") for path in (folder / "work" / "cache" / kind).glob("*")]
    return sorted(key for store in stores for key in ShardIndex(store)._places)


def kill_cache(folder, seed, kills, told):
    """Fork, kill, look; then let it finish, and write down what was seen."""
    draw, seen = random.Random(seed), []
    while len(seen) < kills:
        child = os.fork()
        if child == 0:
            cache(folder, workers=1)
            os._exit(0)
        time.sleep(draw.uniform(0, 1))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):  # it was done before: nothing left to kill
            break
        seen.append(rows_of(folder))
    summary = cache(folder, workers=1)
    encoded = [one.encoded for one in summary.stores]
    told.write_text(json.dumps({"seen": seen, "encoded": encoded, "process": os.getpid()}))

"""Tasks for the tests of the pool: worker processes import them by name from here."""

import os
import signal
import time


def double(number):
    return 2 * number


def double_slowly_at_first(number):
    time.sleep(0.3 if number == 0 else 0)
    return 2 * number


def process_of(number):
    time.sleep(0.02)
    return os.getpid()


def double_or_exit(number):
    if number < 0:
        os._exit(-number)
    return 2 * number


def double_or_be_killed(number):
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


def double_or_fail(number):
    if number < 0:
        raise ValueError(f"cannot double {number}")
    return 2 * number


def no_pickle(number):
    return lambda: iter([number]), (part for part in ())


def note_slowly_at_first(place):
    folder, number = place
    time.sleep(0.5 if number == 0 else 0)
    (folder / str(number)).touch()
    return number


def process_then_sleep(seconds):
    time.sleep(seconds)
    return os.getpid()


def measure_or_die(task):
    if any("deadly" in path for path in task.paths):
        os._exit(9)
    from prep.measure import measure

    return measure(task)


def picture(number):
    import numpy as np

    if number < 0:
        os._exit(1)
    return {"pixels": np.full((400 + number, 300, 3), number, np.uint8), "strided": np.arange(60000)[::2], "n": number}


def store_or_die(picture):
    if "deadly" in picture.path:
        os.kill(os.getpid(), signal.SIGKILL)
    if "endless" in picture.path:
        time.sleep(600)
    from prep.pixels import store

    return store(picture)

import importlib
import os
import shutil
import time
from pathlib import Path

import pytest

from prep.pool import Crash, Crew, ahead, default_workers, each
from schemas.errors import UserError


@pytest.fixture
def tasks(monkeypatch):
    """Make pool_tasks.py importable, here and in the workers, which are given this process's path."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("pool_tasks")


def test_results_come_in_the_order_of_the_items_though_a_later_one_is_done_first(tasks):
    assert list(each(tasks.double_slowly_at_first, range(12), 2)) == [(number, 2 * number) for number in range(12)]


def test_one_worker_and_several_give_the_same(tasks):
    items = [7, 1, 1, 9, 3]
    assert list(each(tasks.double, items, 1)) == list(each(tasks.double, items, 3)) == [(n, 2 * n) for n in items]


def test_several_workers_are_several_processes_and_one_is_this_one(tasks):
    here = {process for _, process in each(tasks.process_of, range(20), 1)}
    apart = {process for _, process in each(tasks.process_of, range(20), 2)}
    assert here == {os.getpid()}
    assert len(apart) == 2 and os.getpid() not in apart


def test_there_are_never_more_workers_than_items(tasks):
    assert len({process for _, process in each(tasks.process_of, range(2), 16)}) <= 2
    [(_, process)] = each(tasks.process_of, [0], 16)
    assert process != os.getpid()  # one item, too, may cost a worker and must not cost the command
    assert list(each(tasks.process_of, [], 16)) == []


@pytest.mark.parametrize(("beside", "workers"), [(None, 8), ("", 8), ("2", 4), ("16", 1), ("0", 8), ("x", 8)])
def test_by_default_there_is_a_worker_for_every_core_that_is_this_process_own(monkeypatch, beside, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    if beside is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", beside)
    assert default_workers() == workers


def test_workers_that_are_summoned_are_so_many_and_those_that_work(tasks):
    with Crew(16, tasks.process_of) as crew:
        crew.summon(2)
        summoned = {process.pid for process in crew._processes.values()}
        assert len(summoned) == 2
        assert {process for _, process in crew.each(tasks.process_of, range(2))} <= summoned
    for process in summoned:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    with Crew(1, tasks.process_of) as crew:
        crew.summon(5)
        assert not crew._processes


@pytest.mark.parametrize(("task", "bad", "status"), [("double_or_exit", -3, 3), ("double_or_be_killed", -1, -9)])
def test_a_worker_that_dies_costs_one_item_and_the_rest_goes_on(task, bad, status, tasks):
    items = [1, 2, bad, 3, 4, bad, 5]
    results = list(each(getattr(tasks, task), items, 2))
    died = Crash(f"its worker process died with exit status {status}")
    assert results == [(item, died if item == bad else 2 * item) for item in items]


def test_every_item_may_cost_its_worker(tasks):
    results = list(each(tasks.double_or_exit, [-1, -2, -3], 2))
    assert [result.reason[-1] for _, result in results] == ["1", "2", "3"]


def test_an_exception_in_a_worker_is_raised_here_with_its_traceback(tasks):
    with pytest.raises(RuntimeError) as caught:
        list(each(tasks.double_or_fail, [1, -5, 2], 2))
    text = str(caught.value)
    assert "a worker process failed on -5" in text
    assert "ValueError: cannot double -5" in text and 'pool_tasks.py", line' in text


def test_an_exception_in_this_process_stays_what_it_is(tasks):
    with pytest.raises(ValueError, match="cannot double -5"):
        list(each(tasks.double_or_fail, [1, -5, 2], 1))


def test_a_result_that_cannot_be_sent_is_an_exception_not_a_hang(tasks):
    with pytest.raises(RuntimeError, match=r"a worker process failed on [12]:\n(.*\n)*\w+Error: .*pickle"):
        list(each(tasks.no_pickle, [1, 2], 2))


def test_results_before_an_exception_have_been_given(tasks):
    seen = []
    with pytest.raises(RuntimeError):
        for item, result in each(tasks.double_or_fail, [1, 2, 3, -1], 2):
            seen.append((item, result))
    assert seen == [(1, 2), (2, 4), (3, 6)][: len(seen)]


def test_work_runs_ahead_of_the_reader_only_so_far(tasks, tmp_path):
    results = each(tasks.note_slowly_at_first, [(tmp_path, number) for number in range(60)], 2)
    next(results)  # while the first item took its time, the other worker went on
    done = len(list(tmp_path.iterdir()))
    assert done <= 8  # four per worker: what bounds memory
    assert [number for _, number in results] == list(range(1, 60))


def test_who_stops_reading_ends_the_workers_at_once(tasks):
    results = each(tasks.process_then_sleep, [0, 60, 60, 60], 2)
    _, worker = next(results)
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 20
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_workers_that_cannot_start_are_told_to_the_user(tmp_path, monkeypatch, capfd):
    (tmp_path / "gone_tasks.py").write_text("def same(item):\n    return item\n")
    monkeypatch.syspath_prepend(tmp_path)
    task = importlib.import_module("gone_tasks").same
    (tmp_path / "gone_tasks.py").unlink()  # here it is imported, a worker finds it no more
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    assert list(each(task, [1, 2], 1)) == [(1, 1), (2, 2)]
    with pytest.raises(UserError, match="worker processes cannot start; --workers 1"):
        list(each(task, [1, 2, 3], 2))
    assert "No module named 'gone_tasks'" in capfd.readouterr().err


def test_arrays_come_through_shared_memory_whole_and_leave_nothing_there(tasks, recwarn):
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.is_dir() else set()
    items = [0, 9, 3, -1, 200, 5, 7]  # growing and shrinking, one dies
    for workers in (1, 2):
        results = list(each(tasks.picture, [item for item in items if workers > 1 or item >= 0], workers))
        for number, result in results:
            if number < 0:
                assert isinstance(result, Crash)
            else:
                assert result["pixels"].shape == (400 + number, 300, 3) and (result["pixels"] == number).all()
                assert (result["strided"] == range(0, 60000, 2)).all() and result["n"] == number
                result["pixels"][0] = 1  # its own, and writable
    assert not (set(shared.iterdir()) - before if shared.is_dir() else set())


def test_what_is_asked_for_ahead_comes_in_order_and_no_more_than_so_many_are_taken():
    taken = []

    def numbers():
        for number in range(20):
            taken.append(number)
            yield number

    stream = ahead(numbers(), 5)
    assert next(stream) == 0
    deadline = time.monotonic() + 10
    while len(taken) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(taken) == 6  # the one that was yielded, and five that wait
    assert list(stream) == list(range(1, 20))


def test_a_fault_ahead_is_raised_in_its_place_and_a_caller_that_stops_ends_the_work():
    closed = []

    def failing():
        try:
            yield 1
            yield 2
            raise UserError("the third")
        finally:
            closed.append(True)

    stream = ahead(failing(), 4)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(UserError, match="the third"):
        next(stream)
    stream = ahead(failing(), 1)
    next(stream)
    stream.close()
    assert closed == [True, True]

"""ahead() returns results in order, limits jobs and results in memory, raises errors in their place, and stops its threads."""

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from data.ahead import ahead


def becomes_true(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Wait until the condition is true, at most `seconds`; return whether it is."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


class CountedWork:
    """Jobs 0, 1, ... with the results (job, 0), (job, 1), ... Counts the started jobs and the results of each job."""

    def __init__(self, jobs: int, results: int, max_seconds: float = 0.0) -> None:
        self.jobs, self.results, self.max_seconds = jobs, results, max_seconds
        self.started: list[int] = []
        self.made = dict.fromkeys(range(jobs), 0)

    def work(self, job: int) -> Iterator[tuple[int, int]]:
        self.started.append(job)
        for i in range(self.results):
            time.sleep(random.random() * self.max_seconds)
            self.made[job] += 1
            yield job, i

    def has_started(self, count: int) -> bool:
        return len(self.started) >= count

    def ahead(self, workers: int, depth: int) -> Iterator[tuple[int, Iterator[tuple[int, int]]]]:
        return ahead(range(self.jobs), self.work, workers, depth)


@pytest.fixture(autouse=True)
def all_threads_end() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert becomes_true(lambda: not set(threading.enumerate()) - before), "a thread is still alive"


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 8, 30])
@pytest.mark.parametrize("depth", [1, 4])
def test_jobs_and_results_come_in_order(workers: int, depth: int) -> None:
    counted = CountedWork(jobs=20, results=3, max_seconds=0.002)
    results_of_jobs = [(job, list(results)) for job, results in counted.ahead(workers, depth)]
    assert results_of_jobs == [(job, [(job, i) for i in range(3)]) for job in range(20)]
    assert sorted(counted.started) == list(range(20)), "every job runs once"


@pytest.mark.parametrize("workers", [0, 2])
def test_jobs_of_different_lengths_and_an_empty_list_of_jobs(workers: int) -> None:
    def work(job: int) -> Iterator[int]:
        yield from range(job)

    sizes = [0, 5, 0, 0, 9, 1]
    assert [len(list(results)) for _, results in ahead(sizes, work, workers, 2)] == sizes
    assert list(ahead([], work, workers, 2)) == []


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_number_of_started_jobs_is_limited(workers: int) -> None:
    counted = CountedWork(jobs=40, results=2)
    for job, results in counted.ahead(workers, depth=10):
        list(results)
        most = min(job + workers + 2, 40)  # workers + 2 jobs from the current one on
        assert becomes_true(partial(counted.has_started, most)), "the limit is used"
        time.sleep(0.002)
        assert len(counted.started) == most


@pytest.mark.parametrize("depth", [1, 3])
def test_number_of_stored_results_of_a_job_is_limited(depth: int) -> None:
    counted = CountedWork(jobs=3, results=20)
    videos = counted.ahead(workers=2, depth=depth)
    _, results = next(videos)
    assert becomes_true(lambda: counted.made[0] > depth and counted.made[1] > depth)
    time.sleep(0.01)
    assert counted.made == {0: depth + 1, 1: depth + 1, 2: 0}, "the stored results, and one that waits for room"
    assert len(list(results)) == 20
    assert [len(list(more)) for _, more in videos] == [20, 20]


def test_no_job_starts_before_the_first_is_requested() -> None:
    counted = CountedWork(jobs=5, results=1)
    videos = counted.ahead(workers=2, depth=1)
    time.sleep(0.01)
    assert counted.started == []
    assert [len(list(results)) for _, results in videos] == [1] * 5


def test_as_many_jobs_run_at_once_as_there_are_workers() -> None:
    together = threading.Barrier(4, timeout=5)

    def work(job: int) -> Iterator[str]:
        together.wait()  # passes only if four jobs run at once
        yield threading.current_thread().name

    names = [name for _, results in ahead(range(8), work, workers=4, depth=1) for name in results]
    assert len(set(names)) == 4


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, StopAsyncIteration])
def test_exception_of_a_job_is_raised_where_its_results_are_read(workers: int, error: type[BaseException]) -> None:
    def work(job: int) -> Iterator[int]:
        yield 10 * job
        if job == 4:
            raise error("of job 4")
        yield 10 * job + 1

    received = []
    with pytest.raises(error, match="of job 4"):
        for _, results in ahead(range(50), work, workers, 8):
            for result in results:
                received.append(result)
    assert received == [0, 1, 10, 11, 20, 21, 30, 31, 40]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_caller_may_continue_after_a_failed_job(workers: int) -> None:
    def work(job: int) -> Iterator[int]:
        if job % 3 == 0:
            raise ValueError(job)
        yield job

    received: list[object] = []
    for job, results in ahead(range(10), work, workers, 1):
        try:
            received += results
        except ValueError as error:
            received.append(str(error))
            assert job == int(str(error))
    assert received == ["0", 1, 2, "3", 4, 5, "6", 7, 8, "9"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_exception_of_the_iterable_of_jobs_is_raised_after_the_jobs_before_it(workers: int) -> None:
    def jobs() -> Iterator[int]:
        yield from range(5)
        raise OSError("no more claims")

    received = []
    with pytest.raises(OSError, match="no more claims"):
        for job, results in ahead(jobs(), lambda job: iter([job] * 2), workers, 1):
            received.append((job, list(results)))
    assert received == [(job, [job, job]) for job in range(5)]


def test_jobs_are_iterated_by_one_thread_at_a_time() -> None:
    lock = threading.Lock()

    def jobs() -> Iterator[int]:
        for job in range(50):
            assert lock.acquire(blocking=False)
            time.sleep(0.0005)
            lock.release()
            yield job

    assert [job for job, results in ahead(jobs(), lambda job: iter([job]), 6, 1) if list(results)] == list(range(50))


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("kind", ["close", "exception", "within a job"])
def test_closing_early_stops_the_threads(workers: int, kind: str) -> None:
    made = itertools.count()

    def work(job: int) -> Iterator[int]:
        while True:
            yield next(made)

    before = set(threading.enumerate())
    videos = ahead(itertools.count(), work, workers, 2)
    began = time.monotonic()
    if kind == "close":
        next(videos)
        videos.close()  # type: ignore[attr-defined]
    elif kind == "within a job":
        for _, results in videos:
            next(results)
            break
        del results, videos
    else:
        with pytest.raises(RuntimeError):
            for _, _ in videos:
                raise RuntimeError
        del videos
    assert becomes_true(lambda: set(threading.enumerate()) <= before)
    assert time.monotonic() - began < 3
    number = next(made)
    time.sleep(0.02)
    assert next(made) == number + 1, "no more results are made"


@pytest.mark.parametrize("workers", [1, 4])
def test_closing_early_wakes_threads_that_wait_for_room(workers: int) -> None:
    counted, before = CountedWork(jobs=100, results=1), set(threading.enumerate())
    videos = counted.ahead(workers, depth=1)
    next(videos)
    assert becomes_true(lambda: sum(counted.made.values()) == workers + 2), "as many jobs are done as may start"
    began = time.monotonic()
    videos.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 2
    assert set(threading.enumerate()) <= before


def test_without_workers_each_result_is_computed_on_request() -> None:
    counted, before = CountedWork(jobs=5, results=3), threading.active_count()
    videos = counted.ahead(workers=0, depth=9)
    assert counted.started == []
    _, results = next(videos)
    assert counted.started == []
    next(results)
    assert (counted.started, counted.made[0]) == ([0], 1)
    next(results)
    assert counted.made[0] == 2
    assert threading.active_count() == before

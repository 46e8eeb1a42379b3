"""Work ahead in threads: in order, no further ahead than promised, and errors arrive where they belong."""

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from data.ahead import ahead


def waited_for(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


class Counted:
    """Jobs 0, 1, ... and the work of each: its results are (job, 0), (job, 1), ... It is noted what was begun and made."""

    def __init__(self, jobs: int, results: int, slow: float = 0.0) -> None:
        self.jobs, self.results, self.slow = jobs, results, slow
        self.begun: list[int] = []
        self.made = dict.fromkeys(range(jobs), 0)

    def work(self, job: int) -> Iterator[tuple[int, int]]:
        self.begun.append(job)
        for i in range(self.results):
            time.sleep(random.random() * self.slow)
            self.made[job] += 1
            yield job, i

    def has_begun(self, count: int) -> bool:
        return len(self.begun) >= count

    def ahead(self, workers: int, depth: int) -> Iterator[tuple[int, Iterator[tuple[int, int]]]]:
        return ahead(range(self.jobs), self.work, workers, depth)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert waited_for(lambda: not set(threading.enumerate()) - before), "a thread has survived"


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 8, 30])
@pytest.mark.parametrize("depth", [1, 4])
def test_jobs_and_results_come_in_order(workers: int, depth: int) -> None:
    counted = Counted(jobs=20, results=3, slow=0.002)
    found = [(job, list(results)) for job, results in counted.ahead(workers, depth)]
    assert found == [(job, [(job, i) for i in range(3)]) for job in range(20)]
    assert sorted(counted.begun) == list(range(20)), "every job is done once"


@pytest.mark.parametrize("workers", [0, 2])
def test_jobs_of_different_length_and_none_at_all(workers: int) -> None:
    def work(job: int) -> Iterator[int]:
        yield from range(job)

    sizes = [0, 5, 0, 0, 9, 1]
    assert [len(list(results)) for _, results in ahead(sizes, work, workers, 2)] == sizes
    assert list(ahead([], work, workers, 2)) == []


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_no_more_jobs_are_begun_than_promised(workers: int) -> None:
    counted = Counted(jobs=40, results=2)
    for job, results in counted.ahead(workers, depth=10):
        list(results)
        most = min(job + workers + 2, 40)
        assert waited_for(partial(counted.has_begun, most)), "and that many are"
        time.sleep(0.002)
        assert len(counted.begun) == most


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_results_of_a_job_are_made_than_promised(depth: int) -> None:
    counted = Counted(jobs=3, results=20)
    videos = counted.ahead(workers=2, depth=depth)
    _, results = next(videos)
    assert waited_for(lambda: counted.made[0] > depth and counted.made[1] > depth)
    time.sleep(0.01)
    assert counted.made == {0: depth + 1, 1: depth + 1, 2: 0}, "those that wait, and the one that finds no room"
    assert len(list(results)) == 20
    assert [len(list(more)) for _, more in videos] == [20, 20]


def test_nothing_is_begun_before_the_first_is_asked_for() -> None:
    counted = Counted(jobs=5, results=1)
    videos = counted.ahead(workers=2, depth=1)
    time.sleep(0.01)
    assert counted.begun == []
    assert [len(list(results)) for _, results in videos] == [1] * 5


def test_work_is_done_by_as_many_threads_as_wanted_at_once() -> None:
    together = threading.Barrier(4, timeout=5)

    def work(job: int) -> Iterator[str]:
        together.wait()  # passes only if four jobs are at work
        yield threading.current_thread().name

    names = [name for _, results in ahead(range(8), work, workers=4, depth=1) for name in results]
    assert len(set(names)) == 4


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, StopAsyncIteration])
def test_exception_of_a_job_arrives_at_its_place(workers: int, error: type[BaseException]) -> None:
    def work(job: int) -> Iterator[int]:
        yield 10 * job
        if job == 4:
            raise error("of job 4")
        yield 10 * job + 1

    found = []
    with pytest.raises(error, match="of job 4"):
        for _, results in ahead(range(50), work, workers, 8):
            for result in results:
                found.append(result)
    assert found == [0, 1, 10, 11, 20, 21, 30, 31, 40]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_jobs_behind_one_that_failed_are_done_if_the_caller_goes_on(workers: int) -> None:
    def work(job: int) -> Iterator[int]:
        if job % 3 == 0:
            raise ValueError(job)
        yield job

    found: list[object] = []
    for job, results in ahead(range(10), work, workers, 1):
        try:
            found += results
        except ValueError as error:
            found.append(str(error))
            assert job == int(str(error))
    assert found == ["0", 1, 2, "3", 4, 5, "6", 7, 8, "9"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_exception_of_the_jobs_arrives_behind_the_jobs_before_it(workers: int) -> None:
    def jobs() -> Iterator[int]:
        yield from range(5)
        raise OSError("no more claims")

    found = []
    with pytest.raises(OSError, match="no more claims"):
        for job, results in ahead(jobs(), lambda job: iter([job] * 2), workers, 1):
            found.append((job, list(results)))
    assert found == [(job, [job, job]) for job in range(5)]


def test_jobs_are_drawn_by_one_thread_at_a_time() -> None:
    at_it = threading.Lock()

    def jobs() -> Iterator[int]:
        for job in range(50):
            assert at_it.acquire(blocking=False)
            time.sleep(0.0005)
            at_it.release()
            yield job

    assert [job for job, results in ahead(jobs(), lambda job: iter([job]), 6, 1) if list(results)] == list(range(50))


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("kind", ["close", "exception", "within a job"])
def test_leaving_early_stops_the_threads(workers: int, kind: str) -> None:
    made = itertools.count()

    def work(job: int) -> Iterator[int]:
        while True:  # more than anybody takes
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
    assert waited_for(lambda: set(threading.enumerate()) <= before)
    assert time.monotonic() - began < 3
    number = next(made)
    time.sleep(0.02)
    assert next(made) == number + 1, "nothing is made any more"


@pytest.mark.parametrize("workers", [1, 4])
def test_leaving_early_wakes_threads_that_wait_for_room(workers: int) -> None:
    counted, before = Counted(jobs=100, results=1), set(threading.enumerate())
    videos = counted.ahead(workers, depth=1)
    next(videos)
    assert waited_for(lambda: sum(counted.made.values()) == workers + 2), "all that may be begun is done"
    began = time.monotonic()
    videos.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 2
    assert set(threading.enumerate()) <= before


def test_without_workers_everything_is_done_when_it_is_asked_for() -> None:
    counted, before = Counted(jobs=5, results=3), threading.active_count()
    videos = counted.ahead(workers=0, depth=9)
    assert counted.begun == []
    _, results = next(videos)
    assert counted.begun == []
    next(results)
    assert (counted.begun, counted.made[0]) == ([0], 1)
    next(results)
    assert counted.made[0] == 2
    assert threading.active_count() == before

"""Run jobs ahead of time in threads and yield their results in order.

Threads are enough because video decoders and codecs release the GIL.
"""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


def ahead(
    jobs: Iterable[T], work: Callable[[T], Iterator[U]], workers: int, depth: int, window: int | None = None
) -> Generator[tuple[T, Iterator[U]], None, None]:
    """Yield each job, in order, with an iterator over the results of `work(job)`.

    Consume the results of a job before advancing to the next one; an exception of the job is raised there.

    Args:
        jobs: Iterated in the threads, by one at a time.
        workers: Number of threads; 0 runs each job in the caller, when its results are read.
        depth: Largest number of stored results of a job; its thread holds one more while it waits for room.
        window: Largest number of jobs in memory; at least `workers` + 2, the default.
    """
    if workers == 0:
        for job in jobs:
            yield job, work(job)
        return
    shared = _SharedState(jobs, work, depth)
    threads = [threading.Thread(target=shared.run, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        shared.free_slots.release(max(workers + 2, window or 0))
        while (started := shared.next()) is not None:
            job, results = started
            yield job, iter(results)
            shared.free_slots.release()
    finally:
        shared.stopped.set()
        shared.free_slots.release(workers)
        # A thread that is inside a long video may take longer; it is a daemon and ends with the process.
        deadline = time.monotonic() + 2
        for thread in threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))


class _SharedState(Generic[T, U]):
    """State shared by the caller and the threads."""

    def __init__(self, jobs: Iterable[T], work: Callable[[T], Iterator[U]], depth: int) -> None:
        self._jobs, self._work, self._depth = iter(jobs), work, depth
        self._lock = threading.Lock()
        self._started: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.free_slots = threading.Semaphore(0)
        self.stopped = threading.Event()

    def run(self) -> None:
        """Run jobs until there are no more or the caller stops."""
        while self.free_slots.acquire() and not self.stopped.is_set():
            # The lock keeps `_started` in the order of the jobs.
            with self._lock:
                try:
                    job = next(self._jobs)
                except BaseException as error:
                    self._started.put(None if isinstance(error, StopIteration) else error)
                    return
                results: _Results[U] = _Results(self._depth, self.stopped)
                self._started.put((job, results))
            try:
                for result in self._work(job):
                    if not results.put(result):
                        return
                results.end()
            except BaseException as error:
                results.end(error)

    def next(self) -> "tuple[T, _Results[U]] | None":
        """Wait for the next started job; None after the last one. Raises the exception of `jobs`."""
        started = self._started.get()
        if isinstance(started, BaseException):
            raise started
        return started


class _Results(Generic[U]):
    """Queue of the results of one job; holds at most `depth`."""

    def __init__(self, depth: int, stopped: threading.Event) -> None:
        self._room, self._stopped = threading.Semaphore(depth), stopped
        self._items: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def put(self, result: U) -> bool:
        """Wait for room and store a result; False if the caller has stopped."""
        while not self._stopped.is_set():
            if self._room.acquire(timeout=0.2):
                self._items.put((True, result))
                return True
        return False

    def end(self, error: BaseException | None = None) -> None:
        self._items.put((False, error))

    def __iter__(self) -> Iterator[U]:
        while True:
            is_result, item = self._items.get()
            if is_result:
                self._room.release()
                yield item
            elif item is not None:
                raise item
            else:
                return

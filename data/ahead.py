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

    Consume the results of a job before advancing to the next job. An exception in a job is raised by its iterator.

    Args:
        jobs: Jobs. The threads advance this iterable, one thread at a time.
        workers: Number of threads. 0 runs each job in the caller's thread, when its results are read.
        depth: Maximum number of stored results of a job. Its thread holds one more while it waits for room.
        window: Maximum number of jobs in memory, at least `workers` + 2 (the default).
    """
    if workers == 0:
        for job in jobs:
            yield job, work(job)
        return
    jobs, lock = iter(jobs), threading.Lock()
    started: queue.SimpleQueue[tuple[T, _Results[U]] | BaseException] = queue.SimpleQueue()
    free_slots, stopped = threading.Semaphore(0), threading.Event()

    def run() -> None:
        """Run jobs until there are no more or the caller stops."""
        while free_slots.acquire() and not stopped.is_set():
            # The lock keeps `started` in the order of the jobs.
            with lock:
                try:
                    job = next(jobs)
                except BaseException as error:
                    started.put(error)
                    return
                results: _Results[U] = _Results(depth, stopped)
                started.put((job, results))
            try:
                for result in work(job):
                    if not results.put(result):
                        return
                results.end()
            except BaseException as error:
                results.end(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        free_slots.release(max(workers + 2, window or 0))
        while not isinstance(item := started.get(), BaseException):
            yield item[0], iter(item[1])
            free_slots.release()
        if not isinstance(item, StopIteration):
            raise item
    finally:
        stopped.set()
        free_slots.release(workers)
        # A thread that decodes a long video may take longer. It is a daemon and ends with the process.
        deadline = time.monotonic() + 2
        for thread in threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))


class _Results(Generic[U]):
    """Queue of at most `depth` results of one job."""

    def __init__(self, depth: int, stopped: threading.Event) -> None:
        self._room, self._stopped = threading.Semaphore(depth), stopped
        self._items: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def put(self, result: U) -> bool:
        """Wait for room, store a result and return True. Return False if the caller has stopped."""
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

"""Work done ahead in threads, given out in order. Decoders and codecs release Python's lock, so threads are enough."""

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
    """For each job, in order, the job and what `work` gives for it, made ahead by `workers` threads (0: by the caller).

    Memory holds the results of `window` jobs (at least `workers` + 2, the default), at most `depth` of each and one that
    waits for room. What a job gives must be used up before the next is asked for. An exception of a job reaches the
    caller where its results are read.
    """
    if workers == 0:
        yield from ((job, work(job)) for job in jobs)
        return
    crew = _Crew(jobs, work, depth)
    threads = [threading.Thread(target=crew.run, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        crew.free.release(max(workers + 2, window or 0))
        while (entry := crew.next()) is not None:
            yield entry[0], iter(entry[1])
            crew.free.release()
    finally:
        crew.stopped.set()
        crew.free.release(workers)
        deadline = time.monotonic() + 2
        for thread in threads:  # one that is within a long video ends with the program
            thread.join(timeout=max(0.0, deadline - time.monotonic()))


class _Crew(Generic[T, U]):
    """What the threads share."""

    def __init__(self, jobs: Iterable[T], work: Callable[[T], Iterator[U]], depth: int) -> None:
        self._jobs, self._work, self._depth = iter(jobs), work, depth
        self._lock = threading.Lock()
        self._begun: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.free = threading.Semaphore(0)
        self.stopped = threading.Event()

    def run(self) -> None:
        while self.free.acquire() and not self.stopped.is_set():
            with self._lock:  # jobs are begun in order
                try:
                    job = next(self._jobs)
                except StopIteration:
                    self._begun.put(None)
                    return
                except BaseException as error:
                    self._begun.put(error)
                    return
                results: _Results[U] = _Results(self._depth, self.stopped)
                self._begun.put((job, results))
            try:
                for result in self._work(job):
                    if not results.put(result):
                        return
                results.end()
            except BaseException as error:
                results.end(error)

    def next(self) -> "tuple[T, _Results[U]] | None":
        entry = self._begun.get()
        if isinstance(entry, BaseException):
            raise entry
        return entry


class _Results(Generic[U]):
    """What one job has given and nobody has taken yet, at most `depth`."""

    def __init__(self, depth: int, stopped: threading.Event) -> None:
        self._room, self._stopped = threading.Semaphore(depth), stopped
        self._given: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def put(self, result: U) -> bool:
        """Wait for room; False if nobody will ever take it."""
        while not self._stopped.is_set():
            if self._room.acquire(timeout=0.2):
                self._given.put((True, result))
                return True
        return False

    def end(self, error: BaseException | None = None) -> None:
        self._given.put((False, error))

    def __iter__(self) -> Iterator[U]:
        while True:
            more, result = self._given.get()
            if not more:
                break
            self._room.release()
            yield result
        if result is not None:
            raise result

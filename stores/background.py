"""One thread that encodes and writes while the caller goes on; bounded in bytes; its errors come back."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from interp.stores.errors import StoreError

MOST_JOBS = 1024
"""Jobs that wait at most: small ones take more memory than the bytes that they hold."""


@dataclass
class Job:
    """Something to do, and the bytes it holds until done."""

    do: Callable[[], None]
    nbytes: int = 0


class Background:
    """Runs jobs in order in one thread. `submit` waits while more than `limit` bytes, or `MOST_JOBS`, are queued.

    When nothing is queued, `rest` is called: it does what earlier jobs put off. After a job has raised, the others are
    dropped and every further call raises StoreError with its message.
    """

    def __init__(self, limit: int, rest: Callable[[], None] = lambda: None) -> None:
        self.limit = limit
        self.peak = 0
        """The most bytes ever queued, those being written included."""
        self._rest = rest
        self._jobs: deque[Job] = deque()
        self._bytes = 0
        self._busy = False
        self._closing = False
        self._dropping = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="interp-store-writer", daemon=True)
        self._thread.start()

    def submit(self, do: Callable[[], None], nbytes: int = 0) -> None:
        """Queue a job; wait while its bytes would pass the limit (a job alone, or one without bytes, always enters)."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._has_room(nbytes))
            self.check()
            if self._closing:
                raise StoreError("this run is closed for writing; create_run(...) again to go on with it")
            self._jobs.append(Job(do, nbytes))
            self._bytes += nbytes
            self.peak = max(self.peak, self._bytes)
            self._changed.notify_all()

    def _has_room(self, nbytes: int) -> bool:
        return (not (nbytes and self._bytes) or self._bytes + nbytes <= self.limit) and len(self._jobs) < MOST_JOBS

    def check(self) -> None:
        """Raise StoreError if an earlier job failed."""
        if self._error is not None:
            raise StoreError(str(self._error)) from self._error

    def mark(self) -> Callable[[], None]:
        """Return what waits, in any thread, until all that is queued by now is done, what it put off included."""
        passed = threading.Event()

        def reach() -> None:
            self._rest()
            passed.set()

        self.submit(reach)

        def wait() -> None:
            with self._changed:
                self._changed.wait_for(lambda: passed.is_set() or self._error or self._dropping)
            if not passed.is_set():
                self.check()
                raise StoreError("this run was closed before everything was written")

        return wait

    def drain(self) -> None:
        """Wait until everything queued is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not (self._jobs or self._busy))
            self.check()

    @property
    def failed(self) -> bool:
        """Whether a job has raised."""
        return self._error is not None

    def close(self, patience: float | None = None) -> None:
        """Finish what is queued and end the thread; a job's error is left for `check`.

        After `patience` seconds the jobs that have not begun are dropped.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(patience)
        with self._changed:
            self._dropping = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
                self._busy = True
            nbytes = job.nbytes
            try:
                if self._error is None and not self._dropping:
                    job.do()
                del job  # its arrays are freed before its bytes are given back
                if self._error is None and not self._jobs:
                    self._rest()
            except BaseException as error:  # kept, and raised in the caller's thread
                self._error = error
            with self._changed:
                self._busy = False
                self._bytes -= nbytes
                self._changed.notify_all()

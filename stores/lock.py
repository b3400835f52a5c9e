"""One driver a run: an exclusive lock beside it, and a shared one that its workers hold on its folder.

The kernel drops both when a process ends, however it ends, so that nothing stale is ever left.
"""

import datetime
import errno
import json
import os
import socket
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from interp.stores.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows: runs are written without a lock there
    fcntl = None  # type: ignore[assignment]

_BUSY = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)


class RunLock:
    """The right to write a run, for one process at a time; taken when made, given back by `release` or `with`.

    Raises StoreError while another process has it, or while workers whose driver died are still ending.
    """

    def __init__(self, path: str | os.PathLike[str], *, patience: float = 10.0) -> None:
        self.path = Path(path).absolute()
        self._name = self.path.parent / f".{self.path.name}.lock"
        self._file: IO[str] | None = None
        if fcntl is None:
            return
        self._file = self._take()
        try:
            _await_workers(self.path, patience)
        except BaseException:
            self.release()
            raise

    def _take(self) -> IO[str] | None:
        while True:
            try:
                self._name.parent.mkdir(parents=True, exist_ok=True)
                file = self._name.open("a+")
            except OSError as error:
                raise StoreError(
                    f"{self.path} cannot be written: {error.strerror} ({self._name}); choose a folder that can be written"
                ) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                text = file.read()
                file.close()
                if error.errno in _BUSY:
                    raise StoreError(
                        f"{self.path} is being written by {_owner(text)}; wait for it, or stop it"
                    ) from None
                warnings.warn(
                    f"{self.path} lies on a file system without locks ({error.strerror}); see to it yourself that only "
                    "one job writes it",
                    RuntimeWarning,
                    stacklevel=4,
                )
                return None
            if _is_at(file, self._name):  # else its owner deleted it meanwhile
                break
            file.close()
        file.truncate(0)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": now}, file)
        file.flush()
        return file

    def release(self) -> None:
        """Give the run free; more than once does no harm."""
        file, self._file = self._file, None
        if file is not None:
            self._name.unlink(missing_ok=True)
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()


def share(path: str | os.PathLike[str]) -> int | None:
    """Say, until this process ends, that it writes to the run at `path` as a worker; return the handle."""
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # a file system that cannot lock folders: the driver's lock is all there is
        os.close(handle)
        return None
    return handle


def _await_workers(path: Path, patience: float) -> None:
    """Wait until the workers of a driver that was killed have ended, which takes them a moment."""
    if not path.is_dir():
        return
    until = time.monotonic() + patience
    handle = os.open(path, os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in _BUSY:
                    return
            if time.monotonic() > until:
                raise StoreError(
                    f"workers of an earlier job are still writing to {path}; end them, or try again in a moment"
                )
            time.sleep(0.02)
    finally:
        os.close(handle)  # which also gives the lock back


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        there, here = path.stat(), os.fstat(file.fileno())
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _owner(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"

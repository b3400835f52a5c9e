"""A worker process: it performs what a pipe says, until the pipe or its parent ends."""

import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

from interp.errors import InterpError
from interp.jobs.work import Outcome, Recipe, Task, Work, perform, sentence, settled
from interp.stores import RunWriter, StoreError
from interp.stores.lock import share


def serve(pipe: Connection, function: str, arguments: dict[str, Any], device: str | None) -> None:
    """Be a worker: prepare the run or perform tasks, as the pipe says, until it ends.

    It says "computed" when it could take the next task, and "ended" when a task's samples are durable: the next batch
    is computed while the last one is still being written.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver decides
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
        # torch's threads of the CPU, of which a GPU needs none, would spin and take the cores from the other workers
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    said = threading.Lock()

    def say(*message: Any) -> None:
        with said:
            pipe.send(message)

    work: Work | None = None
    writer: RunWriter | None = None
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        if message[0] == "end":
            break
        try:
            work = work or Recipe(function, arguments).make()
            if message[0] == "prepare":
                say("prepared", work.prepare(tell=message[1]))
                continue
            if writer is None:
                handle = share(work.store)  # noqa: F841  held until the process ends
                writer = work.open(clean=False)
                say("ready")
        except InterpError as error:
            say("refused", sentence(error))
            continue
        _perform(work, writer, message[1], say)
    if writer is not None:
        writer.close()
    if work is not None:
        work.close()


def _perform(work: Work, writer: RunWriter, task: Task, say: Callable[..., None]) -> None:
    """Compute a task; a thread says how it ended once its samples are durable."""
    outcome = perform(work, writer, task)
    try:
        durable = writer.mark()
    except StoreError as error:  # nothing can be written any more
        say("ended", task, Outcome("stop", sentence(error), outcome.notes))
        return
    say("computed")
    threading.Thread(target=_tell, args=(durable, task, outcome, say), daemon=True).start()


def _tell(durable: Callable[[], None], task: Task, outcome: Outcome, say: Callable[..., None]) -> None:
    say("ended", task, settled(outcome, durable))


def _end_with(parent: Any) -> None:
    """End this process at once when its parent has ended: nobody would take its results."""
    wait([parent.sentinel])
    os._exit(1)

"""Write a run to a folder: steps are buffered to whole chunks, encoded and written in the background."""

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.stores.background import Background
from interp.stores.blocks import Block
from interp.stores.chunks import placement_of
from interp.stores.codec import encode_parts
from interp.stores.errors import StoreError
from interp.stores.files import PARTIAL, publish, sweep, write_partial
from interp.stores.growth import grow_files, with_tables, without_tables
from interp.stores.identity import read_root
from interp.stores.lock import RunLock
from interp.stores.schema import Layout, TokenTable
from interp.stores.shards import Encoded, ShardFile, encoded
from interp.stores.skeleton import chunk_file
from interp.stores.status import naming, read_status, write_rows
from interp.stores.writer import RunWriter

if TYPE_CHECKING:
    from interp.stores.reader import Run

QUEUE_BYTES = 256 << 20
SPARE = 2
PUT_OFF = 64
"""Most finished samples, and MiB of them, that wait to be made durable together."""


class DiskWriter(RunWriter):
    """Writes a run that exists at `path`. At most `queue_bytes` wait to be written; `append` then waits too.

    Besides the queue, each sample begun holds one chunk (about ten steps) of every array that it appends to.
    """

    path: Path

    def __init__(
        self,
        path: Path,
        layout: Layout,
        *,
        queue_bytes: int = QUEUE_BYTES,
        clean: bool = True,
        lock: RunLock | None = None,
    ) -> None:
        self.path = path
        self._lock = lock
        listed = read_root(path)["consolidated_metadata"]["metadata"]
        self._metadata = {name: listed[name] for name in ("status", "error", *layout.arrays)}
        self._places = {name: placement_of(found) for name, found in self._metadata.items()}
        if clean:
            for name in self._metadata:
                sweep(path / name)
        super().__init__(layout, read_status(path, self._metadata["status"]))
        self._buffers: dict[tuple[tuple[int, ...], str], np.ndarray | Block] = {}
        self._rows: dict[int, dict[str, np.ndarray]] = {}
        self._shards: dict[tuple[int, str], ShardFile] = {}
        self._closed_files: dict[int, list[tuple[Path, Path]]] = {}
        self._settled: dict[int, tuple[int, dict[str, np.ndarray]]] = {}
        self._put_off = 0
        self._spare: dict[tuple[tuple[int, ...], tuple[int, ...], str], deque[Block]] = {}
        self._background = Background(queue_bytes, self._make_durable)
        self._closed = False

    def begin(self, i: int) -> None:  # noqa: D102
        self._background.check()
        super().begin(i)

    def drain(self) -> None:  # noqa: D102
        self._background.drain()

    def mark(self) -> Callable[[], None]:  # noqa: D102
        return self._background.mark()

    def close(self) -> None:  # noqa: D102
        self._end(None)
        self._background.check()

    def abandon(self) -> None:  # noqa: D102
        self._end(1.0)

    @property
    def broken(self) -> bool:  # noqa: D102
        return self._background.failed

    def _end(self, patience: float | None) -> None:
        if self._closed:
            return
        self._closed = True
        for i in list(self._progress):
            self._forget(i)
        self._progress.clear()
        self._background.close(patience)
        for i in {*self._closed_files, *(j for j, _ in self._shards)}:
            self._abandon(i)
        self._spare.clear()
        if self._lock is not None:
            self._lock.release()

    @property
    def run(self) -> "Run":
        """The run as it is on disk now, once everything handed over is durable."""
        from interp.stores.opening import open_run

        if not self._closed:
            self.drain()
        return open_run(self.path)

    def grow(  # noqa: D102
        self,
        samples: Mapping[str, Any],
        tokens: Mapping[str, TokenTable] | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> range:
        self.drain()
        old = len(self)
        with naming(self.path):
            new = grow_files(self.path, with_tables(self.path, self.layout), samples, tokens or {}, attrs or {})
        self.layout = without_tables(new, len(new))
        listed = read_root(self.path)["consolidated_metadata"]["metadata"]
        self._metadata = {name: listed[name] for name in self._metadata}
        self._arrays = self.layout.arrays
        self._status = np.concatenate([self._status, np.zeros(len(self.layout) - old, "int8")])
        return range(old, len(self.layout))

    def _add(self, samples: tuple[int, ...], name: str, step: int, blocks: np.ndarray) -> None:
        place, array, key = self._places[name], self._arrays[name], (samples, name)
        size = place.inner[1] if place.inner else place.outer[1]
        start = step - step % size
        buffer = self._buffers.get(key)
        if buffer is None:
            self._background.check()
            if step != start:
                raise StoreError(
                    f"samples {list(samples)} were not appended together before step {step} of {name}; go on as begun"
                )
            shape = (len(samples), min(size, array.shape[1] - start), *array.shape[2:])
            buffer = self._block(place.inner, shape, array.dtype) if place.inner else np.empty(shape, array.dtype)
            self._buffers[key] = buffer
        if isinstance(buffer, Block):
            buffer.set_step(step - start, blocks)
        else:
            buffer[:, step - start] = blocks
        if step - start + 1 == buffer.shape[1]:
            del self._buffers[key]
            self._send(samples, name, start, buffer)

    def _put(self, i: int, name: str, value: np.ndarray) -> None:
        place = self._places[name]
        if not place.inner:
            self._send((i,), name, 0, np.array(value)[None])
            return
        for start in range(0, value.shape[0], place.inner[1]):
            part = value[None, start : start + place.inner[1]]
            block = self._block(place.inner, part.shape, value.dtype.name)
            block.set_all(part)
            self._send((i,), name, start, block)

    def _block(self, inner: tuple[int, ...], shape: tuple[int, ...], dtype: str) -> Block:
        """Return room to fill, a written block if there is any: fresh memory costs page faults."""
        try:
            block = self._spare[inner, shape, dtype].pop()
        except (KeyError, IndexError):
            return Block(shape, inner[1:], dtype)
        block.unwritten = shape[0]
        return block

    def _send(self, samples: tuple[int, ...], name: str, start: int, block: "np.ndarray | Block") -> None:
        for k, i in enumerate(samples):
            if isinstance(block, Block):
                mine = block.chunks[k]
                chunks = encoded(mine, self._places[name])  # which begins at once, while earlier ones are written
                self._background.submit(partial(self._write_steps, i, name, start, block, chunks), 2 * mine.nbytes)
            elif self._is_batched(name):
                self._rows.setdefault(i, {})[name] = block[k]
            else:
                self._background.submit(partial(self._write_sample, i, name, block[k]), block[k].nbytes)

    def _is_batched(self, name: str) -> bool:
        """Whether samples share this array's chunks, which are then written along with `status`."""
        return self._places[name].outer[0] > 1

    def _discard(self, i: int) -> None:
        self._forget(i)
        self._background.submit(partial(self._clear, i))

    def _forget(self, i: int) -> None:
        self._rows.pop(i, None)
        for key in [k for k in self._buffers if i in k[0]]:
            del self._buffers[key]

    def _finish(self, i: int, status: int, error: str) -> None:
        rows = self._rows.pop(i, {})
        rows["error"] = np.array(error, object)
        size = sum(r.nbytes for r in rows.values())
        self._background.submit(partial(self._settle, i, status, rows), size)

    # What follows runs in the background thread.

    def _write_steps(self, i: int, name: str, start: int, block: Block, chunks: Encoded) -> None:
        with naming(self._target(i, name)):
            shard = self._shards.get((i, name))
            if shard is None:
                shard = ShardFile(self._partial(name, i), self._target(i, name), self._places[name])
                self._shards[i, name] = shard
            shard.add(start, block.places, chunks)
        block.unwritten -= 1
        if not block.unwritten:
            key = (self._places[name].inner or (), block.shape, block.chunks.dtype.name)
            self._spare.setdefault(key, deque(maxlen=SPARE)).append(block)

    def _write_sample(self, i: int, name: str, block: np.ndarray) -> None:
        file, target = self._partial(name, i), self._target(i, name)
        with naming(target):
            place = self._places[name]
            write_partial(file, *encode_parts(block.reshape(place.outer), compress=place.compress))
        self._closed_files.setdefault(i, []).append((file, target))

    def _settle(self, i: int, status: int, rows: dict[str, np.ndarray]) -> None:
        """Close a sample's files. It is made durable with the next ones in line, since many cost little more than one."""
        for name in [name for j, name in self._shards if j == i]:
            with naming(self._target(i, name)):
                self._closed_files.setdefault(i, []).append(self._shards.pop((i, name)).close())
        self._settled[i] = (status, rows)
        self._put_off += sum(file.stat().st_size for file, _ in self._closed_files.get(i, ()))
        if len(self._settled) >= PUT_OFF or self._put_off >= PUT_OFF << 20:
            self._make_durable()

    def _make_durable(self) -> None:
        """Give the settled samples their data, then the rows in shared chunks, `status` last."""
        if not self._settled:
            return
        settled, self._settled, self._put_off = self._settled, {}, 0
        files = [file for i in settled for file in self._closed_files.pop(i, ())]
        for name in sorted({name for _, found in settled.values() for name in found}):
            files += self._rewritten(name, {j: found[name] for j, (_, found) in settled.items() if name in found})
        statuses = {j: np.array(value, "int8") for j, (value, _) in settled.items()}
        with naming(self.path):
            publish(files)
            publish(self._rewritten("status", statuses))
        for j, value in statuses.items():
            self._status[j] = value

    def _rewritten(self, name: str, rows: dict[int, np.ndarray]) -> list[tuple[Path, Path]]:
        return write_rows(self.path, name, self._metadata[name], rows)

    def _clear(self, i: int) -> None:
        self._settled.pop(i, None)
        self._abandon(i)
        for name in self._arrays:
            if not self._is_batched(name):
                self._target(i, name).unlink(missing_ok=True)

    def _abandon(self, i: int) -> None:
        """Delete what was written of a sample and has no name yet."""
        for name in [name for j, name in self._shards if j == i]:
            self._shards.pop((i, name)).abandon()
        for file, _ in self._closed_files.pop(i, ()):
            file.unlink(missing_ok=True)

    def _target(self, i: int, name: str) -> Path:
        return chunk_file(self.path / name, i, len(self._places[name].outer))

    def _partial(self, name: str, i: int) -> Path:
        return self.path / name / f".{i}{PARTIAL}"

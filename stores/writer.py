"""The interface for writing a run, and the checks that are the same on disk and in memory."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from interp.stores.chunks import fill_value
from interp.stores.errors import StoreError, nearest
from interp.stores.groups import thumb_factor
from interp.stores.rounding import ATTRIBUTE, rounded
from interp.stores.schema import Array, Layout, TokenTable
from interp.stores.table import DONE, FAILED, TODO

if TYPE_CHECKING:
    from interp.stores.reader import Run


class RunWriter:
    """Writes a run sample by sample; made by `create_run`, used as a context manager.

    `begin`, then `append` or `append_together` (a step at a time, in order) or `put` (whole), then `commit` or `fail`.
    A sample is visible as done only when its data are durable. Not for use from several threads at once.
    """

    path: Path | None = None
    remark: str = ""
    """Kept in `error` of the samples that are committed while it is set."""

    def __init__(self, layout: Layout, status: np.ndarray) -> None:
        self.layout = layout
        self._arrays = layout.arrays
        self._status = status
        self._progress: dict[int, dict[str, int]] = {}

    @property
    def status(self) -> np.ndarray:
        """Status of every sample, int8 (sample,): 0 to do, 1 done, 2 failed; a commit counts once it is
        durable.
        """
        return self._status.copy()

    def __len__(self) -> int:
        return len(self._status)

    def begin(self, i: int) -> None:
        """Start sample `i`; whatever an earlier attempt left of it is dropped. A finished sample is
        refused.
        """
        if not 0 <= i < len(self):
            raise StoreError(f"sample {i} was begun, but the run has {len(self)}, numbered from 0; grow it first")
        if self._status[i] == DONE:
            raise StoreError(f"sample {i} is already done; skip the samples whose writer.status is 1")
        self._discard(i)
        self._progress[i] = {}

    def append(self, i: int, name: str, block: Any) -> None:
        """Add the next step of array `name` (`"attention/32x32/probs"`): its dims without sample and step."""
        self._append((i,), name, lambda array: self._value(name, array, block, array.dims[2:])[None])

    def append_together(self, samples: Sequence[int], name: str, blocks: Any) -> None:
        """Add the next step of array `name` of several samples, (sample, …): as `append` for each of them, but much faster.

        Samples that began together stay together until the array's last step.
        """
        n = len(samples)
        self._append(
            tuple(samples), name, lambda array: self._value(name, array, blocks, (array.dims[0], *array.dims[2:]), n)
        )

    def _append(self, samples: tuple[int, ...], name: str, blocks: Callable[[Array], np.ndarray]) -> None:
        array, progress = self._array(name), [self._begun(i) for i in samples]
        steps = array.steps
        if steps is None:
            raise StoreError(f"{name} has dims {array.dims} and no steps to append; use put")
        at = {known.get(name, 0) for known in progress}
        if len(at) != 1:
            raise StoreError(
                f"samples {list(samples)} have not all got the same steps of {name}; append each by itself"
            )
        (step,) = at
        if step >= steps:
            raise StoreError(
                f"sample {samples[0]} already has all {steps} steps of {name}; the run was planned with {steps}"
            )
        self._add(samples, name, step, blocks(array))
        for known in progress:
            known[name] = step + 1

    def put(self, i: int, name: str, value: Any) -> None:
        """Write array `name` of sample `i` whole: its dims without sample. An image's thumb is made along
        with it.
        """
        array, progress = self._array(name), self._begun(i)
        if progress.get(name):
            raise StoreError(f"{name} of sample {i} was already written; begin({i}) again to start over")
        value = self._value(name, array, value, array.dims[1:])
        self._put(i, name, value)
        progress[name] = array.steps or 1
        if name == "images/image" and "images/thumb" in self._arrays and "images/thumb" not in progress:
            self.put(i, "images/thumb", thumbnail(value))

    def commit(self, i: int) -> None:
        """Finish sample `i`: data first, then its status. StoreError if an array that is not optional is
        incomplete.
        """
        progress = self._begun(i)
        lacking, absent = [], []
        for name, array in self._arrays.items():
            wanted, found = array.steps or 1, progress.get(name, 0)
            if found < wanted and (found or not array.optional):
                lacking.append(f"{name} ({found} of {wanted} steps)" if array.steps else name)
            elif not found:
                absent.append(name)
        if lacking:
            raise StoreError(f"sample {i} cannot be committed: it lacks {', '.join(lacking)}; write these first")
        for name in absent:  # a chunk that is missing always means damage
            array = self._arrays[name]
            self._put(i, name, np.full(array.sample_shape, fill_value(array.dtype)))
        del self._progress[i]
        self._finish(i, DONE, self.remark)

    def drop(self, i: int) -> None:
        """Forget what was written of sample `i` since `begin`; its status stays. Nothing happens if it was not begun."""
        if self._progress.pop(i, None) is not None:
            self._discard(i)

    def fail(self, i: int, error: str) -> None:
        """Give sample `i` up and record why, in a sentence; a later run tries it again."""
        self._progress.pop(i, None)
        if not 0 <= i < len(self):
            raise StoreError(f"sample {i} cannot fail: the run has {len(self)}, numbered from 0")
        self._discard(i)
        self._finish(i, FAILED, str(error))

    def grow(
        self,
        samples: Mapping[str, Any],
        tokens: Mapping[str, TokenTable] | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> range:
        """Append samples: their columns, and for each group with tokens (`"attention/8x8"`) a table; return
        numbers.

        `attrs` replaces root attributes in the same moment. For one process alone. A table with more token columns
        than the run has is refused.
        """
        raise NotImplementedError

    def drain(self) -> None:
        """Wait until all that was handed over is durable; raise the writer's error if there was one."""

    def mark(self) -> Callable[[], None]:
        """Return what waits, in any thread, until all that was handed over before is durable; it raises like `drain`."""
        return self.drain

    def close(self) -> None:
        """Finish writing; raise the writer's error if there was one. Samples begun but not committed are
        dropped.
        """

    def abandon(self) -> None:
        """Close within about a second: what is not durable by then is dropped, to be made again by a later run."""
        self.close()

    @property
    def broken(self) -> bool:
        """Whether nothing can be written any more, as on a full disk; every further call raises why."""
        return False

    @property
    def run(self) -> "Run":
        """The run as it is now, all committed samples included."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close() if isinstance(error, Exception) else self.abandon()
        except StoreError as also:
            error.add_note(f"While the run was being closed: {also}")

    def _add(self, samples: tuple[int, ...], name: str, step: int, blocks: np.ndarray) -> None:
        raise NotImplementedError

    def _put(self, i: int, name: str, value: np.ndarray) -> None:
        raise NotImplementedError

    def _discard(self, i: int) -> None:
        raise NotImplementedError

    def _finish(self, i: int, status: int, error: str) -> None:
        raise NotImplementedError

    def _array(self, name: str) -> Array:
        if name not in self._arrays:
            known = sorted(self._arrays)
            raise StoreError(f"this run has no array {name!r}{nearest(name, known)}; it has: {', '.join(known)}")
        return self._arrays[name]

    def _begun(self, i: int) -> dict[str, int]:
        if i not in self._progress:
            raise StoreError(f"sample {i} is not being written; call begin({i}) first")
        return self._progress[i]

    def _value(self, name: str, array: Array, value: Any, dims: tuple[str, ...], n: int = 1) -> np.ndarray:
        """Return what was given of an array as it is stored; StoreError unless it has these of its dims, `sample` being n."""
        sizes = dict(zip(array.dims, array.shape, strict=True)) | {"sample": n}
        shape = tuple(sizes[d] for d in dims)
        found = np.asarray(value, object if array.dtype == "str" else array.dtype)
        if found.shape != shape:
            raise StoreError(f"{name} wants {dims} of shape {shape}, but was given shape {found.shape}")
        bits = array.attrs.get(ATTRIBUTE)
        return found if bits is None else rounded(np.ascontiguousarray(found), bits)


def to_do(status: np.ndarray) -> np.ndarray:
    """Return the numbers of the samples that are not done, failed ones included.

    >>> to_do(np.array([1, 0, 2]))
    array([1, 2])
    """
    return np.flatnonzero(status != DONE)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Shrink an image (height, width, rgb) by averaging over whole blocks; longest side at most 64."""
    factor = thumb_factor(*image.shape[:2])
    height, width = max(1, image.shape[0] // factor), max(1, image.shape[1] // factor)
    blocks = image[: height * factor, : width * factor]
    fy, fx = blocks.shape[0] // height, blocks.shape[1] // width
    # adding up small integers is many times faster than averaging
    whole = "uint32" if image.dtype == np.uint8 else None
    total = blocks.reshape(height, fy, width, fx, -1).sum(axis=3, dtype=whole).sum(axis=1)
    mean = total / (fy * fx)
    return np.rint(mean).astype(image.dtype)


__all__ = ["DONE", "FAILED", "TODO", "RunWriter", "thumbnail", "to_do"]

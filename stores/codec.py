"""Turn a chunk into the bytes that stock Zarr reads, and back: (blosc lz4 bitshuffle) + crc32c, little
endian.
"""

from typing import Any

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc
from numcodecs.vlen import VLenUTF8

from interp.stores.chunks import fill_value

_BLOSC = Blosc(cname="lz4", clevel=5, shuffle=Blosc.BITSHUFFLE, blocksize=0)
_TEXT = VLenUTF8()


class ChecksumError(ValueError):
    """The bytes of a chunk do not agree with their checksum."""


def checksum(data: bytes) -> bytes:
    """Return the crc32c of `data` as it stands on disk."""
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def checksummed(data: bytes) -> bytes:
    """Return `data` followed by its crc32c, as Zarr's codec of that name does."""
    return data + checksum(data)


def encode(values: np.ndarray, *, compress: bool) -> bytes:
    """Encode one whole chunk; text is an object array."""
    return checksummed(encode_body(values, compress=compress))


def encode_body(values: np.ndarray, *, compress: bool) -> bytes:
    """Encode one whole chunk, without its checksum."""
    if values.dtype == object:
        exact = np.array([str(v) for v in values.ravel()], object)  # the codec takes str, not numpy's str_
        raw: Any = _TEXT.encode(exact)
        return bytes(_BLOSC.encode(raw)) if compress else bytes(raw)
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return bytes(_BLOSC.encode(values)) if compress else values.tobytes()


def decode(data: bytes, dtype: str, shape: tuple[int, ...], *, compress: bool) -> np.ndarray:
    """Decode one whole chunk into a fresh array; ChecksumError if it is damaged."""
    body, stored = data[:-4], data[-4:]
    if len(data) < 4 or int(google_crc32c.value(body)).to_bytes(4, "little") != stored:
        raise ChecksumError("its bytes do not agree with their checksum")
    raw = _BLOSC.decode(body) if compress else body
    if dtype == "str":
        return np.asarray(_TEXT.decode(raw), object).reshape(shape)
    return np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).reshape(shape).copy()


def padded(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return `values` in the corner of a chunk of `shape`, the rest being the fill value."""
    if values.shape == shape:
        return values
    chunk = np.full(shape, fill_value("str" if values.dtype == object else values.dtype.name), values.dtype)
    chunk[tuple(slice(0, s) for s in values.shape)] = values
    return chunk

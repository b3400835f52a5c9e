"""Turn a chunk into the bytes that stock Zarr reads, and back: (blosc lz4 bitshuffle) + crc32c, little
endian.
"""

import math

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc
from numcodecs.vlen import VLenUTF8

from interp.stores.chunks import fill_value

_BLOSC = Blosc(cname="lz4", clevel=5, shuffle=Blosc.BITSHUFFLE, blocksize=0)
_TEXT = VLenUTF8()
HEADER = 16
"""Bytes of Blosc's header: versions, flags and item size, then three sizes."""
MOST_GAIN = 300
"""How many times smaller lz4 can make anything, generously."""


class ChecksumError(ValueError):
    """The bytes of a chunk do not agree with their checksum."""


def checksummed(data: bytes) -> bytes:
    """Return `data` followed by its crc32c, as Zarr's codec of that name does."""
    return data + _checksum(data)


def _checksum(data: bytes | np.ndarray) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def encode(values: np.ndarray, *, compress: bool) -> bytes:
    """Encode one whole chunk; text is an object array."""
    return b"".join(encode_parts(values, compress=compress))


def encode_parts(values: np.ndarray, *, compress: bool) -> tuple[bytes | memoryview, bytes]:
    """Encode one whole chunk and its checksum, apart: joining them would copy it once more.

    What is not compressed is not copied either: it stays the memory of `values`.
    """
    if values.dtype == object:
        exact = np.array([str(v) for v in values.ravel()], object)  # the codec takes str, not numpy's str_
        raw = bytes(_TEXT.encode(exact))
        body = bytes(_BLOSC.encode(raw)) if compress else raw
        return body, _checksum(body)
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    if compress:
        body = bytes(_BLOSC.encode(values))
        return body, _checksum(body)
    flat = values.reshape(-1).view("uint8")
    return flat.data, _checksum(flat)


def decode(data: bytes, dtype: str, shape: tuple[int, ...], *, compress: bool) -> np.ndarray:
    """Decode one whole chunk into a fresh array; ChecksumError if it is damaged."""
    values = decoded(data, dtype, shape, compress=compress)
    return values if dtype == "str" else values.copy()


def decoded(data: bytes, dtype: str, shape: tuple[int, ...], *, compress: bool) -> np.ndarray:
    """Decode one whole chunk, of numbers into an array that cannot be written to; ChecksumError if it is damaged."""
    body, stored = np.frombuffer(data, "uint8")[:-4], data[-4:]
    if len(data) < 4 or _checksum(body) != stored:
        raise ChecksumError("its bytes do not agree with their checksum")
    count = math.prod(shape)
    size = None if dtype == "str" else count * np.dtype(dtype).itemsize
    try:
        raw = _decompressed(body, size) if compress else body.data
        if dtype == "str":
            return _texts(raw, count).reshape(shape)
    except (RuntimeError, ValueError) as error:  # what the codecs say of bytes that are none of theirs
        raise ChecksumError(f"it cannot be decoded: {error}") from error
    if len(raw) != size:
        raise ChecksumError(f"it holds {len(raw):,} bytes instead of {size:,}")
    return np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).reshape(shape)


def _decompressed(body: np.ndarray, size: int | None) -> bytes:
    """Decompress, after a look at the sizes that the bytes claim, which Blosc trusts: nothing is allocated for false ones."""
    if len(body) < HEADER:
        raise ValueError(f"it is shorter than {HEADER} bytes")
    claimed, block, whole = (int(v) for v in body[4:HEADER].view("<u4"))
    if (claimed != size) if size is not None else (claimed > MOST_GAIN * len(body)):
        raise ValueError(f"it claims to hold {claimed:,} bytes")
    if whole != len(body) or not 0 < block <= max(1, claimed):
        raise ValueError(f"it claims to be {whole:,} bytes in blocks of {block:,}")
    return bytes(_BLOSC.decode(body))


def _texts(raw: bytes | memoryview, count: int) -> np.ndarray:
    claimed = int.from_bytes(bytes(raw[:4]), "little")
    if claimed != count:
        raise ValueError(f"it claims to hold {claimed:,} texts instead of {count:,}")
    return np.asarray(_TEXT.decode(raw), object)


def padded(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return `values` in the corner of a chunk of `shape`, the rest being the fill value."""
    if values.shape == shape:
        return values
    chunk = np.full(shape, fill_value("str" if values.dtype == object else values.dtype.name), values.dtype)
    chunk[tuple(slice(0, s) for s in values.shape)] = values
    return chunk

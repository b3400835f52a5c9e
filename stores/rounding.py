"""Mantissa rounding: the one lossy option that keeps relative precision, and stays plain float16 or float32."""

import numpy as np

from interp.stores.errors import StoreError

ATTRIBUTE = "mantissa_bits"
"""The array attribute that says how many bits of the mantissa were kept."""

_FORMATS = {"float16": ("uint16", 10), "float32": ("uint32", 23)}


def check_bits(bits: int, dtype: str) -> int:
    """Return `bits` if numbers of `dtype` can be rounded to it; raise StoreError otherwise."""
    most = _FORMATS[dtype][1] if dtype in _FORMATS else 0
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits < most:
        raise StoreError(
            f"a mantissa of {bits!r} bits was asked for; {dtype} numbers can be rounded to 1 to {most - 1}"
        )
    return bits


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """Round the mantissas of float16 or float32 numbers to `bits` bits, ties to even; a fresh array.

    7 bits change a number by at most 0.4 %. NaN and infinities stay what they are.

    >>> rounded(np.array([1.0, 0.1, np.nan], "float16"), 4)
    array([1.     , 0.10156,     nan], dtype=float16)
    """
    unsigned, own = _FORMATS[values.dtype.name]
    drop = own - bits
    raw = values.view(unsigned)
    one = raw.dtype.type(1)
    half = raw.dtype.type((1 << (drop - 1)) - 1)
    mask = raw.dtype.type((1 << (raw.dtype.itemsize * 8)) - (1 << drop))
    found = ((raw + half + ((raw >> raw.dtype.type(drop)) & one)) & mask).view(values.dtype)
    special = ~np.isfinite(values)
    if special.any():
        found[special] = values[special]
    return found

"""The attribute judge of `scenes` as a metric."""

import numpy as np

from interp.errors import InterpError
from interp.stores import Run


class Attributes:
    """Share of the attributes named in the text that the judge of `scenes` sees in the picture, 0 to 1.

    Color, shape, pattern, size, relation and background (`interp.scenes.agreement`); for runs of `scenes` alone.
    """

    def __init__(self, *, run: Run | None = None) -> None:
        if run is not None and dict(run.attrs.get("pipeline") or {}).get("id") != "scenes":
            raise InterpError("the attribute judge knows the pictures of 'scenes' only; score other models with 'clip'")

    def __call__(self, images: np.ndarray, texts: list[str]) -> np.ndarray:
        """Return the share for each picture (sample,)."""
        from interp.scenes import agreement

        return agreement(images, texts)

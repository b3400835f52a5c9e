"""Write a probe of your own: eight lines, no registration, no torch.

python examples/custom_probe.py
interp probe examples/custom_probe.py run.zarr        # the same from the command line
"""

import xarray as xr

import interp
from interp.probes import probe


@probe("sharpness")
def sharpness(run: interp.Run, *, power: int = 2) -> xr.DataArray:
    """Mean |difference| of neighbouring latent positions, to the power `power`, at each step (latent units)."""
    z = run.latents
    steep = (abs(z.diff("x")) ** power).mean(["channel", "y", "x"])
    return steep.assign_attrs(units="latent units squared" if power == 2 else f"latent units ** {power}")


if __name__ == "__main__":
    run = interp.trace("scenes", ["a large red circle on a gray background"], seeds=[0, 1], steps=5)
    answer = run.probe(__file__)  # a file, an installed name, or the function itself: sharpness(run)
    print(answer["sharpness"].mean("sample").to_series().round(3).to_string())

"""A run without its pictures, latents and maps: table, scores and passes, in one small file to keep or to send."""

import json
import zipfile
from pathlib import Path

LEFT_OUT = ("images", "attention", "trajectory/latents", "trajectory/final_latents", "trajectory/noise_pred")


def trim(store: Path, target: Path) -> Path:
    """Write the run at `store` to a .zip file without `LEFT_OUT`; `interp.open_run` and plain xarray open it.

    What reads scores and passes alone (alignment, acceleration's savings) can be computed again from it.
    """
    root = json.loads((store / "zarr.json").read_text(encoding="utf-8"))
    metadata = root["consolidated_metadata"]["metadata"]
    root["consolidated_metadata"]["metadata"] = {k: v for k, v in metadata.items() if not _left_out(k)}
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.new")
    with zipfile.ZipFile(fresh, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zarr.json", json.dumps(root))
        for path in sorted(p for p in store.rglob("*") if p.is_file()):
            name = path.relative_to(store).as_posix()
            if name != "zarr.json" and not _left_out(name) and not path.name.startswith("."):
                file.write(path, name)
    fresh.replace(target)
    return target


def _left_out(name: str) -> bool:
    return any(name == one or name.startswith(f"{one}/") for one in LEFT_OUT)

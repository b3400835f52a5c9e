"""Fail unless the newest wheel in the folder given installs `interp` alone, with its weights and plugins."""

import sys
import zipfile
from pathlib import Path


def problems(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        top = {n.split("/")[0] for n in names if ".dist-info/" not in n}
        entry = next(archive.read(n).decode() for n in names if n.endswith("entry_points.txt"))
    found = [] if top == {"interp"} else [f"top-level names are {sorted(top)}, not 'interp' alone"]
    for needed in (
        "interp/py.typed",
        "interp/probes/base.py",
        "interp/stores/schema.py",
        "interp/scenes/weights/model_index.json",
        "interp/scenes/weights/unet/diffusion_pytorch_model.safetensors",
    ):
        if needed not in names:
            found.append(f"{needed} is missing")
    found += [
        f"entry-point group {g} is missing"
        for g in ("interp.probes", "interp.families", "interp.interventions")
        if f"[{g}]" not in entry
    ]
    return found


if __name__ == "__main__":
    newest = max(Path(sys.argv[1]).glob("*.whl"), key=lambda p: p.stat().st_mtime)
    for problem in (found := problems(newest)):
        print(f"{newest.name}: {problem}")
    sys.exit(bool(found))

"""The checker of `make check` finds a wheel that is wrong."""

import zipfile
from pathlib import Path

from tests.check_wheel import problems

GOOD = {
    "interp/py.typed": "",
    "interp/probes/base.py": "",
    "interp/stores/schema.py": "",
    "interp/scenes/weights/model_index.json": "{}",
    "interp/scenes/weights/unet/diffusion_pytorch_model.safetensors": "",
    "interp_diffusion-0.dist-info/entry_points.txt": "[interp.probes]\n[interp.families]\n[interp.interventions]\n",
}


def wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_a_good_wheel_passes(tmp_path: Path) -> None:
    assert problems(wheel(tmp_path / "a.whl", GOOD)) == []


def test_a_stray_top_level_name_is_found(tmp_path: Path) -> None:
    (problem,) = problems(wheel(tmp_path / "a.whl", {**GOOD, "probes/base.py": ""}))
    assert "probes" in problem


def test_missing_weights_are_found(tmp_path: Path) -> None:
    files = {k: v for k, v in GOOD.items() if "unet" not in k}
    assert len(problems(wheel(tmp_path / "a.whl", files))) == 1

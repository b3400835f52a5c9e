"""In a checkout that is not installed, a dist-info made from pyproject.toml declares the built-in probes."""

import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def write_dist_info(folder: Path, name: str, group: str, entries: dict[str, str]) -> None:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{key} = {value}\n" for key, value in entries.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")


@pytest.fixture(autouse=True, scope="session")
def built_in_probes(tmp_path_factory):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["interp.probes"]
    if {e.name for e in entry_points(group="interp.probes")} >= set(declared):
        yield declared
        return
    folder = tmp_path_factory.mktemp("site")
    write_dist_info(folder, "interp-diffusion", "interp.probes", declared)
    sys.path.insert(0, str(folder))
    yield declared
    sys.path.remove(str(folder))

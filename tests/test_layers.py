"""The façade is light, the layers hold, and no module hides a public function."""

import subprocess
import sys
from pathlib import Path

import pytest

import interp

HEAVY = ("torch", "diffusers", "transformers", "nnsight")


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print([m for m in {HEAVY!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(eval(found.stdout))


@pytest.mark.parametrize(
    "statement",
    [
        "import interp, interp.stores, interp.probes",
        "import interp.cli",
        "import interp.scenes",
        "interp = __import__('interp'); interp.open_run",
    ],
)
def test_light_imports_load_no_model_library(statement: str) -> None:
    assert loaded_by(statement) == set()


def test_the_test_above_can_fail() -> None:
    assert "torch" in loaded_by("import interp; interp.load")


def test_every_public_name_resolves() -> None:
    for name in interp.__all__:
        assert getattr(interp, name) is not None
    assert sorted(interp.__all__) == sorted(["__version__", *interp._HOME])


def test_unknown_name_says_what_exists() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'tracee'.*trace"):
        _ = interp.tracee  # type: ignore[attr-defined]


@pytest.mark.parametrize("package", ["interp", "interp/probes", "interp/stores", "interp/scenes"])
def test_no_module_bears_the_name_of_a_public_function(package: str) -> None:
    """Importing the submodule `interp.trace` would overwrite the function `interp.trace`."""
    folder = Path(interp.__file__).parent.parent / package
    modules = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/__init__.py")}
    public = set(__import__(package.replace("/", "."), fromlist=["__all__"]).__all__)
    functions = {n for n in public if n.islower()}
    assert modules & functions == set()

"""The page "Write a probe": its Python blocks run in order, as a reader would type them."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from interp.probes.testing import check_probe
from interp.stores import synthetic_run

PAGE = Path(__file__).parents[2] / "docs" / "probes.md"


def test_the_page_runs_as_it_is_read(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    Path("sharpness.py").write_text(blocks[0], encoding="utf-8")
    assert len(blocks[0].splitlines()) == 8
    names = {"__name__": "page"}
    for number, block in enumerate(blocks):
        Path(f"block{number}.py").write_text(block, encoding="utf-8")
        exec(compile(block, f"block{number}.py", "exec"), names)
    printed = capsys.readouterr().out
    assert "{'sample': 4, 'step': 6}" in printed and '{"power": 1.0}' in printed
    assert "needs attention, which this run did not capture" in printed
    assert Path("bos.png").stat().st_size > 1000
    assert "{'prompt_id': 4, 'seed': 1}" in printed and "relative_image" in printed
    for name in ("sharpness", "bos_share"):
        for check in check_probe(names[name]):
            if check.name != "pickled":  # these live in no module
                check()


def test_the_package_installs_and_passes_its_own_tests(tmp_path):
    """Built into a wheel as pip does, and put on the path unpacked, entry point and all."""
    files = re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    for name, text in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "contrast_probe" / "__init__.py").touch()  # the page says so
    assert {name for name, _ in files} == {"contrast_probe/contrast.py", "test_contrast.py", "pyproject.toml"}
    site = tmp_path / "site"
    path = os.pathsep.join([str(site), *filter(None, sys.path)])

    def run(*command):
        env = {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("-m", "hatchling", "build", "-t", "wheel", "-d", "dist")
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        wheel.extractall(site)
    assert " passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_contrast.py")
    synthetic_run(path=tmp_path / "run.zarr")
    assert "contrast  " in run("-m", "interp.cli", "probes")
    out = [piece for suffix in ("png", "csv", "zarr") for piece in ("--out", f"contrast.{suffix}")]
    run("-m", "interp.cli", "probe", "contrast", "run.zarr", "--param", "distance=2", *out)
    written = (tmp_path / "contrast.csv").read_text()
    assert written.startswith("variable,sample,step,value,") and "\ncontrast,0,0," in written
    assert (tmp_path / "contrast.png").stat().st_size > 1000 and (tmp_path / "contrast.zarr" / "zarr.json").exists()

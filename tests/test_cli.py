"""The command line as a user types it: exit codes, one-sentence errors, the whole path on the bundled model."""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import xarray as xr

from interp import cli

pytestmark = pytest.mark.usefixtures("thin", "memory_untold")


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def interp(*words: str, cwd: Path | None = None) -> Done:
    """Run the command line in this process: importing torch anew for each call would take seconds."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["interp", *words]),
        mock.patch.object(cli, "_leave", lambda: sys.exit(cli.INTERRUPTED)),  # which would end the tests, too
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(cwd or Path.cwd()),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def test_the_installed_command_runs() -> None:
    script = Path(sys.executable).with_name("interp")
    done = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "interp demo" in done.stdout
    told = done.stdout.splitlines()[1:]
    assert not any(line.endswith("...") for line in told)  # no command is told in half a sentence
    assert interp("--version").stdout.startswith("interp 0.")


@pytest.fixture(scope="module")
def run(thin: None, memory_untold: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run.zarr"
    done = interp(
        *("trace", "scenes", "a red circle", "a blue star", "--out", str(path), "--steps", "3", "--seeds", "0-1"),
        *(
            "--condition",
            "baseline:",
            "--condition",
            "late: remove_text start=0.5",
        ),
    )
    assert done.returncode == 0, done.stderr
    assert "8 samples" in done.stdout
    return path


def test_trace_wrote_what_was_asked(run: Path) -> None:
    tree = xr.open_datatree(run, engine="zarr")
    assert list(tree["condition"].values) == ["baseline"] * 4 + ["late"] * 4
    assert list(tree["seed"].values) == [0, 1] * 4
    assert tree["trajectory/nfe"].sel(branch="cond").values.tolist() == [3] * 4 + [2] * 4
    # assert list(tree["scores"]["metric"].values) == ["clip:prompt"]


def test_trace_again_resumes(run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("c/*") if "scores" not in str(p)}
    done = interp(
        *("trace", "scenes", "a red circle", "a blue star", "--out", str(run), "--steps", "3", "--seeds", "0-1"),
        *("--condition", "baseline:", "--condition", "late: remove_text start=0.5"),
    )
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in run.rglob("c/*") if "scores" not in str(p)} == before


def test_info_verify_and_probes(run: Path) -> None:
    info = interp("info", str(run))
    assert info.returncode == 0 and "baseline, late" in info.stdout
    assert interp("verify", str(run)).returncode == 0
    probes = interp("probes")
    assert probes.returncode == 0
    for name in ("frequency_energy", "token_attribution", "eos_replacement"):
        assert name in probes.stdout


def test_probe_writes_table_picture_and_zarr(run: Path, tmp_path: Path) -> None:
    out = [str(tmp_path / f"energy{suffix}") for suffix in (".png", ".csv", ".zarr")]
    options = [w for path in out for w in ("--out", path)]
    done = interp("probe", "frequency_energy", str(run), "--param", "low_fraction=0.3", *options)
    assert done.returncode == 0, done.stderr
    stored = xr.open_zarr(out[2], consolidated=False)
    assert json.loads(stored.attrs["parameters"])["low_fraction"] == 0.3
    table = pd.read_csv(out[1])
    assert table.query("variable == 'x_norm'")["value"].to_numpy() == pytest.approx(stored["x_norm"].values.ravel())
    assert Path(out[0]).read_bytes().startswith(b"\x89PNG")


def test_probe_from_a_plain_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from interp.probes import probe\n\n@probe('loudness')\ndef loudness(run, *, power=2):\n"
        "    '''Mean |latent| to a power (latent units).'''\n"
        "    return (abs(run.latents) ** power).mean(['channel', 'y', 'x']).assign_attrs(units='latent units')\n"
    )
    done = interp("probe", "mine.py", str(run), "-p", "power=1", cwd=tmp_path)
    assert done.returncode == 0 and "loudness" in done.stdout, done.stderr


def test_sites(tmp_path: Path) -> None:
    done = interp("sites", "scenes", "--match", "*mid_block*attn2:probs")
    assert done.returncode == 0
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2:probs" in done.stdout


def test_dry_run_computes_nothing(tmp_path: Path) -> None:
    done = interp("trace", "scenes", "a red circle", "--out", str(tmp_path / "x.zarr"), "--dry-run")
    assert done.returncode == 0 and "forward passes" in done.stdout
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trace", "scens", "a", "-o", "x.zarr"], "unknown model 'scens'"),
        (["trace", "scenes", "a", "-o", "x.zarr", "--capture", "head=all"], "no field 'head'; did you mean 'heads'?"),
        (["trace", "scenes", "a", "-o", "x.zarr", "--capture", "attention=*attnX"], "matches no attention site"),
        (["trace", "scenes", "a", "-o", "x.zarr", "--intervene", "remove_txt"], "did you mean 'remove_text'"),
        (["trace", "scenes", "a", "-o", "x.zarr", "--intervene", "remove_text start=70 unit=step"], "outside the run"),
        (["trace", "scenes", "a", "-o", "x.zarr", "--seeds", "one"], "cannot read the seeds"),
        (["trace", "scenes", "a " * 80, "-o", "x.zarr"], "these words would be cut"),
        (["trace", "scenes", "a", "-o", "folder"], "folder"),
        (["trace", "scenes", "a", "-o", "x.zarr", "--intervene", "remove_text 'x"], "no closing quotation"),
        (["trace", "scenes", "a", "-o", "x.zarr", "--intervene", "start=0.5"], "write 'name field=value"),
        (["trace", "scenes", "a", "-o", "x.zarr", "--condition", "a:", "--condition", "a: remove_text"], "called 'a'"),
        (["trace", "scenes", "a", "-o", "x.zarr", "--seeds", "3-1"], "run backwards"),
        (["trace", "scenes", "a", "-o", "x.zarr", "--batch-size", "0"], "batch_size=0"),
        (["trace", "scenes", "a", "-o", "x.zarr", "--capture", "steps=9"], "a list of step numbers such as [0, 5]"),
        (["trace", "scenes", "a", "-o", "x.zarr", "--score", "clp"], "did you mean 'clip'"),
        (["trace", "scenes", "empty.csv", "-o", "x.zarr"], "'empty.csv' cannot be read as a table"),
        (["trace", "scenes", "bad.jsonl", "-o", "x.zarr"], "'bad.jsonl' cannot be read as JSON lines"),
        (["probe", "frequency_energy", "RUN", "-o", "folder/thesis.txt/e.png"], "'folder/thesis.txt' is no folder"),
        (["probe", "frequency_enery", "RUN"], "did you mean 'frequency_energy'"),
        (["probe", "frequency_energy", "RUN", "-p", "low=1"], "low"),
        (["probe", "eos_replacement", "RUN"], "eos"),
        (["info", "nowhere.zarr"], "no run at nowhere.zarr"),
        (["score", "RUN", "--metric", "clp"], "did you mean 'clip'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_code_2(words: list[str], sentence: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\nnot json\n')
    done = interp(*[str(run) if w == "RUN" else w for w in words], cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "x.zarr").exists()


def test_sweep(tmp_path: Path) -> None:
    asked = [
        "sweep",
        "scenes",
        "a red circle",
        "--over",
        "window=[[0, 0.5], [0.5, 1]]",
        "--steps",
        "2",
        "-o",
        "sweep.zarr",
    ]
    done = interp(*asked, "--intervene", "ablate site=unet.mid_block:out", "-m", "latent_distance", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "latent_distance" in line]
    assert len(rows) == 2 and "0–0.5" in done.stdout and "0.5–1" in done.stdout and "effect" in done.stdout
    done = interp("probe", "sweep", "sweep.zarr", "--out", "sweep.png", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "sweep.png").stat().st_size > 1000
    done = interp(*asked, "--intervene", "ablate sit=x", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean 'site'" in done.stderr
    done = interp(*asked[:3], "--over", "site=x", "-o", "other.zarr", "--intervene", "ablate", cwd=tmp_path)
    assert done.returncode == 2 and "write a list of values" in done.stderr


def test_what_is_said_of_ctrl_c_and_in_warnings(monkeypatch, tmp_path):
    from interp.warning import warn

    def stopped(path):
        warn("this is a warning")
        raise KeyboardInterrupt

    monkeypatch.setattr("interp.stores.open_run", stopped)
    done = interp("info", str(tmp_path))
    assert done.returncode == 130
    assert done.stderr == "interp: this is a warning\ninterp: interrupted; the same command goes on where it stopped\n"

"""`interp run` on a tiny pipeline: plan, resume, extension, refusals, failing samples, memory that runs out."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml

import interp
from interp.errors import InterpError
from interp.jobs import Job, job_schema, read_job, run_job
from interp.jobs import tracing as job_tracing
from interp.stores import create_run, open_run, verify
from interp.stores.testing import small_layout
from tests.families.pipelines import tiny
from tests.test_cli import interp as command

PROMPTS = ["a red circle", "two small stripes", "a cat", "one large ring", "a dog"]
BASE = {"model": "tiny", "prompts": PROMPTS[:3], "seeds": [0, 1], "steps": 2, "batch_size": 4}


pytestmark = pytest.mark.usefixtures("memory_untold")


@pytest.fixture
def pipe(monkeypatch):
    """The tiny pipeline, for every job of the test."""
    pipe = tiny("sd1")
    scheduler = pipe.scheduler
    monkeypatch.setattr(job_tracing, "load", lambda model, **_: pipe)
    yield pipe
    pipe.scheduler = scheduler


def job(folder, **changes):
    return Job(**{**BASE, "store": str(folder / "run.zarr"), **changes})


def run(folder, *, retry_failed=False, **changes):
    return run_job(job(folder, **changes), progress=False, retry_failed=retry_failed)


def planned(folder, **changes):
    """What --dry-run does."""
    return job_tracing.TraceWork(job(folder, **changes).model_dump(mode="json"), str(folder / "run.zarr")).describe()


def equal(a, b, *, but=()):
    """Bit by bit, array by array; `but` are root attributes that may differ."""
    a, b = (xr.open_datatree(p, engine="zarr").load() for p in (a, b))
    assert {k: v for k, v in a.attrs.items() if k not in ("created", *but)} == {
        k: v for k, v in b.attrs.items() if k not in ("created", *but)
    }
    assert set(a.groups) == set(b.groups)
    for node in a.subtree:
        other = b[node.path].to_dataset(inherit=False)
        mine = node.to_dataset(inherit=False)
        assert set(mine.variables) == set(other.variables)
        for name, variable in mine.variables.items():
            if variable.dtype.kind in "iufb":
                assert variable.values.tobytes() == other[name].values.tobytes(), f"{node.path}/{name}"
            else:
                np.testing.assert_array_equal(variable.values, other[name].values)


def test_a_job_is_the_trace_of_its_samples(pipe, tmp_path):
    report = run(tmp_path)
    assert (report.done, report.failed, report.made, report.code) == (6, 0, 6, 0)
    interp.trace(pipe, PROMPTS[:3], seeds=[0, 1], steps=2, batch_size=4, store=tmp_path / "other.zarr", progress=False)
    equal(tmp_path / "run.zarr", tmp_path / "other.zarr", but=("conditions", "fingerprint"))
    assert run(tmp_path).made == 0


def test_an_interrupted_job_goes_on_and_ends_equal(pipe, tmp_path, monkeypatch):
    real, calls = job_tracing.run_batch, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(job_tracing, "run_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert (open_run(tmp_path / "run.zarr").samples["status"] == 1).sum() == 4
    monkeypatch.setattr(job_tracing, "run_batch", real)
    assert run(tmp_path).made == 2
    (tmp_path / "calm").mkdir()
    run(tmp_path / "calm")
    equal(tmp_path / "run.zarr", tmp_path / "calm" / "run.zarr")


def test_prompts_seeds_and_conditions_are_appended(pipe, tmp_path):
    run(tmp_path)
    before = xr.open_datatree(tmp_path / "run.zarr", engine="zarr").load()
    more = {
        "prompts": ["a dog", *PROMPTS[:3]], "seeds": [0, 1, 5],
        "conditions": {"late": [{"name": "remove_text", "start": 0.5}], "baseline": []},
    }  # fmt: skip
    report = run(tmp_path, **more)
    assert (report.samples, report.done, report.made) == (24, 24, 18)
    found = open_run(tmp_path / "run.zarr")
    assert verify(found) == []
    table = found.samples
    assert table["prompt"].tolist()[:6] == [p for p in PROMPTS[:3] for _ in range(2)]
    assert not table.duplicated(["condition", "prompt", "seed"]).any()
    assert table.groupby("batch")["condition"].nunique().max() == 1
    assert table.groupby("batch").size().max() == 4
    assert set(found.attrs["conditions"]) == {"baseline", "late"}
    assert table.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"].to_dict() == {
        0: PROMPTS[0], 1: PROMPTS[1], 2: PROMPTS[2], 3: "a dog",
    }  # fmt: skip
    after = xr.open_datatree(tmp_path / "run.zarr", engine="zarr").isel(sample=slice(0, 6)).load()
    for name in ("trajectory/latents", "images/image", "trajectory/noise_pred"):
        assert before[name].values.tobytes() == after[name].values.tobytes()
    late = found.condition("late")
    assert set(late.nfe.sel(branch="cond").values) == {1}
    one = interp.trace(pipe, "a dog", seeds=5, steps=2, progress=False)
    same = found.sel(condition="baseline", prompt="a dog", seed=5)
    np.testing.assert_allclose(same.latents.values, one.latents.values, atol=1e-3)
    assert run(tmp_path, **more).made == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 3}, "steps 2 there, 3 asked"),
        ({"prompts": PROMPTS[1:3]}, "the job lacks the run's prompt 'a red circle'"),
        ({"seeds": [1, 2]}, "the job lacks a sample of the run: condition 'baseline', seed 0"),
        ({"conditions": {"x": []}}, "the condition 'baseline' there, not in the job"),
        ({"conditions": {"baseline": [{"name": "remove_text"}]}}, "the condition 'baseline' is [] there"),
        ({"capture": {"latents": False}}, "(capture.latents true there, false asked)"),
        (
            {"negative_prompt": "blurred"},
            "of the prompt 'a red circle' the negative_prompt is '' there, 'blurred' in the job",
        ),
        ({"prompts": [{"prompt": p, "target": "x"} for p in PROMPTS[:3]]}, "differ in the column 'target'"),
        (
            {"prompts": [*PROMPTS[:3], "two small stripes, two small stripes"]},
            "token columns, but the run has 18",
        ),
        ({"scheduler": "EulerDiscreteScheduler"}, "scheduler.class DDIMScheduler there, EulerDiscreteScheduler asked"),
        ({"prompts": [*PROMPTS[:3], {"prompt": "x"}]}, "prompts"),
    ],
)
def test_any_other_change_is_refused_and_nothing_is_touched(pipe, tmp_path, made, change, says):
    import shutil

    shutil.copytree(made, tmp_path / "run.zarr")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for attempt in (run, planned):
        with pytest.raises(ValueError) as caught:
            attempt(tmp_path, **change)
        assert says in str(caught.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.fixture(scope="module")
def made(memory_untold, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_tracing, "load", lambda model, **_: tiny("sd1"))
        run(folder)
    return folder / "run.zarr"


def failing(monkeypatch, *bad, error=None):
    """Let every batch in which a sample of `bad` is computed fail."""
    real = job_tracing.run_batch

    def fails(pipe, plan, writer, batch, *rest):
        if {*batch} & {*bad}:
            raise error or ValueError("no such picture")
        real(pipe, plan, writer, batch, *rest)

    monkeypatch.setattr(job_tracing, "run_batch", fails)
    return lambda: monkeypatch.setattr(job_tracing, "run_batch", real)


def test_a_failing_sample_is_recorded_and_the_others_keep_their_bits(pipe, tmp_path, made, monkeypatch):
    mend = failing(monkeypatch, 1)
    report = run(tmp_path)
    assert (report.done, report.failed, report.code) == (5, 1, 1)
    found = open_run(tmp_path / "run.zarr")
    assert found.samples.loc[1, "error"] == "ValueError: no such picture"
    assert verify(found) == []
    calm = open_run(made)
    for i in (0, 2, 3, 4, 5):
        for name in ("trajectory/latents", "trajectory/noise_pred", "images/image"):
            mine, theirs = (r.tree[name].isel(sample=i).values for r in (found, calm))
            assert mine.tobytes() == theirs.tobytes(), f"{name} of sample {i}"
    mend()
    assert run(tmp_path).failed == 1  # not tried again by itself
    assert run(tmp_path, retry_failed=True).code == 0
    equal(tmp_path / "run.zarr", made)


def test_memory_that_runs_out_halves_the_batch(pipe, tmp_path, made, monkeypatch, capfd):
    real, sizes = job_tracing.run_batch, []

    def small(pipe, plan, writer, batch, *rest):
        sizes.append(len(batch))
        if len(batch) > 2:
            writer.begin(batch[0])  # some of it was written when it happened
            raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")
        real(pipe, plan, writer, batch, *rest)

    monkeypatch.setattr(job_tracing, "run_batch", small)
    report = run_job(job(tmp_path), progress=True)
    assert report.code == 0
    assert sizes == [4, 2, 2, 2]  # once was enough to learn it
    found = open_run(tmp_path / "run.zarr")
    assert found.samples["error"].tolist() == ["ran 2 at a time instead of 4: memory ran out"] * 4 + [""] * 2
    assert "may differ in rounding" in capfd.readouterr().err
    calm = open_run(made)
    np.testing.assert_allclose(found.latents.values, calm.latents.values, atol=1e-3)


def test_memory_that_never_suffices_is_a_failure(pipe, tmp_path, monkeypatch):
    failing(monkeypatch, *range(6), error=MemoryError("no"))
    report = run(tmp_path)
    assert report.failed == 6
    assert "one sample at a time" in open_run(tmp_path / "run.zarr").samples.loc[0, "error"]


# The file and the command


def write(folder, **changes):
    values = {**BASE, "store": "run.zarr", **changes}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not ...}, sort_keys=False))
    return path


def test_the_command_runs_resumes_and_reports(pipe, tmp_path, monkeypatch):
    (tmp_path / "p.csv").write_text("prompt,target\na cat,a dog\na dog,a cat\n")
    path = write(tmp_path, prompts="p.csv", seeds="0-1", conditions={"baseline": [], "swap": [
        {"name": "replace_eos", "prompt": "{target}"}]})  # fmt: skip
    dry = command("run", str(path), "--dry-run")
    assert dry.returncode == 0 and "8 samples = 2 conditions × 2 prompts × 2 seeds" in dry.stdout
    assert "free there" in dry.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"p.csv", "job.yaml"}
    mend = failing(monkeypatch, 3)
    done = command("run", str(path))
    assert done.returncode == 1, done.stderr
    assert "sample 3 failed: ValueError: no such picture" in done.stderr
    assert command("info", str(tmp_path / "run.zarr")).returncode == 1
    mend()
    again = command("run", str(path), "--retry-failed")
    assert again.returncode == 0 and "8 of 8 samples done, 1 by this call" in again.stdout
    assert command("verify", str(tmp_path / "run.zarr")).returncode == 0
    assert "8 samples done, 0 failed, 0 to do" in command("run", str(path), "--dry-run").stdout


def test_scores_and_probes_follow(pipe, tmp_path):
    def run_with(low):
        path = write(tmp_path, probes=["frequency_energy", {"name": "frequency_energy", "low_fraction": low}])
        done = command("run", str(path))
        assert done.returncode == 0, done.stderr
        return done.stderr

    def answer(name):
        return xr.open_zarr(tmp_path / "run.zarr.probes" / f"{name}.zarr", consolidated=False)

    run_with(0.4)
    found = [
        json.loads(answer(n).attrs["parameters"])["low_fraction"] for n in ("frequency_energy", "frequency_energy-2")
    ]
    assert found == [0.2, 0.4]
    assert answer("frequency_energy").sizes["sample"] == 6
    assert "probe frequency_energy" not in run_with(0.4)  # nothing is new
    assert run_with(0.3).count("probe frequency_energy:") == 1
    assert json.loads(answer("frequency_energy-2").attrs["parameters"])["low_fraction"] == 0.3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("modl: scenes", "no key 'modl'; did you mean 'model'?"),
        ("model: scenes\nbacth_size: 3", "no key 'bacth_size'; did you mean 'batch_size'?"),
        ("model: scenes", "a job needs 'prompts', 'store'"),
        ("model: scenes\nprompts: [a]\nstore: x\nsteps: many", "steps: give a whole number, but it is \"many\""),
        ("model: scenes\nprompts: [a]\nstore: x\nsteps: 0", "steps: give at least 1, but it is 0"),
        ("model: scenes\nprompts: [a]\nstore: x\nsteps: 2\nsteps: 3", "line 5: the key 'steps' stands there twice"),
        ("model: scenes\nprompts: [a]\nstore: x\nseeds: 0..3", "cannot read the seeds '0..3'"),
        ("model: scenes\nprompts: [a]\nstore: x\nbatch_size: 0", "at least 1"),
        ("model: scenes\nprompts: [a]\nstore: x\nseeds: 1.5", "seeds: 1.5 will not do; wanted: a number, a list, or"),
        ("model: scenes\nprompts: [a]\nstore: x\nconditions: {late: [remove_text]}", "conditions.late[0]: give keys"),
        ("model: scenes\nprompts: [a]\nstore: x\ndtype: fp16", "dtype: give 'float16', 'bfloat16' or 'float32'"),
        ("model: scenes\nprompts: [a]\nstore: ../x", "must be a path below the job file's folder"),
        ("model: scenes\nprompts: [a]\nstore: /tmp/x", "give --store on the command line"),
        ("model: scenes\nprompts: [a]\nstore: s3://bucket/x", "a run is written to a folder only"),
        ("model: scenes\nprompts: [a]\nstore: link/x", "leads out of the job file's folder, by a link"),
        ("model: scenes\nprompts: ../p.csv\nstore: x", "give --prompts on the command line"),
        ("model: scenes\nprompts: p.py\nstore: x", "is no table"),
        ("model: scenes\nprompts: [a]\nstore: x\nconditions: {a: [{name: 'evil.py:X'}]}", "not the name of an installed"),
        ("model: scenes\nprompts: [a]\nstore: x\nconditions: {a: [{start: 1}]}", "has no 'name'"),
        ("model: scenes\nprompts: [a]\nstore: x\nprobes: ['evil.py:p']",
         "job.yaml: probes: 'evil.py:p' is not the name of an installed plugin; files cannot be named in a job\n"),
        ("model: !!python/object/apply:os.system [touch hacked]", "line 1: could not determine a constructor"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n"
         "g: [*f,*f,*f,*f,*f,*f,*f,*f,*f]", "unfolds into more than"),
        ("a: &a [*a]", "nested too deeply"),
        ("- model", "it holds a list instead of keys and values"),
        ("", "it holds nothing"),
        ("a: [", "line 1: "),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_sentence(tmp_path, text, says):
    folder = tmp_path / "job"
    folder.mkdir()
    (tmp_path / "p.csv").write_text("prompt\nx\n")
    (folder / "link").symlink_to(tmp_path)
    (folder / "job.yaml").write_text(text)
    done = command("run", str(folder / "job.yaml"), cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert {p.name for p in tmp_path.rglob("*")} == {"p.csv", "job", "link", "job.yaml"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"capture": {"head": "all"}}, "no field 'head'; did you mean 'heads'?"),
        ({"conditions": {"a": [{"name": "remove_txt"}]}}, "did you mean 'remove_text'?"),
        ({"conditions": {"a": [{"name": "remove_text", "strt": 1}]}}, "did you mean 'start'?"),
        ({"scheduler": "DDIMSchedular"}, "did you mean 'DDIMScheduler'?"),
        ({"scheduler": "UNet2DConditionModel"}, "no scheduler"),
        ({"scheduler": {"class": "DDIMScheduler", "eta_": 1}}, "has no setting 'eta_'"),
        ({"pipeline": {"guidance_rescal": 1}}, "did you mean 'guidance_rescale'?"),
        ({"probes": ["frequency_enrgy"]}, "did you mean 'frequency_energy'?"),
        ({"probes": [{"name": "frequency_energy", "low": 1}]}, "probe 'frequency_energy' has no parameter 'low'"),
        ({"probes": ["frequency_energy"], "capture": {"latents": False}}, "probe 'frequency_energy' needs 'latents'"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_part_is_named_before_anything_is_made(pipe, tmp_path, change, says):
    done = command("run", str(write(tmp_path, **change)))
    assert done.returncode == 2
    assert says in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"job.yaml"}


def test_another_place_is_the_users_to_choose(pipe, tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "p.txt").write_text("a cat\n")
    path = write(tmp_path / "job", prompts=..., store=..., seeds=0)
    done = command("run", str(path), "--store", str(tmp_path / "there.zarr"), "--prompts", str(tmp_path / "p.txt"))
    assert done.returncode == 0, done.stderr
    assert open_run(tmp_path / "there.zarr").samples["prompt"].tolist() == ["a cat"]


def test_the_schema_knows_what_may_be_said():
    done = command("run", "--schema")
    assert done.returncode == 0
    schema = json.loads(done.stdout)
    assert schema == job_schema()
    assert set(schema["properties"]) == set(Job.model_fields)
    assert schema["additionalProperties"] is False
    assert "heads" in schema["properties"]["capture"]["properties"]
    assert "remove_text" in str(schema["properties"]["conditions"])
    assert "frequency_energy" in str(schema["properties"]["probes"])


def test_a_scheduler_with_settings_is_used(pipe, tmp_path):
    run(tmp_path, scheduler={"class": "DDIMScheduler", "timestep_spacing": "trailing"})
    made_with = open_run(tmp_path / "run.zarr").attrs["scheduler"]
    assert (made_with["class"], made_with["timestep_spacing"]) == ("DDIMScheduler", "trailing")


def test_reading_a_job_needs_no_torch(tmp_path):
    write(tmp_path)
    code = "import sys; from interp.jobs import read_job; read_job(sys.argv[1]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "job.yaml")], cwd=Path(__file__).parents[2])
    assert done.returncode == 0


def test_a_second_job_on_the_same_run_is_refused(pipe, tmp_path):
    from interp.stores.lock import RunLock

    with RunLock(tmp_path / "run.zarr"), pytest.raises(InterpError, match="is being written by process"):
        run(tmp_path)
    run(tmp_path)
    assert read_job(write(tmp_path)).path == tmp_path / "run.zarr"
    with (
        pytest.raises(InterpError, match="is being written by process"),
        create_run(tmp_path / "x.zarr", small_layout()),
    ):
        create_run(tmp_path / "x.zarr", small_layout())


@pytest.mark.slow
def test_two_processes_make_the_bits_of_one(tmp_path):
    values = {"model": "scenes", "prompts": PROMPTS[:2], "seeds": [0, 1], "steps": 1, "size": [32, 32], "batch_size": 2}
    one = run_job(Job(**values, store=str(tmp_path / "one.zarr")), progress=False)
    two = run_job(Job(**values, store=str(tmp_path / "two.zarr")), workers=2, progress=False)
    assert one.done == two.done == 4
    equal(one.path, two.path)

"""`interp.trace` as a whole: order, seeds, tables, conditions, resuming, and memory that does not grow."""

import gc
import json

import numpy as np
import pandas as pd
import pytest
import torch

import interp
from tests.interp.leftovers import untouched
from tests.interp.reference import SCALE, noise, scheduler_of, tiny

A, B, C = "a red circle", "a dog on the blue square background", "the green cat"
BARE = interp.Capture(attention=None, image=False)
SETTINGS = {"steps": 2, "guidance_scale": SCALE, "progress": False}


def arrays(run):
    """Every array of a run by name."""
    return {
        f"{node.path}/{name}": array.values
        for node in run.tree.subtree
        for name, array in node.variables.items()
    }  # fmt: skip


def equal(one, other):
    """Two runs hold the same, array by array."""
    a, b = arrays(one), arrays(other)
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name], b[name]
        assert x.dtype == y.dtype and x.shape == y.shape, name
        assert np.array_equal(x, y, equal_nan=x.dtype.kind == "f"), name
    return True


def test_samples_are_condition_prompt_seed():
    pipe = tiny("sd1")
    conditions = {"baseline": [], "late": [interp.RemoveText(start=0.5)], "other": [interp.ReplacePrompt(C)]}
    with untouched(pipe):
        run = interp.trace(pipe, [A, B], seeds=[7, 3], conditions=conditions, capture=BARE, batch_size=3, **SETTINGS)
    order = [(c, p, s) for c in conditions for p in (A, B) for s in (7, 3)]
    table = run.samples
    assert list(zip(table["condition"], table["prompt"], table["seed"], strict=True)) == order
    assert list(table["prompt_id"]) == [0, 0, 1, 1] * 3
    assert (table["status"] == 1).all() and len(run) == 12
    assert run.conditions == list(conditions)
    # batches of three never mix conditions
    assert list(table["batch"]) == [0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5]
    # each sample starts from its seed's noise, the same in every condition
    want = noise(pipe, [7, 3, 7, 3]).numpy()
    for name in conditions:
        assert np.array_equal(run.condition(name).latents.values[:, 0], want)
    # and each is what it would be alone, up to rounding by another batch size
    for i, (name, prompt, seed) in enumerate(order):
        if i % 5 == 0:
            alone = interp.trace(pipe, prompt, seeds=seed, interventions=conditions[name], capture=BARE, **SETTINGS)
            assert np.allclose(run.final_latents.values[i], alone.final_latents.values[0], atol=1e-3)


def test_the_baseline_is_bit_equal_to_the_pipelines_own_call():
    pipe = tiny("sd1")
    run = interp.trace(pipe, [A, B], seeds=[7, 3], batch_size=2, **SETTINGS)
    for p, prompt in enumerate([A, B]):
        images = pipe(
            [prompt] * 2, num_inference_steps=2, guidance_scale=SCALE, output_type="np",
            generator=[torch.Generator().manual_seed(s) for s in (7, 3)],
        ).images  # fmt: skip
        assert np.array_equal(run.images.values[2 * p : 2 * p + 2], (images * 255).round().astype("uint8"))


def test_tables_of_every_kind(tmp_path):
    pipe = tiny("sd1")
    rows = [{"prompt": A, "target": B, "level": 1}, {"prompt": B, "target": C, "level": 2}]
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "t.txt").write_text(f"{A}\n\n{B}\n")
    tables = [rows, frame, tmp_path / "t.csv", str(tmp_path / "t.csv"), tmp_path / "t.jsonl"]
    plans = [interp.plan(pipe, t, steps=2, capture=BARE) for t in tables]
    for plan in plans:
        samples = plan.layout.samples
        assert (samples["prompt"], samples["target"], samples["level"]) == ([A, B], [B, C], [1, 2])
        assert samples["negative_prompt"] == ["", ""]
    for table in ([A, B], (A, B), tmp_path / "t.txt", pd.DataFrame({"prompt": [A, B]})):
        assert interp.plan(pipe, table, steps=2, capture=BARE).layout.samples["prompt"] == [A, B]
    assert interp.plan(pipe, A, steps=2, capture=BARE).layout.samples["prompt"] == [A]


def test_texts_of_a_csv_are_not_guessed(tmp_path):
    """'NA' and 'null' are words; an empty negative prompt is empty."""
    (tmp_path / "t.csv").write_text("prompt,target,negative_prompt\na cat,NA,\na dog,null,a cat\n")
    samples = interp.plan(tiny("sd1"), tmp_path / "t.csv", steps=1, capture=BARE).layout.samples
    assert samples["target"] == ["NA", "null"] and samples["negative_prompt"] == ["", "a cat"]


def test_an_empty_cell_is_not_the_word_nan():
    """A row without the column an intervention names must not silently be given the prompt 'nan'."""
    table = [{"prompt": A, "target": B}, {"prompt": B}]
    try:
        plan = interp.plan(tiny("sd1"), table, steps=1, capture=BARE, interventions=[interp.ReplacePrompt("{target}")])
    except interp.InterpError as error:
        assert "target" in str(error)
    else:
        assert "nan" not in plan.layout.samples["target"]


class Interrupted(BaseException):
    pass


def interrupted_after(pipe, steps, error=Interrupted):
    """A scheduler that fails at its n-th step, counted over all batches: a crash in the middle of the work."""

    class Failing(type(pipe.scheduler)):
        count = 0

        def step(self, *args, **kwargs):
            Failing.count += 1
            if Failing.count == steps:
                raise error
            return super().step(*args, **kwargs)

    return Failing.from_config(pipe.scheduler.config)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_resuming_gives_the_same_run(tmp_path, error):
    pipe = tiny("sd1")
    arguments = {
        **SETTINGS, "steps": 3, "seeds": [1, 2, 3], "batch_size": 2,
        "conditions": {"baseline": [], "late": [interp.RemoveText(start=0.5)]},
        "capture": interp.Capture(text=True, sites=("unet.mid_block:out",)),
    }  # fmt: skip
    interp.trace(pipe, A, store=tmp_path / "whole.zarr", **arguments)
    failing = interrupted_after(pipe, 5, error)  # in the second batch
    failing.__class__.__name__ = type(pipe.scheduler).__name__  # the plan is the same
    with scheduler_of(pipe, failing), pytest.raises(error):
        interp.trace(pipe, A, store=tmp_path / "broken.zarr", **arguments)
    half = interp.open_run(tmp_path / "broken.zarr")
    assert half.samples["status"].tolist() == [1, 1, 0, 0, 0, 0]
    calls = []
    with untouched(pipe), interp.HookRegistry(pipe) as hooks:
        hooks.on_step(lambda end: calls.append(end.step))
        run = interp.trace(pipe, A, store=tmp_path / "broken.zarr", **arguments)
    assert len(calls) == 9  # three batches of three steps: the first was not run again
    assert equal(run, interp.open_run(tmp_path / "whole.zarr"))
    calls.clear()
    interp.trace(pipe, A, store=tmp_path / "broken.zarr", **arguments)
    assert calls == []


def test_a_batch_done_in_part_is_computed_whole(tmp_path):
    """A sample's rounding depends on its batch: the sample that is missing is computed with its neighbours."""
    from interp.stores import RunWriter

    pipe, arguments = tiny("sd1"), {**SETTINGS, "seeds": [1, 2, 3], "batch_size": 3, "capture": BARE}
    interp.trace(pipe, A, store=tmp_path / "whole.zarr", **arguments)
    own, commits = RunWriter.commit, []

    def commit(self, i):
        commits.append(i)
        if i == 1:
            raise Interrupted
        own(self, i)

    RunWriter.commit = commit
    try:
        with pytest.raises(Interrupted):
            interp.trace(pipe, A, store=tmp_path / "broken.zarr", **arguments)
    finally:
        RunWriter.commit = own
    assert interp.open_run(tmp_path / "broken.zarr").samples["status"].tolist() == [1, 0, 0]
    run = interp.trace(pipe, A, store=tmp_path / "broken.zarr", **arguments)
    assert equal(run, interp.open_run(tmp_path / "whole.zarr"))


def test_another_plan_at_the_same_path_is_refused(tmp_path):
    pipe, path = tiny("sd1"), tmp_path / "run.zarr"
    arguments = {**SETTINGS, "capture": BARE, "store": path}
    before = interp.trace(pipe, A, **arguments)
    kept = arrays(interp.open_run(path))
    for change in (
        {"steps": 3}, {"guidance_scale": 4.0}, {"seeds": [0, 1]}, {"seeds": 5}, {"height": 48}, {"capture": interp.Capture()},
        {"interventions": [interp.RemoveText()]}, {"negative_prompt": B}, {"options": {"guidance_rescale": 0.5}},
    ):  # fmt: skip
        with pytest.raises(interp.InterpError, match="another plan"):
            interp.trace(pipe, A, **{**arguments, **change})
    with pytest.raises(interp.InterpError, match="another plan"):
        interp.trace(pipe, B, **arguments)
    with pytest.raises(interp.InterpError, match="another plan"):
        interp.trace(tiny("sd2"), A, **arguments)
    now = arrays(interp.open_run(path))
    assert all(np.array_equal(kept[n], now[n], equal_nan=kept[n].dtype.kind == "f") for n in kept)
    assert equal(before, interp.open_run(path))
    with pytest.raises(interp.InterpError, match="exists already"), interp.record(pipe, path):
        pass


def test_other_weights_are_another_plan(tmp_path):
    from tests.families.pipelines import sd1

    pipe = sd1()
    interp.trace(pipe, A, capture=BARE, store=tmp_path / "run.zarr", **SETTINGS)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.01)
    with pytest.raises(interp.InterpError, match="another plan"):
        interp.trace(pipe, A, capture=BARE, store=tmp_path / "run.zarr", **SETTINGS)


def test_store_and_memory_hold_the_same(tmp_path):
    pipe = tiny("sd1")
    arguments = {**SETTINGS, "seeds": [0, 1], "capture": interp.Capture(text=True, attention="all", heads="all")}
    on_disk = interp.trace(pipe, [A, B], store=tmp_path / "run.zarr", **arguments)
    in_memory = interp.trace(pipe, [A, B], **arguments)
    assert equal(on_disk, in_memory) and equal(interp.open_run(tmp_path / "run.zarr"), in_memory)


def test_the_plan_tells_what_runs():
    pipe, rows = tiny("sd1"), []
    arguments = {
        "seeds": [0, 1], "steps": 5, "guidance_scale": SCALE, "batch_size": 3,
        "conditions": {"baseline": [], "late": [interp.RemoveText(start=0.6)], "free": [interp.RemoveGuidance()]},
    }  # fmt: skip
    plan = interp.plan(pipe, [A, B], **arguments)
    handle = pipe.unet.conv_in.register_forward_hook(lambda m, a, out: rows.append(out.shape[0]))
    try:
        run = interp.trace(pipe, [A, B], progress=False, **arguments)
    finally:
        handle.remove()
    assert plan.forward_passes == sum(rows) == int(run.nfe.sum()) == 4 * (10 + 8 + 5)
    assert len(plan) == len(run) == 12
    stored = sum(
        v.nbytes for n, v in arrays(run).items() if n.rsplit("/", 1)[0] not in ("", "/") and v.dtype.kind in "fu"
    )
    assert 0.9 < plan.bytes / stored < 1.3


def live_tensors():
    gc.collect()
    return sum(1 for x in gc.get_objects() if isinstance(x, torch.Tensor))


def test_live_tensors_do_not_grow_with_steps(tmp_path):
    """What is held at the end of a step is the same at the third step and at the last."""
    pipe, counts = tiny("sd1"), []
    capture = interp.Capture(heads="all", tokens="all", attention="all", sites=("unet.mid_block:out",))

    def count(pipe, step, timestep, kwargs):
        if step % 2 == 0:
            counts.append(live_tensors())
        return kwargs

    with interp.record(pipe, tmp_path / "run.zarr", capture=capture):
        pipe(A, num_inference_steps=7, guidance_scale=SCALE, output_type="latent", callback_on_step_end=count)
    assert len(counts) == 4 and max(counts[1:]) <= counts[1] + 2


def test_progress_can_be_a_function():
    seen = []
    interp.trace(tiny("sd1"), [A, B, C], capture=BARE, batch_size=2, **{**SETTINGS, "progress": seen.append})
    assert [s.samples for s in seen] == [2, 1] and {s.condition for s in seen} == {"baseline"}
    assert all(s.seconds > 0 for s in seen)


def test_tokens_are_told_apart():
    """Text, role and word of each column; words of several tokens; two prompts of different lengths."""
    run = interp.trace(tiny("sd2"), [A, B], **SETTINGS)
    table = run.tokens(run.grids[0])
    column = lambda name, i: [v.item() if hasattr(v, "item") else v for v in table[f"token_{name}"].values[i]]  # noqa: E731
    assert [t for t in column("text", 0) if t][1:4] == ["a", "red", "circle"]
    assert column("role", 0)[:5] == ["bos", "word", "word", "word", "eos"]
    assert column("word", 1)[:11] == [-1, 0, 1, 2, 3, 4, 5, 6, 6, -1, -1]  # back + ground are one word
    assert column("role", 1)[9] == "eos" and column("count", 1)[-1] == 77 - 10
    ids = tiny("sd2").tokenizer(B, padding="max_length", max_length=77).input_ids
    assert column("id", 1)[:10] == ids[:10]
    assert ids[10] != ids[9]  # SD 2 pads with "!": the first EOS is found by position

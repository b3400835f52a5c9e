"""Module sites that a run keeps, each against a plain torch hook on the same module; and what a region cuts out."""

import numpy as np
import pytest
import torch

import interp
from tests.interp.leftovers import untouched
from tests.interp.reference import SCALE, tiny

A, B = "a red circle", "a dog on the blue square background"
BLOCK = "unet.down_blocks.0.attentions.0"
SELF, CROSS = (f"{BLOCK}.transformer_blocks.0.attn{i}" for i in (1, 2))
SETTINGS = {"steps": 3, "guidance_scale": SCALE, "seeds": [0, 1], "batch_size": 2, "progress": False}
BARE = {"attention": None, "image": False}


class Hooked:
    """Inputs, outputs and query, key, value projections of modules: name → one array a call, all rows."""

    def __init__(self, pipe, paths):
        self.seen, self._undo = {}, []
        for path in paths:
            module = pipe.unet.get_submodule(path.removeprefix("unet").removeprefix("."))
            self._undo.append(module.register_forward_hook(self._keep(path), with_kwargs=True))

    def _keep(self, path):
        def keep(_, args, kwargs, out):
            out = out[0] if isinstance(out, tuple) else out if torch.is_tensor(out) else out.sample
            first = args[0] if args else next(iter(kwargs.values()))
            for name, value in (("in", first), ("out", out)):
                self.seen.setdefault(f"{path}:{name}", []).append(value.detach().float().numpy().copy())

        return keep

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self._undo:
            handle.remove()


def traced(capture, paths):
    pipe = tiny("sd1")
    with Hooked(pipe, paths) as hooked, untouched(pipe):
        hooked.seen.clear()
        run = interp.trace(pipe, A, capture=interp.Capture(**BARE, **capture), **SETTINGS)
    # the reference holds rows [uncond, cond] a call
    return run, {n: np.stack(calls, 1)[2:] for n, calls in hooked.seen.items()}


def test_in_out_and_update():
    paths = [BLOCK, f"{BLOCK}.transformer_blocks.0", "unet.mid_block", "unet"]
    sites = [f"{p}:{q}" for p in paths[:2] for q in ("in", "out", "update")] + ["unet.mid_block:out", "unet:out"]
    run, seen = traced({"sites": sites}, paths)
    for site in sites:
        path, _, quantity = site.rpartition(":")
        want = seen[f"{path}:out"] - seen[f"{path}:in"] if quantity == "update" else seen[site]
        value = run.site(site)
        assert value.dims == (
            "sample",
            "step",
            "branch",
            *(("channel", "y", "x") if want.ndim == 5 else ("position", "feature")),
        )
        np.testing.assert_array_equal(value.sel(branch="cond").values, want)
    assert abs(run.site(f"{BLOCK}:update").values).max() > 0
    positions = run.tree[f"sites/{BLOCK}.transformer_blocks.0:update"]
    assert positions.attrs["grid"] == [8, 8] and positions.attrs["site"] == f"{BLOCK}.transformer_blocks.0:update"
    assert BLOCK in run.tree["sites"].children  # outputs keep the bare name


def test_query_key_and_value():
    """Equal to the outputs of the projections, split into heads; keys of the text are labelled by its tokens."""
    parts = {"q": "to_q", "k": "to_k", "v": "to_v"}
    sites = [f"{path}:{q}" for path in (SELF, CROSS) for q in parts]
    run, seen = traced(
        {"sites": sites, "branches": ("cond", "uncond")}, [f"{p}.{m}" for p in (SELF, CROSS) for m in parts.values()]
    )
    for path in (SELF, CROSS):
        for quantity, module in parts.items():
            want = seen[f"{path}.{module}:out"]
            heads = run.site(f"{path}:{quantity}").sizes["head"]
            want = want.reshape(*want.shape[:3], heads, -1).swapaxes(2, 3)
            value = run.site(f"{path}:{quantity}")
            assert value.dims[3:] == ("head", "token" if path == CROSS and quantity != "q" else "position", "feature")
            np.testing.assert_array_equal(value.sel(branch="cond").values, want)
    keys = run.site(f"{CROSS}:k")
    assert keys.token_text.values[0].tolist()[:4] == ["<|startoftext|>", "a", "red", "circle"]
    assert keys.sizes["token"] == 77


def test_probabilities_follow_from_recorded_q_and_k():
    capture = interp.Capture(
        attention=CROSS, tokens="all", heads="all", dtype="float32", sites=(f"{CROSS}:q", f"{CROSS}:k"), image=False
    )
    run = interp.trace(tiny("sd1"), A, capture=capture, **SETTINGS)
    q, k = (run.site(f"{CROSS}:{n}").values.astype("float64") for n in "qk")
    scores = np.einsum("ntbhpf,ntbhkf->ntbhpk", q, k) / q.shape[-1] ** 0.5
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    stored = run.attention("8x8").isel(layer=0).stack(query=("query_y", "query_x")).transpose(..., "query", "token")
    np.testing.assert_allclose(stored.values, p, atol=1e-5)


def test_patterns():
    pipe = tiny("sd1")
    plan = lambda *sites: [s.site for s in interp.plan(pipe, A, capture=interp.Capture(**BARE, sites=sites)).sites]  # noqa: E731
    assert plan(r"re:unet\.(?:down|up)_blocks\.\d\.attentions\.0:update") == [
        f"unet.{b}.attentions.0:update" for b in ("down_blocks.0", "up_blocks.1")
    ]
    assert plan("*mid_block*attn2:k", "re:.*mid_block.*attn2:k") == [
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2:k"
    ]
    assert plan("unet.mid_block") == ["unet.mid_block:out"]
    chosen = interp.plan(pipe, A, capture=interp.Capture(attention=r"re:.*(up|mid).*attn[2]")).attention
    assert [s.name.split(".")[1] for s in chosen] == ["mid_block", "up_blocks", "up_blocks"]


def test_region():
    """The upper right quarter of maps, queries and features; the same numbers as in the whole. Means are over its queries."""
    sites = (f"{BLOCK}.transformer_blocks.0:out", f"{BLOCK}:update", f"{CROSS}:q", f"{CROSS}:k")
    named = {"mass": "token_mass", "mean": "mean_map", "daam": "daam"}
    reduce = {"peak": lambda p, at: p.amax((1, 2)), **named}
    pipe, common = tiny("sd1"), {"attention": "all", "sites": sites, "reduce": reduce, "image": False, "tokens": "all"}
    whole = interp.trace(pipe, A, capture=interp.Capture(**common, dtype="float32"), **SETTINGS)
    part = interp.trace(
        pipe, A, capture=interp.Capture(**common, dtype="float32", region=(0, 0.5, 0.45, 1)), **SETTINGS
    )
    rows, columns = slice(0, 4), slice(4, 8)  # 0.45 · 8 = 3.6: a cell that is touched is kept
    cut = {"query_y": rows, "query_x": columns}
    np.testing.assert_array_equal(part.attention("8x8").values, whole.attention("8x8").isel(cut).values)
    assert part.attention("8x8").query_x.values.tolist() == list(range(4, 8))
    np.testing.assert_array_equal(
        part.tree["self_attention/8x8/probs"].values, whole.tree["self_attention/8x8/probs"].isel(cut).values
    )
    np.testing.assert_array_equal(
        part.site(f"{BLOCK}:update").values, whole.site(f"{BLOCK}:update").isel(y=rows, x=columns).values
    )
    positions = np.arange(64).reshape(8, 8)[rows, columns].ravel()
    for site in (sites[0], f"{CROSS}:q"):
        assert part.site(site).position.values.tolist() == positions.tolist()
        np.testing.assert_array_equal(part.site(site).values, whole.site(site).isel(position=positions).values)
    np.testing.assert_array_equal(part.site(f"{CROSS}:k").values, whole.site(f"{CROSS}:k").values)
    heads = interp.trace(pipe, A, capture=interp.Capture(tokens="all", heads="all", dtype="float32"), **SETTINGS)
    peaks = heads.attention("8x8").isel(cut).max(["head", "query_y", "query_x"])
    mine = part.tree["sites/peak/value"].sel(layer=peaks.layer)
    np.testing.assert_allclose(mine.values, peaks.values, atol=1e-6)
    means = heads.attention("8x8").isel(cut).mean(["query_y", "query_x"])
    np.testing.assert_allclose(part.site("mass").sel(layer=peaks.layer).values, means.values, atol=1e-6)
    for name in ("mean", "daam"):  # of the largest grid, also where a smaller one's cells are wider than the region
        assert part.site(name).x.values.tolist() == list(range(4, 8))
        np.testing.assert_array_equal(part.site(name).values, whole.site(name).isel(y=rows, x=columns).values)


def test_tokens_by_word_role_and_column():
    pipe = tiny("sd1")
    table = [{"prompt": "a red circle and a red cat", "thing": "circle"}, {"prompt": B, "thing": "Blue Square"}]
    settings = {**SETTINGS, "seeds": 0}
    every = interp.trace(pipe, table, capture=interp.Capture(tokens="all", dtype="float32"), **settings).attention(
        "8x8"
    )
    capture = interp.Capture(tokens=("red", "{thing}", "eos", "pad", 0), dtype="float32")
    run = interp.trace(pipe, table, capture=capture, **settings)
    maps = run.attention("8x8")
    text = [[t for t in row if t] for row in maps.token_text.values.tolist()]
    assert text[0] == ["<|startoftext|>", "red", "circle", "red", "<|endoftext|>", "<|endoftext|>"]
    assert text[1] == ["<|startoftext|>", "blue", "square", "<|endoftext|>", "<|endoftext|>"]
    for i, (positions, eos) in enumerate([([0, 2, 3, 6, 8], 8), ([0, 5, 6, 9], 9)]):
        mine = maps.isel(sample=i)
        np.testing.assert_array_equal(
            mine.isel(token=slice(0, len(positions))).values, every.isel(sample=i, token=positions).values
        )
        assert mine.isel(token=slice(len(positions), -1)).isnull().all()
        pads = every.isel(sample=i, token=slice(eos + 1, None)).sum("token")
        np.testing.assert_allclose(mine.isel(token=-1).values, pads.values, atol=1e-6)
    assert interp.Capture.from_spec(capture.spec()) == capture
    with pytest.raises(interp.InterpError, match="'gren' is in no prompt; did you mean 'green'"):
        interp.plan(pipe, "a green cat", capture=interp.Capture(tokens=["gren"]))
    with pytest.raises(interp.InterpError, match=r"lacks; .*did you mean 'thing'"):
        interp.plan(pipe, table, capture=interp.Capture(tokens=["{thin}"]))


@pytest.mark.parametrize(
    ("capture", "sentence"),
    [
        ({"sites": "unet.conv_in:update"}, "no difference"),
        ({"sites": "*attn2:probs"}, "keep them by Capture"),
        ({"sites": "text_encoder*:out"}, "text='layers'"),
        ({"sites": "re:(unet"}, "no regular expression"),
        ({"region": (0, 0, 2, 1)}, "fractions of the picture"),
        ({"region": 0.5}, "fractions of the picture"),
        (
            {"region": (0, 0, 0.5, 0.5), "sites": "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k:out"},
            "no picture",
        ),
    ],
)
def test_what_cannot_be_kept_is_said(capture, sentence):
    with pytest.raises(interp.InterpError, match=sentence):
        interp.plan(tiny("sd1"), A, capture=interp.Capture(**capture))


def test_old_specs_stay_the_same():
    """Fields that came later are written only where they are used: an older run of the same plan is resumed."""
    assert list(interp.Capture().spec()) == [
        "attention", "heads", "tokens", "branches", "steps", "latents", "noise_pred", "sites", "text", "image", "reduce",
        "dtype",
    ]  # fmt: skip
    assert interp.Capture(region=(0, 0, 1, 0.5)).spec()["region"] == [0, 0, 1, 0.5]


def stored(path, site):
    """Bytes on disk of a site's values."""
    return sum(f.stat().st_size for f in (path / "sites" / site / "value" / "c").rglob("*") if f.is_file())


def test_what_does_not_change_is_stored_once(tmp_path):
    """Keys of the text are equal at all steps, until an intervention changes the text: found, not assumed."""
    pipe, paths = tiny("sd1"), {}
    site, other = f"{CROSS}:k", f"{CROSS}:q"
    window = [interp.ReplacePrompt(B, start=2, stop=4, unit="step")]
    conditions = {"once": [], "windowed": window}
    capture = interp.Capture(**BARE, sites=(site, other))
    settings = {**SETTINGS, "steps": 6, "seeds": 0, "capture": capture}
    for name, changes in conditions.items():
        paths[name] = tmp_path / f"{name}.zarr"
        run = interp.trace(pipe, A, interventions=changes, store=paths[name], **settings)
        kept = interp.trace(pipe, A, interventions=changes, **settings)
        keys = run.site(site).isel(sample=0, branch=0).values
        assert keys.shape[0] == 6
        changed = [not np.array_equal(keys[i], keys[0]) for i in range(6)]
        assert changed == [False, False, *[name == "windowed"] * 2, False, False]
        np.testing.assert_array_equal(kept.site(site).values, run.site(site).values)
        np.testing.assert_array_equal(
            kept.site(site).isel(step=[5, 2], feature=3).values, run.site(site).isel(step=[5, 2], feature=3)
        )
        np.testing.assert_array_equal(kept.site(site)[0, 3:, 0, 1].values, run.site(site)[0, 3:, 0, 1].values)
        one = keys[0].nbytes
        versions = 2 if name == "windowed" else 1
        assert versions * one <= stored(paths[name], site) < versions * one + 1000
        assert run.site(other).nbytes <= stored(paths[name], other)  # queries do change
        assert interp.stores.verify(run) == []

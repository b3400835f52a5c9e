import numpy as np
import pytest
from scipy.stats import entropy as scipy_entropy

from interp.probes.entropy import attention_entropy
from interp.stores import InterpError, synthetic_run
from tests.probes.handmade import attention, make_run

TEXTS = [["<s>", "red", "cat", "</s>"], ["<s>", "cat", "</s>", ""]]
ROLES = [["bos", "word", "word", "eos"], ["bos", "word", "eos", ""]]
WORDS = [[-1, 0, 1, -1], [-1, 0, -1, -1]]


def run_of(*probs, **more):
    nodes = {f"attention/{p.shape[-2]}x{p.shape[-1]}": attention(p, TEXTS, ROLES, WORDS, **more) for p in probs}
    return make_run(nodes, prompt=["red cat", "cat"])


def random_probs(heads, height, width):
    probs = np.random.default_rng(heads).uniform(0.01, 1, (2, 2, 1, 1, heads, 4, height, width)) ** 3
    probs[1, ..., 3, :, :] = np.nan
    return probs / np.nansum(probs, 5, keepdims=True)


def test_both_entropies_equal_scipys():
    fine, coarse = random_probs(2, 4, 6), random_probs(1, 2, 3)
    ds = attention_entropy(run_of(fine, coarse))
    assert ds.entropy.dims == ("sample", "step", "layer", "head") and ds.grid.values.tolist() == ["4x6", "2x3"]
    assert np.isnan(ds.entropy.sel(head="1").isel(layer=1)).all()  # the coarse grid has one head
    for i, used in enumerate((4, 3)):
        for k, probs in enumerate((fine, coarse)):
            p = probs[i, 1, 0, 0, 0, :used]
            assert float(ds.entropy[i, 1, k, 0]) == pytest.approx(scipy_entropy(p, axis=0).mean())
            flat = p.reshape(used, -1)
            spread = scipy_entropy(flat, axis=1) / np.log(flat.shape[1])
            one = ds.spread[i, 1, k, 0]
            assert float(one.sel(role="bos")) == pytest.approx(spread[0])
            assert float(one.sel(role="word")) == pytest.approx(spread[1 : used - 1].mean())
            assert np.isnan(one.sel(role="pad"))


def test_limits():
    even = np.full((2, 1, 1, 1, 1, 4, 2, 2), 0.25)
    ds = attention_entropy(run_of(even))
    assert np.allclose(ds.entropy[0], np.log(4)) and np.allclose(ds.spread[0].sel(role=["bos", "word", "eos"]), 1)
    sharp = np.zeros_like(even)
    sharp[:, :, :, :, :, 0] = 1.0
    sharp[:, :, :, :, :, 1, 0, 0], sharp[:, :, :, :, :, 0, 0, 0] = 1.0, 0.0
    ds = attention_entropy(run_of(sharp))
    assert np.allclose(ds.entropy, 0) and float(ds.spread[1, 0, 0, 0].sel(role="word")) == 0


def test_tokens_that_were_not_captured_are_one_more_column():
    part = np.zeros((2, 1, 1, 1, 1, 4, 2, 2))
    part[..., 1, :, :] = 0.25
    assert np.allclose(attention_entropy(run_of(part)).entropy[0], scipy_entropy([0.25, 0.75]))
    almost = np.full((2, 1, 1, 1, 1, 4, 2, 2), 0.25 * 0.999)  # rounding is not a token
    assert np.allclose(attention_entropy(run_of(almost)).entropy[0], np.log(4), atol=2e-3)


def test_branches_and_mistakes():
    run = synthetic_run(branches=("uncond",))
    assert np.isfinite(attention_entropy(run, branch="uncond").entropy).all()
    with pytest.raises(InterpError, match=r"needs the branch 'cond'.*has uncond"):
        attention_entropy(run)

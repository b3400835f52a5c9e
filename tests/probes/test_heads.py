import numpy as np
import pytest

from interp.probes.heads import head_relevance
from interp.stores import InterpError, synthetic_run
from tests.probes.handmade import attention, make_run

# two prompts: "red tea|pot blue" and "cat red"; concepts colour (red, blue) and thing (teapot, cat)
TEXTS = [["<s>", "red", "tea", "pot", "blue"], ["<s>", "cat", "red", "", ""]]
ROLES = [["bos", "word", "word", "word", "word"], ["bos", "word", "word", "", ""]]
WORDS = [[-1, 0, 1, 1, 2], [-1, 0, 1, -1, -1]]
CONCEPTS = {"colour": ["red", "Blue"], "thing": ["teapot", "cat"]}


def run_of(probs):
    """probs (sample, step, layer, head, token): even over a grid of 2 × 3."""
    full = np.repeat(np.repeat(np.asarray(probs, float)[:, :, None, ..., None, None], 2, -2), 3, -1)
    full[1, ..., 3:, :, :] = np.nan
    return make_run({"attention/2x3": attention(full, TEXTS, ROLES, WORDS)}, prompt=["red teapot blue", "cat red"])


def test_each_step_is_a_vote_for_the_mean_over_the_concepts_tokens():
    colour, thing = [0.2, 0.5, 0.1, 0.1, 0.1], [0.2, 0.1, 0.3, 0.4, 0.0]
    close = [0.3, 0.2, 0.5, 0.0, 0.0]  # thing has more in all, 0.5 over two tokens, colour 0.2 over two
    cat, red = [0.2, 0.7, 0.1, 0, 0], [0.2, 0.1, 0.7, 0, 0]
    probs = np.zeros((2, 2, 1, 2, 5))
    probs[0, :, 0, 0], probs[0, :, 0, 1] = [colour, thing], [thing, close]
    probs[1, :, 0, 0], probs[1, :, 0, 1] = [red, red], [cat, red]
    ds = head_relevance(run_of(probs), concepts=CONCEPTS)
    assert ds.votes.dims == ("sample", "layer", "head", "concept")
    assert ds.votes[0, 0].values.tolist() == [[0.5, 0.5], [0.0, 1.0]]
    assert ds.votes[1, 0].values.tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert ds.relevance[0].values.tolist() == [[0.75, 0.25], [0.25, 0.75]]
    assert np.allclose(ds.vector.sum(["layer", "head"]), 2)
    assert np.allclose(ds.vector.sel(concept="colour")[0], [1.5, 0.5])
    low, high = ds.relevance_interval[0, 0, 0]
    assert (low, high) == (0.5, 1.0)


def test_ties_are_shared_and_what_is_not_named_has_no_vote():
    even = np.full((2, 1, 1, 1, 5), 0.2)
    ds = head_relevance(run_of(even))
    assert ds.concept.values.tolist() == ["red", "teapot", "blue", "cat"]
    assert np.allclose(ds.votes[0, 0, 0], [1 / 3, 1 / 3, 1 / 3, np.nan], equal_nan=True)
    assert np.allclose(ds.votes[1, 0, 0], [0.5, np.nan, np.nan, 0.5], equal_nan=True)


def test_skipped_steps_do_not_vote():
    probs = np.full((2, 2, 1, 1, 5), 0.2)
    probs[0, 0, 0, 0], probs[0, 1] = [0.2, 0.5, 0.1, 0.1, 0.1], np.nan
    assert head_relevance(run_of(probs), concepts=CONCEPTS).votes[0, 0, 0].values.tolist() == [1.0, 0.0]


def test_grids_stand_side_by_side():
    run = synthetic_run(samples=2, steps=3, grids=("8x8", "4x4"), heads=3)
    ds = head_relevance(run)
    assert ds.grid.values.tolist() == ["8x8", "8x8", "4x4", "4x4"]
    apart = [head_relevance(run, layers=f"unet.blocks.{k}*").votes for k in (0, 1)]
    assert np.allclose(ds.votes[:, ::2], apart[0], equal_nan=True) and np.allclose(
        ds.votes[:, 1::2], apart[1], equal_nan=True
    )
    assert np.allclose(ds.votes[0].sum("concept"), 1)


def test_mistakes_are_sentences():
    run = run_of(np.full((2, 1, 1, 1, 5), 0.2))
    with pytest.raises(
        InterpError, match="no prompt of this run has a word of the concept 'shape'; did you mean 'teapot'"
    ):
        head_relevance(run, concepts={"colour": ["red"], "shape": ["tepot"]})
    with pytest.raises(InterpError, match="no prompt of this run names words of two concepts; the concepts are colour"):
        head_relevance(run, concepts={"colour": ["red"]})

"""A small run for tests: its layout, and values of a sample that follow from its number alone."""

from typing import Any

import numpy as np

from interp.stores.groups import attention_group, images_group, trajectory_group
from interp.stores.schema import Layout, TokenTable
from interp.stores.writer import RunWriter


def small_tokens(n: int, width: int = 3) -> TokenTable:
    """Return a token table of `n` samples: bos, words, eos."""
    role = ["bos", *["word"] * (width - 2), "eos"]
    word = [-1, *range(width - 2), -1]
    text = [f"t{k}" for k in range(width)]
    rows = [np.broadcast_to(np.array(r), (n, width)) for r in (text, range(width), role, word, [1] * width)]
    return TokenTable(*rows)


def small_layout(n: int = 3, steps: int = 13, **attrs: object) -> Layout:
    """Return the layout of a run with a trajectory, one attention grid and images."""
    ramp = np.linspace(0.1, 0.9, steps)
    axes: dict[str, Any] = {"timestep": np.arange(steps)[::-1], "sigma": ramp}
    groups = {
        "trajectory": trajectory_group(
            n, **axes, alpha_bar=ramp, data_scale=ramp, noise_scale=1 - ramp, channel=2, y=4, x=4
        ),
        "attention/4x4": attention_group(
            n, kind="cross", grid=(4, 4), layers=["a:probs", "b:probs"], heads=["mean"], branches=["cond"],
            steps=np.arange(steps), tokens=small_tokens(n), **axes,
        ),
        "images": images_group(n, 8, 8),
    }  # fmt: skip
    columns = {
        "prompt": [f"prompt {i}" for i in range(n)],
        "seed": list(range(n)),
        "batch": [i // 2 for i in range(n)],
    }
    return Layout(columns, groups, {"steps": steps} | attrs)


def small_values(layout: Layout, i: int) -> dict[str, np.ndarray]:
    """Return values for sample `i` that depend on nothing else."""
    values = {}
    for name, array in layout.arrays.items():
        draw = np.random.default_rng([i, *name.encode()]).uniform(
            0, 200 if array.dtype[0] in "ui" else 1, array.shape[1:]
        )
        values[name] = draw.astype(array.dtype)
    return values


def write_sample(writer: RunWriter, i: int, *, stepwise: bool = True) -> None:
    """Write and commit sample `i` of a small layout, a step at a time where there are steps."""
    writer.begin(i)
    for name, value in small_values(writer.layout, i).items():
        if name == "images/thumb":
            continue
        if stepwise and writer.layout.arrays[name].steps:
            for block in value:
                writer.append(i, name, block)
        else:
            writer.put(i, name, value)
    writer.commit(i)

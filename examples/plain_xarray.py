"""Load a run in plain xarray: nothing of interp is needed to read what it wrote.

python examples/plain_xarray.py [run.zarr]
"""

import sys

import xarray as xr


def ask(path: str) -> None:
    tree = xr.open_datatree(path, engine="zarr")  # lazy: opens in milliseconds whatever the size
    prompts = tree["prompt"].values
    print(f"{len(prompts)} samples, {tree.attrs['steps']} steps, format {tree.attrs['format']}")

    grid = next(iter(tree["attention"].children))
    p = tree["attention"][grid]["probs"].isel(sample=[0])
    word = str(p.token_text.values[0][2])  # bos, "a", then the first telling word
    looked = p.where(p.token_text == word, drop=True).mean(["step", "layer", "head"]).squeeze()
    y, x = divmod(int(looked.values.argmax()), looked.sizes["query_x"])
    print(f"{word!r} of {prompts[0]!r} looks most at row {y}, column {x} of the {grid} grid")

    z = tree["trajectory"]["latents"]
    baseline = z.isel(sample=(tree["condition"] == "baseline").values)
    print(
        "std of the latents, first and last step:",
        baseline.isel(step=[0, -1]).std(["channel", "y", "x"]).values.round(2),
    )


if __name__ == "__main__":
    if len(sys.argv) < 2:
        import interp

        interp.trace("scenes", ["a large red circle on a gray background"], steps=5, store="plain_xarray.zarr")
    ask(sys.argv[1] if len(sys.argv) > 1 else "plain_xarray.zarr")

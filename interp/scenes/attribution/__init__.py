"""Word maps against true masks, measured: `python -m interp.scenes.attribution --out attribution.md`.

Real renders of one and two objects, from seeds that training never used, enter at several noise levels; one forward pass
with text is recorded at each (`pictures`). The maps of color and shape words, and of spans such as "red circle", made by
many recipes (`recipes`), are scored against the mask of their object, on the latents' grid, where a cell belongs to an object
that covers more than half of it (`scores`). Half of the pictures choose (recipe, layer, weights, threshold), the other half
reports (`tables`).
"""

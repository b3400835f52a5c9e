"""Where things are: every kernel belongs to a site, and rows and columns of a map are those of the picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from interp.catalog import dry_run
from interp.hooks import DenoiserCall, HookRegistry
from interp.testing.case import FamilyCase


class Enough(Exception):  # noqa: N818
    """Ends a call of which only the beginning was wanted."""


def check_sites(case: FamilyCase) -> None:
    """Every attention kernel that the denoiser runs belongs to an attention site, or the family says why not.

    What passes at the kernels is watched from below, with nothing of this package: the innermost module that is running
    then, and those around it.
    """
    family, known = case.family, {s.name for s in case.family.attention_sites()}
    explained = set(family.without_probabilities())
    missing: dict[str, None] = {}
    running: list[str] = []

    def kernel() -> None:
        if running and not {*running} & (known | explained):
            missing[running[-1]] = None

    handles = []
    for root, denoiser in family.denoisers.items():
        for path, module in denoiser.named_modules():
            name = f"{root}.{path}" if path else root
            handles += [
                module.register_forward_pre_hook(lambda *_, name=name: running.append(name)),
                module.register_forward_hook(lambda *_: running.pop() and None, always_call=True),
            ]
    try:
        with _kernels_seen(kernel):
            case.call(num_inference_steps=2)
    finally:
        for handle in handles:
            handle.remove()
    assert not missing, (
        f"attention runs in {', '.join(missing)}, which attention_sites() does not name; nor does without_probabilities() say "
        "why not"
    )


@contextmanager
def _kernels_seen(tell: Any) -> Iterator[None]:
    sdpa, scores = F.scaled_dot_product_attention, Attention.get_attention_scores

    def told(kernel: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tell()
            return kernel(*args, **kwargs)

        return call

    F.scaled_dot_product_attention, Attention.get_attention_scores = told(sdpa), told(scores)
    try:
        yield
    finally:
        F.scaled_dot_product_attention, Attention.get_attention_scores = sdpa, scores


def check_layout(case: FamilyCase) -> None:
    """Rows and columns of a map are those of the latents: what changes above is seen above, what changes left, left."""
    family, arguments = case.family, case.arguments()
    shape = family.latent_shape(arguments)
    whole = torch.randn(2, *shape)
    assert torch.equal(family.unpack(family.pack(whole), arguments), whole), "unpack is not the inverse of pack"
    sites = family.attention_sites()
    if not sites:
        return
    if not case.takes("latents"):
        return
    base, fresh = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(9))
    top, left = base.clone(), base.clone()
    top[:, :, : shape[1] // 2] = fresh[:, :, : shape[1] // 2]
    left[..., : shape[2] // 2] = fresh[..., : shape[2] // 2]
    first = sites[0]
    plain, *others = (_queries(case, first, latents) for latents in (base, top, left))
    height, width = dry_run(family, arguments)[1][first.name]
    for name, other in zip(("top", "left"), others, strict=True):
        change = (other - plain).float().norm(dim=-1).mean((0, 1)).reshape(height, width)
        change = change if name == "top" else change.T
        near, far = change[: len(change) // 2], change[len(change) // 2 :]
        assert near.mean() > 1.5 * far.mean(), f"{first.name}: a change of the {name} half is not seen there"


def _queries(case: FamilyCase, site: Any, latents: torch.Tensor) -> torch.Tensor:
    """The image's queries of the branch with text, (sample, head, query, feature), where a run begins at these latents."""
    found: list[torch.Tensor] = []

    def keep(kernel: Any, call: DenoiserCall) -> None:
        if "cond" in call.branches and kernel.query is not None:
            rows = slice(call.branches.index("cond") * call.samples, None)
            span = hooks.spans(kernel, call).image_queries
            found.append(kernel.query[rows][: call.samples, :, span].detach().clone())
            raise Enough

    with HookRegistry(case.pipe) as hooks:
        hooks.on_attention(site, keep)
        try:
            case.call(latents=case.family.given_latents(latents), num_inference_steps=2)
        except Enough:
            return found[0]
    raise AssertionError(f"{site.name} did not run")

"""Attention of the step that is under way: query and key of each layer, and at the step's end what a run keeps of them."""

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F

from interp.branches import numbers, spread, stack_branches
from interp.capture import OF_IMAGE, AttentionPart
from interp.captured import ReduceCapture, attention_groups, site_node
from interp.errors import InterpError
from interp.families import AttentionSite
from interp.hooks import DenoiserCall, HookRegistry
from interp.kernels import AttentionCall
from interp.named_reductions import Place, Sums
from interp.planning import Plan
from interp.reduction import AttentionReducer, Layer
from interp.regions import Cells
from interp.stores.table import ROLES


class StepAttention:
    """Keep the kernel calls of a step; form probabilities once per group of layers and reduce them on the device."""

    def __init__(self, hooks: HookRegistry, plan: Plan, samples: Sequence[int]) -> None:
        self.hooks, self.plan, self.samples = hooks, plan, list(samples)
        capture = plan.capture
        self._selection = selection = plan.selection.of(self.samples)
        self._groups = attention_groups(plan.attention)
        observed = [*plan.attention, *(s for one in plan.reductions for s in one.layers)]
        self._observed = {one.name: one.site for one in observed}
        self._cells = {n: Cells(s.grid, *capture.chosen_cells(s.grid)) for n, s in self._observed.items()}
        self._reducers = {
            name: AttentionReducer(
                members[0].part,
                members[0].site.grid if members[0].part not in OF_IMAGE else self._cells[members[0].name].size,
                None if capture.heads == "mean" else capture.chosen_heads(members[0].site.heads),
                None if members[0].part == "self" else selection,
                getattr(torch, capture.dtype),
                members[0].site.grid,
            )
            for name, members in self._groups.items()
        }
        # kernel calls of the step, one a site, or one a site and branch if guidance takes a call per branch
        self._calls: dict[str, list[tuple[AttentionCall, DenoiserCall]]] = defaultdict(list)
        self._sums = {one.name: Sums(one.named.mean) for one in plan.reductions if one.named is not None and one.over}

    @property
    def sites(self) -> list[AttentionSite]:
        """What has to be observed."""
        return list(self._observed.values())

    def add(self, kernel: AttentionCall, call: DenoiserCall) -> None:
        """Keep a kernel call until the step ends."""
        self._calls[kernel.site].append((kernel.without_value(), call))  # values are not needed, and large

    def clear(self) -> None:
        """Begin another step."""
        self._calls.clear()

    def reduced(self, last: bool) -> dict[str, torch.Tensor]:
        """Return what the run keeps of the step, by array; with the `last` one what is added up over steps, too."""
        parcel, wanted = {}, self.plan.capture.branches
        for name, members in self._groups.items():
            ran = [i for i, one in enumerate(members) if self._did_run(one.name)]
            layers = [self._layers(members[i]) for i in ran]
            shape = self.plan.layout.arrays[f"{name}/probs"].shape[3:]
            parts = {}
            for b in wanted:
                if layers and all(b in layer for layer in layers):
                    held = layers[0][b][0].members
                    part = spread(self._reducers[name]([layer[b][0] for layer in layers]), held, len(self.samples))
                    parts[b] = part if len(ran) == len(members) else _at_layers(part, ran, len(members))
            whole, dtype = (len(self.samples), *shape), getattr(torch, self.plan.capture.dtype)
            parcel[f"{name}/probs"] = stack_branches(parts, wanted, whole, dtype)
        for one in self.plan.reductions:
            value = self._reduction(one, last)
            if value is not None:
                parcel[f"{site_node(one.name)}/value"] = value
        return parcel

    def _layers(self, one: AttentionPart, whole: bool = False) -> dict[str, tuple[Layer, DenoiserCall]]:
        """One layer's kernel call of each branch that was evaluated in the step, of the region's queries or the `whole`."""
        found, cells = {}, self._cells[one.name]
        for kernel, call in self._calls[one.name]:
            queries, keys = self.hooks.spans(kernel, call).part(one.part)
            if not whole and not cells.all and one.part in OF_IMAGE:  # a region is one of the image's queries
                kernel = cells.crop(kernel, queries.start)
                queries = slice(0, len(cells.positions))
            start = 0
            for branch, members in call.held.items():
                rows = slice(start, start + len(members))
                found[branch] = (Layer(kernel, rows, queries, keys, members), call)
                start = rows.stop
        return found

    def _did_run(self, layer: str) -> bool:
        """Tell whether an attention layer ran in this step; one that did not, though nothing stands in for it, is an error."""
        if layer in self._calls or self.hooks.stood_in(layer):
            return layer in self._calls
        raise InterpError(
            f"{layer!r} did not run in this step, so its attention cannot be recorded; a cache that skips blocks must be "
            "turned off (disable_cache() of the denoiser, DeepCache and the like)"
        )

    def _reduction(self, one: ReduceCapture, last: bool) -> torch.Tensor | None:
        """A reduction of the step's layers, (sample, branch, …); of all steps at the last one, if it is added up over them."""
        wanted, sums = self.plan.capture.branches, self._sums.get(one.name)
        keep_layers, by_layer = "layer" not in one.over, []
        for i, layer in enumerate(one.layers):
            parts = self._reduce_layer(one, layer)
            by_layer.append(parts)
            for branch, value in parts.items():
                if sums is not None:
                    sums.add((branch, i if keep_layers else 0), value)
        if sums is not None and not last:
            return None
        if sums is not None:
            found = sums.result()
            count = len(one.layers) if keep_layers else 1
            by_layer = [{b: found[b, i] for b in wanted if (b, i) in found} for i in range(count)]
        values = [stack_branches(parts, wanted, (len(self.samples), *one.shape)) for parts in by_layer]
        return torch.stack(values, dim=2) if keep_layers else values[0]

    def _reduce_layer(self, one: ReduceCapture, layer: AttentionPart) -> dict[str, torch.Tensor]:
        """Apply a reduction to one layer: branch → (sample, …)."""
        parts, maps = {}, one.named is not None and one.named.maps
        for branch, (kept, call) in (self._layers(layer, whole=maps) if self._did_run(layer.name) else {}).items():
            if branch in self.plan.capture.branches:
                probs = kept.probabilities()
                if one.named is not None:
                    members = list(kept.members)
                    roles = self._roles[branch][members] if one.named.of_text else None
                    place = Place(roles, self._selection.of(members), layer.site.grid, one.largest)
                    value = one.named.fn(probs, place)
                    if maps:
                        value = value[(..., *self.plan.capture.chosen_cells(one.largest))]
                    if one.named.dims[0] == "head":  # other layers may have more
                        more = one.shape[0] - value.shape[1]
                        value = F.pad(value, (*[0] * 2 * (value.ndim - 2), 0, more), value=float("nan"))
                else:
                    assert one.fn is not None
                    value = one.fn(probs, call.at(f"{layer.name}:probs", branch))
                parts[branch] = spread(value.detach().float(), kept.members, len(self.samples))
        return parts

    @cached_property
    def _roles(self) -> dict[str, torch.Tensor]:
        """Branch → (sample, position), the role of each token as a number in `ROLES`, −1 behind the end of the text."""
        found = {}
        for branch, tokens in (("cond", self.plan.tokens), ("uncond", self.plan.negatives)):
            roles = [tokens[i].role for i in self.samples]
            width = max(map(len, roles))
            found[branch] = torch.tensor([[*map(ROLES.index, r), *[-1] * (width - len(r))] for r in roles])
        return found


def _at_layers(part: torch.Tensor, ran: list[int], layers: int) -> torch.Tensor:
    """Return (sample, layer, …) with NaN for the layers that did not run."""
    whole = part.new_full((len(part), layers, *part.shape[2:]), float("nan"))
    return whole.index_copy_(1, numbers(ran, part.device), part)

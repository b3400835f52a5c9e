"""What the denoiser gave in one evaluation, on its way to the pipeline, which combines both branches."""

from collections.abc import Callable

import torch

from interp.branches import Held, numbers, split_held, take_rows
from interp.errors import InterpError

Guide = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


class Evaluation:
    """Rows that were run, and what the pipeline gets in place of those that were not.

    A row that was not run gets the output of its sample's other branch: u + w·(c − u) is then that output exactly. If
    a guidance scale is set, both branches get what it makes of them, X, and u + w·(X − X) is X exactly.

    With a call per branch the other one may run later. Then a call returns a tensor full of NaN that is filled in place
    as soon as all is known, which is before the pipeline combines the two: a pipeline that copied the tensor too early
    shows NaN, never a wrong number.
    """

    def __init__(self) -> None:
        self.scale: float | None = None
        """Guidance scale to combine with; None leaves that to the pipeline."""
        self.dropped = False
        """Some row of this evaluation was not run."""
        self._ran: dict[str, tuple[tuple[int, ...], torch.Tensor]] = {}
        self._called: set[str] = set()
        self._waiting: list[tuple[Held, torch.Tensor]] = []

    def add(self, held: Held, kept: Held, rows: torch.Tensor | None) -> None:
        """Note a call that held some rows, and the output of those that were run."""
        self._called |= set(held)
        self.dropped = self.dropped or dict(kept) != dict(held)
        if rows is not None:
            self._ran |= {b: (kept[b], part) for b, part in split_held(rows, kept).items()}

    def settle(self, guide: Guide) -> None:
        """Fill what earlier calls returned, as far as it is known now.

        Raises:
            InterpError: a call of the other branch gives another shape.
        """
        waiting, self._waiting = self._waiting, []
        for held, tensor in waiting:
            known = self._known(held, guide)
            if known is None:
                self._waiting.append((held, tensor))
                continue
            if tensor.shape != known.shape or tensor.dtype != known.dtype:
                raise InterpError(
                    f"a skipped denoiser call returned {tuple(tensor.shape)} {tensor.dtype}, but the kept branch gives "
                    f"{tuple(known.shape)} {known.dtype}; this pipeline's branches cannot be dropped"
                )
            tensor.copy_(known)

    def give(self, held: Held, guide: Guide, blank: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the rows that a call gives to the pipeline."""
        rows = self._known(held, guide)
        if rows is None:
            rows = blank().fill_(float("nan"))
            self._waiting.append((held, rows))
        return rows

    def first(self) -> torch.Tensor:
        """Return the first branch that was run, for a call that is of no branch and must not bring back a dropped one."""
        return next(iter(self._ran.values()))[1].clone() if self._ran else torch.empty(0)

    def end(self) -> None:
        """End the evaluation.

        Raises:
            InterpError: every call of it was skipped.
        """
        waiting = self._waiting
        self.__init__()  # type: ignore[misc]
        if waiting:
            raise InterpError(
                "every denoiser call of a step was skipped: the branch that was to be kept did not run; is guidance on?"
            )

    def _known(self, held: Held, guide: Guide) -> torch.Tensor | None:
        """Return the final rows of a call, or None while another call has to come first."""
        if self.scale is not None and not {"cond", "uncond"} <= self._called:
            return None
        number: dict[tuple[str, int], int] = {}
        for branch, (members, _) in self._ran.items():
            for sample in members:
                number[branch, sample] = len(number)
        own = [(branch, sample) for branch, members in held.items() for sample in members]
        source = [next((number[b, s] for b in (branch, *self._ran) if (b, s) in number), None) for branch, s in own]
        if None in source:
            return None
        rows = take_rows(torch.cat([part for _, part in self._ran.values()]), [i for i in source if i is not None])
        both = (
            sorted(set.intersection(*(set(members) for members, _ in self._ran.values()))) if len(self._ran) > 1 else []
        )
        if self.scale is None or not both:
            return rows
        parts = {b: take_rows(part, [members.index(s) for s in both]) for b, (members, part) in self._ran.items()}
        guided = guide(parts["uncond"], parts["cond"], self.scale)
        targets = [i for i, (_, sample) in enumerate(own) if sample in both]
        chosen = take_rows(guided, [both.index(own[i][1]) for i in targets]).to(rows)
        return rows.index_copy(0, numbers(targets, rows.device), chosen)

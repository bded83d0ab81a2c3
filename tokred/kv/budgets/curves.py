"""Rows of each head by what their loss costs, from curves that are made once a model and score."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokred.core.learned import Facts
from tokred.kv import statistics
from tokred.kv.parts import Budget, Score, check_amount
from tokred.kv.select import Counts
from tokred.kv.site import CacheSite, Place

KIND = "utility"
COMMAND = "tokred calibrate MODEL TEXT -o FILE -m lukv"
# Points of a curve that is made: each hundredth of the rows between none and all.
POINTS = 99
Points = tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True)
class Curves(Budget):
    """Each head gives up rows by a curve of its own, so that the heads whose rows help least give up most.

    Args:
        amount: a share in (0, 1], tokens, or bytes; the mean over layers and heads.
        curves: the file, see :func:`tokred.calibrate`; or the curves themselves: for shares of the rows that go, spread
            evenly between none and all, for each compressed layer the share that each key/value head gives up.

    Source: Tang et al., LU-KV, ICML 2026 (arXiv 2602.08585), equation 12; curves are straight between points (ours).
    """

    name: ClassVar[str] = "curves"
    headwise: ClassVar[bool] = True
    why_no_limit: ClassVar[str | None] = "layers that keep more than the mean do so while a chunk's rows come in"

    amount: float | int | str = 0.5
    curves: str | Points | None = None

    def __post_init__(self) -> None:
        check_amount(self.amount)
        if self.curves is None or isinstance(self.curves, tuple | list):
            object.__setattr__(self, "curves", None if self.curves is None else _points(self.curves))
        else:
            object.__setattr__(self, "curves", statistics.file_name(self.curves, "curves"))

    def check(self, depth: int) -> None:
        """One row of heads a layer."""
        if self.full:
            return
        found = self.table().shape[1]
        if found != depth:
            raise ValueError(f"curves has {found} layers, but {depth} layers are compressed")

    def fits(self, facts: Callable[[], Facts], score: Score) -> None:
        """Refuse curves of another model, or of another score than the policy's.

        Raises:
            ValueError: naming both.
        """
        if not isinstance(self.curves, str):
            return
        file = self._file(self.curves)
        statistics.check_model(self.curves, file.facts, facts())
        made, own = file.about["score"], score.to_dict()
        if made != own:
            raise ValueError(f"the curves in {self.curves} were made for the score {made}, but this policy's is {own}")

    def table(self) -> Tensor:
        """``[P, L, Hk]`` float64: the share that each head gives up, at ``P`` shares of all rows."""
        if self.curves is None:
            raise ValueError(f"this budget needs curves of the model: make them with {COMMAND}, and give the file")
        if isinstance(self.curves, str):
            return self._file(self.curves).tensors["curves"].double()
        return torch.tensor(self.curves, dtype=torch.float64)

    def share(self, n: int, place: Place | None, layer: int, depth: int) -> int:
        """Rows of a head of the layer on average, rounded up."""
        if self.full or self.curves is None or not n:
            return self.mean(n, place, depth)
        rows = self._layer(n, place, layer, depth)
        return -(-sum(rows) // len(rows))

    def _layer(self, n: int, place: Place | None, layer: int, depth: int) -> list[int]:
        """Rows of each head of a layer."""
        if not n:
            return [0] * self.table().shape[2]
        return whole_rows(given_up(self.table(), 1 - min(self.mean(n, place, depth), n) / n)[layer], n)

    def heads(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: tuple[int, ...]) -> Counts:
        """Rows of each head: their mean is the curves', so that layers share too; at least what is guarded."""
        lengths = self.length(site)
        if self.full:
            return counts
        table = self.table()
        if table.shape[1] != site.depth:
            raise ValueError(f"curves has {table.shape[1]} layers, the policy acts on {site.depth}: leave where= out")
        if table.shape[2] != site.heads:
            raise ValueError(f"curves has {table.shape[2]} heads in a layer, the cache has {site.heads}")
        found = [self._layer(n, site.place, site.layer, site.depth) for n in lengths]
        rows = torch.tensor(found, device=score.device).view(len(found), site.heads)
        if guard is not None:
            sure = guard if site.real is None else guard & site.real
            rows = torch.maximum(rows, sure.sum(-1))
        # Rows that came since the lengths were counted, or a head that has fewer.
        return site.held if bool((rows >= torch.tensor(site.held, device=rows.device)[:, None]).all()) else rows

    def _file(self, path: str) -> statistics.Statistics:
        return statistics.read(path, KIND, COMMAND)


def given_up(table: Tensor, share: float) -> Tensor:
    """``[L, Hk]``: the curves ``[P, L, Hk]`` where ``share`` of all rows go, straight between two points."""
    points = len(table)
    place = min(max(share * (points + 1) - 1, 0.0), points - 1.0)
    low = min(int(place), points - 1)
    high = min(low + 1, points - 1)
    return table[low] + (table[high] - table[low]) * (place - low)


def whole_rows(given: Tensor, n: int) -> list[int]:
    """Rows that heads keep of ``n``, where they give up the shares ``[Hk]``: their sum is that of the shares, rounded.

    What rounding down leaves goes to the largest fractions, of equal ones to the lower head.
    """
    ideal = [(1 - g) * n for g in given.tolist()]
    heads = len(ideal)
    total = min(max(round(sum(ideal)), heads), heads * n)
    rows = [int(x + 1e-9) for x in ideal]
    order = sorted(range(heads), key=lambda h: (rows[h] - ideal[h], h))
    for h in itertools.islice(itertools.cycle(order), max(0, total - sum(rows))):
        rows[h] += 1
    return [min(max(r, 1), n) for r in rows]


def marginals(lost: Tensor) -> Tensor:
    """Slopes of the lower convex hull of what is lost with the first ``d`` rows that go, never falling.

    Args:
        lost: ``[d]`` what each row adds, in the order in which they go.

    Returns:
        ``[d]`` float64, of the same sum.
    """
    runs: list[tuple[float, int]] = []  # sum and count; a run that is lower than the one before joins it
    for value in lost.double().tolist():
        total, count = value, 1
        while runs and runs[-1][0] * count >= total * runs[-1][1]:
            more, other = runs.pop()
            total, count = total + more, count + other
        runs.append((total, count))
    return torch.tensor([total / count for total, count in runs for _ in range(count)], dtype=torch.float64)


def dropped(steps: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Rows that each head gives up, ``[len(counts), heads]`` int64, when so many go in all: the cheapest first.

    Args:
        steps: for each head its :func:`marginals`, as many as rows may go.
        counts: rows that go in all.
    """
    owner = torch.repeat_interleave(torch.arange(len(steps)), torch.tensor([len(s) for s in steps]))
    # Of equal steps those of the lower head, and its own in order.
    order = owner[torch.cat(list(steps)).sort(stable=True).indices]
    return torch.stack([order[:count].bincount(minlength=len(steps)) for count in counts])


def curve(scores: Tensor, utility: Tensor, first: int, newest: int) -> Tensor:
    """``[99, L, Hk]`` float64: the share that each head gives up where each hundredth of all rows goes.

    Args:
        scores: ``[L, Hk, N]`` of the score that will choose the rows.
        utility: ``[L, Hk, N]``, what is lost with each row.
        first, newest: rows that never go.
    """
    layers, heads, n = scores.shape
    least = max(first + newest, round(0.01 * n))
    middle = slice(first, n - newest)
    # Equal scores keep the lower position, so that the higher one goes first.
    order = scores[..., middle].flip(-1).sort(dim=-1, stable=True).indices
    lost = utility[..., middle].flip(-1).gather(-1, order)[..., : max(0, n - least)]
    steps = [marginals(row) for row in lost.reshape(layers * heads, -1)]
    counts = [round(x * layers * heads * n / 100) for x in range(1, POINTS + 1)]
    gone = dropped(steps, counts)
    return gone.view(POINTS, layers, heads).double() / n


def _points(given: Any) -> Points:
    try:
        found = tuple(tuple(tuple(float(h) for h in layer) for layer in point) for point in given)
    except (TypeError, ValueError):
        raise TypeError(f"curves must be a file, or shares by point, layer and head, got {given!r}") from None
    sizes = {(len(point), len(layer)) for point in found for layer in point}
    if len(sizes) != 1 or not all(0 <= h <= 1 for point in found for layer in point for h in layer):
        raise ValueError("curves must hold, for each point and layer, a share in [0, 1] for every head")
    return found

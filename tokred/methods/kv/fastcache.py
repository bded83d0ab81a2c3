"""FastCache: small networks make one row of every few consecutive ones, of images and of text apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokred.core.checks import check_flags, check_share
from tokred.core.learned import Facts
from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.fitting import REFERENCE
from tokred.kv.grouping import Grouped, Groups, Replace, noted, samples
from tokred.kv.parts import Budget, Fate, Score, check_count
from tokred.kv.preset import Preset
from tokred.kv.repeat import Repeats
from tokred.kv.site import CacheSite

PARTS = ("image", "text")
ROWS = ("keys", "values")
_ONE = Groups()


class Compressor(nn.Module):
    """Four networks a layer, of keys and values of both parts, which make one row of ``factor`` rows laid end to end.

    A network is the same for all heads. Its weights are float32 whatever type the model has.

    Args:
        depth: layers.
        width: numbers ``D`` of a key, and of a value.
        factor: rows that become one.
        parts: of :data:`PARTS`, those that there are.
        dropout: share of numbers that are left out inside, in training.
        residual: whether networks add to the mean of the rows, beginning with nought.
    """

    def __init__(
        self, depth: int, width: int, factor: int, parts: tuple[str, ...], dropout: float, residual: bool
    ) -> None:
        super().__init__()
        self.width, self.factor, self.residual = width, factor, residual
        names = [f"{part}_{rows}" for part in parts for rows in ROWS]
        made = [{name: _network(width, factor, dropout, residual) for name in names} for _ in range(depth)]
        self.layers = nn.ModuleList(nn.ModuleDict(one) for one in made)

    def forward(self, layer: int, name: str, x: Tensor) -> Tensor:
        """``[..., c, D]`` of ``x`` ``[..., c * factor, D]``, in its type."""
        rows = x.reshape(*x.shape[:-2], -1, self.factor, self.width).float()
        networks: Any = self.layers[layer]
        found: Tensor = networks[name](rows.flatten(-2))
        return (found + rows.mean(-2) if self.residual else found).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Goes where the model goes, and stays in float32.
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)  # type: ignore[no-untyped-call]


def _network(width: int, factor: int, dropout: float, residual: bool) -> nn.Sequential:
    last = nn.Linear(width, width)
    if residual:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    first, second = nn.Linear(factor * width, width), nn.Linear(width, width)
    return nn.Sequential(first, nn.ReLU(), nn.Dropout(dropout), second, nn.ReLU(), nn.Dropout(dropout), last)


@dataclass(frozen=True)
class Compressed(Score):
    """One for the last token of each group and for tokens that are left over, else nought; makes the groups' rows.

    While its module is in training the prompt is repeated. What the repeating tokens read from the rows that were made
    is compared with what they read from all: the distance is left as a loss.

    Args:
        groups: of the prompt.
        dropout, residual: of the networks, see :class:`Compressor`.
        queries: of each layer that one text is compared by, evenly chosen.
        chunk: tokens that one forward repeats in training.

    Source: FastCache, arXiv 2503.08461; the loss is ours.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"k", "v", "module"})
    why_no_chunks: ClassVar[str | None] = "its groups are those of the whole prompt"

    groups: Groups = _ONE
    dropout: float = 0.4
    residual: bool = False
    queries: int = 512
    chunk: int = 2048

    @property
    def lessons(self) -> Repeats:
        return Repeats(self.chunk, sinks=0, keep=self.queries)

    @property
    def needs(self) -> frozenset[str]:
        """Keys, values and module; and queries, by which it learns."""
        return self.reads | {"q"}

    def module(self, facts: Facts) -> Compressor:
        """New networks, the same for the same sizes.

        Raises:
            ValueError: heads of the model's layers are of different widths.
        """
        if not facts.head_width:
            raise ValueError(f"heads of {facts.model} are not of one width, and the compressor's networks are")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = PARTS if self.groups.image else PARTS[1:]
            return Compressor(facts.depth, facts.head_width, self.groups.factor, parts, self.dropout, self.residual)

    def __call__(self, site: CacheSite) -> Tensor:
        """Which rows stay; in training, also the distance."""
        if site.learned.training and REFERENCE[0] in site.notes:
            site.learned.losses["distance"] = self._distance(site)
        score = torch.zeros(site.extent, device=site.device)
        for some, rows, n in samples(site):
            stays = self.groups.stays(n).to(site.device).float()
            score[some] = stays if rows is None else stays.new_zeros(site.extent[2]).index_copy(0, rows, stays)
        return score

    def refine(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: Any) -> Tensor:
        """Makes the rows that stay, and notes them."""
        keys, values = site.k.clone(), site.v.clone()
        for some, rows, n in samples(site):
            stays = self.groups.stays(n).nonzero().view(-1).to(site.device)
            place = stays if rows is None else rows[stays]
            made = self._made(site, some, rows, n)
            for x, new in zip((keys, values), made, strict=True):
                x[some] = x[some].index_copy(2, place, new)
        noted(site.notes, keys, values, site.weights)
        return score

    def _made(self, site: CacheSite, some: slice, rows: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[b, Hk, m, D]`` of samples that are alike, of which ``m`` rows stay."""
        network, found = self._network(site), []
        for x, what in zip((site.k[some], site.v[some]), ROWS, strict=True):
            x = x if rows is None else x.index_select(2, rows)
            pieces = []
            for part, (start, length) in zip(PARTS[-len(self.groups.parts(n)) :], self.groups.parts(n), strict=True):
                whole = self.groups.whole(length) * self.groups.factor
                own = x[:, :, start : start + length]
                if whole:
                    pieces.append(network(site.layer, f"{part}_{what}", own[:, :, :whole]))
                pieces.append(own[:, :, whole:])
            found.append(torch.cat(pieces, 2))
        return found[0], found[1]

    def _distance(self, site: CacheSite) -> Tensor:
        """How far what the reference queries read is from what they read from all rows, and its mass likewise."""
        queries, meant = (site.notes.pop(name) for name in REFERENCE)
        terms = []
        for some, rows, n in samples(site):
            q = queries[some]
            if rows is not None or not bool(meant[some].all()):
                q = q[:, :, meant[some].all(0)]
            if not q.shape[2] or not n:
                continue
            k, v = (x[some] if rows is None else x[some].index_select(2, rows) for x in (site.k, site.v))
            wanted, mass = read(site, q, k.detach(), v.detach())
            with torch.enable_grad():
                found, own = read(site, q, *self._made(site, some, rows, n))
                apart = (found - wanted).square().mean() / wanted.square().mean().clamp(min=1e-12)
                terms.append(apart + (own - mass).square().mean())
        if not terms:
            return torch.zeros((), device=site.device)
        with torch.enable_grad():
            return torch.stack(terms).mean() / site.depth

    def _network(self, site: CacheSite) -> Compressor:
        """The module.

        Raises:
            ValueError: it is of heads of another width than the layer's.
        """
        found = site.learned.module
        assert isinstance(found, Compressor)  # the host supplies what is read
        if {site.k.shape[-1], site.v.shape[-1]} != {found.width}:
            raise ValueError(
                f"the compressor is of heads of {found.width} numbers, and layer {site.layer} has keys of "
                f"{site.k.shape[-1]} and values of {site.v.shape[-1]}"
            )
        return found


def read(site: CacheSite, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output of queries over rows, float32 ``[b, Hk, G * m, D]``, and the log of their mass ``[b, Hk, G * m]``.

    Args:
        site: says scale and cap of the logits.
        q: ``[b, H, m, D]``, all of which see every row.
        k, v: ``[b, Hk, K, D]``.
    """
    b, heads, _, width = k.shape
    q = q.reshape(b, heads, -1, width).float()
    assert site.scale is not None  # since the site was made
    logits = q @ k.float().mT * site.scale
    if site.softcap:
        logits = torch.tanh(logits / site.softcap) * site.softcap
    return logits.softmax(-1) @ v.float(), logits.logsumexp(-1)


@register("fastcache")
@dataclass(frozen=True)
class FastCache(Preset):
    """Each group of consecutive rows of a prompt becomes one row, which a small network makes of them.

    The networks are trained once a model, and are noise before: train first, or apply what ``tokred.load`` gives.

    Args:
        factor: rows that become one; 1 leaves the cache as it is.
        image: first tokens, up to and including the last one of an image, which have networks of their own and share no
            group with the text behind; 0: all is text.
        least: groups below which a part stays as it is.
        dropout: share of numbers that are left out inside the networks, in training.
        residual: networks add to the mean of their group, beginning with nought (ours).
        queries: of each layer that one text is compared by, in training.

    Source: FastCache, arXiv 2503.08461, its compressor.
    """

    summary: ClassVar[str] = "consecutive rows become one by a small network"
    source: ClassVar[str] = "FastCache, 2025 (arXiv 2503.08461)"
    example: ClassVar[Parameters] = {"factor": 2, "residual": True}
    nothing: ClassVar[Parameters | None] = {"factor": 1}

    factor: int = 5
    image: int = 0
    least: int = 1
    dropout: float = 0.4
    residual: bool = False
    queries: int = 512

    def __post_init__(self) -> None:
        Groups(self.factor, self.image, self.least)
        check_share(self.dropout, "dropout", zero=True)
        check_flags(residual=self.residual)
        check_count(self.queries, "queries", 1)
        super().__post_init__()

    def make_score(self) -> Score:
        return Compressed(Groups(self.factor, self.image, self.least), self.dropout, self.residual, self.queries)

    def make_budget(self) -> Budget:
        return Grouped(self.factor, self.image, self.least)

    def make_fate(self) -> Fate:
        return Replace()

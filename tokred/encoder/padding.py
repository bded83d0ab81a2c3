"""Batches that are padded from the start, for methods that decide on whole samples: each is reduced alone."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.site import Site
from tokred.core.soft import SoftReduction
from tokred.encoder.method import BlockMethod
from tokred.errors import UnsupportedModelError


def reduce_each(method: BlockMethod, site: Site, hidden: Tensor | None = None, *, always: bool = False) -> Reduction:
    """Ask ``method`` about the real tokens of every sample, as if it were alone; padding is dropped.

    Asking which tokens are real waits for the device.

    Args:
        method: of the stage ``block``.
        site: with a mask, whose first ``prefix`` and last ``suffix`` real tokens of every sample are protected.
        hidden: ``(B, N)`` bool, tokens that are not real and stay all the same, behind the others; None: none do.
        always: do not ask whether the method acts at this place: it is the method itself that hands a masked site on.

    Returns:
        One reduction for the batch, whose slots are masked behind shorter samples. It is trivial where nothing goes
        from any sample.

    Raises:
        UnsupportedModelError: the method learns by something that does not come back from single samples.
    """
    assert site.mask is not None  # else there is nothing to tell apart
    if site.shape[0] == 0:
        return Reduction.identity((0,), site.shape[1], site.device)
    rows = [row.nonzero().view(-1) for row in site.mask]
    sites = [site.sample(i, r) for i, r in enumerate(rows)]
    steps = [method.reduce(s) if always else _reduce(method, s) for s in sites]
    # Some methods guess for the batch before they ask about its samples, whose guesses nobody needs then. Steps that
    # learn may carry what no other reduction has, and what is put together below is what these have.
    lost = not site.learned.guesses and any(s.learned.guesses for s in sites)
    if lost or (site.learned.training and not {type(step) for step in steps} <= {Reduction, SoftReduction}):
        raise UnsupportedModelError(
            f"{method.name!r} cannot learn on batches that are padded from the start: give inputs of equal lengths"
        )
    _collect(site, sites, rows)
    n = site.shape[1]
    if all(step.trivial for step in steps):
        return Reduction.identity((len(rows),), n, site.device)
    first = next(step for step in steps if not step.trivial)
    staying = [own[:0] for own in rows] if hidden is None else [row.nonzero().view(-1) for row in hidden]
    slots = max(step.slots + len(more) for step, more in zip(steps, staying, strict=True))
    sources = max(step.source.shape[-1] for step in steps)
    # Where no slot is, padding stands, or where there is none a token that is not protected: tables of positions have
    # no rows for those that are.
    free = min(site.prefix, n - 1)
    padded = site.mask.to(torch.int8).argmin(1, keepdim=True).clamp_min(free)
    representative = torch.where(site.mask.all(1, keepdim=True), free, padded).repeat(1, slots)
    mask = torch.zeros(len(rows), slots, dtype=torch.bool, device=site.device)
    source = torch.zeros(len(rows), sources, dtype=torch.int64, device=site.device)
    target = torch.full_like(source, -1)
    weight: Tensor | None = None
    for i, (step, own, more) in enumerate(zip(steps, rows, staying, strict=True)):
        m, r = step.slots, step.source.shape[-1]
        representative[i, : m + len(more)] = torch.cat([own[step.representative[0]], more])
        mask[i, : m + len(more)] = True
        if step.mask is not None:
            mask[i, :m] = step.mask[0]
        source[i, :r], target[i, :r] = own[step.source[0]], step.target[0]
        if step.weight is not None:
            weight = step.weight.new_ones(len(rows), n) if weight is None else weight
            weight[i, own] = step.weight[0]
    if isinstance(first, SoftReduction):
        share = _shares(steps, slots, sources)
        return SoftReduction.make(representative, source, share, n, by_size=first.by_size, mode=first.mode, mask=mask)
    return Reduction(representative, source, target, n, weight, mask, first.mode, first.by_size, inherit=first.inherit)


def _reduce(method: BlockMethod, site: Site) -> Reduction:
    n = site.shape[1]
    if method.acts(n, Place.of(site)):
        return method.reduce(site)
    return Reduction.identity((1,), n, site.device)


def _shares(steps: list[Reduction], slots: int, sources: int) -> Tensor:
    found = [step.share if isinstance(step, SoftReduction) else None for step in steps]
    like = next(share for share in found if share is not None)
    out = like.new_zeros(len(steps), slots, sources)
    for i, share in enumerate(found):
        if share is not None:
            out[i, : share.shape[1], : share.shape[2]] = share[0]
    return out


def _collect(site: Site, sites: list[Site], rows: list[Tensor]) -> None:
    """Gather the state that the method keeps of each sample into the site of the batch."""
    for name, values in sites[0].rows.items():
        out = values.new_zeros(site.shape)
        for i, own in enumerate(rows):
            out[i, own] = sites[i].rows[name][0]
        site.rows[name] = out
    for name in sites[0].notes:
        site.notes[name] = torch.cat([s.notes[name] for s in sites])
    alive = [s.alive for s in sites if s.alive is not None]
    if alive:
        site.alive = torch.cat(alive)

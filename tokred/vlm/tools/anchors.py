"""Distinctive anchors: tokens that speak for many others and that no stronger one already speaks for."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.core.selection import ranked

Pool = Literal["all", "rest"]
Position = Literal["median", "first", "mean", "last"]


def anchor_scores(similar: Tensor, pool: Tensor | None = None) -> Tensor:
    """How well each token speaks for others, less how far a stronger one already does.

    ``R_i (1 - max C_ij)`` over stronger ``j``, of which ``R_j > R_i`` (the lower index where they are alike), ``R`` the
    sum of a token's similarities, its own included; infinite for the strongest.

    Args:
        similar: ``(B, N, N)`` float32 cosines.
        pool: ``(B, N)`` bool, the tokens that are summed over and compared with; None: all.

    Returns:
        ``(B, N)`` float32.
    """
    n = similar.shape[1]
    weight = similar if pool is None else similar * pool.unsqueeze(1)
    strength = weight.sum(-1)
    place = torch.arange(n, device=similar.device)
    mine, other = strength.unsqueeze(2), strength.unsqueeze(1)
    stronger = (other > mine) | ((other == mine) & (place < place.unsqueeze(1)))
    if pool is not None:
        stronger = stronger & pool.unsqueeze(1)
    redundant = similar.masked_fill(~stronger, -torch.inf).amax(-1)
    return torch.where(stronger.any(-1), strength * (1 - redundant), torch.inf)


def merged_into_anchors(
    x: Tensor, kept: Tensor, anchors: int, pool: Pool = "all", position: Position = "median"
) -> Reduction:
    """The reduction that keeps some tokens as they are, and merges all others into some of these others.

    Args:
        x: ``(B, N, C)`` features that are compared.
        kept: ``(B, P)`` int64 tokens that stay alone.
        anchors: how many of the others stand for the rest, 0 to ``N - P``.
        pool: whether anchors are scored among ``"all"`` tokens or among the ``"rest"``.
        position: which member represents a slot, and gives it its position: the ``"median"`` (the lower of two middle
            ones), the ``"first"``, the one nearest to the ``"mean"`` place (the lower of two), or the ``"last"``.

    Returns:
        Slots in the order of their representatives; merging is the plain mean of the members.
    """
    b, n, _ = x.shape
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    similar = unit @ unit.mT
    rest = torch.ones(b, n, dtype=torch.bool, device=x.device).scatter(1, kept, False)
    scores = anchor_scores(similar, rest if pool == "rest" else None)
    first = ranked(scores.masked_fill(~rest, -torch.inf))[:, :anchors]
    stands = torch.zeros_like(rest).scatter(1, first, True)
    # The slot of each token, by its anchor: kept ones are their own.
    towards = similar.masked_fill(~stands.unsqueeze(1), -torch.inf).argmax(-1)
    itself = torch.arange(n, device=x.device).expand(b, -1)
    owner = torch.where(rest & ~stands, towards, itself) if anchors else itself
    member = (owner.unsqueeze(1) == itself.unsqueeze(2)) & (rest & bool(anchors) | ~rest).unsqueeze(1)
    speaker = _speakers(member, position)
    slots = torch.cat([kept, first], 1)
    representative = speaker.gather(1, slots)
    order = representative.argsort(1)
    representative, slots = representative.gather(1, order), slots.gather(1, order)
    slot_of = torch.full((b, n), -1, device=x.device, dtype=torch.long)
    slot_of = slot_of.scatter(1, slots, torch.arange(slots.shape[1], device=x.device).expand(b, -1))
    target = slot_of.gather(1, owner) if anchors else torch.where(rest, -1, slot_of)
    others = torch.ones_like(rest).scatter(1, representative, False)
    source = others.to(torch.uint8).argsort(dim=1, stable=True)[:, slots.shape[1] :]
    return Reduction(
        representative, source, target.gather(1, source), n, mode="mean", by_size=False, complete=anchors > 0
    )


def _speakers(member: Tensor, position: Position) -> Tensor:
    """``(B, N)`` int64: the member of each token's group that represents it; nonsense for what owns no group.

    Args:
        member: ``(B, N, N)`` bool, whether a token (last) belongs to a group (by its owner).
    """
    count = member.sum(-1)
    place = torch.arange(member.shape[-1], device=member.device)
    if position == "mean":
        middle = (member * place).sum(-1).float() / count.clamp_min(1)
        far = (place - middle.unsqueeze(-1)).abs().masked_fill(~member, torch.inf)
        return far.argmin(-1)
    wanted = {"median": (count - 1) // 2, "first": torch.zeros_like(count), "last": count - 1}[position]
    rank = member.long().cumsum(-1) - 1
    return ((rank == wanted.unsqueeze(-1)) & member).to(torch.uint8).argmax(-1)

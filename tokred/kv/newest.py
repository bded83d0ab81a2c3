"""The newest tokens of each sample, wherever padding stands: their queries, and rows in an order that fits them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tokred.kv.site import CacheSite


def queries(site: CacheSite, last: int) -> tuple[Tensor, Tensor | None]:
    """Queries ``[B, H, M, D]`` of the ``last`` tokens of each sample, and ``[B, M]`` bool which mean something.

    Where a sample has fewer, what means nothing stands before them; None: all mean something.
    """
    q, earlier = site.q, site.notes.get("queries")
    m, loose, before = q.shape[2], site.loose, 0
    if earlier is not None and (m < last or loose):
        q, before = torch.cat([earlier, q], 2), earlier.shape[2]
    if site.padding is None:
        return q[:, :, -last:], None
    own = site.padding.mask[:, -m:]
    total = site.padding.mask.sum(1, keepdim=True)
    # Earlier queries have been put in order already.
    known = torch.arange(before, device=own.device) >= before - (total - own.sum(1, keepdim=True))
    real = torch.cat([known, own], 1)
    if loose:
        order = real.byte().sort(dim=-1, stable=True).indices
        q = q.gather(2, order[:, None, :, None].expand_as(q))
        real = real.gather(1, order)
    return q[:, :, -last:], real[:, -last:]


def voters(site: CacheSite, last: int | None) -> tuple[Tensor, Tensor | None]:
    """Queries that vote, those of this forward or of the ``last`` tokens, and one or zero for each; None: all do."""
    if last is not None:
        q, real = queries(site, last)
    else:
        q, real = site.q, None if site.padding is None else site.padding.mask[:, -site.q.shape[2] :]
    return q, None if real is None else real.float()


def row_order(site: CacheSite, q: Tensor, last: int | None) -> Tensor | None:
    """The order in which the newest rows are those of the queries, as causal attention takes them; None: it is so.

    A forward's own rows stand together. Rows of earlier queries may have empty ones behind them, and padding.
    """
    together = last is None or q.shape[2] == 1 or (last <= site.q.shape[2] and not site.loose)
    return None if together else site.order


def with_sink(
    q: Tensor, k: Tensor, sinks: Tensor, scale: float, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Queries, keys, mask and bias with a first key whose logit is the head's sink, whatever the query.

    A dimension more does it: queries have the logit there, and of the keys the first alone a one. In float32, so that
    the logit is what the softmax of the host sees.

    Args:
        q: ``[B, H, M, D]``.
        k: ``[B, Hk, K, D]``.
        sinks: ``[H]``.
        scale: of the logits.
        mask: ``[B, 1 or Hk, K]`` bool, or None.
        bias: ``[B, Hk, K]``, or None.

    Returns:
        ``[B, H, M, D + 1]``, ``[B, Hk, K + 1, D + 1]``, and mask and bias of ``K + 1`` keys.
    """
    b, h, m, _ = q.shape
    logit = (sinks.detach().float() / scale).view(1, h, 1, 1).expand(b, h, m, 1)
    k = F.pad(k.float(), (0, 1, 1, 0))
    k[:, :, 0, -1] = 1
    mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    return torch.cat([q.float(), logit], -1), k, mask, None if bias is None else F.pad(bias, (1, 0))


def ordered(x: Tensor, order: Tensor | None) -> Tensor:
    """``[B, 1 or Hk, K, ...]`` in an order of rows ``[B, 1 or Hk, K]``."""
    if order is None:
        return x
    index = order.expand(-1, max(order.shape[1], x.shape[1]), -1)
    x = x.expand(index.shape[0], index.shape[1], *x.shape[2:])
    return x.gather(2, index.reshape(*index.shape, *[1] * (x.ndim - 3)).expand_as(x))


def as_they_stand(x: Tensor, order: Tensor | None) -> Tensor:
    """``[B, Hk or H, K]`` back from an order of rows."""
    if order is None:
        return x
    index = order if order.shape[1] == 1 else order.repeat_interleave(x.shape[1] // order.shape[1], 1)
    return torch.empty_like(x).scatter_(2, index.expand_as(x), x)

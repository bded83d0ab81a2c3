"""Roll-out: what every original token contributes to the tokens after many layers, weighed by how layers change them.

TokenTM's measure, an explanation of what a model looked at, here as the yardstick of cheap importance scores. With
weights of one it is attention roll-out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from tokred.kernels.dispatch import accumulator_dtype
from tokred.site import Site

# A matrix (B, N, N) or (B, H, N, N), the site of a layer, or a function that makes one of the two when it is needed.
Attention = Tensor | Site | Callable[[], Tensor | Site]
# Lengths below it count as zero.
_SHORT = 1e-12


def tokentm_weights(
    e: Tensor,
    e_tilde: Tensor,
    *,
    length_only: bool = False,
    direction_only: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """How much a layer lengthens each token, times how well it keeps the token's direction against the other tokens.

    ``w = |e_tilde| / |e| * NECC``, where NECC is ``exp(cosine(e_tilde, e))`` divided by its mean over the tokens.

    Args:
        e: ``(B, N, C)`` tokens before a transformation.
        e_tilde: ``(B, N, C)`` the same tokens after it, or ``(B, H, N, C)``, after each head's.
        length_only: ``w`` is the ratio of lengths alone.
        direction_only: ``w`` is NECC alone.
        mask: ``(B, N)`` bool, False on padding, which is left out of the mean; None: all are real.

    Returns:
        ``(B, N)`` or ``(B, H, N)`` float32 (float64 for float64 input). A length below 1e-12 has ratio and cosine 0.

    Raises:
        ValueError: shapes do not fit, or both parts are switched off.

    Source: Wu et al., Token Transformation Matters, CVPR 2024 (arXiv 2403.14552); dividing by the mean is ours.
    """
    if length_only and direction_only:
        raise ValueError("length_only and direction_only exclude each other: nothing would be left of the weight")
    if e_tilde.ndim - e.ndim not in (0, 1) or e.shape[-2:] != e_tilde.shape[-2:]:
        raise ValueError(
            f"e_tilde must be (B, N, C) or (B, H, N, C) for e {tuple(e.shape)}, got {tuple(e_tilde.shape)}"
        )
    dtype = accumulator_dtype(e.dtype)
    before, after = e.to(dtype), e_tilde.to(dtype)
    if after.ndim > before.ndim:
        before, mask = before.unsqueeze(-3), None if mask is None else mask.unsqueeze(-2)
    short, long = before.norm(dim=-1), after.norm(dim=-1)
    known = (short >= _SHORT) & (long >= _SHORT)
    ratio = torch.where(known, long / short.clamp_min(_SHORT), 0)
    if length_only:
        return ratio
    cosine = (before * after).sum(-1) / (short * long).clamp_min(_SHORT * _SHORT)
    kept = torch.where(known, cosine, 0).clamp(-1, 1).exp()
    real = torch.ones_like(kept) if mask is None else mask.to(dtype)
    necc = kept / ((kept * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp_min(1)).clamp_min(_SHORT)
    return necc if direction_only else ratio * necc


def tokentm_rollout(
    attention: Sequence[Attention],
    weight: Sequence[Tensor] | None = None,
    length: Tensor | None = None,
    *,
    mlp: Sequence[Tensor] | None = None,
    normalise: bool | None = None,
) -> Tensor:
    """What every original token contributes to every token after the last layer.

    Starts from ``C = diag(length)``; each layer adds ``mean over heads of A diag(w) C``, and then ``diag(w') C`` of its
    MLP if given. Costs ``N`` cubed a layer; :func:`tokentm_class_row` has one row of it for ``N`` squared.

    Args:
        attention: of each layer, first to last: ``(B, N, N)``, ``(B, H, N, N)``, or its site.
        weight: of each layer, ``(B, N)`` or per head ``(B, H, N)``, see :func:`tokentm_weights`; None: ones.
        length: ``(B, N)`` lengths of the tokens before the first layer; None: ones. With neither this is attention
            roll-out with a residual.
        mlp: ``(B, N)`` weights of each layer's MLP; None: MLPs count as the identity.
        normalise: divide each row by its sum after each layer; None: where there are more than 12 layers.

    Returns:
        ``(B, N, N)`` float32: rows are the current tokens, columns the original ones.

    Raises:
        ValueError: the sequences differ in length, or there is no layer.

    Source: Wu et al., Token Transformation Matters, CVPR 2024 (arXiv 2403.14552).
    """
    weights, mlps, divide = _layers(attention, weight, mlp, normalise)
    first = _start(attention[0], length)
    c = torch.diag_embed(first)
    for layer, w, m in zip(attention, weights, mlps, strict=True):
        c = c + _mixed(layer, w, c)
        if m is not None:
            c = c + m.unsqueeze(-1) * c
        if divide:
            c = c / c.sum(-1, keepdim=True).clamp_min(1e-30)
    return c


def tokentm_class_row(
    attention: Sequence[Attention],
    weight: Sequence[Tensor] | None = None,
    length: Tensor | None = None,
    *,
    row: Tensor | None = None,
    mlp: Sequence[Tensor] | None = None,
    normalise: bool | None = None,
) -> Tensor:
    """The class token's row of :func:`tokentm_rollout`, rolled from the last layer to the first.

    No product of two matrices is formed; where layers are given as sites, no matrix at all.

    Args:
        attention: see :func:`tokentm_rollout`, as all below.
        weight: see there.
        length: see there.
        row: ``(B, N)`` how the last layer's tokens are weighed, for models that pool; None: the first token alone.
        mlp: see there.
        normalise: see there.

    Returns:
        ``(B, N)`` float32, one score per original token.

    Raises:
        ValueError: the sequences differ in length, or there is no layer.
    """
    weights, mlps, divide = _layers(attention, weight, mlp, normalise)
    first = _start(attention[0], length)
    layers = list(zip(attention, weights, mlps, strict=True))
    sums, total = [], first
    for layer, w, m in layers if divide else []:
        total = total + _mixed(layer, w, total.unsqueeze(-1)).squeeze(-1)
        total = total if m is None else total + m * total
        sums.append(total.clamp_min(1e-30))
        total = total / sums[-1]
    if row is None:
        row = torch.zeros_like(first)
        row[:, 0] = 1
    for i in range(len(layers) - 1, -1, -1):
        layer, w, m = layers[i]
        row = row / sums[i] if divide else row
        row = row if m is None else row + row * m
        votes = _votes(layer, row)
        row = row + (votes if w is None else votes * _per_head(w)).mean(1)
    return row * first


def contributions(
    model: nn.Module,
    images: Tensor,
    *,
    form: Literal["joint", "per_head"] = "joint",
    use_mlp: bool = False,
    target: int | Tensor | None = None,
    normalise: bool | None = None,
    length_only: bool = False,
    direction_only: bool = False,
) -> Tensor:
    """What each patch contributes to the class token of the unpatched model, over all of its layers.

    One forward, in evaluation mode, of the model without its patch, which is put back; nothing else of it changes. An
    oracle to measure cheap scores against, not something to prune with. Models that pool their patches are scored by
    the mean of the patches' rows, also where the pooling itself attends.

    Args:
        model: a model that supplies ``attention`` and ``transform`` (timm's with plain blocks), or one that holds one.
        images: ``(B, 3, H, W)``.
        form: one transformation of each token, or one per head.
        use_mlp: let MLPs count as transformations.
        target: class whose logit decides, one for all or ``(B,)``: attention is replaced by the positive part of
            attention times its gradient. Costs a backward pass and one layer's matrices. None: of no class.
        normalise: see :func:`tokentm_rollout`.
        length_only, direction_only: see :func:`tokentm_weights`.

    Returns:
        ``(B, P)`` float32, a score for each patch.

    Raises:
        ValueError: ``form`` is unknown, or ``target`` does not fit what the model returns.
        UnsupportedModelError, MissingInputError: the model cannot be recorded; the message says why.

    Source: Wu et al., Token Transformation Matters, CVPR 2024 (arXiv 2403.14552); details that its summaries leave open
    are ours.
    """
    from tokred.adapters.record import record

    if form not in ("joint", "per_head"):
        raise ValueError(f"form is {form!r}; allowed are 'joint', 'per_head'")
    run = record(model, images, grad=target is not None)
    sites = [block.site for block in run.blocks if block.site is not None]
    attention: list[Attention] = [*sites]
    if target is not None:
        mixed = [block.mixed for block in run.blocks if block.mixed is not None]
        gradients = torch.autograd.grad(_logits(run.output, target).sum(), mixed)
        attention = [partial(_class_specific, a, g) for a, g in zip(sites, gradients, strict=True)]
    weigh = partial(tokentm_weights, length_only=length_only, direction_only=direction_only)
    with torch.no_grad():
        weight = [weigh(*block.transform(per_head=form == "per_head")) for block in run.blocks]
        mlp = [weigh(*block.mlp) for block in run.blocks if block.mlp is not None] if use_mlp else None
        length = run.blocks[0].x.float().norm(dim=-1)
        patches = slice(run.host.prefix, length.shape[1] - run.host.suffix)
        row = torch.zeros_like(length)
        if run.host.pooled or "class_attention" not in run.host.supplies:
            row[:, patches] = 1 / (patches.stop - patches.start)
        else:
            row[:, 0] = 1
        scores = tokentm_class_row(attention, weight, length, row=row, mlp=mlp, normalise=normalise)
        return scores[:, patches]


def _logits(output: object, target: int | Tensor) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise ValueError("target needs a model that returns logits (B, classes)")
    classes = torch.as_tensor(target, device=output.device).expand(output.shape[0])
    return output.gather(1, classes.unsqueeze(1))


def _class_specific(site: Site, gradient: Tensor) -> Tensor:
    """``(B, H, N, N)`` positive part of attention times its gradient, from the gradient of what it made of the values.

    Args:
        site: of the layer.
        gradient: ``(B, H, N, D)``.
    """
    n, heads = site.shape[1], gradient.shape[1]
    a = site.attend(torch.eye(n, device=site.device).expand(site.shape[0], n, n))
    v = site.v if site.v.shape[1] == heads else site.v.repeat_interleave(heads // site.v.shape[1], 1)
    return (gradient.float() @ v.float().mT * a).clamp_min(0)


def _layers(
    attention: Sequence[Attention],
    weight: Sequence[Tensor] | None,
    mlp: Sequence[Tensor] | None,
    normalise: bool | None,
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None], bool]:
    """Weights and MLP weights of each layer, and whether rows are normalised."""
    depth = len(attention)
    if depth == 0:
        raise ValueError("attention holds no layer")
    for name, given in (("weight", weight), ("mlp", mlp)):
        if given is not None and len(given) != depth:
            raise ValueError(f"{name} has {len(given)} layers, attention has {depth}")
    nothing: list[Tensor | None] = [None] * depth
    return weight or nothing, mlp or nothing, depth > 12 if normalise is None else normalise


def _start(layer: Attention, length: Tensor | None) -> Tensor:
    if length is not None:
        return length.float()
    made = layer() if callable(layer) else layer
    if isinstance(made, Site):
        return torch.ones(made.shape, device=made.device)
    return torch.ones(made.shape[0], made.shape[-1], device=made.device)


def _per_head(w: Tensor) -> Tensor:
    return w.float().unsqueeze(1) if w.ndim == 2 else w.float()


def _mixed(layer: Attention, w: Tensor | None, c: Tensor) -> Tensor:
    """``(B, N, E)``: mean over heads of ``A diag(w) c``."""
    values = c.unsqueeze(1) if w is None else _per_head(w).unsqueeze(-1) * c.unsqueeze(1)
    made = layer() if callable(layer) else layer
    if isinstance(made, Site):
        return made.attend(values).mean(1)
    a = made.float()
    return ((a if a.ndim == 4 else a.unsqueeze(1)) @ values).mean(1)


def _votes(layer: Attention, row: Tensor) -> Tensor:
    """``(B, H, N)``: ``row A`` of every head."""
    made = layer() if callable(layer) else layer
    if isinstance(made, Site):
        return made.column_scores(row)
    a = made.float()
    return (row[:, None, None] @ (a if a.ndim == 4 else a.unsqueeze(1))).squeeze(2)

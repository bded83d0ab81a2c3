"""Contributions of a picture's patches to the answer of an encoder, measured on the unpatched model."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from tokred.core.checks import check_choice
from tokred.core.site import Site
from tokred.encoder.importance import Attention, tokentm_class_row, tokentm_weights


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
    """The contribution of each patch to the class token of the unpatched model, over all of its layers.

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
    from tokred.adapters.encoder.unpatched_run import record

    check_choice(form, "form", ("joint", "per_head"))
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
    a = site.attention.attend(torch.eye(n, device=site.device).expand(site.shape[0], n, n))
    v = site.v if site.v.shape[1] == heads else site.v.repeat_interleave(heads // site.v.shape[1], 1)
    return (gradient.float() @ v.float().mT * a).clamp_min(0)

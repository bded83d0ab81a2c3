"""Terms of training losses: the share that stays, and distillation from the dense model."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from tokred.core.checks import check_choice

Over = Literal["image", "batch"]
Kind = Literal["mse", "kl"]


def ratio_loss(decision: Tensor, target: float, *, over: Over = "image", mask: Tensor | None = None) -> Tensor:
    """How far the share of tokens that stay is from ``target``, squared.

    Args:
        decision: ``(B, N)`` in 0..1, of the tokens that may go.
        target: share.
        over: ``"image"``: each image is to keep this share; ``"batch"``: the batch is, images may differ.
        mask: ``(B, N)`` bool, False on padding, which does not count.

    Returns:
        A scalar, float32.

    Raises:
        ValueError: ``over`` is unknown.

    Source: Rao et al., DynamicViT, NeurIPS 2021, equation 9; ``"batch"`` as in its released code.
    """
    check_choice(over, "over", get_args(Over))
    decision = decision.float()
    share = decision.mean(1) if mask is None else (decision * mask).sum(1) / mask.sum(1).clamp_min(1)
    share = share.mean() if over == "batch" else share
    return (share - target).square().mean()


def distill_logits(own: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the student's classes from the teacher's, mean over the batch.

    Args:
        own, teacher: ``(B, K)`` logits; no gradient reaches the teacher's.

    Source: Rao et al., DynamicViT, NeurIPS 2021, equation 8; both sides by log-softmax, as in its released code.
    """
    return F.kl_div(
        own.float().log_softmax(-1), teacher.detach().float().log_softmax(-1), reduction="batchmean", log_target=True
    )


def distill_tokens(own: Tensor, teacher: Tensor, gate: Tensor, *, kind: Kind = "mse") -> Tensor:
    """How far the final tokens that stay are from the teacher's.

    Args:
        own, teacher: ``(B, N, C)`` final tokens; no gradient reaches the teacher's.
        gate: ``(B, N)`` which of them stay, as ``tokred.trace(model).gate`` says after a training forward; set entries
            of protected tokens to 0 to leave them out.
        kind: ``"mse"``: mean of the squared differences; ``"kl"``: divergence of the tokens' softmax over channels.

    Returns:
        A scalar, float32: mean over the tokens that stay, in all images together. The gate gets no gradient from it: a
        token must not go because it is hard to imitate.

    Raises:
        ValueError: shapes do not fit together, or ``kind`` is unknown.

    Source: Rao et al., DynamicViT, NeurIPS 2021, equation 7; ``"mse"`` as in its released code.
    """
    check_choice(kind, "kind", get_args(Kind))
    if own.shape != teacher.shape or own.shape[:2] != gate.shape:
        raise ValueError(
            f"own {tuple(own.shape)} and teacher {tuple(teacher.shape)} must be alike (B, N, C), and gate (B, N), got "
            f"{tuple(gate.shape)}"
        )
    stays = gate.detach().float()
    mine, theirs = own.float(), teacher.detach().float()
    if kind == "mse":
        each = (mine - theirs).square().mean(-1)
    else:
        each = F.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return (each * stays).sum() / stays.sum().clamp_min(1)


def check_classes(labels: Tensor, classes: int, method: str, ignore: int = -100) -> None:
    """Refuse labels of classes that there are not; asking waits for the device.

    Args:
        labels: integers.
        classes: how many there are.
        method: that learns by them, for the error.
        ignore: label of what does not count.

    Raises:
        ValueError: naming the first of them.
    """
    wrong = (labels != ignore) & ((labels < 0) | (labels >= classes))
    if bool(wrong.any()):
        raise ValueError(
            f"targets of {method} must be classes from 0 to {classes - 1}, or {ignore} for what does not count, got "
            f"{int(labels[wrong][0])}"
        )

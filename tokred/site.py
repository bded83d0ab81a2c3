"""``Site``: one place in a host where tokens may be reduced, and what a method can read there.

An adapter fills a site lazily: a value may be a tensor or a function that makes it, called at most once and only if the
method asks. Without any host a site is simply built by hand, which is how methods are tested::

    tokred.ToMe(r=2).reduce(tokred.Site(x=x, k=k, prefix=1))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tokred.errors import MissingInputError
from tokred.kernels.column_scores import column_scores

Stage = Literal["block", "attention", "projector", "layer", "cache"]
Lazy = Tensor | Callable[[], Tensor | None] | None

# What a method may declare in ``reads``; the shapes are those of the properties below.
READS = ("x", "q", "k", "v", "class_attention", "grid", "frames", "text")


class Site:
    """What is known at one place of a host.

    Args:
        x: ``(B, N, C)`` tokens of the residual stream.
        q, k, v: ``(B, H, N, D)`` queries, keys (``(B, Hk, N, D)``) and values of this layer's attention.
        class_attention: ``(B, H, N)`` or ``(B, N)``, the class token's attention after softmax. Made from ``q`` and
            ``k`` (and ``bias``) when it is not given.
        bias: ``(B, N)`` what attention adds to the logits of each key (log of the sizes, padding).
        sizes: ``(B, N)`` float32, how many original tokens each stands for; None: one each.
        mask: ``(B, N)`` bool, False on padding; None: every token is real.
        prefix, suffix: leading and trailing tokens that are never reduced (class, distillation, register, detection).
        grid: ``(Hg, Wg)`` of the original patches, or None.
        frames: frames of a video, or None.
        text: text tokens that guide a reduction, or None.
        layer, depth: which layer this is, of how many.
        step: which call of the same layer this is (denoising step, decoding step).
    """

    def __init__(
        self,
        *,
        x: Lazy = None,
        q: Lazy = None,
        k: Lazy = None,
        v: Lazy = None,
        class_attention: Lazy = None,
        bias: Lazy = None,
        sizes: Tensor | None = None,
        mask: Tensor | None = None,
        prefix: int = 0,
        suffix: int = 0,
        grid: tuple[int, int] | None = None,
        frames: int | None = None,
        text: Lazy = None,
        layer: int = 0,
        depth: int = 1,
        step: int = 0,
    ) -> None:
        self._values: dict[str, Lazy] = {
            "x": x, "q": q, "k": k, "v": v, "class_attention": class_attention, "bias": bias, "text": text,
        }  # fmt: skip
        self.sizes = sizes
        self.mask = mask
        self.prefix = prefix
        self.suffix = suffix
        self.grid = grid
        self.frames = frames
        self.layer = layer
        self.depth = depth
        self.step = step

    def _get(self, name: str) -> Tensor:
        value = self._values[name]
        if callable(value) and not isinstance(value, Tensor):
            value = value()
            self._values[name] = value
        if value is None:
            have = ", ".join(k for k, v in self._values.items() if v is not None) or "nothing"
            raise MissingInputError(f"this site does not supply {name!r}; it supplies {have}")
        return value

    @property
    def x(self) -> Tensor:
        """``(B, N, C)`` tokens."""
        return self._get("x")

    @property
    def q(self) -> Tensor:
        """``(B, H, N, D)`` queries."""
        return self._get("q")

    @property
    def k(self) -> Tensor:
        """``(B, Hk, N, D)`` keys."""
        return self._get("k")

    @property
    def v(self) -> Tensor:
        """``(B, Hk, N, D)`` values."""
        return self._get("v")

    @property
    def text(self) -> Tensor:
        """Text tokens that guide the reduction."""
        return self._get("text")

    @property
    def class_attention(self) -> Tensor:
        """``(B, N)`` float32: the class token's attention to every token, mean over heads.

        Raises:
            MissingInputError: neither it nor queries and keys are at hand.
        """
        if self._values["class_attention"] is not None:
            scores = self._get("class_attention")
        else:
            bias = self._get("bias") if self._values["bias"] is not None else None
            scores = column_scores(self.q[:, :, :1], self.k, bias=bias)
            self._values["class_attention"] = scores
        return scores.float().mean(1) if scores.ndim == 3 else scores.float()

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, N)``, from the first tensor that the site has at hand."""
        for name in ("x", "k", "q", "v"):
            if self._values[name] is not None:
                t = self._get(name)
                return (t.shape[0], t.shape[-2])
        scores = self._get("class_attention")
        return (scores.shape[0], scores.shape[-1])

    @property
    def device(self) -> torch.device:
        """Where the site's tensors live."""
        for name in ("x", "k", "q", "v", "class_attention"):
            if self._values[name] is not None:
                return self._get(name).device
        raise MissingInputError("this site supplies no tensor")

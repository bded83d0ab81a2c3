"""Methods with weights of their own: the facts of the host, the module at a site, weights to load, and layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

# What has to agree for weights to fit another model.
_FINGERPRINT = ("model", "depth", "width")


@dataclass(frozen=True)
class Facts:
    """The model that a method builds its module for.

    Attributes:
        model: class of the part that is patched, with its package, such as
            ``"timm.models.vision_transformer.VisionTransformer"``.
        depth: layers.
        width: channels ``C`` of a token.
        heads: query heads ``H`` of the first layer.
        prefix, suffix: leading and trailing tokens that are never reduced.
        key_heads: key/value heads ``Hk`` of a decoder; 0: as many as query heads.
        head_width: numbers of a key of a decoder; 0: nobody asked, or layers differ.
        pixels: numbers of one patch as sites give it (channels, height and width); 0: the host has no such patches.
    """

    model: str
    depth: int
    width: int
    heads: int
    prefix: int = 0
    suffix: int = 0
    key_heads: int = 0
    head_width: int = 0
    pixels: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; those of key/value heads and of patches only where they were told."""
        told = ("key_heads", "head_width", "pixels")
        return {name: value for name, value in asdict(self).items() if name not in told or value}

    def fits(self, other: Facts) -> bool:
        """True if weights for ``other`` are weights for this: same class, depth and width."""
        return all(getattr(self, name) == getattr(other, name) for name in _FINGERPRINT)

    def __str__(self) -> str:
        return f"{self.model} of {self.depth} layers, {self.width} wide"


class Weights(NamedTuple):
    """Weights that were learned for a method.

    Attributes:
        tensors: ``state_dict`` of its module.
        facts: the model that it was learned on.
    """

    tensors: dict[str, Tensor]
    facts: Facts


@dataclass
class Learned:
    """The module that a site hands to a method with weights, and the losses that it takes from it.

    Attributes:
        module: that the method made for this model. Its ``training`` flag is the model's: soft decisions, or hard ones.
        gate: ``(B, N)`` float32, the product of the soft decisions of the layers before; None: there were none.
        losses: terms that the method adds to the training loss, scalars by name; terms of one name are summed over the
            layers.
        shared: what layers of one forward leave for each other; the same for all of them.
        guesses: what the method says of the targets of the batch, ``(B, ...)`` each; they become terms of the loss,
            by :meth:`tokred.Method.compare`, once the targets are given.
    """

    module: nn.Module | None = None
    gate: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    guesses: list[Tensor] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def training(self) -> bool:
        """True while decisions are soft."""
        return self.module is not None and self.module.training


class InFloat32(nn.Module):
    """Base of modules that go where the model goes, and stay in float32 whatever type it has."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)  # type: ignore[no-untyped-call]


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``(..., K)`` of ``(..., C)``, in the precision of ``x``, whatever that of the weights."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """``(..., C)`` normalised, in the precision of ``x``, whatever that of the weights."""
    return F.layer_norm(x, layer.normalized_shape, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)

"""Jumbo: a plain vision transformer of timm's parts whose class token is several tokens wide, and its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from tokred.core.checks import check_choice, check_count, check_flags, check_ratio

try:
    from timm.layers import DropPath, Mlp, resample_abs_pos_embed
    from timm.models.vision_transformer import Block, VisionTransformer
except ImportError as error:
    raise ImportError("a Jumbo model is made of timm's parts: pip install 'tokred[timm]'") from error

Size = Literal["pico", "nano", "tiny", "small", "base"]


class _Size(NamedTuple):
    width: int
    heads: int
    slices: int


SIZES: dict[str, _Size] = {
    "pico": _Size(96, 3, 6), "nano": _Size(128, 4, 6), "tiny": _Size(192, 3, 6), "small": _Size(384, 6, 6),
    "base": _Size(768, 12, 3),
}  # fmt: skip
# What the authors' files call it -> what it is called here; their other names are timm's. One is of no use.
_NAMES, _UNUSED = {"jumbo_token": "reg_token"}, "cls_token"


class Jumbo(VisionTransformer):  # type: ignore[misc]
    """A vision transformer of timm whose class token is ``slices`` rows wide and has an MLP of its own.

    The rows stand in front, as tokens that no method reduces. In attention they are rows like all others; in place of
    the MLP of the patches they go, as one vector of ``slices * width``, through an MLP that all blocks share. The head
    reads this vector beside the mean of the patches. Methods that rank patches by the class token's attention see the
    mean of its rows.

    Args:
        width: channels of a token.
        heads: of the attention.
        slices: rows of the class token.
        depth: blocks.
        classes: outputs.
        image: pixels each way, or height and width.
        patch: pixels of a patch each way.
        share: one MLP for the class token in all blocks; False: one each (the first version of the paper).
        head: ``"concat"``: reads the class token and the mean of the patches; ``"class"``: the class token alone (the
            first version).
        drop_path: rate of stochastic depth, the same in every block.

    Raises:
        ValueError: a number is out of range.

    Source: Fuller et al., Thicker and Quicker: A Jumbo Token for Fast Plain Vision Transformers, ICLR 2026.
    """

    def __init__(
        self,
        width: int = 96,
        heads: int = 3,
        slices: int = 6,
        depth: int = 12,
        classes: int = 1000,
        image: int | tuple[int, int] = 224,
        patch: int = 16,
        share: bool = True,
        head: Literal["concat", "class"] = "concat",
        drop_path: float = 0.0,
    ) -> None:
        for name, value in (("width", width), ("heads", heads), ("slices", slices), ("depth", depth)):
            check_count(value, name, 1)
        check_count(classes, "classes", 1)
        check_flags(share=share)
        check_choice(head, "head", ("concat", "class"))
        check_ratio(drop_path, "drop_path")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads={heads}, got {width}")
        super().__init__(
            img_size=image, patch_size=patch, num_classes=classes, embed_dim=width, depth=depth, num_heads=heads,
            class_token=False, reg_tokens=slices, no_embed_class=True, global_pool="avg", fc_norm=False,
            norm_layer=nn.LayerNorm, block_fn=partial(JumboBlock, slices),
        )  # fmt: skip
        # Said here alone: to timm's constructor a model without its class token has none to read.
        self.global_pool = "avg" if head == "concat" else "token"
        self.num_features = self.head_hidden_size = (slices + (head == "concat")) * width
        # Read by the host: methods that rank patches by what a class token looks at take the mean of its rows.
        self.class_rows = slices
        wide = slices * width
        self.jumbo_mlp = _mlp(wide) if share else nn.Identity()
        for block in self.blocks:
            block.shares(self.jumbo_mlp if share else None, wide)
            for name in ("drop_path1", "drop_path2", "drop_path3"):
                setattr(block, name, DropPath(drop_path) if drop_path else nn.Identity())
        nn.init.trunc_normal_(self.reg_token, std=0.02)
        self.reset_classifier(classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, which gives every class the same probability; 0: none, and features come out.

        Raises:
            ValueError: ``global_pool`` is another than the model's: what its head reads is not timm's.
        """
        if global_pool not in (None, self.global_pool):
            raise ValueError(f"global_pool must be None: the head of a Jumbo model has its own, got {global_pool!r}")
        self.num_classes = num_classes
        made: nn.Module = nn.Identity()
        if num_classes:
            made = head = nn.Linear(self.num_features, num_classes)
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, -math.log(num_classes))
        self.head = made.to(self.reg_token.device, self.reg_token.dtype)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """``(B, slices * C + C)`` of ``(B, N, C)``: the class token as one vector, and the mean of the patches; with
        the first version's head ``(B, slices * C)``, the class token alone."""
        slices = self.num_prefix_tokens
        first = x[:, :slices].flatten(1)
        return torch.cat([first, x[:, slices:].mean(1)], -1) if self.global_pool == "avg" else first


class JumboBlock(Block):  # type: ignore[misc]
    """A block of timm whose first ``slices`` tokens go through an MLP of their own, as one vector.

    Args:
        slices: rows of the class token.
        options: of timm's block.
    """

    def __init__(self, slices: int, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.slices = slices
        self.norm3 = nn.LayerNorm(slices * dim)

    def shares(self, mlp: nn.Module | None, width: int) -> None:
        """Take the MLP of the class token, of ``width`` channels, that all blocks share; None: make one of its own."""
        if mlp is None:
            self.own = _mlp(width)
        # Named once, in the model, though every block runs it: in a block it would be saved and counted again.
        self.shared = (mlp,)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """``(B, N, C)`` of ``(B, N, C)``; the rest is for timm's attention."""
        x = x + self.drop_path1(self.attn(self.norm1(x), *args, **options))
        first, patches = x[:, : self.slices].flatten(1), x[:, self.slices :]
        (shared,) = self.shared
        first = first + self.drop_path3((self.own if shared is None else shared)(self.norm3(first)))
        patches = patches + self.drop_path2(self.mlp(self.norm2(patches)))
        return torch.cat([first.unflatten(1, (self.slices, -1)), patches], 1)


def _mlp(width: int) -> nn.Module:
    made: nn.Module = Mlp(width, 4 * width)
    for layer in made.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return made


def jumbo(size: Size = "pico", **options: Any) -> Jumbo:
    """A Jumbo model of one of the paper's sizes, with random weights.

    Args:
        size: ``"pico"``, ``"nano"``, ``"tiny"``, ``"small"`` or ``"base"``.
        options: of :class:`Jumbo`, instead of the size's.

    Raises:
        ValueError: there is no such size, or a number is out of range.
    """
    check_choice(size, "size", get_args(Size))
    return Jumbo(**{**SIZES[size]._asdict(), **options})


@torch.no_grad()
def load_jumbo(model: Jumbo, weights: str | Path | Mapping[str, Tensor]) -> Jumbo:
    """Load the authors' weights, or what a Jumbo model's ``state_dict`` gave, into a model of the same size.

    Position embeddings of another grid are resized, if both are squares.

    Args:
        model: its weights are overwritten.
        weights: a file (``.safetensors``, or of ``torch.save``, of which nothing but tensors is read), or the tensors
            by their names.

    Returns:
        The same model.

    Raises:
        ImportError: it is a file of safetensors, which is not installed.
        ValueError: the weights are those of another model; the message names the first that does not fit.
    """
    found = dict(weights) if isinstance(weights, Mapping) else _read(Path(weights))
    found = {_NAMES.get(name, name): t for name, t in found.items() if name != _UNUSED}
    own = model.state_dict()
    places = found.get("pos_embed")
    if places is not None and places.ndim == 3 and places.shape[1] != own["pos_embed"].shape[1]:
        side = math.isqrt(places.shape[1])
        if side * side == places.shape[1]:
            size = list(model.patch_embed.grid_size)
            found["pos_embed"] = resample_abs_pos_embed(places, size, [side, side], num_prefix_tokens=0)
    for name in sorted({*own, *found}):
        here, there = (tuple(some[name].shape) if name in some else None for some in (own, found))
        if here != there:
            raise ValueError(
                f"these are not the weights of this model: {name} must be {here or 'left out'}, got {there or 'none'}"
            )
    model.load_state_dict(found)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError("reading safetensors needs them: pip install safetensors") from error
        tensors: dict[str, Tensor] = load_file(str(path))
        return tensors
    found: Any = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{path} does not hold tensors by their names")
    return dict(found)

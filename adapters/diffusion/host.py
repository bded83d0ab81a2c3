"""The host record of diffusers' denoisers: which sub-layers attend to the tokens of the image."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokred.adapters.diffusion.rotary import EnterPacked
from tokred.adapters.diffusion.session import EnterBlock, EnterDenoiser, LeaveBlock, LeaveDenoiser, Session
from tokred.adapters.diffusion.sublayers import Kind, Spot, check_separate
from tokred.adapters.swap import host_class, swap
from tokred.denoise import AttentionMethod
from tokred.errors import MissingInputError, UnsupportedModelError
from tokred.method import Method

# Class of a denoiser -> name of the sample in its forward.
DENOISERS = {
    "UNet2DModel": "sample",
    "UNet2DConditionModel": "sample",
    "DiTTransformer2DModel": "hidden_states",
    "PixArtTransformer2DModel": "hidden_states",
    "SD3Transformer2DModel": "hidden_states",
    "FluxTransformer2DModel": "hidden_states",
}
# Transformer blocks: their attentions and MLP over the tokens of the image.
BLOCKS: dict[str, tuple[tuple[str, Kind], ...]] = {
    "BasicTransformerBlock": (("attn1", "attention"), ("attn2", "attention"), ("ff", "mlp")),
    "JointTransformerBlock": (("attn", "joint"), ("attn2", "joint"), ("ff", "mlp")),
    "FluxTransformerBlock": (("attn", "joint"), ("ff", "mlp")),
    "FluxSingleTransformerBlock": (("attn", "single"),),
}
# Denoisers whose attention rotates queries and keys by one table, and whose sample is a sequence of 2 x 2 patches.
ROTARY = ("FluxTransformer2DModel",)


@dataclass
class Block:
    """A transformer block, or an attention without one.

    Attributes:
        name: in the denoiser.
        module: the block.
        sublayers: name, module and kind of each.
        alone: the attention has no block around it.
    """

    name: str
    module: nn.Module
    sublayers: list[tuple[str, nn.Module, Kind]]
    alone: bool


@dataclass
class DenoiserHost:
    """A denoiser that can be patched.

    Attributes:
        family: for messages, such as ``"diffusers UNet2DConditionModel"``.
        model: the denoiser.
        parts: its blocks.
        sample: name of the sample in its forward.
        patch_size: rows of the sample that a token stands for at the finest resolution that there is.
        supplies: what sites hand over.
        rotary: its attention rotates queries and keys by one table.
    """

    family: str
    model: nn.Module
    parts: list[Block]
    sample: str
    patch_size: int = 1
    supplies: frozenset[str] = frozenset({"x", "grid"})
    stage: str = "attention"
    note: str = ""
    rotary: bool = False

    @property
    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Name and module of each block."""
        return [(part.name, part.module) for part in self.parts]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.parts)

    @property
    def how(self) -> str:
        """For the table of support."""
        return f"{self.family}, around the sub-layers of {self.depth} blocks"

    def choose(self, windows: str) -> DenoiserHost:
        """Itself.

        Raises:
            ValueError: windows are asked for.
        """
        if windows != "auto":
            raise ValueError(f"windows is {windows!r}, but the attention of {self.family} does not run in windows")
        return self

    def missing(self, method: Method | type[Method]) -> frozenset[str]:
        """What the method reads and this host cannot supply."""
        reads = method.reads if isinstance(method, Method) else method().reads
        return reads - self.supplies

    def check(self, method: Method, expose: str = "auto") -> None:
        """Everything that can be known before the model is touched.

        Raises:
            MissingInputError: the method acts at another stage, or reads what the host cannot supply.
            UnsupportedModelError: an attention cannot be patched, or its keys cannot be reduced alone.
            ValueError: its parameters do not fit the model, or ``expose`` is given.
        """
        if not isinstance(method, AttentionMethod):
            raise MissingInputError(
                f"{method.name!r} acts at stage {method.stage!r}, but {self.family} offers only stage 'attention'"
            )
        if expose != "auto":
            raise ValueError(f"expose is for methods of blocks; a denoiser keeps its tokens, got {expose!r}")
        missing = self.missing(method)
        if missing:
            raise MissingInputError(
                f"{method.name!r} reads {', '.join(sorted(missing))}, which {self.family} does not supply "
                f"(it supplies {', '.join(sorted(self.supplies))})"
            )
        if self.rotary and method.part == "kv":
            raise UnsupportedModelError(
                f"{self.family} rotates queries and keys by one table, so keys and values cannot be reduced alone: "
                "merge tokens instead ('tomesd')"
            )
        for part in self.parts:
            for name, module, kind in part.sublayers:
                if "forward" in module.__dict__:
                    raise UnsupportedModelError(
                        f"the forward of {name} was replaced on the module itself, which would hide a patch: undo that "
                        "first"
                    )
                if method.part == "kv" and kind != "mlp":
                    check_separate(module, name)
        method.check(self.depth)

    def patch(self, method: Method, where: Callable[[str, nn.Module], bool] | None, expose: str) -> None:
        """Hang hooks on the denoiser and its blocks, exchange classes of sub-layers. :meth:`check` has passed."""
        assert isinstance(method, AttentionMethod)
        session = Session(method, self.depth, self.family, self.patch_size)
        names = tuple(inspect.signature(host_class(self.model).forward).parameters)[1:]
        enter = (EnterPacked if self.rotary else EnterDenoiser)(session, names, self.sample)
        self.model.register_forward_pre_hook(enter, with_kwargs=True)
        self.model.register_forward_hook(LeaveDenoiser(session))
        for i, part in enumerate(self.parts):
            if where is not None and not where(part.name, part.module):
                continue
            if not part.alone:
                part.module.register_forward_pre_hook(EnterBlock(session, i), with_kwargs=True)
                part.module.register_forward_hook(LeaveBlock(session, i))
            for name, module, kind in part.sublayers:
                swap(module, "sublayer", Spot(session, i, kind, part.alone, name))
        swap(self.model, "denoiser", session)


def part_of(pipe: Any) -> nn.Module | None:
    """The denoiser of a diffusers pipeline; None for anything else.

    Raises:
        UnsupportedModelError: a pipeline without a denoiser.
    """
    if not any(c.__name__ == "DiffusionPipeline" and c.__module__.startswith("diffusers.") for c in type(pipe).__mro__):
        return None
    for name in ("unet", "transformer"):
        found = getattr(pipe, name, None)
        if isinstance(found, nn.Module):
            return found
    have = ", ".join(pipe.components) or "nothing"
    raise UnsupportedModelError(f"{type(pipe).__name__} has no denoiser (unet or transformer); it has {have}")


def match(model: nn.Module) -> DenoiserHost | None:
    """The host record of a denoiser of diffusers; None when ``model`` is none.

    Raises:
        UnsupportedModelError: it is one, but its attention cannot run on fewer tokens; the message says why.
    """
    cls = host_class(model)
    mine = [c.__name__ for c in cls.__mro__ if c.__module__.startswith("diffusers.")]
    if "ModelMixin" not in mine:
        return None
    known = next((n for n in mine if n in DENOISERS), None)
    if known is None:
        if mine[0] == "Transformer2DModel" or not any(word in mine[0] for word in ("UNet", "Transformer")):
            return None
        raise UnsupportedModelError(
            f"diffusers' {cls.__name__} is not among the denoisers that tokred knows ({', '.join(DENOISERS)})"
        )
    parts = _parts(model)
    if not parts:
        raise UnsupportedModelError(
            f"diffusers' {cls.__name__} has no attention here over the tokens of the image alone, which could run on "
            f"fewer of them (looked for {', '.join(BLOCKS)} and plain self-attention)"
        )
    rotary = known in ROTARY
    patch = 2 if rotary else int(getattr(getattr(model, "config", None), "patch_size", None) or 1)
    return DenoiserHost(f"diffusers {cls.__name__}", model, parts, DENOISERS[known], patch, rotary=rotary)


def _parts(model: nn.Module) -> list[Block]:
    found: list[Block] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        kind = host_class(module).__name__
        if kind in BLOCKS:
            inside.append(name)
            subs = [
                (f"{name}.{sub}", getattr(module, sub), what)
                for sub, what in BLOCKS[kind]
                if isinstance(getattr(module, sub, None), nn.Module)
            ]
            found.append(Block(name, module, subs, False))
        elif kind == "Attention" and _plain(module):
            found.append(Block(name, module, [(name, module, "attention")], True))
    return found


def _plain(module: Any) -> bool:
    """Self-attention over the image alone: nothing of a text is added to its keys."""
    cross = getattr(module, "is_cross_attention", False)
    return not cross and getattr(module, "added_kv_proj_dim", None) is None and not module.only_cross_attention

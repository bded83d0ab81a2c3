"""One forward of a model as it is without any patch, with what its attentions and MLPs read and made of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokred import adapters
from tokred.adapters.contract import members, words
from tokred.adapters.encoder.block import SETTINGS
from tokred.adapters.encoder.host import EncoderHost
from tokred.adapters.linear import value_transform
from tokred.adapters.swap import is_swapped, restore
from tokred.core.site import Site
from tokred.errors import MissingInputError, UnsupportedModelError

_SDPA = F.scaled_dot_product_attention


@dataclass
class BlockRecord:
    """Inputs and outputs of the parts of one block in a forward.

    Attributes:
        attn: the block's attention module.
        x: ``(B, N, C)`` tokens that entered.
        normed: ``(B, N, C)`` the attention's normalised input.
        site: queries, keys and values of the attention.
        mixed: ``(B, H, N, D)`` what the attention made of the values.
        mlp: the MLP's normalised input and its output, ``(B, N, C)`` both.
    """

    attn: Any
    x: Tensor
    normed: Tensor | None = None
    site: Site | None = None
    mixed: Tensor | None = None
    mlp: tuple[Tensor, Tensor] | None = None

    def transform(self, *, per_head: bool = False) -> tuple[Tensor, Tensor]:
        """The attention's normalised input, and its value and output projections of it, together or per head."""
        assert self.normed is not None  # noted in every forward
        assert self.site is not None
        heads = self.site.q.shape[1]
        return self.normed, value_transform(self.attn, self.normed, self.site.v, heads, per_head=per_head)


class Recorded(NamedTuple):
    """A forward.

    Attributes:
        output: what the model returned.
        blocks: a record of each block.
        host: what is known of the model.
    """

    output: Any
    blocks: list[BlockRecord]
    host: EncoderHost


def record(model: nn.Module, images: Tensor, *, grad: bool = False) -> Recorded:
    """Run ``model`` once without its patch, in evaluation mode, and note what every block did.

    The model is left as it was: patched or not, in training or not, without hooks and without gradients.

    Args:
        model: a supported model whose blocks are compositions of ``norm1, attn, norm2, mlp``.
        images: its input.
        grad: keep the graph, so that the output can be differentiated by each block's ``mixed``.

    Raises:
        UnsupportedModelError: no part of the model is of a known family.
        MissingInputError: its blocks do not tell what the attention does to single tokens, or attention's columns do
            not follow from queries and keys.
    """
    host: EncoderHost = adapters.find(model)
    missing = {"attention", "transform"} - host.supplies
    if missing:
        raise MissingInputError(
            f"recording reads {', '.join(sorted(missing))}, which {host.family} does not supply "
            f"(it supplies {', '.join(sorted(host.supplies))})"
        )
    watch = _Watch(host)
    # Weights may be frozen: a graph that begins at the input reaches every block all the same.
    if grad:
        images = images.detach().requires_grad_()
    with _bare(model), watch.hooked(), torch.set_grad_enabled(grad), watch:
        output = model(images)
    if len(watch.records) != host.depth:
        raise UnsupportedModelError(f"{len(watch.records)} blocks ran in one forward of a model of {host.depth}")
    for (name, _), found in zip(host.blocks, watch.records, strict=True):
        if found.site is None:
            raise UnsupportedModelError(
                f"the attention of {name} did not run F.scaled_dot_product_attention, so it could not be recorded"
            )
    return Recorded(output, watch.records, host)


class _Watch(TorchFunctionMode):
    """Fills one record a block, by hooks on its parts and by watching the attention inside."""

    def __init__(self, host: EncoderHost) -> None:
        super().__init__()
        self.host = host
        self.records: list[BlockRecord] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is _SDPA and self.records:
            call = {**dict(zip(words.SDPA, args, strict=False)), **(kwargs or {})}
            last, host = self.records[-1], self.host
            last.site = Site(
                x=last.x,
                q=call["query"].detach(),
                k=call["key"].detach(),
                v=call["value"].detach(),
                scale=call.get(words.SDPA_SCALE),
                prefix=host.prefix,
                suffix=host.suffix,
                class_token=host.class_token,
                layer=len(self.records) - 1,
                depth=host.depth,
            )
            last.mixed = out
        return out

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on the parts of every block."""
        handles: list[Any] = []
        try:
            for _, module in self.host.blocks:
                block: Any = module
                handles += [
                    block.register_forward_pre_hook(self._enter),
                    members.NORM1.need(block).register_forward_hook(self._normed),
                    words.MLP.need(block).register_forward_hook(self._mlp),
                ]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, block: Any, inputs: Any) -> None:
        self.records.append(BlockRecord(words.SELF.need(block), inputs[0].detach()))

    def _normed(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.records[-1].normed = output.detach()

    def _mlp(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.records[-1].mlp = (inputs[0].detach(), output.detach())


@contextlib.contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """The model without its patch and in evaluation mode; afterwards both are as they were."""
    training = {module: module.training for module in model.modules()}
    patched = {m: (type(m), m.__dict__[SETTINGS]) for m in model.modules() if is_swapped(m)}
    for module in patched:
        restore(module)
    model.eval()
    try:
        yield
    finally:
        for module, (cls, settings) in patched.items():
            module.__class__ = cls
            module.__dict__[SETTINGS] = settings
            tap = getattr(settings, "tap", None)
            if tap is not None:
                tap.take()  # the tap noted keys in this run too; nobody will ask for them, and they would stay alive
        for module, value in training.items():
            module.training = value

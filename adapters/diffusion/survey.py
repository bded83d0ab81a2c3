"""Multiply-adds of a denoiser at some size, counted on the meta device: no weights are read, nothing is computed."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tokred.adapters.changes import Changes, sweep
from tokred.adapters.diffusion.flight import SpotRecord
from tokred.adapters.diffusion.host import DenoiserHost, match
from tokred.adapters.diffusion.inputs import example as example
from tokred.adapters.diffusion.inputs import float_type
from tokred.diffusion.method import AttentionMethod


class Survey(NamedTuple):
    """One forward of a denoiser at batch 1.

    Attributes:
        macs: multiply-adds of all of it, convolutions included.
        reduced: the same under the method, whose own work is not counted.
        spots: sub-layers, and the tokens that each runs on under the method.
        spot_macs: multiply-adds of each without the method.
    """

    macs: int
    reduced: int
    spots: tuple[SpotRecord, ...]
    spot_macs: tuple[int, ...]


def survey(host: DenoiserHost, method: AttentionMethod, size: tuple[int, ...]) -> Survey:
    """Count one forward on a sample of some size, without and with the method.

    Args:
        host: of a model, patched or not, which is not changed.
        method: its choice of tokens is not made, only their number.
        size: rows and columns of the sample (the latent); of a clip: frames, rows and columns.

    Raises:
        ValueError: the method's parameters do not fit the grids there, or the size has frames where it should not.
    """
    model = meta_copy(host.model)
    sweep(model)
    own = match(model)
    assert own is not None  # a copy of a host
    given = example(model, size)
    macs, before = _counted(model, own, given)
    session = own.patch(method, None, "auto", Changes())
    session.free, session.fixed = True, (size[-2] // own.patch_size, size[-1] // own.patch_size)
    reduced, _ = _counted(model, own, given)
    spots = tuple(session.records[key] for key in sorted(session.records))
    return Survey(macs, reduced, spots, tuple(before[spot.name] for spot in spots))


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes and no values."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    for m in model.modules():
        if _packed(m):
            memo[id(m)] = nn.Linear(m.in_features, m.out_features, device="meta", dtype=float_type(model))  # type: ignore[arg-type]
    return copy.deepcopy(model, memo).eval()


def _packed(module: nn.Module) -> bool:
    """True for a linear layer whose weights are no plain matrix (packed, quantised), so that only it can multiply."""
    if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        return False
    if any(isinstance(inner, nn.Linear) for inner in module.modules() if inner is not module):
        return False  # a wrapper, such as LoRA's
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_quantized
    return not plain or tuple(weight.shape) != (module.out_features, module.in_features)  # type: ignore[union-attr]


def _counted(model: nn.Module, host: DenoiserHost, given: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Multiply-adds of a forward, and of each sub-layer in it."""
    found: dict[str, int] = {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        handles = []
        for part in host.parts:
            for name, module, _ in part.sublayers:

                def start(*_: Any, name: str = name) -> None:
                    found[name] = found.get(name, 0) - counter.get_total_flops()

                def stop(*_: Any, name: str = name) -> None:
                    found[name] += counter.get_total_flops()

                handles += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
        try:
            model(**given)
        finally:
            for handle in handles:
                handle.remove()
    # Of a block whose MLP runs beside its attention, the MLP is what is not attention.
    for part in host.parts:
        if part.sublayers[-1][2] == "parallel":
            found[f"{part.name}.mlp"] = found.pop(part.name) - sum(found[name] for name, *_ in part.sublayers[:-1])
    return int(counter.get_total_flops()) // 2, {name: flops // 2 for name, flops in found.items()}

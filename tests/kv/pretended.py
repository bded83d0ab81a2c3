"""Devices that are pretended: numbers lie on the CPU, and whatever meets across two devices fails as it would there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

aten: Any = torch.ops.aten
# Operations that take tensors of several devices: copies, and rows picked by an index of the host's.
_MOVES = {aten._to_copy.default, aten.copy_.default}
_PICKS = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
# A kind of device that torch knows by name and asks no driver for.
KIND = "ipu"


class Placed(Tensor):
    """A tensor that says it is on a device; ``own`` has its numbers. To torch's own code it is without any."""

    own: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, own: Tensor, place: torch.device) -> Placed:
        made: Placed = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, own.shape, strides=own.stride(), storage_offset=own.storage_offset(), dtype=own.dtype, device="meta"
        )
        made.own, made.place = own, place
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it says it is."""
        return self.place

    def tolist(self) -> Any:
        """Its numbers, brought to the host."""
        return self.own.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Devices(TorchDispatchMode):
    """While it is entered, tensors are made on the devices they are asked for."""

    def __enter__(self) -> Any:
        self.named = _Named()
        self.named.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        found = super().__exit__(*error)
        self.named.__exit__(*error)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Named(TorchFunctionMode):
    """Tensors that are made of Python's numbers, which no operator is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and place is not None and torch.device(place).type == KIND:
            return func(*args, **{**kwargs, "device": "cpu"}).to(place)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    found = {x.device for x in given if x.ndim} or {x.device for x in given}
    if func in _PICKS:
        found = {given[0].device} if found <= {given[0].device, torch.device("cpu")} else found
    if len(found) > 1 and func not in _MOVES:
        raise RuntimeError(f"{func} found tensors on several devices: {sorted(map(str, found))}")
    here = given[0].device if func in _MOVES else next(iter(found), torch.device("cpu"))
    asked = kwargs.get("device")
    if asked is not None:
        here = here if torch.device(asked).type == "meta" else torch.device(asked)
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    bare = {id(x.own): x for x in given if isinstance(x, Placed)}
    out = func(*tree_map_only(Placed, lambda x: x.own, args), **tree_map_only(Placed, lambda x: x.own, kwargs))

    def placed(x: Tensor) -> Tensor:
        if id(x) in bare and here == bare[id(x)].device:
            return bare[id(x)]
        return x if here.type == "cpu" else Placed(x, here)

    return tree_map_only(Tensor, placed, out)


def spread(model: nn.Module, layers: list[nn.Module], devices: list[int]) -> None:
    """Put layers on devices, and all else on the first; what a layer is given comes to it, and its answer back."""
    places = [torch.device(KIND, i) for i in devices]
    _put(model, places[0])
    for layer, place in zip(layers, places, strict=True):
        _put(layer, place)

        def come(module: nn.Module, args: Any, kwargs: Any, place: torch.device = place) -> Any:
            return _sent(args, place), {k: v if k == "past_key_values" else _sent(v, place) for k, v in kwargs.items()}

        layer.register_forward_pre_hook(come, with_kwargs=True, prepend=True)
        layer.register_forward_hook(lambda module, args, out: _sent(out, places[0]))


def _put(top: nn.Module, place: torch.device) -> None:
    for module in top.modules():
        for name, x in module._parameters.items():
            if x is not None:
                module._parameters[name] = nn.Parameter(Placed(own(x.data), place), requires_grad=False)
        for name, x in module._buffers.items():
            if x is not None:
                module._buffers[name] = Placed(own(x), place)


def own(x: Tensor) -> Tensor:
    """The numbers of a tensor, wherever it says it is."""
    return x.own if isinstance(x, Placed) else x


def _sent(x: Any, place: torch.device) -> Any:
    return tree_map(lambda one: one.to(place) if hasattr(one, "to") else one, x)

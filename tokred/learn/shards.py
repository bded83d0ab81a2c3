"""States whose tensors lie in shards over several processes: put together, shared out, clipped beside whole ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def gathered(state: Any, keep: bool) -> Any:
    """A state whose shards are put together, on the CPU; all processes call it on the same state at once.

    Args:
        state: nested mappings, lists and tensors, such as a ``state_dict``; without shards it is returned as it is.
        keep: False: the process takes part, and has None for every tensor that was in shards.
    """
    if isinstance(state, Mapping):
        return {key: gathered(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value, keep) for value in state]
    if not _is_sharded(state):
        return state
    whole: Tensor = state.full_tensor()
    return whole.cpu() if keep else None


def optimiser_state(state: Mapping[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """An optimiser's whole ``state_dict`` in shards, like the parameters that it moves.

    Args:
        state: as ``state_dict()`` gives it, of whole tensors.
        parameters: by their numbers in it.
    """
    from torch.distributed.tensor import distribute_tensor

    def like(value: Any, parameter: Any) -> Any:
        if not _is_sharded(parameter) or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    moments = {i: {k: like(v, parameters[i]) for k, v in kept.items()} for i, kept in state["state"].items()}
    return {**state, "state": moments}


def clip(parameters: list[nn.Parameter], most: float) -> None:
    """Scale gradients in place so that their norm over all of them, whole and in shards, is at most ``most``."""
    given = [p for p in parameters if p.grad is not None]
    kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for p in given:
        kinds[_is_sharded(p)].append(p)
    if not kinds[True]:
        nn.utils.clip_grad_norm_(given, most)
        return
    norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
    whole = [norm.full_tensor() if _is_sharded(norm) else norm for norm in norms]  # type: ignore[attr-defined]
    # Shards may lie on the CPU while what is whole is on the device.
    total = torch.stack([norm.float().to(whole[0].device) for norm in whole]).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, most, total)


def own_names(model: nn.Module) -> Callable[[str], bool]:
    """A test that tells if a name of the ``state_dict`` is the first of what it names: tied weights have several."""
    every = dict(model.named_parameters(remove_duplicate=False))
    first = dict(model.named_parameters())
    return lambda name: name not in every or name in first


def _is_sharded(value: Any) -> bool:
    # Without a process group there are no shards, and torch's package for them, which takes long to import, can wait.
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)

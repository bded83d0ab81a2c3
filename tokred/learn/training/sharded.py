"""Processes that share out a model's weights (FSDP 2), as accelerate was told to."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokred import adapters
from tokred.errors import UnsupportedModelError

# Kinds of processes that hold whole weights each.
WHOLE = ("NO", "MULTI_GPU", "MULTI_CPU")


def check_kind(accelerator: Any) -> bool:
    """True if the processes of an accelerator shard the weights.

    Raises:
        NotImplementedError: they do so in another way than FSDP 2.
    """
    kind = str(accelerator.distributed_type.value)
    if kind in WHOLE:
        return False
    if kind != "FSDP":
        raise NotImplementedError(f"train knows processes of kind {', '.join(WHOLE)} and FSDP, got {kind}")
    version = getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1)
    if version != 2:
        raise NotImplementedError(f"train shards weights by FSDP 2, got FSDP {version}: set fsdp_version to 2")
    return True


def shard(model: nn.Module, accelerator: Any) -> nn.Module:
    """Share out a model's weights over the processes, block by block; its class and names stay.

    Args:
        model: on any device; one of an unknown kind is sharded as one piece.
        accelerator: of kind FSDP, whose plug-in says when weights are let go of, where they lie and in what precision
            they come.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard

    plugin = accelerator.state.fsdp_plugin
    mesh = init_device_mesh(accelerator.device.type, (int(accelerator.num_processes),))
    settings: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": plugin.reshard_after_forward,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "offload_policy": plugin.cpu_offload or OffloadPolicy(),
    }
    try:
        blocks = [block for _, block in adapters.find(model).blocks]
    except UnsupportedModelError:
        blocks = []
    for block in blocks:
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    return model

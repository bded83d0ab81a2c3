"""One of two processes that share a batch: run by tests as ``two_processes.py RANK PORT RESULT [orders]``."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

import tokred
from tokred.adapters.tiny.timm import build, images


def local_step(model: torch.nn.Module, rank: int) -> None:
    model(images(4)[rank * 2 : rank * 2 + 2]).square().sum().backward()


def patched(checkpoint: bool) -> torch.nn.Module:
    model = build("vit").train()
    tokred.apply(model, "tome", r=4)
    model.set_grad_checkpointing(checkpoint)
    return model


def ddp(rank: int, checkpoint: bool) -> dict[str, torch.Tensor]:
    model = patched(checkpoint)
    local_step(torch.nn.parallel.DistributedDataParallel(model), rank)
    return {name: p.grad for name, p in model.named_parameters()}


def fsdp2(rank: int, checkpoint: bool) -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = patched(checkpoint)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    local_step(model, rank)
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def orders(rank: int) -> dict[str, object]:
    """Outputs of a model that is sharded before it is patched, and after."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))

    def shard(model: torch.nn.Module) -> torch.nn.Module:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def run(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(images(4))

    found: dict[str, object] = {"alone": run(tokred.apply(build("vit").eval(), "tome", r=4))}
    found["plain, sharded"] = run(shard(build("vit").eval()))
    first = tokred.apply(shard(build("vit").eval()), "tome", r=4)
    last = shard(tokred.apply(build("vit").eval(), "tome", r=4))
    for name, model in (("sharded first", first), ("applied first", last)):
        found[name] = run(model)
        tokred.remove(model)
        found[f"{name}, removed"] = run(model)
        found[f"{name}, class"] = type(model.blocks[0]).__name__
    return found


def main() -> None:
    rank, port, result = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found: dict[str, object] = orders(rank) if sys.argv[4:] == ["orders"] else {}
    for run in () if found else (ddp, fsdp2):
        for checkpoint in (False, True):
            found[run.__name__ + (" checkpointed" if checkpoint else "")] = run(rank, checkpoint)
    if rank == 0:
        torch.save(found, result)
    dist.barrier()  # the one that has less to do must not take the connection away
    dist.destroy_process_group()
    # Everything is done. Torch's threads may still abort the interpreter's end ("terminate called without an active
    # exception"), now and then, which says nothing about what was computed.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

"""One of two processes that train together, with whole weights and with shards; started by ``test_training.py``.

python two_trainers.py RANK PORT FOLDER
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

rank, port, folder = sys.argv[1:]
os.environ |= {
    "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    "ACCELERATE_USE_CPU": "true",
}  # fmt: skip

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402

from tokred import learn  # noqa: E402
from tokred.adapters.tiny import timm as tiny  # noqa: E402
from tokred.learn.training import train  # noqa: E402

torch.set_num_threads(1)
x = tiny.images(16)
recipe = learn.Recipe("cropr", {"r": 4, "classes": 3}, steps=4, batch=8, lr=1e-3, lr_method=3e-3)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2


class Sharding:
    """What accelerate would be with FSDP 2, which it offers on devices other than the CPU alone."""

    distributed_type = SimpleNamespace(value="FSDP")
    state = SimpleNamespace(
        fsdp_plugin=SimpleNamespace(
            fsdp_version=2, reshard_after_forward=True, mixed_precision_policy=None, cpu_offload=None
        )
    )

    def __getattr__(self, name):
        return getattr(accelerator, name)


for kind, given in (("whole", accelerator), ("shards", Sharding())):
    for until in (2, None):
        done = train(
            tiny.build("vit"), (x, x.mean((2, 3)).argmax(1)), recipe, f"{folder}/{kind}", accelerator=given, until=until
        )
    weight = done.model.blocks[0].attn.qkv.weight
    assert ("DTensor" in type(weight.data).__name__ or "DTensor" in type(weight).__name__) == (kind == "shards")

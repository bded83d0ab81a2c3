"""One of two processes that train together; started by ``test_training.py``.

python two_trainers.py RANK PORT FOLDER
"""

from __future__ import annotations

import os
import sys

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
for until in (2, None):
    train(tiny.build("vit"), (x, x.mean((2, 3)).argmax(1)), recipe, folder, accelerator=accelerator, until=until)

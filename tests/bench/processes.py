"""One of several processes that measure together: run by tests as ``processes.py OUT [DIES]``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

import tokred
from tokred.adapters.tiny.timm import build

METHODS = ["tome r=1", "tome r=2", "evit kappa=0.7", "snapkv budget=0.5", "random r=1"]


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 3, 40, 40, generator=generator), torch.tensor([0, 1])) for _ in range(5)]


def main(out: Path, dies: bool) -> None:
    rank = int(os.environ.get("RANK", "0"))

    def metric(output, batch):
        metric.calls += 1  # what it closes over would be part of what rows are known by
        if metric.dies and metric.calls > 10:  # in the middle of a row
            os.kill(os.getpid(), signal.SIGKILL)
        return output.float().mean(1)

    metric.calls, metric.dies = 0, dies and rank == 1

    result = tokred.benchmark(build("vit").eval(), METHODS, data(), metric, out=out, baselines=False, rounds=1)
    rows = [{k: v for k, v in row.items() if k in ("method", "setting", "quality", "reason")} for row in result.rows]
    (out / f"rows{rank}.json").write_text(json.dumps([rows, len(result.samples["tome r=1"].values)]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), "dies" in sys.argv)

"""A benchmark in two processes that ``accelerate launch`` begins, one of which is killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("accelerate")

import tokred
from tests.bench.processes import METHODS, data, main
from tokred.bench import results
from tokred.bench.feeds import Batches

SCRIPT = Path(__file__).with_name("processes.py")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(tokred.__file__).resolve().parents[1]), *filter(None, sys.path)])
    # On the command line accelerate has several processes on GPUs alone; by a file also where there is none.
    config = out.parent / "launch.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 2\n"
        f"num_machines: 1\nmachine_rank: 0\nmixed_precision: 'no'\nmain_process_port: {free_port()}\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(SCRIPT), str(out), *more], env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.hosts
@pytest.mark.slow
def test_two_processes_share_the_data_and_one_is_killed(tmp_path):
    """The launch that loses a process ends; the next one measures what is missing, and all rows are those of one."""
    out = tmp_path / "out"
    out.mkdir()
    assert launch(out, "dies").returncode != 0
    partial = results.records(results.read(out / "benchmark.csv"), "benchmark")
    assert 0 < len(partial) < len(METHODS)
    done = launch(out)
    assert done.returncode == 0, done.stderr[-3000:]
    table = results.records(results.read(out / "benchmark.csv"), "benchmark")
    assert {r["method"] for r in table} == {"unpatched", "tome", "evit", "random"}
    assert len(table) == 5
    kept = {(r["method"], r["setting"]): r["seconds"] for r in table}
    assert all(kept[r["method"], r["setting"]] == r["seconds"] for r in partial)
    alone = tmp_path / "alone"
    alone.mkdir()
    main(alone, False)
    (one, samples), (two, _), (single, _) = (
        json.loads(p.read_text()) for p in (out / "rows0.json", out / "rows1.json", alone / "rows0.json")
    )
    assert samples == 10
    assert [row["method"] for row in one] == [row["method"] for row in single]
    for row, other, both in zip(one, two, single, strict=True):
        assert row["reason"] == other["reason"]
        assert bool(row["reason"]) == bool(both["reason"]) == (row["method"] == "snapkv")
        if not row["reason"]:
            # A row that was there already comes back with the digits of the table.
            assert row["quality"] == pytest.approx(both["quality"], rel=1e-4)
    assert done.stderr.count("unpatched:") == 1  # one process speaks


def test_batches_are_shared_without_rest():
    import torch

    def read(held: bool, index: int, count: int) -> list[float]:
        batches = Batches(data(), torch.device("cpu"), lambda item, index: item)
        if not held:
            batches._held = None
        batches.share(index, count)
        batches.restart()
        found = []
        for i in range(2 * batches.count):
            batches.seek(i)
            found.append(float(batches.batch[0].sum()))
        assert found[: batches.count] == found[batches.count :]
        return found[: batches.count]

    whole = [float(x.sum()) for x, _ in data()]
    for held in (True, False):
        assert [*read(held, 0, 2), *read(held, 1, 2)] == [*whole[0::2], *whole[1::2]]
    with pytest.raises(ValueError, match="5 batches, which 6 processes cannot share"):
        read(True, 0, 6)

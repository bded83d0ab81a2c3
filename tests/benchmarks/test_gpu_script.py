"""``benchmarks/gpu.py`` and what it is made of: the checks catch wrong kernels, and the script runs without a GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import cpu_run, cuda_clock, gpu_run, matching, rows
from benchmarks.kernels.case import Draw, Run
from benchmarks.kernels.check import check, errors, poisoned
from benchmarks.kernels.table import CHECKS, GOALS, OTHERS, Goal, floor_of
from tests.kernels.interpreter import skip_without
from tokred.bench import results

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def start(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    run = [str(ROOT / "benchmarks" / script)] if script.endswith(".py") else ["-m", "benchmarks", script]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    # Scripts run from any folder; `-m benchmarks` from the top of the checkout.
    cwd = None if script.endswith(".py") else ROOT
    command = [sys.executable, *run, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=250, cwd=cwd)


@pytest.mark.hosts
@pytest.mark.slow
def test_interpreted(tmp_path: Path) -> None:
    """Every case is right in the interpreter, from a folder that is not the checkout's."""
    skip_without()
    done = start("gpu.py", "--interpret", "--seed", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    names = {row.case.name for row in (*GOALS, *OTHERS, *CHECKS)}
    (written,) = tmp_path.glob("*.json")
    record = json.loads(written.read_text(encoding="utf8"))
    assert {row["kernel"] for row in record["rows"]} == names
    assert all(row["check"]["passed"] for row in record["rows"])
    assert record["torch"] == torch.__version__
    assert "CHECK FAILED" not in done.stdout


@pytest.mark.slow
def test_cpu_script(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    settings = ("--tiny", "--rounds", "2", "--region", "0.1", "--threads", "1", "--out", str(path))
    done = start("kernels/cpu", "--only", "match", "merge", "two passes", "decode", *settings)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    records = results.records(results.read(path))
    assert {"best match", "merge", "column scores, two passes", "decode, flat"} <= {r["method"] for r in records}
    assert all(r["failed"] == 0 and r["speedup"] > 0 and r["call_mib"] > 0 for r in records)


def test_peak_is_counted() -> None:
    def run() -> Tensor:
        a = torch.ones(1 << 20)  # 4 MiB
        b = a + 1
        del a
        return b.exp()

    assert cpu_run.peak_allocation(run) == pytest.approx(8, abs=0.01)


def test_without_a_gpu() -> None:
    done = start("gpu.py", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr


def test_uses_the_checkout() -> None:
    """Without an installed tokred, in a process that never saw the one of this environment."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path[:] = [p for p in sys.path if p not in ('', {str(ROOT)!r})]\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "from checkout import use_checkout; use_checkout(); use_checkout()\n"
        "import tokred, tokred.adapters, tokred.kernels.dispatch as d, benchmarks.kernels as b\n"
        "print(*(m.__file__ for m in (tokred, tokred.adapters, d, b)), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [Path(line).relative_to(ROOT).as_posix() for line in done.stdout.splitlines()]
    assert found == [
        "tokred/__init__.py", "adapters/__init__.py", "kernels/dispatch.py", "benchmarks/kernels/__init__.py",
    ]  # fmt: skip


def merged(spoil: Callable[[Tensor], Tensor]) -> str:
    """What the check says about a merge whose result is spoilt."""
    case = replace(rows.merge, ours=lambda i: (spoil(rows.merge.ours(i)[0]),))
    return check(case, case.make({"B": 4, "N": 197, "M": 181, "C": 64}, Draw(CPU, torch.bfloat16, 0)), CPU).failure


def forget(y: Tensor) -> Tensor:
    out = torch.empty_like(y)
    out[:, :-1] = y[:, :-1]
    return out


def swap(y: Tensor) -> Tensor:
    y[0, [3, 4]] = y[0, [4, 3]]
    return y


def test_check_catches() -> None:
    assert merged(lambda y: y) == ""
    assert "inf" in merged(forget)  # unwritten memory
    assert "output 0" in merged(swap)  # two rows of 724
    assert "error" in merged(lambda y: y * 1.02)
    assert merged(lambda y: y[:, :-1]) != ""
    noise = iter(range(9))
    assert merged(lambda y: y.mul_(1 + 2**-8 * next(noise))) != ""


def test_check_follows_indices() -> None:
    """Another index with the same similarity is right, one with another similarity is not."""

    def run(ours: Run) -> str:
        case = replace(matching.alternate, ours=ours)
        inputs = case.make({"B": 2, "N": 40, "C": 8}, Draw(CPU, torch.float32, 0))
        inputs["x"][:, 5] = inputs["x"][:, 3]  # columns 1 and 2 are the same
        return check(case, inputs, CPU).failure

    def other(i: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        score, index = matching.alternate.chain(i)
        return score, torch.where(index == 1, 2, index)

    def wrong(i: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        score, index = matching.alternate.chain(i)
        return score, (index + 1) % 20

    assert run(other) == ""
    assert "output 1" in run(wrong)


def test_poison_and_errors() -> None:
    with poisoned(CPU):
        assert bool(torch.empty(3).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()
    one = torch.ones(4, dtype=torch.float64)
    assert errors(one * 1.5, one) == (0.5, 0.5)
    masked = torch.tensor([1.0, -torch.inf])
    assert errors(masked, masked) == (0.0, 0.0)
    assert errors(torch.tensor([1.0, 2.0]), masked)[0] == float("inf")
    assert errors(torch.tensor([1.0, torch.nan]), torch.ones(2))[0] == float("inf")


def test_goals() -> None:
    assert Goal(times=2).met(19, 10, 1)
    assert not Goal(times=2).met(21, 10, 1)
    assert not Goal(microseconds=8, speedup=4).met(7, 2, 3.9)
    assert Goal(microseconds=8, speedup=4).text() == "8 us, 4x chain"
    for row in (*GOALS, *OTHERS):
        counted = floor_of(row.case.work(row.sizes))  # type: ignore[misc]
        assert row.floor is None or abs(counted / row.floor - 1) < 0.15, (row.case.name, counted, row.floor)


class StandIn(cuda_clock.Clock):
    """The clock of a GPU, read on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cache = CPU, 1 << 10

    def seconds(self, work: Callable[[], object]) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    def ceilings(self, draw: Draw) -> cuda_clock.Ceilings:
        return cuda_clock.Ceilings(3e12, 8e14)

    def _peak(self, run: Run, inputs: dict[str, Tensor]) -> float:
        return 0.0


class Recorded:
    def __init__(self, loop: Callable[[], object]) -> None:
        self.replay = loop


@pytest.mark.parametrize("graphs", [True, pytest.param(False, marks=pytest.mark.hosts)])
def test_timed_run(
    graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The part that needs a GPU, with stand-ins for its clock and its graphs: a missed goal is no error."""
    monkeypatch.setattr(cuda_clock, "_capture", lambda loop: (Recorded(loop), []) if graphs else None)
    monkeypatch.setattr(
        gpu_run,
        "selected",
        lambda args, device: [
            (replace(GOALS[0], sizes=matching.alternate.tiny, goal=Goal(microseconds=1e-3)), torch.float32, True),
            (replace(GOALS[4], sizes=rows.merge.tiny), torch.float32, False),
        ],
    )
    args = argparse.Namespace(quick=True, seed=0, limit=100, out=tmp_path, only=None, autotune=False, commit="c0ffee")
    assert gpu_run.run(args, tmp_path, CPU, StandIn(CPU)) == 0
    printed = capsys.readouterr().out
    assert "missed" in printed
    (path,) = tmp_path.glob("*-quick.json")
    first, second = json.loads(path.read_text(encoding="utf8"))["rows"]
    assert first["met"] is False
    assert first["times"]["graphs"] is graphs
    assert first["times"]["ours"]["low"] <= first["times"]["ours"]["median"] <= first["times"]["ours"]["high"]
    assert second["times"] is None
    (record,) = results.records(results.read(path.with_suffix(".csv")), "gpu")
    assert record["method"] == first["kernel"]
    assert record["ms"] == pytest.approx(first["times"]["ours"]["median"] / 1e3, rel=1e-4)
    assert (record["met"], record["failed"], record["commit"], record["dtype"]) == (0, 0, "c0ffee", "float32")

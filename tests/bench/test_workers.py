"""Rows of a benchmark as tasks of Ray, with workers that are lost."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")

import tokred
from tests.encoder.tiny_timm import build
from tokred.bench import results

BATCHES = 3


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 3, 40, 40, generator=generator), torch.tensor([0, 1])) for _ in range(BATCHES)]


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    root = Path(tokred.__file__).resolve().parents[1]
    # Workers find the tests' own modules as this process does.
    paths = [p for p in sys.path if p]
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(root), *paths])}},
    )  # fmt: skip
    yield ray
    ray.shutdown()


def benchmark(tmp_path, methods, metric="agreement", **more):
    given = {"baselines": False, "rounds": 1, "progress": False, "out": tmp_path, "ray": "local"} | more
    return tokred.benchmark(build("vit").eval(), methods, data(), metric, **given)


@pytest.mark.hosts
def test_rows_are_those_of_one_process(cluster, tmp_path):
    methods = ["tome r=1", "evit kappa=0.7", "random r=1"]
    spread, alone = benchmark(tmp_path / "a", methods), benchmark(tmp_path / "b", methods, ray=None)
    kept = ("method", "setting", "quality", "difference", "tokens_in", "tokens_out", "work", "samples")
    assert [[row[k] for k in kept] for row in spread.rows] == [[row[k] for k in kept] for row in alone.rows]
    assert all(row["speedup"] > 0 and row["peak_mib"] > 0 for row in spread.rows)
    assert spread.samples.keys() == alone.samples.keys()
    assert spread.samples["tome r=1"] == alone.samples["tome r=1"]


def test_a_killed_worker_costs_no_row(cluster, tmp_path):
    """Thirteen rows on two workers, one of which dies in the middle: each is there, and measured once."""
    killed, count = tmp_path / "killed", tmp_path / "count"

    def own(output, batch):
        with count.open("a") as f:
            f.write("x")
        if not killed.exists() and count.stat().st_size > 40:
            killed.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return output.float().mean(1)

    settings = [f"tome r={r} metric={metric}" for r in range(1, 5) for metric in ("k", "q", "v")]
    result = benchmark(tmp_path / "out", settings, own)
    assert killed.exists()
    assert [f"{row['method']} {row['setting']}".strip() for row in result.rows] == ["unpatched", *settings]
    assert [row["reason"] for row in result.rows if row["reason"]] == []
    table = results.records(results.read(tmp_path / "out" / "benchmark.csv"), "benchmark")
    assert sorted(f"{r['method']} {r['setting']}".strip() for r in table) == sorted(["unpatched", *settings])
    assert len(table) == 13
    lines = (tmp_path / "out" / "benchmark.samples.jsonl").read_text().splitlines()
    assert len(lines) == len({json.dumps(json.loads(line)["row"]) for line in lines}) == 13


@pytest.mark.hosts  # the same without a cluster stands in test_benchmark.py; starting one takes its time
def test_rows_that_are_there_are_not_measured_again(cluster, tmp_path):
    first = benchmark(tmp_path, ["tome r=1"])
    both = benchmark(tmp_path, ["tome r=1", "tome r=2"])
    assert both.rows[1]["seconds"] == pytest.approx(first.rows[1]["seconds"], rel=1e-4)
    assert both.rows[2]["quality"] is not None


def test_a_method_that_cannot_run_says_why(cluster, tmp_path):
    result = benchmark(tmp_path, ["tome r=1", "snapkv budget=0.5"])
    assert "acts at stage cache" in result.rows[2]["reason"]
    assert result.rows[1]["reason"] == ""


def test_what_fails_for_the_unpatched_model_ends_the_run(cluster, tmp_path):
    def metric(output, batch):
        if tokred.__name__ and output.shape[0] == 2 and os.getpid() != driver:
            raise ZeroDivisionError("no such luck")
        return output.float().mean(1)

    driver = os.getpid()
    with pytest.raises(ZeroDivisionError, match="no such luck"):
        benchmark(tmp_path, ["tome r=1"], metric)


@pytest.mark.parametrize(("more", "says"), [
    ({"workers": 0}, "workers must be a whole number of at least 1, got 0"),
    ({"ray": None, "workers": 2}, "give ray='local'"),
])  # fmt: skip
def test_wrong_workers_are_refused(tmp_path, more, says):
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=says):
        benchmark(tmp_path, ["tome r=1"], **more)


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'tokred\[ray\]'"):
        benchmark(tmp_path, ["tome r=1"])

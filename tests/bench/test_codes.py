"""Code of the user's own: what is measured again once it has changed, and what is not."""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("timm")

import tokred
from tests.bench.test_benchmark import labelled, quick
from tests.encoder.tiny_timm import build
from tokred.bench import results
from tokred.bench.codes import code_of

MINE = """
import torch

SHARE = 0.5
CLASSES = {"a", "b", "c"}

def helped(output):
    return output[:, 0] * SHARE

def metric(output, batch):
    return helped(output) if len(CLASSES) > 2 else output[:, 1]

def closed(weight):
    @torch.no_grad()
    def inner(output, batch, dense):
        return (output - dense).mean(1) * weight
    return inner

def run(model, batch):
    return model(batch[0])

def read(output, batch):
    return output * 2

class Counter:
    power = 1

    def __call__(self, output, batch):
        return self.score(output)

    def score(self, output):
        return output[:, 0] ** self.power
"""


def written(folder: Path, *changes: tuple[str, str]) -> ModuleType:
    """The module of a user, as it is after some changes."""
    text = MINE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file = folder / "mine_of_codes.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    found = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = found
    exec(compile(text, str(file), "exec"), found.__dict__)  # as a new process would, whatever is cached
    return found


@pytest.fixture
def mine(tmp_path):
    yield functools.partial(written, tmp_path)
    sys.modules.pop("mine_of_codes", None)


USES = {
    "metric": lambda m: m.metric,
    "closure": lambda m: m.closed(2),
    "tensor": lambda m: m.closed(torch.ones(1)),
    "partial": lambda m: functools.partial(m.metric, batch=None),
    "object": lambda m: m.Counter(),
    "method": lambda m: m.Counter().score,
    "module": lambda m: lambda output, batch: m.metric(output, batch),
}
CHANGES = {
    "metric": [("output[:, 1]", "output[:, 2]"), ("output[:, 0] * SHARE", "output[:, 1] * SHARE"), ("0.5", "0.25")],
    "closure": [("weight\n", "weight + 1\n"), ("mean(1)", "sum(1)")],
    "partial": [("> 2", "> 1"), ('"b", ', "")],
    "object": [("power = 1", "power = 2"), ("[:, 0] **", "[:, 1] **")],
    "method": [("[:, 0] **", "[:, 1] **")],
    "module": [("> 2", "> 3")],
}


@pytest.mark.parametrize("use", USES)
def test_code_that_changes(mine, use):
    before = code_of(USES[use](mine()))
    assert before == code_of(USES[use](mine()))
    if use != "module":  # which is read as a file
        assert before == code_of(USES[use](mine(("\nSHARE", "\n\n# a comment\nSHARE"))))
    for change in CHANGES.get(use, ()):
        assert code_of(USES[use](mine(change))) != before, change


def test_values_that_are_closed_over(mine):
    closed = mine().closed
    values = [1, 2, 1.0, "1", (1,), [1], [1, 2], {"a": 1}, {1}, torch.ones(2), torch.ones(2).int(), torch.zeros(2)]
    values += [torch.nn.LayerNorm(4), torch.nn.LayerNorm(4, eps=1.0), Path("a"), Path("b"), len, print, torch.float16]
    found = [code_of(closed(value)) for value in values]
    assert len(set(found)) == len(values)
    assert found == [code_of(closed(value)) for value in values]
    # What cannot be read is never what it was.
    assert code_of(closed(threading.Lock())) != code_of(closed(threading.Lock()))
    lock = closed(threading.Lock())
    assert code_of(lock) != code_of(lock)


def test_code_of_tokred_and_of_packages():
    assert code_of(tokred.benchmark, type(tokred.make("tome", r=2))) == code_of() == ""
    assert code_of(torch.nn.functional.relu) == code_of(torch.nn.functional.relu) != ""


def count(folder: Path) -> int:
    return len(results.records(results.read(folder / "benchmark.csv")))


@pytest.mark.parametrize(
    ("use", "change"),
    [
        (lambda m: {"metric": m.metric}, ("output[:, 1]", "output[:, 2]")),
        pytest.param(lambda m: {"metric": m.closed(m.SHARE)}, ("0.5", "0.25"), marks=pytest.mark.hosts),
        pytest.param(
            lambda m: {"metric": m.metric, "run": m.run}, ("batch[0])", "batch[0]) + 1"), marks=pytest.mark.hosts
        ),
        pytest.param(
            lambda m: {"metric": "cosine", "read": m.read}, ("output * 2", "output + 2"), marks=pytest.mark.hosts
        ),
    ],
)
def test_rows_of_other_code_are_measured_anew(mine, tmp_path, capsys, use, change):
    model, data, out = build("vit"), labelled(1), tmp_path / "out"

    def told(*changes: tuple[str, str]) -> list[str]:
        given = {**use(mine(*changes)), "out": out, "baselines": False, "progress": True}
        quick(model, "tome r=2", data, **given)
        return capsys.readouterr().err.splitlines()

    assert not any("kept" in line for line in told())
    assert count(out) == 2
    assert all(line.endswith("x, kept from an earlier run") for line in told())
    assert count(out) == 2
    assert not any("kept" in line for line in told(change))
    assert count(out) == 4
    assert all("kept" in line for line in told()), "the rows of before are there still"
    assert all("kept" in line for line in told(change))
    assert count(out) == 4


def test_a_direction_and_a_parameter_of_the_model_tell_rows_apart(mine, tmp_path):
    model, data, metric = build("vit"), labelled(1), mine().metric

    def rows(better: str = "higher") -> int:
        quick(model, "tome r=2", data, metric, better=better, out=tmp_path, baselines=False)
        return count(tmp_path)

    assert [rows(), rows(), rows("lower"), rows("lower")] == [2, 2, 4, 4]
    model.norm.eps *= 10
    assert [rows(), rows()] == [6, 6]
    model.blocks[0].attn.scale *= 2
    assert [rows(), rows()] == [8, 8]


METHOD = """
import dataclasses
import torch
import tokred
from tokred.methods.encoder.tome import ToMe

@dataclasses.dataclass(frozen=True)
class Mine(ToMe):
    name = "mine_of_codes"

    def reduce(self, site):
        return super().reduce(site)
"""


def test_a_method_that_has_changed_is_measured_anew(tmp_path, capsys):
    model, data = build("vit"), labelled(1)

    def told(text: str) -> list[str]:
        space = {"__name__": "mine_of_codes"}
        exec(compile(text, str(tmp_path / "mine_of_codes.py"), "exec"), space)
        methods = ["tome r=2", space["Mine"](r=2)]
        quick(model, methods, data, "top1", out=tmp_path, baselines=False, progress=True)
        return [line.endswith("kept from an earlier run") for line in capsys.readouterr().err.splitlines()]

    assert told(METHOD) == [False] * 3
    assert told(METHOD) == [True] * 3
    assert told(METHOD.replace("return super", "site = site\n        return super")) == [True, True, False]

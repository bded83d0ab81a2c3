"""Data in all its forms, the parts of the time, turns of two arms, and what measuring takes beside the runs."""

from __future__ import annotations

import gc
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

pytest.importorskip("timm")

import tokred
from tests.encoder.tiny_timm import build
from tokred.bench import pair, timing
from tokred.bench.feeds import batches
from tokred.bench.feeds.batches import Batches, collate, fingerprint, leaves, nbytes
from tokred.bench.feeds.forward import Forward
from tokred.bench.parts import Parts
from tokred.bench.table import Benchmark


def read(data, size=None) -> list:
    """All batches, as a benchmark reads them twice."""
    found = Batches(data, torch.device("cpu"), lambda item, index: item, batch_size=size)
    out = []
    for _ in range(2):
        found.restart()
        for i in range(found.count):
            found.seek(i)
            out.append(found.batch)
    return out[: found.count]


class Squares(Dataset):
    """Samples, by their number."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return torch.tensor([float(i)]), i * i


# ---------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("held", [2**30, 0])
def test_a_function_is_called_for_each_reading(monkeypatch, held):
    monkeypatch.setattr(batches, "HELD", held)
    calls = []

    def make():
        calls.append(1)
        return (torch.full((2,), float(i)) for i in range(3))

    assert [float(x[0]) for x in read(make)] == [0, 1, 2]
    assert len(calls) == (1 if held else 3)


def test_datasets_yield_samples():
    """Of torch and of Hugging Face: they are collated, eight at a time where nobody says how many."""
    found = read(Squares(), 2)
    assert [len(x) for x, _ in found] == [2, 2, 1]
    assert found[1][1].tolist() == [4, 9]
    assert len(read(TensorDataset(torch.zeros(20, 3)))) == 3
    rows = pytest.importorskip("datasets").Dataset.from_dict({"ids": [[1, 2], [3, 4], [5, 6]], "text": ["a", "b", "c"]})
    first, second = read(rows, 2)
    assert first["ids"].tolist() == [[1, 2], [3, 4]]
    assert (first["text"], second["text"]) == (["a", "b"], ["c"])


def test_samples_of_any_iterable():
    assert read(["a", "b", "c"], 2) == [["a", "b"], ["c"]]
    assert read(iter(["a", "b", "c"]), 2) == [["a", "b"], ["c"]]
    with pytest.raises(ValueError, match=r"samples of data have 2 shapes, such as .* a DataLoader with a collate_fn"):
        read([torch.zeros(2), torch.zeros(3)], 2)
    with pytest.raises(ValueError, match="data is a DataLoader, which makes batches itself"):
        read(DataLoader([torch.zeros(2)]), 2)


def test_an_iterator_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(batches, "ONCE", 100)
    with pytest.raises(ValueError, match="data is an iterator, which can be read only once, and holds more than"):
        read(torch.zeros(10) for _ in range(4))


def test_a_loader_that_ends_early_says_so(monkeypatch):
    monkeypatch.setattr(batches, "HELD", 0)

    class Shrinking:
        left = 3

        def __iter__(self):
            self.left -= 1
            return iter([torch.zeros(2)] * (self.left + 1))

    with pytest.raises(batches.Unreadable, match="data yields less than the 3 batches that it had before"):
        read(Shrinking())


def test_what_is_no_tensor_counts_too():
    """Texts, numbers, arrays and pictures have fingerprints and sizes."""
    image = pytest.importorskip("PIL.Image")
    array = torch.arange(12, dtype=torch.uint8).view(2, 2, 3).numpy()
    batch = {"prompt": ["a boat"], "array": array, "picture": image.fromarray(array), "n": 3}
    other = {**batch, "picture": image.fromarray(array + 1)}
    prints = [fingerprint(leaves(x)) for x in (batch, {**batch}, other, {**batch, "prompt": ["a cat"]})]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert nbytes(batch) == 6 + 12 + 12 + 8
    made = collate([(array, 0.5, {"ids": [1, 2]}), (array, 1.5, {"ids": [3, 4]})])
    assert made[0].shape == (2, 2, 2, 3)
    assert made[1].tolist() == [0.5, 1.5]
    assert made[2]["ids"].tolist() == [[1, 2], [3, 4]]


def test_a_sample_of_a_batch():
    one = Forward().one
    x, y = torch.zeros(4, 3), torch.zeros(4)
    assert one(x).shape == (1, 3)
    assert [len(v) for v in one((x, y))] == [1, 1]
    assert {k: len(v) for k, v in one({"a": x, "b": y}).items()} == {"a": 1, "b": 1}
    odd = {"pixel_values": torch.zeros(9, 2), "input_ids": torch.zeros(4, 5)}
    assert one(odd) is odd, "it cannot be told which pixels are the first sample's"


# ---------------------------------------------------------------------------------------------- time


class Inner(nn.Module):
    def forward(self, input_ids):
        return input_ids


class Outer(nn.Module):
    """A tower, and a decoder that is called for a prompt and for two tokens."""

    def __init__(self):
        super().__init__()
        self.tower, self.decoder = Inner(), Inner()

    def forward(self, x):
        self.tower(x)
        for width in (5, 1, 1):
            self.decoder(input_ids=x[:, :width])


def test_parts_add_up(monkeypatch):
    """Each interval belongs to the innermost part; the clock ticks once a mark."""
    ticks = iter(range(100))
    monkeypatch.setattr("tokred.bench.parts.time.perf_counter", lambda: float(next(ticks)))
    model, parts = Outer(), Parts(torch.device("cpu"))
    with parts.watching([(model.tower, "tower"), (model.decoder, "prompt")], ()):
        parts.begin()
        model(torch.zeros(1, 5))
        found = parts.seconds(parts.end())
    assert found == {"tower": 1, "prompt": 1, "decode": 2, "rest": 5}
    assert not model.tower._forward_hooks
    assert not model.tower._forward_pre_hooks
    parts.begin()
    with parts.within("prompt"), parts.within("selection"), parts.within("prompt"):
        pass
    assert parts.seconds(parts.end()) == {"rest": 2, "prompt": 2, "selection": 3}, "run by the method to select"


def test_parts_of_a_run_that_fails():
    class Failing(Inner):
        def forward(self, input_ids):
            raise RuntimeError

    module, parts = Failing(), Parts(torch.device("cpu"))
    with parts.watching([(module, "tower")], ()):
        parts.begin()
        with pytest.raises(RuntimeError):
            module(1)
        assert not parts.stack


def test_turns_of_several_rounds():
    """Arms change after a group; everything is timed and collected once."""
    log = []

    @contextmanager
    def enter(arm):
        log.append(f"+{arm}")
        yield
        log.append(f"-{arm}")

    seconds = timing.paired(
        [lambda: enter(0), lambda: enter(1)], lambda i: i, 5, warmup=0, group=2,
        collect=lambda arm, i, found: log.append(f"{arm}:{i}={found}"),
        ready=lambda arm, i: log.append(f"{arm}?{i}"),
    )  # fmt: skip
    assert [len(one) for one in seconds] == [5, 5]
    assert sum(entry.startswith("+") for entry in log) == 2 * 3
    for arm in range(2):
        assert [e for e in log if e.startswith(f"{arm}:")] == [f"{arm}:{i}={i}" for i in range(5)]
    turn = log[log.index("+0") : log.index("-0") + 3]
    assert turn == ["+0", "0?0", "0?1", "-0", "0:0=0", "0:1=1"] or turn[1] in ("0?2", "0?4")


def test_patching_takes_little_where_runs_are_short(monkeypatch):
    """A tiny model changes arms after many batches; values stay those of each batch."""
    groups = []
    own = timing.paired

    def spy(*args, **options):
        groups.append(options["group"])
        return own(*args, **options)

    monkeypatch.setattr(pair.timing, "paired", spy)
    data = [torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    values = {}
    for turn in (1e9, 1e-9):
        monkeypatch.setattr(pair, "TURN", turn)
        found = tokred.benchmark(build("vit"), "tome r=4", data, "cosine", rounds=1, progress=False, baselines=False)
        values[turn] = [row["quality"] for row in found.rows]
    assert groups == [1, 1, pair.GROUP, pair.GROUP]
    assert values[1e9] == values[1e-9]


def test_what_measuring_takes():
    """All time is in runs that are timed, in others, or beside them."""
    found = tokred.benchmark(build("vit"), "tome r=4", [torch.randn(2, 3, 40, 40)], progress=False, baselines=False)
    spent = found.spent
    assert set(spent) == {"whole", "timed", "untimed"}
    assert 0 < spent["timed"] + spent["untimed"] < spent["whole"]
    assert Benchmark([], "m", "block", "own", "higher", spent={"whole": 21, "timed": 16, "untimed": 4}).overhead == 0.05
    assert Benchmark([], "m", "block", "own", "higher").overhead is None
    assert gc.get_freeze_count() == 0

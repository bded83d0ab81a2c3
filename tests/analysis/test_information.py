"""The information horizon: the card's examples, and a model that stops looking at a known layer."""

from __future__ import annotations

import contextlib

import pytest
import torch

import tokred
from tests.vlm import oracle, tiny
from tokred.analysis.information import Horizon, first_within

IGNORED = -100


@pytest.fixture(scope="module")
def model():
    return tiny.llava()


def labelled(rows, answer: int = 2) -> dict:
    batch = tiny.prompts(rows)
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[:, -answer:] = batch["input_ids"][:, -answer:]
    return {**batch, "labels": labels}


ROWS = [[3, "image", 5], [1, "image", 6]]


def test_the_rule():
    curve = [0.41, 0.38, 0.20, 0.05, 0.004, 0.03, 0.006, 0.002]
    assert first_within(curve, 0.01) == 6
    assert first_within(curve, 0.05) == 3
    assert first_within(curve, 0.001) is None


def test_mean_and_deviation_of_single_tokens():
    rows = torch.tensor([[0.3, -0.1, 0.05, 0.02], [0.1, 0.05, 0.04, 0.03], [0.01, 0.0, 0.01, 0.0]]).double()
    found = Horizon((1, 2, 3), torch.ones(1).double(), torch.zeros(1, 3).double(), rows[None], 0.01, 4).rows()
    assert [round(row["mean"], 4) for row in found] == [0.0675, 0.055, 0.005]
    assert [round(row["deviation"], 4) for row in found] == [0.1455, 0.0269, 0.005]


@contextlib.contextmanager
def blind(model, batch, first: int):
    """Inside, no layer from ``first`` on sees a visual token, whichever are left; the tokens' positions tell them."""
    seen = (batch["input_ids"] != tiny.IMAGE) & batch["attention_mask"].bool()

    def hook(module, args, kwargs):
        places = kwargs["position_ids"].expand(len(seen), -1)
        keys = seen.gather(1, places)[:, None, None]
        itself = torch.eye(places.shape[1], dtype=torch.bool)
        mask = keys & torch.ones_like(itself).tril() | itself
        return args, {**kwargs, "attention_mask": mask}

    handles = [
        layer.register_forward_pre_hook(hook, with_kwargs=True)
        for layer in list(model.model.language_model.layers)[first:]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_a_model_that_stops_looking(model):
    """Nothing is lost from the layer on that sees no visual token, and something is before."""
    batch = labelled(ROWS)
    with blind(model, batch, 2):
        found = tokred.horizon(model, [batch], eps=1e-6, tokens=2)
    assert found.layers == (0, 1, 2, 3)
    assert found.gains[:, :2].abs().min() > 1e-6
    assert found.gains[:, 2:].abs().max() < 1e-6
    assert found.layer == 2
    assert found.single is not None
    assert found.single[:, 0].isnan().all()
    assert found.single[:, 1].abs().max() > 1e-7
    assert found.single[:, 2:].abs().max() < 1e-6
    assert "up to layer 2 of 4" in str(found)


def test_none_at_layer_0_is_masking_everywhere(model):
    batch = labelled(ROWS)
    found = tokred.horizon(model, [batch])
    given = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        whole = model(**given).logits
        with oracle.masked(
            model.model.language_model.layers, {0: batch["input_ids"] != tiny.IMAGE}, batch["attention_mask"]
        ):
            none = model(**given).logits

    def probability(logits):
        told = logits[:, -3:-1].log_softmax(-1).gather(-1, batch["input_ids"][:, -2:, None])
        return told.squeeze(-1).double().mean(1).exp()

    torch.testing.assert_close(found.dense, probability(whole), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.gains[:, 0], probability(whole) - probability(none), rtol=1e-4, atol=1e-8)


def test_leave_one_out_and_own_answers(model):
    batch = tiny.prompts(ROWS)
    found = tokred.analysis.horizon(
        model, [batch, batch], samples=3, step=3, tokens=1, mode="leave_one_out", max_new_tokens=2
    )
    assert found.layers == (0, 3)
    assert found.gains.shape == (4, 2), "whole batches"
    assert torch.equal(found.gains[:2], found.gains[2:])
    assert not tokred.patched(model)
    assert found.interval[0] in (0, 3, None)


def test_plots(model, tmp_path):
    pytest.importorskip("matplotlib")
    tokred.horizon(model, [labelled(ROWS)], tokens=1).plot(tmp_path / "horizon.png")
    assert (tmp_path / "horizon.png").stat().st_size > 10_000


def test_refusals(model):
    batch = labelled(ROWS)
    with pytest.raises(ValueError, match="data is empty"):
        tokred.horizon(model, [])
    with pytest.raises(ValueError, match="eps must lie"):
        tokred.horizon(model, [batch], eps=0)
    with pytest.raises(ValueError, match="mode must be"):
        tokred.horizon(model, [batch], mode="both")
    with pytest.raises(ValueError, match="pad on the left"):
        tokred.horizon(model, [{**batch, "attention_mask": batch["attention_mask"].flip(1) * 0}])
    with pytest.raises(ValueError, match="no answer"):
        tokred.horizon(model, [{**batch, "labels": torch.full_like(batch["labels"], IGNORED)}])
    with pytest.raises(ValueError, match="among which are visual ones"):
        tokred.horizon(
            model, [{**batch, "labels": batch["input_ids"].where(batch["input_ids"] == tiny.IMAGE, batch["labels"])}]
        )
    with tokred.applied(model, "fastv"), pytest.raises(ValueError, match="is patched"):
        tokred.horizon(model, [batch])
    assert not tokred.patched(model)

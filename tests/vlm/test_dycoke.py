"""DyCoke while it decodes: rows by hand, and against a model whose rows are masked step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.vlm import hosts, oracle
from tokred.adapters.contract import cache_name
from tokred.methods.vlm.dycoke import DyCokeDecode
from tokred.vlm.decoding import StepSite

VISUAL = torch.tensor([[False, True, True, True, True, False], [False, True, True, False, False, False]])


def step(received: Tensor, last: tuple[Tensor, Tensor] | None = None) -> StepSite:
    return StepSite(received, VISUAL, (4, 2), last)


def test_rows_by_hand():
    method = DyCokeDecode(ratio=0.5)
    first = torch.tensor([[0, 0.1, 0.4, 0.3, 0.1, 0], [0, 0.2, 0.2, 0, 0, 0]])
    stays, handed = method.rows(step(first))
    expected = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    assert torch.equal(stays, expected), "the lower row of those that are alike"
    assert torch.equal(handed, stays)
    # The first sample's next token gives something else, the second's nearly the same, with another order.
    second = torch.tensor([[0, 0.4, 0.1, 0, 0.3, 0], [0, 0.2, 0.21, 0, 0, 0]])
    stays, handed = method.rows(step(second, (first, handed)))
    expected = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0]]).bool()
    assert torch.equal(stays, expected)
    whole, kept = DyCokeDecode(ratio=0.5, alike="whole").rows(step(second, (first, handed)))
    assert torch.equal(whole[1], VISUAL[1]), "as the released code has it"
    assert torch.equal(kept[1], handed[1])
    every, _ = DyCokeDecode(ratio=0.5, threshold=2.0).rows(step(second, (first, handed)))
    assert every[1].tolist() == [False, False, True, False, False, False]
    assert torch.equal(DyCokeDecode(ratio=0.0).rows(step(first))[0], VISUAL)


def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[StepSite, Tensor]]:
    """The sites and answers of what runs from here on."""
    found: list[tuple[StepSite, Tensor]] = []
    stock = DyCokeDecode.rows

    def rows(self: DyCokeDecode, site: StepSite) -> tuple[Tensor, Tensor]:
        stays, handed = stock(self, site)
        found.append((site, stays))
        return stays, handed

    monkeypatch.setattr(DyCokeDecode, "rows", rows)
    return found


# One that takes videos and one that takes images; the others are for the matrix.
OTHERS = ("qwen2_5_vl_video", "llava", "internvl", "qwen3_vl")
HOSTS = ["onevision_video", *(pytest.param(host, marks=pytest.mark.hosts) for host in OTHERS)]


@torch.no_grad()
@pytest.mark.parametrize("evict", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_steps_equal_masked_ones(host, evict, monkeypatch):
    model: Any = hosts.build(host)
    batch = hosts.prompts(host, [[3, "image", 5], [2, "image", 6]])
    length, layers = batch["input_ids"].shape[1], hosts.layers(host, model)
    found = noted(monkeypatch)
    with tokred.applied(model, "dycoke_decode", layer=2, threshold=2.0, evict=evict):
        out = oracle.generate(model, batch, max_new_tokens=4)
    assert len(found) == (1 if evict else 3)
    cache = cache_name(type(model).forward)
    dense = model(**batch, use_cache=True)
    torch.testing.assert_close(dense.logits[:, -1], out.logits[0])  # the prompt runs whole
    for i in range(3):
        site, stays = found[0 if evict else i]
        assert (stays & ~site.visual).sum() == 0
        assert (stays.sum(1) == (site.visual.sum(1) * 0.3).int()).all()
        keep = torch.nn.functional.pad(stays | ~site.visual, (0, length + i + 1 - stays.shape[1]), value=True)
        token = out.sequences[:, length + i : length + i + 1]
        with oracle.masked(layers, {2: keep}, None):
            dense = model(input_ids=token, **{cache: getattr(dense, cache, None) or dense.past_key_values})
        torch.testing.assert_close(dense.logits[:, -1], out.logits[i + 1], rtol=1e-4, atol=1e-4)
    rows = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    left = length + 3 - (int((~stays & site.visual).sum(1)[0]) if evict else 0)
    assert rows == [length + 3] * 2 + [left] * (len(rows) - 2)
    assert out.past_key_values.get_seq_length() == length + 3


@torch.no_grad()
def test_what_a_token_gives(monkeypatch):
    """The scores are the eager attention of the layer before; padding and beams do not matter."""
    model: Any = hosts.build("llava")
    batch = hosts.prompts("llava", [[3, "image", 5], [2, "image", 1, "image", 4]])
    length = batch["input_ids"].shape[1]
    found = noted(monkeypatch)
    with tokred.applied(model, "dycoke_decode", layer=2):
        out = oracle.generate(model, batch, max_new_tokens=2)
        beams = oracle.generate(model, batch, max_new_tokens=3, num_beams=2)
    model.set_attn_implementation("eager")
    full = {**batch, "input_ids": out.sequences[:, : length + 1]}
    full["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    maps = model(**full, output_attentions=True).attentions[1][:, :, -1].mean(1)
    site = found[0][0]
    torch.testing.assert_close(site.received, maps.masked_fill(~site.visual, 0.0), rtol=1e-4, atol=1e-5)
    assert site.counts == (16, 32)
    assert all(logits.isfinite().all() for logits in beams.logits)


@torch.no_grad()
def test_with_the_first_stage_and_a_second_turn():
    model: Any = hosts.build("onevision_video")
    batch = hosts.prompts("onevision_video", [[3, "image", 5]])
    cache = cache_name(type(model).forward)
    stages = [tokred.make("dycoke", ratio=0.5), tokred.make("dycoke_decode", layer=1)]
    dense = oracle.generate(model, batch, max_new_tokens=4)
    with tokred.applied(model, [stages[0], tokred.make("dycoke_decode", layer=1, ratio=0.0)]):
        first = oracle.generate(model, batch, max_new_tokens=4)
    with tokred.applied(model, stages):
        out = oracle.generate(model, batch, max_new_tokens=4)
        rows = {layer.keys.shape[2] for layer in out.past_key_values.layers}
        turn = model(input_ids=torch.tensor([[5, 6, 7]]), **{cache: out.past_key_values}).logits
    assert rows == {batch["input_ids"].shape[1] + 3 - 4}, "four of thirteen have left before"
    assert torch.equal(first.logits[0], out.logits[0])
    assert not torch.equal(first.logits[1], out.logits[1])
    assert not torch.equal(first.logits[0], dense.logits[0])
    assert turn.isfinite().all()


@torch.no_grad()
def test_nothing_to_leave_out_is_the_model_itself():
    model: Any = hosts.build("llava")
    batch = hosts.prompts("llava", [[3, "image", 5]])
    dense = oracle.generate(model, batch)
    with tokred.applied(model, "dycoke_decode", ratio=0.0, layer=1):
        out = oracle.generate(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(dense.logits, out.logits, strict=True))


def test_refusals():
    with pytest.raises(ValueError, match="chooses among all rows: take 'fastv'"):
        tokred.apply(hosts.build("gemma3"), "dycoke_decode", layer=1)
    with pytest.raises(ValueError, match="has 4 decoder layers"):
        tokred.apply(hosts.build("llava"), "dycoke_decode", layer=4)
    model: Any = hosts.build("llava")
    tokred.apply(model, [tokred.make("dycoke_decode", layer=1), tokred.make("h2o", budget=8)])
    with pytest.raises(ValueError, match="take one of the two"):
        model.generate(**hosts.prompts("llava", [[3, "image", 5]]), max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("wrong", [{"ratio": 1.0}, {"layer": 0}, {"alike": "some"}, {"evict": 2}])
def test_bad_parameters(wrong):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        tokred.make("dycoke_decode", **wrong)

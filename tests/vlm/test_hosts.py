"""Every family: dropping tokens equals masking the same columns, however the model is used."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

import tokred
from tests.kinds import VISION_LANGUAGE, each
from tests.vlm import hosts, oracle
from tests.vlm.uneven import Uneven

ROWS: hosts.Rows = [[3, "image", 5], [2, "image", 1, "image", 4], [9]]
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "beams": {"num_beams": 2},
    "returns": {"do_sample": True, "num_return_sequences": 2},
}


@functools.cache
def model_of(name: str) -> Any:
    return hosts.build(name)


def both() -> list[Any]:
    return [Uneven(), tokred.make("fastv", layer=1, ratio=0.4)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", each(hosts.HOSTS, VISION_LANGUAGE))
def test_dropping_equals_masking(name, options):
    model = model_of(name)
    _, keeps = oracle.agree(model, hosts.layers(name, model), both(), hosts.prompts(name, ROWS), **OPTIONS[options])
    assert sorted(keeps) == [0, 1]
    assert keeps[0].sum() > keeps[1].sum()


@pytest.mark.parametrize("name", each(hosts.HOSTS, VISION_LANGUAGE))
def test_nothing_to_remove_and_removal_are_exact(name):
    model, batch = model_of(name), hosts.prompts(name, ROWS)
    stock = oracle.generate(model, batch)
    tokred.apply(model, [tokred.make("random_visual", budget=1.0), tokred.make("fastv", ratio=0.0)])
    kept = oracle.generate(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(stock.logits, kept.logits, strict=True))
    tokred.apply(model, both())
    assert oracle.generate(model, batch).past_key_values.layers[-1].keys.shape[2] < batch["input_ids"].shape[1]
    tokred.remove(model)
    again = oracle.generate(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(stock.logits, again.logits, strict=True))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", each(hosts.HOSTS, VISION_LANGUAGE))
def test_half_precision(name, dtype, close):
    """Dropping is masking as far as the precision goes."""
    model = copy.deepcopy(model_of(name)).to(dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in hosts.prompts(name, ROWS).items()}
    tokred.apply(model, both())
    pruned = oracle.generate(model, batch)
    assert all(one.isfinite().all() for one in pruned.logits)
    assert pruned.past_key_values.layers[-1].keys.dtype == dtype
    keeps = oracle.kept(pruned.past_key_values, batch["input_ids"].shape[1])
    tokred.remove(model)
    with oracle.masked(hosts.layers(name, model), keeps, batch["attention_mask"]):
        expected = oracle.generate(model, batch, max_new_tokens=1).logits[0].float()
    assert (pruned.logits[0].float() - expected).norm() < close * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("name", each(hosts.HOSTS, dict.fromkeys(("llava", "qwen2_5_vl", "gemma3"), "compiled")))
def test_compiled_layers_break_no_graph(name):
    model, batch = copy.deepcopy(model_of(name)), hosts.prompts(name, ROWS)
    tokred.apply(model, both())
    expected = oracle.generate(model, batch, max_new_tokens=2)
    torch._dynamo.reset()
    hosts.layers(name, model)[1].compile(backend="eager", fullgraph=True)  # before which tokens leave
    compiled = oracle.generate(model, batch, max_new_tokens=2)
    torch._dynamo.reset()
    for ours, theirs in zip(compiled.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def second_turn(model: Any, name: str, method: Any, image: bool) -> oracle.Keeps:
    """Check the law over two turns on one cache; gives what was kept of the second turn's tokens."""
    host, lists = hosts.HOSTS[name], hosts.layers(name, model)
    first = hosts.prompts(name, [[3, "image", 5], [6, "image", 3]])
    more = hosts.prompts(name, [[4, "image", 5], [5, "image", 2]] if image else [[4], [3]], seed=2)
    tokred.apply(model, method)
    out = oracle.generate(model, first)
    done = out.sequences
    ids = torch.cat([done, more["input_ids"]], 1)
    fill = torch.ones(2, done.shape[1] - first["input_ids"].shape[1], dtype=torch.long)
    mask = torch.cat([first["attention_mask"], fill, more["attention_mask"]], 1)
    second = {"input_ids": ids, "attention_mask": mask}
    if host.types:
        kinds = [first[host.types], 0 * fill, more[host.types]]
        second[host.types] = torch.cat(kinds, 1)
    if image:
        second |= {k: v for k, v in more.items() if k not in second}
    if image and host.types == "mm_token_type_ids":  # generate has the new grids alone, positions need all of them
        kind = "video_grid_thw" if host.video else "image_grid_thw"
        grids = {kind: torch.cat([first[kind][:1], more[kind][:1], first[kind][1:], more[kind][1:]])}
        spatial, _ = model.model.get_rope_index(ids, mm_token_type_ids=second[host.types], attention_mask=mask, **grids)
        second["position_ids"] = torch.cat([(mask.cumsum(1) - 1).clamp(min=0)[None], spatial])
    pruned = oracle.generate(model, {**second, "past_key_values": out.past_key_values})
    keeps = oracle.kept(pruned.past_key_values, ids.shape[1])
    tokred.remove(model)
    with oracle.masked(lists, keeps, mask):
        stock = oracle.generate(model, first)
        expected = oracle.generate(model, {**second, "past_key_values": stock.past_key_values})
    assert pruned.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(pruned.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    return {layer: keep[:, done.shape[1] :] for layer, keep in keeps.items()}


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("name", each(hosts.HOSTS, VISION_LANGUAGE))
def test_second_turn(name, image):
    later = second_turn(model_of(name), name, both(), image)
    assert sorted(later) == [0, 1]
    assert all(keep.all() != image for keep in later.values()), "of a new image tokens leave too"
    if image:
        assert later[0].sum() > later[1].sum()


@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
@pytest.mark.parametrize("stage", ["projector", "layer"])
def test_second_turn_of_one_stage(name, stage):
    """Masks made outside the language model are cut down where only one of the stages acts, too."""
    later = second_turn(model_of(name), name, both()[stage == "layer"], image=True)
    assert not any(keep.all() for keep in later.values())


@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
def test_token_types_of_the_new_tokens_alone(name):
    """Hosts count them from the first token of the conversation, so those that left count too."""
    model = model_of(name)
    first = hosts.prompts(name, [[3, "image", 5], [6, "image", 3]])
    more = hosts.prompts(name, [[14, "image", 5], [15, "image", 2]], seed=2)
    more["attention_mask"] = torch.cat([first["attention_mask"], more["attention_mask"]], 1)

    def both_turns() -> Any:
        return model(**more, past_key_values=model(**first, use_cache=True).past_key_values)

    with torch.no_grad():
        tokred.apply(model, "uniform_visual", budget=2)
        pruned = both_turns()
        keeps = oracle.kept(pruned.past_key_values, more["attention_mask"].shape[1])
        tokred.remove(model)
        with oracle.masked(hosts.layers(name, model), keeps, more["attention_mask"]):
            expected = both_turns()
    torch.testing.assert_close(pruned.logits[:, -1], expected.logits[:, -1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", each(hosts.HOSTS, VISION_LANGUAGE))
def test_prompt_lookup_and_no_cache(name):
    model, batch = model_of(name), hosts.prompts(name, [[3, "image", 6]])
    if model._is_stateful:
        pytest.skip("transformers drafts for no model whose layers may keep a state")
    batch["input_ids"][0, -6:] = torch.tensor([7, 8, 9, 7, 8, 9])
    tokred.apply(model, both())
    plain = oracle.generate(model, batch)
    drafted = oracle.generate(model, batch, prompt_lookup_num_tokens=3)
    first = oracle.generate(model, batch, max_new_tokens=1, use_cache=False)
    tokred.apply(model, Uneven())
    cached, without = oracle.generate(model, batch), oracle.generate(model, batch, use_cache=False)
    tokred.remove(model)
    assert plain.sequences.tolist() == drafted.sequences.tolist()
    torch.testing.assert_close(first.logits[0], plain.logits[0])
    assert cached.sequences.tolist() == without.sequences.tolist()


@pytest.mark.parametrize("name", each(hosts.HOSTS, VISION_LANGUAGE))
def test_loss_of_what_is_left(name):
    model, batch = model_of(name), hosts.prompts(name, ROWS)
    ids = batch["input_ids"]
    visual = (ids == 98) | (ids == 97)
    labels = ids.masked_fill(visual | visual.roll(1, 1) | (batch["attention_mask"].cumsum(1) < 2), -100)
    tokred.apply(model, both())
    out = model(**batch, labels=labels, use_cache=True)
    # As a trainer asks that goes on over several batches: a sum, over the tokens of all of them.
    shared = model(**batch, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    keeps = oracle.kept(out.past_key_values, labels.shape[1])
    tokred.remove(model)
    with oracle.masked(hosts.layers(name, model), keeps, batch["attention_mask"]):
        expected = model(**batch, labels=labels).loss
        wanted = model(**batch, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(shared, wanted)


@pytest.mark.parametrize("name", each(hosts.HOSTS, VISION_LANGUAGE))
def test_positions_counted_anew(name):
    """Without gaps over two turns; refused where positions have several axes."""
    model, host = model_of(name), hosts.HOSTS[name]
    method = tokred.make("uniform_visual", budget=3, positions="repack")
    if host.types == "mm_token_type_ids":
        with pytest.raises(ValueError, match=r"several axes.*positions='keep'"):
            tokred.apply(model, method)
        return
    seen: list[int] = []
    handle = hosts.layers(name, model)[0].register_forward_pre_hook(
        lambda m, a, k: seen.extend(k["position_ids"].expand(1, -1)[0].tolist()), with_kwargs=True
    )
    tokred.apply(model, method)
    turn = hosts.prompts(name, [[3, "image", 5]])
    out = oracle.generate(model, turn, max_new_tokens=3)
    more = hosts.prompts(name, [[2, "image", 4]], seed=2)
    later = {k: v for k, v in more.items() if k not in ("input_ids", "attention_mask", host.types)}
    later["input_ids"] = torch.cat([out.sequences, more["input_ids"]], 1)
    later["attention_mask"] = torch.ones_like(later["input_ids"])
    if host.types:
        later[host.types] = torch.cat([turn[host.types], torch.zeros(1, 3, dtype=torch.long), more[host.types]], 1)
    oracle.generate(model, {**later, "past_key_values": out.past_key_values}, max_new_tokens=3)
    tokred.remove(model)
    handle.remove()
    assert seen == list(range(len(seen)))
    assert len(seen) < later["input_ids"].shape[1]


def glm_clips() -> dict[str, Any]:
    """Two prompts, one with a clip and one with two: GLM-4V's frames stand at the image's id, each between marks."""
    clip = [93, *[95, *[98] * 8, 96] * 2, 94]
    rows = [[7, 8, *clip, 13, 14], [9, *clip, 10, *clip, 11, 12]]
    ids = torch.tensor([[0] * (max(map(len, rows)) - len(r)) + r for r in rows])
    return {
        "input_ids": ids, "attention_mask": (ids != 0).long(), "mm_token_type_ids": 2 * (ids == 98).long(),
        "pixel_values_videos": torch.randn(3 * 64, 96, generator=torch.Generator().manual_seed(0)),
        "video_grid_thw": torch.tensor([[2, 8, 4]] * 3),
    }  # fmt: skip


def test_videos_at_the_places_of_images():
    model, batch = model_of("glm4v"), glm_clips()
    stock = oracle.generate(model, batch)
    with tokred.applied(model, tokred.make("evs", ratio=0.0)):
        whole = oracle.generate(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(stock.logits, whole.logits, strict=True))
    method = tokred.make("evs", ratio=0.5)
    _, keeps = oracle.agree(model, hosts.layers("glm4v", model), method, batch, max_new_tokens=3)
    text = batch["attention_mask"].bool() & (batch["input_ids"] != 98)
    assert keeps[0].sum(1).tolist() == [int(text[0].sum()) + 8, int(text[1].sum()) + 16]
    again = oracle.generate(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(stock.logits, again.logits, strict=True))


def test_beams_over_videos_at_the_places_of_images():
    model, batch = model_of("glm4v"), glm_clips()
    try:
        oracle.generate(model, batch, num_beams=2)
    except ValueError:
        pytest.skip(
            "transformers repeats a video's features for each beam by the places of video_token_id, and GLM-4V's are "
            "those of images: the unpatched model fails"
        )
    oracle.agree(model, hosts.layers("glm4v", model), tokred.make("evs", ratio=0.5), batch, num_beams=2)

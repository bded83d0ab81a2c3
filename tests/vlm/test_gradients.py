"""Training through methods that move features: decided without gradient, merged with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.vlm import hosts, tiny
from tests.vlm.test_methods import SOME
from tokred.vlm.before_llm import ProjectorMethod

MERGING = ["prumerge", "prumerge_plus", "visionzip", "downsample_visual", "flash_vl", "nemotron", "vscan", "cat"]
KEEPING = ["divprune", "random_visual", "fastervlm"]
LAYERS = ["fastv", "sparsevlm", "pyramiddrop"]


def steps_of(method: ProjectorMethod) -> tuple[ProjectorMethod, list[Any]]:
    """The method, and the reductions that it makes from now on."""
    seen: list[Any] = []
    reduce = method.reduce

    def noted(site: Any) -> Any:
        seen.append(reduce(site))
        return seen[-1]

    object.__setattr__(method, "reduce", noted)
    return method, seen


def gradients(model: Any, run: Callable[[], Tensor]) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    loss = run()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", [*MERGING, *KEEPING])
def test_gradients_equal_those_of_the_merge_written_out(name):
    model, batch = tiny.llava(), tiny.prompts([[3, "image", 5], [4, "image", 4]])
    settings = SOME.get(name, {"budget": 4})
    if name == "cat":
        settings = {"selector": tokred.make("vscan", window=2, shallow=0), "n_min": 2, "n_max": 9}
    method, seen = steps_of(tokred.make(name, **settings))
    space = method.space
    weight = torch.randn(99, generator=torch.Generator().manual_seed(3))
    tokred.apply(model, method)
    found = gradients(model, lambda: (model(**batch).logits[:, -4:] * weight).sum())
    tokred.remove(model)
    (step,) = seen

    def by_hand() -> Tensor:
        core, ids = model.model, batch["input_ids"]
        tower = core.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        if space == "tower" and step.mode != "keep":
            features = core.multi_modal_projector(step.merge(tower))
        else:
            features = step.merge(core.multi_modal_projector(tower))
        logits = []
        for i in range(2):
            first = int((ids[i] == tiny.IMAGE).nonzero()[0])
            real = torch.ones(step.slots, dtype=torch.bool) if step.mask is None else step.mask[i]
            stays, order = step.representative[i, real].sort()
            words = core.get_input_embeddings()(ids[i])
            parts = [words[:first], features[i, real][order], words[first + 16 :]]
            places = torch.cat([torch.arange(first), first + stays, torch.arange(first + 16, ids.shape[1])])
            out = core.language_model(
                inputs_embeds=torch.cat(parts)[None], position_ids=places[None],
                attention_mask=torch.ones(1, len(places)),
            )  # fmt: skip
            logits.append(model.lm_head(out.last_hidden_state)[:, -4:])
        return (torch.cat(logits) * weight).sum()

    expected = gradients(model, by_hand)
    for key in ("model.multi_modal_projector.linear_1.weight", "model.language_model.embed_tokens.weight"):
        assert found[key] is not None
        assert found[key].abs().sum() > 0
    for key, wanted in expected.items():
        got = found[key]
        assert (got is None) == (wanted is None), key
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-4 * float(wanted.abs().max() + 1), msg=key)


@pytest.mark.parametrize("method", [*MERGING, *LAYERS])
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "internvl", "paligemma"])
def test_every_part_learns(name, method):
    settings = {**SOME.get(method, {})}
    settings.update({"cat": {"n_min": 2, "n_max": 9}, "fastv": {"layer": 1}}.get(method, {}))
    model, batch = hosts.build(name), hosts.prompts(name, [[3, "image", 5], [4, "image", 4]])
    try:
        tokred.apply(model, method, **settings)
    except tokred.MissingInputError:
        pytest.skip("not for this tower")
    model.train()
    found = gradients(model, lambda: model(**batch).logits[:, -4:].square().sum())
    tokred.remove(model)
    stock = gradients(model, lambda: model(**batch).logits[:, -4:].square().sum())
    learning = {key for key, grad in stock.items() if grad is not None and grad.abs().sum() > 0}
    assert learning == {key for key, grad in found.items() if grad is not None and grad.abs().sum() > 0}
    embeds = next(key for key in learning if "embed_tokens" in key)
    assert found[embeds] is not None

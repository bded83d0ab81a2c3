"""Perturbed-attention guidance: processors that run some samples of a batch in another way than the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from tests.diffusion.test_hosts import METHODS, NOTHING
from tests.diffusion.tiny import MODELS, inputs, run
from tokred import adapters

FOR_IMAGES = {name: given for name, given in METHODS.items() if name != "vidtome"}
FOR_IMAGES |= {
    "keymerge of all": {"ratio": 0.75, "cell": 2, "max_downsample": 8, "queries": True},
    "toma of attention": {**METHODS["toma"], "cover": "attention", "share": "block"},
}


def plain(kind: str) -> nn.Module:
    """The processors of the joint attention know no norms of queries and keys."""
    model = MODELS[kind]()
    for module in model.modules():
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            if hasattr(module, norm):
                setattr(module, norm, None)
    return model


def perturbed(kind: str, guided: bool) -> nn.Module:
    from diffusers.models import attention_processor

    model = plain(kind)
    name = "Joint" if kind == "sd3" else "IdentitySelf"
    processor = getattr(attention_processor, f"PAG{'CFG' if guided else ''}{name}AttnProcessor2_0")()
    for part in adapters.find(model, "attention").parts:
        part.sublayers[0][1].set_processor(processor)
    return model


def samples(given: dict[str, Any], rows: Any) -> dict[str, Any]:
    return {k: v[rows] if isinstance(v, Tensor) else v for k, v in given.items()}


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "pixart", "sd3"])
@pytest.mark.parametrize("name", list(FOR_IMAGES))
def test_samples_are_what_they_are_alone(kind: str, name: str):
    """Those with attention as usual, and the perturbed one, whichever others there are."""
    given, settings, method = inputs(kind, batch=3), FOR_IMAGES[name], name.partition(" ")[0]
    if kind == "sdxl":
        given["added_cond_kwargs"] = {k: v[:1] for k, v in given["added_cond_kwargs"].items()}
    one = given.pop("added_cond_kwargs", {})

    def extra(n: int) -> dict[str, Any]:
        return {"added_cond_kwargs": {k: v if v is None else v.expand(n, -1) for k, v in one.items()}} if one else {}

    model = perturbed(kind, True)
    before = run(model, given | extra(3))
    with tokred.applied(model, method, **NOTHING[method]):
        assert torch.equal(run(model, given | extra(3)), before)
    tokred.apply(model, method, **settings)
    out = run(model, given | extra(3))
    assert tokred.report(model).reduced > 0
    usual = run(tokred.apply(plain(kind), method, **settings), samples(given, slice(0, 2)) | extra(2))
    torch.testing.assert_close(out[:2], usual, rtol=1e-4, atol=1e-5)
    other = run(tokred.apply(perturbed(kind, False), method, **settings), samples(given, slice(1, 3)) | extra(2))
    torch.testing.assert_close(out[1:], other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, before, atol=1e-4)
    assert torch.nn.functional.cosine_similarity(out[2].flatten(), before[2].flatten(), 0) > 0.8


def test_perturbed_tokens_get_their_slot_s_value():
    """By hand: a token that looks at itself alone, merged with others, gets what they make together."""
    model = perturbed("sd15", False)
    attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    tokred.apply(model, "tomesd", ratio=0.5)
    seen: dict[str, Tensor] = {}
    attention.register_forward_hook(lambda m, a, out: seen.update(x=a[0], y=out))
    run(model, inputs("sd15"))
    plan = next(iter(model.__dict__["_tokred"].plans.values())).reduction
    x = seen["x"]
    one = tokred.Reduction(plan.representative[1:], plan.source[1:], plan.target[1:], 256, by_size=False)
    with torch.no_grad():
        expected = one.unmerge(attention.to_out[0](attention.to_v(one.merge(x[1:]))))
    torch.testing.assert_close(seen["y"][1:], expected, rtol=1e-4, atol=1e-5)


def test_keys_of_perturbed_tokens_are_left_alone():
    model = perturbed("sd15", False)
    attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    tokred.apply(model, "todo", factors=(2, 2))
    seen: dict[str, Tensor] = {}
    attention.register_forward_hook(lambda m, a, out: seen.update(x=a[0], y=out))
    run(model, inputs("sd15"))
    with torch.no_grad():
        expected = attention.to_out[0](attention.to_v(seen["x"][1:]))
    torch.testing.assert_close(seen["y"][1:], expected, rtol=1e-4, atol=1e-5)


def test_plans_are_kept_for_both_parts():
    model, given = perturbed("sd3", True), inputs("sd3", batch=3)
    made: list[int] = []
    original = tokred.AsymRnR.reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokred.AsymRnR, "reduce", lambda self, site: (made.append(1), original(self, site))[1])
        tokred.apply(model, "asymrnr", q=0.5, kv=0.5, refresh=3, first_full=0)
        for time in (90, 80, 70):
            run(model, {**given, "timestep": torch.full((3,), time)})
    first = len(made)
    assert 0 < first <= 6 * 2, "once for three steps"


def test_parts_that_cannot_be_told_are_refused():
    class Scaled:
        """Projects a part of the batch that is not the one it was given."""

        def __call__(self, attn: Any, hidden_states: Tensor, **_: Any) -> Tensor:
            half = hidden_states[:1, :128]
            attn.to_q(half)
            return hidden_states

    class Late:
        def __call__(self, attn: Any, hidden_states: Tensor, **_: Any) -> Tensor:
            attn.to_q(hidden_states)
            return attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states)[:1]))

    for processor, words in ((Scaled(), "whose samples cannot be told"), (Late(), "that it has not projected")):
        model = tokred.apply(MODELS["sd15"](), "tomesd")
        model.set_attn_processor(processor)
        with pytest.raises(tokred.UnsupportedModelError, match=words):
            run(model, inputs("sd15"))

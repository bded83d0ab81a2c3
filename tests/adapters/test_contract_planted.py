"""One host of each library that renames something of its own: one spelling in the contract is all that it takes."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import tokred
from tests.adapters.test_contract_renamed import spell
from tokred.adapters.contract import members, words
from tokred.adapters.contract.spelling import Word


class Planted(NamedTuple):
    """A renaming.

    Attributes:
        library: that renames.
        word: the row of the contract.
        new: the spelling.
        code: methods of the host, as ``module:Class.method``, that spell it.
        build: makes a model.
        run: the output of the model.
        method: that acts on it, with its settings.
    """

    library: str
    word: Word
    new: str
    code: tuple[str, ...]
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]
    method: str
    settings: dict[str, Any]


def _timm() -> nn.Module:
    from tokred.adapters.tiny import timm

    return timm.build("vit")


def _images(model: nn.Module) -> Tensor:
    from tokred.adapters.tiny import timm

    return model(timm.images())  # type: ignore[no-any-return]


def _open_clip() -> nn.Module:
    from tokred.adapters.tiny import open_clip

    return open_clip.build("CLIP")


def _both(model: Any) -> Tensor:
    from tokred.adapters.tiny import open_clip

    image, _ = open_clip.inputs("CLIP")
    return model.encode_image(image)  # type: ignore[no-any-return]


def _llava() -> nn.Module:
    from tokred.adapters.tiny import vlm

    return vlm.build("llava")  # type: ignore[no-any-return]


def _prompt(model: nn.Module) -> Tensor:
    from tokred.adapters.tiny import vlm

    return model(**vlm.prompts("llava", [[4, "image", 5], [7, "image", 2]])).logits[:, -1]  # type: ignore[no-any-return]


def _unet() -> nn.Module:
    from tokred.adapters.tiny import diffusion

    return diffusion.build("sd15")


def _noise(model: nn.Module) -> Tensor:
    from tokred.adapters.tiny import diffusion

    return diffusion.run(model, diffusion.inputs("sd15"))


_TIMM, _ATTENTION = "timm.models.vision_transformer", "diffusers.models.attention_processor"
PLANTED = {
    "a sub-module of timm": Planted(
        "timm", words.PATCHES, "make_patches", (f"{_TIMM}:VisionTransformer.forward_features",), _timm, _images,
        "tome", {"r": 3},
    ),
    "an attention of timm": Planted(
        "timm", words.FUSED, "in_one_kernel", ("timm.models.vision_transformer:Attention.forward",), _timm, _images,
        "tome", {"r": 3},
    ),
    "blocks of open_clip": Planted(
        "open_clip", members.BLOCKS_OF_CLIP, "layers_of_it", ("open_clip.transformer:Transformer.forward",),
        _open_clip, _both, "tome", {"r": 3},
    ),
    "a configuration of transformers": Planted(
        "transformers", words.IMAGE_TOKEN, "picture_token_id",
        ("transformers.models.llava.modeling_llava:LlavaModel.get_placeholder_mask",), _llava, _prompt,
        "divprune", {"budget": 4},
    ),
    "a projection of diffusers": Planted(
        "diffusers", members.TO_QUERY, "make_queries", (f"{_ATTENTION}:AttnProcessor2_0.__call__",), _unet, _noise,
        "tomesd", {"ratio": 0.5},
    ),
    "the last layer of diffusers": Planted(
        "diffusers", members.TO_OUTPUT, "to_the_end", (f"{_ATTENTION}:AttnProcessor2_0.__call__",), _unet, _noise,
        "tomesd", {"ratio": 0.5},
    ),
}  # fmt: skip


def rewrite(monkeypatch: pytest.MonkeyPatch, where: str, old: str, new: str) -> None:
    """Let a method of a host spell an attribute in another way."""
    module, _, path = where.partition(":")
    cls = getattr(pytest.importorskip(module), path.partition(".")[0])
    function = getattr(cls, path.partition(".")[2])
    text = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    changed = re.sub(rf"\.{old}\b", f".{new}", text)
    assert changed != text
    scope = dict(vars(sys.modules[cls.__module__]))
    exec(compile(changed, f"<{where}>", "exec"), scope)
    monkeypatch.setattr(cls, function.__name__, scope[function.__name__])


def rename(model: nn.Module, old: str, new: str) -> nn.Module:
    """Give a model's sub-modules, attributes and settings of this name another one."""
    for module in [*model.modules()]:
        module._modules = {new if name == old else name: child for name, child in module._modules.items()}
        for held in (module.__dict__, getattr(getattr(module, "config", None), "__dict__", {})):
            known = getattr(getattr(module, "config", None), "attribute_map", {}).get(old, old)
            for name in {old, known} & set(held):
                held[new] = held.pop(name)
    return model


@pytest.mark.parametrize("case", PLANTED)
def test_one_spelling_is_all_that_a_renaming_takes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PLANTED[case]
    pytest.importorskip(plan.library)
    old = plan.word.name
    with torch.no_grad():
        alone = plan.run(plan.build())
        expected = plan.run(tokred.apply(plan.build(), plan.method, **plan.settings))
        assert not torch.equal(expected, alone)  # the method does something

        for where in plan.code:
            rewrite(monkeypatch, where, old, plan.new)

        def changed() -> nn.Module:
            return rename(plan.build(), old, plan.new)

        assert torch.equal(plan.run(changed()), alone)  # the host works under the new name
        with pytest.raises((AttributeError, RuntimeError, tokred.TokredError)):
            plan.run(tokred.apply(changed(), plan.method, **plan.settings))
        spell(monkeypatch, plan.word, plan.new, plan.library)
        assert torch.equal(plan.run(tokred.apply(changed(), plan.method, **plan.settings)), expected)

"""A host that renames an argument: one spelling in the contract is all that it takes."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

import tokred
from tokred.adapters.contract import words
from tokred.adapters.contract.spelling import Spelling, Word
from tokred.adapters.tiny import kv
from tokred.adapters.tiny.weights import livelier

transformers = pytest.importorskip("transformers")


def spell(monkeypatch: pytest.MonkeyPatch, word: Word, name: str, library: str = "transformers") -> None:
    """Give a row of the contract one more spelling."""
    row = Spelling(name, library, since="99.0")
    changed = Word(word.role, (row, *word.spellings), (name, *word.names))
    monkeypatch.setitem(word.__dict__, "spellings", changed.spellings)
    monkeypatch.setitem(word.__dict__, "names", changed.names)


def rename(monkeypatch: pytest.MonkeyPatch, cls: type[nn.Module]) -> None:
    """Let a class's forward take its padding mask as ``mask``, and under no other name."""
    original = cls.forward
    signature = inspect.signature(original)
    renamed = [p.replace(name="mask") if p.name == "attention_mask" else p for p in signature.parameters.values()]

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        if "attention_mask" in kwargs:
            raise TypeError("forward() got an unexpected keyword argument 'attention_mask'")
        if "mask" in kwargs:
            kwargs["attention_mask"] = kwargs.pop("mask")
        return original(self, *args, **kwargs)

    forward.__signature__ = signature.replace(parameters=renamed)  # type: ignore[attr-defined]
    monkeypatch.setattr(cls, "forward", forward)


def text_encoder() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0
    )
    return livelier(transformers.BertModel(config)).eval()  # type: ignore[no-any-return]


def language_model() -> nn.Module:
    return kv.build("llama").model  # type: ignore[no-any-return]


def states(model: nn.Module, name: str) -> Tensor:
    """Last states of two prompts, of which the second one is shorter."""
    torch.manual_seed(1)
    ids, mask = torch.randint(3, 97, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    ids[1, 14:] = mask[1, 14:] = 0
    with torch.no_grad():
        return model(input_ids=ids, **{name: mask}).last_hidden_state  # type: ignore[no-any-return]


FASTKV = {"window": 4, "cap": 12, "tsp_len": 8, "tsp_layer": 1}
HOSTS = {
    "a layer of an encoder": (text_encoder, transformers.BertLayer, "attention_mask", "tome", {"r": 3}),
    "a decoder": (
        language_model,
        transformers.LlamaModel,
        "mask",
        "fastkv",
        FASTKV,
    ),
}


@pytest.mark.parametrize("case", HOSTS)
def test_one_spelling_is_all_that_a_renamed_argument_takes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, cls, name, method, settings = HOSTS[case]
    model = build()
    expected = states(tokred.apply(model, method, **settings), "attention_mask")
    alone = states(tokred.remove(model), "attention_mask")
    assert not torch.equal(expected, alone)  # the method does something

    rename(monkeypatch, cls)
    assert torch.equal(states(model, name), alone)
    assert differs(build(), name, method, settings, expected)
    spell(monkeypatch, words.ATTENTION_MASK, "mask")
    assert torch.equal(states(tokred.apply(build(), method, **settings), name), expected)


def differs(model: nn.Module, name: str, method: str, settings: dict[str, object], expected: Tensor) -> bool:
    """Whether a patched model fails, or gives something else."""
    try:
        found = states(tokred.apply(model, method, **settings), name)
    except (RuntimeError, TypeError, tokred.BypassedError, tokred.UnsupportedModelError):
        return True
    return not torch.equal(found, expected)

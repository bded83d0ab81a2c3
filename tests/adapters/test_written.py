"""The models whose weights are written by hand do what their pages say, as long as what they need is there."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tokred.adapters.tiny import recall, sight


def answered(model, prompts, answers):
    """The share of words that are right."""
    n = answers.shape[1]
    ids = model.generate(prompts, max_new_tokens=n, do_sample=False, eos_token_id=None)[:, -n:]
    return float((ids == answers).float().mean())


def test_the_one_that_recalls_needs_the_rows_of_the_answer():
    model = recall.build()
    prompts, answers = recall.texts(8, length=200)
    assert prompts.shape == (8, 200)
    assert all(len(row.unique()) == 199 for row in prompts)
    assert answered(model, prompts, answers) == 1
    with tokred.applied(model, "snapkv", budget=0.2, window=8):
        seen = answered(model, prompts, answers)
    with tokred.applied(model, "knorm", budget=0.2):
        blind = answered(model, prompts, answers)
    assert seen > 0.7 > 0.5 > blind
    with pytest.raises(ValueError, match=r"length must lie in 6\.\.501, got 502"):
        recall.texts(1, length=502)


def test_the_one_that_sees_needs_the_token_of_the_answer():
    model = sight.build()
    asked = sight.questions(24)
    # The placeholders are no special tokens, and colours are no patterns.
    assert int(asked.answers.min()) >= sight.FIRST_COLOUR
    given, right = asked.batch(), asked.answers[:, None]

    def share():
        ids = model.generate(**given, max_new_tokens=1, do_sample=False)[:, -1:]
        return float((ids == right).float().mean())

    assert share() == 1
    # Sixteen tokens hold all that is to be seen; with eight, whoever reads the question does better.
    found = {}
    for name, options in {
        "divprune": {"budget": 16}, "fastervlm": {"budget": 8}, "fastv": {"layer": 2, "ratio": 0.875},
        "random_visual": {"budget": 16},
    }.items():  # fmt: skip
        with tokred.applied(model, name, **options):
            found[name] = share()
    assert found["divprune"] == found["fastv"] == 1
    assert found["fastervlm"] < 0.9
    assert found["random_visual"] < 0.7
    # The class token looks at patterns alone: what it picks holds an answer each time.
    with torch.inference_mode(), tokred.applied(model, "fastervlm", budget=16):
        assert share() == 1

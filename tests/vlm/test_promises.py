"""Promises of ``supports`` about models with vision: every method runs, on every family, where samples differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokred
from tests.vlm import hosts, oracle
from tokred.adapters.tiny.vlm import HYBRIDS

ROWS = [[70, "image", 5], [3, "image", 4, "image", 2], [90]]


def families() -> list[Any]:
    """In every run one that makes its masks itself, one of few layers with rows, and one of neither."""
    some = ("llava", "gemma3", "qwen3_5_states")
    return [name if name in some else pytest.param(name, marks=pytest.mark.hosts) for name in (*hosts.HOSTS, *HYBRIDS)]


@pytest.mark.parametrize("family", families())
def test_what_is_promised_runs(family: str) -> None:
    model, batch = hosts.build(family), hosts.prompts(family, ROWS)
    promised = [row.method for row in tokred.supports(model) if row.works]
    assert len(promised) > 30
    failed = {}
    with torch.no_grad():
        for name in promised:
            try:
                tokred.apply(model, name)
            except ValueError:  # such small models have too few layers for it, or it wants statistics
                continue
            try:
                oracle.generate(model, batch, max_new_tokens=3)
            except tokred.MissingInputError:  # that of frames, which are pooled
                continue
            except Exception as error:  # of whatever kind: all that are wrong are told at once
                failed[name] = f"{type(error).__name__}: {error}"
            finally:
                tokred.remove(model)
    assert not failed

"""Laws of all methods that act in the blocks of an encoder."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.encoder.blocks import SETTINGS, assert_equal, method, site, tensors

HALF = [torch.bfloat16, torch.float16]
HEADS = [(4, 4), (2, 2), (3, 3), (6, 2), (1, 1)]


def test_all_methods_are_here():
    names = {name for name in tokred.list_methods() if tokred.make(name).stage == "block"}
    assert {label.partition("-")[0] for label in SETTINGS} == names


@pytest.mark.parametrize("label", SETTINGS)
def test_something_is_removed(label):
    step = method(label).reduce(site(label, tensors(0)))
    assert not step.trivial
    assert step.slots < 18


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("label", SETTINGS)
def test_half_precision_decides_as_the_same_values_in_float32(label, dtype):
    one = method(label)
    for seed in range(12):
        heads, kv_heads = HEADS[seed % len(HEADS)]
        given = tensors(seed, heads=heads, kv_heads=kv_heads, width=32 if seed > 8 else 6)
        low = {k: v.to(dtype) for k, v in given.items()}
        expected = one.reduce(site(label, {k: v.float() for k, v in low.items()}))
        assert_equal(one.reduce(site(label, low)), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(one.reduce(site(label, low)), expected)

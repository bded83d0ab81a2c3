"""Names, entry points, and a method that lives outside tokred."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import tokred
from tokred.core.registry import Registry


def test_every_registered_method_is_complete():
    for name in tokred.list_methods():
        method = tokred.make(name)
        assert method.name == name
        assert method.summary
        assert method.source
        assert method.__doc__
        assert method.reads


def test_double_and_odd_names_are_refused():
    registry = Registry("tokred.nothing")
    registry.add("a", "m:A")
    registry.add("a", "m:A")
    with pytest.raises(ValueError, match="'a' is taken by m:A"):
        registry.add("a", "m:B")
    with pytest.raises(ValueError, match="lower-case"):
        registry.add("My Method", "m:C")


def test_a_method_in_one_class_runs():
    @tokred.register("every_second")
    @dataclass(frozen=True)
    class EverySecond(tokred.Method):
        """Keep every second token."""

        def tokens(self, n, *, layer, depth, prefix=0, suffix=0):
            return (n + 1) // 2

        def reduce(self, site):
            b, n = site.shape
            return tokred.Reduction.keep(torch.arange(0, n, 2).expand(b, -1), n)

    r = tokred.make("every_second").reduce(tokred.Site(x=torch.zeros(2, 5, 1)))
    assert r.representative.tolist() == [[0, 2, 4]] * 2
    from tokred.core.registry import methods

    del methods._targets["every_second"]

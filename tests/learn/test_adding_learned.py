"""A learned method from a scratch file: one class, one module, and the whole seam knows it."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

pytest.importorskip("timm")

import tokred
from tests.encoder.tiny_timm import build, images
from tokred import learn
from tokred.core.registry import methods

FILE = '''
"""Keep the tokens with the largest learned projection."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

import tokred
from tokred.core.selection import protected_rows, ranked


@tokred.register("projected")
@dataclass(frozen=True)
class Projected(tokred.BlockMethod):
    """Keep half of the tokens in the second block."""

    summary: ClassVar[str] = "keep the largest projections"
    drops: ClassVar[bool] = True
    gradients: ClassVar[bool] = True
    example: ClassVar[dict] = {}

    @property
    def reads(self):
        return frozenset({"x", "module"})

    def module(self, facts):
        return nn.Linear(facts.width, 1)

    def tokens(self, n, place):
        return n - place.free(n) // 2 if place.layer == 1 else n

    def reduce(self, site):
        b, n = site.shape
        x = site.x[:, site.prefix : n - site.suffix]
        score = site.learned.module(x)[..., 0]
        if site.learned.training:
            gate = torch.sigmoid(score.float())
            site.learned.losses["share"] = (gate.mean() - 0.5).square()
            return tokred.Reduction.soft(nn.functional.pad(gate, (site.prefix, site.suffix), value=1.0), "rows")
        order = ranked(score.detach())[:, : x.shape[1] - x.shape[1] // 2] + site.prefix
        lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
        return tokred.Reduction.keep(torch.cat([lead, order.sort(1).values, tail], 1), n)
'''

RECIPE = """
method = "projected"

[training]
steps = 10
batch = 8
lr = 0.0
lr_method = 1e-2
"""


@pytest.fixture
def scratch(tmp_path):
    """The file, imported; forgotten afterwards."""
    path = tmp_path / "projected_scratch.py"
    path.write_text(FILE)
    known = dict(methods._targets)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]
    methods._targets.clear()
    methods._targets.update(known)


def test_the_whole_seam_knows_it(scratch, tmp_path):
    torch.manual_seed(0)
    model, x = build("vit"), images(32)
    y = x.mean((2, 3)).argmax(1)
    assert "projected" in tokred.list_methods(model=model)
    plain = model(x[:2])
    tokred.apply(model, "projected")
    assert tokred.modules(model)["projected"].in_features == 48
    with torch.no_grad():
        model(x[:2])
    assert [layer.tokens_out for layer in tokred.report(model).layers] == [26, 14, 14]

    (tmp_path / "recipe.toml").write_text(RECIPE)
    recipe = learn.recipe(tmp_path / "recipe.toml")
    before = tokred.modules(model)["projected"].weight.detach().clone()
    found = learn.fit(
        model, learn.endless(x, y, recipe.batch), recipe, modules=tokred.modules(model).values(), losses=tokred.losses
    )
    assert "projected.share" in found[0].terms
    assert not torch.equal(tokred.modules(model)["projected"].weight, before)

    folder = tokred.save(model, tmp_path / "saved")
    other = tokred.apply(build("vit"), tokred.load(folder))
    with torch.no_grad():
        assert torch.equal(other(x[:2]), model(x[:2]))
        tokred.remove(model)
        assert torch.equal(model(x[:2]), plain)

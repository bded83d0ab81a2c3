"""Whoever adds a method, a KV preset with its score, or a host, makes one file and touches one row.

A package of somebody else is written into a scratch folder and declared as an installed one; nothing of tokred's own
changes. Then everything has to find it: lists, tables of support, the law tests, the doctor, the arms of benchmarks.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
import textwrap
import types

import pytest
import torch

pytest.importorskip("timm")

import tokred
from tests import registered
from tests.encoder import method_table
from tests.encoder.tiny_timm import build, images
from tests.plugins import Plugins
from tests.plugins import plugins as plugins
from tokred import doctor
from tokred.bench import arms

KEEP_NORM = """
from dataclasses import dataclass
from typing import ClassVar

import torch

import tokred
from tokred.core.method import Parameters
from tokred.core.selection import protected_rows, ranked
from tokred.encoder.method import Scheduled


@dataclass(frozen=True)
class KeepNorm(Scheduled):
    "Drop the r shortest tokens."

    summary: ClassVar[str] = "drop the r shortest tokens in every block"
    source: ClassVar[str] = "example"
    drops: ClassVar[bool] = True

    @property
    def reads(self):
        return frozenset({"x"})

    def reduce(self, site):
        b, n = site.shape
        left = self.tokens(n, tokred.Place.of(site)) - site.prefix - site.suffix
        order = ranked(site.x[:, site.prefix : n - site.suffix].float().norm(dim=-1))
        lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
        rows = order[:, :left].sort(dim=1).values + site.prefix
        return tokred.Reduction.keep(torch.cat([lead, rows, tail], dim=1), n)
"""
# It decides by a number that no other method has.
TILT = """
from dataclasses import dataclass
from typing import ClassVar

import tokred
from tokred.core.checks import check_share
from tokred.core.method import Parameters


@dataclass(frozen=True)
class Tilt(tokred.BlockMethod):
    "Keep the first tokens."

    summary: ClassVar[str] = "keep the first tokens of every block"
    source: ClassVar[str] = "example"
    drops: ClassVar[bool] = True
    example: ClassVar[Parameters] = {"lean": 0.8}
    nothing: ClassVar[Parameters] = {"lean": 1.0}

    lean: float = 0.8

    def __post_init__(self):
        check_share(self.lean, "lean")

    def tokens(self, n, place):
        return place.prefix + max(1, round(place.free(n) * self.lean)) + place.suffix

    def reduce(self, site):
        import torch

        b, n = site.shape
        left = self.tokens(n, tokred.Place.of(site))
        rows = torch.arange(n)[[*range(left - site.suffix), *range(n - site.suffix, n)]]
        return tokred.Reduction.keep(rows.to(site.device).expand(b, -1), n)
"""
LOUDEST = """
from dataclasses import dataclass
from typing import ClassVar

from tokred.kv import Score
from tokred.kv.policy import BudgetLike, CachePolicy, Parts, as_budget, check_room


@dataclass(frozen=True)
class Volume(Score):
    "The length of the value."

    name: ClassVar[str] = "volume"

    def __call__(self, site):
        return site.v.float().norm(dim=-1)


@dataclass(frozen=True)
class Loudest(CachePolicy):
    "Rows with the longest values stay."

    summary: ClassVar[str] = "rows with the longest values"
    source: ClassVar[str] = "example"

    budget: BudgetLike = 0.5

    def __post_init__(self):
        object.__setattr__(self, "budget", as_budget(self.budget))
        check_room(self)

    @property
    def parts(self):
        return Parts(Volume(), as_budget(self.budget))
"""
TOWER = """
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import nn


class Tower(nn.Module):
    "A vision transformer of a class that tokred has not seen."

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, num_classes):
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(embed_dim), nn.Linear(embed_dim, num_classes)

    def forward_features(self, x):
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.norm(self.blocks(x))

    def forward(self, x):
        return self.head(self.forward_features(x)[:, 0])
"""


def healthy(only: str, pattern: str) -> None:
    """The doctor's laws find the methods of a pattern, and hold with them."""
    cases = doctor.choose([only], pattern)
    assert [case.family.partition(" on ")[0] for case in cases] == [pattern]
    for row in doctor.examine(cases):
        assert {"nothing", "fewer", "removed"} <= set(row.broken)
        assert row.healthy, row


@pytest.mark.parametrize(
    ("name", "cls", "source", "knob"),
    [("keep_norm", "KeepNorm", KEEP_NORM, ("r", False)), ("tilt", "Tilt", TILT, ("lean", True))],
)
def test_a_method_of_encoders_is_one_row(name, cls, source, knob, plugins: Plugins, monkeypatch):
    model = build("vit")
    before = set(tokred.list_methods())
    assert name not in before
    plugins.add(name, f"scratch_{name}", source, cls)

    assert set(tokred.list_methods()) == before | {name}
    assert name in tokred.list_methods(stage="block")
    assert name in tokred.list_methods(model=model)
    assert {row.method: row.works for row in tokred.supports(model)}[name]
    method = tokred.make(name, **tokred.core.registry.methods.get(name).example)
    assert tokred.core.method.from_dict(method.to_dict()) == method
    with tokred.applied(model, method), torch.no_grad():
        model(images(2))
        assert tokred.report(model).layers[-1].tokens_out < 26

    # The tables of the law tests, and the laws.
    tables = registered.examples("block"), registered.nothings("block")
    assert all(name in table for table in tables)
    for attribute, table in zip(("SETTINGS", "NOTHING"), tables, strict=True):
        monkeypatch.setattr(method_table, attribute, {name: table[name]})
    (cell,) = method_table.cells("timm", "vit", build("vit"), lambda m: [m(images(2))])
    assert (cell.method, cell.missing) == (name, "")
    healthy("timm", name)

    # The arms of benchmarks.
    assert arms.knob(name) == knob
    shape = (2, 3, 40, 40)
    full = arms.unpatched(model, shape).macs
    (arm,) = arms.ladder(model, shape, [name], [int(0.8 * full)])
    assert arm.macs / full == pytest.approx(0.8, abs=0.05)
    from benchmarks.encoder import methods

    assert name in methods.every_method()
    assert all(text.startswith(f"{name} {knob[0]}=") for text in methods.candidates(name))


def test_a_preset_of_caches_with_its_score_is_one_row(plugins: Plugins):
    pytest.importorskip("transformers")
    from tests.kv.tiny import build, prompt

    plugins.add("loudest", "scratch_loudest", LOUDEST, "Loudest")
    model = build("llama")
    assert "loudest" in tokred.list_methods(stage="cache")
    assert {row.method: row.works for row in tokred.supports(model)}["loudest"]
    assert tokred.make("kv", score="volume", budget=9).score == tokred.make("loudest", budget=9).parts.score
    tokred.apply(model, "loudest", **registered.examples("cache")["loudest"])
    with torch.no_grad():
        model.generate(prompt(24, 1), max_new_tokens=2, do_sample=False)
    assert all(row.rows < row.seen for row in tokred.report(model).layers)
    assert registered.nothings("cache")["loudest"] == {"budget": 1.0}
    healthy("kv", "loudest")

    found = runpy.run_module("benchmarks.kv.quality", alter_sys=True)
    assert found["POLICIES"]["loudest"](0.25) == tokred.make("loudest", budget=0.25)


DOUBLE = """
from dataclasses import dataclass
from typing import ClassVar

from tokred.kv import Rectangle, Uniform


@dataclass(frozen=True)
class Marked(Rectangle):
    "Rows as they are, on a shelf that counts how often they were taken."

    name: ClassVar[str] = "marked"
    taken: ClassVar[list] = []

    def open(self):
        shelf = super().open()
        take = shelf.take

        def counted(*args, **kwargs):
            self.taken.append(shelf.width)
            return take(*args, **kwargs)

        shelf.take = counted
        return shelf


@dataclass(frozen=True)
class Ten(Uniform):
    "Ten rows, whatever is asked."

    name: ClassVar[str] = "ten"

    amount: object = 10
"""


def test_a_store_and_a_budget_are_one_row_each(plugins: Plugins):
    pytest.importorskip("transformers")
    from tests.kv.tiny import build, prompt

    plugins.add("marked", "scratch_parts", DOUBLE, "Marked", group="tokred.parts")
    plugins.add("ten", "scratch_parts", DOUBLE, "Ten", group="tokred.parts")
    assert tokred.make("snapkv", store="marked").parts.store.name == "marked"
    assert tokred.from_dict(tokred.make("snapkv", store="marked").to_dict()) == tokred.make("snapkv", store="marked")
    with pytest.raises(ValueError, match="did you mean 'marked'"):
        tokred.make("snapkv", store="markde")
    model = build("llama")
    expected = tokred.apply(model, "kv", score="key_norm", budget=10).generate(
        prompt(24, 1), max_new_tokens=3, do_sample=False
    )
    rows = [row.rows for row in tokred.report(model).layers]
    tokred.apply(model, "kv", score="key_norm", budget="ten", store="marked")
    found = model.generate(prompt(24, 1), max_new_tokens=3, do_sample=False)
    assert torch.equal(found, expected)
    assert [row.rows for row in tokred.report(model).layers] == rows
    assert tokred.make("kv", store="marked").store.taken, "the shelf was used"


def test_a_method_of_visual_tokens_is_one_row(plugins: Plugins):
    pytest.importorskip("transformers")
    source = textwrap.dedent("""
        from dataclasses import dataclass

        from tokred.methods.vlm.visual_baselines import UniformVisual


        @dataclass(frozen=True)
        class Plugin(UniformVisual):
            "Evenly spaced ones."
    """)
    plugins.add("even_visual", "scratch_even", source)
    assert "even_visual" in tokred.list_methods(stage="projector")
    assert "even_visual" in registered.examples("projector")
    healthy("vlm", "even_visual")
    found = runpy.run_module("benchmarks.vlm.cost", alter_sys=True)
    assert found["METHODS"]["even_visual"](0.5, 4, 3).parameters == {"budget": 0.5}


def test_a_method_of_denoisers_is_one_row(plugins: Plugins):
    pytest.importorskip("diffusers")
    source = textwrap.dedent("""
        from dataclasses import dataclass

        from tokred.methods.diffusion.random_latent import RandomLatentPrune


        @dataclass(frozen=True)
        class Plugin(RandomLatentPrune):
            "Others by chance."
    """)
    plugins.add("other_latent", "scratch_latent", source)
    assert "other_latent" in tokred.list_methods(stage="attention")
    assert registered.examples("attention")["other_latent"] == registered.examples("attention")["random_latent_prune"]
    healthy("diffusion", "other_latent")


def test_a_host_of_a_known_shape_is_one_row_and_one_of_its_tiny_model(plugins: Plugins, monkeypatch):
    from tokred.adapters.encoder import timm
    from tokred.adapters.tiny import timm as tiny

    # A class of a later timm, where timm keeps its models.
    (plugins.folder / "scratch_tower.py").write_text(TOWER, "utf-8")
    spec = importlib.util.spec_from_file_location("timm.models.scratch_tower", plugins.folder / "scratch_tower.py")
    assert spec is not None
    assert spec.loader is not None
    module: types.ModuleType = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    model = tiny.made(tiny.Family("scratch_tower.Tower"))
    with pytest.raises(tokred.UnsupportedModelError, match="timm's Tower cannot run with fewer tokens"):
        tokred.apply(model, "tome", r=4)

    monkeypatch.setattr(timm, "FAMILIES", timm.FAMILIES | {"timm.models.scratch_tower.Tower"})
    monkeypatch.setitem(tiny.FAMILIES, "tower", tiny.Family("scratch_tower.Tower"))

    model = tiny.build("tower")
    assert {"tome", "evit", "spatten"} <= set(tokred.list_methods(model=model))
    case = next(case for case in doctor.choose(["timm"]) if case.family == "tower")
    (row,) = doctor.examine([case])
    assert set(row.broken) == {"nothing", "fewer", "dropped", "merged", "removed"}
    assert row.healthy, row
    # Every method, by the laws that write docs/methods/hosts.md.
    monkeypatch.setattr(method_table.tiny_timm, "FAMILIES", {"tower": tiny.FAMILIES["tower"]})
    family = next(method_table.families())
    assert family[:2] == ("timm", "tower")
    found = list(method_table.cells(*family))
    assert {cell.method for cell in found} == set(method_table.SETTINGS)
    assert not [cell for cell in found if cell.missing]

"""Recipes, and the small training loop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

import tokred
from tests.encoder.tiny_timm import build, images
from tokred import learn
from tokred.learn.recipe import FOLDER
from tokred.learn.shards import clip


def small(method: str = "dynamicvit", **changes) -> learn.Recipe:
    """A recipe of a few steps on the tiny model."""
    settings = {
        "dynamicvit": {"rho": 0.6, "tau": 1.0},
        "cropr": {"r": 4, "classes": 3},
        "ltp": {"theta_final": 0.06, "learn": True, "temperature": 0.01},
        "tome": {"r": 2},
    }[method]
    given = {"steps": 12, "batch": 8, "lr": 1e-3, "lr_method": 3e-3, "weight_decay": 0.0, **changes}
    return learn.Recipe(method, settings, **given)


def ready(recipe: learn.Recipe):
    """A patched model, and batches of images whose label is the colour that is brightest."""
    torch.manual_seed(0)
    model = tokred.apply(build("vit"), recipe.method, **recipe.parameters)
    x = images(64)
    y = x.mean((2, 3)).argmax(1)
    return model, learn.endless(x, y, recipe.batch)


def run(model, batches, recipe, **more):
    return learn.fit(model, batches, recipe, modules=tokred.modules(model).values(), losses=tokred.losses, **more)


@pytest.mark.parametrize("method", ["dynamicvit", "ltp", "cropr"])
def test_the_loss_falls(method):
    recipe = small(method, steps=40)
    model, batches = ready(recipe)
    found = run(model, batches, recipe)
    assert len(found) == 40
    assert set(found[0].terms) == {
        "task",
        {"dynamicvit": "dynamicvit.ratio", "ltp": "ltp.mask", "cropr": "cropr.heads"}[method],
    }
    first, last = (sum(step.loss for step in part) / 10 for part in (found[:10], found[-10:]))
    assert last < 0.7 * first
    assert not model.training
    assert not tokred.modules(model)[method].training


def test_a_larger_penalty_prunes_more():
    kept = []
    for penalty in (0.0, 30.0):
        recipe = small("ltp", steps=25, lr=0.0, lr_method=2e-3)
        model, batches = ready(recipe)
        tokred.apply(model, tokred.LTP(**{**recipe.parameters, "penalty": penalty}))
        run(model, batches, recipe)
        with torch.no_grad():
            model(images(16))
        kept.append(tokred.report(model).macs)
    assert kept[1] < kept[0]


def test_a_frozen_model_stays_as_it_is_and_its_method_learns():
    recipe = small(lr=0.0)
    model, batches = ready(recipe)
    model.norm = nn.Sequential(model.norm)
    before, own = copy.deepcopy(model.state_dict()), copy.deepcopy(tokred.modules(model)["dynamicvit"].state_dict())
    found = run(model, batches, recipe)
    assert found[0].terms["dynamicvit.ratio"] > 0, "its decisions are soft all the same"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    after = tokred.modules(model)["dynamicvit"].state_dict()
    assert not torch.equal(after["stages.0.embed.weight"], own["stages.0.embed.weight"])


def test_distillation_from_a_dense_copy():
    recipe = small(steps=4, logits=0.5, tokens=0.5)
    model, batches = ready(recipe)
    teacher = tokred.remove(copy.deepcopy(model))
    before = copy.deepcopy(teacher.state_dict())
    found = run(model, batches, recipe, teacher=teacher, tokens="norm", gate=lambda m: tokred.trace(m).gate)
    assert {"task", "dynamicvit.ratio", "logits", "tokens"} == set(found[0].terms)
    assert all(value > 0 for value in found[0].terms.values())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not model.norm._forward_hooks
    with pytest.raises(ValueError, match="so fit needs a teacher"):
        run(model, batches, recipe)
    with pytest.raises(ValueError, match="so fit needs tokens="):
        run(model, batches, recipe, teacher=teacher)


def test_a_method_without_weights_is_trained_with():
    recipe = small("tome", lr_method=None, steps=3)
    torch.manual_seed(0)
    model = tokred.apply(build("vit"), "tome", r=2)
    _, batches = ready(small())
    found = learn.fit(model, batches, recipe, modules=[], losses=lambda m: {})
    assert set(found[0].terms) == {"task"}
    with pytest.raises(ValueError, match=r"lr_method is 0.1, but 'tome' has no weights to train in this model"):
        learn.fit(model, batches, small("tome", lr_method=0.1), modules=[], losses=lambda m: {})
    with pytest.raises(ValueError, match=r"nothing is to be trained: lr is 0.0 and 'tome' has 0 weights"):
        learn.fit(model, batches, small("tome", lr=0.0, lr_method=None), modules=[], losses=lambda m: {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_whole_gradients_are_clipped_as_torch_does(dtype):
    for seed in range(8):
        torch.manual_seed(seed)
        own = [nn.Parameter(torch.randn(7, 5, dtype=dtype)) for _ in range(6)]
        like = copy.deepcopy(own)
        for a, b in zip(own[1:], like[1:], strict=True):  # the first has none
            a.grad = 3 * torch.randn_like(a)
            b.grad = a.grad.clone()
        clip(own, 1.0)
        nn.utils.clip_grad_norm_(like, 1.0)
        assert own[0].grad is None
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(own[1:], like[1:], strict=True))


def test_batches_that_run_out():
    recipe = small(steps=3)
    model, batches = ready(recipe)
    with pytest.raises(ValueError, match="the batches ran out after 2 of 3 steps"):
        run(model, [next(batches), next(batches)], recipe)
    with pytest.raises(ValueError, match="a batch of 9 needs as many samples, got 3"):
        next(learn.endless(torch.zeros(3), torch.zeros(3), 9))


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("*.toml")))
def test_recipes_of_tokred_make_their_methods(name):
    recipe = learn.recipe(name)
    method = tokred.make(recipe.method, **recipe.parameters)
    assert "module" in method.reads or name in ("avit", "skipvit")  # which teach the model's own weights
    assert method.removes(12)


def test_a_recipe_from_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('method = "ltp"\n[parameters]\nlearn = true\n[training]\nsteps = 7\n[losses]\nlogits = 0.5\n')
    found = learn.recipe(path)
    assert (found.method, found.steps, found.logits, dict(found.parameters)) == ("ltp", 7, 0.5, {"learn": True})
    assert learn.recipe(str(path)) == found
    for broken in (b"method = ", b'method = "\xff"'):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"mine\.toml is no TOML: "):
            learn.recipe(path)


def test_rates_rise_and_fall():
    recipe = learn.Recipe("ltp", steps=10, warmup=3)
    rates = [recipe.rate(i) for i in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"method": "ltp", "step": 3}, "the recipe has an unknown key 'step'.*Known are method, parameters, training"),
        ({"method": "ltp", "training": {"step": 3}}, r"\[training\] of the recipe has .* 'step'; did you mean 'steps'"),
        ({"method": "ltp", "losses": 3}, r"losses of the recipe must be a section, \[losses\], got 3"),
        ({}, "the recipe must name a method, got None"),
        ({"method": "ltp", "training": {"steps": 0}}, "steps must be a whole number of at least 1, got 0"),
        ({"method": "ltp", "training": {"lr": -1}}, "lr must be a number of at least 0, got -1"),
        ({"method": "ltp", "losses": {"kind": "l1"}}, "kind is 'l1'; allowed are 'mse', 'kl'"),
    ],
)
def test_wrong_recipes(given, text):
    with pytest.raises(ValueError, match=text):
        learn.recipe(given)


def test_unknown_recipes():
    with pytest.raises(FileNotFoundError, match=r"no recipe 'dynamic': give the path of a .toml file, or"):
        learn.recipe("dynamic")

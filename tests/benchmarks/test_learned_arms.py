"""Arms of encoder/train_learned: their work, their recipes, and the rows that come of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("safetensors")
pytest.importorskip("accelerate")

import tokred
from benchmarks.encoder import clutter, learned_models, learned_times, train_learned
from benchmarks.encoder import learned_arms as arms
from benchmarks.pages import trained
from benchmarks.pages.markdown import Results
from tokred import adapters, learn
from tokred.bench import embedded, results


@pytest.fixture(scope="module")
def plain():
    return embedded.load()


@pytest.mark.parametrize("share", [0.5, 0.33])
def test_arms_do_the_work_that_they_are_told(plain, share):
    full = arms.work(plain, None)
    assert arms.work(arms.smaller(share), None) / full == pytest.approx(share, abs=0.011)
    for name in (
        "cropr",
        "dynamicvit",
        "dtem",
        "tome",
        "evit",
        "pitome",
        "class_attention",
        "random_prune",
        "downsample",
    ):
        done = arms.work(plain, arms.setting(name, share, plain)) / full
        assert share - 0.04 < done <= share + 0.01, name
    # A network that decides before the blocks counts with them.
    method = arms.setting("bavit", share, plain, mode="ratio", dim=36)
    assert share - 0.04 < arms.work(plain, method) / full <= share + 0.01
    assert arms.before_blocks(method.module(adapters.find(plain).model_facts())) > 0.04 * full
    with pytest.raises(ValueError, match="skipvit has no setting for 33% of the work"):
        arms.setting("skipvit", 0.33, plain)


def test_recipes_and_those_that_train_like_the_first(plain):
    found = arms.recipes(["cropr", "dtem", "tome", "class_attention", "dense", "smaller"], 7, 3, 2e-4)
    assert {(r.steps, r.batch) for r in found.values()} == {(7, 3)}
    assert [r.lr for r in found.values()] == [2e-4, 0.0, 2e-4, 2e-4, 2e-4, pytest.approx(2e-3)]
    assert found["dtem"].schedule
    assert found["tome"].lr_method is None
    assert found["class_attention"].parameters == {"fuse": False}
    assert arms.at_share("dense", found["dense"], 0.5, plain).share == 1
    made = arms.at_share("class_attention", found["class_attention"], 0.5, plain).recipe
    assert tokred.make(made.method, **made.parameters).fuse is False
    with pytest.raises(ValueError, match="'tome' is no recipe: the first name has to be one"):
        arms.recipes(["tome"], 0, 0)
    # All three numbers stand for a recipe, and the labels alone teach.
    alike = arms.recipes(["dynamicvit", "tome"], 7, 3, 2e-4, labels=True)
    assert all((r.task, r.logits, r.tokens, r.tokens_of) == (1.0, 0.0, 0.0, "") for r in alike.values())
    alone = arms.recipes(["dense", "pitome"], 40, 8, 1e-4)["pitome"]
    assert (alone.method, alone.steps, alone.batch, alone.lr, alone.warmup, alone.distils) == (
        "pitome", 40, 8, 1e-4, 4, False,
    )  # fmt: skip
    told = arms.at_share("diffrate", arms.recipes(["diffrate"], 0, 0)["diffrate"], 0.33, plain)
    assert told.recipe.parameters["target"] == 0.33
    skip = arms.at_share("skipvit", arms.recipes(["skipvit"], 0, 0)["skipvit"], 0.7, plain).recipe
    assert skip.schedule["rho"].end == skip.parameters["rho"]


def test_garments_cover_some_patches():
    found = arms.foreground(20)
    assert tuple(found.shape) == (20, 196)
    assert 4 < float(found.sum(1).float().mean()) < 17


def test_scenes_as_models_see_them():
    with np.load(embedded.FOLDER / embedded.SAMPLE) as f:
        garments, photos = torch.from_numpy(f["garments"][:20]), [torch.from_numpy(f["photo_0"])]
    for name, (pixels, grid) in {"embedded": (112, 14), "dinov2": (112, 8)}.items():
        look = learned_models.LOOKS[name]
        scenes = clutter.draw(torch.arange(20), photos, look.size, torch.Generator().manual_seed(0))
        pictures, shown = look.pictures(scenes, garments, photos), look.shown(scenes, garments)
        assert pictures.shape == (20, 3, pixels, pixels)
        assert shown.shape == (20, grid, grid)
        assert 4 < float(shown.sum((1, 2)).float().mean()) < 17
        # Garments are bright, and patches that one covers are those of the picture that it changes.
        bare = look.pictures(scenes, garments * 0, photos)
        changed = (pictures - bare).abs().mean(1, keepdim=True)
        by_patch = torch.nn.functional.avg_pool2d(changed, pixels // grid).squeeze(1)
        assert by_patch[shown].min() > by_patch[~shown].median()


def test_other_pictures_and_other_models():
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", img_size=64).eval()
    assert arms.shape(model) == (1, 3, 64, 64)
    half = arms.smaller(0.5, model)
    assert arms.work(half, None) / arms.work(model, None) == pytest.approx(0.5, abs=0.02)
    assert arms.at_share("dense", arms.recipes(["dense"], 1, 1, 1.0)["dense"], 0.5, model).build() is not model


def test_seeds_become_a_mean_with_its_interval():
    row = {"name": "cropr", "share": 0.5, "steps": 9, "batch": 2, "test": 100, "recall": 0.5, "tokens": 9.0,
           "work": 0.5, "at": 100, "setting": "Cropr(r=3)", "method": "cropr", "where": {}}  # fmt: skip
    (one,) = train_learned.records([{**row, "top1": top1, "seed": i} for i, top1 in enumerate((0.7, 0.72, 0.74))])
    assert one["top1"] == pytest.approx(0.72)
    assert one["top1_high"] - one["top1"] == pytest.approx(4.303 * 0.02 / 3**0.5, rel=1e-3)
    made = {r.metric: r for r in results.rows(one, "learned")}
    assert made["top1"].count == 300
    assert made["gmacs_share"].value == 0.5
    both = train_learned.records([{**row, "top1": 0.7, "seed": 0, "model": m} for m in ("embedded", "dinov2")])
    assert [one["model"] for one in both] == ["embedded", "dinov2"]
    (single,) = train_learned.records([{**row, "top1": 0.7, "seed": 0}])
    assert single["top1_low"] < 0.7 < single["top1_high"]
    lines = train_learned.table([{**row, "top1": 0.7, "seed": 0}, {**row, "top1": 0.8, "seed": 1}])
    assert "±0.0500" in lines[1]


def test_times_of_models_beside_the_dense_one(plain):
    tome, ragged = embedded.load(), embedded.load()
    tokred.apply(tome, "tome", r=22)
    tokred.apply(ragged, "avit", beta=0.0)
    models = {"tome 0.5": tome, "avit 0.5": ragged, "dense 1": embedded.load()}
    found = learned_times.times(models, plain, embedded.sample(6).images, rounds=2, at=3)
    assert {name: len(one["speedup"]) for name, one in found.items()} == {"tome 0.5": 2, "dense 1": 2, "avit 0.5": 6}
    assert all(0 < share < 1 for share in found["tome 0.5"]["decision_share"])
    assert found["dense 1"]["decision_share"] == [0, 0]
    row = {"name": "tome, untrained", "share": 0.5, "steps": 0, "batch": 0, "test": 10, "recall": 1.0, "tokens": 9.0,
           "work": 0.5, "at": 100, "setting": "ToMe(r=22)", "method": "tome", "where": {}, "top1": 0.8}  # fmt: skip
    (one,) = train_learned.records([row], found)
    assert one["speedup_low"] <= one["speedup"] <= one["speedup_high"]


@pytest.mark.parametrize("folder", sorted(arms.WEIGHTS.iterdir()), ids=lambda folder: folder.name)
def test_weights_that_are_there_do_what_the_table_says(folder):
    name, share = folder.name.split("-")
    model, full = embedded.load(), arms.work(embedded.load(), None)
    tokred.apply(model, tokred.load(folder))
    assert tokred.patched(model)[0].name == name
    images, labels = embedded.sample(200)
    with torch.inference_mode():
        right = (model(images).argmax(1) == labels).float().mean()
    own = arms.before_blocks(next(iter(tokred.modules(model).values())), 196)
    assert (own + tokred.report(model).macs) / full == pytest.approx(float(share), abs=0.02)
    assert right > 0.72, "the dense model has 0.8 of these, a random choice at this share less than a half"


def test_the_aim_on_dinov2_is_told_by_intervals(tmp_path: Path) -> None:
    assert trained.learned_dinov2_claims(Results(tmp_path)) == trained.NOTHING
    ends = {
        "dense": (0.80, 0.78, 0.82),
        "tome": (0.70, 0.68, 0.72),
        "cropr": (0.60, 0.58, 0.62),
        "dynamicvit": (0.76, 0.74, 0.78),
    }
    goals = {n: {"goal": 1 if n == "dense" else 0.45} for n in ends}
    rows = [{"model": "dinov2", "method": n, "case": n, **goals[n], **results.between("top1", *ends[n])} for n in ends]
    results.write(tmp_path / "encoder.csv", rows, "learned")
    said = trained.learned_dinov2_claims(Results(tmp_path))
    assert "`dynamicvit` has the highest top-1, 76.0 % (74.0 to 78.0)" in said
    assert "`cropr` loses at most half" in said
    assert "trained as long: missed, -20.0 points" in said
    assert "not told apart, -4.0 points beside the dense model (-6.0 to -2.0), `tome` -10.0." in said


def test_amounts_of_each_block_stay_as_the_recipe_has_them():
    recipe = replace(learn.recipe("cropr"), parameters={"r": [45, 110, 0, 0], "classes": 10})
    assert arms.at_share("early", recipe, 0.33, embedded.load()).recipe.parameters["r"] == [45, 110, 0, 0]

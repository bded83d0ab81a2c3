"""The page and the command that draw what was merged: groups as recorded, valid HTML, nothing from outside."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("numpy")

import tokred
from tests.encoder.tiny_timm import build, images
from tokred.analysis.viz import draw as viz
from tokred.analysis.viz import pages
from tokred.analysis.viz import recording as stages
from tokred.core.settings import parse_setting
from tokred.core.soft import SoftReduction
from tokred.encoder.method import BlockMethod

VOID = {"meta", "link", "input", "br", "img"}
NASTY = "</script><img src=x onerror=\"alert('1')\">&amp;{{data}}\u2028.png"


class Page(HTMLParser):
    """Every element, with its text; asserts that each end tag closes the element that is open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, [self.elements[i][0] for i in self.open]

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        assert tag not in VOID
        assert self.elements[self.open.pop()][0] == tag, tag

    def handle_data(self, data):
        if self.open:
            self.elements[self.open[-1]][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, "".join(text)) for name, attributes, text in self.elements if name == tag]

    @property
    def data(self):
        (found,) = [text for attributes, text in self.all("script") if attributes.get("id") == "data"]
        return json.loads(found)


def written(tmp_path: Path, *arguments, **options) -> tuple[str, Page]:
    text = viz.page(*arguments, tmp_path / "page.html", **options).read_text("utf-8")
    return text, Page(text)


def expand(groups, count: int) -> list[list[int]]:
    """Null repeats the stage before; at first every patch is alone."""
    last, out = list(range(count)), []
    for stage in groups:
        last = last if stage is None else stage
        out.append(last)
    return out


def assert_groups(found: list[int], reduction: tokred.Reduction, prefix: int, sample: int) -> None:
    """The same partition of the patches, named by the patch that stands for each slot."""
    row = min(sample, len(reduction.index) - 1)  # an identity has one row for all
    index = reduction.index[row, prefix : prefix + len(found)].tolist()
    stands = (reduction.representative[row] - prefix).tolist()
    assert [g < 0 for g in found] == [slot < 0 for slot in index]
    pairs = {(g, slot) for g, slot in zip(found, index, strict=True) if slot >= 0}
    assert len(pairs) == len({g for g, _ in pairs}) == len({slot for _, slot in pairs})
    assert all(g == stands[slot] for g, slot in pairs if 0 <= stands[slot] < len(found))


@dataclass(frozen=True)
class Uneven(BlockMethod):
    """In block 1, drops the patches whose first channel is negative: another number in every sample."""

    drops: ClassVar[bool] = True
    uneven: ClassVar[bool] = True

    def tokens(self, n, place):
        return n

    def acts(self, n, place):
        return place.layer == 1

    def reduce(self, site):
        n = site.x.shape[1]
        free = torch.arange(n)
        good = (site.x[..., 0] >= 0) | (free < site.prefix) | (free >= n - site.suffix)
        order = torch.sort((~good).int(), dim=1, stable=True).indices
        width = int(good.sum(1).max())
        return tokred.Reduction.keep(order[:, :width], n, torch.arange(width) < good.sum(1, keepdim=True))


@dataclass(frozen=True)
class Shares(BlockMethod):
    """In block 0, the last token is shared out over two others."""

    def tokens(self, n, place):
        return n - 1 if place.layer == 0 else n

    def reduce(self, site):
        b, n = site.x.shape[:2]
        share = torch.zeros(b, n - 1, 1)
        share[:, 3], share[:, 7] = 0.3, 0.7
        kept = torch.arange(n - 1).expand(b, -1)
        return SoftReduction.make(kept, torch.full((b, 1), n - 1), share, n)


@dataclass(frozen=True)
class StandIn(BlockMethod):
    """In block 0, drops the last token, and lets patch 3 stand in for it."""

    def tokens(self, n, place):
        return n - 1 if place.layer == 0 else n

    def reduce(self, site):
        b, n = site.x.shape[:2]
        kept, one = torch.arange(n - 1).expand(b, -1), torch.ones(b, 1, dtype=torch.int64)
        return tokred.Reduction(kept, one * (n - 1), one * 4, n, mode="keep", inherit=False)


CASES = [
    ("vit", ["tome r=5", "random_prune r=4", "evit kappa=0.5 blocks=(1,)"]),
    ("vit-registers (DINOv2)", ["tome r=5", "random_prune r=3"]),
    ("vit-mean", ["tome r=7", "random_prune r=3"]),
    ("vit-post-norm", [Uneven(), tokred.PiToMe(ratio=0.8)]),
]


@pytest.mark.parametrize(("family", "methods"), CASES, ids=lambda c: c if isinstance(c, str) else "")
def test_the_json_holds_the_groups_of_every_block(family, methods, tmp_path):
    model, x = build(family), images(3)
    _, page = written(tmp_path, model, x, methods)
    found = page.data
    assert found["grid"] == [5, 5]
    assert found["depth"] == 3
    with torch.inference_mode():
        full = model(x)
    for m, method in enumerate(methods):
        name, parameters = parse_setting(method) if isinstance(method, str) else (method, {})
        with torch.inference_mode(), tokred.applied(model, name, **parameters):
            model(x)
            after = [viz.after(model, layer) for layer in range(3)]
        for i in range(3):
            run = found["images"][i]["runs"][m]
            groups = expand(run["groups"], 25)
            assert len(groups) == len(run["tokens"]) == len(run["macs"]) == 4
            assert groups[0] == list(range(25))
            for layer, reduction in enumerate(after):
                assert_groups(groups[layer + 1], reduction, model.num_prefix_tokens, i)
    with torch.inference_mode():
        assert torch.equal(model(x), full)


def test_counts_are_those_of_the_report():
    model, x = build("vit"), images(2)
    recording = stages.record(model, x, ["tome r=5", "evit kappa=0.5 blocks=(1,)"])
    for label, run in zip(("tome", "evit"), recording.runs, strict=True):
        parameters = {"r": 5} if label == "tome" else {"kappa": 0.5, "blocks": (1,)}
        with torch.inference_mode(), tokred.applied(model, label, **parameters):
            model(x)
            report = tokred.report(model)
        assert run.tokens.tolist() == [[26, *(row.tokens_out for row in report.layers)]] * 2
        assert run.macs[:, -1].tolist() == [report.macs] * 2
        assert recording.base[-1] == report.macs_unpatched
    assert [g is None for g in pages.data(recording)["images"][0]["runs"][1]["groups"]] == [True, True, False, True]


def test_answers_stand_beside_those_of_the_unpatched_model(tmp_path):
    model, x = build("vit"), images(2)
    assert stages.record(model, x, "tome r=5").answers == ()
    classes = [f"<kind {i}>" for i in range(model(x).shape[1])]
    recording = stages.record(model, x, "tome r=8", classes=classes)
    with torch.inference_mode():
        plain = model(x).softmax(1).max(1)
        with tokred.applied(model, "tome", r=8):
            patched = model(x).softmax(1).max(1)
    for answers, (likely, which) in ((recording.answers, plain), (recording.runs[0].answers, patched)):
        wanted = [f"<kind {i}> ({100 * p:.0f} %)" for i, p in zip(which.tolist(), likely.tolist(), strict=True)]
        assert list(answers) == wanted
    page = Page(pages.render(recording, "page"))
    said = [text for attributes, text in page.all("p") if attributes.get("class") == "answer"]
    # The words of an element inside it are its own.
    assert [text.strip() for text in said] == list(recording.runs[0].answers)
    assert [text for _, text in page.all("span") if text.startswith("unpatched: ")] == [
        f"unpatched: {one}" for one in recording.answers
    ]
    with pytest.raises(ValueError, match="classes has 1 names"):
        stages.record(model, x, "tome r=8", classes=["one"])


def test_images_of_a_ragged_batch_are_drawn_and_counted_alone():
    model, x = build("vit"), images(4)
    together = stages.record(model, x, Uneven())
    (run,) = together.runs
    assert run.label == "Uneven"
    assert len(set(run.tokens[:, -1].tolist())) > 1
    assert ((run.groups[:, -1] >= 0).sum(1) + 1).tolist() == run.tokens[:, -1].tolist()
    for i in range(4):
        (alone,) = stages.record(model, x[i : i + 1], Uneven()).runs
        assert torch.equal(alone.groups[0], run.groups[i])
        assert torch.equal(alone.tokens[0], run.tokens[i])
        assert torch.equal(alone.macs[0], run.macs[i])
    parts = stages.record(model, x, Uneven(), batch=3)
    assert torch.equal(parts.runs[0].groups, run.groups)


def test_shared_tokens_are_drawn_with_the_largest_share(tmp_path):
    model, x = build("vit"), images(1)
    recording = stages.record(model, x, [Shares(), "tome r=2"])
    assert [run.soft for run in recording.runs] == [True, False]
    assert recording.runs[0].groups[0, -1].tolist() == [*range(24), 6]  # slot 7 is patch 6
    text, _ = written(tmp_path, model, x, Shares())
    assert "handed out in shares" in text
    text, _ = written(tmp_path, model, x, "tome r=2")
    assert "handed out in shares" not in text


def test_pruned_tokens_that_another_stands_in_for_are_drawn_as_pruned():
    model, x = build("vit"), images(2)
    recording = stages.record(model, x, [StandIn(), "tome r=2"])
    assert recording.runs[0].groups[:, -1].tolist() == [[*range(24), -1]] * 2
    with torch.inference_mode(), tokred.applied(model, StandIn()):
        model(x)
        assert viz.after(model).index[0].tolist() == [*range(25), -1]
        assert tokred.trace(model).index[0].tolist() == [*range(25), 4]


def test_detection_tokens_are_no_patches():
    pytest.importorskip("transformers")
    from tests.encoder.tiny_transformers import FAMILIES, build

    name = next(n for n in FAMILIES if "yolos" in n.lower())
    family = FAMILIES[name]
    model = build(name)
    (x,) = family.inputs(2).values()
    recording = stages.record(model, x, "tome r=4")
    assert recording.protected == family.prefix + family.suffix > 1
    assert recording.grid[0] * recording.grid[1] == recording.length - recording.protected
    with torch.inference_mode(), tokred.applied(model, "tome", r=4):
        model(x)
        for i in range(2):
            assert_groups(recording.runs[0].groups[i, -1].tolist(), viz.after(model), family.prefix, i)


def test_the_patch_that_stands_for_a_group_is_one_of_it():
    recording = stages.record(build("vit"), images(2), "tome r=6")
    for stage in recording.runs[0].groups.flatten(0, 1):
        assert torch.equal(stage[stage.long()], stage)


def test_a_group_around_a_protected_token_is_named_by_its_first_patch():
    merged = tokred.Reduction.from_index(torch.tensor([[0, 1, 0, 0, 1]]), 2)  # a class token and four patches
    assert stages.labels(merged, 1, 4, 1).tolist() == [[0, 1, 1, 0]]


def test_the_page_is_valid_and_needs_nothing_else(tmp_path):
    model, x = build("vit"), images(2)
    text, page = written(tmp_path, model, x, ["tome r=5", "random_prune r=4"], names=["one", "two"])
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|@import|\burl\(|\bfetch\(|XMLHttpRequest", text)
    assert "{{" not in text
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes, _ in page.elements:
        for key in ("src", "href"):
            assert attributes.get(key, "data:").startswith("data:"), (tag, attributes)
        for key in ("for", "aria-labelledby", "aria-describedby"):
            assert set((attributes.get(key) or "").split()) <= set(ids), (tag, attributes)
    labelled = {attributes["for"] for attributes, _ in page.all("label") if "for" in attributes}
    sliders = [a for a, _ in page.all("input") if a["type"] == "range"]
    assert len(sliders) == 2
    assert all(s["id"] in labelled and (s["min"], s["max"]) == ("0", "3") for s in sliders)
    canvases = page.all("canvas")
    assert [a["aria-label"] for a, _ in canvases] == [
        "one, tome r=5", "one, random_prune r=4", "two, tome r=5", "two, random_prune r=4"
    ]  # fmt: skip
    assert all(a["tabindex"] == "0" for a, _ in canvases)
    assert page.all("html")[0][0]["lang"] == "en"
    cells = [text for _, text in page.all("td")]
    assert {"21", "16", "11", "22", "18", "14"} <= set(cells)
    assert len(text.encode()) < 60_000


def test_names_are_escaped(tmp_path):
    text, page = written(tmp_path, build("vit"), images(1), "tome r=5", names=[NASTY], title=NASTY)
    assert not page.all("img")
    assert len(page.all("script")) == 2
    assert page.data["images"][0]["name"] == NASTY
    assert page.all("title")[0][1] == page.all("h1")[0][1] == page.all("h2")[0][1] == NASTY
    assert page.all("canvas")[0][0]["aria-label"] == f"{NASTY}, tome r=5"
    assert text.count('"images":') == 1  # a name that looks like a place of the template is none


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_png_files(channels):
    image_file = pytest.importorskip("PIL.Image")
    pixels = torch.randint(0, 256, (channels, 7, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    head, _, body = pages.picture(pixels).partition(",")
    assert head == "data:image/png;base64"
    with image_file.open(io.BytesIO(base64.b64decode(body))) as found:
        assert found.mode == ("L" if channels == 1 else "RGB")
        read = torch.frombuffer(bytearray(found.tobytes()), dtype=torch.uint8).view(7, 5, channels)
    assert torch.equal(read.permute(2, 0, 1), pixels)


def test_mean_colours_of_patches():
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    pixels[0, :2, :2], pixels[1, 2:], pixels[2, 0, 2:] = 255, 16, 3
    assert pages.means(pixels, (2, 2)) == [0xFF0000, 0x000002, 0x001000, 0x001000]  # 1.5 is rounded to even
    assert pages.means(torch.full((1, 4, 4), 7, dtype=torch.uint8), (2, 2)) == [0x070707] * 4


def test_wide_images_have_a_wide_grid():
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}
    model = VisionTransformer(img_size=(16, 64), **sizes).eval()
    recording = stages.record(model, torch.randn(1, 3, 16, 64), "tome r=2")
    assert recording.grid == (2, 8)
    assert stages.record(model, torch.randn(1, 3, 16, 64), "tome r=2", grid=(4, 4)).grid == (4, 4)
    with pytest.raises(ValueError, match="grid of 3 x 5 does not fit the 16 patches"):
        stages.record(model, torch.randn(1, 3, 16, 64), "tome r=2", grid=(3, 5))


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((1, 4, 3, 40, 40), {}, "videos are not drawn"),
        ((0, 3, 40, 40), {}, "at least one image"),
        ((2, 3, 40, 40), {"names": ["one"]}, "need as many names"),
        ((2, 3, 40, 40), {"pixels": torch.zeros(1, 3, 40, 40)}, "pixels must be"),
        ((2, 4, 40, 40), {}, "cannot be drawn"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, options, words):
    with pytest.raises(ValueError, match=words):
        stages.record(build("vit"), torch.zeros(shape), "tome r=2", **options)


def test_methods_that_do_not_fit_are_refused(tmp_path):
    model, x = build("vit-mean"), images(1)
    with pytest.raises(tokred.UnknownMethodError, match="did you mean 'toma' or 'tome'"):
        viz.page(model, x, "tom r=2", tmp_path / "a.html")
    with pytest.raises(tokred.MissingInputError, match="class_attention"):
        viz.page(model, x, "evit", tmp_path / "a.html")
    with pytest.raises(ValueError, match="no method is given"):
        viz.page(model, x, [], tmp_path / "a.html")
    with pytest.raises(TypeError, match="a name, a class of methods or a Method"):
        viz.page(model, x, [3], tmp_path / "a.html")
    with pytest.raises(ValueError, match="already patched"):
        viz.page(tokred.apply(model, "tome", r=2), x, "tome r=2", tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_models_that_start_each_block_from_all_tokens_are_refused(monkeypatch):
    host = SimpleNamespace(where="inside", family="a model with windows")
    monkeypatch.setattr(stages.adapters, "find", lambda model: host)
    with pytest.raises(tokred.UnsupportedModelError, match="a model with windows reduces inside each block"):
        stages.record(build("vit"), images(1), "tome r=2")


def test_labels_of_methods():
    assert stages.label_of(tokred.ToMe(r=13)) == "tome r=13"
    assert stages.label_of(tokred.ToMe(r=(8, -1), metric="v")) == "tome r=(8,-1) metric=v"
    assert stages.label_of(tokred.ToMe(r=[3, 2])) == "tome r=[3,2]"
    assert [label for label, _ in stages.choose(["tome  r=2", "tome r=2", tokred.EViT()])] == ["tome r=2", "evit"]


def test_the_figure_has_an_axis_for_each_image_method_and_block():
    pytest.importorskip("matplotlib")
    recording = stages.record(build("vit"), images(2), ["tome r=5", "random_prune r=4"], names=["a", "$b_c$$"])
    figure = viz.figure(recording, [1, 3])
    figure.canvas.draw()  # a name is no formula
    axes = figure.get_axes()
    assert len(axes) == 4 * 3
    assert [a.get_title() for a in axes[:3]] == ["5 x 5 patches", "after block 1", "after block 3"]
    assert [a.get_xlabel() for a in axes[:3]] == ["26 tokens", "21 tokens", "11 tokens"]
    for blocks in ([4], [0], []):
        with pytest.raises(ValueError, match=r"1\.\.3"):
            viz.figure(recording, blocks)
    assert viz.spaced(12) == [3, 6, 9, 12]
    assert viz.spaced(2) == [1, 2]


def test_painted_groups_are_painted_reductions():
    reduction = tokred.Reduction.from_index(torch.tensor([[0, 1, 2, 1, -1]]), 3)
    image = torch.tensor([[[0, 100], [200, 40]]], dtype=torch.uint8)
    whole = viz.paint(image, reduction, (2, 2), outline=False)
    assert (whole == viz.paint_groups(image, torch.tensor([0, 1, 0, -1]), (2, 2), outline=False)).all()
    with pytest.raises(ValueError, match="needs 4 groups"):
        viz.paint_groups(image, torch.tensor([0, 1]), (2, 2))


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_sound(tmp_path):
    _, page = written(tmp_path, build("vit"), images(1), "tome r=5")
    (script,) = [text for attributes, text in page.all("script") if "id" not in attributes]
    (tmp_path / "page.js").write_text(script, "utf-8")
    subprocess.run(["node", "--check", str(tmp_path / "page.js")], check=True, timeout=60)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_page_says_what_was_recorded(tmp_path):
    model, x = build("vit"), images(2)
    recording = stages.record(model, x, ["tome r=5", "random_prune r=4"])
    page = Page(pages.render(recording, "page"))
    (script,) = [text for attributes, text in page.all("script") if "id" not in attributes]
    (tmp_path / "page.js").write_text(script, "utf-8")
    (tmp_path / "data.json").write_text(json.dumps(page.data), "utf-8")
    stub = Path(__file__).with_name("viz_page_stub.js")
    command = ["node", str(stub), str(tmp_path / "page.js"), str(tmp_path / "data.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for m, run in enumerate(recording.runs):
        for stage in range(4):
            groups = run.groups[0, stage].tolist()
            assert said["counts"][m][stage].startswith(f"{int(run.tokens[0, stage])} of 26 tokens")
            if stage:
                macs, base = int(run.macs[0, stage]), recording.base[stage]
                assert (
                    f"{macs / 1e9:.3f} GMACs in the blocks so far ({100 * macs / base:.0f} %"
                    in said["counts"][m][stage]
                )
            for patch, group in enumerate(groups):
                text = said["texts"][m][stage][patch]
                assert text.startswith(f"Patch at row {patch // 5 + 1}, column {patch % 5 + 1}: ")
                size = groups.count(group)
                if group < 0:
                    first = next(s for s in range(4) if int(run.groups[0, s, patch]) < 0)
                    assert text.endswith(f": pruned in block {first}.")
                elif size == 1:
                    assert text.endswith(": a token of its own.")
                else:
                    assert f": one of {size} patches of a token" in text
                    assert ("this very patch" in text) == (group == patch)
    assert said["left"] == ""
    assert [where for where, _ in said["keys"]] == ["after block 2"] * 2 + ["after block 1"] * 3
    assert said["keys"][3][1].startswith("Patch at row 1, column 1: ")
    assert said["keys"][4][1] == ""
    assert said["others"] == ["after block 1", "after block 1", "the image", "after block 1"]
    assert said["played"] == ["after block 1", "after block 2", "after block 3"]
    assert min(said["drawn"].values()) > 0

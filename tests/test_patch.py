"""The patch on a model: what it owns, how it is undone, and the report that it gives, over all stages."""

from __future__ import annotations

import copy
import html
import io
import json
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import tokred
from tokred.adapters.changes import states_in, sweep
from tokred.adapters.swap import Hook, Standin, is_swapped
from tokred.adapters.tiny import diffusion, kv, moe, timm, vlm
from tokred.core.method import Method
from tokred.core.report import COLUMNS, Report
from tokred.patch import ATTRIBUTE, Patch, patches_of

SEVERAL = [tokred.ToMe(r=1), tokred.SnapKV(budget=8, window=2), tokred.DivPrune(budget=0.5), tokred.FastV(layer=1)]
PATCHES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "encoder": (lambda: timm.build("vit"), "tome", {"r": 2}),
    "keys before rotary embedding": (lambda: timm.build("eva02 (rope, swiglu)"), "tome", {"r": 2}),
    "denoiser": (lambda: diffusion.build("sd15"), "tomesd", {"ratio": 0.5, "max_downsample": 8}),
    "cache": (lambda: kv.build("llama"), "snapkv", {"budget": 8, "window": 2}),
    "stream": (lambda: kv.build("llama"), "squeezeattention", {"budget": 8}),
    "projector": (lambda: vlm.build("llava"), "visionzip", {}),
    "layer": (lambda: vlm.build("llava"), "fastv", {"layer": 1}),
    "experts": (lambda: moe.build("mixtral"), "capacity_drop", {"gamma": 0.5}),
    "all stages of a model with vision": (lambda: vlm.build("llava"), SEVERAL, {}),
}


def traces(model: nn.Module) -> list[str]:
    """What is left of a patch anywhere in a model."""
    found = []
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        kept = [k for k, v in module.__dict__.items() if k.startswith("_tokred") or isinstance(v, Standin)]
        flags = [is_swapped(module), any(isinstance(h, Hook) for h in hooks), *kept]
        tables = (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs)
        if any(flags) or any(tables):
            found.append(f"{name}: {flags}")
    return found


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


def the_patch(model: nn.Module) -> Patch:
    (found,) = patches_of(model)
    assert found[0] is model
    return found[1]


@pytest.mark.parametrize("way", [None, copied, pickled])
@pytest.mark.parametrize("name", PATCHES)
def test_undos_alone_leave_no_trace(name: str, way: Any) -> None:
    build, method, settings = PATCHES[name]
    plain = build()
    types, keys = [type(m) for m in plain.modules()], list(plain.state_dict())
    before = [list(m.__dict__) for m in plain.modules()]
    outer = model = tokred.apply(plain, method, **settings)
    assert traces(model)
    if way is not None:
        model = way(outer)
    assert list(model.state_dict()) == keys
    patch = the_patch(model)
    assert tokred.patched(model) == patch.methods == tokred.patched(outer)
    del model.__dict__[ATTRIBUTE]
    patch.undo()  # not remove, which would sweep as well
    assert traces(model) == []
    assert patch.methods == []
    assert [type(m) for m in model.modules()] == types
    assert [sorted(m.__dict__) for m in model.modules()] == [sorted(names) for names in before]
    patch.undo()  # a second time there is nothing to do
    if way is not None:
        assert tokred.patched(outer), "the copy's undos do nothing to the model that it was copied from"


@pytest.mark.parametrize("name", PATCHES)
def test_hidden_attributes_are_one_on_the_model_and_one_on_swapped_modules(name: str) -> None:
    build, method, settings = PATCHES[name]
    model = tokred.apply(build(), method, **settings)
    for module in model.modules():
        hidden = {k for k in module.__dict__ if "tokred" in k}
        allowed = ({ATTRIBUTE} if module is model else set()) | ({"_tokred"} if is_swapped(module) else set())
        assert hidden <= allowed, type(module).__name__


def test_the_sweep_frees_parts_that_have_no_owner() -> None:
    model = tokred.apply(timm.build("vit"), "tome", r=2)
    block = copy.deepcopy(model.blocks[1])
    assert not list(patches_of(block))
    tokred.remove(block)
    assert traces(block) == []
    assert tokred.patched(model) == [tokred.ToMe(r=2)], "it was a copy"


def test_a_block_that_another_patch_has_taken_over_is_left_to_it() -> None:
    first, second, x = timm.build("vit"), timm.build("vit", 1), timm.images()
    tokred.apply(first, "tome", r=2)
    second.blocks[0], first.blocks[0] = first.blocks[0], second.blocks[0]
    tokred.apply(second, "evit", kappa=0.5, blocks=(1,))
    with torch.no_grad():
        expected = second(x)
        tokred.remove(first)
        assert torch.equal(second(x), expected)
    assert traces(tokred.remove(second)) == []


def test_what_breaks_off_while_a_model_is_patched_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokred.adapters.vlm.host import VisualHost

    model = vlm.build("llava")

    def fail(*_: Any) -> None:
        raise KeyError("mine")

    monkeypatch.setattr(VisualHost, "tap", fail)
    with pytest.raises(KeyError, match="mine"):
        tokred.apply(model, SEVERAL)
    assert traces(model) == []
    assert tokred.patched(model) == []


def test_a_part_of_a_patched_model_tells_what_acts_on_it() -> None:
    outer = nn.Sequential(timm.build("vit"))
    tokred.apply(outer, "tome", r=2)
    with torch.no_grad():
        outer(timm.images())
    assert tokred.patched(outer[0]) == [tokred.ToMe(r=2)]
    assert str(tokred.report(outer[0])) == str(tokred.report(outer))
    assert torch.equal(tokred.trace(outer[0]).index, tokred.trace(outer).index)


def test_the_patch_says_what_it_is() -> None:
    patch = the_patch(tokred.apply(timm.build("vit"), "tome", r=2))
    assert repr(patch).startswith("Patch(ToMe(r=2)")
    assert repr(patch).endswith("on timm VisionTransformer)")
    assert patch.modules == {}


# ---------------------------------------------------------------------- reports


def ran(name: str) -> Report:
    build, method, settings = PATCHES[name]
    model = tokred.apply(build(), method, **settings)
    with torch.no_grad():
        if name in ("encoder", "keys before rotary embedding"):
            model(timm.images())
        elif name == "denoiser":
            diffusion.run(model, diffusion.inputs("sd15"))
        elif name in ("cache", "stream", "experts"):
            model(kv.prompt(20), use_cache=True)
        else:
            model(**vlm.prompts("llava", [[3, "image", 5]]), use_cache=True)
    return tokred.report(model)


@pytest.fixture(scope="module", params=PATCHES)
def report(request: pytest.FixtureRequest) -> Report:
    return ran(request.param)


def test_every_report_has_the_same_columns(report: Report) -> None:
    assert isinstance(report, tokred.Report)
    assert report.rows
    assert all(tuple(row) == COLUMNS for row in report.rows)
    assert [one.stage for one in report.parts] == [s for s in tokred.core.site.STAGES if any(
        row["stage"] == s for row in report.rows)]  # fmt: skip
    for row in report.rows:
        assert row["tokens_in"] > 0
        assert any(row[name] is not None for name in ("tokens_out", "rows"))


def test_every_report_is_plain_data(report: Report) -> None:
    found = json.loads(json.dumps(report.to_dict()))
    assert found["family"] == report.family
    assert len(found["rows"]) + sum(len(one["rows"]) for one in found["more"]) == len(report.rows)
    assert [tokred.from_dict(one) for one in found["methods"]] == list(report.acting)


def test_every_report_is_a_table_of_pandas(report: Report) -> None:
    pytest.importorskip("pandas")
    frame = report.to_pandas()
    assert tuple(frame.columns) == COLUMNS
    assert len(frame) == len(report.rows)


def test_every_report_shows_in_a_notebook(report: Report) -> None:
    found = report._repr_html_()
    assert found.count("<table>") == found.count("</table>") == len(report.parts)
    assert found.count("<tr>") == len(report.rows) + len(report.parts)
    assert f"<p><strong>{html.escape(report.title)}</strong></p>" in found
    assert str(report).splitlines()[0] == report.title


def test_a_report_of_several_stages_holds_all_of_them() -> None:
    found = ran("all stages of a model with vision")
    assert [one.stage for one in found.parts] == ["block", "cache", "layer"]
    assert [one.stage for one in found.more] == ["block", "cache"]
    assert str(found).endswith(str(found.more[1]))
    assert {row["method"] for row in found.rows} == {"tome", "snapkv", "divprune+fastv"}


def test_a_tower_and_a_cache_report_together() -> None:
    model = tokred.apply(vlm.build("llava"), SEVERAL[:2])
    with torch.no_grad():
        model(**vlm.prompts("llava", [[3, "image", 5]]), use_cache=True)
    found = tokred.report(model)
    assert [one.stage for one in found.parts] == ["block", "cache"]


def test_without_pandas_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    found = ran("encoder")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'tokred\[bench\]'"):
        found.to_pandas()


def test_a_swept_copy_of_a_model_tells_of_no_state() -> None:
    model = copy.deepcopy(tokred.apply(kv.build("llama"), "snapkv", budget=8, window=2))
    assert list(states_in(model))
    sweep(model)
    assert not list(states_in(model))
    assert tokred.patched(model) == []


@pytest.mark.parametrize(
    ("stage", "host", "base"),
    [
        ("attention", lambda: diffusion.build("sd15"), "tokred.diffusion.method.AttentionMethod"),
        ("experts", lambda: moe.build("mixtral"), "tokred.core.experts.ExpertMethod"),
    ],
)
def test_methods_of_the_right_stage_and_the_wrong_base(stage: Any, host: Any, base: str) -> None:
    class Strange(Method):
        def reduce(self, site: Any) -> Any:
            raise AssertionError

        def removes(self, depth: int, layers: Any = None) -> bool:
            return True

    Strange.name, Strange.stage = "strange", stage
    with pytest.raises(TypeError, match=f"'strange' acts .* and has to derive from {base}"):
        tokred.apply(host(), Strange())

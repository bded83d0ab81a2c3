"""Settings that travel: folders, dicts, the hub; what was kept of how they were applied; callbacks and log lines."""

from __future__ import annotations

import copy
import json
import logging
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

import tokred
from tokred.adapters.tiny import diffusion, kv, timm, vlm
from tokred.adapters.tiny import windows as windowed
from tokred.core.names import MethodName
from tokred.settings import share


def images() -> torch.Tensor:
    return torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def vit() -> nn.Module:
    return timm.build("vit").eval()


def tokens(model: nn.Module) -> list[int]:
    with torch.no_grad():
        size = model.patch_embed.img_size
        model(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)))
    return [row["tokens_out"] for row in tokred.report(model).rows]


# ---------------------------------------------------------------- what apply takes


@pytest.mark.parametrize(
    "given",
    [
        "tome",
        "ToMe",
        tokred.ToMe,
        [tokred.ToMe(r=3)],
        tokred.ToMe(r=3).to_dict(),
        {"method": "ToMe", "parameters": {"r": 3}},
        [{"method": "tome", "parameters": {"r": 3}}],
    ],
    ids=repr,
)
def test_apply_takes_names_classes_and_dicts(given: Any) -> None:
    named = isinstance(given, str | type)
    model = tokred.apply(vit(), given, **({"r": 3} if named else {}))
    assert tokred.patched(model) == [tokred.ToMe(r=3)]


@pytest.mark.parametrize("as_text", [False, True])
def test_apply_takes_a_folder(tmp_path: Path, as_text: bool) -> None:
    folder = tokred.save(tokred.ToMe(r=3), tmp_path / "setting")
    model = tokred.apply(vit(), str(folder) if as_text else folder)
    assert tokred.patched(model) == [tokred.ToMe(r=3)]


def test_a_name_comes_before_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tome").mkdir()
    assert tokred.patched(tokred.apply(vit(), "tome", r=2)) == [tokred.ToMe(r=2)]


@pytest.mark.parametrize(
    ("given", "parameters", "kind", "message"),
    [
        ({"r": 3}, {}, ValueError, r"does not fit the None .*settings are \{\"method\": name"),
        (
            {"method": "tome", "parameters": 3},
            {},
            ValueError,
            "parameters of 'tome' must be a mapping by their names",
        ),
        ({"methods": []}, {}, TypeError, "the methods of a setting are a list of dicts"),
        (
            tokred.ToMe(r=3).to_dict(),
            {"r": 2},
            TypeError,
            "setting has its parameters; r cannot be given beside it",
        ),
        (3, {}, TypeError, "a method is a name, a class, an object, a dict, a folder, or a list of these, got 3"),
        (nn.Linear, {}, TypeError, "a method is a name, a class of methods or a Method object, got <class"),
        (tokred.Method, {}, TypeError, "a method is a name, a class of methods or a Method object"),
        (tokred.ToMe, {"ratio": 3}, TypeError, "'tome' has no parameter 'ratio'; it has r, "),
        (Path("/nonexistent"), {}, FileNotFoundError, "'/nonexistent' is no folder; give one that tokred.save"),
        ("no_such_thing", {}, tokred.UnknownMethodError, "no method is named 'no_such_thing'"),
    ],
)
def test_apply_refuses_the_rest(given: Any, parameters: Any, kind: type[Exception], message: str) -> None:
    model = vit()
    with pytest.raises(kind, match=message):
        tokred.apply(model, given, **parameters)
    assert tokred.patched(model) == []


def test_names_for_completion_are_the_registered_ones() -> None:
    assert list(MethodName.__args__) == sorted(tokred.methods.TARGETS)


# ---------------------------------------------------------------- folders


def test_a_method_that_is_on_no_model(tmp_path: Path) -> None:
    folder = tokred.save([tokred.ToMe(r=(8, -1)), tokred.DivPrune(budget=0.5)], tmp_path)
    assert tokred.load(folder) == [tokred.ToMe(r=(8, -1)), tokred.DivPrune(budget=0.5)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokred.apply(vit(), tokred.load(tokred.save(tokred.ToMe(r=2), tmp_path)))


def test_where_expose_and_windows_come_along(tmp_path: Path) -> None:
    model = tokred.apply(vit(), "tome", r=3, where=lambda name, _: name.endswith(("0", "2")), expose="last")
    folder = tokred.save(model, tmp_path)
    kept = json.loads((folder / "tokred.json").read_text())["methods"][0]["origin"]
    assert kept["where"] == ["blocks.0", "blocks.2"]
    assert kept["expose"] == "last"
    other = tokred.apply(vit(), tokred.load(folder))
    assert tokens(other) == tokens(model)
    assert tokred.save(other, tmp_path / "again")
    text = (folder / "tokred.json").read_text()
    assert (tmp_path / "again" / "tokred.json").read_text() == text
    free = tokred.apply(vit(), tokred.load(folder), where=lambda name, _: name.endswith("1"), expose="none")
    assert tokens(free) != tokens(model), "what the call says goes before what was saved"


def test_windows_come_along(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    family = next(iter(windowed.FAMILIES))
    model = tokred.apply(windowed.build(family), "tome", r=2, windows="all")
    folder = tokred.save(model, tmp_path)
    assert json.loads((folder / "tokred.json").read_text())["methods"][0]["origin"]["windows"] == "all"
    again = tokred.save(tokred.apply(windowed.build(family), folder), tmp_path / "again")
    assert (again / "tokred.json").read_text() == (folder / "tokred.json").read_text()


@pytest.mark.parametrize(
    ("build", "method", "parameters"),
    [
        (lambda: kv.build("llama"), "snapkv", {"budget": 8, "window": 2}),
        (lambda: kv.build("llama"), "fastkv", {"window": 2, "pool": 3, "tsp_len": 9, "tsp_layer": 0, "cap": 4}),
        (lambda: diffusion.build("sd15"), "tomesd", {"ratio": 0.5, "max_downsample": 8}),
        (lambda: vlm.build("llava"), [tokred.ToMe(r=1), tokred.SnapKV(budget=8, window=2), tokred.FastV(layer=1)], {}),
    ],
    ids=["cache", "two stages", "denoiser", "vision"],
)
def test_every_stage_is_saved_and_read_back(build: Any, method: Any, parameters: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    model = tokred.apply(build(), method, **parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("error", tokred.SettingWarning)
        other = tokred.apply(build(), tokred.load(tokred.save(model, tmp_path)))
    assert tokred.patched(other) == tokred.patched(model)


def test_another_model_and_another_version_are_both_named(tmp_path: Path) -> None:
    model = tokred.apply(vit(), "tome", r=[3, 2, 1])
    folder = tokred.save(model, tmp_path)
    other = vit()
    other.blocks = other.blocks[:2]
    said = (
        r"made for timm\S*VisionTransformer of 3 layers by tokred \S+, and this is timm\S*VisionTransformer of 2 layers"
    )
    with pytest.raises(
        ValueError, match=rf"3 entries, but the model has 2 blocks; the setting was {said} under tokred"
    ):
        tokred.apply(other, tokred.load(folder))
    assert tokred.patched(other) == []
    tokred.save(tokred.apply(vit(), "tome", r=3), folder)
    with pytest.warns(tokred.SettingWarning, match=rf"ToMe\(r=3\) may not suit this model: the setting was {said}"):
        tokred.apply(other, tokred.load(folder))
    tokred.save(tokred.apply(vit(), "tome", r=3, where=lambda name, _: name.endswith("2")), folder)
    with pytest.raises(ValueError, match=rf"acts in blocks.2, and there is no blocks.2 here: give where=... .*{said}"):
        tokred.apply(other, tokred.load(folder))
    text = (folder / "tokred.json").read_text()
    (folder / "tokred.json").write_text(text.replace(f'"tokred": "{tokred.__version__}"', '"tokred": "77.0"'))
    with pytest.warns(tokred.SettingWarning, match=rf"by tokred 77.0, and this is the older {tokred.__version__}"):
        tokred.load(folder)


def test_settings_are_written_where_they_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        tokred.save(tokred.ToMe(r=2), tmp_path / "file")
    with pytest.raises(TypeError, match="save takes a patched model, a method or a list of methods, got 'tome'"):
        tokred.save("tome", tmp_path)
    with pytest.raises(ValueError, match="revision is for repositories of the hub"):
        tokred.load(tokred.save(tokred.ToMe(r=2), tmp_path / "x"), revision="main")


def test_a_folder_with_files_of_others(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "weights.safetensors").write_text("a model's own")
    with pytest.raises(FileExistsError, match=r"weights.safetensors is there, and of no setting of tokred"):
        tokred.save(tokred.apply(vit(), "dynamicvit", rho=0.6), tmp_path)
    tokred.save(tokred.ToMe(r=2), tmp_path)
    assert (tmp_path / "weights.safetensors").read_text() == "a model's own"


def test_a_dict_that_a_user_wrote_is_a_setting(tmp_path: Path) -> None:
    (tmp_path / "tokred.json").write_text(json.dumps(tokred.ToMe(r=2).to_dict()))
    assert tokred.load(tmp_path) == tokred.ToMe(r=2)


def test_a_method_with_weights_is_saved_with_its_model(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    folder = tokred.save(tokred.apply(vit(), "dynamicvit", rho=0.6), tmp_path)
    with pytest.raises(TypeError, match="'dynamicvit' was loaded with weights, which belong to a model"):
        tokred.save(tokred.load(folder), tmp_path / "x")
    with pytest.raises(ValueError, match="a setting with weights is more than its dict: give the folder"):
        tokred.apply(vit(), json.loads((folder / "tokred.json").read_text()))


# ---------------------------------------------------------------- the hub


class Hub(types.ModuleType):
    """A hub of folders, in place of huggingface_hub."""

    def __init__(self, root: Path) -> None:
        super().__init__("huggingface_hub")
        self.root = root
        self.calls: list[tuple[str, Any]] = []
        hub = self

        class HfApi:
            def __init__(self, token: str | None = None) -> None:
                hub.calls.append(("token", token))

            def create_repo(self, repository: str, *, private: bool | None, exist_ok: bool) -> None:
                hub.calls.append(("private", private))
                assert exist_ok
                (hub.root / repository).mkdir(parents=True)

            def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
                hub.calls.append(("message", commit_message))
                for file in Path(folder_path).iterdir():
                    (hub.root / repo_id / file.name).write_bytes(file.read_bytes())
                return f"hub://{repo_id}"

        self.HfApi = HfApi

    def snapshot_download(self, repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls.append(("revision", revision))
        if not (self.root / repository).is_dir():
            raise ConnectionError("no such repository")
        return str(self.root / repository)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    return made


def test_a_setting_goes_to_the_hub_and_back(hub: Hub) -> None:
    model = tokred.apply(vit(), "tome", r=3, expose="last")
    assert tokred.push_to_hub(model, "someone/tome-vit", private=True, token="secret") == "hub://someone/tome-vit"
    assert hub.calls == [
        ("token", "secret"),
        ("private", True),
        ("message", f"tokred {tokred.__version__}: tome"),
    ]
    files = sorted(p.name for p in (hub.root / "someone" / "tome-vit").iterdir())
    assert files == ["README.md", "tokred.json"]
    card = (hub.root / "someone" / "tome-vit" / "README.md").read_text()
    assert 'tokred.apply(model, tokred.load("someone/tome-vit"))' in card
    assert "`ToMe(r=3)`" in card
    assert "VisionTransformer" in card
    assert "secret" not in card
    found = tokred.load("someone/tome-vit", revision="v1")
    assert found == tokred.ToMe(r=3)
    assert hub.calls[-1] == ("revision", "v1")
    assert isinstance(found, tokred.Method)
    assert found.origin is not None
    assert found.origin.expose == "last"


def test_a_hub_that_cannot_be_reached_says_so(hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match="'a/b' is no folder here, and cannot be had from the hub: Connection"):
        tokred.load("a/b")
    with pytest.raises(ValueError, match="repository must be user/name, got 'name'"):
        tokred.push_to_hub(tokred.ToMe(r=2), "name")
    assert hub.calls == [("revision", None)]


def test_without_the_library_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: tokred.load("a/b"), lambda: tokred.push_to_hub(tokred.ToMe(r=2), "a/b")):
        with pytest.raises(ImportError, match=r"need huggingface_hub: pip install 'tokred\[hub\]'"):
            call()


# ---------------------------------------------------------------- callbacks and the log


def test_a_callback_sees_every_forward_until_the_patch_is_off() -> None:
    model, seen = vit(), []
    tokred.apply(model, "tome", r=3, on_reduction=lambda m: seen.append(tokred.report(m).rows[-1]["tokens_out"]))
    expected = tokens(model)[-1]
    assert seen == [expected]
    inner = copy.deepcopy(model)
    tokens(inner)
    assert seen == [expected] * 2, "a copy calls the same function"
    tokred.remove(inner)
    tokred.remove(model)
    with torch.no_grad():
        model(torch.randn(1, 3, *model.patch_embed.img_size))
    assert seen == [expected] * 2
    assert not model._forward_hooks
    assert not inner._forward_hooks


def test_applying_again_leaves_no_callback_behind() -> None:
    seen: list[Any] = []
    model = tokred.apply(vit(), "tome", r=3, on_reduction=seen.append)
    tokens(tokred.apply(model, "tome", r=2))
    assert seen == []
    with pytest.raises(TypeError, match="on_reduction must be a function of the model, got 3"):
        tokred.apply(model, "tome", r=2, on_reduction=3)


def test_a_callback_may_change_the_setting() -> None:
    """As a schedule over the steps of a training does."""
    amounts = iter([2, 1])

    def anneal(model: nn.Module) -> None:
        tokred.apply(model, "tome", r=next(amounts), on_reduction=anneal)

    model = tokred.apply(vit(), "tome", r=3, on_reduction=anneal)
    for left in (2, 1):
        with torch.no_grad():
            model(torch.randn(1, 3, *model.patch_embed.img_size))
        assert tokred.patched(model) == [tokred.ToMe(r=left)]


def test_a_callback_on_what_holds_the_model() -> None:
    seen: list[Any] = []
    outer = nn.Sequential(vit(), nn.Identity())
    tokred.apply(outer, "tome", r=3, on_reduction=seen.append)
    with torch.no_grad():
        outer(torch.randn(1, 3, *outer[0].patch_embed.img_size))
    assert seen == [outer]


def test_the_log_says_what_was_done(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.INFO, "tokred"):
        model = tokred.apply(vit(), "tome", r=3)
        tokred.save(model, tmp_path)
        tokred.remove(model)
    lines = [r.getMessage() for r in caplog.records if r.name == "tokred"]
    assert lines[0] == "applied Patch(ToMe(r=3) on timm VisionTransformer)"
    assert lines[1] == f"saved a setting in {tmp_path}"
    assert lines[2].startswith("removed every patch from a VisionTransformer")
    assert any(isinstance(h, logging.NullHandler) for h in logging.getLogger("tokred").handlers)
    assert share.logger is logging.getLogger("tokred")

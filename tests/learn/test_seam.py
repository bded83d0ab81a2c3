"""The seam for methods with weights: who holds the module, what follows the model, what is saved, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import io
import json

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

import tokred
from tests.encoder.laws import assert_same, snapshot
from tests.encoder.tiny_timm import build, images
from tokred.errors import NothingRecordedError, UnsupportedModelError
from tokred.learn import Facts


def patched(method="dynamicvit", **more) -> nn.Module:
    torch.manual_seed(3)
    return tokred.apply(build("vit"), method, **({"rho": 0.6} if method == "dynamicvit" else {}), **more)


def weights(model: nn.Module, name: str = "dynamicvit") -> dict[str, torch.Tensor]:
    return tokred.modules(model)[name].state_dict()


def assert_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(x, b[name]) for name, x in a.items())


def test_the_module_is_no_part_of_the_model():
    plain = build("vit")
    before = snapshot(plain)
    model = patched()
    own = list(tokred.parameters(model))
    assert own
    assert sum(p.numel() for p in own) == sum(t.numel() for t in weights(model).values())
    assert list(model.state_dict()) == list(before["state"])
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert not {id(p) for p in own} & {id(p) for p in model.parameters()}
    assert repr(model) == before["repr"]
    tokred.remove(model)
    assert_same(before, snapshot(model))
    assert tokred.modules(model) == {}
    assert list(tokred.parameters(model)) == []


def test_it_follows_the_model_wherever_the_model_is_called():
    inner = build("vit")
    model = nn.Sequential(inner, nn.Identity())
    tokred.apply(model, "dynamicvit", rho=0.6)
    own = tokred.modules(model)["dynamicvit"]
    assert not own.training
    kept = {id(p) for p in own.parameters()}
    for part in (model, inner):
        part.train()
        assert own.training
        part.eval()
        assert not own.training
        part.double()
        assert {p.dtype for p in own.parameters()} == {torch.float64}
        part.to(torch.float32)
        assert {p.dtype for p in own.parameters()} == {torch.float32}
    assert {id(p) for p in own.parameters()} == kept, "an optimiser keeps hold of them"
    model.to("meta")
    assert {p.device.type for p in own.parameters()} == {"meta"}


def test_apply_brings_it_to_the_models_place_and_mode():
    model = tokred.apply(build("vit").double().train(), "dynamicvit", rho=0.6)
    own = tokred.modules(model)["dynamicvit"]
    assert own.training
    assert {p.dtype for p in own.parameters()} == {torch.float64}


def test_copies_and_pickles_have_their_own():
    model, x = patched(), images(2)
    model.train()(x)
    loaded = torch.load(_saved(model), weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert_weights(weights(other), weights(model))
        own = tokred.modules(other)["dynamicvit"]
        assert not {id(p) for p in own.parameters()} & {id(p) for p in tokred.parameters(model)}
        with torch.no_grad():
            assert torch.equal(other.eval()(x), model.eval()(x))
        other.train()
        assert own.training, "it is the one that the copy's blocks use"
        other(x)
        assert tokred.losses(other)
        for p in own.parameters():
            p.data.zero_()
    assert any(t.abs().sum() > 0 for t in weights(model).values())


def _saved(model: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_a_given_module_goes_on():
    model, x = patched(), images(2)
    own = tokred.modules(model)["dynamicvit"]
    with torch.no_grad():
        y = model(x)
        tokred.apply(model, "dynamicvit", rho=0.6, module=own)
        assert tokred.modules(model)["dynamicvit"] is own
        assert torch.equal(model(x), y)
        tokred.apply(model, "dynamicvit", rho=0.6)
        assert not torch.equal(model(x), y), "a new module is another"


def test_losses_are_those_of_the_last_forward_in_training():
    model, x = patched(), images(2)
    with pytest.raises(NothingRecordedError, match="the last forward was none in training"):
        tokred.losses(model)
    model.train()(x)
    first = tokred.losses(model)["dynamicvit.ratio"]
    model(x)
    assert tokred.losses(model)["dynamicvit.ratio"] is not first
    model.eval()(x)
    with pytest.raises(NothingRecordedError, match="the last forward was none in training"):
        tokred.losses(model)
    with pytest.raises(NothingRecordedError, match="no method with weights acts on the model"):
        tokred.losses(tokred.apply(model, "tome", r=2))


def test_no_gate_in_inference():
    model, x = patched(), images(2)
    model(x)
    assert tokred.trace(model).gate is None
    model.train()(x)
    gate = tokred.trace(model).gate
    assert gate.shape == (2, 26)
    assert gate.requires_grad
    assert tokred.trace(model).representative.shape == (2, 26)


def test_methods_decide_without_gradient_unless_they_say_so():
    assert tokred.DynamicViT.gradients
    found = [n for n in tokred.list_methods() if type(tokred.make(n)).gradients]
    assert found == ["avit", "diffrate", "dtem", "dynamicvit", "ltp"]
    with tokred.ToMe(r=1).recording():
        assert not torch.is_grad_enabled()
    with tokred.DynamicViT().recording():
        assert torch.is_grad_enabled()


# ---------------------------------------------------------------- saved and found again


def test_saved_and_found_again(tmp_path):
    model, x = patched(), images(2)
    with torch.no_grad():
        y = model(x)
    folder = tokred.save(model, tmp_path / "a" / "b")
    assert sorted(p.name for p in folder.iterdir()) == ["tokred.json", "weights.safetensors"]
    found = json.loads((folder / "tokred.json").read_text())
    assert found["format"] == 1
    assert found["tokred"] == tokred.__version__
    row = found["methods"][0]
    assert row["method"] == "dynamicvit"
    assert row["parameters"]["rho"] == 0.6
    assert row["host"] == {
        "model": "timm.models.vision_transformer.VisionTransformer", "depth": 3, "width": 48, "heads": 3, "prefix": 1,
        "suffix": 0, "pixels": 192,
    }  # fmt: skip
    method = tokred.load(folder)
    assert method == tokred.DynamicViT(rho=0.6)
    other = tokred.apply(build("vit"), method)
    assert_weights(weights(other), weights(model))
    with torch.no_grad():
        assert torch.equal(other(x), y)
    assert copy.deepcopy(method).loaded is not None
    assert dataclasses.replace(method, rho=0.5).loaded is None


def test_facts_of_other_versions(tmp_path):
    """A folder from before patches were told of is as good; one that tells more than is known here says so."""
    model = patched()
    path = tokred.save(model, tmp_path) / "tokred.json"
    found = json.loads(path.read_text())
    host = found["methods"][0]["host"]
    del host["pixels"]
    path.write_text(json.dumps(found))
    method = tokred.load(tmp_path)
    assert method.loaded.facts.pixels == 0
    assert_weights(weights(tokred.apply(build("vit"), method)), weights(model))
    host["sides"] = 4
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"tokred.json, written by tokred .*, does not fit the 'dynamicvit'.*'sides'"):
        tokred.load(tmp_path)


def test_learned_thresholds_are_saved(tmp_path):
    model = patched("ltp", theta_final=0.06, learn=True)
    with torch.no_grad():
        tokred.modules(model)["ltp"].delta += 0.01
    other = tokred.apply(build("vit"), tokred.load(tokred.save(model, tmp_path)))
    assert_weights(weights(other, "ltp"), weights(model, "ltp"))


def test_settings_without_weights_are_a_small_json(tmp_path):
    folder = tokred.save(patched(), tmp_path)
    assert (folder / "weights.safetensors").exists()
    tokred.save(tokred.apply(build("vit"), "tome", r=[3, 2]), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["tokred.json"], "of the setting before nothing is left"
    assert tokred.load(folder) == tokred.ToMe(r=[3, 2])


def test_weights_of_another_model_are_refused(tmp_path):
    folder = tokred.save(patched(), tmp_path)
    other = build("vit")
    other.blocks = other.blocks[:2]
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"learned on .*VisionTransformer of 3 layers, 48 wide.* is .*of 2 layers, 48"):
        tokred.apply(other, tokred.load(folder))
    assert_same(before, snapshot(other))


def test_files_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no tokred.json: give a folder that tokred.save has written"):
        tokred.load(tmp_path)
    folder = tokred.save(patched(), tmp_path)
    text = (folder / "tokred.json").read_text()

    def written(old: str, new: str) -> None:
        assert old in text
        (folder / "tokred.json").write_text(text.replace(old, new))

    written('"format": 1', '"format": 7')
    with pytest.raises(ValueError, match=r"format 7, written by tokred .*; this is tokred .*, which reads .* up to 1"):
        tokred.load(folder)
    written('"version": 1', '"version": 9')
    with pytest.raises(ValueError, match="settings of 'dynamicvit' have version 9, this tokred reads up to 1"):
        tokred.load(folder)
    written('"rho"', '"share"')
    with pytest.raises(
        ValueError,
        match=r"by tokred .*, does not fit the 'dynamicvit' of this tokred .*: .*'share'",
    ):
        tokred.load(folder)
    written('"dynamicvit"', '"dynamicvat"')
    with pytest.raises(tokred.UnknownMethodError, match="did you mean 'dynamicvit'"):
        tokred.load(folder)
    (folder / "tokred.json").write_text("{")
    with pytest.raises(ValueError, match="is not a setting of tokred"):
        tokred.load(folder)
    (folder / "tokred.json").write_text(text)
    whole = (folder / "weights.safetensors").read_bytes()
    for part in (b"", whole[:20], whole[:-3]):
        (folder / "weights.safetensors").write_bytes(part)
        with pytest.raises(ValueError, match=r"weights.safetensors holds no weights of a setting of tokred: Error"):
            tokred.load(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has weights, but .*weights.safetensors is not there"):
        tokred.load(folder)


def test_weights_for_other_settings_are_refused(tmp_path):
    folder = tokred.save(patched(), tmp_path)
    text = (folder / "tokred.json").read_text()
    (folder / "tokred.json").write_text(text.replace('"at": null', '"at": [1]'))
    with pytest.raises(ValueError, match=r"the weights do not fit DynamicViT\(.*: stages.1.* must be left out"):
        tokred.apply(build("vit"), tokred.load(folder))


# ---------------------------------------------------------------- refusals


def test_refusals_of_apply():
    model = build("vit")
    own = tokred.modules(patched())["dynamicvit"]
    with pytest.raises(TypeError, match="module must be a Predictors for 'dynamicvit', got a Linear"):
        tokred.apply(model, "dynamicvit", module=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"module does not fit DynamicViT\(.* of 3 layers, 48 wide: stages.1"):
        tokred.apply(model, "dynamicvit", at=[1], module=own)
    with pytest.raises(TypeError, match="module goes with one method that has weights; of 'tome' 0 have some"):
        tokred.apply(model, "tome", r=2, module=own)
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got str"):
        tokred.apply(model, "dynamicvit", module="predictors")
    assert tokred.patched(model) == []


def test_saving_a_model_without_a_patch(tmp_path):
    with pytest.raises(NothingRecordedError, match="not patched, so there is no setting to save"):
        tokred.save(build("vit"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_host_whose_facts_are_unknown():
    model = build("vit")
    for block in model.blocks:
        block.attn.num_heads = None
    with pytest.raises(UnsupportedModelError, match=r"blocks.0 does not say how many heads its attention has"):
        tokred.apply(model, "dynamicvit", rho=0.6)
    assert tokred.patched(model) == []


def test_stages_without_a_seam():
    pytest.importorskip("transformers")
    from tokred.adapters.tiny import kv
    from tokred.methods.vlm.fastkv import FastKV, FastKVPropagation

    @dataclasses.dataclass(frozen=True)
    class Trained(FastKVPropagation):
        @property
        def reads(self):
            return super().reads | {"module"}

        def module(self, facts):
            return nn.Linear(2, 2)

    model = kv.build(next(iter(kv.FAMILIES)))
    with pytest.raises(tokred.MissingInputError, match=r"module.*does not supply"):
        tokred.apply(model, Trained(FastKV(tsp_layer=1)))


def test_facts():
    a = Facts("timm.x.Y", 3, 48, 3, prefix=1)
    assert a.fits(Facts("timm.x.Y", 3, 48, 6))
    assert not a.fits(Facts("timm.x.Y", 3, 64, 3))
    assert str(a) == "timm.x.Y of 3 layers, 48 wide"
    assert Facts(**a.to_dict()) == a


@pytest.mark.slow
def test_compiled_and_exported():
    model, x = patched(), images(2)
    with torch.no_grad():
        y = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), y)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), y)
    model.train()
    torch.manual_seed(0)
    expected, terms = model(x), tokred.losses(model)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(tokred.losses(model), terms)
    tokred.losses(model)["dynamicvit.ratio"].backward()
    assert all(p.grad is not None for p in tokred.parameters(model))

"""Training by a recipe: stopped and gone on with, schedules, the command line, and transformers' trainer."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("safetensors")

import tokred
from tests.encoder.tiny_timm import build, images
from tokred import learn
from tokred.learn.training import Checkpoint, Samples, accuracy, train


def small(method: str = "cropr", **changes) -> learn.Recipe:
    settings = {"cropr": {"r": 4, "classes": 3}, "dynamicvit": {"rho": 0.6}, "tome": {"r": 2}}[method]
    return learn.Recipe(method, settings, **{"steps": 6, "batch": 8, "lr": 1e-3, "lr_method": 3e-3, **changes})


def data(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    x = images(n)
    return x, x.mean((2, 3)).argmax(1)


def assert_weights(one, other) -> None:
    for a, b in ((one.state_dict(), other.state_dict()), *((tokred.modules(one)[k].state_dict(), m.state_dict())
                 for k, m in tokred.modules(other).items())):  # fmt: skip
        assert a.keys() == b.keys()
        assert all(torch.equal(value, b[name]) for name, value in a.items())


def dropping(seed: int = 0):
    """A model whose forward draws in training, so that draws have to be those of the step."""
    model = build("vit", seed)
    for block in model.blocks:
        block.attn.proj_drop = torch.nn.Dropout(0.1)
    return model


@pytest.mark.parametrize("method", ["cropr", "dynamicvit"])
def test_resumed_equals_uninterrupted_bit_for_bit(method, tmp_path):
    ramps = {"cropr": {"r": learn.Ramp(0, 4, 0.5)}, "dynamicvit": {"tau": learn.Ramp(1.0, 0.1, geometric=True)}}
    recipe = small(method, logits=0.5, schedule=ramps[method], warmup=2)
    whole = train(dropping(), data(), recipe, tmp_path / "whole")
    assert (whole.begun, len(whole.steps)) == (0, 6)
    first = train(dropping(), data(), recipe, tmp_path / "parts", until=4)
    assert len(first.steps) == 4
    torch.manual_seed(99)
    second = train(dropping(), data(), recipe, tmp_path / "parts")
    assert second.begun == 4
    assert second.steps == whole.steps
    assert_weights(second.model, whole.model)
    lines = (tmp_path / "parts" / "train.jsonl").read_text()
    assert lines == (tmp_path / "whole" / "train.jsonl").read_text()
    assert json.loads(lines.splitlines()[5])["step"] == 5
    again = train(dropping(), data(), recipe, tmp_path / "parts")
    assert again.begun == 6, "there is nothing left to do"
    assert_weights(again.model, whole.model)
    # On a new model: the method by tokred.load, and the model's own weights.
    from safetensors.torch import load_model

    other = dropping(5)
    load_model(other, str(tmp_path / "parts" / "model.safetensors"))
    tokred.apply(other, tokred.load(tmp_path / "parts"))
    assert_weights(other, whole.model)


def test_training_teaches(tmp_path):
    recipe = small(steps=40)
    done = train(build("vit"), data(), recipe, tmp_path, every=15)
    first, last = (sum(step.loss for step in part) / 10 for part in (done.steps[:10], done.steps[-10:]))
    assert last < 0.7 * first
    assert not done.model.training
    with torch.no_grad():
        assert accuracy(done.model, Samples(data())) > 0.8
    assert done.report.macs < done.report.macs_unpatched


def test_a_checkpoint_of_another_recipe_or_model_is_refused(tmp_path):
    train(build("vit"), data(), small(steps=2), tmp_path)
    with pytest.raises(ValueError, match=r"was written with lr 0.001, and now it is 0.1: go on with the same, or give"):
        train(build("vit"), data(), small(steps=2, lr=0.1), tmp_path)
    with pytest.raises(ValueError, match=r"with model 'timm.*VisionTransformer', and now it is 'timm.*Eva'"):
        train(build("eva02 (rope, swiglu)"), data(), small(steps=2), tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match="is no checkpoint of tokred"):
        train(build("vit"), data(), small(steps=2), tmp_path)
    assert train(build("vit"), data(), small(steps=2), tmp_path, resume=False).begun == 0
    assert Checkpoint.load(tmp_path / "none", {}) is None


def test_bf16_and_a_frozen_model(tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    recipe = small(lr=0.0, steps=3)
    model = build("vit")
    before = copy.deepcopy(model.state_dict())
    done = train(model, data(), recipe, tmp_path, accelerator=Accelerator(cpu=True, mixed_precision="bf16"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.dtype == torch.float32 for p in tokred.parameters(done.model))
    assert not (tmp_path / "model.safetensors").exists()
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="mixed_precision must be 'no' or 'bf16', got 'fp16'"):
        train(build("vit"), data(), recipe, tmp_path, accelerator=SimpleNamespace(
            mixed_precision="fp16", distributed_type=SimpleNamespace(value="NO")))  # fmt: skip
    with pytest.raises(NotImplementedError, match="train shards weights by FSDP 2, got FSDP 1: set fsdp_version to 2"):
        train(build("vit"), data(), recipe, tmp_path, accelerator=SimpleNamespace(
            distributed_type=SimpleNamespace(value="FSDP"), state=SimpleNamespace(
            fsdp_plugin=SimpleNamespace(fsdp_version=1))))  # fmt: skip
    with pytest.raises(NotImplementedError, match=r"of kind NO, MULTI_GPU, .* and FSDP, got DEEPSPEED"):
        train(build("vit"), data(), recipe, tmp_path, accelerator=SimpleNamespace(
            distributed_type=SimpleNamespace(value="DEEPSPEED")))  # fmt: skip


def test_what_cannot_be_trained(tmp_path):
    with pytest.raises(ValueError, match=r"lr_method is 0.003, but 'tome' has no weights to train in this model"):
        train(build("vit"), data(), small("tome"), tmp_path)
    with pytest.raises(ValueError, match="a batch of 64 needs as many samples, got 40"):
        train(build("vit"), data(), small(batch=64), tmp_path)
    with pytest.raises(ValueError, match="until must lie in 1 to 6"):
        train(build("vit"), data(), small(), tmp_path, until=7)
    with pytest.raises(ValueError, match="as many labels as images are needed, got 4 images, 3 labels"):
        Samples((torch.zeros(4, 1), torch.zeros(3)))
    with pytest.raises(TypeError, match="must be a pair of tensors, or a data set with a length and items by number"):
        Samples(iter([]))
    with pytest.raises(ValueError, match=r"a pair of inputs and labels, or a mapping with 'labels', got a Tensor"):
        Samples([torch.zeros(1), torch.zeros(1), torch.zeros(1)]).batch([0, 2])
    with pytest.raises(ValueError, match="the method makes no soft decisions: leave out tokens"):
        train(build("vit"), data(), small(tokens=0.5, tokens_of="norm"), tmp_path)
    assert tokred.patched(train(build("vit"), data(), small("tome", lr_method=None, steps=1), tmp_path).model)


def test_top1_of_maps_is_refused():
    """As many labels a row as there are samples would be compared with each other's outputs."""
    x, _ = data(5)
    with pytest.raises(ValueError, match=r"one class a sample, got \(5, 5, 5\): hold no samples out \(held 0\)"):
        accuracy(build("vit"), Samples((x, torch.zeros(5, 5, 5).long())))


def test_every_epoch_has_an_order_of_its_own():
    samples = Samples(data(20))
    steps = [samples.rows(i, 8, 0) for i in range(4)]
    for epoch in (steps[:2], steps[2:]):
        assert len({row for rows in epoch for row in rows}) == 16
    assert steps[0] != steps[2]
    assert samples.rows(0, 8, 1) != steps[0]
    pairs = Samples([{"pixel_values": torch.zeros(3), "labels": i} for i in range(4)])
    x, y = pairs.batch([3, 1])
    assert list(x) == ["pixel_values"]
    assert y.tolist() == [3, 1]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    from safetensors.torch import load_file

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = Path(__file__).with_name("two_trainers.py")
    workers = [subprocess.Popen([sys.executable, script, str(i), str(port), tmp_path / "two"]) for i in range(2)]
    assert [worker.wait(timeout=280) for worker in workers] == [0, 0]
    train(build("vit"), data(16), small(steps=4), tmp_path / "one")
    for kind, name in itertools.product(("whole", "shards"), ("model.safetensors", "weights.safetensors")):
        one, two = (load_file(tmp_path / folder / name) for folder in ("one", f"two/{kind}"))
        assert one.keys() == two.keys()
        for key, value in one.items():
            if key.endswith("qkv.bias"):
                continue  # that of keys changes nothing: its gradient is rounding, of which AdamW makes whole steps
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=f"{kind} {name} {key}")
    # A checkpoint of shards is whole: one process goes on from it as from any other.
    found = torch.load(tmp_path / "two" / "shards" / "checkpoint.pt", weights_only=True)
    assert all(type(value) is torch.Tensor for value in found["model"].values())
    moments = [v for kept in found["optimiser"]["state"].values() for v in kept.values()]
    assert {tuple(v.shape) for v in moments} >= {tuple(v.shape) for v in found["model"].values() if v.ndim > 1}


# ---------------------------------------------------------------- schedules


def test_ramps():
    ramp = learn.Ramp(0, 8, 0.5)
    assert [ramp.at(i, 20) for i in range(12)] == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8]
    assert [learn.Ramp(1.0, 0.0).at(i, 3) for i in range(3)] == [1.0, 0.5, 0.0]
    assert [learn.Ramp(1.0, 0.01, geometric=True).at(i, 3) for i in range(3)] == pytest.approx([1, 0.1, 0.01])
    assert learn.Ramp(1, 2).at(0, 1) == 2
    recipe = learn.recipe({"method": "cropr", "training": {"steps": 5}, "schedule": {"r": {"start": 0, "end": 4}}})
    assert [recipe.at(i) for i in range(5)] == [{"r": i} for i in range(5)]
    for given, text in (
        ({"start": 0}, r"\[schedule.r\] of the recipe must have a start and an end"),
        ({"start": 0, "end": 4, "til": 1}, r"\[schedule.r\] of the recipe has an unknown key 'til'; did you mean"),
        ({"start": 0, "end": 4, "until": 2}, r"\[schedule.r\] of the recipe: until must lie in \(0, 1\]"),
        ({"start": 0, "end": 4, "geometric": True}, "a geometric ramp needs start and end above 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            learn.recipe({"method": "cropr", "schedule": {"r": given}})


def test_parameters_change_while_the_weights_stay():
    model, x = build("vit"), images(2)
    tokred.apply(model, "cropr", r=4, classes=2)
    own = tokred.modules(model)["cropr"]
    with torch.no_grad():
        model(x)
        assert tokred.change(model, r=6) == tokred.Cropr(r=6, classes=2)
        model(x)
    assert [layer.tokens_out for layer in tokred.report(model).layers] == [19, 13, 13]
    assert tokred.modules(model)["cropr"] is own
    assert tokred.patched(model) == [tokred.Cropr(r=6, classes=2)]
    assert tokred.change(copy.deepcopy(model), r=6) is not None
    for wrong, error, text in (
        ({"rate": 3}, TypeError, "'cropr' has no parameter 'rate'; it has r, fuse, classes"),
        ({"r": -1}, ValueError, "r"),
        ({"fuse": True}, ValueError, r"runs in another way than Cropr\(r=6, classes=2\): call tokred.apply"),
        ({"classes": 3}, ValueError, "module does not fit"),
    ):
        with pytest.raises(error, match=text):
            tokred.change(model, **wrong)
    assert tokred.patched(model) == [tokred.Cropr(r=6, classes=2)]
    with pytest.raises(tokred.NothingRecordedError, match="no method acts in the blocks"):
        tokred.change(tokred.remove(model), r=1)


# ---------------------------------------------------------------- the command line


def test_the_command(tmp_path):
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    pytest.importorskip("pandas")
    from typer.testing import CliRunner

    from tokred.cli.main import app

    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'method = "cropr"\n[parameters]\nr = 4\nclasses = 3\n'
        "[training]\nsteps = 2\nbatch = 2\nlr = 0.0\nlr_method = 1e-3\n"
    )
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom tokred.adapters.tiny import timm as tiny\n\n\n"
        "def model():\n    return tiny.build('vit')\n\n\n"
        "def samples():\n    return torch.utils.data.TensorDataset(tiny.images(12), torch.arange(12) % 3)\n"
    )
    mine = [f"{tmp_path / 'mine.py'}:{name}" for name in ("model", "samples")]
    given = ["train", str(recipe), mine[0], "--data", mine[1], "--held", "0.5", "--out", str(tmp_path / "a"), "--json"]
    done = CliRunner().invoke(app, [*given, "--until", "1"])
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    assert (found["begun"], found["steps"]) == (0, 1)
    assert found["rows"][1]["work"] < 0.9 < found["rows"][0]["work"] == 1
    done = CliRunner().invoke(app, given)
    assert (json.loads(done.stdout)["begun"], json.loads(done.stdout)["steps"]) == (1, 2)
    assert tokred.load(tmp_path / "a") == tokred.Cropr(r=4, classes=3)
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('method = "cropr"\n[training]\nstep = 2\n')
    for words, text in (
        (["train", str(wrong)], "has an unknown key 'step'; did you mean 'steps'? Known are steps, batch"),
        (["train", "crop"], "no recipe 'crop': give the path of a .toml file, or one of adore, avit, bavit, cropr, "),
        (["train", "cropr", "--precision", "fp8"], "--precision must be no or bf16, got 'fp8'"),
        (["train", str(recipe), mine[0], "--data", mine[0]], "must return a data set with items by number"),
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2
        assert text in done.stderr


# ---------------------------------------------------------------- transformers' trainer


def test_a_callback_of_the_trainer(tmp_path):
    pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments, trainer

    from tokred.adapters.tiny import transformers as tiny
    from tokred.learn.training.callback import MethodCallback

    word, known = "keep_torch_compile", inspect.signature(accelerate.Accelerator.unwrap_model).parameters
    if word in inspect.getsource(trainer) and word not in known:
        pytest.skip(f"no model trains: this Trainer gives {word} to accelerate, which {accelerate.__version__} lacks")

    class Own(Trainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            own = [p for p in tokred.parameters(self.model) if id(p) not in known]
            if own:
                optimizer.add_param_group({"params": own, "lr": 1e-3})
            return optimizer

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss = loss + sum(tokred.losses(self.model, targets=inputs["labels"]).values())
            return (loss, outputs) if return_outputs else loss

    ids = tiny.FAMILIES["BERT classifier"].inputs(8)["input_ids"]
    samples = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(ids)]

    def run(folder, *, resume=None, kind=Own, seed=0):
        model = tokred.apply(tiny.build("BERT classifier").train(), "cropr", r=4, classes=2)
        torch.manual_seed(seed)
        for p in tokred.parameters(model):
            torch.nn.init.normal_(p, std=0.02)
        arguments = TrainingArguments(
            str(folder), max_steps=4, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_steps=2,
            disable_tqdm=True, logging_strategy="no", save_strategy="steps",
        )  # fmt: skip
        rates, begun = [], []
        callback = MethodCallback({"r": learn.Ramp(0, 4, 0.75)})
        begin = callback.on_step_begin

        def noted(args, state, control, **kwargs):
            begin(args, state, control, **kwargs)
            assert all(p.grad is None for p in tokred.parameters(model)), "the trainer forgets the model's own alone"
            begun.append(copy.deepcopy(tokred.modules(model)["cropr"].state_dict()))
            rates.append(tokred.patched(model)[0].r.value)

        callback.on_step_begin = noted
        kind(model, arguments, train_dataset=samples, callbacks=[callback]).train(resume_from_checkpoint=resume)
        return begun, rates

    whole, rates = run(tmp_path / "a")
    assert rates == [0, 2, 4, 4]
    assert (tmp_path / "a" / "checkpoint-2" / "tokred" / "weights.safetensors").exists()
    # A trainer that goes on gets the method's weights back, whatever the new model began with.
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "checkpoint-2").rename(tmp_path / "b" / "checkpoint-2")
    other, rates = run(tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-2"), seed=7)
    assert rates == [4, 4]
    assert all(torch.equal(value, other[0][name]) for name, value in whole[2].items())
    assert any(not torch.equal(value, whole[0][name]) for name, value in whole[2].items())
    with pytest.raises(ValueError, match=r"the optimiser does not know the weights of 'cropr': add a group with"):
        run(tmp_path / "c", kind=Trainer)
    with pytest.raises(TypeError, match=r"schedule\['r'\] must be a tokred.learn.Ramp, got 4"):
        MethodCallback({"r": 4})

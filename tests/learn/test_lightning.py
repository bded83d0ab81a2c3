"""The callback for Lightning: by a trainer where it is installed, and hook by hook where it is not."""

from __future__ import annotations

import copy
import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("timm")

import tokred
from tests.encoder.tiny_timm import build, images
from tokred.learn import Ramp

NAME = "tokred.learn.training.lightning"


@pytest.fixture
def callback(monkeypatch):
    """The class on an empty base, as the hooks of the trainer call it."""
    fake = ModuleType("lightning.pytorch")
    fake.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", fake)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME).LightningCallback
    sys.modules.pop(NAME, None)


def patched(seed: int = 0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(tokred.apply(build("vit").train(), "cropr", r=4, classes=7))


def trainer(model, *, own: bool = True, steps: float = 4):
    weights = [*model.parameters(), *(tokred.parameters(model) if own else ())]
    return SimpleNamespace(
        optimizers=[torch.optim.AdamW(weights, lr=1e-3)], estimated_stepping_batches=steps, global_step=0
    )


def test_hook_by_hook(callback):
    model = patched()
    made, run = callback({"r": Ramp(0, 4, 0.75)}), trainer(model)
    made.on_train_start(run, model)
    rates, x, y = [], images(2), torch.tensor([1, 2])
    for step in range(4):
        run.global_step = step
        made.on_train_batch_start(run, model, None, step)
        rates.append(tokred.patched(model)[0].r.value)
        loss = model(x).square().mean() + sum(tokred.losses(model, targets=y).values())
        run.optimizers[0].zero_grad()
        loss.backward()
        made.on_before_optimizer_step(run, model, run.optimizers[0])
        run.optimizers[0].step()
    assert rates == [0, 2, 4, 4]
    checkpoint: dict = {"state_dict": {}}
    made.on_save_checkpoint(run, model, checkpoint)
    assert checkpoint["tokred"]["methods"][0]["method"] == "cropr"
    kept = copy.deepcopy(checkpoint)
    other = patched(5)
    made.on_load_checkpoint(trainer(other), other, kept)
    mine, theirs = (tokred.modules(m)["cropr"].state_dict() for m in (model, other))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_refusals(callback):
    model = patched()
    with pytest.raises(ValueError, match=r"no optimiser knows the weights of 'cropr': give tokred.parameters"):
        callback().on_train_start(trainer(model, own=False), model)
    with pytest.raises(ValueError, match=r"give the trainer max_steps or max_epochs, got inf steps"):
        callback({"r": Ramp(0, 4)}).on_train_start(trainer(model, steps=float("inf")), model)
    with pytest.raises(TypeError, match=r"schedule\['r'\] must be a tokred.learn.Ramp, got 4"):
        callback({"r": 4})
    with pytest.raises(ValueError, match="has weights of no method, and the model has methods with weights 'cropr'"):
        callback().on_load_checkpoint(trainer(model), model, {})


def test_a_missing_lightning_is_named(monkeypatch):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(ImportError, match=r"Lightning, which is not installed: pip install 'tokred\[lightning\]'"):
        importlib.import_module(NAME)


def test_a_trainer_of_lightning(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")
    sys.modules.pop(NAME, None)
    callback = importlib.import_module(NAME).LightningCallback

    class Own(lightning.LightningModule):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.model = patched(seed)

        def configure_optimizers(self):
            return torch.optim.AdamW([*self.parameters(), *tokred.parameters(self.model)], lr=1e-3)

        def training_step(self, batch, index):
            x, y = batch
            loss = torch.nn.functional.cross_entropy(self.model(x), y)
            return loss + sum(tokred.losses(self.model, targets=y).values())

    data = torch.utils.data.TensorDataset(images(8), torch.arange(8) % 7)
    given = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "default_root_dir": tmp_path}

    def run(seed: int, steps: int, resume=None):
        module = Own(seed)
        made = lightning.Trainer(max_steps=steps, callbacks=[callback({"r": Ramp(0, 4, 0.75)})], **given)
        made.fit(module, torch.utils.data.DataLoader(data, batch_size=2), ckpt_path=resume)
        return made, module

    made, module = run(0, 4)
    assert tokred.patched(module.model)[0].r.value == 4
    made.save_checkpoint(tmp_path / "a.ckpt")
    _, other = run(5, 5, tmp_path / "a.ckpt")
    assert tokred.modules(other.model)["cropr"].queries.shape == tokred.modules(module.model)["cropr"].queries.shape

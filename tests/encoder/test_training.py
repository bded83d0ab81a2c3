"""Training, checkpointing, compilation, export and processes: a patched model behaves like any other model."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")

import tokred
from tests.encoder.tiny_timm import build, images


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(a, b, rtol=1e-4, atol=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=name)


def step(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return gradients(model)


@pytest.mark.parametrize("method", [("tome", {"r": 4}), ("pitome", {"ratio": 0.8}), ("evit", {"blocks": (1,)})])
def test_a_training_step_reaches_every_parameter(method):
    model, x = build("vit").train(), images()
    tokred.apply(model, method[0], **method[1])
    found = step(model, x)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in found.values())


# timm's Eva passes keywords through its checkpoints, which reentrant checkpointing cannot do.
@pytest.mark.parametrize(("family", "reentrant"), [("vit", False), ("vit", True), ("dinov3 (rope, registers)", False)])
def test_checkpointing_gives_the_same_gradients(family, reentrant):
    import timm.models

    model, x = build(family).train(), images().requires_grad_()
    tokred.apply(model, "tome", r=4)
    expected = step(model, x)
    model.set_grad_checkpointing(True)
    with _reentrant(timm, reentrant):
        assert_gradients(step(model, x), expected)


class _reentrant:
    """timm's own switch for the kind of checkpointing."""

    def __init__(self, timm, value):
        self.timm, self.value = timm, value

    def __enter__(self):
        from timm.layers import config

        self.set = getattr(config, "set_reentrant_ckpt", None)
        if self.set is None and self.value:
            pytest.skip("this timm cannot switch to reentrant checkpointing")
        if self.set:
            self.set(self.value)

    def __exit__(self, *error):
        if self.set:
            self.set(False)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_before_one_backward(reentrant):
    """With checkpointing the second forward must not lend its state to the recomputation of the first.

    Reentrant checkpointing loses the state of the first forward: an error, never silently wrong gradients.
    """
    import timm.models

    model = build("vit").train()
    tokred.apply(model, "tome", r=4)
    a, b = images(3, seed=1), images(3, seed=2)
    model.zero_grad()
    (model(a).square().sum() + model(b).square().sum()).backward()
    expected = gradients(model)
    model.set_grad_checkpointing(True)
    model.zero_grad()
    with _reentrant(timm, reentrant):
        loss = model(a.requires_grad_()).square().sum() + model(b.requires_grad_()).square().sum()
        if reentrant:
            with pytest.raises(tokred.TokenStateError, match="checkpointing reentrantly"):
                loss.backward()
            return
        loss.backward()
    assert_gradients(gradients(model), expected)


def test_the_state_of_another_forward_is_never_borrowed():
    """A block whose input lost its state raises in a recomputation instead of taking the newest one."""
    model, x = build("vit"), images()
    tokred.apply(model, "tome", r=4)
    with torch.no_grad():
        model(x)
        with pytest.raises(tokred.TokenStateError, match="before block 1"):
            model.blocks[1](torch.randn(3, 9, 48))


def test_autocast():
    model, x = build("vit").train(), images()
    tokred.apply(model, "tome", r=4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_state_dict_round_trip_between_patched_and_not():
    model, x = build("vit"), images()
    tokred.apply(model, "tome", r=4)
    other = build("vit", seed=5)
    other.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(tokred.apply(other, "tome", r=4)(x), y)


@pytest.mark.hosts
@pytest.mark.slow
def test_compiles_to_one_graph_and_not_again_for_each_batch():
    from torch._dynamo.testing import CompileCounter

    for family in ("vit", "eva02 (rope, swiglu)", "beit (own bias)"):
        model = build(family)
        tokred.apply(model, "tome", r=4)
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        with torch.no_grad():
            for b in (3, 5, 2):
                x = images(b)
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        assert counter.frame_count <= 2, family


@pytest.mark.slow
def test_compiled_evit_and_pitome():
    torch._dynamo.reset()
    for name, parameters in (("evit", {"blocks": (1,)}), ("pitome", {"ratio": 0.8})):
        model = build("vit")
        tokred.apply(model, name, **parameters)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_exports_with_a_dynamic_batch():
    model = build("vit")
    tokred.apply(model, "tome", r=4)
    dim = torch.export.Dim("batch", min=2, max=16)
    with torch.no_grad():
        program = torch.export.export(model, (images(3),), dynamic_shapes=({0: dim},)).module()
        for b in (3, 7):
            torch.testing.assert_close(program(images(b)), model(images(b)), rtol=1e-4, atol=1e-5)


def test_a_record_is_refused_after_compiled_forwards_only():
    model = build("vit")
    with pytest.raises(tokred.NothingRecordedError, match="not patched"):
        tokred.report(model)
    tokred.apply(model, "tome", r=4)
    with pytest.raises(tokred.NothingRecordedError, match="run one forward"):
        tokred.trace(model)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path):
    """DDP and FSDP2 over gloo, with and without checkpointing."""
    model, x = build("vit").train(), images(4)
    tokred.apply(model, "tome", r=4)
    expected = {k: v / 2 for k, v in step(model, x).items()}
    script, path = Path(__file__).parents[1] / "adapters" / "two_processes.py", tmp_path / "gradients.pt"
    port = _free_port()
    workers = [subprocess.Popen([sys.executable, script, str(rank), str(port), path]) for rank in range(2)]
    assert [w.wait(timeout=280) for w in workers] == [0, 0]
    found = torch.load(path)
    assert sorted(found) == ["ddp", "ddp checkpointed", "fsdp2", "fsdp2 checkpointed"]
    for gradient in found.values():
        assert_gradients(gradient, expected)

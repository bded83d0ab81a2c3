"""What other libraries put around a model: a patch works under it in either order, or is refused; never silence."""

from __future__ import annotations

import copy
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

import tokred
from tests.encoder import tiny_open_clip, tiny_timm, tiny_transformers, tiny_windows

CPU = torch.device("cpu")


def timm_family(name: str) -> tuple[nn.Module, Any]:
    return tiny_timm.build(name), lambda model: [model(tiny_timm.images())]


def transformers_family(name: str) -> tuple[nn.Module, Any]:
    given = tiny_transformers.FAMILIES[name].inputs(3)
    return tiny_transformers.build(name), lambda model: tiny_transformers.read(name, model(**given))


def open_clip_family(name: str) -> tuple[nn.Module, Any]:
    return tiny_open_clip.build(name), lambda model: tiny_open_clip.outputs(model, *tiny_open_clip.inputs(name))


def window_family(name: str) -> tuple[nn.Module, Any]:
    return tiny_windows.build(name), lambda model: tiny_windows.read(model, tiny_windows.images())


HOSTS = {
    "timm vit": lambda: timm_family("vit"),
    "timm beit": lambda: timm_family("beit (own bias)"),
    "timm rope": lambda: timm_family("dinov3 (rope, registers)"),
    "transformers vit": lambda: transformers_family("ViT classifier"),
    "transformers dinov2": lambda: transformers_family("DINOv2"),
    "open_clip": lambda: open_clip_family(next(iter(tiny_open_clip.FAMILIES))),
    "sam": lambda: window_family("SAM vision"),
}


def offload(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, CPU)


def same_device(model: nn.Module) -> nn.Module:
    """Hooks on every block, as ``device_map`` puts them."""
    hooks = pytest.importorskip("accelerate.hooks")
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(CPU, io_same_device=True))
    return model


def twice(model: nn.Module) -> nn.Module:
    hooks = pytest.importorskip("accelerate.hooks")
    same_device(model)
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(CPU), append=True)
    return model


WRAPPERS = {"offloaded": offload, "device map": same_device, "two hooks": twice}


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", list(WRAPPERS))
@pytest.mark.parametrize("host", list(HOSTS))
def test_hooks_of_accelerate_go_with_a_patch_in_both_orders(host, wrapper):
    model, run = HOSTS[host]()
    with torch.no_grad():
        plain = run(model)
        expected = run(tokred.apply(copy.deepcopy(model), "tome", r=2))
        assert not equal(plain, expected)
        try:
            right = equal(run(WRAPPERS[wrapper](copy.deepcopy(model))), plain)
        except RuntimeError:
            right = False
        if not right:
            pytest.skip("the host itself does not run so, unpatched")
        before = WRAPPERS[wrapper](copy.deepcopy(model))
        assert equal(run(tokred.apply(before, "tome", r=2)), expected), "wrapped, then applied"
        assert equal(run(tokred.remove(before)), plain)
        after = WRAPPERS[wrapper](tokred.apply(copy.deepcopy(model), "tome", r=2))
        assert equal(run(after), expected), "applied, then wrapped"
        assert equal(run(tokred.remove(after)), plain), "removed under the wrapper"
        assert equal(run(tokred.apply(after, "tome", r=2)), expected), "and applied again"
        assert equal(run(tokred.remove(after)), plain)


def test_hooks_that_go_before_the_patch_leave_nothing():
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = tiny_timm.build("vit"), tiny_timm.images()
    plain = model(x)
    tokred.apply(model, "tome", r=2)
    expected = model(x)
    same_device(model)
    hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(x), expected)
    tokred.remove(model)
    assert torch.equal(model(x), plain)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), plain)


def test_a_forward_that_hides_the_class_is_refused_before_anything_changes():
    model = tiny_timm.build("vit")
    block = model.blocks[1]
    block.forward = lambda x, **kwargs: type(block).forward(block, x, **kwargs)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(tokred.UnsupportedModelError, match=r"the forward of blocks\.1 was replaced .*lambda.*call\s"):
        tokred.apply(model, "tome", r=2)
    assert [type(m) for m in model.modules()] == kinds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    del block.forward
    block.forward = block.forward  # its own, bound to the instance
    x = tiny_timm.images()
    expected = tokred.apply(tiny_timm.build("vit"), "tome", r=2)(x)
    assert torch.equal(tokred.apply(model, "tome", r=2)(x), expected)


def replace_block(model: nn.Module) -> None:
    model.blocks[2] = tiny_timm.build("vit").blocks[2]


def shadow_block(model: nn.Module) -> None:
    block = model.blocks[1]
    host = type(block).__mro__[1]
    block.forward = lambda x, **kwargs: host.forward(block, x, **kwargs)


def shadow_all(model: nn.Module) -> None:
    model.forward_features = lambda x, **kwargs: model.patch_embed(x)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (replace_block, r"blocks\.2: it has been replaced since by another Block"),
        (shadow_block, r"blocks\.1 did not run through the patch of .*: its forward was replaced"),
        (shadow_all, r"none of its \d sites ran"),
    ],
)
def test_a_patch_that_is_passed_by_is_an_error(change, why):
    model, x = tiny_timm.build("vit"), tiny_timm.images()
    tokred.apply(model, "tome", r=2)
    model(x)
    change(model)
    with pytest.raises(tokred.BypassedError, match=why):
        model(x)
    with torch.no_grad():
        tokred.remove(model)(x)


@pytest.mark.parametrize(("change", "why"), [(replace_block, "another Block"), (shadow_all, "none of its 3 sites ran")])
def test_a_compiled_patch_that_is_passed_by_is_an_error_while_it_is_traced(change, why):
    model, x = tiny_timm.build("vit"), tiny_timm.images()
    tokred.apply(model, "tome", r=2)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    change(model)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=why):
        torch.compile(model, fullgraph=True, backend="eager")(x)


def test_blocks_that_where_leaves_out_are_no_sites():
    model, x = tiny_timm.build("vit"), tiny_timm.images()
    tokred.apply(model, "tome", r=2, where=lambda name, block: name != "blocks.0")
    model(x)


def test_an_error_in_a_block_is_not_hidden_by_another():
    model, x = tiny_timm.build("vit"), tiny_timm.images()
    tokred.apply(model, "tome", r=2)

    def fail(*_: Any) -> None:
        raise KeyError("mine")

    handle = model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="mine"):
        model(x)
    handle.remove()
    model(x)


def test_two_threads_watch_their_own_forwards():
    from concurrent.futures import ThreadPoolExecutor

    model, x = tiny_timm.build("vit"), tiny_timm.images()
    tokred.apply(model, "tome", r=2)
    expected = model(x)
    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(lambda _: model(x), range(8)))


def test_patched_tells_what_acts():
    model = tiny_timm.build("vit")
    outer = nn.Sequential(model)
    assert tokred.patched(model) == []
    tokred.apply(outer, "tome", r=2)
    assert tokred.patched(outer) == [tokred.ToMe(r=2)]
    assert tokred.patched(copy.deepcopy(outer)) == [tokred.ToMe(r=2)]
    tokred.remove(model)
    assert tokred.patched(outer) == []
    tokred.remove(outer)
    assert not any(name.startswith("_tokred") for m in outer.modules() for name in m.__dict__)


def test_sharding_goes_with_a_patch_in_both_orders(tmp_path: Path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, str(script)]
    processes = [
        subprocess.Popen([*command, str(rank), str(port), str(tmp_path / "found.pt"), "orders"], cwd=script.parent)
        for rank in range(2)
    ]
    assert [p.wait(timeout=240) for p in processes] == [0, 0]
    found = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found["sharded first"], found["applied first"], rtol=0, atol=0)
    torch.testing.assert_close(found["sharded first"], found["alone"])
    for order in ("sharded first", "applied first"):
        assert torch.equal(found[f"{order}, removed"], found["plain, sharded"])
        assert found[f"{order}, class"] == "FSDPBlock"


def test_blocks_that_are_compiled_one_by_one_are_not_taken_for_passed_by():
    model, x = tiny_timm.build("vit"), tiny_timm.images()
    tokred.apply(model, "tome", r=2)
    expected = model(x)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="eager")
    for _ in range(3):
        torch.testing.assert_close(model(x), expected)
    replace_block(model)
    with pytest.raises(tokred.BypassedError, match=r"blocks\.2"):
        model(x)

"""One patched model in two threads: a forward that begins while another is under way changes nothing in it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred


def meanwhile(module: nn.Module, run: Callable[[int], Any]) -> tuple[Any, Any]:
    """``run(0)``, and ``run(1)`` in a thread of its own while the former is about to enter ``module``."""
    found: list[Any] = []
    main = threading.get_ident()

    def start(*_: Any) -> None:
        if threading.get_ident() == main and not found:
            found.append(None)
            other = threading.Thread(target=lambda: found.append(run(1)))
            other.start()
            other.join()

    handle = module.register_forward_pre_hook(start)
    try:
        first = run(0)
    finally:
        handle.remove()
    return first, found[-1]


def check(module: nn.Module, run: Callable[[int], Any]) -> None:
    with torch.no_grad():
        alone = run(0), run(1)
    # A thread begins with gradients.
    both = meanwhile(module, torch.no_grad()(run))
    for one, expected in zip(both, alone, strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=0)
    assert alone[0].shape != alone[1].shape or not torch.equal(*alone)


def pictures(i: int, size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(i))


@pytest.mark.parametrize("what", ["trace", "intermediates", "final", "copied"])
def test_encoder(what: str):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", img_size=64, num_classes=5).eval()
    tokred.apply(model, "tome", r=2)

    def run(i: int) -> Tensor:
        x = pictures(i, 64)
        if what == "trace":
            tokens = model.forward_features(x)
            return tokred.trace(model).unmerge(tokens)
        if what == "intermediates":  # of one thread: the other has few tokens at the end
            return model.forward_features(x) if i else model.forward_intermediates(x, intermediates_only=True)[-1]
        return model.forward_intermediates(x, indices=[1])[0] if what == "final" else model(x)

    if what == "copied":
        model.blocks[1].register_forward_hook(lambda m, a, y: y.clone())
    check(model.norm if what in ("trace", "final") else model.blocks[2], run)


def test_keys_that_a_hook_notes():
    timm = pytest.importorskip("timm")
    size = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3}
    model = timm.models.eva.Eva(**size, num_classes=5, use_rot_pos_emb=True).eval()
    tokred.apply(model, "tome", r=2)
    check(model.blocks[0].attn.proj, lambda i: model(pictures(i, 64)))


def test_a_report_in_another_thread_is_that_of_the_last_forward():
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", img_size=32, num_classes=5).eval()
    tokred.apply(model, "tome", r=2)
    other = threading.Thread(target=lambda: model(pictures(0)))
    other.start()
    other.join()
    assert tokred.report(model).layers[0].tokens_out == 3


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("sd15", "tomesd", {"max_downsample": 8}),
        ("sd15", "keymerge", {"max_downsample": 8, "refresh": 2}),
        ("flux", "toma", {"max_downsample": 8, "first_full": 0}),
    ],
)
def test_denoiser(family: str, method: str, options: dict[str, Any]):
    pytest.importorskip("diffusers")
    from tests.diffusion.tiny import build, inputs, run

    model = tokred.apply(build(family), method, **options)
    given = [inputs(family, seed=i) for i in range(2)]
    blocks = [m for n, m in model.named_modules() if n.rpartition(".")[2].isdigit() and "blocks" in n]
    check(blocks[-1], lambda i: run(model, given[i]))


def test_experts():
    pytest.importorskip("transformers")
    from tokred.adapters.tiny import moe

    model = moe.build(next(iter(moe.FAMILIES))).eval()
    tokred.apply(model, "capacity_drop")
    lengths = (12, 17)

    def run(i: int) -> Tensor:
        ids = torch.arange(2 * lengths[i]).view(2, -1) % 40 + 3
        mask = torch.ones_like(ids)
        mask[1, : 6 - i] = 0
        return model(ids, attention_mask=mask).logits[:, -12:]

    check(model.model.layers[-1].mlp, run)

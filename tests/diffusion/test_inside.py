"""Attention on fewer queries, keys or tokens, after rotary embedding: the laws, against the host's own under a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import tokred
from tests.diffusion.tiny import MODELS, inputs, run
from tokred.adapters.diffusion.frames import join_frames
from tokred.adapters.diffusion.inside import Halves, Inside, masked_at
from tokred.adapters.diffusion.weights import Weighed
from tokred.diffusion.site import Part

# Sub-layers that see what they would in an unpatched denoiser, because no other is reduced.
SPOTS = {
    "sd3": ["transformer_blocks.0.attn", "transformer_blocks.0.attn2"],
    "flux": ["transformer_blocks.0.attn", "single_transformer_blocks.1.attn"],
    "cogvideox": ["transformer_blocks.1.attn1"],
    "cogvideox_rotary": ["transformer_blocks.1.attn1"],
    "wan": ["blocks.1.attn1"],
    "hunyuan": ["transformer_blocks.0.attn", "single_transformer_blocks.1.attn"],
    "hunyuan_first_frame": ["transformer_blocks.0.attn", "single_transformer_blocks.1.attn"],
}
WHERE = [(kind, name) for kind, names in SPOTS.items() for name in names]
TEXT_FIRST = ("flux", "cogvideox", "cogvideox_rotary")


@dataclass(frozen=True)
class Chosen(tokred.ToMeSD):
    """Keeps a third of the tokens, others in every sample and frame."""

    def left(self, place: Any) -> int:
        return place.length // 3

    def reduce(self, site: Any) -> tokred.Reduction:
        b, n = site.shape
        rows = torch.rand(b, n, generator=torch.Generator().manual_seed(4)).argsort(1)[:, : n // 3]
        return tokred.Reduction.keep(rows, n)


@dataclass(frozen=True)
class ChosenKeys(Chosen):
    part: ClassVar[Part] = "kv"


@dataclass(frozen=True)
class ChosenQueries(Chosen):
    part: ClassVar[Part] = "q"


PARTS = {"tokens": Chosen, "kv": ChosenKeys, "q": ChosenQueries}


class Masking(TorchFunctionMode):
    """The host's attention, where most of the image's tokens are seen by none."""

    def __init__(self, rows: Tensor, tokens: int, first: bool) -> None:
        super().__init__()
        self.rows, self.tokens, self.first = rows, tokens, first

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        kwargs |= dict(zip(("query", "key", "value"), args, strict=False))
        b, length = kwargs["query"].shape[0], kwargs["key"].shape[-2]
        image = torch.zeros(b, self.tokens, dtype=torch.bool).scatter(1, self.rows, True)
        text = torch.ones(b, length - self.tokens, dtype=torch.bool)
        seen = torch.cat([text, image] if self.first else [image, text], 1)[:, None, None]
        given = kwargs.get("attn_mask")
        return func(**{**kwargs, "attn_mask": seen if given is None else seen & given})


def called(model: nn.Module, name: str, given: dict[str, Any]) -> list[Any]:
    """What a sub-layer answers in a forward, text included."""
    found: list[Any] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, y: found.append(y))
    run(model, given)
    handle.remove()
    return list(found[0]) if isinstance(found[0], tuple) else [found[0]]


def split(y: list[Any], tokens: int, kind: str, swapped: bool = False) -> tuple[Tensor, Tensor | None]:
    """Image and text of an answer."""
    if len(y) > 1:
        return (y[1], y[0]) if swapped else (y[0], y[1])
    extra = y[0].shape[1] - tokens
    return (y[0][:, extra:], y[0][:, :extra]) if extra else (y[0], None)


def masked(kind: str, name: str, rows: Tensor, tokens: int) -> list[Any]:
    """The same sub-layer of an unpatched denoiser, with the dropped tokens hidden from it alone."""
    model, given = MODELS[kind](), inputs(kind)
    modes: list[Masking] = []

    def start(*_: Any) -> None:
        modes.append(Masking(rows, tokens, kind in TEXT_FIRST))
        modes[-1].__enter__()

    module = model.get_submodule(name)
    module.register_forward_pre_hook(start)
    module.register_forward_hook(lambda *_: modes.pop().__exit__(None, None, None))
    return called(model, name, given)


@pytest.mark.parametrize("part", list(PARTS))
@pytest.mark.parametrize(("kind", "name"), WHERE)
def test_fewer_tokens_are_a_mask(kind: str, name: str, part: str):
    model, given = MODELS[kind](), inputs(kind)
    plain = called(model, name, given)
    tokred.apply(model, PARTS[part](), where=lambda block, _: name.startswith(block))
    y = called(model, name, given)
    session = model.__dict__["_tokred"]
    reduction = next(iter(session.plans.values())).reduction
    rows, n = reduction.representative, reduction.length
    assert not torch.equal(rows[0], rows[1])
    # The second attention of SD 3.5 is part of the same block, and reduced by the same plan.
    expected = plain if part == "q" else masked(kind, name, rows, n)
    image, text = split(y, n, kind)
    expected_image, expected_text = split(expected, n, kind)
    at = rows.unsqueeze(-1).expand(-1, -1, image.shape[-1])
    if part == "kv":
        torch.testing.assert_close(image, expected_image, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(image.gather(1, at), expected_image.gather(1, at), rtol=1e-4, atol=1e-5)
    if part == "tokens":
        assert (image == 0).all(-1).sum() == image.shape[0] * (n - rows.shape[1]), "dropped tokens add nothing"
    if text is not None and expected_text is not None:
        torch.testing.assert_close(text, expected_text, rtol=1e-4, atol=1e-5)
    if part != "q":
        assert not torch.allclose(y[0], plain[0], atol=1e-3)


@pytest.mark.parametrize("kind", ["flux", "hunyuan"])
def test_a_block_on_fewer_tokens_is_a_mask(kind: str):
    """Attention and MLP side by side: the tokens that are left get what they would, the others keep their own."""
    name, given = "single_transformer_blocks.1", inputs(kind)
    model = MODELS[kind]()
    plain, entered = called(model, name, given), []
    tokred.apply(model, Chosen(merge_mlp=True), where=lambda block, _: block == name)
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda m, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    y = called(model, name, given)
    hook.remove()
    reduction = next(iter(model.__dict__["_tokred"].plans.values())).reduction
    rows, n = reduction.representative, reduction.length
    image, text = split(y, n, kind, kind == "flux")
    expected_image, expected_text = split(masked(kind, name, rows, n), n, kind, kind == "flux")
    at = rows.unsqueeze(-1).expand(-1, -1, image.shape[-1])
    torch.testing.assert_close(image.gather(1, at), expected_image.gather(1, at), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text, expected_text, rtol=1e-4, atol=1e-5)
    kept = torch.zeros(image.shape[:2], dtype=torch.bool).scatter(1, rows, True)
    assert torch.equal(image[~kept], entered[0][~kept])
    assert not torch.allclose(image, split(plain, n, kind, kind == "flux")[0], atol=1e-3)
    sublayers = tokred.report(model).sublayers
    left = rows.shape[1]
    assert [(row.role, row.left) for row in sublayers if row.name.startswith(name)] == [("self", left), ("mlp", left)]


def test_frames_become_one_reduction():
    frames = tokred.Reduction(
        torch.tensor([[0, 2], [3, 1], [0, 1], [2, 3]]),
        torch.tensor([[1, 3], [0, 2], [2, 3], [0, 1]]),
        torch.tensor([[0, 1], [-1, 0], [1, 1], [0, -1]]),
        4,
    )
    clip = join_frames(frames, 2)
    assert clip.batch == (2,)
    assert (clip.length, clip.slots) == (8, 4)
    x = torch.randn(4, 4, 3)
    assert torch.equal(clip.merge(x.view(2, 8, 3)), frames.merge(x).view(2, 4, 3))
    y = torch.randn(4, 2, 3)
    assert torch.equal(clip.unmerge(y.view(2, 4, 3)), frames.unmerge(y).view(2, 8, 3))
    shared = join_frames(tokred.Reduction.keep(torch.tensor([0, 3]).expand(6, -1), 4), 3)
    assert shared.representative.tolist() == [[0, 3, 4, 7, 8, 11]] * 2
    assert shared.representative.stride(0) == 0
    assert join_frames(frames, 1) is frames


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_plans_by_head(first: bool, side: str):
    """Each head keeps tokens of its own."""
    q, k, v = (torch.randn(2, 3, 8, 4) for _ in range(3))
    rows = torch.rand(2, 3, 6).argsort(-1)[..., :4]
    reduction = tokred.Reduction.keep(rows, 6)
    with Inside(lambda *_: Halves(**{side: reduction}), 6, 2, first) as mode:
        y = F.scaled_dot_product_attention(q, k, v)
    assert mode.seen == 1
    seen = torch.zeros(2, 3, 6, dtype=torch.bool).scatter(2, rows, True)
    text = torch.ones(2, 3, 2, dtype=torch.bool)
    seen = torch.cat([text, seen] if first else [seen, text], 2)
    if side == "keys":
        torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, attn_mask=seen.unsqueeze(2)))
    else:
        expected = F.scaled_dot_product_attention(q, k, v) * seen.unsqueeze(-1)
        torch.testing.assert_close(y, expected)


def test_worked_example_of_queries_and_keys():
    """Queries averaged in pairs; keys averaged, without and with the log of their size."""
    q = torch.tensor([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.8]]).view(1, 1, 4, 2)
    k = torch.tensor([[1, 0], [0, 1], [0.8, 0.2], [0.1, 0.9]]).view(1, 1, 4, 2)
    v = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 4, 1)

    def attend(**halves: Any) -> list[float]:
        with Inside(lambda *_: Halves(**halves), 4):
            return F.scaled_dot_product_attention(q, k, v, scale=2**-0.5).flatten().tolist()

    pairs = tokred.Reduction.from_index(torch.tensor([[0, 0, 1, 1]]), 2)
    ends = tokred.Reduction.from_index(torch.tensor([[0, 1, 2, 1]]), 3)
    assert attend() == pytest.approx([2.320551, 2.357633, 2.647682, 2.608119], abs=1e-6)
    assert attend(queries=pairs) == pytest.approx([2.339120, 2.339120, 2.628459, 2.628459], abs=1e-6)
    assert attend(keys=ends) == pytest.approx([2.159288, 2.192667, 2.513331, 2.460104], abs=1e-6)
    weighed = attend(keys=ends, proportional=True)
    assert weighed == pytest.approx([2.307899, 2.346738, 2.670361, 2.622981], abs=1e-6)
    # Equal sizes cancel, text has size one, and a mask stays.
    even = tokred.Reduction.from_index(torch.tensor([[0, 0, 1, 1]]), 2)
    assert attend(keys=even, proportional=True) == pytest.approx(attend(keys=even), abs=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_keys_of_the_image_are_weighed_beside_those_of_text(first: bool):
    """Text counts once wherever it stands; keys that are padding count for none."""
    q, k, v = (torch.randn(2, 3, 7, 4) for _ in range(3))
    sizes, real = torch.randint(1, 5, (2, 5)).float(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]]).bool()
    for given in (sizes.log(), real):
        with Weighed(given, 2, first) as mode:
            y = F.scaled_dot_product_attention(q, k, v)
        assert mode.seen == 1
        count = sizes if given.dtype != torch.bool else real.float()
        text = torch.ones(2, 2)
        count = torch.cat([text, count] if first else [count, text], 1)[:, None, None]
        scores = (q @ k.mT / 2).exp() * count
        torch.testing.assert_close(y, (scores / scores.sum(-1, keepdim=True)) @ v)


def test_masks_follow():
    mask = torch.arange(2 * 1 * 1 * 5).view(2, 1, 1, 5)
    rows = torch.tensor([[2, 0], [1, 1]])
    assert masked_at(mask, rows, -1, 3, 2).flatten(1).tolist() == [[0, 1, 4, 2], [5, 6, 8, 8]]
    assert masked_at(mask, rows, -1, 3, 0).flatten(1).tolist() == [[2, 0, 3, 4], [6, 6, 8, 9]]
    assert masked_at(mask, rows, -2, 3, 0) is mask
    square = torch.arange(9).view(3, 3)
    assert masked_at(square, rows[:1], -2, 3, 0).tolist() == [[[[6, 7, 8], [0, 1, 2]]]]


def test_another_kernel_is_refused():
    """A processor that never calls torch's attention cannot be reduced inside."""

    class Own:
        def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return attn.to_v(hidden_states)

    model = tokred.apply(MODELS["wan"](), "todo", factors=(2, 2))
    model.blocks[0].attn1.processor = Own()
    with pytest.raises(tokred.UnsupportedModelError, match=r"Own of blocks\.0\.attn1 does not run torch's"):
        run(model, inputs("wan"))


def test_a_table_that_is_used_in_another_way_is_refused():
    from tokred.adapters.diffusion.rotary import OwnRows

    with pytest.raises(tokred.UnsupportedModelError, match="does not use its rotary table"):
        OwnRows(torch.zeros(2, 3, 4))[:, None]

"""Towers that hold all images in one sequence: the laws of every encoder, frame by frame, and where windows end."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("transformers")

import tokred
from tests.encoder import laws
from tests.encoder.blocks import SETTINGS, method
from tests.encoder.tiny_towers import SIZES, TOWERS, alone, build, inputs, run
from tests.kinds import each
from tokred import adapters
from tokred.adapters.encoder.packed.layout import Folding, Layout, PackedState
from tokred.core.reduction import Reduction
from tokred.encoder.method import BlockMethod

KINDS = {"qwen2.5": "windows, rows of patches"}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", each(TOWERS, KINDS))
def test_nothing_to_remove_is_the_identity_and_removal_leaves_nothing(name):
    model, given = build(name), inputs(name)
    y, before = run(model, given), laws.snapshot(model)
    for one in (tokred.ToMe(r=0), tokred.RandomPrune(r=0), tokred.PixelPrune(min_keep=1.0)):
        if one.reads <= adapters.find(model).offered:
            tokred.apply(model, one)
            laws.assert_equal(run(model, given), y)
    tokred.apply(model, "tome", r=2)
    again = run(model, given)
    laws.assert_equal(run(copy.deepcopy(model), given), again)
    laws.assert_equal(run(pickle.loads(pickle.dumps(model)), given), again)
    tokred.remove(model)
    laws.assert_same(before, laws.snapshot(model))
    laws.assert_equal(run(model, given), y)


# Merging, dropping, a count of its own for each image, the grid.
SOME: dict[str, dict[str, Any]] = {
    "tome": {"r": 3},
    "random_prune": {"r": 3},
    "pitome": {"ratio": 0.7},
    "ltp": {"thresholds": [0.02] * 4},
    "saint": {"tau": 0.2, "K": 2},
    "downsample": {"keep": 0.5},
}


@pytest.mark.parametrize("label", SOME)
@pytest.mark.parametrize("name", each(TOWERS, KINDS))
def test_images_of_a_batch_are_each_by_itself(name, label):
    """Of three images, two of one size: what each becomes does not depend on the others."""
    model, given = build(name), inputs(name)
    one = tokred.make(label, **SOME[label])
    if not one.reads <= adapters.find(model).offered:
        pytest.skip(f"{name} supplies no {', '.join(one.reads - adapters.find(model).offered)}")
    y = run(model, given)
    tokred.apply(model, one)
    whole = run(model, given)
    assert whole[0].shape != y[0].shape or not torch.equal(whole[0], y[0])
    each_alone = [run(model, alone(name, given, SIZES, i)) for i in range(3)]
    for parts, found in zip(zip(*each_alone, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(parts), found, rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class Drop(BlockMethod):
    """Drops some patches of every frame behind one block."""

    name: ClassVar[str] = "drop"
    drops: ClassVar[bool] = True
    block: int = 1
    every: int = 3

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"x"})

    def tokens(self, n: int, place: Any) -> int:
        return n - (n - 1) // self.every if place.layer == self.block else n

    def reduce(self, site: Any) -> Reduction:
        b, n = site.shape
        kept = torch.tensor([i for i in range(n) if i % self.every != 1])
        return Reduction.keep(kept.expand(b, -1), n)


class Hiding(TorchFunctionMode):
    """Hides rows as keys from some call of the attention on, as a mask does.

    Args:
        hidden: ``(S,)`` bool.
        after: rows that have passed before.
    """

    def __init__(self, hidden: torch.Tensor, after: int) -> None:
        super().__init__()
        self.hidden, self.after, self.seen = hidden, after, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            n, at = args[1].shape[2], self.seen % len(self.hidden)
            if self.seen >= self.after:
                gone = self.hidden[at : at + n]
                mask = torch.zeros(n).masked_fill(gone, -1e30)
                given = kwargs.get("attn_mask")
                kwargs["attn_mask"] = mask.expand(1, 1, n, n) if given is None else given + mask
            self.seen += n
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", each(TOWERS, KINDS))
def test_dropping_equals_masking(name):
    """The rows that are left are those of the same tower that does not see the others, from then on."""
    model, given = build(name), inputs(name)
    blocks = [block for _, block in adapters.find(model).blocks]
    seen: list[torch.Tensor] = []
    handle = blocks[-1].register_forward_hook(lambda m, i, out: seen.append(out[0] if out.ndim == 3 else out))
    tokred.apply(model, Drop())
    run(model, given)
    index = tokred.trace(model).index[0]
    short = seen.pop()
    tokred.remove(model)
    hidden = index < 0
    assert 0 < int(hidden.sum()) < len(hidden)
    with Hiding(hidden, 2 * len(hidden)):
        run(model, given)
    handle.remove()
    full = seen.pop()
    short = short[~hidden] if len(short) == len(full) else short
    torch.testing.assert_close(short, full[~hidden], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", each(["qwen2.5", "qwen3"], KINDS))
@pytest.mark.parametrize("size", [(2, 8, 12), (1, 4, 4)])
def test_a_clip_is_its_frames(name, size):
    model, sizes = build(name), (size, (1, 8, 12))
    given = inputs(name, sizes)
    tokred.apply(model, "tome", r=3)
    whole = run(model, given)
    rows = tokred.report(model).layers[0]
    assert rows.tokens_in == len(given["hidden_states"])
    assert rows.tokens_in - rows.tokens_out == 3 * (size[0] + 1)
    first = run(model, alone(name, given, sizes, 0))
    for a, b in zip(whole, first, strict=True):
        torch.testing.assert_close(a[: len(b)], b, rtol=1e-4, atol=1e-5)


def test_the_order_of_rows_is_the_hosts_own():
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    grids = [(2, 12, 20), (1, 4, 6), (1, 12, 20)]
    ids = get_vision_position_ids(torch.tensor(grids), 2)
    index, ends = get_vision_window_index(torch.tensor(grids), spatial_merge_size=2, window_size=32, patch_size=4)
    ids = ids.view(-1, 4, 2)[index].view(-1, 2)
    layout = Layout.of(grids, Folding(2, 4), CPU)
    assert layout.ends(None, True).tolist() == ends.tolist()
    assert layout.ends(None, False).tolist() == [0, 240, 480, 504, 744]
    for group in layout.groups:
        n = group.rows.shape[1]
        wide = group.sides.columns
        expected = torch.stack([torch.arange(n) // wide, torch.arange(n) % wide], -1)
        for rows in group.rows:
            assert torch.equal(ids[rows], expected)


def test_ends_of_segments_after_a_reduction():
    layout = Layout((), torch.tensor([0] * 6 + [1] * 4), torch.tensor([0] * 4 + [1] * 4 + [2] * 2), 1)
    assert layout.ends(torch.tensor([0, 2, 5, 6, 9]), False).tolist() == [0, 3, 5]
    assert layout.ends(torch.tensor([0, 1, 5, 8, 9]), True).tolist() == [0, 2, 3, 5]
    assert layout.ends(torch.tensor([0, 1, 8]), True).tolist() == [0, 2, 3], "an empty window is none"


def test_rows_go_back_to_their_places():
    layout = Layout.of([(1, 4, 4), (2, 2, 4), (1, 4, 4)], Folding(2), CPU)
    state = PackedState.begin(layout)
    rows = torch.arange(layout.length).float().unsqueeze(1)
    parts = state.unpack(rows)
    assert [tuple(p.shape) for p in parts] == [(2, 16, 1), (2, 8, 1)]
    assert parts[0][0, :, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert torch.equal(state.pack(parts), rows)


def test_tables_of_what_is_read_at_full_length():
    """Deep features of Qwen 3 are made of all rows, also where tokens have left before."""
    model, given = build("qwen3"), inputs("qwen3")
    plain = run(model, given)
    tokred.apply(model, "random_prune", r=20)
    assert [t.shape for t in run(model, given)] == [t.shape for t in plain]
    report = tokred.report(model)
    assert report.layers[-1].tokens_out < report.layers[0].tokens_in // 2
    assert tokred.trace(model).length == report.layers[0].tokens_in
    assert 0 < report.macs < report.macs_unpatched


def test_bad_calls_are_refused():
    model, given = build("qwen2.5"), inputs("qwen2.5")
    tokred.apply(model, "tome", r=2)
    with pytest.raises(tokred.UnsupportedModelError, match="segments that end at"), torch.no_grad():
        model(**given, cu_seqlens=torch.tensor([0, 104, 208], dtype=torch.int32))
    with pytest.raises(tokred.TokenStateError, match="call the tower itself"), torch.no_grad():
        model.blocks[0](torch.zeros(8, 32), cu_seqlens=torch.tensor([0, 8]), position_embeddings=(None, None))
    with pytest.raises(ValueError, match="reads tokens by their position"):
        tokred.apply(model, "tome", r=2, expose="none")
    with pytest.raises(tokred.MissingInputError, match="class_attention"):
        tokred.apply(model, "evit", kappa=0.5)
    eager = build("qwen2.5")
    eager.config._attn_implementation = "eager"
    with pytest.raises(tokred.UnsupportedModelError, match="eager"):
        tokred.apply(eager, "tome", r=2)


def test_gradients_pass_and_a_checkpoint_gives_the_same():
    found = []
    for checkpointed in (False, True):
        model, given = build("qwen2.5"), inputs("qwen2.5", SIZES[:2])
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tokred.apply(model, "tome", r=3)
        model(**given).pooler_output.square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(g, found[1][n], rtol=1e-4, atol=1e-5) for n, g in found[0].items())


@pytest.mark.hosts
@pytest.mark.parametrize("name", TOWERS)
def test_every_method_that_is_promised_runs(name):
    model, given = (
        build(name, **{"num_hidden_layers" if name in ("pixtral", "kimi k2.5") else "depth": 2}),
        inputs(name),
    )
    y = run(model, given)
    for label in SETTINGS:
        one = method(label)
        if one.stage != "block":
            continue
        if not one.reads <= adapters.find(model).offered:
            with pytest.raises((tokred.MissingInputError, tokred.UnsupportedModelError)):
                tokred.apply(model, one)
            continue
        tokred.apply(model, one)
        z = run(model, given)
        assert all(torch.isfinite(t).all() for t in z), label
        assert label.startswith(("pixelprune", "ltp")) or z[0].shape != y[0].shape or not torch.equal(z[0], y[0]), label
        tokred.remove(model)
    laws.assert_equal(run(model, given), y)

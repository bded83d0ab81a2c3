"""STC's cacher: the card's example, and a tower whose frames between two references are computed in part."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vlm import hosts
from tokred.adapters.vlm.families import FACTS
from tokred.adapters.vlm.streams.again import Again
from tokred.adapters.vlm.streams.tower import TowerReuse
from tokred.vlm import Reuse


def test_worked_example():
    reference = torch.tensor([[[1.0, 0], [0, 1], [1, 1], [1, -1]]])
    new = torch.tensor([[[1, 0.1], [1, 0], [1, 1], [0.5, -1]]])
    assert Reuse(0.5).stale(new, reference)[0].tolist() == [1, 3]
    assert Reuse(0.5).stale(new, reference, prefix=1)[0].tolist() == [0, 1], "class tokens are always computed"
    assert Reuse(0.9).count(9) == 0
    assert Reuse(0.75).count(4) == 1
    assert [Reuse(interval=3).refers(t) for t in range(4)] == [True, False, False, True]


@functools.cache
def core_of(name: str) -> Any:
    return hosts.build(name).model


def run(name: str, how: Reuse, frames: list[Tensor]) -> list[Tensor]:
    core = core_of(name)
    tower, changes = TowerReuse.of(how, core, FACTS[type(core).__name__]), Again()
    tower.hang(changes)
    changes.undo()
    found = []
    with torch.no_grad():
        for t, pixels in enumerate(frames):
            with changes.in_force(), tower.frame(t):
                found.append(core.vision_tower(pixels[None]).last_hidden_state)
    return found


def plain(name: str, frames: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [core_of(name).vision_tower(pixels[None]).last_hidden_state for pixels in frames]


def frames(count: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    first = torch.randn(3, 16, 16, generator=g)
    found = [first]
    for t in range(1, count):
        one = first.clone()
        one[:, 4 * (t % 4) : 4 * (t % 4) + 4, :4] = torch.randn(3, 4, 4, generator=g)  # one patch is another
        found.append(one)
    return found


@pytest.mark.parametrize("name", ["onevision_video", "llava"])
def test_laws(name):
    """Nothing used again, or no frame between references: the tower. A frame like the reference: its features."""
    some = frames()
    expected = plain(name, some)
    for how in (Reuse(0.0), Reuse(0.75, interval=1)):
        for a, b in zip(run(name, how, some), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for share in (0.25, 0.75, 0.99):
        first, again = run(name, Reuse(share), [some[0], some[0]])
        torch.testing.assert_close(again, first, rtol=1e-5, atol=1e-5)
    first, other = run(name, Reuse(0.99), some[:2])
    if name == "onevision_video":  # no class token: less than one token is none, and only the patch itself is another
        assert int((first != other).any(-1).sum()) == 1


@torch.no_grad()
def test_a_layer_written_out():
    """As the card has it: keys of all, the least alike with queries, values and MLP of their own, tables of both."""
    layer = core_of("onevision_video").vision_tower.encoder.layers[1]
    x, g = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2)
    x[1] = x[0] + torch.rand(16, 1, generator=g) * torch.randn(16, 32, generator=g)
    tower, changes = TowerReuse(Reuse(0.75), [layer], 0), Again()
    tower.hang(changes)
    changes.undo()
    found = []
    for t in range(2):
        with changes.in_force(), tower.frame(t):
            found.append(layer(x[t : t + 1], None)[0])
    torch.testing.assert_close(found[0], layer(x[:1], None)[0], rtol=1e-5, atol=1e-5)

    own, heads = layer.self_attn, 2
    y, old = layer.layer_norm1(x[1]), layer.layer_norm1(x[0])
    alike = torch.nn.functional.cosine_similarity(own.k_proj(y), own.k_proj(old), dim=-1)
    new = alike.argsort()[:4]
    k, v, was = own.k_proj(old), own.v_proj(old), own.out_proj
    k[new], v[new] = own.k_proj(y)[new], own.v_proj(y)[new]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [(one.view(len(one), heads, 16).transpose(0, 1)) for one in (q, k, v)]
        weights = (parts[0] @ parts[1].mT * 16**-0.5).softmax(-1)
        return was((weights @ parts[2]).transpose(0, 1).flatten(1))

    before = attention(own.q_proj(old), own.k_proj(old), own.v_proj(old))
    middle, added = x[0] + before, before.clone()
    added[new] = attention(own.q_proj(y)[new], k, v)
    out = x[1] + added
    more = layer.mlp(layer.layer_norm2(middle))
    more[new] = layer.mlp(layer.layer_norm2(out))[new]
    torch.testing.assert_close(found[1], out + more, rtol=1e-5, atol=1e-5)


def test_fewer_rows_go_through_the_mlp():
    core, rows = core_of("onevision_video"), []
    mlp = core.vision_tower.encoder.layers[0].mlp
    handle = mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    run("onevision_video", Reuse(0.75), frames(6))
    handle.remove()
    assert rows == [16, 4, 4, 4, 16, 4]


def test_bytes_are_of_one_frame():
    core = core_of("onevision_video")
    tower, changes = TowerReuse.of(Reuse(), core, FACTS["LlavaOnevisionModel"]), Again()
    tower.hang(changes)
    changes.undo()
    sizes = []
    for t, pixels in enumerate(frames(6)):
        with torch.no_grad(), changes.in_force(), tower.frame(t):
            core.vision_tower(pixels[None])
        sizes.append(tower.nbytes)
    assert set(sizes) == {4 * 3 * 16 * 32 * 4}, "keys, values, attention, MLP; layers, tokens, channels, bytes"


@pytest.mark.parametrize(("given", "match"), [({"share": 1.0}, "share must lie in"), ({"interval": 0}, "interval")])
def test_bad_settings(given, match):
    with pytest.raises(ValueError, match=match):
        Reuse(**given)

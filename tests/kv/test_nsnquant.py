"""NSNQuant: the steps written out, what is held, and the laws that all formats share."""

from __future__ import annotations

import hashlib

import pytest
import torch

import tokred
from tests.kv.test_coded import course_of_events, held
from tokred.kv import CacheSite, NSNQuant
from tokred.kv.described import Place
from tokred.kv.stores.codebooks import codebook, distortion
from tokred.kv.stores.nsnquant import LookedUp, spread

# Two tokens of eight numbers.
EXAMPLE = torch.tensor([[1.0, 2, 0, -1, 3, 0, 1, 2], [2, 2, 1, 0, 4, -1, 0, 2]]).view(1, 1, 2, 8)
ENTRIES = torch.tensor([[1.0] * 8, [2, 0.3, 0.3, 0.3] * 2, [0.2, 2, 0.2, 0.2] * 2])
ENTRIES = ENTRIES / ENTRIES.norm(dim=1, keepdim=True) * 8**0.5
WRITTEN = LookedUp(2, 8, 2, side_bits=16, group=8, table=ENTRIES)


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    monkeypatch.setenv("TOKRED_KERNELS", "torch")
    with torch.no_grad():
        yield


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Turns:
    """A rotation by the angles of a usual model."""

    def __init__(self, width: int) -> None:
        self.angles = 10000.0 ** (-torch.arange(width // 2) / (width // 2))

    def turns(self):
        return self.angles, 1.0

    def rotated(self, x: torch.Tensor, first: int = 0) -> torch.Tensor:
        angle = (torch.arange(x.shape[2]) + first)[:, None] * self.angles
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


# ---------------------------------------------------------------- written out


def near(found: torch.Tensor, wanted: list[float], most: float = 2e-3) -> bool:
    return torch.allclose(found.flatten().float(), torch.tensor(wanted), atol=most)


def test_normalise_shift_normalise_written_out():
    one = WRITTEN.sized(EXAMPLE[:, :, None], None)
    assert near(one.first, [1.581139, 1.936492])
    mean = [0.832626, 1.148853, 0.258199, -0.316228, 1.981479, -0.258199, 0.316228, 1.148853]
    assert near(one.mean, mean)
    assert near(one.second, [0.22567, 0.22567])
    first = [-0.887004, 0.514281, -1.144144, -1.401285, -0.372723, 1.144144, 1.401285, 0.514281]
    assert near(one.left[0, 0, 0, 0], first, 5e-3)
    assert torch.allclose(one.left[0, 0, 0, 0], -one.left[0, 0, 0, 1], atol=2e-2), "two tokens: always"
    rotated = [-0.081729, -0.627206, 0.363652, -1.436239, -1.981716, -0.181826, 1.172684, 0.263555]
    assert near(spread(one.left)[0, 0, 0, 0], rotated, 5e-3)
    assert one.left.norm(dim=-1).flatten().tolist() == pytest.approx([8**0.5] * 2, abs=1e-5)


def test_a_code_written_out():
    parts = WRITTEN.encode(EXAMPLE, None)
    signs, entries, second = parts[:3]
    assert entries.flatten().tolist() == [0, 0]
    assert signs.flatten().tolist() == [0b00111011, 0b11000100], "number i on bit i"
    assert near(second, [0.295543, 0.295543])
    restored = WRITTEN.decode(parts, torch.float32)
    assert near(
        restored[0, 0, 0], [0.986069, 2.146924, -0.583035, -0.830428, 2.802566, -0.077821, 0.830428, 1.486069], 4e-3
    )
    assert near(
        restored[0, 0, 1], [2.017062, 1.820055, 1.714069, -0.207683, 4.241807, -0.90469, 0.207683, 2.629434], 4e-3
    )
    assert ((restored - EXAMPLE).norm() / EXAMPLE.norm()).item() == pytest.approx(0.190838, abs=1e-3)


@pytest.mark.parametrize(("bits", "width", "each"), [(1, 128, 1.23828125), (2, 128, 2.23828125), (1, 64, 1.3984375)])
def test_bits_of_a_number(bits, width, each):
    code = LookedUp(bits, width, 64)
    parts = code.encode(noise(1, 2, 128, width), None)
    assert 8 * sum(t.nbytes for t in parts) / (2 * 128 * width) == each
    assert code.row_bits(noise(1, 1, 0, width)) == -(-int(each * width * 64) // 64)


def test_windows_are_rounded_when_they_are_whole():
    shelf = NSNQuant(pre_rope=False).open()
    for count, (coded, full) in ((150, (128, 22)), (42, (192, 0)), (1, (192, 1))):
        shelf.append(noise(1, 2, count, 16), noise(1, 2, count, 16, seed=1))
        shelf.settle(None)
        assert [(side.encoded, side.tail.count) for side in shelf._sides] == [(coded, full)] * 2
    chunks = NSNQuant(pre_rope=False).open()
    whole = NSNQuant(pre_rope=False).open()
    k = noise(1, 2, 150, 16)
    whole.append(k, k)
    whole.settle(None)
    for part in k.split(37, 2):
        chunks.append(part, part)
        chunks.settle(None)
    assert all(
        torch.equal(a.coded[i], b.coded[i]) for a, b in zip(whole._sides, chunks._sides, strict=True) for i in range(9)
    )


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("width", [8, 24, 80, 96, 128])
def test_a_rotation_is_its_own_inverse_whatever_the_width(width):
    assert torch.allclose(spread(torch.eye(width)) @ spread(torch.eye(width)), torch.eye(width), atol=1e-5)
    assert torch.allclose(spread(torch.eye(width)), spread(torch.eye(width)).T, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2])
def test_the_codebook_is_the_one_that_was_trained(bits):
    """On noise that it has not seen; for eight independent numbers the bound is 1/4 at one bit, 1/16 at two."""
    table = codebook(bits)
    assert table.shape == (256, 8)
    assert hashlib.sha256(table.numpy().tobytes()).hexdigest()[:16] == DIGESTS[bits]
    assert (0.25, 0.0625)[bits - 1] < distortion(table, bits) < (0.33, 0.1)[bits - 1]
    again = table + 0.05 * noise(256, 8)
    assert distortion(table, bits) < distortion(again, bits)


DIGESTS = {1: "0a5f2f27a6dc0ccd", 2: "fc19cb817852b0b1"}


@pytest.mark.parametrize("bits", [1, 2])
def test_projections_are_exact_and_sizes_go_through(bits):
    code = LookedUp(bits, 32, 16, side_bits=16)
    x = noise(1, 2, 32, 32) * 3 + noise(32, seed=1)
    one = code.sized(x.unflatten(2, (2, 16)), None)
    z = spread(one.left)
    parts = code.encode(x, None)
    found = code._looked_up(parts[:bits]) * parts[bits].float()[..., None]
    along = (found * z).sum(-1) / z.square().sum(-1)
    assert torch.allclose(along, one.second.squeeze(-1), rtol=2e-3)
    c = torch.tensor([4.0, 0.5, 2] + [1] * 29)[:, None]
    assert torch.allclose(
        code.decode(code.encode(c * x, None), torch.float32), c * code.decode(parts, torch.float32), atol=2e-2
    )
    error = (code.decode(parts, torch.float32) - x).norm() / x.norm()
    assert error < (0.7, 0.35)[bits - 1]


def test_a_mean_costs_nothing():
    """A constant that is added to normalised tokens changes the mean alone."""
    code, x = LookedUp(2, 16, 8, side_bits=16, group=16), noise(1, 1, 8, 16)
    one = code.sized(x[:, :, None], None)
    moved = one.left * one.second + 3 * noise(16, seed=2)
    length = moved.norm(dim=-1, keepdim=True) / 4
    two = code.sized(moved, None)
    assert torch.allclose(two.first, length, rtol=1e-3)
    restored = (two.left * two.second + two.mean) * two.first
    assert torch.allclose(restored, moved, atol=1e-4), "without looking up nothing is lost"


def test_padding_and_empty_rows_of_zeros():
    code = LookedUp(2, 16, 8, group=16)
    x, real = noise(2, 3, 16, 16), torch.ones(2, 3, 16, dtype=torch.bool)
    real[0, :, :3] = real[1, 1] = False
    loud = torch.where(real[..., None], x, 1e4)
    found = code.decode(code.encode(loud, real), torch.float32)
    assert torch.equal(
        found[real], code.decode(code.encode(torch.where(real[..., None], x, -1e4), real), torch.float32)[real]
    )
    assert (found - x)[real].norm() / x[real].norm() < 0.5
    assert not code.decode(code.encode(torch.zeros(1, 1, 8, 16), None), torch.float32).abs().gt(1e-4).any()
    assert (
        code.decode(code.encode(torch.ones(1, 1, 8, 16, dtype=torch.bfloat16), None), torch.float32).sub(1).abs().max()
        < 0.01
    )


def test_keys_are_turned_back_for_their_mean():
    """Rows that are one vector, turned, are all mean; they cannot be told by what they are after the turn."""
    rope, same = Turns(32), noise(1, 1, 1, 32).expand(1, 2, 64, 32)
    k = rope.rotated(same + 0.1 * noise(1, 2, 64, 32, seed=1), first=1000)
    found = {}
    for pre in (True, False):
        shelf = NSNQuant(bits=1, pre_rope=pre).open()
        shelf.append(k, k)
        shelf.settle(CacheSite(q=k, k=k, v=k, rope=rope))
        found[pre] = ((shelf.keys - k).norm() / k.norm()).item()
        assert shelf._sides[1].codec.angles is None, "values do not turn"
    assert found[True] < 0.1
    assert found[False] > 2 * found[True]
    exact = LookedUp(2, 32, 64, angles=rope.angles)
    assert torch.allclose(exact._turned(exact._turned(k[:, :, None], back=True)), k[:, :, None], atol=1e-5)
    shelf = NSNQuant().open()
    shelf.append(k, k)
    with pytest.raises(tokred.MissingInputError, match="rope"):
        shelf.settle(CacheSite(q=k, k=k, v=k))


@pytest.mark.parametrize("ragged", [False, True])
def test_any_course_of_events_with_nothing_rounded(ragged):
    assert course_of_events(NSNQuant(bits=16, window=2), 0.0, ragged)[2] > 2


def test_bytes_that_are_held():
    k = noise(1, 2, 1024, 128)
    shelf = NSNQuant(pre_rope=False).open()
    shelf.append(k, k)
    shelf.settle(None)
    assert held(shelf) == 2 * 2 * 1024 * 128 * 2.23828125 / 8
    store = NSNQuant(pre_rope=False)
    shelf.append(k[:, :, :1], k[:, :, :1])
    place = Place(2, store.row_bytes(k, k), whole=store.whole_rows(k, k))
    assert held(shelf) <= place.held(1025) + store.note_bytes(2, 128, uneven=False)


# ---------------------------------------------------------------- models


def test_models():
    pytest.importorskip("transformers")
    from tests.kv.test_store_models import GREEDY, LOGITS, build, padded, policies, prompt

    model = build("llama")
    ids, mask, _ = padded((41, 27))
    plain = model.generate(ids, attention_mask=mask, **LOGITS)
    tokred.apply(model, "nsnquant", bits=16)
    found = model.generate(ids, attention_mask=mask, **LOGITS)
    assert all(map(torch.equal, found.logits, plain.logits)), "settings that do nothing"
    gaps = []
    for bits in (1, 2):
        tokred.apply(model, "nsnquant", bits=bits, window=8)
        found = model.generate(ids, attention_mask=mask, **LOGITS)
        assert torch.equal(found.logits[0], plain.logits[0])
        gaps.append((found.logits[1] - plain.logits[1]).abs().mean().item())
    assert 0 < gaps[1] < gaps[0]
    for policy in ("snapkv", "h2o", "zeromerge"):
        tokred.apply(model, policies(NSNQuant(window=8))[policy])
        assert model.generate(prompt(30, 2), num_beams=2, **GREEDY).shape == (2, 36)


def test_models_whose_rotation_is_not_known_are_refused_until_told_not_to_turn():
    pytest.importorskip("transformers")
    from tests.kv.tiny import build, prompt

    model = build("gpt_neox", hidden_size=64)
    with pytest.raises(tokred.MissingInputError, match=r"'nsnquant' reads rope, .*: give pre_rope=False"):
        tokred.apply(model, "nsnquant")
    tokred.apply(model, "nsnquant", pre_rope=False, window=8)
    assert model(prompt(20)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NSNQuant(bits=3), "bits must be one of 1, 2, 16 bits, got 3"),
        (lambda: NSNQuant(side_bits=8), "side_bits must be one of 4, 16 bits, got 8"),
        (lambda: NSNQuant(window=1), "window must be an integer of at least 2, got 1"),
        (
            lambda: NSNQuant().check(*[torch.zeros(1, 1, 0, 20)] * 2),
            "key heads of 20 numbers cannot be looked up by eights",
        ),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()

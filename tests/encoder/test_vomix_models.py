"""VoMix in models: fewer queries over all keys, against plain torch; sizes, full length, copies, types, compilation."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import tokred


class Seen(TorchFunctionMode):
    """Notes what a host's attention uses."""

    call = mask = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.call, self.mask = args, (kwargs or {}).get("attn_mask")
        return func(*args, **(kwargs or {}))


def reference(block, x, prefix, r, tau, size=None, **kwargs):
    """One block under VoMix, image by image and vote by vote, in plain torch; sizes, if given, weigh and bias."""
    noted = []
    norm = getattr(block.attn, "k_norm", None)
    hook = None if norm is None else norm.register_forward_hook(lambda m, i, o: noted.append(o))
    with Seen() as seen:
        block.attn(block.norm1(x), **kwargs)
    if hook is not None:
        hook.remove()
    q, k, v = seen.call[:3]
    b, _, n, d = q.shape
    metric = (noted[0] if noted else k).mean(1)
    bias = torch.zeros(b, 1, n, n) if seen.mask is None else seen.mask.expand(b, -1, n, n)
    bias = bias if size is None else bias + size.log()[:, None, None]
    size = torch.ones(b, n) if size is None else size
    answers, streams = [], []
    for i in range(b):
        unit = metric[i] / metric[i].norm(dim=-1, keepdim=True)
        s = unit @ unit.T
        free = range(prefix, n)
        score = dict.fromkeys(free, 0.0)
        for a in free:
            chosen = max((j for j in free if j != a), key=lambda j, a=a: (s[a, j].item(), -j))
            score[chosen] += s[a, chosen].item()
        count = math.floor(round(r * (n - prefix), 9))
        selected = sorted(free, key=lambda j: (-round(score[j], 6), j))[:count]
        retained = [j for j in range(n) if j not in selected]
        w = torch.zeros(len(retained), count)
        rows = [slot for slot, j in enumerate(retained) if j >= prefix]
        for c, j in enumerate(selected):
            w[rows, c] = (s[[retained[slot] for slot in rows], j] / tau).softmax(0)
        own, given = size[i, retained, None], w * size[i, selected]
        m = own + given.sum(1, keepdim=True)
        streams.append((own * x[i, retained] + given @ x[i, selected]) / m)
        asked = (own * q[i][:, retained] + given @ q[i][:, selected]) / m
        answers.append((asked @ k[i].mT / math.sqrt(d) + bias[i][:, retained]).softmax(-1) @ v[i])
    y = torch.stack(answers).transpose(1, 2).flatten(2)
    y = block.attn.proj(getattr(block.attn, "norm", torch.nn.Identity())(y))
    x = torch.stack(streams) + scaled(block, y, 1)
    return x + scaled(block, block.mlp(block.norm2(x)), 2)


def scaled(block, y, i):
    """Layer scale, whichever the block has."""
    gamma = getattr(block, f"gamma_{i}", None)
    return getattr(block, f"ls{i}")(y) if hasattr(block, f"ls{i}") else y if gamma is None else gamma * y


FAMILIES = [
    "vit", "vit-qknorm", "vit-registers (DINOv2)", "vit-mean", "deit-distilled", "eva02 (rope, swiglu)",
    "dinov3 (rope, registers)", "rope-mixed",
]  # fmt: skip


@pytest.fixture
def tiny():
    pytest.importorskip("timm")
    from tests.encoder import tiny_timm

    return tiny_timm


def run(model, x, layer, method, **options):
    """What enters and leaves a block, and the keywords it is called with."""
    seen = {}
    block = model.blocks[layer]
    hooks = [
        block.register_forward_pre_hook(lambda m, a, kw: seen.update(x=a[0], kwargs=kw), with_kwargs=True),
        block.register_forward_hook(lambda m, a, o: seen.update(y=o)),
    ]
    with torch.no_grad():
        tokred.apply(model, method, expose="none", **options)(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", [*FAMILIES, "beit (own bias)", "beit (shared bias)", "relpos"])
def test_mixed_queries_over_all_keys_equal_the_reference(tiny, family):
    model, x = tiny.build(family), tiny.images()
    method = tokred.VoMix(r=0.3, tau=0.2)
    seen = run(model, x, 0, method, where=lambda name, _: name == "blocks.0")
    tokred.remove(model)
    with torch.no_grad():
        expected = reference(model.blocks[0], seen["x"], model.num_prefix_tokens, 0.3, 0.2, **seen["kwargs"])
    assert seen["y"].shape[1] == seen["x"].shape[1] - 7
    torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-5)


def test_sizes_weigh_queries_and_tokens_and_bias_keys_as_in_the_reference(tiny):
    from tokred.adapters.encoder.host import shared_of

    model, x = tiny.build("vit"), tiny.images()
    seen = run(model, x, 1, tokred.VoMix(r=0.3, tau=0.2, track_size=True, prop_attn=True))
    size = shared_of(model)[0][2].records[0].state.size
    assert size.max() > 1.2
    tokred.remove(model)
    with torch.no_grad():
        expected = reference(model.blocks[1], seen["x"], 1, 0.3, 0.2, size)
    torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-5)


def test_in_the_last_block_the_class_token_notices_nothing(tiny):
    """Its query is not mixed and it sees every key, so a reduction after its attention is too late to matter."""
    model, x = tiny.build("vit"), tiny.images()
    with torch.no_grad():
        y = model(x)
        tokred.apply(model, "vomix", r=0.4, where=lambda name, _: name == "blocks.2")
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
        tokred.apply(model, "vomix", r=0.4)
        assert not torch.allclose(model(x), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mix_residual", [True, False])
def test_without_mixing_the_residual_kept_tokens_keep_theirs(tiny, mix_residual):
    model, x = tiny.build("vit"), tiny.images()
    block, seen = model.blocks[0], {}
    with torch.no_grad():
        block.ls2 = torch.nn.Identity()
        for p in (block.attn.proj.weight, block.attn.proj.bias, block.mlp.fc2.weight, block.mlp.fc2.bias):
            p.zero_()  # branches add nothing: the stream is what the reduction makes of it
        block.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
        block.register_forward_hook(lambda m, a, o: seen.update(y=o))
        tokred.apply(model, "vomix", r=0.3, mix_residual=mix_residual)
        model(x)
    from tokred.adapters.encoder.host import shared_of

    step = shared_of(model)[0][2].records[0].state.steps[0]
    kept = torch.equal(seen["y"], step.gather(seen["x"]))
    assert kept != mix_residual
    assert torch.equal(seen["y"][:, :1], seen["x"][:, :1]), "the class token, bit for bit"


def test_fractional_sizes_reach_attention_only_when_asked(tiny):
    model, x = tiny.build("vit"), tiny.images()
    outputs = []
    with torch.no_grad():
        for options in ({}, {"track_size": True}, {"track_size": True, "prop_attn": True}):
            outputs.append(tokred.apply(model, "vomix", r=0.3, **options)(x))
            rows = tokred.report(model).layers
            assert rows[-1].mean_size == pytest.approx(26 / rows[-1].tokens_out, rel=1e-5)
            assert rows[-1].mean_size != int(rows[-1].mean_size)
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_full_length_through_several_blocks(tiny):
    from tests.core.test_soft import dense
    from tokred.adapters.encoder.host import shared_of

    model, x = tiny.build("vit-mean"), tiny.images()
    tokred.apply(model, "vomix", r=0.2)
    with torch.no_grad():
        assert model.forward_features(x).shape[1] == 25
        state = shared_of(model)[0][2].last()
        assert len(state.steps) == 3
        y = torch.randn(3, state.steps[-1].slots, 4, dtype=torch.float64)
        matrix = dense(state.steps[0]) @ dense(state.steps[1]) @ dense(state.steps[2])
        torch.testing.assert_close(state.restore(y), matrix @ y, rtol=1e-5, atol=1e-6)
        weighted = (y * state.size.double().unsqueeze(-1)).sum(1) / 25
        torch.testing.assert_close(state.restore(y).mean(1), weighted, rtol=1e-5, atol=1e-6)
        maps = model.forward_intermediates(x, intermediates_only=True, norm=False)
    assert [m.shape for m in maps] == [(3, 48, 5, 5)] * 3


def test_nothing_to_remove_is_bit_equal_and_samples_do_not_mind_each_other(tiny):
    for family in FAMILIES:
        model, x = tiny.build(family), tiny.images()
        with torch.no_grad():
            y = model(x)
            assert torch.equal(tokred.apply(model, "vomix", r=0.0)(x), y), family
            tokred.apply(model, "vomix", r=0.2)
            z = model(x)
            assert [row.tokens_out for row in tokred.report(model).layers] == tokred.flops(
                model, "vomix", (3, tiny.SIZE, tiny.SIZE), r=0.2
            ).tokens
            for i in range(len(x)):
                torch.testing.assert_close(model(x[i : i + 1]), z[i : i + 1], rtol=1e-4, atol=2e-5)
            assert torch.equal(tokred.remove(model)(x), y), family


@pytest.mark.parametrize("family", ["vit", "dinov3 (rope, registers)"])
def test_copies_carry_the_patch(tiny, family):
    model, x = tiny.build(family), tiny.images()
    tokred.apply(model, "vomix", r=0.2)
    with torch.no_grad():
        y = model(x)
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(clone(x), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_single(tiny, dtype):
    x = tiny.images()
    single, half = tiny.build("vit"), tiny.build("vit").to(dtype)
    method = tokred.VoMix(r=0.3, track_size=True, prop_attn=True)
    with torch.no_grad():
        y = tokred.apply(single, method)(x)
        z = tokred.apply(half, method)(x.to(dtype))
        assert z.dtype == dtype
        assert z.isfinite().all()
        tokred.remove(single), tokred.remove(half)
        plain = (half(x.to(dtype)).float() - single(x)).norm()
    # What the type loses by itself is the yardstick; bfloat16 decides differently on a few tokens of random weights.
    assert (z.float() - y).norm() <= (2 * plain if dtype == torch.float16 else 0.15 * y.norm())
    with torch.no_grad():
        flat = tokred.apply(half, method)(torch.zeros_like(x, dtype=dtype))
    assert flat.isfinite().all(), "all tokens equal"


def test_a_training_step_reaches_every_parameter(tiny):
    model, x = tiny.build("vit").train(), tiny.images()
    tokred.apply(model, "vomix", r=0.2)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_autocast_keeps_sizes_whole(tiny):
    model, x = tiny.build("vit"), tiny.images()
    tokred.apply(model, "vomix", r=0.3, track_size=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()
    last = tokred.report(model).layers[-1]
    assert last.mean_size * last.tokens_out == pytest.approx(26, rel=1e-5)


@pytest.mark.hosts
@pytest.mark.slow
def test_compiles_to_one_graph(tiny):
    for family in ("vit", "eva02 (rope, swiglu)"):
        torch._dynamo.reset()
        model = tiny.build(family)
        tokred.apply(model, "vomix", r=0.2, track_size=True, prop_attn=True)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(tiny.images()), model(tiny.images()), rtol=1e-4, atol=1e-5)


def test_hosts_that_cannot_reduce_queries_refuse(tiny):
    with pytest.raises(tokred.MissingInputError, match="queries"):
        tokred.apply(tiny.build("vit-parallel-scaling"), "vomix", r=0.2)

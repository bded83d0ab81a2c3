"""LU-KV: the card's worked examples, curves in a file, and what they do to a cache."""

from __future__ import annotations

import pytest
import torch

import tokred
from tokred.core.learned import Facts
from tokred.kernels.decode_attention import SENTINEL
from tokred.kv import CacheSite, Curves, Padding, Window
from tokred.kv.budgets.curves import KIND, curve, dropped, given_up, marginals, whole_rows
from tokred.kv.statistics import Statistics, read

# Of two heads, by position; scores fall with the position, so that the last row goes first.
UTILITY = [[5, 0, 3, 1, 0.5, 2], [9, 8, 7, 1.5, 1.5, 1.5]]
EXAMPLE = {"curves": (((0.9, 0.3), (0.5, 0.5), (0.2, 0.8)),), "score": {"part": "window", "size": 4, "pool": 3}}


def test_worked_example_of_the_hull():
    steps = [marginals(torch.tensor(u).flip(0)[:6]) for u in UTILITY]
    assert steps[0][:5].tolist() == pytest.approx([7 / 6] * 3 + [1.5] * 2)
    assert marginals(torch.tensor(UTILITY[0]).flip(0)).tolist() == pytest.approx([7 / 6] * 3 + [1.5] * 2 + [5])
    assert marginals(torch.tensor(UTILITY[1]).flip(0)).tolist() == pytest.approx([1.5] * 3 + [7, 8, 9])
    # One row of each head never goes.
    steps = [s[:5] for s in steps]
    assert (6 - dropped(steps, (3, 6, 8))).tolist() == [[3, 6], [1, 5], [1, 3]]


def test_worked_example_of_the_rounding():
    assert whole_rows(torch.tensor([0.5, 0.5004, 0.2501], dtype=torch.float64), 10) == [5, 5, 7]
    assert whole_rows(torch.tensor([0.9, 0.85, 0.33, 0.61], dtype=torch.float64), 37) == [4, 5, 25, 14]
    assert whole_rows(torch.tensor([1.0, 1.0], dtype=torch.float64), 5) == [1, 1]


def test_marginals_are_the_hull_of_the_losses():
    lost = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = marginals(lost)
    assert (found.diff() >= -1e-12).all()
    assert found.sum() == pytest.approx(lost.sum().item())
    below = found.cumsum(0) - lost.cumsum(0)
    assert (below <= 1e-9).all()
    # A slope changes only where the hull touches.
    touches = [i for i in range(39) if found[i + 1] > found[i] + 1e-12]
    assert all(abs(below[i]) < 1e-9 for i in touches)


def test_a_curve_drops_by_the_score_and_keeps_guards():
    g = torch.Generator().manual_seed(1)
    scores, utility = torch.rand(2, 3, 50, generator=g), torch.rand(2, 3, 50, generator=g)
    found = curve(scores, utility, 4, 2)
    assert found.shape == (99, 2, 3)
    rows = ((1 - found) * 50).round()
    assert rows.min() == 6, "first and newest rows stay"
    assert (rows.diff(dim=0) <= 0).all(), "more never comes back"
    for x in (10, 50, 80):
        assert rows[x - 1].sum() == 300 - round(x * 300 / 100)
    same = curve(scores[:, :1].expand(-1, 3, -1), torch.ones(2, 3, 50), 4, 2)
    assert (same[49] - 0.5).abs().max() <= 0.5, "equal steps go by the number of the head"


def test_points_between_and_beyond():
    table = torch.tensor([[[0.2]], [[0.6]], [[0.9]]])  # at a quarter, a half, three quarters
    assert [round(given_up(table, s).item(), 4) for s in (0.0, 0.25, 0.375, 0.5, 0.75, 0.99)] == [
        0.2, 0.2, 0.4, 0.6, 0.9, 0.9,
    ]  # fmt: skip


# ---------------------------------------------------------------- the budget


def site(n: int = 20, layer: int = 0, **more) -> CacheSite:
    g = torch.Generator().manual_seed(layer)
    q, k = torch.randn(1, 4, n, 8, generator=g), torch.randn(1, 2, n, 8, generator=g)
    return CacheSite(**{"q": q, "k": k, "v": k, "layer": layer, "depth": 3, **more})


def test_rows_of_layers_and_heads():
    policy = tokred.LUKV(budget=10, sinks=1, **EXAMPLE)
    found = []
    for layer in range(3):
        step = policy.reduce(site(layer=layer))
        found.append([step.slots] * 2 if step.mask is None else step.mask[0].sum(-1).tolist())
    # The window of four never goes.
    assert found == [[5, 14], [10, 10], [16, 5]]
    assert sum(map(sum, found)) == 60
    even = tokred.LUKV(budget=10, curves=(((0.5, 0.5),) * 3,), score=Window(4, 3), sinks=1).reduce(site())
    assert (
        even.representative.tolist()
        == tokred.make("kv", score=Window(4, 3), budget=10, sinks=1, recent=1).reduce(site()).representative.tolist()
    )
    assert tokred.from_dict(policy.to_dict()) == policy
    assert [policy.tokens(20, layer=i, depth=3) for i in range(3)] == [8, 10, 10]


def test_padded_samples_have_their_own_rows():
    mask = torch.arange(20)[None] >= torch.tensor([[0], [8]])
    q, k = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8)
    both = tokred.LUKV(budget=0.5, sinks=0, **EXAMPLE).reduce(
        CacheSite(q=q, k=k, v=k, padding=Padding(mask), layer=2, depth=3)
    )
    alone = tokred.LUKV(budget=0.5, sinks=0, **EXAMPLE).reduce(
        CacheSite(q=q[1:, :, 8:], k=k[1:, :, 8:], v=k[1:, :, 8:], layer=2, depth=3)
    )
    for head in range(2):
        ours = both.representative[1, head][both.mask[1, head]] - 8
        theirs = alone.representative[0, head]
        assert ours.tolist() == (theirs if alone.mask is None else theirs[alone.mask[0, head]]).tolist()


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"curves": 3.5}, TypeError, "curves must be the name of a file, got 3.5"),
        ({"curves": (((0.5, 1.5),),)}, ValueError, r"a share in \[0, 1\]"),
        ({"curves": (((0.5,), (0.5, 0.5)),)}, ValueError, "for each point and layer"),
        ({"curves": (0.5,)}, TypeError, "curves must be a file, or shares"),
        ({"budget": 0}, ValueError, "budget must be at least one token"),
    ],
)
def test_bad_input(given, kind, text):
    with pytest.raises(kind, match=text):
        Curves(0.5, given["curves"]).table() if "curves" in given else tokred.LUKV(**given)


# ---------------------------------------------------------------- on a model


@pytest.fixture(scope="module")
def llama():
    pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    from tests.kv.tiny import build

    return build("llama")


@pytest.fixture(autouse=True)
def unpatched(request):
    yield
    if "llama" in request.fixturenames:
        tokred.remove(request.getfixturevalue("llama"))


@torch.no_grad()
def test_utilities_are_those_of_the_eager_attention(llama, tmp_path):
    from tests.kv.tiny import prompt

    ids, file = prompt(30), tmp_path / "curves.safetensors"
    score, n, steps = Window(4, 3), 30, 5
    found = tokred.calibrate(llama, [ids], file, method=tokred.LUKV(score=score, sinks=2), steps=steps)
    made = llama.generate(ids, max_new_tokens=steps, do_sample=False, eos_token_id=None)
    values, v_proj = {}, [layer.self_attn.v_proj for layer in llama.model.layers]

    def note(module, args, out) -> None:
        values[v_proj.index(module)] = out[0, :n].view(n, 2, -1).transpose(0, 1)

    handles = [module.register_forward_hook(note) for module in v_proj]
    llama.set_attn_implementation("eager")
    attentions = llama(made, output_attentions=True, use_cache=False).attentions
    llama.set_attn_implementation("sdpa")
    [h.remove() for h in handles]
    scores, utility = [], []
    for i, weights in enumerate(attentions):
        wide = llama.model.layers[i].self_attn.o_proj.weight.T.reshape(4, -1, 48)
        lengths = torch.einsum("hnd,hdc->hnc", values[i].repeat_interleave(2, 0), wide).norm(dim=-1)
        used = weights[0, :, n:, :n].amax(1) * lengths / lengths.sum()
        utility.append(used.view(2, 2, n).amax(1))
        tokred.apply(llama, "snapkv", budget=1000, window=4, pool=3)
        window = weights[0, :, n - 4 : n, : n - 4].mean(1).view(2, 2, -1).mean(1)
        smooth = torch.nn.functional.avg_pool1d(window, 3, 1, 1)
        scores.append(torch.nn.functional.pad(smooth, (0, 4)))
        tokred.remove(llama)
    expected = curve(torch.stack(scores), torch.stack(utility), 2, 1)
    # Rows of the window have no score of their own; where they tie, steps differ by rounding.
    assert (found.tensors["curves"].double() - expected).abs().mean() < 0.01
    assert read(file, KIND, "").about["score"] == score.to_dict()


@torch.no_grad()
def test_a_file_says_what_it_is_for(llama, tmp_path):
    from tests.kv.tiny import build, prompt

    file = tmp_path / "curves.safetensors"
    tokred.calibrate(llama, [prompt(40), prompt(30, 2)], file, method=tokred.LUKV(score="key_norm"), steps=3)
    tokred.apply(llama, "lukv", curves=file, score="key_norm", budget=0.4)
    llama.generate(prompt(40), max_new_tokens=3, do_sample=False)
    rows = tokred.report(llama).layers
    assert sum(row.rows for row in rows) <= 3 * (16 + 2) + 3
    tokred.remove(llama)
    with pytest.raises(ValueError, match=r"made for the score .*key_norm.*, but this policy's is .*window"):
        tokred.apply(llama, "lukv", curves=file, score="window")
    with pytest.raises(ValueError, match=r"made on .*LlamaModel.*, but this model is .*Qwen3Model"):
        tokred.apply(build("qwen3"), "lukv", curves=file, score="key_norm")
    with pytest.raises(ValueError, match=r"needs curves of the model: make them with tokred calibrate"):
        tokred.apply(llama, "lukv", score="key_norm")
    with pytest.raises(ValueError, match="curves has 2 layers, but 3 layers are compressed"):
        tokred.apply(llama, "lukv", curves=(((0.5, 0.5),) * 2,), score="key_norm")
    with pytest.raises(ValueError, match="cannot be made for the score 'reconstruction'"):
        tokred.calibrate(llama, [prompt(20)], method=tokred.LUKV(score="reconstruction"))
    with pytest.raises(TypeError, match="method must be triattention or lukv"):
        tokred.calibrate(llama, [prompt(20)], method=tokred.SnapKV())
    Statistics("queries", Facts("x", 1, 1, 1), {"a": torch.ones(1)}, {}).save(file)
    with pytest.raises(ValueError, match="holds statistics of queries, not of utility"):
        tokred.apply(llama, "lukv", curves=file)


@torch.no_grad()
@pytest.mark.parametrize("batch", ["one", "padded"])
def test_laws(llama, batch):
    from tests.kv.masked import farthest
    from tests.kv.tiny import padded, prompt

    ids, mask, _ = padded((29, 17, 6)) if batch == "padded" else (prompt(29), None, None)
    plain = llama(ids, attention_mask=mask).logits
    tokred.apply(llama, "lukv", **{**EXAMPLE, "budget": 1.0})
    assert torch.equal(llama(ids, attention_mask=mask).logits, plain)
    tokred.apply(llama, "lukv", budget=10, sinks=1, **EXAMPLE)
    cache = tokred.kv_cache(llama)
    logits = llama(ids, attention_mask=mask, past_key_values=cache).logits
    held = [(layer.positions != SENTINEL).sum(-1)[0].tolist() for layer in cache.layers]
    assert len({tuple(h) for h in held}) == 3
    ours, rounding = farthest(llama, cache, logits, ids, mask, [prompt(m, len(ids), seed=20 + m) for m in (1, 3, 1)])
    assert ours < 2 * rounding < 1e-5

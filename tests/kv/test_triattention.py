"""TriAttention: the card's worked example, files of statistics, and generation."""

from __future__ import annotations

import pytest
import torch

import tokred
from tokred.core.learned import Facts
from tokred.errors import MissingInputError
from tokred.kernels.decode_attention import SENTINEL
from tokred.kv import CacheSite, Padding, Trigonometric
from tokred.kv.statistics import Statistics, read
from tokred.methods.kv.triattention import KIND, Centres, concentration

W = torch.tensor([1.0, 0.1])
# Two query heads, three tokens each, before rotation; pairs are channels 0 with 2 and 1 with 3.
QUERIES = [[[1, 0, 0, 1], [0, 1, 1, 1], [1, 1, 0, 0]], [[0, 1, 0, 0], [0, 1, 1, 0], [0, 2, -1, 0]]]
KEYS = [[1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 0], [0, -1, 2, 0], [0.5, 0, 0, 0.5]]
PLACES = [0, 1, 2, 4, 5]
HEADS = [[0.080904, 1.259159, 1.035652, -0.167853, 0.515884], [0.666667, 1.868433, 2.009309, 0.132563, 0.549692]]
FARTHEST = [0.53825, 1.37659, 1.59621, 0.798314, 0.931664]


def rotated(x: torch.Tensor, places: torch.Tensor, w: torch.Tensor = W) -> torch.Tensor:
    """``[..., N, D]`` turned by their positions ``[N]``."""
    a, b = x.chunk(2, -1)
    angle = places[:, None].double() * w.double()
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Turning:
    """A rotary embedding of some frequencies, as of queries at the positions 0, 1, 2, ..."""

    def __init__(self, w: torch.Tensor = W, factor: float = 1.0, places: torch.Tensor | None = None) -> None:
        self.w, self.factor, self.places = w, factor, places

    def turns(self):
        return self.w, self.factor

    def unrotate(self, q):
        places = torch.arange(q.shape[2]) if self.places is None else self.places
        return rotated(q, -places, self.w) / self.factor


def made(tmp_path, **more):
    """The centres of the worked example in a file."""
    pairs = torch.stack(torch.tensor(QUERIES, dtype=torch.float32).chunk(2, -1), -1)
    tensors = {"centre": pairs.mean(1)[None], "length": pairs.norm(dim=-1).mean(1)[None], "frequencies": W[None]}
    facts = Facts("example", 1, 8, 2, key_heads=1)
    return Statistics(KIND, facts, {**tensors, **more}, {"tokens": 3}).save(tmp_path / "centres.safetensors")


def site(heads: int = 1, seen: int = 6, **more) -> CacheSite:
    k = rotated(torch.tensor(KEYS), torch.tensor(PLACES)).expand(1, heads, -1, -1)
    slots = torch.tensor(PLACES, dtype=torch.int32).expand(1, heads, -1)
    given = {"k": k, "v": k, "positions": slots, "seen": seen, "rope": Turning(), "prompt": (0,)}
    return CacheSite(**{**given, **more})


def close(found, expected):
    assert found.flatten().tolist() == pytest.approx(expected, abs=2e-6)


def test_statistics_of_the_worked_example(tmp_path):
    file = read(made(tmp_path), KIND, "")
    close(file.tensors["centre"][0, 0], [0.666667, 0.333333, 0.666667, 0.666667])
    close(file.tensors["length"][0], [1, 1.138071, 0.666667, 1.333333])
    close(concentration(Centres(file.tensors["centre"], file.tensors["length"])), [0.745356, 0.828427, 0, 1])


def test_scores_of_the_worked_example(tmp_path):
    close(site().k[0, 0, 2], [-1.325444, 0.980067, 0.493151, 0.198669])
    plain = Trigonometric(str(made(tmp_path)), offset_max=4, zscore=False)
    # With a key/value head to each query head, heads are not compared.
    close(plain(site(2)), [*HEADS[0], *HEADS[1]])
    close(plain(site()), [max(pair) for pair in zip(*HEADS, strict=True)])
    farthest = Trigonometric(str(made(tmp_path)), offset_max=4, zscore=False, offsets="max")
    close(farthest(site(2))[:, 0], FARTHEST)


def test_choice_of_the_worked_example(tmp_path):
    policy = tokred.TriAttention(stats=str(made(tmp_path)), offset_max=4, budget=3)
    close(policy.parts.score(site()), [-0.503419, 1.315267, 1.281561, -1.213485, -0.053142])
    assert policy.reduce(site()).representative.tolist() == [[[1, 2, 4]]]
    assert policy.reduce(site(2)).representative.tolist() == [[[1, 2, 4], [0, 1, 2]]]
    assert tokred.from_dict(policy.to_dict()) == policy


def by_hand(score: Trigonometric, keys, places, now, centre, length, w, factor):
    """The definition, term by term in double precision: ``[H, K]``, before heads are compared."""
    z = torch.complex(*(t.double() for t in keys.chunk(2, -1))) / 1.0  # [K, f], unrotated and not scaled
    c = torch.complex(centre[..., 0].double(), centre[..., 1].double())  # [H, f]
    rest = factor**2 * ((length.double() - c.abs())[:, None] * z.abs()).sum(-1)
    far = [2**i for i in range(score.offset_max.bit_length())]
    found = []
    for offset in far:
        angle = w.double() * (now - places[:, None].double() + offset) + (c[:, None] * z.conj()).angle()
        found.append(factor**2 * (c.abs()[:, None] * z.abs() * angle.cos()).sum(-1))
    stacked = torch.stack(found)
    return (stacked.mean(0) if score.offsets == "mean" else stacked.amax(0)) + rest


@pytest.mark.parametrize("offsets", ["mean", "max"])
def test_positions_cancel(tmp_path, offsets):
    """Against the definition, which turns each key back by its own position; far out, with a scaled embedding."""
    torch.manual_seed(0)
    w, factor = 10000.0 ** -(torch.arange(8) / 8), 1.3
    keys, places = torch.randn(40, 16), torch.randperm(5000)[:40].sort().values
    centre, length = torch.randn(4, 8, 2), torch.rand(4, 8) + 2
    file = made(tmp_path, centre=centre[None], length=length[None], frequencies=w[None])
    k = (factor * rotated(keys, places, w)).expand(1, 2, -1, -1)
    slots = places.int().expand(1, 2, -1)
    score = Trigonometric(str(file), offsets=offsets, zscore=False)
    found = score(CacheSite(k=k, v=k, positions=slots, seen=5000, rope=Turning(w, factor), prompt=(0,)))
    expected = by_hand(score, keys, places, 5000, centre, length, w, factor).view(2, 2, -1).amax(1)
    assert torch.allclose(found[0].double(), expected, atol=1e-3)
    # All positions later by the same number: the same scores.
    k = (factor * rotated(keys, places + 700, w)).expand(1, 2, -1, -1)
    moved = CacheSite(k=k, v=k, positions=slots + 700, seen=5700, rope=Turning(w, factor), prompt=(0,))
    assert torch.allclose(score(moved), found, atol=2e-3)


def test_the_prompt_s_own_queries_in_chunks_and_behind_padding():
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8)
    w = torch.tensor([1.0, 0.3, 0.1, 0.02])
    score = Trigonometric("prompt", least=20, generated=False)

    def of(parts, pad=0):
        # Padding stands before the first forward's tokens, and holds large numbers.
        behind = lambda x, count: torch.nn.functional.pad(x, (0, 0, count, 0), value=5.0)  # noqa: E731
        notes, done = {}, 0
        for m in parts:
            first, done = done, done + m
            some = rotated(q, torch.arange(20), w)[:, :, first:done]
            places = torch.arange(first, done)
            if pad and not first:
                some, places = behind(some, pad), torch.nn.functional.pad(places, (pad, 0))
            padding = Padding(torch.arange(done + pad)[None] >= pad) if pad else None
            held = behind(k[:, :, :done], pad)
            rope = Turning(w, places=places)
            where = CacheSite(q=some, k=held, v=held, notes=notes, rope=rope, padding=padding)
            score.observe(where)
        return score(where)[..., pad:]

    whole = of((20,))
    for parts in ((12, 8), (7, 12, 1)):
        assert torch.allclose(of(parts), whole, atol=1e-4)
    assert torch.allclose(of((20,), pad=3), whole, atol=1e-4)
    with pytest.raises(ValueError, match="stats='prompt' needs prompts of at least 20 tokens, and had one of 19"):
        of((19,))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"prompt": "drop"}, "prompt is 'drop'; allowed are 'keep', 'compete'"),
        ({"offsets": "sum"}, "offsets is 'sum'"),
        ({"budget": 0}, "budget must be"),
        ({"every": 0}, "every must be"),
        ({"budget": 4, "recent": 5}, "a budget of 4 tokens cannot hold the 0 first and 5 newest tokens"),
    ],
)
def test_bad_input(given, text):
    with pytest.raises(ValueError, match=text):
        tokred.TriAttention(**given)


# ---------------------------------------------------------------- on a model


@pytest.fixture(scope="module")
def llama():
    pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    from tests.kv.tiny import build

    return build("llama", torch.float64)


@pytest.fixture(autouse=True)
def unpatched(request):
    yield
    if "llama" in request.fixturenames:
        tokred.remove(request.getfixturevalue("llama"))


def queries(model, ids):
    """For each layer the queries ``[H, N, D]`` before rotation, by the model's own projection."""
    seen = {}

    def note(module, args, out) -> None:
        seen[len(seen)] = out[0].view(len(out[0]), 4, -1).transpose(0, 1)

    handles = [layer.self_attn.q_proj.register_forward_hook(note) for layer in model.model.layers]
    with torch.no_grad():
        model(ids, use_cache=False)
    [h.remove() for h in handles]
    return seen


def test_a_file_is_made_of_a_text(llama, tmp_path):
    from tests.kv.tiny import prompt

    texts = [prompt(30, seed=1), prompt(17, 2, seed=2)]
    found = tokred.calibrate(llama, texts, tmp_path / "llama.safetensors")
    assert found.about["tokens"] == 64
    assert found.facts.key_heads == 2
    own = [queries(llama, row[None]) for text in texts for row in text]
    for i in range(3):
        z = torch.cat([torch.complex(*one[i].double().chunk(2, -1)) for one in own], 1)
        centre = torch.view_as_real(z.mean(1)).float()
        assert torch.allclose(found.tensors["centre"][i], centre, atol=1e-5)
        assert torch.allclose(found.tensors["length"][i], z.abs().mean(1).float(), atol=1e-5)
    again = read(tmp_path / "llama.safetensors", KIND, "")
    assert all(torch.equal(again.tensors[name], t) for name, t in found.tensors.items())
    assert torch.allclose(again.tensors["frequencies"][0], llama.model.rotary_emb.inv_freq.float(), rtol=1e-5)
    assert not list(tmp_path.glob(".*")), "no half-written file is left"
    with pytest.raises(ValueError, match="texts holds no tokens"):
        tokred.calibrate(llama, [])


@pytest.mark.hosts
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mistral"])
def test_centres_are_those_of_the_queries_as_they_are_turned(family):
    """Behind the norm of queries, where a model has one; of the layers that policies act on."""
    from tests.kv.tiny import build, prompt
    from tokred.adapters import find

    model, ids, seen = build(family, torch.float64), prompt(24), {}
    blocks = [attention for _, attention in find(model, "cache").blocks]
    found = tokred.calibrate(model, [ids])
    for i, attention in enumerate(blocks):
        last = attention.q_norm if hasattr(attention, "q_norm") else attention.q_proj
        last.register_forward_hook(lambda module, args, out, i=i: seen.update({i: out}))
    with torch.no_grad():
        model(ids, use_cache=False)
    for i in range(len(blocks)):
        q = seen[i].reshape(24, 4, -1) if seen[i].ndim == 3 else seen[i][0]
        q = q if q.shape[0] == 24 else q.transpose(0, 1)
        z = torch.complex(*q.double().chunk(2, -1))
        assert torch.allclose(found.tensors["centre"][i], torch.view_as_real(z.mean(0)).float(), atol=1e-5)


def test_a_file_of_another_model_is_refused(llama, tmp_path):
    from tests.kv.tiny import build, prompt

    other, file = build("qwen3"), tmp_path / "qwen.safetensors"
    tokred.calibrate(other, [prompt(20)], file)
    with pytest.raises(ValueError, match=r"made on .*Qwen3Model of 3 layers, .*this model is .*LlamaModel of 3 layers"):
        tokred.apply(llama, "triattention", stats=file)
    assert tokred.patched(llama) == []
    # Of the same shapes and another embedding.
    longer = build("llama", rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    tokred.calibrate(longer, [prompt(20)], file)
    tokred.apply(llama, "triattention", stats=file, budget=2, every=1)
    with pytest.raises(ValueError, match="with another rotary embedding than this model's"):
        llama.generate(prompt(12), max_new_tokens=6)
    with pytest.raises(ValueError, match=r"triattention needs statistics .* tokred calibrate MODEL TEXT -o FILE"):
        tokred.apply(llama, "triattention")
    with pytest.raises(FileNotFoundError, match=r"there is no file .* tokred calibrate"):
        tokred.apply(llama, "triattention", stats=tmp_path / "nowhere")
    file.write_text("a text")
    with pytest.raises(ValueError, match="holds no statistics of tokred"):
        tokred.apply(llama, "triattention", stats=file)
    Statistics("gates", Facts("x", 1, 1, 1), {"a": torch.ones(1)}, {}).save(file)
    with pytest.raises(ValueError, match="holds statistics of gates, not of queries"):
        tokred.apply(llama, "triattention", stats=file)


def test_a_host_without_such_an_embedding_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    with pytest.raises(MissingInputError, match="reads rope"):
        tokred.apply(transformers.GPT2LMHeadModel(config).eval(), "triattention", stats="prompt")


@torch.no_grad()
@pytest.mark.parametrize("source", ["file", "prompt"])
def test_batches_padding_and_beams_change_nothing(llama, source, tmp_path):
    from tests.kv.tiny import padded, prompt

    stats = "prompt"
    if source == "file":
        stats = tmp_path / "llama.safetensors"
        tokred.calibrate(llama, [prompt(30, seed=1)], stats)
    tokred.apply(llama, "triattention", stats=stats, budget=4, every=3, recent=1, least=1)
    ids, mask, alone = padded((22, 14))
    options = {"max_new_tokens": 13, "do_sample": False, "eos_token_id": None}
    more = {"return_dict_in_generate": True, "output_logits": True}
    both = llama.generate(ids, attention_mask=mask, **options, **more)
    for i, row in enumerate(alone):
        one = llama.generate(row, **options, **more)
        assert all((a[i] - c[0]).abs().max() < 1e-9 for a, c in zip(both.logits, one.logits, strict=True))
        for ours, theirs in zip(both.past_key_values.layers, one.past_key_values.layers, strict=True):
            shift = 22 - row.shape[1]
            for head in range(2):
                found = [p - shift for p in ours.positions[i, head].tolist() if p != SENTINEL]
                assert found == [p for p in theirs.positions[0, head].tolist() if p != SENTINEL]
                assert found[: row.shape[1]] == list(range(row.shape[1])), "the prompt is not touched"
                assert len(found) == row.shape[1] + 4
    beams = llama.generate(ids, attention_mask=mask, num_beams=3, **options)
    for i, row in enumerate(alone):
        one = llama.generate(row, num_beams=3, **options)
        assert beams[i, 22:].tolist() == one[0, row.shape[1] :].tolist()


@torch.no_grad()
def test_a_budget_that_holds_everything_is_bit_equal(llama):
    from tests.kv.tiny import prompt

    plain = llama.generate(prompt(12), max_new_tokens=8, do_sample=False)
    tokred.apply(llama, "triattention", stats="prompt", least=1, budget=8, every=1)
    assert torch.equal(llama.generate(prompt(12), max_new_tokens=8, do_sample=False), plain)
    tokred.apply(llama, "triattention", stats="prompt", least=1, budget=9, every=2, prompt="compete")
    made = llama.generate(
        prompt(12), max_new_tokens=5, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    assert {layer.held for layer in made.past_key_values.layers} == {9}

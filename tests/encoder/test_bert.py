"""Text encoders: padding goes first, every sample is as if alone, heads for tokens get full length."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import tokred
from tests.encoder.laws import assert_same, snapshot
from tokred.adapters.encoder.host import shared_of
from tokred.methods.encoder.spatten import RECEIVED

SMALL = {
    "vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 40, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
DISTIL = {
    "vocab_size": 60, "dim": 48, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40,
    "num_labels": 3,
}  # fmt: skip
MODERN = {**SMALL, "global_attn_every_n_layers": 2, "local_attention": 8, "bos_token_id": 1, "eos_token_id": 2,
          "cls_token_id": 1, "sep_token_id": 2}  # fmt: skip
KINDS = {
    "bert": ("Bert", SMALL), "roberta": ("Roberta", SMALL), "xlm-roberta": ("XLMRoberta", SMALL),
    "camembert": ("Camembert", SMALL), "electra": ("Electra", {**SMALL, "embedding_size": 24}),
    "ernie": ("Ernie", SMALL), "distilbert": ("DistilBert", DISTIL), "modernbert": ("ModernBert", MODERN),
}  # fmt: skip
LENGTHS = (20, 13, 6)

# Everything that a text encoder can supply.
METHODS = {
    "tome": {"r": 3}, "tome-list": {"r": [5, 0, 2]}, "pitome": {"ratio": 0.8}, "random": {"r": 3},
    "random_prune": {"r": 3}, "kth": {"k": 2}, "evit": {"kappa": 0.6}, "evit-drop": {"kappa": 0.6, "fuse": False},
    "zero_tprune": {"rho": 0.6, "r_s": 2}, "ats": {}, "ppt": {"r": 3}, "tofu": {"r": 3}, "saint": {"tau": 0.35, "K": 3},
    "tinychart": {"r": 3, "order": "raster"}, "spatten": {"first": 1, "keep": 0.4},
    "spatten-heads": {"first": 1, "keep": 0.4, "heads": 2}, "ltp": {"thresholds": [0.0, 0.04, 0.06, 0.09]},
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def build(kind: str = "bert", head: str = "ForSequenceClassification", seed: int = 0):
    """A tiny encoder with large weights, so that attention is far from even."""
    name, options = KINDS[kind]
    torch.manual_seed(seed)
    model = getattr(transformers, name + head)(getattr(transformers, name + "Config")(**options))
    for p in model.parameters():
        if p.ndim == 2:
            p.mul_(4)
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    """Texts of different lengths, padded on the right."""
    ids = torch.randint(3, 60, (3, LENGTHS[0]), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(LENGTHS[0]) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def alone(i: int) -> dict[str, torch.Tensor]:
    return {"input_ids": batch()["input_ids"][i : i + 1, : LENGTHS[i]]}


def states(model):
    records = shared_of(model)[0][2].records
    return [records[layer].state for layer in sorted(records)]


# ---------------------------------------------------------------- the two laws


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_remove_is_bit_equal_and_removal_restores_everything(kind):
    model = build(kind)
    y = model(**batch()).logits
    before = snapshot(model)
    for name, options in {"tome": {"r": 0}, "spatten": {"keep": 1.0}, "ltp": {"theta_final": 0.0}}.items():
        if name in ("spatten", "ltp") and kind == "modernbert":
            with pytest.raises(tokred.MissingInputError, match="attention"):
                tokred.apply(model, name, **options)
            continue
        tokred.apply(model, name, **options)
        assert torch.equal(model(**batch()).logits, y), name
    tokred.apply(model, "tome", r=3)
    assert not torch.equal(model(**batch()).logits, y)
    tokred.remove(model)
    assert_same(before, snapshot(model))
    assert torch.equal(model(**batch()).logits, y)


def close(a, b, case):
    assert (a - b).abs().max() < 2e-5 * max(1.0, float(b.abs().max())), case


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert"])
def test_every_method_reduces_each_sample_as_if_it_were_alone(kind, case):
    model, name = build(kind), case.partition("-")[0]
    method = tokred.make(name, **METHODS[case])
    if kind == "modernbert" and "attention" in method.reads:
        pytest.skip("attention in windows shows no columns")
    tokred.apply(model, method)
    z = model(**batch()).logits
    together = states(model)
    for i in range(len(LENGTHS)):
        close(model(**alone(i)).logits[0], z[i], (case, i))
        for ours, single in zip(together, states(model), strict=True):
            if ours.representative is None:
                assert single.representative is None
                continue
            rows = ours.representative[i] if ours.mask is None else ours.representative[i][ours.mask[i]]
            expected = torch.arange(LENGTHS[i]) if single.representative is None else single.representative[0]
            assert rows.tolist() == expected.tolist(), (case, i)
            assert rows[0] == 0, "the class token stays the first"


def test_padding_goes_before_any_real_token():
    model = tokred.apply(build(), "random_prune", r=1)
    model(**batch())
    first = states(model)[0]
    assert first.representative.shape[1] == 19
    assert first.mask.sum(1).tolist() == [19, 12, 5]


@pytest.mark.parametrize("case", ["tome", "ats", "spatten-heads", "ltp"])
def test_hosts_and_dtypes(case):
    for kind in ("roberta", "xlm-roberta", "camembert", "electra", "ernie"):
        model = tokred.apply(build(kind), case.partition("-")[0], **METHODS[case])
        z = model(**batch()).logits
        close(model(**alone(1)).logits[0], z[1], kind)
    half = tokred.apply(build().bfloat16(), case.partition("-")[0], **METHODS[case])
    assert half(**batch()).logits.isfinite().all()


# ---------------------------------------------------------------- oracles: dropping is masking


def by_masking(model, inputs, keep):
    """The plain BERT, layer by layer, with the keys hidden that ``keep[l]`` ``[B, N]`` lacks after layer ``l``."""
    bert, seen = model.bert, inputs["attention_mask"].bool()
    x = bert.embeddings(inputs["input_ids"])
    for layer, left in zip(bert.encoder.layer, keep, strict=True):
        x = layer(x, attention_mask=seen[:, None, None, :])
        seen = seen & left
    return model.classifier(bert.pooler(x))


@pytest.mark.parametrize("case", ["ltp", "spatten", "random_prune"])
def test_dropping_tokens_equals_masking_them(case):
    model, inputs = build(), batch()
    tokred.apply(model, case, **METHODS[case])
    y = model(**inputs).logits
    keep = []
    for state in states(model):
        left = torch.ones(3, LENGTHS[0], dtype=torch.bool)
        if state.representative is not None:
            mask = torch.ones_like(state.representative, dtype=torch.bool) if state.mask is None else state.mask
            left = torch.zeros(3, LENGTHS[0] + 1, dtype=torch.bool)
            left = left.scatter(1, torch.where(mask, state.representative, LENGTHS[0]), True)[:, :-1]
        keep.append(left)
    assert all((b & ~a).sum() == 0 for a, b in itertools.pairwise(keep)), "a token came back"
    assert int(keep[-1].sum()) < sum(LENGTHS) - 6
    close(y, by_masking(tokred.remove(model), inputs, keep), case)


def test_spatten_accumulates_what_the_whole_attention_gives():
    model, inputs = build(), batch()
    tokred.apply(model, "spatten", first=3, keep=0.5)
    model(**inputs)
    found = states(model)[2].rows[RECEIVED]
    plain = tokred.remove(model)
    plain.set_attn_implementation("eager")
    weights = plain(**inputs, output_attentions=True).attentions[:3]
    real = inputs["attention_mask"].float()
    expected = sum((w * real[:, None, :, None]).sum((1, 2)) for w in weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- heads for tokens


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForMaskedLM", "ForQuestionAnswering"])
def test_heads_for_tokens_get_full_length(head):
    model = getattr(transformers, "Bert" + head)(transformers.BertConfig(**{**SMALL, "num_labels": 2})).eval()
    tokred.apply(model, "tome", r=3)
    out = model(**batch())
    assert out[0].shape[:2] == (3, LENGTHS[0])
    for i in range(3):
        single = model(**alone(i))
        for a, b in zip(out.to_tuple(), single.to_tuple(), strict=True):
            close(b[0], a[i, : LENGTHS[i]], (head, i))
    with pytest.raises(ValueError, match="reads tokens by their position"):
        tokred.apply(model, "tome", r=3, expose="none")


def test_a_dropped_token_keeps_its_last_features():
    model = transformers.BertModel(transformers.BertConfig(**SMALL)).eval()
    inputs = batch()
    before = model(**inputs, output_hidden_states=True).hidden_states
    tokred.apply(model, "random_prune", r=[0, 4, 0, 0])
    out = model(**inputs)
    assert out.last_hidden_state.shape == (3, LENGTHS[0], 48)
    state = states(model)[1]
    kept = state.representative[0][state.mask[0]]
    gone = [i for i in range(LENGTHS[0]) if i not in kept.tolist()]
    assert len(gone) == 4
    torch.testing.assert_close(out.last_hidden_state[0, gone], before[2][0, gone], rtol=1e-5, atol=1e-5)


def test_mean_pooling_outside_works_as_before():
    """What libraries of sentence embeddings do with the last hidden states and the mask."""
    model = transformers.BertModel(transformers.BertConfig(**SMALL)).eval()
    tokred.apply(model, "tome", r=2)
    inputs = batch()
    h, m = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    pooled = (h * m).sum(1) / m.sum(1)
    for i in range(3):
        close(model(**alone(i)).last_hidden_state.mean(1)[0], pooled[i], i)


def test_modernbert_mean_pooling_gets_full_length():
    config = transformers.ModernBertConfig(**MODERN, classifier_pooling="mean")
    model = transformers.ModernBertForSequenceClassification(config).eval()
    tokred.apply(model, "tome", r=3)
    z = model(**batch()).logits
    for i in range(3):
        close(model(**alone(i)).logits[0], z[i], i)


# ---------------------------------------------------------------- PiToMe's text form


def test_pitome_with_its_settings_for_text():
    """Its own margin, pairing and energy, in the first three layers alone."""
    model = tokred.apply(build(), tokred.PiToMe.preset("bert", 0.8))
    z = model(**batch()).logits
    counts = [layer.tokens_out for layer in tokred.report(model).layers]
    assert LENGTHS[0] > counts[0] > counts[1] > counts[2] == counts[3]
    for i in range(3):
        close(model(**alone(i)).logits[0], z[i], i)


# ---------------------------------------------------------------- reports, copies, training, refusals


def test_report_and_flops():
    model = tokred.apply(build(), "spatten", first=1, keep=0.25)
    model(input_ids=batch()["input_ids"])
    counts = [layer.tokens_out for layer in tokred.report(model).layers]
    found = tokred.flops(tokred.remove(model), "spatten", (LENGTHS[0],), first=1, keep=0.25)
    assert counts == [20, 15, 10, 5]
    assert all(a <= b for a, b in zip(counts, found.tokens, strict=True))
    assert found.macs < tokred.flops(model, None, (LENGTHS[0],)).macs


def test_copies_and_pickles():
    model = tokred.apply(build(), "spatten", **METHODS["spatten-heads"])
    y = model(**batch()).logits
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(**batch()).logits, y)
        assert not torch.equal(tokred.remove(clone)(**batch()).logits, y)


def test_a_training_step():
    model = tokred.apply(build().train(), "ltp", thresholds=[0.0, 0.04, 0.06, 0.09])
    with torch.enable_grad():
        loss = model(**batch(), labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["spatten", "zero_tprune", "skipvit"])
def test_a_sample_of_padding_alone_leaves_the_others_as_they_are(name):
    model, inputs = build(), batch()
    inputs["attention_mask"][1] = 0
    tokred.apply(model, name.split("-")[0], **METHODS.get(name, {}))
    found, alone = model(**inputs).logits, model(**{k: v[[0, 2]] for k, v in inputs.items()}).logits
    assert found.isfinite().all()
    torch.testing.assert_close(found[[0, 2]], alone)


def test_masks_that_hide_pairs_and_padding_on_the_left_are_refused():
    model = tokred.apply(build(), "tome", r=3)
    inputs = batch()
    left = {k: v.flip(1) for k, v in inputs.items()}
    with pytest.raises(tokred.UnsupportedModelError, match="padded on the left"):
        model(**left)
    pairs = torch.ones(3, 1, 20, 20, dtype=torch.bool).tril()
    with pytest.raises(tokred.UnsupportedModelError, match="hides pairs of tokens"):
        model(inputs["input_ids"], attention_mask=pairs)


@pytest.mark.parametrize(("kind", "method"), [("bert", "tome"), ("bert", "ats"), ("modernbert", "kth")])
def test_a_sample_that_is_all_padding_says_nothing_of_the_others(kind, method):
    """A row that fills a batch up was taken for one that is padded on the left."""
    model, inputs = tokred.apply(build(kind), method, **METHODS[method]), batch()
    filled = {k: torch.cat([v[:1], torch.zeros_like(v[:1]), v[1:]]) for k, v in inputs.items()}
    found = model(**filled).logits
    assert found.isfinite().all()
    torch.testing.assert_close(found[[0, 2, 3]], model(**inputs).logits)


def test_refusals():
    model = build()
    model.set_attn_implementation("eager")
    with pytest.raises(tokred.UnsupportedModelError, match="set_attn_implementation"):
        tokred.apply(model, "tome", r=3)
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, is_decoder=True))
    with pytest.raises(tokred.UnsupportedModelError):
        tokred.apply(decoder, "tome", r=3)
    albert = transformers.AlbertModel(transformers.AlbertConfig(**{**SMALL, "embedding_size": 24}))
    with pytest.raises(tokred.UnsupportedModelError, match="one module that runs several times"):
        tokred.apply(albert, "tome", r=3)
    with pytest.raises(tokred.MissingInputError, match="grid"):
        tokred.apply(build(), "downsample", keep=0.5)

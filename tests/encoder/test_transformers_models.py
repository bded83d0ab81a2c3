"""transformers: what surrounds the encoder: text towers, hidden states, generation, training; and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

import tokred
from tests.encoder.tiny_transformers import FAMILIES, TEXT, build, read


@pytest.mark.parametrize(
    ("family", "tower"), [("CLIP", "text_model"), ("SigLIP", "text_model"), ("Whisper", "model.decoder")]
)
def test_only_the_encoder_is_touched(family, tower):
    model = build(family)
    inputs = FAMILIES[family].inputs(2)
    other = model.get_submodule(tower)
    before = [(type(m), len(m._forward_hooks), sorted(m.__dict__)) for m in other.modules()]
    with torch.no_grad():
        y = model(**inputs)
        tokred.apply(model, "tome", r=4)
        assert [(type(m), len(m._forward_hooks), sorted(m.__dict__)) for m in other.modules()] == before
        if family != "Whisper":
            assert torch.equal(model(**inputs).text_embeds, y.text_embeds)


def test_hidden_states_are_short_unless_exposed():
    model = build("DINOv2")
    inputs = FAMILIES["DINOv2"].inputs(2)
    with torch.no_grad():
        tokred.apply(model, "tome", r=4)
        short = model(**inputs, output_hidden_states=True)
        assert [h.shape[1] for h in short.hidden_states] == [26, 22, 18, 14]
        tokred.apply(model, "tome", r=4, expose="all")
        full = model(**inputs, output_hidden_states=True)
        assert [h.shape[1] for h in full.hidden_states] == [26] * 4
        torch.testing.assert_close(full.pooler_output, short.pooler_output)
        index = tokred.trace(model).index
    for b in range(2):
        for slot in index[b].unique():
            rows = full.hidden_states[-1][b][index[b] == slot]
            assert torch.equal(rows, rows[:1].expand_as(rows)), "a group is not piecewise constant"


@pytest.mark.parametrize("family", ["DPT", "DINOv2 backbone", "BEiT masked", "YOLOS (mid positions)", "ViT-MAE"])
def test_what_reads_positions_cannot_be_given_fewer(family):
    model = build(family)
    tokred.apply(model, "tome", r=2)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="reads tokens by their position"):
        tokred.apply(model, "tome", r=4, expose="none")
    assert [type(m) for m in model.modules()] == classes, "the patch before is gone"


def test_whisper_generates_from_the_shortened_memory():
    model = build("Whisper")
    sounds = FAMILIES["Whisper"].inputs(2)["input_features"]
    options = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        plain = model.generate(sounds, **options)
        tokred.apply(model, "tome", r=0)
        assert torch.equal(model.generate(sounds, **options), plain)
        tokred.apply(model, "tome", r=5)
        assert model.model.encoder(sounds).last_hidden_state.shape[1] == 15
        assert model.generate(sounds, **options).shape[0] == 2
        # Greedy decoding equals forwards of the whole prefix on the same short memory.
        out = model.generate(sounds, **options, return_dict_in_generate=True, output_logits=True)
        start = out.sequences[:, : -len(out.logits)]
        again = model(input_features=sounds, decoder_input_ids=start).logits[:, -1]
    torch.testing.assert_close(out.logits[0], again, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["ViT classifier", "DINOv3", "SigLIP classifier", "TimeSformer"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_without_checkpointing(family, reentrant):
    model = build(family).train()
    inputs = FAMILIES[family].inputs(2)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    if hasattr(model.config, "pos_embed_rescale"):
        model.config.pos_embed_rescale = None
    tokred.apply(model, "tome", r=4)

    def gradients():
        model.zero_grad()
        read(family, model(**inputs))[0].square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:
        inputs["pixel_values"].requires_grad_()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_compiled_model_gives_the_same():
    model = build("ViT classifier")
    pixels = FAMILIES["ViT classifier"].inputs(2)["pixel_values"]
    tokred.apply(model, "tome", r=4)
    with torch.no_grad():
        y = model(pixels).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(pixels).logits, y, rtol=1e-5, atol=1e-6)


def test_padding_is_refused_when_it_comes():
    model = build("SigLIP 2 classifier")
    inputs = FAMILIES["SigLIP 2 classifier"].inputs(2)
    inputs["pixel_attention_mask"][1, 20:] = 0
    with torch.no_grad():
        y = model(**inputs).logits
        tokred.apply(model, "tome", r=4)
        with pytest.raises(tokred.UnsupportedModelError, match="padded tokens"):
            model(**inputs)
        tokred.apply(model, "tome", r=0)
        assert torch.equal(model(**inputs).logits, y)


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_attention_that_takes_no_sizes_is_refused(attention):
    model = build("ViT classifier")
    model.set_attn_implementation(attention)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(tokred.UnsupportedModelError, match=r"set_attn_implementation\('sdpa'\)"):
        tokred.apply(model, "tome", r=4)
    assert [type(m) for m in model.modules()] == classes


def test_attention_switched_afterwards_raises_at_the_forward():
    model = build("ViT classifier")
    tokred.apply(model, "tome", r=4)
    model.set_attn_implementation("eager")
    with torch.no_grad(), pytest.raises(tokred.UnsupportedModelError, match="scaled_dot_product_attention"):
        model(**FAMILIES["ViT classifier"].inputs(1))


def test_layer_drop_is_refused():
    model = build("Whisper")
    model.model.encoder.layerdrop = 0.1
    with pytest.raises(tokred.UnsupportedModelError, match="layerdrop"):
        tokred.apply(model, "tome", r=4)


def test_language_models_whose_tower_is_not_known_are_refused_as_a_whole():
    """The encoder inside would be patched happily, and the language model would count its tokens wrong."""
    with torch.device("meta"):
        model = transformers.MllamaModel(transformers.MllamaConfig())
    before = copy.deepcopy([type(m) for m in model.modules()])
    for holder in (model, nn.Sequential(model)):
        with pytest.raises(tokred.UnsupportedModelError, match="counts and places the tokens"):
            tokred.apply(holder, "tome", r=4)
    assert [type(m) for m in model.modules()] == before
    blocks = [row for row in tokred.supports(model) if tokred.make(row.method).stage == "block"]
    assert blocks
    assert not any(row.works for row in blocks)


def test_text_models_that_are_not_known_are_refused():
    model = transformers.FNetModel(transformers.FNetConfig(hidden_size=48, num_hidden_layers=1, vocab_size=60))
    with pytest.raises(tokred.UnsupportedModelError, match="not among the encoders"):
        tokred.apply(model, "tome", r=4)


def test_an_encoder_beside_a_text_model_is_found():
    encoder = build("ViT classifier")
    both = nn.ModuleDict({"text": transformers.BertModel(transformers.BertConfig(**TEXT)), "image": encoder})
    tokred.apply(both, "tome", r=4)
    with torch.no_grad():
        encoder(**FAMILIES["ViT classifier"].inputs(1))
    assert tokred.report(both).layers[-1].tokens_out == 14
    both["second"] = build("CLIP vision")
    tokred.remove(both)
    with pytest.raises(tokred.UnsupportedModelError, match=r"several models.*'image', 'second'"):
        tokred.apply(both, "tome", r=4)


def test_timm_models_inside_transformers_are_found():
    timm = pytest.importorskip("timm")
    config = transformers.TimmWrapperConfig(architecture="test_vit")
    model = transformers.TimmWrapperForImageClassification(config).eval()
    assert timm.is_model("test_vit")
    tokred.apply(model, "tome", r=4)
    with torch.no_grad():
        model(pixel_values=torch.randn(1, 3, 160, 160))
    assert tokred.report(model).family == "timm VisionTransformer"
    assert tokred.report(model).layers[0].tokens_out < tokred.report(model).layers[0].tokens_in

"""Models by name: every kind is loaded in the right class, with what it needs, or as its shape alone."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from tests.bench import saved
from tokred import api
from tokred.bench import sources

KINDS = {
    "llama": ("language model", "snapkv"),
    "bert": ("text encoder", "tome"),
    "vit": ("encoder", "tome"),
    "clip": ("dual encoder", "tome"),
    "llava": ("vision-language model", "divprune"),
    "whisper": ("speech", "pitome"),
    "ast": ("audio encoder", "pitome"),
    "videomae": ("video encoder", "tome"),
    "unet": ("denoiser", "tomesd"),
    "pipeline": ("denoiser", "tomesd"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: getattr(saved, name)(root / name) for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_is_recognised_and_its_methods_are_known_without_weights(folders, name):
    kind, method = KINDS[name]
    source = sources.skeleton(str(folders[name]))
    assert source.kind == kind
    assert all(p.is_meta for p in source.module.parameters()), "no weights are read"
    runs = {row.method for row in api.supports(source.module) if row.works}
    assert method in runs
    assert runs & set(source.usual.methods), "a method that is usual for the kind runs"


def test_a_llama_under_both_of_its_names(folders):
    """It was loaded without its head, as a model in which no cache was found."""
    for spec in (str(folders["llama"]), f"hf:{folders['llama']}"):
        source = sources.model(spec)
        assert type(source.model).__name__ == "LlamaForCausalLM"
        assert source.tokenizer("a red fox")["input_ids"]
        assert source.name == spec


@pytest.mark.parametrize("name", ["llava", "whisper", "clip", "vit", "ast"])
def test_processors_come_along(folders, name):
    source = sources.model(f"hf:{folders[name]}")
    assert source.processor is not None
    assert (source.tokenizer is None) == (name in ("vit", "ast"))
    assert (source.images is not None) == (name in ("vit", "clip"))


def test_a_pipeline_is_loaded_whole(folders):
    source = sources.model(str(folders["pipeline"]))
    assert source.kind == "pipeline"
    assert type(source.model).__name__ == "DDIMPipeline"
    assert type(source.module).__name__ == "UNet2DModel"
    assert sources.model(f"diffusers:{folders['unet']}").kind == "denoiser"


def test_timm_feeds_as_its_own_validation_does():
    import timm

    source = sources.model("test_vit", sources.Options(random_weights=True))
    config = timm.data.resolve_data_config({}, model=source.model)
    assert source.images.size == config["input_size"][1:]
    assert str(source.images.transform) == str(timm.data.create_transform(**config, is_training=False))


def test_a_fine_tuned_checkpoint_says_how_many_classes_it_has(tmp_path):
    import timm

    torch.manual_seed(0)
    tuned = timm.create_model("test_vit", num_classes=3)
    torch.save(tuned.state_dict(), tmp_path / "mine.pth")
    source = sources.model("test_vit", sources.Options(checkpoint=tmp_path / "mine.pth"))
    assert source.classes == 3
    assert torch.equal(source.model.head.weight, tuned.head.weight)
    with pytest.raises(ValueError, match="does not fit 'test_vit'"):
        sources.model("test_vit", sources.Options(checkpoint=tmp_path / "mine.pth", classes=5))
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        sources.model("test_vit", sources.Options(checkpoint=tmp_path / "broken.pth"))


def test_a_folder_of_timm(tmp_path):
    import timm

    made = timm.create_model("test_vit", num_classes=4)
    config = {"architecture": "test_vit", "num_classes": 4, "pretrained_cfg": {**made.pretrained_cfg, "num_classes": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(made.state_dict(), tmp_path / "pytorch_model.bin")
    source = sources.model(str(tmp_path))
    assert source.library == "timm"
    assert source.classes == 4


def test_open_clip_by_architecture():
    pytest.importorskip("open_clip")
    source = sources.skeleton("open_clip:ViT-B-32")
    assert source.kind == "dual encoder"
    assert source.images.size == (224, 224)
    with pytest.raises(sources.NoModelError, match="name their tag"):
        sources.model("open_clip:ViT-B-32")
    with pytest.raises(sources.NoModelError, match="ViT-B-33"):
        sources.skeleton("open_clip:ViT-B-33")


MINE = """
import timm, torch

def model():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=2)

def both():
    return model(), lambda picture: torch.zeros(3, 160, 160)

def number():
    return 3

def wants(x):
    return x

def fails():
    raise RuntimeError("no such luck")

def batches():
    for seed in range(2):
        yield torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(seed)), torch.tensor([0, 1])

def score(output, batch):
    return output[:, 0]
"""


def test_models_that_a_function_makes(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    source = sources.model(f"{file}:model")
    assert (source.kind, source.classes, source.images.size) == ("encoder", 2, (160, 160))
    assert sources.model(f"{file}:both").images.transform(None).shape == (3, 160, 160)
    monkeypatch.chdir(tmp_path)
    assert sources.model("mine:model").kind == "encoder"
    for name, words in {
        "number": "returns int",
        "wants": "callable without arguments",
        "fails": "RuntimeError: no such luck",
        "nothing": "has no 'nothing'; it has",
    }.items():
        with pytest.raises(sources.NoModelError, match=words):
            sources.model(f"{file}:{name}")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("deit_smal", "did you mean 'deit_small"),
        ("no/such", "hf:no/such"),
        ("sd15", "has no weights"),
        ("timm:nothing", "no model 'nothing'"),
    ],
)
def test_names_that_are_none(spec, words):
    with pytest.raises(sources.NoModelError, match=words):
        sources.model(spec)


def test_folders_that_hold_no_model(tmp_path, folders):
    with pytest.raises(sources.NoModelError, match=r"model_index\.json"):
        sources.model(str(tmp_path))
    (tmp_path / "config.json").write_text("{not JSON")
    with pytest.raises(sources.NoModelError, match="is not JSON"):
        sources.model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["MyOwnLlama"]}))
    with pytest.raises(sources.NoModelError, match="MyOwnLlama, which transformers does not have"):
        sources.model(str(tmp_path))
    with pytest.raises(sources.NoModelError, match="it is a pipeline: diffusers:"):
        sources.model(f"hf:{folders['pipeline']}")


def test_a_configuration_without_architectures_gets_the_fullest_class():
    import transformers as t

    from tokred.bench.sources import hf

    config = t.LlamaConfig()
    assert hf.class_of(config, "x").__name__ == "LlamaForCausalLM"
    assert hf.class_of(t.WhisperConfig(), "x").__name__ == "WhisperForConditionalGeneration"
    assert hf.class_of(t.LlavaConfig(), "x").__name__ == "LlavaForConditionalGeneration"
    assert hf.class_of(t.Dinov2Config(), "x").__name__ == "Dinov2ForImageClassification"


def test_weights_or_configurations_that_are_out_of_reach(monkeypatch):
    import transformers as t

    def fail(*arguments, **options):
        raise OSError("no network\nat all")

    monkeypatch.setattr(t.AutoConfig, "from_pretrained", fail)
    with pytest.raises(sources.NoModelError, match=r"configuration of 'hf:some/llama' cannot be had \(no network\)"):
        sources.skeleton("hf:some/llama")

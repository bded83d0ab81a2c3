"""Data by name: images, texts, questions, recordings, prompts, tables, and functions of the user's own."""

from __future__ import annotations

import csv
import json

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")

from tests.bench import saved
from tests.bench.test_models import MINE
from tokred.bench import sources
from tokred.bench.sources import pictures, sounds, tables


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def vit():
    return sources.model("test_vit", sources.Options(random_weights=True))


@pytest.fixture(scope="module")
def llama(root):
    return sources.model(str(saved.llama(root / "llama")))


def test_images_are_read_when_they_are_asked_for(root):
    source = sources.model(str(saved.vit(root / "vit")))
    folder = saved.pictures(root / "pictures")
    found = sources.data(source, str(folder), sources.Wanted(batch=3))
    assert (found.metric, found.run, found.labelled) == ("top1", "forward", True)
    batches = list(found.batches)
    assert [len(b["labels"]) for b in batches] == [3, 3, 2]
    assert batches[0]["pixel_values"].shape == (3, 3, 32, 32)
    assert torch.cat([b["labels"] for b in batches]).tolist() == [0] * 4 + [1] * 4
    again = list(found.batches)
    assert torch.equal(again[0]["pixel_values"], batches[0]["pixel_values"])
    (folder / "red" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        list(sources.data(source, str(folder)).batches)
    (folder / "red" / "broken.png").unlink()


def test_workers_read_the_same_images(root, vit):
    flat = saved.pictures(root / "flat") / "red"
    alone = sources.data(vit, str(flat), sources.Wanted(batch=2))
    assert (alone.metric, alone.labelled) == ("agreement", False)
    helped = sources.data(vit, str(flat), sources.Wanted(batch=2, workers=1))
    assert all(torch.equal(a, b) for a, b in zip(alone.batches, helped.batches, strict=True))


def test_a_part_of_the_images_is_the_same_for_the_same_seed(root, vit):
    flat = saved.pictures(root / "part", 8) / "red"
    parts = [torch.cat(list(sources.data(vit, str(flat), sources.Wanted(count=3, seed=s)).batches)) for s in (0, 0, 1)]
    assert torch.equal(parts[0], parts[1])
    assert not torch.equal(parts[0], parts[2])


@pytest.mark.parametrize("name", ["photos", "fashion", "textile", "noise", "embedded"])
def test_a_folder_by_the_name_of_data_that_come_along(root, vit, name, monkeypatch):
    here = root / f"beside {name}"
    saved.pictures(here / name)
    monkeypatch.chdir(here)
    with pytest.raises(ValueError, match=f"--data {name} is both a folder here and data .*: write ./{name} for"):
        sources.data(vit, name)
    assert len(torch.cat([batch[0] for batch in sources.data(vit, f"./{name}/red").batches])) > 0
    assert sources.data(vit).name == "noise", "what is not asked for by name is no folder"
    if name in pictures.ZOO:
        monkeypatch.setattr(pictures, "has_zoo", lambda: False)
        assert sources.data(vit, name, sources.Wanted(batch=2)).name == name


def test_classes_that_do_not_fit_the_head_get_a_probe(root, vit):
    pytest.importorskip("sklearn")
    found = sources.data(vit, str(saved.pictures(root / "probed")), sources.Wanted(batch=4))
    assert "linear probe (the classes" in found.notes[0]
    batch = next(iter(found.batches))
    with torch.inference_mode():
        answers = found.model(**{k: v for k, v in batch.items() if k != "labels"}).argmax(1)
    assert torch.equal(answers, batch["labels"]), "dark and bright are told apart"


def test_zero_shot_by_the_names_of_the_folders(root):
    source = sources.model(str(saved.clip(root / "clip")))
    found = sources.data(source, str(saved.pictures(root / "zero")))
    assert found.metric == "top1"
    assert "zero-shot" in found.notes[0]
    x, labels = next(iter(found.batches))
    with torch.inference_mode():
        assert found.model(x).shape == (8, 2)
        assert torch.allclose(found.model.texts.norm(dim=-1), torch.ones(2))
    assert labels.tolist() == [0] * 4 + [1] * 4
    flat = sources.data(source, "noise")
    assert flat.metric == "cosine"
    with torch.inference_mode():
        assert flat.model(next(iter(flat.batches))).shape == (16, 16)


def test_no_data_for_a_model_that_brings_none(vit, llama):
    plain = sources.Source("mine", vit.model, "encoder", "timm", vit.images)
    with pytest.raises(ValueError, match="give --data with a folder of images"):
        sources.data(plain)
    with pytest.raises(ValueError, match="give --data with a text file"):
        sources.data(llama)
    with pytest.raises(FileNotFoundError, match="neither a text file"):
        sources.data(llama, "no.such.file")
    assert sources.data(vit).name == "noise", "random weights are for speed"


def test_windows_of_a_text(root, llama):
    found = sources.data(llama, str(saved.book(root / "book.txt")), sources.Wanted(length=128, batch=2))
    assert (found.metric, found.run) == ("perplexity", "text")
    assert [b["input_ids"].shape for b in found.batches] == [(2, 128), (2, 128)]
    ids = llama.tokenizer((root / "book.txt").read_text(), add_special_tokens=False)["input_ids"]
    assert next(iter(found.batches))["input_ids"][0].tolist() == ids[:128]
    assert "tell little" in found.notes[0]
    (root / "short.txt").write_text("a red fox")
    with pytest.raises(ValueError, match="no text of 64 tokens"):
        sources.data(llama, str(root / "short.txt"))
    bare = sources.Source("bare", llama.model, "language model", "transformers")
    with pytest.raises(ValueError, match="without a tokenizer"):
        sources.data(bare, str(root / "book.txt"))


def test_texts_of_tables_and_folders(root, llama):
    text = (saved.book(root / "again.txt", 200)).read_text()
    (root / "lines.jsonl").write_text("\n".join(json.dumps({"text": text}) for _ in range(3)))
    found = sources.data(llama, str(root / "lines.jsonl"), sources.Wanted(length=64))
    assert len(found.batches) == 9
    (root / "folder").mkdir()
    (root / "folder" / "one.txt").write_text(text)
    assert len(sources.data(llama, str(root / "folder"), sources.Wanted(length=64)).batches) == 3
    (root / "wrong.jsonl").write_text(json.dumps({"body": text}))
    with pytest.raises(ValueError, match="no column for the text"):
        sources.data(llama, str(root / "wrong.jsonl"))


def test_lines_for_text_encoders(root):
    source = sources.model(str(saved.bert(root / "bert")))
    (root / "some.txt").write_text("a red fox\nthe dog sits on grass and then runs\n\n")
    found = sources.data(source, str(root / "some.txt"))
    (batch,) = found.batches
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).tolist()[0] < batch["attention_mask"].sum(1).tolist()[1]


def test_tables(tmp_path):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    assert [r["text"] for r in tables.rows(str(tmp_path / "list.json")).rows] == ["a", "b"]
    assert tables.rows(str(tmp_path / "rows.csv")).columns == ("text", "label")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\nno json')
    with pytest.raises(ValueError, match=r"bad\.jsonl cannot be read"):
        tables.rows(str(tmp_path / "bad.jsonl"))
    (tmp_path / "empty.csv").write_text("text\n")
    with pytest.raises(ValueError, match="holds no row"):
        tables.rows(str(tmp_path / "empty.csv"))
    with pytest.raises(FileNotFoundError):
        tables.rows(str(tmp_path / "nowhere.csv"))


def test_tables_of_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    made.to_parquet(str(tmp_path / "rows.parquet"))
    assert [r["text"] for r in tables.rows(str(tmp_path / "rows.parquet")).rows] == ["a", "b", "c"]
    found = tables.rows(f"hfds:{tmp_path / 'rows.parquet'}:train")
    assert len(found.rows) == 3
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        tables.rows(f"hfds:{tmp_path / 'rows.parquet'}:test")
    folder = saved.pictures(tmp_path / "pictures", 2)
    vit = sources.model("test_vit", sources.Options(random_weights=True, classes=2))
    given = sources.data(vit, f"hfds:{folder}", sources.Wanted(batch=4))
    assert given.metric == "top1"
    (batch,) = given.batches
    assert batch[0].shape == (4, 3, 160, 160)
    assert batch[1].tolist() == [0, 0, 1, 1]


def test_questions_about_pictures(root):
    source = sources.model(str(saved.llava(root / "llava")))
    found = sources.data(source, str(saved.questions(root / "vqa")))
    assert (found.metric, found.run) == ("contains", "generate")
    first, second = found.batches
    assert first["answers"] == [["red"]]
    assert (first["input_ids"] == 98).sum() == 16, "a place for each visual token"
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    with pytest.raises(ValueError, match=r"questions are read from \.jsonl"):
        sources.data(source, str(root))
    (root / "vqa" / "lost.jsonl").write_text(json.dumps({"image": "gone.png", "question": "what"}))
    with pytest.raises(ValueError, match=r"gone\.png cannot be read"):
        sources.data(source, str(root / "vqa" / "lost.jsonl"))


def test_clips_are_folders_of_frames(root):
    source = sources.model(str(saved.videomae(root / "videomae")))
    folder = saved.pictures(root / "clips", 7)
    found = sources.data(source, str(folder), sources.Wanted(batch=2))
    (batch,) = found.batches
    assert batch["pixel_values"].shape == (2, 4, 3, 32, 32)
    levels = batch["pixel_values"].mean((2, 3, 4))
    assert bool((levels.diff(dim=1) > 0).all()), "frames stand in the order of their names"
    with torch.inference_mode():
        assert source.model(**batch).logits.shape == (2, 3)
    with pytest.raises(FileNotFoundError, match="holds no clip"):
        sources.data(source, str(saved.recordings(root / "no-clips")))
    with pytest.raises(ValueError, match="give --data with a folder with a folder of frames"):
        sources.data(source)


def test_recordings(root):
    source = sources.model(str(saved.whisper(root / "whisper")))
    found = sources.data(source, str(saved.recordings(root / "recordings")))
    assert (found.metric, found.run) == ("wer", "generate")
    batches = list(found.batches)
    assert [b["answers"] for b in batches] == [["one two"], ["three"]]
    assert batches[0]["input_features"].shape == (1, 80, 200)
    bare = sources.data(source, str(saved.recordings(root / "bare", transcripts=False)))
    assert (bare.metric, bare.labelled) == ("overlap", False)
    with pytest.raises(FileNotFoundError, match="holds no recording"):
        sources.data(source, str(saved.pictures(root / "silent")))


def test_a_tone_keeps_its_frequency(tmp_path):
    for rate, channels in ((8000, 1), (22050, 2), (16000, 1)):
        x = sounds.waveform(saved.sound(tmp_path / f"{rate}.wav", rate, 1.0, channels), 16000)
        assert x.shape == (16000,)
        assert int(torch.fft.rfft(x).abs().argmax()) == 440
        assert 0.5 < float(x.abs().max()) < 0.75
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"broken\.wav cannot be read as sound"):
        sounds.waveform(tmp_path / "broken.wav", 16000)


def test_prompts(root):
    pytest.importorskip("diffusers")
    source = sources.model(str(saved.pipeline(root / "pipeline")))
    found = sources.data(source, None, sources.Wanted(count=3, batch=2, steps=4))
    assert (found.metric, found.run) == ("psnr", "pipeline")
    assert list(found.batches) == [
        {"batch_size": 2, "num_inference_steps": 4, "seeds": [0, 1]},
        {"batch_size": 1, "num_inference_steps": 4, "seeds": [2]},
    ]
    with pytest.raises(ValueError, match="takes no prompt"):
        sources.data(source, None, sources.Wanted(prompts=("a red fox",)))

    class Painter:
        def __call__(self, prompt: str, height: int = 8, width: int = 8) -> None: ...

    painter = sources.Source("painter", Painter(), "pipeline", "diffusers")
    (root / "prompts.txt").write_text("a red fox\n\na blue dog\n")
    wanted = sources.Wanted(prompts=("snow",), size=16)
    batches = list(sources.data(painter, str(root / "prompts.txt"), wanted).batches)
    assert [b["prompt"] for b in batches] == [["snow"], ["a red fox"], ["a blue dog"]]
    assert batches[0]["height"] == batches[0]["width"] == 16
    assert sources.data(painter).notes
    with pytest.raises(FileNotFoundError, match="no file of prompts"):
        sources.data(painter, "a red fox")


def test_noise_for_a_denoiser(root):
    pytest.importorskip("diffusers")
    source = sources.model(str(saved.unet(root / "unet")))
    found = sources.data(source, None, sources.Wanted(count=3))
    batches = list(found.batches)
    assert [int(b["timestep"]) for b in batches] == [1, 500, 999]
    with torch.inference_mode():
        assert source.model(**batches[0])[0].shape == batches[0]["sample"].shape
    with pytest.raises(ValueError, match="a denoiser alone is fed noise"):
        sources.data(source, "prompts.txt")


def test_batches_of_the_users_own(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    source = sources.model(f"{tmp_path / 'mine.py'}:model")
    found = sources.data(source, f"{tmp_path / 'mine.py'}:batches")
    assert found.metric == "top1"
    assert len(list(found.batches)) == len(list(found.batches)) == 2, "a generator is called anew"
    with pytest.raises(ValueError, match="has to return an iterable of batches"):
        sources.data(source, f"{tmp_path / 'mine.py'}:number")


def test_amounts_of_methods_that_are_named_alone(vit, llama):
    from tokred.bench.sources import amounts

    found, left = amounts.chosen(vit, [["tome"], ["evit kappa=0.7"], ["tome r=8", "pitome ratio=0.9"]], (0.8, 0.6))
    assert [len(parts) for parts in found] == [1, 1, 1, 2]
    assert all(parts[0].startswith("tome r=") for parts in found[:2])
    assert not left
    found, left = amounts.chosen(llama, [], (0.5,))
    assert ["snapkv budget=0.5"] in found
    swin = sources.skeleton("swin_tiny_patch4_window7_224")
    with pytest.raises(ValueError, match="windows"):
        amounts.chosen(swin, [], (0.5,))

"""``tokred.benchmark`` beyond single forwards: answers, pipelines, transcripts; and the rule that chooses a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import tokred
from tokred.bench import feeds
from tokred.bench.feeds.generate import Generate
from tokred.bench.feeds.pipeline import Pipeline, pictures
from tokred.bench.feeds.reader import Reader
from tokred.bench.outputs import Generated
from tokred.bench.table import Benchmark

kv = pytest.importorskip("tokred.adapters.tiny.kv")
vlm = pytest.importorskip("tokred.adapters.tiny.vlm")


def quick(model, methods, data, metric=None, **options):
    """A benchmark with few rounds and no progress."""
    given = {"rounds": 1, "progress": False, "baselines": False, **options}
    return tokred.benchmark(model, methods, data, metric, **given)


def named(found: Benchmark) -> dict[str, dict]:
    return {f"{row['method']} {row['setting']}".strip(): row for row in found.rows}


def parts(row: dict) -> dict[str, float]:
    """Seconds of the run's parts."""
    return {k.removesuffix("_seconds"): v for k, v in row.items() if k.endswith("_seconds") and v is not None}


class Words:
    """A tokenizer of numbers: ``"5 7"`` is ``[5, 7]``."""

    padding_side, pad_token, eos_token = "right", None, "2"

    def __call__(self, texts, padding=False, return_tensors=None):
        rows = [[int(word) for word in text.split()] for text in texts]
        longest = max(map(len, rows))
        assert padding or len(rows) == 1
        assert self.padding_side == "left"
        ids = [[0] * (longest - len(row)) + row for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(ids).ne(0).long()}

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(str(token) for token in row if token > 2) + " " for row in rows]


# ------------------------------------------------------------------------------------------- answers


def test_answers_of_a_language_model():
    """The answers are those of ``generate``; a method and the unpatched model are compared on them."""
    model, data = kv.build("llama"), [{"input_ids": kv.prompt(30, 2, seed=s)} for s in range(2)]
    seen = []

    def metric(output, batch):
        seen.append((output, batch))
        return torch.tensor([float(len(text.split())) for text in output.texts])

    found = quick(model, ["snapkv budget=0.4 window=4"], data, metric, max_new_tokens=5, tokenizer=Words())
    assert found.run == "generate"
    output, batch = seen[0]
    assert isinstance(output, Generated)
    with torch.inference_mode():
        ids = model.generate(**batch, do_sample=False, max_new_tokens=5)[:, 30:]
    assert torch.equal(output.ids, ids)
    assert output.texts == tuple(text.strip() for text in Words().batch_decode(ids.tolist(), True))
    base, row = found.rows
    assert base["generated"] == row["generated"] == 5
    assert set(parts(base)) == {"prompt", "decode", "rest"}
    assert set(parts(row)) == {"selection", "prompt", "decode", "rest"}
    assert row["bytes"] < row["dense_bytes"] == base["bytes"]
    assert not tokred.patched(model)


def test_prompts_as_texts_and_texts_as_answers():
    """Without a tokenizer they are refused; with one they are padded on the left."""
    model, tool = kv.build("llama"), Words()
    texts = [["5 6 7 8", "9 10 11"], ["12 13"]]
    row = quick(model, "knorm budget=0.5", texts, run="generate", tokenizer=tool, max_new_tokens=2).rows[1]
    assert (row["samples"], row["generated"]) == (3, 2)
    assert (tool.padding_side, tool.pad_token) == ("right", None), "the tokenizer is as it was"
    with pytest.raises(ValueError, match="have text, and no tokenizer is given"):
        quick(model, "knorm budget=0.5", [{"prompt": "5 6"}])


def test_answers_that_end():
    """End tokens count, fillers do not; a model that returns the answer alone keeps all of it."""
    config = SimpleNamespace(eos_token_id=[2, 9], pad_token_id=0)
    model = SimpleNamespace(generation_config=config, config=SimpleNamespace(is_encoder_decoder=False))
    ids = torch.tensor([[5, 5, 7, 2, 0], [5, 5, 7, 8, 9], [5, 5, 2, 0, 0], [5, 5, 7, 0, 0]])
    found = Generate().finish(model, ids, {"input_ids": torch.full((4, 2), 5)})
    assert found.lengths == (2, 3, 1, 1)
    assert found.ids.tolist() == [[7, 2, 0], [7, 8, 9], [2, 0, 0], [7, 0, 0]]
    alone = Generate().finish(model, ids[:, 2:], {"input_ids": torch.full((4, 2), 5)})
    assert torch.equal(alone.ids, found.ids)


def test_sampled_answers_are_drawn_alike():
    model = kv.build("llama")
    data = [{"input_ids": kv.prompt(20), "do_sample": True, "temperature": 5.0}]
    state = torch.get_rng_state()
    rows = quick(model, "snapkv budget=1.0", data, max_new_tokens=6).rows
    assert rows[1]["quality"] == 1, "the same draws of the same model"
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------- models with vision


def test_stages_of_a_model_with_vision_in_one_table():
    """Projector, layers, cache, tower, and two of them at once; each has a rival that leaves as much at its places."""
    model = vlm.build("llava")
    data = [vlm.prompts("llava", [["image", 6], [4, "image", 5]])]
    stack = ["divprune budget=8", "snapkv budget=0.5 window=4"]
    methods = ["divprune budget=4", "fastv layer=1 ratio=0.5", stack[1], "tome r=2", stack]
    found = quick(model, methods, data, max_new_tokens=2, baselines=True)
    rows = named(found)
    assert not any(row["reason"] for row in rows.values())
    assert found.stage == "block+cache+projector+layer"
    base, pruned = rows["unpatched"], rows["divprune budget=4"]
    assert set(parts(base)) == {"tower", "prompt", "decode", "rest"}
    assert {"tower", "selection"} < set(parts(pruned))
    assert sum(parts(base).values()) == pytest.approx(base["seconds"], rel=0.5)
    assert pruned["tokens_in"] - 12 == pruned["tokens_out"]
    assert rows["random_visual budget=0.25"]["tokens_out"] == pruned["tokens_out"]
    early = rows["fastv layer=1 ratio=0.5"]
    stack = rows["divprune+snapkv budget=8 + budget=0.5 window=4"]
    assert stack["stage"] == "cache+projector"
    for row, name in ((pruned, "random_visual"), (early, "random_visual"), (stack, "random_visual+random_evict")):
        assert any(r["method"] == name and abs(r["work"] - row["work"]) < 0.05 for r in rows.values() if r["baseline"])
    assert rows["tome r=2"]["tokens_in"] == 17, "of the tower"
    assert {"random", "random_evict", "uniform_visual", "downsample_visual", "streaming_llm", "downsample"} <= {
        row["method"] for row in rows.values() if row["baseline"]
    }


def test_the_prompt_alone_of_a_model_with_vision():
    """Its forward answers behind the prompt, where lengths do not matter."""
    model, data = vlm.build("llava"), [vlm.prompts("llava", [["image", 6]])]
    row = quick(model, "divprune budget=4", data, run="forward").rows[1]
    assert row["quality"] in (0, 1)
    assert {"tower", "selection", "prompt"} <= set(parts(row))


# ------------------------------------------------------------------------------------------- speech


def test_whisper_and_its_answers():
    tiny = pytest.importorskip("tokred.adapters.tiny.transformers")
    model = tiny.build("Whisper")
    data = [{"input_features": torch.randn(2, 8, 60, generator=torch.Generator().manual_seed(0))}]
    found = quick(model, "tome r=4", data, max_new_tokens=4)
    base, row = found.rows
    assert found.run == "generate"
    assert set(parts(base)) == {"encoder", "prompt", "decode", "rest"}
    assert set(parts(row)) == {"encoder", "selection", "prompt", "decode", "rest"}
    assert 1 <= row["generated"] <= 4
    assert row["tokens_out"] < row["tokens_in"] == 30


# ---------------------------------------------------------------------------------------- pipelines


def tiny_pipeline():
    diffusers = pytest.importorskip("diffusers")
    from tokred.adapters.tiny import diffusion

    return diffusers.DDIMPipeline(diffusion.build("unet"), diffusers.DDIMScheduler())


def test_a_pipeline_and_its_rivals():
    """Pictures of the same seeds are compared, so that a method that removes nothing has those of the model."""
    pipe = tiny_pipeline()
    data = [{"batch_size": 2, "num_inference_steps": 2}, {"batch_size": 1, "num_inference_steps": 2}]
    seen = []

    def change(output, batch):
        seen.append(output)
        return output.flatten(1).mean(1)

    found = quick(pipe, ["tomesd ratio=0.5", "tomesd ratio=0.0"], data, change, baselines=True)
    rows = named(found)
    assert found.run == "pipeline"
    assert seen[0].shape == (2, 1, 16, 16)
    assert all(float(x.min()) >= 0 and float(x.max()) <= 1 for x in seen)
    assert rows["tomesd ratio=0.0"]["difference"] == 0
    assert rows["tomesd ratio=0.5"]["difference"] != 0
    assert {row["method"] for row in rows.values() if row["baseline"]} == {"random_latent_prune", "todo"}
    assert set(parts(rows["tomesd ratio=0.5"])) == {"denoiser", "selection", "rest"}
    rival = next(row for row in rows.values() if row["method"] == "random_latent_prune")
    assert rival["work"] == pytest.approx(rows["tomesd ratio=0.5"]["work"], abs=0.02)
    assert not tokred.patched(pipe)
    assert not hasattr(pipe, "_progress_bar_config")


def test_a_denoiser_alone():
    pytest.importorskip("diffusers")
    from tokred.adapters.tiny import diffusion

    found = quick(diffusion.build("sd15"), "tomesd ratio=0.5", [diffusion.inputs("sd15")], "cosine")
    assert found.run == "forward"
    assert 0.5 < found.rows[1]["quality"] < 1
    assert 0 < found.rows[1]["work"] < 1


def test_a_callable_that_holds_modules():
    """Patched is the module that the methods know; nothing else has to be told."""
    pytest.importorskip("diffusers")
    from tokred.adapters.tiny import diffusion

    class Sampler:
        def __init__(self):
            self.unet, self.other = diffusion.build("unet").train(), nn.Linear(2, 2)

        def __call__(self, prompt):
            noise = torch.randn(len(prompt), 1, 16, 16)
            return self.unet(noise, 7).sample.sigmoid()

    made = Sampler()
    row = quick(made, "tomesd ratio=0.5", ["a", ["b", "c"]], lambda output, batch: output.mean()).rows[1]
    assert row["samples"] == 2
    assert row["difference"] != 0
    assert made.unet.training


def test_seeds_of_a_pipeline():
    """A seed a sample, the user's own where there are some; they make the first sample of a probe too."""
    feed = Pipeline(tiny_pipeline())
    assert feed.prepare("a boat", 2) == {"prompt": ["a boat"], "seeds": [2000]}
    assert feed.prepare({"prompt": ["a", "b"], "num_images_per_prompt": 2}, 0)["seeds"] == [0, 1, 2, 3]
    own = feed.prepare({"prompt": "a", "generator": torch.Generator().manual_seed(7)})
    assert own == {"prompt": "a", "seeds": [7]}
    assert feed.prepare({"prompt": ["a", "b"], "seeds": [5, 6]})["seeds"] == [5, 6]
    with pytest.raises(TypeError, match="a batch of data for a pipeline is a prompt"):
        feed.prepare(3)


def test_pictures_of_all_forms():
    image = pytest.importorskip("PIL.Image")
    raw = torch.rand(2, 3, 4, 5)
    arrays = raw.movedim(1, -1).numpy()
    small = [image.fromarray((a * 255).round().astype("uint8")) for a in arrays]
    assert torch.equal(pictures(SimpleNamespace(images=raw)), raw)
    assert torch.equal(pictures((arrays,)), raw)
    assert (pictures(SimpleNamespace(images=small)) - raw).abs().max() < 1 / 255
    clip = pictures(SimpleNamespace(frames=[small, small]))
    assert clip.shape == (2, 3, 8, 5)
    assert pictures(raw[:, None].expand(2, 6, 3, 4, 5)).shape == (2, 3, 24, 5)
    with pytest.raises(TypeError, match="reads pictures"):
        pictures("none")


# ------------------------------------------------------------------------------------- which run


def test_a_function_of_ones_own():
    from tests.encoder.tiny_timm import build

    def run(model, batch):
        return model.forward_features(batch)[:, 0]

    found = quick(build("vit"), ["tome r=4"], [torch.randn(2, 3, 40, 40)], "cosine", run=run)
    assert found.run == "own"
    assert 0 < found.rows[1]["quality"] < 1


@pytest.mark.parametrize(
    ("stages", "item", "options", "run"),
    [
        ({"cache"}, {"input_ids": 1}, {}, "text"),
        ({"cache"}, {"input_ids": 1, "answers": ["a"]}, {}, "generate"),
        ({"cache"}, {"input_ids": 1}, {"max_new_tokens": 3}, "generate"),
        ({"cache", "layer"}, {"input_ids": 1, "pixel_values": 1}, {}, "generate"),
        ({"projector"}, {"input_ids": 1, "pixel_values": 1}, {"tokenizer": 1}, "generate"),
        ({"block"}, {"input_ids": 1, "pixel_values": 1}, {}, "forward"),
        ({"projector"}, {"input_ids": 1, "pixel_values": 1}, {}, None),
    ],
)
def test_the_rule(stages, item, options, run):
    model = kv.build("llama")
    given = (model, stages, item, feeds.Options(**options))
    if run is None:
        with pytest.raises(ValueError, match=r"run='generate' .* or run='forward'"):
            feeds.fitting(*given)
    else:
        assert feeds.fitting(*given) == run


def test_runs_that_do_not_fit():
    from tests.encoder.tiny_timm import build

    image = torch.randn(1, 3, 40, 40)
    with pytest.raises(ValueError, match=r"is for models that have generate\(\), and VisionTransformer has none"):
        quick(build("vit"), "tome r=2", [image], run="generate")
    with pytest.raises(TypeError, match="a callable that holds modules"):
        quick(print, "tome r=2", [image])
    row = quick(kv.build("llama"), ["snapkv", "divprune"], [kv.prompt(20)]).rows[2]
    assert "divprune" in row["reason"] or "projector" in row["reason"]


def test_items_that_a_reader_takes():
    ids = torch.tensor([[1, 2]])
    read = Reader(main="input_features").read
    assert read(ids)["input_features"] is ids
    assert read([1, 2])["input_features"].tolist() == [[1, 2]]
    assert read((ids, ids))["labels"] is ids
    assert read((ids, ["a"]))["answers"] == ["a"]
    with pytest.raises(TypeError, match="got int"):
        read(3)

"""Caches in files: generation goes on bit for bit, other models and policies are refused, no file is half written."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import safetensors.torch
from transformers import DynamicCache

import tokred
from tests.kv.tiny import build, padded, prompt

GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
LOGITS = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
SNAP = {"budget": 9, "window": 4, "pool": 3}
# One of each kind of store, of rows without and with empty ones, and of what a policy remembers beside rows.
POLICIES: dict[str, Any] = {
    "snapkv": {"budget": 9, "window": 4, "pool": 3, "turns": True},
    "h2o": {"budget": 9},
    "adakv": {"budget": 9, "score": {"part": "window", "size": 4, "pool": 3}},
    "zeromerge": {"budget": 9, "dense": 2, "tail": 3},
    "keyformer": {"budget": 9},
    "streaming_llm": {"budget": 9, "sinks": 2, "store": "half"},
    "kivi": {"bits": 4, "group_size": 4, "residual_length": 8},
    "mikv": {"high": 0.3, "low": 2},
    "mustafar": {"window": 4},
    "oscar": {"bits": 4, "sinks": 2, "recent": 4, "block": 2},
    "turbo": {"bits": 4},
    "nsnquant": {"window": 16},
    "offloaded": {"block": 4},
    # One chunk a query: keys of several, made some now and some before, may differ in their last bits.
    "shadowkv": {"budget": 2, "rank": 8, "chunk": 2, "outliers": 1, "local": 1},
}


pytestmark = pytest.mark.usefixtures("no_grad")


def on(model, cache, ids, **more):
    """Logits of a second turn and of steps after it."""
    out = model.generate(ids, **tokred.cache_kwargs(cache), **LOGITS, **more)
    return torch.stack(out.logits), out.sequences


def after(model, ids, **more):
    """A cache after a prompt and some steps, and all tokens that it has seen."""
    cache = tokred.kv_cache(model) if tokred.patched(model) else DynamicCache(config=model.config)
    out = model.generate(ids, **tokred.cache_kwargs(cache), **GREEDY, **more)
    return cache, out


@pytest.mark.parametrize("name", POLICIES)
def test_generation_goes_on_bit_for_bit(model, tmp_path, name):
    tokred.apply(model, name, **POLICIES[name])
    ids = prompt(29, b=2)
    cache, seen = after(model, ids)
    path = tokred.save_cache(model, cache, tmp_path / "in" / "a.safetensors")
    again = tokred.load_cache(model, path)
    assert again is not cache
    assert again.layer_rows()[0][:3] == cache.layer_rows()[0][:3]
    assert again.nbytes <= cache.nbytes  # no room behind the rows is written
    more = torch.cat([seen, prompt(5, b=2, seed=7)], 1)
    (one, first), (two, second) = on(model, cache, more), on(model, again, more)
    assert torch.equal(first, second)
    # A snapshot of a shadow is without the chunks of the last query, which are then made again, up to rounding.
    assert torch.allclose(one, two, atol=1e-5) if name == "shadowkv" else torch.equal(one, two)
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_codes_are_written_as_codes(model, tmp_path):
    tokred.apply(model, "kivi", bits=2, group_size=8, residual_length=8)
    cache, _ = after(model, prompt(200))
    path = tokred.save_cache(model, cache, tmp_path / "a")
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    held = path.stat().st_size - header - 8
    assert held <= cache.nbytes
    assert held < cache.layer_rows()[0].dense_bytes * 3 / 4


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_without_a_policy(tmp_path, family):
    model = build(family)
    ids = prompt(29)
    cache, seen = after(model, ids)
    again = tokred.load_cache(model, tokred.save_cache(model, cache, tmp_path / "a"))
    assert type(again) is DynamicCache
    more = torch.cat([seen, prompt(5, seed=7)], 1)
    assert all(torch.equal(a, b) for a, b in zip(on(model, cache, more), on(model, again, more), strict=True))


def test_windows_stay_as_they_are(tmp_path):
    model = tokred.apply(build("gemma3"), "snapkv", **SNAP)
    cache, seen = after(model, prompt(29))
    again = tokred.load_cache(model, tokred.save_cache(model, cache, tmp_path / "a"))
    more = torch.cat([seen, prompt(5, seed=7)], 1)
    assert all(torch.equal(a, b) for a, b in zip(on(model, cache, more), on(model, again, more), strict=True))


def test_padding_beams_and_a_prompt_that_is_not_complete(model, tmp_path):
    tokred.apply(model, "snapkv", **SNAP)
    ids, mask, _ = padded((29, 20))
    cache = tokred.kv_cache(model, prompt=29)
    model(ids[:, :16], attention_mask=mask[:, :16], **tokred.cache_kwargs(cache))
    again = tokred.load_cache(model, tokred.save_cache(model, cache, tmp_path / "a"))
    assert again.engine.prompt == 29
    found = [model(ids[:, 16:], attention_mask=mask, **tokred.cache_kwargs(c)).logits for c in (cache, again)]
    assert torch.equal(*found)
    assert again.layer_rows() == cache.layer_rows()
    assert again.layer_rows()[0].rows < 29


def test_layouts_come_back(model, tmp_path):
    tokred.apply(model, "adakv", **POLICIES["adakv"])
    for layout in ("rectangle", "flat", "auto"):
        cache = tokred.kv_cache(model, layout=layout)
        model(prompt(29), **tokred.cache_kwargs(cache))
        again = tokred.load_cache(model, tokred.save_cache(model, cache, tmp_path / layout))
        assert [r.rows for r in again.layer_rows()] == [r.rows for r in cache.layer_rows()]
        assert again.layers[0].store == cache.layers[0].store


def test_an_empty_cache(model, tmp_path):
    tokred.apply(model, "snapkv", **SNAP)
    again = tokred.load_cache(model, tokred.save_cache(model, tokred.kv_cache(model), tmp_path / "a"))
    assert again.get_seq_length() == 0


# ------------------------------------------------------------------ files of something else


@pytest.fixture
def saved(model, tmp_path):
    tokred.apply(model, "snapkv", **SNAP)
    cache, _ = after(model, prompt(29))
    return tokred.save_cache(model, cache, tmp_path / "a")


def test_other_models_are_refused(saved):
    for other, what in (
        (build("llama", seed=1), "weights"),
        (build("qwen3"), "class"),
        (build("llama").bfloat16(), "dtype"),
        (build("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e4}), "settings"),
    ):
        tokred.apply(other, "snapkv", **SNAP)
        with pytest.raises(ValueError, match=rf"another model \(LlamaModel, float32.*different are .*{what}"):
            tokred.load_cache(other, saved)


def test_one_weight_is_enough(saved):
    other = build("llama")
    other.model.layers[1].self_attn.k_proj.weight.data.mul_(1.001)
    with pytest.raises(ValueError, match="different are weights"):
        tokred.load_cache(tokred.apply(other, "snapkv", **SNAP), saved)


def test_other_policies_are_refused(model, saved):
    tokred.apply(model, "snapkv", budget=10, window=4, pool=3)
    with pytest.raises(ValueError, match=r"SnapKV\(budget=9, .*this is the policy SnapKV\(budget=10"):
        tokred.load_cache(model, saved)
    tokred.remove(model)
    with pytest.raises(ValueError, match=r"SnapKV\(budget=9, .*this is a model without a policy"):
        tokred.load_cache(model, saved)


def test_other_layers_are_refused(model, saved):
    tokred.apply(model, "snapkv", **SNAP, where=lambda name, _: "0" in name)
    with pytest.raises(ValueError, match=r"one on \[0, 1, 2\], and this is one on layers \[0\]"):
        tokred.load_cache(model, saved)


def test_other_formats_and_other_files_are_refused(model, saved, tmp_path):
    tensors = safetensors.torch.load_file(saved)
    with safetensors.safe_open(saved, "pt") as file:
        known = json.loads(file.metadata()["tokred"])
    known.update(format=99, tokred="9.9.0")
    safetensors.torch.save_file(tensors, saved, metadata={"tokred": json.dumps(known)})
    with pytest.raises(ValueError, match=rf"format 99, written by tokred 9.9.0; this is tokred {tokred.__version__}"):
        tokred.load_cache(model, saved)
    safetensors.torch.save_file(tensors, saved)
    with pytest.raises(ValueError, match="is not a cache of tokred"):
        tokred.load_cache(model, saved)
    saved.write_bytes(saved.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a cache of tokred"):
        tokred.load_cache(model, saved)
    with pytest.raises(FileNotFoundError, match=r"tokred\.save_cache"):
        tokred.load_cache(model, tmp_path / "nothing")


def test_a_file_names_no_classes_but_records(model, saved):
    tensors = safetensors.torch.load_file(saved)
    with safetensors.safe_open(saved, "pt") as file:
        known = json.loads(file.metadata()["tokred"])
    for name in ("subprocess:Popen", "tokred.kv.engine:Engine", "builtins:eval"):
        known["session"] = {"made": name, "of": {}}
        safetensors.torch.save_file(tensors, saved, metadata={"tokred": json.dumps(known)})
        with pytest.raises(ValueError, match="which is not known here"):
            tokred.load_cache(model, saved)


def test_caches_that_do_not_belong_to_the_model(model, tmp_path):
    with pytest.raises(TypeError, match="got a list"):
        tokred.save_cache(model, [], tmp_path / "a")
    tokred.apply(model, "snapkv", **SNAP)
    cache = tokred.kv_cache(model)
    with pytest.raises(TypeError, match="belongs to none"):
        tokred.save_cache(model, DynamicCache(), tmp_path / "a")
    tokred.remove(model)
    with pytest.raises(ValueError, match="the model has no policy"):
        tokred.save_cache(model, cache, tmp_path / "a")
    tokred.apply(model, "h2o", **POLICIES["h2o"])
    with pytest.raises(ValueError, match=r"SnapKV\(budget=9, .*the model is patched with H2O"):
        tokred.save_cache(model, cache, tmp_path / "a")
    with pytest.raises(TypeError, match="got a Linear"):
        tokred.save_cache(torch.nn.Linear(1, 1), cache, tmp_path / "a")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ a full disk, an interruption


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_breaks_off_leaves_what_was_there(model, saved, monkeypatch, error):
    before = saved.read_bytes()
    cache, _ = after(model, prompt(29, seed=3))

    def half(tensors, path, metadata=None):
        with open(path, "wb") as file:
            file.write(b"half")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(type(error)):
        tokred.save_cache(model, cache, saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["a"]


@pytest.mark.skipif(sys.platform == "win32", reason="sizes of files are limited by POSIX")
def test_no_room_for_the_file(model, saved):
    import resource

    before = saved.read_bytes()
    cache, _ = after(model, prompt(29, seed=3))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large|could not be written"):
            tokred.save_cache(model, cache, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["a"]


def test_what_no_file_can_hold(model, tmp_path):
    tokred.apply(model, "snapkv", **SNAP)
    cache, _ = after(model, prompt(29))
    cache.layers[1].shelf.reader = lambda: None
    with pytest.raises(tokred.TokredError, match=r"layer 1 cannot be saved: the store 'flat'.*reader: a function"):
        tokred.save_cache(model, cache, tmp_path / "a")
    assert not list(tmp_path.iterdir())

"""What patched places keep between forwards, and the passes that they are refused in."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import tokred
from tokred.adapters.passes import outliving
from tokred.adapters.records import Records
from tokred.adapters.tiny import diffusion, kv


def test_what_outlives_a_forward_is_no_inference_tensor():
    with torch.inference_mode():
        given = torch.ones(2)
        with outliving():
            made = given + 1
            assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled()
    assert not made.is_inference()


def test_records_are_those_of_this_thread_or_of_the_last_one():
    records: Records[int, str] = Records()
    assert not records

    def other() -> None:
        records.begin()
        records.put(0, "other")

    def run() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    run()
    assert dict(records) == {0: "other"}
    records.begin()
    records.put(1, "own")
    run()
    assert dict(records) == {1: "own"}
    assert not copy.deepcopy(records)


def test_vmap_is_refused_over_a_denoiser():
    model, given = diffusion.build("sd15"), diffusion.inputs("sd15")
    tokred.apply(model, "tomesd")
    sample = given.pop("sample")
    with pytest.raises(tokred.UnsupportedModelError, match="loop"):
        torch.func.vmap(lambda x: model(x.unsqueeze(0).expand_as(sample), **given).sample)(sample)


def test_vmap_is_refused_over_a_cache():
    model = kv.build("llama")
    tokred.apply(model, "snapkv", budget=0.5, window=4)
    with pytest.raises(tokred.UnsupportedModelError, match="loop"):
        torch.func.vmap(lambda x: model(x.unsqueeze(0)).logits)(kv.prompt(16).expand(2, -1))

"""The benchmark of methods on clips: its settings, its batches, and what counts as right."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.vlm import clips
from benchmarks.zoo import vlm
from benchmarks.zoo.questions import Asked, Question
from tokred.bench.entries import entry


def test_every_setting_leaves_a_share_and_has_a_name_of_its_own() -> None:
    made = clips.settings(list(clips.METHODS), (0.25, 0.1))
    assert len(made) == 2 * len(clips.METHODS)
    labels = {entry(text).label for text in made.values()}
    assert len(labels) == len(made)
    assert all(label.split(" ")[0] == entry(text).name for label, text in made.items())
    with pytest.raises(ValueError, match=r"methods must be among random_visual, .*; got tome"):
        clips.settings(["tome"], (0.5,))


def test_batches_ask_one_kind_of_question() -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> SimpleNamespace:
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[len(word) for word in text.split()])

    tokenizer.convert_tokens_to_ids = {vlm.IMAGE_TOKEN: 99, ".": 98}.__getitem__
    tokenizer.eos_token_id, tokenizer.bos_token_id = 97, 96
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1, 1).expand(3, 2, 3, 28, 28)
    asked = Asked(images, tuple(Question(f"{k}?", f"{k}{i}", k, i) for i in (2, 0, 1) for k in ("what", "way")))
    made = clips.batches(SimpleNamespace(dtype=torch.float32), tokenizer, asked, "way", 2)
    assert [one["answers"] for one in made] == [["way2", "way0"], ["way1"]]
    first = made[0]
    assert first["input_ids"].tolist() == [[96, *[99] * (2 * vlm.FRAME + 1), 9, 4, 7]] * 2
    assert first["pixel_values_videos"].shape == (2, 2, 3, 28, 28)
    assert first["pixel_values_videos"][0].mean() > first["pixel_values_videos"][1].mean()
    output = SimpleNamespace(texts=["way2. And", "way"])
    assert clips.exact(output, first).tolist() == [1.0, 0.0]

"""The benchmark of methods on clips: its settings, its batches, and what counts as right."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.vlm import clip_answers, clips
from benchmarks.zoo import vlm
from benchmarks.zoo.questions import Asked, Question
from tests.vlm import hosts
from tokred.bench.entries import entry


def test_every_setting_leaves_a_share_and_has_a_name_of_its_own() -> None:
    made = clips.settings(list(clips.METHODS), (0.25, 0.1))
    assert len(made) == 2 * len(clips.METHODS)
    labels = {entry(text).label for text in made.values()}
    assert len(labels) == len(made)
    assert all(label.split(" ")[0] == entry(text).name for label, text in made.items())
    with pytest.raises(ValueError, match=r"methods must be among random_visual, .*; got tome"):
        clips.settings(["tome"], (0.5,))


def test_what_restore_goes_around() -> None:
    """At least ten methods, at the same shares, each behind its own."""
    made = clips.settings(list(clips.METHODS), (0.25, 0.1), restore=True)
    wrapped = [label for label in made if label.startswith("restore ")]
    assert len(wrapped) == 2 * len(clips.RESTORED) >= 20
    order = [*made]
    for label in wrapped:
        assert order.index(label.removeprefix("restore base=")) < order.index(label)
        (method,) = entry(made[label]).methods
        assert method.budget in (0.25, 0.1)
        assert method.inner.name == label.split("base=")[1].split()[0]


def test_answers_alone_are_those_of_the_whole_model(capsys) -> None:
    """The tower's blocks run once; what is lifted is told by the same questions."""
    model = hosts.build("onevision_video")
    blocks = model.model.vision_tower.encoder.layers
    model.model.vision_tower.encoder.layer = blocks  # as DINOv2 has them
    batch = hosts.prompts("onevision_video", [[3, "image", 5], [4, "image", 4]])
    batch |= {"eos_token_id": 98, "pad_token_id": 98}

    def decoded(rows, skip_special_tokens):
        return ["".join(chr(97 + int(t) % 26) for t in row) for row in rows]

    tokenizer = SimpleNamespace(batch_decode=decoded)
    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
    right = decoded(out, True)
    ran = []
    handle = blocks[0].mlp.register_forward_hook(lambda *given: ran.append(given[0]))
    data = {kind: [{**batch, "answers": [right[0], "no"]}] for kind in ("what", "way")}
    chosen = {
        f"{head}share=0.5": f"{head}{tail}"
        for head, tail in (
            ("random_visual ", "budget=0.5"),
            ("restore base=random_visual ", "budget=0.5"),
            ("restore base=fastvid ", ""),
            ("earlytom ", "budget=0.5 layers=0,1"),
        )
    }
    found = [*clip_answers.judged(model, tokenizer, chosen, data, {"model": "m", "frames": 3})]
    handle.remove()
    assert len(ran) == 3, "once for all, and for either question where a method acts between the blocks"
    assert [row["asked"] for row in found[0]] == ["what", "way", "all"]
    assert [row["exact"] for row in found[0]] == [0.5] * 3
    assert len(found) == 4, "what cannot run is told and left out"
    assert "restore base=fastvid share=0.5: base is 'fastvid', which drops nothing" in capsys.readouterr().out
    mine, base = found[2][-1], found[1][-1]
    assert mine["exact_lift"] == mine["exact"] - base["exact"]
    assert mine["exact_lift_low"] <= mine["exact_lift"] <= mine["exact_lift_high"]
    assert clip_answers.lifted(found[2]).startswith("share=0.5: ")
    assert "forward" not in vars(blocks[0])


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

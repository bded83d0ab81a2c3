"""Scripts about pages that are partly blank and about what answers need, with the parts of pages that tell of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tokred
from benchmarks.pages import clips, markdown, needed
from benchmarks.vlm import early, pixels, questions
from benchmarks.zoo import vlm
from tests.vlm import hosts
from tokred.bench import results
from tokred.bench.arms import BASE

WHERE = {"device": "a CPU", "threads": 1, "dtype": "float32", "versions": "tokred=0", "date": "today"}


def found(folder: Path, scenario: str, rows: list[dict[str, Any]]) -> markdown.Results:
    results.write(folder / "vlm.csv", [{**WHERE, **row} for row in rows], scenario)
    return markdown.Results(folder)


@pytest.mark.parametrize(("blank", "left"), [(0.0, 16), (0.5, 9), (0.75, 5)])
def test_a_page_holds_as_much_as_it_says(blank: float, left: int) -> None:
    """Of 4 x 4 cells of the prompt the blank ones are one."""
    given = pixels.qwen_page(8, blank)
    assert given["pixel_values"].shape == (64, 1176)
    assert int((given["input_ids"] == early.IMAGE).sum()) == 16
    cells = given["pixel_values"].view(16, -1)
    assert len(cells.unique(dim=0)) == left
    plain = pixels.page(8, blank, 14)
    assert plain.shape == (1, 3, 112, 112)
    assert pixels.lines(8, blank) == int((plain[0, 0, :, 0] == 2).sum()) // 14


def test_parts_of_a_run_are_timed_for_every_arm() -> None:
    model, batch = hosts.build("qwen2_5_vl"), hosts.prompts("qwen2_5_vl", [[3, "image", 5]])
    rows = pixels.measured(
        model, pixels.QWEN, lambda: model(**batch), model.model.visual, [*model.model.language_model.layers], 2
    )
    assert list(rows) == [BASE, "pixelprune", "pixelprune+pixelprune_visual"]
    for mine in rows.values():
        assert len(mine) == 2
        assert all(one["whole"] > one["tower"] + one["prompt"] > 0 for one in mine)
    assert tokred.patched(model) == []


def test_pages_that_are_blank(tmp_path: Path) -> None:
    assert clips.pixels(markdown.Results(tmp_path)).startswith("There are no rows yet")
    one = {"model": "m", "setting": "", "size": 8, "tower_seconds": 2.0, "blank": 0.5}
    text = clips.pixels(found(tmp_path, "pixels", [
        {**one, "method": BASE},
        {**one, "method": "pixelprune", "tower_speedup": 1.9, "speedup": 1.5},
        {**one, "method": "other", "tower_speedup": 1.7, "speedup": 1.5},
        {**one, "method": "pixelprune", "blank": 0.8, "tower_speedup": 1.0, "speedup": 1.0},
    ]))  # fmt: skip
    assert "| `m` | 50 | `pixelprune` | 2.00 |  | 1.90 | 1.50 |" in text
    assert text.endswith("50 % of a page blank is met by `pixelprune` on `m`; missed by `other` on `m`.")


def test_answers_and_their_horizon(tmp_path: Path) -> None:
    assert needed.questions(markdown.Results(tmp_path)) == needed.NONE
    row = {"model": "small-questions", "method": BASE, "asked": "color"}
    layers = [
        {**row, "setting": f"layer={i}", "answer_lost": lost} for i, lost in ((0, 0.9), (10, 0.2), (4, 0.5), (12, 0.0))
    ]
    found(tmp_path, "horizon", layers)
    text = needed.questions(found(tmp_path, "questions", [
        {**row, "setting": "", "exact": 0.95, "exact_count": 40},
        {**row, "asked": "shape", "setting": "", "exact": 0.8, "exact_count": 40},
    ]))  # fmt: skip
    header, _, first, second = text.splitlines()[:4]
    assert header == "| weights | asked | questions | right, % | 0 | 12 | horizon |"
    assert first == "| `vlm_questions` | color | 40 | 95 | 90 | 0 | 12 |"
    assert second == "| `vlm_questions` | shape | 40 | 80 |  |  |  |"
    assert text.endswith("is missed for shape by `vlm_questions`.")


def test_a_forward_ends_with_the_answer() -> None:
    def tokenizer(text: str, **_: Any) -> SimpleNamespace:
        ids = torch.arange(1, 1 + len(text.split()))
        return SimpleNamespace(input_ids=ids[None] if _.get("return_tensors") else ids.tolist())

    tokenizer.convert_tokens_to_ids = {vlm.IMAGE_TOKEN: 99, ".": 98}.__getitem__
    tokenizer.eos_token_id, tokenizer.bos_token_id = 97, 96
    images, model = torch.zeros(3, 3, 28, 28, dtype=torch.uint8), SimpleNamespace(dtype=torch.float32)
    told = [*questions.told(model, tokenizer, "what is it?", images, ["a", "b c", "d"])]
    assert [int((one["labels"] != -100).sum()) for one in told] == [1, 2, 1]
    asked = [*questions.batches(model, tokenizer, "what is it?", images, ["a", "b c", "d"])]
    assert [one["answers"] for one in asked] == [["a", "b c", "d"]]
    batch = hosts.prompts("llava", [[3, "image", 5]])
    one = {**batch, "labels": labels(batch)}
    rows, said = questions.needed(hosts.build("llava"), [one, one], 2, {"model": "m"})
    assert [row["setting"] for row in rows] == ["layer=0", "layer=2"]
    assert all(row["answer_lost_low"] == row["answer_lost"] == row["answer_lost_high"] for row in rows)
    assert said.startswith("answers of 2 samples need visual tokens up to")


def labels(batch: dict[str, Any]) -> torch.Tensor:
    wanted = batch["input_ids"].clone()
    wanted[:, :-1] = -100
    return wanted

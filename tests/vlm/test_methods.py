"""Every method of the stages ``projector`` and ``layer`` on a tiny LLaVA: laws that hold for all of them; those
of methods that act on clips are in ``test_clip_methods``, of one that acts while it decodes in ``test_dycoke``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokred
from tests.vlm import oracle, tiny
from tokred.core.registry import methods as registered

ROWS: list[list[int | str]] = [[3, "image", 5], [2, "image", 1, "image", 4], [9]]
STAGES = ("projector", "layer")


def methods() -> list[str]:
    """The registered ones of these stages that act on visual tokens, of images too."""
    found = [name for stage in STAGES for name, cls in registered.of(stage).items() if cls.stage == stage]
    kinds = {name: registered.get(name) for name in found}
    # Those that leave prompts whole, and choose while it decodes, have laws of their own.
    other = ("clips", "decodes")
    # Pixels of tokens are known where the tower is given patches, which LLaVA's is not: see test_pixelprune_visual.
    pixels = {n for n in kinds if "pixels" in tokred.make(n, **registered.get(n).example).reads}
    return sorted(
        n
        for n, cls in kinds.items()
        if getattr(cls, "visual", True) and n not in pixels and not any(getattr(cls, o, False) for o in other)
    )


NAMES = methods()
# Settings for 16 visual tokens an image, three layers of the tower and four of the language model.
SOME: dict[str, dict[str, Any]] = {name: dict(registered.get(name).example) for name in NAMES}
# Methods that move features from tokens that leave into those that stay, so that masking is another thing; with these
# settings they do not.
MERGING: dict[str, dict[str, Any] | None] = {
    "cat": None,
    "downsample_visual": None,
    "flash_vl": None,
    "holitom_layer": None,
    "nemotron": None,
    "prumerge": None,
    "prumerge_plus": None,
    "prunevid_layer": {"layer": 2, "evict": False},
    "restore": None,
    "sparsevlm": {"layers": (0, 1), "budget": (0.5, 0.25), "recycle": 0.0},
    "visionzip": {"budget": 6, "contextual": 0},
    "vscan": None,
}
MERGING["cat"] = SOME["cat"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava()


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    return tiny.prompts(ROWS)


def visual_tokens(model: Any) -> list[tuple[int, ...]]:
    return [row.visual for row in tokred.report(model).layers]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_runs_and_restores(name, model, batch):
    y = model(**batch).logits
    tokred.apply(model, name, **SOME[name])
    short = model(**batch).logits
    assert short.isfinite().all()
    left = visual_tokens(model)[-1]
    assert left[2] == 0
    assert left[0] < 16 or left[1] < 32, "nothing was removed"
    assert left[0] > 0
    assert left[1] > 0
    again = model(**batch).logits
    assert torch.equal(again, short), "deterministic"
    alone = {"input_ids": batch["input_ids"][:1, -24:], "attention_mask": batch["attention_mask"][:1, -24:]}
    one = model(**alone, pixel_values=batch["pixel_values"][:1]).logits
    assert visual_tokens(model)[-1] == left[:1]
    torch.testing.assert_close(one[0, -5:], short[0, -5:], rtol=1e-4, atol=1e-4)
    tokred.remove(model)
    assert torch.equal(model(**batch).logits, y)


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in NAMES if registered.get(n).nothing is not None])
def test_nothing_to_remove_is_bit_equal(name, model, batch):
    y = model(**batch).logits
    tokred.apply(model, name, **registered.get(name).nothing)
    try:
        assert torch.equal(model(**batch).logits, y)
    finally:
        tokred.remove(model)


@pytest.mark.parametrize("name", [n for n in NAMES if MERGING.get(n, {}) is not None])
def test_dropping_equals_masking(name, model, batch):
    method = tokred.make(name, **(MERGING.get(name) or SOME[name]))
    oracle.agree(model, model.model.language_model.layers, method, batch, max_new_tokens=3)


@pytest.mark.parametrize(
    ("host", "name", "instead"),
    [
        ("onevision", "fastervlm", "'fastervlm' with attention='received' works"),
        ("onevision", "prumerge", "here work .*divprune.*"),
        ("qwen2_5_vl", "flash_vl", "'flash_vl' with space='x' works"),
        ("qwen2_5_vl", "visionzip", "here work .*cdpruner, .*divprune.*"),
    ],
)
def test_a_refusal_names_what_works_instead(host, name, instead):
    from tests.vlm import hosts

    model = hosts.build(host)
    with pytest.raises(tokred.MissingInputError, match=instead):
        tokred.apply(model, name)
    assert not any("_tokred" in key for m in model.modules() for key in m.__dict__), "nothing is half patched"


@torch.no_grad()
@pytest.mark.parametrize("ignore", [True, False])
def test_hired_shares_its_budget_over_tiles(ignore):
    from tests.vlm import hosts

    model = hosts.build("llava_next")
    batch = hosts.prompts("llava_next", [[3, "image", 5], [2, "image", 1, "image", 4]])
    tokred.apply(model, "hired", budget=0.25, ignore_padding=ignore)
    model(**batch)
    left = visual_tokens(model)[0]
    # 16 tokens of the whole image, 32 of its tiles in four rows, each with a newline while a token of it is left.
    assert (12 <= left[0] <= 16) if ignore else (left[0] <= 24)
    assert left[1] <= (32 if ignore else 48)
    alone = {name: batch[name][:1, -60:] for name in ("input_ids", "attention_mask")}
    model(**alone, **{name: batch[name][:1] for name in ("pixel_values", "image_sizes")})
    assert visual_tokens(model)[0] == left[:1]


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in NAMES if tokred.make(n).stage == "projector" and n != "restore"])
def test_positions_can_be_counted_anew(name, model):
    batch = tiny.prompts([[3, "image", 5]])
    settings = SOME[name]
    seen: list[list[int]] = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda m, a, k: seen.append(k["position_ids"][0].tolist()), with_kwargs=True
    )
    for positions in ("keep", "repack"):
        with tokred.applied(model, tokred.make(name, positions=positions, **settings)):
            model(**batch)
    handle.remove()
    assert seen[1] == list(range(len(seen[1]))), "counted anew"
    assert seen[0][-5:] == list(range(19, 24)), "kept"
    assert len(seen[0]) == len(seen[1]) < 24
    with pytest.raises(ValueError, match="positions is 'anew'"):
        tokred.make(name, positions="anew")


@pytest.mark.parametrize(
    "pair",
    [
        [("saint_visual", SOME["saint_visual"]), ("saint_layer", {"start": 1, "end": 2, "tau": 0.0, "K": 1})],
        [("cat", SOME["cat"]), ("vscan_layer", {"budget": 2, "layer": 2})],
        [("hired", SOME["hired"]), ("topv", {"layer": 1, "budget": 3})],
    ],
    ids=["saint, hybrid", "cat and vscan_layer", "hired and topv"],
)
def test_stages_stack(pair, model, batch):
    methods = [tokred.make(name, **settings) for name, settings in pair]
    oracle.agree(model, model.model.language_model.layers, methods, batch, max_new_tokens=3)
    tokred.apply(model, methods)
    with torch.no_grad():
        model(**batch)
    before, behind = visual_tokens(model)[0], visual_tokens(model)[-1]
    tokred.remove(model)
    assert before[0] < 16
    assert all(a <= b for a, b in zip(behind, before, strict=True))
    assert sum(behind) < sum(before)


@pytest.mark.parametrize("name", ["vscan", "visionzip", "prumerge", "sparsevlm"])
def test_merged_tokens_live_through_beams_and_decoding(name, model, batch):
    tokred.apply(model, name, **SOME[name])
    try:
        beams = oracle.generate(model, batch, num_beams=3, max_new_tokens=3)
        greedy = oracle.generate(model, batch, max_new_tokens=3)
        again = oracle.generate(model, batch, max_new_tokens=3)
    finally:
        tokred.remove(model)
    assert beams.sequences.shape[1] > batch["input_ids"].shape[1]
    assert torch.equal(greedy.sequences, again.sequences)
    assert all(step.isfinite().all() for step in greedy.logits)

"""Questions about pictures and clips, and how several are asked at once."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.vlm import train, train_questions
from benchmarks.zoo import data, questions
from benchmarks.zoo import vlm as zoo
from benchmarks.zoo.questions import Asked, Question
from tokred.adapters.tiny import vlm


def middle(clip: torch.Tensor, photo: torch.Tensor) -> list[tuple[float, float]]:
    """Row and column in the middle of what is not the photo, of each frame that shows anything else."""
    found = []
    for frame in clip:
        rows, columns = (frame.float() - photo.float()).abs().sum(0).nonzero(as_tuple=True)
        if len(rows):
            found.append((float(rows.float().mean()), float(columns.float().mean())))
    return found


@pytest.mark.parametrize("way", questions.WAYS)
@pytest.mark.parametrize(("span", "seen"), [("first", 4), ("last", 4), ("always", 8)])
def test_a_piece_moves_the_way_that_is_asked_for_while_it_is_seen(way: str, span: str, seen: int) -> None:
    draw = torch.Generator().manual_seed(3)
    # A photo as large as the frame: the camera stands still.
    photo, item = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.full((1, 28, 28), 200, dtype=torch.uint8)
    clip, cover = questions._clip(item, photo, 8, 64, way, span, draw)
    assert clip.shape == (8, 3, 64, 64)
    places = middle(clip, photo)
    assert len(places) == seen
    down, right = (places[-1][axis] - places[0][axis] for axis in (0, 1))
    along, across = (down, right) if way in ("up", "down") else (right, down)
    assert across == pytest.approx(0, abs=0.5)
    assert along >= 15 if way in ("down", "right") else along <= -15
    shown = [bool((frame != photo).any()) for frame in clip]
    assert torch.equal(cover > 0, (clip != photo).any(1)), "covered is where the piece is"
    assert shown == {"first": [True] * 4 + [False] * 4, "last": [False] * 4 + [True] * 4, "always": [True] * 8}[span]


@pytest.mark.parametrize(("text", "kind"), [
    ("what is the color of the circle?", "color"), ("what color is the shape?", "color"),
    ("what is the blue shape?", "shape"), ("what shape is in the image?", "shape"), ("is there a circle?", "yes/no"),
])  # fmt: skip
def test_kinds_of_questions(text: str, kind: str) -> None:
    assert questions.kind(text) == kind


def test_some_pictures_keep_their_questions() -> None:
    asked = tuple(Question(f"{i}?", "yes", "yes/no", i % 3) for i in range(6))
    some = Asked(torch.arange(3).view(3, 1, 1, 1), asked).about([2, 0])
    assert some.images.flatten().tolist() == [2, 0]
    assert [(q.text, q.picture) for q in some.questions] == [("0?", 1), ("2?", 0), ("3?", 1), ("5?", 0)]


def test_clips_are_refused_where_a_half_has_no_two_frames() -> None:
    with pytest.raises(ValueError, match="frames must be at least 4"):
        questions.clips("train", 1, frames=3)


def test_windows_of_a_square_are_averaged() -> None:
    x = torch.arange(16.0).view(1, 16, 1)
    assert train_questions.pooled(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_the_projector_is_trained_on_what_the_model_hands_to_it() -> None:
    model = vlm.build("llava")
    size = model.config.vision_config.image_size
    images = torch.randint(256, (3, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    given: list[torch.Tensor] = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with torch.no_grad():
        model.model.get_image_features(data.normalise(images))
    # Those of training are computed in bfloat16; another layer's are as far away as they are long.
    assert (train.features(model, images).float() - given[0]).norm() < 0.1 * given[0].norm()


def test_clips_are_trained_on_what_the_model_for_clips_reads() -> None:
    """Averaged in windows behind the projector, and the line feed behind the last frame."""
    model = vlm.build("onevision_video")
    core = model.model
    pixels = torch.randn(1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, *[model.config.video_token_id] * (3 * 4 + 1), 6, 7]])
    given, read = list[torch.Tensor](), list[torch.Tensor]()
    core.multi_modal_projector.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    core.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=ids, pixel_values_videos=pixels)
        found = train_questions.visual(
            core.multi_modal_projector, "clips", given[0].unflatten(0, (1, 3)), False, core.image_newline
        )
    torch.testing.assert_close(found, read[0][:, 1:-2])


def test_questions_that_are_asked_at_once_do_not_see_each_other() -> None:
    model = vlm.build("llava")
    words = model.config.text_config.vocab_size

    def ids(text: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[3 + ord(c) % (words - 3) for c in text[-9:]])

    ids.bos_token_id = 1  # type: ignore[attr-defined]
    asker = train_questions.Asker(model, ids)
    visual = torch.randn(2, 5, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    several = [
        [Question("what is it?", "red", "color", 0), Question("is it?", "no", "yes/no", 0)],
        [Question("who?", "circle", "shape", 1)],
    ]
    with torch.no_grad():
        together, right = asker(visual, several)
        alone = [asker(visual[i : i + 1], [[q]]) for i, asked in enumerate(several) for q in asked]
    tokens = torch.tensor([float(len(ids(f" {q.answer}.", False).input_ids)) for asked in several for q in asked])
    losses = torch.stack([loss for loss, _ in alone])
    torch.testing.assert_close(together, (losses * tokens).sum() / tokens.sum(), rtol=1e-4, atol=1e-5)
    assert [len(r) for r in right] == [2, 1]
    assert [hit for one in right for hit in one] == [r[0][0] for _, r in alone]


def test_frames_of_a_longer_clip_are_shown_several_times_in_a_row() -> None:
    x = torch.arange(2.0 * 4 * 1).view(1, 2, 4, 1)
    found = train_questions.visual(torch.nn.Identity(), "clips", x, False, torch.tensor([-1.0]), frames=6)
    assert found.flatten().tolist() == [1.5] * 3 + [5.5] * 3 + [-1.0]


def test_a_file_with_small_matrices_makes_the_language_model_that_was_trained(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    trained, fresh = vlm.build("llava"), vlm.build("llava")
    stock = copy.deepcopy(fresh.state_dict())
    train_questions.added(trained.model.language_model, 2)
    projector = trained.model.multi_modal_projector
    learning = train_questions.trained(SimpleNamespace(llm=trained.model.language_model), projector)
    assert sum("lora_" in name for name in learning) == 2 * 4 * trained.config.text_config.num_hidden_layers
    with torch.no_grad():
        for value in learning.values():
            value.normal_(std=0.2, generator=torch.Generator().manual_seed(len(value)))
            value.copy_(value.half())
    zoo.save(tmp_path / "small.safetensors", projector, trained.model.language_model)
    zoo.restore(fresh, tmp_path / "small.safetensors")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(fresh(input_ids=ids).logits, trained(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(fresh.model.multi_modal_projector.linear_1.weight, projector.linear_1.weight)
        changed = [name for name, value in fresh.state_dict().items() if not torch.equal(value, stock[name])]
    assert all("projector" in name or "self_attn" in name for name in changed)


def test_patches_of_clothes_are_those_that_clothes_cover() -> None:
    x = torch.arange(2 * 2 * 3.0).view(2, 2, 3, 1)
    covered = torch.tensor([[[0.0, 0.6, 0.4], [1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.9]]])
    asked = [
        [Question("way?", "up", "way", 0), Question("what?", "dress", "what", 0)],
        [Question("what?", "bag", "what", 1)],
    ]
    shapes = train_questions.Source(torch.zeros(1, 3, 1), [[Question("is it?", "no", "yes/no", 0)]])
    found, classes = train_questions.clothes([shapes, train_questions.Source(x, asked, covered)])
    assert found.flatten().tolist() == [1, 3, 11]
    assert classes.tolist() == [zoo.CLASSES.index("dress")] * 2 + [zoo.CLASSES.index("bag")]

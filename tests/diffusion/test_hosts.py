"""Denoisers of diffusers, tiny and random: the laws of a patch."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import tokred
from tests.diffusion.tiny import CLIPS, FRAMES, MODELS, half, inputs, run, sd15, sd_small, sdxl, unet
from tests.kinds import DENOISERS, each
from tests.registered import examples, nothings

ALL = list(MODELS)
# Their examples are enough to act on every resolution of every model.
METHODS: dict[str, dict[str, Any]] = examples("attention")
# Some read the frames of a clip, some what the step before predicted for an image.
NOT_FOR = {"vidtome": [kind for kind in ALL if kind not in CLIPS], "ibtm": list(CLIPS)}
PAIRS = [(kind, name) for kind in ALL for name in METHODS if kind not in NOT_FOR.get(name, ())]
IMAGES = [name for name in METHODS if name != "vidtome"]
NOTHING: dict[str, dict[str, Any]] = nothings("attention")


@pytest.mark.parametrize("kind", each(ALL, DENOISERS))
def test_nothing_to_reduce_is_bit_equal(kind: str):
    model, given = MODELS[kind](), inputs(kind)
    before = run(model, given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, parameters in NOTHING.items():
            if (kind, name) not in PAIRS:
                continue
            tokred.apply(model, name, **parameters)
            assert torch.equal(run(model, given), before), name
            assert tokred.report(model).reduced == 0


@pytest.mark.parametrize(("kind", "name"), each(PAIRS, DENOISERS))
def test_reduced_and_removed(kind: str, name: str):
    model, given = MODELS[kind](), inputs(kind)
    before, text, keys = run(model, given), repr(model), list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert tokred.apply(model, name, **METHODS[name]) is model
    state = torch.get_rng_state()
    after = run(model, given)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is not touched"
    assert after.shape == before.shape
    assert after.isfinite().all()
    assert not torch.equal(after, before)
    # No attention may be scrambled: what comes out is close to what came out before.
    assert torch.nn.functional.cosine_similarity(after.flatten(), before.flatten(), 0) > 0.8
    report = tokred.report(model)
    assert report.reduced > 0
    assert all(row.left < row.tokens for row in report.sublayers if row.role in tokred.make(name).sublayers)
    assert repr(model) == text
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model, given), after), "the same seed gives the same image at every call"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, given), after)
    tokred.remove(model)
    assert torch.equal(run(model, given), before)
    assert [type(m) for m in model.modules()] == classes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


@pytest.mark.parametrize(("kind", "name"), each(PAIRS, DENOISERS))
def test_guidance_in_one_batch_or_in_two_calls(kind: str, name: str):
    model, given = MODELS[kind](), inputs(kind, batch=3)
    tokred.apply(model, name, **METHODS[name])

    def part(rows: slice) -> dict[str, Any]:
        def cut(v: Any) -> Any:
            if isinstance(v, dict):
                return {k: cut(w) for k, w in v.items()}
            return v[rows] if isinstance(v, torch.Tensor) else v

        return {k: v if k in ("img_ids", "txt_ids") else cut(v) for k, v in given.items()}

    whole = run(model, given)
    parts = [run(model, part(rows)) for rows in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def test_more_tokens_are_closer():
    """The reduced output tends to the unpatched one: what is restored stands where it was.

    Between large ratios there is no order with random weights: attention is nearly a mean over all tokens.
    """
    model, given = sd15(), inputs("sd15", (32, 32))
    before = run(model, given)
    errors = []
    for ratio in (0.75, 0.5, 0.25, 0.01):
        with tokred.applied(model, "tomesd", ratio=ratio, max_downsample=8):
            errors.append(float((run(model, given) - before).abs().mean()))
    assert errors[-1] < 0.3 * min(errors[:-1])


@pytest.mark.filterwarnings("ignore:.*reduced nothing")
@pytest.mark.parametrize("kind", each(["unet", "sd15", "dit", "pixart", "sd3", "flux", *CLIPS], DENOISERS))
def test_a_plan_that_changes_nothing_is_the_identity_up_to_rounding(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Every token a slot of its own, in another order: norms, residuals and text are as in the host."""
    model, given = MODELS[kind](), inputs(kind)
    before = run(model, given)

    def shuffled(self: Any, site: Any) -> tokred.Reduction:
        b, n = site.shape
        return tokred.Reduction.keep(torch.randperm(n, generator=torch.Generator().manual_seed(0)).expand(b, -1), n)

    for cls in (tokred.ToMeSD, tokred.ToDo):
        monkeypatch.setattr(cls, "reduce", shuffled)
    for name in ("tomesd", "todo"):
        with tokred.applied(model, name, **METHODS[name]):
            torch.testing.assert_close(run(model, given), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(13, 13), (14, 10), (18, 18)])
@pytest.mark.parametrize("name", IMAGES)
def test_odd_sizes(size: tuple[int, int], name: str):
    model, given = sd15(), inputs("sd15", size)
    tokred.apply(model, name, **METHODS[name])
    out = run(model, given)
    assert out.shape[-2:] == size
    grids = {row.tokens for row in tokred.report(model).sublayers}
    assert grids == {size[0] * size[1], -(-size[0] // 2) * -(-size[1] // 2)}


@pytest.mark.parametrize("kind", each(ALL, DENOISERS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind: str, dtype: torch.dtype):
    model, given = MODELS[kind]().to(dtype), half(inputs(kind), dtype)
    for name, parameters in METHODS.items():
        if (kind, name) not in PAIRS:
            continue
        with tokred.applied(model, name, **parameters):
            out = run(model, given)
        assert out.dtype == dtype
        assert out.isfinite().all()


def test_two_samples_do_not_touch():
    model, given = sd15(), inputs("sd15")
    tokred.apply(model, "tomesd", **METHODS["tomesd"])
    before = run(model, given)
    given["sample"][1] += 1
    given["encoder_hidden_states"][1] *= 2
    after = run(model, given)
    torch.testing.assert_close(after[0], before[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(after[1], before[1])


def test_sizes_that_change_between_calls():
    model = sd15()
    tokred.apply(model, "tomesd", **METHODS["tomesd"], refresh=4, share="resolution")
    first = run(model, inputs("sd15"))
    run(model, inputs("sd15", (12, 20), batch=1))
    assert torch.equal(run(model, inputs("sd15")), first)


def test_steps_draw_anew_and_positional_calls_work():
    model, given = sd15(), inputs("sd15")
    tokred.apply(model, "tomesd")
    plans = model.__dict__["_tokred"].plans

    def index(step: Any) -> torch.Tensor:
        with torch.no_grad():
            model(given["sample"], step, given["encoder_hidden_states"])
        plans = model.__dict__["_tokred"].plans
        return next(iter(plans.values())).reduction.representative[0, -64:]

    assert plans == {}
    assert torch.equal(index(7), index(torch.tensor(7)))
    assert not torch.equal(index(7), index(8))


def test_plans_are_shared_by_resolution_and_kept_for_steps():
    model, given = sd15(), inputs("sd15")
    made: list[int] = []
    original = tokred.ToMeSD.reduce

    def counted(self: Any, site: Any) -> tokred.Reduction:
        made.append(site.shape[1])
        return original(self, site)

    def image(steps: int = 4, calls: int = 2) -> list[torch.Tensor]:
        out = []
        for step in range(steps):
            for call in range(calls):
                rows = slice(call, call + 1)
                sub = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
                out.append(run(model, {**sub, "timestep": 100 - step}))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokred.ToMeSD, "reduce", counted)
        tokred.apply(model, "tomesd", max_downsample=2)
        image(1, 1)
        assert sorted(made) == [64] * 4 + [256] * 3
        made.clear()
        tokred.apply(model, "tomesd", max_downsample=2, share="resolution")
        image(1, 1)
        assert sorted(made) == [64, 256]
        made.clear()
        tokred.apply(model, "tomesd", max_downsample=2, share="resolution", refresh=2)
        first = image(4, 2)
        assert sorted(made) == [64] * 4 + [256] * 4, "two refreshes of two calls each"
        assert all(torch.equal(a, b) for a, b in zip(first, image(4, 2), strict=True)), "the next image starts anew"


def test_the_second_call_of_a_step_has_its_own_plan():
    """With plans kept over steps, prompted and unprompted calls give what one batch of both gives."""
    model, given = sd15(), inputs("sd15")
    tokred.apply(model, "tomesd", max_downsample=2, refresh=3, share="resolution")
    times = (90, 80, 70)
    whole = [run(model, {**given, "timestep": t}) for t in times]
    tokred.apply(model, "tomesd", max_downsample=2, refresh=3, share="resolution")
    for t, both in zip(times, whole, strict=True):
        parts = []
        for i in range(2):
            sub = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
            parts.append(run(model, {**sub, "timestep": t}))
        torch.testing.assert_close(torch.cat(parts), both, rtol=1e-4, atol=1e-5)


def test_nothing_reduced_warns_once_and_the_report_shows_it():
    model, given = sdxl(), inputs("sdxl")
    before = run(model, given)
    tokred.apply(model, "tomesd")
    text = r"'tomesd' reduced nothing on diffusers UNet2DConditionModel.*max_downsample"
    with pytest.warns(tokred.NothingRemovedWarning, match=text):
        assert torch.equal(run(model, given), before)
    assert tokred.report(model).reduced == 0
    assert "64 -> 64" in str(tokred.report(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, given)
        tokred.apply(model, "tomesd", max_downsample=2)
        run(model, given)
    tokred.apply(model, "todo", factors=(2, 1))
    with pytest.warns(UserWarning, match="factors are"):
        run(model, given)


def test_refused_before_anything_is_patched():
    model = unet()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="ratio must lie in"):
        tokred.apply(model, "tomesd", ratio=1.5)
    with pytest.raises(TypeError, match="'todo' has no parameter 'ratio'"):
        tokred.apply(model, "todo", ratio=0.5)
    with pytest.raises(tokred.MissingInputError, match="'tome' acts at stage 'block'"):
        tokred.apply(model, "tome", r=4)
    with pytest.raises(ValueError, match="expose"):
        tokred.apply(model, "tomesd", expose="all")
    with pytest.raises(ValueError, match="windows"):
        tokred.apply(model, "tomesd", windows="all")
    with pytest.raises(ValueError, match="where selects none of the 7 blocks"):
        tokred.apply(model, "tomesd", where=lambda name, block: False)
    assert [type(m) for m in model.modules()] == classes
    with pytest.raises(tokred.NothingRecordedError, match="not patched"):
        tokred.report(model)


def test_strides_larger_than_the_grid():
    """Nothing is reduced there, which is said once."""
    model, given = sd15(), inputs("sd15")
    before = run(model, given)
    for name, parameters in (("tomesd", {"sx": 20}), ("todo", {"factors": 17})):
        tokred.apply(model, name, **parameters)
        with pytest.warns(UserWarning, match=f"'{name}' reduced nothing"):
            assert torch.equal(run(model, given), before)


@pytest.mark.filterwarnings("ignore:.*reduced nothing")
@pytest.mark.parametrize("size", [(2, 16), (4, 4), (2, 2)])
@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n in PAIRS if k in ("sd15", "flux", "wan")])
def test_grids_smaller_than_a_cell(kind: str, name: str, size: tuple[int, int]):
    """Levels of a line, or of one token: those run as they are, the others are reduced."""
    given = inputs(kind, size)
    sample = given["sample" if kind == "sd15" else "hidden_states"]
    sample[1] = sample[0]  # both sides of guidance
    model = tokred.apply(MODELS[kind](), name, **METHODS[name])
    for time in (0.9, 0.8):
        out = run(model, {**given, "timestep": torch.full((2,), time if kind == "flux" else 1000 * time)})
        assert out.isfinite().all()


def test_masks_over_the_image_are_refused():
    model = tokred.apply(sd15(), "tomesd", max_downsample=8)
    with pytest.raises(tokred.UnsupportedModelError, match="attention mask over the image"):
        run(model, {**inputs("sd15"), "attention_mask": torch.ones(2, 256)})


def test_where_restricts():
    model = tokred.apply(sd15(), "tomesd", max_downsample=8, where=lambda name, block: name.startswith("up_blocks"))
    run(model, inputs("sd15"))
    assert {row.name.split(".")[0] for row in tokred.report(model).sublayers} == {"up_blocks"}


def test_other_denoisers_are_refused():
    from diffusers import AutoencoderKL, LTXVideoTransformer3DModel

    with torch.device("meta"):
        video = LTXVideoTransformer3DModel(num_layers=1)
    with pytest.raises(tokred.UnsupportedModelError, match="LTXVideoTransformer3DModel is not among the denoisers"):
        tokred.apply(video, "tomesd")
    with pytest.raises(tokred.UnsupportedModelError, match="no family that tokred knows"):
        tokred.apply(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), "tomesd")


def test_flux():
    model, given = MODELS["flux"](), inputs("flux", (12, 20))
    tokred.apply(model, "tomesd", max_downsample=2, ratio=0.5)
    out = run(model, given)
    rows = tokred.report(model).sublayers
    assert [(row.tokens, row.left) for row in rows if row.role == "self"] == [(60, 30)] * 3
    # Text attends to fewer keys, and each sample has tokens of its own.
    other = {**given, "hidden_states": given["hidden_states"].flip(0)}
    for key in ("encoder_hidden_states", "pooled_projections"):
        other[key] = given[key].flip(0)
    torch.testing.assert_close(run(model, other).flip(0), out, rtol=1e-4, atol=1e-5)
    # Two images in one sequence, as editing pipelines have them.
    twice = {k: torch.cat([given[k]] * 2, 1) for k in ("hidden_states",)}
    with pytest.raises(tokred.UnsupportedModelError, match="120 tokens stand on a grid of 6 x 10 places"):
        run(model, {**given, **twice, "img_ids": torch.cat([given["img_ids"]] * 2)})


@pytest.mark.parametrize("kind", each(list(CLIPS), DENOISERS))
def test_clips_are_reduced_frame_by_frame(kind: str):
    model, given = MODELS[kind](), inputs(kind, (12, 20))
    tokred.apply(model, "tomesd", max_downsample=2, ratio=0.5)
    run(model, given)
    rows = [row for row in tokred.report(model).sublayers if row.role == "self"]
    assert {(row.tokens, row.left) for row in rows} == {(FRAMES * 60, FRAMES * 30)}
    place = model.__dict__["_tokred"].place(torch.empty(2, FRAMES * 60, 4))
    assert (place.grid, place.frames, place.factor) == ((6, 10), FRAMES, 2)
    for plan in model.__dict__["_tokred"].plans.values():
        frame = plan.reduction.index.view(2, FRAMES, 60) // 30
        assert torch.equal(frame, torch.arange(FRAMES).view(1, -1, 1).expand_as(frame)), "no token leaves its frame"
    # The first block's plan of a frame does not look at the others.
    first = next(iter(model.__dict__["_tokred"].plans.values())).reduction.index[:, :60]
    frames = 1 if kind.startswith("cogvideox") else 2
    given["hidden_states"].narrow(frames, 1, FRAMES - 1).mul_(3)
    run(model, given)
    assert torch.equal(next(iter(model.__dict__["_tokred"].plans.values())).reduction.index[:, :60], first)


@pytest.mark.parametrize("kind", ["cogvideox", "hunyuan", "flux"])
def test_text_is_never_reduced(kind: str):
    """A longer text changes no count."""
    model, counts = tokred.apply(MODELS[kind](), "tomesd", **METHODS["tomesd"]), []
    for repeat in (1, 2):
        given = inputs(kind)
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            if name in given:
                given[name] = torch.cat([given[name]] * repeat, 1)
        if "txt_ids" in given:
            given["txt_ids"] = torch.cat([given["txt_ids"]] * repeat)
        if kind == "cogvideox" and repeat == 2:
            model.patch_embed.max_text_seq_length = 10
            model.patch_embed.use_positional_embeddings = False
        run(model, given)
        counts.append([(row.tokens, row.left) for row in tokred.report(model).sublayers])
    assert counts[0] == counts[1]


def test_supports():
    rows = {row.method: row for row in tokred.supports(sd15())}
    assert rows["tomesd"].works
    assert rows["todo"].works
    assert "offers 'attention'" in rows["tome"].reason


def test_save_and_load(tmp_path: Path):
    model, given = sd15(), inputs("sd15")
    before = run(model, given)
    tokred.apply(model, "tomesd")
    state = io.BytesIO()
    torch.save(model.state_dict(), state)
    model.save_pretrained(tmp_path)
    loaded = type(sd15()).from_pretrained(tmp_path).eval()
    assert torch.equal(run(loaded, given), before)


def test_training_through_a_patched_denoiser():
    model, given = sd15().train(), inputs("sd15")
    model.enable_gradient_checkpointing()
    tokred.apply(model, "tomesd", merge_mlp=True)
    model(**given).sample.square().mean().backward()
    with_checkpoints = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.disable_gradient_checkpointing()
    model(**given).sample.square().mean().backward()
    plain = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(plain) == len(list(model.parameters()))
    for a, b in zip(with_checkpoints, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "name", "parameters"),
    [
        *each(
            [
                ("sd15", "tomesd", {"merge_crossattn": True}),
                ("flux", "tomesd", {"max_downsample": 2, "merge_mlp": True}),
                ("wan", "catome", {"threshold": 0.3, "max_downsample": 8}),  # padded: samples differ in what is left
            ],
            {kind: DENOISERS[kind] for kind in ("flux", "wan")},
        ),
        pytest.param("wan", "todo", {"factors": (1, 2)}, marks=pytest.mark.hosts),
    ],
)
def test_compiled(kind: str, name: str, parameters: dict[str, Any]):
    model, given = sd_small() if kind == "sd15" else MODELS[kind](), inputs(kind)
    tokred.apply(model, name, **parameters)
    # Flux reads the grid of its places from their ids.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=kind != "flux")
    before = float(given["timestep"].reshape(-1)[0]) if isinstance(given["timestep"], torch.Tensor) else 7
    for time in (before, before + 1):
        old = given["timestep"]
        new = torch.full_like(old, time) if isinstance(old, torch.Tensor) else torch.tensor(time)
        sub = {**given, "timestep": new}
        torch.testing.assert_close(run(compiled, sub), run(model, sub), rtol=1e-4, atol=1e-5)

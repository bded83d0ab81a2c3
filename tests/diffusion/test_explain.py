"""What a method could gain, before anything is patched."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import tokred
from tests.diffusion.tiny import CLIPS, FRAMES, MODELS, inputs, run, sd15, unet
from tests.kinds import DENOISERS, each
from tokred.adapters import find
from tokred.adapters.diffusion.geometry import build
from tokred.adapters.diffusion.survey import survey


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", each(list(MODELS), DENOISERS))
def test_tokens_are_those_of_a_forward(kind: str):
    model, given = MODELS[kind](), inputs(kind)
    before, size = run(model, given), (FRAMES, 16, 16) if kind in CLIPS else 16
    for name, parameters in (("tomesd", {"max_downsample": 8, "merge_mlp": True}), ("todo", {"factors": (2, 2)})):
        found = tokred.explain(model, name, size, **parameters)
        assert torch.equal(run(model, given), before), "nothing is patched"
        tokred.apply(model, name, **parameters)
        run(model, given)
        rows = tokred.report(model).sublayers
        if name == "todo":
            assert found == tokred.explain(model, name, size, **parameters), "patched or not"
        tokred.remove(model)
        seen = sorted((row.role, row.tokens, row.left) for row in rows)
        told = sorted((level.role, level.tokens, level.left) for level in found.levels for _ in range(level.sublayers))
        assert seen == told
        assert 0 < found.reduced < found.macs
        assert 0 < found.attention_share < 1


def test_multiply_adds_of_attention_are_those_of_the_formula():
    host, method = find(unet(), "attention"), tokred.ToMeSD(max_downsample=1)
    counted = survey(host, method, (16, 16))
    macs = dict(zip((spot.name for spot in counted.spots), counted.spot_macs, strict=True))
    n, c = 256, 16
    assert macs["down_blocks.0.attentions.0"] == 4 * n * c * c + 2 * n * n * c
    m = 128
    saved = sum(spot.left < spot.tokens for spot in counted.spots)
    assert counted.macs - counted.reduced == saved * (4 * (n - m) * c * c + 2 * (n * n - m * m) * c)
    keys = survey(host, tokred.ToDo(), (16, 16))
    m = 64
    assert keys.macs - keys.reduced == saved * (2 * (n - m) * c * c + 2 * n * (n - m) * c)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sd15", "sd3", "flux", "cogvideox_rotary", "wan", "hunyuan"])
def test_multiply_adds_are_those_of_a_forward(kind: str):
    """On real tensors, under a method that costs none of its own."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, given = MODELS[kind](), inputs(kind, batch=1)
    # As many tokens of text as are counted on.
    lengths = {"sd15": 77, "sd3": 154, "flux": 512, "cogvideox_rotary": 5, "wan": 512, "hunyuan": 256}
    given["encoder_hidden_states"] = torch.zeros(1, lengths[kind], 12)
    if kind == "flux":
        given["txt_ids"] = torch.zeros(512, 3)
    if kind == "hunyuan":
        given["encoder_attention_mask"] = torch.ones(1, 256)
    found = tokred.explain(model, "todo", (FRAMES, 16, 16) if kind in CLIPS else 16, factors=(2, 2))
    counts = []
    for method in (None, tokred.ToDo(factors=(2, 2))):
        if method is not None:
            tokred.apply(model, method)
        # The fused attention of a CPU is an operator that the counter does not know; the one written out is counted.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run(model, given)
        counts.append(counter.get_total_flops() // 2)
    assert (found.macs, found.reduced) == tuple(counts)


def test_a_clip_has_frames():
    model = MODELS["wan"]()
    found = tokred.explain(model, "todo", (FRAMES, 16, 20), factors=(1, 2))
    assert "sample 3 x 16 x 20" in str(found)
    assert [(v.tokens, v.left) for v in found.levels if v.role == "self"] == [(FRAMES * 80, FRAMES * 20)]
    with pytest.raises(ValueError, match=r"the size of a clip is \(frames, height, width\), got \(16, 16\)"):
        tokred.explain(model, "todo", 16)
    with pytest.raises(ValueError, match=r"the size of an image is \(height, width\)"):
        tokred.explain(sd15(), "todo", (3, 16, 16))


@pytest.mark.hosts
def test_little_to_gain_warns():
    with pytest.warns(
        tokred.NothingRemovedWarning, match=r"nothing is reduced at this size \(ceiling 1.00x\); max_downsample is 1"
    ):
        found = tokred.explain(build("sdxl"), "tomesd", 128)
    assert "warning: nothing is reduced" in str(found)
    with pytest.warns(tokred.TokredWarning, match="less than 5 %"):
        tokred.explain(sd15(), "tomesd", 16, ratio=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tokred.explain(build("sd15"), "tomesd", 128, ratio=0.5)
    assert found.ceiling > 1.3
    assert next((v.tokens, v.left) for v in found.levels if v.role == "self") == (16384, 8192)


def test_pipelines_count_pixels():
    from tests.diffusion.test_pipelines import stable_diffusion

    pipe = stable_diffusion()
    assert tokred.explain(pipe, "todo", (32, 48)).size == (16, 24)
    with pytest.raises(ValueError, match="height and width must be at least 2"):
        tokred.explain(pipe, "todo", 1)


def test_refusals():
    with pytest.raises(tokred.MissingInputError, match="acts at stage 'block'"):
        tokred.explain(sd15(), "tome", 16)
    with pytest.warns(UserWarning, match="nothing is reduced at this size"):
        tokred.explain(sd15(), "tomesd", 16, sx=30)
    with pytest.raises(ValueError, match="no denoiser is named 'sd9'"):
        build("sd9")


def test_command_line(tmp_path: Path):
    typer_testing = pytest.importorskip("typer.testing")
    from tokred.cli.main import app

    def ask(*arguments: str) -> tuple[int, str]:
        done = typer_testing.CliRunner().invoke(app, ["explain", *arguments])
        return done.exit_code, done.output

    sd15().save_pretrained(tmp_path / "unet")
    code, text = ask("--model", str(tmp_path), "--size", "16", "-m", "tomesd ratio=0.25")
    assert code == 0, text
    assert "256 -> 192" in text
    assert "ceiling of the speed-up" in text
    code, text = ask("--model", "wan-1.3b", "-m", "todo factors=(1,2)", "--size", "49x480x832")
    assert code == 0, text
    assert "20280 -> 5070" in text
    MODELS["wan"]().save_pretrained(tmp_path / "clips" / "transformer")
    (tmp_path / "clips" / "vae").mkdir()
    (tmp_path / "clips" / "vae" / "config.json").write_text('{"scale_factor_spatial": 8, "scale_factor_temporal": 4}')
    todo = ("-m", "todo factors=(1,2)")
    code, text = ask("--model", str(tmp_path / "clips"), *todo, "--size", "9x128x96")
    assert "sample 3 x 16 x 12" in text
    for arguments, words in (
        (("--model", "wan-1.3b"), "the size of a clip is (frames, height, width)"),
        (("--size", "9x64x64"), "the size of an image is (height, width)"),
        (("--model", "sd99"), "is no denoiser"),
        (("--size", "big"), "--size"),
        (("-m", "tomesd ratio=2"), "ratio must lie in"),
        (("-m", "todoo"), "did you mean 'todo'"),
    ):
        code, text = ask(*arguments)
        assert code == 2
        assert words in text


@pytest.mark.parametrize("name", ["pixart", "sd3", "sd35-medium", "dit-xl-2", "sd21", "flux", "cogvideox-2b"])
def test_geometries_build(name: str):
    model = build(name)
    assert next(model.parameters()).device.type == "meta"
    assert sum(p.numel() for p in model.parameters()) > 5e8


@pytest.mark.parametrize(
    ("name", "billions"), [("cogvideox-5b", 5.6), ("wan-1.3b", 1.4), ("wan-14b", 14.3), ("hunyuan-video", 12.8)]
)
def test_clips_have_their_size(name: str, billions: float):
    count = sum(p.numel() for p in build(name).parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.03)

"""``benchmarks/diffusion/speed.py``: what it builds, and that its rows can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

import tokred
from benchmarks.diffusion import speed
from tokred.bench import results, timing


def test_rows(tmp_path: Path) -> None:
    out = tmp_path / "speed.csv"
    arms = ["--arm", "tomesd max_downsample=2 refresh=2 share=resolution", "--arm", "todo factors=(1,2)"]
    given = ["--quick", "--case", "wan-1.3b:5x32x48", *arms, "--out", str(out)]
    rows = speed.run(speed.parser().parse_args(given))
    written = results.records(results.read(out))
    typed = [f"{row['method']} {row['setting']}".strip() for row in written]
    assert typed == [f"{row['method']} {row['setting']}".strip() for row in rows] == ["unpatched", arms[1], arms[3]]
    assert all(float(row["seconds"]) > 0 and float(row["peak_mib"]) > 0 for row in written)
    assert [float(row["ceiling"]) > 1 for row in written] == [False, True, True]
    assert all(0 <= float(row["plan_share"]) < 1 for row in written)
    assert "diffusers=" in written[0]["versions"]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart", "sd3", "flux", "wan-1.3b", "cogvideox-5b", "hunyuan-video"])
def test_narrow_ones_build(name: str) -> None:
    with torch.device("meta"):
        wide, narrow = (speed.build(name, **speed.settings(name, width)) for width in (None, 128))
    count = [sum(p.numel() for p in model.parameters()) for model in (wide, narrow)]
    assert count[1] < 0.3 * count[0]


def test_decisions_are_timed_and_given_back() -> None:
    own = tokred.ToMeSD.reduce
    with timing.Watch().around(tokred.ToMeSD, "reduce", "plan"):
        assert tokred.ToMeSD.reduce is not own
    assert tokred.ToMeSD.reduce is own


def test_refusals() -> None:
    for case, words in (("sd99:512", "no denoiser is named"), ("sd15:big", "a case is name:pixels")):
        with pytest.raises(ValueError, match=words):
            speed.run(speed.parser().parse_args(["--quick", "--case", case]))

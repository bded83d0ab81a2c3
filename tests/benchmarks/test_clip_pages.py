"""Pages and plots about clips and streams, made of rows that are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.pages import clips, markdown
from benchmarks.vlm.clips import RESTORED
from benchmarks.zoo import vlm
from benchmarks.zoo.questions import SPANS, WAYS
from tokred.bench import results

EMPTY = "There are no rows yet: `python -m benchmarks"


def table(folder: Path, scenario: str, rows: list[dict[str, Any]]) -> markdown.Results:
    source = {"device": "a CPU", "threads": 1, "dtype": "float32", "versions": "tokred=0", "date": "today"}
    results.write(folder / "vlm.csv", [{"model": "m", **source, **row} for row in rows], scenario)
    return markdown.Results(folder)


def asked(method: str, setting: str, exact: float, left: int, **more: Any) -> dict[str, Any]:
    ends = {"exact_low": exact - 0.1, "exact_high": exact + 0.1, "exact_count": 90}
    row = {"method": method, "setting": setting, "exact": exact, "tokens_left": left, "frames": 8, **ends}
    return {**row, "asked": "all", **more}


def test_chance_is_that_of_the_questions() -> None:
    assert pytest.approx((1 / len(vlm.CLASSES) + 1 / len(WAYS) + 1 / len(SPANS)) / 3) == clips.CHANCE
    assert clips.WRAPPER == "restore"
    assert clips.AIMS[2] <= len(RESTORED)


def test_clips(tmp_path: Path) -> None:
    nothing = markdown.Results(tmp_path)
    for part in (clips.clips, clips.clips_claims, clips.clips_times, clips.streams, clips.streams_claims):
        assert part(nothing).startswith(EMPTY)
    up = {"exact_lift": 0.2, "exact_lift_low": 0.1, "exact_lift_high": 0.3}
    down = {"exact_lift": -0.05, "exact_lift_low": -0.1, "exact_lift_high": 0.01}
    found = table(tmp_path, "clips", [
        asked("unpatched", "", 0.8, 513), asked("evs", "share=0.1", 0.4, 65), asked("divprune", "share=0.1", 0.7, 52),
        asked("restore", "base=evs share=0.1", 0.6, 65, **up), asked("evs", "share=0.1", 0.9, 65, asked="what"),
        asked("restore", "base=divprune share=0.1", 0.65, 52, **down), asked("fastv", "share=0.1", 0.3, 51),
    ])  # fmt: skip
    head, _, header, _, *lines = clips.clips(found).splitlines()
    assert head == "8 frames, `vlm_m`, 513 visual tokens, 90 answers: unpatched 80 (70 to 90) % right."
    assert header == "| method | 10 % | with RESTORE |"
    assert lines == [
        "| `evs` | 40 (30 to 50), 65 | 60 (50 to 70; +20), 65 |",
        "| `divprune` | 70 (60 to 80), 52 | 65 (55 to 75; -5), 52 |",
        "| `fastv` | 30 (20 to 40), 51 |  |",
    ]
    assert clips.clips_claims(found) == (
        "- 8 frames, `vlm_m`, 10 % of the tokens: `divprune` answers most, 70 %, 83 % of the unpatched model's above "
        "chance (aim at a tenth: 95 %); level with it: `restore around divprune`, `restore around evs`. RESTORE lifts "
        "1 of 2 (aim: 8 of 10), and lowers 1; beyond the 95 % interval of the difference it lifts `evs`, and lowers "
        "none."
    )
    blind = table(tmp_path / "blind", "clips", [asked("unpatched", "", 0.3, 513), asked("evs", "share=0.1", 0.4, 65)])
    assert clips.clips_claims(blind).endswith(
        "8 frames, `vlm_m`: the unpatched model's own answers are not beyond chance, nothing is told."
    )
    spent = {"tower_seconds": 1.5, "selection_seconds": 0.01, "prompt_seconds": 0.5, "seconds": 2.25}
    timed = {
        "frames": 8,
        "asked": "what",
        "speedup": 2.0,
        "speedup_low": 1.9,
        "speedup_high": 2.1,
        "forward_mib": 300.0,
        **spent,
    }
    found = table(tmp_path, "clips", [{"method": "holitom", "setting": "share=0.1", **timed}])
    assert clips.clips_times(found).splitlines()[2:] == [
        "| `holitom` | 0.1 | 8 | 1.50 | 0.01 | 0.50 | 2.25 | 2.00 (1.90 to 2.10) | 300 |"
    ]
    assert clips.clips(found).startswith(head), "times are no answers"


def test_streams(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.pages import plots

    assert plots.streams(markdown.Results(tmp_path), tmp_path) == []
    setting = "stc budget=64 + streaming_llm budget=1025"
    rows = []
    for method, text, counts in (("unpatched", "", (32, 64)), ("stc", setting, (64, 256, 512))):
        for n in counts:
            ms, more = 100 + n / 8, {"agreement": 0.5, "images": 4} if text else {}
            ends = {"ms_low": ms - 5, "ms_high": ms + 5, "rounds": 64}
            row = {"method": method, "setting": text, "frames": n, "ms": ms, **ends, **more}
            rows.append(
                {**row, "bytes": (n if not text else 40) * 2**20, "rows_left": 1025, "size": 224, "tokens": 256}
            )
    found = table(tmp_path, "stream", [*rows, {**rows[-1], "size": 112, "tokens": 64}])
    lines = clips.streams(found).splitlines()[2:]
    assert lines[0] == "| `keeps everything` | 32 | 104 (99 to 109) | 32.0 | 1025 |  |  |"
    assert lines[2] == f"| `{setting}` | 64 | 108 (103 to 113) | 40.0 | 1025 | 2 of 4 |  |"
    assert clips.streams_claims(markdown.Results(tmp_path)) == (
        f"- `{setting}`: from 64 to 512 frames 1.00 times the bytes, 1.52 times the time of a frame; "
        "in 6 of 12 answers four tokens as of the last frames alone."
    )
    told = {"exact": 0.75, "images": 4, "size": 224, "tokens": 64}
    alone = {"method": "short", "setting": "", "frames": 16, **told, "exact": 0.5, "images": 8}
    found = table(tmp_path / "told", "stream", [*({**row, **told} for row in rows[-2:]), alone])
    assert clips.streams(found).splitlines()[-1].endswith("| 2 of 4 | 3 |")
    assert clips.streams_claims(found).endswith("; 6 of 8 are right, of those of the last frames alone 4.")
    # Of others than those that the stream was asked, there is nothing to say.
    some = [*({**row, **told} for row in rows[-2:]), {**alone, "images": 4}]
    assert clips.streams_claims(table(tmp_path / "some", "stream", some)).endswith("; 6 of 8 are right.")
    assert len(plots.streams(found, tmp_path)) == 1
    found = markdown.Results(tmp_path)
    made = plots.streams(found, tmp_path)
    assert [path.name for path in made] == ["stream.png", "stream_2.png"]
    assert made[0].stat().st_size > 10_000

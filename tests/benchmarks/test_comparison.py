"""docs/methods/comparison.md is what the committed CSV files say."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.encoder import comparison


def test_the_committed_page_is_the_generated_one():
    assert comparison.page() == comparison.PAGE.read_text(), "python -m benchmarks encoder/comparison"


def test_nothing_is_extrapolated():
    points = [(1.0, 0.0), (2.0, -1.0)]
    assert comparison.at(points, 1.5) == -0.5
    assert comparison.at(points, 2.0) == -1.0
    assert comparison.at(points, 2.1) is None
    assert comparison.at([(1.0, 3.0)], 1.0) is None


def test_winners_say_where_a_plain_baseline_wins(tmp_path: Path):
    def row(method: str, speedup: float, cosine: float) -> dict[str, str]:
        return {"method": method, "setting": "", "speedup": str(speedup), "cosine": str(cosine), "saliency_mae": ""}

    rows = [row("unpatched", 1, 1), row("tome", 3, 0.8), row("downsample", 3, 0.9), row("evit", 3, 0.7)]
    (line,) = comparison.winners(rows, [2.0])
    assert "best is `downsample` (0.9500)" in line
    assert "`tome` has 0.9000 and beats `evit`" in line
    with (tmp_path / "methods_embedded.csv").open("w") as f:
        csv.DictWriter(f, ["method"]).writeheader()
    assert "The embedded model" not in comparison.page(tmp_path)

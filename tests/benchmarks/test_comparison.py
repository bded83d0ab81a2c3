"""Pages that are made from the tables of results are what the committed tables say, and claim no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.pages import comparison, markdown, tables
from benchmarks.pages.markdown import Value
from tokred.bench import results

FOUND = markdown.Results()


def test_the_committed_page_is_the_generated_one():
    assert comparison.page(FOUND) == comparison.PAGE.read_text(), "python -m benchmarks pages"


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.stem)
def test_the_marked_parts_are_the_generated_ones(page: Path):
    text = page.read_text()
    assert markdown.filled(text, tables.PAGES[page], FOUND) == text, "python -m benchmarks pages"


def test_the_page_says_how_many_rows_can_be_traced():
    counted = results.provenance([row for rows in FOUND.tables.values() for row in rows])
    assert f"Of {counted.rows:,} rows {counted.clean:,} name" in tables.PAGE.read_text()
    assert counted.clean < counted.rows
    for page in (tables.PAGE, comparison.PAGE.parents[2] / "README.md"):
        assert "very row says" not in page.read_text()


def test_nothing_is_extrapolated():
    points = [(1.0, 0.0), (2.0, -1.0)]
    assert comparison.at(points, 1.5) == -0.5
    assert comparison.at(points, 2.0) == -1.0
    assert comparison.at(points, 2.1) is None
    assert comparison.at([(1.0, 3.0)], 1.0) is None


def row(method: str, speedup: float, cosine: float, spread: float = 0.0) -> dict[str, Any]:
    ends = {"speedup_low": speedup - spread, "speedup_high": speedup + spread}
    return {"method": method, "setting": "", "speedup": speedup, "cosine": cosine, **ends}


def test_winners_say_where_a_plain_baseline_wins(tmp_path: Path):
    rows = [row("unpatched", 1, 1), row("tome", 3, 0.8), row("downsample", 3, 0.9), row("evit", 3, 0.7)]
    (line,) = comparison.winners(rows, [2.0])
    assert "best is `downsample` (0.9500" in line
    assert "`tome` has 0.9000" in line
    assert "level" not in line
    assert "The embedded model" not in comparison.page(markdown.Results(tmp_path))


def test_what_lies_within_the_noise_of_the_clock_is_level():
    rows = [
        row("unpatched", 1, 1),
        row("tome", 3.0, 0.8, 0.4),
        row("tinychart", 3.2, 0.8, 0.4),
        row("evit", 3, 0.2, 0.1),
    ]
    (line,) = comparison.winners([*rows, row("random", 3.0, 0.79, 0.4)], [2.0])
    assert "the highest figure is that of `tinychart`" in line
    assert "level with it are `tome`, `random`" in line
    assert "Random merging has 0.8950: level with it are `tinychart`, `tome`; worse than it are `evit`." in line
    assert "best is" not in line
    assert "figure of quality of `tinychart` is that of `tome`" in comparison.same_as_tome(rows)


def test_words():
    assert markdown.compared(Value(2, 1, 3), Value(2.5, 2.4, 2.6)) == "level with"
    assert markdown.compared(Value(2, 1.9, 2.1), Value(2.5, 2.4, 2.6)) == "worse than"
    assert markdown.compared(Value(2, 1.9, 2.1), Value(2.5, 2.4, 2.6), higher=False) == "better than"
    assert markdown.ranked({"a": Value(1, 0, 2), "b": Value(1.5, 1, 2), "c": Value(0.5, 0.4, 0.6)}) == ("b", ["a"])


def test_a_part_that_is_not_marked_is_found_out():
    with pytest.raises(ValueError, match="marked there"):
        markdown.filled("nothing", {"there": lambda found: ""}, FOUND)
    with pytest.raises(KeyError):
        markdown.filled("<!-- results: gone -->\n<!-- end of gone -->", {}, FOUND)


def test_chance_and_blind_choices_are_said():
    from benchmarks.pages import vlm as page
    from benchmarks.zoo import vlm

    assert 1 / len(vlm.CLASSES) == page.CHANCE
    *lines, chance = page.vlm_claims(FOUND).splitlines()
    assert chance == "- Chance is 10 %: there are ten classes."
    rows = {budget: FOUND.records("vlm", "answers", setting=f"budget={budget}") for budget in page.BUDGETS}
    for budget, line in zip(page.BUDGETS, lines, strict=False):
        best = max(rows[budget], key=lambda r: r["exact"])["method"]
        assert f"With {budget} tokens, `{best}` answers most" in line
        blind = line.partition("Blind choices among the first: ")[2]
        assert (f"`{best}`" in blind) == (best in page.BLIND)
    assert any("`random_visual` answers most" in line for line in lines)


def test_plots_are_drawn_from_the_tables(tmp_path: Path):
    from benchmarks.pages import plots

    made = plots.kv_limit(FOUND, tmp_path) + plots.vlm(FOUND, tmp_path)
    assert [path.name for path in made] == ["kv_limit.png", "vlm.png"]
    assert all(path.stat().st_size > 20_000 for path in made)

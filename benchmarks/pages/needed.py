"""Marked parts about what the small VLM answers, and down to which of its layers answers need visual tokens."""

from __future__ import annotations

from benchmarks.pages.clips import weights
from benchmarks.pages.markdown import Record, Results, between, percent, table
from tokred.analysis.information import first_within

AIMED = ("color", "shape")  # of easy-VQA
RIGHT = 0.9  # of their questions, at least
LOST = 0.01  # of the answer's probability, which counts as nothing
NONE = "There are no rows yet: `python -m benchmarks vlm/questions` makes them."


def curves(found: Results) -> dict[tuple[str, str], list[tuple[int, Record]]]:
    """By model and kind of question the layers that were measured, in order, with their records."""
    made: dict[tuple[str, str], list[tuple[int, Record]]] = {}
    for r in found.records("vlm", "horizon"):
        layer = int(r["setting"].removeprefix("layer=").split()[0])
        made.setdefault((r["model"], r["asked"]), []).append((layer, r))
    return {key: sorted(rows, key=lambda row: row[0]) for key, rows in made.items()}


def horizon(rows: list[tuple[int, Record]]) -> int | None:
    """The first measured layer from which on no visual token is needed; None: they are needed at all of them."""
    at = first_within([r["answer_lost"] for _, r in rows], LOST)
    return None if at is None else rows[at][0]


def questions(found: Results) -> str:
    """Right answers about held-out pictures, and what is lost where visual tokens leave."""
    lines, curve = [], curves(found)
    shown = sorted({layer for rows in curve.values() for layer, _ in rows})
    shown = [layer for i, layer in enumerate(shown) if i % 3 == 0 or layer == shown[-1]]
    for r in found.records("vlm", "questions"):
        rows = curve.get((r["model"], r["asked"]), [])
        lost = dict(rows)
        cells = [weights(r["model"]), r["asked"], str(r["exact_count"])]
        cells += [between(r, "exact", "{:.0f}", 100)]
        cells += [percent(lost[k]["answer_lost"], digits=0) if k in lost else "" for k in shown]
        end = horizon(rows)
        lines.append([*cells, "" if not rows else "the end" if end is None else str(end)])
    if not lines:
        return NONE
    header = ["weights", "asked", "questions", "right, %", *(f"{k}" for k in shown), "horizon"]
    return f"{table(header, lines, 2)}\n\n{_aim(found)}"


def _aim(found: Results) -> str:
    rows = [r for r in found.records("vlm", "questions") if r["asked"] in AIMED]
    missed = [f"{r['asked']} by {weights(r['model'])}" for r in rows if r["exact"] < RIGHT]
    said = f"missed for {', '.join(missed)}" if missed else "met"
    return f"The aim of {100 * RIGHT:.0f} % of the questions about colours and shapes is {said}."

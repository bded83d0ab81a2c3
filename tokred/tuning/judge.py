"""How much settings lose on the user's samples: judgements, which a file remembers, and which are told from chance."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokred.bench.intervals import Estimate, paired
from tokred.bench.scoring import Scorer
from tokred.core.folders import check_folder
from tokred.core.method import Method
from tokred.tuning.engine import Engine, Judged, keys_of
from tokred.tuning.space import Plan

FILE = "tune.jsonl"


class Memo:
    """Measurements, in a file of lines, so that a search that was broken off goes on where it was.

    Args:
        folder: that the file is in, made where it is not there; None: nothing is kept.
        head: names the search; lines of others are left alone.
    """

    def __init__(self, folder: Path | None, head: str) -> None:
        self.path, self._head = None if folder is None else folder / FILE, head
        self._known: dict[tuple[str, str], Any] = {}
        if self.path is None or folder is None:
            return
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            text = self.path.read_text("utf-8")
            if text and not text.endswith("\n"):  # broken off in the middle of a line, which no other may be added to
                with self.path.open("a", encoding="utf-8") as f:
                    f.write("\n")
            for line in text.splitlines():
                try:
                    found = json.loads(line)
                except json.JSONDecodeError:  # such a line
                    continue
                if found.get("head") == head:
                    self._known[found["kind"], found["key"]] = found["value"]

    def get(self, kind: str, key: str) -> Any:
        """The value, or None."""
        return self._known.get((kind, key))

    def put(self, kind: str, key: str, value: Any) -> None:
        """Remember a value of plain lists and numbers."""
        self._known[kind, key] = value
        if self.path is not None:
            line = json.dumps({"head": self._head, "kind": kind, "key": key, "value": value})
            with self.path.open("a", encoding="utf-8") as f:
                f.write(line + "\n")


@dataclass
class Trial:
    """One setting that was tried.

    Attributes:
        plan, step, method, label: the setting.
        speed: that was predicted.
        judged: pieces so far.
        complete: whether all pieces were run; the others were given up.
    """

    plan: Plan
    step: int
    method: Method
    label: str
    speed: float
    judged: list[Judged] = field(default_factory=list)
    complete: bool = False

    @property
    def loss(self) -> float:
        """Mean of the guide over the samples so far."""
        found = [v for piece in self.judged for v in piece.guide]
        return sum(found) / len(found)


class Judge:
    """Runs settings on the samples, each once.

    Args:
        engine: with the samples.
        memo: of earlier runs.
    """

    def __init__(self, engine: Engine, memo: Memo) -> None:
        self.engine, self.memo = engine, memo

    def piece(self, label: str, method: Method, split: str, index: int) -> Judged:
        """One piece of the samples that are searched on (``"tune"``), or of those held out (``"held"``)."""
        key = f"{split} {index} {label}"
        known = self.memo.get("judged", key)
        if known is None:
            pieces = self.engine.pieces if split == "tune" else self.engine.held
            known = [list(part) for part in self.engine.judge(method, [pieces[index]])[0]]
            self.memo.put("judged", key, known)
        return Judged(*known)

    def base(self, split: str) -> list[Judged]:
        """The unpatched model."""
        return [self.engine.base(piece) for piece in (self.engine.pieces if split == "tune" else self.engine.held)]

    def groups(self, split: str) -> list[str] | None:
        """The group of each value of a split; None where the data name none."""
        pieces = self.engine.pieces if split == "tune" else self.engine.held
        found = [keys_of(piece, len(base.values)) for piece, base in zip(pieces, self.base(split), strict=True)]
        return [key for part in found for key in part] or None

    def held(self, label: str, method: Method) -> list[Judged]:
        """All samples that were held out."""
        return [self.piece(label, method, "held", i) for i in range(len(self.engine.held))]

    def complete(self, trial: Trial) -> Trial:
        """Run what is missing of a trial."""
        for i in range(len(trial.judged), len(self.engine.pieces)):
            trial.judged.append(self.piece(trial.label, trial.method, "tune", i))
        trial.complete = True
        return trial

    def race(self, trial: Trial, best: Trial | None) -> Trial:
        """Run a trial, and give it up as soon as it is worse than the best one beyond doubt."""
        count = len(self.engine.pieces)
        for rung in sorted({max(1, count // 4), max(1, count // 2), count}):
            for i in range(len(trial.judged), rung):
                trial.judged.append(self.piece(trial.label, trial.method, "tune", i))
            if best is not None and rung < count and worse(trial.judged, best.judged):
                return trial
        trial.complete = True
        return trial


def worse(mine: Sequence[Judged], best: Sequence[Judged], errors: float = 2.0) -> bool:
    """True if the guide is worse by so many standard errors of the difference on the same samples."""
    differences = [
        a - b for x, y in zip(mine, best, strict=False) for a, b in zip(x.guide, y.guide, strict=True)
    ]  # the best has all pieces, this one the first of them
    n = len(differences)
    mean = sum(differences) / n
    if n < 2:
        return mean > 0
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    return mean > errors * spread and mean > 0


def difference(
    mine: Sequence[Judged], other: Sequence[Judged], score: Scorer, groups: Sequence[str] | None = None
) -> Estimate:
    """The metric minus another's on the same samples, with its 95 % interval; of perplexities the ratio minus one.

    Args:
        mine, other: pieces in the same order.
        score: of the metric.
        groups: a key a value: values of one group count as one draw.
    """
    values, base, weights = (
        [v for piece in found for v in piece[i]] for found, i in ((mine, 1), (other, 1), (mine, 2))
    )
    found = paired(values, base, weights, groups)
    if score.log:
        return found.map(math.expm1)
    return found


def lost(mine: Sequence[Judged], other: Sequence[Judged], score: Scorer) -> float:
    """How much worse the metric is than another's, in its own units."""
    found = difference(mine, other, score).value
    return found if score.better == "lower" else -found


def blended(trials: Sequence[Trial], base: Sequence[Judged], score: Scorer) -> list[float]:
    """The losses of complete trials: half of it as the metric says, half as the guide would have it.

    A few hundred rights and wrongs hardly tell the best from the second best, and the luckiest of many trials is not
    the best of them. The guide has less noise; a line through all trials says what metric goes with it.
    """
    if not trials:
        return []
    mine = [lost(trial.judged, base, score) for trial in trials]
    guide = [trial.loss for trial in trials]
    n = len(trials)
    middle, centre = sum(guide) / n, sum(mine) / n
    square = sum((g - middle) ** 2 for g in guide)
    slope = sum((g - middle) * (m - centre) for g, m in zip(guide, mine, strict=True)) / square if square else 0.0
    if n < 8 or slope <= 0:
        return mine
    return [(m + centre + slope * (g - middle)) / 2 for m, g in zip(mine, guide, strict=True)]

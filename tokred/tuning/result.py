"""``Tuned``: the setting that a search found, with what it does on samples that the search did not see."""

from __future__ import annotations

import dataclasses
import html
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from tokred import api, settings
from tokred.core.frames import page
from tokred.core.method import Method, from_dict
from tokred.tuning.goal import Goal
from tokred.tuning.space import setting_of

M = TypeVar("M", bound=nn.Module)
FILE = "tuned.json"
ROOM = 20  # characters of a difference with its interval
SHARES = ("top1", "top5", "agreement")
ROLES = {"unpatched": "unpatched", "chosen": "chosen", "constant": "best constant", "random": "random"}


@dataclass(frozen=True)
class Tuned:
    """The setting that :func:`tokred.tune` chose.

    Attributes:
        method: that was chosen; for :func:`tokred.apply`.
        goal: that was asked for.
        met: whether it is reached, on the samples that were held out; else ``method`` is the nearest.
        rows: the unpatched model, the chosen setting, the best constant one at equal time (or bytes) and a random
            choice, on the held-out samples. ``difference`` is that to the unpatched model, ``gain`` that to the best
            constant setting on the same samples, ``beside`` the measured speed as a multiple of that one's.
        front: rows at other speeds that no other row beats in both speed and quality.
        why: sentences.
        model: its name.
        stage: at which it acts.
        metric: name of the metric.
        better: the direction that is good.
        tried: how many settings were tried.
    """

    method: Method
    goal: Goal
    met: bool
    rows: list[dict[str, Any]]
    front: list[dict[str, Any]]
    why: list[str]
    model: str
    stage: str
    metric: str
    better: str
    tried: int

    @property
    def methods(self) -> list[Method]:
        """:attr:`method` in a list."""
        return [self.method]

    @property
    def setting(self) -> str:
        """The method as it is typed: ``"tome r=[8,4,0]"``."""
        return f"{self.method.name} {setting_of(self.method)}".strip()

    def row(self, role: str) -> dict[str, Any] | None:
        """The row of ``"unpatched"``, ``"chosen"``, ``"constant"`` or ``"random"``; None where there is none."""
        return next((row for row in self.rows if row["role"] == role), None)

    def apply(self, model: M) -> M:
        """Patch a model with :attr:`method`, in place; returns it."""
        patched: M = api.apply(model, self.method)
        return patched

    def save(self, folder: str | Path) -> Path:
        """Write everything into a folder, which :meth:`load` reads, and :func:`tokred.load` for the method alone."""
        path = settings.save(self.method, folder)
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        found |= {"method": self.method.to_dict(), "goal": [self.goal.kind, self.goal.value]}
        (path / FILE).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Tuned:
        """The result that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is broken.
        """
        path = Path(folder) / FILE
        if not path.exists():
            raise FileNotFoundError(f"{folder} holds no {FILE}: give a folder that Tuned.save has written")
        try:
            found = json.loads(path.read_text("utf-8"))
            kind, value = found["goal"]
            return cls(**{**found, "method": from_dict(found["method"]), "goal": Goal(kind, value)})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not what Tuned.save writes: {error!r}") from error

    # ------------------------------------------------------------------ to look at

    @property
    def _percent(self) -> bool:
        return self.metric in SHARES

    def _number(self, value: float) -> str:
        return f"{100 * value:.1f}" if self._percent else f"{value:.4g}"

    def _between(self, row: dict[str, Any], name: str) -> str:
        """A difference with its interval, in points, or per cent of a perplexity."""
        if row.get(name) is None:
            return ""
        hundred = self._percent or self.metric == "perplexity"
        found = [row[k] for k in (name, f"{name}_low", f"{name}_high") if row.get(k) is not None]
        shown = [f"{100 * v:+.1f}" if hundred else f"{v:+.2g}" for v in found]
        if len(shown) < 3:
            return shown[0]
        between = f"{shown[0]} [{shown[1]}, {shown[2]}]"
        half = (found[2] - found[1]) / 2 * (100 if hundred else 1)
        return between if len(between) <= ROOM else f"{shown[0]} ± {half:.1g}"

    def _cells(self, row: dict[str, Any]) -> list[str]:
        memory = "" if row.get("memory") is None else f"{row['memory']:.0%}"
        difference = "" if row["role"] == "unpatched" else self._between(row, "difference")
        return [self._number(row["quality"]), difference, self._between(row, "gain"), f"{row['speedup']:.2f}x", memory]

    @property
    def title(self) -> str:
        """Model, goal and metric, in one line."""
        units = " in %, differences in points" if self._percent else ""
        units = ", differences in %" if self.metric == "perplexity" else units
        return f"{self.model}, {self.goal}: {self.metric}{units}, on {self.rows[0]['samples']} held-out samples"

    def __str__(self) -> str:
        def line(cells: list[str]) -> str:
            role, quality, loss, gain, speed, memory = cells
            return f"{role:<14} {quality:>8} {loss:>20} {gain:>20} {speed:>7} {memory:>6}".rstrip()

        lines = [*textwrap.wrap(self.title, 80)]
        lines.append(line(["", "quality", "to unpatched", "to constant", "speed", "bytes"]))
        for row in self.rows:
            lines.append(line([ROLES[row["role"]], *self._cells(row)]))
        lines.append("")
        for sentence in self.why:
            lines += textwrap.wrap(sentence, 80)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """A table for notebooks, with the reasons below."""
        heads = ("", "setting", "quality", "to unpatched [95 %]", "to constant [95 %]", "speed", "bytes")
        cells = [
            [ROLES[row["role"]], f"{row['method']} {row['setting']}".strip(), *self._cells(row)] for row in self.rows
        ]
        why = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self.why)
        return page(self.title, heads, cells) + why

    def to_pandas(self) -> Any:
        """:attr:`rows` and :attr:`front` as one ``pandas.DataFrame``.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("Tuned.to_pandas needs pandas: pip install 'tokred[tune]', or use Tuned.rows") from error
        return pd.DataFrame([*self.rows, *({**row, "role": f"front, {row['role']}"} for row in self.front)])

    def plot(self, path: str | Path) -> Path:
        """Draw quality against speed: the chosen setting, the best constant one, and the front.

        Args:
            path: a picture's, such as ``"tuned.png"``; its folder is made.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from tokred.tuning.picture import draw

        return draw(self, Path(path))

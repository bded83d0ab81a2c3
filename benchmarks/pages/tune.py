"""``tokred.tune`` beside the best constant schedule: a table by model and seed, what it says in words, and the plot."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from benchmarks.pages.markdown import Record, Results, between, percent, source, table, value

WINGS = {"embedded": "encoder", "dinov2": "encoder", "smollm2-135m": "kv"}
LEVEL = -0.02  # of the constant setting's speed: what is not slower by more counts as equally fast
POINT = 0.01  # of top-1, of a cosine, or of the perplexity's ratio


class Pair(NamedTuple):
    """One search: the rows of the chosen and of the constant setting on the samples that were held out."""

    model: str
    seed: int
    chosen: Record
    constant: Record

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, else -1."""
        return -1 if self.chosen["scored_by"] == "perplexity" else 1

    @property
    def gain(self) -> float:
        """What the chosen setting has more of the metric, in its good direction; 0 where it is the constant one."""
        return self.sign * float(self.chosen.get("gain", 0.0))

    @property
    def level(self) -> bool:
        """True if the chosen setting took no more time."""
        return bool(self.chosen.get("beside", 1.0) - 1 >= LEVEL)

    @property
    def beyond(self) -> bool:
        """True if the interval of the gain is on its good side."""
        ends = [self.sign * self.chosen[f"gain_{end}"] for end in ("low", "high") if f"gain_{end}" in self.chosen]
        return bool(ends) and min(ends) > 0

    @property
    def reached(self) -> bool:
        """True if the gain is a point, or half of what the constant setting loses, at equal time."""
        point = self.gain >= POINT
        loss = -self.sign * self.constant["difference"]
        return self.level and self.beyond and (point or -self.sign * self.chosen["difference"] <= loss / 2)


def pairs(found: Results) -> list[Pair]:
    """All searches, by model and seed."""
    made = []
    for model, wing in WINGS.items():
        rows = {str(r["case"]): r for r in found.records(wing, "tune", model=model)}
        seeds = sorted(int(case.partition("-")[2]) for case in rows if case.startswith("chosen-"))
        made += [Pair(model, s, rows[f"chosen-{s}"], rows[f"constant-{s}"]) for s in seeds]
    return made


def _shown(pair: Pair, record: Record, metric: str) -> str:
    hundred = pair.chosen["scored_by"] != "cosine"
    return between(record, metric, "{:+.1f}" if hundred else "{:+.3f}", 100 if hundred else 1)


def tune(found: Results) -> str:
    """The table, and where it comes from."""
    lines, sources = [], dict[str, None]()
    for pair in pairs(found):
        chosen, constant, metric = pair.chosen, pair.constant, str(pair.chosen["scored_by"])
        unit = {"top1": "top-1, points", "perplexity": "perplexity, %"}.get(metric, metric)
        gain = _shown(pair, chosen, "gain") if "gain" in chosen else "the constant one"
        beside = between(chosen, "beside") if "beside" in chosen else ""
        held = percent(chosen.get("bytes_share"), digits=0)
        lines.append([
            pair.model, str(pair.seed), f"`{constant['method']} {constant['setting']}`".replace(" `", "`"), unit,
            _shown(pair, constant, "difference"), _shown(pair, chosen, "difference"), gain,
            f"{value(chosen, 'speedup').value:.2f}", beside, held, str(chosen["difference_count"]),
        ])  # fmt: skip
        sources[f"{pair.model}: {source(chosen)}"] = None
    if not lines:
        return "No search has been measured."
    header = [
        "model", "seed", "constant setting", "metric", "constant", "chosen", "gain of the chosen", "speed",
        "over the constant's", "bytes, %", "samples",
    ]  # fmt: skip
    text = table(header, lines, 4)
    return f"{text}\n\n" + "\n".join(f"- {line}" for line in sources)


def tune_claims(found: Results) -> str:
    """How many searches reach the target, by model."""
    lines = []
    every = pairs(found)
    for model in dict.fromkeys(pair.model for pair in every):
        mine = [pair for pair in every if pair.model == model]
        n = len(mine)
        slow = [str(pair.seed) for pair in mine if not pair.level]
        text = (
            f"- {model}, {n} of three seeds: better than the constant setting beyond chance in "
            f"{sum(pair.beyond for pair in mine)} of {n}, by half of the loss or a point at equal time in "
            f"{sum(pair.reached for pair in mine)} of {n}."
        )
        lines.append(text + (f" Slower than the constant one: seed {', '.join(slow)}." if slow else ""))
    lines += [f"- {model}: not measured." for model in WINGS if model not in {pair.model for pair in every}]
    return "\n".join(lines)


def plot(found: Results, folder: Path) -> list[Path]:
    """What the constant and the chosen setting lose in each search, a panel a model."""
    from tokred.analysis.viz.canvas import save, subplots

    every = pairs(found)
    models = list(dict.fromkeys(pair.model for pair in every))
    if not models:
        return []
    figure, axes = subplots(1, len(models), figsize=(4 * len(models), 3.4), layout="constrained", squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        mine = [pair for pair in every if pair.model == model]
        metric = str(mine[0].chosen["scored_by"])
        times = 1 if metric == "cosine" else 100
        for shift, role, colour in ((-0.08, "constant", "C1"), (0.08, "chosen", "C0")):
            for i, pair in enumerate(mine):
                row = pair.constant if role == "constant" else pair.chosen
                v, low, high = (times * row[f"difference{end}"] for end in ("", "_low", "_high"))
                label = role if i == 0 else None
                axis.errorbar(i + shift, v, yerr=[[v - low], [high - v]], fmt="o", color=colour, capsize=3, label=label)
        axis.axhline(0, color="0.6", lw=0.8)
        axis.set_xticks(range(len(mine)), [f"seed {pair.seed}\n{_beside(pair)}" for pair in mine], fontsize=8)
        axis.set_xlim(-0.5, len(mine) - 0.5)
        units = {"top1": "top-1, points", "perplexity": "perplexity, %"}.get(metric, metric)
        axis.set_ylabel(f"{units}, to the unpatched", fontsize=8)
        axis.set_title(f"{model}, held-out samples", fontsize=9)
        axis.legend(fontsize=8)
        axis.set_xlabel("below the seed: speed over the constant setting's", fontsize=7)
    return [save(figure, folder / "tune.png")]


def _beside(pair: Pair) -> str:
    return f"{pair.chosen.get('beside', 1.0):.2f}x"

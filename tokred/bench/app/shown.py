"""A trial as HTML: answers before and after, time, tokens, multiply-adds; every name in it is escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence

from tokred.bench.app.trials import Clock, Guess, Trial

STYLE = """
.tokred {display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(190px, 100%), 1fr));}
.tokred > section {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 14px; min-width: 0;}
.tokred h3 {font-size: 0.85rem; font-weight: 600; margin: 0 0 4px; opacity: 0.8;}
.tokred .big {font-size: 1.5rem; font-weight: 600; line-height: 1.3; margin: 0;}
.tokred p {margin: 2px 0 0; overflow-wrap: anywhere;}
.tokred small {opacity: 0.8; font-size: 0.85rem; display: block; line-height: 1.4;}
.tokred .guess {display: grid; grid-template-columns: 1fr auto; gap: 0 8px; margin-top: 6px; font-size: 0.95rem;}
.tokred .bar {grid-column: 1 / 3; height: 5px; border-radius: 3px; background: var(--border-color-primary);}
.tokred .bar > i {display: block; height: 100%; border-radius: 3px; background: var(--color-accent);}
.tokred-error {border-left: 4px solid #b42318; background: #fef3f2; color: #7a271a; padding: 10px 14px;
  border-radius: 4px; overflow-wrap: anywhere;}
.tokred-note {font-size: 0.9rem; overflow-wrap: anywhere;}
.tokred-blocks {overflow-x: auto; max-width: 100%;}
.tokred-blocks :is(td, th) {padding: 3px 8px !important;}
.tokred-captions {display: grid; grid-template-columns: 1fr 1fr; gap: 16px; text-align: center; font-size: 0.9rem;}
"""


def answers(trial: Trial) -> str:
    """The model's answers without and with the method, and whether the first one is the same."""
    if not trial.before:
        return _grid(
            _tile(
                "Answer",
                f"cosine {trial.cosine:.3f}",
                "The model has no classifier: its output with the method, beside that without (1: the same).",
            )
        )
    same = trial.before[0].name == trial.after[0].name
    said = "the same answer" if same else "another answer"
    return _grid(
        _guesses("Answer of the whole model", trial.before, ""),
        _guesses(f"Answer with {trial.setting}", trial.after, f"{said}; cosine of the logits {trial.cosine:.3f}"),
    )


def numbers(trial: Trial, clock: Clock | None) -> str:
    """Tiles of time, tokens and multiply-adds; without a clock the time is being measured."""
    before, after = trial.tokens
    dense, left = trial.macs
    return _grid(
        _time(clock),
        _tile("Tokens", f"{before} → {after}", "before the first block, and after the last one"),
        _tile(
            "Multiply-adds of the blocks",
            f"{left / dense:.0%}",
            f"{_macs(dense)} → {_macs(left)}, counted at the tokens of this picture",
        ),
    )


def blocks(trial: Trial) -> str:
    """Tokens and multiply-adds of every block, as a table."""
    run, base = trial.recording.runs[0], trial.recording.base
    rows = "".join(
        f'<tr><th scope="row">{i + 1}</th><td>{int(run.tokens[0, i])}</td><td>{int(run.tokens[0, i + 1])}</td>'
        f"<td>{_share(int(run.macs[0, i + 1] - run.macs[0, i]), base[i + 1] - base[i])}</td></tr>"
        for i in range(trial.recording.depth)
    )
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("block", "tokens in", "tokens out", "multiply-adds"))
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="tokred-blocks">{table}</div>'


def error(text: str) -> str:
    """A mistake in the input, told on the page."""
    return f'<div class="tokred-error" role="alert">{html.escape(" ".join(text.split()))}</div>'


def notes(trial: Trial) -> str:
    """Warnings of a trial; empty where there are none."""
    if not trial.notes:
        return ""
    return f'<p class="tokred-note" role="status">{html.escape(" ".join(trial.notes))}</p>'


def _time(clock: Clock | None) -> str:
    if clock is None:
        return _tile("Time", "measuring …", "")
    ratio = clock.ratio
    word = "as fast" if ratio.median >= 1 else "as fast, which is slower"
    doubt = "" if clock.told else "; no difference that could be told here"
    pictures = "1 picture" if clock.batch == 1 else f"{clock.batch} copies of the picture"
    return _tile(
        "Time",
        f"{ratio.median:.2f}× {word}",
        f"quartiles {ratio.low:.2f} to {ratio.high:.2f} over {clock.rounds} pairs in random order{doubt}",
        f"medians {_ms(clock.before.median)} → {_ms(clock.after.median)} for {pictures} ({html.escape(clock.place)})",
    )


def _guesses(title: str, found: Sequence[Guess], below: str) -> str:
    rows = "".join(
        f'<div class="guess"><span>{html.escape(one.name)}</span><span>{one.share:.1%}</span>'
        f'<span class="bar"><i style="width: {100 * one.share:.1f}%"></i></span></div>'
        for one in found
    )
    note = f"<small>{html.escape(below)}</small>" if below else ""
    return f"<section><h3>{html.escape(title)}</h3>{rows}{note}</section>"


def _tile(title: str, big: str, *small: str) -> str:
    lines = "".join(f"<small>{line}</small>" for line in small if line)
    return f'<section><h3>{title}</h3><p class="big">{big}</p>{lines}</section>'


def _grid(*sections: str) -> str:
    return f'<div class="tokred">{"".join(sections)}</div>'


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _macs(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"

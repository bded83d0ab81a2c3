"""The page of ``tokred app``: a picture, a method and an amount on one side, what becomes of them on the other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokred.analysis.viz import draw
from tokred.bench.app import amounts, shown
from tokred.bench.app.trials import Picture, Trial, Trials
from tokred.bench.sources import NoModelError
from tokred.errors import TokredError

BATCHES = (1, 4, 16, 64)  # copies of the picture in a forward that is timed
USUAL_BATCH = 16
FIRST = "tome"
UPLOAD = "20mb"
# RuntimeError: torch's, such as too little memory for so many copies.
WRONG = (TokredError, NoModelError, ValueError, TypeError, OSError, ImportError, RuntimeError)

INTRO = "Pick a picture, a method and an amount: what became of every patch, what the model answers, and what it costs."
COLOURS = (
    "Patches that became one token share colour and outline; a patch without an outline is still alone; dark, crossed "
    "patches were pruned."
)
HOW = """
**keep** is the share of the model's multiply-adds that is left. The page finds the parameters that come nearest to it
and writes them into the field **parameters**, which can be changed by hand as well: `r=13`, `ratio=0.9 margin=0.8`,
`r=(16,-1)`. Press Enter to try them.

**Time** is a ratio: the model without and with the method run in turns, in random order, on as many copies of the
picture as are chosen; the median of the pairs' ratios and its quartiles are shown. Patching is not timed. Small models
and single pictures gain little or nothing, since what the method itself does takes time as well. It is the time on the
machine that runs this page, with whatever else runs there.

**Multiply-adds** are those of the blocks, at the tokens that this picture had in each.
"""


def gradio() -> Any:
    """The library, told to call nobody.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    # Read when it is imported: otherwise it asks its makers' server for its newest version.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as library
    except ImportError as error:
        raise ImportError("tokred app needs gradio: pip install 'tokred[app]'") from error
    return library


@dataclass
class Page:
    """The functions that the page's events call; nothing in it knows a browser.

    Attributes:
        trials: the model.
        pictures: of the gallery.
        seconds: that a timing is meant to take.
    """

    trials: Trials
    pictures: Sequence[Picture]
    seconds: float = 2.0

    def settle(self, method: str, keep: float) -> tuple[str, bool]:
        """Parameters for an amount, and True; or usual ones, and False, where the method has no single amount."""
        found = amounts.settle(self.trials.subject, method, keep)
        return (amounts.usual(method, self.trials.depth), False) if found is None else (found, True)

    def picture(self, chosen: int | None, own: str | None) -> Picture:
        """The user's own picture, or the chosen one of the gallery.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        if own is not None:
            return self.trials.picture(own)
        if chosen is None or not 0 <= chosen < len(self.pictures):
            raise ValueError("no picture yet: upload one")
        return self.pictures[chosen]

    def tried(
        self, chosen: int | None, own: str | None, method: str, parameters: str, batch: int
    ) -> Iterator[tuple[str, Trial | None, str]]:
        """A setting on a picture: first without the time, then with it.

        Yields:
            The error as HTML (empty: none), the trial, and the numbers as HTML.
        """
        try:
            setting = amounts.setting(method, parameters)
            picture = self.picture(chosen, own)
            trial = self.trials.run(picture, setting)
            yield "", trial, shown.numbers(trial, None)
            yield "", trial, shown.numbers(trial, self.trials.clock(picture, setting, int(batch), self.seconds))
        except WRONG as error:
            yield shown.error(str(error) or type(error).__name__), None, ""


def seen(trial: Trial) -> Any:
    """The picture as it was, at the size that patches are drawn at."""
    return draw.enlarge(trial.recording.pixels[0], trial.recording.grid)


def painted(trial: Trial, stage: int) -> Any:
    """The picture after so many blocks; 0: before the first one."""
    recording = trial.recording
    stage = min(max(int(stage), 0), recording.depth)
    return draw.paint_groups(recording.pixels[0], recording.runs[0].groups[0, stage], recording.grid)


def caption(trial: Trial, stage: int) -> str:
    """The tokens that are left after so many blocks, as HTML."""
    tokens, stage = trial.recording.runs[0].tokens[0].tolist(), int(stage)
    said = f"after {stage} block{'s' if stage > 1 else ''}: {tokens[stage]} of {tokens[0]} tokens"
    right = said if stage else f"before the first block: {tokens[0]} tokens"
    return f'<div class="tokred-captions"><span>the picture</span><span>{right}</span></div>'

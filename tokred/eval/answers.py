"""``Answers``: what each row answered to each batch of prompts, kept while a run is on, so that it can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = "answers.jsonl"


class Answers:
    """Answers and times of batches, a line each in a file.

    Args:
        folder: that the file is in, made where it is not there; None: nothing is kept.
        head: names model and machine; lines of others are left alone.
    """

    def __init__(self, folder: Path | None, head: str = "") -> None:
        self.path, self._head = None if folder is None else folder / FILE, head
        self._known: dict[str, dict[str, Any]] = {}
        if folder is None or self.path is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for line in self.path.read_text("utf8").splitlines() if self.path.exists() else ():
            try:
                found = json.loads(line)
            except json.JSONDecodeError:  # broken off in its middle
                continue
            if found.get("head") == head:
                self._known[found["key"]] = found["value"]

    def get(self, key: str) -> dict[str, Any] | None:
        """The value that was kept, or None."""
        return self._known.get(key)

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Keep a value of plain lists and numbers."""
        if self.path is None:
            return
        # A line that was broken off has no end: an empty one behind it does no harm.
        line = json.dumps({"head": self._head, "key": key, "value": value})
        with self.path.open("a", encoding="utf8") as file:
            file.write(f"\n{line}\n")

    def clear(self) -> None:
        """Remove the file: the run is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def key_of(label: str, requests: Sequence[Any]) -> str:
    """Name of a row's answers to some requests of lm-eval, by what they ask."""
    asked = [(str(r.task_name), str(r.doc_id), str(r.idx), repr(r.args)) for r in requests]
    return hashlib.sha256(json.dumps([label, asked]).encode()).hexdigest()[:24]

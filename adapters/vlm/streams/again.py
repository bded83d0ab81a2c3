"""Changes that are made and taken back many times: a stream touches its model while it looks or answers, and no longer.

Between two frames the model is as it was, so that several streams with other settings, and whoever else uses it, do not
meet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from tokred.adapters.changes import Changes
from tokred.adapters.swap import Body, Standin


class Again(Changes):
    """Changes that remember how they were made."""

    def __init__(self) -> None:
        super().__init__()
        self._makers: list[Any] = []

    def swap(self, module: nn.Module, body: Body, settings: Any) -> None:
        self._make(partial(super().swap, module, body, settings))

    def before(self, module: nn.Module, hook: Any, *, with_kwargs: bool = False) -> None:
        self._make(partial(super().before, module, hook, with_kwargs=with_kwargs))

    def after(self, module: nn.Module, hook: Any, *, with_kwargs: bool = False, always_call: bool = False) -> None:
        self._make(partial(super().after, module, hook, with_kwargs=with_kwargs, always_call=always_call))

    def stand(self, module: nn.Module, name: str, standin: Standin) -> None:
        self._make(partial(super().stand, module, name, standin))

    def add(self, make: Any) -> None:
        """Something else to be made: a function without arguments, which one of the other changes takes back."""
        self._make(make)

    def _make(self, make: Any) -> None:
        make()
        self._makers.append(make)

    def undo(self) -> None:
        """Take everything back; it can be made again."""
        super().undo()
        self.undos = []

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside, everything is made anew."""
        try:
            for make in self._makers:
                make()
            yield
        finally:
            self.undo()

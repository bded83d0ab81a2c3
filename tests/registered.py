"""The settings by which law tests run every method: a new row of the registry is in all of their tables."""

from __future__ import annotations

from typing import Any

from tokred.core.registry import methods
from tokred.core.site import Stage


def examples(stage: Stage) -> dict[str, dict[str, Any]]:
    """Settings that remove something, of every method that acts at a stage."""
    return {name: dict(cls.example) for name, cls in methods.of(stage).items()}


def stored() -> tuple[str, ...]:
    """Policies for caches that evict nothing and hold all rows in a store of their own: formats, tiers and searches."""
    made = {name: cls(**cls.example).parts for name, cls in methods.of("cache").items()}
    return tuple(name for name, parts in made.items() if parts.budget.full)


def nothings(stage: Stage) -> dict[str, dict[str, Any]]:
    """Settings that remove nothing, of every method at a stage that has such."""
    return {name: dict(cls.nothing) for name, cls in methods.of(stage).items() if cls.nothing is not None}

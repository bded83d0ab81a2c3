"""Amounts for methods that are named alone: equal work, equal budgets, or what the method's own example has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokred import api
from tokred.bench import arms
from tokred.bench.sources.record import Source
from tokred.core.registry import methods as registered
from tokred.core.settings import parse_setting

SHARES = (0.75, 0.5)


def chosen(
    source: Source, typed: Sequence[Sequence[str]], shares: Sequence[float]
) -> tuple[list[list[str]], list[str]]:
    """Settings to measure, each the list of those that act together, and lines on what was left out.

    Args:
        source: the model.
        typed: what the user names; empty: what is usual for the kind of model, as far as it runs on this one. A method
            that is named alone and without settings is measured at each share.
        shares: of the unpatched model's multiply-adds, or of the cache.

    Raises:
        UnknownMethodError, TypeError, ValueError, MissingInputError, UnsupportedModelError: a method does not fit.
    """
    left: list[str] = []
    if not typed:
        rows = {row.method: row for row in api.supports(source.module)}
        usual = source.usual.methods
        runs = [name for name in usual if name in rows and rows[name].works]
        left = [f"left out: {name}: {rows[name].reason}" for name in usual if name in rows and name not in runs]
        if not runs:
            raise ValueError(
                f"none of {', '.join(usual)} runs on {source.name}: {left[0]}" if left else "no method runs"
            )
        typed = [[name] for name in runs]
    found: list[list[str]] = []
    for parts in typed:
        bare = len(parts) == 1 and not parse_setting(parts[0])[1]
        found += [[text] for text in spread(source, parts[0], shares)] if bare else [list(parts)]
    return [list(one) for one in dict.fromkeys(tuple(parts) for parts in found)], left


def spread(source: Source, name: str, shares: Sequence[float]) -> list[str]:
    """Settings of a method at shares of the work or of the cache; where there is no measure for that, its example."""
    method = registered.get(name)
    if method.stage == "block":
        try:
            arms.knob(name)
        except ValueError:
            return [_example(name)]
        if source.shape is None:
            return [_example(name)]
        full = arms.unpatched(source.module, source.shape).macs
        found = arms.ladder(source.module, source.shape, [name], [int(full * share) for share in shares])
        return [arm.label for arm in found]
    fields = getattr(method, "__dataclass_fields__", {})
    if method.stage == "cache" and isinstance(getattr(fields.get("budget"), "default", None), float):
        return [f"{name} budget={share:g}" for share in shares]
    return [_example(name)]


def _example(name: str) -> str:
    example: dict[str, Any] = dict(registered.get(name).example)
    return " ".join([name, *(f"{k}={_typed(v)}" for k, v in example.items())])


def _typed(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")

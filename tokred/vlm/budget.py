"""Budgets: how many of an image's tokens may stay, as a number or as a share."""

from __future__ import annotations

Budget = int | float


def as_budget(value: object, name: str = "budget") -> Budget:
    """A number of tokens, or a share of them, checked.

    Args:
        value: an integer of at least 1, or a float in (0, 1].
        name: of the argument, for the message.

    Raises:
        ValueError: it is neither.
    """
    if is_number(value, 1) or (isinstance(value, float) and 0 < value <= 1):
        return value  # type: ignore[return-value]
    raise ValueError(
        f"{name} must be a number of tokens (an integer of at least 1) or a share in (0, 1], got {value!r}"
    )


def is_number(value: object, low: int = 0) -> bool:
    """Whether ``value`` is an integer of at least ``low`` (True and False are none)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def check_number(value: object, name: str, low: int = 0) -> None:
    """Refuse what is no integer of at least ``low``.

    Raises:
        ValueError: naming the argument and what was given.
    """
    if not is_number(value, low):
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


def count_of(budget: Budget, n: int, name: str = "budget") -> int:
    """How many of ``n`` tokens a budget leaves: the number, at most ``n``, or the rounded share (half to even).

    Raises:
        ValueError: the share is less than one token.
    """
    if isinstance(budget, int):
        return min(budget, n)
    kept = round(round(n * budget, 9))
    if kept < 1 <= n:
        raise ValueError(f"{name} is {budget:g}, which leaves none of {n} tokens; at least one has to stay")
    return min(kept, n)

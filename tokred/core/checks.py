"""Checks of parameters: each takes the value, then the name of its argument, then what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence


def check_choice(value: object, name: str, allowed: Collection[str]) -> None:
    """Refuse a value that is not among the allowed ones.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")


def is_count(value: object, least: int = 0) -> bool:
    """True if ``value`` is an integer of at least ``least``; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_count(value: object, name: str, least: int = 0) -> None:
    """Refuse what is no integer of at least ``least``.

    Raises:
        ValueError: naming the argument and what was given.
    """
    if not is_count(value, least):
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_flags(**flags: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        TypeError: naming the argument and what was given.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def check_integer(value: object, name: str) -> None:
    """Refuse what is no integer, such as for a seed.

    Raises:
        TypeError: naming the argument and what was given.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def check_number(value: object, name: str) -> float:
    """Refuse what is no finite number; returns it as a float.

    Raises:
        ValueError: naming the argument and what was given.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def check_share(value: object, name: str, *, zero: bool = False) -> None:
    """Refuse what is not a number in (0, 1], or in [0, 1] where ``zero`` is allowed.

    Raises:
        ValueError: naming the argument and what was given.
    """
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not (number == 0 and zero) and not 0 < number <= 1:
        raise ValueError(f"{name} must lie in {'[' if zero else '('}0, 1], got {value!r}")


def check_ratio(value: object, name: str = "ratio") -> None:
    """Refuse what is no share in [0, 1): one that leaves nothing is none.

    Raises:
        TypeError, ValueError: naming the argument and what was given.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def check_blocks(blocks: Sequence[int] | None, name: str = "blocks") -> tuple[int, ...] | None:
    """A list of 0-based blocks as a tuple; None (the method's default places) stays None.

    Raises:
        TypeError: it is no list.
        ValueError: an entry is not a non-negative integer.
    """
    if blocks is None:
        return None
    given: object = blocks  # whatever its type says
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise TypeError(f"{name} must be a list of non-negative integers, got {blocks!r}")
    listed = tuple(blocks)
    if not all(is_count(b) for b in listed):
        raise ValueError(f"{name} must be non-negative integers, got {blocks!r}")
    return listed


def check_blocks_exist(blocks: tuple[int, ...] | None, depth: int, name: str = "blocks") -> None:
    """Refuse a list that names a block the model does not have.

    Raises:
        ValueError: with the blocks that do not exist.
    """
    late = [b for b in blocks or () if b >= depth]
    if late:
        raise ValueError(f"{name} names {late}, but the model has {depth} blocks (0 to {depth - 1})")

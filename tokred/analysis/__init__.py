"""Analysis: what tokens contribute, what a method will do to a model, pictures of what became of tokens."""

from typing import Any


def __getattr__(name: str) -> Any:
    """The function of that name; its file is imported when it is first used."""
    if name == "horizon":
        from tokred.analysis.information import horizon

        return horizon
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

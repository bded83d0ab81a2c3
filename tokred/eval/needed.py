"""Optional packages of the harnesses, and methods as a harness's command line writes them."""

from __future__ import annotations

import importlib
from typing import Any

from tokred.bench.entries import Entry, entry
from tokred.core.method import Method
from tokred.core.settings import split_settings


def need(module: str, what: str, install: str = "pip install 'tokred[eval]'") -> Any:
    """An optional module.

    Raises:
        ImportError: it is not installed; the message says what needs it, and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{what} needs {error.name or module}: {install}") from error


def typed_methods(text: str) -> list[Method]:
    """The methods of one argument: ``"snapkv budget=0.25"``, several with ``" + "`` between them.

    Raises:
        UnknownMethodError, TypeError, ValueError: there is no such method, or a parameter does not fit.
    """
    parts = split_settings(text)
    found: Entry = entry(parts if len(parts) > 1 else parts[0])
    if not found.methods:
        raise ValueError(f"method is {text!r}, which names no method: such as 'snapkv budget=0.25'")
    return list(found.methods)

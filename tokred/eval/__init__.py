"""Harnesses of others: lm-eval and lmms-eval on patched models, timm's columns, VTC-Bench's split, questions on texts.

``tokred.eval.lm_eval`` and the other names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "ContextQA": "context",
    "Harness": "table",
    "Split": "split",
    "context_qa": "context",
    "lm_eval": "language",
    "read_samples": "split",
    "string_match": "context",
    "timm_columns": "timm_table",
    "vtc_split": "split",
}

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})

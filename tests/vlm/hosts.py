"""The tiny models with vision of every family, with prompts for them, and variants that only tests need."""

from __future__ import annotations

from typing import Any

from tokred.adapters.tiny.vlm import FAMILIES as HOSTS
from tokred.adapters.tiny.vlm import Rows, build, layers, make, prompts, ready

__all__ = ["HOSTS", "Rows", "build", "gemma3", "layers", "llava", "paligemma", "prompts", "qwen2_vl", "ready"]


def _text(name: str, **more: Any) -> Any:
    """A model with other options for its language model."""
    return make(name, text_config={**HOSTS[name].options["text_config"], **more})


def llava(text: Any = None) -> Any:
    """LLaVA, around a language model of this configuration."""
    return make("llava") if text is None else make("llava", text_config=text)


def qwen2_vl(**more: Any) -> Any:
    """Qwen2-VL."""
    return _text("qwen2_vl", **more)


def paligemma(**more: Any) -> Any:
    """PaliGemma."""
    return _text("paligemma", **more)


def gemma3(window: int = 128) -> Any:
    """Gemma 3 with other windows."""
    return _text("gemma3", sliding_window=window)

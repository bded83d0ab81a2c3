"""lmms-eval's models with methods on them: ``--model tokred`` and ``tokred_NAME``, which lmms-eval finds by itself.

    lmms-eval --model tokred_qwen3_vl --tasks mme \\
        --model_args "pretrained=Qwen/Qwen3-VL-4B-Instruct,method=divprune budget=0.25"

The entry point group ``lmms_eval.models`` names :func:`manifests`. The classes themselves are made when lmms-eval asks
this module for one: each is a subclass of a chat class of lmms-eval, which applies the methods to the model it loaded.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from tokred import api
from tokred.eval.needed import need, typed_methods

INSTALL = "pip install lmms-eval"
# Chat classes of lmms-eval around models of transformers, by the name under which lmms-eval knows them.
BASES = (
    "huggingface", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen2_5_omni", "llava_hf", "llava_onevision1_5", "internvl_hf",
    "lfm2_5_vl",
)  # fmt: skip


def manifests() -> list[Any]:
    """The manifests of lmms-eval's registry: ``tokred`` over its class for any model, and one over each other."""
    registry = need("lmms_eval.models.registry_v2", "the models of lmms-eval", INSTALL)
    found = [registry.ModelManifest(f"tokred_{base}", chat_class_path=f"{__name__}.{base}") for base in BASES]
    return [registry.ModelManifest("tokred", chat_class_path=f"{__name__}.{BASES[0]}"), *found]


@functools.cache
def patched(base: type[Any]) -> type[Any]:
    """A chat class of lmms-eval that takes ``method`` beside its own arguments.

    Args:
        base: the class; once made, its objects hold the model in ``model``.
    """

    class Patched(base):  # type: ignore[misc]  # lmms-eval has no types
        """Applies ``method``, ``"divprune budget=0.25"`` or several, once the model is loaded."""

        is_simple = False

        def __init__(self, *arguments: Any, method: str = "", **options: Any) -> None:
            # A name that does not exist is told of before gigabytes are loaded.
            methods = typed_methods(str(method)) if method else []
            super().__init__(*arguments, **options)
            if methods:
                api.apply(self.model, methods)

    Patched.__name__ = Patched.__qualname__ = f"Patched{base.__name__}"
    return Patched


def __getattr__(name: str) -> Any:
    """The class over lmms-eval's ``name``."""
    if name not in BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    models = need("lmms_eval.models", "the models of lmms-eval", INSTALL)
    module, _, kind = models.get_model_manifest(name).chat_class_path.rpartition(".")
    return patched(getattr(importlib.import_module(module), kind))

"""tokred: token reduction for transformers.

    tokred.apply(model, "tome", r=16)     # in place; the model now runs with fewer tokens
    tokred.remove(model)                  # bit for bit the model it was

Importing tokred imports torch and nothing else; a host library is imported when one of its models is patched, triton
when a kernel is first launched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokred import methods as _methods  # registers the built-in names
from tokred.api import Flops, Report, Support, applied, apply, flops, make, methods, remove, report, supports, trace
from tokred.errors import (
    MissingInputError,
    NothingRecordedError,
    TokenStateError,
    TokredError,
    UnknownMethodError,
    UnsupportedModelError,
)
from tokred.method import Method, from_dict
from tokred.reduction import Reduction
from tokred.registry import register
from tokred.site import Site

if TYPE_CHECKING:
    from tokred.methods.algm import ALGM
    from tokred.methods.ats import ATS
    from tokred.methods.evit import EViT
    from tokred.methods.kth import KthMerge
    from tokred.methods.pitome import PiToMe
    from tokred.methods.ppt import PPT
    from tokred.methods.random import RandomMerge, RandomPrune
    from tokred.methods.saint import SAINT
    from tokred.methods.tinychart import TinyChart
    from tokred.methods.tofu import ToFu
    from tokred.methods.tokentm import TokenTMPrune
    from tokred.methods.tome import ToMe
    from tokred.methods.vomix import VoMix
    from tokred.methods.vtm import VTM
    from tokred.methods.zero_tprune import ZeroTPrune

__version__ = "0.1.0"

_CLASSES = {target.partition(":")[2]: target for target in _methods.TARGETS.values()}

__all__ = [
    "ALGM",
    "ATS",
    "PPT",
    "SAINT",
    "VTM",
    "EViT",
    "Flops",
    "KthMerge",
    "Method",
    "MissingInputError",
    "NothingRecordedError",
    "PiToMe",
    "RandomMerge",
    "RandomPrune",
    "Reduction",
    "Report",
    "Site",
    "Support",
    "TinyChart",
    "ToFu",
    "ToMe",
    "TokenStateError",
    "TokenTMPrune",
    "TokredError",
    "UnknownMethodError",
    "UnsupportedModelError",
    "VoMix",
    "ZeroTPrune",
    "__version__",
    "applied",
    "apply",
    "flops",
    "from_dict",
    "make",
    "methods",
    "register",
    "remove",
    "report",
    "supports",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Method classes by their own names (``tokred.ToMe``), imported when first used."""
    target = _CLASSES.get(name)
    if target is None:
        raise AttributeError(f"module 'tokred' has no attribute {name!r}")
    module, _, attribute = target.partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value

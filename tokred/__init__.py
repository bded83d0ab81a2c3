"""tokred: token reduction for transformers.

    tokred.apply(model, "tome", r=16)     # in place; the model now runs with fewer tokens
    tokred.remove(model)                  # bit for bit the model it was

Importing tokred imports torch and nothing else; a host library is imported when one of its models is patched, triton
when a kernel is first launched.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from tokred import methods as _methods  # registers the built-in names
from tokred.analysis.explain import Explanation, explain
from tokred.api import (
    Flops,
    Support,
    applied,
    apply,
    flops,
    kv_cache,
    list_methods,
    losses,
    modules,
    parameters,
    patched,
    remove,
    report,
    supports,
    trace,
)
from tokred.core import moved as _moved
from tokred.core import versions as _versions
from tokred.core.method import Method, from_dict
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.report import Report
from tokred.core.site import Site
from tokred.diffusion.site import AttentionSite
from tokred.errors import (
    BypassedError,
    MissingInputError,
    MovedWarning,
    NothingRecordedError,
    NothingRemovedWarning,
    PluginWarning,
    SettingWarning,
    TokenStateError,
    TokredError,
    TokredWarning,
    UnknownMethodError,
    UnknownModelError,
    UnsupportedModelError,
    UntestedVersionWarning,
)
from tokred.patch import change
from tokred.settings import load, make, push_to_hub, save
from tokred.settings.caches import blend, draft, load_cache, save_cache, share_prefix

__version__ = _versions.TOKRED

# As libraries should: whoever wants its lines sets up logging, everybody else hears nothing.
logging.getLogger("tokred").addHandler(logging.NullHandler())

# Of the package's own names, those that are imported when they are first used. The types of all names stand in
# ``__init__.pyi``, which .ci/stub.py writes from this file and the table of methods.
_LAZY = {
    "CacheReport": "tokred.kv.report:CacheReport",
    "ChunkStore": "tokred.adapters.kv.reuse.chunks:ChunkStore",
    "BlockMethod": "tokred.encoder.method:BlockMethod",
    "Place": "tokred.core.place:Place",
    "bench": "tokred.bench",
    "benchmark": "tokred.bench.benchmark:benchmark",
    "calibrate": "tokred.analysis.calibrate:calibrate",
    "cache_kwargs": "tokred.adapters.contract:cache_kwargs",
    "eval": "tokred.eval",
    "choose_tsp_layer": "tokred.analysis.tsp_layer:choose_tsp_layer",
    "horizon": "tokred.analysis.information:horizon",
    "kv": "tokred.kv",
    "learn": "tokred.learn",
    "stream": "tokred.settings.streams:stream",
    "tune": "tokred.tuning.run:tune",
    "viz": "tokred.analysis.viz",
}
_TARGETS = {**_LAZY, **{target.partition(":")[2]: target for target in _methods.TARGETS.values()}}

__all__ = [
    "AttentionSite",
    "BypassedError",
    "Explanation",
    "Flops",
    "Method",
    "MissingInputError",
    "MovedWarning",
    "NothingRecordedError",
    "NothingRemovedWarning",
    "PluginWarning",
    "Reduction",
    "Report",
    "SettingWarning",
    "Site",
    "Support",
    "TokenStateError",
    "TokredError",
    "TokredWarning",
    "UnknownMethodError",
    "UnknownModelError",
    "UnsupportedModelError",
    "UntestedVersionWarning",
    "__version__",
    "applied",
    "apply",
    "blend",
    "change",
    "draft",
    "explain",
    "flops",
    "from_dict",
    "kv_cache",
    "list_methods",
    "load",
    "load_cache",
    "losses",
    "make",
    "methods",
    "modules",
    "parameters",
    "patched",
    "push_to_hub",
    "register",
    "remove",
    "report",
    "save",
    "save_cache",
    "share_prefix",
    "supports",
    "trace",
]
__all__ += sorted(_TARGETS)

_moved.install()


def __getattr__(name: str) -> Any:
    """Method classes by their own names (``tokred.ToMe``), and packages, imported when first used."""
    target = _TARGETS.get(name)
    if target is None:
        raise AttributeError(f"module 'tokred' has no attribute {name!r}")
    module, _, attribute = target.partition(":")
    value = importlib.import_module(module)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_TARGETS})

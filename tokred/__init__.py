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
from tokred.api import (
    Flops,
    Report,
    Support,
    applied,
    apply,
    flops,
    make,
    methods,
    patched,
    remove,
    report,
    supports,
    trace,
)
from tokred.denoise import AttentionSite
from tokred.errors import (
    BypassedError,
    MissingInputError,
    NothingRecordedError,
    NothingRemovedWarning,
    TokenStateError,
    TokredError,
    TokredWarning,
    UnknownMethodError,
    UnknownModelError,
    UnsupportedModelError,
    UntestedVersionWarning,
)
from tokred.explaining import Explanation, explain
from tokred.hosts import CacheReport, kv_cache
from tokred.method import Method, from_dict
from tokred.reduction import Reduction
from tokred.registry import register
from tokred.site import Site

if TYPE_CHECKING:
    from tokred import kv
    from tokred.methods.adakv import AdaKV
    from tokred.methods.algm import ALGM
    from tokred.methods.asymrnr import AsymRnR
    from tokred.methods.ats import ATS
    from tokred.methods.cake import CAKE
    from tokred.methods.cat import CAT
    from tokred.methods.catome import CAToMe
    from tokred.methods.cdpruner import CDPruner
    from tokred.methods.criticalkv import CriticalKV
    from tokred.methods.divprune import DivPrune
    from tokred.methods.downsample import Downsample
    from tokred.methods.duoattention import DuoAttention
    from tokred.methods.evit import EViT
    from tokred.methods.expected_attention import ExpectedAttention
    from tokred.methods.fastervlm import FasterVLM
    from tokred.methods.fastkv import FastKV
    from tokred.methods.fastv import FastV
    from tokred.methods.flash_vl import FlashVL, Nemotron
    from tokred.methods.h2o import H2O
    from tokred.methods.hired import HiRED
    from tokred.methods.ibtm import IBTM
    from tokred.methods.keydiff import KeyDiff
    from tokred.methods.keyformer import Keyformer
    from tokred.methods.keymerge import KeyMerge
    from tokred.methods.knorm import KNorm
    from tokred.methods.kth import KthMerge
    from tokred.methods.kv import KVPolicy
    from tokred.methods.kvzip import KVzip
    from tokred.methods.lagkv import LagKV
    from tokred.methods.limited import Limited
    from tokred.methods.ltp import LTP
    from tokred.methods.observed_attention import ObservedAttention
    from tokred.methods.pitome import PiToMe
    from tokred.methods.ppt import PPT
    from tokred.methods.prumerge import PruMerge, PruMergePlus
    from tokred.methods.pyramiddrop import PyramidDrop
    from tokred.methods.pyramidkv import PyramidKV
    from tokred.methods.random import RandomMerge, RandomPrune
    from tokred.methods.random_evict import RandomEvict
    from tokred.methods.random_latent import RandomLatentPrune
    from tokred.methods.rpc import RPC
    from tokred.methods.saint import SAINT
    from tokred.methods.saint_vlm import SAINTLayer, SAINTVisual
    from tokred.methods.sdtm import SDTM
    from tokred.methods.snapkv import SnapKV
    from tokred.methods.sparsevlm import SparseVLM
    from tokred.methods.spatten import SpAtten
    from tokred.methods.squeezeattention import SqueezeAttention
    from tokred.methods.streaming_llm import StreamingLLM
    from tokred.methods.tinychart import TinyChart
    from tokred.methods.todo import ToDo
    from tokred.methods.tofu import ToFu
    from tokred.methods.tokentm import TokenTMPrune
    from tokred.methods.toma import ToMA
    from tokred.methods.tome import ToMe
    from tokred.methods.tomesd import ToMeSD
    from tokred.methods.topv import TopV
    from tokred.methods.tova import TOVA
    from tokred.methods.vidtome import VidToMe
    from tokred.methods.visionzip import VisionZip
    from tokred.methods.vispruner import VisPruner
    from tokred.methods.visual_baselines import DownsampleVisual, RandomVisual, UniformVisual
    from tokred.methods.vomix import VoMix
    from tokred.methods.vscan import VScan, VScanLayer
    from tokred.methods.vtm import VTM
    from tokred.methods.zero_tprune import ZeroTPrune
    from tokred.methods.zeromerge import ZeroMerge
    from tokred.propagation import choose_tsp_layer

__version__ = "0.1.0"

_CLASSES = {target.partition(":")[2]: target for target in _methods.TARGETS.values()}
_CLASSES["choose_tsp_layer"] = "tokred.propagation:choose_tsp_layer"

__all__ = [
    "ALGM",
    "ATS",
    "CAKE",
    "CAT",
    "H2O",
    "IBTM",
    "LTP",
    "PPT",
    "RPC",
    "SAINT",
    "SDTM",
    "TOVA",
    "VTM",
    "AdaKV",
    "AsymRnR",
    "AttentionSite",
    "BypassedError",
    "CAToMe",
    "CDPruner",
    "CacheReport",
    "CriticalKV",
    "DivPrune",
    "Downsample",
    "DownsampleVisual",
    "DuoAttention",
    "EViT",
    "ExpectedAttention",
    "Explanation",
    "FastKV",
    "FastV",
    "FasterVLM",
    "FlashVL",
    "Flops",
    "HiRED",
    "KNorm",
    "KVPolicy",
    "KVzip",
    "KeyDiff",
    "KeyMerge",
    "Keyformer",
    "KthMerge",
    "LagKV",
    "Limited",
    "Method",
    "MissingInputError",
    "Nemotron",
    "NothingRecordedError",
    "NothingRemovedWarning",
    "ObservedAttention",
    "PiToMe",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "PyramidKV",
    "RandomEvict",
    "RandomLatentPrune",
    "RandomMerge",
    "RandomPrune",
    "RandomVisual",
    "Reduction",
    "Report",
    "SAINTLayer",
    "SAINTVisual",
    "Site",
    "SnapKV",
    "SpAtten",
    "SparseVLM",
    "SqueezeAttention",
    "StreamingLLM",
    "Support",
    "TinyChart",
    "ToDo",
    "ToFu",
    "ToMA",
    "ToMe",
    "ToMeSD",
    "TokenStateError",
    "TokenTMPrune",
    "TokredError",
    "TokredWarning",
    "TopV",
    "UniformVisual",
    "UnknownMethodError",
    "UnknownModelError",
    "UnsupportedModelError",
    "UntestedVersionWarning",
    "VScan",
    "VScanLayer",
    "VidToMe",
    "VisPruner",
    "VisionZip",
    "VoMix",
    "ZeroMerge",
    "ZeroTPrune",
    "__version__",
    "applied",
    "apply",
    "choose_tsp_layer",
    "explain",
    "flops",
    "from_dict",
    "kv",
    "kv_cache",
    "make",
    "methods",
    "patched",
    "register",
    "remove",
    "report",
    "supports",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Method classes by their own names (``tokred.ToMe``), imported when first used."""
    if name == "kv":
        return importlib.import_module("tokred.kv")
    target = _CLASSES.get(name)
    if target is None:
        raise AttributeError(f"module 'tokred' has no attribute {name!r}")
    module, _, attribute = target.partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value

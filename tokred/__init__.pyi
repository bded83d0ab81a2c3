"""The names of ``tokred`` with their types: written by .ci/stub.py, and not by hand."""

from tokred import bench, eval, kv, learn, methods
from tokred.adapters.contract import cache_kwargs
from tokred.adapters.kv.reuse.chunks import ChunkStore
from tokred.analysis import viz
from tokred.analysis.calibrate import calibrate
from tokred.analysis.explain import Explanation, explain
from tokred.analysis.information import horizon
from tokred.analysis.tsp_layer import choose_tsp_layer
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
from tokred.bench.benchmark import benchmark
from tokred.core.method import Method, from_dict
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.report import Report
from tokred.core.site import Site
from tokred.diffusion.site import AttentionSite
from tokred.encoder.method import BlockMethod
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
from tokred.kv.report import CacheReport
from tokred.methods.diffusion.asymrnr import AsymRnR
from tokred.methods.diffusion.catome import CAToMe
from tokred.methods.diffusion.ibtm import IBTM
from tokred.methods.diffusion.keymerge import KeyMerge
from tokred.methods.diffusion.random_latent import RandomLatentPrune
from tokred.methods.diffusion.sdtm import SDTM
from tokred.methods.diffusion.todo import ToDo
from tokred.methods.diffusion.toma import ToMA
from tokred.methods.diffusion.tomesd import ToMeSD
from tokred.methods.diffusion.vidtome import VidToMe
from tokred.methods.encoder.algm import ALGM
from tokred.methods.encoder.ats import ATS
from tokred.methods.encoder.avit import AViT
from tokred.methods.encoder.bavit import BAViT
from tokred.methods.encoder.cropr import Cropr
from tokred.methods.encoder.diffrate import DiffRate
from tokred.methods.encoder.dovit import DoViT
from tokred.methods.encoder.downsample import Downsample
from tokred.methods.encoder.dtem import DTEM
from tokred.methods.encoder.dynamicvit import DynamicViT
from tokred.methods.encoder.evit import EViT
from tokred.methods.encoder.kth import KthMerge
from tokred.methods.encoder.ltp import LTP
from tokred.methods.encoder.pitome import PiToMe
from tokred.methods.encoder.pixelprune import PixelPrune
from tokred.methods.encoder.ppt import PPT
from tokred.methods.encoder.random import RandomMerge, RandomPrune
from tokred.methods.encoder.saint import SAINT
from tokred.methods.encoder.skipvit import SkipViT
from tokred.methods.encoder.spatten import SpAtten
from tokred.methods.encoder.tinychart import TinyChart
from tokred.methods.encoder.tofu import ToFu
from tokred.methods.encoder.tokentm import TokenTMPrune
from tokred.methods.encoder.tome import ToMe
from tokred.methods.encoder.vomix import VoMix
from tokred.methods.encoder.vtm import VTM
from tokred.methods.encoder.zero_tprune import ZeroTPrune
from tokred.methods.kv.adakv import AdaKV
from tokred.methods.kv.adore import ADORE
from tokred.methods.kv.attention_matching import AttentionMatching
from tokred.methods.kv.cake import CAKE
from tokred.methods.kv.criticalkv import CriticalKV
from tokred.methods.kv.duoattention import DuoAttention
from tokred.methods.kv.expected_attention import ExpectedAttention
from tokred.methods.kv.fastcache import FastCache
from tokred.methods.kv.h2o import H2O
from tokred.methods.kv.keydiff import KeyDiff
from tokred.methods.kv.keyformer import Keyformer
from tokred.methods.kv.kivi import KIVI
from tokred.methods.kv.knorm import KNorm
from tokred.methods.kv.kv import KVPolicy
from tokred.methods.kv.kvzap import KVzap
from tokred.methods.kv.kvzip import KVzip
from tokred.methods.kv.lagkv import LagKV
from tokred.methods.kv.limited import Limited
from tokred.methods.kv.lukv import LUKV
from tokred.methods.kv.mikv import MiKV
from tokred.methods.kv.mustafar import Mustafar
from tokred.methods.kv.nsnquant import NSNQuant
from tokred.methods.kv.observed_attention import ObservedAttention
from tokred.methods.kv.offloaded import Offloaded
from tokred.methods.kv.pyramidkv import PyramidKV
from tokred.methods.kv.random_evict import RandomEvict
from tokred.methods.kv.rdkv import RDKV
from tokred.methods.kv.rkv import RKV
from tokred.methods.kv.rotated import Oscar, Turbo
from tokred.methods.kv.rpc import RPC
from tokred.methods.kv.shadowkv import ShadowKV
from tokred.methods.kv.snapkv import SnapKV
from tokred.methods.kv.squeezeattention import SqueezeAttention
from tokred.methods.kv.streaming_llm import StreamingLLM
from tokred.methods.kv.streamingtom_cache import StreamingTOMCache
from tokred.methods.kv.tokenbutler import TokenButler
from tokred.methods.kv.tokenselect import TokenSelect
from tokred.methods.kv.tova import TOVA
from tokred.methods.kv.triattention import TriAttention
from tokred.methods.kv.zeromerge import ZeroMerge
from tokred.methods.moe.capacity_drop import CapacityDrop
from tokred.methods.vlm.cat import CAT
from tokred.methods.vlm.cdpruner import CDPruner
from tokred.methods.vlm.divprune import DivPrune
from tokred.methods.vlm.dycoke import DyCoke, DyCokeDecode
from tokred.methods.vlm.earlytom import EarlyTom
from tokred.methods.vlm.evs import EVS
from tokred.methods.vlm.fastervlm import FasterVLM
from tokred.methods.vlm.fastkv import FastKV
from tokred.methods.vlm.fastv import FastV
from tokred.methods.vlm.fastvid import FastVID
from tokred.methods.vlm.flash_vl import FlashVL, Nemotron
from tokred.methods.vlm.flashvid import FlashVID
from tokred.methods.vlm.framefusion import FrameFusion, FrameFusionLayer
from tokred.methods.vlm.hired import HiRED
from tokred.methods.vlm.holitom import HoliTom, HoliTomLayer
from tokred.methods.vlm.omnizip import OmniZip
from tokred.methods.vlm.pixelprune_visual import PixelPruneVisual
from tokred.methods.vlm.prumerge import PruMerge, PruMergePlus
from tokred.methods.vlm.prunevid import PruneVid, PruneVidLayer
from tokred.methods.vlm.pyramiddrop import PyramidDrop
from tokred.methods.vlm.random_deep import RandomDeep
from tokred.methods.vlm.restore import Restore
from tokred.methods.vlm.saint_vlm import SAINTLayer, SAINTVisual
from tokred.methods.vlm.sparsevlm import SparseVLM
from tokred.methods.vlm.stc import STC
from tokred.methods.vlm.streamingtom import StreamingTOM
from tokred.methods.vlm.topv import TopV
from tokred.methods.vlm.vcast import VCAST
from tokred.methods.vlm.vidcom2 import VidCom2
from tokred.methods.vlm.visionzip import VisionZip
from tokred.methods.vlm.vispruner import VisPruner
from tokred.methods.vlm.visual_baselines import DownsampleVisual, RandomVisual, UniformFrames, UniformVisual
from tokred.methods.vlm.vscan import VScan, VScanLayer
from tokred.patch import change
from tokred.settings import load, make, push_to_hub, save
from tokred.settings.caches import blend, draft, load_cache, save_cache, share_prefix
from tokred.settings.streams import stream
from tokred.tuning.run import tune

__version__: str

__all__ = [
    "ADORE",
    "ALGM",
    "ATS",
    "CAKE",
    "CAT",
    "DTEM",
    "EVS",
    "H2O",
    "IBTM",
    "KIVI",
    "LTP",
    "LUKV",
    "PPT",
    "RDKV",
    "RKV",
    "RPC",
    "SAINT",
    "SDTM",
    "STC",
    "TOVA",
    "VCAST",
    "VTM",
    "AViT",
    "AdaKV",
    "AsymRnR",
    "AttentionMatching",
    "AttentionSite",
    "BAViT",
    "BlockMethod",
    "BypassedError",
    "CAToMe",
    "CDPruner",
    "CacheReport",
    "CapacityDrop",
    "ChunkStore",
    "CriticalKV",
    "Cropr",
    "DiffRate",
    "DivPrune",
    "DoViT",
    "Downsample",
    "DownsampleVisual",
    "DuoAttention",
    "DyCoke",
    "DyCokeDecode",
    "DynamicViT",
    "EViT",
    "EarlyTom",
    "ExpectedAttention",
    "Explanation",
    "FastCache",
    "FastKV",
    "FastV",
    "FastVID",
    "FasterVLM",
    "FlashVID",
    "FlashVL",
    "Flops",
    "FrameFusion",
    "FrameFusionLayer",
    "HiRED",
    "HoliTom",
    "HoliTomLayer",
    "KNorm",
    "KVPolicy",
    "KVzap",
    "KVzip",
    "KeyDiff",
    "KeyMerge",
    "Keyformer",
    "KthMerge",
    "LagKV",
    "Limited",
    "Method",
    "MiKV",
    "MissingInputError",
    "MovedWarning",
    "Mustafar",
    "NSNQuant",
    "Nemotron",
    "NothingRecordedError",
    "NothingRemovedWarning",
    "ObservedAttention",
    "Offloaded",
    "OmniZip",
    "Oscar",
    "PiToMe",
    "PixelPrune",
    "PixelPruneVisual",
    "Place",
    "PluginWarning",
    "PruMerge",
    "PruMergePlus",
    "PruneVid",
    "PruneVidLayer",
    "PyramidDrop",
    "PyramidKV",
    "RandomDeep",
    "RandomEvict",
    "RandomLatentPrune",
    "RandomMerge",
    "RandomPrune",
    "RandomVisual",
    "Reduction",
    "Report",
    "Restore",
    "SAINTLayer",
    "SAINTVisual",
    "SettingWarning",
    "ShadowKV",
    "Site",
    "SkipViT",
    "SnapKV",
    "SpAtten",
    "SparseVLM",
    "SqueezeAttention",
    "StreamingLLM",
    "StreamingTOM",
    "StreamingTOMCache",
    "Support",
    "TinyChart",
    "ToDo",
    "ToFu",
    "ToMA",
    "ToMe",
    "ToMeSD",
    "TokenButler",
    "TokenSelect",
    "TokenStateError",
    "TokenTMPrune",
    "TokredError",
    "TokredWarning",
    "TopV",
    "TriAttention",
    "Turbo",
    "UniformFrames",
    "UniformVisual",
    "UnknownMethodError",
    "UnknownModelError",
    "UnsupportedModelError",
    "UntestedVersionWarning",
    "VScan",
    "VScanLayer",
    "VidCom2",
    "VidToMe",
    "VisPruner",
    "VisionZip",
    "VoMix",
    "ZeroMerge",
    "ZeroTPrune",
    "__version__",
    "applied",
    "apply",
    "bench",
    "benchmark",
    "blend",
    "cache_kwargs",
    "calibrate",
    "change",
    "choose_tsp_layer",
    "draft",
    "eval",
    "explain",
    "flops",
    "from_dict",
    "horizon",
    "kv",
    "kv_cache",
    "learn",
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
    "stream",
    "supports",
    "trace",
    "tune",
    "viz",
]

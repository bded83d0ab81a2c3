"""Every method, one file each. A file registers its method; this list only makes the names importable lazily."""

from __future__ import annotations

import sys
import types
import warnings

from tokred.core.moved import MOVED
from tokred.core.registry import methods, parts
from tokred.errors import MovedWarning

# name -> "module:Class"; the modules are imported when a name is first used.
TARGETS = {
    "tome": "tokred.methods.encoder.tome:ToMe",
    "kth": "tokred.methods.encoder.kth:KthMerge",
    "random": "tokred.methods.encoder.random:RandomMerge",
    "random_prune": "tokred.methods.encoder.random:RandomPrune",
    "pitome": "tokred.methods.encoder.pitome:PiToMe",
    "evit": "tokred.methods.encoder.evit:EViT",
    "downsample": "tokred.methods.encoder.downsample:Downsample",
    "tokentm": "tokred.methods.encoder.tokentm:TokenTMPrune",
    "vomix": "tokred.methods.encoder.vomix:VoMix",
    "zero_tprune": "tokred.methods.encoder.zero_tprune:ZeroTPrune",
    "ats": "tokred.methods.encoder.ats:ATS",
    "pixelprune": "tokred.methods.encoder.pixelprune:PixelPrune",
    "ppt": "tokred.methods.encoder.ppt:PPT",
    "tofu": "tokred.methods.encoder.tofu:ToFu",
    "saint": "tokred.methods.encoder.saint:SAINT",
    "vtm": "tokred.methods.encoder.vtm:VTM",
    "tinychart": "tokred.methods.encoder.tinychart:TinyChart",
    "algm": "tokred.methods.encoder.algm:ALGM",
    "spatten": "tokred.methods.encoder.spatten:SpAtten",
    "dynamicvit": "tokred.methods.encoder.dynamicvit:DynamicViT",
    "dtem": "tokred.methods.encoder.dtem:DTEM",
    "cropr": "tokred.methods.encoder.cropr:Cropr",
    "ltp": "tokred.methods.encoder.ltp:LTP",
    "skipvit": "tokred.methods.encoder.skipvit:SkipViT",
    "avit": "tokred.methods.encoder.avit:AViT",
    "diffrate": "tokred.methods.encoder.diffrate:DiffRate",
    "bavit": "tokred.methods.encoder.bavit:BAViT",
    "dovit": "tokred.methods.encoder.dovit:DoViT",
    "adakv": "tokred.methods.kv.adakv:AdaKV",
    "adore": "tokred.methods.kv.adore:ADORE",
    "attention_matching": "tokred.methods.kv.attention_matching:AttentionMatching",
    "cake": "tokred.methods.kv.cake:CAKE",
    "criticalkv": "tokred.methods.kv.criticalkv:CriticalKV",
    "duoattention": "tokred.methods.kv.duoattention:DuoAttention",
    "expected_attention": "tokred.methods.kv.expected_attention:ExpectedAttention",
    "fastcache": "tokred.methods.kv.fastcache:FastCache",
    "h2o": "tokred.methods.kv.h2o:H2O",
    "keydiff": "tokred.methods.kv.keydiff:KeyDiff",
    "keyformer": "tokred.methods.kv.keyformer:Keyformer",
    "kivi": "tokred.methods.kv.kivi:KIVI",
    "knorm": "tokred.methods.kv.knorm:KNorm",
    "kv": "tokred.methods.kv.kv:KVPolicy",
    "kvzap": "tokred.methods.kv.kvzap:KVzap",
    "kvzip": "tokred.methods.kv.kvzip:KVzip",
    "lagkv": "tokred.methods.kv.lagkv:LagKV",
    "limited": "tokred.methods.kv.limited:Limited",
    "lukv": "tokred.methods.kv.lukv:LUKV",
    "mikv": "tokred.methods.kv.mikv:MiKV",
    "mustafar": "tokred.methods.kv.mustafar:Mustafar",
    "nsnquant": "tokred.methods.kv.nsnquant:NSNQuant",
    "observed_attention": "tokred.methods.kv.observed_attention:ObservedAttention",
    "offloaded": "tokred.methods.kv.offloaded:Offloaded",
    "oscar": "tokred.methods.kv.rotated:Oscar",
    "pyramidkv": "tokred.methods.kv.pyramidkv:PyramidKV",
    "capacity_drop": "tokred.methods.moe.capacity_drop:CapacityDrop",
    "random_deep": "tokred.methods.vlm.random_deep:RandomDeep",
    "random_evict": "tokred.methods.kv.random_evict:RandomEvict",
    "rdkv": "tokred.methods.kv.rdkv:RDKV",
    "restore": "tokred.methods.vlm.restore:Restore",
    "rkv": "tokred.methods.kv.rkv:RKV",
    "rpc": "tokred.methods.kv.rpc:RPC",
    "shadowkv": "tokred.methods.kv.shadowkv:ShadowKV",
    "snapkv": "tokred.methods.kv.snapkv:SnapKV",
    "squeezeattention": "tokred.methods.kv.squeezeattention:SqueezeAttention",
    "streaming_llm": "tokred.methods.kv.streaming_llm:StreamingLLM",
    "streamingtom_cache": "tokred.methods.kv.streamingtom_cache:StreamingTOMCache",
    "tokenbutler": "tokred.methods.kv.tokenbutler:TokenButler",
    "tokenselect": "tokred.methods.kv.tokenselect:TokenSelect",
    "tova": "tokred.methods.kv.tova:TOVA",
    "triattention": "tokred.methods.kv.triattention:TriAttention",
    "turbo": "tokred.methods.kv.rotated:Turbo",
    "zeromerge": "tokred.methods.kv.zeromerge:ZeroMerge",
    "tomesd": "tokred.methods.diffusion.tomesd:ToMeSD",
    "todo": "tokred.methods.diffusion.todo:ToDo",
    "toma": "tokred.methods.diffusion.toma:ToMA",
    "ibtm": "tokred.methods.diffusion.ibtm:IBTM",
    "asymrnr": "tokred.methods.diffusion.asymrnr:AsymRnR",
    "sdtm": "tokred.methods.diffusion.sdtm:SDTM",
    "vidtome": "tokred.methods.diffusion.vidtome:VidToMe",
    "catome": "tokred.methods.diffusion.catome:CAToMe",
    "keymerge": "tokred.methods.diffusion.keymerge:KeyMerge",
    "random_latent_prune": "tokred.methods.diffusion.random_latent:RandomLatentPrune",
    "divprune": "tokred.methods.vlm.divprune:DivPrune",
    "cdpruner": "tokred.methods.vlm.cdpruner:CDPruner",
    "fastervlm": "tokred.methods.vlm.fastervlm:FasterVLM",
    "vispruner": "tokred.methods.vlm.vispruner:VisPruner",
    "pyramiddrop": "tokred.methods.vlm.pyramiddrop:PyramidDrop",
    "fastkv": "tokred.methods.vlm.fastkv:FastKV",
    "fastv": "tokred.methods.vlm.fastv:FastV",
    "random_visual": "tokred.methods.vlm.visual_baselines:RandomVisual",
    "uniform_visual": "tokred.methods.vlm.visual_baselines:UniformVisual",
    "downsample_visual": "tokred.methods.vlm.visual_baselines:DownsampleVisual",
    "uniform_frames": "tokred.methods.vlm.visual_baselines:UniformFrames",
    "evs": "tokred.methods.vlm.evs:EVS",
    "earlytom": "tokred.methods.vlm.earlytom:EarlyTom",
    "vidcom2": "tokred.methods.vlm.vidcom2:VidCom2",
    "vcast": "tokred.methods.vlm.vcast:VCAST",
    "dycoke": "tokred.methods.vlm.dycoke:DyCoke",
    "dycoke_decode": "tokred.methods.vlm.dycoke:DyCokeDecode",
    "fastvid": "tokred.methods.vlm.fastvid:FastVID",
    "flashvid": "tokred.methods.vlm.flashvid:FlashVID",
    "framefusion": "tokred.methods.vlm.framefusion:FrameFusion",
    "framefusion_layer": "tokred.methods.vlm.framefusion:FrameFusionLayer",
    "omnizip": "tokred.methods.vlm.omnizip:OmniZip",
    "prunevid": "tokred.methods.vlm.prunevid:PruneVid",
    "prunevid_layer": "tokred.methods.vlm.prunevid:PruneVidLayer",
    "stc": "tokred.methods.vlm.stc:STC",
    "streamingtom": "tokred.methods.vlm.streamingtom:StreamingTOM",
    "holitom": "tokred.methods.vlm.holitom:HoliTom",
    "holitom_layer": "tokred.methods.vlm.holitom:HoliTomLayer",
    "vscan": "tokred.methods.vlm.vscan:VScan",
    "visionzip": "tokred.methods.vlm.visionzip:VisionZip",
    "prumerge": "tokred.methods.vlm.prumerge:PruMerge",
    "prumerge_plus": "tokred.methods.vlm.prumerge:PruMergePlus",
    "hired": "tokred.methods.vlm.hired:HiRED",
    "cat": "tokred.methods.vlm.cat:CAT",
    "flash_vl": "tokred.methods.vlm.flash_vl:FlashVL",
    "nemotron": "tokred.methods.vlm.flash_vl:Nemotron",
    "vscan_layer": "tokred.methods.vlm.vscan:VScanLayer",
    "saint_layer": "tokred.methods.vlm.saint_vlm:SAINTLayer",
    "pixelprune_visual": "tokred.methods.vlm.pixelprune_visual:PixelPruneVisual",
    "saint_visual": "tokred.methods.vlm.saint_vlm:SAINTVisual",
    "sparsevlm": "tokred.methods.vlm.sparsevlm:SparseVLM",
    "topv": "tokred.methods.vlm.topv:TopV",
}

# Scores of cache policies, each in the file of the preset that was published with it; the same form.
SCORES = {
    "column_sum": "tokred.methods.kv.h2o:ColumnSum",
    "critical": "tokred.methods.kv.criticalkv:Critical",
    "dispersion": "tokred.methods.kv.cake:Dispersion",
    "expected_attention": "tokred.methods.kv.expected_attention:Expected",
    "matched": "tokred.methods.kv.attention_matching:Matched",
    "foretold": "tokred.methods.kv.kvzap:Foretold",
    "gumbel": "tokred.methods.kv.keyformer:Gumbel",
    "judges": "tokred.methods.kv.rpc:Judges",
    "key_difference": "tokred.methods.kv.keydiff:KeyDifference",
    "key_norm": "tokred.methods.kv.knorm:KeyNorm",
    "lag_relative": "tokred.methods.kv.lagkv:LagRelative",
    "last_query": "tokred.methods.kv.tova:LastQuery",
    "observed": "tokred.methods.kv.observed_attention:Observed",
    "random": "tokred.methods.kv.random_evict:Random",
    "recency": "tokred.methods.kv.streaming_llm:Recency",
    "reconstruction": "tokred.methods.kv.kvzip:Reconstruction",
    "redundancy": "tokred.methods.kv.rkv:Redundancy",
    "trigonometric": "tokred.methods.kv.triattention:Trigonometric",
    "window": "tokred.methods.kv.snapkv:Window",
    "window_sum": "tokred.methods.kv.rdkv:WindowSum",
}

# The other parts of cache policies: budgets, fates, times, stores.
PARTS = {
    "adaptive": "tokred.kv.budgets.adaptive:Adaptive",
    "curves": "tokred.kv.budgets.curves:Curves",
    "evict": "tokred.kv.fates:Evict",
    "fit": "tokred.kv.fitting:Fit",
    "flat": "tokred.kv.stores.flat:Flat",
    "generated": "tokred.kv.budgets.generated:Generated",
    "global": "tokred.kv.budgets.everywhere:Global",
    "grouped": "tokred.kv.stores.grouped:Grouped",
    "growing": "tokred.kv.budgets.growing:Growing",
    "half": "tokred.kv.stores.half:Half",
    "kivi": "tokred.kv.stores.kivi:KIVI",
    "layered": "tokred.kv.budgets.layered:Layered",
    "merge": "tokred.kv.fates:Merge",
    "mikv": "tokred.kv.stores.mikv:MiKV",
    "mustafar": "tokred.kv.stores.mustafar:Mustafar",
    "nsnquant": "tokred.kv.stores.nsnquant:NSNQuant",
    "offloaded": "tokred.kv.stores.offload:Offloaded",
    "oscar": "tokred.kv.stores.rotated:Oscar",
    "preference": "tokred.kv.budgets.preference:Preference",
    "pyramid": "tokred.kv.budgets.pyramid:Pyramid",
    "rectangle": "tokred.kv.stores.rectangle:Rectangle",
    "replace": "tokred.kv.grouping:Replace",
    "shadowkv": "tokred.kv.stores.shadow:ShadowKV",
    "split": "tokred.kv.budgets.split:Split",
    "squeeze": "tokred.kv.budgets.squeeze:Squeeze",
    "threshold": "tokred.kv.budgets.threshold:Threshold",
    "tight": "tokred.kv.stores.tight:Tight",
    "tokenbutler": "tokred.kv.stores.tokenbutler:TokenButler",
    "tokenselect": "tokred.kv.stores.tokenselect:TokenSelect",
    "turbo": "tokred.kv.stores.rotated:Turbo",
    "uniform": "tokred.kv.budgets.uniform:Uniform",
    "water": "tokred.kv.budgets.water:Water",
    "when": "tokred.kv.parts:When",
    "zones": "tokred.kv.stores.zones:Zones",
}

for _name, _target in (SCORES | PARTS).items():
    parts.add(_name, _target)

for _name, _target in TARGETS.items():
    methods.add(_name, _target)
    # A method's module stood in this folder itself before the wings had folders of their own.
    _module = _target.partition(":")[0]
    if _module != "tokred.methods.kv.kv":  # its old name is a wing's now, which answers for it
        MOVED.setdefault(f"tokred.methods.{_module.rpartition('.')[2]}", (_module,))


class _Package(types.ModuleType):
    """This package, which was a function in tokred 0.1: ``tokred.methods()`` still lists the names."""

    def __call__(self) -> list[str]:
        warnings.warn("tokred.methods() is tokred.list_methods() now", MovedWarning, stacklevel=2)
        return list(methods)


sys.modules[__name__].__class__ = _Package

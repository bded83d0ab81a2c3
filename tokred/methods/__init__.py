"""Every method, one file each. A file registers its method; this list only makes the names importable lazily."""

from __future__ import annotations

from tokred.registry import methods

# name -> "module:Class"; the modules are imported when a name is first used.
TARGETS = {
    "tome": "tokred.methods.tome:ToMe",
    "kth": "tokred.methods.kth:KthMerge",
    "random": "tokred.methods.random:RandomMerge",
    "random_prune": "tokred.methods.random:RandomPrune",
    "pitome": "tokred.methods.pitome:PiToMe",
    "evit": "tokred.methods.evit:EViT",
    "downsample": "tokred.methods.downsample:Downsample",
    "tokentm": "tokred.methods.tokentm:TokenTMPrune",
    "vomix": "tokred.methods.vomix:VoMix",
    "zero_tprune": "tokred.methods.zero_tprune:ZeroTPrune",
    "ats": "tokred.methods.ats:ATS",
    "ppt": "tokred.methods.ppt:PPT",
    "tofu": "tokred.methods.tofu:ToFu",
    "saint": "tokred.methods.saint:SAINT",
    "vtm": "tokred.methods.vtm:VTM",
    "tinychart": "tokred.methods.tinychart:TinyChart",
    "algm": "tokred.methods.algm:ALGM",
    "adakv": "tokred.methods.adakv:AdaKV",
    "cake": "tokred.methods.cake:CAKE",
    "criticalkv": "tokred.methods.criticalkv:CriticalKV",
    "duoattention": "tokred.methods.duoattention:DuoAttention",
    "expected_attention": "tokred.methods.expected_attention:ExpectedAttention",
    "h2o": "tokred.methods.h2o:H2O",
    "keydiff": "tokred.methods.keydiff:KeyDiff",
    "keyformer": "tokred.methods.keyformer:Keyformer",
    "knorm": "tokred.methods.knorm:KNorm",
    "kv": "tokred.methods.kv:KVPolicy",
    "kvzip": "tokred.methods.kvzip:KVzip",
    "lagkv": "tokred.methods.lagkv:LagKV",
    "limited": "tokred.methods.limited:Limited",
    "observed_attention": "tokred.methods.observed_attention:ObservedAttention",
    "pyramidkv": "tokred.methods.pyramidkv:PyramidKV",
    "random_evict": "tokred.methods.random_evict:RandomEvict",
    "rpc": "tokred.methods.rpc:RPC",
    "snapkv": "tokred.methods.snapkv:SnapKV",
    "squeezeattention": "tokred.methods.squeezeattention:SqueezeAttention",
    "streaming_llm": "tokred.methods.streaming_llm:StreamingLLM",
    "tova": "tokred.methods.tova:TOVA",
    "zeromerge": "tokred.methods.zeromerge:ZeroMerge",
    "tomesd": "tokred.methods.tomesd:ToMeSD",
    "todo": "tokred.methods.todo:ToDo",
    "toma": "tokred.methods.toma:ToMA",
    "ibtm": "tokred.methods.ibtm:IBTM",
    "random_latent_prune": "tokred.methods.random_latent:RandomLatentPrune",
}

for _name, _target in TARGETS.items():
    methods.add(_name, _target)

"""Values and names of classes of hosts, by role: strings that hosts compare, kinds of layers among them, and classes
that are told by name because their module is not imported for it."""

from __future__ import annotations

from tokred.adapters.contract.spelling import Word
from tokred.adapters.contract.words import row

_CONFIG = "transformers.configuration_utils"
_KINDS, _OLDER = f"{_CONFIG}:ALLOWED_ATTN_LAYER_TYPES", f"{_CONFIG}:_LEGACY_LAYER_TYPE_REMAP"
_CACHES = "transformers.generation.configuration_utils"

# ------------------------------------------------------------ kinds of layers

FULL = row("layers that see all", f"full_attention T {_KINDS}")
SLIDING = row("layers with a window", f"sliding_attention T {_KINDS}")
CHUNKED = row("layers that see their chunk", f"chunked_attention T {_KINDS}")
CONVOLUTION = row("layers with a convolution", f"conv T {_KINDS}")
RECURRENT = row("layers with a recurrent state", f"linear_attention T {_KINDS}")
HYBRID = row("layers with a recurrent state beside rows", f"hybrid T {_KINDS}")
HYBRID_SLIDING = row("layers with a recurrent state beside a window", f"hybrid_sliding T {_KINDS}")
INDEXED = row(
    "layers with an index",
    f"indexed_attention T {_KINDS} 5.18-",
    f"deepseek_sparse_attention T {_KINDS} -5.17",
    f"qwen_sparse_attention T {_KINDS} -5.17",
)
ONE_KEY = row("layers with one key for many tokens", f"heavily_compressed_attention T {_KINDS}")
ONE_KEY_AND_INDEX = row(
    "layers with one key for several tokens, and an index", f"compressed_sparse_attention T {_KINDS}"
)
DUMMY = row("layers without a cache", "dummy T transformers.cache_utils:get_layer_types_and_kwargs 5.23-")
REUSED = row("layers with another's cache", "reuse T transformers.cache_utils:get_layer_types_and_kwargs 5.23-")
OLDER_RECURRENT = row(
    "blocks with a recurrent state, in older words",
    f"mamba T {_OLDER}",
    "recurrent T transformers.models.recurrent_gemma.configuration_recurrent_gemma:RecurrentGemmaConfig.block_types",
    "mamba2 T transformers.models.auto.auto_mappings:CONFIG_MAPPING_NAMES",
)

# ------------------------------------------------------------ other values

FUSED_KERNEL = row(
    "attention by torch's kernel", "sdpa T transformers.modeling_utils:AttentionInterface._global_mapping"
)
WRITTEN_OUT = row("attention without a kernel", "eager T transformers.modeling_utils:PreTrainedModel")
# Parts of the names of kernels, of classes of layers and of kinds with a window, of which there are several.
FLASH, STATIC, WINDOWED = "flash", "Static", "sliding"
GROWING = row("cache that grows", f"dynamic T {_CACHES}:DYNAMIC_CACHE_IMPLEMENTATIONS")
OFFLOADED = row("cache that is offloaded", f"offloaded T {_CACHES}:DYNAMIC_CACHE_IMPLEMENTATIONS")
WITH_DRAFTS = row("generation with drafts", f"assisted_generation T {_CACHES}:GenerationMode")
IN_TIME_AND_SPACE = row("attention in time, then in space", "divided_space_time T timesformer:TimesformerLayer.forward")
FIRST_TOKEN = row(
    "pool of the first token",
    "cls T modernbert:ModernBertForSequenceClassification.forward",
    "tok O transformer:VisionTransformer",
    "token M vision_transformer:VisionTransformer",
)

BY_LENGTH = row(
    "rotary embeddings that follow the length",
    "dynamic T transformers.modeling_rope_utils:ROPE_INIT_FUNCTIONS",
    "longrope T transformers.modeling_rope_utils:ROPE_INIT_FUNCTIONS",
)

# ------------------------------------------------------------ names of classes

PRETRAINED = row("base of models", "PreTrainedModel T transformers.modeling_utils")
MIXIN = row("base of denoisers", "ModelMixin D modeling_utils")
PIPELINE = row("base of pipelines", "DiffusionPipeline D diffusers.pipelines.pipeline_utils")
ATTENTION = row("name of attentions", "Attention D attention_processor")
LATENT_ATTENTION = row("attention that is not called so", "LongcatFlashMLA T longcat_flash")
CLIP_TOWER = row("tower of open_clip", "VisionTransformer O transformer")
QUANTISED = row("cache of quantised rows", "QuantizedCache T transformers.cache_utils")


def kinds(*words: Word) -> tuple[str, ...]:
    """Values of several roles, in every spelling."""
    return tuple(name for word in words for name in word.names)

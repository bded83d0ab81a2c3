"""Sub-modules, functions and methods of hosts, by role: what adapters call, hang hooks on, or stand in front of."""

from __future__ import annotations

from tokred.adapters.contract.words import row

# ------------------------------------------------------------ blocks of encoders

_BLOCK, _TIMM = "vision_transformer:Block", "vision_transformer:VisionTransformer"
NORM1 = row("norm before a block's attention", f"norm1 M {_BLOCK}")
NORM2 = row("norm before a block's MLP", f"norm2 M {_BLOCK}")
SCALES = (
    row("scale of a block's attention", f"ls1 M {_BLOCK}"),
    row("scale of a block's MLP", f"ls2 M {_BLOCK}"),
)
GAMMAS = (
    row("weight of a block's attention", "gamma_1 M eva:EvaBlock"),
    row("weight of a block's MLP", "gamma_2 M eva:EvaBlock"),
)
DEPTHS = (
    row("stochastic depth of a block's attention", f"drop_path1 M {_BLOCK}"),
    row("stochastic depth of a block's MLP", f"drop_path2 M {_BLOCK}"),
)
DEPTH_OF_BOTH = row(
    "stochastic depth of a block",
    "drop_path T vitdet:VitDetLayer",
    "drop_path T timesformer:TimesformerLayer",
)
LAST_OF_ATTENTION = row(
    "output projection of an encoder's attention",
    "proj M vision_transformer:Attention",
    "proj T sam:SamVisionAttention",
)
DROPOUT_BEHIND = row("dropout behind an attention", "proj_drop M vision_transformer:Attention")
DROPOUT_INSIDE = row(
    "dropout of an attention's weights",
    "attn_drop M vision_transformer:Attention",
    "attn_drop T timesformer:TimesformerSelfAttention",
)
FACTOR = row(
    "factor of an encoder's logits",
    "scale M vision_transformer:Attention",
    "scale T clip:CLIPAttention",
    "scale T sam:SamVisionAttention",
    "scaling T siglip:SiglipAttention",
)
SECOND_BRANCH = row("whether a convolution follows a block", "use_residual_block T vitdet:VitDetLayer")
CONVOLUTION_BEHIND = row("convolution behind a block", "residual T vitdet:VitDetLayer")
RELATIVE_TABLE = row(
    "function of relative positions",
    "get_rel_pos T sam:SamVisionAttention",
    "get_rel_pos M vision_transformer_sam",
    "get_rel_pos T vitdet",
)
FEATURES_OF_MODEL = row("forward without the head", f"forward_features M {_TIMM}")
BEHIND = (
    FEATURES_OF_MODEL,
    row("head of a forward", f"forward_head M {_TIMM}"),
    row("pooling of a forward", f"pool M {_TIMM}"),
)
INTERMEDIATES = row(
    "forward with the features between blocks",
    f"forward_intermediates M {_TIMM}",
    "forward_intermediates O transformer:VisionTransformer",
)
LAYERS_BETWEEN = row("features between blocks", f"get_intermediate_layers M {_TIMM}")
ENCODER = row("encoder in a classifier", "encoder M gemma4_vit:Gemma4VitClassifier 1.0.31-")
NECK = row("convolutions behind the blocks", "neck M vision_transformer_sam:VisionTransformerSAM")
WIDTH = row("width of a timm model", f"embed_dim M {_TIMM}")
TABLES_OF_ROPE = row("tables of a rotary embedding", "get_embed M timm.layers:RotaryEmbeddingCat")
KEY_HEADS = row("heads of keys", "num_kv_heads M gemma4_vit:Gemma4Attention 1.0.31-")
PATCH_PROJECTION = row("projection of patches", "proj M timm.layers:PatchEmbed")
HEADS = (row("head of a model", f"head M {_TIMM}"), row("second head", "head_dist M deit:VisionTransformerDistilled"))

# ------------------------------------------------------------ open_clip

_CLIP = "transformer:VisionTransformer"
TOWER_OF_CLIP = row("transformer of a tower", f"transformer O {_CLIP}")
BLOCKS_OF_CLIP = row("blocks of a transformer", "resblocks O transformer:Transformer")
PATCHES_OF_CLIP = row("convolution that makes patches", f"conv1 O {_CLIP}")
POOL_OF_CLIP = row("pool of a tower", f"pool_type O {_CLIP}")
TOKENS_OF_CLIP = row("whether a tower hands its tokens on", f"output_tokens O {_CLIP}")
PROJECTION_OF_CLIP = row("projection behind a tower", f"proj O {_CLIP}")

# ------------------------------------------------------------ encoders of transformers

EMBEDDINGS = row("embeddings of an encoder", "embeddings T vit:ViTModel")
MAKERS = row(
    "what makes patches",
    "patch_embeddings T vit:ViTEmbeddings",
    "patch_embedding T clip:CLIPVisionEmbeddings",
    "projection T vit:ViTPatchEmbeddings",
    "patch_embed T aimv2:Aimv2VisionEmbeddings",
)
SHARED_BIAS = row(
    "bias that all layers share", "shared_position_bias T transformers.models.beit.modeling_beit:BeitModel"
)
CLASSIFIERS = row(
    "matrices applied once a sample",
    "classifier T vit:ViTForImageClassification",
    "distillation_classifier T deit:DeiTForImageClassificationWithTeacher",
    "cls_classifier T deit:DeiTForImageClassificationWithTeacher",
    "visual_projection T clip:CLIPModel",
)

# TimeSformer, whose block is composed anew.
_LAYER = "timesformer:TimesformerLayer"
DIVIDED_ENCODER = row("encoder of a TimeSformer", "encoder T timesformer:TimesformerModel")
DIVIDED_LAYERS = row("layers of a TimeSformer", "layer T timesformer:TimesformerEncoder")
SPACE = row("attention in space", f"attention T {_LAYER}")
SPACE_ITSELF = row("attention in space, without its output", "attention T timesformer:TimeSformerAttention")
SPACE_OUTPUT = row("output of the attention in space", "output T timesformer:TimeSformerAttention")
SPACE_NORM = row("norm before the attention in space", f"layernorm_before T {_LAYER}")
TIME = row("attention in time", f"temporal_attention T {_LAYER}")
TIME_NORM = row("norm before the attention in time", f"temporal_layernorm T {_LAYER}")
TIME_OUTPUT = row("matrix behind the attention in time", f"temporal_dense T {_LAYER}")
MLP_NORM = row("norm before a layer's MLP", f"layernorm_after T {_LAYER}")
MLP_FIRST = row("first matrix of a layer's MLP", f"intermediate T {_LAYER}")
MLP_LAST = row("last matrix of a layer's MLP", f"output T {_LAYER}")

# ------------------------------------------------------------ language models, with vision and without

_MODELS = "transformers.modeling_utils:PreTrainedModel"
_CONFIGS = "transformers.configuration_utils:PreTrainedConfig"
GENERATE = row("generation", "generate T transformers.generation:GenerationMixin")
CAN_GENERATE = row("whether a model generates", f"can_generate T {_MODELS}")
EMBED = row("embeddings of words", f"get_input_embeddings T {_MODELS}")
DECODE = row("text of ids", "decode T transformers.tokenization_utils_base:PreTrainedTokenizerBase")
LOSS_OF = row("function of the loss", f"loss_function T {_MODELS}")
TEXT_OF = row("configuration of the decoder", f"get_text_config T {_CONFIGS}")
LANGUAGE = row("language model in a model", "language_model T llava:LlavaModel")
TOWER = row("vision tower in a model", "visual T qwen2_5_vl:Qwen2_5_VLModel")
CROSS_ATTENTION = row(
    "cross-attention of a decoder's layer",
    "encoder_attn T bart:BartDecoderLayer",
    "EncDecAttention T t5:T5LayerCrossAttention",
)
LEARNED_PLACES = row("embedding of positions in a text", "embed_positions T bart:BartEncoder")
EXPAND = row("keys and values of latents", "expand_kv T deepseek_v3:DeepseekV3Attention")
NEWLINE = row("embedding between rows of tokens", "image_newline T llava_next:LlavaNextModel")
_HELPERS = "diffusers.hooks._helpers"
REGISTER = row(
    "entry in a registry",
    "register T transformers.utils.generic:GeneralInterface",
    f"register D {_HELPERS}:TransformerBlockRegistry 0.35-",
)
INTERFACE = row("attention by its name", "get_interface T transformers.modeling_utils:AttentionInterface")

# ------------------------------------------------------------ caches

_CACHE, _ROWS = "transformers.cache_utils:Cache", "transformers.cache_utils:DynamicLayer"
LENGTH = row("tokens that a cache has seen", f"get_seq_length T {_CACHE}", f"get_seq_length T {_ROWS}")
MOST = row("tokens that a cache may see", f"get_max_length T {_ROWS}")
MASK_SIZES = row("sizes of the mask of a cache", f"get_mask_sizes T {_CACHE}", f"get_mask_sizes T {_ROWS}")
QUERY_OFFSET = row("first query of the mask of a cache", f"get_query_offset T {_CACHE}")
REORDER = row("samples of a cache in another order", f"reorder_cache T {_CACHE}", f"reorder_cache T {_ROWS}")
REPEAT = row(
    "samples of a cache, repeated", f"batch_repeat_interleave T {_CACHE}", f"batch_repeat_interleave T {_ROWS}"
)
SELECT = row("some samples of a cache", f"batch_select_indices T {_CACHE}", f"batch_select_indices T {_ROWS}")
CROP = row("tokens that a cache takes back", f"crop T {_CACHE}", f"crop T {_ROWS}")
EMPTY = row("a cache, emptied", f"reset T {_CACHE}", f"reset T {_ROWS}")
UPDATE = row("rows that a cache takes", f"update T {_CACHE}", f"update T {_ROWS}")
BEGIN = row("first rows of a layer", f"lazy_initialization T {_ROWS}")
BEGUN = row("whether a layer has rows", f"is_initialized T {_ROWS}")
SLIDES = row("whether a layer has a window", f"is_sliding T {_ROWS}")
COMPILES = row("whether a cache can be compiled", "is_compileable T transformers.cache_utils:CacheLayerMixin")
CROPS = row("whether a layer can take back tokens", f"is_croppable T {_ROWS}")
LAYER_CLASS = row("class of layers that a cache adds", f"layer_class_to_replicate T {_CACHE}")
# What subclasses of a cache and of its layers take over: tokred defines it under these names.
TAKEN_OVER = (
    LENGTH, MOST, MASK_SIZES, QUERY_OFFSET, REORDER, REPEAT, SELECT, CROP, EMPTY, UPDATE, BEGIN,
)  # fmt: skip


def under_each_name(cls: type) -> type:
    """``cls``, a cache or a layer of one, with what it takes over under each of the hosts' spellings."""
    for word in TAKEN_OVER:
        own = word.of(vars(cls))
        for name in word.names if own is not None else ():
            if name not in vars(cls):
                setattr(cls, name, own)
    return cls


# ------------------------------------------------------------ denoisers

_ATTENTION = "attention_processor:Attention"
TO_QUERY = row("query projection of a denoiser", f"to_q D {_ATTENTION}")
TO_KEY = row("key projection of a denoiser", f"to_k D {_ATTENTION}")
TO_VALUE = row("value projection of a denoiser", f"to_v D {_ATTENTION}")
TO_ALL = row("one projection of all three of a denoiser", f"to_qkv D {_ATTENTION}")
TO_OUTPUT = row("output projection of a denoiser", f"to_out D {_ATTENTION}")
COMPONENTS = row("parts of a pipeline", "components D diffusers.pipelines.pipeline_utils:DiffusionPipeline")
UNET = row("UNet of a pipeline", "unet D diffusers.pipelines.stable_diffusion:StableDiffusionPipeline")
TRANSFORMER = row("transformer of a pipeline", "transformer D diffusers.pipelines.wan.pipeline_wan:WanPipeline")
SECOND = row("second transformer of a pipeline", "transformer_2 D diffusers.pipelines.wan.pipeline_wan:WanPipeline")
KNOWN_CLASS = row(
    "class of a block that a registry knows", "_cls D diffusers.hooks._helpers:TransformerBlockMetadata 0.35-"
)

# ------------------------------------------------------------ torch, where it says nothing of it

_MODULE = "torch.nn:Module"
HOOKS_BEFORE = row("hooks before a forward", f"_forward_pre_hooks P {_MODULE}")
HOOKS_BEFORE_NAMED = row("those of them with arguments by name", f"_forward_pre_hooks_with_kwargs P {_MODULE}")
HOOKS_AFTER = row("hooks after a forward", f"_forward_hooks P {_MODULE}")
HOOKS_AFTER_NAMED = row("those of these with arguments by name", f"_forward_hooks_with_kwargs P {_MODULE}")
HOOKS_ALWAYS = row("hooks after a forward that breaks off", f"_forward_hooks_always_called P {_MODULE}")
HOOKS = (HOOKS_BEFORE, HOOKS_BEFORE_NAMED, HOOKS_AFTER, HOOKS_AFTER_NAMED, HOOKS_ALWAYS)
CHILDREN = row("modules inside a module", f"_modules P {_MODULE}")
APPLY = row("change of all tensors of a module", f"_apply P {_MODULE}")
COMPILED = row("model that was compiled", "_orig_mod P torch._dynamo.eval_frame:OptimizedModule")
CONSTANT = row(
    "function whose result is constant", "_dynamo_marked_constant P torch._dynamo.decorators:assume_constant_result"
)

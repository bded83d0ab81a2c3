"""Public names of hosts by role: arguments of forwards, fields of outputs, attributes of modules and configurations.

A row here is all that a renaming takes: the new spelling goes in front of the old one, with its version. Tables of
families (which class has which parts) hold names of one host's classes, and stand in their wings.
"""

from __future__ import annotations

from tokred.adapters.contract.spelling import Spelling, Word

_FLOORS = {"T": "transformers", "D": "diffusers", "M": "timm", "O": "open_clip"}
_PLACES = {
    "T": "transformers.models.{0}.modeling_{0}",
    "D": "diffusers.models.{0}",
    "M": "timm.models.{0}",
    "O": "open_clip.{0}",
}
_LLAVA = _PLACES["T"].format("llava")
WORDS: dict[str, Word] = {}


def _word(role: str, *spellings: str | Spelling) -> Word:
    """A row; a spelling in short is ``name letter place:object``: the library's letter, and where its code has it."""
    rows = tuple(_short(one) if isinstance(one, str) else one for one in spellings)
    assert role not in WORDS
    WORDS[role] = Word(role, rows, tuple(dict.fromkeys(row.name for row in rows)))
    return WORDS[role]


def _short(text: str) -> Spelling:
    name, letter, where = text.split(" ")
    module, mark, attribute = where.partition(":")
    place = module if "." in module and letter == "T" else _PLACES[letter].format(module)
    return Spelling(name, _FLOORS[letter], where=f"{place}{mark}{attribute}")


# ------------------------------------------------------------ arguments of forwards and of generation

ATTENTION_MASK = _word(
    "attention mask",
    "attention_mask T llama:LlamaModel.forward",
    "attention_mask D attention_processor:Attention.forward",
)
INPUT_IDS = _word("ids of tokens", "input_ids T llama:LlamaModel.forward")
EMBEDS = _word("embeddings of tokens", "inputs_embeds T llama:LlamaModel.forward")
POSITIONS = _word("positions of tokens", "position_ids T llama:LlamaModel.forward")
TABLES = _word("rotary tables of a forward", "position_embeddings T llama:LlamaAttention.forward")
STATES = _word(
    "states of tokens",
    "hidden_states T llama:LlamaDecoderLayer.forward",
    "hidden_states D attention:BasicTransformerBlock.forward",
)
CACHED = _word("whether to keep a cache", "use_cache T llama:LlamaModel.forward")
TYPES = _word("types of tokens", "token_type_ids T paligemma:PaliGemmaModel.forward")
LABELS = _word("labels", "labels T llama:LlamaForCausalLM.forward")
KEPT_LOGITS = _word("tokens with logits", "logits_to_keep T llama:LlamaForCausalLM.forward")
PIXELS = _word("images", "pixel_values T llava:LlavaModel.forward")
VIDEO_PIXELS = _word("videos", "pixel_values_videos T qwen2_5_vl:Qwen2_5_VLModel.forward")
IMAGE_GRIDS = _word("grids of images", "image_grid_thw T qwen2_5_vl:Qwen2_5_VLModel.forward")
VIDEO_GRIDS = _word("grids of videos", "video_grid_thw T qwen2_5_vl:Qwen2_5_VLModel.forward")
SIZES = _word("sizes of images", "image_sizes T llava_next:LlavaNextModel.forward")
DEEP_PLACES = _word("places of deep features", "visual_pos_masks T qwen3_vl:Qwen3VLTextModel.forward")
DEEP_FEATURES = _word("deep features", "deepstack_visual_embeds T qwen3_vl:Qwen3VLTextModel.forward")
TOWER_LAYER = _word("layer of the tower", "vision_feature_layer T llava:LlavaModel.get_image_features")
MAPS = _word("maps of attention", "output_attentions T transformers.configuration_utils:PreTrainedConfig")
LAYER_TYPE = _word("kind of a layer", "layer_type T gemma3:Gemma3RotaryEmbedding.forward")
QUERIES_TO_MASK = _word("queries of a mask", "q_length T transformers.masking_utils:sdpa_mask")
KEYS_TO_MASK = _word("keys of a mask", "kv_length T transformers.masking_utils:sdpa_mask")
FIRST_KEY = _word("first key of a mask", "kv_offset T transformers.masking_utils:sdpa_mask")
RULE = _word("rule of a mask", "mask_function T transformers.masking_utils:sdpa_mask")
LOCAL = _word("window of a mask", "local_size T transformers.masking_utils:sdpa_mask")
EXTRA_BIAS = _word(
    "bias beside a mask", "position_bias T transformers.integrations.sdpa_attention:sdpa_attention_forward"
)
TEXT_STATES = _word("states of the text", "encoder_hidden_states D attention:BasicTransformerBlock.forward")
TIMESTEP = _word("time of a step", "timestep D unets.unet_2d_condition:UNet2DConditionModel.forward")
ADAPTER_MASKS = _word("masks of an image adapter", "ip_adapter_masks D attention_processor:IPAdapterAttnProcessor2_0")
PLACES = _word("ids of an image's places", "img_ids D transformers.transformer_flux:FluxTransformer2DModel.forward")
TURNS = _word(
    "rotary tables of a denoiser",
    "image_rotary_emb D transformers.transformer_flux:FluxTransformerBlock.forward",
    "rotary_emb D transformers.transformer_wan:WanTransformerBlock.forward",
)
BLOCK_MASK = _word(
    "mask of a block",
    "attn_mask M vision_transformer:Block.forward",
    "attn_mask O transformer:ResidualAttentionBlock.forward",
)

ENCODED = _word(
    "outputs of encoders",
    Spelling("mm_encoder_outputs", "transformers", since="5.24", where=f"{_LLAVA}:LlavaModel.forward"),
)
# Of torch's function for attention, in its order.
SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

# ------------------------------------------------------------ fields of outputs

LOGITS = _word("logits", "logits T transformers.modeling_outputs:CausalLMOutputWithPast")
LOSS = _word("loss", "loss T transformers.modeling_outputs:CausalLMOutputWithPast")
FEATURES = _word("features of images", "pooler_output T transformers.modeling_outputs:BaseModelOutputWithPooling")

# ------------------------------------------------------------ attributes of modules

LAYER_INDEX = _word("number of a layer", "layer_idx T llama:LlamaAttention")
OUTPUT = _word("output projection", "o_proj T llama:LlamaAttention", "out_proj T opt:OPTAttention")
QUERY = _word("query projection", "q_proj T llama:LlamaAttention")
KEY = _word("key projection", "k_proj T llama:LlamaAttention")
VALUE = _word("value projection", "v_proj T llama:LlamaAttention")
QUERY_NORM = _word("norm of queries", "q_norm T qwen3:Qwen3Attention", "q_norm M vision_transformer:Attention")
KEY_NORM = _word("norm of keys", "k_norm T qwen3:Qwen3Attention", "k_norm M vision_transformer:Attention")
TOGETHER = _word(
    "one projection of all three", "qkv T qwen2_5_vl:Qwen2_5_VLVisionAttention", "qkv M vision_transformer:Attention"
)
HEAD_WIDTH = _word("width of a head", "head_dim T llama:LlamaAttention")
SCALE = _word("factor of logits", "scaling T llama:LlamaAttention")
CAP = _word("cap of logits", "attn_logit_softcapping T gemma2:Gemma2Attention")
WINDOW = _word("window of a layer", "sliding_window T mistral:MistralConfig")
SINKS = _word("sinks of an attention", "sinks T gpt_oss:GptOssAttention")
CAUSAL = _word("whether attention looks back only", "is_causal T llama:LlamaAttention")
ATTENTION = _word("attention of a layer", "self_attn T llama:LlamaDecoderLayer")
NORM_BEFORE = _word("norm before the attention", "input_layernorm T llama:LlamaDecoderLayer")
NORM_BEHIND = _word("norm behind the attention", "post_attention_layernorm T llama:LlamaDecoderLayer")
NORM_OF_MLP = _word("norm before the MLP", "pre_feedforward_layernorm T gemma2:Gemma2DecoderLayer")
NORM_BEHIND_MLP = _word("norm behind the MLP", "post_feedforward_layernorm T gemma2:Gemma2DecoderLayer")
MLP = _word("MLP of a layer", "mlp T llama:LlamaDecoderLayer", "mlp M vision_transformer:Block")
ROTARY = _word("rotary embedding", "rotary_emb T llama:LlamaModel")
AXES = _word("axes of a rotary embedding", "mrope_section T qwen3_vl:Qwen3VLTextRotaryEmbedding")
CHECKPOINTS = _word("whether forwards are computed twice", "gradient_checkpointing T llama:LlamaModel")
TOWER_HEADS = _word("heads of a tower's attention", "num_heads T qwen2_5_vl:Qwen2_5_VLVisionAttention")
WHOLE_BLOCKS = _word(
    "blocks without windows", "fullatt_block_indexes T qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel"
)
JOINED = _word(
    "patches of a side that are joined", "spatial_merge_size T qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel"
)
HALF_TURN = _word("function of half a turn", "rotate_half T llama")
TURN = _word("function that turns", "apply_rotary_pos_emb T llama")
TOWER_TURN = _word("function that turns in a tower", "apply_rotary_pos_emb_vision T qwen2_5_vl")
EAGER = _word("attention written out", "eager_attention_forward T llama")
BLOCKS = _word(
    "blocks",
    "blocks M vision_transformer:VisionTransformer",
    "blocks T qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel",
)
PATCHES = _word("patch embedding", "patch_embed M vision_transformer:VisionTransformer")
PREFIX = _word("tokens in front", "num_prefix_tokens M vision_transformer:VisionTransformer")
CLASS_TOKEN = _word("class token", "cls_token M vision_transformer:VisionTransformer")
IN_BLOCK = _word(
    "attention of an encoder's block",
    "attn M vision_transformer:Block",
    "attention T vit:ViTLayer",
    "self_attn T clip:CLIPEncoderLayer",
    "self_attention T bloom:BloomBlock",
)
SELF = _word(
    "attention of a block",
    "attn D transformers.transformer_flux:FluxTransformerBlock",
    "attn M vision_transformer:Block",
    "attn T qwen2_5_vl:Qwen2_5_VLVisionBlock",
)

KEYS = _word("keys of a layer's cache", "keys T transformers.cache_utils:DynamicLayer")
VALUES = _word("values of a layer's cache", "values T transformers.cache_utils:DynamicLayer")
LAYERS = _word("layers of a cache", "layers T transformers.cache_utils:Cache")
OFFLOADS = _word("whether a cache offloads", "offloading T transformers.cache_utils:Cache")
PACKED = _word("rows that are quantised", "_dequantize T transformers.cache_utils:QuantizedLayer")
SOFTCAP = _word("cap of logits of a call", "softcap T gemma2:Gemma2Attention")
RELATIVE = _word(
    "relative positions of rows",
    "rel_pos_h T sam:SamVisionAttention",
    "rel_pos_h M vision_transformer_sam:Attention",
)
RELATIVE_WIDE = _word(
    "relative positions of columns",
    "rel_pos_w T sam:SamVisionAttention",
    "rel_pos_w M vision_transformer_sam:Attention",
)
SIDE = _word(
    "side of a window",
    "window_size T qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel",
    "window_size M vision_transformer_sam:Block",
)
FUSED = _word("whether attention is fused", "fused_attn M vision_transformer:Attention")
POOL = _word("pool of tokens", "global_pool M vision_transformer:VisionTransformer")
POOLER = _word(
    "attention that pools",
    "attn_pool M vision_transformer:VisionTransformer",
    "attn_pool O transformer:VisionTransformer",
)
GRID = _word(
    "grid of patches",
    "grid_size M vision_transformer:PatchEmbed",
    "grid_size O transformer:VisionTransformer",
)
ANY_GRID = _word("grid of an input", "dynamic_feat_size M vision_transformer:PatchEmbed")
ROPE_OF_MODEL = _word("rotary embedding of a vision model", "rope M eva:Eva")
ROPE_OF_MAP = _word("rotary embedding of a map", "rope_global M vision_transformer_sam:VisionTransformerSAM")
VALUE_BIAS = _word("bias of values", "v_bias M eva:EvaAttention")
ATTENTION_WIDTH = _word(
    "width of an attention", Spelling("attn_dim", "timm", since="1.0.31", where="timm.layers.attention:Attention")
)
BATCH_FIRST = _word("whether samples come first", "batch_first O transformer:Transformer")
COSINE = _word("scale of cosines", "logit_scale O transformer:Attention")
FUSED_IN_CLIP = _word("whether attention of CLIP is fused", "use_fsdpa O transformer:Attention")
CROSS = _word("whether attention reads a text", "is_cross_attention D attention_processor:Attention")
CROSS_ONLY = _word("whether attention reads nothing but a text", "only_cross_attention D attention_processor:Attention")
ADDED = _word("width of keys of a text", "added_kv_proj_dim D attention_processor:Attention")
ADDED_KEY = _word("key projection of a text", "add_k_proj D attention_processor:Attention")
JOINED_PROJECTIONS = _word("whether projections are fused", "fused_projections D attention_processor:Attention")
PROCESSOR = _word("what computes an attention", "processor D attention_processor:Attention")
BENEATH = _word(
    "layer beneath an adapter", Spelling("base_layer", "peft", where="peft.tuners.tuners_utils:BaseTunerLayer")
)
MERGED = _word(
    "whether an adapter is merged", Spelling("merged", "peft", where="peft.tuners.tuners_utils:BaseTunerLayer")
)

# ------------------------------------------------------------ attributes of configurations

IMAGE = _word("side of an image", "image_size T clip:CLIPVisionConfig")
SHRINK = _word("patches of a side that make a token", "scale_factor T idefics3:Idefics3Config")
TILINGS = _word("sizes of tiled images", "image_grid_pinpoints T llava_next:LlavaNextConfig")
PATCH_IN_TIME = _word(
    "frames of a patch", "patch_size_t D transformers.cogvideox_transformer_3d:CogVideoXTransformer3DModel"
)

TEXT = _word("configuration of the text", "text_config T llava:LlavaConfig")
VISION = _word("configuration of the tower", "vision_config T llava:LlavaConfig")
DEPTH = _word("layers of a model", "num_hidden_layers T llama:LlamaConfig")
WIDTH = _word("width of a model", "hidden_size T llama:LlamaConfig")
QUERY_HEADS = _word(
    "query heads of an attention or its configuration",
    "num_heads M eva:EvaAttention",
    "num_attention_heads T vit:ViTConfig",
    "n_heads T distilbert:DistilBertConfig",
)
HEADS = _word("heads of a model", "num_attention_heads T llama:LlamaConfig")
KINDS = _word("kinds of layers of a configuration", "layer_types T gemma3:Gemma3TextConfig")
OLDER_KINDS = _word("kinds of blocks of a configuration", "layers_block_type T recurrent_gemma:RecurrentGemmaConfig")
ROPE = _word("parameters of a rotary embedding", "rope_parameters T llama:LlamaConfig")
DECODER = _word("whether a model decodes", "is_decoder T bert:BertConfig")
BOTH = _word(
    "whether encoder and decoder are one model",
    "is_encoder_decoder T transformers.configuration_utils:PreTrainedConfig",
)
AHEAD = _word("whether prompts see ahead", "use_bidirectional_attention T gemma3:Gemma3TextConfig")
LATENTS = _word("rank of latents in a cache", "kv_lora_rank T deepseek_v3:DeepseekV3Config")
SHARING = _word(
    "layers that share a cache",
    Spelling("kv_sharing_modes", "transformers", since="5.24", where="transformers:Gemma4TextConfig"),
)
PARALLEL = _word("attention beside the MLP", "use_parallel_residual T gpt_neox:GPTNeoXConfig")
DEEP_LAYERS = _word("layers of deep features", "deepstack_visual_indexes T qwen3_vl:Qwen3VLVisionConfig")
PATCH = _word(
    "side of a patch",
    "patch_size T clip:CLIPVisionConfig",
    "patch_size D transformers.transformer_flux:FluxTransformer2DModel",
    "patch_size M vision_transformer:PatchEmbed",
)
LAYERDROP = _word("layers skipped at random", "layerdrop T whisper:WhisperEncoder")
PLACE_IN_MODEL = _word("configuration's place in another", "base_config_key T clip:CLIPVisionConfig")
CACHE_KIND = _word("kind of cache that is asked for", "cache_implementation T transformers.generation:GenerationConfig")
DRAFTS = _word("whether it drafts for another", "is_assistant T transformers.generation:GenerationConfig")
CHUNK = _word("tokens read at once", "prefill_chunk_size T transformers.generation:GenerationConfig")

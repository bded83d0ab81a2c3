"""Public names of hosts by role: arguments of forwards, fields of outputs, attributes of modules and configurations.

A row here is all that a renaming takes: the new spelling goes in front of the old one, with its version. Sub-modules,
functions and methods are rows of :mod:`tokred.adapters.contract.members`, values and names of classes rows of
:mod:`tokred.adapters.contract.terms`. Tables of families (which class has which parts) stand in their wings.
"""

from __future__ import annotations

from tokred.adapters.contract.spelling import Spelling, Word

_LIBRARIES = {"T": "transformers", "D": "diffusers", "M": "timm", "O": "open_clip", "P": "torch"}
_PLACES = {
    "T": "transformers.models.{0}.modeling_{0}",
    "D": "diffusers.models.{0}",
    "M": "timm.models.{0}",
    "O": "open_clip.{0}",
    "P": "torch.{0}",
}
_LLAVA = _PLACES["T"].format("llava")
WORDS: dict[str, Word] = {}


def row(role: str, *spellings: str | Spelling) -> Word:
    """A row; a spelling in short is ``name letter place:object since-until``: the library's letter, where its code
    has it, and the versions that have it where not all do."""
    rows = tuple(_short(one) if isinstance(one, str) else one for one in spellings)
    assert role not in WORDS
    WORDS[role] = Word(role, rows, tuple(dict.fromkeys(one.name for one in rows)))
    return WORDS[role]


def _short(text: str) -> Spelling:
    name, letter, where, *versions = text.split(" ")
    module, mark, attribute = where.partition(":")
    whole = module.startswith(f"{_LIBRARIES[letter]}.") or (letter == "T" and "." in module)
    place = module if whole else _PLACES[letter].format(module)
    since, _, until = versions[0].partition("-") if versions else ("", "", "")
    return Spelling(name, _LIBRARIES[letter], since, until, f"{place}{mark}{attribute}")


# ------------------------------------------------------------ arguments of forwards and of generation

ATTENTION_MASK = row(
    "attention mask",
    "attention_mask T llama:LlamaModel.forward",
    "attention_mask D attention_processor:Attention.forward",
)
INPUT_IDS = row("ids of tokens", "input_ids T llama:LlamaModel.forward")
EMBEDS = row("embeddings of tokens", "inputs_embeds T llama:LlamaModel.forward")
POSITIONS = row("positions of tokens", "position_ids T llama:LlamaModel.forward")
TABLES = row("rotary tables of a forward", "position_embeddings T llama:LlamaAttention.forward")
STATES = row(
    "states of tokens",
    "hidden_states T llama:LlamaDecoderLayer.forward",
    "hidden_states D attention:BasicTransformerBlock.forward",
)
SEGMENTS = row("ends of packed segments", "cu_seqlens T qwen2_5_vl:Qwen2_5_VLVisionBlock.forward")
LONGEST = row("longest of packed segments", "max_seqlen T qwen2_5_vl:Qwen2_5_VLVisionAttention.forward")
TOWER_GRIDS = row("grids of a tower", "grid_thw T qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel.forward")
SHARED_ROWS = row("rows that layers share", "shared_kv_states T gemma3n:Gemma3nTextAttention.forward")
SOURCE = row("states that a cross-attention reads", "key_value_states T bart:BartAttention.forward")
PICTURED = row(
    "states of images that layers of a decoder read", "cross_attention_states T mllama:MllamaTextCrossAttention.forward"
)
MEMORY = row("states of an encoder that a decoder reads", "encoder_hidden_states T bart:BartDecoder.forward")
MEMORY_MASK = row("mask of an encoder's states", "encoder_attention_mask T bart:BartDecoder.forward")
CACHED = row("whether to keep a cache", "use_cache T llama:LlamaModel.forward")
TYPES = row("types of tokens", "token_type_ids T paligemma:PaliGemmaModel.forward")
LABELS = row("labels", "labels T llama:LlamaForCausalLM.forward")
LATER_LABELS = row("labels, moved by one", "shift_labels T transformers.loss.loss_utils:ForCausalLMLoss")
KEPT_LOGITS = row("tokens with logits", "logits_to_keep T llama:LlamaForCausalLM.forward")
PIXELS = row("images", "pixel_values T llava:LlavaModel.forward")
VIDEO_PIXELS = row("videos", "pixel_values_videos T qwen2_5_vl:Qwen2_5_VLModel.forward")
IMAGE_GRIDS = row("grids of images", "image_grid_thw T qwen2_5_vl:Qwen2_5_VLModel.forward")
VIDEO_GRIDS = row("grids of videos", "video_grid_thw T qwen2_5_vl:Qwen2_5_VLModel.forward")
SIZES = row("sizes of images", "image_sizes T llava_next:LlavaNextModel.forward")
SHAPES = row("patches of images", "spatial_shapes T lfm2_vl:Lfm2VlModel.get_image_features")
DEEP_PLACES = row("places of deep features", "visual_pos_masks T qwen3_vl:Qwen3VLTextModel.forward")
DEEP_FEATURES = row("deep features", "deepstack_visual_embeds T qwen3_vl:Qwen3VLTextModel.forward")
TOWER_LAYER = row("layer of the tower", "vision_feature_layer T llava:LlavaModel.get_image_features")
MAPS = row("maps of attention", "output_attentions T transformers.configuration_utils:PreTrainedConfig")
LAYER_TYPE = row("kind of a layer", "layer_type T gemma3:Gemma3RotaryEmbedding.forward")
QUERIES_TO_MASK = row("queries of a mask", "q_length T transformers.masking_utils:sdpa_mask")
KEYS_TO_MASK = row("keys of a mask", "kv_length T transformers.masking_utils:sdpa_mask")
FIRST_KEY = row("first key of a mask", "kv_offset T transformers.masking_utils:sdpa_mask")
RULE = row("rule of a mask", "mask_function T transformers.masking_utils:sdpa_mask")
LOCAL = row("window of a mask", "local_size T transformers.masking_utils:sdpa_mask")
EXTRA_BIAS = row(
    "bias beside a mask", "position_bias T transformers.integrations.sdpa_attention:sdpa_attention_forward"
)
TEXT_STATES = row("states of the text", "encoder_hidden_states D attention:BasicTransformerBlock.forward")
TIMESTEP = row("time of a step", "timestep D unets.unet_2d_condition:UNet2DConditionModel.forward")
ADAPTER_MASKS = row("masks of an image adapter", "ip_adapter_masks D attention_processor:IPAdapterAttnProcessor2_0")
PLACES = row("ids of an image's places", "img_ids D transformers.transformer_flux:FluxTransformer2DModel.forward")
TURNS = row(
    "rotary tables of a denoiser",
    "image_rotary_emb D transformers.transformer_flux:FluxTransformerBlock.forward",
    "rotary_emb D transformers.transformer_wan:WanTransformerBlock.forward",
)
BLOCK_MASK = row(
    "mask of a block",
    "attn_mask M vision_transformer:Block.forward",
    "attn_mask O transformer:ResidualAttentionBlock.forward",
)

ENCODED = row(
    "outputs of encoders",
    Spelling("mm_encoder_outputs", "transformers", since="5.24", where=f"{_LLAVA}:LlavaModel.forward"),
)
# Of torch's functions for attention, in their order. They are documented, and keep their names.
SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
SDPA_MASK, SDPA_CAUSAL, SDPA_SCALE, MHA_HEADS = "attn_mask", "is_causal", "scale", "num_heads"

CACHE_OF_A_BATCH = row(
    "cache of continuous batching",
    "cache T transformers.integrations.eager_paged:eager_paged_attention_forward -5.23",
)
SCALE_OF_A_CALL = row("factor of logits of a call", "scaling T llama:eager_attention_forward")
DROPOUT_OF_A_CALL = row("dropout of a call", "dropout T llama:eager_attention_forward")
VOCABULARY = row("number of words", "vocab_size T llama:LlamaConfig")
OF_DECODER = row(
    "whether the decoder's configuration is wanted",
    "decoder T transformers.configuration_utils:PreTrainedConfig.get_text_config",
)

# ------------------------------------------------------------ fields of outputs

LOGITS = row("logits", "logits T transformers.modeling_outputs:CausalLMOutputWithPast")
LOSS = row("loss", "loss T transformers.modeling_outputs:CausalLMOutputWithPast")
FEATURES = row("features of images", "pooler_output T transformers.modeling_outputs:BaseModelOutputWithPooling")
LAST = row("states of the last layer", "last_hidden_state T transformers.modeling_outputs:BaseModelOutput")

MAPPED_FEATURES = row("features of an image", "image_features M vision_transformer:VisionTransformer")
# ------------------------------------------------------------ attributes of modules

LAYER_INDEX = row("number of a layer", "layer_idx T llama:LlamaAttention")
OUTPUT = row("output projection", "o_proj T llama:LlamaAttention", "out_proj T opt:OPTAttention")
QUERY = row("query projection", "q_proj T llama:LlamaAttention")
KEY = row("key projection", "k_proj T llama:LlamaAttention")
VALUE = row("value projection", "v_proj T llama:LlamaAttention")
QUERY_NORM = row("norm of queries", "q_norm T qwen3:Qwen3Attention", "q_norm M vision_transformer:Attention")
KEY_NORM = row("norm of keys", "k_norm T qwen3:Qwen3Attention", "k_norm M vision_transformer:Attention")
TOGETHER = row(
    "one projection of all three", "qkv T qwen2_5_vl:Qwen2_5_VLVisionAttention", "qkv M vision_transformer:Attention"
)
HEAD_WIDTH = row("width of a head", "head_dim T llama:LlamaAttention")
SCALE = row("factor of logits", "scaling T llama:LlamaAttention")
CAP = row("cap of logits", "attn_logit_softcapping T gemma2:Gemma2Attention")
WINDOW = row("window of a layer", "sliding_window T mistral:MistralConfig")
SINKS = row("sinks of an attention", "sinks T gpt_oss:GptOssAttention")
CAUSAL = row("whether attention looks back only", "is_causal T llama:LlamaAttention")
ATTENTION = row("attention of a layer", "self_attn T llama:LlamaDecoderLayer")
NORM_BEFORE = row("norm before the attention", "input_layernorm T llama:LlamaDecoderLayer")
NORM_BEHIND = row("norm behind the attention", "post_attention_layernorm T llama:LlamaDecoderLayer")
NORM_OF_MLP = row("norm before the MLP", "pre_feedforward_layernorm T gemma2:Gemma2DecoderLayer")
NORM_BEHIND_MLP = row("norm behind the MLP", "post_feedforward_layernorm T gemma2:Gemma2DecoderLayer")
MLP = row("MLP of a layer", "mlp T llama:LlamaDecoderLayer", "mlp M vision_transformer:Block")
ROTARY = row("rotary embedding", "rotary_emb T llama:LlamaModel")
AXES = row("axes of a rotary embedding", "mrope_section T qwen3_vl:Qwen3VLTextRotaryEmbedding")
CHECKPOINTS = row("whether forwards are computed twice", "gradient_checkpointing T llama:LlamaModel")
TOWER_HEADS = row("heads of a tower's attention", "num_heads T qwen2_5_vl:Qwen2_5_VLVisionAttention")
WHOLE_BLOCKS = row(
    "blocks without windows", "fullatt_block_indexes T qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel"
)
JOINED = row(
    "patches of a side that are joined", "spatial_merge_size T qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel"
)
HALF_TURN = row("function of half a turn", "rotate_half T llama")
TURN = row("function that turns", "apply_rotary_pos_emb T llama")
TOWER_TURN = row("function that turns in a tower", "apply_rotary_pos_emb_vision T qwen2_5_vl")
EAGER = row("attention written out", "eager_attention_forward T llama")
BLOCKS = row(
    "blocks",
    "blocks M vision_transformer:VisionTransformer",
    "blocks T qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel",
)
PATCHES = row("patch embedding", "patch_embed M vision_transformer:VisionTransformer")
PREFIX = row("tokens in front", "num_prefix_tokens M vision_transformer:VisionTransformer")
CLASS_TOKEN = row("class token", "cls_token M vision_transformer:VisionTransformer")
IN_BLOCK = row(
    "attention of an encoder's block",
    "attn M vision_transformer:Block",
    "attention T vit:ViTLayer",
    "self_attn T clip:CLIPEncoderLayer",
    "self_attention T bloom:BloomBlock",
)
SELF = row(
    "attention of a block",
    "attn D transformers.transformer_flux:FluxTransformerBlock",
    "attn O transformer:ResidualAttentionBlock",
    "attn M vision_transformer:Block",
    "attn T qwen2_5_vl:Qwen2_5_VLVisionBlock",
)

ROUTER = row("router of a layer of experts", "gate T mixtral:MixtralSparseMoeBlock", "router T gpt_oss:GptOssMLP")
EXPERTS = row("experts of a layer", "experts T mixtral:MixtralSparseMoeBlock")
NORMALISED = row("whether weights of experts sum to one", "norm_topk_prob T qwen3_moe:Qwen3MoeTopKRouter")
CHOSEN_EXPERTS = row("experts of a token", "top_k T mixtral:MixtralTopKRouter")
EXPERT_COUNT = row("number of experts", "num_experts T mixtral:MixtralTopKRouter")
SPREAD = row(
    "how a model lies on several devices",
    "distributed_config T transformers.distributed.fsdp:apply_fully_sharded_data_parallelism",
)
APART = row(
    "whether experts lie on several devices",
    "enable_expert_parallel T transformers.distributed.configuration_utils:DistributedConfig",
)

KEYS = row("keys of a layer's cache", "keys T transformers.cache_utils:DynamicLayer")
VALUES = row("values of a layer's cache", "values T transformers.cache_utils:DynamicLayer")
LAYERS = row("layers of a cache", "layers T transformers.cache_utils:Cache")
CROSS_CACHE = row("cache of a cross-attention", "cross_attention_cache T transformers.cache_utils:EncoderDecoderCache")
OFFLOADS = row("whether a cache offloads", "offloading T transformers.cache_utils:Cache")
PACKED = row("rows that are quantised", "_dequantize T transformers.cache_utils:QuantizedLayer")
SOFTCAP = row("cap of logits of a call", "softcap T gemma2:Gemma2Attention")
RELATIVE = row(
    "relative positions of rows",
    "rel_pos_h T sam:SamVisionAttention",
    "rel_pos_h M vision_transformer_sam:Attention",
)
RELATIVE_WIDE = row(
    "relative positions of columns",
    "rel_pos_w T sam:SamVisionAttention",
    "rel_pos_w M vision_transformer_sam:Attention",
)
SIDE = row(
    "side of a window",
    "window_size T qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel",
    "window_size M vision_transformer_sam:Block",
)
FUSED = row("whether attention is fused", "fused_attn M vision_transformer:Attention")
POOL = row("pool of tokens", "global_pool M vision_transformer:VisionTransformer")
POOLER = row(
    "attention that pools",
    "attn_pool M vision_transformer:VisionTransformer",
    "attn_pool O transformer:VisionTransformer",
)
GRID = row(
    "grid of patches",
    "grid_size M vision_transformer:PatchEmbed",
    "grid_size O transformer:VisionTransformer",
)
ANY_GRID = row("grid of an input", "dynamic_feat_size M vision_transformer:PatchEmbed")
ROPE_OF_MODEL = row("rotary embedding of a vision model", "rope M eva:Eva")
ROPE_OF_BLOCK = row("rotary table of a block", "rope M eva:EvaBlock.forward")
ROPE_OF_ATTENTION = row("rotary embedding of an attention", "rope M vision_transformer_sam:Attention")
COSINES = row("cosines of a block", "rope_cos M gemma4_vit:Gemma4Block.forward 1.0.31-")
SINES = row("sines of a block", "rope_sin M gemma4_vit:Gemma4Block.forward 1.0.31-")
ROPE_OF_MAP = row("rotary embedding of a map", "rope_global M vision_transformer_sam:VisionTransformerSAM")
VALUE_BIAS = row("bias of values", "v_bias M eva:EvaAttention")
ATTENTION_WIDTH = row(
    "width of an attention", Spelling("attn_dim", "timm", since="1.0.31", where="timm.layers.attention:Attention")
)
DIFFERENTIAL = row(
    "share of the second attention",
    Spelling("lambda_init", "timm", since="1.0.23", where="timm.layers.diff_attention:DiffAttention"),
)
BATCH_FIRST = row("whether samples come first", "batch_first O transformer:Transformer")
COSINE = row("scale of cosines", "logit_scale O transformer:Attention")
FUSED_IN_CLIP = row("whether attention of CLIP is fused", "use_fsdpa O transformer:Attention")
CROSS = row("whether attention reads a text", "is_cross_attention D attention_processor:Attention")
CROSS_ONLY = row("whether attention reads nothing but a text", "only_cross_attention D attention_processor:Attention")
ADDED = row("width of keys of a text", "added_kv_proj_dim D attention_processor:Attention")
ADDED_KEY = row("key projection of a text", "add_k_proj D attention_processor:Attention")
JOINED_PROJECTIONS = row("whether projections are fused", "fused_projections D attention_processor:Attention")
PROCESSOR = row("what computes an attention", "processor D attention_processor:Attention")
BENEATH = row(
    "layer beneath an adapter", Spelling("base_layer", "peft", where="peft.tuners.tuners_utils:BaseTunerLayer")
)
MERGED = row(
    "whether an adapter is merged", Spelling("merged", "peft", where="peft.tuners.tuners_utils:BaseTunerLayer")
)

# ------------------------------------------------------------ attributes of configurations

CONFIG = row(
    "configuration of a model",
    "config T transformers.modeling_utils:PreTrainedModel",
    "config D diffusers.configuration_utils:ConfigMixin",
)
IMAGE_TOKEN = row("id of an image's place", "image_token_id T qwen2_5_vl:Qwen2_5_VLModel.get_placeholder_mask")
VIDEO_TOKEN = row("id of a video's place", "video_token_id T qwen2_5_vl:Qwen2_5_VLModel.get_placeholder_mask")
SOUND_TOKEN = row("id of a sound's place", "audio_token_index T qwen2_5_omni:Qwen2_5OmniThinkerConfig")
SOUND_LENGTHS = row(
    "lengths of sounds behind the convolutions", "aftercnn_lens T qwen2_5_omni:Qwen2_5OmniAudioEncoder.forward"
)
MODALITY_TOKENS = {"image": IMAGE_TOKEN, "video": VIDEO_TOKEN}
DIVIDED = row("kind of attention of a video", "attention_type T timesformer:TimesformerLayer")
FRAMES = row("frames of a video", "num_frames T timesformer:TimesformerLayer")
POOLING = row("pool of a classifier", "classifier_pooling T modernbert:ModernBertForSequenceClassification")
IMAGE = row("side of an image", "image_size T clip:CLIPVisionConfig")
SHRINK = row("patches of a side that make a token", "scale_factor T idefics3:Idefics3Config")
DOWNSAMPLED = row("patches of a side that make a token, in other words", "downsample_factor T lfm2_vl:Lfm2VlConfig")
TILINGS = row("sizes of tiled images", "image_grid_pinpoints T llava_next:LlavaNextConfig")
PATCH_IN_TIME = row(
    "frames of a patch", "patch_size_t D transformers.cogvideox_transformer_3d:CogVideoXTransformer3DModel"
)

TEXT = row("configuration of the text", "text_config T llava:LlavaConfig")
VISION = row("configuration of the tower", "vision_config T llava:LlavaConfig")
DEPTH = row("layers of a model", "num_hidden_layers T llama:LlamaConfig")
WIDTH = row("width of a model", "hidden_size T llama:LlamaConfig")
QUERY_HEADS = row(
    "query heads of an attention or its configuration",
    "num_heads M eva:EvaAttention",
    "num_attention_heads T vit:ViTConfig",
    "n_heads T distilbert:DistilBertConfig",
)
HEADS = row("heads of a model", "num_attention_heads T llama:LlamaConfig")
KEY_HEADS = row("key/value heads of a model", "num_key_value_heads T llama:LlamaConfig")
KINDS = row("kinds of layers of a configuration", "layer_types T gemma3:Gemma3TextConfig")
OLDER_KINDS = row("kinds of blocks of a configuration", "layers_block_type T recurrent_gemma:RecurrentGemmaConfig")
ROPE = row("parameters of a rotary embedding", "rope_parameters T llama:LlamaConfig")
DECODER = row("whether a model decodes", "is_decoder T bert:BertConfig")
BOTH = row(
    "whether encoder and decoder are one model",
    "is_encoder_decoder T transformers.configuration_utils:PreTrainedConfig",
)
AHEAD = row("whether prompts see ahead", "use_bidirectional_attention T gemma3:Gemma3TextConfig")
LATENTS = row("rank of latents in a cache", "kv_lora_rank T deepseek_v3:DeepseekV3Config")
UP = row("projection of latents to keys and values", "kv_b_proj T deepseek_v3:DeepseekV3Attention")
PLAIN_WIDTH = row("numbers of a key that are not rotated", "qk_nope_head_dim T deepseek_v3:DeepseekV3Config")
SHARING = row(
    "layers that share a cache",
    Spelling("kv_sharing_modes", "transformers", since="5.24", where="transformers:Gemma4TextConfig"),
)
ABREAST = row("streams that a layer reads side by side", "altup_num_inputs T gemma3n:Gemma3nTextConfig")
PICTURED_LAYERS = row(
    "which layers of a decoder read images",
    "cross_attention_layers T mllama:MllamaTextConfig",
    "cross_layer_interval T idefics:IdeficsConfig",
)
PARALLEL = row("attention beside the MLP", "use_parallel_residual T gpt_neox:GPTNeoXConfig")
DEEP_LAYERS = row("layers of deep features", "deepstack_visual_indexes T qwen3_vl:Qwen3VLVisionConfig")
PATCH = row(
    "side of a patch",
    "patch_size T clip:CLIPVisionConfig",
    "patch_size D transformers.transformer_flux:FluxTransformer2DModel",
    "patch_size M vision_transformer:PatchEmbed",
)
MARKS = row(
    "whether a tokenizer adds marks",
    "add_special_tokens T transformers.tokenization_utils_base:PreTrainedTokenizerBase.__call__",
)
TOWER_DEPTH = row("frames of a patch of a tower", "temporal_patch_size T qwen2_5_vl:Qwen2_5_VLVisionConfig")
TICKS = row("steps of the time axis in a second", "tokens_per_second T qwen2_5_vl:Qwen2_5_VLVisionConfig")
MOST_POSITIONS = row("positions that a model was trained for", "max_position_embeddings T llama:LlamaConfig")
SETTINGS = row("settings of generation", "generation_config T transformers.generation:GenerationMixin")
ENDS = row("ids that end a text", "eos_token_id T transformers.generation:GenerationConfig")
LAYERDROP = row("layers skipped at random", "layerdrop T whisper:WhisperEncoder")
PLACE_IN_MODEL = row("configuration's place in another", "base_config_key T clip:CLIPVisionConfig")
CACHE_KIND = row("kind of cache that is asked for", "cache_implementation T transformers.generation:GenerationConfig")
EARLY_EXIT = row(
    "layers by which a model drafts for itself",
    "assistant_early_exit T transformers.generation.configuration_utils:GenerationConfig",
)
DRAFTS = row("whether it drafts for another", "is_assistant T transformers.generation:GenerationConfig")
CHUNK = row("tokens read at once", "prefill_chunk_size T transformers.generation:GenerationConfig")

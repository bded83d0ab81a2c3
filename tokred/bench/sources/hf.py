"""Models of transformers by name or folder: the class that the configuration names, and its processors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tokred.bench.sources.record import (
    NoModelError,
    Options,
    Reading,
    Source,
    cast,
    first_line,
    no_download,
    no_settings,
    quiet,
)

# Tables of transformers by the kind of model that their classes are, the most telling first: a class of a model with
# vision may stand among the language models too.
TABLES = (
    ("vision-language model", ("IMAGE_TEXT_TO_TEXT", "VISUAL_QUESTION_ANSWERING")),
    ("speech", ("SPEECH_SEQ_2_SEQ",)),
    ("dual encoder", ("ZERO_SHOT_IMAGE_CLASSIFICATION",)),
    ("encoder", ("IMAGE_CLASSIFICATION", "IMAGE", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "OBJECT_DETECTION",
                 "UNIVERSAL_SEGMENTATION", "INSTANCE_SEGMENTATION", "MASKED_IMAGE_MODELING", "MASK_GENERATION",
                 "ZERO_SHOT_OBJECT_DETECTION", "KEYPOINT_DETECTION", "BACKBONE")),
    ("video encoder", ("VIDEO_CLASSIFICATION",)),
    ("audio encoder", ("AUDIO_CLASSIFICATION", "CTC", "AUDIO_FRAME_CLASSIFICATION", "AUDIO_XVECTOR")),
    ("language model", ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")),
    ("text encoder", ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "MASKED_LM", "TEXT_ENCODING",
                      "QUESTION_ANSWERING", "MULTIPLE_CHOICE")),
)  # fmt: skip
# The input that a class takes first, where no table has it.
INPUTS = {
    "pixel_values": "encoder",
    "pixel_values_videos": "video encoder",
    "input_values": "audio encoder",
    "input_features": "audio encoder",
    "input_ids": "text encoder",
}


def load(name: str, options: Options) -> Source:
    """A model of transformers, in the class that its configuration names.

    Raises:
        NoModelError: transformers is not installed or does not know it, or configuration or weights cannot be had.
    """
    try:
        import transformers
        from transformers import AutoConfig
    except ImportError as error:
        raise NoModelError("hf:NAME needs transformers: pip install transformers") from error
    quiet(transformers)
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise no_settings(f"hf:{name}", error) from error
    except (ValueError, KeyError) as error:
        raise NoModelError(f"transformers cannot read {name!r}: {first_line(error)}{_elsewhere(name)}") from error
    if options.size is not None:
        raise ValueError("--size is for models of timm's and open_clip's: of transformers' the configuration decides")
    cls = class_of(config, name)
    kind = kind_of(cls.__name__, cls)
    try:
        if options.shapes:
            with torch.device("meta"):
                model: Any = cls(config)
        elif options.random_weights:
            model = cast(cls(config), options.dtype)
        else:
            model = cls.from_pretrained(name, dtype=options.dtype)
    except OSError as error:
        raise no_download(f"hf:{name}", error) from error
    except (ValueError, RuntimeError, ImportError) as error:
        raise NoModelError(f"transformers cannot make {name!r}: {first_line(error)}") from error
    head = cls.__name__.endswith("Classification")
    source = Source(f"hf:{name}", model.eval(), kind, "transformers", weights=options.weights, origin=name)
    source.classes = int(getattr(config, "num_labels", 0)) if head else 0
    if options.shapes:
        if kind in ("encoder", "dual encoder"):
            source.images = reading(config, None)
    else:
        equip(source, config)
    return source


def _elsewhere(name: str) -> str:
    from pathlib import Path

    if (Path(name) / "model_index.json").is_file():
        return f"; it is a pipeline: diffusers:{name}"
    return ""


def class_of(config: Any, name: str) -> Any:
    """The class that a configuration names, or else the fullest one of its family that transformers has.

    Raises:
        NoModelError: transformers has no such class.
    """
    import transformers

    for arch in getattr(config, "architectures", None) or ():
        found = getattr(transformers, arch, None)
        if found is not None:
            return found
        raise NoModelError(
            f"{name!r} is of class {arch}, which transformers does not have: a model with code of its own is given as "
            "module:function"
        )
    for auto in ("ImageTextToText", "SpeechSeq2Seq", "CausalLM", "ImageClassification", ""):
        mapping = getattr(transformers, f"AutoModel{'For' if auto else ''}{auto}")._model_mapping
        if type(config) in mapping.keys():  # noqa: SIM118 (no dict)
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise NoModelError(f"transformers has no model for {type(config).__name__}")


def kind_of(name: str, cls: Any) -> str:
    """The kind of a model's class, by the tables of transformers, or else by the input that it takes."""
    from transformers.models.auto import modeling_auto

    for kind, tables in TABLES:
        for table in tables:
            for value in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).values():
                if name == value or (isinstance(value, tuple | list) and name in value):
                    return kind
    first = getattr(cls, "main_input_name", "input_ids")
    if first == "input_ids" and "pixel_values" in _arguments(cls.forward):
        return "dual encoder"
    if first == "input_ids" and _decodes(cls):
        return "language model"
    return INPUTS.get(first, "encoder")


def _decodes(cls: Any) -> bool:
    from tokred.adapters.contract import cache_argument

    return cache_argument(cls.forward) is not None and not hasattr(cls, "get_encoder")


def _arguments(function: Callable[..., Any]) -> Iterable[str]:
    import inspect

    return inspect.signature(function).parameters


def equip(source: Source, config: Any) -> None:
    """Add the tokenizer and the processor that lie beside the weights; what is not there stays None."""
    import transformers as t

    if source.kind in ("language model", "text encoder"):
        source.tokenizer = _tried(t.AutoTokenizer, source.origin)
    elif source.kind in ("vision-language model", "speech"):
        part = "image_processor" if source.kind.startswith("vision") else "feature_extractor"
        found = _tried(t.AutoProcessor, source.origin)
        # Where there is no processor, transformers hands out a part of it, such as the tokenizer.
        if not hasattr(found, part):
            found = None if source.kind.startswith("vision") else _tried(t.AutoFeatureExtractor, source.origin)
        source.processor = found
        own = getattr(found, "tokenizer", None)
        source.tokenizer = own if own is not None else _tried(t.AutoTokenizer, source.origin)
    elif source.kind == "audio encoder":
        source.processor = _tried(t.AutoFeatureExtractor, source.origin)
    elif source.kind == "video encoder":
        source.processor = _tried(t.AutoImageProcessor, source.origin)
    elif source.kind in ("encoder", "dual encoder"):
        if source.kind == "dual encoder":
            source.tokenizer = _tried(t.AutoTokenizer, source.origin)
        source.processor = _tried(t.AutoImageProcessor, source.origin)
        source.images = reading(config, source.processor)


def _tried(auto: Any, name: str) -> Any:
    try:
        return auto.from_pretrained(name)
    except (OSError, ValueError, ImportError, AttributeError, TypeError, KeyError):
        return None


class Pictures:
    """A transform of one picture by an image processor of transformers."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, picture: Any) -> Tensor:
        found: Tensor = self.processor(images=picture, return_tensors="pt")["pixel_values"][0]
        return found


def reading(config: Any, processor: Any) -> Reading:
    """How a model of transformers reads images, by its configuration and its processor."""
    inner = getattr(config, "vision_config", config)
    size = getattr(inner, "image_size", None) or 224
    high, wide = (size, size) if isinstance(size, int) else tuple(size)[:2]
    channels = int(getattr(inner, "num_channels", 3))
    mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    return Reading(
        (int(high), int(wide)),
        channels,
        tuple(mean) if mean is not None else (0.5,) * channels,
        tuple(std) if std is not None else (0.5,) * channels,
        transform=None if processor is None else Pictures(processor),
        argument="pixel_values",
    )

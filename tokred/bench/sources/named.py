"""Models by name: which library a name belongs to, and the model with what it needs."""

from __future__ import annotations

import difflib
import json
from dataclasses import replace
from pathlib import Path

from tokred.bench.sources import embedded_models, hf, made, pipelines, timm_models, two_towers
from tokred.bench.sources.record import NoModelError, Options, Source

FORMS = (
    "embedded, a name of timm's, hf:NAME (transformers), diffusers:NAME, open_clip:ARCH/PRETRAINED, a folder that one "
    "of these saved, or module:function or file.py:function that makes the model"
)


def model(spec: str, options: Options | None = None) -> Source:
    """A model by name.

    Args:
        spec: ``embedded``; ``dinov2`` of the zoo; a name of timm's, with its own ``hf-hub:`` and ``local-dir:`` too;
            ``hf:NAME`` of transformers; ``diffusers:NAME``, a pipeline or a denoiser; ``open_clip:ARCH`` or
            ``open_clip:ARCH/PRETRAINED``; a folder that one of these saved, which is recognised by what lies in it; or
            ``module:function`` or ``file.py:function``, which returns the model, or the model with its tokenizer,
            processor or transform.
        options: wishes about size, weights and type.

    Raises:
        NoModelError: there is no such model, its weights cannot be had, or its library is not installed.
        ValueError: an option does not fit the model.
    """
    options = options or Options()
    scheme, rest = split(spec)
    if options.checkpoint is not None:
        if scheme != "timm":
            raise ValueError(f"--checkpoint and --num-classes are for models of timm's, and {spec!r} is none")
        if not options.checkpoint.is_file():
            raise ValueError(f"--checkpoint {options.checkpoint} is no file")
    makers = {
        "embedded": embedded_models.embedded,
        "dinov2": embedded_models.dinov2,
        "hf": hf.load,
        "diffusers": pipelines.load,
        "open_clip": two_towers.load,
        "made": made.load,
        "timm": timm_models.load,
    }
    return replace(makers[scheme](rest, options), name=spec)


def skeleton(spec: str, size: int | None = None) -> Source:
    """A model without weights, for questions about its structure; at most its configuration is downloaded.

    Raises:
        NoModelError, ValueError: as :func:`model`.
    """
    return model(spec, Options(size=size, shapes=True))


def split(spec: str) -> tuple[str, str]:
    """The maker of a name, and what it is to be given.

    Raises:
        NoModelError: there is no such folder or name.
    """
    if spec in ("embedded", "dinov2"):
        return spec, spec
    for scheme in ("hf", "diffusers", "open_clip"):
        if spec.startswith(f"{scheme}:"):
            return scheme, spec.partition(":")[2]
    if spec.startswith(("hf-hub:", "hf_hub:", "local-dir:", "timm:")):
        return "timm", spec.removeprefix("timm:")
    if ":" in spec and not Path(spec).exists():
        return "made", spec
    if Path(spec).is_dir():
        return recognised(Path(spec))
    if spec in pipelines.known():
        return "diffusers", spec
    if "/" not in spec and not timm_models.known(spec):
        raise NoModelError(_unknown(spec))
    if "/" in spec:
        raise NoModelError(
            f"no folder is named {spec!r}; a model of transformers is written hf:{spec}, a pipeline diffusers:{spec}, "
            f"one of timm's hf-hub:{spec}"
        )
    return "timm", spec


def recognised(folder: Path) -> tuple[str, str]:
    """The library that saved a folder.

    Raises:
        NoModelError: nothing in it says so.
    """
    if (folder / "model_index.json").is_file():
        return "diffusers", str(folder)
    if (folder / "open_clip_config.json").is_file():
        return "open_clip", str(folder)
    if (folder / "config.json").is_file():
        try:
            config = json.loads((folder / "config.json").read_text("utf8"))
        except ValueError as error:
            raise NoModelError(f"{folder / 'config.json'} is not JSON: {error}") from error
        if "_class_name" in config:
            return "diffusers", str(folder)
        if "architecture" in config and "model_type" not in config:
            return "timm", f"local-dir:{folder}"
        return "hf", str(folder)
    raise NoModelError(
        f"{folder} holds no model: neither config.json (transformers, timm, a denoiser), model_index.json (a pipeline "
        "of diffusers) nor open_clip_config.json"
    )


def _unknown(name: str) -> str:
    names = ["embedded", "dinov2", *pipelines.known(), *timm_models.names()]
    near = [k for k in names if k.startswith(name)][:3] or difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`embedded` is always there."
    return f"no model is named {name!r}; {hint} A model is {FORMS}"

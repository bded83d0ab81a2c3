"""Arguments and options that several commands share: the model, the methods, and what a shell completes of them."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

TYPES = ("float32", "bfloat16", "float16")
SCHEMES = ("hf:", "diffusers:", "open_clip:")


def complete_model(incomplete: str) -> list[str]:
    """Names of models that begin so, and folders."""
    from tokred.bench.sources import pipelines, timm_models

    if incomplete.startswith(SCHEMES):
        scheme, _, rest = incomplete.partition(":")
        names = [f"{scheme}:{folder}" for folder in _folders(rest)]
        if scheme == "open_clip":
            try:
                import open_clip

                names += [f"open_clip:{arch}" for arch in open_clip.list_models()]
            except ImportError:
                pass
        return [name for name in names if name.startswith(incomplete)]
    names = ["embedded", "dinov2", *SCHEMES, *pipelines.known(), *timm_models.names()]
    return [name for name in names if name.startswith(incomplete)] + _folders(incomplete)


def _folders(start: str) -> list[str]:
    return sorted(p for p in glob.glob(f"{glob.escape(start)}*") if Path(p).is_dir())


def complete_method(incomplete: str) -> list[str]:
    """Names of methods that begin so; after a name and a space, its parameters."""
    import dataclasses

    from tokred.core.registry import methods

    # Of several methods that act together, the last one is being typed.
    before, plus, last = incomplete.rpartition(" + ")
    name, space, rest = last.partition(" ")
    if not space:
        return [f"{before}{plus}{known}" for known in methods if known.startswith(name)]
    if name not in methods:
        return []
    typed, gap, key = rest.rpartition(" ")
    there = f"{before}{plus}{name} {typed}{gap}"
    fields = [f.name for f in dataclasses.fields(methods.get(name)) if f.init]  # type: ignore[arg-type]
    return [f"{there}{field}=" for field in fields if field.startswith(key) and f"{field}=" not in typed]


MODEL = "embedded, a name of timm's, hf:NAME, diffusers:NAME, open_clip:ARCH/TAG, a folder, or module:function."
Model = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL, autocompletion=complete_model)]
OldModel = Annotated[str | None, typer.Option("--model", hidden=True, autocompletion=complete_model)]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "-m",
        "--method",
        metavar="SETTING",
        help="A method with its settings, such as 'tome r=13', as often as needed.",
        autocompletion=complete_method,
    ),
]
DataName = Annotated[
    str | None,
    typer.Option("--data", "-d", help="A folder, a file, hfds:NAME[:CONFIG][:SPLIT], noise, or module:function."),
]
MetricName = Annotated[
    str | None, typer.Option(help="A ready metric, or module:function of (output, batch). [default: by the data]")
]
MetricNames = Annotated[
    str | None,
    typer.Option(
        "--metric", help="A ready metric, module:function of (output, batch), or several with commas. [by the data]"
    ),
]
Better = Annotated[str, typer.Option(help="higher or lower, of a metric of your own.")]
Size = Annotated[int | None, typer.Option(min=1, help="Height and width of images, where the model takes others.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
DType = Annotated[str, typer.Option(help=f"{', '.join(TYPES)}.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch on the CPU. [default: torch's]")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable, on standard output.")]


def one_model(model: str | None, old: str | None, default: str | None) -> str | None:
    """The model, by position or as ``--model``.

    Raises:
        ValueError: it is named twice, differently.
    """
    if model is not None and old is not None and model != old:
        raise ValueError(f"two models are named, {model!r} and --model {old!r}")
    return model or old or default


def settings(texts: Sequence[str] | None, *, placed: bool = False) -> list[list[str]]:
    """The methods that are typed, each as the settings that act together in it; every one exists and is well-formed.

    Args:
        texts: as they are typed.
        placed: whether they may say how they are applied, ``expose=last``, beside their parameters.

    Raises:
        UnknownMethodError, TypeError, ValueError: one is not; the message says what is.
    """
    from tokred import api
    from tokred.bench.entries import entry
    from tokred.core.settings import parse_setting, split_settings

    found = []
    for text in dict.fromkeys(texts or ()):
        parts = split_settings(text)
        for part in parts:
            name, parameters = parse_setting(part)
            if placed:
                entry(part)
            else:
                api.make(name, **parameters)
        found.append(parts)
    return found


def single(parts: Sequence[str], command: str) -> str:
    """The one setting of a command that takes no methods that act together.

    Raises:
        ValueError: there are several.
    """
    if len(parts) > 1:
        raise ValueError(f"{command} takes one method at a time, got {' + '.join(parts)!r}")
    return parts[0]


def type_of(text: str) -> Any:
    """A type of torch's.

    Raises:
        ValueError: it is none of :data:`TYPES`.
    """
    import torch

    if text not in TYPES:
        raise ValueError(f"--dtype must be {', '.join(TYPES)}, got {text!r}")
    return getattr(torch, text)


def check_device(text: str) -> str:
    """The device, which has to be there.

    Raises:
        ValueError: it is none, or torch sees no such device.
    """
    import torch

    try:
        where = torch.device(text)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {text!r}") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch sees no CUDA device")
    return text

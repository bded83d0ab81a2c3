"""Things that the user's own code makes: ``module:function`` or ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from torch import nn

from tokred.bench.sources.record import NoModelError, Options, Reading, Source


def target(spec: str) -> Any:
    """The object that a name leads to.

    Args:
        spec: ``package.module:name`` or ``path/to/file.py:name``.

    Raises:
        NoModelError: there is no such module, file or name in it.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name.isidentifier():
        raise NoModelError(f"{spec!r} is neither module:function nor file.py:function")
    if where.endswith(".py") or "/" in where:
        module = _file(Path(where))
    else:
        # As `python -m` does: the folder in which the command is given counts.
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            module = importlib.import_module(where)
        except ImportError as error:
            raise NoModelError(f"{spec!r}: no module {where!r} can be imported ({error})") from error
    found = getattr(module, name, None)
    if found is None:
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")][:8]
        raise NoModelError(f"{where} has no {name!r}; it has {', '.join(names) or 'nothing to call'}")
    return found


def _file(path: Path) -> Any:
    if not path.is_file():
        raise NoModelError(f"{path} is not there")
    name = f"tokred_given_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a file has one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Workers of a loader unpickle what the file defines by its module's name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise NoModelError(f"{path} fails when it is run: {type(error).__name__}: {error}") from error
    return module


def call(spec: str) -> Any:
    """The result of a function without arguments.

    Raises:
        NoModelError: there is none, it wants arguments, or it fails.
    """
    found = target(spec)
    if not callable(found) or isinstance(found, nn.Module):
        return found
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise NoModelError(f"{spec!r} has to be callable without arguments: {error}") from error
    except ValueError:  # a builtin, whose signature is not known
        pass
    try:
        return found()
    except Exception as error:
        raise NoModelError(f"{spec} fails: {type(error).__name__}: {error}") from error


def load(spec: str, options: Options) -> Source:
    """A model that a function makes, with what it returns beside it: a tokenizer, a processor, or a transform.

    Raises:
        NoModelError: the function cannot be called, or returns no model.
    """
    found = call(spec)
    model, *more = found if isinstance(found, tuple) else (found,)
    pipeline = hasattr(model, "components") and callable(model)
    if not isinstance(model, nn.Module) and not pipeline:
        raise NoModelError(f"{spec} has to return a model, or (model, tokenizer), and returns {type(model).__name__}")
    kind = "pipeline" if pipeline else kind_of(model)
    source = Source(spec, model, kind, "", weights="given", origin=spec)
    if not pipeline:
        model.eval()
    for one in more:
        _add(source, one, spec)
    if source.images is None and kind in ("encoder", "dual encoder"):
        source.images = images_of(model)
    elif source.images is not None and source.images.size == (0, 0):
        plain = images_of(model)
        if plain is not None:
            source.images = plain._replace(transform=source.images.transform)
    config = getattr(model, "config", None)
    source.classes = int(getattr(model, "num_classes", 0) or getattr(config, "num_labels", 0) or 0)
    return source


def _add(source: Source, one: Any, spec: str) -> None:
    if hasattr(one, "tokenizer") or hasattr(one, "image_processor") or hasattr(one, "feature_extractor"):
        source.processor, source.tokenizer = one, getattr(one, "tokenizer", source.tokenizer)
    elif hasattr(one, "convert_ids_to_tokens") or (hasattr(one, "encode") and hasattr(one, "decode")):
        source.tokenizer = one
    elif hasattr(one, "preprocess") or hasattr(one, "sampling_rate"):
        source.processor = one
    elif callable(one):
        source.images = Reading((0, 0), transform=one)
    else:
        raise NoModelError(
            f"{spec} returns {type(one).__name__} beside the model: no tokenizer, processor or transform"
        )


def kind_of(model: nn.Module) -> str:
    """The kind of a model in memory."""
    if type(model).__module__.startswith("diffusers."):
        return "denoiser"
    if type(model).__module__.startswith("open_clip."):
        return "dual encoder"
    if hasattr(model, "config") and hasattr(model, "main_input_name"):
        from tokred.bench.sources import hf

        return hf.kind_of(type(model).__name__, type(model))
    return "encoder"


def images_of(model: nn.Module) -> Reading | None:
    """How a model in memory reads images, where it says so."""
    if hasattr(model, "pretrained_cfg"):
        import timm

        from tokred.bench.sources import timm_models

        return timm_models.reading(timm, model, None)
    config = getattr(model, "config", None)
    if config is not None and getattr(model, "main_input_name", "") == "pixel_values":
        from tokred.bench.sources import hf

        return hf.reading(config, None)
    return None

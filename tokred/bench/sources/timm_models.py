"""Models of timm by name, with the way in which timm feeds them."""

from __future__ import annotations

from typing import Any

import torch

from tokred.bench.sources.record import NoModelError, Options, Reading, Source, cast, first_line, no_download

_HUB = ("hf-hub:", "hf_hub:", "local-dir:")


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise NoModelError(f"{name!r} would be a model of timm's, which is not installed: pip install timm") from error
    return timm


def names() -> list[str]:
    """All names of timm's; empty without it."""
    try:
        import timm
    except ImportError:
        return []
    found: list[str] = timm.list_models()
    return found


def known(name: str) -> bool:
    """True if timm has a model of this name, its pretrained tag left aside.

    Raises:
        NoModelError: timm is not installed.
    """
    return bool(_timm(name).is_model(name.partition(".")[0]))


def load(name: str, options: Options) -> Source:
    """A model of timm's.

    Raises:
        NoModelError: it cannot be made, or the weights cannot be had.
        ValueError: the checkpoint does not fit.
    """
    timm = _timm(name)
    if not name.startswith(_HUB) and not known(name):
        raise NoModelError(f"timm has no model {name!r}")
    given: dict[str, Any] = {} if options.size is None else {"img_size": options.size}
    classes = options.classes
    if options.checkpoint is not None and classes is None:
        classes = _outputs(timm, name, options)
    if classes is not None:
        given["num_classes"] = classes
    trained = not (options.shapes or options.random_weights or options.checkpoint)
    try:
        model: Any = (
            _hollow(timm, name, **given) if options.shapes else timm.create_model(name, pretrained=trained, **given)
        )
        model.eval()
    except OSError as error:
        raise no_download(name, error) from error
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise NoModelError(f"timm cannot make {name!r}: {first_line(error)}") from error
    if options.checkpoint is not None:
        _fill(timm, model, name, options)
    return Source(
        name,
        cast(model, options.dtype),
        "encoder",
        "timm",
        reading(timm, model, options.size),
        classes=int(getattr(model, "num_classes", 0)),
        weights=options.weights,
        origin=name,
    )


def _hollow(timm: Any, name: str, **given: Any) -> Any:
    """The model without weights; of a timm that cannot build it so, with random ones."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, **given)
    except (RuntimeError, NotImplementedError):
        return timm.create_model(name, **given)


def _outputs(timm: Any, name: str, options: Options) -> int:
    """The number of outputs that the head of a checkpoint has."""
    plain = _hollow(timm, name)
    head = plain.default_cfg.get("classifier") if hasattr(plain, "default_cfg") else None
    weights = _weights(timm, options)
    found = weights.get(f"{head}.weight") if isinstance(head, str) else None
    return int(plain.num_classes if found is None else found.shape[0])


def _weights(timm: Any, options: Options) -> dict[str, Any]:
    try:
        found: dict[str, Any] = timm.models.load_state_dict(str(options.checkpoint), weights_only=True)
    except Exception as error:
        raise ValueError(f"--checkpoint {options.checkpoint} cannot be read as weights: {first_line(error)}") from error
    return found


def _fill(timm: Any, model: Any, name: str, options: Options) -> None:
    try:
        model.load_state_dict(_weights(timm, options), strict=True)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"--checkpoint {options.checkpoint} does not fit {name!r}: {why}") from error


def reading(timm: Any, model: Any, size: int | None) -> Reading:
    """Images as timm's own validation feeds them: resize, crop and interpolation of the model's configuration."""
    config = timm.data.resolve_data_config({}, model=model)
    channels, high, wide = config["input_size"]
    if size is not None:
        high = wide = size
        config = {**config, "input_size": (channels, size, size)}
    transform = timm.data.create_transform(**config, is_training=False)
    return Reading(
        (int(high), int(wide)),
        int(channels),
        tuple(config["mean"]),
        tuple(config["std"]),
        float(config["crop_pct"]),
        transform,
    )

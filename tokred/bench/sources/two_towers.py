"""Models of open_clip by name: an image and a text tower."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from tokred.bench.sources.record import NoModelError, Options, Reading, Source, cast, first_line, no_download


def load(name: str, options: Options) -> Source:
    """A model of open_clip's: ``ARCH``, ``ARCH/PRETRAINED`` (a tag or a file of weights), or a folder.

    Raises:
        NoModelError: open_clip is not installed or cannot make it, or the weights cannot be had.
    """
    try:
        import open_clip
    except ImportError as error:
        raise NoModelError("open_clip:ARCH needs open_clip: pip install open_clip_torch") from error
    arch, pretrained = parts(name)
    bare = options.shapes or options.random_weights
    if pretrained is None and not bare and not arch.startswith(("hf-hub:", "local-dir:")):
        tags = open_clip.list_pretrained_tags_by_model(arch)
        hint = f", such as open_clip:{arch}/{tags[0]}" if tags else ""
        known = open_clip.list_models()
        if arch not in known:
            raise NoModelError(
                f"open_clip has no model {arch!r}; it has {', '.join(known[:5])} and {len(known) - 5} more"
            )
        raise NoModelError(f"open_clip:{arch} has no weights: name their tag or file{hint}, or use --random-weights")
    given: dict[str, Any] = {} if options.size is None else {"force_image_size": options.size}
    try:
        if options.shapes:
            given["device"] = "meta"
        with torch.device("meta") if options.shapes else nullcontext():
            model, _, transform = open_clip.create_model_and_transforms(
                arch, None if bare else pretrained, load_weights=not bare, **given
            )
    except OSError as error:
        raise no_download(f"open_clip:{name}", error) from error
    except Exception as error:
        raise NoModelError(f"open_clip cannot make {name!r}: {first_line(error)}") from error
    tokenizer = None
    if not options.shapes:
        try:
            tokenizer = open_clip.get_tokenizer(arch)
        except Exception:  # it may have to be downloaded; only labels by their names need it
            tokenizer = None
    size = getattr(model.visual, "image_size", 224)
    high, wide = (size, size) if isinstance(size, int) else tuple(size)[:2]
    reading = Reading((int(high), int(wide)), transform=transform)
    return Source(
        name,
        cast(model.eval(), options.dtype),
        "dual encoder",
        "open_clip",
        reading,
        tokenizer,
        weights=options.weights,
        origin=arch,
    )


def parts(name: str) -> tuple[str, str | None]:
    """The architecture and the pretrained tag of a name."""
    if name.startswith(("hf-hub:", "local-dir:")):
        return name, None
    if Path(name).is_dir():
        return f"local-dir:{name}", None
    arch, _, pretrained = name.partition("/")
    return arch, pretrained or None

"""Every tiny model with its laws, library by library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

import tokred
from tokred.doctor import caches, denoisers, encoders, mixtures, stores, visual
from tokred.doctor.laws import Case

BATCH = 2
PROMPTS = (23, 11)  # tokens of a padded batch
PICTURES: list[list[int | str]] = [[3, "image", 5], [2, "image", 1, "image", 4]]
SOUNDS: list[list[int | str]] = [[3, "clip", 5], [2, "clip", 4]]
MERGING: dict[str, Any] = {"max_downsample": 8, "merge_crossattn": True, "merge_mlp": True}
DIVIDED = ("TimeSformer",)


def _encoder(
    library: str,
    family: str,
    build: Callable[[], nn.Module],
    run: Callable[[nn.Module], list[Tensor]],
    kind: str,
    since: str = "",
) -> Case:
    nothing, reducing = [tokred.make("tome", r=0)], [tokred.make("tome", r=encoders.REMOVED)]
    checks = encoders.laws(kind)
    return Case(library, "encoder", family, build, run, nothing, reducing, encoders.counts, checks, since)


def timm_cases() -> Iterator[Case]:
    """Cases of timm."""
    from tokred.adapters.tiny import timm, windows

    for family, row in timm.FAMILIES.items():
        build = partial(timm.build, family)
        yield _encoder("timm", family, build, lambda m: [m(timm.images(BATCH))], "sequence", row.since)
    yield from _windows("timm", windows)


def _windows(library: str, windows: Any) -> Iterator[Case]:
    for family, row in windows.FAMILIES.items():
        if row.library == library:
            run = lambda m: windows.read(m, windows.images(BATCH))  # noqa: E731
            yield _encoder(library, family, partial(windows.build, family), run, "map")


def open_clip_cases() -> Iterator[Case]:
    """Cases of open_clip."""
    from tokred.adapters.tiny import open_clip

    for family in open_clip.FAMILIES:
        run = partial(_open_clip, family)
        yield _encoder("open_clip", family, partial(open_clip.build, family), run, "sequence")


def _open_clip(family: str, model: nn.Module) -> list[Tensor]:
    from tokred.adapters.tiny import open_clip

    return open_clip.outputs(model, *open_clip.inputs(family, BATCH))


def transformers_cases() -> Iterator[Case]:
    """transformers: encoders, caches of language models, models with vision, mixtures of experts."""
    from tokred.adapters.tiny import florence, kv, moe, omni, transformers, vlm, windows

    for family in transformers.FAMILIES:
        kind = "divided" if family in DIVIDED else "sequence"
        build, run = partial(transformers.build, family), partial(_transformers, family)
        yield _encoder("transformers", family, build, run, kind)
    yield from _windows("transformers", windows)
    caching = {family: _cache(family) for family in kv.FAMILIES}
    yield from caching.values()
    for family in stores.KINDS:
        yield stores.together(caching[family])
    for family in vlm.FAMILIES:
        yield _visual(family, partial(vlm.build, family), vlm.prompts(family, PICTURES))
    for family in vlm.HYBRIDS:
        yield _ahead(family, partial(vlm.build, family), vlm.prompts(family, PICTURES))
    if omni.known():
        yield _visual("qwen2_5_omni", omni.build, omni.prompts(SOUNDS))
    yield _read("florence2", florence.build, florence.prompts(PICTURES))
    for family in moe.FAMILIES:
        yield _mixture(family)


def _transformers(family: str, model: nn.Module) -> list[Tensor]:
    from tokred.adapters.tiny import transformers

    return transformers.read(family, model(**transformers.FAMILIES[family].inputs(BATCH)))


def _cache(family: str) -> Case:
    from tokred.adapters.tiny import kv

    ids, mask, _ = kv.padded(PROMPTS)
    batch = {"input_ids": ids, "attention_mask": mask}
    laws: dict[str, Callable[[Case], None]] = {"dropped": partial(caches.check_dropped, batch=batch)}
    if stores.crops(family):
        laws["cropped"] = stores.check_cropped
    return Case(
        "transformers", "kv", family, partial(kv.build, family), lambda m: caches.generated(m, batch)[0],
        [tokred.make("snapkv", budget=1.0)], [tokred.make("snapkv", budget=9, window=4, pool=3)], caches.counts,
        laws, longer=lambda m: caches.generated(m, batch, caches.LONG)[0],
    )  # fmt: skip


def _visual(family: str, build: Callable[[], nn.Module], batch: dict[str, Any]) -> Case:
    return Case(
        "transformers", "vlm", family, build, lambda m: caches.generated(m, batch)[0],
        [tokred.make("random_visual", budget=1.0), tokred.make("fastv", ratio=0.0)],
        [tokred.make("random_visual", budget=0.5), tokred.make("fastv", layer=1, ratio=0.4)], visual.counts,
        {"dropped": partial(visual.check_dropped, batch=batch)},
    )  # fmt: skip


def _ahead(family: str, build: Callable[[], nn.Module], batch: dict[str, Any]) -> Case:
    """A model with vision some of whose layers keep a state: tokens leave before the first, and in between none."""
    return Case(
        "transformers", "vlm", family, build, lambda m: caches.generated(m, batch)[0],
        [tokred.make("random_visual", budget=1.0)], [tokred.make("random_visual", budget=0.5)], visual.counts, {},
    )  # fmt: skip


def _read(family: str, build: Callable[[], nn.Module], batch: dict[str, Any]) -> Case:
    """A model with vision whose prompt an encoder reads, before which tokens leave, and between whose layers none."""
    begun = batch["input_ids"][:, :4]
    return Case(
        "transformers", "vlm", family, build, lambda m: [m(**batch, decoder_input_ids=begun).logits],
        [tokred.make("random_visual", budget=1.0)], [tokred.make("random_visual", budget=0.5)], visual.counts, {},
    )  # fmt: skip


def _mixture(family: str) -> Case:
    from tokred.adapters.tiny import kv, moe

    ids, mask, _ = kv.padded(PROMPTS)
    return Case(
        "transformers", "moe", family, partial(moe.build, family),
        lambda m: [m(input_ids=ids, attention_mask=mask, use_cache=False).logits],
        [tokred.make("capacity_drop", gamma=1024)], [tokred.make("capacity_drop", gamma=0.5)], mixtures.counts,
        {"dropped": mixtures.check_dropped},
    )  # fmt: skip


def diffusers_cases() -> Iterator[Case]:
    """Cases of diffusers."""
    from tokred.adapters.tiny import diffusion

    for family in diffusion.FAMILIES:
        frames = diffusion.FRAMES if family in diffusion.CLIPS else 1
        yield Case(
            "diffusers", "diffusion", family, partial(diffusion.build, family),
            partial(_denoised, family),
            [tokred.make("tomesd", ratio=0.0, **MERGING)], [tokred.make("tomesd", **MERGING)], denoisers.counts,
            {"dropped": partial(denoisers.check_dropped, frames=frames)},
        )  # fmt: skip


def _denoised(family: str, model: nn.Module) -> list[Tensor]:
    from tokred.adapters.tiny import diffusion

    return [diffusion.run(model, diffusion.inputs(family))]


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "timm": timm_cases,
    "open_clip": open_clip_cases,
    "transformers": transformers_cases,
    "diffusers": diffusers_cases,
}
# What each library has models of.
WINGS = {
    "timm": ("encoder",),
    "open_clip": ("encoder",),
    "transformers": ("encoder", "kv", "vlm", "moe"),
    "diffusers": ("diffusion",),
}

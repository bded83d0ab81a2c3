"""Which part of a model serves which stage: the one place where stages meet hosts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from tokred.core.method import Method
from tokred.core.registry import methods as registered
from tokred.errors import MissingInputError, NothingRecordedError, UnknownModelError, UnsupportedModelError
from tokred.patch import patches_of
from tokred.vlm.report import LayerTokens, VisualReport

# Stages that some adapter offers, the usual one first.
STAGES = ("block", "attention", "cache", "projector", "layer")


_USUAL = {
    "block": "tome",
    "attention": "tomesd",
    "cache": "snapkv",
    "projector": "divprune",
    "layer": "fastv",
}

# What methods of ``projector`` take from the tower's attention.
_OF_TOWER = frozenset({"q", "k", "class_attention", "attention", "tower_layers"})


def find(model: nn.Module, stage: str = "block") -> Any:
    """The part of ``model`` that methods of ``stage`` act on.

    Raises:
        TypeError: ``model`` is no module.
        UnsupportedModelError: there is no such part; the message says why.
        MissingInputError: no adapter offers the stage.
    """
    from tokred import adapters

    model = module_of(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError("the model is TorchScript, which cannot be patched: apply tokred first, then trace")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError("the model is compiled: apply tokred to the original model, then torch.compile it")
    if stage not in STAGES:
        raise MissingInputError(f"no adapter offers the stage {stage!r}; stages are {', '.join(STAGES)}")
    if stage == "block":
        return adapters.find(model)
    return adapters.find(model, stage)


def module_of(model: Any) -> Any:
    """The denoiser of a pipeline of diffusers; anything else as it is.

    Raises:
        UnsupportedModelError: a pipeline without a denoiser.
    """
    packages = {c.__module__.partition(".")[0] for c in type(model).__mro__}
    if isinstance(model, nn.Module) or "diffusers" not in packages:
        return model
    from tokred.adapters.diffusion import part_of

    found = part_of(model)
    return model if found is None else found


def find_for(model: Any, method: Method) -> Any:
    """The part of ``model`` that ``method`` acts on.

    Raises:
        MissingInputError: the model offers other stages than the method's.
        UnsupportedModelError, TypeError: as :func:`find`.
    """
    try:
        return find(model, method.stage)
    except UnknownModelError:
        other = _other(model, method.stage)
        if other is None:
            raise
        raise MissingInputError(
            f"{method.name!r} acts at stage {method.stage!r}, but {other.family} offers only stage {other.stage!r}: "
            f"take a method of that stage, such as {_USUAL[other.stage]!r}"
        ) from None


def compose(methods: Sequence[Method]) -> list[Method]:
    """Methods in the order of their stages, at most one a stage.

    Raises:
        ValueError: the list is empty, two methods act at one stage, or one reads what another takes away.
    """
    if not methods:
        raise ValueError("the list of methods is empty")
    stages = [m.stage for m in methods]
    if len(set(stages)) < len(stages):
        raise ValueError(f"one method a stage: {', '.join(m.name for m in methods)} act at {', '.join(stages)}")
    found = sorted(methods, key=lambda m: (*STAGES, m.stage).index(m.stage))
    inside = next((m for m in found if m.stage == "block"), None)
    reads = next((m for m in found if m.stage == "projector" and m.reads & _OF_TOWER), None)
    if inside is not None and reads is not None:
        raise ValueError(
            f"{inside.name!r} leaves fewer tokens in the vision tower, so that its attention says nothing about single "
            f"patches, and {reads.name!r} reads {', '.join(sorted(reads.reads & _OF_TOWER))}: take a method that reads "
            "the features alone beside it, such as 'divprune'"
        )
    return found


def reasons(model: nn.Module) -> dict[str, tuple[Any, str]]:
    """For every method: the host that it runs on, or None, and how it runs or why it does not."""
    found: dict[str, Any] = {}
    errors: dict[str, UnsupportedModelError] = {}
    for stage in STAGES:
        try:
            found[stage] = find(model, stage)
        except UnsupportedModelError as error:
            errors[stage] = error
    rows: dict[str, tuple[Any, str]] = {}
    for name in registered:
        cls = registered.get(name)
        host = found.get(cls.stage)
        if host is not None:
            missing = host.missing(cls)
            lacks = f"needs {', '.join(sorted(missing))}, which {host.family} does not supply" if missing else ""
            rows[name] = (None if missing else host, lacks)
        else:
            rows[name] = (None, _why_not(cls.stage, found, errors))
    return rows


class CacheReport(NamedTuple):
    """The cache after the last forward of a model with a policy.

    Attributes:
        family: of the model.
        method: the policy.
        layers: slots seen, rows held, bytes, and the bytes that all slots would take, for each layer.
    """

    family: str
    method: Method
    layers: tuple[Any, ...]

    @property
    def bytes(self) -> int:
        """Bytes that all layers hold."""
        return sum(row.bytes for row in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes without a policy."""
        return sum(row.dense_bytes for row in self.layers)

    def __str__(self) -> str:
        lines = [f"{self.method} on {self.family}", f"{'layer':>5} {'tokens':>8} {'rows':>8} {'KiB':>10} {'of':>10}"]
        for row in self.layers:
            held, dense = row.bytes / 1024, row.dense_bytes / 1024
            lines.append(f"{row.layer:>5} {row.seen:>8} {row.rows:>8} {held:>10.1f} {dense:>10.1f}")
        share = self.bytes / max(self.dense_bytes, 1)
        lines.append(f"cache: {self.bytes / 1024:.1f} of {self.dense_bytes / 1024:.1f} KiB ({share:.0%})")
        return "\n".join(lines)


def patched_with(model: Any) -> list[Method]:
    """The methods that ``model`` is patched with."""
    from tokred.adapters.swap import is_swapped

    parts = [part for _, patch in patches_of(module_of(model)) for part in patch.parts]
    # A part of the model may have been freed by itself since.
    return [part.method for part in parts if is_swapped(part.module) or part.method.stage in ("projector", "layer")]


def visual_settings(model: Any) -> Any:
    """What the hooks of a model share that is patched at the stages ``projector`` or ``layer``; None without."""
    found = (patch.settings.get("vlm") for _, patch in patches_of(module_of(model)))
    return next((s for s in found if s is not None), None)


def visual_report(model: nn.Module) -> VisualReport:
    """Tokens at every decoder layer's input, of the last prefill.

    Raises:
        NothingRecordedError: none has run since the model was patched.
    """
    settings = visual_settings(model)
    if not settings.last:
        raise NothingRecordedError("nothing is recorded: run one forward of the patched model first")
    rows = tuple(LayerTokens(i, *row) for i, row in enumerate(settings.last))
    return VisualReport(settings.family, tuple(patched_with(model)), settings.before, rows)


def cache_report(model: nn.Module) -> CacheReport:
    """Slots, rows and bytes of every layer, of the cache that ran last: as it is, or as it was when it was freed.

    Raises:
        NothingRecordedError: no forward with a cache has run since the model was patched.
    """
    settings = cache_settings(model)
    if not settings.last:
        raise NothingRecordedError("nothing is recorded: run one forward of the patched model with a cache first")
    return CacheReport(find(model, "cache").family, settings.policy, settings.last)


class SublayerReport(NamedTuple):
    """One sub-layer of the last forward of a denoiser.

    Attributes:
        name: in the denoiser.
        role: ``"self"``, ``"cross"`` or ``"mlp"``.
        tokens: of the image.
        left: tokens (with methods of keys and values: keys) that it ran on.
    """

    name: str
    role: str
    tokens: int
    left: int


class DenoiserReport(NamedTuple):
    """The last forward of a patched denoiser."""

    family: str
    method: Method
    sublayers: tuple[SublayerReport, ...]

    @property
    def reduced(self) -> int:
        """How many sub-layers ran on fewer tokens."""
        return sum(row.left < row.tokens for row in self.sublayers)

    def __str__(self) -> str:
        counts: dict[tuple[str, int, int], int] = {}
        for row in self.sublayers:
            key = (row.role, row.tokens, row.left)
            counts[key] = counts.get(key, 0) + 1
        lines = [f"{self.method} on {self.family}", f"{'sub-layer':>9} {'count':>6} {'tokens':>16}"]
        for (role, tokens, left), count in sorted(counts.items(), key=lambda c: (-c[0][1], c[0][0])):
            lines.append(f"{role:>9} {count:>6} {f'{tokens} -> {left}':>16}")
        lines.append(f"reduced: {self.reduced} of {len(self.sublayers)} sub-layers")
        return "\n".join(lines)


def stage_report(model: nn.Module) -> CacheReport | DenoiserReport:
    """The last forward, of a model patched at another stage than that of blocks.

    Raises:
        NothingRecordedError: no (uncompiled) forward has run since the model was patched.
    """
    for module in module_of(model).modules():
        session = module.__dict__.get("_tokred")
        if hasattr(session, "records") and hasattr(session, "begin"):
            if not session.records:
                raise NothingRecordedError(
                    "nothing is recorded: run one forward of the patched denoiser first (compiled ones keep no record)"
                )
            rows = tuple(SublayerReport(*session.records[key]) for key in sorted(session.records))
            return DenoiserReport(session.family, session.method, rows)
    return cache_report(model)


def cache_settings(model: nn.Module) -> Any:
    """What the hooks of a model with a policy share.

    Raises:
        NothingRecordedError: it has none.
    """
    for module in model.modules():
        settings = module.__dict__.get("_tokred")
        if hasattr(settings, "policy"):
            return settings
    raise NothingRecordedError("no policy acts on the model's cache: call tokred.apply(model, ...) first")


def kv_cache(model: nn.Module, *, prompt: int | None = None, steps: int | None = None, layout: str = "auto") -> Any:
    """An empty cache for a model that is patched with a policy, to be given to a forward or to ``generate``.

    ``generate`` makes one by itself; this is for loops of one's own, and for many questions on one context.

    Args:
        model: patched with a policy for its cache.
        prompt: tokens of the prompt, padding counted, where it comes in several forwards; None: the first forward's.
        steps: tokens that will be generated, which Keyformer's temperature depends on.
        layout: how rows are held where heads or samples keep different numbers. ``"rectangle"``: as many rows for each
            as for the longest. ``"flat"``: one head after the other, without empty rows. ``"auto"``: flat where a
            rectangle would hold more than 15 % of empty rows.

    Returns:
        A transformers cache with ``snapshot()``, ``restore(snapshot)``, ``layer_rows()`` and ``nbytes``.

    Raises:
        NothingRecordedError: the model has no policy.
        ValueError: there is no such layout.
    """
    cache = cache_settings(model).cache(layout)
    cache.engine.prompt, cache.engine.steps = prompt, steps
    return cache


def _why_not(stage: str, found: dict[str, Any], errors: dict[str, UnsupportedModelError]) -> str:
    """A refusal of the model itself says most; then what it offers instead; then that it is not known at all."""
    own = errors.get(stage)
    if own is not None and not isinstance(own, UnknownModelError):
        return str(own)
    if found:
        host = next(iter(found.values()))
        return f"acts at stage {stage!r}; {host.family} offers {host.stage!r}"
    refused = [e for e in errors.values() if not isinstance(e, UnknownModelError)]
    return str(refused[0] if refused else own or next(iter(errors.values())))


def _other(model: nn.Module, stage: str) -> Any:
    for other in STAGES:
        if other != stage:
            try:
                return find(model, other)
            except UnsupportedModelError:
                continue
    return None

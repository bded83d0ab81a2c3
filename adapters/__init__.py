"""Adapters: what each host library's models look like. They know no method; methods know no host.

A host library is imported only by its own adapter, and only when a model of that library is at hand.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn

from tokred.adapters.swap import host_class
from tokred.core.versions import check_tested
from tokred.errors import UnknownModelError, UnsupportedModelError

if TYPE_CHECKING:
    from tokred.adapters.encoder.host import Host

# First package of a class's module -> the adapter that knows it, with its function where that is not ``match``.
ADAPTERS = {
    "timm": "tokred.adapters.encoder.timm",
    "transformers": "tokred.adapters.encoder.transformers",
    "open_clip": "tokred.adapters.encoder.open_clip",
}
# The same for language models, whose caches may lose rows.
CACHES = {"transformers": "tokred.adapters.kv.host"}
# The same for denoisers, whose attention may run on fewer tokens.
DENOISERS = {"diffusers": "tokred.adapters.diffusion"}
# Models with vision whose visual tokens may leave, and language models whose later layers run on fewer tokens.
VISUAL = {"transformers": "tokred.adapters.vlm.host:match_projector"}
LAYERED = {"transformers": "tokred.adapters.vlm.host:match_layer"}
BY_STAGE = {"block": ADAPTERS, "cache": CACHES, "attention": DENOISERS, "projector": VISUAL, "layer": LAYERED}
KINDS = {
    "block": "encoders",
    "cache": "language models",
    "attention": "denoisers",
    "projector": "models with vision",
    "layer": "language models",
}


@overload
def find(model: nn.Module, stage: Literal["block"] = "block") -> Host: ...


@overload
def find(model: nn.Module, stage: str) -> Any: ...


def find(model: nn.Module, stage: str = "block") -> Any:
    """The one part of ``model`` that can be patched: the model itself, or a single known model inside it.

    Args:
        model: a model, or something that holds one.
        stage: ``"block"`` for a :class:`~tokred.adapters.encoder.host.Host`, ``"cache"`` for a ``CacheHost``,
            ``"attention"`` for a ``DenoiserHost``, ``"projector"`` and ``"layer"`` for a ``VisualHost``.

    Raises:
        UnsupportedModelError: no part can be patched (with the reason of the outermost part that was recognised), or
            several can, so that the user has to say which.
    """
    refusal: UnsupportedModelError | None = None
    hosts: list[tuple[str, Any]] = []
    settled: list[str] = []
    for name, module in model.named_modules():
        # What is inside a host belongs to it; what is inside a refused model is refused for its reason.
        if any(not outer or name == outer or name.startswith(f"{outer}.") for outer in settled):
            continue
        try:
            host = _match(module, BY_STAGE[stage])
        except UnsupportedModelError as error:
            refusal = refusal or error
            settled.append(name)
            continue
        if host is not None:
            hosts.append((name, host))
            settled.append(name)
    if len(hosts) > 1:
        # Beside an encoder of images or sound, one of text is the smaller part; apply to it alone to reduce it.
        hosts = [h for h in hosts if not getattr(h[1], "padded", False)] or hosts
    if len(hosts) > 1:
        names = ", ".join(repr(name) for name, _ in hosts)
        raise UnsupportedModelError(
            f"the model holds several models that can be patched ({names}): apply to one of them"
        )
    if hosts:
        return hosts[0][1]
    if refusal is not None:
        raise refusal
    raise UnknownModelError(
        f"{type(model).__name__} is of no family that tokred knows ({', '.join(BY_STAGE[stage])} {KINDS[stage]}), and "
        "holds none; "
        "docs/hosts.md lists the families"
    )


def _match(module: nn.Module, adapters: dict[str, str]) -> Any:
    packages = {c.__module__.partition(".")[0] for c in host_class(module).__mro__}
    for package, adapter in adapters.items():
        if package in packages:
            check_tested(package)
            where, _, match = adapter.partition(":")
            host = getattr(importlib.import_module(where), match or "match")(module)
            if host is not None:
                return host
    return None

"""Adapters: what each host library's models look like. They know no method; methods know no host.

A host library is imported only by its own adapter, and only when a model of that library is at hand. Here stands which
adapter serves which stage, and how the part of a model is found that methods of a stage act on.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import nn

from tokred.adapters.contract import members
from tokred.adapters.swap import host_class
from tokred.core.method import Method
from tokred.core.registry import methods as registered
from tokred.core.site import STAGES
from tokred.core.versions import check_tested
from tokred.errors import MissingInputError, UnknownModelError, UnsupportedModelError

if TYPE_CHECKING:
    from tokred.adapters.encoder.host import EncoderHost
    from tokred.adapters.host import Host

# First package of a class's module -> the adapter that knows it, with its function where that is not ``match``.
ADAPTERS = {
    "timm": "tokred.adapters.encoder.timm",
    "transformers": "tokred.adapters.encoder.transformers",
    "open_clip": "tokred.adapters.encoder.open_clip",
}
# The same for language models, whose caches may lose rows.
CACHES = {"transformers": "tokred.adapters.kv.encoders"}
# The same for denoisers, whose attention may run on fewer tokens.
DENOISERS = {"diffusers": "tokred.adapters.diffusion"}
# Models with vision whose visual tokens may leave, and language models whose later layers run on fewer tokens.
VISUAL = {"transformers": "tokred.adapters.vlm.memory.host:match_projector"}
LAYERED = {"transformers": "tokred.adapters.vlm.memory.host:match_layer"}
# Language models with layers of experts, which may run on fewer tokens.
MIXTURES = {"transformers": "tokred.adapters.moe.host"}


class Served(NamedTuple):
    """A stage and the adapters that serve it.

    Attributes:
        adapters: package of a host library, and the adapter whose ``match`` makes a host of its models.
        kind: of models, in words.
        usual: name of a method, for who asks for one of another stage.
    """

    adapters: dict[str, str]
    kind: str
    usual: str


BY_STAGE = {
    "block": Served(ADAPTERS, "encoders", "tome"),
    "attention": Served(DENOISERS, "denoisers", "tomesd"),
    "cache": Served(CACHES, "language models", "snapkv"),
    "projector": Served(VISUAL, "models with vision", "divprune"),
    "layer": Served(LAYERED, "language models", "fastv"),
    "experts": Served(MIXTURES, "mixtures of experts", "capacity_drop"),
}


@overload
def find(model: nn.Module, stage: Literal["block"] = "block") -> EncoderHost: ...


@overload
def find(model: nn.Module, stage: str) -> Any: ...


def find(model: nn.Module, stage: str = "block") -> Any:
    """The one part of ``model`` that methods of ``stage`` act on: the model itself, or a single known model inside it.

    Args:
        model: a model, something that holds one, or a pipeline of diffusers.
        stage: ``"block"`` for an :class:`~tokred.adapters.encoder.host.EncoderHost`, ``"cache"`` for a ``CacheHost``,
            ``"attention"`` for a ``DenoiserHost``, ``"projector"`` and ``"layer"`` for a ``VisualHost``,
            ``"experts"`` for a ``MixtureHost``.

    Raises:
        TypeError: ``model`` is no module.
        UnsupportedModelError: no part can be patched (with the reason of the outermost part that was recognised), or
            several can, so that the user has to say which.
        MissingInputError: no adapter offers the stage.
    """
    model = module_of(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError("the model is TorchScript, which cannot be patched: apply tokred first, then trace")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if members.COMPILED.on(model):
        raise UnsupportedModelError("the model is compiled: apply tokred to the original model, then torch.compile it")
    if stage not in STAGES:
        raise MissingInputError(f"no adapter offers the stage {stage!r}; stages are {', '.join(STAGES)}")
    served = BY_STAGE[stage]
    refusal: UnsupportedModelError | None = None
    hosts: list[tuple[str, Any]] = []
    settled: list[str] = []
    for name, module in model.named_modules():
        # What is inside a host belongs to it; what is inside a refused model is refused for its reason.
        if any(not outer or name == outer or name.startswith(f"{outer}.") for outer in settled):
            continue
        try:
            host = _match(module, served.adapters)
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
        f"{type(model).__name__} is of no family that tokred knows ({', '.join(served.adapters)} {served.kind}), and "
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
            f"take a method of that stage, such as {BY_STAGE[other.stage].usual!r}"
        ) from None


def _other(model: nn.Module, stage: str) -> Host | None:
    for other in STAGES:
        if other != stage:
            try:
                found: Host = find(model, other)
                return found
            except UnsupportedModelError:
                continue
    return None


def reasons(model: nn.Module) -> dict[str, tuple[Any, str]]:
    """For every method: the host that it runs on, or None, and how it runs or why it does not."""
    found: dict[str, Host] = {}
    errors: dict[str, UnsupportedModelError] = {}
    for stage in STAGES:
        try:
            found[stage] = find(model, stage)
        except UnsupportedModelError as error:
            errors[stage] = error
    rows: dict[str, tuple[Any, str]] = {}
    for name in registered:
        cls: type[Method] = registered.get(name)
        host = found.get(cls.stage)
        beside = next((stage for stage in _stages(cls) if stage not in found), None)
        if beside is not None:
            rows[name] = (None, _why_not(beside, found, errors))
        elif host is not None:
            missing = host.missing(cls)
            lacks = f"needs {', '.join(sorted(missing))}, which {host.family} does not supply" if missing else ""
            rows[name] = (None if missing else host, lacks)
        else:
            rows[name] = (None, _why_not(cls.stage, found, errors))
    return rows


def _stages(cls: type[Method]) -> list[str]:
    """Stages of what a method with its usual parameters is made of, beside its own; of most methods none."""
    try:
        return [one.stage for one in cls().members if one.stage != cls.stage]
    except (TypeError, ValueError):  # it has none that are usual
        return []


def _why_not(stage: str, found: dict[str, Host], errors: dict[str, UnsupportedModelError]) -> str:
    """A refusal of the model itself says most; then what it offers instead; then that it is not known at all."""
    own = errors.get(stage)
    if own is not None and not isinstance(own, UnknownModelError):
        return str(own)
    if found:
        host = next(iter(found.values()))
        return f"acts at stage {stage!r}; {host.family} offers {host.stage!r}"
    refused = [e for e in errors.values() if not isinstance(e, UnknownModelError)]
    return str(refused[0] if refused else own or next(iter(errors.values())))

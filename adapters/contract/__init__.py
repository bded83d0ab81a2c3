"""``contract``: what tokred takes for granted about host libraries, in one place.

Adapters ask for things by *role* (the cache that a forward was given, the function behind a wrapper), and this package
says what the hosts call them, since which version and until when. Where a type or an annotation tells more than a name,
it is asked first, so that the next renaming is found without a new release of tokred.

Private names, objects that are imported and wrappers stand in this file; public names of arguments, fields and
attributes are rows of :mod:`tokred.adapters.contract.words`, sub-modules and methods rows of
:mod:`~tokred.adapters.contract.members`, values and names of classes rows of :mod:`~tokred.adapters.contract.terms`.
Tables of families are rows as well, but those of a wing: ``vlm/families.py``, ``encoder/transformers_*.py``,
``diffusion/families.py``, inputs of denoisers in ``diffusion/inputs.py`` and ``clips.py``, and the models of ``tiny``.
They say which parts one host's class has.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.contract.spelling import Spelling as Spelling
from tokred.adapters.contract.spelling import arguments as arguments
from tokred.adapters.contract.spelling import look, spells
from tokred.adapters.contract.words import WORDS
from tokred.core import environment
from tokred.core.versions import release
from tokred.errors import UnsupportedModelError

_FORWARD = "transformers.models.llama.modeling_llama:LlamaModel.forward"
# The cache among the arguments of forwards, attention modules, mask functions and ``model_kwargs`` of ``generate``, and
# among the fields of outputs. transformers 5.24 takes the older names until 5.40 and renames them itself.
CACHE = (
    Spelling("cache", "transformers", since="5.24", where=_FORWARD),
    Spelling("past_key_values", "transformers", until="5.39", where=_FORWARD),
    Spelling("layer_past", "transformers", until="5.39", where=_FORWARD),
)
CACHE_NAMES = tuple(s.name for s in CACHE)


# What forwards of language models without keys and values call their state.
STATE_NAMES = ("cache_params", "state", "mems")


@functools.cache
def _cache_argument(function: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(function).parameters
    # An annotation survives renaming: ``Cache | None``, quoted or not.
    for name, parameter in parameters.items():
        # As text, of classes as well: compiled forwards trace this, and cannot ask a union for its name.
        text = str(parameter.annotation)
        if any(part.strip(" '\">").rpartition(".")[2] in _CACHE_TYPES for part in text.split("|")):
            return name
    return next((name for name in CACHE_NAMES if name in parameters), None)


_CACHE_TYPES = frozenset({"Cache", "DynamicCache", "EncoderDecoderCache"})


def cache_argument(function: Callable[..., Any]) -> str | None:
    """Name of the argument by which ``function`` takes a cache: the one annotated with a cache, else one of a known
    name; None where it takes none."""
    return _cache_argument(getattr(function, "__func__", function))


def cache_name(function: Callable[..., Any]) -> str:
    """Name of the cache argument of a function that is known to take a cache.

    Raises:
        TypeError: it takes none.
    """
    name = cache_argument(function)
    if name is None:
        raise TypeError(f"{getattr(function, '__qualname__', function)} takes no cache ({', '.join(CACHE_NAMES)})")
    return name


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among arguments by name; None where there is none."""
    for name in CACHE_NAMES:
        found = given.get(name)
        if found is not None:
            return found
    return None


def with_cache(given: Mapping[str, Any], name: str, cache: Any) -> dict[str, Any]:
    """Arguments with ``cache`` under ``name`` and under no other spelling, of which hosts take one at a time."""
    return {**{k: v for k, v in given.items() if k not in CACHE_NAMES}, name: cache}


def cache_kwargs(cache: Any) -> dict[str, Any]:
    """A cache as the keyword argument by which models of the installed transformers take it, in a forward and in
    ``generate``: ``cache`` from 5.24 on, ``past_key_values`` before.

    Args:
        cache: of :func:`tokred.kv_cache`, or any of transformers.

    Example:
        >>> model.generate(ids, **tokred.cache_kwargs(cache))
    """
    version = environment.version("transformers")
    return {next(s.name for s in CACHE if in_force(s, version)): cache}


def generation_cache_name(model_kwargs: Mapping[str, Any], model: nn.Module) -> str:
    """Key of the cache in ``model_kwargs`` of ``generate``: the one in use, else the one of the model's forward."""
    used = next((name for name in CACHE_NAMES if name in model_kwargs), None)
    return used if used is not None else cache_name(type(model).forward)


# Attributes by which wrappers remember the forward that they stand in front of: on the module itself, or on what the
# module holds under the first name, one item of its list after the other.
KEPT_FORWARDS = (
    (Spelling("_old_forward", "accelerate"), ""),
    (Spelling("_diffusers_hook", "diffusers", since="0.32"), "_fn_refs"),
)
_IN_LIST = ("forward", "original_forward")
# Classes that wrappers make of a module's class, by a base that all of them have.
_WRAPPING_BASES = (Spelling("FSDPModule", "torch", since="2.6"), Spelling("ReplicateModule", "torch", since="2.9"))


def is_wrapper(cls: type) -> bool:
    """True for a class that a wrapper (FSDP 2 and its kind) made of a module's class, and for the base of those."""
    names = {base.name for base in _WRAPPING_BASES}
    return any(c.__name__ in names and c.__module__.startswith("torch.") for c in (cls, *cls.__bases__))


def rewrapped(cls: type, bases: tuple[type, ...]) -> type:
    """``cls``, a wrapper's class, made of other ``bases``."""
    body = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, body)


def own_forwards(module: nn.Module) -> list[tuple[Any, str]]:
    """Places that hold the module's own forward as a bound method: ``(holder, attribute)``.

    A wrapper that replaces ``module.forward`` keeps the one before; whoever exchanges the module's class has to
    exchange that one as well, or the wrapper passes the new class by.
    """
    places: list[tuple[Any, str]] = [(module, "forward")]
    for spelling, items in KEPT_FORWARDS:
        holder = module.__dict__.get(spelling.name)
        if not items:
            places.append((module, spelling.name))
        elif holder is not None:
            places += [(one, name) for one in getattr(holder, items, ()) for name in _IN_LIST]
    own = type(module).forward
    return [(holder, name) for holder, name in places if _is_bound(holder.__dict__.get(name), module, own)]


def _is_bound(found: Any, module: nn.Module, function: Any) -> bool:
    return isinstance(found, MethodType) and found.__self__ is module and found.__func__ is function


def foreign_forward(module: nn.Module) -> str | None:
    """Description of a forward that was put in front of the module's own and never reaches its class again, as far as
    is known; None where there is none."""
    found = module.__dict__.get("forward")
    if found is None or own_forwards(module):
        return None
    inner = found
    while isinstance(inner, functools.partial):
        inner = inner.func
    return f"{getattr(inner, '__module__', '?')}.{getattr(inner, '__qualname__', type(inner).__name__)}"


def skips_layers(model: nn.Module) -> bool:
    """True where the host has been told to leave out layers in some forwards (caches of diffusers, guidance by skipped
    layers): a site that did not run was then left out on purpose."""
    names = [spelling.name for spelling, items in KEPT_FORWARDS if items]
    return any(name in module.__dict__ for module in model.modules() for name in names)


# Hooks that bring a module's own parameters to the device when it is called, and take them away again.
_LOADERS = (Spelling("_hf_hook", "accelerate"),)


@contextlib.contextmanager
def parameters_at_hand(module: nn.Module) -> Iterator[None]:
    """While open, parameters that stand directly on ``module`` can be read, as inside of its own forward.

    Whatever keeps weights elsewhere (in host memory, on disk) brings them when the module is called. Who reads a
    parameter without calling its module would read a placeholder, which multiplies without an error.
    """
    hooks = [h for h in (module.__dict__.get(s.name) for s in _LOADERS) if h is not None]
    for hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in reversed(hooks):
            hook.post_forward(module, None)


def check_at_hand(tensor: Tensor, name: str) -> Tensor:
    """``tensor``, after a check that it holds values.

    Raises:
        UnsupportedModelError: it is a placeholder without values.
    """
    if tensor.is_meta:
        raise UnsupportedModelError(
            f"{name} has been moved away (it is on the meta device) by something that brings it back only when its "
            "module is called, and this model needs it between calls: load that module on the device that runs it"
        )
    return tensor


class Name(NamedTuple):
    """A thing of a host and the names that hosts give it, of which the first that exists counts.

    Attributes:
        role: in our words.
        spellings: ``module:attribute`` of things that are imported, else the bare name of an attribute.
        owner: ``module:attribute`` of something that has the attribute, ``()`` behind it for what it makes, to look for
            it there; "": it is imported.
    """

    role: str
    spellings: tuple[Spelling, ...]
    owner: str = ""


def _transformers(name: str, since: str = "", until: str = "") -> Spelling:
    return Spelling(name, "transformers", since, until)


_CONFIG = "transformers.configuration_utils:PretrainedConfig()"
_MODEL = "transformers.modeling_utils:PreTrainedModel"
# Private attributes and functions of hosts, by role. Public names that hosts document stand where they are used.
NAMES = (
    Name("cache of rows that grow", (_transformers("transformers.cache_utils:DynamicCache"),)),
    Name("cache of both", (_transformers("transformers.cache_utils:EncoderDecoderCache"),)),
    Name("any cache", (_transformers("transformers.cache_utils:Cache"),)),
    Name("base of cache layers", (_transformers("transformers.cache_utils:CacheLayerMixin"),)),
    Name("kinds of layers", (_transformers("transformers.cache_utils:get_layer_types_and_kwargs"),)),
    Name("attention functions", (_transformers("transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS"),)),
    Name("registry of attention", (_transformers("transformers:AttentionInterface"),)),
    Name("registry of masks", (_transformers("transformers:AttentionMaskInterface"),)),
    Name("mask functions", (_transformers("transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS"),)),
    Name("causal rule", (_transformers("transformers.masking_utils:causal_mask_function"),)),
    Name("causal mask", (_transformers("transformers.masking_utils:create_causal_mask"),)),
    Name("sliding mask", (_transformers("transformers.masking_utils:create_sliding_window_causal_mask"),)),
    Name("masks of generation", (_transformers("transformers.masking_utils:create_masks_for_generate"),)),
    Name("attention of a configuration", (_transformers("_attn_implementation"),), _CONFIG),
    Name("attention of a configuration, set", (_transformers("_attn_implementation_internal"),), _CONFIG),
    Name("exchangeable attention", (_transformers("_supports_attention_backend"),), _MODEL),
    Name("prepare a cache", (_transformers("_prepare_cache_for_generation"),), "transformers:GenerationMixin"),
    Name("blocks that caches of features know", (
        Spelling("diffusers.hooks._helpers:TransformerBlockRegistry", "diffusers", since="0.35"),
    )),
    Name("hooks that replace a forward", (Spelling("diffusers.hooks.hooks:HookRegistry", "diffusers", since="0.32"),)),
    Name("modules that are not traced", (Spelling("timm.models:register_notrace_module", "timm"),)),
    Name("layers of hooks", (Spelling("accelerate.hooks:add_hook_to_module", "accelerate"),)),
    Name("sharded modules", (Spelling("torch.distributed.fsdp:FSDPModule", "torch", since="2.6"),)),
)  # fmt: skip
_BY_ROLE = {name.role: name for name in NAMES}


@functools.cache
def find_object(role: str) -> Any:
    """The host's class, function or table of this role, imported when it is first asked for; None: it has none."""
    return next((found for s in _BY_ROLE[role].spellings if (found := look(s.name)) is not None), None)


def host_object(role: str) -> Any:
    """The host's object of a role that tokred cannot do without.

    Raises:
        UnsupportedModelError: the installed host has it under no spelling that is known.
    """
    found = find_object(role)
    if found is None:
        raise UnsupportedModelError(_absent(_BY_ROLE[role]))
    return found


def _absent(name: Name) -> str:
    library = name.spellings[0].library
    return (
        f"this {library} has no {' or '.join(s.name for s in name.spellings)} ({name.role}), which tokred counts on: "
        "see `tokred doctor` for the versions that were tested"
    )


# ---------------------------------------------------------------------- attributes of transformers, by role

PREPARE_CACHE = "_prepare_cache_for_generation"
_ATTENTION, _ATTENTION_SET = "_attn_implementation", "_attn_implementation_internal"
_BACKEND, _MASK_LENGTH = "_supports_attention_backend", "_mask_length"


def attention_of(config: Any) -> str:
    """Name of the attention function that a configuration asks for; empty where it says none."""
    return str(getattr(config, _ATTENTION, "") or "")


def set_attention(config: Any, name: str) -> None:
    """Let a configuration ask for another attention function, and none of the configurations inside it: the public
    setter would hand the name on to those of vision towers."""
    setattr(config, _ATTENTION_SET, name)


def exchanges_attention(model: Any) -> bool:
    """True for a model whose attention can be exchanged by name."""
    return bool(getattr(model, _BACKEND, False))


def mask_length(generation_config: Any) -> int | None:
    """Tokens of a prompt that is fed in several parts, where ``generate`` notes it."""
    found = getattr(generation_config, _MASK_LENGTH, None)
    return None if found is None else int(found)


# Before, ``generate`` with chunks feeds the tokens of a cache that holds some again, and cuts masks from the start.
LATER_CHUNKS = Spelling("prefill_chunk_size", "transformers", since="5.21")


def goes_on_in_chunks() -> bool:
    """True where ``generate`` can read a prompt in chunks onto a cache that holds tokens already."""
    return release(environment.version(LATER_CHUNKS.library)) >= release(LATER_CHUNKS.since)


# ---------------------------------------------------------------------- attributes of diffusers and torch, by role

_HOOKS, _STATEFUL = "_diffusers_hook", "_is_stateful"


def repeats(module: nn.Module) -> bool:
    """True for a module that a cache of diffusers may skip, answering with its output of another step."""
    hooks = getattr(getattr(module, _HOOKS, None), "hooks", {})
    return any(getattr(hook, _STATEFUL, False) for hook in hooks.values())


def backward_pass() -> int:
    """Number of the backward that autograd is running; -1 where it runs none."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return -1 if task is None else int(task())


# ---------------------------------------------------------------------- whether the installed hosts keep it


class Kept(NamedTuple):
    """One name, looked for in what is installed.

    Attributes:
        library: whose it is.
        role: in our words.
        spelling: that was found, or all that were looked for.
        found: whether it is there.
        version: of the library, as installed.
    """

    library: str
    role: str
    spelling: str
    found: bool
    version: str = ""


def kept() -> list[Kept]:
    """Every name of the contract whose library is installed, of a version that has it, and whether it is there."""
    from tokred.adapters.contract import members, terms  # noqa: F401  # their rows are among the words from here on

    words = [(word.role, word.spellings, "") for word in WORDS.values()]
    cache = [("cache of a forward", CACHE, "")]
    rows = []
    for role, spellings, owner in [*((n.role, n.spellings, n.owner) for n in NAMES), *cache, *words]:
        for library in dict.fromkeys(s.library for s in spellings):
            if importlib.util.find_spec(library) is None:
                continue
            version = environment.version(environment.package(library))
            due = [s for s in spellings if s.library == library and in_force(s, version)]
            there = [s.name for s in due if _has(s, owner)]
            if due:
                rows.append(Kept(library, role, " or ".join(there or [s.name for s in due]), bool(there), version))
    return rows


def in_force(spelling: Spelling, version: str) -> bool:
    """True for a version that should have a spelling."""
    numbers = spelling.until.count(".") + 1  # until 5.23 means all of 5.23
    first, last = release(spelling.since or "0"), release(spelling.until or "0")[:numbers]
    return first <= release(version) and (not spelling.until or release(version)[:numbers] <= last)


def _has(spelling: Spelling, owner: str) -> bool:
    if spelling.where:
        return spells(spelling.where, spelling.name)
    return hasattr(look(owner), spelling.name) if owner else look(spelling.name) is not None

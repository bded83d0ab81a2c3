"""Functions for users: apply, remove, patched, applied, supports, report, trace, kv_cache, flops, list_methods."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor, nn

from tokred import learn
from tokred.core.checks import check_choice
from tokred.core.method import Method
from tokred.core.origin import Origin
from tokred.core.reduction import Reduction
from tokred.core.registry import methods as registered
from tokred.core.report import Report
from tokred.core.site import STAGES, Stage
from tokred.core.versions import TOKRED
from tokred.errors import NothingRecordedError, NothingRemovedWarning, SettingWarning
from tokred.patch import ATTRIBUTE, Patch, losses_of, part_at, parts_of, report_of, unpatch
from tokred.settings import MethodLike, several, share
from tokred.settings import make as make

logger = logging.getLogger("tokred")

ModelT = TypeVar("ModelT")  # a module, or a pipeline that holds one
Where = Callable[[str, nn.Module], bool]
Expose = Literal["auto", "none", "last", "all"]
Windows = Literal["auto", "global", "windowed", "all"]


def list_methods(pattern: str = "*", *, stage: Stage | None = None, model: nn.Module | None = None) -> list[str]:
    """The names of the methods, in the order of the alphabet.

    Args:
        pattern: shell-style, such as ``"*merge*"``; without a wildcard, the names that contain it.
        stage: only methods that act there: ``"block"``, ``"attention"``, ``"projector"``, ``"layer"``, ``"cache"``,
            ``"experts"``.
        model: only methods that run on this model, as :func:`supports` says.

    Raises:
        ValueError: there is no such stage.
    """
    if stage is not None and stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; allowed are {', '.join(map(repr, STAGES))}")
    if not any(c in pattern for c in "*?["):
        pattern = f"*{pattern}*"
    names = [name for name in registered if fnmatch.fnmatchcase(name, pattern.lower())]
    if stage is not None:
        there = registered.of(stage)
        names = [name for name in names if name in there]
    if model is not None:
        runs = {row.method for row in supports(model) if row.works}
        names = [name for name in names if name in runs]
    return names


def apply(
    model: ModelT,
    method: MethodLike,
    *,
    where: Where | None = None,
    expose: Expose = "auto",
    windows: Windows = "auto",
    module: nn.Module | None = None,
    on_reduction: Callable[[nn.Module], object] | None = None,
    **parameters: Any,
) -> ModelT:
    """Patch ``model`` in place so that it runs with fewer tokens.

    Everything is checked first; on an error the model is as it was. Applying again replaces the patch before. Where
    nothing can be removed, and no parameter that was given says so (``r=0``), a :class:`tokred.NothingRemovedWarning`
    names the parameter to give.

    Args:
        model: a supported model, a module that holds one (a classifier around a backbone), or a pipeline of
            diffusers, whose denoiser is patched.
        method: a method's name or class, with its parameters as keywords; a setting as text, as on the command line
            (``"divprune budget=64 + fastv layer=2"``); a method object; its ``to_dict()``; a folder that
            :func:`tokred.save` wrote; or a list of these.
        where: ``where(name, block) -> bool`` restricts the method to some blocks. None: all, or those that a loaded
            setting was saved with; the same holds for ``expose`` and ``windows`` at ``"auto"``.
        expose: which blocks return the full length again: ``"auto"`` the last one where the model's head pools over all
            tokens, ``"none"``, ``"last"``, or ``"all"`` (for hooks that read every block; costs time).
        windows: for models whose attention runs in windows (SAM, ViTDet): reduce inside the blocks of ``"global"``
            attention, inside each window of the ``"windowed"`` ones, or in ``"all"``. ``"auto"``: the global ones,
            where there are any.
        module: the weights of a method that has some, such as ``tokred.modules(model)`` gave before; None: those that
            the method was loaded with by :func:`tokred.load`, else new ones.
        on_reduction: called with the model that was given after each of its forwards, except compiled ones: the place
            for ``tokred.report(model)`` or ``tokred.trace(model)`` in a log of training. None: nothing is.
        parameters: the method's, when it is given by name.

    Returns:
        The same model, for chaining.

    Raises:
        UnsupportedModelError: no part of the model can be reduced rightly; the message says why.
        MissingInputError: the method reads what this model does not supply.
        UnknownMethodError, TypeError, ValueError: the method or a parameter is wrong.
    """
    from tokred import adapters

    chosen = several(method, parameters)
    check_choice(expose, "expose", ("auto", "none", "last", "all"))
    if on_reduction is not None and not callable(on_reduction):
        raise TypeError(f"on_reduction must be a function of the model, got {on_reduction!r}")
    places = []
    for one in chosen:  # no comprehension, which would be one more frame between a warning and the user
        places.append(_place(model, one, where, expose, windows, parameters))
    taker = learn.chosen(chosen, module)
    own = [
        learn.build(p.method, p.host.model_facts, module if p.method is taker else None, like=p.host.model)
        for p in places
    ]
    target = adapters.module_of(model)
    unpatch(target)
    patch = Patch()
    for place, built in zip(places, own, strict=True):
        patch.add(place.host, place.method, place.where, place.origin.expose, built, place.origin)
    if on_reduction is not None:
        patch.call_after(target, on_reduction)
    target.__dict__[ATTRIBUTE] = patch
    logger.info("applied %r", patch)
    return model


class _Place(NamedTuple):
    """One method with the part of a model that it is going to act on, and how."""

    method: Method
    host: Any
    where: Where | None
    origin: Origin


def _place(
    model: Any, method: Method, where: Where | None, expose: str, windows: str, parameters: dict[str, Any]
) -> _Place:
    """Everything that can be asked before the model is touched; what a loaded setting knows stands in for defaults."""
    from tokred import adapters
    from tokred.adapters.swap import host_class

    before = method.origin or Origin(TOKRED)
    expose, windows = (before.expose if expose == "auto" else expose), before.windows if windows == "auto" else windows
    host = adapters.find_for(model, method).choose(windows)
    cls = host_class(host.model)
    name = f"{cls.__module__}.{cls.__qualname__}"
    with share.told(method, name, host.depth):
        host.check(method, expose)
    if where is None:
        kept = share.chosen_where(before, host.blocks, name, host.depth)
        where = None if kept is None else lambda block, _: block in kept
    names = None if where is None else tuple(block for block, module in host.blocks if where(block, module))
    if names == ():
        raise ValueError(f"where selects none of the {host.depth} blocks ({host.blocks[0][0]}, ...)")
    layers = None if names is None else [i for i, (block, _) in enumerate(host.blocks) if block in names]
    idle = method.why_idle(host.depth, layers)
    if idle is not None and not idle.meant and idle.parameter not in parameters:
        warnings.warn(idle.text, NothingRemovedWarning, stacklevel=3)
    other = share.other_model(method, name, host.depth)
    if other is not None:
        warnings.warn(other, SettingWarning, stacklevel=3)
    return _Place(method, host, where, Origin(TOKRED, name, host.depth, names, expose, windows))


def remove(model: ModelT) -> ModelT:
    """Take every patch off ``model``: classes, forwards and hooks are those it had. Harmless without one."""
    from tokred import adapters

    unpatch(adapters.module_of(model))
    logger.info("removed every patch from a %s", type(model).__name__)
    return model


def patched(model: Any) -> list[Method]:
    """The methods that ``model`` or a part of it is patched with, in the order of their stages; empty without a patch.

    Args:
        model: a module, or a pipeline of diffusers.
    """
    from tokred import adapters

    return [part.method for part in parts_of(adapters.module_of(model))]


@contextlib.contextmanager
def applied(model: ModelT, method: MethodLike, **options: Any) -> Iterator[ModelT]:
    """``with tokred.applied(model, "tome", r=16)``: patched inside, as it was outside."""
    before = patched(model)
    if before:
        raise ValueError(f"the model is already patched with {before[0]!r}; call tokred.remove(model) first")
    apply(model, method, **options)
    try:
        yield model
    finally:
        remove(model)


class Support(NamedTuple):
    """The answer to "does this method run on this model?", and if it does not, what is missing."""

    method: str
    works: bool
    reason: str


def supports(model: nn.Module) -> list[Support]:
    """Every method with an answer: does it run on this model, and if not, why.

    Never raises for an unsupported model: the reason stands in every row.
    """
    from tokred import adapters

    rows = adapters.reasons(model)
    return [Support(name, host is not None, reason or host.how) for name, (host, reason) in rows.items()]


def report(model: nn.Module) -> Report:
    """The fate of the tokens in the last forward of a patched model, layer by layer.

    A :class:`tokred.Report` can be printed; ``rows``, ``to_dict()`` and ``to_pandas()`` hold the same as data. Of
    encoders (:class:`~tokred.encoder.report.BlockReport`): tokens, multiply-adds and token sizes of each block. With a
    policy for the cache (:class:`tokred.CacheReport`): slots, rows and bytes of each layer's cache. Of a denoiser
    (:class:`~tokred.diffusion.report.DenoiserReport`): the tokens that each sub-layer ran on. Of a model with vision
    (:class:`~tokred.vlm.report.VisualReport`): the tokens at every decoder layer's input. Of experts
    (:class:`~tokred.core.experts.RoutingReport`): pairs of token and expert that were dropped. Where a model is patched
    at several stages, one report holds the others in ``more``.

    Raises:
        NothingRecordedError: the model is not patched, or no uncompiled forward has run since.
    """
    from tokred import adapters

    return report_of(adapters.module_of(model))


def trace(model: nn.Module) -> Reduction:
    """The fate of every token in the last forward: all blocks' reductions as one, for drawing and un-merging.

    Raises:
        NothingRecordedError: as :func:`report`.
    """
    from tokred import adapters

    parts = parts_of(adapters.module_of(model))
    found = [part for part in parts if part.method.stage == "block"]
    if not found:
        raise NothingRecordedError(
            f"{parts[0].method.name!r} acts at stage {parts[0].method.stage!r}, which leaves no trace of blocks"
            if parts
            else "the model is not patched: call tokred.apply(model, ...) first"
        )
    state: Any = found[0].state
    last = state.last()
    total: Reduction | None = last.composed()
    total = Reduction.identity((1,), last.length) if total is None else total
    return last.with_gate(total)  # type: ignore[no-any-return]


def modules(model: Any) -> dict[str, nn.Module]:
    """The modules with weights that the methods on ``model`` bring along, by the methods' names; empty without any.

    They are no part of the model: not in its ``state_dict()``, ``parameters()`` or ``modules()``. Its ``to()``,
    ``train()`` and ``eval()`` take them along.
    """
    from tokred import adapters

    parts = parts_of(adapters.module_of(model))
    return {part.method.name: part.state.module for part in parts if part.state.module is not None}


def parameters(model: Any) -> Iterator[nn.Parameter]:
    """Parameters that the methods on ``model`` learn, for an optimiser, beside ``model.parameters()``."""
    for module in modules(model).values():
        yield from module.parameters()


def losses(model: Any, targets: Any = None) -> dict[str, Tensor]:
    """The terms that methods add to the loss, of the last forward in training: scalars, by method and name.

    Args:
        model: patched with a method that has weights.
        targets: of the last forward's batch, for methods that learn by them, such as ``cropr``; others do not look.

    Raises:
        NothingRecordedError: no method with weights acts, or the last forward was none in training.
        MissingInputError: a method learns by the targets, and none were given.
        ValueError: the targets do not fit the method.
    """
    from tokred import adapters

    return losses_of(adapters.module_of(model), targets)


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
        A transformers cache with ``snapshot()``, ``restore(snapshot)``, ``layer_rows()`` and ``nbytes``; for an
        encoder-decoder its EncoderDecoderCache, of which ``cross_attention_cache`` is such a one.

    Raises:
        NothingRecordedError: the model has no policy.
        ValueError: there is no such layout, or ``prompt`` is given for an encoder-decoder.
    """
    part = part_at(model, "cache")
    if part is None:
        raise NothingRecordedError("no policy acts on the model's cache: call tokred.apply(model, ...) first")
    state: Any = part.state
    return state.planned(layout, prompt, steps)


class LayerFlops(NamedTuple):
    """The costs of one block, counted beforehand."""

    layer: int
    tokens_in: int
    tokens_out: int
    macs: int


class Flops(NamedTuple):
    """Multiply-adds of one sample, counted without running anything. Papers' "GFLOPs" are ``macs / 1e9``."""

    macs: int
    layers: tuple[LayerFlops, ...]
    outside: int

    @property
    def tokens(self) -> list[int]:
        """Tokens after each block."""
        return [row.tokens_out for row in self.layers]

    @property
    def gmacs(self) -> float:
        """``macs`` in units of 1e9."""
        return self.macs / 1e9


def flops(
    model: nn.Module,
    method: str | Method | None,
    shape: Sequence[int],
    *,
    windows: Windows = "auto",
    **parameters: Any,
) -> Flops:
    """Multiply-adds of one sample under ``method``, before anything runs.

    Counts the matrices and the attention of every block at the tokens it sees, the patch embedding and the classifier;
    norms, activations and the method's own work are left out, as in the literature.

    Args:
        model: a supported model, patched or not; it is not changed.
        method: a method or its name; None counts the model as it is without any.
        shape: of the input, such as ``(1, 3, 224, 224)`` or ``(3, 224, 224)``; the batch is ignored.
        windows: as for :func:`apply`.
        parameters: the method's, when it is given by name.

    Raises:
        MissingInputError, UnsupportedModelError, ValueError: as :func:`apply`.
    """
    from tokred import adapters
    from tokred.encoder.method import BlockMethod

    chosen = None if method is None else make(method, **parameters)
    if chosen is not None and chosen.stage != "block":
        raise ValueError(
            f"flops counts the blocks of an encoder, and {chosen.name!r} acts at stage {chosen.stage!r}: "
            "tokred.report(model) has the rows and bytes of a cache after a forward"
        )
    host = adapters.find(model).choose(windows)
    if chosen is not None:
        host.check(chosen)
    assert chosen is None or isinstance(chosen, BlockMethod)  # check() saw to it
    rows = [LayerFlops(layer, *row) for layer, row in enumerate(host.plan(chosen, tuple(shape)))]
    outside = host.outside_macs(tuple(shape))
    return Flops(sum(row.macs for row in rows) + outside, tuple(rows), outside)

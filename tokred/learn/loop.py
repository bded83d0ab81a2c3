"""A small training loop over plain torch, in one process."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.learn.losses import distill_logits, distill_tokens
from tokred.learn.recipe import Recipe
from tokred.learn.shards import clip


class Step(NamedTuple):
    """One step of the optimiser.

    Attributes:
        loss: the sum of all terms.
        terms: each of them, weighted.
    """

    loss: float
    terms: dict[str, float]


class Terms:
    """Every step by a recipe: learning rates, the method's scheduled parameters, and the terms of the loss.

    Open it around the steps. It brings the model into training and freezes what does not learn; when it is closed, the
    model is in evaluation mode, at the parameters that the last step had.

    Args:
        model: patched; returns logits, or what has them as ``logits``.
        recipe: how.
        modules: what the method learns, ``tokred.modules(model).values()``.
        losses: ``tokred.losses``, for the terms of the method; it is told the labels where it takes ``targets``.
        task: loss of logits and labels.
        teacher: a dense copy of the model, where the recipe distils from it. It is not trained.
        tokens: name of the sub-module, of both, that puts out the final tokens ``(B, N, C)``; empty: the recipe's.
        gate: ``(B, N)`` from the model after a forward: which of the final tokens are to be like the teacher's.
        change: ``tokred.change``, where the recipe has a schedule.

    Raises:
        ValueError: there is nothing to train, the recipe distils without a teacher (or tokens without ``tokens`` and
            ``gate``), or has a schedule without ``change``.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        modules: Iterable[nn.Module],
        losses: Callable[..., Mapping[str, Tensor]],
        task: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        teacher: nn.Module | None = None,
        tokens: str = "",
        gate: Callable[[nn.Module], Tensor] | None = None,
        change: Callable[..., Any] | None = None,
    ) -> None:
        self.model, self.recipe, self.learned, self.task = model, recipe, list(modules), task
        self.own = [p for module in self.learned for p in module.parameters()]
        groups = _groups(model, self.own, recipe)
        tokens = tokens or recipe.tokens_of
        if recipe.distils and teacher is None:
            raise ValueError("the recipe distils (logits or tokens above 0), so fit needs a teacher: a dense copy")
        if recipe.tokens and (not tokens or gate is None):
            raise ValueError("the recipe distils tokens, so fit needs tokens=, the name of the module that puts them "
                             "out, and gate=")  # fmt: skip
        if recipe.schedule and change is None:
            raise ValueError(f"the recipe schedules {', '.join(recipe.schedule)}, so fit needs change=tokred.change")
        self.losses, self.teacher, self.gate, self.change = losses, teacher, gate, change
        self.told = "targets" in inspect.signature(losses).parameters
        self.optimiser = torch.optim.AdamW(groups)
        self.peaks = [float(group["lr"]) for group in groups]
        self.trained = [p for group in groups for p in group["params"]]
        self._mine, self._theirs = _Heard(model, tokens), _Heard(teacher, tokens)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Terms:
        # A model that stays as it is must not go on counting its batches' means either: only the method is in training.
        self.model.train(self.recipe.lr > 0)
        for module in self.learned:
            module.train()
        if self.teacher is not None:
            self.teacher.eval()
        for part in (_frozen(self.model, self.recipe.lr == 0), self._mine, self._theirs):
            self._open.enter_context(part)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()
        self.model.eval()

    def begin(self, step: int) -> None:
        """Set the rates of a step, counted from 0, and the method's parameters where they follow a schedule."""
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.recipe.rate(step)
        if self.recipe.schedule and self.change is not None:
            self.change(self.model, **self.recipe.at(step))

    def descend(self, loss: Tensor, average: Callable[[Tensor], Tensor] | None = None) -> None:
        """One step of the optimiser down a loss.

        Args:
            loss: scalar, see :func:`total`.
            average: of a gradient over several processes, for what the method learns; None: there is one process.
        """
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if average is not None:
            for p in self.own:
                if p.grad is not None:
                    p.grad = average(p.grad)
        if self.recipe.clip:
            clip(self.trained, self.recipe.clip)
        self.optimiser.step()

    def __call__(self, x: Any, y: Tensor, forward: Callable[..., Any] | None = None) -> dict[str, Tensor]:
        """One forward, and every term of its loss, weighted.

        Args:
            x: inputs; a mapping is given as keywords.
            y: labels.
            forward: what stands in for the model, such as a wrapper of several processes; None: the model.
        """
        recipe, model = self.recipe, self.model
        logits = logits_of(model if forward is None else forward, x)
        own = self.losses(model, targets=y) if self.told else self.losses(model)
        terms = {"task": recipe.task * self.task(logits, y), **own} if recipe.task else dict(own)
        if self.teacher is not None and recipe.distils:
            with torch.no_grad():
                guide = logits_of(self.teacher, x)
            if recipe.logits:
                terms["logits"] = recipe.logits * distill_logits(logits, guide)
            if recipe.tokens and self.gate is not None:
                like = distill_tokens(self._mine.value(), self._theirs.value(), self.gate(model), kind=recipe.kind)
                terms["tokens"] = recipe.tokens * like
        return terms


def logits_of(model: Callable[..., Any], x: Any) -> Tensor:
    """The logits of a model that returns them, or what has them as ``logits``, for inputs or a mapping of keywords."""
    out = model(**x) if isinstance(x, Mapping) else model(x)
    found: Tensor = getattr(out, "logits", out)
    return found


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The loss, a scalar in float32: the sum of all terms."""
    return torch.stack([term.float() for term in terms.values()]).sum()


def fit(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    recipe: Recipe,
    *,
    each: Callable[[int, Step], None] | None = None,
    **more: Any,
) -> list[Step]:
    """Train a patched model as the recipe says, in one process, and leave it in evaluation mode.

    Args:
        model: patched; returns logits.
        batches: pairs of inputs and labels, at least as many as the recipe has steps.
        recipe: how.
        each: called after every step.
        more: what :class:`Terms` takes: ``modules`` and ``losses``, and where need be ``task``, ``teacher``,
            ``tokens``, ``gate`` and ``change``.

    Returns:
        What every step gave.

    Raises:
        ValueError: as :class:`Terms`, or the batches run out.
    """
    pairs, found = iter(batches), list[Step]()
    terms_of = Terms(model, recipe, **more)
    torch.manual_seed(recipe.seed)
    with terms_of:
        for i in range(recipe.steps):
            terms_of.begin(i)
            pair = next(pairs, None)
            if pair is None:
                raise ValueError(f"the batches ran out after {i} of {recipe.steps} steps")
            terms = terms_of(*pair)
            loss = total(terms)
            terms_of.descend(loss)
            found.append(Step(float(loss.detach()), {name: float(t.detach()) for name, t in terms.items()}))
            if each is not None:
                each(i, found[-1])
    return found


def _groups(model: nn.Module, own: list[nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters with their rates."""
    rate = recipe.lr if recipe.lr_method is None else recipe.lr_method
    groups = [{"params": own, "lr": rate, "weight_decay": 0.0}] if own and rate else []
    if recipe.lr:
        free = [p for p in model.parameters() if p.requires_grad]
        groups.append({"params": [p for p in free if p.ndim > 1], "lr": recipe.lr, "weight_decay": recipe.weight_decay})
        groups.append({"params": [p for p in free if p.ndim <= 1], "lr": recipe.lr, "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    if recipe.lr_method and not own:
        raise ValueError(
            f"lr_method is {recipe.lr_method}, but {recipe.method!r} has no weights to train in this model"
        )
    if not groups:
        raise ValueError(f"nothing is to be trained: lr is {recipe.lr} and {recipe.method!r} has {len(own)} weights")
    return groups


class _frozen:
    """While open, the model's own weights ask for no gradient, if ``on``; activations still pass it on."""

    def __init__(self, model: nn.Module, on: bool) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad] if on else []

    def __enter__(self) -> None:
        for p in self.parameters:
            p.requires_grad_(False)

    def __exit__(self, *error: object) -> None:
        for p in self.parameters:
            p.requires_grad_(True)


class _Heard:
    """While open, notes what one sub-module puts out."""

    def __init__(self, model: nn.Module | None, name: str) -> None:
        self.model, self.name = model, name
        self.noted: list[Tensor] = []
        self.handles: list[Any] = []

    def __enter__(self) -> _Heard:
        if self.model is not None and self.name:
            module = self.model.get_submodule(self.name)
            self.handles.append(module.register_forward_hook(self._hear))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hear(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.noted = [output[0] if isinstance(output, tuple) else output]

    def value(self) -> Tensor:
        """Of the last forward."""
        if not self.noted:
            raise ValueError(f"the module {self.name!r} did not run in this forward, so its tokens are not known")
        return self.noted[0]


def endless(images: Tensor, labels: Tensor, size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of ``size``, again and again.

    Raises:
        ValueError: there are fewer samples than that.
    """
    if len(images) < size:
        raise ValueError(f"a batch of {size} needs as many samples, got {len(images)}")
    draws = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=draws)
        for rows in torch.split(order, size):
            if len(rows) == size:
                yield images[rows], labels[rows]

"""A small training loop over plain torch, in one process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.learn.losses import distill_logits, distill_tokens
from tokred.learn.recipe import Recipe


class Step(NamedTuple):
    """One step of the optimiser.

    Attributes:
        loss: the sum of all terms.
        terms: each of them, weighted.
    """

    loss: float
    terms: dict[str, float]


def fit(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    recipe: Recipe,
    *,
    modules: Iterable[nn.Module],
    losses: Callable[..., Mapping[str, Tensor]],
    task: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    teacher: nn.Module | None = None,
    tokens: str = "",
    gate: Callable[[nn.Module], Tensor] | None = None,
    each: Callable[[int, Step], None] | None = None,
) -> list[Step]:
    """Train a patched model as the recipe says, and leave it in evaluation mode.

    Args:
        model: patched; returns logits.
        batches: pairs of inputs and labels, at least as many as the recipe has steps.
        recipe: how.
        modules: what the method learns, ``tokred.modules(model).values()``.
        losses: ``tokred.losses``, for the terms of the method; it is told the labels where it takes ``targets``.
        task: loss of logits and labels.
        teacher: a dense copy of the model, where the recipe distils from it. It is not trained.
        tokens: name of the sub-module, of both, that puts out the final tokens ``(B, N, C)``.
        gate: ``(B, N)`` from the model after a forward: which of the final tokens are to be like the teacher's.
        each: called after every step.

    Returns:
        What every step gave.

    Raises:
        ValueError: there is nothing to train, the recipe distils without a teacher (or tokens without ``tokens`` and
            ``gate``), or the batches run out.
    """
    learned, pairs = list(modules), iter(batches)
    groups = _groups(model, [p for module in learned for p in module.parameters()], recipe)
    if (recipe.logits or recipe.tokens) and teacher is None:
        raise ValueError("the recipe distils (logits or tokens above 0), so fit needs a teacher: a dense copy")
    if recipe.tokens and (not tokens or gate is None):
        raise ValueError("the recipe distils tokens, so fit needs tokens=, the name of the module that puts them out, "
                         "and gate=")  # fmt: skip
    told = "targets" in inspect.signature(losses).parameters
    torch.manual_seed(recipe.seed)
    optimiser = torch.optim.AdamW(groups)
    peaks = [group["lr"] for group in groups]
    trained = [p for group in groups for p in group["params"]]
    found: list[Step] = []
    # A model that stays as it is must not go on counting its batches' means either: only the method is in training.
    model.train(recipe.lr > 0)
    for module in learned:
        module.train()
    if teacher is not None:
        teacher.eval()
    with _frozen(model, recipe.lr == 0), _Heard(model, tokens) as mine, _Heard(teacher, tokens) as theirs:
        for i in range(recipe.steps):
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * recipe.rate(i)
            pair = next(pairs, None)
            if pair is None:
                raise ValueError(f"the batches ran out after {i} of {recipe.steps} steps")
            x, y = pair
            logits = model(x)
            own = losses(model, targets=y) if told else losses(model)
            terms = {"task": recipe.task * task(logits, y), **own} if recipe.task else dict(own)
            if teacher is not None and (recipe.logits or recipe.tokens):
                with torch.no_grad():
                    guide = teacher(x)
                if recipe.logits:
                    terms["logits"] = recipe.logits * distill_logits(logits, guide)
                if recipe.tokens and gate is not None:
                    like = distill_tokens(mine.value(), theirs.value(), gate(model), kind=recipe.kind)
                    terms["tokens"] = recipe.tokens * like
            loss = torch.stack([term.float() for term in terms.values()]).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if recipe.clip:
                nn.utils.clip_grad_norm_(trained, recipe.clip)
            optimiser.step()
            found.append(Step(float(loss.detach()), {name: float(t.detach()) for name, t in terms.items()}))
            if each is not None:
                each(i, found[-1])
    model.eval()
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

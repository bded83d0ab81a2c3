"""``train``: a model, its samples and a recipe, over ``accelerate``, in one or many processes."""

from __future__ import annotations

import copy
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokred
from tokred import adapters
from tokred.adapters.swap import host_class
from tokred.core.folders import check_folder
from tokred.core.report import Report
from tokred.learn.loop import Step, Terms, total
from tokred.learn.recipe import Recipe
from tokred.learn.shards import gathered, optimiser_state, own_names
from tokred.learn.training.checkpoint import Checkpoint, setting_of
from tokred.learn.training.data import Samples, moved
from tokred.learn.training.sharded import check_kind, shard

LOG, MODEL = "train.jsonl", "model.safetensors"


class Trained(NamedTuple):
    """The outcome of a training.

    Attributes:
        model: patched, in evaluation mode, on the device that it was trained on.
        steps: what every step gave, those before a resumption included.
        folder: where the method, its weights and the model's are.
        begun: the step that it began or went on at.
    """

    model: nn.Module
    steps: list[Step]
    folder: Path
    begun: int

    @property
    def report(self) -> Report:
        """The last forward of the model."""
        return tokred.report(self.model)


def train(
    model: nn.Module,
    samples: Any,
    recipe: Recipe,
    folder: str | Path,
    *,
    task: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    teacher: nn.Module | None = None,
    every: int = 0,
    resume: bool = True,
    accelerator: Any = None,
    until: int | None = None,
    each: Callable[[int, Step], None] | None = None,
) -> Trained:
    """Train a method, and the model with it where the recipe says so, and save both.

    The draws of a step and its samples follow from the recipe's seed and the step, so that a training that was stopped
    and goes on ends bit for bit as one that was not. In several processes (``accelerate launch``) the batch is shared
    out, and the gradients of what the method learns are averaged like the model's. Where accelerate was told to use
    FSDP 2, the weights of model and teacher and the optimiser's moments are sharded; what is written is whole.

    Args:
        model: without a patch; returns logits, or what has them as ``logits``.
        samples: what :class:`Samples` takes, or such.
        recipe: how.
        folder: for ``tokred.json`` and ``weights.safetensors``, which ``tokred.load`` reads; ``model.safetensors``, the
            model's own weights where they were trained; ``train.jsonl``, a line a step; and the checkpoint.
        task: loss of logits and labels.
        teacher: what the recipe distils from; None: a copy of the model as it is given.
        every: steps between two checkpoints; 0: one at the end.
        resume: go on from the checkpoint in the folder, where there is one.
        accelerator: of accelerate, with its device and its mixed precision; None: one as ``accelerate config`` left it.
        until: stop after so many steps of the recipe's, with a checkpoint to go on from; None: after all.
        each: called after every step.

    Raises:
        ImportError: accelerate or safetensors is not installed.
        ValueError: there is nothing to train, the checkpoint is of another recipe or model, the batch cannot be shared
            out evenly, or the mixed precision is another than bf16.
        NotImplementedError: the processes shard the weights in another way than FSDP 2.
    """
    accelerate, safe = needs("accelerate"), needs("safetensors.torch")
    accelerator = accelerate.Accelerator() if accelerator is None else accelerator
    sharded = check_kind(accelerator)
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed_precision must be 'no' or 'bf16', got {accelerator.mixed_precision!r}")
    processes = int(accelerator.num_processes)
    if recipe.batch % processes:
        raise ValueError(f"a batch of {recipe.batch} cannot be shared out evenly among {processes} processes")
    given = samples if isinstance(samples, Samples) else Samples(samples)
    given.rows(0, recipe.batch, recipe.seed)
    if until is not None and not 1 <= until <= recipe.steps:
        raise ValueError(f"until must lie in 1 to {recipe.steps}, the steps of the recipe, got {until!r}")
    method = tokred.make(recipe.method, **recipe.parameters)
    path = Path(folder)
    check_folder(path)  # before the model is touched
    if teacher is None and recipe.distils:
        teacher = copy.deepcopy(model)
    _seed(recipe.seed, 0, 0)  # what the method's weights begin with
    tokred.apply(model, method)
    learned = tokred.modules(model)
    cls = host_class(model)
    setting = setting_of(recipe, f"{cls.__module__}.{cls.__qualname__}", method.to_dict()["parameters"], processes)
    path.mkdir(parents=True, exist_ok=True)
    model.to(accelerator.device)
    if teacher is not None:
        teacher.to(accelerator.device)
    before = Checkpoint.load(path, setting) if resume else None
    begun, log = _resumed(before, model, learned)
    for one in (model, teacher) if sharded else ():
        if one is not None:
            shard(one, accelerator)
    terms_of = Terms(
        model, recipe, modules=learned.values(), losses=tokred.losses if learned else _none, task=task, teacher=teacher,
        gate=_patches, change=tokred.change,
    )  # fmt: skip
    if before is not None:
        terms_of.optimiser.load_state_dict(optimiser_state(before.optimiser, terms_of.trained))
    wrapped = model if sharded else _wrapped(model, accelerator, recipe)
    for p in terms_of.own if processes > 1 else ():
        accelerate.utils.broadcast(p.data)
    main, rank = bool(accelerator.is_main_process), int(accelerator.process_index)
    last = recipe.steps if until is None else until

    def averaged(gradient: Tensor) -> Tensor:
        found: Tensor = accelerator.reduce(gradient, "mean")
        return found

    def keep(step: int) -> None:
        states = [gathered(part.state_dict(), main) for part in (model, terms_of.optimiser)]
        if main:
            own = {name: module.state_dict() for name, module in learned.items()}
            Checkpoint(step, setting, states[0], own, states[1], log).save(path)
        accelerator.wait_for_everyone()

    with terms_of:
        for i in range(begun, last):
            _seed(recipe.seed, i + 1, rank)
            terms_of.begin(i)
            rows = given.rows(i, recipe.batch, recipe.seed)
            share = len(rows) // processes
            x, y = given.batch(rows[rank * share : (rank + 1) * share])
            with accelerator.autocast():
                terms = terms_of(moved(x, accelerator.device), moved(y, accelerator.device), wrapped)
                loss = total(terms)
            terms_of.descend(loss, averaged if processes > 1 else None)
            values = {"loss": loss.detach(), **{name: term.detach().float() for name, term in terms.items()}}
            log.append({name: float(value) for name, value in values.items()})
            if each is not None and main:
                each(i, _step(log[-1]))
            if every and (i + 1) % every == 0 and i + 1 < last:
                keep(i + 1)
    if begun < last:
        keep(last)
    weights = gathered(model.state_dict(), main) if sharded and recipe.lr else None
    if main:
        _write(model, path, recipe, log, safe, weights)
    accelerator.wait_for_everyone()
    return Trained(model, [_step(line) for line in log], path, begun)


def needs(module: str) -> Any:
    """A module that training cannot do without.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(f"training needs {name}, which is not installed: pip install 'tokred[train]'") from error


def _none(model: nn.Module) -> dict[str, Tensor]:
    return {}


def _seed(seed: int, step: int, rank: int) -> None:
    """Draws of a step in a process; of torch's own alone, as nothing else is drawn from here."""
    torch.manual_seed(((seed * 0x9E3779B1 + step) * 0x85EBCA6B + rank) % 2**63)


def _patches(model: nn.Module) -> Tensor:
    """The soft decisions about the tokens that may go: those that may not need not be like the teacher's."""
    gate, host = tokred.trace(model).gate, adapters.find(model)
    if gate is None:
        raise ValueError("the recipe distils tokens, but the method makes no soft decisions: leave out tokens")
    n = gate.shape[1]
    return F.pad(gate[:, host.prefix : n - host.suffix], (host.prefix, host.suffix))


def _resumed(
    found: Checkpoint | None, model: nn.Module, learned: dict[str, nn.Module]
) -> tuple[int, list[dict[str, float]]]:
    """The step to go on at and the log so far; weights are as they were then."""
    if found is None:
        return 0, []
    model.load_state_dict(found.model)
    for name, module in learned.items():
        module.load_state_dict(found.modules[name])
    return found.step, list(found.log)


def _wrapped(model: nn.Module, accelerator: Any, recipe: Recipe) -> Any:
    """The model as several processes run it; alone, or while its weights stay as they are, the model itself."""
    if accelerator.num_processes == 1 or recipe.lr == 0:
        return model
    from torch.nn.parallel import DistributedDataParallel

    place = None if accelerator.device.type == "cpu" else [accelerator.device]
    # A method may leave weights out of a step, such as those of a class token that it does not look at.
    return DistributedDataParallel(model, device_ids=place, find_unused_parameters=True)


def _step(line: dict[str, float]) -> Step:
    return Step(line["loss"], {name: value for name, value in line.items() if name != "loss"})


def _write(model: nn.Module, path: Path, recipe: Recipe, log: list[dict[str, float]], safe: Any, weights: Any) -> None:
    """All but the checkpoint; ``weights``: the model's, put together, where it has shards."""
    tokred.save(model, path)
    lines = [json.dumps({"step": i, **line}) for i, line in enumerate(log)]
    (path / LOG).write_text("".join(f"{line}\n" for line in lines), "utf-8")
    if recipe.lr:
        part = path / f"{MODEL}.part"
        if weights is None:
            safe.save_model(model, str(part))
        else:
            own = own_names(model)
            safe.save_file({name: value for name, value in weights.items() if own(name)}, str(part))
        os.replace(part, path / MODEL)

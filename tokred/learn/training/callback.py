"""A callback for transformers' ``Trainer``: schedules of the method's parameters, and its weights in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

import tokred
from tokred.learn.recipe import Ramp
from tokred.learn.training.trainers import all_known, average_gradients, change_at, check_schedule

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "the callback is for transformers, which is not installed: pip install 'tokred[transformers]'"
    ) from error

FOLDER = "tokred"


class MethodCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Let a method on the model change its parameters while a ``Trainer`` runs, and keep what it learns.

    Gradients of the method's weights, which the trainer does not look after, are emptied before each step, averaged
    over the processes, and clipped at the trainer's ``max_grad_norm`` by themselves. Each checkpoint of the trainer
    gets a folder ``tokred``, as :func:`tokred.save` writes it, and a trainer that goes on from a checkpoint gets the
    method's weights back from there.

    Args:
        schedule: parameters of the method by name, each as a :class:`tokred.learn.Ramp` over the trainer's steps.

    Raises:
        TypeError: a value is no ramp.
    """

    def __init__(self, schedule: Mapping[str, Ramp] | None = None) -> None:
        self.schedule = check_schedule(schedule)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the weights of a checkpoint that the trainer goes on from.

        Raises:
            ValueError: the method has weights that the optimiser does not know.
            FileNotFoundError: the trainer goes on from a checkpoint without the method's weights.
        """
        model, optimiser = kwargs["model"], kwargs.get("optimizer")
        learned = tokred.modules(model)
        if optimiser is not None and not all_known(tokred.parameters(model), [optimiser]):
            raise ValueError(
                f"the optimiser does not know the weights of {', '.join(map(repr, learned))}: add a group with "
                "tokred.parameters(model) in create_optimizer, or freeze them"
            )
        if learned and state.global_step > 0:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER
            given = getattr(args, "resume_from_checkpoint", None)
            if isinstance(given, str):
                folder = Path(given) / FOLDER
            found = tokred.load(folder)
            for one in found if isinstance(found, list) else [found]:
                if one.name in learned and one.loaded is not None:
                    learned[one.name].load_state_dict(one.loaded.tensors)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the parameters of the step that comes, and forget the gradients of the one before: the trainer empties
        those of the model's own weights alone."""
        for p in tokred.parameters(kwargs["model"]):
            p.grad = None
        change_at(kwargs["model"], self.schedule, state.global_step, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Average the gradients of the method's weights over the processes, and clip them: the trainer sees neither."""
        own = [p for p in tokred.parameters(kwargs["model"]) if p.grad is not None]
        average_gradients(own)
        if own and args.max_grad_norm:
            nn.utils.clip_grad_norm_(own, args.max_grad_norm)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the method and its weights beside the model's."""
        if state.is_world_process_zero:
            tokred.save(kwargs["model"], Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER)

"""A callback for Lightning's ``Trainer``: schedules of the method's parameters, and its weights in checkpoints."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

import tokred
from tokred.learn.recipe import Ramp
from tokred.learn.training.trainers import all_known, average_gradients, change_at, check_schedule, several


def _base() -> Any:
    """``Callback`` of the package ``lightning``, or of ``pytorch_lightning``."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name).Callback
        except ImportError:
            continue
    raise ImportError("the callback is for Lightning, which is not installed: pip install 'tokred[lightning]'")


KEY = "tokred"


class LightningCallback(_base()):  # type: ignore[misc]  # its base is known when it is imported
    """Let a method on the model change its parameters while a Lightning ``Trainer`` runs, and keep what it learns.

    The patched model may be the ``LightningModule`` or any part of it. Its ``configure_optimizers`` has to give
    ``tokred.parameters(model)`` to an optimiser, and its ``training_step`` has to add ``tokred.losses(model)``. The
    trainer then empties and clips the gradients of the method's weights like all others; the callback averages them
    over the processes, which it does not. Every checkpoint of the trainer has the method's settings and weights, and a
    trainer that goes on from one gets the weights back.

    Args:
        schedule: parameters of the method by name, each as a :class:`tokred.learn.Ramp` over the trainer's steps.

    Raises:
        TypeError: a value is no ramp.
    """

    def __init__(self, schedule: Mapping[str, Ramp] | None = None) -> None:
        super().__init__()
        self.schedule = check_schedule(schedule)

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Look whether the optimisers know the method's weights, and every rank has the same ones.

        Raises:
            ValueError: they do not, or the trainer does not know how many steps it will take.
        """
        own = [p for p in tokred.parameters(pl_module) if p.requires_grad]
        if not all_known(own, trainer.optimizers):
            names = ", ".join(map(repr, tokred.modules(pl_module)))
            raise ValueError(
                f"no optimiser knows the weights of {names}: give tokred.parameters(model) to one in "
                "configure_optimizers, or freeze them"
            )
        if self.schedule and not 0 < float(trainer.estimated_stepping_batches) < float("inf"):
            raise ValueError(
                "a schedule needs to know how many steps there will be: give the trainer max_steps or max_epochs, got "
                f"{trainer.estimated_stepping_batches!r} steps"
            )
        if several():
            for p in own:
                dist.broadcast(p.data, 0)

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Set the parameters of the step that comes."""
        if self.schedule:  # without one the trainer need not know its steps
            change_at(pl_module, self.schedule, trainer.global_step, int(trainer.estimated_stepping_batches))

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        """Average the gradients of the method's weights over the processes: they stand beside the module that the
        trainer wraps."""
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        average_gradients(p for p in tokred.parameters(pl_module) if id(p) in mine)

    def on_save_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Put the methods' settings and weights beside the model's."""
        checkpoint[KEY] = {
            "methods": [method.to_dict() for method in tokred.patched(pl_module)],
            "modules": {name: module.state_dict() for name, module in tokred.modules(pl_module).items()},
        }

    def on_load_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Take up the weights of a checkpoint.

        Raises:
            ValueError: the checkpoint has none of a method that acts here; the message names both sides.
        """
        found, learned = checkpoint.get(KEY, {}).get("modules", {}), tokred.modules(pl_module)
        if set(found) != set(learned):
            raise ValueError(
                f"the checkpoint has weights of {', '.join(map(repr, found)) or 'no method'}, and the model has "
                f"methods with weights {', '.join(map(repr, learned)) or 'none'}: apply the same method first"
            )
        for name, module in learned.items():
            module.load_state_dict(found[name])

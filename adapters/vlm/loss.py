"""Hooks on a model with a head: the loss of the tokens that are left, with their labels."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokred.adapters.swap import Hook
from tokred.adapters.vlm.features import local


class EnterLoss(Hook):
    """Before the forward of the model with a head: labels wait until it is known which tokens are left."""

    def __init__(self, settings: Any, names: tuple[str, ...]) -> None:
        self.settings = settings
        self.names = names

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        labels = given.get("labels")
        local.done, local.labels = None, None
        if labels is None:
            return None
        if not self.settings.by_visual:
            name = self.settings.methods[-1].name
            raise ValueError(
                f"labels need the last layer's states of all tokens, and {name} leaves some of the prompt's out: call "
                "tokred.remove(model) first"
            )
        if not (isinstance(given.get("logits_to_keep", 0), int) and given.get("logits_to_keep", 0) == 0):
            raise ValueError("labels need the logits of all tokens: leave logits_to_keep out")
        local.labels = labels
        return (), {**given, "labels": None}


class LeaveLoss(Hook):
    """After it: the loss of the tokens that are left, with their labels."""

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        labels, forward = getattr(local, "labels", None), getattr(local, "done", None)
        local.labels = local.done = None
        if labels is None or output is None:
            return None
        columns = None if forward is None else forward.loss_columns()
        if forward is not None and columns is not None:
            labels = labels.gather(1, columns).masked_fill(~forward.loss_valid(), -100)
        logits = output["logits"] if isinstance(output, dict) else output[0]
        size = module.config.get_text_config().vocab_size
        loss = module.loss_function(logits=logits, labels=labels, vocab_size=size)
        if not isinstance(output, dict):
            return (loss, *output)
        output["loss"] = loss
        return output

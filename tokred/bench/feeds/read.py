"""``Read``: a kind of run of which metrics get something else than its output, such as an encoder's features."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from tokred.bench.codes import named
from tokred.bench.feeds.feed import Feed

Reading = str | Callable[[Any, Any], Any]
FEATURES = "features"
HEADS = ("classifier", "head", "heads", "fc", "score")  # of models that cannot be asked for theirs


def check(read: Any) -> None:
    """Refuse what is neither a name nor a function.

    Raises:
        TypeError: it is neither.
    """
    if read is not None and not isinstance(read, str) and not callable(read):
        raise TypeError(
            f"read must be {FEATURES!r}, the name of a module, or a function of (output, batch), got "
            f"{type(read).__name__}"
        )


class Read(Feed):
    """Another kind of run, of which metrics read a part.

    Args:
        inner: the run.
        read: ``"features"``, what the model's head is given, pooled; a module by its name, as ``named_modules`` has it,
            of which the output of its last call in a run is read; or a function of ``(output, batch)``, which is not
            timed.
        model: in which that is looked for.

    Raises:
        ValueError: there is no such module, or no head.
    """

    usual = "cosine"

    def __init__(self, inner: Feed, read: Reading, model: Any) -> None:
        self.inner, self.read = inner, read
        self.name, self.stages = inner.name, inner.stages  # type: ignore[misc]
        if isinstance(read, str):
            self._module(model)

    @property
    def kind(self) -> str | None:
        """Features, or of any kind."""
        return FEATURES if self.read == FEATURES else None

    @property
    def settings(self) -> str:
        """Settings of the run, and what is read: a name, or a function's name and code."""
        return f"{self.inner.settings} read={self.read if isinstance(self.read, str) else named(self.read)}"

    def _module(self, model: Any) -> nn.Module:
        """The module that is read: found anew in each model, of which workers have copies."""
        if self.read == FEATURES:
            return head_of(model)
        first, _, rest = str(self.read).partition(".")
        part = model if isinstance(model, nn.Module) else getattr(model, first, None)
        try:
            return part.get_submodule(str(self.read) if part is model else rest)  # type: ignore[union-attr]
        except AttributeError:
            raise ValueError(
                f"read names {self.read!r}, and {type(model).__name__} has no such module: see model.named_modules()"
            ) from None

    def prepare(self, item: Any, index: int = 0) -> Any:
        return self.inner.prepare(item, index)

    def around(self, model: Any) -> AbstractContextManager[None]:
        return self.inner.around(model)

    def run(self, model: Any, batch: Any) -> Any:
        """The output of the run; beside it, where a module is read, what that gave."""
        if not isinstance(self.read, str):
            return self.inner.run(model, batch)
        seen: list[Any] = [None]
        module = self._module(model)
        if self.read == FEATURES:
            hook = module.register_forward_pre_hook(lambda _, given: seen.__setitem__(0, given[0]))
        else:
            hook = module.register_forward_hook(lambda _, given, output: seen.__setitem__(0, output))
        try:
            self.inner.run(model, batch)
        finally:
            hook.remove()
        if seen[0] is None:
            raise ValueError(f"read names {self.read!r}, a module that does not run in run={self.name!r}")
        return seen[0]

    def finish(self, model: Any, output: Any, batch: Any) -> Any:
        """The part that metrics read."""
        if not isinstance(self.read, str):
            return self.read(self.inner.finish(model, output, batch), batch)
        return _pooled(output) if self.read == FEATURES else output

    def probe(self, model: Any, batch: Any) -> int:
        return self.inner.probe(model, batch)

    def one(self, batch: Any) -> Any:
        return self.inner.one(batch)


def head_of(model: Any) -> nn.Module:
    """The part of a model that turns pooled features into answers; of one without, what stands in its place.

    Raises:
        ValueError: none is found.
    """
    asked = getattr(model, "get_classifier", None)  # of timm's models
    named = (getattr(model, name, None) for name in HEADS)
    found: Any = asked() if callable(asked) else next((one for one in named if one is not None), None)
    if isinstance(found, tuple | list) and found:  # of distilled models
        found = found[0]
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"read={FEATURES!r} finds no head in {type(model).__name__}, of which it would read what goes in: name the "
            "module that gives the features, or give a function of (output, batch)"
        )
    return found


def _pooled(features: Tensor) -> Tensor:
    """Features ``(B, F)``: of tokens ``(B, N, C)`` the first, of maps ``(B, C, H, W)`` the mean."""
    if features.ndim == 4:
        return features.flatten(2).mean(-1)
    return features if features.ndim == 2 else features[:, 0]

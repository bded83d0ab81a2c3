"""A sub-layer of a denoiser on fewer tokens: the host's own forward and processor, seeing other projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from tokred.adapters.diffusion import rotary
from tokred.adapters.diffusion.session import Plan, Session
from tokred.errors import UnsupportedModelError

Kind = Literal["attention", "joint", "single", "mlp"]


class Merging:
    """A projection that is given fewer tokens."""

    def __init__(self, module: Any, plan: Plan, memo: list[Tensor]) -> None:
        self.module, self.plan, self.memo = module, plan, memo

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Queries, keys and values come from one tensor, which is merged once.
        if not self.memo or self.memo[0] is not x:
            self.memo[:] = [x, self.plan.merge(x)]
        return self.module(self.memo[1], *args, **kwargs)


class Restoring:
    """The last layer of an attention, whose output gets its full length back."""

    def __init__(self, module: Any, plan: Plan) -> None:
        self.module, self.plan = module, plan

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.plan.restore(self.module(x, *args, **kwargs))


class View:
    """An attention module as its processor sees it: itself, but for some projections."""

    def __init__(self, module: nn.Module, replaced: dict[str, Any]) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def view(module: Any, plan: Plan, names: tuple[str, ...], restore: bool) -> View:
    """``module`` with fewer tokens going into the projections ``names``."""
    memo: list[Tensor] = []
    found = {n: getattr(module, n, None) for n in names}
    replaced: dict[str, Any] = {n: Merging(m, plan, memo) for n, m in found.items() if m is not None}
    if restore:
        replaced["to_out"] = (*module.to_out[:-1], Restoring(module.to_out[-1], plan))
    return View(module, replaced)


@dataclass
class Spot:
    """What a patched sub-layer knows.

    Attributes:
        session: of its denoiser.
        block: number of its block.
        kind: an attention whose processor projects; one of text and image together, given apart or (``"single"``) in
            one tensor, text first; or an MLP.
        alone: no transformer block around it: its own input is what is compared.
        name: in the denoiser, for reports.
    """

    session: Session
    block: int
    kind: Kind
    alone: bool
    name: str

    def run(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The sub-layer: ``forward`` is the host class's own, still without its module."""
        if args:
            args, kwargs = args[1:], {**kwargs, "hidden_states": args[0]}
        x: Tensor = kwargs["hidden_states"]
        text = args[0] if args else kwargs.get("encoder_hidden_states")
        role = "mlp" if self.kind == "mlp" else "cross" if text is not None and self.kind == "attention" else "self"
        image, before = self._image(x)
        plan = None
        # Masks of an IP-Adapter are resized to as many queries as there are: those stay.
        masked = role == "cross" and kwargs.get("ip_adapter_masks") is not None
        if role in self.session.method.sublayers and not masked:
            plan = self.session.plan(self, image)
        self.session.note(self, role, image, plan)
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        if plan is None:
            return forward(module, x, *args, **rest)
        if role == "mlp":
            return plan.restore(forward(module, plan.merge(x), *args, **rest))
        if rest.get(rotary.TABLE) is not None:
            return rotary.attend(forward, module, plan, x, before, args, rest)
        if self.kind == "joint":
            return self._joint(module, forward, plan, x, args, rest)
        return self._attend(module, forward, plan, x, args, rest, role)

    def _image(self, x: Tensor) -> tuple[Tensor, int]:
        """The tokens of the image, and how many of text stand before them."""
        seen = self.session.inputs.get(self.block) if self.kind == "single" else None
        before = 0 if seen is None else x.shape[1] - seen.shape[1]
        return x[:, before:] if before else x, before

    def _attend(self, module: Any, forward: Any, plan: Plan, x: Tensor, args: Any, rest: Any, role: str) -> Tensor:
        if role == "self" and rest.get("attention_mask") is not None:
            raise UnsupportedModelError(
                f"{self.name} was given an attention mask over the image's tokens, which a reduction cannot follow: "
                "leave it out, or call tokred.remove(model) first"
            )
        if plan.part == "kv":
            check_separate(module, self.name)
            seen = view(module, plan, ("to_k", "to_v"), False)
        else:
            names = ("to_q", "to_k", "to_v", "to_qkv") if role == "self" else ("to_q",)
            seen = view(module, plan, names, True)
        y: Tensor = forward(seen, x, *args, **rest)
        if y.shape != x.shape:
            raise UnsupportedModelError(
                f"the processor {type(module.processor).__name__} of {self.name} does not use the module's own "
                "projections, so tokens could not be reduced around it"
            )
        return y

    def _joint(self, module: Any, forward: Any, plan: Plan, x: Tensor, args: Any, rest: Any) -> Any:
        """Attention of text and image in one sequence, without rotary embedding: the image part goes in shorter."""
        if plan.part == "kv":
            check_separate(module, self.name)
            return forward(view(module, plan, ("to_k", "to_v"), False), x, *args, **rest)
        y = forward(module, plan.merge(x), *args, **rest)
        return (plan.restore(y[0]), *y[1:]) if isinstance(y, tuple) else plan.restore(y)


def check_separate(module: Any, name: str) -> None:
    """Keys and values alone can only be reduced where they have projections of their own.

    Raises:
        UnsupportedModelError: queries, keys and values share one.
    """
    if getattr(module, "fused_projections", False):
        raise UnsupportedModelError(
            f"{name} projects queries, keys and values in one product, so keys and values cannot be reduced alone: "
            "call unfuse_qkv_projections() first"
        )

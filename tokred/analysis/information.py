"""``horizon``: down to which layer of its language model a model with vision needs its visual tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokred import adapters
from tokred.adapters.contract import words
from tokred.analysis.viz.canvas import COLOURS, check, save, subplots
from tokred.api import applied, patched
from tokred.core.checks import check_count, check_share
from tokred.core.method import Method
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.selection import random_order
from tokred.core.site import Site
from tokred.errors import MissingInputError, TokredError
from tokred.vlm.before_llm import ProjectorMethod, VisualSite
from tokred.vlm.in_llm import LayerMethod, LayerSite

IGNORED = -100  # label of a token that is no part of the answer, as everywhere in training
DRAWS = 1000  # of the bootstrap
_VISUAL = "labels name the last {} tokens, among which are visual ones: an answer is text, and ends the prompt"


@dataclass(frozen=True)
class _NoneOfThem(ProjectorMethod):
    """No visual token enters the language model."""

    name: ClassVar[str] = "horizon"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"x"})

    def count(self, n: int) -> int:
        return 0

    def choose(self, site: VisualSite) -> Reduction:
        return site.keep(torch.zeros(site.shape[0], 0, dtype=torch.long, device=site.device))


@dataclass(frozen=True)
class _Only(LayerMethod):
    """One visual token of each sample goes on behind a layer, or all but it, or none."""

    name: ClassVar[str] = "horizon"

    layer: int
    token: int | None = None
    rest: bool = False
    answer: int = 0

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"x"})

    def tokens(self, n: int, place: Place) -> int:
        return 0 if place.layer == self.layer else n

    def reduce(self, site: Site) -> Reduction:
        assert isinstance(site, LayerSite)  # of the stage
        if site.layer == self.layer and bool(site.visual[:, -self.answer :].any()):
            raise ValueError(
                f"labels name the last {self.answer} tokens, among which are visual ones: an answer is text"
            )
        return super().reduce(site)

    def choose(self, site: LayerSite) -> Reduction:
        kept = torch.zeros_like(site.visual)
        if self.token is not None:
            rank = site.visual.long().cumsum(1) - 1
            count = torch.tensor(site.counts, device=site.device).unsqueeze(1).clamp_min(1)
            kept = site.visual & (rank == self.token % count)
        return site.keep_visual(site.visual & ~kept if self.rest else kept)


def first_within(curve: Sequence[float], eps: float) -> int | None:
    """The first place from which on a curve stays within ``eps`` of zero; None: it does not even at its end."""
    found = None
    for i in reversed(range(len(curve))):
        if not abs(curve[i]) <= eps:
            break
        found = i
    return found


@dataclass(frozen=True)
class Horizon:
    """How much a model's answers need visual tokens, layer by layer.

    Attributes:
        layers: that were measured: before each of them visual tokens left.
        dense: ``(n,)`` float64, the probability of each sample's answer with all visual tokens.
        gains: ``(n, layers)`` float64, how much of it is lost when none of them goes on there.
        single: ``(n, layers, tokens)`` float64, the information of single tokens, see :func:`horizon`; NaN before layer
            1, where single tokens are not tried; None: not measured.
        eps: loss that counts as none.
        depth: decoder layers of the model.
    """

    layers: tuple[int, ...]
    dense: Tensor
    gains: Tensor
    single: Tensor | None
    eps: float
    depth: int
    seed: int = field(default=0, repr=False)

    @property
    def curve(self) -> tuple[float, ...]:
        """The mean loss over samples, by layer."""
        return tuple(self.gains.mean(0).tolist())

    @property
    def layer(self) -> int | None:
        """The first layer from which on visual tokens are not needed; None: they are needed to the end."""
        found = first_within(self.curve, self.eps)
        return None if found is None else self.layers[found]

    @property
    def interval(self) -> tuple[int | None, int | None]:
        """95 % of the horizons of as many samples drawn anew (bootstrap); None: to the end."""
        n = len(self.gains)
        rows = torch.randint(n, (DRAWS, n), generator=torch.Generator().manual_seed(self.seed))
        found = sorted(self._of(curve) for curve in self.gains[rows].mean(1).tolist())
        return self._layer(found[round(0.025 * DRAWS)]), self._layer(found[round(0.975 * DRAWS) - 1])

    def _of(self, curve: list[float]) -> int:
        found = first_within(curve, self.eps)
        return len(self.layers) if found is None else found

    def _layer(self, place: int) -> int | None:
        return self.layers[place] if place < len(self.layers) else None

    def rows(self) -> list[dict[str, float | int | None]]:
        """One for each layer: ``layer``, ``gain``, and the mean and the deviation of single tokens' information."""
        found: list[dict[str, float | int | None]] = []
        for i, (layer, gain) in enumerate(zip(self.layers, self.curve, strict=True)):
            one = None if self.single is None or layer == 0 else self.single[:, i]
            found.append(
                {
                    "layer": layer,
                    "gain": gain,
                    "mean": None if one is None else float(one.mean()),
                    "deviation": None if one is None else float(one.std(1, correction=0).mean()),
                }
            )
        return found

    def __str__(self) -> str:
        low, high = self.interval
        said = "the end" if self.layer is None else f"layer {self.layer}"
        span = " to ".join("the end" if one is None else str(one) for one in (low, high))
        lines = [
            f"answers of {len(self.dense)} samples need visual tokens up to {said} of {self.depth} "
            f"(95 % interval: {span}; eps {self.eps:g})",
            f"probability of the answer with all of them: {float(self.dense.mean()):.3f}",
            "layer     lost" + ("" if self.single is None else "   one token   deviation"),
        ]
        for row in self.rows():
            one = "" if row["mean"] is None else f"{row['mean']:12.4f}{row['deviation']:12.4f}"
            lines.append(f"{row['layer']:5d}{row['gain']:9.4f}{one}")
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Any:
        """The loss by layer with its standard error, the horizon as a line; a matplotlib figure.

        Args:
            path: file to write, beside.

        Raises:
            ImportError: matplotlib is not installed.
        """
        check("a plot of the horizon")
        figure, axes = subplots(1, 1, figsize=(6.6, 3.8), squeeze=False, layout="constrained")
        axis = axes[0][0]
        mean = self.gains.mean(0)
        axis.plot(self.layers, mean, color=COLOURS[0], marker="o", label="all visual tokens leave here")
        if len(self.gains) > 1:
            error = self.gains.std(0) / len(self.gains) ** 0.5
            axis.fill_between(self.layers, mean - error, mean + error, color=COLOURS[0], alpha=0.2, linewidth=0)
        if self.single is not None:
            deviation = [(row["layer"], row["deviation"]) for row in self.rows() if row["deviation"] is not None]
            axis.plot(*zip(*deviation, strict=True), color=COLOURS[1], marker="s", label="deviation of single tokens")
        if self.layer is not None:
            axis.axvline(self.layer, color="0.4", linestyle="--", label=f"horizon: layer {self.layer}")
        axis.set_xlabel("decoder layer")
        axis.set_ylabel("probability of the answer that is lost")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        figure.legend(frameon=False, loc="outside upper center", ncols=3, fontsize="small")
        if path is not None:
            save(figure, Path(path))
        return figure


def horizon(
    model: nn.Module,
    data: Iterable[dict[str, Any]],
    *,
    eps: float = 0.01,
    samples: int = 32,
    tokens: int = 0,
    step: int = 1,
    mode: str = "alone",
    max_new_tokens: int = 8,
    seed: int = 0,
) -> Horizon:
    """The layer from which on answers of a model with vision do not need visual tokens any more.

    A forward for every layer tells what is lost when all visual tokens leave before it: the probability of the answer
    (geometric mean over its tokens, each told from the right ones before it) with all of them, less that with none.
    Information of single tokens, as published, takes ``tokens`` more forwards a layer.

    Args:
        model: one with vision, patched with nothing.
        data: batches, the arguments of its forward: ``input_ids`` ``(B, L)``, pixels, a mask with padding on the left.
            With ``labels`` ``(B, L)``, -100 on all but the answer, which ends the prompt, that is the answer; without,
            what the model says itself, greedily.
        eps: loss that counts as none.
        samples: how many are measured, in whole batches.
        tokens: single visual tokens that are tried in each sample, at random; 0: none.
        step: of the layers that are measured.
        mode: of single tokens: ``"alone"``, what one adds to none; or ``"leave_one_out"``, what all lose without it.
        max_new_tokens: of the model's own answers.
        seed: of the tokens that are tried, and of the interval.

    Returns:
        A :class:`Horizon`: print it, plot it, and give its ``layer`` to ``random_deep``. Layers before which the model
        lets no visual token leave are not among its ``layers``.

    Raises:
        UnsupportedModelError, MissingInputError: nothing can leave inside the model's language model, or its prompts
            hold no visual token.
        ValueError: an argument is out of its range, there is no data, or the model is patched.

    Source: When Token Pruning is Worse than Random, CVPR 2026 (arXiv 2512.07580), its definition of information; the
    loss of all tokens, and the rule, are ours.
    """
    check_share(eps, "eps")
    for name, number in (("samples", samples), ("step", step), ("max_new_tokens", max_new_tokens)):
        check_count(number, name, 1)
    check_count(tokens, "tokens")
    if mode not in ("alone", "leave_one_out"):
        raise ValueError(f"mode must be 'alone' or 'leave_one_out', got {mode!r}")
    if patched(model):
        raise ValueError("the model is patched: call tokred.remove(model) first")
    host = adapters.find(model, "layer")
    if host.core is None:
        raise MissingInputError("the model is a language model alone: it has no visual tokens")
    layers = [i for i in range(0, host.depth, step) if i == 0 or _possible(host, i)]
    dense, gains, single, seen = [], [], [], 0
    was = model.training
    model.eval()
    try:
        for batch in islice(data, samples):
            given, answer = _answered(model, dict(batch), max_new_tokens)
            whole = _probability(model, given, answer, None)
            count = _visual(model, given, answer) if tokens else 0
            chosen = random_order(1, count, seed, 0)[0, :tokens].tolist() if tokens else []
            lost, ones = [], []
            for layer in layers:
                none = _probability(model, given, answer, _Only(layer, answer=answer) if layer else _NoneOfThem())
                lost.append(whole - none)
                rest = mode == "leave_one_out"
                for token in chosen:
                    if layer == 0:
                        ones.append(torch.full_like(whole, torch.nan))
                        continue
                    one = _probability(model, given, answer, _Only(layer, token, rest, answer))
                    ones.append(whole - one if rest else one - none)
            dense.append(whole)
            gains.append(torch.stack(lost, 1))
            if chosen:
                single.append(torch.stack(ones, 1).view(len(whole), len(layers), len(chosen)))
            seen += len(whole)
            if seen >= samples:
                break
    finally:
        model.train(was)
    if not dense:
        raise ValueError("data is empty: at least one batch is needed")
    if single and len({one.shape[2] for one in single}) > 1:
        least = min(one.shape[2] for one in single)
        single = [one[:, :, :least] for one in single]
    return Horizon(
        tuple(layers), torch.cat(dense), torch.cat(gains), torch.cat(single) if single else None, eps, host.depth, seed
    )


def _possible(host: Any, layer: int) -> bool:
    """True where visual tokens may leave before a layer; some models add features of their tower after early ones."""
    try:
        host.check(_Only(layer))
    except (TokredError, ValueError):
        return False
    return True


def _answered(model: Any, batch: dict[str, Any], most: int) -> tuple[dict[str, Any], int]:
    """The arguments of a forward over prompt and answer, with ``labels``, and how many tokens hold the answer."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError("prompts are padded on the right: pad on the left, so that the answer ends each of them")
    if "labels" not in batch:
        with torch.no_grad():
            said = model.generate(**batch, max_new_tokens=most, do_sample=False, num_beams=1)
        new = said[:, ids.shape[1] :] if said.shape[1] > ids.shape[1] else said
        batch = {name: _longer(value, ids, new.shape[1]) for name, value in batch.items()}
        batch["input_ids"] = torch.cat([ids, new], 1)
        batch["labels"] = torch.cat([torch.full_like(ids, IGNORED), _shown(model, new)], 1)
    labels = batch["labels"]
    if labels.shape != batch["input_ids"].shape:
        raise ValueError(f"labels must have the shape of input_ids, {tuple(ids.shape)}, got {tuple(labels.shape)}")
    held = (labels != IGNORED).any(0).nonzero()
    if not len(held) or not bool((labels != IGNORED).any(1).all()):
        raise ValueError(f"labels name no answer of some sample: there are only {IGNORED}s")
    answer = labels.shape[1] - int(held[0])
    if answer >= labels.shape[1]:
        raise ValueError("labels name the whole prompt as the answer: set those of the question to -100")
    return batch, answer


def _shown(model: Any, new: Tensor) -> Tensor:
    """Labels of generated tokens: those up to the end of each answer."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    over = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device)).long()
    return new.masked_fill(over.cumsum(1) - over > 0, IGNORED)


def _longer(value: Any, ids: Tensor, more: int) -> Any:
    """An argument with a number for every token, with numbers for ``more`` of text: ones in a mask, else zeros."""
    if not isinstance(value, Tensor) or value.shape != ids.shape:
        return value
    fill = 1 if bool((value[:, -1] == 1).all()) else 0
    return torch.cat([value, value.new_full((len(value), more), fill)], 1)


@torch.no_grad()
def _probability(model: nn.Module, given: dict[str, Any], answer: int, method: Method | None) -> Tensor:
    """``(B,)`` float64: ``exp`` of the mean log probability of an answer's tokens."""
    arguments = {name: value for name, value in given.items() if name != "labels"}
    if method is None:
        logits: Tensor = words.LOGITS.need(model(**arguments))
    else:
        with applied(model, method):
            logits = words.LOGITS.need(model(**arguments))
    if logits.shape[1] <= answer:
        raise ValueError(_VISUAL.format(answer))
    # Whatever left stood before the answer, and columns are packed to the right.
    told = logits[:, -answer - 1 : -1].float().log_softmax(-1)
    labels = given["labels"][:, -answer:]
    real = labels != IGNORED
    found = told.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1).double()
    mean: Tensor = (found * real).sum(1) / real.sum(1)
    return mean.exp().cpu()


def _visual(model: nn.Module, given: dict[str, Any], answer: int) -> int:
    """Visual tokens of the sample that has most."""
    seen: list[int] = []

    @dataclass(frozen=True)
    class Count(_Only):
        def choose(self, site: LayerSite) -> Reduction:
            seen.append(max(site.counts))
            return site.keep_visual(site.visual)

    _probability(model, given, answer, Count(1, answer=answer))
    if not seen:
        raise MissingInputError("the prompts hold no visual token")
    return seen[-1]

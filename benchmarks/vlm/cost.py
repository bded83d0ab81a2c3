"""What choosing visual tokens costs at the layer shapes of real VLMs, and a pruned prompt beside one that is so short.

    python -m benchmarks vlm/cost --threads 2 --rounds 3 --out benchmarks/results/vlm.csv --overwrite    # 12 minutes
    python -m benchmarks vlm/cost --device cuda --layers 0 --out /tmp/cost.csv         # all layers; 16 GB
    python -m benchmarks vlm/cost --quick --out /tmp/cost.csv                          # tiny shapes: does it run?

The models have random weights and the layer shapes of LLaVA-1.5-7B (576 visual tokens) and Qwen2.5-VL-7B (1,296), but
few layers; time depends on neither the weights nor, per layer, on how many there are. A run is the prompt's forward of
one image and 64 tokens of text through language model and cache, without the head, on features that the tower made
before. Arms run in one process, in an order shuffled anew in each round, and ratios are per round: median and
quartiles.

Two tables are printed:

- ``share``: everything that the patch does in the forward (scoring, the rows of attention that it asks for, deciding,
  gathering tokens, positions and masks, what it notes of the tower, its bookkeeping), timed inside the forward with
  the device waited for around each part, over the time of the dense prompt in the same round. ``share_of_measured``
  is that of the few layers; ``share_of_full_depth`` scales both to the real number of layers: the dense prompt by the
  time of its layers, which are alike, and the patch by what a layer costs at which nothing is decided. A method that
  decides at more layers of the real model than of this one (SAINT: 10 for 1) has its dearest layer counted as often.
  The tower's own time, which the prompt waits for too, is in no denominator.
- ``times_short``: the pruned prompt, everything above included, over an unpatched prompt that has only so many visual
  tokens from the start, at 1/4, 1/8 and 1/16 of them. ``times_short_full_depth`` scales the layers' part of both. Only
  methods before the language model have one. The tower's time is the same in both, and stands in ``tower_ms``.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

import tokred
from benchmarks.saving import save, saving
from benchmarks.vlm.watched import CASES, Shape, around, build, prompt
from tokred.bench import results, timing
from tokred.core.registry import methods

SHARES = {4: 0.25, 8: 0.125, 16: 0.0625}  # one of so many visual tokens is left
SHORT = ("random_visual", "divprune", "visionzip", "cdpruner")  # methods at all of them
TARGETS = (0.03, 1.10)


class Setting(NamedTuple):
    """Parameters of a method, and how often it decides in the real model for once here."""

    parameters: dict[str, Any]
    times: int = 1


def _stages(share: float, steps: int = 3) -> tuple[float, ...]:
    """Shares that fall evenly, in the logarithm, to ``share``."""
    return tuple(share ** ((i + 1) / steps) for i in range(steps))


def _budget(share: float, layers: int, tower: int) -> Setting:
    return Setting({"budget": share})


# What leaves a share of the visual tokens, by name: of share, decoder layers and layers of the tower.
METHODS: dict[str, Callable[[float, int, int], Setting]] = {
    "vscan": lambda s, layers, tower: Setting({"budget": s, "shallow": 0}),
    "saint_visual": lambda s, layers, tower: Setting({"budget": s, "layer": tower - 1}),
    "flash_vl": lambda s, layers, tower: Setting({"s": round(s**-0.5)}),
    "nemotron": lambda s, layers, tower: Setting({"s": round(s**-0.5)}),
    "cat": lambda s, layers, tower: Setting({"policy": "pool", "total": s, "n_min": 1}),
    "fastv": lambda s, layers, tower: Setting({"layer": min(2, layers - 1), "ratio": 1 - s}),
    "holitom_layer": lambda s, layers, tower: Setting({"layer": min(2, layers - 1), "ratio": 1 - s}),
    "topv": lambda s, layers, tower: Setting({"layer": min(2, layers - 2), "budget": s}),
    "pyramiddrop": lambda s, layers, tower: Setting({"ratios": _stages(s)}),
    "sparsevlm": lambda s, layers, tower: Setting({"layers": tuple(range(3)), "budget": _stages(s)}),
    "vscan_layer": lambda s, layers, tower: Setting({"budget": s}),
    # So low a threshold that half of them leave, since random weights have no near-copies.
    "saint_layer": lambda s, layers, tower: Setting({"start": 1, "end": 1, "tau": 0.0}, 10),
}  # fmt: skip
# All others have a budget; those of clips find none here.
METHODS |= {
    name: _budget
    for stage in ("projector", "layer")
    for name, cls in methods.of(stage).items()
    if name not in METHODS and "budget" in (cls.nothing or {}) and not getattr(cls, "clips", False)
}


@dataclass
class Prompt:
    """One prompt that is timed.

    Attributes:
        name: of the method, "dense" or "short".
        keeps: one of so many visual tokens is left.
        method: None where the model is not patched.
        given: arguments of the forward, the features included.
        times: see :class:`Setting`.
        noted: seconds that the patch took while the tower ran.
        left: visual tokens at the last layer.
        found: of each round.
    """

    name: str
    keeps: int
    method: Any
    given: dict[str, Any]
    times: int = 1
    noted: float = 0.0
    left: int = 0
    found: list[Round] = field(default_factory=list)


class Round(NamedTuple):
    """Seconds of one forward: all of it, its decoder layers, and what the patch does: all, deciding alone, and that of
    the real depth."""

    whole: float
    layers: float
    own: float
    decide: float
    own_deep: float

    def deep(self, more: float) -> float:
        """The whole with the layers ``more`` times again."""
        return self.whole + more * self.layers


class Bench:
    """The prompts of one model, timed."""

    def __init__(self, shape: Shape, options: argparse.Namespace) -> None:
        self.shape, self.options = shape, options
        self.device, self.dtype = torch.device(options.device), getattr(torch, options.dtype)
        self.depth = options.layers or shape.depth
        self.model = build(shape, self.depth, options.tower_layers, self.device, self.dtype)
        self.core: Any = self.model.model
        self.watch = timing.Watch(self.device)
        self.edges = [0.0, 0.0]  # when the layers begin and end
        layers = self.core.language_model.layers
        layers[0].register_forward_pre_hook(lambda *_: self._edge(0))
        layers[-1].register_forward_hook(lambda *_: self._edge(1))
        self.more = shape.depth / self.depth - 1
        self.refused: dict[str, str] = {}
        self.seen: dict[Any, tuple[dict[str, Any], float]] = {}

    def _edge(self, which: int) -> None:
        self.edges[which] = self.watch.now()

    # ------------------------------------------------------------------ arms

    def arms(self) -> list[Prompt]:
        """The dense prompt, short ones, and methods; features are made here."""
        whole = prompt(self.shape, 1, self.device, self.dtype)
        features = whole.pop("features")
        self.tower = self._tower(features)
        output = self.core.get_image_features(**features, return_dict=True)
        found = [Prompt("dense", 1, None, self._given(whole, output))]
        for keeps in SHARES:
            short = prompt(self.shape, keeps, self.device, self.dtype)
            short.pop("features")
            some = [one[: self.shape.visual // keeps] for one in output.pooler_output]
            found.append(Prompt("short", keeps, None, self._given(short, SimpleNamespace(pooler_output=some))))
        for name in self.options.methods:
            for keeps, share in SHARES.items():
                if keeps > min(SHARES) and name not in self.options.short:
                    continue
                arm = self._patched(name, keeps, share, whole, features)
                if arm is None:
                    break
                found.append(arm)
        return found

    def _tower(self, features: dict[str, Any]) -> float:
        def run() -> object:
            return self.core.get_image_features(**features, return_dict=True)

        seconds = [timing.seconds_of(run, self.device)[0] for _ in range(3)]
        return timing.spread(seconds[1:]).median

    def _given(self, tokens: dict[str, Any], output: Any) -> dict[str, Any]:
        # Nothing of the tower is held but what the forward reads.
        features = SimpleNamespace(pooler_output=output.pooler_output)
        return {**tokens, "mm_encoder_outputs": {"image": features}, "use_cache": True}

    def _patched(self, name: str, keeps: int, share: float, whole: Any, features: Any) -> Prompt | None:
        """With the method's other settings where the model supplies less; None where none fits."""
        try:
            setting = METHODS[name](share, self.depth, self.options.tower_layers)
            first = tokred.make(name, **setting.parameters)
        except ValueError as error:
            return self._refuse(name, error)
        for method in (first, *(other for _, other in getattr(first, "variants", tuple)())):
            try:
                with around(self.watch), tokred.applied(self.model, method):
                    given, noted = self._noted(method, whole, features)
            except ValueError as error:
                self._refuse(name, error)
                continue
            self.refused.pop(name, None)
            return Prompt(name, keeps, method, given, setting.times, noted)
        return None

    def _noted(self, method: Any, whole: Any, features: Any) -> tuple[dict[str, Any], float]:
        """The forward's arguments with what the tower told a method, and how long that took; alike for methods that
        read alike."""
        key = (method.stage, method.reads, getattr(method, "tower_layers", ()))
        if key not in self.seen:
            self.watch.clear()
            output = self.core.get_image_features(**features, return_dict=True)
            self.seen[key] = self._given(whole, output), self.watch.total()
        return self.seen[key]

    def _refuse(self, name: str, error: Exception) -> None:
        self.refused.setdefault(name, str(error))

    # ------------------------------------------------------------------ runs

    def run(self, rounds: int) -> list[Prompt]:
        """Time every arm in every round."""
        with torch.inference_mode():
            arms = self.arms()
        for name, why in self.refused.items():
            self._say(f"{name} does not run here: {why}")
        self._say(f"{len(arms)} arms, {rounds} rounds, tower {1000 * self.tower:.0f} ms")
        start, count = time.monotonic(), [0]

        def tick() -> None:
            count[0] += 1
            if count[0] % len(arms) == 0:
                self._say(f"pass {count[0] // len(arms)} of {rounds + 1}, {time.monotonic() - start:.0f} s")

        def collect(arm: int, _: int, result: Round) -> None:
            arms[arm].found.append(result)

        with around(self.watch):
            enters = [self._enter(arm) for arm in arms]
            timing.paired(enters, lambda _: self._forward(), rounds, device=self.device, collect=collect, tick=tick)
        return arms

    def _enter(self, arm: Prompt) -> Callable[[], AbstractContextManager[object]]:
        @contextlib.contextmanager
        def enter() -> Iterator[None]:
            self.now = arm
            if arm.method is None:
                yield
                arm.left = self.shape.visual // arm.keeps
                return
            with tokred.applied(self.model, arm.method):
                yield
                arm.left = tokred.report(self.model).layers[-1].visual[0]

        return enter

    def _forward(self) -> Round:
        """The prompt of the arm that is entered."""
        arm, watch = self.now, self.watch
        watch.clear()
        whole, _ = timing.seconds_of(lambda: self.core(**arm.given), self.device)
        # What decides is inside the other parts.
        decide = sum(watch.spent.pop("decide", [0.0]))
        own = arm.noted + watch.total()
        layers = watch.spent.get("layer", [0.0])
        more = (self.shape.depth - self.depth) * min(layers) + (arm.times - 1) * (max(layers) - min(layers))
        return Round(whole, self.edges[1] - self.edges[0], own, decide, own + more)

    def _say(self, text: str) -> None:
        print(f"{self.shape.name}: {text}", file=sys.stderr, flush=True)

    # ------------------------------------------------------------------ records

    def records(self, arms: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Records of results, one a prompt."""
        options, dense = self.options, arms[0].found
        where = {"model": self.shape.name, "visual": self.shape.visual, "text": self.shape.text, "depth": self.depth}
        where |= {"full_depth": self.shape.depth, "tower_depth": options.tower_layers, "weights": "random"}
        where |= results.here(self.device, options.dtype)
        found = []
        for arm in arms:
            row: dict[str, Any] = {"method": arm.name, "setting": "", "keeps": f"1/{arm.keeps}", "decides": arm.times}
            row |= {"tokens_left": arm.left, "tower_ms": 1000 * self.tower, "rounds": len(arm.found), **where}
            row |= _ms("prefill_ms", (r.whole for r in arm.found)) | _ms("layers_ms", (r.layers for r in arm.found))
            row |= _ms("dense_ms", (r.whole for r in dense))
            row |= _ms("dense_full_depth_ms", (r.deep(self.more) for r in dense))
            if arm.method is not None:
                row["setting"] = _typed(arm.method)
                pairs = list(zip(arm.found, dense, strict=True))
                row |= _ms("own_ms", (r.own for r in arm.found)) | _ms("decide_ms", (r.decide for r in arm.found))
                row |= _ms("own_full_depth_ms", (r.own_deep for r in arm.found))
                row |= results.spread("share_of_measured", [r.own / d.whole for r, d in pairs])
                row |= results.spread("share_of_full_depth", [r.own_deep / d.deep(self.more) for r, d in pairs])
            short = [a for a in arms if a.name == "short" and a.left == arm.left and a.keeps == arm.keeps]
            if short and arm.method is not None and arm.method.stage == "projector":
                pairs = list(zip(arm.found, short[0].found, strict=True))
                row |= results.spread("times_short", [r.whole / s.whole for r, s in pairs])
                deep = [r.deep(self.more) / s.deep(self.more) for r, s in pairs]
                row |= results.spread("times_short_full_depth", deep)
            found.append(row)
        return found


def _ms(name: str, seconds: Any) -> dict[str, float]:
    return results.spread(name, [1000 * s for s in seconds])


def _typed(method: Any) -> str:
    """``budget=0.25 attention='received'`` of a method, as it says itself."""
    return re.sub(r", (?=\w+=)", " ", str(method).partition("(")[2].removesuffix(")"))


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Both, as text."""
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        first = mine[0]
        lines += ["", f"{name}: {first['visual']} visual tokens and {first['text']} of text, {first['depth']} of "
                      f"{first['full_depth']} layers, {first['dtype']}; dense prompt {first['dense_ms']:.0f} ms, "
                      f"{first['dense_full_depth_ms']:.0f} ms at full depth, tower of {first['tower_depth']} layers "
                      f"{first['tower_ms']:.0f} ms",
                  f"{'own work, share of the dense prompt':36}{'left':>6}{'ms':>9}{'deciding':>10}{'measured':>10}"
                  f"{'full depth':>12}"]  # fmt: skip
        for row in mine:
            if "share_of_measured" in row and row["keeps"] == f"1/{min(SHARES)}":
                deep = row["share_of_full_depth"]
                lines.append(f"{row['method']:36}{row['tokens_left']:>6}{row['own_ms']:>9.1f}{row['decide_ms']:>10.1f}"
                             f"{row['share_of_measured']:>10.2%}{deep:>12.2%}{_mark(deep > TARGETS[0])}")  # fmt: skip
        lines.append(f"{'times the prompt that is so short':36}{'left':>6}{'ms':>9}{'measured':>10}{'full depth':>12}")
        for row in mine:
            if "times_short" in row:
                deep = row["times_short_full_depth"]
                lines.append(f"{row['method']:36}{row['tokens_left']:>6}{row['prefill_ms']:>9.0f}{row['times_short']:>10.3f}"
                             f"{deep:>12.3f}{_mark(deep > TARGETS[1])}")  # fmt: skip
    return "\n".join(lines)


def _mark(missed: bool) -> str:
    return "  above the target" if missed else ""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--case", action="append", choices=tuple(CASES), help="default: all")
    found.add_argument("--methods", default=",".join(METHODS), help="names, with commas")
    found.add_argument("--short", default=",".join(SHORT), help="those that are timed at 1/8 and 1/16 as well")
    found.add_argument("--layers", type=int, default=4, help="decoder layers; 0: all")
    found.add_argument("--tower-layers", type=int, default=2)
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--threads", type=int)
    found.add_argument("--device", default="cpu")
    found.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    found.add_argument("--quick", action="store_true", help="tiny shapes, one round: does it run?")
    saving(found)
    return found


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every case, and write its rows after each.

    Raises:
        ValueError: a method is not known, or there are too few layers of the tower.
    """
    options.methods, options.short = (tuple(t.split(",")) for t in (options.methods, options.short))
    unknown = sorted({*options.methods} - {*METHODS})
    if unknown:
        raise ValueError(f"no setting is known for {', '.join(unknown)}; allowed are {', '.join(METHODS)}")
    if options.layers < 0 or options.tower_layers < 2:
        raise ValueError("layers must be at least 0, which is all of them, and those of the tower at least 2")
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for name in options.case or CASES:
        shape = CASES[name].tiny() if options.quick else CASES[name]
        bench = Bench(shape, options)
        new = bench.records(bench.run(1 if options.quick else options.rounds))
        del bench
        save(new, "cost", options)
        rows += new
    print(tables(rows))
    return rows


def main() -> None:
    """See the module."""
    found = parser()
    try:
        run(found.parse_args())
    except ValueError as error:
        found.error(str(error))


if __name__ == "__main__":
    main()

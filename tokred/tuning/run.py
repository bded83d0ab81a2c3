"""``tokred.tune``: find the method, the amount and the schedule over the layers that suit a model, here.

best = tokred.tune(model, loader, "top1", speedup=1.5)
print(best)
best.apply(model)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from tokred import adapters, api
from tokred.bench import feeds
from tokred.bench.benchmark import name_of, prepared
from tokred.bench.codes import code_of, model_of
from tokred.bench.feeds import Run
from tokred.bench.ready import Better
from tokred.bench.scoring import Metric
from tokred.core.checks import check_choice, check_count
from tokred.core.folders import check_folder
from tokred.core.method import Method
from tokred.core.registry import methods as registered
from tokred.core.settings import parse_setting
from tokred.tuning import words
from tokred.tuning.engine import Engine, stage_of
from tokred.tuning.finals import Finalist, Finals, fits, pareto
from tokred.tuning.goal import Goal, goal
from tokred.tuning.judge import Judge, Memo, Trial, lost
from tokred.tuning.result import Tuned
from tokred.tuning.samplers import sampler
from tokred.tuning.search import Search
from tokred.tuning.space import Base, Rejected, base_of
from tokred.tuning.speed import Clock, ratio

USUAL = {
    "block": ("tome", "pitome", "tofu", "evit", "downsample"),
    "cache": ("snapkv window=16", "expected_attention", "keydiff"),
    "attention": ("tomesd", "keymerge"),
    "projector": ("divprune", "visionzip"),
    "layer": ("fastv",),
}
RANDOM = {
    "block": "random", "cache": "random_evict", "attention": "random_latent_prune", "projector": "random_visual",
}  # fmt: skip
COUNTED = 256  # steps of an amount in tokens, where those of the model are not counted beforehand
FRONT = (0.5, 0.75, 1.25)  # of the way from the unpatched model's speed to the goal's


def tune(
    model: Any,
    data: Any,
    metric: Metric | None = None,
    *,
    speedup: float | None = None,
    loss: float | None = None,
    memory: float | None = None,
    methods: str | Sequence[str] | None = None,
    trials: int = 150,
    samples: int = 400,
    search: Literal["auto", "greedy", "optuna"] = "auto",
    seed: int = 0,
    out: str | Path | None = None,
    run: Run = "auto",
    better: Better = "higher",
    rounds: int = 15,
    front: bool = True,
    device: torch.device | str | None = None,
    name: str | None = None,
    progress: bool = True,
    tokenizer: Any = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
) -> Tuned:
    """Search for the setting that suits a model, on the user's data and this machine; the model is left as it was.

    Give one goal. Speeds are measured in turns with the unpatched model; a few forwards of each method tell how fast
    its other settings are. Some of the samples are searched on, and what is reported was measured on the others.

    Args:
        model: an encoder, or a language model of transformers; unpatched. As for :func:`tokred.benchmark`.
        data: an iterable of batches, read once; as for :func:`tokred.benchmark`. A thousand samples are plenty.
        metric: a name, or a function of ``(output, batch)``; as for :func:`tokred.benchmark`.
        speedup: times as fast as the unpatched model, at least; of such settings the one that loses least.
        loss: quality that may be lost, in the metric's units (0.01 is a point of accuracy; of perplexity the share that
            it may rise); of such settings the fastest.
        memory: share of the bytes of the cache that may be held, for policies of caches; of such settings the one that
            loses least.
        methods: those to search among, each with any parameters but its amount: ``["tome", "tome metric=x"]``. None:
            some usual ones of the model's stage.
        trials: settings to try at most.
        samples: to search on at most; never more than half.
        search: ``"optuna"`` draws shapes of schedules by Optuna, ``"greedy"`` by chance; both go on from the best by
            moves. ``"auto"``: Optuna where it is installed.
        seed: of the division of the samples, and of the search.
        out: a folder where everything that is measured is kept; the same search goes on from there.
        run: how the model runs on a batch, as for :func:`tokred.benchmark`: ``"auto"``, or a kind of run, or a function
            of ``(model, batch)``.
        better: ``"higher"`` or ``"lower"`` values of a metric of one's own.
        rounds: times that finalists are timed in turns.
        front: measure the chosen shape and the constant one at other speeds too.
        device: where to search; the model goes there and back. None: where it is.
        name: of the model, in words. None: its configuration's, or its class's.
        progress: lines on standard error.
        tokenizer, max_new_tokens, batch_size: as for :func:`tokred.benchmark`.

    Returns:
        The setting, with the held-out table and reasons: see :class:`~tokred.tuning.result.Tuned`. After an interrupt
        from the keyboard, the best so far.

    Raises:
        TypeError, ValueError: there is no goal or more than one, the goal is out of reach, an argument is wrong, there
            are too few samples, or the metric returns no number.
        UnsupportedModelError: the model is of no family that the methods' stages know.
        UnknownMethodError: there is no such method.
        ImportError: Optuna is asked for and not installed.
    """
    wanted = goal(speedup, loss, memory)
    modules = feeds.modules(model)
    for what, value in (("trials", trials), ("samples", samples), ("rounds", rounds)):
        check_count(value, what, 1)
    check_choice(search, "search", ("auto", "greedy", "optuna"))
    feeds.check(run)
    texts = None if methods is None else [methods] if isinstance(methods, str) else list(methods)
    stage = stage_of(model, _stages(model, texts))
    before = api.patched(feeds.target(model, [stage]))
    if before:
        raise ValueError(f"the model is already patched with {before[0]!r}; call tokred.remove(model) first")
    if wanted.kind == "memory" and stage != "cache":
        raise ValueError("memory is the share of a cache's bytes, and these methods have none: give speedup= or loss=")
    drawn = sampler(search, seed)
    if out is not None:
        check_folder(out)
    with prepared(modules, device) as place:
        given: dict[str, Any] = {"count": samples, "seed": seed, "run": run, "better": better}
        options = feeds.Options(tokenizer, max_new_tokens)
        engine = Engine(model, stage, data, metric, place, **given, options=options, batch_size=batch_size)
        weights = feeds.fingerprint(x for one in modules for x in (*one.parameters(), *one.buffers()))
        classes = [registered.get(parse_setting(text)[0]) for text in texts or USUAL[stage]]
        codes = f"{model_of(modules)} {code_of(type(model), *classes)} {code_of(engine.score.own)}"
        what = f"{engine.feed.name} {engine.feed.settings} {engine.score.name} {engine.score.better} {codes}"
        memo = Memo(None if out is None else Path(out), f"{weights} {engine.prints} {what} {place} {samples} {seed}")
        judge = Judge(engine, memo)
        clock = Clock(engine, lambda key, found: _timed(engine, memo, key, found))
        with engine.feed.around(model):
            bases = _bases(engine, clock, wanted, texts or list(USUAL[stage]), texts is not None, progress)
            _check_reach(clock, bases, wanted)
            random = _random(engine, clock, wanted, bases)
            found = Search(judge, clock, bases, wanted, trials, drawn, seed, _teller(progress, trials))
            found.go()
            return _finished(found, random, rounds, name or name_of(model), front)


def _stages(model: Any, texts: list[str] | None) -> list[str]:
    """The stages to look for the model at: of the first named method, or else those with usual methods.

    Raises:
        TypeError, UnknownMethodError: ``texts`` are no names of methods.
    """
    if texts is None:
        return [*USUAL] if not hasattr(model, "generate") else ["cache", *(s for s in USUAL if s != "cache")]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"methods must be names such as ['tome', 'tome metric=x'], got {texts!r}")
    return [registered.get(parse_setting(texts[0])[0]).stage]


def _timed(engine: Engine, memo: Memo, key: str, methods: Sequence[Method]) -> list[float]:
    """Shares of the unpatched model's time, measured or remembered."""
    key = f"{key} {len(methods)}"
    known = memo.get("timed", key)
    if known is None:
        seconds = engine.times(methods, 7, seed=engine.seed)
        known = [ratio(seconds, arm) for arm in range(1, len(seconds))]
        memo.put("timed", key, known)
    return list(known)


def _size(engine: Engine) -> tuple[int, int]:
    """Depth of the model, and tokens that may be removed; zeros at stages whose methods have no schedule to search."""
    if engine.stage == "cache":
        report = engine.report(api.make("streaming_llm", budget=0.9), engine.timed)
        return len(next(part for part in report.parts if part.stage == "cache").layers), 0
    if engine.stage != "block":
        return 0, COUNTED
    host: Any = adapters.find(engine.target, "block").choose("auto")
    few = engine.report(api.make("tome", r=1), engine.timed).layers
    return len(few), int(few[0].tokens_in) - host.prefix - getattr(host, "suffix", 0)


def _bases(engine: Engine, clock: Clock, wanted: Goal, texts: list[str], named: bool, progress: bool) -> list[Base]:
    """The methods that the model runs, each timed at a handful of settings.

    Raises:
        ValueError: a method that the user named is none to search, or the model runs none.
    """
    depth, free = _size(engine)
    found: list[Base] = []
    left: list[str] = []
    for text in dict.fromkeys(texts):
        try:
            base = base_of(text, depth, free)
        except Rejected:
            if named:
                raise
            continue
        try:
            clock.calibrate(base, wanted)
        except Exception as error:  # whatever the model refuses the method by
            left.append(f"{text}: {' '.join(str(error).split()) or type(error).__name__}")
            continue
        found.append(base)
        _say(progress, f"{text} runs here" if wanted.kind == "memory" else f"timed {text}")
    for line in left:
        _say(progress or named, f"left out: {line}")
    if not found:
        raise ValueError(f"the model runs none of the methods. {'; '.join(left)}")
    return found


def _random(engine: Engine, clock: Clock, wanted: Goal, bases: Sequence[Base]) -> Base | None:
    """The base of a random choice, where there is one that the model runs."""
    text = RANDOM.get(engine.stage)
    if text is None:
        return None
    known = next((base for base in bases if base.text == text), None)
    if known is not None:
        return known
    found = base_of(text, bases[0].depth, bases[0].free)
    with suppress(Exception):  # without it the table has a row less
        clock.calibrate(found, wanted)
        return found
    return None


def _check_reach(clock: Clock, bases: Sequence[Base], wanted: Goal) -> None:
    """Refuse a speed that the strongest settings do not come near.

    Raises:
        ValueError: with the fastest.
    """
    if wanted.kind != "speedup":
        return
    plans = [plan for base in bases for plan in (base.constant, *base.known())]
    fastest = max(plans, key=lambda plan: clock.speed(plan, plan.steps))
    speed = clock.speed(fastest, fastest.steps)
    if speed < 0.9 * wanted.value:
        raise ValueError(
            f"speedup={wanted.value:g} is out of reach: the strongest setting of {fastest.base.text!r}, the fastest of "
            f"{', '.join(repr(base.text) for base in bases)}, is about {speed:.2f} times as fast as the unpatched model"
        )


def _finished(search: Search, random: Base | None, rounds: int, name: str, wider: bool) -> Tuned:
    """The finals, and the result.

    Raises:
        ValueError: no setting could be brought to the goal.
    """
    engine, wanted = search.judge.engine, search.goal
    finals = Finals(search, random, rounds)
    entrants = finals.entrants()
    if not [one for one in entrants if one.role != "random"]:
        raise ValueError(f"no setting of {', '.join(repr(b.text) for b in search.bases)} could be brought to {wanted}")
    needed = finals.measure(entrants)
    best = finals.winner(entrants, needed)
    finals.level(best, entrants)
    rival = next((one for one in entrants if one.role == "constant"), None)
    rows = [finals.unpatched(), finals.row("chosen", best, rival)]
    for role in ("constant", "random"):
        one = next((one for one in entrants if one.role == role), None)
        if one is not None:
            rows.append(finals.row(role, one, rival))
    front = _front(finals, best, rival, needed) if wider else []
    met = _met(finals, best, wanted, needed)
    why = _why(search, rows, best, rival, met)
    score, tried = engine.score, len(search.tried)
    about = (name, engine.stage, score.name, score.better, tried)
    return Tuned(best.trial.method, wanted, met, rows, front, why, *about)


def _front(finals: Finals, best: Finalist, rival: Finalist | None, needed: float) -> list[dict[str, Any]]:
    """Rows at other speeds; a goal in bytes has none, and neither does a search that the user broke off."""
    if finals.search.goal.kind == "memory" or finals.search.stopped:
        return []
    levels = [1 + share * (needed - 1) for share in FRONT]
    rows = [*finals.front(best, rival or best, levels), finals.row("searched", best, None)]
    return pareto(rows, finals.engine.score.better)


def _met(finals: Finals, best: Finalist, wanted: Goal, needed: float) -> bool:
    if wanted.kind != "loss":
        return fits(best, wanted, wanted.value if wanted.kind == "speedup" else needed)
    judge = finals.search.judge
    held = judge.held(best.trial.label, best.trial.method)
    return lost(held, judge.base("held"), finals.engine.score) <= wanted.value


def _why(search: Search, rows: list[dict[str, Any]], best: Finalist, rival: Finalist | None, met: bool) -> list[str]:
    """Sentences about the choice, and why."""
    engine = search.judge.engine
    metric, better = engine.score.name, engine.score.better
    texts = ", ".join(base.text for base in search.bases)
    count = sum(len(piece.values) for piece in search.judge.base("tune"))
    stopped = " until it was interrupted" if search.stopped else ""
    tried = f"{len(search.tried)} settings of {texts} were tried on {count} samples{stopped}"
    why = [f"Chosen: {best.trial.label}. {tried}."]
    where = words.shape(best.trial.method)
    if where:
        why.append(f"{where}.")
    chosen = rows[1]
    if best is rival:
        why.append("No schedule that was tried is better than the constant one.")
    else:
        row = next((row for row in rows if row["role"] == "constant"), None)
        word = "bytes" if search.goal.kind == "memory" else "time"
        why.append(words.against(chosen, row, word, metric, better, "the best constant setting"))
    why.append(words.reached(search.goal, chosen, met, metric))
    return [sentence for sentence in why if sentence]


def _say(progress: bool, text: str) -> None:
    if progress:
        print(f"tune: {text}", file=sys.stderr, flush=True)


def _teller(progress: bool, trials: int) -> Callable[[Trial, int], None]:
    """A line for each setting that is the best so far, and for every tenth one."""
    best: list[float] = []

    def tell(trial: Trial, count: int) -> None:
        if count > trials:  # the finals' settings, which are brought to their speed
            return
        first = trial.complete and (not best or trial.loss < best[-1])
        if first:
            best.append(trial.loss)
        if first or count % 10 == 0:
            given_up = "" if trial.complete else ", given up"
            _say(progress, f"{count}/{trials} {trial.label}: {trial.loss:.4g}{given_up}, predicted {trial.speed:.2f}x")

    return tell

"""``tokred.eval.lm_eval``: lm-eval's generating tasks on a language model, dense and with policies for its cache.

All rows come from one pass: each batch of prompts is answered by the dense model and by the model with each method, in
a random order, and lm-eval scores the answers of one after the other.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tokred import adapters, api
from tokred.bench import results
from tokred.bench.entries import Entry, entries
from tokred.bench.feeds import fingerprint
from tokred.bench.intervals import paired
from tokred.core.folders import check_folder
from tokred.core.versions import release
from tokred.eval import tasks as known
from tokred.eval.answers import Answers
from tokred.eval.needed import need
from tokred.eval.table import COLUMNS, Harness

# A task of several lengths, such as RULER's, marks the samples of other lengths so.
ABSENT = -1
LEAST = (0, 4, 12)  # its index of tasks is not the one of earlier versions


def lm_eval(
    model: nn.Module | str,
    tasks: Any,
    methods: Any,
    tokenizer: Any = None,
    *,
    limit: int | float | None = None,
    batch_size: int = 8,
    baselines: bool = True,
    out: str | Path | None = None,
    include: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    name: str | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Harness:
    """Run tasks of lm-eval on a model in memory, dense and with each method; the model is afterwards as it was.

    Args:
        model: a language model of transformers, unpatched; or ``"hf:FOLDER"`` to load one.
        tasks: names of tasks, groups or tags, with commas or in a list; files; configurations; task objects. All of
            them have to generate: tasks scored by likelihoods never read the reduced cache and are refused.
        methods: as for :func:`tokred.benchmark`: ``"snapkv budget=0.25"``, objects, or lists that act together.
        tokenizer: of the model; None: the one in its folder.
        limit: samples of each task; below 1 a share of them. None: all.
        batch_size: prompts of one ``generate``, padded on the left.
        baselines: measure random eviction and a window of the newest tokens as well, of as many bytes as each method.
        out: a folder for ``lm_eval.csv`` and ``samples.jsonl``; files that are there are not overwritten. Answers are
            kept there while the run is on: the same call after an interruption asks only what was not answered.
        include: a folder with more tasks.
        metadata: for tasks that make their own data; RULER's lengths, say: ``{"max_seq_lengths": [4096]}``.
        name: of the model, for the table; None: its configuration's.
        seed: of the order of the methods.
        progress: a bar on standard error.
        options: of ``lm_eval.simple_evaluate``: ``num_fewshot``, ``apply_chat_template``, ``gen_kwargs``,
            ``bootstrap_iters``, ...

    Returns:
        The table; ``print`` it, or see :class:`~tokred.eval.table.Harness`.

    Raises:
        ImportError: lm-eval is not installed.
        TypeError, ValueError: an argument is wrong, the model is patched, or a task never reads a reduced cache.
        UnknownMethodError: there is no such method.
        UnsupportedModelError: the model's cache is of no kind that is known.
    """
    listed, wanted, manager = check(
        tasks, methods, include, {"pretrained": _folder(model, tokenizer), **(metadata or {})}
    )
    _whole(batch_size=batch_size)
    _reserved(options)
    if isinstance(model, str):
        model, tokenizer = load(model, tokenizer)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a language model of transformers or 'hf:FOLDER', got {type(model).__name__}")
    if api.patched(model):
        raise ValueError(
            f"the model is already patched with {api.patched(model)[0]!r}; call tokred.remove(model) first"
        )
    adapters.find(model, "cache")
    if out is not None:
        check_folder(out)
    loaded = _top(manager.load(listed))
    from tokred.eval.harness_model import Several

    with _in_evaluation(model):
        kept = Answers(None if out is None else Path(out), _case(model))
        several = Several(
            model, _tokenizer(model, tokenizer), wanted, batch_size=batch_size, baselines=baselines, seed=seed,
            progress=progress, kept=kept,
        )  # fmt: skip
        found = _run(several, loaded, {"limit": limit, "task_manager": manager, **options}, name or _name(model))
    if out is not None:
        paths = results.free(Path(out), ("lm_eval.csv", "samples.jsonl"))
        found.write(*paths.values())
        kept.clear()
    return found


def check(
    tasks: Any, methods: Any, include: str | Path | None = None, metadata: Mapping[str, Any] | None = None
) -> tuple[list[Any], list[Entry], Any]:
    """Tasks, methods and lm-eval's index of tasks, once it is known that all tasks read a reduced cache.

    Raises:
        ImportError, TypeError, ValueError, UnknownMethodError: as :func:`lm_eval`.
    """
    need("lm_eval", "tokred.eval.lm_eval")
    version = importlib.metadata.version("lm_eval")
    if release(version) < LEAST:
        raise ImportError(
            f"tokred.eval.lm_eval needs lm-eval {'.'.join(map(str, LEAST))} or newer, and {version} is installed: "
            "pip install 'tokred[eval]'"
        )
    listed = known.listed(tasks)
    wanted = entries(methods)
    manager = known.manager(listed, include, metadata or {})
    known.check_reading(known.leaves(listed, manager.task_index))
    return listed, wanted, manager


def load(name: str, tokenizer: Any = None, dtype: Any = "auto") -> tuple[nn.Module, Any]:
    """A language model of transformers and its tokenizer.

    Args:
        name: ``"hf:"`` and a folder or an id.
        tokenizer: None: the model's.
        dtype: of the weights; ``"auto"``: their own.

    Raises:
        ValueError: the name does not begin with ``hf:``.
        OSError: there is no such model.
    """
    transformers = need("transformers", "a model of transformers", "pip install 'tokred[transformers]'")
    if not name.startswith("hf:"):
        raise ValueError(f"model is {name!r}; a language model is written hf:FOLDER or hf:ID")
    place = name.removeprefix("hf:")
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    return model.eval(), tokenizer or transformers.AutoTokenizer.from_pretrained(place)


def _whole(**given: Any) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _reserved(options: Mapping[str, Any]) -> None:
    """Options that this function sets itself."""
    ours = {"model", "model_args", "task_manager", "log_samples", "use_cache", "device", "max_batch_size"} & set(
        options
    )
    if ours:
        raise TypeError(f"{', '.join(sorted(ours))} cannot be given: tokred.eval.lm_eval sets it for all rows alike")


def _folder(model: Any, tokenizer: Any) -> str:
    """The name that tasks which make their own data load a tokenizer by."""
    if isinstance(model, str):
        return model.removeprefix("hf:")
    return str(getattr(tokenizer, "name_or_path", "") or getattr(getattr(model, "config", None), "name_or_path", ""))


def _name(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)


def _case(model: nn.Module) -> str:
    """Name of a model's weights, and of the machine that it is measured on."""
    first = next(model.parameters())
    where = results.here(first.device, first.dtype)
    return fingerprint([fingerprint(model.parameters()), *(str(where[n]) for n in ("device", "threads", "dtype"))])


def _tokenizer(model: nn.Module, given: Any) -> Any:
    if given is not None:
        return given
    place = getattr(getattr(model, "config", None), "name_or_path", "")
    if not place:
        raise ValueError("tokenizer is None, and the model names no folder that has one: give tokenizer=")
    transformers = need("transformers", "a tokenizer", "pip install 'tokred[transformers]'")
    return transformers.AutoTokenizer.from_pretrained(place)


@contextlib.contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _top(loaded: Mapping[str, Any]) -> list[Any]:
    """Groups and tasks that stand in no other group; lm-eval takes them again, and reads no data twice."""
    groups = dict(loaded.get("groups") or {})
    inside = {child for names in (loaded.get("group_map") or {}).values() for child in names}
    return [
        *(group for name, group in groups.items() if name not in inside),
        *(task for name, task in loaded["tasks"].items() if name not in inside),
    ]


def _run(several: Any, tasks: list[Any], options: dict[str, Any], name: str) -> Harness:
    """The rows of all arms of a :class:`~tokred.eval.harness_model.Several`."""
    from lm_eval import simple_evaluate

    rows: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    dense: dict[str, Any] = {}
    position = 0
    # The list grows when the dense model's first batch has told what rivals cost as much.
    while position < len(several.arms):
        several.position = position
        one = several.arms[position]
        if one.label in several.refused:
            rows.append(_row(name, one, reason=several.refused[one.label]))
        else:
            found = simple_evaluate(model=several, tasks=tasks, batch_size=several.batch_size, **options)
            dense = dense or found
            rows += _rows(name, one, found, dense, several)
            samples += _samples(one, found, several)
        position += 1
    order = {key: i for i, key in enumerate(dict.fromkeys((r["task"], r["metric"], r["filter"]) for r in rows))}
    rows.sort(key=lambda r: order[r["task"], r["metric"], r["filter"]])
    return Harness(rows, samples, name)


def _row(model: str, one: Entry, **values: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"model": model, "task": "", "metric": "", "filter": "", "reason": ""}
    return row | {"method": one.name, "setting": one.setting, "baseline": one.baseline} | values


def _number(value: Any) -> float | None:
    """A number that can be compared, or None."""
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    return None


def _rows(model: str, one: Entry, found: Any, dense: Any, several: Any) -> list[dict[str, Any]]:
    """The rows of one method: one for each task or group, metric and filter."""
    rows = []
    for task, scores in found["results"].items():
        better = found.get("higher_is_better", {}).get(task) or {}
        for key, value in scores.items():
            metric, comma, filtered = key.partition(",")
            score = _number(value)
            if not comma or metric.endswith("_stderr") or score is None:
                continue
            if metric.isdigit() and score == ABSENT:
                continue
            row = _row(model, one, task=task, metric=metric, filter=filtered, score=score)
            row["stderr"] = _number(scores.get(f"{metric}_stderr,{filtered}"))
            row["samples"] = scores.get("sample_len")
            high = better.get(metric)
            row["better"] = "" if high is None else "higher" if high else "lower"
            row |= _difference(task, metric, filtered, found, dense) | several.measured(one.label, task)
            rows.append(row)
    return rows


def _difference(task: str, metric: str, filtered: str, found: Any, dense: Any) -> dict[str, float | None]:
    """The difference to the dense model: paired over samples where these have values, else of the scores alone."""
    mine, base = (_values(x["samples"].get(task, ()), metric, filtered) for x in (found, dense))
    both = [key for key in mine if key in base]
    if both and len(both) == len(mine) == len(base):
        one = paired([mine[k] for k in both], [base[k] for k in both], [1.0] * len(both))
        return {"difference": one.value, "difference_low": one.low, "difference_high": one.high}
    score, other = (_number(x["results"][task].get(f"{metric},{filtered}")) for x in (found, dense))
    return {"difference": None if score is None or other is None else score - other}


def _values(logged: Any, metric: str, filtered: str) -> dict[Any, float]:
    """The metric of each sample; empty if one has no number."""
    found = {}
    for one in logged:
        if one["filter"] != filtered or (metric.isdigit() and one.get(metric) == ABSENT):
            continue
        value = _number(one.get(metric))
        if value is None:
            return {}
        found[one["doc_id"]] = value
    return found


def _samples(one: Entry, found: Any, several: Any) -> list[dict[str, Any]]:
    rows = []
    for task, logged in found["samples"].items():
        lengths: dict[Any, list[float]] = defaultdict(list)
        for doc, length in several.lengths(one.label, task):
            lengths[doc].append(length)
        for sample in logged:
            values = {metric: sample.get(metric) for metric in sample["metrics"]}
            rows.append({
                "task": task, "sample": sample["doc_id"], "filter": sample["filter"], "method": one.label,
                "target": sample["target"], "answers": sample["filtered_resps"],
                "length": sum(lengths[sample["doc_id"]]) / max(1, len(lengths[sample["doc_id"]])), **values,
            })  # fmt: skip
    return rows

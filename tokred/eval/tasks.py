"""Tasks of lm-eval: which of them read a cache that a policy has reduced, told from their files alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Scored in one forward over prompt and answer, at whose end a policy evicts: nothing is ever read from what it left.
LIKELIHOOD = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")
READING = "generate_until"
EXAMPLES = "ruler, longbench, gsm8k, babilong, aime"


def listed(tasks: Any) -> list[Any]:
    """Tasks as a list: names may come in one text with commas.

    Raises:
        TypeError, ValueError: none is named, or something else is.
    """
    given = tasks if isinstance(tasks, list | tuple) else [tasks]
    found: list[Any] = []
    for one in given:
        found += [part.strip() for part in one.split(",") if part.strip()] if isinstance(one, str) else [one]
    if not found:
        raise ValueError(f"tasks names no task: give one of lm-eval's, such as {EXAMPLES}")
    return found


def manager(tasks: Sequence[Any], include: str | Path | None, metadata: Mapping[str, Any]) -> Any:
    """lm-eval's ``TaskManager``; its own tasks are read, which takes seconds, only where one of them is named."""
    from lm_eval.tasks import TaskManager

    where = None if include is None else str(include)
    own = TaskManager(include_path=where, include_defaults=False, metadata=dict(metadata))
    try:
        leaves(tasks, own.task_index)
    except ValueError:
        return TaskManager(include_path=where, metadata=dict(metadata))
    return own


def leaves(tasks: Sequence[Any], index: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """Every single task in ``tasks`` with its ``output_type``, which is None where only its code could tell.

    Raises:
        ValueError: there is no such task, group or tag.
        TypeError: an item is neither name, file, configuration nor task object.
    """
    return [leaf for one in tasks for leaf in _leaves(one, index, {})]


def _leaves(one: Any, index: Mapping[str, Any], over: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    if isinstance(one, Mapping):
        yield from _configured(one, None, index, over)
    elif isinstance(one, str) and one in index:
        entry = index[one]
        if entry.kind.name == "TAG":
            for name in sorted(entry.tags):
                yield from _leaves(name, index, over)
        else:
            yield from _configured(entry.cfg, entry.yaml_path, index, over)
    elif isinstance(one, str) and Path(one).is_file():
        from lm_eval.tasks._yaml_loader import load_yaml

        yield from _configured(load_yaml(one, resolve_func=False), Path(one), index, over)
    elif isinstance(one, str):
        near = difflib.get_close_matches(one, list(index), n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`lm_eval ls tasks` lists them"
        raise ValueError(f"tasks names {one!r}, and lm-eval has no such task, group or tag; {hint}")
    elif hasattr(one, "get_all_tasks"):
        for task in one.get_all_tasks():
            yield task.task_name, task.OUTPUT_TYPE
    elif hasattr(one, "OUTPUT_TYPE"):
        yield one.task_name, one.OUTPUT_TYPE
    else:
        raise TypeError(f"tasks holds names, files, configurations or tasks of lm-eval, got {type(one).__name__}")


def _configured(
    config: Mapping[str, Any], path: Path | None, index: Mapping[str, Any], over: Mapping[str, Any]
) -> Iterator[tuple[str, str | None]]:
    """The tasks of one configuration; ``over`` are what the groups around it set."""
    children = config.get("task")
    if "group" in config and not isinstance(children, list) and config["group"] in index:
        yield from _leaves(config["group"], index, {**over, **config})
    elif isinstance(children, list):
        kept = {key: value for key, value in {**config, **over}.items() if key == "output_type"}
        for child in children:
            yield from _leaves(child, index, kept)
    elif "class" in config:
        yield str(children), _of_class(config, path)
    elif isinstance(children, str) and children in index and path is None and "dataset_path" not in config:
        # A reference to a known task, some of whose settings are others.
        yield from _leaves(children, index, {**over, **config})
    else:
        yield str(children), str(over.get("output_type") or config.get("output_type") or READING)


def _of_class(config: Mapping[str, Any], path: Path | None) -> str | None:
    """The type that a task of a class of its own says; None where it says nothing, or cannot be imported."""
    kind = config["class"]
    if isinstance(kind, str) and path is not None:
        from lm_eval.tasks._yaml_loader import load_yaml

        try:
            kind = load_yaml(path, resolve_func=True)["class"]
        except ImportError:
            return None
    found = getattr(kind, "OUTPUT_TYPE", None)
    if found is None:
        # Such classes make their requests themselves; the types stand in that function, as words.
        code = getattr(getattr(kind, "construct_requests", None), "__code__", None)
        said = {word for word in getattr(code, "co_consts", ()) if word in (READING, *LIKELIHOOD)}
        return READING if said == {READING} else None
    return str(found)


def check_reading(found: Sequence[tuple[str, str | None]]) -> None:
    """Every task generates.

    Raises:
        ValueError: some do not; the message names them, says why, and which do.
    """
    wrong = {name: kind for name, kind in found if kind != READING}
    if not wrong:
        return
    unsaid = "of several types, or of none that it names"
    names = ", ".join(f"{name!r} ({kind or unsaid})" for name, kind in list(wrong.items())[:6])
    more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
    rest = len(found) - len(wrong)
    left = f" The other {rest} of the tasks would do." if rest else ""
    raise ValueError(
        f"tasks holds {names}{more}: {', '.join(LIKELIHOOD)} are scored in one forward, which never reads the reduced "
        f"cache, so that every policy would look free of loss. Only tasks of output_type {READING} count, such as "
        f"{EXAMPLES}.{left}"
    )

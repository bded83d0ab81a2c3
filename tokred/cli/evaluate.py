"""``tokred eval``: the harnesses of others, on models with fewer tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tokred.cli.console import refusing, set_threads, written
from tokred.cli.options import (
    Device,
    Json,
    Methods,
    Model,
    OldModel,
    Threads,
    check_device,
    one_model,
    settings,
    type_of,
)

evaluate_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="The harnesses of others, on models with fewer tokens."
)


@evaluate_app.callback()
def several() -> None:
    """The harnesses of others, on models with fewer tokens.

    \b
    Examples:
      tokred eval lm-eval hf:models/SmolLM2-360M -m "snapkv budget=0.25" --tasks gsm8k --limit 100
    """


@evaluate_app.command("lm-eval", short_help="Generating tasks of lm-eval on a language model.")
def lm_eval_command(
    model: Model = None,
    methods: Methods = None,
    tasks: Annotated[str, typer.Option(help="Tasks, groups, tags or YAML files, with commas.")] = "",
    old: OldModel = None,
    limit: Annotated[float | None, typer.Option(min=0, help="Samples of each task; below 1 a share.")] = None,
    batch: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts of one generate.")] = 8,
    fewshot: Annotated[int | None, typer.Option("--num-fewshot", min=0, help="Examples in each prompt.")] = None,
    chat: Annotated[bool, typer.Option("--apply-chat-template", help="Write prompts as the model's chat.")] = False,
    baselines: Annotated[bool, typer.Option(help="Random eviction and a window, of as many bytes.")] = True,
    include: Annotated[Path | None, typer.Option("--include-path", help="A folder with more tasks.")] = None,
    metadata: Annotated[str, typer.Option(help="JSON for tasks that make their data, such as RULER's.")] = "{}",
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: the weights' own.")] = "auto",
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of the order of the methods.")] = 0,
    folder: Annotated[Path | None, typer.Option("--out", help="A folder for lm_eval.csv and samples.jsonl.")] = None,
    as_json: Json = False,
) -> None:
    """Run generating tasks of lm-eval on a language model, dense and with each method, beside each other.

    Every batch of prompts is answered by the dense model and with each method in one process. Tasks that are scored by
    likelihoods never read a reduced cache: they are refused before anything is loaded.

    \b
    Examples:
      tokred eval lm-eval hf:models/SmolLM2-360M -m "snapkv budget=0.25" --tasks gsm8k --limit 100 --out results
      tokred eval lm-eval hf:models/Qwen3-4B -m "snapkv budget=0.25" -m "h2o budget=0.25" --device cuda \\
                  --tasks ruler,longbench --metadata '{"max_seq_lengths": [4096]}' --json
      tokred eval lm-eval hf:models/SmolLM2-360M -m "kvzip budget=0.5" --tasks mine.yaml --include-path my_tasks
    """
    from tokred.eval import language

    set_threads(threads)
    with refusing():
        name = one_model(model, old, None)
        if name is None:
            raise ValueError("no model is named: hf: and a folder or an id")
        about = _object(metadata)
        wanted = [parts if len(parts) > 1 else parts[0] for parts in settings(methods, placed=True)]
        language.check(tasks, wanted, include)
        place, kind = check_device(device), dtype if dtype == "auto" else type_of(dtype)
        loaded, tokenizer = language.load(name, dtype=kind)
        loaded.to(place)
    found = language.lm_eval(
        loaded, tasks, wanted, tokenizer, limit=limit, batch_size=batch, baselines=baselines, out=folder,
        include=include, metadata={"pretrained": name.removeprefix("hf:"), **about}, name=name, seed=seed,
        num_fewshot=fewshot, apply_chat_template=chat,
    )  # fmt: skip
    if as_json:
        print(json.dumps({"model": name, "files": [str(path) for path in found.paths], "rows": found.rows}, indent=2))
    else:
        print(found)
        if found.paths:
            written(found.paths)
    reasons = dict.fromkeys(row["reason"] for row in found.rows if row["reason"])
    for reason in reasons:
        print(f"tokred: not measured: {reason}", file=sys.stderr)
    if len({(row["method"], row["setting"]) for row in found.rows if not row["reason"]}) < 2:
        raise typer.Exit(1)


def _object(text: str) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        ValueError: the text is none.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--metadata is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f'--metadata is an object such as {{"max_seq_lengths": [4096]}}, got {text}')
    return found

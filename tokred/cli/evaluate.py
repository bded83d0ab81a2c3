"""``tokred eval``: the harnesses of others, on models with fewer tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tokred.cli.console import refusing, written

evaluate_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="The harnesses of others, on models with fewer tokens."
)

LM_EVAL = """Run generating tasks of lm-eval on a language model, dense and with each method, beside each other.

Every batch of prompts is answered by the dense model and with each method in one process. Tasks that are scored by
likelihoods never read a reduced cache: they are refused before anything is loaded.

\b
Examples:
  tokred eval lm-eval --model hf:models/SmolLM2-360M -m "snapkv budget=0.25" --tasks gsm8k --limit 100
  tokred eval lm-eval --model hf:models/Qwen3-4B -m "snapkv budget=0.25" -m "h2o budget=0.25" \\
              --tasks ruler,longbench --metadata '{"max_seq_lengths": [4096]}' --json
  tokred eval lm-eval --model hf:models/SmolLM2-360M -m "kvzip budget=0.5" --tasks my_task.yaml --out results
"""


def command() -> None:
    """Keeps ``lm-eval`` the name of a command, where it is the only one."""


evaluate_app.callback()(command)


@evaluate_app.command("lm-eval", help=LM_EVAL, short_help="Generating tasks of lm-eval on a language model.")
def lm_eval_command(
    model: Annotated[str, typer.Option("--model", help="hf: and a folder or an id.")],
    methods: Annotated[list[str], typer.Option("--method", "-m", help="A method, such as 'snapkv budget=0.25'.")],
    tasks: Annotated[str, typer.Option(help="Tasks, groups, tags or YAML files, with commas.")],
    limit: Annotated[float | None, typer.Option(min=0, help="Samples of each task; below 1 a share.")] = None,
    batch: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts of one generate.")] = 8,
    fewshot: Annotated[int | None, typer.Option("--num-fewshot", min=0, help="Examples in each prompt.")] = None,
    chat: Annotated[bool, typer.Option("--apply-chat-template", help="Write prompts as the model's chat.")] = False,
    baselines: Annotated[bool, typer.Option(help="Random eviction and a window, of as many bytes.")] = True,
    include: Annotated[Path | None, typer.Option("--include-path", help="A folder with more tasks.")] = None,
    metadata: Annotated[str, typer.Option(help="JSON for tasks that make their data, such as RULER's.")] = "{}",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: cuda where there is one]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the methods.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The rows as JSON on standard output.")] = False,
    folder: Annotated[Path | None, typer.Option("--out", help="A folder for lm_eval.csv and samples.jsonl.")] = None,
) -> None:
    """Generating tasks of lm-eval on a language model."""
    from tokred.eval import language

    options = {"limit": limit, "num_fewshot": fewshot, "apply_chat_template": chat}
    with refusing():
        try:
            about = json.loads(metadata)
        except json.JSONDecodeError as error:
            raise ValueError(f"--metadata is not JSON: {error}") from error
        if not isinstance(about, dict):
            raise ValueError(f'--metadata is an object such as {{"max_seq_lengths": [4096]}}, got {metadata}')
        language.check(tasks, methods, include)
        loaded, tokenizer = language.load(model, device=device)
    found = language.lm_eval(
        loaded, tasks, methods, tokenizer, batch_size=batch, baselines=baselines, out=folder, include=include,
        metadata={"pretrained": model.removeprefix("hf:"), **about}, name=model, seed=seed, **options,
    )  # fmt: skip
    print(json.dumps(found.rows, default=str) if as_json else found)
    if found.paths and not as_json:
        written(found.paths)
    if any(row["reason"] for row in found.rows):
        for reason in dict.fromkeys(row["reason"] for row in found.rows if row["reason"]):
            print(f"tokred: not measured: {reason}", file=sys.stderr)

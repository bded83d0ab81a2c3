"""Whisper tiny.en on real recordings with fewer audio tokens: word error against the transcripts of the unmerged model.

    python -m benchmarks.zoo.fetch whisper speech
    python -m benchmarks encoder/audio --threads 1 --out benchmarks/results/encoder.csv --overwrite
    python -m benchmarks encoder/audio --quick

There are no written transcripts of these prompts, so the unmerged model's are the reference: an error of zero says that
nothing was changed, not that every word is right. A setting is a method's name and its parameters; ``expose=last``
gives the decoder the full 1,500 tokens back, instead of those that are left.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokred
from benchmarks.engine import Record, measured, threads
from benchmarks.saving import save, saving
from benchmarks.zoo import carriers, data, whisper
from tokred.bench import texts
from tokred.bench.entries import entry
from tokred.bench.outputs import Generated

# Prompts of at least a sentence.
PROMPTS = (
    "demo-congrats", "demo-instruct", "demo-moreinfo", "demo-thanks", "demo-abouttotry", "demo-echotest",
    "demo-enterkeywords", "demo-nogo", "vm-opts", "vm-intro", "vm-options", "vm-msginstruct", "privacy-prompt",
    "priv-recordintro", "conf-usermenu", "conf-adminmenu", "tt-somethingwrong", "ss-noservice", "pbx-invalid",
    "cannot-complete-as-dialed", "queue-periodic-announce", "agent-newlocation", "dir-intro", "screen-callee-options",
)  # fmt: skip
SETTINGS = (
    "tome r=100", "tome r=200", "tome r=300", "tome r=350", "tome r=300 expose=last", "tome r=300 prop_attn=False",
    "random r=200", "random r=300", "random_prune r=200",
)  # fmt: skip


SHAPE = (1, 80, 3000)
LIMIT = 200  # most tokens of a transcript


def unchanged(output: Generated, batch: Any, dense: Generated) -> Tensor:
    """``(B,)`` 1.0 where the transcript has the unpatched model's words."""
    assert output.texts is not None  # there is a tokenizer
    assert dense.texts is not None
    pairs = zip(output.texts, dense.texts, strict=True)
    return torch.tensor([float(texts.words(a) == texts.words(b)) for a, b in pairs])


def measure(settings: Sequence[str], names: Sequence[str], rounds: int, values: Path | None = None) -> list[Record]:
    """One row a setting, the unpatched model first."""
    model, tokenizer, features = whisper.load()
    heard = [features(one.audio, sampling_rate=whisper.RATE, return_tensors="pt").data for one in data.speech(names)]
    source = {"name": "whisper-tiny.en", "data_from": carriers.cited("whisper", "speech"), "values": values}
    metrics = {"word_error": "wer", "unchanged": unchanged}
    rows = measured(
        model, settings, heard, metrics, run="generate", tokenizer=tokenizer, max_new_tokens=LIMIT, rounds=rounds,
        more={"prompts": len(heard)}, **source,
    )  # fmt: skip
    whole = tokred.flops(model, None, SHAPE).macs
    for row in rows:
        method = entry(f"{row['method']} {row['setting']}".strip()).methods
        macs = tokred.flops(model, method[0], SHAPE).macs if method else whole
        row |= {"gmacs": macs / 1e9, "gmacs_share": macs / whole}
    return rows


def main() -> None:
    """Measure, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", action="append", help="such as 'tome r=200' (repeatable)")
    parser.add_argument("--prompt", action="append", help="name of a recording (repeatable)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each pair is at least timed")
    parser.add_argument("--quick", action="store_true", help="two recordings, two settings")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--values", type=Path, help="folder of tables by which a run that was broken off goes on")
    saving(parser)
    args = parser.parse_args()
    threads(args.threads)
    chosen, names = args.setting or SETTINGS, args.prompt or PROMPTS
    if args.quick:
        chosen, names = ("tome r=300", "tome r=300 expose=last"), names[:2]
    save(measure(chosen, names, args.rounds, args.values), "audio", args)


if __name__ == "__main__":
    main()

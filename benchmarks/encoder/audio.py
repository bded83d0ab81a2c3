"""Whisper tiny.en on real recordings with fewer audio tokens: word error against the transcripts of the unmerged model.

    python -m benchmarks.zoo.fetch whisper speech
    python -m benchmarks encoder/audio --out benchmarks/results/encoder.csv --overwrite

There are no written transcripts of these prompts, so the unmerged model's are the reference: an error of zero says that
nothing was changed, not that every word is right. A setting is a method's name and its parameters; ``expose=last``
gives the decoder the full 1,500 tokens back, instead of those that are left.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

import torch

import tokred
from benchmarks.saving import save, saving
from benchmarks.zoo import data, whisper
from tokred.bench import results, timing
from tokred.core.settings import parse_setting

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


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower())


def word_errors(reference: Sequence[str], answer: Sequence[str]) -> int:
    """Fewest words to insert, delete or exchange."""
    row = list(range(len(answer) + 1))
    for i, expected in enumerate(reference, 1):
        before, row[0] = row[0], i
        for j, found in enumerate(answer, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (expected != found))
    return row[-1]


def read_setting(text: str) -> tuple[str, dict[str, Any], str]:
    """Method, its parameters, and what is exposed."""
    name, parameters = parse_setting(text)
    return name, parameters, parameters.pop("expose", "auto")


@torch.inference_mode()
def encoder_seconds(model: Any, rounds: int) -> list[float]:
    """Seconds of one recording through the encoder."""
    x = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    return [timing.seconds_of(lambda: model.get_encoder()(x))[0] for _ in range(rounds)]


def measure(settings: Sequence[str], names: Sequence[str], rounds: int, show: bool) -> list[dict[str, Any]]:
    """One row a setting, the unmerged model first."""
    model, tokenizer, features = whisper.load()
    recordings = data.speech(names)

    def transcripts() -> list[list[str]]:
        return [words(whisper.transcribe(model, tokenizer, features, r.audio)) for r in recordings]

    reference, whole = transcripts(), tokred.flops(model, None, (1, 80, 3000)).macs
    total = sum(map(len, reference))
    rows = []
    for text in ("unpatched", *settings):
        macs = whole
        if text != "unpatched":
            name, parameters, expose = read_setting(text)
            tokred.apply(model, name, expose=expose, **parameters)  # type: ignore[arg-type]
            macs = tokred.flops(model, name, (1, 80, 3000), **parameters).macs
        answers = reference if text == "unpatched" else transcripts()
        errors = [word_errors(a, b) for a, b in zip(reference, answers, strict=True)]
        for recording, a, b, wrong in zip(recordings, reference, answers, errors, strict=True):
            if show and wrong:
                print(f"{text}, {recording.name}: {wrong} of {len(a)} words\n  - {' '.join(a)}\n  + {' '.join(b)}")
        tokens = 1500 if text == "unpatched" else tokred.report(model).layers[-1].tokens_out
        name, _, setting = text.partition(" ")
        row: dict[str, Any] = {"model": "whisper-tiny.en", "method": name, "setting": setting, "tokens_out": tokens}
        row |= {"gmacs": macs / 1e9, "gmacs_share": macs / whole, "prompts": len(recordings), "words": total}
        row |= {"word_error": sum(errors) / total, "rounds": rounds, **results.here("cpu", torch.float32)}
        row |= results.share("unchanged", sum(e == 0 for e in errors), len(recordings))
        row |= results.spread("seconds", encoder_seconds(model, rounds))
        rows.append(row)
        print(
            f"{text:28s} {tokens:5d} tokens  {row['gmacs_share']:6.1%} of the encoder's work  "
            f"{row['seconds'] * 1e3:6.0f} ms  word error {row['word_error']:6.2%}  "
            f"{sum(e == 0 for e in errors)} of {len(recordings)} unchanged",
            flush=True,
        )
    tokred.remove(model)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", action="append", help="such as 'tome r=200' (repeatable)")
    parser.add_argument("--prompt", action="append", help="name of a recording (repeatable)")
    parser.add_argument("--rounds", type=int, default=10, help="timed runs of the encoder")
    parser.add_argument("--show", action="store_true", help="print the transcripts that changed")
    saving(parser)
    args = parser.parse_args()
    save(measure(args.setting or SETTINGS, args.prompt or PROMPTS, args.rounds, args.show), "audio", args)


if __name__ == "__main__":
    main()

"""MiniLM sentence embeddings with fewer tokens: nearness to the unpatched ones, and a linear probe on topics.

    python -m benchmarks.zoo.fetch minilm fortunes
    python -m benchmarks encoder/text --out benchmarks/results/encoder.csv --overwrite

A probe (scikit-learn's ridge regression on topics) is fitted to embeddings of the unpatched model and read with those
of the patched one: what is lost is the encoder's doing. Texts of like lengths are in one batch, padded; work is
counted at the tokens of each text alone. Nothing was trained, so LTP's thresholds rise linearly, as before learning.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.engine import Record, measured, threads
from benchmarks.saving import save, saving
from benchmarks.zoo import carriers, data, minilm
from tokred.adapters import find
from tokred.adapters.encoder.host import shared_of
from tokred.bench import probe
from tokred.bench.entries import entry

SETTINGS = (
    "spatten keep=0.5 first=1", "spatten keep=0.25 first=1", "spatten keep=0.1 first=1",
    "spatten keep=0.5 first=1 heads=8", "spatten keep=1.0 first=1 heads=6", "ltp theta_final=0.01",
    "ltp theta_final=0.02", "ltp theta_final=0.04", "random_prune r=5", "random r=5", "tome r=5", "pitome ratio=0.75",
)  # fmt: skip
BATCH = 32
Batch = dict[str, Any]


def embedding(model: Any, batch: Batch) -> Tensor:
    """Unit vectors ``(B, 384)``: the mean over a text's tokens, as the model was trained."""
    mask = batch["attention_mask"][..., None]
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def cosine(output: Tensor, batch: Batch) -> Tensor:
    """``(B,)``, with the unpatched model's."""
    return (output * batch["reference"]).sum(1)


def batches(model: Any, tokenizer: Any, texts: Sequence[str], labels: Tensor) -> list[Batch]:
    """Texts of like lengths together, with their topics and the unpatched model's embeddings."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = []
    for part in (order[i : i + BATCH] for i in range(0, len(order), BATCH)):
        chosen = [texts[i] for i in part]
        x = dict(tokenizer(chosen, padding=True, truncation=True, max_length=256, return_tensors="pt"))
        with torch.inference_mode():
            found.append({**x, "topic": labels[part], "reference": embedding(model, x)})
    return found


@torch.inference_mode()
def work(model: Any, setting: str, read: Sequence[Batch]) -> int:
    """Multiply-adds of the layers at each text's own tokens: what a batch's padding would hide."""
    host, total = find(model), 0
    with entry(setting or "unpatched").applied(model):
        for batch in read:
            embedding(model, batch)
            shared = [found[2] for found in shared_of(model)]
            before = batch["attention_mask"].sum(1).tolist()
            for layer, (_, block) in enumerate(host.blocks):
                state = shared[0].records[layer].state if shared else None
                after = before
                if state is not None and state.representative is not None:
                    mask = torch.ones_like(state.representative) if state.mask is None else state.mask
                    after = mask.sum(1).tolist()
                cost = host.cost(block)
                total += sum(cost.macs(b, a, False) for b, a in zip(before, after, strict=True))
                before = after
    return total


def measure(settings: Sequence[str], train: int, test: int, rounds: int, values: Path | None = None) -> list[Record]:
    """One row a setting, the unpatched model first."""
    model, tokenizer = minilm.load()
    found = data.fortunes()
    topics = sorted(set(found.topics))
    chosen = torch.randperm(len(found.texts), generator=torch.Generator().manual_seed(0)).tolist()[: train + test]
    texts = [found.texts[i] for i in chosen]
    labels = torch.tensor([topics.index(found.topics[i]) for i in chosen])
    seen = batches(model, tokenizer, texts[:train], labels[:train])
    fitted = probe.linear_models().RidgeClassifier(alpha=0.5)
    fitted.fit(*(torch.cat([b[k] for b in seen]).double().numpy() for k in ("reference", "topic")))

    def accuracy(output: Tensor, batch: Batch) -> Tensor:
        return (torch.from_numpy(fitted.predict(output.double().numpy())) == batch["topic"]).double()

    read = batches(model, tokenizer, texts[train:], labels[train:])
    rows = measured(
        model,
        settings,
        read,
        {"cosine": cosine, "accuracy": accuracy},
        run=embedding,
        name="all-MiniLM-L6-v2",
        data_from=carriers.cited("minilm", "fortunes"),
        rounds=rounds,
        values=values,
    )
    whole = work(model, "", read)
    for row in rows:
        row["gmacs_share"] = work(model, f"{row['method']} {row['setting']}".strip(), read) / whole
    return rows


def main() -> None:
    """Measure, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", action="append", help="such as 'tome r=2' (repeatable)")
    parser.add_argument("--train", type=int, default=800, help="texts that the probe is fitted to")
    parser.add_argument("--test", type=int, default=250, help="texts that are read")
    parser.add_argument("--rounds", type=int, default=8, help="times that each pair is at least timed")
    parser.add_argument("--values", type=Path, help="folder of tables by which a run that was broken off goes on")
    parser.add_argument("--threads", type=int, help="threads of torch")
    saving(parser)
    args = parser.parse_args()
    threads(args.threads)
    save(measure(args.setting or SETTINGS, args.train, args.test, args.rounds, args.values), "text", args)


if __name__ == "__main__":
    main()

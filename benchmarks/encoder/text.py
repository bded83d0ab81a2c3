"""MiniLM sentence embeddings with fewer tokens: nearness to the unpatched ones, and a linear probe on topics.

    python -m benchmarks.zoo.fetch minilm fortunes
    python -m benchmarks encoder/text --out benchmarks/results/encoder.csv --overwrite

A probe (scikit-learn's ridge regression on topics) is fitted to embeddings of the unpatched model and read with those
of the patched one: what is lost is the encoder's doing. Texts of different lengths are in one batch, padded; work is
counted at the tokens of each text alone. Nothing was trained, so LTP's thresholds rise linearly, as before any
learning.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import tokred
from benchmarks.saving import save, saving
from benchmarks.zoo import data, minilm
from tokred.adapters import find
from tokred.adapters.encoder.host import shared_of
from tokred.bench import probe, results
from tokred.core.settings import parse_setting

SETTINGS = (
    "spatten keep=0.5 first=1", "spatten keep=0.25 first=1", "spatten keep=0.1 first=1",
    "spatten keep=0.5 first=1 heads=8", "spatten keep=1.0 first=1 heads=6", "ltp theta_final=0.01",
    "ltp theta_final=0.02", "ltp theta_final=0.04", "random_prune r=5", "tome r=5", "pitome ratio=0.75",
)  # fmt: skip
BATCH = 32


@torch.inference_mode()
def embeddings(model: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, int]:
    """Unit vectors, and multiply-adds of the layers at each text's own tokens."""
    host, out, macs = find(model), [], 0
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        out.append(minilm.embed(model, tokenizer, part, BATCH))
        lengths = [min(len(ids), 256) for ids in tokenizer(list(part))["input_ids"]]
        macs += _work(model, host, lengths)
    return torch.cat(out), macs


def _work(model: Any, host: Any, lengths: list[int]) -> int:
    shared = [found[2] for found in shared_of(model)]
    before, total = list(lengths), 0
    for layer, (_, block) in enumerate(host.blocks):
        after = list(before)
        if shared:
            state = shared[0].records[layer].state
            if state.representative is not None:
                mask = torch.ones_like(state.representative) if state.mask is None else state.mask
                after = mask.sum(1).tolist()
        cost = host.cost(block)
        total += sum(cost.macs(b, a, False) for b, a in zip(before, after, strict=True))
        before = after
    return total


def measure(settings: Sequence[str], train: int, test: int) -> list[dict[str, Any]]:
    """One row a setting, the unpatched model first."""
    methods = {text: tokred.make(parse_setting(text)[0], **parse_setting(text)[1]) for text in settings}
    model, tokenizer = minilm.load()
    found = data.fortunes()
    topics = sorted(set(found.topics))
    chosen = torch.randperm(len(found.texts), generator=torch.Generator().manual_seed(0)).tolist()[: train + test]
    # Texts of like lengths share a batch, as in real use; there is padding all the same.
    order = [i for part in (chosen[:train], chosen[train:]) for i in sorted(part, key=lambda i: len(found.texts[i]))]
    texts = [found.texts[i] for i in order]
    labels = torch.tensor([topics.index(found.topics[i]) for i in order])
    fitted = probe.linear_models().RidgeClassifier(alpha=0.5)
    fitted.fit(embeddings(model, tokenizer, texts[:train])[0].double().numpy(), labels[:train].numpy())
    reference, whole = embeddings(model, tokenizer, texts[train:])
    rows = []
    for text in ("unpatched", *settings):
        vectors, macs = reference, whole
        if text != "unpatched":
            tokred.apply(model, methods[text])
            vectors, macs = embeddings(model, tokenizer, texts[train:])
            tokred.remove(model)
        right = int((fitted.predict(vectors.double().numpy()) == labels[train:].numpy()).sum())
        cosine = (vectors * reference).sum(1).double()
        name, _, setting = text.partition(" ")
        row: dict[str, Any] = {"model": "all-MiniLM-L6-v2", "method": name, "setting": setting, "texts": test}
        row |= {"gmacs_share": macs / whole, "cosine_images": test, **results.here("cpu", torch.float32)}
        row |= results.mean("cosine", float(cosine.mean()), float(cosine.std()) / test**0.5)
        row |= results.share("accuracy", right, test)
        rows.append(row)
        print(f"{text:36s} {row['gmacs_share']:6.1%} of the work  cosine {row['cosine']:.4f}  "
              f"accuracy {row['accuracy']:.3f}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", action="append", help="such as 'tome r=2' (repeatable)")
    parser.add_argument("--train", type=int, default=800, help="texts that the probe is fitted to")
    parser.add_argument("--test", type=int, default=250, help="texts that are read")
    saving(parser)
    args = parser.parse_args()
    save(measure(args.setting or SETTINGS, args.train, args.test), "text", args)


if __name__ == "__main__":
    main()

"""Train the learned caches on SmolLM2-135M: KVzap, TokenButler, ADORE, FastCache, from texts that it reads once.

    python -m benchmarks.zoo.fetch smollm2 handbook
    python -m benchmarks kv/train_learned --folder FOLDER --texts 64 --part collect     # 3 s and 42 MB a text
    python -m benchmarks kv/train_learned --folder FOLDER --part kvzap --part tokenbutler --part adore
    python -m benchmarks kv/train_learned --folder FOLDER --part fastcache-4 --part fastcache-8

``benchmarks/kv/lessons.py`` says what is read. Each part begins anew, goes by its method's recipe with other steps, and
leaves ``FOLDER/NAME`` as ``tokred.save`` writes it, every fifty steps and at the end; weights are rounded to half
precision. The last :data:`HELD` texts teach nothing: their loss is printed. Small settings are taken, so that weights
fit into 2 MB where they can; those of ``benchmarks/kv/weights`` were made so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tokred
from benchmarks.engine import threads
from benchmarks.kv import lessons
from benchmarks.zoo import smollm2
from tokred import learn
from tokred.core.learned import Learned
from tokred.kv import CacheSite
from tokred.kv.fitting import REFERENCE
from tokred.kv.foresight import distance
from tokred.kv.release import lesson
from tokred.kv.repeat import REPEATED
from tokred.learn.store import WEIGHTS
from tokred.methods.kv.kvzap import FORETOLD

HELD = 4
SHARES = (0.125, 0.25, 0.5)  # that thresholds are noted for
SAVED = 50  # steps between two files
QUERIES = 128  # of one step of TokenButler, of which the pairs with all before them count
# Method, its settings, and steps.
PARTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "kvzap": ("kvzap", {"hidden": 48}, 800),
    "tokenbutler": ("tokenbutler", {"hidden": 80, "share": "kv_group"}, 300),
    "adore": ("adore", {"positives": 60}, 120),
    "fastcache-4": ("fastcache", {"factor": 4, "residual": True, "dropout": 0.0}, 150),
    "fastcache-8": ("fastcache", {"factor": 8, "residual": True, "dropout": 0.0}, 150),
}


class Reader(nn.Module):
    """A stand-in for the model: its forward takes the file of a text, and leaves the method's loss of it in ``left``.

    Args:
        method: which.
        module: that it learns.
        embed: of the model.
        depth: layers.
    """

    def __init__(self, method: Any, module: nn.Module, embed: Tensor, depth: int) -> None:
        super().__init__()
        self.method, self.depth, self.embed = method, depth, embed
        self.learned = [module]  # no part of this module, whose own weights stay as they are
        self.draws = random.Random(0)
        self.left: dict[str, Tensor] = {}

    def forward(self, path: Path) -> None:
        """Leave the loss."""
        self.left = {"distance": getattr(self, f"_{self.method.name}")(path)}

    def _scored(self, sites: Iterator[CacheSite]) -> Tensor:
        """The sum of what a score leaves as its loss, of all layers."""
        score, found = self.method.parts.score, []
        for site in sites:
            site.learned = Learned(self.learned[0])
            score(site)
            found.append(site.learned.losses["distance"])
        return torch.stack(found).sum()

    def _kvzap(self, path: Path) -> Tensor:
        hidden, found = lessons.load(path, "hidden", "found")
        rows = hidden.new_zeros(1, found.shape[1], found.shape[2], 1)
        return self._scored(
            CacheSite(
                k=rows, v=rows, hidden=hidden[i][None], layer=i, depth=self.depth,
                rows={REPEATED: found[i][None], FORETOLD: found[i][None]},
            )
            for i in range(self.depth)
        )  # fmt: skip

    def _fastcache(self, path: Path) -> Tensor:
        k, v, asked = lessons.load(path, "k", "v", "asked")
        meant = torch.ones(1, asked.shape[2], dtype=torch.bool)
        return self._scored(
            CacheSite(
                k=k[i][None].float(), v=v[i][None].float(), layer=i, depth=self.depth,
                notes=dict(zip(REFERENCE, (asked[i][None], meant), strict=True)),
            )
            for i in range(self.depth)
        )  # fmt: skip

    def _adore(self, path: Path) -> Tensor:
        ids, attended = lessons.load(path, "ids", "attended")
        controller: Any = self.learned[0]
        states, _ = controller.read(self.embed[ids][None])
        at = torch.arange(len(ids))
        return lesson(controller, states, attended[None], (at < at[:, None])[None], self.method.positives)

    def _tokenbutler(self, path: Path) -> Tensor:
        hidden, q, k = lessons.load(path, "hidden", "q", "k")
        networks: Any = self.learned[0]
        end = self.draws.randrange(QUERIES, hidden.shape[1] + 1) if networks.training else hidden.shape[1]
        made = networks.networks["0"](hidden[:1, :end], torch.arange(end)[None])
        some, terms = slice(max(0, end - QUERIES), end), []
        for i in range(self.depth - 1):
            asked = made.queries[:, i, :, some] * self.method.channels**-0.5
            true = q[None, i + 1, :, some].float() * q.shape[-1] ** -0.5
            terms.append(distance(asked, made.keys[:, i], true, k[None, i + 1, :, :end]))
        return torch.stack(terms).mean()


def halved(folder: Path) -> int:
    """Round the weights of a folder to half precision; returns bytes."""
    path = folder / WEIGHTS
    tensors = {name: t.half() for name, t in load_file(str(path)).items()}
    save_file(tensors, str(path), metadata={"format": "1"})
    return path.stat().st_size


@torch.inference_mode()
def thresholds(module: nn.Module, held: list[Path]) -> dict[str, float]:
    """The scores above which KVzap keeps some shares of the rows of texts, what always stays counted among them."""
    scores, rows = [], 0
    for path in held:
        (hidden,) = lessons.load(path, "hidden")
        every = torch.stack([module(i, x[None])[0] for i, x in enumerate(hidden)])
        scores.append(every[..., lessons.SINKS : -lessons.RECENT].flatten())
        rows += every.numel()
    found, always = torch.cat(scores).sort(descending=True).values, rows - sum(map(len, scores))
    return {f"{share:g}": float(found[int(share * rows) - always]) for share in SHARES}


def train(model: Any, folder: Path, part: str, steps: int | None) -> None:
    """Train one part, and write it beside the texts."""
    name, given, usual = PARTS[part]
    files = sorted(folder.glob("[0-9]*.safetensors"))
    taught, held = files[:-HELD], files[-HELD:]
    if not taught:
        raise SystemExit(f"{folder} holds {len(files)} texts, and more than {HELD} are needed: --part collect")
    recipe = dataclasses.replace(learn.recipe(name), steps=steps or usual)
    recipe = dataclasses.replace(recipe, warmup=min(recipe.warmup, recipe.steps // 10))
    method, started = tokred.make(name, **given), time.process_time()
    with tokred.applied(model, method):
        module = tokred.modules(model)[name]
        reader = Reader(method, module, model.get_input_embeddings().weight.detach(), model.config.num_hidden_layers)
        out = folder / part

        def read_held() -> float:
            module.eval()
            losses = []
            # Scores leave their loss in training alone; dropout is the only other thing that this says.
            module.training = True
            for path in held:
                reader(path)
                losses.append(float(reader.left["distance"].detach()))
            module.train()
            return sum(losses) / len(losses)

        losses: list[float] = []

        def each(step: int, found: learn.Step) -> None:
            losses.append(found.loss)
            if step % SAVED == SAVED - 1 or step + 1 == recipe.steps:
                tokred.save(model, out)
                mean, spent = sum(losses[-SAVED:]) / len(losses[-SAVED:]), time.process_time() - started
                print(f"{part} {step + 1} of {recipe.steps}: {mean:.4f}, {spent:.0f} s", flush=True)

        order = random.Random(0)
        batches = ((path, None) for _ in range(recipe.steps) for path in order.sample(taught, len(taught)))
        before = read_held()
        learn.fit(reader, batches, recipe, each=each, modules=[module], losses=lambda r: r.left)  # type: ignore[arg-type]
        after = read_held()
        if name == "kvzap":
            text = json.dumps(thresholds(module.eval(), held)) + "\n"
            (out / lessons.THRESHOLDS).write_text(text, "utf8")
        size = halved(out)
    spent = time.process_time() - started
    told = {"texts": len(taught), "steps": recipe.steps, "seconds": round(spent), "held_before": before}
    told |= {"held_after": after, "bytes": size}
    (folder / f"{part}.json").write_text(json.dumps(told) + "\n", "utf8")
    print(f"{part}: {told}", flush=True)


def main() -> None:
    """Collect texts, or train what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of texts as the model read them, and of weights")
    parser.add_argument("--part", action="append", choices=("collect", *PARTS), help="as often as needed; default: all")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--steps", type=int, help="instead of the part's")
    parser.add_argument("--threads", type=int, help="threads of torch")
    given = parser.parse_args()
    threads(given.threads)
    model, tokenizer = smollm2.load(dtype=torch.bfloat16)
    for part in given.part or ("collect", *PARTS):
        if part == "collect":
            for path in lessons.collect(model, tokenizer, given.folder, given.texts):
                print(path, flush=True)
        else:
            train(model, given.folder, part, given.steps)


if __name__ == "__main__":
    main()

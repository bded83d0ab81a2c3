"""Train the projector of the small VLM (:mod:`benchmarks.zoo.vlm`): DINOv2 tokens to SmolLM2, both ends frozen.

    python -m benchmarks vlm/train --out benchmarks/zoo/vlm_projector.safetensors       # about an hour on two CPU cores

Two steps. First the projector alone: each patch that an item covers is to become the mean embedding of the item's name,
each other patch the mean of all embeddings. Then through the frozen language model, in bfloat16, with all 256 visual
tokens: cross-entropy of the name after "This is a picture of a", and in every fourth step of a photo's caption after
"Caption:". No token is ever dropped in training, so that methods which drop tokens meet a model that is not used to it.

Printed at the end: exact answers on 100 held-out scenes, and the loss of the captions of 100 held-out photos, given
their own photo and given another.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.zoo import data, vlm

CAPTION = "Caption:"
HELD = 100


@torch.inference_mode()
def features(model: Any, images: Tensor) -> Tensor:
    """``[N, 256, 384]`` float16: what the model hands to the projector, the tower's states before its last norm."""
    found, layer = [], model.config.vision_feature_layer
    for i, part in enumerate(images.split(8)):
        with torch.autocast("cpu", torch.bfloat16):
            states = model.model.vision_tower(data.normalise(part), output_hidden_states=True).hidden_states
            found.append(states[layer][:, 1:].half())
        if i % 25 == 0:
            print(f"tower {8 * i:5} of {len(images)}", flush=True)
    return torch.cat(found)


def captions() -> tuple[Tensor, list[str], Tensor]:
    """Photos, their captions up to the first full stop, and an order of them of which the last 100 are held out."""
    stamps = data.stamps(vlm.SIZE)
    order = torch.randperm(len(stamps.images), generator=torch.Generator().manual_seed(0))
    return stamps.images, [c.split(".")[0].strip() + "." for c in stamps.captions], order


def warm_up(projector: nn.Module, x: Tensor, target: Tensor, label: Tensor, steps: int, rate: float) -> None:
    """Regress patches to embeddings.

    Args:
        x: ``[P, 384]`` patches.
        target: ``[classes + 1, 576]`` embeddings, the last that of the background.
        label: ``[P]`` which.
    """
    optimiser = torch.optim.AdamW(projector.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    background = len(target) - 1
    some, rest = (label != background).nonzero().view(-1), (label == background).nonzero().view(-1)
    for step in range(steps):
        # Half of a batch from items, however small they are.
        index = torch.cat([p[torch.randint(len(p), (512,))] for p in (some, rest)])
        out = projector(x[index].float())
        loss = F.mse_loss(out, target[label[index]]) / target.var()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 200 == 0:
            print(f"patches {step:5} loss {loss.item():.3f}", flush=True)


class Reader(nn.Module):
    """The frozen language model on projected features, followed by a text."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.llm, self.head, self.tokenizer = model.model.language_model, model.lm_head, tokenizer
        self.embed = self.llm.get_input_embeddings()

    def forward(self, visual: Tensor, prompt: str, goals: Sequence[str]) -> Tensor:
        """Mean cross-entropy of the goals' tokens.

        Args:
            visual: ``[B, V, 576]``.
            prompt: what stands between picture and goal.
            goals: ``B`` texts; 12 tokens of each count.
        """
        before, *tails = (
            self.tokenizer(text, add_special_tokens=False).input_ids[:12]
            for text in (prompt, *(f" {g}" for g in goals))
        )
        longest = max(map(len, tails))
        goal = torch.tensor([tail + [-100] * (longest - len(tail)) for tail in tails])
        text = torch.cat([torch.tensor(before).expand(len(goals), -1), goal.clamp(min=0)], 1)
        start = self.embed(torch.tensor([self.tokenizer.bos_token_id])).expand(len(goals), -1, -1)
        x = torch.cat([start, visual.to(start.dtype), self.embed(text)], 1)
        hidden = self.llm(inputs_embeds=x, use_cache=False).last_hidden_state[:, -longest - 1 : -1]
        return F.cross_entropy(self.head(hidden).float().flatten(0, 1), goal.flatten())


def main() -> None:
    """Train, and print exact answers on held-out scenes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--patch-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--minutes", type=float, default=60.0, help="no step begins later than this")
    parser.add_argument("--start", type=Path, help="a projector to go on with, instead of the patches")
    parser.add_argument("--features", type=Path, help="a file that keeps the tower's features between runs")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, tokenizer = vlm.build(arguments.start)
    photos, texts, order = captions()
    if arguments.features is not None and arguments.features.exists():
        kept = torch.load(arguments.features)
    else:
        scenes = vlm.scenes("train", arguments.scenes)
        kept = {"scenes": features(model, scenes.images), "labels": scenes.labels, "covered": scenes.covered}
        kept["photos"] = features(model, photos)
        if arguments.features is not None:
            torch.save(kept, arguments.features)
    x, labels, covered = kept["scenes"], kept["labels"], kept["covered"]
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    table = model.get_input_embeddings().weight
    if arguments.start is None:
        names = [tokenizer(f" {n}", add_special_tokens=False).input_ids for n in vlm.CLASSES]
        target = torch.stack([*(table[ids].mean(0) for ids in names), table.mean(0)])
        share = covered.flatten(1)
        which = torch.where(share > 0.5, labels[:, None], torch.where(share > 0, -1, len(names)))
        sure = which.flatten() >= 0
        warm_up(projector, x.flatten(0, 1)[sure], target, which.flatten()[sure], arguments.patch_steps, 2e-3)
    reader = Reader(model, tokenizer)
    reader.llm.to(torch.bfloat16)
    reader.head.to(torch.bfloat16)
    optimiser = torch.optim.AdamW(projector.parameters(), lr=arguments.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, arguments.rate, total_steps=arguments.steps + 1, pct_start=0.1
    )
    started = time.perf_counter()
    for step in range(arguments.steps):
        if time.perf_counter() - started > 60 * arguments.minutes:
            break
        if step % 4 == 3:
            index = order[torch.randint(len(order) - HELD, (arguments.batch,))]
            loss = reader(projector(kept["photos"][index].float()), CAPTION, [texts[i] for i in index])
        else:
            index = torch.randint(len(x), (arguments.batch,))
            names = [f"{vlm.CLASSES[y]}." for y in labels[index]]
            loss = reader(projector(x[index].float()), vlm.PROMPT, names)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 10 in (0, 3):
            print(f"step {step:5} loss {loss.item():.3f} {time.perf_counter() - started:6.0f} s", flush=True)
        if step % 20 == 19:
            save(projector, arguments.out)
    save(projector, arguments.out)
    with torch.inference_mode():
        mine = order[-HELD:].split(10)
        for given, shift in (("own", 0), ("another", 1)):
            seen = [projector(kept["photos"][part.roll(shift)].float()) for part in mine]
            said = [reader(v, CAPTION, [texts[i] for i in part]) for v, part in zip(seen, mine, strict=True)]
            print(f"loss of held-out captions, {given} photo: {torch.stack(said).mean():.3f}")
    model, tokenizer = vlm.build(arguments.out)
    held = vlm.scenes("test", HELD, seed=1)
    answers = [a for part in held.images.split(10) for a in vlm.answers(model, tokenizer, part)]
    right = sum(a == vlm.CLASSES[y] for a, y in zip(answers, held.labels, strict=True))
    print(f"exact answers: {right} of {len(answers)}")


def save(projector: nn.Module, path: Path) -> None:
    """In half precision."""
    save_file({k: v.half().contiguous() for k, v in projector.state_dict().items()}, path)


if __name__ == "__main__":
    main()

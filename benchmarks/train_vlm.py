"""Train the projector of the small VLM (:mod:`benchmarks.zoo.vlm`): DINOv2 tokens to SmolLM2, both ends frozen.

    python benchmarks/train_vlm.py --out benchmarks/zoo/vlm_projector.safetensors       # about an hour on two CPU cores

Two steps. First the projector alone: each patch that an item covers is to become the mean embedding of the item's name,
each other patch the mean of all embeddings. Then through the frozen language model, in bfloat16: cross-entropy of the
name after "This is a picture of a", with all 256 visual tokens. No token is ever dropped in training, so that methods
which drop tokens meet a model that is not used to it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from checkout import use_checkout

use_checkout()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.zoo import data, vlm  # noqa: E402


@torch.inference_mode()
def features(model: Any, scenes: vlm.Scenes) -> Tensor:
    """``[N, 256, 384]`` float16: what the tower hands to the projector."""
    found = []
    for i, part in enumerate(scenes.images.split(8)):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model.model.vision_tower(data.normalise(part)).last_hidden_state[:, 1:].half())
        if i % 25 == 0:
            print(f"tower {8 * i:5} of {len(scenes.images)}", flush=True)
    return torch.cat(found)


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
        self.llm, self.head = model.model.language_model, model.lm_head
        self.embed = self.llm.get_input_embeddings()
        self.prompt = [tokenizer.bos_token_id], tokenizer(vlm.PROMPT, add_special_tokens=False).input_ids
        self.names = [tokenizer(f" {name}.", add_special_tokens=False).input_ids for name in vlm.CLASSES]

    def forward(self, visual: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the names.

        Args:
            visual: ``[B, V, 576]``.
        """
        first, prompt = self.prompt
        longest = max(len(self.names[y]) for y in labels)
        tails = [self.names[y] + [0] * (longest - len(self.names[y])) for y in labels]
        text = torch.tensor([prompt + tail for tail in tails])
        start = self.embed(torch.tensor(first)).expand(len(labels), -1, -1)
        x = torch.cat([start, visual.to(start.dtype), self.embed(text)], 1)
        hidden = self.llm(inputs_embeds=x, use_cache=False).last_hidden_state[:, -longest - 1 : -1]
        goal = text[:, len(prompt) :]
        lost = F.cross_entropy(self.head(hidden).float().flatten(0, 1), goal.flatten(), reduction="none")
        real = (goal != 0).float().flatten()
        return (lost * real).sum() / real.sum()


def main() -> None:
    """Train, and print exact answers on held-out scenes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--patch-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--minutes", type=float, default=60.0, help="no step begins later than this")
    parser.add_argument("--start", type=Path, help="a projector to go on with, instead of the patches")
    parser.add_argument("--features", type=Path, help="a file that keeps the tower's features between runs")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, tokenizer = vlm.build(arguments.start)
    if arguments.features is not None and arguments.features.exists():
        kept = torch.load(arguments.features)
        x, labels, covered = kept["f"], kept["y"], kept["c"]
    else:
        scenes = vlm.scenes("train", arguments.scenes)
        x, labels, covered = features(model, scenes), scenes.labels, scenes.covered
        if arguments.features is not None:
            torch.save({"f": x, "y": labels, "c": covered}, arguments.features)
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
        index = torch.randint(len(x), (arguments.batch,))
        loss = reader(projector(x[index].float()), labels[index])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 10 == 0:
            print(f"step {step:5} loss {loss.item():.3f} {time.perf_counter() - started:6.0f} s", flush=True)
            save(projector, arguments.out)
    save(projector, arguments.out)
    model, tokenizer = vlm.build(arguments.out)
    held = vlm.scenes("test", 100, seed=1)
    said = [a for part in held.images.split(10) for a in vlm.answers(model, tokenizer, part)]
    right = sum(a == vlm.CLASSES[y] for a, y in zip(said, held.labels, strict=True))
    print(f"exact answers: {right} of {len(said)}")


def save(projector: nn.Module, path: Path) -> None:
    """In half precision."""
    save_file({k: v.half().contiguous() for k, v in projector.state_dict().items()}, path)


if __name__ == "__main__":
    main()

"""Train the small vision transformer for the embedded model: garments of Fashion-MNIST in the clutter of photographs.

    python -m benchmarks encoder/train_embedded --fashion FOLDER --photos FOLDER --state FOLDER
    python -m benchmarks encoder/train_embedded ... --export tokred/bench/data

The first command trains, and goes on where it was stopped when it is given again; the second writes the weights and the
held-out sample. What makes it fit an hour or two of CPU: the pictures grow (``--stages``). Training begins on crops of
40 pixels, 25 patches, whose positions are a random window of the full grid; larger ones join them, and at the end all
196 patches of 112 pixels. No patch is ever dropped, so the model has not learnt to do without any. The blocks begin
with weights of an earlier model (``--warm``), and the answers of a small convolutional network that sees the clean
garments can be learnt along with the labels (``--teacher-epochs``).

``--fashion`` is a folder with the four IDX files (Debian's ``dataset-fashion-mnist``, MIT licence); ``--photos`` is
``skimage/data`` out of scikit-image's wheel; what of it travels with tokred is public domain (:mod:`.clutter`).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.encoder import clutter
from tokred.bench.data.model import MEAN, MODEL, PATCH, SIZE, STD, build, conv
from tokred.bench.data.scenes import compose, normalise

Stages = tuple[tuple[int, int], ...]  # pixels each way of the pictures, and how many of them
BATCH, LARGE, EVALUATED = 128, 16, 1000


class Teacher(nn.Module):
    """A small residual convolutional network on clean garments ``(N, 1, 28, 28)``; only its soft labels are used."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.stem = conv(1, width)
        self.down = nn.ModuleList([conv(width, 2 * width, 2), conv(2 * width, 4 * width, 2)])
        self.res = nn.ModuleList([nn.Sequential(conv(w, w), conv(w, w)) for w in (2 * width, 4 * width)])
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for down, res in zip(self.down, self.res, strict=True):
            x = down(x)
            x = x + res(x)
        logits: Tensor = self.head(x.amax((2, 3)))
        return logits


def shifted(x: Tensor, pad: int = 2) -> Tensor:
    """Mirror half of the garments ``(N, 1, 28, 28)`` and shift each by up to ``pad`` pixels."""
    b = x.shape[0]
    x = F.pad(torch.where(torch.rand(b, 1, 1, 1) < 0.5, x.flip(-1), x), (pad,) * 4)
    dy, dx = torch.randint(0, 2 * pad + 1, (2, b, 1, 1))
    rows, columns = torch.arange(28).view(1, 28, 1) + dy, torch.arange(28).view(1, 1, 28) + dx
    return x[torch.arange(b).view(b, 1, 1), 0, rows, columns][:, None]


def soft_labels(data: Data, path: Path, epochs: int, log: Log) -> Tensor:
    """The teacher's logits ``(2, N, 10)`` on the garments as they are and mirrored; kept in ``path``."""
    if path.exists():
        kept: Tensor = torch.load(path)
        return kept
    x, y = data.garments[:, None].float() / 255, data.labels
    model = Teacher().to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, 8e-3, total_steps=epochs * (len(x) // 256), pct_start=0.3)
    for epoch in range(epochs):
        for i in torch.randperm(len(x))[: len(x) // 256 * 256].view(-1, 256):
            loss = F.cross_entropy(model(shifted(x[i])), y[i], label_smoothing=0.05)
            opt.zero_grad()
            loss.backward()
            opt.step()
            rate.step()
        model.eval()
        with torch.no_grad():
            answers = torch.cat([model(b[:, None].float() / 255).argmax(1) for b in data.held_garments.split(1000)])
        top1 = (answers == data.held_labels).double().mean()
        log(f"teacher epoch {epoch + 1} of {epochs}: {top1:.4f} of the test set")
        model.train()
    model.eval()
    with torch.no_grad():
        out = torch.stack([torch.cat([model(b) for b in v.split(1000)]) for v in (x, x.flip(-1))])
    torch.save(out, path)
    return out


class Data:
    """Garments and photographs to train on and to test on, no picture in both."""

    def __init__(self, fashion: Path, photos: Path):
        self.garments, self.labels = clutter.load(fashion, "train")
        self.held_garments, self.held_labels = clutter.load(fashion, "t10k")
        self.photos = clutter.photographs(photos, clutter.TRAINED_ON, (120, 200, 300))
        self.held_photos = clutter.photographs(photos, clutter.HELD_OUT, (200,))

    def held(self, count: int, size: int = SIZE) -> tuple[Tensor, Tensor]:
        """The first ``count`` garments of the test set in scenes of their own: ``(N, 3, size, size)`` and ``(N,)``."""
        g = torch.Generator().manual_seed(0)
        scenes = clutter.draw(torch.arange(count), self.held_photos, size, g)
        pictures = compose(scenes, self.held_garments, self.held_photos, size)
        return normalise(pictures), self.held_labels[:count]

    def batch(self, index: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Training pictures ``(N, 3, size, size)`` of the garments ``index``, and which are mirrored ``(N,)``."""
        scenes = clutter.draw(index, self.photos, size)
        pictures = compose(scenes, self.garments, self.photos, size)
        return normalise(pictures), scenes.flip


class Log:
    """Lines to the terminal and to a file, with the time of day."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        with self.path.open("a") as f:
            f.write(line + "\n")


def forward(model: Any, x: Tensor, random_window: bool = False) -> Tensor:
    """Logits of pictures of any size up to the full one, whose patches sit in a window of the full grid.

    The window of the position embedding is the middle one, or one of each picture's own.
    """
    patches = model.patch_embed(x)
    b, side, full = x.shape[0], x.shape[-1] // PATCH, SIZE // PATCH
    room = full - side
    corner = torch.randint(room + 1, (b, 2)) if random_window else torch.full((b, 2), room // 2)
    at = torch.arange(side)
    index = ((corner[:, :1] + at)[:, :, None] * full + (corner[:, 1:] + at)[:, None, :]).flatten(1)
    patches = patches + model.pos_embed[0, 1:][index]
    first = (model.cls_token + model.pos_embed[:, :1]).expand(b, -1, -1)
    logits: Tensor = model.forward_head(model.norm(model.blocks(torch.cat([first, patches], 1))))
    return logits


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers, the model in evaluation mode meanwhile."""
    model.eval()
    right = sum(int((forward(model, a).argmax(1) == b).sum()) for a, b in zip(x.split(100), y.split(100), strict=True))
    model.train()
    return right / len(y)


def begin(warm: Path | None) -> Any:
    """A model whose position embedding and blocks are those of an earlier one, every block of eight from its depth."""
    model: Any = build()
    if warm:
        from safetensors.torch import load_file

        old = {k: v.float() for k, v in load_file(warm).items()}
        depth = 1 + max(int(k.split(".")[1]) for k in old if k.startswith("blocks."))
        state = {k: v for k, v in old.items() if k.split(".")[0] in {"cls_token", "pos_embed", "norm"}}
        for i in range(len(model.blocks)):
            source = f"blocks.{round(i * (depth - 1) / (len(model.blocks) - 1))}."
            state |= {f"blocks.{i}." + k.removeprefix(source): v for k, v in old.items() if k.startswith(source)}
        wrong = model.load_state_dict(state, strict=False)
        assert not wrong.unexpected_keys, wrong.unexpected_keys
    return model


def optimisers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for all else."""
    matrices = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.05},
                {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=rate,
        ),
    ]


def stages(text: str) -> Stages:
    """``"40:200000,112:40000"`` as stages.

    Raises:
        ValueError: it is of another form, or a size does not go into patches of the full grid.
    """
    found = tuple((int(size), int(count)) for size, _, count in (part.partition(":") for part in text.split(",")))
    for size, _ in found:
        if size % PATCH or not 40 <= size <= SIZE:
            raise ValueError(f"a stage's pixels are 40 to {SIZE} in steps of {PATCH}, got {size}")
    return found


def stage(seen: int, all_stages: Stages) -> int | None:
    """Which stage a run is in that has seen so many pictures; None after the last."""
    for i, (_, count) in enumerate(all_stages):
        if seen < count:
            return i
        seen -= count
    return None


def parts(now: int, all_stages: Stages) -> list[tuple[int, int]]:
    """Sizes of the pictures of one step, and how many of each: behind the first stage, most are as small as there.

    What garments look like is learnt from the small ones, and to find them in clutter from the large.
    """
    size = all_stages[now][0]
    return [(size, BATCH)] if now == 0 else [(size, LARGE), (all_stages[0][0], BATCH - LARGE)]


def rate_at(seen: int, all_stages: Stages) -> float:
    """Learning rate as a share of its highest: up over 200 steps, level, then down to nothing after the first stage."""
    total, falling = sum(count for _, count in all_stages), sum(count for _, count in all_stages[1:])
    return min(1.0, (seen / BATCH + 1) / 200, (total - seen) / max(falling, 1) + 0.002)


def train(args: argparse.Namespace, data: Data, log: Log) -> nn.Module:
    """Train until the last stage is over, with a checkpoint every ``--every`` seconds."""
    torch.manual_seed(args.seed)
    soft = soft_labels(data, args.state / "soft_labels.pt", args.teacher_epochs, log) if args.teacher_epochs else None
    model = begin(args.warm)
    opts = optimisers(model, args.lr)
    seen, path = 0, args.state / "checkpoint.pt"
    if path.exists():
        kept = torch.load(path)
        model.load_state_dict(kept["model"])
        for opt, state in zip(opts, kept["optimisers"], strict=True):
            opt.load_state_dict(state)
        seen = kept["seen"]
        torch.manual_seed(args.seed + seen)
        log(f"going on after {seen} pictures")

    def keep() -> None:
        state = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in opts], "seen": seen}
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    saved = told = time.monotonic()
    sums: list[float] = []
    model.train()
    while (now := stage(seen, args.stages)) is not None:
        size = args.stages[now][0]
        loss = torch.zeros(())
        for pixels, count in parts(now, args.stages):
            index = torch.randint(len(data.labels), (count,))
            pictures, flip = data.batch(index, pixels)
            logits = forward(model, pictures, random_window=True)
            own = F.cross_entropy(logits, data.labels[index], label_smoothing=0.05)
            if pixels == size:
                sums.append(float(own.detach()))
            if soft is not None:
                target = (soft[flip.long(), index] / 2).softmax(-1)
                kl = F.kl_div((logits / 2).log_softmax(-1), target, reduction="batchmean") * 4
                own = 0.3 * own + 0.7 * kl
            loss = loss + own * (count / BATCH)
        for opt in opts:
            opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.lr * rate_at(seen, args.stages)
            opt.step()
        seen += BATCH
        over = stage(seen, args.stages) != now
        if over or time.monotonic() - saved > args.every:
            keep()
            saved = time.monotonic()
        if over or time.monotonic() - told > 2 * args.every:
            top1 = accuracy(model, *data.held(EVALUATED if over else 300, size))
            mean = sum(sums) / len(sums)
            text = f"{size} px, {seen} pictures, loss {mean:.3f}, held out at {size} px {top1:.3f}"
            if over:
                text += f", at {SIZE} px {accuracy(model, *data.held(EVALUATED)):.3f}"
            log(text)
            told, sums = time.monotonic(), []
    return model.eval()


def export(args: argparse.Namespace, data: Data, log: Log) -> None:
    """Write the weights of the checkpoint, in half precision, and the sample of held-out scenes."""
    import numpy as np
    from safetensors.torch import save_file

    kept = torch.load(args.state / "checkpoint.pt")
    state = {k: v.half() if v.is_floating_point() else v for k, v in kept["model"].items()}
    g = torch.Generator().manual_seed(0)
    scenes = clutter.draw(torch.arange(args.sample), data.held_photos, SIZE, g)
    labels = data.held_labels[: args.sample]
    arrays = {name: value.numpy() for name, value in scenes._asdict().items()}
    arrays |= {f"photo_{i}": photo.numpy() for i, photo in enumerate(data.held_photos)}
    arrays |= {"garments": data.held_garments[: args.sample].numpy(), "labels": labels.numpy().astype(np.uint8)}
    model = build().eval()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    right = 0
    for part in torch.arange(args.sample).split(100):
        some = type(scenes)(*(value[part] for value in scenes))
        pictures = normalise(compose(some, data.held_garments, data.held_photos))
        right += round(accuracy(model, pictures, labels[part]) * len(part))
    notes = {"top1": right / args.sample, "images": args.sample, "trained_on": kept["seen"]}
    header = {"architecture": json.dumps(MODEL), "mean": str(MEAN), "std": str(STD), "notes": json.dumps(notes)}
    save_file({k: v.contiguous() for k, v in state.items()}, str(args.export / "vit_clutter.safetensors"), header)
    np.savez_compressed(args.export / "clutter_sample.npz", **arrays)
    log(f"exported: {notes['top1']:.4f} of {args.sample} held-out scenes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--photos", type=Path, required=True, help="scikit-image's folder of pictures")
    parser.add_argument("--state", type=Path, required=True, help="where checkpoint, soft labels and log are kept")
    parser.add_argument("--warm", type=Path, help="weights of an earlier embedded model, whose blocks are taken over")
    parser.add_argument(
        "--stages", type=stages, default="40:64000,80:22000,112:42000", help="pixels:pictures, from small to full"
    )
    parser.add_argument("--teacher-epochs", type=int, default=4, help="0: learn from the labels alone")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--export", type=Path, help="write weights and sample into this folder instead of training")
    parser.add_argument("--sample", type=int, default=2000, help="scenes of the sample")
    parser.add_argument("--every", type=float, default=120, help="seconds between two checkpoints")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.state.mkdir(parents=True, exist_ok=True)
    (export if args.export else train)(args, Data(args.fashion, args.photos), Log(args.state / "log.txt"))


if __name__ == "__main__":
    main()

"""Train the small vision transformer that ships inside tokred, on the whole of Fashion-MNIST.

The model has the token geometry of ViT-B/16 at 224: a 14 x 14 grid of patches and a class token, 197 in all, and
12 blocks. Only its width is small, so that the weights fit in the package. Four things make it trainable on one CPU
core in about an hour: a patch embedding of four convolutions (Xiao et al., Early Convolutions Help Transformers See
Better, 2021), random patch dropout early on (short sequences first, the full ones at the end), distillation from a
small convolutional network trained in the same run, and an initialisation of the attention that starts out local.

    python -m benchmarks encoder/train_embedded --data /usr/share/datasets/fashion-mnist --out tokred/bench/data

The data set is Debian's ``dataset-fashion-mnist`` (MIT licence), or any folder with the four IDX files.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.bench.data.model import MEAN, MODEL, STD, build, conv


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images ``(N, 28, 28)`` uint8 and labels ``(N,)`` int64 of one split ('train' or 't10k')."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as f:
        images = np.frombuffer(f.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as f:
        labels = np.frombuffer(f.read(), np.uint8, offset=8)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def prepare(images: Tensor) -> Tensor:
    """``(N, 28, 28)`` uint8 to normalised ``(N, 1, 28, 28)`` float32."""
    return (images[:, None].float() / 255 - MEAN) / STD


def augment(x: Tensor, pad: int = 2) -> Tensor:
    """Mirror half of the images and shift each by up to ``pad`` pixels."""
    b = x.shape[0]
    x = torch.where(torch.rand(b, 1, 1, 1) < 0.5, x.flip(-1), x)
    x = F.pad(x, (pad,) * 4, value=-MEAN / STD)
    dy, dx = torch.randint(0, 2 * pad + 1, (2, b, 1, 1))
    rows, cols = torch.arange(28).view(1, 28, 1) + dy, torch.arange(28).view(1, 1, 28) + dx
    return x[torch.arange(b).view(b, 1, 1), 0, rows, cols][:, None]


class Teacher(nn.Module):
    """A small residual convolutional network; only its soft labels are used."""

    def __init__(self, width: int = 32):
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
        return self.head(x.amax((2, 3)))


def local_attention_(model: nn.Module) -> None:
    """Start with attention to positions like one's own (Trockman and Kolter, Mimetic Initialization, 2023)."""
    n, dim = model.pos_embed.shape[1] - 1, model.embed_dim
    side = round(n**0.5)
    omega = 1 / 10000 ** (torch.arange(dim // 4) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [f(p.reshape(-1, 1) * omega) for p in (y, x) for f in (torch.sin, torch.cos)]
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[0, 1:] = torch.cat(waves, 1)
        for block in model.blocks:
            heads, d = block.attn.num_heads, dim // block.attn.num_heads
            wq, wk, wv = block.attn.qkv.weight.view(3, dim, dim)
            for h in range(heads):
                u, s, v = torch.linalg.svd(0.7 * torch.randn(dim, dim) / dim**0.5 + 0.7 * torch.eye(dim))
                root = s[:d].sqrt()[:, None]
                wq[h * d : (h + 1) * d], wk[h * d : (h + 1) * d] = root * u.T[:d], root * v[:d]
            u, s, v = torch.linalg.svd(0.4 * torch.randn(dim, dim) / dim**0.5 - 0.4 * torch.eye(dim))
            wv.copy_(s.sqrt()[:, None] * v)
            block.attn.proj.weight.copy_(u * s.sqrt())


def batches(n: int, size: int):
    order = torch.randperm(n)
    for i in range(n // size):
        yield order[i * size : (i + 1) * size]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, limit: int | None = None) -> float:
    model.eval()
    hits = sum(
        int((model(a).argmax(1) == b).sum()) for a, b in zip(x[:limit].split(500), y[:limit].split(500), strict=True)
    )
    return hits / len(y[:limit])


def train_teacher(x: Tensor, y: Tensor, xt: Tensor, yt: Tensor, epochs: int) -> nn.Module:
    model = Teacher().to(memory_format=torch.channels_last)
    total = epochs * (len(x) // 256)
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, 6e-3, total_steps=total, pct_start=0.3)
    for epoch in range(epochs):
        model.train()
        for i in batches(len(x), 256):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(augment(x[i])), y[i], label_smoothing=0.05)
            opt.zero_grad()
            loss.backward()
            opt.step()
            sched.step()
        print(f"teacher epoch {epoch}: test {accuracy(model, xt, yt):.4f}", flush=True)
    return model.eval()


def keep_share(progress: float) -> float:
    """Share of the patches that a training step sees: a quarter for most of the run, all at its end."""
    return 0.25 if progress < 0.75 else 0.5 if progress < 0.9 else 1.0


def train_student(x: Tensor, y: Tensor, xt: Tensor, yt: Tensor, teacher: nn.Module, args: argparse.Namespace):
    from timm.layers import PatchDropout

    model = build()
    local_attention_(model)
    model.patch_embed.stem[0].load_state_dict(teacher.stem.state_dict())
    model.patch_embed.stem[1].load_state_dict(teacher.down[0].state_dict())
    model.patch_embed.res.load_state_dict(teacher.res[0].state_dict())
    if args.warm:
        from safetensors.torch import load_file

        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(args.warm).items()})
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    opt = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=args.lr
    )
    start, best = time.time(), 0.0
    budget, step, last = args.minutes * 60, 0, start
    done = False
    while not done:
        for i in batches(len(x), args.batch):
            progress = (time.time() - start) / budget
            done = progress >= 1
            if done:
                break
            share = keep_share(progress)
            model.patch_drop = PatchDropout(1 - share, num_prefix_tokens=1) if share < 1 else nn.Identity()
            lr = args.lr * min(1.0, (step + 1) / 100) * (0.5 * (1 + math.cos(math.pi * progress)) + 0.005)
            for group in opt.param_groups:
                group["lr"] = lr
            model.train()
            image = augment(x[i])
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    soft = (teacher(image).float() / 2).softmax(-1)
                logits = model(image).float()
            hard = F.cross_entropy(logits, y[i])
            kl = F.kl_div((logits / 2).log_softmax(-1), soft, reduction="batchmean") * 4
            loss = 0.3 * hard + 0.7 * kl
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            step += 1
            if time.time() - last > 180:
                last = time.time()
                acc = accuracy(model, xt, yt, 1000)
                print(
                    f"{(last - start) / 60:5.1f} min step {step} ({step * args.batch / len(x):.2f} epochs) "
                    f"keep {share} "
                    f"loss {float(loss.detach()):.3f} first 1000 test images {acc:.4f}",
                    flush=True,
                )
                save(model, args.out, {"top1_first_1000": acc, "steps": step, "unfinished": True})
    model.patch_drop = nn.Identity()
    best = accuracy(model, xt, yt)
    print(f"student: test {best:.4f} after {step} steps, {step * args.batch / len(x):.2f} epochs", flush=True)
    save(model, args.out, {"top1": best, "steps": step, "epochs": round(step * args.batch / len(x), 2)})


def save(model: nn.Module, out: Path, notes: dict) -> None:
    """Half-precision weights with the architecture and the measured accuracy in the header."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        k: (v.detach().half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()
    }
    header = {"architecture": json.dumps(MODEL), "mean": str(MEAN), "std": str(STD), "notes": json.dumps(notes)}
    save_file(tensors, str(out / "vit_fashion.safetensors"), metadata=header)


def save_sample(folder: Path, out: Path, count: int) -> None:
    images, labels = load(folder, "t10k")
    np.savez_compressed(
        out / "fashion_sample.npz", images=images[:count].numpy(), labels=labels[:count].numpy().astype(np.uint8)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=Path("tokred/bench/data"))
    parser.add_argument("--minutes", type=float, default=60, help="wall-clock budget of the transformer's training")
    parser.add_argument("--teacher-epochs", type=int, default=6)
    parser.add_argument("--teacher", type=Path, help="where the teacher's weights are kept between runs")
    parser.add_argument("--warm", type=Path, help="go on from the weights of an earlier run")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=2000, help="test images that go into the package")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    (x, y), (xt, yt) = load(args.data, "train"), load(args.data, "t10k")
    x, xt = prepare(x), prepare(xt)
    if args.teacher and args.teacher.exists():
        teacher = Teacher()
        teacher.load_state_dict(torch.load(args.teacher))
        teacher = teacher.to(memory_format=torch.channels_last).eval()
    else:
        teacher = train_teacher(x, y, xt, yt, args.teacher_epochs)
        if args.teacher:
            torch.save(teacher.state_dict(), args.teacher)
    args.out.mkdir(parents=True, exist_ok=True)
    save_sample(args.data, args.out, args.sample)
    train_student(x, y, xt, yt, teacher, args)


if __name__ == "__main__":
    main()

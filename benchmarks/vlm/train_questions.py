"""Train the small VLM's projector to answer questions: about shapes, clothes and clips, at several resolutions.

    python -m benchmarks.zoo.fetch dinov2 smollm2 photos fashion questions
    python -m benchmarks vlm/train_questions --folder questions --minutes 60
    python -m benchmarks vlm/train_questions --folder questions --steps 4000     # goes on where the folder ends
    python -m benchmarks vlm/train_questions --folder clips --start benchmarks/zoo/vlm_questions.safetensors \\
        --rank 4 --names 1 --frames 8,8,8,16,32 --later 0 --often 0.7             # for clips of several lengths

The tower (DINOv2) is frozen, and so is the language model (SmolLM2-135M, in bfloat16), but for products of ``--rank``
that are added to its attention's weights (LoRA). A batch holds pictures of one kind, of which several questions share
the visual tokens: they are asked in one forward, each seeing the picture and itself. No token is ever dropped in
training. With ``--names`` each step also moves projected patches of clothes towards the embedding of their name, away
from those of other clothes. Kinds:

- ``small``, ``full``, ``pooled``: easy-VQA at 112 pixels (64 visual tokens), at 224 (256), and at 224 with projected
  tokens averaged in windows of 2 x 2 (64), as models of videos do with each frame;
- ``scenes``: the clothes of ``benchmarks/vlm/train.py``, 256 tokens, now and then averaged;
- ``clips``: 8 frames of 224 pixels, averaged to 64 tokens each, and behind them the line feed of the model for clips;
  with ``--frames`` as many frames as one of its numbers, each of the 8 shown several times in a row.

The folder has the tower's features, ``state.pt`` (what is trained, optimiser, step and random numbers, by which a run
that was broken off goes on), ``log.csv``, and ``vlm_questions.safetensors``. Printed at the end: exact answers by kind
of question.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.engine import threads
from benchmarks.vlm.train import features
from benchmarks.zoo import questions, vlm
from benchmarks.zoo.questions import Question

# How often a kind is drawn, and the pictures of its batches: about as many tokens each.
KINDS = {"small": (6, 8), "pooled": (4, 8), "full": (2, 3), "scenes": (2, 3), "clips": (3, 2)}
FRAMES, TOGETHER, EVERY = 8, 6, 20
PATCHES, COLD = 1024, 0.1  # single patches of clothes in a step; a temperature of cosines


class Source(NamedTuple):
    """Features ``[N, V, 384]`` or ``[N, T, V, 384]`` float16, what is asked of each, and of those that show clothes
    the share of each patch that these cover, of the features' shape without the last."""

    features: Tensor
    asked: list[list[Question]]
    covered: Tensor | None = None


def pooled(x: Tensor) -> Tensor:
    """``(..., V, C)`` of a square of tokens, averaged in windows of 2 x 2: ``(..., V / 4, C)``."""
    side = int(x.shape[-2] ** 0.5)
    grid = x.unflatten(-2, (side // 2, 2, side // 2, 2))
    return grid.mean((-4, -2)).flatten(-3, -2)


class Asker(nn.Module):
    """The frozen language model, asked several questions after the same visual tokens."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.llm, self.head, self.tokenizer = model.model.language_model, model.lm_head, tokenizer
        self.embed = self.llm.get_input_embeddings()
        self.newline = self.embed.weight[self.ids("\n")[0]]

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found

    def forward(self, visual: Tensor, asked: Sequence[Sequence[Question]]) -> tuple[Tensor, list[list[bool]]]:
        """Mean cross-entropy of the answers' tokens, and which answers are the most likely ones, token for token.

        Args:
            visual: ``(B, V, 576)``.
            asked: of each sample.
        """
        head = 1 + visual.shape[1]
        rows, segments, places, goals = [], [], [], []
        for several in asked:
            row, segment, place, goal = [], [], [], []
            for number, question in enumerate(several, 1):
                before, after = self.ids(vlm.asked(question.text)), self.ids(f" {question.answer}.")
                row += before + after
                segment += [number] * (len(before) + len(after))
                place += range(head, head + len(before) + len(after))
                goal += [-100] * (len(before) - 1) + after + [-100]
            rows.append(row)
            segments.append(segment)
            places.append(place)
            goals.append(goal)
        text, part, position, goal_ids = (
            nn.utils.rnn.pad_sequence([torch.tensor(x) for x in xs], batch_first=True, padding_value=fill)
            for xs, fill in ((rows, 0), (segments, -1), (places, 0), (goals, -100))
        )
        start = self.embed(torch.tensor([self.tokenizer.bos_token_id])).expand(len(asked), -1, -1)
        x = torch.cat([start, visual.to(start.dtype), self.embed(text)], 1)
        part = F.pad(part, (head, 0))
        position = torch.cat([torch.arange(head).expand(len(asked), -1), position], 1)
        seen = (part.unsqueeze(2) == part.unsqueeze(1)) | (part.unsqueeze(1) == 0)
        seen &= torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        mask = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        hidden = self.llm(
            inputs_embeds=x, attention_mask=mask.unsqueeze(1), position_ids=position, use_cache=False
        ).last_hidden_state[:, head:]
        counted = goal_ids != -100
        logits = self.head(hidden[counted]).float()
        loss = F.cross_entropy(logits, goal_ids[counted])
        hits = torch.zeros_like(counted)
        hits[counted] = logits.argmax(-1) == goal_ids[counted]
        part = part[:, head:]
        right = [
            [bool(hits[i][(part[i] == n) & counted[i]].all()) for n in range(1, len(several) + 1)]
            for i, several in enumerate(asked)
        ]
        return loss, right


def sources(model: Any, part: str, count: dict[str, int], folder: Path) -> dict[str, Source]:
    """What is asked, with the tower's features, which stay in the folder."""
    found = {}
    shapes, clips = questions.pictures(part), questions.clips(part, count["clips"], FRAMES)
    some = shapes.about(range(min(count["full"], len(shapes.images))))
    scenes = vlm.scenes(part, count["scenes"], seed=0 if part == "train" else 1)
    named = tuple(Question(vlm.PROMPT, vlm.CLASSES[y], "clothes", i) for i, y in enumerate(scenes.labels.tolist()))
    for kind, asked, size in (
        ("small", shapes, 112),
        ("full", some, 224),
        ("scenes", questions.Asked(scenes.images, named, scenes.covered), 224),
        ("clips", clips, 224),
    ):
        path = folder / f"{part}_{kind}.pt"
        if not path.exists():
            print(f"{part}: the tower on {kind}", flush=True)
            flat = asked.images.flatten(0, -4)
            tokens = torch.cat([features(model, questions.resized(p, size)) for p in flat.split(200)])
            torch.save(tokens.unflatten(0, asked.images.shape[:-3]), path)
        by: dict[int, list[Question]] = defaultdict(list)
        for question in asked.questions:
            by[question.picture].append(question)
        covered = None if asked.covered is None else asked.covered.flatten(-2)
        found[kind] = Source(torch.load(path, mmap=True), [by[i] for i in range(len(asked.images))], covered)
    found["pooled"] = found["full"]
    return found


def visual(projector: nn.Module, kind: str, x: Tensor, average: bool, newline: Tensor, frames: int = 0) -> Tensor:
    """``(B, V, 576)`` what the language model reads of features; behind a clip stands ``newline``, ``(576,)``.

    Args:
        projector: of the model.
        kind: of pictures.
        x: ``(B, V, 384)``, or of clips ``(B, T, V, 384)``.
        average: a picture's tokens in windows of 2 x 2; those of clips always are.
        newline: ``(576,)``.
        frames: of a clip, a multiple of its own, each of which then stands several times in a row; 0: its own.
    """
    out: Tensor = projector(x.float())
    if kind in ("pooled", "clips") or average:
        out = pooled(out)
    if kind != "clips":
        return out
    out = out.repeat_interleave(max(frames // out.shape[1], 1), 1)
    return torch.cat([out.flatten(1, 2), newline.to(out.dtype).expand(len(out), 1, -1)], 1)


def drawn(source: Source, count: int) -> tuple[Tensor, list[list[Question]]]:
    """A batch: what asks for more than yes or no is asked first."""
    index = torch.randint(len(source.asked), (count,)).tolist()
    asked = []
    for i in index:
        order = [source.asked[i][j] for j in torch.randperm(len(source.asked[i])).tolist()]
        asked.append(sorted(order, key=lambda q: q.kind == "yes/no")[:TOGETHER])
    return source.features[index], asked


@torch.inference_mode()
def judged(asker: Asker, projector: nn.Module, held: dict[str, Source], most: int) -> dict[str, tuple[int, int]]:
    """Right answers and questions, by ``source kind``."""
    found: dict[str, list[bool]] = defaultdict(list)
    for kind, source in held.items():
        for part in torch.arange(min(most, len(source.asked))).split(KINDS[kind][1]):
            asked = [source.asked[i][:12] for i in part.tolist()]
            _, right = asker(visual(projector, kind, source.features[part], False, asker.newline), asked)
            for several, hits in zip(asked, right, strict=True):
                for question, hit in zip(several, hits, strict=True):
                    found[f"{kind} {question.kind}"].append(hit)
    return {name: (sum(hits), len(hits)) for name, hits in found.items()}


def main() -> None:
    """Train, and print what is answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500, help="in all, with those of earlier runs")
    parser.add_argument("--minutes", type=float, default=60.0, help="no step begins later than this")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--full", type=int, default=1200, help="pictures of easy-VQA at 224 pixels")
    parser.add_argument("--scenes", type=int, default=800)
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--held", type=int, default=200, help="pictures of each kind that are asked about at the end")
    parser.add_argument("--start", type=Path, default=vlm.PROJECTOR, help="weights to begin with")
    parser.add_argument("--rank", type=int, default=0, help="of what is added to the attention's weights; 0: nothing")
    parser.add_argument("--names", type=float, default=0.0, help="weight of the loss of single patches of clothes")
    parser.add_argument("--frames", default=str(FRAMES), help=f"of clips: multiples of {FRAMES}, with commas")
    parser.add_argument(
        "--later", type=float, default=0.55, help="share of the steps after which clips come more often"
    )
    parser.add_argument("--often", type=float, default=0.5, help="share of the steps that clips have from then on")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    lengths = [int(n) for n in given.frames.split(",")]
    for name in ("later", "often"):
        if not 0 <= getattr(given, name) < 1:
            parser.error(f"--{name} must be at least 0 and less than 1; got {getattr(given, name):g}")
    if any(n < FRAMES or n % FRAMES for n in lengths):
        parser.error(f"--frames must be multiples of {FRAMES}, with commas; got {given.frames}")
    threads(given.threads)
    given.folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = vlm.build(given.start)
    model.requires_grad_(False)
    projector: nn.Module = model.model.multi_modal_projector.requires_grad_(True)
    count = {"full": given.full, "scenes": given.scenes, "clips": given.clips}
    data = sources(model, "train", count, given.folder)
    held = sources(model, "test", dict.fromkeys(count, given.held), given.folder)
    asker = Asker(model, tokenizer)
    asker.llm.to(torch.bfloat16)
    asker.head.to(torch.bfloat16)
    if given.rank:
        added(asker.llm, given.rank)
    train(asker, projector, data, given, lengths)
    vlm.save(given.folder / "vlm_questions.safetensors", projector, asker.llm)
    for name, (right, asked) in judged(asker, projector, held, given.held).items():
        print(f"{name}: {right} of {asked} right ({right / asked:.1%})")


def clothes(data: Iterable[Source]) -> tuple[Tensor, Tensor]:
    """Features ``(P, 384)`` of all patches that clothes cover by more than half, and their classes ``(P,)``."""
    features, classes = [], []
    for source in data:
        if source.covered is not None:
            shown = source.covered > 0.5
            of = [next(q.answer for q in several if q.answer in vlm.CLASSES) for several in source.asked]
            which = torch.tensor([vlm.CLASSES.index(name) for name in of]).view(-1, *[1] * (shown.ndim - 1))
            features.append(source.features[shown])
            classes.append(which.expand(shown.shape)[shown])
    return torch.cat(features), torch.cat(classes)


def targets(asker: Asker) -> Tensor:
    """``(10, 576)`` float32 mean embeddings of the names of clothes, each of length 1."""
    table = asker.embed.weight.detach().float()
    return F.normalize(torch.stack([table[asker.ids(f" {name}")].mean(0) for name in vlm.CLASSES]), dim=-1)


def added(llm: nn.Module, rank: int) -> None:
    """Low-rank products beside the weights of a language model's attention, in float32, which alone are trained."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=vlm.TIMES * rank, target_modules=[*vlm.ADDED]), llm)
    for name, value in llm.named_parameters():
        if "lora_" in name:
            value.data = value.data.float()


def trained(asker: Asker, projector: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a step changes, by name."""
    mine = {f"projector.{name}": value for name, value in projector.named_parameters()}
    return mine | {name: value for name, value in asker.llm.named_parameters() if "lora_" in name}


def train(
    asker: Asker, projector: nn.Module, data: dict[str, Source], given: argparse.Namespace, lengths: Sequence[int]
) -> None:
    """From the folder's state, if there is one, until the steps or the minutes are over."""
    path, started, first = given.folder / "state.pt", time.perf_counter(), 0
    learning = trained(asker, projector)
    optimiser = torch.optim.AdamW(learning.values(), lr=given.rate, weight_decay=0.01)
    torch.manual_seed(0)
    if path.exists():
        state = torch.load(path)
        for name, value in learning.items():
            value.data.copy_(state["trained"][name])
        optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["random"])
        first = state["step"]
    patches, classes = clothes(data.values()) if given.names else (None, None)
    goals = targets(asker)
    shares = torch.tensor([float(share) for share, _ in KINDS.values()])
    clips = list(KINDS).index("clips")
    pictures = shares.sum() - shares[clips]
    for step in range(first, given.steps):
        if time.perf_counter() - started > 60 * given.minutes:
            break
        # The rate is known from the step alone, so that a run that goes on has the rate that it would have had.
        done = step / given.steps
        optimiser.param_groups[0]["lr"] = given.rate * min(1.0, (step + 1) / 50) * (1 - 0.98 * done)
        if done >= given.later:  # pictures are learned by then
            shares[clips] = given.often / (1 - given.often) * pictures
        kind = tuple(KINDS)[int(torch.multinomial(shares, 1))]
        frames = lengths[int(torch.randint(len(lengths), ()))] if kind == "clips" else FRAMES
        # Of longer clips fewer: a batch has about as many tokens, but for those of which one has more.
        x, asked = drawn(data[kind], max(KINDS[kind][1] * FRAMES // frames, 1))
        average = kind == "scenes" and bool(torch.rand(()) < 0.5)
        loss, right = asker(visual(projector, kind, x, average, asker.newline, frames), asked)
        if patches is not None and classes is not None:
            index = torch.randint(len(patches), (PATCHES,))
            near = F.normalize(projector(patches[index].float()), dim=-1) @ goals.T
            loss = loss + given.names * F.cross_entropy(near / COLD, classes[index])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning.values(), 1.0)
        optimiser.step()
        _log(given.folder / "log.csv", step, kind, loss.item(), asked, right, time.perf_counter() - started)
        if step % EVERY == EVERY - 1 or step == given.steps - 1:
            state = {"trained": {k: v.data for k, v in learning.items()}, "optimiser": optimiser.state_dict()}
            # Written aside and moved, so that a run that is broken off here leaves the state before.
            torch.save(state | {"random": torch.get_rng_state(), "step": step + 1}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)


def _log(
    path: Path, step: int, kind: str, loss: float, asked: list[list[Question]], right: list[list[bool]], seconds: float
) -> None:
    """A line a step: right answers of each kind of question."""
    by: dict[str, list[bool]] = defaultdict(list)
    for several, hits in zip(asked, right, strict=True):
        for question, hit in zip(several, hits, strict=True):
            by[question.kind].append(hit)
    said = " ".join(f"{k}={sum(h)}/{len(h)}" for k, h in sorted(by.items()))
    with path.open("a", newline="") as f:
        csv.writer(f).writerow([step, kind, f"{loss:.4f}", said, f"{seconds:.0f}"])
    if step % 10 == 0:
        print(f"step {step:5} {kind:7} loss {loss:.3f} {said} {seconds:6.0f} s", flush=True)


if __name__ == "__main__":
    main()

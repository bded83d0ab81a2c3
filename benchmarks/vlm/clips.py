"""Methods for clips on a real VLM at a quarter, a tenth and a twentieth of the visual tokens: exact answers, times.

    python -m benchmarks.zoo.fetch dinov2 smollm2 photos fashion questions
    python -m benchmarks vlm/train_questions --folder questions      # the projector, where not the one of the zoo
    python -m benchmarks vlm/clips --dtype bfloat16 --threads 1 --out vlm.csv
    python -m benchmarks vlm/clips --frames 32 --shares 0.1 --clips 10 --methods vidcom2,random_visual --out vlm.csv
    python -m benchmarks vlm/clips --answers --restore --dtype bfloat16 --threads 1 --out vlm.csv
    python -m benchmarks vlm/clips --times --restore --asked what --clips 5 --pairs 1 --shares 0.1 --out vlm.csv
    python -m benchmarks vlm/clips --quick --out /tmp/vlm.csv

The model is that of ``benchmarks/vlm/train_questions.py``: DINOv2, a projector, SmolLM2-135M, as LLaVA-OneVision takes
clips. A clip shows a piece of clothing that moves over a photo; asked is ``what`` moves, which ``way``, and ``when`` it
is seen, in rows of their own. An answer is right word for word; without looking, a tenth, a quarter and a third are.

Beside the methods stand tokens drawn by chance, every so-many-th token, fewer frames with all of their tokens, and
smaller frames. ``tokens_left`` is the number of visual tokens at the input of the last layer, of the first batch;
``seconds`` a whole answer, and ``tower_seconds``, ``selection_seconds``, ``prompt_seconds`` its parts, paired with the
unpatched model's on ``--pairs`` of the batches.

``--answers`` leaves times out, which spares most of the time: the tower's blocks run once a batch for all methods.
``--restore`` adds RESTORE around each method that keeps tokens (of FastVID, FlashVID and VisionZip around the part that
does; around HoliTom it only calibrates), at as many tokens; with ``--answers`` the rows say what it adds on the same
questions (``exact_lift``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import measured, threads
from benchmarks.saving import known, save, saving
from benchmarks.vlm.answers import exact
from benchmarks.vlm.clip_answers import judged, lifted
from benchmarks.zoo import carriers, questions, vlm
from benchmarks.zoo.questions import Asked

# What leaves a share of the visual tokens, by name; of methods in two stages, the first one with and without the other.
METHODS: dict[str, Callable[[float], str]] = {
    "random_visual": "random_visual budget={0:g}".format,
    "uniform_visual": "uniform_visual budget={0:g}".format,
    "uniform_frames": "uniform_frames budget={0:g}".format,
    "downsample_visual": "downsample_visual budget={0:g}".format,
    "divprune": "divprune budget={0:g}".format,
    "visionzip": "visionzip budget={0:g}".format,
    "fastervlm": "fastervlm budget={0:g}".format,
    "fastv": lambda share: f"fastv layer=2 ratio={1 - share:g}",
    "dycoke": lambda share: f"dycoke ratio={1 - share:g}",
    "evs": lambda share: f"evs ratio={1 - share:g}",
    "vidcom2": lambda share: f"vidcom2 ratio={1 - share:g}",
    "vcast": "vcast budget={0:g}".format,
    "fastvid": "fastvid budget={0:g}".format,
    "flashvid": "flashvid budget={0:g}".format,
    "framefusion": "framefusion cost={0:g}".format,
    "holitom": "holitom budget={0:g}".format,
    "prunevid": "prunevid clusters={0:g}".format,
    "earlytom": "earlytom budget={0:g} layers=4,10".format,  # of 12 blocks, as 8, 21 and 23 are of 24
}
# What RESTORE goes around, by the name of the method: of those that merge what leaves, the part that keeps tokens; of
# HoliTom, which of still scenes drops too few to be merged, all of it.
RESTORED = {
    **{n: n for n in ("random_visual", "uniform_visual", "uniform_frames", "divprune", "fastervlm", "dycoke", "evs")},
    **{n: n for n in ("vidcom2", "vcast")},
    "holitom": "holitom gamma=1.0",
    "visionzip": "'visionzip contextual=0'",
    "fastvid": "'fastvid context=0'",
    "flashvid": "'flashvid picked=1'",
}


def settings(names: Sequence[str], shares: Sequence[float], restore: bool = False) -> dict[str, str]:
    """Settings as they are typed, by what stands in the table.

    Args:
        names: of methods.
        shares: of the visual tokens, that are left.
        restore: beside each that :data:`RESTORED` has also RESTORE around it.

    Raises:
        ValueError: a name is not among :data:`METHODS`.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"methods must be among {', '.join(METHODS)}; got {', '.join(unknown)}")
    found = {}
    for share in shares:  # a run that is broken off has all methods at the first
        for name in names:
            found[f"{name} share={share:g}"] = METHODS[name](share)
            if restore and name in RESTORED:
                found[f"restore base={name} share={share:g}"] = f"restore base={RESTORED[name]} budget={share:g}"
    return found


def batches(model: Any, tokenizer: Any, asked: Asked, kind: str, size: int) -> list[dict[str, Any]]:
    """Arguments of ``generate`` with the right answers, of one kind of question."""
    chosen, found = [q for q in asked.questions if q.kind == kind], []
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size]
        clips = asked.images[[q.picture for q in part]]
        given = vlm.clip_inputs(tokenizer, clips, [vlm.asked(q.text) for q in part], model.dtype)
        found.append({**given, "answers": [q.answer for q in part], **vlm.ends(tokenizer)})
    return found


def main() -> None:
    """Measure, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=30, help="three questions about each")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=2, help="batches of each kind timed beside the unpatched model")
    parser.add_argument("--methods", default=",".join(METHODS), help="names, with commas")
    parser.add_argument("--shares", default="0.25,0.1,0.05")
    parser.add_argument("--projector", type=Path, default=vlm.CLIPS, help="what was trained: a safetensors file")
    parser.add_argument("--asked", default=",".join(questions.ASKED), help="kinds of questions, with commas")
    parser.add_argument("--restore", action="store_true", help="beside each method also RESTORE around it")
    parser.add_argument("--answers", action="store_true", help="no times: what all methods share runs once a batch")
    parser.add_argument("--times", action="store_true", help="no answers: times alone")
    parser.add_argument("--quick", action="store_true", help="2 clips, one share")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    parser.add_argument("--values", type=Path, help="folder of tables by which a run that was broken off goes on")
    saving(parser)
    given = parser.parse_args()
    if not given.projector.exists():
        parser.error(f"--projector: there is no {given.projector}; vlm/train_questions makes one, in its --folder")
    kinds = given.asked.split(",")
    known(parser, "kinds of questions", kinds, questions.ASKED)
    threads(given.threads)
    shares = (0.25,) if given.quick else tuple(map(float, given.shares.split(",")))
    count, pairs = (2, 1) if given.quick else (given.clips, given.pairs)
    chosen = settings(given.methods.split(","), shares, given.restore)
    model, tokenizer = vlm.build_video(given.projector)
    model.to(getattr(torch, given.dtype))
    asked = questions.clips("test", count, given.frames)
    source = {
        "name": f"dinov2-smollm2-135m-{given.projector.stem.removeprefix('vlm_')}",
        "data_from": carriers.cited("dinov2", "smollm2", "photos", "fashion"),
    }
    if given.answers:
        data = {kind: batches(model, tokenizer, asked, kind, given.batch) for kind in kinds}
        head = {"model": source["name"], "frames": given.frames}
        rows = []
        for part in judged(model, tokenizer, chosen, data, head, source["data_from"]):
            save(part, "clips", given)
            rows += part
            said = ", ".join(f"{row['asked']} {row['exact']:.2f}" for row in part)
            print(f"{part[0]['method']} {part[0]['setting']}: {said}", flush=True)
        print(lifted(rows))
        return
    for kind in kinds:
        data = batches(model, tokenizer, asked, kind, given.batch)
        more = {"frames": given.frames, "asked": kind}
        values = None if given.values is None else given.values / f"{kind}_{given.frames}"
        options = {"run": "generate", "tokenizer": tokenizer, "max_new_tokens": 4, "values": values, "more": more}
        rows = measured(model, chosen, data, {"exact": exact}, rounds=pairs, pairs=pairs, **source, **options)
        text = data[0]["input_ids"].shape[1] - given.frames * vlm.FRAME - 1
        for row in rows:
            row["tokens_left"] = row["tokens_out"] - text
            print(
                f"{kind}: {row['method']} {row['setting']}: {row['exact']:.2f}, {row.get('speedup', 1):.2f}x",
                flush=True,
            )
        if given.times:
            rows = [{k: v for k, v in row.items() if not k.startswith(("exact", "tokens_left"))} for row in rows]
        save(rows, "clips", given)


if __name__ == "__main__":
    main()

"""The rows of ``tokred demo`` as they stand in the table: the embedded model under four methods at several amounts.

python -m benchmarks encoder/demo --threads 2 --out benchmarks/results/encoder.csv --overwrite
python -m benchmarks encoder/demo --quick
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.engine import Record, measured, threads
from benchmarks.saving import save, saving
from tokred.bench import demo, embedded


def measure(count: int, batch: int, counts: tuple[int, ...], rounds: int, values: Path | None) -> list[Record]:
    """One row a setting, the unpatched model first."""
    model, sample = embedded.load(), embedded.sample(count)
    arms = {arm.label: arm for arm in demo.choose(model, counts=counts)}
    batches = list(zip(sample.images.split(batch), sample.labels.split(batch), strict=True))
    methods = [label for label, arm in arms.items() if arm.method is not None]
    metrics = {"top1": "top1", "agreement": "agreement"}
    more = {"batch": batch}
    rows = measured(model, methods, batches, metrics, name="embedded", more=more, rounds=rounds, values=values)
    for row in rows:
        arm = arms[f"{row['method']} {row['setting']}".strip()]
        row |= {"tokens_in": arm.tokens_in, "tokens_out": arm.tokens_out, "gmacs": arm.macs / 1e9}
        row |= {"images_per_second": batch / row.pop("seconds")}
    return rows


def main() -> None:
    """Measure, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=20, help="times that each pair is at least timed")
    parser.add_argument("--quick", action="store_true", help="100 images, two amounts")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--values", type=Path, help="folder of tables by which a run that was broken off goes on")
    saving(parser)
    given = parser.parse_args()
    threads(given.threads)
    counts, count = (demo.QUICK_COUNTS, 100) if given.quick else (demo.COUNTS, given.images)
    save(measure(count, given.batch, counts, given.rounds, given.values), "demo", given)


if __name__ == "__main__":
    main()

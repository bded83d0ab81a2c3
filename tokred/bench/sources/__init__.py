"""Models and data by name, as they are typed on the command line.

source = sources.model("hf:path/to/a/llama")
given = sources.data(source, "book.txt")
tokred.benchmark(given.model, ["snapkv budget=0.5"], given.batches, given.metric, run=given.run)
"""

from tokred.bench.sources.given import Wanted, data
from tokred.bench.sources.named import FORMS, model, skeleton
from tokred.bench.sources.record import KINDS, Data, NoModelError, Options, Reading, Source

__all__ = [
    "FORMS",
    "KINDS",
    "Data",
    "NoModelError",
    "Options",
    "Reading",
    "Source",
    "Wanted",
    "data",
    "model",
    "skeleton",
]

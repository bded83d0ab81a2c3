"""Real pretrained weights and real data, read from packages of public registries that happen to carry them.

Nothing here imports the code of those packages: a package is only a carrier of files, pinned by version and hash in
:mod:`benchmarks.zoo.carriers`. One module per model (``dinov2``, ``smollm2``, ``terrain``, ``minilm``, ``whisper``),
``data`` for pictures, text, speech and videos, ``evaluate`` for measures of quality on frozen features, and ``fetch``
to download what is missing::

    python -m benchmarks.zoo.fetch --small

No module of the zoo imports a host library before one of its functions is called.
"""

from benchmarks.zoo.carriers import Carrier, MissingWeights, WrongHash, open_carrier, zoo_folder

__all__ = ["Carrier", "MissingWeights", "WrongHash", "open_carrier", "zoo_folder"]

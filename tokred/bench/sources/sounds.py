"""Recordings for Whisper and audio encoders: folders of WAV files, with transcripts where there are some."""

from __future__ import annotations

import importlib
import io
import random
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred.bench.sources import pictures, tables
from tokred.bench.sources.lazily import Lazily
from tokred.bench.sources.record import Data, Source, first_line

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
TEXT = ("text", "transcript", "transcription", "sentence", "answer")
COUNT = 100
RATE = 16000


class Recording(NamedTuple):
    """A recording that is not read yet: a file or bytes, and its transcript, or None."""

    sound: Path | bytes
    text: str | None


def speech(source: Source, spec: str | None, wanted: Any) -> Data:
    """Features for a model that writes down what it hears, with transcripts where there are some.

    Args:
        source: the model, with its processor.
        spec: a folder of recordings (a transcript is ``NAME.txt`` beside ``NAME.wav``), or a table with the columns
            audio and text.
        wanted: :class:`~tokred.bench.sources.given.Wanted`.

    Raises:
        FileNotFoundError, ValueError, ImportError: there are no such recordings, or no processor.
    """
    found, name = _chosen(source, spec, wanted)
    labelled = all(one.text is not None for one in found)
    features = extractor(source)

    def make(some: Sequence[Recording]) -> dict[str, Any]:
        batch = _features(source, features, some)
        if labelled:
            batch["answers"] = [one.text for one in some]
        return batch

    metric = source.usual.metric if labelled else source.usual.bare
    options = {"tokenizer": source.tokenizer or source.processor}
    batches = Lazily(found, wanted.batch or 1, make)
    notes = [] if labelled else ["there are no transcripts: texts are compared with those of the unpatched model"]
    return Data(batches, name, metric, "generate", source.model, labelled, notes, options)


def encoder(source: Source, spec: str | None, wanted: Any) -> Data:
    """Features for an audio encoder.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`speech`.
    """
    features = extractor(source)
    if spec == pictures.NOISE:
        pictures.check_alone(spec)
    if spec == pictures.NOISE or (spec is None and source.weights == "random"):
        generator = torch.Generator().manual_seed(wanted.seed)
        rows = [torch.randn(RATE * 5, generator=generator).clamp(-1, 1) / 4 for _ in range(8)]
        batches = Lazily(rows, wanted.batch or 4, lambda some: _extracted(source, features, some))
        return Data(batches, pictures.NOISE, "cosine", "forward", source.model)
    found, name = _chosen(source, spec, wanted)
    batches = Lazily(found, wanted.batch or 1, lambda some: _features(source, features, some))
    return Data(batches, name, "agreement" if source.classes else "cosine", "forward", source.model)


def extractor(source: Source) -> Any:
    """The part of a processor that makes features of sound.

    Raises:
        ValueError: the model came without.
    """
    found = getattr(source.processor, "feature_extractor", source.processor)
    if found is None:
        raise ValueError(
            f"{source.name} came without a feature extractor: save its processor beside the weights, or let the "
            "function that makes the model return (model, processor)"
        )
    return found


def _features(source: Source, features: Any, some: Sequence[Recording]) -> dict[str, Any]:
    rate = int(getattr(features, "sampling_rate", RATE))
    return _extracted(source, features, [waveform(one.sound, rate) for one in some])


def _extracted(source: Source, features: Any, waves: Sequence[Tensor]) -> dict[str, Any]:
    rate = int(getattr(features, "sampling_rate", RATE))
    given = features([one.numpy() for one in waves], sampling_rate=rate, return_tensors="pt")
    floating = next(source.module.parameters()).dtype
    wanted = getattr(source.model, "main_input_name", "input_features")
    return {k: v.to(floating) if v.is_floating_point() else v for k, v in given.items() if k == wanted}


def _chosen(source: Source, spec: str | None, wanted: Any) -> tuple[list[Recording], str]:
    if spec is None:
        raise ValueError(f"{source.name} brings no recordings along: give --data with {source.usual.data}")
    found, name = listed(spec)
    order = sorted(random.Random(wanted.seed).sample(range(len(found)), min(wanted.count or COUNT, len(found))))
    return [found[i] for i in order], f"{name}, {len(order)} recordings"


def listed(spec: str) -> tuple[list[Recording], str]:
    """Recordings of a folder or a table, and its name.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a column is missing.
    """
    if tables.is_table(spec):
        rows = tables.rows(spec)
        sound, text = rows.column(("audio", "file", "path", "sound"), "recording"), rows.has(TEXT)
        table: Any = rows.rows
        if hasattr(table, "cast_column"):
            import datasets

            if isinstance(table.features[sound], datasets.Audio):  # its bytes are read here, without a decoder
                table = table.cast_column(sound, datasets.Audio(decode=False))
        return [_row(row, sound, text, rows.folder) for row in table], rows.name
    path = Path(spec)
    if not path.is_dir():
        raise FileNotFoundError(f"{spec!r} is neither a folder of recordings, a table (.jsonl, .csv) nor hfds:NAME")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{path} holds no recording ({', '.join(SUFFIXES)})")
    return [Recording(file, _beside(file)) for file in files], str(path)


def _row(row: Any, sound: str, text: str | None, folder: Path | None) -> Recording:
    value, words = row[sound], None if text is None else str(row[text])
    if isinstance(value, dict):
        if value.get("bytes"):
            return Recording(value["bytes"], words)
        value = value["path"]
    path = Path(value)
    return Recording(path if path.is_absolute() or folder is None else folder / path, words)


def _beside(file: Path) -> str | None:
    text = file.with_suffix(".txt")
    return text.read_text("utf8").strip() if text.is_file() else None


def waveform(sound: Path | bytes, rate: int) -> Tensor:
    """A recording as one channel ``(N,)`` float32 in -1..1, at ``rate`` samples a second.

    Raises:
        ValueError: it cannot be read.
        ImportError: it is no WAV file, and soundfile is not installed.
    """
    try:
        plain = isinstance(sound, bytes) or sound.suffix.lower() == ".wav"
        read: Callable[[Any], tuple[Tensor, int]] = _wave if plain else _other
        found, own = read(sound)
    except (OSError, EOFError, wave.Error, RuntimeError, ValueError) as error:
        name = "a recording" if isinstance(sound, bytes) else str(sound)
        raise ValueError(f"{name} cannot be read as sound: {first_line(error)}") from error
    return resampled(found, own, rate)


def _wave(sound: Path | bytes) -> tuple[Tensor, int]:
    with wave.open(io.BytesIO(sound) if isinstance(sound, bytes) else str(sound)) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        raw = bytearray(file.readframes(file.getnframes()))
    if width not in (1, 2, 4) or not raw:
        raise ValueError(f"{8 * width} bits a sample, {len(raw)} bytes: 8, 16 and 32 bits are read")
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[width]
    x = torch.frombuffer(raw, dtype=kind).float()
    x = (x - 128) / 128 if width == 1 else x / 2 ** (8 * width - 1)
    return x.view(-1, channels).mean(1), rate


def _other(sound: Path) -> tuple[Tensor, int]:
    try:
        soundfile = importlib.import_module("soundfile")
    except ImportError as error:
        raise ImportError(f"{sound} needs soundfile: pip install soundfile, or give WAV files") from error
    x, rate = soundfile.read(str(sound), dtype="float32", always_2d=True)
    return torch.from_numpy(x).mean(1), int(rate)


def resampled(x: Tensor, own: int, rate: int) -> Tensor:
    """A waveform ``(N,)`` at another rate: its spectrum, cut off or filled up with zeros."""
    if own == rate:
        return x
    count = max(1, round(len(x) * rate / own))
    spectrum = torch.fft.rfft(x)
    bins = count // 2 + 1
    kept = torch.zeros(bins, dtype=spectrum.dtype)
    kept[: min(bins, len(spectrum))] = spectrum[:bins]
    found: Tensor = torch.fft.irfft(kept, n=count) * (count / len(x))
    return found

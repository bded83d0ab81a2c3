"""Models for lm-eval: one that answers for the dense model and all methods at once, and one by name, ``tokred``.

Imported where lm-eval is installed.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from tokred import api
from tokred.bench.arms import BASE
from tokred.bench.entries import Cost, Entry
from tokred.bench.rivals import of_equal_work
from tokred.bench.timing import spread, synchronise
from tokred.core.method import Method
from tokred.eval.answers import Answers, key_of
from tokred.eval.needed import typed_methods

DENSE = Entry(BASE, "")


def refuse(requests: Sequence[Any], what: str) -> None:
    """Refuse likelihoods of a model whose cache alone is reduced.

    Raises:
        ValueError: always.
    """
    names = ", ".join(sorted({str(getattr(r, "task_name", None)) for r in requests}))
    raise ValueError(
        f"{what} of {names}: likelihoods are read in one forward, which never reads the reduced cache; run tasks of "
        "output_type generate_until"
    )


class Several(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """A model that answers each batch as the dense model and with each method, and hands out one's answers at a time.

    Attributes:
        arms: the dense model, the methods and, from the first batch on, the baselines.
        position: the arm whose answers lm-eval is given.
        refused: for arms that cannot run, the reason.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        wanted: Sequence[Entry],
        *,
        batch_size: int,
        baselines: bool,
        seed: int,
        progress: bool = True,
        kept: Answers | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.arms = [DENSE, *wanted]
        self.position = 0
        self.refused: dict[str, str] = {}
        self._baselines, self._draw, self._progress = baselines, random.Random(seed), progress
        self._answers: dict[str, list[str]] = {}
        self._kept = kept or Answers(None)
        self._asked: list[tuple[Any, ...]] = []
        self._seconds = 0.0
        # For each arm and task: seconds of each batch, samples of each batch, what the cache held.
        self._batches: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        self._lengths: dict[tuple[str, str], list[tuple[Any, int]]] = defaultdict(list)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return refuse(requests, "loglikelihood")

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return refuse(requests, "loglikelihood_rolling")

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        synchronise(self.device)
        start = time.perf_counter()
        found = super()._model_generate(context, *args, **kwargs)
        synchronise(self.device)
        self._seconds += time.perf_counter() - start
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The answers of the arm at :attr:`position`; the first call asks all of them."""
        asked = [(r.task_name, r.doc_id, r.idx, r.args[0]) for r in requests]
        if not self._answers:
            self._asked = asked
            self._ask_all(requests)
        if asked != self._asked:
            raise RuntimeError("lm-eval asked other prompts for this row than for the dense model")
        return self._answers[self.arms[self.position].label]

    def _ask_all(self, requests: Any) -> None:
        chunks = self._chunks(requests)
        self._warm_up(requests[chunks[0][0]].args[0])
        answers = {one.label: [""] * len(requests) for one in self.arms}
        for indices in tqdm(chunks, desc=f"{len(self.arms)} rows", unit="batch", disable=not self._progress):
            order = list(self.arms)
            self._draw.shuffle(order)
            for one in order:
                if one.label not in self.refused:
                    self._ask(one, [requests[i] for i in indices], indices, answers[one.label])
        self._answers = answers

    def _chunks(self, requests: Any) -> list[list[int]]:
        """Positions of requests that are answered together: of one task and one set of options, of like length."""
        lengths = [len(self.tok_encode(r.args[0])) for r in requests]

        def kind(i: int) -> tuple[str, str]:
            return str(requests[i].task_name), repr(requests[i].args[1])

        order = sorted(range(len(requests)), key=lambda i: (kind(i), -lengths[i], i))
        size = int(self.batch_size)
        chunks = []
        for _, group in itertools.groupby(order, key=kind):
            members = list(group)
            chunks += [members[i : i + size] for i in range(0, len(members), size)]
        return chunks

    def _warm_up(self, prompt: str) -> None:
        """One forward that is not timed; and the baselines, which cost what the methods do on this prompt."""
        ids, mask = self.tok_batch_encode([prompt], left_truncate_len=self.max_length - 1)
        given = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        once = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}

        def cost(one: Entry) -> Cost:
            with torch.inference_mode(), one.applied(self.model):
                self.model.generate(**given, **once)
                report: Any = api.report(self.model)
            return {"bytes": report.bytes, "dense_bytes": report.dense_bytes}

        with torch.inference_mode():
            self.model(**given)
        known = []
        for one in self.arms[1:]:
            # Whoever cannot run here is told of by its row.
            with suppress(Exception):
                known.append((one, cost(one)))
        if self._baselines:
            self.arms += of_equal_work(known, lambda methods: cost(Entry("rival", "", tuple(methods))))

    def _ask(self, one: Entry, requests: list[Any], indices: list[int], answers: list[str]) -> None:
        key = key_of(one.label, requests)
        found = self._kept.get(key)
        if found is None:
            found = self._measured(one, requests)
            if found is None:
                return
            self._kept.put(key, found)
        task = str(requests[0].task_name)
        said = found["answers"]
        numbers = {name: value for name, value in found.items() if name != "answers"}
        self._batches[one.label, task].append({**numbers, "samples": len(requests), "indices": tuple(indices)})
        for i, request, answer in zip(indices, requests, said, strict=True):
            answers[i] = answer
            length = len(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
            self._lengths[one.label, task].append((request.doc_id, length))

    def _measured(self, one: Entry, requests: list[Any]) -> dict[str, Any] | None:
        """A row's answers to a batch, and what they took; None where it cannot run, which is noted."""
        self._seconds = 0.0
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            with one.applied(self.model):
                said = super().generate_until(requests, disable_tqdm=True)
                held = self._held(len(requests)) if one.methods else {}
        except Exception as error:
            if not one.methods:
                raise
            self.refused[one.label] = " ".join(str(error).split()) or type(error).__name__
            return None
        found: dict[str, Any] = {"answers": said, "seconds": self._seconds, **held}
        if cuda:
            found["peak_mib"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        return found

    def _held(self, samples: int) -> dict[str, float]:
        """Rows of a layer, and bytes for a sample, that the cache holds after the last ``generate``."""
        report: Any = api.report(self.model)
        if not hasattr(report, "dense_bytes"):  # of methods of several stages
            return {}
        rows = sum(layer.rows for layer in report.layers) / len(report.layers)
        return {"rows": rows, "bytes": report.bytes / samples, "dense_bytes": report.dense_bytes / samples}

    def lengths(self, label: str, task: str) -> list[tuple[Any, int]]:
        """Sample and tokens of each answer."""
        return self._lengths[label, task]

    def measured(self, label: str, task: str) -> dict[str, Any]:
        """Columns of a row that tell of length, time and memory; empty for groups."""
        mine, base = self._batches[label, task], self._batches[BASE, task]
        if not mine:
            return {}
        total = sum(b["samples"] for b in mine)
        lengths = [length for _, length in self._lengths[label, task]]
        found: dict[str, Any] = {"length": sum(lengths) / len(lengths), "seconds": sum(b["seconds"] for b in mine)}
        times = {b["indices"]: b["seconds"] for b in base}
        ratio = spread([times[b["indices"]] / b["seconds"] for b in mine])
        found |= {"speedup": ratio.median, "speedup_low": ratio.low, "speedup_high": ratio.high}
        for name in ("rows", "bytes", "dense_bytes"):
            if all(name in b for b in mine):
                found[name] = sum(b[name] * b["samples"] for b in mine) / total
        if all("peak_mib" in b for b in mine):
            found["peak_mib"] = max(b["peak_mib"] for b in mine)
        return found


@register_model("tokred")
class Patched(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """``--model tokred`` of lm-eval: a model of transformers, patched once it is loaded.

    Args:
        pretrained: as for lm-eval's ``hf``.
        method: ``"snapkv budget=0.25"``, or several with ``" + "`` between them; "": the dense model.
        rest: as for lm-eval's ``hf``.
    """

    def __init__(self, pretrained: Any, method: str = "", **rest: Any) -> None:
        methods: list[Method] = typed_methods(method) if method else []
        super().__init__(pretrained=pretrained, **rest)
        if methods:
            api.apply(self.model, methods)

    def _check(self, requests: Any, what: str) -> None:
        if {m.stage for m in api.patched(self.model)} == {"cache"}:
            refuse(requests, what)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._check(requests, "loglikelihood")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._check(requests, "loglikelihood_rolling")
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

"""Questions on long texts: asked inside the prompt, and after the context was compressed."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.eval import tiny
from tokred.adapters.contract import cache_name
from tokred.bench.outputs import Generated

TOKENIZER = tiny.tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny.model()


def data(count=6):
    return [
        {"context": text + " ", "question": f"w{i + 5} w9", "answer_prefix": " w3", "answer": [f"w{i}", "w9"],
         "max_new_tokens": 4 + i % 2, "task": "niah"}
        for i, text in enumerate(tiny.prompts(count))
    ]  # fmt: skip


def qa(**options):
    return tokred.eval.context_qa(data(), TOKENIZER, **options)


def said(model, found):
    with torch.inference_mode():
        return [text for batch in found for text in found.run(model, batch).texts]


def test_both_ways_ask_the_dense_model_the_same(model):
    """A full cache does not care when the question comes."""
    inside, after = (said(model, qa(question=way)) for way in ("inside", "after"))
    assert inside == after
    assert len(set(inside)) > 3
    batch = next(iter(qa(batch_size=3)))
    prompts = [TOKENIZER.decode(ids[mask.bool()]) for ids, mask in zip(batch["input_ids"], batch["attention_mask"],
                                                                       strict=True)]  # fmt: skip
    assert prompts[0] == "<s> " + data()[0]["context"].strip() + " w5 w9 w3"
    apart = next(iter(qa(batch_size=3, question="after")))
    assert torch.equal(torch.cat([apart["input_ids"], apart["question_ids"]], 1)[2], batch["input_ids"][2])


@pytest.mark.parametrize("way", ["inside", "after"])
@pytest.mark.parametrize("method", [None, "snapkv budget=0.3 window=4", "keydiff budget=0.4", "h2o budget=0.4"])
def test_a_batch_with_padding_answers_as_one_at_a_time(model, way, method):
    with tokred.applied(model, tokred.bench.entries.entry(method).methods[0]) if method else torch.no_grad():
        alone, together = (said(model, qa(question=way, batch_size=size)) for size in (1, 4))
    assert alone == together


@pytest.mark.parametrize("method", ["snapkv budget=0.3 window=4", "kvzip budget=0.4"])
def test_after_the_compression_the_question_is_kept_whole(model, method):
    """The policy acts on the context alone; the question and the answer are appended."""
    one = data()[5:]
    after, inside = (tokred.eval.context_qa(one, TOKENIZER, question=way) for way in ("after", "inside"))
    batch = next(iter(after))
    context, question = batch["input_ids"].shape[1], batch["question_ids"].shape[1]
    policy = tokred.bench.entries.entry(method).methods[0]
    with torch.inference_mode(), tokred.applied(model, policy):
        output = after.run(model, batch)
        rows = tokred.report(model).layers[0].rows
        cache = tokred.kv_cache(model)
        model(batch["input_ids"], **{cache_name(type(model).forward): cache})
        kept = cache.layers[0].keys.shape[2]
        assert kept < context
        # The last token of the answer is never fed.
        assert rows == kept + question + output.ids.shape[1] - 1
        inside.run(model, next(iter(inside)))
        assert tokred.report(model).layers[0].rows < rows


def test_a_benchmark_of_both_ways(model):
    for way in ("inside", "after"):
        found = qa(question=way, batch_size=2)
        result = tokred.benchmark(
            model, ["snapkv budget=0.3 window=4"], found, found.string_match, run=found.run, rounds=1, progress=False,
            baselines=False,
        )  # fmt: skip
        dense, mine = result.rows
        answers = [answer for batch in found for answer in batch["answers"]]
        expected = [tokred.eval.string_match(*pair) for pair in zip(said(model, found), answers, strict=True)]
        assert dense["quality"] == pytest.approx(sum(expected) / 6)
        assert mine["bytes"] < dense["bytes"]
        assert (dense["samples"], mine["metric"]) == (6, "string_match")


def test_a_prompt_with_its_question_is_what_generate_takes(model):
    """Where the question stands inside, the benchmark's own way of generating gives the same scores."""
    found = qa(batch_size=2)
    options = {"rounds": 1, "progress": False, "baselines": False}
    ours, theirs = (
        tokred.benchmark(model, ["snapkv budget=0.3 window=4"], found, found.string_match, **options, **how)
        for how in ({"run": found.run}, {"run": "generate", "tokenizer": TOKENIZER})
    )
    assert [row["quality"] for row in ours.rows] == [row["quality"] for row in theirs.rows]


def test_rulers_score():
    match = tokred.eval.string_match
    assert match("The keys are 12 and ABC.", ["12", "abc"]) == 1
    assert match("only 12", ["12", "abc"]) == 0.5
    assert match("only 12", ["12", "abc"], every=False) == 1
    assert match("", ["12"], every=False) == 0
    output = Generated(torch.zeros(2, 1), (1, 1), ("w1 w7", "w2"))
    for task, how, expected in (("niah_1", "auto", [0.5, 0.5]), ("qa_1", "auto", [1, 1]), ("qa_1", "all", [0.5, 0.5]),
                                ("niah_1", "any", [1, 1])):  # fmt: skip
        rows = [{**one, "task": task, "answer": ["w1", "w2"]} for one in data(2)]
        found = tokred.eval.context_qa(rows, TOKENIZER, batch_size=2, match=how, max_new_tokens=1)
        assert found.string_match(output, next(iter(found))).tolist() == expected
    with pytest.raises(ValueError, match=r"give run=qa\.run, or tokenizer="):
        found.string_match(Generated(output.ids, output.lengths), next(iter(found)))


def test_data_of_every_form(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in data()), "utf-8")
    forms = [data(), iter(data()), file, str(file)]
    if pandas := pytest.importorskip("pandas"):
        forms.append(pandas.DataFrame(data()))
    if datasets := pytest.importorskip("datasets"):
        forms.append(datasets.Dataset.from_list(data()))
    batches = [list(tokred.eval.context_qa(form, TOKENIZER, batch_size=4)) for form in forms]
    for other in batches[1:]:
        for a, b in zip(batches[0], other, strict=True):
            assert torch.equal(a["input_ids"], b["input_ids"])
            assert [a[k] for k in ("answers", "max_new_tokens", "group")] == [
                b[k] for k in ("answers", "max_new_tokens", "group")
            ]
    assert len(qa(batch_size=4)) == len(list(qa(batch_size=4))) == 2, "three of each length"
    assert len(qa(limit=3)) == 3
    assert next(iter(qa(max_context=5, question="after")))["input_ids"].shape == (1, 5)
    assert next(iter(qa(max_new_tokens=2)))["max_new_tokens"] == 2
    plain = tokred.eval.context_qa([{"context": "w1", "question": "w2", "answer": 7}], TOKENIZER, max_new_tokens=1)
    assert next(iter(plain))["answers"] == [["7"]]


def test_a_chat_template_is_cut_where_the_question_begins():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "<s> {% for m in messages %}w70 {{ m['content'] }} w71 {% endfor %}{% if add_generation_prompt %}w72{% endif %}"
    )
    batch = next(iter(tokred.eval.context_qa(data(1), tokenizer, question="after", chat=True)))
    context = data(1)[0]["context"].strip()
    assert tokenizer.decode(batch["input_ids"][0]) == f"<s> w70 {context}"
    assert tokenizer.decode(batch["question_ids"][0]) == "w5 w9 w71 w72 w3"
    with pytest.raises(ValueError, match="this one has none"):
        qa(chat=True)


@pytest.mark.parametrize(
    ("rows", "options", "error", "words"),
    [
        ([], {}, ValueError, "no sample"),
        ([{"context": "w1", "question": "w2"}], {}, ValueError, "sample 0 of data has no answer"),
        ([{"context": "w1", "question": "w2", "answer": "w"}], {}, ValueError, "give max_new_tokens="),
        ([{"context": "w1", "question": "w2", "answer": []}], {"max_new_tokens": 2}, ValueError, "empty list"),
        ([{"context": "w1", "question": "", "answer": "w"}], {"max_new_tokens": 2}, ValueError, "empty context"),
        (["text"], {}, TypeError, "no dictionary, but str"),
        ("data.parquet", {}, ValueError, r"\.jsonl file"),
        ({"context": "w1"}, {}, TypeError, "got dict"),
        (None, {"question": "before"}, ValueError, "question"),
        (None, {"match": "some"}, ValueError, "match"),
        (None, {"batch_size": 0}, ValueError, "batch_size must be a whole number"),
        (None, {"limit": True}, ValueError, "limit must be a whole number"),
    ],
)
def test_bad_input(rows, options, error, words):
    with pytest.raises(error, match=words):
        tokred.eval.context_qa(data() if rows is None else rows, TOKENIZER, **options)


def test_a_tokenizer_is_wanted():
    with pytest.raises(TypeError, match="tokenizer of transformers, got NoneType"):
        tokred.eval.context_qa(data(), None)

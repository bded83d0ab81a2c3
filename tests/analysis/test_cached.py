"""Drawings of caches: the rows that the cache really holds, over the tokens that they are of."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.analysis.pages import NASTY, ran, sound
from tokred.adapters.tiny import kv
from tokred.analysis import viz
from tokred.analysis.viz.spelled import pieces_of
from tokred.analysis.viz.typeset import lines_of


class Spelling:
    """A tokenizer of bytes, whose tokens may be parts of characters."""

    chat_template = None

    def __call__(self, text, **options):
        return {"input_ids": [3 + b % 92 for b in text.encode()]}

    def decode(self, ids, **options):
        return bytes(ids).decode("utf8", errors="replace")

    def convert_ids_to_tokens(self, ids):
        return [f"<{i}>" for i in ids]


def drawn(*methods, **options):
    return viz.cache(kv.build("llama"), kv.prompt(20), list(methods), tokens=5, **options)


def test_rows_are_those_of_the_cache():
    model, ids = kv.build("llama"), kv.prompt(20)
    drawing = viz.cache(model, ids, ["streaming_llm budget=9", "snapkv budget=0.5 window=4"], tokens=5)
    window, snap = drawing.runs
    # Four sinks and the newest five, in every layer and of both heads.
    newest = [2 if t < 4 or t >= 15 else 0 for t in range(20)]
    assert window.held[0].tolist() == [newest] * 3
    assert window.heads == snap.heads == (2, 2, 2)
    assert snap.held[0].sum(1).tolist() == [20, 20, 20]
    assert (snap.held[0][:, -4:] == 2).all()
    # The answer's last token has no row yet; policies of the prompt hold all others.
    assert snap.held[1].shape == (3, 20 + 4)
    assert (snap.held[1][:, 20:] == 2).all()
    assert torch.equal(snap.held[1][:, :20], snap.held[0])
    assert tokred.patched(model) == []
    assert snap.share().tolist() == (snap.held[0].sum(0) / 6).tolist()


def test_heads_of_their_own_are_counted_apart():
    (run,) = drawn("keydiff budget=0.5").runs
    assert run.held[0].max() <= 2
    assert (run.held[0] == 1).any()


def test_windows_hold_the_newest_rows():
    drawing = viz.cache(kv.build("gemma3"), kv.prompt(20), "snapkv budget=0.5 window=4", tokens=2)
    (run,) = drawing.runs
    assert run.held[0][0].tolist() == [0] * 13 + [run.heads[0]] * 7
    assert int((run.held[0][1] > 0).sum()) < 20


def test_the_answer_is_the_one_of_generate():
    model, ids = kv.build("llama"), kv.prompt(20)
    drawing = viz.cache(model, ids, "snapkv budget=0.5 window=4", tokens=5)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    with tokred.applied(model, "snapkv", budget=0.5, window=4):
        patched = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert drawing.answer.split() == [str(i) for i in plain[0, 20:].tolist()]
    assert drawing.runs[0].answer.split() == [str(i) for i in patched[0, 20:].tolist()]


def test_pieces_put_together_are_the_text():
    text = "naïve — 日本"
    ids = list(text.encode())
    found = pieces_of(ids, Spelling())
    assert "".join(found) == text
    assert len(found) == len(ids)
    assert found[2:4] == ["ï", ""]
    assert pieces_of([200, 65], Spelling()) == ["\ufffd", "A"]
    assert pieces_of([7, 8], None) == ["7 ", "8 "]


def test_lines_are_no_wider_than_the_page():
    lines = lines_of(["ab", " cd", " efgh", "\n", "x" * 12], 8)
    assert lines == [[(0, 0, "ab"), (1, 2, " cd")], [(2, 0, "efgh")], [(4, 0, "x" * 8)], [(4, 0, "x" * 4)]]


def test_the_page_and_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    drawing = viz.cache(
        kv.build("llama"), "some text " + NASTY, ["snapkv budget=0.5 window=4", "h2o budget=0.5"], tokenizer=Spelling()
    )
    page = sound(drawing.html(NASTY))
    assert page.all("h1")[0][1] == NASTY
    assert [a["max"] for a, _ in page.all("input")] == ["3", "1"]
    assert len(page.data["pieces"]) == len(drawing.pieces)
    path = drawing.save(tmp_path / "a.png", dpi=50)
    with image.open(path) as picture:
        assert min(picture.size) > 100
    assert "srcdoc" in drawing._repr_html_()
    with pytest.raises(ValueError, match=r"must end in \.html, \.png"):
        drawing.save(tmp_path / "a.txt")


def test_the_page_in_a_browser(tmp_path):
    path = drawn("streaming_llm budget=9").save(tmp_path / "a.html")
    lines = ran(
        path,
        """
        const box = document.querySelector(".text");
        said(told(".count"));
        press(document.body, "ArrowRight");
        said(told("#where-0") + ", " + told(".count"));
        press(document.body, "ArrowRight", { shiftKey: true });
        said(told("#where-1") + ", " + told(".count"));
        press(document.body, "ArrowLeft");
        press(box, "ArrowRight");
        said(told(".group"));
        for (let i = 0; i < 8; i += 1) press(box, "ArrowRight");
        said(told(".group") + " " + box.children[8].className);
        press(box, "Escape");
        said("[" + told(".group") + "]");
        said(document.documentElement.scrollWidth <= innerWidth);
        """,
        width=500,
    )
    assert lines[:3] == [
        "54 of 120 rows (45 %)",
        "layer 1 of 3, 18 of 40 rows (45 %)",
        "after the answer, 18 of 48 rows (38 %)",
    ]
    assert lines[3].startswith("Token 1, ")
    assert lines[3].endswith(": held by 6 of 6 heads, in 3 of 3 layers: 1–3.")
    assert lines[4].endswith(": held by 0 of 6 heads, in 0 of 3 layers. none at")
    assert lines[5:] == ["[]", "true"]


def test_no_backend_is_chosen_for_the_user():
    matplotlib = pytest.importorskip("matplotlib")
    before = matplotlib.get_backend()
    matplotlib.use("svg")
    try:
        drawn("streaming_llm budget=9").figure()
        import matplotlib.pyplot as plt

        assert matplotlib.get_backend() == "svg"
        assert plt.get_fignums() == []
    finally:
        matplotlib.use(before)


def test_bad_input_is_refused():
    model, ids = kv.build("llama"), kv.prompt(20)
    with pytest.raises(ValueError, match="give tokenizer="):
        viz.cache(model, "a text", "snapkv")
    with pytest.raises(ValueError, match="one text of at least two tokens"):
        viz.cache(model, kv.prompt(20, b=2), "snapkv")
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        viz.cache(model, ids, "snapkv", tokens=0)
    with pytest.raises(tokred.MissingInputError, match="'fastv' acts at stage 'layer'"):
        viz.cache(model, ids, "fastv")
    with pytest.raises(ValueError, match="no method is given"):
        viz.cache(model, ids, [])
    with pytest.raises(ValueError, match="already patched"):
        viz.cache(tokred.apply(model, "snapkv", budget=0.5), ids, "snapkv budget=0.5")

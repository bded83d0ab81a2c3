"""Pages of methods begin with what a reader takes from them: a sentence, one line on a host, the paper and its code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.test_docs import ROOT, blocks

PAGES = [p for p in sorted((ROOT / "docs" / "methods").rglob("*.md")) if p.parent.name != "methods"]
ARXIV = re.compile(r"\[arXiv (\d{4}\.\d{5})\]\(https://arxiv\.org/abs/(\d{4}\.\d{5})\)")
# They come from no paper: what they are compared with is everything else, or they are no more than plumbing.
BASELINES = {"downsample", "offloaded", "random_prune", "random_latent_prune", "random_visual"}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_a_page_begins_with_one_line_on_a_host(path: Path) -> None:
    text = path.read_text("utf-8")
    head = text[: text.index("\n## ")]
    assert re.match(r"# [^\n]+\n\n(?!Source|```)[A-Z\[].*?\.\s", head, re.DOTALL), (
        "a sentence stands first: what it does"
    )
    first = next(blocks(head))
    assert first.info == "python"
    assert not first.note, "it is run"
    name = "snapkv" if path.stem == "kv" else path.stem
    assert f'\ntokred.apply(model, "{name}"' in first.text
    assert len(first.text.splitlines()) <= 9


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_a_page_links_its_paper(path: Path) -> None:
    text = path.read_text("utf-8")
    found = ARXIV.findall(text)
    assert bool(found) == (path.stem not in BASELINES)
    assert all(shown == address for shown, address in found)
    assert not re.search(r"(?<!\[)arXiv\s+\d{4}\.\d{5}", text), "a paper is named without its address"


def test_the_papers_that_methods_name_are_linked() -> None:
    import tokred

    for name in tokred.list_methods():
        kind = type(tokred.make(name))
        if not kind.__module__.startswith("tokred.methods."):
            continue
        home = ROOT / "docs" / "methods" / kind.__module__.split(".")[2]
        page = next((p for p in (home / f"{name}.md", home / "kv.md", home / "random_visual.md") if p.is_file()), None)
        assert page is not None, name
        linked = {address for _, address in ARXIV.findall(page.read_text("utf-8"))}
        named = set(re.findall(r"arXiv (\d{4}\.\d{5})", kind.source))
        assert named <= linked, f"{page.name} does not link {named - linked}, which {name} names as its source"

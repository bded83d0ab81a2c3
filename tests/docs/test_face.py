"""README and the home page lead to what people come for: ten questions in one click, the page on each in two."""

from __future__ import annotations

import re

import pytest

from tests.docs.test_docs import ROOT, blocks

FAQ = (ROOT / "docs" / "faq.md").read_text("utf-8")
QUESTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", FAQ, re.MULTILINE | re.DOTALL))


def slug(title: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-")


@pytest.mark.parametrize(("page", "folder"), [("README.md", "docs/"), ("docs/index.md", "")])
def test_every_question_is_one_click_away(page: str, folder: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    assert len(QUESTIONS) == 10
    for title in QUESTIONS:
        assert f"[{title}]({folder}faq.md#{slug(title)})" in text


@pytest.mark.parametrize("title", QUESTIONS)
def test_every_answer_has_code_that_runs_and_leads_on(title: str) -> None:
    answer = QUESTIONS[title]
    assert any(b.info == "python" and not b.note for b in blocks(answer))
    targets = [ROOT / "docs" / path for path in re.findall(r"\]\(([\w/-]+\.md)", answer)]
    assert targets
    assert all(path.is_file() for path in targets)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_there_are_one_picture_and_four_kinds_of_models(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    assert len(re.findall(r"^!\[", text, re.MULTILINE)) == 1
    code = "\n".join(b.text for b in blocks(text) if b.info == "python" and not b.note)
    for method in ("tome", "keymerge", "divprune", "snapkv"):
        assert f'"{method}"' in code

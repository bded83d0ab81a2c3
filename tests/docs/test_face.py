"""README and the home page lead to what people come for: ten questions in one click, the page on each in two."""

from __future__ import annotations

import re
from pathlib import Path

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


LINK = re.compile(r"\]\((?P<path>[\w./-]*\.md)?(?:#(?P<anchor>[\w-]+))?\)")


def sections(path: Path) -> dict[str, str]:
    """What stands under each anchor of a page, up to the next heading of its level."""
    text = re.sub(r"^(```.*?^```$)", lambda m: m[1].replace("\n#", "\n"), path.read_text("utf-8"), flags=re.M | re.S)
    found = {}
    for heading in re.finditer(r"^(#+) (.+)$", text, re.MULTILINE):
        rest = text[heading.end() :]
        end = re.search(rf"^#{{1,{len(heading[1])}}} ", rest, re.MULTILINE)
        found[slug(heading[2])] = rest[: end.start() if end else None]
    return found


def links(text: str, folder: Path) -> list[tuple[Path, str]]:
    """Pages that a text leads to, and the anchors on them."""
    return [(folder / m["path"], m["anchor"] or "") for m in LINK.finditer(text) if m["path"]]


@pytest.mark.parametrize("start", ["README.md", "docs/index.md"])
def test_in_two_clicks_from_the_first_page_stands_code_that_runs(start: str) -> None:
    page = ROOT / start
    first = {(path.resolve(), anchor) for path, anchor in links(page.read_text("utf-8"), page.parent)}
    for title in QUESTIONS:
        path, anchor = ROOT / "docs" / "faq.md", slug(title)
        assert (path, anchor) in first
        answer = sections(path)[anchor]
        assert any(b.info == "python" and not b.note for b in blocks(answer)), title
        further = [(p.resolve(), a) for p, a in links(answer, path.parent)]
        assert all(a in sections(p) for p, a in further if a), f"{title}: a link of the answer leads to no section"
        reached = [sections(p)[a] if a else p.read_text("utf-8") for p, a in further]
        assert any(b.info == "python" and not b.note for text in reached for b in blocks(text)), title


def test_every_link_within_the_docs_leads_to_a_section() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        for path, anchor in links(page.read_text("utf-8"), page.parent):
            target = path.resolve()
            if target.parts[-2:-1] == ("reference",) or "reference" in target.parts or not anchor:
                assert target.is_file(), f"{page.name} links {path}"
            else:
                assert anchor in sections(target), f"{page.relative_to(ROOT)} links {path.name}#{anchor}"


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_there_are_one_picture_and_four_kinds_of_models(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    assert len(re.findall(r"^!\[", text, re.MULTILINE)) == 1
    code = "\n".join(b.text for b in blocks(text) if b.info == "python" and not b.note)
    for method in ("tome", "keymerge", "divprune", "snapkv"):
        assert f'"{method}"' in code

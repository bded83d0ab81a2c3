"""The notebooks are run: their cells in one process on few samples, and under ``hosts`` in kernels as they are.

What a cell shows must be what the committed notebook shows: all that is printed, and the text of tables. Cells with the
tag ``measured`` show times and what was measured on so and so many samples: of them the kinds of outputs are compared.
"""

from __future__ import annotations

import ast
import contextlib
import html
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.docs.test_docs import ROOT, apart, as_pinned, shown

__all__ = ["apart"]

FOLDER = ROOT / "docs" / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
# What a notebook's own number is in an ordinary run; no output of a cell without the tag may depend on it.
FEW = {
    "count = 200": "count = 12", "count = 24": "count = 6", "count = 48": "count = 12", "rounds=3": "rounds=1",
    "steps = 200": "steps = 3", "inference_steps=10": "inference_steps=2",
    'inference_steps": 10': 'inference_steps": 2',
}  # fmt: skip


def book(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf8"))
    return found


def load(path: Path) -> ModuleType:
    """A module by its place."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(cell: dict[str, Any]) -> bool:
    return "measured" in cell["metadata"].get("tags", ())


def kinds(cell: dict[str, Any]) -> set[str]:
    """The kinds of what a cell shows: "text", "html", "png"."""
    found = set()
    for output in cell["outputs"]:
        rich = [kind for kind in ("text/html", "image/png") if kind in output.get("data", {})]
        found.add(rich[0].partition("/")[2] if rich else "text")
    return found


def words(page: str) -> str:
    """The text of HTML, a cell a word."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def texts(cell: dict[str, Any]) -> Iterator[str]:
    """All that a committed cell printed, then its tables."""
    streams = [o for o in cell["outputs"] if o["output_type"] == "stream"]
    if streams:
        yield "".join(line for o in streams for line in o["text"])
    for output in cell["outputs"]:
        if "text/html" in output.get("data", {}):
            yield words("".join(output["data"]["text/html"]))


def run(source: str, where: str, namespace: dict[str, Any]) -> tuple[str, Any]:
    """What a cell prints, and the value of its last expression."""
    tree = ast.parse(source, where)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(tree, where, "exec", dont_inherit=True), namespace)
        value = None if last is None else eval(compile(last, where, "eval", dont_inherit=True), namespace)
    return out.getvalue(), value


def needs(path: Path) -> None:
    for module in ("IPython", "matplotlib", "pandas"):
        pytest.importorskip(module)
    for module in {"encoder": ("timm",), "diffusion": ("diffusers",)}.get(path.stem, ("transformers",)):
        pytest.importorskip(module)


# Each runs its wing's tutorial on real weights; two of them in every run.
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=() if p.stem in ("encoder", "kv") else pytest.mark.hosts) for p in PATHS],
)
def test_cells_run_and_show_what_is_committed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    threads = torch.get_num_threads()
    numbers, namespace = as_pinned(), {"__name__": "__main__"}
    try:
        for i, cell in enumerate(book(path)["cells"]):
            if cell["cell_type"] != "code":
                continue
            source = "".join(cell["source"])
            for own, few in FEW.items():
                source = source.replace(own, few)
            printed, value = run(source, f"{path.name}[{i}]", namespace)
            page = value._repr_html_() if hasattr(value, "_repr_html_") else None
            if measured(cell):
                found = {kind for kind, is_there in (("text", printed), ("html", page)) if is_there}
                assert found == kinds(cell) - {"png"}, f"{path.name}[{i}]"
                continue
            now = [text for text in (printed, words(page or "")) if text]
            kept = list(texts(cell))
            assert [shown(t, numbers) for t in now] == [shown(t, numbers) for t in kept], f"{path.name}[{i}]"
    finally:
        plt.close("all")
        torch.set_num_threads(threads)


@pytest.mark.hosts
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_notebooks_run_in_a_kernel(path: Path) -> None:
    needs(path)
    for module in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(module)
    fresh, numbers = load(FOLDER / "run.py").executed(path), as_pinned()
    for i, (now, kept) in enumerate(zip(fresh.cells, book(path)["cells"], strict=True)):
        if now.cell_type == "code":
            assert kinds(now) == kinds(kept), f"{path.name}[{i}]"
            if not measured(kept):
                found = [shown(text, numbers) for text in texts(now)]
                assert found == [shown(text, numbers) for text in texts(kept)], f"{path.name}[{i}]"


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_committed_notebooks_are_whole(path: Path) -> None:
    found = book(path)
    assert path.stat().st_size < 400_000
    assert found["metadata"] == load(FOLDER / "run.py").METADATA
    codes = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in codes] == list(range(1, len(codes) + 1)), "run docs/notebooks/run.py"
    assert all(set(cell["metadata"]) <= {"tags"} for cell in found["cells"])
    text = json.dumps([output for cell in codes for output in cell["outputs"]])
    assert not re.search(r"/(root|home|tmp|usr)/", text), "a path of the machine that it ran on"
    assert not any(o["output_type"] == "error" or o.get("name") == "stderr" for c in codes for o in c["outputs"])
    assert any("png" in kinds(cell) for cell in codes)


def test_there_is_one_for_each_wing() -> None:
    assert [path.stem for path in PATHS] == ["diffusion", "encoder", "kv", "vlm"]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_pages_of_the_site_have_all_cells(path: Path) -> None:
    found, (page, pictures) = book(path), load(ROOT / ".ci" / "notebooks.py").page(path)
    assert re.match(r"---\nhide: \[toc\]\n---\n\n# ", page)
    assert page.count("```python\n") == sum(cell["cell_type"] == "code" for cell in found["cells"])
    drawn = sum("png" in kinds(cell) for cell in found["cells"] if cell["cell_type"] == "code")
    assert len(pictures) == drawn
    assert all(f"]({name})]({name})" in page and data.startswith(b"\x89PNG") for name, data in pictures.items())
    assert f"({path.name})" in page
    assert f"notebooks/{path.stem}.md" in (ROOT / "mkdocs.yml").read_text("utf8")
    # Links are the site's: each leads to a page that is there.
    for target in re.findall(r"\]\((\.\./[\w/-]+\.md)", page):
        assert (FOLDER / target).is_file(), target


def test_figures_show_themselves_whatever_the_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from tokred.analysis.viz.draw import sheet

    monkeypatch.setattr(matplotlib, "use", lambda *_: pytest.fail("the back-end is the user's choice"))
    figure = sheet([[torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()]], ["a title"])
    assert figure._repr_png_().startswith(b"\x89PNG")

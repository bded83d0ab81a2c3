"""Lay the repository out as the one package that it installs as, for tools that do not know ``package-dir``.

    python .ci/assemble.py build/tree

makes ``build/tree/tokred`` with ``kernels`` and ``adapters`` inside it, by symbolic links, so that it never goes stale.
``mkdocs.yml`` names this file as a hook: mkdocstrings reads the package from there. ``.ci/run`` type-checks it there.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "tree"
PARTS = {"kernels": ROOT / "kernels", "adapters": ROOT / "adapters"}


def assemble(tree: Path) -> Path:
    """Build the tree anew; returns it."""
    package = tree / "tokred"
    if package.exists():
        shutil.rmtree(package)
    package.mkdir(parents=True)
    inside = {p.name: p for p in (ROOT / "tokred").iterdir() if p.name != "__pycache__"}
    for name, target in {**inside, **PARTS}.items():
        (package / name).symlink_to(target)
    return tree


def on_config(config: Any) -> Any:
    """Hook of mkdocs."""
    assemble(TREE)
    return config


# Before mkdocstrings, which drops paths that do not exist when it reads its settings.
on_config.mkdocs_priority = 100  # type: ignore[attr-defined]


def on_page_content(html: str, **_: Any) -> str:
    """Hook of mkdocs: docstrings name functions as ``:func:`apply```, a role that is not for readers; pictures open."""
    html = re.sub(r":(?:attr|class|data|func|meth|mod):(?=<code>)", "", html)
    # A picture that is wider than its column can be seen at its own size.
    picture = r'(?<!<a href=")(<img [^>]*?src="([^"]+\.png)"[^>]*>)(?!</a>)'
    return re.sub(picture, r'<a class="picture" href="\2">\1</a>', html)


if __name__ == "__main__":
    print(assemble(Path(sys.argv[1]) if len(sys.argv) > 1 else TREE))

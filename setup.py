"""The packages, found in their folders, and the long description.

``kernels/`` and ``adapters/`` install as parts of ``tokred``, which pyproject.toml cannot say: it finds packages under
the names of their folders alone. Everything else stands there.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = {"tokred": "tokred", "tokred.kernels": "kernels", "tokred.adapters": "adapters"}


def description() -> str:
    """README.md as it can be read away from a checkout: links and pictures of the repository lose their addresses."""
    text = Path(__file__).with_name("README.md").read_text("utf-8")
    blocks = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    here = r"\((?![a-z]+:|#)[^)\s]+\)"
    for i in range(0, len(blocks), 2):  # what stands between are blocks of code
        blocks[i] = re.sub(rf"^!\[[^\]]*\]{here}\n\n?", "", blocks[i], flags=re.MULTILINE)
        blocks[i] = re.sub(rf"\[([^\]]*)\]{here}", r"\1", blocks[i])
    return "".join(blocks)


setup(
    packages=[
        name for top, folder in FOLDERS.items() for name in (top, *(f"{top}.{p}" for p in find_packages(folder)))
    ],
    package_dir=FOLDERS,
    long_description=description(),
    long_description_content_type="text/markdown",
)

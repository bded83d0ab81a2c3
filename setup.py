"""The packages, found in their folders: ``kernels/`` and ``adapters/`` install as parts of ``tokred``.

Everything else stands in pyproject.toml, which can find packages under the names of their folders alone.
"""

from setuptools import find_packages, setup

FOLDERS = {"tokred": "tokred", "tokred.kernels": "kernels", "tokred.adapters": "adapters"}

setup(
    packages=[
        name for top, folder in FOLDERS.items() for name in (top, *(f"{top}.{p}" for p in find_packages(folder)))
    ],
    package_dir=FOLDERS,
)

"""Run the notebooks anew and keep their outputs.

    python docs/notebooks/run.py             # all of them, in place
    python docs/notebooks/run.py kv vlm      # some

Needs `pip install -e '.[dev]'`. Every notebook runs in a kernel and an empty folder of its own. What would differ from
one run to the next without anything being different (times of execution, the kernel's version) is left out.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.ipynb")))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SECONDS = 300  # for a cell


def executed(path: Path) -> Any:
    """The notebook of ``path`` with the outputs of a run of its own, as an object of nbformat.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails; the message has its traceback.
    """
    import nbclient
    import nbformat

    book = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = nbclient.NotebookClient(book, timeout=SECONDS, kernel_name="python3", resources=resources)
        client.coalesce_streams = True  # what is printed comes in as many pieces as it pleases
        client.execute()
    book.metadata = nbformat.from_dict(METADATA)
    for cell in book.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        if cell.cell_type == "code":
            # Warnings of libraries name files of the machine.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata = nbformat.from_dict({})
    return book


def main() -> None:
    """Run and write those that are named."""
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; none: all")
    names = parser.parse_args().names or NAMES
    for name in names:
        if name not in NAMES:
            parser.error(f"there is no notebook {name!r}; there are {', '.join(NAMES)}")
    for name in names:
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(executed(path), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

"""Run a benchmark of this checkout, from the top of the repository.

    python -m benchmarks                       # what there is
    python -m benchmarks kv/quality --quick      # one of them, with its own options

tokred is taken from the checkout, installed or not.
"""

from __future__ import annotations

import ast
import importlib.util
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("encoder", "diffusion", "vlm", "kv", "kernels", "experiments")


def listed() -> dict[str, str]:
    """Every benchmark that can be run, with the first line of its docstring."""
    found = {}
    for wing in WINGS:
        for file in sorted((ROOT / "benchmarks" / wing).glob("*.py")):
            text = file.read_text("utf8")
            if '__name__ == "__main__"' in text:
                found[f"{wing}/{file.stem}"] = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
    pages = ast.parse((ROOT / "benchmarks" / "pages" / "__main__.py").read_text("utf8"))
    return found | {"pages": (ast.get_docstring(pages) or "").splitlines()[0]}


def main(given: list[str]) -> None:
    """Run the benchmark that the first argument names; without one, list them."""
    # The top of the repository is where `python -m` looks first: its folder `kernels` would pass for the package of
    # that name that host libraries look for.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    spec = importlib.util.spec_from_file_location("benchmarks.checkout", ROOT / "benchmarks" / "checkout.py")
    assert spec is not None
    assert spec.loader is not None
    checkout = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checkout)
    checkout.use_checkout()
    known = listed()
    name = given[0].removeprefix("benchmarks/").removesuffix(".py") if given else ""
    if name not in known:
        width = max(map(len, known))
        lines = "\n".join(f"  {one:<{width}}  {text}" for one, text in known.items())
        if given and not name.startswith("-"):
            sys.exit(f"no benchmark is named {given[0]!r}; there are\n{lines}")
        print(f"python -m benchmarks NAME [options]\n\n{lines}")
        return
    sys.argv = [f"benchmarks {name}", *given[1:]]
    from benchmarks.zoo.carriers import MissingWeights, WrongHash

    try:
        runpy.run_module(f"benchmarks.{name.replace('/', '.')}", run_name="__main__")
    except (MissingWeights, WrongHash) as error:
        # The message has the command that gets what is missing; where it was raised tells nobody more.
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])

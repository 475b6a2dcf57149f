"""Prompts and responses from installed packages: a function's head, and what its docstring says it does.

    python -m experiments.docstrings --output docstrings.jsonl

A small real text to fine-tune on: thousands of pairs from the packages that mc_jax itself needs, the same
ones for the same versions of them.
"""

import ast
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mc_jax._arguments import UsageError, parse
from mc_jax.data.files import write_text

_LONGEST_HEAD = 400  # characters: longer ones are tables of options
_FEWEST_WORDS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocstringsArguments:
    """Write pairs of a function's head and its docstring's first sentence as JSONL."""

    output: Path
    """File to be written; must not exist."""
    packages: tuple[str, ...] = ("jax", "flax", "optax", "orbax", "grain", "numpy", "matplotlib")
    """Installed packages whose functions are taken."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pairs; 2 if that cannot be done."""
    try:
        given = sys.argv[1:] if arguments is None else arguments
        chosen = parse(DocstringsArguments, given, program="python -m experiments.docstrings")
        if chosen.output.exists():
            raise UsageError(f"{chosen.output} exists; name another file, or delete it first")
        found = dict.fromkeys(pair for package in chosen.packages for pair in pairs_of(package))
    except UsageError as error:
        print(f"docstrings: {error}", file=sys.stderr)
        return 2
    lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in found]
    write_text(chosen.output, "\n".join(lines) + "\n")
    print(f"{chosen.output}: {len(lines):,} pairs")
    return 0


def pairs_of(package: str) -> Iterator[tuple[str, str]]:
    """Heads of a package's public functions, each with the first sentence of its docstring.

    Raises:
      UsageError: there is no such package.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"there is no package {package} here; name one that is installed")
    for folder in spec.submodule_search_locations:
        for file in sorted(Path(folder).rglob("*.py")):
            if "test" not in file.name:
                yield from pairs_in(file.read_text(encoding="utf-8", errors="replace"))


def pairs_in(source: str) -> Iterator[tuple[str, str]]:
    """The pairs of a module's source; none if it is not today's Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        sentence = _first_sentence(ast.get_docstring(node) or "")
        head = f"def {node.name}({ast.unparse(node.args)}):\n"
        if len(head) <= _LONGEST_HEAD and len(sentence.split()) >= _FEWEST_WORDS:
            yield head, f'    """{sentence}"""\n'


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + stop.strip()


if __name__ == "__main__":
    sys.exit(main())

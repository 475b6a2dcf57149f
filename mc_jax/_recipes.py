"""Recipes: modules in `experiments`, or Python files, with a function `config()` that returns a `Config`."""

import ast
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from mc_jax._arguments import UsageError, did_you_mean
from mc_jax.config import Config


def recipe_files() -> dict[str, Path]:
    """Names and files of the recipes in `experiments`: its modules that define `config`."""
    package = importlib.util.find_spec("experiments")
    folders = package.submodule_search_locations if package else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.py"))
    return {
        file.stem: file for file in files if not file.stem.startswith("_") and _defines_config(_parse(file))
    }


def describe_recipes() -> str:
    """One line a recipe: its name and the first line of its docstring."""
    files = recipe_files()
    width = max(map(len, files), default=0)
    return "\n".join(f"  {name:{width}}  {summary(file)}" for name, file in files.items())


def summary(file: Path) -> str:
    """First line of a recipe's docstring, read without running the recipe."""
    return (ast.get_docstring(_parse(file)) or "").partition("\n")[0]


def load_recipe(recipe: str) -> tuple[str, str, Config]:
    """Name, docstring and config of a recipe.

    Args:
      recipe: a name in `experiments`, or the path of a Python file.

    Raises:
      UsageError: there is no such recipe, or it cannot be run; the message names the nearest or the line.
    """
    path = Path(recipe)
    if path.suffix != ".py" and len(path.parts) == 1:
        files = recipe_files()
        if recipe not in files:
            raise UsageError(
                f"there is no recipe {recipe!r}{did_you_mean(recipe, files)}; known are {', '.join(files)}; "
                "or give the path of a Python file with a function config()"
            )
        path = files[recipe]
    elif not path.is_file():
        raise UsageError(f"there is no file {recipe}; give a recipe's name or the path of its Python file")
    try:
        module = _import(path)
        config = module.config()
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename) == path
        ]
        line = error.lineno if isinstance(error, SyntaxError) else next(reversed(lines), None)
        where = f" at line {line}" if line else ""
        reason = " ".join(str(error).split())
        raise UsageError(f"recipe {path} fails{where}: {type(error).__name__}: {reason}") from error
    if not isinstance(config, Config):
        raise UsageError(
            f"recipe {path}: config() returns {type(config).__name__}; let it return a mc_jax.config.Config"
        )
    return path.stem, (module.__doc__ or "").strip(), config


def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError:  # the recipe that is asked for reports it; the list of all does not
        return ast.Module(body=[], type_ignores=[])


def _defines_config(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "config" for node in tree.body)


def _import(path: Path) -> ModuleType:
    name = f"_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module

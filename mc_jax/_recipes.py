"""Recipes: modules in `experiments`, or Python files, with a function `config()` that returns a `Config`.

A module with a function `configs()` offers a family: it returns a dict from the members' names to their
configs. A member is called for as MODULE-MEMBER. The module's constant `NAMES`, a literal, tells how names of
members are made.
"""

import ast
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from mc_jax._arguments import UsageError, did_you_mean
from mc_jax.config import Config


def recipe_files() -> dict[str, Path]:
    """Names and files of the recipes in `experiments`: its modules that define `config`."""
    return _modules_with("config")


def family_files() -> dict[str, Path]:
    """Names and files of the families in `experiments`: its modules that define `configs`."""
    return _modules_with("configs")


def family(name: str) -> dict[str, Config]:
    """The members of a family in `experiments`, by the names that `load_recipe` takes."""
    return _members(name, run_module(family_files()[name], "configs")[1])


def known_recipes() -> list[str]:
    """Names of recipes, and patterns of those of families' members."""
    patterns = [_pattern(name, file) for name, file in family_files().items()]
    return [*recipe_files(), *patterns]


def _modules_with(function: str) -> dict[str, Path]:
    package = importlib.util.find_spec("experiments")
    folders = package.submodule_search_locations if package else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.py"))
    return {
        file.stem: file
        for file in files
        if not file.stem.startswith("_") and _defines(function, _parse(file))
    }


def describe_recipes() -> str:
    """One line a recipe or family: its name, or how its members' are made, and its docstring's first line."""
    files = recipe_files() | {_pattern(name, file): file for name, file in family_files().items()}
    width = max(map(len, files), default=0)
    return "\n".join(f"  {name:{width}}  {summary(file)}" for name, file in files.items())


def summary(file: Path) -> str:
    """First line of a recipe's docstring, read without running the recipe."""
    return (ast.get_docstring(_parse(file)) or "").partition("\n")[0]


def load_recipe(recipe: str) -> tuple[str, str, Config]:
    """Name, docstring and config of a recipe.

    Args:
      recipe: a name in `experiments`, of a recipe or of a family's member, or the path of a Python file.

    Raises:
      UsageError: there is no such recipe, or it cannot be run; the message names the nearest or the line.
    """
    path = Path(recipe)
    if path.suffix != ".py" and len(path.parts) == 1:
        files = recipe_files()
        if recipe not in files:
            return _load_member(recipe)
        path = files[recipe]
    elif not path.is_file():
        raise UsageError(f"there is no file {recipe}; give a recipe's name or the path of its Python file")
    module, config = run_module(path, "config")
    return path.stem, _described(module), _must_be_config(config, path)


def _load_member(recipe: str) -> tuple[str, str, Config]:
    for name, path in family_files().items():
        if recipe == name or recipe.startswith(name + "-"):
            module, configs = run_module(path, "configs")
            members = _members(name, configs)
            if recipe not in members:
                pattern = _pattern(name, path)
                raise UsageError(
                    f"there is no recipe {recipe!r}{did_you_mean(recipe, members)}; names of this family are "
                    f"{pattern}, for example {next(iter(members))}"
                )
            return recipe, _described(module), _must_be_config(members[recipe], path)
    known = known_recipes()
    raise UsageError(
        f"there is no recipe {recipe!r}{did_you_mean(recipe, known)}; known are {', '.join(known)}; "
        "or give the path of a Python file with a function config()"
    )


def _members(name: str, configs: dict[str, Config]) -> dict[str, Config]:
    return {f"{name}-{member}": config for member, config in configs.items()}


def run_module(path: Path, function: str) -> tuple[ModuleType, Any]:
    """Import a recipe's module and call its function.

    Raises:
      UsageError: it cannot be imported, or the function fails; the message tells the line.
    """
    try:
        module = _import(path)
        return module, getattr(module, function)()
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


def _must_be_config(config: Any, path: Path) -> Config:
    if not isinstance(config, Config):
        raise UsageError(
            f"recipe {path}: config() returns {type(config).__name__}; let it return a mc_jax.config.Config"
        )
    return config


def _described(module: ModuleType) -> str:
    return (module.__doc__ or "").strip()


def _pattern(name: str, file: Path) -> str:
    """How names of a family's members are made, read without running it."""
    for node in _parse(file).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NAMES":
            return f"{name}-{ast.literal_eval(node.value)}"
    return f"{name}-MEMBER"


def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError:  # the recipe that is asked for reports it; the list of all does not
        return ast.Module(body=[], type_ignores=[])


def _defines(function: str, tree: ast.Module) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)


def _import(path: Path) -> ModuleType:
    name = f"_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module

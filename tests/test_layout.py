"""The rules of the house, which no one has to remember: docs/decisions.md says why."""

import ast
import graphlib
import pathlib
import re
import tomllib
from collections.abc import Iterator

import pytest

from mc_jax._recipes import recipe_files

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPES = set(recipe_files().values())
PACKAGES = ("mc_jax", "pallas_kernels", "experiments")
MOST_LINES = 400

# A layer imports from those below it, never from those above; layers of one rank may, in one direction.
RANKS = {
    "pallas_kernels": 0,
    "_absent_tpu": 0,
    "stop_signals": 0,
    "_selftest": 1,
    "facts": 0,
    "slices": 0,
    "config": 1,
    "data": 1,
    "memories": 1,
    "caching": 2,
    "parallel": 3,
    "nn": 4,
    "training": 5,
    "inference": 5,
    "planning": 6,
    "evaluation": 6,
    "cli": 7,
    "experiments": 8,
}
# Data and config know no model; recipes know settings, and what is so of the names in them.
ONLY = {
    "pallas_kernels": set(),
    "facts": set(),
    "slices": set(),
    "config": {"facts"},
    "data": {"config"},
    "recipe": {"config", "facts"},
}


def python_files() -> list[pathlib.Path]:
    folders = (*PACKAGES, "tests")
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def layer_of(module: str) -> str | None:
    """The layer that a module belongs to: "mc_jax.nn.mixer" -> "nn"; None for the outside."""
    top, *rest = module.split(".")
    if top in ("pallas_kernels", "experiments"):
        return top
    if top != "mc_jax" or not rest:
        return None
    is_cli = rest[0] in ("cli", "_commands", "_arguments", "_recipes") or rest[0].endswith("_command")
    return "cli" if is_cli else rest[0]


def imported_modules(file: pathlib.Path) -> Iterator[tuple[str, int]]:
    """Absolute names of the modules that a file imports, wherever in it, with the line."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from mc_jax import config` imports a module too.
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def arrows() -> Iterator[tuple[str, str, str]]:
    """Layer, imported layer, and where."""
    for folder in PACKAGES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            relative = file.relative_to(ROOT)
            layer = layer_of(".".join(relative.with_suffix("").parts))
            if file in RECIPES:
                layer = "recipe"
            if relative.name == "__init__.py" and relative.parent.name == "mc_jax":
                continue  # the public face hands out what the layers make
            for module, line in imported_modules(file):
                imported = layer_of(module)
                if module == "mc_jax.memory_caching":
                    imported = "caching"  # the public name of its core
                if imported is not None and layer is not None and imported != layer:
                    yield layer, imported, f"{relative}:{line}"


def test_every_folder_has_a_layer():
    folders = {path.name for path in (ROOT / "mc_jax").iterdir() if (path / "__init__.py").exists()}
    modules = {file.stem for file in (ROOT / "mc_jax").glob("*.py")} - {"__init__"}
    layers = {layer_of(f"mc_jax.{name}") for name in folders | modules}
    assert layers <= set(RANKS), "give the new folder its place in RANKS, and in WORKSPACE.md"


def test_arrows_point_one_way():
    wrong = []
    for layer, imported, where in arrows():
        allowed = ONLY.get(layer)
        fine = RANKS.get(imported, len(RANKS)) <= RANKS[layer] if allowed is None else imported in allowed
        if not fine:
            wrong.append(f"{where}: {layer} imports {imported}")
    assert not wrong, "move the shared code down, or pass it in:\n" + "\n".join(wrong)


def test_there_are_no_cycles_between_folders():
    graph: dict[str, set[str]] = {}
    for layer, imported, _ in arrows():
        graph.setdefault(layer, set()).add(imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"folders import each other: {' -> '.join(error.args[1])}")


def test_an_operation_of_the_kernels_knows_no_other():
    wrong = []
    for file in (ROOT / "pallas_kernels").glob("*/*.py"):
        for module, line in imported_modules(file):
            top, inner, *_ = [*module.split("."), ""]
            if top == "pallas_kernels" and inner != file.parent.name and not inner.startswith("_"):
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "put what two operations share in a private module beside them:\n" + "\n".join(wrong)


def test_an_operation_is_used_by_its_face():
    # Each name that is imported, with the module that it comes from: the op's, and no file within it.
    files = {file.relative_to(ROOT).with_suffix("") for file in (ROOT / "pallas_kernels").glob("*/*.py")}
    inner = {".".join(file.parts) for file in files if file.name != "__init__"}
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for folder in ("mc_jax", "experiments")
        for file in (ROOT / folder).rglob("*.py")
        for module, line in imported_modules(file)
        if module in inner or module.rpartition(".")[0] in inner
    ]
    assert not wrong, "export it in the op's __init__.py:\n" + "\n".join(wrong)


def test_an_operation_has_a_reference_and_an_xla_form():
    for folder in (path.parent for path in (ROOT / "pallas_kernels").glob("*/__init__.py")):
        for name in ("reference.py", "xla.py"):
            assert (folder / name).exists(), f"{folder.name} lacks {name}"


@pytest.mark.parametrize("file", python_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_is_short(file):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines; a file of one noun has at most {MOST_LINES}: split it"


def test_everything_public_has_a_docstring():
    bare = []
    for folder in PACKAGES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            named = file.stem == "__init__" or not file.stem.startswith("_")
            members = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]
            for owner in [tree, *members] if named else [tree]:
                if not ast.get_docstring(owner):
                    bare.append(f"{file.relative_to(ROOT)} {getattr(owner, 'name', 'module')}")
                if not named:
                    continue
                for node in owner.body:
                    public = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
                    if public and not ast.get_docstring(node):
                        bare.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not bare, "say in one line what these do:\n" + "\n".join(bare)


def test_every_dependency_is_imported():
    imported = {
        module.split(".")[0]
        for folder in PACKAGES
        for file in (ROOT / folder).rglob("*.py")
        for module, _ in imported_modules(file)
    }
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[^\w-]", entry)[0].replace("-", "_") for entry in listed}
    names -= {"tensorstore"}  # Orbax writes by it; checkpoint/writing.py reads what it says of a full disk
    unused = {name for name in names if name.split("_")[0] not in imported and name not in imported}
    assert not unused, f"no file imports {sorted(unused)}: take them out of pyproject.toml"


def test_the_packages_are_typed():
    for package in ("mc_jax", "pallas_kernels"):
        assert (ROOT / package / "py.typed").exists()


def test_tests_mirror_the_packages():
    folders = {path.name for path in (ROOT / "mc_jax").iterdir() if path.is_dir()}
    folders |= {"pallas_kernels", "experiments", "reference", "faults"}
    stray = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - folders - {"__pycache__"}
    assert not stray, f"tests/{stray} mirror no package: move them to the folder of what they test"


def test_test_files_have_unique_names():
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"pytest imports tests by name: rename one of each of {sorted(twice)}"


def test_the_map_shows_every_folder():
    text = (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    names = {folder.name for folder in folders if any(folder.iterdir())} - {"runs", "dist", "build"}
    names |= {file.parent.name for file in (ROOT / "mc_jax").glob("*/__init__.py")}
    missing = sorted(name for name in names if f"{name}/" not in text)
    assert not missing, f"WORKSPACE.md does not tell what is in {', '.join(missing)}"


def test_the_top_level_is_the_house():
    folders = {"mc_jax", "pallas_kernels", "experiments", "scripts", "tests"}
    files = {"README.md", "WORKSPACE.md", "LICENSE", "pyproject.toml", "uv.lock"}
    missing = {name for name in folders | files if not (ROOT / name).exists()}
    assert not missing, f"the repository lacks {sorted(missing)}"
    for script in ("scripts/setup", "scripts/train", "scripts/test", ".ci/run"):
        assert (ROOT / script).stat().st_mode & 0o111, f"{script} must be executable: chmod +x {script}"

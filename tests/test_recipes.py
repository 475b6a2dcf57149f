import ast

import pytest

from mc_jax._recipes import load_recipe, recipe_files, summary
from mc_jax.config import validate


def test_there_is_a_quickstart():
    assert "quickstart" in recipe_files()


@pytest.mark.parametrize("name", recipe_files())
def test_a_recipe_fits_together(name):
    loaded_name, _, config = load_recipe(name)
    assert loaded_name == name
    validate(config)


@pytest.mark.parametrize("name", recipe_files())
def test_a_recipe_tells_data_machine_and_expectation(name):
    file = recipe_files()[name]
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    assert summary(file).endswith("."), f"{file}: begin with one line that says what is trained"
    for word in ("Data:", "Machine:", "Expected"):
        assert word in docstring, f"{file}: its docstring lacks {word!r}"


def test_a_recipe_is_the_same_every_time():
    assert load_recipe("quickstart") == load_recipe("quickstart")

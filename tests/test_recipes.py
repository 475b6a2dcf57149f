import ast

import pytest

from mc_jax._arguments import UsageError
from mc_jax._recipes import describe_recipes, family, family_files, load_recipe, recipe_files, summary
from mc_jax.config import validate


def test_there_is_a_quickstart():
    assert "quickstart" in recipe_files()


@pytest.mark.parametrize("name", recipe_files())
def test_a_recipe_fits_together(name):
    loaded_name, _, config = load_recipe(name)
    assert loaded_name == name
    validate(config)


@pytest.mark.parametrize("name", family_files())
def test_all_members_of_a_family_fit_together(name):
    members = family(name)
    for config in members.values():
        validate(config)
    member = next(iter(members))
    loaded_name, _, config = load_recipe(member)
    assert (loaded_name, config) == (member, members[member])


def test_a_member_that_is_not_there_is_told_with_the_nearest():
    with pytest.raises(UsageError, match=r"did you mean paper-1\.3b-titans-gated"):
        load_recipe("paper-1.3b-titan-gated")
    with pytest.raises(UsageError, match="names of this family are paper-SIZE-MEMORY-AGGREGATION"):
        load_recipe("paper")


def test_a_family_is_one_line_of_the_list():
    lines = describe_recipes().splitlines()
    assert len(lines) == len(recipe_files()) + len(family_files())
    assert any(line.startswith("  paper-SIZE-MEMORY-AGGREGATION  The models") for line in lines)


@pytest.mark.parametrize("name", recipe_files() | family_files())
def test_a_recipe_tells_data_machine_and_expectation(name):
    file = (recipe_files() | family_files())[name]
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    assert summary(file).endswith("."), f"{file}: begin with one line that says what is trained"
    for word in ("Data:", "Machine:", "Expected"):
        assert word in docstring, f"{file}: its docstring lacks {word!r}"


def test_a_recipe_is_the_same_every_time():
    assert load_recipe("quickstart") == load_recipe("quickstart")

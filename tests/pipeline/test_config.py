"""Recipes: every mistake is one line that names field, value and remedy."""

from pathlib import Path

import pytest

from cluster.errors import UserError
from pipeline.config import load_recipe, recipe_names

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("recipe", [*recipe_names(), *map(str, EXAMPLES)])
def test_every_recipe_resolves(recipe: str) -> None:
    load_recipe(recipe, [])


def test_later_settings_win_and_values_are_typed() -> None:
    config = load_recipe("tiny", ["images.size=32", "images.size=48", "source.scenes.count=20"])
    assert (config.images.size, config.source.scenes and config.source.scenes.count) == (48, 20)


def test_an_evaluation_set_can_be_given_on_the_command_line() -> None:
    config = load_recipe("tiny", ["evaluation_sets=[{name: a, pairs: a.parquet}]"])
    assert [(item.name, item.pairs) for item in config.evaluation_sets] == [("a", "a.parquet")]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["images.sise=3"], "images.sise is not a known key. Did you mean size?"),
        (["imagse.size=3"], "imagse is not a known key. Did you mean images?"),
        (["images.size=big"], "images.size is 'big':"),
        (["images.size=-1"], "images.size is -1:"),
        (["images.size"], "expected section.key=value"),
        (["images.size.deep=3"], "images.size is 64, which has no keys"),
        (["images.allow_networks=[10.0.0.0/99]"], "is not a network"),
        (["prior.training.steps=0"], "prior.training.steps is 0:"),
        (["evaluation_sets=[{name: a, pairs: x}, {name: a, pairs: y}]"], "the name 'a' stands twice"),
        (["evaluation_sets=[{name: ../a, pairs: x}]"], "evaluation_sets.0.name"),
        (["source.pairs=x.parquet"], "pairs and scenes are both set"),
        (["images=3"], "images is 3:"),
        (["seed=[1"], "is not a YAML value"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as raised:
        load_recipe("tiny", overrides)
    assert told in str(raised.value)


def test_an_unknown_recipe_is_told_which_there_are() -> None:
    with pytest.raises(UserError, match=r"no recipe 'dmeo'.*demo.*tiny"):
        load_recipe("dmeo", [])


@pytest.mark.parametrize("text", ["- a list", "a: [", "just text"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"r\.yaml"):
        load_recipe(str(tmp_path / "r.yaml"), [])

"""Recipes: complete, alike but for the decider, and refused by field."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from optimizers import make_scheduler
from recipe import RecipeError, list_differences, make_recipe, read_kept, read_recipe

RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"
GROUPS = sorted({path.stem.rpartition("-")[0] for path in RECIPES.glob("*.yaml")})
GOOD = {"task": "mano-mini", "steps": 10, "batch_size": 4, "learning_rate": 1e-3, "model": {"max_depth": 4}}


def test_every_task_has_recipes_of_both_sizes():
    assert {f"{task}-{size}" for task in ("mano", "brevo", "lano") for size in ("mini", "paper")} <= set(GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_early_online_and_fixed_differ_in_one_line(group):
    texts = {decider: (RECIPES / f"{group}-{decider}.yaml").read_text() for decider in ("early", "online", "fixed")}
    for decider, text in texts.items():
        assert text.count(f"decider: {decider}\n") == 1
        assert text.replace(f"decider: {decider}\n", "decider: online\n") == texts["online"]
        recipe = read_recipe(RECIPES / f"{group}-{decider}.yaml", [])
        assert recipe.make_config().decider == decider


def test_settings_replace_those_of_the_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    settings = ["steps=7", "model.decider=early", "task_settings.max_size=3", "mixed_precision=no"]
    # YAML 1.1 takes both numbers for text, which the model refused long after.
    settings += ["learning_rate=1e-3", "model.rope_parameters={rope_type: default, rope_theta: 1e6}"]
    recipe = read_recipe(path, settings)
    assert (recipe.steps, recipe.model["decider"], recipe.make_task().config.max_size) == (7, "early", 3)
    assert recipe.learning_rate == 1e-3
    assert recipe.make_config().rope_parameters["rope_theta"] == 1_000_000
    assert recipe.mixed_precision == "no"
    with pytest.raises(RecipeError, match="`--set` is 'steps', but must be of the form name=value"):
        read_recipe(path, ["steps"])
    with pytest.raises(RecipeError, match=r"`--set` is 'steps.x=3', but must be of a map; `steps` is 10"):
        read_recipe(path, ["steps.x=3"])
    with pytest.raises(RecipeError, match=r"its value cannot be read"):
        read_recipe(path, ["steps=[1"])
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml", [])
    path.write_bytes("task: größe".encode("latin-1"))
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(path, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepps": 3}, "`stepps` is no setting of a recipe. Did you mean `steps`"),
        ({"steps": 0}, "`steps` is 0, but must be at least 1"),
        ({"steps": "many"}, "`steps` is 'many', but must be a whole number"),
        ({"steps": True}, "`steps` is True"),
        ({"learning_rate": "fast"}, "`learning_rate` is 'fast', but must be a number"),
        ({"learning_rate": 0}, "`learning_rate` is 0"),
        ({"betas": 0.9}, "`betas` is 0.9, but must be two numbers"),
        ({"betas": ["a", 0.9]}, "`betas` is 'a', but must be a number"),
        ({"betas": [0.9, 1.0]}, "`betas` is"),
        ({"weight_decay": -1}, "`weight_decay` is -1"),
        ({"learning_rate": float("inf")}, "`learning_rate` is inf"),
        ({"seed": -1}, "`seed` is -1"),
        ({"model": {"vocab_size": 10}}, "`model.vocab_size` is set, but the tasks' vocabulary settles it"),
        ({"model": {"compute_weight": 5.0}}, "`model.compute_weight` is set, but the recipe's own"),
        ({"task": "mano"}, "`task` is 'mano', but must be one of mano-mini"),
        ({"loss_on": "prompt"}, "`loss_on` is 'prompt'"),
        ({"optimizer": "sgd"}, "`optimizer` is 'sgd', but must be one of"),
        ({"curriculum": 1.5}, "`curriculum` is 1.5, but must be from 0 to below 1"),
        ({"curriculum": 1}, "`curriculum` is 1.0, but must be from 0 to below 1"),
        ({"curriculum": 0.5, "data": "tasks"}, "`curriculum` is 0.5, but must be 0 where `data` is a built dataset"),
        ({"sizes": [1, 3], "curriculum": 0.5}, r"`sizes` is \(1, 3\), but must be empty with a curriculum"),
        ({"sizes": [1, 99]}, r"`sizes` is \(1, 99\), but must be from 1 to"),
        ({"sizes": 3}, "`sizes` is 3, but must be a list of whole numbers"),
        ({"random_depth": True, "model": {"decider": "online"}}, "`random_depth` is True, but must be False"),
        ({"schedule": "linear"}, "`schedule` is 'linear'"),
        ({"mixed_precision": "fp16"}, "`mixed_precision` is 'fp16'"),
        ({"compile": "yes please"}, "`compile` is 'yes please', but must be true or false"),
        ({"press_from": 0.6, "press_to": 0.5}, "`press_to` is 0.5, but must be from press_from=0.6 to 1"),
        ({"restart": 0.5}, "`restart` is 0.5, but must be 0 unless `schedule` is 'cosine'"),
        (
            {"restart": 0.5, "schedule": "cosine"},
            "`press_from` is 0.0, but must be below 1, and a step",
        ),
        ({"compute_weight": float("inf")}, "`compute_weight` is inf, but must be at least 0, and finite"),
        (
            {"restart": 2, "schedule": "cosine", "press_from": 0.5, "press_to": 0.5},
            "`restart` is 2.0, but must be from 0",
        ),
        ({"model": {"max_dept": 4}}, "`model.max_dept` is no setting of a recipe. Did you mean `model.max_depth`"),
        ({"model": {"return_dict": False}}, "`model.return_dict` is set, but training reads fields by name"),
        ({"model": {"dtype": "bfloat16"}}, "`model.dtype` is set, but .*`mixed_precision`"),
        ({"model": {"execution": "packed"}}, "`model.execution` is 'packed', but must be 'auto' or 'masked'"),
        ({"model": {3: 4}}, "`model.3` is no setting of a recipe"),
        ({7: 8}, "`7` is no setting of a recipe"),
        ({"model": {"max_depth": 0}}, "model: .*`max_depth` is 0"),
        ({"model": {"max_position_embeddings": 8}}, "`model.max_position_embeddings` is 8, but must be at least"),
        (
            {"task_settings": {"modulo": 5}},
            "`task_settings.modulo` is no setting of a recipe. Did you mean `task_settings.modulus`",
        ),
        ({"task_settings": {"modulus": 4}}, "task_settings: `modulus` is 4, but must be a prime"),
    ],
)
def test_bad_recipes_are_refused_by_field(change, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe({**GOOD, **change})


def test_a_run_begun_before_a_field_came_is_not_another_recipes(tmp_path):
    """`restart` came later: every older run was refused as one with other settings."""
    settings = make_recipe(GOOD).plain()
    kept = {name: value for name, value in settings.items() if name != "restart"}
    (tmp_path / "recipe.json").write_text(json.dumps(kept))
    assert list_differences(read_kept(tmp_path / "recipe.json"), settings) == ""
    assert list_differences(read_kept(tmp_path / "recipe.json"), {**settings, "steps": 7}) == "steps is 10, not 7"


def test_what_is_missing_is_named():
    with pytest.raises(RecipeError, match="The recipe lacks `batch_size`"):
        make_recipe({name: value for name, value in GOOD.items() if name != "batch_size"})


def test_the_learning_rate_starts_again_where_pressing_begins():
    settings = {"steps": 100, "warmup_steps": 10, "schedule": "cosine", "press_from": 0.6, "press_to": 0.8}
    recipe = make_recipe({**GOOD, **settings, "restart": 0.5})
    (weight,) = torch.nn.Linear(1, 1, bias=False).parameters()
    optimizer = torch.optim.SGD([weight], lr=recipe.learning_rate)
    scheduler = make_scheduler(optimizer, recipe)
    rates = []
    for _ in range(recipe.steps):
        rates.append(optimizer.param_groups[0]["lr"] / recipe.learning_rate)
        optimizer.step()
        scheduler.step()
    known = {0: 0, 5: 0.5, 10: 1, 35: 0.5, 60: 0, 65: 0.25, 70: 0.5, 85: 0.25}
    assert {step: rates[step] for step in known} == pytest.approx(known)
    assert rates[59] < 0.01
    assert rates[99] < 0.01


def test_compute_weight_is_constant_or_rises_between_two_shares_of_the_run():
    constant = make_recipe({**GOOD, "compute_weight": 0.5})
    assert {constant.pressure(step) for step in range(10)} == {0.5}
    pressed = make_recipe({**GOOD, "steps": 100, "compute_weight": 0.5, "press_from": 0.2, "press_to": 0.6})
    assert [pressed.pressure(step) for step in (0, 20, 40, 60, 99)] == [0, 0, 0.25, 0.5, 0.5]
    stepped = make_recipe({**GOOD, "steps": 100, "compute_weight": 0.5, "press_from": 0.5, "press_to": 0.5})
    assert [stepped.pressure(step) for step in (49, 50)] == [0, 0.5]

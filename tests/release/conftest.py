"""A small checkpoint as a run and its evaluation leave it, a small dataset, and the repos made from them."""

import dataclasses
import json

import assemble
import pytest
import torch
from recipe import make_recipe
from run import Evaluation, EvaluationArguments

from datasets_scripts import build, make_tokenizer
from modeling_anira import AniraForCausalLM

CONFIG = "mano-mini"
OWNER = "someone"
NAME = "mano-test"

RECIPE = {
    "task": CONFIG,
    "steps": 20,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "model": {"decider": "online", "hidden_size": 32, "num_attention_heads": 2, "max_depth": 3, "decider_bias": 0.0},
}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    arguments = build.BuildArguments(str(tmp_path_factory.mktemp("data") / "tasks"), [CONFIG])
    arguments.rows, arguments.eval_rows, arguments.processes = 60, 40, 1
    return build.build(arguments)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, dataset):
    """Untrained, but with depths that differ; evaluated by `evaluate/run.py` with its controls."""
    folder = tmp_path_factory.mktemp("checkpoints") / NAME
    recipe = make_recipe(RECIPE)
    torch.manual_seed(0)
    model = AniraForCausalLM(recipe.make_config())
    torch.nn.init.normal_(model.decider.mlp.exit_head.weight, std=2.0)
    model.generation_config.exit_quantile = 0.4
    model.save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()
    make_tokenizer().save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe)))
    lines = [
        {"kind": "evaluation", "split": "validation", "step": step, "depth": 2.0, "depth_all": 2.0, "accuracy": 0.1}
        for step in range(20)
    ]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    out = tmp_path_factory.mktemp("evaluations") / NAME
    arguments = EvaluationArguments(model=str(folder), dataset=str(dataset), config=CONFIG, out=str(out))
    Evaluation(dataclasses.replace(arguments, resamples=20, sweep_rows=0)).run()
    (out / "metrics.json").rename(folder / "metrics.json")
    return folder


@pytest.fixture(scope="session")
def assembled(tmp_path_factory, checkpoint, dataset):
    """The folder of all repos. Tests do not change it."""
    out = tmp_path_factory.mktemp("hub")
    assemble.assemble(assemble.AssembleArguments(str(out), [str(checkpoint)], str(dataset), OWNER))
    return out

"""Whole runs of `train/pretrain.py`: killed, resumed, shared out, spoilt; and of `train/finetune.py`."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from pretrain import Pretraining, RunArguments
from recipe import make_recipe
from safetensors.torch import load_file
from transformers import AutoTokenizer

from datasets_scripts import build
from modeling_anira import AniraForCausalLM

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = {
    "task": "brevo-mini",
    "steps": 20,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "log_every": 1,
    "evaluate_every": 0,
    "checkpoint_every": 0,
    "compute_weight": 0.1,
    "eval_rows": 6,
    "model": {
        "decider": "online",
        "hidden_size": 32,
        "num_attention_heads": 2,
        "max_depth": 3,
        "max_position_embeddings": 256,
    },
}


def write_recipe(path, **changes):
    settings = {**SETTINGS, **changes, "model": {**SETTINGS["model"], **changes.get("model", {})}}
    path.write_text(yaml.safe_dump(settings))
    return path


ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@cache
def programs():
    """The process that runs the programs; it ends with this one."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("programs.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )


def run(folder, *options, processes=1, limit=None, script="pretrain.py"):
    """Runs a program of `train/` in a folder, and returns how it ended, as `subprocess.run` does."""
    said = [folder / f"{name}-{len(list(folder.glob('stderr-*')))}.txt" for name in ("stdout", "stderr")]
    request = {
        "folder": str(folder),
        "script": str(ROOT / "train" / script),
        "options": [str(option) for option in options],
        "processes": processes,
        "limit": limit,
        "stdout": str(said[0]),
        "stderr": str(said[1]),
    }
    server = programs()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    statuses = json.loads(server.stdout.readline())
    stdout, stderr = (path.read_text() for path in said)
    return subprocess.CompletedProcess(request["options"], next(filter(None, statuses), 0), stdout, stderr)


def read_log(out, kind="train"):
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if line["kind"] == kind]


def test_killed_and_resumed_runs_are_bit_equal_to_undisturbed_ones(tmp_path):
    """SIGKILL after step 13 with a checkpoint at 10; SIGTERM; 20 kills while starting, in a step, or in a save."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("forked_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, env=environment, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["whole"] == found["resumed"] == found["asked_resumed"] == found["often"] == 0
    assert found["killed"] == -9
    assert found["killed_at"] == 10
    assert found["resumed_equal"]
    # A signal: one checkpoint, of the very last step, and a clean end.
    assert found["asked"] == 0
    assert 4 <= found["asked_saved"] == found["asked_last_logged"] < 20
    assert found["asked_equal"]
    # A second run in the same folder, while the first lives, is refused.
    assert found["second"] == 3
    assert found["kills"] >= 10
    assert found["saved"] == sorted(found["saved"])
    assert found["saved"][-1] >= 5
    assert found["often_equal"]
    assert found["kept"] == ["step-00000019", "step-00000020"]


def launch(folder, recipe):
    """A run in two processes that the real launcher starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, str(ROOT / "train" / "pretrain.py"), "--config", str(recipe), "--out", "two"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **ENVIRONMENT},
        timeout=280,
        check=False,
    )


@pytest.mark.parametrize("decider", ["fixed", "online", "early"])
def test_two_processes_train_as_one(tmp_path, decider):
    """Half of every batch each: the same loss curve, and no sign that the launcher started one process alone."""
    recipe = write_recipe(tmp_path / "r.yaml", model={"decider": decider}, evaluate_every=10)
    options = ["--config", recipe, "--out"]
    one = run(tmp_path, *options, "one")
    two = launch(tmp_path, recipe) if decider == "online" else run(tmp_path, *options, "two", processes=2)
    assert one.returncode == two.returncode == 0, two.stderr[-3000:]
    first, second = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert second[0]["processes"] == 2
    assert len(first) == len(second) == 20
    for a, b in zip(first, second, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        assert b["tokens"] == a["tokens"]
        assert b["depth"] == pytest.approx(a["depth"], abs=1e-9)
    for a, b in zip(read_log(tmp_path / "one", "evaluation"), read_log(tmp_path / "two", "evaluation"), strict=True):
        rows = [{size: own["rows"] for size, own in line["by_size"].items()} for line in (a, b)]
        assert rows[0] == rows[1]
        assert b["depth_all"] == pytest.approx(a["depth_all"], abs=0.2)


def test_accumulation_changes_nothing_and_bf16_runs(tmp_path):
    curves = []
    for accumulation, precision in ((1, "no"), (4, "no"), (1, "bf16")):
        recipe = write_recipe(tmp_path / "r.yaml", accumulation=accumulation, steps=6, mixed_precision=precision)
        done = run(tmp_path, "--config", recipe, "--out", f"{accumulation}{precision}")
        assert done.returncode == 0, done.stderr[-3000:]
        curves.append([line["loss"] for line in read_log(tmp_path / f"{accumulation}{precision}")])
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    assert curves[2] == pytest.approx(curves[0], abs=0.1)
    assert curves[2] != curves[0]


def test_what_the_environment_says_of_accumulation_is_not_followed(tmp_path):
    """Gradients were divided by it once more, so that clipping had another norm, and only the environment knew."""
    recipe = write_recipe(tmp_path / "r.yaml", steps=2)
    norms = []
    for number in ("1", "4"):
        environment = {**os.environ, **ENVIRONMENT, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": number}
        command = [sys.executable, str(ROOT / "train" / "pretrain.py"), "--config", recipe, "--out", number]
        subprocess.run(command, cwd=tmp_path, env=environment, timeout=280, check=True)
        norms.append([line["gradient_norm"] for line in read_log(tmp_path / number)])
    assert norms[0] == norms[1]


def test_the_trained_folder_loads_as_any_other_and_trackers_have_their_files(tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", steps=3)
    done = run(
        tmp_path,
        "--config",
        recipe,
        "--out",
        "run",
        "--report_to",
        "tensorboard",
        "--set",
        "steps=2",
        "model.max_depth=4",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = AniraForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.max_depth == 4
    assert model.config.compute_weight == 0.1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model", trust_remote_code=False)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    assert (tmp_path / "run" / "model" / "modeling_anira.py").exists()
    assert list((tmp_path / "run" / "trackers").rglob("events*"))
    assert len(read_log(tmp_path / "run")) == 2
    again = run(tmp_path, "--config", recipe, "--out", "run", "--set", "steps=2", "model.max_depth=4")
    assert again.returncode == 1
    assert "holds this run already. Add --resume" in again.stderr
    wrong = run(tmp_path, "--config", recipe, "--out", "other", "--report_to", "tensorbord")
    assert "`--report_to` is 'tensorbord', but must be none or one of" in wrong.stderr
    other = run(tmp_path, "--config", recipe, "--out", "run", "--resume", "--set", "steps=2", "learning_rate=1")
    assert (
        "holds a run with other settings: learning_rate is 0.003, not 1.0, model.max_depth is 4, not 3." in other.stderr
    )


def test_a_loss_out_of_bounds_ends_the_run_with_step_rows_and_last_good_checkpoint(tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", learning_rate=1e9, checkpoint_every=1, max_loss=50)
    done = run(tmp_path, "--config", recipe, "--out", "run")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "The loss is" in last
    assert "at step" in last
    assert "Rows of the data that were read: [" in last
    assert "Last good checkpoint: run/checkpoints/step-0" in last
    # What is called good is: a finite loss whose gradient was not had spoilt the weights of the next checkpoint.
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        weights = load_file(checkpoint / "model.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_a_full_disk_is_one_sentence_and_leaves_the_older_checkpoints(tmp_path):
    """A limit on the size of files stands for the disk."""
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint_every=5)
    folder = tmp_path / "run" / "checkpoints"
    assert run(tmp_path, "--config", recipe, "--out", "run").returncode == 0
    kept = sorted(folder.iterdir())
    shutil.rmtree(kept.pop())
    done = run(tmp_path, "--config", recipe, "--out", "run", "--resume", limit=60_000)
    assert done.returncode == 1
    assert "--resume goes on from the last." in done.stderr.strip().splitlines()[-1], done.stderr[-2000:]
    assert [path for path in sorted(folder.iterdir()) if path.suffix != ".unfinished"] == kept != []
    assert run(tmp_path, "--config", recipe, "--out", "run", "--resume").returncode == 0


def test_an_evaluation_that_was_cut_off_is_made_up_for_and_a_finished_run_is_left_alone(tmp_path):
    """A checkpoint is written before every evaluation: what asked to stop in one once waited for its end, and lost
    the steps since the last checkpoint."""
    recipe = write_recipe(tmp_path / "r.yaml", steps=10, evaluate_every=5, checkpoint_every=0)
    log = tmp_path / "run" / "log.jsonl"
    assert run(tmp_path, "--config", recipe, "--out", "run").returncode == 0
    whole = log.read_text()
    assert run(tmp_path, "--config", recipe, "--out", "run", "--resume").returncode == 0
    assert log.read_text() == whole
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [(line["step"], line["split"]) for line in lines if line["kind"] == "evaluation"] == [
        (step, split) for step in (5, 10) for split in ("validation", "extrapolation")
    ]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000010")
    shutil.rmtree(tmp_path / "run" / "model")
    # Without evaluations any more, that of the last step was dropped, and not made again.
    shutil.copytree(tmp_path / "run", tmp_path / "quiet")
    assert run(tmp_path, "--config", recipe, "--out", "quiet", "--resume", "--set", "eval_rows=0").returncode == 0
    assert read_log(tmp_path / "quiet", "evaluation") == [
        line for line in lines if line["kind"] == "evaluation" and line["step"] == 5
    ]
    cut = next(place for place, line in enumerate(lines) if line["kind"] == "evaluation") + 1
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines[:cut]))
    # A change of when to evaluate once lost the evaluation of this step.
    changed = ("--set", "evaluate_every=10")
    assert run(tmp_path, "--config", recipe, "--out", "run", "--resume", *changed).returncode == 0
    again = [json.loads(line) for line in log.read_text().splitlines()]
    for line in (*lines, *again):
        for name in ("tokens_per_second", "steps"):
            line.pop(name, None)
    assert again == lines
    # Once a run whose checkpoints had been removed began anew, and emptied its log first.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    kept = log.read_text()
    done = run(tmp_path, "--config", recipe, "--out", "run", "--resume")
    assert done.returncode == 1
    assert "holds a model whose checkpoints are gone" in done.stderr.strip().splitlines()[-1]
    assert log.read_text() == kept


def test_dropout_is_the_same_under_every_decider(tmp_path):
    """`fixed` was given no noise, so that the model drew a seed first, and its dropout was another."""
    seen = []
    for decider in ("fixed", "online", "early"):
        model = {"max_position_embeddings": 256, "hidden_size": 16, "decider": decider, "attention_dropout": 0.5}
        content = {"task": "brevo-mini", "steps": 1, "batch_size": 4, "learning_rate": 1e-3, "model": model}
        arguments = RunArguments(config="", out=str(tmp_path / decider))
        training = Pretraining(make_recipe(content), arguments)
        training.model.train()
        training.model.model.prelude[-1].register_forward_hook(lambda module, args, found: seen.append(found[0]))
        training._loss(training.batches[0][0], 0.1)
        training.journal.close()
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    arguments = build.BuildArguments(
        str(tmp_path_factory.mktemp("data") / "tasks"), ["mano-mini", "brevo-mini"], [], 200, 50
    )
    return build.build(arguments)


def test_it_trains_on_a_built_dataset_and_the_result_is_fine_tuned_on_another_task_by_the_stock_trainer(
    tmp_path, dataset
):
    recipe = write_recipe(tmp_path / "r.yaml", data=str(dataset), steps=30)
    done = run(tmp_path, "--config", recipe, "--out", "run")
    assert done.returncode == 0, done.stderr[-3000:]
    options = ["--model", "run/model", "--dataset", dataset, "--name", "mano-mini", "--eval_split", "validation"]
    options += [
        "--max_steps",
        "4",
        "--logging_steps",
        "2",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "2",
        "--use_cpu",
        "true",
    ]
    for extra in ([], ["--lora_rank", "4"]):
        done = run(tmp_path, *options, *extra, "--output_dir", "tuned", script="finetune.py")
        assert done.returncode == 0, done.stderr[-3000:]
        history = json.loads((tmp_path / "tuned" / "trainer_state.json").read_text())["log_history"]
        assert all(1 <= line["depth"] <= 3 for line in history if "loss" in line)
        assert all(1 <= line["eval_depth"] <= 3 and "depth" not in line for line in history if "eval_loss" in line)
        assert any("eval_loss" in line for line in history)
    assert (tmp_path / "tuned" / "adapter_model.safetensors").exists()
    # Before data are read and anything is written; a pickle would be run.
    shutil.copytree(tmp_path / "run" / "model", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    done = run(tmp_path, "--model", "pickled", *options[2:], "--output_dir", "none", script="finetune.py")
    assert done.returncode == 1
    assert "no file named model.safetensors" in done.stderr
    model = AniraForCausalLM.from_pretrained(tmp_path / "tuned")
    assert model.generate(torch.tensor([[2, 10, 5]]), max_new_tokens=2).shape[1] <= 5
    # Once `true` was taken for the name of a folder.
    save, resume = ["--save_strategy", "steps", "--save_steps", "2"], ["--resume_from_checkpoint", "true"]
    assert run(tmp_path, *options, *save, "--output_dir", "kept", script="finetune.py").returncode == 0
    shutil.rmtree(tmp_path / "kept" / "checkpoint-4")
    done = run(tmp_path, *options, *save, *resume, "--output_dir", "kept", script="finetune.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "kept" / "checkpoint-4").exists()
    wrong = run(tmp_path, *options[:3], "wikitext-nowhere", "--output_dir", "tuned", script="finetune.py")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().splitlines()[-1].startswith("finetune.py: ")


def test_a_folder_without_code_is_fine_tuned_in_the_clone_and_what_is_saved_brings_its_code(tmp_path, dataset):
    """README once named a folder of `checkpoints/` here, and finetune.py refused it."""
    bare = ROOT / "checkpoints/brevo-mini-online"
    assert not list(bare.glob("*.py"))
    options = ["--model", bare, "--dataset", dataset, "--name", "mano-mini", "--max_steps", "1", "--use_cpu", "true"]
    done = run(tmp_path, *options, "--output_dir", "tuned", script="finetune.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "auto_map" in json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert (tmp_path / "tuned" / "modeling_anira.py").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora_rank", "-1"], "`lora_rank` is -1, but must be at least 0"),
        (["--eval_strategy", "epoch"], "`eval_split` is left out, but must be given where `eval_strategy` is epoch."),
        (["--resume_from_checkpoint", "true"], "`resume_from_checkpoint` is true, but tuned holds no checkpoint."),
        (["--resume_from_checkpoint", "nowhere"], "`resume_from_checkpoint` is nowhere, which holds no checkpoint."),
        (["--max_stepz", "3"], "--max_stepz 3 is not understood; --help lists the options."),
    ],
)
def test_fine_tuning_refuses_before_it_loads(tmp_path, options, message):
    done = run(tmp_path, "--model", "x", "--dataset", "x", "--output_dir", "tuned", *options, script="finetune.py")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"finetune.py: {message}")


def test_a_missing_dataset_and_a_bad_recipe_end_before_any_compute(tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", data=str(tmp_path / "nowhere"))
    done = run(tmp_path, "--config", recipe, "--out", "run")
    assert done.returncode == 1
    assert "`data` is" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()
    recipe = write_recipe(tmp_path / "r.yaml", batch_size=9)
    done = run(tmp_path, "--config", recipe, "--out", "run", "--set", "accumulation=2")
    assert "`batch_size` is 9, but must be divisible" in done.stderr
    # Found at the first evaluation, after hours, and again after every --resume.
    nothing = {"modulus": 2, "min_size": 1, "max_size": 1, "extrapolation_size": 1}
    recipe = write_recipe(tmp_path / "r.yaml", task="mano-mini", task_settings=nothing)
    done = run(tmp_path, "--config", recipe, "--out", "run")
    assert "`task_settings` leave nothing for validation" in done.stderr.strip().splitlines()[-1]
    # A worker's whole traceback was the message.
    recipe = write_recipe(
        tmp_path / "r.yaml", task="lano-paper", curriculum=0.5, model={"max_position_embeddings": 1024}
    )
    done = run(tmp_path, "--config", recipe, "--out", "run", "--workers", "1")
    assert done.stderr.strip().splitlines()[-1].startswith("pretrain.py: `curriculum` or `sizes`: ")
    done = run(tmp_path, "--config", recipe, "--out", "run", "--stepz", "3")
    assert done.stderr.strip().splitlines()[-1] == "pretrain.py: --stepz 3 is not understood; --help lists the options."

"""Kills and resumes runs of `train/pretrain.py`, and prints what came of it as JSON.

The libraries are imported once; every run is a fork, so that twenty kills take seconds. Argument: a folder to work in.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "train")]

import pretrain  # noqa: E402
from recipe import make_recipe  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from saving import list_checkpoints, read_progress  # noqa: E402

STEPS = 20
# Exit status of a run that said why it would not start.
REFUSED = 3


def recipe(**changes):
    model = {
        "decider": "online",
        "hidden_size": 32,
        "num_attention_heads": 2,
        "max_depth": 3,
        "max_position_embeddings": 64,
        "attention_dropout": 0.1,
    }
    settings = {
        "task": "mano-mini",
        "curriculum": 0.5,
        "optimizer": "muon",
        "steps": STEPS,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "model": model,
        "accumulation": 2,
    }
    settings |= {"warmup_steps": 5, "schedule": "cosine", "log_every": 1, "evaluate_every": 7, "eval_rows": 8}
    return make_recipe({**settings, "checkpoint_every": 10, **changes})


def start(out, resume=False, **changes):
    """Forks a run; the process id of it."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        pretrain.Pretraining(recipe(**changes), pretrain.RunArguments(config="", out=str(out), resume=resume)).run()
        code = 0
    except pretrain.RecipeError:
        code = REFUSED
    finally:
        os._exit(code)


def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def logged(out):
    """The log without what the clock says."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in ("tokens_per_second", "steps")} for line in lines
    ]


def same(one, other):
    """Whether two finished runs have the same weights, bit for bit, and the same log."""
    first, second = (load_file(out / "model" / "model.safetensors") for out in (one, other))
    equal = first.keys() == second.keys() and all(bool((first[name] == second[name]).all()) for name in first)
    return equal and logged(one) == logged(other)


def wait_for_step(out, step):
    while True:
        if (out / "log.jsonl").exists():
            steps = [line["step"] for line in logged(out)] if (out / "log.jsonl").read_text().endswith("\n") else []
            if steps and max(steps) >= step:
                return
        time.sleep(0.005)


def main():
    folder = Path(sys.argv[1])
    pretrain.StepBatches(recipe(), pretrain.open_source(recipe()), pretrain.make_tokenizer(), None)[0]
    found = {"whole": finish(start(folder / "whole"))}

    child = start(folder / "killed")
    wait_for_step(folder / "killed", 13)
    os.kill(child, signal.SIGKILL)
    found["killed"] = finish(child)
    found["killed_at"] = read_progress(list_checkpoints(folder / "killed" / "checkpoints")[-1])["step"]
    found["resumed"] = finish(start(folder / "killed", resume=True))
    found["resumed_equal"] = same(folder / "whole", folder / "killed")

    child = start(folder / "asked")
    wait_for_step(folder / "asked", 4)
    os.kill(child, signal.SIGTERM)
    found["asked"] = finish(child)
    found["asked_last_logged"] = logged(folder / "asked")[-1]["step"]
    found["asked_saved"] = read_progress(list_checkpoints(folder / "asked" / "checkpoints")[-1])["step"]
    found["asked_resumed"] = finish(start(folder / "asked", resume=True))
    found["asked_equal"] = same(folder / "whole", folder / "asked")

    child = start(folder / "busy")
    wait_for_step(folder / "busy", 1)
    found["second"] = finish(start(folder / "busy", resume=True))
    os.kill(child, signal.SIGKILL)
    finish(child)

    seed = random.randrange(2**32)
    found["seed"] = seed
    rng = random.Random(seed)
    out, saved, kills = folder / "often", [0], 0
    for _ in range(20):
        child = start(out, resume=True, checkpoint_every=1)
        # In the midst of starting, of a step, or of writing a checkpoint; never so late that nothing is left to lose.
        if rng.random() < 0.7:
            wait_for_step(out, min(saved[-1] + 2, STEPS - 1))
            time.sleep(rng.uniform(0, 0.03))
        else:
            time.sleep(rng.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        kills += finish(child) == -signal.SIGKILL
        finished = list_checkpoints(out / "checkpoints")
        saved.append(read_progress(finished[-1])["step"] if finished else 0)
    found["kills"], found["saved"] = kills, saved
    found["often"] = finish(start(out, resume=True, checkpoint_every=1))
    found["often_equal"] = same(folder / "whole", out)
    found["kept"] = [path.name for path in sorted((out / "checkpoints").iterdir()) if path.suffix != ".unfinished"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Plans of runs: carried out once, failures named without taking the rest along; finished runs become checkpoints."""

import json
import sys

import collect
import experiments
import pytest
import torch
import yaml
from experiments import PlanError, read_plan
from repos import ReleaseError
from transformers import AutoModelForCausalLM, AutoTokenizer

RUN = {
    "recipe": "train/recipes/mano-mini-online.yaml",
    "set": ["steps=2", "batch_size=4", "evaluate_every=0", "warmup_steps=1"],
    "evaluate": ["--rows", "20", "--controls", "False", "--sweep_rows", "0", "--resamples", "5"],
}


def write_plan(folder, **runs):
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(runs))
    return path


def test_a_training_that_was_told_to_stop_is_not_taken_for_done(tmp_path, monkeypatch):
    """It ends well, having kept a checkpoint; the plan then ended well too, without the run."""
    monkeypatch.setattr(experiments, "_call", lambda command, log, jobs: "")
    plan = write_plan(tmp_path, good=RUN)
    monkeypatch.setattr(sys, "argv", ["x", "--plan", str(plan), "--out", str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match=r"^good: training was stopped; the same command goes on from its checkpoint"):
        experiments.main()


def test_a_plan_is_carried_out_once_and_its_runs_become_checkpoints(tmp_path, dataset, monkeypatch):
    broken = {**RUN, "set": ["stepps=2"]}
    plan = write_plan(tmp_path, broken=broken, good=RUN)
    command = ["x", "--plan", str(plan), "--out", str(tmp_path / "runs"), "--dataset", str(dataset)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(
        SystemExit, match=r"(?s)^broken: training failed: it ended with 1 .*`stepps` is no setting of a recipe"
    ):
        experiments.main()
    good = tmp_path / "runs" / "good"
    written = (good / "evaluation" / "metrics.json").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", [*command, "--only", "good"])
    experiments.main()
    assert (good / "evaluation" / "metrics.json").stat().st_mtime_ns == written

    # Once an edited plan was passed over, and the results of the old one kept its name.
    write_plan(tmp_path, good={**RUN, "set": [*RUN["set"], "compute_weight=0.5"]})
    with pytest.raises(SystemExit, match=r"^good: .* other settings: compute_weight is 0\.02, not 0\.5"):
        experiments.main()

    with pytest.raises(ReleaseError, match=r"lacks model/model\.safetensors.* --out .*evaluation"):
        collect.collect(tmp_path / "runs" / "broken", tmp_path / "checkpoints")
    folder = collect.collect(good, tmp_path / "checkpoints")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["good"]
    assert not list(folder.glob("*.py"))
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    trained = AutoModelForCausalLM.from_pretrained(good / "model", trust_remote_code=True)
    assert all(torch.equal(own, trained.state_dict()[name]) for name, own in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder)("<bos>").input_ids == [2]
    assert "anira-good" in (folder / "README.md").read_text()

    # Once a run that had a released checkpoint's name took its place without a word.
    weights = folder / "model.safetensors"
    theirs = weights.read_bytes()[:-1] + b"?"
    weights.write_bytes(theirs)
    with pytest.raises(ReleaseError, match=r"good holds other weights than .*good: rename the run, or say --replace"):
        collect.collect(good, tmp_path / "checkpoints")
    assert weights.read_bytes() == theirs
    collect.collect(good, tmp_path / "checkpoints", replace=True)
    assert weights.read_bytes() == (good / "model" / weights.name).read_bytes()


def test_a_command_that_dies_is_not_known_by_what_an_earlier_one_said(tmp_path, monkeypatch):
    """Killed for want of memory, a run "failed" with the last line of its progress, or of the run before."""
    log = tmp_path / "log.txt"
    log.write_text("an earlier run's last line\n")
    error = experiments._call(["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], log, 1)
    assert error.startswith("it ended with -9 and said last: nothing")
    assert experiments._call(["-c", "print('done')"], log, 1) == ""
    monkeypatch.setattr(sys, "argv", ["x", "--plan", "none", "--out", str(tmp_path), "--jobs", "0"])
    with pytest.raises(SystemExit, match="`jobs` is 0, but must be at least 1"):
        experiments.main()


def test_bad_plans_are_refused_by_what_is_wrong(tmp_path):
    with pytest.raises(PlanError, match=r"The run a of .* has \['recipes'\], but must have recipe, and may have set"):
        read_plan(write_plan(tmp_path, a={"recipes": "x"}))
    with pytest.raises(PlanError, match=r"The run a of .* has \[\], but must have recipe"):
        read_plan(write_plan(tmp_path, a=None))
    with pytest.raises(PlanError, match="`only` is 'b', but must be found in one of a"):
        read_plan(write_plan(tmp_path, a=RUN), only="b")
    with pytest.raises(PlanError, match="cannot be read"):
        read_plan(tmp_path / "none.yaml")
    with pytest.raises(PlanError, match=r"The run a of .* has \['3', 'b'\]"):
        read_plan(write_plan(tmp_path, a={3: 4, "b": 5}))
    with pytest.raises(PlanError, match="`set` of the run a is 'steps=3', but must be a list"):
        read_plan(write_plan(tmp_path, a={**RUN, "set": "steps=3"}))

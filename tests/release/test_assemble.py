"""Assembled repos: complete, without pickle, the same each time, whole or not at all."""

import hashlib
import json
import shutil

import assemble
import evaluate
import pytest
from conftest import CONFIG, NAME, OWNER
from datasets import load_dataset
from repos import DATASET, ReleaseError, kind_of, list_files
from safetensors.torch import load_file, save_file

MODEL = f"anira-{NAME}"
METRICS = ["alignment", "decision_timing", "dynamics", "generalization"]


def digest(folder):
    return {str(path): hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in list_files(folder)}


def test_every_repo_is_there_with_what_its_library_looks_for(assembled):
    kinds = {path.name: kind_of(path) for path in assembled.iterdir()}
    assert kinds == {MODEL: "model", DATASET: "dataset", **dict.fromkeys(METRICS, "space")}


def test_a_model_repo_is_complete_and_holds_no_pickle(assembled, checkpoint):
    code = {path.name for path in (assemble.ROOT / "modeling_anira").glob("*.py")} - {"__init__.py"}
    expected = {path.name for path in checkpoint.iterdir()} | code | {"README.md", "LICENSE"}
    assert {str(path) for path in list_files(assembled / MODEL)} == expected
    found = json.loads((assembled / MODEL / "config.json").read_text())
    assert set(found["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    kept, own = (load_file(folder / "model.safetensors") for folder in (assembled / MODEL, checkpoint))
    assert kept.keys() == own.keys()
    assert all((kept[name] == own[name]).all() for name in own)


def test_strangers_among_a_checkpoint_stay_behind(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / NAME)
    for name in ("pytorch_model.bin", "evil.py", "notes.txt"):
        (folder / name).write_text("x")
    written = assemble.assemble_model(folder, tmp_path / "hub", OWNER)
    assert not {"pytorch_model.bin", "evil.py", "notes.txt"} & {path.name for path in written.iterdir()}


def test_assembling_again_gives_the_same_bytes(assembled, checkpoint, dataset, tmp_path):
    out = shutil.copytree(assembled, tmp_path / "hub")
    (out / MODEL / "left-over.py").write_text("")
    assemble.assemble(assemble.AssembleArguments(str(out), [str(checkpoint)], str(dataset), OWNER))
    assert digest(out) == digest(assembled)


def test_the_dataset_loads_and_its_checksums_hold(assembled, dataset, tmp_path):
    folder = assembled / DATASET
    card = (folder / "README.md").read_text()
    assert f'load_dataset("{OWNER}/{DATASET}", "{CONFIG}"' in card
    assert "path/to" not in card
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        number, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == number
    own, source = (load_dataset(str(path), CONFIG, split="test", cache_dir=str(tmp_path)) for path in (folder, dataset))
    assert own["text"] == source["text"]


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_loads_from_its_folder_and_names_its_repo(assembled, name):
    assert evaluate.load(str(assembled / name)).features
    text = "".join((assembled / name / path).read_text() for path in list_files(assembled / name))
    assert f'evaluate.load("{OWNER}/{name}")' in text
    assert "evaluate/metrics" not in text


def test_what_is_missing_is_said_before_anything_is_written(checkpoint, dataset, tmp_path):
    out = tmp_path / "hub"
    with pytest.raises(ReleaseError, match=r"build\.py --out .*nowhere"):
        assemble.assemble(assemble.AssembleArguments(str(out), [str(checkpoint)], str(tmp_path / "nowhere")))
    folder = shutil.copytree(checkpoint, tmp_path / NAME)
    (folder / "recipe.json").unlink()
    with pytest.raises(ReleaseError, match=r"lacks recipe\.json"):
        assemble.assemble(assemble.AssembleArguments(str(out), [str(folder)], str(dataset)))
    assert not out.exists()


def test_a_dataset_without_the_task_of_a_checkpoint_is_refused(checkpoint, dataset, tmp_path):
    """A card's command built one task where others keep all, and a dataset repo of that one would have gone up."""
    lacking = shutil.copytree(dataset, tmp_path / "tasks")
    record = json.loads((lacking / "generation.json").read_text())
    record["configs"] = {"brevo-mini": record["configs"].pop(CONFIG)}
    (lacking / "generation.json").write_text(json.dumps(record))
    with pytest.raises(ReleaseError, match=f"lacks {CONFIG}"):
        assemble.assemble(assemble.AssembleArguments(str(tmp_path / "hub"), [str(checkpoint)], str(lacking), OWNER))
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("says", [True, False])
def test_weights_that_were_not_evaluated_are_refused_and_the_old_repo_stays(says, assembled, checkpoint, tmp_path):
    """Also beside metrics of an older evaluation, which do not say which weights they are of."""
    out = shutil.copytree(assembled, tmp_path / "hub")
    folder = shutil.copytree(checkpoint, tmp_path / NAME)
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    metrics = json.loads((folder / "metrics.json").read_text())
    if not says:
        del metrics["weights_digest"]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ReleaseError, match="of other weights"):
        assemble.assemble_model(folder, out, OWNER)
    assert digest(out) == digest(assembled)


def test_weights_that_do_not_fit_the_config_are_refused_and_the_old_repo_stays(assembled, checkpoint, tmp_path):
    out = shutil.copytree(assembled, tmp_path / "hub")
    folder = shutil.copytree(checkpoint, tmp_path / NAME)
    config = json.loads((folder / "config.json").read_text())
    more = {"num_coda_layers": config["num_coda_layers"] + 1, "num_hidden_layers": None}
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    with pytest.raises(ReleaseError, match="do not fit"):
        assemble.assemble_model(folder, out, OWNER)
    assert digest(out) == digest(assembled)


def test_a_folder_of_something_else_is_not_replaced(checkpoint, tmp_path):
    (tmp_path / MODEL).mkdir()
    (tmp_path / MODEL / "thesis.txt").write_text("years of work")
    with pytest.raises(ReleaseError, match="no model repo"):
        assemble.assemble_model(checkpoint, tmp_path, OWNER)
    assert (tmp_path / MODEL / "thesis.txt").exists()

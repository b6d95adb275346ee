"""A saved folder loads in a process that knows nothing of this repository, and saves itself whole again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import small_model
from words import word_tokenizer

MODEL_FILES = {path.name for path in (Path(__file__).parents[2] / "modeling_anira").glob("*.py")} - {"__init__.py"}

# Blocks the package that is installed here, so that only the folder's own code can be found.
STRANGER = """
import sys
sys.modules["modeling_anira"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
folder, again = sys.argv[1:3]
ids = torch.arange(2, 12).view(2, 5)
"""


def run_as_stranger(code: str, tmp_path: Path, *arguments: str) -> str:
    """Output of a fresh process in another folder, with a cache of its own, offline."""
    script = tmp_path / "stranger.py"
    script.write_text(STRANGER + code)
    settings = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | settings
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=["early", "online"])
def folder(request, tmp_path):
    """A saved model with its tokenizer, and the model."""
    model = small_model(decider=request.param, max_depth=3)
    model.generation_config.exit_quantile = 0.7
    model.save_pretrained(tmp_path / "saved-model.v1")
    word_tokenizer().save_pretrained(tmp_path / "saved-model.v1")
    return tmp_path / "saved-model.v1", model


def assert_complete(folder: Path) -> None:
    """Code, weights and all entries of the auto map."""
    assert {path.name for path in folder.glob("*.py")} == MODEL_FILES
    assert set(json.loads((folder / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
    }
    assert (folder / "model.safetensors").exists()


def test_a_stranger_loads_runs_and_saves_again(folder, tmp_path):
    path, model = folder
    assert_complete(path)
    again = tmp_path / "again"
    load_and_save = """
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert "transformers_modules" in type(model).__module__ and "transformers_modules" in type(config).__module__
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
output = model(ids)
assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
assert model.generation_config.exit_quantile == 0.7
generated = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
assert generated.exit_depths.shape == generated.sequences.shape
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
text = pipeline("text-generation", model=folder, tokenizer=tokenizer, trust_remote_code=True)
assert text("w2 w3 w4", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("w2 w3 w4")
model.save_pretrained(again)
torch.save((output.logits, output.exit_depths, generated.sequences), again + ".pt")
assert not any("modeling_anira/" in str(getattr(m, "__file__", "")) and "transformers_modules" not in m.__file__
               for m in list(sys.modules.values()) if m is not None)
"""
    run_as_stranger(load_and_save, tmp_path, str(path), str(again))
    assert_complete(again)

    # Where the stranger's process ran; bits are the same on the same device alone.
    model.cpu()
    ids = torch.arange(2, 12, device="cpu").view(2, 5)
    logits, depths, sequences = torch.load(str(again) + ".pt")
    output = model(ids)
    assert torch.equal(logits, output.logits)
    assert torch.equal(depths, output.exit_depths)
    assert torch.equal(sequences, model.generate(ids, max_new_tokens=4, do_sample=False))

    load_again = """
logits = torch.load(again + ".pt")[0]
for kind in (AutoConfig, AutoModel, AutoModelForCausalLM):
    loaded = kind.from_pretrained(again, trust_remote_code=True)
assert torch.equal(loaded(ids).logits, logits)
"""
    run_as_stranger(load_again, tmp_path, str(path), str(again))


def test_a_saved_base_model_loads_too(tmp_path):
    model = small_model(max_depth=3)
    model.model.save_pretrained(tmp_path / "base")
    assert_complete(tmp_path / "base")
    run_as_stranger(
        "AutoModel.from_pretrained(folder, trust_remote_code=True)(ids)", tmp_path, str(tmp_path / "base"), ""
    )


def test_options_of_the_config_can_be_set_while_loading(tmp_path):
    """From a local folder the config's class exists twice: one from its own file, one from the model's imports."""
    small_model(decider="online", max_depth=3).save_pretrained(tmp_path / "saved")
    code = """
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, max_depth=5, dtype=torch.bfloat16)
assert model.config.num_hidden_layers == 12 and model.dtype == torch.bfloat16
assert model(ids, exit_depths=torch.full((2, 5), 5)).exit_depths.max() == 5
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
config.exit_quantile = 0.9
assert AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=True).config.exit_quantile == 0.9
AutoModelForCausalLM.from_config(config, trust_remote_code=True)(ids)
"""
    run_as_stranger(code, tmp_path, str(tmp_path / "saved"), "")

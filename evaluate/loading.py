"""Loading the checkpoint that a command was given: the model, and the tokenizer beside it.

They run with the code of this clone: that which a folder or repo brings is never run.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from examples import EvaluationError
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_anira  # noqa: F401 (registers the Auto classes, so that a folder without code loads as well)
from datasets_scripts import Batch
from datasets_scripts.vocabulary import decode


def load_model(name: str, revision: str | None) -> Any:
    """The ANIRA model of a folder or Hub name, in eval mode. Raises an EvaluationError if it is none."""
    _refuse_other_folders(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise EvaluationError(f"The model {name} cannot be loaded: {error}") from error
    if model.config.model_type != "anira":
        raise EvaluationError(f"`model` is of type {model.config.model_type}, but must be an ANIRA checkpoint.")
    return model.eval()


def load_tokenizer(name: str, revision: str | None) -> Any:
    """The tokenizer of a folder or Hub name. Raises an EvaluationError if there is none."""
    _refuse_other_folders(name)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"The tokenizer of {name} cannot be loaded: {error}") from error


def _refuse_other_folders(name: str) -> None:
    """Says what is wrong with a path before transformers takes it for something else."""
    folder = Path(name)
    # The second: adapters, which name the checkpoint that they belong to.
    if any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        return
    if (folder / "model" / "config.json").is_file():
        raise EvaluationError(f"`model` is {name}, a run; its checkpoint is {folder / 'model'}.")
    if folder.is_dir():
        raise EvaluationError(f"`model` is {name}, which has no config.json: it is no checkpoint.")
    if folder.is_absolute() or len(folder.parts) > 2:
        raise EvaluationError(
            f"`model` is {name}, but there is no such folder, and no repo on the Hub has such a name."
        )


def digest_weights(weights: dict[str, torch.Tensor]) -> str:
    """A hash of named weights, whatever their order: of those of a model, or of those that a file holds."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def check_tokenizer(model: str, batch: Batch, revision: str | None) -> None:
    """Refuses a model whose tokenizer gives other ids than the dataset's."""
    tokenizer = load_tokenizer(model, revision)
    ids = batch.tokens[: batch.offsets[1]].tolist()
    text = decode(ids)
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    if found != ids:
        raise EvaluationError(
            f"The tokenizer of {model} differs from the dataset's: {text!r} becomes {found[:12]}, not {ids[:12]}."
        )

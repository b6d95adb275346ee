"""Loading the checkpoint that a command was given: the model, and the tokenizer beside it."""

from typing import Any

from examples import EvaluationError
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_anira  # noqa: F401 (registers the Auto classes, so that a folder without code loads as well)
from datasets_scripts import Batch
from datasets_scripts.vocabulary import decode


def load_model(name: str, revision: str | None) -> Any:
    """The ANIRA model of a folder or Hub name, in eval mode. Raises an EvaluationError if it is none."""
    try:
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"The model {name} cannot be loaded: {error}") from error
    if model.config.model_type != "anira":
        raise EvaluationError(f"`model` is of type {model.config.model_type}, but must be an ANIRA checkpoint.")
    return model.eval()


def load_tokenizer(name: str, revision: str | None) -> Any:
    """The tokenizer of a folder or Hub name. Raises an EvaluationError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"The tokenizer of {name} cannot be loaded: {error}") from error


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

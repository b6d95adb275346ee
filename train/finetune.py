"""Fine-tunes any ANIRA checkpoint with the stock `Trainer`.

    python train/finetune.py --model build/runs/mano-online/model --dataset build/tasks --name brevo-mini \
        --output_dir build/runs/brevo-from-mano --max_steps 500 --learning_rate 5e-4 --per_device_train_batch_size 64

The data: whatever `load_dataset` finds with a column `text`, or `prompt` and `completion`. All of TrainingArguments can
be said on the command line. Of this repository nothing is needed but this file and `labels.py`, if the model brings its
code; where `modeling_anira` is installed, a folder without code will do, such as those in `checkpoints/`.
"""

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, load_dataset
from labels import IGNORED, make_labels
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

with suppress(ModuleNotFoundError):
    import modeling_anira  # noqa: F401 (registers the Auto classes, so that a folder without code loads as well)

# The core's projections, which every iteration shares.
LORA_TARGETS = r".*\.core\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class FinetuneArguments:
    """Fine-tune an ANIRA checkpoint."""

    model: str = field(
        metadata={"help": "Folder or Hub name of the checkpoint. Its code is run: trust where it comes from."}
    )
    dataset: str = field(metadata={"help": "Folder or Hub name, as load_dataset takes it."})
    name: str | None = field(default=None, metadata={"help": "Config of the dataset, such as mano-mini."})
    train_split: str = field(default="train", metadata={"help": "Split to train on; slices such as train[:1000] work."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on, if eval_strategy asks for it."}
    )
    loss_on: Literal["completion", "all"] = field(
        default="completion", metadata={"help": "What is learnt of prompt and completion; a bare text is learnt whole."}
    )
    revision: str = field(default="main", metadata={"help": "Revision of the model on the Hub."})
    lora_rank: int = field(
        default=0, metadata={"help": "Above 0: only LoRA adapters of this rank on the core are trained (peft)."}
    )


class DepthCallback(TrainerCallback):
    """Adds to what the Trainer logs the mean number of iterations a token got since the last such log.

    It is called `depth` in training, where exits are drawn, and `eval_depth` in evaluation, where they follow the rule.
    """

    def __init__(self) -> None:
        # Sums of depths and of tokens, in training and not.
        self._sums: dict[bool, list[Any]] = {True: [0.0, 0.0], False: [0.0, 0.0]}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].register_forward_hook(self._observe)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        name, training = ("eval_depth", False) if "eval_loss" in logs else ("depth", True)
        depths, tokens = map(float, self._sums[training])
        if tokens:
            logs[name] = depths / tokens
            state.log_history[-1][name] = depths / tokens
            self._sums[training] = [0.0, 0.0]

    def _observe(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        depths = getattr(output, "exit_depths", None)
        if depths is not None:
            sums = self._sums[module.training]
            sums[0] = sums[0] + depths.sum()
            sums[1] = sums[1] + (depths > 0).sum()


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, loss_on: str, longest: int) -> Dataset:
    """`input_ids` and `labels` of every row. Raises a ValueError for missing columns and for rows that do not fit."""
    split = {"prompt", "completion"} <= set(rows.column_names)
    if not split and "text" not in rows.column_names:
        raise ValueError(
            f"The dataset has columns {rows.column_names}, but must have `text`, or `prompt` and `completion`."
        )

    vocabulary = tokenizer.get_vocab()
    never = [vocabulary["<ans>"]] if "<ans>" in vocabulary else []
    # In some tokenizers (GPT-2's) it is the end of text, which the data may have.
    written = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    unknown = None if tokenizer.unk_token_id in written else tokenizer.unk_token_id

    def convert(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] if split else []
        rest = row["completion"] if split else row["text"]
        input_ids = prompt + tokenizer(rest, add_special_tokens=False)["input_ids"]
        if unknown is not None and unknown in input_ids:
            part = row["prompt"] if unknown in prompt else rest
            raise ValueError(f"The model's tokenizer does not know all of {part[:80]!r}: it is that of other data.")
        if len(input_ids) > longest:
            raise ValueError(f"A row has {len(input_ids)} tokens, but the model takes {longest}: filter the data.")
        labels = make_labels(input_ids, len(prompt), loss_on if split else "all", never)
        # The first label is of no prediction. A step of such rows alone would be 0 / 0, and the weights NaN.
        if all(label == IGNORED for label in labels[1:]):
            raise ValueError(
                f"A row has nothing to learn, {(row['prompt'] if split else rest)[:80]!r}: filter the data."
            )
        return {"input_ids": input_ids, "labels": labels}

    return rows.map(convert, remove_columns=rows.column_names)


def add_lora(model: PreTrainedModel, rank: int) -> Any:
    """The model with trainable adapters on its core, everything else frozen."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"))


def main() -> None:
    """Fine-tunes as the command line says, and saves model, code and tokenizer to the output folder."""
    parser = HfArgumentParser((FinetuneArguments, TrainingArguments))  # type: ignore[arg-type]
    try:
        arguments, training, rest = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    except ValueError as error:
        sys.exit(f"finetune.py: {error}")
    if rest:
        sys.exit(f"finetune.py: {' '.join(rest)} is not understood; --help lists the options.")
    if training.label_smoothing_factor:
        # The stock Trainer would take labels for shifted already, and leave out the compute loss.
        sys.exit(
            f"finetune.py: `label_smoothing_factor` is {training.label_smoothing_factor}, but must be 0: the loss is "
            "the model's own."
        )
    if arguments.lora_rank < 0:
        sys.exit(f"finetune.py: `lora_rank` is {arguments.lora_rank}, but must be at least 0.")
    strategy = training.eval_strategy.value
    if strategy != "no" and not arguments.eval_split:
        sys.exit(f"finetune.py: `eval_split` is left out, but must be given where `eval_strategy` is {strategy}.")
    # Trainer takes True for its last checkpoint, but the command line gives the word, which it takes for a folder.
    resume = {"true": True, "false": None}.get(
        str(training.resume_from_checkpoint).lower(), training.resume_from_checkpoint
    )
    folder = training.output_dir
    if resume is True and not (Path(folder).is_dir() and get_last_checkpoint(folder)):
        sys.exit(f"finetune.py: `resume_from_checkpoint` is true, but {folder} holds no checkpoint.")
    if isinstance(resume, str) and not (Path(resume) / "trainer_state.json").is_file():
        sys.exit(f"finetune.py: `resume_from_checkpoint` is {resume}, which holds no checkpoint.")
    if (Path(arguments.model) / "adapter_config.json").is_file():
        sys.exit(
            f"finetune.py: `model` is {arguments.model}, which holds adapters alone, frozen as they load: merge them "
            "into their model (peft's merge_and_unload), or fine-tune that anew."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, revision=arguments.revision, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, revision=arguments.revision, trust_remote_code=True, use_safetensors=True
        )
        splits = [arguments.train_split, *([arguments.eval_split] if arguments.eval_split else [])]
        data = [
            tokenize(
                load_dataset(arguments.dataset, arguments.name, split=split),
                tokenizer,
                arguments.loss_on,
                model.config.max_position_embeddings,
            )
            for split in splits
        ]
    except (OSError, ValueError) as error:
        sys.exit(f"finetune.py: {error}")
    if arguments.lora_rank:
        # Trainer's own seeding comes after these weights are drawn.
        set_seed(training.seed)
        model = add_lora(model, arguments.lora_rank)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=data[0],
        eval_dataset=data[1] if len(data) > 1 else None,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    # First, so that every other callback sees the depth.
    trainer.callback_handler.callbacks.insert(0, DepthCallback())
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()

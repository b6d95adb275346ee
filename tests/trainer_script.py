"""Trains a small model with the stock Trainer; run by test_ecosystem.py in one or two processes."""

import json
import os
import sys
from pathlib import Path

import torch

# Not left to the script's own folder, where tests/modeling_anira would be found instead of the package.
sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import seeded, small_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from words import word_tokenizer


def rows(count: int) -> list[dict]:
    """Rows of different lengths that count upwards: easy to learn."""
    starts = torch.randint(2, 12, (count,), generator=seeded(0)).tolist()
    return [{"input_ids": list(range(start, start + 4 + start % 5))} for start in starts]


def train(out: str, **options) -> dict:
    """Losses of the log, the loss on held-out rows before and after, and the number of processes."""
    model = small_model(decider=options.pop("decider", "online"), decisive=False, compute_weight=0.01).train()
    arguments = TrainingArguments(
        output_dir=out,
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=5,
        use_cpu="ANIRA_TEST_DEVICE" not in os.environ,
        save_strategy="no",
        seed=0,
        **options,
    )
    data = rows(256)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data[:224],
        eval_dataset=data[224:],
        data_collator=DataCollatorForLanguageModeling(word_tokenizer(), mlm=False),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(out)
    predictions = trainer.predict(data[224:]).predictions
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "before": before,
        "after": after,
        "processes": arguments.world_size,
        "predictions": list(predictions.shape),
    }


if __name__ == "__main__":
    result = train(sys.argv[1])
    if int(os.environ.get("RANK", 0)) == 0:
        Path(sys.argv[1], "result.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        # A process that leaves while gloo's threads run is aborted now and then.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

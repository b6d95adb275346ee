"""Real libraries on the model: Trainer, Accelerate, PEFT, TRL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from cases import seeded, small_model
from datasets import Dataset
from trainer_script import train
from transformers import DataCollatorWithFlattening
from words import word_tokenizer

from modeling_anira import AniraForCausalLM


@pytest.fixture(autouse=True)
def tests_device():
    """The libraries choose the device: Trainer takes a GPU where there is one, and its samplers need the CPU's."""


@pytest.mark.parametrize(
    "options",
    [
        {"decider": "online"},
        {"decider": "early", "gradient_checkpointing": True},
        {"decider": "online", "gradient_checkpointing": True, "bf16": True},
        {"decider": "early", "gradient_accumulation_steps": 2, "bf16": True},
    ],
    ids=["plain", "checkpointing", "checkpointing-bf16", "accumulation-bf16"],
)
def test_trainer(options, tmp_path):
    result = train(str(tmp_path), **options)
    assert result["processes"] == 1
    assert result["after"] < 0.7 * result["before"]
    assert result["predictions"][0] == 32
    assert result["predictions"][2] == 23
    assert AniraForCausalLM.from_pretrained(tmp_path)(torch.tensor([[2, 3]])).exit_depths.shape == (1, 2)


def test_trainer_in_two_processes(tmp_path):
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parents[1] / "trainer_script.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["processes"] == 2
    assert result["after"] < 0.7 * result["before"]


def test_lora_on_the_core(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = small_model(decider="online")
    ids = torch.randint(2, 23, (4, 6), generator=seeded(0))
    before = model(ids).logits
    targets = r".*\.core\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trainable = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".core." in name and "lora" in name for name in trainable)
    assert torch.allclose(tuned(input_ids=ids).logits, before, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = tuned.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tuned.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(small_model(decider="online"), tmp_path)
    assert torch.allclose(again(input_ids=ids).logits, tuned(input_ids=ids).logits, atol=1e-5)
    generated = again.generate(input_ids=ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert generated.exit_depths.shape == (4, 9)
    merged = again.merge_and_unload()
    assert torch.allclose(merged(ids).logits, tuned(input_ids=ids).logits, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_move_no_depths(kind, beams):
    """PEFT puts them before a prompt behind our back: depths came back shifted, and a row that ended was an error."""
    import peft

    torch.manual_seed(0)
    model = small_model()
    model.generation_config.pad_token_id = 0
    settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(model, settings).eval()
    ids = torch.randint(2, 23, (2, 6), generator=seeded(0))
    if kind == "PromptTuningConfig":
        ids[0, :2] = 0  # under prefix tuning PEFT's forward and `generate` count a padded row's positions otherwise
    options = {"do_sample": False, "return_dict_in_generate": True, "num_beams": beams, "max_new_tokens": 6}
    plain = tuned.generate(input_ids=ids, attention_mask=(ids > 0).long(), eos_token_id=None, **options)
    # An end that the second row meets first, where there is one.
    end = int(plain.sequences[1, 8])
    for eos in (None, end):
        out = tuned.generate(input_ids=ids, attention_mask=(ids > 0).long(), eos_token_id=eos, **options)
        for row, sequence in enumerate(out.sequences):
            length = len(sequence)
            if eos is not None:
                ends = (sequence[6:] == eos).nonzero()
                length = 6 + int(ends[0]) + 1 if len(ends) else length
            whole = sequence[None, :length]
            again = tuned(
                input_ids=whole, attention_mask=torch.cat(((ids[row : row + 1] > 0), whole[:, 6:] > -1), 1).long()
            )
            wanted = again.exit_depths[:, -length:].clone()
            wanted[:, -1] = 0
            assert out.exit_depths[row, :length].tolist() == wanted[0].tolist()
            assert not out.exit_depths[row, length:].any()


def train_by_sft(folder, packing=False, **settings):
    """Losses, and the model, after TRL's trainer with the loss of the model, as the README says."""
    from transformers import Trainer
    from trl import SFTConfig, SFTTrainer

    class WholeLoss(SFTTrainer):
        compute_loss = Trainer.compute_loss

    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(2, 18)] * 4
    model = small_model(decider="online", decisive=False, **settings).train()
    trainer = WholeLoss(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=20,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            use_cpu=True,
            save_strategy="no",
            logging_steps=5,
            report_to=[],
            bf16=False,
            max_length=32,
            packing=packing,
            loss_type="nll",  # TRL 1.14 would put a forward of its own in the place of the model's
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model.eval()


def test_sft_on_prompts_and_completions(tmp_path):
    """TRL's own loss is of cross-entropy alone: whatever the weight of the compute loss, weights came out bit-equal."""
    losses, free = train_by_sft(tmp_path / "free", compute_weight=0.0)
    assert losses[-1] < 0.8 * losses[0]
    _, pressed = train_by_sft(tmp_path / "pressed", compute_weight=10.0)
    ids = torch.arange(2, 14)[None]
    depths = [float(model(ids).expected_depth.mean()) for model in (free, pressed)]
    assert depths[1] < depths[0] - 0.2


def test_sft_on_packed_rows(tmp_path):
    """Refused once, for the borders that TRL adds for flash attention to positions that say them already."""
    losses, _ = train_by_sft(tmp_path, packing=True)
    assert losses[-1] < 0.9 * losses[0]


def test_a_flattened_batch_is_what_its_rows_are_alone():
    model = small_model(decider="online")
    rows = [[2, 3, 4], [5, 6, 7, 8]]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    output = model(**collate([{"input_ids": row} for row in rows]))
    alone = [model(torch.tensor([row])) for row in rows]
    assert torch.allclose(output.logits, torch.cat([one.logits for one in alone], 1), atol=1e-5)
    assert torch.equal(output.exit_depths, torch.cat([one.exit_depths for one in alone], 1))
    assert output.loss.isfinite()


@pytest.fixture
def bf16_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_model_unwrapped_from_mixed_precision_is_what_it_was(bf16_accelerator):
    """accelerate took the decorator that reads `return_dict` away with its own: forward was given it twice."""
    ids = torch.tensor([[2, 3, 4]])
    for model in (small_model(), small_model().model):
        wanted = model(ids, return_dict=False)[0]
        again = bf16_accelerator.unwrap_model(bf16_accelerator.prepare(model), keep_fp32_wrapper=False)
        assert torch.equal(again(ids, return_dict=False)[0], wanted)
        again.config.return_dict = False
        assert isinstance(again(ids), tuple)
        assert again(ids, return_dict=True).exit_depths.shape == (1, 3)
    model = bf16_accelerator.unwrap_model(bf16_accelerator.prepare(small_model()), keep_fp32_wrapper=False)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[0] == 1


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"model": "cpu", "lm_head": "disk"}])
def test_device_map(device_map, tmp_path):
    """accelerate moves a module that it finds among arguments: the head was handed on as one, and one on disk broke."""
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = AniraForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    ids = torch.ones(2, 4, dtype=torch.int64)
    assert torch.allclose(loaded(ids.to(loaded.device)).logits.cpu(), model(ids).logits, atol=1e-5)


def test_settings_given_while_loading_stay_out_of_the_generation_config(tmp_path):
    """transformers hands them to both: `generate` refused them, and a folder saved then was spoilt for all."""
    small_model().save_pretrained(tmp_path / "one")
    ids = torch.ones(1, 4, dtype=torch.int64)
    settings = {"execution": "masked", "attention_dropout": 0.1, "compute_weight": 0.5}
    model = AniraForCausalLM.from_pretrained(tmp_path / "one", max_depth=3, **settings)
    assert {name: getattr(model.config, name) for name in settings} == settings
    model.generate(ids, max_new_tokens=2, do_sample=False)
    model.save_pretrained(tmp_path / "two")
    kept = json.loads((tmp_path / "two" / "generation_config.json").read_text())
    assert not settings.keys() & kept.keys()
    output = AniraForCausalLM.from_pretrained(tmp_path / "two").generate(
        ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    assert output.exit_depths.max() <= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype(dtype, tmp_path):
    small_model().save_pretrained(tmp_path)
    model = AniraForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    output = model.generate(torch.ones(2, 4, dtype=torch.int64), max_new_tokens=3, do_sample=False)
    assert output.shape == (2, 7)

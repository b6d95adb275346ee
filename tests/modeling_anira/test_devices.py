"""The model makes its tensors where its weights are, whatever the default device is."""

import pytest
import torch
from cases import make_batch, run, small_model

from modeling_anira.deciders import DECIDERS


@pytest.fixture
def wrong_device():
    """A tensor made without a device has no numbers here, and meets none that has."""
    return torch.device("meta")


@pytest.mark.parametrize("decider", DECIDERS)
@pytest.mark.parametrize("execution", ["masked", "packed"])
@pytest.mark.parametrize("options", [{}, {"use_cache": True}, {"exit_rule": "sample"}, {"given": True}], ids=str)
def test_forward(decider, execution, options, wrong_device):
    model = small_model(decider=decider)
    batch = make_batch(1, [(0, 0), (2, 0), (0, 3)], 7, 4)
    options = {"exit_depths": batch.depths} if options.get("given") else options
    torch.manual_seed(0)
    expected = run(model, batch, execution, **options)
    torch.manual_seed(0)
    with wrong_device:
        output = run(model, batch, execution, **options)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.exit_depths, expected.exit_depths)
    with wrong_device:
        assert model.flops(output.exit_depths) == model.flops(expected.exit_depths)


@pytest.mark.parametrize("decider", DECIDERS)
def test_training(decider, wrong_device):
    model = small_model(decider=decider).train()
    batch = make_batch(1, [(0, 0), (2, 0)], 7, 4)
    with wrong_device:
        run(model, batch, "masked", labels=batch.input_ids).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("decider", ["online", "stability"])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(9)}], ids=["mean", "sum"])
def test_a_device_map_may_part_head_and_model(decider, options):
    """Their losses lay on two devices, and could not be added up. `meta` stands for the second."""
    model = small_model(decider=decider)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.to("meta"))
    batch = make_batch(1, [(0, 0), (2, 0)], 7, 4)
    output = run(model, batch, "masked", labels=batch.input_ids, **options)
    assert output.loss.is_meta
    assert output.compute_loss.is_meta


@pytest.mark.parametrize("decider", DECIDERS)
def test_generation(decider, wrong_device):
    model = small_model(decider=decider)
    batch = make_batch(1, [(0, 0), (2, 0)], 7, 4)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    expected = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)
    with wrong_device:
        output = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.exit_depths, expected.exit_depths)

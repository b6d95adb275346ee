"""What is computed, and that the model knows what it costs."""

import pytest
import torch
from cases import make_batch, run, small_model
from torch.utils.flop_counter import FlopCounterMode

from modeling_anira.deciders import DECIDERS


class RowCounter:
    """Counts the tokens that go through a module."""

    def __init__(self, module):
        self.rows = 0
        module.register_forward_hook(self)

    def __call__(self, module, args, output):
        self.rows += output.shape[:-1].numel()


@pytest.mark.parametrize("decider", [name for name in DECIDERS if name != "fixed"])
@pytest.mark.parametrize("cached", [False, True])
def test_rows_through_the_core_are_the_sum_of_depths(decider, cached):
    model = small_model(decider=decider, max_depth=6, num_core_layers=2, stability_threshold=0.4)
    counters = [RowCounter(m) for layer in model.model.core for m in (layer.mlp, layer.self_attn.q_proj)]
    batch = make_batch(0, [(0, 0), (3, 0), (0, 2)], 7, 6)
    output = run(model, batch, use_cache=cached)
    total = int(output.exit_depths.sum())
    assert [counter.rows for counter in counters] == [total] * 4
    assert total < batch.real.sum() * output.exit_depths.max(), "depths are mixed"


def test_rows_that_have_exited_are_not_computed_while_decoding():
    """Decoding one token a row: rows through the core number the sum of depths, not batch x deepest."""
    model = small_model(max_depth=6)
    batch = make_batch(0, [(0, 0)] * 4, 5, 6)
    first = run(model, batch, use_cache=True)
    counter = RowCounter(model.model.core[0].mlp)
    depths = torch.tensor([[1], [6], [2], [3]])
    model(torch.ones(4, 1, dtype=torch.int64), past_key_values=first.past_key_values, exit_depths=depths)
    assert counter.rows == 12


def test_masked_execution_computes_everything():
    model = small_model(max_depth=6)
    counter = RowCounter(model.model.core[0].mlp)
    run(model, make_batch(0, [(0, 0), (3, 0)], 7, 6), "masked")
    assert counter.rows == 2 * 7 * 6


@pytest.mark.parametrize("decider", DECIDERS)
@pytest.mark.parametrize("injection", ["none", "concat"])
@pytest.mark.parametrize("execution", ["packed", "masked"])
def test_flops_agree_with_the_flop_counter(decider, injection, execution):
    model = small_model(
        decider=decider,
        input_injection=injection,
        max_depth=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_core_layers=2,
        stability_criterion="distribution",
        stability_threshold=0.1,
        decider_hidden_size=12,
        fixed_depth=4,
    )
    model.set_attn_implementation("eager")
    batch = make_batch(1, [(0, 0), (6, 0), (0, 10)], 32, 5)
    with FlopCounterMode(display=False) as counter:
        output = run(model, batch, execution)
    if execution == "masked":  # as much as a packed run of all tokens, padding too, at D
        deepest = 5 if decider != "fixed" else model.config.fixed_depth
        cost = model.flops(torch.full_like(output.exit_depths, deepest))
    else:
        cost = model.flops(output.exit_depths, batch.attention_mask)
    assert cost.total == counter.get_total_flops()


def test_flops_of_decoding_agree_with_the_flop_counter():
    model = small_model(max_depth=5)
    model.set_attn_implementation("eager")
    batch = make_batch(1, [(0, 0)] * 3, 20, 5)
    cache = run(model, batch, use_cache=True).past_key_values
    with FlopCounterMode(display=False) as counter:
        output = model(torch.ones(3, 1, dtype=torch.int64), past_key_values=cache)
    cost = model.flops(output.exit_depths, past_length=20)
    assert cost.total == counter.get_total_flops()


def test_flops_grow_with_depth_and_leave_waste_apart():
    model = small_model(max_depth=4)
    even, uneven = torch.full((2, 8), 2), torch.tensor([[1] * 8, [3] * 8])
    assert model.flops(even).waste == model.flops(uneven).waste == 0
    assert model.flops(even).needed == model.flops(uneven).needed < model.flops(even + 1).needed
    ragged = even.clone()
    ragged[0, 0] = 4
    assert model.flops(ragged).waste == 0, "one row alone has no rectangle to fill"
    ragged[1, :2] = 4
    assert model.flops(ragged).waste > 0
    assert model.model.flops(even).head == 0
    with pytest.raises(ValueError, match=r"exit_depths.*0 at padding"):
        model.flops(even, torch.tensor([[1] * 8, [0] * 8]))
    with pytest.raises(ValueError, match=r"attention_mask.*\(2, 8\).*\(2, 11\)"):
        model.flops(even, torch.ones(2, 8), past_length=3)
    with pytest.raises(ValueError, match="exit_depths"):
        model.flops(even[0])

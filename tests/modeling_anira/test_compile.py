"""Masked execution as a graph: `torch.compile` without a break, and `torch.jit.trace`."""

import pytest
import torch
from cases import make_batch, small_model
from versions import needs_transformers

from modeling_anira.deciders import DECIDERS

LEARNED = [name for name, kind in DECIDERS.items() if kind.learned]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def compiled(model, backend):
    """`fullgraph=True` raises on a graph break."""
    return torch.compile(model, backend=backend, fullgraph=True, dynamic=False)


@pytest.mark.parametrize("decider", DECIDERS)
@pytest.mark.parametrize("padding", [[(0, 0), (0, 0)], [(2, 0), (0, 1)]])
def test_inference_compiles_whole_and_agrees(decider, padding):
    model = small_model(decider=decider, max_depth=3)
    batch = make_batch(0, padding, 6, 3)
    arguments = {"attention_mask": batch.attention_mask, "use_cache": False}
    with torch.no_grad():
        plain = model(batch.input_ids, **arguments)
        fast = compiled(model, "aot_eager")(batch.input_ids, **arguments)
    assert torch.equal(plain.exit_depths[batch.real], fast.exit_depths[batch.real])
    assert torch.allclose(plain.logits[batch.real], fast.logits[batch.real], atol=1e-4)


@pytest.mark.parametrize("decider", [*LEARNED, "fixed"])
def test_training_compiles_whole_and_agrees(decider):
    model = small_model(decider=decider, max_depth=3).train()
    batch = make_batch(
        0, [(2, 0), (0, 1)], 6, 3, noise_depth=3 if decider in LEARNED and DECIDERS[decider].plans_ahead else 0
    )
    labels = batch.input_ids.masked_fill(~batch.real, -100)
    arguments = {"attention_mask": batch.attention_mask, "labels": labels, "exit_noise": batch.noise}
    results = []
    for step in (model, compiled(model, "aot_eager")):
        model.zero_grad()
        loss = step(batch.input_ids, **arguments).loss
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("decider", LEARNED)
def test_noise_is_drawn_inside_a_compiled_step(decider):
    model = small_model(decider=decider, max_depth=3).train()
    step = compiled(model, "aot_eager")
    ids = torch.ones(8, 8, dtype=torch.int64)
    depths = [step(ids).exit_depths for _ in range(2)]
    assert not torch.equal(*depths)


def test_compiled_noise_moves_the_global_state_alike():
    """Isolation holds in compiled training too: `early` once drew D numbers a token, `online` one."""
    states = []
    for decider in ("early", "online"):
        model = small_model(decider=decider, max_depth=3).train()
        torch.manual_seed(4)
        compiled(model, "eager")(torch.ones(2, 4, dtype=torch.int64))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_generator_under_compile_is_refused():
    model = small_model(decider="online", max_depth=3).train()
    with pytest.raises(Exception, match="exit_noise"):
        compiled(model, "eager")(torch.ones(2, 4, dtype=torch.int64), generator=torch.Generator())


def test_inductor_agrees():
    model = small_model(decider="online", max_depth=2, num_core_layers=1, num_prelude_layers=0)
    batch = make_batch(0, [(0, 0), (1, 0)], 6, 2)
    arguments = {"attention_mask": batch.attention_mask, "use_cache": False}
    with torch.no_grad():
        plain = model(batch.input_ids, **arguments)
        fast = compiled(model, "inductor")(batch.input_ids, **arguments)
    assert torch.equal(plain.exit_depths[batch.real], fast.exit_depths[batch.real])
    assert torch.allclose(plain.logits[batch.real], fast.logits[batch.real], atol=1e-4)


@needs_transformers("5.9", "`torch.jit.trace` fails on transformers' masks, of any model")
@pytest.mark.parametrize("decider", DECIDERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_model_exits_by_what_it_is_given_later(decider):
    """`auto` ran packed under `torch.jit.trace`, which kept the example's depths or ended in an assert of torch."""
    model = small_model(decider=decider, max_depth=3)

    class Inference(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            output = self.model(input_ids, attention_mask=attention_mask, use_cache=False)
            return output.logits, output.exit_depths

    example, batch = (make_batch(seed, [(padding, 0), (0, 0)], 6, 3) for seed, padding in ((0, 0), (1, 2)))
    with torch.no_grad():
        traced = torch.jit.trace(Inference(), (example.input_ids, example.attention_mask), check_trace=False)
        logits, depths = traced(batch.input_ids, batch.attention_mask)
        plain = model(batch.input_ids, attention_mask=batch.attention_mask)
    assert torch.equal(depths, plain.exit_depths)
    assert torch.allclose(logits[batch.real], plain.logits[batch.real], atol=1e-5)
    model.config.execution = "packed"
    with pytest.raises(ValueError, match=r"execution.*'packed' under torch\.jit\.trace"):
        torch.jit.trace(Inference(), (example.input_ids, example.attention_mask), check_trace=False)

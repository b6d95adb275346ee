"""Gradients and training: straight-through exits, checkpointing, mixed precision, isolation, and that it learns."""

import copy

import pytest
import torch
from cases import make_batch, run, seeded, small_config, small_model
from torch import nn

from modeling_anira import AniraForCausalLM, exits
from modeling_anira.deciders import DECIDERS
from modeling_anira.objective import compute_loss

LEARNED = [name for name, kind in DECIDERS.items() if kind.learned]


def training_batch(decider, rows=3, length=6, max_depth=4, seed=1, padding=None):
    return make_batch(seed, padding or [(0, 0)] * rows, length, max_depth, max_depth if decider == "early" else 0)


def gradients(model, batch, **kwargs):
    """Loss and gradients by name of a training forward with the batch's noise."""
    model.zero_grad()
    labels = batch.input_ids.masked_fill(~batch.real, -100)
    loss = model(batch.input_ids, attention_mask=batch.attention_mask, labels=labels, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], atol=tolerance), name


@pytest.mark.parametrize("decider", [*LEARNED, "fixed"])
@pytest.mark.parametrize("injection", ["none", "concat"])
def test_every_parameter_gets_a_gradient(decider, injection):
    model = small_model(decider=decider, input_injection=injection).train()
    batch = training_batch(decider)
    _, grads = gradients(model, batch, exit_noise=batch.noise)
    for name, _ in model.named_parameters():
        assert name in grads, name
        assert grads[name].abs().sum() > 0, name


@pytest.mark.parametrize("decider", LEARNED)
def test_cross_entropy_alone_reaches_the_decider(decider):
    """Straight-through: without the KL term the decider still learns from the loss of the exit that was drawn."""
    model = small_model(decider=decider, compute_weight=0.0).train()
    batch = training_batch(decider)
    _, grads = gradients(model, batch, exit_noise=batch.noise)
    assert all(grad.abs().sum() > 0 for name, grad in grads.items() if "decider" in name)


@pytest.mark.parametrize("decider", LEARNED)
def test_straight_through_gradient_is_that_of_the_surrogate(decider, monkeypatch):
    """
    Finite differences in fp64. The surrogate replaces a = hard by soft + (hard - soft) with the bracket held constant:
    a differentiable function whose gradient the straight-through estimator claims to be.
    """
    model = small_model(decider=decider, max_depth=4, compute_weight=0.1, hidden_size=8).double().train()
    batch = training_batch(decider, rows=2, length=4)
    brackets, replay = [], []
    original = exits.straight_through

    def recording(hard, soft):
        brackets.append(hard.to(soft.dtype) - soft.detach())
        return original(hard, soft)

    def replaying(hard, soft):
        return soft + replay.pop(0)

    monkeypatch.setattr(exits, "straight_through", recording)

    def fp64_loss():
        # transformers' own loss rounds to fp32, which differences would show.
        output = model(batch.input_ids, exit_noise=batch.noise, output_exit_log_probs=True)
        cross_entropy = nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), batch.input_ids[:, 1:].flatten()
        )
        kl = compute_loss(output.exit_log_probs, batch.real, model.config.prior_base)
        return cross_entropy + model.config.compute_weight * kl

    fp64_loss().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert torch.cat(brackets).abs().max() > 0.1, "some exits were drawn"

    monkeypatch.setattr(exits, "straight_through", replaying)

    def surrogate():
        replay[:] = list(brackets)
        return fp64_loss().item()

    step, generator = 1e-6, seeded(0)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            parameter += step * direction
            above = surrogate()
            parameter -= 2 * step * direction
            below = surrogate()
            parameter += step * direction
        measured, claimed = (above - below) / (2 * step), (grads[name] * direction).sum().item()
        assert measured == pytest.approx(claimed, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("decider", [*LEARNED, "fixed"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_and_without_checkpointing_agree(decider, reentrant):
    model = small_model(decider=decider, attention_dropout=0.2).train()
    batch = training_batch(decider, padding=[(0, 0), (2, 0), (0, 0)])
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        results.append(gradients(model, batch, exit_noise=batch.noise))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_gradients(results[0][1], results[1][1])


@pytest.mark.parametrize("execution", ["masked", "packed"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_of_given_depths_with_and_without_checkpointing_agree(execution, reentrant):
    """Reentrant checkpointing runs under no_grad, where packed execution once overwrote the checkpoint's own inputs."""
    model = small_model(decider="online", num_core_layers=2).train()
    model.config.execution = execution
    batch = make_batch(1, [(0, 0), (2, 0), (0, 3)], 7, 4)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        results.append(gradients(model, batch, exit_depths=batch.depths))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_gradients(results[0][1], results[1][1])


@pytest.mark.parametrize("decider", LEARNED)
def test_the_decider_learns_nothing_from_padding(decider):
    """The first word of a left-padded row is predicted at the last padding. Its cross-entropy once reached the decider
    through the soft half of an a that is 0 for good."""
    model = small_model(decider=decider, compute_weight=0.0).train()
    batch = training_batch(decider, padding=[(3, 0), (3, 0)])
    labels = torch.full_like(batch.input_ids, -100)
    first = (~batch.real).sum(1, keepdim=True)
    labels.scatter_(1, first, batch.input_ids.gather(1, first))
    model(batch.input_ids, attention_mask=batch.attention_mask, labels=labels, exit_noise=batch.noise).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads["model.prelude.0.mlp.down_proj.weight"].abs().sum() > 0
    assert all(grad.abs().sum() == 0 for name, grad in grads.items() if "decider" in name)


@pytest.mark.parametrize("decider", LEARNED)
def test_no_nan_arises_on_the_way_back_from_padding(decider):
    """Anomaly mode once stopped at 0 * inf, which came from padding's log q and was masked afterwards."""
    model = small_model(decider=decider).train()
    batch = training_batch(decider, padding=[(0, 0), (2, 0)])
    with torch.autograd.detect_anomaly(check_nan=True):
        gradients(model, batch, exit_noise=batch.noise)


@pytest.mark.parametrize("decider", LEARNED)
def test_drawn_noise_is_the_same_in_the_recomputed_forward(decider):
    """Noise drawn inside a checkpointed region would be drawn again in the backward pass."""
    model = small_model(decider=decider).train()
    batch = training_batch(decider)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        results.append(gradients(model, batch))
    assert_same_gradients(results[0][1], results[1][1])


@pytest.mark.parametrize("injection", ["none", "add", "concat"])
def test_packed_equals_masked_in_gradients_with_given_depths(injection):
    for decider in ("online", "early", "fixed"):
        model = small_model(decider=decider, input_injection=injection, num_core_layers=2).train()
        batch = make_batch(1, [(0, 0), (2, 0), (0, 3)], 7, 4)
        results = []
        for execution in ("masked", "packed"):
            model.config.execution = execution
            results.append(gradients(model, batch, exit_depths=batch.depths))
        assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
        assert_same_gradients(results[0][1], results[1][1])


def test_packed_equals_masked_in_gradients_in_eval_mode():
    """`auto` is packed in eval mode, and differentiable there too."""
    model = small_model()
    batch = make_batch(1, [(0, 0), (2, 0)], 7, 4)
    results = []
    for execution in ("masked", "auto"):
        model.config.execution = execution
        results.append(gradients(model, batch))
    assert_same_gradients(results[0][1], results[1][1])


@pytest.mark.parametrize("decider", LEARNED)
def test_training_ignores_the_exit_rule_of_the_config(decider):
    model = small_model(decider=decider).train()
    batch = training_batch(decider)
    depths = []
    for model.config.exit_rule, model.config.exit_quantile in [("quantile", 0.5), ("quantile", 0.99), ("sample", 0.5)]:
        depths.append(model(batch.input_ids, exit_noise=batch.noise).exit_depths)
    assert torch.equal(depths[0], depths[1])
    assert torch.equal(depths[0], depths[2])


def test_two_runs_that_differ_in_the_decider_see_the_same_dropout_and_rows():
    """20 steps: the global random state after each is the same, so dropout masks and whatever rows are drawn are."""
    traces = {}
    for decider in DECIDERS:
        torch.manual_seed(5)
        model = AniraForCausalLM(small_config(decider=decider, attention_dropout=0.3)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        traces[decider] = []
        for _ in range(20):
            ids = torch.randint(1, 23, (2, 5))
            loss = model(ids, labels=ids).loss
            traces[decider].append((ids, torch.get_rng_state()))
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for decider, trace in traces.items():
        for step, ((ids, state), (ids_fixed, state_fixed)) in enumerate(zip(trace, traces["fixed"], strict=True)):
            assert torch.equal(ids, ids_fixed), f"{decider}, step {step}: rows"
            assert torch.equal(state, state_fixed), f"{decider}, step {step}: random state"


def test_dropout_masks_do_not_depend_on_the_decider():
    """With all depths given, models of different deciders give the same logits under dropout."""
    logits = []
    for decider in ("early", "online", "fixed"):
        model = small_model(decider=decider, attention_dropout=0.3).train()
        torch.manual_seed(9)
        depths = torch.full((2, 5), 4)
        logits.append(model(torch.ones(2, 5, dtype=torch.int64), exit_depths=depths).logits)
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], logits[2])


def test_exit_noise_differs_from_step_to_step():
    """A fork of a state that nothing else moves once gave every step the same noise."""
    model = small_model(decider="online").train()
    ids = torch.ones(4, 8, dtype=torch.int64)
    assert not torch.equal(model(ids).exit_depths, model(ids).exit_depths)


@pytest.mark.parametrize("decider", LEARNED)
def test_bf16_autocast(decider):
    model = small_model(decider=decider).train()
    batch = training_batch(decider)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        loss, grads = gradients(model, batch, exit_noise=batch.noise)
    exact, _ = gradients(model, batch, exit_noise=batch.noise)
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert len(grads) == len(list(model.parameters()))


@pytest.mark.parametrize("injection", ["none", "add", "concat"])
def test_the_residual_stream_keeps_its_precision_under_autocast(injection):
    """The adapter of `concat` answers in bf16, and once turned the core's states into bf16."""
    model = small_model(input_injection=injection)
    batch = make_batch(0, [(0, 0)], 6, 4)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        for execution in ("masked", "packed"):
            states = run(model, batch, execution, output_hidden_states=True).hidden_states
            assert {state.dtype for state in states} == {torch.float32}


def test_fp64_stays_fp64():
    model = small_model(decider="online").double()
    batch = make_batch(0, [(0, 0), (2, 0)], 6, 4)
    masked, packed = run(model, batch, "masked"), run(model, batch, "packed")
    assert masked.logits.dtype == packed.exit_log_probs.dtype == torch.float64
    assert (masked.exit_log_probs - packed.exit_log_probs)[batch.real].abs().max() < 1e-12
    assert (masked.logits - packed.logits)[batch.real].abs().max() < 1e-12


@pytest.mark.parametrize("decider", [*LEARNED, "stability"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_off_by_its_rounding(decider, attention, dtype):
    """Depths are given: a decider's own may flip where a CDF lies within the rounding of the threshold."""
    model = small_model(decider=decider).to(dtype)
    model.set_attn_implementation(attention)
    exact = copy.deepcopy(model).float()
    for seed in range(8):
        batch = make_batch(seed, [(0, 0), (2, 0), (0, 3)], 7, 4)
        expected = run(exact, batch, "masked", exit_depths=batch.depths).logits[batch.real]
        for execution in ("masked", "packed"):
            for use_cache in (False, True):
                output = run(model, batch, execution, exit_depths=batch.depths, use_cache=use_cache)
                assert output.logits.dtype == dtype
                gap = output.logits[batch.real].float() - expected
                assert gap.norm() / expected.norm() < 8 * torch.finfo(dtype).eps, (execution, use_cache)


@pytest.mark.parametrize("decider", LEARNED)
def test_overfits_one_batch(decider):
    torch.manual_seed(0)
    model = AniraForCausalLM(small_config(decider=decider, hidden_size=32, intermediate_size=64)).train()
    ids = torch.randint(1, 23, (4, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model(ids, labels=ids).ce_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # What a causal model cannot know stays: the first tokens of the rows differ, and nothing before them says how.
    assert model.eval()(ids, labels=ids).ce_loss < 0.1


def ring_model(decider: str) -> AniraForCausalLM:
    """
    A backbone whose iterations do one known thing: each turns a ring of eight features by one step.

    Attention is switched off, the MLP moves mass from a feature to the next, and the head reads the ring: a token that
    must say "1" needs 1 iteration and one that must say "4" needs 4, no more and no less. Only the decider can learn.
    Features 0-7 are the ring, 8-9 tell the two classes apart, 10 is a constant that opens the MLP's gates.
    """
    torch.manual_seed(0)
    model = AniraForCausalLM(
        small_config(
            decider=decider,
            vocab_size=8,
            hidden_size=12,
            intermediate_size=8,
            num_attention_heads=2,
            num_prelude_layers=0,
            num_core_layers=1,
            num_coda_layers=0,
            max_depth=6,
            pad_token_id=None,
            compute_weight=0.02,
            decider_bias=-1.0,
            decider_hidden_size=16,
        )
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("decider" in name)
    core, size = model.model.core[0], model.config.hidden_size
    with torch.no_grad():
        embedding = torch.zeros(8, size)
        embedding[:, 0], embedding[:, 10] = 1.0, 2.0
        embedding[0::2, 8], embedding[1::2, 9] = 1.0, 1.0  # even ids: shallow class, odd ids: deep class
        model.model.embed_tokens.weight.copy_(embedding)
        core.self_attn.o_proj.weight.zero_()
        scale = (size / embedding[0].pow(2).sum()).sqrt()  # what the norm multiplies a state by
        gates, ups, downs = torch.zeros(8, size), torch.zeros(8, size), torch.zeros(size, 8)
        gates[:, 10] = 10.0
        ups[:, :8] = torch.eye(8)
        gain = nn.functional.silu(10.0 * 2.0 * scale) * scale
        downs[:8] = (torch.roll(torch.eye(8), 1, 0) - torch.eye(8)) / gain
        core.mlp.gate_proj.weight.copy_(gates)
        core.mlp.up_proj.weight.copy_(ups)
        core.mlp.down_proj.weight.copy_(downs)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :8] = 4 * torch.eye(8)
    return model


def test_ring_model_turns_one_step_an_iteration():
    model = ring_model("fixed").eval()
    ids = torch.arange(8)[None]
    for depth in range(1, 7):
        predicted = model(ids, exit_depths=torch.full((1, 8), depth)).logits.argmax(-1)
        assert (predicted == depth).all()


@pytest.mark.parametrize("decider", LEARNED)
def test_deciders_learn_which_tokens_need_more(decider):
    """Even ids need 1 iteration, odd ids need 4: the only way to say 1 and 4 (see `ring_model`)."""
    model = ring_model(decider).train()
    frozen = copy.deepcopy({n: p for n, p in model.named_parameters() if not p.requires_grad})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = seeded(0)
    for _ in range(400):
        ids = torch.randint(8, (16, 8), generator=generator)
        targets = torch.where(ids % 2 == 0, 1, 4)
        loss = model(ids, labels=ids, shift_labels=targets, generator=generator).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    depths = model.eval()(torch.arange(8)[None]).exit_depths[0]
    assert (depths[0::2] == 1).all(), depths
    assert (depths[1::2] == 4).all(), depths
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)

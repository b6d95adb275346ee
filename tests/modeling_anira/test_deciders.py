"""Deciders, the exit rule, and that models differ in nothing but the decider."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from cases import make_batch, run, seeded, small_config, small_model
from torch import nn
from transformers import DynamicCache

from modeling_anira import AniraForCausalLM
from modeling_anira.deciders import DECIDERS, Decider
from modeling_anira.exits import ExitRule

LEARNED = [name for name, kind in DECIDERS.items() if kind.learned]


def q_of(model, batch):
    return run(model, batch).exit_log_probs.exp()


@pytest.mark.parametrize("decider", list(DECIDERS))
def test_q_is_a_distribution_and_expected_depth_its_mean(decider):
    model = small_model(decider=decider, max_depth=5)
    output = run(model, make_batch(0, [(0, 0)] * 2, 6, 5))
    q = output.exit_log_probs.exp()
    assert torch.allclose(q.sum(-1), torch.ones(2, 6), atol=1e-5)
    assert torch.allclose(output.expected_depth, (q * torch.arange(1, 6)).sum(-1), atol=1e-5)


def test_online_q_is_that_of_its_alphas():
    """q(d) = alpha^(d) prod_{j<d} (1 - alpha^(j)), what is left to D; alphas read from the states as they are."""
    model = small_model(decider="online", max_depth=4)
    batch = make_batch(0, [(0, 0)], 6, 4)
    full = torch.full((1, 6), 4)
    states = run(model, batch, exit_depths=full, output_hidden_states=True).hidden_states[2:6]
    alphas = [torch.sigmoid(model.model.decider.exit_logit(state, state, None)) for state in states[:3]]
    left, q = torch.ones(1, 6), []
    for alpha in alphas:
        q.append(left * alpha)
        left = left * (1 - alpha)
    expected = torch.stack([*q, left], -1)
    assert torch.allclose(run(model, batch, exit_depths=full).exit_log_probs.exp(), expected, atol=1e-5)


@pytest.mark.parametrize("max_depth", [1, 2, 8])
def test_both_learned_deciders_start_from_the_same_q(max_depth):
    batch = make_batch(0, [(0, 0)] * 2, 6, max_depth)
    early, online = (
        q_of(small_model(decisive=False, decider=decider, max_depth=max_depth), batch)
        for decider in ("early", "online")
    )
    alpha = 1 / (1 + math.exp(3))
    wanted = torch.tensor([alpha * (1 - alpha) ** d for d in range(max_depth - 1)] + [(1 - alpha) ** (max_depth - 1)])
    assert torch.allclose(early, wanted.expand_as(early), atol=0.01)
    assert torch.allclose(online, wanted.expand_as(online), atol=0.01)


@pytest.mark.parametrize("build", ["constructor", "from_config"])
def test_shared_weights_are_bit_equal_over_all_deciders(build):
    models = {}
    for decider in DECIDERS:
        torch.manual_seed(7)
        config = small_config(decider=decider)
        if build == "constructor":
            models[decider] = AniraForCausalLM(config)
        else:
            models[decider] = AniraForCausalLM._from_config(config)
        models[decider].state_after = torch.get_rng_state()
    shared = {name: value for name, value in models["fixed"].state_dict().items() if "decider" not in name}
    for decider, model in models.items():
        for name, value in shared.items():
            assert torch.equal(model.state_dict()[name], value), f"{decider}: {name}"
        assert torch.equal(model.state_after, models["fixed"].state_after), decider


def test_decider_weights_follow_the_global_seed():
    def weights(seed):
        return small_model(seed=seed, decisive=False).model.decider.mlp.hidden.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_decider_of_contributing_goes_through_what_tests_of_deciders_do(monkeypatch):
    """It was promised that they run over DECIDERS, and they ended in an AttributeError under any other learned one."""
    text = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
    code = text[text.index("## A new decider") :].split("```python\n")[1].split("```")[0]
    monkeypatch.setitem(DECIDERS, "geometric", None)  # taken out again afterwards
    exec(code, {})
    batch = make_batch(0, [(2, 0), (0, 0)], 8, 5)
    model = small_model(decider="geometric", max_depth=5)
    masked, packed = (run(model, batch, execution) for execution in ("masked", "packed"))
    assert masked.exit_depths[batch.real].unique().numel() > 1
    assert torch.equal(masked.exit_depths, packed.exit_depths)


def test_a_new_decider_is_one_class_and_one_line(monkeypatch):
    """Exits after iteration 2 where the first feature is positive, else never; with weights of its own, and trained."""

    class SignDecider(Decider):
        learned = True

        def __init__(self, config):
            super().__init__(config)
            self.scale = nn.Linear(1, 1)

        def exit_logit(self, state, previous, readout):
            return self.scale(state[..., :1]).squeeze(-1).float()

    monkeypatch.setitem(DECIDERS, "sign", SignDecider)
    torch.manual_seed(0)
    model = AniraForCausalLM(small_config(decider="sign", max_depth=5)).eval()
    torch.manual_seed(0)
    fixed = AniraForCausalLM(small_config(decider="fixed", max_depth=5)).eval()
    assert torch.equal(model.lm_head.weight, fixed.lm_head.weight), "a custom decider keeps isolation"
    nn.init.constant_(model.model.decider.scale.weight, 50.0)
    batch = make_batch(0, [(0, 0), (2, 0)], 6, 5)
    masked, packed = run(model, batch, "masked"), run(model, batch, "packed")
    assert torch.equal(masked.exit_depths, packed.exit_depths)
    assert masked.exit_depths[batch.real].unique().numel() > 1
    assert (masked.logits - packed.logits)[batch.real].abs().max() < 1e-4
    run(model.train(), batch, labels=batch.input_ids).loss.backward()
    assert model.model.decider.scale.weight.grad.abs() > 0


def test_a_decider_without_its_method_says_so(monkeypatch):
    monkeypatch.setitem(DECIDERS, "empty", type("EmptyDecider", (Decider,), {}))
    model = AniraForCausalLM(small_config(decider="empty"))
    with pytest.raises(TypeError, match=r"EmptyDecider.*exit_logit"):
        model(torch.ones(1, 3, dtype=torch.int64))


def test_rule_exits_at_the_first_depth_whose_cdf_reaches_u():
    log_q = torch.tensor([[[0.2, 0.3, 0.4, 0.1]]]).log()
    for quantile, depth in [(0.1, 1), (0.19, 1), (0.21, 2), (0.49, 2), (0.51, 3), (0.95, 4), (1.0, 4)]:
        assert ExitRule("quantile", quantile, 1, 4).depths(log_q, None).item() == depth, quantile
    for noise, depth in [(0.0, 1), (0.19, 1), (0.3, 2), (0.6, 3), (0.99, 4)]:
        assert ExitRule("sample", 0.5, 1, 4).depths(log_q, torch.tensor([[noise]])).item() == depth, noise
    assert ExitRule("mode", 0.5, 1, 4).depths(log_q, None).item() == 3
    assert ExitRule("quantile", 0.1, 3, 4).depths(log_q, None).item() == 3
    assert ExitRule("quantile", 1.0, 1, 2).depths(log_q, None).item() == 2


def test_noise_of_zero_does_not_exit_where_q_has_no_mass():
    model = small_model(decider="fixed", fixed_depth=3)
    batch = make_batch(0, [(0, 0)], 5, 4)
    depths = run(model, batch, exit_rule="sample", exit_noise=torch.zeros(1, 5)).exit_depths
    assert (depths == 3).all()


@pytest.mark.parametrize("decider", LEARNED)
def test_sampled_depths_follow_q(decider):
    """10,000 draws a depth: a frequency differs from q by more than 0.03 once in 10^9 runs."""
    model = small_model(decider=decider, max_depth=4)
    row = make_batch(0, [(0, 0)], 1, 4)
    # A token that exits freezes, and with it alpha: only a run to D shows the alphas that sampling meets.
    q = run(model, row, exit_depths=torch.full((1, 1), 4)).exit_log_probs.exp()[0, 0]
    ids = row.input_ids.expand(10_000, 1)
    generator = seeded(0)
    depths = model(ids, exit_rule="sample", generator=generator).exit_depths
    trained = model.train()(ids, generator=generator).exit_depths
    for name, drawn in (("inference", depths), ("training", trained)):
        frequency = torch.bincount(drawn.flatten() - 1, minlength=4) / 10_000
        assert torch.allclose(frequency, q.detach(), atol=0.03), name


def test_clamp_leaves_q_alone():
    for decider in LEARNED:
        model = small_model(decider=decider, max_depth=5)
        batch = make_batch(0, [(0, 0)], 6, 5)
        early = run(model, batch, min_depth=2, max_depth=3)
        assert early.exit_depths.min() >= 2
        assert early.exit_depths.max() <= 3
        if decider == "early":  # q does not depend on the run
            assert torch.equal(early.exit_log_probs, run(model, batch).exit_log_probs)
        assert torch.allclose(early.exit_log_probs.exp().sum(-1), torch.ones(1, 6), atol=1e-5)


def test_call_and_config_say_the_same():
    model = small_model(max_depth=5)
    batch = make_batch(0, [(0, 0)] * 2, 6, 5)
    called = run(model, batch, exit_quantile=0.9, min_depth=2, max_depth=4)
    model.config.exit_quantile, model.config.min_depth = 0.9, 2
    configured = run(model, batch, max_depth=4)
    assert torch.equal(called.exit_depths, configured.exit_depths)
    assert torch.equal(called.logits, configured.logits)


def test_stability_exits_when_the_token_stops_moving():
    """The definition, from recorded states: first d with |h^(d) - h^(d-1)| / |h^(d-1)| below the threshold."""
    model = small_model(decider="stability", max_depth=6, stability_threshold=0.25)
    batch = make_batch(0, [(0, 0)] * 4, 8, 6)
    output = run(model, batch, output_hidden_states=True)
    states = torch.stack(output.hidden_states[1:8])  # h^(0)..h^(6)
    change = (states[1:] - states[:-1]).norm(dim=-1) / states[:-1].norm(dim=-1)
    stable = torch.cat((change[:-1] < 0.25, torch.ones(1, 4, 8, dtype=torch.bool)))
    assert torch.equal(output.exit_depths, stable.int().argmax(0) + 1)
    assert output.exit_depths.unique().numel() > 1


def test_stability_by_distribution_reads_the_head():
    model = small_model(decider="stability", stability_criterion="distribution", stability_threshold=0.05, max_depth=6)
    batch = make_batch(0, [(0, 0)] * 4, 8, 6)
    output = run(model, batch, output_hidden_states=True)
    readouts = [model.lm_head(model.model.norm(state)).log_softmax(-1) for state in output.hidden_states[1:8]]
    change = torch.stack([(p.exp() * (p - r)).sum(-1) for r, p in itertools.pairwise(readouts)])
    stable = torch.cat((change[:-1] < 0.05, torch.ones(1, 4, 8, dtype=torch.bool)))
    assert torch.equal(output.exit_depths, stable.int().argmax(0) + 1)
    assert output.exit_depths.unique().numel() > 1
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="AniraForCausalLM"):
        model.model(batch.input_ids, past_key_values=cache)
    assert cache.get_seq_length() == 0, "refused before anything was written"


def test_building_a_model_touches_no_other_device(monkeypatch):
    """Forking the random state of every GPU once started CUDA on all of them, in every process of a training run."""

    def refuse(*args, **kwargs):
        raise AssertionError("CUDA was touched")

    monkeypatch.setattr(torch.cuda, "get_rng_state", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with torch.device("cpu"):
        AniraForCausalLM(small_config(decider="online"))


def test_expected_depth_is_fp32_under_autocast():
    """As a matrix product it once came out in bf16, off by 0.02 at D = 8."""
    model = small_model(max_depth=8)
    batch = make_batch(0, [(0, 0)], 6, 8)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        output = run(model, batch)
    mean = (output.exit_log_probs.exp() * torch.arange(1, 9)).sum(-1)
    assert output.expected_depth.dtype == torch.float32
    assert torch.allclose(output.expected_depth, mean)

"""The objective: cross-entropy on shifted labels, and the KL to the prior."""

import math

import pytest
import torch
from cases import VOCAB, make_batch, run, small_model
from torch.nn import functional as F

from modeling_anira.objective import compute_loss, expected_depth, kl_to_prior, log_prior


def test_prior_is_geometric():
    p = log_prior(5, 1.5).exp()
    assert torch.allclose(p.sum(), torch.tensor(1.0))
    assert torch.allclose(p[:-1] / p[1:], torch.full((4,), 1.5))


def test_kl_is_that_of_torch_distributions():
    torch.manual_seed(0)
    log_q = torch.randn(2, 3, 5).log_softmax(-1)
    q = torch.distributions.Categorical(logits=log_q)
    p = torch.distributions.Categorical(logits=log_prior(5, 2.0).expand_as(log_q))
    assert torch.allclose(kl_to_prior(log_q, 2.0), torch.distributions.kl_divergence(q, p), atol=1e-6)
    assert torch.allclose(expected_depth(log_q), (q.probs * torch.arange(1, 6)).sum(-1), atol=1e-6)


def test_kl_of_all_mass_on_one_depth_is_finite():
    log_q = torch.tensor([-torch.inf, 0.0, -torch.inf])
    assert torch.allclose(kl_to_prior(log_q, 2.0), -log_prior(3, 2.0)[1])


def test_kl_is_the_mean_over_real_tokens():
    torch.manual_seed(0)
    log_q = torch.randn(2, 3, 4).log_softmax(-1)
    real = torch.tensor([[False, True, True], [True, True, False]])
    assert torch.allclose(compute_loss(log_q, real, 1.5), kl_to_prior(log_q, 1.5)[real].mean())
    assert compute_loss(log_q, torch.zeros_like(real), 1.5) == 0


def test_loss_is_its_parts_and_labels_are_shifted():
    model = small_model(compute_weight=0.3)
    batch = make_batch(0, [(0, 0), (2, 0)], 7, 4)
    labels = batch.input_ids.masked_fill(~batch.real, -100)
    output = run(model, batch, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(output.ce_loss, expected, atol=1e-6)
    assert torch.allclose(output.compute_loss, kl_to_prior(output.exit_log_probs, 1.5)[batch.real].mean(), atol=1e-6)
    assert torch.allclose(output.loss, output.ce_loss + 0.3 * output.compute_loss)


@pytest.mark.parametrize("decider", ["early", "online"])
def test_accumulation_changes_nothing(decider):
    """One batch of 8 rows, and 4 micro-batches of 2, give the same loss and gradients."""
    batch = make_batch(1, [(0, 0)] * 8, 6, 4, noise_depth=4 if decider == "early" else 0)
    labels = batch.input_ids.clone()
    labels[:, :2] = -100
    items = (labels[:, 1:] != -100).sum()
    results = []
    for size in (8, 2):
        model = small_model(decider=decider, compute_weight=0.5).train()
        losses = []
        for start in range(0, 8, size):
            rows = slice(start, start + size)
            loss = model(
                batch.input_ids[rows], labels=labels[rows], exit_noise=batch.noise[rows], num_items_in_batch=items
            ).loss
            loss.backward()
            losses.append(loss.item())
        results.append((sum(losses), [p.grad for p in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    for one, many in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(one, many, atol=1e-5)


def test_loss_of_an_untrained_model_on_random_tokens_is_ln_v():
    """Also after some training on ever new random tokens: a model that saw its labels (no shift) would fall below."""
    torch.manual_seed(0)
    model = small_model(decisive=False, initializer_range=0.02, compute_weight=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        ids = torch.randint(VOCAB, (16, 12))
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.05)
    assert sum(losses[-10:]) / 10 == pytest.approx(math.log(VOCAB), abs=0.1)

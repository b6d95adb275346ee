"""The objective: cross-entropy + compute_weight * KL(q || p), p(d) ~ prior_base^(-d) (paper section 3.2).

Shapes: B batch, T tokens, D depths.
"""

import math

import torch
from torch.nn import functional as F


def log_prior(depth: int, base: float, device: torch.device | None = None) -> torch.Tensor:
    """log p (D,): the exponential prior over 1..D, p(d) proportional to base^(-d)."""
    return F.log_softmax(-math.log(base) * torch.arange(1, depth + 1, device=device, dtype=torch.float32), dim=0)


def kl_to_prior(log_q: torch.Tensor, base: float) -> torch.Tensor:
    """KL(q || p) in nats of each token: (B, T, D) -> (B, T). Depths without mass (log q = -inf) add nothing."""
    finite = log_q.masked_fill(log_q == -torch.inf, 0.0)  # before the product: 0 * inf would be NaN
    return (log_q.exp() * (finite - log_prior(log_q.shape[-1], base, log_q.device))).sum(-1)


def expected_depth(log_q: torch.Tensor) -> torch.Tensor:
    """sum_d d q(d) of each token: (B, T, D) -> (B, T)."""
    # Not a matrix product, which autocast would round to bf16.
    return (log_q.exp() * torch.arange(1, log_q.shape[-1] + 1, device=log_q.device)).sum(-1)


def compute_loss(
    log_q: torch.Tensor,
    real: torch.Tensor,
    base: float,
    num_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    The KL term: its mean over real tokens, times this micro-batch's share of the batch.

    The share, `num_labels / num_items_in_batch`, is that of the cross-entropy. Summed over micro-batches whose rows
    have the same proportion of labels, the term is then what one large batch gives.

    Args:
        log_q (B, T, D).
        real (B, T): False at padding.
        num_labels: Shifted labels of this micro-batch that count.
        num_items_in_batch: Those of all micro-batches of a step, as `Trainer` gives it; None for a mean.

    Returns:
        A scalar in nats.
    """
    kl = (kl_to_prior(log_q, base) * real).sum() / real.sum().clamp_min(1)
    if num_items_in_batch is None or num_labels is None:
        return kl
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(kl.device)
    return kl * num_labels.to(kl.device) / num_items_in_batch

"""The cost of a run in floating-point operations, by part.

Counted are matrix products, a multiply-add as 2, as `torch.utils.flop_counter` counts them; norms, activations, rotary
angles and softmaxes are not. Attention scores are dense: every query against every key that it is given.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .configuration_anira import AniraConfig
    from .deciders import Decider


@dataclass(frozen=True)
class Flops:
    """
    Floating-point operations of a forward, by part.

    Args:
        prelude, coda: Their layers; all tokens, padding too.
        core_linear: Projections and MLPs of the core; active tokens.
        core_attention: Scores and sums of the core; active queries against all keys.
        injection: The adapter of `input_injection="concat"`.
        decider: What it says of itself: its MLP, or LM-head readouts.
        head: The LM head; all tokens.
        waste: Queries that only fill up the rectangle which attention needs, in packed execution.
    """

    prelude: int
    core_linear: int
    core_attention: int
    injection: int
    decider: int
    coda: int
    head: int
    waste: int

    @property
    def total(self) -> int:
        """All parts."""
        return sum(asdict(self).values())

    @property
    def needed(self) -> int:
        """All but `waste`: what no way of running with these depths can do without."""
        return self.total - self.waste


def count_flops(decider: "Decider", exit_depths: torch.Tensor, past_length: int, head: bool) -> Flops:
    """
    The cost of one packed forward.

    Args:
        decider: That of the model, whose config it has.
        exit_depths (B, T): Iterations of each token, 0 at padding.
        past_length: Tokens in the cache.
        head: Whether the model has an LM head.
    """
    config = decider.config
    batch, length = exit_depths.shape
    tokens, keys = batch * length, length + past_length
    layer, attention = _layer_cost(config), _attention_cost(config, keys)
    # rows[d - 1, b]: queries of row b in iteration d
    depths = torch.arange(1, config.max_depth + 1, device=exit_depths.device)
    rows = (exit_depths[None] >= depths[:, None, None]).sum(-1)
    active = int(rows.sum())
    rectangles = int(((rows > 0).sum(1) * rows.max(1).values).sum())
    decisions = int(rows[:-1].sum())  # alpha^(D) is not used
    size = config.hidden_size
    return Flops(
        prelude=config.num_prelude_layers * tokens * (layer + attention),
        core_linear=config.num_core_layers * active * layer,
        core_attention=config.num_core_layers * active * attention,
        injection=active * 4 * size * size if config.input_injection == "concat" else 0,
        decider=decider.flops(tokens, decisions, head),
        coda=config.num_coda_layers * tokens * (layer + attention),
        head=2 * tokens * size * config.vocab_size if head else 0,
        waste=config.num_core_layers * (rectangles - active) * attention,
    )


def _layer_cost(config: "AniraConfig") -> int:
    """Projections and MLP of one layer, for one token."""
    heads, kv_heads, head_dim = config.head_sizes
    assert config.intermediate_size is not None  # the config fills it in
    return 2 * config.hidden_size * (2 * (heads + kv_heads) * head_dim + 3 * config.intermediate_size)


def _attention_cost(config: "AniraConfig", keys: int) -> int:
    """Scores and weighted sum of one layer, for one query against `keys` keys."""
    heads, _, head_dim = config.head_sizes
    return 4 * heads * head_dim * keys

"""The deciders: how likely a token is to exit at each depth. The only part in which ANIRA models differ.

A new decider is one subclass of `Decider` and one line in `DECIDERS`.

Shapes: `...` any leading dimensions of tokens, H hidden size, D `max_depth`.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN

from .checks import require

if TYPE_CHECKING:
    from .configuration_anira import AniraConfig


def at_least_fp32(values: torch.Tensor) -> torch.Tensor:
    """Half precision is raised to fp32 where sums and thresholds need it; fp32 and fp64 stay as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


Readout = Callable[[torch.Tensor], torch.Tensor]  # state (..., H) -> logits over the vocabulary (..., V)


class Decider(nn.Module):
    """
    Turns states into q, a distribution over exit depths 1..D for every token.

    A subclass says by `plans_ahead` when it decides, and implements the one method that goes with it.
    """

    learned: ClassVar[bool] = False
    """Whether it has weights that train. Then depths are sampled in training, straight-through."""

    plans_ahead: ClassVar[bool] = False
    """True: `plan`, once, from the state before the core. False: `exit_logit`, after each iteration."""

    def __init__(self, config: "AniraConfig") -> None:
        super().__init__()
        self.config = config

    def plan(self, shallow: torch.Tensor) -> torch.Tensor:
        """h^(0) (..., H) -> unnormalised log q (..., D), in fp32."""
        raise TypeError(f"{type(self).__name__} has `plans_ahead = True` but no method `plan`.")

    def exit_logit(self, state: torch.Tensor, previous: torch.Tensor, readout: Readout | None) -> torch.Tensor:
        """
        The logit of alpha^(d), the probability to exit after iteration d for a token that has not exited before.

        An exited token's state is frozen, so its alpha stays as it was. Hence a learned decider may look at `state`
        alone, which training reads again after the exit; `previous` is for rules without weights.

        Args:
            state (..., H): h^(d).
            previous (..., H): h^(d-1).
            readout: final norm and LM head; None in a model without head.

        Returns:
            (...), in fp32; plus and minus infinity are allowed.
        """
        raise TypeError(f"{type(self).__name__} has `plans_ahead = False` but no method `exit_logit`.")

    @property
    def needs_readout(self) -> bool:
        """Whether `exit_logit` reads the LM head."""
        return False

    def depth_span(self, max_depth: int) -> tuple[int, int]:
        """The least and the greatest depth that a token can get, as far as known without looking at states."""
        return 1, max_depth

    def flops(self, tokens: int, decisions: int, head: bool) -> int:
        """
        Floating-point operations of the decider in one packed forward, a multiply-add as 2. Here: those of one readout
        a decision, if it needs any.

        Args:
            tokens: All of the batch, for which `plan` is called.
            decisions: How often `exit_logit` is asked about a token, over all iterations.
            head: Whether the model has an LM head.
        """
        return 2 * decisions * self.config.hidden_size * self.config.vocab_size if head and self.needs_readout else 0


class ExitHead(nn.Linear):
    """Output layer of a decider: starts at given logits, nearly whatever the state."""

    def __init__(self, in_features: int, initial_logits: list[float]) -> None:
        super().__init__(in_features, len(initial_logits))
        self.initial_logits = initial_logits

    def start(self) -> None:
        init.normal_(self.weight, std=0.01 / math.sqrt(self.in_features))
        init.copy_(self.bias, torch.tensor(self.initial_logits, dtype=self.bias.dtype, device=self.bias.device))


class _DeciderMLP(nn.Module):
    """State (..., H) -> logits (..., outputs) in fp32. The norm makes it blind to the size of a state, which grows."""

    def __init__(self, config: "AniraConfig", initial_logits: list[float]) -> None:
        super().__init__()
        width = config.decider_hidden_size or config.hidden_size
        self.eps = config.rms_norm_eps
        self.hidden = nn.Linear(config.hidden_size, width)
        self.act_fn = ACT2FN[config.hidden_act]
        self.exit_head = ExitHead(width, initial_logits)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        state = F.rms_norm(state, state.shape[-1:], eps=self.eps)
        return at_least_fp32(self.exit_head(self.act_fn(self.hidden(state))))

    def flops(self, tokens: int) -> int:
        """Of so many states."""
        hidden, out = self.hidden, self.exit_head
        return 2 * tokens * (hidden.in_features * hidden.out_features + out.in_features * out.out_features)


def _log_sigmoid(logit: float) -> float:
    """log(1 / (1 + e^-logit)), of any finite logit."""
    return min(logit, 0.0) - math.log1p(math.exp(-abs(logit)))


class EarlyDecider(Decider):
    """ANIRA-E: one look at h^(0), then a softmax over depths (paper section 3.2)."""

    learned = True
    plans_ahead = True

    def __init__(self, config: "AniraConfig") -> None:
        super().__init__(config)
        # Starts from the q with which `online` starts: alpha the same at every depth, all that is left on D.
        bias, depth = float(config.decider_bias), config.max_depth
        exit_now, go_on = _log_sigmoid(bias), _log_sigmoid(-bias)
        self.mlp = _DeciderMLP(config, [exit_now + d * go_on for d in range(depth - 1)] + [(depth - 1) * go_on])

    def plan(self, shallow: torch.Tensor) -> torch.Tensor:
        return self.mlp(shallow)

    def flops(self, tokens: int, decisions: int, head: bool) -> int:
        return self.mlp.flops(tokens)


class OnlineDecider(Decider):
    """ANIRA-O: after each iteration, alpha^(d) = sigmoid(MLP(h^(d))) (paper section 3.2)."""

    learned = True

    def __init__(self, config: "AniraConfig") -> None:
        super().__init__(config)
        self.mlp = _DeciderMLP(config, [float(config.decider_bias)])

    def exit_logit(self, state: torch.Tensor, previous: torch.Tensor, readout: Readout | None) -> torch.Tensor:
        return self.mlp(state).squeeze(-1)

    def flops(self, tokens: int, decisions: int, head: bool) -> int:
        return self.mlp.flops(decisions)


class FixedDecider(Decider):
    """All mass on `fixed_depth` (default D): the plain recurrent Transformer."""

    plans_ahead = True

    def plan(self, shallow: torch.Tensor) -> torch.Tensor:
        log_q = torch.full((self.config.max_depth,), -torch.inf, device=shallow.device)
        log_q[self._depth - 1] = 0.0
        return log_q.expand(*shallow.shape[:-1], -1)

    def depth_span(self, max_depth: int) -> tuple[int, int]:
        return self._depth, self._depth

    @property
    def _depth(self) -> int:
        deepest = self.config.max_depth
        depth = deepest if self.config.fixed_depth is None else self.config.fixed_depth
        require(1 <= depth <= deepest, "fixed_depth", depth, f"from 1 to `max_depth` ({deepest})")
        return depth


class StabilityDecider(Decider):
    """Exits at the first depth at which the token has stopped moving. Needs no training."""

    @property
    def needs_readout(self) -> bool:
        return self.config.stability_criterion == "distribution"

    def exit_logit(self, state: torch.Tensor, previous: torch.Tensor, readout: Readout | None) -> torch.Tensor:
        stable = self.change(state, previous, readout) < self.config.stability_threshold
        return torch.where(stable, torch.inf, -torch.inf)

    def flops(self, tokens: int, decisions: int, head: bool) -> int:
        return 2 * super().flops(tokens, decisions, head)  # it reads out both states

    def change(self, state: torch.Tensor, previous: torch.Tensor, readout: Readout | None) -> torch.Tensor:
        """How far a token moved in an iteration, by `config.stability_criterion`: (..., H), (..., H) -> (...)."""
        if self.config.stability_criterion == "state":
            state, previous = at_least_fp32(state), at_least_fp32(previous)
            return (state - previous).norm(dim=-1) / previous.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        assert readout is not None  # the model saw to it
        log_p, log_previous = (F.log_softmax(at_least_fp32(readout(x)), dim=-1) for x in (state, previous))
        return F.kl_div(log_previous, log_p, reduction="none", log_target=True).sum(-1)


DECIDERS: dict[str, type[Decider]] = {
    "early": EarlyDecider,
    "online": OnlineDecider,
    "fixed": FixedDecider,
    "stability": StabilityDecider,
}


@contextmanager
def own_randomness(name: str, device: torch.device) -> Iterator[None]:
    """
    Random numbers on the CPU and on `device` from a seed of their own, made of the global seed and `name`; the global
    state is left as it was. (Other devices are not touched: that would start CUDA on them.)

    So a decider's weights draw nothing that the shared weights would miss: two models that differ only in the decider
    start with the same shared weights.
    """
    seed = (torch.initial_seed() + zlib.crc32(name.encode())) % 2**63
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def build_decider(config: "AniraConfig") -> Decider:
    """The decider that `config.decider` names; its modules are marked, so that they initialise apart."""
    with own_randomness("decider", torch.empty(0).device):
        decider = DECIDERS[config.decider](config)
    for name, module in decider.named_modules():
        module._decider_part = name or "decider"
    return decider

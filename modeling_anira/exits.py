"""Exits: from a decider's distribution over depths to one depth for every token.

Shapes: B batch, T tokens of this call, D `max_depth` of the model, d a depth from 1.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .checks import capturing, require
from .deciders import Decider, Readout
from .freeze import TokenSet


def running_sum(values: torch.Tensor) -> torch.Tensor:
    """
    Sums of the first 1..D values of (..., D), in the same shape. Not `cumsum`, which on CUDA is refused where
    deterministic algorithms are asked for.
    """
    return torch.stack(list(itertools.accumulate(values.unbind(-1))), -1)


def straight_through(hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """The value of `hard`, exactly, with the gradient of `soft` (same shape)."""
    return hard.to(soft.dtype) + (soft - soft.detach())


@dataclass(frozen=True)
class ExitRule:
    """
    How q becomes a depth.

    A token exits at the first d whose CDF reaches u; the depth is then clamped to min_depth..max_depth. In training u
    is the token's noise, whatever the rule.
    """

    name: str
    quantile: float
    min_depth: int
    max_depth: int

    def level(self, noise: torch.Tensor | None) -> torch.Tensor | float:
        """u: the noise (B, T) of a token, if there is any, else the quantile. Never 0, which every CDF reaches."""
        return self.quantile if noise is None else noise.clamp_min(torch.finfo(noise.dtype).tiny)

    def depths(self, log_q: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """log q (B, T, D), noise (B, T) or None -> depths (B, T) int64, for a q that is known as a whole."""
        if self.name == "mode" and noise is None:
            depths = log_q.argmax(-1) + 1
        else:
            level = self.level(noise)
            level = level.unsqueeze(-1) if isinstance(level, torch.Tensor) else level
            # The last step of the CDF is 1 by definition, whatever the sum came to.
            depths = (running_sum(log_q.exp())[..., :-1] < level).sum(-1) + 1
        return depths.clamp(self.min_depth, self.max_depth)

    def stays(self, log_survival: torch.Tensor, depth: int, noise: torch.Tensor | None) -> torch.Tensor:
        """log(1 - CDF(depth)) (B, T), noise (B, T) or None -> whether a token goes on after `depth`, (B, T) bool."""
        if depth >= self.max_depth:
            return torch.zeros_like(log_survival, dtype=torch.bool)
        if depth < self.min_depth:
            return torch.ones_like(log_survival, dtype=torch.bool)
        return -torch.expm1(log_survival) < self.level(noise)


def draw_noise(
    shape: tuple[int, ...], depth: int, device: torch.device, generator: torch.Generator | None
) -> torch.Tensor:
    """
    Uniform numbers in [0, 1) of `shape`, (B, T) or (B, T, D), fp32 on `device`.

    Without a generator they come from a fork of the global state: it gives one seed, whatever is drawn then. So dropout
    sees the same random numbers under every decider. A compiled graph cannot fork. There they come from the global
    state itself, D a token under every learned decider.
    """
    if capturing():
        wanted = "left out where a graph is made (torch.compile, torch.jit.trace); pass `exit_noise`"
        require(generator is None, "generator", "a torch.Generator", wanted)
        noise = torch.rand((*shape[:2], depth), device=device)
        return noise if len(shape) == 3 else noise[..., 0]
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, (), device="cpu")))
    return torch.rand(shape, device=generator.device, generator=generator).to(device)


def gumbel_softmax(log_q: torch.Tensor, noise: torch.Tensor, temperature: float) -> torch.Tensor:
    """log q (..., D), uniform noise (..., D) -> softmax((log q + Gumbel) / temperature), (..., D)."""
    tiny = torch.finfo(noise.dtype).tiny
    gumbel = -torch.log(-torch.log(noise.clamp(tiny, 1 - torch.finfo(noise.dtype).eps)))
    return F.softmax((log_q + gumbel) / temperature, dim=-1)


class PlannedExits:
    """Depths known before the first iteration: given by the caller, or decided from the state before the core."""

    def __init__(self, depths: torch.Tensor, log_q: torch.Tensor, soft_survival: torch.Tensor | None = None) -> None:
        """
        Args:
            depths (B, T): int64, 0 at padding.
            log_q (B, T, D): log q of the decider.
            soft_survival (B, T, D): What `depth > d` is the hard form of, where a learned decider trains.
        """
        self.depths, self._log_q, self._soft_survival = depths, log_q, soft_survival

    def active(self, depth: int) -> torch.Tensor:
        """Whether a token takes iteration `depth`: a^(d) as bool (B, T)."""
        return self.depths >= depth

    def weight(self, depth: int) -> torch.Tensor | None:
        """a^(d) as a straight-through number (B, T), or None where no gradient goes to it."""
        if self._soft_survival is None or depth == 1:
            return None
        return straight_through(self.active(depth), self._soft_survival[..., depth - 2])

    def observe(self, depth: int, state: torch.Tensor, previous: torch.Tensor, tokens: TokenSet) -> None:
        """Told h^(depth) and h^(depth - 1) (B, T, H) after each iteration. Nothing is left to decide here."""

    def log_q(self) -> torch.Tensor:
        """log q (B, T, D)."""
        return self._log_q


class OnlineExits:
    """Depths found while iterating, by a decider that looks at the state after each iteration."""

    def __init__(
        self,
        decider: Decider,
        rule: ExitRule,
        real: torch.Tensor,
        model_depth: int,
        noise: torch.Tensor | None = None,
        given_depths: torch.Tensor | None = None,
        readout: Readout | None = None,
        differentiable: bool = False,
    ) -> None:
        """
        Args:
            real (B, T): False at padding.
            model_depth: D.
            noise (B, T): u of each token; None for the rule's quantile.
            given_depths (B, T): Overrides the decider, which is then only asked for its q.
            differentiable: Whether a carries the straight-through gradient of the survival 1 - CDF.
        """
        self.decider, self.rule, self.noise, self.readout = decider, rule, noise, readout
        self.given_depths, self.differentiable, self.model_depth = given_depths, differentiable, model_depth
        self._real = self._active = real
        self.depths = torch.zeros_like(real, dtype=torch.int64)
        self._logits: list[torch.Tensor] = []
        self._log_survival = torch.zeros(real.shape, device=real.device)

    def active(self, depth: int) -> torch.Tensor:
        """Whether a token takes iteration `depth`: a^(d) as bool (B, T)."""
        return self._active

    def weight(self, depth: int) -> torch.Tensor | None:
        """a^(d) as a straight-through number (B, T), or None where no gradient goes to it."""
        if not self.differentiable or depth <= self.rule.min_depth:
            return None
        # Padding never goes on, whatever its alpha is: no gradient.
        return straight_through(self._active, self._log_survival.exp().masked_fill(~self._real, 0.0))

    def observe(self, depth: int, state: torch.Tensor, previous: torch.Tensor, tokens: TokenSet) -> None:
        """Told h^(depth) and h^(depth - 1) (B, T, H) after each iteration: decides who goes on."""
        self.depths = self.depths + self._active
        if depth == self.model_depth:
            self._active = torch.zeros_like(self._active)
            return  # all that is left exits here: alpha^(D) is not used
        computed = tokens.select(state)
        logit = self.decider.exit_logit(computed, tokens.select(previous), self.readout)
        wanted = tuple(computed.shape[:-1])
        require(tuple(logit.shape) == wanted, "exit_logit", tuple(logit.shape), f"of shape {wanted}: one logit a token")
        # An exited token's alpha is that of its frozen state. In training it is read again, for the gradient to a.
        self._logits.append(logit if self.differentiable else tokens.update(logit, self._last_logit()))
        self._log_survival = self._log_survival + F.logsigmoid(-self._logits[-1])
        if self.given_depths is not None:
            self._active = self.given_depths > depth
        else:
            self._active = self._active & self.rule.stays(self._log_survival, depth, self.noise)

    def log_q(self) -> torch.Tensor:
        """log q (B, T, D): log alpha^(d) + sum_{j<d} log(1 - alpha^(j)), and all that is left at D."""
        if self.model_depth == 1:
            return torch.zeros_like(self._log_survival).unsqueeze(-1)
        # Iterations that nobody took would have read alpha from frozen states, so it stays what it was.
        not_taken = self.model_depth - 1 - len(self._logits)
        logits = torch.stack([*self._logits, *[self._last_logit()] * not_taken], -1)
        survival = F.pad(running_sum(F.logsigmoid(-logits)), (1, 0))
        return survival + F.pad(F.logsigmoid(logits), (0, 1))

    def _last_logit(self) -> torch.Tensor:
        return self._logits[-1] if self._logits else torch.zeros_like(self._log_survival)


Exits = PlannedExits | OnlineExits


def noise_shape(decider: Decider, shape: tuple[int, int], depth: int, training: bool) -> tuple[int, ...]:
    """
    The shape of `exit_noise` for (B, T) tokens: one number a token for the inverse CDF, D for the Gumbel-softmax with
    which a decider that plans ahead trains.
    """
    return (*shape, depth) if training and decider.learned and decider.plans_ahead else shape


def open_exits(
    decider: Decider,
    rule: ExitRule,
    shallow: torch.Tensor,
    real: torch.Tensor,
    model_depth: int,
    noise: torch.Tensor | None,
    given_depths: torch.Tensor | None,
    readout: Readout | None,
    training: bool,
    temperature: float,
) -> Exits:
    """
    The exits of one forward.

    Args:
        shallow (B, T, H): h^(0).
        real (B, T): False at padding.
        model_depth: D.
        noise: In the shape that `noise_shape` says; None where depths follow from q alone.
        given_depths (B, T): Overrides the decider.
        training: Whether a learned decider samples, straight-through.
        temperature: Of the Gumbel-softmax.
    """
    sampled = training and decider.learned and given_depths is None
    if not decider.plans_ahead:
        return OnlineExits(decider, rule, real, model_depth, noise, given_depths, readout, differentiable=sampled)
    log_q = F.log_softmax(decider.plan(shallow), dim=-1)
    require(log_q.shape[-1] == model_depth, "max_depth", model_depth, f"{log_q.shape[-1]}, as when the model was built")
    wanted = (*real.shape, model_depth)
    require(tuple(log_q.shape) == wanted, "plan", tuple(log_q.shape), f"of shape {wanted}: one logit a token and depth")
    if given_depths is not None:
        return PlannedExits(given_depths, log_q)
    if not sampled:
        return PlannedExits(rule.depths(log_q, noise).masked_fill(~real, 0), log_q)
    assert noise is not None  # a decider that samples is given its noise
    require(0 < temperature < math.inf, "gumbel_temperature", temperature, "above 0, and finite")
    soft = gumbel_softmax(log_q, noise, temperature)
    depths = (soft.argmax(-1) + 1).clamp(rule.min_depth, rule.max_depth)
    # P(depth > d); below min_depth it is 1 whatever q says.
    soft_survival = 1 - running_sum(soft)
    if rule.min_depth > 1:
        soft_survival = torch.cat(
            [torch.ones_like(soft_survival[..., : rule.min_depth - 1]), soft_survival[..., rule.min_depth - 1 :]], -1
        )
    # Padding never goes on, whatever its q is: no gradient.
    return PlannedExits(depths.masked_fill(~real, 0), log_q, soft_survival.masked_fill(~real[..., None], 0.0))

"""The optimisers of a run, and the schedule of their learning rate."""

import math
from collections.abc import Callable, Iterable

import torch
from recipe import Recipe
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

# Of the Newton-Schulz iteration: its polynomial lifts small singular values fast, and keeps all between 0.5 and 1.5.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# The root mean square of an AdamW step, so that both can share a learning rate.
_STEP_SIZE = 0.2


class Muon(torch.optim.Optimizer):
    """Steps along the nearest orthogonal matrix to the momentum of each matrix (Jordan et al., 2024).

    In fp32, unlike `torch.optim.Muon`, whose bf16 takes seven times as long on a CPU that has none (docs/log.md).
    """

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        """
        Args:
            lr: Sized as AdamW's (arXiv 2502.16982).
        """
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step for every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(momentum, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * _STEP_SIZE * math.sqrt(max(weight.shape)))
        return loss


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix (n, m) with the singular vectors of `matrix`, and singular values near 1."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide.float() / wide.float().norm().clamp(min=1e-7)
    first, third, fifth = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = wide @ wide.T
        wide = first * wide + (third * gram + fifth * gram @ gram) @ wide
    return (wide.T if matrix.shape[0] > matrix.shape[1] else wide).to(matrix.dtype)


def make_optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW, which decays matrices alone; under `optimizer: muon` Muon for the matrices of the layers before it."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    # Muon is for maps between hidden states: not for embeddings, nor for a decider's few outputs.
    inner = {name for name, weight in named if recipe.optimizer == "muon" and weight.dim() == 2 and _is_of_layer(name)}
    rest = [weight for name, weight in named if name not in inner]
    groups = [
        {"params": [weight for weight in rest if weight.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [weight for weight in rest if weight.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if inner:
        matrices = [weight for name, weight in named if name in inner]
        optimizers.append(Muon(matrices, lr=recipe.learning_rate, weight_decay=recipe.weight_decay))
    optimizers.append(torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.epsilon))
    return optimizers


def _is_of_layer(name: str) -> bool:
    """Whether a parameter maps hidden states to hidden states, by its name in the model."""
    return any(f".{part}." in f".{name}" for part in ("prelude", "injection", "core", "coda"))


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe) -> LRScheduler:
    """The recipe's schedule, one step of it a step of the run."""
    if recipe.restart:
        return LambdaLR(optimizer, recipe.learning_share)
    return get_scheduler(recipe.schedule, optimizer, recipe.warmup_steps, recipe.steps)

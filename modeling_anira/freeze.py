"""The freeze: which tokens an iteration computes, and what becomes of the others.

The core's layers are written once, against a *token set*. It selects the tokens to compute, freezes the rest, and
runs the attention of the computed tokens over all of them. The three sets are three ways of running that give the same
states, keys, values and depths:

* `AllTokens`: everything is computed and nothing is frozen (prelude, coda, and iterations that all tokens take);
* `MaskedTokens`: everything is computed, then results of exited tokens are put back (training, compilation);
* `PackedTokens`: active tokens are gathered, only they are computed, and the results are scattered back.

Shapes: B batch, T tokens of this call, S tokens that can be attended to (T and, before them, those of the cache),
N active tokens of the batch, Hq query heads, Hk key-value heads, F features of a head.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

# The signature of transformers' attention functions: module, query, key, value, mask, then keywords.
AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class TokenSet(Protocol):
    """The tokens that one iteration computes."""

    def select(self, values: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) -> the computed tokens: (B, T, ...), or (N, ...) where they are gathered."""

    def freeze(self, new: torch.Tensor, old: torch.Tensor | None, weight: torch.Tensor | None) -> torch.Tensor:
        """
        The freeze, h^(d) = a R(h^(d-1)) + (1 - a) h^(d-1) (paper section 3.1): `new` where a token is active, `old`
        where it has exited.

        Applied to states, and just so to keys and values. As an exited token's stay those of its last iteration, this
        is the visible-KV rule too: whoever attends in iteration d reads the key and value that token j made in
        iteration min(d, d*_j), its deepest.

        Args:
            new: What this iteration computed, in the shape of `select`'s result.
            old (B, T, ...): What was there before; None before the first iteration.
            weight (B, T): a as a straight-through number, which carries the gradient to the decider; None for hard a.

        Returns:
            (B, T, ...).
        """

    def update(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """`new` (as `select` gives it) at active tokens, `old` (B, T) elsewhere, whatever a. Returns (B, T)."""

    def attend(
        self,
        attention: AttentionFunction,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The computed tokens attend to all.

        Args:
            query: (B, T, Hq, F), or (N, Hq, F) where tokens are gathered.
            key, value (B, Hk, S, F).

        Returns:
            The outputs in the shape of `query`, and the attention weights (B, Hq, T, S) or None.
        """


class AllTokens:
    """Every token is computed, none is frozen."""

    def __init__(self, attention_mask: torch.Tensor | None) -> None:
        """`attention_mask`: (B, 1, T, S) as transformers' masking functions make it, or None for plain causality."""
        self.attention_mask = attention_mask

    def select(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def freeze(self, new: torch.Tensor, old: torch.Tensor | None, weight: torch.Tensor | None) -> torch.Tensor:
        return new

    def update(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return new

    def attend(
        self,
        attention: AttentionFunction,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return attention(module, query.transpose(1, 2), key, value, self.attention_mask, **kwargs)


class MaskedTokens(AllTokens):
    """Every token is computed; exited ones are put back to what they were."""

    def __init__(self, active: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """`active`: (B, T) bool. `attention_mask`: as for `AllTokens`."""
        super().__init__(attention_mask)
        self.active = active

    def freeze(self, new: torch.Tensor, old: torch.Tensor | None, weight: torch.Tensor | None) -> torch.Tensor:
        features = (1,) * (new.dim() - 2)
        if old is None:  # first iteration: who is not active is padding, and has no keys and values
            old = torch.zeros_like(new)
        if weight is None:
            return torch.where(self.active.view(*self.active.shape, *features), new, old)
        # lerp is exact where the weight is 0 or 1, and its gradient to the weight is new - old.
        return torch.lerp(old.to(new.dtype), new, weight.to(new.dtype).view(*weight.shape, *features))

    def update(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return torch.where(self.active, new, old)


class PackedTokens:
    """Only the active tokens are computed, gathered into one flat batch; exited ones cost nothing."""

    def __init__(
        self,
        active: torch.Tensor,
        index: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past: int,
    ) -> None:
        """
        Args:
            active (B, T): Bool, at least one of them.
            index (N,): Their positions in the flattened (B * T), ascending.
            attention_mask: (B or 1, 1, T, S), bool or additive, the same for all heads; None for plain causality.
            past: Number of cached tokens before this call.
        """
        self.index, self.shape, self.past = index, active.shape, past
        self.attention_mask = attention_mask
        self._packed_mask: torch.Tensor | None = None
        length = active.shape[1]
        # Attention needs a rectangle: row r of it holds the active queries of the r-th row that has any.
        self.query_index: torch.Tensor | None = None  # None: the active tokens fill it, in order
        if length == 1:
            self.row = self.rows = index
            self.column, self.width = torch.zeros_like(index), 1
            return
        self.row, self.column = index // length, index % length
        counts = active.sum(1)
        # Read once: whoever asks a GPU for a number waits until all that was launched is done.
        per_row = counts.tolist()
        self.width = max(per_row)
        self.rows = counts.nonzero().squeeze(1) if 0 in per_row else torch.arange(len(per_row), device=index.device)
        if index.numel() < self.rows.numel() * self.width:
            starts = (counts.cumsum(0) - counts)[self.row]
            place = torch.arange(index.numel(), device=index.device) - starts
            self.query_index = (counts > 0).cumsum(0).sub(1)[self.row] * self.width + place

    def select(self, values: torch.Tensor) -> torch.Tensor:
        if values.shape[0] < self.shape[0]:  # the same for every row of the batch, as rotary angles mostly are
            return values[0].index_select(0, self.column)
        return values.flatten(0, 1).index_select(0, self.index)

    def freeze(self, new: torch.Tensor, old: torch.Tensor | None, weight: torch.Tensor | None) -> torch.Tensor:
        if old is None:
            old = new.new_zeros(*self.shape, *new.shape[1:])
        return old.flatten(0, 1).index_copy(0, self.index, new.to(old.dtype)).view_as(old)

    def update(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return self.freeze(new, old.to(new.dtype), None)

    def attend(
        self,
        attention: AttentionFunction,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        reach = self.past + self.shape[1]
        if key.shape[2] > reach:  # a static cache has room that nothing can see yet
            key, value = key[:, :, :reach], value[:, :, :reach]
        if self.rows.numel() < self.shape[0]:
            key, value = key.index_select(0, self.rows), value.index_select(0, self.rows)
        queries = self._to_rectangle(query, 0).transpose(1, 2)
        mask = self._rectangular_mask(key.shape[2])
        output, weights = attention(module, queries, key, value, mask, **kwargs)
        output = output.flatten(0, 1)
        return output if self.query_index is None else output.index_select(0, self.query_index), weights

    def _to_rectangle(self, values: torch.Tensor, fill: float | bool) -> torch.Tensor:
        """(N, ...) -> (rows with an active token, width, ...), `fill` where a row has fewer."""
        if self.query_index is None:
            return values.unflatten(0, (-1, self.width))
        rectangle = values.new_full((self.rows.numel() * self.width, *values.shape[1:]), fill)
        return rectangle.index_copy_(0, self.query_index, values).unflatten(0, (-1, self.width))

    def _rectangular_mask(self, num_keys: int) -> torch.Tensor | None:
        """The rows of the attention mask that belong to the active queries: (rows, 1, width, S), or None for all."""
        if self.attention_mask is None and self.shape[1] == 1:
            return None  # one new token sees everything before it
        if self._packed_mask is None:
            if self.attention_mask is None:
                reach = torch.arange(num_keys, device=self.index.device)
                mask = reach <= (self.past + self.column)[:, None]
            else:
                row = self.row if self.attention_mask.shape[0] == self.shape[0] else torch.zeros_like(self.row)
                mask = self.attention_mask[row, 0, self.column, :num_keys]
            # Queries that only fill the rectangle see everything: an empty softmax would be NaN.
            self._packed_mask = self._to_rectangle(mask, mask.dtype == torch.bool).unsqueeze(1)
        return self._packed_mask


def masked_tokens(active: torch.Tensor | None, attention_mask: torch.Tensor | None) -> AllTokens:
    """The token set of an iteration that computes every token. `active`: (B, T) bool, or None for all."""
    return AllTokens(attention_mask) if active is None else MaskedTokens(active, attention_mask)


def packed_tokens(
    active: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    past: int,
) -> TokenSet | None:
    """
    The token set of an iteration that computes only active tokens.

    Args:
        active: (B, T) bool, or None for all.
        attention_mask, past: As for `PackedTokens`.

    Returns:
        None if no token is active.
    """
    if active is None:
        return AllTokens(attention_mask)
    index = active.flatten().nonzero().squeeze(1)
    if index.numel() == 0:
        return None
    if index.numel() == active.numel():
        return AllTokens(attention_mask)
    return PackedTokens(active, index, attention_mask, past)

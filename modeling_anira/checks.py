"""Bad input, refused at once: every message names the argument, what it is, and what is allowed."""

import difflib
import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.utils.generic import TransformersKwargs

if TYPE_CHECKING:
    from .configuration_anira import AniraConfig

# What continuous batching passes through a model to its attention functions.
_PAGED = {
    "cache",
    "block_table",
    "read_index",
    "write_index",
    "logits_indices",
    "logits_processor_args",
    "max_seqlen_q",
    "max_seqlen_k",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}
# Where sequences begin in a batch that packs several, said for flash attention, which is not in use here.
_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# What others may: the attention functions in use here read none of these outside of continuous batching.
_UNREAD = {*_BORDERS, "output_router_logits"}
_FORWARDED = frozenset(TransformersKwargs.__annotations__) - _UNREAD


# What a caller can say about depths, in a forward and in `generate`.
CALL_OPTIONS = (
    "exit_depths",
    "exit_noise",
    "generator",
    "min_depth",
    "max_depth",
    "exit_quantile",
    "exit_rule",
    "output_exit_log_probs",
)


def refuse(name: str, found: str, allowed: str) -> NoReturn:
    """Raises the ValueError of this package: `name` is `found`, but must be `allowed`."""
    raise ValueError(f"`{name}` is {found}, but must be {allowed}.")


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Refuses `name` with its `value` unless `condition` holds."""
    if not condition:
        refuse(name, repr(value), allowed)


def check_keywords(kwargs: dict[str, Any]) -> None:
    """Raises a TypeError for a forward argument that nobody would read, such as a misspelt one."""
    read = _FORWARDED | _PAGED if "cache" in kwargs else _FORWARDED
    for name in kwargs:
        if name not in read:
            near = difflib.get_close_matches(name, CALL_OPTIONS, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            if name in _UNREAD:
                hint = "; `position_ids` that start again, without mask and cache, say where a packed sequence begins"
            raise TypeError(f"forward() got an unexpected argument `{name}`{hint}")
    if kwargs.get("is_causal") is False and "cache" not in kwargs:  # continuous batching says it, and gives masks
        refuse("is_causal", "False", "left out: this model is causal (a 4-D `attention_mask` says who sees whom)")


def drop_borders(kwargs: dict[str, Any], position_ids: torch.Tensor | None, batch_size: int) -> None:
    """
    Removes from `kwargs` what collators add to `position_ids` (B or 1, T) of packed sequences, which make the mask.

    Raises a ValueError where that has other borders than they have, or a longest sequence that is too short; where a
    graph is made, it is not compared. Without positions nothing is removed, and `check_keywords` refuses what is there.
    """
    given = {name: kwargs.pop(name) for name in _BORDERS if name in kwargs and position_ids is not None}
    if position_ids is None or not given or not readable(position_ids):
        return
    shape = (batch_size, position_ids.shape[1])
    borders = _borders(position_ids.diff(dim=1).ne(1).expand(batch_size, -1))
    longest = max(end - begin for begin, end in itertools.pairwise(borders))
    for name, value in given.items():
        if name.startswith("max_length"):
            require(int(value) >= longest, name, int(value), f"at least {longest}, as `position_ids` have it")
            continue
        check_tensor(name, value, f"{shape}" if name == "seq_idx" else f"({len(borders)},)")
        if name == "seq_idx":
            require(value.shape == shape, name, tuple(value.shape), f"of shape {shape}, as the tokens")
            found = _borders(value.diff(dim=1) != 0)
        else:
            found = list(dict.fromkeys(value.flatten().tolist()))  # an empty sequence repeats a border
        require(found == borders, name, found, f"{borders}: where `position_ids` begin again, and the end")


def _borders(between: torch.Tensor) -> list[int]:
    """Whether a sequence ends between two tokens (B, T-1) -> where sequences begin in (B * T), and the end."""
    begins = F.pad(between, (1, 0), value=True).flatten()
    return [*begins.nonzero().flatten().tolist(), begins.numel()]


def check_unknown_fields(unknown: Iterable[str], fields: Iterable[str]) -> None:
    """Refuses a config field that looks like a known one misspelt. (transformers keeps unknown fields silently.)"""
    for name in unknown:
        near = difflib.get_close_matches(name, list(fields), n=1, cutoff=0.85)
        if near:
            refuse(name, "not a field of AniraConfig", f"spelt `{near[0]}`, if that is meant")


def capturing() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace makes a graph of this call: no value may steer it."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def readable(tensor: torch.Tensor) -> bool:
    """Whether values can be looked at: not while a graph is made, and not on the meta device."""
    return not capturing() and not tensor.is_meta


def check_tensor(name: str, value: Any, shape: str) -> None:
    """Refuses lists and numbers: they have no dtype or device."""
    if not torch.is_tensor(value):
        refuse(name, f"a {type(value).__name__}", f"a tensor of shape {shape}")


def check_input_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Ids (B, T) must be two-dimensional and name tokens of the vocabulary."""
    check_tensor("input_ids", input_ids, "(batch, tokens)")
    fits = input_ids.dim() == 2 and input_ids.numel() > 0
    require(fits, "input_ids", tuple(input_ids.shape), "of shape (batch, tokens), with at least one token")
    require(input_ids.dtype in (torch.int32, torch.int64), "input_ids", input_ids.dtype, "torch.int64 or torch.int32")
    if not readable(input_ids):
        return
    outside = (input_ids < 0) | (input_ids >= vocab_size)
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        refuse(
            "input_ids",
            f"{int(input_ids[row, column])} at row {row}, token {column}",
            f"from 0 to {vocab_size - 1} (`vocab_size` is {vocab_size})",
        )


def check_inputs_embeds(inputs_embeds: torch.Tensor, hidden_size: int) -> None:
    """Embeddings must be (B, T, hidden_size), of floating point."""
    check_tensor("inputs_embeds", inputs_embeds, f"(batch, tokens, {hidden_size})")
    shape = tuple(inputs_embeds.shape)
    fits = len(shape) == 3 and shape[2] == hidden_size and inputs_embeds.numel() > 0
    require(fits, "inputs_embeds", shape, f"of shape (batch, tokens, {hidden_size}), with at least one token")
    require(inputs_embeds.is_floating_point(), "inputs_embeds", inputs_embeds.dtype, "of floating point")


def check_position_ids(position_ids: torch.Tensor | None, shape: tuple[int, int]) -> None:
    """Positions of (B, T) tokens must be (B or 1, T)."""
    if position_ids is None:
        return
    check_tensor("position_ids", position_ids, "(batch or 1, tokens)")
    fits = tuple(position_ids.shape) in (shape, (1, shape[1]))
    require(fits, "position_ids", tuple(position_ids.shape), f"of shape ({shape[0]} or 1, {shape[1]})")


def check_labels(name: str, labels: torch.Tensor | None, shape: tuple[int, int]) -> None:
    """Labels of (B, T) tokens must be (B, T), int64."""
    if labels is None:
        return
    check_tensor(name, labels, "(batch, tokens)")
    require(tuple(labels.shape) == shape, name, tuple(labels.shape), f"of shape {shape}, as the tokens")
    require(labels.dtype == torch.int64, name, labels.dtype, "torch.int64")


def check_exit_depths(
    exit_depths: torch.Tensor | None,
    shape: tuple[int, ...],
    real: torch.Tensor | None,
    max_depth: int,
) -> None:
    """Given depths (B, T) must be integers, 1..max_depth at real tokens and 0 at padding (`real` is False, (B, T))."""
    if exit_depths is None:
        return
    check_tensor("exit_depths", exit_depths, "(batch, tokens)")
    require(
        exit_depths.shape == shape, "exit_depths", tuple(exit_depths.shape), f"of shape {tuple(shape)}, as the tokens"
    )
    require(exit_depths.dtype == torch.int64, "exit_depths", exit_depths.dtype, "torch.int64")
    if not readable(exit_depths):
        return
    if real is None:
        real = exit_depths > 0
    least = real.long()
    outside = (exit_depths < least) | (exit_depths > least * max_depth)
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        refuse(
            "exit_depths",
            f"{int(exit_depths[row, column])} at row {row}, token {column}",
            f"from 1 to {max_depth} at a real token" if bool(real[row, column]) else "0 at padding",
        )


def check_no_rule_in_training(name: str, value: Any) -> None:
    """Refuses `exit_rule` or `exit_quantile` where a learned decider trains, and draws its exits."""
    require(value is None, name, value, "left out in training, where exits are drawn (else call `model.eval()`)")


def check_exit_noise(exit_noise: torch.Tensor | None, shape: tuple[int, ...], unread: str) -> None:
    """Noise must have the `shape` that this call reads, and lie in [0, 1); `unread`: why it reads none, if it does."""
    if exit_noise is None:
        return
    if unread:
        refuse("exit_noise", "given", f"left out: {unread}")
    check_tensor("exit_noise", exit_noise, str(tuple(shape)))
    require(exit_noise.shape == shape, "exit_noise", tuple(exit_noise.shape), f"of shape {tuple(shape)}")
    if readable(exit_noise) and not bool(((exit_noise >= 0) & (exit_noise < 1)).all()):
        refuse("exit_noise", f"between {exit_noise.min().item()} and {exit_noise.max().item()}", "in [0, 1)")


def check_attention_mask(
    mask: torch.Tensor | None, shape: tuple[int, int], past: int, room: int | None = None, paged: bool = False
) -> None:
    """
    A mask for (B, T) new tokens must be (B, past + T), or (B or 1, 1, T, S) and so the same for all heads.

    `room`: Tokens that a static cache can hold, which S may be too. `paged`: S is the length of pages, under continuous
    batching.
    """
    if mask is None:
        return
    check_tensor("attention_mask", mask, "(batch, tokens)")
    batch, length = shape
    if mask.dim() == 4:
        keys = [past + length] if room is None else [past + length, room]
        fits = mask.shape[0] in (1, batch) and mask.shape[1:3] == (1, length) and (paged or mask.shape[3] in keys)
        allowed = " or ".join(map(str, keys))
        require(fits, "attention_mask", tuple(mask.shape), f"of shape ({batch} or 1, 1, {length}, {allowed})")
        kind = mask.dtype == torch.bool or mask.is_floating_point()
        require(kind, "attention_mask", mask.dtype, "in 4-D torch.bool, or of floating point and added to the scores")
    else:
        wanted = (batch, past + length)
        require(
            tuple(mask.shape) == wanted, "attention_mask", tuple(mask.shape), f"of shape {wanted}: batch, cached + new"
        )


def check_cache(cache: Any, config: "AniraConfig", batch_size: int) -> None:
    """A cache must have a slot for every attention call of `config`, and keys of its shape."""
    if cache is None or capturing():
        return
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        refuse("past_key_values", f"a {type(cache).__name__}", "a transformers Cache, such as DynamicCache")
    slots = config.num_attention_calls
    require(
        len(cache.layers) in (0, slots),
        "past_key_values",
        f"a cache of {len(cache.layers)} slots",
        f"made for this model: {slots} slots (max_depth={config.max_depth}), as DynamicCache(config=model.config)",
    )
    keys = getattr(cache.layers[0], "keys", None) if cache.layers else None
    if keys is None or keys.numel() == 0:
        return
    found, wanted = (keys.shape[0], keys.shape[1], keys.shape[3]), (batch_size, *config.head_sizes[1:])
    require(found == wanted, "past_key_values", f"(batch, heads, head_dim) {found}", f"{wanted}, as this model's")

"""ANIRA: a causal Transformer whose middle block is applied again and again, with a depth decided per token.

    ids -> embedding -> prelude (P layers) -> h^(0)
    h^(0) -> core (C layers), up to D times, each token until its own exit depth
    state at exit -> coda (E layers) -> final norm -> logits

Shapes: B batch, T tokens of this call, S tokens that can be attended to, H hidden size, N active tokens of the batch,
D `max_depth`, V vocabulary. Source: arXiv 2602.08864, sections 3.1 and 3.2.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .checks import (
    capturing,
    check_attention_mask,
    check_cache,
    check_exit_depths,
    check_exit_noise,
    check_input_ids,
    check_inputs_embeds,
    check_keywords,
    check_labels,
    check_no_rule_in_training,
    check_position_ids,
    check_tensor,
    drop_borders,
    readable,
    refuse,
    require,
)
from .configuration_anira import EXECUTIONS, AniraConfig, check_exit_rule
from .cost import Flops, count_flops
from .deciders import Decider, ExitHead, Readout, at_least_fp32, build_decider, own_randomness
from .exits import ExitRule, Exits, draw_noise, noise_shape, open_exits
from .freeze import AllTokens, TokenSet, masked_tokens, packed_tokens
from .generation import AniraGenerationMixin, DepthRecord, cache_length, cache_room
from .objective import compute_loss, expected_depth
from .versions import CACHE

# How a saved model is found again by the Auto classes; transformers itself writes only the entry of the class it saves.
AUTO_MAP = {
    "AutoConfig": "configuration_anira.AniraConfig",
    "AutoModel": "modeling_anira.AniraModel",
    "AutoModelForCausalLM": "modeling_anira.AniraForCausalLM",
}

# What a model is made of: its parts are made once, while most fields of its config are read at every forward.
BUILT = (
    "decider",
    "input_injection",
    "num_prelude_layers",
    "num_core_layers",
    "num_coda_layers",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
)

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines of the rotary angles, each (B or 1, T, F) or (N, F)


@dataclass
class AniraModelOutput(BaseModelOutputWithPast):
    """
    Output of [`AniraModel`].

    Args:
        last_hidden_state (`(B, T, H)`): After the final norm.
        past_key_values: The cache, one slot for every attention call.
        hidden_states: With `output_hidden_states=True`, 1 + P + D + E tensors `(B, T, H)`: the embeddings, the output
            of each prelude layer, h^(1)..h^(D) (frozen where a token has exited), the output of each coda layer; the
            last one after the final norm.
        attentions: With `output_attentions=True`, one tensor `(B, heads, T, S)` for every attention call that was made:
            fewer than P + D * C + E where `max_depth` or `fixed_depth` ends the iterations before D.
        exit_depths (`(B, T)` int64): Iterations that each token got, 1..D; 0 at padding.
        expected_depth (`(B, T)` float): sum_d d q(d); 0 at padding.
        exit_log_probs (`(B, T, D)` float): log q, with `output_exit_log_probs=True`; -inf at padding.
    """

    exit_depths: torch.Tensor | None = None
    expected_depth: torch.Tensor | None = None
    exit_log_probs: torch.Tensor | None = None


@dataclass
class AniraCausalLMOutput(CausalLMOutputWithPast):
    """
    Output of [`AniraForCausalLM`].

    Args:
        loss (scalar): `ce_loss + compute_weight * compute_loss`, when `labels` are given.
        logits (`(B, T, V)`): Or fewer tokens, with `logits_to_keep`.
        ce_loss (scalar): Cross-entropy in nats.
        compute_loss (scalar): KL(q || prior) in nats.

    The other fields are those of [`AniraModelOutput`].
    """

    ce_loss: torch.Tensor | None = None
    compute_loss: torch.Tensor | None = None
    exit_depths: torch.Tensor | None = None
    expected_depth: torch.Tensor | None = None
    exit_log_probs: torch.Tensor | None = None


class AniraRMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., H)."""
        states = at_least_fp32(hidden_states)
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * states.to(hidden_states.dtype)


class AniraMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: AniraConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None  # the config fills it in
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., H)."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class AniraRotaryEmbedding(nn.Module):
    """Rotary positions, with the settings that transformers knows. (The class name lets it refill the buffers.)"""

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: AniraConfig) -> None:
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]  # type: ignore[index]
        rope_init = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: AniraConfig, device: torch.device | None = None, seq_len: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, float]:
        """Inverse frequencies (F / 2,) in radians a token, and the scale of cosines and sines."""
        base = config.rope_parameters["rope_theta"]  # type: ignore[index]
        head_dim = config.head_sizes[2]
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float, device=device) / head_dim
        return 1.0 / base**exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> Rotation:
        """Positions (B or 1, T) -> cosines and sines (B or 1, T, F), in the dtype of `hidden_states`."""
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device).float()
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate(heads: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turns (..., heads, F) by the angles (..., F) of their positions."""
    cos, sin = (part.unsqueeze(-2) for part in rotation)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def repeat_kv(states: torch.Tensor, repeats: int) -> torch.Tensor:
    """(B, Hk, S, F) -> (B, Hk * repeats, S, F): each key-value head serves `repeats` query heads in a row."""
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention written out, which also returns its weights.

    Args:
        query (B, Hq, Q, F), key and value (B, Hk, S, F).
        attention_mask (B, 1, Q, S): Added to the scores; None for no mask.

    Returns:
        Outputs (B, Q, Hq, F) and weights (B, Hq, Q, S).
    """
    repeats = query.shape[1] // key.shape[1]
    scores = torch.matmul(query, repeat_kv(key, repeats).transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(at_least_fp32(scores), dim=-1).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    outputs = torch.matmul(weights, repeat_kv(value, repeats))
    return outputs.transpose(1, 2).contiguous(), weights


class AniraAttention(nn.Module):
    """Causal grouped-query attention of a token set."""

    def __init__(self, config: AniraConfig) -> None:
        super().__init__()
        self.config = config
        num_heads, num_kv_heads, self.head_dim = config.head_sizes
        self.num_key_value_groups = num_heads // num_kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = float(config.attention_dropout)
        self.is_causal = True
        query_size, key_size = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        frozen_key: torch.Tensor | None,
        frozen_value: torch.Tensor | None,
        weight: torch.Tensor | None,
        tokens: TokenSet,
        rotation: Rotation,
        past_key_values: Cache | None,
        slot: int,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: The computed tokens, (B, T, H) or (N, H).
            frozen_key, frozen_value (B, T, heads, F): Of the iteration before; None in the first.
            weight (B, T): Straight-through a, or None.
            tokens: Which tokens are computed.
            rotation: Of the computed tokens.
            slot: Of `past_key_values`, for this attention call.

        Returns:
            Output in the shape of `hidden_states`, keys and values (B, T, heads, F) as they are visible in this
            iteration, attention weights or None.
        """
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = rotate(self.q_proj(hidden_states).view(heads), rotation)
        key = rotate(self.k_proj(hidden_states).view(heads), rotation)
        value = self.v_proj(hidden_states).view(heads)
        key = tokens.freeze(key, frozen_key, weight)
        value = tokens.freeze(value, frozen_value, weight)
        keys, values = key.transpose(1, 2), value.transpose(1, 2)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, slot)
        if "cache" in kwargs:
            self.layer_idx = slot  # where a paged cache, which the attention function updates, finds this call
            if CACHE == "cache":  # in these releases the model updates it
                keys, values = kwargs.pop("cache").update(keys, values, slot, kwargs=kwargs)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = tokens.attend(
            attention, self, query, keys, values, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.flatten(-2)), key, value, weights


class AniraLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, config: AniraConfig) -> None:
        super().__init__()
        self.input_layernorm = AniraRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = AniraAttention(config)
        self.post_attention_layernorm = AniraRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = AniraMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        frozen_key: torch.Tensor | None,
        frozen_value: torch.Tensor | None,
        weight: torch.Tensor | None,
        tokens: TokenSet,
        rotation: Rotation,
        past_key_values: Cache | None = None,
        slot: int = 0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Arguments and result as for `AniraAttention`. What carries a gradient comes by position, as checkpointing needs.
        """
        attended, key, value, weights = self.self_attn(
            self.input_layernorm(hidden_states),
            frozen_key,
            frozen_value,
            weight,
            tokens,
            rotation,
            past_key_values,
            slot,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, key, value, weights


class InputInjection(nn.Module):
    """How h^(0) enters each iteration: not at all (as in what is known of the paper), added, or through an adapter."""

    def __init__(self, config: AniraConfig) -> None:
        super().__init__()
        self.kind = config.input_injection
        if self.kind == "concat":
            self.adapter = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, state: torch.Tensor, shallow: torch.Tensor) -> torch.Tensor:
        """h^(d-1) and h^(0), both (..., H) -> what the core reads in iteration d, (..., H)."""
        if self.kind == "none":
            return state
        if self.kind == "add":
            return state + shallow
        # Under autocast the adapter answers in half precision, but the residual stream keeps its own.
        return self.adapter(torch.cat((state, shallow), dim=-1)).to(state.dtype)


def _can_return_tuple(forward: Callable) -> Callable:
    """transformers' decorator, which reads `return_dict`; it stays where accelerate takes its own wrappers away."""
    wrapped = can_return_tuple(forward)
    wrapped.__signature__ = inspect.signature(forward)
    del wrapped.__wrapped__  # `unwrap_model(keep_fp32_wrapper=False)` goes down these to the last
    return wrapped


class AniraPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving, and the cost of a run."""

    config: AniraConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AniraModel"]  # the core reads its own states again: all of it sits on one device
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: AniraConfig, *args: Any, **kwargs: Any) -> None:
        config.validate()  # fields may have been set since it was built
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        part = getattr(module, "_decider_part", None)
        if part is None:
            super()._init_weights(module)
            return
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        with own_randomness(part, device):
            super()._init_weights(module)
            if isinstance(module, ExitHead):
                module.start()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; what is saved carries its code, and loads with all Auto classes that fit."""
        cast(AniraModel, self.base_model).check_built()
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **AUTO_MAP}
        if self.can_generate():
            # Marked as made from the model's config, it would lose what it says about depths when it is loaded again.
            self.generation_config._from_model_config = False
        super().save_pretrained(*args, **kwargs)

    def flops(
        self,
        exit_depths: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_length: int = 0,
    ) -> Flops:
        """
        What a forward with these depths must cost. (Masked execution costs what a packed run of all tokens at D does.)

        Args:
            exit_depths (B, T): 0..D; padding is where it is 0.
            attention_mask (B, past_length + T): Padding is 0. Only checked against `exit_depths`, which say the rest.
            past_length: Tokens in the cache.

        Returns:
            A [`Flops`], whose fields are floating-point operations by part (a multiply-add is 2).
        """
        check_tensor("exit_depths", exit_depths, "(batch, tokens)")
        require(exit_depths.dim() == 2, "exit_depths", tuple(exit_depths.shape), "of shape (batch, tokens)")
        if attention_mask is not None:
            shape = tuple(attention_mask.shape)
            require(len(shape) == 2, "attention_mask", f"of shape {shape}", "of shape (batch, past_length + tokens)")
        batch, length = exit_depths.shape
        check_attention_mask(attention_mask, (batch, length), past_length)
        real = None if attention_mask is None else attention_mask[:, past_length:].bool()
        check_exit_depths(exit_depths, (batch, length), real, self.config.max_depth)
        decider = cast(Decider, self.decider)  # each model has one, which this base class cannot know
        return count_flops(decider, exit_depths, past_length, self.get_output_embeddings() is not None)


class AniraModel(AniraPreTrainedModel):
    """Prelude, core, coda and final norm: token ids -> states, and the depth that each token got."""

    def __init__(self, config: AniraConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = AniraRotaryEmbedding(config)
        self.prelude = nn.ModuleList(AniraLayer(config) for _ in range(config.num_prelude_layers))
        self.injection = InputInjection(config)
        self.core = nn.ModuleList(AniraLayer(config) for _ in range(config.num_core_layers))
        self.decider = build_decider(config)
        self.coda = nn.ModuleList(AniraLayer(config) for _ in range(config.num_coda_layers))
        self.norm = AniraRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self._built = {name: copy.deepcopy(getattr(config, name)) for name in BUILT}
        self.post_init()

    def check_built(self) -> None:
        """Refuses a config that was set to other parts since they were made: it would be saved with these weights."""
        for name, value in self._built.items():
            found = getattr(self.config, name)
            require(found == value, name, found, f"{value!r}, as when the model was built; build or load another")

    @_can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        exit_depths: torch.Tensor | None = None,
        exit_noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        min_depth: int | None = None,
        max_depth: int | None = None,
        exit_quantile: float | None = None,
        exit_rule: str | None = None,
        output_exit_log_probs: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        readout_head: Readout | None = None,
        **kwargs: Any,
    ) -> AniraModelOutput:
        r"""
        Args:
            input_ids (B, T), or inputs_embeds (B, T, H): The new tokens.
            attention_mask (B, S): 0 at padding. A 4-D mask is used as it is.
            position_ids (B, T): Default: counted from the length of the cache.
            past_key_values: A transformers cache with one slot for every attention call of this config.
            use_cache: Default: `config.use_cache`, in training False.
            exit_depths (B, T): Depths to use instead of the decider's: 1..D, 0 at padding.
            exit_noise: Uniform numbers in [0, 1), for training and `exit_rule="sample"`: (B, T), or (B, T, D) in the
                training of a decider that plans ahead. Default: drawn.
            generator: Where to draw `exit_noise` from. Default: a fork of the global state.
            min_depth, max_depth, exit_quantile, exit_rule: Override the config for this call.
            output_exit_log_probs: Whether to return log q.
            readout_head: A function that applies the LM head, for deciders that read the model's output.

        Returns:
            An [`AniraModelOutput`]; with `return_dict=False`, a tuple of its fields that are set.

        Raises:
            ValueError: Names the argument, its value and what is allowed.
        """
        if "cache" in kwargs and (kwargs["cache"] is None or isinstance(kwargs["cache"], Cache)):
            cache = kwargs.pop("cache")
            past_key_values = past_key_values if cache is None else cache
        if not capturing():
            self.check_built()
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            found = "neither given nor" if input_ids is None else "given together with"
            refuse("input_ids", f"{found} `inputs_embeds`", "the one or the other")
        if input_ids is not None:
            check_input_ids(input_ids, config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        elif inputs_embeds is not None:
            check_inputs_embeds(inputs_embeds, config.hidden_size)
        assert inputs_embeds is not None
        shape = (inputs_embeds.shape[0], inputs_embeds.shape[1])
        check_position_ids(position_ids, shape)
        masked_by_position = attention_mask is None and past_key_values is None and "cache" not in kwargs
        if masked_by_position and config._attn_implementation in ("sdpa", "eager"):
            drop_borders(kwargs, position_ids, shape[0])
        check_keywords(kwargs)

        if self.gradient_checkpointing and self.training and (use_cache or past_key_values is not None):
            name, found, wanted = (
                ("use_cache", "True", "False") if use_cache else ("past_key_values", "given", "left out")
            )
            refuse(name, f"{found} while gradient checkpointing trains", f"{wanted} (to generate, call `model.eval()`)")
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        check_cache(past_key_values, config, shape[0])
        past = cache_length(past_key_values)

        check_attention_mask(attention_mask, shape, past, cache_room(past_key_values), paged="cache" in kwargs)
        real, padded = self._real_tokens(attention_mask, shape, inputs_embeds.device)
        rule = self._exit_rule(exit_rule, exit_quantile, min_depth, max_depth, exit_depths)
        check_exit_depths(exit_depths, shape, real, config.max_depth)
        packed = self._execution(output_attentions, exit_depths, paged="cache" in kwargs) == "packed"
        readout = self._readout(readout_head)

        mask = self._causal_mask(inputs_embeds, attention_mask, past_key_values, position_ids)
        # After the mask: where a cache was given, positions that start again do not tell sequences apart.
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if position_ids is None:
            position_ids = torch.arange(shape[1], device=inputs_embeds.device).unsqueeze(0) + past
        run = _Run(
            everyone=AllTokens(mask),
            rotation=self.rotary_emb(inputs_embeds, position_ids),
            past_key_values=past_key_values,
            kwargs=kwargs,
            hidden_states=[inputs_embeds] if self._wants(output_hidden_states, "output_hidden_states") else None,
            attentions=[] if self._wants(output_attentions, "output_attentions") else None,
        )
        noise = self._exit_noise(exit_noise, generator, shape, rule, exit_depths, inputs_embeds.device)
        shallow = self._run_stack("prelude", inputs_embeds, run)
        exits = open_exits(
            self.decider,
            rule,
            shallow,
            real,
            config.max_depth,
            noise,
            exit_depths,
            readout,
            self.training,
            config.gumbel_temperature,
        )
        state = self._iterate(shallow, exits, rule, exit_depths is not None, padded, packed, past, run)
        output = self.norm(self._run_stack("coda", state, run))
        if run.hidden_states is not None:
            run.hidden_states[-1] = output

        log_q = exits.log_q()
        return AniraModelOutput(
            last_hidden_state=output,
            **{CACHE: past_key_values},
            hidden_states=tuple(run.hidden_states) if run.hidden_states is not None else None,
            attentions=tuple(run.attentions) if run.attentions is not None else None,
            exit_depths=exits.depths,
            expected_depth=expected_depth(log_q).masked_fill(~real, 0.0),
            exit_log_probs=log_q.masked_fill(~real[..., None], -torch.inf) if output_exit_log_probs else None,
        )

    def _iterate(
        self,
        shallow: torch.Tensor,
        exits: Exits,
        rule: ExitRule,
        depths_given: bool,
        padded: bool,
        packed: bool,
        past: int,
        run: "_Run",
    ) -> torch.Tensor:
        """h^(0) (B, T, H) -> every token's state at its exit (B, T, H): the core, iteration by iteration."""
        config, state = self.config, shallow
        shape = (shallow.shape[0], shallow.shape[1])
        kv: list[tuple[torch.Tensor | None, torch.Tensor | None]] = [(None, None)] * config.num_core_layers
        # Depths between which no token can exit need no look at who is active.
        least, greatest = (1, config.max_depth) if depths_given else self.decider.depth_span(config.max_depth)
        if not depths_given:
            least, greatest = (min(max(depth, rule.min_depth), rule.max_depth) for depth in (least, greatest))
        mask, taken = run.everyone.attention_mask, 0
        for depth in range(1, greatest + 1):
            active = None if depth <= least and not padded else exits.active(depth)
            tokens = packed_tokens(active, mask, past) if packed else masked_tokens(active, mask)
            if tokens is None:
                break
            taken = depth
            weight = exits.weight(depth)
            hidden = self.injection(tokens.select(state), tokens.select(shallow))
            rotation = (tokens.select(run.rotation[0]), tokens.select(run.rotation[1]))
            for index, layer in enumerate(self.core):
                slot = config.cache_slot("core", index, depth - 1)
                hidden, key, value = run.call(layer, hidden, kv[index], weight, tokens, rotation, slot)
                kv[index] = (key, value)
            previous, state = state, tokens.freeze(hidden, state, weight)
            exits.observe(depth, state, previous, tokens)
            if run.hidden_states is not None:
                run.hidden_states.append(state)
        self._fill_skipped_slots(taken, kv, run, shape)
        return state

    def _fill_skipped_slots(
        self,
        depth: int,
        kv: list[tuple[torch.Tensor | None, torch.Tensor | None]],
        run: "_Run",
        shape: tuple[int, int],
    ) -> None:
        """Gives iterations that nobody took the deepest keys and values, so that all cache slots grow alike."""
        config = self.config
        for iteration in range(depth, config.max_depth):
            if run.hidden_states is not None:
                run.hidden_states.append(run.hidden_states[-1])
            if run.past_key_values is None:
                continue
            for index, (key, value) in enumerate(kv):
                if key is None or value is None:  # a batch of nothing but padding
                    key = value = run.rotation[0].new_zeros(*shape, *config.head_sizes[1:])
                slot = config.cache_slot("core", index, iteration)
                run.past_key_values.update(key.transpose(1, 2), value.transpose(1, 2), slot)

    def _run_stack(self, part: str, hidden: torch.Tensor, run: "_Run") -> torch.Tensor:
        """Prelude or coda: (B, T, H) -> (B, T, H)."""
        for index, layer in enumerate(getattr(self, part)):
            slot = self.config.cache_slot(part, index)
            hidden, *_ = run.call(layer, hidden, (None, None), None, run.everyone, run.rotation, slot)
            if run.hidden_states is not None:
                run.hidden_states.append(hidden)
        return hidden

    def _causal_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """The mask (B or 1, 1, T, S) for the attention in use, bool or additive; None for plain causality."""
        cache: dict[str, Any] = {CACHE: past_key_values}
        mask: Any = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **cache,
            position_ids=position_ids,  # given ones may say that a row packs several sequences
        )
        if mask is None or mask.dtype != torch.bool or self.config._attn_implementation != "eager":
            return mask
        dtype = inputs_embeds.dtype  # a mask of four dimensions comes back as it was given, but eager attention adds it
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def _real_tokens(
        self, attention_mask: torch.Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> tuple[torch.Tensor, bool]:
        """Which of the new tokens are not padding, (B, T) bool, and whether some may be."""
        if attention_mask is None:
            return torch.ones(shape, dtype=torch.bool, device=device), False
        if attention_mask.dim() == 4:
            # A token that sees nothing, not even itself, is padding.
            seen = attention_mask[:, 0].to(device)
            seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
            real = seen.any(-1).expand(shape)
        else:
            real = attention_mask[:, -shape[1] :].to(device).bool()
        return real, not readable(real) or not bool(real.all())

    def _exit_rule(
        self,
        exit_rule: str | None,
        exit_quantile: float | None,
        min_depth: int | None,
        max_depth: int | None,
        exit_depths: torch.Tensor | None,
    ) -> ExitRule:
        """The rule of this call: the config's, unless overridden."""
        given = {"exit_rule": exit_rule, "exit_quantile": exit_quantile, "min_depth": min_depth, "max_depth": max_depth}
        clash = [name for name, value in given.items() if value is not None]
        if exit_depths is not None and clash:
            refuse(clash[0], f"given together with `exit_depths` ({given[clash[0]]!r})", "left out: depths are given")
        config = self.config
        deepest = config.max_depth if max_depth is None else max_depth
        rule = ExitRule(
            name=config.exit_rule if exit_rule is None else exit_rule,
            quantile=config.exit_quantile if exit_quantile is None else exit_quantile,
            min_depth=config.min_depth if min_depth is None else min_depth,
            max_depth=deepest,
        )
        check_exit_rule(rule.name, rule.quantile, rule.min_depth, rule.max_depth, config)
        if self.training and self.decider.learned:
            check_no_rule_in_training("exit_rule", exit_rule)
            check_no_rule_in_training("exit_quantile", exit_quantile)
        if exit_quantile is not None and rule.name != "quantile":
            refuse("exit_quantile", repr(exit_quantile), f"left out: `exit_rule` is {rule.name!r}, which reads none")
        return rule

    def _execution(self, output_attentions: bool | None, exit_depths: torch.Tensor | None, paged: bool) -> str:
        """How this forward runs: packed or masked. `paged`: under continuous batching, which is masked."""
        execution = self.config.execution
        require(execution in EXECUTIONS, "execution", execution, f"one of {list(EXECUTIONS)}")
        if execution == "auto":
            execution = "masked" if self.training or capturing() or paged else "packed"
            if self._wants(output_attentions, "output_attentions"):
                execution = "masked"
        if execution == "packed" and self.training and self.decider.learned and exit_depths is None:
            refuse(
                "execution",
                f"'packed' while the model trains its decider ({self.config.decider!r})",
                "'masked' or 'auto': the gradient of an exit needs what the exited token would have become",
            )
        for unfit, where in ((paged, "continuous batching"), (torch.jit.is_tracing(), "torch.jit.trace")):
            if execution == "packed" and unfit:
                refuse("execution", f"'packed' under {where}", "'masked' or 'auto'")
        if self._wants(output_attentions, "output_attentions"):
            if execution == "packed":
                refuse("output_attentions", "True under `execution='packed'`", "used with 'masked' or 'auto'")
            implementation = self.config._attn_implementation
            if implementation != "eager":
                refuse("output_attentions", f"True under {implementation!r}", "used with `attn_implementation='eager'`")
        return execution

    def _exit_noise(
        self,
        exit_noise: torch.Tensor | None,
        generator: torch.Generator | None,
        shape: tuple[int, int],
        rule: ExitRule,
        exit_depths: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor | None:
        """The exit noise of this call, given or drawn; None where depths do not depend on any."""
        wanted = noise_shape(self.decider, shape, self.config.max_depth, self.training)
        needed = exit_depths is None and (self.decider.learned if self.training else rule.name == "sample")
        unread = ""
        if exit_depths is not None:
            unread = "`exit_depths` are given"
        elif not self.training and not needed:
            unread = f"`exit_rule` is {rule.name!r}; 'sample' reads noise, and so does training"
        check_exit_noise(exit_noise, wanted, unread)
        if generator is not None and (unread or exit_noise is not None):
            refuse("generator", "given", f"left out: {unread or '`exit_noise` is given'}")
        if generator is not None:
            allowed = isinstance(generator, torch.Generator)
            require(allowed, "generator", generator, "a torch.Generator, such as torch.Generator().manual_seed(3)")
        if exit_noise is not None:
            return exit_noise.to(device=device, dtype=torch.float32) if needed else None
        # Training draws under every decider, so that the global state moves alike.
        noise = draw_noise(wanted, self.config.max_depth, device, generator) if needed or self.training else None
        return noise if needed else None

    def _readout(self, head: Readout | None) -> Readout | None:
        """Final norm and LM head, for deciders that ask for it."""
        if not self.decider.needs_readout:
            return None
        if head is None:
            refuse("decider", f"{self.config.decider!r}, which reads the LM head", "used in AniraForCausalLM")
        # A device map may have put the head elsewhere.
        return lambda state: head(self.norm(state)).to(state.device)

    def _wants(self, argument: bool | None, field: str) -> bool:
        return bool(getattr(self.config, field, False) if argument is None else argument)


@dataclass
class _Run:
    """What all layers of one forward share, and what it records."""

    everyone: AllTokens
    rotation: Rotation
    past_key_values: Cache | None
    kwargs: dict[str, Any]
    hidden_states: list[torch.Tensor] | None
    attentions: list[torch.Tensor] | None

    def call(
        self,
        layer: nn.Module,
        hidden: torch.Tensor,
        frozen: tuple[torch.Tensor | None, torch.Tensor | None],
        weight: torch.Tensor | None,
        tokens: TokenSet,
        rotation: Rotation,
        slot: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One call of a layer: its states, keys and values (shapes as in `AniraAttention`)."""
        hidden, key, value, weights = layer(
            hidden,
            *frozen,
            weight,
            tokens=tokens,
            rotation=rotation,
            past_key_values=self.past_key_values,
            slot=slot,
            **self.kwargs,
        )
        if self.attentions is not None:
            self.attentions.append(weights)
        return hidden, key, value


class AniraForCausalLM(AniraPreTrainedModel, AniraGenerationMixin):
    """ANIRA with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: AniraConfig) -> None:
        super().__init__(config)
        self.model = AniraModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def decider(self) -> Decider:
        """What decides how deep a token goes."""
        return self.model.decider

    @_can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        exit_depths: torch.Tensor | None = None,
        exit_noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        min_depth: int | None = None,
        max_depth: int | None = None,
        exit_quantile: float | None = None,
        exit_rule: str | None = None,
        output_exit_log_probs: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        depth_record: DepthRecord | None = None,
        **kwargs: Any,
    ) -> AniraCausalLMOutput:
        r"""
        Arguments as for [`AniraModel`], and:

        Args:
            labels (B, T): Token ids, -100 where no loss is wanted. Label i is predicted by token i-1: they are shifted
                here, so pass a copy of `input_ids`.
            logits_to_keep: Compute logits for the last that many tokens only (0: all), or for these indices.
            num_items_in_batch: Labels in all micro-batches of a step; losses are then sums over this.
            depth_record: Where `generate` collects depths.
            shift_labels (B, T): By keyword: labels shifted already, label i is predicted by token i.

        Returns:
            An [`AniraCausalLMOutput`]; with `return_dict=False`, a tuple of its fields that are set.

        Raises:
            ValueError: Names the argument, its value and what is allowed.
        """
        # Not in the signature: `Trainer` takes every argument there whose name has "label" for one that rows must have.
        shift_labels = kwargs.pop("shift_labels", None)
        wants_loss = labels is not None or shift_labels is not None
        if wants_loss and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            refuse("logits_to_keep", f"{logits_to_keep} together with labels", "0: a loss needs all logits")
        start = 0 if depth_record is None else cache_length(past_key_values)
        outputs: AniraModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            exit_depths=exit_depths,
            exit_noise=exit_noise,
            generator=generator,
            min_depth=min_depth,
            max_depth=max_depth,
            exit_quantile=exit_quantile,
            exit_rule=exit_rule,
            output_exit_log_probs=output_exit_log_probs or wants_loss,
            # A function: accelerate's hooks would move a module that they find among the arguments.
            readout_head=lambda state: self.lm_head(state),
            return_dict=True,
            **kwargs,
        )
        if depth_record is not None and outputs.exit_depths is not None:
            depth_record.add(start, outputs.exit_depths)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        assert outputs.last_hidden_state is not None
        logits = self.lm_head(outputs.last_hidden_state[:, keep])

        loss = ce_loss = kl_loss = None
        if wants_loss:
            shape = (outputs.last_hidden_state.shape[0], outputs.last_hidden_state.shape[1])
            check_labels("labels", labels, shape)
            check_labels("shift_labels", shift_labels, shape)
            assert outputs.exit_log_probs is not None
            assert outputs.exit_depths is not None
            ce_loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
            counted = labels[..., 1:] if shift_labels is None and labels is not None else shift_labels
            assert counted is not None
            kl_loss = compute_loss(
                outputs.exit_log_probs,
                outputs.exit_depths > 0,
                self.config.prior_base,
                counted.ne(-100).sum(),
                num_items_in_batch,
            )
            # A device map may have put the head on another device than the rest.
            kl_loss = kl_loss.to(ce_loss.device)
            loss = ce_loss + self.config.compute_weight * kl_loss

        return AniraCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            ce_loss=ce_loss,
            compute_loss=kl_loss,
            exit_depths=outputs.exit_depths,
            expected_depth=outputs.expected_depth,
            exit_log_probs=outputs.exit_log_probs if output_exit_log_probs else None,
        )


__all__ = ["AniraForCausalLM", "AniraModel", "AniraPreTrainedModel"]

"""The configuration of an ANIRA model."""

import math
from typing import Any

from .versions import TRANSFORMERS  # noqa: F401  (first of all: a release that is too old is refused by name)

# isort: split
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .checks import check_unknown_fields, require
from .deciders import DECIDERS

EXIT_RULES = ("quantile", "sample", "mode")
EXECUTIONS = ("auto", "packed", "masked")
INPUT_INJECTIONS = ("none", "add", "concat")
STABILITY_CRITERIA = ("state", "distribution")

# The fields that `num_hidden_layers` is computed from.
_LAYER_COUNTS = ("num_prelude_layers", "num_core_layers", "num_coda_layers", "max_depth")


@strict
class AniraConfig(PreTrainedConfig):
    r"""
    Configuration of [`AniraModel`] and [`AniraForCausalLM`]: a causal Transformer of a prelude, a core that is applied
    up to `max_depth` times (each token leaves at a depth of its own), and a coda.

    Args:
        vocab_size (`int`, *optional*, defaults to 256): Number of tokens that `input_ids` can name.
        hidden_size (`int`, *optional*, defaults to 256): Width of the states.
        intermediate_size (`int`, *optional*): Width inside the SwiGLU MLP. Default: 8/3 of `hidden_size`, rounded up
            to a multiple of 16.
        num_attention_heads (`int`, *optional*, defaults to 4): Query heads.
        num_key_value_heads (`int`, *optional*): Key and value heads; must divide `num_attention_heads`. Default: equal.
        head_dim (`int`, *optional*): Width of a head, even. Default: `hidden_size / num_attention_heads`.
        num_prelude_layers (`int`, *optional*, defaults to 1): P, causal layers before the core.
        num_core_layers (`int`, *optional*, defaults to 2): C, causal layers inside the core.
        num_coda_layers (`int`, *optional*, defaults to 1): E, causal layers after the core.
        max_depth (`int`, *optional*, defaults to 8): D, how often the core is applied at most.
        decider (`str`, *optional*, defaults to `"online"`): How a token's depth is decided: `"early"` (once, from the
            state before the core), `"online"` (after each iteration), `"fixed"` (never: the plain recurrent
            Transformer), `"stability"` (after each iteration, without training), or a name added to
            `deciders.DECIDERS`.
        decider_hidden_size (`int`, *optional*): Width inside the decider's MLP. Default: `hidden_size`.
        decider_bias (`float`, *optional*, defaults to -3.0): Logit, at the start of training, of the probability to
            exit after an iteration. Negative: training starts deep. `early` starts from the same distribution.
        gumbel_temperature (`float`, *optional*, defaults to 1.0): Temperature of the straight-through Gumbel-softmax
            with which `early` trains.
        prior_base (`float`, *optional*, defaults to 1.5): b of the prior over depths, p(d) ~ b^(-d).
        compute_weight (`float`, *optional*, defaults to 0.01): gamma, the weight of KL(q || p) in the loss.
        exit_rule (`str`, *optional*, defaults to `"quantile"`): How q becomes a depth at inference: `"quantile"`,
            `"sample"`, or `"mode"` (deciders that plan ahead only, as `early` does).
        exit_quantile (`float`, *optional*, defaults to 0.5): u of the `quantile` rule, in (0, 1]: a token exits at the
            first depth at which the CDF of q reaches u.
        min_depth (`int`, *optional*, defaults to 1): No token exits before this depth.
        fixed_depth (`int`, *optional*): Depth of every token under `decider="fixed"`. Default: `max_depth`.
        stability_criterion (`str`, *optional*, defaults to `"state"`): What `stability` watches: `"state"` (relative
            change of the state) or `"distribution"` (KL in nats between successive readouts by the LM head).
        stability_threshold (`float`, *optional*, defaults to 0.05): A token exits when its change falls below this.
        input_injection (`str`, *optional*, defaults to `"none"`): How h^(0) enters each iteration: `"none"` (as in the
            paper), `"add"`, or `"concat"` (through a linear adapter).
        execution (`str`, *optional*, defaults to `"auto"`): `"masked"` (every token is computed in every iteration),
            `"packed"` (only active tokens are computed), or `"auto"` (masked in training, else packed). Read at every
            forward.
        hidden_act (`str`, *optional*, defaults to `"silu"`): Activation of the MLPs.
        rms_norm_eps (`float`, *optional*, defaults to 1e-6): Added to the mean square in every RMSNorm.
        rope_parameters (`dict`, *optional*): Rotary settings as in transformers; `rope_theta=` is understood too.
        max_position_embeddings (`int`, *optional*, defaults to 2048): Longest sequence that the model is made for.
        attention_dropout (`float`, *optional*, defaults to 0.0): Dropout on attention weights, in training.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of the initial weights.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`): Whether the LM head is the embedding.
        use_cache (`bool`, *optional*, defaults to `True`): Whether to keep keys and values (in training only if asked).
        num_hidden_layers (`int`, *optional*): Not a choice: always P + D * C + E, the number of attention calls and so
            of cache slots. A different value is refused.

    Raises:
        A `StrictDataclassError` of huggingface_hub, as every transformers config does, naming the field, the value and
        what is allowed.
    """

    model_type = "anira"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "ce_loss",
        "compute_loss",
        "exit_depths",
        "expected_depth",
        "exit_log_probs",
    ]

    vocab_size: int = 256
    hidden_size: int = 256
    intermediate_size: int | None = None
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_prelude_layers: int = 1
    num_core_layers: int = 2
    num_coda_layers: int = 1
    max_depth: int = 8
    decider: str = "online"
    decider_hidden_size: int | None = None
    decider_bias: int | float = -3.0
    gumbel_temperature: int | float = 1.0
    prior_base: int | float = 1.5
    compute_weight: int | float = 0.01
    exit_rule: str = "quantile"
    exit_quantile: int | float = 0.5
    min_depth: int = 1
    fixed_depth: int | None = None
    stability_criterion: str = "state"
    stability_threshold: int | float = 0.05
    input_injection: str = "none"
    execution: str = "auto"
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    max_position_embeddings: int = 2048
    attention_dropout: int | float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    num_hidden_layers: int | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # `from_pretrained(..., max_depth=16)` sets fields after construction: the number of cache slots must follow.
        super().__setattr__(name, value)
        # The count is the last field to be set on construction; where it is there, the others are.
        if name in _LAYER_COUNTS and vars(self).get("num_hidden_layers") is not None:
            self.num_hidden_layers = self.num_attention_calls

    def __post_init__(self, **kwargs: Any) -> None:
        check_unknown_fields((name for name in kwargs if not hasattr(self, name)), self.__dataclass_fields__)
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size // 6) * 16
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            heads = self.num_attention_heads
            require(
                heads >= 1 and self.hidden_size % heads == 0,
                "num_attention_heads",
                heads,
                f"a divisor of `hidden_size` ({self.hidden_size}), unless `head_dim` is given",
            )
            self.head_dim = self.hidden_size // heads
        if self.num_hidden_layers is None:
            self.num_hidden_layers = self.num_attention_calls
        super().__post_init__(**kwargs)

    @property
    def num_attention_calls(self) -> int:
        """P + D * C + E: attention calls of a token that goes to `max_depth`, and slots of a cache."""
        return self.num_prelude_layers + self.max_depth * self.num_core_layers + self.num_coda_layers

    @property
    def head_sizes(self) -> tuple[int, int, int]:
        """Query heads, key-value heads, and features of a head."""
        assert self.num_key_value_heads is not None  # filled in on construction
        assert self.head_dim is not None
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    def cache_slot(self, part: str, layer: int, iteration: int = 0) -> int:
        """The cache slot of one attention call; `part` is prelude, core or coda, `iteration` counts from 0 (core)."""
        core_slots = self.max_depth * self.num_core_layers
        return {
            "prelude": layer,
            "core": self.num_prelude_layers + iteration * self.num_core_layers + layer,
            "coda": self.num_prelude_layers + core_slots + layer,
        }[part]

    def validate_architecture(self) -> None:
        """Sizes and layer counts."""
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "at least 1")
        for field in ("num_core_layers", "max_depth", "max_position_embeddings"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "at least 1")
        # Not ours, but kept as all unknown fields are, and caches read them.
        for field in ("sliding_window", "attention_chunk_size", "layer_types"):
            found = getattr(self, field, None)
            require(found is None, field, found, "left out: a token sees all before it")
        for field in ("num_prelude_layers", "num_coda_layers"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "at least 0")
        heads, kv_heads, head_dim = self.head_sizes
        require(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of `num_attention_heads` ({heads})")
        require(
            head_dim >= 2 and head_dim % 2 == 0,
            "head_dim",
            head_dim,
            "even and at least 2 (rotary positions turn pairs)",
        )
        require(
            self.num_hidden_layers == self.num_attention_calls,
            "num_hidden_layers",
            self.num_hidden_layers,
            f"left out: it is num_prelude_layers + max_depth * num_core_layers + num_coda_layers, "
            f"{self.num_attention_calls} here",
        )
        rotary = (self.rope_parameters or {}).get("partial_rotary_factor", 1)
        require(rotary == 1, "partial_rotary_factor", rotary, "1: all features of a head turn")
        require(self.hidden_act in ACT2FN, "hidden_act", self.hidden_act, f"one of {sorted(ACT2FN)}")
        require(
            self.input_injection in INPUT_INJECTIONS,
            "input_injection",
            self.input_injection,
            f"one of {list(INPUT_INJECTIONS)}",
        )
        for field in ("rms_norm_eps", "initializer_range"):
            require(0 < getattr(self, field) < math.inf, field, getattr(self, field), "above 0, and finite")
        require(0 <= self.attention_dropout < 1, "attention_dropout", self.attention_dropout, "in [0, 1)")
        require(self.execution in EXECUTIONS, "execution", self.execution, f"one of {list(EXECUTIONS)}")

    def validate_decider(self) -> None:
        """The decider and its objective."""
        require(self.decider in DECIDERS, "decider", self.decider, f"one of {list(DECIDERS)}")
        size = self.decider_hidden_size
        require(size is None or size >= 1, "decider_hidden_size", size, "at least 1")
        require(math.isfinite(self.decider_bias), "decider_bias", self.decider_bias, "finite")
        for field in ("gumbel_temperature", "prior_base"):
            require(0 < getattr(self, field) < math.inf, field, getattr(self, field), "above 0, and finite")
        weight = self.compute_weight
        require(0 <= weight < math.inf, "compute_weight", weight, "at least 0, and finite")
        fixed = self.fixed_depth
        require(
            fixed is None or self.min_depth <= fixed <= self.max_depth,
            "fixed_depth",
            fixed,
            f"from `min_depth` ({self.min_depth}) to `max_depth` ({self.max_depth})",
        )
        require(
            self.stability_criterion in STABILITY_CRITERIA,
            "stability_criterion",
            self.stability_criterion,
            f"one of {list(STABILITY_CRITERIA)}",
        )
        require(self.stability_threshold >= 0, "stability_threshold", self.stability_threshold, "at least 0")

    def validate_exit_rule(self) -> None:
        """The exit rule, against the decider."""
        check_exit_rule(self.exit_rule, self.exit_quantile, self.min_depth, self.max_depth, self)


def check_exit_rule(
    exit_rule: str, exit_quantile: float, min_depth: int, max_depth: int, config: "AniraConfig"
) -> None:
    """Raises a ValueError if these settings, from a config or from one call, cannot be an exit rule of `config`."""
    require(exit_rule in EXIT_RULES, "exit_rule", exit_rule, f"one of {list(EXIT_RULES)}")
    require(
        exit_rule != "mode" or DECIDERS[config.decider].plans_ahead,
        "exit_rule",
        exit_rule,
        f"'quantile' or 'sample' with `decider={config.decider!r}`: the mode of q is known ahead of the first "
        f"iteration only with {[name for name, kind in DECIDERS.items() if kind.plans_ahead]}",
    )
    number = isinstance(exit_quantile, int | float) and not isinstance(exit_quantile, bool)
    require(number and 0 < exit_quantile <= 1, "exit_quantile", exit_quantile, "a number above 0 and at most 1")
    for name, depth in (("min_depth", min_depth), ("max_depth", max_depth)):
        require(isinstance(depth, int) and not isinstance(depth, bool), name, depth, "an integer")
    require(1 <= max_depth <= config.max_depth, "max_depth", max_depth, f"from 1 to the model's own {config.max_depth}")
    require(1 <= min_depth <= max_depth, "min_depth", min_depth, f"from 1 to `max_depth` ({max_depth})")


__all__ = ["AniraConfig"]

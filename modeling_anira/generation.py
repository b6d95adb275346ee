"""
What `generate` does with depths: returns them, takes them, and skips rows that have finished.

The decoding loops are transformers' own. A `DepthRecord` goes with a call of `generate`, through its model arguments,
into every forward.

Shapes: B rows that are decoded (batch x beams, say), L tokens of a sequence.
"""

import copy
import difflib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin, GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from .checks import CALL_OPTIONS, check_no_rule_in_training, check_tensor, refuse, require
from .versions import CACHE

if TYPE_CHECKING:
    from .configuration_anira import AniraConfig

# The options that a generation config can hold; the others are tensors or a generator.
CONFIG_OPTIONS = ("min_depth", "max_depth", "exit_quantile", "exit_rule")

_BATCHING_READS = (
    "left out: continuous batching reads `exit_rule`, `exit_quantile` and `min_depth` from `model.config`, and no more"
)

_MODES = {
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
}


@dataclass
class AniraGenerateOutput(GenerateDecoderOnlyOutput):
    """
    transformers' output of greedy search, sampling and assisted decoding, and:

    Args:
        exit_depths (`(B, L)` int64): In the shape of `sequences`; 0 where the model did not run: at padding, the last
            token, from the end-of-sequence token on, and at tokens that were in a given cache.
    """

    exit_depths: torch.Tensor | None = None


@dataclass
class AniraGenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """transformers' output of beam search, and `exit_depths` as in [`AniraGenerateOutput`], along each beam's path."""

    exit_depths: torch.Tensor | None = None


def cache_length(cache: Cache | None) -> int:
    """Tokens in the cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def cache_room(cache: Cache | None) -> int | None:
    """Tokens that a static cache can hold; None for others."""
    return None if cache is None or not cache.layers else getattr(cache.layers[0], "max_cache_len", None)


class DepthRecord:
    """
    The depths of one call of `generate`, and which rows have finished.

    `offset` and `virtual` count tokens: those that the model sees before what `sequences` begins with (a cached prefix,
    or embeddings), and those before all that prompt and prefix tuning add, whose depths are not returned.
    """

    def __init__(self) -> None:
        self._forwards: list[tuple[int, torch.Tensor]] = []
        self._finished_length: torch.Tensor | None = None
        self.prompt_length = 0
        self.offset = 0
        self.exact = False
        self.virtual = 0

    def open(self, prompt_length: int, sequence_length: int, exact: bool) -> None:
        """
        Args:
            prompt_length: Tokens that the model sees before the first new one.
            sequence_length: Of `sequences`, by then.
            exact: Whether the first forward ends with the prompt, or before. (An assistant's candidates follow it.)
        """
        self.prompt_length, self.offset, self.exact = prompt_length, prompt_length - sequence_length, exact

    def add(self, start: int, depths: torch.Tensor) -> None:
        """Depths (B, tokens) of one forward, whose first token is at position `start`."""
        if not self._forwards and self.exact:
            self.virtual = max(start + depths.shape[1] - self.prompt_length, 0)
        self._forwards.append((start - self.virtual, depths))

    def note_finished(self, done: torch.Tensor, length: int) -> None:
        """`done` (B,): rows that need no further token, their sequences being `length` tokens long."""
        if self._finished_length is None:
            self._finished_length = torch.full_like(done, torch.iinfo(torch.int64).max, dtype=torch.int64)
        length += self.offset
        newly = done & (self._finished_length > length)
        self._finished_length = self._finished_length.masked_fill(newly, length)

    def hide_finished(self, mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
        """
        Makes padding of what transformers appends to a finished row. (Its last token is run while others go on, so that
        the cache holds the whole sequence.)

        Args:
            mask (B, length): 0 at padding; None for no padding.
        """
        if self._finished_length is None or not bool((self._finished_length <= length).any()):
            return mask
        positions = torch.arange(length, device=self._finished_length.device)
        going_on = positions < self._finished_length[:, None]
        return going_on.long() if mask is None else mask * going_on.to(mask.device)

    def depths(self, sequences: torch.Tensor, beam_indices: torch.Tensor | None) -> torch.Tensor:
        """
        Depths in the shape of `sequences` (rows, L).

        Args:
            beam_indices (rows, new tokens): The row from whose logits each token came, -1 after the end; None: its own.
        """
        depths, rows = torch.zeros_like(sequences), torch.arange(sequences.shape[0], device=sequences.device)
        for start, found in self._forwards:
            step = max(start + found.shape[1] - self.prompt_length, 0)
            source = rows
            if beam_indices is not None:
                if step >= beam_indices.shape[1]:
                    continue
                source = beam_indices[:, step].long()
            kept = source >= 0
            first = start - self.offset
            lo, hi = max(first, 0), min(first + found.shape[1], sequences.shape[1])
            if lo < hi:
                depths[kept, lo:hi] = found[source[kept], lo - first : hi - first].to(depths.device)
        depths[:, -1] = 0
        if self._finished_length is not None:
            last = (self._finished_length - self.offset - 1).to(depths.device)
            depths[torch.arange(depths.shape[1], device=depths.device) >= last[:, None]] = 0
        return depths


class _WatchedCriteria(StoppingCriteriaList):
    """Stopping criteria that tell a record which rows are done."""

    def __init__(self, criteria: StoppingCriteriaList, record: DepthRecord) -> None:
        super().__init__(criteria)
        self.record = record

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        self.record.note_finished(done, input_ids.shape[1])
        return done


def _with_depths(decode: Callable) -> Callable:
    """A decoding loop of transformers, whose output gets `exit_depths`."""
    names = list(inspect.signature(decode).parameters)[2:]

    @functools.wraps(decode)  # transformers looks at the signature
    def decode_with_depths(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs |= zip(names, args, strict=False)
        record, config = kwargs.get("depth_record"), kwargs["generation_config"]
        if record is None:  # called by a `custom_generate` that leaves it out
            return decode(self, input_ids, **kwargs)
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        seen = getattr(config, "_mask_length", input_ids.shape[1]) if mask is None else mask.shape[1]
        assisted = decode is GenerationMixin._assisted_decoding
        embedded, cached = 0 if embeds is None else embeds.shape[1], cache_length(kwargs.get(CACHE))
        given = max(input_ids.shape[1], embedded)
        record.open(max(seen, embedded), input_ids.shape[1], exact=not assisted)
        if assisted and record.offset == 0:
            wanted = "left out in assisted decoding, or `input_ids` only what is new"
            require(cached == 0, "past_key_values", f"a cache of {cached} tokens", wanted)
        if cached and cached >= given == record.prompt_length:
            whole = f"shorter than the {given} tokens given with it, if they hold the cached ones (`cache.crop(-1)`)"
            wanted = f"{whole}, or given with an `attention_mask` of cached and new tokens, if they do not"
            refuse("past_key_values", f"a cache of {cached} tokens", wanted)
        # transformers drops a mask of ones and keeps its length, so that no forward sees that it does not fit.
        require(
            record.prompt_length == cached + given or (record.prompt_length == given and cached < given),
            "attention_mask",
            f"of {record.prompt_length} tokens" if "_mask_length" in vars(config) or mask is not None else "not given",
            f"of {cached} cached and {given} new tokens, or left out with `input_ids` that hold the cached ones too",
        )
        _check_sampled_exits(self, kwargs)
        check_length(record.prompt_length, self.config)
        for name in ("exit_depths", "exit_noise"):
            if kwargs.get(name) is not None:
                expand = max(config.num_beams or 1, config.num_return_sequences or 1)
                _check_by_position(name, kwargs[name], input_ids.shape[0], expand, config.max_length, record.offset)
        criteria = kwargs["stopping_criteria"]
        # Only under an end-of-sequence criterion does `_sample` fill up rows that have finished.
        if decode is GenerationMixin._sample and any(hasattr(criterion, "eos_token_id") for criterion in criteria):
            kwargs["stopping_criteria"] = _WatchedCriteria(criteria, record)
        output = decode(self, input_ids, **kwargs)
        if isinstance(output, torch.Tensor):
            return output
        kind = AniraGenerateBeamOutput if "beam_indices" in output else AniraGenerateOutput
        return kind(**output, exit_depths=record.depths(output.sequences, output.get("beam_indices")))

    return decode_with_depths


def _check_by_position(name: str, values: torch.Tensor, rows: int, expand: int, max_length: int, offset: int) -> None:
    """`values` (rows, L) must reach as far as tokens can be run. Rows were expanded: `expand` for each prompt."""
    if offset != 0:
        refuse(name, "given, but not the whole sequence", "left out, or `input_ids` must be the whole sequence")
    fits = values.dim() == 2 and values.shape[0] == rows and values.shape[1] >= max_length - 1
    found = (values.shape[0] // expand, *values.shape[1:])
    wanted = f"of shape ({rows // expand}, at least {max_length - 1}): a row a prompt, up to the last token run"
    require(fits, name, found, wanted)


def _check_sampled_exits(model: Any, kwargs: dict[str, Any]) -> None:
    """
    Without a cache the whole sequence is run again for each token: its exits must not be drawn anew. (A model left in
    training mode draws them whatever the rule, for trainers that generate so.)
    """
    rule = kwargs.get("exit_rule") or model.config.exit_rule
    drawn = rule == "sample" and kwargs.get("exit_noise") is None and kwargs.get("exit_depths") is None
    if drawn and model.decider.learned and not model.training and not kwargs.get("use_cache"):
        refuse("exit_rule", "'sample' with `use_cache=False`", "used with a cache, or with `exit_noise`")


def check_length(length: int, config: "AniraConfig") -> None:
    """A prompt, with what a given cache holds, must fit the model."""
    if config.rope_parameters["rope_type"] == "dynamic":  # type: ignore[index]
        return  # which stretches to any length beyond `max_position_embeddings`
    longest = config.max_position_embeddings
    allowed = f"at most {longest}, this model's `max_position_embeddings`"
    require(length <= longest, "input_ids", f"{length} tokens long", allowed)


class AniraGenerationMixin(GenerationMixin):
    """`generate` of a model whose tokens have depths."""

    _sample = _with_depths(GenerationMixin._sample)
    _beam_search = _with_depths(GenerationMixin._beam_search)
    _assisted_decoding = _with_depths(GenerationMixin._assisted_decoding)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Hands what the generation config says about depths on to forward, unless the call says otherwise."""
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        _check_generation_config(config)
        for name in ("exit_depths", "exit_noise"):
            given = kwargs.get(name)
            if given is not None:
                check_tensor(name, given, "(batch, positions)")
        if kwargs.get("output_exit_log_probs"):
            refuse("output_exit_log_probs", "True in generate", "used in a forward over the sequences that came out")
        if kwargs.get("exit_depths") is None:
            for name in CONFIG_OPTIONS:
                if self.training and self.decider.learned and name in ("exit_rule", "exit_quantile"):
                    check_no_rule_in_training(name, kwargs.get(name))
                    continue
                if name == "exit_quantile" and kwargs.get("exit_rule") not in (None, "quantile"):
                    continue  # the rule that the call names does not read it
                if model_kwargs.get(name) is None and getattr(config, name, None) is not None:
                    model_kwargs[name] = getattr(config, name)
        else:
            for name in CONFIG_OPTIONS:
                if kwargs.get(name) is not None:
                    refuse(name, f"{kwargs[name]!r}, given together with `exit_depths`", "left out: depths are given")
        model_kwargs["depth_record"] = DepthRecord()
        return config, model_kwargs

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
        """The flat mask, of which forward makes its own: in one of four dimensions a row that has ended looks real."""
        return attention_mask

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Loading hands settings of the config on to the generation config as well, where nobody would read them."""
        super().adjust_generation_fn(*args, **kwargs)
        settings = self.generation_config.to_dict().keys() & self.config.to_dict().keys()
        for name in settings - GenerationConfig().to_dict().keys() - set(CONFIG_OPTIONS):
            delattr(self.generation_config, name)

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        """Never: packed execution has no shapes that stay, and masked execution would save nothing."""
        if generation_config.compile_config is not None:
            refuse("compile_config", "given", "left out: decoding skips work, which a compiled graph cannot")
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        depth_record: DepthRecord | None = None,
        exit_depths: torch.Tensor | None = None,
        exit_noise: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward: what is given by position is cut to its tokens, ended rows are hidden."""
        past_key_values = past_key_values if cache is None else cache
        past = cache_length(past_key_values)
        if depth_record is not None:
            past = max(past - depth_record.virtual, 0)
        given = kwargs.get("next_sequence_length") or input_ids.shape[1]
        if depth_record is not None:
            attention_mask = depth_record.hide_finished(attention_mask, past + given)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **{CACHE: past_key_values},
            **kwargs,
        )
        inputs["past_key_values"] = inputs.pop(CACHE, None)
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        here = slice(past, past + tokens.shape[1])
        if exit_depths is not None:
            exit_depths = exit_depths[:, here].to(tokens.device)
            if attention_mask is not None:
                exit_depths = exit_depths * attention_mask[:, here].to(exit_depths)
            inputs["exit_depths"] = exit_depths
        if exit_noise is not None:
            inputs["exit_noise"] = exit_noise[:, here].to(tokens.device)
        inputs["depth_record"] = depth_record
        return inputs

    def _get_candidate_generator(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        """An assistant decides its own depths, or has none: it is told nothing of this model's."""
        generation_config = copy.deepcopy(generation_config)
        for name in CONFIG_OPTIONS:
            if hasattr(generation_config, name):
                delattr(generation_config, name)
        own = {*CALL_OPTIONS, "depth_record"}
        kwargs["model_kwargs"] = {name: value for name, value in kwargs["model_kwargs"].items() if name not in own}
        return super()._get_candidate_generator(generation_config, *args, **kwargs)

    def init_continuous_batching(
        self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers. It calls forward without arguments for depths: they come from `model.config`."""
        for config in (generation_config, self.generation_config):
            for name in CONFIG_OPTIONS:
                if getattr(config, name, None) is not None:
                    refuse(name, "in a generation config", _BATCHING_READS)
        if self.config.execution == "packed":
            refuse("execution", "'packed' under continuous batching", "'masked' or 'auto'")
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """As in transformers: the tokens that `generate` gives. No depths go in or come out."""
        for name in kwargs:
            if name in CALL_OPTIONS:
                refuse(name, "given to continuous batching", _BATCHING_READS)
        for prompt in inputs:
            check_length(len(prompt), self.config)
        attention = self.config._attn_implementation
        try:
            return super().generate_batch(inputs, *args, **kwargs)
        finally:
            # transformers 5.5 leaves paged attention behind, under which a plain forward would look ahead. A manager
            # that stays needs it.
            if not kwargs.get("persistent_manager"):
                self.set_attn_implementation(attention)


def _check_generation_config(config: GenerationConfig) -> None:
    """Refuses modes that this model does not decode in, and fields that nobody would read."""
    mode = config.get_generation_mode()
    require(mode in _MODES, "generation mode", mode.value, f"one of {sorted(mode.value for mode in _MODES)}")
    if getattr(config, "assistant_early_exit", None) is not None:
        refuse(
            "assistant_early_exit",
            repr(config.assistant_early_exit),
            "left out: it cuts layers, which are cache slots here; use `prompt_lookup_num_tokens` or `assistant_model`",
        )
    if config.guidance_scale not in (None, 1):
        refuse("guidance_scale", config.guidance_scale, "left out: its second pass would know nothing of depths")
    unknown = config.to_dict().keys() - GenerationConfig().to_dict().keys() - set(CONFIG_OPTIONS)
    for name in (name for name in unknown if not name.startswith("_")):
        near = difflib.get_close_matches(name, CONFIG_OPTIONS, n=1)
        hint = f"`{near[0]}`" if near else f"one that transformers knows, or one of {list(CONFIG_OPTIONS)}"
        refuse(name, "not a field of a generation config", hint)

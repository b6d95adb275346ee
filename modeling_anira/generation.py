"""
What `generate` does with depths: returns them, takes them, and skips rows that have finished.

The decoding loops are transformers' own. A `DepthRecord` goes with a call of `generate`, through its model arguments,
into every forward.

Shapes: B rows that are decoded (batch x beams, say), L tokens of a sequence.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin, GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from .checks import CALL_OPTIONS, check_unknown_fields, refuse, require

# The options that a generation config can hold; the others are tensors or a generator.
CONFIG_OPTIONS = ("min_depth", "max_depth", "exit_quantile", "exit_rule")

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


class DepthRecord:
    """The depths of one call of `generate`, and which rows have finished."""

    def __init__(self) -> None:
        self._forwards: list[tuple[int, torch.Tensor]] = []
        self._finished_length: torch.Tensor | None = None
        self.prompt_length = 0
        self.offset = 0

    def open(self, prompt_length: int, sequence_length: int) -> None:
        """`prompt_length`: tokens that the model sees before the first new one; `sequence_length`: of `sequences`."""
        self.prompt_length, self.offset = prompt_length, prompt_length - sequence_length

    def add(self, start: int, depths: torch.Tensor) -> None:
        """Depths (B, tokens) of one forward, whose first token is at position `start`."""
        self._forwards.append((start, depths))

    def note_finished(self, done: torch.Tensor, length: int) -> None:
        """`done` (B,): rows that need no further token, their sequences being `length` tokens long."""
        if self._finished_length is None:
            self._finished_length = torch.full_like(done, torch.iinfo(torch.int64).max, dtype=torch.int64)
        newly = done & (self._finished_length > length)
        self._finished_length = self._finished_length.masked_fill(newly, length + self.offset)

    def hide_finished(self, mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
        """
        Makes padding of what a finished row still gets: its last token, and all that transformers appends.

        Args:
            mask (B, length): 0 at padding; None for no padding.
        """
        if self._finished_length is None or not bool((self._finished_length <= length).any()):
            return mask
        positions = torch.arange(length, device=self._finished_length.device)
        going_on = positions < self._finished_length[:, None] - 1
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


def _with_depths(decode: Callable, watch: bool) -> Callable:
    """A decoding loop of transformers, whose output gets `exit_depths`; `watch`: its rows can finish one by one."""

    @functools.wraps(decode)  # transformers looks at the signature
    def decode_with_depths(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        record, config = kwargs["depth_record"], kwargs["generation_config"]
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        seen = getattr(config, "_mask_length", input_ids.shape[1]) if mask is None else mask.shape[1]
        record.open(max(seen, 0 if embeds is None else embeds.shape[1]), input_ids.shape[1])
        for name in ("exit_depths", "exit_noise"):
            if kwargs.get(name) is not None:
                _check_by_position(name, kwargs[name], input_ids.shape[0], config.max_length, record.offset)
        if watch:
            kwargs["stopping_criteria"] = _WatchedCriteria(kwargs["stopping_criteria"], record)
        output = decode(self, input_ids, **kwargs)
        if isinstance(output, torch.Tensor):
            return output
        kind = AniraGenerateBeamOutput if "beam_indices" in output else AniraGenerateOutput
        return kind(**output, exit_depths=record.depths(output.sequences, output.get("beam_indices")))

    return decode_with_depths


def _check_by_position(name: str, values: torch.Tensor, rows: int, max_length: int, offset: int) -> None:
    """`values` (rows, L) must reach as far as tokens can be run."""
    if offset != 0:
        refuse(name, "given, but not the whole sequence", "left out, or `input_ids` must be the whole sequence")
    fits = values.dim() == 2 and values.shape[0] == rows and values.shape[1] >= max_length - 1
    require(fits, name, tuple(values.shape), f"of shape ({rows}, at least {max_length - 1}): up to the last token run")


class AniraGenerationMixin(GenerationMixin):
    """`generate` of a model whose tokens have depths."""

    _sample = _with_depths(GenerationMixin._sample, watch=True)
    _beam_search = _with_depths(GenerationMixin._beam_search, watch=False)
    _assisted_decoding = _with_depths(GenerationMixin._assisted_decoding, watch=False)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Hands what the generation config says about depths on to forward, unless the call says otherwise."""
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        mode = config.get_generation_mode()
        require(mode in _MODES, "generation mode", mode.value, f"one of {sorted(mode.value for mode in _MODES)}")
        own = set(config.to_dict()) - set(GenerationConfig().to_dict())
        check_unknown_fields(own - set(CALL_OPTIONS), CALL_OPTIONS)
        if model_kwargs.get("exit_depths") is None:
            for name in CONFIG_OPTIONS:
                if model_kwargs.get(name) is None and getattr(config, name, None) is not None:
                    model_kwargs[name] = getattr(config, name)
        model_kwargs["depth_record"] = DepthRecord()
        return config, model_kwargs

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, *args: Any, **kwargs: Any
    ) -> None:
        longest = self.config.max_position_embeddings
        require(
            input_ids_length <= longest,
            "input_ids",
            f"{input_ids_length} tokens long",
            f"at most {longest}, the `max_position_embeddings` of this model",
        )
        super()._validate_generated_length(generation_config, input_ids_length, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        depth_record: DepthRecord | None = None,
        exit_depths: torch.Tensor | None = None,
        exit_noise: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward: what is given by position is cut to its tokens, ended rows are hidden."""
        past = cache_length(past_key_values)
        given = kwargs.get("next_sequence_length") or input_ids.shape[1]
        if depth_record is not None:
            attention_mask = depth_record.hide_finished(attention_mask, past + given)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        here = slice(past, past + tokens.shape[1])
        if exit_depths is not None:
            exit_depths = exit_depths[:, here]
            if attention_mask is not None:
                exit_depths = exit_depths * attention_mask[:, here].to(exit_depths.dtype)
            inputs["exit_depths"] = exit_depths
        if exit_noise is not None:
            inputs["exit_noise"] = exit_noise[:, here]
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
        """Continuous batching has no arguments of its own for depths: they come from `config`."""
        for config in (generation_config, self.generation_config):
            for name in CONFIG_OPTIONS:
                if getattr(config, name, None) is not None:
                    refuse(name, "in a generation config", f"set as `model.config.{name}` for continuous batching")
        return super().init_continuous_batching(generation_config, *args, **kwargs)

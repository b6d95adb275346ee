"""
Speed of a forward and of a training step.

* Packed prefill, with depths of mean D/3, against all tokens at D, and the share of the speed-up that FLOPs allow.
* `fixed` at D against transformers' Llama with as many layers as ANIRA has layer calls.

    python benchmarks/prefill.py [--device cuda --dtype bfloat16]
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import Timing, print_report, time_side_by_side
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from modeling_anira import AniraConfig, AniraForCausalLM

VOCAB = 256


def main() -> None:
    args = parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    shape = (args.batch_size, args.length)
    torch.manual_seed(0)
    input_ids = torch.randint(VOCAB, shape, device=device)

    anira = make_model(AniraForCausalLM, make_config(args), device, dtype)
    patterns = draw_depths(shape, args.max_depth, device)
    print_report("packed prefill", measure_prefill(anira, input_ids, patterns, args.repeats), device)

    llama = make_model(LlamaForCausalLM, matching_llama(anira.config), device, dtype)
    print_report("fixed against Llama, forward", measure_forward(anira, llama, input_ids, args.repeats), device)
    print_report("fixed against Llama, training step", measure_step(anira, llama, input_ids, args.repeats), device)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_arguments(parser, length=256)
    return parser.parse_args()


def add_size_arguments(parser: argparse.ArgumentParser, length: int) -> None:
    """What prefill and decode let the caller choose."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--length", type=int, default=length, help="tokens that the model is made for")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-depth", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=7)


def make_config(args: argparse.Namespace) -> AniraConfig:
    """Prelude 1, core 1 layer, coda 1."""
    return AniraConfig(
        vocab_size=VOCAB,
        hidden_size=args.hidden_size,
        num_attention_heads=4,
        num_core_layers=1,
        max_depth=args.max_depth,
        decider="fixed",
        max_position_embeddings=args.length,
    )


def make_model(model_class: type, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A model with random weights, in eval mode."""
    return model_class(config).to(device=device, dtype=dtype).eval()


def matching_llama(config: AniraConfig) -> LlamaConfig:
    """A Llama of the same widths, with a layer for every layer call of ANIRA."""
    assert config.intermediate_size is not None
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        num_hidden_layers=config.num_attention_calls,
        max_position_embeddings=config.max_position_embeddings,
    )


def draw_depths(shape: tuple[int, int], max_depth: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Depths (B, T) of mean about max_depth / 3, each token on its own: around the mean, and with a long tail."""
    generator = torch.Generator().manual_seed(0)
    tries = torch.full(shape, float(max_depth - 1))
    chance = torch.full(shape, (max_depth / 3 - 1) / (max_depth - 1))
    around = 1 + torch.binomial(tries, chance, generator=generator).long()
    # A geometric of this mean, cut off at max_depth, has a mean a little below.
    tail = torch.empty(shape).geometric_(3 / max_depth, generator=generator).long().clamp(max=max_depth)
    return {"packed, depths around D/3": around.to(device), "packed, depths with a long tail": tail.to(device)}


@torch.no_grad()
def measure_prefill(
    model: AniraForCausalLM, input_ids: torch.Tensor, patterns: dict[str, torch.Tensor], repeats: int
) -> list[dict[str, Any]]:
    """Packed execution at each pattern of depths, and at D."""
    full = torch.full_like(input_ids, model.config.max_depth)
    model.config.execution = "packed"
    runs = {
        name: partial(model, input_ids, exit_depths=depths, use_cache=False)
        for name, depths in {"all at D": full, **patterns}.items()
    }
    timings = time_side_by_side(runs, "all at D", repeats, input_ids.device)
    model.config.execution = "auto"
    rows = []
    for name, timing in timings.items():
        depths = patterns.get(name, full)
        cost = model.flops(depths)
        possible = model.flops(full).needed / cost.needed
        rows.append(
            {
                "run": name,
                "mean depth": float(depths.float().mean()),
                "seconds": timing.seconds,
                "speed-up": timing.speedup,
                "possible by FLOPs": possible,
                "share": timing.speedup / possible,
                "waste": cost.waste / cost.total,
            }
        )
    return rows


@torch.no_grad()
def measure_forward(anira: nn.Module, llama: nn.Module, input_ids: torch.Tensor, repeats: int) -> list[dict[str, Any]]:
    """Tokens per second of both, forward without cache."""
    runs = {name: partial(model.eval(), input_ids, use_cache=False) for name, model in _pair(anira, llama)}
    return _against_llama(time_side_by_side(runs, "Llama", repeats, input_ids.device), input_ids.numel())


def measure_step(anira: nn.Module, llama: nn.Module, input_ids: torch.Tensor, repeats: int) -> list[dict[str, Any]]:
    """Tokens per second of both, forward and backward with labels and an AdamW step."""
    runs = {
        name: make_step(model.train(), {"input_ids": input_ids, "labels": input_ids})
        for name, model in _pair(anira, llama)
    }
    return _against_llama(time_side_by_side(runs, "Llama", repeats, input_ids.device), input_ids.numel())


def make_step(
    model: Any, inputs: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, compiled: bool = False
) -> Callable[[], None]:
    """A training step, under autocast to `dtype`, as a function without arguments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    run = torch.compile(model) if compiled else model
    device = inputs["input_ids"].device.type

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = run(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _pair(anira: nn.Module, llama: nn.Module) -> list[tuple[str, nn.Module]]:
    return [("ANIRA fixed", anira), ("Llama", llama)]


def _against_llama(timings: dict[str, Timing], tokens: int) -> list[dict[str, Any]]:
    return [
        {
            "model": name,
            "seconds": timing.seconds,
            "tokens/s": round(tokens / timing.seconds),
            "against Llama": timing.speedup,
        }
        for name, timing in timings.items()
    ]


if __name__ == "__main__":
    main()

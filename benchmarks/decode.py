"""
Speed and memory of cached decoding.

* Depths of mean D/3 against all tokens at D, under transformers' caches: the share of the speed-up that FLOPs allow,
  and where the time goes.
* Memory of the cache against the formula of the README.

    python benchmarks/decode.py [--device cuda --dtype bfloat16]
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from prefill import VOCAB, add_size_arguments, draw_depths, make_config, make_model
from timing import print_report, time_side_by_side
from torch.profiler import ProfilerActivity, profile

from modeling_anira import AniraForCausalLM

PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash", "aten::_efficient"),
    "copying keys and values": ("aten::cat", "aten::index_copy", "aten::index_select", "aten::copy_"),
}


def main() -> None:
    args = parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    model = make_model(AniraForCausalLM, make_config(args), device, dtype)
    prompt = torch.randint(VOCAB, (args.batch_size, args.prompt), device=device)
    shape = (args.batch_size, args.prompt + args.new)
    patterns = draw_depths(shape, args.max_depth, device)
    depths = {"all at D": torch.full(shape, args.max_depth, device=device), **patterns}
    for cache in args.caches:
        rows = measure(model, prompt, depths, args.new, cache, args.repeats)
        print_report(f"decoding, {cache} cache", rows, device)
    print_report("cache memory", measure_memory(model, prompt, depths["all at D"], args.new), device)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_arguments(parser, length=128)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--caches", nargs="+", default=["dynamic", "static"], choices=["dynamic", "static"])
    return parser.parse_args()


def measure(
    model: AniraForCausalLM,
    prompt: torch.Tensor,
    patterns: dict[str, torch.Tensor],
    new: int,
    cache: str,
    repeats: int,
) -> list[dict[str, Any]]:
    """Time, speed-up and its share of the possible one, and the parts of the time, for each pattern of depths."""
    runs = {name: partial(generate, model, prompt, depths, new, cache) for name, depths in patterns.items()}
    timings = time_side_by_side(runs, "all at D", repeats, prompt.device)
    cost = {name: generation_flops(model, depths, prompt.shape[1], new) for name, depths in patterns.items()}
    rows = []
    for name, timing in timings.items():
        possible = cost["all at D"] / cost[name]
        row: dict[str, Any] = {
            "run": name,
            "seconds": timing.seconds,
            "new tokens/s": round(prompt.shape[0] * new / timing.seconds),
            "speed-up": timing.speedup,
            "possible by FLOPs": possible,
            "share": timing.speedup / possible,
        }
        rows.append(row | time_by_part(runs[name]))
    return rows


def generate(model: AniraForCausalLM, prompt: torch.Tensor, depths: torch.Tensor, new: int, cache: str) -> Any:
    """Greedy decoding with given depths."""
    return model.generate(  # type: ignore[misc]
        prompt,
        exit_depths=depths,
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=False,
        cache_implementation=cache if cache != "dynamic" else None,
        return_dict_in_generate=True,
    )


def generation_flops(model: AniraForCausalLM, depths: torch.Tensor, prompt: int, new: int) -> int:
    """What prefill and all steps must cost."""
    total = model.flops(depths[:, :prompt]).needed
    for past in range(prompt, prompt + new - 1):
        total += model.flops(depths[:, past : past + 1], past_length=past).needed
    return total


def time_by_part(run: Callable[[], Any]) -> dict[str, float]:
    """The share of the profiled time that each kind of operation takes; the rest is overhead and small operations."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    shares = {
        part: sum(event.self_cpu_time_total for event in events if event.key.startswith(names)) / total
        for part, names in PARTS.items()
    }
    return shares | {"rest": 1 - sum(shares.values())}


def measure_memory(
    model: AniraForCausalLM, prompt: torch.Tensor, depths: torch.Tensor, new: int
) -> list[dict[str, Any]]:
    """Bytes in the cache after decoding, and by slots x 2 x batch x length x heads x features x bytes a number."""
    cache = generate(model, prompt, depths, new, "dynamic").past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    config, length = model.config, cache.get_seq_length()
    _, heads, features = config.head_sizes
    slots = config.num_attention_calls
    formula = slots * 2 * prompt.shape[0] * length * heads * features * model.dtype.itemsize
    return [{"slots": slots, "tokens": length, "MiB": held / 2**20, "MiB by formula": formula / 2**20}]


if __name__ == "__main__":
    main()

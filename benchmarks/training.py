"""
A training step on a batch of a recipe, beside Llama with a layer for every layer call; and what making batches costs.

    python benchmarks/training.py --config train/recipes/mano-mini-online.yaml --compile [--device cuda]

"kept" is what a forward keeps for its backward: the memory that grows with depth and batch.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "train"))

from batches import StepBatches, StreamSource
from prefill import make_step, matching_llama
from recipe import read_recipe
from timing import print_report, time_side_by_side
from transformers import LlamaForCausalLM

from datasets_scripts import make_tokenizer
from modeling_anira import AniraForCausalLM

DECIDERS = ("fixed", "online", "early")


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="train/recipes/brevo-mini-online.yaml")
    parser.add_argument("--set", nargs="*", default=[], help="settings that replace those of the recipe")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of autocast")
    parser.add_argument("--compile", action="store_true", help="measure compiled models beside the others")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    # One length, so that every round does the same work, and a compiled model is compiled once.
    recipe = read_recipe(args.config, ["pad_to_multiple=64", *args.set])
    batches = StepBatches(recipe, StreamSource(recipe), make_tokenizer(), (recipe.make_config().max_depth,))
    rows = batches[0][0]
    inputs = {name: rows[name].to(device) for name in ("input_ids", "attention_mask", "labels")}

    models: dict[str, Any] = {}
    for decider in DECIDERS:
        config = recipe.make_config()
        config.decider = decider
        models[f"ANIRA {decider}"] = AniraForCausalLM(config)
    models["Llama"] = LlamaForCausalLM(matching_llama(recipe.make_config()))
    steps = {name: make_step(model.to(device).train(), inputs, dtype, False) for name, model in models.items()}
    if args.compile:
        steps |= {f"{name}, compiled": make_step(model, inputs, dtype, True) for name, model in models.items()}
    timings = time_side_by_side(steps, "Llama", args.repeats, device)
    tokens = int(inputs["attention_mask"].sum())
    print_report(
        f"training step, {inputs['input_ids'].shape[0]} x {inputs['input_ids'].shape[1]} tokens, {args.dtype}",
        [
            {
                "model": name,
                "seconds": timing.seconds,
                "tokens/s": round(tokens / timing.seconds),
                "against Llama": timing.speedup,
                "kept, MiB": "" if "compiled" in name else kept_bytes(models[name], inputs, dtype) / 2**20,
            }
            for name, timing in timings.items()
        ],
        device,
    )
    seconds = batch_seconds(batches)
    shares = [{"model": name, "share of a step": seconds / timing.seconds} for name, timing in timings.items()]
    print_report(f"making a batch, noise for `early` included: {1000 * seconds:.2f} ms", shares, device)


def kept_bytes(model: Any, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> int:
    """Bytes of the tensors that a forward keeps for its backward, the weights left out."""
    storages: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    autocast = torch.autocast(inputs["input_ids"].device.type, dtype, enabled=dtype != torch.float32)
    with autocast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**inputs, use_cache=False).loss
    del loss
    return sum(storages.values())


def batch_seconds(batches: StepBatches, steps: int = 64) -> float:
    """Seconds that a batch takes to be drawn, labelled and padded, on average, after compiling."""
    begun = time.perf_counter()
    for step in range(steps, 2 * steps):
        batches[step]
    return (time.perf_counter() - begun) / steps


if __name__ == "__main__":
    main()

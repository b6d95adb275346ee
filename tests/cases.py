"""Random models, batches and exit patterns for the tests, and what it means that two runs agree."""

import itertools
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from datasets_scripts.vocabulary import BOS, EOS, PAD, WORDS
from modeling_anira import AniraConfig, AniraForCausalLM
from modeling_anira.deciders import DECIDERS, Decider, ExitHead

VOCAB = 23
TOLERANCE = 1e-4
NEAR = 1e-5  # a hard threshold may flip on rounding when a CDF lies this close to u


def small_config(**overrides) -> AniraConfig:
    """A config that runs in milliseconds, with weights large enough that iterations matter."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "max_depth": 4,
        "pad_token_id": 0,
    }
    return AniraConfig(**{**settings, **overrides})


def exit_head(decider: Decider) -> ExitHead:
    """What a learned decider puts its logits out by."""
    return next(module for module in decider.modules() if isinstance(module, ExitHead))


def small_model(seed: int = 0, decisive: bool = True, **overrides) -> AniraForCausalLM:
    """A small model in eval mode; `decisive`: its decider tells states apart, so that several depths occur."""
    device = torch.get_default_device()
    torch.manual_seed(seed)
    # Drawn on the CPU: the same weights on every device.
    with torch.device("cpu"), torch.no_grad():
        model = AniraForCausalLM(small_config(**overrides)).eval()
        if decisive and model.model.decider.learned:
            head = exit_head(model.decider)
            head.weight.normal_(std=3.0)
            head.bias.fill_(0.0 if model.decider.plans_ahead else -0.5)
    return model.to(device)


def task_model(decider: str = "online", **changes) -> AniraForCausalLM:
    """A small model of the tasks' vocabulary, whose decider, if it learns, tells tokens apart."""
    torch.manual_seed(0)
    vocabulary = {"vocab_size": len(WORDS), "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "max_depth": 4}
    config = AniraConfig(**{**vocabulary, **sizes, "decider": decider, "decider_bias": 0.0, **changes})
    model = AniraForCausalLM(config).eval()
    if model.decider.learned:
        torch.nn.init.normal_(exit_head(model.decider).weight, std=2.0)
    return model


def seeded(seed: int) -> torch.Generator:
    """A generator on the device that the tests run on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


@dataclass
class Batch:
    """Ids, mask, noise (B, T), and depths that a caller could give; `options` are forward arguments."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    noise: torch.Tensor
    depths: torch.Tensor
    options: dict = field(default_factory=dict)

    @property
    def real(self) -> torch.Tensor:
        return self.attention_mask.bool()


def make_batch(seed: int, padding: list[tuple[int, int]], length: int, max_depth: int, noise_depth: int = 0) -> Batch:
    """A batch with (left, right) padding in each row."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(padding)
    mask = torch.ones(batch, length, dtype=torch.int64, device="cpu")
    for row, (left, right) in enumerate(padding):
        mask[row, :left] = 0
        mask[row, length - right :] = 0
    shape = (batch, length, noise_depth) if noise_depth else (batch, length)
    tensors = {
        "input_ids": torch.randint(1, VOCAB, (batch, length), generator=generator, device="cpu") * mask,
        "attention_mask": mask,
        "noise": torch.rand(shape, generator=generator, device="cpu"),
        "depths": torch.randint(1, max_depth + 1, (batch, length), generator=generator, device="cpu") * mask,
    }
    # Drawn on the CPU: the same on every device.
    device = torch.get_default_device()
    return Batch(**{name: tensor.to(device) for name, tensor in tensors.items()})


@st.composite
def cases(draw) -> tuple[AniraForCausalLM, Batch]:
    """A model of any kind and a batch for it, with an exit rule, given depths, or sampling with given noise."""
    # Hypothesis likes first and smallest values; the orders and repeats below make several depths occur all the same.
    decider = draw(st.sampled_from(["online", *DECIDERS, "online", "early"]))
    max_depth = draw(st.sampled_from([4, 3, 5, 6, 7, 8, 2, 1]))
    criterion = draw(st.sampled_from(["state", "distribution"]))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1)]))
    model = small_model(
        seed=draw(st.integers(0, 10_000)),
        decider=decider,
        max_depth=max_depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_prelude_layers=draw(st.integers(0, 2)),
        num_core_layers=draw(st.integers(1, 3)),
        num_coda_layers=draw(st.integers(0, 2)),
        input_injection=draw(st.sampled_from(["none", "add", "concat"])),
        fixed_depth=draw(st.one_of(st.none(), st.integers(1, max_depth))),
        stability_criterion=criterion,
        stability_threshold=draw(st.floats(0.05, 0.6)) * (1.0 if criterion == "state" else 0.5),
        tie_word_embeddings=draw(st.booleans()),
    )
    model.set_attn_implementation(draw(st.sampled_from(["sdpa", "eager"])))
    length = draw(st.sampled_from([6, 7, 8, 5, 4, 2, 1]))
    left = st.integers(0, length)
    padding = draw(
        st.lists(left.flatmap(lambda n: st.tuples(st.just(n), st.integers(0, length - n))), min_size=2, max_size=3)
    )
    padding[0] = (0, 0)
    if draw(st.booleans()):
        padding = padding[: draw(st.integers(1, 3))]
    if draw(st.booleans()):
        padding = [(0, 0)] * len(padding)
    batch = make_batch(draw(st.integers(0, 10_000)), padding, length, max_depth)
    kind = draw(st.sampled_from(["quantile", "sample", "given", "mode"]))
    if kind == "given":
        batch.options = {"exit_depths": batch.depths}
    elif kind == "mode" and model.model.decider.plans_ahead:
        batch.options = {"exit_rule": "mode"}
    elif kind == "sample":
        batch.options = {"exit_rule": "sample", "exit_noise": batch.noise}
    else:
        batch.options = {"exit_rule": "quantile", "exit_quantile": draw(st.floats(0.3, 1.0))}
    if kind != "given" and draw(st.sampled_from([False, False, True])):
        lowest = draw(st.integers(1, max_depth))
        batch.options |= {"min_depth": lowest, "max_depth": draw(st.integers(lowest, max_depth))}
    return model, batch


def cut(options: dict, tokens: slice, row: int | None = None) -> dict:
    """Forward arguments for some of the tokens, and for one row if it is named."""
    rows = slice(None) if row is None else slice(row, row + 1)
    return {name: value[rows, tokens] if torch.is_tensor(value) else value for name, value in options.items()}


def run(model, batch: Batch, execution: str = "auto", **kwargs):
    """A forward over the whole batch, with log q."""
    model.config.execution = execution
    try:
        return model(
            batch.input_ids,
            output_exit_log_probs=True,
            **{"attention_mask": batch.attention_mask, "use_cache": False, **batch.options, **kwargs},
        )
    finally:
        model.config.execution = "auto"


def rows_near_threshold(model, batch: Batch, output) -> torch.Tensor:
    """Rows (B,) in which a depth hangs on rounding: they are left out of comparisons, and counted."""
    if "exit_depths" in batch.options or batch.options.get("exit_rule") == "mode":
        return torch.zeros(batch.real.shape[0], dtype=torch.bool)
    if model.config.decider == "stability":
        return _nearly_stable(model, batch, output)
    level = batch.options.get("exit_noise", torch.full(batch.real.shape, batch.options.get("exit_quantile", 0.5)))
    cdf = output.exit_log_probs.exp().cumsum(-1)[..., :-1]
    near = ((cdf - level[..., None]).abs() < NEAR) & batch.real[..., None]
    # A CDF of exactly 0 or 1 (fixed) does not hang on rounding.
    return (near & (cdf > 0) & (cdf < 1)).any(-1).any(-1)


def _nearly_stable(model, batch: Batch, output) -> torch.Tensor:
    states = run(model, batch, "masked", output_hidden_states=True).hidden_states
    first = model.config.num_prelude_layers
    states = states[first : first + model.config.max_depth + 1]
    readout = lambda state: model.lm_head(model.model.norm(state))  # noqa: E731
    decider, near = model.model.decider, torch.zeros(batch.real.shape, dtype=torch.bool)
    # The last state recorded may be the final norm's (no coda): that iteration decides nothing.
    for previous, state in list(itertools.pairwise(states))[:-1]:
        change = decider.change(state, previous, readout)
        near |= (change / model.config.stability_threshold - 1).abs() < 1e-3
    return (near & batch.real).any(-1)


def assert_agree(one, other, real: torch.Tensor, what: str) -> None:
    """Same depths and, within the tolerance, the same logits at real tokens (B, T)."""
    assert torch.equal(one.exit_depths[real], other.exit_depths[real]), f"{what}: depths differ"
    assert torch.isfinite(one.logits).all(), f"{what}: not finite"
    assert torch.isfinite(other.logits).all(), f"{what}: not finite"
    gap = (one.logits - other.logits)[real].abs().max() if real.any() else 0.0
    assert gap <= TOLERANCE, f"{what}: logits differ by {gap}"

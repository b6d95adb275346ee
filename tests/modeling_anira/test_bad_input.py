"""Bad input is refused at once, with the field or argument, its value and what is allowed."""

import pytest
import torch
from cases import make_batch, run, small_config, small_model
from transformers import AutoConfig, DynamicCache, StaticCache

from modeling_anira import AniraConfig, AniraForCausalLM
from modeling_anira.deciders import DECIDERS, Decider

BAD_CONFIGS = [
    ({"max_depth": 0}, ["max_depth", "0", "at least 1"]),
    ({"vocab_size": 0}, ["vocab_size", "0", "at least 1"]),
    ({"num_core_layers": 0}, ["num_core_layers", "0", "at least 1"]),
    ({"num_prelude_layers": -1}, ["num_prelude_layers", "-1", "at least 0"]),
    ({"hidden_size": 64, "num_attention_heads": 6}, ["num_attention_heads", "6", "divisor", "64"]),
    ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, ["num_key_value_heads", "3", "divisor", "4"]),
    ({"head_dim": 7}, ["head_dim", "7", "even"]),
    ({"decider": "late"}, ["decider", "late", "early", "online", "fixed", "stability"]),
    ({"exit_rule": "always"}, ["exit_rule", "always", "quantile", "sample", "mode"]),
    ({"exit_rule": "mode", "decider": "online"}, ["exit_rule", "mode", "online", "early"]),
    ({"exit_quantile": 0}, ["exit_quantile", "0", "above 0"]),
    ({"exit_quantile": 1.5}, ["exit_quantile", "1.5", "at most 1"]),
    ({"min_depth": 5, "max_depth": 4}, ["min_depth", "5", "max_depth", "4"]),
    ({"min_depth": 0}, ["min_depth", "0"]),
    ({"decider": "fixed", "fixed_depth": 9}, ["fixed_depth", "9", "8"]),
    ({"decider": "fixed", "fixed_depth": 2, "min_depth": 4}, ["fixed_depth", "2", "min_depth", "4"]),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5", "1"]),
    ({"decider_bias": float("-inf")}, ["decider_bias", "-inf", "finite"]),
    ({"gumbel_temperature": 0}, ["gumbel_temperature", "0", "above 0"]),
    ({"prior_base": -1.0}, ["prior_base", "-1.0", "above 0"]),
    ({"prior_base": float("inf")}, ["prior_base", "inf", "finite"]),
    ({"compute_weight": float("inf")}, ["compute_weight", "inf", "finite"]),
    ({"initializer_range": float("inf")}, ["initializer_range", "inf", "finite"]),
    ({"compute_weight": -0.1}, ["compute_weight", "-0.1", "at least 0"]),
    ({"stability_criterion": "loss"}, ["stability_criterion", "loss", "state", "distribution"]),
    ({"input_injection": "mul"}, ["input_injection", "mul", "none", "add", "concat"]),
    ({"execution": "fast"}, ["execution", "fast", "auto", "packed", "masked"]),
    ({"hidden_act": "sillu"}, ["hidden_act", "sillu", "silu"]),
    ({"attention_dropout": 1.0}, ["attention_dropout", "1.0", "[0, 1)"]),
    ({"num_hidden_layers": 12}, ["num_hidden_layers", "12", "18"]),
    # The cache would follow these, and drop keys that a forward without cache reads.
    ({"sliding_window": 4}, ["sliding_window", "4", "left out"]),
    ({"attention_chunk_size": 4}, ["attention_chunk_size", "4", "left out"]),
    ({"max_depht": 4}, ["max_depht", "max_depth"]),
    ({"max_depth": "4"}, ["max_depth", "int", "str"]),
]


@pytest.mark.parametrize(("settings", "words"), BAD_CONFIGS, ids=[str(settings) for settings, _ in BAD_CONFIGS])
def test_config_refuses(settings, words):
    with pytest.raises(Exception) as error:  # noqa: PT011 - transformers' strict configs raise their own kind
        AniraConfig(**settings)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("decider", "early"),
        ("decider", "fixed"),
        ("input_injection", "add"),
        ("num_core_layers", 1),
        ("hidden_act", "gelu"),
        ("rms_norm_eps", 0.1),
        ("attention_dropout", 0.5),
    ],
)
def test_parts_named_anew_after_building_are_refused_not_saved(field, value, tmp_path):
    """They were not followed, but saved: the folder loaded another model, with other logits and without a word."""
    model = small_model(decider="online", num_core_layers=2)
    ids = torch.ones(2, 5, dtype=torch.int64)
    before = model.config.to_dict()
    setattr(model.config, field, value)
    for use in (lambda: model(ids), lambda: model.save_pretrained(tmp_path / "saved")):
        with pytest.raises(ValueError, match=rf"`{field}` is {value!r}, but must be .*, as when the model was built"):
            use()
    assert not (tmp_path / "saved").exists()
    setattr(model.config, field, before[field])
    model(ids)
    model.config.rope_parameters["rope_theta"] = 100.0  # within the map that it was built from
    with pytest.raises(ValueError, match=r"`rope_parameters` is .*, as when the model was built"):
        model(ids)


def test_fields_that_every_forward_reads_are_checked_there():
    """`execution = "pack"` ran masked, and a temperature of 0 gave a loss that is no number."""
    model = small_model(decider="early")
    ids = torch.ones(2, 5, dtype=torch.int64)
    model.config.execution = "pack"
    with pytest.raises(ValueError, match="`execution` is 'pack', but must be one of"):
        model(ids)
    model.config.execution = "auto"
    model.train().config.gumbel_temperature = 0
    with pytest.raises(ValueError, match="`gumbel_temperature` is 0, but must be above 0"):
        model(ids)


@pytest.mark.parametrize("shape", [(1, 5), (2, 2), (2, 5)])
@pytest.mark.parametrize("training", [False, True])
def test_an_own_decider_that_answers_in_another_shape_is_refused_by_name(monkeypatch, shape, training):
    """The usual slip is a head without `.squeeze(-1)`; with as many rows as tokens depths came back all the same."""

    class Late(Decider):
        learned = True

        def __init__(self, config):
            super().__init__(config)
            self.head = torch.nn.Linear(config.hidden_size, 1)

        def exit_logit(self, state, previous, readout):
            return self.head(state)

    class Soon(Late):
        plans_ahead = True

        def plan(self, shallow):
            return self.head(shallow).expand(*shallow.shape[:-1], self.config.max_depth).unsqueeze(0)

    ids = torch.ones(shape, dtype=torch.int64)
    for name, kind, method in (("late", Late, "exit_logit"), ("soon", Soon, "plan")):
        monkeypatch.setitem(DECIDERS, name, kind)
        model = small_model(decider=name, decisive=False).train(training)
        with pytest.raises(ValueError, match=rf"`{method}` is \(.*\), but must be of shape \(.*\): one logit a token"):
            model(ids)


def test_lists_and_numbers_are_no_tensors():
    """`exit_depths=2` is the first thing that one tries, and ended in an AttributeError."""
    model = small_model()
    ids = torch.ones(2, 5, dtype=torch.int64)
    given = {"exit_depths": 2, "attention_mask": [[1] * 5] * 2}
    for name, value in given.items():
        with pytest.raises(ValueError, match=f"`{name}` is a {type(value).__name__}, but must be a tensor of shape"):
            model(ids, **{name: value})
    for name in ("position_ids", "labels", "shift_labels"):
        with pytest.raises(ValueError, match=f"`{name}` is a list, but must be a tensor of shape"):
            model(ids, **{name: ids.tolist()})
    with pytest.raises(ValueError, match=r"`labels` is \(2, 4\), but must be of shape \(2, 5\)"):
        model(ids, labels=ids[:, :4])
    with pytest.raises(ValueError, match=r"`labels` is torch.int32, but must be torch.int64"):
        model(ids, labels=ids.int())
    model.train()
    with pytest.raises(ValueError, match="`exit_noise` is a float, but must be a tensor"):
        model(ids, exit_noise=0.3)
    with pytest.raises(ValueError, match="`generator` is given, but must be left out: `exit_noise` is given"):
        model(ids, exit_noise=torch.rand(2, 5), generator=torch.Generator())
    model.eval()
    with pytest.raises(ValueError, match="`input_ids` is a list, but must be a tensor"):
        model(ids.tolist())
    with pytest.raises(ValueError, match="`exit_depths` is a int, but must be a tensor"):
        model.flops(2)


def test_config_fields_set_later_are_checked_when_a_model_is_built():
    config = small_config()
    config.min_depth = 9
    with pytest.raises(Exception, match="min_depth"):
        AniraForCausalLM(config)


def test_layer_count_follows_fields_set_later(tmp_path):
    """`from_pretrained(max_depth=...)` sets fields after construction: the cache once stayed as large as before."""
    small_config(max_depth=4).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, max_depth=6)
    assert config.num_hidden_layers == config.num_attention_calls == 1 + 6 * 2 + 1
    assert len(DynamicCache(config=config).layers) == 14


MODEL = small_model(max_depth=4)


@pytest.fixture(autouse=True)
def tests_device():
    """On the CPU wherever the others run: what is refused is refused before it is computed."""


IDS = torch.ones(2, 3, dtype=torch.int64)
DEPTHS = torch.full((2, 3), 2)
BAD_CALLS = [
    ({"input_ids": IDS + 22}, ["input_ids", "23", "row 0, token 0", "0 to 22"]),
    ({"input_ids": -IDS}, ["input_ids", "-1"]),
    ({"input_ids": IDS[0]}, ["input_ids", "(3,)", "batch, tokens"]),
    ({"input_ids": None}, ["input_ids", "inputs_embeds"]),
    ({"inputs_embeds": torch.zeros(2, 3, 16)}, ["input_ids", "inputs_embeds", "together"]),
    ({"attention_mask": IDS[:, :2]}, ["attention_mask", "(2, 2)", "(2, 3)"]),
    ({"attention_mask": torch.ones(2, 9)}, ["attention_mask", "(2, 9)", "(2, 3)"]),
    ({"attention_mask": torch.ones(2, 2, 3, 3)}, ["attention_mask", "(2, 2, 3, 3)", "(2 or 1, 1, 3, 3)"]),
    # One key for all: it was broadcast, and every token saw what follows it.
    (
        {"attention_mask": torch.ones(2, 1, 3, 1, dtype=torch.bool)},
        ["attention_mask", "(2, 1, 3, 1)", "(2 or 1, 1, 3, 3)"],
    ),
    ({"input_ids": IDS[:, :0]}, ["input_ids", "(2, 0)", "at least one token"]),
    ({"input_ids": IDS[:0]}, ["input_ids", "(0, 3)", "at least one token"]),
    ({"input_ids": IDS.float()}, ["input_ids", "float32", "int64"]),
    (
        {"input_ids": None, "inputs_embeds": torch.zeros(2, 0, 16)},
        ["inputs_embeds", "(2, 0, 16)", "(batch, tokens, 16)"],
    ),
    ({"input_ids": None, "inputs_embeds": torch.zeros(2, 3, 8)}, ["inputs_embeds", "(2, 3, 8)", "(batch, tokens, 16)"]),
    ({"input_ids": None, "inputs_embeds": torch.zeros(2, 3, 16).long()}, ["inputs_embeds", "int64", "floating point"]),
    ({"attention_mask": torch.ones(2, 1, 3, 3).long()}, ["attention_mask", "int64", "torch.bool"]),
    ({"position_ids": torch.arange(2)[None]}, ["position_ids", "(1, 2)", "(2 or 1, 3)"]),
    ({"position_ids": torch.arange(9).view(3, 3), "use_cache": False}, ["position_ids", "(3, 3)", "(2 or 1, 3)"]),
    ({"is_causal": False}, ["is_causal", "False", "causal"]),
    ({"exit_depths": DEPTHS[:, :2]}, ["exit_depths", "(2, 2)", "(2, 3)"]),
    ({"exit_depths": DEPTHS.float()}, ["exit_depths", "float32", "int64"]),
    ({"exit_depths": DEPTHS * 0}, ["exit_depths", "0 at row 0, token 0", "from 1 to 4"]),
    ({"exit_depths": DEPTHS + 3}, ["exit_depths", "5", "from 1 to 4"]),
    ({"exit_depths": DEPTHS, "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}, ["exit_depths", "0 at padding"]),
    ({"exit_depths": DEPTHS, "max_depth": 2}, ["max_depth", "exit_depths"]),
    ({"min_depth": 3, "max_depth": 2}, ["min_depth", "3", "2"]),
    ({"max_depth": 5}, ["max_depth", "5", "4"]),
    ({"exit_quantile": 0.0}, ["exit_quantile", "0.0"]),
    ({"exit_rule": "mode"}, ["exit_rule", "mode", "early"]),
    ({"exit_rule": "often"}, ["exit_rule", "often"]),
    ({"exit_rule": "sample", "exit_quantile": 0.3}, ["exit_quantile", "0.3", "sample"]),
    ({"exit_rule": "sample", "exit_noise": torch.rand(2, 4)}, ["exit_noise", "(2, 4)", "(2, 3)"]),
    ({"exit_rule": "sample", "exit_noise": torch.ones(2, 3)}, ["exit_noise", "1.0", "[0, 1)"]),
    ({"exit_rule": "sample", "exit_noise": torch.full((2, 3), torch.nan)}, ["exit_noise", "nan", "[0, 1)"]),
    ({"exit_noise": torch.rand(2, 3)}, ["exit_noise", "left out", "quantile", "sample"]),
    ({"exit_noise": torch.rand(2, 3), "exit_depths": DEPTHS}, ["exit_noise", "left out", "exit_depths"]),
    ({"generator": 3, "exit_rule": "sample"}, ["generator", "3", "torch.Generator"]),
    ({"max_depth": 2.0}, ["max_depth", "2.0", "integer"]),
    ({"min_depth": True}, ["min_depth", "True", "integer"]),
    ({"exit_quantile": "0.5"}, ["exit_quantile", "'0.5'", "a number above 0"]),
    ({"labels": IDS, "logits_to_keep": 1}, ["logits_to_keep", "1", "labels"]),
    ({"output_attentions": True}, ["output_attentions", "sdpa", "eager"]),
    ({"past_key_values": DynamicCache(config=small_config(max_depth=5))}, ["past_key_values", "12 slots", "10 slots"]),
    ({"past_key_values": StaticCache(config=small_config(max_depth=3), max_cache_len=8)}, ["8 slots", "max_depth=4"]),
    ({"past_key_values": ((),)}, ["past_key_values", "tuple", "DynamicCache"]),
]


@pytest.mark.parametrize(
    ("arguments", "words"), BAD_CALLS, ids=[f"{i}-{list(a)}" for i, (a, _) in enumerate(BAD_CALLS)]
)
def test_forward_refuses(arguments, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words below are the match
        MODEL(**{"input_ids": IDS, **arguments})
    for word in words:
        assert word in str(error.value)


def test_a_cache_of_another_width_or_batch_is_refused():
    other = small_model(max_depth=4, num_attention_heads=4)
    cache = other(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values.*head_dim"):
        MODEL(IDS, past_key_values=cache)
    cache = MODEL(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values"):
        MODEL(IDS[:1], past_key_values=cache)


def test_a_misspelt_argument_is_not_swallowed():
    with pytest.raises(TypeError, match=r"exit_dephts.*exit_depths"):
        MODEL(IDS, exit_dephts=DEPTHS)


def test_borders_of_packed_sequences_that_nobody_would_read_are_refused():
    """`DataCollatorWithFlattening(return_flash_attn_kwargs=True)`: tokens attended across them, without a word."""
    for name in ("cu_seq_lens_q", "seq_idx"):
        with pytest.raises(TypeError, match=rf"`{name}`; `position_ids` that start again"):
            MODEL(IDS, **{name: torch.tensor([0, 2, 3])})
    positions = torch.tensor([[0, 1, 0], [0, 1, 0]])
    for hidden in ({"attention_mask": torch.ones_like(IDS)}, {"past_key_values": DynamicCache(config=MODEL.config)}):
        with pytest.raises(TypeError, match=r"without mask and cache"):
            MODEL(IDS, position_ids=positions, cu_seq_lens_q=torch.tensor([0, 2, 3, 5, 6]), **hidden)


@pytest.mark.parametrize(
    ("borders", "words"),
    [
        ({"cu_seq_lens_k": torch.tensor([0, 3, 6])}, ["cu_seq_lens_k", "[0, 3, 6]", "[0, 2, 3, 5, 6]"]),
        ({"seq_idx": torch.tensor([[0, 1, 1], [0, 1, 1]])}, ["seq_idx", "[0, 1, 3, 4, 6]", "[0, 2, 3, 5, 6]"]),
        ({"seq_idx": torch.tensor([0, 0, 1])}, ["seq_idx", "(3,)", "(2, 3)"]),
        ({"cu_seq_lens_q": [0, 2, 3, 5, 6]}, ["cu_seq_lens_q", "list", "tensor"]),
        ({"max_length_q": 1}, ["max_length_q", "1", "at least 2"]),
    ],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_borders_that_positions_do_not_have_are_refused(borders, words, rows):
    positions = torch.tensor([[0, 1, 0]]).expand(rows, -1)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words below are the match
        MODEL(IDS, position_ids=positions, **borders)
    for word in words:
        assert word in str(error.value)
    same = {"cu_seq_lens_q": torch.tensor([0, 2, 2, 3, 5, 6]), "max_length_q": 2}  # an empty sequence is none
    assert torch.equal(MODEL(IDS, position_ids=positions, **same).logits, MODEL(IDS, position_ids=positions).logits)


def test_a_mask_of_four_dimensions_may_reach_as_far_as_a_static_cache():
    cache = StaticCache(config=MODEL.config, max_cache_len=8)
    mask = torch.ones(3, 8, dtype=torch.bool).tril().expand(2, 1, 3, 8)
    found = MODEL(IDS, attention_mask=mask, past_key_values=cache)
    assert torch.allclose(found.logits, MODEL(IDS).logits, atol=1e-6)
    cache = StaticCache(config=MODEL.config, max_cache_len=8)
    with pytest.raises(ValueError, match=r"\(2 or 1, 1, 3, 3 or 8\)"):
        MODEL(IDS, attention_mask=mask[..., :7], past_key_values=cache)


def test_packed_training_of_a_learned_decider_is_refused():
    model = small_model().train()
    with pytest.raises(ValueError, match=r"execution.*packed.*masked"):
        run(model, make_batch(0, [(0, 0)], 4, 4), "packed")
    run(small_model(decider="fixed").train(), make_batch(0, [(0, 0)], 4, 4), "packed")


def test_attention_weights_of_a_packed_run_are_refused():
    model = small_model()
    model.set_attn_implementation("eager")
    batch = make_batch(0, [(0, 0)], 4, 4)
    with pytest.raises(ValueError, match=r"output_attentions.*masked"):
        run(model, batch, "packed", output_attentions=True)
    attentions = run(model, batch, "auto", output_attentions=True).attentions
    assert len(attentions) == model.config.num_hidden_layers
    assert attentions[0].shape == (1, 2, 4, 4)


def test_training_noise_of_the_wrong_kind_is_refused():
    batch = make_batch(0, [(0, 0)], 4, 4)
    with pytest.raises(ValueError, match=r"exit_noise.*\(1, 4\).*\(1, 4, 4\)"):
        run(small_model(decider="early").train(), batch, exit_noise=batch.noise)


def test_a_mask_that_misses_the_cached_tokens_is_refused():
    """Only the new tokens' mask, on top of a cache: attention would take the wrong columns."""
    cache = MODEL(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask.*\(2, 1\).*\(2, 4\)"):
        MODEL(IDS[:, :1], attention_mask=IDS[:, :1], past_key_values=cache)


def test_a_depth_changed_after_building_is_refused_where_weights_depend_on_it():
    model = small_model(decider="early", max_depth=4)
    model.config.max_depth = 3
    with pytest.raises(ValueError, match=r"max_depth.*3.*4"):
        model(IDS)


def test_a_fixed_depth_changed_after_building_is_checked_by_the_next_forward():
    model = small_model(decider="fixed", max_depth=4)
    for depth in (9, 0):
        model.config.fixed_depth = depth
        with pytest.raises(ValueError, match=rf"fixed_depth.*{depth}.*4"):
            model(IDS)


@pytest.mark.parametrize("said", [True, None])
def test_what_is_so_anyway_may_be_said(said):
    assert torch.equal(MODEL(IDS, is_causal=said).logits, MODEL(IDS).logits)


@pytest.mark.parametrize("option", [{"exit_rule": "sample"}, {"exit_quantile": 0.9}], ids=str)
def test_training_refuses_an_exit_rule_that_it_would_not_read(option):
    with pytest.raises(ValueError, match=rf"{next(iter(option))}.*training.*eval"):
        small_model().train()(IDS, **option)
    assert small_model(decider="fixed").train()(IDS, **option).logits.isfinite().all()


def test_a_cache_while_checkpointing_trains_is_refused():
    model = small_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"use_cache` is True"):
        model(IDS, use_cache=True)
    with pytest.raises(ValueError, match=r"past_key_values` is given"):
        model(IDS, past_key_values=DynamicCache(config=model.config))
    assert model(IDS).past_key_values is None

"""The stock `generate()` in all its modes: tokens and depths of a padded batch are those of each row alone."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import make_batch, seeded, small_model
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    StoppingCriteria,
    TextStreamer,
    pipeline,
)
from versions import needs_transformers
from words import word_tokenizer

from modeling_anira import AniraForCausalLM
from modeling_anira.deciders import DECIDERS

PADDING = [(3, 0), (0, 0), (4, 0)]
NEW = 7
# No model here makes this token: transformers up to 5.10 cannot look up a prompt without an end token.
NO_END = 23


def model_and_batch(decider="online", seed=0, **overrides):
    """A model whose greedy text varies, and a left-padded batch."""
    overrides = {"max_depth": 5, "stability_threshold": 0.4, **overrides}
    model = small_model(seed=seed, decider=decider, **overrides)
    model.generation_config.pad_token_id = 0
    return model, make_batch(seed + 11, PADDING, 6, 5)


def generate(model, batch, row=None, **options):
    """`generate` over the batch, or over one row without its padding; always with a dict."""
    ids, mask = batch.input_ids, batch.attention_mask
    if row is not None:
        left = PADDING[row][0]
        ids, mask = ids[row : row + 1, left:], None
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(ids, attention_mask=mask, **settings)


def depths_of(model, sequences, mask=None, **options):
    """The depths that one uncached forward over finished sequences gives, but for the last token, which is not run."""
    depths = model(sequences, attention_mask=mask, use_cache=False, **options).exit_depths.clone()
    depths[:, -1] = 0
    return depths


def extended(mask, length):
    return torch.cat((mask, mask.new_ones(mask.shape[0], length - mask.shape[1])), 1)


def assert_rows_agree(model, batch, **options):
    """A padded batch against each row alone: tokens and depths."""
    together = generate(model, batch, **options)
    assert together.exit_depths.shape == together.sequences.shape
    returned = together.sequences.shape[0] // len(PADDING)
    for row, (left, _) in enumerate(PADDING):
        alone = generate(model, batch, row, **options)
        here = slice(row * returned, (row + 1) * returned)
        length = alone.sequences.shape[1]
        assert torch.equal(together.sequences[here, left : left + length], alone.sequences), f"row {row}: tokens"
        assert torch.equal(together.exit_depths[here, left : left + length], alone.exit_depths), f"row {row}: depths"
        assert (together.exit_depths[here, :left] == 0).all(), "padding is not run"
        assert (together.exit_depths[here, left + length :] == 0).all(), "nothing is run after the end"
    return together


@pytest.mark.parametrize("decider", DECIDERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3}, {"prefill_chunk_size": 2}],
    ids=["greedy", "uncached", "static", "beam", "chunked"],
)
def test_a_padded_batch_gives_what_each_row_gives_alone(decider, options):
    model, batch = model_and_batch(decider)
    output = assert_rows_agree(model, batch, eos_token_id=None, **options)
    mask = extended(batch.attention_mask, output.sequences.shape[1])
    assert torch.equal(output.exit_depths, depths_of(model, output.sequences, mask))
    if decider != "fixed":
        assert output.exit_depths[output.exit_depths > 0].unique().numel() > 1


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["cached", "uncached", "beam"])
def test_rows_that_end_early_are_not_run_any_more(options):
    """Rows end at different lengths: depths are 0 from the end token on, and the rest of the batch goes on as alone."""
    for seed in range(4):
        model, batch = model_and_batch(seed=seed)
        free = generate(model, batch, eos_token_id=None).sequences
        end = int(free[0, 8])  # what the first row says third ends it
        output = assert_rows_agree(model, batch, eos_token_id=end, **options)
        if "num_beams" not in options:
            ended = (output.sequences[:, 6:] == end).cumsum(1) > 0
            assert (output.exit_depths[:, 6:][ended] == 0).all()


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_finished_row_costs_nothing(cache):
    """Tokens through the core while rows end one by one: the depths, and each end token once, for the cache's sake.

    Under a static cache transformers made a 4-D mask, in which ended rows looked real: they were computed to the end.
    """
    model, batch = model_and_batch()
    free = generate(model, batch, eos_token_id=None).sequences
    end = int(free[0, 6])
    counted = []
    model.model.core[0].mlp.register_forward_hook(
        lambda module, args, output: counted.append(output.shape[:-1].numel())
    )
    output = generate(model, batch, eos_token_id=end, cache_implementation=cache)
    through_the_core = sum(counted)
    depths = extended(batch.attention_mask, output.sequences.shape[1]) * 2
    forced = generate(model, batch, eos_token_id=end, cache_implementation=cache, exit_depths=depths)
    assert set(forced.exit_depths.unique().tolist()) == {0, 2}
    full = depths_of(model, output.sequences, extended(batch.attention_mask, output.sequences.shape[1]))
    ends = (output.sequences == end) & ((output.sequences == end).cumsum(1) == 1)
    ends[:, :6] = False
    ends[:, -1] = False
    assert ends.any()
    assert through_the_core == int(output.exit_depths.sum() + full[ends].sum())


@pytest.mark.parametrize("decider", DECIDERS)
def test_sampling(decider):
    model, batch = model_and_batch(decider)
    torch.manual_seed(1)
    output = generate(model, batch, do_sample=True, num_return_sequences=2, eos_token_id=None)
    assert output.sequences.shape == (6, 6 + NEW)
    mask = extended(batch.attention_mask.repeat_interleave(2, 0), 6 + NEW)
    assert torch.equal(output.exit_depths, depths_of(model, output.sequences, mask))


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_depths_follow_the_beams(do_sample, use_cache):
    """Beams swap rows at every step: each sequence has the depths of its own path."""
    for seed in range(5):
        model, batch = model_and_batch(seed=seed)
        torch.manual_seed(seed)
        output = generate(
            model,
            batch,
            num_beams=4,
            num_return_sequences=3,
            do_sample=do_sample,
            use_cache=use_cache,
            output_scores=True,
            eos_token_id=5,
        )
        assert (output.beam_indices[:, 1:] != output.beam_indices[:, :-1]).any(), "beams did swap"
        for sequence, depths, path, row in zip(
            output.sequences,
            output.exit_depths,
            output.beam_indices,
            [r for r in range(3) for _ in range(3)],
            strict=True,
        ):
            length = 6 + int((path >= 0).sum())
            mask = extended(batch.attention_mask[row : row + 1], length)
            expected = depths_of(model, sequence[None, :length], mask)
            assert torch.equal(depths[None, :length], expected)
            assert (depths[length:] == 0).all()


@pytest.mark.parametrize("decider", DECIDERS)
@pytest.mark.parametrize("how", ["assistant", "prompt lookup", "foreign assistant"])
def test_assisted_decoding_gives_what_greedy_gives(decider, how):
    model, batch = model_and_batch(decider)
    # Weights near zero make a model that repeats itself, so that some guesses are accepted.
    plain = generate(model, batch, 1, max_new_tokens=14, eos_token_id=NO_END)
    if how == "prompt lookup":
        options = {"prompt_lookup_num_tokens": 3}
    elif how == "assistant":
        assistant = copy.deepcopy(model)
        with torch.no_grad():
            assistant.lm_head.weight += 0.02 * torch.randn_like(assistant.lm_head.weight)
        options = {"assistant_model": assistant}
    else:
        config = LlamaConfig(
            vocab_size=23,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
        )
        options = {"assistant_model": LlamaForCausalLM(config).eval()}
    forwards = []
    model.model.register_forward_hook(lambda *args: forwards.append(1))
    guessed = generate(model, batch, 1, max_new_tokens=14, eos_token_id=NO_END, exit_quantile=0.5, **options)
    assert torch.equal(guessed.sequences, plain.sequences)
    assert torch.equal(guessed.exit_depths, plain.exit_depths)
    if how == "assistant":
        assert len(forwards) < 14, "some guesses were accepted"


def test_streaming():
    model, batch = model_and_batch()
    seen = []

    class Streamer(TextStreamer):
        def __init__(self):
            pass

        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            seen.append("end")

    output = generate(model, batch, 1, streamer=Streamer())
    assert seen == [*output.sequences.flatten().tolist(), "end"]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_continuing_from_a_cache(whole, kind):
    """Given the cache of a beginning, and the whole sequence or only what is new: the same tokens and new depths."""
    model, batch = model_and_batch()
    ids = batch.input_ids[1:2]
    plain = generate(model, batch, 1, eos_token_id=None)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=32)
    model(ids[:, :4], past_key_values=cache)
    output = model.generate(
        ids if whole else ids[:, 4:],
        attention_mask=torch.ones(1, 6, dtype=torch.int64),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    start = 4 if whole else 0
    assert torch.equal(output.sequences[:, start:], plain.sequences[:, 4:])
    assert torch.equal(output.exit_depths[:, start:], plain.exit_depths[:, 4:])
    assert (output.exit_depths[:, :start] == 0).all()


def test_generating_from_embeddings():
    model, batch = model_and_batch()
    ids = batch.input_ids[1:2]
    plain = generate(model, batch, 1, eos_token_id=None)
    output = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids),
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    assert torch.equal(output.sequences, plain.sequences[:, 6:])
    assert torch.equal(output.exit_depths, plain.exit_depths[:, 6:])


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_forced_depths(options):
    model, batch = model_and_batch()
    rows = slice(1, 2) if "prompt_lookup_num_tokens" in options else slice(None)
    forced = torch.randint(1, 6, (3, 6 + NEW), generator=seeded(0))
    output = model.generate(
        batch.input_ids[rows],
        attention_mask=batch.attention_mask[rows],
        exit_depths=forced[rows],
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        eos_token_id=NO_END,
        **options,
    )
    expected = forced * extended(batch.attention_mask, 6 + NEW)
    expected[:, -1] = 0
    assert torch.equal(output.exit_depths, expected[rows])


def test_options_come_from_the_call_or_the_generation_config_and_are_kept(tmp_path):
    model, batch = model_and_batch("early")
    settings = {"min_depth": 2, "max_depth": 4, "exit_quantile": 0.9, "exit_rule": "quantile"}
    called = generate(model, batch, eos_token_id=None, **settings)
    default = generate(model, batch, eos_token_id=None)
    assert not torch.equal(called.exit_depths, default.exit_depths)
    assert called.exit_depths.max() <= 4

    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    configured = generate(model, batch, eos_token_id=None)
    assert torch.equal(configured.exit_depths, called.exit_depths)
    assert generate(model, batch, max_depth=2).exit_depths.max() == 2, "the call wins"

    model.save_pretrained(tmp_path)
    loaded = AniraForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.exit_quantile == 0.9
    assert torch.equal(generate(loaded, batch, eos_token_id=None).exit_depths, called.exit_depths)

    passed = model_and_batch("early")[0].generate(
        batch.input_ids,
        attention_mask=batch.attention_mask,
        generation_config=GenerationConfig(
            max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, **settings
        ),
    )
    assert torch.equal(passed.exit_depths, called.exit_depths)
    forced = torch.full((3, 6 + NEW), 5)
    assert generate(model, batch, exit_depths=forced, eos_token_id=None).exit_depths.max() == 5


def test_sampled_exits_follow_given_noise():
    model, batch = model_and_batch()
    noise = torch.rand(3, 6 + NEW, generator=seeded(3))
    options = {"exit_rule": "sample", "exit_noise": noise, "eos_token_id": None}
    output = generate(model, batch, **options)
    assert torch.equal(output.exit_depths, generate(model, batch, use_cache=False, **options).exit_depths)
    mask = extended(batch.attention_mask, 6 + NEW)
    expected = depths_of(model, output.sequences, mask, exit_rule="sample", exit_noise=noise)
    assert torch.equal(output.exit_depths, expected)


def test_a_tensor_comes_back_where_no_dict_is_asked_for():
    model, batch = model_and_batch()
    assert torch.is_tensor(generate(model, batch, return_dict_in_generate=False))


BAD = [
    ({"exit_depths": torch.ones(3, 7, dtype=torch.int64)}, ["exit_depths", "(3, 7)", "(3, at least 12)"]),
    ({"exit_depths": torch.ones(1, 13, dtype=torch.int64)}, ["exit_depths", "(1, 13)", "(3, at least 12)"]),
    ({"exit_depths": torch.full((3, 13), 9)}, ["exit_depths", "9", "from 1 to 5"]),
    ({"exit_dephts": 3}, ["exit_dephts"]),
    ({"generation_config": GenerationConfig(exit_quantle=0.5)}, ["exit_quantle", "exit_quantile"]),
    ({"generation_config": GenerationConfig(halting=0.5)}, ["halting", "exit_quantile", "exit_rule"]),
    ({"generation_config": GenerationConfig(exit_depths=[1])}, ["exit_depths", "generation config"]),
    ({"exit_depths": torch.ones(1, 7, dtype=torch.int64), "num_beams": 4}, ["exit_depths", "(1, 7)", "(3, at least"]),
    ({"exit_depths": [[1]]}, ["exit_depths", "list", "tensor"]),
    ({"exit_depths": torch.ones(3, 13, dtype=torch.int64), "max_depth": 2}, ["max_depth", "2", "exit_depths"]),
    ({"exit_rule": "sample", "use_cache": False}, ["exit_rule", "use_cache=False", "exit_noise"]),
    ({"output_exit_log_probs": True}, ["output_exit_log_probs", "forward"]),
    ({"generator": torch.Generator()}, ["generator", "quantile", "sample"]),
    ({"assistant_early_exit": 2}, ["assistant_early_exit", "2", "prompt_lookup_num_tokens"]),
    ({"guidance_scale": 1.5}, ["guidance_scale", "1.5", "left out"]),
    ({"compile_config": CompileConfig()}, ["compile_config", "left out"]),
    ({"max_depth": 6}, ["max_depth", "6", "5"]),
    ({"exit_rule": "mode"}, ["exit_rule", "mode", "early"]),
    ({"past_key_values": DynamicCache(config=small_model(max_depth=3).config)}, ["past_key_values", "8 slots", "12"]),
    ({"penalty_alpha": 0.6, "top_k": 4}, ["generation mode", "contrastive_search", "beam_search"]),
    ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, ["generation mode", "group_beam_search"]),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=[str(list(options)) for options, _ in BAD])
def test_bad_input_is_refused(options, words):
    model, batch = model_and_batch()
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words below are the match
        generate(model, batch, **options)
    for word in words:
        assert word in str(error.value)


def test_a_refused_call_leaves_the_model_as_it_was():
    """transformers' early-exit assistant cuts `num_hidden_layers`, and once left it cut."""
    model, batch = model_and_batch()
    plain = generate(model, batch, 1)
    with pytest.raises(ValueError, match="assistant_early_exit"):
        generate(model, batch, 1, assistant_early_exit=2)
    assert model.config.num_hidden_layers == model.config.num_attention_calls
    assert torch.equal(generate(model, batch, 1).sequences, plain.sequences)


def test_a_model_left_in_training_mode_does_not_stumble_over_a_kept_rule():
    """Some trainers generate in training mode, where exits are drawn whatever the generation config says."""
    model, batch = model_and_batch()
    model.generation_config.exit_quantile, model.generation_config.exit_rule = 0.9, "quantile"
    assert generate(model.train(), batch).exit_depths is not None
    with pytest.raises(ValueError, match=r"exit_rule.*'quantile'.*training"):
        generate(model, batch, exit_rule="quantile")


def test_without_a_cache_only_exits_that_are_drawn_are_refused():
    model, batch = model_and_batch("fixed")
    assert generate(model, batch, exit_rule="sample", use_cache=False).exit_depths.max() == 5


def test_dynamic_positions_take_prompts_beyond_their_first_length():
    """`generate` refused what `forward` took: under this kind `max_position_embeddings` is where stretching begins."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model = small_model(max_position_embeddings=8, rope_parameters=rope)
    prompt = torch.arange(1, 13)[None]
    assert model.generate(prompt, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 15)


def test_a_prompt_longer_than_the_model_is_refused():
    model, _ = model_and_batch()
    ids = torch.ones(1, 65, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"input_ids.*65 tokens.*64"):
        model.generate(ids, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"input_ids.*65 tokens.*64"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=1)
    with pytest.raises(ValueError, match=r"input_ids.*65 tokens.*64"):
        model.generate_batch([[1] * 65])
    cache = model(ids[:, :60], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"input_ids.*65 tokens.*64"):
        model.generate(ids[:, :5], attention_mask=ids, past_key_values=cache, max_new_tokens=1)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_mask_that_fits_neither_cache_nor_input_is_refused(rows):
    """transformers drops a mask of ones and keeps its length: tokens or depths were wrong without a word.

    The commonest was the second turn of a conversation: only what is new, the cache, and no mask.
    """
    model = small_model()
    ids = torch.randint(4, model.config.vocab_size, (rows, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(ids, **options)

    def cached(length):
        return {"past_key_values": model(ids[:, :length], use_cache=True).past_key_values}

    for given in (
        {"attention_mask": torch.ones_like(ids), "inputs": ids[:, 5:], **cached(5)},
        {"inputs": ids, **cached(5)},
        {"inputs": ids, "attention_mask": torch.ones_like(ids), **cached(8)},
    ):
        found = model.generate(**given, **options)
        assert torch.equal(found.sequences[:, -3:], whole.sequences[:, -3:])
    for given in (
        {"attention_mask": torch.ones(rows, 14), "inputs": ids[:, 5:], **cached(5)},
        {"attention_mask": torch.ones(rows, 7), "inputs": ids[:, 5:], **cached(5)},
        {"attention_mask": torch.ones(rows, 12), "inputs": ids},
    ):
        with pytest.raises(ValueError, match=r"`attention_mask` is .*, but must be of \d cached and \d new tokens"):
            model.generate(**given, **options)
    for given in ({"inputs": ids[:, 5:], **cached(5)}, {"inputs": ids, **cached(9)}):
        with pytest.raises(ValueError, match=r"`past_key_values` is a cache of \d.* shorter .* `attention_mask`"):
            model.generate(**given, **options)
    with pytest.raises(ValueError, match=r"`input_ids` is \(\d, 0\).* at least one token"):
        model.generate(ids[:1, :0], **options)
    found = cached(9)
    found["past_key_values"].crop(-1)  # as the message says
    assert torch.equal(model.generate(ids, **found, **options).sequences, whole.sequences)


class Enough(StoppingCriteria):
    """Ends a row when it is 9 tokens long and its first token is odd."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, 0] % 2 == 1) & (input_ids.shape[1] >= 9) | (input_ids.shape[1] >= 12)


@pytest.mark.parametrize("with_end", [False, True])
def test_own_stopping_criteria(with_end):
    """Without an end token, a row that met its criterion goes on until all have, as in transformers."""
    model, batch = model_and_batch()
    batch.input_ids[:] = torch.tensor([[3, 4, 5, 6, 7, 8], [2, 4, 5, 6, 7, 8], [5, 4, 5, 6, 7, 8]])
    batch.attention_mask[:] = 1
    free = generate(model, batch, eos_token_id=None).sequences
    end = next(token for token in range(1, 23) if token not in free)
    output = generate(model, batch, eos_token_id=end if with_end else None, stopping_criteria=[Enough()])
    assert output.sequences.shape[1] == 12
    for row, length in enumerate([9, 12, 9] if with_end else [12, 12, 12]):
        assert torch.equal(output.sequences[row, :length], free[row, :length])
        assert (output.exit_depths[row, : length - 1] > 0).all()
        assert (output.exit_depths[row, length - 1 :] == 0).all()


def test_two_end_tokens_in_beam_search():
    for seed in range(4):
        model, batch = model_and_batch(seed=seed)
        assert_rows_agree(model, batch, num_beams=3, num_return_sequences=2, eos_token_id=[5, 9, 13])


def test_a_cache_can_be_continued_after_rows_have_ended():
    """A second turn on the returned cache: the end token of a row that ended early was once not in it."""
    for seed in range(4):
        model, batch = model_and_batch(seed=seed)
        batch.attention_mask[:] = 1
        end = int(generate(model, batch, eos_token_id=None).sequences[0, 7])
        first = generate(model, batch, eos_token_id=end)
        length = first.sequences.shape[1]
        ended = (first.sequences[:, 6:] == end).cumsum(1)
        mask = torch.ones_like(first.sequences)
        mask[:, 7:] = (ended[:, :-1] == 0).long()
        turn = torch.full((3, 2), 4)
        full = torch.cat((first.sequences, turn), 1)
        mask = torch.cat((mask, torch.ones_like(turn)), 1)
        cache = first.past_key_values
        output = model(full[:, cache.get_seq_length() :], attention_mask=mask, past_key_values=cache)
        whole = model(full, attention_mask=mask, use_cache=False)
        assert (output.logits[:, -2:] - whole.logits[:, length:]).abs().max() < 1e-4
        assert torch.equal(output.exit_depths[:, -2:], whole.exit_depths[:, length:])


def test_custom_generate():
    model, batch = model_and_batch()

    def twice(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    output = generate(model, batch, custom_generate=twice, eos_token_id=None)
    assert torch.equal(output.exit_depths, generate(model, batch, eos_token_id=None).exit_depths)


def test_sampled_assistance_runs():
    model, batch = model_and_batch()
    torch.manual_seed(0)
    assistant = copy.deepcopy(model)
    output = generate(model, batch, 1, do_sample=True, assistant_model=assistant, eos_token_id=None)
    assert torch.equal(output.exit_depths, depths_of(model, output.sequences))


def assisted_on_a_cache(model, ids, given):
    """`ids` with a guess looked up in the prompt, on a cache of the first four; `given`: what `generate` is handed."""
    return model.generate(
        given,
        past_key_values=model(ids[:, :4], use_cache=True).past_key_values,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        prompt_lookup_num_tokens=2,
        eos_token_id=NO_END,
    )


def test_assisted_decoding_on_a_cache_refuses_the_whole_sequence():
    """transformers would run the cached tokens again, on top of themselves."""
    model, batch = model_and_batch()
    ids = batch.input_ids[1:2]
    with pytest.raises(ValueError, match=r"past_key_values.*4 tokens"):
        assisted_on_a_cache(model, ids, ids)


@needs_transformers("5.18", "assisted decoding cuts the mask of a cache that was passed in")
def test_assisted_decoding_goes_on_from_a_cache():
    model, batch = model_and_batch()
    ids = batch.input_ids[1:2]
    plain = generate(model, batch, 1, eos_token_id=NO_END)
    assert torch.equal(assisted_on_a_cache(model, ids, ids[:, 4:]), plain.sequences[:, 4:])


def test_a_cache_goes_by_the_name_that_newer_releases_give_it_too():
    """Taken for a paged cache, it would be left out without a word."""
    model, batch = model_and_batch()
    ids = batch.input_ids[1:2]
    whole, start = model(ids), model(ids[:, :4], use_cache=True)
    end = model(ids[:, 4:], cache=start.past_key_values)
    assert torch.allclose(end.logits, whole.logits[:, 4:], atol=1e-4)


@pytest.mark.parametrize("rule", ["sample", "mode"])
def test_a_rule_that_the_call_names_sets_a_kept_quantile_aside(rule):
    """It was refused as if the call had given both."""
    model, batch = model_and_batch("early")
    model.generation_config.exit_quantile = 0.2
    torch.manual_seed(0)
    found = generate(model, batch, exit_rule=rule, eos_token_id=None)
    model.generation_config.exit_quantile = None
    torch.manual_seed(0)
    assert torch.equal(generate(model, batch, exit_rule=rule, eos_token_id=None).exit_depths, found.exit_depths)


def test_no_cache_is_no_paged_cache():
    """By the name of newer releases it was taken for one, and a packed forward was refused."""
    model, batch = model_and_batch()
    model.config.execution = "packed"
    ids = batch.input_ids[1:2]
    assert torch.equal(model(ids, cache=None).logits, model(ids).logits)


def test_a_pipeline_pads_and_gives_what_each_prompt_gives():
    model, _ = model_and_batch()
    text = pipeline("text-generation", model=model, tokenizer=word_tokenizer(), device="cpu")
    prompts = ["w3 w4 w5 w6", "w7"]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    together = text(prompts, batch_size=2, **options)
    assert together == [text(prompt, **options) for prompt in prompts]


def test_two_threads_generate_with_one_model():
    model, batch = model_and_batch()
    expected = [generate(model, batch, row) for row in range(3)]
    with ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(lambda row: generate(model, batch, row), [0, 1, 2] * 4))
    for output, wanted in zip(outputs, expected * 4, strict=True):
        assert torch.equal(output.sequences, wanted.sequences)
        assert torch.equal(output.exit_depths, wanted.exit_depths)


@pytest.mark.parametrize("decider", DECIDERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_gives_what_generate_gives(decider, attention):
    model, _ = model_and_batch(decider, num_attention_heads=4, num_key_value_heads=2)
    model.set_attn_implementation(attention)
    prompts = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [3, 3, 4, 5]]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=22, pad_token_id=0)
    # Named `page_size` from transformers 5.17 on.
    size = {"page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size": 32}
    paged = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64, **size)
    outputs = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=paged, progress_bar=False
    )
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        alone = model.generate(torch.tensor([prompt]), generation_config=config)
        assert output.generated_tokens == alone[0, len(prompt) :].tolist()


def test_continuous_batching_refuses_options_that_it_would_not_read():
    model, _ = model_and_batch()
    with pytest.raises(ValueError, match=r"exit_quantile.*model\.config"):
        model.generate_batch([[1, 2]], generation_config=GenerationConfig(exit_quantile=0.9, max_new_tokens=2))
    with pytest.raises(ValueError, match=r"exit_quantile.*model\.config"):
        model.generate_batch([[1, 2]], exit_quantile=0.9)
    forced = torch.ones(1, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"exit_depths.*continuous batching"):
        model.generate(torch.ones(1, 2, dtype=torch.int64), cache_implementation="paged", exit_depths=forced)
    model.config.execution = "packed"
    with pytest.raises(ValueError, match=r"execution.*continuous batching"):
        model.generate_batch([[1, 2]])

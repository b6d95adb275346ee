"""What a transformers user expects of a model: saving, loading, recorded states, outputs as tuples."""

import inspect

import pytest
import torch
from cases import make_batch, run, small_config, small_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from modeling_anira import AniraForCausalLM, AniraModel
from modeling_anira.deciders import DECIDERS


@pytest.mark.parametrize("decider", list(DECIDERS))
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_is_bit_equal(decider, tied, tmp_path):
    model = small_model(decider=decider, tie_word_embeddings=tied, exit_quantile=0.7)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is AniraForCausalLM
    assert loaded.config.exit_quantile == 0.7
    assert not loaded.training
    one, other = model.state_dict(), loaded.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    batch = make_batch(0, [(0, 0), (2, 0)], 6, 4)
    assert torch.equal(run(model, batch).logits, run(loaded, batch).logits)


def test_base_model_loads_from_a_causal_lm(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is AniraModel
    ids = torch.ones(1, 5, dtype=torch.int64)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert type(AutoConfig.from_pretrained(tmp_path)).__name__ == "AniraConfig"


def test_depth_can_be_raised_when_loading(tmp_path):
    """No shared parameter depends on `max_depth`: an online model iterates further than it was trained to."""
    model = small_model(decider="online", max_depth=4)
    model.save_pretrained(tmp_path)
    deeper = AniraForCausalLM.from_pretrained(tmp_path, max_depth=7)
    ids = torch.ones(1, 5, dtype=torch.int64)
    assert deeper(ids, exit_depths=torch.full((1, 5), 7)).exit_depths.max() == 7
    depths = torch.full((1, 5), 3)
    assert torch.equal(deeper(ids, exit_depths=depths).logits, model(ids, exit_depths=depths).logits)


def test_missing_decider_weights_are_initialised_as_in_a_new_model(tmp_path):
    """A fixed model, trained, becomes an online one by an argument: its new decider starts deep."""
    small_model(decider="fixed").save_pretrained(tmp_path)
    model = AniraForCausalLM.from_pretrained(tmp_path, decider="online")
    assert torch.allclose(model.model.decider.mlp.exit_head.bias, torch.tensor([-3.0]))
    assert model.model.decider.mlp.exit_head.weight.abs().max() < 0.1


@pytest.mark.parametrize("execution", ["masked", "packed"])
@pytest.mark.parametrize("coda", [0, 1])
def test_hidden_states_are_one_a_layer_and_iteration(execution, coda):
    model = small_model(max_depth=5, num_prelude_layers=2, num_coda_layers=coda)
    batch = make_batch(0, [(0, 0)] * 2, 6, 3)
    output = run(model, batch, execution, exit_depths=batch.depths, output_hidden_states=True)
    assert len(output.hidden_states) == 1 + 2 + 5 + coda
    assert all(state.shape == (2, 6, 16) for state in output.hidden_states)
    base = model.model(batch.input_ids, exit_depths=batch.depths)
    assert torch.allclose(output.hidden_states[-1], base.last_hidden_state, atol=1e-5)
    states = output.hidden_states[2:8]  # h^(0)..h^(5)
    for depth in range(1, 4):
        exited = batch.depths <= depth
        assert torch.equal(states[depth + 1][exited], states[depth][exited]), "a frozen state does not change"
        moved = (states[depth] - states[depth - 1])[batch.depths >= depth]
        assert (moved.norm(dim=-1) > 0.01).all(), "an active one does"


def test_outputs_as_a_tuple_and_logits_to_keep():
    model = small_model()
    ids = torch.ones(2, 5, dtype=torch.int64)
    full = model(ids)
    loss, logits = model(ids, labels=ids, use_cache=False, return_dict=False)[:2]
    assert torch.equal(logits, full.logits)
    assert loss.dim() == 0
    assert torch.allclose(model(ids, logits_to_keep=2).logits, full.logits[:, -2:], atol=1e-6)
    assert full.exit_depths.dtype == torch.int64
    assert full.exit_log_probs is None
    assert model(ids, labels=ids).exit_log_probs is None
    assert model(ids, output_exit_log_probs=True).exit_log_probs.shape == (2, 5, 4)


def test_inputs_embeds_do_as_well():
    model = small_model()
    ids = torch.arange(1, 6)[None]
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


def test_attention_implementation_can_be_switched():
    model = small_model(num_attention_heads=4, num_key_value_heads=2)
    batch = make_batch(0, [(0, 0), (3, 0)], 7, 4)
    outputs = []
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        outputs.append(run(model, batch, exit_depths=batch.depths).logits[batch.real])
    assert torch.allclose(*outputs, atol=1e-5)


def test_resized_embeddings():
    model = small_model()
    model.resize_token_embeddings(30)
    assert model(torch.full((1, 3), 29)).logits.shape == (1, 3, 30)


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}])
def test_other_rotary_settings(rope):
    model = small_model(rope_parameters={"rope_theta": 10000.0, **rope})
    batch = make_batch(0, [(0, 0)], 6, 4)
    masked, packed = run(model, batch, "masked"), run(model, batch, "packed")
    assert torch.allclose(masked.logits, packed.logits, atol=1e-4)


def test_training_keeps_no_cache_unless_asked():
    model = AniraForCausalLM(small_config()).train()
    ids = torch.ones(1, 3, dtype=torch.int64)
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 3
    assert model.eval()(ids).past_key_values.get_seq_length() == 3


def test_forward_on_the_meta_device():
    model = AniraForCausalLM(small_config()).to("meta").train()
    assert model(torch.ones(2, 3, dtype=torch.int64, device="meta")).logits.shape == (2, 3, 23)


def test_shifted_labels_alone_give_the_same_loss():
    model = small_model()
    ids = torch.arange(1, 9).view(2, 4)
    shifted = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), 1)
    assert torch.equal(model(ids, labels=ids).loss, model(ids, shift_labels=shifted).loss)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("decider", ["online", "fixed"])
def test_cache_has_a_slot_for_every_attention_call(kind, decider):
    """Slots, shapes and bytes are what the README's formula says."""
    model = small_model(decider=decider, max_depth=3, num_attention_heads=4, num_key_value_heads=2)
    batch = make_batch(0, [(0, 0), (2, 0)], 6, 3)
    settings = {"max_cache_len": 6} if kind is StaticCache else {}
    cache = kind(config=model.config, **settings)
    run(model, batch, use_cache=True, past_key_values=cache)
    slots = 1 + 3 * 2 + 1  # P + D * C + E
    assert len(cache.layers) == slots
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (2, 2, 6, 4)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert size == slots * 2 * 2 * 6 * 2 * 4 * 4  # slots x (K, V) x batch x length x heads x features x bytes


def test_skipped_slots_hold_the_deepest_keys():
    model = small_model(decider="online", max_depth=4, num_core_layers=1)
    batch = make_batch(0, [(0, 0)], 6, 4)
    cache = run(model, batch, use_cache=True, exit_depths=batch.depths).past_key_values
    for token, depth in enumerate(batch.depths[0].tolist()):
        for iteration in range(depth, 4):
            skipped = cache.layers[model.config.cache_slot("core", 0, iteration)]
            deepest = cache.layers[model.config.cache_slot("core", 0, depth - 1)]
            assert torch.equal(skipped.keys[:, :, token], deepest.keys[:, :, token])
            assert torch.equal(skipped.values[:, :, token], deepest.values[:, :, token])


def test_tied_embeddings_stay_tied(tmp_path):
    model = small_model(tie_word_embeddings=True)
    model.resize_token_embeddings(30)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AniraForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.vocab_size == 30
    ids = torch.full((1, 3), 29)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_weights_start_as_the_config_says():
    model = small_model(decisive=False, hidden_size=64, intermediate_size=128, initializer_range=0.05)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif "decider" not in name:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.2), name
            assert parameter.mean().abs() < 0.01, name


def test_buffers_are_right_after_loading(tmp_path):
    """Loading builds on the meta device: a buffer that nobody refills would hold whatever was in memory."""
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = AniraForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert not any(value.is_meta for value in [*loaded.parameters(), *loaded.buffers()])


def test_recorded_states_keep_their_gradients():
    model = small_model().train()
    output = model(torch.ones(2, 4, dtype=torch.int64), output_hidden_states=True)
    for state in output.hidden_states:
        state.retain_grad()
    output.logits.sum().backward()
    assert all(state.grad is not None for state in output.hidden_states)


def test_arguments_come_in_transformers_order():
    names = list(inspect.signature(AniraForCausalLM.forward).parameters)
    assert names[1:7] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "inputs_embeds",
        "labels",
    ]
    assert AniraForCausalLM.main_input_name == "input_ids"
    assert AniraForCausalLM.can_generate()
    assert [name for name in names if "label" in name] == ["labels"], "Trainer asks rows for every argument so named"


def test_a_packed_row_of_several_sequences_gives_what_each_gives():
    """Positions that start again tell sequences of one row apart, as transformers' flattening collator makes them.

    With its own cache, which is the default out of training, the model once let the second read the first.
    """
    model = small_model()
    ids = torch.arange(1, 10)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    for execution in ("masked", "packed"):
        model.config.execution = execution
        for use_cache in (None, True, False):
            together = model(ids, position_ids=positions, use_cache=use_cache)
            for piece in (slice(0, 4), slice(4, 9)):
                alone = model(ids[:, piece], use_cache=False)
                assert torch.allclose(together.logits[:, piece], alone.logits, atol=1e-5)
                assert torch.equal(together.exit_depths[:, piece], alone.exit_depths)

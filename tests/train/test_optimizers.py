"""Muon beside torch's own, and which weights it gets."""

import torch
from optimizers import Muon, make_optimizers, orthogonalize
from recipe import make_recipe

from modeling_anira import AniraForCausalLM


def test_singular_values_become_alike_and_vectors_stay():
    torch.manual_seed(0)
    for shape in ((8, 20), (20, 8), (8, 8)):
        matrix = torch.randn(shape)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        found = torch.diag(left.T @ orthogonalize(matrix) @ right.T)
        # The smallest of a square matrix may be too small to be lifted all the way.
        assert found[values > 0.1 * values.max()].min() > 0.4
        assert found.max() < 1.3
        assert torch.allclose(orthogonalize(matrix * 1000), orthogonalize(matrix), atol=1e-5)


def test_steps_are_those_of_torch_but_for_its_bf16():
    torch.manual_seed(0)
    start = torch.randn(16, 24)
    gradients = torch.randn(5, 16, 24)
    ends = []
    for kind, options in ((Muon, {}), (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"})):
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.05, weight_decay=0.1, momentum=0.9, **options)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach() - start)
    assert (ends[0] - ends[1]).norm() < 0.02 * ends[1].norm()


def test_every_weight_has_one_optimizer_and_embeddings_and_deciders_have_adamw():
    model = {"decider": "online", "hidden_size": 32, "input_injection": "concat", "max_position_embeddings": 256}
    recipe = make_recipe(
        {"task": "brevo-mini", "steps": 1, "batch_size": 1, "learning_rate": 1e-3, "model": model, "optimizer": "muon"}
    )
    anira = AniraForCausalLM(recipe.make_config())
    muon, adamw = make_optimizers(anira, recipe)
    names = {id(weight): name for name, weight in anira.named_parameters()}
    by_muon = {names[id(weight)] for group in muon.param_groups for weight in group["params"]}
    by_adamw = [names[id(weight)] for group in adamw.param_groups for weight in group["params"]]
    assert sorted([*by_muon, *by_adamw]) == sorted(names.values())
    assert "model.core.0.mlp.up_proj.weight" in by_muon
    assert "model.injection.adapter.weight" in by_muon
    assert not [name for name in by_muon if "norm" in name or "embed" in name or "lm_head" in name or "decider" in name]
    assert len(make_optimizers(anira, make_recipe({**vars(recipe), "optimizer": "adamw"}))) == 1

"""MANO: values, labels and counts, against an evaluator that recurses over the tree."""

import numpy as np
import pytest

from datasets_scripts.mano import PRESETS, Mano, ManoConfig
from datasets_scripts.vocabulary import decode


def examples(task, split, rows):
    batch = task.generate(split, range(rows))
    labels = task.label(batch)
    for row in range(rows):
        own = slice(batch.offsets[row], batch.offsets[row + 1])
        yield batch, labels, row, decode(batch.tokens[own].tolist()).split(), own


def parse(words, at=0):
    """(tree, end) of the expression at `at`; a tree is (start, end, left, right) or a leaf (start, end, number)."""
    if words[at] not in "+-*":
        return (at, at + 1, int(words[at])), at + 1
    left, middle = parse(words, at + 1)
    right, end = parse(words, middle)
    return (at, end, left, right), end


def height(tree):
    return 0 if len(tree) == 3 else 1 + max(height(tree[2]), height(tree[3]))


def value(tree, words, modulus):
    if len(tree) == 3:
        return tree[2]
    left, right = value(tree[2], words, modulus), value(tree[3], words, modulus)
    return {"+": left + right, "-": left - right, "*": left * right}[words[tree[0]]] % modulus


def needed(tree, words, modulus):
    if len(tree) == 3:
        return 0
    zeros = [side for side in tree[2:] if words[tree[0]] == "*" and value(side, words, modulus) == 0]
    return 1 + (min if zeros else sum)(needed(side, words, modulus) for side in zeros or tree[2:])


def subtrees(tree):
    yield tree
    if len(tree) == 4:
        yield from subtrees(tree[2])
        yield from subtrees(tree[3])


@pytest.mark.parametrize("name", ["mini", "paper"])
def test_values_and_labels_agree_with_a_recursive_evaluator(name):
    task = Mano(PRESETS[name])
    for batch, labels, row, words, own in examples(task, "extrapolation", 300):
        expression = words[2:-3]
        tree, end = parse(expression)
        assert end == len(expression)
        operators = sum(word in "+-*" for word in expression)
        assert words[:2] == ["<bos>", f"<len_{operators}>"]
        assert batch.size[row] == operators
        assert words[-3:] == ["<ans>", str(value(tree, expression, task.config.modulus)), "<eos>"]
        assert words[batch.answer_start[row] - 1] == "<ans>"
        assert labels.difficulty[row] == height(tree)

        wanted_height, wanted_size, wanted_needed = (np.zeros(len(words)) for _ in range(3))
        for node in sorted(subtrees(tree), key=height):
            wanted_height[2 + node[1] - 1] = height(node)
            wanted_size[2 + node[1] - 1] = sum(len(inner) == 4 for inner in subtrees(node))
            wanted_needed[2 + node[1] - 1] = needed(node, expression, task.config.modulus)
        for position, word in enumerate(expression):
            if word in "+-*":
                assert wanted_height[2 + position] == 0
        wanted_height[-3], wanted_size[-3] = height(tree), operators
        wanted_needed[-3] = needed(tree, expression, task.config.modulus)
        assert labels.token_difficulty[own].tolist() == wanted_height.tolist()
        assert labels.features["ended_operators_state"][own].tolist() == wanted_size.tolist()
        assert labels.features["needed_operators_state"][own].tolist() == wanted_needed.tolist()
        opened = [
            sum(node[0] <= position < node[1] - 1 for node in subtrees(tree) if len(node) == 4)
            for position in range(len(expression))
        ]
        assert labels.features["open_operators_state"][own].tolist() == [0, 0, *opened, 0, 0, 0]


def test_the_number_of_instances_is_that_of_an_enumeration():
    task = Mano(ManoConfig(min_size=1, max_size=2, extrapolation_size=2, modulus=2))
    expressions = {0: [("0",), ("1",)]}
    for size in (1, 2):
        expressions[size] = [
            (sign, *left, *right)
            for sign in "+-*"
            for split in range(size)
            for left in expressions[split]
            for right in expressions[size - 1 - split]
        ]
    assert task.num_instances("train") == len(set(expressions[1])) + len(set(expressions[2]))
    assert Mano(ManoConfig(1, 1, 1)).num_instances("train") == 1587


def test_sizes_operators_and_numbers_are_uniform():
    task = Mano(PRESETS["mini"])
    batch = task.generate("train", range(20_000))
    assert np.abs(np.bincount(batch.size, minlength=5)[1:] / 20_000 - 1 / 4).max() < 0.02
    words = np.array(decode(batch.tokens.tolist()).split())
    signs = [np.mean(words[np.isin(words, list("+-*"))] == sign) for sign in "+-*"]
    assert np.abs(np.array(signs) - 1 / 3).max() < 0.02


def test_the_verifier_says_why():
    task = Mano(PRESETS["paper"])
    prompt = "<bos> <len_2> - 3 * 2 4 <ans>"
    assert task.verify(prompt, "18 <eos>")
    assert task.verify(prompt, "18 <eos> <pad> <pad>")
    assert "the value is 18" in task.verify(prompt, "17 <eos>").reason
    assert "one number" in task.verify(prompt, "1 8 <eos>").reason
    assert "<eos>" in task.verify(prompt, "18").reason
    assert "goes on after" in task.verify(prompt, "18 <eos> 18").reason
    assert "'eighteen'" in task.verify(prompt, "eighteen <eos>").reason
    assert "fewer than two" in task.verify("<bos> <len_2> - 3 * 2 <ans>", "18 <eos>").reason
    for word in ("<len_9>", "3", "<bos>"):
        assert "2 operators" in task.verify(f"<bos> {word} - 3 * 2 4 <ans>", "18 <eos>").reason
    assert "3 expressions" in task.verify("<bos> <len_2> 3 2 4 <ans>", "18 <eos>").reason


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_size": 0}, "`min_size` is 0"),
        ({"min_size": 5, "max_size": 4}, "`max_size` is 4"),
        ({"max_size": 16, "extrapolation_size": 15}, "`extrapolation_size` is 15"),
        ({"modulus": 21}, "`modulus` is 21, but must be a prime"),
        ({"modulus": 1}, "`modulus` is 1"),
        ({"modulus": 257}, "`modulus` is 257"),
        ({"extrapolation_size": 65}, "`extrapolation_size` is 65"),
    ],
)
def test_bad_configs_are_refused_by_field(fields, message):
    with pytest.raises(ValueError, match=message):
        ManoConfig(**fields)

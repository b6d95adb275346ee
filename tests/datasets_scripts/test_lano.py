"""LANO: exact distributions against brute force over all derivations, and grammars read and refused."""

import itertools
import json
import math
from collections import defaultdict

import numpy as np
import pytest

from datasets_scripts.grammar import Grammar, entropy, next_token_distribution
from datasets_scripts.lano import FIRST_TERMINAL, PRESETS, Lano, LanoConfig
from datasets_scripts.vocabulary import decode

# Ambiguous: sentences have several derivations, of several lengths.
AMBIGUOUS = Grammar(
    rules=(
        (((0, 1), (1, 0), (0, 1, 1)),),
        (((0, 1), (0,)), ((1, 0), (1,), (0, 0))),
        (((0, 1), (0,)), ((1, 2), (1, 0))),
    ),
    num_terminals=3,
)


def yields(grammar, level=0, symbol=0):
    """{(sentence, heights of the constituents that end at each word): probability} over all derivations."""
    if level == grammar.height:
        return {((symbol,), (0,)): 1.0}
    found = defaultdict(float)
    rules = grammar.rules[level][symbol]
    for rule in rules:
        children = [yields(grammar, level + 1, child).items() for child in rule]
        for parts in itertools.product(*children):
            sentence = tuple(word for (words, _), _ in parts for word in words)
            ended = [height for (_, heights), _ in parts for height in heights]
            ended[-1] = grammar.height - level
            found[sentence, tuple(ended)] += math.prod(p for _, p in parts) / len(rules)
    return found


def language(grammar):
    found = defaultdict(float)
    for (sentence, _), probability in yields(grammar).items():
        found[sentence] += probability
    return found


def brute_force(grammar, sentence):
    """(n + 1, terminals + 1): the distribution after every prefix, by summing over the whole language."""
    weights = np.zeros((len(sentence) + 1, grammar.num_terminals + 1))
    for other, probability in language(grammar).items():
        for length in range(len(sentence) + 1):
            if other[:length] == sentence[:length]:
                weights[length, other[length] if len(other) > length else -1] += probability
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)


def random_grammars():
    return [Grammar.random(3, 2, 2, (1, 2), 2, seed) for seed in range(8)]


def test_the_distribution_is_exact_over_all_derivations():
    several_derivations = 0
    for grammar in [AMBIGUOUS, *random_grammars()]:
        sentences = sorted(language(grammar))
        several_derivations += len(yields(grammar)) > len(sentences)
        for sentence in sentences[:: max(1, len(sentences) // 12)]:
            found = next_token_distribution(grammar, sentence)
            wanted = brute_force(grammar, sentence)
            assert np.abs(found - wanted).max() < 1e-12
            assert (
                np.abs(entropy(found) + np.nansum(wanted * np.log(np.where(wanted > 0, wanted, 1)), axis=1)).max()
                < 1e-12
            )
    assert several_derivations >= 3


def test_a_prefix_that_no_sentence_has_has_no_distribution():
    words = set(language(AMBIGUOUS))
    for sentence in itertools.product(range(3), repeat=4):
        found = next_token_distribution(AMBIGUOUS, sentence)
        for length in range(5):
            possible = any(other[:length] == sentence[:length] for other in words)
            assert found[length].sum() == pytest.approx(float(possible))


@pytest.mark.parametrize("shape", [(7, 3, 4, (2, 3), 3, 1), (7, 3, 2, (3, 3), 3, 0)])
def test_long_sentences_neither_underflow_nor_overflow(shape):
    """A sentence of 800 words has a probability near 2^-1000; one of 2187 words, of rules in pairs, 2^-1093."""
    grammar = Grammar.random(*shape)
    task = Lano(LanoConfig(grammar.shortest, grammar.longest, grammar.longest, grammar))
    batch = task.generate("train", range(3))
    for row in range(3):
        tokens = batch.tokens[batch.offsets[row] : batch.offsets[row + 1]]
        distribution = task.next_word_distribution(tokens)
        assert np.isfinite(distribution).all()
        following = [*tokens[1:][(tokens[1:] >= FIRST_TERMINAL)] - FIRST_TERMINAL, -1]
        after = np.delete(distribution[:-1], np.flatnonzero(tokens == 4), axis=0)
        assert (after[np.arange(len(following)), following] > 0).all()


def test_probabilities_beyond_the_range_of_numbers_are_refused():
    """Terms that cancel overflowed where one rule is long and without choices, and another short and full of them."""
    pairs = tuple((first, second) for first in range(12) for second in range(12))
    grammar = Grammar(rules=((((0,) * 800, (1,)),), (((0,),), pairs)), num_terminals=12)
    with pytest.raises(ValueError, match="`grammar` is one whose probabilities leave fp64's range"):
        next_token_distribution(grammar, [0] * 800)


def test_sentences_follow_the_grammar():
    grammar = AMBIGUOUS
    task = Lano(LanoConfig(1, grammar.longest, grammar.longest, grammar))
    known, derivations = language(grammar), yields(grammar)
    counts = defaultdict(int)
    batch = task.generate("train", range(20_000))
    labels = task.label(task.generate("train", range(200)))
    for row in range(20_000):
        tokens = batch.tokens[batch.offsets[row] : batch.offsets[row + 1]]
        sentence = tuple((tokens[(tokens >= FIRST_TERMINAL)] - FIRST_TERMINAL).tolist())
        counts[sentence] += 1
        assert batch.size[row] == len(sentence)
        if row < 200:
            own = slice(batch.offsets[row], batch.offsets[row + 1])
            levels = labels.features["constituent_level_static"][own]
            answer = batch.answer_start[row]
            assert levels[0] == levels[-1] == 0
            assert levels[answer - 1] == levels[answer - 2]
            assert (sentence, tuple(np.delete(levels, [0, answer - 1, len(levels) - 1]).tolist())) in derivations
            assert labels.difficulty[row] == grammar.height
    assert set(counts) <= set(known)
    share = sum(known[sentence] for sentence in counts)
    for sentence, count in counts.items():
        assert abs(count / 20_000 - known[sentence] / share) < 0.02


@pytest.mark.parametrize("preset", PRESETS)
def test_where_the_answer_begins_does_not_tell_how_long_the_sentence_is(preset):
    """The prompt was a third of its sentence, and a model had a lower loss than the grammar: it knew the length."""
    batch = Lano(PRESETS[preset]).generate("validation", range(50))
    assert len(set(batch.size.tolist())) > 5
    assert set(batch.answer_start.tolist()) == {PRESETS[preset].grammar.shortest // 3 + 2}


def test_labels_are_the_entropies():
    task = Lano(PRESETS["mini"])
    batch = task.generate("validation", range(20))
    labels = task.label(batch)
    for row in range(20):
        own = slice(batch.offsets[row], batch.offsets[row + 1])
        words = decode(batch.tokens[own].tolist()).split()
        answer = words.index("<ans>")
        assert batch.answer_start[row] == answer + 1
        sentence = [int(word) - 1 for word in words if word.isdigit()]
        wanted = entropy(next_token_distribution(task.config.grammar, sentence))
        wanted = [*wanted[:answer], wanted[answer - 1], *wanted[answer:], 0]
        assert labels.token_difficulty[own] == pytest.approx(wanted, abs=1e-6)


def test_the_verifier_accepts_the_language_and_says_why_not():
    task = Lano(LanoConfig(1, AMBIGUOUS.longest, AMBIGUOUS.longest, AMBIGUOUS))
    known = set(language(AMBIGUOUS))
    for length in (3, 4, 5):
        for sentence in itertools.product(range(3), repeat=length):
            words = [str(word + 1) for word in sentence]
            verdict = task.verify(f"<bos> {words[0]} <ans>", f"{' '.join(words[1:])} <eos>")
            assert verdict.correct == (sentence in known)
            assert verdict.correct or "cannot follow" in verdict.reason or "too early" in verdict.reason
    assert "no word of the grammar" in task.verify("<bos> 1 <ans>", "9 <eos>").reason
    assert "none has more than" in task.verify("<bos> 1 <ans>", "1 " * 100 + "<eos>").reason


def test_a_grammar_is_read_from_the_published_layout(tmp_path):
    content = {
        "depth": 2,
        "sizes": [1, 2, 2],
        "all": [
            [{"depth": 0, "id": 5, "name": "E", "children": [[0, 1], [1, 0]]}],
            [
                {"depth": 1, "id": 3, "name": "C", "children": [[0, 1, 1]]},
                {"depth": 1, "id": 4, "name": "D", "children": [[1, 0]]},
            ],
            [{"depth": 2, "id": 1, "name": "1", "children": []}, {"depth": 2, "id": 2, "name": "2", "children": []}],
        ],
    }
    (tmp_path / "cfg.json").write_text(json.dumps(content))
    grammar = Grammar.read(tmp_path / "cfg.json")
    assert grammar == Grammar(((((0, 1), (1, 0)),), (((0, 1, 1),), ((1, 0),))), 2)
    assert set(language(grammar)) == {(0, 1, 1, 1, 0), (1, 0, 0, 1, 1)}
    for text in ("{}", '{"all": []}', "[", '{"all": [[3], []]}', '{"all": 7}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"The grammar file .* cannot be read"):
            Grammar.read(tmp_path / "other.json")
    with pytest.raises(ValueError, match="No such file"):
        Grammar.read(tmp_path / "none.json")


def test_a_tall_grammar_of_single_rules_has_room_for_its_spans():
    """16 levels over rules of up to 16 symbols: 16^16 overflowed, and the chart was written outside of its memory."""
    wide = tuple(range(16))
    chain = tuple(((symbol,),) for symbol in wide)
    grammar = Grammar(((((wide),),), *(chain,) * 15), 16)
    assert grammar.longest == grammar.shortest == 16
    assert grammar.tables.span_room.tolist() == [1] * len(grammar.tables.span_room)
    found = next_token_distribution(grammar, list(wide))
    assert found.argmax(axis=1).tolist() == [*wide, 16]
    assert found.max(axis=1).tolist() == [1.0] * 17


@pytest.mark.parametrize(
    ("rules", "terminals", "message"),
    [
        ((((0,),), ((0,),)), 1, "`rules` is"),
        (((((0,),),),)[0], 2, r"`terminals` is 'with \[1\] that no rule reaches'"),
        (((((0,),),), (((0,),), ((0, 0),))), 1, r"`level 1` is 'with symbols \[1\]"),
        ((((),),), 1, "symbol 0 on level 0.*never end"),
        (((((0, 1),),), (((0,),), ())), 1, "symbol 1 on level 1.*never end"),
        (((((0, 2),),), (((0,),), ((0, 0),))), 1, "symbols 0 to 1"),
        (((((0,), (0,)),),), 1, "different from one another"),
    ],
)
def test_unusable_grammars_are_refused(rules, terminals, message):
    if message == "`rules` is":
        rules = ((((0,),), ((0,),)),)
    elif message.startswith("`terminals`"):
        rules = ((((0,),),),)
    with pytest.raises(ValueError, match=message):
        Grammar(rules, terminals)


def test_bad_generator_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="`height` is 0"):
        Grammar.random(0, 3, 2, (2, 3), 3, seed=0)
    with pytest.raises(ValueError, match="`rule_lengths`"):
        Grammar.random(3, 3, 2, (3, 2), 3, seed=0)
    with pytest.raises(ValueError, match=r"`num_rules` is 5, .* 3 symbols can share 2 possible rules"):
        Grammar.random(3, 3, 5, (1, 1), 2, seed=0)
    with pytest.raises(ValueError, match="longest sentence"):
        Grammar.random(9, 3, 2, (3, 3), 3, seed=0)
    with pytest.raises(ValueError, match="`max_size` is 3"):
        LanoConfig(1, 3, 72, PRESETS["mini"].grammar)
    with pytest.raises(ValueError, match="`extrapolation_size` is 200"):
        LanoConfig(1, 50, 200, PRESETS["mini"].grammar)
    with pytest.raises(ValueError, match=r"`grammar` is 'my.json', but must be a Grammar"):
        LanoConfig(1, 50, 72, "my.json")

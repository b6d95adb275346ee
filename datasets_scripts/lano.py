"""LANO: the language of a layered context-free grammar.

    <bos> 1 2 2 <ans> 3 1 1 2 3 1 <eos>

(of a smaller grammar than the presets'). The prompt is a sentence's first words, the answer any continuation that makes
it a sentence of the grammar. Which words can follow is what the grammar says, so the exact distribution of the next
word, and its entropy, are known at every position. From Allen-Zhu (arXiv 2512.17351). Chosen here: all prompts of a
grammar have as many words, a third of its shortest sentence's, since a place of `<ans>` that moves with the sentence's
length would tell it.

`<ans>` is no word of the grammar: a label at it, and at the word before it, is about the grammar's next word.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from datasets_scripts.grammar import Grammar, Tables, derive, entropy, next_token_distribution
from datasets_scripts.randomness import MAX_ATTEMPTS, compiled, extend_hash, hundredth_of, open_state, stream_key
from datasets_scripts.task import Batch, Labels, Task, TaskConfig, malformed, refuse_empty, require
from datasets_scripts.vocabulary import ANSWER, BOS, EOS, FIRST_NUMBER, WORDS

# The first terminal is the word "1", as in the published grammars.
FIRST_TERMINAL = FIRST_NUMBER + 1


@dataclass(frozen=True)
class LanoConfig(TaskConfig):
    """Sentences of `min_size` to `max_size` words of `grammar`.

    A grammar's longest sentences are left for extrapolation. If a share s of its sentences lies beyond `max_size`, the
    sentences that are left differ from the grammar's by a KL of -ln(1 - s) nats each: 0.1 for a tenth.
    """

    min_size: int = 1
    max_size: int = 81
    extrapolation_size: int = 81
    grammar: Grammar = field(default_factory=lambda: Grammar.random(4, 3, 2, (2, 3), 3, seed=0))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.grammar, Grammar), "grammar", self.grammar, "a Grammar, as Grammar.read gives")
        shortest, longest = self.grammar.shortest, self.grammar.longest
        require(self.max_size >= shortest, "max_size", self.max_size, f"at least {shortest}, the shortest sentence")
        allowed = f"at most {longest}, the longest sentence of the grammar"
        require(self.extrapolation_size <= longest, "extrapolation_size", self.extrapolation_size, allowed)


def _preset(grammar: Grammar, max_size: int) -> LanoConfig:
    return LanoConfig(grammar.shortest, max_size, grammar.longest, grammar)


# `paper` has the shape of the published cfg3b: 6 rewritings, 3 symbols a level, 2 rules a symbol, of length 2 or 3.
PRESETS = {
    "mini": _preset(Grammar.random(5, 3, 2, (2, 3), 3, seed=3), 105),
    "paper": _preset(Grammar.random(6, 3, 2, (2, 3), 3, seed=3), 406),
}


class Lano(Task):
    """The continuation of a sentence of a grammar."""

    name = "lano"
    config_class = LanoConfig
    size_meaning = "words of the sentence"
    difficulty_meaning = "height of the derivation, the same for all sentences of a grammar"
    token_difficulty_meaning = (
        "entropy in nats of the next word (or the end), given the words up to here, over all derivations of the grammar"
    )
    features = {
        "constituent_level_static": (
            "height of the highest constituent that ends here, in the derivation that made the sentence; 0: only a word"
        ),
    }
    sampled = True
    scoring = "sampled at temperature 1 with a seed: prompt and completion must be a sentence of the grammar"
    config: LanoConfig

    def draw(
        self, key: np.uint64, sizes: tuple[int, int], part: tuple[int, int], weighted: bool, indices: np.ndarray
    ) -> Batch:
        """Rules are drawn uniformly from the root down; a sentence of another size is drawn again."""
        grammar = self.config.grammar
        tokens = np.empty((len(indices) + 1) * self.longest_example(grammar.longest), np.int32)
        level = np.zeros(len(tokens), np.int32)
        rows = np.empty((3, len(indices)), np.int32)
        instance = np.empty(len(indices), np.uint64)
        start = stream_key("lano")
        shown = max(1, grammar.shortest // 3)
        total = _draw(key, sizes, part, shown, grammar.tables, indices, start, tokens, level, rows, instance)
        if total < 0:
            refuse_empty(self, sizes, part)
        offsets = np.concatenate([[0], np.cumsum(rows[0], dtype=np.int64)])
        derived = {"constituent_level_static": level[:total].copy()}
        return Batch(tokens[:total].copy(), offsets, rows[1], rows[2], instance, derived)

    def label(self, batch: Batch) -> Labels:
        difficulty = np.full(len(batch), self.config.grammar.height, np.int32)
        uncertainty = np.zeros(len(batch.tokens), np.float32)
        for row in range(len(batch)):
            example = slice(batch.offsets[row], batch.offsets[row + 1])
            uncertainty[example] = entropy(self.next_word_distribution(batch.tokens[example]))
        return Labels(difficulty, uncertainty, batch.derived)

    def next_word_distribution(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """The exact distribution of the next word at every position of an example.

        Args:
            tokens: Ids of a whole example or of its beginning, `<bos>` and `<ans>` among them, (n,).

        Returns:
            (n, num_terminals + 1): of the words "1", "2", ... and, last, of `<eos>`. Rows are 0 at `<eos>`, and
            after what no sentence begins with.
        """
        tokens = np.asarray(tokens)
        is_word = (tokens != BOS) & (tokens != ANSWER) & (tokens != EOS)
        distribution = next_token_distribution(self.config.grammar, tokens[is_word] - FIRST_TERMINAL)
        by_position = distribution[np.cumsum(is_word)]
        by_position[tokens == EOS] = 0
        return by_position

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "Lano":
        grammar = settings["grammar"]
        rules = tuple(tuple(tuple(tuple(rule) for rule in own) for own in level) for level in grammar["rules"])
        return cls(LanoConfig(**{**settings, "grammar": Grammar(rules, grammar["num_terminals"])}))

    def check(self, prompt: list[int], completion: list[int]) -> str:
        words = prompt[1:-1] + completion
        for identity in words:
            if not FIRST_TERMINAL <= identity < FIRST_TERMINAL + self.config.grammar.num_terminals:
                malformed(f"{WORDS[identity]} is no word of the grammar.")
        if len(words) > self.config.grammar.longest:
            return f"The sentence has {len(words)} words, but none has more than {self.config.grammar.longest}."
        distribution = next_token_distribution(self.config.grammar, np.array(words) - FIRST_TERMINAL)
        if distribution[-1, -1] > 0:
            return ""
        possible = int((distribution.sum(axis=1) > 0).sum()) - 1
        if possible < len(words):
            return f"No sentence begins so: word {possible + 1}, {WORDS[words[possible]]}, cannot follow."
        return "The sentence ends too early: it is only the beginning of one."

    def written_size(self, tokens: list[int], size: int) -> int:
        return sum(identity not in (BOS, ANSWER, EOS) for identity in tokens)

    def exact_distribution(self, tokens: np.ndarray) -> tuple[list[int], np.ndarray]:
        words = range(FIRST_TERMINAL, FIRST_TERMINAL + self.config.grammar.num_terminals)
        return [*words, EOS], self.next_word_distribution(tokens)

    def longest_example(self, size: int) -> int:
        return size + 3

    def longest_answer(self, size: int) -> int:
        # A sampled sentence may be longer than the one that its prompt was cut from.
        return self.config.grammar.longest + 1

    def settings(self) -> dict[str, Any]:
        return {
            "min_size": self.config.min_size,
            "max_size": self.config.max_size,
            "extrapolation_size": self.config.extrapolation_size,
            "grammar": {"rules": self.config.grammar.rules, "num_terminals": self.config.grammar.num_terminals},
        }


@compiled
def _draw(
    key: np.uint64,
    sizes: tuple[int, int],
    part: tuple[int, int],
    shown: int,
    tables: Tables,
    indices: np.ndarray,
    start: np.uint64,
    tokens: np.ndarray,
    level: np.ndarray,
    rows: np.ndarray,
    instance: np.ndarray,
) -> int:
    """Fills `tokens`, `level`, `rows` (length, answer_start, size) and `instance`; the number of tokens, or -1.

    `shown`: words of the prompt.
    """
    state = np.empty(1, np.uint64)
    sentence = np.empty(len(tokens) // (len(indices) + 1), np.int64)
    ended = np.empty(len(sentence), np.int64)
    total = 0
    for row in range(len(indices)):
        accepted = False
        for attempt in range(MAX_ATTEMPTS):
            open_state(state, key, indices[row], attempt)
            size = derive(state, tables, sentence, ended)
            if not sizes[0] <= size <= sizes[1]:
                continue
            code = start
            for position in range(size):
                code = extend_hash(code, sentence[position])
            if part[0] <= hundredth_of(code) < part[1]:
                accepted = True
                break
        if not accepted:
            return -1
        rows[0, row], rows[1, row], rows[2, row], instance[row] = size + 3, shown + 2, size, code
        tokens[total] = BOS
        for position in range(size):
            at = total + 1 + position + (position >= shown)
            tokens[at], level[at] = FIRST_TERMINAL + sentence[position], ended[position]
        tokens[total + 1 + shown], level[total + 1 + shown] = ANSWER, ended[shown - 1]
        total += size + 3
        tokens[total - 1] = EOS
    return total

"""MANO: the value of an arithmetic expression in prefix notation, modulo a prime.

    <bos> <len_2> + 1 * 1 3 <ans> 4 <eos>

An instance is the expression. Its size is the number of operators, its difficulty the height of its tree: operators on
one path must be applied one after the other, all others could be at the same time. The prompt says the size, so that
expressions larger than those of training begin with a word that training did not have. From Allen-Zhu (arXiv
2512.17351) after the published generator; the `paper` preset has training sizes 3 to 16, as ANIRA (arXiv 2602.08864)
has.
"""

import math
from dataclasses import dataclass

import numpy as np

from datasets_scripts.randomness import (
    MAX_ATTEMPTS,
    below,
    compiled,
    extend_hash,
    hundredth_of,
    open_state,
    stream_key,
)
from datasets_scripts.task import Batch, Labels, Task, TaskConfig, malformed, refuse_empty, require
from datasets_scripts.vocabulary import (
    ANSWER,
    BOS,
    EOS,
    FIRST_LENGTH,
    FIRST_NUMBER,
    MAX_LENGTH_WORD,
    MINUS,
    NUM_NUMBERS,
    PLUS,
    TIMES,
    WORDS,
)

# <bos> <len_L>, <ans> value <eos>
_FRAME = 5


@dataclass(frozen=True)
class ManoConfig(TaskConfig):
    """Expressions of `min_size` to `max_size` operators + - * over the numbers 0 to `modulus` - 1.

    Args:
        modulus: A prime: else products would favour some values.
    """

    min_size: int = 3
    max_size: int = 16
    extrapolation_size: int = 32
    modulus: int = 23

    def __post_init__(self) -> None:
        super().__post_init__()
        prime = self.modulus > 1 and all(self.modulus % divisor for divisor in range(2, math.isqrt(self.modulus) + 1))
        require(prime and self.modulus < NUM_NUMBERS, "modulus", self.modulus, f"a prime below {NUM_NUMBERS}")
        allowed = f"at most {MAX_LENGTH_WORD}, the largest <len_L> of the vocabulary"
        require(self.extrapolation_size <= MAX_LENGTH_WORD, "extrapolation_size", self.extrapolation_size, allowed)


PRESETS = {
    "mini": ManoConfig(min_size=1, max_size=4, extrapolation_size=8, modulus=5),
    "paper": ManoConfig(),
}


class Mano(Task):
    """The value of a prefix expression."""

    name = "mano"
    config_class = ManoConfig
    size_meaning = "operators in the expression"
    difficulty_meaning = "height of the expression's tree: 0 for a number, else one more than its higher argument"
    token_difficulty_meaning = (
        "at a number, height of the largest sub-expression that ends there; at `<ans>` of the whole; else 0"
    )
    features = {
        "open_operators_state": "operators that still miss an argument, after this token",
        "ended_operators_state": "operators in the largest sub-expression that ends here; at `<ans>` in all; else 0",
        "needed_operators_state": (
            "those of them whose values one must have, as a product is 0 once one factor is: if a product has factors "
            "of value 0, itself and what the cheapest of these needs"
        ),
    }
    scoring = "the completion must be the value and `<eos>`"
    config: ManoConfig

    def draw(
        self, key: np.uint64, sizes: tuple[int, int], part: tuple[int, int], weighted: bool, indices: np.ndarray
    ) -> Batch:
        """Sizes, operators, numbers and the size of every left argument are uniform."""
        lengths = np.empty(len(indices), np.int32)
        tokens = np.empty(len(indices) * self.longest_example(sizes[1]), np.int32)
        instance = np.empty(len(indices), np.uint64)
        start = stream_key("mano")
        total = _draw(key, sizes, part, self.config.modulus, indices, start, tokens, lengths, instance)
        if total < 0:
            refuse_empty(self, sizes, part)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        answer_start = lengths - 2
        return Batch(tokens[:total], offsets, answer_start, (lengths - 1 - _FRAME) // 2, instance)

    def label(self, batch: Batch) -> Labels:
        total = len(batch.tokens)
        difficulty = np.empty(len(batch), np.int32)
        height = np.zeros(total, np.float32)
        opened, ended, needed = (np.zeros(total, np.int32) for _ in range(3))
        _label(batch.tokens, batch.offsets, self.config.modulus, difficulty, height, opened, ended, needed)
        features = (opened, ended, needed)
        return Labels(difficulty, height, dict(zip(self.features, features, strict=True)))

    def check(self, prompt: list[int], completion: list[int]) -> str:
        expression = prompt[2:-1]
        expected = evaluate(expression, self.config.modulus)
        if prompt[1] != self.size_word(len(expression) // 2):
            malformed(f"The prompt says {WORDS[prompt[1]]}, but its expression has {len(expression) // 2} operators.")
        if len(completion) != 1:
            return f"The answer has {len(completion)} tokens, but is one number."
        if completion[0] != FIRST_NUMBER + expected:
            return f"The answer is {WORDS[completion[0]]}, but the value is {expected}."
        return ""

    def size_word(self, size: int) -> int:
        return FIRST_LENGTH - 1 + size

    def longest_example(self, size: int) -> int:
        return 2 * size + 1 + _FRAME

    def longest_answer(self, size: int) -> int:
        return 2

    def num_instances(self, split: str) -> int:
        """Binary trees with so many operators, times the choices of operators and numbers."""
        least, largest = self.config.size_range(split)
        modulus = self.config.modulus
        return sum(
            math.comb(2 * size, size) // (size + 1) * 3**size * modulus ** (size + 1)
            for size in range(least, largest + 1)
        )


def evaluate(expression: list[int], modulus: int) -> int:
    """The value of a prefix expression (ids); raises a MalformedError if it is none."""
    values: list[int] = []
    for identity in reversed(expression):
        if FIRST_NUMBER <= identity < FIRST_NUMBER + modulus:
            values.append(identity - FIRST_NUMBER)
            continue
        if identity not in (PLUS, MINUS, TIMES):
            malformed(f"The prompt has {WORDS[identity]} in its expression.")
        if len(values) < 2:
            malformed(f"The prompt's expression has a {WORDS[identity]} with fewer than two arguments.")
        left, right = values.pop(), values.pop()
        result = {PLUS: left + right, MINUS: left - right, TIMES: left * right}[identity]
        values.append(result % modulus)
    if len(values) != 1:
        malformed(f"The prompt holds {len(values)} expressions, not one.")
    return values[0]


@compiled
def _draw(
    key: np.uint64,
    sizes: tuple[int, int],
    part: tuple[int, int],
    modulus: int,
    indices: np.ndarray,
    start: np.uint64,
    tokens: np.ndarray,
    lengths: np.ndarray,
    instance: np.ndarray,
) -> int:
    """Fills `tokens`, `lengths` and `instance`; the number of tokens, or -1 if an example found no instance."""
    state = np.empty(1, np.uint64)
    pending = np.empty(sizes[1] + 1, np.int64)
    values = np.empty(2 * sizes[1] + 1, np.int64)
    total = 0
    for row in range(len(indices)):
        accepted = False
        for attempt in range(MAX_ATTEMPTS):
            open_state(state, key, indices[row], attempt)
            size = sizes[0] + below(state, sizes[1] - sizes[0] + 1)
            tokens[total], tokens[total + 1] = BOS, FIRST_LENGTH - 1 + size
            length = _draw_expression(state, size, modulus, pending, tokens[total + 2 :])
            code = start
            for position in range(length):
                code = extend_hash(code, tokens[total + 2 + position])
            if part[0] <= hundredth_of(code) < part[1]:
                accepted = True
                break
        if not accepted:
            return -1
        value = _evaluate(tokens[total + 2 : total + 2 + length], modulus, values)
        total += 2 + length
        tokens[total], tokens[total + 1], tokens[total + 2] = ANSWER, FIRST_NUMBER + value, EOS
        total += 3
        lengths[row], instance[row] = length + _FRAME, code
    return total


@compiled
def _draw_expression(state: np.ndarray, size: int, modulus: int, pending: np.ndarray, tokens: np.ndarray) -> int:
    """Writes an expression of `size` operators into `tokens`, and says its length. `pending`: room for a stack."""
    pending[0] = size
    waiting, length = 1, 0
    while waiting:
        waiting -= 1
        operators = pending[waiting]
        if operators == 0:
            tokens[length] = FIRST_NUMBER + below(state, modulus)
        else:
            tokens[length] = PLUS + below(state, 3)
            left = below(state, operators)
            pending[waiting], pending[waiting + 1] = operators - 1 - left, left
            waiting += 2
        length += 1
    return length


@compiled
def _apply(operator: int, left: int, right: int, modulus: int) -> int:
    """The value of an operator."""
    if operator == PLUS:
        return (left + right) % modulus
    if operator == MINUS:
        return (left - right) % modulus
    return (left * right) % modulus


@compiled
def _evaluate(expression: np.ndarray, modulus: int, values: np.ndarray) -> int:
    """The value of a well-formed expression; `values`: room for a stack."""
    held = 0
    for position in range(len(expression) - 1, -1, -1):
        token = expression[position]
        if token >= FIRST_NUMBER:
            values[held] = token - FIRST_NUMBER
            held += 1
            continue
        held -= 1
        values[held - 1] = _apply(token, values[held], values[held - 1], modulus)
    return values[0]


@compiled
def _count_needed(operator: int, left: int, left_needed: int, right: int, right_needed: int) -> int:
    """Operators whose values one must have for that of `operator`, by its arguments' values and what these need."""
    if operator == TIMES and left == 0 and right == 0:
        return 1 + min(left_needed, right_needed)
    if operator == TIMES and left == 0:
        return 1 + left_needed
    if operator == TIMES and right == 0:
        return 1 + right_needed
    return 1 + left_needed + right_needed


@compiled
def _label(
    tokens: np.ndarray,
    offsets: np.ndarray,
    modulus: int,
    difficulty: np.ndarray,
    height: np.ndarray,
    opened: np.ndarray,
    ended: np.ndarray,
    needed: np.ndarray,
) -> None:
    """Fills the labels, reading left to right: a stack holds every open operator, and its left argument once read."""
    longest = 0
    for row in range(len(difficulty)):
        longest = max(longest, offsets[row + 1] - offsets[row])
    operator = np.empty(longest, np.int64)
    left_height, left_size = np.empty(longest, np.int64), np.empty(longest, np.int64)
    left_value, left_needed = np.empty(longest, np.int64), np.empty(longest, np.int64)
    for row in range(len(difficulty)):
        depth = 0
        whole_height, whole_size, whole_value, whole_needed = 0, 0, 0, 0
        for position in range(offsets[row] + 2, offsets[row + 1]):
            token = tokens[position]
            if token == ANSWER:
                height[position], ended[position], needed[position] = whole_height, whole_size, whole_needed
                break
            if token < FIRST_NUMBER:
                operator[depth], left_height[depth] = token, -1
                depth += 1
            else:
                whole_height, whole_size, whole_value, whole_needed = 0, 0, token - FIRST_NUMBER, 0
                while depth and left_height[depth - 1] >= 0:
                    depth -= 1
                    sign, left = operator[depth], left_value[depth]
                    whole_height = 1 + max(whole_height, left_height[depth])
                    whole_size += 1 + left_size[depth]
                    whole_needed = _count_needed(sign, left, left_needed[depth], whole_value, whole_needed)
                    whole_value = _apply(sign, left, whole_value, modulus)
                if depth:
                    left_height[depth - 1], left_size[depth - 1] = whole_height, whole_size
                    left_value[depth - 1], left_needed[depth - 1] = whole_value, whole_needed
                height[position], ended[position], needed[position] = whole_height, whole_size, whole_needed
            opened[position] = depth
        difficulty[row] = whole_height

"""Layered context-free grammars: made from a seed, or read from the published JSON; sampling and exact probabilities.

A symbol of level l is rewritten by one of its rules, all equally likely, into symbols of level l + 1. Level 0 holds the
root alone, the last level the terminals. So every derivation ends, and all of a grammar's derivations have one height.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets_scripts.randomness import below, compiled, open_state, stream_key
from datasets_scripts.task import require

# rules[level][symbol] is the list of that symbol's rules, each a tuple of symbols of the next level.
Rules = tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]

# Rows of the chart grow with this; the longest published grammar reaches 3^7 = 2187.
MAX_SENTENCE = 4096


class Tables(NamedTuple):
    """A grammar as arrays for the compiled functions. Symbols are counted through all levels, the root being 0.

    Args:
        first_rule: Rules of symbol a are first_rule[a] .. first_rule[a + 1] - 1, (symbols + 1,).
        rules: The symbols of each rule, -1 after its end, (rules, longest rule).
        lengths: Symbols in each rule, (rules,).
        first_symbol: The symbols of level l are first_symbol[l] .. first_symbol[l + 1] - 1, (levels + 2,).
        span_room: How many different lengths the yield of each symbol can have, at most, (symbols,).
    """

    first_rule: np.ndarray
    rules: np.ndarray
    lengths: np.ndarray
    first_symbol: np.ndarray
    span_room: np.ndarray


@dataclass(frozen=True)
class Grammar:
    """A layered grammar: `height` rewritings lead from the root to the `num_terminals` terminals."""

    rules: Rules
    num_terminals: int
    tables: Tables = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self.rules, self.num_terminals)
        object.__setattr__(self, "tables", _make_tables(self.rules, self.num_terminals))
        require(
            self.longest <= MAX_SENTENCE, "rules", f"a longest sentence of {self.longest}", f"{MAX_SENTENCE} at most"
        )

    @property
    def height(self) -> int:
        return len(self.rules)

    @property
    def shortest(self) -> int:
        """Length of the shortest sentence."""
        return _yield_lengths(self.rules, self.num_terminals, min)[0][0]

    @property
    def longest(self) -> int:
        """Length of the longest sentence."""
        return _yield_lengths(self.rules, self.num_terminals, max)[0][0]

    @classmethod
    def random(
        cls, height: int, num_symbols: int, num_rules: int, rule_lengths: tuple[int, int], num_terminals: int, seed: int
    ) -> "Grammar":
        """Draws a grammar in which all symbols can be reached and no two symbols of a level share a rule.

        Args:
            height: Rewritings from the root to the terminals.
            num_symbols: Symbols on each level between them.
            num_rules: Rules of each symbol.
            rule_lengths: Least and largest number of symbols in a rule.
            num_terminals: Terminals.
            seed: Another one, another grammar. Candidates that are not usable are drawn again.
        """
        for name, value in (("height", height), ("num_symbols", num_symbols), ("num_rules", num_rules)):
            require(value >= 1, name, value, "at least 1")
        require(num_terminals >= 1, "num_terminals", num_terminals, "at least 1")
        shortest, longest = rule_lengths
        require(1 <= shortest <= longest, "rule_lengths", rule_lengths, "(least, largest), at least 1 and ascending")
        possible = sum(min(num_symbols, num_terminals) ** length for length in range(shortest, longest + 1))
        allowed = f"so few that {num_symbols} symbols can share {possible} possible rules"
        require(num_symbols * num_rules <= possible, "num_rules", num_rules, allowed)
        key = stream_key("grammar", height, num_symbols, num_rules, list(rule_lengths), num_terminals, seed)
        state = np.empty(1, np.uint64)
        widths = [1] + [num_symbols] * (height - 1) + [num_terminals]
        for attempt in range(1000):
            open_state(state, key, 0, attempt)
            rules = tuple(
                _draw_level(state, widths[level], num_rules, widths[level + 1], rule_lengths) for level in range(height)
            )
            try:
                return cls(rules, num_terminals)
            except ValueError as error:
                reason = str(error)
        raise ValueError(
            f"No usable grammar in 1000 draws: allow longer rules, or fewer of them. The last one: {reason}"
        )

    @classmethod
    def read(cls, path: str | Path) -> "Grammar":
        """Reads the layout of the published grammars (cfg3b.json and others): "all" holds the levels, each a list of
        symbols with "children", and the last one the terminals."""
        try:
            levels = json.loads(Path(path).read_text())["all"]
            rules = tuple(
                tuple(tuple(tuple(rule) for rule in symbol.get("children") or ()) for symbol in level)
                for level in levels[:-1]
            )
            num_terminals = len(levels[-1])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The grammar file {path} cannot be read ({type(error).__name__}: {error}): it must be JSON with a "
                'field "all" that holds the levels, each a list of symbols with "children", and the terminals last.'
            ) from error
        return cls(rules, num_terminals)


def _draw_level(
    state: np.ndarray, num_symbols: int, num_rules: int, width: int, rule_lengths: tuple[int, int]
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The rules of a level's symbols, no two of them alike: else what two symbols yield could not be told apart."""
    shortest, longest = rule_lengths
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < num_symbols * num_rules:
        length = shortest + below(state, longest - shortest + 1)
        drawn[tuple(int(below(state, width)) for _ in range(length))] = None
    rules = list(drawn)
    return tuple(tuple(rules[symbol * num_rules : (symbol + 1) * num_rules]) for symbol in range(num_symbols))


def _check(rules: Rules, num_terminals: int) -> None:
    """Refuses a grammar that is not layered, or has symbols that nothing reaches or that never end."""
    require(len(rules) >= 1 and len(rules[0]) == 1, "rules", [len(level) for level in rules], "one root on level 0")
    require(1 <= num_terminals < 256, "num_terminals", num_terminals, "1 to 255")
    reached = {0}
    for number, level in enumerate(rules):
        width = len(rules[number + 1]) if number + 1 < len(rules) else num_terminals
        unreached = sorted(set(range(len(level))) - reached)
        require(
            not unreached, f"level {number}", f"with symbols {unreached} that no rule reaches", "reached throughout"
        )
        reached = set()
        for symbol, own in enumerate(level):
            name = f"rules of symbol {symbol} on level {number}"
            require(len(own) > 0, name, list(own), "at least one, or its derivations would never end")
            for rule in own:
                fits = len(rule) > 0 and all(type(child) is int and 0 <= child < width for child in rule)
                require(fits, name, rule, f"of symbols 0 to {width - 1} of level {number + 1}")
                reached.update(rule)
            require(len(set(own)) == len(own), name, own, "different from one another")
    unreached = sorted(set(range(num_terminals)) - reached)
    require(not unreached, "terminals", f"with {unreached} that no rule reaches", "reached throughout")


def _yield_lengths(rules: Rules, num_terminals: int, extreme: Callable[..., int]) -> list[list[int]]:
    """The least or largest (`extreme`: min or max) length of what each symbol yields, level by level."""
    levels = [[1] * num_terminals]
    for level in reversed(rules):
        below_it = levels[0]
        levels.insert(0, [extreme(sum(below_it[child] for child in rule) for rule in own) for own in level])
    return levels


def _make_tables(rules: Rules, num_terminals: int) -> Tables:
    widths = [len(level) for level in rules] + [num_terminals]
    first_symbol = np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)
    flat = [
        [int(first_symbol[number + 1]) + child for child in rule]
        for number, level in enumerate(rules)
        for own in level
        for rule in own
    ]
    counts = [len(own) for level in rules for own in level]
    shortest, longest = (np.concatenate(_yield_lengths(rules, num_terminals, extreme)) for extreme in (min, max))
    lengths = np.array([len(rule) for rule in flat], np.int64)
    table = np.full((len(flat), lengths.max()), -1, np.int64)
    for row, rule in enumerate(flat):
        table[row, : len(rule)] = rule
    return Tables(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), table, lengths, first_symbol, longest - shortest + 1
    )


def next_token_distribution(grammar: Grammar, sentence: Sequence[int] | np.ndarray) -> np.ndarray:
    """The exact distribution of what comes next, over all derivations, after every prefix of `sentence`.

    Args:
        sentence: Terminals 0 .. num_terminals - 1, (n,).

    Returns:
        (n + 1, num_terminals + 1): row k is after k terminals; the last column is the end of the sentence. Rows of
        prefixes that no sentence has are 0.

    Raises:
        ValueError: Where probabilities overflow: some rules are long and without choices, say, others full of them.
    """
    terminals = np.asarray(sentence, dtype=np.int64)
    weights = _next_weights(grammar.tables, terminals)
    totals = weights.sum(axis=1, keepdims=True)
    if not np.isfinite(totals).all():
        found, allowed = "one whose probabilities leave fp64's range", "of rules whose choices are spread more evenly"
        raise ValueError(f"`grammar` is {found}, but must be {allowed} over the terminals.")
    return np.divide(weights, totals, out=np.zeros_like(weights), where=totals > 0)


def entropy(distribution: np.ndarray) -> np.ndarray:
    """Entropy in nats of each row of (..., outcomes); of a row of zeros 0."""
    logs = np.log(distribution, out=np.zeros_like(distribution), where=distribution > 0)
    return np.maximum(-(distribution * logs).sum(axis=-1), 0.0)


@compiled
def derive(state: np.ndarray, tables: Tables, sentence: np.ndarray, ended: np.ndarray) -> int:
    """Writes a sentence, and for each terminal the height of the highest constituent that ends there; its length."""
    height = len(tables.first_symbol) - 2
    num_inner = tables.first_symbol[height]
    # A stack of (symbol, levels below it, height of the highest constituent that ends where it ends).
    stack = np.empty((height * tables.rules.shape[1] + 1, 3), np.int64)
    stack[0, 0], stack[0, 1], stack[0, 2] = 0, height, height
    waiting, length = 1, 0
    while waiting:
        waiting -= 1
        symbol, below_it, highest = stack[waiting]
        if symbol >= num_inner:
            sentence[length], ended[length] = symbol - num_inner, highest
            length += 1
            continue
        first = tables.first_rule[symbol]
        rule = first + below(state, tables.first_rule[symbol + 1] - first)
        last = tables.lengths[rule] - 1
        for child in range(last, -1, -1):
            stack[waiting, 0], stack[waiting, 1] = tables.rules[rule, child], below_it - 1
            stack[waiting, 2] = highest if child == last else below_it - 1
            waiting += 1
    return length


@compiled
def _next_weights(tables: Tables, sentence: np.ndarray) -> np.ndarray:
    """Weights (n + 1, terminals + 1), proportional by row to the probabilities of what follows each prefix.

    Two passes over charts that are lists, since few spans can be derived. Up: `ends` and `inside` hold, for a symbol
    and a start, where it can end and how probable it is to yield what lies between. Down: `outside[a, i]` is the
    probability that, i terminals having been read, a symbol a begins. A terminal's outside is the wanted weight.
    Each terminal counts as 2^scale instead of 1, which cancels in a row and keeps long sentences from underflowing.
    """
    height = len(tables.first_symbol) - 2
    num_inner, num_symbols = tables.first_symbol[height], tables.first_symbol[height + 1]
    length = len(sentence)
    boost = 2.0 ** _bits_per_terminal(tables, height)
    counts = np.zeros((num_symbols, length + 1), np.int64)
    room = length + 2
    ends, inside = [np.empty((0, 0), np.int64)], [np.empty((0, 0), np.float64)]
    ends.clear()
    inside.clear()
    for symbol in range(num_symbols):
        width = min(tables.span_room[symbol], room)
        starts = 1 if symbol == 0 else length + 1
        ends.append(np.empty((starts, width), np.int64))
        inside.append(np.empty((starts, width), np.float64))
    for start in range(length):
        symbol = num_inner + sentence[start]
        if num_inner <= symbol < num_symbols:
            counts[symbol, start], ends[symbol][start, 0], inside[symbol][start, 0] = 1, start + 1, boost
    total, partial, following = np.zeros(room), np.zeros(room), np.zeros(room)
    for symbol in range(num_inner - 1, -1, -1):
        for start in range(1 if symbol == 0 else length):
            _add_spans(tables, symbol, start, counts, ends, inside, total, partial, following)
    outside = np.zeros((num_symbols, length + 1))
    outside[0, 0] = 1.0
    for symbol in range(num_inner):
        for start in range(length + 1):
            if outside[symbol, start] > 0:
                _pass_down(tables, symbol, start, counts, ends, inside, outside, partial, following)
    weights = np.zeros((length + 1, num_symbols - num_inner + 1))
    for place in range(length + 1):
        for terminal in range(num_symbols - num_inner):
            weights[place, terminal] = outside[num_inner + terminal, place]
    for found in range(counts[0, 0]):
        weights[ends[0][0, found], -1] = inside[0][0, found]
    return weights


@compiled
def _bits_per_terminal(tables: Tables, height: int) -> float:
    """About how many bits of choice a derivation spends on each terminal."""
    bits, terminals, nodes = 0.0, 1.0, 1.0
    for level in range(height):
        first, last = tables.first_symbol[level], tables.first_symbol[level + 1]
        first_rule, last_rule = tables.first_rule[first], tables.first_rule[last]
        bits += nodes * np.log2((last_rule - first_rule) / (last - first))
        nodes *= tables.lengths[first_rule:last_rule].mean()
        terminals = nodes
    return bits / terminals


@compiled
def _advance(
    child: int,
    before: np.ndarray,
    low: int,
    high: int,
    counts: np.ndarray,
    ends: list[np.ndarray],
    inside: list[np.ndarray],
    after: np.ndarray,
) -> tuple[int, int]:
    """Moves weights `before`[low..high] over a `child` that begins there, into `after`[low..high], which it returns."""
    new_low, new_high = len(after), -1
    for place in range(low, high + 1):
        weight = before[place]
        before[place] = 0.0
        if weight == 0.0 or place >= counts.shape[1]:
            continue
        for found in range(counts[child, place]):
            end = ends[child][place, found]
            after[end] += weight * inside[child][place, found]
            new_low, new_high = min(new_low, end), max(new_high, end)
    return new_low, new_high


@compiled
def _add_spans(
    tables: Tables,
    symbol: int,
    start: int,
    counts: np.ndarray,
    ends: list[np.ndarray],
    inside: list[np.ndarray],
    total: np.ndarray,
    partial: np.ndarray,
    following: np.ndarray,
) -> None:
    """Fills the spans of `symbol` from `start`, those of all lower levels being known. The last three: room, all 0."""
    first, last = tables.first_rule[symbol], tables.first_rule[symbol + 1]
    low, high = len(total), -1
    for rule in range(first, last):
        partial[start] = 1.0 / (last - first)
        from_, to = start, start
        now, then = partial, following
        for child in range(tables.lengths[rule]):
            from_, to = _advance(tables.rules[rule, child], now, from_, to, counts, ends, inside, then)
            now, then = then, now
        for end in range(from_, to + 1):
            total[end] += now[end]
            now[end] = 0.0
        low, high = min(low, from_), max(high, to)
    for end in range(low, high + 1):
        if total[end] > 0:
            found = counts[symbol, start]
            ends[symbol][start, found], inside[symbol][start, found] = end, total[end]
            counts[symbol, start] = found + 1
            total[end] = 0.0


@compiled
def _pass_down(
    tables: Tables,
    symbol: int,
    start: int,
    counts: np.ndarray,
    ends: list[np.ndarray],
    inside: list[np.ndarray],
    outside: np.ndarray,
    partial: np.ndarray,
    following: np.ndarray,
) -> None:
    """Adds to `outside` what a `symbol` that begins at `start` gives to the symbols of its rules."""
    first, last = tables.first_rule[symbol], tables.first_rule[symbol + 1]
    for rule in range(first, last):
        partial[start] = outside[symbol, start] / (last - first)
        low, high = start, start
        now, then = partial, following
        for place in range(tables.lengths[rule]):
            child = tables.rules[rule, place]
            for begin in range(low, high + 1):
                outside[child, begin] += now[begin]
            low, high = _advance(child, now, low, high, counts, ends, inside, then)
            now, then = then, now
        for end in range(low, high + 1):
            now[end] = 0.0

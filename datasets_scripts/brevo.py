"""BREVO: all ancestors of a vertex of a directed acyclic graph, parents before children.

    <bos> 4 2 4 7 2 7 9 2 <query> 2 <ans> 4 9 2 <eos>

The prompt lists the edges, parent then child, in random order; the answer any topological order of the query and its
ancestors. Since the order is free, a reader must have sorted the graph before the first answer token.
From Allen-Zhu (arXiv 2512.17351). Chosen here, where his paper and his published generator differ or fail: the query is
uniform over the last quarter of the vertices (the generator always takes the last), every vertex has an edge, every
word has an id of its own, and names come from a pool that is as large as the largest graph, so that larger graphs hold
no unknown names.
"""

import math
from dataclasses import dataclass

import numpy as np

from datasets_scripts.randomness import (
    MAX_ATTEMPTS,
    below,
    choose,
    compiled,
    hundredth_of,
    mix,
    open_state,
    shuffle,
    stream_key,
)
from datasets_scripts.task import Batch, Labels, Task, TaskConfig, malformed, refuse_empty, require
from datasets_scripts.vocabulary import (
    ANSWER,
    BOS,
    EOS,
    FIRST_LAST_LETTER,
    FIRST_LETTER,
    FIRST_NUMBER,
    NUM_LETTERS,
    NUM_NUMBERS,
    QUERY,
    WORDS,
)

# (num_names, num_letters, min_letters, max_letters), as the compiled functions take them.
Names = tuple[int, int, int, int]

MAX_PARENTS = 4
MAX_CHILDREN = 4
# A table of all names must fit into memory.
_MAX_NAMES = 2**20


@dataclass(frozen=True)
class BrevoConfig(TaskConfig):
    """Graphs of `min_size` to `max_size` vertices.

    Args:
        num_names: Names are the numbers 1 to `num_names`; 0: names are words of letters.
        num_letters: Letters that words are made of; the last letter of a word is a capital.
        min_letters: Letters in the shortest word.
        max_letters: Letters in the longest word. The length of a word is uniform, then its letters are.
    """

    min_size: int = 3
    max_size: int = 110
    extrapolation_size: int = 220
    num_names: int = 220
    num_letters: int = 0
    min_letters: int = 0
    max_letters: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.min_size >= 3, "min_size", self.min_size, "at least 3: below, the last quarter has no child")
        require(0 <= self.num_names < NUM_NUMBERS, "num_names", self.num_names, f"0 to {NUM_NUMBERS - 1}")
        if self.num_names:
            require(
                self.num_letters == self.min_letters == self.max_letters == 0,
                "num_letters, min_letters, max_letters",
                (self.num_letters, self.min_letters, self.max_letters),
                f"0 while num_names={self.num_names} makes names numbers",
            )
        else:
            require(1 <= self.num_letters <= NUM_LETTERS, "num_letters", self.num_letters, f"1 to {NUM_LETTERS}")
            require(self.min_letters >= 1, "min_letters", self.min_letters, "at least 1")
            require(
                self.max_letters >= self.min_letters, "max_letters", self.max_letters, f"at least {self.min_letters}"
            )
            allowed = f"so small that (num_letters + 1) ** max_letters is at most {_MAX_NAMES}"
            require((self.num_letters + 1) ** self.max_letters <= _MAX_NAMES, "max_letters", self.max_letters, allowed)
        allowed = f"at most {self.available_names}, the number of names"
        require(self.extrapolation_size <= self.available_names, "extrapolation_size", self.extrapolation_size, allowed)

    @property
    def available_names(self) -> int:
        """How many different names there are."""
        words = sum(self.num_letters**length for length in range(self.min_letters, self.max_letters + 1))
        return self.num_names or words


def _numbers(max_size: int) -> BrevoConfig:
    return BrevoConfig(max_size=max_size, extrapolation_size=2 * max_size, num_names=2 * max_size)


def _words(max_size: int) -> BrevoConfig:
    return BrevoConfig(
        max_size=max_size, extrapolation_size=2 * max_size, num_names=0, num_letters=4, min_letters=2, max_letters=4
    )


PRESETS = {
    "mini": _numbers(8),
    "paper": _numbers(110),
    "paper-90": _numbers(90),
    "paper-70": _numbers(70),
    "paper-words": _words(50),
    "paper-words-40": _words(40),
    "paper-words-30": _words(30),
}


class Brevo(Task):
    """All ancestors of a vertex in topological order."""

    name = "brevo"
    config_class = BrevoConfig
    size_meaning = "vertices of the graph"
    difficulty_meaning = "edges on the longest path among the query and its ancestors"
    token_difficulty_meaning = (
        "edges on the longest path among those ancestors (query included) that are not yet emitted; 0 before `<ans>`"
    )
    features = {
        "num_vertices_static": "vertices of the graph",
        "num_edges_static": "edges of the graph",
        "in_degree_static": "parents of the vertex last read, in the whole graph",
        "out_degree_static": "children of the vertex last read, in the whole graph",
        "hub_out_degree_static": "children of the vertex that has most",
        "dfs_depth_state": (
            "depth at which the vertex last read is found by a depth-first search from the query to its ancestors, "
            "parents in ascending order; 0 before `<ans>` and for what is no ancestor"
        ),
        "frontier_size_state": "ancestors not yet emitted whose parents all are; 0 before `<ans>`",
        "newly_enabled_state": "members of the frontier that this token added; at `<ans>` all of them",
    }
    scoring = "greedy: the completion must hold exactly the ancestors and the query, parents first, and `<eos>`"
    config: BrevoConfig

    def draw(
        self, key: np.uint64, sizes: tuple[int, int], part: tuple[int, int], weighted: bool, indices: np.ndarray
    ) -> Batch:
        """Size n has weight 1 / (n + sqrt(max_size)) if `weighted`, so that small graphs are frequent; else 1."""
        candidates = np.arange(sizes[0], sizes[1] + 1)
        weights = 1 / (candidates + math.sqrt(sizes[1])) if weighted else np.ones(len(candidates))
        cumulative = np.cumsum(weights) / weights.sum()
        tokens = np.empty(len(indices) * self.longest_example(sizes[1]), np.int32)
        rows = np.empty((3, len(indices)), np.int32)
        instance = np.empty(len(indices), np.uint64)
        start = stream_key("brevo", bool(self.config.num_names))
        total = _draw(key, sizes, part, cumulative, self._names(), indices, start, tokens, rows, instance)
        if total < 0:
            refuse_empty(self, sizes, part)
        offsets = np.concatenate([[0], np.cumsum(rows[0], dtype=np.int64)])
        return Batch(tokens[:total].copy(), offsets, rows[1], rows[2], instance)

    def label(self, batch: Batch) -> Labels:
        difficulty = np.zeros(len(batch), np.int32)
        longest_path = np.zeros(len(batch.tokens), np.float32)
        features = np.zeros((len(self.features), len(batch.tokens)), np.int32)
        _label(batch.tokens, batch.offsets, self._names(), difficulty, longest_path, features)
        return Labels(difficulty, longest_path, dict(zip(self.features, features, strict=True)))

    def check(self, prompt: list[int], completion: list[int]) -> str:
        parents, query = self._read_graph(prompt)
        wanted = ancestors(parents, query)
        emitted: set[tuple[int, ...]] = set()
        for vertex in self._split_names(completion, "completion"):
            if vertex not in wanted:
                return f"The answer holds {_spell(vertex)}, which is no ancestor of {_spell(query)}."
            if vertex in emitted:
                return f"The answer holds {_spell(vertex)} twice."
            missing = [parent for parent in parents.get(vertex, []) if parent not in emitted]
            if missing:
                return f"The answer holds {_spell(vertex)} before its parent {_spell(missing[0])}."
            emitted.add(vertex)
        left = sorted(wanted - emitted)
        return f"The answer lacks {_spell(left[0])}, one of {len(left)} that are missing." if left else ""

    def longest_example(self, size: int) -> int:
        # <bos>, two ends of each edge, <query> q <ans>, all vertices, <eos>
        return (2 * MAX_PARENTS * size + 1 + size) * max(1, self.config.max_letters) + 4

    def longest_answer(self, size: int) -> int:
        return size * max(1, self.config.max_letters) + 1

    def _read_graph(self, prompt: list[int]) -> tuple[dict[tuple[int, ...], list[tuple[int, ...]]], tuple[int, ...]]:
        """(the parents of every child, the query), vertices being the ids of their names."""
        if prompt.count(QUERY) != 1:
            malformed("The prompt does not have <query> once.")
        cut = prompt.index(QUERY)
        ends = self._split_names(prompt[1:cut], "prompt")
        query = self._split_names(prompt[cut + 1 : -1], "prompt")
        if len(ends) % 2 or not ends:
            malformed(f"The prompt names {len(ends)} ends of edges, but edges have two each.")
        if len(query) != 1 or query[0] not in ends:
            malformed("The prompt does not ask for one vertex of its graph.")
        parents: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for parent, child in zip(ends[::2], ends[1::2], strict=True):
            parents.setdefault(child, []).append(parent)
        return parents, query[0]

    def _split_names(self, ids: list[int], where: str) -> list[tuple[int, ...]]:
        """Names, each as the tuple of its ids; raises a MalformedError for what is no name."""
        names, word = [], []
        for identity in ids:
            number = FIRST_NUMBER < identity <= FIRST_NUMBER + self.config.num_names
            letter = FIRST_LETTER <= identity < FIRST_LETTER + self.config.num_letters
            last = FIRST_LAST_LETTER <= identity < FIRST_LAST_LETTER + self.config.num_letters
            if not (number or letter or last):
                malformed(f"The {where} has {WORDS[identity]}, which is not part of a name.")
            word.append(identity)
            if not letter:
                names.append(tuple(word))
                word = []
        if word:
            malformed(f"The {where} breaks off in the name {_spell(tuple(word))}.")
        return names

    def _names(self) -> Names:
        config = self.config
        return config.num_names, config.num_letters, config.min_letters, config.max_letters


def ancestors(parents: dict[tuple[int, ...], list[tuple[int, ...]]], vertex: tuple[int, ...]) -> set[tuple[int, ...]]:
    """`vertex` and all from which a path leads to it."""
    found, waiting = {vertex}, [vertex]
    while waiting:
        for parent in parents.get(waiting.pop(), []):
            if parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found


def _spell(name: tuple[int, ...]) -> str:
    return " ".join(WORDS[identity] for identity in name)


@compiled
def _num_codes(names: Names) -> int:
    """One more than the largest code of a name. Codes ascend as the names do."""
    return names[0] + 1 if names[0] else (names[1] + 1) ** names[3]


@compiled
def _draw_name(state: np.ndarray, names: Names) -> int:
    """The code of a random name."""
    if names[0]:
        return 1 + below(state, names[0])
    length = names[2] + below(state, names[3] - names[2] + 1)
    code = 0
    for position in range(names[3]):
        digit = 1 + below(state, names[1]) if position < length else 0
        code = code * (names[1] + 1) + digit
    return code


@compiled
def _write_name(code: int, names: Names, tokens: np.ndarray, at: int) -> int:
    """Writes the name into `tokens` at `at`, and says where it ends."""
    if names[0]:
        tokens[at] = FIRST_NUMBER + code
        return at + 1
    base = names[1] + 1
    rest = base ** (names[3] - 1)
    while rest:
        digit = code // rest
        code -= digit * rest
        rest //= base
        tokens[at] = (FIRST_LETTER if code else FIRST_LAST_LETTER) + digit - 1
        at += 1
        if code == 0:
            break
    return at


@compiled
def _read_name(tokens: np.ndarray, at: int, end: int, names: Names) -> tuple[int, int]:
    """(code, position after its last token) of the name at `at`; code -1 if what stands there is no name."""
    if names[0]:
        code = tokens[at] - FIRST_NUMBER
        return (code if 0 < code <= names[0] else -1), at + 1
    base = names[1] + 1
    code, worth = 0, base ** (names[3] - 1)
    for position in range(at, end):
        capital = tokens[position] >= FIRST_LAST_LETTER
        digit = tokens[position] - (FIRST_LAST_LETTER if capital else FIRST_LETTER) + 1
        if worth == 0 or not 1 <= digit <= names[1]:
            return -1, position + 1
        code += digit * worth
        worth //= base
        if capital:
            return code, position + 1
    return -1, end


@compiled
def _draw(
    key: np.uint64,
    sizes: tuple[int, int],
    part: tuple[int, int],
    cumulative: np.ndarray,
    names: Names,
    indices: np.ndarray,
    start: np.uint64,
    tokens: np.ndarray,
    rows: np.ndarray,
    instance: np.ndarray,
) -> int:
    """Fills `tokens`, `rows` (length, answer_start, size) and `instance`; the number of tokens, or -1."""
    state = np.empty(1, np.uint64)
    most = sizes[1]
    edges = np.empty((MAX_PARENTS * most, 2), np.int64)
    vertex_names, order = np.empty(most, np.int64), np.empty(most, np.int64)
    used = np.zeros(_num_codes(names), np.bool_)
    total = 0
    for row in range(len(indices)):
        accepted = False
        for attempt in range(MAX_ATTEMPTS):
            open_state(state, key, indices[row], attempt)
            size = sizes[0] + choose(state, cumulative)
            num_edges = _draw_edges(state, size, edges)
            while not _all_named(edges[:num_edges], size):
                num_edges = _draw_edges(state, size, edges)
            _draw_names(state, names, used, vertex_names[:size])
            quarter = 3 * size // 4
            query = quarter + below(state, size - quarter)
            code = mix(start ^ np.uint64(vertex_names[query]))
            for edge in range(num_edges):
                # A sum does not depend on the order of the edges: the canonical form is their set.
                pair = vertex_names[edges[edge, 0]] * (1 << 32) + vertex_names[edges[edge, 1]]
                code += mix(start + np.uint64(pair))
            code = mix(code)
            if part[0] <= hundredth_of(code) < part[1]:
                accepted = True
                break
        if not accepted:
            return -1
        begin = total
        tokens[total] = BOS
        total += 1
        shuffle(state, edges[:num_edges])
        for edge in range(num_edges):
            total = _write_name(vertex_names[edges[edge, 0]], names, tokens, total)
            total = _write_name(vertex_names[edges[edge, 1]], names, tokens, total)
        tokens[total] = QUERY
        total = _write_name(vertex_names[query], names, tokens, total + 1)
        tokens[total] = ANSWER
        total += 1
        rows[1, row], rows[2, row], instance[row] = total - begin, size, code
        num_ancestors = _draw_order(state, size, edges[:num_edges], query, order)
        for position in range(num_ancestors):
            total = _write_name(vertex_names[order[position]], names, tokens, total)
        tokens[total] = EOS
        total += 1
        rows[0, row] = total - begin
    return total


@compiled
def _draw_edges(state: np.ndarray, size: int, edges: np.ndarray) -> int:
    """Writes the edges (earlier vertex, later vertex) of a random graph, and says how many they are."""
    out_degree, free = np.zeros(size, np.int64), np.empty(size, np.int64)
    sources = 1 + below(state, (size - 1) // 4 + 1)
    num_edges, num_free = 0, sources
    for vertex in range(sources):
        free[vertex] = vertex
    for vertex in range(sources, size):
        num_parents = min(1 + below(state, MAX_PARENTS), num_free)
        for chosen in range(num_parents):
            other = chosen + below(state, num_free - chosen)
            free[chosen], free[other] = free[other], free[chosen]
            edges[num_edges, 0], edges[num_edges, 1] = free[chosen], vertex
            num_edges += 1
        kept = 0
        for place in range(num_free):
            out_degree[free[place]] += place < num_parents
            if out_degree[free[place]] < MAX_CHILDREN:
                free[kept] = free[place]
                kept += 1
        free[kept] = vertex
        num_free = kept + 1
    return num_edges


@compiled
def _all_named(edges: np.ndarray, size: int) -> bool:
    """Whether every vertex has an edge. A source that nobody chose would not be in the text, and the graph smaller."""
    named = np.zeros(size, np.bool_)
    for edge in range(len(edges)):
        named[edges[edge, 0]] = named[edges[edge, 1]] = True
    return bool(named.all())


@compiled
def _draw_names(state: np.ndarray, names: Names, used: np.ndarray, vertex_names: np.ndarray) -> None:
    """Fills `vertex_names` with different codes; `used` is all False, before and after."""
    for vertex in range(len(vertex_names)):
        code = _draw_name(state, names)
        while used[code]:
            code = _draw_name(state, names)
        used[code] = True
        vertex_names[vertex] = code
    for code in vertex_names:
        used[code] = False


@compiled
def _draw_order(state: np.ndarray, size: int, edges: np.ndarray, query: int, order: np.ndarray) -> int:
    """Writes `query` and its ancestors in topological order, at each step any of those that can come next."""
    first, parents = _group_by_child(edges, size)
    wanted, missing = np.zeros(size, np.bool_), np.zeros(size, np.int64)
    wanted[query] = True
    num_wanted = 0
    for vertex in range(size - 1, -1, -1):
        if wanted[vertex]:
            num_wanted += 1
            missing[vertex] = first[vertex + 1] - first[vertex]
            for place in range(first[vertex], first[vertex + 1]):
                wanted[parents[place]] = True
    first_child, children = _group_by_child(edges[:, ::-1], size)
    frontier, num_frontier = np.empty(size, np.int64), 0
    for vertex in range(size):
        if wanted[vertex] and missing[vertex] == 0:
            frontier[num_frontier] = vertex
            num_frontier += 1
    for position in range(num_wanted):
        place = below(state, num_frontier)
        vertex = frontier[place]
        order[position] = vertex
        num_frontier -= 1
        frontier[place] = frontier[num_frontier]
        for at in range(first_child[vertex], first_child[vertex + 1]):
            child = children[at]
            if wanted[child]:
                missing[child] -= 1
                if missing[child] == 0:
                    frontier[num_frontier] = child
                    num_frontier += 1
    return num_wanted


@compiled
def _group_by_child(edges: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(first, parents): the parents of vertex v are parents[first[v]:first[v + 1]], in the order of the edges."""
    first = np.zeros(size + 2, np.int64)
    for edge in range(len(edges)):
        first[edges[edge, 1] + 2] += 1
    for vertex in range(size + 1):
        first[vertex + 1] += first[vertex]
    parents = np.empty(len(edges), np.int64)
    for edge in range(len(edges)):
        parents[first[edges[edge, 1] + 1]] = edges[edge, 0]
        first[edges[edge, 1] + 1] += 1
    return first[:-1], parents


@compiled
def _label(
    tokens: np.ndarray,
    offsets: np.ndarray,
    names: Names,
    difficulty: np.ndarray,
    longest_path: np.ndarray,
    features: np.ndarray,
) -> None:
    """Fills the labels, reading nothing but the text: so they can be had for what a model wrote, right or wrong."""
    vertex_of = np.full(_num_codes(names), -1, np.int64)
    for row in range(len(difficulty)):
        end = offsets[row + 1]
        text = tokens[:end]
        edges, codes, at = _read_edges(text, offsets[row] + 1, names, vertex_of)
        size = len(codes)
        in_degree, out_degree = np.zeros(size, np.int64), np.zeros(size, np.int64)
        for edge in range(len(edges)):
            out_degree[edges[edge, 0]] += 1
            in_degree[edges[edge, 1]] += 1
        features[0, offsets[row] : end] = size
        features[1, offsets[row] : end] = len(edges)
        features[4, offsets[row] : end] = out_degree.max() if size else 0
        _label_degrees(text, offsets[row] + 1, names, vertex_of, in_degree, out_degree, features)
        query = -1
        if at < end and text[at] == QUERY and at + 1 < end:
            code, at = _read_name(text, at + 1, end, names)
            query = vertex_of[code] if code >= 0 else -1
        if query >= 0 and at < end and text[at] == ANSWER:
            difficulty[row] = _label_answer(text, at, names, vertex_of, edges, codes, query, longest_path, features)
        for code in codes:
            vertex_of[code] = -1


@compiled
def _read_edges(text: np.ndarray, at: int, names: Names, vertex_of: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(edges as pairs of vertices, the code of each vertex, position after them). Vertices count as they appear."""
    edges = np.empty(((len(text) - at) // 2 + 1, 2), np.int64)
    codes = np.empty(len(text) - at + 1, np.int64)
    num_ends, size = 0, 0
    while at < len(text) and text[at] != QUERY:
        code, after = _read_name(text, at, len(text), names)
        if code < 0:
            break
        if vertex_of[code] < 0:
            vertex_of[code] = size
            codes[size] = code
            size += 1
        edges[num_ends // 2, num_ends % 2] = vertex_of[code]
        num_ends += 1
        at = after
    return edges[: num_ends // 2], codes[:size], at


@compiled
def _label_degrees(
    text: np.ndarray,
    at: int,
    names: Names,
    vertex_of: np.ndarray,
    in_degree: np.ndarray,
    out_degree: np.ndarray,
    features: np.ndarray,
) -> None:
    """The degrees of the vertex last read, at every token."""
    vertex, read_until = -1, at
    while at < len(text):
        if text[at] == QUERY or text[at] == ANSWER or text[at] == EOS:
            code, read_until = -2, at + 1
        else:
            code, read_until = _read_name(text, at, len(text), names)
        for position in range(at, read_until):
            if position == read_until - 1 and code != -2:
                vertex = vertex_of[code] if code >= 0 else -1
            features[2, position] = in_degree[vertex] if vertex >= 0 else 0
            features[3, position] = out_degree[vertex] if vertex >= 0 else 0
        at = read_until


@compiled
def _label_answer(
    text: np.ndarray,
    at: int,
    names: Names,
    vertex_of: np.ndarray,
    edges: np.ndarray,
    codes: np.ndarray,
    query: int,
    longest_path: np.ndarray,
    features: np.ndarray,
) -> int:
    """Labels the positions from `<ans>` (at `at`) on; the longest path among all ancestors."""
    size = len(codes)
    first, parents = _group_by_child(edges, size)
    depth = _search_depths(first, parents, codes, query)
    order = _sort_ancestors(edges, depth)
    emitted, on_frontier, length = np.zeros(size, np.bool_), np.zeros(size, np.bool_), np.zeros(size, np.int64)
    vertex = query
    difficulty = -1
    while True:
        remaining, frontier, added = 0, 0, 0
        for place in range(len(order)):
            ancestor = order[place]
            if emitted[ancestor]:
                continue
            length[ancestor] = 0
            free = True
            for parent in parents[first[ancestor] : first[ancestor + 1]]:
                if not emitted[parent]:
                    free = False
                    length[ancestor] = max(length[ancestor], length[parent] + 1)
            remaining = max(remaining, length[ancestor])
            if free:
                frontier += 1
                added += not on_frontier[ancestor]
                on_frontier[ancestor] = True
        if difficulty < 0:
            difficulty = remaining
        after = at + 1
        code = -2
        if after < len(text) and text[after] != EOS:
            code, after = _read_name(text, after, len(text), names)
        # This state holds until the next name is complete; what a token added is counted there alone.
        for position in range(at, after - 1 if code != -2 else len(text)):
            longest_path[position] = remaining
            features[5, position] = max(depth[vertex], 0) if vertex >= 0 else 0
            features[6, position] = frontier
            features[7, position] = added if position == at else 0
        if code == -2:
            return difficulty
        vertex = vertex_of[code] if code >= 0 else -1
        if vertex >= 0 and depth[vertex] >= 0:
            emitted[vertex] = True
        at = after - 1


@compiled
def _search_depths(first: np.ndarray, parents: np.ndarray, codes: np.ndarray, query: int) -> np.ndarray:
    """Depth of every ancestor in a depth-first search from `query`, parents by ascending name; -1 for all others."""
    depth = np.full(len(codes), -1, np.int64)
    by_name = parents.copy()
    for vertex in range(len(codes)):
        # Sorted by insertion: they are few, and a library's sort takes seconds to compile.
        for last in range(first[vertex] + 1, first[vertex + 1]):
            place = last
            while place > first[vertex] and codes[by_name[place]] < codes[by_name[place - 1]]:
                by_name[place], by_name[place - 1] = by_name[place - 1], by_name[place]
                place -= 1
    path, next_parent = np.empty(len(codes), np.int64), first[:-1].copy()
    path[0], depth[query] = query, 0
    level = 0
    while level >= 0:
        vertex = path[level]
        if next_parent[vertex] == first[vertex + 1]:
            level -= 1
            continue
        parent = by_name[next_parent[vertex]]
        next_parent[vertex] += 1
        if depth[parent] < 0:
            level += 1
            path[level], depth[parent] = parent, level
    return depth


@compiled
def _sort_ancestors(edges: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """The vertices whose depth is not -1, parents first (those of a cycle, which no generated graph has, left out)."""
    size = len(depth)
    missing, order = np.zeros(size, np.int64), np.empty(size, np.int64)
    first, children = _group_by_child(edges[:, ::-1], size)
    for edge in range(len(edges)):
        missing[edges[edge, 1]] += 1
    sorted_until = 0
    for vertex in range(size):
        if depth[vertex] >= 0 and missing[vertex] == 0:
            order[sorted_until] = vertex
            sorted_until += 1
    place = 0
    while place < sorted_until:
        for child in children[first[order[place]] : first[order[place] + 1]]:
            missing[child] -= 1
            if missing[child] == 0 and depth[child] >= 0:
                order[sorted_until] = child
                sorted_until += 1
        place += 1
    return order[:sorted_until]

"""BREVO: graphs and labels against networkx."""

import networkx as nx
import numpy as np
import pytest

from datasets_scripts.brevo import PRESETS, Brevo, BrevoConfig
from datasets_scripts.columns import make_table
from datasets_scripts.task import Batch
from datasets_scripts.vocabulary import decode, encode


def read_names(words):
    """Names as tuples of words: a number is one, a word of letters ends in a capital."""
    names, word = [], []
    for part in words:
        word.append(part)
        if not part.islower():
            names.append(tuple(word))
            word = []
    assert not word
    return names


def order_of(name):
    return tuple(int(part) if part.isdigit() else ord(part.lower()) for part in name)


def read_graph(words):
    cut = words.index("<query>")
    ends = read_names(words[1:cut])
    graph = nx.DiGraph()
    graph.add_edges_from(zip(ends[::2], ends[1::2], strict=True))
    assert graph.number_of_edges() == len(ends) // 2, "an edge stands twice"
    (query,) = read_names(words[cut + 1 : words.index("<ans>")])
    return graph, query


def dfs_depths(graph, query):
    found = {}

    def visit(vertex, depth):
        found[vertex] = depth
        for parent in sorted(graph.predecessors(vertex), key=order_of):
            if parent not in found:
                visit(parent, depth + 1)

    visit(query, 0)
    return found


def expected_labels(words):
    """The labels of an example from its words, by networkx, recomputed from nothing at every position."""
    graph, query = read_graph(words)
    wanted = nx.ancestors(graph, query) | {query}
    depths, answer = dfs_depths(graph, query), words.index("<ans>")
    columns = {name: [] for name in ("token_difficulty", *Brevo.features)}
    vertex, frontier_before = None, set()
    for position in range(len(words)):
        body = [word for word in words[: position + 1] if not word.startswith("<")]
        complete = max((i + 1 for i, word in enumerate(body) if not word.islower()), default=0)
        read = read_names(body[:complete])
        vertex = read[-1] if read else None
        emitted = set()
        if position >= answer:
            after = [word for word in words[answer + 1 : position + 1] if word != "<eos>"]
            complete = max((i + 1 for i, word in enumerate(after) if not word.islower()), default=0)
            emitted = set(read_names(after[:complete])) & wanted
        left = graph.subgraph(wanted - emitted)
        inside = position >= answer
        frontier = {v for v in left if all(p in emitted for p in graph.predecessors(v))} if inside else set()
        columns["token_difficulty"].append(nx.dag_longest_path_length(left) if inside and len(left) else 0)
        columns["num_vertices_static"].append(graph.number_of_nodes())
        columns["num_edges_static"].append(graph.number_of_edges())
        columns["in_degree_static"].append(graph.in_degree(vertex) if vertex in graph else 0)
        columns["out_degree_static"].append(graph.out_degree(vertex) if vertex in graph else 0)
        columns["hub_out_degree_static"].append(max(degree for _, degree in graph.out_degree()))
        columns["dfs_depth_state"].append(depths.get(vertex, 0) if inside else 0)
        columns["frontier_size_state"].append(len(frontier))
        columns["newly_enabled_state"].append(len(frontier - frontier_before))
        frontier_before = frontier
    return columns, nx.dag_longest_path_length(graph.subgraph(wanted))


def check_row(task, words, labels, row, own):
    wanted, difficulty = expected_labels(words)
    assert labels.token_difficulty[own].tolist() == wanted.pop("token_difficulty")
    for name, values in wanted.items():
        assert labels.features[name][own].tolist() == values, (name, " ".join(words))
    assert labels.difficulty[row] == difficulty


@pytest.mark.parametrize(("name", "rows"), [("mini", 150), ("paper", 4), ("paper-words-30", 10)])
def test_graphs_answers_and_labels_agree_with_networkx(name, rows):
    task = Brevo(PRESETS[name])
    batch = task.generate("train", range(rows))
    labels = task.label(batch)
    for row in range(rows):
        own = slice(batch.offsets[row], batch.offsets[row + 1])
        words = decode(batch.tokens[own].tolist()).split()
        graph, query = read_graph(words)
        assert nx.is_directed_acyclic_graph(graph)
        assert max(degree for _, degree in graph.in_degree()) <= 4
        assert max(degree for _, degree in graph.out_degree()) <= 4
        assert graph.number_of_nodes() == batch.size[row]
        answer = read_names(words[batch.answer_start[row] : -1])
        assert set(answer) == nx.ancestors(graph, query) | {query}
        assert len(answer) == len(set(answer))
        place = {vertex: i for i, vertex in enumerate(answer)}
        assert all(place[a] < place[b] for a, b in graph.subgraph(answer).edges)
        check_row(task, words, labels, row, own)


@pytest.mark.parametrize("name", ["mini", "paper-words-30"])
def test_labels_of_what_a_model_wrote_come_from_the_text_alone(name):
    """Out of order, repeated or foreign vertices: the labels are those of what has really been emitted."""
    task = Brevo(PRESETS[name])
    rng = np.random.default_rng(0)
    for index in range(40):
        batch = task.generate("train", [index])
        words = decode(batch.tokens.tolist()).split()
        names = read_names([word for word in words if not word.startswith("<")])
        wrong = [names[i] for i in rng.integers(len(names), size=6)]
        spoilt = words[: batch.answer_start[0]] + [part for name in wrong for part in name] + ["<eos>"]
        tokens = np.array(encode(" ".join(spoilt)), np.int32)
        given = Batch(tokens, np.array([0, len(tokens)]), batch.answer_start, batch.size, batch.instance)
        check_row(task, spoilt, task.label(given), 0, slice(0, len(tokens)))


def test_any_topological_order_is_right_and_any_other_wrong():
    task = Brevo(PRESETS["mini"])
    for index in range(60):
        batch = task.generate("test", [index])
        words = decode(batch.tokens.tolist()).split()
        prompt = " ".join(words[: batch.answer_start[0]])
        graph, query = read_graph(words)
        needed = graph.subgraph(nx.ancestors(graph, query) | {query})
        orders = [" ".join(name for (name,) in order) for order in nx.all_topological_sorts(needed)]
        for order in orders[:20]:
            assert task.verify(prompt, f"{order} <eos>"), order
        rng = np.random.default_rng(index)
        for _ in range(10):
            order = " ".join(rng.permutation(orders[0].split()))
            verdict = task.verify(prompt, f"{order} <eos>")
            assert verdict.correct == (order in orders)
            assert verdict.correct or "before its parent" in verdict.reason


def test_the_verifier_says_why():
    task = Brevo(PRESETS["mini"])
    prompt = "<bos> 4 2 4 7 2 9 <query> 2 <ans>"
    assert task.verify(prompt, "4 2 <eos>")
    assert "lacks 2" in task.verify(prompt, "4 <eos>").reason
    assert "7, which is no ancestor of 2" in task.verify(prompt, "4 7 2 <eos>").reason
    assert "4 twice" in task.verify(prompt, "4 4 2 <eos>").reason
    assert "before its parent 4" in task.verify(prompt, "2 4 <eos>").reason
    assert "not part of a name" in task.verify(prompt, "4 + 2 <eos>").reason
    assert "one vertex" in task.verify("<bos> 4 2 <query> 9 <ans>", "4 <eos>").reason
    assert "two each" in task.verify("<bos> 4 2 9 <query> 2 <ans>", "4 2 <eos>").reason
    words = Brevo(PRESETS["paper-words-30"])
    assert words.verify("<bos> a B b C <query> b C <ans>", "a B b C <eos>")
    assert "breaks off in the name b" in words.verify("<bos> a B b C <query> b C <ans>", "a B b <eos>").reason


def test_queries_come_from_the_whole_last_quarter():
    """The published generator takes the larger of 3n/4 and n - 1: always the last vertex, which has no children."""
    task = Brevo(BrevoConfig(min_size=16, max_size=16, extrapolation_size=16, num_names=16))
    batch = task.generate("train", range(400))
    has_children = []
    for row in range(400):
        graph, query = read_graph(decode(batch.tokens[batch.offsets[row] : batch.offsets[row + 1]].tolist()).split())
        has_children.append(graph.out_degree(query) > 0)
    assert 0.2 < np.mean(has_children) < 0.8


def test_small_graphs_are_frequent_in_training_and_all_sizes_alike_in_evaluation():
    """Of a few thousand instances, as the smallest graphs of few names, a split may have more than its share."""
    task = Brevo(BrevoConfig(max_size=10, extrapolation_size=20, num_names=20))
    largest = task.config.max_size
    sizes = np.arange(3, largest + 1)
    weights = 1 / (sizes + np.sqrt(largest))
    found = np.bincount(task.generate("train", range(20_000)).size, minlength=largest + 1)[3:] / 20_000
    assert np.abs(found - weights / weights.sum()).max() < 0.02
    found = np.bincount(task.generate("test", range(20_000)).size, minlength=largest + 1)[3:] / 20_000
    assert np.abs(found - 1 / len(sizes)).max() < 0.02


def test_the_order_of_the_edges_does_not_make_another_instance():
    task = Brevo(PRESETS["mini"])
    rows = make_table(task, task.generate("train", range(3000))).to_pylist()
    hashes = task.generate("train", range(3000)).instance.tolist()
    by_form, by_hash = {}, {}
    for row, code in zip(rows, hashes, strict=True):
        graph, query = read_graph(row["text"].split())
        form = (tuple(sorted(graph.edges)), query)
        assert by_form.setdefault(form, code) == code
        assert by_hash.setdefault(code, form) == form
    assert len(by_form) < 3000, "no instance came twice: nothing was compared"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_size": 2}, "`min_size` is 2"),
        # Once an error of Python's, a traceback of NumPy's, and taken for 1.
        ({"max_size": "four"}, "`max_size` is 'four', but must be a whole number"),
        ({"max_size": 4.5}, "`max_size` is 4.5, but must be a whole number"),
        ({"num_letters": True}, "`num_letters` is True, but must be a whole number"),
        ({"num_names": 100}, "`extrapolation_size` is 220, but must be at most 100"),
        ({"num_names": 300}, "`num_names` is 300"),
        ({"num_letters": 4}, "num_letters"),
        ({"num_names": 0}, "`num_letters` is 0"),
        ({"num_names": 0, "num_letters": 27, "min_letters": 1, "max_letters": 2}, "`num_letters` is 27"),
        ({"num_names": 0, "num_letters": 2, "min_letters": 1, "max_letters": 3}, "at most 14, the number of names"),
        ({"num_names": 0, "num_letters": 4, "min_letters": 3, "max_letters": 2}, "`max_letters` is 2"),
        ({"num_names": 0, "num_letters": 26, "min_letters": 3, "max_letters": 7}, "`max_letters` is 7"),
    ],
)
def test_bad_configs_are_refused_by_field(fields, message):
    with pytest.raises(ValueError, match=message):
        BrevoConfig(**fields)

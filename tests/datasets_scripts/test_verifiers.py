"""Verifiers take text or ids, agree with their own data, and survive garbage."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets_scripts import get_task
from datasets_scripts.columns import make_table
from datasets_scripts.task import Batch, Verdict
from datasets_scripts.vocabulary import WORDS, decode

NAMES = ["mano-mini", "brevo-mini", "brevo-paper-words-30", "lano-mini"]
TASKS = {name: get_task(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_generated_answers_are_right_as_text_and_as_ids(name):
    task = TASKS[name]
    batch = task.generate("test", range(50))
    for number, row in enumerate(make_table(task, batch).to_pylist()):
        ids = batch.tokens[batch.offsets[number] : batch.offsets[number + 1]]
        assert task.verify(row["prompt"], row["completion"]) == Verdict(True)
        assert task.verify(ids[: row["answer_start"]], ids[row["answer_start"] :]) == Verdict(True)


@pytest.mark.parametrize("odd", [None, float("nan"), 2.7, True, "3", 10**30, -1])
def test_what_is_no_id_is_refused_not_rounded(odd):
    task = TASKS["mano-mini"]
    batch = task.generate("test", [0])
    ids = batch.tokens.tolist()
    cut = int(batch.answer_start[0])
    assert "which no task knows" in task.verify(ids[:cut], [odd, ids[-1]]).reason
    assert task.verify(batch.tokens[:cut], batch.tokens[cut:])


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_to_another_prompt_is_wrong(name):
    task = TASKS[name]
    rows = make_table(task, task.generate("test", range(60))).to_pylist()
    right = sum(task.verify(a["prompt"], b["completion"]).correct for a, b in itertools.pairwise(rows))
    assert right < 30


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_garbage_gets_a_verdict_with_a_reason(name, data):
    task = TASKS[name]
    words = st.lists(st.one_of(st.integers(-5, len(WORDS) + 5), st.integers(2, 20), st.integers(70, 80)), max_size=30)
    batch = task.generate("test", [data.draw(st.integers(0, 20))])
    cut = int(batch.answer_start[0])
    prompt = data.draw(st.one_of(words, st.just(batch.tokens[:cut].tolist())))
    completion = data.draw(st.one_of(words, words.map(lambda ids: [*ids, 3])))
    verdict = task.verify(prompt, completion)
    assert verdict.correct == (not verdict.reason)
    known = [identity for identity in completion if 0 <= identity < len(WORDS)]
    text = task.verify(
        decode([i for i in prompt if 0 <= i < len(WORDS)]), data.draw(st.one_of(st.text(), st.just(decode(known))))
    )
    assert text.correct == (not text.reason)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_labels_of_garbage_do_not_crash(name, data):
    """A model may write anything: numbers where words belong, an end in the middle, a cycle."""
    task = TASKS[name]
    ids = data.draw(
        st.lists(st.one_of(st.integers(0, len(WORDS) - 1), st.integers(2, 20), st.integers(70, 80)), min_size=1)
    )
    tokens = np.array(ids, np.int32)
    batch = Batch(tokens, np.array([0, len(ids)]), np.array([1]), np.array([1]), np.zeros(1, np.uint64))
    labels = task.label(batch)
    assert np.isfinite(labels.token_difficulty).all()
    assert (labels.token_difficulty >= 0).all()

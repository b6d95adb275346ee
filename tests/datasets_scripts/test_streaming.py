"""Endless streams: no repeats among readers, and exact resumption."""

import itertools
import pickle

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from datasets_scripts import get_task, stream
from datasets_scripts.columns import COLUMNS, make_table


def rank_loader(process, workers=3):
    data = stream("brevo-mini", seed=5, columns=["text", "size"], process=process, num_processes=2)
    return StatefulDataLoader(data, batch_size=4, num_workers=workers)


def texts(loader, batches):
    return [text for batch in itertools.islice(loader, batches) for text in batch["text"]]


def test_three_workers_in_two_processes_share_the_stream_without_repeats():
    batches = 40
    found = [texts(rank_loader(process), batches) for process in (0, 1)]
    task = get_task("brevo-mini")
    # Reader r of 6 gets indices r, r + 6, ...: what has been read is the first so many of each reader.
    of_reader = {}
    for reader in range(6):
        indices = [reader + 6 * step for step in range(-(-batches // 3) * 4)]
        table = make_table(task, task.generate("train", indices, seed=5))
        of_reader[reader] = table.column("text").to_pylist()
    for process in (0, 1):
        # A loader takes a batch of four from each of its three workers in turn.
        wanted = [
            text
            for number in range(batches)
            for text in of_reader[3 * process + number % 3][number // 3 * 4 : number // 3 * 4 + 4]
        ]
        assert found[process] == wanted


def test_killed_and_resumed_it_goes_on_as_if_nothing_had_happened():
    for process in (0, 1):
        whole = texts(rank_loader(process), 25)
        loader = rank_loader(process)
        reading = iter(loader)
        before = [text for _ in range(11) for text in next(reading)["text"]]
        state = loader.state_dict()
        del reading, loader
        resumed = rank_loader(process)
        resumed.load_state_dict(state)
        assert before + texts(resumed, 14) == whole


def test_resuming_far_out_costs_nothing_and_another_number_of_readers_is_refused():
    data = stream("mano-mini", columns=["input_ids"])
    data.load_state_dict({"position": 10**12, "num_readers": 1})
    row = next(iter(data))
    assert row["input_ids"] == get_task("mano-mini").generate("train", [10**12]).tokens.tolist()
    assert data.state_dict() == {"position": 10**12 + 1, "num_readers": 1}
    other = stream("mano-mini", process=1, num_processes=4)
    other.load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match=r"1 readers .* 4 now"):
        next(iter(other))


def test_every_pass_begins_anew_and_a_look_disturbs_none():
    data = stream("mano-mini", columns=["input_ids"])
    wanted = [row["input_ids"] for row in itertools.islice(data, 3)]
    first, second = iter(data), iter(data)
    assert [next(first)["input_ids"], next(second)["input_ids"], next(first)["input_ids"]] == [
        wanted[i] for i in (0, 0, 1)
    ]
    for workers in (0, 2):
        loader = DataLoader(data, batch_size=None, num_workers=workers)
        assert next(iter(loader))["input_ids"] == next(iter(loader))["input_ids"] == wanted[0]


def test_it_finds_its_process_in_the_environment_of_a_launcher(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    row = next(iter(stream("mano-mini", columns=["input_ids"])))
    assert row["input_ids"] == get_task("mano-mini").generate("train", [2]).tokens.tolist()


def test_a_spawned_worker_is_told_of_its_process_group(monkeypatch):
    """It gets a copy, and found neither a group nor a launcher's environment: every process read the same rows."""
    data = stream("mano-mini", columns=["input_ids"])
    with monkeypatch.context() as group:
        group.setattr(torch.distributed, "is_initialized", lambda: True)
        group.setattr(torch.distributed, "get_rank", lambda: 2)
        group.setattr(torch.distributed, "get_world_size", lambda: 3)
        sent = pickle.dumps(data)
    row = next(iter(pickle.loads(sent)))
    assert row["input_ids"] == get_task("mano-mini").generate("train", [2]).tokens.tolist()
    assert (data.process, data.num_processes) == (None, None)


def test_rows_are_those_of_the_dataset():
    for name in ("mano-mini", "brevo-mini", "lano-mini"):
        task = get_task(name)
        rows = list(itertools.islice(stream(name, "test", seed=1), 300))
        wanted = make_table(task, task.generate("test", range(300), seed=1)).to_pylist()
        assert rows == [{column: row[column] for column in COLUMNS} for row in wanted]


def test_a_process_without_their_number_is_refused():
    with pytest.raises(ValueError, match="`num_processes` is None"):
        stream("mano-mini", process=1)
    with pytest.raises(ValueError, match="`process` is 2"):
        stream("mano-mini", process=2, num_processes=2)

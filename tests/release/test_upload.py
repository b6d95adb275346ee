"""From assembled repos to a Hub and back into a process that knows nothing of this repository; broken connections."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
import upload
from conftest import CONFIG, NAME, OWNER
from fake_hub import TOKEN, serve
from huggingface_hub import CommitOperationAdd, HfApi, constants
from repos import list_files
from safetensors.torch import load_file, save_file

from modeling_anira import AniraForCausalLM

MODEL = f"{OWNER}/anira-{NAME}"

STRANGER = """
import sys
sys.modules["modeling_anira"] = sys.modules["datasets_scripts"] = None
import evaluate
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

repo, owner, config, commit, out = sys.argv[1:]
found = {}
for revision in ("v1", commit, None):
    options = {"trust_remote_code": True, **({"revision": revision} if revision else {})}
    model = AutoModelForCausalLM.from_pretrained(repo, **options)
    assert type(model).__module__.startswith("transformers_modules.")
    assert revision != commit or commit in type(model).__module__  # the code is that commit's, as the weights are
    output = model(torch.arange(2, 12).view(2, 5))
    found[revision or "main"] = (output.logits, output.exit_depths)
tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
rows = load_dataset(f"{owner}/anira-tasks", config, split="test")
streamed = load_dataset(f"{owner}/anira-tasks", config, split="test", streaming=True)
assert [row["text"] for row in streamed] == list(rows["text"])
assert tokenizer(rows["text"][0]).input_ids == tokenizer.convert_tokens_to_ids(rows["text"][0].split())
metric = evaluate.load(f"{owner}/alignment")
given = {"sizes": [3] * 40, "examples": list(range(40)), "correct": [True] * 40, "resamples": 20}
aligned = metric.compute(predictions=[i % 4 for i in range(40)], references=[i % 4 for i in range(40)], **given)
assert aligned["all"]["difficulty"]["value"] > 0.99
torch.save((found, list(rows["text"])), out)
"""


@pytest.fixture
def hub(monkeypatch):
    """An empty Hub to which this process uploads; retries do not wait."""
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def run(monkeypatch):
    """The command, in this process."""

    def run(folder, *options, owner=OWNER):
        monkeypatch.setattr(sys, "argv", ["upload.py", "--folder", str(folder), "--owner", owner, *options])
        upload.main()

    return run


@pytest.fixture
def releases(assembled, tmp_path):
    """(a folder with the model's repo alone, a later release of it: other weights, one file more, one fewer)."""
    folders = []
    for name in ("first", "second"):
        shutil.copytree(assembled / f"anira-{NAME}", tmp_path / name / f"anira-{NAME}")
        folders.append(tmp_path / name)
    later = folders[1] / f"anira-{NAME}"
    weights = {name: 1.5 * tensor for name, tensor in load_file(later / "model.safetensors").items()}
    save_file(weights, later / "model.safetensors", {"format": "pt"})
    (later / "log.jsonl").unlink()
    (later / "NEWS.md").write_text("Other weights.\n")
    return folders


def files(folder):
    """A repo's content as the Hub should hold it."""
    return {path.as_posix(): (folder / path).read_bytes() for path in list_files(folder)}


def without_the_hubs(tree):
    return {name: content for name, content in tree.items() if name != ".gitattributes"}


def test_something_else_of_that_name_is_left_alone(hub, run, assembled):
    """Metrics are called `alignment` or `dynamics`, as a user's own work may be: it was emptied without a word."""
    api = HfApi(endpoint=hub.url)
    api.create_repo(f"{OWNER}/dynamics", repo_type="space", space_sdk="static")
    thesis = CommitOperationAdd("thesis.csv", b"years of work")
    api.create_commit(f"{OWNER}/dynamics", [thesis], commit_message="mine", repo_type="space")
    with pytest.raises(SystemExit, match=rf"{OWNER}/dynamics exists .* holds thesis\.csv"):
        run(assembled, "--no_dry_run")
    assert hub.tree("spaces", f"{OWNER}/dynamics")["thesis.csv"] == b"years of work"


def test_a_stranger_loads_what_was_pushed_at_the_revision_it_names(hub, run, assembled, releases, checkpoint, tmp_path):
    run(assembled, "--no_dry_run")
    run(releases[0], "--no_dry_run", "--revision", "v1")
    run(releases[1], "--no_dry_run")
    first = hub.repos["models", MODEL].branches["v1"]
    assert set(hub.repos) == {
        ("models", MODEL),
        ("datasets", f"{OWNER}/anira-tasks"),
        *(("spaces", f"{OWNER}/{name}") for name in ("alignment", "dynamics", "generalization", "decision_timing")),
    }
    assert without_the_hubs(hub.tree("models", MODEL)) == files(releases[1] / f"anira-{NAME}")
    assert without_the_hubs(hub.tree("models", MODEL, "v1")) == files(assembled / f"anira-{NAME}")

    script, out = tmp_path / "stranger.py", tmp_path / "found.pt"
    script.write_text(STRANGER)
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "PYTHONPATH")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, str(script), MODEL, OWNER, CONFIG, first, str(out)],
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, texts = torch.load(out)
    assert len(texts) == 40
    folders = {"v1": checkpoint, first: checkpoint, "main": releases[1] / f"anira-{NAME}"}
    for revision, folder in folders.items():
        with torch.no_grad():
            output = AniraForCausalLM.from_pretrained(folder)(torch.arange(2, 12).view(2, 5))
        assert torch.equal(found[revision][0], output.logits)
        assert torch.equal(found[revision][1], output.exit_depths)
    assert not torch.equal(found["v1"][0], found["main"][0])


@pytest.mark.parametrize("moment", ["PUT /lfs/", "POST /someone", "/preupload/", "/commit/"])
def test_a_broken_connection_leaves_the_remote_as_it_was_and_a_second_run_finishes(hub, run, releases, moment):
    run(releases[0], "--no_dry_run")
    before = hub.tree("models", MODEL)
    hub.breaks = moment
    with pytest.raises(SystemExit, match=rf"^upload\.py: {MODEL} was not uploaded: [^\n]+$"):
        run(releases[1], "--no_dry_run")
    assert any(moment in request for request in hub.requests)
    assert hub.tree("models", MODEL) == before
    hub.breaks = None
    run(releases[1], "--no_dry_run")
    assert without_the_hubs(hub.tree("models", MODEL)) == files(releases[1] / f"anira-{NAME}")
    assert len(hub.repos["models", MODEL].commits) == 3  # the Hub's own, and one a release


def test_uploading_again_makes_no_commit(hub, run, releases):
    run(releases[0], "--no_dry_run")
    run(releases[0], "--no_dry_run")
    assert len(hub.repos["models", MODEL].commits) == 2


def test_new_repos_are_private_if_asked(hub, run, releases):
    run(releases[0], "--no_dry_run", "--private")
    assert hub.repos["models", MODEL].private


def test_a_dry_run_lists_everything_and_connects_to_nothing(hub, run, assembled, capsys):
    run(assembled, "--private", "--revision", "v1")
    said = capsys.readouterr().out
    for folder in assembled.iterdir():
        assert f"{OWNER}/{folder.name} (private if new), branch v1: {len(list_files(folder))} files" in said
        for path in list_files(folder):
            assert f"{(folder / path).stat().st_size:,}  {path}" in said
    assert not hub.requests


def test_only_what_is_asked_for_is_uploaded(hub, run, assembled):
    """One's own model among the released ones."""
    run(assembled, "--no_dry_run", "--only", f"^anira-{NAME}$")
    assert set(hub.repos) == {("models", MODEL)}
    for only, said in (("mine", "must be found in one of .*alignment"), ("(", "must be a regular expression")):
        with pytest.raises(SystemExit, match=said):
            run(assembled, "--only", only)


def test_mistakes_end_in_one_sentence(hub, run, assembled, releases, tmp_path, monkeypatch):
    for owner in ("another", OWNER[1:]):
        with pytest.raises(SystemExit, match=f"assemble with --owner {owner} first"):
            run(assembled, owner=owner)
    with pytest.raises(SystemExit, match="does not exist"):
        run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"is empty; release/assemble\.py fills it"):
        run(tmp_path / "empty")
    (releases[0] / "notes").mkdir()
    with pytest.raises(SystemExit, match="notes is no repo"):
        run(releases[0])
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(upload, "get_token", lambda: None)
    with pytest.raises(SystemExit, match="There is no token"):
        run(assembled, "--no_dry_run")
    assert not hub.requests


def test_what_the_hub_refuses_ends_in_one_sentence(hub, run, assembled, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    with pytest.raises(SystemExit, match=r"was not uploaded: [^\n]*401[^\n]*Invalid username or password\. The same"):
        run(assembled, "--no_dry_run")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(SystemExit, match=r"was not uploaded: [^\n]*refused[^\n]*$"):
        run(assembled, "--no_dry_run")
    assert not hub.repos

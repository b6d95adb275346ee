"""Uploads assembled repos to the Hub, each as one commit.

    python release/upload.py --owner NAME                       # says what would be created and uploaded
    python release/upload.py --owner NAME --no_dry_run          # does it, with the token of `hf auth login` or HF_TOKEN

If a connection breaks, each repo is as it was, or finished; one that was new may be left empty. The same command does
the rest.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from names import choose
from repos import Kind, ReleaseError, kind_of, list_files

from datasets_scripts.options import parse_options

# Files that the Hub itself puts into a new repo.
_THE_HUBS = {".gitattributes"}
# What it may put into a new static Space for a start.
_STARTERS = {"index.html", "style.css"}
# A file that every release has.
_MARKS: dict[Kind, str] = {"model": "modeling_anira.py", "dataset": "generation.json", "space": "analysis.py"}


@dataclass
class UploadArguments:
    """Upload the assembled repos."""

    owner: str = field(metadata={"help": "Account on the Hub; assemble.py must have been told the same."})
    folder: str = field(default="build/hub", metadata={"help": "Folder that assemble.py wrote."})
    only: str = field(default="", metadata={"help": "A regular expression; repos whose name lacks it are left out."})
    private: bool = field(default=False, metadata={"help": "Make new repos private."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch to upload to, made where it is missing; main by default."}
    )
    dry_run: bool = field(
        default=True,
        metadata={"help": "Whether only to say what would be done, without a connection; --no_dry_run uploads."},
    )


@dataclass(frozen=True)
class Repo:
    """An assembled repo, and the name that it has on the Hub."""

    folder: Path
    kind: Kind
    name: str


def find_repos(folder: Path, owner: str, only: str = "") -> list[Repo]:
    """The repos in a folder whose name has `only` in it, a regular expression.

    Raises a ReleaseError for what cannot be uploaded, for cards of another owner, and where nothing is left.
    """
    if not folder.is_dir():
        raise ReleaseError(f"`folder` is {folder}, which does not exist; release/assemble.py writes it.")
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if not names:
        raise ReleaseError(f"`folder` is {folder}, which is empty; release/assemble.py fills it.")
    repos = []
    for name in choose(names, only, ReleaseError):
        path = folder / name
        kind = kind_of(path)
        if kind is None:
            raise ReleaseError(f"{path} is no repo that release/assemble.py wrote; take it away.")
        repo = Repo(path, kind, f"{owner}/{path.name}")
        if f'"{repo.name}"' not in (path / "README.md").read_text():
            raise ReleaseError(f"The card of {path} leads to another account; assemble with --owner {owner} first.")
        repos.append(repo)
    return repos


def describe(repo: Repo, arguments: UploadArguments) -> str:
    """What would be created and uploaded, a line for each file."""
    sizes = {path.as_posix(): (repo.folder / path).stat().st_size for path in list_files(repo.folder)}
    visibility = "private if new" if arguments.private else "public if new"
    head = f"{repo.kind} {repo.name} ({visibility}), branch {arguments.revision or 'main'}: {len(sizes)} files, "
    return "\n".join(
        [f"{head}{sum(sizes.values()):,} bytes", *(f"{size:>14,}  {path}" for path, size in sizes.items())]
    )


def upload(repo: Repo, api: HfApi, private: bool, revision: str | None) -> str:
    """Makes the repo and the branch if they are missing, uploads in one commit, and returns the commit's address.

    Files of the branch that the folder lacks are removed: shards or code of an older release would be read as well.
    """
    try:
        sdk = "static" if repo.kind == "space" else None
        api.create_repo(repo.name, repo_type=repo.kind, private=private or None, space_sdk=sdk, exist_ok=True)
        if revision:
            api.create_branch(repo.name, branch=revision, repo_type=repo.kind, exist_ok=True)
        files = {path.as_posix() for path in list_files(repo.folder)}
        there = set(api.list_repo_files(repo.name, repo_type=repo.kind, revision=revision))
        _refuse_others(repo, there)
        # Not `upload_folder`: with hf_xet installed it may make several commits (huggingface_hub 2.4), and a connection
        # that broke between two would leave weights beside the code of another release.
        commit = api.create_commit(
            repo.name,
            [
                *(CommitOperationAdd(name, repo.folder / name) for name in sorted(files)),
                *(CommitOperationDelete(name, is_folder=False) for name in sorted(there - files - _THE_HUBS)),
            ],
            commit_message=f"Upload {repo.folder.name}",
            repo_type=repo.kind,
            revision=revision,
        )
    except ReleaseError:
        raise
    except Exception as error:
        # The client's failures have no common class: its own errors, those of its HTTP library, and a RuntimeError that
        # says which file, whose cause says why.
        cause = (error.__cause__ if isinstance(error, RuntimeError) else None) or error
        reason = " ".join(str(cause).split()).rstrip(".") or type(cause).__name__
        raise ReleaseError(
            f"{repo.name} was not uploaded: {reason}. The same command uploads what is missing."
        ) from error
    return commit.commit_url


def _refuse_others(repo: Repo, there: set[str]) -> None:
    """Refuses a branch that holds something else of that name, whose files would go. `there`: names of its files."""
    strangers = sorted(there - _THE_HUBS - {"README.md"} - (_STARTERS if repo.kind == "space" else set()))
    if strangers and _MARKS[repo.kind] not in there:
        raise ReleaseError(
            f"{repo.name} exists and is no {repo.kind} of such a release: it holds {strangers[0]}, and no "
            f"{_MARKS[repo.kind]}. Rename it on the Hub, or upload to another account."
        )


def main() -> None:
    """Uploads as the command line says. What the user can mend ends in one sentence."""
    (arguments,) = parse_options(UploadArguments)
    try:
        repos = find_repos(Path(arguments.folder), arguments.owner, arguments.only)
        if arguments.dry_run:
            print("\n\n".join(describe(repo, arguments) for repo in repos))
            print("\nNothing was uploaded; --no_dry_run uploads.")
            return
        if get_token() is None:
            raise ReleaseError("There is no token; `hf auth login` stores one, or HF_TOKEN holds it.")
        api = HfApi()
        for repo in repos:
            print(upload(repo, api, arguments.private, arguments.revision))
    except ReleaseError as error:
        sys.exit(f"upload.py: {error}")


if __name__ == "__main__":
    main()

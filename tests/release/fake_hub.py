"""A Hub on this machine, as much of it as uploading and loading need: repos, branches, commits, large files."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test"
KINDS = ("models", "datasets", "spaces")
LARGE = (".safetensors", ".parquet")


@dataclass
class Repo:
    """Trees by commit, and commits by branch. A tree maps paths to contents."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, branch: str, tree: dict[str, bytes]) -> str:
        number = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[number], self.branches[branch] = tree, number
        return number

    def find(self, revision: str) -> str | None:
        """The commit that a branch or a hash names."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Hub:
    """The state of the server, which tests look at, and what it is told to break."""

    url: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    breaks: str | None = None
    """Requests such as "PUT /lfs/..." that hold this get no answer: the connection is cut half-way."""

    def tree(self, kind: str, name: str, branch: str = "main") -> dict[str, bytes]:
        repo = self.repos[kind, name]
        return repo.commits[repo.branches[branch]]


def oid(path: str, content: bytes) -> str:
    """What identifies a file's content: SHA-256 for large files, git's hash for others."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def _serve(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        request = f"{self.command} {address.path}"
        self.hub.requests.append(request)
        if self.hub.breaks and self.hub.breaks in request:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            return
        self.body = self._read_body()
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        if parts[0] == "api":
            self._answer_api(parts[1:])
        elif parts[0] == "lfs":
            self._answer_large(parts[1])
        elif parts[-4:] == ["info", "lfs", "objects", "batch"]:
            self._answer_batch()
        else:
            kind = parts.pop(0) if parts[0] in KINDS else "models"
            self._answer_file(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), Content_Type="application/json")

    def _refuse(self, code: str) -> None:
        self._send(404, X_Error_Code=code, X_Error_Message=code)

    def _answer_api(self, parts: list[str]) -> None:
        if parts == ["validate-yaml"]:
            return self._send_json({"errors": [], "warnings": []})
        if parts == ["repos", "create"]:
            return self._create(json.loads(self.body))
        kind, name, action = parts[0], "/".join(parts[1:3]), parts[3] if len(parts) > 3 else "revision"
        repo, revision = self.hub.repos.get((kind, name)), parts[4] if len(parts) > 4 else "main"
        if repo is None:
            return self._refuse("RepoNotFound")
        if action == "branch":
            if revision in repo.branches:
                return self._send_json({"error": "exists"}, 409)
            repo.branches[revision] = repo.branches["main"]
            return self._send_json({})
        commit = repo.find(revision)
        if commit is None:
            return self._refuse("RevisionNotFound")
        tree = repo.commits[commit]
        if action == "preupload":
            return self._send_json(
                {"files": [self._judge(file["path"], tree) for file in json.loads(self.body)["files"]]}
            )
        if action == "commit":
            return self._commit(kind, name, revision)
        if action == "tree":
            return self._list(tree, "/".join(parts[5:]))
        if action == "paths-info":
            wanted = json.loads(self.body)["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
            return self._send_json([self._entry(path, tree[path]) for path in wanted if path in tree])
        siblings = [{"rfilename": path} for path in tree]
        return self._send_json(
            {"id": name, "sha": commit, "siblings": siblings, "private": repo.private, "tags": [], "downloads": 0}
        )

    def _create(self, wanted: dict) -> None:
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._send_json({"error": "Invalid username or password."}, 401)
        kind, name = f"{wanted.get('type', 'model')}s", f"{wanted['organization']}/{wanted['name']}"
        assert wanted.get("sdk") == ("static" if kind == "spaces" else None)
        if (kind, name) in self.hub.repos:
            return self._send_json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        repo = self.hub.repos[kind, name] = Repo(
            private=wanted.get("visibility") == "private" or bool(wanted.get("private"))
        )
        # The real one may greet a new static Space with a page.
        started = {"index.html": b"<html>", "style.css": b"body {}"} if kind == "spaces" else {}
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **started})
        prefix = "" if kind == "models" else f"{kind}/"
        return self._send_json({"url": f"{self.hub.url}/{prefix}{name}"})

    def _judge(self, path: str, tree: dict[str, bytes]) -> dict:
        mode = "lfs" if path.endswith(LARGE) else "regular"
        known = oid(path, tree[path]) if path in tree else None
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known}

    def _commit(self, kind: str, name: str, branch: str) -> None:
        repo = self.hub.repos[kind, name]
        tree = dict(self.hub.tree(kind, name, branch))
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        number = repo.commit(branch, tree)
        self._send_json({"commitUrl": f"{self.hub.url}/{name}/commit/{number}", "commitOid": number})

    def _list(self, tree: dict[str, bytes], under: str) -> None:
        own = {path: content for path, content in tree.items() if not under or path.startswith(f"{under}/")}
        if under and not own:
            return self._refuse("EntryNotFound")
        depth = under.count("/") + 1 if under else 0
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        folders = {"/".join(path.split("/")[:end]) for path in own for end in range(depth + 1, path.count("/") + 1)}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        entries += [self._entry(path, content) for path, content in own.items()]
        return self._send_json([entry for entry in entries if recursive or entry["path"].count("/") == depth])

    def _entry(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "oid": oid(path, content), "size": len(content)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": oid(path, content), "size": len(content), "pointerSize": 130}
        return entry

    def _answer_batch(self) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            href = {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}
            actions = {} if wanted["oid"] in self.hub.large else {"actions": {"upload": href, "verify": href}}
            objects.append({**wanted, **actions})
        self._send(200, json.dumps({"transfer": "basic", "objects": objects}).encode())

    def _answer_large(self, number: str) -> None:
        if self.command == "PUT":
            assert hashlib.sha256(self.body).hexdigest() == number
            self.hub.large[number] = self.body
        self._send(200 if number in self.hub.large else 404)

    def _answer_file(self, kind: str, name: str, revision: str, path: str) -> None:
        repo = self.hub.repos.get((kind, name))
        if repo is None:
            return self._refuse("RepoNotFound")
        commit = repo.find(revision)
        if commit is None:
            return self._refuse("RevisionNotFound")
        content = repo.commits[commit].get(path)
        if content is None:
            return self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        headers = {"ETag": f'"{oid(path, content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            return self._send(200, content, **headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return self._send(206, content[start : end + 1], **headers)


@contextmanager
def serve() -> Iterator[Hub]:
    """An empty Hub, at `hub.url` until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A small server that speaks as much of the Hub's protocol as the official client needs, on the loopback interface.

Repositories have branches of files; large files go through the LFS batch interface and come back through a redirect,
as on the Hub. Every byte received is kept, and errors can be injected.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

LFS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".parquet", ".png")
# More than the client waits of its own accord.
RETRY_AFTER_SECONDS = 4
Files = dict[str, bytes]


class HubServer(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        branches: repository -> branch -> path -> content.
        errors: (method, pattern of the path) -> codes to answer with, one each time, before going on as usual.
        received: Every request's path, body and time; and every file that came encoded in one, decoded.
        users: Token -> name; other tokens are refused where something is written.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.branches: dict[str, dict[str, Files]] = defaultdict(dict)
        self.errors: dict[tuple[str, str], list[int]] = {}
        self.received: list[tuple[str, bytes, float]] = []
        self.stored: dict[str, bytes] = {}
        self.users = {"hf_good": "ann"}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def storage_url(self) -> str:
        """The same under another name: the Hub redirects to a host that is not its own."""
        return self.url.replace("127.0.0.1", "localhost")

    def next_error(self, method: str, path: str) -> int | None:
        """The code to fail with now."""
        for (wanted, pattern), codes in self.errors.items():
            if wanted == method and re.search(pattern, path) and codes:
                return codes.pop(0)
        return None

    def files(self, repo: str, revision: str) -> Files | None:
        """The files of a branch, by its name or commit."""
        branches = self.branches.get(repo, {})
        return next((files for name, files in branches.items() if revision in (name, commit_of(files))), None)


def commit_of(files: Files) -> str:
    """Forty digits that change with the content."""
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + hashlib.sha1(files[name]).digest())
    return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Silent."""

    def handle_any(self) -> None:
        """Read the body, fail where that was asked for, else find the answer."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.received.append((path, body, time.monotonic()))
        code = self.server.next_error(self.command, path)
        if code is not None:
            return self.answer(
                {"error": f"injected {code}"}, code, {"Retry-After": str(RETRY_AFTER_SECONDS)} if code == 429 else {}
            )
        for pattern, method in ROUTES:
            found = re.fullmatch(pattern, path)
            if found:
                return getattr(self, method)(body, **found.groupdict())
        return self.answer({"error": f"no route for {self.command} {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def answer(self, content: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send JSON or bytes."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and code == 200:
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            headers = {**(headers or {}), "Content-Range": f"bytes {first}-{last}/{len(data)}"}
            code, data = 206, data[first : last + 1]
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def is_refused(self) -> bool:
        """Whether the token may not write; then that has been answered."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in self.server.users:
            return False
        self.answer({"error": "Invalid username or password."}, 401)
        return True

    def whoami(self, body: bytes) -> None:
        if not self.is_refused():
            self.answer({"name": "ann", "type": "user", "orgs": []})

    def validate(self, body: bytes) -> None:
        """The head of a card must be a mapping, with results in the form of `model-index`."""
        head = json.loads(body)["content"].split("---")[1]
        try:
            model_index_to_eval_results(yaml.safe_load(head).get("model-index", []))
        except Exception as error:  # noqa: BLE001
            return self.answer({"errors": [{"message": f"{type(error).__name__}: {error}"}], "warnings": []}, 400)
        return self.answer({"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        if self.is_refused():
            return
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'ann'}/{asked['name']}"
        is_new = repo not in self.server.branches
        self.server.branches[repo].setdefault("main", {})
        self.answer({"url": f"{self.server.url}/{repo}", "name": repo}, 200 if is_new else 409)

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        branches = self.server.branches[repo]
        is_new = revision not in branches
        if is_new:
            branches[revision] = dict(branches["main"])
        self.answer({}, 200 if is_new else 409)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if self.is_refused():
            return
        kinds = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer({"files": kinds})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.server.storage_url}/store/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                return self.answer({"error": "other bytes than were announced"}, 400)
            self.server.stored[oid] = body
            return self.answer({})
        return self.answer(self.server.stored[oid], 200, {"ETag": f'"{oid}"'})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if self.is_refused():
            return
        files = dict(self.server.branches[repo][revision])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                self.server.received.append((value["path"], files[value["path"]], time.monotonic()))
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        self.server.branches[repo][revision] = files
        oid = commit_of(files)
        self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def info(self, body: bytes, repo: str, revision: str = "main", kind: str = "models") -> None:
        files = self.server.files(repo, revision)
        if files is None:
            missing = "RevisionNotFound" if repo in self.server.branches else "RepoNotFound"
            return self.answer({"error": "not found"}, 404, {"X-Error-Code": missing})
        listing = [{"rfilename": name} for name in sorted(files)]
        return self.answer(
            {"id": repo, "modelId": repo, "sha": commit_of(files), "siblings": listing, "private": False, "tags": []}
        )

    def tree(self, body: bytes, repo: str, revision: str, kind: str = "models", folder: str | None = None) -> None:
        files = self.server.files(repo, revision)
        if files is None:
            return self.answer({"error": "not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        below = f"{folder.strip('/')}/" if folder else ""
        is_deep = "recursive=true" in urlsplit(self.path).query.lower()
        found: dict[str, dict[str, Any]] = {}
        for name, data in sorted(files.items()):
            if not name.startswith(below):
                continue
            parts = name.removeprefix(below).split("/")
            for depth in range(1, len(parts) if is_deep else min(len(parts), 2)):
                place = below + "/".join(parts[:depth])
                found[place] = {"type": "directory", "path": place, "size": 0, "oid": commit_of({place: b""})}
            if is_deep or len(parts) == 1:
                found[name] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if not found and below:
            return self.answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        return self.answer(list(found.values()))

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        files = self.server.files(repo, revision)
        if files is None or path not in files:
            code = "RevisionNotFound" if files is None else "EntryNotFound"
            return self.answer({"error": "not found"}, 404, {"X-Error-Code": code})
        data = files[path]
        headers = {"X-Repo-Commit": commit_of(files), "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if not path.endswith(LFS_SUFFIXES):
            return self.answer(data, 200, headers)
        oid = hashlib.sha256(data).hexdigest()
        self.server.stored[oid] = data
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{oid}"'}
        return self.answer(b"", 302, {**headers, **linked, "Location": f"{self.server.storage_url}/store/{oid}"})


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = (
    (r"/api/whoami-v2", "whoami"),
    (r"/api/validate-yaml", "validate"),
    (r"/api/repos/create", "create"),
    (rf"/api/models/{REPO}/branch/(?P<revision>[^/]+)", "branch"),
    (rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    (rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
    (rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
    (r"/store/(?P<oid>\w+)", "store"),
    (rf"/api/(?P<kind>models|datasets)/{REPO}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", "tree"),
    (rf"/api/(?P<kind>models|datasets)/{REPO}/revision/(?P<revision>[^/]+)", "info"),
    (rf"/api/(?P<kind>models|datasets)/{REPO}", "info"),
    (rf"/(?:datasets/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)


@pytest.fixture
def hub():
    server = HubServer()
    yield server
    server.shutdown()


@pytest.fixture
def asked_hub(hub, monkeypatch):
    """The server, which the client of this process asks instead of the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    return hub

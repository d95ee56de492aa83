"""A Hub on the loopback: enough of its HTTP API for the real client, and faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE_TOKEN, READ_TOKEN = "hf_write", "hf_read"
USER, ORGANIZATION, READ_ONLY_ORGANIZATION, STRANGER = "tess", "lab", "museum", "mallory"
_TOKENS = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
_LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "other", "unknown"}
_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Repository:
    """Commits of a repository: files by path, each under the id of its commit."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    head: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        self.head = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[self.head] = files
        return self.head

    def resolve(self, revision: str) -> str | None:
        if revision == "main":
            return self.head
        return self.tags.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """Something that goes wrong with requests whose "METHOD path" matches a pattern.

    Attributes:
        pattern: regular expression, searched.
        kind: "status" answers with it, "drop" closes the connection before the request is acted
            on, "lose" acts on it and closes the connection, "flip" flips a bit of the content.
        times: how often.
        status: of the answer.
        retry_after: seconds to come back in.
    """

    pattern: str
    kind: str
    times: int = 1
    status: int = 503
    retry_after: int | None = None


class HubServer(ThreadingHTTPServer):
    """The state of the Hub; answers are made by `_Handler`."""

    daemon_threads = False  # so that closing waits for them

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.before_commit: Callable[[], None] | None = None
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()

    def add(self, repo_id: str, files: dict[str, bytes], *, private: bool = False) -> Repository:
        repository = self.repositories[repo_id] = Repository(private)
        repository.commit({".gitattributes": _ATTRIBUTES, **files})
        return repository

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.resolve(revision) or ""]

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, request) is not None for request in self.requests)

    def next_fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A Hub until the end of the block; its threads and sockets end with it."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        with server.lock:
            for connection in server.connections:  # kept alive by a client
                _hang_up(connection)
        server.server_close()


def _hang_up(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # the other side was faster
        connection.close()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections.add(self.connection)

    def finish(self) -> None:
        with self.server.lock:
            self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = (
            self._read_chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else b""
        )
        body = body or self.rfile.read(length)
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        with self.server.lock:
            self.server.requests.append(request)
            fault = self.server.next_fault(request)
            if fault is not None and fault.kind == "drop":
                return self._drop()
            if fault is not None and fault.kind == "status":
                headers = {"Content-Type": "text/html"}  # as gateways do
                if fault.retry_after is not None:
                    headers["Retry-After"] = str(fault.retry_after)
                return self._answer(fault.status, b"<html>a fault of the test</html>", headers)
            try:
                status, content, headers = self._act(body)
            except _Refused as refused:
                headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
                answer = json.dumps({"error": refused.message}).encode()
                return self._answer(refused.status, answer, headers)
        if fault is not None and fault.kind == "lose":
            return self._drop()
        if fault is not None and fault.kind == "flip" and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        self._answer(status, content, headers)

    def _read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _drop(self) -> None:
        self.close_connection = True
        _hang_up(self.connection)

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _act(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        for method, pattern, action in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method in (self.command, "GET" if self.command == "HEAD" else ""):
                answer = action(self, body, query, **found.groupdict())
                if isinstance(answer, tuple):
                    return answer
                return 200, json.dumps(answer).encode(), {}
        raise _Refused(404, message=f"no such address {path}")

    @property
    def role(self) -> str | None:
        return _TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _repository(self, repo_id: str, *, write: bool = False) -> Repository:
        repository = self.server.repositories.get(repo_id)
        owner = repo_id.partition("/")[0]
        mine = owner in (USER, ORGANIZATION) and self.role is not None
        if repository is None or (repository.private and not mine):
            raise _Refused(
                401 if self.role is None else 404, "RepoNotFound", "Repository not found"
            )
        if write and not (mine and self.role == "write"):
            raise _Refused(403, message="Forbidden: no write access")
        return repository

    def _resolved(self, repo_id: str, revision: str) -> tuple[Repository, str]:
        repository = self._repository(repo_id)
        commit = repository.resolve(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    # answers by address

    def whoami(self, body: bytes, query: Any) -> Any:
        if self.role is None:
            raise _Refused(401, message="Invalid credentials in Authorization header")
        organizations = [(ORGANIZATION, "write"), (READ_ONLY_ORGANIZATION, "read")]
        return {
            "type": "user",
            "name": USER,
            "orgs": [{"name": name, "roleInOrg": role} for name, role in organizations],
            "auth": {"accessToken": {"displayName": "test", "role": self.role}},
        }

    def create(self, body: bytes, query: Any) -> Any:
        wanted = json.loads(body)
        owner = wanted.get("organization") or USER
        if self.role != "write" or owner not in (USER, ORGANIZATION):
            raise _Refused(403, message="Forbidden: no right to create")
        repo_id = f"{owner}/{wanted['name']}"
        url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.repositories:
            answer = {"error": "You already created this model repo", "url": url}
            return 409, json.dumps(answer).encode(), {}
        self.server.add(repo_id, {}, private=wanted.get("visibility") == "private")
        return {"url": url, "name": repo_id}

    def validate_yaml(self, body: bytes, query: Any) -> Any:
        problem = _problem_of_card(json.loads(body)["content"])
        if problem:
            return 400, json.dumps({"errors": [{"message": problem}]}).encode(), {}
        return {"warnings": [], "errors": []}

    def info(self, body: bytes, query: Any, repo_id: str, revision: str = "main") -> Any:
        repository, commit = self._resolved(repo_id, revision)
        names = [{"rfilename": name} for name in repository.commits[commit]]
        return {"id": repo_id, "sha": commit, "private": repository.private, "siblings": names}

    def auth_check(self, body: bytes, query: Any, repo_id: str, write: str | None) -> Any:
        self._repository(repo_id, write=write is not None)
        return {}

    def refs(self, body: bytes, query: Any, repo_id: str) -> Any:
        repository = self._repository(repo_id)
        tags = [
            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit}
            for name, commit in repository.tags.items()
        ]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.head}
        side = {**main, "name": "next", "ref": "refs/heads/next"}
        return {"branches": [main, side], "tags": tags, "converts": []}

    def tree(self, body: bytes, query: Any, repo_id: str, revision: str) -> Any:
        repository, commit = self._resolved(repo_id, revision)
        return [_entry(name, content) for name, content in repository.commits[commit].items()]

    def preupload(self, body: bytes, query: Any, repo_id: str, revision: str) -> Any:
        repository = self._repository(repo_id, write=True)
        present = repository.commits[repository.head]
        files = []
        for wanted in json.loads(body)["files"]:
            name = wanted["path"]
            mode = "lfs" if _is_large(name) else "regular"
            old = _entry(name, present[name]) if name in present else None
            identity = old and (old["lfs"]["oid"] if "lfs" in old else old["oid"])
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": identity})
        return {"files": files}

    def batch(self, body: bytes, query: Any, repo_id: str) -> Any:
        self._repository(repo_id, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.blobs:
                href = f"{self.server.url}/lfs/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def upload(self, body: bytes, query: Any, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, message="content does not match its id")
        self.server.blobs[oid] = body
        return {}

    def commit(self, body: bytes, query: Any, repo_id: str, revision: str) -> Any:
        repository = self._repository(repo_id, write=True)
        if self.server.before_commit is not None:
            self.server.before_commit()
        files = dict(repository.commits[repository.head])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                if value.get("parentCommit") not in (None, repository.head):
                    raise _Refused(412, message="A commit has happened since")
                repository.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refused(400, message=f"unknown operation {item['key']}")
        commit = repository.commit(files)
        return {"commitUrl": f"{self.server.url}/{repo_id}/commit/{commit}", "commitOid": commit}

    def tag(self, body: bytes, query: Any, repo_id: str, revision: str) -> Any:
        repository = self._repository(repo_id, write=True)
        name, commit = json.loads(body)["tag"], repository.resolve(revision)
        if name in repository.tags:
            raise _Refused(409, message="Tag reference exists already")
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        repository.tags[name] = commit
        return {}

    def content(
        self, body: bytes, query: Any, repo_id: str, revision: str, name: str
    ) -> tuple[int, bytes, dict[str, str]]:
        repository, commit = self._resolved(repo_id, revision)
        files = repository.commits[commit]
        headers = {"X-Repo-Commit": commit, "Content-Type": "application/octet-stream"}
        if name not in files:
            refused = {**headers, "X-Error-Code": "EntryNotFound"}
            return 404, b"", refused
        entry = _entry(name, files[name])
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        return 200, files[name], {**headers, "ETag": f'"{etag}"'}


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".png"))


def _entry(name: str, content: bytes) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git}
    if _is_large(name):
        entry["lfs"] = {
            "oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134,
        }  # fmt: skip
    return entry


def _problem_of_card(text: str) -> str | None:
    """The Hub's objections to the metadata of a card."""
    found = re.match(r"\s*---\n(.*?)\n---", text, re.DOTALL)
    if not found:
        return None
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return "bad indentation of a mapping entry"
    if "license" in data and data["license"] not in _LICENSES:
        return '"license" must be one of the known ones'
    for model in data.get("model-index", []):
        if not model.get("name"):
            return '"model-index[0].name" is required'
        for result in model["results"]:
            if not (result["task"].get("type") and result["dataset"].get("type")):
                return '"model-index[0].results[0]" needs a task and a dataset'
            for metric in result["metrics"]:
                if not isinstance(metric.get("value"), int | float) or math.isnan(metric["value"]):
                    return '"metrics[0].value" must be a number'
    return None


_REPOSITORY = r"(?P<repo_id>[^/]+/[^/]+)"
_API = f"/api/models/{_REPOSITORY}"
_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", _API, _Handler.info),
    ("GET", f"{_API}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", f"{_API}/auth-check(?P<write>/write)?", _Handler.auth_check),
    ("GET", f"{_API}/refs", _Handler.refs),
    ("GET", f"{_API}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("POST", f"{_API}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", f"{_API}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", f"{_API}/tag/(?P<revision>.+)", _Handler.tag),
    ("POST", rf"/{_REPOSITORY}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", _Handler.upload),
    ("GET", f"/{_REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.content),
]

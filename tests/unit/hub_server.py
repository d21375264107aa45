"""A small hub on loopback: the part of the hub's HTTP interface that huggingface_hub's downloads use.

Source: the library's requests, and https://huggingface.co/docs/hub/api. Large files are redirected to another path, as
the hub redirects to its storage.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import xet_store
from safetensors.torch import load_file, save_file

from cluster.checkpoint.made.demo import write_demo_checkpoint

_REPOSITORY = r"/(?P<repository>[^/]+/[^/]+)"
_INFO = re.compile(rf"/api/models{_REPOSITORY}(?:/revision/(?P<revision>.+))?")
_TREE = re.compile(rf"/api/models{_REPOSITORY}/tree/(?P<revision>[^/]+)")
_RESOLVE = re.compile(rf"{_REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_XET_TOKEN = re.compile(rf"/api/models{_REPOSITORY}/xet-read-token/(?P<revision>[^/]+)")
_XET = re.compile(r"/(?P<kind>v1/reconstructions|xorbs)/(?P<digest>[0-9a-f]+)")
_STORED = re.compile(r"/storage/(?P<digest>[0-9a-f]+)")


@dataclass
class Repository:
    """One commit's files, by the commit and by names of it. token: needed to see it.  gated: shown, but not given."""

    files: dict[str, bytes]
    commit: str
    revisions: tuple[str, ...] = ("main",)
    token: str = ""
    gated: bool = False


@dataclass
class Call:
    """One request. sent: bytes of the body."""

    method: str
    path: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0


@dataclass
class Hub:
    """address: for HF_ENDPOINT.  storage: another host's, as far as a client knows.
    break_after: an answer with more bytes breaks off there, as often as breaks says.
    status, body: of every answer, in place of the right one.  refused: a file that is listed and not there.
    xet: the address of a store that has large files in chunks, "" for none; this server is one too."""

    address: str
    storage: str
    repositories: dict[str, Repository]
    calls: list[Call] = field(default_factory=list)
    break_after: int = 0
    breaks: int = 0
    status: int = 0
    body: bytes | None = None
    refused: str = ""
    xet: str = ""
    before_body: Callable[[str], None] = lambda path: None

    def fetched(self, ending: str = "") -> list[str]:
        """Names of the files whose bodies were asked for, sorted; one for each request."""
        names = {digest_of(content): name for r in self.repositories.values() for name, content in r.files.items()}
        asked = []
        for call in self.calls:
            path, stored = urlsplit(call.path).path, _STORED.fullmatch(urlsplit(call.path).path)
            if call.method == "GET" and stored:
                asked.append(names[stored["digest"]])
            elif call.method == "GET" and "/resolve/" in path and call.status == 200:
                asked.append(path.rpartition("/")[2])
        return sorted(name for name in asked if name.endswith(ending))


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def commit_of(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


NAME = "tiny/demo-moe"
FIRST, SECOND = commit_of("first"), commit_of("second")
SMALL = {
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
DENSE, EXPERTS = "model-dense.safetensors", ("model-experts-0.safetensors", "model-experts-1.safetensors")


def write_in_parts(folder: Path) -> None:
    """A demo checkpoint whose experts below 32 are in one file, the others in another, all else in a third."""
    write_demo_checkpoint(folder)
    tensors = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    file_of = {name: _part_of(name) for name in tensors}
    for file in (DENSE, *EXPERTS):
        save_file({name: t for name, t in tensors.items() if file_of[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


def _part_of(name: str) -> str:
    _, experts, rest = name.partition(".mlp.experts.")
    return EXPERTS[int(rest.partition(".")[0]) // 32] if experts else DENSE


def repository_of(folder: Path, commit: str = "first", **options: object) -> Repository:
    """A repository with a folder's files."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return Repository(files, commit_of(commit), **options)  # type: ignore[arg-type]


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Serves repositories by their names."""

    class Handler(_Handler):
        hub = Hub("", "", repositories)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Handler.hub.address = f"http://127.0.0.1:{server.server_port}"
    Handler.hub.storage = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield Handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self._call = Call(self.command, self.path, {key.lower(): value for key, value in self.headers.items()})
        self.hub.calls.append(self._call)
        path = unquote(urlsplit(self.path).path)
        if self.hub.status:
            return self._answer(self.hub.status, b"no")
        if self.hub.body is not None:
            return self._answer(200, self.hub.body)
        stored = _STORED.fullmatch(path)
        if stored:
            return self._content(self._stored(stored["digest"]), {})
        of_xet = _XET.fullmatch(path)
        if of_xet:
            return self._xet(self._stored(of_xet["digest"]), **of_xet.groupdict())
        answers = {_TREE: self._tree, _XET_TOKEN: self._xet_token, _RESOLVE: self._resolve, _INFO: self._info}
        for pattern, answer in answers.items():
            found = pattern.fullmatch(path)
            if found:
                return self._of_repository(found.groupdict(), answer)
        return self._answer(404, b"nothing here")

    def _stored(self, digest: str) -> bytes:
        contents = [c for r in self.hub.repositories.values() for c in r.files.values()]
        return next(c for c in contents if digest_of(c) == digest)

    def _xet_token(self, *_: object) -> None:
        named = {"Cas-Url": self.hub.xet, "Access-Token": "for_an_hour", "Token-Expiration": "4102444800"}
        self._answer(200, b"{}", {f"X-Xet-{name}": value for name, value in named.items()})

    def _xet(self, content: bytes, kind: str, digest: str) -> None:
        if kind == "xorbs":
            return self._content(xet_store.xorb_of(content), {})
        return self._json(xet_store.reconstruction(digest, content, f"{self.hub.address}/xorbs/{digest}"))

    def _of_repository(self, asked: dict[str, str | None], answer: Callable[..., None]) -> None:
        repository = self.hub.repositories.get(asked["repository"] or "")
        token = self._call.headers.get("authorization", "").removeprefix("Bearer ")
        if repository is None or (repository.token and token != repository.token and not repository.gated):
            return self._refuse(401 if not token else 404, "RepoNotFound", "Repository not found")
        revision = asked.get("revision") or "main"
        if revision not in (*repository.revisions, repository.commit):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if repository.gated and token != repository.token and answer == self._resolve:
            return self._refuse(403 if token else 401, "GatedRepo", "Access to this model is restricted")
        return answer(repository, asked)

    def _info(self, repository: Repository, asked: dict[str, str]) -> None:
        siblings = [{"rfilename": name} for name in repository.files]
        name = asked["repository"]
        known = {"private": bool(repository.token), "gated": repository.gated, "tags": [], "downloads": 0}
        self._json({"_id": "0", "id": name, "sha": repository.commit, "siblings": siblings, **known})

    def _tree(self, repository: Repository, _: dict[str, str]) -> None:
        entries = []
        for name, content in repository.files.items():
            entry: dict[str, object] = {"type": "file", "oid": commit_of(name), "size": len(content), "path": name}
            if _is_large(name):
                entry["lfs"] = {"oid": digest_of(content), "size": len(content), "pointerSize": 130}
                if self.hub.xet:
                    entry["xetHash"] = digest_of(content)
            entries.append(entry)
        self._json(entries)

    def _resolve(self, repository: Repository, asked: dict[str, str]) -> None:
        content = None if asked["file"] == self.hub.refused else repository.files.get(asked["file"])
        commit = {"X-Repo-Commit": repository.commit}
        if content is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", commit)
        if not _is_large(asked["file"]):
            return self._content(content, {**commit, "ETag": f'"{digest_of(content)[:40]}"'})
        linked = {"X-Linked-Etag": f'"{digest_of(content)}"', "X-Linked-Size": str(len(content))}
        location = {"Location": f"{self.hub.storage}/storage/{digest_of(content)}"}
        return self._answer(302, b"", {**commit, **linked, **location})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        status, asked = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self._call.headers.get("range", ""))
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
            status, content = 206, content[start:end]
        self._answer(status, content, headers)

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self._answer(status, b"", {**(headers or {}), "X-Error-Code": code, "X-Error-Message": message})

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._call.status = status
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.hub.before_body(self.path)
        if self.hub.breaks and len(body) > self.hub.break_after:
            self.hub.breaks -= 1
            body = body[: self.hub.break_after]
            self.close_connection = True
        self.wfile.write(body)
        self._call.sent = len(body)


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))

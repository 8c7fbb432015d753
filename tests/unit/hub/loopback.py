"""A Hub on the loopback interface, of the standard library alone: what huggingface_hub 2.4 calls to create, upload, commit and download.

Endpoints and headers as that client sends and reads them (``hf_api.py``, ``_commit_api.py``, ``lfs.py``, ``file_download.py``). Large
files are kept by their SHA-256 and served from ``/cdn/``, to which ``resolve`` redirects with a signature in the address, as the real
one does. ``faults`` holds what goes wrong, ``seen`` every request, ``sent`` and ``received`` the bytes of the files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "LoopbackSecretToken" * 2
SIGNATURE = "s3cr3tsignature0123456789"
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".model")
LFS_NBYTES = 10_000_000
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+?)(?:/(?P<verb>revision|tree|preupload|commit|branch|tag|refs)(?:/(?P<rest>.*))?)?")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclass
class Fault:
    """What happens to the next ``times`` requests of ``method`` whose path matches ``path`` (None: for ever).

    ``status``: an error with ``headers``. ``cut``: the connection ends after so many bytes of the body. ``flip``: one byte differs.
    ``no_range``: ranges are ignored. ``call``: something to do first.
    """

    path: str
    method: str = "GET"
    times: int | None = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    flip: bool = False
    no_range: bool = False
    call: Callable[[], None] | None = None


@dataclass
class Repo:
    """``commits``: id → its files by path. ``branches``: name → commit."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str, message: str) -> str:
        """Put ``files`` as a new commit at the end of a branch."""
        parent = self.branches.get(branch, "")
        text = repr((parent, message, sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())))
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid], self.messages[oid], self.branches[branch] = files, message, oid
        return oid

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag or an id names."""
        revision = unquote(revision)
        return self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The server; ``with Hub() as hub`` runs it. ``repos`` may be filled and looked at directly."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.authorized: list[tuple[str, bool]] = []
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo: str, files: dict[str, bytes], branch: str = "main", **flags: bool) -> str:
        """A repository with these files in one commit; returns the commit."""
        made = self.repos.setdefault(repo, Repo(**flags))
        for data in files.values():
            self.blobs[hashlib.sha256(data).hexdigest()] = data
        return made.commit({**made.commits.get(made.branches.get(branch, ""), {}), **files}, branch, "add")

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        found = self.repos[repo].find(revision)
        assert found is not None
        return self.repos[repo].commits[found]

    def forget(self) -> None:
        """Start counting again."""
        self.seen.clear()
        self.sent.clear()
        self.received.clear()


def is_lfs(name: str, size: int) -> bool:
    """Whether a file is kept outside git."""
    return name.endswith(LFS_SUFFIXES) or size > LFS_NBYTES


def blob_id(data: bytes) -> str:
    """git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    fault: Fault | None = None

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    # ------------------------------------------------------------ the way of a request

    def _serve(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path.replace("%2F", "%252F"))  # a slash of a revision stays spelled
        self.fault = self._next_fault(path)
        if self.fault is not None and self.fault.call is not None:
            self.fault.call()
        cut = self.fault.cut if self.fault is not None and self.command == "PUT" else None
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0) if cut is None else cut)
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            body = self._chunked()
        with hub.lock:
            hub.seen.append((self.command, path))
            hub.authorized.append((path, "Authorization" in self.headers))
        if cut is not None:
            hub.received[path] += len(body)
            self.close_connection = True
            self.connection.close()
        elif self.fault is not None and self.fault.status:
            self._answer(self.fault.status, {"error": "as asked"}, self.fault.headers)
        else:
            self._route(path, body)

    def _chunked(self) -> bytes:
        pieces = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _next_fault(self, path: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.method == self.command and fault.times != 0 and re.search(fault.path, path):
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def _route(self, path: str, body: bytes) -> None:
        if found := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            self._cdn(found[1])
        elif found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            self._upload(found[1], path, body)
        elif found := re.fullmatch(r"/verify/([0-9a-f]{64})", path):
            self._answer(200 if found[1] in self.hub.blobs else 404, {})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path == "/api/whoami-v2":
            self._whoami()
        elif found := _BATCH.fullmatch(path):
            self._batch(found["repo"], json.loads(body))
        elif found := _API.fullmatch(path):
            self._api(found["repo"], found["verb"] or "", found["rest"] or "", body)
        elif found := _RESOLVE.fullmatch(path):
            self._resolve(found["repo"], found["revision"], found["file"])
        else:
            self._answer(404, {"error": "no such endpoint"})

    def _answer(self, status: int, data: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str) -> Repo | None:
        """The repository, or None after it was refused."""
        repo = self.hub.repos.get(name)
        if self.headers.get("Authorization") and not self._known:
            self._answer(401, {"error": "bad token"}, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo is None or (repo.private and not self._known):
            self._refuse(404 if self._known else 401, "RepoNotFound", "Repository not found")
        else:
            return repo
        return None

    def _may_write(self) -> bool:
        if not self._known:
            self._answer(401, {"error": "Invalid username or password."})
        return self._known

    # ------------------------------------------------------------ reading

    def _files_json(self, files: dict[str, bytes]) -> list[dict[str, Any]]:
        found = []
        for name, data in sorted(files.items()):
            entry: dict[str, Any] = {"type": "file", "path": name, "rfilename": name, "size": len(data), "oid": blob_id(data)}
            entry["blobId"] = entry["oid"]
            if is_lfs(name, len(data)):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 134}
            found.append(entry)
        return found

    def _api(self, name: str, verb: str, rest: str, body: bytes) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        if verb in ("preupload", "commit", "branch", "tag") and self.command == "POST":
            if self._may_write():
                getattr(self, f"_{verb}")(name, repo, rest, body)
            return
        if verb == "refs":
            refs = {"branches": repo.branches, "tags": repo.tags}
            spelled = {"branches": "refs/heads/", "tags": "refs/tags/"}
            data = {k: [{"name": n, "ref": spelled[k] + n, "targetCommit": c} for n, c in v.items()] for k, v in refs.items()}
            self._answer(200, {**data, "converts": [], "pullRequests": []})
            return
        revision = rest.split("/")[0] if rest else "main"
        oid = repo.find(revision)
        if oid is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = self._files_json(repo.commits[oid])
        if verb == "tree":
            self._answer(200, files)
            return
        data = {"id": name, "modelId": name, "sha": oid, "private": repo.private, "gated": "manual" if repo.gated else False, "tags": []}
        card = repo.commits[oid].get("README.md", b"").decode()
        if found := re.match(r"---\n(.*?)\n---", card, re.DOTALL):
            words = dict(line.split(": ", 1) for line in found[1].splitlines() if re.match(r"\w+: \S", line))
            data["cardData"] = words
        self._answer(200, {**data, "siblings": files})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        if repo.gated and not self._known:
            self._refuse(403, "GatedRepo", f"Access to model {name} is restricted.")
            return
        oid = repo.find(revision)
        if oid is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        data = repo.commits[oid].get(file)
        if data is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        if not is_lfs(file, len(data)):
            self._body(data, {"ETag": f'"{blob_id(data)}"', "X-Repo-Commit": oid}, file)
            return
        digest = hashlib.sha256(data).hexdigest()
        where = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{digest}?X-Amz-Signature={SIGNATURE}"
        headers = {"Location": where, "X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digest}"', "X-Repo-Commit": oid}
        self._answer(302, {}, headers)

    def _cdn(self, digest: str) -> None:
        if parse_qs(urlsplit(self.path).query).get("X-Amz-Signature") != [SIGNATURE] or "Authorization" in self.headers:
            self._answer(403, {"error": "signature"})
            return
        self._body(self.hub.blobs[digest], {"ETag": f'"{digest}"'}, digest)

    def _body(self, data: bytes, headers: dict[str, str], name: str) -> None:
        """A file or a range of it, with what is to go wrong."""
        first, last, status = 0, len(data), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        ranged = not any(f.no_range for f in self.hub.faults)
        if asked and ranged and data:
            first, last, status = int(asked[1]), min(len(data), int(asked[2] or len(data)) + 1), 206
            headers = {**headers, "Content-Range": f"bytes {first}-{last - 1}/{len(data)}"}
        body = bytearray(data[first:last])
        if self.fault is not None and self.fault.flip and body:
            body[-1] ^= 1
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        if ranged:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.cut is not None:
            del body[self.fault.cut :]
            self.close_connection = True
        with self.hub.lock:
            self.hub.sent[name] += len(body)
        self.wfile.write(body)

    # ------------------------------------------------------------ writing

    def _whoami(self) -> None:
        if self._known:
            self._answer(200, {"type": "user", "name": "org", "fullname": "Org", "orgs": [], "auth": {"type": "access_token"}})
        else:
            said = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self._answer(401, {"error": "Invalid username or password."}, said)

    def _create(self, asked: dict[str, Any]) -> None:
        if not self._may_write():
            return
        name = f"{asked.get('organization') or 'org'}/{asked['name']}"
        if name in self.hub.repos:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[name] = Repo(private=private)
        self.hub.repos[name].commit({".gitattributes": b"*.gguf filter=lfs\n"}, "main", "initial commit")
        self._answer(200, {"url": f"{self.hub.url}/{name}", "id": name, "name": name})

    def _validate(self, content: str) -> None:
        bad = re.search(r"^base_model_relation: (?!quantized|finetune|adapter|merge)", content, re.MULTILINE)
        errors = [{"message": "base_model_relation is unknown"}] if bad else []
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _preupload(self, name: str, repo: Repo, rest: str, body: bytes) -> None:
        oid = repo.find(rest)
        if oid is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {rest}")
            return
        here = repo.commits[oid]
        found = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            kept = here.get(path)
            lfs = is_lfs(path, file["size"])
            same = None if kept is None else hashlib.sha256(kept).hexdigest() if lfs else blob_id(kept)
            found.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": same})
        self._answer(200, {"files": found})

    def _batch(self, name: str, asked: dict[str, Any]) -> None:
        if not self._may_write():
            return
        objects = []
        for item in asked["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                href = f"{self.hub.url}/lfs/{item['oid']}?X-Amz-Signature={SIGNATURE}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{self.hub.url}/verify/{item['oid']}"}}
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _upload(self, digest: str, path: str, body: bytes) -> None:
        self.hub.received[path] += len(body)
        if hashlib.sha256(body).hexdigest() != digest:
            self._answer(400, {"error": "wrong hash"})
            return
        self.hub.blobs[digest] = body
        self._answer(200, {}, {"ETag": f'"{digest}"'})

    def _commit(self, name: str, repo: Repo, rest: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.decode().splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        oid = repo.find(rest)
        if oid is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {rest}")
            return
        if header.get("parentCommit") not in (None, oid):
            self._answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        files = dict(repo.commits[oid])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    self._answer(400, {"error": f"LFS object {value['oid']} is missing"})
                    return
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        pull = "create_pr=1" in self.path
        branch = f"refs/pr/{1 + sum(b.startswith('refs/pr/') for b in repo.branches)}" if pull else unquote(rest)
        if pull:
            repo.branches[branch] = oid
        made = repo.commit(files, branch, header["summary"])
        url = f"{self.hub.url}/{name}"
        extra = {"pullRequestUrl": f"{url}/discussions/{branch[8:]}"} if pull else {}
        self._answer(200, {"success": True, "commitOid": made, "commitUrl": f"{url}/commit/{made}", "hookOutput": "", **extra})

    def _branch(self, name: str, repo: Repo, rest: str, body: bytes) -> None:
        if unquote(rest) in repo.branches:
            self._answer(409, {"error": "Reference already exists"})
            return
        repo.branches[unquote(rest)] = repo.branches[json.loads(body or b"{}").get("startingPoint", "main")]
        self._answer(200, {})

    def _tag(self, name: str, repo: Repo, rest: str, body: bytes) -> None:
        repo.tags[json.loads(body)["tag"]] = repo.find(rest) or ""
        self._answer(200, {})


def folder_files(folder: Path) -> dict[str, bytes]:
    """A directory as a repository holds it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

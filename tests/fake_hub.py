"""A local server that speaks the Hugging Face Hub's protocol to the real client, with scripted faults.

It serves `resolve` (small files directly, large ones by a redirect to another host name, as the Hub's CDN has),
ranges, the file listing, and what an upload needs: repository creation, preupload, the LFS batch protocol, commits.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

HTML = b"<!DOCTYPE html><html><body>Please log in to the guest network</body></html>\n"


@dataclass
class Fault:
    """What goes wrong at requests of `method` for `filename`, `times` times.

    Kinds: an HTTP status such as "503"; "flip" (one wrong byte), "short" and "long" (a whole answer of another size),
    "html" (a page in place of the file), "drop" (no answer), "cut" (half of the body, then the connection closes),
    "reset" (the same by a TCP reset), "no-range" (the whole file where a range was asked for).
    """

    kind: str
    filename: str = "encoder.safetensors"
    method: str = "GET"
    times: int = 10**9


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        listing = json.dumps([len(self.commits), sorted((k, hashlib.sha1(v).hexdigest()) for k, v in files.items())])
        name = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[name], self.refs[branch] = files, name
        return name


def is_large(filename: str) -> bool:
    return filename.endswith(".safetensors")


def etag(filename: str, content: bytes) -> str:
    """sha256 of large files, git's blob hash of others, as on the Hub."""
    if is_large(filename):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub:
    """`with FakeHub() as hub:` serves at `hub.url`; `hub.requests` has (method, path) of what was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.actions: dict[str, Callable[[], object]] = {}  # what a POST to a path does
        self.after: dict[
            tuple[str, str], Callable[[], object]
        ] = {}  # what happens once, after a request by method, path
        self.portal = False  # every answer is the page of a captive portal
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo_id: str, folder: Path, *faults: Fault, **replaced: bytes | None) -> str:
        """A repository with a folder's files; `config=…` or `encoder=…` replaces one's content, None drops it."""
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        for stem, content in replaced.items():
            name = "config.json" if stem == "config" else f"{stem}.safetensors"
            if content is None:
                del files[name]
            else:
                files[name] = content
        self.repositories[repo_id] = Repository(faults=list(faults))
        return self.repositories[repo_id].commit(files)

    def asked(self, repo_id: str) -> list[tuple[str, str]]:
        with self.lock:
            return [(method, path) for method, path in self.requests if f"/{repo_id}/" in path]


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.route()

    do_GET = do_POST = do_PUT = do_HEAD

    def route(self) -> None:
        path, self.body = urlsplit(self.path).path, self.read_body()
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
        if self.hub.portal:
            return self.answer(200, HTML, {"Content-Type": "text/html"})
        if path in self.hub.actions:
            self.hub.actions[path]()
            return self.answer(200, b"")
        routes: tuple[tuple[str, Callable[..., None]], ...] = (
            (r"/cdn/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", self.content),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self.tree),
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self.commit),
            (r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", self.info),
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", lambda: self.answer_json({"errors": [], "warnings": []})),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.lfs_batch),
            (r"/upload/([0-9a-f]{64})", self.upload),
        )
        for pattern, method in routes:
            if match := re.fullmatch(pattern, path):
                method(*(unquote(group) for group in match.groups()))
                break
        else:
            self.answer(404, b"Not Found")
        with self.hub.lock:
            event = self.hub.after.pop((self.command, path), lambda: None)
        event()

    # Downloads

    def find(self, repo_id: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and the commit; None if the answer, an error, has been sent."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None:  # the Hub does not tell missing repositories from private ones
            self.error(401, "RepoNotFound")
        elif repository.gated:
            self.error(403, "GatedRepo")
        elif (commit := repository.refs.get(revision, revision)) not in repository.commits:
            self.error(404, "RevisionNotFound")
        else:
            return repository, commit
        return None

    def resolve(self, repo_id: str, revision: str, filename: str) -> None:
        if (found := self.find(repo_id, revision)) is None:
            return
        repository, commit = found
        files = repository.commits[commit]
        if filename not in files:
            return self.error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        if not is_large(filename):
            return self.content(repo_id, commit, filename)
        if self.faulty(repository, filename) is None:
            content = files[filename]
            headers = {
                "X-Repo-Commit": commit,
                "X-Linked-Size": str(len(content)),
                "X-Linked-Etag": f'"{etag(filename, content)}"',
                # Another host name than the endpoint's, so that the client treats it as a CDN.
                "Location": f"http://localhost:{self.hub.port}/cdn/{repo_id}/{commit}/{filename}",
            }
            self.answer(302, b"", headers)

    def content(self, repo_id: str, commit: str, filename: str) -> None:
        repository = self.hub.repositories[repo_id]
        content = repository.commits[commit][filename]
        fault = self.faulty(repository, filename)
        if fault == "done":
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(filename, content)}"', "Accept-Ranges": "bytes"}
        if fault == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        elif fault in ("short", "html"):
            content = content[:-10] if fault == "short" else HTML
        elif fault == "long":
            content += b"0123456789"
        status, start = 200, 0
        if (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) and fault != "no-range":
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            status = 206
        self.answer(status, content[start:], headers, cut=fault if fault in ("cut", "reset") else None)

    def faulty(self, repository: Repository, filename: str) -> str | None:
        """Takes one fault for this request; "done" if that was the answer, else what `content` has to do."""
        with self.hub.lock:
            for fault in repository.faults:
                concerns_content = not fault.kind.isdigit() and fault.kind != "drop"
                if concerns_content and is_large(filename) and not self.path.startswith("/cdn/"):
                    continue  # it waits for the request behind the redirect
                if (fault.filename, fault.method) == (filename, self.command) and fault.times > 0:
                    fault.times -= 1
                    break
            else:
                return None
        if fault.kind.isdigit():
            self.answer(int(fault.kind), b"out of order")
            return "done"
        if fault.kind == "drop":
            self.close_connection = True
            return "done"
        return fault.kind

    # Uploads

    def create(self) -> None:
        body = json.loads(self.body)
        repo_id = f"{body['organization']}/{body['name']}"
        exists = repo_id in self.hub.repositories
        if not exists:
            self.hub.repositories[repo_id] = Repository()
            self.hub.repositories[repo_id].commit({".gitattributes": b""})
        self.answer_json({"url": f"{self.hub.url}/{repo_id}"}, 409 if exists else 200)

    def info(self, repo_id: str, revision: str) -> None:
        if found := self.find(repo_id, revision):
            self.answer_json({"id": repo_id, "sha": found[1], "siblings": [], "tags": []})

    def tree(self, repo_id: str, revision: str) -> None:
        if found := self.find(repo_id, revision):
            files = found[0].commits[found[1]]
            self.answer_json(
                [{"type": "file", "path": k, "size": len(v), "oid": etag("", v)} for k, v in files.items()]
            )

    def preupload(self, repo_id: str, revision: str) -> None:
        if found := self.find(repo_id, revision):
            present = {name: etag(name, content) for name, content in found[0].commits[found[1]].items()}
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            modes = [
                {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False}
                | ({"oid": present[path]} if path in present else {})
                for path in paths
            ]
            self.answer_json({"files": modes})

    def lfs_batch(self, repo_id: str) -> None:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.hub.url}/upload/{o['oid']}"}}}
            for o in json.loads(self.body)["objects"]
        ]
        self.answer_json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        content = self.body
        self.hub.objects[oid] = content
        self.answer(200 if hashlib.sha256(content).hexdigest() == oid else 400, b"")

    def commit(self, repo_id: str, branch: str) -> None:
        if (found := self.find(repo_id, branch)) is None:
            return
        repository, files = found[0], dict(found[0].commits[found[1]])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        name = repository.commit(files, branch)
        self.answer_json({"success": True, "commitOid": name, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{name}"})

    # Plumbing

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def answer_json(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: str | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True
        if cut == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

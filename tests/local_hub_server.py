"""A small local stand-in for the Hugging Face Hub: model repositories, read-only.

Folders ROOT/org/name are repositories, ROOT/org/name@branch are other branches of them. A client sets HF_ENDPOINT, and HF_HOME
to an empty folder, before it imports huggingface_hub, which reads the address at import. Requests that are answered:

    GET       /api/models/{org}/{name}[/revision/{rev}]      id, sha and files
    GET       /api/models/{org}/{name}/tree/{rev}[/prefix]   list of files
    HEAD, GET /{org}/{name}/resolve/{rev}/{path}             a file; Range is honoured

Missing things are 404 with the code in X-Error-Code that tells a missing file from a missing repository.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Repository:
    def __init__(self, folder: Path):
        self.files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def etag(self, name: str) -> str:
        return hashlib.sha1(self.files[name].read_bytes()).hexdigest()

    @property
    def sha(self) -> str:
        return hashlib.sha1("".join(f"{name} {self.etag(name)}\n" for name in self.files).encode()).hexdigest()

    def listing(self, prefix: str = "") -> list[dict]:
        return [
            {"type": "file", "path": name, "rfilename": name, "size": path.stat().st_size, "oid": self.etag(name)}
            for name, path in self.files.items()
            if name.startswith(prefix)
        ]


def find_repository(root: Path, org: str, name: str, revision: str = "main") -> Repository | None:
    """By branch, or by the sha of any branch."""
    branches = {path.name.partition("@")[2] or "main": Repository(path) for path in (root / org).glob(f"{name}*")
                if path.name.partition("@")[0] == name}  # fmt: skip
    return branches.get(revision) or next((branch for branch in branches.values() if branch.sha == revision), None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    requests: list[str]

    def log_message(self, *args) -> None:
        """Nothing on the terminal."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"]
        org, name, *rest = (parts[2:] if is_api else parts) + [""] * 4
        kind, revision, *path = rest
        if find_repository(self.root, org, name) is None:
            return self.fail("RepoNotFound")
        repository = find_repository(self.root, org, name, revision or "main")
        if repository is None:
            return self.fail("RevisionNotFound")
        if is_api:
            return self.answer_api(repository, f"{org}/{name}", kind, "/".join(filter(None, path)))
        return self.answer_file(repository, "/".join(filter(None, path)))

    def answer_api(self, repository: Repository, name: str, kind: str, prefix: str) -> None:
        headers = {"Content-Type": "application/json", "X-Repo-Commit": repository.sha}
        if kind == "tree":
            return self.send(200, json.dumps(repository.listing(prefix)).encode(), headers)
        facts = {"_id": "0" * 24, "id": name, "modelId": name, "sha": repository.sha, "private": False, "gated": False,
                 "disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": repository.listing()}  # fmt: skip
        return self.send(200, json.dumps(facts).encode(), headers)

    def answer_file(self, repository: Repository, name: str) -> None:
        if name not in repository.files:
            return self.fail("EntryNotFound", {"X-Repo-Commit": repository.sha})
        data = repository.files[name].read_bytes()
        headers = {"X-Repo-Commit": repository.sha, "ETag": f'"{repository.etag(name)}"', "Accept-Ranges": "bytes"}
        start, _, end = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if self.command == "GET" and start:
            part = data[int(start) : int(end or len(data) - 1) + 1]
            return self.send(206, part, headers | {"Content-Range": f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"})
        return self.send(200, data, headers)

    def fail(self, code: str, headers: dict[str, str] | None = None) -> None:
        self.send(404, b"", {"X-Error-Code": code, "X-Error-Message": code} | (headers or {}))

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def serve(root: Path) -> tuple[str, ThreadingHTTPServer]:
    """Serve from a thread until `server.shutdown()`; returns the address and the server with its `requests`."""
    handler = type("RootHandler", (Handler,), {"root": Path(root), "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.requests = handler.requests
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}", server

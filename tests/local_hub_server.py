#!/usr/bin/env python3
"""A tiny local stand-in for the Hugging Face Hub (read-only, model repos, standard library only).

    python local_hub_server.py ROOT [--port 0] [--log FILE]

ROOT/org/name/... are the repositories: plain directories, e.g. written by `pipeline.save_pretrained(ROOT/org/name)`.
Prints `HF_ENDPOINT=http://127.0.0.1:PORT` and serves until killed.  Clients: set HF_ENDPOINT to that value and HF_HOME
to an empty directory *before* importing huggingface_hub (the endpoint is read at import).

Endpoints (what huggingface_hub 2.4 / diffusers 0.42 ask for):
  GET  /api/models/{org}/{name}[/revision/{rev}]          repo info: id, sha, siblings[{rfilename, size, blobId}]
  GET  /api/models/{org}/{name}/tree/{rev}?recursive=...  file listing (snapshot_download)
  HEAD /{org}/{name}/resolve/{rev}/{path}                 X-Repo-Commit, ETag, Content-Length (404 + X-Error-Code)
  GET  /{org}/{name}/resolve/{rev}/{path}                 the bytes; honours Range: bytes=N-
"""

import argparse
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Repo:
    def __init__(self, root):
        self.root = root

    def files(self):
        out = {}
        for d, _, names in os.walk(self.root):
            for n in names:
                p = os.path.join(d, n)
                out[os.path.relpath(p, self.root).replace(os.sep, "/")] = p
        return dict(sorted(out.items()))

    @staticmethod
    def etag(path):
        h = hashlib.sha1()
        with open(path, "rb") as f:
            for chunk in iter(lambda: f.read(1 << 20), b""):
                h.update(chunk)
        return h.hexdigest()

    def sha(self):
        h = hashlib.sha1()
        for name, p in self.files().items():
            h.update(f"{name}\0{self.etag(p)}\n".encode())
        return h.hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub_root = None
    log_file = None

    def log_message(self, *args):
        pass

    def _note(self, code):
        if self.log_file:
            with open(self.log_file, "a") as f:
                f.write(f"{code} {self.command} {self.path}\n")

    def _send(self, code, body=b"", headers=None, length=None):
        self._note(code)
        self.send_response(code)
        for k, v in (headers or {}).items():
            self.send_header(k, str(v))
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD" and body:
            self.wfile.write(body)

    def _json(self, obj, code=200, headers=None):
        self._send(code, json.dumps(obj).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _missing(self, code, text):
        self._json({"error": text}, 404, {"X-Error-Code": code, "X-Error-Message": text})

    def _repo(self, org, name):
        p = os.path.join(self.hub_root, org, name)
        return Repo(p) if os.path.isdir(p) and ".." not in (org, name) else None

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        u = urlsplit(self.path)
        parts = [unquote(x) for x in u.path.strip("/").split("/")]
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            repo = self._repo(parts[2], parts[3])
            if repo is None:
                return self._missing("RepoNotFound", "Repository not found")
            rest = parts[4:]
            if rest and rest[0] == "tree":
                prefix = "/".join(rest[2:])
                out = [
                    {"type": "file", "path": n, "size": os.path.getsize(p), "oid": repo.etag(p)}
                    for n, p in repo.files().items()
                    if not prefix or n.startswith(prefix + "/")
                ]
                return self._json(out, headers={"X-Repo-Commit": repo.sha()})
            if not rest or rest[0] == "revision":
                sha = repo.sha()
                rid = f"{parts[2]}/{parts[3]}"
                return self._json(
                    {
                        "_id": "0" * 24,
                        "id": rid,
                        "modelId": rid,
                        "author": parts[2],
                        "sha": sha,
                        "private": False,
                        "gated": False,
                        "disabled": False,
                        "tags": ["diffusers"],
                        "downloads": 0,
                        "likes": 0,
                        "siblings": [
                            {"rfilename": n, "size": os.path.getsize(p), "blobId": repo.etag(p)}
                            for n, p in repo.files().items()
                        ],
                    },
                    headers={"X-Repo-Commit": sha},
                )
        if len(parts) >= 5 and parts[2] == "resolve":
            repo = self._repo(parts[0], parts[1])
            if repo is None:
                return self._missing("RepoNotFound", "Repository not found")
            sha = repo.sha()
            if parts[3] not in ("main", sha):
                return self._missing("RevisionNotFound", f"Invalid rev id: {parts[3]}")
            path = repo.files().get("/".join(parts[4:]))
            if path is None:
                self._note(404)
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("X-Error-Message", "Entry not found")
                self.send_header("X-Repo-Commit", sha)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            size = os.path.getsize(path)
            head = {
                "X-Repo-Commit": sha,
                "ETag": f'"{repo.etag(path)}"',
                "Accept-Ranges": "bytes",
                "Content-Type": "application/octet-stream",
            }
            if self.command == "HEAD":
                return self._send(200, b"", head, length=size)
            with open(path, "rb") as f:
                data = f.read()
            rng = self.headers.get("Range")
            if rng and rng.startswith("bytes="):
                a, _, b = rng[6:].partition("-")
                a, b = int(a or 0), int(b) if b else size - 1
                head["Content-Range"] = f"bytes {a}-{b}/{size}"
                return self._send(206, data[a : b + 1], head)
            return self._send(200, data, head)
        self._missing("NotFound", f"unknown path {u.path}")


def serve(root, port=0, log=None):
    """Start in a daemon thread; returns (endpoint, server). Convenient as a pytest fixture."""
    h = type("H", (Handler,), {"hub_root": os.path.abspath(root), "log_file": log})
    srv = ThreadingHTTPServer(("127.0.0.1", port), h)
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{srv.server_port}", srv


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("root")
    ap.add_argument("--port", type=int, default=0)
    ap.add_argument("--log")
    a = ap.parse_args()
    endpoint, _ = serve(a.root, a.port, a.log)
    print(f"HF_ENDPOINT={endpoint}", flush=True)
    threading.Event().wait()

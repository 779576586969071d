"""A hub of the local machine: the requests that huggingface_hub makes to create, commit to, list and download a repository."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_of_the_fake_hub"


@dataclass
class FakeHub:
    """Repositories by name, each a list of commits (hash, files); what was asked for; files kept as large ones by their SHA-256."""

    repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    address: str = ""

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Add a commit of exactly these files and return its hash."""
        commits = self.repositories.setdefault(name, [])
        digest = hashlib.sha1(repr((name, len(commits), sorted(files.items()))).encode()).hexdigest()
        commits.append((digest, files))
        return digest

    def files(self, name: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """Return a revision's hash and files."""
        commits = self.repositories[name]
        found = commits[-1:] if revision == "main" else [c for c in commits if c[0] == revision]
        return found[0] if found else None

    def start(self) -> ThreadingHTTPServer:
        """Serve on a free port of this machine."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        if name not in self.hub.repositories:
            return self._error(401 if api else 404, "RepoNotFound")
        # api/models/OWNER/REPO[/revision/REVISION | /tree/REVISION], or OWNER/REPO/resolve/REVISION/PATH
        revision = (parts[5] if len(parts) > 5 else "main") if api else parts[3]
        found = self.hub.files(name, revision)
        if found is None:
            return self._error(404, "RevisionNotFound")
        commit, files = found
        if api and "tree" in parts:
            return self._json([{"type": "file", "path": path, "size": len(text), "oid": "0" * 40} for path, text in files.items()])
        if api:
            return self._json({"id": name, "modelId": name, "sha": commit, "private": False, "tags": []})
        content = files.get("/".join(parts[4:]))
        if content is None:
            return self._error(404, "EntryNotFound")
        return self._answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.requests.append(f"PUT {self.path}")
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != oid:
            return self._error(400, "BadContent")
        self.hub.large[oid] = content
        return self._answer(200, b"")

    def do_POST(self) -> None:
        body = self._body()
        self.hub.requests.append(f"POST {self.path}")
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401, "Unauthorized")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return self._json({"objects": [self._large(o) for o in json.loads(body)["objects"]]})
        name, _, action = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if action == "preupload":
            files = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self._json({"files": files})
        assert action == "commit", path
        return self._commit(name, [json.loads(line) for line in body.splitlines()])

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        url = f"{self.hub.address}/{name}"
        if name in self.hub.repositories:
            return self._answer(409, json.dumps({"url": url, "error": "it is there"}).encode(), {"Content-Type": "application/json"})
        self.hub.private[name] = wanted.get("private", False) or wanted.get("visibility") == "private"
        self.hub.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._json({"url": url, "name": name, "id": name})

    def _large(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"upload": {"href": f"{self.hub.address}/large/{wanted['oid']}"}}
        return wanted if wanted["oid"] in self.hub.large else wanted | {"actions": upload}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        found = self.hub.files(name)
        assert found is not None
        files = dict(found[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.hub.commit(name, files)
        return self._json({"commitUrl": f"{self.hub.address}/{name}/commit/{oid}", "commitOid": oid})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"

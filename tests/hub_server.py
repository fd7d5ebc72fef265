"""A small Hugging Face Hub on this machine: serves folders as repositories, so that the real client can be tested."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "c0ffee" + "0" * 34


class Hub:
    """Serves `repositories` (such as "models/me/llama": a folder); those in `gated` are refused to everybody."""

    def __init__(self, repositories: dict[str, Path], gated: tuple[str, ...] = ()) -> None:
        self.repositories, self.requests = repositories, list[str]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                self._form = self.rfile.read(length).decode()
                self._answer(body=True)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

            def _answer(self, body: bool) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                status, headers, content = self._look_up(unquote(urlparse(self.path).path))
                self.send_response(status)
                for key, value in {"X-Repo-Commit": COMMIT, **headers, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def _refuse(self, status: int, code: str) -> tuple[int, dict[str, str], bytes]:
                return status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}"

            def _look_up(self, path: str) -> tuple[int, dict[str, str], bytes]:
                api = path.startswith("/api/")
                path = path.removeprefix("/api").lstrip("/")
                if not path.startswith(("models/", "datasets/")):
                    path = f"models/{path}"
                kind, owner, name, *rest = [*path.split("/"), "", ""]
                repository = f"{kind}/{owner}/{name}"
                if repository in gated:
                    return self._refuse(403, "GatedRepo")
                if repository not in repositories:
                    return self._refuse(404, "RepoNotFound")
                verb, revision, *where = [*rest, "", ""]
                file = "/".join(part for part in where if part)
                if revision not in ("", "main", COMMIT):
                    return self._refuse(404, "RevisionNotFound")
                return self._of_api(repository, verb, file) if api else self._file(repositories[repository] / file)

            def _file(self, path: Path) -> tuple[int, dict[str, str], bytes]:
                if not path.is_file():
                    return self._refuse(404, "EntryNotFound")
                content = path.read_bytes()
                headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
                asked = self.headers.get("Range")
                if asked:
                    first, _, last = asked.removeprefix("bytes=").partition("-")
                    end = min(int(last or len(content)), len(content) - 1)
                    headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
                    return 206, headers, content[int(first) : end + 1]
                return 200, headers, content

            def _of_api(self, repository: str, verb: str, file: str) -> tuple[int, dict[str, str], bytes]:
                folder = repositories[repository]
                if verb == "paths-info":
                    form = parse_qs(self._form) if "=" in self._form else json.loads(self._form or "{}")
                    paths = form["paths"] if isinstance(form["paths"], list) else [form["paths"]]
                    found = [self._entry(folder, folder / name) for name in paths if (folder / name).exists()]
                elif verb == "tree":
                    place = folder / file
                    if not place.is_dir():
                        return self._refuse(404, "EntryNotFound")
                    found = [self._entry(folder, path) for path in sorted(place.iterdir())]
                else:
                    files = [{"rfilename": p.relative_to(folder).as_posix()} for p in folder.rglob("*") if p.is_file()]
                    info = {"id": repository.split("/", 1)[1], "sha": COMMIT, "siblings": files, "private": False}
                    return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
                return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

            def _entry(self, folder: Path, path: Path) -> dict[str, Any]:
                kind = "directory" if path.is_dir() else "file"
                size = 0 if path.is_dir() else path.stat().st_size
                return {"type": kind, "path": path.relative_to(folder).as_posix(), "size": size, "oid": "0" * 40}

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()

"""A hub of one's own: a server with the answers that the client of the hub needs, and the client's cache by hand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, name: str, content: Path, kind: str = "model") -> Path:
    """Lays out the cache of the hub's client with a repository that has the files of a folder; the snapshot."""
    repository = cache / f"{kind}s--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(content, snapshot)
    return snapshot


@contextlib.contextmanager
def served(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serves the files of folders as repositories, such as `datasets/me/rows`; yields the address and all requests."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            requests.append(f"{self.command} {path}")
            plain = path.removeprefix("api/").removeprefix("models/")
            folder = next(
                (content for name, content in repositories.items() if f"{plain}/".startswith(f"{name}/")), None
            )
            if folder is None:
                self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
                return
            files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
            if "/resolve/" in path:
                name = path.split(f"/resolve/{COMMIT}/")[-1]
                data = files[name].read_bytes()
                digest = hashlib.sha1(data).hexdigest()
                headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                if (asked := self.headers.get("Range")) is not None:
                    first, _, last = asked.removeprefix("bytes=").partition("-")
                    self._answer(206, data[int(first) : int(last) + 1 if last else None], headers)
                else:
                    self._answer(200, data, headers)
            elif "/tree/" in path:
                rows = [
                    {
                        "type": "file",
                        "path": name,
                        "size": file.stat().st_size,
                        "oid": hashlib.sha1(name.encode()).hexdigest(),
                    }
                    for name, file in files.items()
                ]
                self._answer(200, json.dumps(rows).encode(), {})
            else:
                info = {"id": plain, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                self._answer(200, json.dumps(info).encode(), {})

        def _answer(self, code: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

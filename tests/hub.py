"""A model hub on 127.0.0.1: enough of the protocol for huggingface_hub to list and fetch files from folders."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[str]:
    """Serve folders as repositories, `{"owner/name": folder}`; yields the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args: object) -> None:
            pass

        def answer(self, body: bool) -> None:
            path = self.path.split("?")[0].lstrip("/")
            for name, folder in repositories.items():
                if path.startswith(f"{name}/resolve/"):
                    file = folder / path.removeprefix(f"{name}/resolve/").split("/", 1)[1]
                    if file.is_file():
                        return self.send(file.read_bytes(), body)
                elif path.startswith(f"api/models/{name}/tree/"):
                    return self.send(b"[]", body)  # asked for chat templates in a folder of their own
                elif path.startswith(f"api/models/{name}"):
                    files = [str(f.relative_to(folder)) for f in sorted(folder.rglob("*")) if f.is_file()]
                    info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files], "private": False}
                    return self.send(json.dumps(info).encode(), body)
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if "resolve" in path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send(self, content: bytes, body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()

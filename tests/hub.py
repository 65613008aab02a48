"""A model hub on 127.0.0.1: enough of the protocol for huggingface_hub to list, fetch and upload files."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40
WRITER = "hf_writer"  # the token that may write; any other is refused


@contextmanager
def serve(repositories: dict[str, Path], uploads: Path | None = None) -> Iterator[str]:
    """Serve folders as repositories, `{"owner/name": folder}`; yields the endpoint.

    With `uploads`, repositories can be made and written: each is the folder `uploads/owner/name` from then on, a branch
    of it `uploads/owner/name@branch`. Large files are kept in `uploads/.lfs` until a commit names them.
    """
    repositories = dict(repositories)
    hidden: set[str] = set()

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
                    info = {
                        "id": name,
                        "sha": COMMIT,
                        "siblings": [{"rfilename": f} for f in files],
                        "private": name in hidden,
                    }
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

        def reply(self, content: object = None, status: int = 200) -> None:
            text = json.dumps({} if content is None else content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def received(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def create(self, given: dict[str, str]) -> None:
            assert uploads is not None
            name = f"{given['organization']}/{given['name']}"
            if name in repositories:
                return self.reply({"error": "You already created this model repo", "url": f"{address}/{name}"}, 409)
            repositories[name] = uploads / name
            repositories[name].mkdir(parents=True)
            if given.get("visibility") == "private" or given.get("private"):
                hidden.add(name)
            self.reply({"url": f"{address}/{name}"})

        def commit(self, name: str, revision: str, lines: list[bytes]) -> None:
            assert uploads is not None
            folder = repositories[name] if revision == "main" else uploads / f"{name}@{revision}"
            operations = [json.loads(line) for line in lines]
            for value in (operation["value"] for operation in operations if operation["key"] != "header"):
                if "oid" in value:
                    content = (uploads / ".lfs" / value["oid"]).read_bytes()
                    assert len(content) == value["size"]
                else:
                    content = base64.b64decode(value["content"])
                place = folder / value["path"]
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
            with (uploads / "commits.txt").open("a") as commits:
                commits.write(f"{name} {revision} {operations[0]['value']['summary']}\n")
            self.reply({"commitUrl": f"{address}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "pullRequestUrl": None})

        def do_POST(self) -> None:
            content, path = self.received(), self.path.split("?")[0]
            if uploads is None or self.headers.get("Authorization") != f"Bearer {WRITER}":
                return self.reply({"error": "You don't have the rights"}, 403)
            if path == "/api/repos/create":
                return self.create(json.loads(content))
            if path == "/api/validate-yaml":
                return self.reply({"errors": [], "warnings": []})
            if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
                wanted = json.loads(content)["objects"]
                made = [w | {"actions": {"upload": {"href": f"{address}/lfs/{w['oid']}"}}} for w in wanted]
                return self.reply({"transfer": "basic", "objects": made})
            match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/]+)", path)
            if match is None or match[1] not in repositories:
                return self.reply({"error": "Repository not found"}, 404)
            if match[2] == "branch":
                return self.reply()
            if match[2] == "commit":
                return self.commit(match[1], match[3], content.splitlines())
            modes = {True: "lfs", False: "regular"}
            paths = [file["path"] for file in json.loads(content)["files"]]
            files = [
                {"path": p, "uploadMode": modes[p.endswith(".safetensors")], "shouldIgnore": False, "oid": None}
                for p in paths
            ]
            self.reply({"files": files})

        def do_PUT(self) -> None:
            content = self.received()
            oid = self.path.removeprefix("/lfs/")
            if uploads is None or hashlib.sha256(content).hexdigest() != oid:
                return self.reply(status=400)
            (uploads / ".lfs").mkdir(parents=True, exist_ok=True)
            (uploads / ".lfs" / oid).write_bytes(content)
            self.reply()

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()

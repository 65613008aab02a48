"""A model hub on 127.0.0.1: enough of the protocol for huggingface_hub to list, fetch and upload files."""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from huggingface_hub import close_session, constants, hf_api

COMMIT, OTHER_COMMIT = "0" * 40, "1" * 40
WRITER = "hf_writer"  # the token that may write; any other is refused


@contextmanager
def using(endpoint: str, home: Path, token: str = "") -> Iterator[None]:
    """Turn the hub's client of this process to another endpoint, with a cache and a token of its own.

    The client reads its settings once, when it is imported, so they are replaced in every module that holds them.
    """
    values = {constants.ENDPOINT: endpoint, constants.HF_HUB_CACHE: str(home), constants.HF_TOKEN_PATH: f"{home}/token"}
    close_session()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        if token:
            patch.setenv("HF_TOKEN", token)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(hf_api.api, "endpoint", endpoint)
        for package, module in list(sys.modules.items()):
            if package.partition(".")[0] in ("huggingface_hub", "transformers", "sae_lens"):
                for key, value in list(vars(module).items()):
                    if isinstance(value, str) and value in values:
                        patch.setattr(module, key, values[value])
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template[template.index("/{repo_id}") :])
        try:
            yield
        finally:
            close_session()


@contextmanager
def serve(repositories: dict[str, Path], uploads: Path | None = None) -> Iterator[str]:
    """Serve folders as repositories, `{"owner/name": folder}`, and revisions, `{"owner/name@branch": folder}`.

    Yields the endpoint.

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
            path = unquote(self.path.split("?")[0].lstrip("/"))
            for name in list(repositories):
                if match := re.fullmatch(rf"{name}/resolve/([^/]+)/(.+)|api/models/{name}(?:/revision/([^/]+))?", path):
                    if (there := self.revision(name, match[1] or match[3] or "main")) is None:
                        return self.refuse("RevisionNotFound")
                    folder, commit = there
                    if match[2] and (folder / match[2]).is_file():
                        return self.send((folder / match[2]).read_bytes(), body, commit)
                    if not match[2]:
                        files = [str(f.relative_to(folder)) for f in sorted(folder.rglob("*")) if f.is_file()]
                        siblings = [{"rfilename": f} for f in files]
                        info = {"id": name, "sha": commit, "siblings": siblings, "private": name in hidden}
                        return self.send(json.dumps(info).encode(), body)
                elif path.startswith(f"api/models/{name}/tree/"):
                    return self.send(b"[]", body)  # asked for chat templates in a folder of their own
            self.refuse("EntryNotFound" if "resolve" in path else "RepoNotFound")

        def revision(self, name: str, revision: str) -> tuple[Path, str] | None:
            """The folder and the commit of a branch or a commit; a repository has one branch beside main at most."""
            if revision in ("main", COMMIT):
                return repositories[name], COMMIT
            branches = [known for known in repositories if known.startswith(f"{name}@")]
            wanted = f"{name}@{revision}" if revision != OTHER_COMMIT else "".join(branches)
            return (repositories[wanted], OTHER_COMMIT) if wanted in branches else None

        def refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send(self, content: bytes, body: bool, commit: str = COMMIT) -> None:
            tag = hashlib.sha256(content).hexdigest()
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            content = content[int(asked[1]) : int(asked[2]) + 1] if asked else content
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{tag}"')
            self.send_header("X-Repo-Commit", commit)
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

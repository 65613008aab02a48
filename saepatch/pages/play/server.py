"""The server of `saepatch play`: a few files and one door for questions, on 127.0.0.1, behind a token.

Another site's script cannot reach it: requests must name this machine as their host (against DNS rebinding) and know
the token, and the page runs no script but its own.
"""

import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from saepatch.errors import UserError
from saepatch.pages.play.queue import Message, Queue
from saepatch.records.documents import parse_json
from saepatch.records.files import plain
from saepatch.report.files import SOURCES

Question = Callable[[Mapping[str, Any]], Iterator[Message]]

HERE = Path(__file__).parent / "static"
FILES = {
    "": (HERE / "index.html", "text/html"),
    "play.css": (HERE / "play.css", "text/css"),
    "play.js": (HERE / "play.js", "text/javascript"),
    "palette.css": (SOURCES / "palette.css", "text/css"),
}
HOSTS = ("127.0.0.1", "localhost")
LARGEST = 1 << 20  # bytes of a question
# Styles stand in the cards, as in notebooks; texts are escaped there, and no script but the page's own runs.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def application(questions: Mapping[str, Question], token: str) -> Any:
    """The ASGI application: files under `/TOKEN/`, and questions, as JSON, posted to `/TOKEN/ask/NAME`.

    A question is answered by lines of JSON as they come.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route

    line = Queue()

    async def file(request: Request) -> Response:
        served = FILES.get(request.path_params.get("name", ""))
        if served is None:
            return PlainTextResponse("not found", 404, HEADERS)
        return FileResponse(served[0], media_type=served[1], headers=HEADERS)

    async def ask(request: Request) -> Response:
        question = questions.get(request.path_params["name"])
        if question is None:
            return PlainTextResponse("not found", 404, HEADERS)
        try:
            asked = await _asked(request.stream())
        except UserError as error:
            return PlainTextResponse(str(error), 400, HEADERS)
        return StreamingResponse(
            _lines(line.run(lambda: question(asked))), media_type="application/x-ndjson", headers=HEADERS
        )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        line.close()

    routes = [Route("/", file), Route("/{name}", file), Route("/ask/{name}", ask, methods=["POST"])]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts, Middleware(_Locked, token=token)], lifespan=lifespan)


class _Locked:
    """Lets requests pass whose path begins with the token, which is taken off; others find nothing."""

    def __init__(self, app: Any, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        _, _, rest = scope["path"].partition("/")
        given, slash, rest = rest.partition("/")
        if scope["type"] != "http" or not secrets.compare_digest(given.encode(), self._token) or not slash:
            await PlainTextResponse("not found: the address that saepatch play printed holds a token", 404, HEADERS)(
                scope, receive, send
            )
            return
        await self._app({**scope, "path": f"/{rest}"}, receive, send)


async def _asked(body: AsyncIterator[bytes]) -> Mapping[str, Any]:
    """The question that a body holds: an object of JSON."""
    parts, size = [], 0
    async for part in body:
        parts.append(part)
        if (size := size + len(part)) > LARGEST:
            raise UserError(f"the question is longer than {LARGEST:,} bytes: shorten it")
    try:
        asked = parse_json(b"".join(parts).decode(), "the question")
    except UnicodeDecodeError as error:
        raise UserError("the question is not UTF-8") from error
    if not isinstance(asked, dict):
        raise UserError("the question is no object of JSON")
    return asked


async def _lines(messages: AsyncIterator[Message]) -> AsyncIterator[str]:
    try:
        async for message in messages:
            yield json.dumps(plain(dict(message)), ensure_ascii=False, allow_nan=False) + "\n"
    finally:
        await messages.aclose()  # type: ignore[attr-defined]  # whose visitor may have gone


def check_installed() -> None:
    """Raises UserError where the extra is missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"saepatch play needs {error.name}: pip install 'saepatch[play]'") from error


def open_door(port: int) -> socket.socket:
    """A socket on this machine's own address, which no other machine reaches.

    Raises:
        UserError: the port is taken.
    """
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind(("127.0.0.1", port))
    except OSError as error:
        door.close()
        reason = error.strerror or str(error)
        raise UserError(f"port {port} cannot be used ({reason}): leave --port out for one that is free") from error
    return door


def page_server(questions: Mapping[str, Question], door: socket.socket) -> tuple[Any, str]:
    """A server, whose `run(sockets=[door])` ends with an interrupt, and the address, which holds a new token."""
    import uvicorn

    token = secrets.token_urlsafe(24)
    settings = uvicorn.Config(
        application(questions, token),
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(settings), f"http://127.0.0.1:{door.getsockname()[1]}/{token}/"

"""What stands before the application: who may ask, from where, and how large a request may be."""

import asyncio
import hmac
import re
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vugen_cli.serve.asked import Refusal

MAX_UPLOAD = 20 * 2**20
"""Bytes of the pictures of one request."""

MAX_BODY = 2**18
"""Bytes of any other request."""

BODY_SECONDS = 60
"""A request that is not there after so long is dropped."""

OPEN = re.compile(r"/|/healthz|/images/[\w.-]+")  # paths that need no token
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """ASGI middleware that refuses what should not reach the application.

    Args:
        app: the application.
        hosts: names that the Host header may hold, against DNS rebinding; None: any.
        token: that a client must show; None: none.
        at_once: requests in work, each of which may hold an upload.
        count: called with path, status and seconds of each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: set[str] | None,
        token: str | None,
        at_once: int,
        count: Callable[[str, int, float], None],
    ):
        self.app, self.hosts, self.token, self.at_once, self.count = app, hosts, token, at_once, count
        self.in_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, body = time.monotonic(), 499, _Body(scope, receive)  # 499: the client left

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status >= 400:
                    await body.discard()
                headers = MutableHeaders(raw=list(message["headers"]))
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if not body.whole:
                    headers["connection"] = "close"
                message = {**message, "headers": headers.raw}
            await send(message)

        try:
            self._check(Headers(scope=scope), scope)
            place = not OPEN.fullmatch(scope["path"])  # those alone that may draw take places
            self.in_work += place
            try:
                await self.app(scope, await body.opened(), answer)
            finally:
                self.in_work -= place
        except Refusal as refusal:
            await JSONResponse(refusal.body(), refusal.status, refusal.headers)(scope, receive, answer)
        except Exception:
            status = 500  # which the server around answers
            raise
        finally:
            self.count(scope["path"], status, time.monotonic() - began)

    def _check(self, headers: Headers, scope: Scope) -> None:
        host = headers.get("host", "")
        name = re.sub(r":\d+$", "", host).lower()
        if self.hosts is not None and name not in self.hosts:
            raise Refusal(400, "the Host header names another server than this one", "wrong_host")
        # A page elsewhere can make a browser post a form here; the browser then says where that comes from.
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        foreign = site not in ("same-origin", "none") if site else origin and origin.split("://")[-1] != host
        if scope["method"] != "GET" and foreign:
            raise Refusal(403, "requests from other sites' pages are not taken", "wrong_origin")
        self._check_token(headers, scope)
        if scope["method"] != "GET" and self.in_work >= self.at_once:
            raise Refusal(429, "too many requests at once", "too_many_requests", headers={"retry-after": "2"})

    def _check_token(self, headers: Headers, scope: Scope) -> None:
        if self.token is None or OPEN.fullmatch(scope["path"]):
            return
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        # Headers are latin-1 by their definition; the token may be anything, and end in what latin-1 has as
        # a space.
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            shown.strip(" \t").encode("latin-1"), self.token.encode()
        ):
            raise Refusal(
                401,
                "the token is wrong or missing",
                "invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


class _Body:
    """A request's body as it comes in, up to its limit.

    Attributes:
        whole: it has been received to its end.
    """

    def __init__(self, scope: Scope, receive: Receive):
        headers = Headers(scope=scope)
        self._receive, self.whole, self._bytes = receive, False, 0
        self._uploads = scope["path"] == "/v1/images/edits"
        self._limit = MAX_UPLOAD + MAX_BODY if self._uploads else MAX_BODY
        if OPEN.fullmatch(scope["path"]):
            self._limit = 0  # they ask for no token, and take no body
        self._announced = headers.get("content-length", "0")
        self._asks_first = "100-continue" in headers.get("expect", "").lower()
        self._until = time.monotonic() + BODY_SECONDS

    async def opened(self) -> Receive:
        """From where the application receives the body: as it comes in, or a small one whole.

        Raises:
            Refusal: it is too large or too slow; of uploads, that is raised where they are read.
        """
        if self._announced.isdecimal() and int(self._announced) > self._limit:
            raise self._too_large()
        if self._uploads:
            return self._next
        messages = [await self._next()]
        while not self.whole:
            messages.append(await self._next())
        messages.reverse()

        async def replay() -> Message:
            return messages.pop() if messages else await self._receive()

        return replay

    async def _next(self) -> Message:
        if self.whole:
            return await self._receive()  # which waits until the client leaves
        message = await self._within_time()
        if message is None:
            raise Refusal(408, f"the request took longer than {BODY_SECONDS} s", "too_slow")
        if self._bytes > self._limit:
            raise self._too_large()
        return message

    async def _within_time(self) -> Message | None:
        try:
            message = await asyncio.wait_for(self._receive(), self._until - time.monotonic())
        except TimeoutError:
            return None
        self._bytes += len(message.get("body", b""))
        self.whole = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def discard(self) -> None:
        """Read on without keeping anything: a client that still writes would not see its answer."""
        if self._asks_first and not self._bytes:
            return
        self._until, most = time.monotonic() + 5, self._bytes + 2**26
        while not self.whole and self._bytes < most and await self._within_time():
            pass

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the request is larger than {self._limit:,} bytes", "too_large")

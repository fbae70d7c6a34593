"""The HTTP application: OpenAI's image interface, the page, health and metrics."""

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from vugen_cli.data.shapes import Shape, as_shape, parse_shape, shape_name
from vugen_cli.errors import VugenError
from vugen_cli.sampling.draw import png
from vugen_cli.sampling.sampler import SAMPLE_BATCH, Sampler, picture_shape
from vugen_cli.serve.asked import MAX_IMAGES, MAX_PROMPT, MAX_STEPS, Edit, Generation, Refusal, invalid
from vugen_cli.serve.drawer import Drawer, Job, QueueFull, Stopping
from vugen_cli.serve.guard import Guard
from vugen_cli.serve.shelf import Shelf
from vugen_cli.serve.uploads import read_edit
from vugen_cli.version import __version__
from vugen_cli.vlm.prompts import Prompt, refuse_places

PATHS = ("/", "/healthz", "/metrics", "/v1/models", "/v1/images/generations", "/v1/images/edits")
TELLING = 0.2  # seconds between two words on progress


class Meters:
    """What `/metrics` says of one server, in Prometheus' format."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("vugen_requests", "Requests.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "vugen_request_seconds", "From a request's first byte to its answer's last.", ["path"],
            registry=self.registry, buckets=(0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300),
        )  # fmt: skip
        self.images = Counter("vugen_images", "Pictures drawn.", registry=self.registry)
        self.batches = Histogram(
            "vugen_batch_images", "Pictures drawn together.",
            registry=self.registry, buckets=(1, 2, 4, 8, 16, 32, 64),
        )  # fmt: skip
        self.drawing = Counter("vugen_drawing_seconds", "Spent drawing.", registry=self.registry)
        self.waiting = Gauge("vugen_waiting_images", "Pictures that wait.", registry=self.registry)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        name = path if path in PATHS else "/images" if path.startswith("/images/") else "other"
        self.requests.labels(name, str(status)).inc()
        self.seconds.labels(name).observe(seconds)

    def batch(self, size: int, seconds: float) -> None:
        """Count a batch that was drawn."""
        self.images.inc(size)
        self.batches.observe(size)
        self.drawing.inc(seconds)


class Service:
    """A sampler and all that one server keeps beside it.

    Args:
        sampler: draws.
        batch: images drawn together at most.
        limit: images that may wait.
    """

    def __init__(self, sampler: Sampler, batch: int = SAMPLE_BATCH, limit: int = 64):
        self.sampler, self.meters, self.shelf = sampler, Meters(), Shelf()
        self.name = sampler.path.stem
        self.began = int(time.time())
        self.drawer = Drawer(sampler, batch, limit, self.meters.batch)
        self.meters.waiting.set_function(lambda: self.drawer.waiting)
        # Others are not refused pictures: their VLM may read them, as for `vugen sample --image`.
        self.learned_edits = sampler.learned_edits

    @property
    def sizes(self) -> list[str]:
        """Of the pictures that it learned to draw, WIDTHxHEIGHT, the usual one first."""
        usual = shape_name(as_shape(self.sampler.card.image_size))
        return list(dict.fromkeys([usual, *(self.sampler.card.data.shapes or [])]))

    def model(self) -> dict[str, Any]:
        """The one model, as `GET /v1/models` lists it, with what the page wants to know."""
        defaults = self.sampler.defaults
        return {
            "id": self.name,
            "object": "model",
            "created": self.began,
            "owned_by": "vugen",
            "vugen": {
                "version": __version__,
                "vlm": Path(self.sampler.card.vlm.name).name,
                "size": self.sampler.card.image_size,
                "sizes": self.sizes,
                "edits": self.learned_edits,
                "steps": defaults.steps,
                "guidance": defaults.guidance,
                "solver": defaults.solver,
                "most": {"n": MAX_IMAGES, "steps": MAX_STEPS, "prompt": MAX_PROMPT},
            },
        }

    def size(self, asked: Generation) -> Shape:
        """Of the pictures that a request asks for.

        Raises:
            Refusal: of a model or size that there is not.
        """
        if asked.model not in (None, self.name):
            said = f"there is no model {asked.model[:60]} here: it is {self.name}"
            raise Refusal(404, said, "model_not_found", "model")
        if asked.size not in ("auto", *self.sizes):
            said = f"size: this sampler draws {', '.join(self.sizes)}"
            raise Refusal(400, said, "invalid_value", "size")
        return parse_shape(self.sizes[0] if asked.size == "auto" else asked.size)

    def cut(self, asked: Edit) -> Shape:
        """What the pictures of a request are cut to.

        Raises:
            Refusal: of a model or size that there is not, or now is no time.
        """
        shape = picture_shape(self.sampler.card, self.size(asked))
        with _refused():
            self.drawer.check(asked.n)
        return shape

    def submit(self, asked: Generation, pictures: Sequence[Tensor] = ()) -> list[Job]:
        """Queue what a request asks for, `pictures` being its own, uint8 [3, H, W] each, as `cut` says.

        Raises:
            Refusal: of a model, size or prompt that there is not, or now is no time.
        """
        size = self.size(asked)
        by_pictures = asked.image_guidance if isinstance(asked, Edit) else None
        settings = self.sampler.settings(asked.steps, asked.guidance, asked.solver, by_pictures)
        # Such that a page's script, whose integers end at 2^53, can say it again.
        seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        prompt = Prompt(asked.prompt, tuple(pictures))
        try:
            if not pictures:
                refuse_places([asked.prompt], "add one (/v1/images/edits)")
            with _refused():
                return self.drawer.submit(prompt, asked.n, seed, settings, size)
        except VugenError as error:
            raise Refusal(400, str(error), "invalid_value", "image" if pictures else "prompt") from error

    def png(self, job: Job, pixels: Tensor) -> bytes:
        """A drawn image as a file that says how it was made; no path of this machine is in it."""
        settings = job.settings.model_dump(mode="json", include={"steps", "guidance", "solver"})
        about = {"prompt": job.prompt.text, "index": job.index, "seed": job.seed, **settings}
        if job.prompt.pictures:
            about |= {"pictures": len(job.prompt.pictures), "image_guidance": job.settings.image_guidance}
        card = self.sampler.card
        made_by = {"sampler": self.name, "step": card.step, "vlm": Path(card.vlm.name).name}
        return png(pixels, about | made_by | {"version": __version__})

    async def file(self, job: Job) -> bytes:
        """The PNG of a job, when it is drawn.

        Raises:
            Refusal: it could not be drawn.
        """
        try:
            pixels = await asyncio.wrap_future(job.future)
        except Stopping as error:
            raise _stopping(error) from error
        except VugenError as error:
            raise Refusal(400, str(error), "invalid_value") from error
        except Exception as error:
            raise Refusal(500, "the picture could not be drawn; the server's log says why") from error
        return await asyncio.to_thread(self.png, job, pixels)

    def datum(self, asked: Generation, job: Job, file: bytes, base: str) -> dict[str, Any]:
        """A picture as a response holds it."""
        if asked.response_format == "url":
            return {"url": f"{base}images/{self.shelf.put(file)}", "seed": job.seed}
        return {"b64_json": base64.b64encode(file).decode(), "seed": job.seed}


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """Turn what a drawer says when it takes no more work into an answer."""
    try:
        yield
    except QueueFull as error:
        wait = {"retry-after": str(error.seconds)}
        raise Refusal(429, str(error), "queue_full", headers=wait) from error
    except Stopping as error:
        raise _stopping(error) from error


def _stopping(error: Stopping) -> Refusal:
    return Refusal(503, str(error), "stopping", headers={"retry-after": "30"})


async def answer(
    service: Service, asked: Generation, request: Request, event: str, pictures: Sequence[Tensor] = ()
) -> Response:
    """Draw what was asked and answer, at once or as a stream of events."""
    jobs = await asyncio.to_thread(
        service.submit, asked, pictures
    )  # it may wait for prompts that are being read
    if asked.stream:
        stream = _events(service, asked, jobs, request, event)
        return StreamingResponse(
            stream, media_type="text/event-stream", headers={"cache-control": "no-store"}
        )
    drawing = asyncio.ensure_future(_files(service, jobs))
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((drawing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not drawing.done():
            return Response(status_code=499)
        drawn = drawing.result()
    finally:
        leaving.cancel()
        drawing.cancel()
        for job in jobs:
            job.leave()
    base = str(request.base_url)
    data = [service.datum(asked, job, file, base) for job, file in zip(jobs, drawn, strict=True)]
    return JSONResponse(
        {"created": int(time.time()), "data": data, "size": size_of(jobs), "output_format": "png"},
        headers={"cache-control": "no-store"},
    )  # fmt: skip


def size_of(jobs: list[Job]) -> str:
    """What a request's pictures measure, WIDTHxHEIGHT."""
    assert jobs[0].size
    return shape_name(jobs[0].size)


async def _files(service: Service, jobs: list[Job]) -> list[bytes]:
    return [await service.file(job) for job in jobs]


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    service: Service, asked: Generation, jobs: list[Job], request: Request, event: str
) -> AsyncIterator[str]:
    """OpenAI's stream: an event for each picture, and ours on progress between them."""
    base = str(request.base_url)
    file = None
    try:
        for job in jobs:  # which is the order in which they are drawn
            file = asyncio.ensure_future(service.file(job))
            while not file.done():
                await asyncio.wait([file], timeout=TELLING)
                if await request.is_disconnected():
                    return
                part = sum(job.done for job in jobs) / len(jobs)
                yield _event(f"{event}.progress", done=round(part, 3), ahead=service.drawer.ahead(job))
            datum = service.datum(asked, job, file.result(), base)
            usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
            yield _event(
                f"{event}.completed",
                **datum,
                index=job.index,
                created_at=int(time.time()),
                size=size_of(jobs),
                output_format="png",
                background="opaque",
                quality="auto",
                usage={**usage, "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}},
            )
    except Refusal as refusal:
        yield f"event: error\ndata: {json.dumps(refusal.body())}\n\n"
    finally:
        if file:
            file.cancel()
        for job in jobs:
            job.leave()


def _event(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"


def page() -> tuple[str, dict[str, str]]:
    """The page, and the headers that let it run its own script and style and nothing else."""
    html = files("vugen_cli.serve").joinpath("page.html").read_text(encoding="utf-8")

    def hashed(tag: str) -> str:
        (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    )
    return html, {"content-security-policy": policy, "x-frame-options": "DENY", "cache-control": "no-cache"}


def make_app(service: Service, hosts: set[str] | None = None, token: str | None = None) -> FastAPI:
    """The application of one service.

    Args:
        service: draws.
        hosts: names that the Host header may hold; None: any.
        token: that clients must show as a bearer; None: none.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.drawer.give_up()  # what was taken is done by now, or has had its time

    app = FastAPI(title="vugen", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    at_once = 2 * service.drawer.limit  # those that wait, and as many that are being read or answered
    app.add_middleware(Guard, hosts=hosts, token=token, at_once=at_once, count=service.meters.request)
    _tell_errors(app)
    html, headers = page()

    @app.api_route("/", methods=["GET", "HEAD"])
    async def index() -> Response:
        return HTMLResponse(html, headers=headers)

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def healthz() -> Response:
        drawer = service.drawer
        state = "stopping" if drawer.stopping else "ok" if drawer.healthy else "the last batch failed"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = generate_latest(service.meters.registry)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.model()]})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        if name != service.name:
            raise Refusal(404, f"there is no such model here: it is {service.name}", "model_not_found")
        return JSONResponse(service.model())

    @app.post("/v1/images/generations")
    async def generations(asked: Generation, request: Request) -> Response:
        return await answer(service, asked, request, "image_generation")

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        if service.drawer.stopping:
            raise _stopping(Stopping())
        asked, pictures = await read_edit(request, service.cut)
        return await answer(service, asked, request, "image_edit", pictures)

    @app.get("/images/{name}")
    async def image(name: str) -> Response:
        file = service.shelf.get(name)
        if file is None:
            raise Refusal(404, "there is no such picture, or not any more", "not_found")
        return Response(file, media_type="image/png", headers={"cache-control": "private, max-age=3600"})

    return app


def _tell_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    def tell(find: Callable[[Any], Refusal]) -> Callable[[Request, Exception], Any]:
        async def handler(_: Request, error: Exception) -> Response:
            refusal = find(error)
            return JSONResponse(refusal.body(), refusal.status, refusal.headers)

        return handler

    def of_http(error: HTTPException) -> Refusal:
        said = {404: "there is nothing at this address", 405: "this address does not take this method"}
        # FastAPI's words, of what no decoder of JSON takes.
        if error.detail == "There was an error parsing the body":
            return Refusal(400, "the body is no JSON", "invalid_json")
        headers = dict(error.headers or {})
        return Refusal(error.status_code, said.get(error.status_code, str(error.detail)), headers=headers)

    def of_body(error: RequestValidationError) -> Refusal:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return Refusal(400, "the body is no JSON", "invalid_json")
        if len(first["loc"]) < 2:
            return Refusal(400, "send a JSON object, with content-type application/json", "invalid_json")
        return invalid(first)

    app.add_exception_handler(Refusal, tell(lambda error: error))
    app.add_exception_handler(HTTPException, tell(of_http))
    app.add_exception_handler(RequestValidationError, tell(of_body))
    app.add_exception_handler(ValidationError, tell(lambda error: invalid(error.errors()[0])))
    app.add_exception_handler(ClientDisconnect, tell(lambda _: Refusal(499, "the client left")))
    app.add_exception_handler(
        Exception, tell(lambda error: Refusal(500, "something went wrong; the server's log says what"))
    )

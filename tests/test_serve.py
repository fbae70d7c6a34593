"""`vugen serve`: OpenAI's interface by OpenAI's client, and what clients do wrong. About ten seconds."""

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch
import uvicorn
from conftest import make_card
from PIL import Image
from starlette.responses import JSONResponse
from torch import Tensor

from vugen_cli import load_sampler
from vugen_cli.commands.serve import _token, serve
from vugen_cli.data.shapes import Shape, shape_name
from vugen_cli.errors import VugenError
from vugen_cli.recipe import Sampling
from vugen_cli.sampling.sampler import Kind, Sampler, open_picture
from vugen_cli.serve import drawer as drawing
from vugen_cli.serve import guard, uploads
from vugen_cli.serve.app import Service, make_app, page
from vugen_cli.serve.drawer import Drawer, Job, QueueFull, Stopping
from vugen_cli.serve.run import address, hosts_of, listen, run
from vugen_cli.serve.shelf import Shelf
from vugen_cli.vlm.prompts import Prompt

QUICK: dict[str, Any] = {"steps": 1, "guidance": 1.0}
BEAR = "a bear in a forest"
HTTP = httpx2.Client(timeout=30)  # one for all: each reads the certificates of the world anew


class Gated:
    """Stands for a sampler; draws grey when its gate is open, and remembers what was drawn together."""

    def __init__(self) -> None:
        self.gate, self.drawing = threading.Event(), threading.Event()
        self.batches: list[list[str]] = []
        self.defaults, self.card, self.path = Sampling(), make_card("sampler"), Path("gated.safetensors")
        self.learned_edits = False

    def settings(self, *given: Any) -> Sampling:
        steps, guidance, *_ = given
        return Sampling(steps=steps or 25, guidance=guidance or 3.0)

    def kind(self, prompt: Prompt) -> Kind:
        return 0, False, 32

    def draw_together(
        self,
        keys: list[tuple[int, Prompt, int]],
        settings: Sampling,
        each_step: Callable[[], None],
        size: Shape | None = None,
    ) -> Tensor:
        self.batches.append([prompt.text for _, prompt, _ in keys])
        self.drawing.set()
        while not self.gate.wait(0.01):
            each_step()
        if "fail" in keys[0][1].text:
            raise RuntimeError("a secret of the server")
        return torch.full((len(keys), 3, *(size or (64, 64))), 128, dtype=torch.uint8)


@contextlib.contextmanager
def running(service: Service, token: str | None = None) -> Iterator[str]:
    """Serve in a thread; yields the address, with its final slash."""
    listener = listen("127.0.0.1", 0)
    app = make_app(service, hosts_of(listener), token)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield address(listener)
    finally:
        server.should_exit = True
        thread.join()


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}v1", api_key=key, max_retries=0, http_client=HTTP)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    """The bundled one: its pictures depend on every weight."""
    return load_sampler()


@pytest.fixture(scope="module")
def service(sampler: Sampler) -> Service:
    return Service(sampler)


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with running(service) as where:
        yield where


@pytest.fixture
def gated() -> Iterator[Gated]:
    stand_in = Gated()
    yield stand_in
    stand_in.gate.set()


def service_of(gated: Gated, **options: Any) -> Service:
    return Service(gated, **options)  # type: ignore[arg-type]


def until(true: Callable[[], bool]) -> None:
    for _ in range(500):
        if true():
            return
        time.sleep(0.01)
    pytest.fail("did not come true within 5 s")


def pixels(b64: str | None) -> np.ndarray:
    assert b64
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64)))).astype(int)


def png(**options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG", **options)
    return file.getvalue()


# --- pictures


def test_openais_client_gets_the_pictures_of_the_sampler(url: str, sampler: Sampler) -> None:
    response = client(url).images.generate(prompt=BEAR, n=2, size="64x64", extra_body={**QUICK, "seed": 7})
    assert response.data and len(response.data) == 2
    for i, image in sampler_images(sampler, BEAR, 2, 7).items():
        assert np.abs(pixels(response.data[i].b64_json) - image).max() <= 1
    text = Image.open(io.BytesIO(base64.b64decode(response.data[1].b64_json or ""))).text  # type: ignore[attr-defined]
    said = {key: text[f"vugen:{key}"] for key in ("prompt", "index", "seed", "steps", "guidance", "vlm")}
    assert said == {"prompt": BEAR, "index": "1", "seed": "7", "steps": "1", "guidance": "1.0", "vlm": "nano"}
    assert not any("/" in value for value in text.values()), "no path of the server leaves it"


def sampler_images(sampler: Sampler, prompt: str, n: int, seed: int) -> dict[int, np.ndarray]:
    drawn = sampler.sample([prompt], n, seed, QUICK["steps"], QUICK["guidance"])
    return {i: image.permute(1, 2, 0).numpy().astype(int) for _, i, image in drawn}


def test_a_picture_to_edit_is_read_as_the_sampler_reads_it(url: str, sampler: Sampler) -> None:
    wish = {**QUICK, "seed": 3, "image_guidance": 2}
    edited = client(url).images.edit(image=("a.png", png()), prompt="in the snow", extra_body=wish)
    prompt = Prompt("in the snow", (open_picture(png(), 64),))
    ((_, _, image),) = sampler.sample([prompt], 1, 3, QUICK["steps"], QUICK["guidance"], None, 2.0)
    assert edited.data
    drawn = edited.data[0].b64_json
    assert np.abs(pixels(drawn) - image.permute(1, 2, 0).numpy()).max() <= 1
    assert (pixels(drawn) != sampler_images(sampler, "in the snow", 1, 3)[0]).any()
    text = Image.open(io.BytesIO(base64.b64decode(drawn or ""))).text  # type: ignore[attr-defined]
    assert (text["vugen:pictures"], text["vugen:image_guidance"]) == ("1", "2.0")


def test_images_of_other_seeds_and_prompts_are_the_same_drawn_together(sampler: Sampler) -> None:
    keys = [(1, Prompt(BEAR), 0), (2, Prompt("a cat on a beach"), 3), (3, Prompt(BEAR), 1)]
    together = sampler.draw_together(keys, sampler.settings(1, 2.0))
    for key, image in zip(keys, together, strict=True):
        (alone,) = sampler.draw_together([key], sampler.settings(1, 2.0))
        assert (alone.int() - image.int()).abs().max() <= 1
    assert not torch.equal(together[0], together[2])


def test_a_url_leads_to_the_picture_and_names_cannot_be_guessed(url: str) -> None:
    response = client(url).images.generate(prompt=BEAR, response_format="url", extra_body=QUICK)
    assert response.data
    where = response.data[0].url or ""
    assert re.fullmatch(re.escape(url) + r"images/[\w-]{32}\.png", where)
    found = HTTP.get(where)
    assert found.headers["content-type"] == "image/png" and Image.open(io.BytesIO(found.content)).size == (
        64,
        64,
    )
    assert HTTP.get(f"{url}images/other.png").status_code == 404


def test_the_shelf_holds_no_more_than_it_may_and_not_for_ever() -> None:
    shelf = Shelf(limit=10, seconds=0.05)
    first, second = shelf.put(b"123456"), shelf.put(b"7890ab")
    assert shelf.get(first) is None and shelf.get(second) == b"7890ab"
    time.sleep(0.06)
    assert shelf.get(second) is None and not shelf._files and shelf._bytes == 0


def test_a_stream_tells_of_progress_and_then_gives_each_picture(url: str) -> None:
    wish = {"prompt": BEAR, "n": 2, "stream": True, "seed": 0, **QUICK}
    events = []
    with HTTP.stream("POST", f"{url}v1/images/generations", json=wish) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line[6:]))
    done = [event for event in events if event["type"] == "image_generation.completed"]
    assert sorted(event["index"] for event in done) == [0, 1]
    assert [e["done"] for e in events if e["type"] == "image_generation.progress"][-1] == 1
    typed = list(client(url).images.generate(prompt=BEAR, stream=True, extra_body=QUICK))
    assert any(event.type == "image_generation.completed" and event.b64_json for event in typed)


def test_the_example_of_the_docs_runs(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "docs/serve.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(example.replace("http://127.0.0.1:8000/", url), {})
    assert base64.b64decode(capsys.readouterr().out.strip()).startswith(b"\x89PNG")


def test_the_model_is_listed_with_what_it_can(url: str) -> None:
    (model,) = client(url).models.list().data
    assert model.id == "sampler" and model.vugen["size"] == 64 and model.vugen["edits"] is True  # type: ignore[attr-defined]
    assert client(url).models.retrieve("sampler").id == "sampler"


# --- the queue


def test_what_waits_and_is_alike_is_drawn_together_first_come_first_served(gated: Gated) -> None:
    drawer = Drawer(gated, batch=3)  # type: ignore[arg-type]
    first = drawer.submit(Prompt("first"), 1, 0, Sampling())
    gated.drawing.wait(5)
    jobs = [
        job
        for prompt, steps in (("b", 25), ("other", 1), ("c", 25), ("d", 25), ("e", 25))
        for job in drawer.submit(Prompt(prompt), 1, 0, Sampling(steps=steps))
    ]
    assert [drawer.ahead(job) for job in jobs] == [0, 1, 2, 3, 4]
    gated.gate.set()
    for job in [*first, *jobs]:
        job.future.result(5)
    assert gated.batches == [["first"], ["b", "c", "d"], ["other"], ["e"]]


def test_each_size_that_was_learned_is_drawn_apart_and_no_other(gated: Gated) -> None:
    gated.card.data.shapes = ["64x64", "48x80"]
    gated.gate.set()
    with running(service_of(gated)) as url:
        ask = partial(HTTP.post, f"{url}v1/images/generations")
        for size, wanted in (("auto", (64, 64)), ("64x64", (64, 64)), ("48x80", (48, 80))):
            answer = ask(json={"prompt": BEAR, "size": size}).json()
            file = base64.b64decode(answer["data"][0]["b64_json"])
            assert Image.open(io.BytesIO(file)).size == wanted and answer["size"] == shape_name(wanted[::-1])
        assert HTTP.get(f"{url}v1/models").json()["data"][0]["vugen"]["sizes"] == ["64x64", "48x80"]
        refused = ask(json={"prompt": BEAR, "size": "80x48"})
        assert refused.status_code == 400 and "draws 64x64, 48x80" in refused.json()["error"]["message"]
    jobs = [Job(0, Prompt(BEAR), 0, Sampling(), (0, False, 32), size) for size in ((64, 64), (80, 48))]
    assert jobs[0].alike(jobs[0]) and not jobs[0].alike(jobs[1])


def test_a_full_queue_says_when_to_come_back(gated: Gated) -> None:
    with running(service_of(gated, limit=3)) as url:
        drawn = []
        thread = threading.Thread(target=lambda: drawn.append(client(url).images.generate(prompt="a", n=3)))
        thread.start()
        gated.drawing.wait(5)  # of its three, all are in the batch: the queue is empty again
        more = [threading.Thread(target=client(url).images.generate, kwargs={"prompt": "b", "n": 3})]
        more[0].start()
        until(lambda: "vugen_waiting_images 3.0" in HTTP.get(f"{url}metrics").text)
        with pytest.raises(openai.RateLimitError) as told:
            client(url).images.generate(prompt="c")
        assert int(told.value.response.headers["retry-after"]) >= 1 and told.value.code == "queue_full"
        gated.gate.set()
        for waiting in (thread, *more):
            waiting.join()
        assert len(drawn[0].data) == 3


def test_whoever_leaves_is_not_drawn_for(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    service, taken = service_of(gated), []
    submit = service.drawer.submit
    monkeypatch.setattr(service.drawer, "submit", lambda *wish: taken.append(submit(*wish)) or taken[-1])
    with running(service) as url:
        (job,) = submit(Prompt("first"), 1, 0, Sampling())
        gated.drawing.wait(5)
        for stream in (False, True):
            wish = {"prompt": "left", "n": 2, "stream": stream}
            with (
                contextlib.suppress(httpx2.ReadTimeout),
                HTTP.stream("POST", f"{url}v1/images/generations", json=wish, timeout=0.5) as response,
            ):
                next(response.iter_lines())  # a first event, or none within half a second
            until(lambda: bool(taken) and all(job.future.cancelled() for job in taken[-1]))
            taken.clear()
        assert service.drawer.waiting == 0
        gated.gate.set()
        job.future.result(5)
        assert gated.batches == [["first"]]


def test_a_batch_that_everybody_left_is_given_up(gated: Gated) -> None:
    drawer = Drawer(gated)  # type: ignore[arg-type]
    (left,) = drawer.submit(Prompt("left"), 1, 0, Sampling())
    gated.drawing.wait(5)
    left.leave()
    (job,) = drawer.submit(Prompt("stays"), 1, 0, Sampling())
    until(lambda: ["stays"] in gated.batches)
    gated.gate.set()
    assert job.future.result(5).shape == (3, 64, 64)


def test_a_drawing_that_fails_tells_no_secret_and_ends_nothing(
    gated: Gated, capfd: pytest.CaptureFixture[str]
) -> None:
    gated.gate.set()
    with running(service_of(gated)) as url:
        with pytest.raises(openai.InternalServerError) as told:
            client(url).images.generate(prompt="fail")
        assert "secret" not in told.value.response.text and "Traceback" not in told.value.response.text
        assert "a secret of the server" in capfd.readouterr().err, "the log has it"
        assert HTTP.get(f"{url}healthz").status_code == 503
        events = HTTP.post(f"{url}v1/images/generations", json={"prompt": "fail", "stream": True}).text
        assert "event: error" in events and "secret" not in events
        client(url).images.generate(prompt="works")
        assert HTTP.get(f"{url}healthz").json() == {"status": "ok"}


def test_a_server_that_is_sent_no_more_work_is_not_ill_for_ever(
    gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated.gate.set()
    with running(service_of(gated)) as url:
        with pytest.raises(openai.InternalServerError):
            client(url).images.generate(prompt="fail")
        assert HTTP.get(f"{url}healthz").status_code == 503
        monkeypatch.setattr(drawing, "ILL", 0.0)
        assert HTTP.get(f"{url}healthz").json() == {"status": "ok"}


# --- what clients do wrong


@pytest.mark.parametrize(
    ("body", "status", "code", "said"),
    [
        (b'{"prompt": "a b', 400, "invalid_json", "no JSON"),
        (b'"a bear"', 400, "invalid_json", "JSON object"),
        (b"[" * 100_000, 400, "invalid_json", "body"),
        (b"", 400, "invalid_json", "JSON object"),
        ({"n": 2}, 400, "invalid_value", "prompt"),
        ({"prompt": " "}, 400, "invalid_value", "say what to draw"),
        ({"prompt": "a" * 4001}, 400, "invalid_value", "4000"),
        ({"prompt": "a bear " * 400}, 400, "invalid_value", "too long"),
        ({"prompt": "a hat on {image}"}, 400, "invalid_value", "no picture is given"),
        (b'{"prompt": "\\ud800"}', 400, "invalid_value", "prompt"),
        ({"prompt": "a", "n": 10_000}, 400, "invalid_value", "n: "),
        ({"prompt": "a", "n": 0}, 400, "invalid_value", "n: "),
        ({"prompt": "a", "steps": 100_000}, 400, "invalid_value", "steps"),
        (b'{"prompt": "a", "guidance": NaN}', 400, "invalid_value", "guidance"),
        ({"prompt": "a", "seed": -1}, 400, "invalid_value", "seed"),
        ({"prompt": "a", "size": "1024x1024"}, 400, "invalid_value", "64x64"),
        ({"prompt": "a", "model": "dall-e-3"}, 404, "model_not_found", "it is sampler"),
        ({"prompt": "a", "sede": 1}, 400, "unknown_parameter", "sede"),
        (b" " * (guard.MAX_BODY + 1), 413, "too_large", "larger"),
    ],
)
def test_a_wrong_request_is_told_in_openais_shape(
    url: str, body: bytes | dict[str, Any], status: int, code: str | None, said: str
) -> None:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    where, kind = f"{url}v1/images/generations", {"content-type": "application/json"}
    response = HTTP.post(where, content=sent, headers=kind)
    error = response.json()["error"]
    assert response.status_code == status and error["code"] == code and said in error["message"]
    assert error.keys() == {"message", "type", "param", "code"} and "\n" not in error["message"]


def test_monitors_may_ask_for_the_head_alone(url: str) -> None:
    assert [HTTP.head(f"{url}{path}").status_code for path in ("", "healthz")] == [200, 200]


def test_addresses_methods_and_kinds_that_there_are_not(url: str) -> None:
    answers = [
        (HTTP.get(f"{url}v1/nothing"), 404),
        (HTTP.get(f"{url}docs"), 404),
        (HTTP.get(f"{url}v1/images/generations"), 405),
        (HTTP.options(f"{url}v1/images/generations"), 405),
        (HTTP.post(f"{url}v1/images/generations", data={"prompt": "a"}), 400),
        (HTTP.post(f"{url}v1/images/edits", json={"prompt": "a"}), 400),
    ]
    for response, status in answers:
        assert response.status_code == status and response.json()["error"]["message"]
        assert "access-control-allow-origin" not in response.headers


def bomb() -> bytes:
    """36 million pixels in five kilobytes."""
    file = io.BytesIO()
    Image.new("1", (6000, 6000)).save(file, "PNG")
    assert len(file.getvalue()) < 10_000
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "status", "said"),
    [
        (bomb, 400, "too large"),
        (lambda: b"junk", 400, "not an image"),
        (lambda: png()[:-30], 400, "unreadable"),
        (lambda: b"", 400, "empty"),
        (lambda: bytes(50_000_000), 413, "larger"),
    ],
    ids=["bomb", "junk", "cut", "empty", "50 MB"],
)
def test_a_picture_is_checked_before_anything_is_drawn(
    url: str, make: Callable[[], bytes], status: int, said: str
) -> None:
    with pytest.raises(openai.APIStatusError) as told:
        client(url).images.edit(image=("a.png", make()), prompt="in the snow")
    assert told.value.status_code == status and said in told.value.message


@pytest.mark.parametrize(("count", "said"), [(0, "send 1 to 4 pictures"), (5, "number of files is 4")])
def test_as_many_pictures_are_taken_as_are_said_to_be(url: str, count: int, said: str) -> None:
    pictures = [("image[]", (f"{n}.png", png())) for n in range(count)]
    words = ("prompt", (None, b"in the snow"))
    told = HTTP.post(f"{url}v1/images/edits", files=[*pictures, words])  # type: ignore[arg-type]
    assert told.status_code == 400 and said in told.json()["error"]["message"]


def test_pictures_are_cut_as_they_are_read_and_not_even_decoded_where_they_must_wait_outside(
    gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, decoded, taken = service_of(gated, limit=1), [], []
    decode, submit = uploads.decode, service.submit
    monkeypatch.setattr(uploads, "decode", lambda *given: decoded.append(given) or decode(*given))
    monkeypatch.setattr(service, "submit", lambda *given: taken.append(given) or submit(*given))
    file = io.BytesIO()
    Image.new("RGB", (900, 600), "red").save(file, "PNG")
    with running(service) as url:

        def edit() -> httpx2.Response:
            form = {"files": {"image": ("a.png", file.getvalue())}, "data": {"prompt": "in the snow"}}
            return HTTP.post(f"{url}v1/images/edits", **form)  # type: ignore[arg-type]

        service.drawer.submit(Prompt("first"), 1, 0, Sampling())
        gated.drawing.wait(5)
        (waits,) = service.drawer.submit(Prompt("waits"), 1, 0, Sampling())
        assert edit().json()["error"]["code"] == "queue_full" and not decoded
        waits.leave()
        gated.gate.set()
        assert edit().status_code == 200
    ((_, (picture,)),) = taken
    assert picture.shape == (3, 64, 64) and picture.untyped_storage().nbytes() == 3 * 64 * 64


def test_an_upload_of_no_announced_length_ends_at_the_limit(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_UPLOAD", 2**18)
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    parts = iter([head, *[bytes(2**16)] * 20, b"\r\n--x--\r\n"])
    kind = {"content-type": "multipart/form-data; boundary=x"}
    response = HTTP.post(f"{url}v1/images/edits", content=parts, headers=kind)
    assert response.status_code == 413 and response.json()["error"]["code"] == "too_large"


def test_a_form_of_too_many_parts_is_refused(url: str) -> None:
    for files, data in (
        ([("image[]", ("a.png", png()))] * 5, {}),
        ([("mask", ("a.png", png()))], {}),
        ([("image", ("a.png", png()))], {f"field{i}": "x" for i in range(50)}),
        ([("image", ("a.png", png()))], {"prompt": "a", "n": "10000"}),
    ):
        response = HTTP.post(f"{url}v1/images/edits", files=files, data=data)
        assert response.status_code == 400 and response.json()["error"]["message"], response.text


def test_a_client_that_leaves_in_its_upload_harms_nobody(url: str) -> None:
    host, port = re.findall(r"//(.*):(\d+)", url)[0]
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
    assert HTTP.get(f"{url}healthz").status_code == 200
    until(lambda: 'path="/v1/images/edits",status="499"' in HTTP.get(f"{url}metrics").text)


def test_a_token_is_asked_for_where_there_is_something_to_draw(gated: Gated) -> None:
    gated.gate.set()
    with running(service_of(gated), token="käse") as url:
        right = {"authorization": "Bearer käse".encode()}
        for wrong in ({}, {"authorization": "Bearer kase"}, {"authorization": "Basic käse".encode()}):
            for path in ("v1/models", "metrics", "v1/nothing"):
                response = HTTP.get(url + path, headers=wrong)
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert HTTP.get(url).status_code == HTTP.get(f"{url}healthz").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            client(url, "wrong").images.generate(prompt="a")
        assert (
            HTTP.post(f"{url}v1/images/generations", json={"prompt": "a"}, headers=right).status_code == 200
        )
    assert gated.batches == [["a"]]


def test_too_many_requests_at_once_are_told_to_come_back() -> None:
    async def statuses() -> list[int]:
        free, seen = asyncio.Event(), []

        async def application(scope: Any, receive: Any, send: Any) -> None:
            if scope["method"] == "POST":
                await free.wait()
            await JSONResponse({})(scope, receive, send)

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            seen.extend([message["status"]] if "status" in message else [])

        watched = guard.Guard(application, None, None, 1, lambda *_: None)

        def ask(method: str) -> Any:
            scope = {"type": "http", "method": method, "path": "/v1/images/edits", "headers": []}
            return watched(scope, receive, send)

        first = asyncio.create_task(ask("POST"))
        await asyncio.sleep(0)
        await ask("POST")
        await ask("GET")  # a server that is busy is not ill
        free.set()
        await first
        await ask("POST")
        return seen

    assert asyncio.run(statuses()) == [429, 200, 200, 200]


def test_an_open_path_takes_no_body_and_a_failure_is_counted_as_one() -> None:
    told: list[tuple[str, int]] = []
    seen: list[int] = []

    async def application(*_: Any) -> None:
        raise RuntimeError("a fault")

    async def receive() -> Any:
        return {"type": "http.request", "body": b"x", "more_body": False}

    async def send(message: Any) -> None:
        seen.extend([message["status"]] if "status" in message else [])

    watched = guard.Guard(application, None, "secret", 1, lambda path, status, _: told.append((path, status)))

    async def ask(path: str, headers: Any) -> None:
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        with contextlib.suppress(RuntimeError):
            await watched(scope, receive, send)

    asyncio.run(ask("/", []))
    asyncio.run(ask("/v1/images/edits", [(b"authorization", b"Bearer secret")]))
    assert seen == [413] and told == [("/", 413), ("/v1/images/edits", 500)]


def test_who_shows_no_token_takes_no_place() -> None:
    async def statuses() -> list[int]:
        seen: list[int] = []

        async def application(scope: Any, receive: Any, send: Any) -> None:
            await JSONResponse({})(scope, receive, send)

        async def whole() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def never() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            seen.extend([message["status"]] if "status" in message else [])

        watched = guard.Guard(application, None, "secret", 1, lambda *_: None)
        scope = {"type": "http", "method": "POST", "path": "/v1/images/edits", "headers": []}
        stranger = asyncio.create_task(watched(scope, never, send))  # promises a body that does not come
        open_to_all = [{**scope, "path": "/"}, {**scope, "path": "/healthz", "method": "GET"}]
        strangers = [stranger, *(asyncio.create_task(watched(each, never, send)) for each in open_to_all)]
        await asyncio.sleep(0)
        await watched({**scope, "headers": [(b"authorization", b"Bearer secret")]}, whole, send)
        for each in strangers:
            each.cancel()
        return seen

    assert asyncio.run(statuses()) == [200]


def test_pages_elsewhere_reach_nothing(url: str) -> None:
    for headers in ({"host": "evil.example"}, {"host": "evil.example:80"}, {"host": ""}):
        assert HTTP.get(f"{url}v1/models", headers=headers).json()["error"]["code"] == "wrong_host"
    form = {"files": {"image": ("a.png", png())}, "data": {"prompt": "a", "n": "0"}}
    here = url.rstrip("/")
    for headers, allowed in (
        ({"origin": "https://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": here, "sec-fetch-site": "cross-site"}, False),
        ({"origin": here}, True),
        ({"origin": here, "sec-fetch-site": "same-origin"}, True),
    ):
        response = HTTP.post(f"{url}v1/images/edits", headers=headers, **form)  # type: ignore[arg-type]
        assert (response.json()["error"]["code"] != "wrong_origin") is allowed


# --- the end


def test_term_refuses_new_requests_and_finishes_those_it_took(gated: Gated) -> None:
    service = service_of(gated)
    listener = listen("127.0.0.1", 0)
    url, seen = address(listener), {}

    def ask(name: str) -> None:
        try:
            seen[name] = client(url).images.generate(prompt=name).data
        except openai.APIError as error:
            seen[name] = error

    def clients() -> None:
        early = [threading.Thread(target=ask, args=(name,)) for name in ("one", "two")]
        early[0].start()
        gated.drawing.wait(5)
        early[1].start()
        until(lambda: service.drawer.waiting == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: service.drawer.stopping)
        ask("late")
        seen["health"] = HTTP.get(f"{url}healthz")
        gated.gate.set()
        for thread in early:
            thread.join()

    thread = threading.Thread(target=clients)
    run(make_app(service, hosts_of(listener)), service.drawer, listener, thread.start)
    thread.join()
    assert len(seen["one"]) == len(seen["two"]) == 1
    assert seen["late"].status_code == 503 and seen["late"].code == "stopping"
    assert "retry-after" in seen["late"].response.headers
    assert seen["health"].status_code == 503 and seen["health"].json() == {"status": "stopping"}
    assert service.drawer.ended


def test_who_still_waits_when_the_time_is_up_is_told(gated: Gated) -> None:
    drawer = Drawer(gated, limit=3)  # type: ignore[arg-type]
    (drawn,) = drawer.submit(Prompt("drawn"), 1, 0, Sampling())
    gated.drawing.wait(5)
    (waits,) = drawer.submit(Prompt("waits"), 1, 0, Sampling())
    with pytest.raises(QueueFull):
        drawer.submit(Prompt("many"), 3, 0, Sampling())
    drawer.give_up()
    for job in (drawn, waits):
        with pytest.raises(Stopping):
            job.future.result(5)
    until(lambda: drawer.ended)
    with pytest.raises(Stopping):
        drawer.submit(Prompt("late"), 1, 0, Sampling())


def test_wrong_options_end_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(VugenError, match="choose another --host or --port"):
        listen("127.0.0.1", taken.getsockname()[1])
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(VugenError, match="is empty"):
        _token(tmp_path / "empty")
    with pytest.raises(VugenError, match="No such file"):
        _token(tmp_path / "none")
    monkeypatch.setenv("VUGEN_TOKEN", "from there")
    assert _token(None) == "from there"
    for name in ("vugen_cli.serve.app", "uvicorn"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(VugenError, match=r"needs the package fastapi: pip install 'vugen-cli\[serve\]'"):
        serve()


# --- the page


def test_the_page_is_whole_and_runs_nothing_but_its_own() -> None:
    html, headers = page()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)[^"']*["']|https?://|@import|url\(""", html)
    policy = headers["content-security-policy"]
    assert "unsafe" not in policy and "*" not in policy and policy.startswith("default-src 'none'")
    assert not re.findall(r"\son\w+=|\sstyle=|innerHTML", html)
    named = set(re.findall(r'<label[^>]* for="([\w-]+)"', html))
    fields = re.findall(r"<(?:textarea|input)[^>]*>", html)
    assert len(fields) >= 10
    for field in fields:
        assert (
            "aria-label=" in field
            or 'id="random"' in field
            or re.findall(r'id="([\w-]+)"', field)[0] in named
        )


@pytest.fixture
def browser() -> Iterator[Any]:
    """Chromium that reaches this machine alone."""
    play = pytest.importorskip("playwright.sync_api").sync_playwright
    with play() as driver:
        names = ("chromium-headless-shell", "chromium", "google-chrome")
        own = driver.chromium.executable_path
        path = own if Path(own).exists() else next(filter(None, map(shutil.which, names)), None)
        if path is None:
            pytest.skip("no Chromium here")
        only_here = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox", only_here])
        yield opened
        opened.close()


def test_the_page_draws_and_keeps_its_pictures_in_a_browser(
    browser: Any, url: str, service: Service, tmp_path: Path
) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    view, complaints, asked = context.new_page(), [], []
    view.on("console", lambda message: complaints.append(message.text))
    view.on("pageerror", lambda error: complaints.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    learned, service.learned_edits = service.learned_edits, False
    view.goto(url)
    view.get_by_text("64 × 64 px").wait_for()
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 22, 21)"
    assert not view.get_by_label("Picture to edit").is_visible(), "this sampler reads none"

    view.get_by_label("Pictures, as a number").fill("2")
    view.get_by_label("Steps", exact=True).fill("1")  # a slider
    assert view.get_by_label("Steps, as a number").input_value() == "1"
    view.get_by_label("Seed, as a number").fill("77")
    view.get_by_label("Prompt").fill(BEAR)
    view.keyboard.press("Control+Enter")
    view.get_by_text("2 pictures drawn.").wait_for()
    assert view.evaluate("document.documentElement.scrollWidth") == 390

    view.reload()
    figures = view.locator("figure")
    figures.nth(1).wait_for()
    assert figures.count() == 2 and "seed 77/1 · 1 steps" in figures.first.inner_text()
    with view.expect_download() as download:
        figures.first.get_by_text("PNG").click()
    assert download.value.suggested_filename == "a-bear-in-a-forest-77-1.png"
    download.value.save_as(tmp_path / "bear.png")
    with Image.open(tmp_path / "bear.png") as image:
        assert image.text["vugen:prompt"] == BEAR and image.text["vugen:seed"] == "77"  # type: ignore[attr-defined]
    figures.first.get_by_text("Reuse").press("Enter")
    assert view.get_by_label("Prompt").input_value() == BEAR
    assert view.get_by_label("Seed, as a number").input_value() == "77"
    figures.first.get_by_text("Delete").press("Enter")
    figures.nth(1).wait_for(state="detached")

    assert learned, "the bundled sampler edits"
    service.learned_edits = learned  # for its next visitor
    view.reload()
    view.get_by_label("Picture to edit").set_input_files(tmp_path / "bear.png")
    view.get_by_alt_text("The picture to edit").wait_for()  # is read a moment after it is chosen
    view.get_by_label("Pictures, as a number").fill("1")
    view.get_by_label("Steps, as a number").fill("1")
    view.get_by_label("Prompt").fill("in the snow")
    view.keyboard.press("Control+Enter")
    view.get_by_text("One picture drawn.").wait_for()

    assert asked.count(f"{url}v1/images/edits") == 1
    assert not complaints and all(each.startswith((url, "blob:", "data:")) for each in asked)
    view.get_by_role("button", name="Remove").click()
    view.get_by_label("Prompt").fill("a bear " * 400)
    view.get_by_role("button", name="Draw", exact=True).click()
    view.get_by_role("alert").get_by_text("too long").wait_for()
    context.close()


def test_the_page_asks_for_the_token_of_a_server_that_has_one(browser: Any, gated: Gated) -> None:
    gated.gate.set()
    with running(service_of(gated), token="open sesame") as url:
        view = browser.new_page()
        view.goto(url)
        view.get_by_label("Token").wait_for()
        assert not view.get_by_role("alert").is_visible()
        view.get_by_label("Pictures, as a number").fill("3")
        view.get_by_label("Prompt").fill("a bear")
        for token, said in (("open barley", "the token is wrong"), ("open sesame", "3 pictures drawn.")):
            view.get_by_label("Token").fill(token)
            view.keyboard.press("Control+Enter")
            view.get_by_text(said).wait_for()
        assert not view.get_by_label("Token").is_visible()
        view.close()
    assert [prompt for batch in gated.batches for prompt in batch] == ["a bear"] * 3

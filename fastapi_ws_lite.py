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

import abc
import asyncio
import contextlib
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
import types
import typing
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from collections.abc import Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Generic, Literal, NamedTuple, Protocol, Self
from typing import TypeAlias, TypedDict, TypeVar, Unpack, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import anyio.to_thread
from fastapi import APIRouter, FastAPI, Request, Response, WebSocket
from fastapi.params import Depends
from pydantic import ConfigDict, PydanticUserError, StringConstraints, TypeAdapter
from pydantic import ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUndefinedAnnotation
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ArgsKwargs, CoreConfig, PydanticOmit, SchemaValidator, from_json
from pydantic_core import to_json
from starlette.types import ASGIApp, Message
from starlette.websockets import WebSocketState

__version__ = "0.1.0"

__all__ = [
    "ALL_TOPICS", "Backbone", "Codec", "Event", "EventNotifier", "Gap", "RpcChannel",
    "RpcMethodsBase", "RpcResponse", "Subscription",
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
FEED_EVENTS: Final = 512  # and no more of it is looked through before others run; and streams
# wait, so that the answers to other calls are not behind a megabyte of them
ANSWERS_BYTES: Final = 2**20  # with more of them unsent, reading from that peer pauses,
PAUSE_BYTES_PER_SECOND: Final = 2**25  # the longer the more they are; not for ever, as the peer
# may wait for us likewise: one that sends and never reads gets about 100 MiB before it is let go
OUTBOX_BYTES: Final = 64 * 2**20  # with more than this unsent, calls raise Overloaded
REQUESTS_AT_ONCE: Final = 256  # of a client's own publishes, and of its subscribes; others wait
STREAM_CREDIT: Final = 16  # items of a stream that may come before more are asked for
MOST_CREDIT: Final = 2**53  # any number that JSON carries: what waits is bounded otherwise
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
MAX_TOPIC_CHARACTERS: Final = 1024  # also of the id of a subscriber
MAX_TOPICS: Final = 1000  # that a peer publishes to at once
MAX_PATTERN_STARS: Final = 16  # each is one more pass over the topic
MAX_PATTERN_CHARACTERS: Final = 128  # with a ? or [: a part is tried everywhere, not searched for
MAX_PROBLEMS: Final = 100  # that are told of one request's parameters
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

BROKER_SECONDS: Final = 5.0  # for a connection with its handshake, and for an answer,
BROKER_BYTES_PER_SECOND: Final = 2**20  # with more time for what is appended
RELEASE_SECONDS: Final = 1.0  # that the end of a connection is waited for; it may take longer
PAGE_BYTES: Final = 2**20  # about what is fetched at once; an entry may have more
PAGE_ENTRIES: Final = 256
POLL_SECONDS: Final = 1.0  # where a broker's notifications may not arrive
BLOCK_SECONDS: Final = 2.0  # of a read that waits at the broker, or between its signs of life
RETAINED_ENTRY_BYTES: Final = 2**14  # where a broker retains bytes and not entries, for each;
RETAINED_BYTES: Final = 2**26  # at least, for some of the largest
SILENCE_SECONDS: Final = 5.0  # of a broker, after which it is asked whether that is all
REACH_SECONDS: Final = 5.0  # for another server's newest event to arrive here, too
APPEND_EVENTS: Final = 256  # at once; more brings no more speed
APPEND_BYTES: Final = 2**20
PACK_BYTES: Final = 2**14  # of events that share an entry; reading one costs more than unpacking,
PACK_EVENTS: Final = 2**10  # and are more than that in no case
BROKER_BACKOFF_SECONDS: Final = 5.0
ENVELOPE_BYTES: Final = 64  # around topic, origin and data, and more than that
SEEN_EVENTS: Final = 2 * QUEUE_EVENTS  # whose ids are kept, for those that were stored twice
WRITERS: Final = 1000  # whose sequences are watched for holes
CHANNEL: Final = "fastapi_ws_lite"

# ---------------------------------------------------------------------------------------- errors


class RpcError(Exception):
    """The root of all errors here; raised in a method, it is what the caller sees.

    ``code`` is an integer, of your own or one of JSON-RPC's; ``data`` any JSON value, or None.
    """

    code, message = -32603, "Internal error"  # of a subclass that does not call __init__
    data: Any = None

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        Exception.__init__(self, code, message, data)
        self.code, self.message, self.data = code, message, data

    def __str__(self) -> str:
        return self.message


class _CodedError(RpcError):
    CODES: Final[dict[int, "type[_CodedError]"]] = {}

    def __init_subclass__(cls, code: int = 0, text: str = "") -> None:
        if code:  # not so for a subclass of a user's
            cls.code, cls.message, cls.CODES[code] = code, text, cls

    def __init__(self, message: str | None = None, data: Any = None) -> None:
        super().__init__(self.code, self.message if message is None else message, data)
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
        try:
            from_json(raw, allow_inf_nan=False)
        except ValueError as error:
            raise ValueError(f"JSON has no NaN and no infinity: {error}") from error
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

    __slots__ = ("batch", "channel", "credit", "deadline", "id", "method", "open", "params",
                 "problem", "started", "task", "threaded", "timeout", "waiter")

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
        self.credit = 0  # items that the peer still takes, if it asked for a stream
        self.waiter: asyncio.Future[None] | None = None

    def grant(self, n: Any) -> None:
        if type(n) is int and n > 0:
            self.credit = min(self.credit + n, MOST_CREDIT)
            self.wake()

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


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
                timeout: float | None, credit: int = 0) -> str:
        text = f'{{"jsonrpc":"2.0","method":{_quoted(method)}'
        if params is not None:
            text += f',"params":{params}'
        if timeout is not None:
            text += f',"timeout":{timeout:.3f}'
        if credit:
            text += f',"stream":{credit}'
        return text + ("}" if id is None else f',"id":{id}}}')

    def result(self, id: Any, result: str, value: object) -> str:
        text = id if type(id) is int else _encode(id)
        return f'{{"jsonrpc":"2.0","result":{result},"id":{text}}}'

    def error(self, id: Any, error: RpcError) -> str:
        return f'{{"jsonrpc":"2.0","error":{_error_object(error)},"id":{_encode(id)}}}'

    def items(self, id: Any, items: Iterable[str]) -> str:
        params = f'{{"id":{_encode(id)},"items":[{",".join(items)}]}}'
        return self.request(None, "$/stream", params, None)

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
            timeout, credit = message.get("timeout"), message.get("stream")
            if (sound and type(method) is str and (params is None or type(params) in (dict, list))
                    and (timeout is None or type(timeout) in (int, float))
                    and (credit is None or (type(credit) is int and credit > 0))):
                request = _Request(id, method, params, timeout)
                if credit is not None and request.open:
                    request.grant(credit)
                return (request,)
        elif "error" in message or "result" in message:
            own = id if type(id) in (int, float) else None  # not True, which equals 1
            if message.get("error") is not None:
                return (_Response(own, _error_from_wire(message["error"])),)
            return (_Response(own, RpcResponse(message.get("result"))),)
        return (_invalid(id if sound else None),)


class _OldWire:
    """That of fastapi_websocket_rpc 0.1: only named arguments, no timeouts, cancelling, streams."""

    def request(self, id: int | None, method: str, params: str | None,
                timeout: float | None, credit: int = 0) -> str:
        if credit:
            raise RpcError(-32600, "the wire of fastapi_websocket_rpc has no streams")
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

    def __init__(self, send: Callable[[str], None], max_size: int,
                 grow: Callable[[int], int]) -> None:
        self._send, self._max_size = send, max_size
        self._grow = grow  # returns what all batches of the connection hold now
        self._ids: list[Any] = []
        self._answers: dict[int, str] = {}
        self._total, self._most = 1, 2 * max_size  # bytes, with what is between and around them

    def expect(self, id: Any) -> Callable[[str], None]:
        """A place for one answer; all are taken before the first is filled."""
        self._ids.append(id)
        return functools.partial(self._fill, len(self._ids) - 1)

    def _fill(self, place: int, text: str) -> None:
        if self._grow(0) > OUTBOX_BYTES:
            text = _JSONRPC.error(self._ids[place], Overloaded("too much waits in batches"))
        self._answers[place], before = text, self._total
        self._total += _size(text) + 1
        whole = len(self._answers) == len(self._ids)
        if whole or self._total > self._most:
            self._shrink()
        self._grow(self._total - before)
        if whole:
            self._grow(1 - self._total)
            text = f"[{','.join(self._answers[place] for place in sorted(self._answers))}]"
            self._send(text if self._total <= self._max_size
                       else _JSONRPC.error(None, MessageTooLarge()))

    def _shrink(self) -> None:
        """Let the largest give way."""
        for place in sorted(self._answers, key=lambda place: -len(self._answers[place])):
            if self._total > self._max_size:
                self._total -= _size(self._answers[place])
                self._answers[place] = _JSONRPC.error(self._ids[place], MessageTooLarge())
                self._total += _size(self._answers[place])
        self._most = self._total + self._max_size


# --------------------------------------------------------------------------------------- methods
# A table of methods is made once, from a class or by decorators. A name off the wire is looked up
# in it, and never reaches getattr.

_T = TypeVar("_T")
_current: ContextVar[_Request | None] = ContextVar("fastapi_ws_lite_request", default=None)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class RpcMethodsBase:
    """Derive from this: every public method of the class can be called by the peer.

    ``async def`` runs on the event loop, plain ``def`` in a worker thread; an async generator is a
    stream, for the peer to iterate over. Arguments are validated from the type hints, by pydantic.
    One instance serves all connections; what belongs to one of them goes into
    ``self.channel.context``. The current task is a method's own only until it returns.
    """

    @property
    def channel(self) -> "RpcChannel":
        """The connection that is being served. Raises RuntimeError outside of a call."""
        if (request := _current.get()) is None:
            raise RuntimeError("self.channel is known only in a method that a peer has called")
        return request.channel


_CONFIG: Final = ConfigDict(val_json_bytes="base64", arbitrary_types_allowed=True)
_CORE_CONFIG: Final = CoreConfig(val_json_bytes="base64")


def _adapter(kind: Any) -> tuple[TypeAdapter[Any], bool]:
    """What validates, and whether it needs JSON text."""
    adapter = TypeAdapter(kind, config=_CONFIG)
    # only from JSON text are bytes base64, and dates in a strict model strings
    return adapter, bool(re.search("'bytes'|'strict': True", repr(adapter.core_schema)))


def _arguments_schema(schema: Any) -> Any:
    """Of a function's schema, what validates its arguments without a call: 4 % more calls."""
    if schema["type"] == "definitions":
        return {**schema, "schema": _arguments_schema(schema["schema"])}
    return schema["arguments_schema"]


class _Signature:
    """The hints and parameters of a function; without the one that is given the channel."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        try:
            self.hints = typing.get_type_hints(function, include_extras=True)
        except NameError as error:
            raise TypeError(f"{name}: an annotation cannot be resolved: {error}") from error
        self.channel = next((name for name, hint in self.hints.items() if hint is RpcChannel
                             or RpcChannel in typing.get_args(hint)), None)
        shown = inspect.signature(function)
        self.place = list(shown.parameters).index(self.channel) if self.channel else 0
        self.shown = shown.replace(parameters=[p for p in shown.parameters.values()
                                               if p.name != self.channel])


class _Method:
    """A function that a peer may call."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        plain = inspect.unwrap(function)
        if inspect.isgeneratorfunction(plain):
            raise TypeError(f"{name} is a generator: make it an async one, or name it _{name}")
        signature = _Signature(name, function)
        self.function, self.streams = function, inspect.isasyncgenfunction(plain)
        self.threaded = not self.streams and not inspect.iscoroutinefunction(plain)
        # if it is known that it does not end without having to wait
        self.waits = self.threaded or self.streams
        self._channel, self._place = signature.channel, signature.place

        def arguments(*args: Any, **kwargs: Any) -> None: ...

        vars(arguments)["__signature__"] = signature.shown
        arguments.__annotations__ = signature.hints
        self.parameters = list(signature.shown.parameters.values())
        self.returns = signature.hints.get("return", Any)
        self.adapter, self._from_json = _adapter(arguments)  # which has the function's signature
        self._validator = SchemaValidator(_arguments_schema(self.adapter.core_schema), _CORE_CONFIG)

    def bind(self, channel: "RpcChannel", params: Any) -> tuple[Sequence[Any], dict[str, Any]]:
        """The arguments for the function. Raises InvalidParams."""
        args, named = (tuple(params), {}) if type(params) is list else ((), params or {})
        try:
            if self._from_json and params:
                args, named = self._validator.validate_json(_encode(params))
            else:
                args, named = self._validator.validate_python(ArgsKwargs(args, named))
        except ValidationError as error:
            problems = _problems(error, params)
            summary = f"Invalid params: {_summary(problems)}"
            raise InvalidParams(summary, problems) from error
        if self._channel is not None and len(args) > self._place:
            args = (*args[:self._place], channel, *args[self._place:])
        elif self._channel is not None:
            named[self._channel] = channel
        return args, named


def _problems(error: ValidationError, value: Any) -> list[dict[str, Any]]:
    """What is wrong with which part; without its value, or the name of a class of ours."""
    if (count := error.error_count()) > MAX_PROBLEMS:  # each would cost 1 KiB
        return [{"loc": [], "type": "too_many", "msg": f"{count} parts are not valid"}]
    problems = []
    for e in error.errors(include_url=False, include_input=False):
        named = {"class", "class_name"} & e.get("ctx", {}).keys()
        problems.append({"loc": _path(e["loc"], value, e["type"]), "type": e["type"],
                         "msg": "Input should be an object" if named else e["msg"]})
    return problems


def _summary(problems: list[dict[str, Any]]) -> str:
    told = ((".".join(map(str, p["loc"])), p["msg"]) for p in problems[:3])
    return "; ".join(": ".join(filter(None, parts)) for parts in told)


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


_STREAMS: Final = (AsyncIterator, AsyncIterable, AsyncGenerator)


class _Typed:
    """A method as a class has it, for calls of the peer's: values in, and values out."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        signature = _Signature(name, function)
        self._name, self._shown = name, signature.shown
        kind = signature.hints.get("return", Any)
        self.streams = (inspect.isasyncgenfunction(inspect.unwrap(function))
                        or (typing.get_origin(kind) or kind) in _STREAMS)
        if self.streams:
            kind = next(iter(typing.get_args(kind)), Any)
        self._says = inspect.formatannotation(kind)
        adapter, self._from_json = _adapter(types.GenericAlias(dict, (Literal["result"], kind)))
        self._validator = adapter.validator

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Arguments":
        """By name, so that any wire carries them, or where there is no name. Raises TypeError."""
        try:
            bound = self._shown.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self._name}: {error}") from None
        kinds = {name: self._shown.parameters[name].kind for name in bound.arguments}
        if not {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}.isdisjoint(
                kinds.values()):
            if bound.kwargs:
                raise TypeError(f"{self._name}: arguments go by position or by name, not both")
            return bound.args
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            named.update(value if kinds[name] is inspect.Parameter.VAR_KEYWORD else {name: value})
        return named or None

    def check(self, value: Any) -> Any:
        """What the peer returned, of the type that the class says. Raises InternalError."""
        try:
            if self._from_json:
                return self._validator.validate_json(_encode({"result": value}))["result"]
            return self._validator.validate_python({"result": value})["result"]
        except ValidationError as error:
            problems = _problems(error, {"result": value})
            raise InternalError(f"{self._name}: the peer did not return {self._says}: "
                                f"{_summary(problems)}") from error


@functools.lru_cache(1024)
def _typed(cls: Callable[..., Any], name: str) -> _Typed:
    """A public function of a class, or of those it inherits from. Raises AttributeError."""
    value = inspect.getattr_static(cls, name, None)
    if name[0] == "_" or not inspect.isfunction(getattr(value, "__func__", value)):
        raise AttributeError(f"{cls.__name__} has no method {name!r}")
    return _Typed(name, value.__get__(cls, cls))


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
    doc = None if owner.__module__ == __name__ else owner.__doc__  # which says nothing of these
    about = {"description": inspect.cleandoc(doc)} if doc else {}
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
    if method.streams:
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
            **({"x-stream": True} if method.streams else {})}


# --------------------------------------------------------------------- pending calls and streams
# The calls of one side that wait for an answer. An entry is made before its request is sent, and
# is gone before its future is set, whatever the outcome. Futures are set to a value, never to an
# exception, so that none goes unretrieved. ``then`` is called with the outcome where it is read,
# for those who must know it before the next message is looked at.
#
# A stream is a call whose answer comes after items, of which the peer may send as many as it has
# credit for. Who iterates owns an _Incoming: the reader fills it, it never holds more than the
# credit, and what is consumed is granted anew, so that a slow one stops the other side. Who
# produces has the credit in its _Request, which `$/credit` adds to, and an _Outgoing, of what the
# generator yielded in this turn of the loop. The generator runs in one task from start to end.


class _Incoming(deque[Any]):
    """The items of a stream that have come and are not consumed."""

    def __init__(self) -> None:
        super().__init__()
        self.waiters: list[asyncio.Future[None]] = []
        self._credit, self._consumed = STREAM_CREDIT, 0

    def put(self, items: Any) -> bool:
        """False if they are not what may come."""
        if type(items) is not list or len(items) > self._credit:
            return False
        self._credit -= len(items)
        self.extend(items)
        return True

    def consumed(self) -> int:
        """One more is; returns what to grant now."""
        self._consumed += 1
        if self._consumed < STREAM_CREDIT // 2:
            return 0
        granted, self._consumed = self._consumed, 0
        self._credit += granted
        return granted


class _Outgoing(list[str]):
    """The items of a stream that leave together: in 64 KiB, unless one is larger."""

    def __init__(self, request: _Request, send: Callable[[str], None]) -> None:
        super().__init__()
        self._request, self._send = request, send
        self._size = self._empty = _size(_JSONRPC.items(request.id, ()))

    def add(self, item: str, limit: int) -> None:
        """Raises MessageTooLarge."""
        size = _size(item) + 1
        if self._empty + size > limit:
            raise MessageTooLarge(f"the item has {size - 1} bytes")
        if self._size + size > min(FRAME_BYTES, limit):
            self.flush()
        self.append(item)
        self._size += size

    def flush(self) -> None:
        if self and self._request.open:
            self._send(_JSONRPC.items(self._request.id, self))
        self.clear()
        self._size = self._empty


@dataclass(slots=True, eq=False)
class _Pending:
    future: "asyncio.Future[_Outcome]"
    deadline: float | None
    then: Callable[[_Outcome], None] | None
    items: _Incoming | None = None


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
    number = position.partition("-")[0] if position is not None else ""
    try:
        return int(number) if len(number) < 20 else -1
    except ValueError:
        return -1


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
        if pattern and len(name) > MAX_PATTERN_CHARACTERS and _NOT_LITERAL.search(name):
            raise InvalidParams(f"a pattern with ? or [ has at most {MAX_PATTERN_CHARACTERS} "
                                f"characters: {name!r:.50}")
    return names


class _Pattern(dict[_Sink, None]):
    """Sinks, and what they want as fnmatch.fnmatchcase has it; without backtracking."""

    def __init__(self, pattern: str) -> None:
        self.matches: Callable[[str], object]
        if _NOT_LITERAL.search(pattern):
            self.matches = re.compile(fnmatch.translate(pattern)).match  # its groups are atomic
        else:
            self.matches = functools.partial(_are_in, pattern.split("*"))


_NOT_LITERAL: Final = re.compile(r"[?[]")


def _are_in(parts: Sequence[str], topic: str) -> bool:
    """Whether the parts, with any text between them, are the topic."""
    first, last = parts[0], parts[-1]
    if len(parts) == 1:
        return topic == first
    if not (topic.startswith(first) and topic.endswith(last)):
        return False
    at, end = len(first), len(topic) - len(last)
    for part in parts[1:-1]:
        if (found := topic.find(part, at, end)) < 0:
            return False
        at = found + len(part)
    return at <= end


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

    One without a topic is a mark, which nobody gets; or a hole, of which all are told.
    """

    __slots__ = ("_data_at", "_old", "hole", "index", "origin", "position", "size", "text", "topic")

    def __init__(self, index: int, position: str, topic: str | None, data: str,
                 origin: str | None, hole: str) -> None:
        self.index, self.position, self.topic, self.origin = index, position, topic, origin
        self.hole = hole  # the reason
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
               position: str | None = None, hole: str = "") -> _Entry:
        index, self.end = self.end, self.end + 1
        self.position = position or f"{index}-{self._id}"
        entry = self[index] = _Entry(index, self.position, topic, data, origin, hole)
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
# it but a method or hook that ignores its cancellation. Where anybody else cancels one that the
# connection cannot do without, the connection ends.
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
# One who iterates over a stream waits for an item or the outcome; wherever it leaves, it tells the
# peer, if that has not ended the stream. A stream's task waits in its generator, or, between two
# items, for credit or room; cancelled in either, or woken by the end, it closes the generator.
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
    task = asyncio.Task(work)  # by no factory: an eager one would begin before it is held
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


def _joined(texts: Sequence[str], dialect: _Dialect | None) -> Sequence[str]:
    """Messages that leave together, as one where the dialect has that."""
    return [f"[{','.join(texts)}]"] if dialect is _WS_LITE and len(texts) > 1 else texts


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
            result = hook(*args)
            if inspect.isawaitable(result):
                await result
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise  # else the hook itself raised it
            logger.exception("%r failed", hook)
        except Exception:  # its failure is nobody else's
            logger.exception("%r failed", hook)


def _meant(channel: "RpcChannel", params: Any) -> list[_Request]:
    """The running requests with the id that is named; notifications have none."""
    named = type(params) is dict and "id" in params
    return [r for r in channel._running if named and r.id == params["id"]]


def _cancel_request(channel: "RpcChannel", params: Any) -> None:
    for request in _meant(channel, params):
        channel._stop(request, Cancelled())


def _take_credit(channel: "RpcChannel", params: Any) -> None:
    for request in _meant(channel, params):
        request.grant(params.get("n"))


def _take_items(channel: "RpcChannel", params: Any) -> None:
    fields: dict[str, Any] = params if type(params) is dict else {}
    id: Any = fields.get("id")
    call = channel._calls.get(id) if type(id) in (int, float) else None
    if call is None or call.items is None:  # it has ended, on this side
        return
    if not call.items.put(fields.get("items")):
        channel._send_cancel(id)
        channel._calls.settle(id, InternalError("the peer sent items that it was not asked for"))
    elif call.items:  # what is empty does not end the wait
        _wake(call.items.waiters)


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
        self._table: _Table = {"$/cancelRequest": _cancel_request, "$/credit": _take_credit,
                               "$/stream": _take_items}
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


def _by_position_or_name(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    if args and kwargs:
        raise TypeError(f"{name}: arguments go by position or by name, not both")
    return args or kwargs or None


class _Other:
    """Calls the methods of the peer as if they were its own."""

    def __init__(self, caller: "_Caller", timeout: _Timeout = _UNSET) -> None:
        self._caller, self._timeout = caller, timeout

    def __call__(self, *, timeout: float | None) -> "_Other":
        return _Other(self._caller, timeout)

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, RpcResponse]]:
        if name.startswith("__"):  # what copy, pickle and inspect look for
            raise AttributeError(name)

        def method(*args: Any, **kwargs: Any) -> Any:
            asked = _by_position_or_name(name, args, kwargs)
            return _Call(self._caller, name, asked, self._timeout)

        return method


class _Proxy:
    """Calls the methods of the peer as those of a class are called."""

    __slots__ = ("_caller", "_cls", "_timeout")

    def __init__(self, caller: "_Caller", cls: Callable[..., Any], timeout: _Timeout) -> None:
        self._caller, self._cls, self._timeout = caller, cls, timeout

    def __getattr__(self, name: str) -> Callable[..., Any]:
        typed = _typed(self._cls, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            asked = typed.arguments(args, kwargs)
            work = self._caller._items if typed.streams else self._caller._value
            return work(name, asked, self._timeout, typed.check)

        return method


class _Call(Coroutine[Any, Any, RpcResponse]):
    """A call of a method of the peer: await it; or iterate over it, if that is a stream."""

    __slots__ = ("_asked", "_caller", "_work")

    def __init__(self, caller: "_Caller", method: str, args: _Arguments,
                 timeout: _Timeout) -> None:
        self._caller, self._asked = caller, (method, args, timeout)
        self._work = caller._response(method, args, timeout)

    def __await__(self) -> Generator[Any, Any, RpcResponse]:
        return self._work.__await__()

    def __aiter__(self) -> AsyncGenerator[Any, None]:
        self._work.close()
        return self._caller._items(*self._asked)

    def send(self, value: Any) -> Any:
        return self._work.send(value)

    def throw(self, *error: Any) -> Any:
        return self._work.throw(*error)

    def close(self) -> None:
        self._work.close()


class _Caller:
    """One who calls the methods of the peer."""

    __slots__ = ()
    _response: Callable[[str, _Arguments, _Timeout], Coroutine[Any, Any, RpcResponse]]
    _ready_channel: Callable[[_Timeout], Coroutine[Any, Any, "tuple[RpcChannel, float | None]"]]

    @property
    def other(self) -> Any:
        """The peer's methods: ``await channel.other.add(a=1, b=2)`` is a `call`.

        ``channel.other(timeout=2).add(...)`` sets the timeout, in seconds.
        """
        return _Other(self)

    def proxy(self, cls: Callable[..., _T], *, timeout: _Timeout = _UNSET) -> _T:
        """The peer's methods with the types of ``cls``: its class of methods, or a Protocol.

        ``await channel.proxy(Calculator).add(1, 2)`` is the value itself, validated by pydantic;
        an InternalError says that the peer returned something else. A method that is not in the
        class is an AttributeError, and arguments that do not fit it a TypeError, before a call.
        """
        proxy: Any = _Proxy(self, cls, timeout)
        return proxy  # type: ignore[no-any-return]

    def call(self, method: str, args: _Arguments = None, *, timeout: _Timeout = _UNSET) -> _Call:
        """Call a method of the peer; await the response. Cancelling it cancels the method.

        ``args`` are by name (a mapping) or by position (a sequence). ``timeout`` is in seconds;
        None is no limit, the default this side's ``default_response_timeout``; within a method, it
        is never more than its own caller waits. A client first waits for a connection if need be.

        Raises the RpcError that the peer answered; RequestTimeout; ChannelClosed if the connection
        ends, and then whether the method ran is not known; Overloaded while 64 MiB wait to be sent;
        MessageTooLarge, TypeError or ValueError for arguments that cannot be sent.

        A stream is iterated over instead: ``async for item in channel.call("ticks")``. ``timeout``
        is then for each item, while it is waited for. Leaving the loop ends the stream at the peer.
        """
        return _Call(self, method, args, timeout)

    async def _value(self, method: str, args: _Arguments, timeout: _Timeout,
                     check: Callable[[Any], Any]) -> Any:
        return check((await self._response(method, args, timeout)).result)

    async def _items(self, method: str, args: _Arguments, timeout: _Timeout,
                     check: Callable[[Any], Any] | None = None) -> AsyncGenerator[Any, None]:
        channel, _ = await self._ready_channel(timeout)
        items = _Incoming()
        id, future = channel._start(method, args, timeout, lambda _: _wake(items.waiters), items)
        call = channel._calls[id]
        try:
            while items or not future.done():
                if items:
                    item = items.popleft()
                    yield item if check is None else check(item)
                    channel._grant(id, items.consumed())
                else:
                    call.deadline = channel._deadline(channel._loop.time(), timeout)
                    channel._watch(call.deadline)
                    await _next_wake(items.waiters)
                    call.deadline = None  # what is done with an item takes its time
            if (await channel._outcome(method, id, future)).result is not None:
                raise InternalError(f"{method} is not a stream at the peer")
        finally:
            if channel._calls.pop(id, None):  # still there: it was left
                channel._send_cancel(id)


class RpcChannel(_Caller):
    """One connection, on either side. Not thread-safe: for use on its event loop."""

    __slots__ = tuple("""
        __weakref__ _answers_size _batched _below _calls _close_timer _closed _closing _dialect
        _direct _end_waiters _failure _feed _held _ids _loop _outbox _outbox_size _peer_takes
        _performs _reader _receiving _room _running _send_deadline _share _side _socket _spared
        _speaks _streams _tasks _timer _timer_at _unread _unsent _writer context id""".split())

    def __init__(self, socket: Socket, side: _Side, dialect: _Dialect | None,
                 context: dict[str, Any]) -> None:
        self.id, self.context = uuid.uuid4().hex, context
        self._socket, self._side, self._peer_takes = socket, side, side._max_size
        self._dialect, self._speaks = dialect, dialect or _JSONRPC  # only errors, until it is known
        self._below: _Below | None = getattr(socket, "below", None)
        self._direct = self._below if self._below and self._below.takes_frames else None
        self._held: list[tuple[int | None, str, str | None, float | None, int]] = []
        self._loop = asyncio.get_running_loop()
        self._outbox: list[tuple[str, int, bool]] = []  # text, its bytes, is it an answer
        self._outbox_size = self._answers_size = self._batched = 0
        self._writer: asyncio.Task[None] | None = None
        self._room: list[asyncio.Future[None]] = []
        self._calls, self._ids = _Calls(), itertools.count(1)
        self._running: dict[_Request, None] = {}  # with less overhead than a set has
        self._streams: dict[_Request, None] = {}  # which wait for room
        self._tasks: set[asyncio.Task[Any]] = set()
        self._spared: list[asyncio.Task[Any] | None] = []  # called close, and go on after it
        self._reader: asyncio.Task[None]
        self._unread: Iterator[_Message] = iter(())  # what was received and not looked at yet
        self._performs: _Method  # what the reader is in
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

    async def _response(self, method: str, args: _Arguments, timeout: _Timeout) -> RpcResponse:
        return await self._outcome(method, *self._start(method, args, timeout))

    async def _ready_channel(self, timeout: _Timeout) -> "tuple[RpcChannel, float | None]":
        return self, self._side._seconds(timeout)

    def notify(self, method: str, args: _Arguments = None) -> None:
        """Call a method of the peer and do not wait: there is no answer, not even an error.

        Raises what `call` raises before it sends.
        """
        self._send_request(None, method, _params(self._side._encode, args), None)

    def _start(self, method: str, args: _Arguments, timeout: _Timeout,
               then: Callable[[_Outcome], None] | None = None, items: _Incoming | None = None,
               ) -> tuple[int, "asyncio.Future[_Outcome]"]:
        """Send a request. Not a coroutine, so that what is called first is sent first."""
        params = _params(self._side._encode, args)
        now = self._loop.time()
        deadline = self._deadline(now, timeout)
        id, future = next(self._ids), self._loop.create_future()
        self._calls[id] = _Pending(future, deadline, then, items)
        try:
            if items is not None:  # how long each takes is for this side to see
                self._send_request(id, method, params, None, STREAM_CREDIT)
            else:
                self._send_request(id, method, params, None if deadline is None else deadline - now)
        except BaseException:
            del self._calls[id]
            raise
        self._watch(deadline)
        return id, future

    def _deadline(self, now: float, timeout: _Timeout) -> float | None:
        """When a call is late, in the loop's time; within a method, not after that is."""
        seconds, request = self._side._seconds(timeout), _current.get()
        deadline = None if request is None else request.deadline
        if seconds is None:
            return deadline
        if math.isnan(seconds):
            raise ValueError("a timeout is a number of seconds, or None")
        own = now + min(max(0.0, seconds), LONGEST_TIMEOUT_SECONDS)
        return own if deadline is None else min(own, deadline)

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
                      timeout: float | None, credit: int = 0) -> None:
        if self._closed is not None:
            raise ChannelClosed(self._closed.code, self._closed.reason)
        if self._outbox_size > OUTBOX_BYTES or len(self._held) >= HELD_MESSAGES:
            raise Overloaded("too much waits to be sent to this peer")
        if self._dialect is None:
            self._held.append((id, method, params, timeout, credit))
            return
        text = self._dialect.request(id, method, params, timeout, credit)
        if _size(text) > self._peer_takes:
            raise MessageTooLarge(f"{method}: {_size(text)} bytes, the limit is {self._peer_takes}")
        self._put(text)

    def _send_cancel(self, id: int) -> None:
        if isinstance(self._dialect, _JsonRpc):
            self._put(self._dialect.request(None, "$/cancelRequest", f'{{"id":{id}}}', None))

    def _grant(self, id: int, n: int) -> None:
        if n and id in self._calls:
            text = self._speaks.request(None, "$/credit", f'{{"id":{id},"n":{n}}}', None)
            self._put_answer(text)  # as much as for answers, the peer has to read it

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
            self._writer = self._writer or self._spawn_vital(self._write())
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
            request.wake()
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
        self._spawn_vital(self._open(opened))
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

    def _spawn_vital(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Start a task that is not to be missed: if it is cancelled, the connection ends."""
        task = self._spawn(work)
        task.add_done_callback(
            lambda task: self._end(ChannelClosed(1011, "cancelled")) if task.cancelled() else None)
        return task

    # receiving

    async def _read(self) -> None:
        message: _Message | None
        try:
            while True:
                most = self._answers_size + ANSWERS_BYTES
                for message in self._unread:
                    if (waiting := self._begin(message)) is not None:
                        self._pass_on()
                        return await _go_on(*waiting)
                    if self._answers_size > most:  # by one frame
                        await self._pause()
                        most = self._answers_size + ANSWERS_BYTES
                message = None  # not to be kept while waiting: 0.7 KiB
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
        except OSError as error:
            lost = ChannelClosed(1006, "cannot receive")
            self._end(error if isinstance(error, ChannelClosed) else lost)
        except asyncio.CancelledError:
            if self._closed is None and self._reader.cancelling():
                self._reader = self._spawn(self._read())  # by a method, that took it for its own
            else:  # or by the transport
                self._end(ChannelClosed(1011, "cannot receive"))
            raise
        except Exception as error:  # the transport's
            self._failure = error
            self._end(ChannelClosed(1011, "cannot receive"))

    def _begin(self, message: _Message) -> tuple[Coroutine[Any, Any, None], Any, Context] | None:
        """Serve a message; returns what has to wait."""
        if (work := self._serve(message)) is not None:
            context = copy_context()
            try:
                return work, context.run(work.send, None), context
            except StopIteration:
                pass
        return None

    def _pass_on(self) -> None:
        """What the reader performs has to wait, in this task: let another one read on."""
        self._tasks.discard(self._reader)
        self._performs.waits = True
        self._flush()
        self._reader = self._spawn(self._read())

    async def _pause(self) -> None:
        self._flush()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._answers_size / PAUSE_BYTES_PER_SECOND):
                while self._answers_size > ANSWERS_BYTES:
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
                batch = _Batch(self._put_answer, self._peer_takes, self._batches_grow)
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
            for id, method, params, timeout, credit in held:
                try:
                    if id is None or id in self._calls:  # not, if it is late or was cancelled
                        self._send_request(id, method, params, timeout, credit)
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
        elif method.streams is not (request.credit > 0):
            kind = "a stream" if method.streams else "no stream"
            self._fail(request, InvalidParams(f"{request.method} is {kind}"))
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
            request.task = asyncio.Task(self._perform(request, method))
        return None

    async def _perform(self, request: _Request, method: _Method) -> None:
        """The whole of a task, or of a reader's turn: so that no exception leaves it."""
        request.started = True
        _current.set(request)
        try:
            args, named = method.bind(self, request.params)
            if method.streams:
                value = await self._produce(request, method.function(*args, **named))
            elif method.threaded:
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
            if type(error) is RequestTimeout:  # of another connection, whose troubles are not told
                told = RequestTimeout()
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

    async def _produce(self, request: _Request, items: AsyncGenerator[Any, None]) -> Any:
        """Send what a generator yields, as the peer grants it and as there is room for it."""
        out = _Outgoing(request, self._put_answer)
        try:
            async for item in items:
                if not request.open:  # it was stopped, and goes on
                    break
                out.add(self._side._encode(item), self._peer_takes)
                request.credit -= 1
                if not request.credit or self._outbox_size > LIVE_BYTES:
                    out.flush()
                    await self._granted(request)
                elif len(out) == 1:
                    self._loop.call_soon(out.flush)
        finally:
            out.flush()  # an error comes after the items before it
            await items.aclose()

    async def _granted(self, request: _Request) -> None:
        """Wait for credit, and for room: where several do, for that in turns."""
        try:
            while request.open and (not request.credit or self._outbox_size > LIVE_BYTES):
                if request.credit:
                    self._streams[request] = None
                request.waiter = self._loop.create_future()
                await request.waiter
        finally:
            self._streams.pop(request, None)

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
        except Exception:  # it is the user's, with any attributes
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

    def _batches_grow(self, size: int) -> int:
        self._batched += size
        return self._batched

    def _put_answer(self, text: str) -> None:
        self._put(text, answer=True)

    def _flush(self) -> None:
        """Write to the socket; what it does not take now is the writer's."""
        self._receiving = False
        while self._writer is None and (self._outbox or self._refill()):
            if self._direct is None or not self._direct.ready():
                self._writer = self._spawn_vital(self._write())
                return
            self._direct.write(b"".join(map(_frame, self._take())))
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
        if self._streams and self._outbox_size <= LIVE_BYTES:
            for request in self._streams:
                request.wake()
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
                for frame in self._take():
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

    def _take(self) -> Sequence[str]:
        """What leaves next: a message, or as many as may leave together."""
        outbox, total, count, answers = self._outbox, 1, 0, 0
        limit = min(FRAME_BYTES, self._peer_takes)
        for _, size, answer in outbox:
            if count and total + size >= limit:
                break
            count, total, answers = count + 1, total + size + 1, answers + size * answer
        texts = [text for text, _, _ in outbox[:count]]
        del outbox[:count]
        self._outbox_size -= total - 1 - count
        self._answers_size -= answers
        return _joined(texts, self._dialect)


def _short(reason: str) -> str:
    """What fits into a close frame (RFC 6455, 5.5)."""
    return reason.encode()[:123].decode(errors="ignore")


def _params(encode: Callable[[object], str], args: _Arguments) -> str | None:
    params = None if args is None else encode(args)
    if params is not None and params[0] not in "{[":
        raise TypeError(f"arguments are a mapping or a sequence, not {type(args).__name__}")
    return params


# ------------------------------------------------------------------------------------- backbones
# A backbone is an ordered log on a broker. Those below raise on any trouble, with their connection
# dropped, and repeat nothing: that is up to who drives them. append_many() and read() may run at
# the same time, each on a connection of its own. Connections are opened and closed in tasks of
# their own: no cancellation breaks into a handshake, which some drivers do not survive, and nobody
# waits long for the end of one that hangs.

_Entries: TypeAlias = AsyncGenerator[tuple[int, bytes], None]


class Backbone(Protocol):
    """An ordered log on a broker: anything with these two methods will do.

    Used where they are there: ``max_size``, the bytes of the largest payload; ``append_many``, for
    several payloads; ``aclose()``, called when nothing more is appended for now.
    """

    async def append(self, payload: bytes) -> None:
        """Append one entry. When this returns, the broker has it.

        **Raises** MessageTooLarge for what is never taken; anything else when it is not known.
        """

    def read(self, start: int | None) -> AsyncIterator[tuple[int, bytes]]:
        """Iterate over entries with their offsets, in order, for ever.

        They begin with the one at ``start``, or the first after it if that one is gone; with
        None, with one so far before the end as is worth keeping in memory.

        **Raises** LookupError, soon, if no entry is there or after it: the log was set back, or
        began anew. Anything else means that the connection broke; silence may mean that, too.
        """


class _Link:
    """A connection: what ``connect`` returns, having put on the stack how it is closed."""

    def __init__(self, connect: Callable[[AsyncExitStack], Awaitable[Any]]) -> None:
        self._connect, self._held = connect, AsyncExitStack()
        self._opening = asyncio.create_task(self._open())

    async def _open(self) -> Any:
        async with asyncio.timeout(BROKER_SECONDS):
            return await self._connect(self._held)

    async def _close(self) -> None:
        await asyncio.wait([self._opening])
        with contextlib.suppress(Exception):  # it is given up anyway
            async with asyncio.timeout(BROKER_SECONDS):
                await self._held.aclose()

    async def opened(self) -> Any:
        return await asyncio.shield(self._opening)

    async def close(self) -> None:
        self._closing = asyncio.create_task(self._close())
        await asyncio.wait([self._closing], timeout=RELEASE_SECONDS)


async def _asked(awaitable: Awaitable[_T]) -> _T:
    """What a driver answers; a cancellation that it lost, as wait_for does in 3.11, is raised."""
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        result = await awaitable
    except LookupError as error:  # which has a meaning here
        raise RuntimeError(f"unexpected answer of the broker: {error!r}") from error
    if task and task.cancelling() > before:
        raise asyncio.CancelledError
    return result


class _BrokerLog(abc.ABC):
    """What the built-in ones share: connections, timeouts, and where reading begins."""

    driver: ClassVar[str]
    extra: ClassVar[str]  # of this package, which installs it
    max_size = 2**24  # bytes of the largest payload

    def __init__(self, url: str, channel: str, history: int) -> None:
        self.url, self.channel, self.history = url, channel, history
        self.retained_bytes = max(history * RETAINED_ENTRY_BYTES, RETAINED_BYTES)
        self.name = re.sub("[^A-Za-z0-9_-]", "_", channel[:100])  # which every broker takes
        if self.name != channel:
            self.name += "-" + hashlib.sha256(channel.encode()).hexdigest()[:16]
        self._writer: _Link | None = None
        self._import(self.driver)  # that it is missing is no outage

    async def append(self, payload: bytes) -> None:
        """Append one entry. When this returns, the broker has it."""
        await self.append_many([payload])

    async def append_many(self, payloads: Sequence[bytes]) -> None:
        """Append several in order, pipelined; when this raises, any of them may be stored."""
        size = sum(map(len, payloads))
        self._writer = self._writer or _Link(self._connect_writer)
        try:
            async with asyncio.timeout(BROKER_SECONDS + size / BROKER_BYTES_PER_SECOND):
                await _asked(self._send(await self._writer.opened(), payloads))
        except BaseException:
            await self.aclose()
            raise

    async def read(self, start: int | None) -> AsyncIterator[tuple[int, bytes]]:
        """Iterate over entries, from ``start`` or about ``history`` before the end, for ever."""
        link = _Link(self._connect)
        try:
            async with asyncio.timeout(BROKER_SECONDS):
                connection = await link.opened()
                first, end = await _asked(self._ends(connection))
            begin = max(first, end - self.history if start is None else start)
            if start is not None and begin >= end:
                raise LookupError(f"no entry at {start} or after it: the log ends before {end}")
            async with contextlib.aclosing(self._follow(connection, begin)) as entries:
                while True:
                    yield await _asked(anext(entries))
        finally:
            await link.close()

    async def aclose(self) -> None:
        """Drop the connection for appending; a later append makes a new one."""
        writer, self._writer = self._writer, None
        if writer:
            await writer.close()

    def _import(self, name: str) -> Any:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"this backbone needs {name.partition('.')[0]}: "
                              f"pip install 'fastapi-ws-lite[{self.extra}]'") from error

    async def _connect_writer(self, held: AsyncExitStack) -> Any:
        return await self._connect(held)

    @abc.abstractmethod
    async def _connect(self, held: AsyncExitStack) -> Any:
        """A connection to an existing log, which is made where missing."""

    @abc.abstractmethod
    async def _send(self, connection: Any, payloads: Sequence[bytes]) -> None: ...

    @abc.abstractmethod
    async def _ends(self, connection: Any) -> tuple[int, int]:
        """At most the first offset, and one more than the last; 0 where there is no entry."""

    @abc.abstractmethod
    def _follow(self, connection: Any, start: int) -> _Entries: ...


class _RedisLog(_BrokerLog):
    """A stream (Redis 7 or later), whose key is the channel. The URL is redis-py's."""

    driver, extra = "redis", "redis"

    async def _connect(self, held: AsyncExitStack) -> Any:
        redis = self._import("redis.asyncio").Redis.from_url(
            self.url, retry=None, socket_timeout=BROKER_SECONDS)  # its default is ten retries
        held.push_async_callback(redis.aclose)
        return redis

    async def _send(self, connection: Any, payloads: Sequence[bytes]) -> None:
        pipeline = connection.pipeline(transaction=False)
        for payload in payloads:  # 0-*: the time stays 0, so that the rest is an offset
            pipeline.xadd(self.channel, {b"": payload}, id="0-*", maxlen=self.history)
        await pipeline.execute()

    async def _ends(self, connection: Any) -> tuple[int, int]:
        if not await connection.exists(self.channel):
            return 0, 0
        info = await connection.xinfo_stream(self.channel)
        first, last = info["first-entry"], info["last-entry"]  # ValueError: not a stream of ours
        return (int(first[0][2:]), int(last[0][2:]) + 1) if last else (0, 0)

    async def _follow(self, connection: Any, start: int) -> _Entries:
        last, count = f"0-{max(start, 1) - 1}", 1
        while True:
            found = await connection.xread(
                {self.channel: last}, count=count, block=int(BLOCK_SECONDS * 1000))
            if isinstance(found, dict):  # as in RESP3, with ?protocol=3
                found = [(key, page) for key, (page,) in found.items()]
            for last, fields in found[0][1] if found else ():
                yield int(last[2:]), fields[b""]
                count = min(PAGE_ENTRIES, 2 * count, 1 + PAGE_BYTES // (len(fields[b""]) + 1))


class _PostgresLog(_BrokerLog):
    """Two tables for all channels. The URL is asyncpg's.

    The head row of a channel, locked until the commit, makes the order; a sequence would not, as
    its numbers become visible in any order. NOTIFY only wakes; behind pgbouncer it is lost.
    """

    driver, extra = "asyncpg", "postgres"
    CREATE: Final = """DO $$ BEGIN
        IF to_regclass('fastapi_ws_lite_log') IS NULL THEN
            PERFORM pg_advisory_xact_lock(7817260511);  -- IF NOT EXISTS races with itself
            CREATE TABLE IF NOT EXISTS fastapi_ws_lite_head (
                channel text PRIMARY KEY, last bigint NOT NULL);
            CREATE TABLE IF NOT EXISTS fastapi_ws_lite_log (
                channel text, id bigint, payload bytea NOT NULL, PRIMARY KEY (channel, id));
        END IF; END $$"""
    APPEND: Final = """WITH head AS (
        INSERT INTO fastapi_ws_lite_head AS head VALUES ($1, $3)
        ON CONFLICT (channel) DO UPDATE SET last = head.last + $3 RETURNING last
    ), added AS (
        INSERT INTO fastapi_ws_lite_log SELECT $1, last - $3 + n, payload
        FROM head, unnest($2::bytea[]) WITH ORDINALITY AS new (payload, n)
    ), trimmed AS (
        DELETE FROM fastapi_ws_lite_log USING head WHERE channel = $1 AND id <= last - $4
    ) SELECT pg_notify('fastapi_ws_lite', $1)"""
    ENDS: Final = """SELECT coalesce(min(id), 0), coalesce(max(id) + 1, 0)
        FROM fastapi_ws_lite_log WHERE channel = $1"""
    PAGE: Final = f"""SELECT id, payload FROM (
        SELECT id, payload, sum(octet_length(payload)) OVER (ORDER BY id) AS size
        FROM fastapi_ws_lite_log WHERE channel = $1 AND id >= $2 ORDER BY id LIMIT {PAGE_ENTRIES}
    ) AS page WHERE size <= octet_length(payload) + {PAGE_BYTES} ORDER BY id"""

    async def _connect(self, held: AsyncExitStack) -> Any:
        connection = await self._import("asyncpg").connect(
            self.url, timeout=BROKER_SECONDS, command_timeout=None,
            statement_cache_size=0)  # which some pgbouncers forbid
        held.push_async_callback(connection.close)
        await connection.execute(self.CREATE)
        return connection

    async def _send(self, connection: Any, payloads: Sequence[bytes]) -> None:
        await connection.execute(
            self.APPEND, self.channel, payloads, len(payloads), self.history)

    async def _ends(self, connection: Any) -> tuple[int, int]:
        first, end = await connection.fetchrow(self.ENDS, self.channel)
        return first, end

    async def _follow(self, connection: Any, start: int) -> _Entries:
        wake = asyncio.Event()
        await connection.add_listener("fastapi_ws_lite", lambda *_: wake.set())
        while True:
            wake.clear()
            page = await connection.fetch(self.PAGE, self.channel, start, timeout=BROKER_SECONDS)
            for id, payload in page:
                yield id, payload
                start = id + 1
            if not page:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await wake.wait()


class _RabbitLog(_BrokerLog):
    """A queue of type stream. The URL is aio-pika's."""

    driver, extra = "aio_pika", "rabbitmq"
    max_size = 2**24 - 2**12  # the limit of RabbitMQ 4 includes what is around it

    async def _connect(self, held: AsyncExitStack) -> Any:
        aio_pika = self._import("aio_pika")
        connection = await aio_pika.connect(self.url, timeout=BROKER_SECONDS)
        held.push_async_callback(connection.close)
        try:  # not with arguments, as others than its own would be an error
            channel = await connection.channel(on_return_raises=True)
            await channel.get_queue(self.name)
        except aio_pika.exceptions.ChannelNotFoundEntity:  # which closed the channel
            channel = await connection.channel(on_return_raises=True)
            await channel.declare_queue(self.name, durable=True, arguments={
                "x-queue-type": "stream", "x-max-length-bytes": self.retained_bytes,
                "x-stream-max-segment-size-bytes": self.retained_bytes // 4})
        return connection, channel, aio_pika.Message

    async def _send(self, connection: Any, payloads: Sequence[bytes]) -> None:
        _, channel, message = connection
        publish = channel.default_exchange.publish
        await asyncio.gather(*(publish(message(payload), self.name) for payload in payloads))

    async def _consume(self, connection: Any, offset: int | str, prefetch: int) -> Any:
        inbox: asyncio.Queue[Any] = asyncio.Queue()  # bounded by prefetch
        channel = await connection[0].channel()
        channel.close_callbacks.add(lambda *_: inbox.put_nowait(None))
        await channel.set_qos(prefetch)
        queue = await channel.get_queue(self.name)
        await queue.consume(inbox.put, arguments={"x-stream-offset": offset})
        return inbox, channel

    async def _ends(self, connection: Any) -> tuple[int, int]:
        inbox, channel = await self._consume(connection, "last", 2**16 - 1)
        end = 0
        for seconds in (0, 0.05, 0.2, 0.5):  # the last chunk is there at once, but is it always?
            await asyncio.sleep(0 if end else seconds)
            await channel.get_queue(self.name)  # what was sent before this answer has come
            while not inbox.empty():
                end = inbox.get_nowait().headers["x-stream-offset"] + 1
        await channel.close()
        return 0, end

    async def _follow(self, connection: Any, start: int) -> _Entries:
        inbox, _ = await self._consume(connection, start, PAGE_ENTRIES)
        while message := await inbox.get():
            yield message.headers["x-stream-offset"], message.body
            await message.ack()
        raise ConnectionError("RabbitMQ closed the channel")


class _KafkaLog(_BrokerLog):
    """A topic of one partition: kafka://user:password@host:port,host:port/?option=value.

    Options are keyword arguments of aiokafka's clients, such as security_protocol (with a user:
    SASL_SSL) and sasl_mechanism; ssl_cafile, ssl_certfile, ssl_keyfile; and max_request_size.
    """

    driver, extra = "aiokafka", "kafka"

    def __init__(self, url: str, channel: str, history: int) -> None:
        super().__init__(url, channel, history)
        parts = urlsplit(url)
        login, _, hosts = parts.netloc.rpartition("@")
        self._options: dict[str, Any] = {
            "bootstrap_servers": hosts.split(","),
            "request_timeout_ms": int(BROKER_SECONDS * 800)}  # stop() may take as long
        if login:
            user, _, password = map(unquote, login.partition(":"))
            self._options |= {"security_protocol": "SASL_SSL", "sasl_plain_username": user,
                              "sasl_plain_password": password}
        self._options |= {k: int(v) if v.isdecimal() else v for k, v in parse_qsl(parts.query)}
        self._request_size = self._options.pop("max_request_size", 2**20)
        self.max_size = self._request_size - 2**9  # the rest of a request is less

    async def _start(self, held: AsyncExitStack, client: Any, **more: Any) -> Any:
        options = self._options | more
        files = {k: options.pop(f"ssl_{k}", None) for k in ("cafile", "certfile", "keyfile")}
        if "SSL" in options.get("security_protocol", ""):
            options["ssl_context"] = self._import("aiokafka.helpers").create_ssl_context(**files)
        started = client(**options)
        held.push_async_callback(self._stop, started)
        await started.start()
        return started

    async def _stop(self, client: Any) -> None:
        try:
            await (getattr(client, "stop", None) or client.close)()
        except asyncio.CancelledError:  # of the consumer's own tasks, before it has ended them all
            await client._client.close()

    async def _make_topic(self) -> None:
        admin, size = self._import("aiokafka.admin"), self.retained_bytes
        async with AsyncExitStack() as held:
            client = await self._start(held, admin.AIOKafkaAdminClient)
            if self.name in await client.list_topics():  # asking for one by name may create it
                return
            answer = await client.create_topics([admin.NewTopic(self.name, 1, -1, {}, {
                "retention.bytes": str(size), "segment.bytes": str(size // 4),
                "max.message.bytes": str(self._request_size)})])
        code = answer.topic_errors[0][1]
        if code not in (0, 36):  # 36: another server was first
            raise self._import("aiokafka.errors").for_code(code)(self.name)

    async def _connect_writer(self, held: AsyncExitStack) -> Any:
        await self._make_topic()
        return await self._start(held, self._import("aiokafka").AIOKafkaProducer, acks="all",
                                 max_request_size=self._request_size)

    async def _send(self, connection: Any, payloads: Sequence[bytes]) -> None:
        acks = [await connection.send(self.name, payload, partition=0) for payload in payloads]
        await asyncio.gather(*acks)

    async def _connect(self, held: AsyncExitStack) -> Any:
        await self._make_topic()
        kafka = self._import("aiokafka")
        consumer = await self._start(
            held, kafka.AIOKafkaConsumer, auto_offset_reset="none", enable_auto_commit=False,
            max_partition_fetch_bytes=self._request_size)
        consumer.assign([partition := kafka.TopicPartition(self.name, 0)])
        return consumer, partition

    async def _ends(self, connection: Any) -> tuple[int, int]:
        consumer, partition = connection
        first = (await consumer.beginning_offsets([partition]))[partition]
        end = (await consumer.end_offsets([partition]))[partition]
        if end > first:  # some brokers count their last batch as one; what is fetched is right
            consumer.seek(partition, end - 1)
            await consumer.getmany(partition, timeout_ms=1000)
        return first, max(end, consumer.highwater(partition) or 0)

    async def _follow(self, connection: Any, start: int) -> _Entries:
        consumer, partition = connection
        consumer.seek(partition, start)
        while record := await consumer.getone():
            yield record.offset, record.value


class _NatsLog(_BrokerLog):
    """A JetStream stream with one subject: nats://user:password@host:port,host:port."""

    driver, extra = "nats", "nats"
    max_size = 2**20  # until the server has told its own

    async def _connect(self, held: AsyncExitStack) -> Any:
        nats, acks = self._import("nats"), list[Any]()
        client = nats.aio.client.Client()

        async def closed() -> None:  # else they wait for ever
            for ack in acks:
                if not ack.done():
                    ack.set_exception(ConnectionError("the connection to NATS is closed"))

        async def failed(error: Exception) -> None:  # whoever waits is told
            logger.debug("nats: %r", error)

        held.push_async_callback(client.close)
        await client.connect(
            self.url.split(","), allow_reconnect=False, max_reconnect_attempts=1, ping_interval=5,
            reconnect_time_wait=0, connect_timeout=BROKER_SECONDS, closed_cb=closed,
            error_cb=failed)
        self.max_size = client.max_payload
        stream = client.jetstream(timeout=BROKER_SECONDS)
        try:  # not with limits, as others than its own would be an error
            await stream.stream_info(self.name)
        except nats.js.errors.NotFoundError:
            await stream.add_stream(
                name=self.name, subjects=[self.name], max_msgs=self.history)
        return client, stream, acks

    async def _send(self, connection: Any, payloads: Sequence[bytes]) -> None:
        _, stream, acks = connection
        acks[:] = [await stream.publish_async(self.name, payload) for payload in payloads]
        await asyncio.gather(*acks)

    async def _ends(self, connection: Any) -> tuple[int, int]:
        state = (await connection[1].stream_info(self.name)).state
        return (state.first_seq, state.last_seq + 1) if state.messages else (0, 0)

    async def _follow(self, connection: Any, start: int) -> _Entries:
        client, stream, _ = connection
        api, inbox = self._import("nats.js.api"), client.new_inbox()
        entries = await client.subscribe(inbox)
        await stream.add_consumer(self.name, api.ConsumerConfig(
            deliver_subject=inbox, deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=max(start, 1), ack_policy=api.AckPolicy.NONE, flow_control=True,
            idle_heartbeat=BLOCK_SECONDS, inactive_threshold=BROKER_SECONDS))
        while message := await entries.next_msg(timeout=BROKER_SECONDS):
            if not message.headers:
                yield message.metadata.sequence.stream, message.data
            elif message.reply:  # flow control: no more comes before this is answered
                await message.respond(b"")


_BACKBONES: Final[dict[str, type[_BrokerLog]]] = {
    "redis": _RedisLog, "rediss": _RedisLog, "postgresql": _PostgresLog, "postgres": _PostgresLog,
    "amqp": _RabbitLog, "amqps": _RabbitLog, "kafka": _KafkaLog, "nats": _NatsLog, "tls": _NatsLog,
}


def _backbone_of(url: str, channel: str, history: int) -> _BrokerLog:
    """The log of that name on that broker, not connected yet. Raises ValueError."""
    scheme = url.partition("://")[0]
    if scheme not in _BACKBONES:
        raise ValueError(f"no backbone is known for {scheme!r}, but for {', '.join(_BACKBONES)}")
    return _BACKBONES[scheme](url, channel, history)


class _Envelope(NamedTuple):
    """An event on its way to the backbone, and the one who waits for it."""
    payload: bytes
    done: "asyncio.Future[None]"


class _Shared:
    """A log that servers share: one writer and one reader above a backbone, for one loop at a time.

    An entry has one event, or several small ones. Each has an id, "writer:number", and a place:
    that of the entry, and within it. An append whose answer did not come is sent again, in
    order, and the reader drops an id that it has seen. It remembers the offset and id of its last
    entry: whenever it begins to read, that entry must come first, or something is missing. A writer
    begins with a mark, "writer!number"; when the reader has come to it, it is ready: what came
    before its first one is new to nobody. If the log began anew, it may also have been set back,
    and what comes before another mark may be old; what certainly is not has a number that its
    writer had not reached. ``commit`` is called with (position, topic, data, origin, is it new),
    ``lose`` with (position, reason, is it new) before what comes after a hole.
    """

    def __init__(self, backbone: Backbone, commit: Callable[..., None],
                 lose: Callable[[str, str, bool], None]) -> None:
        self._backbone, self._commit, self._lose = backbone, commit, lose
        self._queue: deque[_Envelope] = deque()
        self._waiting = 0  # bytes in it
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stirred: list[asyncio.Future[None]] = []  # those who wait for the queue,
        self._moved: list[asyncio.Future[None]] = []  # and for the reader
        self._seen: dict[str, None] = {}
        self._numbers: dict[str, int] = {}  # the last of each writer
        self._at: tuple[int, str] | None = None  # of the last entry
        self._hole = ""  # why something is missing before the next entry
        self._ready = self._tailed = self._doubtful = self._connected = False
        self._sent = self._own = -1  # the last number that was written, and that was read
        self._pack_bytes = PACK_BYTES
        self._error: str | None = None

    def start(self) -> None:
        """Begin on this loop; or go on, where another loop or close() has left off."""
        loop = asyncio.get_running_loop()
        for task in self._tasks:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                task.get_loop().call_soon_threadsafe(task.cancel)
        self._tasks, self._stirred, self._moved = set(), [], []
        self._queue = deque(_Envelope(e.payload, loop.create_future()) for e in self._queue)
        self._writer = uuid.uuid4().hex[:12]  # not in the constructor: workers may be forked
        self._events, self._marks = itertools.count(), itertools.count()
        self._numbers[self._writer] = self._sent = self._own = -1
        self._ready = False
        self._begin()
        for work in (self._write, self._read):
            _hold(self._tasks, self._for_ever(work))

    def stats(self) -> dict[str, Any]:
        return {"connected": self._connected, "queued": len(self._queue),
                "behind": max(0, self._sent - self._own), "last_error": self._error}

    def check(self, size: int, origin: str | None, count: int) -> None:
        """Raises MessageTooLarge for more than the backbone takes, Overloaded for what waits."""
        size += ENVELOPE_BYTES + (_size(_quoted(origin)) if origin else 0)
        if size > (limit := getattr(self._backbone, "max_size", math.inf)):
            raise MessageTooLarge(f"{size} bytes, the limit of the backbone is {limit}")
        waiting = self._waiting + size * count
        if waiting > OUTBOX_BYTES and (self._queue or count > 1):
            raise Overloaded(f"{waiting} bytes wait to be published")

    def put(self, topics: Sequence[str], data: str,
            origin: str | None) -> list["asyncio.Future[None]"]:
        """Queue events; the futures are done when they are in the log."""
        loop = asyncio.get_running_loop()
        new = [_Envelope(_pack(f"{self._writer}:{next(self._events)}", topic, origin, data),
                         loop.create_future()) for topic in topics]
        self._queue.extend(new)
        self._waiting += sum(len(envelope.payload) for envelope in new)
        _wake(self._stirred)
        return [envelope.done for envelope in new]

    def _begin(self) -> None:
        """Have a mark written, before anything else: up to there, the log is of before."""
        self._mark = f"{self._writer}!{next(self._marks)}"
        self._marked = asyncio.get_running_loop().create_future()
        self._queue.appendleft(_Envelope(_pack(self._mark, None, None, ""), self._marked))
        self._waiting += len(self._queue[0].payload)
        _wake(self._stirred)

    async def ready(self, since: str | None, here: Callable[[str], object]) -> None:
        """Wait until the log was read to its end; and a position that another server has told."""
        while not self._ready:
            await _next_wake(self._moved)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REACH_SECONDS):
                place = _offset(since) // PACK_EVENTS
                while since and not here(since) and place > (self._at or (-1,))[0]:
                    await _next_wake(self._moved)

    async def close(self) -> None:
        """Give what is queued a moment to leave, and stop."""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GRACE_SECONDS):
                    while self._queue:
                        await asyncio.wait([self._queue[-1].done])
        finally:
            for task in self._tasks:
                task.cancel()
        await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)
        while self._queue:
            _fail(self._queue.popleft(), ChannelClosed(1001, "the endpoint was closed"))
        self._connected, self._waiting = False, 0

    async def _for_ever(self, work: Callable[[], Awaitable[None]]) -> None:
        _current.set(None)
        task, now = asyncio.current_task(), asyncio.get_running_loop().time
        delay = BACKOFF_FIRST_SECONDS
        while not (task and task.cancelling()):
            began, trouble = now(), cast(BaseException | None, None)
            try:
                await work()
            except asyncio.CancelledError as error:  # perhaps the driver's, whose connection broke
                trouble = error
            except Exception as error:  # of any library: the broker is away
                trouble = error
            if trouble is not None and not (task and task.cancelling()):
                before, self._error = self._error, f"{type(trouble).__name__}: {trouble}"
                new = self._connected or self._error != before
                logger.log(logging.WARNING if new else logging.DEBUG,
                           "the backbone fails, and is tried again: %s", self._error)
                self._connected = False
                if now() - began > BROKER_BACKOFF_SECONDS:
                    delay = BACKOFF_FIRST_SECONDS  # it had worked for a while
                await asyncio.sleep(delay * random.uniform(0.5, 1))
                delay = min(2 * delay, BROKER_BACKOFF_SECONDS)

    async def _write(self) -> None:
        many: Callable[[list[bytes]], Awaitable[None]] | None = getattr(
            self._backbone, "append_many", None)
        try:
            while True:
                while not self._queue:
                    await _next_wake(self._stirred)
                packs = self._batch(APPEND_EVENTS if many else 1)
                batch = list(itertools.chain.from_iterable(packs))
                entries = [_SEPARATOR.join(e.payload for e in pack) for pack in packs]
                try:
                    await (many(entries) if many else self._backbone.append(entries[0]))
                except MessageTooLarge as error:
                    if len(packs) == len(batch):
                        self._drop(max(batch, key=lambda envelope: len(envelope.payload)), error)
                    self._pack_bytes = 0
                    raise
                for envelope in batch:
                    self._queue.remove(envelope)  # the first one, unless a mark has come before it
                    self._waiting -= len(envelope.payload)
                    envelope.done.set_result(None)
                self._count(batch[-1])
        finally:
            if (aclose := getattr(self._backbone, "aclose", None)) is not None:
                await aclose()

    def _batch(self, most: int) -> list[list[_Envelope]]:
        """What goes next: packs of events, each for one entry."""
        limit = min(self._pack_bytes, getattr(self._backbone, "max_size", PACK_BYTES))
        packs, room, size = list[list[_Envelope]](), 0, 0
        for envelope in self._queue:
            need = len(envelope.payload) + 1  # with a separator
            if need > room:
                if len(packs) == most or (packs and size + need > APPEND_BYTES):
                    break
                packs.append([])
                room = limit + 1
            packs[-1].append(envelope)
            room, size = room - need, size + need
        return packs

    def _count(self, last: _Envelope) -> None:
        writer, colon, number = _unpack(last.payload)[0].partition(":")
        if colon and writer == self._writer:
            self._sent = int(number)

    def _drop(self, envelope: _Envelope, error: MessageTooLarge) -> None:
        """Go on without an event that the broker will never take; and without a hole."""
        place, id = self._queue.index(envelope), _unpack(envelope.payload)[0]
        nobody = asyncio.get_running_loop().create_future()
        self._queue[place] = _Envelope(_pack(id, None, None, ""), nobody)
        self._waiting += len(self._queue[place].payload) - len(envelope.payload)
        _fail(envelope, error)

    async def _read(self) -> None:
        """Read until there is silence, which is then asked about, or trouble."""
        anchor, now = self._at, asyncio.get_running_loop().time
        entries: Any = aiter(self._backbone.read(None if anchor is None else anchor[0]))
        heard, late = False, 0.0
        try:
            async with asyncio.timeout(SILENCE_SECONDS) as silence:
                async for offset, payload in entries:
                    events = [_unpack(part) for part in payload.split(_SEPARATOR, PACK_EVENTS - 1)]
                    if anchor is not None and offset == anchor[0] and events[0][0] != anchor[1]:
                        raise LookupError(f"another entry is at {offset}")
                    if anchor is not None and offset > anchor[0]:
                        self._hole = self._hole or "history"
                    if anchor is None or offset != anchor[0]:
                        for place, event in enumerate(events, offset * PACK_EVENTS):
                            self._take(place, *event)
                        self._at = offset, events[0][0]  # if one raises, the rest is read again
                        _wake(self._moved)
                    anchor, heard, self._connected = None, True, True
                    if (time := now()) > late:  # a timer for each entry would cost more than it
                        late = time + SILENCE_SECONDS / 10
                        silence.reschedule(time + SILENCE_SECONDS)
            raise ConnectionError("the backbone has ended its log")
        except TimeoutError:
            if self._marked.done() and not (self._ready and not self._doubtful):
                self._begin()  # the mark was lost with the log it was in
            if not heard:
                raise TimeoutError("the broker does not answer") from None
        except LookupError as error:
            if self._at is None:
                raise
            logger.warning("the log of the backbone began anew: %s", error)
            self._hole, self._at, self._doubtful = "log", None, self._tailed
            self._own = self._sent
            self._begin()
        finally:
            if (aclose := getattr(entries, "aclose", None)) is not None:
                await aclose()

    def _take(self, place: int, id: str, topic: str | None, origin: str | None,
              data: str) -> None:
        if id in self._seen or not id:
            return
        self._seen[id] = None
        if len(self._seen) > SEEN_EVENTS:
            del self._seen[next(iter(self._seen))]
        ended = id == self._mark
        if not self._follows(id) and self._doubtful and not ended:
            return
        if self._hole:
            self._lose(f"{max(0, place - 1)}-{id}!", self._hole, self._tailed)
        self._hole = ""
        self._commit(f"{place}-{id}", topic, data, origin, self._tailed)
        if ended:
            self._ready, self._tailed, self._doubtful = True, True, False

    def _follows(self, id: str) -> bool:
        """Note the number of an event. Is it one that its writer, which is known, had not had?"""
        writer, colon, digits = id.partition(":")
        if not colon:
            return False
        number, last = int(digits), self._numbers.pop(writer, None)
        if last is None and self._doubtful:
            return False
        self._numbers[writer] = number if last is None else max(number, last)
        if len(self._numbers) > WRITERS:
            del self._numbers[next(iter(self._numbers))]
        if writer == self._writer:
            self._own = self._numbers[writer]
        if last is not None and number > last + 1:
            self._hole = self._hole or "history"
        return last is not None and number > last


_ID: Final = re.compile("[0-9a-f]{12}([:!])[0-9]{1,18}")
_SEPARATOR: Final = b"\x1e"  # between events that share an entry; it is in no JSON text


def _pack(id: str, topic: str | None, origin: str | None, data: str) -> bytes:
    return f"{_encode([id, topic, origin])}\n{data}".encode()


def _unpack(payload: bytes) -> tuple[str, str | None, str | None, str]:
    """Id, topic, origin and data of an entry; without an id, it is not one of ours."""
    head, _, data = payload.partition(b"\n")
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        id, topic, origin = from_json(head)
        sign = found[1] if (found := _ID.fullmatch(id)) else ""
        if topic is None and sign:
            return id, None, None, ""
        if isinstance(topic, str) and sign == ":":
            _decode(data)  # what is not JSON must not get to clients
            return id, topic, origin if isinstance(origin, str) else None, data.decode()
    logger.warning("an entry of the backbone is not one of ours: %.60r", payload)
    return "", None, None, ""


def _fail(envelope: _Envelope, error: RpcError) -> None:
    envelope.done.set_exception(error)
    envelope.done.exception()  # nobody may be there to see it


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
    era: int  # and how many logs there were before that one's; -1: that is not known


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

    ways: tuple[tuple[set[str], Callable[[Event], Any]], ...] = (
        ({"event"}, lambda event: callback(event=event)),
        ({"data", "topic"}, lambda event: callback(data=event.data, topic=event.topic)),
        ({"data"}, lambda event: callback(data=event.data)),
        ({"topic"}, lambda event: callback(topic=event.topic)))
    for given, call in ways:
        if given <= names and fits(**dict.fromkeys(given)):
            return call
    if not fits(None):
        raise TypeError(f"a callback takes (data), (data, topic) or (event), not {signature}")
    return lambda event: callback(event.data)


class Subscription:
    """What subscribe returns. Awaited, it is confirmed; made without a callback, iterate over it.

    Both raise Forbidden or InvalidParams if the server refuses, and ChannelClosed if the client is
    closed before. Leaving ``async for``, by break too, cancels the subscription.
    """

    def __init__(self, inbox: "_Inbox", topics: tuple[str, ...], pattern: bool,
                 callback: _Callback | None, since: str | None, confirmed: bool) -> None:
        self.topics, self.pattern = topics, pattern
        self._inbox, self._callback = inbox, callback
        self._call = None if callback is None else _caller(callback)
        self._queue = _Queue()
        self._waiters: list[asyncio.Future[None]] = []
        self._since, self._place = since, _offset(since)  # wished for; of its last event
        self._confirmed, self._ended = confirmed, False
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return f"<Subscription to {', '.join(self.topics)}: {self._callback!r}>"

    def __call__(self, event: Event) -> Any:
        """Call back; not once it has ended."""
        return None if self._call is None or self._ended else self._call(event)

    def _keys(self) -> set[_Key]:
        return {(topic, self.pattern) for topic in self.topics}

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
                else:
                    item = self._queue[0]
                    yield cast(Event, item.event)  # gaps wait with what is for callbacks
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
        if callback is None:
            self.iterators[subscription] = None
        self._changed(subscription._keys())
        return subscription

    def unsubscribe(self, topics: str | Iterable[str], pattern: bool) -> None:
        names = _check_topics(topics)
        for subscription in self.having((name, pattern) for name in names):
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
        if called:
            self._start()  # also of a full queue, in case that somebody has cancelled its task
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

    def having(self, keys: Iterable[_Key]) -> dict[Subscription, None]:
        """The subscriptions with any of these, each once."""
        return {s: None for key in keys for s in self.topics.having(*key)}

    def subscriptions(self) -> Iterator[Subscription]:
        tables = itertools.chain(self.topics.exact.values(), self.topics.patterns.values())
        return itertools.chain.from_iterable(tables)

    def queues(self) -> list[_Queue]:
        return [self.queue, *(subscription._queue for subscription in self.iterators)]

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        if self.task is None or self.task.done() or self.task.get_loop() is not loop:
            self.task = asyncio.Task(self._run())

    async def _run(self) -> None:
        _current.set(None)  # whoever published, its deadline is not that of callbacks
        if self._begun is not None:  # by a task that was cancelled
            self.queue.done(self._begun)
        while self.queue:
            item = self._begun = self.queue[0]
            if isinstance(item.event, Gap):
                await self._missed(item.event)
            await _run_hooks_logged(item.whom, item.event)
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
    subscribers are fed; ``max_message_size`` is that of one event, in bytes. With a ``backbone``,
    the URL of a broker or a Backbone, all that share its ``channel`` are one.
    """

    def __init__(self, *, history: int = HISTORY_EVENTS, history_bytes: int = HISTORY_BYTES,
                 max_message_size: int = MAX_MESSAGE_BYTES, codec: Codec | None = None,
                 on_slow: Literal["gap", "close"] = "gap", backbone: str | Backbone | None = None,
                 channel: str = CHANNEL) -> None:
        if isinstance(backbone, str):  # kept there: more than a burst between two reads
            backbone = _backbone_of(backbone, channel, max(history, HISTORY_EVENTS))
        self._shared = (
            None if backbone is None else _Shared(backbone, self._commit, self._lose))
        if min(history, history_bytes) < 0:
            raise ValueError(f"history is 0 or more, not {history} of {history_bytes} bytes")
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

        ``notifier_id`` is the id of a subscriber that does not get it. When it was awaited on the
        loop that is served, the event is in the log, that of the backbone if there is one; other
        threads do not wait. Raises ValueError for data that
        is not JSON, MessageTooLarge, InvalidParams for a topic, and Overloaded while 10,000 events
        of other threads, or for a backbone, wait; then nothing was published.
        """
        names, text = _check_topics(topics), self._encode(data)
        size = _size(text) + max((_size(_quoted(name)) for name in names), default=0)
        if size + EVENT_FRAME_BYTES > self._max_size:
            raise MessageTooLarge(f"an event of {size} bytes, the limit is {self._max_size}")
        try:
            here = self._loop in (None, asyncio.get_running_loop()) or self._loop.is_closed()
        except RuntimeError:  # a thread that runs no loop
            here = False
        waiting = len(self._incoming) + (len(self._shared._queue) if self._shared else 0)
        if (self._shared or not here) and waiting >= QUEUE_EVENTS:
            raise Overloaded(f"{waiting} events wait to be published")
        if self._shared:
            self._shared.check(size, notifier_id, len(names))
        if here:
            self._attach()
            return self._append(names, text, notifier_id)
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
            if self._shared is not None:
                self._shared.start()
        self._take_incoming()

    def _take_incoming(self) -> None:
        while self._incoming:
            self._append(*self._incoming.popleft())

    def _append(self, topics: tuple[str, ...], data: str, origin: str | None) -> Awaitable[None]:
        self._published += len(topics)
        if self._shared is not None:
            futures = self._shared.put(topics, data, origin)
            return _Receipt(futures[-1], f"publish to {topics}") if futures else _DONE
        for topic in topics:
            self._commit(None, topic, data, origin)
        return self

    def _commit(self, position: str | None, topic: str | None, data: str, origin: str | None,
                new: bool = True, hole: str = "") -> None:
        """Put an entry into the log, and give it to those who keep up if it is new."""
        entry = self._log.append(topic, data, origin, position, hole)
        if not new or (topic is None and not hole):
            return
        self._burst += entry.size + BURST_EVENT_BYTES
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._deliver)
        self._pending.append(entry)
        self._pending_size += entry.size
        if self._pending_size > FRAME_BYTES:
            self._deliver()
        if topic is None:
            self._inbox.miss(Gap(None, None, hole))
        elif self._inbox.topics.match(topic):
            self._inbox.put(Event(topic, self._decode(data), entry.position), entry.size)

    def _lose(self, position: str, reason: str, new: bool) -> None:
        self._commit(position, None, "", None, new, reason)

    async def close(self) -> None:
        """Leave the backbone, if there is one; what comes later joins it again, without a hole."""
        if self._shared is not None and self._loop is asyncio.get_running_loop():
            try:
                await self._shared.close()
            finally:
                self._deliver()
                self._loop = None

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
        if len(topics) != 1 or None in topics or (size > FRAME_BYTES and len(entries) > 1):
            for entry in entries:
                feeds = self._connected if entry.topic is None else self._feeds.match(entry.topic)
                for feed in list(feeds):
                    if entry.index >= feed.next and len(feed):
                        feed.offer(entry)
        else:
            self._broadcast(entries[0].topic or "", entries, size)
        if self._log.end >= self._mark_end or self._log.total >= self._mark_total:
            self._mark()

    def _broadcast(self, topic: str, entries: Sequence[_Entry], size: int) -> None:
        size += OLD_WIRE_EXTRA_BYTES * len(entries)
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
                texts = _joined([dialect.event(entry) for entry in entries], dialect)
                frames[dialect] = b"".join(map(_frame, texts))
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
            self._channel._go_live(None)
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
        return bool(entry.hole and len(self)) if topic is None else (
            self._from(topic, False) <= index or self._from(ALL_TOPICS, False) <= index
            or any(self._from(name, True) <= index and known[name].matches(topic)
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
        if entry.topic is None:
            self._tell_hole(entry.position, entry.hole)
        elif entry.size + OLD_WIRE_EXTRA_BYTES <= channel._peer_takes:
            self._notifier._delivered += 1
            channel._put(channel._speaks.event(entry), entry.size)
        elif channel._speaks is _OLD_WIRE:
            logger.warning("an event of %r is too large for %s", entry.topic, channel.id)
        else:
            self._tell_gap(entry.position, "size")

    def _tell_hole(self, position: str, reason: str) -> bool:
        """Something was not there for this connection: say so, or end it."""
        if self._notifier._on_slow == "gap" and self._channel._speaks is not _OLD_WIRE:
            self._tell_gap(position, reason)
            return True
        self._notifier._slow_closed += 1
        self.clear()
        self.lagging = False
        self._channel._spawn(self._channel.close(TOO_SLOW, "too slow"))
        return False

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
        if self.next < log.first:
            if not self._tell_hole(log.before, "history"):
                return
            self.next = log.first
        stop = min(log.end, self.next + FEED_EVENTS)
        while self.next < stop and channel._outbox_size <= LIVE_BYTES:
            entry = log[self.next]
            self.next += 1
            if self._wants(entry):
                self._send(entry)
        self.lagging = self.next < log.end and len(self) > 0
        if self.lagging and not channel._outbox:
            channel._side._stir(channel)


# ------------------------------------------------------------------------------------- endpoints
# An endpoint is what its connections share: methods, settings, notifier. It serves one event loop
# at a time. Hooks run outside of everything, so that they may call, publish and close.

_Authorize: TypeAlias = Callable[[RpcChannel, str, tuple[str, ...]], Any]


_Names: TypeAlias = list[str] | str
_Id: TypeAlias = Annotated[str, StringConstraints(max_length=MAX_TOPIC_CHARACTERS)]


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
        if isinstance(allowed_origins, str):
            raise TypeError(f"allowed_origins are several: [{allowed_origins!r}]")
        self._origins = None if allowed_origins is None else frozenset(allowed_origins)
        self._loop: asyncio.AbstractEventLoop | None = None

    def register_route(self, app_or_router: FastAPI | APIRouter, path: str, *,
                       dependencies: Sequence[Depends] | None = None,
                       browser_client: str | None = None) -> None:
        """Add a WebSocket route; the ``dependencies`` run before a connection is accepted.

        At the path ``browser_client``, pages find an ES module that connects to it.
        """
        if browser_client is not None:
            app_or_router.add_api_route(browser_client, _browser_client, include_in_schema=False)

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

    def stats(self) -> dict[str, Any]:
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
        backbone: a broker's URL, or a Backbone: all servers that name the same are one.
        channel: the name of the log on that broker; two deployments need two.
    """

    _own: ClassVar[Mapping[str, str]] = {"subscribe": "_subscribe", "unsubscribe": "_unsubscribe",
                                         "publish": "_publish", "ping": "_pong"}

    def __init__(self, methods: RpcMethodsBase | None = None, *,
                 authorize: _Authorize | None = None,
                 on_subscribe: _Hooks = (), on_unsubscribe: _Hooks = (),
                 history: int = HISTORY_EVENTS, history_bytes: int = HISTORY_BYTES,
                 on_slow: Literal["gap", "close"] = "gap", backbone: str | Backbone | None = None,
                 channel: str = CHANNEL, **options: Unpack[_EndpointOptions]) -> None:
        super().__init__(methods, **options)
        self.notifier = EventNotifier(
            history=history, history_bytes=history_bytes, max_message_size=self._max_size,
            codec=options.get("codec"), on_slow=on_slow, backbone=backbone, channel=channel)
        self.publish, self.subscribe = self.notifier.publish, self.notifier.subscribe
        self.unsubscribe = self.notifier.unsubscribe
        self._authorize = authorize
        self._on_subscribe, self._on_unsubscribe = _hooks(on_subscribe), _hooks(on_unsubscribe)

    def _attach(self) -> None:
        super()._attach()
        self.notifier._attach()

    def stats(self) -> dict[str, Any]:
        """Gauges and counters by name."""
        notifier = self.notifier
        feeds = [c._feed for c in self.channels.values() if c._feed is not None]
        return super().stats() | {
            "topics": len(notifier._feeds.exact) + len(notifier._feeds.patterns),
            "subscriptions": sum(map(len, feeds)),
            "lagging": sum(feed.lagging for feed in feeds),
            "log_events": len(notifier._log), "log_bytes": notifier._log.size,
            "events_published": notifier._published, "events_delivered": notifier._delivered,
            "gaps_told": notifier._gaps_told, "slow_closed": notifier._slow_closed,
            **({"backbone": notifier._shared.stats()} if notifier._shared else {})}

    async def close(self, code: int = 1012, reason: str = "") -> None:
        """Close all connections, staggered over two seconds at most, then leave the backbone."""
        leaving = set(self.channels)
        try:
            await super().close(code, reason)
        finally:
            if self.channels.keys() <= leaving:  # nobody came meanwhile, to be served
                await self.notifier.close()

    def register_route(self, app_or_router: FastAPI | APIRouter, path: str, *,
                       dependencies: Sequence[Depends] | None = None,
                       browser_client: str | None = None) -> None:
        """As `RpcEndpoint.register_route`.

        A backbone is joined when the app starts, and left when it ends, if its lifespan is run;
        else at first use, and by `close`.
        """
        super().register_route(app_or_router, path, dependencies=dependencies,
                               browser_client=browser_client)
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

        if self.notifier._shared is not None:
            router.lifespan_context = lifespan

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

    def _check_hooks(self, channel: RpcChannel) -> None:
        if len(channel._tasks) > self._max_requests:
            raise Overloaded("too many hooks of this connection are running")

    async def _subscribe(self, channel: RpcChannel, topics: _Names | None = None,
                         patterns: _Names | None = None, since: str | None = None,
                         subscriber_id: _Id | None = None, max_size: int | None = None) -> Any:
        names, globs = _check_topics(topics or ()), _check_topics(patterns or (), pattern=True)
        self._check_hooks(channel)
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
            if names or globs:  # else it is to be sent again what it was allowed before
                await self._check(channel, "subscribe", names + globs)
            if self.notifier._shared is not None:
                await self.notifier._shared.ready(since, self.notifier._log.find)
            if channel._closed is not None:  # and its feed cleared
                raise ChannelClosed
            # from here on there is no await until the answer is queued: no event falls between
            feed.subscriber_id = subscriber_id or feed.subscriber_id
            if max_size is not None:
                feed.takes = channel._peer_takes = min(channel._peer_takes, max_size)
            recovered = feed.subscribe(names, globs, since)
            request = _current.get()
            if request is not None and (request.batch is not None or not request.open):
                self._stir(channel)  # for what it has to send again: there is no answer yet
            if self._on_subscribe:
                channel._spawn(_run_hooks_logged(self._on_subscribe, channel, names + globs))
            position = since if recovered else self.notifier._log.position
            return channel._speaks is _OLD_WIRE or {"position": position, "recovered": recovered}

    async def _unsubscribe(self, channel: RpcChannel, topics: _Names | None = None,
                           patterns: _Names | None = None) -> bool:
        names, globs = _check_topics(topics or ()), _check_topics(patterns or ())
        self._check_hooks(channel)
        if channel._feed is not None:
            async with channel._feed.lock:
                channel._feed.remove(names, globs)
            if self._on_unsubscribe:
                channel._spawn(_run_hooks_logged(self._on_unsubscribe, channel, names + globs))
        return True

    async def _publish(self, channel: RpcChannel, topics: _Names, data: Any = None,
                       sync: bool = True, notifier_id: _Id | None = None) -> bool:
        if len(names := _check_topics(topics)) > MAX_TOPICS:
            raise InvalidParams(f"one publishes to at most {MAX_TOPICS} topics, not {len(names)}")
        await self._check(channel, "publish", names)
        own = channel.id if channel._feed is None else channel._feed.subscriber_id
        try:
            published = self.notifier.publish(topics, data, notifier_id=notifier_id or own)
        except ValueError as error:  # 1e999 was read as infinite
            raise InvalidParams("the data is not JSON: a number may be infinite") from error
        await published
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
    with contextlib.suppress(Exception):  # whatever those have in its place
        while getattr(send, "__module__", None) == "starlette._exception_handler":
            variables = dict(zip(send.__code__.co_freevars, send.__closure__, strict=True))
            send = variables["send"].cell_contents
        if type(send.__self__).__module__.startswith("uvicorn.protocols.websockets."):
            return _Uvicorn(send.__self__)
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
    ``open_timeout`` (10 s), ``ping_interval`` and ``ping_timeout`` (20 s each). Compression is off
    unless asked for.
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


class RpcClient(_Side, _Caller):
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

    async def _response(self, method: str, args: _Arguments, timeout: _Timeout) -> RpcResponse:
        channel, seconds = await self._ready_channel(timeout)
        return await channel._response(method, args, seconds)

    async def _ready_channel(self, timeout: _Timeout) -> tuple[RpcChannel, float | None]:
        if self.channel is not None and self.state == "ready":
            return self.channel, self._seconds(timeout)
        if self.state == "new":
            raise RuntimeError("the client is not started: use 'async with', or start()")
        seconds = self._seconds(timeout)
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(seconds):
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


class _PubSubOptions(_ClientOptions, total=False):
    on_gap: _Hooks
    since: str | None


def _is_passing(error: RpcError) -> bool:
    return isinstance(error, (ChannelClosed, RequestTimeout, Overloaded))


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
        self._resumed = True  # on this connection; else what comes is not looked at
        self._asking: dict[int, asyncio.Task[None]] = {}  # the questions that are not answered
        self._questions = 0
        self._later: set[_Key] = set()  # what to tell when there is less to be answered
        self._publishing = asyncio.Semaphore(REQUESTS_AT_ONCE)

    @property
    def position(self) -> str | None:
        """All up to there was handled: callbacks have returned, iterators have asked for the next.

        Keep it, and give it as ``since`` to the client of a later process. None while not known.
        """
        queues = self._inbox.queues()
        places = [(q[0].era, q[0].previous) for q in queues if q]
        places += [q.again for q in queues if q.behind]
        places.append((self._inbox.era, self._received))  # it may be the least, after a rewind
        era, position = min(places, key=_placed)
        wishes = (s._since for s in self._inbox.unconfirmed if s._since is not None)
        return position if era >= 0 and all(s == self._received for s in wishes) else None

    def subscribe(self, topics: str | Iterable[str], callback: _Callback | None = None, *,
                  pattern: bool = False, since: str | None = None) -> Subscription:
        """Subscribe, now and at each connection; await what it returns to have it confirmed.

        As `EventNotifier.subscribe`: the callback takes (data), (data, topic) or (event), and
        without one, iterate over what is returned. ``since`` is a position: what the server still
        has of the events after it comes first. Cancelling the wait leaves it subscribed. Raises
        Overloaded while 64 MiB wait to be sent.
        """
        if self.channel is not None and self.channel._outbox_size > OUTBOX_BYTES:
            raise Overloaded("too much waits to be sent to this peer")
        since = self._since if since is None else since
        subscription = self._inbox.subscribe(topics, callback, pattern, since)
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
        if type(topic) is str and self._resumed:
            position = fields.get("position")
            place = _offset(position) if type(position) is str else -1
            event = Event(topic, fields.get("data"), position if place >= 0 else None)
            if self._inbox.put(event, channel._share, self._received, place) and place >= 0:
                self._received = position
            self._top = max(self._top, place)

    def _on_position(self, channel: RpcChannel, params: Any) -> None:
        position = params.get("position") if type(params) is dict else None
        if type(position) is str and self._resumed and not self._inbox.full:
            self._received, self._top = position, max(self._top, _offset(position))

    def _on_gap_told(self, channel: RpcChannel, params: Any) -> None:
        fields = params if type(params) is dict else {}
        position, reason = fields.get("position"), fields.get("reason")
        takes = self._resumed and not self._inbox.full
        if takes and type(position) is str and type(reason) is str:
            self._lose(self._received, position, reason)
            if reason == "log":
                self._restart_at(position)

    def _lose(self, since: str | None, position: str | None, reason: str) -> None:
        self._inbox.miss(Gap(since, position, reason))
        self._received = position

    def _restart_at(self, position: str) -> None:
        """The places of before mean nothing in the log that is there now."""
        self._top, self._inbox.era = _offset(position), self._inbox.era + 1
        for subscription in self._inbox.subscriptions():
            if subscription._since is None and subscription._place >= 0:
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
            channel._spawn_vital(self._rewind(channel))

    async def _rewind(self, channel: RpcChannel) -> None:
        taken: list[str | None] = []
        while self._inbox.full and not taken:
            since = self._received
            args = {"since": since, "subscriber_id": self._id, "max_size": self._max_size}
            then = functools.partial(self._rewound, since, taken)
            try:
                await channel._outcome(
                    "subscribe", *channel._start("subscribe", args, _UNSET, then))
            except RpcError as error:  # of the end of the connection, this task does not hear
                logger.warning("subscribe: %s", error)
                if not _is_passing(error):
                    self._inbox.full = False
                    self._lose(since, None, "queue")
                    return
                await asyncio.sleep(random.uniform(0, ASK_AGAIN_SECONDS))

    def _rewound(self, since: str | None, taken: list[str | None], outcome: _Outcome) -> None:
        """Take events again; unless a subscription has wished for older ones meanwhile."""
        if isinstance(outcome, RpcResponse) and since == self._received:
            taken.append(since)
            self._inbox.full = False
            self._placed(self._known, self._known, set(), since, outcome)

    def _placed(self, keys: set[_Key], whole: set[_Key], left: set[_Key], since: str | None,
                outcome: _Outcome) -> None:
        """The answer to a subscribe, before anything that comes after it is looked at.

        It may have been one of several questions, which were asked instead of one for the whole:
        who has topics in several is served when none is left.
        """
        result = outcome.result if isinstance(outcome, RpcResponse) else False
        if result is False:
            return
        fresh = self._received is None or not self._known  # there is no place to go on from
        self._known |= {key for key in keys if self._inbox.topics.having(*key)}
        self._resumed = True
        left -= keys
        there = self._inbox.having(keys)
        if type(result) is not dict or type(position := result.get("position")) is not str:
            if any(s._since is not None for s in there):
                self._lose(None, None, "reconnect")
                for subscription in there:
                    subscription._since = None
            return
        lost = since is not None and result.get("recovered") is not True
        ours = fresh or since == self._received  # else it is the wish of some
        goes_on = since is None or (ours and not fresh)
        if lost:
            self._inbox.miss(Gap(since, position, "history"), self._inbox.era if ours else -1)
        if ours and (lost or fresh):
            self._received = position
            self._restart_at(position)
        elif not lost and since is not None and _offset(since) < _offset(self._received):
            self._received = position
            for queue in self._inbox.queues():
                queue.rewound(self._inbox.era, position)
        self._top = max(self._top, _offset(position))
        for subscription in there:
            mine = subscription._keys()
            wished = subscription._since == since and mine <= whole and not mine & left
            if (goes_on and subscription._place < 0) or (lost and wished):
                subscription._place = self._top
            if wished:
                subscription._since = None
        if since is not None and keys != whole and not left and not lost:
            self._inbox.miss(Gap(since, None, "size"), self._inbox.era if ours else -1)

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
        for subscription in self._inbox.subscriptions():
            subscription._settle(ended=True, error=self._why_closed())

    # Telling the server. What is wanted and what it was told are kept apart, and questions make the
    # one the other. They are numbered; the server answers them in any order. A subscription is
    # confirmed when all questions are answered that were asked before it was made, and its own.
    # On a new connection, what was subscribed to before is resumed first, and alone: only the
    # answer tells whether places still mean what they did. Until then nothing else is asked, and
    # what comes, because of a question that was given up as late, is not looked at.

    async def _greet(self, channel: RpcChannel) -> None:
        self._greeted, self._told, self._later, self._inbox.full = channel, {}, set(), False
        exact, patterns = self._inbox.topics.exact, self._inbox.topics.patterns
        keys = {(name, False) for name in exact} | {(name, True) for name in patterns}
        self._known &= keys
        lost = channel._speaks is _OLD_WIRE or self._received is None
        self._resumed = lost or not self._known
        if lost and self._known:
            self._lose(None, None, "reconnect")
        self._tell(keys)
        for subscription in self._inbox.unconfirmed:
            self._inbox.unconfirmed[subscription] = math.inf if self._later else self._questions
        if self._asking:
            await self._asked()
        else:
            await super()._greet(channel)
        self._confirm()

    async def _asked(self) -> None:
        while self._later and self._asking:
            await asyncio.wait(self._asking.values(), return_when=asyncio.FIRST_COMPLETED)
        for task in list(self._asking.values()):
            await asyncio.wait([task])

    def _tell(self, keys: set[_Key]) -> None:
        """Ask the server for those of the keys that it does not know of, and to end the others."""
        ended = {key for key in keys if not self._inbox.topics.having(*key)}
        self._known -= ended
        self._resumed = self._resumed or not self._known
        channel = self.channel
        if channel is None or self._greeted is not channel:
            return
        if not self._resumed:
            again = (keys & self._known) - self._told.keys()
            self._ask(channel, "subscribe", again, self._received)
        if not self._resumed or len(self._asking) >= REQUESTS_AT_ONCE:
            self._postpone(keys)
            return
        wanted = {key for key in keys if self._inbox.topics.having(*key)}
        if channel._speaks is _OLD_WIRE:
            if patterns := {key for key in wanted if key[1]}:
                self._refuse(patterns, InvalidParams("fastapi_websocket_pubsub has no patterns"))
            # those servers send an event once for each match, so ask for all topics or for some
            everything = ALL_TOPICS in self._inbox.topics.exact
            keys = self._told.keys() | {(name, False) for name in self._inbox.topics.exact}
            if wishing := [s for s in self._inbox.subscriptions() if s._since is not None]:
                self._lose(None, None, "reconnect")  # nor have they positions
                for subscription in wishing:
                    subscription._since = None
            wanted = {key for key in keys if everything == (key[0] == ALL_TOPICS)}
        gone = (keys - wanted) & self._told.keys()
        for since, asked in self._beginnings(wanted, channel._speaks).items():
            self._ask(channel, "subscribe", asked, since)
        self._ask(channel, "unsubscribe", gone)

    def _postpone(self, keys: set[_Key]) -> None:
        self._later |= keys
        for subscription in self._inbox.having(keys):
            if subscription in self._inbox.unconfirmed:
                self._inbox.unconfirmed[subscription] = math.inf

    def _beginnings(self, keys: set[_Key], dialect: _Dialect) -> dict[str | None, set[_Key]]:
        """What to ask for, by where it is to begin: now (this first), or after a position.

        A key may have several: places of different logs cannot be compared.
        """
        new: dict[str | None, set[_Key]] = {None: set()}
        for key in keys:
            there = self._inbox.topics.having(*key)
            if dialect is _OLD_WIRE:
                now = key not in self._told
            else:  # what was told may be a wish for older ones: that does not say where now is
                now = any(s._since is None and (s._place < 0 or key not in self._told)
                          for s in there)
            if now:
                new.setdefault(self._received if key in self._known else None, set()).add(key)
            for subscription in there:
                since = subscription._since
                if since is not None and dialect is not _OLD_WIRE:
                    new.setdefault(since, set()).update(subscription._keys())  # all of it at once
        return new

    def _ask(self, channel: RpcChannel, method: str, keys: set[_Key], since: str | None = None,
             whole: set[_Key] | None = None, left: set[_Key] | None = None) -> None:
        if method == "subscribe":  # a part may have been refused meanwhile
            keys = {key for key in keys if self._inbox.topics.having(*key)}
        if not keys:
            return
        if whole is None or left is None:
            whole, left = keys, set(keys)
        args: dict[str, Any] = {"topics": [name for name, pattern in keys if not pattern]}
        then = None
        if method == "subscribe":
            then = functools.partial(self._placed, keys, whole, left, since)
        if channel._speaks is not _OLD_WIRE:
            args["patterns"] = [name for name, pattern in keys if pattern]
            if then is not None:
                args |= {"since": since, "subscriber_id": self._id, "max_size": self._max_size}
        try:
            asked = channel._start(method, args, _UNSET, then)
        except MessageTooLarge as error:
            if len(keys) == 1:
                self._refuse(keys, error)
                return
            # what the second half is sent again may be late
            for subscription in self._inbox.having(() if self._resumed else keys):
                subscription._since = subscription._since or since
                self._inbox.unconfirmed[subscription] = math.inf
            half = set(itertools.islice(keys, len(keys) // 2))
            self._ask(channel, method, half, since, whole, left)
            self._ask(channel, method, keys - half, since, whole, left)
        except Overloaded as error:  # by what waits to be sent
            logger.warning("%s: %s: soon", method, error)
            self._postpone(keys)
            self._hold_on(channel, asyncio.sleep(ASK_AGAIN_SECONDS))
        else:
            number = self._questions + 1
            for key in keys:
                if method == "subscribe":
                    self._told[key] = number
                else:
                    del self._told[key]
            self._hold_on(channel, self._answered(channel, method, keys, number, *asked))

    def _hold_on(self, channel: RpcChannel, work: Coroutine[Any, Any, None]) -> None:
        self._questions += 1
        task = self._asking[self._questions] = channel._spawn_vital(work)
        task.add_done_callback(functools.partial(self._after, self._questions))

    async def _answered(self, channel: RpcChannel, method: str, keys: set[_Key], number: int,
                        id: int, future: "asyncio.Future[_Outcome]") -> None:
        try:
            response = await channel._outcome(method, id, future)
            if response.result is False:  # so do the servers of fastapi_websocket_pubsub refuse
                raise Forbidden(f"{method} is refused", {"topics": [name for name, _ in keys]})
        except RpcError as error:
            named = error.data.get("topics") if isinstance(error.data, dict) else None
            named = named if isinstance(named, list) else []
            refused = {key for key in keys if key[0] in named} or keys
            mine = {key for key in keys if self._told.get(key) == number}  # not asked for since
            for key in mine:
                del self._told[key]
            if _is_passing(error):
                logger.warning("%s: %s: again", method, error)
                await asyncio.sleep(random.uniform(0, ASK_AGAIN_SECONDS))
            else:
                self._refuse(mine & refused, error)
            forgotten = {key for key in keys if key not in self._told or any(
                s._since is not None or s._place < 0 for s in self._inbox.topics.having(*key))}
            if method == "unsubscribe" and _is_passing(error):  # what nobody wants is still sent
                self._told |= {k: 0 for k in forgotten if not self._inbox.topics.having(*k)}
            self._tell(forgotten)
            again = [self._asking[n] for key in keys if (n := self._told.get(key)) in self._asking]
            if again:  # and until these are answered, so is this one not
                await asyncio.wait(again)

    def _after(self, number: int, task: "asyncio.Task[None]") -> None:
        del self._asking[number]
        later, self._later = self._later, set()
        if later:
            self._tell(later)
            for subscription, question in self._inbox.unconfirmed.items():
                if question == math.inf and not self._later:
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
        if name.startswith("__"):  # what copy, pickle and inspect look for
            raise AttributeError(name)

        def method(*args: Any, **kwargs: Any) -> Any:
            return self.call(name, _by_position_or_name(name, args, kwargs))

        return method

    def call(self, method: str, args: _Arguments = None, *, timeout: _Timeout = _UNSET) -> Any:
        """Call a method of the server and return its result; as `RpcClient.call`."""
        return self._wait(self._client.call, method, args, timeout=timeout).result

    def stream(self, method: str, args: _Arguments = None, *,
               timeout: _Timeout = _UNSET) -> Iterator[Any]:
        """Iterate over a stream of the server; leaving the loop ends it there."""
        return self._iterate(aiter(self._client.call(method, args, timeout=timeout)))

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

    @property
    def position(self) -> str | None:
        """As `PubSubClient.position`: give it as ``since`` to a later `connect`."""
        try:
            position: str | None = self._wait(lambda: self._client.position)
        except (ChannelClosed, RuntimeError):  # it is over, or this is the loop's own thread
            position = self._client.position
        return position

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
            **options: Unpack[_PubSubOptions]) -> Iterator[Remote]:
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


# -------------------------------------------------------------------------------- browser client
# What a page imports. It speaks JSON-RPC with the additions, and holds no queue: callbacks are
# called as events arrive, so that its position is what it has received.


async def _browser_client(request: Request) -> Response:
    tag = f'"{hashlib.sha256(_BROWSER_CLIENT.encode()).hexdigest()[:16]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}  # which is: ask whether it has changed
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(_BROWSER_CLIENT, headers=headers, media_type="text/javascript")


_BROWSER_CLIENT: Final = r"""// The client of fastapi_ws_lite for browsers, Node 22+ and Deno.

/** What a call rejects with; thrown in an exposed function, it is what the server sees. */
export class RpcError extends Error {
  /** @param {number} code @param {string} message @param {any} [data] a JSON value */
  constructor(code, message, data) {
    super(message);
    Object.assign(this, { name: new.target.name, code, data });
  }
}
/** The connection is gone, `code` is that of its close; whether a call ran is not known. */
export class ClosedError extends RpcError {}
export const ALL_TOPICS = "__EventNotifier_ALL_TOPICS__";
const SILENCE = 25, ANSWER = 20, CHECK = 5; // seconds; of pings, as browsers send none
/**
 * @typedef {string | (() => string | Promise<string>)} Text a function is asked at each connection
 * @typedef {{since: string | null, position: string, reason: string}} Gap
 * @typedef {{topic: string, data: any, position: string}} Event
 * @typedef {{timeout?: number | null, signal?: AbortSignal}} More a timeout of null is none
 * @typedef {"connecting" | "ready" | "waiting" | "closed"} State
 * @typedef {{token?: Text, protocols?: string[], timeout?: number | null, firstDelay?: number,
 *   maxDelay?: number, onGap?: (gap: Gap) => any, onState?: (state: State, why?: Error) => any
 * }} Options times are in seconds; the token goes as the subprotocol "bearer.<base64url>"
 */
const base64url = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text)))
  .replace(/[+/=]/g, (c) => ({ "+": "-", "/": "_" })[c] ?? "");
const glob = (pattern) => new RegExp(`^${pattern.replace(/\[(!|(?!!))([^][^\]]*)\]|[^]/gu,
  (all, not, set) => (set ? `[${not && "^"}${set.replace(/[\\\]^[]/g, "\\$&")}]` // as in fnmatch
    : { "*": ".*", "?": "." }[all] ?? all.replace(/[\\^$.|+(){}[\]/]/, "\\$&")))}$`, "su");
const offset = (position) => parseInt(position ?? "-1"); // its place in its log
const valueOf = (text) => (typeof text === "function" ? text() : text);
const guarded = (callback, ...args) => // an error of a callback is no reason to stop
  new Promise((done) => done(callback?.(...args))).catch((error) => console.error(error));
const reachable = (url) => fetch(url.replace(/^ws/, "http"), { mode: "no-cors" })
  .then((answer) => answer.status < 500, () => false);

/** Connect, and stay connected. @param {Text} url @param {Options} options */
export function connect(url = "/ws", options = {}) {
  const { token, timeout: patience = 60, protocols = [], firstDelay = 0.1, maxDelay = 30 }
    = options;
  const me = crypto.getRandomValues(new Uint32Array(4)).join("-"); // own events do not come back
  const calls = new Map(), running = new Map(), subs = new Set();
  const exposed = new Map([["_ping_", () => "pong"], ["_get_channel_id_", () => me]]);
  let state = "connecting", why, socket = null, position = null, lastId = 0, heard = 0;
  let drop = (code, reason) => {}, wake = () => {};

  const become = (next, error) => guarded(options.onState, state = next, why = error);
  function post(message) {
    const text = JSON.stringify({ jsonrpc: "2.0", ...message });
    if (text.length > 2 ** 22 && new Blob([text]).size > 2 ** 24) // what uvicorn takes
      throw new RpcError(-32003, "Message too large");
    if (socket?.readyState === 1) socket.send(text);
  }
  function request(method, params, { timeout = patience, signal, now, stream, ...on } = {}) {
    const id = ++lastId, due = timeout === null ? Infinity : Date.now() + timeout * 1000;
    return new Promise((resolve, reject) => {
      const settle = (error, result) => {
        if (!calls.delete(id)) return;
        clearTimeout(call.timer);
        signal?.removeEventListener("abort", stop);
        if (!error) on.result?.(result); // now, as the next message may be an event
        error ? reject(error) : resolve(result);
      };
      const stop = () => {
        if (call.sent) post({ method: "$/cancelRequest", params: { id } });
        settle(signal?.aborted ? signal.reason : new RpcError(-32000, "Request timed out"));
      };
      const send = () => {
        const left = timeout === null ? undefined : Math.max(0, due - Date.now()) / 1000;
        call.sent = true;
        try { post({ method, params, timeout: left, stream, id }); } catch (e) { settle(e); }
      };
      const call = { settle, send, sent: false, timer: 0, items: on.items };
      calls.set(id, call);
      if (state === "closed" || signal?.aborted) return settle(signal?.reason ?? why);
      signal?.addEventListener("abort", stop);
      if (due < Date.now() + 2e9) call.timer = setTimeout(stop, due - Date.now()); // at most
      if (state === "ready" || now) send(); // else when there is a connection
    });
  }
  async function* stream(method, params, { timeout = null } = {}) {
    const got = [], leave = new AbortController();
    let id, taken = 0, ended, woken;
    const items = (from, some) => { id = from; got.push(...some); woken?.(); };
    const end = (error) => { ended = { error }; woken?.(); };
    request(method, params, { timeout, signal: leave.signal, stream: 16, items })
      .then(() => end(), end);
    try {
      while (got.length || !ended) {
        if (!got.length) { await new Promise((done) => { woken = done; }); continue; }
        if (++taken % 8 === 0 && !ended) post({ method: "$/credit", params: { id, n: 8 } });
        yield got.shift();
      }
      if (ended.error) throw ended.error;
    } finally { leave.abort(); } // cancels the request, unless it has ended
  }
  async function serve({ id, method, params = {} }) {
    const leave = new AbortController(); // by which the function learns that it is cancelled
    const stop = (error) => { fail(error); leave.abort(error); };
    const fail = ({ code, message, data }) => answer({ error: { code, message, data } });
    const answer = (outcome) => {
      if (running.get(id) !== stop) return; // another connection may have this id, too
      post({ ...outcome, id });
      running.delete(id);
    };
    if (id !== undefined) running.set(id, stop);
    try {
      if (!exposed.has(method)) throw new RpcError(-32601, "Method not found");
      const args = Array.isArray(params) ? params : [params, leave.signal];
      answer({ result: (await exposed.get(method)(...args)) ?? null });
    } catch (error) {
      if (!(error instanceof RpcError)) console.error(method, error);
      fail(error instanceof RpcError ? error : new RpcError(-32603, "Internal error"));
    }
  }
  const told = { // by the server, and not answered
    notify({ topic, data, position: at }) {
      position = at;
      for (const sub of [...subs])
        if (subs.has(sub) && sub.known && sub.matches(topic) && !(offset(at) <= sub.place)) {
          sub.place = offset(at);
          guarded(sub.callback, data, topic, { topic, data, position: at });
        }
    },
    gap(gap, whom = gap.reason === "log" ? subs : []) { // places in another log mean nothing
      guarded(options.onGap, { since: position, ...gap });
      if ([undefined, position].includes(gap.since)) position = gap.position; // else of some
      for (const sub of whom) sub.place = offset(gap.position);
    },
    position(moved) { position = moved.position; },
    "$/stream": ({ id, items }) => calls.get(id)?.items?.(id, items),
    "$/cancelRequest": ({ id }) => running.get(id)?.(new RpcError(-32800, "Request cancelled")),
  };
  function receive(message) {
    const { id, method, params, error, result } = message;
    if (method === undefined)
      calls.get(id)?.settle(error && new RpcError(error.code, error.message, error.data), result);
    else if (Object.hasOwn(told, method)) told[method](params);
    else serve(message);
  }

  const named = (all, pattern) =>
    [...new Set([...all].filter((sub) => sub.pattern === pattern).flatMap((sub) => sub.topics))];
  function ask() { // for what this connection was not asked for; from where it was, if it was known
    const mine = socket, news = [...subs].filter((sub) => sub.asked !== mine);
    if (mine?.readyState !== 1) return;
    const from = (sub) => (sub.known ? position : sub.since);
    for (const since of new Set(news.map(from))) {
      const whom = news.filter((sub) => from(sub) === since);
      const params = { topics: named(whom, false), patterns: named(whom, true), since };
      const result = ({ position: at, recovered }) => {
        if (recovered === false) told.gap({ since, position: at, reason: "history" }, whom);
        else if (since !== undefined && offset(since) < offset(position)) position = since;
        position ??= at; // a later answer is ahead, perhaps, of what has been received
        for (const sub of whom) {
          if (!sub.known) sub.place = offset(at); // nothing older is for it
          sub.confirm(sub.known = true);
        }
      };
      for (const sub of whom) sub.asked = mine;
      request("subscribe", { ...params, subscriber_id: me }, { now: true, result }).catch((e) => {
        if (mine !== socket) return;
        if (e.code === -32000 || e.code === -32002) return drop(1006, e.message); // better later
        const refused = whom.filter((sub) => sub.topics.some((t) => e.data?.topics?.includes(t)));
        for (const sub of refused.length ? refused : whom) end(sub, e);
        console.warn("subscribe:", e.message, e.data);
        for (const sub of whom) sub.asked = null;
        ask();
      });
    }
  }
  function end(sub, error) {
    if (!subs.delete(sub)) return;
    sub.refuse(error);
    const others = named(subs, sub.pattern), left = sub.topics.filter((t) => !others.includes(t));
    const params = { [sub.pattern ? "patterns" : "topics"]: left };
    if (socket && sub.asked === socket)
      request("unsubscribe", params, { now: true }).catch(() => {});
  }

  async function connection() { // one of them, and how it has ended
    const secret = await valueOf(token), bearer = secret ? [`bearer.${base64url(secret)}`] : [];
    const { href } = new URL(await valueOf(url), globalThis.location?.href);
    if (state === "closed") return {};
    const offered = ["ws-lite.1", ...protocols, ...bearer];
    const mine = socket = new WebSocket(href.replace(/^http/, "ws"), offered);
    return new Promise((resolve) => {
      let opened = false, readyAt = Infinity, timer;
      const ping = () => request("_ping_", {}, { now: true, timeout: ANSWER }).catch((error) => {
        if (error.code === -32000) drop(1006, "no answer");
      });
      drop = (code, reason) => {
        const error = new ClosedError(code, `the connection is closed: ${code} ${reason}`.trim());
        socket = mine.onopen = mine.onmessage = mine.onclose = mine.onerror = null;
        drop = () => {};
        mine.close();
        clearInterval(timer);
        for (const stop of [...running.values()]) stop(error);
        for (const call of [...calls.values()]) if (call.sent) call.settle(error);
        resolve({ code, error, opened, href, seconds: (Date.now() - readyAt) / 1000 });
      };
      mine.onclose = ({ code, reason }) => drop(code, reason);
      mine.onerror = () => opened || drop(1006, ""); // after which Node 20 tells no close
      mine.onmessage = ({ data }) => {
        heard = Date.now();
        for (const message of [JSON.parse(data)].flat()) receive(message);
      };
      mine.onopen = async () => {
        [opened, heard] = [true, Date.now()];
        timer = setInterval(() => {
          if (Date.now() - heard > SILENCE * 1000) ping(heard = Date.now());
        }, CHECK * 1000);
        ask();
        await ping(); // a server that accepts only to close was never ready
        if (socket !== mine) return;
        readyAt = Date.now();
        become("ready");
        for (const call of calls.values()) if (!call.sent) call.send();
      };
    });
  }
  async function run() {
    for (let failures = 0, refusals = 0, wasReady = false; state !== "closed"; failures++) {
      become("connecting");
      const how = await connection().catch((error) => ({ error })); // no token now, perhaps
      if (how.seconds >= 1) failures = 0;
      if (how.seconds >= 0) wasReady = true;
      const early = !wasReady && state !== "closed" && how.opened === false; // why, is not told
      const refused = how.code === 1008 || (early && await reachable(how.href));
      if (state === "closed") return;
      refusals = refused && !wasReady ? refusals + 1 : 0;
      if (refusals === 2) return finish(how.error); // the second one with a fresh token
      const restarts = failures === 0 && (how.code === 1001 || how.code === 1012);
      const most = restarts ? 2 : Math.min(maxDelay, firstDelay * 2 ** failures);
      become("waiting", how.error);
      await new Promise((done) => {
        const timer = setTimeout(done, Math.random() * most * 1000);
        wake = () => { clearTimeout(timer); done(); };
      });
    }
  }
  function finish(error) {
    if (state === "closed") return;
    become("closed", error);
    drop(1000, "");
    for (const sub of [...subs]) end(sub, error);
    for (const call of [...calls.values()]) call.settle(error);
    wake();
  }

  queueMicrotask(run);
  return {
    /** @returns {State} */
    get state() { return state; },
    /** Call a method; params by name, or an array. @param {string} method @param {object} [params]
     * @param {More} [more] @returns {Promise<any>} */
    call: (method, params, more) => request(method, params, more),
    /** Iterate over what a method yields; leaving the loop cancels it. */
    stream,
    /** Call, and wait for no answer. @param {string} method @param {object} [params] */
    notify(method, params) {
      if (state !== "ready") throw new ClosedError(1006, "there is no connection now");
      post({ method, params });
    },
    /** Let the server call these. @param {Record<string, (...args: any[]) => any>} methods */
    expose(methods) {
      for (const [name, method] of Object.entries(methods)) exposed.set(name, method.bind(methods));
    },
    /** Subscribe, now and at each connection. @param {string | string[]} topics
     * @param {(data: any, topic: string, event: Event) => any} callback
     * @param {{pattern?: boolean, since?: string}} [how] as in fnmatch; from a stored position */
    subscribe(topics, callback, { pattern = false, since } = {}) {
      const list = [topics].flat(), globs = pattern ? list.map(glob) : [];
      const sub = { topics: list, pattern, since, callback, known: false, place: -1 };
      sub.matches = pattern ? (topic) => globs.some((glob) => glob.test(topic))
        : (topic) => list.includes(topic) || list.includes(ALL_TOPICS);
      const confirmed = new Promise((...both) => { [sub.confirm, sub.refuse] = both; });
      confirmed.catch(() => {}); // it need not be looked at
      subs.add(sub);
      queueMicrotask(() => (state === "closed" ? end(sub, why) : ask()));
      const cancel = () => end(sub, new ClosedError(1000, "cancelled"));
      return { topics: list, confirmed, cancel };
    },
    /** Publish. @param {string | string[]} topics @param {any} data
     * @param {{includeSelf?: boolean}} [how] whether one's own subscriptions hear it */
    publish(topics, data, { includeSelf = false } = {}) {
      const notifier_id = includeSelf ? `${me}!` : me;
      return request("publish", { topics: [topics].flat(), data, notifier_id });
    },
    /** End the connection, for good. */
    close: () => finish(new ClosedError(1000, "the client is closed")),
  };
}
"""


# ----------------------------------------------------------------------------------- command line
# A command is a function; its docstring is its help. What goes wrong in it becomes one line and an
# exit code in `_main`.

_EXIT_CODES: Final = """\
exit codes:
  0    done; also when what the output is piped into has ended
  2    wrong usage
  3    cannot connect, refused, or the connection was lost; serve: cannot listen
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

    Values are JSON, or else strings. One JSON object or array may stand for all arguments. With
    --stream, it is a line of JSON for each item.

    example: fastapi-ws-lite call ws://localhost:8000/ws add a=1 b=2
    """
    words, params = args.arguments, {}
    if len(words) == 1 and type(lone := _value(words[0])) in (dict, list):
        words, params = [], lone
    for name, sign, text in (word.partition("=") for word in words):
        if not sign:
            raise ValueError(f"an argument is name=value, not {name!r}")
        params[name] = _value(text)
    call = remote.stream if args.stream else lambda *asked: [remote.call(*asked)]
    for result in call(args.method, params or None):
        print(_encode(result), flush=True)


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
    """Print events, a line of JSON each. Where some are missing, a line on stderr says so.

    With --since, the position of an earlier event, those after it come first.

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
    cls = getattr(importlib.import_module(file.removesuffix(".py")), name) if name else None
    if not (isinstance(cls, type) and issubclass(cls, RpcMethodsBase)):
        raise TypeError(f"serve takes FILE.py:CLASS, a class of RpcMethodsBase, not {args.target}")
    methods, app = cls(), FastAPI()
    PubSubEndpoint(methods).register_route(app, args.path)
    config = uvicorn.Config(app, host=args.host, port=args.port, log_config=None)
    listener = config.bind_socket()
    print(f"serving {name} at ws://{args.host}:{listener.getsockname()[1]}{args.path}",
          file=sys.stderr, flush=True)
    uvicorn.Server(config).run([listener])


def _header(text: str) -> tuple[str, str]:
    name, sign, value = text.partition(":")
    if not sign:
        import argparse

        raise argparse.ArgumentTypeError(f"a header is 'Name: value', not {text!r}")
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
                         "arguments": {"nargs": "*", "metavar": "name=value"},
                         "--stream": {"action": "store_true", "help": "iterate over a stream"}}),
    "methods": (_cli_methods, _CONNECTED),
    "subscribe": (_cli_subscribe, {**_CONNECTED, "topics": {"nargs": "+", "metavar": "topic"},
                                   "--pattern": {"action": "store_true",
                                                 "help": "topics are globs, as in fnmatch"},
                                   "--since": {"metavar": "POSITION",
                                               "help": "begin after this event"}}),
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
                   default_response_timeout=args.timeout, since=getattr(args, "since", None),
                   on_gap=lambda gap: _told(0, "missed events:", gap))


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

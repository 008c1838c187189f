# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi", "uvicorn[standard]"]
# ///
"""What fastapi_ws_lite does, one scenario a function.

    python examples.py              lists the scenarios
    python examples.py NAME...      runs those; "all" runs the quick ones

Each fails if what it shows does not happen. ``bench --quick`` takes a few seconds, and
``dashboard`` serves a page until Ctrl-C. Without ``transport`` a client connects to a real server.
"""

import asyncio
import contextlib
import importlib.util
import inspect
import logging
import os
import random
import socket
import sqlite3
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from datetime import date
from typing import Annotated, Any, cast
from urllib.parse import urlsplit

import uvicorn
from fastapi import Cookie, Depends, FastAPI, Header, Response, WebSocket, WebSocketException
from fastapi.responses import HTMLResponse, PlainTextResponse
from pydantic import BaseModel, Field

from fastapi_ws_lite import (
    ALL_TOPICS, ASGITransport, Fleet, Forbidden, InvalidParams, MessageTooLarge, MethodNotFound,
    Overloaded, PubSubClient, PubSubEndpoint, Refused, RequestTimeout, RpcChannel, RpcClient,
    RpcEndpoint, RpcError, RpcMethodsBase, RpcRequest, connect, register_browser_client,
)


@contextlib.asynccontextmanager
async def serving(app: Any, port: int = 0, **options: Any) -> AsyncIterator[int]:
    """Serve an app on a port, or on one that the system picks."""
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", **options))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await task


def here(endpoint: RpcEndpoint) -> ASGITransport:
    """Serve an endpoint in this process."""
    app = FastAPI()
    endpoint.register_route(app, "/ws")
    return ASGITransport(app)


class Agent(RpcMethodsBase):
    async def version(self) -> str:
        return "1.0"


async def demo() -> None:
    """A server and two clients, over the network: calls both ways, and events."""
    app = FastAPI()
    endpoint = PubSubEndpoint()
    endpoint.register_route(app, "/ws")

    @endpoint.method
    async def introduce(name: str, channel: RpcChannel) -> str:
        version = (await channel.other.version()).result  # calls its caller before it answers
        return f"welcome {name}, running {version}"

    @app.post("/news/{text}")
    def news(text: str) -> None:
        endpoint.publish("news", text)  # an ordinary route may publish, without await

    async with (serving(app) as port, PubSubClient(f"ws://127.0.0.1:{port}/ws", Agent()) as ann,
                PubSubClient(f"ws://127.0.0.1:{port}/ws", Agent()) as bob):
        print("ann:", said := (await ann.other.introduce(name="ann")).result)
        assert said == "welcome ann, running 1.0"
        events = await ann.subscribe(["hello", "news"])
        await bob.publish("hello", {"from": "bob"})
        await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{port}/news/1", b"")
        print("ann:", *(heard := [await events.next(timeout=5) for _ in range(2)]))
        assert [event.data for event in heard] == [{"from": "bob"}, "1"]


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


async def fleet_server() -> None:
    """A server's process: it calls any agent of the fleet, wherever that is connected."""
    app, backbone = FastAPI(), "redis://localhost" if listens(6379) else None
    endpoint = PubSubEndpoint(backbone=backbone, channel="fastapi_ws_lite_examples")
    fleet = Fleet(endpoint)

    @app.websocket("/{name}")
    async def ws(websocket: WebSocket, name: str) -> None:
        await endpoint.main_loop(websocket, identity=name)

    endpoint.method(fleet.online)
    endpoint.method(fleet.call)

    @endpoint.method
    async def gather() -> dict[str, str]:
        answers = await fleet.call_all("version", timeout=5)
        return {name: str(getattr(a, "result", a)) for name, a in answers.items()}

    async with serving(app) as port:
        print(port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def fleet() -> None:
    """Two servers on Redis (one, without it) and three agents; one server is killed."""
    servers = [subprocess.Popen([sys.executable, __file__, "--fleet-server"], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
               for _ in range(1 + listens(6379))]
    urls = [f"ws://127.0.0.1:{cast(Any, s.stdout).readline().strip()}" for s in servers]
    async with contextlib.AsyncExitStack() as clients:
        for url, name in ((urls[0], "ann"), (urls[0], "bob"), (urls[-1], "cid")):
            await clients.enter_async_context(PubSubClient(f"{url}/{name}", Agent()))
        admin = await clients.enter_async_context(RpcClient(f"{urls[-1]}/admin"))
        while len(names := (await admin.other.online()).result) < 4:
            await asyncio.sleep(0.05)
        said = (await admin.other.call("ann", "version")).result
        print(f"online: {names}\nann, through the other server: {said['result']}", flush=True)
        print("everybody:", (await admin.other.gather()).result, flush=True)
        servers[0].kill()
        while len(servers) > 1 and len(names := (await admin.other.online()).result) > 2:
            await asyncio.sleep(0.2)
        print("one server was killed; online:", names, flush=True)
    for server in servers:  # whose input has ended
        server.communicate()


class Calculator(RpcMethodsBase):
    async def add(self, a: int, b: int) -> int:
        return a + b

    def factor(self, n: int) -> list[int]:  # a plain def runs in a worker thread
        return [k for k in range(1, n + 1) if n % k == 0]

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def both_ways() -> None:
    """The server calls methods of its client."""
    class Screen(RpcMethodsBase):
        async def ask(self, question: str) -> str:
            return "yes" if question == "sure?" else "what?"
    endpoint = RpcEndpoint()

    @endpoint.method
    async def delete(name: str, channel: RpcChannel) -> str:  # which connection is calling
        answer = await channel.other(timeout=5).ask(question="sure?")
        return f"{name} is deleted" if answer.result == "yes" else f"{name} stays"
    async with RpcClient("ws://test/ws", Screen(), transport=here(endpoint)) as client:
        assert (await client.other.delete(name="a file")).result == "a file is deleted"
        for channel in endpoint.channels.values():  # from anywhere on the server
            assert (await channel.other.ask(question="eh?")).result == "what?"


async def errors() -> None:
    """What a method raises, and what its caller sees."""
    endpoint = RpcEndpoint(Calculator())

    @endpoint.method
    async def pay(amount: int) -> None:
        raise RpcError(1001, "the account is empty", data={"balance": 0})
    async with RpcClient("ws://test/ws", transport=here(endpoint)) as client:
        try:
            await client.other.pay(amount=1)
        except RpcError as error:
            assert (error.code, error.data) == (1001, {"balance": 0})
        with contextlib.suppress(MethodNotFound):
            await client.other.subtract(a=1, b=2)
        try:
            await client.other(timeout=0.05).sleep(seconds=60)  # and the server stops sleeping
        except RequestTimeout as error:
            assert isinstance(error, TimeoutError)
        assert (await client.other.add(a=1, b=2)).result == 3  # the connection has not noticed


class Order(BaseModel):
    item: str
    amount: int = Field(gt=0)
    due: date


class Shop(RpcMethodsBase):
    async def next_due(self, orders: list[Order]) -> Order:
        return min(orders, key=lambda order: order.due)


async def typed() -> None:
    """Arguments are validated by their type hints; a proxy has the types of a class."""
    orders = [Order(item="tea", amount=2, due=date(2030, 1, 2)),
              Order(item="jam", amount=1, due=date(2030, 1, 1))]
    async with RpcClient("ws://test/ws", transport=here(RpcEndpoint(Shop()))) as client:
        assert (await client.other.next_due(orders=orders)).result["due"] == "2030-01-01"
        shop = client.proxy(Shop, timeout=5)              # or of a Protocol
        assert await shop.next_due(orders) == orders[1]   # an Order, and not its JSON
        try:
            await client.other.next_due(orders=[{"item": "tea", "amount": 0, "due": "soon"}])
        except InvalidParams as error:
            assert [problem["loc"] for problem in error.data] == [
                ["orders", 0, "amount"], ["orders", 0, "due"]]


class Machine(RpcMethodsBase):
    async def work(self, steps: int) -> AsyncIterator[int]:
        for step in range(steps):
            yield 100 * (step + 1) // steps

    async def upload(self) -> int:  # iterates over a stream that its caller exposes
        return sum([percent async for percent in self.channel.proxy(Machine).work(10)])


async def streams() -> None:
    """An async generator is iterated over by the other side, as fast as that takes its items."""
    transport = here(RpcEndpoint(Machine()))
    async with RpcClient("ws://test/ws", Machine(), transport=transport) as client:
        assert [n async for n in client.stream("work", {"steps": 4})] == [25, 50, 75, 100]
        async for _ in client.proxy(Machine).work(1_000_000):
            break                                         # which stops the work
        assert await client.proxy(Machine).upload() == 550


async def events() -> None:
    """Publish on the server, receive in clients; and the other way round."""
    endpoint, heard = PubSubEndpoint(), list[Any]()
    transport = here(endpoint)

    async def on_news(data: Any, topic: str) -> None:
        heard.append((topic, data))
    async with (PubSubClient("ws://test/ws", transport=transport) as ann,
                PubSubClient("ws://test/ws", transport=transport) as bob):
        await ann.subscribe("news", on_news)              # awaited: the server has confirmed it
        await ann.subscribe("orders.*", on_news, pattern=True)
        subscription = await bob.subscribe(ALL_TOPICS)    # no callback: iterate over it
        endpoint.publish(["news", "orders.7"], data={"n": 1})
        await ann.publish(["news"], data="from ann")      # which ann does not hear herself
        async for event in subscription:
            if (event.topic, event.data) == ("news", "from ann"):
                break                                     # which unsubscribes
        assert heard == [("news", {"n": 1}), ("orders.7", {"n": 1})]


async def authorisation() -> None:
    """Who may connect is FastAPI's business; who may subscribe and publish is asked each time."""
    async def user(token: Annotated[str, Header()]) -> str:
        if not token.startswith("secret-of-"):
            raise WebSocketException(1008, "who are you?")
        return token.removeprefix("secret-of-")

    def may(channel: RpcChannel, action: str, names: tuple[str, ...]) -> bool:
        return all(name.startswith(f"{channel.identity}/") for name in names)
    app, endpoint = FastAPI(), PubSubEndpoint(authorize=may)

    @app.websocket("/ws")
    async def ws(websocket: WebSocket, user: Annotated[str, Depends(user)]) -> None:
        await endpoint.main_loop(websocket, identity=user)
    refused = 0
    for token, topic in (("secret-of-ann", "ann/inbox"), ("secret-of-ann", "bob/inbox"), ("?", "")):
        try:
            async with PubSubClient("ws://test/ws", headers={"token": token},
                                    transport=ASGITransport(app)) as client:
                await client.subscribe(topic, print)
        except (Forbidden, Refused):                      # the topic, the connection
            refused += 1
    assert refused == 2


async def reconnecting() -> None:
    """A client comes back by itself, and subscribes again."""
    endpoint, heard, connected = PubSubEndpoint(), list[Any](), list[RpcChannel]()
    client = PubSubClient("ws://test/ws", transport=here(endpoint), on_connect=connected.append)
    client.subscribe("news", heard.append)                # before there is a connection
    async with client:
        endpoint.publish("news", 1)
        await endpoint.close()                            # 1012: the server restarts
        while len(connected) < 2:
            await asyncio.sleep(0.01)
        endpoint.publish("news", 2)
        while heard != [1, 2]:
            await asyncio.sleep(0.001)


async def last_messages() -> None:
    """The last messages come first when one joins, and are not repeated at a reconnect."""
    endpoint = PubSubEndpoint()
    async with PubSubClient("ws://test/ws", transport=here(endpoint)) as client:
        for number in range(5):
            await endpoint.publish("room/1", number)
        messages = client.subscribe("room/1", last=3)
        assert [(await messages.next(timeout=5)).data for _ in range(3)] == [2, 3, 4]


async def snapshot_plus_changes() -> None:
    """A method returns the state and its position; the client subscribes to what came after."""
    endpoint, prices = PubSubEndpoint(), {"tea": 3}

    def change(item: str, price: int) -> None:            # no await between the two
        prices[item] = price
        endpoint.publish("prices", {"item": item, "price": price})

    @endpoint.method
    async def snapshot() -> dict[str, Any]:
        return {"prices": dict(prices), "position": endpoint.position}
    async with PubSubClient("ws://test/ws", transport=here(endpoint)) as client:
        state = (await client.other.snapshot()).result
        change("jam", 5)                                  # neither lost nor doubled
        changes = client.subscribe("prices", since=state["position"])
        assert (await changes.next(timeout=5)).data == {"item": "jam", "price": 5}


# -------------------------------------------------------------------------------------- recipes

async def login_with_a_cookie() -> None:
    """A page logs in over HTTP; its cookie says who it is on the WebSocket."""
    app, endpoint, sessions = FastAPI(), PubSubEndpoint(), {"secret": "ann"}

    @app.post("/login")
    async def login(name: str, response: Response) -> None:
        sessions[secret := os.urandom(16).hex()] = name
        response.set_cookie("session", secret, httponly=True, samesite="strict")

    async def user(session: Annotated[str, Cookie()] = "") -> str:
        if session not in sessions:
            raise WebSocketException(1008, "log in first")
        return sessions[session]

    @app.websocket("/ws")                                 # in the page: connect("/ws")
    async def ws(websocket: WebSocket, user: Annotated[str, Depends(user)]) -> None:
        await endpoint.main_loop(websocket, identity=user)

    @endpoint.method
    async def whoami(name: Annotated[str, Depends(user)]) -> str:
        return name                                       # Depends works in methods, too
    async with PubSubClient("ws://test/ws", headers={"cookie": "session=secret"},
                            transport=ASGITransport(app)) as client:
        assert (await client.other.whoami()).result == "ann"


async def a_token_that_expires() -> None:
    """The server closes with 4401; the client is back with a fresh token, and nothing is lost."""
    app, endpoint, tokens = FastAPI(), PubSubEndpoint(), iter(range(100))

    @app.websocket("/ws")
    async def ws(websocket: WebSocket, token: Annotated[int, Header()]) -> None:
        await endpoint.main_loop(websocket, token=token)
    async with PubSubClient("ws://test/ws", headers=lambda: {"token": str(next(tokens))},
                            transport=ASGITransport(app)) as client:
        news = await client.subscribe("news")
        (channel,) = endpoint.channels.values()
        await channel.close(4401, "the token has expired")
        await endpoint.publish("news", "while it was away")
        assert (await news.next(timeout=10)).data == "while it was away"
        assert [c.context["token"] for c in endpoint.channels.values()] == [1]


async def kicking_a_user() -> None:
    """1008 is for good: the client does not come back."""
    endpoint = PubSubEndpoint()
    async with PubSubClient("ws://test/ws", transport=here(endpoint)) as client:
        for channel in list(endpoint.channels.values()):
            await channel.close(1008, "you are banned")
        try:
            await client.wait_until_done()
        except Refused as error:
            assert (error.code, error.reason) == (1008, "you are banned")


async def rate_limit() -> None:
    """Middleware sees every call, and may refuse it."""
    async def limit(request: RpcRequest, call_next: Callable[[RpcRequest], Awaitable[Any]]) -> Any:
        budget = request.channel.context.setdefault("budget", [5.0, time.monotonic()])
        now = time.monotonic()
        budget[:] = min(5.0, budget[0] + 2 * (now - budget[1])), now     # two calls a second
        if budget[0] < 1:
            raise Overloaded("two calls a second are enough")
        budget[0] -= 1
        return await call_next(request)
    endpoint = RpcEndpoint(Calculator(), middleware=[limit])
    async with RpcClient("ws://test/ws", transport=here(endpoint)) as client:
        calls = [client.other.add(a=1, b=2) for _ in range(10)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(answer, Overloaded) for answer in answers) >= 5


async def tracing() -> None:
    """OpenTelemetry: a span for each call, in the trace of the caller on the other side."""
    from opentelemetry import propagate, trace

    async def span(request: RpcRequest, call_next: Callable[[RpcRequest], Awaitable[Any]]) -> Any:
        tracer, context = trace.get_tracer("rpc"), propagate.extract(request.meta)
        with tracer.start_as_current_span(request.method, context=context) as span:
            traces.append(span.get_span_context().trace_id)
            return await call_next(request)
    endpoint, traces = RpcEndpoint(Calculator(), middleware=[span]), list[int]()
    parent = trace.SpanContext(7, 8, is_remote=False, trace_flags=trace.TraceFlags(1))
    async with RpcClient("ws://test/ws", transport=here(endpoint)) as client:
        with trace.use_span(trace.NonRecordingSpan(parent)):
            propagate.inject(meta := dict[str, str]())
            await client.call("add", {"a": 1, "b": 2}, meta=meta)
    assert 7 in traces


async def a_database_session_per_call() -> None:
    """A dependency with yield, as in a route: a commit that fails is the caller's error."""
    database = sqlite3.connect(":memory:", check_same_thread=False)
    database.execute("CREATE TABLE orders (item TEXT UNIQUE DEFERRABLE)")

    def session() -> Iterator[sqlite3.Connection]:
        with database:                                    # commits, or rolls back
            yield database

    endpoint = RpcEndpoint()

    @endpoint.method
    async def save(item: str, db: Annotated[sqlite3.Connection, Depends(session)]) -> int:
        return db.execute("INSERT INTO orders VALUES (?)", [item]).lastrowid or 0
    async with RpcClient("ws://test/ws", transport=here(endpoint)) as client:
        assert (await client.other.save(item="tea")).result == 1
        try:
            await client.other.save(item="tea")
        except RpcError as error:
            assert "error_id" in error.data               # which stands in the server's log
    database.close()


async def prometheus() -> None:
    """The gauges and counters of an endpoint in Prometheus' text format."""
    app, endpoint = FastAPI(), PubSubEndpoint()

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> str:
        return "".join(f"ws_{name} {value}\n" for name, value in endpoint.stats().items()
                       if isinstance(value, int))
    await endpoint.publish("news", 1)
    assert "ws_events_published 1\n" in metrics()


async def server_sent_events() -> None:
    """For those who cannot use WebSockets; Last-Event-ID is the position."""
    from fastapi.sse import EventSourceResponse, ServerSentEvent

    app, endpoint = FastAPI(), PubSubEndpoint()
    endpoint.register_route(app, "/ws")

    @app.get("/news", response_class=EventSourceResponse)
    async def news(last_event_id: Annotated[str | None, Header()] = None,
                   ) -> AsyncIterator[ServerSentEvent]:
        async with PubSubClient("ws://inside/ws", transport=ASGITransport(app)) as client:
            async for event in client.subscribe("news", since=last_event_id):
                yield ServerSentEvent(data=event.data, id=event.position)
    async with serving(app) as port:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/news",
                                         headers={"Last-Event-ID": endpoint.position})
        await endpoint.publish("news", "hello")
        with await asyncio.to_thread(urllib.request.urlopen, request, timeout=10) as answer:
            lines = [await asyncio.to_thread(answer.readline) for _ in range(2)]
        assert b'data: "hello"\n' in lines, lines


class NatsLog:
    """A backbone of one's own: a NATS JetStream stream. PubSubEndpoint(backbone=NatsLog(...))."""

    max_size = 2**20 - 2**10                              # NATS' max_payload, less the subject

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name, self.place = url, name, -1
        self.nats, self.client = importlib.import_module("nats"), cast(Any, None)

    async def stream(self) -> Any:
        if self.client is None or not self.client.is_connected:
            await self.close()
            self.client = await self.nats.connect(
                self.url, allow_reconnect=False, connect_timeout=5)
            try:
                await self.client.jetstream().stream_info(self.name)
            except self.nats.js.errors.NotFoundError:
                await self.client.jetstream().add_stream(
                    name=self.name, subjects=[self.name], max_msgs=4096)
        return self.client.jetstream()

    async def ends(self) -> tuple[int, int]:
        state = (await (await self.stream()).stream_info(self.name)).state
        return state.first_seq if state.messages else state.last_seq + 1, state.last_seq + 1

    async def append(self, entry: bytes) -> None:
        try:
            await (await self.stream()).publish(self.name, entry)
        except self.nats.errors.MaxPayloadError as error:
            raise MessageTooLarge(str(error)) from error

    async def read(self, start: int) -> Sequence[tuple[int, bytes]]:
        stream, api = await self.stream(), self.nats.js.api
        if self.place != start:
            self.entries = await stream.pull_subscribe(
                self.name, stream=self.name, config=api.ConsumerConfig(
                    deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=start,
                    ack_policy=api.AckPolicy.NONE, inactive_threshold=10))
        self.place, found = -1, []
        with contextlib.suppress(self.nats.errors.TimeoutError):
            found = await self.entries.fetch(256, timeout=2)
        page = [(message.metadata.sequence.stream, message.data) for message in found]
        self.place = page[-1][0] + 1 if page else start
        return page

    async def close(self) -> None:
        if self.client is not None:
            await self.client.close()
        self.client, self.place = None, -1


async def a_backbone_of_ones_own() -> None:
    """Two servers share one log on NATS, if it is there: each hears what the other publishes."""
    if listens(4222):
        servers = [PubSubEndpoint(backbone=NatsLog("nats://localhost", "fastapi_ws_lite_examples"))
                   for _ in range(2)]
        async with PubSubClient("ws://test/ws", transport=here(servers[0])) as client:
            news = await client.subscribe("news")
            await servers[1].publish("news", "from the other server")
            assert (await news.next(timeout=10)).data == "from the other server"
        for endpoint in servers:
            await endpoint.close()


def without_a_loop() -> None:
    """A notebook, a script or a thread: calls return the bare result, events come one by one."""
    remote = connect("ws://test/ws", transport=here(PubSubEndpoint(Calculator())))
    assert remote.add(a=1, b=2) == 3
    assert remote.proxy(Calculator).factor(6) == [1, 2, 3, 6]
    events = remote.events("news")                        # from here on, nothing is missed
    remote.publish("news", {"n": 1}, include_self=True)
    assert events.next(timeout=5).data == {"n": 1}
    remote.close()


# ------------------------------------------------------------------------------------------ bench
# A server is a process of its own; this one is the load. Systems take turns. Other work on the
# machine only slows them down, so trust the minimum, and processor time more than rates.

Work = Callable[[], Awaitable[Any]]
Figures = tuple[float, float]  # what one costs, and how many there were in a second
ADD, EVENT, DATA = {"a": 1, "b": 2}, {"mark": 1, "text": "x" * 64}, "x" * 100
THEIRS = "fastapi_websocket_rpc", "fastapi_websocket_pubsub"
CALL = '{"jsonrpc":"2.0","method":"add","params":{"a":1,"b":2},"id":1}'
SUBSCRIBE = '{"jsonrpc":"2.0","method":"subscribe","params":{"topics":["t"]},"id":1}'
HANDSHAKE = ("GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
             "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n{}\r\n")
HEADERS = {"own, arrays": "Sec-WebSocket-Protocol: ws-lite.1\r\n",
           "own, deflate": "Sec-WebSocket-Extensions: permessage-deflate\r\n"}
IMPORT = ("import asyncio, fastapi, sys, time; sys.pycache_prefix = '/no'; "
          "t = time.process_time(); import fastapi_ws_lite; print(time.process_time() - t)")
BROKERS = {"redis": "redis://127.0.0.1:6379", "kafka": "kafka://127.0.0.1:9092",
           "postgres": "postgresql://postgres@127.0.0.1:5432/test",
           "rabbitmq": "amqp://guest:guest@127.0.0.1:5672/"}


def their_modules() -> tuple[Any, Any, Any]:
    rpc, pubsub = map(importlib.import_module, THEIRS)
    return rpc, pubsub, type("Methods", (rpc.RpcMethodsBase,), {"add": Calculator.add})()


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """The least that an ASGI app can do."""
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})


def served(name: str) -> tuple[Any, Work, Work]:
    """A server's app, what publishes an event, and what calls the newest client."""
    app, channels = FastAPI(), list[Any]()
    if name == "own":
        us = PubSubEndpoint(Calculator(), on_connect=channels.append)
        us.register_route(app, "/ws")
        return app, lambda: us.publish("t", EVENT), lambda: channels[-1].call("add", ADD, timeout=9)
    if name == "echo":
        return echo, asyncio.Event().wait, asyncio.Event().wait

    async def on_connect(channel: Any) -> None:
        channels.append(channel)
    rpc, pubsub, methods = their_modules()
    rpc.WebsocketRPCEndpoint(methods, on_connect=[on_connect]).register_route(app, "/ws")
    (theirs := pubsub.PubSubEndpoint()).register_route(app, "/events")
    return app, lambda: theirs.publish(["t"], EVENT), lambda: channels[-1].call("add", ADD, 9)


async def repeat(work: Work, count: int, in_flight: int = 1) -> None:
    async def one_after_another() -> None:
        for _ in range(count // in_flight):
            await work()
            if in_flight == 1:
                await asyncio.sleep(0)

    await asyncio.gather(*(one_after_another() for _ in range(in_flight)))


def run_on_core(core: int, work: Coroutine[Any, Any, None]) -> None:
    """Run on one core of two, with uvloop if it is installed."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-core]})
    logging.disable()
    with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:
        runner.run(work)


async def bench_server(name: str) -> None:
    """A server's process: prints its port, then does what the lines of its input say."""
    app, publish, call = served(name)
    async with serving(app, ws_ping_interval=None) as port:
        print(port, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            what, count = line.split()
            await (repeat(publish, int(count)) if what == "publish" else
                   repeat(call, int(count), 64))
            print("done", flush=True)
        os._exit(0)  # the clients need no goodbye


def frames(*texts: str) -> bytes:
    """A client's frames; masked with zeros, which the server has to undo all the same."""
    return b"".join(b"\x81%b\0\0\0\0%b" % (
        bytes([128 + len(text)]) if len(text) < 126 else b"\xfe" + len(text).to_bytes(2, "big"),
        text.encode()) for text in texts)


async def hear(reader: asyncio.StreamReader, mark: bytes, count: int,
               again: Callable[[int], object] = abs) -> None:
    """Wait for so many marks, and do something again for each; one may come in two pieces."""
    tail = b""
    while count > 0:
        tail += await reader.read(2**18)
        count -= (found := tail.count(mark))
        again(found)
        tail = tail[1 - len(mark):]


class Bench:
    """The servers' processes, and what is measured with them."""

    def __init__(self, quick: bool) -> None:
        self.turns, self.count = (2, 6400) if quick else (7, 25_600)
        self.systems = ["own", *(["theirs"] if importlib.util.find_spec(THEIRS[1]) else [])]
        self.servers: dict[str, Any] = {name: subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--bench-server", name], text=True,
            bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for name in (*self.systems, "echo")}
        self.ports = {name: int(p.stdout.readline()) for name, p in self.servers.items()}

    async def tell(self, name: str, what: str, count: int) -> None:
        """Have a server do something so many times."""
        self.servers[name].stdin.write(f"{what} {count}\n")
        await asyncio.to_thread(self.servers[name].stdout.readline)

    def read(self, name: str, file: str, place: int) -> int:
        """A number from what Linux knows of a server's process."""
        with open(f"/proc/{self.servers[name].pid}/{file}") as numbers:
            return int(numbers.read().split()[place])

    async def cost(self, name: str, count: int, *work: Awaitable[Any], both: bool) -> Figures:
        """Processor time in us of a server, or of both sides, for each of so many."""
        began, own, used = time.perf_counter(), time.process_time(), self.read(name, "schedstat", 0)
        await asyncio.gather(*work)
        used, own = self.read(name, "schedstat", 0) - used, time.process_time() - own
        return (used / 1e3 + both * own * 1e6) / count, count / (time.perf_counter() - began)

    @contextlib.asynccontextmanager
    async def peers(self, system: str, count: int, text: str) -> AsyncIterator[list[Any]]:
        """Raw connections to a server, which have sent a text and got an answer."""
        port = self.ports[system.partition(",")[0]]
        peers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
        for reader, writer in peers:
            writer.write(HANDSHAKE.format(HEADERS.get(system, "")).encode())
            await reader.readuntil(b"\r\n\r\n")
            writer.write(frames(text))
            await reader.readuntil(b'"id":1')
        yield peers
        for _, writer in peers:
            writer.transport.abort()
        await asyncio.sleep(0.05)  # in which the server sees it

    async def calls(self, system: str) -> Figures:
        """A raw client calls, with 64 in flight."""
        sent = [frames(f"[{','.join([CALL] * n)}]") if n > 1 and system == "own, arrays" else
                frames(*[CALL] * n) for n in range(65)]
        async with self.peers(system, 1, CALL) as [(reader, writer)]:
            writer.write(sent[64])
            return await self.cost(system.partition(",")[0], self.count, hear(
                reader, b'"id":1', self.count, lambda n: writer.write(sent[n])), both=False)

    async def deliveries(self, system: str) -> Figures:
        """Single events to 100 raw subscribers."""
        async with self.peers(system, 100, SUBSCRIBE) as peers:
            cost = await self.cost("own", 5 * self.count, self.tell(
                "own", "publish", self.count // 20), both=False)
            await asyncio.gather(*(hear(r, b'"mark"', self.count // 20) for r, _ in peers))
        return cost

    async def memory(self, name: str) -> Figures:
        """KiB of a connection that has subscribed."""
        async with self.peers(name, 20, SUBSCRIBE):
            before = self.read(name, "statm", 1)
            async with self.peers(name, 300, SUBSCRIBE):
                return (self.read(name, "statm", 1) - before) * 4 / 300, 0  # pages of 4 KiB

    @contextlib.asynccontextmanager
    async def client(self, name: str, on_event: Any = None) -> AsyncIterator[Any]:
        """A whole client, of ours or theirs; with a callback it subscribes."""
        url = f"ws://127.0.0.1:{self.ports[name]}"
        if name == "own":
            async with PubSubClient(f"{url}/ws", Calculator()) as client:
                await client.subscribe("t", on_event or print)
                yield client
            return
        rpc, pubsub, methods = their_modules()
        async with (pubsub.PubSubClient(["t"], callback=on_event) if on_event else
                    rpc.WebSocketRpcClient(f"{url}/ws", methods)) as client:
            if on_event:
                client.start_client(f"{url}/events")
                await client.wait_until_ready()
            yield client

    async def whole(self, name: str) -> Figures:
        """A whole client calls, with 64 in flight: the cost of both sides."""
        count = self.count // (10 if name == "theirs" else 2)
        async with self.client(name) as client:
            calling = repeat(lambda: client.other.add(**ADD), count, 64)
            return await self.cost(name, count, calling, both=True)

    async def called(self, name: str) -> Figures:
        """The server calls a whole client, with 64 in flight and a timeout for each."""
        count = self.count // (10 if name == "theirs" else 1)
        async with self.client(name):
            return await self.cost(name, count, self.tell(name, "call", count), both=False)

    async def twenty(self, name: str) -> Figures:
        """Single events to 20 whole clients in this process: the cost of both sides."""
        count, done = self.count // (500 if name == "theirs" else 20), asyncio.Event()
        left = iter(range(1, 20 * count))

        async def on_event(data: Any, topic: str) -> None:
            if next(left, None) is None:
                done.set()

        async with contextlib.AsyncExitStack() as stack:
            for _ in range(20):
                await stack.enter_async_context(self.client(name, on_event))
            return await self.cost(
                name, 20 * count, self.tell(name, "publish", count), done.wait(), both=True)

    async def imports(self, _: str) -> Figures:
        """Milliseconds to import the module after FastAPI, without its .pyc."""
        return float(subprocess.check_output([sys.executable, "-B", "-c", IMPORT])) * 1e3, 0

    async def appends(self, url: str) -> Figures:
        """Time in us of an event into a broker's log, 256 at a time."""
        append, end = await log_of(url)
        await append()
        began, count = time.perf_counter(), self.count // 5
        await repeat(append, count // 256)
        seconds = time.perf_counter() - began
        await end()
        return seconds / count * 1e6, count / seconds

    async def compare(self, title: str, measure: Callable[[str], Awaitable[Figures]],
                      *systems: str, unit: str = "us", turns: int = 0) -> None:
        """Measure systems by turns, and print a line for each; the first one is ours."""
        found = [[await measure(system) for system in systems] for _ in range(turns or self.turns)]
        for system, figures in zip(systems, zip(*found, strict=True), strict=True):
            costs, rates = zip(*figures, strict=True)
            print(f"| {title:27} | {system.partition(':')[0]:18} | {min(costs):6.2f} {unit:3} "
                  f"| {statistics.median(costs):6.2f} | {max(rates):9,.0f} "
                  f"| {min(costs) / min(turn[0][0] for turn in found):5.2f} |", flush=True)

    async def run(self) -> None:
        """Print the table as it is measured."""
        print("| what | of | min | median | best /s | of ours |\n|---|---|---|---|---|---|")
        await self.compare("KiB of a subscriber", self.memory, "own", "echo", unit="KiB", turns=1)
        await self.compare("64 calls in flight", self.calls, "own", "own, arrays", "echo")
        await self.compare("whole client and server", self.whole, *self.systems)
        await self.compare("the server calls", self.called, *self.systems)
        await self.compare("one event to 100", self.deliveries, "own", "own, deflate")
        await self.compare("20 whole clients and server", self.twenty, *self.systems)
        await self.compare("first import after FastAPI", self.imports, "own", unit="ms")
        for name, usual in BROKERS.items():
            at = urlsplit(url := os.environ.get(f"TEST_{name.upper()}_URL", usual))
            with contextlib.suppress(OSError), socket.create_connection((at.hostname, at.port), 1):
                await self.compare(f"event by {name}", self.appends, url, f"by hand {url}")


async def log_of(url: str) -> tuple[Work, Work]:
    """What appends 256 events to a log, and what ends that; a driver's end deletes both logs."""
    how, _, url = url.rpartition(" ")
    name, ours, many = f"bench_{os.getpid()}", "fastapi_ws_lite_bench", range(256)
    if not how:
        endpoint = PubSubEndpoint(backbone=url, channel=ours)

        async def publish() -> None:
            for receipt in [endpoint.publish("t", DATA) for _ in many]:
                await receipt

        return publish, endpoint.close
    if url.startswith("redis"):
        client = importlib.import_module("redis.asyncio").from_url(url)

        def append() -> Any:
            pipeline = client.pipeline(transaction=False)
            for _ in many:
                pipeline.xadd(name, {"": DATA}, maxlen=4096)
            return pipeline.execute()

        return append, lambda: client.delete(name, ours)
    if url.startswith("postgresql"):
        client = await importlib.import_module("asyncpg").connect(url)
        await client.execute(f"CREATE TABLE {name} (id bigserial PRIMARY KEY, data text)")
        insert = f"INSERT INTO {name} (data) VALUES ($1)"
        return (lambda: client.executemany(insert, [(DATA,)] * 256), lambda: client.execute(
            f"DROP TABLE {name}; DELETE FROM fastapi_ws_lite_log WHERE channel = '{ours}'"))
    if url.startswith("amqp"):
        rabbit = importlib.import_module("aio_pika")
        channel = await (await rabbit.connect(url)).channel()
        log = await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "stream"})
        send, message = channel.default_exchange.publish, rabbit.Message(DATA.encode())
        return (lambda: asyncio.gather(*(send(message, name) for _ in many)),
                lambda: asyncio.gather(log.delete(), channel.queue_delete(ours)))
    kafka = importlib.import_module("aiokafka")
    producer = kafka.AIOKafkaProducer(bootstrap_servers=url.rpartition("/")[2])
    await producer.start()
    return lambda: asyncio.gather(
        *(producer.send_and_wait(name, DATA.encode()) for _ in many)), producer.stop


def bench(quick: bool = False) -> None:
    """Processor time per call and per delivery, beside rates; "bench --quick" takes 15 s."""
    run_on_core(1, Bench(quick).run())


PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Dashboard</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif;
    --card: light-dark(#fff, #171b22); --line: light-dark(#dfe3ea, #2b323e);
    --soft: light-dark(#5d6779, #98a2b3); --main: light-dark(#3b5bdb, #7c9aff); }
  * { box-sizing: border-box; margin: 0; min-width: 0; }
  body { background: light-dark(#f4f5f8, #0e1116); color: light-dark(#1b2130, #e7eaf0);
    padding: 2rem 1rem; } h1 { font-size: 1.3rem; flex: 1 1 100%; }
  main { max-width: 64rem; margin: auto; display: flex; flex-wrap: wrap; gap: 1rem; }
  section { background: var(--card); border: 1px solid var(--line); border-radius: 14px;
    padding: 1rem 1.2rem; flex: 1 1 13rem; } .wide { flex-basis: 24rem; }
  h2, .soft { font-size: .85rem; font-weight: 500; color: var(--soft); }
  .number { font-size: 1.9rem; font-weight: 600; font-variant-numeric: tabular-nums; }
  #state { font-size: .85rem; font-weight: 500; margin-left: 1rem; color: #d9480f; }
  .ready #state { color: #12915c; } body:not(.ready) .number { opacity: .35; }
  button, input { font: inherit; color: inherit; border-radius: 9px; padding: .42rem .9rem;
    border: 1px solid var(--line); background: none; } button:disabled { opacity: .5; }
  #build { background: var(--main); color: var(--card); } #text { flex: 1; }
  form, .row { display: flex; gap: .6rem; align-items: center; margin-top: .8rem; }
  progress { width: 100%; accent-color: var(--main); margin: .6rem 0; }
  #log { height: 9.5rem; overflow-y: auto; overflow-wrap: anywhere; } b { margin-right: .5rem; }
</style>
<body>
<main><h1>Dashboard <span role="status" id="state">connecting</span></h1>
  <section><h2>Pages connected</h2><p class="number" id="pages">-</p></section>
  <section><h2>Events delivered</h2><p class="number" id="events">-</p></section>
  <section><h2>Server up for, s</h2><p class="number" id="up">-</p></section>
  <section class="wide"><h2>A call that streams how far it is</h2>
    <p class="number"><span id="done">0</span> %</p>
    <progress id="bar" value="0" max="80" aria-label="progress"></progress>
    <div class="row"><button id="build">Build</button><button id="stop" disabled>Stop</button>
      <span class="soft" id="step">not running</span></div></section>
  <section class="wide"><h2>Chat between tabs</h2>
    <div id="log" aria-live="polite"><p class="soft">open this page in another tab, too</p></div>
    <form id="chat"><input id="name" size="8" aria-label="your name">
      <input id="text" placeholder="say something" aria-label="message" autocomplete="off">
      <button>Send</button></form></section>
</main>
<script type="module">
import { connect } from "/ws-lite.js";
const $ = (id) => document.getElementById(id);
const show = (texts) => Object.keys(texts).forEach((id) => { $(id).textContent = texts[id]; });
const ws = connect("/ws", { retry: [0.1, 2], onState: (state) => {
  document.body.classList.toggle("ready", state === "ready");
  show({ state: { ready: "live", waiting: "the server is away" }[state] ?? state });
} });
ws.subscribe("numbers", show, { last: 1 });
$("build").onclick = async () => {
  [$("build").disabled, $("stop").disabled] = [true, false];
  try {
    for await (const { done, what } of ws.stream("build", { steps: 80 })) {
      $("bar").value = done;
      show({ step: what, done: Math.round(done / 0.8) });
      if ($("stop").disabled) break;
    }
  } catch (error) { show({ step: error.message }); }
  [$("build").disabled, $("stop").disabled] = [false, true];
};
$("stop").onclick = () => { $("stop").disabled = true; };
ws.subscribe("chat", ({ name, text, hue }) => { // what was said before comes first
  const [line, from] = ["p", "b"].map((tag) => document.createElement(tag));
  from.textContent = name;
  from.style.color = `hsl(${hue} 55% 50%)`;
  line.append(from, text);
  $("log").append(line);
  $("log").scrollTop = $("log").scrollHeight;
}, { last: 20 });
const hue = Math.random() * 360;
$("name").value = "guest " + Math.ceil(Math.random() * 99);
$("chat").onsubmit = (event) => {
  event.preventDefault();
  const [name, text] = [$("name").value, $("text").value];
  if (text) ws.publish("chat", { name, text, hue }, { includeSelf: true });
  $("text").value = "";
};
</script>
"""


class Builder(RpcMethodsBase):
    async def build(self, steps: int) -> AsyncIterator[dict[str, Any]]:
        """Long work, which tells how far it is; it ends where a page leaves its loop."""
        for step in range(steps):
            await asyncio.sleep(random.uniform(0.01, 0.09))
            what = ("compiling", "linking", "testing", "packing")[4 * step // steps]
            yield {"done": step + 1, "what": what}


async def dashboard(port: int = 0) -> None:
    """A page in a browser: live numbers, progress, a chat. It survives a restart of the server."""
    app, endpoint, began = FastAPI(), PubSubEndpoint(Builder()), time.monotonic()
    endpoint.register_route(app, "/ws")
    register_browser_client(app, "/ws-lite.js")
    app.get("/", response_class=HTMLResponse)(lambda: PAGE)
    async with serving(app, port) as port:
        print(f"http://127.0.0.1:{port}/ shows it, until Ctrl-C", flush=True)
        while True:
            stats = endpoint.stats()
            endpoint.publish("numbers", {
                "pages": stats["channels"], "events": stats["events_delivered"],
                "up": int(time.monotonic() - began)})
            await asyncio.sleep(0.2)


QUICK: dict[str, Callable[[], Any]] = {function.__name__: function for function in (
    demo, both_ways, errors, typed, streams, events, authorisation, reconnecting, last_messages,
    snapshot_plus_changes, login_with_a_cookie, a_token_that_expires, kicking_a_user, rate_limit,
    tracing, a_database_session_per_call, prometheus, server_sent_events, without_a_loop,
    a_backbone_of_ones_own)}
ALL = QUICK | {"fleet": fleet, "bench": bench, "dashboard": dashboard}


def run(name: str, *arguments: Any) -> None:
    began = time.perf_counter()
    result = ALL[name](*arguments)
    if inspect.iscoroutine(result):
        asyncio.run(result)
    print(f"{name}: done in {time.perf_counter() - began:.2f} s", flush=True)


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.ERROR)
    match arguments:
        case []:
            for name, function in ALL.items():
                print(f"{name:28} {(function.__doc__ or '').splitlines()[0]}")
        case ["--fleet-server"]:
            asyncio.run(fleet_server())
        case ["--bench-server", name]:
            run_on_core(0, bench_server(name))
        case ["bench", "--quick"]:
            run("bench", True)
        case ["dashboard", port] if port.isdigit():
            run("dashboard", int(port))
        case _ if unknown := [name for name in arguments if name not in {*ALL, "all"}]:
            print(f"unknown: {', '.join(unknown)}; there are: {', '.join(ALL)}")
            return 2
        case _:
            for name in QUICK if "all" in arguments else arguments:
                run(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi", "uvicorn[standard]"]
# ///
"""What fastapi_ws_lite does, one scenario a function.

    python examples.py              lists the scenarios and runs them all, but the last three
    python examples.py NAME...      runs those

Each is complete, and fails if what it shows does not happen. ``demo`` is the whole of it: a server
and two clients, each in a process of its own. ``bench`` measures, for a minute and a half, or with
``--quick`` for a few seconds; ``backbones`` what brokers cost. ``dashboard`` serves a page, until
Ctrl-C. The others run app and client in one process, joined by ASGITransport; against a server,
leave ``transport`` out.
"""

import asyncio
import contextlib
import gc
import importlib.util
import inspect
import json
import logging
import math
import mmap
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import date
from functools import partial
from statistics import median
from typing import Annotated, Any, NamedTuple, Protocol, TypeAlias

import uvicorn
from fastapi import Depends, FastAPI, Header, WebSocket, WebSocketDisconnect, WebSocketException
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from fastapi_ws_lite import (
    ALL_TOPICS,
    ASGITransport,
    ChannelClosed,
    Event,
    EventNotifier,
    Forbidden,
    InvalidParams,
    MethodNotFound,
    PubSubClient,
    PubSubEndpoint,
    Refused,
    RequestTimeout,
    RpcChannel,
    RpcClient,
    RpcEndpoint,
    RpcError,
    RpcMethodsBase,
    connect,
)

# ------------------------------------------------------------------ demo: a server and two clients


class Fleet(RpcMethodsBase):
    """What the control server offers to its agents."""

    async def add(self, a: int, b: int) -> int:
        return a + b

    async def introduce(self, name: str) -> str:
        """Called by an agent; calls it back before it answers."""
        version = (await self.channel.other.version()).result
        return f"welcome {name}, running {version}"


class Agent(RpcMethodsBase):
    """What an agent offers to the control server."""

    async def version(self) -> str:
        return "1.0"


@contextlib.asynccontextmanager
async def serving(app: Any, **options: Any) -> AsyncIterator[asyncio.Server]:
    """Serve an app on a port that the system picks."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", **options))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0]
    server.should_exit = True
    await task


async def serve() -> None:
    """The server's process: prints its address, and serves until its input ends."""
    app = FastAPI()
    endpoint = PubSubEndpoint(Fleet())
    endpoint.register_route(app, "/ws")

    @app.post("/policy/{name}")
    def policy_changed(name: str) -> None:  # an ordinary route may publish, without await
        endpoint.publish([f"policy.{name}"], data={"changed": name})

    async with serving(app) as server:
        print(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await endpoint.close()


def say(line: str) -> None:
    """Print a line in one piece, as other processes print too."""
    print(f"{line}\n", end="", flush=True)


async def agent(url: str, name: str, other: str) -> None:
    """A client's process: calls, is called, subscribes, publishes, and waits for the other one."""
    greeted: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def on_hello(data: str, topic: str) -> None:
        if data == f"hello from {other}" and not greeted.done():
            say(f"{name}: {topic}: {data}")
            greeted.set_result(data)

    async with PubSubClient(url, Agent()) as client:
        response = await client.other.add(a=1, b=2)
        say(f"{name}: 1 + 2 = {response.result}")
        assert response.result == 3
        welcome = (await client.other.introduce(name=name)).result
        say(f"{name}: {welcome}")
        assert welcome == f"welcome {name}, running 1.0"
        await client.subscribe("hello.*", on_hello, pattern=True)
        async with asyncio.timeout(30):
            while not greeted.done():  # until the other one has subscribed, too
                await client.publish([f"hello.{name}"], data=f"hello from {name}")
                await asyncio.wait([greeted], timeout=0.2)
            await client.publish([f"hello.{name}"], data=f"hello from {name}")


def demo() -> None:
    """A server and two agents, in three processes: calls both ways, and events."""
    this = [sys.executable, __file__]
    with subprocess.Popen([*this, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as server:
        assert server.stdin and server.stdout
        url = server.stdout.readline().strip()
        print("server:", url, flush=True)
        agents = [subprocess.Popen([*this, "--agent", url, *names])
                  for names in (("ann", "bob"), ("bob", "ann"))]
        codes = [process.wait(60) for process in agents]
        server.stdin.close()
        codes.append(server.wait(10))
    assert codes == [0, 0, 0], f"exit codes: {codes}"
    print("demo: all of it happened")


# -------------------------------------------------------------------------------------- calling


class Calculator(RpcMethodsBase):
    async def add(self, a: int, b: int) -> int:
        return a + b

    def factor(self, n: int) -> list[int]:  # a plain def runs in a worker thread
        return [k for k in range(1, n + 1) if n % k == 0]

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def calls() -> None:
    """A client calls methods of the server."""
    app = FastAPI()
    RpcEndpoint(Calculator()).register_route(app, "/rpc")

    async with RpcClient("ws://test/rpc", transport=ASGITransport(app)) as client:
        response = await client.other.add(a=1, b=2)
        assert response.result == 3
        assert (await client.call("add", {"a": 1, "b": 2})).result == 3
        assert (await client.other.add(1, 2)).result == 3
        many = await asyncio.gather(*(client.other.factor(n=n) for n in range(10)))
        assert many[6].result == [1, 2, 3, 6]


async def both_ways() -> None:
    """The server calls methods of its client."""
    class Screen(RpcMethodsBase):
        async def ask(self, question: str) -> str:
            return "yes" if question == "sure?" else "what?"

    app = FastAPI()
    endpoint = RpcEndpoint()
    endpoint.register_route(app, "/rpc")

    @endpoint.method
    async def delete(name: str, channel: RpcChannel) -> str:  # which connection is calling
        answer = await channel.other(timeout=5).ask(question="sure?")
        return f"{name} is deleted" if answer.result == "yes" else f"{name} stays"

    async with RpcClient("ws://test/rpc", Screen(), transport=ASGITransport(app)) as client:
        assert (await client.other.delete(name="a file")).result == "a file is deleted"
        for channel in endpoint.channels.values():  # from anywhere on the server
            assert (await channel.other.ask(question="eh?")).result == "what?"


class Order(BaseModel):
    item: str
    amount: int = Field(gt=0)
    due: date


async def validation() -> None:
    """Arguments are validated from the type hints, models among them."""
    app = FastAPI()
    endpoint = RpcEndpoint()
    endpoint.register_route(app, "/rpc")

    @endpoint.method
    async def place(order: Order, gift: bool = False) -> Order:
        assert isinstance(order.due, date) and not gift
        return order

    async with RpcClient("ws://test/rpc", transport=ASGITransport(app)) as client:
        order = Order(item="tea", amount=2, due=date(2030, 1, 1))
        assert (await client.other.place(order=order)).result["due"] == "2030-01-01"
        try:
            await client.other.place(order={"item": "tea", "amount": 0, "due": "soon"})
        except InvalidParams as error:
            assert [".".join(problem["loc"]) for problem in error.data] == [
                "order.amount", "order.due"]
        else:
            raise AssertionError("it was accepted")


async def errors() -> None:
    """What a method raises, and what its caller sees."""
    app = FastAPI()
    endpoint = RpcEndpoint(Calculator())
    endpoint.register_route(app, "/rpc")

    @endpoint.method
    async def pay(amount: int) -> None:
        raise RpcError(1001, "the account is empty", data={"balance": 0})

    async with RpcClient("ws://test/rpc", transport=ASGITransport(app)) as client:
        try:
            await client.other.pay(amount=1)
        except RpcError as error:
            assert (error.code, error.message, error.data) == (
                1001, "the account is empty", {"balance": 0})
        try:
            await client.other.subtract(a=1, b=2)
        except MethodNotFound:
            pass
        try:
            await client.other(timeout=0.05).sleep(seconds=60)  # and the server stops sleeping
        except RequestTimeout as error:
            assert isinstance(error, TimeoutError)
        assert (await client.other.add(a=1, b=2)).result == 3  # the connection has not noticed


class Shop(Protocol):
    """What a client knows of the methods of ``Till``, if it does not have the class."""

    async def total(self, orders: list[Order]) -> float: ...


class Till(RpcMethodsBase):
    async def total(self, orders: list[Order]) -> float:
        return sum(order.amount for order in orders) * 1.5

    async def next_due(self, orders: list[Order]) -> Order:
        return min(orders, key=lambda order: order.due)


async def typed() -> None:
    """Calls with the types of a class: checked by mypy before, by pydantic after."""
    app = FastAPI()
    RpcEndpoint(Till()).register_route(app, "/rpc")
    orders = [Order(item="tea", amount=2, due=date(2030, 1, 2)),
              Order(item="jam", amount=1, due=date(2030, 1, 1))]

    async with RpcClient("ws://test/rpc", transport=ASGITransport(app)) as client:
        till = client.proxy(Till, timeout=5)
        assert await till.next_due(orders) == orders[1]    # an Order, and not its JSON
        assert await client.proxy(Shop).total(orders=orders) == 4.5
        try:
            await till.total(orders, 3)  # type: ignore[call-arg]  # and mypy says so
        except TypeError:
            pass


# -------------------------------------------------------------------------------------- streams


class Machine(RpcMethodsBase):
    """Both sides of ``streams`` have it."""

    def __init__(self) -> None:
        self.running = 0

    async def work(self, steps: int) -> AsyncIterator[int]:
        self.running += 1
        try:
            for step in range(steps):
                await asyncio.sleep(0)
                yield 100 * (step + 1) // steps
        finally:
            self.running -= 1

    async def upload(self) -> int:
        """Iterates over a stream that its caller exposes."""
        return sum([percent async for percent in self.channel.proxy(Machine).work(10)])


async def streams() -> None:
    """An async generator is iterated over by the other side, as fast as that takes its items."""
    app, machine = FastAPI(), Machine()
    RpcEndpoint(machine).register_route(app, "/rpc")

    async with RpcClient("ws://test/rpc", Machine(), transport=ASGITransport(app)) as client:
        assert [percent async for percent in client.other.work(steps=4)] == [25, 50, 75, 100]
        async for percent in client.proxy(Machine).work(1_000_000):
            if percent == 0:
                break                                     # which stops the work
        while machine.running:
            await asyncio.sleep(0.001)
        assert await client.proxy(Machine).upload() == 550


# --------------------------------------------------------------------------------------- events


async def events() -> None:
    """Publish on the server, receive in clients; and the other way round."""
    app = FastAPI()
    endpoint = PubSubEndpoint()
    endpoint.register_route(app, "/pubsub")
    heard: list[Any] = []

    async def on_news(data: Any, topic: str) -> None:
        heard.append((topic, data))

    async with (
        PubSubClient("ws://test/pubsub", transport=ASGITransport(app)) as ann,
        PubSubClient("ws://test/pubsub", transport=ASGITransport(app)) as bob,
    ):
        await ann.subscribe("news", on_news)              # awaited: the server has confirmed it
        await ann.subscribe("orders.*", on_news, pattern=True)
        subscription = await bob.subscribe(ALL_TOPICS)    # no callback: iterate over it
        endpoint.publish(["news", "orders.7"], data={"n": 1})
        await ann.publish(["news"], data="from ann")      # which ann does not hear herself
        received: list[Event] = []
        async for event in subscription:
            received.append(event)
            if len(received) == 3:
                break                                     # which unsubscribes
        assert [(event.topic, event.data) for event in received] == [
            ("news", {"n": 1}), ("orders.7", {"n": 1}), ("news", "from ann")]
        assert heard == [("news", {"n": 1}), ("orders.7", {"n": 1})]


async def events_in_process() -> None:
    """The notifier of an endpoint, alone: publish from any thread, subscribe with any callable."""
    notifier = EventNotifier()
    heard: list[int] = []
    notifier.subscribe("ticks", heard.append)
    notifier.publish("ticks", 1)
    threading.Thread(target=notifier.publish, args=("ticks", 2)).start()
    while heard != [1, 2]:
        await asyncio.sleep(0.001)


async def authorisation() -> None:
    """Who may connect is FastAPI's business; who may subscribe and publish is asked each time."""
    async def user(websocket: WebSocket, token: Annotated[str, Header()]) -> str:
        if not token.startswith("secret-of-"):
            raise WebSocketException(1008, "who are you?")
        return token.removeprefix("secret-of-")

    def may(channel: RpcChannel, action: str, topics: tuple[str, ...]) -> bool:
        return all(topic.startswith(channel.context["user"]) for topic in topics)

    app = FastAPI()
    endpoint = PubSubEndpoint(authorize=may)

    @app.websocket("/events")
    async def events(websocket: WebSocket, user: Annotated[str, Depends(user)]) -> None:
        await endpoint.main_loop(websocket, user=user)    # keyword arguments: channel.context

    def client(token: str) -> PubSubClient:
        return PubSubClient("ws://test/events", headers={"token": token},
                            transport=ASGITransport(app))

    async with client("secret-of-ann") as ann:
        await ann.subscribe("ann/inbox", print)
        try:
            await ann.subscribe("bob/inbox", print)
        except Forbidden as error:
            assert error.data == {"topics": ["bob/inbox"]}
    try:
        async with client("wrong"):
            raise AssertionError("it was let in")
    except Refused as error:
        assert error.status == 403 and isinstance(error, ChannelClosed)


async def reconnecting() -> None:
    """A client comes back by itself, and subscribes again."""
    app = FastAPI()
    endpoint = PubSubEndpoint()
    endpoint.register_route(app, "/pubsub")
    heard: list[Any] = []
    connected: list[RpcChannel] = []
    client = PubSubClient("ws://test/pubsub", transport=ASGITransport(app),
                          on_connect=connected.append)
    client.subscribe("news", heard.append)                # before there is a connection
    async with client:
        endpoint.publish("news", 1)
        await endpoint.close()                            # 1012: the server restarts
        while len(connected) < 2:
            await asyncio.sleep(0.01)
        endpoint.publish("news", 2)
        while heard != [1, 2]:
            await asyncio.sleep(0.001)


class FileLog:
    """A backbone of one's own, as Backbone describes it: a file, for all processes of a machine."""

    def __init__(self, path: str) -> None:
        self.path = path

    async def append(self, payload: bytes) -> None:
        with open(self.path, "ab") as file:
            fcntl: Any = importlib.import_module("fcntl")
            fcntl.flock(file, fcntl.LOCK_EX)  # of several writers, one at a time
            file.write(b"%d %b\n" % (len(payload), payload))

    async def read(self, start: int | None) -> AsyncIterator[tuple[int, bytes]]:
        open(self.path, "ab").close()
        with open(self.path, "rb") as file:
            if start is not None and start >= os.path.getsize(self.path):
                raise LookupError(f"nothing is at {start}")
            file.seek(start or 0)  # its place in the file is the offset of an entry
            while True:
                offset, line = file.tell(), file.readline()
                while line[-1:] == b"\n" and len(line.partition(b" ")[2]) <= int(line.split()[0]):
                    line += file.readline()  # the payload has lines of its own
                if line.endswith(b"\n"):
                    yield offset, line.partition(b" ")[2][:-1]
                else:
                    file.seek(offset)  # the end, or an entry that is not all there
                    await asyncio.sleep(0.01)


async def a_backbone_of_ones_own() -> None:
    """Two servers share one log, here a file: each hears what the other publishes."""
    with tempfile.TemporaryDirectory() as folder:
        servers = [PubSubEndpoint(backbone=FileLog(f"{folder}/log")) for _ in range(2)]
        app = FastAPI()
        servers[0].register_route(app, "/ws")
        async with PubSubClient("ws://test/ws", transport=ASGITransport(app)) as client:
            news = await client.subscribe("news")
            await servers[1].publish("news", "from the other server\n")
            async for event in news:
                assert event.data == "from the other server\n"
                break
        assert servers[0].stats()["backbone"]["connected"]
        for endpoint in servers:
            await endpoint.close()


# -------------------------------------------------------------------------- without an event loop


def without_a_loop() -> None:
    """A script, or a thread: calls return the bare result, and events are iterated with `for`."""
    app = FastAPI()
    PubSubEndpoint(Calculator()).register_route(app, "/ws")

    with connect("ws://test/ws", transport=ASGITransport(app)) as remote:
        assert remote.add(a=1, b=2) == 3
        assert remote.call("add", [1, 2], timeout=5) == 3
        events = remote.events("news")                    # from here on, nothing is missed
        remote.publish("news", {"n": 1}, include_self=True)
        for event in events:
            assert (event.topic, event.data) == ("news", {"n": 1})
            break                                         # which unsubscribes


# ---------------------------------------------------- bench: what README.md says, measured again
#
# Each server is a process of its own, on the first core; this one is the load, on the second. Those
# compared take turns, as what else a machine does only ever slows: the best rate counts, and of a
# p99 the median. The load makes its frames beforehand, and counts answers by a mark that each has
# once, so that it is the server that limits.

Action: TypeAlias = Callable[..., Awaitable[Any]]


class Served(NamedTuple):
    """A server that is compared: how to publish to its topic "t", and to call its last client."""

    app: Any  # or the server itself
    publish: Action
    call: Action


compact = json.JSONEncoder(separators=(",", ":")).encode


def event_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes an event loop: uvloop, where it is installed."""
    found = importlib.util.find_spec("uvloop")
    return importlib.import_module("uvloop").new_event_loop if found else None


class Echo(Calculator):
    async def echo(self, data: Any) -> Any:
        return data


async def not_measured() -> None: ...


def this_library() -> Served:
    app, channels = FastAPI(), deque[RpcChannel](maxlen=1)
    endpoint = PubSubEndpoint(Echo(), on_connect=channels.append)
    endpoint.register_route(app, "/ws")
    return Served(app, lambda data: endpoint.publish("t", data),
                  lambda: channels[-1].other.add(a=1, b=2))


def bare() -> Served:
    """What FastAPI has: an echo, and a loop that sends to all."""
    app, subscribers = FastAPI(), dict[WebSocket, None]()

    @app.websocket("/{what}")
    async def ws(websocket: WebSocket, what: str) -> None:
        await websocket.accept()
        if what == "events":
            subscribers[websocket] = None
        try:
            while True:
                await websocket.send_text(await websocket.receive_text())
        except WebSocketDisconnect:
            subscribers.pop(websocket, None)

    async def publish(data: Any) -> None:
        text = compact(data)
        for websocket in list(subscribers):
            await websocket.send_text(text)

    return Served(app, publish, not_measured)


def predecessors() -> Served:
    """fastapi-websocket-rpc and -pubsub."""
    rpc = importlib.import_module("fastapi_websocket_rpc")
    events = importlib.import_module("fastapi_websocket_pubsub").PubSubEndpoint()
    app, channels = FastAPI(), deque[Any](maxlen=1)

    async def on_connect(channel: Any) -> None:
        channels.append(channel)

    methods = type("Methods", (rpc.RpcMethodsBase,), {"add": Echo.add, "echo": Echo.echo})()
    rpc.WebsocketRPCEndpoint(methods, on_connect=[on_connect]).register_route(app, "/ws")
    events.register_route(app, "/events")
    return Served(app, lambda data: events.publish(["t"], data),
                  lambda: channels[-1].other.add(a=1, b=2))


def python_socketio() -> Served:
    socketio = importlib.import_module("socketio")
    server = socketio.AsyncServer(async_mode="asgi", ping_interval=600, max_http_buffer_size=2**24)
    clients = deque[str](maxlen=1)

    async def connect(client: str, *_: Any) -> None:
        clients.append(client)

    async def add(client: str, data: Any) -> Any:
        return data["a"] + data["b"]

    async def subscribe(client: str, data: Any) -> None:
        await server.enter_room(client, "t")

    for name, handler in (("connect", connect), ("add", add), ("echo", Echo.echo),
                          ("subscribe", subscribe)):
        server.on(name, handler)  # whose first argument is the client
    return Served(socketio.ASGIApp(server), lambda data: server.emit("event", data, room="t"),
                  lambda: server.call("add", {"a": 1, "b": 2}, to=clients[-1]))


def broadcast() -> Served:
    """The server of the websockets library, and its way to send to all."""
    library = importlib.import_module("websockets.asyncio.server")
    connections: set[Any] = set()

    async def ws(connection: Any) -> None:
        connections.add(connection)
        try:
            async for message in connection:
                await connection.send(message)
        finally:
            connections.discard(connection)

    async def publish(data: Any) -> None:
        library.broadcast(connections, compact(data))

    return Served(library.serve(ws, "127.0.0.1", 0, ping_interval=None), publish, not_measured)


SERVERS: dict[str, Callable[[], Served]] = {
    function.__name__: function
    for function in (this_library, bare, predecessors, python_socketio, broadcast)
}


def prepare(core: int) -> None:
    """Keep this process on one core of two, and let it open thousands of connections."""
    system: Any = os
    if hasattr(os, "sched_setaffinity") and len(cores := sorted(system.sched_getaffinity(0))) > 1:
        system.sched_setaffinity(0, {cores[core]})
    if importlib.util.find_spec("resource"):
        resource = importlib.import_module("resource")
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    logging.disable()


async def publish_for(publish: Action, seconds: float, burst: int, pause: float) -> list[float]:
    """Publish in bursts: when that began, how many it were, and the processor time of each."""
    began, cpu, count = time.monotonic_ns(), time.process_time(), 0
    while time.monotonic_ns() - began < seconds * 1e9:
        for _ in range(burst):
            await publish({"t": time.monotonic_ns(), "text": "x" * 64})
        count += burst
        await asyncio.sleep(pause)
    return [began, count, (time.process_time() - cpu) / count]


async def call_for(call: Action, seconds: float) -> list[float]:
    """Call with 64 in flight: how many calls it were in a second."""
    began, count = time.perf_counter(), 0

    async def one_after_another() -> None:
        nonlocal count
        while time.perf_counter() - began < seconds:
            await call()
            count += 1

    await asyncio.gather(*(one_after_another() for _ in range(64)))
    return [count / (time.perf_counter() - began)]


def resident() -> list[float]:
    """The memory of this process in KiB, where that can be read."""
    gc.collect()
    with contextlib.suppress(OSError), open("/proc/self/statm") as statm:
        return [int(statm.read().split()[1]) * mmap.PAGESIZE / 1024]
    return [math.nan]


async def bench_server(name: str) -> None:
    """A server's process: prints its port, and does what its input says until that ends."""
    prepare(core=0)
    app, publish, call = SERVERS[name]()
    async with app if name == "broadcast" else serving(app, ws_ping_interval=None) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            command, *numbers = json.loads(line)
            result = (await publish_for(publish, *numbers) if command == "publish" else
                      await call_for(call, *numbers) if command == "call" else resident())
            print(json.dumps(result), flush=True)
        os._exit(0)  # with thousands of connections, which nobody misses


class Wire(NamedTuple):
    """How to speak to a server."""

    server: str
    request: str            # of a method and its params
    mark: bytes             # each answer has it once
    id: bytes               # a pattern: the id of what the server asks
    answer: str             # to that id
    path: str = "/ws"
    events: str = "/ws"     # the path to subscribe at
    hello: str = ""
    subprotocol: str = ""
    together: bool = False  # what is sent in one turn is one array

    def frames(self, texts: list[str]) -> bytes:
        """A client's frames; masked with zeros, which the server has to undo all the same."""
        if self.together and len(texts) > 1:
            texts = [f"[{','.join(texts)}]"]
        return b"".join(b"\x81" + (
            struct.pack("!B", 128 + len(text)) if len(text) < 126 else
            struct.pack("!BH", 254, len(text)) if len(text) < 2**16 else
            struct.pack("!BQ", 255, len(text))) + bytes(4) + text.encode() for text in texts)


PLAIN = Wire("this_library", '{"jsonrpc":"2.0","method":"%s","params":%s,"id":1}', b'"id":',
             rb'"id":(\d+)\D', '{"jsonrpc":"2.0","result":3,"id":%s}')
APART = PLAIN._replace(subprotocol="ws-lite.1")
LITE = APART._replace(together=True)
CROWDED = LITE._replace(server="crowded")
BARE = PLAIN._replace(server="bare", events="/events")
OLD = Wire("predecessors", '{"request":{"method":"%s","arguments":%s,"call_id":"1"}}',
           b'"call_id":', rb'"call_id":"(\w+)"',
           '{"response":{"result":3,"result_type":"int","call_id":"%s"}}', events="/events")
SOCKETIO_PATH = "/socket.io/?EIO=4&transport=websocket"
SOCKETIO = Wire("python_socketio", '421["%s",%s]', b"431[", rb"42(\d+)\[", "43%s[3]",
                SOCKETIO_PATH, SOCKETIO_PATH, hello="40")
BROADCAST = BARE._replace(server="broadcast")


def counter(mark: bytes, seen: Callable[[int], None]) -> Callable[[bytes], None]:
    """Count the marks in what arrives, also those that arrive in two pieces."""
    tail = b""

    def count(data: bytes) -> None:
        nonlocal tail
        data = tail + data
        tail = data[1 - len(mark):]
        if number := data.count(mark):
            seen(number)

    return count


def finder(pattern: bytes, seen: Callable[[list[str]], None]) -> Callable[[bytes], None]:
    """Find what the group of a pattern matches, likewise."""
    tail = b""

    def find(data: bytes) -> None:
        nonlocal tail
        tail += data
        if found := list(re.finditer(pattern, tail)):
            tail = tail[found[-1].end():]
            seen([match[1].decode() for match in found])

    return find


class Peer(asyncio.Protocol):
    """A client that hardly does anything."""

    transport: Any
    handlers: Sequence[Callable[[bytes], None]] = ()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        for handler in self.handlers:
            handler(data)

    async def ask(self, data: bytes, mark: bytes) -> None:
        """Send, and wait for what has the mark."""
        answered = asyncio.Event()
        self.handlers = [counter(mark, lambda _: answered.set())]
        self.transport.write(data)
        await answered.wait()

    def answers(self, wire: Wire) -> Callable[[bytes], None]:
        """A handler that answers what the server asks."""
        return finder(wire.id, lambda ids: self.transport.write(
            wire.frames([wire.answer % id for id in ids])))


class Tally:
    """Counts what arrives, and knows when the last did."""

    count = last = 0

    def add(self, number: int) -> None:
        self.count += number
        self.last = time.monotonic_ns()

    async def rate(self, total: float, began: float) -> float:
        """How many it were in a second, when all have arrived."""
        async with asyncio.timeout(60):
            while self.count < total:
                await asyncio.sleep(0.001)
        return total / (self.last - began) * 1e9


def p99(nanoseconds: Sequence[int]) -> float:
    """In microseconds."""
    return sorted(nanoseconds)[len(nanoseconds) * 99 // 100] / 1e3


class Scale(NamedTuple):
    """How much of it."""

    turns: int = 3
    seconds: float = 0.2   # for each figure in each turn
    pause: float = 0.25    # between events that are to be delivered without haste
    few: int = 100         # subscribers
    many: int = 1000
    topics: int = 10_000   # of each of ten connections


SCALES = {"": Scale(), "--quick": Scale(1, 0.1, few=50, many=300),
          "--smoke": Scale(1, 0.02, 0.02, 5, 10, 100)}
COLUMNS = {"bare": "bare FastAPI", "predecessors": "fastapi-websocket-rpc, -pubsub",
           "python_socketio": "python-socketio", "broadcast": "websockets.broadcast"}
MODULES = {"this_library": "fastapi_ws_lite", "python_socketio": "socketio",
           "predecessors": "fastapi_websocket_rpc, fastapi_websocket_pubsub"}
HANDSHAKE = ("GET {} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
             "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n{}\r\n")
ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # or imports would compile each time
IMPORT = """import sys, time, fastapi
count, began = len(sys.modules), time.perf_counter()
import {}
print((time.perf_counter() - began) * 1e3, len(sys.modules) - count)"""
ADD = '{"a":1,"b":2}'
MEGABYTE = compact({"data": [*({"name": f"user {number}", "score": 1.25, "tags": ["a", "b"]}
                               for number in range(20_000)), "end"]})


class Bench:
    """The servers, how they are measured, and the table."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.ports: dict[str, int] = {}

    async def start(self, name: str, function: str) -> None:
        self.processes[name] = process = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "ignore", __file__, "--bench-server", function, env=ENVIRONMENT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout
        self.ports[name] = int(await process.stdout.readline())

    async def tell(self, wire: Wire, *command: Any) -> list[float]:
        """Have a server do something: the numbers that it prints."""
        process = self.processes[wire.server]
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(command).encode() + b"\n")
        return list(json.loads(await process.stdout.readline()))

    @contextlib.asynccontextmanager
    async def peers(self, wire: Wire, count: int, topics: Sequence[str] = (),
                    ) -> AsyncIterator[list[Peer]]:
        """Connections to a server, which subscribe to topics if there are any."""
        protocol = f"Sec-WebSocket-Protocol: {wire.subprotocol}\r\n" if wire.subprotocol else ""
        handshake = HANDSHAKE.format(wire.events if topics else wire.path, protocol).encode()
        subscribe = wire.frames([wire.request % ("subscribe", json.dumps({"topics": topics}))])
        peers: list[Peer] = []
        for _ in range(count):
            _, peer = await asyncio.get_running_loop().create_connection(
                Peer, "127.0.0.1", self.ports[wire.server])
            peers.append(peer)
            await peer.ask(handshake, b"\r\n\r\n")
            if wire.hello:
                await peer.ask(wire.frames([wire.hello]), b'40{"')
            if topics:
                await peer.ask(subscribe, wire.mark)
        yield peers
        for peer in peers:
            peer.transport.abort()
        await asyncio.sleep(0.02 + count * 3e-4)  # in which the server sees it

    async def calls(self, wire: Wire, connections: int = 1, in_flight: int = 1, method: str = "add",
                    params: str = ADD, mark: bytes = b"") -> list[float]:
        """Calls in a second, and the p99 in microseconds of each turn's."""
        request = wire.request % (method, params)
        frames = [wire.frames([request] * number) for number in range(in_flight + 1)]
        tally, times = Tally(), array("q")

        def loaded(peer: Peer) -> Callable[[bytes], None]:
            asked = time.monotonic_ns()

            def seen(number: int) -> None:
                nonlocal asked
                tally.add(number)
                times.append(tally.last - asked)
                asked = tally.last
                peer.transport.write(frames[number])

            return counter(mark or wire.mark, seen)

        async with self.peers(wire, connections) as peers:
            for peer in peers:
                peer.handlers = [loaded(peer)]
                peer.transport.write(frames[in_flight])
            await asyncio.sleep(self.scale.seconds / 4)  # to warm up
            began, before, warm = time.monotonic_ns(), tally.count, len(times)
            while (now := time.monotonic_ns()) < began + self.scale.seconds * 1e9 or (
                    tally.count < before + 5):
                await asyncio.sleep(self.scale.seconds / 10)
            return [(tally.count - before) / (now - began) * 1e9, p99(times[warm:])]

    async def called(self, wire: Wire) -> list[float]:
        """Calls in a second of a server to its client."""
        async with self.peers(wire, 1) as [peer]:
            add = wire.request % ("add", ADD)  # the server answers in the dialect that it hears
            await peer.ask(wire.frames([add]), wire.mark)
            peer.handlers = [peer.answers(wire)]
            return await self.tell(wire, "call", self.scale.seconds)

    async def publish(self, wire: Wire, peers: list[Peer], burst: int = 1,
                      pause: float = 0) -> list[float]:
        """Deliveries in a second; and where there are pauses, their p99 in microseconds."""
        tally, times = Tally(), array("q", [0])

        def sent(moments: list[str]) -> None:
            tally.add(len(moments))
            times.extend(tally.last - int(moment) for moment in moments)

        for peer in peers:
            count = finder(rb'"t":(\d+)\D', sent) if pause else counter(b'"t":', tally.add)
            peer.handlers = [count, peer.answers(wire)] if wire is OLD else [count]
        seconds = self.scale.seconds * (5 if pause else 1)
        began, number, _ = await self.tell(wire, "publish", seconds, burst, pause)
        return [await tally.rate(number * len(peers), began), p99(times)]

    async def fan_out(self, wire: Wire, burst: int = 1) -> list[float]:
        async with self.peers(wire, self.scale.few, ["t"]) as peers:
            return await self.publish(wire, peers, burst)

    async def crowd(self, wire: Wire) -> list[float]:
        """Deliveries in a second, p99 of a few in microseconds, and KiB for each subscriber."""
        async with self.peers(wire, 10):
            [before] = await self.tell(wire, "resident")
            async with self.peers(wire, self.scale.many, ["t"]) as peers:
                [after] = await self.tell(wire, "resident")
                [rate, _] = await self.publish(wire, peers)
                [_, delay] = await self.publish(wire, peers, pause=self.scale.pause)
        return [rate, delay, (after - before) / self.scale.many]

    async def clients(self, wire: Wire) -> list[float]:
        """Calls in a second of a whole client, and deliveries to twenty of them."""
        address, tally = f"ws://127.0.0.1:{self.ports[wire.server]}", Tally()

        async def heard(data: Any, topic: str) -> None:
            tally.add(1)

        async with contextlib.AsyncExitStack() as stack:
            if wire is OLD:
                rpc = importlib.import_module("fastapi_websocket_rpc")
                caller = rpc.WebSocketRpcClient(address + wire.path, rpc.RpcMethodsBase())
            else:
                caller = RpcClient(address + wire.path)
            await stack.enter_async_context(caller)
            [calls] = await call_for(lambda: caller.other.add(a=1, b=2), self.scale.seconds)
            for _ in range(20):
                if wire is OLD:
                    pubsub = importlib.import_module("fastapi_websocket_pubsub")
                    theirs = pubsub.PubSubClient(["t"], callback=heard)
                    theirs.start_client(address + wire.events)
                    await theirs.wait_until_ready()
                    stack.push_async_callback(theirs.disconnect)
                else:
                    client = await stack.enter_async_context(PubSubClient(address + wire.events))
                    await client.subscribe("t", heard)
            began, number, _ = await self.tell(wire, "publish", self.scale.seconds, 1, 0)
            return [calls, await tally.rate(number * 20, began)]

    async def imports(self, wire: Wire) -> list[float]:
        """Milliseconds to import it after FastAPI, and how many modules come with it."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "ignore", "-c", IMPORT.format(MODULES[wire.server]),
            cwd=os.path.dirname(os.path.abspath(__file__)), env=ENVIRONMENT, stdout=subprocess.PIPE)
        return [float(word) for word in (await process.communicate())[0].split()]

    async def cost(self, wire: Wire) -> list[float]:
        """Microseconds of processor time to publish an event."""
        return [(await self.tell(wire, "publish", self.scale.seconds, 1, 0))[2] * 1e6]

    async def compare(self, measure: Action, ours: dict[str, Wire], others: Sequence[Wire],
                      *figures: tuple[str, str, Callable[[list[float]], float]]) -> None:
        """Measure by turns; a row for each figure (title, unit, which turn counts) of ours."""
        wires = [wire for wire in (*ours.values(), *others) if wire.server in self.ports]
        turns = [{wire: await measure(wire) for wire in wires} for _ in range(self.scale.turns)]
        for number, (title, unit, best) in enumerate(figures):
            value = {wire: best([turn[wire][number] for turn in turns]) for wire in wires}
            for name, own in ours.items():
                ratio = {wire.server: f"{value[own] / value[wire]:.2f}" for wire in wires
                         if value[wire]}
                shown = f"{value[own]:{',.0f' if value[own] >= 100 else '.3g'}} {unit}"
                row(title + name, shown, *(ratio.get(key, "") for key in COLUMNS))

    async def run(self) -> None:
        """Start the servers, and print the table as it is measured."""
        scale, servers = self.scale, {name: name for name in SERVERS} | {"crowded": "this_library"}
        for name in SERVERS:
            if missing := [m for m in MODULES.get(name, "").split(", ")
                           if m and not importlib.util.find_spec(m)]:
                print(f"without {servers.pop(name)}: {missing[0]} is not installed", flush=True)
        await asyncio.gather(*(self.start(*each) for each in servers.items()))
        prepare(core=1)
        row("measured", "this library", *COLUMNS.values())
        row("---", *["---:"] * (1 + len(COLUMNS)))
        lite, both = {"": LITE}, {"plain JSON-RPC": PLAIN, "ws-lite.1": LITE}
        all_three = both | {"ws-lite.1, a frame for each": APART}
        few, many = (f"{count:,} subscribers" for count in (scale.few, scale.many))
        callable, all_others = (BARE, OLD, SOCKETIO), (BARE, OLD, SOCKETIO, BROADCAST)
        await self.compare(self.crowd, lite, all_others,
                           (f"events to {many}", "/s", max),
                           (f"their p99, {1 / scale.pause:.0f} a second", "µs", median),
                           ("memory of a subscriber", "KiB", max))
        await self.compare(self.fan_out, lite, all_others, (f"events to {few}", "/s", max))
        await self.compare(partial(self.fan_out, burst=16), both, all_others,
                           (f"bursts of 16 events to {few}, ", "/s", max))
        await self.compare(self.calls, both, callable, ("calls one by one, ", "/s", max),
                           ("their p99, ", "µs", median))
        await self.compare(partial(self.calls, in_flight=64), all_three, callable,
                           ("64 calls in flight, ", "/s", max))
        await self.compare(partial(self.calls, connections=50, in_flight=8), all_three, callable,
                           ("8 in flight on each of 50 connections, ", "/s", max))
        await self.compare(self.called, both, callable[1:],
                           ("server calls its client, 64 in flight, ", "/s", max))
        await self.compare(self.clients, lite, [OLD],
                           ("a whole client, 64 calls in flight", "/s", max),
                           ("events to 20 whole clients in a process", "/s", max))
        large = partial(self.calls, method="echo", params=MEGABYTE, mark=b'"end"')
        await self.compare(large, {"": PLAIN}, callable,
                           (f"echo of {len(MEGABYTE) / 1e6:.1f} MB of JSON", "/s", max))
        topics = [f"topic/{number}" for number in range(scale.topics)]
        async with (self.peers(LITE, 1, ["t", *topics[:9]]), self.peers(CROWDED, 1, ["t"]),
                    self.peers(CROWDED, 10, topics)):
            crowd = f"{10 * len(topics):,} subscriptions on {len(topics):,} topics"
            await self.compare(self.cost, {crowd: CROWDED, "10": LITE}, (),
                               ("processor time of an event among ", "µs", min))
        await self.compare(self.imports, lite, [OLD, SOCKETIO], ("import after FastAPI", "ms", min),
                           ("modules imported", "", min))


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def bench(how: str = "") -> None:
    """What README.md says was measured, again; only when named. "bench --quick" is shorter."""
    async def run() -> None:
        measured = Bench(SCALES[how])
        try:
            await measured.run()
        finally:
            for process in measured.processes.values():
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    with asyncio.Runner(loop_factory=event_loop()) as runner:
        runner.run(run())


# ------------------------------------------------- backbones: what scaling out costs, on brokers
#
# For each broker that listens: its driver as one would use it by hand, and two endpoints, by turns,
# in one process; a client is connected to the second one by a WebSocket.

Append: TypeAlias = Callable[[Sequence[bytes]], Awaitable[Any]]
ByHand: TypeAlias = AsyncIterator[tuple[Append, AsyncIterator[Any]]]
BATCH = 256


async def redis_by_hand(url: str, name: str) -> ByHand:
    import redis.asyncio

    async def append(payloads: Sequence[bytes]) -> None:
        pipeline = client.pipeline(transaction=False)
        for payload in payloads:
            pipeline.xadd(name, {"payload": payload}, maxlen=4096)
        await pipeline.execute()

    async def follow() -> AsyncIterator[Any]:
        last: Any = "$"
        while True:
            found: Any = await client.xread({name: last}, block=1000)
            for id, fields in found[0][1] if found else ():
                yield fields[b"payload"]
                last = id

    async with redis.asyncio.Redis.from_url(url) as client:
        yield append, follow()
        await client.delete(name)


async def postgres_by_hand(url: str, name: str) -> ByHand:
    import asyncpg

    woken = asyncio.Event()
    writer, reader = await asyncpg.connect(url), await asyncpg.connect(url)
    await writer.execute(f'CREATE TABLE "{name}" (id bigserial PRIMARY KEY, payload bytea)')
    await reader.add_listener(name, lambda *_: woken.set())

    async def append(payloads: Sequence[bytes]) -> None:
        await writer.executemany(f'''WITH new AS (INSERT INTO "{name}" (payload) VALUES ($1))
            SELECT pg_notify('{name}', '')''', [(payload,) for payload in payloads])

    async def follow() -> AsyncIterator[Any]:
        last = await reader.fetchval(f'SELECT coalesce(max(id), 0) FROM "{name}"')
        while True:
            await woken.wait()
            woken.clear()
            page = await reader.fetch(
                f'SELECT id, payload FROM "{name}" WHERE id > $1 ORDER BY id', last)
            for id, payload in page:
                yield payload
                last = id

    yield append, follow()
    await writer.execute(f'DROP TABLE "{name}"')
    await writer.close()
    await reader.close()


async def rabbitmq_by_hand(url: str, name: str) -> ByHand:
    import aio_pika

    inbox: asyncio.Queue[Any] = asyncio.Queue()

    async def append(payloads: Sequence[bytes]) -> None:
        await asyncio.gather(*(channel.default_exchange.publish(aio_pika.Message(payload), name)
                               for payload in payloads))

    async def follow() -> AsyncIterator[Any]:
        await queue.consume(inbox.put, arguments={"x-stream-offset": "next"})
        while message := await inbox.get():
            yield message.body
            await message.ack()

    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.set_qos(BATCH)
        queue = await channel.declare_queue(name, durable=True,
                                            arguments={"x-queue-type": "stream"})
        yield append, follow()
        await queue.delete()


async def kafka_by_hand(url: str, name: str) -> ByHand:
    import aiokafka
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic

    options = {"bootstrap_servers": url.removeprefix("kafka://")}
    admin = AIOKafkaAdminClient(**options)
    await admin.start()
    await admin.create_topics([NewTopic(name, 1, 1)])
    producer, consumer = aiokafka.AIOKafkaProducer(**options), aiokafka.AIOKafkaConsumer(**options)
    await producer.start()
    await consumer.start()
    consumer.assign([partition := aiokafka.TopicPartition(name, 0)])

    async def append(payloads: Sequence[bytes]) -> None:
        await asyncio.gather(*[
            await producer.send(name, payload, partition=0) for payload in payloads])

    async def follow() -> AsyncIterator[Any]:
        await consumer.seek_to_end(partition)
        while record := await consumer.getone():
            yield record.value

    yield append, follow()
    await admin.delete_topics([name])
    for client in (consumer.stop, producer.stop, admin.close):
        await client()


async def nats_by_hand(url: str, name: str) -> ByHand:
    import nats

    async def append(payloads: Sequence[bytes]) -> None:
        await asyncio.gather(*[await stream.publish_async(name, p) for p in payloads])

    async def follow() -> AsyncIterator[Any]:
        entries = await stream.subscribe(name, ordered_consumer=True)
        while True:
            with contextlib.suppress(TimeoutError):
                yield (await entries.next_msg()).data

    async with await nats.connect(url) as client:
        stream = client.jetstream()
        await stream.add_stream(name=name, subjects=[name], max_msgs=4096)
        yield append, follow()
        await stream.delete_stream(name)


BROKERS: dict[str, tuple[str, Callable[[str, str], ByHand]]] = {
    "Redis": ("redis://127.0.0.1:6379", redis_by_hand),
    "PostgreSQL": ("postgresql://postgres@127.0.0.1:5432/test", postgres_by_hand),
    "RabbitMQ": ("amqp://guest:guest@127.0.0.1:5672/", rabbitmq_by_hand),
    "Kafka": ("kafka://127.0.0.1:9092", kafka_by_hand),
    "NATS": ("nats://127.0.0.1:4222", nats_by_hand),
}


async def rate(append: Callable[[], Awaitable[Any]], seconds: float) -> float:
    """Events a second, in batches that are awaited."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        await append()
        count += BATCH
    return count / (time.perf_counter() - began)


async def delays(send: Callable[[], Awaitable[Any]], entries: AsyncIterator[Any],
                 count: int) -> list[float]:
    """Milliseconds from before something is appended until it has been read, one by one."""
    found = []
    for _ in range(count):
        reading = asyncio.ensure_future(anext(entries))
        await asyncio.sleep(0.01)
        began = time.perf_counter()
        await send()
        await reading
        found.append((time.perf_counter() - began) * 1e3)
        if sum(found) > 1000:  # a slow one
            break
    return found


async def compare_backbone(title: str, url: str, by_hand: Any, turns: int, seconds: float,
                           count: int) -> None:
    name = f"bench_{os.getpid()}"
    one, two = (PubSubEndpoint(backbone=url, channel=f"{name}_2") for _ in range(2))
    app = FastAPI()
    two.register_route(app, "/ws")
    data, raw, ours = "x" * 100, list[float](), list[float]()
    hand = contextlib.asynccontextmanager(by_hand)(url, name)
    async with hand as (append, entries), serving(app) as server:
        publish, payloads = one.publish, [b"x" * 150] * BATCH

        async def publish_batch() -> None:
            for receipt in [publish("other", data) for _ in payloads]:
                await receipt

        await publish("other", data)
        rates: tuple[list[float], list[float]] = [], []
        for _ in range(turns):
            rates[0].append(await rate(lambda: append(payloads), seconds))
            rates[1].append(await rate(publish_batch, seconds))
        port = server.sockets[0].getsockname()[1]
        async with PubSubClient(f"ws://127.0.0.1:{port}/ws") as client:
            heard: Any = aiter(await client.subscribe("t"))
            reading = asyncio.ensure_future(anext(entries))
            await asyncio.sleep(0.2)
            await append([b"last"])
            while await reading != b"last":  # but those of before
                reading = asyncio.ensure_future(anext(entries))
            for _ in range(turns):
                raw += await delays(lambda: append([b"x" * 150]), entries, count)
                ours += await delays(lambda: publish("t", data), heard, count)
            await heard.aclose()
    for endpoint in (two, one):
        await endpoint.close()
    row(title, f"{max(rates[1]):,.0f} /s", f"{max(rates[1]) / max(rates[0]):.2f}",
        f"{median(ours):.2f} ms", f"{median(ours) / median(raw):.2f}")


async def backbones(how: str = "") -> None:
    """What a backbone costs, for each broker that listens; only when named."""
    turns, seconds, count = (1, 0.05, 3) if how == "--smoke" else (5, 0.4, 40)
    row("broker", "events, awaited 256 at a time", "to its driver by hand", "from one server to a"
        " client of the other, p50", "to its driver by hand")
    row("---", *["---:"] * 4)
    for title, (url, by_hand) in BROKERS.items():
        url = os.environ.get(f"TEST_{url.partition(':')[0].upper()}_URL", url)
        host, _, port = url.rpartition("@")[2].rpartition("//")[2].partition("/")[0].partition(":")
        try:
            (await asyncio.open_connection(host, int(port)))[1].close()
        except OSError:
            row(title, "nothing listens", "", "", "")
        else:
            await compare_backbone(title, url, by_hand, turns, seconds, count)


# ----------------------------------------------------------------------- dashboard: in the browser

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Dashboard</title>
<link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif;
    --back: light-dark(#f4f5f8, #0e1116); --card: light-dark(#fff, #171b22);
    --line: light-dark(#e3e6ec, #272d37); --text: light-dark(#1b2130, #e7eaf0);
    --soft: light-dark(#667085, #8b95a7); --main: light-dark(#3b5bdb, #7c9aff);
    --good: light-dark(#12915c, #3ecf8e); --bad: light-dark(#d9480f, #ff8f5a); }
  * { box-sizing: border-box; margin: 0; }
  body { background: var(--back); color: var(--text); padding: 2rem clamp(1rem, 4vw, 3rem); }
  main, header { max-width: 68rem; margin: 0 auto; }
  header { display: flex; align-items: center; gap: .9rem; margin-bottom: 1.4rem; }
  h1 { font-size: 1.3rem; font-weight: 650; letter-spacing: -.015em; margin-right: auto; }
  h2 { font-size: .8rem; font-weight: 600; color: var(--soft); margin-bottom: .6rem; }
  main { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1rem; }
  section { background: var(--card); border: 1px solid var(--line); border-radius: 14px;
    padding: 1rem 1.2rem; min-width: 0; }
  .tile h2 { margin-bottom: .2rem; } .wide { grid-column: span 4; } .half { grid-column: span 2; }
  .number { font-size: 1.9rem; font-weight: 600; letter-spacing: -.03em; line-height: 1.2;
    font-variant-numeric: tabular-nums; }
  .number small { font-size: .9rem; font-weight: 500; color: var(--soft); letter-spacing: 0; }
  .pill { display: flex; align-items: center; gap: .5rem; padding: .3rem .8rem; font-size: .85rem;
    border: 1px solid var(--line); border-radius: 99px; background: var(--card); }
  .pill::before { content: ""; width: .55rem; height: .55rem; border-radius: 50%;
    background: var(--bad); transition: background .3s; }
  .ready .pill::before { background: var(--good); }
  .number, svg, progress { transition: opacity .4s; }
  body:not(.ready) :is(.number, svg) { opacity: .35; }
  svg { display: block; width: 100%; height: 11rem; overflow: visible; }
  svg path { fill: none; stroke: var(--main); stroke-width: 2; stroke-linejoin: round;
    vector-effect: non-scaling-stroke; }
  svg .area { fill: var(--main); stroke: none; opacity: .1; }
  svg .grid { stroke: var(--line); stroke-width: 1; }
  .head { display: flex; justify-content: space-between; align-items: baseline; }
  button, input { font: inherit; color: inherit; border-radius: 9px; padding: .42rem .9rem;
    border: 1px solid var(--line); background: transparent; min-width: 0; }
  button { cursor: pointer; font-weight: 550; font-size: .92rem; flex: none; }
  button:hover { border-color: var(--main); }
  button.main { background: var(--main); border-color: var(--main); color: var(--card); }
  button:disabled { opacity: .5; cursor: default; }
  :focus-visible { outline: 2px solid var(--main); outline-offset: 2px; }
  .row { display: flex; gap: .6rem; align-items: center; margin-top: .8rem; }
  progress { appearance: none; width: 100%; height: .5rem; border: 0; display: block;
    margin: .6rem 0 1.1rem; }
  progress::-webkit-progress-bar { background: var(--line); border-radius: 99px; }
  progress::-webkit-progress-value { background: var(--main); border-radius: 99px;
    transition: inline-size .12s; }
  progress::-moz-progress-bar { background: var(--main); border-radius: 99px; }
  .soft { color: var(--soft); font-size: .88rem; } #step { margin-left: auto; }
  p.soft { margin-top: 1rem; } #text { flex: 1; }
  #log { height: 9.5rem; overflow-y: auto; scrollbar-width: thin; display: flex;
    flex-direction: column; gap: .25rem; }
  #log > :first-child { margin-top: auto; }
  #log b { font-weight: 600; color: hsl(var(--hue) 55% 50%); margin-right: .5rem; }
  #log i { color: var(--soft); font-style: normal; font-size: .85rem; text-align: center; }
  #log p { overflow-wrap: anywhere; }
  @media (max-width: 46rem) { .half { grid-column: span 4 } .tile { grid-column: span 2 } }
</style>
<body>
<header>
  <h1>Dashboard</h1>
  <span class="pill" role="status" id="state">connecting</span>
  <button id="restart">Restart the server</button>
</header>
<main>
  <section class="tile"><h2>Pages connected</h2><p class="number" id="pages">-</p></section>
  <section class="tile"><h2>Events delivered</h2><p class="number" id="events">-</p></section>
  <section class="tile"><h2>Round trip</h2>
    <p class="number"><span id="trip">-</span> <small>ms</small></p></section>
  <section class="tile"><h2>Server up for</h2>
    <p class="number"><span id="up">-</span> <small>s</small></p></section>
  <section class="wide">
    <div class="head"><h2>Load, in the last 40 seconds</h2>
      <p class="number"><span id="load">-</span> <small>%</small></p></div>
    <svg viewBox="0 0 199 100" preserveAspectRatio="none" role="img" aria-label="load">
      <path class="grid" d="M0 0H199M0 50H199M0 100H199"/>
      <path class="area" id="area"/><path id="curve"/></svg>
  </section>
  <section class="half">
    <h2>A call that streams how far it is</h2>
    <p class="number"><span id="done">0</span> <small>%</small></p>
    <progress id="bar" value="0" max="80" aria-label="progress"></progress>
    <div class="row"><button class="main" id="build">Build</button>
      <button id="stop" disabled>Stop</button><span class="soft" id="step">not running</span></div>
    <p class="soft">Leaving the loop over the stream ends the generator at the server, where
      <span id="jobs">0</span> of them run.</p>
  </section>
  <section class="half">
    <h2>Chat between tabs</h2>
    <div id="log" aria-live="polite"><i>open this page in another tab, too</i></div>
    <form class="row" id="chat"><input id="name" size="8" aria-label="your name">
      <input id="text" placeholder="say something" aria-label="message" autocomplete="off">
      <button>Send</button></form>
  </section>
</main>
<script type="module">
import { connect } from "/ws-lite.js";

const $ = (id) => document.getElementById(id);
const show = (texts) => Object.keys(texts).forEach((id) => { $(id).textContent = texts[id]; });
const loads = Array(200).fill(null); // five a second; null while nothing is known
let load = null, was, leave = false;

const onGap = () => note("some of it may be missing here");
const ws = connect("/ws", { maxDelay: 2, onState, onGap });

function onState(state) {
  document.body.classList.toggle("ready", state === "ready");
  show({ state: { ready: "live", waiting: "the server is away" }[state] ?? state });
  if (state === "ready" && was) note("the server is back");
  if (state === "waiting" && was === "ready") note("the server went away");
  if (state !== "ready") load = null;
  if (state !== "connecting") was = state;
}

ws.subscribe("numbers", ({ load: now, ...others }) => {
  load = now;
  show({ load: now.toFixed(1) });
  for (const id in others) show({ [id]: others[id].toLocaleString() });
});
setInterval(() => {
  loads.push(load);
  loads.shift();
  const runs = [[]]; // of neighbours that are known
  loads.forEach((y, x) => (y === null ? runs.push([]) : runs.at(-1).push(`${x} ${100 - y}`)));
  const lines = runs.filter((run) => run.length > 1).map((run) => "M" + run.join("L"));
  $("curve").setAttribute("d", lines.join(""));
  $("area").setAttribute("d", lines.map((line) => {
    const [from, to] = [line.slice(1).split(" ")[0], line.split("L").at(-1).split(" ")[0]];
    return `${line}L${to} 100L${from} 100Z`;
  }).join(""));
}, 200);
setInterval(async () => {
  if (ws.state !== "ready") return;
  const began = performance.now();
  await ws.call("_ping_").catch(() => {});
  show({ trip: (performance.now() - began).toFixed(1) });
}, 1000);

$("build").onclick = async () => {
  [$("build").disabled, $("stop").disabled, $("bar").value, leave] = [true, false, 0, false];
  try {
    for await (const { done, what } of ws.stream("build", { steps: 80 })) {
      $("bar").value = done;
      show({ step: what, done: Math.round(done / 0.8) });
      if (leave) break;
    }
    show({ step: leave ? "stopped" : "done" });
  } catch (error) { show({ step: error.message }); }
  [$("build").disabled, $("stop").disabled] = [false, true];
};
$("stop").onclick = () => { leave = true; };
$("restart").onclick = () => ws.notify("restart");

function add(...nodes) {
  const line = document.createElement(nodes.length > 1 ? "p" : "i");
  line.append(...nodes);
  $("log").append(line);
  while ($("log").childElementCount > 200) $("log").firstElementChild.remove();
  $("log").scrollTop = $("log").scrollHeight;
}
const note = (text) => add(`${new Date().toLocaleTimeString()} · ${text}`);
ws.subscribe("chat", ({ name, text }) => {
  const from = Object.assign(document.createElement("b"), { textContent: name });
  const hue = [...name].reduce((sum, char) => (sum * 31 + char.codePointAt(0)) % 360, 7);
  from.style.setProperty("--hue", hue);
  add(from, text);
});
$("name").value = localStorage.name ??= "guest " + Math.ceil(Math.random() * 99);
$("name").onchange = () => { localStorage.name = $("name").value; };
$("chat").onsubmit = (event) => {
  event.preventDefault();
  const said = { name: $("name").value, text: $("text").value };
  if (said.text) ws.publish("chat", said, { includeSelf: true }).catch((e) => note(e.message));
  $("text").value = "";
};
</script>
"""


class Dashboard(RpcMethodsBase):
    """What its pages call."""

    def __init__(self) -> None:
        self.jobs, self.restarting = 0, False

    async def build(self, steps: int) -> AsyncIterator[dict[str, Any]]:
        """Long work, which tells how far it is; it ends where a page leaves its loop."""
        self.jobs += 1
        try:
            for step in range(steps):
                await asyncio.sleep(random.uniform(0.01, 0.09))
                what = ("compiling", "linking", "testing", "packing")[4 * step // steps]
                yield {"done": step + 1, "what": what}
        finally:
            self.jobs -= 1

    async def restart(self) -> None:
        self.restarting = True


async def dashboard_server(listener: socket.socket) -> bool:
    """Serve until someone wants to restart it, or to end it; returns whether to restart."""
    app, work = FastAPI(), Dashboard()
    endpoint = PubSubEndpoint(work)
    endpoint.register_route(app, "/ws", browser_client="/ws-lite.js")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    task = asyncio.create_task(server.serve([listener]))
    load, began = 50.0, time.monotonic()
    while not task.done() and not work.restarting:
        load = min(100, max(0, load + random.uniform(-6, 6) + (50 - load) / 25))
        stats = endpoint.stats()
        endpoint.publish("numbers", {
            "load": load, "pages": stats["channels"], "events": stats["events_delivered"],
            "jobs": work.jobs, "up": int(time.monotonic() - began)})
        await asyncio.wait([task], timeout=0.2)
    await endpoint.close()
    server.should_exit = True
    await task
    return work.restarting


def dashboard(port: int = 0) -> None:
    """A page in a browser: live numbers, progress, a chat; it survives a restart of the server."""
    shown = False
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            with socket.create_server(("127.0.0.1", port)) as listener:
                if port != listener.getsockname()[1] or not shown:
                    port, shown = listener.getsockname()[1], True
                    print(f"http://127.0.0.1:{port}/ shows it, until Ctrl-C", flush=True)
                if not asyncio.run(dashboard_server(listener)):
                    return
            time.sleep(2)  # long enough to see that it is away


SCENARIOS: dict[str, Callable[[], Any]] = {
    function.__name__: function
    for function in (demo, calls, both_ways, validation, errors, typed, streams, events,
                     events_in_process, authorisation, reconnecting, a_backbone_of_ones_own,
                     without_a_loop)
}
ALL = SCENARIOS | {"bench": bench, "backbones": backbones,  # which run when they are named
                   "dashboard": dashboard}


def run(name: str) -> None:
    began = time.perf_counter()
    result = ALL[name]()
    if inspect.iscoroutine(result):
        asyncio.run(result)
    print(f"{name}: done in {time.perf_counter() - began:.2f} s", flush=True)


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.ERROR)
    match arguments:
        case ["--serve"]:
            asyncio.run(serve())
        case ["--agent", url, name, other]:
            asyncio.run(agent(url, name, other))
        case ["--bench-server", name]:
            with asyncio.Runner(loop_factory=event_loop()) as runner:
                runner.run(bench_server(name))
        case ["bench", how] if how in SCALES:
            bench(how)
        case ["dashboard", port] if port.isdigit():
            dashboard(int(port))
        case ["backbones", how] if how in SCALES:
            asyncio.run(backbones(how))
        case _ if unknown := [name for name in arguments if name not in ALL]:
            print(f"unknown: {', '.join(unknown)}; there are: {', '.join(ALL)}")
            return 2
        case _:
            if not arguments:
                for name, function in ALL.items():
                    print(f"{name:18} {function.__doc__}")
            for name in arguments or SCENARIOS:
                run(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi", "uvicorn[standard]"]
# ///
"""What fastapi_ws_lite does, one scenario a function.

    python examples.py              lists the scenarios
    python examples.py NAME...      runs those; "all" runs the quick ones

Each is complete, and fails if what it shows does not happen. ``demo`` is a server and two clients,
each in a process of its own. ``fleet`` is two servers and three agents. ``bench`` measures; with
``--quick`` for a few seconds. ``dashboard`` serves a page until Ctrl-C. The others run app and client
in one process, joined by ASGITransport; leave ``transport`` out to connect to a real server.
"""

import asyncio
import contextlib
import importlib
import inspect
import json
import logging
import os
import random
import resource
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import date
from typing import Annotated, Any, Protocol

import uvicorn
from fastapi import Cookie, Depends, FastAPI, Header, Response, WebSocket, WebSocketException
from fastapi.responses import HTMLResponse, PlainTextResponse
from pydantic import BaseModel, Field

from fastapi_ws_lite import (
    ALL_TOPICS, ASGITransport, ChannelClosed, Event, EventNotifier, Fleet, Forbidden, InvalidParams,
    MessageTooLarge, MethodNotFound, Overloaded, PubSubClient, PubSubEndpoint, Refused,
    RequestTimeout, RpcChannel, RpcClient, RpcEndpoint, RpcError, RpcMethodsBase, RpcRequest,
    connect, register_browser_client,
)

# ------------------------------------------------------------------ demo: a server and two clients


class Control(RpcMethodsBase):
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
    endpoint = PubSubEndpoint(Control())
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


# ------------------------------------------------------------------- fleet: two servers, three agents


def redis_is_there() -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", 6379), 1):
        return True
    return False


async def fleet_server() -> None:
    """A server's process: agents connect to it, and it calls any agent of the fleet by its name."""
    app = FastAPI()
    endpoint = PubSubEndpoint(backbone="redis://localhost" if redis_is_there() else None,
                              channel="fastapi_ws_lite_examples")
    fleet = Fleet(endpoint)
    endpoint.register_route(app, "/admin")

    @app.websocket("/agents/{name}")
    async def agents(websocket: WebSocket, name: str) -> None:
        await endpoint.main_loop(websocket, identity=name)

    @endpoint.method
    async def online() -> list[str]:
        return sorted(fleet.online())

    @endpoint.method
    async def call(name: str, method: str) -> Any:
        try:
            return (await fleet.call(name, method, timeout=5)).result
        except ChannelClosed as error:
            return f"error: {error}"

    @endpoint.method
    async def gather(method: str) -> dict[str, Any]:
        answers = await fleet.call_all(method, timeout=5)
        return {name: getattr(answer, "result", str(answer)) for name, answer in answers.items()}

    async with serving(app) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await endpoint.close()


class NamedAgent(RpcMethodsBase):
    def __init__(self, name: str) -> None:
        self.name = name

    async def version(self) -> str:
        return f"{self.name} runs 1.0"


async def fleet() -> None:
    """Two servers on Redis (or one, without it) and three agents; one server is killed."""
    processes = [subprocess.Popen([sys.executable, __file__, "--fleet-server"], text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                 for _ in range(2 if redis_is_there() else 1)]
    urls = [f"ws://127.0.0.1:{(await asyncio.to_thread(p.stdout.readline)).strip()}"  # type: ignore[union-attr]
            for p in processes]
    try:
        async with contextlib.AsyncExitStack() as open_ones:
            for name, url in (("ann", urls[0]), ("bob", urls[0]), ("cid", urls[-1])):
                await open_ones.enter_async_context(
                    PubSubClient(f"{url}/agents/{name}", NamedAgent(name)))
            last = await open_ones.enter_async_context(RpcClient(f"{urls[-1]}/admin"))
            while len(online := (await last.other.online()).result) < 3:
                await asyncio.sleep(0.05)
            say(f"online, as the last of {len(urls)} servers knows: {', '.join(online)}")
            said = (await last.other.call("ann", "version")).result
            say(f"ann, who is connected to the first one: {said}")
            everybody = (await last.other.gather("version")).result
            say(f"everybody: {everybody}")
            assert said == "ann runs 1.0" and len(everybody) == 3
            if len(processes) > 1:
                processes[0].kill()
                while len(online := (await last.other.online()).result) > 1:
                    await asyncio.sleep(0.2)
                say(f"the first server was killed; online: {', '.join(online)}")
                say("ann: " + (await last.other.call("ann", "version")).result)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


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


class Order(BaseModel):
    item: str
    amount: int = Field(gt=0)
    due: date


class Shop(Protocol):
    """What a client knows of the methods of ``Till``, if it does not have the class."""

    async def total(self, orders: list[Order]) -> float: ...


class Till(RpcMethodsBase):
    async def total(self, orders: list[Order]) -> float:
        return sum(order.amount for order in orders) * 1.5

    async def next_due(self, orders: list[Order]) -> Order:
        return min(orders, key=lambda order: order.due)


async def typed() -> None:
    """Arguments are validated by their type hints; a proxy has the types of a class."""
    app = FastAPI()
    RpcEndpoint(Till()).register_route(app, "/rpc")
    orders = [Order(item="tea", amount=2, due=date(2030, 1, 2)),
              Order(item="jam", amount=1, due=date(2030, 1, 1))]
    async with RpcClient("ws://test/rpc", transport=ASGITransport(app)) as client:
        assert (await client.other.next_due(orders=orders)).result["due"] == "2030-01-01"
        till = client.proxy(Till, timeout=5)
        assert await till.next_due(orders) == orders[1]   # an Order, and not its JSON
        assert await client.proxy(Shop).total(orders=orders) == 4.5
        try:
            await client.other.total(orders=[{"item": "tea", "amount": 0, "due": "soon"}])
        except InvalidParams as error:
            assert [problem["loc"] for problem in error.data] == [
                ["orders", 0, "amount"], ["orders", 0, "due"]]


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
        assert [percent async for percent in client.stream("work", {"steps": 4})] == [25, 50, 75, 100]
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

    def may(channel: RpcChannel, action: str, names: tuple[str, ...]) -> bool:
        return all(name.startswith(f"{channel.identity}/") for name in names)

    app = FastAPI()
    endpoint = PubSubEndpoint(authorize=may)

    @app.websocket("/events")
    async def events(websocket: WebSocket, user: Annotated[str, Depends(user)]) -> None:
        await endpoint.main_loop(websocket, identity=user)

    def client(token: str) -> PubSubClient:
        return PubSubClient("ws://test/events", headers={"token": token},
                            transport=ASGITransport(app))

    async with client("secret-of-ann") as ann:
        await ann.subscribe("ann/inbox", print)
        try:
            await ann.subscribe("bob/inbox", print)
        except Forbidden as error:
            assert error.data["topics"] == ["bob/inbox"]
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


async def last_messages() -> None:
    """The last messages come first when one joins, and are not repeated at a reconnect."""
    app = FastAPI()
    endpoint = PubSubEndpoint()
    endpoint.register_route(app, "/ws")
    async with PubSubClient("ws://test/ws", transport=ASGITransport(app)) as client:
        for number in range(5):
            await endpoint.publish("room/1", number)
        messages = client.subscribe("room/1", last=3)
        assert [(await messages.next(timeout=5)).data for _ in range(3)] == [2, 3, 4]
        assert endpoint.subscribers("room/1") == list(endpoint.channels.values())


async def snapshot_plus_changes() -> None:
    """A method returns the state and its position; the client subscribes to what came after."""
    app, prices = FastAPI(), {"tea": 3}
    endpoint = PubSubEndpoint()
    endpoint.register_route(app, "/ws")

    def change(item: str, price: int) -> None:            # no await between the two
        prices[item] = price
        endpoint.publish("prices", {"item": item, "price": price})

    @endpoint.method
    async def snapshot() -> dict[str, Any]:
        return {"prices": dict(prices), "position": endpoint.position}

    async with PubSubClient("ws://test/ws", transport=ASGITransport(app)) as client:
        state = (await client.other.snapshot()).result
        change("jam", 5)                                  # neither lost nor doubled
        changes = client.subscribe("prices", since=state["position"])
        assert (await changes.next(timeout=5)).data == {"item": "jam", "price": 5}


# -------------------------------------------------------------------------------------- recipes


async def login_with_a_cookie() -> None:
    """A page logs in over HTTP; its cookie says who it is on the WebSocket."""
    app, sessions = FastAPI(), dict[str, str]()
    endpoint = PubSubEndpoint(authorize=lambda channel, action, names: action != "publish")
    register_browser_client(app, "/ws-lite.js")

    @app.post("/login")
    async def login(name: str, response: Response) -> None:
        response.set_cookie("session", f"secret of {name}", httponly=True, samesite="strict")
        sessions[f"secret of {name}"] = name

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

    sessions["secret"] = "ann"                            # as login does
    async with PubSubClient("ws://test/ws", headers={"cookie": "session=secret"},
                            transport=ASGITransport(app)) as client:
        assert (await client.other.whoami()).result == "ann"


async def a_token_that_expires() -> None:
    """The server closes with 4401, and the client comes back with a fresh token: nothing is lost."""
    app, tokens = FastAPI(), iter(range(100))
    endpoint = PubSubEndpoint()

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
    app = FastAPI()
    endpoint = PubSubEndpoint()
    endpoint.register_route(app, "/ws")
    async with PubSubClient("ws://test/ws", transport=ASGITransport(app)) as client:
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

    app = FastAPI()
    RpcEndpoint(Calculator(), middleware=[limit]).register_route(app, "/ws")
    async with RpcClient("ws://test/ws", transport=ASGITransport(app)) as client:
        calls = [client.other.add(a=1, b=2) for _ in range(10)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(answer, Overloaded) for answer in answers) >= 5


async def tracing() -> None:
    """OpenTelemetry: a span for each call, in the trace of the caller on the other side."""
    from opentelemetry import propagate, trace

    seen = []

    async def span(request: RpcRequest, call_next: Callable[[RpcRequest], Awaitable[Any]]) -> Any:
        tracer, context = trace.get_tracer("rpc"), propagate.extract(request.meta)
        with tracer.start_as_current_span(request.method, context=context) as span:
            seen.append(span.get_span_context().trace_id)
            return await call_next(request)

    app = FastAPI()
    RpcEndpoint(Calculator(), middleware=[span]).register_route(app, "/ws")
    parent = trace.SpanContext(7, 8, is_remote=False, trace_flags=trace.TraceFlags(1))
    async with RpcClient("ws://test/ws", transport=ASGITransport(app)) as client:
        with trace.use_span(trace.NonRecordingSpan(parent)):
            meta: dict[str, str] = {}
            propagate.inject(meta)
            await client.call("add", {"a": 1, "b": 2}, meta=meta)
    assert 7 in seen


async def a_database_session_per_call() -> None:
    """A dependency with yield, as in a route: a commit that fails is the caller's error."""
    database = sqlite3.connect(":memory:", check_same_thread=False)
    database.execute("CREATE TABLE orders (item TEXT UNIQUE DEFERRABLE)")

    def session() -> Iterator[sqlite3.Connection]:
        with database:                                    # commits, or rolls back
            yield database

    class Orders(RpcMethodsBase):
        async def save(self, item: str,
                       db: Annotated[sqlite3.Connection, Depends(session)]) -> int:
            return db.execute("INSERT INTO orders VALUES (?)", [item]).lastrowid or 0

    app = FastAPI()
    RpcEndpoint(Orders()).register_route(app, "/ws")
    async with RpcClient("ws://test/ws", transport=ASGITransport(app)) as client:
        assert (await client.other.save(item="tea")).result == 1
        try:
            await client.other.save(item="tea")
        except RpcError as error:
            assert "error_id" in error.data               # which stands in the server's log
    assert database.execute("SELECT count(*) FROM orders").fetchone() == (1,)
    database.close()


async def prometheus() -> None:
    """The gauges and counters of an endpoint in Prometheus' text format."""
    app = FastAPI()
    endpoint = PubSubEndpoint()
    endpoint.register_route(app, "/ws")

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> str:
        numbers = {k: v for k, v in endpoint.stats().items() if isinstance(v, int)}
        return "".join(f"ws_{name} {value}\n" for name, value in numbers.items())

    await endpoint.publish("news", 1)
    assert "ws_events_published 1\n" in metrics()


async def server_sent_events() -> None:
    """For those who cannot use WebSockets; Last-Event-ID is the position."""
    from fastapi.sse import EventSourceResponse, ServerSentEvent

    app = FastAPI()
    endpoint = PubSubEndpoint()
    endpoint.register_route(app, "/ws")

    @app.get("/news", response_class=EventSourceResponse)
    async def news(last_event_id: Annotated[str | None, Header()] = None,
                   ) -> AsyncIterator[ServerSentEvent]:
        async with PubSubClient("ws://inside/ws", transport=ASGITransport(app)) as client:
            async for event in client.subscribe("news", since=last_event_id):
                yield ServerSentEvent(data=event.data, id=event.position)

    async with serving(app) as server:
        began = endpoint.position
        await endpoint.publish("news", "hello")
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/news"
        request = urllib.request.Request(url, headers={"Last-Event-ID": began})
        with await asyncio.to_thread(urllib.request.urlopen, request, timeout=10) as answer:
            lines = [await asyncio.to_thread(answer.readline) for _ in range(2)]
        assert b'data: "hello"\n' in lines, lines


class NatsLog:
    """A backbone of one's own: a NATS JetStream stream. PubSubEndpoint(backbone=NatsLog(...))."""

    max_size = 2**20 - 2**10                              # NATS' max_payload, less the subject

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name, self.client, self.place = url, name, None, -1
        self.nats: Any = importlib.import_module("nats")

    async def stream(self) -> Any:
        nats = self.nats
        if self.client is None or not self.client.is_connected:
            await self.close()
            self.client = await nats.connect(self.url, allow_reconnect=False, connect_timeout=5)
            try:
                await self.client.jetstream().stream_info(self.name)
            except nats.js.errors.NotFoundError:
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
    with contextlib.suppress(OSError, ImportError), socket.create_connection(("127.0.0.1", 4222), 1):
        servers = [PubSubEndpoint(backbone=NatsLog("nats://localhost", "fastapi_ws_lite_examples"))
                   for _ in range(2)]
        app = FastAPI()
        servers[0].register_route(app, "/ws")
        async with PubSubClient("ws://test/ws", transport=ASGITransport(app)) as client:
            news = await client.subscribe("news")
            await servers[1].publish("news", "from the other server")
            assert (await news.next(timeout=10)).data == "from the other server"
        for endpoint in servers:
            await endpoint.close()


# -------------------------------------------------------------------------- without an event loop


def without_a_loop() -> None:
    """A notebook, a script or a thread: calls return the bare result, events come one by one."""
    app = FastAPI()
    PubSubEndpoint(Calculator()).register_route(app, "/ws")

    remote = connect("ws://test/ws", transport=ASGITransport(app))     # usable in the next cell
    assert remote.add(a=1, b=2) == 3
    assert remote.proxy(Calculator).factor(6) == [1, 2, 3, 6]
    events = remote.events("news")                        # from here on, nothing is missed
    remote.publish("news", {"n": 1}, include_self=True)
    assert events.next(timeout=5).data == {"n": 1}
    events.close()
    remote.close()


# ------------------------------------------------------------------------------------------ bench
# BENCH


async def bench_server(name: str) -> None:
    """A server's process for ``bench``."""


def bench(quick: bool = False) -> None:
    """Processor time per call and per delivery, beside rates."""


PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Dashboard</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif;
    --back: light-dark(#f4f5f8, #0e1116); --card: light-dark(#fff, #171b22);
    --line: light-dark(#dfe3ea, #2b323e); --text: light-dark(#1b2130, #e7eaf0);
    --soft: light-dark(#5d6779, #98a2b3); --main: light-dark(#3b5bdb, #7c9aff); }
  * { box-sizing: border-box; margin: 0; }
  body { background: var(--back); color: var(--text); padding: 2rem clamp(1rem, 4vw, 3rem); }
  main, header { max-width: 64rem; margin: 0 auto 1rem; display: flex; flex-wrap: wrap; gap: 1rem; }
  header { align-items: center; } h1 { font-size: 1.3rem; margin-right: auto; }
  section { background: var(--card); border: 1px solid var(--line); border-radius: 14px;
    padding: 1rem 1.2rem; flex: 1 1 13rem; min-width: 0; } .wide { flex-basis: 24rem; }
  h2, .soft { font-size: .85rem; font-weight: 500; color: var(--soft); }
  .number { font-size: 1.9rem; font-weight: 600; font-variant-numeric: tabular-nums; }
  .pill { padding: .3rem .8rem; border: 1px solid var(--line); border-radius: 99px; }
  .pill::before { content: "\25cf  "; color: #d9480f; } .ready .pill::before { color: #12915c; }
  body:not(.ready) .number { opacity: .35; }
  button, input { font: inherit; color: inherit; border-radius: 9px; padding: .42rem .9rem;
    border: 1px solid var(--line); background: transparent; min-width: 0; }
  button { cursor: pointer; } button:disabled { opacity: .5; cursor: default; }
  button.main { background: var(--main); border-color: var(--main); color: var(--card); }
  :focus-visible { outline: 2px solid var(--main); outline-offset: 2px; }
  .row { display: flex; gap: .6rem; align-items: center; margin-top: .8rem; } #text { flex: 1; }
  progress { width: 100%; accent-color: var(--main); margin: .6rem 0; }
  #log { height: 9.5rem; overflow-y: auto; overflow-wrap: anywhere; }
  #log b { color: hsl(var(--hue) 55% 50%); margin-right: .5rem; } #log i { color: var(--soft); }
</style>
<body>
<header><h1>Dashboard</h1><span class="pill" role="status" id="state">connecting</span>
  <button id="restart">Restart the server</button></header>
<main>
  <section><h2>Pages connected</h2><p class="number" id="pages">-</p></section>
  <section><h2>Events delivered</h2><p class="number" id="events">-</p></section>
  <section><h2>Round trip, ms</h2><p class="number" id="trip">-</p></section>
  <section><h2>Server up for, s</h2><p class="number" id="up">-</p></section>
  <section class="wide"><h2>A call that streams how far it is</h2>
    <p class="number"><span id="done">0</span> %</p>
    <progress id="bar" value="0" max="80" aria-label="progress"></progress>
    <div class="row"><button class="main" id="build">Build</button>
      <button id="stop" disabled>Stop</button><span class="soft" id="step">not running</span></div>
    <p class="soft row">Leaving the loop ends the generator at the server; running: <b id="jobs">0</b>
    </p></section>
  <section class="wide"><h2>Chat between tabs</h2>
    <div id="log" aria-live="polite"><p><i>open this page in another tab, too</i></p></div>
    <form class="row" id="chat"><input id="name" size="8" aria-label="your name">
      <input id="text" placeholder="say something" aria-label="message" autocomplete="off">
      <button>Send</button></form></section>
</main>
<script type="module">
import { connect } from "/ws-lite.js";
const $ = (id) => document.getElementById(id);
const show = (texts) => Object.keys(texts).forEach((id) => { $(id).textContent = texts[id]; });
let was, leave = false;
const onGap = () => note("some of it may be missing here");
const ws = connect("/ws", { retry: [0.1, 2], onState, onGap });

function onState(state) {
  document.body.classList.toggle("ready", state === "ready");
  show({ state: { ready: "live", waiting: "the server is away" }[state] ?? state });
  if (state === "ready" && was) note("the server is back");
  if (state === "waiting" && was === "ready") note("the server went away");
  if (state !== "connecting") was = state;
}
ws.subscribe("numbers", (numbers) => {
  for (const id in numbers) show({ [id]: numbers[id].toLocaleString() });
});
setInterval(async () => {
  const began = performance.now();
  if (ws.state === "ready") await ws.call("_ping_").catch(() => {});
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
  const line = document.createElement("p");
  line.append(...nodes);
  $("log").append(line);
  $("log").scrollTop = $("log").scrollHeight;
}
const made = (tag, textContent) => Object.assign(document.createElement(tag), { textContent });
const note = (text) => add(made("i", `${new Date().toLocaleTimeString()} - ${text}`));
ws.subscribe("chat", ({ name, text }) => { // with what the others have said before
  const from = made("b", name);
  from.style.setProperty("--hue", [...name].reduce((n, c) => (n * 31 + c.codePointAt(0)) % 360, 7));
  add(from, text);
}, { last: 20 });
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
    endpoint.register_route(app, "/ws")
    register_browser_client(app, "/ws-lite.js")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    task = asyncio.create_task(server.serve([listener]))
    began = time.monotonic()
    while not task.done() and not work.restarting:
        stats = endpoint.stats()
        endpoint.publish("numbers", {
            "pages": stats["channels"], "events": stats["events_delivered"],
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


QUICK: dict[str, Callable[[], Any]] = {
    function.__name__: function
    for function in (
        demo, calls, both_ways, errors, typed, streams, events, events_in_process,
        authorisation, reconnecting, last_messages, snapshot_plus_changes, login_with_a_cookie,
        a_token_that_expires, kicking_a_user, rate_limit, tracing, a_database_session_per_call,
        prometheus, server_sent_events, a_backbone_of_ones_own, without_a_loop)
}
ALL = QUICK | {"fleet": fleet, "bench": bench, "dashboard": dashboard}


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
        case ["--fleet-server"]:
            asyncio.run(fleet_server())
        case ["--agent", url, name, other]:
            asyncio.run(agent(url, name, other))
        case ["--bench-server", name]:
            asyncio.run(bench_server(name))
        case ["bench", "--quick"]:
            bench(quick=True)
        case ["dashboard", port] if port.isdigit():
            dashboard(int(port))
        case []:
            for name, function in ALL.items():
                print(f"{name:28} {(function.__doc__ or '').splitlines()[0]}")
        case _ if unknown := [name for name in arguments if name not in {*ALL, "all"}]:
            print(f"unknown: {', '.join(unknown)}; there are: {', '.join(ALL)}")
            return 2
        case _:
            for name in QUICK if "all" in arguments else arguments:
                run(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

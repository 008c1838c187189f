# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi", "uvicorn[standard]"]
# ///
"""What fastapi_ws_lite does, one scenario a function.

    python examples.py              lists the scenarios and runs them all
    python examples.py NAME...      runs those

Each is complete, and fails if what it shows does not happen. ``demo`` is the whole of it: a server
and two clients, each in a process of its own. The others run app and client in one process, joined
by ASGITransport; against a server, leave ``transport`` out.
"""

import asyncio
import inspect
import logging
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from datetime import date
from typing import Annotated, Any, Protocol

import uvicorn
from fastapi import Depends, FastAPI, Header, WebSocket, WebSocketException
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


async def serve() -> None:
    """The server's process: prints its address, and serves until its input ends."""
    app = FastAPI()
    endpoint = PubSubEndpoint(Fleet())
    endpoint.register_route(app, "/ws")

    @app.post("/policy/{name}")
    def policy_changed(name: str) -> None:  # an ordinary route may publish, without await
        endpoint.publish([f"policy.{name}"], data={"changed": name})

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(f"ws://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/ws", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await endpoint.close()
    server.should_exit = True
    await task


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


SCENARIOS: dict[str, Callable[[], Any]] = {
    function.__name__: function
    for function in (demo, calls, both_ways, validation, errors, typed, streams, events,
                     events_in_process, authorisation, reconnecting)
}


def run(name: str) -> None:
    began = time.perf_counter()
    result = SCENARIOS[name]()
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
        case _ if unknown := [name for name in arguments if name not in SCENARIOS]:
            print(f"unknown: {', '.join(unknown)}; there are: {', '.join(SCENARIOS)}")
            return 2
        case _:
            if not arguments:
                for name, function in SCENARIOS.items():
                    print(f"{name:18} {function.__doc__}")
            for name in arguments or SCENARIOS:
                run(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

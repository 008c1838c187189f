"""Tests of fastapi_ws_lite. Real sockets, servers and peers; no mocks of our own parts."""

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
import uuid
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, WebSocket
from uvicorn.config import WSProtocolType

import examples
import fastapi_ws_lite as lib
from fastapi_ws_lite import (
    ALL_TOPICS, ASGITransport, ChannelClosed, Event, EventNotifier, Forbidden, NetworkTransport,
    PubSubClient, PubSubEndpoint, Refused, RequestTimeout, RpcChannel, RpcClient, RpcEndpoint,
    RpcError, RpcMethodsBase, RpcResponse, SessionTransport,
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
                  **options: Any) -> AsyncIterator[str]:
    """A real server on a free port, in this process; yields ws://host:port."""
    config = uvicorn.Config(app, port=port, ws=ws, log_level="critical", lifespan="off", **options)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started or task.done())
    try:
        yield f"ws://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        await task


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
    assert "demo" in capsys.readouterr().out


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
            assert await asyncio.to_thread(run, sys.executable, name, cwd=tmp_path) == output


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
    assert {"fastapi_ws_lite/__init__.py", "fastapi_ws_lite/py.typed"} <= set(names)
    required = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    assert [name for name in required if "extra ==" not in name] == ["fastapi"]
    assert f"Version: {lib.__version__}" in metadata


def test_module_copied_alone_works(tmp_path: Path) -> None:
    """The file needs nothing beside it, and does not import the websockets library."""
    (tmp_path / "vendored.py").write_text((HERE / "fastapi_ws_lite.py").read_text())
    code = "import sys, vendored; assert 'websockets' not in sys.modules; print(vendored.__name__)"
    assert run(sys.executable, "-c", code, cwd=tmp_path) == "vendored\n"

"""A headless Chromium that tests drive over its DevTools protocol: keys, sizes, and what the page then says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
)
_SECONDS = 60


def find() -> str | None:
    """The browser, if there is one."""
    return next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)


class Page:
    """One open page."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.number = socket, 0

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            message = await asyncio.wait_for(self.socket.receive_json(), _SECONDS)
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        result = await self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def press(self, key: str) -> None:
        """A real key: Tab, ArrowRight, .."""
        code = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[key]
        for kind in ("rawKeyDown", "keyUp"):
            await self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                text="\r" if key == "Enter" and kind == "rawKeyDown" else "",
            )  # fmt: skip

    async def size(self, width: int, height: int) -> None:
        """The window's size in CSS pixels."""
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )


@contextlib.asynccontextmanager
async def opened(file: Path) -> AsyncIterator[Page]:
    """`file` in a fresh browser without network."""
    import aiohttp

    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [find(), *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0", file.as_uri()]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(await _address(session, profile)) as socket,
            ):
                page = Page(socket)
                await page.send("Network.enable")
                await page.send(
                    "Network.emulateNetworkConditions",
                    offline=True,
                    latency=0,
                    downloadThroughput=0,
                    uploadThroughput=0,
                )
                await page.send("Page.enable")
                await page.send("Page.reload")
                until = time.monotonic() + _SECONDS
                while await page.value("document.documentElement?.dataset.check") is None:
                    assert time.monotonic() < until, "the page's script did not come to its end"
                    await asyncio.sleep(0.1)
                yield page
        finally:
            process.kill()
            process.wait()


async def _address(session: Any, profile: str) -> str:
    """Where the page's debugger listens."""
    port, until = Path(profile) / "DevToolsActivePort", time.monotonic() + _SECONDS
    while not port.is_file() or not port.read_text().strip():
        assert time.monotonic() < until, "Chromium did not start"
        await asyncio.sleep(0.1)
    async with session.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json") as response:
        found = json.loads(await response.text())
    return next(entry["webSocketDebuggerUrl"] for entry in found if entry["type"] == "page")

"""One device's link to the broker, in a process of its own: `benchmarks.proxy`.

python -m benchmarks.drivers.link --target PORT

It is shaped and read by JSON lines.
"""

from __future__ import annotations

import argparse
import asyncio
import selectors

from benchmarks.drivers.protocol import serve_lines
from benchmarks.proxy import Proxy, Shape

BITS: int = 8


class LinkDriver:
    """A link with the same shape in both directions; the device connects to `port`."""

    version = "proxy"

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    def port(self) -> dict[str, int]:
        return {"port": self._proxy.port}

    def shape(self, rtt_ms: float, mbit_s: float) -> dict[str, bool]:
        """Set round trip and bandwidth from now on; a bandwidth of 0 is none."""
        bytes_per_s = mbit_s * 1e6 / BITS if mbit_s else float("inf")
        self._proxy.shape(Shape(latency_s=rtt_ms / 2e3, bytes_per_s=bytes_per_s))
        return {"shaped": True}

    def counts(self) -> dict[str, int]:
        """Return the bytes `up` and `down` so far."""
        return {"up": self._proxy.num_bytes["up"], "down": self._proxy.num_bytes["down"]}


def fine_loop() -> asyncio.AbstractEventLoop:
    """Return a loop that sleeps microseconds; loops on epoll sleep whole milliseconds."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=int, required=True)
    with Proxy(parser.parse_args().target, new_loop=fine_loop) as proxy:
        serve_lines(lambda: LinkDriver(proxy))

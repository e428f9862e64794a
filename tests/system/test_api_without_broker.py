"""`edge-agent run --api` before there is a broker, with one, and after it has gone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import urllib3

from fleet.bundles.manifest import Bundle
from fleet.protocol import topics
from fleet.protocol.report import DeviceStatus, decode_status
from tests.brokers import WAIT_S, Inbox, Site

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
START_S = 60.0


@contextmanager
def device_process(*arguments: str | Path) -> Iterator[Callable[[], str]]:
    """`edge-agent` with these arguments; the function asks its API, and returns the answer."""
    command = [sys.executable, "-m", "edge_agent", *map(str, arguments)]
    command += ["--threads", "1", "--api", "127.0.0.1:0"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
        urllib3.PoolManager(timeout=START_S) as pool,
    ):
        assert process.stdout
        line = process.stdout.readline()
        try:
            (url,) = re.findall(r"http://[\d.:]+", line)
            yield lambda: ask(pool, url)
            process.terminate()
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()


def ask(pool: urllib3.PoolManager, url: str) -> str:
    """The text of an answer; the agent may still be starting."""
    while (response := pool.request("POST", f"{url}/v1/chat/completions", json=CHAT)).status == 429:
        time.sleep(0.1)
    text: str = json.loads(response.data)["choices"][0]["message"]["content"]
    return text


def test_a_device_answers_before_there_is_a_broker_and_after_it_has_gone(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    site = Site("embedded", tmp_path)
    folder = site.identity("d1").folder
    with device_process("run", folder, "--bundle", tiny_bundle.folder) as answer:
        text = answer()
        site.broker.start()
        try:
            with site.connect("a1") as app:
                statuses = Inbox()
                app.subscribe(topics.device_status("d1"), statuses, qos=1)
                assert decode_status(statuses.get(START_S)[1], DeviceStatus).online
                assert answer() == text
        finally:
            site.broker.stop()
        assert answer() == text


def test_a_bundle_alone_answers(tiny_bundle: Bundle) -> None:
    with device_process("serve", tiny_bundle.folder) as answer:
        assert answer()

"""`edge-agent run --api` before there is a broker, with one, after its end and its return."""

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
from fleet.protocol.prompt import ChatMessage, PromptRequest
from fleet.transport.prompt_client import PromptClient
from tests.brokers import WAIT_S, Site, installed_mosquitto

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


def ask_over_mqtt(site: Site) -> str:
    """The text of the same answer over the broker."""
    prompt = PromptRequest(messages=(ChatMessage("user", "Hello"),), max_new_tokens=4)
    with site.connect("a1") as app:
        replies = PromptClient(app).ask("d1", prompt, timeout_s=START_S)
        return "".join(reply.text for reply in replies)


def test_a_device_answers_without_a_broker_with_one_after_its_end_and_after_its_return(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    site = Site("mosquitto" if installed_mosquitto("mosquitto") else "embedded", tmp_path)
    folder = site.identity("d1").folder
    with device_process("run", folder, "--bundle", tiny_bundle.folder) as answer:
        text = answer()
        for _ in range(2):
            site.broker.start()
            try:
                assert ask_over_mqtt(site) == text
                assert answer() == text
            finally:
                site.broker.kill()
            assert answer() == text


def test_a_bundle_alone_answers(tiny_bundle: Bundle) -> None:
    with device_process("serve", tiny_bundle.folder) as answer:
        assert answer()

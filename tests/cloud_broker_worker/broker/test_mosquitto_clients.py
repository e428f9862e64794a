"""Plain mosquitto_pub and mosquitto_sub with an app's certificate."""

from __future__ import annotations

import subprocess

import pytest

from fleet.identity.identity import Identity
from fleet.protocol import topics
from tests.brokers import HOST, WAIT_S, Inbox, Site, find_mosquitto, wait_until

pytestmark = pytest.mark.mosquitto


def command(program: str, identity: Identity, *arguments: str) -> list[str]:
    files = {"--cafile": "ca.pem", "--cert": "cert.pem", "--key": "key.pem"}
    tls = [word for option, name in files.items() for word in (option, str(identity.folder / name))]
    return [find_mosquitto(program), "-h", HOST, "-p", str(identity.config.port), *tls, *arguments]


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_mosquitto_pub_prompts_a_device(site: Site) -> None:
    inbox = Inbox()
    topic = topics.device_prompt("d1", "a1", "r1")
    with site.connect("d1") as device:
        device.subscribe("ce/v1/d/d1/prompt/+/+", inbox, qos=1)
        run(
            *command(
                "mosquitto_pub",
                site.identity("a1"),
                "-t",
                topic,
                "-m",
                "How warm is it?",
                "-q",
                "1",
            )
        )
        assert inbox.get() == (topic, b"How warm is it?")


def test_mosquitto_sub_reads_a_status(site: Site) -> None:
    with site.connect("d1") as device:
        device.publish(topics.device_status("d1"), b"born", qos=1, retain=True)
        line = run(
            *command(
                "mosquitto_sub",
                site.identity("a1"),
                "-t",
                "ce/v1/d/d1/status",
                "-q",
                "1",
                "-C",
                "1",
            )
        )
    assert line == "born\n"


def test_sub_and_pub_run_side_by_side_with_one_certificate(embedded_site: Site) -> None:
    identity = embedded_site.identity("a1")
    with embedded_site.connect("d1") as device:
        device.subscribe(
            "ce/v1/d/d1/prompt/+/+",
            lambda topic, payload: device.publish(
                topics.device_reply("d1", *topic.split("/")[5:7]), payload.upper(), qos=1
            ),
            qos=1,
        )
        words = command(
            "mosquitto_sub", identity, "-t", "ce/v1/d/+/reply/a1/+", "-q", "1", "-C", "1"
        )
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as sub:

            def answered() -> bool:
                run(
                    *command(
                        "mosquitto_pub",
                        identity,
                        "-t",
                        topics.device_prompt("d1", "a1", "r1"),
                        "-m",
                        "warm?",
                        "-q",
                        "1",
                    )
                )
                return sub.poll() is not None

            wait_until(answered, "mosquitto_sub got an answer")
            output, _ = sub.communicate(timeout=WAIT_S)
    assert output == "WARM?\n"

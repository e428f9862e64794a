"""A minimal app with paho-mqtt alone: prompt a device and print its answer as it streams.

    fleet enroll display --role app --allow kitchen --out display
    python app.py display kitchen "How warm is it?"

Fields of prompts, replies and statuses are in docs/protocol.md.
"""

import json
import queue
import sys
import uuid
from pathlib import Path

import paho.mqtt.client as mqtt

STATUS_S = 10.0
REPLY_S = 300.0


def connect(
    folder: Path, identity: dict[str, str], topics: list[str], cancel_topic: str
) -> tuple[mqtt.Client, "queue.Queue[mqtt.MQTTMessage]"]:
    """Connect with the identity in `folder`; the messages of the topics go into the queue.

    If this program dies, the broker cancels its request: the device then stops computing.
    """
    messages: queue.Queue[mqtt.MQTTMessage] = queue.Queue()
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.on_connect = lambda *_: client.subscribe([(topic, 1) for topic in topics])
    client.on_message = lambda _client, _data, message: messages.put(message)
    client.tls_set(*(str(folder / file) for file in ("ca.pem", "cert.pem", "key.pem")))
    client.will_set(cancel_topic, qos=1)
    client.connect(identity["host"], int(identity["port"]))
    client.loop_start()
    return client, messages


def main(folder: Path, device: str, prompt: str) -> int:
    """Return exit status 0 when the device answered, 1 when it is offline or refused."""
    identity = json.loads((folder / "identity.json").read_text(encoding="utf-8"))
    exchange = f"{identity['name']}/{uuid.uuid4().hex}"
    status_topic = f"ce/v1/d/{device}/status"
    topics = [f"ce/v1/d/{device}/reply/{exchange}", status_topic]
    client, messages = connect(
        folder, identity, topics, cancel_topic=f"ce/v1/d/{device}/cancel/{exchange}"
    )
    num_printed = 0
    timeout_s = STATUS_S
    while True:
        try:
            message = messages.get(timeout=timeout_s)
        except queue.Empty:
            print(f"nothing came from {device}: is it enrolled, and is this app allowed to use it?")
            return 1
        fields = json.loads(message.payload)
        if message.topic == status_topic:
            # The broker keeps the newest status, and sends it after each connection.
            if not fields["online"]:
                print(f"{device} is offline; try again when it is back")
                return 1
            # The device recognizes a request that comes again, and repeats its replies.
            payload = json.dumps({"prompt": prompt, "max_new_tokens": 48})
            client.publish(f"ce/v1/d/{device}/prompt/{exchange}", payload, qos=1)
            timeout_s = REPLY_S
        elif fields["seq"] == num_printed:  # others are repeated
            num_printed += 1
            print(fields.get("text", ""), end="", flush=True)
            if fields.get("done"):
                print(f"\n{fields.get('error') or fields['usage']['sources']}")
                client.disconnect()
                return 1 if "error" in fields else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))

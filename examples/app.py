"""A minimal app with paho-mqtt alone: prompt a device and print its answer as it streams.

    fleet enroll display --role app --allow kitchen --out display
    python app.py display kitchen "How warm is it?"

Fields of prompts and replies are in docs/protocol.md.
"""

import json
import sys
import uuid
from pathlib import Path

import paho.mqtt.client as mqtt


def main(folder: Path, device: str, prompt: str) -> int:
    """Return exit status 0 when the device answered, 1 when it refused."""
    identity = json.loads((folder / "identity.json").read_text())
    name = identity["name"]
    request = uuid.uuid4().hex
    printed = 0
    status = 0

    def on_connect(client: mqtt.Client, *_: object) -> None:
        client.subscribe(f"ce/v1/d/{device}/reply/{name}/{request}", qos=1)

    def on_subscribe(client: mqtt.Client, *_: object) -> None:
        # After a lost connection the device recognizes the request and repeats its replies.
        fields = {"prompt": prompt, "max_new_tokens": 48}
        client.publish(f"ce/v1/d/{device}/prompt/{name}/{request}", json.dumps(fields), qos=1)

    def on_message(client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
        nonlocal printed, status
        reply = json.loads(message.payload)
        if reply["seq"] != printed:
            return  # repeated
        printed += 1
        print(reply.get("text", ""), end="", flush=True)
        if reply.get("done"):
            status = 1 if "error" in reply else 0
            print(f"\n{reply.get('error') or reply['usage']['sources']}")
            client.disconnect()

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.on_connect = on_connect
    client.on_subscribe = on_subscribe
    client.on_message = on_message
    client.tls_set(*(str(folder / file) for file in ("ca.pem", "cert.pem", "key.pem")))
    client.connect(identity["host"], identity["port"])
    client.loop_forever()
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))

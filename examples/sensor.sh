#!/bin/sh
# A minimal sensor with mosquitto_pub alone: each line on standard input, degrees Celsius, becomes an
# event.
#
#     fleet enroll thermostat --role app --allow kitchen --out thermostat
#     while sleep 60; do echo 21.5; done | sh sensor.sh thermostat [HOST [PORT]]
#
# The triggers of devices decide on its effect, for example those in triggers.json.
set -eu
cd "$1" # the identity folder
while read -r celsius; do
    printf '{"room": "kitchen", "sensor": {"celsius": %s}}\n' "$celsius"
done | mosquitto_pub -h "${2:-127.0.0.1}" -p "${3:-8883}" \
    --cafile ca.pem --cert cert.pem --key key.pem -q 1 -t ce/v1/e/thermostat/warmth -l

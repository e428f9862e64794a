#!/usr/bin/env bash
# Install mosquitto and its clients for the tests, if the system's package manager works without a
# password.
set -euo pipefail
PATH="$PATH:/usr/sbin:/usr/local/sbin"

if command -v mosquitto >/dev/null && command -v mosquitto_pub >/dev/null; then
    exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo -n)
fi

if command -v apt-get >/dev/null && "${as_root[@]}" true 2>/dev/null; then
    echo "==> installing mosquitto for the tests"
    export DEBIAN_FRONTEND=noninteractive
    log="$(mktemp)"
    trap 'rm -f "$log"' EXIT
    if { "${as_root[@]}" apt-get update -qq &&
        "${as_root[@]}" apt-get install -y -qq --no-install-recommends \
            mosquitto mosquitto-clients; } >"$log" 2>&1; then
        exit 0
    fi
    tail -n 3 "$log"
fi
echo "==> mosquitto is missing and cannot be installed from here;" \
    "its tests are skipped (install it to run them)"

#!/usr/bin/env bash
# Install systemd-analyze for the tests of the unit files, if the system's package manager works
# without a password. No service is started: the tests need the program alone.
set -euo pipefail

if command -v systemd-analyze >/dev/null; then
    exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo -n)
fi

if command -v apt-get >/dev/null && "${as_root[@]}" true 2>/dev/null; then
    echo "==> installing systemd-analyze for the tests"
    export DEBIAN_FRONTEND=noninteractive
    log="$(mktemp)"
    trap 'rm -f "$log"' EXIT
    if { "${as_root[@]}" apt-get update -qq &&
        "${as_root[@]}" apt-get install -y -qq --no-install-recommends systemd; } >"$log" 2>&1; then
        exit 0
    fi
    tail -n 3 "$log"
fi
echo "==> systemd-analyze is missing and cannot be installed from here;" \
    "its tests are skipped (install systemd to run them)"

#!/usr/bin/env bash
# Install the distribution's Chromium for the tests of the console, if the system's package manager
# works without a password. Nothing is downloaded from a vendor of browsers.
set -euo pipefail

if command -v chromium >/dev/null; then
    exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo -n)
fi

if command -v apt-get >/dev/null && "${as_root[@]}" true 2>/dev/null; then
    echo "==> installing Chromium for the tests"
    export DEBIAN_FRONTEND=noninteractive
    log="$(mktemp)"
    trap 'rm -f "$log"' EXIT
    if { "${as_root[@]}" apt-get update -qq &&
        "${as_root[@]}" apt-get install -y -qq --no-install-recommends chromium; } >"$log" 2>&1; then
        exit 0
    fi
    tail -n 3 "$log"
fi
echo "==> Chromium is missing and cannot be installed from here;" \
    "the tests of the console are skipped (install the package chromium to run them)"

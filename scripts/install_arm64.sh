#!/usr/bin/env bash
# Install the emulator and the tool for the root of `make arm64`, if the system's package manager
# works without a password.
set -euo pipefail

if command -v qemu-aarch64-static >/dev/null && command -v mmdebstrap >/dev/null &&
    { [ "$(id -u)" -eq 0 ] || command -v fakechroot >/dev/null; }; then
    exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo -n)
fi

packages=(qemu-user-static mmdebstrap debian-archive-keyring fakechroot fakeroot)
if command -v apt-get >/dev/null && "${as_root[@]}" true 2>/dev/null; then
    echo "==> installing an ARM emulator and mmdebstrap"
    export DEBIAN_FRONTEND=noninteractive
    log="$(mktemp)"
    trap 'rm -f "$log"' EXIT
    if { "${as_root[@]}" apt-get update -qq &&
        "${as_root[@]}" apt-get install -y -qq --no-install-recommends \
            "${packages[@]}"; } >"$log" 2>&1; then
        exit 0
    fi
    tail -n 3 "$log"
fi
echo "==> make arm64 needs these packages of Debian or Ubuntu, which cannot be installed from" \
    "here: ${packages[*]}" >&2
exit 1

#!/usr/bin/env bash
# Install the PostgreSQL server for the tests, if the system's package manager works without a
# password. The tests start their own server: the service of Debian's package is not needed.
set -euo pipefail
shopt -s nullglob

servers=(/usr/lib/postgresql/*/bin/initdb)
if command -v initdb >/dev/null || [ "${#servers[@]}" -gt 0 ]; then
    exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo -n)
fi

if command -v apt-get >/dev/null && "${as_root[@]}" true 2>/dev/null; then
    echo "==> installing PostgreSQL for the tests"
    export DEBIAN_FRONTEND=noninteractive
    log="$(mktemp)"
    trap 'rm -f "$log"' EXIT
    if { "${as_root[@]}" apt-get update -qq &&
        "${as_root[@]}" apt-get install -y -qq --no-install-recommends postgresql-common &&
        "${as_root[@]}" sed -i 's/^#\?create_main_cluster.*/create_main_cluster = false/' \
            /etc/postgresql-common/createcluster.conf &&
        "${as_root[@]}" apt-get install -y -qq --no-install-recommends postgresql; } >"$log" 2>&1; then
        exit 0
    fi
    tail -n 3 "$log"
fi
echo "==> PostgreSQL is missing and cannot be installed from here;" \
    "its tests are skipped (install it to run them)"

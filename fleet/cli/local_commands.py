"""The commands that need the fleet's folder, so that no server can run them, and the reasons."""

from __future__ import annotations

from typing import Final

NEW_CODE: Final = "what devices run comes from the machine with the key that signs it"
NEW_KEY: Final = "it makes a private key here; without --out it prints a token"
OWN_KEY: Final = "it changes the authority's key"
OWN_PROCESS: Final = "it runs a process with identities of the folder"

LOCAL_COMMANDS: Final[dict[str, str]] = {
    "authority retire": OWN_KEY,
    "authority rotate": OWN_KEY,
    "backup": "it copies the authority's key",
    "bridge": OWN_PROCESS,
    "broker config": "it writes certificates and keys for a broker",
    "broker rules": "it belongs to the machine that sets a broker up",
    "bundle add": NEW_CODE,
    "console": "it signs in the owner of the folder; an admin has 'fleet operator link NAME'",
    "enroll --out": NEW_KEY,
    "init": "it makes the folder",
    "renew --out": NEW_KEY,
    "restore": "it makes the folder",
    "server": OWN_PROCESS,
    "systemd": "it writes units for the folder",
    "up": OWN_PROCESS,
    "update add": NEW_CODE,
}
"""The reason of each command, or of a command with an option."""

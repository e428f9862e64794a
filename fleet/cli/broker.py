"""`fleet broker`: files for a mosquitto, and the rights of the fleet for other brokers."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from cloud_broker_worker.broker.mosquitto import acl_text
from fleet.cli.access import own_home
from fleet.cli.options import HomeOption
from fleet.errors import ConfigError
from fleet.protocol.access import Action, Grants
from fleet.server.mosquitto import write_mosquitto
from fleet.utils.command_group import CommandGroup
from fleet.utils.path_options import path_option
from fleet.utils.paths import absolute_path
from fleet.utils.printable import print_line

FORMATS: Final = ("mosquitto", "emqx", "json")

app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="Configure brokers other than the embedded one."
)

OutOption = Annotated[
    Path, path_option(help="Folder for the files; it holds the broker's private key.")
]
HostOption = Annotated[
    str | None, typer.Option(help="Address to listen on (default: the fleet's).")
]
PortOption = Annotated[
    int | None, typer.Option(min=1, max=65535, help="Port to listen on (default: the fleet's).")
]
FormatOption = Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")]


@app.command("config")
def config(
    out: OutOption,
    host: HostOption = None,
    port: PortOption = None,
    folder: HomeOption = None,
) -> None:
    """Write mosquitto.conf, acl, crl.pem, certificates and a README; again after changes."""
    if os.geteuid() == 0:
        print(
            "fleet: this mosquitto would run as root; run the command as its own user",
            file=sys.stderr,
        )
    home = own_home(folder, "broker config")
    with home.registry() as registry:
        path = write_mosquitto(home, registry, absolute_path(out), host, port)
    print_line(
        f"wrote {path} with rights, revocation list and certificates; "
        f"next: {shlex.join(['mosquitto', '-c', str(path)])}, see README there"
    )


@app.command("rules")
def rules(form: FormatOption = FORMATS[0], folder: HomeOption = None) -> None:
    """Print the topics that each active identity may publish and subscribe, for a broker's ACL."""
    if form not in FORMATS:
        raise ConfigError(f"--format {form}: expected one of {', '.join(FORMATS)}")
    with own_home(folder, "broker rules").registry() as registry:
        print(format_rules(registry.identities.all_grants(), form), end="")


def format_rules(grants: list[Grants], form: str) -> str:
    """The rights of all identities in one of `FORMATS`."""
    if form == "mosquitto":
        return acl_text(grants)
    if form == "emqx":
        rules = [_emqx_rule(each, action) for each in grants for action in Action]
        return "\n".join((*rules, "{deny, all}.\n"))
    rights = [{"name": each.name, "role": each.role} | dict(each.filters) for each in grants]
    return json.dumps(rights, indent=2) + "\n"


def _emqx_rule(grants: Grants, action: Action) -> str:
    name = json.dumps(grants.name)
    return f"{{allow, {{username, {name}}}, {action}, {json.dumps(grants.filters[action])}}}."

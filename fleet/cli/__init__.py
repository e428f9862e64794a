"""The command `fleet`."""

from __future__ import annotations

import typer

from fleet.cli.allow import allow_app, disallow_app, tag_device
from fleet.cli.audit import list_changes
from fleet.cli.authority import app as authority_app
from fleet.cli.backup import backup, restore_fleet
from fleet.cli.bench import bench
from fleet.cli.broker import app as broker_app
from fleet.cli.bundles import app as bundle_app
from fleet.cli.chat import chat
from fleet.cli.config import app as config_app
from fleet.cli.demo import demo
from fleet.cli.devices import device, devices
from fleet.cli.doctor import doctor
from fleet.cli.enroll import (
    enroll_identities,
    resume_identity,
    revoke_identity,
    suspend_identity,
)
from fleet.cli.export import export
from fleet.cli.heads import app as heads_app
from fleet.cli.identities import change_group, delete_identity, identities
from fleet.cli.init import init
from fleet.cli.options import PASS_ON
from fleet.cli.plan import plan
from fleet.cli.prompt import prompt
from fleet.cli.renew import renew_identity
from fleet.cli.rollouts import add_rollout_commands
from fleet.cli.server import server
from fleet.cli.sessions import sessions
from fleet.cli.stats import stats
from fleet.cli.systemd import systemd
from fleet.cli.up import up
from fleet.cli.updates import app as update_app
from fleet.cli.workers import workers
from fleet.utils.cli_runtime import run_command
from fleet.utils.version_option import VersionOption

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("init")(init)
app.command("up")(up)
app.command("server")(server)
app.command("systemd")(systemd)
app.command("backup")(backup)
app.command("restore")(restore_fleet)
app.command("doctor")(doctor)
app.command("demo")(demo)
app.command("prompt")(prompt)
app.command("chat")(chat)
app.command("enroll")(enroll_identities)
app.command("renew")(renew_identity)
app.command("suspend")(suspend_identity)
app.command("resume")(resume_identity)
app.command("revoke")(revoke_identity)
app.command("delete")(delete_identity)
app.command("identities")(identities)
app.command("group")(change_group)
app.command("allow")(allow_app)
app.command("disallow")(disallow_app)
app.command("tag")(tag_device)
app.command("devices")(devices)
app.command("device")(device)
app.command("workers")(workers)
app.command("sessions")(sessions)
app.command("stats")(stats)
app.command("audit")(list_changes)
app.command("plan")(plan)
app.command("export", context_settings=PASS_ON)(export)
app.command("bench", context_settings=PASS_ON)(bench)
add_rollout_commands(bundle_app)
app.add_typer(config_app, name="config")
app.add_typer(bundle_app, name="bundle")
app.add_typer(update_app, name="update")
app.add_typer(heads_app, name="heads")
app.add_typer(broker_app, name="broker")
app.add_typer(authority_app, name="authority")


@app.callback()
def fleet(version: VersionOption = False) -> None:
    """Run one language model on many small devices and a few cloud workers."""


def main() -> None:
    """Run the command line."""
    run_command("fleet", app)

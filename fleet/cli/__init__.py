"""The command `fleet`."""

from __future__ import annotations

from typing import Final

import typer

from fleet.cli.access import CaFileOption, KeyFileOption, ServerOption, choose_server
from fleet.cli.alarms import app as alarms_app
from fleet.cli.allow import allow_app, disallow_app, tag_device
from fleet.cli.audit import list_changes
from fleet.cli.authority import app as authority_app
from fleet.cli.backup import backup, restore_fleet
from fleet.cli.bench import bench
from fleet.cli.bridge import bridge
from fleet.cli.broker import app as broker_app
from fleet.cli.bundles import app as bundle_app
from fleet.cli.chat import chat
from fleet.cli.config import app as config_app
from fleet.cli.console import console
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
from fleet.cli.keys import app as key_app
from fleet.cli.operators import app as operator_app
from fleet.cli.options import PASS_ON
from fleet.cli.plan import plan
from fleet.cli.prompt import prompt
from fleet.cli.renew import renew_identity
from fleet.cli.rollouts import add_rollout_commands
from fleet.cli.server import server as server_command
from fleet.cli.sessions import sessions
from fleet.cli.stats import stats
from fleet.cli.systemd import systemd
from fleet.cli.up import up
from fleet.cli.updates import app as update_app
from fleet.cli.workers import workers
from fleet.utils.cli_runtime import run_command
from fleet.utils.command_group import CommandGroup
from fleet.utils.version_option import VersionOption

START: Final = "Run a fleet"
PROMPTS: Final = "Send prompts"
IDENTITIES: Final = "Enrol devices, apps and workers"
STATISTICS: Final = "Look at a fleet"
CHANGES: Final = "Change devices"
MODELS: Final = "Choose and make models"

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo", rich_help_panel=START)(demo)
app.command("init", rich_help_panel=START)(init)
app.command("up", rich_help_panel=START)(up)
app.command("server", rich_help_panel=START)(server_command)
app.command("console", rich_help_panel=START)(console)
app.command("systemd", rich_help_panel=START)(systemd)
app.command("bridge", rich_help_panel=START)(bridge)
app.command("backup", rich_help_panel=START)(backup)
app.command("restore", rich_help_panel=START)(restore_fleet)
app.command("doctor", rich_help_panel=START)(doctor)
app.command("prompt", rich_help_panel=PROMPTS)(prompt)
app.command("chat", rich_help_panel=PROMPTS)(chat)
app.command("enroll", rich_help_panel=IDENTITIES)(enroll_identities)
app.command("renew", rich_help_panel=IDENTITIES)(renew_identity)
app.command("suspend", rich_help_panel=IDENTITIES)(suspend_identity)
app.command("resume", rich_help_panel=IDENTITIES)(resume_identity)
app.command("revoke", rich_help_panel=IDENTITIES)(revoke_identity)
app.command("delete", rich_help_panel=IDENTITIES)(delete_identity)
app.command("identities", rich_help_panel=IDENTITIES)(identities)
app.command("group", rich_help_panel=IDENTITIES)(change_group)
app.command("allow", rich_help_panel=IDENTITIES)(allow_app)
app.command("disallow", rich_help_panel=IDENTITIES)(disallow_app)
app.command("tag", rich_help_panel=IDENTITIES)(tag_device)
app.command("devices", rich_help_panel=STATISTICS)(devices)
app.command("device", rich_help_panel=STATISTICS)(device)
app.command("workers", rich_help_panel=STATISTICS)(workers)
app.command("sessions", rich_help_panel=STATISTICS)(sessions)
app.command("stats", rich_help_panel=STATISTICS)(stats)
app.command("audit", rich_help_panel=STATISTICS)(list_changes)
app.command("plan", rich_help_panel=MODELS)(plan)
app.command("export", rich_help_panel=MODELS, context_settings=PASS_ON)(export)
app.command("bench", rich_help_panel=MODELS, context_settings=PASS_ON)(bench)
add_rollout_commands(bundle_app)
app.add_typer(alarms_app, name="alarms", rich_help_panel=STATISTICS)
app.add_typer(key_app, name="key", rich_help_panel=IDENTITIES)
app.add_typer(operator_app, name="operator", rich_help_panel=IDENTITIES)
app.add_typer(config_app, name="config", rich_help_panel=CHANGES)
app.add_typer(bundle_app, name="bundle", rich_help_panel=CHANGES)
app.add_typer(update_app, name="update", rich_help_panel=CHANGES)
app.add_typer(heads_app, name="heads", rich_help_panel=MODELS)
app.add_typer(broker_app, name="broker", rich_help_panel=START)
app.add_typer(authority_app, name="authority", rich_help_panel=START)


@app.callback()
def fleet(
    context: typer.Context,
    server: ServerOption = None,
    key_file: KeyFileOption = None,
    ca_file: CaFileOption = None,
    version: VersionOption = False,
) -> None:
    """Run one language model on many small devices and a few cloud workers."""
    del version  # its callback has printed it
    choose_server(context, server, key_file, ca_file)


def main() -> None:
    """Run the command line."""
    run_command("fleet", app)

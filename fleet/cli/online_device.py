"""A device that is online, and a client for prompts to it, over the broker or through a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fleet.cli.access import is_remote, remote_access
from fleet.cli.device_status import await_online, offline_error
from fleet.operator_api.bundle_operations import LIST_BUNDLES
from fleet.operator_api.device_operations import SHOW_DEVICE, DeviceWindow
from fleet.operator_api.operation import NoFields
from fleet.protocol.modes import exit_source
from fleet.server.home import FleetHome
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient, Prompter

if TYPE_CHECKING:
    from fleet.operator_api.remote_access import RemoteAccess


@dataclass(frozen=True)
class OnlineDevice:
    """A device, and what is known of its bundle: nothing if the fleet does not have it.

    `exits` are layers in order of depth. `prompt_format` is that of the bundle's manifest.
    """

    name: str
    client: Prompter
    bundle_id: str
    model: str = ""
    exits: Sequence[int] = ()
    prompt_format: str = ""

    @property
    def exit_sources(self) -> list[str]:
        """The sources of its exits in order of depth."""
        return [exit_source(layer) for layer in self.exits]


@contextmanager
def online_device(folder: Path | None, name: str) -> Iterator[OnlineDevice]:
    """Yield a device of the fleet in `folder`, or of the server that was chosen.

    Neither of the two needs the registry here.

    Raises:
        ConfigError: there is no fleet, or the server or the key is not usable.
        UnknownDeviceError: there is no such device.
        LinkError: the broker or the server cannot be reached, or the device is offline.
    """
    if is_remote():
        with remote_access(folder) as access:
            yield _device_there(access, name)
        return
    home = FleetHome.load(folder)
    with home.operator() as identity, MqttTransport.connect(identity) as link:
        yield _device_here(home, link, name)


def _device_here(home: FleetHome, link: MqttTransport, name: str) -> OnlineDevice:
    bundle_id = await_online(link, name).bundle_id
    client = PromptClient(link)
    client.watch(name)
    manifest = home.bundle_manifest(bundle_id)
    if manifest is None:
        return OnlineDevice(name, client, bundle_id)
    return OnlineDevice(
        name=name,
        client=client,
        bundle_id=bundle_id,
        model=manifest.model.name,
        exits=manifest.exits,
        prompt_format=manifest.prompt_format,
    )


def _device_there(access: RemoteAccess, name: str) -> OnlineDevice:
    from fleet.operator_api.remote_prompts import RemotePrompts

    row = access.call(SHOW_DEVICE, DeviceWindow(device=name)).device
    if not row.online:
        raise offline_error(name)
    client = RemotePrompts(access)
    for bundle in access.call(LIST_BUNDLES, NoFields()).bundles:
        if bundle.bundle_id == row.bundle_id:
            return OnlineDevice(
                name=name,
                client=client,
                bundle_id=row.bundle_id,
                model=bundle.model,
                exits=bundle.exits,
                prompt_format=bundle.prompt_format,
            )
    return OnlineDevice(name, client, row.bundle_id)

"""The options of `fleet up` and `fleet init`, merged with the configuration that a fleet has."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from fleet.bundles.manifest import read_manifest
from fleet.errors import BundleError, ConfigError
from fleet.server.home import (
    DEFAULT_PORT,
    DEFAULT_SERVICE_PORT,
    FLEET_FILE,
    FleetConfig,
    FleetHome,
)
from fleet.utils.atomic_files import made_folder
from fleet.utils.host_address import check_reachable, host_port
from fleet.utils.optional_imports import needs
from fleet.utils.paths import absolute_path
from onnx_export.default_bundle import is_default_bundle

DEFAULT_HOST: Final = "127.0.0.1"
RUNNING_FILE: Final = ".running"  # backups leave hidden files out


class FleetOptions(Struct, frozen=True, kw_only=True):
    """The options that were given. None keeps a fleet's setting, and is a new fleet's default."""

    host: str | None = None
    port: int | None = None
    bundle: str | None = None
    service_port: int | None = None
    service_host: str | None = None
    registry: str | None = None
    retention_days: int | None = None

    def given(self) -> dict[str, object]:
        """Return the options that were given, by name."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in values.items() if value is not None}


def resolve_config(folder: Path, options: FleetOptions) -> FleetConfig:
    """Return the configuration of the fleet in `folder` with the given options in place.

    The bundle in the configuration is "" if the fleet has to use the default model's. A new address
    of an existing fleet is reported on stderr.

    Raises:
        ConfigError: the fleet's identities are enrolled in a different registry, no client can
            connect to the host, or a value is not usable.
        BundleError: no bundle is given, and the fleet's own is gone.
        RegistryError: the registry's URL is malformed.
    """
    current = FleetHome.load(folder).config if FleetHome.is_fleet(folder) else None
    defaults = {"host": DEFAULT_HOST, "port": DEFAULT_PORT, "service_port": DEFAULT_SERVICE_PORT}
    kept = {name: getattr(current, name) for name in FleetConfig.__struct_fields__ if current}
    if options.registry:
        options = msgspec.structs.replace(options, registry=_absolute_registry(options.registry))
    _check_registry(folder, current, options.registry)
    values = defaults | kept | options.given()
    check_reachable(str(values["host"]))
    if not options.bundle:
        values["bundle"] = _kept_bundle(current)
    try:
        config = msgspec.convert(values, FleetConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from None
    if current:
        _report_moves(current, config)
    return config


def _kept_bundle(current: FleetConfig | None) -> str:
    """Return the fleet's own bundle; "" if it uses the default model's, which may be out of date.

    Raises:
        BundleError: it is gone. Only the operator may choose another model.
    """
    if not current or not current.bundle or is_default_bundle(Path(current.bundle)):
        return ""
    try:
        read_manifest(Path(current.bundle))
    except BundleError as error:
        raise BundleError(
            f"the fleet's model is not served: {error}; or mount the disk of the bundle, "
            "or name its new place with --bundle"
        ) from None
    return current.bundle


def _absolute_registry(registry: str) -> str:
    """Return a registry that is the same one in every current folder.

    Raises:
        ConfigError: it is a database in memory.
        RegistryError: its URL is malformed.
    """
    with needs("server"):
        from fleet.registry.database import parse_url
    url = parse_url(registry)
    if url.get_backend_name() != "sqlite":
        return registry
    if url.database in (None, "", ":memory:"):
        raise ConfigError(
            f"the registry {registry} is in memory and would be lost; name a file with --registry"
        )
    if "://" not in registry:
        return str(absolute_path(Path(registry)))
    return url.set(database=str(absolute_path(Path(url.database)))).render_as_string()


def _check_registry(folder: Path, current: FleetConfig | None, registry: str | None) -> None:
    if current and registry not in (None, current.registry):
        raise ConfigError(
            f"the devices of the fleet in {folder} are enrolled in a different registry; "
            "name a new folder with --home, or, if the same database has moved, "
            f"write its URL into {folder / FLEET_FILE}"
        )


def _report_moves(current: FleetConfig, config: FleetConfig) -> None:
    """Report each new address, which devices and apps do not learn by themselves."""
    before = addresses(current)
    for name, address in addresses(config).items():
        if name in before and before[name] != address:
            print(
                f"fleet: the {name} moves from {before[name]} to {address}; devices, workers and "
                "apps with the former address stay away until 'edge-agent address DIR' gives them "
                "the new one, or until you give the former --host, --port and --service-port again",
                file=sys.stderr,
            )


def addresses(config: FleetConfig) -> dict[str, str]:
    """Return the addresses that identities of this fleet hold, by name."""
    places = {"broker": host_port(config.host, config.port)}
    if config.service_port:
        places["service"] = host_port(config.service_host or config.host, config.service_port)
    return places


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Lock `folder` for the block, as its only `fleet up`; make the folder if it is missing.

    A folder that is still empty after an error is removed again.

    Raises:
        ConfigError: another `fleet up` has the lock.
    """
    path = folder / RUNNING_FILE
    with made_folder(folder), path.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"the fleet in {folder} runs already, as process {lock.read().strip()}; "
                "stop that one, or name another folder with --home"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        try:
            yield
        finally:
            if list(folder.iterdir()) == [path]:  # there is no fleet after all
                path.unlink()

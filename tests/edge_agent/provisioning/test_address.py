"""Another address of the broker for a device."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.provisioning.address import change_address
from fleet.errors import ConfigError
from fleet.identity.identity import Identity
from fleet.protocol.access import Role
from provisioning.authority import CertificateAuthority
from tests.identities import issue_identity


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "https://fleet.example", "192.168.1.300"])
def test_an_address_that_no_device_can_connect_to_is_refused(tmp_path: Path, host: str) -> None:
    authority = CertificateAuthority.create(tmp_path / "ca")
    identity = issue_identity(
        authority, "d1", Role.DEVICE, tmp_path / "d1", host="gateway.local", port=8883
    )
    with pytest.raises(ConfigError, match="host"):
        change_address(identity, host)
    assert Identity.load(identity.folder).config.host == "gateway.local"

"""Downloads of bundles from services that work, fail or lie."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from edge_agent.state.bundle_slots import SlotStore, partial_name
from edge_agent.update import download
from edge_agent.update.background_download import BackgroundDownload
from edge_agent.update.download import BundleDownload, fetch_bundle
from fleet.bundles.manifest import FileEntry, Manifest, hash_file, write_manifest
from fleet.bundles.signature import sign_bundle
from fleet.errors import BundleError, ConfigError, ServiceAwayError, ServiceError
from fleet.identity.identity import CA_FILE, Identity
from fleet.identity.service_client import ServiceClient
from fleet.protocol.report import ConfigProblem
from tests.brokers import WAIT_S
from tests.edge_agent.fleet_service import FleetService
from tests.model_info import TINY_MODEL

BLOCK = "edge/block_0.onnx"
FILES = {
    BLOCK: bytes(range(256)) * 2048,
    "tokenizer/tokenizer.json": b"{}",
    "cloud/model.safetensors": b"cloud" * 100,
}


def make_bundle(folder: Path, key: Path) -> str:
    """Write a signed bundle of `FILES` below `folder`, in a folder with its id as name."""
    made = folder / "made"
    for name, data in FILES.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(data)
    entries = tuple(
        FileEntry(name, len(data), hash_file(made / name)) for name, data in FILES.items()
    )
    manifest = Manifest(
        schema_version=3,
        model=TINY_MODEL,
        exits=(2,),
        split_layer=2,
        upload_layer=2,
        quantization="fp32",
        top_k=4,
        thresholds=(0.5,),
        parity={},
        tools={},
        files=entries,
    )
    write_manifest(made, manifest)
    sign_bundle(made, key)
    made.replace(folder / manifest.bundle_id)
    return manifest.bundle_id


class Fleet(NamedTuple):
    service: FleetService
    bundle: str
    identity: Identity

    @property
    def folder(self) -> Path:
        return self.bundles / self.bundle

    @property
    def bundles(self) -> Path:
        return SlotStore(self.identity.folder).bundles

    def fetch(self) -> Path:
        return fetch_bundle(self.identity, self.bundle, threading.Event())


@pytest.fixture
def fleet(service: FleetService, tmp_path: Path) -> Fleet:
    service.bundles.mkdir()
    bundle = make_bundle(service.bundles, service.ca_key)
    return Fleet(service, bundle, service.identity(tmp_path / "kitchen"))


def test_only_the_files_that_a_device_needs_are_downloaded(fleet: Fleet) -> None:
    assert fleet.fetch() == fleet.folder
    names = {
        str(path.relative_to(fleet.folder)) for path in fleet.folder.rglob("*") if path.is_file()
    }
    assert names == {BLOCK, "tokenizer/tokenizer.json", "manifest.json", "manifest.sig"}
    assert (fleet.folder / BLOCK).read_bytes() == FILES[BLOCK]


def test_a_complete_bundle_is_not_downloaded_again(fleet: Fleet) -> None:
    fleet.fetch()
    num_requests = len(fleet.service.requests)
    assert fleet.fetch() == fleet.folder
    assert len(fleet.service.requests) == num_requests


def test_a_download_that_is_cut_continues_at_the_same_byte(fleet: Fleet) -> None:
    fleet.service.trouble.cuts_after = [100_000, 200_000]
    fleet.fetch()
    asked = fleet.service.paths("block_0.onnx")
    assert asked[0] == ""
    assert [int(each.removeprefix("bytes=").removesuffix("-")) > 0 for each in asked[1:]] == [
        True
    ] * (len(asked) - 1)
    assert (fleet.folder / BLOCK).read_bytes() == FILES[BLOCK]


def test_a_download_of_a_process_that_died_continues_at_the_same_byte(fleet: Fleet) -> None:
    partial = fleet.bundles / partial_name(fleet.bundle)
    (partial / "edge").mkdir(parents=True)
    (partial / BLOCK).write_bytes(FILES[BLOCK][:1000])
    fleet.fetch()
    assert fleet.service.paths("block_0.onnx") == ["bytes=1000-"]
    assert not partial.exists()


def test_a_download_from_a_service_without_ranges_begins_again(fleet: Fleet) -> None:
    fleet.service.trouble.cuts_after = [100_000]
    fleet.service.trouble.ignores_range = True
    fleet.fetch()
    assert (fleet.folder / BLOCK).read_bytes() == FILES[BLOCK]


def test_a_damaged_file_is_downloaded_again(fleet: Fleet) -> None:
    fleet.service.trouble.num_damaged = 1
    fleet.fetch()
    assert fleet.service.paths("block_0.onnx") == ["", ""]
    assert (fleet.folder / BLOCK).read_bytes() == FILES[BLOCK]


def test_a_file_that_is_damaged_twice_is_refused(fleet: Fleet) -> None:
    fleet.service.trouble.num_damaged = 9
    with pytest.raises(BundleError, match=rf"{BLOCK} of bundle {fleet.bundle} arrived damaged"):
        fleet.fetch()
    assert fleet.service.paths("block_0.onnx") == ["", ""]
    assert not fleet.folder.exists()


def test_a_bundle_that_was_damaged_on_disk_is_repaired(fleet: Fleet) -> None:
    fleet.fetch()
    (fleet.folder / BLOCK).write_bytes(b"damaged")
    fleet.fetch()
    assert (fleet.folder / BLOCK).read_bytes() == FILES[BLOCK]
    assert len(fleet.service.paths("tokenizer.json")) == 1


def test_a_manifest_that_the_fleet_did_not_sign_is_refused_before_any_file(fleet: Fleet) -> None:
    path = fleet.service.bundles / fleet.bundle / "manifest.sig"
    path.write_bytes(path.read_bytes()[:-2] + b"xx")
    with pytest.raises(BundleError, match="no signature"):
        fleet.fetch()
    assert fleet.service.paths("block_0.onnx") == []


def test_the_manifest_of_another_bundle_is_refused(fleet: Fleet) -> None:
    (fleet.service.bundles / fleet.bundle).replace(fleet.service.bundles / "other")
    with pytest.raises(BundleError, match="expected the manifest of bundle other"):
        fetch_bundle(fleet.identity, "other", threading.Event())


def test_a_bundle_that_the_service_does_not_have_is_refused(fleet: Fleet) -> None:
    with pytest.raises(BundleError, match=r"no file manifest\.json"):
        fetch_bundle(fleet.identity, "b7", threading.Event())


def test_a_full_disk_is_reported_and_the_current_bundle_is_kept(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = fleet.bundles / "a" / "edge"
    served.mkdir(parents=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(
        BundleError, match=r"no room for bundle .* make room; the present bundle goes on"
    ):
        fleet.fetch()
    assert served.is_dir()
    assert fleet.service.paths("block_0.onnx") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_becomes_full_during_a_download_is_reported(fleet: Fleet) -> None:
    partial = fleet.bundles / partial_name(fleet.bundle)
    (partial / "edge").mkdir(parents=True)
    (partial / BLOCK).symlink_to("/dev/full")
    with pytest.raises(BundleError, match="bundle"):
        fleet.fetch()


def test_an_identity_without_a_service_is_reported(fleet: Fleet, tmp_path: Path) -> None:
    config = msgspec.structs.replace(fleet.identity.config, server=None)
    with pytest.raises(ConfigError, match="names no service"):
        fetch_bundle(Identity(fleet.identity.folder, config), fleet.bundle, threading.Event())


def test_a_client_without_a_certificate_gets_no_file(fleet: Fleet) -> None:
    import ssl

    context = ssl.create_default_context(cafile=fleet.identity.folder / CA_FILE)
    with (
        ServiceClient(fleet.service.url, context) as service,
        pytest.raises(Exception, match="no certificate"),
    ):
        BundleDownload(service, fleet.bundle, fleet.bundles, fleet.identity.folder / CA_FILE).run()


def test_a_download_from_a_silent_service_ends(fleet: Fleet) -> None:
    fleet.service.trouble.is_mute = True
    with (
        ServiceClient(fleet.service.url, fleet.identity.ssl_context(), read_s=0.3) as service,
        pytest.raises(ServiceAwayError, match="did not answer in time"),
    ):
        BundleDownload(service, fleet.bundle, fleet.bundles, fleet.identity.folder / CA_FILE).run()


def test_a_download_that_is_cut_every_time_ends_and_its_bytes_are_kept(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_CUTS", 2)
    fleet.service.trouble.cuts_after = [70_000, *([0] * 9)]
    with pytest.raises(ServiceAwayError):
        fleet.fetch()
    assert (fleet.bundles / partial_name(fleet.bundle) / BLOCK).stat().st_size > 0
    assert not fleet.folder.exists()


def test_progress_ends_with_all_bytes_that_a_device_needs(fleet: Fleet) -> None:
    calls: list[tuple[int, int]] = []
    fetch_bundle(
        fleet.identity,
        fleet.bundle,
        threading.Event(),
        lambda here, total: calls.append((here, total)),
    )
    total = len(FILES[BLOCK]) + 2
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


class DownloadLog:
    """The callbacks of a background download."""

    def __init__(self, fetch: Callable[[str, threading.Event], Path]) -> None:
        self.done = threading.Event()
        self.failed = threading.Event()
        self.errors: list[ConfigProblem] = []
        self.download = BackgroundDownload(
            fetch, lambda bundle, path: self.done.set(), self._on_error
        )

    def _on_error(self, bundle: str, error: ConfigProblem) -> None:
        self.errors.append(error)
        self.failed.set()


def test_a_background_download_is_retried_while_the_service_is_away(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.update.background_download.RETRY_FACTOR", 1)
    fleet.service.refuse(503, "registry", "the registry is away")
    log = DownloadLog(lambda bundle, stop: fetch_bundle(fleet.identity, bundle, stop))
    log.download.start(fleet.bundle)
    assert log.done.wait(WAIT_S)
    assert log.errors == [
        ConfigProblem(
            "service_away", "the registry is away; the device tries again", is_final=False
        )
    ]


def test_a_background_download_is_not_retried_after_a_final_error(fleet: Fleet) -> None:
    log = DownloadLog(lambda bundle, stop: fetch_bundle(fleet.identity, bundle, stop))
    log.download.start("b7")
    assert log.failed.wait(WAIT_S)
    log.download.cancel()
    assert log.errors == [
        ConfigProblem("bad_bundle", "bundle b7: no file manifest.json", is_final=True)
    ]


def test_a_cancelled_download_ends_without_a_callback(fleet: Fleet) -> None:
    begun = threading.Event()

    def fetch(bundle: str, stop: threading.Event) -> Path:
        begun.set()
        stop.wait(WAIT_S)
        raise ServiceAwayError("stopped")

    log = DownloadLog(fetch)
    log.download.start("b1")
    assert begun.wait(WAIT_S)
    log.download.cancel()
    assert not log.done.is_set()
    assert log.errors == []


def test_a_range_that_was_not_requested_is_refused(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ServiceClient(fleet.service.url, fleet.identity.ssl_context()) as service:
        monkeypatch.setattr(service, "_request", _lying(service))
        with (
            pytest.raises(ServiceError, match="from byte 10 on"),
            service.file(fleet.bundle, BLOCK, 10),
        ):
            pass


def _lying(service: ServiceClient) -> Callable[..., object]:
    """Return the service's own request, from the byte after the right one."""
    ask = service._request

    def request(method: str, path: str, start: int) -> object:
        return ask(method, path, start=start + 1)

    return request

"""Requests to an endpoint, as an operator's tools send them."""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S: Final = 30.0


def get(url: str) -> tuple[int, str]:
    """Status and body of a GET."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def scrape(url: str) -> dict[str, float]:
    """Return the samples of an endpoint, e.g. ``fleet_devices{group="",state="online"}``."""
    status, text = get(f"{url}/metrics")
    assert status == 200, text
    return {
        sample_name(sample.name, sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def sample_name(name: str, labels: dict[str, str]) -> str:
    shown = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{shown}}}" if shown else name

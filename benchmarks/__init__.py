"""Measurements, from a checkout; `fleet bench` runs them."""

import cloud_broker_worker  # noqa: F401  # before torch: it says how torch's threads wait

"""Measurements, from a checkout; `fleet bench` runs them."""

import cloud_broker_worker  # noqa: F401  # before torch: it says how torch's threads wait
import fleet.version  # noqa: F401  # before ONNX Runtime: it turns off its telemetry

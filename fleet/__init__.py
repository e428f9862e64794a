"""The core of the fleet: protocol, bundles, transport, registry, server and command line."""

import os

from fleet.version import __version__ as __version__

# ONNX Runtime's official builds report their use to their maker, and write files into the home,
# unless this is set before their import. The other packages import this one first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

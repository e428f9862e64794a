"""``python -m cloud_broker_worker``."""

from cloud_broker_worker.cli import main

main()

"""``python -m cloud_broker_worker``."""

from cloud_broker_worker.worker.cli import main

main()

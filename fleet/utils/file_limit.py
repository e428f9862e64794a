"""The limit of open files, which is also the limit of connections."""

from __future__ import annotations

import resource


def raise_file_limit() -> int:
    """Raise this process's limit of file descriptors to the hard limit; return it.

    Child processes inherit it. systemd starts services with a soft limit of 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard

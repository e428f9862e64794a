"""Replies that are sent again, because their app has repeated its request."""

from __future__ import annotations

import logging
import threading
from typing import Final

from edge_agent.serving.app_turns import AppTurns
from edge_agent.serving.job_queue import Job
from fleet.errors import LinkError
from fleet.protocol import topics
from fleet.transport.base import Transport
from fleet.utils.rate_limited_log import RateLimitedLog

BATCH: Final = 50
PAUSE_S: Final = 0.1  # after each batch, so at most 500 replies a second are sent again
FLUSH_S: Final = 5.0

resend_log = RateLimitedLog(logging.getLogger(__name__), 10.0)


class ReplyResender:
    """A thread that sends the replies of repeated requests again, apps in turn.

    A request of a few bytes may have thousands of replies. So the thread keeps a pace, and a
    repetition is dropped while an earlier one of the same request waits.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lock = threading.Lock()
        self._waiting: AppTurns[Job] = AppTurns()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"resend-{transport.name}", daemon=True
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Send nothing more, and wait at most `timeout_s` seconds for the end of the thread."""
        self._stop.set()
        self._waiting.close()
        self._thread.join(timeout_s)

    def add(self, job: Job) -> None:
        """Send again the replies that `job` will have at its turn. This method does not wait."""
        with self._lock:
            is_dropped = job.is_resend_due
            job.is_resend_due = True
        if is_dropped:
            text = "a repetition of request %s of %s was dropped: an earlier one is not served yet"
            resend_log.warning(text, job.request, job.app)
        else:
            self._waiting.put(job.app, job)

    def _run(self) -> None:
        while (job := self._waiting.get()) and not self._stop.is_set():
            with self._lock:
                job.is_resend_due = False
            try:
                self._send(job)
            except LinkError as error:
                resend_log.warning("replies of request %s not sent again: %s", job.request, error)

    def _send(self, job: Job) -> None:
        """Send at QoS 0, which has no limit of messages in flight, at the pace of the link."""
        topic = topics.device_reply(self._transport.name, job.app, job.request)
        replies = list(job.replies)
        for start in range(0, len(replies), BATCH):
            for payload in replies[start : start + BATCH]:
                self._transport.publish(topic, payload)
            self._transport.flush(FLUSH_S)
            if self._stop.wait(PAUSE_S):
                return

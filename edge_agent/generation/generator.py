"""The generation of one answer, each token in the mode that applies at that time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from edge_agent.generation.decoder import Decoder, ExitChoice, GeneratedToken, proceed
from edge_agent.generation.mode_controller import ModeController
from edge_agent.generation.speculative import SpeculativeDecoder
from edge_agent.session.cloud_session import CloudSession
from fleet.errors import CloudError, DeadlineError
from fleet.protocol.modes import FALLBACK, Mode, exit_source


class _CancelledError(Exception):
    """A signal that ends a cancelled sequence in the middle of a step."""


class Generator:
    """The generation of one sequence.

    Without `cloud_session` and `drafts` the device generates alone.
    """

    def __init__(
        self,
        decoder: Decoder,
        modes: ModeController,
        eos_token_ids: Sequence[int],
        cloud_session: CloudSession | None = None,
        drafts: SpeculativeDecoder | None = None,
    ) -> None:
        self._decoder = decoder
        self._modes = modes
        self._eos_token_ids = eos_token_ids
        self._cloud_session = cloud_session
        self._drafts = drafts

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        *,
        deadline: float = float("inf"),
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[GeneratedToken]:
        """Generate up to `max_new_tokens` tokens; the last one may be an end-of-sequence token.

        A cancelled sequence ends early.

        Raises:
            DeadlineError: the monotonic clock has passed `deadline`.
            CloudError: the cloud has to choose the tokens, and no worker accepts the session.
        """
        self._decoder.text += prompt_ids
        num_tokens = 0

        def check() -> None:
            if is_cancelled():
                raise _CancelledError
            if time.monotonic() >= deadline:
                raise DeadlineError(self._why_late(num_tokens))

        self._decoder.check = check
        try:
            while num_tokens < max_new_tokens:
                check()
                for token in self._advance(num_tokens, max_new_tokens - num_tokens):
                    num_tokens += 1
                    yield token
                    if token.token_id in self._eos_token_ids:
                        return
        except _CancelledError:
            return
        finally:
            # `check` refers to this object: without it the caches are freed at once.
            self._decoder.check = proceed

    def _why_late(self, num_tokens: int) -> str:
        note = self._cloud_session.note if self._cloud_session else None
        reason = f" ({note})" if note else ""
        return (
            f"the answer's deadline passed after {num_tokens} tokens{reason}; "
            "allow more time with deadline_ms, at most the device's answer_deadline_ms"
        )

    def _advance(self, num_tokens: int, max_tokens: int) -> list[GeneratedToken]:
        session = self._cloud_session
        drafts = self._drafts
        is_available = session is not None and session.is_available
        mode = self._modes.at(num_tokens, is_link_up=is_available)
        if session is None or drafts is None:
            return self._own_tokens(max_tokens)
        if mode is Mode.VERIFIED:
            refusal = session.refusal
            if refusal and self._modes.needs_cloud:
                raise CloudError(
                    f"no worker accepts this answer ({refusal.code}): {refusal.message}"
                )
            return drafts.advance(max_tokens)
        if not is_available or (mode is Mode.STANDALONE and not session.has_request):
            return drafts.release() if drafts.has_drafts else self._own_tokens(max_tokens)
        return drafts.advance(
            max_tokens if mode is Mode.COLLABORATIVE else 0,
            trusts_exits=True,
            wait_ms=self._modes.wait_ms(),
        )

    def _own_tokens(self, max_tokens: int) -> list[GeneratedToken]:
        return [self._own_token(choice) for choice in self._decoder.advance(max_tokens)]

    def _own_token(self, choice: ExitChoice) -> GeneratedToken:
        is_emitted = choice.is_confident or self._modes.is_alone
        source = exit_source(choice.exit_layer) if is_emitted else FALLBACK
        return GeneratedToken(
            choice.token_id, choice.logprob, source, choice.top, choice.confidence
        )

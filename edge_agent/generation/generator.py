"""One answer, token by token, in whatever mode the moment calls for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from edge_agent.generation.decoder import Decoder, GeneratedToken
from edge_agent.generation.mode_controller import ModeController
from edge_agent.generation.speculative import SpeculativeDecoder
from edge_agent.session.cloud_session import CloudSession
from fleet.errors import CloudError, DeadlineError
from fleet.protocol.modes import FALLBACK, Mode, exit_source


class _CancelledError(Exception):
    """Ends a sequence within a step."""


class Generator:
    """Generates one sequence. Without `uplink` and `run` it is alone: the deepest exit then always emits."""

    def __init__(
        self,
        decoder: Decoder,
        modes: ModeController,
        eos_token_ids: Sequence[int],
        uplink: CloudSession | None = None,
        run: SpeculativeDecoder | None = None,
    ) -> None:
        self._decoder = decoder
        self._modes = modes
        self._eos_token_ids = eos_token_ids
        self._uplink = uplink
        self._run = run

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        *,
        deadline: float = float("inf"),
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[GeneratedToken]:
        """Up to `max_new_tokens` tokens; the last one may be an end-of-sequence token. Ends early when cancelled.

        Raises:
            DeadlineError: the monotonic clock has passed `deadline`.
            CloudError: only the cloud may decide, and no worker takes the session.
        """
        self._decoder.text += prompt_ids
        num_tokens = 0

        def check() -> None:
            if is_cancelled():
                raise _CancelledError
            if time.monotonic() >= deadline:
                raise DeadlineError(self._why_late(num_tokens))

        self._decoder.check = check
        with suppress(_CancelledError):
            while num_tokens < max_new_tokens:
                check()
                for token in self._advance(num_tokens, max_new_tokens - num_tokens):
                    num_tokens += 1
                    yield token
                    if token.token_id in self._eos_token_ids:
                        return

    def _why_late(self, num_tokens: int) -> str:
        note = f" ({self._uplink.note})" if self._uplink and self._uplink.note else ""
        return f"the answer's deadline passed after {num_tokens} tokens{note}; allow more time with deadline_ms"

    def _advance(self, num_tokens: int, max_tokens: int) -> list[GeneratedToken]:
        uplink = self._uplink
        run = self._run
        mode = self._modes.at(num_tokens, is_link_up=uplink is not None and uplink.may_answer)
        if uplink is None or run is None:
            return [self._own_token()]
        if mode is Mode.VERIFIED:
            if uplink.refusal and self._modes.needs_cloud:
                raise CloudError(
                    f"no worker takes this answer ({uplink.refusal.code}): {uplink.refusal.message}"
                )
            return run.advance(max_tokens)
        if not uplink.may_answer or (mode is Mode.STANDALONE and not uplink.has_question):
            return run.release() if run.has_drafts else [self._own_token()]
        return run.advance(
            max_tokens if mode is Mode.COLLABORATIVE else 0,
            trusts_exits=True,
            wait_ms=self._modes.wait_ms(),
        )

    def _own_token(self) -> GeneratedToken:
        choice = self._decoder.choose()
        self._decoder.text.append(choice.token_id)
        is_wanted = choice.is_sure or self._modes.is_alone
        return GeneratedToken(
            choice.token_id,
            choice.logprob,
            exit_source(choice.exit_layer) if is_wanted else FALLBACK,
        )

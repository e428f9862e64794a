"""One answer, token by token, in whatever mode the moment calls for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from edge_agent.decoder import Choice, Decoder, GeneratedToken
from edge_agent.lookahead import Lookahead
from edge_agent.modes import Modes
from edge_agent.uplink import Uplink
from edge_agent.verified import VerifiedRun
from fleet.errors import CloudError, DeadlineError
from fleet.policy import CLOUD, FALLBACK, Mode, exit_source


class Generator:
    """Generates one sequence. `uplink` None is standalone: the deepest exit then always emits.

    `lookahead` is what the device does while it waits, `verified` what verified mode needs; None where the mode cannot
    become that.
    """

    def __init__(
        self,
        decoder: Decoder,
        modes: Modes,
        eos_token_ids: Sequence[int],
        uplink: Uplink | None = None,
        lookahead: Lookahead | None = None,
        verified: VerifiedRun | None = None,
    ) -> None:
        self._decoder = decoder
        self._modes = modes
        self._eos_token_ids = eos_token_ids
        self._uplink = uplink
        self._lookahead = lookahead
        self._verified = verified

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
        while num_tokens < max_new_tokens and not is_cancelled():
            if time.monotonic() >= deadline:
                raise DeadlineError(self._why_late(num_tokens))
            for token in self._advance(num_tokens, max_new_tokens - num_tokens):
                num_tokens += 1
                yield token
                if token.token_id in self._eos_token_ids:
                    return

    def _why_late(self, num_tokens: int) -> str:
        note = f" ({self._uplink.note})" if self._uplink and self._uplink.note else ""
        return f"the answer's deadline passed after {num_tokens} tokens{note}; allow more time with deadline_ms"

    def _advance(self, num_tokens: int, max_tokens: int) -> list[GeneratedToken]:
        uplink, verified = self._uplink, self._verified
        mode = self._modes.at(num_tokens, is_link_up=uplink is not None and uplink.may_answer)
        if verified is None or uplink is None:
            return [self._next_token(mode, max_tokens)]
        if mode is Mode.VERIFIED:
            if uplink.refusal and self._modes.needs_cloud:
                raise CloudError(f"no worker takes this answer ({uplink.refusal.code}): {uplink.refusal.message}")
            return verified.advance(max_tokens)
        if verified.has_drafts:
            return verified.advance(max_tokens, draft=False) if uplink.is_open else verified.release()
        return [self._next_token(mode, max_tokens)]

    def _next_token(self, mode: Mode, max_tokens: int) -> GeneratedToken:
        choice = self._decoder.choose()
        token = GeneratedToken(choice.token_id, choice.logprob, exit_source(choice.exit_layer))
        if not choice.is_sure:
            token = self._ask(mode, choice, max_tokens) or (
                token if self._modes.is_alone else GeneratedToken(token.token_id, token.logprob, FALLBACK)
            )
        self._decoder.text.append(token.token_id)
        return token

    def _ask(self, mode: Mode, choice: Choice, max_tokens: int) -> GeneratedToken | None:
        uplink, lookahead = self._uplink, self._lookahead
        if uplink is None or mode is Mode.STANDALONE:
            return None
        steps = lookahead.steps(choice, max_tokens) if lookahead else ()
        answer = uplink.assist(len(self._decoder.text) - 1, self._modes.wait_ms(), steps)
        if answer is None:
            return None
        if lookahead:
            lookahead.judge(choice, answer.token_id)
        return GeneratedToken(answer.token_id, answer.logprob, CLOUD)

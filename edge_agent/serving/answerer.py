"""The response to one request: its session with the cloud, its tokens, its replies, its report."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import UNSET

from edge_agent.answer_tracer import AnswerTracer
from edge_agent.engine.fair_lock import FairLock
from edge_agent.engine.prefix_tree import KeptCaches
from edge_agent.engine.tokenizer import ChatTokenizer
from edge_agent.generation.acceptance_rate import AcceptanceRate
from edge_agent.generation.combined_proposer import CombinedProposer
from edge_agent.generation.decoder import Decoder, GeneratedToken
from edge_agent.generation.generator import Generator
from edge_agent.generation.mode_controller import ModeController
from edge_agent.generation.speculative import SpeculativeDecoder
from edge_agent.generation.suffix_table import SuffixTable
from edge_agent.generation.suffix_tables import SuffixTables
from edge_agent.measurements import Measurements
from edge_agent.reporting.report_merge import merge_reports
from edge_agent.reporting.reporter import Reporter
from edge_agent.serving.answer_text import AnswerText
from edge_agent.serving.job_queue import Job
from edge_agent.serving.request_planner import RequestPlan
from edge_agent.session.cloud_session import CloudSession
from edge_agent.session.kept_sessions import KeptSession, KeptSessions, TakenSession
from edge_agent.session.worker_directory import WorkerDirectory
from fleet.bundles.manifest import Manifest
from fleet.constraints.token_constraint import TokenConstraint
from fleet.graphs.cascade import chunks_are_exact
from fleet.protocol.answer_trace import ReplyTrace
from fleet.protocol.counts import AnswerCounts
from fleet.protocol.desired_config import AUTO
from fleet.protocol.hidden_states import TOKENS
from fleet.protocol.messages import MIN_PROTOCOL, NO_RULES, PROTOCOL, ChoiceRules, Open
from fleet.protocol.modes import Mode, offload_rate
from fleet.protocol.prompt import (
    MAX_FULL_TEXT_BYTES,
    Choice,
    ErrorInfo,
    PromptRequest,
    Reply,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from fleet.protocol.report import GenerationReport
from fleet.protocol.triggers import trigger_of
from fleet.transport.base import Transport

# A session's name is short, because every message has it. It must be unique only on its device.
SESSION_BYTES: Final = 5
MIN_LOGPROB: Final = -9999.0
MAX_REPLY_CHARACTERS: Final = MAX_FULL_TEXT_BYTES // 4


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """One choice of a response. `rest` is the end of its `text`, which no reply has yet."""

    report: GenerationReport
    text: str
    rest: str
    note: str | None
    logprobs: tuple[TokenLogprob, ...] | None


class Answerer:
    """The generator of responses to jobs; several threads may call it and share one model."""

    def __init__(
        self,
        transport: Transport,
        *,
        workers: WorkerDirectory,
        reporter: Reporter,
        manifest: Manifest,
        tokenizer: ChatTokenizer,
        model_lock: FairLock,
        kept_caches: KeptCaches,
        kept_sessions: KeptSessions,
        tables: SuffixTables,
        epoch: int,
    ) -> None:
        self._transport = transport
        self._workers = workers
        self._reporter = reporter
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._model_lock = model_lock
        self._kept_caches = kept_caches
        self._kept_sessions = kept_sessions
        self._tables = tables
        self._epoch = epoch
        self._measurements = Measurements()
        self._acceptance = AcceptanceRate()

    def reply(self, job: Job, reply: Reply) -> None:
        """Send a job's next reply, and keep it for an app that sends its request again."""
        if not job.replies:
            reply = msgspec.structs.replace(reply, generation=job.generation)
        if job.tracer and reply.done:
            reply = msgspec.structs.replace(reply, trace=job.tracer.end())
        payload = msgspec.json.encode(reply)
        job.replies.append(payload)
        job.send(payload)

    def answer(self, job: Job, plan: RequestPlan) -> None:
        """Stream the response, or send its choices, and report the counts, also after an error.

        Raises:
            PromptError: the response is late, or cannot continue without the cloud.
        """
        request = job.prompt  # each later choice has another seed
        outcomes = [self._answer_once(job, plan, choice) for choice in range(job.prompt.n)]
        reports = [outcome.report for outcome in outcomes]
        report = merge_reports(reports, job.generation) if len(reports) > 1 else reports[0]
        content = self._content(job, outcomes)
        last_reply = Reply(
            seq=len(job.replies),
            done=True,
            finish_reason=reports[0].finish_reason,
            usage=_usage(report, request, job.reused_tokens),
            bundle_id=report.bundle_id,
            note=outcomes[0].note,
            **content,
        )
        self.reply(job, last_reply)

    def _content(self, job: Job, outcomes: Sequence[_Outcome]) -> dict[str, Any]:
        """Return the fields of the last reply that have the text."""
        if len(outcomes) > 1:
            max_bytes = MAX_FULL_TEXT_BYTES // len(outcomes)
            choices = [
                Choice(
                    index=index,
                    full_text=_full_text(outcome.text, max_bytes),
                    finish_reason=outcome.report.finish_reason,
                    logprobs=outcome.logprobs,
                )
                for index, outcome in enumerate(outcomes)
            ]
            return {"choices": tuple(choices)}
        outcome = outcomes[0]
        text = outcome.rest if job.prompt.stream else self._whole_text(job, outcome.text)
        return {
            "text": text,
            "full_text": _full_text(outcome.text),
            "logprobs": outcome.logprobs,
        }

    def _answer_once(self, job: Job, plan: RequestPlan, choice: int) -> _Outcome:
        """Generate and report one choice of the response."""
        job.begin(choice)
        is_alone = plan.applied_mode is Mode.STANDALONE or job.cancelled.is_set()
        if job.prompt.trace:
            num_prompt = len(plan.prompt_ids)
            job.tracer = AnswerTracer(job.arrived_at, num_prompt, self._tokenizer.token_text)
        text = AnswerText(self._tokenizer.stream(job.prompt), job.prompt.stop)
        try:
            with nullcontext() if is_alone else self._session(job, plan):
                finish_reason = self._generate(job, plan, text)
        except Exception:
            self._reporter.add(_report(job, plan, self._manifest.bundle_id, "error"))
            raise
        if finish_reason != "cancelled":
            self._table(job, plan).add([*plan.prompt_ids, *job.token_ids])
        rest = text.flush()
        if text.is_stopped:
            finish_reason = "stop"
        report = _report(job, plan, self._manifest.bundle_id, finish_reason)
        self._reporter.add(report)
        return _Outcome(
            report=report,
            text=text.text,
            rest=rest,
            note=job.cloud_session.note if job.cloud_session else None,
            logprobs=tuple(job.logprobs) or None,
        )

    def _whole_text(self, job: Job, text: str) -> str:
        """Return the text of the only reply; send the beginning of a very long text before."""
        while _full_text(text) is None:
            self.reply(job, Reply(seq=len(job.replies), text=text[:MAX_REPLY_CHARACTERS]))
            text = text[MAX_REPLY_CHARACTERS:]
        return text

    def _generate(self, job: Job, plan: RequestPlan, text: AnswerText) -> str:
        """Generate the response, and return the reason why it ended."""
        if job.cancelled.is_set():
            return "cancelled"
        decoder = self._decoder(job, plan)
        generator = self._generator(job, plan, decoder)
        finish_reason = self._stream(job, plan, text, generator)
        num_tokens = len(plan.prompt_ids) + job.num_tokens
        self._kept_caches.keep(job.app, decoder.cascade, num_tokens)
        if finish_reason != "cancelled" and plan.config.reuse_share:
            job.kept_session = self._end_of_session(job, plan, decoder)
        return finish_reason

    def _end_of_session(self, job: Job, plan: RequestPlan, decoder: Decoder) -> KeptSession | None:
        """End the session of an answer so that it can be continued, if it can."""
        session = job.cloud_session
        end = session.keep() if session else None
        if session is None or end is None or session.worker is None or session.worker_epoch is None:
            return None
        return KeptSession(
            app=job.app,
            session=end.session,
            worker=session.worker,
            worker_epoch=session.worker_epoch,
            branch=end.branch,
            upload_layer=plan.partition.upload_layer,
            token_ids=np.array(decoder.text[: end.num_positions], np.int64),
        )

    def _stream(self, job: Job, plan: RequestPlan, text: AnswerText, generator: Generator) -> str:
        """Send the tokens of the response, and return the reason why it ended."""
        tokens = generator.generate(
            plan.prompt_ids,
            plan.max_new_tokens,
            deadline=job.arrived_at + plan.deadline_s,
            is_cancelled=job.cancelled.is_set,
        )
        for token in tokens:
            job.token_ids.append(token.token_id)
            job.count(token.source)
            piece = text.push(token.token_id)
            logprobs = self._logprobs(job, token)
            if job.prompt.stream:
                reply = Reply(
                    seq=len(job.replies),
                    text=piece,
                    token_id=token.token_id,
                    source=token.source,
                    confidence=_rounded_confidence(token.confidence),
                    logprobs=logprobs or None,
                    trace=_token_trace(job, token),
                )
                self.reply(job, reply)
            else:
                job.logprobs += logprobs
            if text.is_stopped or token.token_id in plan.eos_token_ids:
                return "stop"
        return "cancelled" if job.cancelled.is_set() else "length"

    def _logprobs(self, job: Job, token: GeneratedToken) -> tuple[TokenLogprob, ...]:
        """Return the log-probabilities of a token, if the request asks for them."""
        if not job.prompt.logprobs:
            return ()
        text_of = self._tokenizer.token_text
        top = tuple(
            TopLogprob(text_of(token_id), token_id, _rounded(logprob))
            for token_id, logprob in token.top
        )
        text = text_of(token.token_id)
        return (TokenLogprob(text, token.token_id, _rounded(token.logprob), top),)

    def _constraint(self, rules: ChoiceRules) -> TokenConstraint | None:
        if rules.constraint is None:
            return None
        return self._tokenizer.grammars.constrain(rules.constraint, rules.prompt_length)

    def _table(self, job: Job, plan: RequestPlan) -> SuffixTable:
        """Return the past texts of the job's app, or of the trigger that made the job."""
        trigger = trigger_of(job.request)
        names = {each.name for each in plan.config.triggers}
        return self._tables.of(job.app, trigger if trigger in names else None)

    def _one_by_one_from(self, plan: RequestPlan) -> int | None:
        """Return the position from which on an exact answer has to run single positions."""
        is_any_chunk = not plan.is_exact or chunks_are_exact(plan.partition)
        return None if is_any_chunk else len(plan.prompt_ids)

    def _decoder(self, job: Job, plan: RequestPlan) -> Decoder:
        """Return a sequence that begins with what an earlier answer has run of the prompt."""
        prefix = self._kept_caches.find(job.app, plan.prompt_ids)
        job.reused_tokens += len(prefix)
        rules = _choice_rules(job, plan)
        decoder = Decoder(
            plan.partition,
            plan.capacity,
            thresholds=plan.exit_thresholds,
            sampling=job.prompt.sampling,
            cloud_session=job.cloud_session,
            lock=self._model_lock.of(job.app),
            measurements=self._measurements,
            one_by_one_from=self._one_by_one_from(plan),
            rules=rules,
            constraint=self._constraint(rules),
            proposer=CombinedProposer(self._table(job, plan), self._measurements.chunk_cost),
            eos_token_ids=plan.eos_token_ids,
            tracer=job.tracer,
        )
        decoder.begin(prefix)
        return decoder

    def _generator(self, job: Job, plan: RequestPlan, decoder: Decoder) -> Generator:
        eos = plan.eos_token_ids
        if job.cloud_session:
            job.speculative = SpeculativeDecoder(
                decoder,
                job.cloud_session,
                acceptance=self._acceptance,
                measurements=self._measurements,
                eos_token_ids=eos,
                max_draft=plan.config.max_draft,
                tracer=job.tracer,
            )
        job.mode_controller = ModeController(
            plan.applied_mode,
            plan.targets,
            self._measurements,
            plan.config.assist_deadline_ms,
            is_sample=plan.is_sample,
        )
        return Generator(decoder, job.mode_controller, eos, job.cloud_session, job.speculative)

    @contextmanager
    def _session(self, job: Job, plan: RequestPlan) -> Iterator[None]:
        """Run an answer with a session, which continues an earlier one of the app if it can."""
        layer = plan.partition.upload_layer
        taken = self._kept_sessions.take(job.app, plan.prompt_ids, layer)
        session = self._connect(job, plan, taken)
        try:
            with session:
                yield
        finally:
            if taken and session.worker is None:  # no worker has it
                self._kept_sessions.keep(taken.kept)
        if job.kept_session:  # its worker knows that the answer has ended
            self._kept_sessions.keep(job.kept_session)

    def _connect(self, job: Job, plan: RequestPlan, taken: TakenSession | None) -> CloudSession:
        note = self._workers.why_none(self._manifest.bundle_id)
        layer = plan.partition.upload_layer
        rules = _choice_rules(job, plan)
        opening = Open(
            session=secrets.token_hex(SESSION_BYTES),
            epoch=self._epoch,
            bundle_id=self._manifest.bundle_id,
            protocol=MIN_PROTOCOL if rules == NO_RULES else PROTOCOL,
            sampling=job.prompt.sampling,
            max_positions=plan.capacity,
            deadline_ms=plan.config.assist_deadline_ms,
            upload_layer=UNSET if layer == self._manifest.upload_layer else layer,
            rules=UNSET if rules == NO_RULES else rules,
            continues=taken.continuation if taken else UNSET,
        )
        job.cloud_session = CloudSession(
            self._transport,
            self._workers,
            opening,
            self._manifest.model.hidden_size,
            self._measurements,
            upload_dtype=plan.config.upload_dtype,
            prompt_ids=plan.prompt_ids if self._uploads_ids(plan) else (),
            note=note,
            continued_worker=taken.kept.worker if taken else None,
            tracer=job.tracer,
        )
        return job.cloud_session

    def _uploads_ids(self, plan: RequestPlan) -> bool:
        """Return whether the prompt is uploaded as token ids, if the worker accepts that."""
        setting = plan.config.upload_prompt
        return setting == TOKENS or (setting == AUTO and self._measurements.is_faster_as_ids())


def _choice_rules(job: Job, plan: RequestPlan) -> ChoiceRules:
    return job.prompt.choice_rules(len(plan.prompt_ids))


def error_reply(seq: int, code: str, message: str) -> Reply:
    """Return the last reply to a request that fails."""
    return Reply(seq=seq, done=True, finish_reason="error", error=ErrorInfo(code, message))


def _report(job: Job, plan: RequestPlan, bundle_id: str, finish_reason: str) -> GenerationReport:
    cloud_session = job.cloud_session
    return GenerationReport(
        generation=job.report_name,
        app=job.app,
        request=job.request,
        session=cloud_session.session if cloud_session else None,
        worker=cloud_session.worker if cloud_session else None,
        bundle_id=bundle_id,
        mode=plan.mode,
        started_at=job.received_at,
        prompt_tokens=len(plan.prompt_ids),
        tokens=job.num_tokens,
        sources=job.sources,
        assists=cloud_session.num_assists if cloud_session else 0,
        bytes_up=cloud_session.bytes_up if cloud_session else 0,
        bytes_down=cloud_session.bytes_down if cloud_session else 0,
        ttft_ms=job.ttft_ms,
        tpot_ms=job.tpot_ms,
        finish_reason=finish_reason,
        verifies=cloud_session.num_verifies if cloud_session else 0,
        drafted=job.speculative.num_drafted if job.speculative else 0,
        switches=job.mode_controller.switches if job.mode_controller else (),
        judged=job.speculative.num_judged if job.speculative else 0,
        agreed=job.speculative.num_agreed if job.speculative else 0,
    )


def _token_trace(job: Job, token: GeneratedToken) -> ReplyTrace | None:
    """Return the trace of a token, if the request asks for it."""
    if job.tracer is None:
        return None
    switches = job.mode_controller.switches if job.mode_controller else ()
    return job.tracer.token(token.logprob, switches)


def _rounded(logprob: float) -> float:
    """Return a log-probability, also of a faulty worker, as a finite number of six digits."""
    return round(min(0.0, max(MIN_LOGPROB, logprob)), 6)


def _rounded_confidence(confidence: float | None) -> float | None:
    """Return a confidence with the digits that a reader needs; each token's reply has one."""
    return None if confidence is None else round(confidence, 4)


def _full_text(text: str, max_bytes: int | None = None) -> str | None:
    limit = MAX_FULL_TEXT_BYTES if max_bytes is None else max_bytes
    return text if len(text.encode()) <= limit else None


def _usage(report: GenerationReport, request: PromptRequest, reused_tokens: int) -> Usage:
    counts = {name: getattr(report, name) for name in AnswerCounts.__struct_fields__}
    return Usage(
        **counts,
        reused_tokens=reused_tokens,
        offload_rate=offload_rate(report.sources),
        ttft_ms=report.ttft_ms,
        tpot_ms=report.tpot_ms,
        round_trips=report.assists + report.verifies,
        switches=report.switches,
        seed=request.seed,
        mode=Mode(report.mode),
        sampling=request.sampling_options,
    )

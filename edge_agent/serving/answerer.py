"""One request's answer: its session with the cloud, its tokens, its replies, its report."""

from __future__ import annotations

import secrets
from contextlib import nullcontext
from typing import Final

import msgspec

from edge_agent.engine.fair_lock import FairLock
from edge_agent.engine.partition import Partition
from edge_agent.engine.tokenizer import ChatTokenizer, TextStream
from edge_agent.generation.acceptance_rate import AcceptanceRate
from edge_agent.generation.decoder import Decoder
from edge_agent.generation.generator import Generator
from edge_agent.generation.mode_controller import ModeController
from edge_agent.generation.speculative import SpeculativeDecoder
from edge_agent.measurements import Measurements
from edge_agent.reporting.reporter import Reporter
from edge_agent.serving.job_queue import Job
from edge_agent.serving.request_planner import RequestPlan
from edge_agent.session.cloud_session import CloudSession
from edge_agent.session.worker_directory import WorkerDirectory
from fleet.bundles.manifest import Manifest
from fleet.protocol import topics
from fleet.protocol.messages import PROTOCOL, Open
from fleet.protocol.modes import Mode, offload_rate
from fleet.protocol.prompt import ErrorInfo, Reply, Usage
from fleet.protocol.report import GenerationReport
from fleet.transport.base import Transport, publish_or_log

SESSION_BYTES: Final = (
    5  # of a name that is in every message, and need only differ from others of this device
)


class Answerer:
    """Answers jobs, several at once from threads of their own: each takes its turns with the one model."""

    def __init__(
        self,
        transport: Transport,
        workers: WorkerDirectory,
        reporter: Reporter,
        manifest: Manifest,
        partition: Partition,
        tokenizer: ChatTokenizer,
        turns: FairLock,
        epoch: int,
    ) -> None:
        self._transport = transport
        self._workers = workers
        self._reporter = reporter
        self._manifest = manifest
        self._partition = partition
        self._tokenizer = tokenizer
        self._turns = turns
        self._epoch = epoch
        self._measurements = Measurements()
        self._acceptance = AcceptanceRate()

    def reply(self, job: Job, reply: Reply) -> None:
        """Publishes a job's next reply, and keeps it for an app that asks again."""
        if not job.replies:
            reply = msgspec.structs.replace(reply, generation=job.generation)
        payload = msgspec.json.encode(reply)
        job.replies.append(payload)
        publish_or_log(
            self._transport,
            topics.reply(self._transport.name, job.app, job.request),
            payload,
            qos=1,
        )

    def answer(self, job: Job, plan: RequestPlan) -> None:
        """Streams the answer, and reports what it took, up to an error, too.

        Raises PromptError when the answer is late, or cannot go on without the cloud.
        """
        wants_cloud = plan.mode is not Mode.STANDALONE and not job.cancelled.is_set()
        uplink = self._connect(job, plan) if wants_cloud else None
        text = self._tokenizer.stream()
        try:
            with uplink or nullcontext():
                finish_reason = self._generate(job, plan, text)
        except Exception:
            self._reporter.add(_report(job, plan, self._manifest.bundle_id, "error"))
            raise
        report = _report(job, plan, self._manifest.bundle_id, finish_reason)
        self._reporter.add(report)
        self.reply(
            job,
            Reply(
                seq=len(job.replies),
                text=text.flush(),
                done=True,
                finish_reason=finish_reason,
                usage=_usage(report),
                bundle_id=report.bundle_id,
                note=uplink.note if uplink else None,
            ),
        )

    def _generate(self, job: Job, plan: RequestPlan, text: TextStream) -> str:
        """Streams the answer's tokens; gives the reason why it ended."""
        if job.cancelled.is_set():
            return "cancelled"
        generator = self._generator(job, plan)
        tokens = generator.generate(
            plan.prompt_ids,
            plan.max_new_tokens,
            deadline=job.arrived + plan.deadline_s,
            is_cancelled=job.cancelled.is_set,
        )
        for token in tokens:
            job.count(token.source)
            self.reply(
                job,
                Reply(
                    seq=len(job.replies),
                    text=text.push(token.token_id),
                    token_id=token.token_id,
                    source=token.source,
                ),
            )
            if token.token_id in plan.eos_token_ids:
                return "stop"
        return "cancelled" if job.cancelled.is_set() else "length"

    def _generator(self, job: Job, plan: RequestPlan) -> Generator:
        decoder = Decoder(
            self._partition,
            plan.capacity,
            thresholds=plan.thresholds,
            sampling=job.prompt.sampling,
            uplink=job.uplink,
            turns=self._turns,
            measurements=self._measurements,
            one_by_one_from=len(plan.prompt_ids) if plan.is_exact else None,
        )
        eos = plan.eos_token_ids
        if job.uplink:
            job.drafts = SpeculativeDecoder(
                decoder,
                job.uplink,
                acceptance=self._acceptance,
                measurements=self._measurements,
                eos_token_ids=eos,
                max_draft=plan.config.max_draft,
            )
        mode = Mode.VERIFIED if plan.is_exact else plan.mode
        job.modes = ModeController(
            mode,
            plan.targets,
            self._measurements,
            plan.config.assist_deadline_ms,
            is_sample=plan.is_sample,
        )
        return Generator(decoder, job.modes, eos, job.uplink, job.drafts)

    def _connect(self, job: Job, plan: RequestPlan) -> CloudSession:
        note = self._workers.why_none(self._manifest.bundle_id)
        opening = Open(
            session=secrets.token_hex(SESSION_BYTES),
            epoch=self._epoch,
            bundle_id=self._manifest.bundle_id,
            protocol=PROTOCOL,
            sampling=job.prompt.sampling,
            max_positions=plan.capacity,
            deadline_ms=plan.config.assist_deadline_ms,
        )
        job.uplink = CloudSession(
            self._transport,
            self._workers,
            opening,
            self._manifest.model.hidden_size,
            self._measurements,
            upload_dtype=plan.config.upload_dtype,
        )
        job.uplink.note = note
        return job.uplink


def refusal(seq: int, code: str, message: str) -> Reply:
    """The last reply to a request that gets no answer, or no more of one."""
    return Reply(seq=seq, done=True, finish_reason="error", error=ErrorInfo(code, message))


def _report(job: Job, plan: RequestPlan, bundle_id: str, finish_reason: str) -> GenerationReport:
    uplink = job.uplink
    return GenerationReport(
        generation=job.generation,
        app=job.app,
        request=job.request,
        session=uplink.session if uplink else None,
        worker=uplink.worker if uplink else None,
        bundle_id=bundle_id,
        mode=plan.mode,
        started_at=job.received_at,
        prompt_tokens=len(plan.prompt_ids),
        tokens=job.num_tokens,
        sources=job.sources,
        assists=uplink.num_assists if uplink else 0,
        bytes_up=uplink.bytes_up if uplink else 0,
        bytes_down=uplink.bytes_down if uplink else 0,
        ttft_ms=job.ttft_ms,
        tpot_ms=job.tpot_ms,
        finish_reason=finish_reason,
        verifies=uplink.num_verifies if uplink else 0,
        drafted=job.drafts.num_drafted if job.drafts else 0,
        switches=job.modes.switches if job.modes else (),
        judged=job.drafts.num_judged if job.drafts else 0,
        agreed=job.drafts.num_agreed if job.drafts else 0,
    )


def _usage(report: GenerationReport) -> Usage:
    return Usage(
        prompt_tokens=report.prompt_tokens,
        tokens=report.tokens,
        sources=report.sources,
        offload_rate=offload_rate(report.sources),
        bytes_up=report.bytes_up,
        bytes_down=report.bytes_down,
        ttft_ms=report.ttft_ms,
        tpot_ms=report.tpot_ms,
        round_trips=report.assists + report.verifies,
        drafted=report.drafted,
        switches=report.switches,
    )

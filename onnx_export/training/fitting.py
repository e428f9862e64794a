"""Fits exit heads to the full model's distribution, over a few thousand tokens of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onnx_export.heads import ExitHead
from onnx_export.training.generation import Answers, causal_mask, own_attention

RIDGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """`hard_share`: weight of the full model's choice in the loss; the rest is its distribution."""

    epochs: float = 3.0
    batch: int = 8  # conversations
    learning_rate: float = 1e-3
    hard_share: float = 0.5
    weight_decay: float = 0.0
    sampled: int = 2048  # random tokens that stand for the rest of the vocabulary
    teacher_top: int = 16
    seed: int = 0


def fit_ridge(head: ExitHead, states: Tensor, final: Tensor) -> None:
    """Sets the adapter to the ridge regression of `final` on the normalised `states`, both [n, hidden]."""
    hidden = final.shape[1]
    gram = torch.zeros(hidden, hidden, dtype=torch.float64)
    cross = torch.zeros(hidden, hidden, dtype=torch.float64)
    with torch.no_grad():
        for x, y in zip(states.split(8192), final.split(8192), strict=True):
            normalised = head.norm(x.float())
            gram += (normalised.T @ normalised).double()
            cross += (normalised.T @ y.float()).double()
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(hidden, dtype=torch.float64)
        head.adapter.weight.copy_(torch.linalg.solve(gram + ridge, cross).T.float())


class Candidates:
    """The tokens over which one batch's softmax runs, [c] ids, and what is added to their logits, [c].

    All of the full model's best tokens for the batch are among them; `sampled` others stand for the rest of the
    vocabulary, each for as many as were left out (importance sampling of the partition function; see Jean et al.,
    arXiv 1412.2007). `targets` [n, k]: where the full model's best tokens are in `ids`.
    """

    def __init__(
        self, top_ids: Tensor, vocab: int, sampled: int, generator: torch.Generator
    ) -> None:
        best, inverse = torch.unique(top_ids, return_inverse=True)
        rest = torch.ones(vocab, dtype=torch.bool)
        rest[best] = False
        others = rest.nonzero().flatten()
        count = min(sampled, len(others))
        drawn = (
            others[torch.randint(len(others), (count,), generator=generator)] if count else others
        )
        self.ids = torch.cat([best, drawn])
        self.offset = torch.zeros(len(self.ids))
        if count:
            self.offset[len(best) :] = torch.tensor(len(others) / count).log()
        self.targets = inverse


def loss_of(
    exit_hidden: Tensor, weight: Tensor, offset: Tensor, targets: Tensor, probs: Tensor, hard: float
) -> Tensor:
    """Mean loss of exit_hidden [n, hidden] against the full model's best tokens `targets` [n, k], best first.

    `weight` [c, hidden]: rows of the LM head for the candidates. The soft part is the cross entropy with `probs`
    [n, k], where what the best tokens leave over is one more class; the hard one is with the best token.
    """
    logits = torch.addmm(offset, exit_hidden, weight.T)
    logprobs = logits.gather(1, targets) - logits.logsumexp(1, keepdim=True)
    rest = (1 - probs.sum(1)).clamp(min=0)
    other = torch.log1p(-logprobs.exp().sum(1).clamp(max=1 - 1e-6))
    soft = -(probs * logprobs).sum(1) - rest * other
    return (hard * -logprobs[:, 0] + (1 - hard) * soft).mean()


class Runner:
    """Runs a head over whole conversations, as a device would: `forward` gives the answering positions alone."""

    def __init__(self, model: Any, answers: Answers) -> None:
        self.answers = answers
        self.model = model

    def forward(self, head: ExitHead, exit_layer: int, conversations: Sequence[int]) -> Tensor:
        """exit_hidden [m of these conversations, hidden] float32."""
        hidden = self.answers.hidden[exit_layer]
        if head.layer is None:
            return head(
                torch.cat([hidden[self.answers.answering(c)[0]] for c in conversations]).float()
            )
        starts = self.answers.starts
        lengths = self.answers.lengths
        whole = [hidden[starts[c] : starts[c] + lengths[c]] for c in conversations]
        padded = nn.utils.rnn.pad_sequence(whole, batch_first=True).float()
        columns = torch.arange(padded.shape[1])
        mask = causal_mask(torch.zeros(len(padded), dtype=torch.int64), columns, padded.dtype)
        position_embeddings = self.model.model.rotary_emb(padded, columns[None])
        with own_attention(self.model):
            out = head.layer(padded, attention_mask=mask, position_embeddings=position_embeddings)
        first = [int(self.answers.prompt_lengths[c]) - 1 for c in conversations]
        return head(
            torch.cat(
                [out[i, a : len(w)] for i, (a, w) in enumerate(zip(first, whole, strict=True))]
            )
        )

    def rows(self, conversations: Sequence[int]) -> Tensor:
        """Where the answering positions of these conversations are among all m, int64."""
        spans = [self.answers.answering(c)[1] for c in conversations]
        return torch.cat([torch.arange(span.start, span.stop) for span in spans])


def fit(
    heads: Mapping[int, ExitHead],
    model: Any,
    answers: Answers,
    conversations: Tensor,
    config: FitConfig,
    tick: Callable[[int], None],
) -> None:
    """Trains all heads at once on some conversations, in random order; `tick` hears how many were done."""
    generator = torch.Generator().manual_seed(config.seed)
    runner = Runner(model, answers)
    lm_head = model.lm_head.weight.detach()
    parameters = [p.requires_grad_(True) for head in heads.values() for p in head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    batches = -(-len(conversations) // config.batch)
    steps = max(1, round(config.epochs * batches))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, steps + 1, pct_start=0.1
    )
    order = torch.empty(0)
    for step in range(steps):
        if step % batches == 0:
            order = conversations[torch.randperm(len(conversations), generator=generator)]
        chosen = order[step % batches * config.batch :][: config.batch].tolist()
        rows = runner.rows(chosen)
        top_ids = answers.top_ids[rows, : config.teacher_top].long()
        probs = answers.top_logprobs[rows, : config.teacher_top].float().exp()
        candidates = Candidates(top_ids, len(lm_head), config.sampled, generator)
        weight = lm_head[candidates.ids]
        for layer, head in heads.items():
            out = runner.forward(head, layer, chosen)
            loss_of(
                out,
                weight,
                offset=candidates.offset,
                targets=candidates.targets,
                probs=probs,
                hard=config.hard_share,
            ).backward()
        for head in (
            heads.values()
        ):  # each for itself, so that a head is the same whatever is trained beside it
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        tick(len(chosen))
    for parameter in parameters:
        parameter.requires_grad_(False)


@torch.inference_mode()
def judge(
    head: ExitHead, exit_layer: int, model: Any, answers: Answers, conversations: Tensor
) -> tuple[Tensor, Tensor]:
    """What a head says at the answering positions: confidence [m] float32, and whether it agrees, bool [m]."""
    runner = Runner(model, answers)
    lm_head = model.lm_head.weight
    confidence = []
    agrees = []
    for chosen in conversations.split(8):
        out = runner.forward(head, exit_layer, chosen.tolist())
        best, ids = nn.functional.linear(out, lm_head).softmax(-1).max(-1)
        confidence.append(best)
        agrees.append(ids == answers.top_ids[runner.rows(chosen.tolist()), 0])
    return torch.cat(confidence), torch.cat(agrees)

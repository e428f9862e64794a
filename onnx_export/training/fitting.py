"""Training of exit heads on the full model's distribution, over a part of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fleet.bundles.decoder_variants import (
    angle_arguments,
    bounded,
    layer_output,
    rotate_positions,
)
from onnx_export.heads import ExitHead
from onnx_export.training.generation import TrainingAnswers, causal_mask, unrepeated_attention
from onnx_export.variants import logit_cap, state_scale

RIDGE = 1e-3
ROWS = 128
"""Rows of logits that are in memory at once: all of a vocabulary."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Options of the training by gradient.

    `hard_share`: weight of the full model's best token in the loss; the rest is the weight of its
    distribution.
    """

    epochs: float = 3.0
    batch: int = 8  # conversations
    learning_rate: float = 1e-3
    hard_share: float = 0.5
    weight_decay: float = 0.0
    sampled: int = 2048  # random tokens that stand for the rest of the vocabulary
    teacher_top: int = 16
    seed: int = 0


def fit_ridge(head: ExitHead, states: Tensor, final: Tensor, scale: float = 1.0) -> None:
    """Set the adapter to the ridge regression of `final` on the normalised `states` times `scale`.

    Both are [n, hidden].
    """
    hidden = final.shape[1]
    gram = torch.zeros(hidden, hidden, dtype=torch.float64)
    cross = torch.zeros(hidden, hidden, dtype=torch.float64)
    with torch.no_grad():
        for x, y in zip(states.split(8192), final.split(8192), strict=True):
            normalised = head.norm(x.float() * scale)
            gram += (normalised.T @ normalised).double()
            cross += (normalised.T @ y.float()).double()
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(hidden, dtype=torch.float64)
        solution = torch.linalg.solve(gram + ridge, cross)
        head.adapter.weight.copy_(solution.T.float())


class SampledVocabulary:
    """The tokens over which one batch's softmax runs, [c] `ids`, and their logit `offset`, [c].

    All of the full model's best tokens for the batch are among them; `sampled` others stand for the
    rest of the vocabulary, each for an equal share of the tokens left out (importance sampling of
    the partition function; see Jean et al., arXiv 1412.2007). `targets` [n, k]: indices of the full
    model's best tokens in `ids`.
    """

    def __init__(
        self, top_ids: Tensor, vocab: int, sampled: int, generator: torch.Generator
    ) -> None:
        best, inverse = torch.unique(top_ids, return_inverse=True)
        is_other = torch.ones(vocab, dtype=torch.bool)
        is_other[best] = False
        others = is_other.nonzero().flatten()
        count = min(sampled, len(others))
        drawn = others
        if count:
            drawn = others[torch.randint(len(others), (count,), generator=generator)]
        self.ids = torch.cat([best, drawn])
        self.offset = torch.zeros(len(self.ids))
        if count:
            self.offset[len(best) :] = torch.tensor(len(others) / count).log()
        self.targets = inverse


def distillation_loss(
    logits: Tensor, vocabulary: SampledVocabulary, probs: Tensor, hard_share: float
) -> Tensor:
    """Return the mean loss of logits [n, c] against the full model's best tokens.

    The logits are those of the tokens of `vocabulary`. The soft loss is the cross entropy with
    `probs` [n, k], best first, in which the probability that the best tokens leave over is one more
    class; the hard loss is that of the best token.
    """
    logits = logits + vocabulary.offset
    logprobs = logits.gather(1, vocabulary.targets) - logits.logsumexp(1, keepdim=True)
    rest = (1 - probs.sum(1)).clamp(min=0)
    best_probs = logprobs.exp().sum(1).clamp(max=1 - 1e-6)
    rest_logprobs = torch.log1p(-best_probs)
    soft = -(probs * logprobs).sum(1) - rest * rest_logprobs
    hard = -logprobs[:, 0]
    return (hard_share * hard + (1 - hard_share) * soft).mean()


class HeadRunner:
    """Runs a head over whole conversations, as a device would."""

    def __init__(self, model: Any, answers: TrainingAnswers) -> None:
        self.answers = answers
        self.model = model
        self.scale = state_scale(model.config)

    def forward(self, head: ExitHead, exit_layer: int, conversations: Sequence[int]) -> Tensor:
        """Return exit_hidden [answering positions of these conversations, hidden] float32."""
        hidden = self.answers.hidden[exit_layer]
        if head.layer is not None:
            return self._forward_block(head, head.layer, hidden, conversations)
        spans = [self.answers.answering(conversation)[0] for conversation in conversations]
        return head(torch.cat([hidden[span] for span in spans]).float() * self.scale)

    def _forward_block(
        self, head: ExitHead, layer: nn.Module, hidden: Tensor, conversations: Sequence[int]
    ) -> Tensor:
        """Run a head with a layer of its own over all positions of the conversations."""
        starts = self.answers.starts
        lengths = self.answers.lengths
        states = [hidden[starts[c] : starts[c] + lengths[c]] for c in conversations]
        padded = nn.utils.rnn.pad_sequence(states, batch_first=True).float() * self.scale
        columns = torch.arange(padded.shape[1])
        no_padding = torch.zeros(len(padded), dtype=torch.int64)
        mask = causal_mask(no_padding, columns, padded.dtype)
        angles = rotate_positions(self.model.model, padded, columns[None])
        with unrepeated_attention(layer.self_attn):
            arguments = angle_arguments(layer, angles)
            out = layer_output(layer(padded, attention_mask=mask, **arguments))
        answering: list[Tensor] = []
        for row, conversation in enumerate(conversations):
            first = int(self.answers.prompt_lengths[conversation]) - 1
            answering.append(out[row, first : int(lengths[conversation])])
        return head(torch.cat(answering))

    def rows(self, conversations: Sequence[int]) -> Tensor:
        """Return the indices of these conversations' answering positions among all m, int64."""
        spans = [self.answers.answering(conversation)[1] for conversation in conversations]
        return torch.cat([torch.arange(span.start, span.stop) for span in spans])


class HeadTrainer:
    """Trains several heads at once by gradient."""

    def __init__(
        self,
        heads: Mapping[int, ExitHead],
        model: Any,
        answers: TrainingAnswers,
        config: FitConfig,
        num_steps: int,
    ) -> None:
        self.heads = heads
        self.runner = HeadRunner(model, answers)
        self.config = config
        self.lm_head = model.lm_head.weight.detach()
        self.cap = logit_cap(model.config)
        self.parameters = [
            parameter.requires_grad_(True)
            for head in heads.values()
            for parameter in head.parameters()
        ]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, config.learning_rate, num_steps + 1, pct_start=0.1
        )

    def step(self, conversations: Sequence[int], generator: torch.Generator) -> None:
        """Make one step of the optimiser on some conversations."""
        answers = self.runner.answers
        rows = self.runner.rows(conversations)
        top_ids = answers.top_ids[rows, : self.config.teacher_top].long()
        logprobs = answers.top_logprobs[rows, : self.config.teacher_top]
        probs = logprobs.float().exp()
        vocabulary = SampledVocabulary(top_ids, len(self.lm_head), self.config.sampled, generator)
        weight = self.lm_head[vocabulary.ids]
        for layer, head in self.heads.items():
            out = self.runner.forward(head, layer, conversations)
            logits = bounded(out @ weight.T, self.cap)
            loss = distillation_loss(logits, vocabulary, probs, self.config.hard_share)
            loss.backward()
        # Each head is clipped on its own, so that it does not depend on the others.
        for head in self.heads.values():
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()

    def freeze(self) -> None:
        """End the training."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)


def fit_by_gradient(
    heads: Mapping[int, ExitHead],
    model: Any,
    *,
    answers: TrainingAnswers,
    conversations: Tensor,
    config: FitConfig,
    tick: Callable[[int], None],
) -> None:
    """Train all heads at once on some conversations, in random order.

    `tick` receives the number of conversations of each step.
    """
    generator = torch.Generator().manual_seed(config.seed)
    num_batches = -(-len(conversations) // config.batch)
    num_steps = max(1, round(config.epochs * num_batches))
    trainer = HeadTrainer(heads, model, answers, config, num_steps)
    order = torch.empty(0)
    for step in range(num_steps):
        if step % num_batches == 0:
            order = conversations[torch.randperm(len(conversations), generator=generator)]
        start = step % num_batches * config.batch
        chosen = order[start : start + config.batch].tolist()
        trainer.step(chosen, generator)
        tick(len(chosen))
    trainer.freeze()


@torch.inference_mode()
def evaluate_head(
    head: ExitHead, exit_layer: int, model: Any, answers: TrainingAnswers, conversations: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a head's confidence and agreement at the answering positions.

    Confidence is float32 [m]; agreement with the full model's best token is bool [m].
    """
    runner = HeadRunner(model, answers)
    lm_head = model.lm_head.weight
    confidence: list[Tensor] = []
    agrees: list[Tensor] = []
    for batch in conversations.split(8):
        chosen = batch.tolist()
        out = runner.forward(head, exit_layer, chosen)
        best_ids = answers.top_ids[runner.rows(chosen), 0]
        for rows, expected in zip(out.split(ROWS), best_ids.split(ROWS), strict=True):
            logits = bounded(nn.functional.linear(rows, lm_head), logit_cap(model.config))
            best, ids = logits.max(-1)
            confidence.append((best - logits.logsumexp(-1)).exp())
            agrees.append(ids == expected)
    return torch.cat(confidence), torch.cat(agrees)

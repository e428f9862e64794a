"""The self-test of a model: one real step before the device announces that it serves it."""

from __future__ import annotations

import math
from typing import Final

from edge_agent.engine.tokenizer import ChatTokenizer
from edge_agent.generation.decoder import Decoder
from fleet.errors import BundleError
from fleet.graphs.partition import Partition
from fleet.protocol.messages import Sampling
from fleet.protocol.prompt import PromptRequest

PROMPT: Final = PromptRequest(prompt="How are you?")


def check_step(partition: Partition, tokenizer: ChatTokenizer) -> None:
    """Run every block, and let the last exit choose the token that follows a short prompt.

    Raises:
        BundleError: the result is no token, or has no probability.
    """
    manifest = partition.manifest
    prompt_ids = tokenizer.encode(PROMPT)[: manifest.model.max_positions]
    decoder = Decoder(partition, len(prompt_ids) + 1, (1.0,) * len(partition.exits), Sampling())
    decoder.text += prompt_ids
    choice = decoder.choose()
    is_token = 0 <= choice.token_id < manifest.model.vocab_size
    is_probability = math.isfinite(choice.logprob) and 0.0 <= choice.confidence <= 1.0 + 1e-3
    if not (is_token and is_probability):
        raise BundleError(
            f"bundle {manifest.bundle_id} gives token {choice.token_id} with log-probability "
            f"{choice.logprob} on this machine, expected a token and a number; "
            "export it again, or for this machine's instruction set"
        )

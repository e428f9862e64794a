"""Whether a model that loaded also runs: one real step, before a device says that it serves it."""

from __future__ import annotations

import math

from edge_agent.engine.partition import Partition
from edge_agent.engine.tokenizer import ChatTokenizer
from edge_agent.generation.decoder import Decoder
from fleet.errors import BundleError
from fleet.protocol.messages import Sampling
from fleet.protocol.prompt import ChatMessage

QUESTION = (ChatMessage("user", "How are you?"),)


def check_step(partition: Partition, tokenizer: ChatTokenizer) -> None:
    """Lets every exit say what follows a short prompt.

    Raises:
        BundleError: one of them says what is no token, or no probability.
    """
    manifest = partition.manifest
    prompt_ids = tokenizer.encode_chat(QUESTION)[: manifest.model.max_positions]
    decoder = Decoder(partition, len(prompt_ids) + 1, (1.0,) * len(manifest.exits), Sampling())
    decoder.text += prompt_ids
    choice = decoder.choose()
    is_token = 0 <= choice.token_id < manifest.model.vocab_size
    if (
        not is_token
        or not math.isfinite(choice.logprob)
        or not 0.0 <= choice.confidence <= 1.0 + 1e-3
    ):
        raise BundleError(
            f"bundle {manifest.bundle_id} gives token {choice.token_id} with log-probability {choice.logprob} on this "
            "machine, expected a token and a number; export it again, or for this machine's instruction set"
        )

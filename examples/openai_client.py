"""Stream an answer with OpenAI's client, from a device or from a whole fleet.

    pip install openai
    export OPENAI_BASE_URL=http://127.0.0.1:11434/v1 OPENAI_API_KEY=none
    python openai_client.py kitchen "What is the capital of France?"

At a fleet, the key is one of `fleet key create`. docs/api.md has all fields.
"""

import sys

from openai import OpenAI


def main(model: str, prompt: str) -> None:
    """Print the answer as it streams, and then the number of tokens from each source."""
    client = OpenAI()  # it reads both variables
    messages = [{"role": "user", "content": prompt}]
    for chunk in client.chat.completions.create(model=model, messages=messages, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
    print(chunk.model_extra["fleet"]["counts"]["sources"])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

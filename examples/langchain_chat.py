"""Converse with a device or a whole fleet through LangChain; each line of the input is a turn.

    pip install langchain-openai
    export OPENAI_BASE_URL=http://127.0.0.1:11434/v1 OPENAI_API_KEY=none
    python langchain_chat.py kitchen

At a fleet, the key is one of `fleet key create`. docs/api.md has all fields.
"""

import os
import sys

from langchain_openai import ChatOpenAI


def main(model: str) -> None:
    """Print each answer as it streams; the model sees the turns before."""
    chat = ChatOpenAI(model=model, base_url=os.environ["OPENAI_BASE_URL"], max_tokens=64)
    turns = [("system", "Answer in one short sentence.")]
    for line in sys.stdin:
        turns.append(("user", line.strip()))
        answer = ""
        for chunk in chat.stream(turns):
            answer += chunk.text
            print(chunk.text, end="", flush=True)
        print()
        turns.append(("assistant", answer))


if __name__ == "__main__":
    main(sys.argv[1])

"""The turns of a chat and the prompts of one template: the time to the first token, and the bytes.

    fleet bench chat [--turns 8] [--templates 100] [--rounds 3] [--max-new-tokens 32]
        [--mode verified] [--bundle DIR] [--no-peers] [--plot FILE] [--json]

Server, worker and device are processes as `fleet up` and `edge-agent run` start them, with the
embedded broker and its TLS. An app has a conversation: each turn sends the whole history. Then, for
each turn, an app that is new to the device sends the same prompt, of which nothing is kept
("fresh"), and another one a prompt as long as the turn's new text alone ("new_text"). Peers are
llama.cpp with and without its prompt cache; each engine continues its own answers.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final

import typer
from msgspec import Struct, to_builtins
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from benchmarks.chat_engines import (
    FIRST_TOKEN,
    Answer,
    Progress,
    Responder,
    running_fleet,
    running_llama,
)
from benchmarks.edge import machine
from benchmarks.peers import GGUF_TYPE, NATIVE
from edge_agent.engine.tokenizer import ChatTokenizer
from fleet.bundles.manifest import Bundle
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import ChatMessage, PromptRequest
from fleet.server.supervisor import resolve_bundle
from fleet.utils.cli_runtime import run_command
from fleet.utils.console import new_console
from fleet.utils.optional_imports import needs
from fleet.utils.path_options import path_option
from fleet.utils.prompt_file import read_prompts

QUESTIONS: Final = Path(__file__).parent / "data" / "chat.txt"
TEMPLATE: Final = (
    "You watch the sensors of a greenhouse. Each message is one reading with the name of the "
    "sensor, its place, the value and the limits of the plants there. Compare the value with both "
    "limits. Answer with one short sentence: say whether the reading is too low, too high or in "
    "order, and name one step that the gardener should take today. Do not repeat the numbers, do "
    "not greet, and do not explain how you came to the answer."
)
PLACES: Final = ("tomatoes", "orchids", "seedlings", "cacti", "herbs")
TEMPLATE_TOKENS: Final = 8
PAUSE_S: Final = 0.3
"""The time between two prompts, in which an engine ends its work on the answer before."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class TurnRow(Struct, frozen=True, kw_only=True):
    """The figures of a turn; medians where there are several rounds.

    `new_tokens` are those of the answer, and `new_positions` those and the positions of the prompt
    that were not part of the conversation before.
    """

    turn: int
    prompt_tokens: int
    new_tokens: int
    new_positions: int
    reused_tokens: int
    ttft_ms: float
    bytes_up: int


class Conversation(Struct, frozen=True):
    """The turns of a chat, the same prompts without reuse, and the new texts alone."""

    turns: list[TurnRow]
    fresh: list[TurnRow]
    new_text: list[TurnRow]
    same_answers: bool


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of equal tokens at the beginning of both."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def turn_row(turn: int, answer: Answer, num_kept: int = 0) -> TurnRow:
    """Return the row of an answer to a prompt of which `num_kept` tokens were known before."""
    return TurnRow(
        turn=turn,
        prompt_tokens=answer.prompt_tokens,
        new_tokens=len(answer.token_ids),
        new_positions=answer.prompt_tokens - num_kept + len(answer.token_ids),
        reused_tokens=answer.reused_tokens,
        ttft_ms=answer.ttft_ms,
        bytes_up=answer.bytes_up,
    )


class ChatBench:
    """Conversations of one engine; `options` are the request's fields except its prompt."""

    def __init__(
        self, responder: Responder, tokenizer: ChatTokenizer, options: Mapping[str, Any]
    ) -> None:
        self._responder = responder
        self._tokenizer = tokenizer
        self._options = options

    def converse(self, questions: Sequence[str]) -> Conversation:
        """Have one chat, then ask each of its prompts again without what is kept.

        The chat comes first, since each new app takes memory for its own prompts.
        """
        messages: list[ChatMessage] = []
        requests: list[PromptRequest] = []
        new_texts: list[PromptRequest] = []
        answers: list[Answer] = []
        turns: list[TurnRow] = []
        before: list[int] = []
        self._responder.begin()
        for turn, question in enumerate(questions, 1):
            messages.append(ChatMessage("user", question))
            requests.append(PromptRequest(messages=tuple(messages), **self._options))
            ids = self._tokenizer.encode(requests[-1])
            num_kept = common_prefix(before, ids)
            new_texts.append(self._text_of(ids[num_kept:]))
            answers.append(self._ask(requests[-1], reuse=True))
            turns.append(turn_row(turn, answers[-1], num_kept))
            messages.append(ChatMessage("assistant", answers[-1].text))
            before = [*ids, *answers[-1].token_ids]
        fresh = [self._ask(request, reuse=False) for request in requests]
        alone = [self._ask(text, reuse=False) for text in new_texts]
        return Conversation(
            turns=turns,
            fresh=list(itertools.starmap(turn_row, enumerate(fresh, 1))),
            new_text=list(itertools.starmap(turn_row, enumerate(alone, 1))),
            same_answers=all(
                one.token_ids == other.token_ids for one, other in zip(answers, fresh, strict=True)
            ),
        )

    def _ask(self, request: PromptRequest, *, reuse: bool) -> Answer:
        """Ask after a pause, as a person does."""
        time.sleep(PAUSE_S)
        return self._responder.ask(request, reuse=reuse)

    def _text_of(self, ids: Sequence[int]) -> PromptRequest:
        """Return a prompt of these tokens, for the first token of its answer."""
        text = "".join(map(self._tokenizer.token_text, ids))
        options = {**self._options, "max_new_tokens": FIRST_TOKEN}
        return PromptRequest(prompt=text, raw=True, **options)

    def fill_template(self, readings: Sequence[str]) -> Conversation:
        """Ask prompts that begin with the same system message."""
        conversation = Conversation([], [], [], same_answers=True)
        before: list[int] = []
        options = {**self._options, "max_new_tokens": TEMPLATE_TOKENS}
        self._responder.begin()
        for number, reading in enumerate(readings, 1):
            messages = (ChatMessage("system", TEMPLATE), ChatMessage("user", reading))
            request = PromptRequest(messages=messages, **options)
            ids = self._tokenizer.encode(request)
            answer = self._ask(request, reuse=True)
            fresh = self._ask(request, reuse=False)
            conversation.turns.append(turn_row(number, answer, common_prefix(before, ids)))
            conversation.fresh.append(turn_row(number, fresh))
            before = ids
        return conversation


def readings(num_prompts: int) -> list[str]:
    """Return different readings of the sensors."""
    return [
        f"Sensor {number:03d}, {PLACES[number % len(PLACES)]}: {5 + number * 37 % 31} degrees, "
        f"limits {12 + number % 4} and {24 + number % 5}."
        for number in range(1, num_prompts + 1)
    ]


def median_rows(rounds: Sequence[Sequence[TurnRow]]) -> list[TurnRow]:
    """Return a row for each turn, with the median time; the counts are those of the first round."""
    return [
        replace(rows[0], ttft_ms=median(row.ttft_ms for row in rows))
        for rows in zip(*rounds, strict=True)
    ]


def median_conversation(rounds: Sequence[Conversation]) -> dict[str, Any]:
    """Return the rows of several rounds as one, and the last turn next to its new text alone."""
    turns = median_rows([each.turns for each in rounds])
    fresh = median_rows([each.fresh for each in rounds])
    new_text = median_rows([each.new_text for each in rounds])
    return {
        "turns": to_builtins(turns),
        "fresh": to_builtins(fresh),
        "new_text": to_builtins(new_text),
        "last_turn_over_new_text": turns[-1].ttft_ms / new_text[-1].ttft_ms,
        "same_answers": all(each.same_answers for each in rounds),
    }


def template_figures(conversation: Conversation) -> dict[str, Any]:
    """Return the rows of the template's prompts and their medians, without the first prompt."""
    rows = {"turns": conversation.turns, "fresh": conversation.fresh}
    medians = {
        name: {
            "ttft_ms": median(row.ttft_ms for row in own[1:] or own),
            "bytes_up": median(row.bytes_up for row in own[1:] or own),
        }
        for name, own in rows.items()
    }
    return {**to_builtins(rows), "median": medians}


def measure_chat(
    responders: Mapping[str, Responder],
    bench: Callable[[Responder], ChatBench],
    questions: Sequence[str],
    num_rounds: int,
    num_templates: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Return the figures of each engine; they take turns, conversation by conversation."""
    rounds: dict[str, list[Conversation]] = {name: [] for name in responders}
    benches = {name: bench(responder) for name, responder in responders.items()}
    for name, each in benches.items():
        progress(f"warming up {name}")
        each.converse(questions[:1])
    for number in range(1, num_rounds + 1):
        for name, each in benches.items():
            progress(f"chat of {len(questions)} turns with {name}, {number} of {num_rounds}")
            rounds[name].append(each.converse(questions))
    results = {name: median_conversation(own) for name, own in rounds.items()}
    for name, each in benches.items() if num_templates else ():
        progress(f"{num_templates} prompts of one template with {name}")
        filled = each.fill_template(readings(num_templates))
        results[name]["templates"] = template_figures(filled)
    return results


def num_apps_of(num_turns: int, num_rounds: int, num_templates: int) -> int:
    """Return the number of apps that the conversations need."""
    one_turn = 3  # of the conversation, and for the same prompt and its new text alone
    return one_turn + num_rounds * (1 + 2 * num_turns) + num_templates + 1


@app.command()
def run(
    turns: Annotated[int, typer.Option(min=1, max=8, help="Turns of the chat.")] = 8,
    templates: Annotated[
        int, typer.Option(min=0, max=1000, help="Prompts of one template; 0 for none.")
    ] = 100,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Chats of each engine.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=128, help="Tokens of an answer.")] = 32,
    mode: Annotated[Mode, typer.Option(help="Mode of the device.")] = Mode.VERIFIED,
    bundle: Annotated[
        Path | None, path_option(help="Model bundle (default: the default model's).")
    ] = None,
    with_peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Measure llama.cpp, too.")
    ] = True,
    plot: Annotated[
        Path | None, path_option(help="Plot times and bytes of the turns into *.svg or *.png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure the turns of a chat and the prompts of a template, with and without reuse."""
    if plot:
        with needs("plots"):
            from benchmarks.plots import plot_chat
            from fleet.utils.plots import check_plot, save
        check_plot(plot)
    console = new_console(stderr=True)

    def progress(line: str) -> None:
        console.print(line, style="dim", highlight=False)

    folder = resolve_bundle(bundle, progress)
    tokenizer = ChatTokenizer(Bundle.load(folder, ("edge", "tokenizer")))
    options = {"max_new_tokens": max_new_tokens, "mode": mode}
    with ExitStack() as stack:
        num_apps = num_apps_of(turns, rounds, templates)
        ours = stack.enter_context(running_fleet(folder, num_apps))
        responders: dict[str, Responder] = {mode.value: ours}
        if with_peers:
            peer = f"{NATIVE} {GGUF_TYPE}"
            responders[peer] = stack.enter_context(running_llama(tokenizer, progress))
        figures = measure_chat(
            responders,
            lambda responder: ChatBench(responder, tokenizer, options),
            read_prompts(QUESTIONS)[:turns],
            rounds,
            templates,
            progress,
        )
    own = figures.pop(mode.value)
    result = {"machine": machine(), "mode": mode.value, **own, "peers": figures}
    if plot:
        save(plot_chat(result), plot)
    if as_json:
        print(json.dumps(result))
    else:
        print_chat(new_console(), result)


def print_chat(console: Console, result: Mapping[str, Any]) -> None:
    """Print the turns of each engine as a table, and the template's prompts as lines."""
    for name, own in {result["mode"]: result, **result["peers"]}.items():
        console.print(turns_table(name, own))
        ratio = own["last_turn_over_new_text"]
        console.print(f"the last turn over its new text alone: {ratio:.2f}", highlight=False)
        for kind, figures in own.get("templates", {}).get("median", {}).items():
            line = f"{figures['ttft_ms']:.1f} ms to the first token, {figures['bytes_up']} bytes up"
            console.print(f"template, {kind}: {line}", highlight=False)


def turns_table(name: str, own: Mapping[str, Any]) -> Table:
    """Return the turns of one engine as a table."""
    table = Table(title=f"{name}: ms to the first token, bytes up", title_justify="left")
    headers = ("turn", "prompt", "new", "reused", "ms", "ms fresh", "ms new text", "bytes", "fresh")
    for header in headers:
        table.add_column(header, justify="right")
    for row, fresh, alone in zip(own["turns"], own["fresh"], own["new_text"], strict=True):
        counts = ("turn", "prompt_tokens", "new_positions", "reused_tokens")
        times = (each["ttft_ms"] for each in (row, fresh, alone))
        sizes = (each["bytes_up"] for each in (row, fresh))
        cells = [*(row[count] for count in counts), *(f"{ms:.0f}" for ms in times), *sizes]
        table.add_row(*map(str, cells))
    return table


if __name__ == "__main__":
    run_command("benchmarks.chat", app)

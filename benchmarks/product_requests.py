"""Calibration text in the form of a product's requests: messages of others, asked as a suite asks.

    python -m benchmarks.product_requests clinc150/data_full.json -o requests.jsonl
        [--suite support_intent] [--messages 4000] [--repeat 4] [--held FILE] [--seed 0]

A router never sees a chat: it sees its own prompt around a message, and each queue's name behind
it. What `quantkit serve --capture` would have written of such a product is made here of the users'
first turns in the suite's traffic, each `--repeat` times, and of `--messages` of the training
messages of clinc150, one of all answers that the suite knows drawn for each. Whether it is right
plays no part: training is after the original's prediction of it. With ``--held`` one message in
twenty-five goes there, once, and none of its requests into the other file. No message of the
suite's items is used, and `quantkit calibrate` refuses text that holds one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.evals.suite import Suite
from quantkit.evals.suites import load_suites

#: One distinct message in so many is kept for measuring.
HELD = 25

#: What the prompt of a suite of messages has where the message goes.
PLACE = "{{message}}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clinc", type=Path, help="data_full.json of clinc150")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--suite", default="support_intent")
    parser.add_argument("--messages", type=int, default=4000, help="of clinc150")
    parser.add_argument("--repeat", type=int, default=4, help="of each message of the traffic")
    parser.add_argument("--held", type=Path, help="requests to measure on, of other messages")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.held is not None and args.held.resolve() == args.output.resolve():
        raise SystemExit(f"--held {args.held}: is -o, too; give each a file of its own")
    [suite] = load_suites([args.suite])
    generator = random.Random(args.seed)
    others = [message for message, _ in intents(args.clinc, "train")]
    generator.shuffle(others)
    messages = first_turns(suite) * args.repeat + others[: args.messages]
    generator.shuffle(messages)
    prompt, answers = asked_by(suite)
    if args.held is not None:
        messages, held = hold_back(messages)
        write_lines(args.held, requests(prompt, answers, held, generator), "requests")
    write_lines(args.output, requests(prompt, answers, messages, generator), "requests")
    return 0


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]], noun: str) -> None:
    """A line of JSON for each row, all of them or none."""
    staging = path.with_name(path.name + ".tmp")
    try:
        staging.write_text("".join(json.dumps(row) + "\n" for row in rows))
        staging.replace(path)
    except OSError as error:
        raise SystemExit(
            f"{path}: {error.strerror or error}; give a file that can be written"
        ) from None
    print(f"{path}: {len(rows)} {noun}")


def intents(path: Path, split: str) -> list[tuple[str, str]]:
    """Messages of clinc150, with a capital letter, and what each is about.

    Raises:
        SystemExit: the file is not there, or is another one.
    """
    try:
        rows = json.loads(path.read_text())[split]
        return [(text[:1].upper() + text[1:], about.replace("_", " ")) for text, about in rows]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SystemExit(f"{path}: is not data_full.json of clinc150 ({reason})") from error


def hold_back(messages: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those to calibrate on, in their order, and one distinct message in `HELD` to measure on."""
    held = sorted(set(messages))[::HELD]
    kept = set(held)
    return [text for text in messages if text not in kept], held


def first_turns(suite: Suite) -> list[str]:
    """What the users of a suite's traffic begin with."""
    assert suite.traffic is not None
    conversations = map(json.loads, suite.traffic.read_text().splitlines())
    turns = (
        [turn["content"] for turn in conversation["messages"] if turn["role"] == "user"]
        for conversation in conversations
    )
    return [found[0] for found in turns if found]


def asked_by(suite: Suite) -> tuple[str, list[str]]:
    """A suite's prompt around a message, and all answers that it knows.

    Raises:
        SystemExit: its prompt is not one around a message, or its items have no choices.
    """
    prompt = suite.config.get("doc_to_text")
    if not isinstance(prompt, str) or PLACE not in prompt or "choices" not in suite.rows[0]:
        raise SystemExit(f"{suite.name}: asks nothing of a {PLACE}; give a suite that does")
    return prompt, sorted({choice for row in suite.rows for choice in row["choices"]})


def requests(
    prompt: str, answers: Sequence[str], messages: Sequence[str], generator: random.Random
) -> list[dict[str, str]]:
    """Each message in the prompt, and one of the answers, which stands behind it."""
    return [
        {"prompt": prompt.replace(PLACE, text), "completion": f" {generator.choice(answers)}"}
        for text in messages
    ]


if __name__ == "__main__":
    sys.exit(main())

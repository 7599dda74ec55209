"""A suite of thousands of items, for differences that a few hundred cannot show.

    python -m benchmarks.router_suite clinc150/data_full.json -o router
        [--recipe w2a16 ...] [--repeat 2] [--seed 0]

An assistant routes a message to one of 150 intents, which clinc150 has as `play_music` and the
prompt as "play music": 4,500 items of its test messages, four choices each, with the calibration
text that such a product has: its training messages, each `--repeat` times in the prompt, one
intent drawn for each behind it, right or wrong. Of the items, those that training has nearly word
for word are left out. Written into a folder:

    router.yaml, router.eval.jsonl   the suite
    requests.jsonl                   for `quantkit calibrate --data`
    held.jsonl                       requests of other messages, for `--text`
    NAME.yaml                        for each `--recipe` that has one suite: the same, of this one
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.product_requests import PLACE, hold_back, intents, requests, write_lines
from quantkit.data.contamination import overlap
from quantkit.recipe import installed_recipes

PROMPT = f'A user said: "{PLACE}"\nThe user asked about'

#: An item's choices: the right one and others.
CHOICES = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clinc", type=Path, help="data_full.json of clinc150")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    parser.add_argument("--recipe", nargs="*", default=[], help="names of installed recipes")
    parser.add_argument("--repeat", type=int, default=2, help="of each training message")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator = random.Random(args.seed)
    test, training = intents(args.clinc, "test"), intents(args.clinc, "train")
    names = sorted({intent for _, intent in test})
    seen = {
        hit.eval_index
        for hit in overlap((text for text, _ in training), ("\n".join(row) for row in test))
    }
    items = [
        item(index, *row, names, generator) for index, row in enumerate(test) if index not in seen
    ]
    messages = [message for message, _ in training] * args.repeat
    generator.shuffle(messages)
    messages, held = hold_back(messages)
    args.output.mkdir(parents=True, exist_ok=True)
    write_lines(args.output / "router.eval.jsonl", items, "items")
    (args.output / "router.yaml").write_text(yaml.safe_dump(SUITE, sort_keys=False))
    for name, texts in (("requests", messages), ("held", held)):
        rows = requests(PROMPT, names, texts, generator)
        write_lines(args.output / f"{name}.jsonl", rows, "requests")
    for name in args.recipe:
        path = args.output / f"{name}.yaml"
        path.write_text(yaml.safe_dump(rerouted(name, args.output), sort_keys=False))
        print(path)
    return 0


SUITE = {
    "task": "router",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "router.eval.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": PROMPT,
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}],
    "metadata": {
        "version": 1.0,
        "product": "An assistant: route each message to one of 150 intents (clinc150)",
        "traffic": "requests.jsonl",
        "slice": "slice",
    },
}


def item(
    index: int, message: str, intent: str, names: Sequence[str], generator: random.Random
) -> dict[str, Any]:
    """A row of the suite: the right intent among others, in an order drawn."""
    others = generator.sample([name for name in names if name != intent], CHOICES - 1)
    choices = sorted([intent, *others], key=lambda _: generator.random())
    label = choices.index(intent)
    return {
        "id": f"router-{index}",
        "message": message,
        "choices": choices,
        "label": label,
        "slice": intent,
    }


def rerouted(name: str, folder: Path) -> Mapping[str, Any]:
    """An installed recipe that asks of this suite what it asked of its own.

    Raises:
        SystemExit: there is none of that name, or it has not one suite.
    """
    found = installed_recipes().get(name)
    recipe = yaml.safe_load(found.read_text()) if found is not None else {}
    if len(recipe.get("suites", [])) != 1:
        known = ", ".join(installed_recipes())
        raise SystemExit(f"--recipe {name}: is no recipe of one suite; give one of {known}")
    [suite] = recipe["suites"]
    gate = {key.replace(f"{suite}.", "router."): rule for key, rule in recipe["gate"].items()}
    calibrate = recipe["calibrate"] | {"data": [str((folder / "requests.jsonl").resolve())]}
    suites = [str((folder / "router.yaml").resolve())]
    return recipe | {"suites": suites, "calibrate": calibrate, "gate": gate}


if __name__ == "__main__":
    sys.exit(main())

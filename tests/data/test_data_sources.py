"""Every format and shape is read; every malformed one is named by file and line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.data import Corpus, Source, document_hashes, iter_documents, iter_texts, readers
from quantkit.errors import QuantkitError, UsageError

Write = Callable[..., str]

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def texts(path: object, **options: object) -> list[str]:
    return list(iter_texts(Source(str(path), **options)))  # type: ignore[arg-type]


def fails(path: object, message: str, **options: object) -> None:
    with pytest.raises(UsageError, match=message):
        texts(path, **options)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/someone/chats.jsonl", "chats.jsonl"),
        ("../chats.jsonl", "chats.jsonl"),
        ("/home/someone/folder/", "folder"),
        ("hf:owner/name", "owner/name"),
        ("hf:owner/name:train:text", "owner/name"),
        ("caf\udce9.txt", "caf?.txt"),
    ],
)
def test_names_say_nothing_of_the_machine(path: str, name: str) -> None:
    assert Source(path).name == name


def test_a_folder_is_named_wherever_it_is_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chats").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "chats")
    monkeypatch.chdir(tmp_path / "chats")
    assert Source(".").name == "chats"
    assert Source(str(tmp_path / "linked")).name == "linked"


@pytest.mark.parametrize(
    ("row", "plain"),
    [
        ({"text": " as it\nstands "}, " as it\nstands "),
        ({"messages": CHAT}, "hi\nhello"),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
            "hi\nyo",
        ),
        ({"prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 = 4"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "hi\nhello"),
        ({"instruction": "Add.", "input": "2 2", "output": "4"}, "Add.\n\n2 2\n4"),
        ({"instruction": "Greet.", "output": "hi"}, "Greet.\nhi"),
        ({"messages": None, "text": "shape by the key that is not null"}, "shape by the key that"),
        ({"messages": CHAT, "text": "messages win"}, "hi\nhello"),
        ({"system": "be brief", "conversations": CHAT}, "be brief\nhi\nhello"),
    ],
)
def test_shapes_of_rows(jsonl: Write, row: dict[str, object], plain: str) -> None:
    (text,) = texts(jsonl([row]))
    assert text.startswith(plain)


def test_field_names_the_key(jsonl: Write) -> None:
    path = jsonl([{"body": "one", "text": "no"}, {"body": CHAT}])
    assert texts(path, field="body") == ["one", "hi\nhello"]
    fails(path, re.escape(":1 has no field 'boby'; keys seen: body, text"), field="boby")


def test_content_parts_null_content_and_null_keys_are_normalised(jsonl: Write) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}, "c"]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [
        {"role": "user", "content": parts, "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    (document,) = iter_documents(Source(jsonl([{"messages": turns}])))
    assert document.messages is not None
    user, assistant = document.messages
    assert user == {"role": "user", "content": "a\nb\nc"}
    assert assistant["content"] == ""
    assert assistant["tool_calls"][0]["id"] == "1"
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_sharegpt_tool_calls_become_openai_tool_calls(jsonl: Write) -> None:
    turns = [
        {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "rain"},
        {"from": "function_call", "value": "not json"},
    ]
    tools = json.dumps([{"name": "weather", "parameters": {}}])
    (document,) = iter_documents(Source(jsonl([{"conversations": turns, "tools": tools}])))
    assert document.messages is not None
    assert [m["role"] for m in document.messages] == ["user", "assistant", "tool", "assistant"]
    assert document.messages[1]["tool_calls"][0]["function"]["name"] == "weather"
    assert document.messages[3]["content"] == "not json"
    assert document.tools == (
        {"type": "function", "function": {"name": "weather", "parameters": {}}},
    )


def test_empty_rows_are_skipped_and_counted(jsonl: Write) -> None:
    rows = [{"text": ""}, {"text": "a"}, {"text": None}, {"text": " \n"}, {"messages": []}]
    corpus = Corpus(Source(jsonl([*rows, {"messages": [{"role": "user", "content": ""}]}])))
    assert (len(corpus), corpus.skipped) == (1, 5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "gold": 1}, ":2 fits no known shape; keys seen: query, gold; give `messag"),
        ([1], ":2 a row must be an object, not a list"),
        ("text", ":2 a row must be an object, not a string"),
        ({"text": 5}, ":2 text must be a string or a list of messages, not a number"),
        ({"prompt": "a", "completion": 1}, ":2 completion must be a string, not a number"),
        ({"messages": ["hi"]}, ":2 messages[0] a message must be an object, not a string"),
        ({"messages": [{"content": "a"}]}, ":2 messages[0] has no `role`; keys seen: content"),
        ({"messages": [{"role": "user", "content": 1}]}, ":2 messages[0] content must be a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            ":2 messages[0] has a content part of type 'image_url'; only text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]},
            ":2 messages[0] `tool_calls` must be a list of objects",
        ),
        ({"conversations": [{"from": "bot", "value": "a"}]}, ":2 conversations[0] unknown speaker"),
        ({"messages": CHAT, "tools": "[{"}, ":2 messages `tools` is not valid JSON"),
        ({"messages": CHAT, "tools": [1]}, ":2 messages `tools` must be a list of function sch"),
        ({"text": "cut \ud800"}, r":2 holds the unpaired surrogate '\ud800'"),
    ],
)
def test_unreadable_rows_name_file_line_and_remedy(jsonl: Write, row: object, message: str) -> None:
    fails(jsonl([{"text": "good"}, row]), re.escape("traffic.jsonl" + message))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": \n', ":3 malformed JSON: Expecting value"),
        (b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", ":2 malformed JSON: "),
        (b'{"text": "a"}\n{"text": "\xff"}\n', ":2 byte 0xff is not UTF-8; convert the file"),
        ('{"text": "a"}\n'.encode("utf-16"), ":1 byte 0xff is not UTF-8"),
        (b"", ": the file is empty; give a file that has text"),
        (b" \n\n", ": holds no text: no rows at all"),
        (b'{"text": ""}\n{"text": ""}', ": holds no text: 2 rows, all of them empty"),
        (b"[]", ": holds no text: no rows at all"),
        (b'[\n{"text": "a"},\n{"text": }\n]', ":3 malformed JSON"),
        (b'[\n{"text": "a"}\n{"text": "b"}]', ":3 malformed JSON: expected ',' or ']'"),
        (b'[{"text": "a"},\n', ":2 malformed JSON"),
        (b'[{"text": "a"}', ":1 malformed JSON: expected ',' or ']'"),
        (b'[{"text": "a"}]\n\n{}', ":3 malformed JSON: text after the end of the array"),
        (b'[{"text": "a"},\n\n {"no": 1}]', ":3 fits no known shape; keys seen: no"),
    ],
)
def test_malformed_json_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "traffic.json"
    path.write_bytes(content)
    fails(path, re.escape("traffic.json" + message))


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\ufeff \n" + json.dumps([{"text": "a"}, {"text": "b]"}], indent=indent) + "\n")
    assert texts(path) == ["a", "b]"]


def test_json_array_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "ARRAY_BYTES", 4)
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "a"}]')
    fails(path, "over the limit of 4; write one object a line")


@given(
    st.lists(
        st.sampled_from(["word ", "é\t", "\n", "\n\n", "\r\n", "\r", " \n", "\u2028", "x" * 9])
    )
)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_raw_text_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: list[str]
) -> None:
    monkeypatch.setattr(readers, "PARAGRAPH_CHARS", 8)
    monkeypatch.setattr(readers, "DOCUMENT_CHARS", 24)
    content = "first " + "".join(parts)
    path = tmp_path / "book.txt"
    path.write_bytes(content.encode())
    documents = texts(path)
    assert "".join(documents) == content
    assert all(document.strip() for document in documents)


def test_raw_text_ends_documents_at_blank_lines_and_counts_lines(tmp_path: Path) -> None:
    paragraph = "word " * 1000 + "\n" + "word " * 1000 + "\n\n"
    path = tmp_path / "notes.md"
    path.write_text(paragraph * 3 + "tail")
    documents = list(iter_documents(Source(str(path))))
    assert [document.text for document in documents] == [paragraph] * 3 + ["tail"]
    assert [document.where for document in documents] == [f"{path}:{n}" for n in (1, 4, 7, 10)]


def test_csv_keeps_every_cell_as_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('id,text\n1,NA\n2,"two\nlines"\n3,007\n4,\n', encoding="utf-8-sig")
    assert texts(path) == ["NA", "two\nlines", "007"]
    path.write_text('text\n"a\n')
    fails(path, "rows.csv:2 malformed CSV")
    path.write_text("text\na,b\n")
    fails(path, "rows.csv:2 has more cells than the header; quote")
    path.write_text("text\n")
    fails(path, "no rows at all")
    path.write_bytes(b"text\na\n\xe9\n")
    fails(path, "rows.csv:3 byte 0xe9 is not UTF-8")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{"messages": CHAT}] * 3).to_parquet(str(path))
    assert texts(path) == ["hi\nhello"] * 3
    path.write_bytes(b"PAR1 and nothing else")
    fails(path, "rows.parquet: not a readable parquet file")


def test_saved_dataset(tmp_path: Path) -> None:
    plain = datasets.Dataset.from_list([{"text": "a"}, {"text": ""}, {"text": "c"}])
    plain.save_to_disk(str(tmp_path / "one"))
    assert texts(tmp_path / "one") == ["a", "c"]
    fails(tmp_path / "one", "has no split 'test'", split="test")
    both = datasets.DatasetDict(train=plain, test=plain.select([2]))
    both.save_to_disk(str(tmp_path / "both"))
    assert texts(tmp_path / "both") == ["a", "c"]
    assert texts(tmp_path / "both", split="test") == ["c"]
    fails(tmp_path / "both", "has no split 'dev'; set `split` to one of train, test", split="dev")
    (tmp_path / "one" / "state.json").write_text("{")
    fails(tmp_path / "one", "not a readable dataset")


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"body": f"row {i}", "text": "no"} for i in range(9)])
    asked: list[tuple[object, ...]] = []

    def load(path: str, **options: object) -> dict[str, object]:
        asked.append((path, options["name"], options["revision"], options["streaming"]))
        return {"train": rows.to_iterable_dataset(), "test": rows.select([8]).to_iterable_dataset()}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts("hf:owner/name:test:body") == ["row 8"]
    assert texts("hf:owner/name", field="body", limit=2, config="en", revision="v1") == [
        "row 0",
        "row 1",
    ]
    assert asked == [("owner/name", None, None, True), ("owner/name", "en", "v1", True)]
    fails("hf:owner/name:dev", "has no split 'dev'; set `split` to one of train, test")
    fails("hf:owner/name:test", "the path says split 'test', the option 'train'", split="train")
    for path in ("hf:", "hf:a/b:", "hf:a/b:c:d:e"):
        fails(path, "not a dataset path; write hf:owner/name:split:field")


def test_hub_failures_are_user_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, **options: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    fails("hf:owner/name", "hf:owner/name: cannot be loaded: no route to host; check the name")


def test_folder_reads_each_file_and_ignores_hidden_ones(jsonl: Write, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    (folder / "day").mkdir(parents=True)
    jsonl([{"text": "a"}], "logs/one.jsonl")
    jsonl([{"text": "b"}], "logs/day/two.jsonl")
    (folder / ".cache").write_text("ignored")
    assert sorted(texts(folder)) == ["a", "b"]
    before = Corpus(Source(str(folder))).sha256
    (folder / "one.jsonl").rename(folder / "zz.jsonl")
    assert Corpus(Source(str(folder))).sha256 == before
    (folder / "model.bin").write_bytes(b"x")
    fails(folder, r"model.bin: unknown kind of file '.bin'; use one of .jsonl, .json, .txt")
    fails(tmp_path / "none.jsonl", "none.jsonl: no such file or folder; check the path")
    (tmp_path / "bare").mkdir()
    fails(tmp_path / "bare", "bare: the folder holds no files")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0}, "weight 0.0 is not a positive number"),
        ({"weight": float("nan")}, "weight nan is not a positive number"),
        ({"limit": 0}, "limit 0 is below 1"),
        ({"config": "en"}, "`config` applies to hub datasets only"),
        ({"revision": "v1"}, "`revision` applies to hub datasets only"),
    ],
)
def test_source_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Source("a.jsonl", **options)  # type: ignore[arg-type]


def test_split_is_refused_for_a_file(jsonl: Write) -> None:
    fails(jsonl([{"text": "a"}]), "`split` applies to datasets only", split="train")


def test_limit_reads_the_first_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\nnot json\n')
    assert texts(path, limit=2) == ["a", "b"]


def test_corpus_is_a_stream_that_can_be_picked_from(jsonl: Write) -> None:
    path = jsonl([{"text": letter * 3} for letter in "abc"])
    corpus = Corpus(Source(path))
    assert corpus.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert [document.text for document in corpus.pick([2, 0])] == ["ccc", "aaa"]
    Path(path).write_text('{"text": "shorter"}\n')
    with pytest.raises(QuantkitError, match="changed while it was being read"):
        corpus.pick([2])


def test_document_hashes_are_of_the_plain_text(jsonl: Write) -> None:
    source = Source(jsonl([{"text": "a"}, {"messages": CHAT}]))
    expected = [hashlib.sha256(text).hexdigest() for text in (b"a", b"hi\nhello")]
    assert document_hashes(source) == expected

import json

import numpy as np
import pytest

from jft import data
from jft.data.tokenizer import byte_tokenizer
from tests.data.chats import CHATML, TALK

BYTES = byte_tokenizer()


def file_of(tmp_path, *records):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(file)


def first(tmp_path, *records, **settings):
    settings = {"source": "jsonl", "files": file_of(tmp_path, *records), "max_length": 64, **settings}
    return data.build(settings, batch_size=1, tokenizer=BYTES, train=False).sample()


def targets(batch):
    return BYTES.decode(batch["tokens"][0][batch["loss_mask"][0] > 0])


def test_language_modelling(tmp_path):
    batch = first(tmp_path, {"text": "hello"}, task="lm")
    assert batch["tokens"][0, :7].tolist() == [*b"hello", 258, 256]
    assert targets(batch) == "ello<eos>"
    assert batch["segments"][0].tolist() == [1] * 6 + [0] * 58
    assert batch["positions"][0, :6].tolist() == list(range(6))


def test_prompt_response_trains_on_the_response(tmp_path):
    record = {"question": "2+2?", "answer": " 4"}
    batch = first(tmp_path, record, task="sft", prompt="question", response="answer")
    assert targets(batch) == " 4<eos>"
    batch = first(tmp_path, record, task="sft", prompt="Q: {question}\nA:", response="{answer}.")
    assert BYTES.decode(batch["tokens"][0][batch["segments"][0] > 0]) == "Q: 2+2?\nA: 4.<eos>"
    assert targets(batch) == " 4.<eos>"
    batch = first(tmp_path, record, task="sft", prompt="question", response="answer", loss="all")
    assert targets(batch) == "+2? 4<eos>"


def test_chat_trains_on_the_answers(tmp_path):
    settings = {"task": "sft", "messages": "messages", "chat_template": CHATML, "max_length": 300}
    assert targets(first(tmp_path, {"messages": TALK}, **settings)) == "Hello!<|im_end|>\nFour, naïvely.<|im_end|>\n"
    assert targets(first(tmp_path, {"messages": TALK}, **settings, loss="last")) == "Four, naïvely.<|im_end|>\n"


def test_chat_of_prompt_and_response_with_the_built_in_template(tmp_path):
    batch = first(tmp_path, {"prompt": "Hi", "response": "Yo"}, task="sft", chat=True, system="Be brief")
    assert (
        BYTES.decode(batch["tokens"][0][batch["segments"][0] > 0])
        == "<bos><system>Be brief<end><user>Hi<end><assistant>Yo<end>"
    )
    assert targets(batch) == "Yo<end>"


def test_sequence_to_sequence(tmp_path):
    batch = first(tmp_path, {"prompt": "ab", "response": "c"}, task="seq2seq", max_target_length=4)
    assert batch["decoder_tokens"].tolist() == [[256, ord("c"), 258, 256]]
    assert batch["loss_mask"].tolist() == [[0, 1, 1, 0]]
    assert batch["decoder_segments"].tolist() == [[1, 1, 1, 0]]


def test_text_classification_of_pairs(tmp_path):
    settings = {"task": "classification", "text": "a", "pair": "b", "classes": ["no", "yes"], "max_length": 8}
    batch = first(tmp_path, {"a": "abcdef", "b": "ghijkl", "label": "yes"}, **settings)
    assert batch["labels"].tolist() == [1]
    assert batch["token_types"].shape == (1, 8)
    assert batch["tokens"][0].tolist() == [*b"abcd", *b"ghij"]  # the longer one is cut first


@pytest.mark.parametrize(
    ("record", "settings", "message"),
    [
        ({"text": 3}, {"task": "lm"}, r"a\.jsonl:1: field 'text' must be text, got int 3"),
        ({"txet": "x"}, {"task": "lm"}, r"a\.jsonl:1: no field 'text'. Did you mean 'txet'"),
        ({"text": "x" * 99}, {"task": "lm"}, r"a\.jsonl:1: 100 tokens, more than max_length=64; set pack: 'concat'"),
        ({"prompt": "x", "response": " "}, {"task": "sft"}, r"a\.jsonl:1: the response .* is empty"),
        ({"prompt": "", "response": "x"}, {"task": "sft"}, r"a\.jsonl:1: every token is a target .* Decoded: 'x<eos>'"),
        (
            {"prompt": "x" * 99, "response": "y"},
            {"task": "sft", "too_long": "truncate"},
            r":1: cut to max_length=64, no token",
        ),
        (
            {"messages": TALK[:1]},
            {"task": "sft", "messages": "messages"},
            r"a\.jsonl:1: the conversation has no assistant",
        ),
        ({"messages": "x"}, {"task": "sft", "messages": "messages"}, r"a\.jsonl:1: messages must be a list"),
        (
            {"a": "x", "label": 7},
            {"task": "classification", "text": "a", "classes": 3},
            r":1: label 'label' is 7, neither",
        ),
        (
            {"a": "x", "label": "b"},
            {"task": "classification", "text": "a"},
            r"1 different value, such as \['b'\], which",
        ),
        ({"prompt": "x"}, {"task": "sft", "prompt": "prompt"}, "give prompt and response, or messages"),
        (
            {"prompt": "x", "response": "y"},
            {"task": "sft", "prompt": "{promt}", "response": "response"},
            "no field 'promt'",
        ),
        ({"prompt": "x", "response": "y"}, {"task": "sft", "system": "z"}, "need messages, or chat: true"),
        ({"text": "x"}, {"task": "lm", "max_length": 1}, "max_length must be a whole number of tokens, at least 2"),
        ({"text": ""}, {"task": "lm"}, "none of the first"),
    ],
)
def test_wrong_records_and_settings(tmp_path, record, settings, message):
    with pytest.raises(data.DataError, match=message):
        first(tmp_path, record, **settings)


def test_an_empty_mask_shows_the_text(tmp_path):
    silent = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(data.DataError, match=r"a\.jsonl:1: no token is a target .*Decoded: 'Hi thereTwo"):
        first(tmp_path, {"messages": TALK}, task="sft", messages="messages", chat_template=silent)


def test_later_records_name_their_line(tmp_path):
    records = [{"text": "fine"}] * 5 + [{"text": None}]
    settings = {"source": "jsonl", "files": file_of(tmp_path, *records), "task": "lm", "max_length": 16}
    with pytest.raises(data.DataError, match=r"a\.jsonl:6: field 'text' must be text, got NoneType"):
        list(data.build(settings, batch_size=2, tokenizer=BYTES, train=False))


def test_show_marks_the_targets(tmp_path):
    batch = first(tmp_path, {"prompt": "Hi [b]", "response": "Yo"}, task="sft")
    assert data.show(batch, BYTES) == "tokens: 9 of 64 used, 1 segment(s), 3 targets\nHi [b]⟦Yo<eos>⟧"
    assert "[bold green]Yo<eos>[/bold green]" in data.show(batch, BYTES, markup=True)
    assert "Hi \\[b]" in data.show(batch, BYTES, markup=True)
    digits = data.build({"source": "digits", "task": "parity"}, batch_size=1)
    assert data.show(digits.sample(), classes=digits.classes).endswith("label: 0 (even)")
    assert np.isfinite(digits.sample()["images"]).all()

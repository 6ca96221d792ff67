import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jft.data.errors import DataError
from jft.data.tokenizer import SPECIALS, byte_tokenizer, load, resolve, train_bpe

BYTES = byte_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_are_utf8(text):
    if any(s in text for s in SPECIALS):
        return
    ids = BYTES.encode(text).ids
    assert bytes(ids.tolist()) == text.encode()
    assert BYTES.decode(ids) == text


def test_byte_specials_and_offsets():
    assert BYTES.vocab_size == 264
    assert (BYTES.pad_id, BYTES.bos_id, BYTES.eos_id) == (256, 257, 258)
    coded = BYTES.encode("é<eos>x")
    assert coded.ids.tolist() == [0xC3, 0xA9, 258, ord("x")]
    assert coded.offsets.tolist() == [[0, 1], [0, 1], [1, 6], [6, 7]]


def test_saves_what_it_loads(tmp_path):
    BYTES.save(tmp_path)
    again = load(tmp_path)
    assert again.encode("héllo <end>").ids.tolist() == BYTES.encode("héllo <end>").ids.tolist()
    assert (again.bos_id, again.eos_id, again.pad_id) == (257, 258, 256)
    assert again.chat_template == BYTES.chat_template


def test_special_ids_come_from_all_files(tmp_path):
    BYTES.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": {"content": "<bos>"},
                "pad_token": None,
                "chat_template": [{"name": "default", "template": "x"}],
            }
        )
    )
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [258, 7], "decoder_start_token_id": 0}))
    loaded = load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.start_id) == (257, 258, None, 0)
    assert loaded.pad == 258
    assert loaded.chat_template == "x"
    (tmp_path / "chat_template.jinja").write_text("y")
    assert load(tmp_path).chat_template == "y"


def test_bpe_is_trained_once_and_kept(tmp_path):
    texts = ["the cat sat on the mat, the cat sat"] * 20
    first = resolve("bpe:280", texts, tmp_path)
    assert 264 < first.vocab_size <= 280
    assert len(first.encode("the cat").ids) < 7
    assert first.decode(first.encode("a naïve 猫").ids) == "a naïve 猫"
    assert train_bpe(texts, 280).core.to_str() == first.core.to_str()
    with pytest.raises(DataError, match="was built as 'bpe:280', the settings say 'bpe:300'"):
        resolve("bpe:300", texts, tmp_path)
    kept = resolve("bpe:280", ["other text"], tmp_path)
    assert kept.encode("the cat sat").ids.tolist() == first.encode("the cat sat").ids.tolist()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "text needs a tokenizer"),
        ("nowhere", "no such file or directory"),
        ("bpe:many", "write 'bpe:VOCAB'"),
        ("bpe:100", "at least 264"),
    ],
)
def test_wrong_specs(spec, message):
    with pytest.raises(DataError, match=message):
        resolve(spec, [])


def test_broken_directories(tmp_path):
    with pytest.raises(DataError, match=r"holds no tokenizer.json; write one with transformers"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        load(tmp_path)
    BYTES.save(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config.json: bad JSON"):
        load(tmp_path)


@pytest.mark.peers
def test_encodes_as_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "##s", "na", "##ive"]
    core = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    peer.save_pretrained(tmp_path)
    ours = load(tmp_path)
    for pair in (None, "cats sat"):
        theirs = peer("The naïve cat", pair, return_token_type_ids=True)
        coded = ours.encode("The naïve cat", pair, special=True)
        assert coded.ids.tolist() == theirs["input_ids"]
        assert coded.types.tolist() == theirs["token_type_ids"]
    assert (ours.pad_id, ours.vocab_size) == (peer.pad_token_id, len(peer))

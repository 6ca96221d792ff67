"""`Tokenizer`: a `tokenizers` tokenizer with the special ids and chat template of its directory, and two built-in kinds."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jft import files, gguf, strict_json
from jft.data.errors import DataError, shorten
from jft.strict_json import NULL, TEXT, Kind, listed

# Ids 256.. of the "bytes" tokenizer, and the specials of a trained BPE; the turn markers serve PLAIN_CHAT.
SPECIALS = ("<pad>", "<bos>", "<eos>", "<sep>", "<system>", "<user>", "<assistant>", "<end>")
PLAIN_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """Token ids, with each token's [start, stop) characters in the text, and segment types of a pair (0, 1).

    cut: whether the tokenizer's truncation left tokens out.
    """

    ids: np.ndarray
    offsets: np.ndarray
    types: np.ndarray
    cut: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    core: the ``tokenizers.Tokenizer``; bos_id, eos_id, pad_id: None where the tokenizer has none (``pad`` is then eos,
    or 0: padded positions are never read). start_id: the first decoder token of an encoder-decoder. chat_template: a
    Jinja template or None. specials: names of the special tokens for that template (``{"bos_token": "<s>", ...}``).
    """

    core: Any
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    start_id: int | None = None
    chat_template: str | None = None
    specials: dict[str, str] = field(default_factory=dict)
    name: str = "tokenizer"

    @property
    def vocab_size(self) -> int:
        return self.core.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def rows(self) -> int:
        """Rows that an embedding needs for every id: one more than the largest, which may be beyond ``vocab_size``."""
        ids = self.core.get_vocab(with_added_tokens=True).values()
        given = (i for i in (self.bos_id, self.eos_id, self.pad, self.start_id) if i is not None)
        return 1 + max((*ids, *given), default=-1)

    @property
    def pad(self) -> int:
        """The id that fills rows: pad, else eos, else 0."""
        return next((i for i in (self.pad_id, self.eos_id) if i is not None), 0)

    def fingerprint(self) -> str:
        """SHA-256, as hex, of what decides ids: vocabulary, rules, special ids and chat template, not the path."""
        ids = self.bos_id, self.eos_id, self.pad_id, self.start_id, self.chat_template, sorted(self.specials.items())
        return hashlib.sha256((self.core.to_str() + repr(ids)).encode("utf-8", "surrogatepass")).hexdigest()

    def encode(self, text: str, pair: str | None = None, special: bool = False) -> Encoded:
        """Ids of a text (of a pair of texts); ``special``: with the tokens its post-processor adds ([CLS], bos ...).

        Raises :class:`DataError` for what is no text, such as lone surrogates.
        """
        try:
            encoding = self.core.encode(text, pair, add_special_tokens=special)
        # As in :func:`load`: a tokenizer.json may be read, and contradict itself.
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise DataError(f"{self.name} cannot encode {shorten(text)}: {error}") from None
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        ids, types = np.asarray(encoding.ids, np.int32), np.asarray(encoding.type_ids, np.int32)
        return Encoded(ids, offsets, types, bool(encoding.overflowing))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, special tokens included."""
        return self.core.decode([int(i) for i in ids], skip_special_tokens=False)

    def with_template(self, template: str | None) -> Tokenizer:
        """The same tokenizer with another chat template."""
        return replace(self, chat_template=template) if template is not None else self

    def save(self, directory: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which :func:`load` and transformers read."""
        target = Path(directory)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "built_as": self.name, **self.specials}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        for name, text in (
            ("tokenizer.json", self.core.to_str()),
            ("tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False)),
        ):
            files.write_text(target / name, text)


_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_TOKEN = Kind("a token id", lambda x: type(x) is int and 0 <= x < 2**31)


def _json(file: Path) -> dict:
    return strict_json.read(file, error=DataError, hint="fetch it again") if file.is_file() else {}


def _template(directory: Path, config: dict) -> str | None:
    # The newer form, which prevails in transformers as well.
    file = directory / "chat_template.jinja"
    if file.is_file():
        return files.read_text(file, strict_json.MAX_BYTES, DataError)
    template, where = config.get("chat_template"), directory / "tokenizer_config.json"
    if isinstance(template, list):  # several named templates
        for one in template:
            strict_json.need(one, {"name": TEXT, "template": TEXT}, f"{where}: chat_template", DataError)
        by_name = {t["name"]: t["template"] for t in template}
        return by_name.get("default")
    strict_json.check({"chat_template": template}, {"chat_template": TEXT | NULL}, where, DataError)
    return template


def _first(value: Any) -> Any:
    # Some models list several end tokens, of which the first ends a text.
    return (value[0] if value else None) if isinstance(value, list) else value


def load(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a Hugging Face directory (tokenizer.json, tokenizer_config.json, config.json), or of one file:
    a tokenizer.json or a GGUF file.

    Raises :class:`DataError` where there is no tokenizer.json, or it cannot be read.
    """
    import tokenizers

    root = Path(path).expanduser()
    if gguf.is_gguf(root):
        return _of_gguf(root)
    file = root / "tokenizer.json" if root.is_dir() else root
    if not file.is_file():
        if root.is_dir():
            raise DataError(
                f"{str(root)!r} holds no tokenizer.json; write one with transformers:"
                " AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        raise DataError(f"tokenizer {str(path)!r}: no such file or directory (built in: 'bytes', 'bpe:VOCAB')")
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    # The library raises bare Exception; where its Rust gives up, a BaseException of a class that it does not export.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{file}: not a tokenizer.json: {error}") from None
    # A saved tokenizer may cut or pad by itself; lengths are the tasks' business.
    core.no_truncation()
    core.no_padding()
    config = _json(file.parent / "tokenizer_config.json")
    model = _json(file.parent / "config.json")
    # A padding id of -1, which some old models have, would be looked up like any other.
    schema = dict.fromkeys(_IDS, _TOKEN | listed(_TOKEN) | NULL)
    strict_json.check(model, schema, file.parent / "config.json", DataError)
    entries = {**_json(file.parent / "special_tokens_map.json"), **config}
    specials = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"):
        value = entries.get(key)
        # An added token is written as an object that holds its text.
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            specials[key] = value

    def id_of(kind: str) -> int | None:
        token = specials.get(f"{kind}_token")
        token_id = core.token_to_id(token) if token is not None else None
        return token_id if token_id is not None else _first(model.get(f"{kind}_token_id"))

    return Tokenizer(
        core=core,
        bos_id=id_of("bos"),
        eos_id=id_of("eos"),
        pad_id=id_of("pad"),
        start_id=_first(model.get("decoder_start_token_id")),
        chat_template=_template(file.parent, config),
        specials=specials,
        name=str(path),
    )


def _of_gguf(path: Path) -> Tokenizer:
    """The tokenizer in a GGUF file, with its chat template."""
    from jft.gguf import tokenizer

    try:
        file = gguf.read(path)
        core, ids = tokenizer.core(file), tokenizer.special_ids(file)
    except gguf.GgufError as error:
        raise DataError(str(error)) from None
    config = tokenizer.config(file)
    return Tokenizer(
        core=core,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        pad_id=ids["pad"],
        chat_template=config.get("chat_template"),
        specials={k: v for k, v in config.items() if k.endswith("_token")},
        name=str(path),
    )


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies (the table of GPT-2's encoder)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def _byte_level(model: Any) -> Any:
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, pre_tokenizers

    core = Core(model)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    return core


def _built_in(core: Any, name: str) -> Tokenizer:
    specials = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "sep_token": "<sep>"}
    ids = {s: core.token_to_id(s) for s in SPECIALS}
    return Tokenizer(
        core=core,
        bos_id=ids["<bos>"],
        eos_id=ids["<eos>"],
        pad_id=ids["<pad>"],
        start_id=ids["<pad>"],
        chat_template=PLAIN_CHAT,
        specials=specials,
        name=name,
    )


def byte_tokenizer() -> Tokenizer:
    """UTF-8 bytes as ids 0-255, then :data:`SPECIALS` as 256-263; needs no files and no training."""
    from tokenizers import models

    # Without merges every byte stays a token.
    core = _byte_level(models.BPE(vocab={letter: i for i, letter in enumerate(_byte_letters())}, merges=[]))
    core.add_special_tokens(list(SPECIALS))
    return _built_in(core, "bytes")


def train_bpe(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE of ``vocab`` tokens, :data:`SPECIALS` included, trained on texts (Sennrich et al. 2016, 1508.07909)."""
    from tokenizers import models, trainers

    smallest = 256 + len(SPECIALS)
    if vocab < smallest:
        raise DataError(
            f"bpe:{vocab}: the vocabulary must hold the 256 bytes and {len(SPECIALS)} specials: at least {smallest}"
        )
    core = _byte_level(models.BPE())
    # All bytes, also those that the texts lack, so that any text can be encoded.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIALS), initial_alphabet=_byte_letters(), show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return _built_in(core, f"bpe:{vocab}")


def resolve(spec: Any, texts: Iterable[str], directory: str | os.PathLike | None = None) -> Tokenizer:
    """A :class:`Tokenizer` from itself, ``"bytes"``, ``"bpe:VOCAB"`` (trained on ``texts``), a directory or a file.

    A BPE is kept in ``directory`` (``tokenizer.json``) and read back from there, so a resumed run has the same ids.
    """
    if isinstance(spec, Tokenizer):
        return spec
    if spec is None:
        raise DataError(
            "text needs a tokenizer, and the model brings none: set data.tokenizer to 'bytes', 'bpe:VOCAB', or a directory "
            "with tokenizer.json"
        )
    if spec == "bytes":
        return byte_tokenizer()
    if not (isinstance(spec, str) and spec.startswith("bpe:")):
        return load(spec)
    file = Path(directory) / "tokenizer.json" if directory is not None else None
    if file is not None and file.is_file():
        built_as = _json(file.parent / "tokenizer_config.json").get("built_as")
        if built_as != spec:
            raise DataError(
                f"{file} was built as {built_as!r}, the settings say {spec!r}; remove it, or use another directory"
            )
        return load(file.parent)
    if not spec[4:].isdigit():
        raise DataError(f"tokenizer {spec!r}: write 'bpe:VOCAB' with a number, as 'bpe:1024'")
    tokenizer = train_bpe(texts, int(spec[4:]))
    if file is not None:
        tokenizer.save(file.parent)
    return tokenizer

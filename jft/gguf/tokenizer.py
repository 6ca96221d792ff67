"""The tokenizer that a GGUF file holds, as a `tokenizers` tokenizer: GPT-2's byte-level BPE and SentencePiece's BPE."""

from __future__ import annotations

from typing import Any

from jft.gguf.file import File, GgufError

_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORD}|\p{{N}}|{_REST}"
# How each vocabulary cuts text before it merges: the names are llama.cpp's, the rules those of the models' tokenizer.json.
PRE = {
    "gpt-2": "gpt2",
    "gpt2": "gpt2",
    "olmo": "gpt2",
    "smollm": "digits",
    "starcoder": "digits",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "dbrx": "llama3",
    "smaug-bpe": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
SPACE = "▁"


def core(file: File) -> Any:
    """The ``tokenizers.Tokenizer``. Raises :class:`GgufError` for a kind that is not known."""
    kind = file.value("tokenizer.ggml.model")
    makers = {"gpt2": _byte_level, "llama": _sentence_piece}
    if kind not in makers:
        raise GgufError(
            f"{file.path} has a tokenizer of kind {kind!r}; known are {', '.join(makers)}. Give the tokenizer by itself: "
            "data.tokenizer=DIR with a tokenizer.json"
        )
    tokens = file.value("tokenizer.ggml.tokens")
    tokenizer = makers[kind](file, tokens)
    _add_tokens(tokenizer, tokens, file.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens))
    bos, default = special_ids(file)["bos"], kind == "llama"
    if file.get("tokenizer.ggml.add_bos_token", default) and bos is not None:
        _add_bos(tokenizer, tokens[bos], bos)
    return tokenizer


def special_ids(file: File) -> dict[str, int | None]:
    """``{"bos": id, "eos": ..., "pad": ..., "unk": ...}``; None where the file names none."""
    keys = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "unk": "unknown_token_id"}
    return {name: file.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}


def config(file: File) -> dict[str, Any]:
    """What a ``tokenizer_config.json`` says beside the tokenizer: the special tokens by name, and the chat template."""
    tokens = file.value("tokenizer.ggml.tokens")
    named = {f"{name}_token": tokens[i] for name, i in special_ids(file).items() if i is not None}
    template = file.get("tokenizer.chat_template")
    return {"tokenizer_class": "PreTrainedTokenizerFast", **named, **({"chat_template": template} if template else {})}


def _byte_level(file: File, tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = file.get("tokenizer.ggml.pre", "default")
    if name not in PRE:
        raise GgufError(
            f"{file.path} cuts text by the rule {name!r} (tokenizer.ggml.pre), and known are {', '.join(PRE)}. Give the "
            "tokenizer by itself: data.tokenizer=DIR with a tokenizer.json"
        )
    rule = PRE[name]
    merges = [tuple(merge.split(" ", 1)) for merge in file.value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, ignore_merges=rule == "llama3")
    )
    regex = {"llama3": _LLAMA3, "qwen2": _QWEN2}.get(rule)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    if rule == "digits":
        first: Any = pre_tokenizers.Digits(individual_digits=True)
    elif regex is not None:
        first = pre_tokenizers.Split(Regex(regex), "isolated")
    else:
        first = None
    tokenizer.pre_tokenizer = byte_level if first is None else pre_tokenizers.Sequence([first, byte_level])
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(file: File, tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.value("tokenizer.ggml.scores")
    unknown = special_ids(file)["unk"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens)},
            merges=_merges(tokens, scores),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # Llama's texts begin with a space that nobody wrote; Gemma's do not.
    prefix = file.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    last = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return tokenizer


def _merges(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece makes: of all ways to put a token together, those of the best score first."""
    ids = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, score in zip(tokens, scores, strict=True):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in pairs if a in ids and b in ids]
        found += [(score, pair) for pair in sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    return [pair for _, pair in sorted(found, key=lambda x: -x[0])]


def _add_tokens(tokenizer: Any, tokens: list[str], kinds: list[int]) -> None:
    """Tokens that are no pieces of text: control tokens, which decoding may leave out, and those the user defined."""
    from tokenizers import AddedToken

    of = lambda kind: [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == kind]
    tokenizer.add_special_tokens(of(CONTROL) + of(UNKNOWN))
    tokenizer.add_tokens(of(USER))


def _add_bos(tokenizer: Any, token: str, number: int) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )

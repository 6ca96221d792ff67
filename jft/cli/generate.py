"""Generate text: a model from the hub, a directory or a GGUF file, or a run, with its deltas applied."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jft.cli import options, restored
from jft.cli.errors import Parser, UsageError
from jft.cli.train import may_add

EXAMPLES = """
  jft generate --model=model.gguf "What is the capital of France?"
  jft generate --model=DIR --delta=math.safetensors --delta=code.safetensors --base "Write a loop"     side by side
  jft generate --workdir=runs/sft --base < prompts.txt                             a prompt a line

Text is given to a model as a user's message where it has a chat template, and to a run as its training data was: in the chat
template, or as it is. --chat and --raw say which. Without prompts they are read from the terminal, a line each.
"""
# What `jft generate` hands to `jft.generate` as it is.
SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "batch_size")


class _Variant(NamedTuple):
    """A model to ask: its label, and a function that gives it and its parameters (loaded when its turn comes)."""

    label: str
    build: Callable[[], tuple[Any, Any]]


def main(argv: Sequence[str]) -> int:
    """``jft generate (--model=SOURCE | --workdir=RUN) [--delta=FILE ...] [--base] [PROMPT ...]``."""
    parser = Parser(prog="jft generate", description=__doc__, epilog=EXAMPLES)
    _arguments(parser)
    if (early := parser.parse_known_args(argv)[0]).workdir and not early.model:
        args, config = options.parse(parser, argv, restored.config_of(argv), may_add, "that of the run")
    else:
        args, config = parser.strict(argv), None
    if bool(args.model) == bool(args.workdir):
        parser.error("give --model=SOURCE or --workdir=RUN, one of them")
    if args.model and args.base and not args.delta:
        parser.error("--base is the model without its deltas, and there is no --delta")
    for file in args.delta:
        if not Path(file).is_file():
            raise UsageError(f"task vector {file!r} does not exist")
    if args.raw and (args.system or args.chat):
        parser.error(f"{'--system' if args.system else '--chat'} goes through the chat template; leave out --raw")

    tokenizer, variants = _of_run(args, config) if config is not None else _of_model(args)
    from jft.data.config import in_chat

    # As it was trained: a run knows nothing of a template that it has not seen.
    chat = args.chat or bool(args.system) or config is None or in_chat(config.data)
    if args.tokenizer:
        from jft.generation.prompts import tokenizer_of

        tokenizer = tokenizer_of(args.tokenizer)
    for batch in _prompts(args.prompts):
        _answer(args, batch, tokenizer, variants, chat and not args.raw)
    return 0


def _arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="texts to answer or to continue")
    add("--model", help="a Hugging Face directory or hub id, or a GGUF file")
    add("--workdir", help="a finished run: its base with its task vector")
    add("--delta", action="append", default=[], metavar="FILE", help="a task vector to apply; several: side by side")
    add("--base", action="store_true", help="also the base, beside the deltas or the run")
    add("--scale", type=float, default=1.0, help="what the deltas are multiplied with (default 1)")
    add(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="weights and activations, of --model",
    )
    add("--tokenizer", help="a directory, tokenizer.json or GGUF file; default the model's own")
    add("--raw", action="store_true", help="continue the texts as they are, without the chat template")
    add("--chat", action="store_true", help="each text is a user's message in the chat template")
    add("--system", help="a message before each prompt")
    add("--max-tokens", type=int, default=256, help="new tokens, at most (default 256)")
    add("--temperature", type=float, default=0.0, help="0, the default: always the most probable token")
    add("--top-k", type=int, default=0, help="draw among so many most probable tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="draw among the most probable tokens that sum to this (default 1)")
    add("--min-p", type=float, default=0.0, help="draw among tokens of at least this share of the largest probability")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    add("--seed", type=int, default=0, help="of the draws")
    add("--batch-size", type=int, default=0, help="prompts at a time; 0: all")
    add("--json", action="store_true", help="print JSON: a list of {prompt, answers}")


def _of_model(args: argparse.Namespace) -> tuple[Any, list[_Variant]]:
    """The tokenizer and variants of ``--model``."""
    from jft import models
    from jft.data import tokenizer as tokenizers
    from jft.models.loading import fetch

    source = fetch(args.model)
    model, params = models.load(source, dtype=args.dtype)
    deltas = _of_deltas(args, model, params)
    base = [_Variant("base", lambda: (model, params))] if args.base or not args.delta else []
    return None if args.tokenizer else tokenizers.load(source), base + deltas


def _of_deltas(args: argparse.Namespace, model: Any, base: Any) -> list[_Variant]:
    """A variant for each ``--delta``, called by its name, or by its path where names do not tell them apart."""
    from jft import delta

    def build(file: str) -> tuple[Any, Any]:
        restored.note_linearized(file)
        # One copy at a time: a delta is applied when its turn comes, and gone with it.
        return model, delta.apply(base, delta.TaskVector.load(file), args.scale)

    names = [Path(file).stem for file in args.delta]
    labels = names if len(set(names)) == len(names) else args.delta
    return [_Variant(label, functools.partial(build, file)) for label, file in zip(labels, args.delta, strict=True)]


def _of_run(args: argparse.Namespace, config: Any) -> tuple[Any, list[_Variant]]:
    """The tokenizer and variants of ``--workdir``."""
    from jft import delta, tangent

    restored.start()
    run = restored.restore(config, Path(args.workdir))

    def trained() -> tuple[Any, Any]:
        vector = args.scale * run.task_vector()
        method = vector.manifest.get("method", {})
        if method.get("forward", "standard") == "standard":
            return run.model, delta.apply(run.base, vector)
        # Elsewhere its task vector gives another function than the one that was trained.
        f_lin = tangent.linearize(run.model.apply, run.base, method.get("until"))
        return f_lin, f_lin.direction(vector)

    variants = [_Variant("base", lambda: (run.model, run.base))] if args.base else []
    variants.append(_Variant("run", trained))
    return run.train.tokenizer, variants + _of_deltas(args, run.model, run.base)


def _prompts(given: Sequence[str]) -> Iterator[list[str]]:
    """Prompts to answer at once: those of the command line, all lines of a file, or each line of the terminal by itself."""
    if given:
        yield list(given)
    elif not sys.stdin.isatty():
        if lines := [line.rstrip("\n") for line in sys.stdin if line.strip()]:
            yield lines
    else:
        while True:
            try:
                line = input("> ")
            except EOFError:
                print()
                return
            if line.strip():
                yield [line]


def _answer(
    args: argparse.Namespace, prompts: list[str], tokenizer: Any, variants: list[_Variant], chat: bool = True
) -> None:
    """Print the answers of all variants to ``prompts``; of one prompt as they are made. chat: in the template, if any."""
    from jft.generation import generate

    chat = chat and tokenizer is not None and tokenizer.chat_template is not None
    streams = len(prompts) == 1 and not args.json
    labels = len(variants) > 1
    answers: list[list[str]] = []
    for variant in variants:
        if streams and labels:
            print(f"[{variant.label}] ", end="", flush=True)
        answers.append(
            generate(
                *variant.build(),
                prompts,
                tokenizer=tokenizer,
                chat=chat,
                system=args.system,
                stop=args.stop,
                show=(lambda i, text: print(text, end="", flush=True)) if streams else None,
                **{name: getattr(args, name) for name in SAMPLING},
            )
        )
        if streams:
            print()
    if args.json:
        rows = [
            {"prompt": p, "answers": {v.label: a[i] for v, a in zip(variants, answers, strict=True)}}
            for i, p in enumerate(prompts)
        ]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif not streams:
        for i, prompt in enumerate(prompts):
            print(f"> {prompt}")
            for variant, texts in zip(variants, answers, strict=True):
                print(f"{f'[{variant.label}] ' if labels else ''}{texts[i]}")

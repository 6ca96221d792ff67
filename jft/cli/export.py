"""Write a finished run as a Hugging Face directory: the base with the run's task vector added."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jft.cli import options, restored
from jft.cli.errors import Parser, UsageError
from jft.cli.train import may_add


def main(argv: Sequence[str]) -> int:
    """``jft export --workdir=RUN --out=DIR [--forward standard]``."""
    parser = Parser(prog="jft export", description=__doc__)
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument("--out", required=True, help="the directory to write; it must not exist, or be empty")
    parser.add_argument(
        "--forward",
        choices=["standard"],
        help="of a run that trained linearized: write base + task vector as ordinary weights, which are another model",
    )
    args, config = options.parse(parser, argv, restored.config_of(argv), may_add, "that of the run")
    out = Path(args.out)
    # Before the base is loaded, which may take minutes.
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {args.out!r} exists and is not an empty directory; give another")
    if not args.forward and (trained := restored.linearized(Path(args.workdir) / "task_vector.safetensors")):
        raise UsageError(
            f"{args.workdir} {trained}; `jft eval --workdir={args.workdir}` measures what was trained. --forward=standard "
            "writes base + task vector as ordinary weights all the same; `jft eval --forward=standard` measures those"
        )

    from jft import models

    restored.start()
    run = restored.restore(config, Path(args.workdir))
    classes, heads = run.train.classes, getattr(run.model.config, "classes", 0)
    # A head may have more classes than the data; names that are numbers say less than the checkpoint's.
    named = classes and len(classes) == heads and list(classes) != [str(i) for i in range(heads)]
    like = run.config.model.source or None
    models.save(run.model, run.params(), out, like=like, labels=classes if named else None)
    # A base that was trained from scratch has no files to copy it from.
    if run.train.tokenizer is not None and not (out / "tokenizer.json").exists():
        run.train.tokenizer.save(out)
    print(f"wrote {out}")
    return 0

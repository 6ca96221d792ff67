"""Recipes; names and links that lead out of a folder; folders with files of others."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.hostile import PAYLOAD, Case
from tests.faults.hostile_damage import FILES, content, damaged
from tests.faults.hostile_json import model_folder

# Recipes of merges.


def recipes() -> Iterator[Case]:
    """YAML."""

    def read(folder: Any) -> Any:
        from jft.merge import recipe

        return recipe.load(folder / "recipe.yml")

    bomb = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)
    )
    whole = "merge_method: linear\nmodels: [{model: a}]\n"
    for name, text in {
        "empty": "",
        "words": "Entry not found",
        "list": "- 1",
        "python object": "!!python/object/apply:os.system ['touch ../reached']",
        "python module": f"a: !!python/module:{PAYLOAD}",
        "aliases": bomb,
        "endless": "a: &a [*a]",
        "endless mapping": "a: &a {b: *a}",
        "deep": "[" * 20_000,
        "deep mappings": "{a: " * 5_000,
        "seed a list": whole + "seed: [1]",
        "seed of floats": whole + "seed: 1.5",
        "seed not a number": whole + "seed: .nan",
        "seed of 5000 digits": whole + "seed: " + "9" * 5000,
        "models null": "merge_method: linear\nmodels: [null]",
        "models numbers": "merge_method: linear\nmodels: [1]",
        "method a list": "merge_method: [1]\nmodels: [{model: a}]",
        "dtype a list": whole + "dtype: [1]",
        "dtype a mapping": whole + "dtype: {a: 1}",
        "parameters a list": whole + "parameters: [1]",
        "parameter null": whole + "parameters: {weight: null}",
        "key a list": whole + "? [1]\n: 1",
        "binary": "\0\1\2",
    }.items():
        yield Case(f"recipe/{name}", damaged("recipe.yml", content(text)), read, names="recipe.yml")
    for name, damage in FILES.items():
        if name not in ("link to itself",):
            yield Case(f"recipe/{name}", damaged("recipe.yml", damage), read, names="recipe.yml")


# Names and links that lead out, and folders with files of others.


def folders() -> Iterator[Case]:
    """What is written, and where."""
    for name in ("../x", "..", "/tmp/x", "a/b", "", ".", "a\\b", "a\0b", "\x1b[31m", "x" * 300):
        yield Case(f"name/study {name[:9]!r}", lambda folder, name=name: name, _check_study, names=None)
        yield Case(f"name/task {name[:9]!r}", lambda folder, name=name: name, _check_task, names=None)
        yield Case(f"name/method {name[:9]!r}", lambda folder, name=name: name, _check_method, names=None)
        yield Case(f"name/member {name[:9]!r}", lambda folder, name=name: name, _check_member, names=None)

    def linked(folder: Path, target: str) -> Path:
        model_folder(folder / "like")
        secret = folder / "secret"
        secret.write_text("secret")
        (folder / "like" / "tokenizer.json").symlink_to(target.format(secret=secret))
        return folder

    for name, target in {"absolute": "{secret}", "relative": "../secret", "device": "/dev/zero"}.items():
        make = functools.partial(linked, target=target)
        # What is no file is not copied.
        yield Case(
            f"link/{name}",
            make,
            _copy_companions,
            refused=name != "device",
            names="tokenizer.json" if name != "device" else None,
        )

    def cached(folder: Path) -> Path:
        blobs, like = folder / "models--a--b" / "blobs", folder / "models--a--b" / "snapshots" / "0"
        blobs.mkdir(parents=True)
        like.mkdir(parents=True)
        (blobs / "1").write_text("{}")
        (like / "tokenizer.json").symlink_to("../../blobs/1")
        (folder / "like").symlink_to(like)
        return folder

    yield Case("link/of the hub's cache", cached, _copy_companions, refused=False)
    for name in ("notes.txt", ".git", "pytorch_model.bin", "model.safetensors.bak"):

        def occupied(folder: Path, name: str = name) -> Path:
            (model_folder(folder) / name).write_text("mine")
            return folder

        yield Case(f"overwrite/{name}", occupied, _overwrite, names=name)
    yield Case("overwrite/own files", model_folder, _overwrite, refused=False)


def _config_of_code(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"a": "x", "data": {"files": "y"}}))
    return folder


def _override(folder: Any) -> Any:
    """Overrides are literals, of which nothing is evaluated."""
    from jft.cli import options

    config = options.load(str(folder / "config.json"))
    for text in (f"__import__({PAYLOAD!r})", f"[__import__({PAYLOAD!r})]", "open('../reached', 'w')", "9**9**9"):
        options.override(config, "a", text)
        assert config.a == text


def _write_through(folder: Any) -> Any:
    """A file in whose place lies a link takes the place of the link."""
    from jft import files

    (folder / "outcome.json").symlink_to(folder.parent / "reached")
    files.write_text(folder / "outcome.json", "x")
    assert not (folder / "outcome.json").is_symlink()


def safe() -> Iterator[Case]:
    """What was never a way out, and stays none."""
    yield Case("safe/overrides are not evaluated", _config_of_code, _override, refused=False)
    yield Case("safe/links are not written through", lambda folder: folder, _write_through, refused=False)


def _study(**parts: Any) -> dict[str, Any]:
    from jft.analysis import study

    data = {"source": "digits"}
    given = {
        "tasks": {"a": {"data": data}},
        "methods": {"full": {"method": {"name": "full"}}},
        "base": {"source": "x"},
    } | parts
    return study.study(**given).to_dict()


def _check_study(name: Any) -> Any:
    from jft.analysis import study

    return study.check({"studies": {name: _study()}})


def _check_task(name: Any) -> Any:
    from jft.analysis import study

    # Into the dict: a ConfigDict takes no such names, and results come from JSON.
    one = _study()
    one["tasks"] = {name: one["tasks"]["a"]}
    return study.check({"studies": {"s": one}})


def _check_method(name: Any) -> Any:
    from jft.analysis import study

    one = _study()
    one["methods"] = {name: one["methods"]["full"]}
    return study.check({"studies": {"s": one}})


def _check_member(name: Any) -> Any:
    from jft.train.members import _name

    return _name(0, {"name": name})


def _copy_companions(folder: Any) -> Any:
    from jft.models.hf import writer

    (folder / "out").mkdir()
    writer.copy_companions(folder / "like", folder / "out")


def _overwrite(folder: Any) -> Any:
    from jft.models.hf import writer

    writer.check_target(folder, overwrite=True)


def cases() -> Iterator[Case]:
    """All of them, in a fixed order."""
    yield from itertools.chain(recipes(), folders(), safe())

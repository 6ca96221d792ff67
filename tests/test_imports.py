"""The house keeps its floors: a module imports from lower ones or its own folder, and no two files import each other."""

import ast
from pathlib import Path

import jft

ROOT = Path(jft.__file__).parent
# Folders and files of jft, from the ground up; those of one line stand on one floor.
FLOORS = [
    {
        "tree",
        "dot",
        "files",
        "strict_json",
        "safetensors_files",
        "names",
        "compiled",
        "terminal",
        "version",
        "kernels",
        "gguf",
    },
    {"delta"},
    {"parallel"},
    {"models", "data"},
    {"select", "tangent", "generation"},
    {"methods", "merge"},
    {"presets", "train"},
    {"analysis", "bench"},
    {"cli"},
]


def modules():
    """Every module by its dotted name."""
    paths = {p.relative_to(ROOT.parent).with_suffix("") for p in ROOT.rglob("*.py")}
    names = {p: ".".join(p.parts).removesuffix(".__init__") for p in paths}
    return {name: ROOT.parent / path.with_suffix(".py") for path, name in names.items()}


def imports(name, path, known):
    """The modules of jft that a file imports, wherever in it, but for type checkers alone."""
    found = set()
    skipped = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {id(inner) for inner in ast.walk(node)}
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
    return {m for m in found if m in known and m != name}


def graph():
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def floor(name):
    part = name.split(".")[1] if "." in name else ""
    return next((i for i, names in enumerate(FLOORS) if part in names), None)


def test_every_part_has_a_floor():
    assert not {n for n in modules() if floor(n) is None} - {"jft", "jft.__main__"}


def test_imports_go_down():
    wrong = [
        f"{name} -> {other}"
        for name, others in graph().items()
        for other in others
        if (floor(name) is not None and (floor(other) is None or floor(other) > floor(name)))
        or (floor(other) == floor(name) and floor(name) and other.split(".")[1] != name.split(".")[1])
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_two_files_import_each_other():
    edges = graph()
    pairs = {tuple(sorted((a, b))) for a, others in edges.items() for b in others if a in edges.get(b, ())}
    assert not pairs, "\n".join(map(str, sorted(pairs)))


def test_nothing_imports_the_presets():
    wrong = [
        n
        for n, others in graph().items()
        for o in others
        if o.startswith("jft.presets") and not n.startswith("jft.presets")
    ]
    assert not wrong, wrong

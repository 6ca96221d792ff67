"""What stands before and behind the layers trains."""

from jft.presets.embeddings_and_output import embeddings_and_output
from tests.methods import toy

MUTATIONS = (
    ("jft/presets/embeddings_and_output.py", "(table|cls)$", "(table)$"),
    ("jft/presets/embeddings_and_output.py", "(patch|head|classifier)/", "(patch|head)/"),
    ("jft/presets/embeddings_and_output.py", ', exclude=("layers/",)', ""),
)


def test_what_trains():
    """Tables, patches and heads of any model, but nothing inside its layers, whatever it is called."""
    outside = {"embed/table", "positions/table", "cls", "patch/w", "patch/b", "classifier/w", "head/w"}
    others = {"layers/attn/head/w", "layers/relative/table", "final_norm/scale"}
    shapes = toy.shapes() | {p: toy.shapes()["head/w"] for p in outside | others}
    assert set(embeddings_and_output().plan(shapes, toy.model()).leaves) == outside

"""What a study has computed is kept for the next start, as long as it is asked for the same."""

from jft.analysis import run_store


def test_what_was_computed_is_kept_until_something_else_is_asked(tmp_path):
    computed = []

    def compute():
        computed.append(1)
        return {"rows": [len(computed)]}

    path = tmp_path / "kept.json"
    assert run_store.kept(path, {"grid": (0, 1)}, compute) == {"rows": [1]}
    assert run_store.kept(path, {"grid": (0, 1)}, compute) == {"rows": [1]}
    assert run_store.kept(path, {"grid": (0, 2)}, compute) == {"rows": [2]}
    assert len(computed) == 2

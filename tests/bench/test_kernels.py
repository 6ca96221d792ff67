"""The benchmark of kernels: what it counts, what it refuses, and the static goals on a TPU that is not here."""

import json
import subprocess
import sys

import jax
import pytest

from jft.bench.bundles import CLOCK
from jft.cli import main
from jft.kernels import blocks_tpu, tuning

SMALL = ["bench", "kernels", "--shapes", "64x256x256", "--density", "0.5", "--dtype", "float32"]


def test_forms_are_timed_where_they_can_run(capsys):
    assert main.call([*SMALL, "--steps", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["costs"]
    assert [(r["kernel"], r["form"]) for r in rows] == [
        (kernel, form)
        for kernel in ("block_sddmm", "block_spmm", "block_put", "sparse_adam")
        for form in ("kernel", "xla", "dense")
    ]
    for row in rows:
        if row["form"] == "kernel":
            assert row["refusal"] == "no kernel for cpu and these shapes" and row["seconds"] is None
        else:
            assert row["seconds"] > 0
    # Two blocks of 128 x 128: x and dy once, and their gradient.
    by = {(r["kernel"], r["form"]): r for r in rows}
    assert by["block_sddmm", "xla"]["floor"] == 4 * (64 * 256 * 2 + 2 * 128 * 128)
    assert by["block_put", "xla"]["floor"] == 4 * 2 * (2 * 128 * 128)
    # g, m, v and the weight are read, the last three written.
    assert by["sparse_adam", "xla"]["floor"] == 4 * 7 * (2 * 128 * 128)
    assert by["block_sddmm", "dense"]["flops"] == pytest.approx(2 * by["block_sddmm", "xla"]["flops"], rel=0.1)


def test_the_table_says_why_there_is_no_figure(capsys):
    assert main.call(SMALL) == 0
    assert "no kernel for cpu" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shapes", "64x64"], "shape '64x64' is written TOKENSxINPUTSxOUTPUTS"),
        (["--topology", "v5e:2x2", "--steps", "1"], "nothing can be run on the topology v5e:2x2"),
        (["--tune"], "there is no accelerator here to time kernels on"),
        (["--kernels", "block_sdmm"], "kernel 'block_sdmm' is unknown (did you mean 'block_sddmm'?)"),
        (["--step", "1"], "unknown option '--step' (did you mean '--steps'?)"),
    ],
)
def test_refusals_are_one_line(argv, message, capsys):
    assert main.call(["bench", "kernels", *argv]) != 0
    written = capsys.readouterr()
    assert message in written.err and not written.out


def test_what_was_timed_is_taken_before_the_heuristic(tmp_path, monkeypatch):
    monkeypatch.setenv("JFT_TUNED", str(tmp_path))
    monkeypatch.setattr(tuning, "device_kind", lambda: "TPU v5 lite")
    x, dy = (jax.ShapeDtypeStruct((1024, 512), "bfloat16") for _ in range(2))
    heuristic = blocks_tpu.config_of(x, dy, 4, (128, 128), "float32")
    case = tuning.sddmm_case(x, dy, 4, (128, 128))
    timed = {"tile": 256, "panels": 2, "groups": 1, "unroll": 4}
    path = tuning.write("TPU v5 lite", {case: timed})
    assert path == tmp_path / "tpu_v5_lite.json"
    assert blocks_tpu.config_of(x, dy, 4, (128, 128), "float32") == blocks_tpu.Config(**timed) != heuristic
    # Another case, and another kind of device, have none.
    assert blocks_tpu.config_of(x, dy, 5, (128, 128), "float32") == heuristic
    tuning.write("TPU v5 lite", {"block_sddmm other": timed})
    assert tuning.lookup(case) == timed
    monkeypatch.setattr(tuning, "device_kind", lambda: "TPU v6 lite")
    assert tuning.lookup(case) is None


@pytest.mark.parametrize("text", ["", "[]", '{"case": 3}', '{"case": {'])
def test_a_damaged_table_is_named(text, tmp_path, monkeypatch):
    monkeypatch.setenv("JFT_TUNED", str(tmp_path))
    monkeypatch.setattr(tuning, "device_kind", lambda: "TPU v5 lite")
    (tmp_path / "tpu_v5_lite.json").write_text(text)
    with pytest.raises(ValueError, match=r"tpu_v5_lite.json is no table of kernel configurations: delete it"):
        tuning.lookup("case")


def test_all_candidates_fit_and_divide():
    x, dy = (jax.ShapeDtypeStruct((8192, 4096), "bfloat16") for _ in range(2))
    configs = blocks_tpu.candidates(x, dy, 104, (128, 128), "float32")
    assert len(configs) == len(set(configs)) > 8
    assert configs[0] == blocks_tpu.config_of(x, dy, 104, (128, 128), "float32")
    assert all(c.vmem(4096, 4096, 104, (128, 128), 2, 4) <= blocks_tpu.vmem() for c in configs)
    assert all(32 % c.panels == 0 for c in configs)


@pytest.mark.peers
def test_the_kernel_meets_its_goals_on_a_v5e():
    pytest.importorskip("libtpu")
    # A process of its own, since libtpu reads where to write instructions when it is loaded.
    argv = ["--kernels", "block_sddmm", "--density", "0.1", "0.25", "--topology", "v5e:2x2", "--json"]
    run = subprocess.run(
        [sys.executable, "-m", "jft", "bench", "kernels", *argv], capture_output=True, text=True, check=True
    )
    costs = {(c["form"], c["case"]["density"]): c for c in json.loads(run.stdout)["costs"]}
    for density, share in ((0.1, 1 / 8), (0.25, 1 / 3)):
        kernel, dense = (costs[form, density] for form in ("kernel", "dense"))
        assert kernel["temporaries"] == 0
        assert kernel["to_floor"] <= 1.05
        assert kernel["bundles"] / CLOCK["v5e"] <= share * dense["estimate"]
    # 32 and 13 passes of eight blocks.
    assert costs["kernel", 0.25]["bundles"] * 13 == costs["kernel", 0.1]["bundles"] * 32

"""What a step costs by method: figures that hang together, a time for each, TPU chips that are not there, and refusals."""

import json

import pytest

from jft.bench.step import Cost, Setting, measure
from jft.cli import main
from jft.cli.bench import METHODS, _method

SMALL = {"model": "tiny", "batch": 8, "tokens": 16}
SHELL = ["bench", "step", "--model", "tiny", "--batch", "8", "--tokens", "16"]


@pytest.fixture(scope="module")
def costs():
    """The default methods, each timed for one step."""
    told = []
    found = measure(Setting(**SMALL, steps=1), [_method(text) for text in METHODS], told.append)
    assert [line.removesuffix(": compiled") for line in told] == [c.method for c in found]
    return {c.method.split()[0]: c for c in found}


@pytest.mark.optimized
def test_every_default_method_compiles_and_makes_a_step(costs):
    assert list(costs) == [text.split(":")[0] for text in METHODS]
    assert all(c.seconds > 0 and len(c.rounds) == 1 for c in costs.values())
    one, other = list(costs.values())[:2]
    assert one.times(other) == one.rounds[0] / other.rounds[0]
    assert all(c.temporaries + c.arguments <= c.peak for c in costs.values())


@pytest.mark.optimized
def test_costs_follow_what_trains(costs):
    full = costs["full"]
    assert full.density == 1
    # Values, gradients and two moments; the optimizer's counters beside them.
    assert 0 <= full.optimizer_bytes - 4 * 4 * full.trained <= 64
    for name, cost in costs.items():
        assert cost.density == pytest.approx(cost.trained / full.trained)
        assert cost.optimizer_bytes <= 16 * cost.trained + 64, name
        # At these extents bookkeeping weighs more than the products it saves.
        assert cost.flops < 1.1 * full.flops, name


@pytest.mark.optimized
def test_without_steps_nothing_is_timed_and_the_figures_are_the_same(costs):
    (cost,) = measure(Setting(**SMALL), [("lora", {"rank": 16})])
    assert cost.seconds is None
    assert (cost.trained, cost.flops) == (costs["lora"].trained, costs["lora"].flops)


@pytest.mark.optimized
def test_a_mesh_counts_all_its_devices(costs):
    (cost,) = measure(Setting(**SMALL, mesh=(("fsdp", 8),)), [("full", {})])
    assert (cost.trained, cost.optimizer_bytes) == (costs["full"].trained, costs["full"].optimizer_bytes)
    assert cost.flops == pytest.approx(costs["full"].flops, rel=0.3)
    assert cost.arguments < costs["full"].arguments / 2


@pytest.mark.optimized
def test_blockwise_attention_takes_less_memory_for_long_rows():
    long = {"model": "tiny", "batch": 1, "tokens": 2048, "unroll": 1}
    plain, blockwise = (measure(Setting(**long, attention=how), [("full", {})])[0] for how in ("plain", "blockwise"))
    assert blockwise.temporaries < 0.5 * plain.temporaries


def test_the_command_prints_json(capsys):
    assert main.call([*SHELL, "--methods", "full", "block_sparse:density=0.25,block=(32,32)", "--json"]) == 0
    written = capsys.readouterr()
    said = json.loads(written.out)
    assert said["setting"]["model"] == "tiny"
    assert [c["method"] for c in said["costs"]] == ["full", "block_sparse density=0.25 block=(32, 32)"]
    assert [Cost(**c).seconds for c in said["costs"]] == [None, None]
    assert "full: compiled" in written.err


def test_the_command_prints_a_table(capsys):
    assert main.call([*SHELL, "--methods", "full", "lora:rank=16", "--steps", "1"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["method", "trained", "FLOPs"]
    assert "s / step" in header
    assert [row.split()[0] for row in rows] == ["full", "lora"]


def test_layers_in_a_scan_are_not_counted_once(capsys):
    assert main.call([*SHELL, "--methods", "full", "--unroll", "1"]) == 0
    header = capsys.readouterr().out.splitlines()[0]
    assert "FLOPs" not in header
    assert "temporaries / device" in header


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "tinny"], "model 'tinny' is unknown (did you mean 'tiny'?)"),
        (["--methods", "lorra"], "method 'lorra' is unknown (did you mean 'lora'?)"),
        (["--methods", "lora:16"], "method 'lora:16' is written name:option=value,option=value"),
        (["--mesh", "fsdp:2"], "--mesh 'fsdp:2' is written fsdp=8,tensor=2"),
        (["--topology", "v5e:4x4", "--steps", "1"], "nothing can be run on the topology v5e:4x4"),
        (["--stepps", "1"], "unknown option '--stepps' (did you mean '--steps'?)"),
    ],
)
def test_refusals_are_one_line(argv, message, capsys):
    assert main.call([*SHELL, *argv]) != 0
    written = capsys.readouterr()
    assert message in written.err
    assert not written.out


@pytest.mark.peers
def test_chips_that_are_not_there():
    pytest.importorskip("libtpu")
    setting = Setting(**SMALL, dtype="bfloat16", unroll=1, topology="v5e:2x2", mesh=(("fsdp", 4),))
    (cost,) = measure(setting, [("full", {})])
    assert cost.seconds is cost.flops is None
    # A float32 master and two moments of each weight: a quarter of them on each chip.
    assert cost.arguments >= (4 + 4 + 4) * cost.trained / 4
    assert cost.peak >= cost.arguments + cost.temporaries


@pytest.mark.peers
def test_what_does_not_fit_a_chip_is_a_row_like_others(capsys):
    pytest.importorskip("libtpu")
    argv = ["--topology", "v5e:2x2", "--mesh", "fsdp=4", "--unroll", "1", "--methods", "full", "--batch", "65536"]
    assert main.call([*SHELL, *argv, "--tokens", "512"]) == 0
    assert "GiB, does not fit" in capsys.readouterr().out


@pytest.mark.peers
def test_an_unknown_topology():
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match="topology 'v99:2x2' cannot be described"):
        measure(Setting(**SMALL, topology="v99:2x2"), [("full", {})])

"""A fleet of eight beside eight separate runs on the quickstart's vision transformer.

    python benchmarks/fleet.py --out benchmarks/results/fleet_cpu.json

The members are the six digit tasks of configs/quickstart.py, the first two again with another seed and rate, each with its
own head, data, seed and learning rate, and as many steps as there (200 of 64 images). Both sides do all that a run does:
reading data, compiling, selecting, metrics every 5 steps, one checkpoint, task vectors on disk. *Total* is from empty
caches, so it has all compilation in it (eight separate runs compile once, as they share the step); *warm* is the same again
with what was compiled. `sweep` is eight learning rates and seeds on one task, where the fleet reads the data once. The
sides alternate, `--repeats` times; medians.

`commands` is what a user without fleets would run: eight `jft train`, one after the other, beside one `jft train` whose
config lists the fleet. Each is a process that starts, reads, compiles, selects, trains, checkpoints and writes. The members
are the four digit domains of the quickstart, each with two seeds and rates. *Total* is without a compilation cache, which is
the default; *warm* with one (`JAX_COMPILATION_CACHE_DIR`) that is already filled.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import platform
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import jft
from jft import data
from jft.analysis import bases, run_store, settings, task_runs, tasks
from jft.train import finetune, stacked, step

QUICKSTART = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "quickstart.py"))
METHODS = {
    "lora": {"name": "lora", "rank": 4},
    "bitfit": {"name": "bitfit"},
    "block_sparse": {"name": "block_sparse", "density": 0.05, "block": (16, 16)},
    "lift": {"name": "lift", "rank": 4, "filter_rank": 16, "every": 0},
}
RATES = {"lora": 5e-3, "bitfit": 1e-2, "block_sparse": 5e-3, "lift": 5e-3}
QUIET = {"every": 5, "progress": False}


def prepared(folder: Path):
    config = QUICKSTART["digits"]()
    config.base.train.steps = 50  # what the base knows changes no time
    config = run_store.plain(config)
    base = bases.prepare(config["base"], config["common"], folder / "base")
    return config, base, tasks.prepare_all(config, base, folder)


def listed(config, found, method: str, kind: str, count: int):
    """``(model, what each of the runs has of its own)``."""
    names = list(found)
    members = []
    for i in range(count):
        name = names[0] if kind == "sweep" else names[i % len(names)]
        members.append(
            {
                "name": f"{i}_{name}",
                "task": name,
                "seed": i if kind == "sweep" else i // len(names),
                "lr": RATES[method] * (0.5 + i / count),
                "params": {"classifier": found[name].head},
                "read": settings.of_run(config, name, "lora").data,
            }
        )
    return members


def loader(member, seed):
    return data.build(member["read"], batch_size=64, seed=seed, image_size=8)


def shared(config, task, method, steps):
    of_run = settings.of_run(config, task.name, "lora")
    optimizer = dataclasses.asdict(of_run.optimizer)
    chosen = {**METHODS[method], "freeze": task_runs.frozen(task.model.config.backbone)}
    return {
        "method": chosen,
        "optimizer": optimizer,
        "steps": steps,
        "objective": task.objective,
        "checkpoint": {"every": steps},
        "log": QUIET,
    }


def separate(config, base, found, members, method, steps, kind, folder):
    runs = []
    for member in members:
        task = found[member["task"]]
        options = shared(config, task, method, steps)
        options["optimizer"] = {**options["optimizer"], "lr": member["lr"]}
        read = loader(member, 0 if kind == "sweep" else member["seed"])
        params = {**base.params, **member["params"]}
        runs.append(finetune(task.model, params, read, seed=member["seed"], workdir=folder / member["name"], **options))
    return runs


def fleet(config, base, found, members, method, steps, kind, folder):
    task = found[members[0]["task"]]
    one = loader(members[0], 0)
    listed = []
    for member in members:
        own = {key: member[key] for key in ("name", "seed", "lr", "params")}
        listed.append({**own, "data": one if kind == "sweep" else loader(member, member["seed"])})
    params = {**base.params, **members[0]["params"]}
    return finetune(task.model, params, None, fleet=listed, workdir=folder, **shared(config, task, method, steps))


RUNS = """import json
from pathlib import Path

from jft.train.config import default


def get_config(name):
    config = default()
    said = json.loads(Path(__file__).with_name("runs.json").read_text())[name]
    config.update({**said, "fleet": tuple(said["fleet"])})
    return config
"""
DOMAINS = QUICKSTART["DOMAINS"]


class Commands:
    """Configs of the runs and of their fleet on disk, and the two sides that train them as processes."""

    def __init__(self, base, task, method, count, steps, folder):
        self.folder, self.names = folder, [f"{i}_{'_'.join(DOMAINS[i % 4])}" for i in range(count)]
        jft.save(task.model, task.params(base.params), folder / "base")
        scans = {"source": "digits", "split": "train", "threads": 0, "prefetch": 0}
        common = {
            "steps": steps,
            "batch_size": 64,
            "model": {"source": str(folder / "base"), "classes": 10, "pool": "mean"},
            "method": {**METHODS[method], "freeze": list(task_runs.frozen(task.model.config.backbone))},
            "optimizer": {"schedule": "cosine", "warmup": 20},
            "checkpoint": {"every": steps},
            "log": QUIET,
        }
        own = {
            name: {
                "seed": i // 4,
                "data": {**scans, **DOMAINS[i % 4]},
                "optimizer": {**common["optimizer"], "lr": RATES[method] * (0.5 + i / count)},
            }
            for i, name in enumerate(self.names)
        }
        runs = {name: {**common, **one, "fleet": ()} for name, one in own.items()}
        members = [{"name": name, **one} for name, one in own.items()]
        runs["fleet"] = {**common, "data": own[self.names[0]]["data"], "fleet": members}
        (folder / "runs.py").write_text(RUNS)
        (folder / "runs.json").write_text(json.dumps(runs))

    def run(self, name, workdir, cache=None):
        kept = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        without = {k: v for k, v in os.environ.items() if k not in kept}
        argv = [
            sys.executable,
            "-m",
            "jft",
            "train",
            f"--config={self.folder / 'runs.py'}:{name}",
            f"--workdir={workdir}",
        ]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env=without | (kept if cache else {}))

    def separate(self, cache, workdir):
        for name in self.names:
            self.run(name, workdir / name, cache)
        return self.vectors(workdir)

    def fleet(self, cache, workdir):
        self.run("fleet", workdir, cache)
        return self.vectors(workdir)

    def vectors(self, workdir):
        return [jft.TaskVector.load(workdir / name / "task_vector.safetensors") for name in self.names]

    def states(self):
        """The arguments of both sides without a cache, and with one that is full."""
        cache = self.folder / "cache"
        with tempfile.TemporaryDirectory() as workdir:
            self.run("fleet", Path(workdir) / "fleet", cache)
            self.run(self.names[0], Path(workdir) / "one", cache)
        return {"total": (None,), "warm": (cache,)}


def forget():
    """Empty every cache of what was compiled."""
    step._make.cache_clear()
    stacked._make.cache_clear()
    jax.clear_caches()
    gc.collect()


def timed(side, *args):
    with tempfile.TemporaryDirectory() as folder:
        since, used = time.perf_counter(), cpu_seconds()
        runs = side(*args, Path(folder))
        return {"seconds": time.perf_counter() - since, "cpu_seconds": cpu_seconds() - used}, runs


def cpu_seconds():
    """Of this process and of those it has started and waited for."""
    of_children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + of_children.ru_utime + of_children.ru_stime


def furthest(ours, theirs):
    """The largest difference of task vectors, over the largest change of that weight."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        for path in b.paths:
            x, y = (np.asarray(tau[path].dense(), np.float64) for tau in (a, b))
            worst = max(worst, float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-12)))
    return worst


def vectors_of(side):
    return lambda *args: [run.task_vector for run in side(*args)]


def compared(sides, states, repeats):
    """Medians over ``repeats``, in which the sides take turns at being first, and how far apart their results are."""
    times = {f"{side}_{state}": [] for side, _ in sides for state in states}
    worst = 0.0
    for n in range(repeats):
        last = {}
        for name, side in sides[:: -1 if n % 2 else 1]:
            forget()
            for state, args in states.items():
                took, last[name] = timed(side, *args)
                times[f"{name}_{state}"].append(took)
        worst = max(worst, furthest(last["fleet"], last["separate"]))
    if worst > 1e-3:
        raise AssertionError(f"a fleet and separate runs differ by {worst} of the change of a weight")
    row = {"difference": worst}
    for name, values in times.items():
        row |= {f"{name}_{k}": statistics.median(v[k] for v in values) for k in values[0]}
    for state in states:
        pairs = list(zip(times[f"fleet_{state}"], times[f"separate_{state}"], strict=True))
        row |= {f"ratio_{state}": statistics.median(f["seconds"] / s["seconds"] for f, s in pairs)}
        row |= {f"cpu_ratio_{state}": statistics.median(f["cpu_seconds"] / s["cpu_seconds"] for f, s in pairs)}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="lora,bitfit,block_sparse,lift")
    parser.add_argument("--kinds", default="tasks,sweep")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--together", type=int, default=0, help="members computed at once; 0 for what suits the device")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.together:
        stacked.TOGETHER[jax.default_backend()] = given.together
    device = jax.devices()[0]
    results = {
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "options": {k: str(v) for k, v in vars(given).items() if k != "out"},
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        config, base, found = prepared(Path(folder))
        for kind in given.kinds.split(","):
            for method in given.methods.split(","):
                if kind == "commands":
                    place = Path(folder) / f"commands_{method}"
                    place.mkdir()
                    made = Commands(base, next(iter(found.values())), method, given.members, given.steps, place)
                    sides, states = (("separate", made.separate), ("fleet", made.fleet)), made.states()
                else:
                    members = listed(config, found, method, kind, given.members)
                    args = (config, base, found, members, method, given.steps, kind)
                    sides = tuple((f.__name__, vectors_of(f)) for f in (separate, fleet))
                    states = {"total": args, "warm": args}
                row = {"kind": kind, "method": method, **compared(sides, states, given.repeats)}
                results["rows"].append(row)
                print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
                if given.out:
                    given.out.parent.mkdir(parents=True, exist_ok=True)
                    given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Meshes, sharding rules, multi-host start, and how much memory a compiled step takes."""

from jft.parallel.agreement import Disagreement, agree, environment
from jft.parallel.distributed import start
from jft.parallel.memory import MemoryBudgetError, MemoryEstimate, check, device_budget, estimate, plan, refusal
from jft.parallel.mesh import BATCH_AXES, batch_sharding, batch_shards, make_mesh, microbatches, put_batch, replicated
from jft.parallel.peers import exchange, saves
from jft.parallel.sharding import RULES, dividing, names, shardings, shards, specs
from jft.parallel.topology import topology_mesh

__all__ = [
    "BATCH_AXES",
    "RULES",
    "Disagreement",
    "MemoryBudgetError",
    "MemoryEstimate",
    "agree",
    "batch_sharding",
    "batch_shards",
    "check",
    "device_budget",
    "dividing",
    "environment",
    "estimate",
    "exchange",
    "make_mesh",
    "microbatches",
    "names",
    "plan",
    "put_batch",
    "refusal",
    "replicated",
    "saves",
    "shardings",
    "shards",
    "specs",
    "start",
    "topology_mesh",
]

"""Choosing a kernel's configuration by timing all candidates on the device that is here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jft.bench.kernels import Case, seconds
from jft.kernels import block_sddmm_gpu, blocks_tpu, tuning


def tune(cases: Sequence[Case], steps: int = 10, say: Callable[[str], None] = lambda _: None) -> Path:
    """Time every candidate of :func:`jft.kernels.blocks.block_sddmm` for each case; the fastest go into the device's table.

    Raises ``ValueError`` where there is no accelerator.
    """
    kind = tuning.device_kind()
    if kind is None:
        raise ValueError("there is no accelerator here to time kernels on: run it on a machine with a TPU or GPU")
    module: Any = blocks_tpu if jax.default_backend() == "tpu" else block_sddmm_gpu
    fastest = {}
    for case in cases:
        x, dy = (jax.ShapeDtypeStruct((case.tokens, size), case.dtype) for size in (case.inputs, case.outputs))
        refusal = module.refuses_sddmm(x, dy, case.count, case.block, "float32")
        if refusal:
            say(f"the kernel does not take {refusal}")
            continue
        times = {}
        for config in _candidates(module, x, dy, case):
            try:
                times[config] = _time(module, config, case, steps)
            except Exception as error:  # a candidate that the compiler has no room for is none
                say(f"{config}: {str(error).splitlines()[0]}")
            else:
                say(f"{config}: {1e6 * times[config]:.0f} us")
        if not times:
            say("no configuration of the kernel compiles here")
            continue
        best = min(times, key=lambda config: times[config])
        fastest[tuning.sddmm_case(x, dy, case.count, case.block)] = dataclasses.asdict(best)
    return tuning.write(kind, fastest)


def _candidates(module: Any, x: Any, dy: Any, case: Case) -> Sequence[Any]:
    if module is blocks_tpu:
        return blocks_tpu.candidates(x, dy, case.count, case.block, "float32")
    return block_sddmm_gpu.candidates(case.tokens, case.count, case.block, x.dtype)


def _time(module: Any, config: Any, case: Case, steps: int) -> float:
    def run(x: Any, dy: Any, blocks: Any) -> Any:
        return module.sddmm(x, dy, blocks[:, 0], blocks[:, 1], block=case.block, config=config)

    x, dy = (((case.tokens, size), case.dtype) for size in (case.inputs, case.outputs))
    operands = x, dy, ((case.count, 2), "int32")
    compiled = jax.jit(run).lower(*(jax.ShapeDtypeStruct(*operand) for operand in operands)).compile()
    return seconds(compiled, operands, (), case, steps)

"""Seconds by XLA's cycles: loops count with their passes, kernels by FLOPs or bytes, branches by the longest."""

import pytest

from jft.bench.cycles import Chip, seconds

MUTATIONS = (
    ("jft/bench/cycles.py", "self._passes(condition[1]) * self.cycles(body[1])", "self.cycles(body[1])"),
    ("jft/bench/cycles.py", "max((self.cycles(branch) for branch in branches), default=0)", "0.0"),
    ("jft/bench/cycles.py", "max(flops / self.chip.flops, moved", "min(flops / self.chip.flops, moved"),
    ("jft/bench/cycles.py", "* self.chip.clock", "* 1"),
)

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused.1 (p: f32[8]) -> f32[8] {
  ROOT %add = f32[8]{0} add(%p, %p), backend_config={"window_config":{"estimated_cycles":"999"}}
}

%body.2 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused.1, backend_config={"window_config":{"estimated_cycles":"100"}}
  %inner = (s32[], f32[8]) while(%t), condition=%inner_cond, body=%inner_body
  ROOT %r = (s32[], f32[8]) tuple(%i, %fusion)
}

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %copy = f32[8]{0} copy(%x), backend_config={"estimated_cycles":"10"}
}

%inner_cond (p: (s32[], f32[8])) -> pred[] {
  %c = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%compared (a: s32[], b: s32[]) -> pred[] {
  %c.1 = s32[] constant(3)
  ROOT %lt.1 = pred[] compare(%a, %c.1), direction=LT
}

%cond.2 (p: (s32[], f32[8])) -> pred[] {
  ROOT %call = pred[] fusion(%i), kind=kLoop, calls=%compared
}

%small (p: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"7"}
}

%large (p: f32[8]) -> f32[8] {
  ROOT %b = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"70"}
}

ENTRY %main.3 (p: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%t), condition=%cond.2, body=%body.2
  %choice = f32[8]{0} conditional(%q, %p, %p), branch_computations={%small, %large}, metadata={op_name="x"}
  %kernel = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"4000","bytes_accessed":"30"}}
  %moving = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"0","bytes_accessed":"300"}}
  ROOT %call.1 = f32[8]{0} call(%p), to_apply=%small
}
"""  # noqa: E501


def test_a_program_lasts_as_long_as_its_parts():
    # 10 FLOPs and 2 bytes a cycle.
    chip = Chip(clock=1e3, flops=1e4, bandwidth=2e3)
    loops = 3 * (100 + 5 * 10)
    assert seconds(PROGRAM, chip) == pytest.approx((loops + 70 + 400 + 150 + 7) / 1e3)

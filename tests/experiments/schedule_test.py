# ruff: noqa: E501  (a program as the compiler prints it)
from experiments.benchmarks import schedule

HLO = """HloModule example

%sliced (param_0: f32[8,64], param_1: s32[]) -> f32[1,64] {
  %param_0 = f32[8,64]{1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %part = f32[1,64]{1,0:T(8,128)} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,64}
}

%body (arg: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %arg = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = f32[8,64]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %row = f32[1,64]{1,0:T(8,128)S(1)} fusion(%x, %i), kind=kLoop, calls=%sliced, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %next = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}) tuple(%i, %x)
}

%condition (arg.1: (s32[], f32[8,64])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (q: f32[8,64]) -> bf16[8,64] {
  %q = f32[8,64]{1,0:T(8,128)} parameter(0)
  %start = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}) tuple(%start, %q)
  %loop = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}) while(%init), condition=%condition, body=%body
  %last = f32[8,64]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  ROOT %gate_forward.1 = bf16[8,64]{1,0:T(8,128)(2,1)} custom-call(%last), custom_call_target="tpu_custom_call"
}
"""


def test_a_loop_counts_as_often_as_it_turns():
  found = schedule.read_program(HLO)
  assert found.cycles == 5 * 100
  # 64 floats a turn (the result is in VMEM; the index is a scalar), and the
  # kernel's argument and result.
  assert found.traffic == 5 * (64 * 4 + 4) + 8 * 64 * (4 + 2)
  assert found.launches == 6
  assert found.kernels == ('gate_forward.1',)


def test_a_kernel_is_read_from_its_dump(tmp_path):
  stem = f'{tmp_path}/17-gate_forward.1'
  with open(f'{stem}-70-final_hlo-static-per-bundle-utilization.txt', 'w') as f:
    f.write(
      '== CAPACTIY:\nMXU, VALU, VSTORE:SPILL\n  4  2  1\n== UTILIZATION:\n'
      '1 2 0\n3 0 1\n'
    )
  name = 'schedule-analysis_packed-bundles-post-ra'
  with open(f'{stem}-60-{name}.txt', 'w') as f:
    f.write('total scheduled bundles:    4\n')
  found = schedule.read_kernel(str(tmp_path), 'gate_forward')
  assert found.cycles == 4 and found.spills == 1
  assert found.busy['MXU'] == 4 / 4 / 4 and found.busy['VALU'] == 2 / 4 / 2

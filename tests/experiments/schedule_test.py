# ruff: noqa: E501  (a program as the compiler prints it)
from experiments.benchmarks import schedule

HLO = """HloModule example

FileNames
1 "/a/efficient_attn/layers/ffn.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=31 end_line=32 column=9 end_column=3}

StackFrames
5 {file_location_id=1 parent_frame_id=5}

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
  %row = f32[1,64]{1,0:T(8,128)S(1)} fusion(%x, %i), kind=kLoop, calls=%sliced, metadata={op_name="jit(f)/transpose(jvp())/row" stack_frame_id=5}, backend_config={"window_config":{"estimated_cycles":"100"}}
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


def names(costs):
  return [(cost.operation.name, cost.times) for cost in costs]


def test_a_loop_counts_as_often_as_it_turns():
  found = schedule.read_program(HLO)
  assert found.cycles == 5 * 100
  # 64 floats a turn (the result is in VMEM; the index is a scalar). What the
  # kernel moves is told by its grid.
  assert found.traffic == 5 * (64 * 4 + 4)
  assert found.launches == 6
  assert names(found.kernels) == [('gate_forward.1', 1)]
  (cost,) = found.costs
  assert (cost.operation.name, cost.times) == ('row', 5)
  assert cost.operation.source == 'layers/ffn.py:31 row (backward)'


def test_the_turns_that_the_compiler_knows_are_taken():
  known = 'backend_config={"known_trip_count":{"n":"7"}}'
  text = HLO.replace('body=%body', f'body=%body, {known}')
  assert schedule.read_program(text).cycles == 7 * 100


def test_kernels_in_loops_and_calls_count_as_often_as_they_run():
  text = HLO.replace(
    '  ROOT %next',
    '  %k.2 = f32[8,64]{1,0} custom-call(%x), '
    'custom_call_target="tpu_custom_call"\n  ROOT %next',
  ).replace(
    '  ROOT %gate_forward.1',
    '  %c = f32[8,64]{1,0} call(%last), to_apply=%sliced\n'
    '  ROOT %gate_forward.1',
  )
  found = schedule.read_program(text)
  assert names(found.kernels) == [('k.2', 5), ('gate_forward.1', 1)]
  assert [cost.operation.name for cost in found.costs] == ['row', 'part']

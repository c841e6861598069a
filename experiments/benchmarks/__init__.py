"""Benchmarks; `SUITES` maps a name to the module that measures it."""

# Each module has measure(rounds) -> {name: figure}; those of `STATIC`, which
# compile for TPUs that are not there, ROWS and measure(topology, rows), whose
# figures are named row/..., and write_report(folder).
SUITES = {
  'trainer': 'experiments.benchmarks.trainer',
  'grid': 'experiments.benchmarks.grid',
  'attention': 'experiments.benchmarks.attention',
  'accuracy': 'experiments.benchmarks.accuracy',
  'linear': 'experiments.benchmarks.linear',
  'sparse': 'experiments.benchmarks.sparse',
  'training': 'experiments.benchmarks.training',
  'resume': 'experiments.benchmarks.resume',
  'static': 'experiments.benchmarks.static',
  'static_step': 'experiments.benchmarks.static_step',
}
STATIC = ('static', 'static_step')

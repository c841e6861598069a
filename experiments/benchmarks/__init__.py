"""Benchmarks; `SUITES` maps a name to the module that measures it."""

# Each module has measure(rounds) -> {name: figure}.
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
}

"""Rates count the steps that were taken while the clock ran."""

import types

import pytest

from efficient_attn import config as configs
from efficient_attn import sharding
from efficient_attn.train import meter


def test_a_step_that_was_waited_for_before_does_not_count(monkeypatch):
  now = [0.0]
  clock = types.SimpleNamespace(perf_counter=lambda: now[0])
  monkeypatch.setattr(meter, 'time', clock)
  monkeypatch.setattr(meter, 'matmul_ceiling', lambda *_: 1e3)
  config = configs.resolve({'model': {'name': 'lm', 'dtype': 'float32'}})
  found = meter.Meter(config, 100.0, sharding.make_mesh())
  found.start(0)
  now[0] = 60.0
  # Step 1 is reported while step 2 runs; both are done after this.
  found.compiled(2, {})
  assert found.compile_seconds == 60
  assert set(found.rates(2, read=8)) == {'memory_gib'}
  now[0] += 4
  with found.paused():
    now[0] += 100
  rates = found.rates(4, read=8)
  assert rates['step_seconds'] == 2 and rates['tokens_per_second'] == 4
  assert rates['mfu'] == pytest.approx(300 / 2 / 1e3)

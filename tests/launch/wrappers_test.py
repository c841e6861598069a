"""The wrappers of launch/, run with stand-ins for the programs of a cluster."""

import argparse
import math
import os
import pathlib
import subprocess
import types

import pytest
import yaml

from efficient_attn import cli, config

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = [
  *ROOT.glob('launch/*.sh'),
  ROOT / 'launch/slurm.sbatch',
  ROOT / '.ci/run',
]
STAND_INS = {
  'python': 'printf "%s\\n" "$@" > "$SAID/train"; env > "$SAID/env"',
  'srun': 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
  'scancel': 'echo "$@" > "$SAID/scancel"',
  'scontrol': 'echo "$@" > "$SAID/scontrol"',
  'git': ':',
  'tar': ':',
  'gcloud': 'echo "$*" >> "$SAID/gcloud"; cd "$SAID"; for last; do :; done\n'
  '[[ $4 != ssh ]] || bash -c "${last#--command=}"',
}


@pytest.fixture
def cluster(tmp_path):
  """Returns (working folder, environment) in which nothing real is called."""
  programs, checkout = tmp_path / 'bin', tmp_path / 'efficient_attn'
  for folder in (programs, checkout / 'launch'):
    folder.mkdir(parents=True)
  (checkout / 'launch/setup.sh').write_text(
    'set -euo pipefail\n'
    'echo "$EXTRAS ${INSTALL:-} ${PYTHON:-}" > "$SAID/setup"\n'
  )
  for name, body in STAND_INS.items():
    (programs / name).write_text(f'#!/usr/bin/env bash\n{body}\n')
    (programs / name).chmod(0o755)
  environment = dict(
    PATH=f'{programs}:{os.environ["PATH"]}',
    SAID=str(tmp_path),
    SLURM_SUBMIT_DIR=str(checkout),
    SLURM_JOB_ID='7',
    SLURM_CPUS_PER_TASK='8',
    TPU='slice',
    ZONE='here',
    WORKDIR='runs/a b',
  )
  return tmp_path, environment


def run(command, cluster):
  folder, environment = cluster
  subprocess.run(
    command, cwd=folder, env=environment, check=True, timeout=30, text=True
  )


def check_train(folder, workdir, **changes):
  """Checks that the command that was run is a run that can start."""
  script, *flags = (folder / 'train').read_text().splitlines()
  assert (ROOT / script).is_file()
  flags = [f.replace('=configs/', f'={ROOT}/configs/') for f in flags]
  parser = argparse.ArgumentParser()
  parser.add_argument('--workdir', required=True)
  resolved, args = cli.parse_config(parser, flags)
  assert args.workdir == workdir
  assert vars(resolved) | changes == vars(resolved)
  environment = (folder / 'env').read_text().splitlines()
  assert 'JAX_COORDINATOR_ADDRESS=auto' in environment


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(script):
  subprocess.run(['bash', '-n', script], check=True)


def test_slurm_trains(cluster):
  run(['bash', ROOT / 'launch/slurm.sbatch', '--config.steps=3'], cluster)
  check_train(cluster[0], 'runs/a b', steps=3)
  assert not (cluster[0] / 'scontrol').exists()
  assert (cluster[0] / 'setup').read_text() == 'cuda no \n'


def test_slurm_fails_when_training_fails(cluster):
  (cluster[0] / 'bin/python').write_text('#!/usr/bin/env bash\nexit 3\n')
  with pytest.raises(subprocess.CalledProcessError) as error:
    run(['bash', ROOT / 'launch/slurm.sbatch'], cluster)
  assert error.value.returncode == 3
  assert not (cluster[0] / 'scontrol').exists()


def test_slurm_queues_again_when_stopped(cluster):
  # The run warns its job (as SLURM would) and ends when its steps are told to.
  (cluster[0] / 'bin/python').write_text(
    '#!/usr/bin/env bash\nkill -TERM $PPID\n'
    'until [ -e "$SAID/scancel" ]; do sleep 0.02; done\n'
  )
  run(['bash', ROOT / 'launch/slurm.sbatch'], cluster)
  assert (cluster[0] / 'scancel').read_text() == '--signal=TERM 7\n'
  assert (cluster[0] / 'scontrol').read_text() == 'requeue 7\n'


def test_tpu_vm_trains_on_every_host(cluster):
  run(['bash', ROOT / 'launch/tpu_vm.sh', '--config.steps=3'], cluster)
  check_train(cluster[0], 'runs/a b', steps=3)
  calls = (cluster[0] / 'gcloud').read_text()
  assert calls.count('--zone=here --worker=all') == 2
  assert calls.count('slice') == 2


def test_tpu_vm_quotes_what_the_hosts_read(cluster):
  python, path = '/opt/my python/bin/python3', """/a b/it's "$HOME"*.txt"""
  cluster[1]['PYTHON'] = python
  run(
    ['bash', ROOT / 'launch/tpu_vm.sh', f'--config.data.path={path}'], cluster
  )
  assert (cluster[0] / 'setup').read_text() == f'tpu  {python}\n'
  flags = (cluster[0] / 'train').read_text().splitlines()
  assert f'--config.data.path={path}' in flags


def test_gke_jobset_trains_on_every_host(cluster):
  jobset = yaml.safe_load((ROOT / 'launch/gke_jobset.yaml').read_text())
  assert jobset['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  assert jobset['kind'] == 'JobSet'
  (job,) = jobset['spec']['replicatedJobs']
  spec = job['template']['spec']
  assert spec['parallelism'] == spec['completions']
  pod = spec['template']['spec']
  (container,) = pod['containers']
  topology = pod['nodeSelector']['cloud.google.com/gke-tpu-topology']
  chips = container['resources']['limits']['google.com/tpu']
  hosts = spec['parallelism']
  assert hosts * chips == math.prod(map(int, topology.split('x')))
  mounts = {mount['name'] for mount in container['volumeMounts']}
  assert mounts == {volume['name'] for volume in pod['volumes']}
  for variable in container['env']:
    cluster[1][variable['name']] = variable['value']
  run(container['command'] + container['args'], cluster)
  check_train(cluster[0], '/runs/quickstart')


def test_gke_host_that_has_to_go_saves_and_fails(cluster):
  jobset = yaml.safe_load((ROOT / 'launch/gke_jobset.yaml').read_text())
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  container = job['template']['spec']['containers'][0]
  (cluster[0] / 'bin/python').write_text(
    '#!/usr/bin/env bash\ntrap \'touch "$SAID/saved"; exit 0\' TERM\n'
    'kill -TERM $PPID\nwhile :; do sleep 0.02; done\n'
  )
  with pytest.raises(subprocess.CalledProcessError) as error:
    run(container['command'] + container['args'], cluster)
  assert error.value.returncode == 1
  assert (cluster[0] / 'saved').exists()


@pytest.mark.parametrize(
  'environment,arguments',
  [
    ({}, None),
    ({'JAX_COORDINATOR_ADDRESS': 'auto'}, ()),
    (
      {
        'JAX_COORDINATOR_ADDRESS': 'host:1',
        'JAX_NUM_PROCESSES': '2',
        'JAX_PROCESS_ID': '1',
      },
      ('host:1', 2, 1),
    ),
  ],
)
def test_processes_find_each_other(monkeypatch, environment, arguments):
  calls = []

  def initialize(*args):
    # JAX itself would take `auto` for an address.
    assert os.environ.get('JAX_COORDINATOR_ADDRESS') != 'auto'
    calls.append(args)

  fake = types.SimpleNamespace(
    config=types.SimpleNamespace(update=lambda *_: None),
    distributed=types.SimpleNamespace(initialize=initialize),
  )
  monkeypatch.setattr(cli, 'jax', fake)
  for name in ('JAX_COORDINATOR_ADDRESS', 'PJRT_NPROC'):
    monkeypatch.setenv(name, '')  # restored afterwards
    monkeypatch.delenv(name)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  cli.start_devices(config.resolve({'model': {'name': 'lm'}}))
  assert calls == ([] if arguments is None else [arguments])

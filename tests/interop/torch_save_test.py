"""Files that PyTorch itself writes."""

import collections

import numpy as np
import pytest

pytest.importorskip('torch')

import torch

from efficient_attn.config import ConfigError
from efficient_attn.interop.torch_file import open_torch_file


@pytest.mark.parametrize(
  'dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16]
)
def test_a_state_dict(dtype, tmp_path):
  model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3))
  state = model.to(dtype).state_dict()
  torch.save(state, tmp_path / 'x.bin')
  found = open_torch_file(tmp_path / 'x.bin')
  assert found.keys() == state.keys()
  for name, value in state.items():
    assert str(found[name].dtype) == str(dtype).removeprefix('torch.')
    np.testing.assert_array_equal(
      found[name].map().astype(np.float64), value.double().numpy()
    )


def test_views_parameters_and_what_is_no_tensor(tmp_path):
  base = torch.arange(24.0).reshape(4, 6)
  tensors = dict(a=base[1:, ::2].T, b=torch.nn.Parameter(base[0]), c=base[2, 3])
  tree = dict(
    model=collections.OrderedDict(tensors), step=5, rates=[0.1, 2], big=2**40
  )
  torch.save(tree, tmp_path / 'x.pth')
  found = open_torch_file(tmp_path / 'x.pth')
  assert found.keys() == {f'model.{name}' for name in tensors}
  for name, value in tensors.items():
    np.testing.assert_array_equal(
      found[f'model.{name}'].map(), value.detach().numpy(), strict=True
    )


def test_the_format_before_zip_is_refused(tmp_path):
  file = tmp_path / 'x.bin'
  torch.save({'a': torch.ones(3)}, file, _use_new_zipfile_serialization=False)
  with pytest.raises(ConfigError, match=r'PyTorch 1\.6'):
    open_torch_file(file)


def test_an_object_is_refused(tmp_path):
  torch.save({'a': torch.nn.Linear(2, 2)}, tmp_path / 'x.bin')
  with pytest.raises(ConfigError, match='asks for torch.nn'):
    open_torch_file(tmp_path / 'x.bin')

"""Small recurrent and hybrid models, as `published` has them."""

from tests.interop.published import V

MAMBA = dict(
  vocab_size=V,
  hidden_size=32,
  state_size=8,
  num_hidden_layers=3,
  layer_norm_epsilon=1e-3,
  bos_token_id=None,
  eos_token_id=None,
  pad_token_id=None,
)
MAMBA2 = MAMBA | dict(num_heads=8, head_dim=8, n_groups=1, chunk_size=8)

RWKV = dict(
  vocab_size=V,
  hidden_size=32,
  num_hidden_layers=3,
  rescale_every=0,
  bos_token_id=None,
  eos_token_id=None,
)


# Name of a case, which begins with its model_type -> words of its config.
CASES = {
  'mamba': MAMBA,
  'mamba-biases': MAMBA
  | dict(
    use_bias=True,
    use_conv_bias=False,
    time_step_rank=3,
    expand=3,
    tie_word_embeddings=False,
  ),
  'falcon_mamba': MAMBA | dict(mixer_rms_eps=1e-2),
  'mamba2': MAMBA2,
  'mamba2-groups': MAMBA2
  | dict(n_groups=2, use_bias=True, tie_word_embeddings=True),
  'rwkv': RWKV,
  'rwkv-wide': RWKV | dict(intermediate_size=40, tie_word_embeddings=True),
}
# Theirs let padding reach tokens: by biases, or by the states of recurrences.
LEAKING = (
  'mamba-biases',
  'mamba2-groups',
  'rwkv',
  'rwkv-wide',
)

# Their cache is wrong for several rows.
UNCACHED = ('rwkv', 'rwkv-wide')

"""Equations that surveys print wrong: as printed, corrected, and by error."""

import dataclasses
import functools
from collections.abc import Callable

from experiments.survey import errata_linear as linear
from experiments.survey import errata_other as other


@dataclasses.dataclass(frozen=True)
class Misprint:
  """A row of `MISPRINTS`.

  Attributes:
    source: where it is printed.
    says: what the printed equation does.
    printed: its part that is wrong.
    corrected: that part corrected.
    errors: () -> of the printed form, of the corrected one and of our op.
    tolerance: of the last two: what rounding alone may do.
  """

  source: str
  says: str
  printed: str
  corrected: str
  errors: Callable[[], tuple]
  tolerance: float = 1e-12


# [i] is chunk i of C tokens; A and B are the products of the gates a and b from
# the beginning of a chunk to each of its tokens.
MISPRINTS = {
  'E1': Misprint(
    'AS p. 34 and 57, eq. 57d',
    'A chunk reads the state through the value gates of the chunk before',
    '(Q A)[i+1] S[i] * B[i]',
    '(Q A)[i+1] S[i] * B[i+1]',
    functools.partial(linear.chunks, 'E1'),
  ),
  'E2': Misprint(
    'AS p. 57, eq. 108',
    'What a chunk writes decays from the token before on',
    'j = 0 .. C - 1',
    'j = 1 .. C',
    functools.partial(linear.chunks, 'E2'),
  ),
  'E3': Misprint(
    'AS p. 34 and 57, eq. 57a, 110, 111',
    'A chunk adds to the state of two chunks ago',
    'S[i+1] = zeta S[i-1] + K^T V',
    'S[i+1] = zeta S[i] + K^T V',
    functools.partial(linear.chunks, 'E3'),
  ),
  'E4': Misprint(
    'AS p. 56, eq. 103',
    'A key is multiplied with the gates and the keys of all later tokens',
    'prod_n a_n c_n k_n',
    '(prod_{n>m} a_n) c_m k_m',
    functools.partial(linear.chunks, 'E4'),
  ),
  'E5': Misprint(
    'AS p. 37, eq. 69',
    'RetNet reads the state with the queries of the chunk before',
    'O[i+1] = Q[i] S[i-1] * xi',
    'O[i+1] = Q[i+1] S[i] * xi',
    linear.retention,
  ),
  'E6': Misprint(
    'AS p. 38, eq. 75',
    'The first pass of GSA decays along channels, the second along values',
    '(alpha^T 1) * H1, (1^T alpha) * H2',
    '(1^T alpha) * H1, (alpha^T 1) * H2',
    linear.slots,
  ),
  'E7': Misprint(
    'AS eq. 46, Tables 6 and 7',
    'The transition of DeltaNet and RWKV-7 multiplies entry by entry',
    'G * S',
    'G S, a product of matrices',
    linear.transition,
  ),
  'E8': Misprint(
    'AS eq. 24, 26, 30 and 33',
    'Kv heads are repeated as K (x) 1',
    'K (x) 1',
    '1 (x) K for each kv head',
    other.kv_heads,
  ),
  'E10': Misprint(
    'FL p. 25, eq. 34',
    'Random features of exp(x . y) have the exponent w . x |x|^2 / 2',
    'exp(w . x |x|^2 / 2)',
    'exp(w . x - |x|^2 / 2)',
    other.random_features,
  ),
  'E11': Misprint(
    'FL p. 11, eq. 10-11',
    'N bits hold the codes round(W / s + z)',
    'round(W / s + z)',
    'round(W / s - z)',
    other.quantisation,
    tolerance=3e-3,  # half a step
  ),
  'E12': Misprint(
    'FL p. 23, eq. 26',
    'The factors of a Synthesizer meet in a product of matrices',
    'H_A(A) H_B(B)^T',
    'H_A(A) * H_B(B)',
    other.factors,
  ),
  'E13': Misprint(
    'FL p. 18',
    'The farthest key of LogSparse has the index -2^floor(log2 i)',
    '-2^floor(log2 i)',
    'i - 2^floor(log2 i)',
    other.log_sparse,
  ),
  'E14': Misprint(
    'AS eq. 92',
    'Fast weights descend without a learning rate',
    'S - g',
    'S - eta g',
    other.learning_rate,
  ),
  'E14, index': Misprint(
    'AS eq. 93',
    'The gradient of a mini-batch is a sum over i of terms of token t',
    'sum_i grad L(f(k_t), v_t)',
    'sum_i grad L(f(k_i), v_i)',
    other.index_of_the_sum,
  ),
  'E15': Misprint(
    'AS p. 40',
    'The transition of RWKV-7 stands left of the value x key state',
    'G S + v^T k',
    'S G + v^T k',
    linear.side,
  ),
  'E16': Misprint(
    'AS p. 18, eq. 32',
    'MFA makes its query with W^down twice',
    'x W^down W^down',
    'x W^down W^up',
    other.query_of_mfa,
  ),
  'E17': Misprint(
    'AS section 5, text',
    'Weights of keys have h d rows',
    'W_K: h d x d',
    'W_K: D_m x d',
    other.width_of_keys,
  ),
  'E18': Misprint(
    'AS p. 31, Table 1',
    'The state that a token reads ends with the token before',
    'sum_{i <= t - 1} k_i^T v_i',
    'sum_{i <= t} k_i^T v_i',
    linear.own_token,
  ),
  'E19': Misprint(
    'AS eq. 43 and 47, against 48',
    'Sums without a denominator are the normalised method',
    'q S',
    'q S / q z',
    linear.normalisation,
  ),
  'E20': Misprint(
    'AS Fig. 3',
    'The mask inside a chunk is d x d',
    'd x d',
    'C x C',
    linear.mask_of_a_chunk,
  ),
  'E25': Misprint(
    'AS p. 38, eq. 56',
    'Products of gates over all tokens are multiplied and divided by',
    'prod a, 1 / prod a, in float32',
    'exp(sum of log a over the span)',
    linear.products_of_gates,
    tolerance=1e-4,
  ),
}

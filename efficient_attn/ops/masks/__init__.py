"""Mask expressions: which keys a query may attend to.

A mask is an expression, not an array. One expression serves the dense
reference (`dense`), the blockwise loop and the kernels (`tile`, `block_map`,
`maybe`), so a tile that admits nothing is never visited.

    causal = masks.Causal()
    packed = masks.packed(causal, segment_ids)
    local = masks.Window(128, 0) | masks.Prefix(4)

With `q` a query and `k` a key index, both counted from 0 whatever T and S:

    Causal(offset)               k <= q + offset
    Window(left, right, offset)  -left <= k - (q + offset) <= right
    Dilated(left, right, dilation)  every dilation-th key of a window
    Strided(stride)              |k - q| < stride, or stride divides k - q
    LogSparse(local)             |k - q| in {0, 1, 2, 4, 8, ...} or <= local
    Fixed(stride, summary)       the query's block, the end of every other
    BlockWindow(block_size, left, right)  a window of whole blocks
    Prefix(length)               k < length
    Leading(length)              q < length
    Global(positions)            q or k is among the positions
    Neighborhood(grid, window)   the nearest cells of a 1-D, 2-D or 3-D grid
    Radial(frame_size, num_frames)  ever less of ever more distant frames
    RandomBlocks(length, ...)    random blocks of keys for each of queries
    Segments(query_ids, key_ids) query_ids[q] == key_ids[k], or of one array
    Blocks(layout, block_q, block_k)  layout[..., q // block_q, k // block_k]
    HeadWindow(left, right)      a window of its own for every head
    ElasticWindow(alpha, beta)  one that grows with the query's position
    Heads(flags)                 everything for some heads, nothing for others
    Dense(array)                 array[..., q, k]
    At(rule, query_positions, key_positions)  rule at positions, not indices

and `&`, `|`, `~` combine them, as in `streaming`. An offset that is a Python
int is static: the block map sees through it, as through numpy arrays. An int
array, scalar or [B], is traced (decoding with a cache) and its empty tiles are
skipped at run time.

A new mask is one more dataclass: of a rule on the distance (`Distance.admits`),
on two positions (`Rule.pairs`), or on arrays, which `axes` names the axes of
and which come cut to a tile (`Mask.in_tile`).
"""

from efficient_attn.ops.masks.algebra import (
  EMPTY,
  FULL,
  PARTIAL,
  And,
  Mask,
  Not,
  Or,
)
from efficient_attn.ops.masks.arrays import (
  At,
  Blocks,
  Dense,
  ElasticWindow,
  Heads,
  HeadWindow,
  Segments,
  broadcast_dense,
  packed,
)
from efficient_attn.ops.masks.distance import (
  Causal,
  Dilated,
  Distance,
  LogSparse,
  Offset,
  Strided,
  Window,
)
from efficient_attn.ops.masks.expression import (
  cut,
  cut_array,
  expression,
  letters,
  with_axes,
)
from efficient_attn.ops.masks.layouts import (
  RandomBlocks,
  cascade,
  random_blocks,
  shifted_blocks,
  streaming,
)
from efficient_attn.ops.masks.rules import (
  BlockWindow,
  Fixed,
  Global,
  Leading,
  Neighborhood,
  Prefix,
  Radial,
  Rule,
)

__all__ = [
  'EMPTY',
  'FULL',
  'PARTIAL',
  'And',
  'At',
  'BlockWindow',
  'Blocks',
  'Causal',
  'Dense',
  'Dilated',
  'Distance',
  'ElasticWindow',
  'Fixed',
  'Global',
  'HeadWindow',
  'Heads',
  'Leading',
  'LogSparse',
  'Mask',
  'Neighborhood',
  'Not',
  'Offset',
  'Or',
  'Prefix',
  'Radial',
  'RandomBlocks',
  'Rule',
  'Segments',
  'Strided',
  'Window',
  'broadcast_dense',
  'cascade',
  'cut',
  'cut_array',
  'expression',
  'letters',
  'packed',
  'random_blocks',
  'shifted_blocks',
  'streaming',
  'with_axes',
]

"""All layers over a cache in one compiled call (`layers.c`): reading without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoulders.lm.beside import Beside
from shoulders.lm.kernels import Kernels, queries_together
from shoulders.lm.laid import Laid
from shoulders.lm.layer import Layer, Matrix, Rows, Sizes
from shoulders.lm.tiles import PANEL, WITHIN
from shoulders.lm.updates import Placed

_LINE = 64  # bytes: pieces of the room begin at multiples of it
_ALIKE = 4  # positions with the same updates that are computed together: MOST of products.c


class Layers:
    """The layers of an LM, packed for tiles: int8, or bfloat16 with float32 norms and biases."""

    def __init__(self, kernels: Kernels, layers: Sequence[Layer], laid: Laid) -> None:
        self._kernels, self._layers, self._laid = kernels, layers, laid
        self._halves = layers[0].qkv.scale is None
        # Their addresses are handed on: `_laid` and `_layers` hold what lies there.
        self._table = torch.tensor([_addresses(layer, laid) for layer in layers])

    def read(
        self,
        x: Tensor,
        values: Tensor,
        rows: Rows,
        places: Tensor,
        sizes: Sizes,
        updates: Placed | None = None,
    ) -> Tensor:
        """Return the last layer's output `[t, d]` of states `x [t, d]`.

        Args:
            x: float32; not changed.
            values: the cache's, `[layers, 2, slots, room, kv_heads, head_dim]` float32; what is
                read is written there.
            rows: where they lie, with `seen` and `slot`.
            places: `[t]`, where in their slot positions are kept.
            sizes: of a layer.
            updates: of the positions' states between layers.
        """
        assert rows.seen is not None
        assert rows.slot is not None
        x = x.clone(memory_format=torch.contiguous_format)
        lengths = rows.length
        own = rows.slot.repeat_interleave(lengths) * values.shape[3] + places
        f = self._layers[0].down.values.shape[1]
        h, g, e = sizes.heads, sizes.kv_heads, sizes.width
        (t, d), most = x.shape, self._kernels.most_seen(rows)
        widest, beside = max(d, f, h * e), Beside.of(updates)
        written = max(d, 2 * f, (h + 2 * g) * e)
        gates = 4 if self._kernels.tiles is not None else 8  # bytes of two, as in layers.c
        parts = (
            *(t * widest * 2, t * 4, widest * 4, t * (h + 2 * g) * e * 4, t * h * e * 4),
            *(
                t * d * 4,
                t * gates * f,
                most * (3 * e + queries_together(h // g)) * 4,
                PANEL * widest * 2 + WITHIN,
            ),
            _ALIKE * (widest + written + beside.rank) * 4,
        )
        room = torch.empty(sum(-(-part // _LINE) * _LINE for part in parts), dtype=torch.int8)
        self._kernels.read_layers(
            *(self._table, self._halves, x, values, own, rows, beside, sizes.epsilon, room, most),
            *(t, len(lengths), values.shape[3], d, f, h, g, e),
        )
        return x


def _addresses(layer: Layer, laid: Laid) -> list[int]:
    """Return a layer's addresses in the order of `layer_t`; 0 for what is not there."""

    def of(matrix: Matrix) -> list[int]:
        rest = (matrix.scale, matrix.bias, matrix.reads, matrix.writes)
        return [
            laid.forward(matrix.values).data_ptr(),
            *(0 if r is None else r.data_ptr() for r in rest),
        ]

    matrices = (layer.qkv, layer.output, layer.gate_up, layer.down)
    norms = [layer.attention_norm.data_ptr(), layer.feed_norm.data_ptr()]
    return norms + [address for matrix in matrices for address in of(matrix)]

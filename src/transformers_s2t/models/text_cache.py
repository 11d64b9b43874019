"""Keys and values of texts that a frozen model would read again in every epoch, kept in CPU memory.

Legend: B rows, T columns, P tokens that all rows of a batch begin with.
"""

from __future__ import annotations

import torch
from transformers import Cache, DynamicCache


class TextCache:
    """Keys and values of whole texts, as read by a model that does not change.

    Args:
        max_bytes: most bytes of all keys and values together. Texts that do not fit are read again each time.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        # ids of a text -> how many of them are shared, and keys and values of each layer for the others
        self._own: dict[tuple[int, ...], tuple[int, list[tuple[torch.Tensor, torch.Tensor]]]] = {}
        self._shared: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def read(self, input_ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> DynamicCache | None:
        """A cache of right-padded rows; `None` where one of them is not kept."""
        rows = _texts(input_ids_BT, mask_BT)
        if any(row not in self._own for row in rows):
            return None
        cache, width = DynamicCache(), input_ids_BT.shape[1]
        for layer in range(len(self._own[rows[0]][1])):
            states_2BHTD: list[list[torch.Tensor]] = [[], []]
            for row in rows:
                length, own = self._own[row]
                for which in (0, 1):
                    parts = [self._shared[row[:length]][layer][which]] if length else []
                    states_HTD = torch.cat([*parts, own[layer][which]], dim=-2)
                    padding = (0, 0, 0, width - states_HTD.shape[-2])
                    states_2BHTD[which].append(torch.nn.functional.pad(states_HTD, padding))
            keys, values = (torch.stack(states).to(input_ids_BT.device) for states in states_2BHTD)
            cache.update(keys, values, layer)
        return cache

    def keep(self, input_ids_BT: torch.Tensor, mask_BT: torch.Tensor, cache: Cache, num_shared: int) -> None:
        """Keeps the keys and values of right-padded rows, as far as there is room.

        Args:
            input_ids_BT, mask_BT: the rows.
            cache: cache of all their columns.
            num_shared: P, the number of first tokens that are the same in all rows. They are kept once.
        """
        for b, row in enumerate(_texts(input_ids_BT, mask_BT)):
            if row in self._own:
                continue
            begin, shared = row[:num_shared], []
            if num_shared and begin not in self._shared:
                shared = [_piece(layer, b, slice(0, num_shared)) for layer in cache.layers]
            own = [_piece(layer, b, slice(num_shared, len(row))) for layer in cache.layers]
            num_bytes = sum(states.nbytes for pair in [*shared, *own] for states in pair)
            if self.num_bytes + num_bytes > self.max_bytes:
                return
            self.num_bytes += num_bytes
            self._own[row] = (num_shared, own)
            if shared:
                self._shared[begin] = shared


def _texts(input_ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(ids_T[mask_T.bool()].tolist()) for ids_T, mask_T in zip(input_ids_BT, mask_BT)]


def _piece(layer, row: int, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (states[row, :, columns].detach().to("cpu", copy=True) for states in (layer.keys, layer.values))
    return keys, values

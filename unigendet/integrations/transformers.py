"""Our attention as an attention implementation of transformers, by the name ``"symbiotic"``.

``register()`` makes the name known; a model built with ``attn_implementation="symbiotic"`` then calls
:func:`unigendet.ops.symbiotic_attention`. transformers asks for a mask once per forward pass and hands whatever it gets
to every layer, untouched. What it gets here is a :class:`Mask`, which makes the pass's ``Layout`` when the first layer
reads it and keeps it for the others.

With B rows of a batch, Q queries and K keys each, all rows are one pack, key rows end to end:

* a row without padding is one causal sample, of which the tokens that a cache holds are keys only;
* padding, wherever it is in a row, is a ``noise`` split: no other token sees it, and it has something to see;
* packed sequences (positions that start anew, or ``cu_seq_lens_q``) are a sample each;
* key rows beyond a row's tokens, which static caches have, are spare rows that nobody sees;
* a ``layout`` that the caller passes to the model takes the place of all this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from unigendet.layout import Layout
from unigendet.ops import symbiotic_attention
from unigendet.ops._arguments import autocast

NAME = "symbiotic"

# What models hand to their attention and it may pass over: it says nothing about the weights of keys.
_IRRELEVANT = frozenset(
    (
        "cache_position",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    )
)


def register(*, backend: str = "auto") -> None:
    """Make ``attn_implementation="symbiotic"`` known to transformers; again, to choose another backend.

    Args:
        backend: of every call, as in :func:`unigendet.ops.symbiotic_attention`.
    """
    AttentionInterface.register(NAME, partial(_attention, backend=backend))
    AttentionMaskInterface.register(NAME, _mask)


class Mask:
    """The mask of one forward pass: B rows of ``queries`` tokens, before which a cache holds ``cached`` tokens.

    Args:
        rows: B.
        queries: Q.
        keys: K, at least ``cached + queries``.
        cached: tokens of each row that are keys only.
        padding: None, or [B, tokens], nonzero for real tokens; where it ends before the tokens do, padding follows.
        mask_function: what transformers makes masks with; it is looked at when the layout is made, and must be causal,
            or causal in each of several packed sequences.
        device: of the layout.
    """

    def __init__(
        self,
        rows: int,
        queries: int,
        keys: int,
        cached: int,
        padding: Tensor | None,
        mask_function: Callable[..., Any],
        device: torch.device,
    ) -> None:
        self.rows, self.queries, self.keys, self.cached = rows, queries, keys, cached
        self.padding, self.mask_function, self.device = padding, mask_function, device
        self._layouts: dict[int, tuple[Any, Layout]] = {}

    @torch.compiler.disable
    def layout(self, cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None) -> Layout:
        """The layout of the pass. Both lists, int [S + 1], are the bounds of packed sequences, whatever positions say.

        It is made once: layers that ask with the same list get the same layout.
        """
        if id(cu_seq_lens_q) not in self._layouts:
            if cu_seq_lens_k is not None and not torch.equal(cu_seq_lens_q, cu_seq_lens_k):
                raise ValueError(
                    f"cu_seq_lens_k is {cu_seq_lens_k.tolist()}; it must be cu_seq_lens_q, {cu_seq_lens_q.tolist()}: "
                    "the keys of packed sequences are their own tokens"
                )
            # The list is kept, so that no other object can get its id.
            self._layouts[id(cu_seq_lens_q)] = cu_seq_lens_q, self._make(cu_seq_lens_q).to(self.device)
        return self._layouts[id(cu_seq_lens_q)][1]

    def contiguous(self) -> Mask:
        """Itself: transformers asks it of every mask that it prepares ahead of a pass."""
        return self

    def _make(self, cu_seqlens: Tensor | None) -> Layout:
        tokens = self.cached + self.queries
        segments = _segments(self.mask_function)
        if cu_seqlens is not None:
            return self._packed([cu_seqlens.tolist()])
        if segments is not None:
            changes = (segments.diff(dim=1) != 0).cpu()
            bounds = [[0, *(row.nonzero()[:, 0] + 1).tolist(), self.queries] for row in changes]
            return self._packed([[self.queries * i + bound for bound in row] for i, row in enumerate(bounds)])
        samples = [[(tokens, "causal")]] * self.rows
        if self.padding is not None:
            real = self.padding[:, :tokens].bool().cpu()
            real = nn.functional.pad(real, (0, tokens - real.shape[1]))
            samples = [list(_runs(row)) for row in real]
        return Layout.from_splits(samples, cached=[self.cached] * self.rows, capacity=[self.keys] * self.rows)

    def _packed(self, bounds: list[list[int]]) -> Layout:
        if self.cached or self.keys != self.queries or self.padded():
            what = "a padding mask" if self.padded() else f"{self.keys} keys a row"
            raise ValueError(
                f"packed sequences come with {what}; they must come without padding and without a cache: "
                f"as many keys as queries, {self.queries}"
            )
        flat = [bounds[0][0], *(bound for row in bounds for bound in row[1:])]
        lengths = [end - begin for begin, end in pairwise(flat)]
        if flat[0] != 0 or flat[-1] != self.rows * self.queries or min(lengths) < 0:
            raise ValueError(
                f"cu_seq_lens_q is {flat}; it must rise from 0 to the number of tokens, {self.rows * self.queries}"
            )
        return Layout.from_splits([[(length, "causal")] for length in lengths if length])

    def padded(self) -> bool:
        """Whether any token is padding (a device is waited for)."""
        return self.padding is not None and not bool(self.padding.all())


def _runs(real: Tensor) -> Iterator[tuple[int, str]]:
    """The splits of a row: runs of real tokens and of padding; real [tokens], bool, on the CPU."""
    bounds = [0, *((real.diff()).nonzero()[:, 0] + 1).tolist(), len(real)]
    for begin, end in pairwise(bounds):
        yield end - begin, "causal" if real[begin] else "noise"


def _mask(
    *,
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    device: torch.device | str | None = None,
    **_: Any,
) -> Mask:
    """The mask function that transformers calls once per pass; older versions give ``cache_position`` [Q]."""
    if cache_position is not None:
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
    if int(kv_offset) != 0:
        raise ValueError(f"kv_offset is {kv_offset}; it must be 0: caches that drop early tokens are not supported")
    return Mask(
        batch_size, q_length, kv_length, int(q_offset), attention_mask, mask_function, torch.device(device or "cpu")
    )


def _cells(function: Callable[..., Any]) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        value = cell.cell_contents
        yield from value if isinstance(value, tuple) else (value,)


def _codes() -> tuple[object, set[object]]:
    """The code of transformers' mask functions: that of packed sequences; those that combine others without harm."""
    empty, causal = torch.empty(0), masking_utils.causal_mask_function
    packed = masking_utils.packed_sequence_mask_function(empty)
    around = {masking_utils.and_masks(causal).__code__}
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        around.add(masking_utils.remap_positions_for_packed_sequence(causal, empty).__code__)
    return packed.__code__, around


_PACKED, _AROUND = _codes()


def _segments(mask_function: Callable[..., Any]) -> Tensor | None:
    """None for the causal mask, the numbers of the sequences [B, Q] for the causal mask of packed sequences.

    Raises:
        ValueError: it is another mask. transformers hands over a closure, so its parts are what can be looked at.
    """
    pending, segments, causal = [mask_function], None, False
    while pending:
        function = pending.pop()
        code = getattr(function, "__code__", None)
        if function is masking_utils.causal_mask_function:
            causal = True
        elif code is _PACKED and segments is None:
            (segments,) = _cells(function)
        elif code in _AROUND:
            pending += [value for value in _cells(function) if callable(value)]
        else:
            raise ValueError(
                f"the model's mask is, or holds, {getattr(function, '__qualname__', function)}; "
                f'attn_implementation="{NAME}" knows the causal mask, padding and packed sequences. Pass a layout to '
                "the model, or use another implementation"
            )
    if not causal:
        raise ValueError(f"the model's mask is {mask_function.__qualname__} without the causal mask")
    return segments


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    backend: str,
    layout: Layout | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers: query [B, Hq, Q, D], key and value [B, Hkv, K, D] → [B, Q, Hq, D].

    Raises:
        ValueError: what the model asks for is something else than softmax attention under the pass's layout.
    """
    if dropout:
        raise ValueError(f"dropout is {dropout}; it must be 0: set attention_dropout=0 in the model's configuration")
    if is_causal is False:
        raise ValueError("is_causal is False; it must be True or None (for other masks pass a layout to the model)")
    for name, option in options.items():
        if option is not None and option is not False and name not in _IRRELEVANT:
            shown = "a tensor" if isinstance(option, Tensor) else repr(option)
            raise ValueError(f'{name} is {shown}; attn_implementation="{NAME}" does not support it')
    rows, _, queries, _ = query.shape
    if layout is not None and cu_seq_lens_q is not None:
        raise ValueError("layout and cu_seq_lens_q are both given; a layout says where samples end")
    if layout is not None:
        _check_layout(layout, attention_mask, rows * queries, rows * key.shape[2])
    elif not isinstance(attention_mask, Mask):
        raise ValueError(
            f"the mask of this attention is {_shown(attention_mask)}; the model must ask transformers for a causal "
            "mask, and be given none, or a [batch, tokens] mask of padding. For any other mask pass a layout to the "
            "model: model(..., layout=Layout.from_splits(...))"
        )
    else:
        layout = attention_mask.layout(cu_seq_lens_q, cu_seq_lens_k)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in autocast(query, key, value))
    out = symbiotic_attention(q, k, v, layout, scale=scaling, backend=backend)
    return out.unflatten(0, (rows, queries)), None


def _shown(mask: object) -> str:
    return f"a tensor of shape {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)


def _check_layout(layout: object, mask: object, queries: int, keys: int) -> None:
    if not isinstance(layout, Layout):
        raise ValueError(f"layout is a {type(layout).__name__}; it must be a unigendet Layout")
    if isinstance(mask, Tensor) or (isinstance(mask, Mask) and mask.padding is not None):
        raise ValueError("layout and attention_mask are both given; a layout says all there is to say about the mask")
    if (layout.num_queries, layout.num_keys) != (queries, keys):
        raise ValueError(
            f"layout has {layout.num_queries} queries and {layout.num_keys} keys; it must have {queries} and {keys}, "
            "those of all rows of the batch"
        )

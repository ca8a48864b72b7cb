"""The operators of a model's layers, with their operations and the bytes that they move.

A matrix product of :math:`n` rows with a weight of :math:`k` by :math:`m` takes :math:`2nkm` operations and
moves :math:`nk + km + nm` numbers: its input and its weight are read once and its output is written once, as
if caches held everything that is used again within one operator, and nothing from one operator to the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from memlens.models.families import Shape

KINDS: tuple[str, ...] = (
    "queries, keys and values",
    "attention",
    "attention output",
    "MLP in",
    "MLP out",
    "unembedding",
    "norms and elementwise",
    "metrics",
    "copies",
)
"""The kinds of operators; the last three only move bytes."""
_QKV, _ATTENTION, _OUTPUT, _IN, _OUT, _UNEMBEDDING, _ELEMENTWISE, _METRICS, _COPIES = KINDS

_PATTERN_PASSES = 6
"""How often attention weights are written or read where they are materialized (scores, mask, softmax)."""
_LOGIT_PASSES = 8
"""How often logits are read or written, in float32, on their way to a metric (see `LazyTargetStats`)."""


class Operators:
    """Counts calls of operators by kind, operations and bytes.

    Args:
        shape: The model's sizes.
    """

    shape: Shape
    calls: Counter[tuple[str, int, int]]
    flops: int

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.calls = Counter()
        self.flops = 0

    def add(self, other: Operators, times: int) -> None:
        """Add all calls of another count, this many times."""
        for call, n in other.calls.items():
            self.calls[call] += n * times
        self.flops += other.flops * times

    def layer(
        self,
        rows: int,
        positions: int,
        keys: int,
        queries: int | None = None,
        *,
        own: bool = False,
        times: int = 1,
    ) -> None:
        """Add one layer.

        Args:
            rows: Rows of the batch.
            positions: Positions of all rows at which the layer has inputs.
            keys: Keys of a row.
            queries: Positions of all rows whose output is wanted; all by default.
            own: Whether the model's own modules run, which keep the attention weights, instead of functional
                blocks, which join the weights of queries, keys and values and use a fused kernel.
            times: How often.
        """
        self.layer_of([(rows, positions, keys, queries)], own=own, times=times)

    def layer_of(
        self, stacks: Sequence[tuple[int, int, int, int | None]], *, own: bool = False, times: int = 1
    ) -> None:
        """Add one layer that runs on several stacks together: rows, positions, keys and queries of each."""
        s, queries = self.shape, None if stacks[0][3] is None else sum(stack[3] or 0 for stack in stacks)
        n = sum(positions for _, positions, _, _ in stacks)
        asked = n if queries is None else queries
        width, kv = s.n_heads * s.d_head, 2 * s.n_kv_heads * s.d_head
        if queries is None:
            self._product(_QKV, n, s.d_model, width + kv, times)
        else:
            self._product(_QKV, n, s.d_model, kv, times)
            self._product(_QKV, asked, s.d_model, width, times)
        repeated = 0
        for rows, positions, keys, at in stacks:
            here = positions if at is None else at
            pattern = _PATTERN_PASSES * here * keys * s.n_heads if own else 0
            read = 2 * rows * keys * width
            self._mixed(rows, here, keys, times, pattern)
            repeated += read if s.n_kv_heads < s.n_heads else 0
        self._product(_OUTPUT, asked, width, s.d_model, times)
        self.mlp(asked, times=times)
        rotated = 2 * asked * width + n * kv
        summed = 6 * asked * s.d_model
        self.moved(_ELEMENTWISE, 2 * n * s.d_model + rotated + summed, times)
        joined = 0 if own else 2 * s.d_model * (width + kv)
        together = 2 * ((n if queries is None else n + 2 * asked) * s.d_model + asked * width)
        self.copied(joined + repeated + (together if len(stacks) > 1 else 0), times)

    def attention(self, rows: int, positions: int, keys: int, times: int) -> None:
        """Add a layer without its MLP: rows, positions of all rows, keys of a row."""
        s, width, kv = self.shape, self.shape.n_heads * self.shape.d_head, 2 * self.shape.n_kv_heads
        self._product(_QKV, positions, s.d_model, width + kv * s.d_head, times)
        self._mixed(rows, positions, keys, times)
        self._product(_OUTPUT, positions, width, s.d_model, times)

    def changed(self, stacks: Sequence[tuple[int, int, int]], *, parallel: bool) -> None:
        """Add a layer whose input changed at one position of each row: rows, later positions and keys."""
        s, rows, n = self.shape, sum(stack[0] for stack in stacks), sum(stack[1] for stack in stacks)
        width, kv = s.n_heads * s.d_head, 2 * s.n_kv_heads * s.d_head
        # all rows are queried from the lowest position on
        low = max(positions // r for r, positions, _ in stacks)
        keys = max(stack[2] for stack in stacks)
        self._product(_QKV, rows, s.d_model, width + kv, 1)
        self._mixed(rows, rows * low, keys, 1)
        self._product(_OUTPUT, n, width, s.d_model, 1)
        self.mlp(rows if parallel else n)
        self.moved(_ELEMENTWISE, 6 * n * s.d_model, 1)
        self.copied(2 * rows * (keys * kv + low * (width + s.d_model)) + 2 * n * (width + s.d_model))

    def mlp(self, positions: int, *, times: int = 1) -> None:
        """Add an MLP, with the norm before it."""
        s, gates = self.shape, 2 if self.shape.gated_mlp else 1
        self._product(_IN, positions, s.d_model, gates * s.d_mlp, times)
        self._product(_OUT, positions, s.d_mlp, s.d_model, times)
        self.moved(_ELEMENTWISE, positions * (2 * s.d_model + (gates + 1) * s.d_mlp), times)

    def unembed(self, positions: int, most: int) -> None:
        """Add the unembedding of target positions, at most so many at a time, and their metrics."""
        s = self.shape
        full, rest = divmod(positions, most)
        for n, times in ((most, full), (rest, 1)):
            if n and times:
                self._product(_UNEMBEDDING, n, s.d_model, s.d_vocab, times)
                widened = 0 if s.itemsize >= 4 else s.itemsize + 4
                self._call(_METRICS, 0, n * s.d_vocab * (_LOGIT_PASSES * max(4, s.itemsize) + widened), times)

    def copied(self, numbers: int, times: int = 1) -> None:
        """Add a copy that reads and writes so many numbers in total."""
        self.moved(_COPIES, numbers, times)

    def moved(self, kind: str, numbers: int, times: int) -> None:
        """Add an operator without matrix products that reads and writes so many numbers in total."""
        if numbers:
            self._call(kind, 0, self.shape.itemsize * numbers, times)

    def _mixed(self, rows: int, queries: int, keys: int, times: int, pattern: int = 0) -> None:
        """Add what mixes values, with so many numbers of attention weights written and read."""
        width = self.shape.n_heads * self.shape.d_head
        moved = self.shape.itemsize * (2 * queries * width + 2 * rows * keys * width + pattern)
        self._call(_ATTENTION, 4 * queries * keys * width, moved, times)

    def _product(self, kind: str, rows: int, into: int, out: int, times: int) -> None:
        moved = self.shape.itemsize * (rows * into + into * out + rows * out)
        self._call(kind, 2 * rows * into * out, moved, times)

    def _call(self, kind: str, flops: int, moved: int, times: int) -> None:
        self.calls[kind, flops, moved] += times
        self.flops += flops * times

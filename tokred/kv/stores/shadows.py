"""``Shadow``: a prompt of which keys are held as a product of small matrices, and chunks come back when a query asks.

The rows of one layer stand in chunks. Most are known by the mean of their keys alone (a landmark) until a query chooses
them; those that no mean stands for (outliers), and the newest, stay as they came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.kernels.gather_rows.reference import gather_rows  # values may be in host memory, where no kernel runs
from tokred.kernels.rows import flat_index
from tokred.kv.select import kept_mask, rows_of
from tokred.kv.stores.offload import in_host_memory, same_memory
from tokred.kv.turning import turned

if TYPE_CHECKING:
    from tokred.kv.stores.shadow import ShadowKV

# Rows of the product by which principal directions are found that are made in double precision at a time.
_BLOCK = 4096


class Rotation(NamedTuple):
    """Rotary embedding of chunks: the first ``2 * R`` channels turn, as two halves; the others do not.

    Attributes:
        angle: ``[R]``, from one position to the next.
        chunk: positions of a chunk.
    """

    angle: Tensor
    chunk: int

    def phases(self, chunks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Turns ``[..., 1, R]`` of the first positions of chunks ``[...]``, and ``[chunk, R]`` of places in one.

        Far fewer than positions, they multiply to the turns of all.
        """
        place = torch.arange(self.chunk, device=chunks.device)
        both = (x.unsqueeze(-1) * self.angle.double() for x in (chunks * self.chunk, place))
        start, place = (torch.complex(x.cos().to(dtype), x.sin().to(dtype)) for x in both)
        return start.unsqueeze(-2), place

    def turn_pairs(self, x: Tensor, chunks: Tensor) -> Tensor:
        """Rows ``[..., n, chunk, D]`` of ``chunks`` ``[..., n]`` in the order of :meth:`pairs`, turned in place."""
        start, place = self.phases(chunks, x.dtype)
        pairs = torch.view_as_complex(x[..., : 2 * len(self.angle)].unflatten(-1, (-1, 2)))  # type: ignore[no-untyped-call]
        pairs.mul_(place).mul_(start)
        return x

    def pairs(self, width: int) -> Tensor:
        """``[D]`` int64, an order in which channels that turn together stand side by side."""
        r, every = len(self.angle), torch.arange(width, device=self.angle.device)
        return torch.cat([every[: 2 * r].view(2, r).T.reshape(-1), every[2 * r :]])


class Buffer(NamedTuple):
    """Chunks that the last query chose. They are changed in place: whoever keeps one keeps the only one.

    Attributes:
        ids: ``[B, Hk, S]`` int64, in any order.
        keys: ``[B, Hk, S, chunk * D]``, in pairs.
        values: ``[B, Hk, S, chunk * Dv]``.
    """

    ids: Tensor
    keys: Tensor
    values: Tensor

    @property
    def fresh(self) -> bool:
        """True if it can be changed in place here."""
        return self.keys.is_inference() == torch.is_inference_mode_enabled() and not self.keys.requires_grad


class Shadow(NamedTuple):
    """Rows of samples of one length, ``M`` chunks of ``c`` and the newest behind them.

    Attributes:
        store: how chunks are made and chosen.
        factor: ``[B, M, c * r]``, what each row has of each direction.
        basis: ``[B, Hk, r, D]``, the directions of unrotated keys, of all heads side by side; channels in pairs.
        angle: ``[R]`` of the rotary embedding.
        ids: ``[B, Hk, C]`` int64, chunks that a query may choose, ascending.
        landmarks: ``[B, Hk, C, D]``, means of their keys.
        outliers: ``[B, Hk, E]`` int64, chunks that every query attends to.
        outlier_keys, outlier_values: ``[B, Hk, E * c, D]``.
        local_keys, local_values: ``[B, Hk, L, D]``, the newest rows.
        values: ``[B, Hk, M, c * Dv]`` of all chunks; in host memory, if the store says so.
    """

    store: ShadowKV
    factor: Tensor
    basis: Tensor
    angle: Tensor
    ids: Tensor
    landmarks: Tensor
    outliers: Tensor
    outlier_keys: Tensor
    outlier_values: Tensor
    local_keys: Tensor
    local_values: Tensor
    values: Tensor

    @classmethod
    def of(cls, store: ShadowKV, keys: Tensor, values: Tensor, angle: Tensor) -> Shadow:
        """The shadow of rows ``[B, Hk, N, D]``, whose row ``i`` is at position ``i``."""
        c, m = store.chunk, store.chunks(keys.shape[2])
        rows, (b, h, _, d) = m * c, keys.shape
        local = keys[:, :, rows:].clone(), values[:, :, rows:].clone()
        if m:
            factor, basis = low_rank(_unrotated(keys, angle), store.rank)
        else:
            factor, basis = keys.new_zeros(b, 0, 1), keys.new_zeros(b, 1, h * d)
        chunked = keys[:, :, :rows].unflatten(2, (m, c))  # type: ignore[no-untyped-call]
        landmarks, least = landmarks_of(chunked)
        # The least similar are kept; ties go to the older chunk.
        apart = kept_mask(-least, None, None, (min(store.outliers, m),) * b)
        outliers, ids = rows_of(apart, min(store.outliers, m))[0], rows_of(~apart, max(m - store.outliers, 0))[0]
        held = values[:, :, :rows].reshape(b, h, m, c * values.shape[3])
        return cls(
            store,
            factor[:, :rows].to(keys.dtype, copy=True).reshape(b, m, c * factor.shape[2]),
            basis.to(keys.dtype)
            .view(*basis.shape[:2], h, d)
            .transpose(1, 2)[..., Rotation(angle, c).pairs(d)]
            .contiguous(),
            angle,
            ids,
            gather_rows(landmarks, ids).to(keys.dtype),
            outliers,
            gather_rows(chunked.flatten(3), outliers).reshape(b, h, -1, d),
            gather_rows(held, outliers).reshape(b, h, -1, values.shape[3]),
            *local,
            in_host_memory(held, wait=True) if store.offload else held.clone(),
        )

    @classmethod
    def from_file(cls, store: ShadowKV, values: Tensor, **rest: Tensor) -> Shadow:
        """A shadow of a file, whose tensors are on the device where the layer runs."""
        return cls(store=store, values=in_host_memory(values, wait=True) if store.offload else values, **rest)

    @property
    def rotation(self) -> Rotation:
        """Of its chunks."""
        return Rotation(self.angle, self.store.chunk)

    # ------------------------------------------------------------------ one query

    def choose(self, q: Tensor, softcap: float | None) -> Tensor:
        """``[B, Hk, S]`` int64: chunks for queries ``[B, Hk, G, D]``, scaled; ascending, ties to the older."""
        # Selection is in float32, whatever the model runs in.
        logits = q.float() @ self.landmarks.float().mT
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        count = min(self.store.budget // self.store.chunk, self.ids.shape[2])
        score = logits.softmax(-1).amax(2)
        best = rows_of(kept_mask(score, None, None, (count,) * len(q)), count)[0]
        return self.ids.gather(2, best)

    def bring(self, chosen: Tensor, last: Buffer | None) -> Buffer:
        """The rows of chunks ``[B, Hk, S]``; those that the ``last`` query chose too stay where they are."""
        if last is None or last.ids.shape != chosen.shape or not last.fresh:
            return Buffer(chosen, self.rebuilt(chosen), self.fetched(chosen))
        ids, order = last.ids.sort(-1)
        place = torch.searchsorted(ids, chosen).clamp(max=chosen.shape[2] - 1)
        there = ids.gather(2, place) == chosen
        count = (~there).sum(-1, keepdim=True)
        most = int(count.max())
        if most == 0:
            return last
        if 2 * most > chosen.shape[2]:
            return Buffer(chosen, self.rebuilt(chosen), self.fetched(chosen))
        used = torch.zeros_like(there).scatter(2, order.gather(2, place), there)
        # Heads that miss fewer make one of their chunks more than once.
        each = torch.minimum(torch.arange(most, device=count.device), count - 1).clamp(min=0)
        free, which = (rows_of(x, most)[0].gather(2, each) for x in (~used, ~there))
        new = torch.where(count > 0, chosen.gather(2, which), last.ids.gather(2, free))
        _put(last.keys, free, self.rebuilt(new))
        _put(last.values, free, self.fetched(new))
        return last._replace(ids=last.ids.scatter(2, free, new))

    def rebuilt(self, chunks: Tensor) -> Tensor:
        """``[B, Hk, n, c * D]``: keys of chunks ``[B, Hk, n]``, turned as their positions say, in pairs."""
        c, (b, h, n) = self.store.chunk, chunks.shape
        m, r, d = self.factor.shape[1], self.basis.shape[2], self.basis.shape[3]
        dtype, rotation = self.factor.dtype, self.rotation
        kind = torch.promote_types(dtype, torch.float32)
        if chunks.is_cuda or dtype != kind or torch.is_grad_enabled():
            flat = chunks + torch.arange(b, device=chunks.device).view(-1, 1, 1) * m
            rows = self.factor.reshape(b * m, c * r).index_select(0, flat.reshape(-1)).view(b, h, n * c, r)
            keys = (rows @ self.basis).to(kind).view(b, h, n, c, d)
            return rotation.turn_pairs(keys, chunks).to(dtype).flatten(3)
        # One head after the other: what a processor has read a moment ago, it need not fetch again.
        rows, keys = self.factor.new_empty(n, c * r), self.factor.new_empty(b, h, n, c, d)
        for i in range(b):
            for j in range(h):
                torch.index_select(self.factor[i], 0, chunks[i, j], out=rows)
                torch.mm(rows.view(n * c, r), self.basis[i, j], out=keys[i, j].view(n * c, d))
                rotation.turn_pairs(keys[i, j], chunks[i, j])
        return keys.flatten(3)

    def fetched(self, chunks: Tensor) -> Tensor:
        """``[B, Hk, n, c * Dv]``: values of chunks ``[B, Hk, n]``, from wherever they are."""
        return gather_rows(self.values, chunks.to(self.values.device)).to(chunks.device, non_blocking=True)

    def parts(
        self, q: Tensor, softcap: float | None, last: Buffer | None
    ) -> tuple[list[Tensor], list[Tensor], Buffer | None]:
        """Lots of rows that queries ``[B, Hk, G, D]`` attend to.

        Returns:
            Logits ``[B, Hk, G, n]`` and values ``[B, Hk, n, Dv]`` of several lots of rows, and the next query's buffer.
        """
        keys, values = [self.outlier_keys, self.local_keys], [self.outlier_values, self.local_values]
        logits = [q @ k.to(q.dtype).mT for k in keys]
        if not self.ids.shape[2]:
            return logits, values, None
        b, h, _, d = q.shape
        buffer = self.bring(self.choose(q, softcap), last)
        chosen = buffer.keys.view(b, h, -1, d).to(q.dtype)
        logits.append(q[..., self.rotation.pairs(d)] @ chosen.mT)
        return logits, [*values, buffer.values.view(b, h, -1, self.local_values.shape[3])], buffer

    # ------------------------------------------------------------------ all rows

    def restored(self, which: int) -> Tensor:
        """``[B, Hk, N, D]``, keys or values in order; keys of chunks are what their shadow says."""
        local = self.local_values if which else self.local_keys
        (b, h, _, d), m, c = local.shape, self.factor.shape[1], self.store.chunk
        if which:
            return torch.cat([self.values.to(local.device).view(b, h, m * c, d), local], 2)
        every = torch.arange(m, device=local.device).expand(b, h, m)
        keys = self.rebuilt(every).view(b, h, m * c, d)[..., self.rotation.pairs(d).argsort()]
        exact = self.outlier_keys.reshape(*self.outliers.shape, c * d)
        keys = _put(keys.view(b, h, m, c * d), self.outliers, exact).view(b, h, m * c, d)
        return torch.cat([keys, local], 2)

    def select(self, index: Tensor) -> Shadow:
        """The rows of other samples: ``index`` ``[B']`` of the old ones."""
        changed = {
            k: x.index_select(0, index) for k, x in self._asdict().items() if k not in ("store", "angle", "values")
        }
        values = same_memory(self.values, self.values.index_select(0, index.to(self.values.device)))
        return self._replace(values=values, **changed)


def landmarks_of(chunks: Tensor) -> tuple[Tensor, Tensor]:
    """Means ``[B, Hk, M, D]`` float32 of keys ``[B, Hk, M, c, D]``, and the least cosine ``[B, Hk, M]`` with them."""
    chunks = chunks.float()
    mean = chunks.mean(3)
    return mean, F.cosine_similarity(chunks, mean.unsqueeze(3), -1).amin(3)


def low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Rows ``[B, N, W]`` as the nearest product ``factor @ basis`` of a rank, ``[B, N, r]`` and ``[B, r, W]``.

    Rows are float32 or float64. The directions are those of a singular value decomposition, found from the product of
    the columns in float64.
    """
    (b, n, w), r = x.shape, min(rank, *x.shape[1:])
    if n <= w:
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        return u[..., :r] * s[:, None, :r], v[:, :r]
    product = torch.zeros(b, w, w, dtype=torch.float64, device=x.device)
    for i in range(0, n, _BLOCK):
        part = x[:, i : i + _BLOCK].double()
        product += part.mT @ part
    directions = torch.linalg.eigh(product).eigenvectors[..., -r:].to(x.dtype)
    return x @ directions, directions.mT


def _unrotated(keys: Tensor, angle: Tensor) -> Tensor:
    """``[B, N, Hk * D]`` float32 or wider: the keys of all heads side by side, as they were before their rotation."""
    rows = turned(keys, torch.arange(keys.shape[2], device=keys.device)[None], angle, back=True)
    return rows.transpose(1, 2).flatten(2)


def _put(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``x`` ``[B, Hk, M, W]``, changed in place, with ``rows`` ``[B, Hk, n, W]`` in the places ``index``."""
    b, h, m, w = x.shape
    return x.view(b * h * m, w).index_copy_(0, flat_index(index, (h * m, m, 1)), rows.reshape(-1, w)).view(b, h, m, w)

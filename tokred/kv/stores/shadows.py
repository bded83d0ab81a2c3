"""``Shadow``: a prompt of which keys are held as a product of small matrices, and chunks come back when a query asks.

The rows of one layer stand in chunks. Most are known by the mean of their keys alone (a landmark) until a query chooses
them; those that no mean stands for (outliers), and the newest, stay as they came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.kv.select import kept_mask, rows_of
from tokred.kv.stores.offload import in_host_memory, same_memory

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

    def __call__(self, x: Tensor, chunks: Tensor, back: bool = False) -> Tensor:
        """Rows of chunks, turned as their positions say, or turned back.

        Args:
            x: ``[B, Hk, n, chunk, D]``, float32 or float64.
            chunks: ``[B or 1, Hk or 1, n]``, which they are.
            back: whether they have been turned.
        """
        r, angle = len(self.angle), self.angle.double()
        # Of the chunk's first position, and of places in it: far fewer than positions.
        start = (chunks * self.chunk).unsqueeze(-1) * angle
        place = torch.arange(self.chunk, device=x.device).unsqueeze(-1) * angle
        (sc, ss), (pc, ps) = ((a.cos().to(x.dtype), a.sin().to(x.dtype)) for a in (start, place))
        sc, ss = sc.unsqueeze(-2), ss.unsqueeze(-2)
        cos, sin = sc * pc - ss * ps, ss * pc + sc * ps
        sin = -sin if back else sin
        a, b = x[..., :r], x[..., r : 2 * r]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * r :]], -1)


class Buffer(NamedTuple):
    """Chunks that the last query chose.

    Attributes:
        ids: ``[B, Hk, S]`` int64, ascending.
        keys: ``[B, Hk, S, chunk * D]``.
        values: ``[B, Hk, S, chunk * Dv]``.
    """

    ids: Tensor
    keys: Tensor
    values: Tensor


class Shadow(NamedTuple):
    """Rows of samples of one length, ``M`` chunks of ``c`` and the newest behind them.

    Attributes:
        store: how chunks are made and chosen.
        factor: ``[B, M, c * r]``, what each row has of each direction.
        basis: ``[B, Hk, r, D]``, the directions of unrotated keys, of all heads side by side.
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
            factor, basis = low_rank(_unrotated(keys, Rotation(angle, c)), store.rank)
        else:
            factor, basis = keys.new_zeros(b, 0, 1), keys.new_zeros(b, 1, h * d)
        chunked = keys[:, :, :rows].unflatten(2, (m, c))  # type: ignore[no-untyped-call]
        landmarks, least = landmarks_of(chunked)
        # The least similar are kept; ties go to the older chunk.
        apart = kept_mask(-least, None, None, (min(store.outliers, m),) * b)
        outliers, ids = rows_of(apart, min(store.outliers, m))[0], rows_of(~apart, max(m - store.outliers, 0))[0]
        held = values[:, :, :rows].reshape(b, h, m, c * values.shape[3])
        made = cls(
            store,
            factor[:, :rows].to(keys.dtype, copy=True).reshape(b, m, c * factor.shape[2]),
            basis.to(keys.dtype).unflatten(2, (h, d)).transpose(1, 2).contiguous(),
            angle,
            ids,
            _picked(landmarks, ids).to(keys.dtype),
            outliers,
            _picked(chunked.flatten(3), outliers).reshape(b, h, -1, d),
            _picked(held, outliers).reshape(b, h, -1, values.shape[3]),
            *local,
            in_host_memory(held) if store.offload else held.clone(),
        )
        if held.is_cuda and store.offload:
            torch.cuda.current_stream(held.device).synchronize()  # nobody asks later whether they have arrived
        return made

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
        """The rows of chunks ``[B, Hk, S]``, those of the last query as they are."""
        if last is None or last.ids.shape != chosen.shape:
            return Buffer(chosen, self.rebuilt(chosen), self.fetched(chosen))
        place = torch.searchsorted(last.ids, chosen).clamp(max=chosen.shape[2] - 1)
        missing = last.ids.gather(2, place) != chosen
        most = int(missing.sum(-1).max())
        if most == 0:
            return last
        # Heads that miss fewer make their last chunk anew, which changes nothing.
        which = rows_of(missing, most)[0]
        new = chosen.gather(2, which)
        keys, values = _picked(last.keys, place), _picked(last.values, place)
        return Buffer(chosen, _put(keys, which, self.rebuilt(new)), _put(values, which, self.fetched(new)))

    def rebuilt(self, chunks: Tensor) -> Tensor:
        """``[B, Hk, n, c * D]``: keys of chunks ``[B, Hk, n]``, rotated at their positions."""
        c, (b, h, n) = self.store.chunk, chunks.shape
        m, r, d = self.factor.shape[1], self.basis.shape[2], self.basis.shape[3]
        flat = chunks + torch.arange(b, device=chunks.device).view(-1, 1, 1) * m
        rows = self.factor.reshape(b * m, c * r).index_select(0, flat.reshape(-1)).view(b, h, n * c, r)
        kind = torch.promote_types(rows.dtype, torch.float32)
        keys = (rows @ self.basis).to(kind).view(b, h, n, c, d)
        return Rotation(self.angle, c)(keys, chunks).to(rows.dtype).flatten(3)

    def fetched(self, chunks: Tensor) -> Tensor:
        """``[B, Hk, n, c * Dv]``: values of chunks ``[B, Hk, n]``, from wherever they are."""
        return _picked(self.values, chunks.to(self.values.device)).to(chunks.device, non_blocking=True)

    def parts(self, q: Tensor, softcap: float | None, last: Buffer | None) -> tuple[list[Tensor], list[Tensor], Buffer]:
        """Keys and values ``[B, Hk, n, D]`` that queries ``[B, Hk, G, D]`` attend to, and the buffer for the next."""
        b, h, _, d = q.shape
        if not self.ids.shape[2]:
            return [self.outlier_keys, self.local_keys], [self.outlier_values, self.local_values], _nothing(self)
        buffer = self.bring(self.choose(q, softcap), last)
        keys, values = buffer.keys.view(b, h, -1, d), buffer.values.view(b, h, -1, self.local_values.shape[3])
        return [self.outlier_keys, keys, self.local_keys], [self.outlier_values, values, self.local_values], buffer

    # ------------------------------------------------------------------ all rows

    def restored(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, Hk, N, D]``, in order; keys of chunks are what their shadow says."""
        b, h, _, d = self.local_keys.shape
        m, device = self.factor.shape[1], self.local_keys.device
        every = torch.arange(m, device=device).expand(b, h, m)
        keys, exact = self.rebuilt(every), self.outlier_keys.reshape(*self.outliers.shape, self.store.chunk * d)
        keys = _put(keys, self.outliers, exact).view(b, h, m * self.store.chunk, d)
        values = self.values.to(device).view(b, h, keys.shape[2], self.local_values.shape[3])
        return torch.cat([keys, self.local_keys], 2), torch.cat([values, self.local_values], 2)

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


def _unrotated(keys: Tensor, rotation: Rotation) -> Tensor:
    """``[B, N, Hk * D]`` float32 or wider: the keys of all heads side by side, as they were before their rotation."""
    n, c = keys.shape[2], rotation.chunk
    count = -(-n // c)
    rows = keys.to(torch.promote_types(keys.dtype, torch.float32))
    rows = F.pad(rows, (0, 0, 0, count * c - n)).unflatten(2, (count, c))  # type: ignore[no-untyped-call]
    rows = rotation(rows, torch.arange(count, device=keys.device)[None, None], back=True)
    return rows.flatten(2, 3)[:, :, :n].transpose(1, 2).flatten(2)


def _flat(index: Tensor, count: int) -> Tensor:
    """Where the places ``[B, Hk, n]`` are among ``count`` of every head, all in one row."""
    b, h, _ = index.shape
    return (index + torch.arange(b * h, device=index.device).view(b, h, 1) * count).reshape(-1)


def _picked(x: Tensor, index: Tensor) -> Tensor:
    """``[B, Hk, n, W]`` of ``x`` ``[B, Hk, M, W]``: one copy of whole rows."""
    b, h, m, w = x.shape
    return x.reshape(b * h * m, w).index_select(0, _flat(index, m)).view(b, h, index.shape[2], w)


def _put(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``x`` ``[B, Hk, M, W]``, which nobody else holds, with ``rows`` ``[B, Hk, n, W]`` in the places ``index``."""
    b, h, m, w = x.shape
    return x.view(b * h * m, w).index_copy_(0, _flat(index, m), rows.reshape(-1, w)).view(b, h, m, w)


def _nothing(shadow: Shadow) -> Buffer:
    return Buffer(shadow.ids, shadow.landmarks, shadow.landmarks)

"""The bytes of a layer group's blocks: sealed ones in their format, open ones as computed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from kvlab.core import BadInput, CacheGeometry, LayerShape
from kvlab.format import Dense, KVFormat
from kvlab.pool.apart import Apart, behind
from kvlab.pool.slabs import LayerPlanes, Meter, SlabStore
from kvlab.pool.workspace import Workspace

SLAB_TOKENS = 1024
FINE_SLAB_TOKENS = 16  # where blocks are dense anyway: larger slabs would only hold more unused


@cache
def fused_kernels(device_type: str, kernels: str = "auto") -> ModuleType | None:
    """The Triton kernels for this kind of device, or None where plain torch does the work.

    kernels: "auto" (Triton on CUDA if it is installed), "torch", or "triton" (also on the CPU,
    where its interpreter runs them: for tests). Raises `BadInput` if Triton cannot be had.
    """
    if kernels not in ("auto", "torch", "triton"):
        raise BadInput("cache.kernels", kernels, "must be auto, torch or triton")
    if kernels == "torch" or (kernels == "auto" and device_type != "cuda"):
        return None
    try:
        from kvlab.kernel import all_triton
    except ImportError as error:
        if kernels == "auto":
            return None
        raise BadInput("cache.kernels", kernels, f"Triton cannot be imported: {error}") from error
    return all_triton


def no_kernels(format: KVFormat, shape: LayerShape) -> str | None:
    """Why the Triton kernels cannot read blocks of this format and shape, so that plain torch does
    the work; None where they can."""
    if not (format.key.has_kernel and format.value.has_kernel):
        return f"the kernels do not know the codecs of {format.name}"
    if format.key.rotated:
        return f"the kernels multiply keys as they are stored, and {format.name} turns them"
    if shape.k_width != shape.v_width:
        return f"keys of width {shape.k_width} and values of {shape.v_width} differ"
    if shape.softcap is not None:
        return f"logits are softly capped at {shape.softcap:g}"
    width = shape.k_width
    if not 32 <= width <= 256 or width & (width - 1):
        return f"a head width of {width} is no power of two from 32 to 256"
    return None


class BlockPool:
    """Sealed blocks in their format, open blocks in the compute dtype.

    geometry: what a block holds, `layers` being those of this pool's layer group, of one shape.
    dtype: the model's compute dtype, in which keys and values arrive and leave.
    kernels: see `fused_kernels`; workspace, meter: shared by the pools of one cache.
    slab_tokens: tokens whose memory comes and goes together.
    why_plain: why plain torch does what kernels were wanted for, see `no_kernels`; or None.
    """

    def __init__(
        self, geometry: CacheGeometry, format: KVFormat, device, dtype: torch.dtype,
        kernels: str = "torch", workspace: Workspace | None = None, meter: Meter | None = None,
        slab_tokens: int = SLAB_TOKENS,
    ):
        self.geometry, self.format, self.dtype = geometry, format, dtype
        self.block_size = geometry.block_size
        self.device = torch.device(device)
        self.shape = self.row_shape = geometry.shape  # of a layer, and of what a row holds of it
        wanted = fused_kernels(self.device.type, kernels)
        self.why_plain = None if wanted is None else no_kernels(format, self.shape)
        self.fused = wanted if self.why_plain is None else None
        self.workspace, self.meter = workspace or Workspace(), meter or Meter()
        g = geometry
        rows = max(1, slab_tokens // g.block_size)
        self.sealed = SlabStore(format.planes(g), g.layers, rows, device, self.meter)
        dense = KVFormat(*(Dense(str(dtype).removeprefix("torch.")) for _ in range(2)))
        self.open = SlabStore(dense.planes(g), g.layers, 1, device, self.meter)
        self.apart = Apart(format.sinks, self.shape, g.layers, dtype, device, self.meter)
        self._open_row: dict[int, int] = {}
        self._free_rows: list[int] = []
        self._places = 0  # names given so far

    by_head = False  # whether heads may hold unlike blocks

    @property
    def exact(self) -> bool:
        """Whether sealing loses nothing, so that a block read back is what was written."""
        sides = self.format.key, self.format.value
        return all(isinstance(c, Dense) and c.dtype in (self.dtype, torch.float32) for c in sides)

    @property
    def dense(self) -> bool:
        """Whether a sealed block rounds every element by itself, whatever lies beside it."""
        return all(isinstance(c, Dense) for c in (self.format.key, self.format.value))

    # ---- open blocks

    def open_block(self, block: int, contents: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        """Give `block` a place to collect tokens in, [L, H, S, D] twice.

        contents: keys and values [n, H, D] of each layer, for its first slots.
        """
        row = self._free_rows.pop() if self._free_rows else len(self._open_row)
        self._open_row[block] = row
        self.open.commit([row])
        for layer, pair in enumerate(contents):
            self.write(layer, block, 0, *pair)

    def new_place(self) -> int:
        """A name for an open place that is no block's: negative, as no block's id is."""
        self._places += 1
        return -self._places

    def keep_place(self, block: int) -> int:
        """Give the open place of `block`, which was sealed, a name of its own."""
        name = self.new_place()
        self._open_row[name] = self._open_row.pop(block)
        return name

    def close_block(self, block: int) -> None:
        """Take the open place back: the block was sealed or abandoned."""
        row = self._open_row.pop(block)
        self.open.drop([row])
        self._free_rows.append(row)

    def open_row(self, block: int) -> int:
        """Row of the open store in which `block` collects its tokens."""
        return self._open_row[block]

    def write(
        self, layer: int | slice, block: int, slot: int, k: Tensor, v: Tensor
    ) -> None:
        """Store `k`, `v` [n, H, D] in the open `block` from `slot` on; of several layers, with
        these in front."""
        row = self.open.row(layer, self._open_row[block])
        for name, x in (("k_data", k), ("v_data", v)):
            row[name][..., slot : slot + x.shape[-3], :] = x.transpose(-3, -2)

    def read_open(
        self, layer: int | slice, block: int, count: int
    ) -> tuple[Tensor, Tensor]:
        """The first `count` tokens of an open block, views [count, H, D]; of several layers, with
        these in front."""
        row = self.open.row(layer, self._open_row[block])
        return tuple(row[name][..., :count, :].transpose(-3, -2) for name in ("k_data", "v_data"))

    # ---- sealed blocks

    def ids(self, blocks: list[int]) -> Tensor | None:
        """Block ids as the kernels want them, int64 [n] on the device; None without kernels."""
        if self.fused is None:
            return None
        return torch.tensor(blocks).to(self.device, non_blocking=True)

    def commit(self, blocks: list[int], first: bool = False) -> None:
        """Take the memory that sealing `blocks` needs; first: the first of them begins a sequence.
        """
        self.sealed.commit(blocks)
        self.apart.take(blocks[:first])

    def seal(
        self, layer: int, blocks: list[int], k: Tensor, v: Tensor, ids: Tensor | None = None,
        count: Tensor | None = None,
    ) -> None:
        """Quantize `k`, `v` [n*S, H, D] into the n `blocks`; they are read-only from then on.

        ids: `self.ids(blocks)`, where the caller has them already. count: int32 [H], how many
        of each head's first tokens stay apart, where the first block begins a sequence; else all
        that can.
        """
        self.sealed.commit(blocks)
        if blocks and blocks[0] in self.apart.rows:
            self.apart.write(layer, blocks[0], k, v, count)
            count, size = self.apart.all if count is None else count, self.block_size
            k, v = (torch.cat((behind(x[:size], count), x[size:])) for x in (k, v))
        if self.fused is not None:
            ids = self.ids(blocks) if ids is None else ids
            k, v = k.contiguous(), v.contiguous()
            self.fused.seal(k, v, self.format, self.sealed.layer(layer), ids)
            return
        whole = (x.unflatten(0, (len(blocks), self.block_size)) for x in (k, v))
        self.sealed.write(layer, blocks, self.format.quantize(*whole))

    def present(self, layer: int, blocks: list[int]) -> Tensor | None:
        """Which tokens of `read` each head has, bool [n*S, H]; None: all."""

    def seal_open(self, blocks: list[int]) -> None:
        """Seal full open `blocks` in all layers; their open places are still there."""
        self.sealed.commit(blocks)
        layers = self.geometry.layers
        plain = blocks if self.fused is None else [b for b in blocks if b in self.apart.rows]
        for block in plain:
            for layer in range(layers):
                self.seal(layer, [block], *self.read_open(layer, block, self.block_size))
        rest = [b for b in blocks if b not in plain]
        if rest:
            self.fused.seal_open(
                self.open.layer(0), self.sealed.layer(0), self.format,
                self.ids([self._open_row[b] for b in rest]), self.ids(rest), layers,
            )

    def read(
        self, layer: int, blocks: list[int], ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sealed `blocks`, dequantized: two [n*S, H, D] in the compute dtype.

        With kernels they lie in the workspace, until the next read.
        """
        if self.fused is not None:
            ids = self.ids(blocks) if ids is None else ids
            k, v = self.gather(self.sealed.layer(layer), ids)
        else:
            pair = self.format.dequantize(self.sealed.read(layer, blocks), self.dtype)
            k, v = (x.flatten(0, 1) for x in pair)
        self.apart.patch(layer, blocks, k, v)
        return k, v

    def read_layers(
        self, layer: int, blocks: list[int], ids: Tensor | None, k: Tensor, v: Tensor
    ) -> None:
        """The same of several layers, from `layer` on, into k and v [L, n*S, H, D], of which each
        layer is contiguous."""
        if self.fused is None or self.by_head:
            for number, out in enumerate(zip(k, v), layer):
                for x, found in zip(out, self.read(number, blocks, ids)):
                    x.copy_(found)
            return
        self.sealed.coming.need(layer + len(k) - 1)
        self.fused.gather(self.sealed.layer(layer), self.format, ids, k, v)
        for number, out in enumerate(zip(k, v), layer) if self.apart else ():
            self.apart.patch(number, blocks, *out)

    def gather(self, planes: LayerPlanes, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks `ids` of any planes in this format, dequantized into the workspace."""
        tokens = len(ids) * self.block_size
        out = self.workspace.take(tokens, self.row_shape, self.dtype, self.device)
        self.fused.gather(planes, self.format, ids, *out)
        return out

    def drop(self, blocks: list[int]) -> None:
        """Forget `blocks`, open or sealed."""
        for block in blocks:
            if block in self._open_row:
                self.close_block(block)
        self.unseal(blocks)

    def unseal(self, blocks: list[int]) -> None:
        """Forget what `blocks` hold sealed."""
        self.sealed.drop(blocks)
        self.apart.drop(blocks)

    @property
    def nbytes(self) -> int:
        """Bytes really held, from the tensors: scales, open blocks and tables included."""
        return self.sealed.nbytes + self.open.nbytes + self.apart.nbytes

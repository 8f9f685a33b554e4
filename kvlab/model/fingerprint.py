"""The content of many tensors in a few bytes, read once, with one wait for each device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from xxhash import xxh3_128

from kvlab.core import BadInput

SAMPLES = 256
LANE = 8  # bytes: sums of int64 are the same on every device and in any order


@torch.inference_mode()
def fingerprint(tensors: Iterable[Tensor]) -> bytes:
    """16 bytes that change with shapes, dtypes and contents; equal on every device.

    Of each tensor the sum of the bits of every row goes in, and 256 samples that show a change of
    order within a row. Versions and grad modes do not matter: writes through `.data` and to
    inference tensors are seen. Raises `BadInput` for tensors on the meta device.
    """
    digest, parts = xxh3_128(), {}
    for number, x in enumerate(y for tensor in tensors for y in plain(tensor)):
        digest.update(f"{number} {tuple(x.shape)} {x.dtype}".encode())
        flat = lanes(x)
        rows = flat.sum(1) if flat.shape[1] > 1 else flat[:, 0]
        some = flat.reshape(-1)[:: max(1, flat.numel() // SAMPLES) | 1]
        parts.setdefault(x.device, []).extend((rows, some))
    for found in parts.values():
        digest.update(torch.cat(found).cpu().numpy())
    return digest.digest()


def plain(x: Tensor) -> Iterator[Tensor]:
    """The tensors that `x` is made of: itself, or what a wrapper of tensors holds."""
    inner = getattr(x, "__tensor_flatten__", None)
    if inner is not None and type(x) is not Tensor:
        for name in inner()[0]:
            yield from plain(getattr(x, name))
    elif x.device.type == "meta":
        raise BadInput("prefix", "hash", "needs all weights in memory, and some are on device meta")
    else:
        yield x.detach()


def lanes(x: Tensor) -> Tensor:
    """The bits of `x` as int64 [rows, n]; rows of one lane where `x` is a vector."""
    x = x.contiguous()
    width = x.shape[-1] * x.element_size() if x.dim() > 1 else 0
    if width and width % LANE == 0:
        aligned = x.storage_offset() * x.element_size() % LANE == 0
        return (x if aligned else x.clone()).view(torch.int64).flatten(0, -2)
    raw = x.reshape(-1).view(torch.uint8)
    raw = F.pad(raw, (0, -len(raw) % LANE)).clone()  # a copy begins aligned
    return raw.view(torch.int64)[:, None]

"""The library's attention with log-sum-exp: same names and signatures as `attend_ref`.

cuDNN first on CUDA, FlashAttention-2 where cuDNN refuses, torch's flash kernel on the CPU, and
the reference where a window needs a mask that none of them takes. The library's results stay in
its own dtype: `merge` and `merge_into` sum in fp32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvlab.core import first_seen
from kvlab.kernel import attend_ref
from kvlab.kernel.attend_ref import Partial, merge

WIDEST = 128   # head that cuDNN is asked for: with a bias, keys are wider and of any number
BIAS_DIMS = 8  # a head width must be a multiple of 8 for the flash kernels

FEW = 16  # queries: cuDNN makes a new plan for each length, which single tokens would ask for
TILE = 128    # queries of a head that one multiprocessor takes
PARTS = 8     # of a past, at most
MOST_LOGITS = 1 << 26  # that are made at a time where no library kernel serves
ONE_CALL = 1024  # queries, at most, that see past and own tokens in one call: it saves launches
GAIN = 0.85   # of the time: parts have to be merged, so they must be worth it

__all__ = ["attend", "attend_each", "attend_last", "attend_parts", "attend_span",
           "merge"]


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False,
    window: int | None = None, q_start: int = 0, k_start: int = 0, bias: Tensor | None = None,
    softcap: float | None = None,
) -> Partial:
    """As `attend_ref.attend`; `causal` asks for a square (q_start == k_start, n == T), `bias` for
    all keys visible."""
    if softcap is not None:
        return _capped(q, k, v, {"scale": scale, "causal": causal, "window": window, "bias": bias,
                                 "k_start": k_start, "softcap": softcap}, q_start)
    if bias is not None:
        return _with_bias(q, k, v, bias, scale)
    span = (q_start - k_start, k.shape[0])
    banded = _banded(q, window, q_start, k_start)
    if banded or (causal and span != (0, q.shape[1])) or not k.shape[0]:
        return attend_ref.attend(
            q, k, v, scale=scale, causal=causal, window=window, q_start=q_start, k_start=k_start
        )
    run = _on_cpu if q.device.type == "cpu" else _on_cuda
    (q, k, v), width = leveled(q, k.to(q.dtype), v.to(q.dtype)), v.shape[-1]
    out, lse = run(q, k, v, scale, causal)
    return out[..., :width], lse


def attend_parts(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, q_start: int = 0,
    k_start: int = 0, softcap: float | None = None,
) -> Partial:
    """As `attend`, not causal, or the results over n equal parts of the keys: [n, Hq, T, D] and
    [n, Hq, T], as `merge_into` takes them.

    A short chunk has fewer tiles of queries than the device has multiprocessors; equal parts of the
    keys, folded into the batch, give the others work too (Flash-Decoding,
    https://pytorch.org/blog/flash-decoding/, for chunks).
    """
    tokens, keys = q.shape[1], k.shape[0]
    whole = q.device.type != "cuda" or q.dtype == torch.float32 or tokens < FEW
    whole |= softcap is not None
    whole |= k.shape[-1] != v.shape[-1] or q.shape[-1] > WIDEST
    if not (whole or _banded(q, window, q_start, k_start)):
        tiles = q.shape[0] * -(-tokens // TILE)
        count = best_parts(tiles, keys, _processors(q.device))
        if count > 1:
            return _in_parts(q, k.to(q.dtype), v.to(q.dtype), scale, count)
    return attend(q, k, v, scale=scale, window=window, q_start=q_start, k_start=k_start,
                  softcap=softcap)


def attend_last(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None = None
) -> list[Partial]:
    """Queries [Hq, T, D] that are the last T of the tokens k, v [n, H, D]; each sees those up to
    its own. Results over disjoint keys, as `attend_parts` gives them.

    FlashAttention's causal mask ends at the last query and key, so few queries ask it once.
    """
    tokens, (n, _, dim) = q.shape[1], k.shape
    plain = q.is_cuda and q.dtype.itemsize == 2 and softcap is None and v.shape[-1] == dim
    if plain and FEW <= tokens <= ONE_CALL and tokens < n and dim % 8 == 0 and dim <= 256:
        args = (q[None], *(x.to(q.dtype).transpose(0, 1)[None] for x in (k, v)))
        out, lse = _flash(args, scale, causal=True)
        return [(out[0], lse.reshape(q.shape[0], -1))]
    past, how = n - tokens, {"scale": scale, "softcap": softcap}
    before = [attend_parts(q, k[:past], v[:past], **how, q_start=past)] if past else []
    return [*before, attend(q, k[past:], v[past:], causal=True, **how)]


def attend_span(
    q: Tensor, k: Tensor, v: Tensor, asked: Tensor, span: Tensor, *, scale: float
) -> list[Partial]:
    """As `attend_last` over the tokens [span[0], span[1]) of k, v [n, H, D].

    span: int32 [2]; asked: int32, 0 and the number of queries. On CUDA both are read where they
    lie, so a captured call serves whatever they say; see `spans` for what is taken there.
    """
    if not q.is_cuda:
        begin, end = span.tolist()
        return attend_last(q, k[begin:end], v[begin:end], scale=scale)
    args = (q.transpose(0, 1), k.to(q.dtype), v.to(q.dtype), asked, span)
    out, lse = torch.ops.aten._flash_attention_forward(
        *args, q.shape[1], len(k), 0.0, True, False, scale=scale
    )[:2]
    return [(out.transpose(0, 1), lse.reshape(q.shape[0], -1))]


def spans(dtype: torch.dtype, dim: int, device: torch.device) -> bool:
    """Whether `attend_span` takes queries of this dtype and width."""
    return device.type != "cuda" or (dtype.itemsize == 2 and dim % 8 == 0 and dim <= 256)


def attend_each(
    q: Tensor, k: Tensor, v: Tensor, bounds: list[int], bounds_there: Tensor, *, scale: float
) -> Tensor:
    """q [N, Hq, D], k and v [N, H, D] of sequences one behind the other -> [N, Hq, D]: each attends
    causally to itself. bounds: where each begins, and the end; bounds_there: the same on the
    device, int32. No mask, no padding: FlashAttention takes them in one call."""
    plain = q.is_cuda and q.dtype.itemsize == 2 and k.dtype == v.dtype == q.dtype
    if plain and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        longest = max(end - begin for begin, end in zip(bounds, bounds[1:]))
        return torch.ops.aten._flash_attention_forward(
            q, k, v, bounds_there, bounds_there, longest, longest, 0.0, True, False, scale=scale
        )[0]
    out = torch.empty_like(q)
    for begin, end in zip(bounds, bounds[1:]):
        own = slice(begin, end)
        part, _ = attend(q[own].transpose(0, 1), k[own], v[own], scale=scale, causal=True)
        out[own] = part.transpose(0, 1)
    return out


def leveled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of one width, which is all that the library takes: zeros change no product.
    """
    missing = k.shape[-1] - v.shape[-1]
    if missing > 0:
        return q, k, pad(v, (0, missing))
    return (*(pad(x, (0, -missing)) for x in (q, k)), v) if missing else (q, k, v)


def _banded(q: Tensor, window: int | None, q_start: int, k_start: int) -> bool:
    """Whether a window hides keys, the first at `k_start`, from queries."""
    return first_seen(q_start + q.shape[1] - 1, window) > k_start


def best_parts(tiles: int, keys: int, processors: int) -> int:
    """Into how many equal parts to cut `keys`, so that `tiles` a part fill whole rounds."""
    best, least = 1, GAIN * -(-tiles // processors)
    for count in range(2, PARTS + 1):
        rounds = -(-tiles * count // processors) / count
        if keys % count == 0 and keys // count >= 8 * TILE and rounds < least:
            best, least = count, rounds
    return best


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _in_parts(q: Tensor, k: Tensor, v: Tensor, scale: float, count: int) -> Partial:
    args = (q.expand(count, *q.shape).contiguous(),
            *(x.unflatten(0, (count, -1)).transpose(1, 2) for x in (k, v)))
    out, lse = _library(args, scale, causal=False)
    return out, lse.reshape(count, *q.shape[:2]).float()


def _capped(q: Tensor, k: Tensor, v: Tensor, how: dict, q_start: int) -> Partial:
    """By the reference, which no library kernel replaces: so many queries at a time that their
    logits stay bounded."""
    step = max(1, MOST_LOGITS // max(1, q.shape[0] * k.shape[0]))
    done = [attend_ref.attend(q[:, at : at + step], k, v, q_start=q_start + at, **how)
            for at in range(0, max(1, q.shape[1]), step)]  # fmt: skip
    return tuple(torch.cat(x, 1) for x in zip(*done))


def _with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Partial:
    """The bias as further dims of the keys, which queries meet with ones: no q x kv mask.

    Three of the dims hold it to fp32 precision in any dtype.
    """
    more, rest = k.new_zeros(*k.shape[:-1], BIAS_DIMS, dtype=q.dtype), bias.float() / scale
    for dim in range(3):
        more[..., dim] = rest
        rest = rest - more[..., dim].float()
    k, v = torch.cat([k.to(q.dtype), more], -1), pad(v.to(q.dtype), (0, BIAS_DIMS))
    out, lse = attend(pad(q, (0, BIAS_DIMS), value=1.0), k, v, scale=scale)
    return out[..., :-BIAS_DIMS].contiguous(), lse


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Partial:
    heads, tokens, dim = q.shape
    kv_heads = k.shape[1]
    k, v = (x.transpose(0, 1) for x in (k, v))
    if causal:  # query heads cannot be folded into rows: each row has its own horizon
        k, v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
    q = q.reshape(k.shape[0], -1, dim)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], 0.0, causal, scale=scale
    )
    return out[0].reshape(heads, tokens, dim).float(), lse[0].reshape(heads, tokens).float()


def _on_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Partial:
    few = q.shape[1] < FEW and not causal
    if q.dtype == torch.float32 or few:  # neither library kernel takes fp32
        return attend_ref.attend(q, k, v, scale=scale, causal=causal)
    args = (q[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None])
    out, lse = _library(args, scale, causal)
    return out[0], lse.reshape(q.shape[0], -1).float()


def _library(args: tuple[Tensor, Tensor, Tensor], scale: float, causal: bool) -> Partial:
    """out [B, Hq, T, D] and its log-sum-exps, of queries, keys and values [B, heads, n, D].

    cuDNN makes a plan for each shape that it meets, which takes longer than a prompt's attention,
    so only whole tiles ask it: requests have prompts and prefixes of all lengths.
    """
    q, k, _ = args
    whole = q.shape[-2] % TILE == 0 and k.shape[-2] % TILE == 0 and q.shape[-1] <= WIDEST
    try:
        result = _cudnn(args, scale, causal) if whole else None
    except RuntimeError:
        result = None
    return _flash(args, scale, causal) if result is None else result[:2]


def _flash(args: tuple[Tensor, Tensor, Tensor], scale: float, causal: bool) -> Partial:
    return torch.ops.aten._scaled_dot_product_flash_attention(
        *args, 0.0, causal, False, scale=scale
    )[:2]


def _cudnn(args: tuple[Tensor, Tensor, Tensor], scale: float, causal: bool):
    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        *args, None, True, 0.0, causal, False, scale=scale
    )

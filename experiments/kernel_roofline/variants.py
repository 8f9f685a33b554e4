"""Decode and sealing of small groups, beside bf16, int4 and the ways of old, each decode checked
against plain torch.

    python experiments/kernel_roofline/variants.py [FOLDER] [SECONDS]

Writes FOLDER/variants.jsonl row by row, what matters most first. Kernels are compiled by as many
processes as there are cores (about a minute), then timed alone as replayed graphs. Nothing new is
begun after SECONDS.
"""

import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

START = time.time()
SLOTS = 128
SHAPES = [(1, 200_000), (16, 32_768), (64, 1024)]
TILE64, TILE128 = (64, 1, 3, 8), (128, 1, 2, 8)
ARMS = [(name, "as it is", None) for name in ("bf16", "int4", "int4g", "int2g", "int3g", "int3")]
ARMS += [("int3", "setting", s) for s in (TILE64, TILE128)]
ARMS += [(name, "as it is", None) for name in ("k4v2g", "k3v2g", "fp8c", "int8", "int2", "k4v2")]
ARMS += [(name, "setting", s) for name in ("int2g", "int3g")
         for s in (TILE128, (64, 1, 2, 8), (64, 1, 4, 6))]
ARMS += [(name, "old", None) for name in ("int4g", "int3g", "int2g")]
SEALED = ["int4", "int4g", "int2", "int2g", "int3", "int3g", "k4v2", "k4v2g", "int8", "fp8c"]


def prepared(name, way, shape):
    """A decode case and the function that reads it the wanted way."""
    from kvlab.eval.kernels import Shape, decode_case
    from kvlab.format import by_name
    from kvlab.kernel import decode_triton

    if not hasattr(decode_triton, "kept"):
        decode_triton.kept = decode_triton.folds
    decode_triton.folds = (lambda k, v: False) if way == "old" else decode_triton.kept
    return decode_case(by_name(name), Shape(), SLOTS, *shape), decode_triton.paged_decode


def compiled(arm):
    import torch

    name, way, setting = arm
    begun = time.time()
    try:
        for shape in ((1, SLOTS * 3), (16, SLOTS * 3)):  # merged by a second kernel, and by itself
            case, decode = prepared(name, way, shape)
            case.call(decode, setting)()
        torch.cuda.synchronize()
        return arm, None, time.time() - begun
    except Exception as error:
        return arm, f"{type(error).__name__}: {str(error)[:300]}", time.time() - begun


def error_of(name, way, setting):
    """Largest relative error of out and lse over two rows, against plain torch in fp32."""
    import torch

    from kvlab.eval.kernels import Shape, open_store
    from kvlab.format import by_name
    from kvlab.kernel import blocks_ref
    from kvlab.pool import SlabStore

    format, shape, blocks = by_name(name), Shape(kv_heads=2), 5
    store = SlabStore(format.planes(shape.geometry(SLOTS)), 1, 8, "cuda")
    store.commit(list(range(blocks)))
    k, v = (torch.randn(blocks, SLOTS, 2, 128, device="cuda") for _ in range(2))
    k[..., 3] *= 6
    store.write(0, list(range(blocks)), format.quantize(k.bfloat16(), (v + 0.5).bfloat16()))
    tail = open_store(shape, SLOTS, 2)
    ints = lambda *x: torch.tensor(x, dtype=torch.int32, device="cuda")  # noqa: E731
    args = (store.layer(0), format, ints((0, 3, 1), (4, 2, 0)), ints(3, 2), tail.layer(0),
            ints(0, 1), ints(40, 0))
    q = shape.random(2, heads=4)
    _, decode = prepared(name, way, (1, SLOTS))
    out, lse = decode(q, *args, scale=128**-0.5, setting=setting)
    want, want_lse = blocks_ref.paged_decode(q.float(), *args, scale=128**-0.5)
    off = ((out.float() - want).norm() / want.norm()).item()
    return max(off, (lse - want_lse).abs().max().item())


def told(out, **row):
    print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()),
          f"[{time.time() - START:.0f} s]", flush=True)
    with (out / "variants.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def timed(out, arm, shape):
    import torch

    from kvlab.eval.clock import replayed

    name, way, setting = arm
    try:
        case, decode = prepared(name, way, shape)
        us = replayed(case.call(decode, setting), 15)
        told(out, kind="decode", format=name, way=way, setting=setting, rows=shape[0],
             tokens=shape[1], us=us, rate=case.nbytes / us / 1e6)
        return us
    except Exception as error:
        told(out, kind="failed", format=name, way=way, setting=setting, error=str(error)[:300])
        torch.cuda.synchronize()
        return float("inf")


def sealing(out, late):
    from functools import partial

    import torch

    from kvlab.eval.clock import replayed
    from kvlab.eval.kernels import Shape, open_store, random_store
    from kvlab.format import by_name
    from kvlab.kernel import seal_triton

    shape, tokens = Shape(), 16_384
    for held in (True, False):
        seal_triton.HELD = held
        for name in SEALED:
            format, count = by_name(name), tokens // SLOTS
            if late() or not held and not name.endswith("g"):
                continue
            store = random_store(format, shape, SLOTS, count, 28)
            x = [shape.random(tokens, heads=8) for _ in range(2)]
            ids = torch.randperm(count, device="cuda")
            us = replayed(partial(seal_triton.seal, *x, format, store.layer(0), ids))
            wrong = differing(format, store.layer(0), x, ids)
            tail, one = open_store(shape, SLOTS, 8, 28), ids[:1] % 8
            few = replayed(partial(seal_triton.seal_open, tail.layer(0), store.layer(0), format,
                                   one, one, 28))
            told(out, kind="seal", format=name, held=held, seal_us=us, seal_open_us=few,
                 differing_bytes=wrong)


def differing(format, planes, x, ids):
    """Bytes of the first block that are not the reference's."""
    import torch

    from kvlab.kernel.blocks_ref import block_views

    want = format.quantize(*(y[None, :SLOTS] for y in x))
    pairs = [(want[name][0], view) for name, view in block_views(planes, int(ids[0])).items()]
    raw = [[y.contiguous().flatten().view(torch.uint8) for y in pair] for pair in pairs]
    return sum(int((a != b).sum()) for a, b in raw)


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/variants")
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 150
    out.mkdir(parents=True, exist_ok=True)
    late = lambda: time.time() - START > seconds  # noqa: E731
    workers = max(1, (os.cpu_count() or 2) - 2)
    good = []
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(compiled, arm) for arm in ARMS]):
            arm, error, took = done.result()
            if error:
                told(out, kind="failed", format=arm[0], way=arm[1], setting=arm[2], error=error)
            else:
                good.append(arm)
    print(f"compiled {len(good)} of {len(ARMS)} [{time.time() - START:.0f} s]", flush=True)
    good.sort(key=ARMS.index)
    for arm in good:
        if late():
            break
        for shape in SHAPES:
            timed(out, arm, shape)
        off = error_of(*arm)
        told(out, kind="error", format=arm[0], way=arm[1], setting=arm[2], error=off)
    sealing(out, late)


if __name__ == "__main__":
    main()

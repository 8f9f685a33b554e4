"""One arm: a prompt through one cache in a process of its own, since cap and peak are a process's.

Reads a JSON object from the command line, appends measurement lines to `out`. Both long-context
experiments run their arms through it.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from kvlab import offload, retrieval, window
from kvlab.cache import CacheSpec
from kvlab.core import Measurement
from kvlab.model.adapter import PagedCache
from kvlab.model.decode import Decoder
from kvlab.model.device import prepare_device
from kvlab.model.fuse import fused
from kvlab.model.load import RandomModel
from kvlab.model.prefill import prefill
from kvlab.model.room import activation_bytes, standing_bytes, weight_bytes
from kvlab.track.environment import revision
from kvlab.track.rows import encode, to_row

ROOMS = {"window": window, "retrieval": retrieval, "offload": offload}
TINY = {"hidden_size": 64, "layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 32,
        "mlp_size": 128, "vocabulary": 8192}  # fmt: skip


def make_spec(axes: dict) -> CacheSpec:
    """`CacheSpec` of plain values; an axis with parameters is {"name": ..., parameter: ...}."""
    made = {n: ROOMS[n].by_name(**v) if isinstance(v, dict) else v for n, v in axes.items()}
    return CacheSpec(**made)


class Peak:
    """The account of the chunk that held most, and a line of the curve for each chunk.

    account: line -> bytes. `cache_peak_bytes` is the most that the cache held at one time within
    that chunk: the chunk's blocks are there before others leave. allocated: the most after a chunk.
    """

    def __init__(self, cache: PagedCache, config, arm: dict):
        self.cache, self.token_bytes, self.done = cache, activation_bytes(config), 0
        self.account, self.allocated = {}, 0
        self.started = time.perf_counter()
        self.curve = Path(arm["out"]).with_suffix(".curve.jsonl")
        self.told = {"variant": arm["name"], "tokens": arm["tokens"]}

    def __call__(self, done: int, total: int) -> None:
        stats = self.cache.stats()
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        line = self.told | {"done": done, "seconds": time.perf_counter() - self.started,
                            "cache_allocated_bytes": stats.allocated_bytes,
                            "cache_peak_bytes": stats.peak_allocated_bytes,
                            "cache_host_bytes": stats.host_bytes, "peak_device_bytes": peak}
        with self.curve.open("a") as file:
            file.write(json.dumps(line) + "\n")
        held = {"cache_peak_bytes": stats.peak_allocated_bytes,
                "workspace_bytes": stats.workspace_bytes,
                "activation_bytes": self.token_bytes * (done - self.done)}  # fmt: skip
        self.account = max(self.account, held, key=lambda lines: sum(lines.values()))
        self.allocated = max(self.allocated, stats.allocated_bytes)
        self.done = done
        self.cache.reset_peak()


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call) -> float:
    sync()
    started = time.perf_counter()
    call()
    sync()
    return time.perf_counter() - started


def account(model, peak: Peak, standing: int, device) -> list[Measurement]:
    """What the device holds at the peak, line by line, beside the measured peak.

    standing: bytes that were there before the cache, besides the weights.
    """
    stats = peak.cache.stats()
    lines = {"weights_bytes": weight_bytes(model), "standing_bytes": standing, **peak.account}
    rows = [Measurement(name, value, "B", "lower") for name, value in lines.items()]
    rows.append(Measurement("accounted_bytes", sum(lines.values()), "B"))
    rows.append(Measurement("cache_allocated_bytes", peak.allocated, "B", "lower"))
    rows.append(Measurement("cache_host_bytes", stats.host_bytes, "B", "lower"))
    rows.append(Measurement("resident_tokens_percent", stats.resident_tokens_percent, "%", "lower"))
    if device.type == "cuda":
        measured = torch.cuda.max_memory_allocated(device)
        rows += [
            Measurement("peak_device_bytes", measured, "B", "lower"),
            Measurement("peak_reserved_bytes", torch.cuda.max_memory_reserved(device), "B",
                        "lower"),
            Measurement("accounted_percent", 100 * sum(lines.values()) / measured, "%"),
        ]  # fmt: skip
    return rows


def warm_up(model, spec: CacheSpec, ids, chunk: int, decode: int) -> None:
    """Compile kernels, plan attention and spill a little, with a cache that is then dropped."""
    cache = PagedCache.for_model(model, spec)
    prefill(model, ids[:, : 3 * chunk + 100], cache, chunk_tokens=chunk)
    decoder = Decoder(model, cache)
    for at in range(min(decode, spec.block_size + 2)):  # a block is sealed, which compiles too
        decoder.step(ids[:, at])
    cache.reset()


def decode_rows(model, cache: PagedCache, ids, count: int) -> list[Measurement]:
    """Tokens a second; the first steps, which compile and capture, are not timed."""
    decoder, first = Decoder(model, cache), min(4, count - 1)
    for at in range(first):
        decoder.step(ids[:, at])
    took = seconds(lambda: [decoder.step(ids[:, at]) for at in range(first, count)])
    count -= first
    return [Measurement("decode_tokens_per_second", count / took, "tokens/s", "higher",
                        count=count),
            Measurement("decode_captured", float(decoder.captured), "")]  # fmt: skip


@torch.inference_mode()
def measure(arm: dict):
    device = prepare_device(arm["device"], arm["cap_gb"])
    model = RandomModel(**TINY if arm["tiny"] else {}, seed=0).load(device).model
    ids = torch.randint(8000, (1, arm["tokens"]), generator=torch.Generator().manual_seed(1))
    ids, spec, chunk = ids.to(device), make_spec(arm["axes"]), arm["chunk_tokens"]
    with fused(model):
        warm_up(model, spec, ids, chunk, arm["decode_tokens"])
        gc.collect()  # its cache and decoder know each other; their buffers would count as ours
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        standing = standing_bytes(model, device)
        cache = PagedCache.for_model(model, spec)
        if spec.offload.keeps:
            took = seconds(lambda: [g.away.shelf.reserve(arm["tokens"]) for g in cache.groups])
            yield [Measurement("host_reserve_seconds", took, "s", "lower")]
        peak = Peak(cache, model.config, arm)
        done = prefill(model, ids, cache, chunk_tokens=chunk, progress=peak)
        yield [Measurement("prefill_seconds", done.seconds, "s", "lower", count=arm["tokens"]),
               Measurement("prefill_tokens_per_second", arm["tokens"] / done.seconds, "tokens/s",
                           "higher", count=arm["tokens"])]  # fmt: skip
        save_logits(arm, done.logits)
        yield account(model, peak, standing, device)
        yield decode_rows(model, cache, ids, arm["decode_tokens"])
        if device.type == "cuda":
            yield [Measurement("peak_device_bytes_with_decode",
                               torch.cuda.max_memory_allocated(device), "B", "lower")]
        cache.check()


def save_logits(arm: dict, logits) -> None:
    """For the comparison of arms that must agree; beside the results file."""
    folder = Path(arm["out"]).with_suffix(".logits")
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{arm['name']}-{arm['tokens']}.npy", logits.float().cpu().numpy())


def main() -> None:
    arm = json.loads(sys.argv[1])
    flat = {n: v["name"] if isinstance(v, dict) else v for n, v in arm["axes"].items()}
    params = {**flat, **{n: arm[n] for n in ("tokens", "chunk_tokens", "cap_gb")},
              "model": "tiny" if arm["tiny"] else "qwen3_0_6b_random", "random_weights": True,
              "run": arm["run"], "commit": revision()["commit"]}  # fmt: skip
    cuda = torch.cuda.is_available() and arm["device"] != "cpu"
    params["device"] = torch.cuda.get_device_name() if cuda else "cpu"
    with open(arm["out"], "a") as file:
        for rows in measure(arm):
            for row in rows:
                file.write(encode(to_row(arm["name"], params, row)) + "\n")
                print(f"{arm['name']} {row.name} {row.value:,.6g} {row.unit}", flush=True)
            file.flush()


if __name__ == "__main__":
    main()

"""kvpress and the library's quantized caches on given token ids, in the environment of `env.sh`.

    python arms.py MODEL ITEMS.jsonl OUT.jsonl --arms snapkv:0.5 adakv:0.5 quanto:4 full

An item is `{"name", "context": [ids], "new_tokens": n, "ends": [ids], "questions": [{"ids": [ids],
"answer": [ids] or []}], "next": [ids] or none}`. A line of the output is `{"arm", "item",
"answers": [[ids]], "nats": [mean loss of the forced answers], "kl": [of each of the next tokens to
the full cache, in nats], "prefill_seconds", "bytes", "freed"}`: bytes as the cache's tensors have
them; freed: false where a press only masks keys and the bytes are all there still. An arm that
cannot run here has one line, `{"arm", "refused"}` with the reason. OUT may be /dev/stdout.

The number of an arm is the share of tokens that is removed, as kvpress has it, or bits.
"""

import argparse
import copy
import json
import time
from contextlib import nullcontext

import kvpress
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache

PRESSES = {
    "keydiff": lambda r: kvpress.KeyDiffPress(r),
    "snapkv": lambda r: kvpress.SnapKVPress(r),
    "expected_attention": lambda r: kvpress.ExpectedAttentionPress(r),
    "tova": lambda r: kvpress.TOVAPress(r),
    "streaming_llm": lambda r: kvpress.StreamingLLMPress(r),
    "lagkv": lambda r: kvpress.LagKVPress(r),
    "compactor": lambda r: kvpress.CompactorPress(r),
    "observed_attention": lambda r: kvpress.ObservedAttentionPress(r),
    "kvzip": lambda r: kvpress.KVzipPress(r),
    "kvzip_layerwise": lambda r: kvpress.KVzipPress(r, layerwise=True),
    "adakv": lambda r: kvpress.AdaKVPress(kvpress.SnapKVPress(r)),
    "random": lambda r: kvpress.RandomPress(r),
}
MASKING = {"kvzip", "kvzip_layerwise", "adakv"}  # keys stay and are hidden from attention
EAGER = {"observed_attention"}  # asks for attention weights
BITS = {"quanto": (2, 4), "hqq": (1, 2, 3, 4, 8)}  # of the library's quantized caches


class Refused(Exception):
    """Why an arm cannot run here."""


def cache_of(model, name, number):
    """An empty cache of an arm. Raises `Refused`."""
    if name not in BITS and name not in PRESSES and name != "full":
        raise Refused(f"no such arm: full, {', '.join([*PRESSES, *BITS])}")
    if name not in BITS:
        return DynamicCache(config=model.config)
    if int(number) not in BITS[name]:
        raise Refused(f"{name} has {', '.join(map(str, BITS[name]))} bits and not {number:g}")
    try:
        return QuantizedCache(name, config=model.config, nbits=int(number))
    except ImportError as error:
        raise Refused(f"{name} is not installed here: {error}") from error


def filled(model, name, number, ids):
    """A cache with the context `ids` [1, T], and the seconds that it took. Raises `Refused`."""
    cache = cache_of(model, name, number)
    press = PRESSES[name](number)(model) if name in PRESSES and number > 0 else nullcontext()
    for module in model.modules():  # or the arm before would hide keys of this one
        if hasattr(module, "masked_key_indices"):
            module.masked_key_indices = None
    model.set_attn_implementation("eager" if name in EAGER else "sdpa")
    wait(model)
    start = time.perf_counter()
    with press:
        model.model(input_ids=ids, past_key_values=cache)
    wait(model)
    took = time.perf_counter() - start
    model.set_attn_implementation("sdpa")
    return cache, took


def wait(model):
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def nbytes(thing, seen):
    """Of all tensors that hang on a cache, each storage once."""
    if isinstance(thing, torch.Tensor):
        names = getattr(type(thing), "__tensor_flatten__", None)
        if names is not None:
            return sum(nbytes(getattr(thing, n), seen) for n in thing.__tensor_flatten__()[0])
        storage = thing.untyped_storage()
        new = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() if new else 0
    if isinstance(thing, dict):
        return sum(nbytes(x, seen) for x in thing.values())
    if isinstance(thing, (list, tuple)):
        return sum(nbytes(x, seen) for x in thing)
    return sum(nbytes(x, seen) for x in vars(thing).values()) if hasattr(thing, "__dict__") else 0


def ask(model, cache, past, question, item):
    """Tokens of the greedy answer, and the mean loss of the forced one (None without); the cache
    goes on with them."""
    answer = question["answer"]
    given = question["ids"] + answer[:-1]
    at = torch.arange(past, past + len(given), device=model.device)[None]
    ids = torch.tensor([given], device=model.device)
    logits = model(input_ids=ids, past_key_values=cache, position_ids=at).logits[0].float()
    if answer:
        right = torch.tensor(answer, device=model.device)
        return [], torch.nn.functional.cross_entropy(logits[-len(answer) :], right).item()
    told, ends = [int(logits[-1].argmax())], set(item["ends"])
    while len(told) < item["new_tokens"] and told[-1] not in ends:
        place = torch.tensor([[past + len(given) + len(told) - 1]], device=model.device)
        ids = torch.tensor([told[-1:]], device=model.device)
        out = model(input_ids=ids, past_key_values=cache, position_ids=place).logits[0, -1]
        told.append(int(out.argmax()))
    return told, None


def logs(model, cache, past, ids):
    """Log probabilities [T, V] behind the context, in float32; the cache goes on with `ids`."""
    at = torch.arange(past, past + len(ids), device=model.device)[None]
    ids = torch.tensor([ids], device=model.device)
    out = model(input_ids=ids, past_key_values=cache, position_ids=at)
    return out.logits[0].float().log_softmax(-1)


def rows(model, item, arms, refused):
    """A line for each arm on one item; `refused` notes those that cannot run, once."""
    ids = torch.tensor([item["context"]], device=model.device)
    if after := item.get("next"):
        full = logs(model, filled(model, "full", 0, ids)[0], ids.shape[1], after)
    for arm in arms:
        if arm in refused:
            continue
        name, _, number = arm.partition(":")
        try:
            cache, seconds = filled(model, name, float(number or 0), ids)
        except (Refused, RuntimeError, AssertionError) as error:  # memory, a press's own demands
            refused.add(arm)
            yield {"arm": arm, "refused": str(error)}
            continue
        size = nbytes(cache.layers, set())
        told, kl = [], []
        if after:
            own = logs(model, copy.deepcopy(cache), ids.shape[1], after)
            kl = (full.exp() * (full - own)).sum(-1).tolist()
        for question in item["questions"]:
            if name in BITS:  # whose tensors have no copies
                own = filled(model, name, float(number), ids)[0] if told else cache
            else:
                own = copy.deepcopy(cache)
            told.append(ask(model, own, ids.shape[1], question, item))
        yield {"arm": arm, "item": item["name"], "answers": [a for a, _ in told],
               "nats": [n for _, n in told], "kl": kl, "prefill_seconds": seconds,
               "bytes": size, "freed": name not in MASKING}


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("items")
    parser.add_argument("out")
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    AutoTokenizer.from_pretrained(given.model)  # kvzip asks for it by the model's path
    model = AutoModelForCausalLM.from_pretrained(
        given.model, dtype=getattr(torch, given.dtype), attn_implementation="sdpa"
    ).to(device).eval()
    with open(given.items) as lines, open(given.out, "w") as out:
        refused = set()
        for item in map(json.loads, lines):
            for row in rows(model, item, given.arms, refused):
                print(json.dumps(row), file=out, flush=True)


if __name__ == "__main__":
    main()

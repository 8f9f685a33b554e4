"""kvpress and the library's quantized caches on given token ids, in the environment of `env.sh`.

    python arms.py MODEL ITEMS.jsonl OUT.jsonl --arms snapkv:0.5 adakv:0.5 quanto:4 full

An item is `{"name", "context": [ids], "new_tokens": n, "ends": [ids], "questions": [{"ids": [ids],
"answer": [ids] or []}]}`. A line of the output is `{"arm", "item", "answers": [[ids]], "nats":
[mean loss of the forced answers], "prefill_seconds", "bytes", "freed"}`: bytes as the cache's
tensors have them; freed: false where a press only masks keys and the bytes are all there still.

The number of an arm is the share of tokens that is removed, as kvpress has it, or bits.
"""

import argparse
import copy
import json
import time

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
    "kvzip": lambda r: kvpress.KVzipPress(r),
    "adakv": lambda r: kvpress.AdaKVPress(kvpress.SnapKVPress(r)),
    "random": lambda r: kvpress.RandomPress(r),
}
MASKING = {"kvzip", "adakv"}  # keys stay and are hidden from attention
BITS = {"quanto", "hqq"}


def filled(model, name, number, ids):
    """A cache with the context `ids` [1, T], and the seconds that it took."""
    if name in BITS:
        cache = QuantizedCache(name, config=model.config, nbits=int(number))
    else:
        cache = DynamicCache(config=model.config)
    wait(model)
    start = time.perf_counter()
    if name in PRESSES and number > 0:
        with PRESSES[name](number)(model):
            model.model(input_ids=ids, past_key_values=cache)
    else:
        model.model(input_ids=ids, past_key_values=cache)
    wait(model)
    return cache, time.perf_counter() - start


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
    """Tokens of the greedy answer, and the mean loss of the forced one (None without)."""
    cache, answer = copy.deepcopy(cache), question["answer"]
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


@torch.no_grad()
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
        for item in map(json.loads, lines):
            ids = torch.tensor([item["context"]], device=device)
            for arm in given.arms:
                name, _, number = arm.partition(":")
                cache, seconds = filled(model, name, float(number or 0), ids)
                size = nbytes(cache.layers, set())
                told = [ask(model, cache, ids.shape[1], q, item) for q in item["questions"]]
                row = {"arm": arm, "item": item["name"], "answers": [a for a, _ in told],
                       "nats": [n for _, n in told], "prefill_seconds": seconds, "bytes": size,
                       "freed": name not in MASKING}
                out.write(json.dumps(row) + "\n")
                out.flush()


if __name__ == "__main__":
    main()

"""What a residual would be worth: the newest N tokens read as computed, beside N = 0.

    python experiments/real_formats/residual.py MODEL.gguf [TOKENS] [BOOKS]

Fake quantization: one forward over a text, in which each query reads a token as stored once its
block is full and N newer tokens are there, else as computed. That is what decoding token by token
would read. KL in nats to the full cache, over the second half of the tokens.
"""

import sys
from itertools import product

import torch
from transformers import AttentionInterface

from kvlab.eval.data import Books
from kvlab.format import by_name
from kvlab.model.load import GgufModel

STATE = {}


def stored(format, slots, k, v):
    """Keys and values [H, T, D] as blocks of `slots` tokens read them, open ones as they are."""
    whole, sinks = k.shape[1] // slots * slots, format.sinks
    pair = []
    for x in (k, v):
        x = x[:, :whole].transpose(0, 1).clone()
        x[:sinks] = x[sinks]
        pair.append(x.unflatten(0, (-1, slots)))
    read = format.dequantize(format.quantize(*pair), torch.float32)
    out = []
    for x, y in zip((k, v), read):
        y = torch.cat([y.flatten(0, 1).transpose(0, 1), x[:, whole:]], 1)
        y[:, :sinks] = x[:, :sinks]
        out.append(y)
    return out


def attend(module, query, key, value, attention_mask, scaling, **_):
    q, k, v = query[0], key[0], value[0]
    group, tokens = q.shape[0] // k.shape[0], q.shape[1]
    i = torch.arange(tokens)
    if STATE.get("format"):
        slots, residual = STATE["slots"], STATE["residual"]
        sealed = i[:, None] >= ((i // slots + 1) * slots + residual)[None, :]
        pairs = [(k, v, ~sealed), (*stored(STATE["format"], slots, k, v), sealed)]
    else:
        pairs = [(k, v, torch.ones(tokens, tokens, dtype=torch.bool))]
    logits = sum((q @ a.repeat_interleave(group, 0).mT * scaling).masked_fill(~where, 0.0)
                 for a, _, where in pairs)
    p = logits.masked_fill(i[None, :] > i[:, None], -torch.inf).softmax(-1)
    out = sum((p * where) @ b.repeat_interleave(group, 0) for _, b, where in pairs)
    return out.transpose(0, 1)[None], None


def main():
    path, tokens, books = sys.argv[1], *(int(x) for x in (*sys.argv[2:], 1024, 2)[:2])
    AttentionInterface.register("residual_study", attend)
    loaded = GgufModel(path).load("cpu")
    model = loaded.model.float()
    model.set_attn_implementation("residual_study")
    documents = Books().documents(loaded.tokenizer, books, tokens)
    ids = [torch.from_numpy(d.ids).long()[None] for d in documents]
    half = slice(tokens // 2, tokens)
    with torch.inference_mode():
        STATE.clear()
        full = [model(x, use_cache=False).logits[0, half].log_softmax(-1) for x in ids]
        for name, slots, residual in product(("int4g", "int2g"), (32, 128), (0, 32, 128)):
            STATE.update(format=by_name(name), slots=slots, residual=residual)
            kl = []
            for x, want in zip(ids, full):
                got = model(x, use_cache=False).logits[0, half].log_softmax(-1)
                kl.append((want.exp() * (want - got)).sum(-1).mean().item())
            told = " ".join(f"{x:.5f}" for x in kl)
            print(f"{name} block {slots} residual {residual}: KL {sum(kl) / len(kl):.5f} ({told})",
                  flush=True)


if __name__ == "__main__":
    main()

"""Which code and which widths by layer lose less at equal bits? Fake quantization of a checkpoint.

    python experiments/real_formats/designs.py MODEL.gguf OUT.jsonl [TOKENS BOOKS LEARNED DEVICE]

Blocks of 128 tokens are stored behind each chunk's attention (chunks of 512), four first tokens as
computed. First one layer's keys or values at a time, on LEARNED books: what each codec loses there.
Then widths by layer for the bytes of the uniform formats (`kvlab.eval.allotment`), and both judged
on the first BOOKS other books. All of it in the codecs that the product has (`stored`), and again
with codes that are rounded one channel after the other, each taking over the error of those before
it as far as queries (for keys: their second moments so far) or the output projection (for values)
cannot tell them apart (`fed`; GPTQ, https://arxiv.org/abs/2210.17323). Bits do not change with it:
they are those of sealed blocks, scales included; first tokens come on top, 4 of each text for all.
LEARNED 0: the uniform formats only.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import product

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from kvlab.eval.allotment import Choice, allot
from kvlab.eval.data import Books
from kvlab.format.names import key_codec, value_codec
from kvlab.kernel.quantize_ref import rotate
from kvlab.model import cache_parameter
from kvlab.model.load import GgufModel

SLOTS, SINKS, CHUNK = 128, 4, 512
CODECS = ("int8", "int4g", "int3g", "int2g")
UNIFORM = (("int4g", "int4g"), ("int3g", "int3g"), ("int4g", "int2g"), ("int3g", "int2g"),
           ("int2g", "int2g"))  # fmt: skip
DAMP = 0.03  # of the mean diagonal of second moments
STATE = {}


def read_back(codec, x: Tensor) -> Tensor:
    """[H, T, D] as its sealed blocks read it."""
    blocks = x.transpose(0, 1).unflatten(0, (-1, SLOTS))  # [N, S, H, D]
    return codec.dequantize(codec.quantize(blocks), torch.float32).flatten(0, 1).transpose(0, 1)


def fed_back(codec, x: Tensor, moment: Tensor) -> Tensor:
    """The same codec's scales, its codes rounded with feedback. moment [H, D, D]: of what looks."""
    inner, turned = codec, codec.rotated
    if turned:
        inner, x = codec.codec, rotate(x)
        moment = rotate(rotate(moment).mT)
    blocks = x.transpose(0, 1).unflatten(0, (-1, SLOTS))
    planes = inner.quantize(blocks)
    scale, zero, mean = steps(inner, planes)  # [N, H, S, D] each
    left = blocks.transpose(1, 2).clone()  # [N, H, S, D]
    eye = torch.eye(x.shape[-1], device=x.device)
    damp = DAMP * moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    upper = torch.linalg.cholesky(torch.linalg.inv(moment + damp * eye)).mT  # [H, D, D]
    top, out = 2**inner.bits - 1, torch.empty_like(left)
    for d in range(x.shape[-1]):
        at = (left[..., d] - mean[..., d] - zero[..., d]) / scale[..., d]
        out[..., d] = at.round().clamp(0, top) * scale[..., d] + zero[..., d] + mean[..., d]
        off = (left[..., d] - out[..., d]) / upper[None, :, None, d, d]
        left[..., d + 1 :] -= off[..., None] * upper[None, :, None, d, d + 1 :]
    out = out.transpose(1, 2).flatten(0, 1).transpose(0, 1)
    return rotate(out) if turned else out


def steps(codec, planes: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero and mean of each element, [N, H, S, D], of a `Grouped` codec's planes."""
    shape = codec.unpack(planes).shape
    unit = planes["unit"].float()[..., None, None]
    made = []
    for name in ("scale", "zero"):
        each = (planes[name].float() * unit).unsqueeze(-1).expand(*planes[name].shape,
                                                                  codec.span(*shape[-2:]))
        made.append(codec._joined(each, shape[-2]))
    mean = planes["mean"].float().unsqueeze(-2) if "mean" in planes else torch.zeros(1)
    return (*made, mean.to(made[0].device).expand(shape))


def seal(layer: int, side: str, x: Tensor) -> Tensor:
    """What layer's keys or values [H, T, D] read as behind this chunk."""
    name, way = STATE["plan"].get((layer, side), (None, None))
    if name is None:
        return x
    codec = STATE["codecs"][side, name]
    if way == "fed" and name.endswith("g"):
        moment = STATE["moments"][layer] if side == "keys" else STATE["outputs"][layer]
        return fed_back(codec, x.float(), moment).to(x.dtype)
    return read_back(codec, x.float()).to(x.dtype)


def attend(module, query, key, value, attention_mask, scaling, **_):
    """Attention of one chunk over all; then its blocks are stored."""
    cache, layer, tokens = STATE["cache"], module.layer_idx, query.shape[2]
    past, group = key.shape[2] - tokens, query.shape[1] // key.shape[1]
    at = torch.arange(key.shape[2], device=query.device)
    mask = at[None, :] <= at[past:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), mask,
        scale=scaling)  # fmt: skip
    if STATE["plan"]:
        q = query[0].float().unflatten(0, (-1, group)).flatten(1, 2)  # [H, group T, D]
        held = STATE["moments"].get(layer, 0)
        STATE["moments"][layer] = held + q.mT @ q
        for side, place in (("keys", "keys"), ("values", "values")):
            if (layer, side) in STATE["plan"]:
                x = getattr(cache.layers[layer], place)
                new = x[0, :, past:].clone()
                if past == 0:  # they set no scales
                    new[:, :SINKS] = new[:, SINKS : SINKS + 1]
                new = seal(layer, side, new)
                if past == 0:
                    new[:, :SINKS] = x[0, :, :SINKS]
                setattr(cache.layers[layer], place, torch.cat([x[:, :, :past], new[None]], 2))
    return out.transpose(1, 2), None


@torch.inference_mode()
def log_probs(model, ids: Tensor, plan: dict) -> Tensor:
    """[T, V] in 16 bits, of one document in chunks."""
    STATE.update(plan=plan, cache=DynamicCache(), moments={})
    told = []
    for part in ids.split(CHUNK):
        out = model(part[None], use_cache=True, **{cache_parameter(model): STATE["cache"]})
        told.append(out.logits[0].float().log_softmax(-1).half())
    return torch.cat(told)


def loss(model, documents, full, plan) -> tuple[float, float]:
    """KL in nats to the full cache behind the first chunk, and the change of perplexity in %."""
    kl, more, count = 0.0, 0.0, 0
    for ids, want in zip(documents, full):
        got = log_probs(model, ids, plan)[CHUNK:]
        for a, b in zip(want[CHUNK:].split(512), got.split(512)):
            kl += float((a.float().exp() * (a.float() - b.float())).nan_to_num(0.0).sum())
        target = ids[CHUNK + 1 :, None]
        pick = [x[: len(target)].float().gather(1, target).sum() for x in (want[CHUNK:], got)]
        more, count = more + float(pick[0] - pick[1]), count + len(got)
    return kl / count, 100 * (torch.tensor(more / count).exp().item() - 1)


def nbytes(side: str, name: str, heads: int, dim: int) -> int:
    codec = STATE["codecs"][side, name]
    return sum(p.nbytes for p in codec.planes(SLOTS, heads, dim).values())


def prepare(path: str, device: str):
    """The model with our attention, its shape, and what its output projections make of values."""
    AttentionInterface.register("designs", attend)
    loaded = GgufModel(path).load(device)
    model, config = loaded.model, loaded.model.config
    model.set_attn_implementation("designs")
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    STATE["codecs"] = {("keys", n): key_codec(n) for n in CODECS} | {
        ("values", n): value_codec(n) for n in CODECS}
    STATE["outputs"] = {}
    for n, layer in enumerate(model.model.layers):
        w = layer.self_attn.o_proj.weight.detach().float().unflatten(1, (heads, -1, dim))
        w = w.permute(1, 2, 0, 3).flatten(1, 2)  # [H, group hidden, D]
        STATE["outputs"][n] = w.mT @ w
    return loaded, model, layers, heads, dim


def main() -> None:
    path, told = sys.argv[1:3]
    numbers = [int(n) for n in sys.argv[3:6]] + [4096, 6, 2][len(sys.argv[3:6]) :]
    tokens, books, learned = numbers
    loaded, model, layers, heads, dim = prepare(path, sys.argv[6] if len(sys.argv) > 6 else "cpu")
    device = next(model.parameters()).device
    all_books = [torch.from_numpy(d.ids).long().to(device)
                 for d in Books().documents(loaded.tokenizer, books + learned, tokens)]
    judged, taught = all_books[:books], all_books[books:]
    start = time.time()

    def say(**row) -> None:
        print(f"{time.time() - start:6.0f} s {json.dumps(row)}", flush=True)
        with open(told, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    full = {part: [log_probs(model, ids, {}) for ids in group]
            for part, group in (("judged", judged), ("taught", taught))}
    places = list(product(range(layers), ("keys", "values")))
    elements = 2 * layers * heads * SLOTS * dim
    size = {(s, n): nbytes(s, n, heads, dim) for s in ("keys", "values") for n in CODECS}
    for pair, way in product(UNIFORM[::-1], ("stored", "fed")):  # widest loss first
        plan = {(n, s): (pair[s == "values"], way) for n, s in places}
        bits = 8 * layers * (size["keys", pair[0]] + size["values", pair[1]]) / elements
        kl, ppl = loss(model, judged, full["judged"], plan)
        say(design="uniform", way=way, format="/".join(pair), bits=bits, kl=kl, ppl=ppl)
    if not learned:
        return
    lost = {}
    for place, name in product(places, CODECS):
        lost[place, name] = max(0.0, loss(model, taught, full["taught"],
                                          {place: (name, "stored")})[0])  # fmt: skip
        say(layer=place[0], side=place[1], codec=name, kl=lost[place, name])
    items = [[Choice(lost[place, n], size[place[1], n]) for n in CODECS] for place in places]
    for pair, way in product(UNIFORM, ("stored", "fed")):
        room = layers * (size["keys", pair[0]] + size["values", pair[1]])
        names = [CODECS[n] for n in allot(items, room)]
        kl, ppl = loss(model, judged, full["judged"],
                       {place: (name, way) for place, name in zip(places, names)})
        say(design="by layer", way=way, format="/".join(pair), bits=8 * room / elements, kl=kl,
            ppl=ppl, keys=names[::2], values=names[1::2])


if __name__ == "__main__":
    main()

import json, sys, time, os, traceback
from contextlib import nullcontext
import torch
from transformers import StaticCache, DynamicCache
from transformers.cache_utils import Cache
sys.path.insert(0, "experiments/kernel_roofline")
import bench
from kvlab.core import CacheGeometry
from kvlab.format import by_name
from kvlab.kernel import layer_triton as lt, layer_ref as lr
from kvlab.kernel.decode_triton import paged_decode
from kvlab.kernel.seal_triton import append
from kvlab.model.adapter import PagedLayer, ATTENTION
from kvlab.model.fuse import fused
from kvlab.model.load import RandomModel
from kvlab.pool import SlabStore
out = open(os.environ["OUT"] + "/probe.jsonl", "a")
T0 = time.time()
def report(**row):
    row["at"] = round(time.time() - T0, 1)
    print(json.dumps(row), flush=True); out.write(json.dumps(row) + "\n"); out.flush()
def guard(f):
    try: f()
    except Exception as e: report(error=f.__name__, text=repr(e)[:300]); traceback.print_exc()
def us(call, n=21):
    call(); call(); torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): call()
    return bench.timed(g.replay, n)

model = RandomModel().load("cuda").model
L = model.model.layers
report(what="loaded")
def chains(rows):
    x = torch.randn(rows, 1024, device="cuda").bfloat16(); h = torch.randn(rows, 3072, device="cuda").bfloat16()
    o = torch.randn(rows, 2048, device="cuda").bfloat16()
    def qkv(ops): 
        for l in L: ops.norm_linear(x, l.input_layernorm.weight, 1e-6, (l.self_attn.q_proj.weight, l.self_attn.k_proj.weight, l.self_attn.v_proj.weight))
    def oproj(ops):
        for l in L: ops.linear_add(o, l.self_attn.o_proj.weight, x)
    def gated(ops):
        for l in L: ops.gated_linear(x, l.post_attention_layernorm.weight, 1e-6, l.mlp.gate_proj.weight, l.mlp.up_proj.weight)
    def down(ops):
        for l in L: ops.linear_add(h, l.mlp.down_proj.weight, x)
    return dict(qkv=(qkv, 8.39e6, 28), o=(oproj, 4.19e6, 28), gated=(gated, 12.58e6, 28), down=(down, 6.29e6, 28))
def head(rows):
    x = torch.randn(rows, 1024, device="cuda").bfloat16()
    w = model.lm_head.weight
    return dict(head=((lambda ops: ops.norm_linear(x, None, 0.0, (w,))), 311e6, 1))
def micro():
    c = {**chains(1), **head(1)}
    for name, (f, size, n) in c.items():
        t = us(lambda: f(lr)) / n; report(op=name, how="torch", us=round(t, 2), gbs=round(size / t / 1e3))
        old, step = lt._share, lt.STEP
        for R in (2, 4, 8, 16):
            for KB in (512, 1024, 2048):
                if KB * R > 16384 or (name in ("qkv", "gated", "head") and KB > 1024): continue
                lt._share, lt.STEP = (lambda o, g: R), KB
                t = us(lambda: f(lt)) / n; report(op=name, R=R, KB=KB, us=round(t, 2), gbs=round(size / t / 1e3))
        lt._share, lt.STEP = old, step
        t = us(lambda: f(lt)) / n; report(op=name, how="default", us=round(t, 2), gbs=round(size / t / 1e3))
        e = lt._early; lt._early = lambda d: {"EARLY": False}
        t = us(lambda: f(lt)) / n; report(op=name, how="default, no pdl", us=round(t, 2), gbs=round(size / t / 1e3))
        lt._early = e
def micro16():
    c = {**chains(16), **head(16)}
    for name, (f, size, n) in c.items():
        t = us(lambda: f(lr)) / n; report(op=name, rows=16, how="torch", us=round(t, 2), gbs=round(size / t / 1e3))
        old = lt.TILE
        for tile in [(16, 256, 4, 4), (16, 128, 4, 5), (16, 256, 2, 4), (32, 128, 4, 4), (32, 256, 4, 3), (32,128,8,5)]:
            lt.TILE = tile
            t = us(lambda: f(lt)) / n; report(op=name, rows=16, tile=tile, us=round(t, 2), gbs=round(size / t / 1e3))
        lt.TILE = old

class StepLayer(PagedLayer):
    pass
class StandIn(Cache):
    def __init__(self, rows, tokens, name="bf16", S=64, wide=1):
        fmt = by_name(name); g = CacheGeometry(28, 16, 8, 128, S)
        nb = tokens // S
        self.fmt = fmt
        self.store = SlabStore(fmt.planes(g), 28, 1024 // S, "cuda"); self.store.commit(list(range(rows * nb)))
        for s in self.store.slabs:
            for n, v in self.store._views[s].items(): bench.noise(v, n)
        tail = by_name("bf16").planes(g)
        self.tail = SlabStore(tail, 28, 1, "cuda"); self.tail.commit(list(range(rows)))
        for s in self.tail.slabs:
            for n, v in self.tail._views[s].items(): bench.noise(v, n)
        i = lambda x: torch.tensor(x, dtype=torch.int32, device="cuda")
        self.table = torch.zeros(rows, nb * wide, dtype=torch.int32, device="cuda")
        self.table[:, :nb] = torch.randperm(rows * nb, device="cuda").view(rows, nb)
        self.n = i([nb] * rows); self.slot = i(list(range(rows))); self.len = i([5] * rows); self.len1 = self.len + 1
        self.planes = [(self.store.layer(j), self.tail.layer(j)) for j in range(28)]
        Cache.__init__(self, layers=[StepLayer(self, j) for j in range(28)])
    def get_seq_length(self, layer_idx=0): return 0
    seen = 0
    def forward(self, layer, q, mask, scale, window):
        k, v = layer.pending; layer.pending = None
        s, t = self.planes[layer.index]
        append(k[:, :, 0].contiguous(), v[:, :, 0].contiguous(), t, self.slot, self.len)
        o, _ = paged_decode(q[:, :, 0].contiguous(), s, self.fmt, self.table, self.n, t, self.slot, self.len1, scale=scale)
        return o[:, None]
@torch.inference_mode()
def step_time(cache, rows, tokens, fuse):
    ids = torch.randint(0, 8000, (rows, 1), device="cuda"); pos = torch.full((rows, 1), tokens, device="cuda")
    with fused(model) if fuse else nullcontext():
        return us(lambda: model(input_ids=ids, position_ids=pos, past_key_values=cache, use_cache=True, logits_to_keep=1).logits, 51)
def steps():
    model.set_attn_implementation(ATTENTION)
    for rows, tokens, name, S, wide in [(1, 1024, "bf16", 64, 1), (1, 1024, "bf16", 64, 8), (1, 1024, "bf16", 16, 1), (1, 1024, "int4", 128, 1), (16, 1024, "bf16", 64, 1), (1, 8192, "bf16", 64, 1),
                                        (1, 200_000, "bf16", 64, 1), (1, 200_000, "fp8", 128, 1), (1, 200_000, "int4", 128, 1)]:
        c = StandIn(rows, tokens, name, S, wide)
        for fuse in (True, False):
            if not fuse and tokens > 1024: continue
            t = step_time(c, rows, tokens, fuse)
            report(step=name, rows=rows, tokens=tokens, S=S, wide=wide, fused=fuse, us=round(t, 1), toks=round(1e6 / t, 1))
        if tokens == 1024:
            e = lt._early; lt._early = lambda d: {"EARLY": False}
            t = step_time(c, rows, tokens, True)
            report(step=name, rows=rows, tokens=tokens, S=S, fused="no pdl", us=round(t, 1), toks=round(1e6 / t, 1)); lt._early = e
        if (rows, S, name, wide) == (1, 64, "bf16", 1) and tokens == 1024:
            prof(c)
        del c; torch.cuda.empty_cache()
@torch.inference_mode()
def prof(c):
    from torch.profiler import profile, ProfilerActivity
    ids = torch.randint(0, 8000, (1, 1), device="cuda"); pos = torch.full((1, 1), 1024, device="cuda")
    f = lambda: model(input_ids=ids, position_ids=pos, past_key_values=c, use_cache=True, logits_to_keep=1).logits
    with fused(model):
        f(); g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g): f()
    g.replay(); torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(5): g.replay()
        torch.cuda.synchronize()
    print(p.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=60))
def eager_equal():
    model.set_attn_implementation("sdpa")
    ids = torch.randint(0, 8000, (1, 300), device="cuda")
    with torch.inference_mode():
        def run():
            c = DynamicCache(); model(input_ids=ids, past_key_values=c, logits_to_keep=1)
            return torch.stack([model(input_ids=ids[:, i:i+1], past_key_values=c).logits[0, 0] for i in range(20)]).float(), c
        w, c = run()
        with fused(model): g, _ = run()
        report(what="fused vs library logits", rel=float((w - g).norm() / w.norm()), std=float(w.std()), maxdiff=float((w-g).abs().max()))
        t = time.perf_counter()
        with fused(model):
            for i in range(20): model(input_ids=ids[:, :1], past_key_values=c)
            torch.cuda.synchronize()
        report(what="eager fused step ms", ms=(time.perf_counter() - t) * 50)
def static():
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        for fuse in (True, False):
            c = StaticCache(config=model.config, max_cache_len=1100)
            model(input_ids=torch.randint(0, 8000, (1, 1024), device="cuda"), past_key_values=c, logits_to_keep=1)
            t = step_time(c, 1, 1024, fuse); report(peer="static", fused=fuse, us=round(t, 1), toks=round(1e6 / t, 1))
def compiled():
    model.set_attn_implementation("sdpa")
    torch._inductor.config.coordinate_descent_tuning = False
    with torch.inference_mode():
        c = StaticCache(config=model.config, max_cache_len=1100)
        model(input_ids=torch.randint(0, 8000, (1, 1024), device="cuda"), past_key_values=c, logits_to_keep=1)
        f = torch.compile(model.forward, fullgraph=True, dynamic=False)
        ids = torch.randint(0, 8000, (1, 1), device="cuda"); pos = torch.full((1, 1), 1024, device="cuda")
        t = time.time(); f(input_ids=ids, position_ids=pos, past_key_values=c, use_cache=True, logits_to_keep=1); torch.cuda.synchronize()
        report(what="compile seconds", s=time.time() - t)
        t = us(lambda: f(input_ids=ids, position_ids=pos, past_key_values=c, use_cache=True, logits_to_keep=1).logits)
        report(peer="static compiled", us=round(t, 1), toks=round(1e6 / t, 1))
for f in (eager_equal, steps, micro, micro16, static, compiled): guard(f)

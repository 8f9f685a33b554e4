// Attention of step.cu: a block reads a share of the tokens for one key/value head.

constexpr int LANES = DIM / 8, TOKENS = 32 / LANES;      // of a token, of a warp at a time
constexpr int DEPTH = 4, STRIDE = TOKENS * WARPS;        // tokens of a lane at a time; stride
constexpr long HEAD_BYTES = 2L * BLOCK * DIM;

struct Eight {
    float v[8];
};

__device__ Eight eight(uint4 x) {
    const u32 w[4] = {x.x, x.y, x.z, x.w};
    Eight y;
#pragma unroll
    for (int i = 0; i < 4; ++i) y.v[2 * i] = widen(w[i]), y.v[2 * i + 1] = widen(w[i] >> 16);
    return y;
}

__device__ uint4 packed(const Eight& x) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = pack(x.v[2 * i], x.v[2 * i + 1]);
    return make_uint4(w[0], w[1], w[2], w[3]);
}

// Head norm and RoPE of a head whose dims lie eight to a lane, rounded as the cache stores it.
__device__ uint4 turned(uint4 raw, uint4 gain, uint4 cos, uint4 sin, double eps) {
    Eight x = eight(raw), c = eight(cos), s = eight(sin);
    if (NORMED) {
        Eight g = eight(gain);
        float square = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) square += x.v[i] * x.v[i];
#pragma unroll
        for (int j = LANES / 2; j; j /= 2) square += __shfl_xor_sync(~0u, square, j);
        float f = rsqrtf(square * (1.0f / DIM) + (float)eps);
#pragma unroll
        for (int i = 0; i < 8; ++i) x.v[i] *= f * g.v[i];
    }
    float sign = threadIdx.x % LANES < LANES / 2 ? -1 : 1;
    Eight y;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float other = __shfl_xor_sync(~0u, x.v[i], LANES / 2);
        y.v[i] = x.v[i] * c.v[i] + sign * other * s.v[i];
    }
    return packed(y);
}

// A block's share of the row's tokens, the same in all layers.
struct Tokens {
    int sealed, count, own, lo, hi, first;  // first: of this lane; the last is the step's
    bool owner;                             // of the step's token
    u64 keys[DEPTH];                        // of the lane's first tokens in layer 0, 0: none
    bool open[DEPTH];
};

// Address in layer 0 of the key of token `i`.
__device__ u64 place(const Args& a, const Tokens& t, int i) {
    bool open = i >= t.sealed;
    int block = open ? t.own : __ldg(a.table + i / BLOCK), slab = open ? OPEN_SLAB : SLAB;
    int slot = open ? i - t.sealed : i % BLOCK, head = blockIdx.x / SHARES;
    u64 base = __ldg((open ? a.open_base : a.base) + block / slab) + (open ? a.open_k : a.k_at);
    return base + (block % slab * KV + head) * HEAD_BYTES + 2L * slot * DIM;
}

__device__ const u16* key_at(const Args& a, u64 first, bool open, int layer) {
    return (const u16*)(first + layer * (open ? a.open_step : a.step)) + threadIdx.x % LANES * 8;
}

__device__ const u16* value_at(const Args& a, const u16* key, bool open) {
    return key + (long)(open ? a.open_v - a.open_k : a.v_at - a.k_at) / 2;
}

__device__ Tokens tokens(const Args& a) {
    Tokens t;
    t.sealed = __ldg(a.n_blocks) * BLOCK, t.count = t.sealed + __ldg(a.open_now);
    t.own = __ldg(a.open_slot);
    int per = (t.count + SHARES - 1) / SHARES;
    t.lo = blockIdx.x % SHARES * per, t.hi = min(t.lo + per, t.count);
    t.owner = t.lo < t.hi && t.hi == t.count;
    t.first = t.lo + threadIdx.x / LANES;  // TOKENS of a warp, then the next warp's
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
        int token = t.first + i * STRIDE;
        t.open[i] = token >= t.sealed;
        t.keys[i] = token < t.hi && token < t.count - 1 ? place(a, t, token) : 0;
    }
    return t;
}

__device__ void ask(const void* at) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

// What a layer reads and no ring brings, asked for while the one before computes: the lane's first
// tokens, and a line of the gains, each block another one.
__device__ void ask_for(const Args& a, const Tokens& t, int layer) {
    constexpr int WIDE = HIDDEN / 64, NARROW = NORMED * DIM / 64;  // lines of 128 bytes
    const Layer& l = a.layers[layer];
    if (threadIdx.x % 8 == 0)
#pragma unroll
        for (int i = 0; i < DEPTH; ++i)
            if (t.keys[i]) {
                const u16* key = key_at(a, t.keys[i], t.open[i], layer);
                ask(key), ask(value_at(a, key, t.open[i]));
            }
    int line = blockIdx.x;
    if (threadIdx.x || line >= 2 * (WIDE + NARROW)) return;
    const u16* of = line < WIDE ? l.gain : line < 2 * WIDE ? l.mid_gain
        : line < 2 * WIDE + NARROW ? l.q_gain : l.k_gain;
    ask(of + (line < 2 * WIDE ? line % WIDE : (line - 2 * WIDE) % (NARROW + !NARROW)) * 64);
}

__device__ void attend(Shared& s, const Args& a, const Layer& l, const Tokens& t, int layer,
                       u64 turn, uint4 cos, uint4 sin) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % LANES;
    int head = blockIdx.x / SHARES, share = blockIdx.x % SHARES;
    uint4 k[DEPTH], v[DEPTH];
    auto fetch = [&](u64 first, bool open, uint4& k, uint4& v) {
        const u16* key = key_at(a, first, open, layer);
        k = from_global(key, first != 0), v = from_global(value_at(a, key, open), first != 0);
    };
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) fetch(t.keys[i], t.open[i], k[i], v[i]);
    uint4 q_gain = constant(l.q_gain + c * 8, NORMED), k_gain = constant(l.k_gain + c * 8, NORMED);
    const u32* qkv = a.qkv + turn * (HEADS + 2 * KV) * DIM / 2 + c * 4;
    int line = threadIdx.x / LANES;  // one thread asks for each 16 bytes of queries, key and value
    if (line < GROUP + 2 && (line < GROUP || t.owner)) {
        line = line < GROUP ? head * GROUP + line : head + HEADS + (line - GROUP) * KV;
        u64 spins = 0;
        uint4 y = from_global((const u16*)(qkv + line * DIM / 2));
        while (absent(y)) y = from_global((const u16*)(qkv + line * DIM / 2)), check(spins);
        *(uint4*)(s.x + 16 * threadIdx.x) = y;
    }
    meet();
    uint4 raw[GROUP + 2];
#pragma unroll
    for (int i = 0; i < GROUP + 2; ++i) raw[i] = from_shared(address(s.x) + 16 * (i * LANES + c));
    Eight q[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; ++g) q[g] = eight(turned(raw[g], q_gain, cos, sin, a.head_eps));
    uint4 k_new = raw[GROUP], v_new = raw[GROUP + 1];
    if (t.owner) {
        k_new = turned(k_new, k_gain, cos, sin, a.head_eps);
        if (threadIdx.x < LANES) {
            const u16* key = key_at(a, place(a, t, t.count - 1), true, layer);
            *(uint4*)key = k_new, *(uint4*)value_at(a, key, true) = v_new;
        }
    }
    float top[GROUP], sum[GROUP];
    Eight out[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        top[g] = -1e30f, sum[g] = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) out[g].v[i] = 0;
    }
    for (int done = 0; done < t.hi - t.lo; done += DEPTH * STRIDE) {
        bool more = done + DEPTH * STRIDE < t.hi - t.lo;
        uint4 k_next[DEPTH], v_next[DEPTH];
        if (more)
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                int token = t.first + done + (DEPTH + i) * STRIDE;
                bool on = token < t.hi && token < t.count - 1;
                fetch(on ? place(a, t, token) : 0, token >= t.sealed, k_next[i], v_next[i]);
            }
        float logits[DEPTH][GROUP];
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            int token = t.first + done + i * STRIDE;
            if (t.owner && token == t.count - 1) k[i] = k_new, v[i] = v_new;
            Eight x = eight(k[i]);
#pragma unroll
            for (int g = 0; g < GROUP; ++g) {
                float y = 0;
#pragma unroll
                for (int j = 0; j < 8; ++j) y += q[g].v[j] * x.v[j];
#pragma unroll
                for (int j = LANES / 2; j; j /= 2) y += __shfl_xor_sync(~0u, y, j);
                logits[i][g] = token < t.hi ? y * (float)a.scale : -1e30f;
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            float high = top[g];
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) high = fmaxf(high, logits[i][g]);
            float keep = exp2f(top[g] - high);
            top[g] = high, sum[g] *= keep;
#pragma unroll
            for (int j = 0; j < 8; ++j) out[g].v[j] *= keep;
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                float p = logits[i][g] > -1e29f ? exp2f(logits[i][g] - high) : 0;
                Eight x = eight(v[i]);
                sum[g] += p;
#pragma unroll
                for (int j = 0; j < 8; ++j) out[g].v[j] += p * x.v[j];
            }
        }
        if (more)
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) k[i] = k_next[i], v[i] = v_next[i];
    }
    constexpr int ROW = DIM + 2;  // numbers of a warp and head in shared memory
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
#pragma unroll
        for (int j = LANES; j < 32; j *= 2) {
            float other = __shfl_xor_sync(~0u, top[g], j), high = fmaxf(top[g], other);
            float mine = exp2f(top[g] - high), theirs = exp2f(other - high);
            sum[g] = sum[g] * mine + __shfl_xor_sync(~0u, sum[g], j) * theirs, top[g] = high;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                out[g].v[i] = out[g].v[i] * mine + __shfl_xor_sync(~0u, out[g].v[i], j) * theirs;
        }
        float* to = s.part + (warp * GROUP + g) * ROW;
        if (lane < LANES)
#pragma unroll
            for (int i = 0; i < 8; ++i) to[c * 8 + i] = out[g].v[i];
        if (lane == 0) to[DIM] = top[g], to[DIM + 1] = sum[g];
    }
    meet();
    for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) {
        int g = i / DIM, d = i % DIM;
        float high = -1e30f, all = 0, y = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) high = fmaxf(high, s.part[(w * GROUP + g) * ROW + DIM]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float* from = s.part + (w * GROUP + g) * ROW;
            float f = exp2f(from[DIM] - high);
            all += f * from[DIM + 1], y += f * from[d];
        }
        long line = (head * GROUP + g) * SHARES + share;
        long other = (long)HEADS * SHARES * (1 - 2 * (long)turn);
        u32 *to = a.parts + (turn * HEADS * SHARES + line) * DIM + d;
        send(to, to + other * DIM, __float_as_uint(all > 0 ? y / all : 0.0f));
        if (d == 0) {
            to = a.lse + turn * HEADS * SHARES + line;
            send(to, to + other, __float_as_uint(all > 0 ? high + log2f(all) : -1e30f));
        }
    }
    meet();
}

// Merge of what the blocks of a head left, for some of its dims.
__device__ void merge(Shared& s, const Args& a, u64 turn) {
    constexpr int OWN = HEADS * DIM / GRID, AT = THREADS / SHARES;  // dims of a block; at a time
    int share = threadIdx.x / AT, warp = threadIdx.x / 32;
    for (int start = 0; start < OWN; start += AT) {
        int d = blockIdx.x * OWN + start + threadIdx.x % AT;
        long line = turn * HEADS * SHARES + d / DIM * SHARES + share;
        const u32 *parts = a.parts + line * DIM + d % DIM, *lse = a.lse + line;
        u32 part = word(parts), weight = word(lse);
        u64 spins = 0;
        while (part == ABSENT || weight == ABSENT)
            part = word(parts), weight = word(lse), check(spins);
        float top = __uint_as_float(weight), x = __uint_as_float(part), sum = top > -1e29f;
#pragma unroll
        for (int j = AT; j < 32; j *= 2) {
            float other = __shfl_xor_sync(~0u, top, j), high = fmaxf(top, other);
            float mine = exp2f(top - high), theirs = exp2f(other - high);
            x = x * mine * (sum > 0) + __shfl_xor_sync(~0u, x, j) * theirs;
            sum = sum * mine + __shfl_xor_sync(~0u, sum, j) * theirs, top = high;
        }
        float* to = s.part + (warp * AT + threadIdx.x % AT) * 3;
        if (threadIdx.x % 32 < AT) to[0] = top, to[1] = sum, to[2] = x;
        meet();
        if (threadIdx.x < AT) {
            float high = -1e30f, all = 0, y = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) high = fmaxf(high, s.part[(w * AT + threadIdx.x) * 3]);
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float* from = s.part + (w * AT + threadIdx.x) * 3;
                float f = exp2f(from[0] - high);
                all += f * from[1], y += f * from[2];
            }
            y /= all;
            float beside = __shfl_down_sync((1ull << AT) - 1, y, 1);
            if (d % 2 == 0) send_all(a.mixed, turn, MIXED / 2, d / 2, pack(y, beside));
        }
        meet();
    }
}

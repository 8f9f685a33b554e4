// Attention of step.cu: a block reads a share of the tokens for one key/value head.

constexpr int LANES = DIM / 8, TOKENS = 32 / LANES;      // of a token, of a warp at a time
constexpr int STRIDE = TOKENS * WARPS;                   // tokens between two of a lane
constexpr int PIECE_TOKENS = 8 * PIECE / DIM, DEPTH = PIECE_TOKENS / STRIDE;  // of a slot; a lane
constexpr int TOKEN_BYTES = 2 * DIM;
constexpr long HEAD_BYTES = (long)BLOCK * TOKEN_BYTES;

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

// A block's share of the tokens that are stored, the same in all layers. The step's own token is
// with the last share.
struct Tokens {
    int sealed, own, lo, hi;  // sealed tokens of the row; its open block
};

__device__ Tokens tokens(const Args& a) {
    int sealed = __ldg(a.n_blocks) * BLOCK, count = sealed + __ldg(a.open_now) - 1;
    int per = (count + SHARES - 1) / SHARES, lo = min(blockIdx.x % SHARES * per, count);
    return {sealed, __ldg(a.open_slot), lo, min(lo + per, count)};
}

// Address of the key or the value of token `i` in a layer.
__device__ u64 place(const Args& a, const Tokens& t, int i, int layer, bool value) {
    bool open = i >= t.sealed;
    int block = open ? t.own : __ldg(a.table + i / BLOCK), slab = open ? OPEN_SLAB : SLAB;
    int slot = open ? i - t.sealed : i % BLOCK, head = blockIdx.x / SHARES;
    u64 base = __ldg((open ? a.open_base : a.base) + block / slab);
    base += open ? layer * a.open_step + (value ? a.open_v : a.open_k)
                 : layer * a.step + (value ? a.v_at : a.k_at);
    return base + (block % slab * KV + head) * HEAD_BYTES + slot * TOKEN_BYTES;
}

// Keys and values of the share, a slot of the ring each in turn. The lanes copy runs of tokens
// that lie together.
__device__ void stream_tokens(u32 ring, Shared& s, u32& at, const Args& a, const Tokens& t,
                              int layer) {
    for (int lo = t.lo; lo < t.hi; lo += PIECE_TOKENS) {
        int hi = min(lo + PIECE_TOKENS, t.hi), first = lo / BLOCK, last = (hi - 1) / BLOCK;
        for (int value = 0; value < 2; ++value) {
            const u64& full = s.full[at % SLOTS];
            u32 to = vacant(ring, s, at, (hi - lo) * TOKEN_BYTES);
            for (int block = first + threadIdx.x % 32; block <= last; block += 32) {
                int begin = max(lo, block * BLOCK), end = min(hi, (block + 1) * BLOCK);
                copy(to + (begin - lo) * TOKEN_BYTES,
                     (const void*)place(a, t, begin, layer, value),
                     (end - begin) * TOKEN_BYTES, full);
            }
        }
    }
}

// What the threads of a lane's channels know of the tokens so far.
struct Sums {
    float top[GROUP], sum[GROUP];
    Eight out[GROUP];
};

// One more round of `COUNT` tokens a lane; `k`, `v`: 16 bytes of each.
template <int COUNT>
__device__ void add(Sums& y, const Eight* q, const uint4* k, const uint4* v, const bool* on,
                    float scale) {
    float logits[COUNT][GROUP];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        Eight x = eight(k[i]);
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            float z = 0;
#pragma unroll
            for (int j = 0; j < 8; ++j) z += q[g].v[j] * x.v[j];
            logits[i][g] = z;
        }
    }
#pragma unroll
    for (int j = LANES / 2; j; j /= 2)
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
#pragma unroll
            for (int g = 0; g < GROUP; ++g)
                logits[i][g] += __shfl_xor_sync(~0u, logits[i][g], j);
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        float high = y.top[g];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            logits[i][g] = on[i] ? logits[i][g] * scale : -1e30f;
            high = fmaxf(high, logits[i][g]);
        }
        float keep = exp2f(y.top[g] - high);
        y.top[g] = high, y.sum[g] *= keep;
#pragma unroll
        for (int j = 0; j < 8; ++j) y.out[g].v[j] *= keep;
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        Eight x = eight(v[i]);
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            float p = on[i] ? exp2f(logits[i][g] - y.top[g]) : 0;
            y.sum[g] += p;
#pragma unroll
            for (int j = 0; j < 8; ++j) y.out[g].v[j] += p * x.v[j];
        }
    }
}

// The heads of this block, and the step's key and value, as the cache stores them: eights of
// numbers in `heads`, each asked for and turned by one thread.
__device__ void receive_heads(Shared& s, const Args& a, const Layer& l, u64 turn, u32 tag,
                              uint4 cos, uint4 sin) {
    int c = threadIdx.x % LANES, head = blockIdx.x / SHARES, line = threadIdx.x / LANES;
    static_assert((GROUP + 2) * LANES <= THREADS, "a thread for each eight");
    if (threadIdx.x / 32 * 32 < (GROUP + 2) * LANES) {  // whole warps, for what they exchange
        bool on = line < GROUP + 2, key = line == GROUP;
        const u16* gain = key ? l.k_gain : l.q_gain;
        uint4 y = make_uint4(0, 0, 0, 0);
        uint4 gains = NORMED ? __ldg((const uint4*)gain + c) : y;
        if (on) {
            int own = line < GROUP ? head * GROUP + line : head + HEADS + (line - GROUP) * KV;
            const u64* at = a.qkv + (turn * (HEADS + 2 * KV) + own) * DIM / 2 + c * 4;
            u64 w0, w1, w2, w3, spins = 0;
            do look(at, w0, w1), look(at + 2, w2, w3), check(spins);
            while (!(is(w0, tag) && is(w1, tag) && is(w2, tag) && is(w3, tag)));
            y = make_uint4((u32)w0, (u32)w1, (u32)w2, (u32)w3);
        }
        __syncwarp();
        uint4 z = turned(y, gains, cos, sin, a.head_eps);
        if (on) ((uint4*)s.heads)[threadIdx.x] = line > GROUP ? y : z;
    }
    meet();
}

__device__ void attend(const unsigned char* ring, Shared& s, u32& at, const Args& a,
                       const Layer& l, const Tokens& t, int layer, u64 turn, u32 tag, uint4 cos,
                       uint4 sin) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % LANES;
    int head = blockIdx.x / SHARES, share = blockIdx.x % SHARES;
    receive_heads(s, a, l, turn, tag, cos, sin);
    auto line = [&](int i) { return ((const uint4*)s.heads)[i * LANES + c]; };
    Eight q[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; ++g) q[g] = eight(line(g));
    Sums y;
#pragma unroll
    for (int g = 0; g < GROUP; ++g) y.top[g] = -1e30f, y.sum[g] = 0, y.out[g] = Eight{};
    for (int lo = t.lo; lo < t.hi; lo += PIECE_TOKENS) {
        await(s, at, 2);
        const unsigned char* keys = ring + at % SLOTS * SLOT;
        const unsigned char* values = ring + (at + 1) % SLOTS * SLOT;
        constexpr int SOME = DEPTH < 2 ? DEPTH : 2;  // tokens of a lane at a time
#pragma unroll
        for (int start = 0; start < DEPTH; start += SOME) {
            if (lo + start * STRIDE >= t.hi) break;
            uint4 k[SOME], v[SOME];
            bool on[SOME];
#pragma unroll
            for (int i = 0; i < SOME; ++i) {
                int token = threadIdx.x / LANES + (start + i) * STRIDE;
                int where = token * TOKEN_BYTES + 16 * c;
                on[i] = lo + token < t.hi, k[i] = v[i] = make_uint4(0, 0, 0, 0);
                if (on[i])
                    k[i] = *(const uint4*)(keys + where), v[i] = *(const uint4*)(values + where);
            }
            add<SOME>(y, q, k, v, on, (float)a.scale);
        }
        leave(s, at, 2);
    }
    if (share == SHARES - 1 && warp == 0) {
        bool first = lane < LANES;
        uint4 k_new = line(GROUP), v_new = line(GROUP + 1);
        add<1>(y, q, &k_new, &v_new, &first, (float)a.scale);
        int i = t.hi;  // where the step's token belongs
        if (first) {
            *((uint4*)place(a, t, i, layer, false) + c) = k_new;
            *((uint4*)place(a, t, i, layer, true) + c) = v_new;
        }
    }
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
#pragma unroll
        for (int j = LANES; j < 32; j *= 2) {
            float other = __shfl_xor_sync(~0u, y.top[g], j), high = fmaxf(y.top[g], other);
            float mine = exp2f(y.top[g] - high), theirs = exp2f(other - high);
            y.sum[g] = y.sum[g] * mine + __shfl_xor_sync(~0u, y.sum[g], j) * theirs;
            y.top[g] = high;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                y.out[g].v[i] = y.out[g].v[i] * mine
                              + __shfl_xor_sync(~0u, y.out[g].v[i], j) * theirs;
        }
        float* to = s.part + (warp * GROUP + g) * ROW;
        if (lane < LANES)
#pragma unroll
            for (int i = 0; i < 8; ++i) to[c * 8 + i] = y.out[g].v[i];
        if (lane == 0) to[DIM] = y.top[g], to[DIM + 1] = y.sum[g];
    }
    meet();
    for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) {
        int g = i / DIM, d = i % DIM;
        float high = -1e30f, all = 0, x = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) high = fmaxf(high, s.part[(w * GROUP + g) * ROW + DIM]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float* from = s.part + (w * GROUP + g) * ROW;
            float f = exp2f(from[DIM] - high);
            all += f * from[DIM + 1], x += f * from[d];
        }
        long line = turn * HEADS * SHARES + (head * GROUP + g) * SHARES + share;
        send(a.parts + line * DIM + d, __float_as_uint(all > 0 ? x / all : 0.0f), tag);
        if (d == 0)
            send(a.lse + line, __float_as_uint(all > 0 ? high + log2f(all) : -1e30f), tag);
    }
    meet();
}

// Merge of what the blocks of a head left, for some of its dims.
__device__ void merge(Shared& s, const Args& a, u64 turn, u32 tag) {
    constexpr int OWN = HEADS * DIM / GRID, AT = THREADS / SHARES;  // dims of a block; at a time
    int share = threadIdx.x / AT, warp = threadIdx.x / 32;
    for (int start = 0; start < OWN; start += AT) {
        int d = blockIdx.x * OWN + start + threadIdx.x % AT;
        long line = turn * HEADS * SHARES + d / DIM * SHARES + share;
        u64 part, weight, spins = 0;
        do part = look(a.parts + line * DIM + d % DIM), weight = look(a.lse + line), check(spins);
        while (!(is(part, tag) && is(weight, tag)));
        float top = __uint_as_float((u32)weight), x = __uint_as_float((u32)part);
        float sum = top > -1e29f;
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
            if (d % 2 == 0) send(a.mixed + (turn * MIXED + d) / 2, pack(y, beside), tag);
        }
        if (start + AT < OWN) meet();
    }
}

// Attention of step.cu: a block reads a share of the tokens for one key/value head.

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

#include "step_tiles.cuh"

// Keys and values of a lane, COUNT tokens from the `first` of its own in a piece.
template <int COUNT>
struct Lane {
    uint4 k[COUNT], v[COUNT];

    __device__ void read(const unsigned char* keys, const unsigned char* values, int first) {
        int c = threadIdx.x % LANES, token = threadIdx.x / LANES + first * STRIDE;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            int where = (token + i * STRIDE) * TOKEN_BYTES + 16 * c;
            k[i] = *(const uint4*)(keys + where), v[i] = *(const uint4*)(values + where);
        }
    }
};

// COUNT tokens a lane, from token `lo` of the row. The step's own token is the last one; it is not
// in the ring.
template <int COUNT>
__device__ void attend_to(Sums& y, const Eight* q, Lane<COUNT>& own, const Shared& s,
                          const Tokens& t, int lo, double scale) {
    int c = threadIdx.x % LANES;
    bool on[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        int token = lo + threadIdx.x / LANES + i * STRIDE;
        on[i] = token < t.end;
        if (token >= t.hi) {
            own.k[i] = own.v[i] = make_uint4(0, 0, 0, 0);
            if (on[i]) {
                own.k[i] = ((const uint4*)s.heads)[GROUP * LANES + c];
                own.v[i] = ((const uint4*)s.heads)[(GROUP + 1) * LANES + c];
            }
        }
    }
    add<COUNT>(y, q, own.k, own.v, on, (float)scale);
}

// What a warp's lanes know of all their tokens, one below the other in `part` [warp, head, ROW].
__device__ void fold(Shared& s, Sums& y) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % LANES;
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
}

__device__ void send_parts(const Shared& s, const Args& a, u64 turn, u32 tag) {
    int head = blockIdx.x / SHARES, share = blockIdx.x % SHARES;
    for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) {
        int g = i / DIM, d = i % DIM;
        float high = -1e30f, all = 0, x = 0;
#pragma unroll
        for (int w = 0; w < WARPS + TILED; ++w)
            high = fmaxf(high, s.part[(w * GROUP + g) * ROW + DIM]);
#pragma unroll
        for (int w = 0; w < WARPS + TILED; ++w) {
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

__device__ void attend(const unsigned char* ring, Shared& s, u32& at, const Args& a,
                       const Layer& l, const Tokens& t, int layer, u64 turn, u32 tag, uint4 cos,
                       uint4 sin) {
    int c = threadIdx.x % LANES, lo = t.lo;
    auto keys = [&] { return ring + at % SLOTS * SLOT; };
    auto values = [&] { return ring + (at + 1) % SLOTS * SLOT; };
    Lane<DEPTH> first;  // in registers before the queries have come
    constexpr bool HELD = !TILED;  // few tokens are open
    if (HELD) {
        if (t.lo < t.hi) await(s, at, 2);
        first.read(keys(), values(), 0);
        if (t.lo < t.hi) leave(s, at, 2);
    }
    receive_heads(s, a, l, turn, tag, cos, sin);
    if constexpr (TILED) attend_tiles(ring, s, at, a, t);
    auto line = [&](int i) { return ((const uint4*)s.heads)[i * LANES + c]; };
    Eight q[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; ++g) q[g] = eight(line(g));
    Sums y;
#pragma unroll
    for (int g = 0; g < GROUP; ++g) y.top[g] = -1e30f, y.sum[g] = 0, y.out[g] = Eight{};
    if (HELD && t.lo < t.end) attend_to<DEPTH>(y, q, first, s, t, lo, a.scale), lo += PIECE_TOKENS;
    for (; lo < t.end; lo += PIECE_TOKENS) {
        constexpr int SOME = TILED || DEPTH < 2 ? 1 : 2;  // tokens of a lane at a time
        if (lo < t.hi) await(s, at, 2);
#pragma unroll
        for (int start = 0; start < DEPTH; start += SOME) {
            if (lo + start * STRIDE >= t.end) break;
            Lane<SOME> some;
            some.read(keys(), values(), start);
            attend_to<SOME>(y, q, some, s, t, lo + start * STRIDE, a.scale);
        }
        if (lo < t.hi) leave(s, at, 2);
    }
    fold(s, y);
    send_parts(s, a, turn, tag);
    if (t.end > t.hi && threadIdx.x < LANES) {  // the step's token, where it belongs
        *((uint4*)place(a, t, t.hi, layer, false) + c) = line(GROUP);
        *((uint4*)place(a, t, t.hi, layer, true) + c) = line(GROUP + 1);
    }
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
            if (d % 2 == 0)
                send(a.mixed + turn * (MIXED / 2) + d / 2, pack(y, beside), tag);
        }
        if (start + AT < OWN) meet();
    }
}

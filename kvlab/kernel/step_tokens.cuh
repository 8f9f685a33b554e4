// What attention of step.cu reads: a share of the tokens for one key/value head, and its queries.

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

// A block's share of the tokens that are stored, lo to hi, the same in all layers. The step's own
// token is with the last share.
struct Tokens {
    int sealed, own, lo, hi, end, tiles;  // sealed tokens of the row; its open block
};

__device__ Tokens tokens(const Args& a) {
    int stored = __ldg(a.n_blocks) * BLOCK, sealed = TILED ? 0 : stored;  // what is in tiles is not
    int count = sealed + __ldg(a.open_now) - 1;                             // counted here
    int per = (count + SHARES - 1) / SHARES, lo = min(blockIdx.x % SHARES * per, count);
    int hi = min(lo + per, count);
    return {sealed, __ldg(a.open_slot), lo, hi, hi + (blockIdx.x % SHARES == SHARES - 1),
            TILED ? stored / 64 : 0};
}

// Address of the key or the value of token `i` in a layer.
__device__ u64 place(const Args& a, const Tokens& t, int i, int layer, bool value) {
    bool open = i >= t.sealed;
    int block = open ? t.own : __ldg(a.table + i / BLOCK), slab = open ? OPEN_SLAB : SLAB;
    int slot = open ? i - t.sealed : i % BLOCK, head = blockIdx.x / SHARES;
    u64 base = __ldg((open ? a.open_base : a.base) + block / slab);
    base += open ? layer * a.open_step + (value ? a.open_v : a.open_k)
                 : (value ? a.v_at + layer * a.v_step : a.k_at + layer * a.k_step);
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

// Sealed tokens of quantized formats in step.cu: tiles of 64 tokens of a block. Keys lie token by
// token, values channel by channel. Scales and zeros of channels go to the query, those of tokens
// to the logits and the probabilities, so codes become numbers and nothing else.
//
// Macros: KBITS, VBITS of codes (8, 4, 2); KFP8, VFP8: they are e4m3; KCHANNEL: keys have scales by
// channel, else by token, as values have; KZERO, VZERO.

constexpr int TILE = 64, TILES_OF_BLOCK = BLOCK < TILE ? 1 : BLOCK / TILE;
constexpr int K_ROW = DIM * KBITS / 8, V_ROWS = DIM * VBITS / 8;  // bytes of a token; of a slot
constexpr int K_SCALES = KCHANNEL ? DIM : TILE;                   // of a tile
constexpr int SCALE_AT = 8192, ZERO_AT = SCALE_AT + 256;          // in a slot, behind the codes
constexpr int PER_ROW = THREADS / V_ROWS, CHUNK = TILE / PER_ROW;  // threads of a row; their tokens
static_assert(!TILED || BLOCK % TILE == 0, "whole tiles in a block");

__device__ float half(const unsigned char* at, int i) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(((const u16*)at)[i]));
    return y;
}

// Four codes, those at `shift` of each byte of a word.
template <int BITS, bool FP8, bool ZERO>
__device__ void numbers(u32 w, int shift, float* y) {
    if (FP8) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 two;
            asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(two) : "h"((u16)(w >> 16 * i)));
            asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
                : "=f"(y[2 * i]), "=f"(y[2 * i + 1]) : "r"(two));
        }
        return;
    }
    u32 codes = BITS == 8 ? w : (w >> BITS * shift) & (0x01010101u * ((1 << BITS % 8) - 1));
#pragma unroll
    for (int i = 0; i < 4; ++i)  // a byte below the exponent of 2^23
        y[i] = __uint_as_float(__byte_perm(codes, 0x4B000000u, 0x7440 + i))
             - (8388608.0f + (ZERO ? 0 : 1 << (BITS - 1)));
}

// Keys and values of the share's tiles, a slot each in turn.
__device__ void stream_tiles(u32 ring, Shared& s, u32& at, const Args& a, const Tokens& t,
                             int layer) {
    int lane = threadIdx.x % 32;
    long head = blockIdx.x / SHARES;
    for (int tile = blockIdx.x % SHARES; tile < t.tiles; tile += SHARES) {
        int block = __ldg(a.table + tile / TILES_OF_BLOCK), part = tile % TILES_OF_BLOCK;
        u64 base = __ldg(a.base + block / SLAB);
        long line = block % SLAB * KV + head;  // of all heads of the blocks
        const u64& full = s.full[at % SLOTS];
        constexpr int KEYS = TILE * K_ROW, VALUES = TILE * V_ROWS, PER_TOKEN = 2 * TILE;
        u32 to = vacant(ring, s, at, KEYS + (1 + KZERO) * 2 * K_SCALES);
        long scale = KCHANNEL ? line * DIM * 2 : line * BLOCK * 2 + part * PER_TOKEN;
        if (lane == 0)
            copy(to, (const void*)(base + a.k_at + layer * a.k_step + line * BLOCK * K_ROW
                                   + part * KEYS), KEYS, full);
        if (lane == 1)
            copy(to + SCALE_AT, (const void*)(base + a.ks_at + layer * a.ks_step + scale),
                 2 * K_SCALES, full);
        if (KZERO && lane == 2)
            copy(to + ZERO_AT, (const void*)(base + a.kz_at + layer * a.kz_step + scale),
                 2 * K_SCALES, full);
        const u64& other = s.full[at % SLOTS];
        to = vacant(ring, s, at, VALUES + (1 + VZERO) * PER_TOKEN);
        u64 values = base + a.v_at + layer * a.v_step + line * BLOCK * V_ROWS + part * TILE;
        scale = line * BLOCK * 2 + part * PER_TOKEN;
        if (BLOCK == TILE && lane == 0) copy(to, (const void*)values, VALUES, other);
        if (BLOCK > TILE)
            for (int row = lane; row < V_ROWS; row += 32)
                copy(to + row * TILE, (const void*)(values + row * BLOCK), TILE, other);
        if (lane == 1)
            copy(to + SCALE_AT, (const void*)(base + a.vs_at + layer * a.vs_step + scale),
                 PER_TOKEN, other);
        if (VZERO && lane == 2)
            copy(to + ZERO_AT, (const void*)(base + a.vz_at + layer * a.vz_step + scale),
                 PER_TOKEN, other);
    }
}

// What a thread knows of the tiles so far: the same of all tokens, and its channels of its tokens.
struct Rows {
    float top[GROUP], sum[GROUP], out[GROUP][8 / VBITS];
};

// Logits of a tile's tokens.
__device__ void look_at(Shared& s, const unsigned char* keys, float scale) {
    int c = threadIdx.x % LANES, own = threadIdx.x / LANES;
    float q[GROUP][8], zero[GROUP];  // of a lane's codes: byte by byte, shift by shift
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        zero[g] = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            int d = c * KBITS + j % KBITS + j / KBITS * K_ROW;
            q[g][j] = widen(((const u16*)s.heads)[g * DIM + d]);
            if (KZERO) zero[g] += q[g][j] * half(keys + ZERO_AT, d);
            if (KCHANNEL) q[g][j] *= half(keys + SCALE_AT, d);
        }
    }
#pragma unroll
    for (int token = own; token < TILE; token += STRIDE) {
        u32 w[2] = {0, 0};
        const unsigned char* from = keys + token * K_ROW + c * KBITS;
        if (KBITS == 8) w[0] = ((const u32*)from)[0], w[1] = ((const u32*)from)[1];
        else if (KBITS == 4) w[0] = *(const u32*)from;
        else w[0] = *(const u16*)from;
        float x[8], z[GROUP];
        if (KBITS == 8) {
            numbers<KBITS, KFP8, KZERO>(w[0], 0, x), numbers<KBITS, KFP8, KZERO>(w[1], 0, x + 4);
        } else {
#pragma unroll
            for (int shift = 0; shift < 8 / KBITS; ++shift) {
                float four[4];
                numbers<KBITS, KFP8, KZERO>(w[0], shift, four);
#pragma unroll
                for (int i = 0; i < KBITS; ++i) x[shift * KBITS + i] = four[i];
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            z[g] = zero[g];
#pragma unroll
            for (int j = 0; j < 8; ++j) z[g] += q[g][j] * x[j];
#pragma unroll
            for (int j = LANES / 2; j; j /= 2) z[g] += __shfl_xor_sync(~0u, z[g], j);
            if (!KCHANNEL) z[g] *= half(keys + SCALE_AT, token);
            if (c == 0) s.logit[g][token] = z[g] * scale;
        }
    }
    meet();
}

// A warp of each head makes weights of the logits: probabilities times the values' scales.
__device__ void weigh(Shared& s, const unsigned char* values, const Rows& y) {
    int g = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (g < GROUP) {
        float top = y.top[0];
#pragma unroll
        for (int i = 1; i < GROUP; ++i) top = g == i ? y.top[i] : top;
        float a = s.logit[g][lane], b = s.logit[g][lane + 32], high = fmaxf(top, fmaxf(a, b));
#pragma unroll
        for (int j = 16; j; j /= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, j));
        a = exp2f(a - high), b = exp2f(b - high);
        const unsigned char* scale = values + SCALE_AT;
        s.weight[g][lane] = a * half(scale, lane);
        s.weight[g][lane + 32] = b * half(scale, lane + 32);
        float zero = 0;
        if (VZERO)
            zero = over_warp(a * half(values + ZERO_AT, lane)
                             + b * half(values + ZERO_AT, lane + 32));
        float sum = over_warp(a + b);
        if (lane == 0) s.tile[g][0] = high, s.tile[g][1] = sum, s.tile[g][2] = zero;
    }
    meet();
}

__device__ void add_values(const Shared& s, const unsigned char* values, Rows& y) {
    int row = threadIdx.x / PER_ROW, chunk = threadIdx.x % PER_ROW;
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        float keep = exp2f(y.top[g] - s.tile[g][0]);
        y.top[g] = s.tile[g][0], y.sum[g] = y.sum[g] * keep + s.tile[g][1];
#pragma unroll
        for (int i = 0; i < 8 / VBITS; ++i)
            y.out[g][i] = y.out[g][i] * keep + (VZERO && chunk == 0 ? s.tile[g][2] : 0);
    }
#pragma unroll
    for (int i = 0; i < CHUNK; i += 4) {
        u32 w = *(const u32*)(values + row * TILE + chunk * CHUNK + i);
#pragma unroll
        for (int shift = 0; shift < 8 / VBITS; ++shift) {
            float x[4];
            numbers<VBITS, VFP8, VZERO>(w, shift, x);
#pragma unroll
            for (int g = 0; g < GROUP; ++g) {
                float4 p = *(const float4*)&s.weight[g][chunk * CHUNK + i];
                y.out[g][shift] += p.x * x[0] + p.y * x[1] + p.z * x[2] + p.w * x[3];
            }
        }
    }
}

// Attention over the share's tiles, into `part` behind those of the warps.
__device__ void attend_tiles(const unsigned char* ring, Shared& s, u32& at, const Args& a,
                             const Tokens& t) {
    Rows y;
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        y.top[g] = -1e30f, y.sum[g] = 0;
#pragma unroll
        for (int i = 0; i < 8 / VBITS; ++i) y.out[g][i] = 0;
    }
    for (int tile = blockIdx.x % SHARES; tile < t.tiles; tile += SHARES) {
        await(s, at, 2);
        const unsigned char* keys = ring + at % SLOTS * SLOT;
        const unsigned char* values = ring + (at + 1) % SLOTS * SLOT;
        look_at(s, keys, (float)a.scale);
        weigh(s, values, y);
        add_values(s, values, y);
        leave(s, at, 2);
    }
    int row = threadIdx.x / PER_ROW;
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        float* to = s.part + (WARPS * GROUP + g) * ROW;
#pragma unroll
        for (int i = 0; i < 8 / VBITS; ++i) {
#pragma unroll
            for (int j = 1; j < PER_ROW; j *= 2)
                y.out[g][i] += __shfl_xor_sync(~0u, y.out[g][i], j);
            if (threadIdx.x % PER_ROW == 0) to[row + i * V_ROWS] = y.out[g][i];
        }
        if (threadIdx.x == 0) to[DIM] = y.top[g], to[DIM + 1] = y.sum[g];
    }
}

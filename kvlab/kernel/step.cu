// All layers of a decoder for one token of one row, in one launch (see step_cuda.py). Six phases a
// layer: q, k, v; attention over a share of the tokens; its merge; output; gate and up; down.
//
// One block per multiprocessor, all resident. Between phases results travel through memory, in
// words that tell by themselves whether they have come. A warp of its own streams the block's
// weights through a ring in shared memory and waits for none of that, so memory is read on. Two
// buffers take turns, layer by layer; who sends a word forgets the one it sent a layer before,
// which everybody has read by then.
//
// Macros: TYPE_F16, LAYERS, HIDDEN, MIXED, INNER, DIM, HEADS, KV, NORMED, BIASED, PIECE, SLOTS,
// OUT_HALVES, GATE_TILES, QKV_TILES; BLOCK tokens, SLAB and OPEN_SLAB blocks of the cache; GRID
// blocks; COPIES of words that all wait for, BACKOFF ns between two looks.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

struct Layer {
    const u16 *o, *mid_gain, *gate, *up, *down, *gain, *q, *k, *v, *q_bias, *k_bias, *v_bias,
        *q_gain, *k_gain;
};

struct Args {
    const u16 *x, *cos, *sin;
    u16* out;
    u32 *qkv, *parts, *lse, *mixed, *mid, *inner, *next;  // words of two layers each
    const u64 *base, *open_base;
    const int *table, *n_blocks, *open_slot, *open_now;
    u64 k_at, v_at, step, open_k, open_v, open_step;  // bytes in a slab: keys, values, next layer
    double scale, mid_eps, eps, head_eps;
    Layer layers[LAYERS];
};

constexpr int WARPS = 8, THREADS = 32 * WARPS;             // that multiply; one more warp loads
constexpr int AT_ONCE = 4;                                 // pieces of x in shared memory
constexpr int STEPS = PIECE / 256;                         // of 8 columns of a lane in a piece
constexpr int PITCH = 2 * PIECE, SLOT = 8 * PITCH;         // 8 weight rows
constexpr int MOST = 2 * (GATE_TILES > QKV_TILES ? GATE_TILES : QKV_TILES);  // slots in a piece
constexpr int PER_HEAD = DIM / 16, GROUP = HEADS / KV, SHARES = GRID / KV;
constexpr int UNITS = AT_ONCE * PIECE / 8 / THREADS;       // of 16 bytes of x for a thread
constexpr int OUT_ROWS = 8 * OUT_HALVES, GATE_WIDTH = 8 * GATE_TILES, QKV_WIDTH = 8 * QKV_TILES;
constexpr int GATE_UNITS = INNER / GATE_WIDTH, QKV_UNITS = (HEADS + 2 * KV) * PER_HEAD / QKV_TILES;
enum { QKV, OUTPUT, GATE, DOWN };

struct Shared {
    unsigned char x[AT_ONCE * 2 * PIECE];
    float part[WARPS * (GROUP * (DIM + 2) > MOST ? GROUP * (DIM + 2) : MOST)];
    float square[WARPS];
    u64 full[SLOTS], empty[SLOTS];
};

#include "numbers.cuh"

// Asked for now, whenever the answer may be needed, and past the first cache; 0 where not `on`.
__device__ uint4 from_global(const u16* at, bool on = true) {
    uint4 y;
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0;"
        "  mov.u32 %3, 0; @p ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "=&r"(y.x), "=&r"(y.y), "=&r"(y.z), "=&r"(y.w) : "l"(at), "r"((int)on) : "memory");
    return y;
}

constexpr u32 ABSENT = ~0u;  // a word before it has come: no result rounds to two such numbers

__device__ bool absent(uint4 y) {
    return y.x == ABSENT || y.y == ABSENT || y.z == ABSENT || y.w == ABSENT;
}

__device__ void put(u32* at, u32 word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(word) : "memory");
}

// `to`: of this layer; `old`: the same word of the layer before.
__device__ void send(u32* to, u32* old, u32 word) { put(to, word), put(old, ABSENT); }

// The same to all blocks: COPIES words, `count` apart, so that not all ask for the same one.
__device__ void send_all(u32* words, u64 turn, int count, int i, u32 word) {
#pragma unroll
    for (int copy = 0; copy < COPIES; ++copy) put(words + (turn * COPIES + copy) * count + i, word);
#pragma unroll
    for (int copy = 0; copy < COPIES; ++copy)
        put(words + ((1 - turn) * COPIES + copy) * count + i, ABSENT);
}

// Where a block reads such words.
__device__ const u32* copy_of(const u32* words, u64 turn, int count) {
    return words + (turn * COPIES + blockIdx.x % COPIES) * count;
}

__device__ void check(u64& spins) {  // a grid that is not all there must not hang for ever
    if (BACKOFF) __nanosleep(BACKOFF);
    if (++spins > 1ull << 23) asm volatile("trap;");
}

__device__ u32 word(const u32* at) {
    u32 y;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(y) : "l"(at) : "memory");
    return y;
}

__device__ bool passed(u32 barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
        "  selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done;
}

__device__ uint4 constant(const u16* at, bool on) {
    return on ? __ldg((const uint4*)at) : make_uint4(0, 0, 0, 0);
}

// ---- the ring

template <class Place>
__device__ void stream(u32 ring, Shared& s, u32& at, int K, int slots, Place place) {
    int lane = threadIdx.x % 32;
    for (int piece = 0; piece < K / PIECE; ++piece)
        for (int i = 0; i < slots; ++i, ++at) {
            u32 slot = at % SLOTS, full = address(&s.full[slot]);
            while (!passed(address(&s.empty[slot]), (at / SLOTS & 1) ^ 1)) {}
            if (lane == 0)
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full),
                             "r"(16 * PIECE) : "memory");
            __syncwarp();
            if (lane < 8)
                asm volatile(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                    " [%0], [%1], %2, [%3];" ::"r"(ring + slot * SLOT + lane * PITCH),
                    "l"(place(i) + (long)lane * K + piece * PIECE), "r"(2 * PIECE), "r"(full)
                    : "memory");
        }
}

// ---- one product

struct Product {
    int K, slots;  // columns; slots of the ring in a piece, of 8 weight rows each
    const void* x;
    const u16* gain;  // x is multiplied with it, and its squares are summed
    bool sent;        // x comes from other blocks, maybe later
};

__device__ void scale(uint4& x, uint4 gain, float& square) {
    u32 v[4] = {x.x, x.y, x.z, x.w};
    const u32 w[4] = {gain.x, gain.y, gain.z, gain.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        float a = widen(v[j]), b = widen(v[j] >> 16);
        square += a * a + b * b;
        v[j] = pack(a * widen(w[j]), b * widen(w[j] >> 16));
    }
    x = make_uint4(v[0], v[1], v[2], v[3]);
}

__device__ float dot(uint4 w, const float* x, float sum) {
    const u32 v[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        sum += widen(v[i]) * x[2 * i], sum += upper(v[i]) * x[2 * i + 1];
    return sum;
}

// One piece: a warp takes the row of its number in each of N slots. Tensor cores would compute
// seven columns of eight for nothing, and split a row over warps.
template <int N>
__device__ void piece_of(const unsigned char* ring, Shared& s, u32& at, const unsigned char* xs,
                         float* acc) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float x[STEPS * 8];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        uint4 y = *(const uint4*)(xs + 512 * i + 16 * lane);
        const u32 v[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
            x[8 * i + 2 * j] = widen(v[j]), x[8 * i + 2 * j + 1] = upper(v[j]);
    }
    u32 slot = at % SLOTS, turn = at / SLOTS & 1;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        while (!passed(address(&s.full[slot]), turn)) {}
        const unsigned char* from = ring + slot * SLOT + warp * PITCH + 16 * lane;
        uint4 w[STEPS];
#pragma unroll
        for (int j = 0; j < STEPS; ++j) w[j] = *(const uint4*)(from + 512 * j);
        float sums[STEPS];
#pragma unroll
        for (int j = 0; j < STEPS; ++j) sums[j] = dot(w[j], x + 8 * j, j ? 0 : acc[i]);
        acc[i] = 0;
#pragma unroll
        for (int j = 0; j < STEPS; ++j) acc[i] += sums[j];
        __syncwarp();
        if (lane == 0)
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(
                address(&s.empty[slot])) : "memory");
        if (++slot == SLOTS) slot = 0, turn ^= 1;
    }
    at += N;
}

// Weights of the ring times x; the sum of slot i's row r goes to `part` [8 i + r].
__device__ void multiply_all(const unsigned char* ring, Shared& s, u32& at, Product p) {
    constexpr int WIDE = AT_ONCE * PIECE / 8;  // units of a row
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int groups = (p.K + AT_ONCE * PIECE - 1) / (AT_ONCE * PIECE);
    float acc[MOST] = {}, square = 0;
    uint4 x[UNITS], gains[UNITS];
    auto column = [&](int group, int i) {
        return (int)(group * WIDE + i * THREADS + threadIdx.x) * 8;
    };
    auto fetch = [&](int group) {
#pragma unroll
        for (int i = 0; i < UNITS; ++i) {
            int c = column(group, i);
            gains[i] = constant(p.gain + c, p.gain && c < p.K);
            x[i] = from_global((const u16*)p.x + c, c < p.K);
        }
    };
    fetch(0);
    for (int group = 0; group < groups; ++group) {
        u64 spins = 0;
        while (p.sent) {
            bool missing = false;
#pragma unroll
            for (int i = 0; i < UNITS; ++i)
                if (absent(x[i])) {
                    missing = true;
                    x[i] = from_global((const u16*)p.x + column(group, i));
                }
            if (!missing) break;
            check(spins);
        }
#pragma unroll
        for (int i = 0; i < UNITS; ++i) {
            int c = i * THREADS + threadIdx.x;
            if (p.gain) scale(x[i], gains[i], square);
            *(uint4*)(s.x + 16 * c) = x[i];
        }
        if (p.gain && group == groups - 1) {
#pragma unroll
            for (int j = 16; j; j /= 2) square += __shfl_xor_sync(~0u, square, j);
            if (lane == 0) s.square[warp] = square;
        }
        meet();
        if (group + 1 < groups) fetch(group + 1);
        int pieces = min(AT_ONCE, p.K / PIECE - group * AT_ONCE);
        for (int piece = 0; piece < pieces; ++piece) {
            const unsigned char* xs = s.x + piece * 2 * PIECE;
            if (p.slots == 2 * GATE_TILES) piece_of<2 * GATE_TILES>(ring, s, at, xs, acc);
            else if (p.slots == 2 * QKV_TILES) piece_of<2 * QKV_TILES>(ring, s, at, xs, acc);
            else piece_of<OUT_HALVES>(ring, s, at, xs, acc);
        }
        if (group + 1 < groups) meet();
    }
#pragma unroll
    for (int j = 16; j; j /= 2)
#pragma unroll
        for (int i = 0; i < MOST; ++i) acc[i] += __shfl_xor_sync(~0u, acc[i], j);
    if (lane == 0)
#pragma unroll
        for (int i = 0; i < MOST; ++i) s.part[8 * i + warp] = acc[i];
    meet();
}

__device__ float factor(const Shared& s, double eps) {
    float y = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) y += s.square[i];
    return rsqrtf(y * (1.0f / HIDDEN) + (float)eps);
}

#include "step_attention.cuh"
#include "step_phases.cuh"

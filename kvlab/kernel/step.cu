// All layers of a decoder for one token of one row, in one launch (see step_cuda.py). Six phases a
// layer: q, k, v; attention over a share of the tokens; its merge; output; gate and up; down.
//
// One block per multiprocessor, all resident. Between phases results travel through memory, in
// words that carry the number of their layer. A warp of its own streams what the block reads
// through a ring in shared memory, weights, keys and values in the order in which they are used,
// and waits for no result, so memory is read on. Two buffers of words take turns, layer by layer:
// who sends a word again has heard from everybody who read the one before.
//
// 128 blocks that look at the same lines again and again wait for one another, and answers wait
// behind weights. So of a pair of blocks each asks for one half of what all need and hands it to
// the other, and no more than AHEAD slots are on their way at a time.
//
// Macros: TYPE_F16, LAYERS, HIDDEN, MIXED, INNER, DIM, HEADS, KV, NORMED, BIASED, PIECE, SLOTS,
// OUT_HALVES, GATE_TILES, QKV_TILES; BLOCK tokens, SLAB and OPEN_SLAB blocks of the cache; GRID
// blocks in clusters of CLUSTER; AHEAD.

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
    u32* epoch;                                           // layers of all launches before
    u64 *qkv, *parts, *lse, *mixed, *mid, *inner, *next;  // words of two layers each
    const u64 *base, *open_base;
    const int *table, *n_blocks, *open_slot, *open_now;
    u64 k_at, v_at, step, open_k, open_v, open_step;  // bytes in a slab: keys, values, next layer
    double scale, mid_eps, eps, head_eps;
    Layer layers[LAYERS];
};

constexpr int WARPS = 8, THREADS = 32 * WARPS;             // that multiply; one more warp loads
constexpr int SPAN = PIECE / WARPS, STEPS = SPAN / 32;     // columns of a warp in a piece
constexpr int PITCH = 2 * PIECE + 64, SLOT = 8 * PITCH;    // 8 weight rows, on shifted banks
constexpr int TILES = GATE_TILES > QKV_TILES ? GATE_TILES : QKV_TILES;
constexpr int WIDEST = HIDDEN > MIXED ? (HIDDEN > INNER ? HIDDEN : INNER)
                                      : (MIXED > INNER ? MIXED : INNER);
constexpr int PER_HEAD = DIM / 16, GROUP = HEADS / KV, SHARES = GRID / KV;
constexpr int OUT_ROWS = 8 * OUT_HALVES, GATE_WIDTH = 8 * GATE_TILES;
constexpr int GATE_UNITS = INNER / GATE_WIDTH, QKV_UNITS = (HEADS + 2 * KV) * PER_HEAD / QKV_TILES;
constexpr int ROW = DIM + 2;                               // numbers of a warp and head in `part`

struct Shared {
    unsigned char wide[2 * WIDEST], stream[2 * HIDDEN];  // what came last, in turn
    unsigned char x[2 * HIDDEN], heads[2 * (GROUP + 2) * DIM];
    float part[WARPS * (TILES * 16 > GROUP * ROW ? TILES * 16 : GROUP * ROW)];
    float square[WARPS];
    u64 full[SLOTS], empty[SLOTS], arrived[2];
};

#include "numbers.cuh"

// ---- words: a number of 32 bits under the number of its layer

__device__ void send(u64* to, u32 number, u32 tag) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"((u64)tag << 32 | number)
                 : "memory");
}

__device__ void look(const u64* at, u64& a, u64& b) {
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(at)
                 : "memory");
}

__device__ u64 look(const u64* at) {
    u64 y;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(y) : "l"(at) : "memory");
    return y;
}

__device__ bool is(u64 word, u32 tag) { return (u32)(word >> 32) == tag; }

__device__ void check(u64& spins) {  // a grid that is not all there must not hang for ever
    if (++spins > 1ull << 23) asm volatile("trap;");
}

// ---- the ring

__device__ bool passed(u32 barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
        "  selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done;
}

// The next slot, free and waiting for `bytes`; its address.
__device__ u32 vacant(u32 ring, Shared& s, u32& at, u32 bytes) {
    u32 slot = at % SLOTS, before = at - AHEAD;
    while (!passed(address(&s.empty[slot]), (at / SLOTS & 1) ^ 1)) {}
    while (at >= AHEAD && !passed(address(&s.full[before % SLOTS]), before / SLOTS & 1)) {}
    if (threadIdx.x % 32 == 0)
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
            address(&s.full[slot])), "r"(bytes) : "memory");
    __syncwarp();
    ++at;
    return ring + slot * SLOT;
}

__device__ void copy(u32 to, const void* from, u32 bytes, const u64& full) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(from), "r"(bytes), "r"(address(&full)) : "memory");
}

template <class Place>
__device__ void stream(u32 ring, Shared& s, u32& at, int K, int slots, Place place) {
    int lane = threadIdx.x % 32;
    for (int piece = 0; piece < K / PIECE; ++piece)
        for (int i = 0; i < slots; ++i) {
            const u64& full = s.full[at % SLOTS];
            u32 to = vacant(ring, s, at, 16 * PIECE);
            if (lane < 8)
                copy(to + lane * PITCH, place(i) + (long)lane * K + piece * PIECE, 2 * PIECE, full);
        }
}

// Until the next `count` slots are full, at most 32.
__device__ void await(const Shared& s, u32 at, int count) {
    u32 lane = threadIdx.x % 32, own = at + lane;
    bool here = (int)lane >= count;
    while (!__all_sync(~0u, here || (here = passed(address(&s.full[own % SLOTS]),
                                                   own / SLOTS & 1)))) {}
}

// This warp has read them.
__device__ void leave(const Shared& s, u32& at, int count) {
    int lane = threadIdx.x % 32;
    __syncwarp();
    if (lane < count)
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(
            address(&s.empty[(at + lane) % SLOTS])) : "memory");
    at += count;
}

// ---- one product

__device__ uint2 scaled(uint2 x, uint2 gain, float& square) {
    float a = widen(x.x), b = upper(x.x), c = widen(x.y), d = upper(x.y);
    square += a * a + b * b + c * c + d * d;
    return make_uint2(pack(a * widen(gain.x), b * upper(gain.x)),
                      pack(c * widen(gain.y), d * upper(gain.y)));
}

__device__ u32 at_peer(u32 address, u32 rank) {
    u32 y;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(y) : "r"(address), "r"(rank));
    return y;
}

// Words of layer `tag` into the same place in all blocks, each block of a cluster its share. times:
// calls before this one; two places and barriers take turns, for peers may be one call ahead.
template <int K>
__device__ void receive(Shared& s, unsigned char* to, const u64* words, u32 tag, u32& times) {
    constexpr int OWN = K / 4 / CLUSTER;  // fours of numbers
    u32 arrived = address(&s.arrived[times & 1]);
    meet();  // what is sent was read out of shared memory
    if (threadIdx.x == THREADS - 1)
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrived),
                     "r"(2 * K) : "memory");
    for (int i = threadIdx.x; i < OWN; i += THREADS) {
        int four = blockIdx.x % CLUSTER * OWN + i;
        u64 a, b, spins = 0;
        do look(words + 2 * four, a, b), check(spins);
        while (!(is(a, tag) && is(b, tag)));
#pragma unroll
        for (u32 rank = 0; rank < CLUSTER; ++rank)
            asm volatile(
                "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];"
                ::"r"(at_peer(address(to + 8 * four), rank)), "r"((u32)a), "r"((u32)b),
                "r"(at_peer(arrived, rank)) : "memory");
    }
    while (!passed(arrived, times / 2 & 1)) {}
    ++times;
}

// A norm's gain, of a thread's numbers.
struct Gains {
    uint2 of[HIDDEN / 4 / THREADS];
};

__device__ Gains gains(const u16* of) {
    Gains y;
#pragma unroll
    for (int i = 0; i < HIDDEN / 4 / THREADS; ++i)
        y.of[i] = __ldg((const uint2*)of + i * THREADS + threadIdx.x);
    return y;
}

// What came, or the step's input, times the gain, into `x`, and the sums of its squares.
__device__ void norm(Shared& s, const u16* plain, const Gains& gain) {
    float square = 0;
#pragma unroll
    for (int i = 0; i < HIDDEN / 4 / THREADS; ++i) {
        int four = i * THREADS + threadIdx.x;
        uint2 x = plain ? __ldg((const uint2*)plain + four) : ((const uint2*)s.stream)[four];
        ((uint2*)s.x)[four] = scaled(x, gain.of[i], square);
    }
#pragma unroll
    for (int j = 16; j; j /= 2) square += __shfl_xor_sync(~0u, square, j);
    if (threadIdx.x % 32 == 0) s.square[threadIdx.x / 32] = square;
    meet();
}

// PIECES pieces, of N slots each, of x and the ring; they must all be there at a time, so that
// reads of one overlap products of another.
template <int N, int PIECES>
__device__ void pieces(const unsigned char* ring, Shared& s, u32& at, const unsigned char* x,
                       float (*acc)[2][4]) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int own = 2 * (warp * SPAN + t * 8);
    await(s, at, N * PIECES);
    u32 slot = at % SLOTS;
    auto next = [&] {
        const unsigned char* from = ring + slot * SLOT + g * PITCH + own;
        slot = slot + 1 == SLOTS ? 0 : slot + 1;
        return from;
    };
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        uint4 b[STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            b[i] = make_uint4(0, 0, 0, 0);
            if (g == 0) b[i] = *(const uint4*)(x + 2 * piece * PIECE + own + 64 * i);
        }
#pragma unroll
        for (int tile = 0; tile < (N + 1) / 2; ++tile) {
            const unsigned char *lo = next(), *hi = N == 1 ? lo : next();
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
                uint4 a = *(const uint4*)(lo + 64 * i), c = make_uint4(0, 0, 0, 0);
                if (N > 1) c = *(const uint4*)(hi + 64 * i);
                multiply(acc[tile][0], a.x, c.x, a.y, c.y, b[i].x, b[i].y);
                multiply(acc[tile][1], a.z, c.z, a.w, c.w, b[i].z, b[i].w);
            }
        }
    }
    leave(s, at, N * PIECES);
}

// N slots of weights a piece times x in shared memory; sums of warps go to `part` [warp, row].
template <int K, int N>
__device__ void multiply_all(const unsigned char* ring, Shared& s, u32& at,
                             const unsigned char* x) {
    constexpr int P = K / PIECE, AT_ONCE = N > 3 ? 1 : P < 6 / N ? P : 6 / N;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    float acc[(N + 1) / 2][2][4] = {};
#pragma unroll
    for (int first = 0; first + AT_ONCE <= P; first += AT_ONCE)
        pieces<N, AT_ONCE>(ring, s, at, x + 2 * first * PIECE, acc);
    constexpr int REST = P % AT_ONCE;
    if (REST) pieces<N, REST ? REST : 1>(ring, s, at, x + 2 * (P - REST) * PIECE, acc);
    if (lane % 4 == 0)
#pragma unroll
        for (int tile = 0; tile < (N + 1) / 2; ++tile) {
            float* to = s.part + warp * 8 * N + tile * 16 + g;
            to[0] = acc[tile][0][0] + acc[tile][1][0];
            if (N > 1) to[8] = acc[tile][0][2] + acc[tile][1][2];
        }
    meet();
}

// Row `r` of N slots.
template <int N>
__device__ float total(const Shared& s, int r) {
    float y = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) y += s.part[i * 8 * N + r];
    return y;
}

__device__ float factor(const Shared& s, double eps) {
    float y = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) y += s.square[i];
    return rsqrtf(y * (1.0f / HIDDEN) + (float)eps);
}

#include "step_attention.cuh"
#include "step_phases.cuh"

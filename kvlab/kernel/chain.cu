// What a decoder computes between two attentions, for few rows, in one launch (see layer_cuda.py):
//
//   mid = x + o mixed;  inner = silu(gate y) * (up y), y = norm(mid);  out = mid + down inner;
//   q, k, v = RoPE(head norm(q y)), ..., y = norm(out), of the next layer
//
// One block per multiprocessor; between the four products stands a barrier over the grid. A warp of
// its own streams the block's weights through a ring in shared memory and waits for none of that,
// so memory is read on while results travel. Sizes come as macros: TYPE_F16, HIDDEN, MIXED, INNER,
// DIM, HEADS, KV, NORMED, BIASED; ROWS (8, 16, 32 or 64), PIECE, SLOTS; OUT_HALVES, GATE_TILES,
// QKV_TILES.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

struct Args {
    const u16 *mixed, *x, *o, *mid_gain, *gate, *up, *down, *gain, *q, *k, *v, *q_bias, *k_bias,
        *v_bias, *q_gain, *k_gain, *cos, *sin;
    u16 *mid, *inner, *out, *q_out, *k_out, *v_out;
    u64 *sync, *squares;
    long long rows, finishes, starts, cos_stride;
    double mid_eps, eps, head_eps;
};

constexpr int WARPS = 8, THREADS = 32 * WARPS;  // that multiply; one more warp loads
constexpr int GROUPS = ROWS > 32 ? 4 : ROWS > 16 ? 2 : 1;  // of rows, each with warps of its own
constexpr int SPLIT = WARPS / GROUPS;                       // warps that share a piece's columns
constexpr int NT = ROWS / GROUPS / 8;                       // tiles of 8 rows of a warp
constexpr int SPAN = PIECE / SPLIT;                         // columns of a warp in a piece
constexpr int STEPS = SPAN < 128 ? SPAN / 32 : 4, CHUNK = 32 * STEPS, PER_PIECE = SPAN / CHUNK;
constexpr int PITCH = 2 * PIECE + 64, SLOT = 8 * PITCH;  // 8 weight rows, on shifted banks
constexpr int TILES = GATE_TILES > QKV_TILES ? GATE_TILES : QKV_TILES;
constexpr int PER_HEAD = DIM / 16, PEERS = PER_HEAD / QKV_TILES;  // tiles, and blocks, of a head

struct Shared {
    float part[SPLIT * TILES * 16 * ROWS];
    float square[SPLIT * ROWS];
    u64 full[SLOTS], empty[SLOTS];
    u32 tag;
};

#include "numbers.cuh"

__device__ uint4 from_global(const u16* at) {  // past the first cache: other blocks write it
    uint4 y;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w) : "l"(at) : "memory");
    return y;
}

__device__ float one_from_global(const u16* at) {
    u16 y;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(y) : "l"(at) : "memory");
    return widen(y);
}

__device__ bool passed(u32 barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
        "  selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done;
}

// ---- the ring

template <int K, int TILES_, int HALVES, class Place>
__device__ void stream(u32 ring, Shared& s, u32& at, int unit, Place place) {
    int lane = threadIdx.x % 32;
    for (int piece = 0; piece < K / PIECE; ++piece)
        for (int i = 0; i < TILES_ * HALVES; ++i, ++at) {
            int slot = at % SLOTS;
            u32 full = address(&s.full[slot]);
            while (!passed(address(&s.empty[slot]), (at / SLOTS & 1) ^ 1)) {}
            if (lane == 0)
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full),
                             "r"(16 * PIECE) : "memory");
            __syncwarp();
            if (lane < 8) {
                const u16* row = place(unit * TILES_ + i / HALVES, i % HALVES) + (long)lane * K;
                asm volatile(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                    " [%0], [%1], %2, [%3];" ::"r"(ring + slot * SLOT + lane * PITCH),
                    "l"(row + piece * PIECE), "r"(2 * PIECE), "r"(full) : "memory");
            }
        }
}

// Products of TILES_ x 16 (HALVES 1: 8) weight rows with the rows of x; sums over a warp's columns
// go to `part` [split, tile, 16, ROWS]. NORM: x times gain, and its sums of squares to `square`.
template <int K, int TILES_, int HALVES, bool NORM>
__device__ void products(u32 ring, Shared& s, u32& at, const u16* x, const u16* gain, int rows) {
    constexpr int CHUNKS = K / (SPLIT * CHUNK), WANTED = NT == 1 ? 3 : 2;
    constexpr int AHEAD = CHUNKS < WANTED ? CHUNKS : WANTED;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int split = warp % SPLIT, first = warp / SPLIT * NT * 8;
    constexpr int CHAINS = TILES_ * NT < 3 ? 2 : 1;  // of sums that do not wait for each other
    float acc[CHAINS][TILES_][NT][4] = {}, square[NT] = {};
    uint4 xs[AHEAD][STEPS][NT];
    auto inside = [&](int c) { return split * SPAN + c % PER_PIECE * CHUNK + t * 8; };
    auto fetch = [&](int c, uint4 (*y)[NT]) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i)
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                int row = first + n * 8 + g;
                const u16* from = x + (long)row * K + c / PER_PIECE * PIECE + inside(c) + i * 32;
                y[i][n] = row < rows ? from_global(from) : make_uint4(0, 0, 0, 0);
            }
    };
#pragma unroll
    for (int c = 0; c < AHEAD; ++c) fetch(c, xs[c]);
#pragma unroll(CHUNKS <= 12 ? CHUNKS : AHEAD)
    for (int c = 0; c < CHUNKS; ++c) {
        uint4(*y)[NT] = xs[c % AHEAD];
        if (NORM) {
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
                const u16* from = gain + c / PER_PIECE * PIECE + inside(c) + i * 32;
                uint4 w = __ldg((const uint4*)from);
                const u32 ws[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    u32 v[4] = {y[i][n].x, y[i][n].y, y[i][n].z, y[i][n].w};
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        float a = widen(v[j]), b = widen(v[j] >> 16);
                        square[n] += a * a + b * b;
                        v[j] = pack(a * widen(ws[j]), b * widen(ws[j] >> 16));
                    }
                    y[i][n] = make_uint4(v[0], v[1], v[2], v[3]);
                }
            }
        }
#pragma unroll
        for (int tile = 0; tile < TILES_; ++tile) {
            u32 from[HALVES];
#pragma unroll
            for (int half = 0; half < HALVES; ++half) {
                u32 n = at + tile * HALVES + half, slot = n % SLOTS;
                if (c % PER_PIECE == 0)
                    while (!passed(address(&s.full[slot]), n / SLOTS & 1)) {}
                from[half] = ring + slot * SLOT + g * PITCH + 2 * inside(c);
            }
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
                uint4 a = from_shared(from[0] + 64 * i), b = make_uint4(0, 0, 0, 0);
                if (HALVES == 2) b = from_shared(from[HALVES - 1] + 64 * i);
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    multiply(acc[0][tile][n], a.x, b.x, a.y, b.y, y[i][n].x, y[i][n].y);
                    multiply(acc[CHAINS - 1][tile][n], a.z, b.z, a.w, b.w, y[i][n].z, y[i][n].w);
                }
            }
        }
        if (c + AHEAD < CHUNKS) fetch(c + AHEAD, y);
        if (c % PER_PIECE == PER_PIECE - 1) {
            __syncwarp();
            if (lane == 0)
                for (int i = 0; i < TILES_ * HALVES; ++i)
                    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(
                        address(&s.empty[(at + i) % SLOTS])) : "memory");
            at += TILES_ * HALVES;
        }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        for (int tile = 0; tile < TILES_; ++tile) {
            float* p = s.part + ((split * TILES_ + tile) * 16 + g) * ROWS + first + n * 8 + 2 * t;
            float* sum = acc[0][tile][n];
            if (CHAINS == 2)
                for (int i = 0; i < 4; ++i) sum[i] += acc[1 % CHAINS][tile][n][i];
            *(float2*)p = make_float2(sum[0], sum[1]);
            *(float2*)(p + 8 * ROWS) = make_float2(sum[2], sum[3]);
        }
        if (NORM) {
            square[n] += __shfl_xor_sync(~0u, square[n], 1);
            square[n] += __shfl_xor_sync(~0u, square[n], 2);
            if (t == 0) s.square[split * ROWS + first + n * 8 + g] = square[n];
        }
    }
    meet();
}

template <int TILES_>
__device__ float total(const Shared& s, int tile, int r, int n) {
    float y = 0;
#pragma unroll
    for (int i = 0; i < SPLIT; ++i) y += s.part[((i * TILES_ + tile) * 16 + r) * ROWS + n];
    return y;
}

__device__ float factor(const Shared& s, int n, double eps) {
    float y = 0;
#pragma unroll
    for (int i = 0; i < SPLIT; ++i) y += s.square[i * ROWS + n];
    return rsqrtf(y / HIDDEN + (float)eps);
}

// ---- barriers over the grid: a counter for each, which only grows

__device__ void arrive(u64* counter) {
    meet();
    if (threadIdx.x == 0)
        asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ u64 look(const u64* at) {
    u64 y;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(y) : "l"(at) : "memory");
    return y;
}

__device__ void check(u64& spins) {  // a grid that is not all there must not hang for ever
    if (++spins > 1ull << 23) asm volatile("trap;");
}

__device__ void await(const u64* counter, u64 epoch) {
    u64 spins = 0;
    if (threadIdx.x == 0)
        while (look(counter) < (epoch + 1) * gridDim.x) check(spins);
    meet();
}

#include "chain_phases.cuh"

// The ring of step.cu and products of what it brings.

// The next slot, free and waiting for `bytes`; its address.
__device__ u32 vacant(u32 ring, Shared& s, u32& at, u32 bytes) {
    u32 slot = at % SLOTS, before = at - AHEAD;
    while (!passed(address(&s.empty[slot]), (at / SLOTS & 1) ^ 1)) {}
    while (at >= AHEAD && !passed(address(&s.full[before % SLOTS]), before / SLOTS & 1)) {}
    if (threadIdx.x % 32 == 0) expect(address(&s.full[slot]), bytes);
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

// PIECES pieces, of N slots each, into registers.
template <int N, int PIECES>
__device__ void hold(const unsigned char* ring, Shared& s, u32& at, uint4* w) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    await(s, at, N * PIECES);
    u32 slot = at % SLOTS;
#pragma unroll
    for (int n = 0; n < N * PIECES; ++n) {
        const unsigned char* from = ring + slot * SLOT + g * PITCH + 2 * (warp * SPAN + t * 8);
        slot = slot + 1 == SLOTS ? 0 : slot + 1;
#pragma unroll
        for (int i = 0; i < STEPS; ++i) w[n * STEPS + i] = *(const uint4*)(from + 64 * i);
    }
    leave(s, at, N * PIECES);
}

// Products of held pieces with x. A tile has 16 rows; of single slots two pieces lie one above the
// other, and each has a column of its own.
template <int N, int PIECES>
__device__ void apply(const uint4* w, const unsigned char* x, float (*acc)[2][4]) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    constexpr int BOTH = N == 1 ? 2 : 1;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece += BOTH) {
        uint4 b[STEPS];
        const unsigned char* own = x + 2 * ((piece + g) * PIECE + warp * SPAN + t * 8);
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            b[i] = make_uint4(0, 0, 0, 0);
            if (g < BOTH && piece + g < PIECES) b[i] = *(const uint4*)(own + 64 * i);
        }
#pragma unroll
        for (int tile = 0; tile < (N + 1) / 2; ++tile)
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
                constexpr int ROW = STEPS;
                uint4 a = w[(piece * N + 2 * tile) * ROW + i], c = make_uint4(0, 0, 0, 0);
                if (N > 1 || piece + 1 < PIECES) c = w[(piece * N + 2 * tile + 1) * ROW + i];
                float(*to)[4] = acc[N == 1 ? piece / 2 % 2 : tile];
                multiply(to[0], a.x, c.x, a.y, c.y, b[i].x, b[i].y);
                multiply(to[1], a.z, c.z, a.w, c.w, b[i].z, b[i].w);
            }
    }
}

constexpr int HOLD = 24;  // fours of registers that a thread holds

// A product of N slots of weights a piece with x in shared memory. What fits into registers is
// there before x has come.
template <int K, int N>
struct Product {
    static constexpr int P = K / PIECE, MOST = HOLD / (N * STEPS), HELD = P < MOST ? P : MOST;
    static constexpr int SOME = N > 3 ? 1 : 6 / N, SUMS = N == 1 ? 2 : (N + 1) / 2;
    uint4 w[HELD ? HELD * N * STEPS : 1];

    __device__ void begin(const unsigned char* ring, Shared& s, u32& at) {
        if (HELD) hold<N, HELD ? HELD : 1>(ring, s, at, w);
    }

    template <int COUNT>
    __device__ void more(const unsigned char* ring, Shared& s, u32& at, const unsigned char* x,
                         float (*acc)[2][4]) {
        uint4 next[COUNT * N * STEPS];
        hold<N, COUNT>(ring, s, at, next);
        apply<N, COUNT>(next, x, acc);
    }

    // Sums of warps go to `part` [warp, row]; the caller meets before they are read.
    __device__ void finish(const unsigned char* ring, Shared& s, u32& at, const unsigned char* x) {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
        float acc[SUMS][2][4] = {};
        if (HELD) apply<N, HELD ? HELD : 1>(w, x, acc);
#pragma unroll
        for (int first = HELD; first + SOME <= P; first += SOME)
            more<SOME>(ring, s, at, x + 2 * first * PIECE, acc);
        constexpr int REST = (P - HELD) % SOME;
        if (REST) more<REST ? REST : 1>(ring, s, at, x + 2 * (P - REST) * PIECE, acc);
        if (lane % 4) return;
        float* to = s.part + warp * 8 * N + g;
        if (N == 1)
            *to = acc[0][0][0] + acc[0][1][0] + (acc[0][0][3] + acc[0][1][3])
                + (acc[SUMS - 1][0][0] + acc[SUMS - 1][1][0])
                + (acc[SUMS - 1][0][3] + acc[SUMS - 1][1][3]);
        else
#pragma unroll
            for (int tile = 0; tile < SUMS; ++tile) {
                to[16 * tile] = acc[tile][0][0] + acc[tile][1][0];
                to[16 * tile + 8] = acc[tile][0][2] + acc[tile][1][2];
            }
    }
};

// Row `r` of N slots.
template <int N>
__device__ float total(const Shared& s, int r) {
    float y = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) y += s.part[i * 8 * N + r];
    return y;
}

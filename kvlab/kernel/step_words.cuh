// Words between the blocks of step.cu: a number of 32 bits under the number of its layer.

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

__device__ bool passed(u32 barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
        "  selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done;
}

// Call `times` of those that take turns at two barriers.
__device__ void until(const u64* barriers, u32 times) {
    while (!passed(address(&barriers[times & 1]), times / 2 & 1)) {}
}

__device__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(bytes) : "memory");
}

__device__ u32 at_peer(u32 address, u32 rank) {
    u32 y;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(y) : "r"(address), "r"(rank));
    return y;
}

// Eight bytes to the same place in all blocks of the cluster.
__device__ void hand(u32 to, u32 a, u32 b, u32 arrived) {
#pragma unroll
    for (u32 rank = 0; rank < CLUSTER; ++rank)
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];"
            ::"r"(at_peer(to, rank)), "r"(a), "r"(b), "r"(at_peer(arrived, rank)) : "memory");
}

__device__ void hand(u32 to, float a, u32 arrived) {
#pragma unroll
    for (u32 rank = 0; rank < CLUSTER; ++rank)
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
            ::"r"(at_peer(to, rank)), "r"(__float_as_uint(a)), "r"(at_peer(arrived, rank))
            : "memory");
}

// Two words of layer `tag`, once they have come.
__device__ void come(const u64* at, u32 tag, u64& a, u64& b) {
    u64 spins = 0;
    do look(at, a, b), check(spins);
    while (!(is(a, tag) && is(b, tag)));
}

// Words of layer `tag` into the same place in all blocks, each block of a cluster its share. times:
// calls before this one; two places and barriers take turns, for peers may be one call ahead.
template <int K>
__device__ void receive(Shared& s, unsigned char* to, const u64* words, u32 tag, u32& times) {
    constexpr int OWN = K / 4 / CLUSTER, EACH = (OWN + THREADS - 1) / THREADS;  // fours of numbers
    u32 arrived = address(&s.arrived[times & 1]);
    int first = blockIdx.x % CLUSTER * OWN;
    meet();  // what is sent was read out of shared memory
    if (threadIdx.x == THREADS - 1) expect(arrived, 2 * K);
    u64 a[EACH], b[EACH], spins = 0;
    bool all;
#pragma unroll
    for (int e = 0; e < EACH; ++e) a[e] = b[e] = ~((u64)tag << 32);
    do {
        all = true;
#pragma unroll
        for (int e = 0; e < EACH; ++e) {  // all asked for at a time
            int i = threadIdx.x + e * THREADS;
            if (i < OWN && !(is(a[e], tag) && is(b[e], tag)))
                look(words + 2 * (first + i), a[e], b[e]);
        }
        check(spins);
#pragma unroll
        for (int e = 0; e < EACH; ++e)
            all &= (int)threadIdx.x + e * THREADS >= OWN || (is(a[e], tag) && is(b[e], tag));
    } while (!all);
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        int i = threadIdx.x + e * THREADS;
        if (i < OWN) hand(address(to + 8 * (first + i)), (u32)a[e], (u32)b[e], arrived);
    }
    until(s.arrived, times++);
}

// ---- a norm: what comes times the gain, and apart from it the sum of squares

constexpr int NORM_OWN = HIDDEN / 4 / CLUSTER;  // fours of numbers, a thread each
constexpr int SQUARES = HIDDEN / 128;           // sums of warps
static_assert(NORM_OWN <= THREADS && NORM_OWN % 32 == 0, "whole warps ask");

__device__ uint2 scaled(uint2 x, uint2 gain, float& square) {
    float a = widen(x.x), b = upper(x.x), c = widen(x.y), d = upper(x.y);
    square += a * a + b * b + c * c + d * d;
    return make_uint2(pack(a * widen(gain.x), b * upper(gain.x)),
                      pack(c * widen(gain.y), d * upper(gain.y)));
}

__device__ float over_warp(float x) {
#pragma unroll
    for (int j = 16; j; j /= 2) x += __shfl_xor_sync(~0u, x, j);
    return x;
}

// A thread's part of a norm's gain, asked for before what it scales has come.
__device__ uint2 gain_of(const u16* gain) {
    int i = blockIdx.x % CLUSTER * NORM_OWN + threadIdx.x;
    return threadIdx.x < NORM_OWN ? __ldg((const uint2*)gain + i) : make_uint2(0, 0);
}

// Words of layer `tag`, times the gain, into `x`. Sums of squares follow (see `factor`).
__device__ void receive_scaled(Shared& s, uint2 gain, const u64* words, u32 tag, u32& times,
                               u32& norms) {
    u32 arrived = address(&s.arrived[times & 1]), squared = address(&s.squared[norms & 1]);
    int four = blockIdx.x % CLUSTER * NORM_OWN + threadIdx.x;
    meet();
    if (threadIdx.x == THREADS - 1) expect(arrived, 2 * HIDDEN), expect(squared, 4 * SQUARES);
    if (threadIdx.x < NORM_OWN) {
        u64 a, b;
        float square = 0;
        come(words + 2 * four, tag, a, b);
        uint2 y = scaled(make_uint2((u32)a, (u32)b), gain, square);
        hand(address(s.x + 8 * four), y.x, y.y, arrived);
        __syncwarp();
        square = over_warp(square);
        if (threadIdx.x % 32 == 0) hand(address(&s.square[four / 32]), square, squared);
    }
    until(s.arrived, times++), ++norms;
}

// The same of the step's input, which needs no words.
__device__ void scale_input(Shared& s, const u16* x, const u16* gain) {
    float square = 0;
#pragma unroll
    for (int i = 0; i < HIDDEN / 4 / THREADS; ++i) {
        int four = i * THREADS + threadIdx.x;
        ((uint2*)s.x)[four] =
            scaled(__ldg((const uint2*)x + four), __ldg((const uint2*)gain + four), square);
    }
    square = over_warp(square);
    if (threadIdx.x < SQUARES) s.square[threadIdx.x] = 0;
    meet();
    if (threadIdx.x % 32 == 0) s.square[threadIdx.x / 32] = square;
    meet();
}

// What a norm of root mean squares divides by, once. norms: calls of `receive_scaled`.
__device__ float factor(const Shared& s, double eps, u32 norms) {
    if (norms) until(s.squared, norms - 1);
    float y = 0;
#pragma unroll
    for (int i = 0; i < SQUARES; ++i) y += s.square[i];
    return rsqrtf(y * (1.0f / HIDDEN) + (float)eps);
}

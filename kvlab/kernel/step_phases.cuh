// The order of things in step.cu.

__device__ const u16* head_rows(const Layer& l, int tile, int half) {
    int head = tile / PER_HEAD, d = tile % PER_HEAD * 8 + half * (DIM / 2);
    const u16* w = l.q;
    if (head >= HEADS + KV) w = l.v, head -= HEADS + KV;
    else if (head >= HEADS) w = l.k, head -= HEADS;
    return w + ((long)head * DIM + d) * HIDDEN;
}

// All that the ring brings, in the order of use. Weights do not wait for the kernel before.
__device__ void load_all(u32 ring, Shared& s, const Args& a) {
    u32 at = 0;
    Tokens own;
#pragma unroll 1
    for (int layer = 0; layer < LAYERS; ++layer) {
        const Layer& l = a.layers[layer];
#pragma unroll 1
        for (int unit = blockIdx.x; unit < QKV_UNITS; unit += GRID)
            stream(ring, s, at, HIDDEN, 2 * QKV_TILES, [&](int i) {
                return head_rows(l, unit * QKV_TILES + i / 2, i % 2);
            });
        if (layer == 0) {
            asm volatile("griddepcontrol.wait;" ::: "memory");
            asm volatile("fence.proxy.async;" ::: "memory");
            own = tokens(a);
        }
        if constexpr (TILED) stream_tiles(ring, s, at, a, own, layer);
        stream_tokens(ring, s, at, a, own, layer);
        stream(ring, s, at, MIXED, OUT_HALVES, [&](int i) {
            return l.o + (long)(blockIdx.x * OUT_ROWS + i * 8) * MIXED;
        });
#pragma unroll 1
        for (int unit = blockIdx.x; unit < GATE_UNITS; unit += GRID)
            stream(ring, s, at, HIDDEN, 2 * GATE_TILES, [&](int i) {
                return (i % 2 ? l.up : l.gate) + (long)(unit * GATE_TILES + i / 2) * 8 * HIDDEN;
            });
        stream(ring, s, at, INNER, OUT_HALVES, [&](int i) {
            return l.down + (long)(blockIdx.x * OUT_ROWS + i * 8) * INNER;
        });
    }
}

__device__ void send_heads(const Shared& s, const Args& a, const Layer& l, int unit, u64 turn,
                           u32 tag, float f) {
    constexpr int N = 2 * QKV_TILES;  // eights of rows, of a head's first half and of its second
    int j = threadIdx.x, tile = unit * QKV_TILES + j / 16;
    if (j >= 32) return;
    int head = tile / PER_HEAD, d = tile % PER_HEAD * 8 + j % 8 + (j & 8 ? DIM / 2 : 0);
    float y = j < 8 * N ? f * total<N>(s, j) : 0;
    if (BIASED && j < 8 * N) {
        const u16* bias = head < HEADS ? l.q_bias : head < HEADS + KV ? l.k_bias : l.v_bias;
        int own = head - (head >= HEADS ? HEADS : 0) - (head >= HEADS + KV ? KV : 0);
        y += widen(bias[own * DIM + d]);
    }
    float beside = __shfl_down_sync(~0u, y, 1);
    u64* to = a.qkv + (turn * (HEADS + 2 * KV) * DIM + head * DIM + d) / 2;
    if (j < 8 * N && j % 2 == 0) send(to, pack(y, beside), tag);
}

// Adds to the block's part of the residual stream, which lives in a register, and sends it.
__device__ void send_sum(const Shared& s, u64* words, u64 turn, u32 tag, float& residual,
                         u16* out) {
    int j = threadIdx.x, place = blockIdx.x * OUT_ROWS + j;
    if (j >= OUT_ROWS) return;
    residual = widen(narrow(residual + total<OUT_HALVES>(s, j)));
    float beside = __shfl_down_sync((1u << OUT_ROWS) - 1, residual, 1);
    if (j % 2 == 0)
        send(words + turn * (HIDDEN / 2) + place / 2, pack(residual, beside), tag);
    if (out) out[place] = narrow(residual);
}

__device__ void send_gate(const Shared& s, const Args& a, int unit, u64 turn, u32 tag, float f) {
    constexpr int N = 2 * GATE_TILES;  // eights of rows, of the gate and of what it opens
    int j = threadIdx.x, row = unit * GATE_WIDTH + j / 16 * 8 + j % 8;
    if (j >= 64) return;
    float y = j < 8 * N ? f * total<N>(s, j) : 0;
    float up = __shfl_xor_sync(~0u, y, 8);
    y = y / (1 + __expf(-y)) * up;
    float beside = __shfl_down_sync(~0u, y, 1);
    if (j < 8 * N && j % 16 < 8 && j % 2 == 0)
        send(a.inner + turn * (INNER / 2) + row / 2, pack(y, beside), tag);
}

// q, k and v of a layer.
__device__ void start_heads(const unsigned char* ring, Shared& s, u32& at, const Args& a,
                            const Layer& l, int layer, u64 turn, u32 tag, u32& times,
                            u32& norms) {
    Product<HIDDEN, 2 * QKV_TILES> product;
    uint2 gain = gain_of(l.gain);
    int unit = blockIdx.x;
    bool any = QKV_UNITS >= GRID || unit < QKV_UNITS;
    if (any) product.begin(ring, s, at);
    const u64* words = a.next + (1 - turn) * (HIDDEN / 2);
    if (layer) receive_scaled(s, gain, words, tag - 1, times, norms);
    else scale_input(s, a.x, l.gain);
    if (any) do {
        bool more = QKV_UNITS > GRID && unit + GRID < QKV_UNITS;
        product.finish(ring, s, at, s.x);
        float f = factor(s, a.eps, norms);
        meet();
        if (more) product.begin(ring, s, at);
        send_heads(s, a, l, unit, turn, tag, f);
        if (more) meet();
    } while (QKV_UNITS > GRID && (unit += GRID) < QKV_UNITS);
}

// What the gate lets pass.
__device__ void open_gate(const unsigned char* ring, Shared& s, u32& at, const Args& a,
                          const Layer& l, u64 turn, u32 tag, u32& times, u32& norms) {
    Product<HIDDEN, 2 * GATE_TILES> product;
    uint2 gain = gain_of(l.mid_gain);
    int unit = blockIdx.x;
    bool any = GATE_UNITS >= GRID || unit < GATE_UNITS;
    if (any) product.begin(ring, s, at);
    receive_scaled(s, gain, a.mid + turn * (HIDDEN / 2), tag, times, norms);
    if (any) do {
        bool more = GATE_UNITS > GRID && unit + GRID < GATE_UNITS;
        product.finish(ring, s, at, s.x);
        float f = factor(s, a.mid_eps, norms);
        meet();
        if (more) product.begin(ring, s, at);
        send_gate(s, a, unit, turn, tag, f);
        if (more) meet();
    } while (GATE_UNITS > GRID && (unit += GRID) < GATE_UNITS);
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) step(const __grid_constant__ Args a) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& s = *(Shared*)(memory + SLOTS * SLOT);
    u32 ring = address(memory), at = 0, times = 0, norms = 0;
    auto barrier = [](u64& at, u32 count) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(&at)), "r"(count));
    };
    if (threadIdx.x < SLOTS) barrier(s.full[threadIdx.x], 1), barrier(s.empty[threadIdx.x], WARPS);
    if (threadIdx.x < 2) barrier(s.arrived[threadIdx.x], 1), barrier(s.squared[threadIdx.x], 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
    if (threadIdx.x >= THREADS) return load_all(ring, s, a);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    int mine = blockIdx.x * OUT_ROWS + threadIdx.x, c = threadIdx.x % LANES;
    float residual = threadIdx.x < OUT_ROWS ? widen(a.x[mine]) : 0;
    uint4 cos = __ldg((const uint4*)a.cos + c), sin = __ldg((const uint4*)a.sin + c);
    Tokens own = tokens(a);
    u32 tag = *(volatile u32*)a.epoch;
#pragma unroll 1
    for (int layer = 0; layer < LAYERS; ++layer) {
        const Layer& l = a.layers[layer];
        u64 turn = layer & 1;
        ++tag;
        start_heads(memory, s, at, a, l, layer, turn, tag, times, norms);
        attend(memory, s, at, a, l, own, layer, turn, tag, cos, sin);
        Product<MIXED, OUT_HALVES> out;
        out.begin(memory, s, at);
        merge(s, a, turn, tag);
        receive<MIXED>(s, s.wide, a.mixed + turn * (MIXED / 2), tag, times);
        out.finish(memory, s, at, s.wide), meet();
        send_sum(s, a.mid, turn, tag, residual, nullptr);
        open_gate(memory, s, at, a, l, turn, tag, times, norms);
        Product<INNER, OUT_HALVES> down;
        down.begin(memory, s, at);
        receive<INNER>(s, s.wide, a.inner + turn * (INNER / 2), tag, times);
        down.finish(memory, s, at, s.wide), meet();
        send_sum(s, a.next, turn, tag, residual, layer == LAYERS - 1 ? a.out : nullptr);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *(volatile u32*)a.epoch = tag;
}

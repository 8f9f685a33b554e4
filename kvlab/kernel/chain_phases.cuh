// The four products of chain.cu, what follows each, and the kernel.

constexpr int OUT_UNITS = HIDDEN / (8 * OUT_HALVES), OUT_ROWS = 8 * OUT_HALVES;
constexpr int GATE_UNITS = INNER / (8 * GATE_TILES);
constexpr int QKV_UNITS = (HEADS + 2 * KV) * PER_HEAD / QKV_TILES;

// out = residual + weight x: the output projection and the one that closes the MLP.
template <int K>
__device__ void add_linear(u32 ring, Shared& s, u32& at, const u16* x, const u16* residual,
                           u16* out, int rows, const u64* counter, u64 epoch) {
    constexpr int ITEMS = (OUT_ROWS * ROWS + THREADS - 1) / THREADS;
    bool waited = counter == nullptr;
    for (int unit = blockIdx.x; unit < OUT_UNITS; unit += gridDim.x) {
        float old[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            int j = threadIdx.x + i * THREADS, n = j / OUT_ROWS;
            long place = (long)n * HIDDEN + unit * OUT_ROWS + j % OUT_ROWS;
            old[i] = n < rows ? one_from_global(residual + place) : 0;
        }
        if (!waited) await(counter, epoch);
        waited = true;
        products<K, 1, OUT_HALVES, false>(ring, s, at, x, nullptr, rows);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            int j = threadIdx.x + i * THREADS, n = j / OUT_ROWS;
            long place = (long)n * HIDDEN + unit * OUT_ROWS + j % OUT_ROWS;
            if (n < rows) out[place] = narrow(old[i] + total<1>(s, 0, j % OUT_ROWS, n));
        }
        meet();
    }
}

__device__ void gated(u32 ring, Shared& s, u32& at, const Args& a, u64 epoch) {
    bool waited = false;
    for (int unit = blockIdx.x; unit < GATE_UNITS; unit += gridDim.x) {
        if (!waited) await(a.sync + 16, epoch);
        waited = true;
        products<HIDDEN, GATE_TILES, 2, true>(ring, s, at, a.mid, a.mid_gain, a.rows);
        for (int j = threadIdx.x; j < GATE_TILES * 8 * a.rows; j += THREADS) {
            int n = j / (GATE_TILES * 8), r = j % (GATE_TILES * 8);
            float f = factor(s, n, a.mid_eps);
            float y = f * total<GATE_TILES>(s, r / 8, r % 8, n);
            float z = f * total<GATE_TILES>(s, r / 8, r % 8 + 8, n);
            a.inner[(long)n * INNER + unit * GATE_TILES * 8 + r] =
                narrow(y / (1 + __expf(-y)) * z);
        }
        meet();
    }
}

__device__ const u16* head_rows(const Args& a, int tile, int half) {
    int head = tile / PER_HEAD, d = tile % PER_HEAD * 8 + half * (DIM / 2);
    const u16* w = a.q;
    if (head >= HEADS + KV) w = a.v, head -= HEADS + KV;
    else if (head >= HEADS) w = a.k, head -= HEADS;
    return w + ((long)head * DIM + d) * HIDDEN;
}

// Sum of squares of a whole head from the blocks that hold parts of it: each writes its number with
// the launch's tag in one word, and reads the others' until the tag is there.
__device__ float head_square(const Args& a, u32 tag, int unit, int n, float mine, int j, bool on) {
    constexpr int WIDTH = 8 * QKV_TILES;
#pragma unroll
    for (int i = WIDTH / 2; i; i /= 2) mine += __shfl_xor_sync(~0u, mine, i);
    if (PEERS == 1) return mine;
    u64* words = a.squares + (long)(unit - unit % PEERS) * ROWS + n;
    float got = 0;
    if (on && j == 0) {
        u64 word = (u64)tag << 32 | __float_as_uint(mine);
        asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(words + unit % PEERS * ROWS),
                     "l"(word) : "memory");
    }
    if (on && j < PEERS) {
        u64 word = 0, spins = 0;
        do {
            asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(words + j * ROWS)
                         : "memory");
            check(spins);
        } while ((u32)(word >> 32) != tag);
        got = __uint_as_float((u32)word);
    }
    __syncwarp();
    float y = 0;
#pragma unroll
    for (int i = 0; i < PEERS; ++i) y += __shfl_sync(~0u, got, i, WIDTH);
    return y;
}

__device__ void heads(u32 ring, Shared& s, u32& at, const Args& a, const u64* counter, u64 epoch,
                      u64 tag) {
    constexpr int WIDTH = 8 * QKV_TILES, ITEMS = (WIDTH * ROWS + THREADS - 1) / THREADS;
    bool waited = counter == nullptr;
    if (threadIdx.x == 0) s.tag = (u32)tag;
    for (int unit = blockIdx.x; unit < QKV_UNITS; unit += gridDim.x) {
        if (!waited) await(counter, epoch);
        waited = true;
        const u16* x = a.finishes ? a.out : a.x;
        products<HIDDEN, QKV_TILES, 2, true>(ring, s, at, x, a.gain, a.rows);
        int head = unit * QKV_TILES / PER_HEAD, j = threadIdx.x % WIDTH;
        int d = (unit * QKV_TILES % PER_HEAD + j / 8) * 8 + j % 8;
        int side = head < HEADS ? 0 : head < HEADS + KV ? 1 : 2;
        int own = head - (side > 0 ? HEADS : 0) - (side > 1 ? KV : 0);
        const u16* gain = side ? a.k_gain : a.q_gain;
        u16* out = side == 0 ? a.q_out : side == 1 ? a.k_out : a.v_out;
        const u16* bias = side == 0 ? a.q_bias : side == 1 ? a.k_bias : a.v_bias;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            int n = (threadIdx.x + i * THREADS) / WIDTH;
            bool on = n < a.rows;
            float lo = 0, hi = 0, c0 = 1, c1 = 1, s0 = 0, s1 = 0;
            if (on) {
                float f = factor(s, n, a.eps);
                lo = f * total<QKV_TILES>(s, j / 8, j % 8, n);
                hi = f * total<QKV_TILES>(s, j / 8, j % 8 + 8, n);
                if (BIASED) {
                    lo += widen(bias[own * DIM + d]);
                    hi += widen(bias[own * DIM + d + DIM / 2]);
                }
                if (side < 2) {
                    long row = n * a.cos_stride;
                    c0 = widen(a.cos[row + d]), c1 = widen(a.cos[row + d + DIM / 2]);
                    s0 = widen(a.sin[row + d]), s1 = widen(a.sin[row + d + DIM / 2]);
                }
            }
            if (NORMED && side < 2) {
                float square = head_square(a, s.tag, unit, n, lo * lo + hi * hi, j, on);
                float f = rsqrtf(square / DIM + (float)a.head_eps);
                lo *= f * widen(gain[d]), hi *= f * widen(gain[d + DIM / 2]);
            }
            if (on) {
                long place = ((long)n * (side ? KV : HEADS) + own) * DIM + d;
                out[place] = narrow(lo * c0 - hi * s0);
                out[place + DIM / 2] = narrow(hi * c1 + lo * s1);
            }
        }
        meet();
    }
}

__device__ void load_all(u32 ring, Shared& s, const Args& a) {
    u32 at = 0;
    if (a.finishes) {
        for (int unit = blockIdx.x; unit < OUT_UNITS; unit += gridDim.x)
            stream<MIXED, 1, OUT_HALVES>(ring, s, at, unit, [&](int tile, int half) {
                return a.o + (long)(tile * OUT_ROWS + half * 8) * MIXED;
            });
        for (int unit = blockIdx.x; unit < GATE_UNITS; unit += gridDim.x)
            stream<HIDDEN, GATE_TILES, 2>(ring, s, at, unit, [&](int tile, int half) {
                return (half ? a.up : a.gate) + (long)tile * 8 * HIDDEN;
            });
        for (int unit = blockIdx.x; unit < OUT_UNITS; unit += gridDim.x)
            stream<INNER, 1, OUT_HALVES>(ring, s, at, unit, [&](int tile, int half) {
                return a.down + (long)(tile * OUT_ROWS + half * 8) * INNER;
            });
    }
    if (a.starts)
        for (int unit = blockIdx.x; unit < QKV_UNITS; unit += gridDim.x)
            stream<HIDDEN, QKV_TILES, 2>(ring, s, at, unit, [&](int tile, int half) {
                return head_rows(a, tile, half);
            });
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
chain(const __grid_constant__ Args a) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& s = *(Shared*)(memory + SLOTS * SLOT);
    u32 ring = address(memory), at = 0;
    if (threadIdx.x < SLOTS) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&s.full[threadIdx.x])));
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(
            address(&s.empty[threadIdx.x])), "n"(WARPS));
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    __syncthreads();
    if (threadIdx.x >= THREADS) return load_all(ring, s, a);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    u64 epoch = 0, tag = 0;
    if (threadIdx.x == 0) {  // launches come one after another: a block's ticket tells which it is
        if (a.finishes) epoch = atomicAdd(a.sync, 1ull) / gridDim.x;
        if (a.starts) tag = atomicAdd(a.sync + 8, 1ull) / gridDim.x + 1;
    }
    if (a.finishes) {
        add_linear<MIXED>(ring, s, at, a.mixed, a.x, a.mid, a.rows, nullptr, epoch);
        arrive(a.sync + 16);
        gated(ring, s, at, a, epoch);
        arrive(a.sync + 32);
        add_linear<INNER>(ring, s, at, a.inner, a.mid, a.out, a.rows, a.sync + 32, epoch);
        arrive(a.sync + 48);
    }
    if (a.starts) heads(ring, s, at, a, a.finishes ? a.sync + 48 : nullptr, epoch, tag);
}

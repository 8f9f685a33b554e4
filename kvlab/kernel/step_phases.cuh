// The order of things in step.cu.

__device__ const u16* head_rows(const Layer& l, int tile, int half) {
    int head = tile / PER_HEAD, d = tile % PER_HEAD * 8 + half * (DIM / 2);
    const u16* w = l.q;
    if (head >= HEADS + KV) w = l.v, head -= HEADS + KV;
    else if (head >= HEADS) w = l.k, head -= HEADS;
    return w + ((long)head * DIM + d) * HIDDEN;
}

__device__ void load_all(u32 ring, Shared& s, const Args& a) {
    u32 at = 0;
    for (int layer = 0; layer < LAYERS; ++layer) {
        const Layer& l = a.layers[layer];
        for (int unit = blockIdx.x; unit < QKV_UNITS; unit += GRID)
            stream(ring, s, at, HIDDEN, 2 * QKV_TILES, [&](int i) {
                return head_rows(l, unit * QKV_TILES + i / 2, i % 2);
            });
        stream(ring, s, at, MIXED, OUT_HALVES, [&](int i) {
            return l.o + (long)(blockIdx.x * OUT_ROWS + i * 8) * MIXED;
        });
        for (int unit = blockIdx.x; unit < GATE_UNITS; unit += GRID)
            stream(ring, s, at, HIDDEN, 2 * GATE_TILES, [&](int i) {
                return (i % 2 ? l.up : l.gate) + (long)(unit * GATE_TILES + i / 2) * 8 * HIDDEN;
            });
        stream(ring, s, at, INNER, OUT_HALVES, [&](int i) {
            return l.down + (long)(blockIdx.x * OUT_ROWS + i * 8) * INNER;
        });
    }
}

__device__ void send_heads(const Shared& s, const Args& a, const Layer& l, int unit, u64 turn) {
    int j = threadIdx.x;
    if (j >= QKV_WIDTH) return;
    int head = unit * QKV_TILES / PER_HEAD, d = unit * QKV_TILES % PER_HEAD * 8 + j;
    float f = factor(s, a.eps);
    float lo = f * s.part[j / 8 * 16 + j % 8], hi = f * s.part[j / 8 * 16 + j % 8 + 8];
    if (BIASED) {
        const u16* bias = head < HEADS ? l.q_bias : head < HEADS + KV ? l.k_bias : l.v_bias;
        int own = head - (head >= HEADS ? HEADS : 0) - (head >= HEADS + KV ? KV : 0);
        lo += widen(bias[own * DIM + d]), hi += widen(bias[own * DIM + d + DIM / 2]);
    }
    u32 mask = QKV_WIDTH == 32 ? ~0u : (1u << QKV_WIDTH % 32) - 1;
    float low = __shfl_down_sync(mask, lo, 1), high = __shfl_down_sync(mask, hi, 1);
    constexpr int WORDS = (HEADS + 2 * KV) * DIM / 2;
    u32* to = a.qkv + turn * WORDS + (head * DIM + d) / 2;
    long other = (1 - 2 * (long)turn) * WORDS;
    if (j % 2 == 0) {
        send(to, to + other, pack(lo, low));
        send(to + DIM / 4, to + DIM / 4 + other, pack(hi, high));
    }
}

// Adds to the block's part of the residual stream, which lives in a register, and sends it.
__device__ void send_sum(const Shared& s, u32* words, u64 turn, float& residual, u16* out) {
    int j = threadIdx.x, place = blockIdx.x * OUT_ROWS + j;
    if (j >= OUT_ROWS) return;
    residual = widen(narrow(residual + s.part[j]));
    float beside = __shfl_down_sync((1u << OUT_ROWS) - 1, residual, 1);
    if (j % 2 == 0) send_all(words, turn, HIDDEN / 2, place / 2, pack(residual, beside));
    if (out) out[place] = narrow(residual);
}

__device__ void send_gate(const Shared& s, const Args& a, int unit, u64 turn) {
    int j = threadIdx.x;
    if (j >= 32) return;
    float f = factor(s, a.mid_eps), y = 0;
    if (j < GATE_WIDTH) {
        y = f * s.part[j / 8 * 16 + j % 8];
        y = y / (1 + __expf(-y)) * f * s.part[j / 8 * 16 + j % 8 + 8];
    }
    float beside = __shfl_down_sync(~0u, y, 1);
    if (j < GATE_WIDTH && j % 2 == 0)
        send_all(a.inner, turn, INNER / 2, (unit * GATE_WIDTH + j) / 2, pack(y, beside));
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) step(const __grid_constant__ Args a) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& s = *(Shared*)(memory + SLOTS * SLOT);
    u32 ring = address(memory), at = 0;
    if (threadIdx.x < SLOTS) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&s.full[threadIdx.x])));
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(
            address(&s.empty[threadIdx.x])), "n"(WARPS));
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= THREADS) return load_all(ring, s, a);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    int mine = blockIdx.x * OUT_ROWS + threadIdx.x, c = threadIdx.x % LANES * 8;
    float residual = threadIdx.x < OUT_ROWS ? widen(a.x[mine]) : 0;
    uint4 cos = constant(a.cos + c, true), sin = constant(a.sin + c, true);
    Tokens own = tokens(a);
    for (int layer = 0; layer < LAYERS; ++layer) {
        const Layer& l = a.layers[layer];
        u64 turn = layer & 1;
        for (int phase = QKV; phase <= DOWN; ++phase) {
            int units = phase == QKV ? QKV_UNITS : phase == GATE ? GATE_UNITS : GRID;
            if (phase == GATE && layer + 1 < LAYERS) ask_for(a, own, layer + 1);
            if (phase == OUTPUT) {
                attend(s, a, l, own, layer, turn, cos, sin);
                merge(s, a, turn);
            }
            for (int unit = blockIdx.x; unit < units; unit += GRID) {
                auto from = [&](const u32* words, int n) { return copy_of(words, turn, n / 2); };
                const void* x = layer ? copy_of(a.next, 1 - turn, HIDDEN / 2) : (const u32*)a.x;
                Product p = phase == QKV ? Product{HIDDEN, 2 * QKV_TILES, x, l.gain, layer > 0}
                    : phase == OUTPUT
                    ? Product{MIXED, OUT_HALVES, from(a.mixed, MIXED), nullptr, true}
                    : phase == GATE
                    ? Product{HIDDEN, 2 * GATE_TILES, from(a.mid, HIDDEN), l.mid_gain, true}
                    : Product{INNER, OUT_HALVES, from(a.inner, INNER), nullptr, true};
                multiply_all(memory, s, at, p);
                if (phase == QKV) send_heads(s, a, l, unit, turn);
                else if (phase == GATE) send_gate(s, a, unit, turn);
                else send_sum(s, phase == OUTPUT ? a.mid : a.next, turn, residual,
                              phase == DOWN && layer == LAYERS - 1 ? a.out : nullptr);
                meet();
            }
        }
        __threadfence();  // forgotten is forgotten before anything of the next layer is sent
    }
}

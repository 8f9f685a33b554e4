// All layers of a decoder for one token of one row, in one launch (see step_cuda.py). Six phases a
// layer: q, k, v; attention over a share of the tokens; its merge; output; gate and up; down.
//
// One block per multiprocessor, all resident. Between phases results travel through memory, in
// words that carry the number of their layer. A warp of its own streams what the block reads
// through a ring in shared memory, weights, keys and values in the order in which they are used,
// and waits for no result, so memory is read on. Two buffers of words take turns, layer by layer:
// who sends a word again has heard from everybody who read the one before.
//
// A product's weights wait in registers for what they multiply. Sealed tokens may be codes (see
// step_tiles.cuh).
//
// 128 blocks that look at the same lines again and again wait for one another, and answers wait
// behind weights. So of a pair of blocks each asks for one half of what all need and hands it to
// the other, and no more than AHEAD slots are on their way at a time.
//
// Macros: TYPE_F16, LAYERS, HIDDEN, MIXED, INNER, DIM, HEADS, KV, NORMED, BIASED, PIECE, SLOTS,
// OUT_HALVES, GATE_TILES, QKV_TILES; BLOCK tokens, SLAB and OPEN_SLAB blocks of the cache; GRID
// blocks in clusters of CLUSTER; AHEAD; SHARED bytes of a block; TILED: there are codes.

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
    // Bytes in a slab: keys, values, their scales and zeros; from one layer to the next.
    u64 k_at, v_at, ks_at, kz_at, vs_at, vz_at, k_step, v_step, ks_step, kz_step, vs_step, vz_step;
    u64 open_k, open_v, open_step;
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
    unsigned char wide[2 * WIDEST], x[2 * HIDDEN], heads[2 * (GROUP + 2) * DIM];
    float part[(WARPS + TILED) * (TILES * 16 > GROUP * ROW ? TILES * 16 : GROUP * ROW)];
    __align__(16) float logit[GROUP][64 * TILED + 4], weight[GROUP][64 * TILED + 4], tile[GROUP][4];
    float square[HIDDEN / 128];
    u64 full[SLOTS], empty[SLOTS], arrived[2], squared[2];
};

#include "numbers.cuh"

static_assert(SLOTS * SLOT + sizeof(Shared) <= SHARED, "as `shared_bytes` counts");
#include "step_words.cuh"
#include "step_products.cuh"
#include "step_tokens.cuh"
#include "step_attention.cuh"
#include "step_phases.cuh"

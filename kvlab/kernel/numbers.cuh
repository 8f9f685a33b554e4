// What chain.cu and step.cu share: numbers of 16 bits, products of tiles, reads of shared memory.

__device__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

#if TYPE_F16
__device__ float widen(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
__device__ u16 narrow(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
__device__ float upper(u32 x) { return widen(x >> 16); }  // of two numbers in a word
#define MMA_TYPE "f16"
#else
__device__ float widen(u16 x) { return __uint_as_float((u32)x << 16); }
__device__ u16 narrow(float x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
__device__ float upper(u32 x) { return __uint_as_float(x & 0xffff0000u); }
#define MMA_TYPE "bf16"
#endif

__device__ u32 pack(float a, float b) { return (u32)narrow(b) << 16 | narrow(a); }

__device__ void multiply(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ uint4 from_shared(u32 at) {
    uint4 y;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w) : "r"(at));
    return y;
}

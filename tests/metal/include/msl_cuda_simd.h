// Barriers and simdgroup operations as warp operations: a simdgroup is a warp of 32 lanes. All of
// them take part, as the kernels promise; a warp that breaks this hangs, or synccheck names it.
#ifndef MSL_CUDA_SIMD_H
#define MSL_CUDA_SIMD_H
namespace metal {
#define MSL_DEV __attribute__((__device__))
enum class mem_flags : unsigned { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
MSL_DEV inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
MSL_DEV inline void simdgroup_barrier(mem_flags) { __nvvm_bar_warp_sync(~0u); }
MSL_DEV inline unsigned msl_laneid() { return __nvvm_read_ptx_sreg_laneid(); }

// A T as 32-bit words through one of the shuffles of the hardware.
#define MSL_SHUFFLE(name, builtin)                                                                 \
    template <class T> MSL_DEV inline T name(T x, int at) {                                        \
        static_assert(sizeof(T) <= 16, "");                                                        \
        constexpr int n = (sizeof(T) + 3) / 4;                                                     \
        unsigned w[n] = {};                                                                        \
        __builtin_memcpy(w, &x, sizeof(T));                                                        \
        for (int i = 0; i < n; i++)                                                                \
            w[i] = builtin(~0u, w[i], at, 31);                                               \
        __builtin_memcpy(&x, w, sizeof(T));                                                        \
        return x;                                                                                  \
    }
MSL_SHUFFLE(msl_shfl, __nvvm_shfl_sync_idx_i32)
MSL_SHUFFLE(msl_bfly, __nvvm_shfl_sync_bfly_i32)
#define MSL_REDUCE(name, op)                                                                       \
    template <class T> MSL_DEV inline T name(T a) {                                                \
        for (int s = 16; s; s >>= 1) {                                                             \
            T b = msl_bfly(a, s);                                                                  \
            a = (op);                                                                              \
        }                                                                                          \
        return a;                                                                                  \
    }
MSL_REDUCE(simd_sum, a + b)
MSL_REDUCE(simd_max, a > b ? a : b)
MSL_DEV inline unsigned simd_max(unsigned a) { return __nvvm_redux_sync_umax(a, ~0); }
MSL_REDUCE(simd_min, a < b ? a : b)
MSL_REDUCE(simd_or, a | b)
MSL_REDUCE(simd_and, a & b)
template <class T> MSL_DEV inline T simd_shuffle(T x, ushort l) { return msl_shfl(x, l); }
template <class T> MSL_DEV inline T simd_broadcast(T x, ushort l) { return msl_shfl(x, l); }
template <class T> MSL_DEV inline T simd_shuffle_xor(T x, ushort m) { return msl_bfly(x, m); }
MSL_DEV inline bool simd_any(bool x) { return __nvvm_vote_any_sync(~0u, x); }
MSL_DEV inline bool simd_all(bool x) { return __nvvm_vote_all_sync(~0u, x); }

// simdgroup_matrix with the element layout of msl_simd_matrix.h; products in f32, not tensor cores.
MSL_DEV inline void msl_mpos(unsigned lane, int &r, int &c) {
    unsigned q = lane / 4;
    r = (q & 4) + ((lane / 2) % 4);
    c = (q & 2) * 2 + (lane % 2) * 2;
}
MSL_DEV inline int msl_mlane(int r, int c) { // inverse, for an even column
    return ((r & 4) << 2) | ((c & 4) << 1) | ((r & 3) << 1) | ((c >> 1) & 1);
}
template <class T, int R, int C> struct simdgroup_matrix {
    vec<T, 2> e;
    simdgroup_matrix() = default;
    MSL_DEV simdgroup_matrix(T d) {
        int r, c;
        msl_mpos(msl_laneid(), r, c);
        e[0] = r == c ? d : (T)0;
        e[1] = r == c + 1 ? d : (T)0;
    }
    MSL_DEV vec<T, 2> &thread_elements() { return e; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
template <class T>
MSL_DEV inline void simdgroup_load(simdgroup_matrix<T, 8, 8> &d, const T *s, ulong stride = 8,
                                   ulong2 o = ulong2{0, 0}, bool tr = false) {
    int r, c;
    msl_mpos(msl_laneid(), r, c);
    s += o.y * stride + o.x;
    d.e[0] = tr ? s[c * stride + r] : s[r * stride + c];
    d.e[1] = tr ? s[(c + 1) * stride + r] : s[r * stride + c + 1];
}
template <class T>
MSL_DEV inline void simdgroup_store(simdgroup_matrix<T, 8, 8> d, T *s, ulong stride = 8) {
    int r, c;
    msl_mpos(msl_laneid(), r, c);
    s[r * stride + c] = d.e[0];
    s[r * stride + c + 1] = d.e[1];
}
template <class D, class A, class B, class C>
MSL_DEV inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8> &d,
                                                  simdgroup_matrix<A, 8, 8> a,
                                                  simdgroup_matrix<B, 8, 8> b,
                                                  simdgroup_matrix<C, 8, 8> c) {
    int r, cc;
    msl_mpos(msl_laneid(), r, cc);
    float s0 = c.e[0], s1 = c.e[1];
    for (int k = 0; k < 8; k += 2) {
        vec<A, 2> av = msl_shfl(a.e, msl_mlane(r, k));
        vec<B, 2> b0 = msl_shfl(b.e, msl_mlane(k, cc));
        vec<B, 2> b1 = msl_shfl(b.e, msl_mlane(k + 1, cc));
        s0 += (float)av[0] * (float)b0[0] + (float)av[1] * (float)b1[0];
        s1 += (float)av[0] * (float)b0[1] + (float)av[1] * (float)b1[1];
    }
    d.e[0] = (D)s0;
    d.e[1] = (D)s1;
}
// Matrix units (kernels/units.h) as mma.m16n8k16: k of a product are two columns of each of two words.
// Lane 4r + q holds rows r and r + 8; of the second matrix, lane 4n + q holds columns q of n.
// Weights are read as global memory that nothing writes: through generic addresses, which is all that
// the compiler sees, loads would wait for stores to shared memory.
MSL_DEV inline vec<unsigned, 4> mu_load16(const unsigned char *p) {
    unsigned x, y, z, w;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x), "=r"(y), "=r"(z), "=r"(w) : "l"(p));
    return vec<unsigned, 4>{x, y, z, w};
}
MSL_DEV inline unsigned mu_load4(const unsigned char *p) {
    unsigned v;
    asm("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
MSL_DEV inline unsigned mu_load2(const unsigned char *p) {
    unsigned short v;
    asm("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return v;
}
MSL_DEV inline unsigned mu_row(unsigned lane) { return lane / 4; }
MSL_DEV inline unsigned mu_quad(unsigned lane) { return lane % 4; }
constexpr unsigned short MU_NEXT = 1, MU_AFTER = 2;
struct mu_sums {
    float c[4];
};
MSL_DEV inline void mu_clear(mu_sums &s) { s.c[0] = s.c[1] = s.c[2] = s.c[3] = 0.0f; }
MSL_DEV inline vec<float, 2> mu_sum(mu_sums &s, unsigned h) {
    return vec<float, 2>{s.c[2 * h], s.c[2 * h + 1]};
}
MSL_DEV inline unsigned mu_x_word(vec<half, 2> high, vec<half, 2> low, unsigned p) {
    unsigned w;
    __builtin_memcpy(&w, p == 0 ? &high : &low, 4);
    return w;
}
MSL_DEV inline void mu_add2(mu_sums &s, vec<unsigned, 2> row, vec<unsigned, 2> row8,
                            vec<unsigned, 2> x) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(s.c[0]), "+f"(s.c[1]), "+f"(s.c[2]), "+f"(s.c[3])
        : "r"(row[0]), "r"(row8[0]), "r"(row[1]), "r"(row8[1]), "r"(x[0]), "r"(x[1]));
}
} // namespace metal
#endif

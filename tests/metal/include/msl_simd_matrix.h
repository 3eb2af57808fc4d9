// simdgroup_matrix 8x8. The place of the elements in the lanes is that of Apple's GPUs, so that a
// kernel which reads thread_elements() meets the same layout.
#ifndef MSL_SIMD_MATRIX_H
#define MSL_SIMD_MATRIX_H
namespace metal {
inline void msl_mpos(unsigned lane, int &r, int &c) {
    unsigned q = lane / 4;
    r = (q & 4) + ((lane / 2) % 4);
    c = (q & 2) * 2 + (lane % 2) * 2;
}
template <class T, int R, int C> struct simdgroup_matrix {
    static_assert(R == 8 && C == 8, "only 8x8");
    vec<T, 2> e;
    simdgroup_matrix() = default;
    simdgroup_matrix(T d) {
        int r, c;
        msl_mpos(__msl_lane(), r, c);
        e[0] = r == c ? d : (T)0;
        e[1] = r == c + 1 ? d : (T)0;
    }
    vec<T, 2> &thread_elements() { return e; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
template <class T, int R, int C> inline simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
    simdgroup_matrix<T, R, C> m;
    m.e[0] = m.e[1] = v;
    return m;
}
#define MSL_LOADSTORE(AS)                                                                          \
    template <class T>                                                                             \
    inline void simdgroup_load(simdgroup_matrix<T, 8, 8> &d, AS const T *s, ulong stride = 8,      \
                               ulong2 o = ulong2{0, 0}, bool transpose = false) {                  \
        int r, c;                                                                                  \
        msl_mpos(__msl_lane(), r, c);                                                              \
        s += o.y * stride + o.x;                                                                   \
        d.e[0] = transpose ? s[c * stride + r] : s[r * stride + c];                                \
        d.e[1] = transpose ? s[(c + 1) * stride + r] : s[r * stride + c + 1];                      \
    }                                                                                              \
    template <class T>                                                                             \
    inline void simdgroup_store(simdgroup_matrix<T, 8, 8> d, AS T *s, ulong stride = 8,            \
                                ulong2 o = ulong2{0, 0}, bool transpose = false) {                 \
        int r, c;                                                                                  \
        msl_mpos(__msl_lane(), r, c);                                                              \
        s += o.y * stride + o.x;                                                                   \
        (transpose ? s[c * stride + r] : s[r * stride + c]) = d.e[0];                              \
        (transpose ? s[(c + 1) * stride + r] : s[r * stride + c + 1]) = d.e[1];                    \
    }
MSL_LOADSTORE(device)
#ifdef MSL_CHECK
MSL_LOADSTORE(threadgroup)
#endif
template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8> &d, simdgroup_matrix<A, 8, 8> a,
                                          simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c,
                                          MSL_SITE) {
    struct P {
        vec<A, 2> a;
        vec<B, 2> b;
        vec<C, 2> c;
        vec<D, 2> d;
    } x{a.e, b.e, c.e, {}};
    __msl_simd(
        &x,
        +[](void **p, unsigned m) MSL_NOTSAN {
            if (m != ~0u) {
                __msl_fault("simdgroup_multiply_accumulate: not all 32 lanes are active", 0);
                return;
            }
            float fa[64], fb[64];
            int r, c;
            for (unsigned l = 0; l < 32; l++) {
                msl_mpos(l, r, c);
                P *q = (P *)p[l];
                for (int j = 0; j < 2; j++) {
                    fa[r * 8 + c + j] = (float)q->a[j];
                    fb[r * 8 + c + j] = (float)q->b[j];
                }
            }
            for (unsigned l = 0; l < 32; l++) {
                msl_mpos(l, r, c);
                P *q = (P *)p[l];
                for (int j = 0; j < 2; j++) {
                    float s = (float)q->c[j];
                    for (int k = 0; k < 8; k++)
                        s += fa[r * 8 + k] * fb[k * 8 + c + j];
                    q->d[j] = (D)s;
                }
            }
        },
        site, "simdgroup_multiply_accumulate");
    d.e = x.d;
}
} // namespace metal
#endif

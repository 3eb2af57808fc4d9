// Address spaces, scalar, vector and packed types, constructors, casts, function constants.
#ifndef MSL_TYPES_H
#define MSL_TYPES_H
#ifndef __clang__
#error "clang is needed (ext_vector_type, __bf16, elementwise builtins)"
#endif

#ifdef MSL_CHECK // type-check pass: real, distinct address spaces
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define MSL_TG_VAR static __attribute__((address_space(3)))
#else // run pass: one flat memory
#define device
#define constant const
#define threadgroup
#define MSL_TG_VAR static __attribute__((__shared__))
#endif
#define thread
#ifdef MSL_CUDA
#define kernel __attribute__((always_inline))
#else
#define kernel __attribute__((noinline))
#endif

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef _Float16 half;
typedef __bf16 bfloat;
constexpr half operator""h(long double v) { return (half)v; }

#define MSL_VEC(T)                                                                                 \
    typedef T T##2 __attribute__((ext_vector_type(2)));                                            \
    typedef T T##3 __attribute__((ext_vector_type(3)));                                            \
    typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_VEC(char) MSL_VEC(uchar) MSL_VEC(short) MSL_VEC(ushort) MSL_VEC(int) MSL_VEC(uint)
MSL_VEC(long) MSL_VEC(ulong) MSL_VEC(float) MSL_VEC(half) MSL_VEC(bfloat) MSL_VEC(bool)
#define MSL_PACKED(T)                                                                              \
    typedef T packed_##T##2 __attribute__((ext_vector_type(2), aligned(sizeof(T))));               \
    typedef T packed_##T##4 __attribute__((ext_vector_type(4), aligned(sizeof(T))));
MSL_PACKED(ushort) MSL_PACKED(int) MSL_PACKED(uint) MSL_PACKED(float) MSL_PACKED(half)

#define MSL_SITE unsigned site = __builtin_LINE() * 1024u + (unsigned)__builtin_COLUMN()
#define MSL_NOTSAN __attribute__((no_sanitize("thread", "address")))

extern "C" {
// lane_data[32], null where inactive; the function runs once for the lanes that met
typedef void (*msl_collective)(void **lane_data, unsigned active);
void __msl_simd(void *data, msl_collective fn, unsigned site, const char *what);
void __msl_barrier(unsigned flags, unsigned site);
void __msl_fault(const char *what, unsigned site);
unsigned __msl_lane(void);
void *__msl_tg(unsigned id, unsigned long size, unsigned long align, const char *name);
}

namespace metal {
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
template <class T> struct vinfo {
    typedef T elem;
    static constexpr int n = 1;
};
template <class T, int N> struct vinfo<T __attribute__((ext_vector_type(N)))> {
    typedef T elem;
    static constexpr int n = N;
};
template <class A, class B> struct is_same { static constexpr bool value = false; };
template <class A> struct is_same<A, A> { static constexpr bool value = true; };

// mslc rewrites float4(...) to metal::mk<float4>(...): clang's own float4(a,b,c,d) is an error,
// and its (float4)int4 silently bit-casts, so casts become metal::castto<float4>()->*x.
template <class V, int i, class A> inline void mk_put(V &v, A a) {
    if constexpr (vinfo<A>::n == 1)
        v[i] = (typename vinfo<V>::elem)a;
    else
        for (int k = 0; k < vinfo<A>::n; k++)
            v[i + k] = (typename vinfo<V>::elem)a[k];
}
template <class V, int i> inline void mk_fill(V &) {
    static_assert(i == vinfo<V>::n, "vector constructor: wrong number of components");
}
template <class V, int i, class A, class... R> inline void mk_fill(V &v, A a, R... r) {
    mk_put<V, i, A>(v, a);
    mk_fill<V, i + vinfo<A>::n, R...>(v, r...);
}
template <class V, class A> inline V mk(A a) {
    if constexpr (vinfo<A>::n == 1)
        return V((typename vinfo<V>::elem)a);
    else {
        static_assert(vinfo<A>::n == vinfo<V>::n, "vector conversion: lengths differ");
        V v;
        for (int k = 0; k < vinfo<V>::n; k++)
            v[k] = (typename vinfo<V>::elem)a[k];
        return v;
    }
}
template <class V, class A, class B, class... R> inline V mk(A a, B b, R... r) {
    V v;
    mk_fill<V, 0, A, B, R...>(v, a, b, r...);
    return v;
}
template <class V> struct castto {};
template <class V, class A> inline V operator->*(castto<V>, A a) { return mk<V>(a); }

template <class To, class From> inline To as_type(From f) {
    static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
    return __builtin_bit_cast(To, f);
}

// function constants; mslc exports their addresses, the host sets them before a dispatch
template <class T> struct msl_fc {
    T v;
    bool defined;
    operator T() const { return v; }
};
template <class T> inline bool msl_fc_defined(const msl_fc<T> &f) { return f.defined; }
} // namespace metal
#endif

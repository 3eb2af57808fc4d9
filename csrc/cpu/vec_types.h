/* Owns: the vector types of the variant being compiled (FM_VEC_ISA), loads and stores. Vectors are the compilers'
 * own; what those cannot say is in vec_<isa>.h. */
#ifndef FM_CPU_VEC_TYPES_H
#define FM_CPU_VEC_TYPES_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define FM_VEC_PORTABLE 0 /* 16-byte vectors, no intrinsics: lets the templates compile anywhere */
#define FM_VEC_AVX2 1
#define FM_VEC_AVX512 2
#define FM_VEC_NEON 3
#ifndef FM_VEC_ISA
#define FM_VEC_ISA FM_VEC_PORTABLE
#endif

#if FM_VEC_ISA == FM_VEC_AVX512
#define VB 64
#elif FM_VEC_ISA == FM_VEC_AVX2
#define VB 32
#else
#define VB 16
#endif
enum { VL = VB / 4 }; /* 32-bit lanes */

#define FM_INLINE static inline __attribute__((always_inline, unused))
#define FM_STATIC static __attribute__((unused))

typedef float vf __attribute__((vector_size(VB)));
typedef int32_t vi __attribute__((vector_size(VB)));
typedef uint32_t vu __attribute__((vector_size(VB)));
typedef uint8_t vb __attribute__((vector_size(VB)));
typedef uint16_t vh __attribute__((vector_size(VB / 2)));

FM_INLINE vf vf_load(const void *p)
{
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

FM_INLINE void vf_store(void *p, vf v) { memcpy(p, &v, sizeof v); }

FM_INLINE vu vu_load(const void *p)
{
    vu v;
    memcpy(&v, p, sizeof v);
    return v;
}

FM_INLINE void vu_store(void *p, vu v) { memcpy(p, &v, sizeof v); }

FM_INLINE vf vf_set(float x) { return x - (vf){0}; }
FM_INLINE vu vu_set(uint32_t x) { return x - (vu){0}; }

/* The first n lanes, the others 0; 0 <= n <= VL. */
FM_INLINE vf vf_load_part(const float *p, int64_t n)
{
    vf v = {0};
    memcpy(&v, p, (size_t)n * sizeof *p);
    return v;
}

FM_INLINE void vf_store_part(float *p, vf v, int64_t n) { memcpy(p, &v, (size_t)n * sizeof *p); }

FM_INLINE vf vf_select(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

FM_INLINE uint32_t dword_at(const void *p)
{
    uint32_t x;
    memcpy(&x, p, sizeof x);
    return x;
}

#endif

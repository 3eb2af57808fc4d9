// Shared by all kernels: function constants, number formats, decoding of affine codes.
//
// The subset of MSL used here is what tests/metal/ executes on Linux: no kernel templates, no
// textures, float4(...) constructors only, every simd operation under uniform control.
#ifndef FM_COMMON_H
#define FM_COMMON_H
#include <metal_stdlib>

#include "metal_args.h"

using namespace metal;

constant uint FC_FORMAT [[function_constant(0)]];
constant uint FC_GROUP [[function_constant(1)]];
constant uint FC_SCALE [[function_constant(2)]];
constant uint FC_VEC [[function_constant(3)]];
constant uint FC_GATED [[function_constant(4)]];
constant uint FC_DIM [[function_constant(5)]];
constant uint FC_BYTES [[function_constant(6)]];
constant uint FC_LONG [[function_constant(7)]];

inline float sigmoid(float x) {
    const float e = exp(-abs(x));
    return x >= 0.0f ? 1.0f / (1.0f + e) : e / (1.0f + e);
}

inline float silu(float x) { return x * sigmoid(x); }

// The bits of element i of plain numbers; at their natural addresses, or with FC_BYTES at any.
inline uint plain_bits(device const uchar *p, uint format, uint i) {
    if (FC_BYTES && format == FM_FMT_F32)
        return uint(p[4 * i]) | uint(p[4 * i + 1]) << 8 | uint(p[4 * i + 2]) << 16 |
               uint(p[4 * i + 3]) << 24;
    if (format == FM_FMT_F32)
        return ((device const uint *)p)[i];
    return FC_BYTES ? uint(p[2 * i]) | uint(p[2 * i + 1]) << 8 : uint(((device const ushort *)p)[i]);
}

inline float plain_value(uint bits, uint format) {
    return format == FM_FMT_F32    ? as_type<float>(bits)
           : format == FM_FMT_BF16 ? as_type<float>(bits << 16)
                                   : float(as_type<half>(ushort(bits)));
}

inline float plain_at(device const uchar *p, uint format, uint i) {
    return plain_value(plain_bits(p, format, i), format);
}

// Code j of a row: FC_FORMAT bits from bit j * FC_FORMAT of a little-endian bit stream, which
// begins `at` bytes past `row`.
inline float code_at(device const uint *row, uint at, uint j) {
    const uint bit = (FC_BYTES ? 8 * at : 0) + j * FC_FORMAT, shift = bit % 32;
    uint v = row[bit / 32] >> shift;
    if (shift + FC_FORMAT > 32)
        v |= row[bit / 32 + 1] << (32 - shift);
    return float(v & ((1u << FC_FORMAT) - 1));
}

// The same from a block of 32 codes in registers; j is known when the loop is unrolled.
inline float code_of(thread const uint *w, uint j) {
    const uint bit = j * FC_FORMAT, shift = bit % 32;
    uint v = w[bit / 32] >> shift;
    if (shift + FC_FORMAT > 32)
        v |= w[bit / 32 + 1] << (32 - shift);
    return float(v & ((1u << FC_FORMAT) - 1));
}

// Load the FC_FORMAT words of a block (32 codes) that begins `at` bytes past `p`.
inline void load_block(device const uint *p, uint at, thread uint *w) {
    if (FC_BYTES && at != 0) { // a word past the block holds its last bytes
        uint low = p[0];
        for (uint i = 0; i < FC_FORMAT; i++) {
            const uint high = p[i + 1];
            w[i] = low >> (8 * at) | high << (32 - 8 * at);
            low = high;
        }
    } else if (FC_VEC && FC_FORMAT == 4) {
        const uint4 v = *(device const uint4 *)p;
        w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    } else if (FC_VEC && FC_FORMAT == 8) {
        const uint4 v = ((device const uint4 *)p)[0], u = ((device const uint4 *)p)[1];
        w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
        w[4] = u.x, w[5] = u.y, w[6] = u.z, w[7] = u.w;
    } else if (FC_VEC && FC_FORMAT == 2) {
        const uint2 v = *(device const uint2 *)p;
        w[0] = v.x, w[1] = v.y;
    } else {
        for (uint i = 0; i < FC_FORMAT; i++)
            w[i] = p[i];
    }
}

// Column c of affine row data: one rounding of scale * code + bias.
inline float affine_at(device const uint *codes, uint at, device const uchar *scales,
                       device const uchar *biases, uint c) {
    const float s = plain_at(scales, FC_SCALE, c / FC_GROUP);
    return fma(code_at(codes, at, c), s, plain_at(biases, FC_SCALE, c / FC_GROUP));
}

// Byte offsets in a device pointer of any type.
inline device const uint *row_of(device const uint *p, ulong bytes) {
    return (device const uint *)((device const uchar *)p + bytes);
}

inline float pick(bool second, float a, float b) { return second ? b : a; }
#endif

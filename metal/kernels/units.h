// Products of codes and x on matrix units, and which lane holds what of them. A simdgroup takes 16
// matrix rows at once: a lane has columns of rows r and r + 8, where r is mu_row, and the four
// lanes of a row are told apart by mu_quad.
//
// A compiler for another GPU may bring its own (FM_OWN_UNITS), with another order of lanes.
#ifndef FM_UNITS_H
#define FM_UNITS_H
#ifndef FM_OWN_UNITS

inline uint4 mu_load16(device const uchar *p) { return *(device const uint4 *)p; }
inline uint mu_load4(device const uchar *p) { return *(device const uint *)p; }
inline uint mu_load2(device const uchar *p) { return *(device const ushort *)p; }

inline uint mu_row(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
inline uint mu_quad(uint lane) { return (lane / 4 & 2) + lane % 2; }
constant ushort MU_NEXT = 1, MU_AFTER = 8; // xor of a lane's number that leads to the others of its row

// Sums of rows r and r + 8 over the lane's own columns: with the high and the low part of x.
struct mu_sums {
    simdgroup_float8x8 m[2];
};

inline void mu_clear(thread mu_sums &s) { s.m[0] = s.m[1] = simdgroup_float8x8(0.0f); }

inline float2 mu_sum(thread mu_sums &s, uint h) { return s.m[h].thread_elements(); }

// What the second matrix of a product holds for columns 0 and 1 of a lane, in lane 2q or 2q + 1 of
// its rows (p = 0, 1): column p times high, low. The other lanes hold zeros there, so that a lane's
// columns meet its own codes alone.
inline uint mu_x_word(half2 high, half2 low, uint p) {
    return as_type<uint>(p == 0 ? half2(high.x, low.x) : half2(high.y, low.y));
}

inline void mu_add(thread mu_sums &s, uint row, uint row8, uint x) {
    simdgroup_half8x8 a, b;
    b.thread_elements() = as_type<half2>(x);
    a.thread_elements() = as_type<half2>(row);
    simdgroup_multiply_accumulate(s.m[0], a, b, s.m[0]);
    a.thread_elements() = as_type<half2>(row8);
    simdgroup_multiply_accumulate(s.m[1], a, b, s.m[1]);
}

// Two words of two columns each, of both rows.
inline void mu_add2(thread mu_sums &s, uint2 row, uint2 row8, uint2 x) {
    mu_add(s, row.x, row8.x, x.x);
    mu_add(s, row.y, row8.y, x.y);
}
#endif
#endif

/* Inverse transforms of one block: coefficients to 8, 4 or 2 samples a side; or to any number of them if it is flat.
 *
 * Eight lanes of 32 bits hold the columns in the first pass and the rows in the second.
 */
#ifndef GIGATOME_TRANSFORM_H
#define GIGATOME_TRANSFORM_H

#include "lanes.h"

typedef int16_t Halves __attribute__((vector_size(16)));

enum { CONST_BITS = 13, PASS1_BITS = 2 };

/* 64 coefficients in natural order. */
typedef union {
    int16_t of[64];
    Halves rows[8];
} Block;

INLINE void clear(Block *block) {
    for (int row = 0; row < 8; row++) block->rows[row] = (Halves){0};
}

/* Coefficients times their quantum, in 16 bits. */
INLINE Lanes dequantised(const Block *block, const uint16_t *quantum, int row) {
    Halves factors;
    memcpy(&factors, quantum + 8 * row, sizeof factors);
    return __builtin_convertvector(block->rows[row] * factors, Lanes);
}

INLINE Lanes descale(Lanes value, int bits) { return (value + (1 << (bits - 1))) >> bits; }

INLINE void transpose(Lanes r[8]) {
    Lanes a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        a[2 * i + 1] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; k++) {
            b[i + k] = __builtin_shufflevector(a[i + k], a[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            b[i + k + 2] = __builtin_shufflevector(a[i + k], a[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int k = 0; k < 4; k++) {
        r[k] = __builtin_shufflevector(b[k], b[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[k + 4] = __builtin_shufflevector(b[k], b[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

INLINE void pass8(Lanes v[8], int bits) {
    Lanes z1 = (v[2] + v[6]) * 4433, even2 = z1 - v[6] * 15137, even3 = z1 + v[2] * 6270;
    Lanes even0 = (v[0] + v[4]) << CONST_BITS, even1 = (v[0] - v[4]) << CONST_BITS;
    Lanes t10 = even0 + even3, t13 = even0 - even3, t11 = even1 + even2, t12 = even1 - even2;
    Lanes z3 = v[7] + v[3], z4 = v[5] + v[1], z5 = (z3 + z4) * 9633;
    Lanes y1 = (v[7] + v[1]) * -7373, y2 = (v[5] + v[3]) * -20995;
    z3 = z3 * -16069 + z5;
    z4 = z4 * -3196 + z5;
    Lanes t0 = v[7] * 2446 + y1 + z3, t1 = v[5] * 16819 + y2 + z4;
    Lanes t2 = v[3] * 25172 + y2 + z3, t3 = v[1] * 12299 + y1 + z4;
    v[0] = descale(t10 + t3, bits), v[7] = descale(t10 - t3, bits);
    v[1] = descale(t11 + t2, bits), v[6] = descale(t11 - t2, bits);
    v[2] = descale(t12 + t1, bits), v[5] = descale(t12 - t1, bits);
    v[3] = descale(t13 + t0, bits), v[4] = descale(t13 - t0, bits);
}

INLINE void pass4(const Lanes v[8], Lanes out[4], int bits) {
    Lanes t0 = v[0] << (CONST_BITS + 1), t2 = v[2] * 15137 - v[6] * 6270, t10 = t0 + t2, t12 = t0 - t2;
    Lanes low = v[1] * 8697 - v[3] * 17799 + v[5] * 11893 - v[7] * 1730;
    Lanes high = v[1] * 20995 + v[3] * 7373 - v[5] * 4926 - v[7] * 4176;
    out[0] = descale(t10 + high, bits), out[3] = descale(t10 - high, bits);
    out[1] = descale(t12 + low, bits), out[2] = descale(t12 - low, bits);
}

INLINE void pass2(const Lanes v[8], Lanes out[2], int bits) {
    Lanes t10 = v[0] << (CONST_BITS + 2), t0 = v[1] * 29692 - v[3] * 10426 + v[5] * 6967 - v[7] * 5906;
    out[0] = descale(t10 + t0, bits), out[1] = descale(t10 - t0, bits);
}

INLINE Lanes sample(Lanes value) { return clamped(value + 128); }

/* Four columns, a row a lane, as the four bytes of each lane. */
INLINE Lanes packed(const Lanes v[4]) {
    return sample(v[0]) | sample(v[1]) << 8 | sample(v[2]) << 16 | sample(v[3]) << 24;
}

INLINE void put8(const Lanes v[8], uint8_t *out, ptrdiff_t stride) {
    Lanes left = packed(v), right = packed(v + 4);
    Lanes rows[2] = {__builtin_shufflevector(left, right, 0, 8, 1, 9, 2, 10, 3, 11),
                     __builtin_shufflevector(left, right, 4, 12, 5, 13, 6, 14, 7, 15)};
    for (int row = 0; row < 8; row++) memcpy(out + row * stride, (const uint8_t *)rows + 8 * row, 8);
}

INLINE void put4(const Lanes v[4], uint8_t *out, ptrdiff_t stride) {
    Lanes rows = packed(v);
    for (int row = 0; row < 4; row++) memcpy(out + row * stride, (const uint8_t *)&rows + 4 * row, 4);
}

INLINE void put2(const Lanes v[2], uint8_t *out, ptrdiff_t stride) {
    Lanes left = sample(v[0]), right = sample(v[1]);
    out[0] = (uint8_t)left[0], out[1] = (uint8_t)right[0];
    out[stride] = (uint8_t)left[1], out[stride + 1] = (uint8_t)right[1];
}

/* A block of one level. */
INLINE void flat(int level, int side, uint8_t *out, ptrdiff_t stride) {
    level = ((level + 4) >> 3) + 128;
    level = level < 0 ? 0 : level > 255 ? 255 : level;
    for (int row = 0; row < side; row++) memset(out + row * stride, level, (size_t)side);
}

INLINE void inverse_transform(const Block *block, const uint16_t *quantum, int side, uint8_t *out, ptrdiff_t stride) {
    Lanes v[8], w[8], none = {0};
    for (int row = 0; row < 8; row++) v[row] = dequantised(block, quantum, row), w[row] = none;
    if (side == 8) {
        pass8(v, CONST_BITS - PASS1_BITS);
        transpose(v);
        pass8(v, CONST_BITS + PASS1_BITS + 3);
        put8(v, out, stride);
    } else if (side == 4) {
        pass4(v, w, CONST_BITS - PASS1_BITS + 1);
        transpose(w);
        pass4(w, v, CONST_BITS + PASS1_BITS + 3 + 1);
        put4(v, out, stride);
    } else {
        pass2(v, w, CONST_BITS - PASS1_BITS + 2);
        transpose(w);
        pass2(w, v, CONST_BITS + PASS1_BITS + 3 + 2);
        put2(v, out, stride);
    }
}

#endif

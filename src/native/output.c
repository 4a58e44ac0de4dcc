/* Upsampling and colour conversion, row by row. */
#include "output.h"
#include "lanes.h"

/* Rows are worked on a vector at a time and so run over their ends by up to this many bytes. */
enum { SLACK = 64 };

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef int32_t Quad __attribute__((vector_size(16)));
typedef uint16_t Words __attribute__((vector_size(32)));

static size_t row_stride(const Crop *crop) { return ((size_t)crop->width + 2 * SLACK + 63) / 64 * 64; }

/* Two rows of upsampled samples, one of sums (two bytes each), one of pixels (three). */
size_t row_bytes(const Crop *crop) { return 7 * row_stride(crop); }

INLINE Words words_of(const uint8_t *in) {
    Bytes bytes;
    memcpy(&bytes, in, sizeof bytes);
    return __builtin_convertvector(bytes, Words);
}

/* Samples [first, first + count) of a row, or three times it and once the row `far`; beyond the component's ends its
 * end samples are repeated. */
INLINE void sums_of(const Plane *plane, int y, int far, int first, int count, uint16_t *out) {
    const uint8_t *near_row = plane->samples + y * plane->stride, *far_row = plane->samples + far * plane->stride;
    int begin = first < 0 ? 0 : first, end = first + count > plane->width ? plane->width : first + count;
    for (ptrdiff_t i = begin; i < end; i += 16) {
        Words sums = words_of(near_row + i);
        if (plane->down == 2) sums = 3 * sums + words_of(far_row + i);
        memcpy(out + (i - first), &sums, sizeof sums);
    }
    if (begin > first) out[0] = out[1];
    if (end < first + count) out[count - 1] = out[count - 2];
}

/* The triangle filter: each pixel is 3/4 the nearer sample and 1/4 the further one. */
INLINE void interpolate(const uint16_t *in, int samples, int low, int high, int shift, uint8_t *out) {
    for (ptrdiff_t i = 0; i < samples; i += 16) {
        Words before, here, after, pixels;
        memcpy(&before, in + i - 1, sizeof before);
        memcpy(&here, in + i, sizeof here);
        memcpy(&after, in + i + 1, sizeof after);
        here *= 3;
        before = (here + before + (uint16_t)low) >> shift;
        after = (here + after + (uint16_t)high) >> shift;
        pixels = before | after << 8;
        memcpy(out + 2 * i, &pixels, sizeof pixels);
    }
}

/* Pixels [x, x + width) of row y of one component, at full resolution; may point into the plane. */
INLINE const uint8_t *upsampled(const Plane *plane, int x, int y, int width, uint16_t *sums, uint8_t *out) {
    int near_y = y / plane->down, far_y = near_y;
    const uint8_t *row = plane->samples + near_y * plane->stride;
    if (plane->across == 1) return row + x;
    int first = x / 2, samples = (x + width - 1) / 2 + 1 - first;
    if (!plane->fancy) {
        for (int i = 0; i < samples; i++) out[2 * i] = out[2 * i + 1] = row[first + i];
        return out + (x & 1);
    }
    if (plane->down == 2) far_y += y & 1 ? 1 : -1;
    far_y = far_y < 0 ? 0 : far_y >= plane->height ? plane->height - 1 : far_y;
    sums_of(plane, near_y, far_y, first - 1, samples + 2, sums);
    if (plane->down == 1)
        interpolate(sums + 1, samples, 1, 2, 2, out);
    else
        interpolate(sums + 1, samples, 8, 7, 4, out);
    return out + (x & 1);
}

/* Samples 8 * half to 8 * half + 7 of 16, widened. */
INLINE Lanes lanes_of(Bytes bytes, int half) {
    Bytes zero = {0};
    if (half) bytes = __builtin_shufflevector(bytes, bytes, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
    Quad low = (Quad)__builtin_shufflevector(bytes, zero, 0, 16, 16, 16, 1, 16, 16, 16, 2, 16, 16, 16, 3, 16, 16, 16);
    Quad high = (Quad)__builtin_shufflevector(bytes, zero, 4, 16, 16, 16, 5, 16, 16, 16, 6, 16, 16, 16, 7, 16, 16, 16);
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
}

/* Four pixels of four bytes become four of three; 16 bytes are written. */
INLINE void put_pixels(Quad pixels, uint8_t *out) {
    Bytes bytes = (Bytes)pixels;
    bytes = __builtin_shufflevector(bytes, bytes, 0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 15, 15, 15);
    memcpy(out, &bytes, sizeof bytes);
}

/* Eight pixels. YCbCr is ITU-R BT.601, full range, in 16 fractional bits. */
INLINE void convert(Lanes a, Lanes b, Lanes c, int ycbcr, uint8_t *out) {
    if (ycbcr) {
        Lanes y = a, u = b - 128, v = c - 128;
        a = clamped(y + ((91881 * v + 32768) >> 16));
        b = clamped(y + ((-22554 * u - 46802 * v + 32768) >> 16));
        c = clamped(y + ((116130 * u + 32768) >> 16));
    }
    Lanes pixels = a | b << 8 | c << 16;
    put_pixels(__builtin_shufflevector(pixels, pixels, 0, 1, 2, 3), out);
    put_pixels(__builtin_shufflevector(pixels, pixels, 4, 5, 6, 7), out + 12);
}

INLINE void to_rgb(const uint8_t *const planes[3], int ycbcr, int width, uint8_t *out) {
    for (ptrdiff_t i = 0; i < width; i += 16) {
        Bytes a, b, c;
        memcpy(&a, planes[0] + i, sizeof a);
        memcpy(&b, planes[1] + i, sizeof b);
        memcpy(&c, planes[2] + i, sizeof c);
        convert(lanes_of(a, 0), lanes_of(b, 0), lanes_of(c, 0), ycbcr, out + 3 * i);
        convert(lanes_of(a, 1), lanes_of(b, 1), lanes_of(c, 1), ycbcr, out + 3 * i + 24);
    }
}

CLONES void write_pixels(const Picture *picture, const Crop *crop, uint8_t *rows) {
    size_t stride = row_stride(crop);
    uint8_t *first = rows, *second = first + stride, *line = second + stride;
    uint16_t *sums = (uint16_t *)(line + 3 * stride) + 1;
    for (int row = 0; row < crop->height; row++) {
        const uint8_t *planes[3];
        for (int c = 0; c < picture->components; c++)
            planes[c] = upsampled(&picture->planes[c], crop->x, crop->y + row, crop->width, sums,
                                  c == 1 ? first : second);
        if (picture->components == 1) planes[1] = planes[2] = planes[0];
        if (picture->components == 1 || picture->rgb)
            to_rgb(planes, 0, crop->width, line);
        else
            to_rgb(planes, 1, crop->width, line);
        memcpy(crop->out + row * crop->stride, line, 3 * (size_t)crop->width);
    }
}

/* Crops and colours of views. Loops are written for the compiler to vectorise. */
#include "views.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Three components side by side, and one that is not used. */
typedef float Pixel __attribute__((vector_size(16)));

enum { LANES = 16 };

/* `count` output pixels of one axis: each is the sum of source pixels from `first`, weighted. */
typedef struct {
    int64_t count, taps;
    int32_t *first, *used;
    float *weight; /* [count, taps], of which `used` count */
} Span;

INLINE Pixel pixel_at(const float *from) {
    Pixel pixel;
    memcpy(&pixel, from, sizeof pixel);
    return pixel;
}

INLINE float within(float value) {
    value = value > 0 ? value : 0;
    return value < 1 ? value : 1;
}

INLINE float cubic(float distance) {
    if (distance < 1) return (1.5f * distance - 2.5f) * distance * distance + 1;
    if (distance < 2) return ((-0.5f * distance + 2.5f) * distance - 4) * distance + 2;
    return 0;
}

static void span_free(Span *span) {
    free(span->first);
    free(span->used);
    free(span->weight);
}

/* Bicubic weights that resample `length` pixels from `start`, times `gain`. A place outside the source is that of its
 * mirror image; what a kernel has outside it is left out. */
static int span_make(Span *span, float start, float length, int mirror, int64_t source, int64_t count, float gain) {
    float step = length / (float)count, reach = step > 1 ? step : 1;
    *span = (Span){.count = count, .taps = (int64_t)ceilf(4 * reach) + 1};
    span->first = malloc(sizeof *span->first * (size_t)count);
    span->used = malloc(sizeof *span->used * (size_t)count);
    span->weight = malloc(sizeof *span->weight * (size_t)(count * span->taps));
    if (!span->first || !span->used || !span->weight) return 0;
    for (int64_t i = 0; i < count; i++) {
        float place = (float)i + 0.5f, sum = 0, *weight = span->weight + i * span->taps;
        float centre = fabsf(start + (mirror ? (float)count - place : place) * step);
        centre = (float)source - fabsf((float)source - centre);
        if (centre < 0) centre = 0;
        int64_t first = (int64_t)floorf(centre - 2 * reach), end = first + span->taps;
        if (first < 0) first = 0;
        if (end > source) end = source;
        for (int64_t tap = first; tap < end; tap++) {
            weight[tap - first] = cubic(fabsf(((float)tap + 0.5f - centre) / reach));
            sum += weight[tap - first];
        }
        while (end > first + 1 && weight[end - first - 1] == 0) end--;
        span->first[i] = (int32_t)first;
        span->used[i] = (int32_t)(end - first);
        for (int64_t tap = 0; tap < end - first; tap++) weight[tap] *= gain / sum;
    }
    return 1;
}

/* The weighted sum of rows of `length` bytes that lie `stride` apart. */
INLINE void sum_rows(const uint8_t *rows, int64_t stride, int64_t length, const float *weight, int taps, float *out) {
    for (int64_t i = 0; i < length; i++) out[i] = (float)rows[i] * weight[0];
    int tap = 1;
    for (; tap + 2 < taps; tap += 3) {
        const uint8_t *a = rows + tap * stride, *b = a + stride, *c = b + stride;
        float p = weight[tap], q = weight[tap + 1], r = weight[tap + 2];
        for (int64_t i = 0; i < length; i++) out[i] += (float)a[i] * p + (float)b[i] * q + (float)c[i] * r;
    }
    for (; tap < taps; tap++)
        for (int64_t i = 0; i < length; i++) out[i] += (float)rows[tap * stride + i] * weight[tap];
}

CLONES static void crop_rows(const uint8_t *pixels, int64_t width, const Span *across, const Span *down, int transpose,
                             float *sums, float *out) {
    int64_t size = across->count, low = width, high = 0;
    for (int64_t i = 0; i < size; i++) {
        int64_t end = across->first[i] + across->used[i];
        low = across->first[i] < low ? across->first[i] : low;
        high = end > high ? end : high;
    }
    for (int64_t row = 0; row < size; row++) {
        const uint8_t *source = pixels + (down->first[row] * width + low) * 3;
        sum_rows(source, width * 3, (high - low) * 3, down->weight + row * down->taps, down->used[row], sums);
        int64_t step = transpose ? size : 1;
        float *to = out + row * (transpose ? 1 : size);
        for (int64_t column = 0; column < size; column++, to += step) {
            const float *from = sums + 3 * (across->first[column] - low), *weight = across->weight + column * across->taps;
            Pixel sum = pixel_at(from) * weight[0];
            int tap = 1, used = across->used[column];
            for (; tap + 2 < used; tap += 3)
                sum += pixel_at(from + 3 * tap) * weight[tap] + pixel_at(from + 3 * tap + 3) * weight[tap + 1] +
                       pixel_at(from + 3 * tap + 6) * weight[tap + 2];
            for (; tap < used; tap++) sum += pixel_at(from + 3 * tap) * weight[tap];
            to[0] = sum[0], to[size * size] = sum[1], to[2 * size * size] = sum[2];
        }
    }
    for (int64_t i = 0; i < 3 * size * size; i++) out[i] = within(out[i]);
}

int crop_view(const uint8_t *pixels, int64_t height, int64_t width, const Box *box, int64_t size, float *out) {
    Span across = {0}, down = {0};
    float *sums = malloc(sizeof *sums * (3 * (size_t)width + 1));
    int done = sums && span_make(&across, box->x, box->width, box->mirror_x != 0, width, size, 1.0f) &&
               span_make(&down, box->y, box->height, box->mirror_y != 0, height, size, 1 / 255.0f);
    if (done) crop_rows(pixels, width, &across, &down, box->transpose != 0, sums, out);
    span_free(&across);
    span_free(&down);
    free(sums);
    return done;
}

INLINE float luma(float red, float green, float blue) { return red * 0.299f + green * 0.587f + blue * 0.114f; }

INLINE void change_brightness(float *planes, int64_t count, float factor) {
    for (int64_t i = 0; i < 3 * count; i++) planes[i] = within(planes[i] * factor);
}

INLINE void change_contrast(float *red, float *green, float *blue, int64_t count, float factor) {
    float sums[LANES] = {0}, mean = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int64_t j = 0; j < LANES; j++) sums[j] += luma(red[i + j], green[i + j], blue[i + j]);
    for (; i < count; i++) mean += luma(red[i], green[i], blue[i]);
    for (int64_t j = 0; j < LANES; j++) mean += sums[j];
    mean = mean / (float)count * (1 - factor);
    for (i = 0; i < count; i++) {
        red[i] = within(red[i] * factor + mean);
        green[i] = within(green[i] * factor + mean);
        blue[i] = within(blue[i] * factor + mean);
    }
}

INLINE void change_saturation(float *red, float *green, float *blue, int64_t count, float factor) {
    for (int64_t i = 0; i < count; i++) {
        float gray = luma(red[i], green[i], blue[i]) * (1 - factor);
        red[i] = within(red[i] * factor + gray);
        green[i] = within(green[i] * factor + gray);
        blue[i] = within(blue[i] * factor + gray);
    }
}

/* On the circle, red lies at 0 and 6, green at 2 and blue at 4. */
INLINE void change_hue(float *red, float *green, float *blue, int64_t count, float turn) {
    for (int64_t i = 0; i < count; i++) {
        float r = red[i], g = green[i], b = blue[i];
        float top = r > g ? r : g, bottom = r > g ? g : r;
        top = top > b ? top : b;
        bottom = bottom < b ? bottom : b;
        float chroma = top - bottom, unit = 1 / (chroma > 1e-8f ? chroma : 1e-8f);
        float on_red = (g - b) * unit, on_green = (b - r) * unit + 2, on_blue = (r - g) * unit + 4;
        float angle = top == g ? on_green : on_blue;
        angle = (top == r ? on_red : angle) + 6 * turn;
        angle = angle < 0 ? angle + 6 : angle;
        angle = angle >= 6 ? angle - 6 : angle;
        red[i] = top - chroma * within(2 - fabsf(angle - 3));
        green[i] = top - chroma * within(fabsf(angle - 2) - 1);
        blue[i] = top - chroma * within(fabsf(angle - 4) - 1);
    }
}

INLINE void make_gray(float *red, float *green, float *blue, int64_t count) {
    for (int64_t i = 0; i < count; i++) red[i] = green[i] = blue[i] = luma(red[i], green[i], blue[i]);
}

CLONES static void recolour(float *planes, int64_t count, const Colours *colours, const uint8_t *order) {
    float *red = planes, *green = planes + count, *blue = green + count;
    for (int change = 0; change < CHANGES; change++) {
        if (order[change] == BRIGHTNESS && colours->brightness != 1)
            change_brightness(planes, count, colours->brightness);
        else if (order[change] == CONTRAST && colours->contrast != 1)
            change_contrast(red, green, blue, count, colours->contrast);
        else if (order[change] == SATURATION && colours->saturation != 1)
            change_saturation(red, green, blue, count, colours->saturation);
        else if (order[change] == HUE && colours->hue != 0)
            change_hue(red, green, blue, count, colours->hue);
    }
    if (colours->gray != 0) make_gray(red, green, blue, count);
}

/* out = a sum of `in` and its neighbours at `stride` times 1 to `radius` on both sides, weighted. */
INLINE void sum_around(const float *in, int64_t stride, int64_t length, const float *weight, int radius,
                       float *restrict out) {
    for (int64_t i = 0; i < length; i++) out[i] = in[i] * weight[0];
    int64_t k = 1;
    for (; k + 1 <= radius; k += 2) {
        const float *a = in - k * stride, *b = in + k * stride, *c = a - stride, *d = b + stride;
        float p = weight[k], q = weight[k + 1];
        for (int64_t i = 0; i < length; i++) out[i] += (a[i] + b[i]) * p + (c[i] + d[i]) * q;
    }
    if (k == radius) {
        const float *a = in - k * stride, *b = in + k * stride;
        for (int64_t i = 0; i < length; i++) out[i] += (a[i] + b[i]) * weight[k];
    }
}

/* `line` and `spare` begin as zeros: a row with `radius` more at its ends, a plane with so many rows more at its. */
CLONES static void blur_planes(float *planes, int64_t height, int64_t width, const float *weight, int radius,
                               const float *across, const float *down, float *line, float *spare) {
    float *inner = spare + radius * width;
    for (int plane = 0; plane < 3; plane++) {
        memcpy(inner, planes, sizeof *planes * (size_t)(height * width));
        for (int64_t row = 0; row < height; row++, planes += width) {
            sum_around(inner + row * width, width, width, weight, radius, line + radius);
            sum_around(line + radius, 1, width, weight, radius, planes);
            for (int64_t i = 0; i < width; i++) planes[i] *= across[i] * down[row];
        }
    }
}

/* One over the share of a Gaussian's weights around each of `length` pixels that lies among them. */
static void inverse_shares(const float *weight, int radius, int64_t length, float *out) {
    for (int64_t i = 0; i < length; i++) {
        float sum = 0;
        for (int64_t k = -radius; k <= radius; k++)
            if (i + k >= 0 && i + k < length) sum += weight[k < 0 ? -k : k];
        out[i] = 1 / sum;
    }
}

/* Gaussian, cut off at four standard deviations. */
static int blur(float *planes, int64_t height, int64_t width, float sigma) {
    float weight[BLUR_RADIUS + 1];
    int radius = (int)ceilf(4 * sigma);
    for (int k = 0; k <= radius; k++) weight[k] = expf(-0.5f * ((float)k / sigma) * ((float)k / sigma));
    float *memory = calloc((size_t)(height + 2 * width + 2 * radius + (height + 2 * radius) * width), sizeof *memory);
    if (!memory) return 0;
    float *down = memory, *across = down + height, *line = across + width, *spare = line + width + 2 * radius;
    inverse_shares(weight, radius, height, down);
    inverse_shares(weight, radius, width, across);
    blur_planes(planes, height, width, weight, radius, across, down, line, spare);
    free(memory);
    return 1;
}

CLONES static void solarize(float *planes, int64_t count) {
    for (int64_t i = 0; i < 3 * count; i++) planes[i] = planes[i] >= 0.5f ? 1 - planes[i] : planes[i];
}

int recolour_view(float *planes, int64_t height, int64_t width, const Colours *colours, const uint8_t order[CHANGES]) {
    recolour(planes, height * width, colours, order);
    if (colours->sigma > 0 && !blur(planes, height, width, colours->sigma)) return 0;
    if (colours->solarize != 0) solarize(planes, height * width);
    return 1;
}

CLONES void scale_view(float *planes, int64_t count, const float gain[3], const float bias[3]) {
    for (int plane = 0; plane < 3; plane++, planes += count)
        for (int64_t i = 0; i < count; i++) planes[i] = planes[i] * gain[plane] + bias[plane];
}

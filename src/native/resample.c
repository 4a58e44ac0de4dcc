/* Weighted means of pixels along both axes. */
#include "resample.h"

#include <string.h>

/* Four components side by side, of which the last is not used. */
typedef float Pixel __attribute__((vector_size(16)));
typedef int32_t Quad __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

/* One row of sums: the weighted rows of the source, as floats. */
INLINE void add_rows(const Resampling *job, int64_t row, float *sums) {
    int64_t length = job->in_width * 3;
    const int32_t *index = job->down.index + row * job->down.taps;
    const float *weight = job->down.weight + row * job->down.taps;
    for (int64_t i = 0; i < length; i++) sums[i] = (float)job->in[index[0] * length + i] * weight[0];
    for (int64_t tap = 1; tap < job->down.taps; tap++) {
        const uint8_t *source = job->in + index[tap] * length;
        for (int64_t i = 0; i < length; i++) sums[i] += (float)source[i] * weight[tap];
    }
}

INLINE void write_row(const Resampling *job, int64_t row, int whole, const float *sums, uint8_t *out) {
    for (int64_t column = 0; column < job->across.count; column++) {
        const int32_t *index = job->across.index + column * job->across.taps;
        const float *weight = job->across.weight + column * job->across.taps;
        Pixel mean = {0};
        for (int64_t tap = 0; tap < job->across.taps; tap++) {
            Pixel sum;
            memcpy(&sum, sums + 3 * index[tap], sizeof sum);
            mean += sum * weight[tap];
        }
        if (!whole) {
            float cover = job->down.cover[row] * job->across.cover[column];
            mean = mean * cover + 255.0f * (1 - cover);
        }
        mean += 0.5f;
        Quad levels = __builtin_convertvector(mean, Quad);
        Bytes bytes = (Bytes)levels;
        bytes = __builtin_shufflevector(bytes, bytes, 0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
        memcpy(out + 3 * column, &bytes, 3);
    }
}

CLONES void resample_run(const Resampling *job, float *sums) {
    int whole = 1;
    for (int64_t i = 0; i < job->across.count; i++) whole &= job->across.cover[i] >= 1;
    for (int64_t i = 0; i < job->down.count; i++) whole &= job->down.cover[i] >= 1;
    for (int64_t row = 0; row < job->down.count; row++) {
        add_rows(job, row, sums);
        write_row(job, row, whole, sums, job->out + row * job->across.count * 3);
    }
}

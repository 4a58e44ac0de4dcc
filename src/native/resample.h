/* Resampling of a block of RGB pixels by weights along each axis; the sums are those of resample.py, bit for bit. */
#ifndef GIGATOME_RESAMPLE_H
#define GIGATOME_RESAMPLE_H

#include "jpeg.h"

/* `count` output pixels of one axis, each the sum of `taps` weighted source pixels. */
typedef struct {
    const int32_t *index; /* [count, taps], inside the source */
    const float *weight;  /* [count, taps] */
    const float *cover;   /* [count], the share that is picture; the rest is white */
    int64_t count, taps;
} Axis;

typedef struct {
    const uint8_t *in; /* [in_height, in_width, 3] */
    int64_t in_width, in_height;
    Axis across, down;
    uint8_t *out; /* [down.count, across.count, 3] */
} Resampling;

/* `sums` has room for 3 * in_width + 1 numbers. */
void resample_run(const Resampling *job, float *sums);

#endif

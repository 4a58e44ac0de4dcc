/* From the samples of the components to RGB pixels. */
#ifndef GIGATOME_OUTPUT_H
#define GIGATOME_OUTPUT_H

#include "jpeg.h"

/* The samples of one component. */
typedef struct {
    const uint8_t *samples; /* where sample (0, 0) would be; only the wanted ones are there */
    ptrdiff_t stride;
    int width, height; /* of the whole component, in samples */
    int across, down;  /* pixels a sample: 1 or 2 */
    int fancy;         /* whether upsampling is interpolated */
} Plane;

typedef struct {
    Plane planes[3];
    int components, rgb;
} Picture;

size_t row_bytes(const Crop *crop);
void write_pixels(const Picture *picture, const Crop *crop, uint8_t *rows);

#endif

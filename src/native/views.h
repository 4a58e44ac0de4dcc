/* Views of tiles: crops resampled to planes of floats, and changes of their colours; what selfsup/render.py does, one
 * image at a time. */
#ifndef GIGATOME_VIEWS_H
#define GIGATOME_VIEWS_H

#include "jpeg.h"

typedef struct {
    float x, y, width, height, mirror_x, mirror_y, transpose;
} Box;

typedef struct {
    float brightness, contrast, saturation, hue, gray, sigma, solarize;
} Colours;

enum { BRIGHTNESS, CONTRAST, SATURATION, HUE, CHANGES };

enum { BLUR_RADIUS = 64 };

/* All return 0 if there is no memory. Sides are at least 1. */
int crop_view(const uint8_t *pixels, int64_t height, int64_t width, const Box *box, int64_t size, float *out);
int recolour_view(float *planes, int64_t height, int64_t width, const Colours *colours, const uint8_t order[CHANGES]);

/* out = in * gain + bias, plane by plane. */
void scale_view(float *planes, int64_t count, const float gain[3], const float bias[3]);

#endif

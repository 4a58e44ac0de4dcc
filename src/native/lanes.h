/* Vectors of eight 32-bit numbers, and what transform and colour conversion share. */
#ifndef GIGATOME_LANES_H
#define GIGATOME_LANES_H

#include "jpeg.h"

#include <string.h>

typedef int32_t Lanes __attribute__((vector_size(32)));

/* Kept within 0 to 255. */
INLINE Lanes clamped(Lanes value) {
    value &= ~(value < 0);
    return (value & (value < 256)) | (255 & (value > 255));
}

#endif

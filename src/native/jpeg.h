/* Decoding a rectangle of a baseline JPEG chunk, to the pixels that libjpeg-turbo gives for it.
 *
 * What lies outside the rectangle is only parsed: Huffman codes are stepped over several at a time, no coefficient is
 * stored and nothing is transformed. What lies below it is not looked at. Transform (accurate integer), fancy upsampling
 * and colour conversion are those of libjpeg-turbo, bit for bit, at full size and at 1/2, 1/4 and 1/8.
 *
 * Nothing in a chunk is trusted. Whatever is not plain - another kind of JPEG, or data that do not add up - is refused
 * with a non-zero result, and the caller decodes that chunk with another library, which decides whether it is damaged.
 *
 * Sources: ITU-T T.81 (JPEG); Loeffler, Ligtenberg and Moschytz 1989 (the transform); libjpeg's documented constants.
 */
#ifndef GIGATOME_JPEG_H
#define GIGATOME_JPEG_H

#include <stddef.h>
#include <stdint.h>

enum { DECODED = 0, UNSUPPORTED = 1, DAMAGED = 2, NO_MEMORY = 3 };

enum { LOOK_BITS = 11, SKIP_BITS = 12 };

/* One Huffman table and what is looked up in it, by the next bits of the data. */
typedef struct {
    int32_t symbol[1 << LOOK_BITS]; /* value << 16 | run << 8 | bits of code and value; 0: not so short */
    uint16_t skip[1 << SKIP_BITS];  /* coefficients << 5 | end of block << 4 | bits, of all codes that fit; 0: none */
    int32_t limit[18];              /* codes of n bits are below this, left-aligned in 16 bits */
    int32_t first[17];              /* index of the first symbol of n bits, less its code */
    uint8_t symbols[256];
    int defined;
} Huffman;

typedef struct {
    Huffman dc[4], ac[4];
    uint16_t quantum[4][64]; /* natural order */
    int quantised[4];
    int restart_interval;
    uint64_t serial; /* differs between any two that were ever made */
} Tables;

/* Working memory of one thread; zero it before the first use. */
typedef struct {
    uint8_t *bytes, *planes, *rows;
    size_t bytes_size, planes_size, rows_size;
    Tables *own;    /* tables of a chunk that brings its own */
    uint8_t *seen;  /* the segments that they were made of */
    size_t seen_size;
    uint64_t seen_base; /* serial of the common tables beneath them; 0: none */
} Workspace;

/* One rectangle of one chunk. Sizes and places are in pixels of the chunk divided by 1 << shrink. */
typedef struct {
    const uint8_t *data;
    size_t size;
    int chunk_width, chunk_height, components, rgb; /* as the page states; chunk sides divisible by 1 << shrink */
    int shrink;                                     /* 0 to 3 */
    int x, y, width, height;                        /* the rectangle, inside the chunk */
    uint8_t *out;                                   /* RGB */
    ptrdiff_t stride;
} Crop;

/* Adds the tables of a JPEG stream of tables only, or of the header of a whole one. */
int tables_add(Tables *tables, const uint8_t *data, size_t size);

int decode_crop(Workspace *workspace, const Tables *tables, const Crop *crop);

void workspace_free(Workspace *workspace);

/* Internal to the decoder. */
int grow(uint8_t **memory, size_t *size, size_t wanted);

#if !defined(__GNUC__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "GCC or Clang, and a little-endian machine, are needed; without this extension gigatome decodes by libraries"
#endif

/* Lets the compiler choose between two versions of a hot function when the program starts. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

#endif

/* libFuzzer harness for decode_crop(); see README.md beside this file.
 *
 * An input is 16 bytes of parameters, a stream of common tables, and a chunk. What is handed to the decoder lies in heap
 * blocks of exactly its size, so that AddressSanitizer sees the first byte too many. Besides:
 *
 * - a chunk that is decoded gives the same pixels with other memory beneath: stale bytes of an earlier chunk, in the
 *   workspace or in the output, do not show;
 * - a rectangle of a chunk is what decoding the whole chunk gives there;
 * - outside the rectangle nothing is written;
 * - a failed allocation does no harm, then or later; it fails because -Dmalloc=limited_malloc is set.
 */
#undef malloc
#include "jpeg.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PARAMETERS = 16, MOST_SIDE = 320, WHOLE_SIDE = 512 };

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "line %d: %s\n", __LINE__, #condition);                                                    \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

static int allocations_left = -1; /* before one fails; -1: none does */

void *limited_malloc(size_t size) {
    if (allocations_left >= 0 && allocations_left-- == 0) return NULL;
    void *memory = malloc(size);
#if !__has_feature(memory_sanitizer)
    if (memory) memset(memory, 0x5C, size);
#endif
    return memory;
}

/* Common tables of an input, kept while inputs state the same. */
static const Tables *common_tables(const uint8_t *data, size_t size) {
    static Tables tables;
    static uint8_t *seen;
    static size_t seen_size;
    static uint64_t made;
    if (made && seen_size == size && !memcmp(seen, data, size)) return &tables;
    memset(&tables, 0, sizeof tables);
    free(seen);
    seen = malloc(size + 1);
    memcpy(seen, data, size);
    seen_size = size;
    uint8_t *exact = malloc(size);
    memcpy(exact, data, size);
    if (tables_add(&tables, exact, size)) memset(&tables, 0, sizeof tables);
    free(exact);
    tables.serial = ++made;
    return &tables;
}

/* What the page would state: width, height and components of the frame. */
static void take_frame(Crop *crop) {
    crop->chunk_width = crop->chunk_height = 64;
    crop->components = 3;
    for (size_t i = 2; i + 10 <= crop->size; i++) {
        const uint8_t *at = crop->data + i;
        if (at[0] != 0xFF || (at[1] & 0xFE) != 0xC0) continue;
        crop->chunk_height = at[5] << 8 | at[6];
        crop->chunk_width = at[7] << 8 | at[8];
        crop->components = at[9];
        return;
    }
}

static int word(const uint8_t *at) { return at[0] | at[1] << 8; }

static int clipped(int value, int least, int most) { return value < least ? least : value > most ? most : value; }

/* The rectangle, as the parameters ask for it, kept inside the chunk. */
static int place(Crop *crop, const uint8_t *parameters) {
    take_frame(crop);
    if (!crop->chunk_width || !crop->chunk_height) return 0;
    crop->rgb = parameters[0] >> 2 & 1;
    crop->shrink = parameters[0] & 3;
    while ((crop->chunk_width | crop->chunk_height) & ((1 << crop->shrink) - 1)) crop->shrink--;
    int width = crop->chunk_width >> crop->shrink, height = crop->chunk_height >> crop->shrink;
    crop->x = word(parameters + 4) % width;
    crop->y = word(parameters + 6) % height;
    crop->width = clipped(word(parameters + 8), 1, clipped(width - crop->x, 1, MOST_SIDE));
    crop->height = clipped(word(parameters + 10), 1, clipped(height - crop->y, 1, MOST_SIDE));
    return 1;
}

/* Decodes into a block of exactly the rectangle's size between `gap` bytes that shall stay as they are. */
static int decode(Workspace *workspace, const Tables *tables, Crop crop, int gap, int pattern, uint8_t **pixels) {
    size_t row = 3 * (size_t)crop.width, size = (row + (size_t)gap) * (size_t)crop.height - (size_t)gap;
    uint8_t *out = malloc(size);
    memset(out, pattern, size);
    crop.out = out;
    crop.stride = (ptrdiff_t)row + gap;
    int result = decode_crop(workspace, tables, &crop);
    CHECK(result == DECODED || result == UNSUPPORTED || result == DAMAGED || result == NO_MEMORY);
    *pixels = malloc(row * (size_t)crop.height);
    for (int y = 0; y < crop.height; y++) {
        memcpy(*pixels + (size_t)y * row, out + y * crop.stride, row);
        for (int k = 0; k < gap && y + 1 < crop.height; k++) CHECK(out[y * crop.stride + (ptrdiff_t)row + k] == pattern);
    }
    free(out);
    return result;
}

static void compare_with_whole(const Tables *tables, Crop crop, int result, const uint8_t *pixels) {
    Crop all = crop;
    all.x = all.y = 0;
    all.width = crop.chunk_width >> crop.shrink;
    all.height = crop.chunk_height >> crop.shrink;
    if (all.width > WHOLE_SIDE || all.height > WHOLE_SIDE) return;
    Workspace fresh = {0};
    uint8_t *whole;
    if (decode(&fresh, tables, all, 0, 0, &whole) == DECODED) {
        CHECK(result == DECODED);
        for (int y = 0; y < crop.height; y++)
            CHECK(!memcmp(pixels + 3 * (size_t)y * (size_t)crop.width,
                          whole + 3 * ((size_t)(crop.y + y) * (size_t)all.width + (size_t)crop.x),
                          3 * (size_t)crop.width));
    }
    free(whole);
    workspace_free(&fresh);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static Workspace kept;
    if (size < PARAMETERS) return 0;
    const uint8_t *parameters = data;
    size_t common = (size_t)word(parameters + 12);
    data += PARAMETERS, size -= PARAMETERS;
    if (common > size) common = size;
    const Tables *tables = common_tables(data, common);
    uint8_t *chunk = malloc(size - common), *pixels, *again;
    memcpy(chunk, data + common, size - common);
    Crop crop = {.data = chunk, .size = size - common};
    if (place(&crop, parameters)) {
        int gap = parameters[0] >> 5, failing = parameters[1] & 0x80;
        if (failing) {
            Workspace starved = {0};
            for (int limited = 1; limited >= 0; limited--) {
                allocations_left = limited ? parameters[1] & 7 : -1;
                decode(&starved, tables, crop, gap, 0, &again);
                free(again);
            }
            workspace_free(&starved);
        }
        int result = decode(&kept, tables, crop, gap, 0xA5, &pixels);
        Workspace fresh = {0};
        int second = decode(&fresh, tables, crop, gap, 0x3C, &again);
        CHECK(result == second && result != NO_MEMORY);
        CHECK(result || !memcmp(pixels, again, 3 * (size_t)crop.width * (size_t)crop.height));
        workspace_free(&fresh);
        if (parameters[0] & 16) compare_with_whole(tables, crop, result, pixels);
        free(pixels);
        free(again);
    }
    free(chunk);
    return 0;
}

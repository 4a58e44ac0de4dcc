/* One chunk: its header, its entropy-coded data, and the blocks of the rectangle. */
#include "jpeg.h"
#include "output.h"
#include "transform.h"

#include <stdlib.h>

enum { PADDING = 4096, MAX_SEGMENTS = 1 << 16, MAX_BLOCKS = 6 };

static const uint8_t NATURAL[64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
};

/* The frame and the scan, as the header states them. */
typedef struct {
    int width, height, components;
    int id[3], h[3], v[3], quantum[3], dc[3], ac[3];
    size_t scan; /* where the entropy-coded data begin */
    int brings_tables;
} Header;

static int read_frame(Header *header, const uint8_t *body, size_t size) {
    if (size < 6 || body[0] != 8 || header->components) return UNSUPPORTED;
    header->height = body[1] << 8 | body[2];
    header->width = body[3] << 8 | body[4];
    header->components = body[5];
    if ((body[5] != 1 && body[5] != 3) || size != 6 + 3 * (size_t)body[5]) return UNSUPPORTED;
    for (int c = 0; c < body[5]; c++) {
        const uint8_t *field = body + 6 + 3 * c;
        header->id[c] = field[0];
        header->h[c] = field[1] >> 4;
        header->v[c] = field[1] & 15;
        header->quantum[c] = field[2];
        if (field[2] > 3) return UNSUPPORTED;
    }
    return DECODED;
}

static int read_scan(Header *header, const uint8_t *body, size_t size) {
    if (!header->components || size != 4 + 2 * (size_t)header->components || body[0] != header->components)
        return UNSUPPORTED;
    for (int c = 0; c < header->components; c++) {
        header->dc[c] = body[2 + 2 * c] >> 4;
        header->ac[c] = body[2 + 2 * c] & 15;
        if (body[1 + 2 * c] != header->id[c] || header->dc[c] > 3 || header->ac[c] > 3) return UNSUPPORTED;
    }
    const uint8_t *spectrum = body + 1 + 2 * header->components;
    return spectrum[0] == 0 && spectrum[1] == 63 && spectrum[2] == 0 ? DECODED : UNSUPPORTED;
}

static int read_header(Header *header, const uint8_t *data, size_t size) {
    size_t at = 2;
    memset(header, 0, sizeof *header);
    if (size < 4 || data[0] != 0xFF || data[1] != 0xD8) return DAMAGED;
    for (;;) {
        while (at + 1 < size && data[at] == 0xFF && data[at + 1] == 0xFF) at++;
        if (at + 4 > size || data[at] != 0xFF) return DAMAGED;
        int marker = data[at + 1], result = DECODED;
        size_t length = (size_t)(data[at + 2] << 8 | data[at + 3]);
        if (length < 2 || at + 2 + length > size) return DAMAGED;
        const uint8_t *body = data + at + 4;
        if (marker == 0xC0 || marker == 0xC1)
            result = read_frame(header, body, length - 2);
        else if (marker == 0xC4 || marker == 0xDB || marker == 0xDD)
            header->brings_tables = 1;
        else if ((marker & 0xF0) == 0xC0)
            result = UNSUPPORTED; /* another process, or arithmetic coding */
        else if (marker == 0xDA)
            result = read_scan(header, body, length - 2);
        else if ((marker & 0xF0) == 0xD0 || marker < 0xC0)
            result = DAMAGED;
        if (result) return result;
        at += 2 + length;
        header->scan = at;
        if (marker == 0xDA) return DECODED;
    }
}

/* The tables of a chunk that brings its own on top of the common ones; those made last are kept. */
static const Tables *own_tables(Workspace *workspace, const Tables *common, const Crop *crop, size_t scan) {
    size_t length = scan;
    if (workspace->own && workspace->seen_base == common->serial && workspace->seen_size >= length + sizeof length &&
        !memcmp(workspace->seen, &length, sizeof length) &&
        !memcmp(workspace->seen + sizeof length, crop->data, length))
        return workspace->own;
    if (!grow(&workspace->seen, &workspace->seen_size, length + sizeof length)) return NULL;
    if (!workspace->own && !(workspace->own = malloc(sizeof *workspace->own))) return NULL;
    workspace->seen_base = 0;
    *workspace->own = *common;
    if (tables_add(workspace->own, crop->data, scan)) return NULL;
    memcpy(workspace->seen, &length, sizeof length);
    memcpy(workspace->seen + sizeof length, crop->data, length);
    workspace->seen_base = common->serial;
    return workspace->own;
}

/* Entropy-coded data without stuffed zeros, cut at restart markers; segment k is [starts[k], starts[k + 1]). */
typedef struct {
    uint8_t *bytes;
    uint32_t *starts;
    int segments;
} Scan;

static int unstuff(Workspace *workspace, const uint8_t *data, size_t size, int most, Scan *scan) {
    size_t table = sizeof(uint32_t) * ((size_t)most + 2);
    if (!grow(&workspace->bytes, &workspace->bytes_size, table + size + PADDING)) return NO_MEMORY;
    scan->starts = (uint32_t *)workspace->bytes;
    scan->bytes = workspace->bytes + table;
    const uint8_t *end = data + size;
    uint8_t *out = scan->bytes;
    int segments = 0;
    scan->starts[0] = 0;
    while (data < end) {
        const uint8_t *mark = memchr(data, 0xFF, (size_t)(end - data));
        size_t run = (size_t)((mark ? mark : end) - data);
        memcpy(out, data, run);
        out += run;
        data += run;
        if (!mark) break;
        while (data + 1 < end && data[1] == 0xFF) data++;
        if (data + 1 >= end) break;
        if (data[1] == 0)
            *out++ = 0xFF;
        else if (data[1] >= 0xD0 && data[1] <= 0xD7) {
            if (data[1] - 0xD0 != segments % 8 || segments >= most) return DAMAGED;
            scan->starts[++segments] = (uint32_t)(out - scan->bytes);
        } else
            break;
        data += 2;
    }
    scan->starts[segments + 1] = (uint32_t)(out - scan->bytes);
    scan->segments = segments + 1;
    memset(out, 0, PADDING);
    return DECODED;
}

/* Bits of the data, the next one on top. After fill() at least 56 are there; reading ends PADDING bytes behind the data
 * at most, as a unit of MAX_BLOCKS blocks is 6 * 64 * 31 bits, and a unit begins before the end. */
typedef struct {
    uint64_t bits;
    int count;
    const uint8_t *next;
} Bits;

INLINE void fill(Bits *b) {
    uint64_t more;
    memcpy(&more, b->next, 8);
    b->bits |= __builtin_bswap64(more) >> b->count;
    b->next += (63 - b->count) >> 3;
    b->count |= 56;
}

INLINE void need(Bits *b, int count) {
    if (b->count < count) fill(b);
}

INLINE unsigned peek(const Bits *b, int count) { return (unsigned)(b->bits >> (64 - count)); }

INLINE void drop(Bits *b, int count) {
    b->bits <<= count;
    b->count -= count;
}

/* Length << 8 | symbol of a code that no lookup holds, by the next 16 bits; 0 if there is none. */
static __attribute__((noinline)) int long_code(const Huffman *table, int bits) {
    for (int n = 1; n <= 16; n++)
        if (bits < table->limit[n]) return n << 8 | table->symbols[(bits >> (16 - n)) + table->first[n]];
    return 0;
}

INLINE int receive(Bits *b, int size) {
    if (!size) return 0;
    int value = (int)peek(b, size);
    drop(b, size);
    return value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
}

INLINE int next_dc(Bits *b, const Huffman *table, int *difference) {
    need(b, 32);
    int32_t entry = table->symbol[peek(b, LOOK_BITS)];
    if (entry) {
        drop(b, entry & 255);
        *difference = entry >> 16;
        return 1;
    }
    int code = long_code(table, (int)peek(b, 16));
    if (!code) return 0;
    drop(b, code >> 8);
    *difference = receive(b, code & 255);
    return 1;
}

/* One AC symbol at k: *value at k + run, of which the new k stands behind; 64 at the end of the block, 0 if broken. */
INLINE int next_ac(Bits *b, const Huffman *table, int k, int *value) {
    int run;
    int32_t entry = table->symbol[peek(b, LOOK_BITS)];
    if (entry) {
        drop(b, entry & 255);
        *value = entry >> 16;
        run = entry >> 8 & 15;
    } else {
        int code = long_code(table, (int)peek(b, 16));
        if (!code) return 0;
        drop(b, code >> 8);
        run = code >> 4 & 15;
        *value = receive(b, code & 15);
    }
    if (*value == 0 && run < 15) return run ? 0 : 64;
    k += run + 1;
    return k <= 64 ? k : 0;
}

/* After fill() this many codes can be looked up, if each is one that a lookup holds. */
enum { CODES_A_FILL = 3 };

INLINE int skip_block(Bits *b, const Huffman *dc, const Huffman *ac, int *level) {
    int difference, value, k = 1;
    if (!next_dc(b, dc, &difference)) return 0;
    *level += difference;
    for (;;) {
        fill(b);
        for (int i = 0; i < CODES_A_FILL; i++) {
            unsigned entry = ac->skip[peek(b, SKIP_BITS)];
            int after = k + (int)(entry >> 5);
            if (__builtin_expect(entry && after < 64, 1)) {
                drop(b, entry & 15);
                k = after;
                if (entry & 16) return 1;
            } else {
                need(b, 32);
                k = next_ac(b, ac, k, &value);
                if (k == 64) return 1;
                if (!k) return 0;
                break;
            }
        }
    }
}

/* Coefficients in natural order; 1 if there is but the first, 2 if there are more, 0 if broken. */
INLINE int read_block(Bits *b, const Huffman *dc, const Huffman *ac, int *level, Block *block) {
    int difference, k = 1, result = 1;
    if (!next_dc(b, dc, &difference)) return 0;
    *level += difference;
    clear(block);
    block->of[0] = (int16_t)*level;
    for (;;) {
        fill(b);
        for (int i = 0; i < CODES_A_FILL; i++) {
            int32_t entry = ac->symbol[peek(b, LOOK_BITS)];
            int value = entry >> 16, looked_up = value != 0;
            if (__builtin_expect(looked_up, 1)) {
                drop(b, entry & 255);
                k += (entry >> 8 & 15) + 1;
                if (k > 64) return 0;
            } else {
                need(b, 32);
                k = next_ac(b, ac, k, &value);
                if (!k) return 0;
            }
            if (value) {
                block->of[NATURAL[k - 1]] = (int16_t)value;
                result = 2;
            }
            if (k == 64) return result;
            if (!looked_up) break;
        }
    }
}

/* What of one component is wanted: blocks [x0, x1) by [y0, y1), and the plane that holds their samples. */
typedef struct {
    int x0, x1, y0, y1, side;
    uint8_t *samples;
    ptrdiff_t stride;
} Wanted;

/* One block of a unit: its component, its place in it, how many of its kind a unit has, and its tables. */
typedef struct {
    int component, x, y, across, down;
    const Huffman *dc, *ac;
    const uint16_t *quantum;
} Place;

typedef struct {
    const Scan *scan;
    Wanted wanted[3];
    Place places[MAX_BLOCKS];
    int blocks, columns, first_row, rows; /* blocks a unit, units across, rows of units that are wanted */
    int all_rows;                         /* of units, wanted or not */
    int interval;
} Units;

INLINE int decode_block(Bits *b, const Place *place, const Wanted *wanted, int x, int y, int *level) {
    Block block;
    if (x < wanted->x0 || x >= wanted->x1 || y < wanted->y0 || y >= wanted->y1)
        return skip_block(b, place->dc, place->ac, level);
    int side = wanted->side, kind = 1;
    uint8_t *out = wanted->samples + (y - wanted->y0) * side * wanted->stride + (x - wanted->x0) * side;
    if (side == 1) {
        if (!skip_block(b, place->dc, place->ac, level)) return 0;
    } else if (!(kind = read_block(b, place->dc, place->ac, level, &block)))
        return 0;
    if (kind == 1)
        flat((int16_t)((unsigned)*level * place->quantum[0]), side, out, wanted->stride);
    else
        inverse_transform(&block, place->quantum, side, out, wanted->stride);
    return 1;
}

CLONES static int decode_units(const Units *units) {
    const uint8_t *bytes = units->scan->bytes, *end = bytes + units->scan->starts[1];
    Bits b = {0, 0, bytes};
    int level[3] = {0}, left = units->interval, segment = 0;
    for (int row = 0; row < units->rows; row++)
        for (int column = 0; column < units->columns; column++) {
            if (units->interval && !left--) {
                if (++segment >= units->scan->segments || b.next - (b.count >> 3) < end) return DAMAGED;
                b = (Bits){0, 0, bytes + units->scan->starts[segment]};
                end = bytes + units->scan->starts[segment + 1];
                memset(level, 0, sizeof level);
                left = units->interval - 1;
            }
            for (int i = 0; i < units->blocks; i++) {
                const Place *place = &units->places[i];
                int c = place->component, good;
                if (row < units->first_row)
                    good = skip_block(&b, place->dc, place->ac, &level[c]);
                else
                    good = decode_block(&b, place, &units->wanted[c], column * place->across + place->x,
                                        row * place->down + place->y, &level[c]);
                if (!good) return DAMAGED;
            }
            /* Bits that were taken but not there: whole bytes in `count` were loaded and not used. */
            if (b.next - (b.count >> 3) > end) return DAMAGED;
        }
    /* Bytes that are left over: some before them were lost, or there are too many. */
    return units->rows == units->all_rows && b.next - (b.count >> 3) < end ? DAMAGED : DECODED;
}

static int at_least(int value, int least) { return value < least ? least : value; }
static int at_most(int value, int most) { return value > most ? most : value; }

/* The side of a component's blocks at this shrink: libjpeg leaves upsampling to the transform where it can. */
static int side_of(int side, int h, int v, int max_h, int max_v) {
    int least = side;
    while (side < 8 && max_h * least % (h * side * 2) == 0 && max_v * least % (v * side * 2) == 0) side *= 2;
    return side;
}

/* Which blocks of each component the rectangle needs, and how their samples become pixels. */
static int lay_out(Workspace *workspace, const Header *header, const Crop *crop, Units *units, Picture *picture) {
    int count = header->components, single = count == 1;
    int max_h = single ? 1 : header->h[0], max_v = single ? 1 : header->v[0], least = 8 >> crop->shrink;
    size_t needed = 0;
    for (int c = 0; c < count; c++) {
        Wanted *wanted = &units->wanted[c];
        Plane *plane = &picture->planes[c];
        int h = single ? 1 : header->h[c], v = single ? 1 : header->v[c];
        int side = side_of(least, h, v, max_h, max_v);
        plane->across = max_h * least / (h * side);
        plane->down = max_v * least / (v * side);
        plane->width = (header->width * h * side + max_h * 8 - 1) / (max_h * 8);
        plane->height = (header->height * v * side + max_v * 8 - 1) / (max_v * 8);
        plane->fancy = least > 1 && plane->width > 2;
        /* One sample more on each side: fancy upsampling looks at the neighbours. */
        int margin_x = plane->across > 1, margin_y = plane->down > 1;
        int left = at_least(crop->x / plane->across - margin_x, 0);
        int top = at_least(crop->y / plane->down - margin_y, 0);
        int right = at_most((crop->x + crop->width - 1) / plane->across + 1 + margin_x, plane->width);
        int bottom = at_most((crop->y + crop->height - 1) / plane->down + 1 + margin_y, plane->height);
        wanted->side = side;
        wanted->x0 = left / side, wanted->x1 = (right + side - 1) / side;
        wanted->y0 = top / side, wanted->y1 = (bottom + side - 1) / side;
        wanted->stride = (wanted->x1 - wanted->x0) * side;
        units->first_row = c ? at_most(wanted->y0 / v, units->first_row) : wanted->y0 / v;
        units->rows = at_least((wanted->y1 + v - 1) / v, units->rows);
        needed += (size_t)wanted->stride * (size_t)((wanted->y1 - wanted->y0) * side) + 64;
    }
    if (!grow(&workspace->planes, &workspace->planes_size, needed)) return NO_MEMORY;
    uint8_t *samples = workspace->planes;
    for (int c = 0; c < count; c++) {
        Wanted *wanted = &units->wanted[c];
        wanted->samples = samples;
        samples += wanted->stride * (wanted->y1 - wanted->y0) * wanted->side + 64;
        picture->planes[c].samples = wanted->samples - wanted->y0 * wanted->side * wanted->stride;
        picture->planes[c].samples -= wanted->x0 * wanted->side;
        picture->planes[c].stride = wanted->stride;
    }
    return DECODED;
}

/* The blocks of a unit in the order of the data, and the number of units. */
static int count_units(const Header *header, const Tables *tables, Units *units) {
    int single = header->components == 1;
    int h = single ? 1 : header->h[0], v = single ? 1 : header->v[0];
    if (!((h == 1 && v == 1) || (h == 2 && (v == 1 || v == 2)))) return UNSUPPORTED;
    for (int c = 0; c < header->components; c++) {
        int across = c || single ? 1 : h, down = c || single ? 1 : v;
        if (!single && c && (header->h[c] != 1 || header->v[c] != 1)) return UNSUPPORTED;
        if (!tables->quantised[header->quantum[c]] || !tables->dc[header->dc[c]].defined ||
            !tables->ac[header->ac[c]].defined)
            return UNSUPPORTED;
        for (int k = 0; k < across * down; k++)
            units->places[units->blocks++] = (Place){
                .component = c,
                .x = k % across,
                .y = k / across,
                .across = across,
                .down = down,
                .dc = &tables->dc[header->dc[c]],
                .ac = &tables->ac[header->ac[c]],
                .quantum = tables->quantum[header->quantum[c]],
            };
    }
    units->columns = (header->width + 8 * h - 1) / (8 * h);
    units->all_rows = (header->height + 8 * v - 1) / (8 * v);
    units->interval = tables->restart_interval;
    return DECODED;
}

/* Where the image ends: the last end marker; 0 if there is none. */
static size_t end_of(const uint8_t *data, size_t size) {
    for (size_t at = size; at >= 2; at--)
        if (data[at - 2] == 0xFF && data[at - 1] == 0xD9) return at;
    return 0;
}

int decode_crop(Workspace *workspace, const Tables *tables, const Crop *crop) {
    Header header;
    int result = read_header(&header, crop->data, crop->size);
    if (result) return result;
    if (header.width != crop->chunk_width || header.height != crop->chunk_height ||
        header.components != crop->components)
        return DAMAGED;
    size_t end = end_of(crop->data, crop->size);
    if (end < header.scan + 2) return DAMAGED;
    if (header.brings_tables && !(tables = own_tables(workspace, tables, crop, header.scan))) return DAMAGED;
    Units units = {0};
    Picture picture = {.components = header.components, .rgb = crop->rgb};
    Scan scan;
    if ((result = count_units(&header, tables, &units))) return result;
    if ((result = lay_out(workspace, &header, crop, &units, &picture))) return result;
    int most = units.interval ? units.columns * ((header.height + 7) / 8) / units.interval : 0;
    if (most > MAX_SEGMENTS) return UNSUPPORTED;
    if ((result = unstuff(workspace, crop->data + header.scan, end - header.scan, most, &scan))) return result;
    units.scan = &scan;
    if ((result = decode_units(&units))) return result;
    if (!grow(&workspace->rows, &workspace->rows_size, row_bytes(crop))) return NO_MEMORY;
    write_pixels(&picture, crop, workspace->rows);
    return DECODED;
}

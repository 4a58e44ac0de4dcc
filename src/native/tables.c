/* Quantisation and Huffman tables, and the tables by which codes are looked up. */
#include "jpeg.h"

#include <stdlib.h>
#include <string.h>

static const uint8_t NATURAL[64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
};

/* Bytes of Huffman tables that a header may hold: eight full tables are 2184, each 18 cost 25 us to make. */
enum { MOST_HUFFMAN = 8192 };

int grow(uint8_t **memory, size_t *size, size_t wanted) {
    if (*size >= wanted) return 1;
    free(*memory);
    *size = wanted + wanted / 4;
    *memory = malloc(*size);
    if (!*memory) *size = 0;
    return *memory != NULL;
}

/* The value that `count` bits state: a leading 0 means a negative one. T.81, F.2.2.1. */
static int extended(int bits, int count) { return count && bits < 1 << (count - 1) ? bits - (1 << count) + 1 : bits; }

static int32_t symbol_entry(const uint16_t *codes, int look, int is_dc) {
    int code = codes[look << (SKIP_BITS - LOOK_BITS)], length = code >> 8, symbol = code & 255;
    int run = is_dc ? 0 : symbol >> 4, size = is_dc ? symbol : symbol & 15;
    if (!code || length + size > LOOK_BITS) return 0;
    int value = extended((look >> (LOOK_BITS - length - size)) & ((1 << size) - 1), size);
    return (int32_t)((uint32_t)value << 16 | (uint32_t)run << 8 | (uint32_t)(length + size));
}

static uint16_t skip_entry(const uint16_t *codes, int look) {
    int used = 0, advance = 0, end = 0;
    while (!end) {
        int code = codes[look << used & ((1 << SKIP_BITS) - 1)], length = code >> 8;
        int size = code & 15, run = code >> 4 & 15;
        if (!code || used + length + size > SKIP_BITS || (!size && run && run < 15)) break;
        used += length + size;
        if (size || run)
            advance += run + 1;
        else
            end = 1;
        if (advance > 63) return 0;
    }
    return (uint16_t)(used ? advance << 5 | end << 4 | used : 0);
}

static int huffman_make(Huffman *table, const uint8_t counts[16], const uint8_t *symbols, int is_dc) {
    uint16_t codes[1 << SKIP_BITS] = {0}; /* length << 8 | symbol, by the next bits */
    int code = 0, total = 0;
    for (int n = 1; n <= 16; n++) {
        table->first[n] = total - code;
        if (total + counts[n - 1] > 256 || code + counts[n - 1] >= 1 << n) return DAMAGED;
        for (int end = total + counts[n - 1]; total < end; total++, code++)
            for (int k = 0; n <= SKIP_BITS && k < 1 << (SKIP_BITS - n); k++)
                codes[(code << (SKIP_BITS - n)) + k] = (uint16_t)(n << 8 | symbols[total]);
        table->limit[n] = code << (16 - n);
        code <<= 1;
    }
    memset(table->symbols, 0, sizeof table->symbols);
    memcpy(table->symbols, symbols, (size_t)total);
    for (int i = 0; is_dc && i < total; i++)
        if (symbols[i] > 15) return DAMAGED;
    for (int look = 0; look < 1 << LOOK_BITS; look++) table->symbol[look] = symbol_entry(codes, look, is_dc);
    if (!is_dc)
        for (int look = 0; look < 1 << SKIP_BITS; look++) table->skip[look] = skip_entry(codes, look);
    table->defined = 1;
    return DECODED;
}

static int add_huffman(Tables *tables, const uint8_t *data, size_t size) {
    while (size) {
        size_t total = 0;
        if (size < 17 || data[0] >> 4 > 1 || (data[0] & 15) > 3) return DAMAGED;
        for (int n = 1; n <= 16; n++) total += data[n];
        if (total > 256 || size < 17 + total) return DAMAGED;
        Huffman *table = (data[0] >> 4 ? tables->ac : tables->dc) + (data[0] & 15);
        int result = huffman_make(table, data + 1, data + 17, !(data[0] >> 4));
        if (result) return result;
        data += 17 + total;
        size -= 17 + total;
    }
    return DECODED;
}

static int add_quantum(Tables *tables, const uint8_t *data, size_t size) {
    while (size) {
        int wide = data[0] >> 4, which = data[0] & 15;
        size_t length = wide ? 129 : 65;
        if (wide > 1 || which > 3 || size < length) return DAMAGED;
        for (int k = 0; k < 64; k++)
            tables->quantum[which][NATURAL[k]] =
                wide ? (uint16_t)(data[1 + 2 * k] << 8 | data[2 + 2 * k]) : data[1 + k];
        tables->quantised[which] = 1;
        data += length;
        size -= length;
    }
    return DECODED;
}

int tables_add(Tables *tables, const uint8_t *data, size_t size) {
    size_t at = 2, huffman = 0;
    while (at + 4 <= size && data[at] == 0xFF && data[at + 1] != 0xD9 && data[at + 1] != 0xDA) {
        if (data[at + 1] == 0xFF) { /* a fill byte */
            at++;
            continue;
        }
        size_t length = (size_t)(data[at + 2] << 8 | data[at + 3]);
        const uint8_t *body = data + at + 4;
        int result = DECODED;
        if (length < 2 || at + 2 + length > size) return DAMAGED;
        if (data[at + 1] == 0xC4) {
            huffman += length;
            result = huffman > MOST_HUFFMAN ? DAMAGED : add_huffman(tables, body, length - 2);
        }
        if (data[at + 1] == 0xDB) result = add_quantum(tables, body, length - 2);
        if (data[at + 1] == 0xDD) {
            if (length != 4) return DAMAGED;
            tables->restart_interval = body[0] << 8 | body[1];
        }
        if (result) return result;
        at += 2 + length;
    }
    return DECODED;
}

void workspace_free(Workspace *workspace) {
    free(workspace->bytes);
    free(workspace->planes);
    free(workspace->rows);
    free(workspace->own);
    free(workspace->seen);
    memset(workspace, 0, sizeof *workspace);
}

/* A 32-bit digest of bytes, to tell whether they are those of an earlier read: each step can be undone, so a change of
 * one word changes its lane for certain, and of other changes one in 2^32 goes unnoticed. */
#ifndef GIGATOME_DIGEST_H
#define GIGATOME_DIGEST_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint64_t digest_step(uint64_t lane, uint64_t word) {
    lane = (lane ^ word) * 0x9E3779B97F4A7C15u;
    return lane ^ lane >> 32;
}

static inline uint32_t digest(const uint8_t *data, size_t size) {
    uint64_t lanes[4] = {size, 1, 2, 3}, words[4];
    while (size >= sizeof words) {
        memcpy(words, data, sizeof words);
        for (int k = 0; k < 4; k++) lanes[k] = digest_step(lanes[k], words[k]);
        data += sizeof words, size -= sizeof words;
    }
    memset(words, 0, sizeof words);
    memcpy(words, data, size);
    uint64_t all = 0;
    for (int k = 0; k < 4; k++) all = digest_step(all, digest_step(lanes[k], words[k]));
    return (uint32_t)(all ^ all >> 32);
}

#endif

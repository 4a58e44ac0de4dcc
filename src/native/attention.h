/* Softmax attention to keys that come in addition to others, and its gradients, in float32. */
#ifndef GIGATOME_ATTENTION_H
#define GIGATOME_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

enum { PLACES = 4 };

/* Rows of floats at each place of a grid; steps are in bytes. */
typedef struct {
    char *data;
    ptrdiff_t place[PLACES], row;
} Rows;

/* Attention of the queries of each place to its keys, with scores times dim^-0.5. `out` and `lse`, a log-sum-exp a row,
 * are those of other keys before, 0 and -inf of none. No two places share rows of what is written. */
typedef struct {
    int64_t places[PLACES], queries, keys, dim;
    float padded;            /* keys and values of 0 that the queries see too */
    Rows q, k, v, out, lse;  /* attend writes the last two, of all keys; gradients are of these */
    Rows grad, dq, dk, dv;   /* the gradient of `out`, and to what gradients are added */
} Attention;

/* Numbers that are worked on at once; 0 on a processor that cannot, where the others must not be called. */
int attention_lanes(void);

/* Head dims are multiples of DIM_STEP up to MAX_DIM. Both return 0 if there is no memory. */
enum { DIM_STEP = 8, MAX_DIM = 128 };
int attend(const Attention *job, int threads);
int add_gradients(const Attention *job, int threads);

#endif

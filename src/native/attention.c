/* Blocks of keys meet panels of queries, whose numbers lie side by side in vectors, and nothing between two products
 * leaves the caches. Rounding differs from machine to machine here, as in PyTorch's kernels. */
#include "attention.h"

#include "jpeg.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) /* as for CLONES */
#pragma GCC optimize("fp-contract=fast")

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define WIDELY __attribute__((target("arch=x86-64-v4"), noinline))

/* An accumulator holds ROWS × WIDE vectors, which the registers of AVX-512 have room for. */
enum { LANES = 16, WIDE = 2, PANEL = LANES * WIDE, ROWS = DIM_STEP, CHUNK = 16 * PANEL, BLOCK = 128 };
enum { MAX_THREADS = 256, ALONE = 1 << 22 }; /* products of two numbers that are not worth another thread */

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Bits __attribute__((vector_size(4 * LANES)));

/* What one thread works on: a chunk of rows in panels whose rows are lanes, and a block of rows that meet each panel.
 * Queries are in panels and keys in blocks, for the gradient keys in panels and queries in blocks. What comes out for
 * rows beyond the last one of a panel or block is not used. */
typedef struct {
    Lanes a[CHUNK / LANES * MAX_DIM], b[CHUNK / LANES * MAX_DIM];         /* [panels, dim, WIDE]: q; k and v */
    Lanes sum_a[CHUNK / LANES * MAX_DIM], sum_b[CHUNK / LANES * MAX_DIM]; /* the output; the gradients of k and v */
    Lanes top[CHUNK / LANES], total[CHUNK / LANES];                       /* of a query's scores, and of its weights */
    Lanes weights[BLOCK * WIDE], pulls[BLOCK * WIDE];
    Lanes rows[CHUNK * MAX_DIM / LANES], sum_rows[BLOCK * MAX_DIM / LANES]; /* [, padded dim]: k, the gradient of q */
    float block_a[BLOCK * MAX_DIM], block_b[BLOCK * MAX_DIM];             /* [, dim]: k, v; q, the output's gradient */
    float lse[BLOCK], mean[BLOCK];
} Scratch;

enum { SET, ADD, SCALE };

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t vectors(int64_t dim) { return (dim + LANES - 1) / LANES; }

/* `a` where one of them is not a number. */
INLINE Lanes larger(Lanes a, Lanes b) {
    Lanes found;
    for (int i = 0; i < LANES; i++) found[i] = b[i] > a[i] ? b[i] : a[i];
    return found;
}

/* e^x to 1.4 units in the last place for x up to 80; nothing is smaller than e^-80, so that no product is denormal. */
INLINE Lanes power(Lanes x) {
    const float magic = 0x1.8p23f + 127; /* what is added to it is rounded, and lies in its last bits as an exponent */
    x = larger(x, (Lanes){0} - 80);
    Lanes shifted = x * 0x1.715476p0f + magic, rest = x - (shifted - magic) * 0x1.62e43p-1f;
    Lanes sum = rest * 8.31250101e-3f + 4.18903306e-2f;
    sum = sum * rest + 1.66671157e-1f;
    sum = sum * rest + 4.99992311e-1f;
    sum = sum * rest + 1;
    sum = sum * rest + 1;
    return sum * (Lanes)((Bits)shifted << 23);
}

/* sums[row, w] = (nothing, itself or itself × factor[w]) + the sum over i of left[row × across + i × along]
 * × right[i, w]. Steps are in numbers, those of sums and right in vectors. */
INLINE void multiply(int how, Lanes *sums, ptrdiff_t apart, const Lanes *factor, const float *left, ptrdiff_t across,
                     ptrdiff_t along, const Lanes *right, ptrdiff_t next, int64_t count, int wide) {
    Lanes sum[ROWS][WIDE] = {0};
#pragma GCC unroll 2
    for (int64_t i = 0; i < count; i++, left += along, right += next) {
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 2
            for (int w = 0; w < wide; w++) sum[row][w] += left[row * across] * right[w];
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 2
        for (int w = 0; w < wide; w++) {
            Lanes *to = &sums[row * apart + w];
            *to = how == SET ? sum[row][w] : (how == ADD ? *to : *to * factor[w]) + sum[row][w];
        }
}

/* scores[row, lane] of a block's rows [row, dim] with those of a panel */
INLINE void score(Lanes *scores, const float *rows, const Lanes *panel, int64_t count, int64_t dim) {
    for (int64_t j = 0; j < count; j += ROWS)
        multiply(SET, scores + j * WIDE, WIDE, NULL, rows + j * dim, dim, 1, panel, WIDE, dim, WIDE);
}

/* panel[dim, lane] += the sum over a block's rows of rows[row, dim] × weights[row, lane] */
INLINE void gather(int how, Lanes *panel, const Lanes *factor, const float *rows, const Lanes *weights, int64_t count,
                   int64_t dim) {
    for (int64_t i = 0; i < dim; i += ROWS)
        multiply(how, panel + i * WIDE, WIDE, factor, rows + i, 1, dim, weights, WIDE, count, WIDE);
}

/* sums[row, dim] += the sum over lanes of weights[row, lane] × rows[lane, dim] */
INLINE void spread(Lanes *sums, const Lanes *weights, const Lanes *rows, int64_t count, int64_t dim) {
    int64_t width = vectors(dim), i;
    for (int64_t j = 0; j < count; j += ROWS) {
        const float *left = (const float *)(weights + j * WIDE);
        for (i = 0; i + WIDE <= width; i += WIDE)
            multiply(ADD, sums + j * width + i, width, NULL, left, PANEL, 1, rows + i, width, PANEL, WIDE);
        if (i < width) multiply(ADD, sums + j * width + i, width, NULL, left, PANEL, 1, rows + i, width, PANEL, 1);
    }
}

INLINE char *at(const Rows *rows, const int64_t place[PLACES], int64_t row) {
    char *data = rows->data + row * rows->row;
    for (int i = 0; i < PLACES; i++) data += place[i] * rows->place[i];
    return data;
}

INLINE void pack(float *to, int64_t width, const char *from, ptrdiff_t step, int64_t count, int64_t dim, float scale) {
    for (int64_t i = 0; i < count; i++, from += step, to += width)
        for (int64_t j = 0; j < dim; j++) to[j] = ((const float *)from)[j] * scale;
}

/* Number j of row i of panels. */
INLINE float *in_panel(Lanes *panels, int64_t i, int64_t j, int64_t dim) {
    return (float *)panels + (i / PANEL * dim + j) * PANEL + i % PANEL;
}

/* Rows into panels, of which the last is filled up with zeros. */
INLINE void pack_panels(Lanes *to, const char *from, ptrdiff_t step, int64_t count, int64_t dim, float scale) {
    if (count % PANEL) memset(to + count / PANEL * dim * WIDE, 0, sizeof *to * (size_t)(dim * WIDE));
    for (int64_t i = 0; i < count; i++, from += step)
        for (int64_t j = 0; j < dim; j++) *in_panel(to, i, j, dim) = ((const float *)from)[j] * scale;
}

WIDELY static void attend_panel(Scratch *s, int64_t panel, int64_t keys, int64_t dim) {
    Lanes *top = s->top + panel * WIDE, *total = s->total + panel * WIDE, factor[WIDE], sum[WIDE] = {0}, best[4][WIDE];
    score(s->weights, s->block_a, s->a + panel * dim * WIDE, keys, dim);
    for (int i = 0; i < 4; i++) /* four of each, so that few comparisons wait for another */
        for (int w = 0; w < WIDE; w++) best[i][w] = top[w];
    for (int64_t j = 0; j + 4 <= keys; j += 4)
        for (int i = 0; i < 4; i++)
            for (int w = 0; w < WIDE; w++) best[i][w] = larger(best[i][w], s->weights[(j + i) * WIDE + w]);
    for (int64_t j = keys & ~(int64_t)3; j < keys; j++)
        for (int w = 0; w < WIDE; w++) best[0][w] = larger(best[0][w], s->weights[j * WIDE + w]);
    for (int w = 0; w < WIDE; w++) {
        Lanes highest = larger(larger(best[0][w], best[1][w]), larger(best[2][w], best[3][w]));
        factor[w] = power(top[w] - highest);
        top[w] = highest;
    }
    for (int64_t j = 0; j < keys; j++)
        for (int w = 0; w < WIDE; w++) {
            Lanes *weight = s->weights + j * WIDE + w;
            sum[w] += *weight = power(*weight - top[w]);
        }
    for (int w = 0; w < WIDE; w++) total[w] = total[w] * factor[w] + sum[w];
    gather(SCALE, s->sum_a + panel * dim * WIDE, factor, s->block_b, s->weights, keys, dim);
}

WIDELY static void gradient_panel(Scratch *s, int64_t panel, int64_t count, int64_t keys, int64_t dim) {
    int64_t place = panel * dim * WIDE;
    score(s->weights, s->block_a, s->a + place, count, dim);
    score(s->pulls, s->block_b, s->b + place, count, dim);
    for (int64_t i = 0; i < count; i++)
        for (int w = 0; w < WIDE; w++) {
            Lanes *weight = s->weights + i * WIDE + w, *pull = s->pulls + i * WIDE + w;
            *weight = power(*weight - s->lse[i]);
            *pull = (*pull - s->mean[i]) * *weight;
        }
    for (int64_t i = 0; keys < PANEL && i < count; i++) /* what is no key moves no query */
        memset((float *)(s->pulls + i * WIDE) + keys, 0, sizeof(float) * (size_t)(PANEL - keys));
    gather(ADD, s->sum_a + place, NULL, s->block_a, s->pulls, count, dim);
    gather(ADD, s->sum_b + place, NULL, s->block_b, s->weights, count, dim);
    spread(s->sum_rows, s->pulls, s->rows + panel * PANEL * vectors(dim), count, dim);
}

WIDELY static void attend_chunk(const Attention *job, Scratch *s, const int64_t place[PLACES], int64_t first) {
    int64_t dim = job->dim, count = smaller(job->queries - first, CHUNK);
    pack_panels(s->a, at(&job->q, place, first), job->q.row, count, dim, 1 / sqrtf((float)dim));
    pack_panels(s->sum_a, at(&job->out, place, first), job->out.row, count, dim, 1);
    for (int64_t i = 0; i < count; i++) {
        float before = *(float *)at(&job->lse, place, first + i);
        float top = job->padded > 0 && before < 0 ? 0 : before, kept = expf(before - top);
        for (int64_t j = 0; top != before && j < dim; j++) *in_panel(s->sum_a, i, j, dim) *= kept;
        ((float *)s->top)[i] = top;
        ((float *)s->total)[i] = (before == -INFINITY ? 0 : kept) + (job->padded > 0 ? job->padded * expf(-top) : 0);
    }
    for (int64_t j = 0; j < job->keys; j += BLOCK) {
        int64_t keys = smaller(job->keys - j, BLOCK);
        pack(s->block_a, dim, at(&job->k, place, j), job->k.row, keys, dim, 1);
        pack(s->block_b, dim, at(&job->v, place, j), job->v.row, keys, dim, 1);
        for (int64_t panel = 0; panel * PANEL < count; panel++) attend_panel(s, panel, keys, dim);
    }
    for (int64_t i = 0; i < count; i++) {
        float *out = (float *)at(&job->out, place, first + i), total = ((float *)s->total)[i];
        for (int64_t j = 0; j < dim; j++) out[j] = *in_panel(s->sum_a, i, j, dim) / total;
        *(float *)at(&job->lse, place, first + i) = ((float *)s->top)[i] + logf(total);
    }
}

/* Adds a panel's sums to rows. */
INLINE void add_panels(const Rows *rows, const int64_t place[PLACES], int64_t first, Lanes *from, int64_t count,
                       int64_t dim) {
    for (int64_t i = 0; i < count; i++) {
        float *to = (float *)at(rows, place, first + i);
        for (int64_t j = 0; j < dim; j++) to[j] += *in_panel(from, i, j, dim);
    }
}

/* The next block of queries: scaled, the gradient of their outputs, log-sum-exp and mean of that gradient's pull. */
INLINE void pack_queries(const Attention *job, Scratch *s, const int64_t place[PLACES], int64_t first,
                         int64_t count) {
    int64_t dim = job->dim;
    pack(s->block_a, dim, at(&job->q, place, first), job->q.row, count, dim, 1 / sqrtf((float)dim));
    pack(s->block_b, dim, at(&job->grad, place, first), job->grad.row, count, dim, 1);
    for (int64_t i = 0; i < count; i++) {
        const float *out = (const float *)at(&job->out, place, first + i);
        float mean = 0;
        for (int64_t j = 0; j < dim; j++) mean += s->block_b[i * dim + j] * out[j];
        s->lse[i] = *(const float *)at(&job->lse, place, first + i), s->mean[i] = mean;
    }
}

WIDELY static void gradient_chunk(const Attention *job, Scratch *s, const int64_t place[PLACES], int64_t first) {
    int64_t dim = job->dim, width = vectors(dim), keys = smaller(job->keys - first, CHUNK);
    int64_t panels = (keys + PANEL - 1) / PANEL;
    pack_panels(s->a, at(&job->k, place, first), job->k.row, keys, dim, 1);
    pack_panels(s->b, at(&job->v, place, first), job->v.row, keys, dim, 1);
    memset(s->rows, 0, sizeof *s->rows * (size_t)(panels * PANEL * width));
    pack((float *)s->rows, width * LANES, at(&job->k, place, first), job->k.row, keys, dim, 1 / sqrtf((float)dim));
    memset(s->sum_a, 0, sizeof *s->sum_a * (size_t)(panels * dim * WIDE));
    memset(s->sum_b, 0, sizeof *s->sum_b * (size_t)(panels * dim * WIDE));
    for (int64_t i = 0; i < job->queries; i += BLOCK) {
        int64_t count = smaller(job->queries - i, BLOCK);
        pack_queries(job, s, place, i, count);
        memset(s->sum_rows, 0, sizeof *s->sum_rows * (size_t)(BLOCK * width));
        for (int64_t panel = 0; panel < panels; panel++)
            gradient_panel(s, panel, count, smaller(keys - panel * PANEL, PANEL), dim);
        for (int64_t row = 0; row < count; row++) {
            float *to = (float *)at(&job->dq, place, i + row), *from = (float *)(s->sum_rows + row * width);
            for (int64_t j = 0; j < dim; j++) to[j] += from[j];
        }
    }
    add_panels(&job->dk, place, first, s->sum_a, keys, dim);
    add_panels(&job->dv, place, first, s->sum_b, keys, dim);
}

/* Chunks of queries, each for itself, or for the gradients the chunks of a place one after the other. */
typedef struct {
    const Attention *job;
    int gradients, failed;
    int64_t next, units, chunks;
} Work;

static void *work(void *argument) {
    Work *of = argument;
    const Attention *job = of->job;
    Scratch *s = aligned_alloc(sizeof(Lanes), sizeof *s);
    if (!s) __atomic_store_n(&of->failed, 1, __ATOMIC_RELAXED);
    else memset(s->block_a, 0, sizeof s->block_a), memset(s->block_b, 0, sizeof s->block_b); /* denormals are slow */
    for (int64_t unit; s && (unit = __atomic_fetch_add(&of->next, 1, __ATOMIC_RELAXED)) < of->units;) {
        int64_t place[PLACES], rest = of->gradients ? unit : unit / of->chunks;
        for (int i = PLACES - 1; i >= 0; rest /= job->places[i--]) place[i] = rest % job->places[i];
        if (!of->gradients) attend_chunk(job, s, place, unit % of->chunks * CHUNK);
        for (int64_t i = 0; of->gradients && i < job->keys; i += CHUNK) gradient_chunk(job, s, place, i);
    }
    free(s);
    return NULL;
}

static int run(const Attention *job, int threads, int gradients) {
    Work all = {.job = job, .gradients = gradients, .units = 1, .chunks = (job->queries + CHUNK - 1) / CHUNK};
    for (int i = 0; i < PLACES; i++) all.units *= job->places[i];
    double products = (double)all.units * (double)job->queries * (double)job->keys * (double)job->dim;
    if (!gradients) all.units *= all.chunks;
    pthread_t others[MAX_THREADS];
    int64_t wanted = smaller(smaller(threads, MAX_THREADS), smaller(all.units, 1 + (int64_t)(products / ALONE)));
    int started = 0;
    while (started + 1 < wanted && !pthread_create(&others[started], NULL, work, &all)) started++;
    work(&all);
    while (started) pthread_join(others[--started], NULL);
    return !all.failed;
}

int attention_lanes(void) { return __builtin_cpu_supports("x86-64-v4") ? LANES : 0; }

int attend(const Attention *job, int threads) { return run(job, threads, 0); }

int add_gradients(const Attention *job, int threads) { return run(job, threads, 1); }

#else

int attention_lanes(void) { return 0; }

int attend(const Attention *job, int threads) { return (void)job, (void)threads, 0; }

int add_gradients(const Attention *job, int threads) { return (void)job, (void)threads, 0; }

#endif

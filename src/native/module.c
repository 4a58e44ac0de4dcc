/* gigatome._native: tiles cut out of the JPEG chunks of a level, and resampled, without the GIL; digests of bytes;
 * views of tiles; attention. */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "attention.h"
#include "digest.h"
#include "jpeg.h"
#include "module_attention.h"
#include "module_views.h"
#include "resample.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { IDLE_WORKSPACES = 64, IDLE_BYTES = 16 << 20 };

/* Workspaces that no call uses; touched with the GIL only. */
static Workspace *idle[IDLE_WORKSPACES];
static int idle_count;

static Workspace *take_workspace(void) {
    if (idle_count) return idle[--idle_count];
    return calloc(1, sizeof(Workspace));
}

static void give_workspace(Workspace *workspace) {
    size_t held = workspace->bytes_size + workspace->planes_size + workspace->rows_size + workspace->seen_size;
    if (idle_count < IDLE_WORKSPACES && held <= IDLE_BYTES) {
        idle[idle_count++] = workspace;
        return;
    }
    workspace_free(workspace);
    free(workspace);
}

typedef struct {
    PyObject_HEAD
    Tables *tables;
} TablesObject;

static PyObject *tables_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"data", NULL};
    static uint64_t made;
    Py_buffer data;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y*", names, &data)) return NULL;
    TablesObject *self = (TablesObject *)PyType_GenericAlloc(type, 0);
    int result = NO_MEMORY;
    if (self && (self->tables = calloc(1, sizeof *self->tables)))
        result = tables_add(self->tables, data.buf, (size_t)data.len);
    PyBuffer_Release(&data);
    if (self && self->tables) self->tables->serial = ++made;
    if (result == DECODED) return (PyObject *)self;
    Py_XDECREF((PyObject *)self);
    if (result == NO_MEMORY) return PyErr_NoMemory();
    PyErr_SetString(PyExc_ValueError, "not a JPEG stream of tables");
    return NULL;
}

static void tables_free(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    free(((TablesObject *)self)->tables);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* A level's chunks, a batch of windows into it, and where the bytes are. */
typedef struct {
    const Tables *tables;
    const void *offsets, *counts; /* [rows, columns]; offsets of offset_size bytes */
    int offset_size;
    int64_t rows, columns;
    int chunk_width, chunk_height, components, rgb, shrink;
    const int64_t *corners; /* [tiles, 2] */
    uint8_t *out;           /* [tiles, height, width, 3] */
    int64_t tiles, height, width;
    int file;             /* or -1: chunks[] has the bytes of the chunks that are present, in order */
    const Py_buffer *chunks;
    uint8_t *status; /* of each chunk of each tile: 0 placed, 1 left out of the file, 2 not decoded */
    int64_t status_count;
    int failure; /* errno of the file, or -1 if it ended early */
    double waited; /* seconds in which the file was read */
} Batch;

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static uint64_t offset_of(const Batch *batch, int64_t index) {
    if (batch->offset_size == 4) return ((const uint32_t *)batch->offsets)[index];
    return ((const uint64_t *)batch->offsets)[index];
}

static uint32_t count_of(const Batch *batch, int64_t index) { return ((const uint32_t *)batch->counts)[index]; }

static int read_fully(Batch *batch, uint8_t *out, size_t size, uint64_t offset) {
    while (size) {
        ssize_t got = pread(batch->file, out, size, (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            batch->failure = got ? errno : -1;
            return 0;
        }
        out += got;
        offset += (uint64_t)got;
        size -= (size_t)got;
    }
    return 1;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* The bytes of chunks [first, last) of a row, which lie one behind the other, by one read. */
static int64_t read_run(Batch *batch, uint8_t **memory, size_t *size, int64_t first, int64_t last) {
    int64_t end = first + 1;
    uint64_t total = count_of(batch, first);
    while (end < last && count_of(batch, end) && offset_of(batch, end) == offset_of(batch, first) + total)
        total += count_of(batch, end++);
    if (!grow(memory, size, total)) {
        batch->failure = ENOMEM;
        return -1;
    }
    double start = now();
    int whole = read_fully(batch, *memory, total, offset_of(batch, first));
    batch->waited += now() - start;
    return whole ? end : -1;
}

static int decode_into(Batch *batch, Workspace *workspace, int64_t tile, int64_t row, int64_t column,
                       const uint8_t *data, size_t size) {
    int64_t side_x = batch->chunk_width >> batch->shrink, side_y = batch->chunk_height >> batch->shrink;
    int64_t x = column * side_x - batch->corners[2 * tile], y = row * side_y - batch->corners[2 * tile + 1];
    int64_t left = larger(x, 0), top = larger(y, 0);
    int64_t right = smaller(x + side_x, batch->width), bottom = smaller(y + side_y, batch->height);
    Crop crop = {
        .data = data,
        .size = size,
        .chunk_width = batch->chunk_width,
        .chunk_height = batch->chunk_height,
        .components = batch->components,
        .rgb = batch->rgb,
        .shrink = batch->shrink,
        .x = (int)(left - x),
        .y = (int)(top - y),
        .width = (int)(right - left),
        .height = (int)(bottom - top),
        .out = batch->out + ((tile * batch->height + top) * batch->width + left) * 3,
        .stride = batch->width * 3,
    };
    return decode_crop(workspace, batch->tables, &crop);
}

typedef struct {
    int64_t row0, row1, column0, column1;
} Span;

static Span span_of(const Batch *batch, int64_t tile) {
    int64_t side_x = batch->chunk_width >> batch->shrink, side_y = batch->chunk_height >> batch->shrink;
    int64_t x = batch->corners[2 * tile], y = batch->corners[2 * tile + 1];
    return (Span){y / side_y, (y + batch->height - 1) / side_y + 1, x / side_x, (x + batch->width - 1) / side_x + 1};
}

/* Whether all windows lie inside the level, and how many chunks they touch. */
static int check_spans(Batch *batch) {
    int64_t side_x = batch->chunk_width >> batch->shrink, side_y = batch->chunk_height >> batch->shrink;
    batch->status_count = 0;
    for (int64_t tile = 0; tile < batch->tiles; tile++) {
        int64_t x = batch->corners[2 * tile], y = batch->corners[2 * tile + 1];
        if (x < 0 || y < 0 || x > batch->columns * side_x - batch->width || y > batch->rows * side_y - batch->height)
            return 0;
        Span span = span_of(batch, tile);
        batch->status_count += (span.row1 - span.row0) * (span.column1 - span.column0);
    }
    return 1;
}

static void run_batch(Batch *batch, Workspace *workspace) {
    uint8_t *memory = NULL, *status = batch->status;
    size_t size = 0;
    int64_t given = 0;
    for (int64_t tile = 0; tile < batch->tiles && !batch->failure; tile++) {
        Span span = span_of(batch, tile);
        for (int64_t row = span.row0; row < span.row1 && !batch->failure; row++) {
            int64_t held = span.column0; /* chunks before this one have been read */
            const uint8_t *data = NULL;
            for (int64_t column = span.column0; column < span.column1; column++) {
                int64_t index = row * batch->columns + column;
                uint32_t count = count_of(batch, index);
                *status = 1;
                if (count && batch->file < 0) {
                    const Py_buffer *chunk = batch->chunks + given++;
                    *status = decode_into(batch, workspace, tile, row, column, chunk->buf, (size_t)chunk->len) ? 2 : 0;
                } else if (count) {
                    if (column >= held) {
                        held = read_run(batch, &memory, &size, index, row * batch->columns + span.column1);
                        if (held < 0) break;
                        held -= row * batch->columns;
                        data = memory;
                    }
                    *status = decode_into(batch, workspace, tile, row, column, data, count) ? 2 : 0;
                    data += count;
                }
                status++;
            }
        }
    }
    free(memory);
}

/* How many of the chunks that the windows touch are in the file. */
static int64_t count_present(const Batch *batch) {
    int64_t present = 0;
    for (int64_t tile = 0; tile < batch->tiles; tile++) {
        Span span = span_of(batch, tile);
        for (int64_t row = span.row0; row < span.row1; row++)
            for (int64_t column = span.column0; column < span.column1; column++)
                present += count_of(batch, row * batch->columns + column) != 0;
    }
    return present;
}

static int shape_is(const Py_buffer *view, int dimensions, Py_ssize_t item) {
    return view->ndim == dimensions && view->itemsize == item && (uintptr_t)view->buf % (size_t)item == 0;
}

static int take_arrays(Batch *batch, const Py_buffer views[4]) {
    const Py_buffer *offsets = &views[0], *counts = &views[1], *corners = &views[2], *out = &views[3];
    if (!(shape_is(offsets, 2, 4) || shape_is(offsets, 2, 8)) || !shape_is(counts, 2, 4) ||
        !shape_is(corners, 2, 8) || !shape_is(out, 4, 1) || offsets->shape[0] != counts->shape[0] ||
        offsets->shape[1] != counts->shape[1] || corners->shape[1] != 2 || out->shape[0] != corners->shape[0] ||
        out->shape[3] != 3 || out->shape[1] < 1 || out->shape[2] < 1)
        return 0;
    batch->offsets = offsets->buf, batch->counts = counts->buf;
    batch->offset_size = (int)offsets->itemsize;
    batch->rows = counts->shape[0], batch->columns = counts->shape[1];
    batch->corners = corners->buf, batch->out = out->buf;
    batch->tiles = out->shape[0], batch->height = out->shape[1], batch->width = out->shape[2];
    return 1;
}

/* One call's arguments, held while it runs. */
typedef struct {
    Batch batch;
    Py_buffer views[4]; /* offsets, counts, corners, out */
    Py_buffer *chunks;
    int views_held;
    Py_ssize_t chunks_held;
    PyObject *status;
} Job;

static void job_release(Job *job) {
    while (job->chunks_held) PyBuffer_Release(&job->chunks[--job->chunks_held]);
    while (job->views_held) PyBuffer_Release(&job->views[--job->views_held]);
    free(job->chunks);
    Py_CLEAR(job->status);
}

/* Whether the bytes given, if any, are as many as the chunks that the windows touch. */
static int chunks_fit(Batch *batch, Py_ssize_t count) {
    if (check_spans(batch) && (batch->file >= 0 || count == count_present(batch))) return 1;
    PyErr_SetString(PyExc_ValueError, "not as many chunks as the windows touch");
    return 0;
}

/* The bytes of each chunk, as many as are present, from a sequence. */
static int job_take_chunks(Job *job, PyObject *source) {
    Py_ssize_t count = PySequence_Size(source);
    if (count < 0 || !chunks_fit(&job->batch, count)) return 0;
    if (!(job->chunks = calloc((size_t)count + 1, sizeof *job->chunks))) {
        PyErr_NoMemory();
        return 0;
    }
    for (; job->chunks_held < count; job->chunks_held++) {
        PyObject *item = PySequence_GetItem(source, job->chunks_held);
        int failed = !item || PyObject_GetBuffer(item, &job->chunks[job->chunks_held], PyBUF_SIMPLE);
        Py_XDECREF(item);
        if (failed) return 0;
    }
    job->batch.chunks = job->chunks;
    return 1;
}

static int job_take(Job *job, PyObject *module, PyObject *args) {
    static const int flags[4] = {PyBUF_ND, PyBUF_ND, PyBUF_ND, PyBUF_ND | PyBUF_WRITABLE};
    PyObject *tables, *source, *objects[4];
    Batch *batch = &job->batch;
    batch->file = -1;
    if (!PyTuple_Check(args)) {
        PyErr_SetString(PyExc_TypeError, "a call is a tuple of arguments");
        return 0;
    }
    if (!PyArg_ParseTuple(args, "OOOO(iiip)OOi", &tables, &source, &objects[0], &objects[1], &batch->chunk_width,
                          &batch->chunk_height, &batch->components, &batch->rgb, &objects[2], &objects[3],
                          &batch->shrink))
        return 0;
    PyTypeObject *type = PyModule_GetState(module) ? *(PyTypeObject **)PyModule_GetState(module) : NULL;
    if (!type || !PyObject_TypeCheck(tables, type)) {
        PyErr_SetString(PyExc_TypeError, "tables must be Tables");
        return 0;
    }
    batch->tables = ((TablesObject *)tables)->tables;
    for (; job->views_held < 4; job->views_held++)
        if (PyObject_GetBuffer(objects[job->views_held], &job->views[job->views_held], flags[job->views_held])) return 0;
    int whole = (1 << 3) - 1;
    int sides_right = batch->shrink >= 0 && batch->shrink <= 3 && batch->chunk_width > 0 && batch->chunk_height > 0 &&
                      batch->chunk_width <= 65535 && batch->chunk_height <= 65535 &&
                      !((batch->chunk_width | batch->chunk_height) & (whole >> (3 - batch->shrink)));
    if (!sides_right || !take_arrays(batch, job->views) || !check_spans(batch)) {
        PyErr_SetString(PyExc_ValueError, "the arrays do not fit each other, or a window lies outside the level");
        return 0;
    }
    if (!PyLong_Check(source)) return job_take_chunks(job, source);
    long file = PyLong_AsLong(source);
    if (!PyErr_Occurred() && (file < 0 || file > INT_MAX)) PyErr_SetString(PyExc_ValueError, "the file is closed");
    batch->file = (int)file;
    return !PyErr_Occurred();
}

/* The last look at the arrays, which Python code could have changed until now. */
static int job_begin(Job *job) {
    if (!chunks_fit(&job->batch, job->chunks_held)) return 0;
    if (!(job->status = PyBytes_FromStringAndSize(NULL, job->batch.status_count))) return 0;
    job->batch.status = (uint8_t *)PyBytes_AsString(job->status);
    return 1;
}

static PyObject *job_result(const Job *job) {
    const Batch *batch = &job->batch;
    if (!batch->failure) return Py_BuildValue("(Od)", job->status, batch->waited);
    if (batch->failure == ENOMEM) return PyErr_NoMemory();
    if (batch->failure < 0)
        PyErr_SetString(PyExc_EOFError, "the file ends within a chunk");
    else {
        errno = batch->failure;
        PyErr_SetFromErrno(PyExc_OSError);
    }
    return NULL;
}

static int jobs_run(Job *jobs, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++)
        if (!job_begin(&jobs[i])) return 0;
    Workspace *workspace = take_workspace();
    if (!workspace) {
        PyErr_NoMemory();
        return 0;
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++) run_batch(&jobs[i].batch, workspace);
    Py_END_ALLOW_THREADS
    give_workspace(workspace);
    return 1;
}

PyDoc_STRVAR(read_tiles_doc,
             "read_tiles(tables, source, offsets, counts, chunk, corners, out, shrink)\n--\n\n"
             "Decodes windows of one level.\n\n"
             "Args:\n"
             "    tables: :class:`Tables` common to the chunks.\n"
             "    source: file descriptor, or the bytes of each chunk that is present, window by window, row by row.\n"
             "    offsets: uint32 or uint64 [rows, columns], C order.\n"
             "    counts: uint32 [rows, columns], C order; 0 for a chunk that the file leaves out.\n"
             "    chunk: width, height, components, and whether they are RGB rather than YCbCr.\n"
             "    corners: int64 [N, 2], x and y in pixels of the level divided by 1 << shrink; windows lie inside it.\n"
             "    out: uint8 [N, H, W, 3], written.\n"
             "    shrink: 0 to 3; the sides of the chunks are divisible by 1 << shrink.\n\n"
             "Returns:\n"
             "    bytes, one for each chunk of each window: 0 placed, 1 left out of the file, 2 not decoded;\n"
             "    and the seconds in which the file was read.\n\n"
             "Raises:\n"
             "    OSError: the file cannot be read.\n"
             "    EOFError: it ends within a chunk.\n"
             "    ValueError: the arguments contradict each other.\n");

static PyObject *read_tiles(PyObject *module, PyObject *args) {
    Job job = {0};
    PyObject *result = job_take(&job, module, args) && jobs_run(&job, 1) ? job_result(&job) : NULL;
    job_release(&job);
    return result;
}

/* The exception that is set, taken. */
static PyObject *taken_error(void) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyErr_NormalizeException(&type, &error, &trace);
    Py_XDECREF(type);
    Py_XDECREF(trace);
    return error;
}

PyDoc_STRVAR(read_many_doc,
             "read_many(calls)\n--\n\n"
             "Makes several calls of :func:`read_tiles`, without the GIL from the first to the last.\n\n"
             "Args:\n"
             "    calls: list of tuples of arguments.\n\n"
             "Returns:\n"
             "    list of what each returns, or the OSError, EOFError or MemoryError that it would raise.\n\n"
             "Raises:\n"
             "    ValueError: the arguments of a call contradict each other; none was made.\n");

static PyObject *read_many(PyObject *module, PyObject *calls) {
    PyObject *copy = PySequence_Tuple(calls); /* which nobody else can change */
    if (!copy) return NULL;
    Py_ssize_t count = PyTuple_Size(copy), taken = 0;
    Job *jobs = calloc((size_t)count + 1, sizeof *jobs);
    PyObject *results = jobs ? PyList_New(0) : PyErr_NoMemory();
    int good = results != NULL;
    for (; good && taken < count; taken++) good = job_take(&jobs[taken], module, PyTuple_GetItem(copy, taken));
    good = good && jobs_run(jobs, count);
    for (Py_ssize_t i = 0; good && i < count; i++) {
        PyObject *result = job_result(&jobs[i]);
        if (!result) result = taken_error();
        good = result && !PyList_Append(results, result);
        Py_XDECREF(result);
    }
    while (taken) job_release(&jobs[--taken]);
    free(jobs);
    Py_DECREF(copy);
    if (!good) Py_CLEAR(results);
    return results;
}

static int take_axis(Axis *axis, const Py_buffer *index, const Py_buffer *weight, const Py_buffer *cover, int64_t source) {
    if (!shape_is(index, 2, 4) || !shape_is(weight, 2, 4) || !shape_is(cover, 1, 4) ||
        index->shape[0] != weight->shape[0] || index->shape[1] != weight->shape[1] ||
        index->shape[0] != cover->shape[0] || index->shape[1] < 1)
        return 0;
    *axis = (Axis){index->buf, weight->buf, cover->buf, index->shape[0], index->shape[1]};
    for (int64_t i = 0; i < axis->count * axis->taps; i++)
        if (axis->index[i] < 0 || axis->index[i] >= source) return 0;
    return 1;
}

PyDoc_STRVAR(resample_doc,
             "resample(pixels, x_index, x_weight, x_cover, y_index, y_weight, y_cover, out)\n--\n\n"
             "Weighted means of pixels, uint8 [H, W, 3] to uint8 [h, w, 3].\n\n"
             "Args:\n"
             "    pixels: uint8 [H, W, 3], C order.\n"
             "    x_index: int32 [w, k], columns of ``pixels``; x_weight: float32 [w, k].\n"
             "    x_cover: float32 [w], the share of each column that is picture; the rest is white.\n"
             "    y_index, y_weight, y_cover: the same for the rows.\n"
             "    out: uint8 [h, w, 3], C order, written.\n\n"
             "Raises:\n"
             "    ValueError: the arguments contradict each other.\n");

static PyObject *resample(PyObject *module, PyObject *args) {
    PyObject *objects[8], *result = NULL;
    Py_buffer views[8];
    Resampling job;
    int taken = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOOOOOO", &objects[0], &objects[1], &objects[2], &objects[3], &objects[4],
                          &objects[5], &objects[6], &objects[7]))
        return NULL;
    for (; taken < 8; taken++)
        if (PyObject_GetBuffer(objects[taken], &views[taken], taken == 7 ? PyBUF_ND | PyBUF_WRITABLE : PyBUF_ND)) break;
    if (taken == 8) {
        const Py_buffer *in = &views[0], *out = &views[7];
        if (!shape_is(in, 3, 1) || !shape_is(out, 3, 1) || in->shape[2] != 3 || out->shape[2] != 3 ||
            !take_axis(&job.across, &views[1], &views[2], &views[3], in->shape[1]) ||
            !take_axis(&job.down, &views[4], &views[5], &views[6], in->shape[0]) ||
            out->shape[0] != job.down.count || out->shape[1] != job.across.count)
            PyErr_SetString(PyExc_ValueError, "the arrays do not fit each other");
        else {
            job.in = in->buf, job.in_height = in->shape[0], job.in_width = in->shape[1], job.out = out->buf;
            float *sums = malloc(sizeof *sums * (3 * (size_t)job.in_width + 1));
            if (sums) {
                Py_BEGIN_ALLOW_THREADS
                resample_run(&job, sums);
                Py_END_ALLOW_THREADS
                Py_INCREF(Py_None);
                result = Py_None;
            } else
                PyErr_NoMemory();
            free(sums);
        }
    }
    while (taken) PyBuffer_Release(&views[--taken]);
    return result;
}

PyDoc_STRVAR(digests_doc,
             "digests(parts)\n--\n\n"
             "A 32-bit digest of each of several bytes-like objects, to compare with one made before; list of int.\n");

static PyObject *digests(PyObject *module, PyObject *parts) {
    (void)module;
    PyObject *results = PyList_New(0), *iterator = results ? PyObject_GetIter(parts) : NULL, *part;
    while (iterator && (part = PyIter_Next(iterator))) {
        Py_buffer view;
        PyObject *value = NULL;
        if (!PyObject_GetBuffer(part, &view, PyBUF_SIMPLE)) {
            value = PyLong_FromUnsignedLong(digest(view.buf, (size_t)view.len));
            PyBuffer_Release(&view);
        }
        Py_DECREF(part);
        int failed = !value || PyList_Append(results, value);
        Py_XDECREF(value);
        if (failed) break;
    }
    Py_XDECREF(iterator);
    if (PyErr_Occurred()) Py_CLEAR(results);
    return results;
}

static PyMethodDef methods[] = {
    {"add_gradients", attend_gradients, METH_VARARGS, add_gradients_doc},
    {"attend", attend_to, METH_VARARGS, attend_doc},
    {"crop_views", crop_views, METH_VARARGS, crop_views_doc},
    {"digests", digests, METH_O, digests_doc},
    {"read_tiles", read_tiles, METH_VARARGS, read_tiles_doc},
    {"read_many", read_many, METH_O, read_many_doc},
    {"recolour_views", recolour_views, METH_VARARGS, recolour_views_doc},
    {"resample", resample, METH_VARARGS, resample_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot tables_slots[] = {
    {Py_tp_doc, "Tables(data)\n--\n\nQuantisation and Huffman tables of a JPEG stream; raises ValueError."},
    {Py_tp_new, tables_new},
    {Py_tp_dealloc, tables_free},
    {0, NULL},
};

static PyType_Spec tables_spec = {
    .name = "gigatome._native.Tables",
    .basicsize = sizeof(TablesObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = tables_slots,
};

static int module_exec(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &tables_spec, NULL);
    if (!type) return -1;
    *(PyObject **)PyModule_GetState(module) = type;
    Py_INCREF(type);
    if (PyModule_AddIntConstant(module, "ATTENTION_LANES", attention_lanes())) return -1;
    return PyModule_AddObjectRef(module, "Tables", type);
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};

static PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "gigatome._native",
    .m_doc = "Tiles cut out of JPEG chunks, and resampled, views of them, and attention, without the GIL.",
    .m_size = sizeof(PyObject *),
    .m_methods = methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&module_definition); }

/* What Python sees of attention.c. */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "attention.h"
#include "module_attention.h"

#include <string.h>

enum { DIMS = PLACES + 2, MOST = 9 };

const char attend_doc[] =
    "attend(q, k, v, out, lse, padded, threads)\n--\n\n"
    "Softmax attention to keys that come in addition to those before, with scores times d^-0.5.\n\n"
    "Args:\n"
    "    q: float32 [places, n, d], as all of these, with four dimensions of places; the numbers of a row lie side by\n"
    "        side, and d is a multiple of 8 up to 128.\n"
    "    k: [places, m, d]; v: likewise.\n"
    "    out: [places, n, d], of the keys before, and then of all; 0 where there were none.\n"
    "    lse: [places, n, 1], log-sum-exp of their scores, likewise; -inf where there were none.\n"
    "    padded: how many keys and values of 0 are seen in addition.\n"
    "    threads: at most so many.\n\n"
    "Raises:\n"
    "    ValueError: the arrays do not fit each other.\n";

const char add_gradients_doc[] =
    "add_gradients(grad, q, k, v, out, lse, dq, dk, dv, threads)\n--\n\n"
    "Adds gradients of :func:`attend`; ``out`` and ``lse`` may be those of more keys than ``k``.\n\n"
    "Args:\n"
    "    grad: of ``out``, as it.\n"
    "    q, k, v, out, lse: as there.\n"
    "    dq, dk, dv: as q, k and v, added to.\n"
    "    threads: at most so many.\n\n"
    "Raises:\n"
    "    ValueError: the arrays do not fit each other.\n";

/* Whether an array is of floats [places, count, dim] whose rows lie side by side. */
static int take_rows(Rows *rows, const Py_buffer *view, const Attention *job, int64_t count, int64_t dim) {
    if (view->ndim != DIMS || view->itemsize != sizeof(float) || !view->format || strcmp(view->format, "f")) return 0;
    for (int i = 0; i < PLACES; i++)
        if (view->shape[i] != job->places[i]) return 0;
    if (view->shape[PLACES] != count || view->shape[PLACES + 1] != dim) return 0;
    if (dim > 1 && view->strides[PLACES + 1] != sizeof(float)) return 0;
    rows->data = view->buf, rows->row = view->strides[PLACES];
    memcpy(rows->place, view->strides, sizeof rows->place);
    uintptr_t all = (uintptr_t)view->buf;
    for (int i = 0; i <= PLACES; i++) all |= (uintptr_t)view->strides[i];
    return all % sizeof(float) == 0;
}

/* Sizes of a job by its queries and keys. */
static int take_sizes(Attention *job, const Py_buffer *q, const Py_buffer *k) {
    if (q->ndim != DIMS || k->ndim != DIMS) return 0;
    for (int i = 0; i < PLACES; i++) job->places[i] = q->shape[i];
    job->queries = q->shape[PLACES], job->keys = k->shape[PLACES], job->dim = q->shape[PLACES + 1];
    return job->keys > 0 && job->dim > 0 && job->dim % DIM_STEP == 0 && job->dim <= MAX_DIM;
}

/* Takes `to` from as many arrays, of which those from `written` on are written to. Queries and keys are at `first`,
 * which is 1 for gradients. */
static PyObject *run(PyObject *const *arrays, int count, int first, int written, Attention *job, Rows *const *to,
                     int threads) {
    Py_buffer views[MOST];
    int taken = 0, done = 0, fits;
    for (; taken < count; taken++) {
        int flags = PyBUF_STRIDES | PyBUF_FORMAT | (taken >= written ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(arrays[taken], &views[taken], flags)) break;
    }
    int held = taken == count;
    fits = held && attention_lanes() && take_sizes(job, &views[first], &views[first + 1]);
    for (int i = 0; fits && i < count; i++) {
        int of_keys = to[i] == &job->k || to[i] == &job->v || to[i] == &job->dk || to[i] == &job->dv;
        fits = take_rows(to[i], &views[i], job, of_keys ? job->keys : job->queries, to[i] == &job->lse ? 1 : job->dim);
    }
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        done = first ? add_gradients(job, threads) : attend(job, threads);
        Py_END_ALLOW_THREADS
    }
    while (taken) PyBuffer_Release(&views[--taken]);
    if (done) Py_RETURN_NONE;
    if (fits) return PyErr_NoMemory();
    if (held) PyErr_SetString(PyExc_ValueError, "the arrays do not fit each other, or the processor has no AVX-512");
    return NULL;
}

PyObject *attend_to(PyObject *module, PyObject *args) {
    PyObject *x[5];
    Attention job = {0};
    int threads;
    Rows *to[] = {&job.q, &job.k, &job.v, &job.out, &job.lse};
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOOOfi", &x[0], &x[1], &x[2], &x[3], &x[4], &job.padded, &threads)) return NULL;
    return run(x, 5, 0, 3, &job, to, threads);
}

PyObject *attend_gradients(PyObject *module, PyObject *args) {
    PyObject *x[9];
    Attention job = {0};
    int threads;
    Rows *to[] = {&job.grad, &job.q, &job.k, &job.v, &job.out, &job.lse, &job.dq, &job.dk, &job.dv};
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOOOOOOOi", &x[0], &x[1], &x[2], &x[3], &x[4], &x[5], &x[6], &x[7], &x[8], &threads))
        return NULL;
    return run(x, 9, 1, 6, &job, to, threads);
}

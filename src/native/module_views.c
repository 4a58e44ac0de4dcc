/* What Python sees of views.c. */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "module_views.h"
#include "views.h"

#include <math.h>

const char crop_views_doc[] = "crop_views(pixels, boxes, out)\n--\n\n"
                              "Resampled crops of images.\n\n"
                              "Args:\n"
                              "    pixels: uint8 [B, H, W, 3], C order, as all of these.\n"
                              "    boxes: float32 [B, 7], x, y, width, height; mirror_x, mirror_y, transpose (0 or 1).\n"
                              "    out: float32 [B, 3, size, size], written, within 0 to 1.\n\n"
                              "Raises:\n"
                              "    ValueError: the arguments contradict each other, or a box lies far outside.\n";

const char recolour_views_doc[] =
    "recolour_views(views, colours, order, gain_and_bias)\n--\n\n"
    "Changes the colours of images in place.\n\n"
    "Args:\n"
    "    views: float32 [B, 3, h, w] within 0 to 1, C order, as all of these.\n"
    "    colours: float32 [B, 7], brightness, contrast, saturation, hue (within ±1), gray, sigma of the blur (up to 16,\n"
    "        0: none), solarize.\n"
    "    order: uint8 [4], of brightness (0), contrast (1), saturation (2) and hue (3).\n"
    "    gain_and_bias: float32 [2, 3], how each channel is scaled at the end.\n\n"
    "Raises:\n"
    "    ValueError: the arguments contradict each other.\n";

/* Fills `views` from `objects`; the last `written` of them can be written to. */
static int take_buffers(PyObject *const *objects, Py_buffer *views, int count, int written) {
    for (int taken = 0; taken < count; taken++) {
        int flags = taken == written ? PyBUF_ND | PyBUF_WRITABLE : PyBUF_ND;
        if (!PyObject_GetBuffer(objects[taken], &views[taken], flags)) continue;
        while (taken) PyBuffer_Release(&views[--taken]);
        return 0;
    }
    return 1;
}

/* Whether it is an array of such items whose shape ends in `last`. */
static int is_array(const Py_buffer *view, int dimensions, Py_ssize_t item, Py_ssize_t last) {
    if (view->ndim != dimensions || view->itemsize != item || (uintptr_t)view->buf % (size_t)item) return 0;
    for (int i = 0; i < dimensions; i++)
        if (view->shape[i] < 1) return 0;
    return !last || view->shape[dimensions - 1] == last;
}

static int is_near(float start, float length, Py_ssize_t source) {
    float far = 16 * (float)source;
    return length > 0 && length <= far && fabsf(start) <= far;
}

static int boxes_fit(const Py_buffer *pixels, const Py_buffer *boxes) {
    const Box *box = boxes->buf;
    for (Py_ssize_t i = 0; i < boxes->shape[0]; i++)
        if (!is_near(box[i].x, box[i].width, pixels->shape[2]) || !is_near(box[i].y, box[i].height, pixels->shape[1])) return 0;
    return 1;
}

static int colours_fit(const Py_buffer *colours, const Py_buffer *order) {
    const Colours *of = colours->buf;
    for (int i = 0; i < CHANGES; i++)
        if (((const uint8_t *)order->buf)[i] >= CHANGES) return 0;
    for (Py_ssize_t i = 0; i < colours->shape[0]; i++)
        if (!(fabsf(of[i].hue) <= 1) || !(of[i].sigma >= 0 && 4 * of[i].sigma <= BLUR_RADIUS)) return 0;
    return 1;
}

static PyObject *finish(Py_buffer *views, int count, int fits, int done) {
    while (count) PyBuffer_Release(&views[--count]);
    if (fits && done) Py_RETURN_NONE;
    if (fits) return PyErr_NoMemory();
    PyErr_SetString(PyExc_ValueError, "the arrays do not fit each other, or a value is out of range");
    return NULL;
}

PyObject *crop_views(PyObject *module, PyObject *args) {
    PyObject *objects[3];
    Py_buffer views[3];
    (void)module;
    if (!PyArg_ParseTuple(args, "OOO", &objects[0], &objects[1], &objects[2])) return NULL;
    if (!take_buffers(objects, views, 3, 2)) return NULL;
    const Py_buffer *pixels = &views[0], *boxes = &views[1], *out = &views[2];
    int done = 1, fits = is_array(pixels, 4, 1, 3) && is_array(boxes, 2, 4, 7) && is_array(out, 4, 4, 0) &&
                         boxes->shape[0] == pixels->shape[0] && out->shape[0] == pixels->shape[0] &&
                         out->shape[1] == 3 && out->shape[2] == out->shape[3] && boxes_fit(pixels, boxes);
    if (fits) {
        Py_ssize_t height = pixels->shape[1], width = pixels->shape[2], size = out->shape[2];
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; done && i < pixels->shape[0]; i++)
            done = crop_view((const uint8_t *)pixels->buf + i * height * width * 3, height, width,
                             (const Box *)boxes->buf + i, size, (float *)out->buf + i * 3 * size * size);
        Py_END_ALLOW_THREADS
    }
    return finish(views, 3, fits, done);
}

PyObject *recolour_views(PyObject *module, PyObject *args) {
    PyObject *objects[4];
    Py_buffer views[4];
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOO", &objects[0], &objects[1], &objects[2], &objects[3])) return NULL;
    if (!take_buffers(objects, views, 4, 0)) return NULL;
    const Py_buffer *out = &views[0], *colours = &views[1], *order = &views[2], *scale = &views[3];
    int done = 1, fits = is_array(out, 4, 4, 0) && out->shape[1] == 3 && is_array(colours, 2, 4, 7) &&
                         is_array(order, 1, 1, CHANGES) && is_array(scale, 2, 4, 3) && scale->shape[0] == 2 &&
                         colours->shape[0] == out->shape[0] && colours_fit(colours, order);
    if (fits) {
        Py_ssize_t height = out->shape[2], width = out->shape[3];
        const float *gain = scale->buf;
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; done && i < out->shape[0]; i++) {
            float *planes = (float *)out->buf + i * 3 * height * width;
            done = recolour_view(planes, height, width, (const Colours *)colours->buf + i, order->buf);
            scale_view(planes, height * width, gain, gain + 3);
        }
        Py_END_ALLOW_THREADS
    }
    return finish(views, 4, fits, done);
}

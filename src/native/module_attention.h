/* What Python sees of attention.c. */
#ifndef GIGATOME_MODULE_ATTENTION_H
#define GIGATOME_MODULE_ATTENTION_H

extern const char attend_doc[], add_gradients_doc[];

PyObject *attend_to(PyObject *module, PyObject *args);
PyObject *attend_gradients(PyObject *module, PyObject *args);

#endif

/* Functions of the module that make views. */
#ifndef GIGATOME_MODULE_VIEWS_H
#define GIGATOME_MODULE_VIEWS_H

extern const char crop_views_doc[], recolour_views_doc[];

PyObject *crop_views(PyObject *module, PyObject *args);
PyObject *recolour_views(PyObject *module, PyObject *args);

#endif

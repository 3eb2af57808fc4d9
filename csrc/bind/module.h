// What each file of bind/ adds to the module.
#ifndef FM_BIND_MODULE_H
#define FM_BIND_MODULE_H

#include <pybind11/pybind11.h>

void bind_engine(pybind11::module_ &m);
void bind_check(pybind11::module_ &m);
void bind_internals(pybind11::module_ &m); // tests and benches only

#endif

// The schemas of the operators embcompress::*, and the Python module that loads them.

#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(embcompress, m) {
    m.def(
        "lookup(Tensor[] stores, Tensor ids, Tensor? offsets, Tensor? weights, Tensor encoding, "
        "bool ends_are_given, int num_features, int num_columns, bool sparse) -> Tensor");
    // The same without a gradient formula: what eager code calls inside its own autograd.Function,
    // because a formula registered from Python costs more than a small batch.
    m.def(
        "lookup_forward(Tensor[] stores, Tensor ids, Tensor? offsets, Tensor? weights, "
        "Tensor encoding, bool ends_are_given, int num_features, int num_columns, bool sparse) "
        "-> Tensor");
    m.def(
        "lookup_backward(Tensor grad, Tensor[] stores, Tensor ids, Tensor? offsets, "
        "Tensor? weights, Tensor encoding, bool ends_are_given, int[] wanted) -> Tensor[]");
    m.def(
        "lookup_backward_sparse(Tensor grad, Tensor[] stores, Tensor ids, Tensor? offsets, "
        "Tensor? weights, Tensor encoding, bool ends_are_given, int[] wanted) -> Tensor[]");
    m.def(
        "lookup_backward_weights(Tensor grad, Tensor[] stores, Tensor ids, Tensor? offsets, "
        "Tensor? weights, Tensor encoding, bool ends_are_given) -> Tensor");
    m.def(
        "lookup_backward_update(Tensor grad, Tensor(a!)[] stores, Tensor ids, Tensor? offsets, "
        "Tensor? weights, Tensor encoding, bool ends_are_given, int[] wanted, Tensor(b!)[] first, "
        "Tensor(c!)[] second, Tensor(d!)[] steps, Tensor settings, int kind) -> ()");
    m.def(
        "lookup_fused(Tensor anchor, Tensor[] stores, Tensor ids, Tensor? offsets, "
        "Tensor? weights, Tensor encoding, bool ends_are_given, int num_features, "
        "int num_columns, int[] wanted, Tensor[] first, Tensor[] second, Tensor[] steps, "
        "Tensor settings, int kind) -> Tensor");
    // Updates a sketch of the ids with the largest scores (csrc/cpu/hot_sketch.h).
    m.def(
        "hot_sketch_add(Tensor ids, Tensor amounts, Tensor(a!) slot_ids, Tensor(b!) scores, "
        "int key, int kept) -> ()");
    // Raises what the kernels of a device have reported, of lookups that nobody waited for.
    m.def("raise_reported(Tensor on) -> ()");
}

// An empty Python module: importing it loads the library, which registers the operators.
PyMODINIT_FUNC PyInit__C(void) {
    static PyModuleDef definition = {
        PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&definition);
}

"""Arrays in memory for packed weights: huge.h."""

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New

cimport numpy as cnp

cdef extern from "runtime/huge_pages.h":
    void *fs_huge_zeros(size_t n_bytes)
    void fs_huge_free(void *block)


cdef inline void huge_release(object capsule) noexcept:
    fs_huge_free(PyCapsule_GetPointer(capsule, "fastseq.memory"))


cdef inline cnp.ndarray huge_zeros(Py_ssize_t n_bytes):
    """Bytes from a cache line on, zeros."""
    cdef cnp.npy_intp shape = n_bytes
    cdef void *memory = fs_huge_zeros(n_bytes)
    if memory == NULL:
        raise MemoryError(f"{n_bytes} bytes of packed weights")
    array = cnp.PyArray_SimpleNewFromData(1, &shape, cnp.NPY_UINT8, memory)
    cnp.set_array_base(array, PyCapsule_New(memory, "fastseq.memory", huge_release))
    return array

# The kernels that run on this machine, for the other compiled modules. See src/runtime/_simd.pyx.

cimport numpy as cnp

from runtime.kernels cimport fs_kernels, fs_narrow

cdef const fs_kernels *kernels_for(Py_ssize_t item_size) noexcept nogil
cdef const fs_narrow *narrow_kernels() noexcept nogil


cdef inline const fs_kernels *kernels_of(cnp.ndarray array) noexcept:
    return kernels_for(cnp.PyArray_ITEMSIZE(array))

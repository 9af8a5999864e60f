# Nothing for Python: what other compiled modules use is in _weight_gradient.pxd.

from fastseq.checks import Array
from fastseq.narrow import Weight
from fastseq.windows import Windows

class PackedConvolution:
    @property
    def nbytes(self) -> int: ...

def conv_pack(weight: Weight, bias: Array | None, groups: int) -> PackedConvolution: ...
def conv_forward(packed: PackedConvolution, x: Array, windows: Windows, n_threads: int) -> Array: ...
def conv_backward(
    packed: PackedConvolution,
    x: Array,
    windows: Windows,
    dy: Array,
    dweight: Array,
    dbias: Array | None,
    n_threads: int,
) -> Array: ...

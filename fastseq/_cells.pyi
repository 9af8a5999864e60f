from fastseq.checks import Array
from fastseq.narrow import Weight

class Cell:
    @property
    def nbytes(self) -> int: ...

class TransposedCell: ...

def pack(
    kind: str,
    weight_ih: Weight,
    weight_hh: Weight,
    bias_ih: Array | None,
    bias_hh: Array | None,
    weight_hr: Weight | None,
    *vectors: Array | None,
) -> Cell: ...

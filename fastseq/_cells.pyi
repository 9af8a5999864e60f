from fastseq.checks import Array

class Cell:
    @property
    def nbytes(self) -> int: ...

class TransposedCell: ...

def pack(
    kind: str,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None,
    bias_hh: Array | None,
    weight_hr: Array | None,
    *vectors: Array | None,
) -> Cell: ...

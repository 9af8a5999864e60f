"""Bytes of files into named arrays and a description; what they mean for layers is decided in `fastseq.convert`."""

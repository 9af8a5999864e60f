"""Readers of files of other libraries: from bytes to named arrays and a description; one module a format."""

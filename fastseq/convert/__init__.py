"""Names and conventions of other libraries, mapped onto the layers and models here; one module a library."""

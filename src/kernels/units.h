/*
 * Loads and stores of the units of one vector, of which the last may be partial.
 */
#ifndef FASTSEQ_UNITS_H
#define FASTSEQ_UNITS_H

#include "vec.h"

INLINE vec load_units(const void *row, ptrdiff_t unit, ptrdiff_t units)
{
    const real *p = (const real *)row + unit;
    return units - unit >= LANES ? load(p) : load_part(p, units - unit);
}

INLINE void store_units(void *row, vec value, ptrdiff_t unit, ptrdiff_t units)
{
    real *p = (real *)row + unit;
    if (units - unit >= LANES)
        store(p, value);
    else
        store_part(p, value, units - unit);
}

/* Gate `gate` of the unit block at `unit`, of a row of gates that each have `units` units. */
INLINE vec load_gate(const void *row, int gate, ptrdiff_t unit, ptrdiff_t units)
{
    return load_units((const real *)row + gate * units, unit, units);
}

INLINE void store_gate(void *row, int gate, vec value, ptrdiff_t unit, ptrdiff_t units)
{
    store_units((real *)row + gate * units, value, unit, units);
}

/*
 * Fetch what comes `offset` bytes after a place now used, because it is used next. A tape's rows lie far apart, where no
 * prefetcher of the processor's sees a stream.
 */
INLINE void fetch(const void *row, ptrdiff_t unit, ptrdiff_t offset)
{
    __builtin_prefetch((const void *)((uintptr_t)row + (uintptr_t)unit * sizeof(real) + (uintptr_t)offset), 0,
                       2);
}

#endif

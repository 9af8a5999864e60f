/*
 * Loads and stores of the units of one vector, of which the last may be partial.
 */
#ifndef FASTSEQ_UNITS_H
#define FASTSEQ_UNITS_H

#include "lanes.h"

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

#endif

/* Sums and softmax over segments whose members come in any order. REAL is float or double.

   Each thread has a range of the segments and passes over all members: every sum is made by one
   thread, in the order of its members. */

#include <math.h>
#include <stdint.h>
#include <string.h>

static REAL exponential(REAL x) { return sizeof(REAL) == 4 ? expf(x) : exp(x); }

static void add(const REAL *x, const int64_t *index, int64_t n, int64_t size, int64_t first,
                int64_t last, REAL *totals) {
    memset(totals + first * size, 0, (last - first) * size * sizeof(REAL));
    for (int64_t e = 0; e < n; e++) {
        if (index[e] < first || index[e] >= last) continue;
        REAL *total = totals + index[e] * size;
        for (int64_t c = 0; c < size; c++) total[c] += x[e * size + c];
    }
}

void segment_total(const REAL *x, const int64_t *index, int64_t n, int64_t size, int64_t n_segments,
                   REAL *totals, int n_parts) {
#pragma omp parallel for num_threads(n_parts) schedule(static, 1) if (n_parts > 1)
    for (int part = 0; part < n_parts; part++)
        add(x, index, n, size, part * n_segments / n_parts, (part + 1) * n_segments / n_parts, totals);
}

/* ``peaks`` and ``totals`` have room for a number of each segment and feature. */
void segment_softmax(const REAL *x, const int64_t *index, int64_t n, int64_t size,
                     int64_t n_segments, REAL *result, REAL *peaks, REAL *totals, int n_parts) {
#pragma omp parallel for num_threads(n_parts) schedule(static, 1) if (n_parts > 1)
    for (int part = 0; part < n_parts; part++) {
        const int64_t first = part * n_segments / n_parts, last = (part + 1) * n_segments / n_parts;
        for (int64_t k = first * size; k < last * size; k++) {
            peaks[k] = -INFINITY;
            totals[k] = 0;
        }
        for (int64_t e = 0; e < n; e++) {
            if (index[e] < first || index[e] >= last) continue;
            REAL *peak = peaks + index[e] * size;
            for (int64_t c = 0; c < size; c++) { /* a NaN stays: it is greater than nothing */
                const REAL value = x[e * size + c];
                peak[c] = value > peak[c] || value != value ? value : peak[c];
            }
        }
        for (int64_t e = 0; e < n; e++) {
            if (index[e] < first || index[e] >= last) continue;
            const REAL *peak = peaks + index[e] * size;
            REAL *total = totals + index[e] * size;
            for (int64_t c = 0; c < size; c++) {
                result[e * size + c] = exponential(x[e * size + c] - peak[c]);
                total[c] += result[e * size + c];
            }
        }
        for (int64_t e = 0; e < n; e++) {
            if (index[e] < first || index[e] >= last) continue;
            const REAL *total = totals + index[e] * size;
            for (int64_t c = 0; c < size; c++) result[e * size + c] /= total[c];
        }
    }
}

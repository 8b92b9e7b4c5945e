/* Functions of the lengths of edges by tables, whose values lie in parts of some widths, and the
   gradient by the vectors. REAL is float or double. */

#include <math.h>
#include <stdint.h>

#define ROWS 6

/* What an edge reads: its polynomials, the place t in their interval, and how t grows with r. */
typedef struct {
    const REAL *rows;
    REAL t, slope, length;
} Place;

static Place place_of(const REAL *vector, int64_t table, const REAL *polynomials,
                      int64_t n_intervals, int64_t width, REAL step) {
    const REAL x = vector[0], y = vector[1], z = vector[2];
    const REAL length = (REAL)sqrt(x * x + y * y + z * z), at = length / step;
    int64_t interval = at < n_intervals ? (int64_t)at : n_intervals - 1; /* NaN: the last */
    const REAL t = at < n_intervals ? at - interval : (at != at ? at : 1);
    return (Place){polynomials + (table * n_intervals + interval) * ROWS * width, t,
                   at < n_intervals ? 1 / step : 0, length};
}

void read_tables(const REAL *vectors, const int64_t *source, const int64_t *target,
                 const int64_t *kinds, int64_t n_edges, const REAL *polynomials, int64_t n_kinds,
                 int64_t n_intervals, int64_t width, double step, const int64_t *widths, int n_parts,
                 REAL **parts, int n_threads) {
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1)
    for (int64_t e = 0; e < n_edges; e++) {
        const int64_t table = n_kinds > 1 ? kinds[source[e]] * n_kinds + kinds[target[e]] : 0;
        const Place at = place_of(vectors + 3 * e, table, polynomials, n_intervals, width, step);
        const REAL t = at.t, *p = at.rows;
        for (int part = 0; part < n_parts; part++) {
            REAL *out = parts[part] + e * widths[part];
            for (int64_t c = 0; c < widths[part]; c++)
                out[c] = p[c] + t * (p[width + c] + t * (p[2 * width + c] + t * (p[3 * width + c] +
                         t * (p[4 * width + c] + t * p[5 * width + c]))));
            p += widths[part];
        }
    }
}

void read_tables_gradient(const REAL *vectors, const int64_t *source, const int64_t *target,
                          const int64_t *kinds, int64_t n_edges, const REAL *polynomials,
                          int64_t n_kinds, int64_t n_intervals, int64_t width, double step,
                          const int64_t *widths, int n_parts, const REAL **grads, REAL *result, int n_threads) {
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1)
    for (int64_t e = 0; e < n_edges; e++) {
        const int64_t table = n_kinds > 1 ? kinds[source[e]] * n_kinds + kinds[target[e]] : 0;
        const Place at = place_of(vectors + 3 * e, table, polynomials, n_intervals, width, step);
        const REAL t = at.t, *p = at.rows;
        REAL total = 0;
        for (int part = 0; part < n_parts; part++) {
            const REAL *grad = grads[part] + e * widths[part];
#pragma omp simd reduction(+ : total)
            for (int64_t c = 0; c < widths[part]; c++)
                total += grad[c] * (p[width + c] + t * (2 * p[2 * width + c] + t * (3 *
                         p[3 * width + c] + t * (4 * p[4 * width + c] + t * 5 * p[5 * width + c]))));
            p += widths[part];
        }
        const REAL along = at.length > 0 ? total * at.slope / at.length : 0;
        for (int a = 0; a < 3; a++) result[3 * e + a] = along * vectors[3 * e + a];
    }
}

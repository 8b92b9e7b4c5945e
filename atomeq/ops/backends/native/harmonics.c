/* Spherical harmonics by recursion, and the form that all their derivatives are made of.

   REAL is float or double. WIDTH vectors are worked on side by side; an operation of this file is
   one of all of them. */

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define VECTOR_BYTES 64
#else
#define VECTOR_BYTES 32
#endif
#define WIDTH ((int)(VECTOR_BYTES / sizeof(REAL)))

typedef REAL vec __attribute__((vector_size(VECTOR_BYTES)));

typedef struct {
    int32_t row, axis, lower; /* d Y_row / d v_axis has coefficient * Y_lower */
} slope_t;

static REAL root(REAL x) { return sizeof(REAL) == 4 ? __builtin_sqrtf(x) : __builtin_sqrt(x); }

/* From rows of numbers to vectors of them, and back. */
static void read_rows(const REAL *rows, int size, int count, vec *columns) {
    for (int s = 0; s < size; s++) columns[s] = (vec){0};
    for (int e = 0; e < count; e++)
        for (int s = 0; s < size; s++) columns[s][e] = rows[e * size + s];
}

static void write_rows(const vec *columns, int size, int count, REAL *rows) {
    const REAL *numbers = (const REAL *)columns;
    for (int e = 0; e < count; e++)
        for (int s = 0; s < size; s++) rows[e * size + s] = numbers[s * WIDTH + e];
}

/* start[m], then step[l][m] and back[l][m] of the recursion in l, then scale[l] of a degree. */
static void columns_of(vec x, vec y, vec z, int lmax, const REAL *table, vec *columns) {
    const int n = lmax + 1;
    const REAL *start = table, *step = start + n, *back = step + n * n, *scale = back + n * n;
    const vec squared = x * x + y * y + z * z;
    vec cosine = (vec){0} + 1, sine = (vec){0}; /* Re, Im of (z + i x)^m */
    for (int m = 0; m <= lmax; m++) {
        if (m > 0) {
            const vec turned = cosine * z - sine * x;
            sine = cosine * x + sine * z;
            cosine = turned;
        }
        vec before = (vec){0}, legendre = (vec){0} + start[m];
        for (int l = m; l <= lmax; l++) {
            if (l > m) {
                const vec next = y * step[l * n + m] * legendre - back[l * n + m] * squared * before;
                before = legendre;
                legendre = next;
            }
            const vec scaled = legendre * scale[l];
            columns[l * l + l + m] = scaled * cosine;
            if (m > 0) columns[l * l + l - m] = scaled * sine;
        }
    }
}

void harmonics(const REAL *vectors, REAL *result, int64_t n, int lmax, const REAL *table,
               int normalize, int n_threads) {
    const int n_sph = (lmax + 1) * (lmax + 1);
#pragma omp parallel for num_threads(n_threads) schedule(static) if (n_threads > 1)
    for (int64_t at = 0; at < n; at += WIDTH) {
        const int count = n - at < WIDTH ? (int)(n - at) : WIDTH;
        vec v[3], columns[n_sph];
        read_rows(vectors + 3 * at, 3, count, v);
        if (normalize) {
            const vec squared = v[0] * v[0] + v[1] * v[1] + v[2] * v[2];
            vec length;
            for (int e = 0; e < WIDTH; e++) length[e] = squared[e] == 0 ? 1 : root(squared[e]);
            for (int i = 0; i < 3; i++) v[i] /= length;
        }
        columns_of(v[0], v[1], v[2], lmax, table, columns);
        write_rows(columns, n_sph, count, result + at * n_sph);
    }
}

/* G(g, h, Y) = sum g_row h_axis coefficient Y_lower; its derivatives that have a place. */
void harmonics_form(const REAL *g, const REAL *h, const REAL *values, REAL *to_g, REAL *to_h,
                    REAL *to_values, int64_t n, int n_sph, const slope_t *slopes, int n_slopes,
                    const REAL *coefficients, int n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(static) if (n_threads > 1)
    for (int64_t at = 0; at < n; at += WIDTH) {
        const int count = n - at < WIDTH ? (int)(n - at) : WIDTH;
        vec left[n_sph], axes[3], right[n_sph], sum_g[n_sph], sum_h[3], sum_values[n_sph];
        if (g) read_rows(g + at * n_sph, n_sph, count, left);
        if (h) read_rows(h + at * 3, 3, count, axes);
        if (values) read_rows(values + at * n_sph, n_sph, count, right);
        if (to_g) memset(sum_g, 0, sizeof sum_g);
        if (to_h) memset(sum_h, 0, sizeof sum_h);
        if (to_values) memset(sum_values, 0, sizeof sum_values);
        for (int s = 0; s < n_slopes; s++) {
            const slope_t k = slopes[s];
            if (to_g) sum_g[k.row] += coefficients[s] * axes[k.axis] * right[k.lower];
            if (to_h) sum_h[k.axis] += coefficients[s] * left[k.row] * right[k.lower];
            if (to_values) sum_values[k.lower] += coefficients[s] * axes[k.axis] * left[k.row];
        }
        if (to_g) write_rows(sum_g, n_sph, count, to_g + at * n_sph);
        if (to_h) write_rows(sum_h, 3, count, to_h + at * 3);
        if (to_values) write_rows(sum_values, n_sph, count, to_values + at * n_sph);
    }
}

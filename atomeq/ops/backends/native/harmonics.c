/* Spherical harmonics by recursion, with their first and second derivative.

   REAL is float or double of so many BYTES, LMAX the highest degree. WIDTH vectors are worked on side by side: a
   column holds one number of each. Derivatives need no recursion of their own, for they are
   harmonics of one degree less: dY/dv_i = A_i Y, with few nonzero elements in A_i. */

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define VECTOR_BYTES 64
#else
#define VECTOR_BYTES 32
#endif
#define NUMBERS (VECTOR_BYTES / BYTES) /* for the preprocessor, which knows no sizeof */
#define WIDTH ((int)NUMBERS)
#define N (LMAX + 1)
#define N_SPH (N * N)
#define INLINE static inline __attribute__((always_inline))

typedef REAL vec __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef REAL loose __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

typedef struct {
    int32_t row, axis, lower; /* of an element of A_axis */
} slope_t;

typedef struct {
    vec unit[3], inverse; /* of the length; with homogeneous harmonics the vector itself, and 1 */
    int normalize;
} place_t;

INLINE REAL root(REAL x) { return sizeof(REAL) == 4 ? __builtin_sqrtf(x) : __builtin_sqrt(x); }

INLINE void read_rows(const REAL *rows, const int size, int64_t count, vec *columns) {
    REAL *numbers = (REAL *)columns;
    if (count >= WIDTH) {
        for (int e = 0; e < WIDTH; e++)
            for (int s = 0; s < size; s++) numbers[s * WIDTH + e] = rows[e * size + s];
        return;
    }
    memset(columns, 0, size * sizeof(vec));
    for (int e = 0; e < count; e++)
        for (int s = 0; s < size; s++) numbers[s * WIDTH + e] = rows[e * size + s];
}

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
#endif
#endif

#ifdef SHUFFLES
#if NUMBERS == 4
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#elif NUMBERS == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#endif

/* A square block of columns becomes rows: the halves are interleaved until each has moved home. */
INLINE void write_block(const vec *columns, int stride, REAL *rows) {
    vec now[WIDTH], next[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) now[i] = columns[i];
#pragma GCC unroll 4
    for (int step = 1; step < WIDTH; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < WIDTH / 2; i++) {
            next[2 * i] = __builtin_shufflevector(now[i], now[i + WIDTH / 2], LOW);
            next[2 * i + 1] = __builtin_shufflevector(now[i], now[i + WIDTH / 2], HIGH);
        }
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++) now[i] = next[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) *(loose *)(rows + i * stride) = now[i];
}
#endif

INLINE void write_rows(const vec *columns, const int size, int64_t count, REAL *rows) {
    const REAL *numbers = (const REAL *)columns;
    int first = 0;
#ifdef SHUFFLES
    if (count >= WIDTH)
        for (; first + WIDTH <= size; first += WIDTH) write_block(columns + first, size, rows + first);
#endif
    for (int e = 0; e < (count < WIDTH ? count : WIDTH); e++)
        for (int s = first; s < size; s++) rows[e * size + s] = numbers[s * WIDTH + e];
}

INLINE vec dot(const vec *a, const vec *b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

INLINE place_t place_of(const REAL *vectors, int64_t count, int normalize) {
    place_t p;
    p.normalize = normalize;
    p.inverse = (vec){0} + 1;
    read_rows(vectors, 3, count, p.unit);
    if (normalize) {
        vec length = dot(p.unit, p.unit);
        REAL *numbers = (REAL *)&length;
        for (int e = 0; e < WIDTH; e++) numbers[e] = numbers[e] == 0 ? 1 : root(numbers[e]);
        p.inverse = 1 / length;
        for (int i = 0; i < 3; i++) p.unit[i] /= length;
    }
    return p;
}

/* The table: start[m], then step[l][m] and back[l][m] of the recursion in l, then scale[l]. */
INLINE void values_of(const place_t *p, const REAL *table, vec *values) {
    const REAL *start = table, *step = start + N, *back = step + N * N, *scale = back + N * N;
    const vec x = p->unit[0], y = p->unit[1], z = p->unit[2], squared = dot(p->unit, p->unit);
    vec cosine = (vec){0} + 1, sine = (vec){0}; /* Re, Im of (z + i x)^m */
#pragma GCC unroll 16
    for (int m = 0; m <= LMAX; m++) {
        if (m > 0) {
            const vec turned = cosine * z - sine * x;
            sine = cosine * x + sine * z;
            cosine = turned;
        }
        vec before = (vec){0}, legendre = (vec){0} + start[m];
#pragma GCC unroll 16
        for (int l = m; l <= LMAX; l++) {
            if (l > m) {
                const vec next = y * step[l * N + m] * legendre - back[l * N + m] * squared * before;
                before = legendre;
                legendre = next;
            }
            const vec scaled = legendre * scale[l];
            values[l * l + l + m] = scaled * cosine;
            if (m > 0) values[l * l + l - m] = scaled * sine;
        }
    }
}

/* d(direction)/dv is symmetric, (1 - u u^T) / r: apply it to a. */
INLINE void turn(const place_t *p, const vec *a, vec *result) {
    const vec along = p->normalize ? dot(p->unit, a) : (vec){0};
    for (int i = 0; i < 3; i++) result[i] = (a[i] - p->unit[i] * along) * p->inverse;
}

void harmonics(const REAL *vectors, REAL *result, int64_t n, const REAL *table, int normalize,
               int n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(static) if (n_threads > 1)
    for (int64_t at = 0; at < n; at += WIDTH) {
        const place_t p = place_of(vectors + 3 * at, n - at, normalize);
        vec values[N_SPH];
        values_of(&p, table, values);
        write_rows(values, N_SPH, n - at, result + at * N_SPH);
    }
}

/* J^T g, with J = dY/dv. */
void harmonics_slope(const REAL *vectors, const REAL *g, REAL *result, int64_t n, const REAL *table,
                     const slope_t *slopes, const REAL *coefficients, int n_slopes, int normalize,
                     int n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(static) if (n_threads > 1)
    for (int64_t at = 0; at < n; at += WIDTH) {
        const place_t p = place_of(vectors + 3 * at, n - at, normalize);
        vec values[N_SPH], left[N_SPH], sum[3] = {{0}, {0}, {0}}, turned[3];
        values_of(&p, table, values);
        read_rows(g + at * N_SPH, N_SPH, n - at, left);
        for (int s = 0; s < n_slopes; s++)
            sum[slopes[s].axis] += coefficients[s] * left[slopes[s].row] * values[slopes[s].lower];
        turn(&p, sum, turned);
        write_rows(turned, 3, n - at, result + at * 3);
    }
}

/* The derivatives of <h, J^T g>: by g, which is J h, and by the vectors. */
void harmonics_second(const REAL *vectors, const REAL *g, const REAL *h, REAL *to_g,
                      REAL *to_vectors, int64_t n, const REAL *table, const slope_t *slopes,
                      const REAL *coefficients, int n_slopes, int normalize, int n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(static) if (n_threads > 1)
    for (int64_t at = 0; at < n; at += WIDTH) {
        const place_t p = place_of(vectors + 3 * at, n - at, normalize);
        vec values[N_SPH], left[N_SPH], moved[N_SPH], back[N_SPH], axes[3], turned[3];
        vec slope[3] = {{0}, {0}, {0}}, second[3] = {{0}, {0}, {0}}, result[3];
        values_of(&p, table, values);
        read_rows(g + at * N_SPH, N_SPH, n - at, left);
        read_rows(h + at * 3, 3, n - at, axes);
        turn(&p, axes, turned);
        memset(moved, 0, sizeof moved);
        memset(back, 0, sizeof back);
        for (int s = 0; s < n_slopes; s++) {
            const slope_t k = slopes[s];
            const vec factor = coefficients[s] * turned[k.axis];
            moved[k.row] += factor * values[k.lower];
            back[k.lower] += factor * left[k.row];
            slope[k.axis] += coefficients[s] * left[k.row] * values[k.lower];
        }
        for (int s = 0; s < n_slopes; s++)
            second[slopes[s].axis] += coefficients[s] * back[slopes[s].row] * values[slopes[s].lower];
        turn(&p, second, result);
        if (p.normalize) { /* the direction itself turns less the longer the vector */
            const vec along_h = dot(p.unit, axes), along_slope = dot(p.unit, slope);
            const vec across = dot(axes, slope) - 3 * along_h * along_slope;
            for (int i = 0; i < 3; i++)
                result[i] -= (p.unit[i] * across + axes[i] * along_slope + slope[i] * along_h) *
                             p.inverse * p.inverse;
        }
        write_rows(moved, N_SPH, n - at, to_g + at * N_SPH);
        write_rows(result, 3, n - at, to_vectors + at * 3);
    }
}

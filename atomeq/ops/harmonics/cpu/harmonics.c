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

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
#endif
#endif

#ifdef SHUFFLES
#define FOUR(f, s, i) f(s, i), f(s, i + 1), f(s, i + 2), f(s, i + 3)
#if NUMBERS == 4
#define EACH(f, s) FOUR(f, s, 0)
#elif NUMBERS == 8
#define EACH(f, s) FOUR(f, s, 0), FOUR(f, s, 4)
#else
#define EACH(f, s) FOUR(f, s, 0), FOUR(f, s, 4), FOUR(f, s, 8), FOUR(f, s, 12)
#endif

/* Of a pair of columns, s apart: where each number of the first comes from, and of the second. */
#define FIRST(s, i) ((i) & (s) ? NUMBERS + (i) - (s) : (i))
#define SECOND(s, i) ((i) & (s) ? NUMBERS + (i) : (i) + (s))
#define EXCHANGE(s)                                                                   \
    _Pragma("GCC unroll 16") for (int i = 0; i < WIDTH; i++) if (!(i & (s))) {        \
        const vec a = block[i], b = block[i + (s)];                                   \
        block[i] = __builtin_shufflevector(a, b, EACH(FIRST, s));                     \
        block[i + (s)] = __builtin_shufflevector(a, b, EACH(SECOND, s));              \
    }

/* Columns of a square block become rows: smaller blocks trade places across its diagonal. */
INLINE void turn_block(vec *block) {
    EXCHANGE(1)
    EXCHANGE(2)
#if NUMBERS > 4
    EXCHANGE(4)
#endif
#if NUMBERS > 8
    EXCHANGE(8)
#endif
}

/* Up to WIDTH columns become the parts of WIDTH rows that begin at offset. A part that is shorter
   than a vector reaches into the next row, which is to be written after it, and never past the last
   row: behind it may be nothing, or another thread's. */
INLINE void write_block(const vec *columns, const int n_columns, const int size, const int offset,
                        REAL *rows) {
    vec block[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) block[i] = i < n_columns ? columns[i] : (vec){0};
    turn_block(block);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) {
        REAL *part = rows + i * size + offset;
        if (i * size + offset + WIDTH <= WIDTH * size)
            *(loose *)part = block[i];
        else
            memcpy(part, block + i, n_columns * sizeof(REAL));
    }
}

/* Number i of column s, the 3 i + s th of three vectors: its place in the first two of them; then in
   what was found there and the third. */
#define EARLY(s, i) (3 * (i) + (s) < 2 * NUMBERS ? 3 * (i) + (s) : 0)
#define LATE(s, i) (3 * (i) + (s) < 2 * NUMBERS ? (i) : 3 * (i) + (s) - NUMBERS)
#define APART(s) \
    __builtin_shufflevector(__builtin_shufflevector(a, b, EACH(EARLY, s)), c, EACH(LATE, s))
INLINE void read_three(const REAL *rows, vec *columns) {
    const vec a = ((const loose *)rows)[0], b = ((const loose *)rows)[1], c = ((const loose *)rows)[2];
    columns[0] = APART(0);
    columns[1] = APART(1);
    columns[2] = APART(2);
}
#endif

INLINE void read_rows(const REAL *rows, const int size, int64_t count, vec *columns) {
    REAL *numbers = (REAL *)columns;
    if (count >= WIDTH) {
#ifdef SHUFFLES
        if (size == 3) {
            read_three(rows, columns);
            return;
        }
#endif
        for (int e = 0; e < WIDTH; e++)
            for (int s = 0; s < size; s++) numbers[s * WIDTH + e] = rows[e * size + s];
        return;
    }
    memset(columns, 0, size * sizeof(vec));
    for (int e = 0; e < count; e++)
        for (int s = 0; s < size; s++) numbers[s * WIDTH + e] = rows[e * size + s];
}

INLINE void write_rows(const vec *columns, const int size, int64_t count, REAL *rows) {
    const REAL *numbers = (const REAL *)columns;
    int first = 0;
#ifdef SHUFFLES
    if (count >= WIDTH) {
        const int rest = size % WIDTH;
        first = size - rest;
        if (rest > WIDTH / 4) write_block(columns + first, rest, size, first, rows);
        for (int s = 0; s < first; s += WIDTH) write_block(columns + s, WIDTH, size, s, rows);
        if (rest > WIDTH / 4) return;
    }
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
        const vec squared = dot(p.unit, p.unit);
        vec length;
        for (int e = 0; e < WIDTH; e++) ((REAL *)&length)[e] = root(squared[e]);
        length -= __builtin_convertvector(squared == 0, vec); /* true is -1 */
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

/* The Clebsch-Gordan form in uvu mode, and its partial derivatives, without a tensor per edge.

   Per edge and channel F = sum_p w_p sum_ijk C^p_ijk a_i y_j b_k. Both a and b live on atoms: the
   edge's two ends. Each may be many tensors with channels of their own; a path reads rows of one of
   them. The edges are taken in the order of the atom of b, which owns its row of the result, so no
   two threads write to one place and, for one number of threads, every sum has one order.

   REAL is float or double. As many edges are taken together as a vector has numbers (WIDTH):
   M^p_ik = sum_j C^p_ijk y_j is made for all of them at once, and so is the way back from
   N^p_ik = sum_c w_p a_i b_k to the gradient of y.

   The weights are given for each edge, shared, absent, or read off a table at the edge's length:
   polynomials of degree ROWS - 1, one for each of equal intervals. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define VECTOR_BYTES 64
#else
#define VECTOR_BYTES 32
#endif
#define WIDTH ((int)(VECTOR_BYTES / sizeof(REAL)))

typedef REAL vec __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL loose
    __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias)); /* anywhere */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define LARGEST 5 /* rows of b at a time: with two vectors each they fill the registers */
#define TILE 3    /* rows of a and of b at a time where every pair has an accumulator */
#define ROWS 6    /* coefficients of a polynomial of the table */

typedef struct {
    int32_t tensor, start, stride, rows; /* which, the first number of an atom, from row to row */
} place_t;

typedef struct {
    place_t a, b;
    int32_t channels, weight; /* the first of its weights among those of an edge */
    int32_t first, last;      /* its terms */
} path_t;

typedef struct {
    int32_t pair, j; /* place (i, k) in M, row of y */
} term_t;

typedef struct {
    const REAL *at; /* may be NULL for b where only its partial is wanted */
    REAL *to;       /* the partial by b, NULL if not wanted */
    int64_t atom;   /* numbers of an atom */
} tensor_t;

typedef struct {
    int64_t n_paths, n_weights, rows_y;
    const path_t *paths;
    const term_t *terms;
    const REAL *coefficients; /* of the terms */
    const int64_t *index_a;   /* the atom of a; NULL: the edge itself */
    const int64_t *index_b;
    const tensor_t *a, *b;
    const REAL *y, *weights; /* weights NULL: from the table, or 1 */
    int64_t weight_edge;     /* stride; 0: shared */
    const REAL *table;       /* (n_intervals, ROWS, n_weights) */
    const REAL *lengths;     /* of the edges, in intervals */
    int64_t n_intervals;
    REAL *to_y, *to_weights, *to_lengths; /* partials, NULL if not wanted */
    int64_t to_weight_edge;               /* stride; 0: summed over edges */
} form_t;

/* One path of one edge. */
typedef struct {
    const REAL *m, *a, *b, *weight;
    REAL *to_b, *to_weight, *weighted;
    const REAL *coefficients; /* of its weights in the edge's interval, n_weights apart */
    int64_t n_weights;
    const REAL *powers; /* of the length in the interval, then their derivatives */
    vec *to_length;
    int64_t stride_a, stride_b, channels;
    int adds;
} edge_t;

INLINE vec load(const REAL *p) { return *(const loose *)p; }
INLINE void store(REAL *p, vec v) { *(loose *)p = v; }
INLINE vec fill(REAL value) { return value - (vec){0}; }

INLINE REAL total(vec v) {
    typedef REAL half __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef REAL quarter __attribute__((vector_size(VECTOR_BYTES / 4)));
    union {
        vec whole;
        half halves[2];
    } u = {v};
    union {
        half whole;
        quarter halves[2];
    } w = {u.halves[0] + u.halves[1]};
    const quarter q = w.halves[0] + w.halves[1];
    REAL sum = q[0];
    UNROLL for (int n = 1; n < WIDTH / 4; n++) sum += q[n];
    return sum;
}

#define SCALAR_LOAD(p) (*(p))
#define SCALAR_STORE(p, value) (*(p) = (value))
#define SCALAR_FILL(value) (value)
#define VECTOR_ADD(to, v) (*(to) += (v))
#define SCALAR_ADD(to, v) (*(REAL *)(to) += (v)) /* the first lane */

/* t_k = sum_i M_ik a_i for n_k rows of b, then its uses; m steps by WIDTH from pair to pair. */
#define APPLY(NAME, TYPE, LANES, LOAD, STORE)                                                      \
    INLINE void NAME(const int n_k, const int dim_a, int dim_b, const edge_t *e, int64_t k,        \
                     int64_t c, const TYPE *w, TYPE *slope) {                                      \
        const REAL *m = e->m + k * WIDTH, *a = e->a + c;                                           \
        TYPE t[LARGEST][LANES];                                                                    \
        UNROLL for (int k = 0; k < n_k; k++)                                                       \
            UNROLL for (int n = 0; n < LANES; n++) t[k][n] = (TYPE){0};                            \
        UNROLL for (int i = 0; i < dim_a; i++) {                                                   \
            TYPE row[LANES];                                                                       \
            UNROLL for (int n = 0; n < LANES; n++) row[n] = LOAD(a + i * e->stride_a + n * WIDTH); \
            UNROLL for (int k = 0; k < n_k; k++)                                                   \
                UNROLL for (int n = 0; n < LANES; n++)                                             \
                    t[k][n] += m[(i * dim_b + k) * WIDTH] * row[n];                                \
        }                                                                                          \
        if (e->to_b)                                                                               \
            UNROLL for (int j = 0; j < n_k; j++)                                                   \
                UNROLL for (int n = 0; n < LANES; n++) {                                           \
                    REAL *to = e->to_b + (k + j) * e->stride_b + c + n * WIDTH;                    \
                    STORE(to, LOAD(to) + w[n] * t[j][n]);                                          \
                }                                                                                  \
        if (slope)                                                                                 \
            UNROLL for (int j = 0; j < n_k; j++)                                                   \
                UNROLL for (int n = 0; n < LANES; n++)                                             \
                    slope[n] += LOAD(e->b + (k + j) * e->stride_b + c + n * WIDTH) * t[j][n];      \
    }

APPLY(apply_two, vec, 2, load, store)
APPLY(apply_one, vec, 1, load, store)
APPLY(apply_scalar, REAL, 1, SCALAR_LOAD, SCALAR_STORE)

/* The channels from c on: split the rows of b evenly into tiles; slopes are wanted or not. */
#define CHANNELS(NAME, APPLIED, TYPE, LANES, LOAD, STORE, FILL, ADD)                               \
    INLINE void NAME(const int dim_a, const int dim_b, const int sloped, const edge_t *e,          \
                     int64_t c) {                                                                  \
        TYPE w[LANES], slope[LANES];                                                               \
        UNROLL for (int n = 0; n < LANES; n++) {                                                   \
            const int64_t at = c + n * WIDTH;                                                      \
            slope[n] = (TYPE){0};                                                                  \
            w[n] = FILL(1);                                                                        \
            if (e->weight) w[n] = LOAD(e->weight + at);                                            \
            else if (e->coefficients) {                                                                   \
                w[n] = (TYPE){0};                                                                  \
                UNROLL for (int q = 0; q < ROWS; q++)                                                 \
                    w[n] += e->powers[q] * LOAD(e->coefficients + q * e->n_weights + at);                \
            }                                                                                      \
        }                                                                                          \
        TYPE *sum = sloped ? slope : 0;                                                            \
        const int n_tiles = (dim_b + LARGEST - 1) / LARGEST;                                       \
        UNROLL for (int tile = 0, k = 0; tile < n_tiles; tile++) {                                 \
            const int size = (dim_b - k + n_tiles - tile - 1) / (n_tiles - tile);                  \
            switch (size) {                                                                        \
            case 1: APPLIED(1, dim_a, dim_b, e, k, c, w, sum); break;                              \
            case 2: APPLIED(2, dim_a, dim_b, e, k, c, w, sum); break;                              \
            case 3: APPLIED(3, dim_a, dim_b, e, k, c, w, sum); break;                              \
            case 4: APPLIED(4, dim_a, dim_b, e, k, c, w, sum); break;                              \
            default: APPLIED(5, dim_a, dim_b, e, k, c, w, sum);                                    \
            }                                                                                      \
            k += size;                                                                             \
        }                                                                                          \
        if (e->weighted)                                                                           \
            for (int k = 0; k < dim_b; k++)                                                        \
                UNROLL for (int n = 0; n < LANES; n++) {                                           \
                    const int64_t at = c + n * WIDTH;                                              \
                    STORE(e->weighted + k * e->channels + at, w[n] * LOAD(e->b + k * e->stride_b + at)); \
                }                                                                                  \
        if (sloped)                                                                                \
            UNROLL for (int n = 0; n < LANES; n++) {                                               \
                const int64_t at = c + n * WIDTH;                                                  \
                if (e->to_weight) {                                                                \
                    REAL *to = e->to_weight + at;                                                  \
                    STORE(to, e->adds ? LOAD(to) + slope[n] : slope[n]);                           \
                } else                                                                             \
                    UNROLL for (int q = 0; q < ROWS; q++)                                             \
                        ADD(e->to_length, slope[n] * e->powers[ROWS + q] *                           \
                                              LOAD(e->coefficients + q * e->n_weights + at));             \
            }                                                                                      \
    }

CHANNELS(channels_two, apply_two, vec, 2, load, store, fill, VECTOR_ADD)
CHANNELS(channels_one, apply_one, vec, 1, load, store, fill, VECTOR_ADD)
CHANNELS(channels_scalar, apply_scalar, REAL, 1, SCALAR_LOAD, SCALAR_STORE, SCALAR_FILL, SCALAR_ADD)

INLINE void all_channels(const int dim_a, const int dim_b, const int sloped, const edge_t *e) {
    int64_t c = 0;
    for (; c + 2 * WIDTH <= e->channels; c += 2 * WIDTH) channels_two(dim_a, dim_b, sloped, e, c);
    for (; c + WIDTH <= e->channels; c += WIDTH) channels_one(dim_a, dim_b, sloped, e, c);
    for (; c < e->channels; c++) channels_scalar(dim_a, dim_b, sloped, e, c);
}

typedef void (*apply_t)(int dim_a, int dim_b, const edge_t *e);

#define APPLIES(DIM_A, DIM_B)                                                                      \
    static void sum_##DIM_A##_##DIM_B(int dim_a, int dim_b, const edge_t *e) {                     \
        all_channels(DIM_A, DIM_B, 0, e);                                                          \
    }                                                                                              \
    static void slope_##DIM_A##_##DIM_B(int dim_a, int dim_b, const edge_t *e) {                   \
        all_channels(DIM_A, DIM_B, 1, e);                                                          \
    }
#define FOR_DIMS(f) f(1, 1) f(1, 3) f(1, 5) f(3, 1) f(3, 3) f(3, 5) f(5, 1) f(5, 3) f(5, 5)
FOR_DIMS(APPLIES)
static void sum_any(int dim_a, int dim_b, const edge_t *e) { all_channels(dim_a, dim_b, 0, e); }
static void slope_any(int dim_a, int dim_b, const edge_t *e) { all_channels(dim_a, dim_b, 1, e); }

/* The commonest numbers of rows have functions of their own. */
static apply_t applied(int dim_a, int dim_b, int sloped) {
#define CASE(DIM_A, DIM_B)                                                                         \
    if (dim_a == DIM_A && dim_b == DIM_B)                                                          \
        return sloped ? slope_##DIM_A##_##DIM_B : sum_##DIM_A##_##DIM_B;
    FOR_DIMS(CASE)
    return sloped ? slope_any : sum_any;
}

/* N_ik = sum_c a_i b_k of n_i by n_k rows, where b is weighted already. */
INLINE void pair_tile(const int n_i, const int n_k, int dim_b, int64_t channels, int64_t stride_a,
                      const REAL *a, const REAL *b, REAL *n_pairs) {
    vec sum[TILE][TILE];
    REAL rest[TILE][TILE];
    UNROLL for (int i = 0; i < n_i; i++)
        UNROLL for (int k = 0; k < n_k; k++) {
            sum[i][k] = (vec){0};
            rest[i][k] = 0;
        }
    int64_t c = 0;
    for (; c + WIDTH <= channels; c += WIDTH) {
        vec left[TILE], right[TILE];
        UNROLL for (int i = 0; i < n_i; i++) left[i] = load(a + i * stride_a + c);
        UNROLL for (int k = 0; k < n_k; k++) right[k] = load(b + k * channels + c);
        UNROLL for (int i = 0; i < n_i; i++)
            UNROLL for (int k = 0; k < n_k; k++) sum[i][k] += left[i] * right[k];
    }
    for (; c < channels; c++)
        UNROLL for (int i = 0; i < n_i; i++)
            UNROLL for (int k = 0; k < n_k; k++)
                rest[i][k] += a[i * stride_a + c] * b[k * channels + c];
    UNROLL for (int i = 0; i < n_i; i++)
        UNROLL for (int k = 0; k < n_k; k++)
            n_pairs[(i * dim_b + k) * WIDTH] = rest[i][k] + total(sum[i][k]);
}

static void pairs(const path_t *p, const REAL *a, const REAL *b, REAL *n_pairs) {
    const int dim_a = p->a.rows, dim_b = p->b.rows;
    for (int i = 0; i < dim_a; i += TILE)
        for (int k = 0; k < dim_b; k += TILE) {
            int n_i = dim_a - i < TILE ? dim_a - i : TILE;
            int n_k = dim_b - k < TILE ? dim_b - k : TILE;
            const REAL *left = a + i * p->a.stride, *right = b + k * p->channels;
            REAL *place = n_pairs + (i * dim_b + k) * WIDTH;
#define PAIRS(n_i, n_k) pair_tile(n_i, n_k, dim_b, p->channels, p->a.stride, left, right, place)
            switch (TILE * n_i + n_k) {
            case 4: PAIRS(1, 1); break;
            case 5: PAIRS(1, 2); break;
            case 6: PAIRS(1, 3); break;
            case 7: PAIRS(2, 1); break;
            case 8: PAIRS(2, 2); break;
            case 9: PAIRS(2, 3); break;
            case 10: PAIRS(3, 1); break;
            case 11: PAIRS(3, 2); break;
            default: PAIRS(3, 3);
            }
        }
}

/* The interval of an edge's length in the table, and the powers there, then their derivatives. A
   length beyond the table counts as its end. */
static int64_t powers_of(const form_t *f, int64_t edge, REAL *powers) {
    const REAL at = f->lengths[edge], end = (REAL)f->n_intervals;
    const int inside = at >= 0 && at < end;
    const int64_t interval = inside ? (int64_t)at : at > 0 ? f->n_intervals - 1 : 0;
    const REAL t = inside ? at - (REAL)interval : at > 0;
    powers[0] = 1;
    powers[ROWS] = 0;
    for (int q = 1; q < ROWS; q++) {
        powers[q] = t * powers[q - 1];
        powers[ROWS + q] = (REAL)(q * inside) * powers[q - 1];
    }
    return interval;
}

/* Up to WIDTH edges; scratch holds y and its partial by edge, M, N and the weighted rows of b. */
static void batch(const form_t *f, const int64_t *edges, int count, REAL *to_weights,
                  int largest_pairs, REAL *scratch) {
    REAL *y = scratch, *to_y = y + f->rows_y * WIDTH, *m = to_y + f->rows_y * WIDTH;
    REAL *n_pairs = m + largest_pairs * WIDTH, *weighted = n_pairs + largest_pairs * WIDTH;
    REAL powers[WIDTH][2 * ROWS];
    vec to_length[WIDTH];
    int64_t intervals[WIDTH];
    memset(y, 0, 2 * f->rows_y * WIDTH * sizeof(REAL));
    for (int e = 0; e < count; e++) {
        for (int64_t j = 0; j < f->rows_y; j++) y[j * WIDTH + e] = f->y[edges[e] * f->rows_y + j];
        to_length[e] = (vec){0};
        if (f->table) intervals[e] = powers_of(f, edges[e], powers[e]);
    }
    for (int64_t number = 0; number < f->n_paths; number++) {
        const path_t *p = f->paths + number;
        const tensor_t *from = f->a + p->a.tensor, *owner = f->b + p->b.tensor;
        const int sloped = to_weights || f->to_lengths, applies = owner->to || sloped;
        const apply_t apply = applied(p->a.rows, p->b.rows, sloped);
        memset(m, 0, p->a.rows * p->b.rows * WIDTH * sizeof(REAL));
        if (applies)
            for (int32_t t = p->first; t < p->last; t++) {
                REAL *place = m + f->terms[t].pair * WIDTH;
                store(place, load(place) + f->coefficients[t] * load(y + f->terms[t].j * WIDTH));
            }
        for (int e = 0; e < count; e++) {
            const int64_t edge = edges[e];
            const int64_t atom_a = f->index_a ? f->index_a[edge] : edge;
            const int64_t at_b = (f->index_b ? f->index_b[edge] : edge) * owner->atom + p->b.start;
            if (f->weights && e + 1 < count)
                for (int64_t c = 0; c < p->channels; c += 64 / sizeof(REAL))
                    __builtin_prefetch(f->weights + edges[e + 1] * f->weight_edge + p->weight + c);
            edge_t call = {
                .m = m + e,
                .a = from->at + atom_a * from->atom + p->a.start,
                .b = owner->at ? owner->at + at_b : 0,
                .weight = f->weights ? f->weights + edge * f->weight_edge + p->weight : 0,
                .to_b = owner->to ? owner->to + at_b : 0,
                .to_weight = to_weights ? to_weights + edge * f->to_weight_edge + p->weight : 0,
                .weighted = f->to_y ? weighted : 0,
                .coefficients =
                    f->table ? f->table + intervals[e] * ROWS * f->n_weights + p->weight : 0,
                .n_weights = f->n_weights,
                .powers = powers[e],
                .to_length = to_length + e,
                .stride_a = p->a.stride,
                .stride_b = p->b.stride,
                .channels = p->channels,
                .adds = f->to_weight_edge == 0,
            };
            apply(p->a.rows, p->b.rows, &call);
            if (f->to_y) pairs(p, call.a, weighted, n_pairs + e);
        }
        if (f->to_y)
            for (int32_t t = p->first; t < p->last; t++) {
                REAL *place = to_y + f->terms[t].j * WIDTH;
                vec part = f->coefficients[t] * load(n_pairs + f->terms[t].pair * WIDTH);
                store(place, load(place) + part);
            }
    }
    for (int e = 0; e < count; e++) {
        if (f->to_y)
            for (int64_t j = 0; j < f->rows_y; j++)
                f->to_y[edges[e] * f->rows_y + j] = to_y[j * WIDTH + e];
        if (f->to_lengths) f->to_lengths[edges[e]] = total(to_length[e]);
    }
}

/* List the edges by the atom that owns them, each atom's in their order, and cut the list into
   n_parts shares at the bounds of atoms. ``counts`` has room for n_atoms + 1 numbers. Returns 1 if
   an atom's number is out of range, where nothing may be read or written. */
int cg_order(const int64_t *owner, int64_t n_edges, int64_t n_atoms, int64_t *counts,
             int64_t *edges, int64_t *starts, int n_parts) {
    memset(counts, 0, (n_atoms + 1) * sizeof(int64_t));
    for (int64_t e = 0; e < n_edges; e++) {
        if (owner[e] < 0 || owner[e] >= n_atoms) return 1;
        counts[owner[e] + 1]++;
    }
    for (int64_t n = 0; n < n_atoms; n++) counts[n + 1] += counts[n];
    int part = 0;
    for (int64_t n = 0; n <= n_atoms; n++)
        while (part <= n_parts && counts[n] >= part * n_edges / n_parts) starts[part++] = counts[n];
    for (int64_t e = 0; e < n_edges; e++) edges[counts[owner[e]]++] = e;
    return 0;
}

/* Add the partials of F to their (zeroed) places. ``edges`` lists the edges by the atom of b and
   ``starts`` where each of n_parts threads' share begins, at the bound of an atom. Returns 1 if
   memory ran out. ``sums`` has room for every part's own gradient of shared weights. */
int cg_partials(const form_t *f, const int64_t *edges, const int64_t *starts, int n_parts,
                REAL *sums) {
    int largest_pairs = 0, largest_b = 0, failed = 0;
    for (int64_t number = 0; number < f->n_paths; number++) {
        const path_t *p = f->paths + number;
        const int n_pairs = p->a.rows * p->b.rows, size_b = p->b.rows * p->channels;
        if (n_pairs > largest_pairs) largest_pairs = n_pairs;
        if (size_b > largest_b) largest_b = size_b;
    }
    const size_t size = (2 * f->rows_y + 2 * largest_pairs) * WIDTH + largest_b;
#pragma omp parallel for num_threads(n_parts) schedule(static, 1) if (n_parts > 1) reduction(| : failed)
    for (int part = 0; part < n_parts; part++) {
        REAL *scratch = malloc(size * sizeof(REAL));
        if (!scratch) {
            failed = 1;
            continue;
        }
        memset(scratch, 0, size * sizeof(REAL));
        REAL *to_weights = f->to_weights;
        if (to_weights && sums) to_weights = sums + part * f->n_weights;
        for (int64_t at = starts[part]; at < starts[part + 1]; at += WIDTH) {
            const int64_t left = starts[part + 1] - at;
            batch(f, edges + at, left < WIDTH ? (int)left : WIDTH, to_weights, largest_pairs,
                  scratch);
        }
        free(scratch);
    }
    return failed;
}

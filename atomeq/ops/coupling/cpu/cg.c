/* The Clebsch-Gordan form in uvu mode, and its partial derivatives, without a tensor per edge.

   Per edge and channel F = sum_p w_p sum_ijk C^p_ijk a_i y_j b_k. Both a and b live on atoms: the
   edge's two ends. The edges are taken in the order of the atom of b, which owns its row of the
   result, so no two threads write to one place and, for one number of threads, every sum has one
   order.

   REAL is float or double. As many edges are taken together as a vector has numbers (WIDTH):
   M^p_ik = sum_j C^p_ijk y_j is made for all of them at once, and so is the way back from
   N^p_ik = sum_c w_p a_i b_k to the gradient of y. */

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

typedef struct {
    int32_t row_a, dim_a, row_b, dim_b; /* where degree l1 and l3 are, and how many rows each */
    int32_t first, last;                /* the path's terms */
} path_t;

typedef struct {
    int32_t pair, j; /* place (i, k) in M, row of y */
} term_t;

typedef struct {
    int64_t n_edges, n_paths, channels;
    const path_t *paths;
    const term_t *terms;
    const REAL *coefficients; /* of the terms */
    const int64_t *index_a;   /* the atom of a; NULL: the edge itself */
    const int64_t *index_b;
    const REAL *a, *y, *weights, *b;             /* b may be NULL where only its partial is wanted */
    int64_t rows_a, rows_y, rows_b;
    int64_t weight_edge, weight_path;            /* strides; 0: shared, or weights of 1 */
    REAL *to_y, *to_weights, *to_b;              /* partials, NULL if not wanted */
    int64_t to_weight_edge;                      /* stride; 0: summed over edges */
} form_t;

INLINE vec load(const REAL *p) { return *(const loose *)p; }
INLINE void store(REAL *p, vec v) { *(loose *)p = v; }
INLINE vec fill(REAL value) { return value - (vec){0}; }

INLINE REAL total(vec v) {
    REAL sum = 0;
    UNROLL for (int n = 0; n < WIDTH; n++) sum += v[n];
    return sum;
}

/* t_k = sum_i M_ik a_i for n_k rows of b, then its uses; m steps by WIDTH from pair to pair. */
#define APPLY(NAME, TYPE, LANES, LOAD, STORE)                                                      \
    INLINE void NAME(const int n_k, int dim_a, int dim_b, int64_t channels, const REAL *m,         \
                     const REAL *a, const REAL *b, REAL *to_b, const TYPE *w, TYPE *slope) {       \
        TYPE t[LARGEST][LANES];                                                                    \
        UNROLL for (int k = 0; k < n_k; k++)                                                       \
            UNROLL for (int n = 0; n < LANES; n++) t[k][n] = (TYPE){0};                            \
        for (int i = 0; i < dim_a; i++) {                                                          \
            TYPE row[LANES];                                                                       \
            UNROLL for (int n = 0; n < LANES; n++) row[n] = LOAD(a + i * channels + n * WIDTH);    \
            UNROLL for (int k = 0; k < n_k; k++)                                                   \
                UNROLL for (int n = 0; n < LANES; n++)                                             \
                    t[k][n] += m[(i * dim_b + k) * WIDTH] * row[n];                                \
        }                                                                                          \
        if (to_b)                                                                                  \
            UNROLL for (int k = 0; k < n_k; k++)                                                   \
                UNROLL for (int n = 0; n < LANES; n++) {                                           \
                    REAL *place = to_b + k * channels + n * WIDTH;                                 \
                    STORE(place, LOAD(place) + w[n] * t[k][n]);                                    \
                }                                                                                  \
        if (slope)                                                                                 \
            UNROLL for (int k = 0; k < n_k; k++)                                                   \
                UNROLL for (int n = 0; n < LANES; n++)                                             \
                    slope[n] += LOAD(b + k * channels + n * WIDTH) * t[k][n];                      \
    }

#define SCALAR_LOAD(p) (*(p))
#define SCALAR_STORE(p, value) (*(p) = (value))
APPLY(apply_two, vec, 2, load, store)
APPLY(apply_one, vec, 1, load, store)
APPLY(apply_scalar, REAL, 1, SCALAR_LOAD, SCALAR_STORE)

/* One path of one edge, on the channels from c on: split the rows of b evenly into tiles. */
#define PATH(NAME, APPLIED, TYPE, LANES, LOAD, STORE, ONE)                                         \
    static void NAME(const path_t *p, int64_t channels, int64_t c, const REAL *m, const REAL *a,   \
                     const REAL *b, REAL *to_b, const REAL *weight, REAL *to_weight, int adds) {   \
        TYPE w[LANES], slope[LANES];                                                               \
        UNROLL for (int n = 0; n < LANES; n++) {                                                   \
            w[n] = weight ? LOAD(weight + c + n * WIDTH) : ONE;                                    \
            slope[n] = (TYPE){0};                                                                  \
        }                                                                                          \
        int n_tiles = (p->dim_b + LARGEST - 1) / LARGEST, k = 0;                                   \
        for (int tile = 0; tile < n_tiles; tile++) {                                               \
            int size = (p->dim_b - k + n_tiles - tile - 1) / (n_tiles - tile);                     \
            int64_t at = k * channels + c;                                                         \
            const REAL *tile_m = m + k * WIDTH, *tile_a = a + c, *tile_b = b ? b + at : 0;         \
            REAL *tile_to = to_b ? to_b + at : 0;                                                  \
            TYPE *sum = to_weight ? slope : 0;                                                     \
            switch (size) {                                                                        \
            case 1: APPLIED(1, p->dim_a, p->dim_b, channels, tile_m, tile_a, tile_b, tile_to, w, sum); break; \
            case 2: APPLIED(2, p->dim_a, p->dim_b, channels, tile_m, tile_a, tile_b, tile_to, w, sum); break; \
            case 3: APPLIED(3, p->dim_a, p->dim_b, channels, tile_m, tile_a, tile_b, tile_to, w, sum); break; \
            case 4: APPLIED(4, p->dim_a, p->dim_b, channels, tile_m, tile_a, tile_b, tile_to, w, sum); break; \
            default: APPLIED(5, p->dim_a, p->dim_b, channels, tile_m, tile_a, tile_b, tile_to, w, sum); \
            }                                                                                      \
            k += size;                                                                             \
        }                                                                                          \
        if (to_weight)                                                                             \
            UNROLL for (int n = 0; n < LANES; n++) {                                               \
                REAL *place = to_weight + c + n * WIDTH;                                           \
                STORE(place, adds ? LOAD(place) + slope[n] : slope[n]);                                              \
            }                                                                                      \
    }

PATH(path_two, apply_two, vec, 2, load, store, fill(1))
PATH(path_one, apply_one, vec, 1, load, store, fill(1))
PATH(path_scalar, apply_scalar, REAL, 1, SCALAR_LOAD, SCALAR_STORE, 1)

INLINE void path_all(const path_t *p, int64_t channels, const REAL *m, const REAL *a, const REAL *b,
                     REAL *to_b, const REAL *weight, REAL *to_weight, int adds) {
    int64_t c = 0;
    for (; c + 2 * WIDTH <= channels; c += 2 * WIDTH)
        path_two(p, channels, c, m, a, b, to_b, weight, to_weight, adds);
    for (; c + WIDTH <= channels; c += WIDTH)
        path_one(p, channels, c, m, a, b, to_b, weight, to_weight, adds);
    for (; c < channels; c++) path_scalar(p, channels, c, m, a, b, to_b, weight, to_weight, adds);
}

/* N_ik = sum_c a_i b_k of n_i by n_k rows, where b is weighted already. */
INLINE void pair_tile(const int n_i, const int n_k, int dim_b, int64_t channels, const REAL *a,
                      const REAL *b, REAL *n_pairs) {
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
        UNROLL for (int i = 0; i < n_i; i++) left[i] = load(a + i * channels + c);
        UNROLL for (int k = 0; k < n_k; k++) right[k] = load(b + k * channels + c);
        UNROLL for (int i = 0; i < n_i; i++)
            UNROLL for (int k = 0; k < n_k; k++) sum[i][k] += left[i] * right[k];
    }
    for (; c < channels; c++)
        UNROLL for (int i = 0; i < n_i; i++)
            UNROLL for (int k = 0; k < n_k; k++)
                rest[i][k] += a[i * channels + c] * b[k * channels + c];
    UNROLL for (int i = 0; i < n_i; i++)
        UNROLL for (int k = 0; k < n_k; k++)
            n_pairs[(i * dim_b + k) * WIDTH] = rest[i][k] + total(sum[i][k]);
}

static void pairs(const path_t *p, int64_t channels, const REAL *a, const REAL *b, REAL *n_pairs) {
    for (int i = 0; i < p->dim_a; i += TILE)
        for (int k = 0; k < p->dim_b; k += TILE) {
            int n_i = p->dim_a - i < TILE ? p->dim_a - i : TILE;
            int n_k = p->dim_b - k < TILE ? p->dim_b - k : TILE;
            const REAL *left = a + i * channels, *right = b + k * channels;
            REAL *place = n_pairs + (i * p->dim_b + k) * WIDTH;
            switch (TILE * n_i + n_k) {
            case 4: pair_tile(1, 1, p->dim_b, channels, left, right, place); break;
            case 5: pair_tile(1, 2, p->dim_b, channels, left, right, place); break;
            case 6: pair_tile(1, 3, p->dim_b, channels, left, right, place); break;
            case 7: pair_tile(2, 1, p->dim_b, channels, left, right, place); break;
            case 8: pair_tile(2, 2, p->dim_b, channels, left, right, place); break;
            case 9: pair_tile(2, 3, p->dim_b, channels, left, right, place); break;
            case 10: pair_tile(3, 1, p->dim_b, channels, left, right, place); break;
            case 11: pair_tile(3, 2, p->dim_b, channels, left, right, place); break;
            default: pair_tile(3, 3, p->dim_b, channels, left, right, place);
            }
        }
}

static void weigh(int rows, int64_t channels, const REAL *b, const REAL *weight, REAL *weighted) {
    for (int k = 0; k < rows; k++)
        for (int64_t c = 0; c < channels; c++)
            weighted[k * channels + c] = weight[c] * b[k * channels + c];
}

/* Up to WIDTH edges; scratch holds y and its partial by edge, M, N and the weighted rows of b. */
static void batch(const form_t *f, const int64_t *edges, int count, REAL *to_weights,
                  int largest_pairs, REAL *scratch) {
    const int64_t channels = f->channels;
    REAL *y = scratch, *to_y = y + f->rows_y * WIDTH, *m = to_y + f->rows_y * WIDTH;
    REAL *n_pairs = m + largest_pairs * WIDTH, *weighted = n_pairs + largest_pairs * WIDTH;
    memset(y, 0, 2 * f->rows_y * WIDTH * sizeof(REAL));
    for (int e = 0; e < count; e++)
        for (int64_t j = 0; j < f->rows_y; j++) y[j * WIDTH + e] = f->y[edges[e] * f->rows_y + j];
    const int applies = f->to_b || f->to_weights;
    for (int64_t number = 0; number < f->n_paths; number++) {
        const path_t *p = f->paths + number;
        if (applies) {
            memset(m, 0, p->dim_a * p->dim_b * WIDTH * sizeof(REAL));
            for (int32_t t = p->first; t < p->last; t++) {
                REAL *place = m + f->terms[t].pair * WIDTH;
                store(place, load(place) + f->coefficients[t] * load(y + f->terms[t].j * WIDTH));
            }
        }
        for (int e = 0; e < count; e++) {
            const int64_t edge = edges[e];
            const int64_t at_a = (f->index_a ? f->index_a[edge] : edge) * f->rows_a + p->row_a;
            const int64_t at_b = (f->index_b ? f->index_b[edge] : edge) * f->rows_b + p->row_b;
            const REAL *a = f->a + at_a * channels, *b = f->b ? f->b + at_b * channels : 0;
            const REAL *weight =
                f->weights ? f->weights + edge * f->weight_edge + number * f->weight_path : 0;
            if (applies)
                path_all(p, channels, m + e, a, b, f->to_b ? f->to_b + at_b * channels : 0, weight,
                         to_weights ? to_weights + edge * f->to_weight_edge + number * channels : 0,
                         f->to_weight_edge == 0);
            if (f->to_y) {
                if (weight) weigh(p->dim_b, channels, b, weight, weighted);
                pairs(p, channels, a, weight ? weighted : b, n_pairs + e);
            }
        }
        if (f->to_y)
            for (int32_t t = p->first; t < p->last; t++) {
                REAL *place = to_y + f->terms[t].j * WIDTH;
                vec part = f->coefficients[t] * load(n_pairs + f->terms[t].pair * WIDTH);
                store(place, load(place) + part);
            }
    }
    if (f->to_y)
        for (int e = 0; e < count; e++)
            for (int64_t j = 0; j < f->rows_y; j++)
                f->to_y[edges[e] * f->rows_y + j] = to_y[j * WIDTH + e];
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

/* Whether every number is in 0..limit-1. */
int cg_in_range(const int64_t *index, int64_t n, int64_t limit) {
    int outside = 0;
    for (int64_t e = 0; e < n; e++) outside |= index[e] < 0 || index[e] >= limit;
    return !outside;
}

/* Add the partials of F to their (zeroed) places. ``edges`` lists the edges by the atom of b and
   ``starts`` where each of n_parts threads' share begins, at the bound of an atom. Returns 1 if
   memory ran out. ``sums`` has room for every part's own gradient of shared weights. */
int cg_partials(const form_t *f, const int64_t *edges, const int64_t *starts, int n_parts,
                REAL *sums) {
    int largest_pairs = 0, largest_b = 0, failed = 0;
    for (int64_t number = 0; number < f->n_paths; number++) {
        const path_t *p = f->paths + number;
        if (p->dim_a * p->dim_b > largest_pairs) largest_pairs = p->dim_a * p->dim_b;
        if (p->dim_b > largest_b) largest_b = p->dim_b;
    }
    const size_t size =
        (2 * f->rows_y + 2 * largest_pairs) * WIDTH + (size_t)largest_b * f->channels;
#pragma omp parallel for num_threads(n_parts) schedule(static, 1) if (n_parts > 1) reduction(| : failed)
    for (int part = 0; part < n_parts; part++) {
        REAL *scratch = malloc(size * sizeof(REAL));
        if (!scratch) {
            failed = 1;
            continue;
        }
        memset(scratch, 0, size * sizeof(REAL));
        REAL *to_weights = f->to_weights;
        if (to_weights && sums) to_weights = sums + part * f->n_paths * f->channels;
        for (int64_t at = starts[part]; at < starts[part + 1]; at += WIDTH) {
            const int64_t left = starts[part + 1] - at;
            batch(f, edges + at, left < WIDTH ? (int)left : WIDTH, to_weights, largest_pairs,
                  scratch);
        }
        free(scratch);
    }
    return failed;
}

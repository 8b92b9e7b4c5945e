/* The symmetric contraction of features with themselves, and its derivatives, closed form.

   F(x, w, z) = sum of c w_q z_m x_i1 ... x_in over terms, channel by channel. The monomials make a
   tree: a node is its parent times one component of x. The leaves, nearly all of the nodes, are used
   where they are made and kept nowhere. Terms of one column q of the weights and one row m of z make
   a pair; a node has entries, the pairs it belongs to.

   REAL is float or double, DIRECTIONS is k. The derivative of F in k directions h of x is evaluated
   with numbers x + e_1 h_1 + ... + e_k h_k whose units have squares of zero: such a jet has a part
   for every set of units, and what is wanted is the part of the whole set. The adjoint of a jet is
   kept with its parts in the order of the sets' complements, which makes it a jet again: so the
   gradients by x and by all directions come of one way back. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define VECTOR_BYTES 64
#else
#define VECTOR_BYTES 32
#endif
#define WIDTH ((int)(VECTOR_BYTES / sizeof(REAL)))
#define PARTS (1 << DIRECTIONS)

typedef REAL vec __attribute__((vector_size(VECTOR_BYTES)));
typedef struct {
    vec part[PARTS];
} jet;

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

typedef struct {
    int32_t parent, component; /* places of the parent, whose own is 0 at the root, and of a factor */
    int32_t place;             /* among the nodes that are kept; 0: a leaf */
    int32_t first, last;       /* its entries */
} node_t;

typedef struct {
    int32_t column, row;
} pair_t;

typedef struct {
    int64_t n_atoms, channels, n_components, n_columns, n_rows, n_species;
    int64_t n_nodes, n_kept, n_pairs;
    const node_t *nodes;      /* parents before children, the root not among them */
    const int32_t *entries;   /* numbers of pairs */
    const REAL *coefficients; /* of the entries */
    const pair_t *pairs;
    const int64_t *species;
    const REAL *inputs[1 + DIRECTIONS]; /* x and the directions */
    const REAL *weights, *z;            /* z may be NULL where only its partial is wanted */
    REAL *to_inputs[1 + DIRECTIONS];    /* partials, NULL if not wanted */
    REAL *to_weights, *to_z;
} form_t;

INLINE vec get(const REAL *from, int64_t count) {
    vec value = {0};
    if (count >= WIDTH)
        memcpy(&value, from, sizeof(vec));
    else
        memcpy(&value, from, count * sizeof(REAL));
    return value;
}

INLINE void put(REAL *to, vec value, int64_t count) {
    if (count >= WIDTH)
        memcpy(to, &value, sizeof(vec));
    else
        memcpy(to, &value, count * sizeof(REAL));
}

INLINE void add_product(jet *sum, const jet *a, const jet *b) {
    UNROLL for (int s = 0; s < PARTS; s++)
        UNROLL for (int t = 0; t < PARTS; t++)
            if ((t & ~s) == 0) sum->part[s] += a->part[t] * b->part[s ^ t];
}

INLINE void add_multiple(jet *sum, vec factor, const jet *a) {
    UNROLL for (int s = 0; s < PARTS; s++) sum->part[s] += factor * a->part[s];
}

/* The unit that goes with an input: none with x. */
INLINE int unit(int input) { return input ? 1 << (input - 1) : 0; }

typedef struct {
    jet *x, *to_x, *kept, *to_kept;
    vec *values, *slopes, *weights, *z; /* values and slopes of pairs */
} scratch_t;

/* Through the tree: values of pairs, and the way back from their slopes to x. */
INLINE void walk(const form_t *f, const scratch_t *s, const int values, const int back) {
    for (int64_t number = 0; number < f->n_nodes; number++) {
        const node_t node = f->nodes[number];
        const jet *parent = s->kept + node.parent, *x = s->x + node.component;
        if (values || node.place) {
            jet product = {{{0}}};
            add_product(&product, parent, x);
            if (node.place) s->kept[node.place] = product;
            if (values)
                for (int32_t e = node.first; e < node.last; e++)
                    s->values[f->entries[e]] += f->coefficients[e] * product.part[PARTS - 1];
        }
        if (back) {
            vec slope = {0};
            for (int32_t e = node.first; e < node.last; e++)
                slope += f->coefficients[e] * s->slopes[f->entries[e]];
            if (node.place) {
                s->to_kept[node.place].part[0] += slope;
            } else {
                add_multiple(s->to_x + node.component, slope, parent);
                add_multiple(s->to_kept + node.parent, slope, x);
            }
        }
    }
    for (int64_t number = back ? f->n_nodes : 0; number-- > 0;) {
        const node_t node = f->nodes[number];
        if (!node.place) continue;
        add_product(s->to_x + node.component, s->to_kept + node.place, s->kept + node.parent);
        add_product(s->to_kept + node.parent, s->to_kept + node.place, s->x + node.component);
    }
}

/* One atom, on the channels from c on. */
static void contract(const form_t *f, int64_t atom, int64_t c, const scratch_t *s) {
    const int64_t channels = f->channels, count = channels - c;
    const int64_t at = atom * f->n_components * channels + c;
    const int64_t at_row = atom * f->n_rows * channels + c;
    const int64_t at_column = f->species[atom] * f->n_columns * channels + c;
    int back = 0;
    for (int input = 0; input <= DIRECTIONS; input++) {
        back |= f->to_inputs[input] != NULL;
        for (int64_t i = 0; i < f->n_components; i++)
            s->x[i].part[unit(input)] = get(f->inputs[input] + at + i * channels, count);
    }
    for (int64_t q = 0; q < f->n_columns; q++)
        s->weights[q] = get(f->weights + at_column + q * channels, count);
    for (int64_t m = 0; f->z && m < f->n_rows; m++)
        s->z[m] = get(f->z + at_row + m * channels, count);
    if (back) {
        memset(s->to_x, 0, f->n_components * sizeof(jet));
        memset(s->to_kept, 0, f->n_kept * sizeof(jet));
        for (int64_t p = 0; p < f->n_pairs; p++)
            s->slopes[p] = s->weights[f->pairs[p].column] * s->z[f->pairs[p].row];
    }
    const int values = f->to_z || f->to_weights;
    if (values) memset(s->values, 0, f->n_pairs * sizeof(vec));
    if (values && back)
        walk(f, s, 1, 1);
    else if (values)
        walk(f, s, 1, 0);
    else if (back)
        walk(f, s, 0, 1);

    for (int input = 0; input <= DIRECTIONS; input++)
        for (int64_t i = 0; f->to_inputs[input] && i < f->n_components; i++)
            put(f->to_inputs[input] + at + i * channels,
                s->to_x[i].part[(PARTS - 1) ^ unit(input)], count);
    for (int64_t p = 0; p < f->n_pairs; p++) {
        const pair_t pair = f->pairs[p];
        if (f->to_z) {
            REAL *place = f->to_z + at_row + pair.row * channels;
            put(place, get(place, count) + s->weights[pair.column] * s->values[p], count);
        }
        if (f->to_weights) {
            REAL *place = f->to_weights + at_column + pair.column * channels;
            put(place, get(place, count) + s->z[pair.row] * s->values[p], count);
        }
    }
}

/* Write the partials by x and the directions, add those by w and z to their (zeroed) places.
   Returns 1 if memory ran out, 2 if an atom's species is none. Weights' gradients are sums over
   atoms: there each thread has channels of its own, elsewhere it has atoms too. */
int symmetric_partials(const form_t *f, int n_threads) {
    for (int64_t atom = 0; atom < f->n_atoms; atom++)
        if (f->species[atom] < 0 || f->species[atom] >= f->n_species) return 2;
    const int64_t n_blocks = (f->channels + WIDTH - 1) / WIDTH;
    const int64_t n_shares = f->to_weights || n_threads == 1 ? 1 : n_threads;
    const size_t jets = 2 * (f->n_components + f->n_kept);
    const size_t vecs = 2 * f->n_pairs + f->n_columns + f->n_rows;
    int failed = 0;
#pragma omp parallel num_threads(n_threads) if (n_threads > 1) reduction(| : failed)
    {
        char *memory = aligned_alloc(VECTOR_BYTES, (jets * PARTS + vecs) * sizeof(vec));
        scratch_t s;
        if (memory) {
            memset(memory, 0, (jets * PARTS + vecs) * sizeof(vec));
            s.x = (jet *)memory;
            s.to_x = s.x + f->n_components;
            s.kept = s.to_x + f->n_components;
            s.to_kept = s.kept + f->n_kept;
            s.values = (vec *)(s.to_kept + f->n_kept);
            s.slopes = s.values + f->n_pairs;
            s.weights = s.slopes + f->n_pairs;
            s.z = s.weights + f->n_columns;
            s.kept[0].part[0] += 1; /* the root: no factor yet */
        } else {
            failed = 1;
        }
#pragma omp for collapse(2) schedule(static)
        for (int64_t share = 0; share < n_shares; share++)
            for (int64_t block = 0; block < n_blocks; block++)
                for (int64_t atom = share * f->n_atoms / n_shares;
                     memory && atom < (share + 1) * f->n_atoms / n_shares; atom++)
                    contract(f, atom, block * WIDTH, &s);
        free(memory);
    }
    return failed;
}

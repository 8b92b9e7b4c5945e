/* The gated update of atoms, with products on the sphere, and its gradient by the features, some
   atoms at a time: what lies between its steps stays in the processor's cache.

   Before this file: REAL (float or double), LMAX > 0. Features are (n_atoms, N_SPH, channels);
   inside a block they lie degree by degree, (N_SPH, atoms, channels), so that a map is one product
   of matrices for each degree. Of an atom all sums are made in one order, whoever makes them. */

#include <stdlib.h>

#include "../../matrices.c"

#define N_SPH ((LMAX + 1) * (LMAX + 1))
#define AT_ONCE 24 /* atoms: every degree has rows for whole tiles */

typedef struct {
  int64_t n_atoms, channels, hidden, c_out, inside, n_points; /* inside: of products, 0: none */
  int64_t n_parts;                                            /* threads */
  const REAL *x, *grad;                                       /* grad: of the gradient */
  const REAL *first, *first_bias, *gates, *gates_bias, *second, *second_bias;
  const REAL *left, *left_bias, *right, *right_bias, *out, *out_bias, *points; /* of products */
  REAL *result;
} update_t;

typedef struct {
  matrix_t degree[LMAX + 1];
} map_t;

/* What one thread works with. */
typedef struct {
  map_t first, second, left, right, out, first_back, second_back, left_back, right_back, out_back;
  matrix_t gates, gates_back;
  REAL *x, *rows, *opened, *sigma, *left_rows, *right_rows, *grad, *to_rows, *result;
} work_t;

/* Weights (LMAX + 1, n_out, n_in), to be multiplied from the right of rows of inputs. */
static map_t pack_map(arena_t *arena, const REAL *w, int64_t n_in, int64_t n_out) {
  map_t map;
  for (int l = 0; l <= LMAX; l++)
    map.degree[l] = pack(arena, w + l * n_out * n_in, n_in, n_out, 1, n_in);
  return map;
}

/* The same for rows of gradients by the outputs. */
static map_t pack_back(arena_t *arena, const REAL *w, int64_t n_in, int64_t n_out) {
  map_t map;
  for (int l = 0; l <= LMAX; l++)
    map.degree[l] = pack(arena, w + l * n_out * n_in, n_out, n_in, n_in, 1);
  return map;
}

static void prepare(const update_t *update, arena_t *arena, work_t *work, int back) {
  int64_t channels = update->channels, hidden = update->hidden, inside = update->inside;
  int64_t c_out = update->c_out, opened = LMAX * hidden;
  work->first = pack_map(arena, update->first, channels, hidden);
  work->gates = pack(arena, update->gates, channels, opened, 1, channels);
  if (back) {
    work->first_back = pack_back(arena, update->first, channels, hidden);
    work->gates_back = pack(arena, update->gates, opened, channels, channels, 1);
    work->second_back = pack_back(arena, update->second, hidden, c_out);
  } else
    work->second = pack_map(arena, update->second, hidden, c_out);
  if (inside) {
    work->left = pack_map(arena, update->left, channels, inside);
    work->right = pack_map(arena, update->right, channels, inside);
    if (back) {
      work->left_back = pack_back(arena, update->left, channels, inside);
      work->right_back = pack_back(arena, update->right, channels, inside);
      work->out_back = pack_back(arena, update->out, inside, c_out);
    } else
      work->out = pack_map(arena, update->out, inside, c_out);
  }
  int64_t widest = hidden > inside ? hidden : inside;
  REAL **of_degrees[] = {&work->x,    &work->rows,    &work->left_rows, &work->right_rows,
                         &work->grad, &work->to_rows, &work->result};
  int64_t widths[] = {channels, hidden, inside, inside, c_out, widest, back ? channels : c_out};
  for (int i = 0; i < 7; i++) *of_degrees[i] = take(arena, AT_ONCE * N_SPH * widths[i]);
  work->opened = take(arena, AT_ONCE * opened);
  work->sigma = take(arena, AT_ONCE * (opened + hidden));
}

/* to = rows W + bias, or to += rows W; the bias, on l = 0, may be null. */
static void map(const map_t *map, const REAL *rows, int64_t n_in, const REAL *bias, int add,
                REAL *to, int64_t n_out, int64_t n) {
  for (int l = 0; l <= LMAX; l++) {
    REAL *own = to + l * l * n * n_out;
    const REAL *start = add ? own : (l ? 0 : bias);
    multiply((left_t){rows + l * l * n * n_in, n_in, 1}, map->degree + l, start, add ? n_out : 0,
             own, n_out, (2 * l + 1) * n);
  }
}

/* Features of n atoms to rows of degrees; `back` the other way. */
static void by_degrees(const REAL *from, REAL *to, int64_t width, int64_t n, int back) {
  for (int64_t a = 0; a < n; a++)
    for (int64_t i = 0; i < N_SPH; i++) {
      int64_t of_atom = (a * N_SPH + i) * width, of_degree = (i * n + a) * width;
      memcpy(to + (back ? of_atom : of_degree), from + (back ? of_degree : of_atom),
             width * sizeof(REAL));
    }
}

/* V is a vector or REAL. Values of left and right at points of the sphere are multiplied, and the
   product's coefficients replace left; with `grad`, those of the product, the gradients replace
   both. Rows are `stride` apart. */
#define ON_SPHERE(V)                                                                              \
  INLINE V at_point_##V(const REAL *point, const V *rows) {                                       \
    V value = point[0] * rows[0];                                                                 \
    UNROLL for (int i = 1; i < N_SPH; i++) value += point[i] * rows[i];                           \
    return value;                                                                                 \
  }                                                                                               \
  INLINE void rows_of_##V(const REAL *from, int64_t stride, V *rows) {                            \
    UNROLL for (int i = 0; i < N_SPH; i++) rows[i] = *(const V *)(from + i * stride);             \
  }                                                                                               \
  INLINE void add_point_##V(const REAL *point, V value, V *sums) {                                \
    UNROLL for (int i = 0; i < N_SPH; i++) sums[i] += point[i] * value;                           \
  }                                                                                               \
  INLINE void write_##V(const V *sums, REAL *to, int64_t stride) {                                \
    UNROLL for (int i = 0; i < N_SPH; i++) *(V *)(to + i * stride) = sums[i];                     \
  }                                                                                               \
  INLINE void on_sphere_##V(const REAL *points, int64_t n_points, REAL *left, REAL *right,        \
                            const REAL *grad, int64_t stride) {                                   \
    V one[N_SPH], other[N_SPH], pull[N_SPH], to_one[N_SPH] = {0}, to_other[N_SPH] = {0};          \
    rows_of_##V(left, stride, one);                                                               \
    rows_of_##V(right, stride, other);                                                            \
    if (grad) rows_of_##V(grad, stride, pull);                                                    \
    for (const REAL *end = points + n_points * N_SPH; points < end; points += N_SPH) {            \
      V here = at_point_##V(points, one), there = at_point_##V(points, other);                    \
      if (!grad) {                                                                                \
        add_point_##V(points, here * there, to_one);                                              \
        continue;                                                                                 \
      }                                                                                           \
      V along = at_point_##V(points, pull);                                                       \
      add_point_##V(points, there * along, to_one);                                               \
      add_point_##V(points, here * along, to_other);                                              \
    }                                                                                             \
    write_##V(to_one, left, stride);                                                              \
    if (grad) write_##V(to_other, right, stride);                                                 \
  }

ON_SPHERE(LANES)
ON_SPHERE(REAL)

static void products(const update_t *update, const work_t *work, const REAL *grad, int64_t n) {
  int64_t size = n * update->inside, c = 0;
#define AT_CHANNEL update->points, update->n_points, work->left_rows + c, work->right_rows + c
  for (; c + N_LANES <= size; c += N_LANES) {
    if (grad) on_sphere_LANES(AT_CHANNEL, grad + c, size);
    else on_sphere_LANES(AT_CHANNEL, 0, size);
  }
  for (; c < size; c++) on_sphere_REAL(AT_CHANNEL, grad ? grad + c : 0, size);
}

/* Rows before the gate, the gates, their sigmoids and behind them those of l = 0, and the factors of
   products. */
static void before_gate(const update_t *update, const work_t *work, int64_t n) {
  int64_t channels = update->channels, hidden = update->hidden, opened = LMAX * hidden;
  map(&work->first, work->x, channels, update->first_bias, 0, work->rows, hidden, n);
  product(work->x, channels, &work->gates, update->gates_bias, work->opened, opened, n);
  sigmoids(work->opened, opened, work->sigma, opened, n);
  sigmoids(work->rows, hidden, work->sigma + n * opened, hidden, n);
  if (!update->inside) return;
  map(&work->left, work->x, channels, update->left_bias, 0, work->left_rows, update->inside, n);
  map(&work->right, work->x, channels, update->right_bias, 0, work->right_rows, update->inside, n);
}

static void gate(const work_t *work, int64_t hidden, int64_t n) {
  REAL *rows = work->rows;
  const REAL *own = work->sigma + n * LMAX * hidden;
  EACH(n * hidden) rows[c] *= own[c];
  for (int l = 1; l <= LMAX; l++)
    for (int64_t i = l * l; i < (l + 1) * (l + 1); i++)
      for (int64_t a = 0; a < n; a++) {
        REAL *row = rows + (i * n + a) * hidden;
        const REAL *by = work->sigma + (a * LMAX + l - 1) * hidden;
        EACH(hidden) row[c] *= by[c];
      }
}

/* The gradients by what the gate was given replace `grad`, that by its values, and the gates. */
static void gate_gradient(const work_t *work, REAL *grad, int64_t hidden, int64_t n) {
  const REAL *rows = work->rows, *own = work->sigma + n * LMAX * hidden;
  EACH(n * hidden) grad[c] *= own[c] * (1 + rows[c] * (1 - own[c]));
  for (int64_t a = 0; a < n; a++)
    for (int l = 1; l <= LMAX; l++) {
      const REAL *by = work->sigma + (a * LMAX + l - 1) * hidden;
      REAL *into = work->opened + (a * LMAX + l - 1) * hidden;
      EACH(hidden) into[c] = 0;
      for (int64_t i = l * l; i < (l + 1) * (l + 1); i++) {
        const REAL *row = rows + (i * n + a) * hidden;
        REAL *pull = grad + (i * n + a) * hidden;
        EACH(hidden) {
          into[c] += row[c] * pull[c];
          pull[c] *= by[c];
        }
      }
      EACH(hidden) into[c] *= by[c] * (1 - by[c]);
    }
}

static void block_value(const update_t *update, const work_t *work, int64_t n) {
  int64_t hidden = update->hidden, c_out = update->c_out, inside = update->inside;
  before_gate(update, work, n);
  gate(work, hidden, n);
  map(&work->second, work->rows, hidden, update->second_bias, 0, work->result, c_out, n);
  if (!inside) return;
  products(update, work, 0, n);
  for (int64_t a = 0; update->out_bias && a < n; a++)
    EACH(c_out) work->result[a * c_out + c] += update->out_bias[c];
  map(&work->out, work->left_rows, inside, 0, 1, work->result, c_out, n);
}

static void block_gradient(const update_t *update, const work_t *work, int64_t n) {
  int64_t channels = update->channels, hidden = update->hidden, inside = update->inside;
  int64_t c_out = update->c_out;
  before_gate(update, work, n);
  map(&work->second_back, work->grad, c_out, 0, 0, work->to_rows, hidden, n);
  gate_gradient(work, work->to_rows, hidden, n);
  map(&work->first_back, work->to_rows, hidden, 0, 0, work->result, channels, n);
  multiply((left_t){work->opened, LMAX * hidden, 1}, &work->gates_back, work->result, channels,
           work->result, channels, n);
  if (!inside) return;
  map(&work->out_back, work->grad, c_out, 0, 0, work->to_rows, inside, n);
  products(update, work, work->to_rows, n);
  map(&work->left_back, work->left_rows, inside, 0, 1, work->result, channels, n);
  map(&work->right_back, work->right_rows, inside, 0, 1, work->result, channels, n);
}

/* One thread's part of the atoms. Returns 0 if memory ran out. */
static int run(const update_t *update, int64_t first, int64_t stop, int back) {
  arena_t arena = {0, 0};
  work_t work;
  int64_t channels = update->channels, c_out = update->c_out, made = back ? channels : c_out;
  prepare(update, &arena, &work, back);
  arena.memory = aligned_alloc(64, arena.used * sizeof(REAL) + 64);
  if (!arena.memory) return 0;
  arena.used = 0;
  prepare(update, &arena, &work, back);
  for (int64_t a = first; a < stop; a += AT_ONCE) {
    int64_t n = stop - a < AT_ONCE ? stop - a : AT_ONCE;
    by_degrees(update->x + a * N_SPH * channels, work.x, channels, n, 0);
    if (back) {
      by_degrees(update->grad + a * N_SPH * c_out, work.grad, c_out, n, 0);
      block_gradient(update, &work, n);
    } else
      block_value(update, &work, n);
    by_degrees(work.result, update->result + a * N_SPH * made, made, n, 1);
  }
  free(arena.memory);
  return 1;
}

static int run_parts(const update_t *update, int back) {
  int64_t n_parts = update->n_parts, n = update->n_atoms;
  int failed = 0;
#pragma omp parallel for num_threads(n_parts) schedule(static, 1) if (n_parts > 1) reduction(| : failed)
  for (int64_t part = 0; part < n_parts; part++)
    failed |= !run(update, part * n / n_parts, (part + 1) * n / n_parts, back);
  return !failed;
}

/* Both write the result and return 0 where memory ran out. */
int update_value(const update_t *update) { return run_parts(update, 0); }
int update_gradient(const update_t *update) { return run_parts(update, 1); }

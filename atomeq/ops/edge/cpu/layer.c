/* The whole eSCN edge layer, and its gradient but for those of its weights, some edges at a time:
   what lies between its steps stays in the processor's cache. Equations and names are those of
   atomeq/ops/edge/layer.py. This follows edge.c in one source. */

#include <stddef.h>
#include <stdlib.h>

#define N_ORDERS (MMAX + 1)
#define MAP_ROWS 6          /* of a tile of a product: its sums fill the registers */
#define PANEL (2 * N_LANES) /* columns of one */
#define PADDED(n) (((n) + PANEL - 1) / PANEL * PANEL)
#define SIGN_START(m, sign) (ROW_START(m) + (sign) * (LMAX + 1 - (m)))

/* A matrix (depth, columns) cut into panels of columns, zeros behind the last one. */
typedef struct {
  int64_t depth, columns;
  REAL *panels;
} matrix_t;

typedef struct {
  int64_t n_edges, n_atoms, channels, hidden, c_out, n_radial; /* n_radial: width of radial */
  int64_t at_once, n_parts;                                    /* edges of a block, threads */
  const REAL *x, *wigner;
  const int64_t *source, *target;
  const REAL *radial, *radial_weight, *radial_bias, *envelope; /* each may be null */
  const REAL *first[N_ORDERS], *second[N_ORDERS];              /* (out, in) for each order */
  REAL *y, *u;                                                 /* kept, or null */
  REAL *total;                                                 /* of the value */
  const REAL *grad;                                            /* of the gradient from here on */
  REAL *to_x, *to_turn, *to_radial, *to_envelope;              /* null if not wanted */
  const REAL *generator;                                       /* as in torque() */
  const int64_t *place, *count;
} layer_t;

/* The names and places of layer_t's fields and its size: Python's own are held to these. */
#define FIELDS(F)                                                                                 \
  F(n_edges) F(n_atoms) F(channels) F(hidden) F(c_out) F(n_radial) F(at_once) F(n_parts)          \
  F(x) F(wigner) F(source) F(target) F(radial) F(radial_weight) F(radial_bias) F(envelope)        \
  F(first) F(second) F(y) F(u) F(total) F(grad) F(to_x) F(to_turn) F(to_radial) F(to_envelope)    \
  F(generator) F(place) F(count)
#define NAME(field) #field " "
#define PLACE(field) offsetof(layer_t, field),
const char layer_names[] = FIELDS(NAME);
const int64_t layer_places[] = {FIELDS(PLACE) sizeof(layer_t)};

/* What one thread works with. */
typedef struct {
  matrix_t scale, scale_back, first[N_ORDERS], second[N_ORDERS], first_back[N_ORDERS],
      second_back[N_ORDERS];
  REAL *s, *z, *y, *sigma, *a, *u, *q, *ga, *gy, *gz, *gs;
} work_t;

/* Memory. The first pass over take() only counts. */
typedef struct {
  REAL *memory;
  int64_t used;
} arena_t;

static REAL *take(arena_t *arena, int64_t n) {
  REAL *found = arena->memory ? arena->memory + arena->used : 0;
  arena->used += (n + 15) / 16 * 16;
  return found;
}

/* Element (k, n) of the matrix is w[k * down + n * across]. */
static matrix_t pack(arena_t *arena, const REAL *w, int64_t depth, int64_t columns, int64_t down,
                     int64_t across) {
  matrix_t b = {depth, columns, take(arena, depth * PADDED(columns))};
  if (!b.panels) return b;
  for (int64_t first = 0; first < columns; first += PANEL)
    for (int64_t k = 0; k < depth; k++) {
      REAL *to = b.panels + first * depth + k * PANEL;
      for (int64_t n = first; n < first + PANEL; n++)
        *to++ = n < columns ? w[k * down + n * across] : 0;
    }
  return b;
}

INLINE void tile(int rows, int vectors, const REAL *a, int64_t a_stride, const REAL *b,
                 int64_t depth, const REAL *bias, REAL *c, int64_t c_stride) {
  LANES sum[MAP_ROWS][2];
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++) {
    sum[r][v] = (LANES){0};
    if (bias) sum[r][v] = *(const LANES *)(bias + v * N_LANES);
  }
  for (int64_t k = 0; k < depth; k++) {
    const REAL *row = b + k * PANEL;
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
      sum[r][v] += a[r * a_stride + k] * *(const LANES *)(row + v * N_LANES);
  }
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
    *(LANES *)(c + r * c_stride + v * N_LANES) = sum[r][v];
}

static void panel(int rows, int vectors, const REAL *a, int64_t a_stride, const REAL *b,
                  int64_t depth, const REAL *bias, REAL *c, int64_t c_stride) {
#define TILE(n)                                                                                   \
  case n:                                                                                         \
    if (vectors == 2) tile(n, 2, a, a_stride, b, depth, bias, c, c_stride);                       \
    else tile(n, 1, a, a_stride, b, depth, bias, c, c_stride);                                    \
    return;
  switch (rows) { TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) }
}

/* c = a b + bias; the bias may be null and is as long as the panels are. */
static void product(const REAL *a, int64_t a_stride, const matrix_t *b, const REAL *bias, REAL *c,
                    int64_t c_stride, int64_t n_rows) {
  for (int64_t n = 0; n < b->columns; n += PANEL) {
    int64_t left = b->columns - n;
    int vectors = left > N_LANES ? 2 : 1;
    const REAL *weight = b->panels + n * b->depth, *add = bias ? bias + n : 0;
    for (int64_t r = 0; r < n_rows; r += MAP_ROWS) {
      int rows = n_rows - r < MAP_ROWS ? (int)(n_rows - r) : MAP_ROWS;
      const REAL *from = a + r * a_stride;
      REAL *to = c + r * c_stride + n;
      if (left >= vectors * N_LANES) {
        panel(rows, vectors, from, a_stride, weight, b->depth, add, to, c_stride);
        continue;
      }
      REAL rest[MAP_ROWS * PANEL];
      panel(rows, vectors, from, a_stride, weight, b->depth, add, rest, PANEL);
      for (int k = 0; k < rows; k++) memcpy(to + k * c_stride, rest + k * PANEL, left * sizeof(REAL));
    }
  }
}

/* M rows, (n, N_ROWS * c_in) -> (n, n_scalars + N_ROWS * c_out). */
static void map(const matrix_t *weight, const REAL *rows, int64_t c_in, REAL *out, int64_t c_out,
                int64_t n_scalars, int64_t n) {
  int64_t width = N_ROWS * c_in, width_out = n_scalars + N_ROWS * c_out;
  product(rows, width, weight, 0, out, width_out, n);
  for (int m = 1; m <= MMAX; m++)
    for (int sign = 0; sign < 2; sign++)
      product(rows + SIGN_START(m, sign) * c_in, width, weight + m, 0,
              out + n_scalars + SIGN_START(m, sign) * c_out, width_out, n);
}

/* M^T grad. */
static void map_back(const matrix_t *weight, const REAL *grad, int64_t c_out, int64_t n_scalars,
                     REAL *rows, int64_t c_in, int64_t n) {
  int64_t width = N_ROWS * c_in, width_out = n_scalars + N_ROWS * c_out;
  product(grad, width_out, weight, 0, rows, width, n);
  for (int m = 1; m <= MMAX; m++)
    for (int sign = 0; sign < 2; sign++)
      product(grad + n_scalars + SIGN_START(m, sign) * c_out, width_out, weight + m, 0,
              rows + SIGN_START(m, sign) * c_in, width, n);
}

/* 1 / (1 + exp(-x)): exp(t) = 2^n exp(r) with |r| <= log(2) / 2, and the series of exp(r). To add
   ROUND leaves n in the last bits. */
#define IS_FLOAT (sizeof(REAL) == 4)
#define ROUND (IS_FLOAT ? (REAL)12582912.0 : (REAL)6755399441055744.0)
#define LARGEST (IS_FLOAT ? (REAL)87.0 : (REAL)708.0)
#define LOG2_HIGH (IS_FLOAT ? (REAL)0.693359375 : (REAL)0.693145751953125)
#define LOG2_LOW (IS_FLOAT ? (REAL)-2.12194440054690583e-4 : (REAL)1.42860682030941723e-6)
typedef __typeof__((LANES){0} < (LANES){0}) BITS;

INLINE LANES sigmoid_of(LANES x) {
  LANES t = -x, most = LARGEST - (LANES){0}, least = -most;
  BITS above = t > most, below = t < least; /* NaN is neither and stays */
  t = (LANES)((above & (BITS)most) | (below & (BITS)least) | (~(above | below) & (BITS)t));
  LANES shifted = t * (REAL)1.4426950408889634 + ROUND;
  LANES n = shifted - ROUND;
  LANES r = t - n * LOG2_HIGH - n * LOG2_LOW;
  LANES series = 1 - (LANES){0};
  UNROLL for (int k = IS_FLOAT ? 7 : 13; k > 0; k--) series = 1 + series * r * ((REAL)1 / k);
  BITS power = (BITS)shifted << (IS_FLOAT ? 23 : 52); /* the bits of n alone are left */
  return 1 / (1 + (LANES)((BITS)series + power));
}

static void sigmoids(const REAL *y, int64_t y_stride, REAL *sigma, int64_t width, int64_t n) {
  for (int64_t e = 0; e < n; e++) {
    const REAL *from = y + e * y_stride;
    REAL *to = sigma + e * width;
    int64_t c = 0;
    for (; c + N_LANES <= width; c += N_LANES)
      *(LANES *)(to + c) = sigmoid_of(*(const LANES *)(from + c));
    if (c < width) {
      LANES rest = {0};
      memcpy(&rest, from + c, (width - c) * sizeof(REAL));
      rest = sigmoid_of(rest);
      memcpy(to + c, &rest, (width - c) * sizeof(REAL));
    }
  }
}

#if MMAX == LMAX && LMAX > 0
/* to = -factor (<W^T rows, X_k W^T turned>) for each k. In the frame of the edge all of X is at
   hand, and the turn about the edge itself changes nothing: two generators of three are needed. */
static void torque_in_frame(const layer_t *layer, const REAL *turned, const REAL *rows,
                            const REAL *wigner, int64_t channels, const REAL *factor, REAL *to,
                            int64_t n) {
  const int own[2] = {row_of(1, 2), row_of(1, 1)}, axis[2] = {0, 2}; /* x and z of the frame */
  int64_t row_at[N_SPH];
  for (int l = 0; l <= LMAX; l++)
    for (int k = 0; k <= 2 * l; k++)
      row_at[l * l + l + (k % 2 ? (k + 1) / 2 : -(k / 2))] = row_of(l, k) * channels;
  for (int64_t e = 0; e < n; e++) {
    const REAL *left = rows + e * N_ROWS * channels, *right = turned + e * N_ROWS * channels;
    const REAL *frame = wigner + e * N_ROWS * N_SPH + 1;
    REAL by = factor ? factor[e] : 1;
    for (int j = 0; j < 2; j++) {
      LANES wide = {0};
      REAL torque = 0;
      for (int64_t g = layer->count[axis[j]]; g < layer->count[axis[j] + 1]; g++) {
        const REAL *p = left + row_at[layer->place[2 * g]];
        const REAL *q = right + row_at[layer->place[2 * g + 1]];
        LANES sum = {0};
        int64_t c = 0;
        for (; c + N_LANES <= channels; c += N_LANES)
          sum += *(const LANES *)(p + c) * *(const LANES *)(q + c);
        for (; c < channels; c++) torque += layer->generator[g] * p[c] * q[c];
        wide += layer->generator[g] * sum;
      }
      for (int v = 0; v < N_LANES; v++) torque += wide[v];
      for (int k = 0; k < 3; k++) to[3 * e + k] -= by * torque * frame[own[j] * N_SPH + k];
    }
  }
}
#endif

static void prepare(const layer_t *layer, arena_t *arena, work_t *work, int gradient) {
  int64_t c_in = 2 * layer->channels, hidden = layer->hidden, c_out = layer->c_out;
  int64_t scales = N_SCALES * c_in, n = layer->at_once;
  if (layer->radial_weight) {
    work->scale = pack(arena, layer->radial_weight, layer->n_radial, scales, 1, layer->n_radial);
    if (layer->to_radial)
      work->scale_back = pack(arena, layer->radial_weight, scales, layer->n_radial, layer->n_radial, 1);
  }
  for (int m = 0; m <= MMAX; m++) {
    int64_t degrees = LMAX + 1 - m, in = degrees * c_in, inside = degrees * hidden;
    int64_t out = inside + (m ? 0 : LMAX * hidden);
    work->first[m] = pack(arena, layer->first[m], in, out, 1, in);
    work->second[m] = pack(arena, layer->second[m], inside, degrees * c_out, 1, inside);
    if (!gradient) continue;
    work->first_back[m] = pack(arena, layer->first[m], out, in, in, 1);
    work->second_back[m] = pack(arena, layer->second[m], degrees * c_out, inside, inside, 1);
  }
  work->s = take(arena, n * PADDED(scales));
  work->z = take(arena, n * N_ROWS * c_in);
  work->y = take(arena, n * (LMAX + N_ROWS) * hidden);
  work->sigma = take(arena, n * (LMAX + 1) * hidden);
  work->a = take(arena, n * N_ROWS * hidden);
  work->u = take(arena, n * N_ROWS * c_out);
  if (!gradient) return;
  work->q = take(arena, n * N_ROWS * c_out);
  work->ga = take(arena, n * N_ROWS * hidden);
  work->gy = take(arena, n * (LMAX + N_ROWS) * hidden);
  work->gz = take(arena, n * N_ROWS * c_in);
  work->gs = take(arena, n * scales);
}

/* The radial factors of a block, or null. */
static const REAL *scale_of_block(const layer_t *layer, const work_t *work, const REAL *bias,
                                  int64_t e, int64_t n) {
  int64_t scales = N_SCALES * 2 * layer->channels;
  if (!layer->radial) return 0;
  if (!layer->radial_weight) return layer->radial + e * scales;
  product(layer->radial + e * layer->n_radial, layer->n_radial, &work->scale, bias, work->s, scales, n);
  return work->s;
}

static void block_value(const layer_t *layer, const work_t *work, const REAL *bias, int64_t e,
                        int64_t n, REAL *total) {
  int64_t channels = layer->channels, hidden = layer->hidden;
  const int64_t *ends[2] = {layer->source + e, layer->target + e};
  const REAL *wigner = layer->wigner + e * N_ROWS * N_SPH;
  int64_t width = (LMAX + N_ROWS) * hidden, width_u = N_ROWS * layer->c_out;
  REAL *y = layer->y ? layer->y + e * width : work->y;
  REAL *u = layer->u ? layer->u + e * width_u : work->u;
  const REAL *scale = scale_of_block(layer, work, bias, e, n);
  gather_rotate(layer->x, wigner, ends, 2, scale, work->z, n, channels);
  map(work->first, work->z, 2 * channels, y, hidden, LMAX * hidden, n);
  sigmoids(y, width, work->sigma, (LMAX + 1) * hidden, n);
  gate(y, work->sigma, work->a, n, hidden);
  map(work->second, work->a, hidden, u, layer->c_out, 0, n);
  rotate_scatter(u, wigner, ends + 1, 1, layer->envelope ? layer->envelope + e : 0, total, n,
                 layer->c_out);
}

/* -= factor times the torque of some atoms; `turned` are their features in the frames. */
static void add_turn(const layer_t *layer, const REAL *x, const REAL *turned, const REAL *rows,
                     const int64_t **ends, int64_t n_ends, int64_t channels, int64_t e,
                     const REAL *factor, int64_t n) {
  const REAL *wigner = layer->wigner + e * N_ROWS * N_SPH;
  REAL *to = layer->to_turn + 3 * e;
#if MMAX == LMAX && LMAX > 0
  torque_in_frame(layer, turned, rows, wigner, n_ends * channels, factor, to, n);
#else
  for (int64_t k = 0; k < n; k++, wigner += N_ROWS * N_SPH, rows += N_ROWS * n_ends * channels) {
    REAL found[3];
    const int64_t *own[2] = {ends[0] + k, n_ends > 1 ? ends[1] + k : 0};
    torque(x, rows, wigner, own, n_ends, layer->generator, layer->place, layer->count, found, 1,
           channels);
    for (int i = 0; i < 3; i++) to[3 * k + i] -= (factor ? factor[k] : 1) * found[i];
  }
#endif
}

static void block_gradient(const layer_t *layer, const work_t *work, const REAL *bias, int64_t e,
                           int64_t n, REAL *to_x) {
  int64_t channels = layer->channels, hidden = layer->hidden, c_out = layer->c_out;
  int64_t joined = 2 * channels, scales = N_SCALES * joined;
  int64_t width = (LMAX + N_ROWS) * hidden, width_u = N_ROWS * c_out;
  const int64_t *ends[2] = {layer->source + e, layer->target + e};
  const REAL *wigner = layer->wigner + e * N_ROWS * N_SPH;
  const REAL *envelope = layer->envelope ? layer->envelope + e : 0;
  const REAL *y = layer->y ? layer->y + e * width : work->y;
  const REAL *u = layer->u ? layer->u + e * width_u : work->u;
  const REAL *scale = scale_of_block(layer, work, bias, e, n);
  if (!layer->y) {
    gather_rotate(layer->x, wigner, ends, 2, scale, work->z, n, channels);
    map(work->first, work->z, joined, work->y, hidden, LMAX * hidden, n);
  }
  sigmoids(y, width, work->sigma, (LMAX + 1) * hidden, n);
  gather_rotate(layer->grad, wigner, ends + 1, 1, 0, work->q, n, c_out);
  if (!layer->u && (layer->to_envelope || layer->to_turn)) {
    gate(y, work->sigma, work->a, n, hidden);
    map(work->second, work->a, hidden, work->u, c_out, 0, n);
  }
  if (layer->to_turn) {
    memset(layer->to_turn + 3 * e, 0, 3 * n * sizeof(REAL));
    add_turn(layer, layer->grad, work->q, u, ends + 1, 1, c_out, e, envelope, n);
  }
  for (int64_t k = 0; k < n; k++) { /* df = <q, u>, and q becomes f q */
    REAL sum = 0, *q = work->q + k * width_u;
    LANES wide = {0};
    int64_t c = 0;
    for (; layer->to_envelope && c + N_LANES <= width_u; c += N_LANES)
      wide += *(LANES *)(q + c) * *(const LANES *)(u + k * width_u + c);
    for (; layer->to_envelope && c < width_u; c++) sum += q[c] * u[k * width_u + c];
    for (int v = 0; v < N_LANES; v++) sum += wide[v];
    if (layer->to_envelope) layer->to_envelope[e + k] = sum;
    if (envelope) EACH(width_u) q[c] *= envelope[k];
  }
  if (!to_x && !layer->to_turn && !layer->to_radial) return;
  map_back(work->second_back, work->q, c_out, 0, work->ga, hidden, n);
  gate_gradient(y, work->sigma, work->ga, work->gy, n, hidden);
  map_back(work->first_back, work->gy, hidden, LMAX * hidden, work->gz, joined, n);
  gather_rotate(layer->x, wigner, ends, 2, 0, work->z, n, channels);
  if (scale) {
    REAL *gs = layer->to_radial && !layer->radial_weight ? layer->to_radial + e * scales : work->gs;
    scale_gradient(work->z, scale, work->gz, gs, n, joined);
    if (layer->to_radial && layer->radial_weight)
      product(gs, scales, &work->scale_back, 0, layer->to_radial + e * layer->n_radial,
              layer->n_radial, n);
  }
  if (to_x) rotate_scatter(work->gz, wigner, ends, 2, 0, to_x, n, channels);
  if (layer->to_turn) add_turn(layer, layer->x, work->z, work->gz, ends, 2, channels, e, 0, n);
}

/* One thread's part of the edges; the sums on atoms go to `sums`. Returns 0 if memory ran out. */
static int run(const layer_t *layer, int64_t first, int64_t stop, int gradient, REAL *sums) {
  int64_t padded = PADDED(N_SCALES * 2 * layer->channels);
  arena_t arena = {0, 0};
  work_t work;
  prepare(layer, &arena, &work, gradient);
  take(&arena, padded);
  arena.memory = aligned_alloc(64, arena.used * sizeof(REAL) + 64);
  if (!arena.memory) return 0;
  arena.used = 0;
  prepare(layer, &arena, &work, gradient);
  REAL *bias = take(&arena, padded);
  memset(bias, 0, padded * sizeof(REAL));
  if (layer->radial_bias)
    memcpy(bias, layer->radial_bias, N_SCALES * 2 * layer->channels * sizeof(REAL));
  for (int64_t e = first; e < stop; e += layer->at_once) {
    int64_t n = e + layer->at_once < stop ? layer->at_once : stop - e;
    if (gradient) block_gradient(layer, &work, bias, e, n, sums);
    else block_value(layer, &work, bias, e, n, sums);
  }
  free(arena.memory);
  return 1;
}

/* Edges in as many parts as threads; the first adds to the result itself, the sums of the others
   follow in their order, so that one number of threads gives one result. */
static int run_parts(const layer_t *layer, int gradient, REAL *result, int64_t size) {
  int64_t n_parts = layer->n_parts;
  int failed = 0;
  REAL *others = 0;
  if (result && n_parts > 1) {
    others = calloc((n_parts - 1) * size, sizeof(REAL));
    if (!others) return 0;
  }
#pragma omp parallel for num_threads(n_parts) schedule(static, 1) if (n_parts > 1) reduction(| : failed)
  for (int64_t part = 0; part < n_parts; part++) {
    int64_t first = part * layer->n_edges / n_parts, stop = (part + 1) * layer->n_edges / n_parts;
    REAL *sums = result && part ? others + (part - 1) * size : result;
    failed |= !run(layer, first, stop, gradient, sums);
  }
  for (int64_t part = 1; result && part < n_parts; part++)
    for (int64_t k = 0; k < size; k++) result[k] += others[(part - 1) * size + k];
  free(others);
  return !failed;
}

/* Both add to zeros and return 0 where memory ran out. */
int layer_value(const layer_t *layer) {
  return run_parts(layer, 0, layer->total, layer->n_atoms * N_SPH * layer->c_out);
}

int layer_gradient(const layer_t *layer) {
  return run_parts(layer, 1, layer->to_x, layer->n_atoms * N_SPH * layer->channels);
}

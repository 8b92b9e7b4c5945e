/* Products of small matrices by tiles that stay in registers, memory of one thread to work in, and
   sigmoids: what layers of edges and updates of atoms share. REAL is float or double. */

#include "vectors.c"

#define MAP_ROWS 6          /* of a tile of a product: its sums fill the registers */
#define PANEL (2 * N_LANES) /* columns of one */
#define PADDED(n) (((n) + PANEL - 1) / PANEL * PANEL)

/* A matrix (depth, columns) cut into panels of columns, zeros behind the last one. */
typedef struct {
  int64_t depth, columns;
  REAL *panels;
} matrix_t;

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
static void fill(matrix_t *b, const REAL *w, int64_t down, int64_t across) {
  for (int64_t first = 0; first < b->columns; first += PANEL) {
    REAL *to = b->panels + first * b->depth;
    int64_t n = b->columns - first < PANEL ? b->columns - first : PANEL;
    for (int64_t k = 0; k < b->depth; k++, to += PANEL) {
      const REAL *from = w + k * down + first * across;
      if (across == 1 && n == PANEL) memcpy(to, from, PANEL * sizeof(REAL));
      else
        for (int64_t c = 0; c < PANEL; c++) to[c] = c < n ? from[c * across] : 0;
    }
  }
}

static matrix_t pack(arena_t *arena, const REAL *w, int64_t depth, int64_t columns, int64_t down,
                     int64_t across) {
  matrix_t b = {depth, columns, take(arena, depth * PADDED(columns))};
  if (b.panels) fill(&b, w, down, across);
  return b;
}

/* Where the left factor of a product lies: element (r, k) is a[r * row + k * column]. */
typedef struct {
  const REAL *a;
  int64_t row, column;
} left_t;

INLINE void tile(int rows, int vectors, left_t left, const REAL *b, int64_t depth,
                 const REAL *start, int64_t start_stride, REAL *c, int64_t c_stride) {
  LANES sum[MAP_ROWS][2];
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++) {
    sum[r][v] = (LANES){0};
    if (start) sum[r][v] = *(const LANES *)(start + r * start_stride + v * N_LANES);
  }
  for (int64_t k = 0; k < depth; k++) {
    const REAL *row = b + k * PANEL;
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
      sum[r][v] += left.a[r * left.row + k * left.column] * *(const LANES *)(row + v * N_LANES);
  }
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
    *(LANES *)(c + r * c_stride + v * N_LANES) = sum[r][v];
}

/* One of both strides of the left factor is 1, which the compiler is told. */
static void panel(int rows, int vectors, left_t left, const REAL *b, int64_t depth,
                  const REAL *start, int64_t start_stride, REAL *c, int64_t c_stride) {
  left_t along = {left.a, left.row, 1}, across = {left.a, 1, left.column};
#define TILE(n)                                                                                   \
  case n:                                                                                         \
    if (left.column != 1 && vectors == 2)                                                         \
      tile(n, 2, across, b, depth, start, start_stride, c, c_stride);                             \
    else if (left.column != 1)                                                                    \
      tile(n, 1, across, b, depth, start, start_stride, c, c_stride);                             \
    else if (vectors == 2) tile(n, 2, along, b, depth, start, start_stride, c, c_stride);         \
    else tile(n, 1, along, b, depth, start, start_stride, c, c_stride);                           \
    return;
  switch (rows) { TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) }
}

/* c = left b + start; start may be null, c itself, or with stride 0 one row for all. */
static void multiply(left_t left, const matrix_t *b, const REAL *start, int64_t start_stride,
                     REAL *c, int64_t c_stride, int64_t n_rows) {
  for (int64_t n = 0; n < b->columns; n += PANEL) {
    int64_t columns = b->columns - n;
    int vectors = columns > N_LANES ? 2 : 1;
    const REAL *weight = b->panels + n * b->depth;
    for (int64_t r = 0; r < n_rows; r += MAP_ROWS) {
      int rows = n_rows - r < MAP_ROWS ? (int)(n_rows - r) : MAP_ROWS;
      left_t from = {left.a + r * left.row, left.row, left.column};
      const REAL *add = start ? start + r * start_stride + n : 0;
      REAL *to = c + r * c_stride + n;
      if (columns >= vectors * N_LANES) {
        panel(rows, vectors, from, weight, b->depth, add, start_stride, to, c_stride);
        continue;
      }
      REAL rest[MAP_ROWS * PANEL] = {0};
      for (int k = 0; add && k < rows; k++)
        memcpy(rest + k * PANEL, add + k * start_stride, columns * sizeof(REAL));
      panel(rows, vectors, from, weight, b->depth, rest, PANEL, rest, PANEL);
      for (int k = 0; k < rows; k++)
        memcpy(to + k * c_stride, rest + k * PANEL, columns * sizeof(REAL));
    }
  }
}

/* c = a b + bias; the bias, one row, may be null. */
static void product(const REAL *a, int64_t a_stride, const matrix_t *b, const REAL *bias, REAL *c,
                    int64_t c_stride, int64_t n_rows) {
  multiply((left_t){a, a_stride, 1}, b, bias, 0, c, c_stride, n_rows);
}

/* 1 / (1 + exp(-x)): exp(t) = 2^n exp(r) with |r| <= log(2) / 2, and the series of exp(r). To add
   ROUND leaves n in the last bits. */
#define IS_FLOAT (sizeof(REAL) == 4)
#define ROUND (IS_FLOAT ? (REAL)12582912.0 : (REAL)6755399441055744.0)
#define LARGEST (IS_FLOAT ? (REAL)87.0 : (REAL)708.0)
#define LOG2_HIGH (IS_FLOAT ? (REAL)0.693359375 : (REAL)0.693145751953125)
#define LOG2_LOW (IS_FLOAT ? (REAL)-2.12194440054690583e-4 : (REAL)1.42860682030941723e-6)
typedef __typeof__((LANES){0} < (LANES){0}) BITS;

INLINE REAL factor_of_series(int k) { /* 1 / k! */
  REAL factor = 1;
  UNROLL for (int i = 2; i <= k; i++) factor /= i;
  return factor;
}

INLINE LANES sigmoid_of(LANES x) {
  LANES t = -x, most = LARGEST - (LANES){0}, least = -most;
  BITS above = t > most, below = t < least; /* NaN is neither and stays */
  t = (LANES)((above & (BITS)most) | (below & (BITS)least) | (~(above | below) & (BITS)t));
  LANES shifted = t * (REAL)1.4426950408889634 + ROUND;
  LANES n = shifted - ROUND;
  LANES r = t - n * LOG2_HIGH - n * LOG2_LOW;
  LANES series = factor_of_series(IS_FLOAT ? 7 : 13) - (LANES){0};
  UNROLL for (int k = IS_FLOAT ? 6 : 12; k >= 0; k--) series = factor_of_series(k) + series * r;
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

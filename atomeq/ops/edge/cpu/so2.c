/* SO(2) maps of the rows of edges: y = M x, x = M^T y and the gradient of the weights.

   Before this file: REAL (float or double), LMAX, MMAX. Rows are as in edge.c, those of y behind
   n_scalars extra outputs. Of an order m > 0 with a real weight, +m and -m are mapped alike; with a
   complex one W_1 + i W_2 three real products make the complex one: with s = x_+ + x_-,

     y_+ = W_1 s - (W_1 + W_2) x_-,   y_- = W_1 s + (W_2 - W_1) x_+,

   and M^T has -W_2 in place of W_2. Sums are made where their factors are read. A product goes by
   tiles of STRIP x PANEL results that stay in registers, over at most DEPTH terms at a time; the
   matrix lies in panels of DEPTH x PANEL that the first cache holds. */

#include <stdint.h>

#define ROW_START(m) ((m) == 0 ? 0 : (LMAX + 1) + ((m) - 1) * (2 * LMAX + 2 - (m)))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#ifdef __AVX512F__ /* 32 registers of 64 bytes */
#define WIDTH 64
#define STRIP 12
#else /* 16 of 32 bytes, or more smaller ones */
#define WIDTH 32
#define STRIP 6
#endif
typedef REAL LANES __attribute__((vector_size(WIDTH), aligned(sizeof(REAL)), may_alias));
#define N_LANES ((int64_t)(WIDTH / sizeof(REAL)))
#define PANEL (2 * N_LANES)
#define LINE ((int64_t)(64 / sizeof(REAL))) /* of a cache */
#define ROWS ((int64_t)144)                       /* of a block, in the second cache */
#define DEPTH ((int64_t)(1024 / sizeof(REAL)))    /* terms at a time */
#define N_EDGES ((int64_t)(1600 / sizeof(REAL)))  /* terms at a time of a sum over edges */
#define PARTS(n, size) (((n) + (size) - 1) / (size))
#define UP(n, step) (PARTS(n, step) * (step))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

/* A matrix with strides, or the sum or difference (sign = +-1) of two; `other` may be null. */
typedef struct {
  const REAL *one, *other;
  REAL sign;
  int64_t row, column;
} Factor;

INLINE Factor from_element(Factor f, int64_t i, int64_t k) {
  f.one += i * f.row + k * f.column;
  if (f.other) f.other += i * f.row + k * f.column;
  return f;
}
INLINE REAL element(Factor f, int64_t i, int64_t k) {
  int64_t at = i * f.row + k * f.column;
  return f.other ? f.one[at] + f.sign * f.other[at] : f.one[at];
}

/* Where a product goes, times +-1, to one place or two: added, or written if `fresh`. */
typedef struct {
  REAL *to[2];
  REAL sign[2];
  int64_t row;
  int fresh;
} Result;

/* A strip times a panel; strip[i][k * column]. */
INLINE void tile(const REAL *const *strip, int64_t column, const REAL *panel, int64_t depth,
                 LANES sum[STRIP][2]) {
  UNROLL for (int i = 0; i < STRIP; i++) sum[i][0] = sum[i][1] = (LANES){0};
  for (int64_t k = 0; k < depth; k++) {
    LANES left = *(const LANES *)(panel + k * PANEL);
    LANES right = *(const LANES *)(panel + k * PANEL + N_LANES);
    UNROLL for (int i = 0; i < STRIP; i++) {
      REAL a = strip[i][k * column];
      sum[i][0] += a * left;
      sum[i][1] += a * right;
    }
  }
}

INLINE void put(LANES sum[STRIP][2], int64_t n_rows, int64_t n_columns, Result r) {
  for (int which = 0; which < 2 && r.to[which]; which++) {
    REAL *to = r.to[which], sign = r.sign[which];
    if (n_rows >= STRIP && n_columns >= PANEL) {
      UNROLL for (int i = 0; i < STRIP; i++) UNROLL for (int v = 0; v < 2; v++) {
        LANES *at = (LANES *)(to + i * r.row + v * N_LANES);
        *at = r.fresh ? sign * sum[i][v] : *at + sign * sum[i][v];
      }
      continue;
    }
    REAL whole[STRIP][PANEL];
    UNROLL for (int i = 0; i < STRIP; i++) UNROLL for (int v = 0; v < 2; v++)
      *(LANES *)(whole[i] + v * N_LANES) = sum[i][v];
    for (int64_t i = 0; i < MIN(n_rows, STRIP); i++)
      for (int64_t j = 0; j < MIN(n_columns, PANEL); j++)
        to[i * r.row + j] = (r.fresh ? 0 : to[i * r.row + j]) + sign * whole[i][j];
  }
}

/* A block of strips times panels. The element k of row s of the strip that starts with row i is
   a[i * strip + s * row + k * column]. `ahead`: numbers of the next panel to be fetched meanwhile,
   by each strip. */
INLINE void multiply_block(const REAL *a, int64_t strip, int64_t row, int64_t column,
                           int64_t n_rows, const REAL *panels, int64_t depth, int64_t n_columns,
                           int64_t ahead, Result r) {
  for (int64_t j = 0; j < n_columns; j += PANEL)
    for (int64_t i = 0; i < n_rows; i += STRIP) {
      const REAL *next = panels + (j + PANEL) * depth + i / STRIP * ahead;
      for (int64_t k = 0; k < ahead; k += LINE) __builtin_prefetch(next + k, 0, 2);
      const REAL *rows[STRIP]; /* beyond the last one it is repeated, and not put */
      LANES sum[STRIP][2];
      Result here = r;
      UNROLL for (int s = 0; s < STRIP; s++)
        rows[s] = a + i * strip + MIN(s, n_rows - 1 - i) * row;
      for (int which = 0; which < 2 && r.to[which]; which++) {
        here.to[which] += i * r.row + j;
        if (!r.fresh)
          UNROLL for (int s = 0; s < STRIP; s++)
            __builtin_prefetch(here.to[which] + MIN(s, n_rows - 1 - i) * r.row, 1);
      }
      tile(rows, column, panels + j * depth, depth, sum);
      put(sum, n_rows - i, n_columns - j, here);
    }
}

INLINE void pack_panel(Factor f, int64_t depth, int64_t n, REAL *panel) {
  for (int64_t k = 0; k < depth; k++)
    for (int64_t c = 0; c < PANEL; c++) panel[k * PANEL + c] = c < n ? element(f, k, c) : 0;
}

/* Panels of a matrix (depth, n_columns) of contiguous rows: of each PANEL columns all elements, row
   by row. */
static void pack(Factor f, int64_t depth, int64_t n_columns, REAL *panels) {
  f.column = 1;
  for (int64_t j = 0; j < n_columns; j += PANEL) {
    Factor here = from_element(f, 0, j);
    if (n_columns - j < PANEL)
      pack_panel(here, depth, n_columns - j, panels + j * depth);
    else
      pack_panel(here, depth, PANEL, panels + j * depth);
  }
}

/* A panel (depth, n) of the transpose of rows nx apart, and `size` further on one of each other part
   of a complex weight. Some numbers of a row are read at a time; what follows in it lies in another
   page than the next row, which nothing but a prefetch foresees. */
INLINE void pack_turned(const REAL *real, const REAL *imaginary, int64_t nx, int64_t depth,
                        int64_t n, REAL *panel, int64_t size) {
  for (int64_t k0 = 0; k0 < depth; k0 += N_LANES)
    for (int64_t c = 0; c < n; c++) {
      __builtin_prefetch(real + c * nx + k0 + LINE);
      if (imaginary) __builtin_prefetch(imaginary + c * nx + k0 + LINE);
      for (int64_t k = k0; k < MIN(k0 + N_LANES, depth); k++) {
        REAL a = real[c * nx + k], *to = panel + k * PANEL + c;
        *to = a;
        if (!imaginary) continue;
        REAL b = imaginary[c * nx + k];
        to[size] = a + b;
        to[2 * size] = a - b;
      }
    }
  for (int part = 0; part < (imaginary ? 3 : 1); part++)
    for (int64_t k = 0; k < depth; k++)
      for (int64_t c = n; c < PANEL; c++) panel[part * size + k * PANEL + c] = 0;
}

/* All panels of the transpose of a weight (ny, nx), depth by depth, or of the weight itself, for
   M^T; of a complex one, W_1, W_1 + W_2 and W_1 - W_2, which is taken from y_-. */
static void pack_weight(const REAL *real, const REAL *imaginary, int64_t transposed, int64_t nx,
                        int64_t ny, REAL *panels) {
  int64_t in = transposed ? ny : nx, out = transposed ? nx : ny, size = in * UP(out, PANEL);
  Factor parts[3] = {{real, 0, 0, nx, 1}, {real, imaginary, -1, nx, 1}, {real, imaginary, 1, nx, 1}};
  for (int64_t k = 0; k < in; k += DEPTH) {
    int64_t depth = MIN(DEPTH, in - k);
    REAL *here = panels + k * UP(out, PANEL);
    if (transposed)
      for (int part = 0; part < (imaginary ? 3 : 1); part++)
        pack(from_element(parts[part], k, 0), depth, out, here + part * size);
    else
      for (int64_t j = 0; j < out; j += PANEL)
        pack_turned(real + j * nx + k, imaginary ? imaginary + j * nx + k : 0, nx, depth,
                    MIN(PANEL, out - j), here + j * depth, size);
  }
}

/* Rows of contiguous elements times a packed matrix; no more than ROWS of them. */
static void multiply(Factor x, int64_t n_rows, int64_t depth, const REAL *packed,
                     int64_t n_columns, Result r) {
  REAL sums[ROWS * DEPTH];
  for (int64_t k = 0; k < depth; k += DEPTH) {
    int64_t n = MIN(DEPTH, depth - k);
    const REAL *panels = packed + k * UP(n_columns, PANEL);
    int64_t ahead = UP(PARTS(n * PANEL, PARTS(n_rows, STRIP)), LINE);
    Factor here = from_element(x, 0, k);
    if (x.other) {
      for (int64_t i = 0; i < n_rows; i++)
        for (int64_t c = 0; c < n; c++) sums[i * DEPTH + c] = element(here, i, c);
      multiply_block(sums, DEPTH, DEPTH, 1, n_rows, panels, n, n_columns, ahead, r);
    } else
      multiply_block(here.one, x.row, x.row, 1, n_rows, panels, n, n_columns, ahead, r);
    r.fresh = 0;
  }
}

/* The sizes of a map and where the parts of an order lie. Of M^T the inputs are y. */
typedef struct {
  int64_t c_in, c_out, n_scalars;
} Sizes;
INLINE int64_t size_x(Sizes s, int m) { return (LMAX + 1 - m) * s.c_in; }
INLINE int64_t size_y(Sizes s, int m) { return (LMAX + 1 - m) * s.c_out + (m ? 0 : s.n_scalars); }
INLINE int64_t at_x(Sizes s, int m) { return ROW_START(m) * s.c_in; }
INLINE int64_t at_y(Sizes s, int m) { return m ? s.n_scalars + ROW_START(m) * s.c_out : 0; }
#define N_ROWS (ROW_START(MMAX) + (MMAX == 0 ? LMAX + 1 : 2 * (LMAX + 1 - MMAX)))

/* Numbers of a packed map, all orders taken for complex. */
int64_t packed_size(int64_t transposed, int64_t c_in, int64_t c_out, int64_t n_scalars) {
  Sizes s = {c_in, c_out, n_scalars};
  int64_t total = 0;
  for (int m = 0; m <= MMAX; m++) {
    int64_t in = transposed ? size_y(s, m) : size_x(s, m);
    int64_t out = transposed ? size_x(s, m) : size_y(s, m);
    total += (m ? 3 : 1) * in * UP(out, PANEL);
  }
  return total;
}

/* weights: of each order (size_y, size_x), or (2, size_y, size_x) where it is complex. */
void pack_map(const REAL **weights, const int64_t *is_complex, int64_t transposed, int64_t c_in,
              int64_t c_out, int64_t n_scalars, REAL *packed) {
  Sizes s = {c_in, c_out, n_scalars};
  for (int m = 0; m <= MMAX; m++) {
    int64_t nx = size_x(s, m), ny = size_y(s, m);
    int64_t out = transposed ? nx : ny, size = nx * ny / out * UP(out, PANEL);
    pack_weight(weights[m], is_complex[m] ? weights[m] + ny * nx : 0, transposed, nx, ny, packed);
    packed += (is_complex[m] ? 3 : 1) * size;
  }
}

/* y = M x, or x = M^T y. */
void map_rows(const REAL *from, const REAL *packed, const int64_t *is_complex, int64_t transposed,
              int64_t c_in, int64_t c_out, int64_t n_scalars, REAL *to, int64_t n_edges,
              int64_t n_threads) {
  Sizes s = {c_in, c_out, n_scalars};
  int64_t width_x = N_ROWS * c_in, width_y = N_ROWS * c_out + n_scalars;
  int64_t from_row = transposed ? width_y : width_x, to_row = transposed ? width_x : width_y;
  int64_t parts = UP(PARTS(n_edges, ROWS), n_threads), step = ROWS;
  if (parts) step = UP(PARTS(n_edges, parts), STRIP);
#pragma omp parallel for num_threads(n_threads) schedule(static) if (n_threads > 1)
  for (int64_t e = 0; e < n_edges; e += step) {
    const REAL *matrix = packed;
    int64_t n = MIN(step, n_edges - e);
    for (int m = 0; m <= MMAX; m++) {
      int64_t nx = size_x(s, m), ny = size_y(s, m), ax = at_x(s, m), ay = at_y(s, m);
      int64_t in = transposed ? ny : nx, out = transposed ? nx : ny;
      const REAL *plus = from + e * from_row + (transposed ? ay : ax), *minus = plus + in;
      REAL *plus_out = to + e * to_row + (transposed ? ax : ay), *minus_out = plus_out + out;
      int64_t size = in * UP(out, PANEL);
      if (m && is_complex[m]) {
        Result both = {{plus_out, minus_out}, {1, 1}, to_row, 1};
        Result one = {{plus_out, 0}, {-1, 0}, to_row, 0}, two = {{minus_out, 0}, {-1, 0}, to_row, 0};
        multiply((Factor){plus, minus, 1, from_row, 1}, n, in, matrix, out, both);
        multiply((Factor){minus, 0, 0, from_row, 1}, n, in, matrix + size, out, one);
        multiply((Factor){plus, 0, 0, from_row, 1}, n, in, matrix + 2 * size, out, two);
        matrix += 3 * size;
        continue;
      }
      for (int sign = 0; sign < (m ? 2 : 1); sign++) {
        Result one = {{sign ? minus_out : plus_out, 0}, {1, 0}, to_row, 1};
        multiply((Factor){sign ? minus : plus, 0, 0, from_row, 1}, n, in, matrix, out, one);
      }
      matrix += size;
    }
  }
}

/* Strips of y^T, (n, width): of each STRIP columns all edges, one by one. */
static void pack_strips(Factor y, int64_t n, int64_t width, REAL *strips) {
  for (int64_t i = 0; i < width; i += STRIP, strips += STRIP * n) {
    Factor here = from_element(y, 0, i);
    for (int64_t k = 0; k < n; k++)
      if (i + STRIP <= width)
        UNROLL for (int c = 0; c < STRIP; c++) strips[k * STRIP + c] = element(here, k, c);
      else
        for (int64_t c = 0; c < width - i; c++) strips[k * STRIP + c] = element(here, k, c);
  }
}

/* y^T x, a sum over the edges; panels has room for N_EDGES x UP(nx, PANEL). All threads call it. */
static void add_outer(Factor y, int64_t ny, Factor x, int64_t nx, int64_t n_edges, REAL *panels,
                      Result r) {
  int64_t parts = PARTS(n_edges, N_EDGES), depth = parts ? PARTS(n_edges, parts) : 0;
  for (int64_t e = 0; e < n_edges; e += depth) {
    int64_t n = MIN(depth, n_edges - e);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < nx; j += PANEL)
      pack(from_element(x, e, j), n, MIN(PANEL, nx - j), panels + j * n);
#pragma omp for schedule(static)
    for (int64_t o = 0; o < ny; o += ROWS) {
      REAL strips[N_EDGES * UP(ROWS, STRIP)];
      Result part = r;
      for (int which = 0; which < 2 && r.to[which]; which++) part.to[which] += o * r.row;
      pack_strips(from_element(y, e, o), n, MIN(ROWS, ny - o), strips);
      multiply_block(strips, n, 1, STRIP, MIN(ROWS, ny - o), panels, n, nx, 0, part);
    }
  }
}

/* Numbers that map_weights wants for its panels. */
int64_t panels_size(int64_t c_in) { return N_EDGES * UP((LMAX + 1) * c_in, PANEL); }

/* Adds the gradients of <y, M x>, (y_+ + i y_-)(x_+ - i x_-)^T by three products, to `into`. */
void map_weights(const REAL *rows, const REAL *grad, const int64_t *is_complex, int64_t c_in,
                 int64_t c_out, int64_t n_scalars, REAL **into, REAL *panels, int64_t n_edges,
                 int64_t n_threads) {
  Sizes s = {c_in, c_out, n_scalars};
  int64_t width_x = N_ROWS * c_in, width_y = N_ROWS * c_out + n_scalars;
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
  for (int m = 0; m <= MMAX; m++) {
    int64_t nx = size_x(s, m), ny = size_y(s, m);
    const REAL *x = rows + at_x(s, m), *x_minus = x + nx, *y = grad + at_y(s, m), *y_minus = y + ny;
    REAL *real = into[m], *imaginary = real + ny * nx;
    Factor fx = {x, 0, 0, width_x, 1}, fy = {y, 0, 0, width_y, 1};
    if (m && is_complex[m]) {
      Factor y_sum = {y, y_minus, 1, width_y, 1}, fy_minus = {y_minus, 0, 0, width_y, 1};
      Factor x_sum = {x, x_minus, 1, width_x, 1}, x_difference = {x, x_minus, -1, width_x, 1};
      Result both = {{real, imaginary}, {1, 1}, nx, 0};
      Result one = {{real, 0}, {-1, 0}, nx, 0}, two = {{imaginary, 0}, {-1, 0}, nx, 0};
      add_outer(y_sum, ny, fx, nx, n_edges, panels, both);
      add_outer(fy_minus, ny, x_difference, nx, n_edges, panels, one);
      add_outer(fy, ny, x_sum, nx, n_edges, panels, two);
      continue;
    }
    for (int sign = 0; sign < (m ? 2 : 1); sign++) {
      if (sign) fx.one = x_minus, fy.one = y_minus;
      add_outer(fy, ny, fx, nx, n_edges, panels, (Result){{real, 0}, {1, 0}, nx, 0});
    }
  }
}

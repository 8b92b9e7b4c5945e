/* Rotation of edge features into and out of their frames, the torque on them, their radial factors
   and the gate.

   Before this file: REAL (float or double), LMAX, MMAX. Features are (*, N_SPH, channels), rows
   (n_edges, N_ROWS, channels) in m-primary order, wigner (n_edges, N_ROWS, N_SPH) block diagonal in
   l. */

#include "../../vectors.c"

#define N_SPH ((LMAX + 1) * (LMAX + 1))
#define ROW_START(m) ((m) == 0 ? 0 : (LMAX + 1) + ((m) - 1) * (2 * LMAX + 2 - (m)))
#define N_ROWS (ROW_START(MMAX) + (MMAX == 0 ? LMAX + 1 : 2 * (LMAX + 1 - MMAX)))
#define N_SCALES ((MMAX + 1) * (LMAX + 1) - (MMAX * (MMAX + 1)) / 2)
#define SCALE_START(m) ((m) * (LMAX + 1) - ((m) * ((m) - 1)) / 2)

/* Rows of degree l: m = 0, then +1, -1, +2, -2, ...; 2 * min(l, MMAX) + 1 of them. */
INLINE int row_of(int l, int k) {
  int m = (k + 1) / 2;
  return ROW_START(m) + (l - m) + (k > 0 && k % 2 == 0 ? LMAX + 1 - m : 0);
}
INLINE int scale_of(int l, int k) { return SCALE_START((k + 1) / 2) + l - (k + 1) / 2; }
INLINE int n_rows_of(int l) { return 2 * (l < MMAX ? l : MMAX) + 1; }

/* V is a vector or REAL. */
#define ROTATIONS(V)                                                                              \
  INLINE void rotate_##V(const REAL *x, int64_t x_stride, const REAL *w, REAL *rows,              \
                         int64_t row_stride, const REAL *scale, int64_t scale_stride) {           \
    UNROLL for (int l = 0; l <= LMAX; l++) {                                                      \
      V in[2 * LMAX + 1];                                                                         \
      UNROLL for (int i = 0; i < 2 * l + 1; i++) in[i] = *(const V *)(x + (l * l + i) * x_stride); \
      UNROLL for (int k = 0; k < n_rows_of(l); k++) {                                             \
        const REAL *element = w + row_of(l, k) * N_SPH + l * l;                                   \
        V sum = element[0] * in[0];                                                               \
        UNROLL for (int i = 1; i < 2 * l + 1; i++) sum += element[i] * in[i];                     \
        if (scale) sum *= *(const V *)(scale + scale_of(l, k) * scale_stride);                    \
        *(V *)(rows + row_of(l, k) * row_stride) = sum;                                           \
      }                                                                                           \
    }                                                                                             \
  }                                                                                               \
  /* One degree of W^T rows. */                                                                   \
  INLINE void unrotate_##V(const REAL *rows, int64_t row_stride, const REAL *w, int l, V *lab) {  \
    V in[2 * MMAX + 1];                                                                           \
    UNROLL for (int k = 0; k < n_rows_of(l); k++)                                                 \
      in[k] = *(const V *)(rows + row_of(l, k) * row_stride);                                     \
    UNROLL for (int i = 0; i < 2 * l + 1; i++) {                                                  \
      V sum = w[row_of(l, 0) * N_SPH + l * l + i] * in[0];                                        \
      UNROLL for (int k = 1; k < n_rows_of(l); k++)                                               \
        sum += w[row_of(l, k) * N_SPH + l * l + i] * in[k];                                       \
      lab[i] = sum;                                                                               \
    }                                                                                             \
  }                                                                                               \
  INLINE void rotate_back_##V(const REAL *rows, int64_t row_stride, const REAL *w, REAL factor,   \
                              REAL *x, int64_t x_stride) {                                        \
    UNROLL for (int l = 0; l <= LMAX; l++) {                                                      \
      V lab[2 * LMAX + 1];                                                                        \
      unrotate_##V(rows, row_stride, w, l, lab);                                                  \
      UNROLL for (int i = 0; i < 2 * l + 1; i++)                                                  \
        *(V *)(x + (l * l + i) * x_stride) += factor * lab[i];                                    \
    }                                                                                             \
  }                                                                                               \
  INLINE void torque_of_lab_##V(const V *lab, const REAL *x, int64_t x_stride, const REAL *value,  \
                                const int64_t *place, const int64_t *count, V *sum) {              \
    for (int k = 0; k < 3; k++) {                                                                 \
      V torque = sum[k];                                                                          \
      for (int64_t n = count[k]; n < count[k + 1]; n++)                                           \
        torque += value[n] * lab[place[2 * n]] * *(const V *)(x + place[2 * n + 1] * x_stride);   \
      sum[k] = torque;                                                                            \
    }                                                                                             \
  }                                                                                               \
  INLINE void torque_##V(const REAL *rows, int64_t row_stride, const REAL *w, const REAL *x,      \
                         int64_t x_stride, const REAL *value, const int64_t *place,               \
                         const int64_t *count, V *sum) {                                          \
    V lab[N_SPH];                                                                                 \
    UNROLL for (int l = 0; l <= LMAX; l++)                                                        \
      unrotate_##V(rows, row_stride, w, l, lab + l * l);                                          \
    torque_of_lab_##V(lab, x, x_stride, value, place, count, sum);                                \
  }                                                                                               \
  /* Gradients of <g, s W x>: of s, written, of x, added, and of a turn, added; a null is not      \
     wanted. */                                                                                   \
  INLINE void gather_gradient_##V(const REAL *x, int64_t x_stride, const REAL *w, const REAL *g,  \
                                  int64_t row_stride, const REAL *s, REAL *to_s, REAL *to_x,      \
                                  const REAL *value, const int64_t *place, const int64_t *count,  \
                                  V *turn) {                                                      \
    V r[N_ROWS], scaled[N_ROWS], lab[N_SPH];                                                      \
    int64_t one = sizeof(V) / sizeof(REAL);                                                       \
    if (to_s) rotate_##V(x, x_stride, w, (REAL *)r, one, 0, 0);                                   \
    UNROLL for (int l = 0; l <= LMAX; l++) {                                                      \
      UNROLL for (int k = 0; k < n_rows_of(l); k++) {                                             \
        int row = row_of(l, k);                                                                   \
        int64_t at = scale_of(l, k) * row_stride;                                                 \
        V grad = *(const V *)(g + row * row_stride);                                              \
        scaled[row] = grad;                                                                       \
        if (s) scaled[row] *= *(const V *)(s + at);                                               \
        if (!to_s) continue;                                                                      \
        V product = grad * r[row];                                                                \
        if (k > 0 && k % 2 == 0) product += *(V *)(to_s + at); /* -m is added to +m */            \
        *(V *)(to_s + at) = product;                                                              \
      }                                                                                           \
      unrotate_##V((const REAL *)scaled, one, w, l, lab + l * l);                                 \
    }                                                                                             \
    if (to_x)                                                                                     \
      UNROLL for (int i = 0; i < N_SPH; i++) *(V *)(to_x + i * x_stride) += lab[i];               \
    if (turn) torque_of_lab_##V(lab, x, x_stride, value, place, count, turn);                     \
  }

ROTATIONS(LANES)
ROTATIONS(REAL)

/* index: n_sides pointers to the atoms of each edge; 0 sides: x belongs to the edges. */
void gather_rotate(const REAL *x, const REAL *wigner, const int64_t **index, int64_t n_sides,
                   const REAL *scale, REAL *rows, int64_t n_edges, int64_t channels) {
  int64_t joined = channels * (n_sides ? n_sides : 1);
  for (int64_t e = 0; e < n_edges; e++)
    for (int64_t s = 0; s < (n_sides ? n_sides : 1); s++) {
      const REAL *from = x + (n_sides ? index[s][e] : e) * N_SPH * channels;
      const REAL *w = wigner + e * N_ROWS * N_SPH;
      REAL *to = rows + e * N_ROWS * joined + s * channels;
      const REAL *by = scale ? scale + e * N_SCALES * joined + s * channels : 0;
      int64_t c = 0;
      for (; c + N_LANES <= channels; c += N_LANES)
        rotate_LANES(from + c, channels, w, to + c, joined, by ? by + c : 0, joined);
      for (; c < channels; c++)
        rotate_REAL(from + c, channels, w, to + c, joined, by ? by + c : 0, joined);
    }
}

/* Adds to total. factor is (n_edges,) or null. */
void rotate_scatter(const REAL *rows, const REAL *wigner, const int64_t **index, int64_t n_sides,
                    const REAL *factor, REAL *total, int64_t n_edges, int64_t channels) {
  int64_t joined = channels * (n_sides ? n_sides : 1);
  for (int64_t e = 0; e < n_edges; e++)
    for (int64_t s = 0; s < (n_sides ? n_sides : 1); s++) {
      REAL *to = total + (n_sides ? index[s][e] : e) * N_SPH * channels;
      const REAL *w = wigner + e * N_ROWS * N_SPH;
      const REAL *from = rows + e * N_ROWS * joined + s * channels;
      REAL f = factor ? factor[e] : 1;
      int64_t c = 0;
      for (; c + N_LANES <= channels; c += N_LANES)
        rotate_back_LANES(from + c, joined, w, f, to + c, channels);
      for (; c < channels; c++) rotate_back_REAL(from + c, joined, w, f, to + c, channels);
    }
}

/* The elements of X_k are value[n] at row place[2n], column place[2n + 1], count[k] <= n <
   count[k + 1]. */
void torque(const REAL *x, const REAL *rows, const REAL *wigner, const int64_t **index,
            int64_t n_sides, const REAL *value, const int64_t *place, const int64_t *count,
            REAL *result, int64_t n_edges, int64_t channels) {
  int64_t joined = channels * (n_sides ? n_sides : 1);
  for (int64_t e = 0; e < n_edges; e++) {
    LANES wide[3] = {{0}, {0}, {0}};
    REAL sum[3] = {0};
    const REAL *w = wigner + e * N_ROWS * N_SPH;
    for (int64_t s = 0; s < (n_sides ? n_sides : 1); s++) {
      const REAL *from = x + (n_sides ? index[s][e] : e) * N_SPH * channels;
      const REAL *row = rows + e * N_ROWS * joined + s * channels;
      int64_t c = 0;
      for (; c + N_LANES <= channels; c += N_LANES)
        torque_LANES(row + c, joined, w, from + c, channels, value, place, count, wide);
      for (; c < channels; c++)
        torque_REAL(row + c, joined, w, from + c, channels, value, place, count, sum);
    }
    for (int k = 0; k < 3; k++)
      for (int v = 0; v < N_LANES; v++) sum[k] += wide[k][v];
    memcpy(result + 3 * e, sum, sizeof sum);
  }
}

/* The same on threads, each with a part of the edges. Those of one atom that follow each other are in
   one part: their sum is made in one order, whatever the number of parts. */
typedef struct {
  int64_t first, n, row, scale, feature; /* where the part begins in each */
  const int64_t *index[2];
  const REAL *wigner;
} part_t;

static int64_t start_of(int64_t part, int64_t n_parts, const int64_t *atoms, int64_t n_edges) {
  int64_t e = part * n_edges / n_parts;
  while (atoms && 0 < e && e < n_edges && atoms[e] == atoms[e - 1]) e++;
  return e;
}

static part_t part_of(int64_t part, int64_t n_parts, const REAL *wigner, const int64_t **index,
                      int64_t n_sides, const int64_t *atoms, int64_t n_edges, int64_t channels) {
  int64_t e = start_of(part, n_parts, atoms, n_edges), joined = channels * (n_sides ? n_sides : 1);
  part_t own = {e, start_of(part + 1, n_parts, atoms, n_edges) - e, e * N_ROWS * joined,
                e * N_SCALES * joined, n_sides ? 0 : e * N_SPH * channels, {0, 0},
                wigner + e * N_ROWS * N_SPH};
  for (int64_t s = 0; s < n_sides; s++) own.index[s] = index[s] + e;
  return own;
}

#define EACH_PART                                                                                 \
  _Pragma("omp parallel for num_threads(n_parts) schedule(static, 1) if (n_parts > 1)")           \
  for (int64_t k = 0; k < n_parts; k++)

void gather_rotate_on(const REAL *x, const REAL *wigner, const int64_t **index, int64_t n_sides,
                      const REAL *scale, REAL *rows, int64_t n_edges, int64_t channels,
                      int n_parts) {
  EACH_PART {
    part_t own = part_of(k, n_parts, wigner, index, n_sides, 0, n_edges, channels);
    gather_rotate(x + own.feature, own.wigner, own.index, n_sides, scale ? scale + own.scale : 0,
                  rows + own.row, own.n, channels);
  }
}

/* Edges that are not in the order of their atoms are worked on by one thread. */
void rotate_scatter_on(const REAL *rows, const REAL *wigner, const int64_t **index,
                       int64_t n_sides, const REAL *factor, REAL *total, int64_t n_edges,
                       int64_t channels, int n_parts) {
  const int64_t *atoms = n_sides ? index[0] : 0;
  if (n_sides > 1) n_parts = 1;
  for (int64_t e = 1; atoms && n_parts > 1 && e < n_edges; e++)
    if (atoms[e] < atoms[e - 1]) n_parts = 1;
  EACH_PART {
    part_t own = part_of(k, n_parts, wigner, index, n_sides, atoms, n_edges, channels);
    rotate_scatter(rows + own.row, own.wigner, own.index, n_sides, factor ? factor + own.first : 0,
                   total + own.feature, own.n, channels);
  }
}

void torque_on(const REAL *x, const REAL *rows, const REAL *wigner, const int64_t **index,
               int64_t n_sides, const REAL *value, const int64_t *place, const int64_t *count,
               REAL *result, int64_t n_edges, int64_t channels, int n_parts) {
  EACH_PART {
    part_t own = part_of(k, n_parts, wigner, index, n_sides, 0, n_edges, channels);
    torque(x + own.feature, rows + own.row, own.wigner, own.index, n_sides, value, place, count,
           result + 3 * own.first, own.n, channels);
  }
}

/* Gradients of <g, s W G x>: to_x (added) and to_s as in gather_rotate, turn (n_edges, 3), which is
   lessened by the torque; each null if it is not wanted, s if it is 1. */
void gather_gradient(const REAL *x, const REAL *wigner, const int64_t **index, int64_t n_sides,
                     const REAL *g, const REAL *s, REAL *to_s, REAL *to_x, REAL *turn,
                     const REAL *value, const int64_t *place, const int64_t *count,
                     int64_t n_edges, int64_t channels) {
  int64_t joined = channels * n_sides;
  for (int64_t e = 0; e < n_edges; e++) {
    LANES wide[3] = {{0}, {0}, {0}};
    REAL sum[3] = {0};
    const REAL *w = wigner + e * N_ROWS * N_SPH;
    for (int64_t side = 0; side < n_sides; side++) {
      int64_t atom = index[side][e] * N_SPH * channels, scales = e * N_SCALES * joined;
#define AT(pointer, start) ((pointer) ? (pointer) + (start) + c : 0)
#define ARGUMENTS                                                                                 \
  AT(x, atom), channels, w, AT(g, e *N_ROWS *joined + side * channels), joined,                   \
      AT(s, scales + side * channels), AT(to_s, scales + side * channels), AT(to_x, atom), value, \
      place, count
      int64_t c = 0;
      for (; c + N_LANES <= channels; c += N_LANES)
        gather_gradient_LANES(ARGUMENTS, turn ? wide : 0);
      for (; c < channels; c++) gather_gradient_REAL(ARGUMENTS, turn ? sum : 0);
    }
    if (!turn) continue;
    for (int k = 0; k < 3; k++)
      for (int v = 0; v < N_LANES; v++) sum[k] += wide[k][v];
    for (int k = 0; k < 3; k++) turn[3 * e + k] -= sum[k];
  }
}

/* The radial scale. +m and -m share the factors s, one for each (l, m, channel); rows have `channels`
   numbers each. A d is a derivative along a direction. */
#define SIZE(m) ((LMAX + 1 - (m)) * channels) /* numbers of one sign of an order */
#define EACH_SIGN                                                                                 \
  for (int64_t e = 0; e < n_edges; e++)                                                           \
    for (int m = 0; m <= MMAX; m++)                                                               \
      for (int sign = 0; sign < (m ? 2 : 1); sign++)
#define AT_ROWS ((e * N_ROWS + ROW_START(m)) * channels + sign * SIZE(m))
#define AT_SCALE ((e * N_SCALES + SCALE_START(m)) * channels)

/* dz = s dr + ds r; ds may be null. */
void moved_scaled(const REAL *r, const REAL *dr, const REAL *s, const REAL *ds, REAL *dz,
                  int64_t n_edges, int64_t channels) {
  EACH_SIGN {
    const REAL *in = r + AT_ROWS, *din = dr + AT_ROWS, *by = s + AT_SCALE;
    REAL *out = dz + AT_ROWS;
    EACH(SIZE(m)) out[c] = by[c] * din[c];
    if (!ds) continue;
    const REAL *dby = ds + AT_SCALE;
    EACH(SIZE(m)) out[c] += dby[c] * in[c];
  }
}

/* z = s r. */
void scale_rows(const REAL *r, const REAL *s, REAL *z, int64_t n_edges, int64_t channels) {
  EACH_SIGN {
    const REAL *in = r + AT_ROWS, *by = s + AT_SCALE;
    REAL *out = z + AT_ROWS;
    EACH(SIZE(m)) out[c] = by[c] * in[c];
  }
}

/* gs = sum over both signs of g r, and sg = s g. */
void scale_gradient(const REAL *r, const REAL *s, const REAL *g, REAL *sg, REAL *gs,
                    int64_t n_edges, int64_t channels) {
  EACH_SIGN {
    const REAL *in = r + AT_ROWS, *by = s + AT_SCALE, *grad = g + AT_ROWS;
    REAL *out = sg + AT_ROWS, *to = gs + AT_SCALE;
    EACH(SIZE(m)) {
      to[c] = (sign ? to[c] : 0) + grad[c] * in[c];
      out[c] = by[c] * grad[c];
    }
  }
}

/* Of g = dE/dz and its derivative dg, with z = s r: sg = s g and dsg = ds g + s dg, gs = g r and
   dgs = g dr + dg r, these two summed over both signs. dg and ds may be null, dsg if both are. */
void scale_second(const REAL *r, const REAL *dr, const REAL *g, const REAL *dg, const REAL *s,
                  const REAL *ds, REAL *sg, REAL *dsg, REAL *gs, REAL *dgs, int64_t n_edges,
                  int64_t channels) {
  EACH_SIGN {
    const REAL *in = r + AT_ROWS, *din = dr + AT_ROWS, *by = s + AT_SCALE, *grad = g + AT_ROWS;
    REAL *out = sg + AT_ROWS, *to = gs + AT_SCALE, *dto = dgs + AT_SCALE;
    EACH(SIZE(m)) {
      to[c] = (sign ? to[c] : 0) + grad[c] * in[c];
      dto[c] = (sign ? dto[c] : 0) + grad[c] * din[c];
      out[c] = by[c] * grad[c];
    }
    if (!dsg) continue;
    REAL *moved_out = dsg + AT_ROWS;
    if (ds) {
      const REAL *dby = ds + AT_SCALE;
      EACH(SIZE(m)) moved_out[c] = dby[c] * grad[c];
    } else
      memset(moved_out, 0, SIZE(m) * sizeof(REAL));
    if (!dg) continue;
    const REAL *dgrad = dg + AT_ROWS;
    EACH(SIZE(m)) {
      dto[c] += dgrad[c] * in[c];
      moved_out[c] += by[c] * dgrad[c];
    }
  }
}

/* The gate. y holds LMAX * channels gates, then the rows; sigma holds the sigmoids of the gates and
   of the row l = 0. The value of l = 0 is y sigma, of a row of degree l > 0 y sigma(gate of l). */
#define EACH_CHANNEL _Pragma("GCC ivdep") for (int64_t c = 0; c < channels; c++)
#define WIDTH_Y ((LMAX + N_ROWS) * channels)
#define WIDTH_S ((LMAX + 1) * channels)

void gate(const REAL *y, const REAL *sigma, REAL *value, int64_t n_edges, int64_t channels) {
  for (int64_t e = 0; e < n_edges; e++) {
    const REAL *in = y + e * WIDTH_Y + LMAX * channels, *s = sigma + e * WIDTH_S;
    REAL *out = value + e * N_ROWS * channels;
    for (int l = 0; l <= LMAX; l++) {
      const REAL *by = s + (l ? l - 1 : LMAX) * channels;
      for (int k = 0; k < n_rows_of(l); k++) {
        int64_t row = row_of(l, k) * channels;
        EACH_CHANNEL out[row + c] = in[row + c] * by[c];
      }
    }
  }
}

/* gy = J^T g; may not alias. */
void gate_gradient(const REAL *y, const REAL *sigma, const REAL *g, REAL *gy, int64_t n_edges,
                   int64_t channels) {
  for (int64_t e = 0; e < n_edges; e++) {
    const REAL *in = y + e * WIDTH_Y + LMAX * channels, *s = sigma + e * WIDTH_S;
    const REAL *h = g + e * N_ROWS * channels;
    REAL *gates = gy + e * WIDTH_Y, *out = gates + LMAX * channels;
    const REAL *own = s + LMAX * channels;
    EACH_CHANNEL
      out[c] = h[c] * own[c] * (1 + in[c] * (1 - own[c]));
    for (int l = 1; l <= LMAX; l++) {
      const REAL *by = s + (l - 1) * channels;
      REAL *into = gates + (l - 1) * channels;
      EACH_CHANNEL into[c] = 0;
      for (int k = 0; k < n_rows_of(l); k++) {
        int64_t row = row_of(l, k) * channels;
        EACH_CHANNEL {
          out[row + c] = h[row + c] * by[c];
          into[c] += h[row + c] * in[row + c];
        }
      }
      EACH_CHANNEL into[c] *= by[c] * (1 - by[c]);
    }
  }
}

/* dvalue = J dy and d2 = d/dy <dy, J^T g>. */
void gate_second(const REAL *y, const REAL *sigma, const REAL *dy, const REAL *g, REAL *dvalue,
                 REAL *d2, int64_t n_edges, int64_t channels) {
  for (int64_t e = 0; e < n_edges; e++) {
    const REAL *in = y + e * WIDTH_Y + LMAX * channels, *s = sigma + e * WIDTH_S;
    const REAL *dgates = dy + e * WIDTH_Y, *din = dgates + LMAX * channels;
    const REAL *h = g + e * N_ROWS * channels, *own = s + LMAX * channels;
    REAL *out = dvalue + e * N_ROWS * channels;
    REAL *gates = d2 + e * WIDTH_Y, *curved = gates + LMAX * channels;
    EACH_CHANNEL {
      REAL p = own[c], slope = p * (1 - p);
      out[c] = din[c] * p * (1 + in[c] * (1 - p));
      curved[c] = h[c] * din[c] * slope * (2 + in[c] * (1 - 2 * p));
    }
    for (int l = 1; l <= LMAX; l++) {
      const REAL *by = s + (l - 1) * channels, *moved = dgates + (l - 1) * channels;
      REAL *into = gates + (l - 1) * channels;
      EACH_CHANNEL into[c] = 0;
      for (int k = 0; k < n_rows_of(l); k++) {
        int64_t row = row_of(l, k) * channels;
        EACH_CHANNEL {
          REAL p = by[c], slope = p * (1 - p), bent = slope * (1 - 2 * p);
          out[row + c] = p * din[row + c] + slope * in[row + c] * moved[c];
          curved[row + c] = slope * moved[c] * h[row + c];
          into[c] += h[row + c] * (slope * din[row + c] + bent * in[row + c] * moved[c]);
        }
      }
    }
  }
}

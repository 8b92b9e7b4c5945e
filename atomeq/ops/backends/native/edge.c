/* Rotation of edge features into and out of their frames, the torque on them, and the gate.

   Before this file: REAL (float or double), LMAX, MMAX. Features are (*, N_SPH, channels), rows
   (n_edges, N_ROWS, channels) in m-primary order, wigner (n_edges, N_ROWS, N_SPH) block diagonal in
   l. Channels are worked on in tiles that stay in registers. */

#include <stdint.h>
#include <string.h>

#define N_SPH ((LMAX + 1) * (LMAX + 1))
#define ROW_START(m) ((m) == 0 ? 0 : (LMAX + 1) + ((m) - 1) * (2 * LMAX + 2 - (m)))
#define N_ROWS (ROW_START(MMAX) + (MMAX == 0 ? LMAX + 1 : 2 * (LMAX + 1 - MMAX)))
#define N_SCALES ((MMAX + 1) * (LMAX + 1) - (MMAX * (MMAX + 1)) / 2)
#define SCALE_START(m) ((m) * (LMAX + 1) - ((m) * ((m) - 1)) / 2)
#define TILE 16
#define INLINE static inline __attribute__((always_inline))

/* Rows of degree l: m = 0, then +1, -1, +2, -2, ...; 2 * min(l, MMAX) + 1 of them. */
INLINE int row_of(int l, int k) {
  int m = (k + 1) / 2;
  return ROW_START(m) + (l - m) + (k > 0 && k % 2 == 0 ? LMAX + 1 - m : 0);
}
INLINE int scale_of(int l, int k) { return SCALE_START((k + 1) / 2) + l - (k + 1) / 2; }
INLINE int n_rows_of(int l) { return 2 * (l < MMAX ? l : MMAX) + 1; }

INLINE void rotate_tile(const REAL *x, int64_t x_stride, const REAL *w, REAL *rows,
                        int64_t row_stride, const REAL *scale, int64_t scale_stride, int width) {
#pragma GCC unroll 7
  for (int l = 0; l <= LMAX; l++) {
    REAL in[2 * LMAX + 1][TILE];
    for (int i = 0; i < 2 * l + 1; i++)
      for (int c = 0; c < width; c++) in[i][c] = x[(l * l + i) * x_stride + c];
    for (int k = 0; k < n_rows_of(l); k++) {
      int row = row_of(l, k);
      REAL sum[TILE] = {0};
      for (int i = 0; i < 2 * l + 1; i++) {
        REAL factor = w[row * N_SPH + l * l + i];
        for (int c = 0; c < width; c++) sum[c] += factor * in[i][c];
      }
      REAL *out = rows + row * row_stride;
      if (scale) {
        const REAL *s = scale + scale_of(l, k) * scale_stride;
        for (int c = 0; c < width; c++) out[c] = sum[c] * s[c];
      } else
        for (int c = 0; c < width; c++) out[c] = sum[c];
    }
  }
}

INLINE void rotate_back_tile(const REAL *rows, int64_t row_stride, const REAL *w, REAL factor,
                             REAL *x, int64_t x_stride, int width) {
#pragma GCC unroll 7
  for (int l = 0; l <= LMAX; l++) {
    REAL in[2 * LMAX + 1][TILE];
    for (int k = 0; k < n_rows_of(l); k++)
      for (int c = 0; c < width; c++) in[k][c] = factor * rows[row_of(l, k) * row_stride + c];
    for (int i = 0; i < 2 * l + 1; i++) {
      REAL sum[TILE] = {0};
      for (int k = 0; k < n_rows_of(l); k++) {
        REAL element = w[row_of(l, k) * N_SPH + l * l + i];
        for (int c = 0; c < width; c++) sum[c] += element * in[k][c];
      }
      REAL *out = x + (l * l + i) * x_stride;
      for (int c = 0; c < width; c++) out[c] += sum[c];
    }
  }
}

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
      for (; c + TILE <= channels; c += TILE)
        rotate_tile(from + c, channels, w, to + c, joined, by ? by + c : 0, joined, TILE);
      if (c < channels)
        rotate_tile(from + c, channels, w, to + c, joined, by ? by + c : 0, joined, channels - c);
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
      for (; c + TILE <= channels; c += TILE)
        rotate_back_tile(from + c, joined, w, f, to + c, channels, TILE);
      if (c < channels) rotate_back_tile(from + c, joined, w, f, to + c, channels, channels - c);
    }
}

/* outer[e] = sum over channels of (W^T rows) x^T, its blocks of equal l only, the others untouched;
   blocks lie one after the other, (2l+1) x (2l+1) each. */
INLINE void outer_tile(const REAL *rows, int64_t row_stride, const REAL *w, const REAL *x,
                       int64_t x_stride, REAL *outer, int width) {
#pragma GCC unroll 7
  for (int l = 0; l <= LMAX; l++) {
    REAL lab[2 * LMAX + 1][TILE];
    for (int i = 0; i < 2 * l + 1; i++) {
      for (int c = 0; c < width; c++) lab[i][c] = 0;
      for (int k = 0; k < n_rows_of(l); k++) {
        REAL element = w[row_of(l, k) * N_SPH + l * l + i];
        const REAL *row = rows + row_of(l, k) * row_stride;
        for (int c = 0; c < width; c++) lab[i][c] += element * row[c];
      }
    }
    for (int j = 0; j < 2 * l + 1; j++) {
      const REAL *in = x + (l * l + j) * x_stride;
      for (int i = 0; i < 2 * l + 1; i++) {
        REAL part[8] = {0};
        int c = 0;
        for (; c + 8 <= width; c += 8)
          for (int v = 0; v < 8; v++) part[v] += lab[i][c + v] * in[c + v];
        for (; c < width; c++) part[0] += lab[i][c] * in[c];
        *outer += ((part[0] + part[1]) + (part[2] + part[3])) +
                  ((part[4] + part[5]) + (part[6] + part[7]));
        outer++;
      }
    }
  }
}

/* generators (n_blocks, 3), n_blocks = sum of (2l+1)^2, in the order of outer_tile: [l][j][i]. */
void torque(const REAL *x, const REAL *rows, const REAL *wigner, const int64_t **index,
            int64_t n_sides, const REAL *generators, REAL *result, int64_t n_edges,
            int64_t channels) {
  enum { N_BLOCKS = (LMAX + 1) * (2 * LMAX + 1) * (2 * LMAX + 3) / 3 };
  int64_t joined = channels * (n_sides ? n_sides : 1);
  for (int64_t e = 0; e < n_edges; e++) {
    REAL outer[N_BLOCKS];
    memset(outer, 0, sizeof outer);
    const REAL *w = wigner + e * N_ROWS * N_SPH;
    for (int64_t s = 0; s < (n_sides ? n_sides : 1); s++) {
      const REAL *from = x + (n_sides ? index[s][e] : e) * N_SPH * channels;
      const REAL *row = rows + e * N_ROWS * joined + s * channels;
      int64_t c = 0;
      for (; c + TILE <= channels; c += TILE)
        outer_tile(row + c, joined, w, from + c, channels, outer, TILE);
      if (c < channels) outer_tile(row + c, joined, w, from + c, channels, outer, channels - c);
    }
    REAL sum[3] = {0};
    for (int b = 0; b < N_BLOCKS; b++)
      for (int k = 0; k < 3; k++) sum[k] += outer[b] * generators[3 * b + k];
    memcpy(result + 3 * e, sum, sizeof sum);
  }
}

/* The gate. y holds LMAX * channels gates, then the rows; sigma holds the sigmoids of the gates and
   of the row l = 0. The value of l = 0 is y sigma, of a row of degree l > 0 y sigma(gate of l). */
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
        for (int64_t c = 0; c < channels; c++) out[row + c] = in[row + c] * by[c];
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
    for (int64_t c = 0; c < channels; c++)
      out[c] = h[c] * own[c] * (1 + in[c] * (1 - own[c]));
    for (int l = 1; l <= LMAX; l++) {
      const REAL *by = s + (l - 1) * channels;
      REAL *into = gates + (l - 1) * channels;
      for (int64_t c = 0; c < channels; c++) into[c] = 0;
      for (int k = 0; k < n_rows_of(l); k++) {
        int64_t row = row_of(l, k) * channels;
        for (int64_t c = 0; c < channels; c++) {
          out[row + c] = h[row + c] * by[c];
          into[c] += h[row + c] * in[row + c];
        }
      }
      for (int64_t c = 0; c < channels; c++) into[c] *= by[c] * (1 - by[c]);
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
    for (int64_t c = 0; c < channels; c++) {
      REAL p = own[c], slope = p * (1 - p);
      out[c] = din[c] * p * (1 + in[c] * (1 - p));
      curved[c] = h[c] * din[c] * slope * (2 + in[c] * (1 - 2 * p));
    }
    for (int l = 1; l <= LMAX; l++) {
      const REAL *by = s + (l - 1) * channels, *moved = dgates + (l - 1) * channels;
      REAL *into = gates + (l - 1) * channels;
      for (int64_t c = 0; c < channels; c++) into[c] = 0;
      for (int k = 0; k < n_rows_of(l); k++) {
        int64_t row = row_of(l, k) * channels;
        for (int64_t c = 0; c < channels; c++) {
          REAL p = by[c], slope = p * (1 - p), bent = slope * (1 - 2 * p);
          out[row + c] = p * din[row + c] + slope * in[row + c] * moved[c];
          curved[row + c] = slope * moved[c] * h[row + c];
          into[c] += h[row + c] * (slope * din[row + c] + bent * in[row + c] * moved[c]);
        }
      }
    }
  }
}

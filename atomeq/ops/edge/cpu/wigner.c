/* The Wigner rows that take edges to +y: D_l = J X(-beta) J X(-alpha), degree by degree.

   Before this file: REAL (float or double), LMAX. The tables hold, for every row of the result, the
   row of one degree that is not zero: (2 l + 1) numbers for each k = 0..l of cos(k beta), then for
   each k = 1..l of sin(k beta). */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define N_SPH ((LMAX + 1) * (LMAX + 1))
#define SQRT(x) (sizeof(REAL) == 4 ? sqrtf(x) : sqrt(x))
#define HYPOT(x, y) (sizeof(REAL) == 4 ? hypotf(x, y) : hypot(x, y)) /* x * x may underflow */

/* cos(k t) and sin(k t) for k = 0..LMAX. */
static inline void multiples(REAL c, REAL s, REAL *cosines, REAL *sines) {
  cosines[0] = 1;
  sines[0] = 0;
  for (int k = 0; k < LMAX; k++) {
    cosines[k + 1] = cosines[k] * c - sines[k] * s;
    sines[k + 1] = sines[k] * c + cosines[k] * s;
  }
}

/* Edges lie side by side, N of them at a time: each element of a table serves them all. */
#define N 16
#define EACH _Pragma("GCC ivdep") for (int e = 0; e < N; e++)

static void rows_of(const REAL (*beta_cos)[N], const REAL (*beta_sin)[N],
                    const REAL (*alpha_cos)[N], const REAL (*alpha_sin)[N], int l,
                    const REAL *table, REAL (*out)[N]) {
  int width = 2 * l + 1;
  REAL tilt[2 * LMAX + 1][N];
  for (int i = 0; i < width; i++) {
    REAL sum[N];
    EACH sum[e] = table[i] * beta_cos[0][e];
    for (int k = 1; k <= l; k++) {
      REAL c = table[k * width + i], s = table[(l + k) * width + i];
      EACH sum[e] += c * beta_cos[k][e] + s * beta_sin[k][e];
    }
    memcpy(tilt[i], sum, sizeof sum);
  }
  /* Times X(-alpha): columns +m and -m turn into each other. */
  memcpy(out[l], tilt[l], sizeof tilt[l]);
  for (int m = 1; m <= l; m++)
    EACH {
      REAL plus = tilt[l + m][e], minus = tilt[l - m][e];
      out[l + m][e] = plus * alpha_cos[m][e] - minus * alpha_sin[m][e];
      out[l - m][e] = minus * alpha_cos[m][e] + plus * alpha_sin[m][e];
    }
}

/* degrees: of each row. tables: one row of the result after the other. */
void edge_wigner(const REAL *vectors, const int64_t *degrees, const REAL *tables, int64_t n_rows,
                 REAL *wigner, int64_t n_edges, int n_parts) {
#pragma omp parallel for num_threads(n_parts) if (n_parts > 1)
  for (int64_t start = 0; start < n_edges; start += N) {
    int64_t n = n_edges - start < N ? n_edges - start : N;
    REAL beta_cos[LMAX + 1][N], beta_sin[LMAX + 1][N], alpha_cos[LMAX + 1][N],
        alpha_sin[LMAX + 1][N];
    for (int e = 0; e < N; e++) {
      const REAL *v = vectors + 3 * (start + (e < n ? e : 0));
      REAL c[LMAX + 1], s[LMAX + 1];
      REAL length = SQRT(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]);
      REAL x = v[0] / length, y = v[1] / length, z = v[2] / length;
      REAL polar = HYPOT(x, z);
      multiples(y, polar, c, s);
      for (int k = 0; k <= LMAX; k++) beta_cos[k][e] = c[k], beta_sin[k][e] = s[k];
      multiples(polar == 0 ? 1 : z / polar, polar == 0 ? 0 : x / polar, c, s);
      for (int k = 0; k <= LMAX; k++) alpha_cos[k][e] = c[k], alpha_sin[k][e] = s[k];
    }
    REAL *block = wigner + start * n_rows * N_SPH;
    memset(block, 0, sizeof(REAL) * n * n_rows * N_SPH);
    const REAL *table = tables;
    for (int64_t row = 0; row < n_rows; row++) {
      int l = degrees[row], width = 2 * l + 1;
      REAL out[2 * LMAX + 1][N];
      rows_of(beta_cos, beta_sin, alpha_cos, alpha_sin, l, table, out);
      for (int64_t e = 0; e < n; e++) {
        REAL *to = block + (e * n_rows + row) * N_SPH + l * l;
        for (int i = 0; i < width; i++) to[i] = out[i][e];
      }
      table += width * width;
    }
  }
}

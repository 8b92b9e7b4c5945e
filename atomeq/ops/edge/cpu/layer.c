/* The whole eSCN edge layer, its gradient and the gradient of that, some edges at a time: what lies
   between its steps stays in the processor's cache. Equations and names are those of
   atomeq/ops/edge/escn_conv.py and blockwise.py. */

#include <stdlib.h>

#include "../../matrices.c"
#include "edge.c"

#define SIGN_START(m, sign) (ROW_START(m) + (sign) * (LMAX + 1 - (m)))

typedef struct {
  int64_t n_edges, n_atoms, channels, hidden, c_out, n_radial; /* n_radial: width of radial */
  int64_t at_once, n_parts;                                    /* edges of a block, threads */
  const REAL *x, *wigner;
  const int64_t *source, *target;
  const REAL *radial, *radial_weight, *radial_bias, *envelope; /* each may be null */
  const REAL *first[MMAX + 1], *second[MMAX + 1];              /* (out, in) for each order */
  REAL *y, *u, *ga, *gz;                                       /* kept, or null */
  REAL *total;                                                 /* of the value */
  const REAL *grad, *also_y, *also_u;                          /* of the gradient */
  const REAL *moved_x, *moved_vectors, *moved_radial, *moved_envelope; /* of the second gradient */
  REAL *to_x, *to_vectors, *to_radial, *to_radial_weight, *to_radial_bias, *to_envelope, *to_grad,
      *to_y, *to_u;                                            /* null if not wanted */
  REAL *to_first[MMAX + 1], *to_second[MMAX + 1];
  const REAL *generator;                                       /* as in torque() */
  const int64_t *place, *count;
} layer_t;

/* What one thread works with. `moved` is a derivative along a direction, `turned` is -W T(t). */
typedef struct {
  matrix_t scale, scale_back, first[MMAX + 1], second[MMAX + 1], first_back[MMAX + 1],
      second_back[MMAX + 1];
  REAL *s, *gs, *moved_s, *moved_gs;
  REAL *r, *z, *gz, *gr, *moved_r, *moved_gr;
  REAL *y, *gy, *moved_y, *sigma, *a, *ga, *moved_a;
  REAL *u, *q, *p, *moved_u, *turned_q;
  REAL *turned, *torque, *right;
} work_t;

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

/* to += left^T right, (n_left, n_right), a sum over n edges. */
static void add_outer(const work_t *work, const REAL *left, int64_t left_stride, int64_t n_left,
                      const REAL *right, int64_t right_stride, int64_t n_right, REAL *to,
                      int64_t n) {
  matrix_t b = {n, n_right, work->right};
  fill(&b, right, right_stride, 1);
  multiply((left_t){left, 1, left_stride}, &b, to, n_right, to, n_right, n_left);
}

/* The gradients of <grad, M rows> with respect to the weights are added. */
static void add_weights(const work_t *work, const REAL *grad, int64_t c_out, int64_t n_scalars,
                        const REAL *rows, int64_t c_in, REAL *const *to, int64_t n) {
  int64_t width = N_ROWS * c_in, width_out = n_scalars + N_ROWS * c_out;
  for (int m = 0; m <= MMAX; m++)
    for (int sign = 0; sign < (m ? 2 : 1); sign++) {
      int64_t degrees = LMAX + 1 - m, extra = m ? 0 : n_scalars;
      add_outer(work, grad + (m ? n_scalars + SIGN_START(m, sign) * c_out : 0), width_out,
                extra + degrees * c_out, rows + SIGN_START(m, sign) * c_in, width, degrees * c_in,
                to[m], n);
    }
}

/* to = f a + g b of each edge; factors that are null are 1, and b may be null. */
static void combine(const REAL *a, const REAL *f, const REAL *b, const REAL *g, REAL *to,
                    int64_t width, int64_t n) {
  for (int64_t e = 0; e < n; e++, a += width, to += width) {
    REAL by = f ? f[e] : 1, other = g ? g[e] : 1;
    const REAL *more = b + e * width;
    if (b) EACH(width) to[c] = by * a[c] + other * more[c];
    else EACH(width) to[c] = by * a[c];
  }
}

/* to += <a, b> of each edge. */
static void add_dots(const REAL *a, const REAL *b, REAL *to, int64_t width, int64_t n) {
  for (int64_t e = 0; e < n; e++, a += width, b += width) {
    REAL sum = 0;
    LANES wide = {0};
    int64_t c = 0;
    for (; c + N_LANES <= width; c += N_LANES) wide += *(const LANES *)(a + c) * *(const LANES *)(b + c);
    for (; c < width; c++) sum += a[c] * b[c];
    for (int v = 0; v < N_LANES; v++) sum += wide[v];
    to[e] += sum;
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

enum { VALUE, GRADIENT, SECOND };

static void prepare(const layer_t *layer, arena_t *arena, work_t *work, int step) {
  int64_t c_in = 2 * layer->channels, hidden = layer->hidden, c_out = layer->c_out;
  int64_t scales = N_SCALES * c_in, n = layer->at_once, most = LMAX + 1;
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
    if (step == VALUE) continue;
    work->first_back[m] = pack(arena, layer->first[m], out, in, in, 1);
    work->second_back[m] = pack(arena, layer->second[m], degrees * c_out, inside, inside, 1);
  }
  REAL **scale[] = {&work->s, &work->gs, &work->moved_s, &work->moved_gs};
  REAL **in[] = {&work->z, &work->r, &work->gz, &work->gr, &work->moved_r, &work->moved_gr};
  REAL **inside[] = {&work->y, &work->gy, &work->moved_y};
  REAL **active[] = {&work->a, &work->ga, &work->moved_a};
  REAL **out[] = {&work->u, &work->q, &work->p, &work->moved_u, &work->turned_q};
#define TAKE(some, width)                                                                         \
  for (size_t i = 0; i < sizeof(some) / sizeof(*some); i++) *some[i] = take(arena, n * (width));
  TAKE(scale, PADDED(scales))
  TAKE(in, N_ROWS * c_in)
  TAKE(inside, (LMAX + N_ROWS) * hidden)
  TAKE(active, N_ROWS * hidden)
  TAKE(out, N_ROWS * c_out)
  work->sigma = take(arena, n * most * hidden);
  work->turned = take(arena, n * N_ROWS * N_SPH);
  work->torque = take(arena, 3 * n);
  int64_t right = most * c_in > most * hidden ? most * c_in : most * hidden;
  work->right = take(arena, n * PADDED(right > layer->n_radial ? right : layer->n_radial));
}

/* The radial factors of a block, or null: h A^T + bias, or h itself. */
static const REAL *scale_of_block(const layer_t *layer, const work_t *work, const REAL *radial,
                                  const REAL *bias, REAL *to, int64_t e, int64_t n) {
  int64_t scales = N_SCALES * 2 * layer->channels, width = layer->n_radial;
  if (!radial || !layer->radial_weight) return radial ? radial + e * scales : 0;
  product(radial + e * width, width, &work->scale, bias, to, scales, n);
  return to;
}

/* The gradients that come from those of the factors, gs, and of factors moved with h. */
static void radial_gradients(const layer_t *layer, const work_t *work, const REAL *gs,
                             const REAL *moved_gs, int64_t e, int64_t n) {
  int64_t scales = N_SCALES * 2 * layer->channels, width = layer->n_radial;
  if (!layer->radial_weight) return; /* gs is the result itself */
  if (layer->to_radial)
    product(gs, scales, &work->scale_back, 0, layer->to_radial + e * width, width, n);
  for (int64_t k = 0; layer->to_radial_bias && k < n; k++)
    EACH(scales) layer->to_radial_bias[c] += gs[k * scales + c];
  if (!layer->to_radial_weight) return;
  add_outer(work, gs, scales, scales, layer->radial + e * width, width, width,
            layer->to_radial_weight, n);
  if (layer->moved_radial)
    add_outer(work, moved_gs, scales, scales, layer->moved_radial + e * width, width, width,
              layer->to_radial_weight, n);
}

static void block_value(const layer_t *layer, const work_t *work, int64_t e, int64_t n) {
  int64_t channels = layer->channels, hidden = layer->hidden;
  const int64_t *ends[2] = {layer->source + e, layer->target + e};
  const REAL *wigner = layer->wigner + e * N_ROWS * N_SPH;
  int64_t width = (LMAX + N_ROWS) * hidden, width_u = N_ROWS * layer->c_out;
  REAL *y = layer->y ? layer->y + e * width : work->y;
  REAL *u = layer->u ? layer->u + e * width_u : work->u;
  const REAL *scale = scale_of_block(layer, work, layer->radial, layer->radial_bias, work->s, e, n);
  gather_rotate(layer->x, wigner, ends, 2, scale, work->z, n, channels);
  map(work->first, work->z, 2 * channels, y, hidden, LMAX * hidden, n);
  sigmoids(y, width, work->sigma, (LMAX + 1) * hidden, n);
  gate(y, work->sigma, work->a, n, hidden);
  map(work->second, work->a, hidden, u, layer->c_out, 0, n);
  rotate_scatter(u, wigner, ends + 1, 1, layer->envelope ? layer->envelope + e : 0, layer->total,
                 n, layer->c_out);
}

#define AT_EDGE(pointer, width) ((pointer) ? (pointer) + e * (width) : 0)

/* -= factor times the torque of some atoms; `turned` are their features in the frames. */
static void add_turn(const layer_t *layer, const REAL *x, const REAL *turned, const REAL *rows,
                     const int64_t **ends, int64_t n_ends, int64_t channels, int64_t e,
                     const REAL *factor, int64_t n) {
  const REAL *wigner = layer->wigner + e * N_ROWS * N_SPH;
  REAL *to = layer->to_vectors + 3 * e;
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

static void block_gradient(const layer_t *layer, const work_t *work, int64_t e, int64_t n) {
  int64_t channels = layer->channels, hidden = layer->hidden, c_out = layer->c_out;
  int64_t joined = 2 * channels, scales = N_SCALES * joined;
  int64_t width = (LMAX + N_ROWS) * hidden, width_u = N_ROWS * c_out;
  const int64_t *ends[2] = {layer->source + e, layer->target + e};
  const REAL *wigner = layer->wigner + e * N_ROWS * N_SPH;
  const REAL *envelope = AT_EDGE(layer->envelope, 1);
  const REAL *y = layer->y ? layer->y + e * width : work->y;
  const REAL *u = layer->u ? layer->u + e * width_u : work->u;
  REAL *ga = layer->ga ? layer->ga + e * N_ROWS * hidden : work->ga;
  REAL *gz = layer->gz ? layer->gz + e * N_ROWS * joined : work->gz, *gr = gz;
  const REAL *scale = scale_of_block(layer, work, layer->radial, layer->radial_bias, work->s, e, n);
  int leaving = layer->to_envelope || layer->to_vectors;
  int inward = layer->to_x || layer->to_vectors || layer->to_radial || layer->to_radial_weight ||
               layer->to_radial_bias || *layer->to_first || layer->gz;
  if (!layer->y) {
    gather_rotate(layer->x, wigner, ends, 2, scale, work->z, n, channels);
    map(work->first, work->z, joined, work->y, hidden, LMAX * hidden, n);
  }
  sigmoids(y, width, work->sigma, (LMAX + 1) * hidden, n);
  if (*layer->to_second || (leaving && !layer->u)) gate(y, work->sigma, work->a, n, hidden);
  if (leaving && !layer->u) map(work->second, work->a, hidden, work->u, c_out, 0, n);
  gather_rotate(layer->grad, wigner, ends + 1, 1, 0, work->q, n, c_out);
  if (layer->to_vectors) add_turn(layer, layer->grad, work->q, u, ends + 1, 1, c_out, e, envelope, n);
  if (layer->to_envelope) add_dots(work->q, u, layer->to_envelope + e, width_u, n);
  if (envelope || layer->also_u)
    combine(work->q, envelope, AT_EDGE(layer->also_u, width_u), 0, work->q, width_u, n);
  if (*layer->to_second)
    add_weights(work, work->q, c_out, 0, work->a, hidden, layer->to_second, n);
  if (!inward) return;
  map_back(work->second_back, work->q, c_out, 0, ga, hidden, n);
  gate_gradient(y, work->sigma, ga, work->gy, n, hidden);
  if (layer->also_y) combine(work->gy, 0, layer->also_y + e * width, 0, work->gy, width, n);
  map_back(work->first_back, work->gy, hidden, LMAX * hidden, gz, joined, n);
  gather_rotate(layer->x, wigner, ends, 2, 0, work->r, n, channels);
  if (scale) {
    REAL *gs = layer->to_radial && !layer->radial_weight ? layer->to_radial + e * scales : work->gs;
    gr = work->gr;
    scale_gradient(work->r, scale, gz, gr, gs, n, joined);
    radial_gradients(layer, work, gs, 0, e, n);
  }
  if (layer->to_x) rotate_scatter(gr, wigner, ends, 2, 0, layer->to_x, n, channels);
  if (layer->to_vectors) add_turn(layer, layer->x, work->r, gr, ends, 2, channels, e, 0, n);
  if (!*layer->to_first) return;
  if (scale) scale_rows(work->r, scale, work->z, n, joined);
  add_weights(work, work->gy, hidden, LMAX * hidden, scale ? work->z : work->r, joined,
              layer->to_first, n);
}

/* turned = -W T(t), blocks in l as W has. */
static void turn_frames(const layer_t *layer, const REAL *wigner, const REAL *t, REAL *turned,
                        int64_t n) {
  memset(turned, 0, n * N_ROWS * N_SPH * sizeof(REAL));
  for (int64_t e = 0; e < n; e++, t += 3, wigner += N_ROWS * N_SPH, turned += N_ROWS * N_SPH)
    for (int k = 0; k < 3; k++)
      for (int64_t g = layer->count[k]; g < layer->count[k + 1]; g++) {
        int64_t from = layer->place[2 * g], to = layer->place[2 * g + 1];
        int l = 1;
        while (from >= (l + 1) * (l + 1)) l++;
        for (int i = 0; i < n_rows_of(l); i++) {
          int64_t row = row_of(l, i) * N_SPH;
          turned[row + to] -= t[k] * layer->generator[g] * wigner[row + from];
        }
      }
}

/* to_vectors -= factor times the torque <W^T rows, X G x> of some frames; `across` instead adds the
   cross product with it, of t. */
static void add_torque(const layer_t *layer, const work_t *work, const REAL *x, const REAL *rows,
                       const REAL *frames, const int64_t **ends, int64_t n_ends, int64_t channels,
                       const REAL *factor, const REAL *across, int64_t e, int64_t n) {
  REAL *to = layer->to_vectors + 3 * e;
  torque(x, rows, frames, ends, n_ends, layer->generator, layer->place, layer->count, work->torque,
         n, channels);
  for (int64_t k = 0; k < n; k++, to += 3) {
    const REAL *own = work->torque + 3 * k, *t = across + 3 * k;
    for (int i = 0, j = 1, l = 2; i < 3; i++, j = (j + 1) % 3, l = (l + 1) % 3)
      to[i] += (factor ? factor[k] : 1) * (across ? t[j] * own[l] - t[l] * own[j] : -own[i]);
  }
}

/* What second gradients add to that of the turns of some atoms' features x: from rows moved, and,
   by X_k T = T X_k + (t x X)_k, from turned ones. */
static void second_turn(const layer_t *layer, const work_t *work, const REAL *x,
                        const REAL *moved_rows, const REAL *rows, const int64_t **ends,
                        int64_t n_ends, int64_t channels, const REAL *factor, int64_t e,
                        int64_t n) {
  const REAL *wigner = layer->wigner + e * N_ROWS * N_SPH, *t = AT_EDGE(layer->moved_vectors, 3);
  if (moved_rows)
    add_torque(layer, work, x, moved_rows, wigner, ends, n_ends, channels, 0, 0, e, n);
  if (!t) return;
  add_torque(layer, work, x, rows, work->turned, ends, n_ends, channels, factor, 0, e, n);
  add_torque(layer, work, x, rows, wigner, ends, n_ends, channels, factor, t, e, n);
}

/* The gradients that stem from the second map and the way back. */
static void second_outputs(const layer_t *layer, const work_t *work, int64_t e, int64_t n) {
  int64_t c_out = layer->c_out, width = N_ROWS * c_out;
  const int64_t *ends[1] = {layer->target + e};
  const REAL *wigner = layer->wigner + e * N_ROWS * N_SPH, *u = layer->u + e * width;
  const REAL *envelope = AT_EDGE(layer->envelope, 1), *moved = AT_EDGE(layer->moved_envelope, 1);
  if (layer->to_u) {
    REAL *to = layer->to_u + e * width;
    if (layer->moved_vectors) combine(work->turned_q, envelope, moved ? work->q : 0, moved, to, width, n);
    else if (moved) combine(work->q, moved, 0, 0, to, width, n);
    else memset(to, 0, n * width * sizeof(REAL));
  }
  if (!layer->to_grad && !layer->to_envelope && !layer->to_vectors) return;
  map(work->second, work->moved_a, layer->hidden, work->moved_u, c_out, 0, n);
  if (layer->to_envelope) {
    add_dots(work->q, work->moved_u, layer->to_envelope + e, width, n);
    if (layer->moved_vectors) add_dots(work->turned_q, u, layer->to_envelope + e, width, n);
  }
  if (envelope || moved)
    combine(work->moved_u, envelope, moved ? u : 0, moved, work->moved_u, width, n);
  if (layer->to_grad) {
    rotate_scatter(work->moved_u, wigner, ends, 1, 0, layer->to_grad, n, c_out);
    if (layer->moved_vectors)
      rotate_scatter(u, work->turned, ends, 1, envelope, layer->to_grad, n, c_out);
  }
  if (layer->to_vectors)
    second_turn(layer, work, layer->grad, work->moved_u, u, ends, 1, c_out, envelope, e, n);
}

/* The gradients that stem from the way in. */
static void second_inputs(const layer_t *layer, const work_t *work, const REAL *gz,
                          const REAL *scale, const REAL *moved_scale, int64_t e, int64_t n) {
  int64_t channels = layer->channels, joined = 2 * channels, scales = N_SCALES * joined;
  const int64_t *ends[2] = {layer->source + e, layer->target + e};
  const REAL *wigner = layer->wigner + e * N_ROWS * N_SPH, *gr = gz, *moved_gr = 0;
  if (scale) {
    REAL *to = layer->to_radial && !layer->radial_weight ? layer->to_radial + e * scales : work->moved_gs;
    scale_second(work->r, work->moved_r, gz, 0, scale, moved_scale, work->gr,
                 moved_scale ? work->moved_gr : 0, work->gs, to, n, joined);
    radial_gradients(layer, work, to, work->gs, e, n);
    gr = work->gr;
    if (moved_scale) moved_gr = work->moved_gr;
  }
  if (layer->to_x) {
    if (moved_gr) rotate_scatter(moved_gr, wigner, ends, 2, 0, layer->to_x, n, channels);
    if (layer->moved_vectors) rotate_scatter(gr, work->turned, ends, 2, 0, layer->to_x, n, channels);
  }
  if (!layer->to_vectors) return;
  second_turn(layer, work, layer->x, moved_gr, gr, ends, 2, channels, 0, e, n);
  if (layer->moved_x)
    add_torque(layer, work, layer->moved_x, gr, wigner, ends, 2, channels, 0, 0, e, n);
}

static void block_second(const layer_t *layer, const work_t *work, int64_t e, int64_t n) {
  int64_t channels = layer->channels, hidden = layer->hidden, c_out = layer->c_out;
  int64_t joined = 2 * channels, width_r = N_ROWS * joined, width = (LMAX + N_ROWS) * hidden;
  const int64_t *ends[2] = {layer->source + e, layer->target + e};
  const REAL *wigner = layer->wigner + e * N_ROWS * N_SPH, *y = layer->y + e * width;
  const REAL *scale = scale_of_block(layer, work, layer->radial, layer->radial_bias, work->s, e, n);
  const REAL *moved = scale_of_block(layer, work, layer->moved_radial, 0, work->moved_s, e, n);
  gather_rotate(layer->x, wigner, ends, 2, 0, work->r, n, channels);
  if (layer->moved_x) gather_rotate(layer->moved_x, wigner, ends, 2, 0, work->moved_r, n, channels);
  else memset(work->moved_r, 0, n * width_r * sizeof(REAL));
  gather_rotate(layer->grad, wigner, ends + 1, 1, 0, work->q, n, c_out);
  if (layer->moved_vectors) {
    turn_frames(layer, wigner, layer->moved_vectors + 3 * e, work->turned, n);
    gather_rotate(layer->x, work->turned, ends, 2, 0, work->z, n, channels);
    combine(work->moved_r, 0, work->z, 0, work->moved_r, width_r, n);
    gather_rotate(layer->grad, work->turned, ends + 1, 1, 0, work->turned_q, n, c_out);
  }
  const REAL *z = work->moved_r; /* its derivative */
  if (scale) {
    moved_scaled(work->r, work->moved_r, scale, moved, work->z, n, joined);
    z = work->z;
  }
  map(work->first, z, joined, work->moved_y, hidden, LMAX * hidden, n);
  sigmoids(y, width, work->sigma, (LMAX + 1) * hidden, n);
  combine(work->q, AT_EDGE(layer->envelope, 1), 0, 0, work->p, N_ROWS * c_out, n);
  const REAL *ga = AT_EDGE(layer->ga, N_ROWS * hidden), *gz = AT_EDGE(layer->gz, width_r);
  if (!ga) {
    map_back(work->second_back, work->p, c_out, 0, work->ga, hidden, n);
    ga = work->ga;
  }
  gate_second(y, work->sigma, work->moved_y, ga, work->moved_a,
              layer->to_y ? layer->to_y + e * width : work->y, n, hidden);
  if (*layer->to_second)
    add_weights(work, work->p, c_out, 0, work->moved_a, hidden, layer->to_second, n);
  second_outputs(layer, work, e, n);
  gate_gradient(y, work->sigma, ga, work->gy, n, hidden);
  if (*layer->to_first)
    add_weights(work, work->gy, hidden, LMAX * hidden, z, joined, layer->to_first, n);
  if (!gz) {
    map_back(work->first_back, work->gy, hidden, LMAX * hidden, work->gz, joined, n);
    gz = work->gz;
  }
  second_inputs(layer, work, gz, scale, moved, e, n);
}

/* One thread's part of the edges. Returns 0 if memory ran out. */
static int run(const layer_t *layer, int64_t first, int64_t stop, int step) {
  arena_t arena = {0, 0};
  work_t work;
  prepare(layer, &arena, &work, step);
  arena.memory = aligned_alloc(64, arena.used * sizeof(REAL) + 64);
  if (!arena.memory) return 0;
  arena.used = 0;
  prepare(layer, &arena, &work, step);
  for (int64_t e = first; e < stop; e += layer->at_once) {
    int64_t n = e + layer->at_once < stop ? layer->at_once : stop - e;
    if (step == VALUE) block_value(layer, &work, e, n);
    else if (step == GRADIENT) block_gradient(layer, &work, e, n);
    else block_second(layer, &work, e, n);
  }
  free(arena.memory);
  return 1;
}

/* What is summed over edges, and how many numbers each sum has. */
#define N_SUMS (5 + 2 * (MMAX + 1))
typedef struct {
  REAL **to;
  int64_t size;
} sum_t;

static void sums_of(layer_t *layer, sum_t sums[N_SUMS]) {
  int64_t joined = 2 * layer->channels, scales = N_SCALES * joined, n = layer->n_atoms * N_SPH;
  sum_t own[] = {{&layer->total, n * layer->c_out},
                 {&layer->to_x, n * layer->channels},
                 {&layer->to_grad, n * layer->c_out},
                 {&layer->to_radial_weight, scales * layer->n_radial},
                 {&layer->to_radial_bias, scales}};
  memcpy(sums, own, sizeof own);
  for (int m = 0; m <= MMAX; m++) {
    int64_t degrees = LMAX + 1 - m, inside = (degrees + (m ? 0 : LMAX)) * layer->hidden;
    sums[5 + m] = (sum_t){&layer->to_first[m], inside * degrees * joined};
    sums[5 + MMAX + 1 + m] =
        (sum_t){&layer->to_second[m], degrees * layer->c_out * degrees * layer->hidden};
  }
}

/* Edges in as many parts as threads; the first adds to the results themselves, the sums of the
   others follow in their order, so that one number of threads gives one result. */
static int run_parts(const layer_t *given, int step) {
  layer_t layer = *given;
  sum_t sums[N_SUMS];
  int64_t n_parts = layer.n_parts, size = 0;
  int failed = 0;
  REAL *others = 0;
  sums_of(&layer, sums);
  for (int i = 0; i < N_SUMS; i++) size += *sums[i].to ? sums[i].size : 0;
  if (n_parts > 1 && !(others = calloc((n_parts - 1) * size + 1, sizeof(REAL)))) return 0;
#pragma omp parallel for num_threads(n_parts) schedule(static, 1) if (n_parts > 1) reduction(| : failed)
  for (int64_t part = 0; part < n_parts; part++) {
    int64_t first = part * layer.n_edges / n_parts, stop = (part + 1) * layer.n_edges / n_parts;
    layer_t own = layer;
    REAL *free_place = others + (part - 1) * size;
    sum_t own_sums[N_SUMS];
    sums_of(&own, own_sums);
    for (int i = 0; part && i < N_SUMS; i++)
      if (*own_sums[i].to) {
        *own_sums[i].to = free_place;
        free_place += own_sums[i].size;
      }
    failed |= !run(&own, first, stop, step);
  }
  REAL *from = others;
  for (int64_t part = 1; part < n_parts; part++)
    for (int i = 0; i < N_SUMS; i++)
      for (int64_t k = 0; *sums[i].to && k < sums[i].size; k++) (*sums[i].to)[k] += *from++;
  free(others);
  return !failed;
}

/* All add to zeros and return 0 where memory ran out. */
int layer_value(const layer_t *layer) { return run_parts(layer, VALUE); }
int layer_gradient(const layer_t *layer) { return run_parts(layer, GRADIENT); }
int layer_second(const layer_t *layer) { return run_parts(layer, SECOND); }

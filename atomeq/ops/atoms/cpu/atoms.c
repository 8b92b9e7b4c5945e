/* Normalisation of the features of atoms, (n_atoms, n_sph, channels). REAL is float or double. An
   atom is worked on by one thread. */

#include <math.h>
#include <stdint.h>

static REAL mean(const REAL *x, int64_t n) {
    REAL sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < n; c++) sum += x[c];
    return sum / n;
}

/* One over the root mean square of an atom, of which ``shift`` is taken off l = 0. */
static REAL inverse_norm(const REAL *x, REAL shift, int64_t lmax, int64_t n, REAL epsilon) {
    REAL total = 0;
    for (int64_t l = 0; l <= lmax; l++) {
        REAL sum = 0;
        const REAL *rows = x + l * l * n, off = l ? 0 : shift;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < (2 * l + 1) * n; k++) sum += (rows[k] - off) * (rows[k] - off);
        total += sum / ((2 * l + 1) * n);
    }
    return 1 / (REAL)sqrt(total / (lmax + 1) + epsilon);
}

/* ``bias`` may be NULL; the mean of l = 0 is then kept. */
void norm(const REAL *x, const REAL *weight, const REAL *bias, int64_t n_atoms, int64_t lmax,
          int64_t n, double epsilon, REAL *result, int n_parts) {
    const int64_t size = (lmax + 1) * (lmax + 1) * n;
#pragma omp parallel for num_threads(n_parts) if (n_parts > 1)
    for (int64_t a = 0; a < n_atoms; a++) {
        const REAL *own = x + a * size;
        REAL *out = result + a * size;
        const REAL shift = bias ? mean(own, n) : 0;
        const REAL scale = inverse_norm(own, shift, lmax, n, epsilon);
        for (int64_t l = 0; l <= lmax; l++)
            for (int64_t row = l * l; row < (l + 1) * (l + 1); row++)
                for (int64_t c = 0; c < n; c++)
                    out[row * n + c] = own[row * n + c] * scale * weight[l * n + c];
        if (bias)
            for (int64_t c = 0; c < n; c++) out[c] = (own[c] - shift) * scale * weight[c] + bias[c];
    }
}

/* With v the centred features, s the scale, N = (lmax + 1) (2l + 1) n and h = w g

       dE/dv = s h - s^3 <h, v> v / N,

   of which the mean over the channels of l = 0 is taken off where they are centred. */
void norm_gradient(const REAL *x, const REAL *weight, const REAL *grad, int centred, int64_t n_atoms,
                   int64_t lmax, int64_t n, double epsilon, REAL *result, int n_parts) {
    const int64_t size = (lmax + 1) * (lmax + 1) * n;
#pragma omp parallel for num_threads(n_parts) if (n_parts > 1)
    for (int64_t a = 0; a < n_atoms; a++) {
        const REAL *own = x + a * size, *pull = grad + a * size;
        REAL *out = result + a * size;
        const REAL shift = centred ? mean(own, n) : 0;
        const REAL scale = inverse_norm(own, shift, lmax, n, epsilon);
        REAL product = 0;
        for (int64_t l = 0; l <= lmax; l++) {
            const REAL off = l ? 0 : shift;
            for (int64_t row = l * l; row < (l + 1) * (l + 1); row++) {
#pragma omp simd reduction(+ : product)
                for (int64_t c = 0; c < n; c++)
                    product += pull[row * n + c] * weight[l * n + c] * (own[row * n + c] - off);
            }
        }
        for (int64_t l = 0; l <= lmax; l++) {
            const REAL off = l ? 0 : shift;
            const REAL back = scale * scale * scale * product / ((lmax + 1) * (2 * l + 1) * n);
            for (int64_t row = l * l; row < (l + 1) * (l + 1); row++)
                for (int64_t c = 0; c < n; c++)
                    out[row * n + c] = pull[row * n + c] * weight[l * n + c] * scale -
                                       back * (own[row * n + c] - off);
        }
        if (centred) {
            const REAL level = mean(out, n);
            for (int64_t c = 0; c < n; c++) out[c] -= level;
        }
    }
}

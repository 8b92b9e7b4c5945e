/* The form F = sum of sign w[path] x[left] y[right] z[output] of one Clifford algebra, by the terms
   that the macros TO_LEFT, TO_RIGHT, TO_OUTPUT and TO_WEIGHTS list. REAL is float or double.

   Multivectors are (rows, N_BLADES, C), weights (N_PATHS, C): channels are the inner loop, which gcc
   vectorizes only if told that blades do not overlap. */

#include <stdint.h>

#define TERM(path, i, k) w[(path) * C + c] * a[(i) * C + c] * b[(k) * C + c]
#define BLADE(number, sum) out[(number) * C + c] = sum;
#define CUBE(i, k, j) a[(i) * C + c] * b[(k) * C + c] * z[(j) * C + c]
#define PATH(number, sum) total[(number) * C + c] += sum;

#define PRODUCT(name, STATEMENTS)                                                                  \
    void name(const REAL *first, const REAL *second, const REAL *restrict w, REAL *result,         \
              int64_t rows, int64_t C, int parts) {                                                \
        _Pragma("omp parallel for num_threads(parts) schedule(static) if (parts > 1)")             \
        for (int64_t row = 0; row < rows; row++) {                                                 \
            const REAL *restrict a = first + row * N_BLADES * C;                                   \
            const REAL *restrict b = second + row * N_BLADES * C;                                  \
            REAL *restrict out = result + row * N_BLADES * C;                                      \
            _Pragma("GCC ivdep")                                                                   \
            for (int64_t c = 0; c < C; c++) { STATEMENTS }                                         \
        }                                                                                          \
    }

PRODUCT(to_left, TO_LEFT)
PRODUCT(to_right, TO_RIGHT)
PRODUCT(to_output, TO_OUTPUT)

/* Each part of the rows has sums of its own, (parts, N_PATHS, C), zero at first. */
void to_weights(const REAL *left, const REAL *right, const REAL *output, REAL *sums, int64_t rows,
                int64_t C, int parts) {
#pragma omp parallel for num_threads(parts) schedule(static, 1) if (parts > 1)
    for (int part = 0; part < parts; part++) {
        REAL *restrict total = sums + (int64_t)part * N_PATHS * C;
        for (int64_t row = part * rows / parts; row < (part + 1) * rows / parts; row++) {
            const REAL *restrict a = left + row * N_BLADES * C;
            const REAL *restrict b = right + row * N_BLADES * C;
            const REAL *restrict z = output + row * N_BLADES * C;
#pragma GCC ivdep
            for (int64_t c = 0; c < C; c++) { TO_WEIGHTS }
        }
    }
}

/* Shows that a compiler works here, what all kernels ask of numbers that they index by, and what the
   thread that calls asks of OpenMP. */
#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#endif

int value(void) { return VALUE; }

/* Whether every number is in 0..limit-1. */
int in_range(const int64_t *index, int64_t n, int64_t limit) {
    int outside = 0;
    for (int64_t e = 0; e < n; e++) outside |= index[e] < 0 || index[e] >= limit;
    return !outside;
}

/* Of regions that this thread starts from now on, and do not say themselves. */
void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#endif
}

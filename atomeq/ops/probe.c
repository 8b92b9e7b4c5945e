/* Shows that a compiler works here, and what all kernels ask of numbers that they index by. */
#include <stdint.h>

int value(void) { return VALUE; }

/* Whether every number is in 0..limit-1. */
int in_range(const int64_t *index, int64_t n, int64_t limit) {
    int outside = 0;
    for (int64_t e = 0; e < n; e++) outside |= index[e] < 0 || index[e] >= limit;
    return !outside;
}

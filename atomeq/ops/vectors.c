/* Channels are worked on 32 bytes at a time, those left over one by one. REAL is float or double. */

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define EACH(n) _Pragma("GCC ivdep") for (int64_t c = 0; c < (n); c++)
typedef REAL LANES __attribute__((vector_size(32), aligned(sizeof(REAL)), may_alias));
#define N_LANES ((int64_t)(32 / sizeof(REAL)))

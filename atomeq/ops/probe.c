/* The least kernel: whether a compiler is there and what it makes can be loaded. */
int value(void) { return VALUE; }

// Headers of libstdc++ 11 and newer read this variable of glibc 2.32. A hidden copy of our own
// keeps older systems usable; false means "threads may exist": always use atomics.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

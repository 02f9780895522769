/* Preloaded, it lets torch's tensors start at any multiple of 8 bytes, by a fixed sequence of draws, as those that are
   mapped from a file or cut from another tensor do. torch itself asks for 64, so that its own copies hide what kernels
   do with others. Built and used by `make numerics`; glibc only. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

extern void *__libc_malloc(size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static uint32_t draw = 1;

int posix_memalign(void **out, size_t alignment, size_t size) {
    Dl_info caller;
    /* Only torch's allocator of tensors: kernels may rely on the alignment of their own buffers. */
    if (dladdr(__builtin_return_address(0), &caller) && strstr(caller.dli_fname, "libc10.so")) {
        char *block = __libc_malloc(size + 8);
        draw = draw * 1664525u + 1013904223u;
        *out = block ? block + 8 * (draw >> 31) : NULL;
    } else {
        *out = __libc_memalign(alignment, size);
    }
    return *out ? 0 : 12; /* ENOMEM */
}

/* What malloc gives is a multiple of 16. */
void free(void *pointer) { __libc_free((void *)((uintptr_t)pointer & ~(uintptr_t)15)); }

// What g++ 12's headers and archives take from a glibc newer than 2.28, for the library that this is linked into alone.
#include <stdint.h>
#include <stdlib.h>

#define STF_HIDDEN __attribute__((visibility("hidden")))

extern "C" {

// Of glibc 2.32. False is always right: counters are then changed atomically.
STF_HIDDEN char __libc_single_threaded = 0;

// Of glibc 2.36: std::random_device asks for it, which comes along with std::string and is never used.
STF_HIDDEN uint32_t arc4random(void) { abort(); }
}

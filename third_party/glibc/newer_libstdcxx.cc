// What g++ 12's headers take from a newer libstdc++ than that of g++ 8, for the library that this is linked into alone.
#define _GLIBCXX_EXTERN_TEMPLATE 0  // so that the constructor below is made here
#include <new>
#include <sstream>

#define STF_HIDDEN __attribute__((visibility("hidden")))

// Of g++ 11: std::__throw_bad_array_new_length(), by the name that the linker knows. (Declared in std, it could not be hidden.)
extern "C" STF_HIDDEN void _ZSt28__throw_bad_array_new_lengthv() { throw std::bad_array_new_length(); }

// Of g++ 9.
template STF_HIDDEN std::basic_stringstream<char>::basic_stringstream();

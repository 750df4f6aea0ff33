// What newer libstdc++ headers expect in the library, defined here so that GCC 5's library
// suffices.
#include <new>
#include <sstream>

// GCC 9 moved these default constructors into the library.
// NOTE: switching all extern templates off would do it too, but a second num_put facet breaks the
// formatting of integers.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();

// GCC 11's allocator calls this one.
namespace std {
__attribute__((__noreturn__)) void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

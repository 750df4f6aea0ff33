# How every library of ours is linked: only anyflash_* visible, unused sections dropped, found beside each other,
# no file paths in messages, and runnable on glibc 2.17 although built on a newer system.
#
# zig, the compiler of machines that have none, knows every glibc and brings its own C++ library; the others need help: stubs for the
# names that glibc moved, and the few that newer headers expect of libstdc++.
include(CheckLinkerFlag)
cmake_path(GET CMAKE_CXX_COMPILER STEM _compiler)
if(_compiler STREQUAL "zig")
  set(ANYFLASH_ZIG ON)
else()
  execute_process(COMMAND "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/tools/glibc_floor.py"
                          "${CMAKE_CXX_COMPILER}" "${PROJECT_BINARY_DIR}/floor"
                  OUTPUT_VARIABLE ANYFLASH_GLIBC_STUBS OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  check_linker_flag(CXX -static-libstdc++ ANYFLASH_STATIC_LIBSTDCXX)
endif()

function(anyflash_compile_options target)
  target_compile_options(${target} PRIVATE
    "$<$<COMPILE_LANGUAGE:CXX>:-ffunction-sections;-fmacro-prefix-map=${PROJECT_SOURCE_DIR}/=>")
endfunction()

# anyflash_binary(<target> [STATIC_LIBSTDCXX]): with the word a C++ library of its own, where the system has it as an archive. Only for
# a library through whose interface no exception passes. Others run with that of GCC 5.
function(anyflash_binary target)
  anyflash_compile_options(${target})
  set(_map "${PROJECT_SOURCE_DIR}/cmake/exports.map")
  set(_floor "${PROJECT_SOURCE_DIR}/cmake/floor")
  if(ANYFLASH_ZIG)
    target_link_options(${target} PRIVATE -s) # such a machine has no strip
  else()
    target_sources(${target} PRIVATE "${_floor}/single_threaded.cpp")
    if(ANYFLASH_STATIC_LIBSTDCXX AND "STATIC_LIBSTDCXX" IN_LIST ARGN)
      target_sources(${target} PRIVATE "${_floor}/thread_atexit.cpp")
      target_link_options(${target} PRIVATE "$<HOST_LINK:-static-libstdc++>")
    else()
      target_sources(${target} PRIVATE "${_floor}/libstdcxx.cpp")
    endif()
  endif()
  if(ANYFLASH_GLIBC_STUBS)
    target_link_libraries(${target} PRIVATE -Wl,--push-state,--no-as-needed ${ANYFLASH_GLIBC_STUBS} -Wl,--pop-state)
  endif()
  target_link_options(${target} PRIVATE LINKER:--gc-sections LINKER:-z,nodelete "LINKER:--version-script=${_map}")
  set_target_properties(${target} PROPERTIES LINK_DEPENDS "${_map}" BUILD_RPATH_USE_ORIGIN ON INSTALL_RPATH "$ORIGIN")
endfunction()

# How every library of ours is linked: only anyflash_* visible, unused sections dropped, found beside each other,
# no file paths in messages, and runnable on glibc 2.17 / libstdc++ of GCC 5 although built on a newer system.
execute_process(COMMAND "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/tools/glibc_floor.py"
                        "${CMAKE_CXX_COMPILER}" "${PROJECT_BINARY_DIR}/floor"
                OUTPUT_VARIABLE ANYFLASH_GLIBC_STUBS OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)

function(anyflash_compile_options target)
  target_compile_options(${target} PRIVATE
    "$<$<COMPILE_LANGUAGE:CXX>:-ffunction-sections;-fmacro-prefix-map=${PROJECT_SOURCE_DIR}/=>")
endfunction()

function(anyflash_binary target)
  anyflash_compile_options(${target})
  set(_map "${PROJECT_SOURCE_DIR}/cmake/exports.map")
  target_sources(${target} PRIVATE "${PROJECT_SOURCE_DIR}/cmake/floor/single_threaded.cpp"
                                   "${PROJECT_SOURCE_DIR}/cmake/floor/libstdcxx.cpp")
  if(ANYFLASH_GLIBC_STUBS)
    target_link_libraries(${target} PRIVATE -Wl,--push-state,--no-as-needed ${ANYFLASH_GLIBC_STUBS} -Wl,--pop-state)
  endif()
  target_link_options(${target} PRIVATE LINKER:--exclude-libs,ALL LINKER:--gc-sections LINKER:-z,nodelete
                                        "LINKER:--version-script=${_map}")
  set_target_properties(${target} PROPERTIES LINK_DEPENDS "${_map}" BUILD_RPATH_USE_ORIGIN ON INSTALL_RPATH "$ORIGIN")
endfunction()

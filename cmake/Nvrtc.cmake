# CUDA by NVRTC (tools/nvrtc.py).
set(ANYFLASH_NVRTC_FOLDER "${PROJECT_SOURCE_DIR}/build/nvrtc" CACHE PATH "where an NVRTC that is missing is fetched to")
set(_nvrtc "${PROJECT_SOURCE_DIR}/tools/nvrtc.py")

# anyflash_find_nvrtc(<problem> <arch>...): for each ANYFLASH_NVRTC_<arch>, the library, and ANYFLASH_CUDA_<arch>, its version, or why
# there is none for all of them.
macro(anyflash_find_nvrtc problem)
  execute_process(COMMAND "${Python_EXECUTABLE}" "${_nvrtc}" find "${ANYFLASH_NVRTC_FOLDER}" ${ARGN}
                  OUTPUT_VARIABLE _found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_VARIABLE ${problem} RESULT_VARIABLE _failed)
  if(NOT _failed)
    set(${problem})
    string(REPLACE "\n" ";" _found "${_found}")
    foreach(_line IN LISTS _found)
      string(REGEX MATCH "^([0-9]+) ([0-9.]+) (.*)$" _line "${_line}")
      set(ANYFLASH_CUDA_${CMAKE_MATCH_1} "${CMAKE_MATCH_2}")
      set(ANYFLASH_NVRTC_${CMAKE_MATCH_1} "${CMAKE_MATCH_3}")
      message(STATUS "sm_${CMAKE_MATCH_1}: NVRTC ${CMAKE_MATCH_2}, ${CMAKE_MATCH_3}")
    endforeach()
  endif()
endmacro()

# ANYFLASH_COMPILED_ARCHS: ANYFLASH_CUDA_ARCHS in digits where there is a compiler for all of them, else empty.
list(TRANSFORM ANYFLASH_CUDA_ARCHS REPLACE "[^0-9]" "" OUTPUT_VARIABLE ANYFLASH_COMPILED_ARCHS)
list(REMOVE_DUPLICATES ANYFLASH_COMPILED_ARCHS)
if(NOT ANYFLASH_COMPILED_ARCHS MATCHES "^[0-9;]*[0-9]$" OR ANYFLASH_COMPILED_ARCHS MATCHES "^;|;;")
  message(FATAL_ERROR "ANYFLASH_CUDA_ARCHS: expected architectures such as 80 or 75;80;90, got ${ANYFLASH_CUDA_ARCHS}")
endif()
anyflash_find_nvrtc(_problem ${ANYFLASH_COMPILED_ARCHS})
if(_problem AND NOT ANYFLASH_CUDA STREQUAL "AUTO")
  message(FATAL_ERROR "ANYFLASH_CUDA=${ANYFLASH_CUDA}: ${_problem}")
elseif(_problem)
  message(STATUS "no CUDA kernels: ${_problem}")
  set(ANYFLASH_COMPILED_ARCHS)
endif()

# Headers that a kernel may include; NVRTC does not say which it read. Others are the launchers' and the library's.
file(GLOB_RECURSE _headers CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/kernels/*.h" "${PROJECT_SOURCE_DIR}/kernels/*.cuh" "${PROJECT_SOURCE_DIR}/kernels/*.def")
list(FILTER _headers EXCLUDE REGEX "/kernels/(cpu/|cubin|driver|host_cuda|instances|checked)")

# anyflash_nvrtc(<source.cu> <output> <arch> [option...]): a cubin for sm_80, PTX for compute_80.
function(anyflash_nvrtc source output arch)
  string(REGEX MATCH "[0-9]+" _sm "${arch}")
  if(NOT ANYFLASH_NVRTC_${_sm})
    list(GET ANYFLASH_COMPILED_ARCHS 0 _sm)  # PTX for the emulator
  endif()
  add_custom_command(
    OUTPUT "${output}" DEPENDS "${source}" "${_nvrtc}" ${_headers} VERBATIM
    COMMAND "${Python_EXECUTABLE}" "${_nvrtc}" compile "${ANYFLASH_NVRTC_${_sm}}" ${arch} "${source}" "${output}"
            "-I${PROJECT_SOURCE_DIR}" ${ARGN})
endfunction()

# anyflash_embed(<line> <output.cpp> (<sm> <min driver> <code> <like>)...): machine code as C++.
function(anyflash_embed line output)
  set(_embed "${PROJECT_SOURCE_DIR}/tools/embed_code.py")
  set(_files ${ARGN})
  list(FILTER _files EXCLUDE REGEX "^[0-9]+$")
  list(REMOVE_DUPLICATES _files)
  add_custom_command(
    OUTPUT "${output}" DEPENDS "${_embed}" "${PROJECT_SOURCE_DIR}/kernels/checked.def" ${_files} VERBATIM
    COMMAND "${Python_EXECUTABLE}" "${_embed}" ${line} "${output}" ${ARGN})
  set_source_files_properties("${output}" PROPERTIES OBJECT_DEPENDS "${_files}")
endfunction()

# anyflash_torch_headers: torch's stable-ABI headers, nothing of libtorch. Where they come from: tools/torch_headers.py.
if(NOT ANYFLASH_TORCH_INCLUDE)
  execute_process(COMMAND "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/tools/torch_headers.py" "${PROJECT_BINARY_DIR}/torch_headers"
                  OUTPUT_VARIABLE _include OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _failed)
  if(_failed)
    message(FATAL_ERROR "no torch headers: install torch >= 2.10 or set ANYFLASH_TORCH_INCLUDE to its include folder")
  endif()
  set(ANYFLASH_TORCH_INCLUDE "${_include}" CACHE PATH "torch's include folder, of which only the stable-ABI headers are used")
endif()
message(STATUS "torch headers: ${ANYFLASH_TORCH_INCLUDE}")

add_library(anyflash_torch_headers INTERFACE)
target_include_directories(anyflash_torch_headers SYSTEM INTERFACE "${ANYFLASH_TORCH_INCLUDE}")
target_compile_definitions(anyflash_torch_headers INTERFACE TORCH_STABLE_ONLY TORCH_TARGET_VERSION=0x020a000000000000)
target_compile_options(anyflash_torch_headers INTERFACE "-fmacro-prefix-map=${ANYFLASH_TORCH_INCLUDE}/=")

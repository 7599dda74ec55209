# nvcc is called directly, one custom command a file: CMake's CUDA language would want a working
# device compiler test, and torch's own CMake package would want a CUDA build of torch.
get_filename_component(nvcc_bin "${NVCC}" REALPATH)
get_filename_component(cuda_root "${nvcc_bin}" DIRECTORY)
get_filename_component(cuda_root "${cuda_root}" DIRECTORY)

set(gencode "")
foreach(arch IN LISTS QUANTKIT_CUDA_ARCHS)
  list(APPEND gencode -gencode "arch=compute_${arch},code=sm_${arch}")
endforeach()
# PTX of the newest architecture that is not tied to one chip, for GPUs made later.
set(ptx_archs ${QUANTKIT_CUDA_ARCHS})
list(FILTER ptx_archs EXCLUDE REGEX "[af]$")
if(ptx_archs)
  list(GET ptx_archs -1 newest)
  list(APPEND gencode -gencode "arch=compute_${newest},code=compute_${newest}")
endif()

execute_process(COMMAND "${NVCC}" --help OUTPUT_VARIABLE nvcc_help)
if(nvcc_help MATCHES "--compress-mode")  # CUDA 12.8 and newer
  list(APPEND gencode --compress-mode=size)
endif()

file(GLOB cuda_headers CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cuh"
     "${CMAKE_CURRENT_SOURCE_DIR}/include/quantkit/*.h")
set(cuda_objects "")
foreach(source api fp4_api fp4a16_bf16 fp4a16_f16 hadamard paged_decode rope_store row_quantize
        w4_linear w8_linear w4a16_bf16 w4a16_f16 w8_api w8a16_bf16 w8a16_f16)
  set(object "${CMAKE_CURRENT_BINARY_DIR}/cuda_${source}.o")
  add_custom_command(
    OUTPUT "${object}"
    COMMAND "${NVCC}" -c "${CMAKE_CURRENT_SOURCE_DIR}/cuda/${source}.cu" -o "${object}"
            -O3 -std=c++17 ${gencode}
            -Xcompiler=-fPIC,-fvisibility=hidden
            -I "${CMAKE_CURRENT_SOURCE_DIR}/include"
    DEPENDS cuda/${source}.cu ${cuda_headers}
    COMMENT "nvcc ${source}.cu (${QUANTKIT_CUDA_ARCHS})"
    VERBATIM)
  list(APPEND cuda_objects "${object}")
endforeach()

# The CUDA runtime is linked statically: the wheel then does not care which one torch ships.
find_library(CUDART_STATIC cudart_static
  HINTS "${cuda_root}/lib64" "${cuda_root}/targets/x86_64-linux/lib" "${cuda_root}/lib"
        "${cuda_root}/targets/sbsa-linux/lib"
  REQUIRED)
find_path(CUDA_INCLUDE cuda_runtime_api.h
  HINTS "${cuda_root}/include" "${cuda_root}/targets/x86_64-linux/include"
        "${cuda_root}/targets/sbsa-linux/include"
  REQUIRED)

add_library(quantkit_cuda SHARED bindings/cuda.cpp bindings/cuda_attention.cpp bindings/cuda_fp4.cpp
            bindings/cuda_rows.cpp bindings/cuda_w8.cpp ${cuda_objects})
target_include_directories(quantkit_cuda PRIVATE include SYSTEM "${CUDA_INCLUDE}")
target_link_libraries(quantkit_cuda PRIVATE torch_headers "${TORCH_DIR}/lib/libtorch_cpu.so"
                      "${CUDART_STATIC}" Threads::Threads ${CMAKE_DL_LIBS} rt)
target_link_options(quantkit_cuda PRIVATE -Wl,--exclude-libs,ALL)  # keep the runtime's symbols in
set_target_properties(quantkit_cuda PROPERTIES
  LIBRARY_OUTPUT_DIRECTORY "${NATIVE_DIR}"
  BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "")
if(SKBUILD AND NOT SKBUILD_STATE STREQUAL "editable")
  install(TARGETS quantkit_cuda LIBRARY DESTINATION quantkit/_native)
endif()

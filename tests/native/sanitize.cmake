# The targets of csrc/CMakeLists.txt with the sanitizers that FUSEDOPT_SANITIZE names: address, with
# undefined behaviour, or thread. See sanitize.sh.
if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  message(FATAL_ERROR "FUSEDOPT_SANITIZE needs GCC, not ${CMAKE_CXX_COMPILER_ID}")
endif()

add_library(faults MODULE ${CMAKE_CURRENT_LIST_DIR}/faults.cpp
            multi_tensor/apply_cpu.cpp multi_tensor/launch_plan.cpp multi_tensor/parallel.cpp)
target_include_directories(faults PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
target_link_libraries(faults PRIVATE OpenMP::OpenMP_CXX)

if(FUSEDOPT_SANITIZE STREQUAL "address")
  set(sanitizers -fsanitize=address,undefined,float-cast-overflow)
else()
  set(sanitizers -fsanitize=${FUSEDOPT_SANITIZE})
  foreach(module _native faults)
    target_sources(${module} PRIVATE ${CMAKE_CURRENT_LIST_DIR}/openmp_threads.cpp)
  endforeach()
endif()
list(TRANSFORM FUSEDOPT_ISAS PREPEND ops_ OUTPUT_VARIABLE libraries)
foreach(target _native faults ${libraries})
  target_compile_options(${target} PRIVATE ${sanitizers} -fno-sanitize-recover=all -O1
                         -fno-omit-frame-pointer)
  target_compile_definitions(${target} PRIVATE _GLIBCXX_ASSERTIONS)
endforeach()
target_link_options(_native PRIVATE ${sanitizers})
target_link_options(faults PRIVATE ${sanitizers})

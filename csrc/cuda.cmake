# Decides from FUSEDOPT_CUDA and FUSEDOPT_CUDA_ARCHS what becomes of the .cu files:
#   FUSEDOPT_CUDA_LANGUAGE    CUDA; CXX: as FUSEDOPT_ON_HOST; empty: they are left out
#   FUSEDOPT_CUDA_ARCH_NAMES  sm_80 sm_90, say
#   FUSEDOPT_CUDA_STATUS      the decision, as fusedopt.info shows it
#   FUSEDOPT_ON_HOST          the module is one for tests, whose kernels run on the CPU
#   FUSEDOPT_MODULE           its name
set(FUSEDOPT_CUDA auto CACHE STRING "auto (if there is an nvcc), 1, 0, failed (0 after it was tried) \
or on_host (builds _native_on_host, with kernels that run on the CPU)")
set(FUSEDOPT_CUDA_ARCHS "" CACHE STRING "80 90, say; empty: all from 75 on that nvcc knows")
string(TOLOWER "${FUSEDOPT_CUDA}" choice)
set(no_nvcc "no nvcc found (set CUDA_HOME to the directory with bin/nvcc)")

set(FUSEDOPT_ON_HOST OFF)
set(FUSEDOPT_MODULE _native)
if(choice MATCHES "^(auto|1|on)$")
  find_program(CMAKE_CUDA_COMPILER nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
               PATH_SUFFIXES bin)
  if(CMAKE_CUDA_COMPILER)
    set(FUSEDOPT_CUDA_LANGUAGE CUDA)
  elseif(choice STREQUAL "auto")
    set(FUSEDOPT_CUDA_STATUS "off, ${no_nvcc}")
  else()
    message(FATAL_ERROR "fusedopt: CUDA: FUSEDOPT_CUDA=${FUSEDOPT_CUDA}, but ${no_nvcc}")
  endif()
elseif(choice MATCHES "^(0|off)$")
  set(FUSEDOPT_CUDA_STATUS "off, FUSEDOPT_CUDA=${FUSEDOPT_CUDA}")
elseif(choice STREQUAL "failed")
  set(FUSEDOPT_CUDA_STATUS "off, the build with CUDA failed")
elseif(choice STREQUAL "on_host")
  set(FUSEDOPT_CUDA_LANGUAGE CXX)
  set(FUSEDOPT_CUDA_STATUS "kernels run on the CPU, for tests")
  set(FUSEDOPT_ON_HOST ON)
  set(FUSEDOPT_MODULE _native_on_host)
else()
  message(FATAL_ERROR "FUSEDOPT_CUDA must be auto, 0 or 1, not '${FUSEDOPT_CUDA}'")
endif()
if(NOT FUSEDOPT_CUDA_LANGUAGE STREQUAL "CUDA")
  message(NOTICE "fusedopt: CUDA: ${FUSEDOPT_CUDA_STATUS}")
  return()
endif()

string(REGEX MATCHALL "[0-9]+" archs "${FUSEDOPT_CUDA_ARCHS}")
if(NOT archs)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE codes
                  COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "sm_[0-9]+\n" archs "${codes}")  # no variants such as sm_90a
  list(TRANSFORM archs REPLACE "[^0-9]" "")
  list(FILTER archs EXCLUDE REGEX "^([0-6].|7[0-4])$")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
    list(REMOVE_ITEM archs 87 88 101 110)  # Tegra, whose processor is ARM
  endif()
endif()
list(REMOVE_DUPLICATES archs)
list(SORT archs COMPARE NATURAL)
list(TRANSFORM archs PREPEND sm_ OUTPUT_VARIABLE FUSEDOPT_CUDA_ARCH_NAMES)
list(JOIN FUSEDOPT_CUDA_ARCH_NAMES " " FUSEDOPT_CUDA_ARCH_NAMES)
list(POP_BACK archs newest)
list(TRANSFORM archs APPEND -real)
set(CMAKE_CUDA_ARCHITECTURES ${archs} ${newest})  # the newest as PTX too: GPUs to come translate it

# One host compiler for everything, unless nvcc is to have its own.
if(NOT DEFINED CMAKE_CUDA_HOST_COMPILER AND NOT DEFINED ENV{CUDAHOSTCXX})
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # loads the driver when it is first used, not at import
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.1)  # kernels take up to 32 KB of arguments
  message(FATAL_ERROR "fusedopt: CUDA: needs nvcc 12.1, not ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
string(REGEX MATCH "^[0-9]+\\.[0-9]+" version ${CMAKE_CUDA_COMPILER_VERSION})
set(FUSEDOPT_CUDA_STATUS "built for ${FUSEDOPT_CUDA_ARCH_NAMES} with CUDA ${version}")
message(NOTICE "fusedopt: CUDA: building for ${FUSEDOPT_CUDA_ARCH_NAMES} with nvcc ${version} at "
               "${CMAKE_CUDA_COMPILER}")

# Whether the CUDA kernels are built, by which nvcc and for which architectures. Reads VAREID_CUDA_MODE (AUTO, ON or PYPI)
# and the Python that is installed into; sets VAREID_WITH_CUDA and CMAKE_CUDA_ARCHITECTURES, and enables the language CUDA.

set(VAREID_DRIVER_FILE "/proc/driver/nvidia/version" CACHE FILEPATH "Where the NVIDIA driver states its version")
mark_as_advanced(VAREID_DRIVER_FILE)
set(python_packages "${CMAKE_CURRENT_LIST_DIR}/python_packages.py")
set(with_pypi "type: VAREID_CUDA=PYPI pip install .")

# -I: PyTorch of the environment that is installed into, also where pip builds in an environment of its own.
execute_process(COMMAND "${Python_EXECUTABLE}" -I "${python_packages}" torch OUTPUT_VARIABLE torch_cuda ERROR_QUIET)

# ---- Which nvcc: of PyPI, or found off PATH too --------------------------------------------------------------------
if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE)  # an earlier failure is no answer: the toolkit or CUDAHOSTCXX may be another now
endif()
if(VAREID_CUDA_MODE STREQUAL "PYPI")
  execute_process(COMMAND "${Python_EXECUTABLE}" "${python_packages}" nvcc OUTPUT_VARIABLE nvcc)
  if(NOT nvcc)
    message(FATAL_ERROR "VAREID_CUDA=PYPI, but Python packages with nvcc are not installed here; "
                        "leave out --no-build-isolation or type: pip install 'cuda-toolkit[nvcc,cccl]==13.*'")
  endif()
  cmake_path(GET nvcc PARENT_PATH toolkit)
  cmake_path(GET toolkit PARENT_PATH toolkit)
  foreach(part nvvm/bin/cicc include/crt/host_config.h include/cuda_runtime.h lib/libcudart_static.a)
    if(NOT EXISTS "${toolkit}/${part}")
      message(FATAL_ERROR "VAREID_CUDA=PYPI, but ${toolkit} lacks ${part}; "
                          "type: pip install --force-reinstall 'cuda-toolkit[nvcc,cccl]==13.*'")
    endif()
  endforeach()
  set(ENV{CUDACXX} "${nvcc}")
  set(ENV{CUDAFLAGS} "-L${toolkit}/lib $ENV{CUDAFLAGS}")  # nvcc 13.0 looks in lib64 only
elseif(CMAKE_CUDA_COMPILER)
  set(nvcc "${CMAKE_CUDA_COMPILER}")
elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
  set(nvcc "$ENV{CUDACXX}")
else()
  find_program(VAREID_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
               PATHS /usr/local/cuda /opt/cuda /usr/lib/cuda)
  set(nvcc "${VAREID_NVCC}")
  if(nvcc)
    set(ENV{CUDACXX} "${nvcc}")  # not CMAKE_CUDA_COMPILER: check_language would take that untried
  endif()
endif()

# ---- Architectures that nvcc does not know: the trial below would call it broken -----------------------------------
set(asked "$ENV{CUDAARCHS}")
if(DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(asked "${CMAKE_CUDA_ARCHITECTURES}")
endif()
execute_process(COMMAND "${nvcc}" --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
string(REGEX MATCHALL "[0-9]+" known "${known}")
if(asked MATCHES "^(native|)$")
  set(CMAKE_CUDA_ARCHITECTURES all-major)  # every major architecture, and PTX of the newest
elseif(known AND NOT asked MATCHES "^all(-major)?$")
  foreach(architecture IN LISTS asked)
    string(REGEX REPLACE "^([0-9]+)[af]?(-real|-virtual)?$" "\\1" number "${architecture}")
    if(NOT number IN_LIST known)
      list(JOIN known " " known)
      message(FATAL_ERROR "CUDAARCHS: '${architecture}' was given; allowed for this nvcc are native, all-major, all and "
                          "a list of ${known} (90 or 90-real, say)")
    endif()
  endforeach()
endif()

# ---- What nvcc cannot compile is no CUDA ---------------------------------------------------------------------------
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(NOT VAREID_CUDA_MODE STREQUAL "AUTO")
    message(FATAL_ERROR "VAREID_CUDA=${VAREID_CUDA_MODE}, but no nvcc was found that compiles a test program "
                        "(looked in CUDACXX, PATH, CUDA_HOME, CUDA_PATH, /usr/local/cuda, /opt/cuda); "
                        "for one of PyPI ${with_pypi}")
  endif()
  message(STATUS "vareid_ext: CUDA kernels OFF: no nvcc was found that compiles a test program; building for the CPU")
  if(torch_cuda)
    message(STATUS "vareid_ext: PyTorch for CUDA ${torch_cuda} is installed; for the CUDA kernels ${with_pypi}")
  elseif(EXISTS "${VAREID_DRIVER_FILE}" OR EXISTS /dev/dxg)
    message(STATUS "vareid_ext: there is a GPU; for the CUDA kernels ${with_pypi}")
  endif()
  return()
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(VAREID_WITH_CUDA ON)
set(nvcc "nvcc ${CMAKE_CUDA_COMPILER_VERSION}")

# ---- The GPU of this machine, its driver and PyTorch beside this nvcc ----------------------------------------------
if(asked MATCHES "^(native|)$" AND known)
  string(REGEX MATCHALL "[0-9]+" visible "${CMAKE_CUDA_ARCHITECTURES_NATIVE}")  # CMake 4.4 has words here without a GPU
  set(unknown "${visible}")
  list(REMOVE_ITEM unknown ${known})
  if(unknown)
    message(STATUS "vareid_ext: ${nvcc} does not know this GPU (sm_${unknown}); for the newest nvcc ${with_pypi} "
                   "(before sm_75, for CUDA 12: CUDACXX=/path/to/nvcc pip install .)")
  elseif(visible)
    list(TRANSFORM visible APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
  endif()
endif()
set(oldest_driver_12 525)
set(oldest_driver_13 580)
string(REGEX MATCH "^[0-9]+" major "${CMAKE_CUDA_COMPILER_VERSION}")
set(oldest_driver "${oldest_driver_${major}}")
set(driver "")
if(EXISTS "${VAREID_DRIVER_FILE}")
  file(READ "${VAREID_DRIVER_FILE}" driver)
  string(REGEX MATCH "Module[^\n]*  ([0-9]+\\.[0-9.]+)" driver "${driver}")
  set(driver "${CMAKE_MATCH_1}")
endif()
if(driver AND oldest_driver AND driver VERSION_LESS oldest_driver)
  message(STATUS "vareid_ext: driver ${driver} cannot run what ${nvcc} builds: update it to ${oldest_driver} or newer, "
                 "or for an older toolkit type: CUDACXX=/path/to/nvcc pip install .")
elseif(torch_cuda VERSION_GREATER CMAKE_CUDA_COMPILER_VERSION)
  message(STATUS "vareid_ext: ${nvcc} is older than CUDA ${torch_cuda} of the installed PyTorch and may not know its GPUs; "
                 "for a newer nvcc ${with_pypi}")
endif()
message(STATUS "vareid_ext: CUDA kernels ON (${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION}, "
               "architectures ${CMAKE_CUDA_ARCHITECTURES})")

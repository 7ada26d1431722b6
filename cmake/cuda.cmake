# Whether the CUDA kernels are built, by which nvcc and for which architectures. Reads VAREID_CUDA_MODE (AUTO, ON or PYPI)
# and the Python that is installed into; sets VAREID_WITH_CUDA and CMAKE_CUDA_ARCHITECTURES, and enables the language CUDA.

set(VAREID_DRIVER_FILE "/proc/driver/nvidia/version" CACHE FILEPATH "Where the NVIDIA driver states its version")
mark_as_advanced(VAREID_DRIVER_FILE)
set(python_packages "${CMAKE_CURRENT_LIST_DIR}/python_packages.py")

# -I: PyTorch of the environment that is installed into, also where pip builds in an environment of its own.
execute_process(COMMAND "${Python_EXECUTABLE}" -I "${python_packages}" torch OUTPUT_VARIABLE torch_cuda ERROR_QUIET)

# ---- What to type for an nvcc that this machine can use: PyPI's is of CUDA 13 ---------------------------------------
set(driver "")
if(EXISTS "${VAREID_DRIVER_FILE}")
  file(READ "${VAREID_DRIVER_FILE}" driver)
  string(REGEX MATCH "Module[^\n]*  ([0-9]+\\.[0-9.]+)" driver "${driver}")
  set(driver "${CMAKE_MATCH_1}")
endif()
set(oldest_driver_12 525)
set(oldest_driver_13 580)
execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader OUTPUT_VARIABLE gpus ERROR_QUIET)
string(REGEX MATCHALL "[0-9]+\\.[0-9]+" gpus "${gpus}")
list(SORT gpus COMPARE NATURAL)
list(FILTER gpus INCLUDE REGEX "^([1-6]\\.|7\\.[0-4])")
set(with_pypi "type: VAREID_CUDA=PYPI pip install .")
set(with_cuda_12 "install a toolkit of CUDA 12 and type: CUDACXX=/path/to/nvcc VAREID_CUDA=ON pip install .")
if(gpus)
  list(GET gpus 0 gpu)
  set(with_pypi "(CUDA 13 does not know the GPU of compute capability ${gpu}) ${with_cuda_12}")
elseif(driver AND driver VERSION_LESS oldest_driver_13)
  set(with_pypi "update driver ${driver} to ${oldest_driver_13} or newer, then ${with_pypi} (or ${with_cuda_12})")
endif()

# ---- Which nvcc: of PyPI, or found off PATH too --------------------------------------------------------------------
if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE)  # an earlier failure is no answer: the toolkit or CUDAHOSTCXX may be another now
endif()
if(VAREID_CUDA_MODE STREQUAL "PYPI")
  execute_process(COMMAND "${Python_EXECUTABLE}" "${python_packages}" nvcc OUTPUT_VARIABLE nvcc)
  execute_process(COMMAND "${Python_EXECUTABLE}" "${python_packages}" toolkit OUTPUT_VARIABLE toolkit_version)
  set(packages "'cuda-toolkit[nvcc,cccl]==${toolkit_version}'")
  if(NOT nvcc)
    message(FATAL_ERROR "VAREID_CUDA=PYPI, but Python packages with nvcc are not installed here; "
                        "leave out --no-build-isolation or type: pip install ${packages}")
  endif()
  cmake_path(GET nvcc PARENT_PATH toolkit)
  cmake_path(GET toolkit PARENT_PATH toolkit)
  foreach(part nvvm/bin/cicc include/crt/host_config.h include/cuda_runtime.h lib/libcudart_static.a)
    if(NOT EXISTS "${toolkit}/${part}")
      message(FATAL_ERROR "VAREID_CUDA=PYPI, but ${toolkit} lacks ${part}; "
                          "type: pip install --force-reinstall ${packages}")
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

# ---- Architectures: CUDAARCHS of this build, or -DCMAKE_CUDA_ARCHITECTURES ------------------------------------------
set(asked "$ENV{CUDAARCHS}")
if(asked STREQUAL "")
  set(asked "${CMAKE_CUDA_ARCHITECTURES}")
endif()
set(ENV{CUDAARCHS} "")  # CMake would remember it in the cache, for later builds too, and try it out with nvcc
execute_process(COMMAND "${nvcc}" --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
string(REGEX MATCHALL "[0-9]+" known "${known}")
if(known AND NOT asked MATCHES "^(native|all|all-major|)$")
  foreach(architecture IN LISTS asked)
    set(refused TRUE)
    if(architecture MATCHES "^([0-9]+[af]?)(-real|-virtual)?$")
      execute_process(COMMAND "${nvcc}" --dryrun -x cu -c /dev/null -gencode "arch=compute_${CMAKE_MATCH_1},code=sm_${CMAKE_MATCH_1}"
                      RESULT_VARIABLE refused OUTPUT_QUIET ERROR_QUIET)
    endif()
    if(refused)
      list(JOIN known ", " known)
      message(FATAL_ERROR "CUDAARCHS: '${asked}' was given, of which this nvcc does not take '${architecture}'; allowed are native, "
                          "all-major, all and a list of ${known} with ; between (90 or 90-real, say)")
    endif()
  endforeach()
endif()
set(CMAKE_CUDA_ARCHITECTURES "${asked}")
if(asked MATCHES "^(native|)$")
  set(CMAKE_CUDA_ARCHITECTURES all-major)  # every major architecture, and PTX of the newest
endif()

# ---- What nvcc cannot compile is no CUDA ---------------------------------------------------------------------------
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  set(host_compiler "set CUDAHOSTCXX to a C++ compiler that it supports")
  if(VAREID_CUDA_MODE STREQUAL "PYPI")
    message(FATAL_ERROR "VAREID_CUDA=PYPI, but ${nvcc} does not compile a test program; ${host_compiler}")
  elseif(VAREID_CUDA_MODE STREQUAL "ON" AND IS_ABSOLUTE "${nvcc}" AND NOT EXISTS "${nvcc}")
    message(FATAL_ERROR "VAREID_CUDA=ON, but there is no ${nvcc}; set CUDACXX to nvcc, or, without one, ${with_pypi}")
  elseif(VAREID_CUDA_MODE STREQUAL "ON" AND nvcc)
    message(FATAL_ERROR "VAREID_CUDA=ON, but ${nvcc} does not compile a test program; "
                        "${host_compiler}, or, for another nvcc, ${with_pypi}")
  elseif(VAREID_CUDA_MODE STREQUAL "ON")
    message(FATAL_ERROR "VAREID_CUDA=ON, but no nvcc was found "
                        "(looked in CUDACXX, PATH, CUDA_HOME, CUDA_PATH, /usr/local/cuda, /opt/cuda); ${with_pypi}")
  endif()
  message(STATUS "vareid_ext: CUDA kernels OFF: no nvcc was found that compiles a test program; building for the CPU")
  if(torch_cuda)
    message(STATUS "vareid_ext: PyTorch for CUDA ${torch_cuda} is installed; for the CUDA kernels ${with_pypi}")
  elseif(driver OR EXISTS /usr/lib/wsl/lib/libcuda.so.1)
    message(STATUS "vareid_ext: there is an NVIDIA driver; for the CUDA kernels ${with_pypi}")
  endif()
  return()
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
file(REMOVE "${CMAKE_PLATFORM_INFO_DIR}/CMakeCUDACompiler.cmake")  # remembers the GPU of an earlier configuration
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
    list(GET unknown 0 gpu)
    if(gpu LESS 75)
      set(with_pypi "${with_cuda_12}")
    endif()
    message(STATUS "vareid_ext: ${nvcc} does not know this GPU (sm_${unknown}); for one that does ${with_pypi}")
  elseif(visible)
    list(TRANSFORM visible APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
  endif()
endif()
string(REGEX MATCH "^[0-9]+" major "${CMAKE_CUDA_COMPILER_VERSION}")
set(oldest_driver "${oldest_driver_${major}}")
if(driver AND oldest_driver AND driver VERSION_LESS oldest_driver)
  message(STATUS "vareid_ext: driver ${driver} cannot run what ${nvcc} builds: update it to ${oldest_driver} or newer, "
                 "or install an older toolkit and type: CUDACXX=/path/to/nvcc VAREID_CUDA=ON pip install .")
elseif(torch_cuda VERSION_GREATER CMAKE_CUDA_COMPILER_VERSION)
  message(STATUS "vareid_ext: ${nvcc} is older than CUDA ${torch_cuda} of the installed PyTorch and may not know its GPUs; "
                 "for a newer nvcc ${with_pypi}")
endif()
message(STATUS "vareid_ext: CUDA kernels ON (${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION}, "
               "architectures ${CMAKE_CUDA_ARCHITECTURES})")

# Finds CUTLASS's headers: imported target Cutlass::headers.
#
# In this order: -DCUTLASS_DIR=…, $CUTLASS_PATH (both name the folder that holds `include`, or `include` itself), the
# installed Python package nvidia-cutlass, which is located and never imported. Needs FindPython's Interpreter.
include(FindPackageHandleStandardArgs)

execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "from importlib.util import find_spec as f; s = f('cutlass_library'); print(*(s.submodule_search_locations if s else []))"
  OUTPUT_VARIABLE _cutlass_package OUTPUT_STRIP_TRAILING_WHITESPACE)

find_path(Cutlass_INCLUDE_DIR cute/arch/mma_sm90.hpp
  HINTS ${CUTLASS_DIR} ENV CUTLASS_PATH
  PATHS ${_cutlass_package}/source
  PATH_SUFFIXES include
  NO_DEFAULT_PATH)

find_package_handle_standard_args(Cutlass REQUIRED_VARS Cutlass_INCLUDE_DIR REASON_FAILURE_MESSAGE
  "install its headers with `pip install --no-deps nvidia-cutlass==4.2.0.0`, or name them with -DCUTLASS_DIR or $CUTLASS_PATH")

if(Cutlass_FOUND AND NOT TARGET Cutlass::headers)
  add_library(Cutlass::headers INTERFACE IMPORTED)
  set_target_properties(Cutlass::headers PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${Cutlass_INCLUDE_DIR}")
endif()

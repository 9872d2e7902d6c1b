# Every update rule: the name of its struct, which update_rules/ has in a header of that name in lower
# case. From this list come the instantiations that ops/rule.*.in are the templates of, and what the
# registry includes and enters. Sets
#   FUSEDOPT_RULE_SOURCES       for each instruction set
#   FUSEDOPT_RULE_GPU_SOURCES   and, once, for the GPU
#   FUSEDOPT_GENERATED          the folder of rule_list.h
set(FUSEDOPT_RULES Adadelta Adagrad Adam Adamax Lion NAdam RAdam RMSprop SGD)

set(FUSEDOPT_GENERATED ${CMAKE_CURRENT_BINARY_DIR}/generated)
set(includes "")
set(entries "")
foreach(rule IN LISTS FUSEDOPT_RULES)
  string(TOLOWER ${rule} file)
  configure_file(ops/rule.cpp.in ${FUSEDOPT_GENERATED}/ops/${file}.cpp @ONLY)
  configure_file(ops/rule_gpu.cpp.in ${FUSEDOPT_GENERATED}/ops/${file}_gpu.cpp @ONLY)
  list(APPEND FUSEDOPT_RULE_SOURCES ${FUSEDOPT_GENERATED}/ops/${file}.cpp)
  list(APPEND FUSEDOPT_RULE_GPU_SOURCES ${FUSEDOPT_GENERATED}/ops/${file}_gpu.cpp)
  string(APPEND includes "#include \"update_rules/${file}.h\"\n")
  string(APPEND entries " \\\n  X(${rule}, \"${file}\")")
endforeach()
configure_file(rules/rule_list.h.in ${FUSEDOPT_GENERATED}/rule_list.h @ONLY)

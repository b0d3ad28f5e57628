# usage: upmoe_compile_quickly(TARGET [SOURCES...])   TARGET, or of it only SOURCES, with few optimisations.
# For what runs rarely and includes much (words, JSON, options, tests): optimised in full it takes a third longer to
# compile, and a build is most of what a first command makes a user wait for. Never for what computes in a step, whose
# line of metrics is words.
function(upmoe_compile_quickly target)
  if(ARGN)
    set_source_files_properties(${ARGN} PROPERTIES COMPILE_OPTIONS $<$<CONFIG:Release>:-O1>)
  else()
    target_compile_options(${target} PRIVATE $<$<CONFIG:Release>:-O1>)
  endif()
endfunction()

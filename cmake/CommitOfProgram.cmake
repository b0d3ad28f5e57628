# cmake -DPROGRAM=FILE -DSOURCE=FOLDER -P: writes PROGRAM.commit, the commit that the sources stand at, "-dirty" behind
# it when files differ from it. Run after each link, so it tells of what was linked. Without git, or outside a
# repository, there is no such file.
file(REMOVE ${PROGRAM}.commit)
find_program(git git)
if(git)
  execute_process(COMMAND ${git} describe --always --dirty --abbrev=12 --exclude=* WORKING_DIRECTORY ${SOURCE}
                  RESULT_VARIABLE status OUTPUT_VARIABLE commit ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(status EQUAL 0 AND EXISTS ${SOURCE}/.git)
    file(WRITE ${PROGRAM}.commit "${commit}\n")
  endif()
endif()

# Finds a cargo that can build this, as need_cargo of scripts/common.sh does: one on PATH may be too old, or rustup's
# with no toolchain behind it, and a better one follow.
function(lockstep_cargo_runs accepted cargo)
  set(${accepted} FALSE PARENT_SCOPE)
  execute_process(COMMAND ${cargo} --version OUTPUT_VARIABLE version RESULT_VARIABLE status ERROR_QUIET)
  if(status EQUAL 0 AND version MATCHES "^cargo ([0-9]+\\.[0-9]+)" AND CMAKE_MATCH_1 VERSION_GREATER_EQUAL 1.85)
    set(${accepted} TRUE PARENT_SCOPE)
  endif()
endfunction()

# One that was found before may have gone, or have lost its toolchain.
if(CARGO)
  lockstep_cargo_runs(still ${CARGO})
  if(NOT still)
    unset(CARGO CACHE)
  endif()
endif()
find_program(CARGO cargo VALIDATOR lockstep_cargo_runs)
if(NOT CARGO)
  message(FATAL_ERROR "[cargo] version: expected 1.85 or later on PATH, got none (Debian: apt-get install rustc-web cargo-web)")
endif()
# Its own compiler, not the first on PATH; none beside it: what cargo takes.
get_filename_component(folder ${CARGO} DIRECTORY)
set(rustc)
if(EXISTS ${folder}/rustc)
  set(rustc RUSTC=${folder}/rustc)
endif()

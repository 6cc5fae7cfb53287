// Broken models and other files for the cases of docs/bad-input.md.
#pragma once

#include <filesystem>

namespace lockstep::test {

/// Writes them all below `folder`, under the names that the document uses.
void make_bad_files(const std::filesystem::path& folder);

}  // namespace lockstep::test

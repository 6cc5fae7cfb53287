#include "format/download.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "format/libcurl.h"
#include "tensor/fail.h"

namespace lockstep {
namespace {

constexpr long kConnectSeconds = 30;
constexpr long kStallSeconds = 60;  // without a byte
constexpr long kMostRedirects = 10;
constexpr int kTries = 4;
constexpr size_t kLargestDocument = size_t{64} << 20;

using Curl = std::unique_ptr<CURL, decltype(LibCurl::easy_cleanup)>;

// A transfer and what libcurl says of it.
struct Transfer {
  Curl curl{nullptr, nullptr};
  char said[CURL_ERROR_SIZE] = "";

  CURL* get() const { return curl.get(); }
};

std::unique_ptr<Transfer> open_curl(const std::string& url, const Connection& connection) {
  static const CURLcode started = libcurl().global_init(CURL_GLOBAL_DEFAULT);
  auto transfer = std::make_unique<Transfer>();
  transfer->curl = Curl(started == CURLE_OK ? libcurl().easy_init() : nullptr, libcurl().easy_cleanup);
  if (!transfer->curl) fail(ErrorCode::io, "[{}] connect: libcurl does not start", shown_url(url));
  const auto set = [&](CURLoption option, auto value) {
    if (libcurl().easy_setopt(transfer->get(), option, value) != CURLE_OK) {
      fail(ErrorCode::unsupported, "[{}] connect: expected libcurl 7.85 or later, got one without option {}",
           shown_url(url), static_cast<int>(option));
    }
  };
  set(CURLOPT_URL, url.c_str());
  set(CURLOPT_PROTOCOLS_STR, "http,https");
  set(CURLOPT_REDIR_PROTOCOLS_STR, "http,https");
  set(CURLOPT_FOLLOWLOCATION, 1L);
  set(CURLOPT_MAXREDIRS, kMostRedirects);
  set(CURLOPT_FAILONERROR, 1L);
  set(CURLOPT_NOSIGNAL, 1L);
  set(CURLOPT_CONNECTTIMEOUT, kConnectSeconds);
  set(CURLOPT_LOW_SPEED_LIMIT, 1L);
  set(CURLOPT_LOW_SPEED_TIME, kStallSeconds);
  set(CURLOPT_USERAGENT, "lockstep");
  set(CURLOPT_ERRORBUFFER, static_cast<char*>(transfer->said));
  if (!connection.certificates.empty()) set(CURLOPT_CAINFO, connection.certificates.c_str());
  return transfer;
}

long http_status(CURL* curl) {
  long status = 0;
  libcurl().easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &status);
  return status;
}

[[noreturn]] void fail_transfer(const Transfer& transfer, CURLcode code, const std::string& url,
                                std::string_view advice) {
  if (code == CURLE_HTTP_RETURNED_ERROR) {
    fail(ErrorCode::io, "[{}] fetch: expected the file, got HTTP status {}{}", shown_url(url),
         http_status(transfer.get()), advice);
  }
  fail(ErrorCode::io, "[{}] fetch: {}{}", shown_url(url),
       transfer.said[0] != '\0' ? transfer.said : libcurl().easy_strerror(code), advice);
}

size_t append_document(char* data, size_t size, size_t count, void* into) {
  auto& body = *static_cast<std::string*>(into);
  if (body.size() + size * count > kLargestDocument) return 0;
  body.append(data, size * count);
  return size * count;
}

// A file being downloaded, as libcurl's callbacks see it.
struct Part {
  CURL* curl = nullptr;
  int fd = -1;
  int64_t size = 0;  // of the whole file
  int64_t arrived = 0;
  int reason = 0;  // errno of a failed write
  bool first = true;
  int64_t range = -1;      // where what the server sends begins, if it says so
  std::string unsuitable;  // why what it sends does not go on from what is there
  const std::function<void(int64_t)>* progress = nullptr;

  ~Part() {
    if (fd >= 0) ::close(fd);
  }
};

// Notes where a range begins: "Content-Range: bytes 1000-1999/2000".
size_t read_header(char* data, size_t size, size_t count, void* into) {
  Part& part = *static_cast<Part*>(into);
  std::string line(data, size * count);
  std::ranges::transform(line, line.begin(), [](unsigned char c) { return std::tolower(c); });
  if (line.starts_with("http/")) part.range = -1;  // of another answer, after a redirection
  long long begin = 0;
  if (std::sscanf(line.c_str(), "content-range: bytes %lld-", &begin) == 1) part.range = begin;
  return size * count;
}

// Whether what the server sends can follow what is there; empties the file if it is the whole again.
bool goes_on(Part& part) {
  if (part.arrived == 0) return true;
  if (http_status(part.curl) != 200) {
    if (part.range != part.arrived)
      part.unsuitable = part.range < 0 ? "a part of unknown place"
                                       : "a part from byte " + std::to_string(part.range) + " on";
    return part.unsuitable.empty();
  }
  // A server that does not know ranges sends the whole file; a page that says "log in" is no such thing.
  curl_off_t announced = -1;
  libcurl().easy_getinfo(part.curl, CURLINFO_CONTENT_LENGTH_DOWNLOAD_T, &announced);
  if (announced != part.size) {
    part.unsuitable = announced < 0 ? "something of unknown length" : std::to_string(announced) + " bytes";
    return false;
  }
  part.arrived = 0;
  if (::ftruncate(part.fd, 0) != 0) part.reason = errno;
  return part.reason == 0;
}

size_t append_part(char* data, size_t size, size_t count, void* into) {
  Part& part = *static_cast<Part*>(into);
  if (std::exchange(part.first, false) && !goes_on(part)) return 0;
  const size_t bytes = size * count;
  for (size_t done = 0; done < bytes;) {
    const ssize_t written = ::pwrite(part.fd, data + done, bytes - done, part.arrived);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) {
      part.reason = errno;
      return 0;
    }
    done += static_cast<size_t>(written);
    part.arrived += written;
  }
  if (part.arrived > part.size) return 0;
  if (*part.progress) (*part.progress)(part.arrived);
  return bytes;
}

// One try. True when the file is whole, false when another try may help.
bool try_download(const std::string& url, const std::filesystem::path& path, Part& part,
                  const Connection& connection, bool last) {
  const auto curl = open_curl(url, connection);
  part.curl = curl->get();
  part.first = true;
  const int64_t before = part.arrived;
  const std::string range = std::to_string(before) + "-";
  if (before > 0) libcurl().easy_setopt(part.curl, CURLOPT_RANGE, range.c_str());
  libcurl().easy_setopt(part.curl, CURLOPT_HEADERFUNCTION, read_header);
  libcurl().easy_setopt(part.curl, CURLOPT_HEADERDATA, &part);
  libcurl().easy_setopt(part.curl, CURLOPT_WRITEFUNCTION, append_part);
  libcurl().easy_setopt(part.curl, CURLOPT_WRITEDATA, &part);
  const CURLcode code = libcurl().easy_perform(part.curl);
  if (part.reason != 0) {
    fail(ErrorCode::io, "[{}] write: {}; what has arrived is kept, so make room and run this again",
         path.string(), std::strerror(part.reason));
  }
  if (!part.unsuitable.empty()) {
    fail(ErrorCode::format,
         "[{}] fetch: expected the rest of {} bytes from byte {} on, got {}; what has arrived is kept, and "
         "running this again goes on from there; to begin anew, remove {}",
         shown_url(url), part.size, part.arrived, part.unsuitable, path.string());
  }
  if (part.arrived > part.size) {
    ::unlink(path.c_str());
    fail(ErrorCode::format, "[{}] size: expected {} bytes, got more", shown_url(url), part.size);
  }
  if (part.arrived == part.size) return true;
  const long status = http_status(part.curl);
  constexpr long kRangeNotThere = 416;
  curl_off_t announced = -1;
  libcurl().easy_getinfo(part.curl, CURLINFO_CONTENT_LENGTH_DOWNLOAD_T, &announced);
  // All that the server has, not a connection that was cut: another file.
  if (status == kRangeNotThere || (code == CURLE_OK && announced >= 0)) {
    ::unlink(path.c_str());
    fail(ErrorCode::format, "[{}] size: expected {} bytes, got {}", shown_url(url), part.size, part.arrived);
  }
  const bool hopeless = (code == CURLE_HTTP_RETURNED_ERROR && status < 500 && status != 429) ||
                        code == CURLE_PEER_FAILED_VERIFICATION || code == CURLE_SSL_CACERT_BADFILE ||
                        code == CURLE_URL_MALFORMAT || code == CURLE_UNSUPPORTED_PROTOCOL;
  if (!last && !hopeless) return false;
  const std::string_view advice =
      part.arrived > 0 ? "; what has arrived is kept, and running this again goes on from there" : "";
  if (code == CURLE_OK || code == CURLE_PARTIAL_FILE) {
    fail(ErrorCode::io, "[{}] fetch: the connection was cut after {} of {} bytes{}", shown_url(url),
         part.arrived, part.size, advice);
  }
  fail_transfer(*curl, code, url, advice);
}

}  // namespace

std::string shown_url(std::string_view url) {
  const size_t scheme = url.find("://");
  const size_t host = scheme == url.npos ? 0 : scheme + 3;
  const size_t at = url.substr(host, url.find_first_of("/?#", host) - host).rfind('@');
  if (at == url.npos) return std::string(url);
  return std::string(url.substr(0, host)) + "****" + std::string(url.substr(host + at));
}

Document fetch_document(const std::string& url, std::string_view accept, const Connection& connection) {
  const auto transfer = open_curl(url, connection);
  CURL* curl = transfer->get();
  Document document;
  const std::string header = "Accept: " + std::string(accept);
  const std::unique_ptr<curl_slist, decltype(LibCurl::slist_free_all)> headers(
      libcurl().slist_append(nullptr, header.c_str()), libcurl().slist_free_all);
  libcurl().easy_setopt(curl, CURLOPT_HTTPHEADER, headers.get());
  libcurl().easy_setopt(curl, CURLOPT_ACCEPT_ENCODING, "");
  libcurl().easy_setopt(curl, CURLOPT_WRITEFUNCTION, append_document);
  libcurl().easy_setopt(curl, CURLOPT_WRITEDATA, &document.body);
  if (const CURLcode code = libcurl().easy_perform(curl); code != CURLE_OK)
    fail_transfer(*transfer, code, url, "");
  const char* text = nullptr;
  libcurl().easy_getinfo(curl, CURLINFO_CONTENT_TYPE, &text);
  document.media_type = text != nullptr ? text : "";
  libcurl().easy_getinfo(curl, CURLINFO_EFFECTIVE_URL, &text);
  document.url = text != nullptr ? text : url;
  return document;
}

void download(const std::string& url, const std::filesystem::path& path, int64_t size,
              const Connection& connection, const std::function<void(int64_t)>& progress) {
  Part part;
  part.size = size;
  part.progress = &progress;
  part.fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  struct stat info{};
  if (part.fd < 0 || ::fstat(part.fd, &info) != 0) {
    fail(ErrorCode::io, "[{}] create: {}", path.string(), std::strerror(errno));
  }
  if (info.st_size > size && ::ftruncate(part.fd, 0) != 0) {
    fail(ErrorCode::io, "[{}] write: {}", path.string(), std::strerror(errno));
  }
  part.arrived = info.st_size > size ? 0 : info.st_size;
  if (part.arrived == size) return;
  for (int t = 1; !try_download(url, path, part, connection, t == kTries); ++t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(250) * (1 << t));
  }
}

std::string absolute_url(const std::string& base, const std::string& link) {
  const auto refuse = [&] {
    fail(ErrorCode::format, "[{}] link: expected an http or https address, got \"{}\"", shown_url(base),
         shown_url(link));
  };
  const std::unique_ptr<CURLU, decltype(LibCurl::url_cleanup)> url(libcurl().url(), libcurl().url_cleanup);
  char* text = nullptr;
  if (!url || libcurl().url_set(url.get(), CURLUPART_URL, base.c_str(), 0) != CURLUE_OK ||
      libcurl().url_set(url.get(), CURLUPART_URL, link.c_str(), 0) != CURLUE_OK ||
      libcurl().url_set(url.get(), CURLUPART_FRAGMENT, nullptr, 0) != CURLUE_OK ||
      libcurl().url_get(url.get(), CURLUPART_URL, &text, 0) != CURLUE_OK) {
    refuse();
  }
  const std::unique_ptr<char, decltype(LibCurl::free)> owned(text, libcurl().free);
  std::string result = text;
  if (!result.starts_with("http://") && !result.starts_with("https://")) refuse();
  return result;
}

}  // namespace lockstep

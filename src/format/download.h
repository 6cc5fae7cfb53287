// Fetching over HTTP and HTTPS with libcurl.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>

namespace lockstep {

/// How connections are made.
struct Connection {
  std::string certificates;  ///< file of trusted authorities; empty: the system's
};

/// An address as messages show it: without the name and password that it may hold.
std::string shown_url(std::string_view url);

/// A small document and its media type. At most 64 MB. Error `io` saying what the server or the network did.
struct Document {
  std::string body;
  std::string media_type;
  std::string url;  ///< after redirections: what relative links refer to
};
Document fetch_document(const std::string& url, std::string_view accept, const Connection& connection);

/// Downloads `url` to `path`, going on where an earlier try left off, and trying again a few times when the
/// connection is cut. `size` is what the file must have in the end; `progress` gets the bytes so far. Error
/// `io`; what has arrived stays at `path` for the next try.
void download(const std::string& url, const std::filesystem::path& path, int64_t size,
              const Connection& connection, const std::function<void(int64_t)>& progress);

/// `link` as seen from the document at `base` (RFC 3986). Error `format` if it is no http or https address.
std::string absolute_url(const std::string& base, const std::string& link);

}  // namespace lockstep

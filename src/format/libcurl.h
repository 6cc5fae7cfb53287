// libcurl, loaded when something is fetched: with all that it needs, it would take longer to load than a
// small model does.
#pragma once

#include <curl/curl.h>

namespace lockstep {

/// The functions of libcurl that are used, as <curl/curl.h> declares them, without their `curl_`.
struct LibCurl {
  decltype(&curl_global_init) global_init;
  decltype(&curl_easy_init) easy_init;
  decltype(&curl_easy_cleanup) easy_cleanup;
  decltype(&curl_easy_setopt) easy_setopt;
  decltype(&curl_easy_getinfo) easy_getinfo;
  decltype(&curl_easy_perform) easy_perform;
  decltype(&curl_easy_strerror) easy_strerror;
  decltype(&curl_slist_append) slist_append;
  decltype(&curl_slist_free_all) slist_free_all;
  decltype(&curl_url) url;
  decltype(&curl_url_set) url_set;
  decltype(&curl_url_get) url_get;
  decltype(&curl_url_cleanup) url_cleanup;
  decltype(&curl_free) free;
};

/// Loads it the first time. Error `not_found` if it is not installed.
const LibCurl& libcurl();

}  // namespace lockstep

// A small HTTP/1.1 server on the loopback interface, that misbehaves as a test wishes.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>

namespace lockstep::test {

struct Request {
  std::string path;   ///< without the query
  std::string range;  ///< "bytes=5-" without "bytes=", or empty
};

struct Response {
  int status = 200;
  std::string type = "text/html";
  std::string location;       ///< of a redirection
  std::string content_range;  ///< of a part of a file
  std::string body;
  int64_t announced = -1;  ///< Content-Length, if not that of the body; the connection is cut after the body
};

class HttpServer {
 public:
  /// Answers every request, one at a time, by `answer`, from its own thread.
  explicit HttpServer(std::function<Response(const Request&)> answer);
  ~HttpServer();

  /// "http://127.0.0.1:PORT"
  std::string url() const { return "http://127.0.0.1:" + std::to_string(port_); }
  int requests() const { return requests_; }

 private:
  void serve();
  void reply(int connection);

  std::function<Response(const Request&)> answer_;
  std::atomic<int> requests_ = 0;
  int socket_ = -1;
  int port_ = 0;
  std::thread thread_;
};

}  // namespace lockstep::test

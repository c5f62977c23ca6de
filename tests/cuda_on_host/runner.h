// Runs one case of an operator: `program CASE RESULT`, in the dtype ELEMENT. tests/on_host.py writes the file CASE; the program defines
// `run`, which reads it and returns the bytes of the results.
//
// The case runs in both orders of threads; results that differ are a race and end the program.
#pragma once

#include <fstream>
#include <iterator>

#include "cuda/moves.cuh"

using namespace spanet;

struct Reader {
  std::ifstream file;

  int64_t number() {
    int64_t value = 0;
    file.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
  }
};

struct Memory {  // a storage of its own, so that the address sanitizer sees every access outside it
  std::unique_ptr<void, void (*)(void*)> bytes{nullptr, std::free};

  explicit Memory(int64_t size, int fill = 0xff) {
    bytes.reset(std::malloc(size));  // malloc aligns to 16 bytes
    std::memset(bytes.get(), fill, size);
  }
};

struct HostDevice : Device {
  std::vector<Memory> workspaces;

  explicit HostDevice(int64_t limit) : Device{} { shared_limit = static_cast<int>(limit); }
  void* allocate(int64_t bytes) override { return workspaces.emplace_back(bytes).bytes.get(); }
};

struct Input {
  Memory storage;
  int64_t strides[4];
  int64_t offset;

  template <typename T> T* data() const { return static_cast<T*>(storage.bytes.get()) + offset; }
};

inline Input read_input(Reader& in) {
  const int64_t size = in.number(), count = in.number();
  Input input{Memory(count * size), {}, in.number()};
  for (int64_t& stride : input.strides) stride = in.number();
  in.file.read(static_cast<char*>(input.storage.bytes.get()), count * size);
  return input;
}

inline View view_of(const Input& input, int64_t size) {
  char* first = static_cast<char*>(input.storage.bytes.get()) + input.offset * size;
  return {first, input.strides[0], input.strides[1], input.strides[2], input.strides[3], Move::kElements};
}

// A new tensor of the layout that an operator gives its results.
template <typename T>
View result_view(const Shape& shape, T* data) {
  const auto [batch, channels, height, width, last] = shape;
  if (last) return {data, channels * height * width, 1, width * channels, channels, Move::kElements};
  return {data, channels * height * width, height * width, width, 1, Move::kElements};
}

template <typename T>
std::vector<char> run(Reader& in);

inline std::vector<char> run_file(const char* path, bool reversed) {
  host::reversed = reversed;
  Reader in{std::ifstream(path, std::ios::binary)};
  return run<ELEMENT>(in);
}

int main(int, char** arguments) {
  const std::vector<char> result = run_file(arguments[1], false);
  if (run_file(arguments[1], true) != result) host::fail("the result depends on the order of threads: a barrier is missing");
  std::ofstream(arguments[2], std::ios::binary).write(result.data(), static_cast<std::streamsize>(result.size()));
}

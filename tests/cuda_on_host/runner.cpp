// Runs one operator on one case, `runner CASE RESULT`, in the dtype ELEMENT. tests/test_cuda_on_host.py writes the file CASE.
//
// The case runs in both orders of threads; results that differ are a race and end the program.
#include <fstream>
#include <iostream>
#include <iterator>

#include "cuda/radial_filter_plan.cuh"

namespace {

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

struct Operand {
  Memory storage;
  int64_t strides[4];
  int64_t offset;
};

Operand read_operand(Reader& in, int64_t size) {
  const int64_t count = in.number();
  Operand operand{Memory(count * size), {}, in.number()};
  for (int64_t& stride : operand.strides) stride = in.number();
  in.file.read(static_cast<char*>(operand.storage.bytes.get()), count * size);
  return operand;
}

View view_of(const Operand& operand, int64_t size) {
  char* first = static_cast<char*>(operand.storage.bytes.get()) + operand.offset * size;
  return {first, operand.strides[0], operand.strides[1], operand.strides[2], operand.strides[3], Move::kElements};
}

template <typename T>
std::vector<char> run(Reader& in) {
  using W = Wide<T>;
  const bool backward = in.number() != 0;
  Shape shape{};
  for (int64_t* extent : {&shape.batch, &shape.channels, &shape.height, &shape.width}) *extent = in.number();
  shape.channels_last = in.number() != 0;
  const int64_t radius_squared = in.number(), shells = in.number(), shared_limit = in.number(), alignment_of_y = in.number();
  const Operand x = read_operand(in, sizeof(T)), second = read_operand(in, backward ? sizeof(T) : sizeof(W));
  const Operand third = read_operand(in, sizeof(W));
  std::vector<Memory> workspaces;
  const auto allocate = [&](int64_t bytes) { return workspaces.emplace_back(bytes).bytes.get(); };
  const int64_t elements = shape.batch * shape.channels * shape.height * shape.width;
  if (backward) {
    Memory gradients((1 + shells) * shape.channels * sizeof(W), 0);
    W* base_grad = static_cast<W*>(gradients.bytes.get());
    run_backward<T>(shape, view_of(second, sizeof(T)), view_of(x, sizeof(T)), base_grad, base_grad + shape.channels, radius_squared, shared_limit,
                    allocate, nullptr);
    return {reinterpret_cast<char*>(base_grad), reinterpret_cast<char*>(base_grad + (1 + shells) * shape.channels)};
  }
  Memory result((elements + alignment_of_y) * sizeof(T));
  T* y = static_cast<T*>(result.bytes.get()) + alignment_of_y;
  const auto [batch, channels, height, width, last] = shape;
  const View out = last ? View{y, channels * height * width, 1, width * channels, channels, Move::kElements}
                        : View{y, channels * height * width, height * width, width, 1, Move::kElements};
  const Profile<W> profile{static_cast<const W*>(second.storage.bytes.get()) + second.offset,
                           static_cast<const W*>(third.storage.bytes.get()) + third.offset, second.strides[0], third.strides[0], third.strides[1]};
  run_filter<T>(shape, view_of(x, sizeof(T)), out, profile, radius_squared, shared_limit, allocate, nullptr);
  return {reinterpret_cast<char*>(y), reinterpret_cast<char*>(y + elements)};
}

std::vector<char> run_file(const char* path, bool reversed) {
  host::reversed = reversed;
  Reader in{std::ifstream(path, std::ios::binary)};
  return run<ELEMENT>(in);
}

}  // namespace

int main(int, char** arguments) {
  const std::vector<char> result = run_file(arguments[1], false);
  if (run_file(arguments[1], true) != result) host::fail("the result depends on the order of threads: a barrier is missing");
  std::ofstream(arguments[2], std::ios::binary).write(result.data(), static_cast<std::streamsize>(result.size()));
}
